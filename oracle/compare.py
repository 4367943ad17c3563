"""Compare what was handed in with what is expected, row by row. Needs the standard library alone.

A row is one quantity of one case. It has entries: one a prefix, a run, a problem or a gradient.
Each entry passes, is acceptable, fails or is not shown; a row is as good as the worst of them.
"""
import dataclasses
import math
from typing import NamedTuple

PATH_ROWS = ("uninterrupted", "paths")
NO_SCORES = ": no path has a score"
PROBABILITY = 1e-6  # how far a probability may lie off

LEVELS = {
    "decoder": ("rope", "layers", "experts", "hidden", "next_logits"),
    "score": ("stop.layers", "stop.hidden", "logits", "scores"),
    "training": ("loss", "grad"),
    "sampler": ("keys", "noise", "probabilities", "kept_sets", "draws", "tokens"),
    "run": ("ranks", "votes", "uninterrupted", "paths", "kept")}
DIAGNOSTIC = ("rope", "layers", "experts", "stop.layers", "stop.hidden")  # a level passes without
LEVEL_OF = {row: level for level, rows in LEVELS.items() for row in rows}
NUMBER_ROWS = ("rope", "layers", "hidden", "next_logits", "stop.layers", "stop.hidden", "logits",
               "scores", "loss", "grad", "probabilities")

# Rows in the order of computation. A mistake in an earlier row of a chain spoils the later ones.
CHAINS = {
    "model": LEVELS["decoder"] + LEVELS["score"] + LEVELS["training"],
    "sampler": LEVELS["sampler"],
    "ranks": ("ranks",),
    "votes": ("votes",),
    "run": ("uninterrupted", "paths", "kept")}

CLAUSES = {
    "rope": ["D5", "D6"],
    "layers": [f"D{number}" for number in range(1, 12)] + ["D13", "D14"],
    "experts": ["D11"],
    "hidden": [f"D{number}" for number in range(1, 15)],
    "next_logits": ["D12"],
    "stop.layers": ["C1", "C2", "C3", "C4", "C5", "C6", "C9"],
    "stop.hidden": ["C6"],
    "logits": ["C1", "C2", "C3", "C4", "C5", "C7", "C9"],
    "scores": ["C8"],
    "loss": ["T1", "T2"],
    "grad": ["T3", "T4"],
    "keys": ["S7", "S8"],
    "noise": ["S7", "S9"],
    "probabilities": ["S1", "S2", "S3", "S4", "S5"],
    "kept_sets": ["S1", "S2", "S3", "S4", "S5"],
    "draws": ["S5", "S6"],
    "tokens": ["S6", "S8", "S9"],
    "ranks": ["R4"],
    "votes": ["R8"],
    "uninterrupted": ["R1", "R2", "S8", "S9"],
    "paths": ["R2", "R3", "R5", "R6", "R7", "R9"],
    "kept": ["R4", "R7", "R9"]}

PASS = "PASS"
ACCEPTABLE = "ACCEPTABLE"
FAIL = "FAIL"
NOT_SHOWN = "NOT SHOWN"


@dataclasses.dataclass
class Result:
    """How one entry, or the worst of a row, compares."""
    state: str
    place: str = ""          # where it first differs
    difference: float = 0.0
    allowed: float = 0.0
    why: str = ""            # of an acceptable one: the rounding that it chose


class Numbers(NamedTuple):
    """An array: its shape, and its numbers in row order."""
    shape: tuple
    values: list


def entries_of(row, value):
    """{label: entry} of a row's value; {} where it is none."""
    if row == "loss":
        return {} if value is None else {"": value}
    if row == "grad":
        return value if isinstance(value, dict) else {}
    if not isinstance(value, list):
        return {}
    return {str(i): entry for i, entry in enumerate(value)}


