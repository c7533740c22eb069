"""``silotune charter``: the federation's agreement, signed and verified."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from silotune.cli.output import AsJson, print_json, say
from silotune.errors import ConfigError, KitError

if TYPE_CHECKING:
    from silotune.deploy.charter import SignedCharter

File = Annotated[Path, typer.Argument(metavar="CHARTER.TOML", help="The agreement.")]


def charter_app() -> typer.Typer:
    """The group's commands."""
    app = typer.Typer(help="Sign and verify the agreement of a federation.", no_args_is_help=True)
    for command in (sign, verify):
        app.command(command.__name__)(command)
    return app


def sign(
    charter: File,
    kit: Annotated[Path, typer.Option("--kit", help="Folder of the site's kit, whose key signs.")],
    as_json: AsJson = False,
) -> None:
    """Sign a charter with a site's key; the signature goes into charter.signatures.json beside it."""
    from silotune.deploy.charter import sign_charter
    from silotune.deploy.kits import SIGNING_KEY, SiteKit, read_kit
    from silotune.record.signatures import read_key

    opened = read_kit(kit)
    if not isinstance(opened.settings, SiteKit):
        raise ConfigError("--kit must be a site's kit: the institutions sign, not the coordinator")
    made = sign_charter(charter, read_key(opened.path(SIGNING_KEY)), party=opened.settings.site)
    _show(made, as_json)


def verify(
    charter: File,
    kit: Annotated[
        Path | None, typer.Option("--kit", help="A kit; its list of members says whose key is whose.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Check every signature of a charter; without --kit, compare the keys yourself."""
    from silotune.deploy.charter import verify_charter
    from silotune.deploy.kits import read_kit

    keys = read_kit(kit).members().signing_keys() if kit is not None else None
    made = verify_charter(charter, keys=keys)
    _show(made, as_json)
    if made.missing:
        raise KitError(f"not signed yet by {', '.join(made.missing)}")


def _show(made: SignedCharter, as_json: bool) -> None:
    if as_json:
        print_json({"sha256": made.sha256, "signed": dict(made.signed), "missing": list(made.missing)})
        return
    say(made.charter.title)
    say(f"sha256 {made.sha256}")
    say(f"valid until {made.charter.until.isoformat()}")
    for party in made.charter.parties:
        say(f"{party:24} {made.signed.get(party, 'not signed yet')}")
