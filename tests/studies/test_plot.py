"""studies/plot.py: the numbers read back from a drawing's own axes, names that hide nothing, both
colour schemes; and the figures of studies/, which must show what RESULTS.md's tables say."""
import itertools
import math
import random
import re
import sys
import xml.etree.ElementTree as ET

import numpy as np
import pytest
from helpers import ROOT

sys.path.insert(0, str(ROOT / "studies"))
import budget
import labels
import plot
import rollouts
from plumbing.statistics import Interval

SVG = "{http://www.w3.org/2000/svg}"
RESULTS = (ROOT / "studies" / "RESULTS.md").read_text(encoding="utf-8")
FIGURES = ("budget", "labels", "rollouts")


def parsed(file):
    return ET.fromstring(file.read_text(encoding="utf-8"))


def texts(root, name=None):
    """(x, y, text, class) of each text, or of those with a class."""
    for element in root.iter(f"{SVG}text"):
        classes = element.get("class").split()
        if name is None or name in classes:
            yield float(element.get("x")), float(element.get("y")), element.text, classes


def number(text):
    """A tick's number: 1,000 or 30%."""
    value = float(text.replace(",", "").rstrip("%"))
    return value / 100 if text.endswith("%") else value


def reader(ticks, is_log):
    """From pixels to numbers, by the straight line through an axis's ticks [(pixel, text)]."""
    pixels = [pixel for pixel, _ in ticks]
    values = [number(text) for _, text in ticks]
    slope, offset = np.polyfit(pixels, np.log(values) if is_log else values, 1)
    return lambda pixel: math.exp(slope * pixel + offset) if is_log else slope * pixel + offset


def dots(root):
    """(x, y, what is said of it) of each dot."""
    for element in root.iter(f"{SVG}circle"):
        yield float(element.get("cx")), float(element.get("cy")), element.find(f"{SVG}title").text


def box_of(x, y, text, classes):
    """(left, top, right, bottom) of a text in an ordinary sans-serif face."""
    size = 17 if "title" in classes else 14
    letter = 0.63 if "strong" in classes or "number" in classes else 0.52
    width = len(text) * size * letter
    left = x - width if "end" in classes else x - width / 2 if "middle" in classes else x
    return left, y - 0.8 * size, left + width, y + 0.2 * size


def overlap(one, other):
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def require_readable(root):
    """No two texts touch each other, and none leaves the figure."""
    width, height = [float(root.get(name)) for name in ("width", "height")]
    boxes = [(box_of(*text), text[2]) for text in texts(root)]
    for box, text in boxes:
        inside = box[0] >= 0 and box[1] >= 0 and box[2] <= width and box[3] <= height
        assert inside, (text, box)
    for (one, text), (other, other_text) in itertools.combinations(boxes, 2):
        assert not overlap(one, other), (text, other_text)


# Axes


@pytest.mark.parametrize("low, high, ticks", [
    (622, 7957, [500, 1000, 2000, 5000, 10000]),
    (0.58, 37.6, [0.5, 1, 2, 5, 10, 20, 50]),
    (1000, 1000, [1000, 2000]),
    (0.003, 900, [0.001, 0.01, 0.1, 1, 10, 100, 1000])])
def test_logarithmic_ticks(low, high, ticks):
    assert plot.log_ticks(low, high) == pytest.approx(ticks, rel=1e-12)


@pytest.mark.parametrize("low, high, most, ticks", [
    (0.218, 0.804, 8, [0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]),
    (0.22, 0.9, 4, [0.2, 0.4, 0.6, 0.8, 1.0]),
    (0, 0, 8, [0.0]),
    (-3, 17, 4, [-5, 0, 5, 10, 15, 20])])
def test_linear_ticks(low, high, most, ticks):
    found = plot.linear_ticks(low, high, most)
    assert found[:len(ticks)] == pytest.approx(ticks)
    assert len(found) >= 2 and found[-1] >= high


# Curves


def curves_of(random_source, count):
    """Random curves, close to each other; the second one of a single point."""
    curves = []
    for number_of_curve in range(count):
        points = []
        for _ in range(1 if number_of_curve == 1 else 6):
            mean = random_source.uniform(0.3, 0.8)
            x = round(random_source.uniform(500, 9000))
            points.append(plot.Point(x, Interval(mean, mean - 0.05, mean + 0.04), f"{mean}"))
        points.sort()
        look = plot.LOOKS[number_of_curve % len(plot.LOOKS)]
        name = f"curve {number_of_curve}"
        curves.append(plot.Curve(name, "a note that is as long as a note is", look, points))
    return curves


