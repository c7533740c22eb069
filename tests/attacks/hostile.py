"""A hostile coordinator: it speaks the protocol with its own code, against a site as it is provisioned and deployed.

``House`` is one site: a kit, its own file of examples, and the real trainer host over them. ``Coordinator`` holds the
coordinator's key, and may hold the submitter's, as a researcher who means no good does. A new attack is a function of
both that makes one message, and a line in the table of ``moves.py``.
"""

from __future__ import annotations

import base64
import json
import os
import struct
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import load_ssh_private_key
from safetensors.torch import save

import kits
from silotune.config import Config, from_mapping
from silotune.deploy.kits import read_kit, site_folder
from silotune.deploy.trainer import equip, guard_of, holdings_of
from silotune.experiment.site import Resident, SiteDesk, setup_of
from silotune.federation.coordinator.course import verify_trail
from silotune.federation.kinds import KINDS, steps_of
from silotune.record.chain import read_chain
from silotune.record.plain_json import sha256
from silotune.transports.frames import Frame
from silotune.transports.trainer_host import TrainerHost

SECRET = "Mrs Agatha Harkness of 12 Ely Place"
"""Stands in the site's examples, its folders' names and its own paths, and must stand in nothing that leaves it."""
SITE, OTHERS = "clinic", ("bank-b", "bank-c", "bank-d")
OWN_ROUND = 1


def configuration(model: Path, **sections: Any) -> Config:
    """A run of four sites over the tiny model; sections are updated by keyword."""
    made: dict[str, Any] = {
        "model": {"name": str(model), "max_length": 128},
        "adapter": {"rank": 2, "alpha": 4},
        "training": {"batch_size": 4, "max_steps": 1, "learning_rate": 0.01, "objective": "choice", "threads": 1},
        "federation": {"rounds": 4},
        "evaluation": {"per_client": True},
    }
    for name, values in sections.items():
        made[name] = {**made.get(name, {}), **values}
    return from_mapping(made)


class House:
    """One site below a folder, with examples of its own that hold a secret.

    Args:
        folder: Empty or new.
        model: Folder of the base model.
        policy: Lines of ``policy.toml``; the submitters of the kit stay.
    """

    def __init__(self, folder: Path, model: Path, *, policy: str = "") -> None:
        self.folder = kits.make(folder / SECRET.replace(" ", "-"), (SITE, *OTHERS))
        self.place, self.resident = self.folder / SITE, Resident()
        self.private = self.folder / "private"
        self.private.mkdir()
        labels = ("negative", "neutral", "positive")
        rows = [{"text": f"{SECRET} {number}", "label": labels[number % 3], "sector": SECRET} for number in range(12)]
        self.examples = self.private / "train.jsonl"
        self.examples.write_text("".join(json.dumps(row) + "\n" for row in rows))
        settings = self.place / "site.toml"
        text = settings.read_text().replace('path = "nano"', f"path = {json.dumps(str(model))}")
        text = text.replace("# task = ", "task = ").replace(
            '# train = "/path/to/train.jsonl"', f"train = {json.dumps(str(self.examples))}"
        )
        settings.write_text(text)
        kept = [line for line in (self.place / "policy.toml").read_text().splitlines() if "submitters" in line]
        (self.place / "policy.toml").write_text("\n".join([*kept, policy, ""]))
        self.watch = Watch((str(self.place), str(self.examples), str(model)))
        self.host = self.restarted()

    def restarted(self) -> TrainerHost:
        """The site's trainer as it starts: it remembers what is on the disk."""
        kit = read_kit(self.place)
        site_folder(kit).mkdir(mode=0o700, exist_ok=True)
        holdings = holdings_of(kit)
        guard = guard_of(kit, holdings)
        desk = SiteDesk(holdings, partial(equip, kit, guard), resident=self.resident)
        self.host = TrainerHost(desk, site_folder(kit) / "rounds", guard=guard)
        return self.host

    def asked(self, message: bytes, *, setup: bytes, run: str) -> Frame:
        """What the trainer answers, which its node would send to the coordinator as it is."""
        header = {"verb": "work", "job": run, "setup_bytes": len(setup)}
        self.watch.is_on = True
        try:
            return self.host.answer(Frame(header, setup + message))
        finally:
            self.watch.is_on = False

    def trail(self) -> list[Any]:
        """The site's own audit trail, which verifies whatever was asked."""
        verify_trail(self.place / "state" / "audit.jsonl", is_open_allowed=True)
        return read_chain(self.place / "state" / "audit.jsonl")

    def states(self) -> list[str]:
        """What lies below the site's state folder."""
        root = self.place / "state"
        return sorted(str(path.relative_to(root)) for path in root.rglob("*"))


def _signed(key: Ed25519PrivateKey, purpose: str, content: bytes) -> str:
    return base64.b64encode(key.sign(b"silotune-v1:" + purpose.encode() + b"\x00" + content)).decode()


def canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def key_of(path: Path) -> Ed25519PrivateKey:
    key = load_ssh_private_key(path.read_bytes(), None)
    assert isinstance(key, Ed25519PrivateKey)
    return key


