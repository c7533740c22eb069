"""What a finished run says of itself, each value with its source file and that file's SHA-256; nothing is guessed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from silotune.errors import RunFolderError, SilotuneError
from silotune.experiment.audit import trail_of
from silotune.record.audit import FILE
from silotune.record.chain import read_chain
from silotune.record.files import explained
from silotune.record.printable import counted, one_line
from silotune.report.audit import verdict_of
from silotune.report.watched import inner, number, whole, word

UNKNOWN = "not known to silotune"
_LARGEST = 1 << 26
_MOST_LINES = 50
_GIVEN = "--base-flops, given by whoever wrote this"
_FLOPS_PER_WEIGHT_AND_TOKEN = 6
"""Of a forward and a backward pass (Kaplan et al. 2020)."""


@dataclass(frozen=True, slots=True)
class Fact:
    """A value as text, and where it is from; ``UNKNOWN`` where no file says it."""

    label: str
    value: str
    source: str
    sha256: str

    @property
    def is_known(self) -> bool:
        """Whether a file of the run says it."""
        return self.value != UNKNOWN


class Sources:
    """The files of a run folder, each read once, so that a value and its file's SHA-256 are of the same bytes.

    Args:
        folder: The run folder; what is in it comes from elsewhere and is trusted in nothing.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.hashes: dict[str, str] = {}
        self._read: dict[str, Any] = {}

    def document(self, name: str) -> dict[str, Any]:
        """The object in a JSON file, or the first one of a file of rows; empty where there is no such file.

        Raises:
            RunFolderError: It is a link, too large, or not JSON.
        """
        if name not in self._read:
            self._read[name] = self._opened(name)
        return self._read[name]

    def _opened(self, name: str) -> dict[str, Any]:
        place = self.folder / name
        with explained(place):
            if place.is_symlink() or any(each.is_symlink() for each in place.parents if self.folder in each.parents):
                raise RunFolderError(f"{str(place)!r} is a link, and links are not followed: put the file itself there")
            if not place.is_file():
                return {}
            if place.stat().st_size > _LARGEST:
                raise RunFolderError(f"{str(place)!r} is larger than {_LARGEST} bytes, which no run writes")
            content = place.read_bytes()
        self.hashes[name] = hashlib.sha256(content).hexdigest()
        try:
            read = json.loads(content.partition(b"\n")[0] if name.endswith(".jsonl") else content)
        except (ValueError, RecursionError):
            raise RunFolderError(f"{str(place)!r} is not valid JSON: the file was changed or damaged") from None
        return read if isinstance(read, dict) else {}

    def fact(self, label: str, name: str, value: Any, *, unit: str = "") -> Fact:
        """A value out of one of the files that ``document`` gave."""
        text = _text(value)
        if not text:
            return Fact(label, UNKNOWN, "", "")
        return Fact(label, f"{text} {unit}".rstrip(), name, self.hashes.get(name, ""))


def _text(value: Any) -> str:
    """A value of a file for people; empty where it is none."""
    if isinstance(value, list):
        return "; ".join(filter(None, (_text(each) for each in value[:_MOST_LINES] if not isinstance(each, list))))
    if isinstance(value, str):
        return one_line(value[:2000])
    if isinstance(value, float):
        return f"{value:.6g}"
    return word(value)


def facts_of(sources: Sources, base_flops: float | None = None) -> Mapping[str, Fact]:
    """Name -> fact, of the run as a whole.

    Args:
        sources: The run's files.
        base_flops: Operations that the base's own training took; None where nobody said it.

    Raises:
        RunFolderError: The run is not finished, or a file of it is broken.
    """
    summary, config = sources.document("summary.json"), sources.document("config.json")
    if not summary:
        raise RunFolderError(
            f"{str(sources.folder)!r} is not finished: it holds no summary.json; 'silotune resume' goes on with it"
        )
    made = {name: sources.fact(label, "summary.json", summary.get(name)) for name, label in _SUMMARY.items()}
    for name, (label, *path) in _CONFIG.items():
        made[name] = sources.fact(label, "config.json", inner(config, *path[:-1]).get(path[-1]))
    made |= _figures(sources, summary) | _privacy(sources) | _compute(sources, summary, base_flops) | _leakage(sources)
    partition = sources.document("partition.json")
    made["examples"] = sources.fact("training examples", "partition.json", whole(partition, "num_examples"))
    clients = inner(partition, "clients")
    made["institutions"] = sources.fact("institutions", "partition.json", len(clients) or None)
    made["data_sha256"] = sources.fact("SHA-256 of data", "partition.json", partition.get("data_sha256"))
    versions = sources.document("versions.json")
    for name, label in (("python", "Python"), ("platform", "platform"), ("machine", "processor")):
        made[name] = sources.fact(label, "versions.json", versions.get(name))
    adapter = sources.folder / "federated" / "adapter" / "adapter_model.safetensors"
    made["adapter_sha256"] = _file_fact(sources, "SHA-256 of the adapter", adapter)
    return made | _ledgers(sources) | _audit(sources)


_SUMMARY = {
    "task": "task", "model": "base model", "adapter": "adapter", "algorithm": "algorithm", "lora": "rule for LoRA",
    "metric": "metric", "split": "measured on", "budget": "budget of training", "seed": "seed",
    "bytes_up": "bytes from institutions", "bytes_down": "bytes to institutions", "seconds": "seconds",
    "peak_memory_bytes": "most bytes of memory", "notes": "notes of the run",
}  # fmt: skip
_CONFIG = {
    "revision": ("revision of the base", "model", "revision"),
    "precision": ("precision of the base", "model", "precision"),
    "partition": ("how institutions hold data", "data", "partition", "scheme"),
    "rounds": ("rounds planned", "federation", "rounds"),
    "dp": ("differential privacy", "privacy", "dp", "type"),
    "protection": ("protection of updates in a round", "privacy", "protection", "type"),
    "audit_on": ("audit trail asked for", "record", "audit"),
    "learning_rate": ("learning rate", "training", "learning_rate"),
    "batch_size": ("batch size", "training", "batch_size"),
}


