"""The quick start on a machine as it is and beside busy neighbours, for several ways to use its threads, in turn.

    python benchmarks/neighbours.py --markdown

Each run is a process of its own with few rounds; its seconds are those of its modes, training and scoring, without
imports and loading. A neighbour is a process that keeps one core busy. Ends with code 1 when silotune's own way is
slower on the machine as it is than operations on all threads by more than a tenth, or beside neighbours by anything.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from measure import Result, all_passed, run_child, speed_up, table

ROUNDS = 3
REPETITIONS = 3
MOST_LOST = 1.1
"""Times the seconds of operations on all threads, on the machine as it is: a clock's readings differ by as much."""
VARIABLES = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
BUSY = "while True: pass"


@dataclass(frozen=True)
class Way:
    """How a run uses its threads.

    Attributes:
        variables: Environment variables that torch's OpenMP reads when it is loaded.
        is_spread: Whether every operation takes all threads, however small the base is.
    """

    variables: Mapping[str, str]
    is_spread: bool = False


WAYS: Mapping[str, Way] = {
    "operations on all threads": Way({}, is_spread=True),
    "the same, waiting briefly": Way({"GOMP_SPINCOUNT": "10000"}, is_spread=True),
    "the same, waiting passively": Way({"OMP_WAIT_POLICY": "PASSIVE"}, is_spread=True),
    "one thread in all (OMP_NUM_THREADS=1)": Way({"OMP_NUM_THREADS": "1"}),
    "silotune's own": Way({"GOMP_SPINCOUNT": "10000"}),
}
PLAIN, *_, OWN = WAYS


def one_run(model: str, rounds: int, folder: Path, *, is_spread: bool) -> dict[str, float]:
    """Seconds of each mode of the quick start."""
    from silotune.config import load_config
    from silotune.experiment.run import run_experiment
    from silotune.models import threads
    from silotune.shipped import shipped

    if is_spread:
        threads.LARGEST_ON_ONE_THREAD = 0  # type: ignore[misc]
    changes = [
        f"model.name={json.dumps(model)}",
        f"federation.rounds={rounds}",
        f"record.folder={json.dumps(str(folder))}",
        "record.energy=false",
    ]
    run = run_experiment(load_config(shipped("quickstart"), changes))
    seconds: dict[str, float] = {}
    for path in sorted(run.path.glob("**/result.json")):
        mode, result = path.relative_to(run.path).parts[0], json.loads(path.read_text(encoding="utf-8"))
        seconds[mode] = seconds.get(mode, 0.0) + result["seconds"] + result["evaluate_seconds"]
    return seconds


@contextmanager
def neighbours(count: int) -> Iterator[Sequence[subprocess.Popen[bytes]]]:
    """So many processes beside this one that each keep a core busy."""
    started = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(count)]
    try:
        yield started
    finally:
        for process in started:
            process.kill()
            process.wait()


def measured(model: str, rounds: int, counts: Sequence[int], repetitions: int) -> list[Result]:
    """Every way on the machine as it is and beside neighbours, in turn."""
    times: dict[tuple[int, str, str], list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(repetitions):
            for count in counts:
                for place, (name, way) in enumerate(WAYS.items()):
                    output = Path(folder) / f"{number}-{count}-{place}"
                    with neighbours(count):
                        seconds = _in_a_process(model, rounds, output, way)
                    for mode, spent in {**seconds, "all modes": sum(seconds.values())}.items():
                        times.setdefault((count, name, mode), []).append(spent)
                    print(f"{number + 1}/{repetitions}, {count} neighbours, {name}: {seconds}", file=sys.stderr)
    return [
        _result(count, name, mode, times[count, PLAIN, mode], own)
        for (count, name, mode), own in times.items()
        if name != PLAIN
    ]


def _in_a_process(model: str, rounds: int, output: Path, way: Way) -> dict[str, float]:
    kept = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    variables = [f"{name}={value}" for name, value in {**kept, **way.variables}.items()]
    spread = ["--spread"] if way.is_spread else []
    own = [sys.executable, __file__, "--model", model, "--rounds", str(rounds), "--one", str(output), *spread]
    run_child(["env", "-i", *variables, *own], output.with_suffix(".log"))
    found: dict[str, float] = json.loads(output.with_suffix(".json").read_text(encoding="utf-8"))
    return found


def _result(count: int, name: str, mode: str, plain: Sequence[float], own: Sequence[float]) -> Result:
    bound = (1.0 if count else 1 / MOST_LOST) if name == OWN and mode == "all modes" else None
    part = f"{count} neighbours" if count else "as it is"
    return Result(part, f"{mode}, seconds: {name}", tuple(plain), tuple(own), speed_up(plain, own), bound)


def main() -> int:
    """The command line; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="nano", help="a base model's name or folder")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--repetitions", type=int, default=REPETITIONS)
    parser.add_argument("--neighbours", type=int, default=2)
    parser.add_argument("--markdown", action="store_true")
    parser.add_argument("--one", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--spread", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one is not None:
        seconds = one_run(given.model, given.rounds, given.one, is_spread=given.spread)
        given.one.with_suffix(".json").write_text(json.dumps(seconds), encoding="utf-8")
        return 0
    results = measured(given.model, given.rounds, (0, given.neighbours), given.repetitions)
    print(table(results, markdown=given.markdown))
    return 0 if all_passed(results) else 1


if __name__ == "__main__":
    sys.exit(main())
