"""Schema of a run's config. Each field's docstring gives its unit. Paths are relative to the working directory."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from graphkd.detectors.config import DetectorConfig
from graphkd.errors import ConfigError
from graphkd.method.config import MethodConfig
from graphkd.nodes import NodePolicy
from pipeline.core.run_paths import TEACHER_CACHE, RunName
from pipeline.data.loading.augmentation import NEW_VIEW_EVERY_EPOCH, AugmentationConfig, Views, cached_views
from pipeline.data.loading.order import check_batch_size
from pipeline.data.storage.base import StorageConfig

# A URL must not pass through Path, which removes one of its slashes.
Location = Annotated[str, BeforeValidator(lambda value: str(value) if isinstance(value, Path) else value)]


class FrozenModel(BaseModel):
    """Immutable model that rejects unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class DataConfig(FrozenModel):
    """Where pages come from and how they are augmented."""

    train: Location
    """Packed dataset to train on: a folder, or a URL (http, https, s3, gs)."""
    val: Location | None = None
    """Packed dataset to evaluate on; null evaluates nothing."""
    num_classes: int | None = Field(default=None, ge=1)
    """K, if it must be known without the dataset; checked against the dataset."""
    view: AugmentationConfig = AugmentationConfig()
    """Canvas and augmentation."""
    loader_workers: int = Field(default=2, ge=0, le=1024)
    """Loader processes per training worker; 0 loads in the training process."""
    storage: StorageConfig = StorageConfig()
    """How remote datasets are read."""
    bad_samples: int = Field(default=0, ge=0)
    """Pages that each training worker may fail to read before the run stops; the next page is substituted."""


class ScheduleConfig(FrozenModel):
    """Optimizer and learning rate, as stated for ``reference_batch`` pages per step."""

    steps: int = Field(default=180_000, ge=1)
    """Optimizer steps at the reference batch."""
    batch: int = Field(default=8, ge=1)
    """Global batch: pages per step over all workers."""
    reference_batch: int = Field(default=8, ge=1)
    """Batch that ``lr``, ``steps``, ``milestones`` and ``warmup_steps`` refer to."""
    lr_scale: Literal["linear", "none"] = "linear"
    """linear: with another batch, the learning rate is multiplied, and steps are divided, by the same factor (Goyal et
    al., 2017)."""
    optimizer: Literal["sgd", "adamw"] = "sgd"
    lr: float = Field(default=0.01, gt=0)
    """Peak learning rate."""
    momentum: float = Field(default=0.9, ge=0, lt=1)
    """Momentum of SGD."""
    weight_decay: float = Field(default=1e-4, ge=0)
    policy: Literal["multistep", "one_cycle", "cosine", "constant"] = "multistep"
    """Learning rate after the warm-up; one_cycle has its own warm-up."""
    milestones: tuple[int, ...] = (120_000, 160_000)
    """Steps at which multistep multiplies the learning rate by ``gamma``."""
    gamma: float = Field(default=0.1, gt=0, le=1)
    warmup_steps: int = Field(default=1000, ge=0)
    """Steps of linear warm-up."""
    clip_norm: float = Field(default=0.0, ge=0)
    """Maximum norm of all gradients together; 0 disables clipping."""
    accumulate: int = Field(default=1, ge=1)
    """Micro-batches per step and worker (gradient accumulation), for batches that do not fit in memory."""
    ema: float = Field(default=0.0, ge=0, lt=1)
    """EMA decay per step; 0 disables. Evaluation and distillation use the EMA weights."""

    def scaled(self) -> ScheduleConfig:
        """The same schedule with lr, steps, milestones and warm-up for the actual batch."""
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
    """Run folder of the teacher; its best complete checkpoint is used."""
    signals: Literal["live", "cache"] = "cache"
    """cache reads precomputed signals; live runs the teacher in every step."""
    cache: Location | None = None
    """Folder of the teacher's statistics and cache; by default ``cache`` in the teacher's run folder, shared by its
    students. A finished one can also be read from a URL (http, https, s3, gs)."""
    cache_dtype: Literal["fp16", "fp32", "int8"] = "fp16"
    """Precision of cached features; int8 has one scale per page and channel."""
    store: Literal["pooled", "descriptors"] = "pooled"
    """Cached features of a node: all of them, or only mean and standard deviation per channel, which takes a
    twenty-fifth of the bytes at 7 x 7 positions."""
    compression: Literal["none", "lz4", "zstd"] = "none"
    """Compression of the cache; compressed caches cannot be memory-mapped without a copy."""
    views: int = Field(default=1, ge=1)
    """Cached views of each page; 1 caches the evaluation view."""
    nodes: NodePolicy = NodePolicy()
    """Which boxes become nodes."""
    statistics_pages: int = Field(default=512, ge=1)
    """Pages that the teacher's statistics are computed from, evenly spread over the dataset."""
    shrinkage: float = Field(default=0.1, ge=0, le=1)
    """Shrinkage of the covariance that edge lengths are measured in."""


