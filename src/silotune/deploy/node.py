"""The thin process of a site: it carries messages from the SuperLink to the resident trainer, and answers back.

It imports neither torch nor transformers, so that it starts at once, needs little memory, and keeps its heartbeat
whatever the trainer does. No code that comes with a run is executed here.

Run as ``python -m silotune.deploy.node KIT``.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import sys
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from silotune.deploy.flower.bundle import bundle, bundle_hash
from silotune.deploy.flower.fleet import (
    Address,
    Announced,
    Fleet,
    LostConnectionError,
    RunEndedError,
    beating,
    read_node_key,
    refusal,
)
from silotune.deploy.kits import AUTH_KEY, AUTHORITY, Kit, read_kit, site_folder, site_settings, trainer_socket
from silotune.deploy.processes import follow_parent, log_to_stdout, told_to_stop
from silotune.errors import FederationError, RunFolderError, SilotuneError, TrainerLostError
from silotune.record.files import write_json
from silotune.transports.flower import OTHER_BUNDLE, Work, client_app
from silotune.transports.frames import Frame, NoAnswerError, ask, wait_until_ready, work_frame

POLL_SECONDS = 0.2
"""Pause between two looks for a message; ``REST_SECONDS`` after a minute without one."""
REST_SECONDS = 1.0
LONGEST_REST_SECONDS = 5.0
"""Longest pause between two tries to connect: the first is ``POLL_SECONDS``, each further one twice as long."""
TRAINER_SECONDS = 300.0
"""How long a trainer that died is waited for, which must read its base model again."""
WORK_SECONDS = 24 * 3600.0
MOST_TRIES = 3
MOST_BYTES = 2 << 30


def work(socket: Path, envelope: Mapping[str, str], setup: bytes, message: bytes) -> Frame:
    """Gives a request to the trainer; if the trainer dies over it, waits until it is back and asks again.

    Raises:
        TrainerLostError: The trainer died over the same request every time, or did not come back.
    """
    for _ in range(MOST_TRIES):
        try:
            return ask(socket, work_frame(envelope.get("job", ""), setup, message), timeout_seconds=WORK_SECONDS)
        except NoAnswerError:
            wait_until_ready(socket, timeout_seconds=TRAINER_SECONDS)
    raise TrainerLostError(f"the trainer died {MOST_TRIES} times over one request: see its log at the site")


class _Node:
    """One step of a connection's loop; it remembers which runs have the bundle of this silotune."""

    def __init__(self, fleet: Fleet, work: Work, *, most_bytes: int = MOST_BYTES) -> None:
        self._fleet, self._app, self._most_bytes = fleet, client_app(work), most_bytes
        self._allowed: dict[int, bool] = {}

    def once(self) -> bool:
        """Answers one message, where there is one."""
        found = self._fleet.pull()
        if found is None:
            return False
        try:
            if found.is_longer_than(self._most_bytes):
                raise RunEndedError("a message of this run is longer than trainer.largest_message_mb in site.toml")
            self._answer(found)
        except RunEndedError as error:
            logging.getLogger("silotune").info("run %s: %s", found.run_id, error)
        except FederationError:
            raise
        except Exception as error:  # noqa: BLE001  # Flower's own errors over parts that a coordinator chose
            logging.getLogger("silotune").warning("a message cannot be read: %s", type(error).__name__)
        return True

    def _answer(self, found: Announced) -> None:
        began = time.monotonic()
        message = self._fleet.fetch(found)
        if self._is_ours(found.run_id):
            reply = self._fleet.answer(message, self._app)
        else:
            reply = refusal(message, OTHER_BUNDLE)
        logging.getLogger("silotune").info("run %s: %s of round %s answered", found.run_id, found.kind, found.group)
        self._fleet.push(reply, time.monotonic() - began)

    def _is_ours(self, run_id: int) -> bool:
        """Whether a run's bundle is byte for byte the one that this silotune makes."""
        if run_id not in self._allowed:
            named, content = self._fleet.bundle_of(run_id)
            self._allowed[run_id] = named == bundle_hash() == hashlib.sha256(content).hexdigest()
            self._allowed[run_id] = self._allowed[run_id] and content == bundle()
        return self._allowed[run_id]


def run_node(kit: Kit, stopped: list[int]) -> None:
    """Connects, and answers messages until told to stop; a lost connection is tried again.

    Raises:
        FederationError: The coordinator refuses this node, or the coordinator's certificate is not valid.
    """
    settings, folder = site_settings(kit), site_folder(kit)
    where = settings.coordinator
    address = Address(where.host, where.fleet_port, kit.path(AUTHORITY))
    fleet = Fleet(address, read_node_key(kit.path(AUTH_KEY)))
    answer = partial(work, trainer_socket(kit))
    losses = 0
    try:
        while not stopped:
            try:
                _sign_on(fleet, folder)
                losses = 0
                node = _Node(fleet, answer, most_bytes=settings.trainer.largest_message_mb << 20)
                _serve(node, fleet, folder, stopped)
            except LostConnectionError as error:
                _note(folder, {"status": "waiting", "reason": str(error)})
                _pause(min(LONGEST_REST_SECONDS, POLL_SECONDS * 2 ** min(losses, 10)), stopped)
                losses += 1
    finally:
        fleet.close()


def _sign_on(fleet: Fleet, folder: Path) -> None:
    before = folder / "node.json"
    known = json.loads(before.read_text(encoding="utf-8")).get("node_id", 0) if before.is_file() else 0
    node_id = fleet.activate(known)
    _note(folder, {"status": "connected", "node_id": node_id, "coordinator": fleet.place, "since": time.time()})


def _serve(node: _Node, fleet: Fleet, folder: Path, stopped: list[int]) -> None:
    quiet_since = time.monotonic()
    with beating(fleet) as forgotten:
        while not stopped:
            if forgotten.is_set():
                raise LostConnectionError(f"{fleet.place} no longer knows this node")
            if node.once():
                quiet_since = time.monotonic()
                continue
            _pause(POLL_SECONDS if time.monotonic() - quiet_since < 60 else REST_SECONDS, stopped)
    fleet.deactivate(int(fleet.node.node_id))
    _note(folder, {"status": "stopped"})


def _note(folder: Path, state: Mapping[str, Any]) -> None:
    """Writes the node's state, with its id even where it is not connected."""
    path = folder / "node.json"
    known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    said = {"node_id": known.get("node_id", 0), "process": os.getpid(), **state}
    if {**known, **said} != known:
        logging.getLogger("silotune").info(" ".join(f"{key}={value}" for key, value in state.items()))
    try:
        write_json(path, said)
    except RunFolderError as error:  # a full disk must not end the node: its state is only for 'site status'
        logging.getLogger("silotune").warning("%s", error)


def _pause(seconds: float, stopped: list[int]) -> None:
    if not stopped:
        time.sleep(seconds)


def main() -> None:
    """Runs until told to stop; a refusal is printed in one line."""
    follow_parent()
    log_to_stdout()
    kit = read_kit(Path(sys.argv[1]))
    with told_to_stop() as stopped:
        try:
            run_node(kit, stopped)
        except SilotuneError as error:
            _note(site_folder(kit), {"status": "refused", "reason": str(error)})
            logging.getLogger("silotune").error("%s", error)
            sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
