"""Whole runs under differential privacy: what they say, what they count, what they leave, and what a kill does."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from silotune.config import Config, from_mapping
from silotune.errors import PrivacyError, ProtectionError
from silotune.experiment.privacy import plan_of, spent_of, statement, warnings
from silotune.experiment.run import resume_experiment, run_experiment
from silotune.privacy.accountant import Spend, epsilon
from silotune.record.audit import FILE
from silotune.record.runs import RunFolder

CODE = """
import json, sys, torch
torch.set_num_threads(1)
from silotune.config import from_mapping
from silotune.experiment.run import run_experiment
run_experiment(from_mapping(json.loads(sys.argv[1])))
"""
ALIKE = {"num_train": 48, "num_validation": 12, "num_test": 18, "partition": {"clients": 3, "scheme": "iid"}}
EXAMPLE = {"dp": "example", "noise_multiplier": 1.0, "accountant": "rdp"}


def made(**privacy) -> Config:
    return from_mapping({"privacy": {"accountant": "rdp", **privacy}})


def test_three_lines_say_what_is_promised() -> None:
    sees, protected, trusted = statement(Config().privacy, None)
    assert "in the clear" in sees
    assert protected.startswith("no record is protected")
    summed = from_mapping({"privacy": {"protection": "secure_sum"}}).privacy
    sees, protected, trusted = statement(summed, None)
    assert "even if it does not keep to the protocol" in sees and protected.startswith(
        "no record is protected: the sum"
    )
    assert trusted.startswith("trusted: more than the threshold's share of the institutions")
    assert trusted.endswith("not the server")
    trusted = statement(from_mapping({"privacy": {"protection": "he"}}).privacy, None)[2]
    assert "the server, not to have a single update opened" in trusted and "key" in trusted
    config = made(dp="example", epsilon=4)
    plan = plan_of(config, {"a": 16, "b": 8})  # every step takes all: quickly counted
    assert plan is not None
    sees, protected, trusted = statement(config.privacy, plan)
    assert "noised" in sees
    assert protected == (
        f"a record is protected with epsilon = {plan.epsilon:.3g} at delta = 1e-05 over 5 rounds, from the server too"
    )
    assert 3.9 < plan.epsilon <= 4.0
    assert trusted.startswith("trusted: each institution with its own records; not the server")
    assert plan_of(Config(), {"a": 1}) is None


def test_a_cap_bounds_what_given_noise_would_cost() -> None:
    config = made(dp="local", epsilon=1.5, noise_multiplier=1.0)
    plan = plan_of(config, {"a": 10})
    assert plan is not None
    assert plan.curves["a"][-1] > 1.5 == plan.epsilon
    assert "epsilon = 1.5" in statement(config.privacy, plan)[1]


def test_warnings_name_what_weakens_a_guarantee() -> None:
    assert warnings(Config(), {"a": 10**6}) == []
    said = "\n".join(warnings(made(dp="example", epsilon=1), {"a": 10**6}))
    assert "is not below 1 / 1000000 (examples of the largest client)" in said
    assert "federation.lora = 'freeze-a'" in said
    frozen = from_mapping({"privacy": {"dp": "example", "epsilon": 1}, "federation": {"lora": "freeze-a"}})
    assert warnings(frozen, {"a": 100}) == []
    few = from_mapping(
        {
            "privacy": {"dp": "client", "epsilon": 1},
            "federation": {"weighting": "uniform"},
            "adapter": {"kind": "ia3"},
        }
    )
    (line,) = warnings(few, {"a": 10, "b": 10})
    assert "hides one of 2 institutions" in line


def test_noise_in_shares_is_planned_and_said() -> None:
    sections = {"federation": {"weighting": "uniform"}, "data": {"partition": {"clients": 12}}}
    shared = {"dp": "distributed", "protection": "secure_sum", "epsilon": 3}
    config = from_mapping({"privacy": shared, **sections})
    sizes = {f"site-{number}": 10 for number in range(12)}
    plan = plan_of(config, sizes)
    assert plan is not None and list(plan.releases) == ["all"]
    assert 2.98 < plan.epsilon <= 3.0 and plan.curves["all"][-1] == plan.epsilon
    sees, protected, trusted = statement(config.privacy, plan)
    assert "masked integers" in sees and sees.endswith("noise was added at the institutions")
    assert "from the server as well and from up to 1 others that work with it" in protected
    assert "add their shares of the noise" in trusted
    with pytest.raises(ProtectionError, match="take fewer privacy.colluding"):
        plan_of(from_mapping({"privacy": {**shared, "colluding": 9}, **sections}), sizes)


@pytest.mark.end_to_end
def test_a_killed_run_counts_the_round_it_lost(configuration: Callable[..., Config], tmp_path: Path) -> None:
    """Killed in round 2 or later: ledgers hold more rounds than the checkpoint, and all of them are counted."""
    config = configuration(data=ALIKE, privacy=EXAMPLE, federation={"rounds": 4}, evaluation={"bootstrap_samples": 0})
    folder = tmp_path / "runs" / "demo"
    ledgers = folder / "federated" / "ledger"
    process = subprocess.Popen([sys.executable, "-c", CODE, json.dumps(config.model_dump(mode="json"))])
    limit = time.monotonic() + 120
    while sum(file.read_bytes().count(b"\n") for file in ledgers.glob("*.jsonl")) < 4:  # three clients: round 2 began
        assert process.poll() is None and time.monotonic() < limit
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    done = resume_experiment(folder)
    result = done.part("federated").read_json("result")
    attempts = {file.stem: file.read_bytes().count(b"\n") for file in ledgers.glob("*.jsonl")}
    assert max(attempts.values()) > 4  # at least one round was begun twice
    clients = result["privacy"]["clients"]
    sizes = {row["client"]: row["num_examples"] for row in done.part("federated").read_rows("clients")}
    for name, count in attempts.items():
        whole = Spend(1.0, min(1.0, 4 / sizes[name]), 2 * count)
        assert clients[name] == pytest.approx(epsilon([whole], 1e-5, accountant="rdp"))
    assert result["privacy"]["epsilon"] == max(clients.values())
    assert result["rounds"] == 4


@pytest.mark.end_to_end
def test_a_run_says_spends_and_stops(configuration: Callable[..., Config], tmp_path: Path) -> None:
    modes = {"modes": ["federated", "isolated", "centralized"], "rounds": 2}
    events: list[tuple[str, dict]] = []
    config = configuration(data=ALIKE, privacy=EXAMPLE, federation=modes, evaluation={"bootstrap_samples": 0})
    run = run_experiment(config, observer=lambda event, fields: events.append((event, dict(fields))))
    said = run.read_json("privacy")
    assert [fields["statement"] for event, fields in events if event == "privacy"] == [said["statement"]]
    summary = run.read_json("summary")
    assert summary["privacy"] == {"dp": "example", "statement": said["statement"]}
    planned = said["plan"]["epsilon"]
    assert summary["federated"]["privacy"]["epsilon"] == pytest.approx(planned)
    assert summary["centralized"]["privacy"]["epsilon"] < planned  # more examples, the same batch: drawn less often
    assert summary["isolated"]["privacy"]["epsilon"] == pytest.approx(planned)
    rows = run.part("federated").read_rows("metrics")
    assert [row.get("epsilon") for row in rows][1:] == sorted(row["epsilon"] for row in rows[1:])
    for row in run.part("federated").read_rows("clients"):
        assert (row["loss"], row["tokens"], row["seconds"], row["joules"]) == (None, 0, None, None)
    assert summary["federated"]["cost"]["core_seconds"] is None
    shared = tmp_path / "ledgers"
    spent = summary["federated"]["privacy"]["epsilon"]
    capped = {"dp": "example", "epsilon": 1.01 * spent, "noise_multiplier": 1.0, "accountant": "rdp"}
    again = configuration(
        data=ALIKE,
        privacy={**capped, "ledger": str(shared)},
        federation={"rounds": 9},
        evaluation={"bootstrap_samples": 0},
    )
    stopped = run_experiment(again).part("federated").read_json("result")
    assert stopped["rounds"] == 2
    assert "no client's privacy budget allows round" in stopped["stopped"]
    assert stopped["privacy"]["epsilon"] <= capped["epsilon"]
    assert sorted(file.name for file in shared.glob("*.jsonl"))
    assert spent_of(Config(), RunFolder(tmp_path), {}, planned=None) is None
    with pytest.raises(PrivacyError, match="nothing was trained"):
        run_experiment(configuration(privacy={**capped, "epsilon": 0.01}))


@pytest.mark.end_to_end
def test_noise_in_shares(configuration: Callable[..., Config]) -> None:
    """Three sites, all needed, one of which may collude; the run's account is that of the sites."""
    shared = {"dp": "distributed", "protection": "secure_sum", "noise_multiplier": 1.0, "clip_norm": 0.1}
    run = run_experiment(
        configuration(data=ALIKE, privacy=shared, federation={"weighting": "uniform"}, adapter={"kind": "ia3"})
    )
    said, part = run.read_json("privacy"), run.part("federated")
    result = part.read_json("result")
    first = json.loads((part.path / FILE).read_text().splitlines()[0])
    assert first["event"] == "started" and first["fields"]["promise"] == said["statement"]
    rows = part.read_rows("clients")
    assert [row["client"] for row in rows] == ["(sum)", "(sum)"] and rows[0]["loss"] is None
    charged = [
        Spend(row["release"]["noise_multiplier"], 1.0, 1, tuple(row["release"]["skellam_norms"])) for row in rows
    ]
    assert result["privacy"]["epsilon"] == pytest.approx(epsilon(charged, 1e-5))
    own = [json.loads(line) for line in next((part.path / "ledger").glob("*.jsonl")).read_text().splitlines()]
    assert [row["round_number"] for row in own] == [1, 1, 2, 2]  # written down before, put right after
    assert own[-1]["spend"]["noise_multiplier"] == rows[-1]["release"]["noise_multiplier"]
    assert result["privacy"]["epsilon"] <= said["plan"]["epsilon"] * (1 + 1e-4)
