"""``silotune quickstart``: four banks, one model, three ways to train it, and what each was worth."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from silotune.cli.output import AsJson, print_json, reserved_stdout, say, stdout, write_text

if TYPE_CHECKING:
    from collections.abc import Mapping

    from rich.table import Table

    from silotune.record.runs import RunFolder

_PROMPTS = 3


def quickstart(
    seed: Annotated[int | None, typer.Option(help="Seed of data, partition and training.")] = None,
    folder: Annotated[Path | None, typer.Option(help="Where to put the run folder.")] = None,
    as_json: AsJson = False,
) -> None:
    """Fine-tune the shipped model over four banks in a minute or two, and compare."""
    from silotune.cli.run import say_loading, watched

    say_loading(as_json)
    from silotune.config import load_config
    from silotune.experiment.run import run_experiment
    from silotune.report.pictures import draw_rounds, draw_skew
    from silotune.report.run_page import write_run_page
    from silotune.report.runs import read_summary, tables_of
    from silotune.shipped import shipped

    changes = [] if seed is None else [f"seed={seed}"]
    changes += [] if folder is None else [f"record.folder={json.dumps(str(folder), ensure_ascii=False)}"]
    config = load_config(shipped("quickstart"), changes)
    run = watched(lambda observer: run_experiment(config, observer=observer), is_silent=as_json)
    summary = read_summary(run)
    with reserved_stdout(as_json):
        pictures = [draw_rounds(run, run.path / "accuracy.png"), draw_skew(run, run.path / "skew.png")]
        page = write_run_page(run.path)
    if as_json:
        print_json(compact(run, summary))
        return
    console = stdout()
    console.print(*tables_of(summary), sep="\n")
    console.print(_answers(run, config.evaluation.max_new_tokens))
    places = (run.path, page, *pictures)
    for title, place in zip(("run folder", "report", "by round", "by client"), places, strict=True):
        say(f"{title + ':':<12}{place}")
    write_text(_next_steps(run.path))


def compact(run: RunFolder, summary: Mapping[str, Any]) -> dict[str, Any]:
    """The figures that scripts want, without the rest of the summary."""
    names = ("accuracy", "macro_f1")
    alone = summary["isolated"]
    return {
        "isolated": {name: {which: alone[name][which] for which in ("mean", "best")} for name in names},
        "federated": {name: summary["federated"][name] for name in names},
        "centralized": {name: summary["centralized"][name] for name in names},
        "seconds": summary["seconds"],
        "bytes_up": summary["bytes_up"],
        "bytes_down": summary["bytes_down"],
        "run_dirs": [str(run.path)],
    }


def _answers(run: RunFolder, max_new_tokens: int) -> Table:
    """Test prompts, the first of each right answer, as the base and the tuned model answer them."""
    from rich.table import Table

    from silotune.evaluation.generate import Sampling, stream_answer
    from silotune.experiment.tuned import load_tuned, sample_prompts

    prompts = sample_prompts(run.path, _PROMPTS)
    sampling = Sampling(max_new_tokens=max_new_tokens)
    columns = []
    for is_base in (True, False):
        model = load_tuned(run.path, base=is_base)
        columns.append(["".join(stream_answer(model, messages, sampling)).strip() for messages, _ in prompts])
    table = Table(title="three test prompts", title_justify="left", show_lines=True)
    for heading in ("prompt", "right answer", "base model", "tuned together"):
        table.add_column(heading)
    for (messages, right), base, tuned in zip(prompts, *columns, strict=True):
        table.add_row(messages[-1][1], right, base, tuned)
    return table


def _next_steps(path: Path) -> str:
    return f"""what to type next:
  silotune chat {path}
  silotune export {path} my-adapter
  silotune configs list
  silotune run fpb --set data.root=FOLDER
"""
