"""Compare what was computed in bfloat16 with what is expected. Needs the standard library alone.

Single numbers differ too much for float32's tolerances. Of an array what counts is how far it lies
off on the whole: the root mean square of its differences over that of the numbers expected; of
logits the largest difference over sum |w h|. Scores and losses follow from the logits, as they do
in float32. `bfloat16` in the manifest says how far right implementations lie off over many inputs.
"""
import math

from causes import root_mean_square
from compare import FAIL, NOT_SHOWN, PASS, Result, as_numbers, entries_of
from rounding import LOGITS, loss_tolerance, score_tolerance

ARRAYS = ("layers", "hidden", "next_logits", "stop.layers", "stop.hidden", "grad")
ROWS = (*ARRAYS, "logits", "scores", "loss")
ALLOWED = 2.0  # times the largest that was measured


def array_distance(expected, found):
    """How far an array lies off, relative to its size."""
    off = [a - b for a, b in zip(expected.values, found.values)]
    return root_mean_square(off) / max(root_mean_square(expected.values), 1e-30)


def largest_difference(expected, found):
    """How far the worst of some numbers lies off."""
    return max(abs(a - b) for a, b in zip(expected.values, found.values))


def entry_distance(row, expected, found, allowed):
    """How far an entry lies off, as its row measures it; None where its shape is another.
    allowed: its tolerance in float32, from which a logit's sum |w h| follows."""
    expected = as_numbers(expected)
    found = as_numbers(found)
    if found is None or found.shape != expected.shape:
        return None
    if not all(math.isfinite(number) and abs(number) < 1e100 for number in found.values):
        return math.inf
    if row in ARRAYS:
        return array_distance(expected, found)
    if row == "logits":
        return largest_difference(expected, found) / (allowed / LOGITS)
    return largest_difference(expected, found)


def distances(row, expected, found, allowed):
    """{label: distance, or None} of the entries that are shown. allowed: {row: tolerances}."""
    given = entries_of(row, found)
    limits = entries_of(row, allowed.get(row))
    result = {}
    for label, entry in entries_of(row, expected).items():
        if given.get(label) is not None:
            result[label] = entry_distance(row, entry, given[label], limits.get(label))
    return result


def tolerances(name, row, expected, inputs, allowed, measured):
    """{label: how far an entry may lie off} of a row.
    expected: all rows of the case; measured: the manifest's numbers for bfloat16."""
    if row in ARRAYS or row == "logits":
        largest = ALLOWED * measured["rows"][name][row]["largest"]
        return dict.fromkeys(entries_of(row, expected[row]), largest)
    share = ALLOWED * measured["rows"][name]["logits"]["largest"] / LOGITS
    steps = [share * step for step in allowed["logits"]]
    if row == "scores":
        found = [score_tolerance(*pair) for pair in zip(expected["logits"], steps)]
        return {str(i): limit for i, limit in enumerate(found)}
    labels = inputs["labels"]
    return {"": loss_tolerance(expected["loss"], expected["logits"], labels, steps)}


def compare_row(name, row, expected, found, inputs, allowed, measured):
    """{label: Result} of a row, and of the mean over its entries under "mean"."""
    limits = tolerances(name, row, expected, inputs, allowed, measured)
    off = distances(row, expected[row], found, allowed)
    results = {}
    for label, limit in limits.items():
        if label not in off:
            results[label] = Result(NOT_SHOWN)
        elif off[label] is None:
            results[label] = Result(FAIL, ": found another shape than expected", math.inf)
        else:
            state = PASS if off[label] <= limit else FAIL
            results[label] = Result(state, "", off[label], limit)
    if row in ARRAYS or row == "logits":
        known = [value for value in off.values() if value is not None]
        if known and len(known) == len(results):
            average = sum(known) / len(known)
            limit = ALLOWED * measured["rows"][name][row]["mean"]
            state = PASS if average <= limit else FAIL
            results["mean"] = Result(state, " of all entries", average, limit)
    return results
