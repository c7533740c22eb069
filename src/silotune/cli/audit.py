"""``silotune audit``: verify, read and export the audit trail of a run or a site, and attack a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from silotune.cli.output import AsJson, print_json, reserved_stdout, say
from silotune.errors import ConfigError, unknown_choice

if TYPE_CHECKING:
    from silotune.experiment.audit import Checked

Folder = Annotated[Path, typer.Argument(metavar="DIR", help="A run folder, or a site's state folder.")]


def audit_app() -> typer.Typer:
    """The group's commands."""
    app = typer.Typer(
        help="Verify, show and export audit trails, offline; attack a run to see what it gives away.",
        no_args_is_help=True,
    )
    for command in (verify, show, export, leakage):
        app.command(command.__name__)(command)
    return app


def verify(
    folder: Folder,
    kit: Annotated[
        Path | None, typer.Option("--kit", help="A kit; its list of members says whose key is whose.")
    ] = None,
    key: Annotated[
        list[str] | None, typer.Option("--key", metavar="WHO=KEY", help="A public key that may sign; repeatable.")
    ] = None,
    site: Annotated[list[Path] | None, typer.Option("--site", help="A site's own trail; repeatable.")] = None,
    unfinished: Annotated[bool, typer.Option("--unfinished", help="Accept a trail that was not closed.")] = False,
    uncountersigned: Annotated[
        bool, typer.Option("--uncountersigned", help="Accept that sites did not sign the end of the trail.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Prove order, completeness and signatures, and that all files of the run are what they were at its end."""
    from silotune.experiment.audit import verify_run

    found = verify_run(
        folder,
        keys=_keys(kit, key or []),
        sites=site or (),
        is_open_allowed=unfinished,
        is_uncountersigned_allowed=uncountersigned,
    )
    chain, coverage = found.chain, found.coverage
    if as_json:
        print_json(
            {
                "entries": len(chain.entries),
                "head": chain.head,
                "closed": chain.is_closed,
                "keys": {who: list(own) for who, own in chain.keys.items()},
                "countersigned": dict(chain.countersigned),
                "uncountersigned": list(found.uncountersigned),
                "sites": dict(found.witnesses),
                "rounds_aggregated_again": found.rounds,
                "adapter_is_the_signed_one": found.has_adapter,
                "files_covered": list(coverage.covered),
                "files_not_covered": list(coverage.uncovered),
            }
        )
        return
    say(f"{len(chain.entries)} entries in order, {_state_of(found)}; head {chain.head}")
    for who, own in chain.keys.items():
        say(f"signed by {who}: {', '.join(own)}")
    for who, entries in chain.countersigned.items():
        say(f"countersigned by {who}: {entries} entries")
    for who in found.uncountersigned:
        say(f"NOT countersigned by {who}")
    for who, heads in found.witnesses.items():
        say(f"the trail of {who} agrees: {heads} heads")
    for line in coverage_lines(found):
        say(line)
    if not found.site:
        say("adapter and result are those that were signed" if found.has_adapter else "no adapter to compare")
    if found.rounds:
        say(f"the updates of {found.rounds} rounds aggregate to it")


def _state_of(found: Checked) -> str:
    """Whether the trail has an end; a site's has none."""
    if found.chain.is_closed:
        return "closed"
    return f"the trail of site {found.site}, which is never closed" if found.site else "not closed"


def coverage_lines(found: Checked) -> list[str]:
    """Which files the verdict covers, and which it does not."""
    covered, uncovered = found.coverage.covered, found.coverage.uncovered
    if found.site:
        return ["a site's own trail, so the verdict is about the trail alone, as far as it goes"]
    if not found.chain.is_closed:
        about = ", ".join(map(ascii, covered)) or "the trail alone"
        return [f"not closed, so the verdict is about {about}"]
    lines = [f"{len(covered)} files are to the byte what they were when the trail was closed"]
    return [*lines, *([f"not covered: {', '.join(map(ascii, uncovered))}"] if uncovered else [])]


def show(
    folder: Folder,
    last: Annotated[
        int | None, typer.Option("--last", min=1, help="Show only this many entries, from the end.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show the entries of a trail, one line each; nothing is verified."""
    from silotune.experiment.audit import trail_of
    from silotune.record.chain import read_chain
    from silotune.report.audit import line_of, row_of

    entries = read_chain(trail_of(folder))
    chosen = entries[-last:] if last else entries
    if as_json:
        print_json({"entries": [row_of(entry) for entry in chosen]})
        return
    for entry in chosen:
        say(line_of(entry))


def export(
    folder: Folder,
    out: Annotated[Path, typer.Argument(help="The file to write: .json, .csv, .html or .pdf.")],
    as_json: AsJson = False,
) -> None:
    """Write a trail for an auditor, with what verifying it said; exit code 11 where it does not verify."""
    from silotune.report.audit import FORMATS, write_audit

    if out.suffix not in FORMATS:
        raise ConfigError(unknown_choice("ending", out.suffix or str(out), FORMATS))
    verdict = write_audit(folder, out)
    if as_json:
        print_json({"file": str(out), "verdict": verdict})
        return
    say(str(out))
    say(verdict)


def leakage(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")],
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder for the report; default: leakage in the run folder.")
    ] = None,
    key: Annotated[
        Path | None, typer.Option("--key", help="An Ed25519 key that signs the report; default: record.audit_key.")
    ] = None,
    shadows: Annotated[
        int | None,
        typer.Option("--shadows", min=0, max=64, help="Models trained for LiRA, an even number; 0 for none."),
    ] = None,
    examples: Annotated[
        int | None, typer.Option("--examples", min=1, help="Most members attacked at each client.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Attack a run with what it left of itself, and write what came out beside what chance would give.

    Ends with exit code 13 where the canaries prove more than the epsilon that the run claims.
    """
    from silotune.record.runs import RunFolder

    if shadows is not None and shadows % 2:
        raise ConfigError(f"--shadows {shadows}: they are trained on pairs of halves; give an even number")
    run = RunFolder.open(folder)
    from silotune.experiment.leakage_report import FOLDER

    place = out or run.path / FOLDER
    if place.exists():
        raise ConfigError(f"{str(place)!r} is there already: give another folder with --out")
    changes = {"shadows": shadows, "max_examples": examples}
    with reserved_stdout(as_json):
        from silotune.experiment.leakage import audit_run, check_claim, key_of, signed
        from silotune.experiment.leakage_report import lines_of, write_report

        signer = key_of(run, key)
        made = audit_run(folder, changes={name: value for name, value in changes.items() if value is not None})
        report = signed(made, signer)
        write_report(report, place)
    if as_json:
        print_json(report)
    else:
        for line in lines_of(report):
            say(line)
        say(f"report: {place}" + ("" if signer else " (not signed: give --key)"))
    check_claim(report)


def _keys(kit: Path | None, given: Sequence[str]) -> Mapping[str, Sequence[str]] | None:
    """Who may sign with what: the members of a kit, and the keys that were given; None for neither."""
    from silotune.record.signatures import normal_public

    if kit is None and not given:
        return None
    keys: dict[str, tuple[str, ...]] = {}
    if kit is not None:
        from silotune.deploy.kits import read_kit

        keys.update(read_kit(kit).members().signing_keys())
    for text in given:
        who, equals, line = text.partition("=")
        if not equals:
            raise ConfigError(f"--key {text!r} is not of the form WHO=KEY, such as coordinator='ssh-ed25519 AAAA...'")
        keys[who] = (*keys.get(who, ()), normal_public(line))
    return keys
