"""The Ray engine: Ray Train starts the workers and restarts them after a crash; checkpoints are our own.

Ray's record of checkpoints is not used: a worker group that starts again goes on from the newest complete checkpoint
in the run folder, in whatever state Ray's files are.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from typing import Any

import torch

from graphkd.errors import ConfigError
from pipeline.config import RunConfig
from pipeline.core.ray_session import ray_session, to_user_error
from pipeline.train.shutdown import stop_file, stopped_error

RAY_FOLDER = "ray"
RESIZE_S = 30.0
"""Between looks at whether there is room for more workers."""
ASK_EVERY = 10
"""Steps between questions about nodes that are to go; each costs all workers a call to an actor."""


def run_ray(config: RunConfig) -> None:
    """Train on Ray Train workers; raises the worker's own UserError, or LostWorkersError with Ray's reason."""
    try:
        import ray.train
        from ray.train import FailureConfig, ScalingConfig
        from ray.train import RunConfig as RayRunConfig
        from ray.train.torch import TorchTrainer
    except ImportError as error:
        raise ConfigError(
            "engine.name is ray, but Ray is not installed; pip install 'graphkd[ray]' or --engine local"
        ) from error
    storage = config.folder / RAY_FOLDER
    shutil.rmtree(storage, ignore_errors=True)  # of earlier starts, which decide nothing
    with ray_session(config.engine.max_workers):
        use_gpu = config.engine.device != "cpu" and ray.cluster_resources().get("GPU", 0) > 0
        scaling: dict[str, Any] = {
            "num_workers": config.engine.workers,
            "use_gpu": use_gpu,
            # A worker without a GPU asks for one core and uses many: packed, they would share one node's.
            "placement_strategy": "PACK" if use_gpu else "SPREAD",
            "elastic_resize_monitor_interval_s": RESIZE_S,
        }
        trainer = TorchTrainer(
            _worker,
            train_loop_config={"config": config.model_dump(mode="json"), "directory": os.getcwd()},
            scaling_config=ScalingConfig(**scaling),
            run_config=RayRunConfig(
                name=f"start-{time.time_ns()}",
                storage_path=str(storage.resolve()),
                failure_config=FailureConfig(max_failures=config.engine.max_failures),
            ),
        )
        with stop_file(config.folder) as received:
            try:
                trainer.fit()
            except ray.train.TrainingFailedError as error:
                raise to_user_error(error, "training") from error
        if received:
            raise stopped_error(received[0])


def _worker(given: dict[str, Any]) -> None:
    import ray.train
    import ray.train.torch

    from pipeline.config import resolve
    from pipeline.core.distributed import init_distributed
    from pipeline.train.worker import run_worker

    os.chdir(given["directory"])
    config = resolve(given["config"], "the submitted config")
    context = ray.train.get_context()
    cores = len(os.sched_getaffinity(0))  # those that a job was given, not all of its node's
    torch.set_num_threads(config.engine.threads or max(1, cores // context.get_local_world_size()))
    world = init_distributed(context.get_world_rank(), context.get_world_size(), ray.train.torch.get_device())
    run_worker(config, world, _preemption())


def _preemption() -> Callable[[], bool]:
    """Says once for each node whose end Ray announces that a checkpoint is due; a collective of all workers."""
    import ray.train

    announced: set[str] = set()
    calls = 0

    def preemption_imminent() -> bool:
        nonlocal calls
        calls += 1
        if calls % ASK_EVERY or not hasattr(ray.train, "get_preemption_info"):  # Ray before 2.60 knows of none
            return False
        info = ray.train.get_preemption_info()
        fresh = set(info.preempted_node_ids) - announced if info else set()
        announced.update(fresh)
        return bool(fresh)

    return preemption_imminent
