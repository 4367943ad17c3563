"""Figures of the studies, drawn as SVG: lines with their intervals, and rows of marks.

No study itself, and not run: budget.py and rollouts.py import it. The colours are those of the
picture of a run, light or dark as the reader's system has it; curves carry their names, so there is
no legend to look up; pointing at a mark shows its numbers.
"""
import dataclasses
import math
from typing import NamedTuple

from commands.picture import DARK, FONT, LIGHT, box, escaped, tag, upright, words
from plumbing.records import write_atomic
from plumbing.statistics import Interval

WIDTH = 640        # pixels of a figure: texts can still be read where it is shown with 400
LINE = 17          # pixels from one line of text to the next
LETTER = 7.3       # pixels of a letter on average, in a wide face
BOLD_LETTER = 8.9  # likewise of a curve's name
LOOKS = ("quiet", "ink", "bad", "high")  # colours of curves and marks, by their names there
STYLE = f"""
.plot{{font:14px {FONT};max-width:100%;height:auto}}
.plot text{{fill:var(--ink)}} .plot .quiet{{fill:var(--quiet)}} .plot .title{{font-size:17px}}
.plot .strong{{font-weight:650}} .plot .end{{text-anchor:end}} .plot .middle{{text-anchor:middle}}
.plot .number{{font-variant-numeric:tabular-nums}} .plot .card{{fill:var(--paper)}}
.plot .halo{{stroke:var(--paper);stroke-width:4;paint-order:stroke}}
.plot .grid{{stroke:var(--line)}} .plot .reference{{stroke:var(--ink);stroke-dasharray:2 3}}
.plot .curve{{stroke:var(--own);stroke-width:2;fill:none}}
.plot .band{{fill:var(--own);opacity:.15}} .plot .whisker{{stroke:var(--own);stroke-width:1.5}}
.plot .dot{{fill:var(--own);stroke:var(--own);stroke-width:1.5}} .plot .name{{fill:var(--own)}}
.plot .hollow{{fill:var(--paper)}}
"""


# Axes


@dataclasses.dataclass
class Axis:
    """One direction of a panel, from the first tick to the last."""
    label: str            # "": said elsewhere
    ticks: list           # rising, at least two
    is_log: bool = False
    form: str = ","       # how a tick's number is written

    def share(self, value):
        """How far along the axis a value lies, from 0 to 1. What lies beyond an end is put there:
        an interval that an axis cannot hold is cut, and so is one below 0 on a logarithmic axis."""
        low = self.ticks[0]
        high = self.ticks[-1]
        value = min(max(value, low), high)
        if self.is_log:
            return math.log(value / low) / math.log(high / low)
        return (value - low) / (high - low)


def log_ticks(low, high):
    """1, 2 and 5 times powers of ten that enclose two positive numbers; of more than nine such
    ticks the powers of ten are left."""
    first = math.floor(math.log10(low))
    last = math.ceil(math.log10(high)) + 1
    powers = [10 ** power if power >= 0 else 1 / 10 ** -power for power in range(first, last + 1)]
    ticks = enclosing([factor * power for power in powers for factor in (1, 2, 5)], low, high)
    return ticks if len(ticks) <= 9 else enclosing(powers, low, high)


def linear_ticks(low, high, most=8):
    """Multiples of 1, 2 or 5 times a power of ten that enclose two numbers, in at most so many
    steps, or one more at either end."""
    span = high - low if high > low else 1.0
    power = 10.0 ** math.floor(math.log10(span / most))
    step = next(factor * power for factor in (1, 2, 5, 10) if span <= factor * power * most)
    first = math.floor(low / step)
    last = max(first + 1, math.ceil(high / step))
    return [round(number * step, 12) for number in range(first, last + 1)]


def enclosing(ticks, low, high):
    """Of rising ticks those from the last one at or below `low` to the first at or above `high`,
    and at least two."""
    first = max(i for i, tick in enumerate(ticks) if tick <= low)
    last = min(i for i, tick in enumerate(ticks) if tick >= high)
    return ticks[first:max(last, first + 1) + 1]


@dataclasses.dataclass
class Panel:
    """A rectangle of a figure, in pixels, with its axes. y: None where rows stand below each
    other."""
    left: float
    top: float
    right: float
    bottom: float
    x: Axis
    y: Axis | None = None

    def across(self, value):
        """Where a value of the x axis lies."""
        return self.left + self.x.share(value) * (self.right - self.left)

    def up(self, value):
        """Where a value of the y axis lies."""
        return self.bottom - self.y.share(value) * (self.bottom - self.top)


