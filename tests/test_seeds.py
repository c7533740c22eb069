from __future__ import annotations

import hashlib
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from silotune.seeds import derive

ARGUMENTS = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 2**32 - 1),
        "purpose": st.sampled_from(["train", "sample-clients", "carve-test"]),
        "round_number": st.integers(0, 50),
        "client": st.sampled_from(["", "client-0", "client-1", "0"]),
    }
)


@given(ARGUMENTS)
def test_same_arguments_same_seed_in_range(arguments: dict[str, Any]) -> None:
    seed = derive(**arguments)
    assert seed == derive(**arguments)
    assert 0 <= seed < 2**63


@given(ARGUMENTS, ARGUMENTS)
def test_different_arguments_different_seeds(left: dict[str, Any], right: dict[str, Any]) -> None:
    assert (derive(**left) == derive(**right)) == (left == right)


def test_value_is_half_the_first_eight_bytes_of_the_digest() -> None:
    digest = hashlib.sha256(b"7\x1ftrain\x1f3\x1fclient-1").hexdigest()
    assert derive(7, "train", round_number=3, client="client-1") == int(digest[:16], 16) // 2
