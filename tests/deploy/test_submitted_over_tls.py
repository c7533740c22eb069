"""Submitted runs over a real SuperLink, TLS and nodes' processes: protected and private; trainers are threads."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import tiny
from deployed import NAMES, Deployed, document, over_tls, quickly
from silotune.config import from_mapping
from silotune.deploy.kits import site_folder
from silotune.experiment.audit import verify_run
from silotune.experiment.run import run_experiment
from silotune.record.runs import RunFolder

pytestmark = pytest.mark.end_to_end
LIMIT = 120.0


@pytest.fixture(scope="module")
def deployed(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Iterator[Deployed]:
    made = Deployed(tmp_path_factory.mktemp("tls") / "f", tiny_folder)
    with over_tls(made), quickly():
        yield made


@pytest.fixture(scope="module")
def submitted(deployed: Deployed) -> Callable[..., RunFolder]:
    return deployed.submitted


def test_a_secure_sum_ends_with_the_bits_of_one_process(
    deployed: Deployed, submitted: Callable[..., RunFolder], tiny_folder: Path, tmp_path: Path
) -> None:
    settings = {"protection": {"type": "secure_sum", "max_examples": 64}}
    asked = document(tiny_folder, tmp_path / "runs", privacy=settings, federation={"rounds": 1})
    far, near = submitted(asked), run_experiment(from_mapping(asked))
    tiny.assert_same_bits(*(run.part("federated").load_adapter()[0] for run in (far, near)))
    assert {row["client"] for row in far.part("federated").read_rows("clients")} == {"(sum)"}
    keys = deployed.kit.members().signing_keys()
    found = verify_run(far.path, keys=keys, sites=[site_folder(deployed.site(site)) for site in NAMES])
    assert found.has_adapter and set(found.witnesses) == set(NAMES)


def test_private_rounds_are_counted_at_the_sites(
    deployed: Deployed, submitted: Callable[..., RunFolder], tiny_folder: Path, tmp_path: Path
) -> None:
    private = {"dp": {"type": "example", "noise_multiplier": 1.0, "accountant": "rdp"}}
    whole = {"batch_size": 32}  # every step takes all examples: quickly counted
    run = submitted(document(tiny_folder, tmp_path, privacy=private, training=whole, federation={"rounds": 1}))
    said = run.part("federated").read_json("result")["privacy"]["clients"]
    assert set(said) == set(NAMES) and all(value > 0 for value in said.values())
    for name in NAMES:
        ledger = site_folder(deployed.site(name)) / "ledger" / f"{name}.jsonl"
        assert len(ledger.read_text().splitlines()) == 1
