"""What a federation's files hold: the plan that is provisioned, the kits, and the list of members.

``federation.toml`` is written by whoever sets the federation up. ``site.toml``, ``coordinator.toml`` and
``submitter.toml`` stand in the kits, beside files with fixed names: keys, certificates, ``members.json``,
``policy.toml`` and ``checksums.sha256``. The list of members is signed with the authority's Ed25519 key, whose public
half is in every kit.
"""

from __future__ import annotations

import hashlib
import ipaddress
import re
import ssl
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, TypeVar

from pydantic import AfterValidator, Field, ValidationError, model_validator

from silotune.config import read_toml, validated
from silotune.errors import KitError, SignatureError
from silotune.record.files import explained, read_document, write_bytes
from silotune.record.plain_json import canonical
from silotune.record.signatures import check_secrets, normal_public, read_key, verify
from silotune.settings.base import Device, Positive, Section
from silotune.settings.base import Name as Column
from silotune.settings.sections import FileSettings, TaskSection
from silotune.transports.frames import socket_path

SITE_FILE, COORDINATOR_FILE, SUBMITTER_FILE = "site.toml", "coordinator.toml", "submitter.toml"
POLICY, CHARTER, CHARTER_SIGNATURES = "policy.toml", "charter.toml", "charter.signatures.json"
AUTHORITY, MEMBERS, CHECKSUMS = "ca.crt", "members.json", "checksums.sha256"
AUTHORITY_PUBLIC = "authority.pub"
SERVER_CERTIFICATE, SERVER_KEY = "server.crt", "server.key"
AUTH_KEY, AUTH_PUBLIC = "auth.key", "auth.pub"
SIGNING_KEY, SIGNING_PUBLIC = "signing.key", "signing.pub"
NOTES = "notes.json"
"""In a site's state folder: what its staff should know of its examples in the run that it opened last."""
HE_KEY = "he.key"
"""The key of encrypted sums, the same in every site's kit; the coordinator's has none."""
EDITABLE = (SITE_FILE, COORDINATOR_FILE, SUBMITTER_FILE, POLICY, CHARTER, CHARTER_SIGNATURES, MEMBERS)
"""Files of a kit that its owner changes, or that are replaced later: ``check_kit`` does not compare them."""


def unpack(archive: Path, folder: Path) -> None:
    """Unpacks a kit that this machine has made; Python before 3.11.4 has no filter against harmful tar files."""
    with tarfile.open(archive) as tar:
        tar.extraction_filter = getattr(tarfile, "data_filter", lambda member, path: member)
        tar.extractall(folder)


_NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
_HOST = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9_.-]{0,251}[A-Za-z0-9])?")


def _checked_name(text: str) -> str:
    if not _NAME.fullmatch(text):
        raise ValueError(f"{text!r} is not a name: use up to 63 lower-case letters, digits and - (not at an end)")
    if text in RESERVED:
        raise ValueError(f"{text!r} cannot name a site: it is reserved, use another name")
    return text


def _checked_host(text: str) -> str:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        if not _HOST.fullmatch(text):
            raise ValueError(f"{text!r} is neither a host name nor an IP address") from None
    return text


RESERVED = ("coordinator", "authority", "unknown")
Name = Annotated[str, AfterValidator(_checked_name)]
Host = Annotated[str, AfterValidator(_checked_host)]
Port = Annotated[int, Field(ge=1, le=65535)]
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class CoordinatorPlan(Section):
    """Where the coordinator will run, as sites see it."""

    host: Host = Field(description="name or address that sites connect to")
    names: tuple[Host, ...] = Field((), description="further names and addresses in the server's certificate")
    fleet_port: Port = Field(9092, description="where sites connect")


class CertificatePlan(Section):
    """How long certificates hold."""

    authority_days: Positive = Field(3650, description="of the federation's own authority")
    server_days: Positive = Field(365, description="of the server's certificate; then 'provision rotate coordinator'")


class SitePlan(Section):
    """One institution."""

    contact: str = Field("", description="whom to ask; stands in the list of members")


class SubmitterPlan(Section):
    """A researcher who may ask for runs."""

    contact: str = Field("", description="whom to ask; stands in the list of members")


FIRST_SUBMITTER = "researcher"
"""The submitter of a plan that names none."""


