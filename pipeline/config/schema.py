"""The config of a run. Each field's text says its unit; paths are relative to the working directory."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from graphkd.detectors.config import DetectorConfig
from graphkd.errors import ConfigError
from graphkd.method.config import MethodConfig
from graphkd.nodes import NodePolicy
from pipeline.data.loading.augmentation import AugmentationConfig
from pipeline.data.loading.order import check_batch_size
from pipeline.data.storage.base import StorageConfig

# A URL must not go through Path, which takes one of its slashes.
Location = Annotated[str, BeforeValidator(lambda value: str(value) if isinstance(value, Path) else value)]


class FrozenModel(BaseModel):
    """Frozen, and unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class DataConfig(FrozenModel):
    """Where pages come from and how they are laid out."""

    train: Location
    """Packed dataset to train on: a folder, or a URL (http, https, s3, gs)."""
    val: Location | None = None
    """Packed dataset to evaluate on; None evaluates nothing."""
    num_classes: int | None = Field(default=None, ge=1)
    """K, where it must be known without the dataset; checked against it when it is there."""
    view: AugmentationConfig = AugmentationConfig()
    """Canvas and augmentation."""
    loader_workers: int = Field(default=2, ge=0)
    """Processes per training worker that read and decode; 0 reads in the training process."""
    storage: StorageConfig = StorageConfig()
    """How remote datasets are read."""
    bad_samples: int = Field(default=0, ge=0)
    """Pages that each training worker may fail to decode before the run stops; the next page stands in for them."""


class ScheduleConfig(FrozenModel):
    """Optimiser and learning rate, as stated for ``reference_batch`` pages a step."""

    steps: int = Field(default=180_000, ge=1)
    """Optimiser steps at the reference batch."""
    batch: int = Field(default=8, ge=1)
    """Global batch: pages per step over all workers."""
    reference_batch: int = Field(default=8, ge=1)
    """Batch that ``lr``, ``steps``, ``milestones`` and ``warmup_steps`` are meant for."""
    lr_scale: Literal["linear", "none"] = "linear"
    """linear: with another batch the learning rate grows, and steps shrink, by the same factor (Goyal et al., 2017)."""
    optimizer: Literal["sgd", "adamw"] = "sgd"
    lr: float = Field(default=0.01, gt=0)
    """Peak learning rate."""
    momentum: float = Field(default=0.9, ge=0, lt=1)
    """Of SGD."""
    weight_decay: float = Field(default=1e-4, ge=0)
    policy: Literal["multistep", "one_cycle", "cosine", "constant"] = "multistep"
    """Shape of the learning rate after the warm-up; one_cycle brings its own warm-up."""
    milestones: tuple[int, ...] = (120_000, 160_000)
    """Steps at which multistep multiplies the rate by ``gamma``."""
    gamma: float = Field(default=0.1, gt=0, le=1)
    warmup_steps: int = Field(default=1000, ge=0)
    """Steps of linear warm-up."""
    clip_norm: float = Field(default=0.0, ge=0)
    """Largest norm of all gradients together; 0 clips nothing."""
    accumulate: int = Field(default=1, ge=1)
    """Parts into which each worker cuts its share of a batch, one after the other, so that large ones fit in memory."""
    ema: float = Field(default=0.0, ge=0, lt=1)
    """Decay per step of the moving average of the weights, which is then what is evaluated and taught; 0 keeps none."""

    def scaled(self) -> ScheduleConfig:
        """The same schedule with lr, steps, milestones and warm-up in terms of the actual batch."""
        factor = self.batch / self.reference_batch if self.lr_scale == "linear" else 1.0
        return self.model_copy(
            update={
                "reference_batch": self.batch,
                "lr": self.lr * factor,
                "steps": max(1, round(self.steps / factor)),
                "milestones": tuple(round(step / factor) for step in self.milestones),
                "warmup_steps": round(self.warmup_steps / factor),
            }
        )


