"""Secure sums with noise in shares: what the coordinator gets, what is charged, what is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from acting import ORDER, acting
from protected import EXAMPLES, NAMES, TRAINING, Net, asked, privacy, run
from silotune.errors import BudgetError, ProtectionError
from silotune.federation.coordinator.privacy import noise_in_shares
from silotune.federation.coordinator.protection import PROTECTIONS
from silotune.federation.coordinator.rounds import Plan, run_rounds
from silotune.federation.site import noised_sum
from silotune.federation.site.client import client_round
from silotune.federation.site.ledger import Budget
from silotune.federation.site.privacy import begin
from silotune.federation.site.state import Site
from silotune.federation.wire.orders import Order
from silotune.federation.wire.run_setup import RunSettings
from silotune.methods.algorithms import method
from silotune.privacy.accountant import Spend, epsilon
from silotune.privacy.distributed import integer_norms, shared_noise
from silotune.privacy.ledger import from_row
from silotune.privacy.secure_sum.terms import NoiseTerms, Terms
from silotune.record.runs import RunFolder
from silotune.settings.privacy import SecureSum
from silotune.settings.sections import PrivacySection, TrainingSection
from silotune.structs import Request, ServerState, SiteState
from silotune.tensors import clip, count, flatten
from tiny import assert_close

NOISE, CLIP = 0.5, 0.05
UNIFORM = {"weighting": "uniform"}


def distributed(**changes) -> PrivacySection:
    return privacy(**{"dp": "distributed", "noise_multiplier": NOISE, "clip_norm": CLIP, "max_examples": 1, **changes})


def clipped_updates(model, start) -> dict[str, np.ndarray]:
    """What each site would send if nothing were noised: its update within the clip norm."""
    acts, made = acting(TRAINING, rounds=1, **UNIFORM), {}
    for name in NAMES:
        site = Site(name, EXAMPLES[name], model, settings=acts)
        reply = client_round(Request("train", 1, name, start, ORDER), site)
        made[name] = flatten(clip(reply.tensors, CLIP)).numpy()
    return made


@pytest.mark.parametrize("gone", [(), ("c",)])
def test_the_sum_has_noise_of_central_strength(model, start, tmp_path: Path, gone: tuple[str, ...]) -> None:
    """Five sites of which four are needed and one may collude: three shares make up the whole, all are in the sum."""
    net = Net(model, distributed(), lambda kind, name: kind.endswith("input") and name in gone)
    state = run(tmp_path, net, start, distributed(), **UNIFORM)
    present = [name for name in NAMES if name not in gone]
    size = count(start)
    made = shared_noise(NOISE, bits=32, clients=5, needed=4, colluding=1, size=size)
    exact = sum(update for name, update in clipped_updates(model, start).items() if name in present) / len(present)
    off = (flatten(state.weights) - flatten(start)).numpy() - exact
    integers = made.length / CLIP * len(present)  # of the sum, for a unit of the mean
    expected = math.sqrt(len(present) * made.share_variance) / integers
    assert off.std() == pytest.approx(expected, rel=5 / math.sqrt(2 * size))
    assert abs(off.mean()) < 5 * expected / math.sqrt(size)
    (row,) = RunFolder(tmp_path).read_rows("clients")
    assert (row["clients_in_sum"], row["loss"], row["tokens"], row["clipped"]) == (len(present), None, 0, 0)
    assert row["num_examples"] == sum(len(EXAMPLES[name]) for name in present)
    charged = row["release"]["noise_multiplier"]
    assert charged == pytest.approx(NOISE * math.sqrt((len(present) - 1) / 3), rel=1e-3)
    entries = [site.state.data["privacy_entries"] for name, site in net.sites.items() if name in present]
    assert all(rows[0]["spend"]["noise_multiplier"] == charged for rows in entries)
    cost = epsilon([Spend(charged, skellam_norms=integer_norms(made.length, size))], 1e-5)
    assert state.privacy["epsilon"] == pytest.approx(cost)
    (metrics,) = RunFolder(tmp_path).read_rows("metrics")
    assert metrics["epsilon"] == state.privacy["epsilon"]


def test_next_to_no_noise_and_no_bound_are_the_plain_mean(model, start, tmp_path: Path) -> None:
    settings = privacy(dp="distributed", noise_multiplier=1e-5, clip_norm=3.0, max_examples=1, ring_bits=64)
    noised = run(tmp_path / "noised", Net(model, settings), start, settings, **UNIFORM)
    plain = run(tmp_path / "plain", Net(model, privacy("none")), start, privacy("none"), **UNIFORM)
    assert_close(noised.weights, plain.weights, 3e-3)  # a step of the rounding is 3 / 4096


def test_capped_weights(model, start, tmp_path: Path) -> None:
    """Sites of 3 to 7 examples, capped at 5: the divisor is the sum of what is in the sum."""
    settings = privacy(dp="distributed", noise_multiplier=1e-5, clip_norm=3.0, max_examples=5, ring_bits=64)
    state = run(tmp_path, Net(model, settings), start, settings, weighting={"type": "capped", "cap": 5})
    plain = run(
        tmp_path / "plain", Net(model, privacy("none")), start, privacy("none"), weighting={"type": "capped", "cap": 5}
    )
    assert_close(state.weights, plain.weights, 3e-3)


def test_a_round_that_never_opened_stays_charged_whole(model, start, tmp_path: Path) -> None:
    """Killed in round 2 before the sum was opened, resumed: round 2 stands twice, once at its worst."""
    ledger = Budget(tmp_path / "ledger")
    folder = tmp_path / "run"
    run(folder, Net(model, distributed(), budget=ledger), start, distributed(), **UNIFORM)
    state, sites = RunFolder(folder).load_checkpoint()
    cut = Net(model, distributed(), lambda kind, name: kind.endswith("check"), ledger)
    cut.restore(sites)
    with pytest.raises(ProtectionError, match="0 of 5 clients signed"):
        run(folder, cut, start, distributed(), rounds=2, state=state, **UNIFORM)
    again = Net(model, distributed(), budget=ledger)
    again.restore(sites)
    done = run(folder, again, start, distributed(), rounds=2, state=state, **UNIFORM)
    entries = again.sites["a"].state.data["privacy_entries"]
    assert [row["round_number"] for row in entries] == [1, 2, 2]
    noises = [row["spend"]["noise_multiplier"] for row in entries]
    assert noises[0] == noises[2] > noises[1] == pytest.approx(NOISE, rel=1e-3)
    assert len(done.privacy["entries"]) == 3
    assert done.privacy["epsilon"] == pytest.approx(epsilon([from_row(row).spend for row in entries], 1e-5))
    lost = Net(model, distributed())  # no ledger, no checkpoint: a site that has lost both counts anew
    run(tmp_path / "lost", lost, start, distributed(), **UNIFORM)
    assert len(lost.sites["a"].state.data["privacy_entries"]) == 1


def test_a_site_refuses_the_round_that_would_overspend(model, start, tmp_path: Path) -> None:
    one_round = noise_in_shares(distributed(), 5, 1)
    cap = 1.2 * epsilon([one_round], 1e-5)
    settings = distributed(epsilon=cap)
    net = Net(model, settings)
    with pytest.raises(BudgetError, match="nothing was trained"):
        run(tmp_path / "first", Net(model, distributed(epsilon=0.1)), start, distributed(epsilon=0.1), **UNIFORM)
    state = run(tmp_path / "run", net, start, settings, rounds=9, **UNIFORM)
    assert 1 <= state.round_number < 9 and "above privacy.dp.epsilon" in state.stopped


def test_noise_is_made_to_fit_the_epsilon() -> None:
    settings = distributed(noise_multiplier=None, epsilon=3.0)
    spend = noise_in_shares(settings, 12, 10)
    cost = epsilon([Spend(spend.noise_multiplier, steps=10, skellam_norms=spend.skellam_norms)], 1e-5)
    assert 2.98 < cost <= 3.0
    fine = integer_norms(4096 * 3, 2_000_000)  # of a larger model, at another resolution
    assert epsilon([Spend(spend.noise_multiplier, steps=10, skellam_norms=fine)], 1e-5) <= 3.0
    gaussian = epsilon([Spend(spend.noise_multiplier, steps=10)], 1e-5, accountant="rdp")
    assert cost == pytest.approx(gaussian, rel=0.02)


# --- requests that a site refuses -------------------------------------------------------------------------------------


def let_act(net: Net, privacy: PrivacySection) -> RunSettings:
    """All sites act by these settings."""
    acts = acting(TRAINING, privacy=privacy, rounds=1, **UNIFORM)
    for site in net.sites.values():
        site.settings = acts
    return acts


@pytest.mark.parametrize(
    ("terms", "told", "said"),
    [
        (privacy(), distributed(), "but the terms of the sum say otherwise"),
        (distributed(), privacy(), "but the terms of the sum say otherwise"),
        (distributed(clip_norm=9.0), distributed(), "is not that of the order to train"),
        (distributed(colluding=0), distributed(), "is not that of the order to train"),
        (distributed(noise_multiplier=0.3), distributed(), "is not that of the order to train"),
    ],
)
def test_terms_without_the_noise_that_is_ordered_are_refused(model, start, tmp_path, terms, told, said) -> None:
    net = Net(model, terms)
    with pytest.raises(ProtectionError, match="0 of 5 clients sent their input"):
        run_as(tmp_path, net, start, terms, told)
    assert {said in failure.reason for failure in net.failures} == {True}


def run_as(folder: Path, net: Net, start, terms: PrivacySection, told: PrivacySection) -> None:
    """A coordinator whose sums are under other settings than its sites act by."""
    acts = let_act(net, told)
    plan = Plan(
        rounds=1, method=method(acts.federation), body={**ORDER, "run": "r"}, seed=3, settings=acts,
        protected=PROTECTIONS[SecureSum](terms, {}),
    )  # fmt: skip
    run_rounds(plan, net, ServerState(0, start), RunFolder(folder))


@pytest.mark.parametrize(("kind", "way"), [("train", "none"), ("he.input", "he")])
@pytest.mark.parametrize(
    ("asked_for", "said"),
    [("secure_sum", "so its updates cannot leave with '{way}'"), (None, "no update leaves but inside a secure sum")],
)
def test_an_update_never_leaves_without_its_noise(
    model, start, kind: str, way: str, asked_for: str | None, said: str
) -> None:
    """Sites that would train alone: the run's settings say that it is one of sums, or of noise that only a sum has."""
    net = Net(model, privacy("he"))
    let_act(net, distributed(protection=asked_for or way))
    for site in net.sites.values():
        site.protection.is_required = False
    body = ORDER
    if kind == "he.input":
        body = {"packing": 3, "bound": 1.0, "clients": 5, "num_examples": 25, "size": count(start), "train": ORDER}
    with pytest.raises(ProtectionError, match=said.format(way=way)):
        asked(net, "a", kind, body, start)


