"""The protocol of secure sums: it opens the sum of those who stayed, and nothing else, whatever is asked."""

from __future__ import annotations

import contextlib
import itertools
import os
from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import chisquare

from parties import PHASES, Sum, begin, false_shares, members, spoilt, terms
from silotune.errors import ProtectionError
from silotune.privacy.ring import RINGS
from silotune.privacy.secure_sum import coordinator, site
from silotune.privacy.secure_sum.sharing import FalseSharing, check_proof, complaint_content
from silotune.privacy.secure_sum.terms import needed_of, survivors_content


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
    missing = gone if phase in PHASES[:4] else ()
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
    for phase in PHASES[:4]:
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
    of_b, to_another, returned = routed["site-001"], made.sealed["site-001"]["site-002"], made.sealed["site-000"]
    changed = {
        "replayed": coordinator.routed(before.sealed)["site-000"]["site-001"],
        "misrouted": to_another,
        "returned": returned["site-001"],
        "another text": replace(of_b, text=to_another.text),
        "another commitment": replace(of_b, key=to_another.key),
        "another's": routed["site-002"],
    }
    member, stage = made.members["site-000"], made.stages["site-000"]
    for what, wrong in changed.items():
        with pytest.raises(ProtectionError, match="not signed by 'site-001'"):
            site.accept(member, stage, tuple(made.sealed), {**routed, "site-001": wrong})
            raise AssertionError(what)
    without = {peer: one for peer, one in routed.items() if peer != "site-001"}
    for wrong in (without, {**without, "ghost": of_b}):
        with pytest.raises(ProtectionError, match="not those of the sites"):
            site.accept(member, stage, tuple(made.sealed), wrong)


def until_accepted(count: int, **changes) -> Sum:
    made = begin(count, **changes)
    for phase in PHASES[:3]:
        getattr(made, phase)()
    return made


def with_a_spoilt_share(count: int) -> Sum:
    """'site-001' seals for 'site-000' what does not open."""
    made = begin(count)
    made.advertise()
    made.share()
    member, stage, sealed = made.members["site-001"], made.stages["site-001"], made.sealed["site-001"]
    sealed["site-000"] = spoilt(member, stage, sealed["site-000"], "site-000")
    made.accept()
    return made


def test_a_share_that_did_not_open_is_never_revealed() -> None:
    made = with_a_spoilt_share(5)  # 4 are needed
    assert set(made.complaints["site-000"]) == {"site-001"}
    assert not any(made.complaints[name] for name in tuple(made.members)[1:])
    made.mask("site-001")  # which drops out: the others reveal the shares of its key
    made.agree()
    made.reveal()
    assert "site-001" not in made.revealed["site-000"] and made.revealed["site-002"]["site-001"][0] == "key"
    with pytest.raises(coordinator.FewSharesError, match="3 shares of a secret of 'site-001' are there, 4 are needed"):
        made.open()


def test_an_owner_answers_with_what_it_gave_and_the_coordinator_uses_it() -> None:
    made = with_a_spoilt_share(4)  # 3 are needed
    member, stage = made.members["site-001"], made.stages["site-001"]
    answers = site.answer(member, stage, {"site-000": made.complaints["site-000"]["site-001"]})
    sharing = made.sharings["site-001"]
    assert coordinator.fault_of_answers(made.parties, "site-001", answers, sharing, ["site-000"]) is None
    for wrong in ({}, {"site-002": answers["site-000"]}, {"site-000": (bytes(33), bytes(33))}):
        fault = coordinator.fault_of_answers(made.parties, "site-001", wrong, sharing, ["site-000"])
        assert fault is not None and "is not the shares that it has signed" in fault
    for phase in PHASES[3:]:
        getattr(made, phase)()
    del made.revealed["site-001"]  # the liar keeps its own share back
    for name in made.revealed:
        made.revealed[name] = dict(made.revealed[name])
    with pytest.raises(coordinator.FewSharesError, match="2 shares of a secret of 'site-001'"):
        made.open()
    made.revealed = coordinator.with_answers(made.revealed, {"site-001": answers})
    shares = {owner: made.revealed[owner]["site-001"] for owner in ("site-000", "site-002", "site-003")}
    assert {kind for kind, _ in shares.values()} == {"seed"}
    assert all(sharing.fits(made.parties.roster, "site-001", name, *one) for name, one in shares.items())


