"""Which shortcuts a loaded model may take: those that give a few short texts the plain way's losses and gradients.

Architectures differ in what their layers return, in how they read masks and positions, and in what they do with a
cache. None of that is guessed: before a model trains, a few dozen ids go through it in the plain way and by the
shortcuts. What raises an error or gives other numbers is switched off, and the run says so.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch

from silotune.errors import ModelError
from silotune.models import adapters
from silotune.models.adapters import Adapted
from silotune.models.fast import attention
from silotune.models.fast.last_layer import last_layer
from silotune.models.fast.narrow_lora import rows_for_one
from silotune.models.fast.paths import PLAIN, Fast, longest_alike
from silotune.settings.sections import ModelSection
from silotune.structs import Tensors
from silotune.training.encode import Encoded
from silotune.training.scores import answer_losses, class_logits, option_scores, sees_branches

TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 0.1}
"""Relative difference of losses and of the whole gradient that is put down to rounding, by what is computed in."""
SHARED, OWN = 10, (8, 10)
"""Ids that two prompts begin with, and ids that each has of its own."""
ANSWERS = 3
"""Ids of the longest answer and of the longest option."""
LENGTH = SHARED + max(OWN) + ANSWERS
"""Ids of the longest text of the probe."""
STIR = 0.02
"""Size of the noise on the adapter: at the start B is 0, so that no gradient reaches A."""
TEXT = "The results of this quarter were better than those of the last one, and the outlook for the year is unchanged."
WORDS: Mapping[str, str] = {
    "attention": "the attention for short texts",
    "narrow_lora": "LoRA on narrow layers as one product",
    "head": "the output head at needed positions only",
    "branches": "options as branches of one prompt",
    "prefix": "the common beginning of prompts computed once",
    "last_layer": "the last layer at needed positions only",
}
"""What a note calls the shortcuts."""


def probed(adapted: Adapted, section: ModelSection) -> Adapted:
    """The same model in memory, on all shortcuts that hold for it; its weights and the random generators are as before.

    Args:
        adapted: The model with its adapter.
        section: The ``[model]`` section, whose ``fast`` says whether shortcuts are wanted at all.

    Raises:
        ModelError: The model cannot do a training step with this adapter, whatever the shortcuts.
    """
    plain = adapters.on(adapted, PLAIN)
    possible = PLAIN if section.fast == "off" else possible_for(plain, section)
    kept, faults = _sorted_out(plain, possible)
    if section.fast == "off":
        return plain
    return adapters.on(adapted, replace(kept, note=_note(plain, section, faults)))


def possible_for(adapted: Adapted, section: ModelSection) -> Fast:
    """The shortcuts that the kind of model leaves to be tried."""
    base = adapted.base
    on_cpu, writes = base.device.type == "cpu", not base.labels
    follows = writes and sees_branches(base.model, LENGTH)
    keeps_cache = follows and not adapted.is_checkpointed
    return Fast(
        attention=on_cpu and section.attention == "auto" and attention.can_use(base.model),
        narrow_lora=on_cpu and bool(adapted.config),
        head=writes and base.model.get_output_embeddings() is not None,
        branches=follows,
        prefix=keeps_cache,
        last_layer=keeps_cache and last_layer(base.model) is not None,
    )


@dataclass(frozen=True)
class _Numbers:
    """Losses of the probe's batches [batches] and the gradient of their sum."""

    losses: torch.Tensor
    gradient: Tensors


def _sorted_out(adapted: Adapted, possible: Fast) -> tuple[Fast, dict[str, str]]:
    """The shortcuts that hold, alone and together, and for each of the others what speaks against it.

    All are tried at once first: if the numbers are right, each has done its part in them.

    Raises:
        ModelError: The plain way fails, too.
    """
    batches = _batches(adapted, possible)
    with _stirred(adapted):
        try:
            expected = _numbers(adapted, batches)
        except Exception as error:  # noqa: BLE001 - whatever it is, training would end with it
            raise ModelError(
                f"{adapted.base.name!r} ({adapted.base.model.config.model_type}) cannot do a training step with this "
                f"adapter: {_one_line(error)}; aim adapter.targets at other layers, or take another adapter or model"
            ) from error
        if not _fault(adapted, possible, batches, expected):
            return possible, {}
        alone = {name: _fault(adapted, possible.only(name), batches, expected) for name in possible.names()}
        faults = {name: fault for name, fault in alone.items() if fault}
        kept = possible.only(*(name for name in alone if name not in faults))
        together = _fault(adapted, kept, batches, expected)
        if together:
            return PLAIN, {**dict.fromkeys(kept.names(), f"beside the others {together}"), **faults}
    return kept, faults


def _fault(adapted: Adapted, fast: Fast, batches: _Batches, expected: _Numbers) -> str:
    """What speaks against some shortcuts, in words that follow the name of one; empty where nothing does."""
    try:
        made = _numbers(adapters.on(adapted, fast), batches)
    except Exception as error:  # noqa: BLE001 - whatever a shortcut raises, the plain way is still there
        return f"raised {_one_line(error)}"
    finally:
        adapters.on(adapted, PLAIN)
    allowed = tolerance(adapted)
    for what, off in (("loss", _loss_off(made, expected)), ("gradient", _gradient_off(made, expected))):
        if not off <= allowed:  # also where it is not a number
            return f"gave a {what} that is {off:.2g} of its size off ({allowed:g} is rounding)"
    return ""


