from __future__ import annotations

import json
import math
import unicodedata
from datetime import date
from decimal import Decimal
from typing import Any
from uuid import UUID

import pytest

from silotune.config import from_mapping
from silotune.data.rows import Task, folded, placeholders, render, unit_of
from silotune.data.tasks import TASKS, resolve, to_example
from silotune.errors import ConfigError, DataError
from silotune.settings.sections import MOST_PLACES, DataSection, TaskSection
from silotune.structs import Example, Row

OPTIONS = {"A": "iron", "B": "zinc", "C": "salt", "D": "none"}
ROWS: dict[str, list[tuple[dict[str, Any], str, dict[str, str]]]] = {
    "fpb": [
        ({"text": "Sales rose.", "label": "positive", "agreement": 75}, "positive", {"agreement": "75"}),
        ({"sentence": "Sales rose.", "label": 2}, "positive", {}),
        ({"sentence": "Sales fell.", "label": 0}, "negative", {}),
    ],
    "fiqa-sa": [
        (
            {"text": "Up.", "target": "Acme", "label": "neutral", "source": "post", "aspect_l1": "Stock"},
            "neutral",
            {"source": "post", "aspect": "Stock"},
        ),
        ({"sentence": "Up.", "target": "Acme", "score": 0.1, "type": "post"}, "positive", {"source": "post"}),
        ({"sentence": "Up.", "target": "Acme", "score": "-0.1", "type": "headline"}, "neutral", {"source": "headline"}),
        ({"sentence": "Up.", "target": "Acme", "score": -0.11, "type": ""}, "negative", {"source": "unknown"}),
    ],
    "tfns": [({"text": "$A up", "label": 1}, "positive", {}), ({"text": "$A", "label": "Neutral"}, "neutral", {})],
    "medqa": [
        ({"question": "What?", "options": OPTIONS, "answer_idx": "B", "answer": "zinc"}, "B", {}),
        (
            {"question": "What?", "options": OPTIONS, "answer_idx": "a", "specialty": "Urology", "meta_info": ""},
            "A",
            {"specialty": "Urology", "step": "unknown"},
        ),
    ],
    "medmcqa": [
        (
            {"question": "What?", "options": OPTIONS, "answer_idx": "D", "subject_name": "Skin"},
            "D",
            {"subject": "Skin"},
        ),
        (
            {"question": "What?", "opa": "iron", "opb": "zinc", "opc": "salt", "opd": "none", "cop": 2, "exp": "leak"},
            "C",
            {},
        ),
    ],
    "pubmedqa": [
        (
            {"question": "Does it?", "context": "One.\nTwo.", "final_decision": "maybe", "long_answer": "leak"},
            "maybe",
            {},
        ),
        (
            {
                "question": "Does it?",
                "context": {"contexts": ["One.", "Two."], "meshes": ["x"]},
                "final_decision": "no",
            },
            "no",
            {},
        ),
    ],
    "instruct": [
        ({"instruction": "Sort.", "input": "b a", "output": "a b", "domain": "general"}, "a b", {"domain": "general"}),
        ({"instruction": "Sort.", "output": "a b"}, "a b", {}),
        ({"prompt": "Sort.", "response": "a b"}, "a b", {}),
        (
            {"messages": [{"role": "user", "content": "Sort."}, {"role": "assistant", "content": "a b"}]},
            "a b",
            {},
        ),
    ],
    "preference": [
        (
            {"messages": [{"role": "user", "content": "Hi"}], "prompt": "Hi", "chosen": "yes", "rejected": "no"},
            "yes",
            {},
        ),
        ({"prompt": "Hi", "chosen": "yes", "rejected": "no", "source": "x"}, "yes", {"source": "x"}),
        (
            {
                "chosen": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "yes"}],
                "rejected": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "no"}],
            },
            "yes",
            {},
        ),
    ],
    "text": [({"text": "One. Two.", "source": "x"}, "One. Two.", {"source": "x"})],
    "client-notes": [
        (
            {"text": "Up.", "written": "Good.", "chosen": "Good.", "sector": "chips", "principle": "source"},
            "Good.",
            {"sector": "chips", "principle": "source"},
        )
    ],
    "note-preference": [
        (
            {"text": "Up.", "chosen": "It may.", "rejected": "It will.", "principle": "caution"},
            "It may.",
            {"principle": "caution"},
        )
    ],
    "finance-news": [
        ({"id": "1", "text": "Up.", "label": "negative", "sector": "chips"}, "negative", {"sector": "chips"})
    ],
    "medical-choice": [
        (
            {"question": "What?", "options": OPTIONS, "answer_idx": "C", "specialty": "x"},
            "salt",
            {"specialty": "x", "label": "C"},
        ),
    ],
}
CASES = [(name, *case) for name, cases in ROWS.items() for case in cases]


