"""A guarded site: what is admitted, what may leave, what is signed; and all of it stands in the site's own trail."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from acting import acting
from governed import (
    BASE,
    BODY,
    CONFIG,
    KINDS,
    LABELS,
    NOW,
    NUMBER,
    SETTINGS,
    START,
    SUBMITTER,
    Federation,
    House,
    job,
    order_body,
    setup_of,
    under,
    work,
)
from silotune.config import Config, from_mapping
from silotune.errors import ConfigError, MessageError, PolicyError, ProtectionError
from silotune.federation.coordinator.course import verify_trail
from silotune.federation.kinds import KINDS as ALL
from silotune.federation.site.admission import BOUNDS, Facts
from silotune.federation.site.client import client_round
from silotune.federation.site.state import Site
from silotune.federation.wire import run_setup
from silotune.federation.wire.messages import decode_reply, encode, layout_of
from silotune.federation.wire.reasons import RULES, code_of
from silotune.federation.wire.run_setup import MOST_LABELS, check_scorable, run_settings
from silotune.federation.wire.signed_job import JOB
from silotune.federation.wire.signing import check_signature, request_digest, statement
from silotune.record.audit import FILE
from silotune.record.chain import read_chain
from silotune.record.plain_json import canonical, sha256
from silotune.record.signatures import new_key
from silotune.settings.objectives import SoftmaxOverOptions
from silotune.structs import Reply, Request
from silotune.tensors import digest


def events(folder: Path, name: str = "bank-a") -> list[tuple[str, str]]:
    return [(entry.event, str(entry.fields.get("rule", ""))) for entry in read_chain(folder / name / FILE)]


def never(*_: object, **__: object) -> Any:
    raise AssertionError("the work was begun")


def refused(house: House, request: Request, rule: str, **beside: Any) -> PolicyError:
    """The refusal, before anything was done; its code is one that may leave the site."""
    with pytest.raises(PolicyError) as caught:
        house.serve(request, never, **beside)
    assert caught.value.rule == rule and code_of(caught.value) == rule and rule in RULES
    last = read_chain(house.guard.trail._path)[-1]
    assert (last.event, last.fields["rule"]) == ("refusal", rule)
    return caught.value


def test_a_reply_is_signed_for_its_request(tmp_path: Path) -> None:
    sites = Federation(tmp_path)
    request = sites.request()
    sent = sites.house().serve(request)
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
    noted = list(read_chain(tmp_path / "bank-a" / FILE))[-1].fields
    assert noted["bytes_down"] > 20 and noted["bytes_up"] > 20  # five values each way, and words
    verify_trail(tmp_path / "bank-a" / FILE, is_open_allowed=True)


@pytest.mark.parametrize(
    ("policy", "rule", "is_opened"),
    [
        ("objectives = ['choice']", "objectives", False), ("tasks = ['medqa']", "tasks", False),
        ("surprise = 1", "policy.toml", False), ("secure_aggregation = true", "secure_aggregation", False),
        ("least_participants = 3", "least_participants", False),
        ("submitters = ['A STRANGER']", "submitters", False),
        ("base_models = ['" + "b" * 64 + "']", "base_models", False), (f"charter = '{BASE}'", "charter", False),
        ("largest_adapter = 4", "largest_adapter", True), ("largest_epsilon_run = 1.0", "largest_epsilon_run", True),
        ("most_steps = 1", "most_steps", True),
    ],
)  # fmt: skip
def test_what_the_policy_forbids_is_not_even_begun(tmp_path: Path, policy: str, rule: str, is_opened: bool) -> None:
    """What can be told without the site's examples is told before they are opened."""
    sites = Federation(tmp_path, policy=policy.replace("A STRANGER", new_key().public))
    house = sites.house(costs=Facts(5, 2))
    refused(house, sites.request(), rule)
    assert house.opens == is_opened
    assert events(tmp_path) == [("request", ""), ("refusal", rule)]


