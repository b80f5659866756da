"""Predictions that are killed, interrupted or spread over Ray give what an undisturbed one in one process gives."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.config import resolve
from pipeline.context import RunContext
from tests.support.processes import end_all, processes_of, wait_for
from tests.support.runs import small_run, train_here

pytestmark = pytest.mark.kill
PAGES = 200


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, dataset_folder: Path) -> Path:
    config = resolve(small_run(tmp_path_factory.mktemp("model"), dataset_folder, "run"), "run")
    context = RunContext(config)
    from pipeline.runs.run_folder import open_run_folder

    open_run_folder(context.config)
    train_here(config)
    return config.folder


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pages that all differ, one of them unreadable."""
    folder = tmp_path_factory.mktemp("pages")
    for number in range(PAGES):
        page = Image.new("RGB", (96, 128), "white")
        page.paste("black", (10, 10 + number % 60, 20 + number % 50, 100))
        page.save(folder / f"{number:03d}.png")
    (folder / "100.png").write_bytes(b"no image")
    return folder


def start(model: Path, pages: Path, out: Path, *options: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "pipeline", "predict", str(model), str(pages), "--out", str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*command, "--threshold", "0", "--format", "jsonl", *options],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,
        preexec_fn=_heed_ctrl_c,
    )


def _heed_ctrl_c() -> None:
    """What a shell starts in the background ignores Ctrl-C, and so do its children."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def parts(out: Path) -> int:
    return len(list((out / "parts").glob("*.jsonl")))


@pytest.fixture(scope="module")
def undisturbed(model: Path, pages: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    process = start(model, pages, out)
    errors = process.communicate(timeout=120)[1].decode()
    assert process.returncode == 1 and errors.count("not read:") == 1 and "100.png" in errors
    content = (out / "predictions.jsonl").read_bytes()
    lines = [json.loads(line) for line in content.splitlines()]
    assert len(lines) == PAGES - 1 and sum(len(line["regions"]) for line in lines) > PAGES
    return content


def test_what_is_missing_is_predicted_by_the_next_start(
    model: Path, pages: Path, undisturbed: bytes, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    for number, code in ((signal.SIGKILL, -signal.SIGKILL), (signal.SIGINT, 130)):
        before, process = parts(out), start(model, pages, out)
        wait_for(lambda had=before: parts(out) > had, "the next part")  # type: ignore[misc]
        process.send_signal(number)
        errors = process.communicate(timeout=30)[1].decode()
        assert process.returncode == code and "Traceback" not in errors, errors
        assert not (out / "predictions.jsonl").exists()
    before = parts(out)
    assert start(model, pages, out).wait(120) == 1
    assert parts(out) > before, "there was something left"
    assert (out / "predictions.jsonl").read_bytes() == undisturbed


@pytest.mark.ray
@pytest.mark.timeout(240)
def test_ray_predicts_the_same_also_when_an_actor_dies(
    model: Path, pages: Path, undisturbed: bytes, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    process = start(model, pages, out, "--engine", "ray")

    def actors() -> list[int]:
        return [pid for pid, line in processes_of(process.pid).items() if line.startswith("ray::") and "Map" in line]

    try:
        wait_for(lambda: parts(out) >= 1, "the first part")
        victims = actors()
        assert victims, processes_of(process.pid)
        os.kill(victims[0], signal.SIGKILL)
        errors = process.communicate(timeout=180)[1].decode()
        assert process.returncode == 1 and errors.count("not read:") == 1, errors
    finally:
        end_all(process.pid)
    written = (out / "predictions.jsonl").read_bytes()
    found, expected = ([json.loads(line) for line in content.splitlines()] for content in (written, undisturbed))
    assert [line["file"] for line in found] == [line["file"] for line in expected]
    for line, other in zip(found, expected, strict=True):  # to rounding, since actors have other numbers of threads
        boxes, others = (np.array([region["box"] for region in each["regions"]]) for each in (line, other))
        np.testing.assert_allclose(boxes, others, atol=0.01)
