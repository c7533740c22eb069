"""Reads what the runs of a grid measured: one observation a cell and mode, whatever its version has measured.

What a run did not measure is None, and is shown as "unavailable"; nothing is put in its place.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast, get_args

from silotune.evaluation.metrics import answers_one_class, best_and_worst, majority
from silotune.record.energy import EnergySource, weakest
from silotune.record.grids import Cell, GridFolder, is_known
from silotune.record.runs import RunFolder

MODES = ("isolated", "federated", "centralized")
QUALITIES = (
    "accuracy", "macro_f1", "perplexity", "loss", "unparsed", "ece", "preference_accuracy",
    "gain", "win_rate", "margin",
)  # fmt: skip
SUMMED = (
    "seconds", "evaluate_seconds", "steps", "core_seconds", "bytes_up", "bytes_down", "tokens", "joules", "co2_kg",
)  # fmt: skip
_FURTHER = (
    "own", "worst", "base", "majority", "one_class", "forgetting_base", "forgetting_tuned", "personal",
    "aggregation_error",
)  # fmt: skip
"""Further figures of ``Observation.quality``."""
HIGHEST = ("slowest_seconds", "peak_memory_bytes", "gpu_peak_memory_bytes", "trainable_parameters")


@dataclass(frozen=True, slots=True)
class Observation:
    """One mode of one cell.

    Attributes:
        cell: The cell.
        mode: ``isolated`` (the mean over the institutions), ``federated`` or ``centralized``.
        metric: What ranks models of the task.
        quality: Figures on the common set; ``own`` and ``worst`` are the metric on the institutions' own sets, mean
            and worst; ``forgetting_base`` and ``forgetting_tuned`` are perplexities of general text; ``personal`` is
            the metric of the institutions' own models over their own sets together; ``aggregation_error`` how far
            averaging LoRA's factors is from averaging their products, mean over the rounds; ``majority`` is the metric
            of always giving the most frequent answer, ``one_class`` the share of models that give one answer to all.
        cost: What it cost, all institutions together; ``bytes`` is both ways; ``passes`` over the examples are the
            mean; memory is the most of any, and so are ``slowest_seconds``, and ``epsilon`` and ``delta`` of
            differential privacy.
        energy_source: ``measured``, ``estimated`` or ``unavailable``.
        energy_method: How, in words.
        per_class: Class -> F1; of isolated institutions the mean.
        by_client: Institution -> the metric on its own set.
        spread: Of the isolated institutions on the common set: ``best`` and ``worst``.
    """

    cell: Cell
    mode: str
    metric: str
    quality: Mapping[str, float | None]
    cost: Mapping[str, float | None]
    energy_source: EnergySource
    energy_method: str
    per_class: Mapping[str, float]
    by_client: Mapping[str, float]
    spread: Mapping[str, float]


def observe(folder: GridFolder) -> list[Observation]:
    """The observations of all cells that have run to their end, in the order of the grid.

    Raises:
        RunFolderError: A run folder is damaged.
    """
    found, known = [], folder.known()
    for cell in folder.cells():
        if folder.is_done(cell):
            found += _of_cell(cell, folder.run(cell))
        elif is_known(cell, known):
            found += [_of_row(cell, mode, known[cell.portable, mode]) for mode in MODES if mode in cell.modes]
    return found


def _of_row(cell: Cell, mode: str, row: Mapping[str, str]) -> Observation:
    """What a report said of a cell that was run elsewhere; an empty field was not measured."""

    def number(name: str) -> float | None:
        return float(row[name]) if row.get(name) else None

    quality = {name: number(name) for name in (*QUALITIES, *_FURTHER)}
    cost = {name: number(name) for name in (*SUMMED, *HIGHEST, "passes", "epsilon", "delta")}
    ends = {which: number(f"{which}_alone") for which in ("best", "worst")}
    source = row.get("energy_source", "")
    return Observation(
        cell=cell,
        mode=mode,
        metric=row["metric"],
        quality=quality,
        cost={**cost, "bytes": _summed([cost["bytes_up"], cost["bytes_down"]])},
        energy_source=cast(EnergySource, source if source in get_args(EnergySource) else "unavailable"),
        energy_method=row.get("energy_method", ""),
        per_class=json.loads(row.get("per_class") or "{}"),
        by_client=json.loads(row.get("by_client") or "{}"),
        spread={which: value for which, value in ends.items() if value is not None},
    )


def _of_cell(cell: Cell, run: RunFolder) -> list[Observation]:
    summary = run.read_json("summary")
    metric = str(summary["metric"])
    started = next((row for row in run.read_rows("events") if row.get("event") == "run_started"), {})
    base = {name: (summary.get("base") or {}).get(name) for name in (metric,)}
    found = []
    for mode in MODES:
        if mode not in cell.modes:
            continue
        place = run.part(mode)
        names = place.parts() if mode == "isolated" else [""]
        results = {name: (place.part(name) if name else place).read_json("result") for name in names}
        found.append(_observation(cell, mode, metric, results, {"base": base[metric], **started}))
    return found


def _observation(
    cell: Cell, mode: str, metric: str, results: Mapping[str, Mapping[str, Any]], known: Mapping[str, Any]
) -> Observation:
    parts = list(results.values())
    quality = {name: mean_of_all([_number(part["metrics"].get(name)) for part in parts]) for name in QUALITIES}
    own = _own(mode, metric, results)
    best, worst = best_and_worst(metric)
    quality["own"] = statistics.fmean(own.values()) if own else None
    quality["worst"] = worst(list(own.values())) if own else None
    quality["base"] = _number(known.get("base"))
    quality["majority"] = mean_of_all([_number((majority(part["metrics"]) or {}).get(metric)) for part in parts])
    quality["one_class"] = statistics.fmean(answers_one_class(part["metrics"]) for part in parts)
    for which in ("base", "tuned"):
        quality[f"forgetting_{which}"] = mean_of_all([_forgetting(part, which) for part in parts])
    own_models = [((part.get("personal") or {}).get("metrics") or {}).get(metric) for part in parts]
    quality["personal"] = mean_of_all([_number(value) for value in own_models])
    errors = [(part.get("aggregation_error") or {}).get("mean") for part in parts]
    quality["aggregation_error"] = mean_of_all([_number(value) for value in errors])
    cost: dict[str, float | None] = {name: _summed([_cost(part, name) for part in parts]) for name in SUMMED}
    cost.update({name: _highest([_cost(part, name) for part in parts]) for name in HIGHEST})
    if cost["trainable_parameters"] is None:
        cost["trainable_parameters"] = _number(known.get("trainable"))
    cost.update({name: _highest([_spent(part, name) for part in parts]) for name in ("epsilon", "delta")})
    cost["passes"] = mean_of_all([_cost(part, "passes") for part in parts])
    cost["bytes"] = _summed([cost["bytes_up"], cost["bytes_down"]])
    source = _energy_source(parts)
    if source == "unavailable":
        cost["joules"] = cost["co2_kg"] = None
    values = [part["metrics"][metric] for part in parts]
    return Observation(
        cell=cell,
        mode=mode,
        metric=metric,
        quality=quality,
        cost=cost,
        energy_source=source,
        energy_method="; ".join(dict.fromkeys(filter(None, (_energy_method(part) for part in parts)))),
        per_class=_per_class(parts),
        by_client=own,
        spread={"best": best(values), "worst": worst(values)} if mode == "isolated" else {},
    )


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def mean_of_all(values: Sequence[float | None]) -> float | None:
    """None unless all are known: a mean of some institutions would be another figure."""
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known and len(known) == len(values) else None


def _summed(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) if known and len(known) == len(values) else None


def _highest(values: Sequence[float | None]) -> float | None:
    return max((value for value in values if value is not None), default=None)


def _cost(result: Mapping[str, Any], name: str) -> float | None:
    """One cost, from the part's ``cost`` where it has one, else from what every result holds."""
    cost = result.get("cost") or {}
    return _number(cost.get(name)) if name in cost else _number(result.get(name))


