"""Estimates what a configuration will need, before it is started."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from silotune import tensors as arithmetic
from silotune.config import Config
from silotune.experiment.budget import steps_by_mode
from silotune.experiment.engines import in_process
from silotune.experiment.parts import MODES, forecast_of
from silotune.experiment.prepare import Prepared, prepare
from silotune.experiment.rounds import plan_of
from silotune.experiment.scoring import SetScorer
from silotune.experiment.split import arithmetic_of, computing, note_of
from silotune.federation.coordinator.rounds import run_rounds
from silotune.federation.wire.messages import encode
from silotune.methods.algorithms import method
from silotune.methods.compress.pack import pack
from silotune.methods.schedule import outgoing, returned
from silotune.models import adapters
from silotune.models.fingerprint import weights_bytes
from silotune.models.load import pick_device
from silotune.models.threads import operation_threads
from silotune.record import environment
from silotune.record.cost import Meter
from silotune.record.environment import peak_memory_bytes
from silotune.record.runs import RunFolder
from silotune.structs import Request, ServerState
from silotune.training.local import RoundPlace, train_round

CALIBRATION_STEPS = 2
"""Steps of a round that is timed."""
CALIBRATION_ROUNDS = 5
"""Rounds that are timed, after one that is not: on a busy machine a single one says little."""
SCORING_SECONDS = 5.0
"""A set is scored again for its time, up to as many times, while all of it has taken less than this."""


def least_memory(config: Config) -> dict[str, int]:
    """``memory_bytes`` or ``gpu_memory_bytes`` that the base's weights alone will take; empty where it is not known.

    Nothing is loaded, so a base that does not fit is reported before the system kills the process that loads it.

    Raises:
        ModelError: The configured device is not there.
    """
    taken = weights_bytes(config.model)
    if taken is None:
        return {}
    return {"gpu_memory_bytes" if pick_device(config.model.device).type == "cuda" else "memory_bytes": taken}


def estimate(config: Config) -> dict[str, Any]:
    """Parameters, bytes a round, memory and seconds of a run, the last two from a few real steps.

    Times are medians after a warm-up; ``seconds_least`` and ``seconds_most`` are what the run takes if all of it is as
    fast as the fastest, or as slow as the slowest that was timed.

    Returns:
        ``parameters``, ``trainable``, ``clients``, ``steps`` (all modes), ``bytes_per_round``, ``memory_bytes``
        (peak of this process after the steps), ``gpu_memory_bytes``, ``seconds_per_step``, ``seconds``,
        ``seconds_least`` and ``seconds_most``, ``load`` (processes that wanted to run in the last minute, before the
        steps; None where the system does not say), and ``fast_paths``: the shortcuts that hold for the model; with
        ``federation.split`` also ``split``, what each party holds, computes and sends.

    Raises:
        SilotuneError: The configuration, its data or its model do not work, or a round of it fails; no run folder is
            written.
    """
    load = environment.load()
    prepared = prepare(config)
    with operation_threads(prepared.threads.an_operation):
        crossed = _rehearse(prepared)
        return {**_estimated(prepared, crossed), "load": load}


def _rehearse(prepared: Prepared) -> Mapping[str, Any]:
    """One round with a step for each client, and what becomes of its model, in a folder that is thrown away.

    Returns:
        What crossed between clients and a compute server; empty without one.

    Raises:
        SilotuneError: What a run would end with.
    """
    once = {
        "training": prepared.config.training.model_copy(update={"max_steps": 1}),
        "privacy": prepared.config.privacy.without_ledger(),
    }
    trial = replace(prepared, config=prepared.config.model_copy(update=once))
    federation = trial.config.federation
    part, meter = MODES["federated" if federation.split else federation.modes[0]](trial)[0], Meter()
    with TemporaryDirectory() as place:
        folder = RunFolder(Path(place))
        with in_process(trial, part, meter, folder) as transport:
            plan = replace(plan_of(trial, part, meter), rounds=1, below_minimum="stop", score=None, select=None)
            plan = computing(plan, trial, part, transport)
            after = run_rounds(plan, transport, ServerState(round_number=0, weights=trial.initial), folder)
        folder.save_adapter(*adapters.exported(trial.adapted, after.weights), card="")
        crossed: Mapping[str, Any] = folder.read_rows("metrics")[-1].get("crossings", {})
    adapters.write(trial.adapted, trial.initial)
    return crossed


def _estimated(prepared: Prepared, crossed: Mapping[str, Any]) -> dict[str, Any]:
    config, federation = prepared.config, prepared.config.federation
    by_mode = steps_by_mode(config, tuple(prepared.sizes.values()))
    steps = sum(by_mode[mode] for mode in federation.modes)
    a_step = _measure(prepared)
    down, up = _message_bytes(prepared)
    taking_part = federation.clients_per_round or len(prepared.clients)
    times = [(steps, a_step), (_scorings(config, len(prepared.clients)), _measured(prepared.gold, prepared))]
    if prepared.selection is not None:
        times.append((_selections(config, len(prepared.clients)), _measured(prepared.selection, prepared)))
    median, least, most = (sum(count * of(taken) for count, taken in times) for of in (statistics.median, min, max))
    cuda = prepared.adapted.base.device.type == "cuda"
    parted = arithmetic_of(prepared, crossed) if crossed else {}
    per_client = parted["bytes_per_round"] if parted else down + up
    return {
        "parameters": prepared.adapted.num_base_parameters,
        "trainable": arithmetic.count(prepared.initial),
        "clients": len(prepared.clients),
        "steps": steps,
        "bytes_per_round": per_client * taking_part,
        "memory_bytes": peak_memory_bytes(),
        "gpu_memory_bytes": torch.cuda.max_memory_allocated() if cuda else 0,
        "seconds_per_step": statistics.median(a_step),
        "seconds": median,
        "seconds_least": least,
        "seconds_most": most,
        "fast_paths": list(prepared.adapted.fast.names()),
        **({"split": parted} if parted else {}),
        "notes": [*prepared.notes, *forecast_of(prepared), *([note_of(parted)] if parted else [])],
    }


def _message_bytes(prepared: Prepared) -> tuple[int, int]:
    """Bytes of a request and of a reply, as a round in the middle of a run sends them."""
    federation, sent = prepared.config.federation, []
    parts = method(federation).schedule(1)
    down = outgoing(method(federation).sent(prepared.initial, {}), parts)
    for link, tensors in ((federation.download, down), (federation.upload, returned(down, parts))):
        packed = pack(tensors, link, seed=0)
        sent.append(len(encode(Request("train", 1, "client", packed), zstd=link.zstd)))
    return sent[0], sent[1]


def _measure(prepared: Prepared) -> list[float]:
    """Seconds of an optimiser step in short rounds on the largest client, after one round to warm up."""
    largest = max(prepared.clients.values(), key=len)
    settings = prepared.config.training.model_copy(update={"max_steps": CALIBRATION_STEPS})
    rounds = [
        train_round(prepared.adapted, prepared.initial, largest, settings=settings, place=RoundPlace(seed=number))
        for number in range(CALIBRATION_ROUNDS + 1)
    ]
    return [result.seconds / result.steps for result in rounds[1:]]


def _measured(scorer: SetScorer, prepared: Prepared) -> list[float]:
    """Seconds of scoring a set: of one that takes long a single time, of others several after one to warm up."""
    taken: list[float] = []
    while len(taken) <= CALIBRATION_ROUNDS and sum(taken) < SCORING_SECONDS:
        began = time.perf_counter()
        scorer(prepared.initial)
        taken.append(time.perf_counter() - began)
    return taken[1:] or taken


def _scorings(config: Config, num_clients: int) -> int:
    counts = {
        "federated": config.federation.rounds // config.evaluation.every + 1,
        "centralized": 1,
        "isolated": num_clients,
    }
    return sum(counts[mode] for mode in config.federation.modes)


def _selections(config: Config, num_clients: int) -> int:
    """How often the selection set is scored: equally often in each mode, and by every institution when isolated."""
    looks = math.ceil(config.federation.rounds / config.evaluation.select_every)
    return looks * sum(num_clients if mode == "isolated" else 1 for mode in config.federation.modes)