def test_a_site_answers_only_what_others_have_signed() -> None:
    """A coordinator makes up complaints, to be shown shares: no honest site's, and no other sum's, is ever answered."""
    made, before = until_accepted(4), until_accepted(4)
    member, stage = made.members["site-001"], made.stages["site-001"]
    of_another = before.members["site-000"].sign(complaint_content(before.parties.roster, "site-001", "site-000")).hex()
    about_another = made.members["site-000"].sign(complaint_content(made.parties.roster, "site-002", "site-000")).hex()
    honest = made.members["site-000"].sign(complaint_content(made.parties.roster, "site-001", "site-000")).hex()
    for complaints in (
        {"site-000": "0" * 128},
        {"site-000": of_another},
        {"site-000": about_another},
        {"site-002": honest},
        {"site-001": honest},
        {"ghost": honest},
    ):
        with pytest.raises(ProtectionError):
            site.answer(member, stage, complaints)
    given = site.answer(member, stage, {"site-000": honest})
    assert given == {"site-000": made.stages["site-000"].held["site-001"]}


@pytest.mark.parametrize("left_out", [(), ("site-004",)])
def test_nothing_is_revealed_of_who_was_left_out_before_it_could_mask(left_out: tuple[str, ...]) -> None:
    made = until_accepted(5)
    final = tuple(name for name in made.members if name not in left_out)
    for name in final:
        made.stages[name] = site.confirm(made.members[name], made.stages[name], final)
        made.masked[name] = np.zeros(5, np.uint32)
    made.agree()
    made.reveal()
    assert all(set(shares) == set(final) for shares in made.revealed.values())
    assert {kind for shares in made.revealed.values() for kind, _ in shares.values()} == {"seed"}


@pytest.mark.parametrize(
    ("final", "said"),
    [
        (("site-000", "site-001", "site-002"), "3 of 5 are left for this sum, 4 are needed"),
        (("site-001", "site-002", "site-003", "site-004"), "does not fit"),
        (("site-000", "site-001", "site-002", "site-003", "ghost"), "does not fit"),
        (("site-000",) * 5, "does not fit"),
    ],
)
def test_final_lists_that_leave_out_too_many_or_bring_others_are_refused(final: tuple[str, ...], said: str) -> None:
    made = until_accepted(5)
    with pytest.raises(ProtectionError, match=said):
        site.confirm(made.members["site-000"], made.stages["site-000"], final)


def test_who_left_before_the_final_list_cannot_come_back_with_it() -> None:
    made = begin(6)
    made.advertise()
    made.share("site-005")
    made.accept()
    with pytest.raises(ProtectionError, match="does not fit"):
        site.confirm(made.members["site-000"], made.stages["site-000"], tuple(made.members))


def test_two_final_lists_never_open_a_sum() -> None:
    """Half of the sites share masks with everybody, half without the last: who shares masks is signed, too."""
    made = until_accepted(6)  # 5 are needed
    everybody, but_last = tuple(made.members), tuple(made.members)[:-1]
    for place, name in enumerate(everybody[:-1]):
        made.stages[name] = site.confirm(made.members[name], made.stages[name], but_last if place % 2 else everybody)
        made.masked[name] = np.zeros(5, np.uint32)
    made.agree()
    with pytest.raises(ProtectionError, match="not signed by 'site-001'"):
        made.reveal()


def test_nobody_is_alive_and_dead() -> None:
    """Two lists of survivors for two halves of the sites, so as to get both secrets of one site."""
    made = begin(6)
    for phase in PHASES[:4]:
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


@pytest.mark.parametrize("count", [3, 4, 5, 7, 10])
def test_two_lists_take_a_third_of_the_sites_to_sign_both(count: int) -> None:
    """One site is on the first list and not on the second; the others are split as well as can be between the two.

    Of those that sign both, one less than 2 t - n get nothing out of anybody on one of the two sides; so many get both
    secrets, and no protocol of this kind can do better.
    """
    needed = needed_of(count, 2 / 3)
    for liars in {max(0, 2 * needed - count - 1), min(count - 1, 2 * needed - count)}:
        honest = count - liars
        opened = max(
            min(*(_both_lists(count, liars, on_first) if honest else (0, 0))) for on_first in range(1, honest + 1)
        )
        assert (opened >= needed) == (liars >= 2 * needed - count)


