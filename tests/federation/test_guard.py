"""A guarded site: its policy is asked first, what it answers is signed, and all of it stands in its own trail."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

import tiny
from governed import BODY, NOW, START, Federation, job, work
from silotune.errors import MessageError, PolicyError
from silotune.federation.client import EvaluateOrder, Site, TrainOrder, client_round
from silotune.federation.guard import guarded
from silotune.federation.messages import decode_reply, decode_request, encode, layout_of
from silotune.federation.signing import check_signature, request_digest, statement
from silotune.record.audit import FILE
from silotune.record.canonical import sha256
from silotune.record.chain import read_chain, verify_chain
from silotune.record.signatures import new_key
from silotune.sections import FederationSection
from silotune.structs import Reply, Request
from silotune.tensors import digest


def events(folder: Path, name: str = "bank-a") -> list[tuple[str, str]]:
    return [(entry.event, str(entry.fields.get("rule", ""))) for entry in read_chain(folder / name / FILE)]


def test_a_reply_is_signed_for_its_request(tmp_path: Path) -> None:
    sites = Federation(tmp_path)
    request = sites.request()
    arrived = decode_request(encode(request), layout_of(request.tensors))
    assert arrived.head == request.head
    sent = guarded(arrived, sites.guard("bank-a"), work)
    reply = decode_reply(encode(sent), layout_of(START))
    said = statement(reply, request=request_digest(request, digest(request.tensors)), head=request.head)
    assert check_signature(reply, said, [new_key().public, sites.keys["bank-a"].public])
    for changed in (
        replace(reply, body={**reply.body, "num_examples": 99}), replace(reply, round_number=2),
        replace(reply, client="bank-b"), replace(reply, digest="0" * 64),
    ):  # fmt: skip
        other = statement(changed, request=said["request"], head=said["head"])
        with pytest.raises(MessageError, match="does not fit"):
            check_signature(changed, other, [sites.keys["bank-a"].public])
    with pytest.raises(MessageError, match="is not signed"):
        check_signature(replace(reply, signature=""), said, [sites.keys["bank-a"].public])
    assert events(tmp_path) == [("request", ""), ("reply", "")]
    verify_chain(tmp_path / "bank-a" / FILE, is_open_allowed=True)


@pytest.mark.parametrize(
    ("policy", "rule"),
    [
        ("objectives = ['choice']", "objectives"), ("tasks = ['medqa']", "tasks"), ("surprise = 1", "policy.toml"),
        ("largest_adapter = 4", "largest_adapter"), ("secure_aggregation = true", "secure_aggregation"),
        ("least_participants = 2", "least_participants"), ("largest_epsilon_run = 1.0", "largest_epsilon_run"),
        ("base_models = ['" + "a" * 64 + "']", "base_models"), ("submitters = []", "submitters"),
    ],
)  # fmt: skip
def test_what_the_policy_forbids_is_not_even_begun(tmp_path: Path, policy: str, rule: str) -> None:
    sites = Federation(tmp_path, policy=policy)

    def never(request: Request) -> Any:
        raise AssertionError("the work was begun")

    with pytest.raises(PolicyError) as caught:
        guarded(sites.request(), sites.guard("bank-a"), never)
    assert caught.value.rule == rule
    assert events(tmp_path) == [("request", ""), ("refusal", rule)]


def test_what_the_policy_allows_is_done(tmp_path: Path) -> None:
    sites, key = Federation(tmp_path), new_key()
    sites.policy = f"""
        base_models = ['{"a" * 64}']
        tasks = ['finance-news']
        objectives = ['sft']
        largest_adapter = 5
        smallest_adapter = 5
        least_participants = 2
        largest_epsilon_run = 1.0
        largest_epsilon_total = 3.0
        largest_upload_bytes = 500
        submitters = ['{key.public}']
        charter = '{"c" * 64}'
    """
    known = {"base_sha256": "a" * 64, "charter": lambda: ("c" * 64, NOW.date())}
    guard = sites.guard("bank-a", epsilons=lambda request, delta: (1.0, 2.5), **known)
    body = {**BODY, "job": job(key, charter_sha256="c" * 64).model_dump(mode="json")}
    assert guarded(sites.request(body=body), guard, work).signature
    changes = {
        "largest_epsilon_total": {"epsilons": lambda request, delta: (1.0, 3.5)},
        "largest_epsilon_run": {"epsilons": lambda request, delta: None},
        "charter": {"charter": lambda: ("c" * 64, NOW.date() - timedelta(days=1))},
        "largest_adapter": {"adapter_values": 6},
    }
    for rule, facts in changes.items():
        with pytest.raises(PolicyError, match=f"'{rule}'"):
            guarded(sites.request(body=body), replace(guard, **facts), work)


def test_a_sum_is_looked_at_before_it_begins(tmp_path: Path) -> None:
    """Cohort and threshold are the sum's; the settings to train with stand within its order; keys are no figures."""
    key = new_key()
    rules = f"submitters = ['{key.public}']\nleast_participants = 2\nleast_colluding = 1\nmetrics = []"
    sites = Federation(tmp_path, policy=rules)
    guard, signed_job = sites.guard("bank-a"), job(key).model_dump(mode="json")

    def request(kind: str, **body: Any) -> Request:
        return sites.request(kind=kind, tensors={}, body={"job": signed_job, **body})

    def keys(asked: Request) -> Reply:
        return Reply(asked.kind, 1, "bank-a", {}, {"mask": "m" * 64})

    terms = {"cohort": ["bank-a", "bank-b"], "threshold": 2 / 3}
    assert guarded(request("secure_sum.keys", terms=terms), guard, keys).body == {"mask": "m" * 64}
    assert "m" * 64 not in (tmp_path / "bank-a" / FILE).read_text()
    guarded(request("secure_sum.keys", terms={**terms, "noise": {"colluding": 1}}), guard, keys)
    refused = {
        "least_participants": {"cohort": ["bank-a"]},
        "least_threshold": {"threshold": 0.6},
        "least_colluding": {"noise": {"colluding": 0}},
    }
    for rule, changed in refused.items():
        with pytest.raises(PolicyError, match=f"'{rule}'"):
            guarded(request("secure_sum.keys", terms={**terms, **changed}), guard, keys)
    guarded(request("secure_sum.input", train=BODY), guard, keys)
    with pytest.raises(PolicyError, match="not those that the submitter signed"):
        guarded(request("secure_sum.input", train={**BODY, "rounds": 9}), guard, keys)


