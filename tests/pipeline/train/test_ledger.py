"""Real training that is killed again and again, under ever other ranks and workers: no page is lost or comes twice."""

from __future__ import annotations

import random
import shutil
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.config import load_config
from pipeline.core.errors import CheckpointError
from pipeline.data.format.schema import read_dataset_json, write_dataset_json
from pipeline.data.prepare.pack import pack
from pipeline.runs.ledger import read_ledger
from tests.support.pages import write_coco
from tests.support.processes import end_ranks, output_of, spawn_ranks
from tests.support.runs import small_run, train_here

pytestmark = [pytest.mark.ledger, pytest.mark.kill]

PAGES, BATCH = 23, 4  # no multiple: batches straddle epochs
WORKER = """
import sys
from pathlib import Path
from pipeline.config import load_config
from tests.support.runs import train_here
train_here(load_config(Path(sys.argv[1]), sys.argv[2:]))
"""


@dataclass(frozen=True)
class Start:
    """One start of the run, and the step at which one of its ranks is killed (None: it runs to its end)."""

    ranks: int
    workers: int
    kill_at: int | None
    victim: int = 0


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ledger")
    write_coco(folder / "coco", PAGES, width=64, height=64)
    pack(folder / "coco" / "annotations.json", folder / "coco" / "images", folder / "packed", samples_per_shard=5)
    return folder / "packed"


def config_file(folder: Path, packed: Path, name: str, steps: int, **run: Any) -> Path:
    content = small_run(folder, packed, name)
    content["data"] |= {"val": None, "view": {"canvas": [64, 64], "shortest_edge": [40, 48]}}
    content["schedule"] |= {"steps": steps, "batch": BATCH, "reference_batch": BATCH}
    content["engine"]["threads"] = 1
    content["run"] |= {"ledger": True, "checkpoint_every": 2, "log_every": 100, **run}
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def run(config: Path, folder: Path, start: Start) -> None:
    """Start the ranks; kill the victim once the ledger shows its step, whereupon the others must end by themselves."""
    command = [sys.executable, "-c", WORKER, str(config), f"data.loader_workers={start.workers}"]
    processes = spawn_ranks(command, start.ranks)
    try:
        if start.kill_at is not None:
            wait_for_step(folder, start.kill_at, processes)
            processes[start.victim].kill()
        codes = [process.wait(timeout=120) for process in processes]
        errors = output_of(processes)
    finally:
        end_ranks(processes)
    if start.kill_at is None:
        assert codes == [0] * start.ranks, errors
    else:
        assert all(code != 0 for code in codes), f"rank {start.victim} was killed, but {codes}"


def wait_for_step(folder: Path, step: int, processes: list[subprocess.Popen[bytes]]) -> None:
    deadline = time.monotonic() + 120
    while max(read_ledger(folder), default=-1) < step:
        assert time.monotonic() < deadline, f"step {step} was never reached"
        assert all(process.poll() is None for process in processes), "a rank ended by itself before it was killed"
        time.sleep(0.01)


def check(folder: Path, steps: int, expected: dict[int, list[int]]) -> None:
    ledger = read_ledger(folder)
    assert sorted(ledger) == list(range(steps))
    endless = [sample for step in range(steps) for sample in ledger[step]]
    for first in range(0, len(endless) - PAGES + 1, PAGES):
        assert Counter(endless[first : first + PAGES]) == Counter(range(PAGES)), f"the epoch from place {first}"
    assert ledger == expected