def _both_lists(count: int, liars: int, on_first: int) -> tuple[int, int]:
    """Shares of the target's seed and of its key, when so many honest sites see the list that it is on."""
    made = begin(count)
    for phase in PHASES[:4]:
        getattr(made, phase)()
    names, target = tuple(made.members), tuple(made.members)[-1]
    both, first = set(names[:liars]), {target, *names[liars : liars + on_first - 1]}
    lists = {"seed": names, "key": names[:-1]}
    signed: dict[str, dict[str, str]] = {"seed": {}, "key": {}}
    agreed = {}
    for name, (kind, listed) in itertools.product(names, lists.items()):
        if name in both:
            content = survivors_content(made.parties.roster, names, listed)
            signed[kind][name] = made.members[name].sign(content).hex()
        elif (name in first) == (kind == "seed"):
            with contextlib.suppress(ProtectionError):  # of three sites all are needed
                agreed[kind, name], signed[kind][name] = site.agree(made.members[name], made.stages[name], listed)
    shares = dict.fromkeys(lists, liars)  # who lies shows what it holds, whatever was signed
    for (kind, name), stage in agreed.items():
        try:
            given = site.reveal(made.members[name], stage, signed[kind])
        except ProtectionError:
            continue
        assert given[target][0] == kind
        shares[kind] += 1
    return shares["seed"], shares["key"]


@pytest.mark.parametrize(
    "survivors", [(), ("site-000",) * 4, ("site-001", "site-002", "site-003", "site-004"), ("site-000", "x")]
)
def test_lists_of_survivors_that_do_not_fit(survivors: tuple[str, ...]) -> None:
    made = begin(5)
    for phase in PHASES[:4]:
        getattr(made, phase)()
    with pytest.raises(ProtectionError, match="does not fit"):
        site.agree(made.members["site-000"], made.stages["site-000"], survivors)


def test_shrunk_sums_and_few_signatures_are_refused() -> None:
    made = begin(5)  # 4 are needed
    for phase in PHASES[:4]:
        getattr(made, phase)()
    with pytest.raises(ProtectionError, match="3 of 5 are left for this sum, 4 are needed"):
        site.agree(made.members["site-000"], made.stages["site-000"], tuple(made.masked)[:3])
    made.agree()
    few = dict(list(made.signatures.items())[:3])
    with pytest.raises(ProtectionError, match="3 sites have signed the list of inputs, 4 are needed"):
        site.reveal(made.members["site-000"], made.stages["site-000"], few)


def test_the_site_s_own_rules_win() -> None:
    people = members(4, least_clients=5)
    with pytest.raises(ProtectionError, match="4 of 4 are left for this sum, 5 are needed"):
        site.advertise(people["site-000"], terms(tuple(people)), os.urandom)
    people = members(6)
    with pytest.raises(ProtectionError, match="a threshold of 0.550 is below this site's 0.600"):
        site.advertise(people["site-000"], terms(tuple(people), threshold=0.55), os.urandom)
    with pytest.raises(ProtectionError, match="'ghost' is in the cohort and is not a member"):
        site.advertise(people["site-000"], terms(("ghost", *people)), os.urandom)
    with pytest.raises(ProtectionError, match="is not in"):
        site.advertise(people["site-000"], terms(tuple(people)[1:]), os.urandom)


def test_wrong_shares_never_give_a_wrong_sum() -> None:
    made = begin(4)
    made.run()
    for name in made.revealed:
        kind, share = made.revealed[name]["site-002"]
        made.revealed[name] = {**made.revealed[name], "site-002": (kind, bytes(32) + share[32:])}
    with pytest.raises(coordinator.FewSharesError, match="0 shares of a secret of 'site-002' are there, 3 are needed"):
        made.open()
    assert set(made.wrong) == set(made.members)


