"""A run's audit trail: opened, closed, and verified with what the run folder holds beside it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from silotune.config import Config, from_mapping
from silotune.errors import AuditError
from silotune.federation.replay import replayed
from silotune.federation.witness import Audit, close
from silotune.record.audit import COORDINATOR, FILE, KEY_FILE, PUBLIC_FILE, Trail
from silotune.record.canonical import sha256
from silotune.record.chain import Entry, Verified, check_witness, updates_of, verify_chain
from silotune.record.files import explained, write_bytes
from silotune.record.runs import RunFolder
from silotune.record.signatures import new_key, private_bytes, read_key, write_secret
from silotune.sections import RecordSection
from silotune.structs import Tensors
from silotune.tensors import digest


@dataclass(frozen=True)
class Checked:
    """What ``verify_run`` found in order.

    Attributes:
        chain: The verified chain.
        witnesses: Site -> heads of this chain that its own trail holds.
        rounds: Rounds whose updates were kept and aggregate to what the chain says.
        has_adapter: The saved adapter is the one that the chain ends with.
    """

    chain: Verified
    witnesses: Mapping[str, int]
    rounds: int
    has_adapter: bool


def open_audit(folder: RunFolder, record: RecordSection) -> Audit:
    """The trail of a part of a run, new or continued.

    Raises:
        SignatureError: ``record.audit_key`` is not a key.
        AuditError: The trail that is there does not end with an entry.
    """
    own = folder.path / KEY_FILE
    if record.audit_key is not None:
        key = read_key(record.audit_key)
    elif own.exists():
        key = read_key(own)
    else:
        key = new_key()
        write_secret(own, private_bytes(key))
    write_bytes(folder.path / PUBLIC_FILE, f"{key.public}\n".encode())
    return Audit(Trail(folder.path / FILE, key, actor=COORDINATOR), folder, keep_updates=record.keep_updates)


def close_audit(
    audit: Audit, folder: RunFolder, *, weights: Tensors, adapter: Tensors, result: Mapping[str, Any]
) -> dict[str, Any]:
    """Ends the trail; what it returns stands in the result, so that a later change of the trail shows."""
    head = close(audit, round_number=result["round"], weights=weights, adapter=adapter, result=result)
    key = (folder.path / PUBLIC_FILE).read_text(encoding="utf-8").strip()
    return {"entries": head.entries, "head": head.hash, "key": key}


def forget_key(folder: RunFolder) -> None:
    """Removes the key that was made for the run: nobody can sign another trail with it afterwards."""
    with explained(folder.path):
        (folder.path / KEY_FILE).unlink(missing_ok=True)


def trail_of(path: Path) -> Path:
    """The chain in a run folder, in a part of one, or in a site's own folder.

    Raises:
        AuditError: There is none.
    """
    places = (path, path / FILE, path / "federated" / FILE)
    for place in places:
        if place.is_file():
            return place
    raise AuditError(f"{str(path)!r} holds no audit trail ({FILE}): give a run folder or a site's state folder")


def verify_run(
    path: Path,
    *,
    keys: Mapping[str, Sequence[str]] | None = None,
    sites: Iterable[Path] = (),
    is_open_allowed: bool = False,
) -> Checked:
    """Verifies a trail, then what stands beside it: the result, the adapter, kept updates, and sites' own trails.

    Args:
        path: A run folder, a part of one, or a site's state folder.
        keys: Actor -> the public keys it may sign with; None as for ``verify_chain``.
        sites: Sites' own trails, to compare the heads that they saw.
        is_open_allowed: Accept a trail that was not closed.

    Raises:
        AuditError: Something does not fit; the message names the first bad entry.
    """
    place = trail_of(path)
    chain = verify_chain(place, keys=keys, is_open_allowed=is_open_allowed)
    witnesses = {}
    for site in sites:
        own = verify_chain(trail_of(site), keys=keys, is_open_allowed=True)
        if own.entries:
            witnesses[own.entries[0].actor] = check_witness(chain.entries, own.entries)
    folder = RunFolder(place.parent)
    last = next((entry for entry in reversed(chain.entries) if entry.event == "result"), None)
    has_adapter = last is not None and _check_result(folder, last, chain)
    return Checked(chain, witnesses, _check_updates(folder, chain.entries, last), has_adapter)


def _check_result(folder: RunFolder, last: Entry, chain: Verified) -> bool:
    if not folder.has("result"):
        return False
    result = folder.read_json("result")
    said = result.pop("audit", None)
    if sha256(result) != last.fields.get("result"):
        raise AuditError(f"entry {last.index}: result.json is not the one that was signed")
    if said and (said["entries"], said["head"]) != (len(chain.entries), chain.head):
        raise AuditError(f"entry {len(chain.entries)} is missing: result.json knows {said['entries']} entries")
    if digest(folder.load_adapter()[0]) != last.fields.get("adapter"):
        raise AuditError(f"entry {last.index}: adapter/ is not the one that was signed")
    return True


def _check_updates(folder: RunFolder, entries: Sequence[Entry], last: Entry | None) -> int:
    """Aggregates the kept updates again; 0 where none were kept, or only their protected sum was seen."""
    rounds = list(updates_of(entries))
    kept = [bool(replies) and all(reply.fields.get("file") for reply in replies) for _, replies in rounds]
    if not kept or not all(kept):
        return 0
    config = _config_of(folder)
    return replayed(folder, rounds, federation=config.federation, seed=config.seed, last=last)


def _config_of(folder: RunFolder) -> Config:
    for place in (folder.path, folder.path.parent):
        if (place / "config.json").is_file():
            return from_mapping(RunFolder(place).read_json("config"), source=f"{place}/config.json")
    raise AuditError(f"{str(folder.path)!r} holds kept updates and no config.json to aggregate them by")
