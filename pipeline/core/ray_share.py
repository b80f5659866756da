"""How a Ray cluster is divided among actors that each hold a model."""

from __future__ import annotations

from dataclasses import dataclass

from graphkd.errors import ConfigError

CPU_THREADS = 4  # of an actor without a GPU


@dataclass(frozen=True, slots=True)
class Share:
    """Actors and what each of them gets."""

    actors: int
    threads: int
    gpus: int
    """GPUs of each actor."""

    @property
    def cpus(self) -> int:
        """CPUs that Ray reserves for each actor."""
        return 1 if self.gpus else self.threads


def divide_cluster(
    nodes: list[dict[str, float]], tasks: int, *, threads: int = 0, device: str = "auto", actors: int = 0
) -> Share:
    """Divide nodes with these Ray resources among actors.

    Args:
        nodes: Ray resources of each node.
        tasks: number of tasks; more actors would be idle.
        threads: of an actor; 0 chooses.
        device: auto, cpu or cuda; GPUs are not used for cpu.
        actors: maximum number of actors; 0 for as many as fit.

    Raises:
        ConfigError: if no node has ``threads`` CPUs.
    """
    cpus = [max(1, int(node.get("CPU", 1))) for node in nodes]
    gpus = [int(node.get("GPU", 0)) for node in nodes]
    limit = min(tasks, actors or tasks)
    if threads > max(cpus):
        raise ConfigError(f"engine.threads {threads} is more than the {max(cpus)} CPUs of the largest node; give fewer")
    if sum(gpus) and device != "cpu":
        per_gpu = min(count // own for count, own in zip(cpus, gpus, strict=True) if own)
        return Share(min(sum(gpus), limit), threads or max(1, per_gpu), 1)
    each = threads or min(CPU_THREADS, *cpus)
    found = max(1, min(sum(count // each for count in cpus), limit))
    if not threads and found <= len(cpus):  # one actor per node gets all of its CPUs
        each = min(cpus)
    return Share(found, each, 0)