def convert(name: str, row: dict[str, Any]) -> Example:
    return to_example(TASKS[name], row, where="a.jsonl", number=17)


def custom(**changes: Any) -> Task:
    definition = {"prompt": "Urgent? {letter}", "answer": "level", "options": ["low", "high"]} | changes
    return resolve(DataSection(task="custom", definition=TaskSection(**definition)))


def test_every_task_has_cases_and_its_own_name() -> None:
    assert set(TASKS) == set(ROWS)
    assert all(name == task.name for name, task in TASKS.items())


@pytest.mark.parametrize(("name", "row", "answer", "fields"), CASES)
def test_rows_become_examples(name: str, row: dict[str, Any], answer: str, fields: dict[str, str]) -> None:
    example = convert(name, row)
    task = TASKS[name]
    assert example.answer == answer
    options = tuple(OPTIONS.values()) if task.answer == "cloze" else task.options
    assert example.options == options
    assert example.label == (options.index(answer) if options else -1)
    assert example.fields == ({"label": answer} if options else {}) | fields
    assert set(example.fields) <= set(task.partition_fields)
    assert "leak" not in str(example)


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_prompts_end_with_a_cue_and_name_every_option(task: Task) -> None:
    if task.answer in ("text", "preference", "document"):
        return
    assert task.prompt.endswith("\nAnswer:")
    if task.answer == "label":
        assert all(option in task.prompt for option in task.options)
    for layout in task.layouts:
        filled = set(layout.columns) | ({"options"} if task.answer == "letter" else set())
        assert set(placeholders(layout.prompt or task.prompt)) == filled
        assert not {"exp", "long_answer", "gpt4_exp"} & set(layout.required())


FLOODS = {"text of 4097 characters, at most 4096": "x" * 4097, "template of 33 placeholders, at most 32": "{text}" * 33}
FLOODED = [("data.prompt", flood) for flood in FLOODS] + [("data.definition.prompt", flood) for flood in FLOODS]


@pytest.mark.parametrize(("name", "said"), [*FLOODED, ("data.definition.system", next(iter(FLOODS)))])
def test_a_template_is_bounded_wherever_it_is_validated(name: str, said: str) -> None:
    """Every example is written out so long; one line says so, without the template."""
    section: dict[str, Any] = {"task": "custom", "definition": {"prompt": "{text}", "answer": "label"}}
    if name == "data.prompt":
        section = {"prompt": FLOODS[said]}
    else:
        section["definition"][name.rpartition(".")[2]] = FLOODS[said]
    with pytest.raises(ConfigError) as caught:
        from_mapping({"data": section})
    assert caught.value.faults == (f"{name}: a {said} are taken",) and len(str(caught.value)) < 200


def test_a_template_may_have_as_many_places_as_are_allowed_and_braces_of_its_own() -> None:
    template = "{text}" * MOST_PLACES + "{{}}" * 100
    assert resolve(from_mapping({"data": {"prompt": template}}).data).prompt == template


def test_prompts_as_they_read() -> None:
    assert convert("fpb", ROWS["fpb"][0][0]).messages == (
        ("user", "Is this financial news negative, neutral or positive for the company?\nSales rose.\nAnswer:"),
    )
    lettered = "What?\nA. iron\nB. zinc\nC. salt\nD. none\nAnswer:"
    assert [convert("medmcqa", row).messages for row, *_ in ROWS["medmcqa"]] == [(("user", lettered),)] * 2
    assert [convert("instruct", row).messages[0][1] for row, *_ in ROWS["instruct"]] == ["Sort.\n\nb a"] + ["Sort."] * 3
    with_list, with_struct = (convert("pubmedqa", row).messages for row, *_ in ROWS["pubmedqa"])
    assert with_list == with_struct


