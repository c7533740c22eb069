"""The dashboard in headless Chromium: the page says what the folder says, and says it again when the folder changes."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from dashboard.browser import Tab, chromium, opened
from finished_run import finished_run
from silotune.record.runs import RunFolder

pytestmark = [
    pytest.mark.end_to_end,
    pytest.mark.skipif(chromium() is None, reason="no Chromium here: apt-get install chromium"),
]
NAME = "half"


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    finished_run(tmp_path / "runs", "done").path.rename(tmp_path / "runs" / "<script>done")
    run = RunFolder.create(tmp_path / "runs", NAME, config={"federation": {"rounds": 40, "min_replies": 1}})
    run.append("events", {"event": "run_started", "time": 1.0, "modes": ["federated"]})
    for number in range(31):
        run.part("federated").append("clients", {"round": number, "client": "bank-0", "loss": 2 - number / 40})
        run.part("federated").append("metrics", {"round": number, "accuracy": number / 100, "train_loss": 1.0})
    return run


@pytest.fixture
def address(run: RunFolder) -> Iterator[str]:
    command = [sys.executable, "-m", "silotune.cli.main", "dashboard", str(run.path.parent), "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        found = re.search(r"open (http://\S+)", process.stdout.readline())
        assert found is not None
        yield found[1]
    finally:
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=30) in (0, 130), "it ends at once when asked to"


def test_a_browser_shows_what_the_folder_says_and_what_comes(run: RunFolder, address: str, tmp_path: Path) -> None:
    with opened(tmp_path) as tab:
        tab.go(address)
        tab.until("document.getElementById('live').textContent === 'live'")
        rows = tab.value("[...document.querySelectorAll('#runs tbody tr')].map(row => row.innerText).join('|')")
        assert "30 of 40" in rows and "30.0 %" in rows and "<script>done" in rows and "80.0 %" in rows
        _by_keyboard(tab)
        tab.until("document.getElementById('head') !== null && document.getElementById('live').textContent === 'live'")
        assert tab.value("document.querySelector('h1').innerText").startswith(NAME)
        tab.value("document.getElementById('newest-rounds').open = true")
        before = time.monotonic()
        run.part("federated").append("metrics", {"round": 31, "accuracy": 0.97, "train_loss": 0.5})
        tab.until("document.querySelector('#newest-rounds tbody').innerText.includes('97.0 %')")
        assert time.monotonic() - before < 5
        assert tab.value("document.querySelector('#head .facts').innerText").count("97.0 %") == 1
        assert tab.value("document.getElementById('newest-rounds').open") is True, "what was opened stays open"
        for width in (390, 1280):
            tab.size(width)
            wide = tab.value("document.documentElement.scrollWidth - window.innerWidth")
            assert wide <= 0, f"the page is wider than a screen of {width}"
        light = tab.value("getComputedStyle(document.body).backgroundColor")
        tab.dark()
        assert tab.value("getComputedStyle(document.body).backgroundColor") != light
        _without_scripts(tab, address)
        assert tab.said == [], "the console is silent"


def _by_keyboard(tab: Tab) -> None:
    """To the run's page with Tab and Enter alone."""
    for _ in range(12):
        tab.press("Tab")
        if tab.value("document.activeElement.innerText") == NAME:
            break
    assert tab.value("document.activeElement.innerText") == NAME
    tab.press("Enter")


def _without_scripts(tab: Tab, address: str) -> None:
    tab.scripts(are_on=False)
    tab.go(f"{address}run/{NAME}")
    shown = " ".join(tab.text().split())
    assert "97.0 %" in shown and "31 of 40" in shown and "bank-0" in shown
