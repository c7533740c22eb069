"""Shows how a run goes on: bars on a terminal, one plain line per round elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, Task, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from silotune.cli.output import say_to
from silotune.record.printable import counted
from silotune.report.runs import KINDS, seconds_text

_TITLES = {"federated": "federated", "isolated": "each alone", "centralized": "centralised"}


def figure_text(metrics: Mapping[str, Any] | None) -> str:
    """The main figure among metrics, such as ``accuracy 71.2 %``; empty when there is none."""
    for key in ("accuracy", "perplexity", "preference_accuracy"):
        if metrics and metrics.get(key) is not None:
            return f"{KINDS[key].title} {KINDS[key].text(metrics[key])}"
    return ""


def count_text(number: float | None) -> str:
    """A number of parameters for people: ``1.9 M``."""
    if number is None:
        return "?"
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return str(int(number))


def _joined(*parts: str) -> str:
    return ", ".join(part for part in parts if part)


def _loss_text(loss: float | None) -> str:
    return "" if loss is None else f"loss {loss:.3f}"


def _title(fields: Mapping[str, Any]) -> str:
    mode = str(fields["mode"])
    client = fields.get("client")
    return _TITLES.get(mode, mode) + (f" {client}" if client and mode == "isolated" else "")


class RunProgress:
    """An observer of a run; call it as ``progress(event, fields)`` inside its ``with`` block."""

    def __init__(self, console: Console) -> None:
        self.folder: str | None = None
        self._clients = 1
        self._console = console
        self._view = _Bars(console) if console.is_terminal else _Lines(console)

    def __enter__(self) -> Self:
        self._view.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._view.stop()
        if isinstance(error, KeyboardInterrupt) and self.folder:
            say_to(self._console, f"interrupted; go on with: silotune resume {self.folder}")

    def __call__(self, event: str, fields: Mapping[str, Any]) -> None:
        """Takes one event of the run; events it does not know are left out."""
        if event == "run_started":
            self.folder, self._clients = str(fields["folder"]), int(fields.get("clients") or 1)
            trained = f"{count_text(fields.get('trainable'))} of {count_text(fields.get('num_parameters'))} parameters"
            self.say(f"{fields['task']} with {fields['model']}: training {trained}; run folder {self.folder}")
        elif event == "privacy":
            for line in fields["statement"]:
                self.say(f"privacy: {line}")
        elif event == "note":
            self.say(f"note: {fields['text']}")
        elif event == "client_failed":
            self.say(f"client {fields['client']} failed in round {fields['round']}: {fields['reason']}")
        elif event == "mode_started":
            self._view.mode_started({"clients": self._clients if fields["mode"] == "isolated" else 1, **fields})
        elif event in ("client_finished", "round_finished", "mode_finished"):
            getattr(self._view, event)(fields)

    def say(self, text: str) -> None:
        """Prints a line above the bars."""
        say_to(self._console, text)


class _Lines:
    """One plain line per round, for logs and pipes."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def start(self) -> None:
        """Nothing to do."""

    def stop(self) -> None:
        """Nothing to do."""

    def _say(self, text: str) -> None:
        say_to(self._console, text)

    def mode_started(self, fields: Mapping[str, Any]) -> None:
        clients = fields.get("clients_per_round")
        each = f", {counted(clients, 'client')} a round" if clients and fields["mode"] == "federated" else ""
        self._say(f"{_title(fields)}: {counted(fields['rounds'], 'round')}{each}")

    def client_finished(self, fields: Mapping[str, Any]) -> None:
        """Too much for a log."""

    def round_finished(self, fields: Mapping[str, Any]) -> None:
        loss, figure = _loss_text(fields.get("train_loss")), figure_text(fields.get("metrics"))
        text = _joined(loss, figure, seconds_text(fields.get("seconds")))
        self._say(f"{_title(fields)} round {fields['round']}/{fields['rounds']}: {text}")

    def mode_finished(self, fields: Mapping[str, Any]) -> None:
        kept = f"model of round {fields['round']} of {fields['rounds']}" if "round" in fields else ""
        text = _joined(figure_text(fields.get("metrics")), kept, seconds_text(fields.get("seconds")))
        self._say(f"{_title(fields)} finished: {text}")


class _TimeLeft(TimeRemainingColumn):
    """The time that is left, which says so; nothing once all is done, as the time spent stands beside it."""

    def render(self, task: Task) -> Text:
        return Text() if task.finished else Text.assemble(super().render(task), " left")


def bars_with_time(console: Console) -> Progress:
    """Bars with a state of their own words (field ``state``), time spent and time left."""
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        TextColumn("{task.fields[state]}", markup=False),
        TimeElapsedColumn(),
        _TimeLeft(),
        console=console,
    )


class _Bars:
    """One bar a mode: rounds, clients done in the round, loss, figure, time left."""

    def __init__(self, console: Console) -> None:
        self._progress = bars_with_time(console)
        self._tasks: dict[str, TaskID] = {}
        self._before: dict[str, float] = {}  # mode -> rounds finished by earlier clients (isolated)
        self._clients: dict[str, int] = {}  # mode -> clients a round
        self._done: dict[tuple[str, int], int] = {}  # (mode, round) -> clients done

    def start(self) -> None:
        self._progress.start()

    def stop(self) -> None:
        self._progress.stop()

    def mode_started(self, fields: Mapping[str, Any]) -> None:
        mode, rounds = str(fields["mode"]), int(fields["rounds"])
        self._clients[mode] = int(fields.get("clients_per_round") or 1)
        self._done = {}
        if mode not in self._tasks:
            total: float = rounds * int(fields.get("clients") or 1)
            self._tasks[mode] = self._progress.add_task(_title(fields), total=total, state="")
            self._before[mode] = 0
            return
        task = self._tasks[mode]
        self._before[mode] = self._before[mode] + rounds
        total = max(self._progress.tasks[task].total or 0, self._before[mode] + rounds)
        self._progress.update(task, description=_title(fields), total=total, completed=self._before[mode])

    def _update(self, fields: Mapping[str, Any], completed: float, state: str) -> None:
        mode = str(fields["mode"])
        if mode in self._tasks:
            self._progress.update(self._tasks[mode], completed=self._before[mode] + completed, state=state)

    def client_finished(self, fields: Mapping[str, Any]) -> None:
        mode, number = str(fields["mode"]), int(fields["round"])
        done = self._done.get((mode, number), 0) + 1
        self._done[mode, number] = done
        clients = self._clients.get(mode, 1)
        progress = f"client {done}/{clients}" if clients > 1 else ""
        # Aggregation and scoring count as one more client.
        state = _joined(f"round {number}", progress, _loss_text(fields.get("loss")))
        self._update(fields, number - 1 + min(done, clients) / (clients + 1), state)

    def round_finished(self, fields: Mapping[str, Any]) -> None:
        loss, figure = _loss_text(fields.get("train_loss")), figure_text(fields.get("metrics"))
        state = _joined(f"round {fields['round']}/{fields['rounds']}", loss, figure)
        self._update(fields, float(fields["round"]), state)

    def mode_finished(self, fields: Mapping[str, Any]) -> None:
        mode = str(fields["mode"])
        if mode in self._tasks and not (mode == "isolated" and fields.get("client")):
            task = self._tasks[mode]
            total = self._progress.tasks[task].total
            self._progress.update(
                task, description=_TITLES.get(mode, mode), completed=total, state=figure_text(fields.get("metrics"))
            )
