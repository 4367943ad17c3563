"""Compare what was computed in bfloat16 with what is expected in float32.

Single numbers differ too much for that. What is compared is how far they lie off on the whole: for
an entry, the root mean square of the differences over that of the numbers expected (for scores the
difference itself); for a row, the mean over its entries, and the largest of them. Twice what was
measured on bfloat16 implementations (`bfloat16.json`) is allowed.
"""
import math

import numpy as np

from compare import FAIL, NOT_SHOWN, PASS, Result, as_numbers, entries_of

ROWS = ("hidden", "next_logits", "stop.layers", "stop.hidden", "logits", "scores", "loss", "grad")
ALLOWED = 2.0  # times the largest that was measured,
LEAST = 1e-3   # or than this, where less was measured


def distance(row, expected, found):
    """How far an entry lies off, or None where its shape is another."""
    expected = as_numbers(expected)
    found = as_numbers(found)
    if found is None or found.shape != expected.shape:
        return None
    if not np.isfinite(found).all():
        return math.inf
    off = float(np.sqrt(((found - expected) ** 2).mean()))
    if row in ("scores", "loss"):
        return off
    return off / max(float(np.sqrt((expected ** 2).mean())), 1e-30)


def distances(row, expected, found):
    """{label: distance, or None} of the entries that are shown."""
    given = entries_of(row, found)
    result = {}
    for label, entry in entries_of(row, expected).items():
        if given.get(label) is not None:
            result[label] = distance(row, entry, given[label])
    return result


def compare_row(name, row, expected, found, manifest):
    """{label: Result} of a row, and of its mean under "mean"."""
    measured = manifest["bfloat16"]["rows"][name][row]
    largest = ALLOWED * max(LEAST, measured["largest"])
    mean = ALLOWED * max(LEAST, measured["mean"])
    off = distances(row, expected, found)
    results = {}
    for label in entries_of(row, expected):
        if label not in off:
            results[label] = Result(NOT_SHOWN)
        elif off[label] is None:
            results[label] = Result(FAIL, ": found another shape than expected", math.inf)
        else:
            state = PASS if off[label] <= largest else FAIL
            results[label] = Result(state, "", off[label], largest)
    known = [value for value in off.values() if value is not None]
    if known and len(known) == len(results):
        average = sum(known) / len(known)
        state = PASS if average <= mean else FAIL
        results["mean"] = Result(state, " of all entries", average, mean)
    return results
