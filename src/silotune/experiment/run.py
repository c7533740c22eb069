"""Runs an experiment: the one place where the parts meet."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from silotune import tensors as arithmetic
from silotune.config import Config, from_mapping
from silotune.errors import ConfigError, RunFolderError
from silotune.evaluation.metrics import signed
from silotune.experiment import results
from silotune.experiment.audit import close_audit, forget_key, open_audit
from silotune.experiment.modes import MODES, Part, budget
from silotune.experiment.prepare import Prepared, Scorer, prepare
from silotune.federation.attack import Attacked, Simulated, attackers, with_flipped_labels
from silotune.federation.client import EvaluateOrder, Site, TrainOrder
from silotune.federation.clock import paces
from silotune.federation.protections import PROTECTIONS, guarantee, members
from silotune.federation.server import Plan, countersign, exchange, run_rounds
from silotune.federation.witness import Audit
from silotune.methods.algorithms import method, plain
from silotune.models.load import pick_device
from silotune.record.cost import Meter
from silotune.record.energy import open_gauge
from silotune.record.runs import RunFolder
from silotune.sections import AttackSection, BudgetSection, CompressionSection, DownloadSection, FederationSection
from silotune.structs import Observer, Reply, Request, ServerState, Tensors
from silotune.transports.clocked import Clocked
from silotune.transports.in_process import InProcess, workers_for


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
    with _metered(config) as meter:
        _check_budget(config, meter)
        prepared = prepare(config)
        name = config.record.name or results.default_name(config)
        folder = RunFolder.create(config.record.folder, name, config=config.model_dump(mode="json"))
        return _run(_Run(prepared, folder, meter, began), observer)


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
    with _metered(config) as meter:
        _check_budget(config, meter)
        return _run(_Run(prepare(config), folder, meter, began), observer)


@dataclass(frozen=True)
class _Run:
    """What the parts of one run share: examples and model, folder, meter, and when it began."""

    prepared: Prepared
    folder: RunFolder
    meter: Meter
    began: float


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
        folder.write_json("partition", prepared.skew)
        notify("run_started", _introduction(prepared, folder))
        for note in prepared.notes:
            notify("note", {"text": note})
        if prepared.config.privacy.protection != "none":
            notify("note", {"text": f"privacy: {guarantee(prepared.config.privacy)}"})
        for mode in prepared.config.federation.modes:
            for part in MODES[mode](prepared):
                _run_part(run, part, folder.part(*part.names), notify)
        summary = results.summarize(prepared.config, folder, metric=prepared.task.metric, budget=budget(prepared))
        summary["notes"] = list(prepared.notes)
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


def _run_part(run: _Run, part: Part, folder: RunFolder, notify: Observer) -> None:
    """One run of rounds, from its checkpoint where it has one; nothing to do where it has a result."""
    if folder.has("result"):
        forget_key(folder)
        return
    prepared, meter = run.prepared, run.meter
    config = prepared.config
    meter.memory.restart()
    state = ServerState(round_number=0, weights=prepared.initial)
    checkpoint = folder.load_checkpoint()
    if checkpoint is not None:
        state, sites = checkpoint
        _check_fits(state, prepared.initial, folder)
    transport = clients_of(prepared, part, meter, now=state.simulated_seconds)
    if checkpoint is not None:
        transport.restore(sites)
    who = {"mode": part.mode, "client": part.names[-1]} if part.mode == "isolated" else {"mode": part.mode}

    def told(event: str, fields: Mapping[str, Any]) -> None:
        notify(event, {**who, **fields})

    audit = open_audit(folder, config.record) if part.sends_updates and config.record.audit else None
    sampled = part.clients_per_round or len(part.clients)
    told("mode_started", {"rounds": config.federation.rounds, "clients_per_round": sampled})
    plan = plan_of(prepared, part, meter, audit=audit)
    state = run_rounds(plan, transport, state, folder, notify=told)
    weights = state.best_weights if config.evaluation.keep == "best" and state.best_weights else state.weights
    if part.mode == "federated" and config.evaluation.per_client:
        folder.write_json("per_client", _score_clients(prepared, plan, transport, state.round_number, weights))
    result = results.result_of(folder, state, metrics=prepared.gold(weights), keep=config.evaluation.keep)
    result.update(results.own_of(prepared.gold.by_client(weights, prepared.own_shares), prepared.task.metric))
    if prepared.forgetting is not None:
        result["forgetting"] = prepared.forgetting(weights)
    if not part.sends_updates:
        result.update(bytes_up=part.text_bytes, bytes_down=0)
    result["cost"] = results.cost_of(folder, result, trainable=arithmetic.count(weights), gauge=meter.gauge)
    card = results.adapter_card(config, part.mode, prepared.task, result)
    folder.save_adapter(weights, prepared.adapted.config, card=card)
    if audit is not None:
        result["audit"] = close_audit(audit, folder, adapter=weights, result=result)
        countersign(plan, transport, state.round_number)
    folder.write_json("result", result)
    forget_key(folder)
    told("mode_finished", {"metrics": result["metrics"], "seconds": result["seconds"]})


def clients_of(prepared: Prepared, part: Part, meter: Meter, *, now: float = 0.0) -> Simulated:
    """The clients of a part, in this process; only what really travels is encoded, takes time, and may be attacked."""
    federation, adapted = federation_of(prepared, part), prepared.adapted
    attack = federation.attack
    malicious = attackers(attack, tuple(part.clients), seed=prepared.config.seed)
    keys = members(part.clients, prepared.config.privacy) if part.sends_updates else {}
    sites = {}
    for name, examples in part.clients.items():
        is_flipped = attack.kind == "label-flip" and name in malicious
        own = with_flipped_labels(examples, len(adapted.base.labels)) if is_flipped else examples
        sites[name] = Site(name, own, adapted, protection=keys.get(name), meter=meter)
    sampled = part.clients_per_round or len(sites)
    workers = workers_for(adapted, sampled, asked=federation.workers)
    encode = federation.encode and part.sends_updates
    transport: Simulated = InProcess(sites, encode=encode, workers=workers, links=federation)
    if malicious:
        transport = Attacked(transport, attack, malicious)
    if federation.clock is None:
        return transport
    told = paces(federation.clock, tuple(sites), seed=prepared.config.seed)
    return Clocked(transport, told, settings=federation.clock, wanted=sampled, now=now)


def federation_of(prepared: Prepared, part: Part) -> FederationSection:
    """The ``[federation]`` section for a part: plain training where nothing travels."""
    federation = prepared.config.federation
    if part.sends_updates:
        return federation
    alone = {
        "upload": CompressionSection(),
        "download": DownloadSection(),
        "clock": None,
        "budget": BudgetSection(),
        "attack": AttackSection(),
    }
    return plain(federation).model_copy(update=alone)


def plan_of(prepared: Prepared, part: Part, meter: Meter, *, audit: Audit | None = None) -> Plan:
    """What ``run_rounds`` is to do for a part; baselines are scored before the first and after the last round."""
    config, federation = prepared.config, federation_of(prepared, part)
    clock, target = federation.clock, config.evaluation.target
    asked = federation.model_copy(update={"budget": BudgetSection(), "attack": AttackSection(), "clock": None})
    order = TrainOrder(training=part.training, federation=asked, seed=config.seed, rounds=federation.rounds)
    return Plan(
        rounds=federation.rounds,
        method=method(federation),
        body=order.model_dump(mode="json"),
        seed=config.seed,
        clients_per_round=_asked_a_round(part, federation),
        timeout_seconds=federation.timeout_seconds,
        min_replies=min(federation.min_replies, part.clients_per_round or len(part.clients)),
        score=prepared.gold,
        select=_selector(prepared.selection, prepared.task.metric) if prepared.selection else None,
        every=config.evaluation.every if part.sends_updates else federation.rounds,
        patience=config.evaluation.patience,
        target=None if target is None else signed(prepared.task.metric, target),
        budget=federation.budget,
        checkpoint_every=config.record.checkpoint_every,
        download=federation.download,
        staleness_exponent=clock.staleness_exponent if clock and clock.buffer else None,
        meter=meter,
        audit=audit,
        protected=PROTECTIONS[config.privacy.protection](config.privacy) if part.sends_updates else None,
    )


def _asked_a_round(part: Part, federation: FederationSection) -> int | None:
    """Clients that a round asks, those beyond ``clients_per_round`` included; None for all."""
    if part.clients_per_round is None or federation.clock is None:
        return part.clients_per_round
    return min(len(part.clients), math.ceil(part.clients_per_round * federation.clock.over_sampling))


def _selector(scorer: Scorer, metric: str) -> Callable[[Tensors], float]:
    """The task's metric on the selection set, turned so that higher is better."""

    def select(weights: Tensors) -> float:
        return signed(metric, float(scorer(weights)[metric]))

    return select


def _score_clients(
    prepared: Prepared, plan: Plan, transport: Simulated, round_number: int, weights: Tensors
) -> dict[str, Mapping[str, Any]]:
    order = EvaluateOrder(labels=tuple(prepared.gold.labels), batch_size=prepared.config.evaluation.batch_size)
    body = order.model_dump(mode="json")
    requests = {name: Request("evaluate", round_number, name, weights, body) for name in transport.clients()}
    replies = exchange(plan, transport, requests)
    return {
        reply.client: dict(reply.body) if isinstance(reply, Reply) else {"failed": reply.reason} for reply in replies
    }


def _check_fits(state: ServerState, initial: Tensors, folder: RunFolder) -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in state.weights.items()}
    if shapes != {name: tuple(tensor.shape) for name, tensor in initial.items()}:
        raise RunFolderError(f"{folder.path}: its checkpoint does not fit the adapter of its configuration")
