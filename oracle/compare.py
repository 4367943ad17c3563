"""Compare what was handed in with what is expected, row by row, and name the cause of a failure.

A row is one quantity of one case. It has entries: one a prefix, a run, a problem or a gradient.
Each entry is equal or not; a row passes if all its entries are there and equal.
"""
import dataclasses
import math

import numpy as np

# Tolerances in float32: a difference may be at most tolerance * max(floor, the largest expected).
FLOATS = {
    "hidden": (1e-4, 1.0),
    "next_logits": (1e-4, 1.0),
    "stop.layers": (1e-4, 1.0),
    "stop.hidden": (1e-4, 1.0),
    "logits": (5e-5, 1.0),
    "scores": (1e-5, 1.0),
    "loss": (1e-5, 1.0),
    "grad": (1e-4, 0.0),
    "probabilities": (1e-6, 1.0)}
PATH_SCORE = 3e-5
PATH_ROWS = ("uninterrupted", "paths")

LEVELS = {
    "decoder": ("hidden", "next_logits"),
    "score": ("stop.layers", "stop.hidden", "logits", "scores"),
    "training": ("loss", "grad"),
    "sampler": ("keys", "noise", "probabilities", "kept_sets", "draws", "tokens"),
    "run": ("ranks", "votes", "uninterrupted", "paths", "kept")}
DIAGNOSTIC = ("stop.layers", "stop.hidden")  # a level passes without them
LEVEL_OF = {row: level for level, rows in LEVELS.items() for row in rows}

# Rows in the order of computation. A mistake in an earlier row of a chain spoils the later ones.
CHAINS = {
    "model": LEVELS["decoder"] + LEVELS["score"] + LEVELS["training"],
    "sampler": LEVELS["sampler"],
    "ranks": ("ranks",),
    "votes": ("votes",),
    "run": ("uninterrupted", "paths", "kept")}

CLAUSES = {
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
    "kept_sets": ["S2", "S3", "S4"],
    "draws": ["S5", "S6"],
    "tokens": ["S6", "S8", "S9"],
    "ranks": ["R4"],
    "votes": ["R8"],
    "uninterrupted": ["R1", "R2", "S8", "S9"],
    "paths": ["R2", "R3", "R5", "R6", "R7", "R9"],
    "kept": ["R4", "R7", "R9"]}

PASS = "PASS"
FAIL = "FAIL"
NOT_SHOWN = "NOT SHOWN"


@dataclasses.dataclass
class Result:
    """How one entry, or the worst of a row, compares."""
    state: str
    place: str = ""          # where it first differs
    difference: float = 0.0
    allowed: float = 0.0


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
    """The float64 array of nested lists of numbers, or None where they are something else."""
    try:
        found = np.asarray(value)
    except ValueError:
        return None
    if found.dtype.kind not in "fiu":
        return None
    return found.astype(np.float64)


def allowed_difference(row, expected):
    """How far the numbers of an entry (an array) may lie from those expected."""
    tolerance, floor = FLOATS[row]
    largest = float(np.abs(expected).max(initial=0.0))
    return tolerance * max(floor, largest, 1e-30)


def differences(expected, found):
    """|found - expected|; what is no number is infinitely far off."""
    with np.errstate(invalid="ignore"):
        off = np.abs(found - expected)
    return np.where(np.isnan(off), math.inf, off)


def compare_numbers(row, expected, found):
    """The Result of an entry of numbers."""
    expected = as_numbers(expected)
    numbers = as_numbers(found)
    if numbers is None:
        return Result(FAIL, f": found {shortened(found)}, expected numbers", math.inf)
    if numbers.shape != expected.shape:
        found_shape = list(numbers.shape)
        return Result(FAIL, f": shape {found_shape}, expected {list(expected.shape)}", math.inf)
    off = differences(expected, numbers)
    allowed = allowed_difference(row, expected)
    largest = float(off.max(initial=0.0))
    if largest <= allowed:
        return Result(PASS, "", largest, allowed)
    first = [int(place) for place in np.argwhere(off > allowed)[0]]
    return Result(FAIL, str(first) if first else "", largest, allowed)


