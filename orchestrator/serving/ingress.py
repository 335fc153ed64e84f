"""The front as a deployment of Ray Serve: HTTP in one process, which loads no torch."""

from __future__ import annotations

from typing import Any

from ray.exceptions import RayError
from ray.serve.exceptions import BackPressureError, RayServeException
from ray.serve.handle import DeploymentHandle

from orchestrator.serving.door import Door
from orchestrator.serving.front import build_front
from orchestrator.serving.messages import About, Answer, Limits, Refused, too_busy, unavailable
from orchestrator.serving.meters import Meters


class Front:
    """A Serve deployment. There is one, so that one number says how many requests are inside."""

    def __init__(
        self,
        detector: DeploymentHandle[Any],
        about: About,
        limits: Limits,
        token_digest: bytes | None,
    ) -> None:
        self.ask, self.about, self.limits = Asking(detector), about, limits
        self.token_digest = token_digest

    def __serve_build_asgi_app__(self) -> Door:
        meters = Meters()
        app = build_front(self.ask, self.about, self.limits, meters)
        return Door(app, self.limits, meters, self.token_digest)


class Asking:
    """The detectors, as the front asks them."""

    def __init__(self, handle: DeploymentHandle[Any]) -> None:
        self.handle = handle.options(method_name="answer")

    async def __call__(self, data: bytes, score: float) -> Answer:
        response = self.handle.remote(data, score)
        try:
            answer: Answer | Refused = await response
        except BackPressureError:
            raise too_busy("as many as it has room for") from None
        except (RayServeException, RayError) as error:
            raise unavailable(type(error).__name__) from error
        if isinstance(answer, Refused):
            raise answer
        return answer
