"""What a site expects of a request: exactly what its coordinator sends under the same settings, and nothing else."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from silotune import lora
from silotune.errors import MessageError
from silotune.federation.kinds import KINDS
from silotune.federation.site.layouts import expected_of
from silotune.federation.wire.links import address
from silotune.federation.wire.messages import Header, decode_request, encode, layout_of
from silotune.methods.algorithms import method
from silotune.methods.schedule import outgoing
from silotune.settings.sections import FederationSection
from silotune.structs import Request, Tensors

INITIAL: Tensors = {
    "m.lora_A.weight": torch.ones(4, 6), "m.lora_B.weight": torch.zeros(5, 4), "head": torch.ones(3),
}  # fmt: skip
RESIDUAL: Tensors = {"m.lora_residual_A.weight": torch.ones(3, 6), "m.lora_residual_B.weight": torch.ones(5, 3)}
CORE: Tensors = {"m.lora_R.weight": torch.ones(4, 4)}


def section(**changes: Any) -> FederationSection:
    return FederationSection.model_validate(changes)


@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize("rank", [None, 2])
@pytest.mark.parametrize("rule", ["factors", "exact-residual", "stack", "svd", "freeze-a", "alternate"])
def test_what_a_rule_sends_is_what_a_site_expects(rule: str, rank: int | None, number: int) -> None:
    settings = section(lora=rule)
    made = method(settings)
    weights = {**INITIAL, **(RESIDUAL if made.fold is not None and number == 2 else {})}
    sent = lora.cut(outgoing(made.sent(weights, {}), made.schedule(number)), rank)
    data = encode(Request("train", number, "a", sent, {}))
    assert decode_request(data, expected_of(settings, INITIAL, rank=rank)["train"]).tensors.keys() == sent.keys()


@pytest.mark.parametrize("zstd", [0, 3])
@pytest.mark.parametrize("algorithm", ["fedavg", "scaffold"])
def test_a_packed_model_and_a_change_are_both_expected(algorithm: str, zstd: int) -> None:
    if zstd:
        pytest.importorskip("zstandard")
    settings = section(algorithm=algorithm, download={"keep": "top-k", "share": 0.5, "delta": True, "zstd": zstd})
    model = method(settings).sent(INITIAL, {})
    asked = {"a": Request("train", 1, "a", model, {})}
    expected = expected_of(settings, INITIAL)["train"]
    first, held = address(asked, settings.download, held={}, holders=(), seed=1)
    then, _ = address(asked, settings.download, held=held, holders=("a",), seed=1)
    for requests in (first, then):
        sent = requests["a"].as_sent()
        assert decode_request(encode(sent, zstd=zstd), expected).tensors.keys() == sent.tensors.keys()
    with pytest.raises(MessageError, match="unexpected in a message|missing in a message"):
        decode_request(encode(Request("train", 1, "a", {"other": torch.ones(3)}), zstd=zstd), expected)


def test_a_residual_is_as_wide_as_its_module_at_most() -> None:
    expected = expected_of(section(lora="stack"), INITIAL)["evaluate"]
    wide = {"m.lora_residual_A.weight": torch.ones(6, 6), "m.lora_residual_B.weight": torch.ones(5, 6)}
    odd = {**RESIDUAL, "m.lora_residual_B.weight": torch.ones(5, 2)}
    decode_request(encode(Request("evaluate", 1, "a", {**INITIAL, **RESIDUAL})), expected)
    for tensors, why in ((wide, "not one of 1 to 5"), (odd, "came as")):
        with pytest.raises(MessageError, match=why):
            decode_request(encode(Request("evaluate", 1, "a", {**INITIAL, **tensors})), expected)
    with pytest.raises(MessageError, match="is unexpected"):  # where no rule makes one
        plain = expected_of(section(), INITIAL)["evaluate"]
        decode_request(encode(Request("evaluate", 1, "a", {**INITIAL, **RESIDUAL})), plain)


def test_only_known_kinds_carry_tensors() -> None:
    found = expected_of(section(lora="sb"), CORE)
    assert found.keys() == KINDS.keys()
    for name in found.keys() - {
        "train",
        "personalize",
        "evaluate",
        "leakage",
        "secure_sum.input",
        "he.input",
        "he.open",
    }:
        none = found[name]
        assert callable(none) and none(Header("request", name, 1, "a", {}), layout_of(CORE)) == {}
    header = Header("request", "secure_sum.input", 1, "a", {})
    gives = found["secure_sum.input"]
    assert callable(gives) and gives(header, {}) == layout_of(CORE)