# --- sites that lie ---------------------------------------------------------------------------------------------------


def lying_about_shares(made: Sum, liar: str, secret: str) -> None:
    stage = made.stages[liar].before
    made.stages[liar], made.sealed[liar], made.sharings[liar] = false_shares(
        made.members[liar], stage, made.keys, secret
    )


@pytest.mark.parametrize("count", [3, 4, 7])
def test_an_owner_whose_shares_do_not_give_its_seed_is_proved_to_lie(count: int) -> None:
    made, liar = begin(count), "site-001"
    made.advertise()
    made.share()
    lying_about_shares(made, liar, "seed")
    for phase in PHASES[2:]:
        getattr(made, phase)()
    assert not any(made.complaints.values())  # nobody could tell
    with pytest.raises(coordinator.FalseSharesError, match="'site-001' made do not give its seed") as caught:
        made.open()
    proof, public = caught.value.proof, made.members["site-000"].public_keys
    assert made.wrong == () and caught.value.owner == liar
    check_proof(proof, liar, public[liar])
    with pytest.raises(ProtectionError, match="is not signed by 'site-000'"):
        check_proof(proof, "site-000", public["site-000"])


def test_a_dropout_whose_shares_do_not_give_its_key_is_named() -> None:
    made = begin(5)
    made.advertise()
    made.share()
    lying_about_shares(made, "site-001", "key")
    for phase, gone in (("accept", ()), ("mask", ("site-001",)), ("agree", ()), ("reveal", ())):
        getattr(made, phase)(*gone)
    with pytest.raises(coordinator.FalseSharesError, match="'site-001' made do not give its key") as caught:
        made.open()
    assert caught.value.proof is None


def test_no_proof_can_be_made_up_against_an_honest_owner() -> None:
    """With all of its shares in hand: too few of them, changed ones, another's, or under a changed statement."""
    made, owner = begin(4), "site-001"
    made.run()
    sharing, roster = made.sharings[owner], made.parties.roster
    shares = {holder: shown[owner][1].hex() for holder, shown in made.revealed.items()}
    honest = FalseSharing(roster=roster.hex(), sharing=sharing, shares=shares)
    few = dict(list(shares.items())[:2])
    swapped = {**shares, "site-000": shares["site-002"]}
    tries = [
        honest,
        honest.model_copy(update={"shares": few}),
        honest.model_copy(update={"shares": swapped}),
        honest.model_copy(update={"shares": {**few, "ghost": shares["site-002"]}}),
        honest.model_copy(update={"roster": "0" * 64}),
        honest.model_copy(update={"shares": few, "sharing": sharing.model_copy(update={"least": 2})}),
        honest.model_copy(update={"sharing": sharing.model_copy(update={"commitment": "0" * 64})}),
        honest.model_copy(update={"sharing": made.sharings["site-002"]}),
    ]
    for proof in tries:
        with pytest.raises(ProtectionError):
            check_proof(proof, owner, made.members["site-000"].public_keys[owner])


def test_commitments_hide_and_bind_every_share_by_itself() -> None:
    made = until_accepted(4)
    said = [text for sharing in made.sharings.values() for text in (*sharing.seed.values(), *sharing.key.values())]
    assert len(set(said)) == 2 * 4 * 4
    roster, (of_seed, of_key) = made.parties.roster, made.stages["site-000"].held["site-001"]
    fits = made.sharings["site-001"].fits
    assert fits(roster, "site-001", "site-000", "seed", of_seed) and fits(roster, "site-001", "site-000", "key", of_key)
    for wrong in (
        (roster, "site-001", "site-000", "key", of_seed),
        (roster, "site-001", "site-002", "seed", of_seed),
        (roster, "site-002", "site-000", "seed", of_seed),
        (b"other", "site-001", "site-000", "seed", of_seed),
        (roster, "site-001", "ghost", "seed", of_seed),
    ):
        assert not fits(*wrong)


def complaints(made: Sum, about: dict[str, tuple[str, ...]]) -> coordinator.Agreed:
    return coordinator.after_complaints(made.parties, {name: about.get(name, ()) for name in made.members})


