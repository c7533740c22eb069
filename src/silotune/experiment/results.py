"""What a finished run says: the result of each part, and the comparison of the modes."""

from __future__ import annotations

import dataclasses
import math
import re
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from silotune.config import Config
from silotune.evaluation.metrics import answers_one_class, best_and_worst, majority
from silotune.methods.algorithms import title_of
from silotune.record.energy import Gauge, weakest
from silotune.record.runs import RunFolder
from silotune.settings.sections import TrainingSection
from silotune.structs import ServerState, Spent

COMPARED: Mapping[str, tuple[str, ...]] = {
    "accuracy": ("accuracy", "macro_f1"),
    "macro_f1": ("accuracy", "macro_f1"),
    "perplexity": ("perplexity", "loss"),
    "preference_accuracy": ("preference_accuracy", "gain", "win_rate", "margin"),
}
"""Metric of a task -> figures that the comparison of modes shows."""


SHOWN_COSTS = (
    "steps", "passes", "slowest_seconds", "core_seconds", "joules", "co2_kg", "energy_source", "peak_memory_bytes",
    "gpu_peak_memory_bytes", "trainable_parameters", "tokens",
)  # fmt: skip
"""The fields of a part's cost that the summary repeats."""


_LONGEST_PART = 60
"""The most characters of a run's name: a model may be named by a long path."""


def default_name(config: Config) -> str:
    """Name of a run folder: task, last part of the model's name, adapter, seed."""
    parts = (config.data.task, config.model.name.rstrip("/").split("/")[-1], config.adapter.type, f"seed{config.seed}")
    return "-".join(re.sub(r"[^A-Za-z0-9._]", "-", part)[:_LONGEST_PART] for part in parts)


def result_of(folder: RunFolder, state: ServerState, *, metrics: Mapping[str, Any], keep: str) -> dict[str, Any]:
    """The result of one run of rounds: final metrics, cost, and how it ended.

    ``seconds`` is training with aggregation and messages; scoring is counted apart.
    """
    rows = folder.read_rows("metrics")
    return {
        "split": metrics["split"],
        "num_examples": metrics["num_examples"],
        "metrics": {name: value for name, value in metrics.items() if name not in ("split", "num_examples")},
        "round": state.best_round if keep == "best" else state.round_number,
        "rounds": state.round_number,
        "stopped": state.stopped,
        "seconds": sum(row["train_seconds"] for row in rows),
        "evaluate_seconds": sum(row["evaluate_seconds"] for row in rows),
        "bytes_up": state.bytes_up,
        "bytes_down": state.bytes_down,
        "aggregation_error": _errors(rows),
        **({"simulated_seconds": state.simulated_seconds} if state.simulated_seconds else {}),
    }


def _errors(rows: Sequence[Mapping[str, Any]]) -> dict[str, float] | None:
    """Mean, largest and last aggregation error of the rounds; None where no round has one."""
    known = [row["aggregation_error"] for row in rows if row.get("aggregation_error") is not None]
    return {"mean": statistics.fmean(known), "largest": max(known), "last": known[-1]} if known else None


def own_of(by_client: Mapping[str, Mapping[str, Any]], metric: str) -> dict[str, Any]:
    """``by_client`` and, among the clients that have test examples of their own, the one served worst."""
    scored = {name: own for name, own in by_client.items() if own["num_examples"]}
    if not scored:  # the sites' examples are elsewhere
        return {"by_client": by_client}
    _, worst = best_and_worst(metric)
    name = worst(scored, key=lambda client: float(scored[client][metric]))
    return {
        "by_client": by_client,
        "worst_client": {"client": name, "num_examples": scored[name]["num_examples"], metric: scored[name][metric]},
    }