def test_a_job_vouches_for_the_settings(tmp_path: Path) -> None:
    key = new_key()
    sites = Federation(tmp_path, policy=f"submitters = ['{key.public}']")
    guard = sites.guard("bank-a")
    good = job(key).model_dump(mode="json")
    guarded(sites.request(body={**BODY, "job": good}), guard, work)
    late = job(key, expires=NOW - timedelta(seconds=1)).model_dump(mode="json")
    forged = {**good, "job": {**good["job"], "participants": ["bank-a"]}}
    cases = {
        "carries no signed job": {"body": BODY},
        "cannot be read": {"body": {**BODY, "job": {"job": {}}}},
        "not among those allowed": {"body": {**BODY, "job": job(new_key()).model_dump(mode="json")}},
        "not those that the submitter signed": {"body": {**BODY, "rounds": 4, "job": good}},
        "beyond the 3 rounds": {"body": {**BODY, "job": good}, "round_number": 4},
        "expired at 2026-03-04 11:59 UTC": {"body": {**BODY, "job": late}},
        "signature does not fit": {"body": {**BODY, "job": forged}},
    }
    for why, changes in cases.items():
        with pytest.raises(PolicyError, match=why) as caught:
            guarded(sites.request(**changes), guard, work)
        assert caught.value.rule == "submitters"


