"""Building a cache is killed at every stage, shared by several, and starved of disk: it ends whole or not at all."""

from __future__ import annotations

import errno
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from pipeline.cache.build import build_cache, local_builders
from pipeline.cache.verify import check_bytes
from pipeline.config import RunConfig
from pipeline.context import RunContext
from pipeline.core.errors import OutputError
from pipeline.core.locks import file_lock
from tests.support.processes import clean_processes, die_at, end_all, processes_of, small_disk, wait_for
from tests.support.runs import StudentOf, build_here

pytestmark = [pytest.mark.cache, pytest.mark.kill]

CPU = torch.device("cpu")
STEPS = 9  # names that a build gives: identity, statistics, three files and their indexes, cache.json
WRITES = 250  # pieces in which the three files are written, about


def build_and_die(config: RunConfig, function: str, call: int, after: bool) -> None:
    """Build until the given call of ``os.replace``, or of the cache file's ``write``, then die on the spot."""
    from pipeline.cache import writer

    die_at(os if function == "replace" else writer._HashedFile, function, call, after)
    torch.set_num_threads(1)
    build_cache(RunContext(config), local_builders(RunContext(config)))


@pytest.fixture(autouse=True)
def _one_thread(_two_threads: None) -> None:
    """All builds on one thread, so that their arithmetic, and with it their bytes, are the same."""
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def processes() -> ForkServerContext:
    """Where builds come from: a process that has imported all they need."""
    return clean_processes("tests.pipeline.cache.test_kills")


@pytest.fixture(scope="module")
def unkilled(student_of: StudentOf, taught: Path) -> dict[str, bytes]:
    """The files of a build that nobody disturbed."""
    torch.set_num_threads(1)
    build_here(student_of("unkilled"))
    return files(taught / "unkilled")


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()} if folder.is_dir() else {}


def stamps(folder: Path) -> dict[str, int]:
    """When each whole file was written."""
    indexes = folder.glob("*.index.arrow")
    whole = [path for index in indexes for path in (index, folder / index.name.replace(".index", ""))]
    return {path.name: path.stat().st_mtime_ns for path in whole}


def check_killed(config: RunConfig, unkilled: dict[str, bytes]) -> None:
    """After a kill: what has its final name is whole; building again keeps it and gives the very same bytes."""
    folder = config.cache_folder
    visible = {name: content for name, content in files(folder).items() if not name.startswith(".")}
    for name, content in visible.items():
        assert content == unkilled[name], f"{name} is not whole"
    assert "cache.json" not in visible or set(visible) == set(unkilled)
    before = stamps(folder)
    build_here(config)
    assert files(folder) == unkilled, "nothing else is left behind"
    assert {name: when for name, when in stamps(folder).items() if name in before} == before, "whole files are kept"


def kill(
    processes: ForkServerContext, config: RunConfig, unkilled: dict[str, bytes], function: str, call: int, after: bool
) -> None:
    child = processes.Process(target=build_and_die, args=(config, function, call, after))
    child.start()
    child.join(120)
    assert child.exitcode == -signal.SIGKILL, f"{function} {call} was never reached"
    check_killed(config, unkilled)
    shutil.rmtree(config.cache_folder)


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("call", range(1, STEPS + 1))
def test_a_build_killed_around_any_rename_resumes(
    call: int, after: bool, processes: ForkServerContext, student_of: StudentOf, unkilled: dict[str, bytes]
) -> None:
    kill(processes, student_of("killed"), unkilled, "replace", call, after)


@pytest.mark.parametrize("call", [1, 40, 130, 220])
def test_a_build_killed_while_writing_resumes(
    call: int, processes: ForkServerContext, student_of: StudentOf, unkilled: dict[str, bytes]
) -> None:
    kill(processes, student_of("killed"), unkilled, "write", call, after=True)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(8))
def test_a_build_killed_repeatedly_completes(
    seed: int, processes: ForkServerContext, student_of: StudentOf, unkilled: dict[str, bytes]
) -> None:
    """Twenty-five builds at a time, each killed at random up to four times."""
    draw = random.Random(seed)
    config = student_of(f"killed-{seed}")
    for _ in range(25):
        for _ in range(draw.randint(1, 4)):
            function, call = draw.choice([("replace", draw.randint(1, STEPS)), ("write", draw.randint(1, WRITES))])
            child = processes.Process(target=build_and_die, args=(config, function, call, draw.random() < 0.5))
            child.start()
            child.join(120)
            assert child.exitcode in (0, -signal.SIGKILL)  # 0: less was left to do than that many calls
        check_killed(config, unkilled)
        shutil.rmtree(config.cache_folder)


def build_slowly(config: RunConfig) -> None:
    """Build with a pause after each page, so that others meet it at work."""
    from pipeline.cache import writer

    original = writer.CacheFileWriter.add

    def slow(*arguments: Any) -> None:
        original(*arguments)
        time.sleep(0.15)

    writer.CacheFileWriter.add = slow  # type: ignore[method-assign]
    torch.set_num_threads(1)
    build_cache(RunContext(config), local_builders(RunContext(config)))