def as_numbers(value):
    """The Numbers of nested lists of numbers, or None where they are something else."""
    shape = []
    values = [value]
    while values and isinstance(values[0], list):
        width = len(values[0])
        inner = []
        for part in values:
            if not isinstance(part, list) or len(part) != width:
                return None
            inner += part
        shape.append(width)
        values = inner
    numbers = []
    for value in values:
        if type(value) not in (int, float):
            return None
        numbers.append(as_float(value))
    return Numbers(tuple(shape), numbers)


def as_float(number):
    """A float64; infinity for an integer beyond its range."""
    try:
        return float(number)
    except OverflowError:
        return math.inf if number > 0 else -math.inf


def largest_of(values):
    """The largest size of some numbers; 0 of none."""
    return max(map(abs, values), default=0.0)


def distance(expected, found):
    """|found - expected|; what is no number is infinitely far off, and equal infinities are not."""
    if found == expected:
        return 0.0
    off = abs(found - expected)
    return math.inf if math.isnan(off) else off


def compare_numbers(expected, found, allowed):
    """The Result of an entry of numbers. expected, found: nested lists or Numbers."""
    expected = expected if isinstance(expected, Numbers) else as_numbers(expected)
    numbers = found if isinstance(found, Numbers) else as_numbers(found)
    if numbers is None:
        return Result(FAIL, f": found {shortened(found)}, expected numbers", math.inf, allowed)
    if numbers.shape != expected.shape:
        what = f": shape {list(numbers.shape)}, expected {list(expected.shape)}"
        return Result(FAIL, what, math.inf, allowed)
    off = list(map(distance, expected.values, numbers.values))
    largest = max(off, default=0.0)
    if largest <= allowed:
        return Result(PASS, "", largest, allowed)
    first = next(i for i, one in enumerate(off) if one > allowed)
    place = str(place_in(expected.shape, first)) if expected.shape else ""
    value = numbers.values[first]
    if not math.isfinite(value):
        shown = "NaN" if math.isnan(value) else str(value)
        return Result(FAIL, f"{place}: found {shown}", value, allowed)
    return Result(FAIL, place, largest, allowed)


def place_in(shape, flat):
    """The indices of a flat place in an array."""
    indices = []
    for size in reversed(shape):
        indices.insert(0, flat % size)
        flat //= size
    return indices


def shortened(value):
    """The repr of a found value, in ASCII, cut to 40 characters."""
    if isinstance(value, (list, dict)):
        kind = "a list" if isinstance(value, list) else "an object"
        return f"{kind} of {len(value)}"
    if isinstance(value, float) and math.isnan(value):
        return "NaN"
    if isinstance(value, int) and abs(value) >= 10 ** 30:
        return "an integer of more than 30 digits"
    text = ascii(value[:50] if isinstance(value, str) else value)
    return text if len(text) <= 40 else text[:37] + "..."


def normalised_key(key):
    """A key in 16 hexadecimal digits, whatever its case and prefix."""
    if not isinstance(key, str):
        return key
    return key.lower().removeprefix("0x").zfill(16)


def is_same(expected, found):
    """Whether two JSON values are equal, and of equal types: 1 is neither 1.0 nor true."""
    if type(expected) is not type(found):
        return False
    if isinstance(expected, list):
        return len(expected) == len(found) and all(map(is_same, expected, found))
    return expected == found


def compare_exact(row, expected, found):
    """The Result of an entry that must be equal."""
    if row == "keys":
        expected = normalised_key(expected)
        found = normalised_key(found)
    if row == "noise" and isinstance(found, list):
        found = [float(x) if type(x) is int and abs(x) < 2 ** 53 else x for x in found]
    if row in ("kept_sets", "kept", "ranks") and isinstance(found, list):
        expected = sorted(expected, key=str)
        found = sorted(found, key=as_sortable)
    if is_same(expected, found):
        return Result(PASS)
    if isinstance(found, list) and isinstance(expected, list):
        for i in range(max(len(found), len(expected))):
            if not is_same(expected[i:i + 1], found[i:i + 1]):
                shown = [shortened(value[i]) if i < len(value) else "nothing"
                         for value in (found, expected)]
                return Result(FAIL, f"[{i}]: found {shown[0]}, expected {shown[1]}", math.inf)
    return Result(FAIL, f": found {shortened(found)}, expected {shortened(expected)}", math.inf)


