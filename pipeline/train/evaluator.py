"""Evaluation during training: pages shared out over all ranks, each evaluated once, scored by the leading one."""

from __future__ import annotations

import logging
import time

import torch

from pipeline.config import RunConfig
from pipeline.core.distributed import World
from pipeline.data.format.dataset import PackedDataset
from pipeline.evaluate.coco_ap import score
from pipeline.evaluate.inference import ground_truth, predict
from pipeline.runs.evaluations import (
    best_step,
    out_of_patience,
    read_evaluations,
    write_evaluation,
)
from pipeline.runs.metrics import Metrics
from pipeline.train.precision import WeightEma

log = logging.getLogger(__name__)


class Evaluator:
    """Evaluates every ``run.eval_every`` steps and at the end, and says when it is enough; idle where it is 0.

    Starting it is a collective: what was evaluated before ``first_step`` is what the leading rank has read.
    """

    def __init__(self, config: RunConfig, world: World, average: WeightEma, metrics: Metrics, first_step: int) -> None:
        self.config = config
        self.world = world
        self.average = average
        self.metrics = metrics
        self.on_side = config.run.eval_on == "side"
        self.every = 0 if self.on_side else config.run.eval_every
        self.steps = config.schedule.scaled().steps
        self.evaluations = world.gather(read_evaluations(config.folder, first_step))[0]

    def due(self, step: int) -> bool:
        """Whether the weights after ``step`` steps are to be evaluated and have not been."""
        on_time = bool(self.every and step) and (step % self.every == 0 or step == self.steps)
        return on_time and all(line["step"] != step for line in self.evaluations)

    def refresh(self, step: int) -> None:
        """Take in what was evaluated beside training; a collective where that is done."""
        if self.on_side and self.config.run.eval_every and step % self.config.run.eval_every == 0:
            self.evaluations = self.world.gather(read_evaluations(self.config.folder, step))[0]

    def should_end_early(self) -> bool:
        """Whether training ends early."""
        return out_of_patience(self.evaluations, self.config.run.patience)

    def best_step(self) -> int | None:
        """The step of the best AP so far."""
        return best_step(read_evaluations(self.config.folder) if self.on_side else self.evaluations)

    @torch.no_grad()
    def evaluate(self, step: int) -> None:
        """Evaluate the weights after ``step`` steps; a collective."""
        begin = time.perf_counter()
        assert self.config.data.val is not None
        dataset, detector = PackedDataset(self.config.data.val, self.config.data.storage), self.average.detector
        training = detector.training
        own = predict(
            detector,
            dataset,
            self.config.data.view,
            batch=self.config.run.eval_batch,
            device=self.world.device,
            rank=self.world.rank,
            ranks=self.world.size,
        )
        detector.train(training)
        results = [result for rank_results in self.world.collect(own) for result in rank_results]
        figures = score(ground_truth(dataset), results) if self.world.is_main else {}
        line = self.world.gather({"step": step, **figures})[0]
        self.evaluations.append(line)
        self.metrics.exclude_time(time.perf_counter() - begin)
        if self.world.is_main:
            write_evaluation(self.config.folder, line)
            self.metrics.log_evaluation(step, {name: line[name] for name in ("ap", "ap50", "ap75")})
            log.info("step %d: AP %.4f on %d pages, best at step %d", step, line["ap"], line["pages"], self.best_step())
