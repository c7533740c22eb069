"""What the compute server of split training can read off what crosses the cut, tested on the run's own model and text.

Text: a linear map from states to the embedding table, fitted on public text and on ids drawn at random that were
pushed through the first blocks (a base model's are known to whoever has it), then the nearest row of the table; and the
same without any map. Labels:
a linear map from the gradients that come to the server at the last cut. Both are weak attackers (Chen et al. 2024,
BiSR, arXiv 2409.00960, refine such guesses): what they read is a lower bound.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch

from silotune.evaluation.forgetting import EMBEDDED, general_text, windows
from silotune.methods.compress.tokens import as_received
from silotune.models.adapters import Adapted
from silotune.models.elsewhere import Form, Turn
from silotune.models.split import Reached, blocks_of, client_part, server_part
from silotune.settings.sections import TrainingSection
from silotune.settings.split import SplitSection
from silotune.training.encode import Encoded
from silotune.training.middle import Middle
from silotune.training.objectives import objective_of

NOISES = (0.0, 0.5, 1.0, 2.0)
"""Noise on what crosses, in standard deviations of the states."""
PUBLIC_TOKENS, PRIVATE_TOKENS, LINE = 4096, 1024, 128
"""Tokens of public text that the map is fitted on (and as many random ones), tokens that are attacked, and most of a
line."""
CUTS = (1, 2, 4, 8)
"""Cuts that are tested beside the run's own, as far as the model has the blocks."""
LABELLED = 64
"""Examples whose labels the attacker knows, and as many whose labels it guesses."""
RIDGE = 1e-3
"""Of the fit, as a share of the mean square of a state's values."""
AT_ONCE = 512
"""Tokens that are compared with the embedding table at one time."""
Changes: TypeAlias = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Inverted:
    """What the tests found.

    Attributes:
        cuts: By cut, at the run's own also by noise: shares of tokens that the map (``probe``) and the plain cosine
            (``cosine``) read.
        most_common: Share of the most common token, which a guess without looking reads.
        tokens: Tokens that were attacked.
        prices: By noise: the cosine of the gradient under it to the exact one.
        labels: Share of labels read off gradients, of the most common label, and the number of examples; empty for
            open answers.
    """

    cuts: tuple[dict[str, float], ...]
    most_common: float
    tokens: int
    prices: tuple[dict[str, float], ...]
    labels: Mapping[str, float]

    def as_json(self, split: SplitSection) -> dict[str, Any]:
        """For the run folder."""
        return {
            "first": split.first,
            "last": split.last,
            "compress": split.compress,
            "tokens": self.tokens,
            "most_common": self.most_common,
            "cuts": list(self.cuts),
            "gradients": list(self.prices),
            "labels": dict(self.labels),
        }


def tested(adapted: Adapted, split: SplitSection, examples: Sequence[Encoded], training: TrainingSection) -> Inverted:
    """Tests what a compute server would read of these examples.

    Args:
        adapted: The whole model, with the adapter that training begins with.
        split: Where it is cut, and how what crosses is sent.
        examples: Of the clients.
        training: The ``[training]`` section, for the gradients.
    """
    blocks = len(blocks_of(adapted.base.model, adapted.base.name))
    cuts = sorted({split.first, *(cut for cut in CUTS if cut < blocks - split.last)})
    lines = _lines(examples)
    table = _table(adapted)
    public = _public(adapted, rows=len(table))
    own, known = _states(adapted, lines, cuts), _states(adapted, public, cuts)
    ids, known_ids = (torch.tensor(list(itertools.chain(*each))) for each in (lines, public))
    counts = torch.bincount(ids)
    found = []
    for cut in cuts:
        for noise in NOISES if cut == split.first else NOISES[:1]:
            change = _changes(split, noise, float(known[cut].std()))
            seen, learnt = change(own[cut]), change(known[cut])
            middle = learnt.mean(0)
            probe = _read((seen - middle) @ _fitted(learnt - middle, table[known_ids]), table)
            figures = {"probe": _share(probe, ids), "cosine": _share(_read(seen, table), ids)}
            found.append({"first": cut, "noise": noise, **figures})
    common = int(counts.max()) / len(ids)
    parts = _Parts.of(adapted, split)
    prices = _prices(parts, split, examples[: training.batch_size], training, float(own[split.first].std()))
    return Inverted(tuple(found), common, len(ids), prices, _labels(parts, split, examples, training))


