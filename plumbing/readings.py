r"""What an answer in mathematics may mean: its readings, and when two of them are the same.

A text is rewritten to few spellings and read by the grammar of `expressions.py`. What the grammar
cannot read is compared as the rewritten text.
"""
import re
from contextlib import suppress
from fractions import Fraction
from functools import lru_cache
from typing import NamedTuple

from plumbing.arithmetic import (
    CLOSE, FUNCTIONS, Unreadable, add, divide, is_number, is_real, negative, same_number)
from plumbing.expressions import ORDERLESS, POINTS, VARIABLE, Parser, Values, variable_value

# Spelling

_CHARACTERS = str.maketrans({
    "−": "-", "–": "-", "‐": "-", "‑": "-", "×": "*", "·": "*", "⋅": "*", "∗": "*", "÷": "/",
    "，": ",", "：": ":", "＝": "=", "（": "(", "）": ")", "；": ";", "％": "%", "′": "'",
    "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "≈": r"\approx ", "∈": r"\in ", "∪": r"\cup ",
    "∞": r"\infty ", "∅": r"\emptyset ", "π": r"\pi ", "α": r"\alpha ", "β": r"\beta ",
    "γ": r"\gamma ", "θ": r"\theta ", "λ": r"\lambda ", "μ": r"\mu ", "φ": r"\phi ",
    "．": ".", "－": "-", "＋": "+", "／": "/", "＜": "<", "＞": ">", "ℝ": r"\mathbb{R}",
    **{chr(ord("０") + digit): str(digit) for digit in range(10)},
    "²": "^{2}", "³": "^{3}", "½": r"\frac{1}{2}", "¼": r"\frac{1}{4}", "¾": r"\frac{3}{4}"})

_TEXT = r"\\(?:text(?:bf|it|rm|sf|normal)?|math(?:bf|it|rm|sf)|mbox|boldsymbol)"
_NAMES = "|".join(FUNCTIONS)
_SQUARED = r"(?:\s*\^\s*(?:\{\s*-?[0-9]\s*\}|-?[0-9]))?"
# Units: in \text, as words (but no functions, products, AM and PM), as letters. A word of two or
# three letters is a product of variables (rs, 2rh), unless it is one of these, or a syllable (cup).
_SHORT_UNITS = """
    mm cm dm km nm µm in ft yd mi mil sq cu mg kg lb lbs oz ml mL cl cL dl dL kL gal qt pts tsp tbsp
    hr hrs sec secs min ms ns wk wks mo yr yrs day days mph kph kmh mpg rpm fps Hz kHz MHz GHz Pa
    kPa kB MB GB TB kJ MJ kW MW kWh mA mV kV eV keV MeV kN mol atm psi dB ppm deg rad rev
    USD EUR GBP usd eur gbp pcs egg pie bee tie tea pea eye ear owl ant art ace act ads ape age ice
    oar out all old of to per""".split()
_JOINING = r"(?:an?|at|by|as|on|is|so|the)(?![A-Za-z])"  # between the words of a unit
_NO_UNIT = (r"(?!(?:[abcxyz]{2,}|abcd|pi|sqrt|if|mod|[AaPp][Mm]|sec(?!\s*(?:$|,))|"
            rf"(?:{'|'.join(name for name in FUNCTIONS if name != 'sec')})[ABCntxyz]?)"
            r"(?![A-Za-z]))")
_TEXT_UNIT = rf"{_TEXT}\s*\{{(?!\s*(?:[ie]|[AaPp]\.?[Mm]\.?)\s*\}})[^{{}}]*\}}"
_WORD_UNIT = (
    rf"{_NO_UNIT}(?:(?:{'|'.join(_SHORT_UNITS)})\.?|[b-df-hj-np-tv-z][aeiou][b-df-hj-np-tv-z]"
    r"|(?=[A-Za-z]*[aeiouyAEIOUY])[A-Za-z]{4,})(?![A-Za-z])")
_LETTER_UNIT = r"[msghNJVWKLCA](?![A-Za-z])"
_MORE_UNITS = (rf"{_SQUARED}(?:[ */-]*"
               rf"(?:{_TEXT_UNIT}|{_WORD_UNIT}|{_JOINING}|{_LETTER_UNIT}){_SQUARED})*"
               r"(?=\s*(?:$|,|\\approx|[)\]&]|\\cr))")  # to the end of an item
