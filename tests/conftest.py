"""Small pages, datasets and configs that many tests share; everything is drawn here, nothing is downloaded."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from graphkd.detectors import INSTALL
from tests.support.pages import write_coco

NOT_FAST = ("slow", "gpu", "slurm", "ray", "e2e", "cache", "kill", "fuzz", "export", "transformers")


@pytest.hookimpl(tryfirst=True)  # before markers are selected
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark fast tests; skip tests that need a GPU or detectron2 if it is missing, whatever marker selects them."""
    missing = {
        "gpu": None if torch.cuda.is_available() else "no CUDA device",
        "detectron2": None if find_spec("detectron2") else f"detectron2 is not installed; {INSTALL}",
        "transformers": None if find_spec("transformers") else "pip install 'graphkd[transformers]'",
    }
    for item in items:
        if not any(item.get_closest_marker(marker) for marker in NOT_FAST):
            item.add_marker(pytest.mark.fast)
        for marker, reason in missing.items():
            if reason and item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))


def use_two_threads() -> None:
    """Unless OMP_NUM_THREADS says otherwise; sums depend on it to the last bit."""
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Fixtures of modules and sessions are set up before those of a test, on what the test before has left."""
    use_two_threads()


@pytest.fixture(autouse=True)
def _two_threads() -> None:
    use_two_threads()  # a module's fixture may have set another number


@pytest.fixture(scope="session")
def coco_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten drawn pages, two of them without regions."""
    return write_coco(tmp_path_factory.mktemp("coco") / "pages", 10, empty=2)


@pytest.fixture(scope="session")
def dataset_folder(coco_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Those ten pages packed into shards of four."""
    from pipeline.data.prepare.pack import pack

    out = tmp_path_factory.mktemp("data") / "packed"
    pack(coco_folder / "annotations.json", coco_folder / "images", out, samples_per_shard=4)
    return out


@pytest.fixture(scope="session", autouse=True)
def _compiled_files(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What torch.compile and Triton write goes where the tests' other files are."""
    folder = tmp_path_factory.getbasetemp()
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder / "inductor"))
    os.environ.setdefault("TRITON_CACHE_DIR", str(folder / "triton"))
