"""Charts of lines as SVG within a page: drawn by the server, in colours of the page's style, without a script."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

WIDTH, HEIGHT = 480, 240
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 12, 10, 26
MOST_POINTS = 240
COLOURS = 7
"""Colours that lines have, by the classes ``c0``, ``c1``, ...; later lines have dashes, too."""
_SPARK_WIDTH, _SPARK_HEIGHT = 96, 24
Point = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Line:
    """One line of a chart.

    Attributes:
        name: For the legend.
        points: Of x and y, x ascending.
        is_level: It is one value, drawn from side to side.
        mark: A point that is marked, such as that of the round whose model was kept; the legend then has its value.
    """

    name: str
    points: Sequence[Point]
    is_level: bool = False
    mark: Point | None = None

    @property
    def value(self) -> float:
        """What the legend says of the line."""
        return (self.mark or self.points[-1])[1]


def thinned(points: Sequence[Point], most: int = MOST_POINTS) -> list[Point]:
    """At most about so many points: of each stretch the lowest and the highest, so that no peak is lost."""
    if len(points) <= most:
        return list(points)
    size = math.ceil(2 * len(points) / most)
    kept: list[Point] = [points[0]]
    for start in range(0, len(points), size):
        stretch = points[start : start + size]
        pair = {min(stretch, key=lambda point: point[1]), max(stretch, key=lambda point: point[1])}
        kept.extend(sorted(pair))
    if kept[-1] != points[-1]:
        kept.append(points[-1])
    return kept


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Round numbers from ``low`` to ``high``, ascending: steps of 1, 2 or 5 times a power of ten."""
    if not high > low:
        return [low]
    rough = (high - low) / max(1, most - 1)
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * unit for factor in (1, 2, 5, 10) if factor * unit >= rough * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [place * step for place in range(first, last + 1)]


def chart(
    lines: Sequence[Line],
    *,
    label: str,
    shown: Callable[[float], str],
    least: float | None = None,
    most_x: float | None = None,
) -> Markup:
    """A chart with its legend, as HTML.

    Args:
        lines: What is drawn; those without a point are left out.
        label: What the chart shows, for those who do not see it; the values of its legend are added.
        shown: Writes a value of y.
        least: The lowest y of the axis; the lowest value when None.
        most_x: The end of the x axis, such as the rounds that a run is to have; the last point when None.
    """
    drawn = [line for line in lines if line.points]
    if not drawn:
        return Markup("")
    xs = [x for line in drawn if not line.is_level for x, _ in line.points] or [0.0, 1.0]
    ys = [y for line in drawn for _, y in line.points]
    box = _Box(
        min(xs),
        max(max(xs), most_x or 0.0, min(xs) + 1),
        *_roomy(min(ys) if least is None else min(least, *ys), max(ys)),
    )
    parts = [box.grid(shown)]
    parts += [_drawn(line, place, box) for place, line in reversed(list(enumerate(drawn)))]
    values = "; ".join(f"{line.name}: {shown(line.value)}" for line in drawn)
    legend = Markup("").join(
        Markup('<li class="c{} {}"><span class="swatch"></span>{} <b>{}</b></li>').format(
            place % COLOURS, _style(line, place), line.name, shown(line.value)
        )
        for place, line in enumerate(drawn)
    )
    return Markup(
        '<svg class="chart" viewBox="0 0 {} {}" role="img" aria-label="{}. {}">{}</svg><ul class="legend">{}</ul>'
    ).format(WIDTH, HEIGHT, label, values, Markup("").join(parts), legend)


def spark(points: Sequence[Point]) -> Markup:
    """A line without axes, as small as a word; empty for fewer than two points."""
    if len(points) < 2:
        return Markup("")
    xs, ys = [x for x, _ in points], [y for _, y in points]
    low, high = _roomy(min(ys), max(ys))
    scale_x, scale_y = (_SPARK_WIDTH - 4) / (max(xs) - min(xs) or 1), (_SPARK_HEIGHT - 4) / (high - low)
    path = " ".join(
        f"{2 + (x - xs[0]) * scale_x:.1f},{_SPARK_HEIGHT - 2 - (y - low) * scale_y:.1f}" for x, y in thinned(points, 60)
    )
    return Markup(
        '<svg class="spark" viewBox="0 0 {} {}" aria-hidden="true"><polyline class="line c0" points="{}"/></svg>'
    ).format(_SPARK_WIDTH, _SPARK_HEIGHT, path)


def _roomy(low: float, high: float) -> tuple[float, float]:
    """Bounds with a little room, and some where all values are one."""
    room = 0.04 * (high - low) or 0.05 * abs(high) or 1.0
    return low - room, high + room


@dataclass(frozen=True, slots=True)
class _Box:
    """The frame of a chart: bounds of its axes."""

    from_x: float
    to_x: float
    from_y: float
    to_y: float

    def place(self, point: Point) -> tuple[float, float]:
        """Where a point lies in the picture."""
        x, y = point
        across = (x - self.from_x) / (self.to_x - self.from_x)
        up = (y - self.from_y) / (self.to_y - self.from_y)
        return _LEFT + across * (WIDTH - _LEFT - _RIGHT), HEIGHT - _BOTTOM - up * (HEIGHT - _TOP - _BOTTOM)

    def grid(self, shown: Callable[[float], str]) -> Markup:
        """Lines across, and the numbers of both axes."""
        parts = []
        for value in ticks(self.from_y, self.to_y):
            _, y = self.place((self.from_x, value))
            parts.append(
                Markup('<line class="grid" x1="{}" x2="{}" y1="{:.1f}" y2="{:.1f}"/>').format(
                    _LEFT, WIDTH - _RIGHT, y, y
                )
            )
            parts.append(Markup('<text class="y" x="{}" y="{:.1f}">{}</text>').format(_LEFT - 6, y + 4, shown(value)))
        whole = sorted({round(value) for value in ticks(self.from_x, self.to_x, 7)})
        for value in whole:
            x, _ = self.place((value, self.from_y))
            parts.append(Markup('<text class="x" x="{:.1f}" y="{}">{}</text>').format(x, HEIGHT - 8, value))
        return Markup("").join(parts)


def _style(line: Line, place: int) -> str:
    return "level" if line.is_level else f"d{place // COLOURS % 3}"


def _drawn(line: Line, place: int, box: _Box) -> Markup:
    points = line.points
    if line.is_level:
        value = points[-1][1]
        points = [(box.from_x, value), (box.to_x, value)]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in map(box.place, thinned(points)))
    colour, style = place % COLOURS, _style(line, place)
    drawn = Markup('<polyline class="line c{} {}" points="{}"/>').format(colour, style, path)
    marks = [line.mark] if line.mark else []
    if len(line.points) == 1 and not line.is_level:
        marks = [line.points[0]]
    for mark in marks:
        x, y = box.place(mark)
        drawn += Markup('<circle class="mark c{}" cx="{:.1f}" cy="{:.1f}" r="4.5"/>').format(colour, x, y)
    return drawn
