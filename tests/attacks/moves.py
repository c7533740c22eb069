"""The moves of a hostile coordinator, each with what refuses it: a new one is five lines and an entry in ``MOVES``."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import torch

from attacks.hostile import OTHERS, SITE, Coordinator, configuration, key_of, packed
from silotune.settings.privacy import Local
from silotune.transports.frames import Frame

Move = Callable[[Coordinator], Frame]


def sends(kind: str = "train", **changes: Any) -> Move:
    """One message of this kind with some fields of its header changed."""
    return lambda it: it.send(it.request(kind, **changes))


def with_body(kind: str = "train", **changes: Any) -> Move:
    """The body changed after the submitter had signed it."""
    return lambda it: it.send(it.request(kind, body=it.body(kind, **changes)))


def with_job(kind: str = "train", **changes: Any) -> Move:
    """The job signed otherwise, by the submitter itself."""
    return lambda it: it.send(it.request(kind, body={**it.body(kind), "job": it.job(**changes)}))


ELSEWHERE = Local(ledger=Path("/tmp/ledger")).model_dump(mode="json")
"""A guarantee whose ledger a coordinator places."""


def with_setup(*path: str, value: Any, kind: str = "train") -> Move:
    """The setup changed, and signed so by a submitter who means no good; the site's own places are not for it."""

    def move(it: Coordinator) -> Frame:
        it.model()  # the honest run is open before
        place = it.setup["config"]
        for name in path[:-1]:
            place = place[name]
        place[path[-1]] = value
        return it.send(it.request(kind))

    return move


def with_config(kind: str = "train", **sections: Any) -> Move:
    """Another configuration, signed whole by the submitter: order, setup and job agree."""

    def move(it: Coordinator) -> Frame:
        changed = it.config.model_dump(mode="json")
        for name, values in sections.items():
            changed[name] = {**changed[name], **values}
        start, path = it.model(), Path(it.config.model.name)
        other = Coordinator(it.house, configuration(path, **{name: changed[name] for name in sections}), run="other")
        return other.send(other.request(kind, tensors=start))

    return move


def with_options(*options: str) -> Move:
    """A request to score over these options: a task of the run's own, signed whole by the submitter."""
    definition = {"prompt": "{text}", "answer": "label", "options": list(options)}
    return with_config("evaluate", data={"task": "custom", "definition": definition})


def in_header(old: str, new: str) -> Move:
    """The JSON of the header changed as text."""

    def move(it: Coordinator) -> Frame:
        message = it.request()
        length = int.from_bytes(message[4:8], "little")
        text = message[8 : 8 + length].decode()
        assert old in text
        return it.send(packed(text.replace(old, new, 1).encode(), message[8 + length :]))

    return move


def raw_setup(setup: bytes) -> Move:
    return lambda it: it.send(it.request(), setup=setup)


def signs_its_own_job(it: Coordinator) -> Frame:
    """The coordinator's own key in the place of a submitter's."""
    public = (it.house.folder / "coordinator" / "signing.pub").read_text().strip()
    return it.send(it.request(body={**it.body(), "job": it.job(key=it.key, name=public)}))


def names_a_submitter(it: Coordinator) -> Frame:
    """A submitter's name over the coordinator's signature."""
    return it.send(it.request(body={**it.body(), "job": it.job(key=it.key)}))


def a_site_s_key_signs(it: Coordinator) -> Frame:
    """A site that works with the coordinator lends its key."""
    key = key_of(it.house.folder / OTHERS[0] / "signing.key")
    public = (it.house.folder / OTHERS[0] / "signing.pub").read_text().strip()
    return it.send(it.request(body={**it.body(), "job": it.job(key=key, name=public)}))


def another_s_head(it: Coordinator) -> Frame:
    return it.send(it.request(head=it.head(key_of(it.house.folder / OTHERS[0] / "signing.key"))))


def another_run_s_state(it: Coordinator) -> Frame:
    return it.send(it.request(), run="another")


def climbs_out(it: Coordinator) -> Frame:
    return it.send(it.request(), run="../../escape")


def another_model_each_time(it: Coordinator) -> Frame:
    """One round, five models of its choice."""
    for scale in (1.0, 2.0, 3.0, 4.0):
        it.send(it.request(tensors=it.model(scale)))
    return it.send(it.request(tensors=it.model(5.0)))


def an_oracle(it: Coordinator) -> Frame:
    """25 scorings of models of its choice: who is among the examples?"""
    answers = [it.send(it.request("evaluate", tensors=it.model(1 + number / 10))) for number in range(25)]
    assert sum(answer.header["status"] == "reply" for answer in answers) == 1
    return answers[-1]


def an_oracle_after_a_restart(it: Coordinator) -> Frame:
    it.send(it.request("evaluate"))
    it.house.restarted()
    return it.send(it.request("evaluate", tensors=it.model(2.0)))


def another_job_s_run(it: Coordinator) -> Frame:
    """A second job under the name of a run that the site has served: its memory would be taken for the first one's."""
    it.send(it.request())
    other = replace(it, number="b" * 32)
    return other.send(other.request())