class FederationPlan(Section):
    """``federation.toml``: what ``silotune provision`` reads."""

    name: Name
    coordinator: CoordinatorPlan
    certificates: CertificatePlan = CertificatePlan()
    charter: Path | None = Field(None, description="the federation's agreement; goes into every kit and policy")
    he: bool = Field(False, description="make the key of encrypted sums and give it to the sites; needs tenseal")
    sites: dict[Name, SitePlan] = Field(min_length=1, description="[sites.NAME] each")
    submitters: dict[Name, SubmitterPlan] = Field(
        {FIRST_SUBMITTER: SubmitterPlan()}, min_length=1, description="[submitters.NAME] each: who may sign runs"
    )

    @model_validator(mode="after")
    def _a_name_is_one_member(self) -> FederationPlan:
        both = sorted(self.sites.keys() & self.submitters.keys())
        if both:
            raise ValueError(f"{both[0]!r} is a site and a submitter: give them different names")
        return self


class ServerAddress(Section):
    """Where a site finds the coordinator."""

    host: Host
    fleet_port: Port


class SiteModel(Section):
    """The base model at a site."""

    path: str = Field("nano", description="local folder of the base model, or 'nano' (shipped)")
    device: Device = "auto"
    sha256: Sha256 | None = Field(None, description="fingerprint that the folder must have: 'silotune site check'")


class SiteData(FileSettings):
    """The site's own examples, and how their files are read; they never leave it."""

    task: str = Field("", description="a name from 'silotune tasks'; what a run may ask for")
    definition: TaskSection | None = Field(
        None, description="of task 'custom': the only definition that a run may have; default: any over [data.columns]"
    )
    columns: dict[Column, Column] = Field(
        {}, description="column that the task names -> column of the file; with 'custom', all that a run may read"
    )
    train: Path | None = Field(None, description="training examples; relative paths begin at the kit")


class SiteTrainer(Section):
    """The resident process that holds the base model."""

    folder: Path = Field(Path("state"), description="socket, logs, audit chain and state between rounds; mode 0700")
    threads: Positive | None = Field(None, description="CPU threads; default: as torch decides")
    idle_seconds: Annotated[float, Field(gt=0)] = Field(
        600.0, description="free the adapter's memory after this time without a request"
    )
    largest_message_mb: Positive = Field(2048, description="a longer message is not fetched from the coordinator")


class SiteKit(Section):
    """``site.toml``."""

    format: Literal[1] = 1
    federation: Name
    site: Name
    coordinator: ServerAddress
    model: SiteModel = SiteModel()
    data: SiteData = SiteData()
    trainer: SiteTrainer = SiteTrainer()


class CoordinatorKit(Section):
    """``coordinator.toml``."""

    format: Literal[1] = 1
    federation: Name
    address: ServerAddress
    listen: Host = Field("0.0.0.0", description="address that the server binds to")
    folder: Path = Field(Path("state"), description="server state, logs and run folders; mode 0700")
    he: bool = Field(False, description="the sites have the key of encrypted sums")


class SubmitterKit(Section):
    """``submitter.toml``."""

    format: Literal[1] = 1
    federation: Name
    submitter: Name


class Submitter(Section):
    """One key that a submitter had or has."""

    name: Name
    status: Literal["active", "rotated", "revoked"] = "active"
    signing_public: str = Field(description="Ed25519, OpenSSH line")
    since: str = Field(description="UTC, ISO 8601")
    until: str | None = None
    contact: str = ""


class Member(Section):
    """One key pair that a site had or has."""

    name: Name
    status: Literal["active", "rotated", "revoked"] = "active"
    auth_public: str = Field(description="ECDSA P-384 of Flower's node authentication, OpenSSH line")
    signing_public: str = Field(description="Ed25519, OpenSSH line")
    since: str = Field(description="UTC, ISO 8601")
    until: str | None = None
    contact: str = ""


class Members(Section):
    """Who belongs to a federation, signed by its authority; a later list has a higher version."""

    format: Literal[1] = 1
    federation: Name
    version: Positive
    coordinator: tuple[str, ...] = Field(min_length=1, description="its Ed25519 keys, the last one in use")
    members: tuple[Member, ...]
    submitters: tuple[Submitter, ...] = Field((), description="who may sign jobs; a site serves nobody else's")

    @model_validator(mode="after")
    def _one_active_key_a_name(self) -> Members:
        everybody: tuple[Member | Submitter, ...] = (*self.members, *self.submitters)
        active = [member.name for member in everybody if member.status == "active"]
        if len(set(active)) != len(active):
            raise ValueError("a member has two active keys")
        return self

    def active(self) -> dict[str, Member]:
        """Site -> its member record, of those that take part now."""
        return {member.name: member for member in self.members if member.status == "active"}

    def active_submitters(self) -> dict[str, Submitter]:
        """Submitter -> its record, of those who may sign jobs now."""
        return {member.name: member for member in self.submitters if member.status == "active"}

    def submitter_keys(self) -> tuple[str, ...]:
        """Public keys whose signatures of jobs are valid now."""
        return tuple(member.signing_public for member in self.active_submitters().values())

    def coordinator_now(self) -> str:
        """The coordinator's key in use; signatures with an earlier key, which may be stolen, are not valid any more."""
        return self.coordinator[-1]

    def signing_keys(self) -> dict[str, tuple[str, ...]]:
        """Name -> every signing key that it has or had, also revoked ones, so that old entries stay verifiable."""
        keys: dict[str, tuple[str, ...]] = {"coordinator": self.coordinator}
        for member in self.members:
            keys[member.name] = (*keys.get(member.name, ()), member.signing_public)
        return keys


