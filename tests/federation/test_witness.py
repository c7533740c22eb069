"""A coordinator's trail over whole runs: what sites sign, what does not count, what a false coordinator cannot do."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from governed import BODY, NAMES, START, Federation, job, work
from silotune.errors import AuditError, FederationError
from silotune.experiment.audit import verify_run
from silotune.federation.coordinator.audit import close, concludes, countersign, flush, uncountersigned
from silotune.federation.coordinator.course import updates_of, verify_trail
from silotune.federation.coordinator.replay import replayed
from silotune.federation.coordinator.rounds import exchange, run_rounds
from silotune.federation.wire.signed_job import JOB
from silotune.methods.algorithms import method
from silotune.record.audit import COUNTERSIGNED, FILE, Trail
from silotune.record.chain import check_witness, read_chain, sites_of
from silotune.record.plain_json import canonical
from silotune.record.runs import RunFolder
from silotune.record.signatures import new_key
from silotune.settings.sections import FederationSection, TrainingSection
from silotune.structs import ClientUpdate, Reply, Request, ServerState
from silotune.tensors import digest

ONE_ROUND = ["request", "request", "reply", "reply", "aggregation", "checkpoint"]


def keys(sites: Federation) -> dict[str, list[str]]:
    return {"coordinator": [sites.coordinator.public], **{name: [key.public] for name, key in sites.keys.items()}}


def test_a_run_verifies_and_every_site_s_trail_agrees(tmp_path: Path) -> None:
    sites = Federation(tmp_path)
    sites.finish(sites.run())
    found = verify_trail(tmp_path / "run" / FILE, keys=keys(sites))
    events = [entry.event for entry in found.entries]
    assert events == ["started", *ONE_ROUND, *ONE_ROUND, "result", "closed"] and found.is_closed
    for name in NAMES:
        own = verify_trail(tmp_path / name / FILE, keys=keys(sites), is_open_allowed=True)
        assert [entry.event for entry in own.entries] == ["request", "reply"] * 2
        assert check_witness(found.entries, own.entries) == 2
        assert own.entries[1].fields["request"] == found.entries[1 + NAMES.index(name)].fields["request"]


@pytest.mark.parametrize("kept", [5, 6, 8])
def test_a_trail_that_is_cut_off_and_closed_anew_shows_at_the_sites(tmp_path: Path, kept: int) -> None:
    sites = Federation(tmp_path)
    sites.finish(sites.run())
    place = tmp_path / "run" / FILE
    entries = read_chain(place)[:kept]
    place.write_bytes(b"".join(place.read_bytes().splitlines(keepends=True)[:kept]))
    last = next(entry for entry in reversed(entries) if "weights" in entry.fields)
    trail = Trail(place, sites.coordinator, actor="coordinator")
    model = {"round": last.fields["round"], "weights": last.fields["weights"]}
    trail.add("result", {**model, "adapter": "0" * 64, "result": "0" * 64})
    trail.add("closed", {"round": 2, "manifest": "0" * 64, "files": 1, "trail": FILE})
    trail.flush()
    cut = verify_trail(place)  # it has the key, so its own chain is in order
    own = read_chain(tmp_path / "bank-a" / FILE)
    with pytest.raises(AuditError, match="is not the one that site 'bank-a' saw|is missing: site 'bank-a' saw"):
        check_witness(cut.entries, own)


def test_a_coordinator_cannot_write_its_past_anew(tmp_path: Path) -> None:
    """With its own key it can sign other entries, but not what the sites signed of the old ones."""
    sites = Federation(tmp_path)
    sites.run()
    place = tmp_path / "run" / FILE
    entries = read_chain(place)
    place.unlink()
    trail = Trail(place, sites.coordinator, actor="coordinator")
    for entry in entries:
        changed = {**entry.fields, "weights": "f" * 64} if entry.event == "started" else entry.fields
        trail.add(entry.event, changed)
    trail.flush()
    with pytest.raises(AuditError, match="is not the one that entry 3 saw: the trail was written anew"):
        verify_trail(place, is_open_allowed=True)


def test_the_finished_trail_is_countersigned(tmp_path: Path) -> None:
    sites = Federation(tmp_path)
    sites.finish(sites.run())
    assert countersign(sites.plan(), sites, 2) == NAMES
    place, beside = tmp_path / "run" / FILE, tmp_path / "run" / COUNTERSIGNED
    rows = json.loads(beside.read_text())
    assert verify_trail(place, keys=keys(sites)).countersigned == {"bank-a": 15, "bank-b": 15}
    whole = place.read_bytes()
    place.write_bytes(b"".join(whole.splitlines(keepends=True)[:-1]))
    with pytest.raises(AuditError, match="entry 14 is missing: site 'bank-a' saw 15 entries"):
        verify_trail(place, is_open_allowed=True)
    place.write_bytes(whole)
    changes: dict[str, tuple[object, str]] = {
        "another's signature": ([{**rows[0], "signature": rows[1]["signature"]}], "of 'bank-a' does not fit"),
        "another's name": ([{**rows[0], "client": "bank-b"}], "countersignature of 'bank-b' does not fit"),
        "half a row": ([{"client": "bank-a"}], "is not what was written"),
        "no head": ([{**rows[0], "statement": {**rows[0]["statement"], "head": 3}}], "is not what was written"),
        "no text": ([{**rows[0], "key": ["x"]}], "is not what was written"),
        "another key": ([{**rows[0], "key": rows[1]["key"]}], "of 'bank-a' does not fit"),
        "no list": ({"client": "bank-a"}, "is not what was written"),
    }
    for written, why in changes.values():
        beside.write_bytes(canonical(written) + b"\n")
        with pytest.raises(AuditError, match=f"countersigned.json.*{why}"):
            verify_trail(place, keys=keys(sites))
    beside.write_bytes(canonical([stranger(rows[0])]) + b"\n")
    with pytest.raises(AuditError, match="countersigned.json: 'mallory' is not a site of this run"):
        verify_trail(place, keys=keys(sites))
    beside.write_bytes(canonical([*rows, rows[0]]) + b"\n")
    with pytest.raises(AuditError, match="countersigned.json: 'bank-a' stands in it twice"):
        verify_trail(place, keys=keys(sites))
    for content in (json.dumps(rows).encode(), b"[" * 100_000, b"\xff", canonical(rows)):
        beside.write_bytes(content)
        with pytest.raises(AuditError, match="countersigned.json is not what was written"):
            verify_trail(place)


def stranger(row: dict) -> dict:
    """A countersignature by somebody whom no list of members names."""
    key = new_key()
    said = {**row["statement"], "client": "mallory"}
    return {"client": "mallory", "key": key.public, "statement": said, "signature": key.sign("reply", canonical(said))}


def test_every_site_that_took_part_has_signed_the_end_itself(tmp_path: Path) -> None:
    sites = Federation(tmp_path)
    sites.finish(sites.run())
    run = tmp_path / "run"
    with pytest.raises(AuditError, match="^countersignatures missing: bank-a, bank-b: .* --uncountersigned"):
        verify_run(run, keys=keys(sites))
    sites.meddle = lambda reply: replace(reply, signature="") if reply.client == "bank-b" else reply
    assert countersign(sites.plan(), sites, 2) == ("bank-a",)
    with pytest.raises(AuditError, match="^countersignatures missing: bank-b: "):
        verify_run(run)
    assert verify_run(run, is_uncountersigned_allowed=True).uncountersigned == ("bank-b",)
    sites.meddle = lambda reply: reply
    beside = run / COUNTERSIGNED
    kept = json.loads(beside.read_bytes())
    for odd in ({"key": 3}, {"client": "mallory"}, {"signature": "x"}, {"statement": 1}):
        beside.write_bytes(canonical([{**kept[0], **odd}]))
        assert uncountersigned(sites.audit()) == NAMES  # what is no signature of a site's is asked for again
    beside.write_bytes(canonical(kept))
    assert countersign(sites.plan(), sites, 2) == ("bank-b",)  # asked again, without losing the other's
    found = verify_run(run, keys=keys(sites))
    assert set(found.chain.countersigned) == set(NAMES) and found.uncountersigned == ()
    assert found.coverage.covered == (
        "adapter/README.md", "adapter/adapter_config.json", "adapter/adapter_model.safetensors",
        "checkpoint-2/server.safetensors", "checkpoint-2/sites.safetensors", "checkpoint-2/state.json",
        "clients.jsonl", "metrics.jsonl", "result.json",
    )  # fmt: skip


def test_a_signature_of_an_earlier_head_is_none_of_the_end(tmp_path: Path) -> None:
    """A coordinator asks for signatures before the end, and ends its trail as it likes."""
    sites = Federation(tmp_path)
    state = sites.run()
    assert countersign(sites.plan(), sites, 2) == NAMES
    sites.finish(state)
    with pytest.raises(AuditError, match="'bank-a' signed the head of 13 entries, not that of all 15"):
        verify_run(tmp_path / "run", keys=keys(sites))


def test_a_site_s_trail_holds_several_runs(tmp_path: Path) -> None:
    sites = Federation(tmp_path)
    for name in ("first", "second"):
        body = {**BODY, JOB: job(run=name).model_dump(mode="json")}
        plan = replace(sites.plan(), body=body)
        sites.finish(run_rounds(plan, sites, ServerState(0, dict(START)), RunFolder(tmp_path / "run")))
        (tmp_path / "run").rename(tmp_path / name)
    own = read_chain(tmp_path / "bank-a" / FILE)
    for name in ("first", "second"):
        assert check_witness(read_chain(tmp_path / name / FILE), own) == 2
    with pytest.raises(AuditError, match="'bank-a' saw no head of this run"):
        check_witness(read_chain(tmp_path / "first" / FILE), own[4:])
    cut = read_chain(tmp_path / "second" / FILE)[:4]
    with pytest.raises(AuditError, match="is missing: site 'bank-a' saw"):
        check_witness(cut, own)


@pytest.mark.parametrize("below_minimum", ["wait", "skip"])
def test_a_round_that_falls_short_stands_in_the_trail(tmp_path: Path, below_minimum: str) -> None:
    sites, answers = Federation(tmp_path), iter([True, False])  # bank-b's first reply is damaged, the next ones are not
    sites.meddle = lambda reply: replace(reply, body={}) if reply.client == "bank-b" and next(answers, False) else reply
    plan = replace(sites.plan(keep_updates=True), min_replies=2, below_minimum=below_minimum)
    state = run_rounds(plan, sites, ServerState(0, dict(START)), RunFolder(tmp_path / "run"))
    sites.finish(state)
    found = verify_trail(tmp_path / "run" / FILE, keys=keys(sites))
    events = [entry.event for entry in found.entries]
    assert events.count("shortfall") == 1 and events.count("aggregation") == {"wait": 2, "skip": 1}[below_minimum]
    rounds = list(updates_of(found.entries))
    assert [len(replies) for _, replies in rounds] == [2] * len(rounds)
    folder, last = RunFolder(tmp_path / "run"), found.entries[-2]
    assert replayed(
        folder, rounds, federation=FederationSection(), training=TrainingSection(), seed=7, last=last
    ) == len(rounds)


def test_the_sites_of_a_trail_are_those_that_were_asked_and_the_result_says_their_keys(tmp_path: Path) -> None:
    sites = Federation(tmp_path)
    state = sites.run(rounds=1)
    assert sites_of(read_chain(tmp_path / "run" / FILE)) == dict.fromkeys(NAMES, ())
    sites.finish(state)
    known = keys(sites)
    assert sites_of(read_chain(tmp_path / "run" / FILE)) == {name: tuple(known[name]) for name in NAMES}


def test_a_site_that_does_not_countersign_is_left_out(tmp_path: Path) -> None:
    sites = Federation(tmp_path)
    sites.finish(sites.run())
    sites.meddle = lambda reply: replace(reply, signature="") if reply.client == "bank-b" else reply
    assert countersign(sites.plan(), sites, 2) == ("bank-a",)
    assert verify_trail(tmp_path / "run" / FILE).countersigned == {"bank-a": 15}


def test_an_evaluation_at_the_sites_stands_in_the_trail_too(tmp_path: Path) -> None:
    sites = Federation(tmp_path)
    state = sites.run(rounds=1)
    requests = {name: Request("evaluate", 1, name, state.weights, BODY) for name in NAMES}
    plan = sites.plan()
    replies = list(exchange(plan, sites, requests))
    flush(plan.audit)
    assert all(isinstance(reply, Reply) and reply.signature for reply in replies)
    assert [entry.event for entry in read_chain(tmp_path / "run" / FILE)[-2:]] == ["reply"] * 2
    verify_trail(tmp_path / "run" / FILE, keys=keys(sites), is_open_allowed=True)


def test_a_reply_that_cannot_be_used_leaves_the_round(tmp_path: Path) -> None:
    def odd(request: Request) -> Reply:
        reply = work(request)
        return replace(reply, body={**reply.body, "steps": 0}) if request.client == "bank-a" else reply

    sites = Federation(tmp_path, work=odd)
    sites.run(rounds=1, keep_updates=True)
    entries = verify_trail(tmp_path / "run" / FILE, keys=keys(sites), is_open_allowed=True).entries
    assert [entry.event for entry in entries[3:]] == ["failure", "reply", "aggregation", "checkpoint"]
    assert [reply.fields["client"] for _, replies in updates_of(entries) for reply in replies] == ["bank-b"]


def keep_first() -> Callable[[Reply], Reply]:
    first: dict[str, Reply] = {}

    def meddle(reply: Reply) -> Reply:
        return replace(first.setdefault(reply.client, reply), round_number=reply.round_number)

    return meddle


MEDDLERS: dict[str, tuple[Callable[[], Callable[[Reply], Reply]], str]] = {
    "not signed": (lambda: lambda reply: replace(reply, signature=""), "is not signed"),
    "another's signature": (lambda: lambda reply: replace(reply, signature=new_key().sign("reply", b"")), "not fit"),
    "other tensors": (lambda: lambda reply: replace(reply, digest=digest({"w": torch.ones(1)})), "does not fit"),
    "more weight": (lambda: lambda reply: replace(reply, body={**reply.body, "num_examples": 999}), "does not fit"),
}


@pytest.mark.parametrize("name", MEDDLERS)
def test_a_reply_that_was_meddled_with_does_not_count(tmp_path: Path, name: str) -> None:
    make, why = MEDDLERS[name]
    meddle = make()
    sites = Federation(tmp_path, meddle=lambda reply: meddle(reply) if reply.client == "bank-b" else reply)
    sites.run(rounds=1)
    entries = verify_trail(tmp_path / "run" / FILE, is_open_allowed=True).entries
    (failure,) = [entry for entry in entries if entry.event == "failure"]
    assert failure.fields["client"] == "bank-b" and why in failure.fields["reason"]
    assert entries[-2].fields["clients"] == ["bank-a"]


def test_a_reply_of_an_earlier_round_does_not_count(tmp_path: Path) -> None:
    sites = Federation(tmp_path, meddle=keep_first())
    with pytest.raises(FederationError, match="does not fit: another key, or another request's answer"):
        sites.run(rounds=2)
    assert [row["round"] for row in RunFolder(tmp_path / "run").read_rows("metrics")] == [1]
    assert verify_trail(tmp_path / "run" / FILE, is_open_allowed=True).entries[-1].event == "failure"


def test_a_refusal_carries_the_rule_to_coordinator_and_log(tmp_path: Path) -> None:
    sites = Federation(tmp_path, policy="objectives = ['choice']")
    with pytest.raises(FederationError, match="policy rule 'objectives': objective 'sft' is not among those allowed"):
        sites.run(rounds=1)
    entries = read_chain(tmp_path / "run" / FILE)
    assert [entry.fields["rule"] for entry in entries if entry.event == "refusal"] == ["objectives", "objectives"]


def test_a_resumed_run_stays_verifiable(tmp_path: Path) -> None:
    sites = Federation(tmp_path)
    middle = sites.run(rounds=1)
    sites.run(rounds=2, state=middle)  # killed after round 2, before its checkpoint
    end = sites.run(rounds=3, state=middle)
    sites.finish(end)
    found = verify_trail(tmp_path / "run" / FILE, keys=keys(sites))
    assert [entry.event for entry in found.entries].count("resumed") == 2
    assert [entry.fields["round"] for entry, _ in updates_of(found.entries)] == [1, 2, 3]


def test_a_run_goes_on_from_the_model_that_it_had(tmp_path: Path) -> None:
    """Whoever has the coordinator's key could go on from a model of their own making; the trail shows it."""
    sites = Federation(tmp_path)
    middle = sites.run(rounds=1)
    other = replace(middle, weights={name: tensor + 1 for name, tensor in middle.weights.items()})
    sites.finish(sites.run(rounds=2, state=other))
    with pytest.raises(AuditError, match="entry 7: the run goes on from another model than it had after round 1"):
        verify_trail(tmp_path / "run" / FILE)