def test_what_the_policy_allows_is_done(tmp_path: Path) -> None:
    sites = Federation(tmp_path)
    sites.policy = f"""
        base_models = ['{BASE}']
        tasks = ['finance-news']
        objectives = ['sft']
        largest_adapter = 5
        smallest_adapter = 5
        least_participants = 2
        largest_epsilon_run = 1.0
        largest_epsilon_total = 3.0
        largest_upload_bytes = 500
        submitters = ['{SUBMITTER.public}']
        charter = '{"c" * 64}'
    """
    known = {"costs": Facts(5, 1), "lost": (1.0, 2.5), "charter": lambda: ("c" * 64, NOW.date())}
    request = sites.request(body=under(order_body(), job(charter_sha256="c" * 64)))
    assert sites.house(**known).serve(request).signature
    changes: dict[str, dict[str, Any]] = {
        "largest_epsilon_total": {"costs": Facts(5, 1), "lost": (1.0, 3.5)},
        "largest_epsilon_run": {"lost": None},
        "charter": {"charter": lambda: ("c" * 64, NOW.date() - timedelta(days=1))},
        "largest_adapter": {"costs": Facts(6, 1), "lost": (1.0, 2.5)},
        "smallest_adapter": {"costs": Facts(4, 1), "lost": (1.0, 2.5)},
    }
    for rule, facts in changes.items():
        refused(sites.house(**{**known, **facts}), request, rule)


def test_a_sum_is_looked_at_before_it_begins(tmp_path: Path) -> None:
    """Cohort and threshold are the sum's; the settings to train with stand within its order; keys are no figures."""
    sites = Federation(tmp_path, policy="least_participants = 2\nleast_colluding = 1\nmetrics = []")
    house = sites.house()

    def request(kind: str, **body: Any) -> Request:
        tensors = dict(START) if kind == "secure_sum.input" else {}
        return sites.request(kind=kind, tensors=tensors, body=under(body))

    def keys(asked: Request) -> Reply:
        return Reply(asked.kind, 1, "bank-a", {}, {"mask": "m" * 64})

    terms = {"cohort": ["bank-a", "bank-b"], "threshold": 2 / 3}
    assert house.serve(request("secure_sum.keys", terms=terms), keys).body == {"mask": "m" * 64}
    assert "m" * 64 not in (tmp_path / "bank-a" / FILE).read_text()
    house.serve(request("secure_sum.keys", terms={**terms, "noise": {"colluding": 1}}), keys)
    for rule, changed in {
        "job.cohort": {"cohort": ["bank-a"]},
        "least_threshold": {"threshold": 0.6},
        "least_colluding": {"noise": {"colluding": 0}},
    }.items():
        refused(house, request("secure_sum.keys", terms={**terms, **changed}), rule)
    house.serve(request("secure_sum.input", train=order_body()), keys)
    refused(house, request("secure_sum.input", train={**order_body(), "seed": 9}), "job.order")
    with pytest.raises(MessageError, match="body of this secure_sum.input request is not valid at 'seed'"):
        house.serve(request("secure_sum.input"), never)  # no order to train at all
    with pytest.raises(MessageError, match="body of this secure_sum.input request is not valid at 'rounds'"):
        house.serve(request("secure_sum.input", train={**order_body(), "rounds": 9}), never)


@pytest.mark.parametrize("kind", [name for name, kind in ALL.items() if kind.cohort])
def test_the_least_cohort_holds_in_every_step_that_names_the_sites(tmp_path: Path, kind: str) -> None:
    """Three are asked where four are wanted, at the beginning of a sum or once one has dropped out of it."""
    sites, names = Federation(tmp_path, policy="least_cohort = 4"), ["bank-a", "bank-b", "bank-c"]
    body: dict[str, Any] = {"train": order_body()} if ALL[kind].uses_examples else {}
    said: Any = len(names) if kind == "he.input" else names
    for key in reversed(ALL[kind].cohort):
        said = {key: said}
    request = sites.request(kind=kind, body=under({**body, **said}, job(kinds=(kind,))))
    refused(sites.house(), request, "least_cohort")


def another(**changes: Any) -> dict[str, Any]:
    return under(order_body(), job(**changes))