def as_sortable(value):
    """Text by which any JSON values can be put in order; an index sorts as `str` does."""
    if type(value) is int and abs(value) < 2 ** 64 or isinstance(value, str):
        return str(value)
    return shortened(value)


def is_list_of_integers(value):
    """Whether a value is a list of integers of at most 64 bits."""
    return isinstance(value, list) and all(type(x) is int and abs(x) < 2 ** 64 for x in value)


def name_of(path):
    """A path's index and, where it branched, its branches: 7 or 7.0.2. None where it has none."""
    branches = path.get("branches", [])
    if not is_list_of_integers([path.get("index")]) or not is_list_of_integers(branches):
        return None
    return ".".join([str(number) for number in (path["index"], *branches)])


def paths_by_name(paths):
    """{name: path} of a run's paths in any order, or None where they are none."""
    if not isinstance(paths, list):
        return None
    found = {}
    for path in paths:
        name = name_of(path) if isinstance(path, dict) else None
        if name is None:
            return None
        found[name] = path
    return found if len(found) == len(paths) else None


def compare_paths(expected, found, allowed):
    """The Result of one run's paths: tokens and statuses equal, scores within `allowed`."""
    by_name = paths_by_name(found)
    if by_name is None:
        return Result(FAIL, ": expected objects of index, ids, status and score", math.inf)
    names = {name_of(path) for path in expected}
    if by_name.keys() != names:
        odd = min(by_name.keys() ^ names)
        where = "not expected" if odd in by_name else "missing"
        return Result(FAIL, f": path {odd} is {where}", math.inf)
    largest = 0.0
    without_score = []
    for path in expected:
        given = by_name[name_of(path)]
        place = f" path {name_of(path)}"
        if not is_same(path["ids"], given.get("ids")):
            return Result(FAIL, f"{place}: ids{first_difference(path['ids'], given.get('ids'))}",
                          math.inf)
        if given.get("status") != path["status"]:
            what = f"status {shortened(given.get('status'))}, expected {path['status']}"
            return Result(FAIL, f"{place}: {what}", math.inf)
        if "score" not in path:
            continue
        score = given.get("score")
        if score is None:
            without_score.append(name_of(path))
            continue
        if type(score) not in (int, float):
            return Result(FAIL, f"{place}: score {shortened(score)}, expected a number", math.inf)
        off = distance(path["score"], as_float(score))
        if off > allowed:
            shown = f": found {shortened(score)}" if not math.isfinite(as_float(score)) else ""
            return Result(FAIL, f"{place}: score{shown}", off, allowed)
        largest = max(largest, off)
    if len(without_score) == len(expected):
        return Result(NOT_SHOWN, NO_SCORES)
    if without_score:
        what = f" path {without_score[0]}: no score, though it was checked"
        return Result(FAIL, what, math.inf, allowed)
    return Result(PASS, "", largest, allowed)


def first_difference(expected, found):
    """The place in brackets where two lists first differ."""
    if not isinstance(found, list):
        return f": found {shortened(found)}"
    for i in range(max(len(expected), len(found))):
        if not is_same(expected[i:i + 1], found[i:i + 1]):
            return f"[{i}]"
    return ""


def allowed_of(row, label, allowed):
    """How far an entry's numbers may lie off. allowed: {row: its entries' tolerances}."""
    if row == "probabilities":
        return PROBABILITY
    return entries_of(row, allowed.get(row)).get(label, 0.0)