def test_a_run_that_passed_over_rounds_goes_on_from_the_model_before_them(tmp_path: Path) -> None:
    sites = Federation(tmp_path)
    plan = replace(sites.plan(), min_replies=2, below_minimum="skip", rounds=2)
    sites.meddle = lambda reply: replace(reply, body={}) if reply.client == "bank-b" else reply
    state = run_rounds(plan, sites, ServerState(0, dict(START)), RunFolder(tmp_path / "run"))
    assert state.round_number == 2 and digest(state.weights) == digest(START)
    sites.meddle = lambda reply: reply
    sites.finish(sites.run(rounds=3, state=state))
    assert verify_trail(tmp_path / "run" / FILE, keys=keys(sites)).is_closed


def test_the_result_is_a_model_that_the_run_had(tmp_path: Path) -> None:
    for number, changes in enumerate(({}, {"round": 1}, {"weights": {"w": torch.ones(1)}})):
        sites = Federation(tmp_path / str(number))
        state = sites.run()
        model = {"round": 2, "weights": state.weights, **changes}
        run = RunFolder(sites.folder / "run")
        concludes(sites.audit(), weights=model["weights"], adapter=START, result={"round": model["round"]})
        close(sites.audit(), run.path, round_number=2)
        if not changes:
            assert verify_trail(run.path / FILE).is_closed
            continue
        with pytest.raises(
            AuditError, match=f"the result is another model than the run had after round {model['round']}"
        ):
            verify_trail(run.path / FILE)