def test_braces_in_a_text_stay_as_they_are() -> None:
    assert "{label} {0.x}" in convert("fpb", {"text": "{label} {0.x}", "label": "neutral"}).messages[0][1]


@pytest.mark.parametrize("options", [json.dumps(OPTIONS), list(OPTIONS.values()), {**OPTIONS, "E": None}])
def test_options_may_be_json_text_a_list_or_have_empty_extras(options: Any) -> None:
    expected = convert("medqa", ROWS["medqa"][0][0])
    assert convert("medqa", {"question": "What?", "options": options, "answer_idx": "B"}) == expected


def test_conversations_keep_their_turns() -> None:
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hi"},
        {"role": "user", "content": "Bye"},
        {"role": "assistant", "content": "Ciao"},
    ]
    example = convert("instruct", {"messages": json.dumps(turns)})
    assert example.answer == "Ciao"
    assert [role for role, _ in example.messages] == ["system", "user", "assistant", "user"]


SECRET = "patient Jane Doe"
USER, ASSISTANT = {"role": "user", "content": SECRET}, {"role": "assistant", "content": SECRET}


@pytest.mark.parametrize(
    ("name", "row", "reason"),
    [
        ("fpb", {"text": SECRET}, "field 'label' is missing; task 'fpb' needs text, label or sentence, label"),
        ("fpb", {"text": "", "label": "neutral"}, "field 'text' is empty"),
        ("fpb", {"text": None, "label": "neutral"}, "field 'text' is empty"),
        ("fpb", {"text": math.nan, "label": "neutral"}, "field 'text' is empty"),
        ("fpb", {"text": {"a": SECRET}, "label": "neutral"}, "field 'text' is not text"),
        ("fpb", {"text": [1], "label": "neutral"}, "field 'text' is not text"),
        ("fpb", {"text": "x", "label": SECRET}, "label is not one of negative, neutral, positive"),
        ("fpb", {"text": "x", "label": None}, "field 'label' is empty"),
        ("fiqa-sa", {"sentence": "x", "target": "y", "score": SECRET}, "score is not a number"),
        ("fiqa-sa", {"sentence": "x", "target": "y", "score": None}, "score is not a number"),
        ("medqa", {"question": "x", "options": SECRET, "answer_idx": "A"}, "'options' is neither a list nor a mapping"),
        (
            "medqa",
            {"question": "x", "options": {"A": SECRET}, "answer_idx": "A"},
            "options: options are not A, B, C, D",
        ),
        ("medqa", {"question": "x", "options": {**OPTIONS, "E": "e"}, "answer_idx": "A"}, "options are not A, B, C, D"),
        ("medqa", {"question": "x", "options": {**OPTIONS, "D": " "}, "answer_idx": "A"}, "options are not A, B, C, D"),
        ("medqa", {"question": "x", "options": OPTIONS, "answer_idx": "E"}, "answer_idx is not one of A, B, C, D"),
        ("medmcqa", {"question": "x", "opa": 1, "opb": 2, "opc": 3, "opd": 4, "cop": -1}, "cop is not one of A, B, C"),
        ("instruct", {"instruction": SECRET, "output": " "}, "field 'output' is empty"),
        ("instruct", {"messages": SECRET}, "messages: is not a list of messages"),
        ("instruct", {"messages": None}, "messages: is not a list of messages"),
        ("instruct", {"messages": [USER]}, "messages: must end with a user's message and an assistant's answer"),
        ("instruct", {"messages": [ASSISTANT, USER]}, "messages: must end with a user's message"),
        ("instruct", {"messages": [{"role": "system", "content": SECRET}, ASSISTANT]}, "messages: must end with a"),
        ("instruct", {"messages": [{"role": SECRET, "content": "x"}, ASSISTANT]}, "message 1 needs a role"),
        ("instruct", {"messages": [USER, {"role": "assistant", "content": None}]}, "message 2 needs a role"),
        ("instruct", {"messages": [SECRET, ASSISTANT]}, "message 1 needs a role"),
    ],
)
def test_a_row_that_does_not_fit_is_named_by_number_never_by_content(name: str, row: Any, reason: str) -> None:
    with pytest.raises(DataError) as caught:
        convert(name, row)
    text = str(caught.value)
    assert text.startswith("a.jsonl: row 17: ")
    assert reason in text
    assert SECRET not in text
    assert "\n" not in text


