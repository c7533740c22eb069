"""Simulated attackers: who they are, what they change, and that nothing of them is in a message."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import pytest
import torch

import tiny
from silotune.errors import ConfigError
from silotune.federation.simulation.attack import Attacked, attackers, with_flipped_labels
from silotune.settings.attacks import ATTACKS, NoAttack, Scaled
from silotune.structs import Failure, Reply, Request, SiteState
from silotune.training.encode import Encoded

NAMES = tuple(f"client-{number}" for number in range(10))


class Inner:
    """Clients that send ones; the last one fails."""

    def clients(self) -> tuple[str, ...]:
        return NAMES

    def exchange(self, requests: Mapping[str, Request], *, timeout_seconds: float) -> Iterator[Reply | Failure]:
        for name in requests:
            failed = Failure(name, 1, "train", "it broke")
            yield failed if name == NAMES[-1] else Reply("train", 1, name, {"w": torch.ones(2)})

    def states(self) -> dict[str, SiteState]:
        return {}

    def restore(self, states: Mapping[str, SiteState]) -> None:
        raise AssertionError


def test_attackers_are_drawn_by_the_seed() -> None:
    section = Scaled(clients=2)
    assert len(attackers(section, NAMES, seed=1)) == 2
    assert attackers(section, NAMES, seed=1) == attackers(section, NAMES[::-1], seed=1)
    assert len({attackers(section, NAMES, seed=seed) for seed in range(9)}) > 1
    assert attackers(NoAttack(), NAMES, seed=1) == frozenset()
    with pytest.raises(ConfigError, match="leaves no honest one of 2 clients"):
        attackers(section, NAMES[:2], seed=1)


@pytest.mark.parametrize(("kind", "value"), [("sign-flip", -4.0), ("scaled", 4.0), ("label-flip", 4.0)])
def test_malicious_updates_are_changed_and_no_others(kind: str, value: float) -> None:
    malicious = frozenset({"client-3", NAMES[-1]})
    made = Attacked(Inner(), ATTACKS[kind](factor=4.0), malicious)
    requests = {name: Request("train", 1, name, {}) for name in NAMES}
    replies = {reply.client: reply for reply in made.exchange(requests, timeout_seconds=1)}
    assert isinstance(replies.pop(NAMES[-1]), Failure)
    assert {name for name, reply in replies.items() if reply.tensors["w"].tolist() != [1.0, 1.0]} == {"client-3"}
    assert replies["client-3"].tensors["w"].tolist() == [value, value]
    assert made.clients() == NAMES and made.states() == {}


def test_flipped_labels_are_the_next_ones() -> None:
    examples = tiny.encoded(tiny.closed(3))
    flipped = with_flipped_labels(examples, 0)
    right = [tiny.closed(3)[place].answer for place in (1, 2, 0)]
    words = tiny.tokenizer()
    for place, (example, before) in enumerate(zip(flipped, examples, strict=True)):
        assert example.label == (before.label + 1) % 3 and example.prompt == before.prompt
        assert words.decode(list(example.answer), skip_special_tokens=True) == right[place]
        assert example.answer[-1] == words.eos_token_id == before.answer[-1]
    classes = [Encoded((1, 2), (), label=label) for label in (0, 2)]
    assert [example.label for example in with_flipped_labels(classes, 3)] == [1, 0]


def test_open_answers_have_no_labels_to_flip() -> None:
    with pytest.raises(ConfigError, match="needs a closed-ended task"):
        with_flipped_labels(tiny.encoded(tiny.opened(1)), 0)
