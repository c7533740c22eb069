"""Ledgers: what is written before training, what is refused, what a kill leaves behind."""

from __future__ import annotations

import json
import math
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from acting import acting
from silotune.errors import MessageError, PrivacyError
from silotune.federation.coordinator.privacy import LEDGER, central_privacy
from silotune.federation.coordinator.rounds import run_rounds
from silotune.federation.coordinator.settlement import Reported
from silotune.federation.site.client import client_round
from silotune.federation.site.ledger import Budget, cost_of, open_round, spent_in
from silotune.federation.site.state import Site
from silotune.federation.wire.orders import Order
from silotune.federation.wire.run_setup import RunSettings
from silotune.models import adapters
from silotune.privacy.accountant import Spend, epsilon
from silotune.privacy.ledger import as_row, entry, from_row, spent, union
from silotune.record.runs import RunFolder
from silotune.settings.sections import FederationSection, PrivacySection, TrainingSection
from silotune.structs import BUDGET, Failure, Reply, Request, ServerState, SiteState
from silotune.training.release import release_of
from silotune.transports.in_process import InProcess

EXAMPLES = tiny.encoded(tiny.closed())
DELTA = 1e-5
ONE = Spend(1.0)
FAST = {"accountant": "rdp"}


def section(**changes: Any) -> PrivacySection:
    return PrivacySection(**tiny.sorted_privacy({"dp": "example", "noise_multiplier": 1.0, **FAST, **changes}))


def opened(place: Path | None, state: SiteState | None = None, number: int = 1, run: str = "r", **changes: Any):
    budget = Budget(place)
    return open_round(
        "a", state or SiteState(), budget, section(**changes), run=run, round_number=number, release=lambda noise: ONE
    )


def lines(place: Path) -> list[dict[str, Any]]:
    file = place / "a.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def test_entries_are_json_and_counted_once() -> None:
    made = [entry("r", 1, ONE), entry("r", 2, Spend(2.0, 0.1, 5, (3.0, 2.0)))]
    again = [from_row(json.loads(json.dumps(as_row(item)))) for item in made]
    assert again == made
    assert union(made, again) == made
    assert spent(made, DELTA, run="other") == 0.0
    for row in ({}, {**as_row(made[0]), "spend": {"noise_multiplier": 1, "rounds": 2}}, {**as_row(made[0]), "run": 1}):
        if row.get("run") == 1:
            assert from_row(row).run == "1"
        else:
            with pytest.raises(PrivacyError, match="entry that cannot be read"):
                from_row(row)
    good = as_row(made[0])
    for key, value in (
        ("noise_multiplier", math.nan),
        ("noise_multiplier", "x"),
        ("steps", -100),
        ("sampling_rate", 2),
    ):
        with pytest.raises(PrivacyError, match="entry that cannot be read"):
            from_row({**good, "spend": {**good["spend"], key: value}})


def test_a_round_is_written_down_before_it_is_trained_and_composes(tmp_path: Path) -> None:
    first = opened(tmp_path)
    assert [row["round_number"] for row in lines(tmp_path)] == [1]
    second = opened(tmp_path, first.state, 2)
    assert first.epsilon == pytest.approx(4.728507, abs=1e-5)
    assert second.epsilon == epsilon([Spend(1.0, steps=2)], DELTA, accountant="rdp")


def test_the_round_that_would_overspend_is_refused_and_leaves_no_trace(tmp_path: Path) -> None:
    two = epsilon([Spend(1.0, steps=2)], DELTA, accountant="rdp")
    state = SiteState()
    for number in (1, 2):
        state = opened(tmp_path, state, number, epsilon=two).state
    before = lines(tmp_path)
    with pytest.raises(PrivacyError, match=r"above privacy.dp.epsilon = 7.07739; nothing was trained"):
        opened(tmp_path, state, 3, epsilon=two)
    assert lines(tmp_path) == before


def test_a_killed_round_counts_as_spent(tmp_path: Path) -> None:
    """The checkpoint of round 1 is gone back to, as a kill in round 2 makes it; the file knows of both attempts."""
    two = epsilon([Spend(1.0, steps=2)], DELTA, accountant="rdp")
    checkpoint = opened(tmp_path, epsilon=two).state
    opened(tmp_path, checkpoint, 2, epsilon=two)
    with pytest.raises(PrivacyError):
        opened(tmp_path, checkpoint, 2, epsilon=two)


