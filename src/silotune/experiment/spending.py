"""What the run folder says of privacy: before a run what is planned, after it what was spent, from ledgers and reports.

A round that is repeated after a kill or a failure is spent twice, so a plan is never reported as what a run spent.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from silotune.config import Config
from silotune.experiment.privacy import achieved, as_json, plan_of, statement
from silotune.federation.coordinator.privacy import ENTRIES, LEDGER
from silotune.privacy.accountant import Spend
from silotune.privacy.ledger import Entry, from_row, spent, union
from silotune.record.files import read_lines
from silotune.record.runs import RunFolder

FILE = "privacy"
"""Name of the run folder's file: the run's identity in ledgers, the statement, the plan, in the end what was spent."""


def declared(
    config: Config,
    folder: RunFolder,
    sizes: Mapping[str, int],
    *,
    run: str | None = None,
    beside: Sequence[str] = (),
) -> list[str]:
    """The promise of a run; it is written once, with the plan, and a resumed run goes on under the same identity.

    ``run`` is that identity where a submitter has signed it; else one is drawn. ``beside`` is what else the statement
    says, such as what a compute server sees.
    """
    if not folder.has(FILE):
        plan = plan_of(config, sizes)
        made = {"run": run or uuid.uuid4().hex, "statement": [*statement(config.privacy, plan), *beside]}
        folder.write_json(FILE, {**made, **({} if plan is None else {"plan": as_json(plan)})})
    return planned_of(folder)


def run_of(folder: RunFolder) -> str:
    """The run's identity in ledgers."""
    return str(folder.read_json(FILE)["run"])


def planned_of(folder: RunFolder) -> list[str]:
    """What was to be promised when the run began."""
    said = folder.read_json(FILE)
    return list(said.get("planned", said["statement"]))


def planned_epsilon(folder: RunFolder) -> float | None:
    """What the federated part was to cost; None where only the sites know, and without differential privacy."""
    plan = folder.read_json(FILE).get("plan")
    return None if plan is None else float(plan["epsilon"])


def settled(config: Config, folder: RunFolder, parts: Sequence[tuple[str, ...]]) -> list[str]:
    """What the finished run kept, of its federated part, or of the part that cost most; ``privacy.json`` says it too.

    Args:
        config: The whole configuration.
        folder: The run folder.
        parts: Places of its parts, all of which have a result.
    """
    if not config.privacy.dp.is_promised:
        return planned_of(folder)
    results = {names: folder.part(*names).read_json("result") for names in parts}
    spent = {names: result["privacy"] for names, result in results.items()}
    shown = max(spent, key=lambda names: (names == ("federated",), spent[names]["epsilon"] or 0.0))
    lines = achieved(config.privacy, results[shown])
    every = {"/".join(names): each for names, each in spent.items()}
    said = {**folder.read_json(FILE), "planned": planned_of(folder), "statement": lines, "spent": every}
    folder.write_json(FILE, said)
    return lines


def spent_of(config: Config, folder: RunFolder, kept: Mapping[str, Any], *, run: str) -> dict[str, Any] | None:
    """What a finished part cost, by client where clients spent; None without differential privacy.

    Ledgers count, with all that was begun and came to nothing, and where the sites' are elsewhere, what clients
    reported. A protected sum hides the reports: then ``epsilon`` is None, for the coordinator does not know it.

    Args:
        config: The whole configuration.
        folder: The part's.
        kept: What the rounds' state keeps of privacy.
        run: The part's identity in ledgers.
    """
    privacy = config.privacy
    if not privacy.dp.is_promised:
        return None
    counted = partial(spent, delta=privacy.guarantee.delta, accountant=privacy.guarantee.accountant)
    made = {"dp": privacy.dp.type, "delta": privacy.guarantee.delta}
    if not privacy.dp.is_at_site:
        entries = union(map(from_row, folder.read_rows(LEDGER)), map(from_row, kept.get(ENTRIES, ())))
        return {**made, "epsilon": counted(entries) if entries else None, "clients": {}}
    rows = folder.read_rows("clients")
    clients = {str(row["client"]): float(row["epsilon"]) for row in rows if row.get("epsilon") is not None}
    known: dict[tuple[Spend, ...], float] = {}
    for name, entries in _ledgers(config, folder, run).items():
        released = tuple(item.spend for item in entries)
        if released not in known:
            known[released] = counted(entries)
        clients[name] = max(known[released], clients.get(name, 0.0))
    return {**made, "epsilon": max((*clients.values(), *_reported(kept)), default=None), "clients": clients}


def _reported(kept: Mapping[str, Any]) -> list[float]:
    """The largest epsilon that a client has reported, rounds that were passed over among them."""
    return [float(kept["epsilon"])] if kept.get("epsilon") is not None else []


def _ledgers(config: Config, folder: RunFolder, run: str) -> dict[str, list[Entry]]:
    """Site -> its entries of a part of this run, from the ledgers that are on this machine."""
    found: dict[str, list[Entry]] = {}
    for place in (folder.path / LEDGER, config.privacy.ledger):
        for file in sorted(place.glob("*.jsonl")) if place is not None else ():
            own = [item for item in union(map(from_row, read_lines(file))) if item.run == run]
            if own:
                found[file.stem] = own
    return found
