"""Find the run to go on with, or begin one: in MLflow where it answers, by its card where not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeVar

from orchestrator.errors import TrackingError
from orchestrator.records.run import Cards, TrackedRun, new_run
from orchestrator.records.secrets import without_secret
from orchestrator.records.tracker import DOWN, KEY, Tracker, cause, create_run
from orchestrator.storage.filesystems import Place

T = TypeVar("T")


class Runs:
    """Runs of one experiment.

    tracker is None, and trouble says why, where MLflow does not answer.
    """

    def __init__(
        self,
        uri: str,
        experiment: str,
        artifact_root: str | None,
        card_places: Sequence[Place],
        *,
        say: Callable[[str], None],
    ) -> None:
        """Raises TrackingError: it answers, but the experiment was deleted."""
        self.uri, self.experiment, self.artifact_root = uri, experiment, artifact_root
        self.cards, self.say = Cards(card_places, say=say), say
        self.tracker: Tracker | None = None
        self.trouble: TrackingError | None = None
        try:
            self.tracker = Tracker(uri, experiment, artifact_root)
        except TrackingError as error:
            if error.where != DOWN:
                raise
            self.trouble = error

    def unfinished(self, key: str) -> TrackedRun | None:
        """The newest run of a configuration that can be gone on with."""
        card = self.cards.newest(key)
        found = self._ask(lambda tracker: tracker.find_unfinished(key))
        if self.tracker is None:
            return None if card is None or card.done else self._continued(card)
        if found is not None and card is not None:
            run = self.tracker.tracked(found, self.artifact_root)
            if card.done and card.run_key == run.run_key:
                return None  # it ended while MLflow did not answer
            unsent = not card.done and card.run_id is None
            return self._continued(card) if unsent and card.began_ms > run.began_ms else run
        if found is not None:
            return self.tracker.tracked(found, self.artifact_root)
        if card is not None and not card.done and card.run_id is None:
            return self._continued(card)  # begun while MLflow did not answer, not yet sent
        return None

    def artifact_location(self) -> str:
        """Of the experiment's runs; "" where MLflow does not say."""
        return self._ask(lambda tracker: tracker.artifact_location()) or ""

    def check_artifacts(self, *, required: bool) -> str | None:
        """What to say of a place that takes no artifacts; None if it does, or nobody can be asked.

        Raises:
            TrackingError: it is required to.
        """
        if self.tracker is None:
            return None
        try:
            self.tracker.check_artifacts()
        except TrackingError as error:
            if required:
                raise
            return f"no artifacts can be written ({error.got}): they wait"
        return None

    def _ask(self, question: Callable[[Tracker], T]) -> T | None:
        """The answer; None, and from then on nobody to ask, where there is none."""
        if self.tracker is None:
            return None
        try:
            return question(self.tracker)
        except Exception as error:  # it answered a moment ago
            self.tracker = None
            self.trouble = TrackingError(
                DOWN, "an MLflow server or database that answers",
                f"{without_secret(self.uri)} ({cause(error)})", "repair it",
            )  # fmt: skip
            return None

    def check(self, key: str, *, resume: str, required: bool) -> str | None:
        """What to say of a tracker that does not answer; None if it does.

        Raises:
            TrackingError: it has to, for a first start.
        """
        if self.trouble is None:
            return None
        if required and (resume == "never" or self.unfinished(key) is None):
            error = self.trouble
            raise TrackingError(
                error.where, error.expected, error.got,
                f"{error.remedy}; --set tracking.required=false trains without it and sends later",
            )  # fmt: skip
        return f"does not answer ({self.trouble.got}): what is recorded waits and is sent later"

    def open(self, *, name: str, key: str, resume: str) -> TrackedRun:
        """Go on with a run or begin one; see `orchestrator.config.cli.Options.resume`.

        Raises:
            TrackingError: a run to be continued is not there.
        """
        if resume not in ("auto", "must", "never"):
            return self._by_id(resume, key)
        found = None if resume == "never" else self.unfinished(key)
        if found is not None:
            return found
        if resume == "must":
            raise TrackingError(
                "--resume", "an unfinished run of this name and configuration", "none",
                "leave --resume out to start one, or give its run id",
            )  # fmt: skip
        run = new_run(self.uri, self.experiment, self.artifact_root, name, key)
        if self.tracker is None:
            return run
        try:
            return create_run(self.tracker.client, self.tracker.experiment_id, run)
        except (
            Exception
        ) as error:  # it answered a moment ago: the run is created when it does again
            self.say(f"the tracker stopped answering ({cause(error)}): the run is created later")
            return run

    def tags(self, run: TrackedRun) -> dict[str, str]:
        """What the tracker has, {} if it does not answer."""
        if self.tracker is None or run.run_id is None:
            return {}
        return self.tracker.tags(run.run_id)

    def _by_id(self, run_id: str, key: str) -> TrackedRun:
        if self.tracker is None:
            card = self.cards.newest(key)
            if card is None or run_id not in (card.run_id, card.run_key):
                assert self.trouble is not None
                raise self.trouble
            return self._continued(card)
        run = self.tracker.get(run_id)
        if run.info.lifecycle_stage != "active" or run.data.tags.get(KEY) != key:
            got = "a deleted one" if run.info.lifecycle_stage != "active" else "one of another"
            raise TrackingError(
                "--resume", "an active run of this name and configuration", got,
                "give the flags it was started with, or leave --resume out to start a new run",
            )  # fmt: skip
        return self.tracker.tracked(run, self.artifact_root)

    def _continued(self, card: TrackedRun) -> TrackedRun:
        """With the URI of today, which may hold a password that no card keeps."""
        return replace(card, tracking_uri=self.uri, continued=True, outcome="")
