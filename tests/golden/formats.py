"""What other programs and earlier runs rely on: config keys, command-line options, scripts of jobs, keys of files."""

from __future__ import annotations

import io
import json
import os
import re
import tarfile
from collections.abc import Iterable
from contextlib import redirect_stderr, redirect_stdout
from inspect import Parameter, signature
from pathlib import Path
from typing import Any, get_args, get_type_hints
from unittest.mock import patch

import pyarrow as pa
import torch
import typer
import yaml
from safetensors import safe_open
from typer.models import OptionInfo

from pipeline.config import RunConfig

ROOT = Path(__file__).parents[2]
SCALARS = (str, int, float, bool, type(None))
KEYS_FROM_DATA = ("per_class", "files", "indexes")
"""Keys whose content has names of classes or files as keys."""
OTHERS_OF_A_KIND = re.compile(r"shard-00000[^0]|checkpoints/step-00000006")


def config_schema() -> Any:
    """The JSON schema of a run's config without its prose, references written out."""
    schema = RunConfig.model_json_schema()
    return _resolved(schema, schema.get("$defs", {}))


def _resolved(node: Any, definitions: dict[str, Any]) -> Any:
    if isinstance(node, list):
        return [_resolved(entry, definitions) for entry in node]
    if not isinstance(node, dict):
        return node
    if "$ref" in node:
        node = {**definitions[node["$ref"].rpartition("/")[2]], **{k: v for k, v in node.items() if k != "$ref"}}
    prose = ("$defs", "description", "title") if isinstance(node.get("title", ""), str) else ("$defs",)
    return {key: _resolved(value, definitions) for key, value in node.items() if key not in prose}


def command_line() -> dict[str, Any]:
    """Every command with its parameters: names, types, defaults, bounds."""
    from pipeline.cli.main import app

    return dict(_commands("graphkd", app))


def _commands(path: str, app: typer.Typer) -> Iterable[tuple[str, Any]]:
    if app.registered_callback is not None:
        yield path, _parameters(app.registered_callback.callback)
    for command in app.registered_commands:
        assert command.callback is not None
        yield f"{path} {command.name or command.callback.__name__}", _parameters(command.callback)
    for group in app.registered_groups:
        assert group.typer_instance is not None
        yield from _commands(f"{path} {group.name}", group.typer_instance)


def _parameters(callback: Any) -> list[dict[str, Any]]:
    annotations = get_type_hints(callback, include_extras=True)
    return [_parameter(name, annotations[name], given) for name, given in signature(callback).parameters.items()]


def _parameter(name: str, annotation: Any, given: Parameter) -> dict[str, Any]:
    kind, info = get_args(annotation)
    option = isinstance(info, OptionInfo)
    declared = [text for text in (info.default, *(info.param_decls or ())) if isinstance(text, str)]
    return {
        "names": declared or [f"--{name.replace('_', '-')}" if option else name],
        "kind": "option" if option else "argument",
        "type": str(kind).replace("pathlib._local.", "pathlib."),
        "bounds": [info.min, info.max],
        "default": "required" if given.default is Parameter.empty else _plain(given.default),
    }


def _plain(value: Any) -> Any:
    return value if isinstance(value, SCALARS) else str(value)


def keys_below(folder: Path) -> dict[str, Any]:
    """The keys of every file below ``folder`` by relative path; what has no keys is left out."""
    readers = {
        ".json": lambda path: shape(json.loads(path.read_text())),
        ".jsonl": lambda path: shape([json.loads(line) for line in path.read_text().splitlines()]),
        ".yaml": lambda path: shape(yaml.safe_load(path.read_text())),
        ".arrow": _arrow,
        ".safetensors": _safetensors,
        ".pt": lambda path: shape(torch.load(path, weights_only=True)),
        ".tar": _tar,
    }
    paths = [path for path in sorted(folder.rglob("*")) if path.suffix in readers and path.is_file()]
    paths = [path for path in paths if not OTHERS_OF_A_KIND.search(str(path))]
    return {_stable(path.relative_to(folder)): readers[path.suffix](path) for path in paths}


def _stable(path: Path) -> str:
    """The path without what differs between runs: the time in a ledger's name."""
    text = str(path)
    if path.parent.name == "ledger":
        text = str(path.parent / f"start-TIME-rank-{path.stem.rpartition('-')[2]}.jsonl")
    return text


