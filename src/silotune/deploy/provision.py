"""Provisions a federation: an authority, one kit per site and one for the coordinator; later adds, revokes, rotates.

The folder holds ``federation.toml``, ``members.json``, ``authority/`` (whose keys sign everything: keep it offline) and
``kits/``. Private keys of a site or of the coordinator are written into their own kit and nowhere else. The key of
encrypted sums, where the plan asks for it, is shared by all sites, and stays in ``authority/`` for sites that are
added later.
"""

from __future__ import annotations

import hashlib
import io
import tarfile
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from silotune.deploy import kits
from silotune.deploy.certificates import Pair, new_authority, new_node_key, new_server, read_request, signing_request
from silotune.deploy.kit_texts import (
    coordinator_readme,
    coordinator_toml,
    policy_toml,
    service_files,
    site_readme,
    site_toml,
    submitter_readme,
    submitter_toml,
)
from silotune.deploy.kits import FederationPlan, Member, Members, SignedMembers, SitePlan, Submitter
from silotune.errors import KitError
from silotune.privacy.encryption import new_key as new_he_key
from silotune.record.files import explained, write_bytes, write_json
from silotune.record.plain_json import canonical
from silotune.record.signatures import SigningKey, new_key, private_bytes, read_key, read_secret, write_secret

_AUTHORITY, _KITS, _PLAN = "authority", "kits", "federation.toml"
_CA_KEY, _SIGNING_KEY = "ca.key", "signing.key"


@dataclass(frozen=True)
class MadeKit:
    """A kit that was written: for whom, where, and its hash, to compare over the telephone."""

    name: str
    path: Path
    sha256: str


@dataclass(frozen=True)
class _Office:
    """A folder of provisioning, opened: the plan, the authority's keys, the members so far."""

    folder: Path
    plan: FederationPlan
    authority: Pair
    key: SigningKey
    members: Members | None


def provision(plan_file: Path, out: Path, *, requests: Iterable[Path] = ()) -> list[MadeKit]:
    """Makes everything that a federation begins with.

    Args:
        plan_file: ``federation.toml``.
        out: A folder to make.
        requests: Requests of sites that made their own keys; their kits hold no private key.

    Raises:
        KitError: The folder is not empty, or a request comes from a site that is not in the plan.
        ConfigError: The plan holds faults.
    """
    plan = kits.read_plan(plan_file)
    with explained(out):
        if out.exists() and any(out.iterdir()):
            raise KitError(f"{str(out)!r} is not empty: give a new folder, or use provision add, revoke or rotate")
    asked = {request.name: request for request in map(_request, requests)}
    strangers = sorted(asked.keys() - plan.sites.keys())
    if strangers:
        raise KitError(
            f"a request comes from {strangers[0]!r}, which is not a site of the plan: {', '.join(plan.sites)}"
        )
    charter = _charter_of(plan, plan_file)
    he_key = new_he_key() if plan.he else None
    office = _found(plan, plan_file, out)
    if he_key is not None:
        write_secret(out / _AUTHORITY / kits.HE_KEY, he_key)
    if charter is not None:
        write_bytes(out / kits.CHARTER, charter)
    coordinator = new_key()
    sites = {name: _keys_of(name, asked.get(name), entry) for name, entry in plan.sites.items()}
    keys = {name: new_key() for name in plan.submitters}
    members = Members(
        federation=plan.name,
        version=1,
        coordinator=(coordinator.public,),
        members=tuple(site.member for site in sites.values()),
        submitters=tuple(_submitter(name, key, plan.submitters[name].contact) for name, key in keys.items()),
    )
    signed = _write_members(office, members)
    written = [_coordinator_kit(office, coordinator, signed)]
    written += [_submitter_kit(office, name, key, signed) for name, key in keys.items()]
    return written + [_site_kit(office, site, members, signed) for site in sites.values()]


