"""Split training of a run: the two parts of the prepared model, and what the one server loop does with them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from silotune.errors import ConfigError
from silotune.evaluation.inversion import lines_of, tested
from silotune.experiment.parts import Part, settings_of
from silotune.experiment.prepare import Prepared
from silotune.federation.compute.server import ComputeServer
from silotune.federation.compute.server import Part as ServerPart
from silotune.federation.coordinator.rounds import Plan
from silotune.federation.site.state import Site
from silotune.federation.wire.crossings import OverMessages, Tally
from silotune.federation.wire.transport import Transport
from silotune.methods.schedule import AdapterParts
from silotune.models.split import Cut, client_part, cut_of, server_part, shares_of
from silotune.record.runs import RunFolder
from silotune.settings.split import SplitSection
from silotune.tensors import num_bytes
from silotune.training.local import steps_in_round
from silotune.training.middle import Middle
from silotune.transports.split import SplitInProcess

LINE = 12.5e6
"""Bytes a second of the line that an estimate is for: 100 Mbit/s."""
TEST = "inversion"
"""Name of the run folder's file: what was read off what crosses the cut."""


def split_of(prepared: Prepared, part: Part) -> SplitSection | None:
    """How a part of a run is split; None where every client trains the whole model."""
    return prepared.config.federation.split if part.sends_updates else None


def split_in_process(prepared: Prepared, part: Part, split: SplitSection, sites: Mapping[str, Site]) -> SplitInProcess:
    """The clients of a part, each on its own part of the model, beside the compute server.

    Raises:
        ConfigError: Clients train at one time, and something in the model draws random numbers.
    """
    config, whole = prepared.config, prepared.adapted
    together = split.schedule == "client-batch"
    if together and whole.draws_randomly:
        raise ConfigError(
            "federation.split.schedule = 'client-batch' trains clients at one time, who cannot draw dropout each by a "
            "seed of its own: set adapter.dropout = 0 (and a base without dropout), or take another schedule"
        )
    tally, settings = Tally(), settings_of(prepared, part)
    middle = Middle(server_part(whole, split))
    compute = ComputeServer(ServerPart(middle, part.training, config.federation.rounds, config.seed), split, tally)
    client = client_part(whole, split, OverMessages(compute.answer, compute.codec, tally))
    initial = {name: prepared.initial[name] for name in client.parameters}
    cut_sites = {name: replace(site, adapted=client, initial=initial) for name, site in sites.items()}
    workers = (part.clients_per_round or len(sites)) if together else 1
    return SplitInProcess(cut_sites, compute, links=settings.federation, workers=workers)


def computing(plan: Plan, prepared: Prepared, part: Part, transport: Transport) -> Plan:
    """The plan of a part with its compute server, where it is split: clients get and send their own tensors alone."""
    split = split_of(prepared, part)
    if split is None or not isinstance(transport, SplitInProcess):
        return plan
    parts = _at_clients(cut_of(prepared.adapted, split), split)
    return replace(plan, method=replace(plan.method, schedule=lambda number: parts), compute=transport.compute)


def arithmetic_of(prepared: Prepared, crossed: Mapping[str, Any]) -> dict[str, Any]:
    """What a client and the compute server have to hold, compute and send, beside averaging the whole adapter.

    Args:
        prepared: The run.
        crossed: What crossed in a short round of it, as its record says.

    Returns:
        ``client_parameters``, ``server_parameters``, ``client_weight_bytes``, ``server_weight_bytes``,
        ``client_share_of_work``, ``bytes_per_step`` and ``bytes_per_round`` of one client, ``whole_bytes_per_round`` of
        one that trains the whole adapter, and the seconds that both take on a line of 100 Mbit/s.
    """
    config, split = prepared.config, prepared.config.federation.split
    assert split is not None
    shares, base = shares_of(prepared.adapted, split), prepared.adapted.base
    per_step = math.ceil(sum(each["bytes"] for each in crossed.values()) / crossed["steps_up"]["messages"])
    steps = statistics.fmean(steps_in_round(len(own), config.training) for own in prepared.clients.values())
    own = cut_of(prepared.adapted, split).at_client if split.train == "both" else frozenset[str]()
    sent = 2 * num_bytes({name: tensor for name, tensor in prepared.initial.items() if name in own})
    per_round, whole = round(per_step * steps) + sent, 2 * num_bytes(prepared.initial)
    width = base.model.dtype.itemsize
    return {
        "client_parameters": shares.client,
        "server_parameters": shares.server,
        "client_weight_bytes": shares.client * width,
        "server_weight_bytes": shares.server * width,
        "client_share_of_work": round(shares.client_work, 4),
        "bytes_per_step": per_step,
        "bytes_per_round": per_round,
        "whole_bytes_per_round": whole,
        "seconds_per_round": per_round / LINE,
        "whole_seconds_per_round": whole / LINE,
    }


def note_of(figures: Mapping[str, Any]) -> str:
    """Whether splitting saves bytes, in one sentence."""
    split, whole = figures["bytes_per_round"], figures["whole_bytes_per_round"]
    ratio = split / whole if whole else math.inf
    verdict = (
        f"{ratio:.1f} times what averaging the whole adapter sends: federation.split is for clients that cannot hold "
        "the model, not for slow lines"
        if ratio > 1
        else "no more than averaging the whole adapter sends"
    )
    return f"a round of split training sends {split:,} bytes a client, {verdict}"


def seen_by_compute_server(prepared: Prepared, folder: RunFolder) -> list[str]:
    """What the compute server of a run can read, in sentences for its privacy statement; none where nothing is split.

    It is tested once, before training, on the clients' own examples; the run folder keeps the figures.
    """
    config = prepared.config
    if config.federation.split is None:
        return []
    if not folder.has(TEST):
        examples = [example for own in prepared.clients.values() for example in own]
        found = tested(prepared.adapted, config.federation.split, examples, config.training)
        folder.write_json(TEST, found.as_json(config.federation.split))
    return lines_of(folder.read_json(TEST))


def _at_clients(cut: Cut, split: SplitSection) -> AdapterParts:
    names = cut.at_client if split.train == "both" else frozenset[str]()
    return AdapterParts(names.__contains__, names.__contains__, names.__contains__)
