"""Takes a run from its submitter to the coordinator: signs it, hands it in, follows it, and copies its results.

Signing needs only the submitter's kit, and may be done on another machine than the coordinator's, which has no key
that sites accept as a submitter's. Handing in needs the coordinator's kit, and can change nothing that was signed.
"""

from __future__ import annotations

import hashlib
import re
import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from silotune.config import Config, validated
from silotune.data.tasks import resolve
from silotune.deploy.charter import read_charter
from silotune.deploy.kits import CHARTER, SIGNING_KEY, Kit, coordinator_folder, coordinator_settings, submitter_settings
from silotune.deploy.processes import holder
from silotune.deploy.queue import ENDED, Jobs, JobState
from silotune.errors import ConfigError, FederationError, ModelError, SignatureError, unknown_choice
from silotune.experiment.site import setup_of
from silotune.experiment.start import adapter_folder
from silotune.federation.kinds import COUNTERSIGN, EVALUATE, LEAKAGE, steps_of
from silotune.federation.wire.run_setup import check_scorable
from silotune.federation.wire.signed_job import Job, SignedJob, sign_job
from silotune.models.fingerprint import folder_of
from silotune.record.files import explained, read_document, write_json
from silotune.record.plain_json import sha256
from silotune.record.runs import RunFolder, is_run
from silotune.record.signatures import read_key
from silotune.settings.base import Section
from silotune.settings.limits import limits
from silotune.settings.privacy import EncryptedSum, SumSettings

LOOK_SECONDS = 0.3
AWAY_SECONDS = 60.0
"""How long following a run waits while the coordinator is not running, because it may be started again."""
VALID_DAYS = 30
"""How long a job is valid by default; a run that goes on later must be signed anew."""
_FINGERPRINT = re.compile("[0-9a-f]{64}")


class Submission(Section):
    """A run as its submitter hands it in: the configuration, and the job that its key signed over it."""

    format: Literal[1] = 1
    config: Config
    job: SignedJob


def sign_run(
    config: Config, submitter: Kit, *, name: str | None = None, base: str | None = None, days: int = VALID_DAYS
) -> Submission:
    """Signs a run of the federated mode, on the submitter's own machine.

    Args:
        config: The whole configuration; paths in it are for the coordinator's machine.
        submitter: The submitter's kit.
        name: Of the run; default: the configuration's name, or one made of the task, the seed and a random number.
        base: Fingerprint of the base model, where the base is not on this machine.
        days: How many days the job is valid.

    Raises:
        ConfigError: The run needs something that remote sites cannot do, or more sites than there are; or the
            fingerprint is not valid.
        ModelError: The base model is not on this machine, and no fingerprint is given.
    """
    submitter_settings(submitter)
    if base is not None and not _FINGERPRINT.fullmatch(base):
        raise ConfigError(
            f"{base!r} is not the fingerprint of a base model: give the 64 digits 0-9 a-f that 'silotune site check' "
            "shows"
        )
    members = submitter.members()
    faults = [*limits("sites", config), *_site_faults(config, sorted(members.active())), *_charter_faults(submitter)]
    if faults:
        raise ConfigError("the run cannot be submitted", faults)
    federation = config.federation.model_copy(update={"modes": ("federated",)})
    chosen, number = config.model_copy(update={"federation": federation}), secrets.token_hex(16)
    named = name or config.record.name or f"{config.data.task}-seed{config.seed}-{number[:8]}"
    asked = {
        "id": number,
        "run": named,
        "config_sha256": sha256(chosen.model_dump(mode="json")),
        "task": chosen.data.task,
        "participants": tuple(sorted(members.active())),
        "rounds": federation.rounds,
        "kinds": kinds_of(chosen),
        "setup_sha256": sha256(setup_of(chosen, base=base)),
        "charter_sha256": _charter_of(submitter),
        "expires": datetime.now(UTC) + timedelta(days=days),
    }
    job = validated(Job, asked, source="the run cannot be submitted")
    return Submission(config=chosen, job=sign_job(job, read_key(submitter.path(SIGNING_KEY))))


def kinds_of(config: Config) -> tuple[str, ...]:
    """The kinds of requests that a run needs; sites serve no other kinds."""
    scores = (EVALUATE,) if config.evaluation.per_client else ()
    if scores:
        check_scorable(tuple(resolve(config.data).options))
    audits = (LEAKAGE,) if config.audit.leakage else ()
    return (*steps_of(config.privacy.protection.type), *scores, *audits, COUNTERSIGN)


def resume_run(kit: Kit, name: str, *, submitter: Kit | None = None) -> JobState:
    """Queues a run again that failed or was cancelled; nothing is written before everything is checked.

    Args:
        kit: The coordinator's.
        name: Of the run.
        submitter: The kit of the submitter who signs it anew, to be valid for longer; None where the job is still
            valid.

    Raises:
        FederationError: There is no run of this name, it goes on already, or is finished.
        SignatureError: No submitter of the federation has signed it, or it was changed afterwards.
        ConfigError: The job has expired.
    """
    jobs = Jobs(coordinator_folder(kit))
    jobs.stopped(name)
    signed = jobs.signed(name)
    if submitter is not None:
        _check_unchanged(signed)
        signed = renewed(signed, submitter)
    _check_signed(kit, signed, anew=f"silotune resume {name} --kit {kit.folder} --as KIT")
    if submitter is not None:
        jobs.sign(name, signed)
    return jobs.resume(name)