def drawn(tmp_path, curves):
    file = tmp_path / "figure.svg"
    x = plot.Axis("tokens", plot.log_ticks(500, 9000), is_log=True)
    y = plot.Axis("right", plot.linear_ticks(0.2, 0.9), form=".0%")
    panel = plot.Panel(60, 124, plot.WIDTH - 40, 400, x, y)
    plot.write(file, "Title", ["a note"], plot.draw_curves(panel, curves), height=456)
    return parsed(file)


@pytest.mark.parametrize("seed", range(20))
def test_curves_are_where_their_numbers_are_and_their_names_hide_nothing(seed, tmp_path):
    """Dots against the axes' own ticks; bands and bars against the intervals."""
    curves = curves_of(random.Random(seed), 4)
    root = drawn(tmp_path, curves)
    require_readable(root)
    to_x = reader([(x, text) for x, _, text, _ in texts(root, "tick-x")], is_log=True)
    to_y = reader([(y - 5, text) for _, y, text, _ in texts(root, "tick-y")], is_log=False)
    points = [point for curve in curves for point in curve.points]
    found = list(dots(root))
    assert len(found) == len(points)
    for (x, y, about), point in zip(found, points):
        assert about == point.about
        assert to_x(x) == pytest.approx(point.x, rel=1e-3)
        assert to_y(y) == pytest.approx(point.y.mean, abs=1e-3)
    bands = list(root.iter(f"{SVG}polygon"))
    assert len(bands) == 3
    for band, curve in zip(bands, [curves[0], *curves[2:]]):
        heights = [to_y(float(corner.split(",")[1])) for corner in band.get("points").split()]
        highs = [point.y.high for point in curve.points]
        lows = [point.y.low for point in reversed(curve.points)]
        assert heights == pytest.approx(highs + lows, abs=1e-3)
    (bar,) = [line for line in root.iter(f"{SVG}line") if line.get("class") == "whisker"]
    ends = [to_y(float(bar.get(name))) for name in ("y2", "y1")]
    assert ends == pytest.approx(curves[1].points[0].y[1:], abs=1e-3)


def test_a_name_stands_at_its_own_curve_where_there_is_room(tmp_path):
    """Two flat curves far from each other: each name is nearer to its own."""
    curves = []
    for name, height in (("upper", 0.75), ("lower", 0.3)):
        points = [plot.Point(x, Interval(height, height, height), "") for x in (600, 900, 1500)]
        curves.append(plot.Curve(name, "note", "ink", points))
    places = {text: y for _, y, text, _ in texts(drawn(tmp_path, curves))}
    heights = [y for _, y, _ in dots(drawn(tmp_path, curves))]
    assert abs(places["upper"] - heights[0]) < 30
    assert abs(places["lower"] - heights[-1]) < 30


def test_names_and_numbers_are_escaped(tmp_path):
    curves = curves_of(random.Random(0), 1)
    curves = [curves[0]._replace(name="a < b & c")]
    assert "a < b & c" in [text for _, _, text, _ in texts(drawn(tmp_path, curves))]


# Rows


def test_rows_are_where_their_numbers_are(tmp_path):
    """An interval below 0 ends at the edge of a logarithmic panel; what is not finite is left
    out."""
    axis = plot.Axis("", plot.log_ticks(0.5, 40), is_log=True)
    panel = plot.Panel(212, 100, 412, 200, axis)
    marks = [plot.Mark(7.3, (-0.3, 14.9), "first", is_hollow=True),
             plot.Mark(2.0, (math.nan, math.inf), "second"),
             plot.Mark(math.nan, None, "third")]
    file = tmp_path / "rows.svg"
    rows = [plot.Row("name", "note", "bad", [marks])]
    plot.write(file, "Title", [], plot.draw_rows([panel], rows), height=240)
    root = parsed(file)
    to_x = reader([(x, text) for x, _, text, _ in texts(root, "tick-x")], is_log=True)
    found = {about: to_x(x) for x, _, about in dots(root)}
    assert found == pytest.approx({"first": 7.3, "second": 2.0}, rel=1e-2)
    (bar,) = [path for path in root.iter(f"{SVG}path") if path.get("class") == "whisker"]
    left, _, right = re.fullmatch(r"M(\S+) (\S+) H(\S+)", bar.get("d")).groups()
    assert float(left) == 212 and to_x(float(right)) == pytest.approx(14.9, rel=1e-2)


# The figures of the repository


def cells_of(heading):
    """The rows of the first table in RESULTS.md under a heading that begins so, as lists of
    texts."""
    part = RESULTS.partition(f"\n## {heading}")[2]
    table = re.search(r"(?:\|.*\n)+", part).group()
    return [[cell.strip() for cell in line.strip().strip("|").split("|")]
            for line in table.splitlines()[2:]]