def compare_entry(row, expected, found, allowed):
    """The Result of one entry."""
    if found is None and row != "votes":  # there null is an answer: none
        return Result(NOT_SHOWN)
    if row in NUMBER_ROWS:
        return compare_numbers(expected, found, allowed)
    if row in PATH_ROWS:
        return compare_paths(expected, found, allowed)
    return compare_exact(row, expected, found)


def compare_row(row, expected, found, allowed):
    """{label: Result} of a row's entries. `found` is None where the row is not shown; allowed:
    {row: tolerances} of the case."""
    results = {}
    given = entries_of(row, found)
    wanted = entries_of(row, expected)
    for label, entry in wanted.items():
        if label not in given:
            results[label] = Result(NOT_SHOWN)
        else:
            limit = allowed_of(row, label, allowed)
            results[label] = compare_entry(row, entry, given[label], limit)
    if row == "paths":
        require_scores(results)
    unknown = [label for label in given if label not in wanted]
    if unknown or (found is not None and not isinstance(found, list) and not given):
        what = f": found {shortened(unknown[0])}, which is unknown" if unknown else ""
        what = what or f": found {shortened(found)}, expected {len(wanted)} entries"
        results["unknown"] = Result(FAIL, what, math.inf)
    return results


def require_scores(results):
    """Fail the runs without any score where another run has them: so there is a check, and it was
    left out."""
    if any(result.state == PASS for result in results.values()):
        for label, result in results.items():
            if result.place == NO_SCORES:
                what = f"{NO_SCORES}, though every path was checked"
                results[label] = Result(FAIL, what, math.inf)


def accept(row, results, alternatives, found, allowed):
    """Put ACCEPTABLE in the place of FAIL where a row follows a rounding that a port may choose.

    alternatives: pairs of its name and {label: the numbers it gives}. One rounding must explain all
    the entries of the row that fail."""
    failing = [label for label, result in results.items() if result.state == FAIL]
    given = entries_of(row, found)
    for why, entries in alternatives:
        judged = {}
        for label in failing:
            if label in entries and label in given:
                limit = allowed_of(row, label, allowed)
                judged[label] = compare_entry(row, entries[label], given[label], limit)
        if failing and len(judged) == len(failing):
            if all(result.state == PASS for result in judged.values()):
                for label, result in judged.items():
                    results[label] = dataclasses.replace(result, state=ACCEPTABLE, why=why)
                return


def summary_of(results):
    """One Result for a row: failed if an entry fails, shown if all entries are."""
    failed = [label for label, result in results.items() if result.state == FAIL]
    if failed:
        worst = max((results[label].difference for label in failed), key=by_size)
        first = results[failed[0]]
        label = "" if failed[0] in ("", "unknown") else f"[{failed[0]}]"
        return Result(FAIL, label + first.place, worst, first.allowed)
    shown = [result for result in results.values() if result.state != NOT_SHOWN]
    worst = max(shown, key=used_share, default=Result(NOT_SHOWN))
    if len(shown) < len(results):
        missing = [label for label, result in results.items() if result.state == NOT_SHOWN]
        place = next((results[label].place for label in missing if results[label].place), "")
        if shown:
            first = f"[{missing[0]}]{results[missing[0]].place or ' is missing'}"
            place = f" {len(shown)} of {len(results)}: {first}"
        return Result(NOT_SHOWN, place, worst.difference, worst.allowed)
    accepted = [result for result in shown if result.state == ACCEPTABLE]
    if accepted:
        why = accepted[0].why
        return Result(ACCEPTABLE, f": {why}", worst.difference, worst.allowed, why)
    return Result(PASS, "", worst.difference, worst.allowed)


def by_size(number):
    """Sorts numbers with NaN above all."""
    return (1, 0.0) if math.isnan(number) else (0, number)


def used_share(result):
    """How much of what is allowed an entry uses."""
    return result.difference / result.allowed if result.allowed else 0.0
