"""Runs an experiment: the one place where the parts meet."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from silotune import tensors as arithmetic
from silotune.config import Config, from_mapping
from silotune.errors import ConfigError, RunFolderError
from silotune.evaluation.metrics import signed
from silotune.experiment import personal, privacy, results
from silotune.experiment.audit import close_audit, forget_key, open_audit
from silotune.experiment.card import model_card
from silotune.experiment.crew import crew_of
from silotune.experiment.engines import Engine, engine_of, federation_of
from silotune.experiment.mixture import SetScorer
from silotune.experiment.modes import MODES, Part, budget
from silotune.experiment.orders import order_of, scored_by_clients, scoring_of
from silotune.experiment.prepare import Prepared, prepare
from silotune.experiment.start import check_same_data
from silotune.federation.jobs import JOB
from silotune.federation.protections import PROTECTIONS
from silotune.federation.server import Plan, countersign, run_rounds
from silotune.federation.transport import Transport
from silotune.federation.witness import Audit
from silotune.lora import without_residuals
from silotune.methods.algorithms import method
from silotune.models import adapters
from silotune.models.load import pick_device
from silotune.record.cost import Meter
from silotune.record.energy import open_gauge
from silotune.record.family import Family
from silotune.record.runs import RunFolder
from silotune.sections import FederationSection
from silotune.structs import Observer, ServerState, Tensors


@dataclass(frozen=True)
class Vouched:
    """What a submitter has signed of a run.

    Attributes:
        number: The job's own, by which ledgers tell the run from others.
        job: Order -> its body, for the orders of a run: gives the signed job, if it is for them.
    """

    number: str
    job: Callable[[Mapping[str, Mapping[str, Any]]], Mapping[str, Any]]


def run_experiment(config: Config, *, observer: Observer | None = None) -> RunFolder:
    """Runs every mode that a configuration names, and writes a new run folder.

    Args:
        config: The whole configuration.
        observer: Told of every event; the folder's ``events.jsonl`` holds the same.

    Returns:
        The run folder; ``summary.json`` in it holds the comparison of the modes.

    Raises:
        SilotuneError: Whatever went wrong, in one line. Faults of configuration, data and model are found before
            the folder is made.
    """
    began = time.perf_counter()
    with _metered(config) as meter, crew_of(config, meter.family) as crew:
        _check_budget(config, meter)
        prepared = prepare(config)
        name = config.record.name or results.default_name(config)
        folder = RunFolder.create(config.record.folder, name, config=config.model_dump(mode="json"))
        return _run(_Run(prepared, folder, meter, began, engine_of(config, crew)), observer)


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

    Args:
        config: The whole configuration; ``federated`` must be its only mode.
        sites: Site -> the public keys that sign its replies, in a fixed order; replies of a site without any need none.
        connect: Makes the transport that reaches them, for as long as it is used.
        path: The run folder, new or begun.
        vouched: The job that goes with all that is asked of the sites; None where they ask for none.
        observer: Told of every event.

    Raises:
        SilotuneError: Whatever went wrong, in one line.
    """
    began = time.perf_counter()
    if RunFolder(path).has("config"):
        folder = RunFolder.open(path)
        if folder.has("summary"):
            return folder
        prepared = prepare(config, sites=tuple(sites))
    else:
        prepared = prepare(config, sites=tuple(sites))
        if path.exists():  # a process died while it made the folder
            RunFolder(path).clear()
        folder = RunFolder.create(path.parent, path.name, config=config.model_dump(mode="json"))
    with _metered(config) as meter:
        keys = {name: own for name, own in sites.items() if own}
        return _run(_Run(prepared, folder, meter, began, connect, keys, vouched), observer)


def resume_experiment(path: str | Path, *, observer: Observer | None = None) -> RunFolder:
    """Continues a run that was stopped, from its last checkpoint; a finished run is left as it is.

    The result is bit for bit that of a run that was never stopped.

    Raises:
        RunFolderError: ``path`` is no run folder, or another process is writing to it.
    """
    began = time.perf_counter()
    folder = RunFolder.open(path)
    config = from_mapping(folder.read_json("config"), source=f"{path}/config.json")
    if folder.has("summary"):
        return folder
    with _metered(config) as meter, crew_of(config, meter.family) as crew:
        _check_budget(config, meter)
        return _run(_Run(prepare(config), folder, meter, began, engine_of(config, crew)), observer)


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
    family = Family()
    gauge = open_gauge(config.record.country, is_wanted=config.record.energy, gpu=gpu, cpu_seconds=family.cpu_seconds)
    try:
        yield Meter(gauge, family)
    finally:
        gauge.close()


