"""Generates text: greedily for scoring, and as a stream with sampling for people."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Thread
from typing import Any

import torch

from silotune.data.rows import is_unicode
from silotune.errors import DataError, ModelError
from silotune.models.adapters import Adapted
from silotune.training.batches import by_length
from silotune.training.encode import Encoded, prompt_ids
from silotune.training.tools import check_shown


@dataclass(frozen=True)
class Sampling:
    """How to pick the next token; ``temperature`` 0 is greedy.

    Attributes:
        max_new_tokens: Most tokens of an answer.
        temperature: Divides the logits.
        top_p: Nucleus probability (Holtzman et al. 2020).
        top_k: Candidates kept; 0 for all.
        repetition_penalty: 1.0 for none (Keskar et al. 2019).
        seed: Of the sampling.
    """

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    seed: int = 0


def stream_answer(adapted: Adapted, messages: Sequence[tuple[str, str]], sampling: Sampling) -> Iterator[str]:
    """Yields an answer's text as it is generated.

    Args:
        adapted: The model.
        messages: Turns as (role, content); the last is the user's.
        sampling: How to pick tokens.

    Raises:
        ModelError: The prompt fills the model's context, or the model is a classifier.
        DataError: The prompt is not valid Unicode, or the chat template refuses its turns.
    """
    from transformers import TextIteratorStreamer

    _check_writes(adapted)
    if not all(is_unicode(content) for _, content in messages):
        raise DataError("the prompt is not valid Unicode (UTF-8)")
    tokenizer, marks = adapted.base.tokenizer, adapted.base.marks
    plain = marks.turns_as_text(messages)
    check_shown(plain, tokenizer)
    ids = prompt_ids(plain, tokenizer)
    context = adapted.base.context_length
    if context is not None and len(ids) >= context:
        raise ModelError(f"the prompt has {len(ids)} tokens and the model's context is {context}; shorten the prompt")
    room = _room(adapted, len(ids), sampling.max_new_tokens)
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    failures: list[Exception] = []
    finished: list[bool] = []

    def work() -> None:
        try:
            with torch.random.fork_rng(devices=[]), _cache_on(adapted):
                torch.manual_seed(sampling.seed)
                line = torch.tensor([ids], device=adapted.base.device)
                adapted.model.generate(  # type: ignore[operator]
                    input_ids=line,
                    attention_mask=torch.ones_like(line),
                    streamer=streamer,
                    **_options(adapted, sampling, room),
                )
            finished.append(True)
        except (RuntimeError, ValueError, LookupError) as error:
            failures.append(error)
        finally:
            streamer.end()  # whatever happened: the reader waits for it

    thread = Thread(target=work, daemon=True)
    thread.start()
    yield from _until(streamer, marks.end.words)
    thread.join()
    if not finished:
        cause = failures[0] if failures else None
        reason = (str(cause).splitlines() or [type(cause).__name__])[0]
        raise ModelError(f"generation failed: {reason}") from cause


@torch.no_grad()
def greedy_answers(adapted: Adapted, examples: Sequence[Encoded], *, batch_size: int, max_new_tokens: int) -> list[str]:
    """The greedy answer of every example, as text, in the order of the examples.

    Raises:
        ModelError: The model is a classifier.
    """
    _check_writes(adapted)
    tokenizer = adapted.base.tokenizer
    answers = [""] * len(examples)
    sampling = Sampling(max_new_tokens=max_new_tokens)
    for places, batch in by_length(examples, batch_size):
        longest = max(len(example.prompt) for example in batch)
        pad = adapted.base.pad_id
        gaps = [longest - len(example.prompt) for example in batch]
        ids = [[*[pad] * gap, *example.prompt] for gap, example in zip(gaps, batch, strict=True)]
        mask = [[*[0] * gap, *[1] * (longest - gap)] for gap in gaps]
        device = adapted.base.device
        with _cache_on(adapted):
            made = adapted.model.generate(  # type: ignore[operator]
                input_ids=torch.tensor(ids, device=device),
                attention_mask=torch.tensor(mask, device=device),
                **_options(adapted, sampling, _room(adapted, longest, max_new_tokens)),
            )
        texts = tokenizer.batch_decode(made[:, longest:], skip_special_tokens=True)
        for place, text in zip(places, texts, strict=True):
            answers[place] = "".join(_until([text], adapted.base.marks.end.words)).strip()
    return answers


def _check_writes(adapted: Adapted) -> None:
    if adapted.base.labels:
        raise ModelError(f"{adapted.base.name!r} carries a classification head, which writes no text; use likelihood")


def _room(adapted: Adapted, prompt_length: int, wanted: int) -> int:
    """New tokens that the model's positions leave room for."""
    context = adapted.base.context_length
    return wanted if context is None else min(wanted, context - prompt_length)


def _options(adapted: Adapted, sampling: Sampling, room: int) -> dict[str, Any]:
    options: dict[str, Any] = {
        "max_new_tokens": room,
        "do_sample": sampling.temperature > 0,
        "repetition_penalty": sampling.repetition_penalty,
        "pad_token_id": adapted.base.pad_id,
        "eos_token_id": list(adapted.base.ends) or None,
        "use_cache": True,
    }
    if words := adapted.base.marks.end.words:
        options.update(stop_strings=[words], tokenizer=adapted.base.tokenizer)
    if sampling.temperature > 0:
        options.update(temperature=sampling.temperature, top_p=sampling.top_p, top_k=sampling.top_k)
    return options


def _until(parts: Iterable[str], words: str) -> Iterator[str]:
    """What parts of a text say before the first of these words, as soon as it is sure; all of it without words."""
    held, is_over = "", False
    for part in parts:
        before, found, after = (held + part).partition(words) if words else (held + part, "", "")
        sure = len(before) if found else max(0, len(before) - max(0, len(words) - 1))
        if not is_over:
            yield before[:sure]
        held, is_over = before[sure:], is_over or bool(found)
    if not is_over:
        yield held


@contextmanager
def _cache_on(adapted: Adapted) -> Iterator[None]:
    """Switches on the key-value cache for generation; training keeps it off."""
    config = adapted.base.model.config
    previous, config.use_cache = config.use_cache, True
    try:
        yield
    finally:
        config.use_cache = previous