def lines_of(test: Mapping[str, Any]) -> list[str]:
    """What a run's privacy statement says of the test, in whole sentences."""
    own = next(row for row in test["cuts"] if row["first"] == test["first"] and row["noise"] == 0)
    read = max(own["probe"], own["cosine"])
    said = [
        "split training moves compute, not trust: whoever runs the compute server sees every token's states at both "
        f"cuts, and a linear probe trained on public text read {read:.1%} of {test['tokens']} tokens of the "
        f"institutions' examples off them (federation.split.first = {test['first']}, compress = "
        f"{test['compress']!r}; always guessing the most common token: {test['most_common']:.1%})"
    ]
    if test["labels"]:
        labels = test["labels"]
        said.append(
            f"labels do not leave, but gradients do: a linear probe read {labels['probe']:.1%} of the labels of "
            f"{labels['examples']:.0f} examples off them (the most common label: {labels['most_common']:.1%})"
        )
    return said


def _ids(example: Encoded) -> tuple[int, ...]:
    return (*example.prompt, *example.answer)


def _public(adapted: Adapted, *, rows: int) -> list[tuple[int, ...]]:
    """Lines of public text, and as many of random ids, so that the map has met most of the vocabulary."""
    length = min(LINE, adapted.base.context_length or LINE)
    text = windows(adapted, general_text(EMBEDDED), max_tokens=PUBLIC_TOKENS, max_length=length)
    drawn = torch.Generator().manual_seed(0)
    random = torch.randint(rows, (PUBLIC_TOKENS // length, length), generator=drawn)
    return [*map(_ids, text), *map(tuple, random.tolist())]


def _lines(examples: Sequence[Encoded]) -> list[tuple[int, ...]]:
    """The beginnings of as many examples as the attacked tokens take."""
    lines: list[tuple[int, ...]] = []
    for example in examples:
        lines.append(_ids(example)[:LINE])
        if sum(map(len, lines)) >= PRIVATE_TOKENS:
            break
    return lines


@contextmanager
def _watched(blocks: torch.nn.ModuleList, cuts: Sequence[int]) -> Iterator[dict[int, list[torch.Tensor]]]:
    """Keeps what the blocks before each cut give."""
    kept: dict[int, list[torch.Tensor]] = {cut: [] for cut in cuts}

    def keeping(cut: int) -> Callable[..., None]:
        def keep(module: torch.nn.Module, given: Any, made: torch.Tensor) -> None:
            kept[cut].append(made[0].detach().float().cpu())
            if cut == max(cuts):
                raise Reached(made)  # nobody looks at what is behind

        return keep

    hooks = [blocks[cut - 1].register_forward_hook(keeping(cut)) for cut in cuts]
    try:
        yield kept
    finally:
        for hook in hooks:
            hook.remove()


def _states(adapted: Adapted, lines: Sequence[Sequence[int]], cuts: Sequence[int]) -> dict[int, torch.Tensor]:
    """States of all tokens at each cut [tokens, width], one line after the other."""
    base = adapted.base
    with torch.no_grad(), _watched(blocks_of(base.model, base.name), cuts) as kept:
        for line in lines:
            with suppress(Reached):
                base.model.get_decoder()(input_ids=torch.tensor([line], device=base.device), use_cache=False)
    return {cut: torch.cat(states) for cut, states in kept.items()}


def _table(adapted: Adapted) -> torch.Tensor:
    """The embedding's rows at length 1 [vocabulary, width]."""
    weight: Any = adapted.base.model.get_input_embeddings().weight
    return torch.nn.functional.normalize(weight.detach().float().cpu(), dim=1)


def _fitted(states: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """The map [width, wanted's width] from states to what is wanted, by ridge regression."""
    width = states.shape[1]
    square = states.T @ states
    ridge = RIDGE * float(square.diagonal().mean())
    return torch.linalg.solve(square + ridge * torch.eye(width), states.T @ wanted)


def _read(guesses: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """The row of the table that is nearest to each guess by cosine [tokens]."""
    return torch.cat([(part @ table.T).argmax(dim=1) for part in guesses.split(AT_ONCE)])


def _share(read: torch.Tensor, true: torch.Tensor) -> float:
    return float((read == true).float().mean())


def _changes(split: SplitSection, noise: float, deviation: float) -> Changes:
    """What compression and noise make of states; the noise is drawn anew for each call, by a seed that stays."""
    drawn = torch.Generator().manual_seed(0)

    def change(states: torch.Tensor) -> torch.Tensor:
        noised = states + noise * deviation * torch.randn(states.shape, generator=drawn) if noise else states
        return as_received(noised, split.compress)

    return change


class _Tap:
    """A link that keeps the gradients it carries, and changes what crosses."""

    def __init__(self, middle: Middle) -> None:
        self._middle = middle
        self.change: Changes = _unchanged
        self.gradients: list[torch.Tensor] = []

    def __deepcopy__(self, memo: dict[int, Any]) -> _Tap:
        """The same."""
        return self

    def forward(self, turn: Turn, states: torch.Tensor, form: Form) -> torch.Tensor:
        return self.change(self._middle.forward(self.change(states), form))

    def backward(self, turn: Turn, gradient: torch.Tensor, *, is_wanted: bool) -> torch.Tensor | None:
        self.gradients.append(gradient.detach().float().cpu())
        return self._middle.backward(gradient, is_wanted=is_wanted)

    def step(self, turn: Turn, count: int, before: torch.Tensor, behind: torch.Tensor) -> torch.Tensor | None:
        raise NotImplementedError  # no step is taken in a test


def _unchanged(states: torch.Tensor) -> torch.Tensor:
    return states


@dataclass(frozen=True)
class _Parts:
    """Both parts of a model, and the link between them."""

    client: Adapted
    middle: Middle
    tap: _Tap

    @classmethod
    def of(cls, adapted: Adapted, split: SplitSection) -> _Parts:
        middle = Middle(server_part(adapted, split))
        tap = _Tap(middle)
        return cls(client_part(adapted, split, tap), middle, tap)

    def gradient(self, batch: Sequence[Encoded], training: TrainingSection, change: Changes) -> torch.Tensor:
        """The gradient of a batch's loss [values] where what crosses is changed."""
        self.tap.change, self.tap.gradients = change, []
        parameters = [*self.middle.parameters, *self.client.parameters.values()]
        objective_of(training).loss(self.client, batch, training.objective).total.backward()
        made = torch.cat([each.grad.flatten().float().cpu() for each in parameters if each.grad is not None])
        for each in parameters:
            each.grad = None
        return made


def _prices(
    parts: _Parts, split: SplitSection, batch: Sequence[Encoded], training: TrainingSection, deviation: float
) -> tuple[dict[str, float], ...]:
    """What noise on the states does to the gradient of a batch: its cosine to the exact one."""
    exact = parts.gradient(batch, training, _unchanged)
    found = []
    for noise in NOISES:
        made = parts.gradient(batch, training, _changes(split, noise, deviation))
        found.append({"noise": noise, "cosine": float(torch.nn.functional.cosine_similarity(exact, made, dim=0))})
    return tuple(found)


def _labels(
    parts: _Parts, split: SplitSection, examples: Sequence[Encoded], training: TrainingSection
) -> dict[str, float]:
    """How many labels of examples can be read off the gradients at the last cut by one who knows those of others."""
    wanted = min(2 * LABELLED, len(examples)) // 2 * 2
    picked = [examples[place * len(examples) // wanted] for place in range(wanted)]
    labels = torch.tensor([example.label for example in picked])
    if wanted < 4 or int(labels.min()) < 0 or len(set(labels.tolist())) < 2:  # open answers have none
        return {}
    features = []
    for example in picked:
        parts.gradient([example], training, lambda states: as_received(states, split.compress))
        features.append(torch.nn.functional.normalize(torch.cat(parts.tap.gradients).sum(0), dim=0))
    known, guessed = torch.stack(features[0::2]), torch.stack(features[1::2])
    one_hot = torch.nn.functional.one_hot(labels).float()
    read = (guessed @ _fitted(known, one_hot[0::2])).argmax(dim=1)
    true = labels[1::2]
    common = float(torch.bincount(true).max()) / len(true)
    return {"probe": _share(read, true), "most_common": common, "examples": float(len(true))}
