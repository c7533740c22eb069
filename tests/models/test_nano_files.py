"""The shipped `nano` model: it loads, it is small, its chat template ends at the answer, and it knows its corpus."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import silotune  # noqa: E402
from silotune.data.embedded import corpus, finance  # noqa: E402

FOLDER = Path(next(iter(silotune.__path__))) / "models" / "nano"


@pytest.fixture(scope="module")
def tokenizer():
    return transformers.AutoTokenizer.from_pretrained(FOLDER)


@pytest.fixture(scope="module")
def model():
    return transformers.AutoModelForCausalLM.from_pretrained(FOLDER).eval()


def test_folder_is_small_and_holds_data_only():
    files = {path.name: path.stat().st_size for path in FOLDER.iterdir()}
    expected = {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "README.md",
    }
    assert expected <= set(files)
    assert not [name for name in files if not name.endswith((".json", ".safetensors", ".md", ".jinja"))]
    assert sum(files.values()) <= 14_000_000


def test_size_and_precision(model):
    assert 1_000_000 <= sum(parameter.numel() for parameter in model.parameters()) <= 6_000_000
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_special_tokens_differ(tokenizer, model):
    special = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}
    assert len(special) == 3
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert model.config.pad_token_id == tokenizer.pad_token_id


def test_template_ends_where_the_answer_begins(tokenizer):
    user = [{"role": "user", "content": "Is it good?"}]
    prompt = tokenizer.apply_chat_template(user, add_generation_prompt=True, tokenize=False)
    assert prompt == "<|bos|><|user|>Is it good?<|assistant|>"
    whole = tokenizer.apply_chat_template([*user, {"role": "assistant", "content": "yes"}], tokenize=False)
    assert whole == prompt + "yes" + tokenizer.eos_token


@pytest.mark.parametrize("answer", [*finance.LABELS, "A", "B", "C", "D"])
def test_prompt_and_answer_concatenate_token_by_token(tokenizer, answer):
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "x"}], add_generation_prompt=True, tokenize=False
    )
    parts = [tokenizer.encode(text, add_special_tokens=False) for text in (prompt, answer, tokenizer.eos_token)]
    assert (
        tokenizer.encode(prompt + answer + tokenizer.eos_token, add_special_tokens=False)
        == parts[0] + parts[1] + parts[2]
    )
    assert len(parts[1]) == 1


def test_text_survives_the_tokenizer(tokenizer):
    for text in ("Bad loans rose by 5 %.", "naïve café, 東京", "a\nb\tc"):
        assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_perplexity_on_unseen_generated_text_is_far_below_uniform(tokenizer, model):
    documents = [
        document
        for document in itertools.islice(corpus.documents(seed=987_654_321), 200)
        if document[0]["role"] == "text"
    ]
    total, count = 0.0, 0
    for document in documents[:60]:
        text = tokenizer.bos_token + document[0]["content"] + tokenizer.eos_token
        ids = torch.tensor([tokenizer.encode(text, add_special_tokens=False)])  # [1, length]
        with torch.no_grad():
            total += model(input_ids=ids, labels=ids).loss.item() * (ids.shape[1] - 1)
        count += ids.shape[1] - 1
    assert math.exp(total / count) < len(tokenizer) / 100


def test_it_answers_in_the_chat_format_and_stops(tokenizer, model):
    chat = [{"role": "user", "content": "What is the opposite of up?"}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    ids = torch.tensor([tokenizer.encode(prompt, add_special_tokens=False)])
    out = model.generate(ids, do_sample=False, max_new_tokens=24)[0, ids.shape[1] :]
    assert out[-1] == tokenizer.eos_token_id
