"""What a submitted run may ask for, over kits as they are provisioned: to the bits of one process, by sites' rules."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

import tiny
from deployed import NAMES, Deployed, document, quickly, without_waiting
from silotune.config import Config, from_mapping
from silotune.deploy.kits import site_folder
from silotune.deploy.submit import submit_run
from silotune.deploy.trainer import guard_of, holdings_of, protection_of
from silotune.errors import FederationError, ProtectionError
from silotune.experiment.audit import verify_run
from silotune.experiment.run import run_experiment
from silotune.federation.wire.messages import decode_request, encode, read_header
from silotune.record.chain import read_chain
from silotune.record.runs import RunFolder

pytestmark = pytest.mark.end_to_end
SUM = {"protection": {"type": "secure_sum", "max_examples": 64}}
PACKED = {
    "upload": {"keep": "top-k", "share": 0.5, "values": "int8", "zstd": 1},
    "download": {"values": "int8", "delta": True, "zstd": 1},
}
CASES: dict[str, dict[str, dict[str, Any]]] = {
    "secure_sum": {"privacy": SUM, "training": {"optimizer_state": "keep"}},
    "he": {"privacy": {"protection": "he"}, "federation": {"rounds": 1}},
    "links": {"federation": PACKED},
    "exact-residual": {"federation": {"lora": "exact-residual"}},
    "svd by rank": {"federation": {"lora": "svd", "ranks": {NAMES[1]: 1}}},
    "sb": {"federation": {"lora": "sb"}, "seed": 5},
    "mixture": {
        "data": {"task": "mixture", "mixture": {"finance-news": 2, "medical-choice": 1}},
        "training": {"objective": "sft"},
        "adapter": {"start": "before"},
    },
}


@pytest.fixture(scope="module", autouse=True)
def quick() -> Iterator[None]:
    with quickly(), without_waiting():
        yield


@pytest.fixture(scope="module")
def deployed(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Deployed:
    return Deployed(tmp_path_factory.mktemp("deployed") / "f", tiny_folder, plan="he = true")


@pytest.fixture(scope="module")
def configuration(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Config]:
    """A run of seconds over three sites; sections are updated by keyword."""
    folder = tmp_path_factory.mktemp("runs")

    return lambda **sections: from_mapping(document(tiny_folder, folder, **sections))


@pytest.fixture(scope="module")
def before(configuration: Callable[..., Config]) -> RunFolder:
    return run_experiment(configuration(record={"name": "before"}, federation={"rounds": 1}))


def adapter(run: RunFolder) -> Any:
    return run.part("federated").load_adapter()[0]


@pytest.mark.parametrize("case", CASES)
def test_the_bits_are_those_of_one_process(
    deployed: Deployed, configuration: Callable[..., Config], before: RunFolder, case: str
) -> None:
    sections = dict(CASES[case])
    if "adapter" in sections:
        sections["adapter"] = {"start": str(before.path)}
    name = case.replace(" ", "-")
    near = run_experiment(configuration(**sections, record={"name": f"near-{name}"}))
    far = deployed.run(configuration(**sections, record={"name": name}), seed=len(case))
    tiny.assert_same_bits(adapter(near), adapter(far))
    rows = [run.part("federated").read_rows("clients") for run in (near, far)]
    assert [row["client"] for row in rows[0]] == [row["client"] for row in rows[1]]
    assert [row["num_examples"] for row in rows[0]] == [row["num_examples"] for row in rows[1]]
    verified = verify_run(
        far.path, keys=deployed.kit.members().signing_keys(), sites=[site_folder(deployed.site(name)) for name in NAMES]
    )
    assert verified.has_adapter and set(verified.witnesses) == set(NAMES)


# --- privacy at the sites --------------------------------------------------------------------------------------------

PRIVATE = {"dp": {"type": "example", "noise_multiplier": 1.0, "accountant": "rdp"}}
WHOLE = {"batch_size": 32}
"""Every step takes all examples: quickly counted."""


def failures(run: RunFolder) -> dict[str, str]:
    """Site -> rule that refused, or stage and reason."""
    rows = run.part("federated").read_rows("metrics")
    return {
        item["client"]: item.get("rule") or f"{item['stage']}: {item['reason']}"
        for row in rows
        for item in row["failures"]
    }


def test_a_site_counts_what_it_spends_and_refuses_by_its_own_rule(
    deployed: Deployed, configuration: Callable[..., Config]
) -> None:
    """The ledger is the site's, over runs and restarts; what a run may cost is told by the site's rule, by name."""
    once = {"federation": {"rounds": 1}}
    first = deployed.run(configuration(privacy=PRIVATE, training=WHOLE, record={"name": "private"}, **once))
    said = first.part("federated").read_json("result")["privacy"]
    assert set(said["clients"]) == set(NAMES) and said["epsilon"] == max(said["clients"].values()) > 0
    said_lines = first.read_json("privacy")
    assert "epsilon = what its institution's ledger says" in said_lines["planned"][1]
    assert f"epsilon = {said['epsilon']:.3g} at delta" in said_lines["statement"][1]
    ledger = site_folder(deployed.site(NAMES[0])) / "ledger" / f"{NAMES[0]}.jsonl"
    assert len(ledger.read_text().splitlines()) == 1
    spent = said["clients"][NAMES[0]]
    trail = read_chain(site_folder(deployed.site(NAMES[0])) / "audit.jsonl")
    counted = [entry.fields["epsilon_run"] for entry in trail if entry.event == "privacy"]
    assert counted == [pytest.approx(spent)]
    rules = (f"largest_epsilon_total = {1.01 * spent}", f"largest_epsilon_run = {0.3 * spent}")
    for name, rule in zip(NAMES, rules, strict=False):
        deployed.allow(name, rule)
        deployed.hosts[name] = deployed.restarted(name)
    try:
        again = deployed.run(configuration(privacy=PRIVATE, training=WHOLE, record={"name": "again"}, **once))
        assert failures(again) == {NAMES[0]: "largest_epsilon_total", NAMES[1]: "largest_epsilon_run"}
        assert len(ledger.read_text().splitlines()) == 1
        bare = deployed.run(configuration(record={"name": "bare"}, **once))  # without noise no epsilon is known
        assert failures(bare) == failures(again)
    finally:
        for name in NAMES:
            deployed.allow(name, "")


def test_a_run_ends_when_its_own_budget_is_spent_at_every_site(
    deployed: Deployed, configuration: Callable[..., Config]
) -> None:
    budget, rounds = {"dp": {**PRIVATE["dp"], "epsilon": 9.0}}, {"rounds": 30, "lora": "freeze-a"}
    planned = configuration(privacy=budget, training=WHOLE, federation=rounds)
    result = deployed.run(planned).part("federated").read_json("result")
    assert 0 < result["rounds"] < 30 and "no client's privacy budget allows round" in result["stopped"]
    assert result["privacy"]["epsilon"] <= 9.0


def test_a_share_of_a_sums_noise_is_priced_by_each_site(
    deployed: Deployed, configuration: Callable[..., Config]
) -> None:
    """Three sites, all needed, one of which may collude: two shares make up the noise."""
    shared = {
        "privacy": {
            "dp": {"type": "distributed", "noise_multiplier": 1.0, "accountant": "rdp"},
            "protection": "secure_sum",
        },
        "federation": {"rounds": 2, "weighting": "uniform", "lora": "freeze-a"},
    }
    run = deployed.run(configuration(**shared, record={"name": "shares"}))
    said = run.part("federated").read_json("result")["privacy"]
    ledger = site_folder(deployed.site(NAMES[0])) / "ledger" / f"{NAMES[0]}.jsonl"
    rows = map(json.loads, ledger.read_text().splitlines())
    own = [row for row in rows if row["spend"]["skellam_norms"]]
    assert [row["round_number"] for row in own] == [1, 1, 2, 2]  # as planned, then as it was opened
    trail = read_chain(site_folder(deployed.site(NAMES[0])) / "audit.jsonl")
    counted = [entry.fields["epsilon_run"] for entry in trail if entry.event == "privacy"][-2:]
    assert counted[0] < counted[1] == pytest.approx(said["epsilon"])
    deployed.allow(NAMES[1], f"largest_epsilon_run = {0.9 * counted[0]}")
    try:
        with pytest.raises(ProtectionError, match="policy rule 'largest_epsilon_run'"):
            deployed.run(configuration(**shared, record={"name": "dear"}))
    finally:
        deployed.allow(NAMES[1], "")


# --- protected sums between sites that do not trust the coordinator ---------------------------------------------------


def test_keys_that_the_coordinator_swaps_are_refused_by_every_peer(
    deployed: Deployed, configuration: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The keys that peers are known by come from the list that the authority signed, which is in every kit."""
    plain = deployed.work

    def swapped(envelope: Any, setup: Any, data: bytes) -> Any:
        if read_header(data).kind == "secure_sum.shares":
            request = decode_request(data, {})
            keys = {**request.body["keys"]}
            keys[NAMES[1]] = {**keys[NAMES[1]], "mask": keys[NAMES[2]]["mask"]}
            data = encode(replace(request, body={**request.body, "keys": keys}))
        return plain(envelope, setup, data)

    monkeypatch.setattr(deployed, "work", swapped)
    with pytest.raises(ProtectionError, match="0 of 3 clients sent shares"):
        deployed.run(configuration(privacy=SUM, record={"name": "swapped"}))
    assert [frame.header["reason"] for _, _, frame in deployed.seen[-3:]] == ["protection"] * 3
    said = {name: read_chain(site_folder(deployed.site(name)) / "audit.jsonl")[-1].fields["reason"] for name in NAMES}
    assert "is not signed by 'client-1'" in said[NAMES[0]] and "does not hold this site's own" in said[NAMES[1]]


