"""The simulated clock: seconds by hand, availability, and where paces come from."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from silotune.errors import ConfigError
from silotune.federation.simulation.pace import Pace, paces
from silotune.settings.links import ClockSection

OFFICE = Pace(2.0, 10.0, 100.0, 0.5, available=((10.0, 20.0), (50.0, 60.0)), period_seconds=100.0)


def test_seconds_by_hand() -> None:
    pace = Pace(seconds_per_step=2.0, upload=10.0, download=100.0, latency_seconds=0.5)
    assert pace.received(7.0, 300) == 7 + 0.5 + 3
    assert pace.replied(7.0, 300, 50, steps=4) == 7 + 1 + 3 + 5 + 8


@pytest.mark.parametrize(
    ("start", "seconds", "end"),
    [
        (0, 5, 15),
        (12, 5, 17),
        (12, 8, 20),
        (12, 9, 51),
        (25, 1, 51),
        (55, 20, 155),
        (312, 0, 312),
        (20, 0, 20),
        (21, 0, 50),
        (99, 45, 315),
    ],
)
def test_work_rests_while_a_client_is_away(start: float, seconds: float, end: float) -> None:
    assert OFFICE.after(start, seconds) == pytest.approx(end)


def quarters(most: int) -> st.SearchStrategy[float]:
    """Numbers that add up exactly: at the end of a window, a rounded sum and its parts may fall on both sides."""
    return st.integers(0, 4 * most).map(lambda number: number / 4)


@settings(max_examples=25, deadline=None)
@given(quarters(500), quarters(200), quarters(200))
@example(0.0, 50.0, 0.0)
def test_two_pieces_of_work_take_as_long_as_both_together(start: float, first: float, second: float) -> None:
    assert OFFICE.after(OFFICE.after(start, first), second) == pytest.approx(OFFICE.after(start, first + second))
    assert OFFICE.after(start, first) >= start + first - 1e-9


def test_paces_come_from_the_section_the_trace_and_the_table(tmp_path: Path) -> None:
    trace = tmp_path / "trace.csv"
    trace.write_text(
        "client,speed,upload,available_from,available_to\nb,2,500,0,10\nb,,,20,30\nc,4,,,\n", encoding="utf-8"
    )
    section = ClockSection(seconds_per_step=8, trace=trace, clients={"c": {"speed": 0.5}}, speed_spread=0.5)
    made = paces(section, ("a", "b", "c"), seed=1)
    assert (made["b"].seconds_per_step, made["b"].upload, made["b"].download) == (4, 500, 1.25e7)
    assert made["b"].available == ((0, 10), (20, 30))
    assert made["c"].seconds_per_step == 16, "the table stands above the trace"
    assert made["a"] == paces(section, ("b", "a", "c"), seed=1)["a"] != paces(section, ("a", "b", "c"), seed=2)["a"]
    assert paces(ClockSection(seconds_per_step=8), ("a",), seed=1)["a"].seconds_per_step == 8


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("client,speed\nnobody,1\n", "unknown client 'nobody'"),
        ("client,sped\na,1\n", "columns may be"),
        ("speed\n1\n", "columns may be"),
        ("client,speed\na,-1\n", "greater than 0"),
        ("client,available_from,available_to\na,5,2\n", "ascend"),
    ],
)
def test_a_trace_that_cannot_be_is_refused(tmp_path: Path, text: str, words: str) -> None:
    trace = tmp_path / "trace.csv"
    trace.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=words):
        paces(ClockSection(trace=trace), ("a",), seed=1)
    with pytest.raises(ConfigError, match="cannot read"):
        paces(ClockSection(trace=tmp_path / "none.csv"), ("a",), seed=1)
