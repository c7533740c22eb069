"""Submitted runs over a real SuperLink, TLS and nodes' processes: protected and private; trainers are threads."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import tiny
from deployed import NAMES, Deployed, document, quickly
from silotune.config import from_mapping
from silotune.deploy import link
from silotune.deploy.coordinator import public_keys
from silotune.deploy.job import work_on
from silotune.deploy.jobs import Jobs
from silotune.deploy.places import coordinator_folder, link_socket, site_folder, trainer_socket
from silotune.deploy.processes import Child
from silotune.deploy.submit import submit_run
from silotune.experiment.audit import verify_run
from silotune.experiment.run import run_experiment
from silotune.record.runs import RunFolder
from silotune.transports.frames import listen

pytestmark = pytest.mark.end_to_end
LIMIT = 120.0


@pytest.fixture(scope="module")
def deployed(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Iterator[Deployed]:
    made = Deployed(tmp_path_factory.mktemp("tls") / "f", tiny_folder)
    socket = link_socket(made.kit)
    coordinator_folder(made.kit).mkdir(mode=0o700)
    children = [Child("link", ("silotune.deploy.superlink", str(made.kit.folder)), made.folder / "link.log")]
    for name, host in made.hosts.items():
        kit = made.site(name)
        threading.Thread(target=host.serve, args=(listen(trainer_socket(kit)),), daemon=True).start()
        children.append(Child(name, ("silotune.deploy.node", str(kit.folder)), made.folder / f"{name}.log"))
    try:
        children[0].start()
        link.wait_for_link(socket, limit_seconds=LIMIT)
        link.register(socket, public_keys(made.kit))
        for child in children[1:]:
            child.start()
        with quickly():
            yield made
    finally:
        for child in reversed(children):
            child.stop(limit_seconds=5)
        for host in made.hosts.values():
            host.stop()


@pytest.fixture(scope="module")
def submitted(deployed: Deployed) -> Callable[..., RunFolder]:
    """Submits a run and works on it to its end; the run folder."""

    def submit(asked: Any) -> RunFolder:
        jobs = Jobs(coordinator_folder(deployed.kit))
        name = submit_run(deployed.kit, from_mapping(asked), submitter=deployed.submitter)
        work_on(deployed.kit, name)
        assert jobs.read(name).status == "finished"
        return RunFolder.open(jobs.run_path(name))

    return submit


def test_a_secure_sum_ends_with_the_bits_of_one_process(
    deployed: Deployed, submitted: Callable[..., RunFolder], tiny_folder: Path, tmp_path: Path
) -> None:
    settings = {"protection": "secure_sum", "max_examples": 64}
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
    private = {"dp": "example", "noise_multiplier": 1.0, "accountant": "rdp"}
    whole = {"batch_size": 32}  # every step takes all examples: quickly counted
    run = submitted(document(tiny_folder, tmp_path, privacy=private, training=whole, federation={"rounds": 1}))
    said = run.part("federated").read_json("result")["privacy"]["clients"]
    assert set(said) == set(NAMES) and all(value > 0 for value in said.values())
    for name in NAMES:
        ledger = site_folder(deployed.site(name)) / "ledger" / f"{name}.jsonl"
        assert len(ledger.read_text().splitlines()) == 1
