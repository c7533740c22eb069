"""The order in a request names the settings, the run and the seed. The settings themselves do not travel in it.

A site takes them from the run's setup, whose hash its submitter signed; the round is in the request's header.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any

from pydantic import Field

from silotune.federation.kinds import kind_named
from silotune.federation.wire.messages import Layout, layout_of, longest, read_body
from silotune.federation.wire.signed_job import JOB, WITHIN, SignedJob
from silotune.methods.algorithms import method
from silotune.methods.schedule import returned
from silotune.settings.base import Section
from silotune.settings.sections import FederationSection
from silotune.structs import Request


class Order(Section):
    """The body of a request that uses a site's examples.

    Attributes:
        setup: SHA-256 of the settings to use, or of the run's setup, where a setup travels with the request.
        run: Identity of the run in ledgers.
        seed: The run's.
        job: What the submitter signed; None in one process.
    """

    setup: Annotated[str, Field(pattern="^([0-9a-f]{64})?$")] = ""
    run: str = ""
    seed: Annotated[int, Field(ge=0, lt=2**32)]
    job: SignedJob | None = None

    def body(self, **more: Any) -> dict[str, Any]:
        """The order as it stands in a request, without a job that is None."""
        said = self.model_dump(mode="json", exclude={JOB} if self.job is None else None)
        return {**said, **more}


def read_order(request: Request) -> Order:
    """The order in a request: its body, or in a protected sum what the body holds under ``train``.

    Raises:
        MessageError: The request does not hold an order.
    """
    within = request.body.get(WITHIN) if kind_named(request.kind).is_protected else None
    return read_body(Order, replace(request, body=within) if isinstance(within, Mapping) else request)


def trained_layout(request: Request, federation: FederationSection) -> Layout:
    """The layout of an answer to ``train``: the method says which tensors come back, in the rank that was sent."""
    return layout_of(returned(request.tensors, method(federation).schedule(request.round_number)))


def expected_reply(request: Request, federation: FederationSection) -> Layout:
    """The layout that the tensors of a reply to this request must have; the decoder compares a reply with it.

    Raises:
        MessageError: There is no such kind, its body does not hold what it must, or a dtype is not carried.
    """
    made: Layout = kind_named(request.kind).returns(request, federation)
    return made


def longest_reply(request: Request, federation: FederationSection) -> int:
    """Most bytes that the tensors of a reply to this request take."""
    return longest(expected_reply(request, federation))