def test_a_torn_charge_is_of_a_round_that_had_not_begun(tmp_path: Path, caplog) -> None:  # noqa: ANN001
    opened(tmp_path)
    before = (tmp_path / "a.jsonl").read_bytes()
    (tmp_path / "a.jsonl").write_bytes(before + before[:30] + b"\0" * 100)
    opened(tmp_path, number=2)
    assert len(lines(tmp_path)) == 2
    assert "was torn" in caplog.text and "a round that had not begun" in caplog.text


def test_a_lost_file_makes_nothing_unspent(tmp_path: Path) -> None:
    state = opened(tmp_path).state
    (tmp_path / "a.jsonl").unlink()
    assert opened(tmp_path, state, 2).epsilon == epsilon([Spend(1.0, steps=2)], DELTA, accountant="rdp")


def test_what_a_round_would_cost_counts_all_runs_and_writes_nothing(tmp_path: Path) -> None:
    one, two, three = (epsilon([Spend(1.0, steps=steps)], DELTA, accountant="rdp") for steps in (1, 2, 3))
    counted = {"delta": DELTA, "accountant": "rdp"}

    def cost(run: str, state: SiteState) -> tuple[float, float]:
        return cost_of("a", state, Budget(tmp_path), entry(run, 2, ONE), **counted)

    assert cost("one", SiteState()) == (one, one)
    state = opened(tmp_path, run="one").state
    assert cost("one", state) == cost("one", SiteState()) == (two, two)
    opened(tmp_path, run="two")
    assert cost("one", state) == (two, three) and cost("three", SiteState()) == (one, three)
    assert len((tmp_path / "a.jsonl").read_text().splitlines()) == 2
    broken = tmp_path / "a.jsonl"
    broken.write_text('{"identity": "x"}\n')
    with pytest.raises(PrivacyError, match="mend or move it"):
        opened(tmp_path)
    with pytest.raises(PrivacyError, match="cannot name a ledger"):
        open_round("../a", SiteState(), Budget(tmp_path), section(), run="r", round_number=1, release=lambda noise: ONE)


def test_noise_is_made_to_fit_once_and_kept() -> None:
    privacy = section(dp="local", noise_multiplier=None, epsilon=3.0)
    settings = tiny.training(max_steps=2)
    made = release_of(privacy, settings, num_examples=8, rounds=5)
    assert release_of(section(), settings, num_examples=8, rounds=5) == Spend(1.0, 0.5, 2)
    assert (made.sampling_rate, made.steps) == (1.0, 1)
    assert epsilon([replace(made, steps=5)], DELTA, accountant="rdp") <= 3.0
    asked: list[float | None] = []

    def release(noise: float | None) -> Spend:
        asked.append(noise)
        return release_of(privacy, settings, num_examples=8, rounds=5, noise=noise)

    state = SiteState()
    for number in (1, 2, 3, 4, 5):
        state = open_round("a", state, Budget(), privacy, run="r", round_number=number, release=release).state
    assert asked == [None, *[made.noise_multiplier] * 4]
    with pytest.raises(PrivacyError):
        open_round("a", state, Budget(), privacy, run="r", round_number=6, release=release)


ORDER = Order(run="r", seed=0).body()


def under(privacy: PrivacySection) -> RunSettings:
    return acting(tiny.training(objective="choice"), privacy=privacy, labels=tiny.LABELS, rounds=2)


def site_of(model, privacy: PrivacySection) -> Site:
    return Site("a", EXAMPLES, model, settings=under(privacy))


@pytest.mark.parametrize("dp", ["example", "local"])
def test_a_private_reply_withholds_what_is_not_noised(model, start, dp: str) -> None:
    site = site_of(model, section(dp=dp))
    reply = client_round(Request("train", 1, "a", start, ORDER), site)
    hidden = {name: reply.body[name] for name in ("loss", "tokens", "seconds", "core_seconds", "joules")}
    assert hidden == {"loss": None, "tokens": 0, "seconds": None, "core_seconds": None, "joules": None}
    rate, steps = (0.5, 2) if dp == "example" else (1.0, 1)
    assert reply.body["epsilon"] == epsilon([Spend(1.0, rate, steps)], DELTA, accountant="rdp")
    site.settings = under(section(dp=dp, report_costs=True))
    told = client_round(Request("train", 2, "a", start, ORDER), site)
    assert told.body["seconds"] > 0
    assert told.body["loss"] is None
    with pytest.raises(PrivacyError, match="releases no figures on its own examples"):
        client_round(Request("evaluate", 2, "a", start, ORDER), site)


