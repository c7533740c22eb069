"""Kits of a federation on 127.0.0.1, provisioned and unpacked, for tests that start real processes."""

from __future__ import annotations

import socket
import tarfile
from collections.abc import Sequence
from pathlib import Path

from silotune.deploy.kits import unpack as unpack_kit
from silotune.deploy.provision import provision


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def make(folder: Path, sites: Sequence[str], *, plan: str = "") -> Path:
    """``folder/coordinator``, ``folder/researcher`` (who submits) and ``folder/<site>``, all on one free port.

    ``folder/office`` holds the authority.

    ``plan`` is put into ``federation.toml``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    place = folder / "federation.toml"
    lines = ['name = "test"', plan, "[coordinator]", 'host = "127.0.0.1"', f"fleet_port = {free_port()}"]
    place.write_text("\n".join([*lines, *(f"[sites.{name}]" for name in sites)]), encoding="utf-8")
    for kit in provision(place, folder / "office"):
        unpack(kit.path, folder / kit.name)
    settings = folder / "coordinator" / "coordinator.toml"
    text = settings.read_text(encoding="utf-8").replace('listen = "0.0.0.0"', 'listen = "127.0.0.1"')
    settings.write_text(text, encoding="utf-8")
    return folder


def unpack(kit: Path, place: Path) -> None:
    unpack_kit(kit, place.parent)
    with tarfile.open(kit) as archive:
        (place.parent / archive.getnames()[0].partition("/")[0]).rename(place)
