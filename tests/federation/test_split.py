"""Split training over messages: what crosses, how clients share the server's part, and what is refused."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

import tiny
from silotune.errors import FederationError, MessageError, TrainingError
from silotune.federation.compute.server import ComputeServer, Part
from silotune.federation.wire.crossings import (
    BACKWARD,
    FORWARD,
    MOST_TOKENS,
    POSITIONS,
    STEP,
    VALUES,
    VISIBLE,
    Codec,
    OverMessages,
    Tally,
    read_crossing,
)
from silotune.federation.wire.messages import encode
from silotune.models.adapters import Adapted, attach, on, read, write
from silotune.models.elsewhere import Form, Turn
from silotune.models.split import client_part, server_part
from silotune.settings.objectives import OBJECTIVES
from silotune.settings.split import SplitSection
from silotune.structs import ClientUpdate, Request, Tensors
from silotune.training.encode import Encoded
from silotune.training.local import RoundPlace, train_round
from silotune.training.middle import Middle

WIDTH = 32


def whole(dropout: float = 0.0) -> Adapted:
    """A tiny model of four blocks, with an adapter."""
    from dataclasses import replace

    import transformers

    sizes = {**tiny.configuration("llama").to_dict(), "num_hidden_layers": 4}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made: Any = transformers.LlamaForCausalLM(transformers.LlamaConfig.from_dict(sizes))
    made.requires_grad_(False)
    base = replace(tiny.base("llama"), model=made.eval())
    adapted = on(attach(base, tiny.adapter(targets="all-linear", dropout=dropout), seed=0), tiny.USUAL.only("head"))
    write(adapted, tiny.stir(read(adapted)))
    return adapted


def cut(model: Adapted, *, clip_norm: float = 0.5, **section: Any) -> tuple[Adapted, ComputeServer, Tally]:
    """A client, the server and what they count."""
    split, tally = SplitSection(**section), Tally()
    training = tiny.training(clip_norm=clip_norm)
    server = ComputeServer(Part(Middle(server_part(model, split)), training, 1, 0), split, tally)
    return client_part(model, split, OverMessages(server.answer, server.codec, tally)), server, tally


def local(model: Adapted, weights: Tensors, examples: Sequence[Encoded], *, client: str = "a", steps: int = 3) -> Any:
    """A local round of the tensors that a model has."""
    if model.elsewhere is not None:
        model.elsewhere.turn = Turn(client, 1)
    settings = tiny.training(clip_norm=0.5, max_steps=steps, objective="sft")
    received = {name: weights[name] for name in model.parameters}
    return train_round(model, received, examples, settings=settings, place=RoundPlace(7))


EXAMPLES = tiny.examples_for("sft", 6)


def test_a_round_over_messages_ends_with_the_bits_of_the_whole_model() -> None:
    model = whole()
    weights = read(model)
    expected = local(model, weights, EXAMPLES)
    client, server, _ = cut(model, compress="none", schedule="hierarchical")
    server.begin(1, weights, ["a"])
    made = local(client, weights, EXAMPLES)
    server.leave("a", is_done=True)
    update = server.completed(ClientUpdate("a", made.delta, 6))
    assert made.loss == expected.loss and server.end() == {}
    tiny.assert_same_bits(expected.delta, {name: update.delta[name] for name in expected.delta})


def test_the_next_client_in_turn_goes_on_from_what_the_last_one_left() -> None:
    model = whole()
    weights = read(model)
    client, server, _ = cut(model, compress="none", schedule="serial")
    server.begin(1, weights, ["a", "b"])
    for name in ("a", "b"):
        local(client, weights, EXAMPLES, client=name)
        server.leave(name, is_done=True)
    twice = server.end()
    first = local(model, weights, EXAMPLES)
    moved = {name: weights[name] + first.delta[name] for name in twice}
    expected = local(model, {**weights, **moved}, EXAMPLES)
    assert any(not torch.equal(moved[name], twice[name]) for name in twice)
    tiny.assert_close(twice, {name: moved[name] + expected.delta[name] for name in twice}, 1e-5)


def test_nothing_stays_of_a_turn_that_is_broken_off() -> None:
    model = whole()
    weights = read(model)
    client, server, _ = cut(model, compress="none", schedule="serial")
    server.begin(1, weights, ["a", "b"])
    local(client, weights, EXAMPLES, client="a", steps=1)
    server.leave("a", is_done=False)
    local(client, weights, EXAMPLES, client="b")
    server.leave("b", is_done=True)
    alone = server.end()
    server.begin(1, weights, ["b"])
    local(client, weights, EXAMPLES, client="b")
    server.leave("b", is_done=True)
    tiny.assert_same_bits(alone, server.end())


def together(model: Adapted, names: Sequence[str], work: Callable[[str, Adapted], None]) -> tuple[Tensors, list[str]]:
    """Clients at one time; what the server has in the end, and the faults that clients met."""
    from silotune.models.adapters import replicate

    client, server, _ = cut(model, compress="none", schedule="client-batch", clip_norm=0)
    server.begin(1, read(model), names)
    faults: list[str] = []

    def run(name: str, own: Adapted) -> None:
        try:
            work(name, own)
        except FederationError as error:
            faults.append(f"{name}: {error}")
        finally:
            server.leave(name, is_done=not faults)

    threads = [threading.Thread(target=run, args=(name, replicate(client))) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    return server.end(), faults


def batch(client: Adapted, name: str, examples: Sequence[Encoded]) -> None:
    """One step of a client on one batch."""
    client.elsewhere.turn = Turn(name, 1)
    loss = tiny.loss("sft", client, examples, OBJECTIVES["sft"]())
    loss.total.backward()
    client.elsewhere.link.step(client.elsewhere.turn, loss.count, torch.zeros(0), torch.zeros(0))


def test_a_step_on_the_batches_of_all_is_the_central_step_on_their_union() -> None:
    shares = {"a": EXAMPLES[:2], "b": EXAMPLES[2:5]}
    model = whole()
    moved, faults = together(model, list(shares), lambda name, client: batch(client, name, shares[name]))
    assert not faults
    loss = tiny.loss("sft", model, EXAMPLES[:5], OBJECTIVES["sft"]())
    loss.total.backward()
    weights = read(model)
    rate = tiny.training().learning_rate
    optimizer = torch.optim.AdamW([model.parameters[name] for name in moved], lr=rate, weight_decay=0.0)
    for parameter in model.parameters.values():
        parameter.grad.div_(loss.count)
    optimizer.step()
    tiny.assert_close(moved, {name: read(model)[name] for name in moved}, 1e-5)
    assert any(not torch.equal(moved[name], weights[name]) for name in moved)


def test_a_client_that_leaves_is_waited_for_no_more() -> None:
    def work(name: str, client: Adapted) -> None:
        for _ in range(1 if name == "a" else 3):
            batch(client, name, EXAMPLES[:2])
        if name == "b":
            raise FederationError("the line is cut")

    _, faults = together(whole(), ["a", "b", "c"], work)
    assert faults == ["b: the line is cut"]


def test_a_client_that_leaves_between_forward_and_backward_does_not_stop_the_others() -> None:
    def work(name: str, client: Adapted) -> None:
        if name == "a":
            client.elsewhere.turn = Turn(name, 1)
            tiny.loss("sft", client, EXAMPLES[:2], OBJECTIVES["sft"]())
            raise FederationError("the loss is not finite")
        batch(client, name, EXAMPLES[2:5])

    model = whole()
    moved, faults = together(model, ["a", "b"], work)
    assert faults == ["a: the loss is not finite"]
    alone, _ = together(model, ["b"], work)
    tiny.assert_close(moved, alone, 1e-5)


def test_clients_at_different_points_of_a_step_are_refused_and_none_hangs() -> None:
    def work(name: str, client: Adapted) -> None:
        if name == "a":
            batch(client, name, EXAMPLES[:2])
        else:
            client.elsewhere.link.step(Turn(name, 1), 1, torch.zeros(0), torch.zeros(0))

    _, faults = together(whole(), ["a", "b"], work)
    assert len(faults) == 2 and all("not at the same point of a step" in fault for fault in faults)


@pytest.mark.parametrize(("compress", "least"), [("bf16", 0.9999), ("int8", 0.999), ("int4", 0.8)])
def test_compressed_crossings_leave_the_gradient_its_direction(compress: str, least: float) -> None:
    model = whole()
    client, server, tally = cut(model, compress=compress)
    loss = tiny.loss("sft", model, EXAMPLES, OBJECTIVES["sft"]())
    loss.total.backward()
    server.begin(1, read(model), ["a"])
    client.elsewhere.turn = Turn("a", 1)
    tiny.loss("sft", client, EXAMPLES, OBJECTIVES["sft"]()).total.backward()
    parts = {**client.parameters, **server._schedule.part.middle.part.parameters}
    exact = torch.cat([model.parameters[name].grad.flatten() for name in parts])
    made = torch.cat([parameter.grad.flatten() for parameter in parts.values()])
    cosine = float(torch.nn.functional.cosine_similarity(exact, made, dim=0))
    assert least <= cosine < 1
    errors = tally.as_json()
    assert all(0 < errors[name]["error_mean"] <= errors[name]["error_largest"] for name in errors)


def test_bytes_are_those_of_the_real_tokens() -> None:
    model = whole()
    client, server, tally = cut(model, compress="int8")
    weights = read(model)
    server.begin(1, weights, ["a"])
    local(client, weights, EXAMPLES[:4], steps=1)
    tokens = sum(example.length - 1 for example in EXAMPLES[:4])
    told = tally.as_json()
    assert [told[name]["messages"] for name in told] == [1] * 6
    for name in ("activations_up", "activations_down", "gradients_up", "gradients_down"):
        assert tokens * (WIDTH + 2) < told[name]["bytes"] < tokens * (WIDTH + 2) + 400
    assert server.bytes_up() == sum(told[name]["bytes"] for name in told if name.endswith("up"))
    server.begin(2, weights, ["a"])
    assert server.figures() == {}


def test_dropout_draws_from_seeds_of_each_party_and_again_the_same() -> None:
    model = whole(dropout=0.5)
    weights = read(model)
    ends = []
    for _ in range(2):
        client, server, _ = cut(model, compress="none")
        server.begin(1, weights, ["a"])
        made = local(client, weights, EXAMPLES)
        server.leave("a", is_done=True)
        ends.append({**made.delta, **server.end()})
    tiny.assert_same_bits(*ends)


FORM = {"lengths": [2, 3], "length": 3, "hides_padding": False}


def message(kind: str = FORWARD, *, tokens: int = 5, round_number: int = 1, body: Any = None, **tensors: Any) -> bytes:
    values = Codec("none", WIDTH).packed(torch.zeros(tokens, WIDTH))
    return encode(Request(kind, round_number, "a", {VALUES: values, **tensors}, FORM if body is None else body))


def step(count: int, norms: torch.Tensor) -> bytes:
    body = {"count": count, "before": 0, "behind": len(norms)}
    return encode(Request(STEP, 1, "a", {"before": torch.zeros(0), "behind": norms}, body))


BAD: dict[str, tuple[bytes, str]] = {
    "another kind": (message("train"), "answers no message of the kind 'train'"),
    "another round": (message(round_number=2), "a batch of round 2 came, and this is round 1"),
    "fewer states than tokens": (message(tokens=4), "values"),
    "a row longer than all": (message(body={**FORM, "lengths": [2, 4]}, tokens=6), "a form that cannot be"),
    "no rows": (message(body={**FORM, "lengths": []}, tokens=0), "a form that cannot be"),
    "more tokens than can be": (message(body={**FORM, "length": MOST_TOKENS}), "a form that cannot be"),
    "a count that is true": (message(body={**FORM, "hides_padding": 1}), "not valid at 'hides_padding'"),
    "more positions than the model's": (
        message(body={**FORM, "length": 300}), "a batch of rows of 300 ids came, and the model has 256 positions"),
    "positions beyond": (
        message(**{POSITIONS: torch.full((2, 3), 999, dtype=torch.int32)}), "positions beyond the model's"),
    "a mask of another size": (message(**{VISIBLE: torch.zeros(9, dtype=torch.uint8)}), "visible"),
    "a tensor too many": (message(more=torch.zeros(1)), "unexpected in a message"),
    "gradients before a batch": (
        message(BACKWARD, body={"tokens": 5, "is_wanted": True}), "a turn begins with a batch"),
    "a step before a batch": (step(1, torch.zeros(1)), "a turn begins with a batch"),
    "a step over no terms": (step(0, torch.zeros(1)), "not valid at 'count'"),
    "norms that are not finite": (step(1, torch.tensor([float("nan")])), "not finite"),
    "no message": (b"ST01 and nothing", "message"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_message_that_cannot_be_is_refused_in_one_line(name: str) -> None:
    model = whole()
    _, server, _ = cut(model, compress="none")
    server.begin(1, read(model), ["a"])
    data, said = BAD[name]
    with pytest.raises(MessageError, match=said) as raised:
        server.answer(data)
    assert "\n" not in str(raised.value)


def test_gradients_after_the_batch_was_used_are_refused() -> None:
    model = whole()
    _, server, _ = cut(model, compress="none")
    server.begin(1, read(model), ["a"])
    server.answer(message())
    server.answer(message(BACKWARD, body={"tokens": 5, "is_wanted": False}))
    with pytest.raises(MessageError, match="gradients of a batch came that the server does not hold"):
        server.answer(message(BACKWARD, body={"tokens": 5, "is_wanted": False}))


def test_gradients_of_other_tokens_than_the_batch_are_refused() -> None:
    model = whole()
    _, server, _ = cut(model, compress="none")
    server.begin(1, read(model), ["a"])
    server.answer(message())
    with pytest.raises(MessageError, match="gradients of 4 tokens came for a batch of 5"):
        server.answer(message(BACKWARD, tokens=4, body={"tokens": 4, "is_wanted": False}))


def test_states_that_are_not_finite_do_not_leave() -> None:
    with pytest.raises(TrainingError, match="what crosses the cut is not finite"):
        Codec("int8", 4).packed(torch.full((2, 4), float("inf")))


@pytest.mark.parametrize("compress", ["none", "bf16", "int8", "int4"])
def test_a_token_has_a_scale_of_its_own(compress: Any) -> None:
    codec = Codec(compress, 8)
    states = torch.randn(3, 8, generator=torch.Generator().manual_seed(0)) * torch.tensor([[1e-3], [1.0], [1e3]])
    back = codec.opened(codec.packed(states), 3)
    off = (back - states).norm(dim=1) / states.norm(dim=1)
    assert float(off.max()) < {"none": 1e-9, "bf16": 0.005, "int8": 0.01, "int4": 0.15}[compress]
    assert len(codec.packed(states)) == codec.layout(3)[VALUES][1][0]


def test_a_form_of_a_request_is_that_which_was_sent() -> None:
    from silotune.federation.wire.crossings import _of_form, form_of

    visible = torch.ones(2, 3, 3, dtype=torch.bool).tril()
    visible[1, 2, 0] = False
    form = Form((2, 3), 3, visible=visible, position_ids=torch.tensor([[0, 1, 0], [0, 1, 1]]))
    request = read_crossing(message(**_of_form(form)), Codec("none", WIDTH))
    back = form_of(request, 256)
    assert back.lengths == form.lengths and torch.equal(back.visible, visible)
    assert torch.equal(back.position_ids, form.position_ids)
