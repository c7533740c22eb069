"""Checks a site before any run: whether all that it needs is in order, and what to do where it is not."""

from __future__ import annotations

import os
import shutil
import socket
import ssl
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import TYPE_CHECKING

from silotune.deploy.charter import read_charter
from silotune.deploy.kits import (
    AUTH_KEY,
    AUTHORITY,
    CHARTER,
    POLICY,
    Kit,
    SiteData,
    check_kit,
    site_folder,
    site_settings,
)
from silotune.errors import SilotuneError, unknown_choice
from silotune.federation.site.policy import Policy, read_policy
from silotune.settings.base import composed

if TYPE_CHECKING:
    from silotune.structs import Example, Row

MOST_SECONDS_OFF = 240.0
"""Flower accepts signatures that are at most 305 s old."""
LEAST_FREE_BYTES = 2 << 30
LEAST_MEMORY_BYTES = 2 << 30
_SECONDS = 10.0


@dataclass(frozen=True)
class Found:
    """One thing that was looked at: its name, whether it is in order, and what was seen or is to be done."""

    name: str
    ok: bool
    said: str


def check_site(kit: Kit) -> list[Found]:
    """All that can be checked before a run, one line each."""
    return [_looked(name, look, kit) for name, look in CHECKS.items()]


def _looked(name: str, look: Callable[[Kit], str], kit: Kit) -> Found:
    try:
        return Found(name, True, look(kit))
    except _FaultError as fault:
        return Found(name, False, str(fault))
    except SilotuneError as error:
        return Found(name, False, " ".join(str(error).split()))
    except TimeoutError:
        return Found(name, False, f"no answer within {_SECONDS:g} s")
    except OSError as error:
        return Found(name, False, f"{type(error).__name__}: {error}")


class _FaultError(Exception):
    """Something is not in order; the message says what to do."""


def _files(kit: Kit) -> str:
    faults = check_kit(kit.folder)
    if faults:
        raise _FaultError("; ".join(faults))
    return "as they were provisioned"


def _tls(kit: Kit) -> str:
    with _connected(kit) as connection:
        return f"{connection.version()}, certificate holds until {_until(connection)}"


def _until(connection: ssl.SSLSocket) -> str:
    certificate = connection.getpeercert() or {}
    return str(certificate.get("notAfter", "an unknown date"))


def _connected(kit: Kit) -> ssl.SSLSocket:
    where = site_settings(kit).coordinator
    context = ssl.create_default_context(cafile=str(kit.path(AUTHORITY)))
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        plain = socket.create_connection((where.host, where.fleet_port), timeout=_SECONDS)
        return context.wrap_socket(plain, server_hostname=where.host)
    except ssl.SSLCertVerificationError as error:
        raise _FaultError(
            f"the coordinator's certificate does not hold: {error.verify_message}; ask for a kit of this federation, "
            "or for 'provision rotate coordinator'"
        ) from None
    except OSError as error:
        within = f" within {_SECONDS:g} s" if isinstance(error, TimeoutError) else ""
        raise _FaultError(
            f"{where.host}:{where.fleet_port} cannot be reached{within} ({error}): is the coordinator started, and "
            "does the firewall let this machine out?"
        ) from None


def _clock(kit: Kit) -> str:
    where = site_settings(kit).coordinator
    with _connected(kit) as connection:
        connection.sendall(f"GET / HTTP/1.1\r\nHost: {where.host}\r\nConnection: close\r\n\r\n".encode())
        answer = connection.recv(4096).decode("latin-1")
    dates = [line.partition(":")[2].strip() for line in answer.splitlines() if line.lower().startswith("date:")]
    if not dates:
        raise _FaultError("the coordinator does not tell its time")
    off = time.time() - parsedate_to_datetime(dates[0]).timestamp()
    if abs(off) > MOST_SECONDS_OFF:
        raise _FaultError(f"{off:+.0f} s off the coordinator's: signatures would be refused; set both with NTP")
    return f"{off:+.0f} s off the coordinator's"


