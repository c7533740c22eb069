"""The table of kinds: its records lead to code that there is, and a new kind is one record that both sides follow."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

import tiny
from acting import ORDER, acting
from governed import KINDS as LISTED
from governed import Federation, job, under
from linked import EXAMPLES as LINKED
from linked import HONEST, LIMIT
from linked import Federation as LinkedFederation
from silotune.deploy.flower import grid as link
from silotune.errors import MessageError, PolicyError
from silotune.federation.coordinator.rounds import Plan, exchange
from silotune.federation.kinds import KINDS, At, Kind, kind_named, nothing, steps_of
from silotune.federation.site.client import client_round
from silotune.federation.site.state import Site
from silotune.federation.wire.messages import read_body
from silotune.federation.wire.run_setup import RunSettings
from silotune.methods.algorithms import method
from silotune.settings.base import Positive, Section
from silotune.structs import Failure, Reply, Request
from silotune.transports.flower import Errand, FlowerTransport
from silotune.transports.in_process import InProcess, codec_of

SUM, ENCRYPTED = ("keys", "shares", "accept", "input", "check", "unmask"), ("weight", "input", "open")
PROTECTED = {*(f"secure_sum.{step}" for step in SUM), *(f"he.{step}" for step in ENCRYPTED)}
INPUTS = {"secure_sum.input", "he.input"}


@pytest.mark.parametrize("name", KINDS)
def test_every_record_leads_to_code_that_there_is(name: str) -> None:
    """A misspelt place would show with the first request of the kind, at a site."""
    kind = KINDS[name]
    assert all(isinstance(place, At) and callable(place.found()) for place in (kind.answer, kind.read))
    for layout in (kind.carries, kind.returns):
        assert layout is nothing or (isinstance(layout, At) and callable(layout.found()))


def test_the_facts_of_every_kind() -> None:
    """What rules of policies, ledgers and gates go by; a change here is a change of what they refuse."""

    def those(fact: str) -> set[str]:
        return {name for name, kind in KINDS.items() if getattr(kind, fact)}

    assert KINDS.keys() == {"train", "personalize", "evaluate", "leakage", "countersign", *PROTECTED}
    assert those("trains") == {"train", "personalize", *INPUTS}
    assert those("scores") == {"evaluate"}
    assert those("audits") == {"leakage"}
    assert those("ends_run") == {"countersign"}
    assert those("sends_update") == {"train", *INPUTS}
    assert those("is_protected") == PROTECTED
    assert those("is_seen_alone") == {"train", "personalize", "evaluate", "leakage"}
    assert those("uses_examples") == {"train", "personalize", "evaluate", "leakage", *INPUTS}
    assert {name for name, kind in KINDS.items() if kind.first_round == 0} == {
        "evaluate", "leakage", "countersign",
    }  # fmt: skip
    assert {name: kind.cohort for name, kind in KINDS.items() if kind.cohort} == {
        "secure_sum.keys": ("terms", "cohort"), "secure_sum.shares": ("keys",), "secure_sum.accept": ("arrived",),
        "secure_sum.input": ("arrived",), "secure_sum.check": ("survivors",), "he.input": ("clients",),
    }  # fmt: skip
    assert {name: kind.message for name, kind in KINDS.items() if kind.message != "query"} == {
        "train": "train", "evaluate": "evaluate", "leakage": "evaluate",
    }  # fmt: skip


def test_what_sends_an_update_or_takes_a_model_has_a_layout() -> None:
    """A kind without one carries no tensors, which would refuse its every message."""
    assert {name for name, kind in KINDS.items() if kind.returns is not nothing} == {
        "train", *INPUTS, "he.weight", "he.open",
    }  # fmt: skip
    assert all(kind.returns is not nothing for kind in KINDS.values() if kind.sends_update)
    carrying = {name for name, kind in KINDS.items() if kind.carries is not nothing}
    assert carrying == {name for name, kind in KINDS.items() if kind.uses_examples} | {"he.open"}


def test_the_steps_of_a_protection_are_in_their_order() -> None:
    assert steps_of("none") == ("train",)
    assert steps_of("secure_sum") == tuple(f"secure_sum.{step}" for step in SUM)
    assert steps_of("he") == tuple(f"he.{step}" for step in ENCRYPTED)


def test_a_kind_without_a_record_is_refused() -> None:
    with pytest.raises(MessageError, match="unknown request 'count'"):
        kind_named("count")


# --- a new kind -------------------------------------------------------------------------------------------------------

COUNT = "count"


class Counted(Section):
    """What a site answers to ``count``."""

    num_examples: Positive


def count_examples(request: Request, site: Site) -> Reply:
    return Reply(request.kind, request.round_number, site.name, {}, {"num_examples": len(site.examples)})


def counted(reply: Reply, settings: RunSettings) -> Counted:
    return read_body(Counted, reply)


@pytest.fixture
def count(monkeypatch: pytest.MonkeyPatch) -> None:
    """One record, and nothing else anywhere."""
    monkeypatch.setitem(KINDS, COUNT, Kind(answer=count_examples, read=counted, first_round=0))  # type: ignore[arg-type]


def plan(rounds: int = 1) -> Plan:
    settings = acting(tiny.training(), rounds=rounds)
    return Plan(rounds, method(settings.federation), ORDER, 3, settings, timeout_seconds=LIMIT)


def read_in(outcomes: Iterator[Reply | Failure]) -> dict[str, Section | str]:
    """What the coordinator has read in each answer that it believes, or the reason why it does not."""
    return {each.client: each.reason if isinstance(each, Failure) else each.read for each in outcomes}


@pytest.mark.usefixtures("count")
@pytest.mark.parametrize("encode", [True, False])
def test_a_new_kind_is_served_in_process(model, encode: bool) -> None:  # noqa: ANN001
    examples = tiny.encoded(tiny.closed(5))
    sites = {name: Site(name, examples[place:], model) for place, name in enumerate("ab")}
    way = InProcess(sites, encode=encode)
    asked = {name: Request(COUNT, 0, name, {}) for name in sites}
    assert read_in(exchange(plan(), way, asked)) == {"a": Counted(num_examples=5), "b": Counted(num_examples=4)}


def test_what_a_new_kind_may_answer_is_what_its_reader_takes(model, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: ANN001
    def lies(request: Request, site: Site) -> Reply:
        return replace(count_examples(request, site), body={"num_examples": -1, "names": ["somebody"]})

    monkeypatch.setitem(KINDS, COUNT, Kind(answer=lies, read=counted))  # type: ignore[arg-type]
    way = InProcess({"a": Site("a", tiny.encoded(tiny.closed(3)), model)})
    said = read_in(exchange(plan(), way, {"a": Request(COUNT, 1, "a", {})}))
    assert said == {"a": "the body of this count reply is not valid at 'num_examples'"}


@pytest.mark.usefixtures("count")
def test_a_new_kind_is_served_by_a_guarded_site_whose_job_lists_it(tmp_path: Path, model) -> None:  # noqa: ANN001
    sites = Federation(tmp_path)
    site = Site("bank-a", tiny.encoded(tiny.closed(6)), model)
    house = sites.house()

    def does(request: Request) -> Reply:
        return client_round(request, site)

    listed = sites.request(kind=COUNT, tensors={}, body=under({}, job(kinds=(*LISTED, COUNT))))
    reply = house.serve(listed, does)
    assert reply.body == {"num_examples": 6} and reply.signature
    assert house.serve(replace(listed, round_number=0), does).signature  # its first round
    with pytest.raises(PolicyError) as caught:
        house.serve(sites.request(kind=COUNT, tensors={}, body=under({})), does)
    assert caught.value.rule == "job.kind"


@pytest.fixture
def linked(tmp_path: Path, start) -> Iterator[LinkedFederation]:  # noqa: ANN001
    """A SuperLink over TLS and the nodes of two sites, whose trainers are threads of this process."""
    made = LinkedFederation(tmp_path / "f", start)
    made.link.start()
    try:
        link.wait_for_link(made.socket, limit_seconds=LIMIT)
        made.register()
        for name in HONEST:
            made.nodes[name].start()
        limit = time.monotonic() + LIMIT
        while any(link.nodes(made.socket)[name]["status"] != "online" for name in HONEST):
            assert time.monotonic() < limit
            time.sleep(0.05)
        yield made
    finally:
        for name in HONEST:
            made.nodes[name].stop()
        made.link.stop(limit_seconds=5)


@pytest.mark.end_to_end
@pytest.mark.usefixtures("count")
def test_a_new_kind_is_served_over_tls(linked: LinkedFederation) -> None:
    with link.flower_run(linked.socket, "run-1") as (_, grid):
        way = FlowerTransport(grid, HONEST, Errand("run-1", {"seed": 1}), codec=codec_of(plan().settings.federation))
        asked = {name: Request(COUNT, 0, name, {}) for name in HONEST}
        found = read_in(exchange(plan(), way, asked))
    assert found == {name: Counted(num_examples=len(LINKED[name])) for name in HONEST}