def test_unit_is_the_text_that_rows_share() -> None:
    assert unit_of(TASKS["fiqa-sa"], {"sentence": "Up.", "target": "A"}) == "Up."
    assert unit_of(TASKS["medqa"], {"question": "What?"}) == "What?"
    assert unit_of(TASKS["instruct"], {"instruction": "Sort."}) == ""


def test_resolve_names_the_nearest_task() -> None:
    assert resolve(DataSection(task="fpb")) is TASKS["fpb"]
    with pytest.raises(ConfigError, match="data.task: unknown task 'medqq': did you mean 'medqa'"):
        resolve(DataSection(task="medqq"))
    with pytest.raises(ConfigError, match=r"needs a section \[data.definition\]"):
        resolve(DataSection(task="custom"))


def test_custom_task_with_options() -> None:
    task = custom(
        label_names={"1": "high", "true": "high", "0": "low"},
        fields=["branch"],
        metric="macro_f1",
        system="Be strict.",
        hub_id="x/y",
        hub_config="z",
    )
    rows = [
        {"letter": "Help!", "level": level, "branch": branch}
        for level, branch in [(1, "north"), (True, None), ("HIGH", 3.0), (1.0, 0.5), (0, "x")]
    ]
    examples = [to_example(task, row, where="f", number=1) for row in rows]
    assert [example.answer for example in examples] == ["high"] * 4 + ["low"]
    assert [example.fields["branch"] for example in examples] == ["north", "unknown", "3", "0.5", "x"]
    assert examples[0].messages == (("system", "Be strict."), ("user", "Urgent? Help!"))
    assert (task.metric, task.answer) == ("macro_f1", "label")
    assert task.hub is not None
    assert (task.hub.id, task.hub.config) == ("x/y", "z")
    assert task.partition_fields == ("label", "branch")


def test_custom_task_whose_rows_have_options_of_their_own() -> None:
    letters = ["A", "B", "C", "D", "E"]
    task = custom(
        prompt="{case}\n{options}\nAnswer:", columns={"case": "vignette"}, choices=["options"], options=letters,
        answer="answer_idx",
    )  # fmt: skip
    row = {"vignette": "What now?", "options": dict(zip(letters, "vwxyz", strict=True)), "answer_idx": "E"}
    example = to_example(task, row, where="f", number=1)
    assert example.messages == (("user", "What now?\nA. v\nB. w\nC. x\nD. y\nE. z\nAnswer:"),)
    assert (example.answer, example.options, example.label, task.answer) == ("E", tuple(letters), 4, "letter")
    apart = custom(prompt="{case}\n{options}", choices=["one", "two"], options=["A", "B"], answer="right")
    example = to_example(apart, {"case": "x", "one": "p", "two": "q", "right": "B"}, where="f", number=1)
    assert example.messages[0][1] == "x\nA. p\nB. q" and example.label == 1
    with pytest.raises(DataError, match="row 7"):
        to_example(task, {**row, "options": {"A": "v"}}, where="f", number=7)


def test_custom_task_with_open_answers_is_scored_by_perplexity() -> None:
    task = custom(options=())
    example = to_example(task, {"letter": "x", "level": 3}, where="f", number=1)
    assert (task.metric, task.answer, task.hub) == ("perplexity", "text", None)
    assert (example.answer, example.label, example.options) == ("3", -1, ())


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"prompt": "Urgent?"}, "names no column"),
        ({"prompt": "{letter} {level}"}, "shows the answer's column 'level'"),
        ({"prompt": "{letter"}, "data.definition.prompt: "),
        ({"prompt": "{letter!r}"}, "braces hold a column's name"),
        ({"prompt": "{letter:>9}"}, "braces hold a column's name"),
        ({"prompt": "{}"}, "braces hold a column's name"),
        ({"options": ["low"]}, "at least two different answers"),
        ({"options": ["low", "Low"]}, "at least two different answers"),
        ({"options": ["low", " "]}, "an empty answer"),
        ({"label_names": {"0": "medium"}}, "leads to 'medium', which is not among the options"),
        ({"fields": ["label"]}, "'label' is there already"),
        ({"columns": {"lettre": "x"}}, "columns: unknown name in the prompt 'lettre': did you mean 'letter'?"),
        ({"choices": ["a", "b"]}, "choices needs data.definition.options, the letters, and {options}"),
        (
            {"metric": "perplexity"},
            "metric = 'perplexity' is not for a task with options: use 'accuracy' or 'macro_f1'",
        ),
        (
            {"options": [], "metric": "accuracy"},
            "metric = 'accuracy' is not for a task without options: use 'perplexity'",
        ),
    ],
)
def test_a_definition_that_does_not_hold_together_is_refused(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=".*") as caught:
        custom(**changes)
    assert reason in str(caught.value)


