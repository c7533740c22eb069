"""Compares LoRA and IA3 on the quickstart's data: quality, bytes and seconds.

``python examples/compare_adapters.py``; arguments change values of both runs, as
``python examples/compare_adapters.py federation.rounds=2`` does.
"""

import sys

import silotune

SETTINGS = {"lora": ["training.learning_rate=3e-3"], "ia3": ["training.learning_rate=1e-2"]}

print(f"{'adapter':<8} {'accuracy':>8} {'bytes up':>10} {'seconds':>8}")
for kind, own in SETTINGS.items():
    shared = [f"adapter.type={kind}", f"record.name=compare-{kind}", 'federation.modes=["federated"]']
    run = silotune.run("quickstart", [*shared, *own, *sys.argv[1:]])
    figures = run.read_json("summary")["federated"]
    print(f"{kind:<8} {figures['accuracy']:>8.3f} {figures['bytes_up']:>10,} {figures['seconds']:>8.1f}")
