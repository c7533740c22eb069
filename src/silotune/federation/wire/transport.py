"""What the server loop needs from a transport."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from silotune.structs import Failure, Reply, Request, SiteState


@dataclass(frozen=True)
class Codec:
    """How the messages of a run become bytes, and what may come back.

    Attributes:
        encode: Request -> its bytes.
        decode: Bytes of a reply, and the request that they answer -> the reply, checked.
        longest: Request -> most bytes that the tensors of its reply take.
    """

    encode: Callable[[Request], bytes]
    decode: Callable[[bytes, Request], Reply]
    longest: Callable[[Request], int]


class Transport(Protocol):
    """Carries requests to clients and replies back; it knows nothing of what they say."""

    def clients(self) -> Sequence[str]:
        """Names of all clients, in a fixed order."""

    def exchange(self, requests: Mapping[str, Request], *, timeout_seconds: float) -> Iterator[Reply | Failure]:
        """Yields one reply or failure a request, as they arrive."""

    def states(self) -> dict[str, SiteState]:
        """What clients keep between rounds, where this process holds it."""

    def restore(self, states: Mapping[str, SiteState]) -> None:
        """Gives clients back what they kept, where this process holds it."""
