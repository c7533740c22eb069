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
import torch
from rich.console import Console

import tiny
from silotune.config import Config, from_mapping
from silotune.errors import PrivacyError, ProtectionError
from silotune.experiment.audit import verify_run
from silotune.experiment.exposure import Exposed, exposed_by
from silotune.experiment.privacy import achieved, plan_of, spent_text, statement, warnings
from silotune.experiment.run import resume_experiment, run_experiment
from silotune.experiment.spending import spent_of
from silotune.privacy.accountant import Spend, epsilon
from silotune.privacy.ledger import as_row, entry
from silotune.record.audit import FILE
from silotune.record.runs import RunFolder
from silotune.report.runs import promise_lines, summary_table

CODE = """
import json, sys, torch
torch.set_num_threads(1)
from silotune.config import from_mapping
from silotune.experiment.run import run_experiment
run_experiment(from_mapping(json.loads(sys.argv[1])))
"""
ALIKE = {"num_train": 48, "num_validation": 12, "num_test": 18, "partition": {"clients": 3, "scheme": "iid"}}
EXAMPLE = {"dp": {"type": "example", "noise_multiplier": 1.0, "accountant": "rdp"}}


def made(**privacy) -> Config:
    return from_mapping({"privacy": tiny.sorted_privacy({"accountant": "rdp", **privacy})})


def test_three_lines_say_what_is_promised() -> None:
    sees, protected, trusted = statement(Config().privacy, None)
    assert "in the clear" in sees
    assert protected.startswith("no record is protected")
    summed = from_mapping({"privacy": {"protection": "secure_sum"}}).privacy
    sees, protected, trusted = statement(summed, None)
    assert "even if it does not keep to the protocol" in sees and protected.startswith(
        "no record is protected: the sum"
    )
    assert trusted.startswith(
        "trusted: the institutions, of which fewer than 2 x privacy.protection.threshold - 1 work with the server"
    )
    assert trusted.endswith("not the server")
    trusted = statement(from_mapping({"privacy": {"protection": "he"}}).privacy, None)[2]
    assert "the server, not to have a single update opened" in trusted and "key" in trusted
    config = made(dp="example", epsilon=4)
    plan = plan_of(config, {"a": 16, "b": 8})  # every step takes all: quickly counted
    assert plan is not None
    sees, protected, trusted = statement(config.privacy, plan)
    assert "noised" in sees
    assert protected == (
        f"a record is protected with epsilon = {plan.epsilon:.3g} (planned) at delta = 1e-05 over 5 rounds, from the "
        "server too"
    )
    assert 3.9 < plan.epsilon <= 4.0
    assert trusted.startswith("trusted: each institution with its own records; not the server")
    assert plan_of(Config(), {"a": 1}) is None


def test_a_cap_bounds_what_given_noise_would_cost() -> None:
    config = made(dp="local", epsilon=1.5, noise_multiplier=1.0)
    plan = plan_of(config, {"a": 10})
    assert plan is not None
    assert plan.curves["a"][-1] > 1.5 == plan.epsilon
    assert "epsilon = 1.5 (planned)" in statement(config.privacy, plan)[1]


def test_what_was_spent_is_said_beside_what_was_planned() -> None:
    privacy = made(dp="local", epsilon=9).privacy
    texts = {
        "17.1": {"epsilon": 17.1234, "planned": 17.11},
        "19 (planned: 17.1)": {"epsilon": 18.98, "planned": 17.1234},
        "2.5": {"epsilon": 2.5, "planned": None},
        "what its institution's ledger says (planned: 3)": {"epsilon": None, "planned": 3.0},
        "what its institution's ledger says": {"epsilon": None},
    }
    for text, spent in texts.items():
        assert spent_text(spent) == text
        line = achieved(privacy, {"privacy": spent, "rounds": 7})[1]
        assert f"are protected with epsilon = {text} at delta = 1e-05 over 7 rounds" in line
    assert achieved(Config().privacy, {"rounds": 2}) == statement(Config().privacy, None)