class SignedMembers(Section):
    """``members.json``."""

    members: Members
    signature: str


_Settings = TypeVar("_Settings", SiteKit, CoordinatorKit, SubmitterKit)


@dataclass(frozen=True)
class Kit:
    """An unpacked kit: its folder and what its file says."""

    folder: Path
    settings: SiteKit | CoordinatorKit | SubmitterKit

    def path(self, name: str) -> Path:
        """A file of the kit."""
        return self.folder / name

    def members(self) -> Members:
        """Who belongs to the federation, the authority's signature checked.

        Raises:
            SignatureError: The authority did not sign the list.
            KitError: It cannot be read, or is of another federation than the kit.
        """
        members = read_members(self.path(MEMBERS), self.authority())
        if members.federation != self.settings.federation:
            raise KitError(
                f"{str(self.path(MEMBERS))!r} is of the federation {members.federation!r}, the kit's settings name "
                f"{self.settings.federation!r}: unpack the kit again"
            )
        return members

    def authority(self) -> str:
        """The public key of the federation's authority.

        Raises:
            KitError: It cannot be read.
        """
        place = self.path(AUTHORITY_PUBLIC)
        try:
            return normal_public(place.read_text(encoding="utf-8"))
        except OSError as error:
            raise KitError(f"cannot read {str(place)!r}: {error.strerror or error}; unpack the kit again") from None
        except (UnicodeDecodeError, SignatureError):
            raise KitError(f"{str(place)!r} is not a public key: unpack the kit again") from None


_KINDS: Mapping[str, type[SiteKit] | type[CoordinatorKit] | type[SubmitterKit]] = {
    SITE_FILE: SiteKit,
    COORDINATOR_FILE: CoordinatorKit,
    SUBMITTER_FILE: SubmitterKit,
}


def read_plan(path: Path) -> FederationPlan:
    """Reads ``federation.toml``; ``ConfigError`` lists every fault."""
    return validated(FederationPlan, read_toml(path), source=str(path), is_named=True)


def read_kit(folder: Path) -> Kit:
    """The kit in a folder, its settings checked; ``check_kit`` compares its other files.

    Raises:
        KitError: The folder holds no kit.
        ConfigError: Its file holds faults.
    """
    for name, kind in _KINDS.items():
        if (folder / name).is_file():
            place = folder / name
            return Kit(folder, validated(kind, read_toml(place), source=str(place), is_named=True))
    files = f"{SITE_FILE}, {COORDINATOR_FILE} or {SUBMITTER_FILE}"
    raise KitError(f"{str(folder)!r} holds no {files}: unpack a kit there with tar -xpf")


def read_members(path: Path, authority: str) -> Members:
    """A list of members.

    Args:
        path: ``members.json``.
        authority: The authority's public key.

    Raises:
        SignatureError: The authority did not sign it.
        KitError: It is not such a list, or cannot be read.
    """
    try:
        read = SignedMembers.model_validate(read_document(path, KitError))
    except ValidationError as error:
        where = ".".join(str(part) for part in error.errors()[0]["loc"])
        raise KitError(f"{str(path)!r} is not a list of members: see {where!r}") from None
    if not verify(normal_public(authority), "members", canonical(read.members.model_dump(mode="json")), read.signature):
        raise SignatureError(f"{str(path)!r} is not signed by the federation's authority")
    return read.members


def replace_members(kit: Kit, path: Path) -> Members:
    """Puts a newer list of members into a kit.

    Raises:
        KitError: The list is of another federation, or older than the one that is there.
    """
    old, new = kit.members(), read_members(path, kit.authority())
    if new.federation != old.federation:
        raise KitError(f"{str(path)!r} is of the federation {new.federation!r}, not {old.federation!r}")
    if new.version < old.version:
        raise KitError(f"{str(path)!r} has version {new.version}; the kit has {old.version} already")
    with explained(path):
        content = path.read_bytes()
    write_bytes(kit.path(MEMBERS), content)
    return new


