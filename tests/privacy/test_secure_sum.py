"""The protocol of secure sums: it opens the sum of those who stayed, and nothing else, whatever is asked."""

from __future__ import annotations

import os
from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import chisquare

from parties import PHASES, Sum, begin, members, terms
from silotune.errors import ProtectionError
from silotune.privacy.ring import RINGS
from silotune.privacy.secure_sum import coordinator, site
from silotune.privacy.secure_sum.terms import holders, ring_order, safe_degree


def plain(made: Sum) -> np.ndarray:
    """The sum of those whose input came in, without any protection."""
    total = np.zeros(made.terms.size, np.int64)
    for name in made.masked:
        total += made.inputs[name]
    return total.astype(RINGS[made.terms.bits])


@pytest.mark.parametrize("bits", RINGS)
def test_masks_cancel_in_every_ring(bits: int) -> None:
    made = begin(4, bits=bits, size=3)
    np.testing.assert_array_equal(made.run(), plain(made))
    assert all((made.masked[name] != made.inputs[name].astype(RINGS[bits])).any() for name in made.masked)


@pytest.mark.parametrize("phase", PHASES)
def test_dropouts_up_to_the_threshold_are_recovered(phase: str) -> None:
    made = begin(7)  # 5 are needed
    gone = ("site-001", "site-006")
    np.testing.assert_array_equal(made.run({phase: gone}), plain(made))
    missing = gone if phase in ("advertise", "share", "mask") else ()
    assert set(made.masked) == set(made.members) - set(missing)


def test_dropouts_in_several_phases_are_recovered() -> None:
    made = begin(10)  # 7 are needed
    opened = made.run({"share": ("site-001",), "mask": ("site-004",), "reveal": ("site-009",)})
    np.testing.assert_array_equal(opened, plain(made))


@pytest.mark.parametrize("phase", PHASES)
def test_beyond_the_threshold_nothing_is_opened(phase: str) -> None:
    made = begin(7)
    with pytest.raises(ProtectionError, match="needed"):
        made.run({phase: ("site-000", "site-001", "site-002")})


def test_a_sparse_graph_opens_the_same_sum() -> None:
    made = begin(16, degree=6)
    opened = made.run({"mask": ("site-003",), "agree": ("site-011",)})
    np.testing.assert_array_equal(opened, plain(made))
    assert {len(texts) for texts in made.sealed.values()} == {6}


def test_graph_is_regular_mutual_and_drawn_from_the_keys() -> None:
    names = tuple(f"s{number}" for number in range(20))
    near = {name: holders(name, names, b"x" * 32, 6) for name in names}
    assert all(len(found) == 7 and name in found for name, found in near.items())
    assert all(name in near[other] for name, found in near.items() for other in found)
    assert ring_order(names, b"x" * 32) != ring_order(names, b"y" * 32)


@pytest.mark.parametrize(("parties", "degree"), [(2, 1), (10, 9), (32, 31), (100, 30), (1000, 78)])
def test_safe_degree(parties: int, degree: int) -> None:
    assert safe_degree(parties, 2 / 3) == degree


def test_what_the_coordinator_sees_is_uniform_and_new_in_every_round() -> None:
    people = members(3)
    same = {name: np.zeros(20_000, np.int64) for name in people}
    seen = []
    for number in (1, 2):
        made = Sum(people, terms(tuple(people), round_number=number, size=20_000), same)
        assert not made.run().any()
        seen.append(made.masked["site-000"])
        counts = np.bincount(seen[-1].view(np.uint8), minlength=256)
        assert chisquare(counts).pvalue > 1e-6
    assert np.count_nonzero(seen[0] == seen[1]) < 5
    half = seen[0] + people_sum(made, "site-001")  # two of three masked inputs together are as random
    assert chisquare(np.bincount(half.view(np.uint8), minlength=256)).pvalue > 1e-6


def people_sum(made: Sum, name: str) -> np.ndarray:
    return made.masked[name]


def test_noise_is_added_before_masking() -> None:
    made = begin(3)
    for phase in ("advertise", "share", "mask"):
        getattr(made, phase)()
    noise = np.arange(5, dtype="<u4")
    again = made.inputs["site-001"].astype("<u4")
    site.mask(made.members["site-001"], made.stages["site-001"], [again], noise=[noise])
    np.testing.assert_array_equal(again - made.masked["site-001"], noise)


# --- a coordinator that does not keep to the protocol -----------------------------------------------------------------


def swapped_keys(made: Sum) -> None:
    """Puts its own keys in the place of a site's, to sit in the middle."""
    _, forged = site.advertise(
        replace(made.members["site-001"], sign=lambda content: bytes(64)), made.terms, os.urandom
    )
    made.keys["site-001"] = forged
    made.share()


def own_keys_swapped(made: Sum) -> None:
    _, other = site.advertise(made.members["site-001"], made.terms, os.urandom)
    site.share(made.members["site-001"], made.stages["site-001"], {**made.keys, "site-001": other}, os.urandom)


def keys_of_another_session(made: Sum) -> None:
    before = Sum(made.members, terms(tuple(made.members)), made.inputs)
    before.advertise()
    made.keys["site-002"] = before.keys["site-002"]
    made.share("site-002")


def shrunk_roster(made: Sum) -> None:
    kept = {name: made.keys[name] for name in ("site-000", "site-001")}
    site.share(made.members["site-000"], made.stages["site-000"], kept, os.urandom)