class TeacherConfig(FrozenModel):
    """The teacher of a student."""

    run: Path
    """Run folder of the teacher; its newest complete checkpoint teaches."""
    signals: Literal["live", "cache"] = "cache"
    """cache reads what was precomputed; live runs the teacher beside every step."""
    cache: Location | None = None
    """Folder of the teacher's statistics and cache; by default ``cache`` in the teacher's run folder, so that its
    students share it. A finished one can also be read from a URL (http, https, s3, gs)."""
    cache_dtype: Literal["fp16", "fp32", "int8"] = "fp16"
    """Precision of cached features; int8 has one scale per page and channel."""
    store: Literal["pooled", "descriptors"] = "pooled"
    """What is known of a node's features: all of them, or only each channel's mean and variance, a twenty-fifth of the
    bytes with 7 x 7 positions."""
    compression: Literal["none", "lz4", "zstd"] = "none"
    """Of the cache's bytes; what is compressed cannot be mapped from the disk."""
    views: int = Field(default=1, ge=1)
    """Views of each page that are cached; with 1 it is the evaluation view."""
    nodes: NodePolicy = NodePolicy()
    """Which boxes become nodes."""
    statistics_pages: int = Field(default=512, ge=1)
    """Pages that the teacher's statistics are computed from, evenly spread over the dataset."""
    shrinkage: float = Field(default=0.1, ge=0, le=1)
    """Of the covariance that edge lengths are measured in."""


class ComputeConfig(FrozenModel):
    """How the student is computed; the teacher and every loss of the method stay in float32."""

    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Of the student's network, by autocast; fp16 scales its loss."""
    channels_last: bool = False
    """Whether convolutions keep channels last in memory, which GPUs prefer."""
    compile: bool = False
    """Whether what has fixed shapes, backbone and pyramid, goes through torch.compile."""
    deterministic: bool = False
    """Whether only algorithms that repeat themselves are used on a GPU too, where some are slower."""


class EngineConfig(FrozenModel):
    """What runs the training workers."""

    name: Literal["ray", "local"] = "ray"
    """ray: Ray Train workers; local: this process, or torchrun's."""
    workers: Annotated[int, Field(ge=1)] | tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]] = 1
    """Training workers of the ray engine, or the fewest and the most that it may run on as nodes come and go; torchrun
    decides for local."""
    threads: int = Field(default=0, ge=0)
    """CPU threads per worker; 0 shares the machine's cores evenly."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    max_failures: int = Field(default=3, ge=-1)
    """Worker crashes that ray restarts from the newest checkpoint; -1 never gives up. Preempted nodes do not count."""

    @property
    def min_workers(self) -> int:
        """Workers without which training waits."""
        return self.workers if isinstance(self.workers, int) else self.workers[0]

    @property
    def max_workers(self) -> int:
        """Workers that training uses where there is room for them."""
        return self.workers if isinstance(self.workers, int) else self.workers[1]

    @model_validator(mode="after")
    def _check_workers(self) -> EngineConfig:
        if self.min_workers > self.max_workers:
            raise ValueError(f"engine.workers {self.workers} is (fewest, most); give them in that order")
        return self


class RunSettings(FrozenModel):
    """The run folder and its rhythm, in steps."""

    folder: Path | None = None
    """Run folder; by default ``runs/<name>``."""
    init: Path | None = None
    """Run folder whose newest checkpoint this run starts from; what does not fit (other classes, say) starts anew."""
    seed: int = Field(default=0, ge=0)
    """Keys weights, order, views and sampling."""
    checkpoint_every: int = Field(default=1000, ge=1)
    keep: int = Field(default=2, ge=1)
    """Newest checkpoints kept."""
    keep_every: int = Field(default=0, ge=0)
    """Those of every so many steps are kept as well; 0 keeps none of them."""
    log_every: int = Field(default=20, ge=1)
    ledger: bool = False
    """Whether the run folder's ledger lists the pages of every step."""
    eval_batch: int = Field(default=8, ge=1)
    """Pages at a time in evaluation, caching and statistics."""
    eval_every: int = Field(default=0, ge=0)
    """Steps between evaluations on ``data.val`` during training, shared out over the workers; 0 evaluates at the end
    only. The checkpoint of the best AP is kept, and is what the run is then judged by and teaches with."""
    eval_on: Literal["workers", "side"] = "workers"
    """workers: training waits for its evaluations; side: ``graphkd eval CONFIG --follow``, run beside it on another
    device or machine, evaluates the newest checkpoint again and again."""
    patience: int = Field(default=0, ge=0)
    """Evaluations in a row without a better AP after which training ends early; 0 never ends it."""


