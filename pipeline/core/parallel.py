"""Independent tasks in parallel: in threads, in processes of this machine, or on Ray."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from multiprocessing import get_context
from typing import Any, TypeVar

from graphkd.errors import ConfigError

Task = TypeVar("Task")
Result = TypeVar("Result")

MIN_TASKS_PER_PROCESS = 4  # starting a process takes seconds, so fewer tasks are not worth one


def available_cores() -> int:
    """Cores that this process may use: of its job, not of the whole machine."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def default_workers(tasks: int) -> int:
    """Number of processes worth starting for ``tasks`` tasks that take some seconds each."""
    return max(1, min(os.cpu_count() or 1, tasks // MIN_TASKS_PER_PROCESS))


def map_unordered(
    function: Callable[[Task], Result], tasks: Sequence[Task], workers: int = 0, on_ray: bool = False
) -> Iterator[Result]:
    """Yield results of ``function`` over ``tasks`` as they complete; the first error ends all tasks.

    Args:
        function: defined at module level, so that other processes can import it.
        tasks: picklable arguments.
        workers: processes; 1 runs in this process, 0 picks :func:`default_workers`.
        on_ray: run on the Ray cluster that RAY_ADDRESS names, or a local one, with one CPU per task; ``workers`` is
            ignored.

    Raises:
        ConfigError: if Ray is asked for but not installed.
    """
    if on_ray:
        return _on_ray(function, tasks)
    workers = min(workers or default_workers(len(tasks)), max(1, len(tasks)))
    return map(function, tasks) if workers == 1 else _in_processes(function, tasks, workers)


def prefetch(
    function: Callable[[Task], Result], tasks: Iterable[Task], threads: int, depth: int, name: str = "prefetch"
) -> Iterator[Result]:
    """Yield results of ``function`` over ``tasks`` in order, computing up to ``depth`` of them in advance.

    ``tasks`` is iterated in the caller's thread. With 0 threads, everything runs there.
    """
    if not threads:
        yield from map(function, tasks)
        return
    pool = ThreadPoolExecutor(threads, thread_name_prefix=name)
    pending: deque[Future[Result]] = deque()
    try:
        for task in tasks:
            pending.append(pool.submit(function, task))
            if len(pending) > depth:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _in_processes(function: Callable[[Task], Result], tasks: Sequence[Task], workers: int) -> Iterator[Result]:
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        try:
            for future in as_completed([pool.submit(function, task) for task in tasks]):
                yield future.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _on_ray(function: Callable[[Task], Result], tasks: Sequence[Task]) -> Iterator[Result]:
    from pipeline.core.ray_session import ray_session, set_ray_environment

    set_ray_environment()
    try:
        import ray
    except ImportError as error:
        raise ConfigError("Ray is not installed; pip install 'graphkd[ray]', or leave --ray out") from error
    with ray_session(default_workers(len(tasks))):
        remote: Any = ray.remote(function)
        limit = 2 * max(1, int(ray.cluster_resources().get("CPU", 1)))  # keeps all CPUs busy without a long queue
        waiting, running = list(reversed(tasks)), list[Any]()
        while waiting or running:
            while waiting and len(running) < limit:
                running.append(remote.remote(waiting.pop()))
            done, running = ray.wait(running)
            for reference in done:
                yield ray.get(reference)
