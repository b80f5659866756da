"""How long work tells of its progress: a stage opens a bar, its update moves it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager

ProgressUpdate = Callable[[int, int, str], None]
"""(done, total, note)."""
ProgressBar = Callable[[str, str], AbstractContextManager[ProgressUpdate]]
"""(title, unit) -> a context in which the bar is shown."""


@contextmanager
def phased_progress(stage: ProgressBar, prefix: str, unit: str) -> Iterator[Callable[[str, int, int], None]]:
    """Yield ``update(phase, done, total)`` that shows one bar after the other, titled ``prefix phase``."""
    with ExitStack() as stack:
        current: list[tuple[str, ProgressUpdate]] = []

        def update(phase: str, done: int, total: int) -> None:
            if not current or current[-1][0] != phase:
                stack.close()
                current.append((phase, stack.enter_context(stage(f"{prefix} {phase}", unit))))
            current[-1][1](done, total, "")

        yield update