def test_all_faults_of_a_definition_come_at_once() -> None:
    with pytest.raises(ConfigError, match="^2 faults: ") as caught:
        custom(prompt="Urgent?", options=["low"])
    assert len(caught.value.faults) == 2


def test_templates_look_names_up_and_do_nothing_else() -> None:
    assert placeholders("{a} {b c} {a} {{x}}") == ("a", "b c")
    assert render("{a.__class__} {{x}} {b[0]}", {"a.__class__": "1", "b[0]": "2"}) == "1 {x} 2"
    with pytest.raises(KeyError):
        render("{a.__class__}", {"a": "1"})


def test_a_known_task_may_be_asked_in_other_words() -> None:
    section = DataSection(task="fiqa-sa", prompt="Choose from {{a/b}}.\nInput: {text}\nAnswer: ")
    task = resolve(section)
    row = {"text": "Up.", "target": "Firm", "label": "positive"}
    assert to_example(task, row, where="x", number=1).messages[-1][1] == "Choose from {a/b}.\nInput: Up.\nAnswer:"
    assert resolve(DataSection(task="medqa", prompt="{options}\n{question}")).options == ("A", "B", "C", "D")


@pytest.mark.parametrize(
    ("task", "prompt", "reason"),
    [
        ("fpb", "{txet}", "did you mean 'text'"),
        ("fpb", "{text!r}", "braces hold a column's name"),
        ("fpb", "no column", "cannot be asked"),
        ("instruct", "{instruction}", "data.prompt"),
    ],
)
def test_other_words_that_do_not_fit_are_refused(task: str, prompt: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        resolve(DataSection(task=task, prompt=prompt))


def test_pairs_have_a_worse_answer_and_a_prompt_without_either() -> None:
    for row, *_ in ROWS["preference"]:
        example = convert("preference", row)
        assert (example.messages, example.rejected) == ((("user", "Hi"),), "no")
    mine = custom(options=[], answer="good", rejected="bad")
    made = to_example(mine, {"letter": "x", "good": "yes", "bad": "no"}, where="a.jsonl", number=1)
    assert (made.answer, made.rejected, mine.metric) == ("yes", "no", "preference_accuracy")


@pytest.mark.parametrize(("label", "wanted"), [(True, True), ("false", False), (1, True), (0.0, False)])
def test_answers_may_be_judged_one_by_one(label: Any, wanted: bool) -> None:
    for prompt in ({"prompt": "Hi"}, {"messages": [{"role": "user", "content": "Hi"}]}):
        made = convert("preference", {**prompt, "completion": "yes", "label": label})
        assert (made.messages, made.answer, made.rejected, made.wanted) == ((("user", "Hi"),), "yes", "", wanted)
    with pytest.raises(DataError, match="field 'label' says neither true nor false"):
        convert("preference", {"prompt": "Hi", "completion": "yes", "label": "perhaps"})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rejected": "yes"}, "'chosen' and 'rejected' hold the same answer"),
        ({"rejected": " "}, "field 'rejected' is empty"),
        ({"messages": [{"role": "assistant", "content": "SECRET"}]}, "must end with a user's message"),
        ({"messages": "SECRET"}, "is not a list of messages"),
    ],
)
def test_pairs_that_do_not_fit_are_named_by_number(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(DataError, match=words) as caught:
        convert("preference", {**ROWS["preference"][0][0], **changes})
    assert "row 17" in str(caught.value) and "SECRET" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rejected": "letter", "options": []}, "is a column of the prompt"),
        ({"rejected": "bad"}, "has no options"),
        ({"rejected": "bad", "options": [], "metric": "perplexity"}, "is not for pairs: use 'preference_accuracy'"),
    ],
)
def test_pairs_of_ones_own_that_do_not_hold_together(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        custom(**changes)


# --- values as people have them


def own(options: tuple[str, ...] = (), **more: Any) -> Task:
    definition = TaskSection(prompt=more.pop("prompt", "{q}"), answer="a", options=options, **more)
    return resolve(DataSection(task="custom", definition=definition))


def asked(task: Task, row: Row) -> Example:
    return to_example(task, row, where="w", number=1)


@pytest.mark.parametrize("count", [2, 9, 10, 12, 120])
@pytest.mark.parametrize("kind", ["mapping", "list", "json"])
def test_numbered_options_are_read_in_the_order_of_the_definition(count: int, kind: str) -> None:
    names = tuple(str(number) for number in range(1, count + 1))
    task = own(names, prompt="{q}\n{options}", choices=("c",))
    texts = {name: f"option {name}" for name in reversed(names)}
    given: Any = {"mapping": texts, "list": [texts[name] for name in names], "json": json.dumps(texts)}[kind]
    example = asked(task, {"q": "?", "c": given, "a": names[-1]})
    assert example.messages[0][1] == "?\n" + "\n".join(f"{name}. option {name}" for name in names)
    assert (example.label, example.options) == (count - 1, names)


@pytest.mark.parametrize("given", [{"1": "a"}, {"1": "a", "3": "b"}, ["a"], ["a", "b", "c"], {"1": "a", "2": ""}])
def test_options_of_other_names_or_another_number_are_refused(given: Any) -> None:
    task = own(("1", "2"), prompt="{q}\n{options}", choices=("c",))
    with pytest.raises(DataError, match="w: row 1: c: options are not 1, 2, none empty"):
        asked(task, {"q": "?", "c": given, "a": "1"})
    assert asked(task, {"q": "?", "c": ["a", "b", ""], "a": "2"}).label == 1


@pytest.mark.parametrize("form", ["NFC", "NFD"])
@pytest.mark.parametrize("other", ["NFC", "NFD"])
def test_accents_compare_equal_in_either_form(form: str, other: str) -> None:
    def one(text: str) -> str:
        return unicodedata.normalize(form, text)

    def two(text: str) -> str:
        return unicodedata.normalize(other, text)

    definition = TaskSection(
        prompt=one("{énoncé} {é}"),
        answer=one("réponse"),
        columns={one("é"): one("è")},
        options=(one("été"), one("hiver")),
        label_names={one("à"): one("été")},
        fields=(one("hôpital"),),
    )
    task = resolve(DataSection(task="custom", definition=definition))
    for raw in ("été", "ÉTÉ", "à"):
        row = {two("énoncé"): "x", two("è"): "y", two("réponse"): two(raw), two("hôpital"): two("Besançon")}
        example = asked(task, row)
        assert (example.label, example.messages[0][1]) == (0, "x y")
        assert example.fields == {"hôpital": "Besançon", "label": "été"}


def test_the_spaces_that_an_open_answer_begins_with_are_kept() -> None:
    code = "    y = 2 * x\n    return y\n"
    assert asked(own(), {"q": "def f(x):\n", "a": code}).answer == code.rstrip()
    with pytest.raises(DataError, match="row 1: field 'a' is empty"):
        asked(own(), {"q": "x", "a": " \n "})
    document = to_example(TASKS["text"], {"text": "  - a: 1\n"}, where="w", number=1)
    assert document.answer == "  - a: 1"


@pytest.mark.parametrize("task", [own(), own(("été", "x"))])
def test_bytes_are_text_or_are_refused_by_row_and_column(task: Task) -> None:
    example = asked(task, {"q": "à".encode(), "a": "été".encode(), "image": b"\xff"})
    assert (example.messages[0][1], example.answer) == ("à", "été")
    with pytest.raises(DataError, match="w: row 1: field 'q' holds bytes that are not UTF-8 text"):
        asked(task, {"q": b"\xff\xfe", "a": "x"})


@pytest.mark.parametrize("value", [["SECRET", 1], {"k": "SECRET"}, {"SECRET"}, ("SECRET",), [b"SECRET"], object()])
@pytest.mark.parametrize("column", ["q", "a", "f"])
@pytest.mark.parametrize("options", [(), ("x", "y")])
def test_no_value_becomes_what_python_would_write(value: Any, column: str, options: tuple[str, ...]) -> None:
    row = {"q": "x", "a": "x", "f": "x", column: value}
    with pytest.raises(DataError, match=f"w: row 1: field '{column}' is not text: it holds") as caught:
        asked(own(options, fields=("f",)), row)
    assert "SECRET" not in str(caught.value)


def test_scalars_are_written_as_their_file_shows_them() -> None:
    values = (True, 3.0, 2.5, Decimal("1.50"), date(2026, 1, 2), UUID(int=1))
    shown = [asked(own(), {"q": value, "a": "x"}).messages[0][1] for value in values]
    assert shown == ["true", "3", "2.5", "1.50", "2026-01-02", str(UUID(int=1))]


def test_texts_are_alike_up_to_case_spaces_and_punctuation() -> None:
    alike = ("Profit rose, to 7.5!", "profit  rose\nto 7 5", "PROFIT ROSE (to 7,5)")
    assert len(set(map(folded, alike))) == 1
    different = ("3 + 4", "3 * 4", "3 < 4", "34", "कि", "का", "?", "!")
    assert len(set(map(folded, different))) == len(different)


# --- white space -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "prompt", "answer"),
    [
        (
            {"prompt": " def f(x):\n ", "response": "    y = 2\n    return y\n"},
            "def f(x):\n ",
            "    y = 2\n    return y",
        ),
        ({"instruction": "name it\n", "input": " "}, "name it\n", " yes"),
        ({"instruction": "name it ", "input": "a:  \n  - b \n"}, "name it\n\na:  \n  - b \n", " yes"),
        ({"prompt": "name it  "}, "name it", " yes"),
    ],
)
def test_an_answers_indentation_and_a_prompts_last_lines_are_kept(
    row: dict[str, str], prompt: str, answer: str
) -> None:
    filled = {("output" if "instruction" in row else "response"): " yes ", **row}
    made = to_example(TASKS["instruct"], filled, where="file", number=1)
    assert (made.messages, made.answer) == ((("user", prompt),), answer)


