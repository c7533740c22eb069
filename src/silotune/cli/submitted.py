"""``silotune submit`` and what follows a run: ``list``, ``status``, ``logs``, ``cancel``, ``fetch``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from silotune.cli.output import AsJson, Settings, print_json, say, stdout
from silotune.errors import ConfigError

CoordinatorKit = Annotated[Path, typer.Option("--kit", help="Folder of the coordinator's kit.")]
Submitter = Annotated[Path | None, typer.Option("--as", metavar="KIT", help="Folder of a submitter's kit, to sign.")]
ValidDays = Annotated[
    int | None, typer.Option("--days", min=1, max=365, help="How long the signed run holds; default: 30.")
]
RunName = Annotated[str, typer.Argument(metavar="RUN", help="As 'silotune submit' printed it.")]


def submit(
    config: Annotated[str, typer.Argument(help="A TOML file, a name from 'silotune configs list', or a signed run.")],
    kit: Annotated[
        Path | None, typer.Option("--kit", help="Folder of the coordinator's kit: hands the run in on this machine.")
    ] = None,
    submitter: Submitter = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="Write the signed run to this file, to be handed in.")
    ] = None,
    base: Annotated[
        str | None, typer.Option(help="Fingerprint of the base model, where it is not on this machine.")
    ] = None,
    days: ValidDays = None,
    settings: Settings = None,
    follow: Annotated[bool, typer.Option("--follow", help="Stay and show the run until it ends.")] = False,
    as_json: AsJson = False,
) -> None:
    """Sign a run with a submitter's kit (--as), hand a signed one in at the coordinator (--kit), or both at once."""
    from silotune.config import load_config, load_for_elsewhere
    from silotune.deploy.kits import read_kit
    from silotune.deploy.submit import VALID_DAYS, hand_in, read_submission, sign_run, submit_run, write_submission
    from silotune.shipped import find

    if Path(config).is_dir():
        raise ConfigError(f"{config!r} is a folder: give a TOML file, a name from 'silotune configs list', or RUN.json")
    is_signed = config.endswith(".json")
    if submitter is None:
        if kit is None or not is_signed:
            raise ConfigError(
                "a run is signed first: 'submit CONFIG --as KIT --out RUN.json', then 'submit RUN.json --kit'"
            )
        unused = {"--set": settings, "--base": base, "--out": out, "--days": days}
        _refuse_unused("a signed run is handed in as it is", unused)
        name = hand_in(read_kit(kit), read_submission(Path(config)))
    elif is_signed:
        raise ConfigError(f"{config!r} is a signed run, or no configuration: 'silotune submit {config} --kit KIT'")
    elif kit is not None:
        _refuse_unused("--as with --kit signs a run and hands it in at once", {"--base": base, "--out": out})
        name = submit_run(
            read_kit(kit),
            load_config(find(config), settings or ()),
            submitter=read_kit(submitter),
            days=days or VALID_DAYS,
        )
    elif out is not None:
        _refuse_unused("--out signs a run and does not hand it in", {"--follow": follow})
        if out.suffix != ".json" or out.exists():
            raise ConfigError(f"--out {str(out)!r}: name a new file that ends in .json")
        asked = load_for_elsewhere(find(config), settings or ())
        signed = sign_run(asked, read_kit(submitter), base=base, days=days or VALID_DAYS)
        write_submission(signed, out)
        _show_signed(signed.job.job.run, out, as_json)
        return
    else:
        raise ConfigError("where to? --out FILE writes the signed run, --kit KIT hands it in on this machine")
    if follow:
        _follow(kit, name, as_json)
    elif as_json:
        print_json({"name": name})
    else:
        say(f"submitted: {name}")
        say(f"follow it: silotune logs {name} --kit {kit} --follow")


def _refuse_unused(why: str, options: Mapping[str, object]) -> None:
    """Refuses options that would have no effect."""
    given = [name for name, value in options.items() if value]
    if given:
        raise ConfigError(f"{why}, so {' and '.join(given)} would do nothing: leave it out")


def _show_signed(name: str, out: Path, as_json: bool) -> None:
    if as_json:
        print_json({"name": name, "file": str(out)})
        return
    say(f"signed: {name}")
    say(f"hand it in on the coordinator's machine: silotune submit {out} --kit KIT")


def list_runs(kit: CoordinatorKit, as_json: AsJson = False) -> None:
    """List the runs that were submitted."""
    jobs = _jobs(kit)
    found = [dict(jobs.progress(name)) for name in jobs.names()]
    if as_json:
        print_json(found)
    else:
        print_jobs(found)


def status(run: RunName, kit: CoordinatorKit, as_json: AsJson = False) -> None:
    """Show how far a submitted run is."""
    found = dict(_jobs(kit).progress(run))
    if as_json:
        print_json(found)
    else:
        print_jobs([found])


def logs(
    run: RunName,
    kit: CoordinatorKit,
    follow: Annotated[bool, typer.Option("--follow", help="Stay and show the run until it ends.")] = False,
) -> None:
    """Show what a submitted run has done so far."""
    _follow(kit, run, as_json=False, stays=follow)


def cancel(run: RunName, kit: CoordinatorKit) -> None:
    """End a submitted run; its last checkpoint stays."""
    say(f"{run}: {_jobs(kit).cancel(run).status}")


def fetch(
    run: RunName,
    out: Annotated[Path, typer.Argument(help="Where to put the run folder; must not be there yet.")],
    kit: CoordinatorKit,
) -> None:
    """Copy the run folder of a submitted run, with its adapter and audit trail."""
    from silotune.deploy.submit import fetch_run

    place = fetch_run(_jobs(kit), run, out)
    say(f"run folder: {place}")


def _jobs(kit: Path) -> Any:
    from silotune.deploy.kits import coordinator_folder, read_kit
    from silotune.deploy.queue import Jobs

    return Jobs(coordinator_folder(read_kit(kit)))


def _follow(kit: Path, name: str, as_json: bool, *, stays: bool = True) -> None:
    """Shows a run's events; ends with its exit code where it failed."""
    from silotune.cli.progress import RunProgress
    from silotune.deploy.submit import follow_run
    from silotune.errors import FederationError

    jobs = _jobs(kit)
    if as_json:
        for _ in follow_run(jobs, name, stays=stays):
            pass
        print_json(dict(jobs.progress(name)))
    else:
        with RunProgress(stdout()) as progress:
            for event, fields in follow_run(jobs, name, stays=stays):
                progress(event, fields)
        print_jobs([dict(jobs.progress(name))])
    ended = jobs.read(name)
    if ended.status == "failed":
        error = FederationError(ended.reason)
        raise error


def print_jobs(jobs: list[dict[str, Any]]) -> None:
    """A line for each of the runs that were submitted."""
    for job in jobs:
        done = "" if job["round"] is None else f", round {job['round']} of {job['rounds']}"
        reason = f": {job['reason']}" if job["reason"] else ""
        waits = job["status"] in ("queued", "running") and job["coordinator"] is None
        stopped = "; the coordinator is stopped: the run goes on once it is started" if waits else ""
        say(f"  run {job['name']}: {job['status']}{done}{reason}{stopped}")
    if not jobs:
        say("  no runs: silotune submit RUN.json --kit KIT")