def shortened(value):
    """The repr of a found value, cut to 40 characters."""
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."


def normalised_key(key):
    """A key in 16 hexadecimal digits, whatever its case and prefix."""
    if not isinstance(key, str):
        return key
    return key.lower().removeprefix("0x").zfill(16)


def compare_exact(row, expected, found):
    """The Result of an entry that must be equal."""
    if row == "keys":
        expected = normalised_key(expected)
        found = normalised_key(found)
    if row in ("kept_sets", "kept", "ranks") and isinstance(found, list):
        expected = sorted(expected, key=str)
        found = sorted(found, key=str)
    if found == expected and type(found) is type(expected):
        return Result(PASS)
    if isinstance(found, list) and isinstance(expected, list):
        for i in range(max(len(found), len(expected))):
            if found[i:i + 1] != expected[i:i + 1]:
                return Result(FAIL, f"[{i}]", math.inf)
    return Result(FAIL, f": found {shortened(found)}, expected {shortened(expected)}", math.inf)


def is_list_of_integers(value):
    """Whether a value is a list of integers."""
    return isinstance(value, list) and all(type(item) is int for item in value)


def name_of(path):
    """A path's index and, where it branched, its branches: 7 or 7.0.2. None where it has none."""
    branches = path.get("branches", [])
    if type(path.get("index")) is not int or not is_list_of_integers(branches):
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


def compare_paths(expected, found):
    """The Result of one run's paths: tokens and statuses equal, scores within tolerance."""
    by_name = paths_by_name(found)
    if by_name is None:
        return Result(FAIL, ": expected objects of index, ids, status and score", math.inf)
    names = {name_of(path) for path in expected}
    if by_name.keys() != names:
        odd = min(by_name.keys() ^ names)
        where = "not expected" if odd in by_name else "missing"
        return Result(FAIL, f": path {odd} is {where}", math.inf)
    largest = 0.0
    missing_score = False
    for path in expected:
        given = by_name[name_of(path)]
        place = f" path {name_of(path)}"
        if given.get("ids") != path["ids"]:
            return Result(FAIL, f"{place}: ids{first_difference(path['ids'], given.get('ids'))}",
                          math.inf)
        if given.get("status") != path["status"]:
            what = f"status {shortened(given.get('status'))}, expected {path['status']}"
            return Result(FAIL, f"{place}: {what}", math.inf)
        if "score" not in path:
            continue
        score = given.get("score")
        if score is None:
            missing_score = True
            continue
        if type(score) not in (int, float):
            return Result(FAIL, f"{place}: score {shortened(score)}, expected a number", math.inf)
        off = abs(score - path["score"])
        if not off <= PATH_SCORE:
            return Result(FAIL, f"{place}: score", off, PATH_SCORE)
        largest = max(largest, off)
    if missing_score:
        return Result(NOT_SHOWN, " scores of paths", largest, PATH_SCORE)
    return Result(PASS, "", largest, PATH_SCORE)


def first_difference(expected, found):
    """The place in brackets where two lists first differ."""
    if not isinstance(found, list):
        return f" {shortened(found)}"
    for i in range(max(len(expected), len(found))):
        if expected[i:i + 1] != found[i:i + 1]:
            return f"[{i}]"
    return ""


def compare_entry(row, expected, found):
    """The Result of one entry in float32."""
    if found is None and not (row == "votes" and expected is None):
        return Result(NOT_SHOWN)
    if row in FLOATS:
        return compare_numbers(row, expected, found)
    if row in PATH_ROWS:
        return compare_paths(expected, found)
    return compare_exact(row, expected, found)