def cost_of(
    folder: RunFolder, result: Mapping[str, Any], training: TrainingSection, *, trainable: int, gauge: Gauge
) -> dict[str, Any]:
    """What a run of rounds took, from its rows, so that a resumed run counts all its sessions.

    ``core_seconds`` and ``joules`` are the clients' training and the coordinator's aggregation and messages; scoring
    stands apart under ``evaluation``. ``joules`` is null where any share of it is not known. ``steps`` are all clients'
    together, ``passes`` how often they went over their examples, on average; ``slowest_seconds`` is what the training
    takes where every client has hardware of its own: of each round the time of its slowest client.
    """
    rounds, rows = folder.read_rows("metrics"), folder.read_rows("clients")
    costs = [row["cost"] for row in rounds]
    coordinator, evaluation = (_spent(cost[who] for cost in costs) for who in ("coordinator", "evaluation"))
    names = sorted({str(row["client"]) for row in rows})
    clients = {name: _client_cost([row for row in rows if row["client"] == name]) for name in names}
    spent = sum((Spent(own["core_seconds"] or 0.0, own["joules"]) for own in clients.values()), coordinator)
    gpu = [cost["gpu_peak_memory_bytes"] for cost in costs if cost["gpu_peak_memory_bytes"] is not None]
    steps, num_examples = sum(row["steps"] for row in rows), sum(_most_examples(rows).values())
    return {
        "steps": steps,
        "passes": steps * training.batch_size * training.gradient_accumulation / num_examples if num_examples else None,
        "slowest_seconds": _slowest_seconds(rows),
        "seconds": result["seconds"],
        "core_seconds": spent.core_seconds if _are_known(rows) else None,
        "peak_memory_bytes": max((cost["peak_memory_bytes"] for cost in costs), default=None),
        "gpu_peak_memory_bytes": max(gpu, default=None),
        "bytes_up": result["bytes_up"],
        "bytes_down": result["bytes_down"],
        "trainable_parameters": trainable,
        "tokens": sum(row["tokens"] for row in rows),
        "joules": spent.joules,
        "co2_kg": gauge.co2_kg(spent.joules),
        "energy_source": weakest(row["energy_source"] for row in (*costs, *rows)),
        "energy_method": gauge.method(),
        "clients": clients,
        "coordinator": coordinator,
        "evaluation": {"seconds": result["evaluate_seconds"], **dataclasses.asdict(evaluation)},
    }


def _most_examples(rows: Iterable[Mapping[str, Any]]) -> dict[str, int]:
    """Client, or all that are hidden in a protected sum -> the most training examples it had in a round."""
    found: dict[str, int] = {}
    for row in rows:
        found[row["client"]] = max(found.get(row["client"], 0), row["num_examples"])
    return found


def _slowest_seconds(rows: Sequence[Mapping[str, Any]]) -> float | None:
    """The slowest client of each round, added up; None where a client withholds its time, or hides in a sum."""
    if not _are_known(rows) or any("clients_in_sum" in row for row in rows):
        return None
    slowest: dict[int, float] = {}
    for row in rows:
        slowest[row["round"]] = max(slowest.get(row["round"], 0.0), row["seconds"])
    return sum(slowest.values())


def _spent(costs: Iterable[Mapping[str, Any]]) -> Spent:
    return sum((Spent(cost["core_seconds"] or 0.0, cost["joules"]) for cost in costs), Spent())


def _are_known(rows: Iterable[Mapping[str, Any]]) -> bool:
    """Whether all clients told what they took; under differential privacy they withhold it unless asked to."""
    return all(row["core_seconds"] is not None for row in rows)