def draw_axes(panel):
    """Grid lines, the numbers of the ticks and, below and above, the axes' names."""
    parts = []
    for tick in panel.x.ticks:
        x = panel.across(tick)
        parts.append(upright(x, panel.top, panel.bottom, "grid"))
        text = format(tick, panel.x.form)
        parts.append(words(x, panel.bottom + LINE + 4, text, "quiet middle number tick-x"))
    if panel.x.label:
        middle = (panel.left + panel.right) / 2
        parts.append(words(middle, panel.bottom + 2.6 * LINE, panel.x.label, "quiet middle"))
    if panel.y is None:
        return parts
    for tick in panel.y.ticks:
        y = panel.up(tick)
        line = f"M{panel.left:.1f} {y:.1f} H{panel.right:.1f}"
        parts.append(tag("path", class_="grid", d=line))
        text = format(tick, panel.y.form)
        parts.append(words(panel.left - 8, y + 5, text, "quiet end number tick-y"))
    parts.append(words(panel.left, panel.top - 10, panel.y.label, "quiet"))
    return parts


# Curves with names


class Point(NamedTuple):
    """A value with its interval, at a place of the x axis; about: its numbers in words."""
    x: float
    y: Interval
    about: str


class Curve(NamedTuple):
    """Points of one kind, from left to right, joined by a line; look: of LOOKS; note: a second line
    below the name."""
    name: str
    note: str
    look: str
    points: list


class Box(NamedTuple):
    """A rectangle, in pixels."""
    left: float
    top: float
    width: float
    height: float

    def holds(self, x, y, margin=0.0):
        """Whether a place lies in it, or no further outside than the margin."""
        return (self.left - margin <= x <= self.left + self.width + margin
                and self.top - margin <= y <= self.top + self.height + margin)

    def meets(self, other):
        """Whether two rectangles have a place in common."""
        return (self.left < other.left + other.width and other.left < self.left + self.width
                and self.top < other.top + other.height and other.top < self.top + self.height)


def draw_curves(panel, curves):
    """A panel with its axes, its curves, and each curve's name where it hides nothing."""
    parts = draw_axes(panel)
    for curve in curves:
        shapes = [draw_spread(panel, curve), *[draw_point(panel, point) for point in curve.points]]
        parts.append(tag("g", "".join(shapes), class_="curve-of", style=own_colour(curve.look)))
    for curve, place in zip(curves, place_names(panel, curves)):
        baseline = place.top + LINE - 4
        text = words(place.left, baseline, curve.name, "strong halo name")
        text += words(place.left, baseline + LINE, curve.note, "quiet halo")
        parts.append(tag("g", text, class_="label", style=own_colour(curve.look)))
    return parts


def own_colour(look):
    """The style of shapes of one of LOOKS."""
    return f"--own:var(--{look})"


def places(panel, curve):
    """Where a curve's points lie."""
    return [(panel.across(point.x), panel.up(point.y.mean)) for point in curve.points]


def draw_spread(panel, curve):
    """The line through a curve's points within the band of their intervals; the interval of an only
    point as a bar."""
    xs = [panel.across(point.x) for point in curve.points]
    lows = [panel.up(point.y.low) for point in curve.points]
    highs = [panel.up(point.y.high) for point in curve.points]
    if len(xs) == 1:
        return upright(xs[0], highs[0], lows[0], "whisker")
    outline = [*zip(xs, highs), *reversed(list(zip(xs, lows)))]
    band = tag("polygon", class_="band", points=joined(outline))
    return band + tag("polyline", class_="curve", points=joined(places(panel, curve)))


def joined(corners):
    """Places as SVG writes them."""
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in corners)


def draw_point(panel, point):
    """A dot that tells its numbers."""
    return draw_dot(panel.across(point.x), panel.up(point.y.mean), point.about)


def draw_dot(x, y, about, classes="dot"):
    """A dot; about: what is shown where one points at it."""
    title = tag("title", escaped(about))
    return tag("circle", title, class_=classes, cx=float(x), cy=float(y), r=4.0)


def place_names(panel, curves):
    """The Box of each curve's name and note: near a point of its own, with room of its own, and on
    as little of any curve as possible. Curves with the least choice choose first."""
    covered = [place for curve in curves for place in along(panel, curve)]

    def hidden(candidate):
        return sum(candidate.holds(x, y, 5) for x, y in covered)

    choices = {}  # number of a curve -> its candidates, each with how much it hides
    for number, curve in enumerate(curves):
        width = max(BOLD_LETTER * len(curve.name), LETTER * len(curve.note))
        found = around(panel, curve, width, 2 * LINE + 2)
        choices[number] = [(each, hidden(each)) for each in found if fits(panel, each)]

    def freedom(number):
        return sum(hides == 0 for _, hides in choices[number])

    taken = {}
    for number in sorted(choices, key=freedom):
        def cost(choice):
            candidate, hides = choice
            return sum(candidate.meets(other) for other in taken.values()), hides

        taken[number] = min(choices[number], key=cost)[0]
    return [taken[number] for number in range(len(curves))]


