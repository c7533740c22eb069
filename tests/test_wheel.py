"""The built wheel holds what a user needs, and runs outside the repository."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAX_BYTES = 20_000_000
SMALL = (
    "data.num_train=40", "data.num_validation=6", "data.num_test=12", "data.partition.clients=2",
    "training.max_steps=1", "federation.rounds=1", "evaluation.bootstrap_samples=0",
)  # fmt: skip

pytestmark = pytest.mark.end_to_end


def run(*words: object, folder: Path, **variables: str) -> str:
    """The standard output of a command; fails with its standard error."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | variables
    done = subprocess.run(
        [str(word) for word in words], cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("dist")
    isolation = ["--no-isolation"] if importlib.util.find_spec("hatchling") else []
    run(sys.executable, "-m", "build", "--wheel", *isolation, "--outdir", out, ROOT, folder=out)
    (made,) = out.glob("*.whl")
    return made


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the package alone; its dependencies come from the environment."""
    site = tmp_path_factory.mktemp("site")
    pip = (sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps", "--no-index")
    run(*pip, "--target", site, wheel, folder=site)
    return site


def test_it_holds_what_a_user_needs_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        metadata = archive.read("silotune-0.1.0.dist-info/METADATA").decode()
    configs = {f"silotune/configs/{path.relative_to(ROOT / 'configs')}" for path in (ROOT / "configs").rglob("*.toml")}
    nano = {f"silotune/models/nano/{path.name}" for path in (ROOT / "src/silotune/models/nano").iterdir()}
    assert {"silotune/models/nano/model.safetensors", "silotune/models/nano/README.md"} <= nano
    templates = {f"silotune/report/templates/grid.{form}.jinja" for form in ("html", "md")}
    kits = {f"silotune/deploy/templates/{path.name}" for path in (ROOT / "src/silotune/deploy/templates").iterdir()}
    worlds = {f"silotune/data/embedded/{name}.toml" for name in ("finance", "medicine", "notes", "talk")}
    assert "silotune/configs/benchmarks/embedded.toml" in configs
    assert configs | nano | templates | kits | worlds <= names
    assert {"silotune/py.typed", "silotune-0.1.0.dist-info/licenses/LICENSE"} <= names
    sources = {str(path.relative_to(ROOT / "src")) for path in (ROOT / "src").rglob("*.py")}
    assert {name for name in names if name.endswith(".py")} == sources
    assert wheel.stat().st_size < MAX_BYTES
    for line in (
        "License-Expression: Apache-2.0",
        "Requires-Python: <3.14,>=3.11",
        "Description-Content-Type: text/markdown",
    ):
        assert line in metadata


def test_it_runs_outside_the_repository(installed: Path, tmp_path: Path) -> None:
    def silotune(*words: str) -> str:
        variables = {"PYTHONPATH": str(installed), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        return run(sys.executable, installed / "bin" / "silotune", *words, folder=tmp_path, **variables)

    assert silotune("--version") == "silotune 0.1.0\n"
    (quickstart,) = [item for item in json.loads(silotune("configs", "list", "--json")) if item["name"] == "quickstart"]
    assert Path(quickstart["path"]).is_relative_to(installed)
    changes = [word for change in SMALL for word in ("--set", change)]
    summary = json.loads(silotune("run", "quickstart", *changes, "--json"))
    assert Path(summary["folder"]) == Path("runs/quickstart") and summary["model"] == "nano"
    assert (tmp_path / "runs/quickstart/federated/adapter/adapter_model.safetensors").is_file()
    assert summary["split"] == "test" and summary["federated"]["bytes_up"] > 0
