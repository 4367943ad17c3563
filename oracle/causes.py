"""Name the cause of a failure: which known mistake gives these very numbers.

`vectors/mistakes/KEY.json` holds what each mistake gives. Needs the standard library alone.
"""
import math

from compare import (
    CHAINS, FAIL, NO_SCORES, NOT_SHOWN, NUMBER_ROWS, PASS, PATH_ROWS, allowed_of, as_numbers,
    compare_exact, compare_paths, entries_of, name_of, summary_of)
from rounding import FLUSHED

EXACT = 2e-3    # a mistake is recognised within this share of what it changes,
ROUNDED = 0.25  # or, where it only rounds, within this one


class Case:
    """What is expected and what was found of one case, and how they compare."""

    def __init__(self, expected, found, rows, allowed):
        """rows: {row: {label: Result}}; allowed: {row: tolerances}."""
        self.rows = rows
        self.allowed = allowed
        self.expected = {row: entries_of(row, expected[row]) for row in rows}
        self.found = {row: entries_of(row, found.get(row)) for row in rows}
        self.numbers = {}

    def pair(self, row, label):
        """(expected, found) Numbers of an entry, read once."""
        if (row, label) not in self.numbers:
            expected = as_numbers(self.expected[row][label])
            self.numbers[row, label] = expected, as_numbers(self.found[row][label])
        return self.numbers[row, label]

    def first_failing(self, chain):
        """The first row of a chain of computation that fails, or None."""
        for row in self.order(chain):
            if summary_of(self.rows[row]).state == FAIL:
                return row
        return None

    def order(self, chain):
        """The chain's rows that this case has."""
        return [row for row in CHAINS[chain] if row in self.rows]


def root_mean_square(values):
    """The root of the mean square of some numbers."""
    return math.sqrt(math.fsum(value * value for value in values) / len(values))


def matches_numbers(wrong, pair, allowed, rounded):
    """Whether an entry holds the numbers of a mistake.
    wrong: {"at": flat places, "values"}, or {"shape"} where the mistake gives another shape."""
    expected, found = pair
    if found is None:
        return False
    if "shape" in wrong or found.shape != expected.shape:
        return list(found.shape) == wrong.get("shape")
    shown = [found.values[at] for at in wrong["at"]]
    if not all(math.isfinite(number) and abs(number) < 1e100 for number in shown):
        return False
    off = [a - b for a, b in zip(wrong["values"], shown)]
    change = [value - expected.values[at] for value, at in zip(wrong["values"], wrong["at"])]
    share = ROUNDED if rounded else EXACT
    size = root_mean_square(change)
    return root_mean_square(off) <= max(min(allowed, size / 4), share * size)


def has_small_scores(wrong, found):
    """Whether scores are of the size that a mistake gives: 0 is not 1e-19, though neither differs
    more than the other from the right one."""
    if found is None or "shape" in wrong:
        return True
    pairs = zip(wrong["values"], [found.values[at] for at in wrong["at"] if at < len(found.values)])
    return all(abs(shown - value) <= max(ROUNDED * abs(value), FLUSHED) for value, shown in pairs)


def with_wrong_paths(expected, wrong):
    """A run's paths as a mistake has them: some are "value", others "gone"."""
    by_name = {name_of(path): path for path in expected}
    for path in wrong["value"]:
        by_name[name_of(path)] = path
    return [path for name, path in by_name.items() if name not in wrong.get("gone", [])]


def matches(case, row, label, wrong, rounded):
    """Whether an entry is what a mistake gives."""
    allowed = allowed_of(row, label, case.allowed)
    if row in NUMBER_ROWS:
        pair = case.pair(row, label)
        if row == "scores" and not has_small_scores(wrong, pair[1]):
            return False
        return matches_numbers(wrong, pair, allowed, rounded)
    found = case.found[row][label]
    if row in PATH_ROWS:
        paths = with_wrong_paths(case.expected[row][label], wrong)
        return compare_paths(paths, found, allowed).state != FAIL
    return compare_exact(row, wrong["value"], found).state == PASS


