"""Random damage and hostile input: the same result, or one clear line; never a crash, a hang or other numbers."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cluster.site import load_site
from graphkd.errors import ConfigError, UserError
from pipeline.config import load_config, resolve
from pipeline.context import RunContext
from pipeline.core.errors import DataError
from pipeline.data.prepare.coco import Category, check_coco, load_coco
from pipeline.data.prepare.text_classes import categories_with_text
from pipeline.data.storage.base import StorageConfig
from pipeline.evaluate.coco_ap import score_files
from pipeline.train.run import train_run
from tests.support.fuzz import read_dataset
from tests.support.runs import build_here, small_run
from tests.support.servers import served_files

pytestmark = pytest.mark.fuzz

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def folders(dataset_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A dataset, a folder with a student's config and its teacher's cache, and a folder of checkpoints."""
    root = tmp_path_factory.mktemp("fuzz")
    teacher = resolve(small_run(root, dataset_folder, "teacher", schedule={"steps": 2}), "teacher")
    train_run(RunContext(teacher))
    nodes = {"count": 8, "min_score": 0.0}
    content = small_run(
        root,
        dataset_folder,
        "student",
        method={"name": "graphkd"},
        teacher={
            "run": str(teacher.folder),
            "statistics_pages": 4,
            "nodes": nodes,
            "cache": str(root / "built" / "cache"),
        },
    )
    build_here(resolve(content, "student"))
    (root / "built" / "student.yaml").write_text(yaml.safe_dump(content))
    (root / "weights").mkdir()
    arrays = {"conv.weight": np.ones((2, 3), "f4"), "n": np.arange(4), "scalar": np.float64(2)}
    for protocol in (0, 2, 4):
        (root / "weights" / f"{protocol}.pkl").write_bytes(pickle.dumps({"model": arrays}, protocol=protocol))
    return {
        "dataset": dataset_folder,
        "cache": root / "built",
        "checkpoint": teacher.folder / "checkpoints",
        "pickle": root / "weights",
    }