_UNIT_IN_FRACTION = rf"\{{\s*(?:{_TEXT_UNIT}|{_WORD_UNIT}){_SQUARED}\s*\}}"
_NUMBER_WORDS = {
    "hundred": "*100", "thousand": "*1000", "million": "*1000000", "billion": "*10^{9}",
    "trillion": "*10^{12}", "dozen": "*12", "lakh": "*100000", "crore": "*10000000",
    "thirds": "/3", "fourths": "/4", "fifths": "/5", "sixths": "/6", "sevenths": "/7",
    "eighths": "/8", "ninths": "/9", "tenths": "/10", "hundredths": "/100", "thousandths": "/1000"}
_NUMBER_WORD = rf"(?i:{'|'.join(sorted(_NUMBER_WORDS, key=len, reverse=True))})"
_SIZES = r"tiny|scriptsize|footnotesize|small|normalsize|large|Large|LARGE|huge|Huge"
_IN_BRACES = r"(?:[^{}]|\{[^{}]*\})*?"
_NOT_NESTED = r"(?:[^,=()\[\]{}]|\{[^{}]*\})*?"


def _mixed_number(match):
    r"""1\frac{1}{2} -> (1+\frac{1}{2}); 2\frac{5}{3} stays a product."""
    whole, fraction, numerator, denominator = match.groups()
    if int(numerator) < int(denominator):
        return f"({whole}+{fraction})"
    return match[0]


def _number_words(match):
    r"""5\text{ million dollars} -> 5*1000000\text{ dollars}"""
    words = re.findall(_NUMBER_WORD, match[2])
    factors = [_NUMBER_WORDS[word.lower()] for word in words]
    return "".join(factors) + (match[1] or "")


def _both_signs(match):
    r"""1\pm 2 -> 1+ 2,1- 2"""
    return match[0].replace(r"\pm", "+") + "," + match[0].replace(r"\pm", "-")


def _repeating(match):
    r"""0.1\overline{6} -> \frac{15}{90}"""
    whole, fixed, period = match.groups()
    nines = int("9" * len(period)) * 10 ** len(fixed)
    digits = int(whole + fixed + period) - int(whole + fixed or "0")
    return rf"\frac{{{digits}}}{{{nines}}}"


