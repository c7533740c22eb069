"""Spreads training examples over clients (IID, Dirichlet, by field, by quantity) and reports how skewed that is.

Dirichlet partitions are those of Yurochkin et al., "Bayesian Nonparametric Federated Learning of Neural Networks",
2019: the examples with one value are divided over the clients in proportions that are drawn from a symmetric Dirichlet
distribution. Quantity skew draws the clients' sizes from such a distribution, as in Li et al., "Federated Learning on
Non-IID Data Silos: An Experimental Study", 2022.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from silotune.data.rows import UNKNOWN
from silotune.errors import DataError
from silotune.seeds import derive
from silotune.settings.sections import PartitionSection
from silotune.structs import Example

if TYPE_CHECKING:
    from numpy.random import Generator

Clients = dict[str, tuple[int, ...]]
OTHER: Final = "other"
"""Name of the client that holds the rare values of a natural partition."""
OPEN: Final = "open"
"""Stands for the label of an open answer in a skew report."""
_MOST_DRAWS: Final = 11
"""Number of Dirichlet draws that are tried before clients with too few examples are filled up."""


def partition(examples: Sequence[Example], section: PartitionSection, *, seed: int) -> Clients:
    """Client -> sorted indices into ``examples``; every example lands in exactly one client.

    A client with fewer than ``min_examples`` is filled up from the largest ones (``field``: rare values are merged).
    ``file`` is not handled here: the loader knows which client's file an example came from (``Dataset.clients``).

    Raises:
        DataError: There are too few examples for so many clients, or the examples do not have the field.
    """
    shares = _SCHEMES[section.scheme](examples, section, seed)
    spread = sorted(index for share in shares.values() for index in share)
    if spread != list(range(len(examples))):
        raise DataError(
            f"scheme {section.scheme!r} did not put every example into exactly one client; please report this"
        )
    return {name: tuple(sorted(share)) for name, share in shares.items()}


def _iid(examples: Sequence[Example], section: PartitionSection, seed: int) -> dict[str, list[int]]:
    import numpy as np

    _refuse_too_few(len(examples), section)
    shares = np.array_split(_shuffled(len(examples), seed), section.clients)
    return _named([share.tolist() for share in shares], section.min_examples)


def _dirichlet(examples: Sequence[Example], section: PartitionSection, seed: int) -> dict[str, list[int]]:
    import numpy as np

    _refuse_too_few(len(examples), section)
    groups = _grouped(_values(examples, section.field), _shuffled(len(examples), seed))
    by_value = [groups[value] for value in sorted(groups)]
    start = derive(seed, "partition-dirichlet")
    generator = np.random.default_rng(start)
    for _ in range(_MOST_DRAWS):
        shares = _drawn(by_value, section, generator)
        if min(map(len, shares)) >= section.min_examples:
            break
    else:  # no draw gives every client enough: take the first one and fill up
        generator = np.random.default_rng(start)
        shares = _drawn(by_value, section, generator)
    for share in shares:
        generator.shuffle(share)  # filling up takes from the end, which would otherwise hold one value only
    return _named(shares, section.min_examples)


def _drawn(by_value: Sequence[list[int]], section: PartitionSection, generator: Generator) -> list[list[int]]:
    """Each client's share of the examples with each value, in proportions p ~ Dirichlet(alpha, ..., alpha)."""
    import numpy as np

    shares: list[list[int]] = [[] for _ in range(section.clients)]
    for held in by_value:
        proportions = generator.dirichlet([section.alpha] * section.clients)  # [clients]
        bounds = (np.cumsum(proportions) * len(held)).astype(int)[:-1]
        for share, part in zip(shares, np.split(np.array(held), bounds), strict=True):
            share.extend(part.tolist())
    return shares


def _quantity(examples: Sequence[Example], section: PartitionSection, seed: int) -> dict[str, list[int]]:
    import numpy as np

    _refuse_too_few(len(examples), section)
    generator = np.random.default_rng(derive(seed, "partition-quantity"))
    proportions = generator.dirichlet([section.alpha] * section.clients)  # [clients]
    bounds = np.floor(np.cumsum(proportions)[:-1] * len(examples)).astype(int)
    shares = np.split(np.array(_shuffled(len(examples), seed)), bounds)
    return _named([share.tolist() for share in shares], section.min_examples)


def _by_field(examples: Sequence[Example], section: PartitionSection, seed: int) -> dict[str, list[int]]:
    values = _values(examples, section.field)
    if len(set(values)) < 2:
        raise DataError(
            f"data.partition.field = {section.field!r}: all {len(values)} training examples have the same value"
        )
    groups = _grouped(values, range(len(values)))
    return _named_by_value(_merge_rare({value: groups[value] for value in sorted(groups)}, section))


