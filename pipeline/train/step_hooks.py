"""What happens between two steps: checkpoints, and evaluations of what they hold."""

from __future__ import annotations

from collections.abc import Callable

from pipeline.config import RunSettings
from pipeline.runs.checkpoint_writer import CheckpointWriter
from pipeline.runs.metrics import Metrics
from pipeline.train.evaluator import Evaluator
from pipeline.train.state import TrainingState


def no_preemption() -> bool:
    """Default hook: no preemption notice."""
    return False


class StepHooks:
    """Saves and evaluates after steps for which that is due.

    Args:
        state: saved state.
        metrics: saved with it.
        evaluator: evaluates, and decides early stopping.
        writer: of checkpoints.
        settings: cadence.
        first_step: steps done and saved before this start.
        preemption_imminent: called by all ranks after every step; True if a node is about to be preempted.
    """

    def __init__(
        self,
        state: TrainingState,
        metrics: Metrics,
        evaluator: Evaluator,
        writer: CheckpointWriter,
        settings: RunSettings,
        first_step: int,
        preemption_imminent: Callable[[], bool] = no_preemption,
    ) -> None:
        self.state, self.metrics, self.evaluator, self.writer = state, metrics, evaluator, writer
        self.preemption_imminent = preemption_imminent
        self.every = settings.checkpoint_every
        self.saved = first_step

    def after_step(self, done: int, stops: bool) -> bool:
        """Save if due, then evaluate if due. Return whether the run has ended for good."""
        self.evaluator.refresh(done)
        due, ends = self.evaluator.due(done), self.has_ended(done)
        if (self.preemption_imminent() or stops or due or ends or done % self.every == 0) and done > self.saved:
            snapshot = self.state.snapshot(done, self.metrics, self.evaluator.best_step())
            if snapshot is not None:
                self.writer.save(snapshot)
            self.saved = done
        # A stop leaves less time than an evaluation takes; the next start makes up for it.
        return self.evaluate_if_due(done) if ends or not stops else False

    def evaluate_if_due(self, done: int) -> bool:
        """Evaluate if due. Return whether the run has ended for good."""
        if self.evaluator.due(done):
            self.evaluator.evaluate(done)
        return self.has_ended(done)

    def has_ended(self, done: int) -> bool:
        """Whether the run ends after ``done`` steps."""
        return done == self.evaluator.steps or self.evaluator.should_end_early()