JOBS: dict[str, tuple[dict[str, Any], str]] = {
    "no job": ({"body": order_body()}, "job"),
    "an empty job": ({"body": {**order_body(), "job": {"job": {}}}}, "job"),
    "a job that is a number": ({"body": {**order_body(), "job": 1}}, "job"),
    "participants changed": (
        {"body": {**BODY, "job": {**BODY["job"], "job": job(task="x").job.model_dump(mode="json")}}},
        "job",
    ),
    "signed by a stranger": ({"body": under(order_body(), job(new_key()))}, "submitters"),
    "expired": ({"body": another(expires=NOW - timedelta(seconds=1))}, "job.expired"),
    "of another run": ({"body": another(run="other")}, "job.run"),
    "without this site": ({"body": another(participants=("bank-b",))}, "job.site"),
    "of another setup": ({"body": another(setup_sha256="0" * 64)}, "job.setup"),
    "of another task": ({"body": another(task="medqa")}, "job.setup"),
    "of other rounds": ({"body": another(rounds=4)}, "job.setup"),
    "a kind that is not listed": ({"kind": "personalize"}, "job.kind"),
    "a kind that another job lists": ({"body": another(kinds=("evaluate",))}, "job.kind"),
    "round 0": ({"round_number": 0}, "job.round"),
    "round 4 of 3": ({"round_number": 4}, "job.round"),
    "another seed": ({"body": {**BODY, "seed": 4}}, "job.order"),
    "another run in the order": ({"body": {**BODY, "run": f"{NUMBER}/central"}}, "job.order"),
    "another setup in the order": ({"body": {**BODY, "setup": "0" * 64}}, "job.order"),
    "an order that names no setup": ({"body": under({"run": f"{NUMBER}/federated", "seed": 0})}, "job.order"),
    "another site's request": ({"client": "bank-b"}, "address"),
}


@pytest.mark.parametrize("name", JOBS)
def test_a_request_belongs_to_a_job_that_a_submitter_signed(tmp_path: Path, name: str) -> None:
    sites, (changes, rule) = Federation(tmp_path), JOBS[name]
    house = sites.house()
    refused(house, sites.request(**changes), rule)
    assert house.opens == 0
    house.serve(sites.request())  # the same house serves what is in order


@pytest.mark.parametrize("number", [True, 1.0, -7, "1", None, 10**400])
def test_a_round_is_an_integer_and_nothing_that_compares_equal(tmp_path: Path, number: Any) -> None:
    sites = Federation(tmp_path)
    house = sites.house()
    with pytest.raises(MessageError):
        house.serve(sites.request(round_number=number), never)
    assert events(tmp_path) == [("request", ""), ("refusal", "message")]


SETTING: dict[str, Any] = {
    "training": {"learning_rate": 1.0}, "federation": {"rounds": 3}, "privacy": {"dp": "none"}, "rounds": 4,
    "labels": list(LABELS), "scoring": "generation", "batch_size": 4, "max_new_tokens": 16, "more": 1,
}  # fmt: skip


@pytest.mark.parametrize("kind", ["train", "evaluate"])
@pytest.mark.parametrize("name", SETTING)
def test_an_order_holds_no_settings(tmp_path: Path, kind: str, name: str) -> None:
    """Not even those of the setup: what a request repeats could be another thing than what the rules looked at."""
    sites = Federation(tmp_path)
    house = sites.house()
    with pytest.raises(MessageError, match=f"body of this {kind} request is not valid at '{name}'"):
        house.serve(sites.request(kind=kind, body={**BODY, name: SETTING[name]}), never)
    assert house.opens == 0 and events(tmp_path) == [("request", ""), ("refusal", "message")]


@pytest.mark.parametrize("kind", ["train", "evaluate"])
def test_an_order_is_not_left_out(tmp_path: Path, kind: str) -> None:
    sites = Federation(tmp_path)
    house = sites.house()
    with pytest.raises(MessageError, match=f"body of this {kind} request is not valid at 'seed'"):
        house.serve(sites.request(kind=kind, body=under({})), never)
    assert house.opens == 0