def compare_row(row, expected, found):
    """{label: Result} of a row's entries. `found` is None where the row is not shown."""
    results = {}
    given = entries_of(row, found)
    wanted = entries_of(row, expected)
    for label, entry in wanted.items():
        if label not in given:
            results[label] = Result(NOT_SHOWN)
        else:
            results[label] = compare_entry(row, entry, given[label])
    unknown = [label for label in given if label not in wanted]
    if unknown or (found is not None and not given):
        what = f": found {shortened(unknown[0])}, which is unknown" if unknown else ""
        what = what or f": found {shortened(found)}, expected {len(wanted)} entries"
        results["unknown"] = Result(FAIL, what, math.inf)
    return results


def summary_of(results):
    """One Result for a row: failed if an entry fails, shown if all entries are."""
    failed = [label for label, result in results.items() if result.state == FAIL]
    if failed:
        worst = max(results[label].difference for label in failed)
        first = results[failed[0]]
        label = "" if failed[0] in ("", "unknown") else f"[{failed[0]}]"
        return Result(FAIL, label + first.place, worst, first.allowed)
    shown = [result for result in results.values() if result.state == PASS]
    largest = max((result.difference for result in shown), default=0.0)
    allowed = max((result.allowed for result in shown), default=0.0)
    if len(shown) < len(results):
        part = f" {len(shown)} of {len(results)}" if shown else ""
        return Result(NOT_SHOWN, part, largest, allowed)
    return Result(PASS, "", largest, allowed)


# --------------------------------------------------------------------------------- the causes

EXACT = 2e-3   # a mistake is recognised within this share of what it changes,
ROUNDED = 0.25  # or, where it only rounds, within this one


def matches_numbers(row, wrong, expected, found, rounded):
    """Whether an entry holds the numbers of a mistake.
    wrong: {"at": flat places, "values"}, or {"shape"} where the mistake gives another shape."""
    numbers = as_numbers(found)
    expected = as_numbers(expected)
    if numbers is None:
        return False
    if "shape" in wrong or numbers.shape != expected.shape:
        return list(numbers.shape) == wrong.get("shape")
    values = np.array(wrong["values"], dtype=np.float64)
    off = differences(values, numbers.reshape(-1)[wrong["at"]])
    change = np.abs(values - expected.reshape(-1)[wrong["at"]])
    share = ROUNDED if rounded else EXACT
    allowed = min(allowed_difference(row, expected), root_mean_square(change) / 4)
    return root_mean_square(off) <= max(allowed, share * root_mean_square(change))


def root_mean_square(values):
    """The root of the mean square of an array."""
    return float(np.sqrt((values ** 2).mean()))


def with_wrong_paths(expected, wrong):
    """A run's paths as a mistake has them: some are "value", others "gone"."""
    by_name = {name_of(path): path for path in expected}
    for path in wrong["value"]:
        by_name[name_of(path)] = path
    return [path for name, path in by_name.items() if name not in wrong.get("gone", [])]


def matches(row, wrong, expected, found, rounded=False):
    """Whether an entry is what a mistake gives."""
    if row in FLOATS:
        return matches_numbers(row, wrong, expected, found, rounded)
    if row in PATH_ROWS:
        wrong = with_wrong_paths(expected, wrong)
        return compare_paths(wrong, found).state != FAIL
    return compare_exact(row, wrong["value"], found).state == PASS


def explains_row(mistake, case, row, expected, found, results):
    """Whether a mistake gives the shown entries of a row, right ones and wrong ones."""
    about = mistake["cases"].get(case, {})
    if row in mistake.get("unknown_rows", []):
        return all(result.state != FAIL for result in results.values())
    wrong = about.get(row, {})
    unknown = wrong.get("unknown", [])
    entries = wrong.get("entries", {})
    expected = entries_of(row, expected)
    found = entries_of(row, found)
    for label, result in results.items():
        if result.state == NOT_SHOWN and label not in found or found.get(label) is None:
            if result.state == FAIL:
                return False
            if row != "votes" or label not in entries:
                continue
        if label in unknown:
            continue
        if label in entries:
            rounded = mistake.get("rounded", False)
            if not matches(row, entries[label], expected[label], found[label], rounded):
                return False
        elif result.state == FAIL:
            return False
    return True


