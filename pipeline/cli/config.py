"""``graphkd config``: configs of other projects as ours."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from pipeline.cli.console import console, print_json


def register(app: typer.Typer) -> None:
    """Add the command."""
    commands = typer.Typer(help="Configs of runs.", no_args_is_help=True)
    commands.command("import")(import_config)
    app.add_typer(commands, name="config")


def import_config(
    file: Annotated[Path, typer.Argument(help="YAML of detectron2, or of its Distillation project.")],
    folder: Annotated[Path, typer.Option("--out", help="Folder to write configs to.")] = Path("configs/imported"),
    name: Annotated[str | None, typer.Option(help="Name of the run; default: the file's name.")] = None,
    framework: Annotated[str, typer.Option(help="Framework: torchvision or detectron2.")] = "torchvision",
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Convert a detectron2 config, and list what became of every key."""
    import yaml
    from rich.table import Table

    from pipeline.core.files import write_atomic
    from pipeline.detectron2.config_import import check_valid, import_detectron2

    imported = import_detectron2(file, name, framework)
    check_valid(imported)
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{config}.yaml" for config in imported.configs]
    for path, content in zip(paths, imported.configs.values(), strict=True):
        text = yaml.safe_dump(content, sort_keys=False, default_flow_style=None)
        write_atomic(path, f"# Made from {file.name} by graphkd config import.\n{text}")
    if as_json:
        print_json({"configs": [str(path) for path in paths], "keys": [asdict(line) for line in imported.lines]})
        return
    table = Table("key", "value", "", "our key, or why it is ignored")
    for line in imported.lines:
        table.add_row(line.key, str(line.value), line.verdict, line.why)
    console.print(table)
    console.print("wrote " + ", ".join(map(str, paths)))
