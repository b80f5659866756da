"""The command line as a user types it: exit codes, one-line errors, JSON last."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
import yaml

from pipeline.cli.main import main
from tests.support.runs import small_run

pytestmark = pytest.mark.e2e


def graphkd(*arguments: str | Path, folder: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from pipeline.cli.main import main; main()", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, env=os.environ | {"COLUMNS": "200"})


def graphkd_here(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """The same in this process, which saves starting Python and importing torch."""
    stdout, stderr, code = io.StringIO(), io.StringIO(), 0
    with pytest.MonkeyPatch.context() as patched, redirect_stdout(stdout), redirect_stderr(stderr):
        patched.setattr(sys, "argv", ["graphkd", *map(str, arguments)])
        try:
            main()
        except SystemExit as exit:
            code = int(exit.code or 0)
    return subprocess.CompletedProcess(arguments, code, stdout.getvalue(), stderr.getvalue())


def test_from_pages_to_metrics(coco_folder: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    packed = graphkd_here(
        "data",
        "pack",
        "--annotations",
        coco_folder / "annotations.json",
        "--images",
        coco_folder / "images",
        "--out",
        data,
        "--json",
    )
    assert json.loads(packed.stdout.splitlines()[-1])["pages"] == 10, packed.stderr
    config = tmp_path / "teacher.yaml"
    config.write_text(yaml.safe_dump(small_run(tmp_path, data, "teacher")))
    trained = graphkd("train", config, "schedule.steps=2", "--json")
    assert json.loads(trained.stdout.splitlines()[-1])["step"] == 2, trained.stderr
    evaluated = graphkd_here("eval", config, "schedule.steps=2", "--json")
    assert json.loads(evaluated.stdout.splitlines()[-1])["pages"] == 10, evaluated.stderr
    report = graphkd_here("report", tmp_path / "teacher", "--out", tmp_path / "report.html", "--pages", "1")
    assert report.returncode == 0, report.stderr
    assert (tmp_path / "report.html").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["data", "info", "nowhere"], "is no dataset"),
        (["train", "nowhere.yaml"], "does not exist"),
        (["cache", "info", "nowhere"], "no finished cache"),
        (["report", "nowhere"], "nowhere"),
        (["eval", "--predictions", "a.json", "--annotations", "b.json"], "does not exist"),
    ],
)
def test_errors_are_one_line_and_a_non_zero_exit(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = graphkd_here(*arguments)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ") and message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_external_tars_are_indexed_verified_and_repaired(dataset_folder: Path, tmp_path: Path) -> None:
    data = Path(shutil.copytree(dataset_folder, tmp_path / "data"))
    for path in [*data.glob("*.arrow"), data / "dataset.json"]:
        path.unlink()
    classes = tmp_path / "classes.json"
    classes.write_text(
        json.dumps([{"id": 3, "name": "Text"}, {"id": 5, "name": "Picture"}, {"id": 9, "name": "Title"}])
    )
    indexed = graphkd_here("data", "index", data, "--categories", classes, "--text", "Text", "--text", "Title")
    assert "10 pages, 3 classes in 3 shards" in indexed.stdout, indexed.stderr
    sound = graphkd_here("data", "verify", data)
    assert (sound.returncode, sound.stdout.strip()) == (0, "no problems"), sound.stderr
    info = json.loads(graphkd_here("data", "info", data, "--json").stdout.splitlines()[-1])
    assert (info["pages"], info["classes"]["Title"]["text"]) == (10, True)
    content = bytearray((data / "shard-000001.tar").read_bytes())
    content[700] ^= 1
    (data / "shard-000001.tar").write_bytes(content)
    bad = graphkd("data", "verify", data)
    assert bad.returncode == 1 and "shard-000001.tar 000000004: its bytes are not those that were indexed" in bad.stdout
    assert len(json.loads(graphkd_here("data", "verify", data, "--json").stdout.splitlines()[-1])["problems"]) >= 2
    assert graphkd_here("data", "verify", data, "--exclude").returncode == 0
    assert graphkd_here("data", "verify", data).stdout.strip() == "no problems"
    repaired = json.loads(graphkd_here("data", "info", data, "--json").stdout.splitlines()[-1])
    assert (repaired["pages"], repaired["excluded"]) == (9, 1) and repaired["identity"] != info["identity"]


def test_wrong_usage_exits_with_two() -> None:
    assert graphkd("eval").returncode == 2
    assert graphkd_here("eval", "--predictions", "a.json").returncode == 2


def test_version_and_help() -> None:
    assert graphkd("--version").stdout.startswith("graphkd ")
    assert "quickstart" in graphkd_here("--help").stdout


def test_progress_without_a_terminal_shows_rate_and_time_left() -> None:
    import time

    from pipeline.cli.console import _pace

    since = time.monotonic() - 10
    assert _pace(since, 20, 70, 170) == "(5.0/s, 0:00:20 left)"  # what was there before does not count
    assert _pace(since, 20, 170, 170) == "(15.0/s)"
    assert _pace(since, 20, 20, 170) == _pace(time.monotonic(), 0, 5, 10) == ""


@pytest.mark.parametrize(
    ("raised", "code"), [("DataError('x')", 1), ("LostWorkersError('x')", 75), ("StoppedError('x', 10)", 138)]
)
def test_exit_codes_tell_schedulers_what_happened(raised: str, code: int) -> None:
    program = (
        "import sys; from pipeline.core import errors; from pipeline.cli import main, train\n"
        f"def fails(*_, **__): raise errors.{raised}\n"
        "train.open_context = fails; sys.argv = ['graphkd', 'train', 'x.yaml']; main.main()"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.strip().splitlines()[-1]) == (code, "error: x")


def test_an_unforeseen_error_is_one_line_unless_debugging(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.data.summary.summarize", lambda location: {}["classes"])
    plain = graphkd_here("data", "info", "somewhere")
    assert plain.returncode == 1
    assert plain.stderr == "error: KeyError: 'classes'; --debug before the command shows where\n"
    with pytest.raises(KeyError):
        graphkd_here("--debug", "data", "info", "somewhere")


@pytest.mark.parametrize("name", ["[bold]x[/bold]", "[/]", "x" * 200])
def test_names_of_files_are_printed_as_they_are(name: str, dataset_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(dataset_folder, tmp_path / name))
    indexed = graphkd_here("data", "index", folder)
    assert indexed.returncode == 0 and name in indexed.stdout.replace("\n", "")
    lost = graphkd_here("data", "info", folder / "lost")
    assert lost.returncode == 1 and f"{folder}/lost is no dataset" in lost.stderr


def test_names_that_the_terminal_cannot_show_are_escaped(dataset_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(dataset_folder, tmp_path / "a\udcffb"))
    found = graphkd("data", "index", folder)
    assert found.returncode == 0 and "a\\udcffb" in found.stdout.replace("\n", ""), found.stderr


def test_relative_paths_are_shown_with_what_they_are_relative_to(tmp_path: Path) -> None:
    lost = graphkd("data", "info", "data/lost", folder=tmp_path)
    assert f"{tmp_path}/data/lost (data/lost in {tmp_path}) is no dataset" in lost.stderr


def test_commands_that_messages_name_exist() -> None:
    from typer.main import get_command

    from pipeline.cli.main import app

    groups = {name: set(getattr(each, "commands", {})) for name, each in get_command(app).commands.items()}  # type: ignore[attr-defined]
    root = Path(__file__).parents[3]
    sources = [path for package in ("graphkd", "pipeline", "cluster") for path in (root / package).rglob("*.py")]
    named = {match for path in sources for match in re.findall(r"graphkd ([a-z]+) ?([a-z-]*)", path.read_text())}
    assert ("data", "index") in named and ("cache", "build") in named
    wrong = [(first, second) for first, second in named if second and groups.get(first) and second not in groups[first]]
    assert not wrong
    assert {"train", "data", "cache", "jobs", "submit"} <= {first for first, _ in named} & set(groups)
