"""``silotune privacy``: noise for an epsilon, the cost of a noise, a curve and a picture; what was spent."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from silotune.cli.main import _run
from silotune.privacy.accountant import Spend, epsilon
from silotune.privacy.ledger import as_row, entry

FAST = ("--set", "privacy.dp.accountant=rdp", "--set", "training.batch_size=16", "--set", "training.epochs=1")


def plan(capsys: pytest.CaptureFixture[str], *words: str) -> dict:
    assert _run(["privacy", "plan", *words, *FAST, "--json"], is_debug=True) == 0
    return json.loads(capsys.readouterr().out)


def test_noise_for_an_epsilon_over_rounds(capsys, tmp_path: Path) -> None:
    picture = tmp_path / "epsilon.png"
    words = ("--set", "privacy.dp.epsilon=4", "--set", "federation.rounds=3", "--out", str(picture))
    made = plan(capsys, "--examples", "600", "--examples", "16", *words)
    assert picture.read_bytes()[:4] == b"\x89PNG"
    first, second = made["sites"]["site-1"], made["sites"]["site-2"]
    assert (first["sampling_rate"], first["steps_per_round"]) == (pytest.approx(16 / 600), 38)
    for site in (first, second):
        assert site["epsilon"] <= 4
        assert site["curve"] == sorted(site["curve"])
        whole = Spend(site["noise_multiplier"], site["sampling_rate"], 3 * site["steps_per_round"])
        assert site["epsilon"] == pytest.approx(epsilon([whole], 1e-5, accountant="rdp"))
    assert second["noise_multiplier"] > first["noise_multiplier"]  # fewer examples, drawn more often
    assert made["points"] == [1, 2, 3]
    assert "epsilon = 4" in made["statement"][1] or "epsilon = 3.99" in made["statement"][1]


def test_the_cost_of_a_configuration_and_of_clients(capsys) -> None:
    settings = (
        "privacy.dp=client",
        "federation.weighting=uniform",
        "privacy.dp.noise_multiplier=2",
        "federation.clients_per_round=10",
        "federation.rounds=2",
        "privacy.dp.client_sampling=poisson",
    )
    words = [word for setting in settings for word in ("--set", setting)]
    made = plan(capsys, *["--examples", "100"] * 40, "--set", "data.partition.clients=40", *words)
    assert set(made["sites"]) == {"all"}
    assert made["sites"]["all"]["sampling_rate"] == 0.25
    assert made["epsilon"] == pytest.approx(epsilon([Spend(2.0, 0.25, 2)], 1e-5, accountant="rdp"))


def test_a_plan_for_people(capsys) -> None:
    words = ["privacy", "plan", "--examples", "16", "--set", "privacy.dp.noise_multiplier=1", *FAST]
    assert _run(words, is_debug=True) == 0
    shown = capsys.readouterr().out
    for text in ("multiplier", "after round", "privacy: the server sees", "note: noise on both LoRA factors"):
        assert text in shown


def test_a_plan_of_a_mixture(capsys) -> None:
    words = ["privacy", "plan", "quickstart", "--json", "--set", "data.task=mixture"]
    words += ["--set", "data.mixture.finance-news=1", "--set", "data.mixture.medical-choice=1"]
    words += ["--set", "data.partition.field=label", "--set", "federation.rounds=2"]
    words += ["--set", "privacy.dp=example", "--set", "privacy.dp.noise_multiplier=1", *FAST]
    assert _run(words, is_debug=True) == 0
    sites = json.loads(capsys.readouterr().out)["sites"]
    assert len(sites) == 4 and all(site["num_examples"] > 0 for site in sites.values())


def test_what_was_spent_over_all_runs(capsys, tmp_path: Path) -> None:
    for site, runs in (("bank-a", ("one", "one", "two")), ("bank-b", ("two",))):
        rows = [json.dumps(as_row(entry(run, number, Spend(2.0)))) for number, run in enumerate(runs, start=1)]
        (tmp_path / f"{site}.jsonl").write_text("\n".join(rows) + "\n")
    assert _run(["privacy", "spent", str(tmp_path), "--rdp", "--json"], is_debug=True) == 0
    found = json.loads(capsys.readouterr().out)
    sites = found["sites"]
    assert sites["bank-a"]["releases"] == 3 and set(sites["bank-a"]["runs"]) == {"one", "two"}
    assert sites["bank-b"]["epsilon"] == pytest.approx(sites["bank-a"]["runs"]["two"]["epsilon"])
    assert sites["bank-a"]["epsilon"] == pytest.approx(epsilon([Spend(2.0, steps=3)], 1e-5, accountant="rdp"))
    assert _run(["privacy", "spent", str(tmp_path), "--rdp"], is_debug=True) == 0
    assert f"{sites['bank-a']['epsilon']:.4g}" in (said := capsys.readouterr().out) and "bank-b" in said
    assert _run(["privacy", "spent", str(tmp_path / "none")], is_debug=False) == 13
    assert "holds no privacy ledger" in capsys.readouterr().err
    assert _run(["privacy", "spent", str(tmp_path), "--delta", "2"], is_debug=False) == 2


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ((), "give a configuration, or --examples"),
        (("--examples", "9"), "needs privacy.dp.epsilon, privacy.dp.noise_multiplier or both"),
        (("--examples", "9", "--set", "privacy.dp=none"), "costs nothing and promises nothing"),
    ],
)
def test_what_is_missing_is_said(capsys, words: tuple[str, ...], says: str) -> None:
    assert _run(["privacy", "plan", *words], is_debug=False) == 2
    assert says in capsys.readouterr().err
