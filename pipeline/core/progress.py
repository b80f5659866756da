"""Callbacks that report the progress of long work, independent of how it is shown."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager

ProgressUpdate = Callable[[int, int, str], None]
"""(done, total, note)."""
ProgressBar = Callable[[str, str], AbstractContextManager[ProgressUpdate]]
"""(title, unit) -> context manager that shows a bar and yields its update function."""


@contextmanager
def phased_progress(bar: ProgressBar, prefix: str, unit: str) -> Iterator[Callable[[str, int, int], None]]:
    """Yield ``update(phase, done, total)``, which shows one bar per phase, titled ``prefix phase``."""
    with ExitStack() as stack:
        current: list[tuple[str, ProgressUpdate]] = []

        def update(phase: str, done: int, total: int) -> None:
            if not current or current[-1][0] != phase:
                stack.close()
                current.append((phase, stack.enter_context(bar(f"{prefix} {phase}", unit))))
            current[-1][1](done, total, "")

        yield update
