"""silotune's side of the comparison, and the preparation of what both sides are given."""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from workload import (
    FLOWERTUNE_PROMPT,
    HELD_OUT,
    INITIAL,
    Pair,
    Settings,
    client_file,
    read_settings,
    write_pairs,
    write_settings,
)


def document(settings: Settings, folder: Path) -> dict[str, Any]:
    """The run as silotune's configuration.

    The peer scores nothing during its rounds; silotune always scores the first and the last model, here on eight
    examples.
    """
    workers = {} if settings.workers is None else {"workers": settings.workers}
    return {
        "seed": settings.seed,
        "model": {"name": settings.model, "device": "cpu", "max_length": settings.max_length, "offline": True},
        "adapter": {"type": "lora", "rank": settings.rank, "alpha": settings.alpha, "targets": "all-linear"},
        "data": {
            "task": "finance-news",
            "prompt": FLOWERTUNE_PROMPT,
            "num_train": settings.clients * settings.examples_per_client,
            "num_validation": 8,
            "num_test": settings.held_out,
            "partition": {"scheme": settings.scheme, "clients": settings.clients, "min_examples": 4},
        },
        "training": {
            "objective": "sft",
            "optimizer": "adamw",
            "learning_rate": settings.learning_rate,
            "batch_size": settings.batch_size,
            "max_steps": settings.local_steps,
            "clip_norm": 1.0,
            "schedule": "constant",
        },
        "federation": {"algorithm": "fedavg", "rounds": settings.rounds, **workers},
        "evaluation": {"max_examples": 8, "every": settings.rounds, "bootstrap_samples": 0},
        "record": {"folder": str(folder / "runs")},
    }


def prepare(folder: Path, settings: Settings) -> float:
    """Writes settings, each client's texts, the held-out texts and silotune's first adapter for the peer.

    Returns:
        The share of examples that the peer's way of tokenizing turns into exactly silotune's ids.
    """
    from safetensors.torch import save_file
    from transformers import PreTrainedTokenizerBase

    from silotune.config import from_mapping
    from silotune.data.load import load
    from silotune.data.partition import partition
    from silotune.models import adapters
    from silotune.models.load import load_base
    from silotune.structs import Example
    from silotune.training.encode import render
    from silotune.training.encoder import Encoder

    config = from_mapping(document(settings, folder))
    write_settings(folder, settings)
    dataset = load(config.data, seed=config.seed)
    shares = partition(dataset.splits["train"], config.data.partition, seed=config.seed)
    base = load_base(config.model)
    tokenizer: PreTrainedTokenizerBase = base.tokenizer
    gap = "" if tokenizer.chat_template else " "

    def pair(example: Example) -> Pair:
        return Pair(render(example.messages, tokenizer), gap + example.answer)

    for index, share in enumerate(shares.values()):
        write_pairs(client_file(folder, index), [pair(dataset.splits["train"][number]) for number in share])
    test = dataset.splits["test"]
    write_pairs(folder / HELD_OUT, [pair(example) for example in test])
    save_file(adapters.read(adapters.attach(base, config.adapter, seed=config.seed)), folder / INITIAL)
    encoded = Encoder(tokenizer, max_length=settings.max_length)(test)
    joint = [tokenizer(one.prompt + one.completion + tokenizer.eos_token)["input_ids"] for one in map(pair, test)]
    equal = sum([*one.prompt, *one.answer] == ids for one, ids in zip(encoded, joint, strict=True))
    return equal / len(test)


def run(folder: Path, output: Path) -> None:
    """Runs the experiment of a prepared folder by ``silotune run``; writes the final adapter and what was measured."""
    began = time.time()
    from silotune.cli.main import main as silotune

    settings = read_settings(folder)
    here = folder / output.stem
    here.mkdir(exist_ok=True)
    config = here / "run.toml"
    config.write_text("".join(_lines(document(settings, here))), encoding="utf-8")
    try:
        silotune(["run", str(config), "--json"])
    except SystemExit as ended:
        if ended.code:
            raise
    (made,) = (here / "runs").iterdir()
    federated = made / "federated"
    shutil.copyfile(federated / "adapter" / "adapter_model.safetensors", output)
    rounds, clients = _rows(federated / "metrics.jsonl"), _rows(federated / "clients.jsonl")
    finished = {row["round"]: row["time"] for row in _rows(made / "events.jsonl") if row["event"] == "round_finished"}
    evaluating = sum(row["evaluate_seconds"] for row in rounds if row["round"] > 0)
    measured = {
        "rounds_seconds": finished[settings.rounds] - finished[0] - evaluating,
        "local_seconds": sum(row["seconds"] for row in clients),
        "before_rounds_seconds": finished[0] - began,
        "peak_bytes": json.loads((made / "summary.json").read_text(encoding="utf-8"))["peak_memory_bytes"],
    }
    output.with_suffix(".json").write_text(json.dumps(measured), encoding="utf-8")


def _lines(values: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """A configuration as TOML, a dotted key a line."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _lines(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key} = {json.dumps(value)}\n"


def _rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def main() -> None:
    """Runs a prepared folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="prepared workload")
    parser.add_argument("output", type=Path, help="safetensors file to write")
    arguments = parser.parse_args()
    run(arguments.folder.resolve(), arguments.output.resolve())


if __name__ == "__main__":
    main()