@pytest.mark.parametrize("dp", ["example", "local", "distributed"])
def test_no_request_gets_figures_past_the_guarantee_of_the_run(model, start, dp: str) -> None:
    """Whatever comes first, whatever guarantee the request itself names, and where the run's settings name none now."""
    site = site_of(model, section(dp=dp))
    with pytest.raises(PrivacyError, match="releases no figures on its own examples"):
        client_round(Request("evaluate", 1, "a", start, ORDER), site)
    bare = {**ORDER, "privacy": PrivacySection().model_dump(mode="json")}
    for kind in ("train", "personalize", "evaluate"):
        with pytest.raises(MessageError, match=f"body of this {kind} request is not valid at 'privacy'"):
            client_round(Request(kind, 1, "a", start, bare), site)
    spent_before = site_of(model, section(dp="local"))
    client_round(Request("train", 1, "a", start, ORDER), spent_before)
    spent_before.settings = under(PrivacySection())
    for kind in ("train", "personalize"):
        with pytest.raises(PrivacyError, match="was under differential privacy, .* say privacy.dp = 'none' now"):
            client_round(Request(kind, 2, "a", start, ORDER), spent_before)
    with pytest.raises(PrivacyError, match="releases no figures on its own examples"):
        client_round(Request("evaluate", 2, "a", start, ORDER), spent_before)


def test_a_model_of_ones_own_tells_nothing_of_its_training_under_a_guarantee(model, start) -> None:
    site = site_of(model, PrivacySection())
    open_reply = client_round(Request("personalize", 1, "a", start, ORDER), site)
    assert open_reply.body["loss"] > 0 and open_reply.body["tokens"] > 0
    site.settings = under(section(dp="local"))
    reply = client_round(Request("personalize", 1, "a", start, ORDER), site)
    hidden = {name: reply.body[name] for name in ("loss", "tokens", "seconds", "core_seconds", "joules")}
    assert hidden == {"loss": None, "tokens": 0, "seconds": None, "core_seconds": None, "joules": None}


def test_what_ledgers_add_up_to(tmp_path: Path) -> None:
    for run, number in (("one", 1), ("one", 2), ("two", 1)):
        opened(tmp_path, run=run, number=number)
    (tmp_path / "b.jsonl").write_text(json.dumps(as_row(entry("two", 1, ONE))) + "\n")
    found = spent_in(tmp_path, delta=DELTA, accountant="rdp")
    single, double, all_three = (epsilon([replace(ONE, steps=steps)], DELTA, accountant="rdp") for steps in (1, 2, 3))
    assert found["a"] == {
        "epsilon": pytest.approx(all_three),
        "releases": 3,
        "runs": {
            "one": {"epsilon": pytest.approx(double), "releases": 2},
            "two": {"epsilon": pytest.approx(single), "releases": 1},
        },
    }
    assert found["b"]["epsilon"] == pytest.approx(single)
    with pytest.raises(PrivacyError, match="holds no privacy ledger"):
        spent_in(tmp_path / "nowhere", delta=DELTA)


def test_a_local_update_is_noised(model, start) -> None:
    quiet, loud = (
        client_round(Request("train", 1, "a", start, ORDER), site_of(model, privacy))
        for privacy in (PrivacySection(), section(dp="local", clip_norm=5.0))
    )
    difference = torch.cat([(loud.tensors[name] - quiet.tensors[name]).view(-1) for name in start])
    assert float(difference.std()) == pytest.approx(10.0, rel=0.15)  # 2 z S


def test_a_refusal_is_a_failure_of_its_own_stage(model, start) -> None:
    site, request = site_of(model, section(epsilon=0.001)), Request("train", 1, "a", start, ORDER)
    (failure,) = InProcess({"a": site}).exchange({"a": request}, timeout_seconds=1)
    assert isinstance(failure, Failure)
    assert failure.stage == BUDGET
    assert "nothing was trained" in failure.reason
    assert adapters.read(model).keys() == start.keys()


class Clients:
    """A transport whose clients all answer 1; the first refuses from ``refuses`` on."""

    def __init__(self, names: str = "abcd", refuses: int = 99) -> None:
        self.names, self.refuses, self.asked = list(names), refuses, []

    def clients(self):
        return self.names

    def exchange(self, requests, *, timeout_seconds):
        self.asked.append(list(requests))
        for name, request in requests.items():
            if request.round_number >= self.refuses:
                by_owner = {
                    "stage": "train",
                    "rule": "largest_epsilon_total",
                }  # the site's policy, not the run's epsilon
                refused = Failure(name, request.round_number, BUDGET, "spent")
                yield replace(refused, **by_owner) if name in "bd" else refused
                continue
            body = {"num_examples": 5, "loss": None, "steps": 1, "tokens": 0, "seconds": None, "core_seconds": None}
            delta = {"w": torch.ones(3)}
            yield Reply("train", request.round_number, name, delta, {**body, "epsilon": 0.5 * request.round_number})

    def states(self):
        return {}