def test_a_run_has_the_settings_that_were_signed(tmp_path: Path) -> None:
    """Another setup is refused, whether the job is of another one or the order names another one."""
    sites = Federation(tmp_path)
    config = CONFIG.model_copy(
        update={"training": CONFIG.training.model_copy(update={"objective": SoftmaxOverOptions()})}
    )
    setup = setup_of(config)
    refused(sites.house(), sites.request(), "job.setup", setup=setup)
    signed = job(setup_sha256=sha256(setup))
    error = refused(sites.house(), sites.request(body=under(order_body(), signed)), "job.order", setup=setup)
    assert "the train order names another setup" in str(error)
    assert sites.house().serve(sites.request(body=under(order_body(config), signed)), setup=setup).signature


PLACES: dict[str, dict[str, Any]] = {
    "data.train": {"data": {"train": "/etc/passwd"}},
    "data.root": {"data": {"root": "/etc"}},
    "data.test": {"data": {"test": "/etc/passwd"}},
    "data.validation": {"data": {"validation": "~/x"}},
    "data.source": {"data": {"source": "hub"}},
    "data.partition": {"data": {"partition": {"scheme": "file", "files": {"bank-a": "/etc/passwd"}}}},
    "data.definition.hub_id": {
        "data": {"task": "custom", "definition": {"prompt": "{text}", "answer": "label", "hub_id": "evil/data"}}
    },
    "adapter.start": {"adapter": {"start": "/home/somebody/run"}},
    "model.name": {"model": {"name": "/models/other"}},
    "model.revision": {"model": {"revision": "evil"}},
    "privacy.dp.ledger": {"privacy": {"dp": {"type": "local", "epsilon": 8, "ledger": "/tmp/ledger"}}},
    "federation.policies": {"federation": {"policies": {"bank-a": "/etc/passwd"}}},
    "federation.clock": {"federation": {"clock": {"trace": "/etc/passwd"}}},
    "federation.split": {"federation": {"split": {"first": 1}}},
    "evaluation.gold": {"evaluation": {"gold": "/etc/passwd"}},
    "evaluation.forgetting": {"evaluation": {"forgetting": "/etc/passwd"}},
    "record.folder": {"record": {"folder": "/tmp/elsewhere"}},
    "record.audit_key": {"record": {"audit_key": "/etc/passwd"}},
}


@pytest.mark.parametrize("name", PLACES)
def test_a_setup_that_names_a_place_is_refused_whoever_signed_it(tmp_path: Path, name: str) -> None:
    """A site takes what names something on its disk, or elsewhere, from its own site.toml and from nothing else."""
    sites, setup = Federation(tmp_path), setup_of()
    for section, values in PLACES[name].items():
        setup["config"][section] = {**setup["config"][section], **values}
    request = sites.request(body=another(setup_sha256=sha256(setup), task=setup["config"]["data"]["task"]))
    house = sites.house(task="")
    assert name.partition(".")[0] in str(refused(house, request, "setup", setup=setup))
    assert house.opens == 0


@pytest.mark.parametrize("changes", [{"base": ""}, {"base": "x"}, {"more": 1}, {"config": {}}, {"config": 3}])
def test_a_setup_that_is_none_is_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    sites, setup = Federation(tmp_path), {**setup_of(), **changes}
    request = sites.request(body=another(setup_sha256=sha256(setup)))
    if changes == {"config": {}}:  # a whole configuration of defaults: of other rounds than the job
        refused(sites.house(), request, "job.setup", setup=setup)
    else:
        refused(sites.house(), request, "setup", setup=setup)


@pytest.mark.parametrize("setting", BOUNDS)
def test_settings_that_no_run_needs_are_refused_whoever_signed_them(tmp_path: Path, setting: str) -> None:
    sites, document = Federation(tmp_path), CONFIG.model_dump(mode="json")
    if setting.startswith("training.objective."):
        document["training"]["objective"] = {"type": "kto"}
    if setting == "evaluation.max_new_tokens":
        document["evaluation"]["scoring"] = "generation"
    place, _, name = setting.rpartition(".")
    section: Any = document
    for part in place.split("."):
        section = section[part]
    section[name] = 2 * int(BOUNDS[setting])
    config = from_mapping(document)
    setup, body = setup_of(config), order_body(config)
    signed = job(setup_sha256=sha256(setup))
    assert setting in str(refused(sites.house(), sites.request(body=under(body, signed)), "bounds", setup=setup))


