"""``graphkd data``: drawing, packing, indexing, checking and describing datasets."""

from __future__ import annotations

from dataclasses import asdict
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.cli.console import console, page_progress, print_json

if TYPE_CHECKING:
    from pipeline.data.format.schema import DatasetJson


class BoxFormat(str, Enum):
    """How boxes are written."""

    AUTO = "auto"
    XYWH = "xywh"
    XYXY = "xyxy"
    RELATIVE = "relative"


commands = typer.Typer(help="Make and inspect datasets.", no_args_is_help=True)

OutFolder = Annotated[Path, typer.Option("--out", help="Folder to write.")]
Workers = Annotated[int, typer.Option(min=0, help="Processes; 0 picks a number by the amount of work.")]
OnRay = Annotated[bool, typer.Option("--ray", help="Run on Ray (RAY_ADDRESS, or this machine).")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.add_typer(commands, name="data")


@commands.command()
def synth(
    out_folder: OutFolder,
    count: Annotated[int, typer.Option(min=1, help="Pages to draw.")] = 100,
    seed: Annotated[int, typer.Option(min=0, help="The same seed draws the same pages.")] = 0,
    width: Annotated[int, typer.Option(min=96, help="Page width, px.")] = 192,
    height: Annotated[int, typer.Option(min=128, help="Page height, px.")] = 256,
) -> None:
    """Draw annotated synthetic pages: images/ and annotations.json (COCO)."""
    from pipeline.synth import write_pages

    with page_progress("drawing pages") as update:
        path = write_pages(
            out_folder,
            count=count,
            seed=seed,
            width=width,
            height=height,
            progress=lambda done: update(done, count),
        )
    console.print(f"{count} pages in {path}")


@commands.command()
def pack(
    annotations: Annotated[Path, typer.Option(help="COCO annotation file.")],
    images: Annotated[Path, typer.Option(help="Folder that its file names are relative to.")],
    out_folder: OutFolder,
    shard_size: Annotated[int, typer.Option(min=1, help="Pages per tar.")] = 256,
    text: Annotated[
        list[str] | None,
        typer.Option(help="A text class; repeatable. Default: told from the words of the names; none: no class."),
    ] = None,
    repair: Annotated[bool, typer.Option("--repair", help="Clip boxes to their page and drop empty ones.")] = False,
    boxes: Annotated[
        BoxFormat,
        typer.Option(help="xywh, xyxy, or relative to the page's size; auto: xywh, refused if they look otherwise."),
    ] = BoxFormat.AUTO,
    rotated: Annotated[bool, typer.Option("--rotated", help="Enclose rotated boxes (CVAT) in upright ones.")] = False,
    crowd_as_regions: Annotated[
        bool, typer.Option("--crowd-as-regions", help="Take iscrowd 1 (CVAT's masks) for ordinary regions.")
    ] = False,
    workers: Workers = 0,
    ray: OnRay = False,
    as_json: AsJson = False,
) -> None:
    """Pack COCO-annotated pages into webdataset tars."""
    from pipeline.data.prepare.box_conventions import BoxOptions
    from pipeline.data.prepare.pack import pack as pack_pages

    with page_progress("packing pages") as update:
        dataset = pack_pages(
            annotations,
            images,
            out_folder,
            samples_per_shard=shard_size,
            text=text,
            repair=repair,
            boxes=BoxOptions(boxes.value, rotated, crowd_as_regions),
            workers=workers,
            on_ray=ray,
            progress=update,
        )
    if as_json:
        size = {"pages": dataset.samples, "shards": len(dataset.shards)}
        print_json({"folder": str(out_folder), **size, "repairs": dataset.repairs})
    else:
        _show_size(dataset, out_folder)


@commands.command()
def index(
    dataset: Annotated[Path, typer.Argument(help="Folder of the tars.")],
    categories: Annotated[
        Path | None,
        typer.Option(help="For tars of other tools: JSON list of the classes' id and name, or a COCO file."),
    ] = None,
    text: Annotated[list[str] | None, typer.Option(help="A text class; repeatable. As for `pack`.")] = None,
    workers: Workers = 0,
    ray: OnRay = False,
) -> None:
    """Index existing tars in place: made by other tools, or replaced since they were packed."""
    from pipeline.data.prepare.index_external import index_dataset

    with page_progress("indexing", "shards") as update:
        found = index_dataset(
            dataset,
            categories=categories,
            text=text,
            workers=workers,
            on_ray=ray,
            progress=update,
        )
    _show_size(found, dataset)


def _show_size(dataset: DatasetJson, folder: Path) -> None:
    from pipeline.data.summary import summarize

    classes, shards = len(dataset.categories), len(dataset.shards)
    console.print(f"{dataset.samples} pages, {classes} classes in {shards} shards: {folder}")
    _show_notes(summarize(folder)["notes"])


def _show_notes(notes: list[str]) -> None:
    if notes:
        console.print(f"note: {'; '.join(notes)}", markup=False, highlight=False, soft_wrap=True)


@commands.command()
def info(dataset: Annotated[str, typer.Argument(help="Dataset folder or URL.")], as_json: AsJson = False) -> None:
    """Show what a dataset holds: classes, shards, pages, regions, identity."""
    from pipeline.data.summary import summarize

    content = summarize(dataset)
    if as_json:
        print_json(content)
        return
    console.print(f"{content['pages']} pages, {content['regions']} regions, {content['shards']} shards")
    if content["excluded"]:
        console.print(f"{content['excluded']} samples of its tars are excluded")
    console.print(f"identity {content['identity']}")
    for name, entry in content["classes"].items():
        line = f"  {name:<24} {entry['regions']:>8} regions  {'text' if entry['text'] else 'not text'}"
        console.print(line, markup=False, highlight=False)
    _show_notes(content["notes"])


@commands.command()
def verify(
    dataset: Annotated[Path, typer.Argument(help="Dataset folder.")],
    exclude: Annotated[
        bool, typer.Option("--exclude", help="Exclude bad samples permanently; changes the dataset's identity.")
    ] = False,
    workers: Workers = 0,
    ray: OnRay = False,
    as_json: AsJson = False,
) -> None:
    """Check every byte, image and annotation, and list problems. Exit code 1 if there are any (and stay)."""
    from pipeline.data.prepare.verify import verify as verify_dataset

    with page_progress("verifying", "shards") as update:
        problems = verify_dataset(
            dataset,
            exclude=exclude,
            workers=workers,
            on_ray=ray,
            progress=update,
        )
    if as_json:
        print_json({"problems": [asdict(problem) for problem in problems], "excluded": exclude})
    else:
        for problem in problems:
            console.print(str(problem), markup=False, highlight=False, soft_wrap=True)
        remedy = "excluded from the dataset" if exclude else "exclude them with --exclude, or fix them and index again"
        console.print(f"{len(problems)} problems; {remedy}" if problems else "no problems")
    if problems and not exclude:
        raise typer.Exit(1)


@commands.command("convert-page")
def convert_page(
    xml: Annotated[Path, typer.Option(help="Folder of PAGE XML files.")],
    images: Annotated[Path, typer.Option(help="Folder of their images.")],
    out_file: Annotated[Path, typer.Option("--out", help="COCO file to write.")],
) -> None:
    """Convert PAGE XML (as published by PRImA) to a COCO annotation file."""
    from pipeline.data.prepare.page_xml import convert_page_folder

    coco = convert_page_folder(xml, images, out_file)
    console.print(f"{len(coco['images'])} pages, {len(coco['annotations'])} regions: {out_file}")