def renewed(signed: SignedJob, submitter: Kit, *, days: int = VALID_DAYS) -> SignedJob:
    """The same job, signed by a submitter to be valid for longer."""
    submitter_settings(submitter)
    job = signed.job.model_copy(update={"expires": datetime.now(UTC) + timedelta(days=days)})
    return sign_job(job, read_key(submitter.path(SIGNING_KEY)))


def read_submission(path: Path) -> Submission:
    """The submission in a file that ``sign_run`` made and ``write_submission`` wrote.

    Raises:
        ConfigError: The file holds no submission.
    """
    read = read_document(path, ConfigError)
    try:
        return Submission.model_validate(read)
    except ValidationError as error:
        where = ".".join(str(part) for part in error.errors(include_input=False)[0]["loc"])
        see = f": see {where!r}" if where else ", which is a JSON object"
        raise ConfigError(f"{str(path)!r} is not a signed run{see}; 'silotune submit --as' makes one") from None


def write_submission(submission: Submission, path: Path) -> None:
    """Writes a submission to a file for whoever runs the coordinator."""
    write_json(path, submission.model_dump(mode="json"))


def hand_in(kit: Kit, submission: Submission) -> str:
    """Queues a signed run at the coordinator of a kit on this machine; gives its name.

    Raises:
        ConfigError: The federation was not provisioned for it, another configuration was signed, or a file that the
            coordinator will open is missing.
        SignatureError: It is not signed by a submitter of the federation.
        FederationError: There is a run of this name.
    """
    check_submission(kit, submission)
    config = submission.config
    record = config.record.model_copy(update={"audit_key": kit.path(SIGNING_KEY).absolute()})
    whole = _absolute(config.model_copy(update={"record": record}))
    faults = [*_kit_faults(kit, config), *_absent(whole)]
    if faults:
        raise ConfigError("the run cannot be submitted", faults)
    return Jobs(coordinator_folder(kit)).submit(whole, submission.job)


def check_submission(kit: Kit, submission: Submission) -> None:
    """Checks that a submitter of the federation has signed a submission, and its configuration.

    Raises:
        SignatureError: The signature does not fit, or is not a submitter's.
        ConfigError: The configuration beside the job is another one.
    """
    job, config = submission.job.job, submission.config
    _check_signed(kit, submission.job, anew="silotune submit CONFIG --as KIT")
    if sha256(config.model_dump(mode="json")) != job.config_sha256:
        raise ConfigError("the configuration beside the job is not the one that was signed")


def _check_unchanged(signed: SignedJob) -> None:
    if not signed.is_signed():
        raise SignatureError(
            "the run was changed after it was signed: have it signed anew with 'silotune submit CONFIG --as KIT'"
        )


def _check_signed(kit: Kit, signed: SignedJob, *, anew: str) -> None:
    """Checks that sites will accept a job now; ``anew`` is the command that signs it again."""
    _check_unchanged(signed)
    if signed.submitter not in kit.members().submitter_keys():
        raise SignatureError(
            f"the run is not signed by a submitter of this federation, as its list of members names them: '{anew}' "
            "signs with the kit of one"
        )
    if (expired := signed.expiry(datetime.now(UTC))) is not None:
        raise ConfigError(f"{expired}: have it signed anew with '{anew}'")


def submit_run(kit: Kit, config: Config, *, submitter: Kit, days: int = VALID_DAYS) -> str:
    """Signs a run and hands it in, where both kits are on one machine; returns the run's name."""
    jobs = Jobs(coordinator_folder(kit))
    wanted = config.record.name or f"{config.data.task}-seed{config.seed}"
    faults = _kit_faults(kit, config)
    try:
        submission = sign_run(config, submitter, name=jobs.free_name(wanted), days=days)
    except ConfigError as error:
        raise ConfigError(str(error), [*error.faults, *faults] if error.faults else ()) from None
    return hand_in(kit, submission)


def _absolute(config: Config) -> Config:
    """The configuration with absolute paths, because the coordinator works in another folder."""

    def whole(path: Path | None) -> Path | None:
        return None if path is None else path.absolute()

    data = {name: whole(getattr(config.data, name)) for name in ("root", "validation", "test")}
    files = {name: str(path.absolute()) for name, path in _scored_files(config).items()}
    model = {"name": str(Path(config.model.name).absolute())} if Path(config.model.name).is_dir() else {}
    start = {} if (folder := config.adapter.begins_from) is None else {"start": str(Path(folder).absolute())}
    return config.model_copy(
        update={
            "adapter": config.adapter.model_copy(update=start),
            "data": config.data.model_copy(update=data),
            "evaluation": config.evaluation.model_copy(update=files),
            "model": config.model.model_copy(update=model),
        }
    )