@pytest.mark.parametrize(
    ("attack", "said"),
    [
        (swapped_keys, "not signed by 'site-001'"),
        (own_keys_swapped, "changed it"),
        (keys_of_another_session, "not signed by 'site-002'"),
        (shrunk_roster, "2 of 5 are left for this sum, 4 are needed"),
    ],
)
def test_keys_are_not_taken_from_the_coordinator(attack, said: str) -> None:
    made = begin(5)
    made.advertise()
    with pytest.raises(ProtectionError, match=said):
        attack(made)


def test_replayed_and_misrouted_shares_are_refused() -> None:
    made, before = begin(4), begin(4)
    for one in (made, before):
        one.advertise()
        one.share()
    routed = coordinator.routed(made.sealed)["site-000"]
    replayed = {**routed, "site-001": coordinator.routed(before.sealed)["site-000"]["site-001"]}
    misrouted = {**routed, "site-001": made.sealed["site-001"]["site-002"]}
    returned = {**routed, "site-001": made.sealed["site-000"]["site-001"]}
    for wrong in (replayed, misrouted, returned):
        with pytest.raises(ProtectionError, match="not from its alleged sender"):
            site.accept(made.members["site-000"], made.stages["site-000"], tuple(made.sealed), wrong)
    without = {peer: text for peer, text in routed.items() if peer != "site-001"}
    with pytest.raises(ProtectionError, match="not those of the neighbours"):
        site.accept(made.members["site-000"], made.stages["site-000"], tuple(made.sealed), without)


def test_nobody_is_alive_and_dead() -> None:
    """Two lists of survivors for two halves of the sites, so as to get both secrets of one site."""
    made = begin(6)
    for phase in ("advertise", "share", "mask"):
        getattr(made, phase)()
    everybody, but_one = tuple(made.masked), tuple(made.masked)[:-1]
    first, signature = site.agree(made.members["site-000"], made.stages["site-000"], everybody)
    _, other = site.agree(made.members["site-001"], made.stages["site-001"], but_one)
    with pytest.raises(ProtectionError, match="not signed by 'site-001'"):
        site.reveal(made.members["site-000"], first, {"site-000": signature, "site-001": other})
    made.agree()
    made.reveal()
    for revealed in made.revealed.values():
        assert {kind for kind, _ in revealed.values()} == {"seed"}
    assert all(set(owners) == set(made.members) for owners in made.revealed.values())


@pytest.mark.parametrize(
    "survivors", [(), ("site-000",) * 4, ("site-001", "site-002", "site-003", "site-004"), ("site-000", "x")]
)
def test_lists_of_survivors_that_do_not_fit(survivors: tuple[str, ...]) -> None:
    made = begin(5)
    for phase in ("advertise", "share", "mask"):
        getattr(made, phase)()
    with pytest.raises(ProtectionError, match="does not fit"):
        site.agree(made.members["site-000"], made.stages["site-000"], survivors)


def test_shrunk_sums_and_few_signatures_are_refused() -> None:
    made = begin(5)  # 4 are needed
    for phase in ("advertise", "share", "mask"):
        getattr(made, phase)()
    with pytest.raises(ProtectionError, match="3 of 5 are left for this sum, 4 are needed"):
        site.agree(made.members["site-000"], made.stages["site-000"], tuple(made.masked)[:3])
    made.agree()
    few = dict(list(made.signatures.items())[:3])
    with pytest.raises(ProtectionError, match="3 neighbours have signed the list of inputs, 4 are needed"):
        site.reveal(made.members["site-000"], made.stages["site-000"], few)


def test_the_site_s_own_rules_win() -> None:
    people = members(4, least_clients=5)
    with pytest.raises(ProtectionError, match="4 of 4 are left for this sum, 5 are needed"):
        site.advertise(people["site-000"], terms(tuple(people)), os.urandom)
    people = members(6, least_degree=4)
    with pytest.raises(ProtectionError, match="2 neighbours a site are too few for 6: 4"):
        site.advertise(people["site-000"], terms(tuple(people), degree=2), os.urandom)
    with pytest.raises(ProtectionError, match="a threshold of 0.550 is below this site's 0.600"):
        site.advertise(people["site-000"], terms(tuple(people), threshold=0.55), os.urandom)
    with pytest.raises(ProtectionError, match="'ghost' is in the cohort and is no member"):
        site.advertise(people["site-000"], terms(("ghost", *people)), os.urandom)
    with pytest.raises(ProtectionError, match="is not in"):
        site.advertise(people["site-000"], terms(tuple(people)[1:]), os.urandom)


def test_wrong_shares_never_give_a_wrong_sum() -> None:
    made = begin(4)
    made.run()
    made.masked = dict(made.masked)
    for name in made.revealed:
        kind, share = made.revealed[name]["site-002"]
        made.revealed[name] = {**made.revealed[name], "site-002": (kind, bytes(32) + share[32:])}
    with pytest.raises(ProtectionError, match="'site-002'"):
        made.open()


def test_secrets_do_not_print() -> None:
    made = begin(3)
    for phase in ("advertise", "share", "mask"):
        getattr(made, phase)()
    stage = made.stages["site-000"]
    text = repr(stage)
    for secret in (stage.before.seed, stage.before.before.mask_key, stage.before.before.share_key):
        assert repr(secret) not in text and secret.hex() not in text