@pytest.mark.parametrize(
    ("reader", "pattern", "flips"),
    [
        ("dataset", "dataset.json", 400),
        ("dataset", "*.index.arrow", 400),
        ("dataset", "*.tar", 200),
        ("cache", "cache/*.json", 150),
        ("cache", "cache/*.arrow", 150),
        ("cache", "cache/*.safetensors", 60),
        ("checkpoint", "*/*", 40),
        ("pickle", "*.pkl", 600),
    ],
)
def test_flipped_bits_change_no_result(reader: str, pattern: str, flips: int, folders: dict[str, Path]) -> None:
    command = [sys.executable, "-m", "tests.support.fuzz", reader, str(folders[reader]), pattern, str(flips), "0"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout) == []


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from([2**70, "1"])
JUNK = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=4,
)
PLAUSIBLE = {
    "image": {"id": 1, "file_name": "p.png", "width": 100, "height": 100},
    "annotation": {"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 1, 9, 9], "iscrowd": 0, "area": 81.0},
    "category": {"id": 1, "name": "text"},
}


@st.composite
def entries(draw: st.DrawFn, kind: str) -> Any:
    """Plausible entries of which some values are anything."""
    entry = dict(PLAUSIBLE[kind])
    for key in draw(st.lists(st.sampled_from(sorted(entry)), max_size=2)):
        entry[key] = draw(JUNK | st.lists(SCALARS, min_size=4, max_size=4))
    return draw(st.just(entry) | JUNK) if draw(st.integers(0, 9)) == 0 else entry


def files(kind: str) -> st.SearchStrategy[Any]:
    return st.lists(entries(kind), max_size=3)


COCO = st.fixed_dictionaries(
    {"images": files("image"), "annotations": files("annotation"), "categories": files("category")}
)
QUICK = settings(max_examples=300, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


@QUICK
@given(coco=COCO | JUNK, repair=st.booleans())
def test_hostile_coco_files_are_read_or_refused_in_one_line(
    tmp_path_factory: pytest.TempPathFactory, coco: Any, repair: bool
) -> None:
    path = tmp_path_factory.mktemp("coco") / "a.json"
    path.write_text(json.dumps(coco))
    try:
        found = check_coco(load_coco(path), path, repair=repair)
    except DataError as error:
        assert "\n" not in str(error)
    else:
        for page in found.pages:
            for region in page.annotations:
                x, y, width, height = region.bbox
                assert 0 <= x < x + width <= page.image.width + 1e-6
                assert 0 <= y < y + height <= page.image.height + 1e-6


RESULT = {"image_id": 1, "category_id": 1, "bbox": [1, 1, 9, 9], "score": 0.5}


@QUICK
@given(key=st.sampled_from(sorted(RESULT)), value=JUNK | st.lists(SCALARS, min_size=4, max_size=4))
def test_hostile_results_are_scored_or_refused_in_one_line(
    tmp_path_factory: pytest.TempPathFactory, key: str, value: Any
) -> None:
    folder = tmp_path_factory.mktemp("results")
    truth = {"images": "image", "annotations": "annotation", "categories": "category"}
    (folder / "a.json").write_text(json.dumps({name: [PLAUSIBLE[kind]] for name, kind in truth.items()}))
    (folder / "p.json").write_text(json.dumps([{**RESULT, key: value}]))
    try:
        metrics = score_files(folder / "p.json", folder / "a.json")
    except DataError as error:
        assert "\n" not in str(error)
    else:
        assert metrics["ap"] == -1 or 0 <= metrics["ap"] <= 1


@QUICK
@given(names=st.lists(st.text(max_size=30), min_size=1, max_size=3))
def test_hostile_names_of_classes_are_flagged_or_asked_for(names: list[str]) -> None:
    try:
        found = categories_with_text([Category(id=number, name=name) for number, name in enumerate(names)], None)
    except (DataError, ValueError) as error:
        assert isinstance(error, DataError) or "surrogates" in str(error)
    else:
        assert [each.name for each in found] == names


CONFIG = (ROOT / "configs" / "quickstart" / "base.yaml").read_text() + "name: run\n"
SITE = (ROOT / "configs" / "sites" / "gpu-cluster.yaml").read_text()
YAML_PIECES = st.sampled_from(
    [
        "&a [",
        "*a",
        "!!python/object:os.system",
        "<<: *a",
        "{",
        "}",
        "- ",
        ": ",
        "|\n",
        "\t",
        "\x00",
        "1e999",
        ".nan",
        "~",
    ]
) | st.text(max_size=6)


@QUICK
@given(
    text=st.sampled_from([CONFIG, SITE]),
    places=st.lists(st.tuples(st.integers(0, 2000), st.integers(0, 20), YAML_PIECES), min_size=1, max_size=4),
)
def test_mangled_configs_and_sites_are_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, text: str, places: list[tuple[int, int, str]]
) -> None:
    for start, length, piece in places:
        text = text[:start] + piece + text[start + length :]
    path = tmp_path_factory.mktemp("yaml") / "a.yaml"
    path.write_bytes(text.encode(errors="surrogatepass"))
    for read in (load_config, load_site):
        with suppress(ConfigError):
            read(path)


@pytest.mark.parametrize("seed", range(6))
def test_a_server_of_random_faults_gives_the_same_pages_or_one_line(dataset_folder: Path, seed: int) -> None:
    random = np.random.default_rng(seed)
    names = [path.name for path in sorted(dataset_folder.iterdir())]
    expected = read_dataset(dataset_folder)
    with served_files(dataset_folder) as files:
        files.stall_s = 0.6
        for name in names:
            files.faults[name] = random.choice(
                ["drop", "stall", "503", "429", "whole", "404"], random.integers(4)
            ).tolist()
        try:
            found = read_dataset(files.url, StorageConfig(attempts=3, timeout_s=0.3))
        except UserError as error:
            assert "\n" not in str(error)
        else:
            assert found == expected
