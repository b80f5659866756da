"""Idle threads sleep beside other processes only."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.core import wait_policy
from pipeline.core.wait_policy import busy_cores, set_wait_policy


def stat(*busy: int, idle: int = 100) -> str:
    lines = ["cpu  1 1 1 1 1 1 1 0 0 0"]
    lines += [f"cpu{core} {ticks} 0 0 {idle - ticks} 0 0 0 0 0 0" for core, ticks in enumerate(busy)]
    return "\n".join([*lines, "intr 5"])


@pytest.fixture
def cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two cores of which others use what the second reading says."""
    path = tmp_path / "stat"
    path.write_text(stat(0, 0, idle=0))
    monkeypatch.setattr(wait_policy, "STAT", path)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1}, raising=False)
    for name in wait_policy.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    return path


@pytest.mark.parametrize(
    ("busy", "policy"),
    [((0, 0), None), ((30, 0), None), ((95, 0), "PASSIVE"), ((30, 30), "PASSIVE"), ((0, 0, 100), None)],
)
def test_threads_sleep_if_others_use_the_cores_of_this_process(
    busy: tuple[int, ...], policy: str | None, cores: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import os

    monkeypatch.setattr("time.sleep", lambda _: cores.write_text(stat(*busy)))
    set_wait_policy()
    assert os.environ.get("OMP_WAIT_POLICY") == policy
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)


def test_what_a_user_sets_stays(cores: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    monkeypatch.setattr("time.sleep", lambda _: cores.write_text(stat(100, 100)))
    set_wait_policy()
    assert os.environ["OMP_WAIT_POLICY"] == "ACTIVE"


def test_a_system_that_does_not_tell_counts_as_idle(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wait_policy, "STAT", Path("/does/not/exist"))
    assert busy_cores() == 0
