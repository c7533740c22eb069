from __future__ import annotations

import subprocess
import sys

import pytest

import silotune

PUBLIC = {"run", "resume", "evaluate", "generate", "export", "load_config", "Sampling", "SilotuneError", "__version__"}


def test_the_public_names_are_these() -> None:
    assert set(silotune.__all__) == PUBLIC
    assert sorted(silotune.__all__, key=str.lower) == sorted(PUBLIC, key=str.lower)
    for name in PUBLIC:
        assert getattr(silotune, name) is not None
    with pytest.raises(AttributeError, match="no_such_name"):
        silotune.no_such_name  # noqa: B018


def test_public_functions_are_those_of_their_modules() -> None:
    from silotune.config import load_config
    from silotune.errors import SilotuneError
    from silotune.evaluation.generate import Sampling
    from silotune.experiment import public

    for name in ("run", "resume", "evaluate", "generate", "export"):
        assert getattr(silotune, name) is getattr(public, name)
    assert silotune.load_config is load_config
    assert silotune.Sampling is Sampling
    assert silotune.SilotuneError is SilotuneError


def test_importing_imports_no_torch() -> None:
    code = (
        "import sys, silotune; dir(silotune); silotune.load_config, silotune.SilotuneError\n"
        "heavy = {'torch', 'transformers', 'peft', 'datasets', 'flwr', 'sklearn', 'matplotlib'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_the_version_is_the_package_s() -> None:
    import tomllib
    from pathlib import Path

    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert silotune.__version__ == project["version"]