class ComputeConfig(FrozenModel):
    """How networks are computed. The losses of the method stay in float32."""

    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Autocast precision of the student's network; fp16 scales its loss."""
    teacher_precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Autocast precision of a live teacher's network. Caches and statistics are always computed in fp32."""
    channels_last: bool = False
    """Use the channels-last memory format, which is faster on GPUs, and for small networks on CPUs."""
    compile: bool | Literal["step"] = False
    """Compile with torch.compile: true for the backbone and FPN, step for all of the forward and backward pass, which
    takes minutes at the start; not with detectron2."""
    deterministic: bool = False
    """Use deterministic algorithms only, also on a GPU, where some are slower."""


class EngineConfig(FrozenModel):
    """What runs the training workers."""

    name: Literal["ray", "local"] = "ray"
    """ray: Ray Train workers; local: this process, or the processes of torchrun."""
    workers: Annotated[int, Field(ge=1)] | tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]] = 1
    """Training workers of the ray engine: a number, or (minimum, maximum) for an elastic group. torchrun decides for
    local."""
    threads: int = Field(default=0, ge=0, le=1024)
    """CPU threads per worker; 0 divides the machine's cores evenly."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    max_failures: int = Field(default=3, ge=-1)
    """Worker failures after which ray gives up; -1 never does. Preempted nodes do not count."""

    @property
    def min_workers(self) -> int:
        """Workers that training waits for."""
        return self.workers if isinstance(self.workers, int) else self.workers[0]

    @property
    def max_workers(self) -> int:
        """Workers that training uses if there is room."""
        return self.workers if isinstance(self.workers, int) else self.workers[1]

    @model_validator(mode="after")
    def _check_workers(self) -> EngineConfig:
        if self.min_workers > self.max_workers:
            raise ValueError(f"engine.workers {self.workers} is (minimum, maximum); give them in that order")
        return self


class RunSettings(FrozenModel):
    """The run folder, and the cadence of checkpoints, logs and evaluations in steps."""

    folder: Path | None = None
    """Run folder; by default ``runs/<name>``."""
    init: Path | None = None
    """Run folder whose best checkpoint this run starts from; parts that do not fit, such as other classes, keep their
    initial weights."""
    seed: int = Field(default=0, ge=0)
    """Seed of weights, order, augmentation and sampling."""
    checkpoint_every: int = Field(default=1000, ge=1)
    keep: int = Field(default=2, ge=1)
    """Newest checkpoints to keep."""
    keep_every: int = Field(default=0, ge=0)
    """Also keep the checkpoint of every so many steps; 0 disables."""
    log_every: int = Field(default=20, ge=1)
    ledger: bool = False
    """Record the samples of every step in the run folder."""
    eval_batch: int = Field(default=8, ge=1)
    """Batch size of evaluation, caching and statistics."""
    detection_limit: int = Field(default=100, ge=10)
    """Detections of a page and class that AP counts (COCO's maxDets)."""
    eval_every: int = Field(default=0, ge=0)
    """Steps between evaluations on ``data.val`` during training, split over the workers; 0 evaluates at the end only.
    The checkpoint with the highest AP is kept, and is the one that the run is evaluated and teaches with."""
    eval_on: Literal["workers", "side"] = "workers"
    """workers: training pauses for evaluations; side: ``graphkd eval CONFIG --follow``, run on another device or
    machine, evaluates each newest checkpoint."""
    patience: int = Field(default=0, ge=0)
    """Evaluations without a higher AP after which training stops early; 0 disables."""


class RunConfig(FrozenModel):
    """Config of one run: a teacher, a student alone, or a distilled student."""

    name: RunName
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
            needed = "the teacher's feature maps" if self.method.name == "pkd" else "the teacher at student proposals"
            raise ValueError(
                f"method {self.method.name} with nodes {self.method.nodes} needs {needed}, which no cache contains; "
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
        needs_pooled = {
            f"method.name {self.method.name}": self.method.name != "graphkd",
            "method.nodes student": self.method.nodes == "student",
            "method.weights.node_metric pearson": self.method.weights.node_metric == "pearson",
            "method.graph.categorizer covariance_trace": self.method.graph.categorizer == "covariance_trace",
        }
        for setting, given in needs_pooled.items():
            if given:
                raise ValueError(f"{setting} needs the pooled features; set teacher.store=pooled")

    @property
    def folder(self) -> Path:
        """The run folder."""
        return self.run.folder or Path("runs") / self.name

    @property
    def cache_location(self) -> str:
        """Folder or URL of the teacher's statistics and cache."""
        assert self.teacher is not None
        return self.teacher.cache or str(self.teacher.run / TEACHER_CACHE)

    @property
    def cache_folder(self) -> Path:
        """:attr:`cache_location` as a folder to write to. Raises ConfigError if it is a URL."""
        location = self.cache_location
        if "://" in location and not location.startswith("file://"):
            raise ConfigError(f"teacher.cache {location} can only be read; build in a folder, then copy it there")
        return Path(location.removeprefix("file://"))

    @property
    def views(self) -> Views:
        """Views of each page in training."""
        if self.method.name == "none" or self.teacher is None or self.teacher.signals == "live":
            return NEW_VIEW_EVERY_EPOCH
        return cached_views(self.teacher.views)
