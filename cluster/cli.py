"""``graphkd submit``, ``graphkd jobs``: a plug-in of the command line; nothing here needs torch."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer

SiteFile = Annotated[Path, typer.Option("--site", help="Site file, such as configs/sites/gpu-cluster.yaml.")]
ConfigFile = Annotated[Path, typer.Argument(help="Config of the run.")]
Overrides = Annotated[list[str] | None, typer.Argument(help="Overrides, such as schedule.steps=1000.")]
Nodes = Annotated[str, typer.Option("--nodes", help="How many nodes, such as 2, or 1-4 for what there is room for.")]
After = Annotated[
    list[str] | None, typer.Option("--after", help="Job that must have finished before; may be repeated.")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Show the script and submit nothing.")]
RunFolder = Annotated[Path, typer.Argument(help="Run folder.")]


def register(app: typer.Typer) -> None:
    """Add the commands."""
    submit = typer.Typer(help="Run on a cluster.", no_args_is_help=True)
    submit.command("slurm")(submit_slurm)
    submit.command("pipeline")(submit_pipeline)
    submit.command("ray")(submit_to_ray)
    app.add_typer(submit, name="submit")
    jobs = typer.Typer(help="Submitted jobs.", no_args_is_help=True)
    for command in (list_jobs, logs, cancel, resume):
        jobs.command(command.__name__.removesuffix("_jobs"))(command)
    app.add_typer(jobs, name="jobs")
    app.command()(doctor)


def submit_slurm(
    config: ConfigFile,
    site: SiteFile,
    overrides: Overrides = None,
    nodes: Nodes = "1",
    cache: Annotated[bool, typer.Option("--cache", help="Build the teacher cache instead of training.")] = False,
    tasks: Annotated[
        int, typer.Option("--tasks", min=0, help="With --cache: as an array of so many tasks that share the work.")
    ] = 0,
    after: After = None,
    dry_run: DryRun = False,
    as_json: Annotated[bool, typer.Option("--json", help="End with one JSON document.")] = False,
) -> None:
    """Submit a run to Slurm and return at once."""
    from cluster.site import load_site
    from cluster.slurm.plan import cache_job, training_job
    from cluster.slurm.submit import script

    where = load_site(site)
    words = tuple(after or ())
    if cache:
        job = cache_job(config, overrides or [], where, tasks=tasks, nodes=nodes, after=words)
    else:
        job = training_job(config, overrides or [], where, nodes=nodes, after=words)
    if dry_run:
        typer.echo(script(job))
        return
    _submitted(job, as_json)


def submit_pipeline(
    students: Annotated[list[Path], typer.Argument(help="Configs of students that share one teacher.")],
    teacher: Annotated[Path, typer.Option("--teacher", help="Config of their teacher.")],
    site: SiteFile,
    nodes: Nodes = "1",
    tasks: Annotated[int, typer.Option("--tasks", min=1, help="Tasks that build the cache.")] = 1,
    dry_run: DryRun = False,
    as_json: Annotated[bool, typer.Option("--json", help="End with one JSON document.")] = False,
) -> None:
    """Submit teacher, cache and students as jobs that wait for each other."""
    from cluster.site import load_site
    from cluster.slurm.plan import cache_job, training_job
    from cluster.slurm.submit import Submission, script, submit

    where = load_site(site)
    first = training_job(teacher, [], where, nodes=nodes)
    if dry_run:
        jobs = [first, cache_job(students[0], [], where, tasks=tasks, after=("TEACHER",))]
        jobs += [training_job(student, [], where, nodes=nodes, after=("CACHE",)) for student in students]
        typer.echo("\n".join(script(job) for job in jobs))
        return
    submitted: list[tuple[Submission, Any]] = [(first, submit(first))]
    build = cache_job(students[0], [], where, tasks=tasks, after=(submitted[0][1].job,))
    submitted.append((build, submit(build)))
    for student in students:
        job = training_job(student, [], where, nodes=nodes, after=(submitted[1][1].job,))
        submitted.append((job, submit(job)))
    _say(submitted, as_json)


def submit_to_ray(
    config: ConfigFile,
    overrides: Overrides = None,
    address: Annotated[str, typer.Option("--address", help="Of the cluster's dashboard.")] = "http://127.0.0.1:8265",
    directory: Annotated[
        Path | None, typer.Option(help="Folder of the cluster that relative paths refer to; by default this one.")
    ] = None,
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Stay, show its log, and end as it ends.")] = True,
) -> None:
    """Submit a run to a Ray cluster that is there, by its job API."""
    from cluster.ray.jobs import submit_ray

    record, ended = submit_ray(
        config, overrides or [], address, directory or Path.cwd(), lambda piece: typer.echo(piece, nl=False), wait
    )
    typer.echo(f"job {record.job} ({record.name}): {ended.lower()}")
    if wait and ended != "SUCCEEDED":
        raise typer.Exit(1)


def _submitted(job: Any, as_json: bool) -> None:
    from cluster.slurm.submit import submit

    _say([(job, submit(job))], as_json)


def _say(submitted: list[tuple[Any, Any]], as_json: bool) -> None:
    from pipeline.cli.console import print_json

    if as_json:
        print_json(
            [{"job": record.job, "logs": record.logs, "run": str(job.spec.run_folder)} for job, record in submitted]
        )
        return
    for job, record in submitted:
        typer.echo(f"job {record.job} ({record.name}): run folder {job.spec.run_folder}, logs {record.logs}")


def doctor(
    site: SiteFile,
    nodes: Annotated[int, typer.Option("--nodes", min=1, help="How many nodes to look at.")] = 2,
    folder: Annotated[Path, typer.Option(help="Folder that all nodes share, for the job's files.")] = Path(
        "runs/doctor"
    ),
) -> None:
    """Look at a site with a short job: folders, ports, GPUs, network, all-reduce; one line for each fault."""
    from cluster.doctor.examine import examine
    from cluster.site import load_site

    findings = examine(load_site(site), nodes, folder, lambda line: typer.echo(line, err=True))
    for finding in findings:
        facts = ", ".join(f"{name} {value}" for name, value in finding.facts.items())
        typer.echo(f"{finding.node}: {'fault' if finding.faults else 'well'}; {facts}")
        for fault in finding.faults:
            typer.echo(f"{finding.node}: FAULT {fault}")
    raise typer.Exit(1 if any(finding.faults for finding in findings) else 0)


def list_jobs(
    root: Annotated[Path, typer.Argument(help="Run folder, or the folder of runs.")] = Path("runs"),
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document a line.")] = False,
) -> None:
    """List the jobs of runs and what became of them."""
    from cluster.jobs import as_json as job_as_json
    from cluster.jobs import read_jobs, runs_below, state_of

    for folder in runs_below(root):
        for record in read_jobs(folder):
            if as_json:
                typer.echo(job_as_json(folder, record))
                continue
            when = time.strftime("%Y-%m-%d %H:%M", time.localtime(record.submitted))
            typer.echo(f"{record.job:<12} {state_of(folder, record):<12} {when}  {record.name:<24} {folder}")


def logs(
    run: RunFolder, follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on as they grow.")] = False
) -> None:
    """Show the logs of a run's newest job."""
    from cluster.jobs import ACTIVE_STATES, log_files, state_of

    if _newest(run).scheduler == "ray":
        from cluster.ray.jobs import logs as ray_logs

        typer.echo(ray_logs(_newest(run)))
        return
    record, shown = _newest(run), dict[Path, int]()
    while True:
        living = state_of(run, record).split()[0] in ACTIVE_STATES
        for path in log_files(record):
            with path.open(errors="replace") as file:
                file.seek(shown.get(path, 0))
                typer.echo(file.read(), nl=False)
                shown[path] = file.tell()
        if not follow or not living:
            return
        time.sleep(1)


def cancel(run: RunFolder) -> None:
    """End a run's newest job; training saves a checkpoint first where it is given the time."""
    from cluster.jobs import cancel as end

    record = _newest(run)
    end(record)
    typer.echo(f"job {record.job} is being ended")


def resume(run: RunFolder) -> None:
    """Submit a run's newest job again; it goes on from the run's newest whole checkpoint."""
    from cluster.jobs import ACTIVE_STATES, state_of
    from cluster.slurm.plan import resubmission
    from graphkd.errors import UserError

    record = _newest(run)
    if record.scheduler == "ray":
        given = record.resubmit
        submit_to_ray(Path(given["config"]), given["overrides"], record.site, Path(given["directory"]), wait=False)
        return
    state = state_of(run, record)
    if state.split()[0] in ACTIVE_STATES:
        raise UserError(f"job {record.job} of {run} is {state.lower()}; end it first: graphkd jobs cancel {run}")
    _submitted(resubmission(record), as_json=False)


def _newest(run: Path) -> Any:
    from cluster.jobs import read_jobs
    from graphkd.errors import UserError

    records = read_jobs(run)
    if not records:
        raise UserError(f"{run} was never submitted; see graphkd submit slurm --help")
    return records[-1]