# Many spellings become one, in this order. Beside each pattern: what it alone makes of an example
# (tests/test_answers.py reads these comments).
_REWRITES = [
    (r"\\\\(?:\[[0-9a-z]*\])?|\\newline(?![A-Za-z])", r"\\cr "),  # 3\\4 -> 3\cr 4
    (rf"{_TEXT}\s*\{{\s*([-+,;€£¥]?)\s*\}}", r"\1"),  # \text{-}3 -> -3
    (r"\\(?:cdot|times|ast)(?![A-Za-z])", "*"),  # 2\cdot 3 -> 2* 3
    (r"\\div(?![A-Za-z])", "/"),  # 6\div 3 -> 6/ 3
    (r"\{,\}(?![0-9]{3}(?![0-9]))", "."),  # 3{,}14 -> 3.14
    (  # $\left(1{,}234\right)$ -> (1234)
        r"\\!|\{,\}|\\?[$%]|[€£¥₹]|\\(?:pounds|euro|texteuro)(?![A-Za-z])|\\[()\[\]]"
        r"|\\(?:left|right|[bB]igg?[lrm]?|displaystyle|textstyle|limits)(?![A-Za-z])",
        "",
    ),
    (r"\\(?:[,;:> ]|q?quad(?![A-Za-z])|(?:thin|med)space(?![A-Za-z]))|~|\s+", " "),  # 5\,m -> 5 m
    (  # \color{red}{204} -> {204}
        r"\\(?:text)?color\s*\{[A-Za-z0-9!]*\}"
        rf"|\\(?:bf|it|sf|tt|em|scriptstyle|underline|emph|bm|pmb|{_SIZES})(?![A-Za-z])",
        "",
    ),
    (r"\{\s*\\rm(?![A-Za-z])\s*([^{}]*)\}", r"\\text{\1}"),  # 5 {\rm cm} -> 5 \text{cm}
    (  # {\sqrt{3} \over 2} -> \frac{\sqrt{3} }{ 2}
        rf"\{{({_IN_BRACES})\\over(?![A-Za-z])({_IN_BRACES})\}}",
        r"\\frac{\1}{\2}",
    ),
    (  # 1 \over 2 -> \frac{1 }{ 2}
        rf"(^|[,=])({_NOT_NESTED})\\over(?![A-Za-z])([^,=()\[\]]+)",
        r"\1\\frac{\2}{\3}",
    ),
    (r"\*\*", "^"),  # 2**3 -> 2^3
    (r"\\[lr]?[vV]ert(?![A-Za-z])", "|"),  # \lvert x\rvert -> | x|
    (r"\\leq?(?:slant)?(?![A-Za-z])|<=", r"\\le "),  # x\leq 3 -> x\le  3
    (r"\\geq?(?:slant)?(?![A-Za-z])|>=", r"\\ge "),  # x\geqslant 3 -> x\ge  3
    (r"\\neq?(?![A-Za-z])", r"\\ne "),  # x\neq 3 -> x\ne  3
    (r"\\[lg]t(?![A-Za-z])", lambda match: "<" if match[0] == r"\lt" else ">"),  # x\lt 3 -> x< 3
    (r"\\(?:approx|simeq|doteq)(?![A-Za-z])", r"\\approx "),  # x\simeq 3 -> x\approx  3
    (r"\(\s*\\approx[^()]*\)", ""),  # 5\sqrt{2}(\approx 7.07) -> 5\sqrt{2}
    (r"\{:\}", ":"),  # 9{:}15 -> 9:15
    (r":=|\\coloneqq(?![A-Za-z])|==", "="),  # x:=3 -> x=3
    (r"\\varnothing(?![A-Za-z])", r"\\emptyset "),  # \varnothing, 1 -> \emptyset , 1
    (  # 20^\circ\text{C} -> 20°
        rf"(?:\^?\s*\{{?\s*\\(?:circ|degree)(?![A-Za-z])\s*\}}?|°)"
        rf"(?:\s*(?:{_TEXT}\s*\{{\s*[CF]\s*\}}|[CF](?![A-Za-z])))?",
        "°",
    ),
    (  # 2\text{ and }3 or 4 -> 2,3,4
        rf",?\s*{_TEXT}\s*\{{\s*,?\s*(?:and|or)\s*\}}|,? (?:and|or) |;",
        ",",
    ),
    (r"√\s*([0-9]+)", r"\\sqrt{\1}"),  # √12 -> \sqrt{12}
    (r"√", r"\\sqrt "),  # √(2) -> \sqrt (2)
    (  # 0.1\overline{6} -> \frac{15}{90}
        r"(?<![0-9.])([0-9]*)\.([0-9]*)\\(?:overline|bar|dot)\s*\{?([0-9]+)\}?",
        _repeating,
    ),
    (r"(?<![0-9.])([0-9]+)\.()\(([0-9]+)\)", _repeating),  # 0.(3) -> \frac{3}{9}
    (  # 10 000 -> 10000
        r"(?<![0-9.,])([0-9]{1,3})((?: [0-9]{3})+)(?![0-9]| [0-9])",
        lambda match: match[0].replace(" ", ""),
    ),
    (  # \operatorname{arctan} x -> \arctan  x
        rf"\\(?:operatorname|mathrm|text)\s*\{{\s*({_NAMES})\s*\}}",
        r"\\\1 ",
    ),
    (r"[ .,]+$", ""),  # 5 ., -> 5
    (rf"^{_TEXT}\s*\{{([^{{}}]*)\}}$", r"\1"),  # \text{no solution} -> no solution
    (  # x\in \mathbb{R} -> x\in(-\infty,\infty)
        r"(^|\\in(?![A-Za-z]))\s*"
        r"(?:\\mathbb\s*(?:R|\{\s*R\s*\})|(?i:(?:all )?(?:real numbers|reals)))\s*$",
        r"\1(-\\infty,\\infty)",
    ),
    (  # {5\choose 2} -> \binom{5}{2}
        r"\{\s*([0-9]+)\s*\\choose(?![A-Za-z])\s*([0-9]+)\s*\}",
        r"\\binom{\1}{\2}",
    ),
    (  # 2 hundred thousand -> 2*100*1000
        rf"(?:(?<=[0-9)}}])|(?<=\\pi))\s*({_TEXT}\s*\{{)?((?:\s*{_NUMBER_WORD}s?(?![A-Za-z]))+)",
        _number_words,
    ),
    (  # 60\frac{\text{miles}}{\text{hour}} -> 60
        rf"(?<=[0-9)}}])\s*\\[dtc]?frac\s*{_UNIT_IN_FRACTION}\s*{_UNIT_IN_FRACTION}(?=\s*(?:$|,))",
        "",
    ),
    (  # 5\text{ cm}^2 -> 5
        rf"(\\pi|[0-9)\]}}!°])\s*/?\s*{_TEXT_UNIT}{_MORE_UNITS}",
        r"\1",
    ),
    (rf"{_TEXT}(?![A-Za-z])|\\f?box(?:ed)?(?![A-Za-z])", ""),  # \textbf{(C)} -> {(C)}
    (r"\\([{}])", r"\1"),  # \{1,2\} -> {1,2}
    (  # 12 red apples, 5cm^2, 18/day -> 12, 5, 18
        rf"(?<=[0-9)}}])(?:\s*[cmk]m(?![A-Za-z])|(?:\s+|\s*/\s*(?=kg|hr|lb|[A-Za-z]{{3}}))"
        rf"{_WORD_UNIT}){_MORE_UNITS}",
        "",
    ),
    (  # 10^{-3}m, 5 m/s -> 10^{-3}, 5
        r"((?:^|[,=])\s*[-+]?[0-9.]*(?:[0-9](?=\s)|\s*\*?\s*10\^(?:[0-9]|\{[-+]?[0-9]+\})))"
        rf"\s*{_LETTER_UNIT}{_MORE_UNITS}",
        r"\1",
    ),
    (r"\\[dtc](frac|binom)", r"\\\1"),  # \dfrac{1}{2} -> \frac{1}{2}
    (r"\\(frac|sqrt|binom)\s*([0-9])", r"\\\1{\2}"),  # \frac 12 -> \frac{1}2
    (r"(\\(?:frac|binom)\s*\{[^{}]*\})\s*([0-9])", r"\1{\2}"),  # \frac{1}2 -> \frac{1}{2}
    (  # 1\frac{1}{2} -> (1+\frac{1}{2})
        r"(?<![0-9.^])([0-9]+)\s*(\\frac\s*\{([0-9]+)\}\s*\{([0-9]+)\})",
        _mixed_number,
    ),
    (  # 3 1/2 -> (3+1/2)
        r"(?<![0-9.^/}])(?<![0-9] )([0-9]+) (([0-9]+)/([0-9]+))(?![0-9/.A-Za-z(!^])",
        _mixed_number,
    ),
    (r"([)\]}])\s*U\s*([(\[{])", r"\1\\cup \2"),  # [0,1)U(2,3] -> [0,1)\cup (2,3]
    (r"[^,=]*\\pm[^,=]*", _both_signs),  # 1\pm 2 -> 1+ 2,1- 2
]
_THOUSANDS = re.compile(r"(?<![0-9.,(\[])[1-9][0-9]{0,2}(?:,[0-9]{3})+(?![0-9]|,[0-9])")
_TIME = re.compile(r"([0-9]{1,2})(?::([0-9]{2}))?((?::[0-9]{2})?)\s*(?:([AaPp])\.?\s*[Mm]\.?)?")