def test_a_sum_that_turns_out_cheaper_changes_no_other_entry(tmp_path: Path) -> None:
    """A release of another kind in the same round: what opens the sum must not make it cheaper."""
    site = SimpleNamespace(
        name="a", examples=[1] * 9, state=SiteState(), budget=Budget(tmp_path),
        settings=acting(privacy=distributed(noise_multiplier=500, clip_norm=1)),
    )  # fmt: skip
    noise = NoiseTerms(multiplier=500, clip_norm=1, colluding=1)
    terms = Terms(
        session="0" * 32, round_number=1, cohort=("a", "b", "c", "d", "e"), threshold=2 / 3, bits=32, bound=1,
        max_examples=1, size=100, work="0" * 64, noise=noise,
    )  # fmt: skip
    share = noised_sum.begin(terms, Order(run="r", seed=0), site)
    local = PrivacySection(dp={"type": "local", "noise_multiplier": 1.0})
    begin(local, TrainingSection(), site, rounds=1, place=("r", 1))
    noised_sum.settle(terms, 5, site, share.entry)
    rows = map(json.loads, (tmp_path / "a.jsonl").read_text().splitlines())
    entries = {item.identity: item.spend for item in map(from_row, rows)}
    assert sorted(spend.noise_multiplier for spend in entries.values()) == [1.0, pytest.approx(500 * (4 / 3) ** 0.5)]
    assert entries[share.entry].skellam_norms is not None
    before = site.state
    noised_sum.settle(terms, 5, site, "of a state that was put back")
    assert site.state is before