def test_a_setup_is_neither_parsed_before_the_job_is_read_nor_where_it_is_too_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever has no job costs the site nothing; whoever has one, no more than the bytes that a setup may have."""
    monkeypatch.setattr(run_setup, "strict_object", never)
    sites, long = Federation(tmp_path), b'{"a":[' + b"[]," * (run_setup.MOST_SETUP_BYTES // 3) + b"[]]}"
    refused(sites.house(), sites.request(body=order_body()), "job", setup=long)
    refused(sites.house(), sites.request(), "setup", setup=long)


def test_an_epsilon_is_not_counted_of_more_steps_than_are_allowed(tmp_path: Path) -> None:
    """Counting may take a site minutes and its memory."""
    sites = Federation(tmp_path, policy="most_steps = 1\nlargest_epsilon_run = 1.0")
    house = sites.house(costs=Facts(5, 2))
    house.opened.epsilons = never  # type: ignore[method-assign,assignment]
    refused(house, sites.request(), "most_steps")


@pytest.mark.parametrize(
    "changes",
    [
        {"training": {"optimizer": "sgd"}},
        {"training": {"max_steps": 1}, "federation": {"rounds": 3, "algorithm": "fedsgd"}},
        {
            "training": {"optimizer": "sgd"},
            "privacy": {"dp": {"type": "client", "epsilon": 8}},
            "federation": {"rounds": 3, "weighting": "uniform"},
        },
    ],
    ids=["plain steps", "shared steps", "noise that the coordinator adds"],
)
def test_gradients_without_noise_of_the_sites_do_not_leave_where_its_policy_says_so(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    config = Config.model_validate({"federation": {"rounds": 3}, **changes})
    setup, signed = setup_of(config), job(setup_sha256=sha256(setup_of(config)))
    sites = Federation(tmp_path, policy="plain_gradients = false")
    request = sites.request(body=under(order_body(config), signed))
    assert "read off" not in str(refused(sites.house(), request, "plain_gradients", setup=setup))


def test_names_that_nobody_has_are_no_participants(tmp_path: Path) -> None:
    invented = another(participants=("bank-a", *(f"nobody-{number}" for number in range(9))))
    for least, body in ((2, invented), (3, BODY)):
        sites = Federation(tmp_path / str(least), policy=f"least_participants = {least}")
        refused(sites.house(), sites.request(body=body), "least_participants")
    sites.policy = "least_participants = 2"
    assert sites.house().serve(sites.request()).signature


def test_a_coordinator_must_commit_itself(tmp_path: Path) -> None:
    sites = Federation(tmp_path)
    stranger = Federation(tmp_path / "other").request().head
    for head in ("", "1:x:y", stranger, "9" * 15 + ":" + "0" * 64 + ":x"):
        refused(sites.house(), sites.request(head=head), "coordinator")


def test_a_policy_that_is_changed_holds_from_the_next_request_on(tmp_path: Path) -> None:
    sites = Federation(tmp_path)
    house = sites.house()
    house.serve(sites.request())
    house.guard.gate.policy.write_text("objectives = ['choice']")
    refused(house, sites.request(), "objectives")


def test_what_leaves_is_limited(tmp_path: Path) -> None:
    sites = Federation(tmp_path, policy="metrics = []")
    assert sites.house().serve(sites.request()).body["loss"] is None
    for policy in ("smallest_count = 11", "largest_upload_bytes = 20"):
        sites.policy = policy
        with pytest.raises(PolicyError, match=policy.partition(" ")[0]):
            sites.house().serve(sites.request())


# --- what was served before ------------------------------------------------------------------------------------------


def other_model(number: float) -> dict[str, torch.Tensor]:
    return {name: tensor + number for name, tensor in START.items()}


def test_a_round_is_trained_with_few_models_whatever_is_restarted(tmp_path: Path) -> None:
    """The same model again is free (a site that crashed is asked again); another one is the second of two."""
    sites = Federation(tmp_path)
    for tensors in (START, START, other_model(1), START, other_model(1)):
        sites.house().serve(sites.request(tensors=dict(tensors)))  # each time a site that knows its disk alone
    refused(sites.house(), sites.request(tensors=other_model(2)), "most_models")
    sites.house().serve(sites.request(tensors=other_model(2), round_number=2))
    sites.policy = "most_models = 3"
    sites.house().serve(sites.request(tensors=other_model(2)))


def test_a_run_is_scored_as_often_as_the_policy_says(tmp_path: Path) -> None:
    """Figures on the site's own examples for models of somebody's choice are an oracle for who is in them."""
    sites = Federation(tmp_path)
    request = sites.request(kind="evaluate", body=BODY)
    for _ in range(3):
        assert sites.house().serve(request).signature
    for number in (1, 2, 3):  # nor in another round
        other = replace(request, tensors=other_model(1), round_number=number)
        refused(sites.house(), other, "most_scorings")
    sites.policy = "most_scorings = 0"
    refused(sites.house(run="demo-2"), sites.request(kind="evaluate", body=BODY), "most_scorings")


def test_the_name_of_a_run_belongs_to_one_job(tmp_path: Path) -> None:
    sites = Federation(tmp_path)
    sites.house().serve(sites.request())
    number = "2" * 32
    body = under(order_body(number=number), job(id=number))
    refused(sites.house(), sites.request(body=body), "job.run")


def scored(**sections: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """A setup with other values, and the body of a request under a job over it; whoever signs checks nothing."""
    setup = setup_of()
    for name, values in sections.items():
        setup["config"][name] = {**setup["config"][name], **values}
    signed = job(setup_sha256=sha256(setup), task=setup["config"]["data"]["task"])
    return setup, under({**order_body(), "setup": sha256(setup)}, signed)


def test_text_is_generated_where_the_policy_allows_it(tmp_path: Path) -> None:
    sites, (setup, body) = Federation(tmp_path), scored(evaluation={"scoring": "generation"})
    request = sites.request(kind="evaluate", body=body)
    refused(sites.house(), request, "generation", setup=setup)
    assert sites.house().serve(replace(request, kind="train"), setup=setup).signature  # which writes none
    sites.policy = "generation = true"
    assert sites.house().serve(request, setup=setup).signature


def options(*labels: str) -> dict[str, Any]:
    """A task of the run's own with these options."""
    return {"task": "custom", "definition": {"prompt": "{text}", "answer": "label", "options": list(labels)}}