def a_flood_of_setup(it: Coordinator) -> Frame:
    """48 MB of empty lists, which would be 2 GB once they are parsed."""
    return it.send(it.request(), setup=b'{"a":[' + b"[]," * (16 << 20) + b"[]]}")


def three_million_names(it: Coordinator) -> Frame:
    listed = ",".join(f'"{number}":{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}' for number in range(3_000_000))
    text = ("{" + listed + "}").encode()
    header = it.request()[8 : 8 + int.from_bytes(it.request()[4:8], "little")]
    return it.send(packed(header, len(text).to_bytes(8, "little") + text))


def other_shapes(it: Coordinator) -> Frame:
    return it.send(it.request(tensors={name: torch.zeros(3, 3) for name in it.model()}))


def true_as_a_size(it: Coordinator) -> Frame:
    """``true`` where the list of tensors says 1."""
    message = it.request()
    return it.send(message.replace(b'"shape":[2,', b'"shape":[true,', 1))


def not_finite(it: Coordinator) -> Frame:
    return it.send(it.request(tensors=it.model(float("nan"))))


def code_in_a_message(it: Coordinator) -> Frame:
    import pickle

    return it.send(packed(b"{}", pickle.dumps(Path)))


def replays_another_s_request(it: Coordinator) -> Frame:
    return it.send(it.request(client=OTHERS[0]))


def columns_of_its_choice(it: Coordinator) -> Frame:
    """A task of the run's own, whose columns are of the site's file."""
    definition = {"prompt": "{sector} {text}", "answer": "label", "options": ["negative", "neutral", "positive"]}
    return with_config(data={"task": "custom", "definition": definition})(it)


@dataclass(frozen=True)
class Listed:
    """A move: what it is, and the code of what refuses it."""

    says: str
    move: Move
    refused_by: str


FLOOD = {"scoring": "generation", "max_new_tokens": 10**9}

