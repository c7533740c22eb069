from __future__ import annotations

import os
from pathlib import Path

import pytest


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
    from silotune.sections import ModelSection

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