UNSCORABLE: dict[str, tuple[dict[str, Any], str]] = {
    "a batch of -3": ({"evaluation": {"batch_size": -3}}, "setup"),
    "a batch of none": ({"evaluation": {"batch_size": 0}}, "setup"),
    "a batch of 2**40": ({"evaluation": {"batch_size": 1 << 40}}, "bounds"),
    "a billion tokens": ({"evaluation": {"scoring": "generation", "max_new_tokens": 10**9}}, "bounds"),
    "another setting": ({"evaluation": {"more": 1}}, "setup"),
    "257 options": ({"data": options(*(f"{number}" for number in range(MOST_LABELS + 1)))}, "bounds"),
    "a long option": ({"data": options("negative", "x" * 257)}, "bounds"),
    "an option twice": ({"data": options("neutral", "negative", "neutral")}, "bounds"),
}


@pytest.mark.parametrize("name", UNSCORABLE)
def test_settings_to_score_by_that_cannot_be_are_refused_whoever_signed_them(tmp_path: Path, name: str) -> None:
    sites, (sections, rule) = Federation(tmp_path), UNSCORABLE[name]
    setup, body = scored(**sections)
    house = sites.house(task="")
    refused(house, sites.request(kind="evaluate", body=body), rule, setup=setup)
    assert house.opens == 0


def test_the_labels_to_score_with_are_the_options_of_the_task() -> None:
    """Their number makes the reply, and others than the examples' own cannot be counted with: no order names any."""
    assert SETTINGS.labels == LABELS
    setup, _ = scored(data=options("yes", "no"))
    assert run_settings(Config.model_validate(setup["config"])).labels == ("yes", "no")