def _by_file(examples: Sequence[Example], section: PartitionSection, seed: int) -> dict[str, list[int]]:
    raise DataError("data.partition.scheme = 'file': the clients come with the data set (Dataset.clients)")


_SCHEMES: Final[Mapping[str, Callable[[Sequence[Example], PartitionSection, int], dict[str, list[int]]]]] = {
    "iid": _iid,
    "dirichlet": _dirichlet,
    "quantity": _quantity,
    "field": _by_field,
    "file": _by_file,
}


def _refuse_too_few(count: int, section: PartitionSection) -> None:
    clients, least = section.clients, section.min_examples
    if clients * least > count:
        most = count // least
        remedy = f"lower data.partition.clients to {most} or less" if most else "give more data"
        raise DataError(
            f"{clients} clients of at least {least} examples need {clients * least}, there are {count}: {remedy}"
        )


def _values(examples: Sequence[Example], field: str) -> list[str]:
    """Each example's value of a field, or of several joined by ``+`` (``sector+label``)."""
    known = dict.fromkeys(name for example in examples for name in example.fields)
    names = field.split("+")
    if not set(names) <= set(known):
        allowed = ", ".join(sorted(known)) or "none (use scheme 'iid' or 'quantity')"
        raise DataError(f"data.partition.field = {field!r}: the examples do not have it; they have: {allowed}")
    return [_value(example, field) for example in examples]


def _value(example: Example, field: str | None) -> str:
    return "+".join(example.fields.get(name, UNKNOWN) for name in field.split("+")) if field else ""


def _shuffled(count: int, seed: int) -> list[int]:
    import numpy as np

    order: list[int] = np.random.default_rng(derive(seed, "partition-order")).permutation(count).tolist()
    return order


def _grouped(values: Sequence[str], order: Iterable[int]) -> dict[str, list[int]]:
    """Value -> the indices of the examples that have it, in the given order."""
    groups: dict[str, list[int]] = {}
    for index in order:
        groups.setdefault(values[index], []).append(index)
    return groups


def _named(shares: list[list[int]], least: int) -> dict[str, list[int]]:
    """Numbered clients, after those with fewer than ``least`` examples were filled up from the largest."""
    for share in shares:
        while len(share) < least:
            share.append(max(shares, key=len).pop())
    width = len(str(len(shares) - 1))
    return {f"client-{number:0{width}}": share for number, share in enumerate(shares)}


def _merge_rare(groups: dict[str, list[int]], section: PartitionSection) -> dict[str, list[int]]:
    """Values with too few examples become ``other``, with the next smallest ones until it has enough itself."""
    least = section.min_examples
    by_size = sorted(groups, key=lambda value: (len(groups[value]), value))
    rare = [value for value in by_size if len(groups[value]) < least]
    if not rare:
        return groups
    rare += [value for value in by_size if value.lower() == OTHER and value not in rare]
    for value in by_size:
        if value not in rare and sum(len(groups[own]) for own in rare) < least:
            rare.append(value)
    kept = {value: share for value, share in groups.items() if value not in rare}
    if not kept:
        raise DataError(
            f"data.partition.field = {section.field!r}: fewer than two clients have data.partition.min_examples = "
            f"{least}; lower it or choose another field"
        )
    return {**kept, OTHER: [index for value in rare for index in groups[value]]}


def _named_by_value(groups: Mapping[str, list[int]]) -> dict[str, list[int]]:
    named: dict[str, list[int]] = {}
    for value, share in groups.items():
        slug = re.sub(r"[^a-z0-9]+", "-", value.lower())[:80].strip("-") or "client"
        name, twin = slug, 1
        while name in named:
            twin += 1
            name = f"{slug}-{twin}"
        named[name] = share
    return named


# --- test examples ---------------------------------------------------------------------------------------------------


def dealt_by(section: PartitionSection) -> str | None:
    """The field that test examples are dealt by: the one that the training examples were, the label for files."""
    return {"dirichlet": section.field, "field": section.field, "file": "label"}.get(section.scheme)


def counted_by(section: PartitionSection, examples: Sequence[Example]) -> str:
    """The field that clients are compared by: the label, or where answers are open what the examples were dealt by."""
    has_labels = any("label" in example.fields for example in examples)
    return "label" if has_labels else dealt_by(section) or "label"


