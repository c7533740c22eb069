"""A site that lies in a protected sum: who is booked, whether the sum opens, and what comes out of it."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from lies import (
    LIES,
    complains_of_one,
    complains_of_one_and_keeps_to_it,
    garbage_shares,
    gives_false_shares,
    sends_garbage,
    spoils_a_share_and_answers,
    spoils_a_share_and_reveals_nothing,
    spoils_a_share_and_vanishes,
)
from protected import LIAR, NAMES, Lie, Lying, Net, privacy, run
from silotune.errors import FederationError, ProtectionError
from silotune.record.runs import RunFolder
from silotune.structs import Failure, Reply, Request, ServerState
from silotune.tensors import flatten

pytestmark = pytest.mark.end_to_end

SITES = (*NAMES, "f")
COUNTS = (3, 4, 6)
"""Of sites: all of them are needed, all but one, and all but two."""


@pytest.fixture(scope="module")
def honest(model, start, tmp_path_factory) -> Callable[[int, str], ServerState]:
    """The state after a round of so many sites, without what 'b' sends in one phase."""
    known: dict[tuple[int, str], ServerState] = {}

    def of(count: int, without: str) -> ServerState:
        if (count, without) not in known:
            folder = tmp_path_factory.mktemp("honest")
            lost = lambda kind, name: without != "" and kind.endswith(without) and name == LIAR  # noqa: E731
            known[count, without] = run(folder, Net(model, privacy(), lost, names=SITES[:count]), start, privacy())
        return known[count, without]

    return of


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("what", LIES)
def test_a_liar_is_booked_and_the_others_go_on(
    model, start, tmp_path: Path, honest, what: str, count: int, refused: Callable[..., None]
) -> None:
    """Of three sites all are needed: the sum stays closed; of more it opens, with the bits of honest sites."""
    lie, said, is_in = LIES[what]
    net = Lying(model, privacy(), lie, SITES[:count])
    if count == 3 and what != "shares of strangers":  # beside all those that were asked for
        with pytest.raises(ProtectionError, match="stays closed"):
            run(tmp_path, net, start, privacy(), notify=net.notify)
        assert {client for client, _ in net.booked} == {LIAR}
        return
    state = run(tmp_path, net, start, privacy(), notify=net.notify)
    assert [client for client, _ in net.booked] == [LIAR] and said in net.booked[0][1]
    (row,) = RunFolder(tmp_path).read_rows("clients")
    assert row["clients_in_sum"] == (count if is_in else count - 1)
    tiny.assert_same_bits(state.weights, honest(count, "" if is_in else "keys").weights)
    assert not state.excluded
    if count == 4:  # the list has each lie once
        refused("a site that lies in a secure sum of four", what, net.booked[0][1])


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize(
    ("lie", "booked"),
    [
        (garbage_shares(to_all=False), []),  # and then it answers
        (complains_of_one_and_keeps_to_it, []),
        (complains_of_one, [LIAR]),  # then it reveals what it said that it does not hold
        (spoils_a_share_and_reveals_nothing, [LIAR]),
    ],
)
def test_one_dispute_hurts_nobody_and_accuses_no_honest_site(
    model, start, tmp_path: Path, honest, lie: Lie, booked: list[str], count: int
) -> None:
    """Whether the owner or the holder lies cannot be told: both are named in a note, and both stay in the sum.

    The owner's answer is as good as the holder's share, so that not even of three sites one can close the sum by it.
    """
    net = Lying(model, privacy(), lie, SITES[:count])
    if count == 3 and lie is spoils_a_share_and_reveals_nothing:
        with pytest.raises(ProtectionError, match="stays closed"):
            run(tmp_path, net, start, privacy(), notify=net.notify)
    else:
        state = run(tmp_path, net, start, privacy(), notify=net.notify)
        tiny.assert_same_bits(state.weights, honest(count, "").weights)
    assert [client for client, _ in net.booked] == booked
    assert len(net.told) == 1 and re.search("one of each pair lies: '(a|b)' cannot open those of '(a|b)'", net.told[0])


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize(
    "answer",
    [lambda given: {}, lambda given: dict.fromkeys(given, {"seed": "0" * 66, "key": "0" * 66})],
)
def test_an_owner_that_does_not_answer_truly_is_left_out_for_good(
    model, start, tmp_path: Path, honest, answer, count: int
) -> None:
    net = Lying(model, privacy(), spoils_a_share_and_answers(answer), SITES[:count])
    if count == 3:
        with pytest.raises(ProtectionError, match="stays closed"):
            run(tmp_path, net, start, privacy(), notify=net.notify)
    else:
        state = run(tmp_path, net, start, privacy(), notify=net.notify)
        tiny.assert_same_bits(state.weights, honest(count, "keys").weights)
        assert count > 4 or set(state.excluded) == {LIAR}  # of more, enough others hold shares of its key
    assert {client for client, _ in net.booked} == {LIAR}
    assert "its answer to a complaint is not the shares that it has signed" in net.booked[0][1]


@pytest.mark.parametrize(
    ("count", "below_minimum"), [*itertools.product((3, 4), ("stop", "wait", "skip")), (6, "stop")]
)
@pytest.mark.parametrize(
    ("lie", "secret"),
    [(gives_false_shares("seed"), "seed"), (gives_false_shares("key", then_vanishes=True), "key")],
)
def test_an_owner_that_lied_in_its_shares_is_left_out_of_the_next_try(
    model, start, tmp_path: Path, lie: Lie, secret: str, below_minimum: str, count: int
) -> None:
    """The sum that it is in stays closed; the others do the round again without it, though they have opened it."""
    net = Lying(model, privacy(), lie, SITES[:count])
    federation = {"below_minimum": below_minimum, "rounds": 2}
    if count == 3:
        if below_minimum == "skip":
            run(tmp_path, net, start, privacy(), notify=net.notify, **federation)
            assert not RunFolder(tmp_path).read_rows("clients")
        else:
            with pytest.raises(FederationError, match="2 of 3 clients advertised keys|stays closed"):
                run(tmp_path, net, start, privacy(), notify=net.notify, **federation)
        assert {client for client, _ in net.booked} == {LIAR}
        return
    state = run(tmp_path, net, start, privacy(), notify=net.notify, **federation)
    reasons = [reason for client, reason in net.booked if client == LIAR]
    assert len(reasons) == len(net.booked) and f"do not give its {secret}" in " ".join(reasons)
    assert [row["clients_in_sum"] for row in RunFolder(tmp_path).read_rows("clients")] == [count - 1] * 2
    assert "it is asked no more since round 1" in reasons[-1] and set(state.excluded) == {LIAR}
    without = Net(model, privacy(), lambda kind, name: name == LIAR, names=SITES[:count])
    tiny.assert_same_bits(state.weights, run(tmp_path / "without", without, start, privacy(), rounds=2).weights)
    assert any("round 1 is done again without 'b'" in text for text in net.told)
    loaded, _ = RunFolder(tmp_path).load_checkpoint()
    assert loaded.excluded == state.excluded


@pytest.mark.parametrize("count", COUNTS[1:])
def test_who_spoils_a_share_and_vanishes_stops_nobody(model, start, tmp_path: Path, honest, count: int) -> None:
    """Its key cannot be recovered: this round is done again without it, and it is asked again in the next one."""
    net = Lying(model, privacy(), spoils_a_share_and_vanishes, SITES[:count])
    state = run(tmp_path, net, start, privacy(), notify=net.notify)
    assert {client for client, _ in net.booked} == {LIAR} and not state.excluded
    tiny.assert_same_bits(state.weights, honest(count, "keys").weights)


def test_a_run_killed_between_the_lie_and_the_next_try_goes_on_without_the_liar(
    model, start, tmp_path: Path, honest
) -> None:
    """The sites have helped to open round 1 over all; what they are shown is in the checkpoint."""
    net = Lying(model, privacy(), gives_false_shares("seed"), SITES[:4])

    def killed(event: str, fields: Mapping[str, Any]) -> None:
        if event == "client_failed" and "asked no more" in fields["reason"]:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, net, start, privacy(), notify=killed)
    state, sites = RunFolder(tmp_path).load_checkpoint()
    assert state.round_number == 0 and set(state.excluded) == {LIAR}
    again = Lying(model, privacy(), gives_false_shares("seed"), SITES[:4])
    for name, site in again.sites.items():
        site.protection = net.sites[name].protection
    again.restore(sites)
    again.keys = net.keys
    done = run(tmp_path, again, start, privacy(), state=state, notify=again.notify)
    tiny.assert_same_bits(done.weights, honest(4, "keys").weights)


def test_no_sum_is_opened_anew_without_an_honest_site(model, start, tmp_path: Path) -> None:
    """A coordinator that has a proof against 'b' gets no second sum without 'c', and none that has 'b' again."""
    net = Lying(model, privacy(), gives_false_shares("seed"), SITES[:5])
    run(tmp_path / "1", net, start, privacy(), notify=net.notify)
    state, _ = RunFolder(tmp_path / "1").load_checkpoint()
    net.lost = lambda kind, name: kind == "secure_sum.input" and name == "c"
    with pytest.raises(ProtectionError, match="3 of 5 clients sent their input, 4 are needed"):
        run(tmp_path / "2", net, start, privacy(), state=ServerState(0, start, excluded=state.excluded))
    net.lost = lambda kind, name: False
    net.lie = lambda net, request, reply: reply
    with pytest.raises(ProtectionError, match="of 5 clients signed the list of inputs"):
        run(tmp_path / "3", net, start, privacy())
    assert all("was opened before, over other clients" in failure.reason for failure in net.failures[-4:])


def test_a_sum_is_opened_anew_without_whoever_has_lied_in_another_one(model, start, tmp_path: Path, honest) -> None:
    """The difference of the two is its input alone, and against an honest site there is no proof in any sum."""
    net = Lying(model, privacy(), gives_false_shares("seed"), SITES[:5])
    run(tmp_path / "1", net, start, privacy(), notify=net.notify)
    state, _ = RunFolder(tmp_path / "1").load_checkpoint()
    truthful = Lying(model, privacy(), lambda net, request, reply: reply, SITES[:5])
    run(tmp_path / "2", truthful, start, privacy())
    truthful.keys, before = net.keys, state.excluded
    for name, site in truthful.sites.items():
        site.protection = net.sites[name].protection  # the keys that the proof is signed with
    done = run(tmp_path / "3", truthful, start, privacy(), state=ServerState(0, start, excluded=before))
    tiny.assert_same_bits(done.weights, honest(5, "keys").weights)


def test_a_liar_that_was_revoked_meanwhile_is_told_in_a_line(model, start, tmp_path: Path) -> None:
    """Its key is not on the list any more, so nobody can look at the proof: the sites refuse, and none breaks."""
    net = Lying(model, privacy(), gives_false_shares("seed"), SITES[:5])
    run(tmp_path / "1", net, start, privacy(), notify=net.notify)
    state, _ = RunFolder(tmp_path / "1").load_checkpoint()
    truthful = Lying(model, privacy(), lambda net, request, reply: reply, SITES[:5])
    run(tmp_path / "2", truthful, start, privacy())
    for site in truthful.sites.values():
        assert site.protection is not None
        left = {name: key for name, key in site.protection.member.public_keys.items() if name != LIAR}
        site.protection.member = replace(site.protection.member, public_keys=left)
    with pytest.raises(ProtectionError):
        run(tmp_path / "3", truthful, start, privacy(), state=ServerState(0, start, excluded=state.excluded))
    assert all("a member of the federation" in failure.reason for failure in truthful.failures)


@pytest.mark.parametrize("lost", ["", "a", "ac", "acde"])
def test_a_second_try_that_was_cut_short_is_made_again(model, start, tmp_path: Path, honest, lost: str) -> None:
    """Round 1 shows that 'b' has lied; of the try without it some answers are lost after the sites have opened it."""
    net, tries = Lying(model, privacy(), gives_false_shares("seed"), SITES[:5]), list[str]()

    def is_lost(kind: str, client: str) -> bool:
        if kind == "secure_sum.keys" and client == "a":
            tries.append(kind)
        return kind == "secure_sum.unmask" and len(tries) == 2 and client in lost

    net.lost, state = is_lost, ServerState(0, start)
    if lost:  # four of five are needed, and 'b' is gone
        with pytest.raises(ProtectionError, match="shares of a secret"):
            run(tmp_path, net, start, privacy(), notify=net.notify)
        state = ServerState(0, start, excluded=RunFolder(tmp_path).load_checkpoint()[0].excluded)
    done = run(tmp_path / "again", net, start, privacy(), state=state, notify=net.notify)
    tiny.assert_same_bits(done.weights, honest(5, "keys").weights)


class TwoLiars(Lying):
    """Sites of which two give false shares."""

    def exchange(self, requests: Mapping[str, Request], *, timeout_seconds: float) -> Iterator[Reply | Failure]:
        for name, request in requests.items():
            self.who = name if name in "bc" else LIAR
            yield from super().exchange({name: request}, timeout_seconds=timeout_seconds)


def test_of_six_two_may_lie_in_their_shares(model, start, tmp_path: Path) -> None:
    """Each is found when the sum is to be opened, one after the other: the round is done three times."""
    settings = privacy(threshold=0.6)
    net = TwoLiars(model, settings, gives_false_shares("seed"), SITES)
    state = run(tmp_path, net, start, settings, notify=net.notify)
    assert set(state.excluded) == {"b", "c"} and {client for client, _ in net.booked} == {"b", "c"}
    without = Net(model, settings, lambda kind, name: name in "bc", names=SITES)
    tiny.assert_same_bits(state.weights, run(tmp_path / "without", without, start, settings).weights)


# --- inputs that cannot be true ---------------------------------------------------------------------------------------


def raised(place: int, by: int) -> Callable[[torch.Tensor], None]:
    def change(tensor: torch.Tensor) -> None:
        tensor[place] += by

    return change


@pytest.mark.parametrize("count", [3, 4, 6])
@pytest.mark.parametrize(
    ("tensor", "place", "by", "said"),
    [
        ("values", 0, 1 << 28, "a value of the mean update is"),
        ("values", 5, -(1 << 28), "a value of the mean update is"),
        ("figures", 0, 1000, "its num_examples is"),
        ("figures", 0, -1000, "its num_examples is"),
        ("figures", 1, 1, "its weight is"),
        ("figures", 2, 1000, "its with_loss is"),
        ("figures", 4, -1000, "its steps is"),
        ("figures", 5, -(1 << 40), "its tokens is"),
        ("figures", 6, 10, "its timed is"),
        ("figures", 7, -(1 << 50), "its seconds is"),
        ("figures", 8, -(1 << 50), "its core_seconds is"),
        ("figures", 9, -(1 << 50), "its joules is"),
        ("figures", 10, 10, "its measured is"),
        ("figures", 11, 10, "its estimated is"),
        ("figures", 12, 1 << 40, "its clipped is"),
        ("figures", 12, -1, "its clipped is"),
    ],
)
def test_a_sum_that_cannot_be_true_is_refused_and_nobody_is_accused(
    model, start, tmp_path: Path, tensor: str, place: int, by: int, said: str, count: int
) -> None:
    net = Lying(model, privacy(), sends_garbage(tensor, raised(place, by)), SITES[:count])
    with pytest.raises(ProtectionError, match=f"cannot be true: {said}.*nobody can tell which"):
        run(tmp_path, net, start, privacy(), notify=net.notify)
    assert net.booked == [] and not RunFolder(tmp_path).read_rows("clients")


def test_a_mean_of_1640_under_a_bound_of_1_is_refused(model, start, tmp_path: Path) -> None:
    """What four sites with 18 examples would have got, with one that adds a third of the ring."""
    spoilt = sends_garbage("values", raised(0, int(1640 * ((1 << 31) // 4 / 65536) * 18) % (1 << 31)))
    net = Lying(model, privacy(max_examples=65536), spoilt, SITES[:4])
    with pytest.raises(ProtectionError, match=r"a value of the mean update is 1640, 1\.0000\d at most"):
        run(tmp_path, net, start, privacy(max_examples=65536))


@pytest.mark.parametrize("protection", ["secure_sum", "noise"])
def test_a_masked_input_of_random_bits_is_refused(model, start, tmp_path: Path, protection: str) -> None:
    settings = privacy() if protection == "secure_sum" else noised()
    spoilt = sends_garbage("values", lambda tensor: tensor.random_(-(1 << 31), (1 << 31) - 1))
    net = Lying(model, settings, spoilt, SITES[:4])
    with pytest.raises(ProtectionError, match="cannot be true"):
        run(tmp_path, net, start, settings, weighting="uniform")


def noised(**changes):
    return privacy(dp="distributed", noise_multiplier=0.5, clip_norm=0.05, max_examples=1, **changes)


def test_a_noised_sum_beyond_its_norm_is_refused(model, start, tmp_path: Path) -> None:
    """A single update that is longer than the clip norm is seen through the noise, though no value is too large."""

    def longer(tensor: torch.Tensor) -> None:
        tensor += 20_000

    net = Lying(model, noised(), sends_garbage("values", longer), SITES[:4])
    with pytest.raises(ProtectionError, match="cannot be true: its norm is"):
        run(tmp_path, net, start, noised(), weighting="uniform")


def test_rounds_of_honest_sites_at_their_limits_are_not_refused(model, start, tmp_path: Path) -> None:
    """Every value cut off at the bound, every site at the most examples, the coarsest ring."""
    settings = privacy(bound=1e-9, max_examples=8, ring_bits=16)
    state = run(tmp_path, Net(model, settings, names=SITES), start, settings)
    assert (flatten(state.weights) - flatten(start)).abs().max() > 0


def test_a_round_that_is_done_again_is_paid_for_twice(model, start, tmp_path: Path) -> None:
    """What was revealed, the liar could open: with noise in shares each try counts, at the sites and in the account."""
    net = Lying(model, noised(), gives_false_shares("seed"), SITES[:5])
    state = run(tmp_path, net, start, noised(), notify=net.notify, weighting="uniform")
    for name in "acde":
        entries = net.sites[name].state.data["privacy_entries"]
        assert [row["round_number"] for row in entries] == [1, 1]
    assert len(state.privacy["entries"]) == 2
