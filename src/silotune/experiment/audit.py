"""A run's audit trail: opened, closed, and verified with what the run folder holds beside it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from silotune.config import Config
from silotune.errors import AuditError, RunFolderError, SilotuneError
from silotune.experiment.needs import config_of
from silotune.federation.coordinator.audit import Audit
from silotune.federation.coordinator.course import check_rounds, updates_of, verify_trail
from silotune.federation.coordinator.replay import replayed
from silotune.record import checkpoints
from silotune.record.audit import COORDINATOR, FILE, KEY_FILE, PUBLIC_FILE, Trail
from silotune.record.chain import Entry, Verified, check_own, check_witness, read_chain
from silotune.record.files import explained, write_bytes
from silotune.record.manifest import MANIFEST, Coverage, check_manifest
from silotune.record.plain_json import sha256
from silotune.record.runs import RunFolder
from silotune.record.signatures import new_key, private_bytes, read_key, write_secret
from silotune.settings.sections import RecordSection
from silotune.structs import ServerState
from silotune.tensors import digest

_ODD = (KeyError, TypeError, ValueError, AttributeError, IndexError, ArithmeticError, RecursionError, OSError)
"""Exceptions that reading a maliciously written file can raise: whoever has the key can sign anything."""


@dataclass(frozen=True)
class Checked:
    """What ``verify_run`` found in order.

    Attributes:
        chain: The verified chain.
        witnesses: Site -> heads of this chain that its own trail holds.
        rounds: Rounds whose updates were kept and aggregate to what the chain says.
        has_adapter: The saved adapter is the one that the chain ends with.
        coverage: Which files of the run folder the verdict is about, and which it is not.
        uncountersigned: Sites with keys that have not signed the end of the chain.
    """

    chain: Verified
    witnesses: Mapping[str, int]
    rounds: int
    has_adapter: bool
    coverage: Coverage
    uncountersigned: tuple[str, ...] = ()

    @property
    def site(self) -> str:
        """The site whose own trail this is; empty if it is a run's trail."""
        first = self.chain.entries[0].actor if self.chain.entries else COORDINATOR
        return "" if first == COORDINATOR else first


def can_go_on(folder: RunFolder, record: RecordSection) -> bool:
    """Whether the key that signs a part's trail is there: a key made for the run is removed when the run has ended."""
    return record.audit_key is not None or (folder.path / KEY_FILE).exists()


def open_audit(folder: RunFolder, record: RecordSection, *, keep_models: bool = False) -> Audit:
    """The trail of a part of a run, new or continued.

    Raises:
        SignatureError: ``record.audit_key`` is not a key.
        AuditError: The trail that is there does not hold, was begun under another key, or its key is gone.
    """
    own, place = folder.path / KEY_FILE, folder.path / FILE
    if not can_go_on(folder, record):
        if place.exists():
            raise AuditError(f"{str(place)!r} cannot be continued: its key {KEY_FILE} is gone; begin a new run")
        write_secret(own, private_bytes(new_key()))
    key = read_key(record.audit_key or own)
    trail = Trail(place, key, actor=COORDINATOR)
    if trail.entries:
        try:
            entries = read_chain(place, first=trail.entries)
            check_own(entries, key.public)
            check_rounds(entries)
        except AuditError as error:
            raise AuditError(f"{str(place)!r} cannot be continued: {error}") from None
    write_bytes(folder.path / PUBLIC_FILE, f"{key.public}\n".encode())
    return Audit(trail, folder, keep_updates=record.keep_updates, keep_models=keep_models)


def check_goes_on(audit: Audit, state: ServerState) -> None:
    """Refuses to go on from a checkpoint that the trail does not vouch for.

    Args:
        audit: The trail of the run, with nothing of this session in it.
        state: Of the newest checkpoint; the first one where there is none.

    Raises:
        RunFolderError: The checkpoint is another one than was written, or the trail that vouched for it is gone.
    """
    folder = audit.run.path
    place = checkpoints.newest(folder)
    entries = read_chain(folder / FILE, first=audit.trail.entries) if audit.trail.entries else []
    advice = "put back both as they were, or begin a new run"
    if not entries:
        if place is not None:
            raise RunFolderError(f"{str(place)!r} is vouched for by no audit trail: {FILE} is gone or empty; {advice}")
        return
    if place is not None:
        saved = {"round": state.round_number, "sha256": checkpoints.sha256_of(place)}
        if not any(entry.event == "checkpoint" and dict(entry.fields) == saved for entry in entries):
            raise RunFolderError(f"{str(place)!r} is not one that the audit trail {FILE} vouches for; {advice}")
    if check_rounds(entries).get(state.round_number) != digest(state.weights):
        raise RunFolderError(
            f"{str(folder)!r}: the model to go on from is not the one that {FILE} names after round "
            f"{state.round_number}; {advice}"
        )


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
    is_uncountersigned_allowed: bool = False,
) -> Checked:
    """Verifies a trail, then what stands beside it: all files of the run, kept updates, and sites' own trails.

    Args:
        path: A run folder, a part of one, or a site's state folder.
        keys: Actor -> the public keys it may sign with; None as for ``verify_trail``.
        sites: Sites' own trails, to compare the heads that they saw.
        is_open_allowed: Accept a trail that was not closed: then no more than it names is compared, that is the newest
            checkpoint, and the result and the adapter where they are there.
        is_uncountersigned_allowed: Accept that sites with keys have not signed the end of a closed trail.

    Raises:
        AuditError: Something does not fit; the message names the file, and the first bad entry of a trail.
    """
    place = trail_of(path)
    with _about(place):
        is_of_site = _is_of_site(place)
        chain = verify_trail(place, keys=keys, is_open_allowed=is_open_allowed or is_of_site)
    witnesses = {}
    for site in sites:
        own_place = trail_of(site)
        with _about(own_place):
            own = verify_trail(own_place, keys=keys, is_open_allowed=True)
            who = own.entries[0].actor if own.entries else ""
            witnesses[who] = check_witness(chain.entries, own.entries, has_countersigned=who in chain.countersigned)
            if who in chain.keys and not set(own.keys[who]) & set(chain.keys[who]):
                raise AuditError(f"it is signed with another key than the replies of {who!r} in this run")
    folder, is_run = RunFolder(place.parent), bool(chain.entries) and chain.entries[0].actor == COORDINATOR
    last = next((entry for entry in reversed(chain.entries) if entry.event == "result"), None) if is_run else None
    with _about(place):
        coverage = _sealed(place, chain) if chain.is_closed else Coverage(_vouched(folder, chain.entries))
        has_adapter = last is not None and _check_result(folder, last, is_required=chain.is_closed)
        rounds = _check_updates(folder, chain.entries, last) if is_run else 0
    if chain.uncountersigned and not is_uncountersigned_allowed:
        raise AuditError(
            f"countersignatures missing: {', '.join(chain.uncountersigned)}: each was asked to, none has signed the "
            "end of the trail; a site that was away at the end is accepted with --uncountersigned"
        )
    if not chain.is_closed and has_adapter:
        coverage = Coverage((*coverage.covered, "result.json", "adapter/adapter_model.safetensors"))
    return Checked(chain, witnesses, rounds, has_adapter, coverage, chain.uncountersigned)


