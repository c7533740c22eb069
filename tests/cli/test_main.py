from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import pytest

from silotune import errors, quiet
from silotune.cli import main as entry

HEAVY = ("torch", "transformers", "peft", "matplotlib", "datasets", "sklearn", "numpy")


def python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)


def child_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


@pytest.mark.end_to_end
def test_help_is_fast_and_imports_nothing_heavy():
    code = (
        "import sys, atexit\n"
        f"atexit.register(lambda: print('HEAVY', [name for name in {HEAVY} if name in sys.modules]))\n"
        "from silotune.cli.main import main; main()"
    )
    times = []  # of the processor: what other processes do on the machine does not count
    for _ in range(3):
        began = child_seconds()
        done = python(code, "--help")
        times.append(child_seconds() - began)
        assert done.returncode == 0, done.stderr
        assert "HEAVY []" in done.stdout
        assert "quickstart" in done.stdout and "Exit codes" in done.stdout
    assert min(times) < 0.7, times


@pytest.mark.parametrize(
    "command",
    ["quickstart", "run", "resume", "evaluate", "generate", "chat", "export", "report", "doctor", "configs", "tasks"],
)
def test_every_command_explains_itself(silotune, command):
    outcome = silotune(command, "--help")
    assert outcome.code == 0 and "Usage: silotune" in outcome.out


def test_version(silotune):
    outcome = silotune("--version")
    assert outcome.code == 0 and outcome.out.startswith("silotune ")


@pytest.mark.parametrize("arguments", [("nonsense",), ("run",), ("report",), ("generate", "x", "--top-p", "7")])
def test_wrong_usage_is_exit_code_2(silotune, arguments):
    outcome = silotune(*arguments)
    assert outcome.code == 2 and outcome.err and not outcome.out


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.SilotuneError, 1), (errors.ConfigError, 2), (errors.DataError, 3), (errors.ModelError, 4),
        (errors.TrainingError, 5), (errors.FederationError, 6), (errors.MessageError, 6), (errors.RunFolderError, 7),
        (errors.MissingPackageError, 8),
    ],
)  # fmt: skip
def test_each_error_is_one_line_and_its_exit_code(silotune, below, monkeypatch, error, code):
    def fail(*_: object, **__: object) -> None:
        raise error("it went\nwrong")

    monkeypatch.setattr(sys.modules["silotune.experiment.tuned"], "evaluate", fail)
    outcome = silotune("evaluate", "runs/x", "--json")
    assert (outcome.code, outcome.out, outcome.err) == (code, "", "error: it went wrong\n")
    with pytest.raises(error):
        entry.main(["--debug", "evaluate", "runs/x"])
    monkeypatch.setenv("SILOTUNE_DEBUG", "1")
    with pytest.raises(error):
        entry.main(["evaluate", "runs/x"])


def test_each_fault_of_a_configuration_has_its_line(silotune, below, tmp_path):
    path = tmp_path / "bad.toml"
    path.write_text("seed = -1\n[model]\nnam = 'x'\n")
    outcome = silotune("run", path)
    assert outcome.code == 2
    lines = outcome.err.splitlines()
    assert len(lines) == 2 and all(line.startswith("error: ") for line in lines)
    assert any("did you mean 'name'" in line for line in lines)


def test_a_broken_toml_and_a_missing_one_are_one_line(silotune, below, tmp_path):
    (tmp_path / "bad.toml").write_text("seed = = 1")
    for path in (tmp_path / "bad.toml", tmp_path / "none.toml"):
        outcome = silotune("run", path)
        assert outcome.code == 2 and outcome.err.count("\n") == 1


def test_an_interrupt_is_130_and_says_how_to_go_on(silotune, below, monkeypatch):
    def interrupted(config: object, *, observer: object = None) -> None:
        observer("run_started", {"folder": "runs/x", "task": "t", "model": "m"})
        raise KeyboardInterrupt

    monkeypatch.setattr(sys.modules["silotune.experiment.run"], "run_experiment", interrupted)
    outcome = silotune("run", "fpb")
    assert outcome.code == 130 and "silotune resume runs/x" in outcome.out


def test_an_interrupt_at_any_moment_is_130(silotune, monkeypatch):
    def interrupted() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(entry, "build_app", interrupted)
    assert silotune("tasks").code == 130


def test_no_command_shows_the_help(silotune):
    for arguments in ((), ("configs",)):
        outcome = silotune(*arguments)
        assert outcome.code == 2 and "Usage: silotune" in outcome.out + outcome.err


def test_quiet_leaves_what_the_user_has_set(monkeypatch):
    import logging
    import os
    import warnings

    for name in quiet.VARIABLES:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "debug")
    levels = {name: logging.getLogger(name).level for name in quiet.LOGGERS}
    try:
        with warnings.catch_warnings():
            quiet.hush()
        assert os.environ["TRANSFORMERS_VERBOSITY"] == "debug"
        assert os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] == "1"
        assert logging.getLogger("kernels").level == logging.ERROR
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


def test_the_bars_of_a_program_are_off_while_silotune_works_and_on_again_afterwards():
    from transformers.utils import logging as bars

    had_bars = bars.is_progress_bar_enabled()
    bars.enable_progress_bar()
    try:
        with quiet.hushed():
            assert not bars.is_progress_bar_enabled()
        assert bars.is_progress_bar_enabled()
    finally:
        (bars.enable_progress_bar if had_bars else bars.disable_progress_bar)()


def test_no_command_file_is_long():
    for path in Path(entry.__file__).parent.glob("*.py"):
        assert len(path.read_text().splitlines()) < 250, path


@pytest.mark.parametrize(
    ("chosen", "found"),
    [
        ({}, "None 10000"),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE None"),
        ({"GOMP_SPINCOUNT": "7"}, "None 7"),
    ],
)
def test_waiting_threads_sleep_soon_unless_the_user_has_chosen(monkeypatch, chosen, found):
    names = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
    for name in names:
        monkeypatch.delenv(name, raising=False)
    for name, value in chosen.items():
        monkeypatch.setenv(name, value)
    code = (
        "import atexit, os\n"
        f"atexit.register(lambda: print(*(os.environ.get(name) for name in {names})))\n"
        "from silotune.cli.main import main; main()"
    )
    done = python(code, "--version")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == found


def test_h_is_help_everywhere(silotune):
    for arguments in (("-h",), ("run", "-h"), ("site", "check", "-h")):
        outcome = silotune(*arguments)
        assert outcome.code == 0 and "Usage: silotune" in outcome.out
