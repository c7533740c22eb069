"""A task of your own: complaints sorted by urgency, one file an institution, each in the format that it has.

``python examples/own_data.py`` writes made-up rows to a temporary folder and runs on them; arguments change values of
the configuration, as ``python examples/own_data.py federation.rounds=2`` does.
"""

import csv
import json
import random
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import silotune

CONFIG = """
[model]
max_length = 128

[adapter]
targets = "all-linear"

[data]
task = "custom"
test = "{folder}/test.jsonl"               # without it, 20 % of the training rows would be carved off

[data.definition]
prompt = "How urgent is this complaint about {{product}}: low or high?\\n{{letter}}\\nAnswer:"
answer = "urgency"                         # the column that holds the answer
options = ["low", "high"]
label_names = {{ "0" = "low", "1" = "high" }}  # what the rows say -> what the model says
metric = "macro_f1"

[data.partition]
scheme = "file"

[data.partition.files]                     # client = file; JSONL, JSON, CSV or Parquet
north-bank = "{folder}/north.csv"
south-bank = "{folder}/south.jsonl"
east-bank = "{folder}/east.jsonl"

[training]
learning_rate = 3e-3
epochs = 2.0

[federation]
modes = ["federated", "isolated"]
rounds = 3

[record]
folder = "{folder}/runs"
"""
PRODUCTS = ("card", "loan", "account")
CALM = ("I would like a new statement.", "Please change my address.", "The leaflet has a misprint.")
PRESSING = ("My money is gone.", "Somebody else uses my name.", "I cannot pay my rent today.")


def rows(count: int, seed: int, kinds: Sequence[int]) -> list[dict[str, str]]:
    """Made-up complaints of these kinds; ``urgency`` is 0 or 1."""
    draw = random.Random(seed)
    made = []
    for _ in range(count):
        urgency, days = draw.randrange(2), draw.randrange(2, 30)
        kind = draw.choice(kinds)
        letter = f"{(PRESSING if urgency else CALM)[kind]} I wrote {days} days ago."
        made.append({"product": draw.choice(PRODUCTS), "letter": letter, "urgency": str(urgency)})
    return made


def write_files(folder: Path) -> None:
    """Three institutions that each know one kind of complaint, and a set with all kinds on which they are scored."""
    with (folder / "north.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["product", "letter", "urgency"])
        writer.writeheader()
        writer.writerows(rows(60, seed=1, kinds=(0,)))
    for seed, (name, kinds) in enumerate({"south": (1,), "east": (2,), "test": (0, 1, 2)}.items(), start=2):
        lines = [json.dumps(row) + "\n" for row in rows(60, seed=seed, kinds=kinds)]
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")


with tempfile.TemporaryDirectory() as name:
    folder = Path(name)
    write_files(folder)
    config_file = folder / "complaints.toml"
    config_file.write_text(CONFIG.format(folder=folder.as_posix()), encoding="utf-8")
    run = silotune.run(config_file, sys.argv[1:])
    summary = run.read_json("summary")
    for client, figures in summary["isolated"]["clients"].items():
        print(f"{client} alone: macro-F1 {figures['macro_f1']:.3f}")
    print(f"together: macro-F1 {summary['federated']['macro_f1']:.3f}")
