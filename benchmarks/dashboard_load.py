"""How fast the dashboard is over many long runs: start, first paint, and the time from a new row to the page.

    python benchmarks/dashboard_load.py --runs 50 --rounds 1000

It makes the folders, serves them, and measures what a visitor waits for: the first paint in Chromium where there is
one, the answer over HTTP, and how long after a row is written its change is received.
"""

from __future__ import annotations

import argparse
import http.client
import json
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from silotune.record.files import to_line
from silotune.record.runs import RunFolder

CLIENTS = 8
BINS = [
    {"from": low / 15, "to": (low + 1) / 15, "num_examples": 30, "confidence": 0.5, "accuracy": 0.5}
    for low in range(15)
]


def row(number: int) -> dict[str, object]:
    """A row as a run writes one, with all that the page does not show."""
    classes = {name: {"precision": 0.5, "recall": 0.5, "f1": 0.5, "support": 130} for name in ("low", "mid", "high")}
    return {
        "round": number, "split": "test", "num_examples": 400, "scoring": "likelihood", "accuracy": 0.3 + number / 3000,
        "macro_f1": 0.4, "per_class": classes, "confusion": [[1, 2, 3, 0]] * 3, "reliability": BINS,
        "train_loss": 1 / (1 + number / 100), "train_seconds": 4.0, "evaluate_seconds": 1.0, "bytes_up": 10**6,
        "bytes_down": 10**6, "cost": {"coordinator": {"joules": 1.0}, "evaluation": {"joules": 1.0}},
        "clients": [f"client-{place}" for place in range(CLIENTS)], "failures": [],
    }  # fmt: skip


def make(root: Path, runs: int, rounds: int) -> None:
    """Run folders that were stopped after so many rounds."""
    lines = b"".join(to_line(row(number)) for number in range(rounds + 1))
    own = [{"client": f"client-{place}", "num_examples": 100, "loss": 0.5, "steps": 4, "tokens": 2223, "seconds": 0.59,
            "core_seconds": 0.4, "joules": 2.0, "energy_source": "measured", "bytes_up": 318495, "bytes_down": 318439}
           for place in range(CLIENTS)]  # fmt: skip
    replies = b"".join(to_line({"round": number, **each}) for number in range(1, rounds + 1) for each in own)
    told = b"".join(
        to_line({"event": "round_finished", "time": 1.0, "mode": "federated", "metrics": row(number)})
        for number in range(rounds + 1)
    )
    for place in range(runs):
        config = {"federation": {"rounds": 2 * rounds, "min_replies": 2}, "data": {"task": "t"}, "model": {"name": "m"}}
        run = RunFolder.create(root, f"run-{place:02d}", config=config)
        run.append("events", {"event": "run_started", "time": 1.0, "modes": ["federated"]})
        with (run.path / "events.jsonl").open("ab") as file:
            file.write(told)
        (run.path / "federated").mkdir()
        (run.path / "federated" / "metrics.jsonl").write_bytes(lines)
        (run.path / "federated" / "clients.jsonl").write_bytes(replies)


def asked(port: int, path: str) -> float:
    """Seconds of one answer."""
    began = time.perf_counter()
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.request("GET", path)
    answer = connection.getresponse()
    assert answer.status == 200 and answer.read()
    return time.perf_counter() - began


def updates(port: int, path: str, run: Path, *, first: int, times: int) -> list[float]:
    """Seconds from a row that is written until a listener has its change."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.request("GET", f"/live?page={path}")
    answer = connection.getresponse()
    found = []
    while not answer.readline().startswith(b"data: "):
        pass
    for number in range(first, first + times):
        time.sleep(0.3)
        began = time.perf_counter()
        with (run / "federated" / "metrics.jsonl").open("ab") as file:
            file.write(to_line(row(number)))
        while f"{number} of ".encode() not in answer.readline():
            pass
        found.append(time.perf_counter() - began)
    connection.close()
    return found


def painted(port: int, path: str) -> float | None:
    """Seconds until Chromium has painted the page's content; None where there is no Chromium."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
    from dashboard.browser import chromium, opened

    if chromium() is None:
        return None
    with tempfile.TemporaryDirectory() as folder, opened(Path(folder)) as tab:
        tab.go(f"http://127.0.0.1:{port}{path}")
        tab.until("performance.getEntriesByName('first-contentful-paint').length > 0")
        return float(tab.value("performance.getEntriesByName('first-contentful-paint')[0].startTime")) / 1000


def measure(root: Path, runs: int, rounds: int) -> dict[str, object]:
    """All figures, in seconds."""
    began = time.perf_counter()
    command = [sys.executable, "-m", "silotune.cli.main", "dashboard", str(root), "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        found = re.search(r":(\d+)/", process.stdout.readline())
        assert found is not None
        port, start = int(found[1]), time.perf_counter() - began
        first = asked(port, "/")
        newest = root / "run-00"
        after = {name: updates(port, path, newest, first=rounds + shift, times=20)
                 for name, path, shift in (("run", "/run/run-00", 1), ("list", "/", 50))}  # fmt: skip
        update = {name: {"median": statistics.median(own), "largest": max(own)} for name, own in after.items()}
        return {
            "runs": runs, "rounds": rounds, "start": start, "first_answer_list": first,
            "answer_run": asked(port, "/run/run-01"),
            "first_paint_list": painted(port, "/"), "first_paint_run": painted(port, "/run/run-02"),
            "update": update,
        }  # fmt: skip
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(timeout=30)


def main() -> None:
    """Makes the folders and prints the figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=1000)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "runs"
        make(root, given.runs, given.rounds)
        print(json.dumps(measure(root, given.runs, given.rounds), indent=2))


if __name__ == "__main__":
    main()