@lru_cache(maxsize=4096)  # claims and readings ask for the same few answers
def rewritten(text):
    """The text in few spellings."""
    text = text.translate(_CHARACTERS)
    for pattern, replacement in _REWRITES:
        text = re.sub(pattern, replacement, text)
    return text.strip()


def compact(text):
    """A rewritten text without the spaces and braces that mean nothing, and (one word) case."""
    text = re.sub(r"(?<![0-9]) | (?![0-9])", "", text)
    text = re.sub(r"\{(\w)\}", r"\1", text)
    text = text.replace("°", "")
    return text.casefold() if text.isalpha() else text


def time_of_day(text):
    """21:15 of "9:15 PM", "9:15 am" of "9:15\\text{ a.m.}"; None of what has no such mark.

    Without a mark 9:15 may be either, and is neither: it is compared as text, 21:15 too."""
    text = re.sub(rf"{_TEXT}|\\[ ,;]|[${{}}~]", " ", text.replace("{:}", ":")).strip()
    match = _TIME.fullmatch(text)
    if match is None or match[4] is None or int(match[1]) not in range(1, 13):
        return None
    hour, minutes, seconds, half = match.groups()
    hour = int(hour)
    if half in "Pp" and hour < 12:
        return f"{hour + 12}:{minutes or '00'}{seconds}"
    return f"{hour}:{minutes or '00'}{seconds} {half.lower()}m"


