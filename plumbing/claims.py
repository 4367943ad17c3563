r"""What an answer claims beyond its readings (`readings.py`): a reference accepts it, a vote does
not unite it, as what claims the same need not be the same (m + n = 5 and p + q = 5).

A question whose published answer is a number asks for a number: an answer that ends in an equation
with a number claims that number. Claims of the other kinds: an inequality and its interval, the
digits of a number in another base, variables behind a space.
"""
import re
from contextlib import suppress
from functools import lru_cache
from itertools import pairwise

from plumbing.arithmetic import FUNCTIONS, is_number, is_real, same_number
from plumbing.expressions import VARIABLE, Parser, Values
from plumbing.readings import (
    Reading, is_name, readings_of, rewritten, sides_of, split, values_of, without_outer_brackets,
    without_thousands_marks)

_COMMA = re.compile(",")
_VARIABLE = re.compile(VARIABLE)
_ORDER = {"<": "()", r"\le": "[]"}
_REVERSED = {">": "<", r"\ge": r"\le"}
_LITERAL = re.compile(r"[-+]?\s*[0-9]+(?:\.[0-9]+)?")
_DECIMAL = re.compile(r"[-+]?\s*[0-9]*\.([0-9]{2,})")
_IN_A_BASE = re.compile(r"([0-9][0-9A-Fa-f]*)_\s*(?:[2-9]|\{+\s*(?:[0-9]{1,2}|[a-z]+)\s*\}+)")
_SPACE_BEFORE_LETTERS = re.compile(
    r"(?<=[0-9)}])(?:\s|\\[,;: ])+(?=(?!or|and|if)[A-Za-z]{1,3}\s*(?:$|[-+*/^=,)}]))")
_FUNCTION_OF = re.compile(rf"\||\\?(?:{'|'.join(FUNCTIONS)})|[A-Za-z]\s*\(\s*-?[0-9]+\s*\)")
_RATIO = re.compile(
    rf"\\frac\s*\{{\s*{VARIABLE}\s*\}}\s*\{{\s*{VARIABLE}\s*\}}|{VARIABLE}/{VARIABLE}")

_X_AND_Y = str.maketrans("xy", "yx")
_OF_WHOLE_NUMBERS = re.compile(r"!|\\binom")  # what the variables' values are not


def claims_of(answer, reference):
    """Pairs (Reading that the answer claims, Reading of the reference that may be the same)."""
    pairs = []
    for claim in stated_values(answer):
        pairs += [(claim, expected) for expected in readings_of(reference)
                  if expected.equations is None and is_constant(expected.values)]
    for one, other in ((answer, reference), (reference, answer)):
        interval = interval_of(rewritten(one))
        if interval is not None:
            pairs += [(interval, reading) for reading in readings_of(other)
                      if has_brackets_of(interval, reading)]
    return pairs


def is_in_its_base(reference, answer):
    """Whether an answer is 2516 where the reference is 2516_8. (12_{10} accepts 12 as well.)"""
    in_a_base = _IN_A_BASE.fullmatch(rewritten(reference))
    return in_a_base is not None and rewritten(answer).casefold() == in_a_base[1].casefold()


def without_spaces_before_letters(text):
    """The text with 4 h as 4h: a unit behind a space is a product of variables there."""
    return _SPACE_BEFORE_LETTERS.sub("", text)


# The value that an equation states


def is_constant(values):
    """Whether values, one a point, are the same number or list of numbers."""
    def consists_of_numbers(value):
        if isinstance(value, Values):
            return all(map(consists_of_numbers, value.items))
        return is_number(value)

    return (values is not None and consists_of_numbers(values[0])
            and all(value == values[0] for value in values))


@lru_cache(maxsize=4096)
def stated_values(answer):
    """The Readings that the last equation of an answer states for a number: its last constant
    side, or one that only its decimals follow (3/56 = 0.05357). Before it may stand equations that
    name its variables (m = 3, n = 4, m + n = 7)."""
    text = rewritten(answer)
    for spelling in dict.fromkeys((text, without_thousands_marks(text))):
        with suppress(ValueError, ArithmeticError):
            *parts, last = split(without_outer_brackets(spelling), _COMMA)[0]
            sides, signs = sides_of(last)
            if set(signs) != {"="} or parts and is_name(sides[0]):
                continue
            if all(map(names_a_value, parts)):
                return [Reading(None, values) for values in constants_of(sides)]
    return []


def names_a_value(part):
    """Whether a part of a list is an equation of a name, or of a ratio of two: m/n = 3/4."""
    sides, signs = sides_of(part)
    return set(signs) == {"="} and (is_name(sides[0]) or _RATIO.fullmatch(sides[0]) is not None)