@contextmanager
def _about(trail: Path) -> Iterator[None]:
    """Names the trail in every error, and turns whatever a file can do to its reader into an ``AuditError``."""
    name = "/".join(trail.absolute().parts[-2:])
    try:
        yield
    except SilotuneError as error:
        raise AuditError(f"{name}: {error}") from None
    except _ODD as error:
        raise AuditError(
            f"{name}: it, or a file that it names, is not what a run writes ({type(error).__name__})"
        ) from None


def _is_of_site(trail: Path) -> bool:
    """Whether it is a site's own, which holds all its runs and so is never closed.

    Raises:
        AuditError: It is a link, or lies in the place of a run's.
    """
    if trail.is_symlink():
        raise AuditError("it is a link, and links are not followed: give the folder that holds the trail itself")
    first = next(iter(read_chain(trail)), None)
    if first is None or first.actor == COORDINATOR:
        return False
    around = (trail.absolute().parent, trail.absolute().parent.parent)
    if any((folder / name).exists() for folder in around for name in (MANIFEST, "config.json")):
        raise AuditError(f"it is the trail of {first.actor!r}, in a run folder: the run's own is missing")
    return True


def _sealed(trail: Path, chain: Verified) -> Coverage:
    """Compares all files of a run with the manifest that its trail was closed over."""
    last = chain.entries[-1]
    place = Path(str(last.fields["trail"]))
    absolute = trail.absolute()
    root = absolute.parents[len(place.parts) - 1]
    if absolute.relative_to(root) != place:
        raise AuditError(f"entry {last.index}: the trail was closed as {place.as_posix()!r} of its run folder")
    return check_manifest(root, str(last.fields["manifest"]), trail=place.as_posix())


def _vouched(folder: RunFolder, entries: Sequence[Entry]) -> tuple[str, ...]:
    """The newest checkpoint of a run that has not ended, once the trail was found to vouch for it."""
    place = checkpoints.newest(folder.path)
    if place is None:
        return ()
    saved = checkpoints.sha256_of(place)
    if not any(entry.event == "checkpoint" and entry.fields["sha256"] == saved for entry in entries):
        raise AuditError(f"{place.name} is not one that the trail vouches for")
    return tuple(f"{place.name}/{name}" for name in checkpoints.FILES)


def _check_result(folder: RunFolder, last: Entry, *, is_required: bool) -> bool:
    """Whether result and adapter are there, and are those that the trail names."""
    if not folder.has("result") and not is_required:
        return False
    if sha256(folder.read_json("result")) != last.fields["result"]:
        raise AuditError(f"entry {last.index}: result.json is not the one that was signed")
    if digest(folder.load_adapter()[0]) != last.fields["adapter"]:
        raise AuditError(f"entry {last.index}: adapter/ is not the one that was signed")
    return True


def _check_updates(folder: RunFolder, entries: Sequence[Entry], last: Entry | None) -> int:
    """Aggregates the kept updates again; 0 where none were kept, or only their protected sum was seen."""
    rounds = list(updates_of(entries))
    kept = [bool(replies) and all(reply.fields.get("file") for reply in replies) for _, replies in rounds]
    if not kept or not all(kept):
        return 0
    config = _config_of(folder)
    return replayed(folder, rounds, federation=config.federation, training=config.training, seed=config.seed, last=last)


def _config_of(folder: RunFolder) -> Config:
    for place in (folder.path, folder.path.parent):
        if (place / "config.json").is_file():
            return config_of(RunFolder(place))
    raise AuditError(f"{str(folder.path)!r} holds kept updates and no config.json to aggregate them by")