# Readings


class Reading(NamedTuple):
    """One meaning of a text: what its equations say, or what its value is, or both (x = 5).

    equations: Values, a multiset of statements, or None. values: the value at each point, or None.
    """

    equations: Values | None
    values: list | None


@lru_cache(maxsize=4096)  # a vote compares the same few answers again and again
def readings_of(text):
    """The readings of an answer, its commas read as they are and as thousands marks."""
    moment = time_of_day(text)
    if moment is not None:
        return [Reading(None, [moment] * POINTS)]
    text = rewritten(text)
    if not text:
        return []
    readings = [reading_of(text)]
    joined = without_thousands_marks(text)
    if joined != text:
        reading = reading_of(joined)
        if not is_small(reading):
            readings.append(reading)
    return readings


def without_thousands_marks(text):
    """A rewritten text with 1,234 as 1234."""
    return _THOUSANDS.sub(lambda match: match[0].replace(",", ""), text)


def is_small(reading):
    """Whether a reading is a number under 1000. With thousands marks there is none, so that such
    numbers have no second reading (`engine/decided.py`)."""
    if reading.values is None:
        return False
    return any(is_number(value) and abs(value) < 1000 for value in reading.values)


def same_reading(one, other, tolerance=CLOSE):
    """Whether two readings say the same: x = 5 is 5, and y = 5 is 5, but x = 5 is not y = 5."""
    if one.equations is not None and other.equations is not None:
        return same_value(one.equations, other.equations, tolerance)
    if one.values is None or other.values is None:
        return False
    pairs = zip(one.values, other.values)
    return all(same_value(value, expected, tolerance) for value, expected in pairs)


def same_value(value, expected, tolerance=CLOSE):
    """Equality of two values: numbers, Values, or str for what is neither."""
    if isinstance(value, Values) and isinstance(expected, Values):
        return _same_list(value, expected, tolerance)
    if is_number(value) and is_number(expected):
        return same_number(value, expected, tolerance)
    return type(value) is type(expected) and value == expected


def _same_list(values, expected, tolerance):
    """Equality of two lists; order counts if the expected one has brackets."""
    if len(values.items) != len(expected.items):
        return False
    if values.brackets and expected.brackets and values.brackets != expected.brackets:
        return False
    if expected.brackets not in ORDERLESS:
        pairs = zip(values.items, expected.items)
        return all(same_value(item, other, tolerance) for item, other in pairs)
    for item in expected.items:
        found = sum(same_value(other, item, tolerance) for other in values.items)
        if found != sum(same_value(other, item, tolerance) for other in expected.items):
            return False
    return True


# Statements: equations, named values, inequalities

_SIGNS = re.compile(r"=|<|>|\\(?:le|ge|ne|approx|in)(?![A-Za-z])")
_MIRRORED = {">": "<", r"\ge": r"\le"}
# A name may stand on the left and go: x, f(x), a word, a line AB, an angle; (x,y) of a pair.
_VARIABLE = re.compile(VARIABLE)
_FUNCTION = re.compile(
    rf"{VARIABLE}(?:\^\{{-1\}})?\s*\(\s*[A-Za-z0-9]+\s*(?:,\s*[A-Za-z0-9]+\s*)*\)")
_WORDS = re.compile(
    r"(?:[A-Za-z]?\\(?:angle|triangle|overline)\s*)?(?:\{[A-Za-z][A-Za-z .'-]*\}|[A-Z]{2,4})"
    r"|[A-Za-z]?\\(?:angle|triangle)\s*[A-Z]"
    r"|(?!(?:sin|cos|tan|ln|log)[xy]$)(?:[A-Za-z]{4,}|[A-Za-z]{2,} [A-Za-z]{2,})[A-Za-z ]*")