def deal_alike(
    examples: Sequence[Example],
    train: Sequence[Example],
    clients: Mapping[str, Sequence[int]],
    *,
    field: str | None,
    seed: int,
) -> Clients:
    """Deals other examples, such as a test set, over clients that hold training examples like them.

    Of the examples with one value of the field, each client gets the share that it holds of the training examples with
    that value (rounded by largest remainder); without a field, or for a value that no client holds, its share of all
    training examples. So the test examples of a client have the mixture of its training examples.

    Args:
        examples: What is dealt; every one lands in exactly one client.
        train: The training examples.
        clients: Client -> indices into ``train``; none is empty.
        field: As in ``data.partition.field``; None for examples that were spread by chance.
        seed: Decides which of the examples with one value a client gets.

    Returns:
        Client -> sorted indices into ``examples``; empty where a client's share is less than one example.
    """
    sizes = {name: len(own) for name, own in clients.items()}
    held: dict[str, Counter[str]] = {}
    for name, own in clients.items():
        for index in own:
            held.setdefault(_value(train[index], field), Counter())[name] += 1
    groups = _grouped(
        [_value(example, field) for example in examples], _shuffled(len(examples), derive(seed, "deal-test"))
    )
    dealt: dict[str, list[int]] = {name: [] for name in clients}
    for value in sorted(groups):
        start = 0
        lots = {name: derive(seed, f"deal-test/{value}", client=name) for name in clients}
        for name, count in _apportioned(len(groups[value]), held.get(value, sizes), lots).items():
            dealt[name].extend(groups[value][start : start + count])
            start += count
    return {name: tuple(sorted(own)) for name, own in dealt.items()}


def _apportioned(count: int, weights: Mapping[str, int], lots: Mapping[str, int]) -> dict[str, int]:
    """``count`` in proportion to the weights, whole numbers by largest remainder (Hamilton); ties by lot."""
    total = sum(weights.values())
    made = {name: count * weight // total for name, weight in weights.items()}
    rest = sorted(weights, key=lambda name: (-(count * weights[name] % total), lots[name]))
    for name in rest[: count - sum(made.values())]:
        made[name] += 1
    return made


# --- report ----------------------------------------------------------------------------------------------------------


def skew(examples: Sequence[Example], clients: Mapping[str, Sequence[int]], *, field: str = "label") -> dict[str, Any]:
    """How unlike the clients are, ready for JSON.

    Args:
        examples: The training examples.
        clients: Client -> indices into ``examples``.
        field: What is counted; open answers without a label count as ``open``.

    Returns:
        ``field``, ``num_examples``, ``labels`` (of all clients together), ``clients`` (each with ``num_examples``,
        ``labels`` and ``distance``), ``mean_distance`` and ``max_distance``. A distance is the total variation
        1/2 Σ|p(label | client) - p(label)|, 0 for a client like the whole, near 1 for one unlike it.
    """
    missing = OPEN if field == "label" else UNKNOWN
    counts = {
        name: Counter(examples[index].fields.get(field, missing) for index in indices)
        for name, indices in clients.items()
    }
    pooled = sum(counts.values(), Counter())
    report = {
        name: {"num_examples": own.total(), "labels": dict(sorted(own.items())), "distance": _distance(own, pooled)}
        for name, own in counts.items()
    }
    distances = [float(str(entry["distance"])) for entry in report.values()] or [0.0]
    return {
        "field": field,
        "num_examples": pooled.total(),
        "labels": dict(sorted(pooled.items())),
        "clients": report,
        "mean_distance": sum(distances) / len(distances),
        "max_distance": max(distances),
    }


def _distance(own: Counter[str], pooled: Counter[str]) -> float:
    """Total variation distance; 0 for a client without examples."""
    if not own:
        return 0.0
    return sum(abs(own[label] / own.total() - count / pooled.total()) for label, count in pooled.items()) / 2


def find_faults(examples: Sequence[Example], clients: Mapping[str, Sequence[int]]) -> tuple[str, ...]:
    """Notes on silos that can train but that the user should know of, because they hold one class only.

    Raises:
        DataError: There is no silo, or one holds no examples.
    """
    if not clients:
        raise DataError("there are no clients: give data.partition.clients or data.partition.files")
    empty = [name for name, indices in clients.items() if not indices]
    if empty:
        raise DataError(f"client {empty[0]!r} holds no training examples; give it some or leave it out")
    closed = {example.label for example in examples} - {-1}
    single = [name for name, own in clients.items() if len({examples[index].label for index in own}) == 1]
    if len(closed) < 2 or not single:
        return ()
    names = ", ".join(single)
    return (f"{len(single)} of {len(clients)} clients hold one class only: {names}",)


def digest_of(splits: Mapping[str, Sequence[Example]], clients: Mapping[str, Sequence[int]]) -> str:
    """SHA-256 of all examples in their order and of who holds which: equal for two runs with the same data."""
    found = hashlib.sha256()
    for name, examples in sorted(splits.items()):
        found.update(repr((name, len(examples))).encode())
        for example in examples:
            found.update((repr(example) + example.calls).encode())
    found.update(repr([(name, list(indices)) for name, indices in sorted(clients.items())]).encode())
    return found.hexdigest()
