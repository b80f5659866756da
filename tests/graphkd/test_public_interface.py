"""Imports go one way, and light things stay light."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FORBIDDEN = {"graphkd": {"pipeline", "cluster", "ray", "webdataset"}, "pipeline": {"cluster"}, "cluster": set()}


def imported(path: Path) -> set[str]:
    tree = ast.parse(path.read_text())
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module}
    return {name.split(".")[0] for name in names}


@pytest.mark.parametrize("package", FORBIDDEN)
def test_imports_go_one_way(package: str) -> None:
    offenders = {
        str(path.relative_to(ROOT)): imported(path) & FORBIDDEN[package]
        for path in (ROOT / package).rglob("*.py")
        if imported(path) & FORBIDDEN[package]
    }
    assert offenders == {}


def test_only_what_runs_on_ray_imports_it() -> None:
    using = {
        str(path.relative_to(ROOT / "pipeline"))
        for path in (ROOT / "pipeline").rglob("*.py")
        if "ray" in imported(path)
    }
    assert using == {"train/engines/ray.py", "core/ray_session.py", "core/parallel.py", "cache/ray_builders.py"}


@pytest.mark.parametrize("module", ["pipeline.cli.main", "pipeline.train.run"])
def test_importing_does_not_import_ray(module: str) -> None:
    check = f"import sys, {module}; sys.exit('ray' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], cwd=ROOT).returncode == 0


def test_the_method_needs_neither_ray_nor_files_nor_a_detector() -> None:
    heavy = "{'ray', 'pipeline', 'timm', 'torchvision', 'webdataset', 'pyarrow', 'graphkd.detectors'}"
    check = f"import sys, graphkd.method; sys.exit(', '.join({heavy} & set(sys.modules)) or 0)"
    found = subprocess.run([sys.executable, "-c", check], cwd=ROOT, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr


def test_the_command_line_starts_without_torch() -> None:
    check = "import sys, pipeline.cli.main; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], cwd=ROOT).returncode == 0


def test_no_library_code_prints() -> None:
    printing = [
        str(path)
        for package in FORBIDDEN
        for path in (ROOT / package).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    ]
    assert printing == []