def constants_of(sides):
    """The values that a chain of equations states; none where it is to be solved (2x = 10 says 5,
    not 10) or two of its numbers contradict each other (3 = 4)."""
    constants = []
    for side in sides:
        values = values_of(side)
        if is_constant(values):
            constants.append((side, values))
        elif is_to_be_solved(side):
            return []
    stated = []
    for place, (side, values) in enumerate(constants):
        later = [text for text, _ in constants[place + 1:]]
        if all(is_rounding(values[0], text) for text in later):
            stated.append(values)
        elif _LITERAL.fullmatch(side) and values != constants[-1][1]:
            return []
    return stated


def is_rounding(value, text):
    """Whether a text is a decimal of two places or more that a real number is cut or rounded to."""
    decimal = _DECIMAL.fullmatch(text)
    if decimal is None or not is_number(value) or not is_real(value):
        return False
    return abs(value - values_of(text)[0]) < 10 ** -len(decimal[1])


def is_to_be_solved(side):
    r"""Whether a side is a formula of one variable, from whose value the variable follows, or the
    side of a curve (3x + 2y = 6). Quantities that people ask for are names, a function of one
    variable (\sin x, |z|), and of x and y what stays the same or turns its sign where they are
    exchanged (x + y, x - y, xy)."""
    if is_name(side) or _FUNCTION_OF.search(side):
        return False
    parser = Parser(side, 0, words=False)
    try:
        number = parser.read_number()
        exchanged = Parser(side.translate(_X_AND_Y), 0, words=False).read_number()
    except (ValueError, ArithmeticError):
        if not _OF_WHOLE_NUMBERS.search(side):
            return False
        return len(parser.variables) == 1
    if len(parser.variables) > 1 and parser.variables <= {"x", "y", "z"}:
        return not same_number(number, exchanged) and not same_number(number, -exchanged)
    return len(parser.variables) == 1


# Inequalities as intervals


@lru_cache(maxsize=4096)
def interval_of(text):
    """The Reading of an inequality of one variable, x > 5 or 1 < x < 2, as an interval; of several
    that exclude each other (x < 1 or x > 3), and of x != 3, as a union. None of other texts."""
    with suppress(ValueError, ArithmeticError):
        intervals = []
        names = set()
        for part in split(without_outer_brackets(text), _COMMA)[0]:
            name, found = intervals_of(*sides_of(part))
            names.add(name)
            intervals += found
        values = [values_of(interval)[0] for interval in intervals]
        if len(names) == 1 and (len(values) == 1 or exclude_each_other(values)):
            return Reading(None, values_of(r"\cup ".join(intervals)))
    return None


def intervals_of(sides, signs):
    """(the variable, its intervals as texts) of one inequality. ValueError if it is none."""
    if signs and signs[0] in _REVERSED:
        sides = sides[::-1]
        signs = [_REVERSED.get(sign) for sign in signs[::-1]]
    if signs == [r"\ne"]:
        name, number = sides
        ends = [("(", r"-\infty", number, ")"), ("(", number, r"\infty", ")")]
    elif len(signs) not in (1, 2) or not set(signs) <= set(_ORDER):
        raise ValueError
    elif len(signs) == 2:
        low, name, high = sides
        ends = [(_ORDER[signs[0]][0], low, high, _ORDER[signs[1]][1])]
    elif _VARIABLE.fullmatch(sides[0]):
        name, high = sides
        ends = [("(", r"-\infty", high, _ORDER[signs[0]][1])]
    else:
        low, name = sides
        ends = [(_ORDER[signs[0]][0], low, r"\infty", ")")]
    if not _VARIABLE.fullmatch(name):
        raise ValueError
    for _, low, high, _ in ends:
        if not all(is_end(side) for side in (low, high)):
            raise ValueError
    return name, [f"{opening}{low},{high}{closing}" for opening, low, high, closing in ends]


def is_end(side):
    """Whether a side is a real number or an infinity."""
    values = values_of(side)
    is_real_number = is_constant(values) and is_number(values[0]) and is_real(values[0])
    return is_real_number or values[0] in (r"\infty", r"-\infty")


def exclude_each_other(intervals):
    """Whether intervals, Values, have no part in common."""
    def number(end):
        if isinstance(end, str):
            return float(end.replace(r"\infty", "inf"))
        return end

    ends = sorted([number(end) for end in interval.items] for interval in intervals)
    return all(lower[1] <= upper[0] for lower, upper in pairwise(ends))


def has_brackets_of(interval, reading):
    """Whether a reading is an interval or union too, and no list: 1 < x < 2 is (1,2), not 1,2."""
    if reading.values is None or not isinstance(reading.values[0], Values):
        return False
    if reading.equations is not None and len(reading.equations.items) > 1:  # x = 1, y = 2
        return False
    return reading.values[0].brackets == interval.values[0].brackets