@dataclass
class Coordinator:
    """Whoever holds the coordinator's kit, and the submitter's where it signs its own jobs.

    Attributes:
        house: The site that is attacked.
        config: Of the run that is asked for.
        run: Its name.
        number: The job's own.
    """

    house: House
    config: Config
    run: str = "demo"
    number: str = "a" * 32
    changes: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.key = key_of(self.house.folder / "coordinator" / "signing.key")
        self.submitter = key_of(self.house.folder / "researcher" / "signing.key")
        self.setup = setup_of(self.config)

    # --- what is signed ---

    def head(self, key: Ed25519PrivateKey | None = None) -> str:
        said = f"3:{'0' * 64}"
        return f"{said}:{_signed(key or self.key, 'head', said.encode())}"

    def job(self, *, key: Ed25519PrivateKey | None = None, name: str | None = None, **changes: Any) -> dict[str, Any]:
        """A signed job of the run, some of its values changed before it is signed."""
        made = {
            "id": self.number,
            "run": self.run,
            "config_sha256": "0" * 64,
            "task": self.config.data.task,
            "participants": [SITE, *OTHERS],
            "rounds": self.config.federation.rounds,
            "kinds": list(kinds_of(self.config)),
            "charter_sha256": None,
            "expires": (datetime.now(UTC) + timedelta(hours=1)).isoformat().replace("+00:00", "Z"),
            **self.changes,
            **changes,
        }
        if "setup_sha256" not in made:
            made["setup_sha256"] = sha256(self.setup)
        signer = key or self.submitter
        public = name or (self.house.folder / "researcher" / "signing.pub").read_text().strip()
        return {"job": made, "submitter": public, "signature": _signed(signer, "job", canonical(made))}

    def order(self, *, setup: str | None = None) -> dict[str, Any]:
        """The order to train or to score, which names the setup by its hash."""
        named = sha256(self.setup) if setup is None else setup
        return {"setup": named, "run": f"{self.number}/federated", "seed": self.config.seed}

    # --- what is sent ---

    def model(self, scale: float = 1.0) -> dict[str, torch.Tensor]:
        """The adapter's tensors as the site expects them, at a scale of one's choice."""
        adapted = self.house.resident.adapted
        if adapted is None:
            self.send(self.request("countersign", tensors={}, body={"job": self.job()}))  # opens the run
        return {name: tensor * scale for name, tensor in self.house.resident.initial.items()}

    def body(self, kind: str = "train", **changes: Any) -> dict[str, Any]:
        """The body of an honest request of this kind, changed after it was signed."""
        made = self.order() if kind in KINDS and KINDS[kind].uses_examples else {}
        return {**made, "job": self.job(), **changes}

    def request(self, kind: str = "train", **changes: Any) -> bytes:
        """A message of this kind; ``tensors`` and any field of its header may be given."""
        tensors = changes.pop("tensors", None)
        fields = {
            "type": "request",
            "kind": kind,
            "round": OWN_ROUND,
            "client": SITE,
            "body": self.body(kind) if "body" not in changes else None,
            "head": self.head(),
            **changes,
        }
        payload = save(self.model() if tensors is None else tensors)
        return packed(json.dumps(fields).encode(), payload)

    def send(self, message: bytes, *, setup: bytes | None = None, run: str | None = None) -> Frame:
        """Asks the site."""
        document = json.dumps(self.setup).encode() if setup is None else setup
        return self.house.asked(message, setup=document, run=self.run if run is None else run)


def kinds_of(config: Config) -> tuple[str, ...]:
    """The kinds of requests that a run needs, whatever its settings are."""
    scores = ("evaluate",) if config.evaluation.per_client else ()
    return (*steps_of(config.privacy.protection), *scores, "countersign")


def packed(header: bytes, payload: bytes) -> bytes:
    """A message from its header as JSON and its tensors."""
    return b"ST01" + struct.pack("<I", len(header)) + header + payload


# --- what a site may touch -------------------------------------------------------------------------------------------

_TOUCHES = ("open", "os.listdir", "os.scandir", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree")


class Watch:
    """Every path that this process opens, lists or changes while it is on and that is not allowed.

    Args:
        allowed: Roots of what may be touched.
    """

    def __init__(self, allowed: Iterable[str]) -> None:
        system = ("/proc", "/sys", "/dev", "/usr", "/lib", "/etc/localtime")
        roots = (*allowed, *sys.path, sys.prefix, sys.base_prefix, *system)
        self._roots = tuple(root.rstrip("/") for root in roots if root)
        self.seen: list[str] = []
        self.is_on = False
        sys.addaudithook(self._look)  # for as long as the process lives: Python has no way to take it away

    def _look(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.is_on or event not in _TOUCHES or not isinstance(arguments[0], (str, bytes, os.PathLike)):
            return
        path = os.path.abspath(os.fsdecode(arguments[0]))  # noqa: PTH100  # resolving would open more
        if not any(path == root or path.startswith(f"{root}/") for root in self._roots):
            self.seen.append(f"{event} {path}")


def leaks(frame: Frame) -> list[str]:
    """Words of the site's own that stand in an answer of failure."""
    text = json.dumps(dict(frame.header)) + frame.payload.decode("latin-1")
    words = [SECRET, "Agatha", "train.jsonl", "private", "/tmp", "clinic/state", ".jsonl"]
    return [word for word in words if word in text]


def outcome(frame: Frame) -> str:
    """``reply``, or the code of the refusal or failure."""
    header: Mapping[str, Any] = frame.header
    return "reply" if header["status"] == "reply" else str(header["reason"])