def add_site(folder: Path, name: str, *, contact: str = "", request: Path | None = None) -> MadeKit:
    """Adds a site; the new list of members goes to the coordinator and the other sites.

    Raises:
        KitError: There is such a site already, or the request is of another one.
    """
    office, members = _open(folder)
    if kits.site_name(name) in members.active():
        raise KitError(f"{name!r} is a site already: rotate gives it new keys")
    _check_free(members, name)
    return _new_keys(office, members, name, entry=SitePlan(contact=contact), request=request)


def add_submitter(folder: Path, name: str, *, contact: str = "") -> MadeKit:
    """Adds a submitter, or gives an existing one a new key; what the old key signed stays verifiable.

    A site's policy lists the keys that it allows under ``submitters``: each site must add the new key by hand.

    Raises:
        KitError: There is a site of this name.
    """
    office, members = _open(folder)
    if kits.site_name(name) in members.active():
        raise KitError(f"{name!r} is a site: give the submitter another name")
    kept, key = _submitters_ended(members, name, "rotated"), new_key()
    made = _next(kept.model_copy(update={"submitters": (*kept.submitters, _submitter(name, key, contact))}))
    return _submitter_kit(office, name, key, _write_members(office, made))


def _check_free(members: Members, name: str) -> None:
    if name in members.active_submitters():
        raise KitError(f"{name!r} is a submitter: give the site another name")


def rotate_site(folder: Path, name: str, *, request: Path | None = None) -> MadeKit:
    """Gives a site new keys; the old ones stay in the list, so that what they signed stays verifiable.

    Raises:
        KitError: There is no such site, it is a submitter, or the request is of another one.
    """
    office, members = _open(folder)
    if name in members.active_submitters():
        raise KitError(f"{name!r} is a submitter: 'silotune provision submitter {name}' gives it a new key")
    old = _active(members, name)
    kept = _ended(members, name, "rotated")
    return _new_keys(office, kept, name, entry=SitePlan(contact=old.contact), request=request)


def revoke(folder: Path, name: str) -> Members:
    """Removes a site or a submitter: whoever has the new list of members refuses it.

    Raises:
        KitError: There is no such member.
    """
    office, members = _open(folder)
    if name in members.active_submitters():
        made = _next(_submitters_ended(members, name, "revoked"))
    else:
        _active(members, name)
        made = _next(_ended(members, name, "revoked"))
    _write_members(office, made)
    return made


def rotate_coordinator(folder: Path) -> MadeKit:
    """Gives the coordinator a new signing key, server key and certificate, for instance before the old one expires."""
    office, members = _open(folder)
    key = new_key()
    made = _next(members.model_copy(update={"coordinator": (*members.coordinator, key.public)}))
    return _coordinator_kit(office, key, _write_members(office, made))


def make_request(name: str, out: Path) -> Path:
    """Makes a site's keys, at the site, where they stay, and the request to send to whoever provisions."""
    checked = kits.site_name(name)
    node, pair = new_node_key()
    signing = new_key()
    write_secret(out / kits.AUTH_KEY, pair.private)
    write_secret(out / kits.SIGNING_KEY, private_bytes(signing))
    write_bytes(out / kits.AUTH_PUBLIC, pair.public + b"\n")
    write_bytes(out / kits.SIGNING_PUBLIC, f"{signing.public}\n".encode())
    place = out / f"{checked}.csr"
    write_bytes(place, signing_request(checked, node, signing))
    return place


@dataclass(frozen=True)
class _Request:
    name: str
    auth_public: str
    signing_public: str


@dataclass(frozen=True)
class _SiteKeys:
    """A site's entry in the list of members, and its private keys where they were made here."""

    member: Member
    secrets: Mapping[str, bytes]


def _request(path: Path) -> _Request:
    with explained(path):
        content = path.read_bytes()
    return _Request(*read_request(content, source=str(path)))


def _keys_of(name: str, request: _Request | None, entry: SitePlan) -> _SiteKeys:
    since = datetime.now(UTC).isoformat(timespec="seconds")
    if request is not None:
        auth, signing, secrets = request.auth_public, request.signing_public, {}
    else:
        _, pair = new_node_key()
        key = new_key()
        auth, signing = pair.public.decode(), key.public
        secrets = {kits.AUTH_KEY: pair.private, kits.SIGNING_KEY: private_bytes(key)}
    member = Member(name=name, auth_public=auth, signing_public=signing, since=since, contact=entry.contact)
    return _SiteKeys(member, secrets)


