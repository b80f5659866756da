"""What is submitted, without a Slurm: the script's text, hostile paths, and that no torch is needed for it."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from cluster.records import JobRecord
from cluster.run_config import run_name
from cluster.site import Site, load_site
from cluster.slurm.plan import cache_job, prediction_job, training_job
from cluster.slurm.script import sbatch_script
from graphkd.errors import ConfigError

ROOT = Path(__file__).parents[3]
STUDENT = ROOT / "configs" / "quickstart" / "student.yaml"


def site(**changes: Any) -> Site:
    return Site(**{"name": "here", "cpus_per_node": 4, **changes})


def directives(text: str) -> dict[str, str]:
    lines = [line.removeprefix("#SBATCH --") for line in text.splitlines() if line.startswith("#SBATCH --")]
    return {name: value for name, _, value in (line.partition("=") for line in lines)}


def task_command(text: str) -> list[str]:
    """The words of the line that starts the tasks, as the shell takes them."""
    body = text.split("export SUBMITIT_EXECUTOR=slurm\n")[1].split("\n\n# teardown")[0]
    return shlex.split(body)


def test_the_script_requests_what_the_site_describes() -> None:
    where = site(partition="gpu", account="a-b", qos="low", gpus_per_node=8, mem_gb=1.5, time_minutes=90)
    text = sbatch_script(training_job(STUDENT, [], where, nodes="2-4"))
    found = directives(text)
    expected = {
        "partition": "gpu",
        "account": "a-b",
        "qos": "low",
        "gpus-per-node": "8",
        "mem": "1536M",
        "nodes": "2-4",
    }
    assert {name: found[name] for name in expected} == expected
    assert found["time"] == "90" and found["signal"] == "USR2@120"
    assert "ntasks-per-node" not in found, "with it a range of nodes would be its fewest"
    assert "requeue" in found and found["open-mode"] == "append"
    words = task_command(text)
    assert words[0] == "srun" and "--kill-on-bad-exit=0" in words and words[-3:-1] == ["-m", "cluster.slurm.task"]


def test_prologue_container_and_python_come_before_the_task() -> None:
    where = site(prologue=["module load cuda", "source '/my venv/activate'"], container=["apptainer", "exec", "x.sif"])
    words = task_command(sbatch_script(training_job(STUDENT, [], where)))
    shell = words[words.index("bash") + 2].splitlines()
    assert shell[:2] == ["module load cuda", "source '/my venv/activate'"]
    assert shlex.split(shell[2])[:4] == ["exec", "apptainer", "exec", "x.sif"]


@pytest.mark.parametrize("name", ["with space", "it's", 'dou"ble', "semi;colon", "$(touch owned)", "`x`", "ünï", "a&b"])
def test_hostile_folders_stay_one_word(name: str, tmp_path: Path) -> None:
    folder = tmp_path / name
    text = sbatch_script(training_job(STUDENT, [f"run.folder={folder}"], site()))
    words = task_command(text)
    assert words[-1] == str(folder / "cluster" / "slurm" / "student-alone.json")
    assert shlex.split(directives(text)["output"]) == [str(folder / "cluster" / "slurm" / "%j_0_log.out")]
    assert not Path("owned").exists() and not folder.exists(), "a dry run writes nothing"


@pytest.mark.parametrize(("name", "why"), [("new\nline", "newline"), ("per%cent", "%")])
def test_folders_that_slurm_cannot_write_to_are_refused(name: str, why: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=why):
        sbatch_script(
            training_job(
                STUDENT,
                [f"run.folder={tmp_path / name!s}"] if "\n" not in name else [],
                site(options={"comment": name}) if "\n" in name else site(),
            )
        )


def test_a_cache_is_an_array_or_a_ray_job() -> None:
    array = cache_job(STUDENT, [], site(), tasks=5, after=("7", "8"))
    text = directives(sbatch_script(array))
    assert text["array"] == "0-4%5" and text["dependency"] == "afterok:7:8"
    assert not array.spec.ray and array.spec.command[:2] == ("cache", "build")
    together = cache_job(STUDENT, [], site(), nodes="3")
    assert together.spec.ray and not together.spec.trains and "array" not in directives(sbatch_script(together))


def test_every_example_site_is_read_and_mistakes_are_listed(tmp_path: Path) -> None:
    for path in sorted((ROOT / "configs" / "sites").glob("*.yaml")):
        assert load_site(path).name == path.stem
    (tmp_path / "bad.yaml").write_text("name: x\ncpus: 3\ntime_minutes: 0\n")
    with pytest.raises(ConfigError, match=r"2 mistakes(.|\n)*time_minutes(.|\n)*cpus"):
        load_site(tmp_path / "bad.yaml")
    with pytest.raises(ConfigError, match="does not exist"):
        load_site(tmp_path / "none.yaml")


def test_submitting_imports_no_torch() -> None:
    code = (
        "import sys; from pathlib import Path; from cluster.site import Site; import cluster.cli\n"
        "from cluster.slurm.plan import training_job; from cluster.slurm.script import sbatch_script\n"
        f"sbatch_script(training_job(Path({str(STUDENT)!r}), [], Site(name='x')))\n"
        "sys.exit('torch' in sys.modules or 'ray' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_the_command_shows_the_script(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pipeline", "submit", "slurm", str(STUDENT), "--dry-run"]
    command += ["--site", str(ROOT / "configs" / "sites" / "one-machine.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT, env=dict(os.environ))
    assert done.stdout.startswith("#!/bin/bash") and re.search(r"srun .*cluster\.slurm\.task", done.stdout)


@pytest.mark.parametrize("name", ["../../escaped", "a/b", "a b", "a\nb", "", "-x", "x" * 300])
def test_a_runs_name_is_no_path(name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has the name"):
        run_name({"name": name}, tmp_path / "run.yaml")
    with pytest.raises(ValidationError):
        JobRecord(scheduler="slurm", job="1", name=name, submitted=0, command=(), logs="", site="")


FIELDS = ["partition", "account", "qos", "python", "container", "options", "interface"]


@pytest.mark.parametrize("text", ["a\nsrun evil", "a\rb", "a\x1b[2Jb"])
@pytest.mark.parametrize("field", FIELDS[:-1])
def test_no_field_brings_a_line_into_the_script(field: str, text: str, tmp_path: Path) -> None:
    value: Any = {"options": {"comment": text}, "container": (text,)}.get(field, text)
    with pytest.raises(ConfigError, match="newline or control character"):
        sbatch_script(training_job(STUDENT, [], site(**{field: value})))
    with pytest.raises(ConfigError, match="newline or control character"):
        sbatch_script(training_job(STUDENT, [], site(options={text: "x"})))
    with pytest.raises(ConfigError, match=r"newline or control character|is no id of a job"):
        sbatch_script(training_job(STUDENT, [], site(), after=(text,)))


def test_a_prediction_runs_on_ray_in_its_folder_of_results(tmp_path: Path) -> None:
    job = prediction_job(tmp_path / "run", ["in dir", "--format", "jsonl"], tmp_path / "out", site(), nodes="2")
    assert job.spec.command[:3] == ("predict", str(tmp_path / "run"), "in dir")
    assert job.spec.command[3:] == ("--format", "jsonl", "--out", str(tmp_path / "out"), "--engine", "ray")
    assert job.spec.ray and not job.spec.trains and job.spec.run_folder == tmp_path / "out"
    assert directives(sbatch_script(job))["nodes"] == "2"
    with pytest.raises(ConfigError, match="neither a number nor a range"):
        prediction_job(tmp_path, [], tmp_path / "out", site(), nodes="two")