def test_a_task_of_more_options_than_a_site_scores_over_is_told_to_its_user() -> None:
    check_scorable(LABELS)
    for labels in (("x" * 257,), tuple(f"{number}" for number in range(MOST_LABELS + 1))):
        with pytest.raises(ConfigError, match=r"at most 256 options of 256 characters"):
            check_scorable(labels)
    with pytest.raises(ConfigError, match="an option of the task stands twice"):
        check_scorable(("neutral", "negative", "neutral"))


# --- the trail -------------------------------------------------------------------------------------------------------


def test_whatever_happens_stands_in_the_trail_without_its_words(tmp_path: Path) -> None:
    sites = Federation(tmp_path)
    errors = (ValueError("the patient's name"), RecursionError(), MemoryError(), ProtectionError("no"), KeyError(3))
    for error in errors:

        def fails(request: Request, error: Exception = error) -> Any:
            raise error

        with pytest.raises(type(error)):
            sites.house().serve(sites.request(), fails)
    assert "patient" not in (tmp_path / "bank-a" / FILE).read_text()
    ends = [event for event, _ in events(tmp_path) if event != "request"]
    assert ends == ["failure", "failure", "failure", "refusal", "failure"]


def test_a_request_that_cannot_be_read_stands_in_the_trail(tmp_path: Path) -> None:
    sites = Federation(tmp_path)
    house = sites.house()
    for setup in (b'{"x": "\\ud800"}', b'{"deep": ' + b"[" * 30 + b"]" * 30 + b"}", b"{", b"\xff", b"[1]"):
        with pytest.raises(MessageError):
            house.serve(sites.request(body=another(setup_sha256=sha256({}))), never, setup=setup)
    entries = read_chain(tmp_path / "bank-a" / FILE)
    assert [entry.event for entry in entries] == ["request", "refusal"] * 5
    assert all(len(entry.fields["message"]) == 64 for entry in entries[::2])
    verify_trail(tmp_path / "bank-a" / FILE, is_open_allowed=True)


def test_a_request_is_in_the_trail_before_it_is_served(tmp_path: Path) -> None:
    sites, seen = Federation(tmp_path), []

    def looks(request: Request) -> Reply:
        seen.extend(events(tmp_path))
        return work(request)

    sites.house().serve(sites.request(), looks)
    assert seen == [("request", "")]


def test_the_client_function_is_guarded(tmp_path: Path, model, start) -> None:  # noqa: ANN001
    sites = Federation(tmp_path, policy="objectives = ['sft']\nmetrics = ['accuracy']\nsmallest_count = 3")
    settings = acting(tiny.training(), labels=tiny.LABELS, rounds=4)
    site = Site("bank-a", tiny.encoded(tiny.closed(6)), model, settings=settings)
    house = sites.house()
    house.opened.expected = dict.fromkeys(("train", "evaluate"), layout_of(start))

    def does(request: Request) -> Reply:
        return client_round(request, site)

    request = sites.request(tensors=start)
    reply = house.serve(request, does)
    assert reply.signature and reply.body["loss"] is None and reply.body["num_examples"] == 6
    figures = house.serve(replace(request, kind="evaluate", body=BODY), does).body
    assert figures["accuracy"] in (0.0, 0.5, 1.0) and figures["confusion"] is None and figures["num_examples"] == 6
    assert house.serve(replace(request, kind="countersign", tensors={}), does).signature
    assert [event for event, _ in events(tmp_path)] == ["request", "reply"] * 3
    assert "countersign" in KINDS


@pytest.mark.parametrize("moment", ["0001-01-01T00:00:00+14:00", "9999-12-31T23:59:59.999999-14:00"])
def test_a_moment_that_utc_does_not_know_is_no_expiry(tmp_path: Path, moment: str) -> None:
    """It is refused like whatever cannot be read, and nothing is opened."""
    sites = Federation(tmp_path)
    house, carried = sites.house(), job().model_dump(mode="json")
    carried["job"]["expires"] = moment
    carried["signature"] = SUBMITTER.sign("job", canonical(carried["job"]))
    with pytest.raises((PolicyError, MessageError)):
        house.serve(sites.request(body={**BODY, JOB: carried}))
    assert house.opens == 0
