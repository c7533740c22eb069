"""Runs the quickstart from Python: four banks together, each alone, and all data pooled.

``python examples/quickstart.py`` takes about two minutes; arguments change values of the configuration, as
``python examples/quickstart.py federation.rounds=2 seed=1`` does.
"""

import sys

import silotune

PROMPT = "Is this news negative, neutral or positive for the company?\nProfit rose to a record.\nAnswer:"

run = silotune.run("quickstart", sys.argv[1:])
summary = run.read_json("summary")
print(f"each alone (mean): {summary['isolated']['accuracy']['mean']:.3f}")
print(f"together:          {summary['federated']['accuracy']:.3f}")
print(f"all data pooled:   {summary['centralized']['accuracy']:.3f}")
print(f"together, on the validation split: {silotune.evaluate(run.path, split='validation')['accuracy']:.3f}")
print(f"base model: {silotune.generate(run.path, PROMPT, base=True)!r}")
print(f"tuned model: {silotune.generate(run.path, PROMPT)!r}")
