"""Layers of imports, what stays light, and the names of ``import graphkd``."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import graphkd

ROOT = Path(__file__).parents[2]
PACKAGES = ("graphkd", "pipeline", "cluster")


def imported(path: Path) -> set[str]:
    tree = ast.parse(path.read_text())
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    return names | {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module}


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.e2e
@pytest.mark.parametrize(
    ("module", "line"),
    [
        (None, ""),
        ("graphkd/batch.py", "import pipeline.core"),
        ("pipeline/data/format/dataset.py", "import pipeline.cache.reader"),
        ("pipeline/runs/metrics.py", "import cluster.records"),
        ("cluster/site.py", "import cluster.slurm.submit"),
    ],
)
def test_layers_hold_and_an_upward_import_breaks_them(module: str | None, line: str, tmp_path: Path) -> None:
    for package in PACKAGES:
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    if module is not None:
        with (tmp_path / module).open("a") as file:
            file.write(f"\n{line}\n")
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command as main; main()", "--no-cache"]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == (0 if module is None else 1), done.stdout


def test_only_what_runs_on_ray_imports_it() -> None:
    using = {
        str(path.relative_to(ROOT / "pipeline"))
        for path in (ROOT / "pipeline").rglob("*.py")
        if any(name.split(".")[0] == "ray" for name in imported(path))
    }
    on_ray = {"train/engines/ray.py", "train/engines/loopback.py", "cache/ray_builders.py", "predict/on_ray.py"}
    assert using == {*on_ray, "core/ray_session.py", "core/parallel.py"}


@pytest.mark.e2e
@pytest.mark.parametrize("module", ["pipeline.cli.main", "pipeline.train.run"])
def test_importing_does_not_import_ray(module: str) -> None:
    assert run_python(f"import sys, {module}; sys.exit('ray' in sys.modules)").returncode == 0


def test_the_method_needs_neither_ray_nor_files_nor_a_detector() -> None:
    heavy = "{'ray', 'pipeline', 'timm', 'torchvision', 'webdataset', 'pyarrow', 'graphkd.detectors'}"
    found = run_python(f"import sys, graphkd.method; sys.exit(', '.join({heavy} & set(sys.modules)) or 0)")
    assert found.returncode == 0, found.stderr


@pytest.mark.parametrize("module", ["pipeline.cli.main", "graphkd", "graphkd.api"])
def test_starting_does_not_import_torch(module: str) -> None:
    assert run_python(f"import sys, {module}; sys.exit('torch' in sys.modules)").returncode == 0


def test_every_public_name_exists_and_is_documented() -> None:
    assert sorted(graphkd.__all__) == sorted(graphkd._MODULES)
    for name in graphkd.__all__:
        assert getattr(graphkd, name).__doc__, name
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = graphkd.nothing


def test_no_library_code_prints() -> None:
    printing = [
        str(path)
        for package in PACKAGES
        for path in (ROOT / package).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    ]
    assert printing == []


def test_no_test_imports_another() -> None:
    importing = {
        str(path.relative_to(ROOT)): sorted(name for name in imported(path) if ".test_" in name)
        for path in (ROOT / "tests").rglob("*.py")
    }
    assert {path: names for path, names in importing.items() if names} == {}
