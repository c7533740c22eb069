"""Measures silotune beside what one would write today: Flower's simulation on Ray with trl's SFTTrainer in the client.

Run it as ``python benchmarks/against_flower_trl.py --json benchmarks/results.json``; README.md here says what is
compared. It ends with code 1 when a bound or the equality of the losses does not hold.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from measure import (
    Child,
    Result,
    all_passed,
    as_document,
    from_document,
    machine,
    read_document,
    relative_difference,
    run_child,
    speed_up,
    table,
)
from workload import Settings, default_model, nano, widen

HERE = Path(__file__).resolve().parent
MIB = 1 << 20
SAME_TOKENS = 0.99
"""Share of held-out examples that both sides must tokenize alike for the comparison to mean anything."""
MANY_CLIENTS, FEW_CLIENTS = 1000, 10
FASTER = 5.0
TUNED_CPUS = 1
WIDE = 32_000
"""Vocabulary of Llama 2 and Mistral; later models have four to eight times as much."""
STUDY_STEP = ("--shape", "smollm2", "--batch-size", "4", "--threads", "1")
STUDY_EXAMPLES = 40
"""Ten steps of four texts."""
SHORT_STEPS = 4
"""Of a round where clients meet often, beside the ten of FlowerTune's template."""
WIDE_RATE, WIDE_STEPS = 3e-4, SHORT_STEPS
"""nano knows this text: at 1e-3 its loss ended at .3 nats, of which the order of batches decided a tenth."""


@dataclass(frozen=True, slots=True)
class Bench:
    """What every part needs: the shared settings, repetitions, a folder to work in, and where to say what goes on."""

    settings: Settings
    repetitions: int
    folder: Path
    step_examples: int
    say: Callable[[str], None]


def end_to_end(bench: Bench, part: str = "end-to-end", *, faster: float | None = FASTER) -> list[Result]:
    """Both federations, each repetition in fresh processes, the order alternating; ``faster`` bounds the times."""
    from score import evaluation_loss
    from silotune_side import prepare

    folder = _new(bench, part)
    shared = prepare(folder, bench.settings)
    if shared < SAME_TOKENS:
        raise RuntimeError(f"only {shared:.1%} of the examples have the same tokens on both sides; use another model")
    runs: dict[str, list[Child]] = {"flower_trl_app": [], "silotune_side": []}
    adapters: dict[str, list[Path]] = {side: [] for side in runs}
    for number in range(bench.repetitions):
        for side in _order(tuple(runs), number):
            output = folder / f"{side}-{number}.safetensors"
            child = _run(side, folder, output)
            bench.say(f"{part} {number + 1}/{bench.repetitions} {side}: {child.seconds:.1f} s")
            runs[side].append(child)
            adapters[side].append(output)
    losses = {side: evaluation_loss(bench.settings, folder, paths) for side, paths in adapters.items()}
    start = evaluation_loss(bench.settings, folder, [folder / "initial.safetensors"])[0]
    return _end_to_end_results(bench.settings, runs, losses, start, part=part, faster=faster)


def end_to_end_tuned(bench: Bench) -> list[Result]:
    """The same beside a peer whose user has found the setting that suits small models: one core a client."""
    tuned = replace(bench, settings=replace(bench.settings, peer_cpus=TUNED_CPUS))
    return end_to_end(tuned, "end-to-end-tuned", faster=None)


def end_to_end_short(bench: Bench) -> list[Result]:
    """The same with fewer local steps a round: what a message costs counts for more, what a step costs for less."""
    short = replace(bench, settings=replace(bench.settings, local_steps=SHORT_STEPS))
    return end_to_end(short, "end-to-end-short")


def end_to_end_32k(bench: Bench) -> list[Result]:
    """The same with a vocabulary as real models have: nano, its embedding and head widened to 32,000 rows."""
    model = bench.folder / "nano-32k"
    if not model.is_dir():
        widen(nano(HERE.parent), model, WIDE)
    settings = replace(
        bench.settings, model=str(model), peer_cpus=TUNED_CPUS, learning_rate=WIDE_RATE, local_steps=WIDE_STEPS
    )
    return end_to_end(replace(bench, settings=settings), "end-to-end-32k")


