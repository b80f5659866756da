"""The README's example runs, links lead somewhere, and commands in the documentation exist."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import click
import pytest
import torch
import typer

from pipeline.cli.main import COMMANDS, app

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])


def test_the_example_of_the_readme_runs() -> None:
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    assert len(code.splitlines()) <= 20
    namespace: dict[str, Any] = {}
    exec(compile(code, "README.md", "exec"), namespace)
    losses, student = namespace["losses"], namespace["student"]
    assert {"kd_node", "kd_edge", "kd_logits", "kd_boxes"} < set(losses)
    assert all(torch.isfinite(values).all() for values in losses.values())
    assert all(parameter.grad is not None for parameter in student.parameters() if parameter.requires_grad)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?://)([^)\s]+)\)", page.read_text()):
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.+)$", linked.read_text(), re.M)
            assert anchor in {heading.lower().replace(" ", "-") for heading in headings}, target


def command_names(group: click.Command, prefix: str = "graphkd") -> set[str]:
    names = {prefix}
    for name, command in getattr(group, "commands", {}).items():
        names |= command_names(command, f"{prefix} {name}")
    return names


def test_commands_in_the_documentation_exist() -> None:
    assert COMMANDS
    known = command_names(typer.main.get_command(app))
    groups = {name.rpartition(" ")[0] for name in known}
    for page in PAGES:
        for line in re.findall(r"^    (graphkd [^#\n]+)", page.read_text(), re.M):
            words = [word for word in line.split() if re.fullmatch(r"[a-z-]+", word)]
            depth = 3 if " ".join(words[:2]) in groups else 2
            assert " ".join(words[:depth]) in known, f"{page.name}: {line}"