@pytest.fixture(scope="module")
def unkilled(pages: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[int, dict[int, list[int]]]:
    """Steps and ledger of a run that nobody disturbed."""
    folder, steps = tmp_path_factory.mktemp("unkilled"), 19
    run(config_file(folder, pages, "unkilled", steps), folder / "unkilled", Start(2, 0, None))
    return steps, read_ledger(folder / "unkilled")


def test_killed_runs_see_the_pages_of_the_one_that_was_not(
    pages: Path, unkilled: tuple[int, dict[int, list[int]]], tmp_path: Path
) -> None:
    steps, expected = unkilled
    config = config_file(tmp_path, pages, "killed", steps)
    starts = [
        Start(2, 1, kill_at=3, victim=1),  # three times within the first epoch, which ends in step 5
        Start(1, 2, kill_at=4),
        Start(3, 0, kill_at=5, victim=2),
        Start(2, 0, kill_at=12, victim=0),  # across the second one's end
        Start(4, 0, None),
    ]
    for start in starts:
        run(config, tmp_path / "killed", start)
    check(tmp_path / "killed", steps, expected)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
def test_random_kills_under_random_topologies(
    pages: Path, unkilled: tuple[int, dict[int, list[int]]], tmp_path: Path, seed: int
) -> None:
    steps, expected = unkilled
    config = config_file(tmp_path, pages, "killed", steps)
    draw = random.Random(seed)
    reached = 0
    while reached < steps - 2:
        ranks = draw.randint(1, 4)
        # A step that no earlier start has reached: a kill before the ranks have met is torchrun's to end.
        target = min(steps - 2, reached + draw.randint(1, 3))
        run(config, tmp_path / "killed", Start(ranks, draw.randint(0, 2), target, draw.randrange(ranks)))
        reached = max(read_ledger(tmp_path / "killed"))
    run(config, tmp_path / "killed", Start(2, 1, None))
    check(tmp_path / "killed", steps, expected)


def test_a_lost_line_would_be_seen(unkilled: tuple[int, dict[int, list[int]]], tmp_path: Path) -> None:
    """The check itself: a run whose ledger lacks a page, or has one twice, does not pass."""
    steps, expected = unkilled
    folder = tmp_path / "run"
    (folder / "ledger").mkdir(parents=True)
    lines = [f'{{"step": {step}, "samples": {samples}}}' for step, samples in expected.items()]
    path = folder / "ledger" / "start-1-rank-00000.jsonl"
    path.write_text("\n".join(lines))
    check(folder, steps, expected)
    path.write_text("\n".join([*lines[:3], *lines[4:]]))
    with pytest.raises(AssertionError):
        check(folder, steps, expected)
    lines[3] = lines[4].replace('"step": 4', '"step": 3')
    path.write_text("\n".join(lines))
    with pytest.raises(AssertionError):
        check(folder, steps, expected)


FINITE = """
import sys
import torch.distributed as dist
from pipeline.data.format.dataset import PackedDataset
from pipeline.data.loading.batches import FinitePassBatches
from pipeline.data.loading.loader import PageDataset, page_loader
from pipeline.data.loading.augmentation import EVALUATION_VIEW, AugmentationConfig
from pipeline.core.distributed import torchrun_world
with torchrun_world("cpu") as world:
    dataset = PackedDataset(sys.argv[1])
    items = PageDataset(dataset, AugmentationConfig(canvas=(64, 64), shortest_edge=(64, 64)), 0, EVALUATION_VIEW)
    loader = page_loader(items, FinitePassBatches(range(5), 2, world.rank, world.size), 0)
    own = [sample for batch in loader for sample in batch.samples.tolist()]
    found = [None] * world.size
    dist.all_gather_object(found, own)
    assert sorted(sample for part in found for sample in part) == list(range(5)), found
    assert [] in found or world.size < 6
"""


@pytest.mark.parametrize("ranks", [2, 6])
def test_the_finite_pass_gives_every_page_once_and_lets_no_rank_wait(pages: Path, ranks: int) -> None:
    """Also where ranks get unequal numbers of batches, or none at all: there is no collective until all are done."""
    processes = spawn_ranks([sys.executable, "-c", FINITE, str(pages)], ranks)
    try:
        assert [process.wait(timeout=100) for process in processes] == [0] * ranks
    finally:
        end_ranks(processes)


def test_another_dataset_seed_or_batch_is_refused(pages: Path, tmp_path: Path) -> None:
    config = config_file(tmp_path, pages, "first", 2)
    train_here(load_config(config))
    description = read_dataset_json(pages)
    other = Path(shutil.copytree(pages, tmp_path / "other"))
    write_dataset_json(other, description.model_copy(update={"shards": description.shards[:-1]}))
    for change, message in (
        ("run.seed=1", "run.seed 0, not 1"),
        ("schedule.batch=2", "schedule.batch 4, not 2"),
        (f"data.train={other}", "was trained with dataset"),
    ):
        with pytest.raises(CheckpointError, match=message):
            train_here(load_config(config, [change]))
