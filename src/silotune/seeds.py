"""Every reproducible seed of a run, derived from (run seed, purpose, round, client).

Never used for masks, keys or privacy noise: those come from the operating system's generator.
"""

from __future__ import annotations

import hashlib


def derive(seed: int, purpose: str, *, round_number: int = 0, client: str = "") -> int:
    """A seed in [0, 2**63) that differs whenever any argument differs.

    Args:
        seed: The run's seed.
        purpose: What the random numbers are for, such as ``"train"`` or ``"sample-clients"``.
        round_number: The federated round, 0 outside rounds.
        client: The client's name, empty on the server.
    """
    text = "\x1f".join((str(seed), purpose, str(round_number), client))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
