"""``silotune dashboard``: a page over run folders, live or as one file."""

from __future__ import annotations

import os
import secrets
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from silotune.cli.output import say
from silotune.errors import ConfigError, require

if TYPE_CHECKING:
    from silotune.dashboard.board import Board
    from silotune.dashboard.deployment import Deployment
    from silotune.dashboard.pages import Pages

_TOKEN_BYTES = 32


def dashboard(
    folder: Annotated[
        Path | None, typer.Argument(metavar="[FOLDER]", help="Runs, one run, or a grid; default: runs.")
    ] = None,
    kit: Annotated[Path | None, typer.Option("--kit", help="A coordinator's or a site's kit, to show, too.")] = None,
    host: Annotated[str, typer.Option("--host", help="Address to serve at; beyond this machine, with a token.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="0 takes any that is free.")] = 8642,
    token_file: Annotated[
        Path | None, typer.Option("--token-file", help="A file with the token that visitors must know.")
    ] = None,
    save: Annotated[Path | None, typer.Option("--save", help="Write the page as one HTML file, and end.")] = None,
) -> None:
    """Show runs while they go on, in a browser on this machine; nothing is written to their folders.

    The page reads the folders as they grow: runs with state, round, time left and cost; of each run curves, who
    answered, who dropped out and why, privacy, bytes, energy and the audit trail; of a grid its cells and claims; of a
    deployment its sites and certificates. It works without JavaScript, too, and fetches nothing from elsewhere.
    """
    from silotune.dashboard.board import Board
    from silotune.dashboard.pages import Pages

    board, deployment = (Board.open(folder or Path("runs")), None) if kit is None else _with_kit(kit, folder)
    pages = Pages(board, deployment, is_saved=save is not None)
    if save is not None:
        _save(pages, save)
        return
    _serve(pages, host, port, token_file)


def _with_kit(kit: Path, folder: Path | None) -> tuple[Board, Deployment]:
    require("flwr", extra="deploy")
    from silotune.dashboard.board import Board
    from silotune.dashboard.deployment import Deployment, runs_of
    from silotune.deploy.kits import read_kit

    read = read_kit(kit)
    runs = runs_of(read)
    return Board.open(folder or runs, may_be_empty=folder is None), Deployment(read)


def _save(pages: Pages, out: Path) -> None:
    from silotune.record.files import write_bytes
    from silotune.report.run_page import whole_page

    if out.is_dir():
        raise ConfigError(f"--save {str(out)!r} is a folder: name a file, such as {str(out / 'page.html')!r}")
    page = pages.at("/", waits=True)
    assert page is not None
    write_bytes(out, whole_page(page.title, page.sections).encode())
    say(f"written: {out}")


def _serve(pages: Pages, host: str, port: int, token_file: Path | None) -> None:
    for package in ("starlette", "uvicorn"):
        require(package, extra="dashboard")
    from silotune.dashboard.server import is_loopback, listen, serve

    token = _token(token_file) if token_file is not None else ""
    is_open = not is_loopback(host)
    if is_open and not token:
        token = secrets.token_urlsafe(_TOKEN_BYTES)
    listening = listen(host, port)
    named = os.uname().nodename if host in ("0.0.0.0", "::") else host
    shown = f"[{named}]" if ":" in named else named
    ending = f"?token={token}" if token and token_file is None else ""
    say(f"open http://{shown}:{listening.getsockname()[1]}/{ending}")
    if is_open:
        say("note: this is not encrypted; across a network use an SSH tunnel, or a proxy with TLS before it")
    if token_file is not None:
        say(f"the token is in {token_file}: open the address with ?token=TOKEN")
    serve(pages, listening, token=token)


def _token(path: Path) -> str:
    from silotune.dashboard.server import LEAST_TOKEN

    try:
        token = path.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError):
        token = ""
    if len(token) < LEAST_TOKEN or not all(char.isalnum() or char in "-_" for char in token):
        raise ConfigError(
            f"--token-file {str(path)!r} holds no token: put at least {LEAST_TOKEN} letters, digits, - and _ there"
        )
    return token
