"""A site that lies in an encrypted sum: what is seen of it is booked, what is only in the sum is refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import tiny
from acting import ORDER
from protected import LIAR, NAMES, Lie, Lying, Net, asked, privacy, run
from silotune.errors import ProtectionError
from silotune.federation.site.encrypted_sum import FIGURES_NAME
from silotune.federation.wire.sum_orders import CELLS, FIGURE_PACKING, SUM
from silotune.privacy.encryption import Packing, encrypt
from silotune.record.runs import RunFolder
from silotune.structs import Reply, Request
from silotune.tensors import count

pytestmark = pytest.mark.end_to_end

pytest.importorskip("tenseal")
SITES = NAMES[:4]


def changed(kind: str, name: str, make: Callable[[Lying, torch.Tensor], np.ndarray]) -> Lie:
    """Another tensor in the answers to one kind of request."""

    def lie(net: Lying, request: Request, reply: Reply) -> Reply:
        if request.kind != kind or name not in reply.tensors:
            return reply
        made = torch.from_numpy(make(net, reply.tensors[name]))
        return replace(reply, tensors={**reply.tensors, name: made})

    return lie


def zeros(net: Lying, cells: torch.Tensor) -> np.ndarray:
    return np.zeros_like(cells.numpy())


def mangled(net: Lying, cells: torch.Tensor) -> np.ndarray:
    made = cells.numpy().copy()
    made[-1, 4:300] = 7
    return made


def short(net: Lying, cells: torch.Tensor) -> np.ndarray:
    """Readable ciphertexts of vectors of another length, which no other can be added to."""
    import tenseal

    context = tenseal.context_from(net.liar.he_key)
    encoded = tenseal.bfv_vector(context, [1, 2, 3]).serialize()
    made = np.zeros_like(cells.numpy())
    made[:, :4] = np.frombuffer(len(encoded).to_bytes(4, "little"), np.uint8)
    made[:, 4 : 4 + len(encoded)] = np.frombuffer(encoded, np.uint8)
    return made


@pytest.mark.parametrize("make", [zeros, mangled, short])
@pytest.mark.parametrize(
    ("kind", "name"), [("he.weight", FIGURES_NAME), ("he.input", CELLS), ("he.input", FIGURES_NAME)]
)
def test_ciphertexts_that_are_none_are_booked(model, start, tmp_path: Path, make, kind: str, name: str) -> None:
    """Nothing of an answer is in a sum when a part of it cannot be: the others' sum has its honest bits."""
    net = Lying(model, privacy("he"), changed(kind, name, make), SITES)
    state = run(tmp_path, net, start, privacy("he"), notify=net.notify)
    assert [client for client, _ in net.booked] == [LIAR] and "ciphertext" in net.booked[0][1]
    without = Net(model, privacy("he"), lambda asked_for, client: (asked_for, client) == (kind, LIAR), names=SITES)
    tiny.assert_same_bits(state.weights, run(tmp_path / "without", without, start, privacy("he")).weights)


def figures(*numbers: int) -> Callable[[Lying, torch.Tensor], np.ndarray]:
    """Other figures, properly encrypted."""

    def make(net: Lying, cells: torch.Tensor) -> np.ndarray:
        return encrypt(np.array(numbers, np.int64), FIGURE_PACKING, net.liar.he_key)

    return make


def update(value: int, packing: int) -> Callable[[Lying, torch.Tensor], np.ndarray]:
    def make(net: Lying, cells: torch.Tensor) -> np.ndarray:
        size = sum(tensor.numel() for tensor in net.sites["a"].adapted.parameters.values())
        return encrypt(np.full(size, value, np.int64), Packing(packing), net.liar.he_key)

    return make


HONEST = (1, 4, 4, 4, 1 << 20, 1, 10, 1, 1 << 20, 1 << 20, 0, 0, 0, 0)
"""What 'b' would report of its 4 examples, but for times."""