_PRODUCT_OR_LINE = re.compile("[A-Z]{2,4}")  # AB = 5 names a line, PV = nRT is an equation
_TUPLE = re.compile(rf"\(\s*{VARIABLE}\s*(?:,\s*{VARIABLE}\s*)+\)")


class Statement(NamedTuple):
    """A part of an answer: a named value (x = 5), a relation (x > y: no name, no values), or a bare
    value (no name, no says). says: Values that tell it from others. values: one a point."""

    name: str | None
    says: Values | None
    values: list | None


def split(text, separators):
    """(parts, separators between them) of a text, cut where no bracket is open."""
    parts = []
    found = []
    depth = 0
    begin = 0
    for match in re.finditer(rf"\\begin|\\end|[(\[{{)\]}}]|{separators.pattern}", text):
        token = match[0]
        if token in ("(", "[", "{", r"\begin"):
            depth += 1
        elif token in (")", "]", "}", r"\end"):
            depth -= 1
        elif depth == 0:
            parts.append(text[begin : match.start()].strip())
            found.append(token)
            begin = match.end()
    parts.append(text[begin:].strip())
    return parts, found


_COMMA = re.compile(",")


def reading_of(text):
    """The Reading of a rewritten text."""
    with suppress(ValueError, ArithmeticError):
        inside = without_outer_brackets(text)
        parts, _ = split(inside, _COMMA)
        if any(_SIGNS.search(part) and split(part, _SIGNS)[1] for part in parts):
            return reading_of_statements(parts)
    return Reading(None, values_of(text))


def without_outer_brackets(text):
    """What stands inside the one bracket around a whole text."""
    depth = 0
    for place, character in enumerate(text):
        depth += (character in "([{") - (character in ")]}")
        if depth == 0:
            closes_last = place > 0 and place == len(text) - 1
            return text[1:-1] if closes_last and _SIGNS.search(text) else text
    return text


def values_of(text):
    """The value of a rewritten text at each point; the compact text if the grammar has none."""
    with suppress(ValueError, ArithmeticError):
        return evaluated(text, Parser.read)
    return [compact(text)] * POINTS


def evaluated(text, read, words=True):
    """What `read`, a method of Parser, makes of a text at each point."""
    parser = Parser(text, 0, words)
    values = [read(parser)]
    if not parser.variables:
        return values * POINTS
    return values + [read(Parser(text, point, words)) for point in range(1, POINTS)]


def numbers_of(text):
    """The number that a side of an equation is, at each point. Unreadable if it is none."""
    return evaluated(text, Parser.read_number, words=False)


def reading_of_statements(parts):
    """The Reading of an answer of which a part at least is an equation or another relation."""
    statements = []
    for part in parts:
        sides, signs = sides_of(part)
        if not signs and statements and statements[-1].name is not None:  # x = 1, 2
            statements.append(named(statements[-1].name, sides[0]))
        else:
            statements += statements_of(sides, signs)
    if all(statement.says is None for statement in statements):
        return Reading(None, listed(statements))
    if len(statements) == 1 and statements[0].name is not None:
        return reading_of_name(statements[0])
    says = [statement.says or Values("value", statement.values) for statement in statements]
    if any(statement.name is None for statement in statements):
        return Reading(Values("", says), None)
    by_name = sorted(statements, key=lambda statement: statement.name)
    names = {statement.name for statement in statements}
    brackets = "()" if len(names) == len(statements) else ""
    return Reading(Values("", says), listed(by_name, brackets))


def reading_of_name(statement):
    """The Reading of x = 5, which is an equation and a value, or of Area = 5, which is a value."""
    if _VARIABLE.fullmatch(statement.name):
        return Reading(Values("", [statement.says]), statement.values)
    if _TUPLE.fullmatch(statement.name):
        names, _ = split(statement.name[1:-1], _COMMA)
        first = statement.values[0]
        if isinstance(first, Values) and len(first.items) == len(names):
            says = []
            for place, name in enumerate(names):
                items = [value.items[place] for value in statement.values]
                says.append(named_values(name, items).says)
            return Reading(Values("", says), statement.values)
    return Reading(None, statement.values)


def listed(statements, brackets=""):
    """The values of the statements as one list, at each point; of a single one its value."""
    if len(statements) == 1:
        return statements[0].values
    points = zip(*(statement.values for statement in statements))
    return [Values(brackets, list(values)) for values in points]