def _spent(result: Mapping[str, Any], name: str) -> float | None:
    """The epsilon or delta of a result under differential privacy."""
    return _number((result.get("privacy") or {}).get(name))


def _energy_source(parts: Sequence[Mapping[str, Any]]) -> EnergySource:
    known = [str((part.get("cost") or {}).get("energy_source", "unavailable")) for part in parts]
    return weakest(cast(EnergySource, name if name in get_args(EnergySource) else "unavailable") for name in known)


def _energy_method(result: Mapping[str, Any]) -> str:
    return str((result.get("cost") or {}).get("energy_method") or "")


def _own(mode: str, metric: str, results: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """Institution -> the metric on its own set: of an isolated model on its own institution's alone."""
    found: dict[str, float] = {}
    for name, result in results.items():
        for client, figures in (result.get("by_client") or {}).items():
            value = _number(figures.get(metric)) if isinstance(figures, Mapping) else None
            if value is not None and (mode != "isolated" or client == name):
                found[client] = value
    return found


def _forgetting(result: Mapping[str, Any], which: str) -> float | None:
    """Perplexity of a general text before (``base``) or after (``tuned``) training."""
    return _number((result.get("forgetting") or {}).get(f"{which}_perplexity"))


def _per_class(parts: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    names = (parts[0]["metrics"].get("per_class") or {}) if parts else {}
    return {
        name: statistics.fmean(part["metrics"]["per_class"][name]["f1"] for part in parts)
        for name in names
        if all(name in (part["metrics"].get("per_class") or {}) for part in parts)
    }
