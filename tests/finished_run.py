"""A finished run folder written by hand, for tests of what reads run folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from silotune.record.runs import RunFolder

ACCURACIES = (0.34, 0.58, 0.67, 0.74, 0.78, 0.8)


def summary(**changes: Any) -> dict[str, Any]:
    return {
        "task": "finance-news", "model": "nano", "adapter": "lora", "algorithm": "fedavg", "metric": "accuracy",
        "split": "test", "budget": "every mode takes 250 optimiser steps in all", "seconds": 61.2,
        "bytes_up": 4_100_000, "bytes_down": 4_200_000, "peak_memory_bytes": 900_000_000,
        "base": {"accuracy": 0.34, "macro_f1": 0.2},
        "federated": {
            "accuracy": 0.8, "macro_f1": 0.79, "seconds": 20.5, "bytes_up": 4_100_000, "bytes_down": 4_200_000,
            "accuracy_interval": [0.77, 0.83],
        },
        "centralized": {"accuracy": 0.82, "macro_f1": 0.81, "seconds": 20.1, "bytes_up": 0, "bytes_down": 0},
        "isolated": {
            "accuracy": {"mean": 0.61, "best": 0.7, "worst": 0.5},
            "macro_f1": {"mean": 0.55, "best": 0.66, "worst": 0.4},
            "seconds": 20.6, "bytes_up": 0, "bytes_down": 0, "clients": {},
        },
        **changes,
    }  # fmt: skip


def finished_run(root: Path, name: str = "demo", **changes: Any) -> RunFolder:
    run = RunFolder.create(root, name, config={"seed": 3})
    run.write_json("summary", summary(**changes))
    run.write_json("partition", {"clients": {
        f"bank-{number}": {"num_examples": 300, "labels": labels}
        for number, labels in enumerate((
            {"negative": 200, "neutral": 40, "positive": 60},
            {"negative": 10, "neutral": 280, "positive": 10},
            {"neutral": 120, "positive": 300},
            {"negative": 50, "neutral": 55, "positive": 40},
        ))
    }})  # fmt: skip
    for number, accuracy in enumerate(ACCURACIES):
        run.part("federated").append("metrics", {"round": number, "split": "test", "accuracy": accuracy})
    return run


def events(folder: str) -> list[tuple[str, dict[str, Any]]]:
    """What a small run tells its observer: two federated rounds of two clients, two isolated clients."""
    told: list[tuple[str, dict[str, Any]]] = [
        ("run_started", {"folder": folder, "modes": ["federated", "isolated"], "task": "finance-news",
                         "model": "nano", "clients": 2, "num_parameters": 1_900_000, "trainable": 12_300}),
        ("note", {"text": "3 prompts were cut [left]"}),
        ("unknown_event", {}),
        ("mode_started", {"mode": "federated", "rounds": 2, "clients_per_round": 2}),
        ("round_finished", {"mode": "federated", "round": 0, "rounds": 2, "metrics": {"accuracy": 0.3},
                            "train_loss": None, "seconds": 0.1}),
    ]  # fmt: skip
    for number in (1, 2):
        told.append(("client_finished", {"mode": "federated", "client": "bank-0", "round": number, "loss": 0.5}))
        told.append(("client_finished", {"mode": "federated", "client": "bank-1", "round": number, "loss": None}))
        told.append(("round_finished", {"mode": "federated", "round": number, "rounds": 2, "train_loss": 0.5,
                                        "metrics": {"accuracy": 0.5 + number / 10}, "seconds": 1.5}))  # fmt: skip
    told.append(("client_failed", {"mode": "federated", "client": "bank-1", "round": 2, "reason": "timed out"}))
    told.append(("mode_finished", {"mode": "federated", "metrics": {"accuracy": 0.7}, "seconds": 3.0}))
    for name in ("bank-0", "bank-1"):
        told.append(("mode_started", {"mode": "isolated", "client": name, "rounds": 2, "clients_per_round": 1}))
        told.append(("round_finished", {"mode": "isolated", "client": name, "round": 2, "rounds": 2,
                                        "train_loss": 0.4, "metrics": {}, "seconds": 1.0}))  # fmt: skip
        told.append(("mode_finished", {"mode": "isolated", "client": name, "metrics": {"accuracy": 0.6}}))
    told.append(("run_finished", {"summary": summary()}))
    return told