def test_what_a_protected_sum_hides_is_not_told_as_planned(tmp_path: Path) -> None:
    """The sites' ledgers are elsewhere and no report is seen: the coordinator does not know what was spent."""
    config = made(dp="local", protection="secure_sum", noise_multiplier=1.0, epsilon=9)
    folder = RunFolder(tmp_path)
    folder.append("clients", {"round": 1, "client": "(sum)", "epsilon": None})
    spent = spent_of(config, folder, {}, run="run/federated")
    assert spent == {"dp": "local", "delta": 1e-5, "epsilon": None, "clients": {}}
    assert "9" not in achieved(config.privacy, {"privacy": spent, "rounds": 1})[1].replace("1e-05", "")


def test_ledgers_count_what_no_report_tells(tmp_path: Path) -> None:
    """A round that was begun and came to nothing, of a site that was not asked again; other runs do not count."""
    config = made(dp="local", noise_multiplier=1.0)
    folder = RunFolder(tmp_path)
    rows = [{"round": number, "client": name, "epsilon": 1.0} for number in (1, 2) for name in ("a", "b")]
    folder.append("clients", *rows)
    for run, number in (("run/federated", 1), ("run/federated", 2), ("run/federated", 3), ("other", 1)):
        row = as_row(entry(run, number, Spend(1.0)))
        folder.part("ledger").append("a", row)
    spent = spent_of(config, folder, {"epsilon": 2.0}, run="run/federated")
    three = epsilon([Spend(1.0)] * 3, 1e-5, accountant="rdp")
    assert spent is not None and spent["clients"] == {"a": pytest.approx(three), "b": 1.0}
    assert spent["epsilon"] == pytest.approx(three)
    sections = {"privacy": {"dp": {"type": "client", "noise_multiplier": 1.0, "accountant": "rdp"}}}
    central = from_mapping({**sections, "federation": {"weighting": "uniform"}})
    rows = [as_row(entry("run/federated", number, Spend(1.0))) for number in (1, 2, 2)]
    folder.append("ledger", *rows)
    known = spent_of(central, folder, {"entries": rows[:1], "epsilon": 0.1}, run="run/federated")
    assert known is not None and known["epsilon"] == pytest.approx(three)  # the file knows rounds that no state kept


LORA = "base_model.model.model.layers.{}.self_attn.{}_proj.lora_{}.weight"


def adapter(rank: int, width: int, modules: tuple[str, ...], *, factors: str = "AB") -> dict[str, torch.Tensor]:
    shapes = {"A": (rank, width), "B": (width, rank)}
    return {
        LORA.format(block, module, factor): torch.zeros(shapes[factor])
        for block in (0, 1) for module in modules for factor in factors
    }  # fmt: skip


def test_what_plain_steps_expose_is_counted_by_the_rule() -> None:
    """Rounds x ranks of the modules with that input, and never more than its width."""
    assert exposed_by(adapter(8, 64, ("q", "k", "v"))) == Exposed((8, 8, 8), 64)
    assert exposed_by(adapter(8, 64, ("q", "v", "o"))) == Exposed((8, 8), 64)
    exposed = exposed_by(adapter(16, 64, ("q",)))
    assert [exposed.tokens(rounds) for rounds in (1, 3, 9)] == [16, 48, 64]
    assert exposed_by(adapter(8, 64, ("q",), factors="B")).ranks == ()  # the frozen factor's few directions are no span
    assert exposed_by({"model.layers.0.mlp.down_proj.ia3_l": torch.zeros(1, 64)}).ranks == ()


def plain(**sections) -> Config:
    return from_mapping({"training": {"optimizer": "sgd"}, "federation": {"rounds": 3}, **sections})