def _end_to_end_results(
    settings: Settings,
    runs: Mapping[str, Sequence[Child]],
    losses: Mapping[str, Sequence[float]],
    start: float,
    *,
    part: str = "end-to-end",
    faster: float | None = FASTER,
) -> list[Result]:
    peer, own = runs["flower_trl_app"], runs["silotune_side"]
    seconds = tuple(child.seconds for child in peer), tuple(child.seconds for child in own)
    memory = tuple(child.peak_bytes / MIB for child in peer), tuple(child.peak_bytes / MIB for child in own)
    peer_losses, own_losses = tuple(losses["flower_trl_app"]), tuple(losses["silotune_side"])
    apart = max(relative_difference(one, other) for one, other in zip(peer_losses, own_losses, strict=True))
    learnt = start / max(*peer_losses, *own_losses)
    size = f"{settings.clients} clients x {settings.rounds} rounds"
    return [
        Result(part, f"{size}, seconds", *seconds, speed_up(*seconds), faster),
        Result(part, "peak memory of all processes, MiB", *memory, speed_up(*memory)),
        Result(part, "final loss; relative difference", peer_losses, own_losses, apart, 0.02, "at most"),
        Result(part, f"loss of the first adapter ({start:.4g}) over the final one", (), (), learnt, 1.05),
    ]


def step(bench: Bench) -> list[Result]:
    """A local training step on closed-ended and on open data, both sides in one process."""
    return _steps(bench, "step", {"fpb-like": 2.5, "instruct": 1.2})


def step_smollm2(bench: Bench) -> list[Result]:
    """The same on SmolLM2-135M's shape, as the study of real language models trains it: four texts, one thread."""
    few = replace(bench, step_examples=min(bench.step_examples, STUDY_EXAMPLES))
    return _steps(few, "step-smollm2", {"fpb-like": 1.0, "instruct": 1.0}, *STUDY_STEP)


def _steps(bench: Bench, part: str, bounds: Mapping[str, float], *more: str) -> list[Result]:
    results = []
    for kind, bound in bounds.items():
        output = _new(bench, part) / f"{kind}.json"
        sizes = ["--examples", str(bench.step_examples), "--repetitions", str(bench.repetitions), *more]
        run_child([sys.executable, str(HERE / "steps.py"), kind, str(output), *sizes], output.with_suffix(".log"))
        sides = json.loads(output.read_text(encoding="utf-8"))
        bench.say(f"{part} {kind}: done")
        means = tuple(sides["peer"]), tuple(sides["silotune"])
        medians = tuple(sides["peer_median"]), tuple(sides["silotune_median"])
        results.append(Result(part, f"{kind}, median step, seconds", *medians, speed_up(*medians), bound))
        results.append(Result(part, f"{kind}, mean step, seconds", *means, speed_up(*means), bound))
    return results


def overhead(bench: Bench) -> list[Result]:
    """The rounds' wall time over the local training inside them, one client at a time so that the two compare."""
    from silotune_side import prepare

    folder = _new(bench, "overhead")
    prepare(folder, replace(bench.settings, workers=1))
    rounds, local = [], []
    for number in range(bench.repetitions):
        output = folder / f"silotune-{number}.safetensors"
        _run("silotune_side", folder, output)
        measured = json.loads(output.with_suffix(".json").read_text(encoding="utf-8"))
        rounds.append(measured["rounds_seconds"])
        local.append(measured["local_seconds"])
        bench.say(f"overhead {number + 1}/{bench.repetitions}: {rounds[-1]:.2f} s around {local[-1]:.2f} s")
    what = "wall time of the rounds against the local training in them, seconds"
    ratio = statistics.median(wall / inside for wall, inside in zip(rounds, local, strict=True))
    return [Result("overhead", what, tuple(local), tuple(rounds), ratio, 1.05, "at most")]


