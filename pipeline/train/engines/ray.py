"""The Ray engine: Ray Train starts workers and restarts them after a crash. Checkpoints are our own.

Ray's checkpoint records are not used: a restarted worker group resumes from the newest complete checkpoint in the run
folder, whatever the state of Ray's files.
"""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from pathlib import Path
from typing import Any

import torch

from graphkd.errors import ConfigError
from pipeline.config import EngineConfig, RunConfig
from pipeline.core.errors import LostWorkersError
from pipeline.core.ray_session import ray_session, set_ray_environment, to_user_error
from pipeline.core.run_paths import RAY
from pipeline.train.shutdown import forward_signals_to_workers, stopped_error

WAIT_S = 0.2  # between chances to handle signals
ROOM_DEADLINE_S = 30.0  # for nodes that are about to join
RESIZE_S = 30.0
"""Interval of checks for room for more workers."""
PREEMPTION_CHECK_STEPS = 10
"""Steps between checks for preemption notices; each costs all workers a call to an actor."""


def run_ray(config: RunConfig) -> None:
    """Train on Ray Train workers. Raises the worker's own UserError, or LostWorkersError with Ray's reason."""
    set_ray_environment()
    try:
        from ray.train.torch import TorchTrainer
    except ImportError as error:
        raise ConfigError(
            "engine.name is ray, but Ray is not installed; pip install 'graphkd[ray]' or --engine local"
        ) from error
    storage = config.folder / RAY
    shutil.rmtree(storage, ignore_errors=True)  # of earlier starts
    with ray_session(config.engine.max_workers):
        _wait_for_room(config.engine)
        trainer = TorchTrainer(
            _worker,
            train_loop_config={"config": config.model_dump(mode="json"), "directory": os.getcwd()},
            torch_config=_process_group(config.engine),
            scaling_config=_scaling(config.engine),
            run_config=_ray_run_config(config.engine, storage),
        )
        with forward_signals_to_workers(config.folder) as received:
            try:
                _in_thread(trainer.fit)
            except Exception as error:  # of Ray's, whatever died
                raise to_user_error(error, "training") from error
        if received:
            raise stopped_error(received[0])


def _in_thread(function: Callable[[], object]) -> None:
    """Call ``function`` in a thread and wait for it. In the main thread, Ray Train would abort at Ctrl-C by itself."""
    outcome: Future[object] = Future()

    def call() -> None:
        try:
            outcome.set_result(function())
        except BaseException as error:
            outcome.set_exception(error)

    threading.Thread(target=call, daemon=True, name="ray-train").start()
    while not wait([outcome], timeout=WAIT_S).done:  # returns now and then, so that signals are handled
        pass
    outcome.result()


def _wait_for_room(engine: EngineConfig) -> None:
    """Raise LostWorkersError if the cluster lacks CPUs or GPUs for the workers; Ray itself waits without a timeout."""
    import ray

    kind = "GPU" if _uses_gpus(engine) else "CPU"
    deadline = time.monotonic() + ROOM_DEADLINE_S
    while (there := ray.cluster_resources().get(kind, 0)) < engine.min_workers:
        if time.monotonic() > deadline:
            raise LostWorkersError(
                f"{engine.min_workers} workers need {engine.min_workers} {kind}s, but the Ray cluster has {there:g}; "
                "add nodes, or set engine.workers"
            )
        time.sleep(1)


def _uses_gpus(engine: EngineConfig) -> bool:
    import ray

    return engine.device != "cpu" and ray.cluster_resources().get("GPU", 0) > 0


def _process_group(engine: EngineConfig) -> Any:
    """Ray's own process group on a cluster; one that listens on loopback only on this machine."""
    from ray.train.torch import TorchConfig

    from pipeline.train.engines.loopback import LoopbackConfig

    if os.environ.get("RAY_ADDRESS"):
        return TorchConfig()
    return LoopbackConfig(backend="nccl" if _uses_gpus(engine) else "gloo")


def _scaling(engine: EngineConfig) -> Any:
    from ray.train import ScalingConfig

    use_gpu = _uses_gpus(engine)
    options: dict[str, Any] = {
        "num_workers": engine.workers,
        "use_gpu": use_gpu,
        # A worker without a GPU asks for one core and uses many, so packing would overload one node.
        "placement_strategy": "PACK" if use_gpu else "SPREAD",
        "elastic_resize_monitor_interval_s": RESIZE_S,
    }
    return ScalingConfig(**options)


def _ray_run_config(engine: EngineConfig, storage: Path) -> Any:
    from ray.train import FailureConfig
    from ray.train import RunConfig as RayRunConfig

    return RayRunConfig(
        name=f"start-{time.time_ns()}",
        storage_path=str(storage.resolve()),
        failure_config=FailureConfig(max_failures=engine.max_failures),
    )


def _worker(arguments: dict[str, Any]) -> None:
    import ray.train
    import ray.train.torch

    from pipeline.config import resolve
    from pipeline.context import RunContext
    from pipeline.core.distributed import create_world
    from pipeline.core.parallel import available_cores
    from pipeline.train.worker import run_worker

    os.chdir(arguments["directory"])
    config = resolve(arguments["config"], "the submitted config")
    context = ray.train.get_context()
    torch.set_num_threads(config.engine.threads or max(1, available_cores() // context.get_local_world_size()))
    world = create_world(context.get_world_rank(), context.get_world_size(), ray.train.torch.get_device())
    run_worker(RunContext(config), world, _preemption_notice())


def _preemption_notice() -> Callable[[], bool]:
    """Return a function that is True once for each node whose preemption Ray announces. A collective of all workers."""
    import ray.train

    announced: set[str] = set()
    calls = 0

    def preemption_imminent() -> bool:
        nonlocal calls
        calls += 1
        if calls % PREEMPTION_CHECK_STEPS or not hasattr(ray.train, "get_preemption_info"):  # new in Ray 2.60
            return False
        info = ray.train.get_preemption_info()
        fresh = set(info.preempted_node_ids) - announced if info else set()
        announced.update(fresh)
        return bool(fresh)

    return preemption_imminent