def test_plain_sgd_is_warned_of_before_a_run() -> None:
    exposed = Exposed((8, 8, 8), 64)
    (line,) = warnings(plain(), {"a": 10}, exposed=exposed)
    assert "fewer than 64: 3 rounds x rank 8 + 8 + 8 of modules that read the same input" in line
    assert "no more than its width of 64" in line and "\n" not in line
    assert "privacy.protection hides whose they are, not what they are" in line and "privacy.dp does" in line
    assert "adamw makes them inexact, not safe" in line
    (line,) = warnings(plain(federation={"rounds": 1}), {"a": 10}, exposed=exposed)
    assert "fewer than 24: 1 round x rank 8 + 8 + 8" in line
    scaffold = {"federation": {"algorithm": "scaffold", "rounds": 1}}
    for config in (plain(**scaffold), plain(privacy={"protection": "secure_sum"})):
        assert len(warnings(config, {"a": 10}, exposed=exposed)) == 1
    (line,) = warnings(plain(), {"a": 10})  # all weights are trained: no count bounds it
    assert "exactly, as far as their rank goes" in line
    silent = (
        Config(),
        plain(federation={"modes": ["centralized"]}),
        plain(privacy={"dp": {"type": "example", "noise_multiplier": 1.0}}, federation={"lora": "freeze-a"}),
    )
    for config in silent:
        assert warnings(config, {"a": 10**3}, exposed=exposed) == []
    assert warnings(plain(), {"a": 10}, exposed=Exposed((), 0)) == []


@pytest.mark.parametrize("sections", [{}, {"federation": {"lora": "freeze-a"}}, {"training": {"optimizer": "adamw"}}])
def test_a_run_counts_what_its_own_adapter_exposes(configuration: Callable[..., Config], sections: dict) -> None:
    base = {"training": {"optimizer": "sgd"}, "federation": {"rounds": 1}, "evaluation": {"bootstrap_samples": 0}}
    merged = {name: {**base.get(name, {}), **sections.get(name, {})} for name in base}
    run = run_experiment(configuration(**merged))
    notes = [row["text"] for row in run.read_rows("events") if row["event"] == "note" and "'sgd'" in row["text"]]
    assert len(notes) == (0 if sections else 1)
    if notes:
        assert "1 round x rank 2" in notes[0] and "its width of 32" in notes[0]


def test_warnings_name_what_weakens_a_guarantee() -> None:
    assert warnings(Config(), {"a": 10**6}) == []
    said = "\n".join(warnings(made(dp="example", epsilon=1), {"a": 10**6}))
    assert "is not below 1 / 1000000 (examples of the largest client)" in said
    assert "federation.lora = 'freeze-a'" in said
    frozen = from_mapping({"privacy": {"dp": {"type": "example", "epsilon": 1}}, "federation": {"lora": "freeze-a"}})
    assert warnings(frozen, {"a": 100}) == []
    few = from_mapping(
        {
            "privacy": {"dp": {"type": "client", "epsilon": 1}},
            "federation": {"weighting": "uniform"},
            "adapter": {"type": "ia3"},
        }
    )
    (line,) = warnings(few, {"a": 10, "b": 10})
    assert "hides one of 2 institutions" in line


def test_noise_in_shares_is_planned_and_said() -> None:
    sections = {"federation": {"weighting": "uniform"}, "data": {"partition": {"clients": 12}}}
    shared = {"dp": {"type": "distributed", "epsilon": 3}, "protection": "secure_sum"}
    config = from_mapping({"privacy": shared, **sections})
    sizes = {f"site-{number}": 10 for number in range(12)}
    plan = plan_of(config, sizes)
    assert plan is not None and list(plan.releases) == ["all"]
    assert 2.98 < plan.epsilon <= 3.0 and plan.curves["all"][-1] == plan.epsilon
    sees, protected, trusted = statement(config.privacy, plan)
    assert "masked integers" in sees and sees.endswith("noise was added at the institutions")
    assert "from the server as well and from up to 1 others that work with it" in protected
    assert "add their shares of the noise" in trusted
    with pytest.raises(ProtectionError, match="take fewer privacy.dp.colluding"):
        plan_of(from_mapping({"privacy": {**shared, "dp": {**shared["dp"], "colluding": 9}}, **sections}), sizes)


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
    everywhere_the_same(done, result["privacy"])