@pytest.mark.parametrize(
    ("lie", "said"),
    [
        (changed("he.weight", FIGURES_NAME, figures(2, 4)), "5 sites count themselves in it, 4 have sent"),
        (changed("he.weight", FIGURES_NAME, figures(1, 10_000)), "hold 10014 examples, and may hold 4 to 256"),
        (changed("he.weight", FIGURES_NAME, figures(1, -14)), "hold 0 examples"),
        (changed("he.input", FIGURES_NAME, figures(3, *HONEST[1:])), "6 sites count themselves in it"),
        (changed("he.input", FIGURES_NAME, figures(1, 5, 5, *HONEST[3:])), "19 examples are in it"),
        (changed("he.input", FIGURES_NAME, figures(1, 3, 3, 3, *HONEST[4:])), "17 examples are in it"),
        (changed("he.input", FIGURES_NAME, figures(*HONEST[:-1], 1 << 40)), "its clipped is"),
    ],
)
def test_a_sum_that_cannot_be_true_is_refused(model, start, tmp_path: Path, lie: Lie, said: str) -> None:
    """Of ciphertexts nobody can tell whose it is; two sites have opened it, so it is not the opener."""
    settings = privacy("he")
    net = Lying(model, settings, lie, SITES)
    with pytest.raises(ProtectionError, match=f"cannot be true: .*{said}.*nobody can tell which"):
        run(tmp_path, net, start, settings, notify=net.notify)
    assert net.booked == [] and not RunFolder(tmp_path).read_rows("clients")
    openers = [reply.client for reply in net.seen if reply.kind == "he.open"]
    assert openers[-2:] == ["a", "b"] or openers == ["a", "b"]


def test_the_largest_lie_of_an_encrypted_update_is_a_mean_within_the_bound(model, start, tmp_path: Path) -> None:
    """Numbers are cut off where their slots end: what fits there, an honest site could have sent."""
    settings = privacy("he", packing=2)
    net = Lying(model, settings, changed("he.input", CELLS, update(1 << 26, 2)), SITES)
    state = run(tmp_path, net, start, settings, notify=net.notify)
    assert 0.4 < max(float((state.weights[name] - start[name]).abs().max()) for name in start) <= 1.0


@pytest.mark.parametrize("name", [FIGURES_NAME, SUM])
def test_an_opener_that_lies_is_booked_and_the_next_one_asked(model, start, tmp_path: Path, name: str) -> None:
    settings = privacy("he")
    lie = changed("he.open", name, lambda net, opened: opened.numpy() * 0 + 2**30)
    net = Lying(model, settings, lie, SITES, liar="a")
    state = run(tmp_path, net, start, settings, notify=net.notify)
    assert {client for client, _ in net.booked} == {"a"}
    assert all("it opened the sum to something else than others did" in reason for _, reason in net.booked)
    honest = run(tmp_path / "honest", Net(model, settings, names=SITES), start, settings)
    tiny.assert_same_bits(state.weights, honest.weights)


def test_no_opener_books_an_honest_one_with_a_sum_that_cannot_be(model, start, tmp_path: Path) -> None:
    """The liar counts itself three times, and opens the sum to whatever it likes, as if it had not."""
    settings = privacy("he")

    def lie(net: Lying, request: Request, reply: Reply) -> Reply:
        if request.kind == "he.open" and SUM in reply.tensors:
            counted = reply.tensors[FIGURES_NAME].clone()
            counted[0] -= 2
            return replace(reply, tensors={FIGURES_NAME: counted, SUM: torch.full_like(reply.tensors[SUM], 77)})
        return changed("he.input", FIGURES_NAME, figures(3, *HONEST[1:]))(net, request, reply)

    net = Lying(model, settings, lie, SITES)
    with pytest.raises(ProtectionError, match="cannot be true: .*6 sites count themselves in it"):
        run(tmp_path, net, start, settings, notify=net.notify)
    assert [client for client, _ in net.booked] == [LIAR]


@pytest.mark.parametrize("changes", [{"packing": 2}, {"bound": 100.0}])
def test_a_coordinator_cannot_choose_how_to_encrypt(model, start, changes) -> None:
    net = Net(model, privacy("he"))
    body = {
        "packing": 3, "bound": 1.0, "clients": 5, "num_examples": 25, "size": count(start), "train": ORDER,
    }  # fmt: skip
    name = next(iter(changes))
    with pytest.raises(ProtectionError, match=f"the orders to encrypt say {name} = {changes[name]}, the settings"):
        asked(net, "a", "he.input", {**body, **changes}, start)
    asked(net, "b", "he.input", body, start)


def test_a_site_with_more_examples_than_a_weight_may_say_sends_nothing(model, start, tmp_path: Path) -> None:
    settings = privacy("he", max_examples=5)  # 'd' has 6
    with pytest.raises(
        ProtectionError, match="may hold 4 to 20|holds more examples than privacy.protection.max_examples = 5"
    ):
        run(tmp_path, Net(model, settings, names=("b", "c", "d", "e")), start, settings)
