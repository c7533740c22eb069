"""Figures of quality from predictions and labels."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

UNPARSED = -1
"""Prediction of an answer that names none of the options; always wrong."""


def classification(
    predictions: Sequence[int], labels: Sequence[int], names: Sequence[str], *, bootstrap_samples: int, seed: int = 0
) -> dict[str, Any]:
    """Accuracy, macro-F1, per-class figures, confusion matrix, unparsed share, and bootstrap 95 % intervals.

    Macro-F1 is the mean over the classes that occur among labels or predictions, as scikit-learn's.

    Args:
        predictions: Index of the predicted option, or ``UNPARSED``.
        labels: Index of the right option.
        names: The options.
        bootstrap_samples: Resamples behind the percentile intervals; 0 for none.
        seed: Of the resampling.

    Returns:
        ``confusion`` has a row a true class and a column a predicted class, the last column being unparsed.
    """
    from sklearn.metrics import precision_recall_fscore_support

    predicted, true = np.asarray(predictions), np.asarray(labels)
    classes = np.arange(len(names))
    precision, recall, f1, support = precision_recall_fscore_support(
        true, predicted, labels=classes, average=None, zero_division=0.0
    )
    matrix = _confusion(predicted, true, len(names))
    result: dict[str, Any] = {
        "accuracy": float(np.mean(predicted == true)),
        "macro_f1": float(_macro_f1(matrix[None])[0]),
        "unparsed": float(np.mean(predicted == UNPARSED)),
        "per_class": {
            name: {
                "precision": float(precision[place]),
                "recall": float(recall[place]),
                "f1": float(f1[place]),
                "support": int(support[place]),
            }
            for place, name in enumerate(names)
        },
        "confusion": matrix.astype(int).tolist(),
    }
    if bootstrap_samples:
        result.update(_intervals(predicted, true, len(names), bootstrap_samples, seed))
    return result


def majority(metrics: Mapping[str, Any]) -> dict[str, Any] | None:
    """What always giving the most frequent answer would reach: ``answer``, ``accuracy``, ``macro_f1``.

    Args:
        metrics: As ``classification`` gives them; None comes back for others.
    """
    if not metrics.get("per_class") or not metrics.get("confusion"):
        return None
    support = {name: int(own["support"]) for name, own in metrics["per_class"].items()}
    answer = max(support, key=lambda name: support[name])
    accuracy = support[answer] / sum(support.values())
    classes = sum(count > 0 for count in support.values())
    return {"answer": answer, "accuracy": accuracy, "macro_f1": 2 * accuracy / (1 + accuracy) / classes}


def answers_one_class(metrics: Mapping[str, Any]) -> bool:
    """Whether a model gives one and the same answer to all examples of several classes."""
    matrix = np.asarray(metrics.get("confusion") or [[0]])
    return int((matrix.sum(axis=0) > 0).sum()) == 1 and int((matrix.sum(axis=1) > 0).sum()) > 1


CALIBRATION_BINS = 15


def calibration(confidences: Sequence[float], is_right: Sequence[bool]) -> dict[str, Any]:
    """Expected calibration error over 15 bins of equal width, and the bins themselves.

    The mean over the bins, weighted by their examples, of |accuracy - mean confidence| (Guo et al., "On Calibration of
    Modern Neural Networks", 2017, equation 3). A confidence on the border of two bins belongs to the lower one.

    Args:
        confidences: Probability of the predicted option, in [0, 1].
        is_right: Whether that option was the right one.

    Returns:
        ``ece``, and ``reliability``: the bins that hold examples, each with ``from``, ``to``, ``num_examples``,
        ``confidence`` (mean) and ``accuracy``.
    """
    confidence, right = np.asarray(confidences, dtype=float), np.asarray(is_right, dtype=float)
    places = np.clip(np.ceil(confidence * CALIBRATION_BINS).astype(int) - 1, 0, CALIBRATION_BINS - 1)
    bins = []
    for place in np.unique(places):
        held = places == place
        bins.append(
            {
                "from": float(place / CALIBRATION_BINS),
                "to": float((place + 1) / CALIBRATION_BINS),
                "num_examples": int(held.sum()),
                "confidence": float(confidence[held].mean()),
                "accuracy": float(right[held].mean()),
            }
        )
    gaps = sum(each["num_examples"] * abs(each["accuracy"] - each["confidence"]) for each in bins)
    return {"ece": gaps / len(confidence), "reliability": bins}


def language_modelling(
    losses: Sequence[float], tokens: Sequence[int], *, bootstrap_samples: int = 0, seed: int = 0
) -> dict[str, Any]:
    """Mean negative log-likelihood a token (nats) and its exponential, the perplexity.

    Args:
        losses: Of each example, the sum over its supervised tokens.
        tokens: Of each example, how many these are.
        bootstrap_samples: Resamples of examples behind the percentile intervals; 0 for none.
        seed: Of the resampling.
    """
    loss = sum(losses) / sum(tokens)
    result: dict[str, Any] = {"loss": loss, "perplexity": _perplexity(loss)}
    if bootstrap_samples:
        totals, counts = np.asarray(losses, dtype=float), np.asarray(tokens, dtype=float)
        drawn = np.random.default_rng(seed).integers(0, len(totals), size=(bootstrap_samples, len(totals)))
        bounds = np.percentile(totals[drawn].sum(axis=1) / counts[drawn].sum(axis=1), [2.5, 97.5])
        result["loss_interval"] = [float(bound) for bound in bounds]
        result["perplexity_interval"] = [_perplexity(float(bound)) for bound in bounds]
    return result


def _perplexity(loss: float) -> float:
    return math.exp(min(loss, 700.0))


def preference(
    margins: Sequence[float], start_margins: Sequence[float], *, bootstrap_samples: int, seed: int = 0
) -> dict[str, Any]:
    """How often a model prefers what people prefer, and what training changed in that.

    Args:
        margins: Of each pair, log p(preferred | prompt) - log p(rejected | prompt), sums over the answers' tokens.
        start_margins: The same of the model that training began with: the reference.
        bootstrap_samples: Resamples of pairs behind the percentile intervals; 0 for none.
        seed: Of the resampling.

    Returns:
        ``preference_accuracy`` is the share of pairs whose preferred answer is the likelier one (equal counts half),
        ``start_accuracy`` that of the reference, and ``gain`` their difference on the same pairs. ``win_rate`` is the
        share of pairs in which the preferred answer gained more against the reference than the rejected one (DPO's
        implicit reward is higher; equal counts half), and ``margin`` by how much on average, in nats: times
        ``training.objective.beta`` it is the mean reward margin.
    """
    now, start = np.asarray(margins, dtype=float), np.asarray(start_margins, dtype=float)
    each = {"preference_accuracy": _wins(now), "gain": _wins(now) - _wins(start), "win_rate": _wins(now - start)}
    result: dict[str, Any] = {
        **{name: float(values.mean()) for name, values in each.items()},
        "start_accuracy": float(_wins(start).mean()),
        "margin": float((now - start).mean()),
    }
    if bootstrap_samples:
        drawn = np.random.default_rng(seed).integers(0, len(now), size=(bootstrap_samples, len(now)))
        for name, values in each.items():
            bounds = np.percentile(values[drawn].mean(axis=1), [2.5, 97.5])
            result[f"{name}_interval"] = [float(value) for value in bounds]
    return result


def _wins(margins: NDArray[Any]) -> NDArray[Any]:
    """1 where a margin is positive, one half where it is 0, else 0."""
    return (np.sign(margins) + 1) / 2


def _confusion(predicted: NDArray[Any], true: NDArray[Any], num_classes: int) -> NDArray[Any]:
    """[true class, predicted class or unparsed]."""
    columns = np.where(predicted == UNPARSED, num_classes, predicted)
    cells = np.bincount(true * (num_classes + 1) + columns, minlength=num_classes * (num_classes + 1))
    return cells.reshape(num_classes, num_classes + 1)


def _macro_f1(matrices: NDArray[Any]) -> NDArray[Any]:
    """[samples] from confusion matrices [samples, true, predicted or unparsed]."""
    size = matrices.shape[1]
    right = matrices[:, np.arange(size), np.arange(size)].astype(float)
    seen = matrices.sum(axis=2) + matrices[:, :, :size].sum(axis=1)
    f1 = np.divide(2 * right, seen, out=np.zeros_like(right), where=seen > 0)
    return f1.sum(axis=1) / np.maximum((seen > 0).sum(axis=1), 1)


def _intervals(
    predicted: NDArray[Any], true: NDArray[Any], num_classes: int, samples: int, seed: int
) -> dict[str, list[float]]:
    """Percentile bootstrap over examples (Efron 1979): resampling examples is multinomial over the cells."""
    matrix = _confusion(predicted, true, num_classes)
    total = int(matrix.sum())
    cells = matrix.reshape(-1) / total
    drawn = np.random.default_rng(seed).multinomial(total, cells, size=samples).reshape(samples, *matrix.shape)
    diagonal = drawn[:, np.arange(num_classes), np.arange(num_classes)].sum(axis=1) / total
    return {
        "accuracy_interval": [float(value) for value in np.percentile(diagonal, [2.5, 97.5])],
        "macro_f1_interval": [float(value) for value in np.percentile(_macro_f1(drawn), [2.5, 97.5])],
    }


def lower_is_better(metric: str) -> bool:
    """Whether a lower value of the metric is better."""
    return metric == "perplexity"


def best_and_worst(metric: str) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """``min`` and ``max``, in the order that gives the best and the worst of several values of the metric."""
    return (min, max) if lower_is_better(metric) else (max, min)


def signed(metric: str, value: float) -> float:
    """The value turned so that the higher is the better; what is no number is worse than any."""
    if math.isnan(value):
        return -math.inf
    return -value if lower_is_better(metric) else value
