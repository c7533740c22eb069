"""Runs a site: keeps its two processes running, the thin node and the resident trainer."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

from silotune.deploy.kits import AUTH_KEY, NOTES, Kit, check_start, log_of, site_folder, site_settings, trainer_socket
from silotune.deploy.processes import Child, follow_parent, holder, only_one, told_to_stop
from silotune.errors import FederationError
from silotune.record.audit import FILE
from silotune.structs import Observer
from silotune.transports.frames import Frame, NoAnswerError, ask

LOOK_SECONDS = 0.2


def start(kit: Kit, *, notify: Observer = lambda event, fields: None) -> None:
    """Runs until SIGTERM or SIGINT; a process that dies is started again, after a pause that grows.

    Raises:
        FederationError: The site runs already, or the coordinator refuses it.
        KitError: A file of the kit is missing, or a key is not valid or may be read by others; nothing was started.
    """
    from silotune.deploy.flower.fleet import read_node_key

    settings, folder = site_settings(kit), site_folder(kit)
    check_start(kit)
    read_node_key(kit.path(AUTH_KEY))
    follow_parent()
    with only_one(folder, f"site {settings.site}"), told_to_stop() as stopped:
        trainer, node = (
            Child(name, (f"silotune.deploy.{name}", str(kit.folder)), log_of(folder, name))
            for name in ("trainer", "node")
        )
        try:
            (folder / NOTES).unlink(missing_ok=True)
            trainer.start()
            node.start()
            place = f"{settings.coordinator.host}:{settings.coordinator.fleet_port}"
            notify("site_started", {"site": settings.site, "coordinator": place, "folder": str(folder)})
            trail = folder / FILE
            seen = trail.stat().st_size if trail.is_file() else 0
            known: set[tuple[str, str]] = set()
            while not stopped:
                for fields in notes_beyond(known, folder / NOTES):
                    notify("run_opened", fields)
                told, seen = told_by(trail, seen)
                for event, fields in told:
                    notify(event, fields)
                for child in (trainer, node):
                    refusal = _refusal(kit) if child is node and child.code else ""
                    if refusal:
                        raise FederationError(refusal)
                    if child.keep_up():
                        notify("process_restarted", {"name": child.name, "starts": child.starts})
                time.sleep(LOOK_SECONDS)
        finally:
            node.stop()
            trainer.stop(limit_seconds=5.0)


def told_by(trail: Path, seen: int) -> tuple[list[tuple[str, dict[str, Any]]], int]:
    """What a site's own audit trail says from a place in it, as events: rounds that it trained, and what it refused or
    failed in; and the place to go on at.

    Loss and seconds are those that left: where a round goes into a protected sum none do, and it is not told.
    """
    if not trail.is_file():
        return [], 0
    with trail.open("rb") as file:
        file.seek(seen)
        whole = file.read().rpartition(b"\n")[0]
    if not whole:
        return [], seen
    entries = map(json.loads, whole.splitlines())
    told = (_TELLS[entry["event"]](entry["fields"]) for entry in entries if entry["event"] in _TELLS)
    return [event for event in told if event is not None], seen + len(whole) + 1


def _trained(fields: Mapping[str, Any]) -> tuple[str, dict[str, Any]] | None:
    body = fields["body"]
    if not isinstance(body, dict) or "steps" not in body:  # no report of a training
        return None
    figures = {name: f"{body[name]:.3g}" for name in ("loss", "seconds") if name in body}
    sizes = {name: fields[name] for name in ("bytes_down", "bytes_up") if name in fields}
    return "round_trained", {"run": fields.get("run", ""), "round": fields["round"], **figures, **sizes}


def _not_done(fields: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    asked = {name: fields[name] for name in ("run", "round", "kind") if name in fields}
    if "error" in fields:
        return "request_failed", {**asked, "error": fields["error"], "see": "logs/trainer.log in the state folder"}
    return "request_refused", {**asked, "rule": fields["rule"], "reason": fields["reason"]}


_TELLS: Final[Mapping[str, Callable[[Mapping[str, Any]], tuple[str, dict[str, Any]] | None]]] = {
    "reply": _trained,
    "refusal": _not_done,
    "failure": _not_done,
}
"""Event of a site's trail -> what its terminal says of it."""


def notes_beyond(known: set[tuple[str, str]], path: Path) -> list[dict[str, Any]]:
    """What the trainer says of this site's examples in a run, where it is not known yet; from now on it is."""
    said = _written(path)
    new = [(str(said["run"]), str(note)) for note in said.get("notes", ())]
    new = [each for each in new if each not in known]
    known.update(new)
    return [{"run": run, "note": note} for run, note in new]


def _refusal(kit: Kit) -> str:
    """Why the coordinator refuses this node; empty where it does not."""
    said = node_state(kit)
    return str(said.get("reason", "")) if said.get("status") == "refused" else ""


def node_state(kit: Kit) -> dict[str, Any]:
    """The state that the node wrote last."""
    return _written(site_folder(kit) / "node.json")


def _written(path: Path) -> dict[str, Any]:
    """What one of the site's two processes wrote last; empty before."""
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}


def status(kit: Kit) -> dict[str, Any]:
    """What a site does: its process, its node's connection, its trainer; plain JSON."""
    process = holder(site_folder(kit))
    said: dict[str, Any] = {"site": site_settings(kit).site, "process": process}
    if process is None:
        return said
    try:
        trainer = dict(ask(trainer_socket(kit), Frame({"verb": "state"}), timeout_seconds=5).header)
    except NoAnswerError:
        trainer = {"status": "starting"}
    except FederationError as error:
        trainer = {"status": "busy", "reason": str(error)}
    return {**said, "node": node_state(kit), "trainer": trainer, "data": _written(site_folder(kit) / NOTES)}
