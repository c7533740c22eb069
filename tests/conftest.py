from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--attacks", action="store_true", help="list the attacks that were made, with what refused each")


@pytest.fixture
def refused(record_property: Callable[[str, object], None]) -> Callable[..., None]:
    """Notes that an attacker's move was made and what refused it, for the list that ``--attacks`` prints."""
    return lambda who, move, by: record_property("attack", (who, move, by))


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    if not config.getoption("--attacks"):
        return
    reports = [report for outcome in ("passed", "failed") for report in terminalreporter.getreports(outcome)]
    made = [tuple(value) for report in reports for name, value in report.user_properties if name == "attack"]
    for who in dict.fromkeys(who for who, _, _ in made):
        own = [(move, by) for other, move, by in made if other == who]
        terminalreporter.section(f"{who}: {len(own)} attacks")
        for move, by in own:
            terminalreporter.line(f"{move}\n    refused by: {by}")


def pytest_collection_finish() -> None:
    """What the imports made stays: no collection of garbage needs to look at it again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def no_waiting_for_the_disk() -> Iterator[None]:
    """A sync in this process only looks at its descriptor: what it is for, a power cut, no test can make.

    A fifth of the time of the unit tests that write grids went there. Processes that tests start wait for disks.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", os.fstat)
        yield


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Tests share their machine; sums on one thread also come out the same everywhere."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import torch

    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def one_thread_again(one_thread: None) -> None:
    """A test before this one may have run a configuration that sets ``training.threads``, in this process."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny Llama with tokenizer and chat template."""
    import tiny

    return tiny.save(tmp_path_factory.mktemp("models") / "tiny-llama")


@pytest.fixture(scope="session")
def tiny_model(tiny_folder: Path):  # noqa: ANN201
    """The tiny Llama as a loaded base; read it, but put no adapter on it."""
    from silotune.models.load import load_base
    from silotune.settings.sections import ModelSection

    return load_base(ModelSection(name=str(tiny_folder), max_length=128))


@pytest.fixture(scope="module")
def model():  # noqa: ANN201
    """The tiny Llama with an adapter of its own for every test module."""
    import tiny

    return tiny.adapted()


@pytest.fixture(scope="module")
def start(model):  # noqa: ANN001, ANN201
    """The adapter's initial tensors."""
    from silotune.models import adapters

    return adapters.read(model)