def _scored_files(config: Config) -> dict[str, Path]:
    """Key of ``[evaluation]`` -> the file that it names; keys that name a split or an embedded text are left out."""
    named = {name: getattr(config.evaluation, name) for name in ("gold", "selection", "forgetting")}
    return {name: Path(text) for name, text in named.items() if Path(text).suffix}


def _absent(config: Config) -> list[str]:
    """Files that the coordinator will open and that are not on its machine, so that the run would fail later."""
    data = config.data
    files = {
        **{f"data.{name}": getattr(data, name) for name in ("validation", "test")},
        **{f"evaluation.{name}": path for name, path in _scored_files(config).items()},
    }
    faults = [
        f"{name} = {str(path)!r} is not on this machine: name a file that the coordinator can open; a relative path "
        "begins in the folder in which the run is handed in"
        for name, path in files.items()
        if path is not None and not path.is_file()
    ]
    if data.task == "mixture" and data.root is not None and not data.root.is_dir():
        faults.append(f"data.root = {str(data.root)!r} is not a folder on this machine")
    looks: list[Callable[[], object]] = [lambda: folder_of(config.model)]
    if (start := config.adapter.begins_from) is not None:
        looks.append(lambda: adapter_folder(start))
    for look in looks:
        try:
            look()
        except ModelError as error:
            faults.append(str(error))
    return faults


def _site_faults(config: Config, sites: Sequence[str]) -> list[str]:
    """What in the configuration does not fit the federation's sites."""
    federation, faults = config.federation, []
    wanted = federation.clients_per_round
    if wanted is not None and wanted > len(sites):
        faults.append(f"federation.clients_per_round = {wanted}, but the federation has {len(sites)} sites")
    for table in ("ranks", "memory_mb"):
        strange = sorted(set(getattr(federation, table)) - set(sites))
        faults += [f"federation.{table}: {unknown_choice('site', name, sites)}" for name in strange]
    protection, most = config.privacy.protection, min(wanted or len(sites), len(sites))
    if isinstance(protection, SumSettings) and protection.least_clients > most:
        faults.append(
            f"privacy.protection opens no sum of fewer than least_clients = {protection.least_clients}: a round has "
            f"{most} sites"
        )
    return faults


def _kit_faults(kit: Kit, config: Config) -> list[str]:
    """What in the configuration the federation was not provisioned for."""
    if isinstance(config.privacy.protection, EncryptedSum) and not coordinator_settings(kit).he:
        return [
            "privacy.protection = 'he' needs a key at the sites: provision the federation with he = true, or use "
            "'secure_sum'"
        ]
    return []


def _charter_faults(kit: Kit) -> list[str]:
    """What the federation's agreement no longer allows."""
    if not kit.path(CHARTER).is_file():
        return []
    until = read_charter(kit.path(CHARTER))[0].until
    over = datetime.now(UTC).date() > until
    return [f"the charter's last day was {until}: sites refuse runs that name it"] if over else []


def _charter_of(kit: Kit) -> str | None:
    charter = kit.path(CHARTER)
    return hashlib.sha256(charter.read_bytes()).hexdigest() if charter.is_file() else None


def follow_run(jobs: Jobs, name: str, *, stays: bool = True) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The events of a run as they are written; ends with the run, or at once unless ``stays``.

    Raises:
        FederationError: There is no such run, or no coordinator works on it.
    """
    folder = RunFolder(jobs.run_path(name))
    seen, there = 0, time.monotonic()
    while True:
        has_ended = jobs.read(name).status in ENDED
        rows = folder.read_rows("events") if folder.has("events") else []
        for row in rows[seen:]:
            yield str(row["event"]), {key: value for key, value in row.items() if key not in ("event", "time")}
        seen = len(rows)
        if has_ended or not stays:
            return
        if holder(jobs.folder) is not None:
            there = time.monotonic()
        elif time.monotonic() - there > AWAY_SECONDS:
            raise FederationError(
                f"run {name!r} is {jobs.read(name).status}, and the coordinator did not start within "
                f"{AWAY_SECONDS:g} s: start it with 'silotune coordinator start KIT'; the run stays submitted"
            )
        time.sleep(LOOK_SECONDS)


def fetch_run(jobs: Jobs, name: str, out: Path) -> Path:
    """Copies a run's folder.

    Raises:
        FederationError: The run has not begun, or ``out`` exists already.
    """
    jobs.read(name)
    source = jobs.run_path(name)
    if not (source / "config.json").is_file():
        raise FederationError(f"run {name!r} has no folder yet: it has not begun")
    if out.exists():
        raise FederationError(f"{str(out)!r} is there already: name a new folder")
    inside = next((place for place in out.absolute().resolve().parents if is_run(place)), None)
    if inside is not None:
        raise FederationError(f"{str(out)!r} is inside the run folder {str(inside)!r}: name a place outside of it")
    with explained(out):
        shutil.copytree(source, out)
    return out
