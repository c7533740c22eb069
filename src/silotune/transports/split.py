"""Carries requests to clients in this process that train a part of the model each, beside a compute server."""

from __future__ import annotations

from collections.abc import Mapping

from silotune.federation.compute.server import ComputeServer
from silotune.federation.site.state import Site
from silotune.settings.sections import FederationSection
from silotune.transports.in_process import InProcess


class SplitInProcess(InProcess):
    """Runs the clients beside their compute server, which is told when a client's round is over.

    Args:
        sites: The clients by name, all on one resident part.
        compute: The server that has the other part.
        links: The run's section, for how messages are encoded.
        workers: How many clients work at one time.
    """

    def __init__(
        self, sites: Mapping[str, Site], compute: ComputeServer, *, links: FederationSection, workers: int
    ) -> None:
        self.compute = compute
        super().__init__(
            sites,
            encode=links.encode,
            workers=workers,
            links=links,
            left=lambda client, is_done: compute.leave(client, is_done=is_done),
        )
