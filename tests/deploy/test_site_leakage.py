"""A model is measured at the sites, which tell figures alone, and a site whose policy forbids it signs no end."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from deployed import NAMES, Deployed, document, quickly, without_waiting
from silotune.cli.main import build_app
from silotune.config import Config, from_mapping
from silotune.deploy.kits import site_folder
from silotune.deploy.site_audit import check_site_report, site_report
from silotune.errors import PolicyError, RunFolderError
from silotune.experiment.audit import verify_run
from silotune.experiment.leakage_report import FOLDER, read_report
from silotune.record.chain import read_chain
from silotune.record.plain_json import canonical
from silotune.record.runs import RunFolder
from silotune.record.signatures import verify

pytestmark = pytest.mark.end_to_end
FORBIDS = 'leakage_audit = "required"\nlargest_membership_advantage = 0.0'


@pytest.fixture(scope="module", autouse=True)
def quick() -> Iterator[None]:
    with quickly(), without_waiting():
        yield


@pytest.fixture(scope="module")
def deployed(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Deployed:
    made = Deployed(tmp_path_factory.mktemp("leakage") / "f", tiny_folder)
    made.allow(NAMES[1], 'leakage_audit = "required"')
    made.allow(NAMES[2], FORBIDS)
    return made


def config(tiny_folder: Path, folder: Path, name: str, **sections: Any) -> Config:
    data = {"num_train": 180, "num_validation": 6, "num_test": 6, "partition": {"clients": 3, "scheme": "iid"}}
    return from_mapping(document(tiny_folder, folder, data=data, record={"name": name}, **sections))


@pytest.fixture(scope="module")
def run(deployed: Deployed, tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """Two of three sites sign its end; the policy of the third forbids any advantage."""
    audit = {"leakage": True, "reserve": 0.4}
    return deployed.run(config(tiny_folder, tmp_path_factory.mktemp("runs"), "measured", audit=audit))


def test_only_figures_leave_and_the_forbidding_site_does_not_sign(deployed: Deployed, run: RunFolder) -> None:
    report = read_report(run.path / FOLDER)
    assert report is not None
    assert [figure["about"] for figure in report["figures"]] == [f"at {name}" for name in NAMES]
    assert report["worst"] is None
    found = verify_run(run.path, is_uncountersigned_allowed=True)
    assert set(found.chain.countersigned) == set(NAMES[:2])
    assert found.uncountersigned == (NAMES[2],)
    trail = read_chain(site_folder(deployed.site(NAMES[2])) / "audit.jsonl")
    refused = [entry.fields for entry in trail if entry.event == "refusal"]
    assert [(fields["rule"], fields["kind"]) for fields in refused] == [("largest_membership_advantage", "countersign")]


def test_each_site_shows_its_own_signed_figures(deployed: Deployed, run: RunFolder, tmp_path: Path) -> None:
    kept = site_report(deployed.site(NAMES[0]), run.path.name)
    said = {name: value for name, value in kept.items() if name != "signature"}
    assert verify(kept["key"], "leakage", canonical(said), kept["signature"])
    check_site_report(kept)
    assert kept["figures"]["others"] == 24
    with pytest.raises(PolicyError, match="at most 0 is allowed; its end is not signed"):
        check_site_report(site_report(deployed.site(NAMES[2]), run.path.name))
    with pytest.raises(RunFolderError, match="measured no model of a run 'other'"):
        site_report(deployed.site(NAMES[0]), "other")
    place = str(deployed.folder / NAMES[0])
    shown = CliRunner().invoke(
        build_app(), ["site", "audit", place, "--run", run.path.name, "--out", str(tmp_path / "a")]
    )
    assert shown.exit_code == 0, shown.output
    assert "no bound in the policy" in shown.output
    assert json.loads((tmp_path / "a").read_text()) == kept


def test_a_run_without_the_measure_is_refused_where_it_is_required(
    deployed: Deployed, tiny_folder: Path, tmp_path: Path
) -> None:
    made = deployed.run(config(tiny_folder, tmp_path, "unmeasured", federation={"min_replies": 1, "rounds": 1}))
    rows = made.part("federated").read_rows("metrics")
    assert made.part("federated").read_json("result")["round"] == 1
    assert len(rows) == 2
    for name in NAMES[1:]:
        trail = read_chain(site_folder(deployed.site(name)) / "audit.jsonl")
        rules = {
            entry.fields["rule"] for entry in trail if entry.event == "refusal" and entry.fields["run"] == "unmeasured"
        }
        assert rules <= {"leakage_audit", "largest_membership_advantage"}
        assert rules


def test_under_a_guarantee_the_figures_stay_at_the_site(deployed: Deployed, tiny_folder: Path, tmp_path: Path) -> None:
    deployed.allow(NAMES[1], "")
    deployed.allow(NAMES[2], "")
    private = {"dp": {"type": "example", "noise_multiplier": 1.0, "delta": 1e-3}}
    audit, once = {"leakage": True, "reserve": 0.4}, {"rounds": 1}
    made = deployed.run(config(tiny_folder, tmp_path, "private", audit=audit, privacy=private, federation=once))
    report = read_report(made.path / FOLDER)
    assert report is not None
    assert not report["figures"]
    assert "withholds its figures" in report["not_tried"][0]["why"]
    kept = site_report(deployed.site(NAMES[0]), "private")
    assert kept["figures"]["auc"] is None
    assert -1 <= kept["advantage"] <= 1
