"""Evaluation during training: pages split over all ranks, each evaluated once, scored by rank 0."""

from __future__ import annotations

import logging
import time

import torch

from pipeline.context import RunContext
from pipeline.core.distributed import World
from pipeline.evaluate.coco_ap import score
from pipeline.evaluate.inference import ground_truth, predict
from pipeline.runs.evaluations import best_step, out_of_patience, read_evaluations, write_evaluation
from pipeline.runs.metrics import Metrics
from pipeline.train.precision import WeightEma

log = logging.getLogger(__name__)


class Evaluator:
    """Evaluates every ``run.eval_every`` steps and at the end, and decides early stopping. Idle if that is 0.

    Creating it is a collective: evaluations up to ``first_step`` are those that rank 0 has read.
    """

    def __init__(self, context: RunContext, world: World, ema: WeightEma, metrics: Metrics, first_step: int) -> None:
        self.context = context
        self.settings = context.config.run
        self.folder = context.config.folder
        self.world = world
        self.ema = ema
        self.metrics = metrics
        self.on_side = self.settings.eval_on == "side"
        self.every = 0 if self.on_side else self.settings.eval_every
        self.steps = context.config.schedule.scaled().steps
        self.evaluations = world.all_gather_object(read_evaluations(self.folder, first_step))[0]

    def due(self, step: int) -> bool:
        """Whether the weights after ``step`` steps are due for evaluation and have not been evaluated."""
        on_time = bool(self.every and step) and (step % self.every == 0 or step == self.steps)
        return on_time and all(line["step"] != step for line in self.evaluations)

    def refresh(self, step: int) -> None:
        """Read the evaluations of a side process. A collective if there is one."""
        if self.on_side and self.settings.eval_every and step % self.settings.eval_every == 0:
            self.evaluations = self.world.all_gather_object(read_evaluations(self.folder, step))[0]

    def should_end_early(self) -> bool:
        """Whether patience has run out."""
        return out_of_patience(self.evaluations, self.settings.patience)

    def best_step(self) -> int | None:
        """Step of the highest AP so far."""
        return best_step(read_evaluations(self.folder) if self.on_side else self.evaluations)

    @torch.no_grad()
    def evaluate(self, step: int) -> None:
        """Evaluate the weights after ``step`` steps. A collective."""
        begin = time.perf_counter()
        dataset, detector = self.context.val, self.ema.detector
        assert dataset is not None, "run.eval_every requires data.val"
        training = detector.training
        own = predict(
            detector,
            dataset,
            self.context.config.data.view,
            batch_size=self.settings.eval_batch,
            device=self.world.device,
            rank=self.world.rank,
            world_size=self.world.size,
        )
        detector.train(training)
        results = [result for rank_results in self.world.gather_object(own) for result in rank_results]
        metrics = (
            score(ground_truth(dataset), results, limit=self.settings.detection_limit) if self.world.is_main else {}
        )
        line = self.world.all_gather_object({"step": step, **metrics})[0]
        self.evaluations.append(line)
        self.metrics.exclude_time(time.perf_counter() - begin)
        if self.world.is_main:
            write_evaluation(self.folder, line)
            self.metrics.log_evaluation(step, {name: line[name] for name in ("ap", "ap50", "ap75")})
            log.info("step %d: AP %.4f on %d pages, best at step %d", step, line["ap"], line["pages"], self.best_step())