def _figures(sources: Sources, summary: Mapping[str, Any]) -> dict[str, Fact]:
    metric = str(summary.get("metric"))
    federated = inner(summary, "federated")
    return {
        "figure": sources.fact(f"{word(metric)} of the federated model", "summary.json", number(federated, metric)),
        "interval": sources.fact("its 95 % interval", "summary.json", federated.get(f"{metric}_interval")),
        "base_figure": sources.fact(
            f"{word(metric)} before training", "summary.json", number(inner(summary, "base"), metric)
        ),
    }


def _privacy(sources: Sources) -> dict[str, Fact]:
    read, result = sources.document("privacy.json"), sources.document("federated/result.json")
    spent = inner(result, "privacy")
    return {
        "promise": sources.fact("what the run promises", "privacy.json", read.get("statement")),
        "epsilon": sources.fact("epsilon that was spent", "federated/result.json", number(spent, "epsilon")),
        "delta": sources.fact("at delta", "federated/result.json", number(spent, "delta")),
    }


def _ledgers(sources: Sources) -> dict[str, Fact]:
    """How many ledgers of privacy there are; each of them is among the sources, by hash."""
    part = sources.folder / "federated"
    with explained(part):
        places = [part / "ledger.jsonl", *sorted((part / "ledger").glob("*.jsonl"))]
    known = [each for each in (_file_fact(sources, "", place) for place in places) if each.is_known]
    value = f"{counted(len(known), 'file')}, with SHA-256 on the first page" if known else UNKNOWN
    return {"ledger": Fact("privacy ledgers", value, "federated" if known else "", "")}


def _compute(sources: Sources, summary: Mapping[str, Any], base_flops: float | None) -> dict[str, Fact]:
    """What fine-tuning took; no file says what the base's own training took, so without being told the share of it
    stays unknown."""
    cost, started = inner(summary, "federated", "cost"), sources.document("events.jsonl")
    tokens, weights = number(cost, "tokens"), number(started, "num_parameters")
    flops = None if not tokens or not weights else _FLOPS_PER_WEIGHT_AND_TOKEN * tokens * weights
    both = [sources.fact("", name, flops) for name in ("summary.json", "events.jsonl")]
    source, sha256 = " and ".join(each.source for each in both), " and ".join(each.sha256 for each in both)
    value, source, sha256 = (UNKNOWN, "", "") if flops is None else (f"{flops:.6g}", source, sha256)
    given = Fact("", UNKNOWN, "", "") if base_flops is None else Fact("", f"{base_flops:.6g}", _GIVEN, "")
    share = Fact("", UNKNOWN, "", "")
    if flops is not None and base_flops is not None:
        share = Fact("", f"{flops / base_flops:.3g}", f"{source}, and {_GIVEN}", sha256)
    return {
        "tokens": sources.fact("tokens trained on", "summary.json", whole(cost, "tokens")),
        "joules": sources.fact("energy", "summary.json", number(cost, "joules"), unit="J"),
        "co2": sources.fact("CO2", "summary.json", number(cost, "co2_kg"), unit="kg"),
        "parameters": sources.fact("weights of the base", "events.jsonl", whole(started, "num_parameters")),
        "trainable": sources.fact("weights that were trained", "events.jsonl", whole(started, "trainable")),
        "flops": Fact("operations of fine-tuning, as 6 x weights x tokens", value, source, sha256),
        "base_flops": replace(given, label="operations of the base's own training"),
        "share": replace(share, label="share of the base's training compute that fine-tuning took"),
    }


def _leakage(sources: Sources) -> dict[str, Fact]:
    name = "leakage/leakage.json"
    figures = sources.document(name).get("figures")
    says = [figure.get("says") for figure in figures if isinstance(figure, dict)] if isinstance(figures, list) else None
    return {"leakage": sources.fact("what attacks on this run found", name, says)}


def _audit(sources: Sources) -> dict[str, Fact]:
    """The verdict on the trail as it is now, and what its first entry says of run and charter."""
    label, name = "verdict on the audit trail, when this was written", f"federated/{FILE}"
    try:
        first = read_chain(trail_of(sources.folder))[:1]
        verdict = verdict_of(sources.folder)
    except SilotuneError as error:
        first, verdict = [], f"DOES NOT VERIFY: {error}" if (sources.folder / name).is_file() else ""
    made = {"audit": _file_fact(sources, label, sources.folder / name, value=one_line(verdict))}
    fields = first[0].fields if first else {}
    made["charter"] = sources.fact("SHA-256 of the charter", name, fields.get("charter_sha256"))
    made["policies"] = Fact("policies of the institutions, by hash", UNKNOWN, "", "")
    return made


def _file_fact(sources: Sources, label: str, place: Path, *, value: str | None = None) -> Fact:
    """A fact that a whole file is the source of: its SHA-256, or what is said of it."""
    with explained(place):
        if place.is_symlink() or not place.is_file() or value == "":
            return Fact(label, UNKNOWN, "", "")
        with place.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    name = place.relative_to(sources.folder).as_posix()
    sources.hashes[name] = digest
    return Fact(label, digest if value is None else value, name, digest)
