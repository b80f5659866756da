"""YAML that multiplies, files that block, values that would take the machine down: one line, at once."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from cluster.site import load_site
from graphkd.errors import ConfigError, UserError
from pipeline.config import load_config
from pipeline.config.layers import parse_override, read_layers
from pipeline.data.prepare.coco import load_coco
from pipeline.detectron2.checkpoint import read_checkpoint
from pipeline.runs.checkpoint import load_weights

BILLION = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 10)}]\n" for level in range(1, 10)
)


def test_aliases_that_multiply_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(BILLION)
    begin = time.monotonic()
    for read in (load_config, load_site):
        with pytest.raises(ConfigError, match="more than 20000 values once its aliases are written out"):
            read(path)
    assert time.monotonic() - begin < 5
    with pytest.raises(ConfigError, match="not YAML"):
        parse_override("name=" + "[" * 5000)


def test_ordinary_aliases_are_read(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("name: &n here\nrun: &r {seed: 1}\nagain: *r\nother: *n\n")
    assert read_layers(path) == {"name": "here", "run": {"seed": 1}, "again": {"seed": 1}, "other": "here"}


def test_a_diamond_of_bases_is_read_once(tmp_path: Path) -> None:
    (tmp_path / "0.yaml").write_text("name: deep\n")
    for level in range(1, 40):
        (tmp_path / f"{level}.yaml").write_text(f"base: [{level - 1}.yaml, {level - 1}.yaml]\n")
    assert read_layers(tmp_path / "39.yaml") == {"name": "deep"}
    for level in range(40, 70):
        (tmp_path / f"{level}.yaml").write_text(f"base: {level - 1}.yaml\n")
    with pytest.raises(ConfigError, match="has more than 64 bases"):
        read_layers(tmp_path / "69.yaml")
    (tmp_path / "wrong.yaml").write_text("base: {a: 1}\n")
    with pytest.raises(ConfigError, match="must be a path or a list of paths"):
        read_layers(tmp_path / "wrong.yaml")


@pytest.mark.parametrize("read", [load_config, load_site, load_coco, load_weights, read_checkpoint])
@pytest.mark.parametrize("suffix", [".yaml", ".json", ".pkl", ".pth", ".safetensors"])
def test_pipes_do_not_block(read: Callable[[Path], object], suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"pipe{suffix}"
    os.mkfifo(path)
    with pytest.raises(UserError, match="is no regular file"):
        read(path)


def test_a_config_of_gigabytes_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    with path.open("wb") as file:
        file.truncate(8 << 30)
    with pytest.raises(ConfigError, match=f"{8 << 30} bytes, more than 1048576"):
        load_config(path)


@pytest.mark.parametrize("override", ["engine.threads=1000000", "data.loader_workers=1000000"])
def test_numbers_of_threads_and_processes_are_bounded(override: str, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("name: run\ndata: {train: x}\n")
    with pytest.raises(ConfigError, match="less than or equal to 1024"):
        load_config(path, [override])
