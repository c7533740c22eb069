"""``silotune coordinator`` and ``silotune site``: the processes of a federation on several machines."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from silotune.cli.output import AsJson, print_json, reserved_stdout, say
from silotune.cli.submitted import print_jobs
from silotune.errors import require

KitFolder = Annotated[Path, typer.Argument(metavar="KIT", help="Folder of an unpacked kit.")]


def coordinator_app() -> typer.Typer:
    """The commands of ``silotune coordinator``."""
    app = typer.Typer(help="Run the coordinator of a federation.", no_args_is_help=True)
    app.command("start")(_coordinator_start)
    app.command("status")(_coordinator_status)
    app.command("stop")(_coordinator_stop)
    return app


def site_app() -> typer.Typer:
    """The commands of ``silotune site``."""
    app = typer.Typer(help="Run a site of a federation.", no_args_is_help=True)
    app.command("start")(_site_start)
    app.command("status")(_site_status)
    app.command("stop")(_site_stop)
    app.command("check")(_site_check)
    app.command("audit")(_site_audit)
    return app


def _node_words(node: Mapping[str, Any]) -> str:
    where = f" to {node['coordinator']}" if node.get("status") == "connected" else ""
    reason = f": {node['reason']}" if node.get("status") in ("waiting", "refused") else ""
    return f"{node.get('status', 'starting')}{where}{reason}"


def _trainer_words(trainer: Mapping[str, Any]) -> str:
    if trainer["status"] != "state":
        return str(trainer["status"])
    doing = f"works ({trainer['works_on']})" if trainer["works_on"] else "ready"
    times = "once" if trainer["base_loads"] == 1 else f"{trainer['base_loads']} times"
    base = f"base {trainer['base']!r} read {times}" if trainer["base"] else "no base read yet"
    return f"{doing}, process {trainer['process']}, {trainer['served']} requests served, {base}"


_PARTS: Mapping[str, Callable[[Mapping[str, Any]], str]] = {"node": _node_words, "trainer": _trainer_words}


def _print_process(name: str, said: Mapping[str, Any]) -> None:
    """First line of a status: whether the process runs."""
    process = said["process"]
    say(f"{name}: {'process ' + str(process) if process else 'stopped'}")


def _coordinator_start(kit: KitFolder) -> None:
    """Serve sites and submitted runs until stopped; a run at hand goes on at the next start."""
    require("flwr", extra="deploy")
    from silotune.deploy.coordinator import start
    from silotune.deploy.kits import read_kit

    start(read_kit(kit), notify=_say)


def _coordinator_status(kit: KitFolder, as_json: AsJson = False) -> None:
    """Show the sites that are connected, and the runs."""
    from silotune.deploy.coordinator import status
    from silotune.deploy.kits import read_kit

    said = status(read_kit(kit))
    if as_json:
        print_json(said)
        return
    _print_process("coordinator", said)
    if said.get("fault"):
        say(f"fault: {said['fault']}")
    for name, how in sorted(said["sites"].items()):
        say(f"  site {name}: {how}")
    print_jobs(said["jobs"])


def _coordinator_stop(kit: KitFolder) -> None:
    """Stop the coordinator; its runs go on at the next start."""
    from silotune.deploy.kits import coordinator_folder, read_kit
    from silotune.deploy.processes import stop_holder

    stop_holder(coordinator_folder(read_kit(kit)), "the coordinator")


def _site_start(kit: KitFolder) -> None:
    """Connect to the coordinator and train for its runs until stopped."""
    require("flwr", extra="deploy")
    from silotune.deploy.kits import read_kit
    from silotune.deploy.site import start

    start(read_kit(kit), notify=_say)


def _site_status(kit: KitFolder, as_json: AsJson = False) -> None:
    """Show what the site's processes do."""
    from silotune.deploy.kits import read_kit
    from silotune.deploy.site import status

    said = status(read_kit(kit))
    if as_json:
        print_json(said)
        return
    _print_process(f"site {said['site']}", said)
    for part, words in _PARTS.items():
        if part in said:
            say(f"  {part}: {words(said[part])}")
    data = said.get("data", {})
    for note in data.get("notes", ()):
        say(f"  examples in run {data['run']}: {note}")


def _site_stop(kit: KitFolder) -> None:
    """Stop the site; it finishes nothing, and is asked again when it is back."""
    from silotune.deploy.kits import read_kit, site_folder, site_settings
    from silotune.deploy.processes import stop_holder

    opened = read_kit(kit)
    stop_holder(site_folder(opened), f"site {site_settings(opened).site}")


def _site_check(kit: KitFolder, as_json: AsJson = False) -> None:
    """Look, before any run, whether everything that the site needs is in order; each fault has its remedy."""
    from silotune.deploy.check import check_site
    from silotune.deploy.kits import read_kit

    with reserved_stdout(as_json):
        found = check_site(read_kit(kit))
    if as_json:
        print_json([{"check": item.name, "ok": item.ok, "said": item.said} for item in found])
    else:
        for item in found:
            say(f"{'ok   ' if item.ok else 'FAULT'} {item.name}: {item.said}")
    if not all(item.ok for item in found):
        raise typer.Exit(12)


def _site_audit(
    kit: KitFolder,
    run: Annotated[str, typer.Option("--run", help="Name of the run.")],
    out: Annotated[Path | None, typer.Option("--out", help="Write the signed figures to this JSON file.")] = None,
    as_json: AsJson = False,
) -> None:
    """Show what this site measured of a run's final model on its own examples, signed with the site's key.

    Ends with exit code 10 where that is more than the site's policy allows.
    """
    from silotune.deploy.kits import read_kit
    from silotune.deploy.site_audit import check_site_report, site_report, write_site_report

    report = site_report(read_kit(kit), run)
    if out is not None:
        write_site_report(report, out)
    if as_json:
        print_json(report)
    else:
        figures, most = report["figures"], report["largest_membership_advantage"]
        known = "withheld" if figures.get("auc") is None else f"{figures['auc']:.3f}"
        say(
            f"{report['run']} at {report['site']}: round {report['round']}, entry {report['entry']} of the site's trail"
        )
        say(f"AUC as it left: {known}, of {figures['num_examples']} members and {figures['others']} of the reserve")
        bound = "no bound in the policy" if most is None else f"at most {most:g} allowed"
        say(f"membership advantage at the upper end of its interval: {report['advantage']:.3f} ({bound})")
        say(f"signed by {report['key']}" + (f": {out}" if out else ""))
    check_site_report(report)


def _say(event: str, fields: Mapping[str, Any]) -> None:
    words = ", ".join(
        f"{key} {', '.join(value) if isinstance(value, list) else value}" for key, value in fields.items() if value
    )
    with contextlib.suppress(OSError):  # a service goes on even if its output cannot be written, as on a full disk
        say(f"{event.replace('_', ' ')}: {words}")