def memory(bench: Bench) -> list[Result]:
    """Growth of one process's peak memory from few clients to many, in adapters a client."""
    from silotune_side import prepare

    tiny = replace(bench.settings, rounds=2, local_steps=1, batch_size=4, examples_per_client=4, held_out=8)
    peaks: dict[int, list[float]] = {FEW_CLIENTS: [], MANY_CLIENTS: []}
    adapter_bytes = 0
    for clients, peak in peaks.items():
        folder = _new(bench, f"memory-{clients}")
        prepare(folder, replace(tiny, clients=clients))
        adapter_bytes = (folder / "initial.safetensors").stat().st_size
        for number in range(bench.repetitions):
            output = folder / f"silotune-{number}.safetensors"
            _run("silotune_side", folder, output)
            peak.append(json.loads(output.with_suffix(".json").read_text(encoding="utf-8"))["peak_bytes"] / MIB)
            bench.say(f"memory {clients} clients {number + 1}/{bench.repetitions}: {peak[-1]:.0f} MiB")
    few, many = tuple(peaks[FEW_CLIENTS]), tuple(peaks[MANY_CLIENTS])
    growth = statistics.median(many) - statistics.median(few)
    ratio = growth * MIB / (MANY_CLIENTS - FEW_CLIENTS) / adapter_bytes
    what = f"peak memory with {FEW_CLIENTS} and with {MANY_CLIENTS} clients, MiB; growth a client in adapters"
    return [Result("memory", what, few, many, ratio, 1.0, "at most")]


PARTS: Mapping[str, Callable[[Bench], list[Result]]] = {
    "end-to-end": end_to_end,
    "end-to-end-short": end_to_end_short,
    "end-to-end-tuned": end_to_end_tuned,
    "end-to-end-32k": end_to_end_32k,
    "step": step,
    "step-smollm2": step_smollm2,
    "overhead": overhead,
    "memory": memory,
}


def _new(bench: Bench, name: str) -> Path:
    folder = bench.folder / name
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _order(sides: tuple[str, ...], number: int) -> tuple[str, ...]:
    """Who goes first changes with each repetition."""
    return sides if number % 2 == 0 else sides[::-1]


def _run(side: str, folder: Path, output: Path) -> Child:
    command = [sys.executable, str(HERE / f"{side}.py"), str(folder), str(output)]
    return run_child(command, output.with_suffix(".log"))


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--repetitions", type=int, default=3, help="of each side; the published table has at least 3")
    parser.add_argument("--model", type=Path, default=default_model(HERE.parent), help="folder of the base model")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--local-steps", type=int, default=10)
    parser.add_argument("--step-examples", type=int, default=320, help="one epoch of the step part")
    parser.add_argument("--peer-cpus", type=int, default=2, help="cores that a Flower client asks of Ray (Flower's: 2)")
    parser.add_argument("--keep-model", action="store_true", help="let the peer's workers load the model only once")
    parser.add_argument("--work", type=Path, help="folder to keep logs and adapters in; default: a temporary one")
    parser.add_argument("--json", type=Path, help="file for everything that was measured")
    parser.add_argument("--markdown", action="store_true", help="print the table for a Markdown page")
    parser.add_argument("--show", type=Path, help="measure nothing, print the table of an earlier --json file")
    return parser.parse_args(arguments)


def measured(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Runs the chosen parts; the document holds their results, the machine and the settings."""
    settings = Settings(
        model=str(options.model.resolve()),
        clients=options.clients,
        rounds=options.rounds,
        local_steps=options.local_steps,
        peer_cpus=options.peer_cpus,
        keep_model=options.keep_model,
    )
    bench = Bench(
        settings, options.repetitions, folder, options.step_examples, lambda line: print(line, file=sys.stderr)
    )
    where = machine()
    results = [result for part in options.parts for result in PARTS[part](bench)]
    shown = {**asdict(settings), "model": options.model.name, "repetitions": options.repetitions}
    return as_document(results, where, shown)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures or shows; returns the exit code."""
    options = parse(arguments)
    if options.show:
        document = read_document(options.show)
    else:
        with tempfile.TemporaryDirectory() as temporary:
            document = measured(options, options.work or Path(temporary))
        if options.json:
            options.json.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    results = from_document(document)
    print(table(results, markdown=options.markdown))
    where = document["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in where["versions"].items())
    print(f"\n{where['processor']}, {where['cores']} cores, Python {where['python']}; {versions}")
    return 0 if all_passed(results) else 1


if __name__ == "__main__":
    sys.exit(main())