def is_touched(mistake, case, row, results):
    """Whether a mistake has wrong entries among those that fail in a row."""
    entries = mistake["cases"].get(case, {}).get(row, {}).get("entries", {})
    return any(label in entries for label, result in results.items() if result.state == FAIL)


def candidates(mistakes, case, chain, expected, found, rows):
    """The mistakes that explain the first failing row of a chain in a case, and the rows before it.
    rows: {row: {label: Result}} of the case."""
    order = [row for row in CHAINS[chain] if row in rows]
    failing = [row for row in order if summary_of(rows[row]).state == FAIL]
    if not failing:
        return []
    first = failing[0]
    chosen = []
    for mistake in mistakes:
        if mistake["chain"] != chain or not is_touched(mistake, case, first, rows[first]):
            continue
        earlier = order[:order.index(first) + 1]
        if explains_rows(mistake, case, earlier, expected, found, rows):
            chosen.append(mistake)
    return chosen


def explains_rows(mistake, case, names, expected, found, rows):
    """Whether a mistake gives what is shown of all these rows of a case."""
    for row in names:
        if not explains_row(mistake, case, row, expected[row], found.get(row), rows[row]):
            return False
    return True


def titles(chosen):
    """The different titles among mistakes, in their order."""
    return list(dict.fromkeys(mistake["what"] for mistake in chosen))


def decide(chosen, narrower):
    """`chosen`, cut to those in `narrower` as long as any is left."""
    names = [mistake["key"] for mistake in narrower]
    left = [mistake for mistake in chosen if mistake["key"] in names]
    return left or chosen


def name_cause(mistakes, chain, cases):
    """What went wrong in a chain: {"first": case and row, "cause": a title or None, "candidates"}.

    cases: {case: {"expected", "found", "rows"}}. A mistake that would give something else in
    another case that fails is none. Several that explain the first failing row are told apart by
    the cases that pass and by the later rows; if they cannot be, none is named."""
    failing = {}
    first = None
    for case, about in cases.items():
        order = [row for row in CHAINS[chain] if row in about["rows"]]
        bad = [row for row in order if summary_of(about["rows"][row]).state == FAIL]
        if not bad:
            continue
        failing[case] = candidates(
            mistakes, case, chain, about["expected"], about["found"], about["rows"])
        summary = summary_of(about["rows"][bad[0]])
        place = {"case": case, "row": bad[0], "order": CHAINS[chain].index(bad[0]),
                 "place": summary.place}
        if first is None or place["order"] < first["order"]:
            first = place
        elif place["order"] == first["order"] and not failing[first["case"]]:
            first = place  # as early, and perhaps explained
    if first is None:
        return None
    chosen = failing[first["case"]]
    for case, others in failing.items():
        chosen = [mistake for mistake in chosen
                  if mistake in others or not touches_any(mistake, [case], cases, chain)]
    passing = [case for case in cases if case not in failing]
    chosen = decide(chosen, [mistake for mistake in chosen
                             if not touches_any(mistake, passing, cases, chain)])
    about = cases[first["case"]]
    order = [row for row in CHAINS[chain] if row in about["rows"]]
    later = [mistake for mistake in chosen if explains_rows(
        mistake, first["case"], order, about["expected"], about["found"], about["rows"])]
    chosen = decide(chosen, later)
    names = titles(chosen)
    return {
        "case": first["case"],
        "row": first["row"],
        "place": first["place"],
        "cause": names[0] if len(names) == 1 else None,
        "candidates": names,
        "keys": [mistake["key"] for mistake in chosen]}


def touches_any(mistake, names, cases, chain):
    """Whether a mistake shows in what is handed in for some cases."""
    for case in names:
        for row in CHAINS[chain]:
            results = cases[case]["rows"].get(row, {})
            entries = mistake["cases"].get(case, {}).get(row, {}).get("entries", {})
            if any(label in entries and result.state != NOT_SHOWN
                   for label, result in results.items()):
                return True
    return False