def test_two_builds_of_one_cache_share_the_work(
    processes: ForkServerContext, student_of: StudentOf, unkilled: dict[str, bytes]
) -> None:
    config = student_of("shared")
    children = [processes.Process(target=build_slowly, args=(config,)) for _ in range(2)]
    for child in children:
        child.start()
    at_work = []
    while any(child.is_alive() for child in children):
        at_work.append(len({path.name.split(".arrow")[0] for path in config.cache_folder.glob(".shard-*.arrow.*.tmp")}))
        time.sleep(0.01)
    assert [child.exitcode for child in children] == [0, 0]
    assert max(at_work) == 2, "both made files at the same time"
    assert files(config.cache_folder) == unkilled


def test_the_other_build_takes_over_from_one_that_is_killed(
    processes: ForkServerContext, student_of: StudentOf, unkilled: dict[str, bytes]
) -> None:
    config = student_of("taken-over")
    victim, survivor = (processes.Process(target=build_slowly, args=(config,)) for _ in range(2))
    victim.start()
    wait_for(lambda: list(config.cache_folder.glob(".shard-000000.arrow.*.tmp")), "the first file")
    survivor.start()
    wait_for(lambda: list(config.cache_folder.glob(".shard-000001.arrow.*.tmp")), "the second file")
    victim.kill()
    ended(victim, survivor)
    assert survivor.exitcode == 0
    assert files(config.cache_folder) == unkilled


def ended(*children: BaseProcess) -> None:
    for child in children:
        child.join(120)
        assert child.exitcode is not None


def test_a_full_disk_ends_a_build_cleanly(student_of: StudentOf, unkilled: dict[str, bytes], tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "160k") as disk:
        config = student_of(disk / "cache")
        with pytest.raises(OutputError, match=r"no space left while writing .*shard-\d+\.arrow"):
            build_here(config)
        kept = {name: content for name, content in files(disk / "cache").items() if not name.startswith(".")}
        assert "shard-000000.arrow" in kept and "cache.json" not in kept
        assert all(content == unkilled[name] for name, content in kept.items())
        assert not list((disk / "cache").glob(".*.tmp"))
        subprocess.run(["mount", "-o", "remount,size=4m", str(disk)], check=True)
        build_here(config)
        assert files(disk / "cache") == unkilled


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_refused(
    number: int, student_of: StudentOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    config = student_of("lockless")
    monkeypatch.setattr("fcntl.flock", flock)
    with pytest.raises(OutputError, match=r"file system without locks .*give a folder on another"):
        build_here(config)


def test_a_lock_that_its_holder_removed_is_taken_anew(tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    taken: list[bool] = []

    def wait() -> None:
        with file_lock(path) as own:
            taken.append(own and path.exists())

    with file_lock(path), file_lock(path, wait=False) as second:
        assert not second
        waiter = threading.Thread(target=wait)
        waiter.start()
        time.sleep(0.1)
        assert not taken
        path.unlink()
    waiter.join(10)
    assert taken == [True]


RAY_BUILD = """
import sys
from pathlib import Path
from pipeline.config import load_config
from pipeline.cache.build import build_cache
from pipeline.cache.ray_builders import ray_builders
from pipeline.context import RunContext
context = RunContext(load_config(Path(sys.argv[1])))
build_cache(context, ray_builders(context, workers=2))
"""


def start_ray_build(config: RunConfig, folder: Path) -> subprocess.Popen[bytes]:
    path = folder / "student.yaml"
    path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-c", RAY_BUILD, str(path)], env=environment, start_new_session=True)


def builders_of(session: int) -> list[int]:
    return [pid for pid, line in processes_of(session).items() if "_Builder" in line]


@pytest.mark.ray
@pytest.mark.parametrize(
    "victim", [*(pytest.param(one, marks=pytest.mark.slow) for one in ("builder", "driver")), "all"]
)
def test_a_ray_build_survives_its_builders_and_resumes_after_its_driver(
    victim: str, student_of: StudentOf, unkilled: dict[str, bytes], tmp_path: Path
) -> None:
    config = student_of(f"ray-{victim}", {"engine": {"threads": 1}})
    build = start_ray_build(config, tmp_path)
    try:
        wait_for(lambda: len(builders_of(build.pid)) == 2, "the second builder")
        if victim == "builder":
            os.kill(builders_of(build.pid)[0], signal.SIGKILL)
            assert build.wait(180) == 0
        else:
            wait_for(lambda: list(config.cache_folder.glob("*.safetensors")), "the statistics")
            build.kill() if victim == "driver" else os.killpg(build.pid, signal.SIGKILL)
            build.wait(30)
        # Ray's own agents take a minute to miss their driver; what loads the GPUs must go with it.
        wait_for(lambda: not builders_of(build.pid), "the end of its builders")
    finally:
        end_all(build.pid)
    if victim == "builder":
        assert not check_bytes(config.cache_folder, build_here(config), 1, lambda done, total: None)
    check_killed(config, unkilled)