def tolerance(adapted: Adapted) -> float:
    """The relative difference that is put down to rounding in what the model computes in."""
    return TOLERANCES[torch.bfloat16 if adapted.base.autocast else adapted.base.model.dtype]


def _loss_off(made: _Numbers, expected: _Numbers) -> float:
    """The largest relative difference of a loss."""
    return float(((made.losses - expected.losses).abs() / expected.losses.abs()).max())


def _gradient_off(made: _Numbers, expected: _Numbers) -> float:
    """Norm of the gradients' difference over the norm of the plain way's."""
    apart = sum(float((made.gradient[name] - own).double().square().sum()) for name, own in expected.gradient.items())
    size = sum(float(own.double().square().sum()) for own in expected.gradient.values())
    return float((apart / size) ** 0.5) if size else float(apart > 0)


@dataclass(frozen=True)
class _Batches:
    """Examples that begin alike, and examples that do not."""

    alike: Sequence[Encoded]
    apart: Sequence[Encoded]


def _batches(adapted: Adapted, possible: Fast) -> _Batches:
    """Two examples of different lengths each; of the second kind as many as LoRA on a narrow layer needs to be one
    product somewhere."""
    rows = 0
    if possible.narrow_lora:
        rows = rows_for_one(adapters.on(adapted, possible.only("narrow_lora")).model)
        adapters.on(adapted, PLAIN)
    base = adapted.base
    known = base.tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    text = [number for number in known if number != base.pad_id] or [0]  # 0 where the tokenizer knows no word of it
    room = min(LENGTH, base.context_length or LENGTH)
    shared = SHARED * room // LENGTH

    def example(number: int, beginning: int) -> Encoded:
        """Makes an example of ids of the text; examples with the same ``beginning`` begin alike."""
        own = OWN[number % 2] * room // LENGTH
        ids = [text[(beginning + place) % len(text)] for place in range(shared)]
        ids += [text[(3 * number + shared + place) % len(text)] for place in range(own)]
        answer = tuple(text[(number + 5 + place) % len(text)] for place in range(ANSWERS - number % 2))
        other = tuple(text[(number + 7 + place) % len(text)] for place in range(1 + number % 2))
        if base.labels:
            return Encoded(tuple(ids), (), label=number % len(base.labels))
        return Encoded(tuple(ids), answer, (answer, other), number % 2)

    count = max(2, -(-rows // max(1, room - ANSWERS - 2)))
    return _Batches([example(number, 0) for number in range(2)], [example(number, number) for number in range(count)])


def _losses(adapted: Adapted, batches: _Batches) -> Iterator[torch.Tensor]:
    """The losses of the batches, one after the other, so that only one graph is held at a time."""
    labels = torch.tensor([example.label for example in batches.apart], device=adapted.base.device)
    if adapted.base.labels:
        yield torch.nn.functional.cross_entropy(class_logits(adapted, batches.apart), labels)
        return
    yield answer_losses(adapted, batches.alike)[0].mean()
    yield answer_losses(adapted, batches.apart)[0].mean()
    yield torch.nn.functional.cross_entropy(option_scores(adapted, batches.apart), labels)


def _numbers(adapted: Adapted, batches: _Batches) -> _Numbers:
    """Losses and gradient of the model with its adapter as it is now, in evaluation mode."""
    losses = []
    try:
        for loss in _losses(adapted, batches):
            loss.backward()
            losses.append(loss.detach().float())
        gradient = {
            name: parameter.grad.detach().clone()
            for name, parameter in adapted.parameters.items()
            if parameter.grad is not None
        }
    finally:
        for parameter in adapted.parameters.values():
            parameter.grad = None
    return _Numbers(torch.stack(losses), gradient)


@contextmanager
def _stirred(adapted: Adapted) -> Iterator[None]:
    """Inside the block, the adapter is as after some training; afterwards it and the random generators are as before,
    to the bit.

    A model without an adapter has no zero weights to move, so its weights stay as they are.
    """
    held = (
        {name: parameter.detach().clone() for name, parameter in adapted.parameters.items()} if adapted.config else {}
    )
    noise = torch.Generator().manual_seed(0)
    device = adapted.base.device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        try:
            with torch.no_grad():
                for name, tensor in held.items():
                    drawn = STIR * torch.randn(tensor.shape, generator=noise)
                    adapted.parameters[name].add_(drawn.to(device=tensor.device, dtype=tensor.dtype))
            yield
        finally:
            with torch.no_grad():
                for name, tensor in held.items():
                    adapted.parameters[name].copy_(tensor)


def _one_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:120]}" if lines else type(error).__name__


def _note(adapted: Adapted, section: ModelSection, faults: Mapping[str, str]) -> str:
    """What is computed in the plain way although the model's kind seemed to allow a shortcut, and why; else empty."""
    said = [f"{WORDS[name]} ({fault})" for name, fault in faults.items()]
    most = longest_alike(adapted.base.model.config.get_text_config())
    if most is not None and most < section.max_length and not adapted.base.labels:
        behind = "all that needs masks or a cache" if most < LENGTH else f"the same for texts of more than {most} ids"
        said.append(f"{behind} (its layers see windows of {most} ids, or scale positions beyond)")
    if not said:
        return ""
    return f"model.fast: {adapted.base.model.config.model_type} is computed in the plain way instead of " + "; ".join(
        said
    )