def explains_row(mistake, name, row, case):
    """Whether a mistake gives the shown entries of a row, right ones and wrong ones."""
    results = case.rows[row]
    if row in mistake.get("unknown_rows", []):
        return all(result.state != FAIL for result in results.values())
    about = mistake["cases"].get(name, {}).get(row, {})
    unknown = about.get("unknown", [])
    entries = about.get("entries", {})
    for label, result in results.items():
        if result.state == NOT_SHOWN and not result.place:
            if not (row == "votes" and label in entries and label in case.found[row]):
                continue
        if label in unknown:
            continue
        if result.state == FAIL and result.place.startswith(NO_SCORES):
            return False  # no mistake here leaves scores out
        if label in entries:
            if not matches(case, row, label, entries[label], mistake.get("rounded", False)):
                return False
        elif result.state == FAIL:
            return False
    return True


def explains_rows(mistake, name, rows, case):
    """Whether a mistake gives what is shown of all these rows of a case."""
    return all(explains_row(mistake, name, row, case) for row in rows)


def shows_in(mistake, name, row, results):
    """Whether a mistake has wrong entries among those that fail in a row."""
    entries = mistake["cases"].get(name, {}).get(row, {}).get("entries", {})
    return any(label in entries for label, result in results.items() if result.state == FAIL)


def is_untried(mistake, name, row, results):
    """Whether all that fails in a row are entries on which the mistake was not tried."""
    if row in mistake.get("unknown_rows", []):
        return True
    unknown = mistake["cases"].get(name, {}).get(row, {}).get("unknown", [])
    return all(label in unknown for label, result in results.items() if result.state == FAIL)


def explaining(mistakes, name, chain, case):
    """The mistakes that explain the first failing row of a chain in a case, and the rows before."""
    first = case.first_failing(chain)
    earlier = case.order(chain)
    earlier = earlier[:earlier.index(first) + 1]
    chosen = []
    for mistake in mistakes:
        results = case.rows[first]
        fits = shows_in(mistake, name, first, results)
        if not fits and not is_untried(mistake, name, first, results):
            continue
        if explains_rows(mistake, name, earlier, case):
            chosen.append(mistake)
    return chosen


def decide(chosen, narrower):
    """`narrower` where any is left in it, else `chosen`."""
    return narrower or chosen


def name_cause(mistakes, chain, cases):
    """What went wrong in a chain: the first failing case and row, its cause or the candidates.
    None where nothing fails. cases: {name: Case}.

    A mistake is a candidate only if it explains every case: one that comes out right where a case
    fails, wrong where it passes, or otherwise wrong, is none. Several are told apart by the later
    rows; if they cannot be, none is named."""
    failing = {name: case for name, case in cases.items() if case.first_failing(chain)}
    if not failing:
        return None
    chosen = [mistake for mistake in mistakes if mistake["chain"] == chain]
    for name, case in failing.items():
        chosen = explaining(chosen, name, chain, case)
    order = CHAINS[chain]
    first = min(failing, key=lambda name: order.index(failing[name].first_failing(chain)))
    chosen = [mistake for mistake in chosen
              if any(shows_in(mistake, name, case.first_failing(chain),
                              case.rows[case.first_failing(chain)])
                     for name, case in failing.items())]
    for name, case in cases.items():
        if name not in failing:
            chosen = [mistake for mistake in chosen
                      if explains_rows(mistake, name, case.order(chain), case)]
    chosen = decide(chosen, [
        mistake for mistake in chosen
        if all(explains_rows(mistake, name, case.order(chain), case)
               for name, case in failing.items())])
    row = failing[first].first_failing(chain)
    titles = list(dict.fromkeys(mistake["what"] for mistake in chosen))
    return {
        "case": first,
        "row": row,
        "place": summary_of(failing[first].rows[row]).place,
        "cause": titles[0] if len(titles) == 1 else None,
        "candidates": titles,
        "keys": [mistake["key"] for mistake in chosen]}
