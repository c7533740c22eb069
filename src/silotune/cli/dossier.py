"""``silotune dossier``: writes the signed papers of a run for a data-protection officer, and verifies them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from silotune.cli.groups import with_default
from silotune.cli.output import AsJson, print_json, say


def dossier_app() -> typer.Typer:
    """The group's commands."""
    app = typer.Typer(
        cls=with_default("write"),
        help="Write the papers of a run for a data-protection officer, signed, or verify them; 'write' is the default.",
        no_args_is_help=True,
    )
    for command in (write, verify):
        app.command(command.__name__)(command)
    return app


def write(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a finished run; it is only read.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write; new or empty.")],
    key: Annotated[
        Path | None, typer.Option("--key", help="An Ed25519 key that signs; default: one made for it, and forgotten.")
    ] = None,
    base_flops: Annotated[
        float | None,
        typer.Option("--base-flops", help="Operations that the base's own training took, as its maker says."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write model card, datasheets, DPIA, AI Act skeletons and bills of materials, signed."""
    from silotune.record.signatures import new_key, read_key
    from silotune.report.dossier import write_dossier

    signer = new_key() if key is None else read_key(key)
    files = write_dossier(run, out, signer, base_flops=base_flops)
    if as_json:
        print_json({"folder": str(out), "files": files, "key": signer.public})
        return
    say(f"{len(files)} files in {out}; begin with index.html")
    say(f"signed by {signer.public}" + ("" if key else ", a key that was made for it and is forgotten: note this line"))


def verify(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="What `silotune dossier` wrote.")],
    signer: Annotated[str | None, typer.Option("--signer", help="The public key that must have signed.")] = None,
    as_json: AsJson = False,
) -> None:
    """Prove, offline, that the papers are to the byte what was signed; exit code 11 where they are not."""
    from silotune.record.envelope import verify_folder
    from silotune.record.signatures import normal_public
    from silotune.report.dossier import KIND

    key, files = verify_folder(folder, kind=KIND, signer=None if signer is None else normal_public(signer))
    if as_json:
        print_json({"key": key, "files": files})
        return
    say(f"{len(files)} files are to the byte what was signed")
    say(f"signed by {key}" + ("" if signer else "; whose key that is, --signer KEY checks"))