def test_the_best_round_may_be_the_start(tmp_path: Path) -> None:
    sites = Federation(tmp_path)
    sites.run()
    concludes(sites.audit(), weights=dict(START), adapter=START, result={"round": 0})
    close(sites.audit(), tmp_path / "run", round_number=2)
    assert verify_trail(tmp_path / "run" / FILE).is_closed


def kept(tmp_path: Path) -> tuple[Federation, list, ServerState]:
    sites = Federation(tmp_path)
    state = sites.run(rounds=2, keep_updates=True)
    sites.finish(state)
    return sites, list(updates_of(read_chain(tmp_path / "run" / FILE))), state


def test_kept_updates_aggregate_to_what_the_trail_says(tmp_path: Path) -> None:
    _, rounds, state = kept(tmp_path)
    folder, last = RunFolder(tmp_path / "run"), read_chain(tmp_path / "run" / FILE)[-2]
    assert replayed(folder, rounds, federation=FederationSection(), training=TrainingSection(), seed=0, last=last) == 2
    entry, replies = rounds[0]
    updates = [
        ClientUpdate(name, folder.kept_tensors(reply.fields["file"]), 10 + place)
        for place, (name, reply) in enumerate(zip(NAMES, replies, strict=True))
    ]
    made = method(FederationSection())
    weights, memory = made.step(dict(START), made.aggregate(updates), {}, 1.0)
    assert digest(weights) == entry.fields["weights"] and memory == {}
    assert list(folder.kept_tensors("round-0-weights")) == ["w", "b"]
    with pytest.raises(AuditError, match="round 1 does not aggregate to the weights it says"):
        replayed(
            folder,
            rounds,
            federation=FederationSection(algorithm={"server_learning_rate": 0.5}),
            training=TrainingSection(),
            seed=0,
            last=last,
        )
    other = replace(last, fields={**last.fields, "weights": "0" * 64})
    with pytest.raises(AuditError, match="entry 13: the model is not what the updates aggregate to"):
        replayed(folder, rounds, federation=FederationSection(), training=TrainingSection(), seed=0, last=other)