def test_a_setup_that_the_coordinator_changes_is_refused_by_every_site(
    deployed: Deployed, configuration: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = deployed.work

    def shortened(envelope: Any, setup: Any, data: bytes) -> Any:
        changed = json.loads(setup)
        changed["config"]["model"]["max_length"] -= 1
        return plain(envelope, json.dumps(changed).encode(), data)

    monkeypatch.setattr(deployed, "work", shortened)
    config = configuration(record={"name": "shortened"}, federation={"rounds": 1})
    with pytest.raises(FederationError):
        deployed.run(config)
    frames = [frame for site, _, frame in deployed.seen[-len(NAMES) :]]
    assert [frame.header["reason"] for frame in frames] == ["job.setup"] * len(NAMES)


def test_a_site_in_a_protected_run_is_never_seen_alone(
    deployed: Deployed, configuration: Callable[..., Config]
) -> None:
    deployed.allow(NAMES[0], "secure_aggregation = true\nleast_participants = 3\nlargest_upload_bytes = 1000000")
    deployed.allow(NAMES[1], "metrics = []")
    try:
        run = deployed.run(configuration(privacy=SUM, record={"name": "closed"}, federation={"rounds": 1}))
        (first, *_) = run.part("federated").read_rows("clients")
        assert (first["client"], first["clients_in_sum"]) == ("(sum)", 3)
        bare = deployed.run(configuration(record={"name": "seen"}, federation={"rounds": 1}))
        assert failures(bare) == {NAMES[0]: "secure_aggregation"}
        deployed.allow(NAMES[0], "least_participants = 4")
        with pytest.raises(ProtectionError, match="policy rule 'least_participants'"):
            deployed.run(configuration(privacy=SUM, record={"name": "few"}))
    finally:
        for name in NAMES[:2]:
            deployed.allow(name, "")


@pytest.mark.parametrize("rule", ["least_participants", "least_cohort"])
def test_the_policy_says_how_few_a_site_opens_a_sum_of(
    deployed: Deployed, configuration: Callable[..., Config], rule: str
) -> None:
    kit, settings = deployed.site(NAMES[0]), configuration(privacy={"protection": "he"}).privacy
    guard = guard_of(kit, holdings_of(kit))
    deployed.allow(NAMES[0], f"{rule} = 7")
    try:
        protection = protection_of(kit, guard, settings, name=NAMES[0])
        assert protection is not None and protection.member.least_clients == 7 > settings.sums.least_clients
    finally:
        deployed.allow(NAMES[0], "")


def test_a_round_is_not_opened_over_other_sites_after_a_restart(
    tmp_path: Path, tiny_folder: Path, configuration: Callable[..., Config]
) -> None:
    names = (*NAMES, "client-3")
    four = Deployed(tmp_path / "f", tiny_folder, names)
    config = configuration(
        privacy=SUM, federation={"rounds": 1, "timeout_seconds": 2}, data={"partition": {"clients": 4}}
    )
    name = submit_run(four.kit, config, submitter=four.submitter)
    four.work_on(name, tmp_path / "first" / "run")
    four.hosts = {site: four.restarted(site) for site in names}
    with pytest.raises(ProtectionError, match="0 of 4 clients signed the list of inputs"):
        four.work_on(name, tmp_path / "second" / "run", up=NAMES)
    ends = [read_chain(site_folder(four.site(site)) / "audit.jsonl")[-1] for site in NAMES]
    assert all("opened before, over other clients" in entry.fields["reason"] for entry in ends)
    four.work_on(name, tmp_path / "third" / "run")  # over the same sites it is the same sum


def test_a_run_ends_with_its_charter(deployed: Deployed, configuration: Callable[..., Config]) -> None:
    today = datetime.now(UTC).date()
    said = {"title": "t", "federation": "test", "owner": "o", "purpose": "p"}
    lines = [*(f'{key} = "{value}"' for key, value in said.items()), f'parties = ["{NAMES[0]}"]', "users = []"]

    def write(until: Any) -> None:
        for place in ("coordinator", "researcher", *NAMES):
            (deployed.folder / place / "charter.toml").write_text("\n".join([*lines, f"until = {until}"]))

    try:
        write(today + timedelta(days=1))
        deployed.run(configuration(record={"name": "chartered"}, federation={"rounds": 1}))
        ended = configuration(record={"name": "ended"}, federation={"rounds": 1})
        name = submit_run(deployed.kit, ended, submitter=deployed.submitter)
        for host in deployed.hosts.values():  # two days later
            assert host._guard is not None
            gate = replace(host._guard.gate, clock=lambda: datetime.now(UTC) + timedelta(days=2))
            host._guard = replace(host._guard, gate=gate)
        with pytest.raises(FederationError, match="policy rule 'charter': the run does not name the charter"):
            deployed.work_on(name, deployed.folder / "ended")
    finally:
        for place in ("coordinator", "researcher", *NAMES):
            (deployed.folder / place / "charter.toml").unlink()