def _found(plan: FederationPlan, plan_file: Path, out: Path) -> _Office:
    """A new folder with a new authority."""
    authority, key = new_authority(plan.name, days=plan.certificates.authority_days), new_key()
    with explained(out):
        (out / _AUTHORITY).mkdir(parents=True)
        (out / _AUTHORITY).chmod(0o700)
        (out / _KITS).mkdir(mode=0o700)
        write_bytes(out / _PLAN, plan_file.read_bytes())
    write_secret(out / _AUTHORITY / _CA_KEY, authority.private)
    write_secret(out / _AUTHORITY / _SIGNING_KEY, private_bytes(key))
    write_bytes(out / _AUTHORITY / kits.AUTHORITY, authority.public)
    return _Office(out, plan, authority, key, None)


def _open(folder: Path) -> tuple[_Office, Members]:
    office = folder / _AUTHORITY
    if not (office / _CA_KEY).is_file():
        raise KitError(f"{str(folder)!r} is not a folder that 'silotune provision' made: it holds no {_AUTHORITY}/")
    with explained(office):
        authority = Pair(read_secret(office / _CA_KEY), (office / kits.AUTHORITY).read_bytes())
    key = read_key(office / _SIGNING_KEY)
    members = kits.read_members(folder / kits.MEMBERS, key.public)
    return _Office(folder, kits.read_plan(folder / _PLAN), authority, key, members), members


def _new_keys(office: _Office, members: Members, name: str, *, entry: SitePlan, request: Path | None) -> MadeKit:
    asked = _request(request) if request is not None else None
    if asked is not None and asked.name != name:
        raise KitError(f"{str(request)!r} is a request of {asked.name!r}, not of {name!r}")
    site = _keys_of(name, asked, entry)
    if any(site.member.signing_public == other.signing_public for other in members.members):
        raise KitError(f"{str(request)!r} holds a key that was used before: make a new request")
    made = _next(members.model_copy(update={"members": (*members.members, site.member)}))
    return _site_kit(office, site, made, _write_members(office, made))


def _active(members: Members, name: str) -> Member:
    if name not in members.active():
        raise KitError(f"{name!r} is not a site of this federation: {', '.join(sorted(members.active()))}")
    return members.active()[name]


def _ended(members: Members, name: str, status: str) -> Members:
    now = datetime.now(UTC).isoformat(timespec="seconds")
    changed = tuple(
        member.model_copy(update={"status": status, "until": now})
        if member.name == name and member.status == "active"
        else member
        for member in members.members
    )
    return members.model_copy(update={"members": changed})


def _submitters_ended(members: Members, name: str, status: str) -> Members:
    now = datetime.now(UTC).isoformat(timespec="seconds")
    changed = tuple(
        one.model_copy(update={"status": status, "until": now}) if one.name == name and one.status == "active" else one
        for one in members.submitters
    )
    return members.model_copy(update={"submitters": changed})


def _submitter(name: str, key: SigningKey, contact: str) -> Submitter:
    since = datetime.now(UTC).isoformat(timespec="seconds")
    return Submitter(name=name, signing_public=key.public, since=since, contact=contact)


def _next(members: Members) -> Members:
    return members.model_copy(update={"version": members.version + 1})


def _write_members(office: _Office, members: Members) -> bytes:
    signature = office.key.sign("members", canonical(members.model_dump(mode="json")))
    place = office.folder / kits.MEMBERS
    write_json(place, SignedMembers(members=members, signature=signature).model_dump(mode="json"))
    return place.read_bytes()


def _charter_of(plan: FederationPlan, plan_file: Path) -> bytes | None:
    if plan.charter is None:
        return None
    place = plan_file.parent / plan.charter
    with explained(place):
        return place.read_bytes()


