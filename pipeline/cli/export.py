"""``graphkd export``: a trained student as a bundle for onnxruntime."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pipeline.cli.console import console, percent, print_json, progress_bar


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("export")(export)


def export(
    model: Annotated[Path, typer.Argument(help="Run folder, or checkpoint in it.")],
    out: Annotated[Path, typer.Option(help="Folder of the bundle; must not exist.")],
    precision: Annotated[str, typer.Option(help="fp32, fp16 or int8.")] = "fp32",
    data: Annotated[
        Path | None, typer.Option(help="Packed dataset to compare on; default: the run's data.val, or data.train.")
    ] = None,
    pages: Annotated[int, typer.Option(min=1, help="Pages to compare.")] = 64,
    full_range: Annotated[
        bool, typer.Option("--full-range", help="8-bit instead of 7-bit weights of int8, for CPUs with VNNI.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Write what differs from the trained model, too.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="End with one JSON document.")] = False,
) -> None:
    """Export a model, and refuse to write what differs from the trained one."""
    from typing import get_args

    from pipeline.core.progress import phased_progress
    from pipeline.data.format.dataset import PackedDataset
    from pipeline.export.bundle import ExportSettings, Precision, export_bundle
    from pipeline.predict.native import open_native

    if precision not in get_args(Precision):
        raise typer.BadParameter(f"--precision {precision!r} is none of {', '.join(get_args(Precision))}")
    native = open_native(model, "cpu")
    given, names = native.config.data, native.class_names
    train = PackedDataset(given.train, given.storage, names)
    compared = PackedDataset(data or given.val or given.train, given.storage, names)
    settings = ExportSettings(
        precision=precision,  # type: ignore[arg-type]
        pages=pages,
        reduce_range=not full_range,
        force=force,
    )
    with phased_progress(progress_bar, "export", "pages") as update:
        parity = export_bundle(native, out, compared, train, settings, update)
    if as_json:
        print_json(parity.to_dict() | {"bundle": str(out)})
        return
    aps = "" if parity.ap_native is None else f", AP {percent(parity.ap_native)} -> {percent(parity.ap_exported)}"
    console.print(f"{out}: {parity.regions} regions on {parity.pages} pages agree{aps}")
