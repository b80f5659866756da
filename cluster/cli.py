"""``graphkd submit``, ``graphkd jobs`` and ``graphkd doctor``: a plug-in of the command line that needs no torch."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from cluster.records import JobRecord
    from cluster.slurm.script import Submission

SiteOption = Annotated[Path, typer.Option("--site", help="Site file, such as configs/sites/gpu-cluster.yaml.")]
ConfigArgument = Annotated[Path, typer.Argument(help="Config of the run.")]
OverridesArgument = Annotated[list[str] | None, typer.Argument(help="Overrides, such as schedule.steps=1000.")]
NodesOption = Annotated[str, typer.Option("--nodes", help="Number of nodes, such as 2, or a range, such as 1-4.")]
AfterOption = Annotated[
    list[str] | None, typer.Option("--after", help="Id of a job that must finish first; repeatable.")
]
DryRunOption = Annotated[bool, typer.Option("--dry-run", help="Print the script without submitting it.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
RunArgument = Annotated[Path, typer.Argument(help="Run folder.")]
AnyOwnerOption = Annotated[
    bool, typer.Option("--any-owner", help="Also if another user owns the run folder, whose records are then trusted.")
]


def register(app: typer.Typer) -> None:
    """Add the commands."""
    submit = typer.Typer(help="Submit runs to a cluster.", no_args_is_help=True)
    submit.command("slurm")(submit_slurm)
    submit.command("pipeline")(submit_pipeline)
    submit.command("ray")(submit_to_ray)
    app.add_typer(submit, name="submit")
    jobs = typer.Typer(help="Manage submitted jobs.", no_args_is_help=True)
    for command in (list_jobs, logs, cancel, resume):
        jobs.command(command.__name__.removesuffix("_jobs"))(command)
    app.add_typer(jobs, name="jobs")
    app.command()(doctor)


def submit_slurm(
    config: Annotated[Path, typer.Argument(help="Config of the run; with --predict, the model.")],
    site: SiteOption,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            help="Overrides, such as schedule.steps=1000; with --predict, inputs, and after -- options of predict."
        ),
    ] = None,
    nodes: NodesOption = "1",
    cache: Annotated[bool, typer.Option("--cache", help="Build the teacher cache instead of training.")] = False,
    tasks: Annotated[
        int, typer.Option("--tasks", min=0, help="With --cache: size of a job array whose tasks share the work.")
    ] = 0,
    predict: Annotated[bool, typer.Option("--predict", help="Predict pages instead of training.")] = False,
    out: Annotated[Path | None, typer.Option(help="With --predict: folder of the results.")] = None,
    after: AfterOption = None,
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
) -> None:
    """Submit a run, the building of a teacher cache, or a prediction to Slurm."""
    from cluster.site import load_site
    from cluster.slurm.plan import cache_job, prediction_job, training_job
    from cluster.slurm.script import sbatch_script

    description, jobs = load_site(site), tuple(after or ())
    if predict != (out is not None) or (predict and not overrides):
        raise typer.BadParameter("--predict needs inputs and --out, and nothing else takes --out")
    if out is not None:
        job = prediction_job(config, overrides or [], out, description, nodes=nodes, after=jobs)
    elif cache:
        job = cache_job(config, overrides or [], description, tasks=tasks, nodes=nodes, after=jobs)
    else:
        job = training_job(config, overrides or [], description, nodes=nodes, after=jobs)
    if dry_run:
        typer.echo(sbatch_script(job))
        return
    _print_submitted([_submit(job)], as_json)


def submit_pipeline(
    students: Annotated[list[Path], typer.Argument(help="Configs of students that share one teacher.")],
    teacher: Annotated[Path, typer.Option("--teacher", help="Config of their teacher.")],
    site: SiteOption,
    nodes: NodesOption = "1",
    tasks: Annotated[int, typer.Option("--tasks", min=1, help="Number of tasks that build the cache.")] = 1,
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
) -> None:
    """Submit teacher, cache and students as jobs that wait for each other."""
    from cluster.site import load_site
    from cluster.slurm.plan import cache_job, training_job
    from cluster.slurm.script import sbatch_script

    where = load_site(site)
    first = training_job(teacher, [], where, nodes=nodes)
    if dry_run:
        jobs = [first, cache_job(students[0], [], where, tasks=tasks, after=("TEACHER",))]
        jobs += [training_job(student, [], where, nodes=nodes, after=("CACHE",)) for student in students]
        typer.echo("\n".join(sbatch_script(job) for job in jobs))
        return
    submitted = [_submit(first)]
    submitted.append(_submit(cache_job(students[0], [], where, tasks=tasks, after=(submitted[0][1].job,))))
    for student in students:
        submitted.append(_submit(training_job(student, [], where, nodes=nodes, after=(submitted[1][1].job,))))
    _print_submitted(submitted, as_json)


def submit_to_ray(
    config: ConfigArgument,
    overrides: OverridesArgument = None,
    address: Annotated[str, typer.Option("--address", help="Address of its dashboard.")] = "http://127.0.0.1:8265",
    directory: Annotated[
        Path | None, typer.Option(help="Folder on the cluster that relative paths refer to; default: this one.")
    ] = None,
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Follow the log; exit 1 if the job fails.")] = True,
) -> None:
    """Submit a run to an existing Ray cluster."""
    from cluster.ray.jobs import submit

    folder = directory or Path.cwd()
    record, status = submit(config, overrides or [], address, folder, lambda piece: typer.echo(piece, nl=False), wait)
    typer.echo(f"job {record.job} ({record.name}): {status.lower()}")
    if wait and status != "SUCCEEDED":
        raise typer.Exit(1)


def _submit(job: Submission) -> tuple[Submission, JobRecord]:
    from cluster.slurm.submit import submit

    return job, submit(job)


def _print_submitted(submitted: list[tuple[Submission, JobRecord]], as_json: bool) -> None:
    from pipeline.cli.console import print_json

    if as_json:
        print_json(
            [{"job": record.job, "logs": record.logs, "run": str(job.spec.run_folder)} for job, record in submitted]
        )
        return
    for job, record in submitted:
        typer.echo(f"job {record.job} ({record.name}): run folder {job.spec.run_folder}, logs {record.logs}")


def doctor(
    site: SiteOption,
    nodes: Annotated[int, typer.Option("--nodes", min=1, help="Number of nodes to check.")] = 2,
    folder: Annotated[Path, typer.Option(help="Folder that all nodes share, for the job's files.")] = Path(
        "runs/doctor"
    ),
) -> None:
    """Check folders, ports, GPUs, network and all-reduce of a site with a short job; one line for each fault."""
    from cluster.doctor.examine import examine
    from cluster.site import load_site

    reports = examine(load_site(site), nodes, folder, lambda line: typer.echo(line, err=True))
    for report in reports:
        info = ", ".join(f"{name} {value}" for name, value in report.info.items())
        typer.echo(f"{report.node}: {'fault' if report.faults else 'ok'}; {info}")
        for fault in report.faults:
            typer.echo(f"{report.node}: FAULT {fault}")
    raise typer.Exit(1 if any(report.faults for report in reports) else 0)


def list_jobs(
    root: Annotated[Path, typer.Argument(help="Run folder, or the folder of runs.")] = Path("runs"),
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document per line.")] = False,
) -> None:
    """List the jobs of runs with their states."""
    from cluster.jobs import as_json as job_as_json
    from cluster.jobs import job_state
    from cluster.records import read_jobs, submitted_runs

    for folder in submitted_runs(root):
        for record in read_jobs(folder):
            if as_json:
                typer.echo(job_as_json(folder, record))
                continue
            when = time.strftime("%Y-%m-%d %H:%M", time.localtime(record.submitted))
            typer.echo(f"{record.job:<12} {job_state(folder, record):<12} {when}  {record.name:<24} {folder}")


def logs(
    run: RunArgument,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Continue as the logs grow.")] = False,
    any_owner: AnyOwnerOption = False,
) -> None:
    """Print the logs of a run's newest job."""
    from cluster.jobs import is_active, job_state, log_files
    from cluster.ray.jobs import logs as ray_logs

    record, printed = _newest(run, any_owner), dict[Path, int]()
    if record.scheduler == "ray":
        typer.echo(ray_logs(record))
        return
    while True:
        active = is_active(job_state(run, record))
        for path in log_files(record):
            with path.open(errors="replace") as file:
                file.seek(printed.get(path, 0))
                typer.echo(file.read(), nl=False)
                printed[path] = file.tell()
        if not follow or not active:
            return
        time.sleep(1)


