"""The papers of a finished run for a data-protection officer: pages and bills of materials in one signed folder."""

from __future__ import annotations

import math
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from silotune.errors import ConfigError, RunFolderError
from silotune.record.envelope import sign_folder
from silotune.record.environment import version_of
from silotune.record.files import explained, new_folder, write_bytes, write_json
from silotune.record.runs import RunFolder
from silotune.record.signatures import SigningKey
from silotune.report.dossier_facts import UNKNOWN, Fact, Sources, facts_of
from silotune.report.dossier_papers import PAPERS, Part
from silotune.report.rendering import rendered
from silotune.report.watched import inner, number, whole, word

KIND = "urn:silotune:dossier:v1"
"""What the signed statement is about."""
INDEX, ML_BOM, SBOM = "index.html", "ml-bom.cdx.json", "sbom.cdx.json"
MOST_INSTITUTIONS = 10_000
NOTICE = (
    "These papers are no legal advice and no assessment: software filled in what the run's own files say. "
    f"What no file says is marked '{UNKNOWN}'; whatever is to be judged is left to a person. "
    "Points of laws and templates are named in short: hold them against their own texts."
)
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"


@dataclass(frozen=True, slots=True)
class Shown:
    """A section of a page."""

    title: str
    says: str = ""
    facts: Sequence[Fact] = ()
    judgements: Sequence[str] = ()
    links: Sequence[tuple[str, str]] = ()


def write_dossier(run: Path, out: Path, key: SigningKey, *, base_flops: float | None = None) -> list[str]:
    """Writes the papers of a run and signs them.

    Args:
        run: The folder of a finished run; it is only read.
        out: A folder that is not there yet, or is empty.
        key: Signs.
        base_flops: Operations that the base's own training took, which no file of a run says.

    Returns:
        Names of what was written in it.

    Raises:
        RunFolderError: It is no run folder, the run is not finished, a file of it is broken, or ``out`` cannot be
            written.
        ConfigError: ``out`` is there and holds something, or lies in the run folder; ``base_flops`` is not above 0.
    """
    if base_flops is not None and not (math.isfinite(base_flops) and base_flops > 0):
        raise ConfigError(f"--base-flops {base_flops}: give a number above 0, such as 6e20, or leave it out")
    folder = RunFolder.open(run).path
    with explained(out):
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise ConfigError(f"{str(out)!r} is there and not empty: give a folder that is not there yet")
        if out.resolve().is_relative_to(folder.resolve()):
            raise ConfigError(f"{str(out)!r} lies in the run folder, which is only read: give a folder outside")
    sources = Sources(folder)
    facts = facts_of(sources, base_flops)
    name = word(folder.resolve().name)
    with new_folder(out) as building:
        links = []
        for place, title, parts in PAPERS:
            _write_page(building / place, f"{title} of {name}", [_shown(part, facts) for part in parts])
            links.append((place, title))
        sheets = list(_datasheets(sources))
        for place, title, section in sheets:
            _write_page(building / place, title, [section])
        write_json(building / ML_BOM, ml_bom(facts, name))
        write_json(building / SBOM, sbom(sources, name))
        links += [(ML_BOM, "Machine-learning bill of materials (CycloneDX 1.6)")]
        links += [(SBOM, "Software bill of materials of the run's environment (CycloneDX 1.6)")]
        files = [Fact(source, "read", source, digest) for source, digest in sorted(sources.hashes.items())]
        sections = [
            Shown("Papers", links=links),
            Shown("Datasheets", "Counts only; one for each institution.", links=[sheet[:2] for sheet in sheets]),
            Shown("Files of the run that these papers are from", facts=files),
        ]
        _write_page(building / INDEX, f"Dossier of {name}", sections)
        about = {"run": name, "sources": dict(sources.hashes), "written": _now(), "silotune": version_of("silotune")}
        sign_folder(building, key, kind=KIND, about=about)
        return sorted(path.name for path in building.iterdir())


def _write_page(place: Path, title: str, sections: Sequence[Shown]) -> None:
    view = {"title": title, "notice": NOTICE, "policy": _POLICY, "sections": sections}
    write_bytes(place, rendered("dossier.html.jinja", view).encode())


