"""Flower's simulation on Ray: the same run as in this process, to the same bits, its messages packed."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import tiny
from silotune.config import Config
from silotune.data.tasks import resolve
from silotune.experiment.engines import _host, actor_work
from silotune.experiment.prepare import adapted_of
from silotune.experiment.run import run_experiment
from silotune.experiment.site import setup_of
from silotune.federation.wire.messages import encode
from silotune.federation.wire.orders import Order
from silotune.models import adapters
from silotune.models.adapters import Adapted
from silotune.record.runs import RunFolder
from silotune.structs import Request

CODE = """
import json, sys, torch
torch.set_num_threads(1)
from silotune.config import from_mapping
from silotune.experiment.run import run_experiment
run_experiment(from_mapping(json.loads(sys.argv[1])))
"""


@pytest.mark.end_to_end
def test_an_actor_keeps_the_ledger_where_the_run_says(configuration: Callable[..., Config], tmp_path: Path) -> None:
    """What an actor does, in this process: it needs no memory of the client from one message to the next."""
    private = {"dp": {"type": "local", "noise_multiplier": 1.0, "accountant": "rdp"}}
    config = configuration(privacy=private, federation={"rounds": 2, "engine": "ray", "lora": "freeze-a"})
    setup = json.dumps(setup_of(config, is_simulated=True)).encode()
    work = functools.partial(actor_work, str(tmp_path / "states"), str(tmp_path / "ledger"))
    sent = {name: value for name, value in adapters.read(tiny_adapter(config)).items() if "lora_A" not in name}
    for number in (1, 2):
        request = encode(Request("train", number, "client-1", sent, Order(run="r", seed=0).body()))
        frame = work({"client": "client-1", "job": "run"}, setup, request)
        assert frame.header["status"] == "reply", frame.header
        _host.cache_clear()
    assert len((tmp_path / "ledger" / "client-1.jsonl").read_text().splitlines()) == 2


def tiny_adapter(config: Config) -> Adapted:
    return adapted_of(config, resolve(config.data))


@pytest.mark.end_to_end
def test_ray_gives_the_bits_of_one_process(configuration: Callable[..., Config], tmp_path: Path) -> None:
    pytest.importorskip("ray")
    sections = {"training": {"optimizer_state": "keep", "max_steps": 2, "threads": 1}, "record": {"energy": False}}
    packed = {"upload": {"values": "int4"}, "download": {"values": "int8", "delta": True}, "rounds": 2}
    near = run_experiment(configuration(**sections, federation=packed))
    federation = {"modes": ["federated"], "engine": "ray", "ray_cpus": 2, **packed}
    config = configuration(**{**sections, "federation": federation, "record": {"energy": False, "name": "far"}})
    done = subprocess.run(
        [sys.executable, "-c", CODE, config.model_dump_json()], capture_output=True, text=True, timeout=400, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    far = RunFolder.open(tmp_path / "runs" / "far")
    adapters = [run.part("federated").load_adapter()[0] for run in (near, far)]
    tiny.assert_same_bits(*adapters)
    rows = [run.part("federated").read_rows("metrics") for run in (near, far)]
    assert [row["bytes_up"] for row in rows[0]] == [row["bytes_up"] for row in rows[1]]