def cancel(run: RunArgument, any_owner: AnyOwnerOption = False) -> None:
    """Cancel a run's newest job. Training saves a checkpoint first if the scheduler gives it time."""
    from cluster import jobs

    record = _newest(run, any_owner)
    jobs.cancel(record)
    typer.echo(f"job {record.job} is being cancelled")


def resume(run: RunArgument, any_owner: AnyOwnerOption = False) -> None:
    """Resubmit a run's newest job, which continues from the newest complete checkpoint."""
    from cluster.jobs import is_active, job_state
    from cluster.slurm.plan import resubmission
    from graphkd.errors import UserError

    record = _newest(run, any_owner)
    if record.scheduler == "ray":
        given = record.resubmit
        submit_to_ray(Path(given["config"]), given["overrides"], record.site, Path(given["directory"]), wait=False)
        return
    state = job_state(run, record)
    if is_active(state):
        raise UserError(f"job {record.job} of {run} is {state.lower()}; end it first: graphkd jobs cancel {run}")
    _print_submitted([_submit(resubmission(record))], as_json=False)


def _newest(run: Path, any_owner: bool) -> JobRecord:
    from cluster.records import check_owner, read_jobs
    from graphkd.errors import UserError

    if not any_owner:
        check_owner(run)
    records = read_jobs(run)
    if not records:
        raise UserError(f"{run} was never submitted; see graphkd submit slurm --help")
    return records[-1]