def test_messages_keep_the_white_space_that_says_something() -> None:
    said = (("user", "  go on:\n"), ("assistant", "  - a\n\n"), ("user", "and? "), ("assistant", "  - b "))
    row = {"messages": [{"role": role, "content": content} for role, content in said]}
    made = to_example(TASKS["instruct"], row, where="file", number=1)
    assert made.messages == (("user", "  go on:\n"), ("assistant", "  - a"), ("user", "and?"))
    assert made.answer == "  - b"
    row["messages"][1]["content"] = " \n "
    with pytest.raises(DataError, match="message 2 needs a role"):
        to_example(TASKS["instruct"], row, where="file", number=1)


def test_pairs_keep_indentation_and_classes_are_compared_without_white_space() -> None:
    row = {"prompt": "x:\n", "chosen": "  a\n", "rejected": "  b "}
    made = to_example(TASKS["preference"], row, where="file", number=1)
    assert (made.messages[0][1], made.answer, made.rejected) == ("x:\n", "  a", "  b")
    closed = to_example(TASKS["fpb"], {"text": " fell\n", "label": " Neutral\n"}, where="file", number=1)
    assert closed.answer == "neutral" and closed.text == ("fell",)


def test_an_answer_may_be_the_text_of_an_option_of_its_row_but_no_number_that_may_count_them() -> None:
    row = {"question": "x", "options": ["chest pain", "Cough", "B", "12"]}
    said = ["cough", " Cough ", "B", "b", "12", "A"]
    assert [convert("medqa", {**row, "answer_idx": each}).label for each in said] == [1, 1, 1, 1, 3, 0]
    with pytest.raises(DataError, match="cop is not one of A, B, C, D"):
        convert("medmcqa", {"question": "x", "opa": "2", "opb": "4", "opc": "6", "opd": "8", "cop": 4})


@pytest.mark.parametrize("label", ["1.0", 1.0, 1, " 1", "\ufeff1", "Neutral\u200b", "NEUTRAL\u00a0"])
def test_labels_compare_without_what_nobody_sees(label: Any) -> None:
    assert convert("fpb", {"text": "x", "label": label}).answer == "neutral"
