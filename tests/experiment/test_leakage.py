"""The audit of whole runs: what it says of each kind, what it cannot do and says so, what ends with exit code 13."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from silotune.cli.main import build_app, main
from silotune.config import Config
from silotune.errors import ConfigError, DataError, PrivacyError, RunFolderError
from silotune.experiment.audit import verify_run
from silotune.experiment.held_back import hold_back
from silotune.experiment.leakage import ATTACKS, audit_run, check_claim, signed
from silotune.experiment.leakage_report import FILES, FOLDER, read_report, signer_of, text, verdict_of
from silotune.experiment.run import run_experiment
from silotune.record.signatures import new_key
from silotune.training.encode import Encoded

Make = Callable[..., Config]
PROMISED = {"type": "example", "epsilon": 1.0}
PLAIN = {
    "adapter": {"rank": 8, "alpha": 16, "targets": ["q_proj", "k_proj", "v_proj"]},
    "data": {"num_train": 120, "num_validation": 12, "num_test": 18, "partition": {"clients": 2, "scheme": "iid"}},
    "training": {"optimizer": "sgd", "batch_size": 1, "max_steps": 1, "learning_rate": 0.1, "objective": "sft"},
}


def merged(**more: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {name: {**PLAIN.get(name, {}), **more.get(name, {})} for name in {*PLAIN, *more}}


@pytest.fixture(scope="module")
def reports() -> dict[str, Any]:
    return {}


def figures(report: dict[str, Any], attack: str) -> list[dict[str, Any]]:
    return [figure for figure in report["figures"] if figure["attack"] == attack]


def why(report: dict[str, Any], attack: str) -> str:
    return next((item["why"] for item in report["not_tried"] if item["attack"] == attack), "")


def test_a_run_attacks_itself_and_its_report_is_covered_by_its_trail(configuration: Make) -> None:
    folder = run_experiment(
        configuration(
            **merged(record={"keep_updates": True}, audit={"leakage": True, "shadows": 2}, privacy={"canaries": 6})
        )
    )
    report = read_report(folder.path / FOLDER)
    assert report is not None
    assert {path.name for path in (folder.path / FOLDER).iterdir()} == set(FILES)
    assert verify_run(folder.path).chain.is_closed
    assert f"{FOLDER}/leakage.json" in verify_run(folder.path).coverage.covered
    key = (folder.path / "federated" / "audit.pub").read_text().strip()
    assert signer_of(report) == key
    assert not signer_of({**report, "seed": 1})
    of_server = [figure for figure in figures(report, "span") if figure["adversary"] == "server"]
    assert len(of_server) == 2
    assert all(figure["more"]["false"] == 0 for figure in of_server)
    assert {figure["about"] for figure in figures(report, "canaries")} == {"epsilon", "exposure"}
    assert figures(report, "membership")
    assert "no head" in why(report, "classes of single updates")
    for content in (make(report).decode().lower() for make in FILES.values()):
        assert "safe" not in content.replace("safetensors", "")
    assert audit_again(folder.path)["figures"] == report["figures"]


def audit_again(path: Path) -> dict[str, Any]:
    """The same attacks after the fact, through JSON as a report is read."""
    return json.loads(json.dumps(audit_run(path)))


def test_what_is_held_back_is_trained_on_by_nobody(configuration: Make) -> None:
    config = configuration(audit={"leakage": True, "reserve": 0.25}, privacy={"canaries": 4})
    examples = [Encoded((1, number), (2, 3, 4)) for number in range(40)]

    class Words:
        all_special_ids = (0,)

        def __len__(self) -> int:
            return 50

    held = hold_back(examples, config, client="a", tokenizer=Words())  # type: ignore[arg-type]
    assert (len(held.members), len(held.reserve), len(held.canaries)) == (26, 10, 4)
    assert not {each.prompt for each in held.reserve} & {each.prompt for each in held.trained}
    assert [examples[row] for row in held.rows] == list(held.members)
    assert len(held.trained) == 26 + sum(held.was_in)
    assert held == hold_back(examples, config, client="a", tokenizer=Words())  # type: ignore[arg-type]
    assert held != hold_back(examples, config, client="b", tokenizer=Words())  # type: ignore[arg-type]
    nothing = hold_back(examples, configuration(), client="a", tokenizer=Words())  # type: ignore[arg-type]
    assert nothing.trained == examples


def test_a_client_of_too_few_examples_is_named(configuration: Make) -> None:
    with pytest.raises(DataError, match=r"client 'client-\d' has \d+ examples: privacy.canaries = 40"):
        run_experiment(configuration(privacy={"canaries": 40}))


def test_a_run_that_kept_nothing_says_what_remains(configuration: Make) -> None:
    folder = run_experiment(configuration())
    report = audit_run(folder.path)
    assert why(report, "tokens of single updates") == "the run kept no updates: record.keep_updates = true"
    assert why(report, "tokens of sums") == "the run kept no models of its rounds: audit.leakage = true"
    assert "no share of the examples was held back" in why(report, "membership")
    assert why(report, "canaries") == "the run had no privacy.canaries"
    assert [figure["adversary"] for figure in report["figures"]] == ["public"]
    assert any("rather" not in line for line in verdict_of(report))


def test_under_a_secure_sum_the_sums_are_attacked(configuration: Make) -> None:
    sections = merged(
        privacy={"protection": "secure_sum"},
        audit={"leakage": True, "shadows": 0},
        data={"num_train": 36, "partition": {"clients": 3, "scheme": "iid"}},
    )
    report = read_report(run_experiment(configuration(**sections)).path / FOLDER)
    assert report is not None
    assert "only protected sums" in why(report, "tokens of single updates")
    assert [figure["adversary"] for figure in figures(report, "span")] == ["member", "public"]
    assert report["protection"] == "secure_sum"
    assert "too few for an interval" in why(report, "membership")


def test_an_audited_epsilon_above_the_claimed_one_ends_with_13(
    configuration: Make, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from silotune.evaluation.leakage import canaries

    folder = run_experiment(
        configuration(data={"partition": {"scheme": "iid"}}, privacy={"canaries": 4, "dp": PROMISED})
    )
    honest = audit_run(folder.path)
    check_claim(honest)
    (bound,) = (figure for figure in figures(honest, "canaries") if figure["about"] == "epsilon")
    assert bound["baseline"] == pytest.approx(1.0, abs=0.05)
    monkeypatch.setattr(canaries, "audited_epsilon", lambda *given, **more: canaries.Audited(7.5, 12, 12, 12, 9.0))
    with pytest.raises(PrivacyError, match=r"run 'demo', round 2: the audited epsilon 7.5 is above the claimed"):
        check_claim(audit_run(folder.path))
    with pytest.raises(SystemExit) as ended:
        main(["audit", "leakage", str(folder.path)])
    assert ended.value.code == 13
    assert "the audited epsilon 7.5 is above the claimed" in capsys.readouterr().err
    assert (folder.path / FOLDER / "leakage.html").is_file()


def test_the_command_refuses_what_cannot_be(configuration: Make, tmp_path: Path) -> None:
    folder = run_experiment(configuration(federation={"modes": ["centralized"]}))
    with pytest.raises(RunFolderError, match="has no federated mode"):
        audit_run(folder.path)
    with pytest.raises(RunFolderError, match="is not a folder"):
        audit_run(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="give an even number"):
        CliRunner().invoke(build_app(), ["audit", "leakage", str(folder.path), "--shadows", "3"], standalone_mode=False,
                           catch_exceptions=False)  # fmt: skip
    with pytest.raises(ConfigError, match="is there already"):
        CliRunner().invoke(build_app(), ["audit", "leakage", str(folder.path), "--out", str(tmp_path)],
                           standalone_mode=False, catch_exceptions=False)  # fmt: skip


@pytest.mark.parametrize(
    "sections, says",
    [
        ({"audit": {"leakage": True}, "federation": {"modes": ["centralized"]}}, "add 'federated' to federation.modes"),
        ({"audit": {"leakage": True}, "record": {"audit": False}}, "set record.audit = true"),
        ({"audit": {"shadows": 4}}, "audit.shadows"),
        ({"privacy": {"canaries": 4}, "training": {"objective": "pretrain"}}, "privacy.canaries"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(configuration: Make, sections: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError) as raised:
        configuration(**sections)
    assert any(says in fault for fault in (*raised.value.faults, str(raised.value)))


def test_a_report_of_odd_names_acts_on_nothing(configuration: Make) -> None:
    folder = run_experiment(configuration())
    report = audit_run(folder.path)
    odd = {**report["figures"][0], "about": "of <b>|x\x1b[2J</b>"}
    made = signed({**report, "figures": [odd]}, new_key())
    assert b"<b>" not in FILES["leakage.html"](made)
    assert b"\x1b" not in text(made)
    assert signer_of(made) == made["key"]


def test_a_broken_report_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "leakage.json").write_text("[]")
    with pytest.raises(RunFolderError, match="is not a report of a leakage audit"):
        read_report(tmp_path)


def test_every_attack_says_who_it_is_and_what_it_is() -> None:
    assert all(attack.title and attack.adversary for attack in ATTACKS.values())


@pytest.mark.parametrize(
    "sections",
    [
        {"federation": {"lora": "exact-residual"}},
        {"federation": {"lora": "sb"}},
        {"training": {"objective": "classify", "clip_norm": 0, "learning_rate": 0.01}},
    ],
    ids=["saved in another form", "a core", "a head"],
)
def test_runs_of_every_form_are_attacked(configuration: Make, sections: dict[str, Any]) -> None:
    rest = {"audit": {"leakage": True, "shadows": 0, "reserve": 0.4}, "privacy": {"canaries": 4}}
    report = read_report(
        run_experiment(configuration(**merged(**sections, **rest, record={"keep_updates": True}))).path / FOLDER
    )
    assert report is not None
    assert figures(report, "membership")
    assert bool(figures(report, "labels")) is ("training" in sections)