def plan(rounds: int = 3, **more: Any):
    from silotune.federation.coordinator.rounds import Plan
    from silotune.methods.algorithms import method

    reported = Reported(PrivacySection(dp={"type": "local", "epsilon": 2.0}), TrainingSection(), rounds)
    return Plan(rounds=rounds, method=method(FederationSection()), body={}, seed=1, reported=reported, **more)


def test_a_run_whose_clients_have_spent_all_ends_and_keeps_its_model(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    state = run_rounds(plan(), Clients(refuses=3), ServerState(0, {"w": torch.zeros(3)}), run)
    assert state.round_number == 2
    assert "no client's privacy budget allows round 3: spent" in state.stopped
    assert state.weights["w"].tolist() == [2.0, 2.0, 2.0]
    assert [row["epsilon"] for row in run.read_rows("metrics")] == [0.5, 1.0]
    saved = run.load_checkpoint()
    assert saved is not None and saved[0].privacy == {"epsilon": 1.0}
    with pytest.raises(PrivacyError):
        run_rounds(plan(), Clients(refuses=1), ServerState(0, {"w": torch.zeros(3)}), RunFolder(tmp_path / "none"))


def central(rounds: int = 3, sizes: int = 4, per_round: int | None = None, **changes: Any):
    privacy = section(**{"dp": "client", "clip_norm": 100.0, **changes})
    names = {name: 5 for name in "abcdefghijklmnop"[:sizes]}
    federation = FederationSection(rounds=rounds, clients_per_round=per_round, weighting="uniform")
    made = central_privacy(privacy, federation, names, run="r")
    return replace(made, entropy=random.Random(3).randbytes)


def test_the_coordinator_adds_noise_counts_it_and_stops(tmp_path: Path) -> None:
    two = epsilon([Spend(1.0, steps=2)], DELTA, accountant="rdp")
    run = RunFolder(tmp_path)
    made = plan(privacy=central(epsilon=two))
    state = run_rounds(made, Clients(), ServerState(0, {"w": torch.zeros(3)}), run)
    assert (state.round_number, len(run.read_rows(LEDGER))) == (2, 2)
    assert "above privacy.dp.epsilon" in state.stopped
    assert state.privacy["epsilon"] == pytest.approx(two)
    assert all(abs(value - 2.0) > 1e-3 for value in state.weights["w"].tolist())  # noise of deviation 25 a round


def test_a_killed_round_of_the_coordinator_counts(tmp_path: Path) -> None:
    run, made = RunFolder(tmp_path), central()
    kept = made.open({}, 1, run)
    made.open(kept, 2, run)
    again = made.open(kept, 2, run)
    assert again["epsilon"] == epsilon([Spend(1.0, steps=3)], DELTA, accountant="rdp")


def test_poisson_draws_are_counted_as_amplification_and_may_be_empty(tmp_path: Path) -> None:
    made = central(sizes=16, per_round=4, client_sampling="poisson")
    assert made.release == Spend(1.0, 0.25, 1)
    assert made.mechanism.expected_weight == 4.0
    names = list("abcdefghijklmnop")
    sizes = [len(made.sample(names) or ()) for _ in range(400)]
    assert sum(sizes) / 400 == pytest.approx(4.0, abs=0.35)
    assert len(set(sizes)) > 5
    fixed = central(sizes=16, per_round=4)
    assert fixed.sample(names) is None
    assert fixed.release.sampling_rate == 1.0  # drawn by the run's seed, which sites know
    nobody = replace(made, entropy=lambda count: b"\xff" * count)
    transport = Clients("abcdefghijklmnop")
    state = run_rounds(plan(1, privacy=nobody), transport, ServerState(0, {"w": torch.zeros(3)}), RunFolder(tmp_path))
    assert transport.asked == [[]]
    assert state.round_number == 1
    assert any(state.weights["w"].tolist())


def test_an_adaptive_bound_is_kept_in_the_state(tmp_path: Path) -> None:
    made = plan(2, privacy=central(2, clipping="adaptive", clip_norm=1000.0))
    state = run_rounds(made, Clients(), ServerState(0, {"w": torch.zeros(3)}), RunFolder(tmp_path))
    assert state.privacy["clip_norm"] < 1000.0