def sides_of(part):
    """(sides, signs between them) of a part: = for what a name approximately is or is in; what
    approximates a value goes."""
    sides, signs = split(part, _SIGNS)
    if sides[0] == "" and signs:  # "= 5"
        sides = sides[1:]
        signs = signs[1:]
    if "" in sides:
        raise Unreadable
    if signs and signs[0] in (r"\approx", r"\in") and is_name(sides[0]):
        signs[0] = "="
    if r"\approx" in signs:
        signs = signs[: signs.index(r"\approx")]
        sides = sides[: len(signs) + 1]
    if r"\in" in signs:
        raise Unreadable
    return sides, signs


def is_name(side):
    """Whether a side of an equation is a name that may go."""
    return any(name.fullmatch(side) for name in (_VARIABLE, _FUNCTION, _WORDS, _TUPLE))


def statements_of(sides, signs):
    """The Statements of a chain: x = 2, x = y = 2, x + y = 2, 1 < x < 2."""
    if not signs:
        return [Statement(None, None, values_of(sides[0]))]
    if set(signs) == {"="}:
        if len(sides) == 2 and _VARIABLE.fullmatch(sides[1]) and not is_name(sides[0]):
            sides = sides[::-1]
        names = leading_names(sides)
        if names:
            return [named(name, sides[-1]) for name in names]
        values = values_of(sides[-1])
        if all(is_same_constant(values_of(side), values) for side in sides):  # 2 + 3 = 5
            return [Statement(None, None, values)]
    pairs = zip(sides, signs, sides[1:])
    return [Statement(None, relation(*pair), None) for pair in pairs]


def is_same_constant(values, others):
    """Whether a number without variables is the same as another."""
    constant = all(is_number(value) and value == values[0] for value in values)
    return constant and all(map(same_value, values, others))


def leading_names(sides):
    """The names with which a chain of equations begins, if they define what follows."""
    names = []
    for side in sides[:-1]:
        if not is_name(side):
            break
        names.append(side)
    variables = variables_of(sides[-1])
    for name in names:
        if compact(name) in variables:  # y = y^2 + x defines no y
            return []
        if _PRODUCT_OR_LINE.fullmatch(name) and variables:
            return []
    return names


def variables_of(text):
    """The variables in a text, as far as it can be read."""
    parser = Parser(text, 0, words=False)
    with suppress(ValueError, ArithmeticError):
        parser.read()
    return parser.variables


def named(name, text):
    """The Statement that a name has the value of a text."""
    values = values_of(text)
    numbers = values
    with suppress(ValueError, ArithmeticError):
        numbers = numbers_of(text)  # also of a variable alone
    return named_values(name, numbers)._replace(values=values)


def named_values(name, values):
    """The Statement that a name has these values; of a variable and numbers it is an equation."""
    name = compact(name)
    if _VARIABLE.fullmatch(name):
        with suppress(ValueError, ArithmeticError):
            points = [variable_value(name, point) for point in range(POINTS)]
            differences = [add(point, negative(value)) for point, value in zip(points, values)]
            return Statement(name, Values("=", proportions(differences)), values)
    return Statement(name, Values("named", [name, *values]), values)


def relation(left, sign, right):
    """What a relation of two sides says: where they are numbers, their difference up to a factor (a
    positive one for inequalities); else the sides."""
    if sign in _MIRRORED:
        return relation(right, _MIRRORED[sign], left)
    symmetric = sign in ("=", r"\ne")
    with suppress(ValueError, ArithmeticError):
        lefts = numbers_of(left)
        rights = numbers_of(right)
        differences = [add(*pair) for pair in zip(lefts, map(negative, rights))]
        scaled = proportions(differences)
        if symmetric:
            return Values(sign, scaled)
        if all(map(is_real, differences)):
            return Values(sign, [Fraction(1 if differences[0] > 0 else -1), *scaled])
    sides = [compact(left), compact(right)]
    return Values(sign, sorted(sides) if symmetric else sides)


def proportions(differences):
    """The later numbers divided by the first. Unreadable where that says nothing: 3 = 4, x = x."""
    first, *others = differences
    if all(map(same_number, others, [first] * len(others))):
        raise Unreadable
    return [divide(other, first) for other in others]
