"""Runs an experiment: the one place where the parts meet."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from silotune import tensors as arithmetic
from silotune.config import Config, plugins_of
from silotune.errors import ConfigError, RunFolderError
from silotune.experiment import budget, leakage, leakage_report, personal, privacy, results, spending
from silotune.experiment.audit import can_go_on, check_goes_on, forget_key, open_audit
from silotune.experiment.card import model_card
from silotune.experiment.engines import ENGINES, Engine
from silotune.experiment.needs import config_of
from silotune.experiment.parts import (
    MODES,
    Part,
    exposed_of,
    federation_of,
    leaked_by_clients,
    scored_by_clients,
    trained_of,
)
from silotune.experiment.prepare import Prepared, prepare
from silotune.experiment.rounds import plan_of
from silotune.experiment.split import computing, seen_by_compute_server
from silotune.experiment.start import check_same_data
from silotune.federation.coordinator.audit import Audit, close, concludes, countersign, uncountersigned
from silotune.federation.coordinator.rounds import Plan, run_rounds
from silotune.federation.wire.orders import Order
from silotune.federation.wire.signed_job import SignedJob
from silotune.federation.wire.transport import Transport
from silotune.lora import without_residuals
from silotune.models import adapters
from silotune.models.load import pick_device
from silotune.models.threads import operation_threads
from silotune.record.chain import has_ended
from silotune.record.cost import Meter
from silotune.record.energy import open_gauge
from silotune.record.runs import RunFolder
from silotune.structs import Observer, ServerState, Tensors

FEDERATED = ("federated",)
"""Place of the part that keeps a trail, in the run folder."""
_BY_SITE = "leakage_by_site"
"""What the sites measured of the final model, by their names."""


@dataclass(frozen=True)
class Vouched:
    """What a submitter has signed of a run.

    Attributes:
        number: The job's own, by which ledgers tell the run from others.
        signed: The job with its signature.
    """

    number: str
    signed: SignedJob


def run_experiment(config: Config, *, observer: Observer | None = None) -> RunFolder:
    """Runs every mode that a configuration names, and writes a new run folder.

    Args:
        config: The whole configuration.
        observer: Called with every event; the folder's ``events.jsonl`` holds the same.

    Returns:
        The run folder; ``summary.json`` in it holds the comparison of the modes.

    Raises:
        SilotuneError: Whatever went wrong, in one line. Faults of configuration, data and model are found before
            the folder is made.
    """
    began = time.perf_counter()
    with _metered(config) as meter:
        _check_budget(config, meter)
        prepared = prepare(config)
        name = config.record.name or results.default_name(config)
        folder = RunFolder.create(
            config.record.folder, name, config=config.model_dump(mode="json"), plugins=plugins_of(config)
        )
        return _run(_Run(prepared, folder, meter, began, ENGINES[config.federation.engine]), observer)


def federate(
    config: Config,
    sites: Mapping[str, Sequence[str]],
    *,
    connect: Engine,
    path: Path,
    vouched: Vouched | None = None,
    observer: Observer | None = None,
) -> RunFolder:
    """Runs the federated mode over sites that are elsewhere; goes on where the run folder holds a checkpoint.

    In the end the trail is closed over all files of the run, and the sites are asked to countersign its end. A run that
    is closed changes no more, except that signatures of sites that are still missing are added.

    Args:
        config: The whole configuration; ``federated`` must be its only mode.
        sites: Site -> the public keys that sign its replies, in a fixed order; replies of a site without any need none.
        connect: Makes the transport that reaches them, for as long as it is used.
        path: The run folder, new or begun.
        vouched: The job that goes with all that is asked of the sites; None where they ask for none.
        observer: Called with every event.

    Raises:
        SilotuneError: Whatever went wrong, in one line.
    """
    began = time.perf_counter()
    keys = {name: own for name, own in sites.items() if own}
    if RunFolder(path).has("config"):
        folder = RunFolder.open(path)
        if has_ended(folder.path):
            with folder.lock():
                if not _lacks_countersignatures(config, folder, keys):
                    return folder
        prepared = prepare(config, sites=tuple(sites))
    else:
        prepared = prepare(config, sites=tuple(sites))
        if path.exists():  # a process died while it made the folder
            RunFolder(path).clear()
        folder = RunFolder.create(
            path.parent, path.name, config=config.model_dump(mode="json"), plugins=plugins_of(config)
        )
    with _metered(config) as meter:
        return _run(_Run(prepared, folder, meter, began, connect, keys, vouched), observer)


def resume_experiment(path: str | Path, *, observer: Observer | None = None) -> RunFolder:
    """Continues a run that was stopped, from its last checkpoint; a finished run is left as it is.

    The result is bit for bit that of a run that was never stopped.

    Raises:
        RunFolderError: ``path`` is no run folder, another process is writing to it, or its clients are sites.
    """
    began = time.perf_counter()
    folder = RunFolder.open(path)
    config = config_of(folder)
    if has_ended(folder.path):
        forget_key(folder.part(*FEDERATED))
        return folder
    if folder.is_of_sites():
        raise RunFolderError(
            f"{str(path)!r} is of a run over sites, whose examples are not here: it goes on where its coordinator is, "
            "with 'silotune resume NAME --kit KIT'"
        )
    with _metered(config) as meter:
        _check_budget(config, meter)
        return _run(_Run(prepare(config), folder, meter, began, ENGINES[config.federation.engine]), observer)


@dataclass(frozen=True)
class _Run:
    """What the parts of one run share: examples and model, folder, meter, and when it began."""

    prepared: Prepared
    folder: RunFolder
    meter: Meter
    began: float
    connect: Engine
    keys: Mapping[str, Sequence[str]] = field(default_factory=dict)
    vouched: Vouched | None = None


@contextmanager
def _metered(config: Config) -> Iterator[Meter]:
    """A meter for the run; its gauge opens while the model is loaded."""
    device = pick_device(config.model.device)
    gpu = (device.index or 0) if device.type == "cuda" else None
    gauge = open_gauge(config.record.country, is_wanted=config.record.energy, gpu=gpu)
    try:
        yield Meter(gauge)
    finally:
        gauge.close()


def _check_budget(config: Config, meter: Meter) -> None:
    """Refuses a budget of joules without a meter, because it would never be reached.

    Raises:
        ConfigError: There is no meter.
    """
    if config.federation.budget.joules is not None and meter.gauge.source() == "unavailable":
        raise ConfigError(
            "federation.budget.joules needs a meter: pip install 'silotune[energy]', and leave record.energy on"
        )


def _run(run: _Run, observer: Observer | None) -> RunFolder:
    with run.folder.lock(), operation_threads(run.prepared.threads.an_operation):
        if not has_ended(run.folder.path):
            _work(run, observer)
        for part in _parts(run.prepared):
            if _keeps_trail(part, run.prepared.config):
                _seal(run, part, observer)
    if (report := leakage_report.read_report(run.folder.path / leakage_report.FOLDER)) is not None:
        leakage.check_claim(report)
    return run.folder


def _lacks_countersignatures(config: Config, folder: RunFolder, keys: Mapping[str, Sequence[str]]) -> bool:
    """Whether a process died after it had closed the trail, and before all sites had signed its end."""
    part = folder.part(*FEDERATED)
    if not keys or not config.record.audit or not can_go_on(part, config.record):
        return False
    return bool(uncountersigned(replace(open_audit(part, config.record), keys=keys)))


def _keeps_trail(part: Part, config: Config) -> bool:
    return part.sends_updates and config.record.audit


def _parts(prepared: Prepared) -> Iterator[Part]:
    for mode in prepared.config.federation.modes:
        yield from MODES[mode](prepared)


def _work(run: _Run, observer: Observer | None) -> None:
    """Runs all parts that have no result yet, then writes the result of the run."""
    prepared, folder = run.prepared, run.folder

    def notify(event: str, fields: Mapping[str, Any]) -> None:
        folder.append("events", {"event": event, "time": time.time(), **fields})
        if observer is not None:
            observer(event, fields)

    torn = folder.mend()
    check_same_data(folder, prepared.skew)
    folder.write_json("partition", prepared.skew)
    notify("run_started", _introduction(prepared, folder))
    for note in torn:
        notify("note", {"text": note})
    sizes = prepared.sizes
    number = None if run.vouched is None else run.vouched.number
    seen = seen_by_compute_server(prepared, folder)
    planned = spending.declared(prepared.config, folder, sizes, run=number, beside=seen)
    notify("privacy", {"statement": planned})
    for note in (*prepared.notes, *privacy.warnings(prepared.config, sizes, exposed=exposed_of(prepared))):
        notify("note", {"text": note})
    for part in _parts(prepared):
        _run_part(run, part, folder.part(*part.names), notify, name=_identity(run, part))
    if prepared.config.audit.leakage:
        notify("note", {"text": _attack(prepared, folder)})
    meant = budget.said(prepared.config, prepared.sizes)
    summary = results.summarize(prepared.config, folder, metric=prepared.task.metric, budget=meant)
    kept = spending.settled(prepared.config, folder, [part.names for part in _parts(prepared)])
    if kept != planned:
        notify("privacy", {"statement": kept})
    warned = results.warnings_of(summary)
    for note in warned:
        notify("note", {"text": note})
    summary["notes"] = [*prepared.notes, *warned]
    summary["privacy"] = {"dp": prepared.config.privacy.dp.type, "statement": kept}
    summary["seconds"] = time.perf_counter() - run.began
    summary["peak_memory_bytes"] = run.meter.memory.ever_bytes()
    folder.write_json("summary", summary)
    notify("run_finished", {"summary": summary})


def _attack(prepared: Prepared, folder: RunFolder) -> str:
    """Attacks what the run left of itself, writes the report to its folder, and says where."""
    if folder.is_of_sites():
        report = leakage.gathered(prepared, folder, folder.part(*FEDERATED).read_json(_BY_SITE))
    else:
        report = leakage.audited(prepared, folder, prepared.config.audit)
    place = folder.path / leakage_report.FOLDER
    leakage_report.write_report(leakage.signed(report, leakage.key_of(folder, None)), place)
    return f"leakage audit: {len(report['figures'])} figures in {str(place)!r}"


def _identity(run: _Run, part: Part) -> str:
    """The identity of a part in privacy ledgers."""
    return "/".join((spending.run_of(run.folder), *part.names))


def _seal(run: _Run, part: Part, observer: Observer | None) -> None:
    """Closes the trail over all that the run wrote, and asks the sites to sign its end. Notes go to the observer
    only."""
    folder = run.folder.part(*part.names)
    audit = replace(open_audit(folder, run.prepared.config.record), keys=run.keys)
    rounds = int(folder.read_json("result")["rounds"])
    if not audit.trail.is_closed:
        close(audit, run.folder.path, round_number=rounds)
    if uncountersigned(audit):
        plan = _vouched_plan(run, part, audit)
        with run.connect(run.prepared, part, run.meter, folder) as transport:
            countersign(plan, transport, rounds)
    missing = uncountersigned(audit)
    if missing and observer is not None:
        observer("note", {"text": f"the end of the audit trail is not countersigned by {', '.join(missing)}"})
    forget_key(folder)


def _introduction(prepared: Prepared, folder: RunFolder) -> dict[str, Any]:
    config = prepared.config
    return {
        "folder": str(folder.path),
        "modes": list(config.federation.modes),
        "task": prepared.task.name,
        "model": config.model.name,
        "clients": len(prepared.clients),
        "num_parameters": prepared.adapted.num_base_parameters,
        "trainable": arithmetic.count(prepared.initial),
    }


def _run_part(run: _Run, part: Part, folder: RunFolder, notify: Observer, *, name: str) -> None:
    """One run of rounds, from its checkpoint where it has one; nothing to do where it has a result.

    ``name`` is its identity in privacy ledgers.
    """
    if folder.has("result"):
        return
    prepared, meter = run.prepared, run.meter
    with run.connect(prepared, part, meter, folder) as transport:
        meter.memory.restart()
        _finish_part(run, part, folder, transport, notify, name=name)


def _finish_part(
    run: _Run, part: Part, folder: RunFolder, transport: Transport, notify: Observer, *, name: str
) -> None:
    prepared, meter, config = run.prepared, run.meter, run.prepared.config
    state = ServerState(round_number=0, weights=prepared.initial)
    checkpoint = folder.load_checkpoint()
    if checkpoint is not None:
        state, sites = checkpoint
        _check_fits(state, prepared.initial, folder)
        transport.restore(sites)
    who = {"mode": part.mode, "client": part.names[-1]} if part.mode == "isolated" else {"mode": part.mode}

    def told(event: str, fields: Mapping[str, Any]) -> None:
        notify(event, {**who, **fields})

    keep_models = config.audit.leakage
    audit = open_audit(folder, config.record, keep_models=keep_models) if _keeps_trail(part, config) else None
    if audit is not None:
        check_goes_on(audit, state)
        audit = replace(audit, keys=run.keys, promise=tuple(spending.planned_of(run.folder)))
    sampled = part.clients_per_round or len(part.clients)
    told("mode_started", {"rounds": config.federation.rounds, "clients_per_round": sampled})
    plan = computing(_vouched_plan(run, part, audit), prepared, part, transport)
    state = run_rounds(plan, transport, state, folder, notify=told)
    weights = state.best_weights if config.evaluation.keep == "best" and state.best_weights else state.weights
    if part.mode == "federated" and config.evaluation.per_client:
        folder.write_json("per_client", scored_by_clients(plan, transport, weights, state.round_number))
    if part.mode == "federated" and config.audit.leakage and not any(prepared.sizes.values()):
        folder.write_json(_BY_SITE, leaked_by_clients(plan, transport, weights, state.round_number))
    result = _scored_result(prepared, part, folder, state, weights)
    if (spent := spending.spent_of(config, folder, state.privacy, run=name)) is not None:
        planned = spending.planned_epsilon(run.folder) if part.sends_updates else None
        result["privacy"] = {**spent, "planned": planned}
    models = personal.made(prepared, part, plan, transport, weights, told)
    if models is not None:
        result["personal"] = personal.scored(prepared, part, models, result["by_client"])
    trainable = arithmetic.count(trained_of(prepared, federation_of(prepared, part)))
    result["cost"] = results.cost_of(folder, result, part.training, trainable=trainable, gauge=meter.gauge)
    card = model_card(config, part.mode, prepared.task, result)
    saved, adapter_config = adapters.exported(prepared.adapted, weights)
    folder.save_adapter(saved, adapter_config, card=card)
    personal.save(folder, prepared, models or {}, card=card)
    if audit is not None:
        promise = privacy.achieved(config.privacy, result)
        concludes(audit, weights=weights, adapter=saved, result=result, promise=promise)
    folder.write_json("result", result)
    told("mode_finished", {name: result[name] for name in ("metrics", "seconds", "round", "rounds")})


def _scored_result(
    prepared: Prepared, part: Part, folder: RunFolder, state: ServerState, weights: Tensors
) -> dict[str, Any]:
    """The result of a part, except for its cost in time and in privacy."""
    config = prepared.config
    result = results.result_of(folder, state, metrics=prepared.gold(weights), keep=config.evaluation.keep)
    result["num_clients"] = len(prepared.clients)
    result.update(results.own_of(prepared.gold.by_client(weights, prepared.own_shares), prepared.task.metric))
    if prepared.forgetting is not None:
        result["forgetting"] = prepared.forgetting(weights)
    if not part.sends_updates:
        result.update(bytes_up=part.text_bytes, bytes_down=0)
    return result


def _vouched_plan(run: _Run, part: Part, audit: Audit | None) -> Plan:
    """What the rounds are to do, under the job that vouches for it where sites ask for one."""
    name, order = _identity(run, part), None
    if run.vouched is not None:
        signed = run.vouched.signed
        order = Order(setup=signed.job.setup_sha256, run=name, seed=run.prepared.config.seed, job=signed)
    return plan_of(run.prepared, part, run.meter, audit=audit, name=name, keys=run.keys, order=order)


def _check_fits(state: ServerState, initial: Tensors, folder: RunFolder) -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in without_residuals(state.weights).items()}
    if shapes != {name: tuple(tensor.shape) for name, tensor in initial.items()}:
        raise RunFolderError(f"{folder.path}: its checkpoint does not fit the adapter of its configuration")