def _authentication(kit: Kit) -> str:
    from silotune.deploy.flower.fleet import Address, Fleet, read_node_key
    from silotune.deploy.processes import holder
    from silotune.deploy.site import node_state

    if holder(site_folder(kit)) is not None:
        said = node_state(kit)
        if said.get("status") != "connected":
            raise _FaultError(f"the site runs and is {said.get('status', 'not connected')}: {said.get('reason', '')}")
        return "connected"
    where = site_settings(kit).coordinator
    fleet = Fleet(Address(where.host, where.fleet_port, kit.path(AUTHORITY)), read_node_key(kit.path(AUTH_KEY)))
    try:
        fleet.deactivate(fleet.activate(int(node_state(kit).get("node_id", 0))))
    finally:
        fleet.close()
    return "the coordinator knows this site's key"


def _disk(kit: Kit) -> str:
    free = shutil.disk_usage(kit.folder).free
    if free < LEAST_FREE_BYTES:
        raise _FaultError(f"{free / 1e9:.1f} GB free: at least {LEAST_FREE_BYTES / 1e9:.1f} GB are needed; free some")
    return f"{free / 1e9:.1f} GB free"


def _memory(kit: Kit) -> str:
    pages, size = os.sysconf("SC_AVPHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    if pages * size < LEAST_MEMORY_BYTES:
        raise _FaultError(f"{pages * size / 1e9:.1f} GB free: stop something, or take a smaller base model")
    return f"{pages * size / 1e9:.1f} GB free"


def _device(kit: Kit) -> str:
    from silotune.models.load import pick_device

    return str(pick_device(site_settings(kit).model.device))


def _base(kit: Kit) -> str:
    from silotune.models.fingerprint import fingerprint
    from silotune.models.load import nano_folder

    model = site_settings(kit).model
    own = fingerprint(nano_folder() if model.path == "nano" else kit.folder / model.path)
    if model.sha256 is not None and own != model.sha256:
        raise _FaultError(
            f"{model.path} has fingerprint {own}, site.toml says {model.sha256}: put the right model there"
        )
    return own


def _data(kit: Kit) -> str:
    from silotune.data.files import read_rows
    from silotune.data.load import read_noted
    from silotune.data.tasks import resolve
    from silotune.deploy.trainer import holdings_of
    from silotune.experiment.site import task_at
    from silotune.settings.sections import DataSection

    data = site_settings(kit).data
    fault = next((said for said, is_so in _unreadable(data).items() if is_so), None)
    if fault is not None:
        raise _FaultError(fault)
    if data.task == "custom" and data.definition is None:
        assert data.train is not None
        return _offered(data.columns, read_rows(kit.folder / data.train, data))
    if not data.task:
        return "none of its own: it takes its share of generated tasks"
    task = resolve(DataSection(task=data.task, definition=data.definition))
    if data.train is None:
        if not task.embedded:
            raise _FaultError(f"data.train in site.toml names no file, and task {data.task!r} is not generated: set it")
        return f"none of its own: it takes its share of the generated task {data.task}"
    own = holdings_of(kit)
    own_task = task_at(own, task, own.definition)
    examples, notes = read_noted(kit.folder / data.train, own_task, data)
    return "; ".join([f"{len(examples)} examples for {data.task}", *notes, *_as_tokens(kit, examples)])


def _as_tokens(kit: Kit, examples: Sequence[Example]) -> list[str]:
    """What the site's model would be given of its examples, at the default of ``model.max_length``."""
    from silotune.deploy.trainer import holdings_of
    from silotune.experiment.data_check import notes_on, token_lengths
    from silotune.models.load import load_tokenizer
    from silotune.settings.sections import ModelSection

    model = ModelSection(name=holdings_of(kit).model or "nano")
    tokens = token_lengths(examples, load_tokenizer(model), model.max_length)
    cut = f"{tokens['cut']} would be cut by a run with model.max_length = {model.max_length}"
    longest = [f"the longest has {tokens['longest']} tokens"] if "longest" in tokens else []
    notes = notes_on(tokens)
    if tokens["refused"]:
        raise _FaultError("; ".join(notes))
    return [*longest, *([cut] if tokens["cut"] else []), *notes]


def _unreadable(data: SiteData) -> dict[str, bool]:
    """Reasons for which [data] of ``site.toml`` fits no run, and whether each holds."""
    is_custom = data.task == "custom"
    return {
        "data.task in site.toml names no task: set it to one of 'silotune tasks'": (
            not data.task and data.train is not None
        ),
        "data.task = 'mixture' in site.toml: name the one task that this site's examples are of; runs may mix it with "
        "others": data.task == "mixture",
        "[data.definition] in site.toml is for data.task = 'custom': leave it out": (
            data.definition is not None and not is_custom
        ),
        "data.train in site.toml names no file, which data.task = 'custom' needs: set it": (
            is_custom and data.train is None
        ),
        "data.task = 'custom' in site.toml needs [data.columns], with a line for each column that a run's own task may "
        'read: its name in the run\'s definition = "a column of the file"': (
            is_custom and data.definition is None and not data.columns
        ),
    }


def _offered(columns: Mapping[str, str], rows: Sequence[Row]) -> str:
    """What of a file a run's own task may read, and how much of it is there."""
    rows = [{composed(name): value for name, value in row.items()} for row in rows]
    for column in columns.values():
        if not any(column in row for row in rows):
            there = dict.fromkeys(name for row in rows for name in row)
            raise _FaultError(f"[data.columns] in site.toml: {unknown_choice('column of the file', column, there)}")
    empty = {column: sum(row.get(column) in (None, "") for row in rows) for column in columns.values()}
    parts = (
        f"{name} (column {column!r}{f', empty in {empty[column]}' if empty[column] else ''})"
        for name, column in columns.items()
    )
    return f"{len(rows)} rows; a run's own task may read {', '.join(parts)}"


def _policy(kit: Kit) -> str:
    policy = read_policy(kit.path(POLICY))
    faults = [said for said, is_so in _never_met(kit, policy).items() if is_so]
    if faults:
        raise _FaultError("; ".join(faults))
    rules = policy.model_dump(exclude_defaults=True)
    return f"{len(rules)} rules: {', '.join(sorted(rules))}" if rules else "restricts nothing but generation"


def _never_met(kit: Kit, policy: Policy) -> dict[str, bool]:
    """Reasons for which the policy would refuse every run at this site, and whether each holds."""
    members, task = kit.members(), site_settings(kit).data.task
    sites = len(members.active())
    least = max(policy.least_participants or 0, policy.least_cohort or 0)
    held = read_charter(kit.path(CHARTER))[1] if kit.path(CHARTER).is_file() else None
    return {
        "submitters lists nobody who may submit runs in this federation": (
            policy.submitters is not None and not set(policy.submitters) & set(members.submitter_keys())
        ),
        f"tasks does not list {task!r}, which site.toml says the examples are for": (
            bool(task) and policy.tasks is not None and task not in policy.tasks
        ),
        "base_models does not list the base model of site.toml": (
            policy.base_models is not None and _base(kit) not in policy.base_models
        ),
        f"least_participants or least_cohort asks for {least} sites, the federation has {sites}": least > sites,
        "charter is not the one in this kit": policy.charter is not None and policy.charter != held,
    }


def _folder(kit: Kit) -> str:
    folder: Path = site_folder(kit)
    if folder.exists() and folder.stat().st_mode & 0o077:
        raise _FaultError(f"{folder} may be entered by others: chmod 700 {folder}")
    return "private"


CHECKS = {
    "files": _files,
    "state folder": _folder,
    "policy": _policy,
    "data format": _data,
    "base model": _base,
    "device": _device,
    "memory": _memory,
    "disk": _disk,
    "TLS": _tls,
    "clock": _clock,
    "authentication": _authentication,
}
"""What is checked -> the function that checks it; ``site check`` shows them in this order."""
