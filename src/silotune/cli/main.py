"""The entry point of the ``silotune`` command: builds the commands, turns errors into one line and an exit code."""

from __future__ import annotations

import atexit
import gc
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated

import click
import typer

from silotune.cli.audit import audit_app
from silotune.cli.benchmark import benchmark
from silotune.cli.charter import charter_app
from silotune.cli.configs import configs_app
from silotune.cli.dashboard import dashboard
from silotune.cli.data import data_app, init
from silotune.cli.demo import demo_app
from silotune.cli.deployed import coordinator_app, site_app
from silotune.cli.doctor import doctor
from silotune.cli.dossier import dossier_app
from silotune.cli.generate import chat, generate
from silotune.cli.listings import plugins, tasks
from silotune.cli.output import say
from silotune.cli.privacy import privacy_app
from silotune.cli.provision import provision_app
from silotune.cli.quickstart import quickstart
from silotune.cli.report import report
from silotune.cli.run import resume, run
from silotune.cli.submitted import cancel, fetch, list_runs, logs, status, submit
from silotune.cli.tune import tune
from silotune.cli.tuned import evaluate, export
from silotune.errors import ConfigError, SilotuneError
from silotune.quiet import hush

_SPINS = "10000"
"""Looks at whether the others are done, a fraction of a millisecond in all, after which a waiting thread sleeps."""
_HELP = "Fine-tune one language model over institutions whose text may not leave, and see what that is worth."
_EPILOG = (
    "Exit codes: 0 done; 1 other error; 2 configuration or usage; 3 data; 4 model; 5 training; 6 federation; "
    "7 run folder; 8 package missing; 9 cells of a grid failed; 10 policy; 11 audit trail; 12 kit or key; "
    "13 privacy; 130 interrupted."
)
_COMMANDS = (
    quickstart,
    init,
    run,
    resume,
    tune,
    benchmark,
    evaluate,
    generate,
    chat,
    export,
    report,
    dashboard,
    doctor,
    tasks,
    plugins,
)
_DEPLOYED: Mapping[str, Callable[..., None]] = {
    "submit": submit,
    "list": list_runs,
    "status": status,
    "logs": logs,
    "cancel": cancel,
    "fetch": fetch,
}
_GROUPS = {
    "coordinator": coordinator_app,
    "site": site_app,
    "demo": demo_app,
    "configs": configs_app,
    "data": data_app,
    "provision": provision_app,
    "charter": charter_app,
    "audit": audit_app,
    "dossier": dossier_app,
    "privacy": privacy_app,
}


def build_app() -> typer.Typer:
    """All commands."""
    app = typer.Typer(
        help=_HELP,
        epilog=_EPILOG,
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(_global_options)
    for command in _COMMANDS:
        app.command(command.__name__)(command)
    for name, deployed in _DEPLOYED.items():
        app.command(name)(deployed)
    for name, group in _GROUPS.items():
        app.add_typer(group(), name=name)
    return app


def _global_options(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=lambda asked: _print_version(asked), help="Show it.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks, as SILOTUNE_DEBUG=1 does.")] = False,
) -> None:
    """The options that stand before a command; ``main`` has read them already."""


def _print_version(asked: bool) -> None:
    if asked:
        from silotune.record.environment import version_of

        say(f"silotune {version_of('silotune') or '(source tree, not installed)'}")
        raise typer.Exit


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line and exits with its code.

    Args:
        arguments: Without the program's name; those of the process when None.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    is_debug = "--debug" in given or os.environ.get("SILOTUNE_DEBUG", "") not in ("", "0")
    if not is_debug:
        hush()
    _collect_seldom()
    _wait_briefly()
    sys.exit(_run([argument for argument in given if argument != "--debug"], is_debug=is_debug))


def _collect_seldom() -> None:
    """Saves a command three seconds: the million objects that its imports make stay until it ends, and go at once."""
    gc.set_threshold(20_000, 10, 10)
    atexit.register(gc.freeze)


def _wait_briefly() -> None:
    """Lets threads that wait for each other sleep soon, unless the user has chosen how they wait.

    OpenMP's own choice keeps a core busy with waiting for milliseconds, while the thread that is waited for may need
    that core: beside other work on the machine an operation then takes many times as long. It reads the variables when
    torch is loaded, which no command has done yet; processes that a command starts inherit them.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", _SPINS)


def _run(arguments: list[str], *, is_debug: bool) -> int:
    try:
        code = build_app()(arguments, prog_name="silotune", standalone_mode=False)
    except SilotuneError as error:
        if is_debug:
            raise
        for line in _lines(error):
            say(f"error: {line}", is_error=True)
        return error.exit_code
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (KeyboardInterrupt, click.Abort):
        return 130
    return code if isinstance(code, int) else 0


def _lines(error: SilotuneError) -> list[str]:
    """The error in one line; each fault of a configuration on a line of its own."""
    if isinstance(error, ConfigError) and error.faults:
        return list(error.faults)
    return [" ".join(str(error).split())]


if __name__ == "__main__":
    main()