MOVES: Mapping[str, Listed] = {
    # --- values of another type that compare equal, and forms
    "round-true": Listed("a round that is true, which equals 1", sends(round=True), "form"),
    "round-float": Listed("a round that is 1.0", sends(round=1.0), "form"),
    "round-text": Listed("a round that is a text", sends(round="1"), "form"),
    "shape-true": Listed("a size that is true", true_as_a_size, "form"),
    "seed-true": Listed("a seed that is true, unsigned", with_body(seed=True), "form"),
    "surrogate": Listed("a lone surrogate in a text", in_header(SITE, "\\ud800"), "form"),
    "surrogate-in-body": Listed("the same in the body", with_body(run="\ud800"), "form"),
    "digits": Listed("an integer of 4,300 digits", in_header('"round": 1', '"round": ' + "9" * 4300), "form"),
    "infinite": Listed("a number of 1e999", in_header('"seed": 0', '"seed": 1e999'), "form"),
    "deep": Listed("a body nested 900 deep", with_body(x=json.loads("[" * 900 + "]" * 900)), "form"),
    "deeper": Listed("a body nested 100,000 deep", in_header('"seed": 0', '"seed": ' + "[" * 100_000), "form"),
    "control": Listed("escapes for a terminal in a text", with_body(run="\x1b]0;owned\x07"), "form"),
    "twice": Listed("a name that stands twice", in_header('"round": 1', '"round": 1, "round": 2'), "form"),
    "no-message": Listed("bytes that are no message", lambda it: it.send(b"\x80\x04."), "form"),
    "pickle": Listed("code in the place of tensors", code_in_a_message, "form"),
    "names": Listed("three million names of tensors", three_million_names, "form"),
    "shapes": Listed("tensors of other shapes", other_shapes, "form"),
    "nan": Listed("a model that is not finite", not_finite, "form"),
    "setup-surrogate": Listed("a surrogate in the setup", raw_setup(b'{"a":"\\ud800"}'), "form"),
    "setup-deep": Listed("a setup nested 900 deep", raw_setup(b'{"a":' * 900 + b"1" + b"}" * 900), "form"),
    "setup-flood": Listed("a setup of 48 MB of empty lists", a_flood_of_setup, "setup"),
    "setup-bytes": Listed("a setup that is no text", raw_setup(b"\xff\xfe"), "form"),
    # --- a path from elsewhere, work before admission
    "train": Listed("a file of the site's disk to train on", with_setup("data", "train", value="/nope.jsonl"), "setup"),
    "root": Listed("a folder as data.root", with_setup("data", "root", value="/etc"), "setup"),
    "field": Listed(
        "a file of the site's, dealt by the values of a column",
        with_setup("data", "validation", value="/etc/passwd"), "setup",
    ),
    "files": Listed(
        "a file of the coordinator's choice to train on",
        with_setup("data", "partition", value={"scheme": "file", "files": {SITE: "/etc/passwd"}}), "setup",
    ),
    "start": Listed("an adapter below a path", with_setup("adapter", "start", value="/home/somebody/run"), "setup"),
    "model": Listed("another base model by its path", with_setup("model", "name", value="/models/evil"), "setup"),
    "ledger": Listed("a ledger elsewhere", with_setup("privacy", "dp", value=ELSEWHERE), "setup"),
    "policies": Listed("a policy of another's", with_setup("federation", "policies", value={SITE: "/etc/x"}), "setup"),
    "gold": Listed("a file to score on", with_setup("evaluation", "gold", value="/etc/passwd.txt"), "setup"),
    "setup-unsigned": Listed(
        "a setup that nobody signed", lambda it: it.send(it.request(), setup=b'{"config":{},"base":""}'), "job.setup"
    ),
    "columns": Listed("a task whose columns the coordinator chooses", columns_of_its_choice, "tasks"),
    "climb": Listed("a run named ../../escape", climbs_out, "job.run"),
    # --- who asks
    "coordinator-signs": Listed("a job that the coordinator signed", signs_its_own_job, "submitters"),
    "coordinator-forges": Listed("a submitter's name over the coordinator's signature", names_a_submitter, "job"),
    "site-signs": Listed("a job that another site signed", a_site_s_key_signs, "submitters"),
    "no-job": Listed("a request without a job", lambda it: it.send(it.request(body=it.order())), "job"),
    "no-head": Listed("no head of the trail", sends(head=""), "coordinator"),
    "other-head": Listed("a head that a site signed", another_s_head, "coordinator"),
    "other-site": Listed("a request for another site", replays_another_s_request, "address"),
    # --- what is not listed
    "not-named": Listed("a job that does not name the site", with_job(participants=list(OTHERS)), "job.site"),
    "expired": Listed(
        "a job of yesterday",
        with_job(expires=(datetime.now(UTC) - timedelta(days=1)).isoformat().replace("+00:00", "Z")), "job.expired",
    ),
    "other-run": Listed("a job of another run", another_run_s_state, "job.run"),
    "taken-name": Listed("a second job under a run's name", another_job_s_run, "job.run"),
    "round-0": Listed("round 0", sends(round=0), "job.round"),
    "round-minus": Listed("round -7", sends(round=-7), "form"),
    "round-beyond": Listed("a round beyond the job's", sends(round=5), "job.round"),
    "personalize": Listed(
        "personalize, with rates of its own, under a job that does not list it",
        lambda it: it.send(it.request("personalize", body=it.body())), "job.kind",
    ),
    "unknown-kind": Listed("a kind that there is not", sends("generate", body={}), "form"),
    "sum-unlisted": Listed("a step of a sum under a plain job", with_job("secure_sum.keys"), "job.kind"),
    "unsigned-rate": Listed("a rate that nobody signed", with_body(training={"learning_rate": 1}), "form"),
    "two-tasks": Listed("the job says one task, the setup another", with_job(task="medical-choice"), "job.setup"),
    "two-orders": Listed("an order with another seed than the setup", with_body(seed=9), "job.order"),
    "two-rounds": Listed("a signed job of more rounds than the setup", with_job(rounds=9), "job.setup"),
    # --- what no run needs
    "steps": Listed("10**12 steps", with_config(training={"max_steps": 10**12}), "most_steps"),
    "rate": Listed("a rate of 1e9", with_config(training={"learning_rate": 1e9}), "bounds"),
    "rank": Listed("an adapter of rank 10**9", with_config(adapter={"rank": 10**9}), "bounds"),
    "examples": Listed("10**12 examples to generate", with_config(data={"num_train": 10**12}), "bounds"),
    "prompt": Listed(
        "a prompt that shows its text 10,000 times", with_setup("data", "prompt", value="{text}" * 10_000), "setup"
    ),
    "prompt-long": Listed("a prompt of 60,000 characters", with_setup("data", "prompt", value="x" * 60_000), "setup"),
    "states": Listed("a state of every round kept", with_config(record={"checkpoint_every": 10**9}), "bounds"),
    "labels": Listed("2,048 labels to score with", with_options(*(f"{n}" for n in range(2048))), "bounds"),
    "labels-other": Listed("labels that the examples have not", with_options("yes", "no"), "tasks"),
    "labels-few": Listed(
        "fewer labels than the examples have, in the order", with_body("evaluate", labels=["positive"]), "form"
    ),
    "batch": Listed(
        "a batch of -3", with_setup("evaluation", "batch_size", value=-3, kind="evaluate"), "setup"
    ),
    "tokens": Listed("10**9 tokens to write", with_config("evaluate", evaluation=FLOOD), "bounds"),
    "generates": Listed(
        "text written from the site's prompts",
        with_config("evaluate", evaluation={"scoring": "generation"}), "generation",
    ),
    # --- what was served before
    "models": Listed("one round, five models", another_model_each_time, "most_models"),
    "oracle": Listed("25 scorings of models of its choice", an_oracle, "most_scorings"),
    "oracle-restarted": Listed("the same around a restart", an_oracle_after_a_restart, "most_scorings"),
}  # fmt: skip
"""Name -> move of a hostile coordinator; ``pytest tests/attacks --attacks`` prints them with what refused each."""