def site_name(text: str) -> str:
    """The name of a site, checked.

    Raises:
        KitError: It is not one.
    """
    try:
        return _checked_name(text)
    except ValueError as error:
        raise KitError(str(error)) from None


def check_start(kit: Kit) -> None:
    """Checks all that the processes of a kit read from it, before any of them is started.

    Raises:
        KitError: A file is missing, a key is not valid or may be read by others, or the list of members is not valid.
    """
    missing = [name for name in _STARTS_WITH[type(kit.settings)] if not kit.path(name).is_file()]
    if missing:
        raise KitError(
            f"{str(kit.folder)!r} lacks {', '.join(missing)}: unpack the kit again, or put there the keys that were "
            "made with 'silotune provision request'"
        )
    check_secrets(kit.folder)
    read_key(kit.path(SIGNING_KEY))
    kit.members()
    try:
        ssl.create_default_context(cafile=kit.path(AUTHORITY))
    except OSError:
        raise KitError(f"{str(kit.path(AUTHORITY))!r} is not a certificate: unpack the kit again") from None


_EVERYBODY = (AUTHORITY, AUTHORITY_PUBLIC, MEMBERS, SIGNING_KEY)
_STARTS_WITH: Mapping[type[Section], tuple[str, ...]] = {
    SiteKit: (*_EVERYBODY, AUTH_KEY, POLICY),
    CoordinatorKit: (*_EVERYBODY, SERVER_CERTIFICATE, SERVER_KEY),
}
"""Kind of kit -> the files that must be there before anything is started."""


def check_kit(folder: Path) -> list[str]:
    """What is wrong with a kit's sealed files, one line each: missing, changed, or readable by others."""
    faults = []
    with explained(folder / CHECKSUMS):
        lines = (folder / CHECKSUMS).read_text(encoding="utf-8").splitlines()
    for line in lines:
        digest, _, name = line.partition("  ")
        path = folder / name
        if not path.is_file():
            faults.append(f"{name} is missing: unpack the kit again")
        elif name not in EDITABLE and hashlib.sha256(path.read_bytes()).hexdigest() != digest:
            faults.append(f"{name} is not what the kit held: unpack the kit again")
        if name.endswith(".key") and path.is_file() and path.stat().st_mode & 0o077:
            faults.append(f"{name} may be read by others: chmod 600 {path}")
    return faults


def site_settings(kit: Kit) -> SiteKit:
    """The settings of a site's kit.

    Raises:
        KitError: It is another one.
    """
    return _settings_as(SiteKit, kit, "a site's")


def coordinator_settings(kit: Kit) -> CoordinatorKit:
    """The settings of a coordinator's kit.

    Raises:
        KitError: It is another one.
    """
    return _settings_as(CoordinatorKit, kit, "the coordinator's")


def submitter_settings(kit: Kit) -> SubmitterKit:
    """The settings of a submitter's kit.

    Raises:
        KitError: It is another one.
    """
    return _settings_as(SubmitterKit, kit, "a submitter's")


def _settings_as(kind: type[_Settings], kit: Kit, whose: str) -> _Settings:
    if not isinstance(kit.settings, kind):
        raise KitError(f"{str(kit.folder)!r} is {_owner(kit)}: give {whose}")
    return kit.settings


def _owner(kit: Kit) -> str:
    """Whose kit it is, in words."""
    if isinstance(kit.settings, SiteKit):
        return f"the kit of site {kit.settings.site!r}"
    if isinstance(kit.settings, SubmitterKit):
        return f"the kit of submitter {kit.settings.submitter!r}"
    return "the coordinator's kit"


def site_folder(kit: Kit) -> Path:
    """Where a site keeps its state; mode 0700."""
    return kit.folder / site_settings(kit).trainer.folder


def coordinator_folder(kit: Kit) -> Path:
    """Where a coordinator keeps its state; mode 0700."""
    return kit.folder / coordinator_settings(kit).folder


def trainer_socket(kit: Kit) -> Path:
    """Where a site's trainer listens."""
    return socket_path(site_folder(kit), "trainer.sock")


def link_socket(kit: Kit) -> Path:
    """Where the coordinator's own processes reach the SuperLink."""
    return socket_path(coordinator_folder(kit), "superlink.sock")


def log_of(folder: Path, name: str) -> Path:
    """Where a process writes what it prints."""
    return folder / "logs" / f"{name}.log"