def everywhere_the_same(run: RunFolder, spent: dict) -> None:
    """Of a run whose lost rounds were spent: no file tells the plan as what was kept, and all tell the same."""
    said, summary, part = run.read_json("privacy"), run.read_json("summary"), run.part("federated")
    planned, kept = f"{said['plan']['epsilon']:.3g}", f"{spent['epsilon']:.3g}"
    assert spent["epsilon"] > 1.02 * spent["planned"] == 1.02 * said["plan"]["epsilon"] and kept != planned
    line = (
        f"a record is protected with epsilon = {kept} (planned: {planned}) at delta = 1e-05 over 4 rounds, from the "
        "server too"
    )
    assert said["statement"][1] == summary["privacy"]["statement"][1] == line
    assert f"epsilon = {planned} (planned) at" in said["planned"][1]
    assert said["spent"]["federated"] == spent == summary["federated"]["privacy"]
    card = (part.path / "adapter" / "README.md").read_text()
    assert f"epsilon is {kept} (planned: {planned}) at delta 1e-05." in card
    assert f"privacy: {line}" in promise_lines(summary)
    console = Console(width=200)
    with console.capture() as shown:
        console.print(summary_table(summary))
    assert f"{kept} (delta 1e-05)" in shown.get() and f"{planned} (" not in shown.get()
    told = [row["statement"] for row in run.read_rows("events") if row["event"] == "privacy"]
    assert told[0] == said["planned"] and told[-1] == said["statement"]
    promises = {
        entry.event: entry.fields["promise"]
        for entry in verify_run(run.path).chain.entries
        if "promise" in entry.fields
    }
    assert promises == {"started": said["planned"], "result": said["statement"]}


@pytest.mark.end_to_end
def test_a_run_says_spends_and_stops(configuration: Callable[..., Config], tmp_path: Path) -> None:
    modes = {"modes": ["federated", "isolated", "centralized"], "rounds": 2}
    events: list[tuple[str, dict]] = []
    config = configuration(data=ALIKE, privacy=EXAMPLE, federation=modes, evaluation={"bootstrap_samples": 0})
    run = run_experiment(config, observer=lambda event, fields: events.append((event, dict(fields))))
    said = run.read_json("privacy")
    assert [fields["statement"] for event, fields in events if event == "privacy"] == [
        said["planned"], said["statement"],
    ]  # fmt: skip
    summary = run.read_json("summary")
    assert summary["privacy"] == {"dp": "example", "statement": said["statement"]}
    assert "(planned" not in said["statement"][1]  # what was planned was spent
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
    capped = {"dp": {"type": "example", "epsilon": 1.01 * spent, "noise_multiplier": 1.0, "accountant": "rdp"}}
    again = configuration(
        data=ALIKE,
        privacy={"dp": {**capped["dp"], "ledger": str(shared)}},
        federation={"rounds": 9},
        evaluation={"bootstrap_samples": 0},
    )
    stopped = run_experiment(again).part("federated").read_json("result")
    assert stopped["rounds"] == 2
    assert "no client's privacy budget allows round" in stopped["stopped"]
    assert stopped["privacy"]["epsilon"] <= capped["dp"]["epsilon"]
    assert sorted(file.name for file in shared.glob("*.jsonl"))
    assert spent_of(Config(), RunFolder(tmp_path), {}, run="x") is None
    with pytest.raises(PrivacyError, match="nothing was trained"):
        run_experiment(configuration(privacy={"dp": {**capped["dp"], "epsilon": 0.01}}))


@pytest.mark.end_to_end
def test_noise_in_shares(configuration: Callable[..., Config]) -> None:
    """Three sites, all needed, one of which may collude; the run's account is that of the sites."""
    shared = {"dp": {"type": "distributed", "noise_multiplier": 1.0, "clip_norm": 0.1}, "protection": "secure_sum"}
    run = run_experiment(
        configuration(data=ALIKE, privacy=shared, federation={"weighting": "uniform"}, adapter={"type": "ia3"})
    )
    said, part = run.read_json("privacy"), run.part("federated")
    result = part.read_json("result")
    first = json.loads((part.path / FILE).read_text().splitlines()[0])
    assert first["event"] == "started" and first["fields"]["promise"] == said["planned"]
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