def shape(value: Any) -> Any:
    """A value with scalars replaced by their type, and lists by one entry that has the keys of all."""
    if isinstance(value, dict):
        if any(isinstance(key, int) for key in value):
            return {"int": shape(list(value.values()))}
        return {key: "..." if key in KEYS_FROM_DATA else shape(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        shapes = [shape(entry) for entry in value]
        if shapes and all(isinstance(entry, dict) for entry in shapes):
            return [{key: inner for entry in shapes for key, inner in entry.items()}]
        return [shapes[0]] if shapes else []
    return type(value).__name__


def _tar(path: Path) -> Any:
    with tarfile.open(path) as archive:
        return sorted({Path(name).suffix for name in archive.getnames()})


def _arrow(path: Path) -> Any:
    with pa.memory_map(str(path)) as source:
        schema = pa.ipc.open_file(source).schema
    fields = [f"{field.name}: {field.type}" for field in schema]
    metadata = {key.decode(): shape(json.loads(text)) for key, text in (schema.metadata or {}).items()}
    return {"fields": fields, "metadata": metadata}


def _safetensors(path: Path) -> Any:
    with safe_open(path, "np") as file:
        metadata = {key: shape(json.loads(text)) for key, text in (file.metadata() or {}).items()}
        tensors = {name: str(file.get_slice(name).get_dtype()) for name in sorted(file.keys())}
    return {"tensors": tensors, "metadata": metadata}


def job_files(folder: Path) -> dict[str, Any]:
    """The keys of what jobs leave in a run folder: specification, record of submissions, record of starts."""
    from cluster.records import JobRecord, record_job
    from cluster.site import load_site
    from cluster.slurm.plan import training_job
    from cluster.slurm.restart_budget import RestartBudget
    from cluster.slurm.slurm_env import SlurmEnv

    site = load_site(ROOT / "configs" / "sites" / "gpu-cluster.yaml")
    job = training_job(ROOT / "configs" / "quickstart" / "student.yaml", [], site)
    folder.mkdir()
    (folder / "spec.json").write_text(job.spec.model_dump_json())
    record = {
        "scheduler": "slurm",
        "job": "7",
        "name": "run",
        "submitted": 0.0,
        "command": ("train",),
        "logs": "",
        "site": "",
    }
    record_job(folder, JobRecord.model_validate(record))
    starts = RestartBudget(folder, SlurmEnv(job="7", restart=0, node=0, nodes=1, name="node"), site)
    starts.record_start()
    starts.record_end("failed", "a reason")
    return keys_below(folder)


def job_scripts() -> dict[str, str]:
    """The sbatch scripts of a training job, a cache array and a pipeline, with the working directory left out."""
    configs = ROOT / "configs"
    site = ["--site", str(configs / "sites" / "gpu-cluster.yaml"), "--dry-run"]
    student, teacher = (str(configs / "quickstart" / f"{name}.yaml") for name in ("student-graphkd", "teacher"))
    commands = {
        "train": ["slurm", student, "schedule.steps=3", *site, "--nodes", "1-4", "--after", "7"],
        "cache": ["slurm", student, *site, "--cache", "--tasks", "5"],
        "pipeline": ["pipeline", student, "--teacher", teacher, *site, "--tasks", "2"],
    }
    texts = {name: outcome("submit", *words)[1] for name, words in commands.items()}
    return {name: text.replace(os.getcwd(), "DIRECTORY").replace(str(ROOT), "CHECKOUT") for name, text in texts.items()}


def exit_codes() -> dict[str, int]:
    """Exit codes of the command line by what went wrong."""
    from pipeline.core.errors import LostWorkersError, StoppedError

    errors = {"lost workers": LostWorkersError("x"), "SIGTERM": StoppedError("x", 15), "interrupt": KeyboardInterrupt()}
    commands = {
        "help": ["--help"],
        "unknown option": ["train", "--no-such-option"],
        "missing argument": ["train"],
        "missing config": ["train", "nowhere.yaml"],
        "missing dataset": ["data", "info", "nowhere"],
        "contradicting options": ["eval"],
    }
    codes = {name: outcome(*words)[0] for name, words in commands.items()}
    for name, error in errors.items():
        with patch("pipeline.cli.main.app", side_effect=error):
            codes[name] = outcome("train")[0]
    return codes


def outcome(*arguments: str) -> tuple[int, str]:
    """Exit code and standard output of one graphkd command, run in this process."""
    from pipeline.cli.main import main

    written, code = io.StringIO(), 0
    with patch("sys.argv", ["graphkd", *arguments]), redirect_stdout(written), redirect_stderr(io.StringIO()):
        try:
            main()
        except SystemExit as ending:
            code = int(ending.code or 0)
    return code, written.getvalue()
