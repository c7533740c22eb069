"""``silotune generate`` and ``silotune chat``: ask a tuned model."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from silotune.cli.output import AsJson, ModeName, print_json, reserved_stdout, say, write_text
from silotune.data.chats import Chat, asked_in
from silotune.errors import DataError, ModelError

if TYPE_CHECKING:
    from silotune.data.files import Fault
    from silotune.structs import Row

Source = Annotated[str, typer.Argument(metavar="DIR_OR_MODEL", help="A run folder, a model folder or a model's name.")]
File = Annotated[Path | None, typer.Option(help="Prompts: a text file, one a line; or rows with 'prompt' or a chat.")]
MaxNewTokens = Annotated[int, typer.Option(min=1, help="Most tokens of an answer.")]
Temperature = Annotated[float, typer.Option(min=0, help="0 takes the likeliest token each time.")]
TopP = Annotated[float, typer.Option(min=0, max=1, help="Sample from the likeliest tokens with this much probability.")]
TopK = Annotated[int, typer.Option(min=0, help="Sample from so many likeliest tokens; 0 for all.")]
Penalty = Annotated[float, typer.Option("--repetition-penalty", min=0.01, help="Above 1 avoids repeating tokens.")]
Seed = Annotated[int, typer.Option(help="Seed of the sampling.")]
Base = Annotated[bool, typer.Option("--base", help="Ask the base model, without the adapter.")]


def generate(  # noqa: PLR0913 - each parameter is an option of the command line
    source: Source,
    prompt: Annotated[str | None, typer.Option(help="The prompt.")] = None,
    file: File = None,
    max_new_tokens: MaxNewTokens = 64,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    repetition_penalty: Penalty = 1.0,
    seed: Seed = 0,
    no_stream: Annotated[bool, typer.Option("--no-stream", help="Print each answer when it is complete.")] = False,
    base: Base = False,
    mode: ModeName = "federated",
    as_json: AsJson = False,
) -> None:
    """Answer a prompt, a file of prompts, or what stands on standard input."""
    prompts = _prompts(prompt, file)
    from silotune.evaluation.generate import Sampling, stream_answer
    from silotune.experiment.tuned import load_tuned

    sampling = Sampling(max_new_tokens, temperature, top_p, top_k, repetition_penalty, seed)
    with reserved_stdout(as_json):
        model = load_tuned(source, mode=mode, base=base)
        answers = (stream_answer(model, messages, sampling) for messages in prompts)
        if as_json:
            texts = ["".join(pieces) for pieces in answers]
    if as_json:
        given = [{"prompt": messages[-1][1], "answer": text} for messages, text in zip(prompts, texts, strict=True)]
        print_json({"model": source, "base": base, "answers": given})
        return
    for pieces in answers:
        _write(["".join(pieces)] if no_stream else pieces)


def chat(
    source: Source,
    max_new_tokens: MaxNewTokens = 128,
    temperature: Temperature = 0.7,
    top_p: TopP = 0.95,
    seed: Seed = 0,
    base: Base = False,
    mode: ModeName = "federated",
) -> None:
    """Talk with a tuned model; /reset starts anew, /quit or Ctrl-D ends."""
    from silotune.evaluation.generate import Sampling, stream_answer
    from silotune.experiment.tuned import load_tuned

    sampling = Sampling(max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, seed=seed)
    model = load_tuned(source, mode=mode, base=base)
    say("/reset starts anew, /quit or Ctrl-D ends")
    said: list[tuple[str, str]] = []
    while (line := _next_line()) is not None:
        if line == "/reset":
            said = []
        elif line:
            try:
                answer = _write(stream_answer(model, [*said, ("user", line)], sampling))
                said += [("user", line), ("assistant", answer)]
            except (ModelError, DataError) as error:
                say(f"error: {error}; /reset starts anew", is_error=True)


def _next_line() -> str | None:
    """What the user says; None at the end."""
    try:
        line = input("> ").strip()
    except EOFError:
        say("")
        return None
    return None if line in ("/quit", "/exit") else line


def _write(pieces: Iterable[str]) -> str:
    """Prints an answer as it comes, and returns it whole."""
    whole = []
    for piece in pieces:
        write_text(piece)
        sys.stdout.flush()
        whole.append(piece)
    say("")
    return "".join(whole).strip()


def _prompts(prompt: str | None, file: Path | None) -> list[Chat]:
    if prompt is not None and file is not None:
        raise typer.BadParameter("give --prompt or --file, not both")
    if prompt is not None:
        return [(("user", prompt),)]
    if file is not None:
        return _from_file(file)
    text = "" if sys.stdin.isatty() else sys.stdin.read().strip()
    if not text:
        raise typer.BadParameter("give --prompt TEXT, --file FILE, or a text on standard input")
    return [(("user", text),)]


def _from_file(file: Path) -> list[Chat]:
    """The prompts of a file of rows, or of a text with one a line."""
    from silotune.data.files import PACKED, SUFFIXES, read_lines, read_table, suffix_of

    kind = suffix_of(file).removesuffix(PACKED)
    table = read_table(file) if kind in SUFFIXES and kind != ".txt" else read_lines(file)
    found = [_from_row(row, file, number) for number, row in enumerate(table.entries, start=1)]
    for note in table.notes:
        say(f"note: {note}", is_error=True)
    if not found:
        raise DataError(f"{str(file)!r} holds no prompts")
    return found


def _from_row(row: Row | Fault, file: Path, number: int) -> Chat:
    if not isinstance(row, dict):
        raise DataError(f"{file}: {row}")
    return asked_in(row, f"{file} row {number}")