def _shared(office: _Office, members: bytes) -> dict[str, bytes]:
    """The files that every kit holds."""
    charter = office.folder / kits.CHARTER
    return {
        kits.AUTHORITY: office.authority.public,
        kits.AUTHORITY_PUBLIC: f"{office.key.public}\n".encode(),
        kits.MEMBERS: members,
        **({kits.CHARTER: charter.read_bytes()} if charter.is_file() else {}),
    }


def _coordinator_kit(office: _Office, key: SigningKey, members: bytes) -> MadeKit:
    coordinator = office.plan.coordinator
    hosts = (coordinator.host, *coordinator.names)
    server = new_server(office.authority, hosts, days=office.plan.certificates.server_days)
    files = {
        kits.COORDINATOR_FILE: coordinator_toml(office.plan).encode(),
        kits.SERVER_CERTIFICATE: server.public,
        kits.SERVER_KEY: server.private,
        kits.SIGNING_KEY: private_bytes(key),
        kits.SIGNING_PUBLIC: f"{key.public}\n".encode(),
        "README.md": coordinator_readme(office.plan).encode(),
    }
    units = service_files("coordinator", f"{office.plan.name}-coordinator", port=coordinator.fleet_port)
    return _pack(office, "coordinator", {**files, **units, **_shared(office, members)})


def _submitter_kit(office: _Office, name: str, key: SigningKey, members: bytes) -> MadeKit:
    """The kit of a submitter, whose private key is in no other kit."""
    files = {
        kits.SUBMITTER_FILE: submitter_toml(office.plan, name).encode(),
        kits.SIGNING_KEY: private_bytes(key),
        kits.SIGNING_PUBLIC: f"{key.public}\n".encode(),
        "README.md": submitter_readme(office.plan, name).encode(),
    }
    return _pack(office, name, {**files, **_shared(office, members)})


def _site_kit(office: _Office, site: _SiteKeys, members: Members, signed: bytes) -> MadeKit:
    shared, name = _shared(office, signed), site.member.name
    charter = hashlib.sha256(shared[kits.CHARTER]).hexdigest() if kits.CHARTER in shared else None
    files = {
        kits.SITE_FILE: site_toml(office.plan, name).encode(),
        kits.POLICY: policy_toml(name, submitters=members.submitter_keys(), charter=charter).encode(),
        kits.AUTH_PUBLIC: f"{site.member.auth_public}\n".encode(),
        kits.SIGNING_PUBLIC: f"{site.member.signing_public}\n".encode(),
        "README.md": site_readme(office.plan, name, holds_keys=bool(site.secrets)).encode(),
    }
    units = service_files("site", f"{office.plan.name}-{name}")
    return _pack(office, name, {**files, **units, **site.secrets, **_he_key(office), **shared})


def _he_key(office: _Office) -> dict[str, bytes]:
    """The key of encrypted sums, which all sites have and the coordinator does not."""
    return {kits.HE_KEY: read_secret(office.folder / _AUTHORITY / kits.HE_KEY)} if office.plan.he else {}


def _pack(office: _Office, name: str, files: Mapping[str, bytes]) -> MadeKit:
    """Writes a kit as a tar file that only its owner may read; a kit of the same name is replaced."""
    sums = "".join(f"{hashlib.sha256(content).hexdigest()}  {file}\n" for file, content in sorted(files.items()))
    buffer = io.BytesIO()
    top = f"{office.plan.name}-{name}"
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for file, content in sorted({**files, kits.CHECKSUMS: sums.encode()}.items()):
            entry = tarfile.TarInfo(f"{top}/{file}")
            entry.size, entry.mtime = len(content), int(time.time())
            entry.mode = 0o600 if file.endswith(".key") else 0o644
            archive.addfile(entry, io.BytesIO(content))
    place = office.folder / _KITS / f"{top}.tar"
    place.unlink(missing_ok=True)
    write_secret(place, buffer.getvalue())
    return MadeKit(name, place, hashlib.sha256(buffer.getvalue()).hexdigest())