def test_a_kept_update_that_was_changed_is_named(tmp_path: Path) -> None:
    _, rounds, _ = kept(tmp_path)
    folder, reply = RunFolder(tmp_path / "run"), rounds[1][1][1]
    folder.keep_tensors(reply.fields["file"], {name: tensor + 1 for name, tensor in START.items()})
    with pytest.raises(AuditError, match=f"entry {reply.index}: the kept update of 'bank-b' is not the one"):
        replayed(folder, rounds, federation=FederationSection(), training=TrainingSection(), seed=0, last=None)


def test_a_site_s_signature_cannot_be_put_under_another_reply(tmp_path: Path) -> None:
    """The coordinator signs an entry of its own making with a site's old signature in it."""
    sites = Federation(tmp_path)
    sites.run(rounds=1)
    place = tmp_path / "run" / FILE
    lines = place.read_bytes().splitlines(keepends=True)
    entry = json.loads(lines[3])
    place.write_bytes(b"".join(lines[:3]))
    trail = Trail(place, sites.coordinator, actor="coordinator")
    said = {**entry["fields"]["statement"], "tensors": "0" * 64}
    trail.add("reply", {**entry["fields"], "statement": said})
    trail.flush()
    with pytest.raises(AuditError, match="entry 3: the signature of 'bank-a' does not fit its reply"):
        verify_trail(place, is_open_allowed=True)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"round": 2}, "entry 3: what 'bank-a' signed is another reply"),
        ({"tensors": "0" * 64}, "entry 3: what 'bank-a' signed is another reply"),
        ({"report": {"num_examples": 99}}, "entry 3: what 'bank-a' signed is another reply"),
        ({"signature": ""}, "entry 3: the reply of 'bank-a' is not signed"),
    ],
)
def test_an_entry_says_what_the_site_signed(tmp_path: Path, changes: dict, why: str) -> None:
    sites = Federation(tmp_path)
    sites.run(rounds=1)
    place = tmp_path / "run" / FILE
    lines = place.read_bytes().splitlines(keepends=True)
    entry = json.loads(lines[3])
    place.write_bytes(b"".join(lines[:3]))
    trail = Trail(place, sites.coordinator, actor="coordinator")
    trail.add("reply", {**entry["fields"], **changes})
    trail.flush()
    with pytest.raises(AuditError, match=why):
        verify_trail(place, keys=keys(sites), is_open_allowed=True)


def test_a_protected_sum_has_no_updates_to_aggregate_again(tmp_path: Path) -> None:
    """The coordinator saw masked vectors: their rounds follow one another, and nothing is replayed."""
    trail = Trail(tmp_path / FILE, new_key(), actor="coordinator")
    trail.add("started", {"round": 0, "weights": "1" * 64})
    for number in (1, 2):
        for event in ("request", "reply"):
            trail.add(event, {"kind": "secure_sum.input", "round": number, "client": "bank-a", "file": "x"})
        trail.add("aggregation", {"round": number, "clients": ["(sum)"], "weights": "0" * 64})
    trail.flush()
    checked = verify_run(tmp_path, is_open_allowed=True)
    assert checked.rounds == 0 and len(checked.chain.entries) == 7