def _client_cost(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    tokens = sum(row["tokens"] for row in rows)
    if not _are_known(rows):
        return {"seconds": None, "core_seconds": None, "joules": None, "tokens": tokens}
    seconds = sum(row["seconds"] for row in rows)
    return {"seconds": seconds, **dataclasses.asdict(_spent(rows)), "tokens": tokens}


def summarize(config: Config, folder: RunFolder, *, metric: str, budget: str) -> dict[str, Any]:
    """The comparison of all modes that a run folder holds, as one JSON object."""
    names = COMPARED[metric]
    summary: dict[str, Any] = {
        "task": config.data.task,
        "model": config.model.name,
        "adapter": config.adapter.type,
        "start": config.adapter.begins_from,
        "algorithm": title_of(config.federation),
        "lora": config.federation.lora.type,
        "seed": config.seed,
        "metric": metric,
        "budget_match": config.federation.budget_match,
        "budget": budget,
    }
    parts = [mode for mode in ("federated", "centralized") if folder.part(mode).has("result")]
    for mode in parts:
        summary[mode] = _figures(folder.part(mode), names)
    clients = {name: _figures(folder.part("isolated", name), names) for name in folder.part("isolated").parts()}
    if clients:
        summary["isolated"] = _isolated(clients, names, metric)
    shown = [summary[mode] for mode in (*parts, "isolated") if mode in summary]
    summary["split"] = shown[0]["split"]
    results = {names: folder.part(*names).read_json("result") for names in _places(parts, clients)}
    summary["majority"] = next((majority(result["metrics"]) for result in results.values()), None)
    summary["kept"] = _kept(config, results)
    summary["base"] = _base(folder, [(mode,) for mode in parts] + [("isolated", name) for name in clients], names)
    summary["stopped"] = _stopped(folder, [(mode,) for mode in parts], [("isolated", name) for name in clients])
    for cost in ("bytes_up", "bytes_down"):
        summary[cost] = summary["federated"][cost] if "federated" in summary else 0
    return summary


_TITLES: Mapping[str, str] = {"federated": "federated", "centralized": "centralised"}
_Places = tuple[str, ...]


def _places(modes: Iterable[str], alone: Iterable[str]) -> list[_Places]:
    return [*((mode,) for mode in modes), *(("isolated", name) for name in alone)]


def _kept(config: Config, results: Mapping[_Places, Mapping[str, Any]]) -> str:
    """Which round's model each mode kept, where it is the best one and not the last; else empty."""
    if config.evaluation.keep != "best":
        return ""
    said = [
        f"{_TITLES[places[0]]} {round_text(result)}" for places, result in results.items() if places[0] != "isolated"
    ]
    alone = sorted(int(result["round"]) for places, result in results.items() if places[0] == "isolated")
    if alone:
        said.append(f"each alone {alone[0]}" + (f" to {alone[-1]}" if alone[-1] > alone[0] else ""))
    return f"kept, as the best by the selection metric: round of {', '.join(said)}"


def round_text(result: Mapping[str, Any]) -> str:
    """The round of a model, and of how many: ``3 of 8``; that of round 0 is untrained."""
    return f"{result['round']} of {result['rounds']}" + ("" if result["round"] else " (untrained)")


def warnings_of(summary: Mapping[str, Any]) -> list[str]:
    """A line for each mode whose models are no result of training: they are untrained, or give one answer to all."""
    alone = (summary.get("isolated") or {}).get("clients", {})
    parts = {title: [summary[mode]] for mode, title in _TITLES.items() if summary.get(mode)}
    parts |= {"isolated": list(alone.values())} if alone else {}
    lines = []
    for title, models in parts.items():
        untrained = sum(model["round"] == 0 for model in models)
        constant = sum(model["answers_one_class"] for model in models)
        if untrained:
            lines.append(f"{title}: {_who(untrained, len(models), 'is', 'are')} that of round 0, which is {_UNTRAINED}")
        if constant:
            lines.append(f"{title}: {_who(constant, len(models), 'gives', 'give')} one answer to all: {_CONSTANT}")
    return lines


_UNTRAINED = (
    "untrained, as no round was better by the selection metric: try another training.learning_rate, more rounds or "
    "steps, or more selection examples"
)
_CONSTANT = "such a figure is that of the answer, not of learning; try another training.learning_rate, or more steps"


def _who(count: int, of: int, one: str, many: str) -> str:
    return f"the model {one}" if of == 1 else f"{count} of {of} models {one if count == 1 else many}"


def _stopped(folder: RunFolder, parts: Sequence[tuple[str, ...]], alone: Sequence[tuple[str, ...]]) -> list[str]:
    """A line for each mode that ended before its last round: there the steps are not those of the budget."""

    def ended(names: tuple[str, ...]) -> tuple[int, str]:
        result = folder.part(*names).read_json("result")
        return result["rounds"], result["stopped"]

    told = [(_TITLES[names[0]], *ended(names)) for names in parts]
    lines = [f"{title} stopped after round {rounds}: {why}" for title, rounds, why in told if why]
    early = sorted((rounds, why) for rounds, why in map(ended, alone) if why)
    if early:
        (first, why), (last, _) = early[0], early[-1]
        spread = f"after round {first}" + (f" to {last}" if last > first else "")
        lines.append(f"isolated: {len(early)} of {len(alone)} stopped {spread}: {why}")
    return lines


def _figures(folder: RunFolder, names: Sequence[str]) -> dict[str, Any]:
    result = folder.read_json("result")
    chosen = {name: result["metrics"][name] for name in names}
    intervals = {key: value for key, value in result["metrics"].items() if key.endswith("_interval")}
    shown = ("split", "num_examples", "round", "rounds", "seconds", "bytes_up", "bytes_down")
    costs = {key: result[key] for key in shown} | {"answers_one_class": answers_one_class(result["metrics"])}
    unparsed = {"unparsed": result["metrics"]["unparsed"]} if "unparsed" in result["metrics"] else {}
    error = {"ece": result["metrics"]["ece"]} if "ece" in result["metrics"] else {}
    own = {name: client.get(names[0]) for name, client in result["by_client"].items()}
    cost = {key: result["cost"][key] for key in SHOWN_COSTS}
    tasks = {"by_task": result["metrics"]["by_task"]} if "by_task" in result["metrics"] else {}
    forgot = {"forgetting": result["forgetting"]} if "forgetting" in result else {}
    spent = {"privacy": result["privacy"]} if "privacy" in result else {}
    off = result["aggregation_error"]
    product = {} if off is None else {"aggregation_error": off["mean"]}
    rest = {**forgot, **tasks, **spent, **product, **_personal(result, names)}
    return {**chosen, **error, **intervals, **unparsed, **costs, "own": own, "cost": cost, **rest}


def _personal(result: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """Figures of the clients' own models, each on its own share of the gold-standard set; empty without such models."""
    personal = result.get("personal", {})
    if "metrics" not in personal:
        return {}
    metrics = personal["metrics"]
    shown = {key: value for key, value in metrics.items() if key in names or key.endswith("_interval")}
    by_client = {name: row["own"][names[0]] for name, row in personal["by_client"].items()}
    return {"personal": {**shown, "num_examples": personal["num_examples"], "own": by_client}}


def _isolated(clients: Mapping[str, dict[str, Any]], names: Sequence[str], metric: str) -> dict[str, Any]:
    best, worst = best_and_worst(metric)
    figures: dict[str, Any] = {}
    for name in names:
        values = [float(client[name]) for client in clients.values()]
        figures[name] = {"mean": statistics.fmean(values), "best": best(values), "worst": worst(values)}
    errors = [float(client["ece"]) for client in clients.values() if "ece" in client]
    if errors:
        figures["ece"] = {"mean": statistics.fmean(errors), "best": min(errors), "worst": max(errors)}
    figures["own"] = {name: client["own"].get(name) for name, client in clients.items()}
    figures["cost"] = _summed([client["cost"] for client in clients.values()])
    if all("privacy" in client for client in clients.values()):
        figures["privacy"] = max((client["privacy"] for client in clients.values()), key=_known_epsilon)
    first = next(iter(clients.values()))
    figures.update(split=first["split"], num_examples=first["num_examples"])
    figures["seconds"] = sum(client["seconds"] for client in clients.values())
    return {**figures, "bytes_up": 0, "bytes_down": 0, "clients": dict(clients)}


def _known_epsilon(spent: Mapping[str, Any]) -> float:
    """Epsilon for finding the largest of several; an unknown one counts as infinite."""
    return math.inf if spent["epsilon"] is None else float(spent["epsilon"])


def _summed(costs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The costs of several parts together; null where one is not known."""
    made: dict[str, Any] = {"energy_source": weakest(cost["energy_source"] for cost in costs)}
    for key in SHOWN_COSTS:
        values = [cost[key] for cost in costs]
        if key != "energy_source":
            made[key] = None if None in values else _TOGETHER.get(key, sum)(values)
    return made


_TOGETHER: Mapping[str, Callable[[Sequence[float]], float]] = {
    "trainable_parameters": max,
    "peak_memory_bytes": max,
    "gpu_peak_memory_bytes": max,
    "slowest_seconds": max,
    "passes": statistics.fmean,
}
"""How the costs of several institutions become one where they are not added up."""


def _base(folder: RunFolder, parts: Sequence[tuple[str, ...]], names: Sequence[str]) -> dict[str, Any] | None:
    """Figures before any training, from the first part that scored them."""
    for part in parts:
        rows = [row for row in folder.part(*part).read_rows("metrics") if row["round"] == 0]
        if rows:
            return {name: rows[0][name] for name in names}
    return None
