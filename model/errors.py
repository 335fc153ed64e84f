"""What a user can get wrong, said in one line."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A mistake in what was asked, not in the program: where, expected, got, remedy.

    A job prints it as one line and exits with code 2, without a traceback.
    """

    def __init__(
        self, where: str, expected: str = "", got: str = "", remedy: str = "see --help"
    ) -> None:
        """where alone: the text of another process's traceback, as torch's loader hands it over."""
        if not expected:
            last = (
                where.strip().splitlines()[-1].removeprefix(f"{__name__}.{type(self).__name__}: ")
            )
            where, _, rest = last.partition(": expected ")
            expected, _, rest = rest.partition(", got ")
            got, _, remedy = rest.rpartition("; ")
        self.where, self.expected, self.got, self.remedy = where, expected, got, remedy
        super().__init__(f"{where}: expected {expected}, got {got}; {remedy}")

    def __reduce__(self) -> tuple[type[UserError], tuple[str, str, str, str]]:
        return type(self), (self.where, self.expected, self.got, self.remedy)


class ConfigError(UserError):
    """A setting with an unknown name, a wrong type or a value that cannot work."""


class DataError(UserError):
    """A dataset that is missing, broken or not what its format says."""


class CheckpointError(UserError):
    """A checkpoint or a weight file that cannot be used."""


class DivergedError(Exception):
    """Loss or gradient stopped being finite; raised on every rank in the same step.

    Attributes:
        step: the global step whose update was not applied.
    """

    def __init__(self, step: int, loss: float, grad_norm: float, lr: float) -> None:
        self.step, self.loss, self.grad_norm, self.lr = step, loss, grad_norm, lr
        super().__init__(
            f"step {step}: loss {loss:g}, gradient norm {grad_norm:g} at learning rate {lr:g}; "
            "the update was not applied and the last checkpoint is good: "
            "lower optim.lr_per_64 or lengthen optim.warmup"
        )

    def __reduce__(self) -> tuple[type[DivergedError], tuple[int, float, float, float]]:
        return type(self), (self.step, self.loss, self.grad_norm, self.lr)


def nearest(word: str, known: Iterable[str]) -> str:
    """A hint that names the closest of `known`, or lists them when none is close."""
    names = [str(name) for name in known]
    close = difflib.get_close_matches(word, names, n=1, cutoff=0.5)
    if close:
        return f"did you mean {close[0]!r}?"
    return "known: " + ", ".join(names[:20]) + (", …" if len(names) > 20 else "")