def _shown(part: Part, facts: Mapping[str, Fact]) -> Shown:
    return Shown(part.title, part.says, [facts[name] for name in part.facts], part.judgements)


def _datasheets(sources: Sources) -> Iterator[tuple[str, str, Shown]]:
    """Place, title and section of each institution's sheet; files are numbered, as names come from elsewhere."""
    partition = sources.document("partition.json")
    clients = inner(partition, "clients")
    if len(clients) > MOST_INSTITUTIONS:
        raise RunFolderError(f"partition.json names {len(clients)} institutions; a dossier has {MOST_INSTITUTIONS}")
    own = inner(sources.document("federated/result.json"), "by_client")
    for index, client in enumerate(clients, start=1):
        row, labels = inner(clients, client), inner(clients, client, "labels")
        facts = [sources.fact("training examples", "partition.json", whole(row, "num_examples"))]
        facts += [
            sources.fact(f"examples of {word(label)}", "partition.json", whole(labels, label)) for label in labels
        ]
        facts.append(
            sources.fact("distance from the whole (0 like it, 1 unlike)", "partition.json", number(row, "distance"))
        )
        tested = whole(inner(own, client), "num_examples")
        facts.append(sources.fact("test examples of its own", "federated/result.json", tested))
        facts.append(Fact("how and from whom the data were collected; legal basis", UNKNOWN, "", ""))
        title = f"Datasheet of {word(client)}"
        yield f"datasheet-{index:05d}.html", title, Shown("Counts", "No example is shown or repeated.", facts)


def ml_bom(facts: Mapping[str, Fact], name: str) -> dict[str, Any]:
    """The trained adapter and its base as a CycloneDX machine-learning bill of materials."""
    adapter: dict[str, Any] = {
        "type": "machine-learning-model",
        "bom-ref": "adapter",
        "name": f"{name} adapter",
        "pedigree": {"ancestors": [{"type": "machine-learning-model", "name": facts["model"].value}]},
        "modelCard": {
            "modelParameters": {
                "approach": {"type": "supervised"},
                "task": facts["task"].value,
                "architectureFamily": facts["adapter"].value,
            },
            "quantitativeAnalysis": {
                "performanceMetrics": [
                    {"type": facts[each].label, "value": facts[each].value}
                    for each in ("figure", "base_figure")
                    if facts[each].is_known
                ]
            },
        },
        "properties": [
            {"name": f"silotune:{each}", "value": facts[each].value} for each in ("algorithm", "dp", "protection")
        ],
    }
    if facts["adapter_sha256"].is_known:
        adapter["hashes"] = [{"alg": "SHA-256", "content": facts["adapter_sha256"].value}]
    base = {"type": "machine-learning-model", "bom-ref": "base", "name": facts["model"].value}
    return _bom([adapter, base], name) | {"dependencies": [{"ref": "adapter", "dependsOn": ["base"]}]}


def sbom(sources: Sources, name: str) -> dict[str, Any]:
    """The packages that the run recorded, as a CycloneDX software bill of materials."""
    versions = sources.document("versions.json")
    packages = {**inner(versions, "packages"), **inner(versions, "plugins")}
    known = {word(package): word(version) for package, version in packages.items() if word(version)}
    rows = [{"type": "library", "name": package, "version": version} for package, version in sorted(known.items())]
    python = word(versions.get("python"))
    return _bom([*rows, *([{"type": "platform", "name": "python", "version": python}] if python else [])], name)


def _bom(components: Sequence[Mapping[str, Any]], name: str) -> dict[str, Any]:
    tool = {"type": "application", "name": "silotune", "version": version_of("silotune") or UNKNOWN}
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "serialNumber": f"urn:uuid:{uuid.uuid4()}",
        "version": 1,
        "metadata": {
            "timestamp": _now(),
            "tools": {"components": [tool]},
            "component": {"type": "application", "bom-ref": "run", "name": name},
        },
        "components": list(components),
    }


def _now() -> str:
    return datetime.fromtimestamp(time.time(), UTC).isoformat(timespec="seconds")