def along(panel, curve):
    """Places on a curve, a few pixels from each other, the interval of an only point included."""
    corners = places(panel, curve)
    if len(corners) == 1:
        x = corners[0][0]
        interval = curve.points[0].y
        corners = [(x, panel.up(interval.low)), (x, panel.up(interval.high))]
    found = []
    for (x, y), (next_x, next_y) in zip(corners, corners[1:]):
        steps = 1 + int(math.hypot(next_x - x, next_y - y) / 4)
        for number in range(steps + 1):
            share = number / steps
            found.append((x + share * (next_x - x), y + share * (next_y - y)))
    return found


def around(panel, curve, width, height):
    """Yield Boxes near a curve's points, the best first; at last ones anywhere in the panel."""
    for gap in (10, 20, 32, 48):
        for x, y in reversed(places(panel, curve)):
            yield Box(x + gap, y - height / 2, width, height)
            for left in (x - width / 2, x - width, x):
                yield Box(left, y - gap - height, width, height)
                yield Box(left, y + gap, width, height)
            yield Box(x - gap - width, y - height / 2, width, height)
    for top in range(int(panel.top), int(panel.bottom - height), 8):
        yield Box(panel.left, float(top), width, height)
        yield Box(panel.right - width, float(top), width, height)


def fits(panel, candidate):
    """Whether a Box lies within a panel."""
    return (panel.left <= candidate.left and candidate.left + candidate.width <= panel.right
            and panel.top <= candidate.top and candidate.top + candidate.height <= panel.bottom)


# Rows of marks


class Mark(NamedTuple):
    """A value in a row, with its interval or None; about: its numbers in words. What is not finite
    is not drawn."""
    value: float
    interval: tuple | None
    about: str
    is_hollow: bool = False


class Row(NamedTuple):
    """What is compared: its name, a note below it, and for each panel its Marks."""
    name: str
    note: str
    look: str
    marks: list


def draw_rows(panels, rows):
    """Panels side by side with the same rows, whose names stand at the left edge of the figure."""
    parts = [part for panel in panels for part in draw_axes(panel)]
    height = (panels[0].bottom - panels[0].top) / len(rows)
    for number, row in enumerate(rows):
        middle = panels[0].top + (number + 0.5) * height
        shapes = [words(16, middle - 2, row.name, "strong name"),
                  words(16, middle - 2 + LINE, row.note, "quiet")]
        for panel, marks in zip(panels, row.marks):
            space = min(11.0, 0.7 * height / max(1, len(marks)))
            for place, mark in enumerate(marks):
                y = middle + (place - (len(marks) - 1) / 2) * space
                shapes += draw_mark(panel, mark, y)
        parts.append(tag("g", "".join(shapes), class_="row", style=own_colour(row.look)))
    return parts


def draw_mark(panel, mark, y):
    """A dot, filled or hollow, on its interval."""
    parts = []
    if mark.interval is not None and all(math.isfinite(end) for end in mark.interval):
        low, high = [panel.across(end) for end in mark.interval]
        parts.append(tag("path", class_="whisker", d=f"M{low:.1f} {y:.1f} H{high:.1f}"))
    if math.isfinite(mark.value):
        classes = "dot hollow" if mark.is_hollow else "dot"
        parts.append(draw_dot(panel.across(mark.value), y, mark.about, classes))
    return parts


# The file


def write(file, title, notes, parts, height):
    """Write a figure of so many pixels in height: its title, lines of notes below it, its parts."""
    lines = [words(16, 28, title, "strong title")]
    for number, note in enumerate(notes):
        lines.append(words(16, 28 + (number + 1.3) * LINE, note, "quiet"))
    label = " ".join([f"{title}.", *notes])
    content = [tag("title", escaped(label)), f"<style>{palette()}{STYLE}</style>",
               box(0, 0, WIDTH, height, "card", 8), *lines, *parts]
    svg = tag("svg", "\n".join(content), xmlns="http://www.w3.org/2000/svg", class_="plot",
              role="img", aria_label=label, viewBox=f"0 0 {WIDTH} {height}", width=WIDTH,
              height=height)
    write_atomic(file, svg + "\n")


def palette():
    """CSS of the colours, light or dark as the reader's system has it."""
    return (f":root{{color-scheme:light dark;{variables(LIGHT)}}}\n"
            f"@media (prefers-color-scheme:dark){{:root{{{variables(DARK)}}}}}")


def variables(scheme):
    """A colour scheme as CSS variables."""
    return ";".join(f"--{name}:{colour}" for name, colour in scheme.items())
