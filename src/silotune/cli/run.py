"""``silotune run`` and ``silotune resume``: start a run from a configuration, or go on with one that was stopped."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from silotune.cli.output import AsJson, Settings, print_json, reserved_stdout, say, stderr, stdout
from silotune.errors import ConfigError

if TYPE_CHECKING:
    from silotune.record.runs import RunFolder
    from silotune.structs import Observer


def run(
    config: Annotated[str, typer.Argument(help="A TOML file, or a name from 'silotune configs list'.")],
    settings: Settings = None,
    as_json: AsJson = False,
) -> None:
    """Run an experiment: federated, isolated and centralised training as its configuration says."""
    from silotune.shipped import asked

    loaded = asked(config, settings or ())
    say_loading(as_json)
    from silotune.experiment.run import run_experiment

    folder = watched(lambda observer: run_experiment(loaded, observer=observer), is_silent=as_json)
    _show(folder, as_json)


def resume(
    folder: Annotated[Path, typer.Argument(help="The run folder; with --kit, the name of a submitted run.")],
    kit: Annotated[Path | None, typer.Option(help="The coordinator's kit, for a run that was submitted.")] = None,
    submitter: Annotated[
        Path | None,
        typer.Option("--as", metavar="KIT", help="A submitter's kit, to sign the run anew once it expired."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Go on with a run that was stopped, from its newest checkpoint; the result is the same to the bit."""
    if kit is not None:
        _queue_again(str(folder), kit, submitter, as_json)
        return
    if submitter is not None:
        raise ConfigError("--as signs a submitted run anew: name the coordinator's kit, too (--kit)")
    say_loading(as_json)
    from silotune.experiment.run import resume_experiment

    done = watched(lambda observer: resume_experiment(folder, observer=observer), is_silent=as_json)
    _show(done, as_json)


def _queue_again(name: str, kit: Path, submitter: Path | None, as_json: bool) -> None:
    """The coordinator takes the run up again; nobody waits for it here."""
    from silotune.deploy.kits import read_kit
    from silotune.deploy.submit import resume_run

    state = resume_run(read_kit(kit), name, submitter=None if submitter is None else read_kit(submitter))
    if as_json:
        print_json({"name": name, "status": state.status})
        return
    say(f"{name}: {state.status}")
    say(f"follow it: silotune logs {name} --kit {kit} --follow")


def say_loading(is_silent: bool) -> None:
    """Says why nothing else is said for the first seconds."""
    if not is_silent:
        say("loading PyTorch, the model and the examples")


def watched(work: Callable[[Observer | None], RunFolder], *, is_silent: bool) -> RunFolder:
    """Does the work with live progress; where standard output is for JSON, on standard error if that is a terminal."""
    from silotune.cli.progress import RunProgress

    console = stderr() if is_silent else stdout()
    with reserved_stdout(is_silent):
        if is_silent and not console.is_terminal:
            return work(None)
        with RunProgress(console) as progress:
            return work(progress)


def _show(folder: RunFolder, as_json: bool) -> None:
    from silotune.experiment.tuned import next_command
    from silotune.report.pictures import draw_skew
    from silotune.report.run_page import write_run_page
    from silotune.report.runs import read_summary, tables_of

    summary = read_summary(folder)
    with reserved_stdout(as_json):
        picture = None if folder.is_of_sites() else draw_skew(folder, folder.path / "skew.png")
        page = write_run_page(folder.path)
    if as_json:
        print_json({"folder": str(folder.path), **summary})
        return
    stdout().print(*tables_of(summary), sep="\n")
    say(f"run folder: {folder.path}")
    say(f"report:     {page}")
    if picture is not None:
        say(f"by client:  {picture}")
    say(f"try it:     {next_command(folder.path)}")
