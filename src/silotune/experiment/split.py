"""Split training of a run: the two parts of the prepared model, and what the one server loop does with them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

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
from silotune.models.split import Cut, client_part, cut_of, server_part
from silotune.record.runs import RunFolder
from silotune.settings.split import SplitSection
from silotune.training.middle import Middle
from silotune.transports.split import SplitInProcess

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
