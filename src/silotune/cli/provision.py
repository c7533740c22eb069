"""``silotune provision``: certificates, keys and kits of a federation."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from silotune.cli.groups import with_default
from silotune.cli.output import AsJson, print_json, say

Folder = Annotated[Path, typer.Option("--out", metavar="DIR", help="The folder of this federation's provisioning.")]
Request = Annotated[Path | None, typer.Option("--csr", help="The site's own request; its kit holds no private key.")]


def provision_app() -> typer.Typer:
    """The group's commands."""
    app = typer.Typer(
        cls=with_default("create"),
        help="Make and change the certificates, keys and kits of a federation; 'create' may be left out.",
        no_args_is_help=True,
    )
    for command in (create, add, submitter, revoke, rotate, request, members):
        app.command(command.__name__)(command)
    return app


def create(
    plan: Annotated[Path, typer.Argument(metavar="FEDERATION.TOML", help="Name, coordinator, sites.")],
    out: Folder,
    csr: Annotated[list[Path] | None, typer.Option("--csr", help="Request of a site; repeatable.")] = None,
    as_json: AsJson = False,
) -> None:
    """Make an authority, a kit for the coordinator, one for each submitter and one for each site."""
    from silotune.deploy.provision import provision

    _show(provision(plan, out, requests=csr or ()), as_json)


def add(
    site: Annotated[str, typer.Argument(help="Name of the new site.")],
    out: Folder,
    csr: Request = None,
    contact: Annotated[str, typer.Option(help="Whom to contact with questions.")] = "",
    as_json: AsJson = False,
) -> None:
    """Add a site: a kit for it, and a new members.json for the others."""
    from silotune.deploy.provision import add_site

    _show([add_site(out, site, contact=contact, request=csr)], as_json, members_in=out)


def submitter(
    name: Annotated[str, typer.Argument(help="Name of the person or system that may submit runs.")],
    out: Folder,
    contact: Annotated[str, typer.Option(help="Whom to contact with questions.")] = "",
    as_json: AsJson = False,
) -> None:
    """Add a submitter, or give one a new key: a kit, and a new members.json for coordinator and sites."""
    from silotune.deploy.provision import add_submitter

    _show([add_submitter(out, name, contact=contact)], as_json, members_in=out)


def revoke(
    name: Annotated[str, typer.Argument(help="Name of the site or submitter.")], out: Folder, as_json: AsJson = False
) -> None:
    """Take a site or a submitter out: a new members.json, with which it is refused."""
    from silotune.deploy.provision import revoke as revoke_member

    revoke_member(out, name)
    _show([], as_json, members_in=out)


def rotate(
    who: Annotated[str, typer.Argument(help="Name of a site, or 'coordinator'.")],
    out: Folder,
    csr: Request = None,
    as_json: AsJson = False,
) -> None:
    """Give a site, or the coordinator and its certificate, new keys: a new kit and a new members.json."""
    from silotune.deploy.provision import rotate_coordinator, rotate_site

    made = rotate_coordinator(out) if who == "coordinator" else rotate_site(out, who, request=csr)
    _show([made], as_json, members_in=out)


def request(
    site: Annotated[str, typer.Argument(help="Name of the site, as in federation.toml.")],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Where keys and request are written.")],
    as_json: AsJson = False,
) -> None:
    """At a site: make its own keys, which stay there, and a request to send to whoever provisions."""
    from silotune.deploy.provision import make_request

    made = make_request(site, out)
    if as_json:
        print_json({"request": str(made)})
        return
    say(str(made))
    say("send this file; auth.key and signing.key beside it stay with you")


def members(
    kit: Annotated[Path, typer.Argument(help="Folder of an unpacked kit.")],
    file: Annotated[Path | None, typer.Argument(help="A newer members.json to put into it.")] = None,
    as_json: AsJson = False,
) -> None:
    """Show who belongs to a kit's federation; with a file, take that list over first."""
    from silotune.deploy.kits import read_kit, replace_members

    opened = read_kit(kit)
    listed = replace_members(opened, file) if file is not None else opened.members()
    if as_json:
        print_json(listed.model_dump(mode="json"))
        return
    say(f"{listed.federation}, version {listed.version}")
    for member in listed.members:
        say(f"{member.name:24} {member.status:8} {member.signing_public}")


def _show(made: list[Any], as_json: bool, *, members_in: Path | None = None) -> None:
    from silotune.deploy.kits import MEMBERS

    if as_json:
        rows = [{"name": kit.name, "path": str(kit.path), "sha256": kit.sha256} for kit in made]
        print_json({"kits": rows, "members": str(members_in / MEMBERS) if members_in else None})
        return
    for kit in made:
        say(str(kit.path))
        say(f"  sha256 {kit.sha256}")
    if members_in is not None:
        say(str(members_in / MEMBERS))
        say(f"  for every kit: silotune provision members KIT {MEMBERS}")