def interval_of(text):
    """.366 [.322, .410] as an Interval; 1 as one of no width."""
    found = [float(part) for part in re.findall(r"-?[\d.]+", text)]
    return Interval(*found) if len(found) == 3 else Interval(found[0], found[0], found[0])


def budget_report():
    """The report's rows that the table of plans shows."""
    report = []
    for cells in cells_of("Which plan for a budget"):
        asked, source, plan, tokens, _, _, weighted = cells[:7]
        report.append({
            "budget": float(asked.replace(",", "")) if asked else None, "source": source,
            "signal": "STOP", "plan": plan, "tokens": float(tokens.replace(",", "")),
            **budget.flat("weighted", interval_of(weighted))})
    return report


FORMS = {  # a row of RESULTS.md's table -> the form
    "whole group, nothing pruned": "whole group",
    "the same with STOP's scores as a critic, nothing pruned": "scores as critic, no pruning",
    "inverse-probability weights": "reweighted",
    "the same, pruned paths' scores in the baseline": "reweighted, scores",
    "weights, and scores as a critic": "scores as critic",
    "pruned counted as 0, 60% kept by score": "pruned as 0",
    "kept paths alone, 60% kept by score": "kept only"}


def rollouts_report():
    """(rows, records) that the table of estimates shows."""
    rows = []
    records = []
    for cells in cells_of("Pruned rollouts"):
        form = FORMS[cells[0]]
        rows.append({"form": form, "mse_32": interval_of(cells[4]),
                     "mse_1024": interval_of(cells[5])})
        for seed, reached in enumerate(re.findall(r"\.\d+", cells[6])):
            records.append({"form": form, "refitted": False, "seed": seed,
                            "accuracy": [float(reached)]})
    return rows, records


def labels_rows():
    """The rows of the table of labels, as the study keeps them."""
    rows = []
    for cells in cells_of("How to spend a budget of labels"):
        rows.append({"labels": cells[1], "tokens": float(cells[2].replace(",", "")),
                     "avg_40": interval_of(cells[5]), "avg_80": interval_of(cells[9])})
    return rows


def draw(name, file):
    """A figure of studies/ from the numbers of its table, as its command draws it."""
    if name == "labels":
        labels.draw_figure(file, labels_rows(), [40, 80], unpruned=0.218)
    elif name == "budget":
        budget.draw_figure(file, budget_report(), problems=500)
    else:
        rows, records = rollouts_report()
        rollouts.draw_figure(file, rows, records, before=0.22)


@pytest.mark.parametrize("name", FIGURES)
def test_the_figure_is_what_its_table_says(name, tmp_path):
    draw(name, tmp_path / "figure.svg")
    committed = ROOT / "studies" / f"{name}.svg"
    assert committed.read_text(encoding="utf-8") == (tmp_path / "figure.svg").read_text("utf-8")


def test_the_plans_figure_has_the_unpruned_paths_on_it():
    """64 whole paths, the paper's recipe and the best plan, read from the axes."""
    root = parsed(ROOT / "studies" / "budget.svg")
    to_x = reader([(x, text) for x, _, text, _ in texts(root, "tick-x")], is_log=True)
    to_y = reader([(y - 5, text) for _, y, text, _ in texts(root, "tick-y")], is_log=False)
    found = [(to_x(x), to_y(y)) for x, y, _ in dots(root)]
    for tokens, right in ((7957, 0.366), (3296, 0.568), (2355, 0.768)):
        assert any(x == pytest.approx(tokens, rel=2e-3) and y == pytest.approx(right, abs=2e-3)
                   for x, y in found), tokens


@pytest.mark.parametrize("name", FIGURES)
def test_texts_do_not_touch_each_other(name):
    require_readable(parsed(ROOT / "studies" / f"{name}.svg"))


@pytest.mark.parametrize("name", FIGURES)
def test_every_colour_is_one_of_both_schemes(name):
    """Outside the two schemes there is no colour, and what is used is in both."""
    text = (ROOT / "studies" / f"{name}.svg").read_text(encoding="utf-8")
    light, dark = re.findall(r":root\{([^}]*)\}", text)
    rest = text.replace(light, "").replace(dark, "")
    assert "prefers-color-scheme:dark" in text
    assert not re.search(r"#[0-9a-f]{3,6}\b|rgb\(|white|black", rest)
    used = set(re.findall(r"var\(--([\w-]+)\)", rest)) - {"own"}
    for scheme in (light, dark):
        assert used <= set(re.findall(r"--([\w-]+):", scheme))