def _check_budget(config: Config, meter: Meter) -> None:
    """A budget of joules that nobody meters would never be reached.

    Raises:
        ConfigError: There is no meter.
    """
    if config.federation.budget.joules is not None and meter.gauge.source() == "unavailable":
        raise ConfigError(
            "federation.budget.joules needs a meter: pip install 'silotune[energy]', and leave record.energy on"
        )


def _run(run: _Run, observer: Observer | None) -> RunFolder:
    prepared, folder = run.prepared, run.folder

    def notify(event: str, fields: Mapping[str, Any]) -> None:
        folder.append("events", {"event": event, "time": time.time(), **fields})
        if observer is not None:
            observer(event, fields)

    with folder.lock():
        torn = folder.mend()
        check_same_data(folder, prepared.skew)
        folder.write_json("partition", prepared.skew)
        notify("run_started", _introduction(prepared, folder))
        for note in torn:
            notify("note", {"text": note})
        sizes = {name: len(examples) for name, examples in prepared.clients.items()}
        number = None if run.vouched is None else run.vouched.number
        said = privacy.declared(prepared.config, folder, sizes, run=number)
        notify("privacy", {"statement": said["statement"]})
        for note in (*prepared.notes, *privacy.warnings(prepared.config, sizes)):
            notify("note", {"text": note})
        for mode in prepared.config.federation.modes:
            for part in MODES[mode](prepared):
                _run_part(run, part, folder.part(*part.names), notify, name="/".join((said["run"], *part.names)))
        summary = results.summarize(prepared.config, folder, metric=prepared.task.metric, budget=budget(prepared))
        summary["notes"] = list(prepared.notes)
        summary["privacy"] = {"dp": prepared.config.privacy.dp, "statement": said["statement"]}
        summary["seconds"] = time.perf_counter() - run.began
        summary["peak_memory_bytes"] = run.meter.memory.ever_bytes()
        folder.write_json("summary", summary)
        notify("run_finished", {"summary": summary})
    return folder


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
        forget_key(folder)
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

    audit = open_audit(folder, config.record) if part.sends_updates and config.record.audit else None
    if audit is not None:
        promise = tuple(run.folder.read_json(privacy.FILE)["statement"])
        audit = replace(audit, keys=run.keys, promise=promise)
    sampled = part.clients_per_round or len(part.clients)
    told("mode_started", {"rounds": config.federation.rounds, "clients_per_round": sampled})
    plan, scored = plan_of(prepared, part, meter, audit=audit, name=name, keys=run.keys), scoring_of(prepared)
    if run.vouched is not None:
        job = run.vouched.job({"train": plan.body, "evaluate": scored})
        plan, scored = replace(plan, body={**plan.body, JOB: job}), {**scored, JOB: job}
    state = run_rounds(plan, transport, state, folder, notify=told)
    weights = state.best_weights if config.evaluation.keep == "best" and state.best_weights else state.weights
    if part.mode == "federated" and config.evaluation.per_client:
        folder.write_json("per_client", scored_by_clients(plan, transport, weights, state.round_number, scored))
    planned = run.folder.read_json(privacy.FILE).get("plan", {}).get("epsilon")
    result = _scored_result(prepared, part, folder, state, weights, planned=planned)
    models = _own_models(prepared, part, plan, transport, weights, told)
    if models is not None:
        result["personal"] = personal.scored(prepared, part, models, result["by_client"])
    trainable = arithmetic.count(_trained(prepared, federation_of(prepared, part)))
    result["cost"] = results.cost_of(folder, result, trainable=trainable, gauge=meter.gauge)
    card = model_card(config, part.mode, prepared.task, result)
    saved, adapter_config = adapters.exported(prepared.adapted, weights)
    folder.save_adapter(saved, adapter_config, card=card)
    personal.save(folder, prepared, models or {}, card=card)
    if audit is not None:
        result["audit"] = close_audit(audit, folder, weights=weights, adapter=saved, result=result)
        countersign(plan, transport, state.round_number)
    folder.write_json("result", result)
    forget_key(folder)
    told("mode_finished", {"metrics": result["metrics"], "seconds": result["seconds"]})