class RunConfig(FrozenModel):
    """Everything about one run: a teacher, a student alone, or a distilled student."""

    name: str = Field(min_length=1, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    data: DataConfig
    detector: DetectorConfig = DetectorConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    method: MethodConfig = MethodConfig()
    teacher: TeacherConfig | None = None
    compute: ComputeConfig = ComputeConfig()
    engine: EngineConfig = EngineConfig()
    run: RunSettings = RunSettings()

    @model_validator(mode="after")
    def _check(self) -> RunConfig:
        if self.method.name != "none" and self.teacher is None:
            raise ValueError(f"method.name is {self.method.name}, which needs teacher.run: the teacher's run folder")
        if self.method.needs_live_teacher and self.teacher is not None and self.teacher.signals == "cache":
            wanted = (
                "the teacher's whole maps" if self.method.name == "pkd" else "the teacher at the student's proposals"
            )
            raise ValueError(
                f"method {self.method.name} with nodes {self.method.nodes} learns from {wanted}, which no cache holds; "
                "set teacher.signals=live"
            )
        if self.run.eval_every and self.data.val is None:
            raise ValueError(f"run.eval_every is {self.run.eval_every}, but data.val names nothing to evaluate on")
        if self.run.patience and not self.run.eval_every:
            raise ValueError(f"run.patience is {self.run.patience}, which counts evaluations; set run.eval_every too")
        try:
            check_batch_size(self.schedule.batch, self.engine.max_workers, self.schedule.accumulate)
        except ConfigError as error:
            raise ValueError(str(error)) from error
        self._check_store()
        return self

    def _check_store(self) -> None:
        if self.teacher is None or self.teacher.store == "pooled" or self.method.name == "none":
            return
        needs = {
            f"method.name {self.method.name}": self.method.name != "graphkd",
            "method.nodes student": self.method.nodes == "student",
            "method.weights.node_metric pearson": self.method.weights.node_metric == "pearson",
            "method.graph.categorizer covariance_trace": self.method.graph.categorizer == "covariance_trace",
        }
        for what, given in needs.items():
            if given:
                raise ValueError(f"{what} needs the features themselves; set teacher.store=pooled")

    @property
    def folder(self) -> Path:
        """The run folder."""
        return self.run.folder or Path("runs") / self.name

    @property
    def cache_location(self) -> str:
        """The teacher cache that this student reads: folder or URL."""
        assert self.teacher is not None
        return self.teacher.cache or str(self.teacher.run / "cache")

    @property
    def cache_folder(self) -> Path:
        """The same as a folder to write to; raises ConfigError where it is a URL."""
        location = self.cache_location
        if "://" in location and not location.startswith("file://"):
            raise ConfigError(f"teacher.cache {location} can only be read; build in a folder, then copy it there")
        return Path(location.removeprefix("file://"))

    @property
    def views(self) -> int:
        """Views of a page in training: 0 for a new one each epoch, -1 for the evaluation view, else how many."""
        if self.method.name == "none" or self.teacher is None or self.teacher.signals == "live":
            return 0
        return self.teacher.views if self.teacher.views > 1 else -1