def test_a_job_vouches_for_the_setup_that_a_site_opened(tmp_path: Path) -> None:
    key = new_key()
    sites = Federation(tmp_path, policy=f"submitters = ['{key.public}']")
    setup = sha256({"config": {"model": {"max_length": 64}}})
    guard = sites.guard("bank-a", setup_sha256=setup)
    signed_for = {"it": setup, "another": sha256({"config": {"model": {"max_length": 8}}}), "none": None}
    bodies = {
        name: {**BODY, "job": job(key, setup_sha256=digest).model_dump(mode="json")}
        for name, digest in signed_for.items()
    }
    guarded(sites.request(body=bodies["it"]), guard, work)
    for other in ("another", "none"):
        with pytest.raises(PolicyError, match="setup is not the one that the submitter signed") as caught:
            guarded(sites.request(body=bodies[other]), guard, work)
        assert caught.value.rule == "submitters"


def test_a_coordinator_must_commit_itself(tmp_path: Path) -> None:
    sites = Federation(tmp_path)
    stranger = Federation(tmp_path / "other").request().head
    for head in ("", "1:x:y", stranger):
        with pytest.raises(PolicyError, match="head of the audit trail is missing or not signed"):
            guarded(sites.request(head=head), sites.guard("bank-a"), work)


def test_a_policy_that_is_changed_holds_from_the_next_request_on(tmp_path: Path) -> None:
    sites = Federation(tmp_path)
    guard = sites.guard("bank-a")
    guarded(sites.request(), guard, work)
    guard.policy.write_text("objectives = ['choice']")
    with pytest.raises(PolicyError, match="objectives"):
        guarded(sites.request(), guard, work)


def test_what_leaves_is_limited(tmp_path: Path) -> None:
    sites = Federation(tmp_path, policy="metrics = []")
    assert guarded(sites.request(), sites.guard("bank-a"), work).body["loss"] is None
    for policy in ("smallest_count = 11", "largest_upload_bytes = 20"):
        sites.policy = policy
        with pytest.raises(PolicyError, match=policy.partition(" ")[0]):
            guarded(sites.request(), sites.guard("bank-a"), work)


def test_a_failure_stands_in_the_trail_without_its_words(tmp_path: Path) -> None:
    sites = Federation(tmp_path)

    def fails(request: Request) -> Any:
        raise ValueError("the patient's name")

    with pytest.raises(ValueError, match="patient"):
        guarded(sites.request(), sites.guard("bank-a"), fails)
    assert "patient" not in (tmp_path / "bank-a" / FILE).read_text()
    assert events(tmp_path)[-1][0] == "failure"


def test_the_client_function_is_guarded(tmp_path: Path, model, start) -> None:
    sites = Federation(tmp_path, policy="objectives = ['sft']\nmetrics = ['accuracy']\nsmallest_count = 3")
    examples = tiny.encoded(tiny.closed(6))
    site = Site("bank-a", examples, model, guard=sites.guard("bank-a"))
    order = TrainOrder(training=tiny.training(), federation=FederationSection(), seed=3, rounds=4)
    request = sites.request(tensors=start, body=order.model_dump(mode="json"))
    reply = client_round(request, site)
    assert reply.signature and reply.body["loss"] is None and reply.body["num_examples"] == 6
    scores = EvaluateOrder(labels=tiny.LABELS, batch_size=4).model_dump(mode="json")
    figures = client_round(replace(request, kind="evaluate", body=scores), site).body
    assert figures["accuracy"] is not None and figures["confusion"] is None and figures["num_examples"] == 6
    assert client_round(replace(request, kind="countersign", tensors={}, body={}), site).signature
    refused = sites.request(tensors=start, body={**request.body, "training": {"objective": "choice"}})
    with pytest.raises(PolicyError, match="objectives"):
        client_round(refused, site)
    assert [event for event, _ in events(tmp_path)] == ["request", "reply"] * 3 + ["request", "refusal"]