@pytest.mark.parametrize("count", [3, 4, 5, 6, 7, 10])
def test_complaints_name_a_liar_and_hurt_no_honest_site(count: int) -> None:
    """Every pattern that one liar can bring about: it is named, or nobody is and everybody stays."""
    made = begin(count)
    made.advertise()
    liar, honest = "site-000", tuple(made.members)[1:]
    tolerated = max(1, count - made.terms.needed)
    for told in range(2 ** len(honest)):
        against = tuple(name for place, name in enumerate(honest) if told >> place & 1)
        by_others = complaints(made, dict.fromkeys(against, (liar,)))
        assert by_others == replace(complaints(made, {liar: against}), disputes=by_others.disputes)
        assert by_others.liars == ((liar,) if len(against) > tolerated else ())
        if count == 3 and by_others.liars:
            continue  # of three sites all are needed
        assert set(honest) <= set(by_others.arrived)
        assert len(by_others.disputes) == (0 if by_others.liars else len(against))
        assert by_others.against(liar) == (() if by_others.liars else against)


def test_what_honest_sites_would_refuse_the_coordinator_finds_first() -> None:
    made = begin(4)
    made.advertise()
    public = {name: (member.public_keys[name],) for name, member in made.members.items()}
    keys = made.keys["site-001"]
    low_order = keys.model_copy(update={"share": "0" * 64})
    unsigned = low_order.model_copy(update={"signature": "0" * 128})
    signature = made.members["site-001"].sign(low_order.content(made.terms, "site-001")).hex()
    for wrong, said in (
        (made.keys["site-002"], "not signed"),
        (unsigned, "not signed"),
        (low_order.model_copy(update={"signature": signature}), "is not valid"),
    ):
        fault = coordinator.fault_of_keys(made.terms, "site-001", wrong, public["site-001"])
        assert fault is not None and said in fault
        with pytest.raises(ProtectionError):
            forged = {**made.keys, "site-001": wrong}
            site.share(made.members["site-000"], made.stages["site-000"], forged, os.urandom)
    low_mask = keys.model_copy(update={"mask": "0" * 64})  # the others would notice when they have trained
    assert coordinator.fault_of_keys(made.terms, "site-001", low_mask, ()) == coordinator.fault_of_keys(
        made.terms, "site-001", low_order, ()
    )
    assert all(coordinator.fault_of_keys(made.terms, name, made.keys[name], public[name]) is None for name in public)
    nobody_knows = keys.model_copy(update={"signature": "0" * 128})
    assert coordinator.fault_of_keys(made.terms, "site-001", nobody_knows, ()) is None
    made.share()
    parties, sealed, sharing = made.parties, made.sealed["site-001"], made.sharings["site-001"]
    few = {peer: text for peer, text in sealed.items() if peer != "site-003"}
    less = sharing.model_copy(update={"least": 1})
    mangled = {**sealed, "site-003": replace(sealed["site-003"], text=bytes(82))}
    other = replace(sealed["site-003"], seed="0" * 64)
    content = other.content(parties.roster, "site-001", "site-003")
    to_one = {**sealed, "site-003": replace(other, signature=made.members["site-001"].sign(content).hex())}
    for texts, said_of_them, said in (
        (few, sharing, "one for each of the others"),
        (sealed, made.sharings["site-002"], "are not those for the coordinator"),
        (to_one, sharing, "are not those for the coordinator"),
        (mangled, sharing, "not signed"),
        (sealed, less, "are said to take 1 shares, 3 are agreed on"),
        (sealed, sharing.model_copy(update={"commitment": "0" * 64}), "not signed"),
    ):
        fault = coordinator.fault_of_sharing(parties, "site-001", texts, said_of_them, public["site-001"])
        assert fault is not None and said in fault
    assert coordinator.fault_of_sharing(parties, "site-001", sealed, sharing, public["site-001"]) is None


def test_secrets_do_not_print() -> None:
    made = begin(3)
    for phase in PHASES[:4]:
        getattr(made, phase)()
    stage = made.stages["site-000"]
    text = repr(stage)
    for secret in (stage.before.seed, stage.before.before.mask_key, stage.before.before.share_key):
        assert repr(secret) not in text and secret.hex() not in text