def _scored_result(
    prepared: Prepared, part: Part, folder: RunFolder, state: ServerState, weights: Tensors, *, planned: float | None
) -> dict[str, Any]:
    """What a part came to, but for what it cost; ``planned`` is the epsilon of all rounds."""
    config = prepared.config
    result = results.result_of(folder, state, metrics=prepared.gold(weights), keep=config.evaluation.keep)
    result["num_clients"] = len(prepared.clients)
    result.update(results.own_of(prepared.gold.by_client(weights, prepared.own_shares), prepared.task.metric))
    if prepared.forgetting is not None:
        result["forgetting"] = prepared.forgetting(weights)
    if (spent := privacy.spent_of(config, folder, state.privacy, planned=planned)) is not None:
        result["privacy"] = spent
    if not part.sends_updates:
        result.update(bytes_up=part.text_bytes, bytes_down=0)
    return result


def _own_models(
    prepared: Prepared, part: Part, plan: Plan, transport: Transport, weights: Tensors, notify: Observer
) -> dict[str, Tensors] | None:
    """Models of the clients' own after the last round; None where the method makes none."""
    section = federation_of(prepared, part)
    if section.personalization == "none" and not any(map(method(section).schedule(1).is_personal, prepared.initial)):
        return None
    if section.personalization == "fine-tune":
        for failure in personal.fine_tune(plan, transport, weights):
            notify("client_failed", {"client": failure.client, "round": failure.round_number, "reason": failure.reason})
    return personal.own_models(transport, weights)


def _trained(prepared: Prepared, section: FederationSection) -> Tensors:
    """The adapter's tensors that move in any round."""
    both = [method(section).schedule(number) for number in (1, 2)]
    return {name: value for name, value in prepared.initial.items() if any(parts.trains(name) for parts in both)}


def plan_of(
    prepared: Prepared,
    part: Part,
    meter: Meter,
    *,
    audit: Audit | None = None,
    name: str = "",
    keys: Mapping[str, Sequence[str]] | None = None,
) -> Plan:
    """What ``run_rounds`` is to do for a part; baselines are scored before the first and after the last round.

    ``name`` is the part's identity in privacy ledgers, ``keys`` what clients sign their part in protected sums with.
    """
    config, federation = prepared.config, federation_of(prepared, part)
    clock, target = federation.clock, config.evaluation.target
    return Plan(
        rounds=federation.rounds,
        method=method(federation),
        body=order_of(prepared, part, name=name).model_dump(mode="json"),
        seed=config.seed,
        clients_per_round=_asked_a_round(part, federation),
        ranks=prepared.ranks if part.sends_updates else {},
        timeout_seconds=federation.timeout_seconds,
        below_minimum=federation.below_minimum,
        min_replies=min(federation.min_replies, part.clients_per_round or len(part.clients)),
        score=prepared.gold,
        select=_selector(prepared.selection, prepared.task.metric) if prepared.selection else None,
        every=config.evaluation.every if part.sends_updates else federation.rounds,
        select_every=config.evaluation.select_every,
        patience=config.evaluation.patience,
        target=None if target is None else signed(prepared.task.metric, target),
        budget=federation.budget,
        checkpoint_every=config.record.checkpoint_every,
        download=federation.download,
        staleness_exponent=clock.staleness_exponent if clock and clock.buffer else None,
        meter=meter,
        audit=audit,
        protected=PROTECTIONS[config.privacy.protection](privacy.collected(config, part), keys or {})
        if part.sends_updates
        else None,
        privacy=privacy.central_of(config, part, name),
    )


def _asked_a_round(part: Part, federation: FederationSection) -> int | None:
    """Clients that a round asks, those beyond ``clients_per_round`` included; None for all."""
    if part.clients_per_round is None or federation.clock is None:
        return part.clients_per_round
    return min(len(part.clients), math.ceil(part.clients_per_round * federation.clock.over_sampling))


def _selector(scorer: SetScorer, metric: str) -> Callable[[Tensors], float]:
    """The task's metric on the selection set, turned so that higher is better."""

    def select(weights: Tensors) -> float:
        return signed(metric, float(scorer(weights)[metric]))

    return select


def _check_fits(state: ServerState, initial: Tensors, folder: RunFolder) -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in without_residuals(state.weights).items()}
    if shapes != {name: tuple(tensor.shape) for name, tensor in initial.items()}:
        raise RunFolderError(f"{folder.path}: its checkpoint does not fit the adapter of its configuration")
