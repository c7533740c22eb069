from __future__ import annotations

import itertools
import math
from pathlib import Path

import pytest
import torch

import tiny
from silotune.errors import DataError
from silotune.evaluation.forgetting import as_text, general_text, perplexity, windows


def test_perplexity_equals_the_slow_obvious_one() -> None:
    model = tiny.adapted()
    text = [[("text", line)] for line in tiny.CORPUS]
    made = windows(model, text, max_tokens=60, max_length=16)
    ids = [number for window in made for number in (*window.prompt, *window.answer)]
    end = model.base.tokenizer.eos_token_id
    spoken = [number for line in tiny.CORPUS for number in (*model.base.tokenizer(line)["input_ids"], end)]
    assert ids == spoken[: len(ids)] and len(ids) == min(60, len(spoken))
    with torch.no_grad():
        losses = []
        for start in range(0, len(ids), 16):
            part = torch.tensor([ids[start : start + 16]])
            scores = torch.log_softmax(model.model(input_ids=part, use_cache=False).logits[0].float(), dim=-1)
            losses += [-float(scores[place, part[0, place + 1]]) for place in range(part.shape[1] - 1)]
    for batch_size in (1, 3):
        assert perplexity(model, made, batch_size=batch_size) == pytest.approx(
            math.exp(sum(losses) / len(losses)), rel=1e-4
        )


def test_the_embedded_text_is_everyday_talk_in_the_chat_template() -> None:
    first = list(itertools.islice(general_text("embedded"), 20))
    assert first == list(itertools.islice(general_text("embedded"), 20))
    assert {role for document in first for role, _ in document} <= {"system", "user", "assistant"}
    text = as_text(first[0], tiny.adapted())
    assert "<|user|>" in text and text.endswith("</s>")
    made = windows(tiny.adapted(), general_text("embedded"), max_tokens=200, max_length=64)
    assert sum(window.length for window in made) == 200


def test_text_from_files(tmp_path: Path) -> None:
    plain, rows = tmp_path / "a.txt", tmp_path / "b.jsonl"
    plain.write_text("one\nline\n\n\ntwo\n")
    rows.write_text('{"text": "one"}\n{"text": "two"}\n')
    assert list(general_text(str(plain))) == [(("text", "one\nline"),), (("text", "two"),)]
    assert list(general_text(str(rows))) == [(("text", "one"),), (("text", "two"),)]


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("none.txt", None, "no file"),
        ("empty.txt", b"\n\n", "is empty"),
        ("bytes.txt", b"\xff\xfe\xfa", "UTF-8"),
        ("rows.jsonl", b'{"body": "x"}\n', "row 1: has no key 'text'"),
        ("odd.pdf", b"x", "unknown kind of file"),
    ],
)
def test_text_that_cannot_be_used(tmp_path: Path, name: str, content: bytes | None, reason: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=reason):
        list(general_text(str(tmp_path / name)))


def test_too_little_text() -> None:
    model = tiny.adapted()
    model.base.tokenizer.eos_token = None
    with pytest.raises(DataError, match="fewer than two tokens"):
        windows(model, [[("text", "a")]], max_tokens=10, max_length=8)
