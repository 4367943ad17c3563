r"""The answer in a response, and whether two answers are the same.

Soft labels, avg@k and votes rest on these two (paper, the appendix on prompts and evaluation). No
text, however hostile, may raise or hang: extraction takes time linear in the text, and comparing
takes bounded work. Looked up, not run: sample.py extracts and grades, stop.py's vote compares.
"""
import math
import operator
import re
from contextlib import suppress
from fractions import Fraction
from functools import lru_cache
from typing import NamedTuple

MAX_ANSWER = 400  # characters; a longer answer equals only itself, which bounds the work
MAX_DEPTH = 100  # of brackets, signs and powers; an answer nested deeper is compared as text
HUGE = 10**300  # no larger number is computed: 2^{99} is exact, 9^{9^9} is refused unseen


# The answer in a response

_TEMPLATE_MARKS = re.compile(r"<[|｜][^<>\n]{0,40}[|｜]>|</s>")  # <|im_end|> and its like
_BRACES = re.compile(r"(\\(?:boxed|fbox)\s*)?\{|\}|\\[{}]")
# Neither the start of a word or formula (C6H6, D'Alembert), nor the article in "answer: a good
# question". Six letters: ZebraLogic has that many, and a later one, I, is mostly prose.
_FIELD = re.compile(
    r"(?i:answer)[^A-Za-z0-9:]{0,8}:[^A-Za-z0-9]{0,12}"
    r"(?:(?i:boxed|text|textbf|option|choice)[^A-Za-z0-9]{1,6}){0,2}"
    r"([A-F]|[a-f](?! +[A-Za-z]))(?![A-Za-z0-9]|['’-][A-Za-z])"
)


def extract_answer(text, kind="math", whole=False):
    r"""The answer in a response, as it was written, or None. Never raises; linear in the text.

    What follows the last `</think>` counts, or harmony's last `final` message, or nothing where
    thinking has no end; the whole text if `whole` is set or no such marks are there. Where the
    prompt opened `<think>`, the caller puts it before the response.
    "math": the last balanced \boxed{...} or \fbox{...}.
    "choice": the last `answer: letter`, else a boxed letter, else one alone on the last line, else
    one that the last line states in prose ("The correct answer is **B**.").
    """
    if not isinstance(text, str):
        return None
    if not whole:
        text = _after_thinking(text)
    text = _TEMPLATE_MARKS.sub("", text).rstrip()
    box = _last_box(text)
    if kind == "choice":
        return _chosen_letter(text, box)
    return box


def _after_thinking(text):
    """The part of a response that is addressed to the user; empty where thinking has not ended."""
    if "<|channel|>" in text:
        _, final, message = text.rpartition("<|channel|>final")
        if not final:
            return ""
        message = message.partition("<|message|>")[2]
        return re.split(r"<\|(?:end|return)\|>", message)[0]
    answer = text.rpartition("</think>")[2]
    return "" if "<think>" in answer else answer


def _last_box(text):
    r"""The content of the last balanced, non-blank \boxed{...} or \fbox{...}, or None."""
    box = None
    box_begin = -1
    opened = []  # per open brace: where its box's content begins, or -1 for a brace of no box
    for match in _BRACES.finditer(text):
        if match[0] == "}" and opened:
            begin = opened.pop()
            content = text[begin : match.start()].strip() if begin > box_begin else ""
            if content:
                box = content
                box_begin = begin
        elif match[1]:
            opened.append(match.end())
        elif match[0] == "{":
            opened.append(-1)
    return box


def _chosen_letter(text, box):
    """The letter that a response to a multiple-choice question gives, or None."""
    fields = _FIELD.findall(text)
    if fields:
        return fields[-1].upper()
    last_line = text.rpartition("\n")[2]
    return _letter(box or "") or _letter(last_line) or _stated_letter(text)


def _letter(text):
    r"""C of "C", "(c)", "**C**", "\textbf{(C)}"; else None."""
    match = re.fullmatch(r"(?:\\[A-Za-z]+|[\W_])*([A-Fa-f])[\W_]*", text[:100])
    return match[1].upper() if match else None


# "The correct answer is **B**.", "the answer is option (C)", "The right choice should be: D"
_STATEMENT = re.compile(
    r"(?i:\b(?:answer|(?:correct|right|best) (?:option|choice))"
    r"(?: (?:to|for|of|among|from) [a-z]+(?: [a-z]+){0,4}?)?"
    r" (?:is|should be|must be)"
    r"(?: (?:therefore|thus|then|indeed|clearly|likely|probably))?)"
    r"[^A-Za-z0-9?]{1,12}"
    r"(?:(?i:the|correct|option|choice|letter|text|textbf|mathbf|mathrm)[^A-Za-z0-9?]{1,6}){0,4}"
    r"([A-Fa-f])(?![A-Za-z0-9])"
)
# What may follow the letter: nothing but marks, a closing mark, the end of a clause (but "B.
# subtilis" names a species), a reason, or the option's text in brackets or after a dash.
_AFTER_LETTER = re.compile(
    r"[\W_]*$|\s?[)\]}*\"”$]|\.(?!\s*[a-z])(?![A-Za-z0-9])|[,;:!](?![A-Za-z0-9])"
    r"| (?:because|since|as|due|given|based)\b| [(–—-](?![A-Za-z0-9]-)"
)
_CLAUSE_ENDS = re.compile(r"[,.;:!?\n]|\b(?i:then|so|thus|hence|therefore)\b")
_SUPPOSED = re.compile(
    r"\b(?i:if|whether|when|unless|until|suppose|supposing|assume|assuming|say|not|never"
    r"|would|could|might|may|doubt|unlikely)\b|n['’]t\b"
)
_TURNS = re.compile(
    r"\?|\b(?i:but|wait|however|hmm+|actually|alternatively|unless|let me|let's|let us"
    r"|not sure|double-check)\b"
    r"|^[)\]}*\s]*(?:[,/&]|\b(?:and|or)\b)[^A-Za-z0-9]*"
    r"(?:(?:and|or|option|choice)[^A-Za-z0-9]+){0,2}[A-F](?![A-Za-z0-9])"
)


def _stated_letter(text):
    """The letter of the last `answer is B`, if it is a conclusion; else None.

    A conclusion stands on the last line, so that no later text takes it back; its own clause
    supposes or denies nothing ("if the answer is B"); and what follows on the line neither turns
    ("but wait", "?") nor names a second letter ("B or C").
    """
    statements = list(_STATEMENT.finditer(text))
    if not statements:
        return None
    statement = statements[-1]
    rest = text[statement.end() :]
    if "\n" in rest or not _AFTER_LETTER.match(rest) or _TURNS.search(rest):
        return None
    before = text[max(0, statement.start() - 200) : statement.start()]
    clause = _CLAUSE_ENDS.split(before)[-1]
    if _SUPPOSED.search(clause):
        return None
    letter = statement[1]
    if letter == "a" and rest == "":  # an article, behind which the tokens ran out
        return None
    return letter.upper()


# Whether two answers are the same


class Values(NamedTuple):
    """A list of values in an answer: 1,2 has no brackets, (1,2) has "()", [0,1) has "[)"."""

    brackets: str
    items: list


def same_answer(answer, reference, kind="math"):
    r"""Whether an extracted answer equals the published one. Never raises; bounded work.

    None or blank equals nothing. "choice": the same letter. "math": rationals compare exactly,
    other numbers to a relative 1e-9, the rest as text. Units, percent and degree signs are dropped
    (50\% is 50); the right side of the last `=` counts; \pm gives two. A comma list, bare or in
    braces, is a multiset; a reference in ( ) or [ ] (a point, an interval) fixes the order too, and
    the brackets if the answer has any. `1,234` is one number or two, 1\frac12 is 3/2, 2\frac53 is
    10/3, 1e-3 is 0.001. Of a reference `080 or 081 (both were accepted)` either is right.
    """
    if same_vote(answer, reference, kind):
        return True
    if kind == "choice" or not isinstance(reference, str) or len(reference) > MAX_ANSWER:
        return False
    accepted = _accepted(reference.strip())
    return any(same_vote(answer, one, kind) for one in accepted)


def same_vote(answer, other, kind="math"):
    """Whether the answers of two paths are one in a vote: as `same_answer`, but for the note of a
    reference, which no path can give itself."""
    if not isinstance(answer, str) or not isinstance(other, str):
        return False
    answer = answer.strip()
    other = other.strip()
    if kind == "choice":
        letter = _letter(answer)
        return letter is not None and letter == _letter(other)
    if answer == other:
        return answer != ""
    if max(len(answer), len(other)) > MAX_ANSWER:
        return False
    for expected in _readings(other):
        if any(_same(found, expected) for found in _readings(answer)):
            return True
    return False


def _accepted(reference):
    """The answers that are right: two of `080 or 081 (both were accepted)`, else the reference."""
    note = re.fullmatch(r"(.+?)\s*\((?:both|either|all)\b[^()]*\baccepted\)", reference)
    return re.split(r",? or |, ", note[1]) if note else [reference]


def _mixed_number(match):
    r"""1\frac{1}{2} -> (1+\frac{1}{2}); 2\frac{5}{3} stays a product."""
    whole, fraction, numerator, denominator = match.groups()
    if int(numerator) < int(denominator):
        return f"({whole}+{fraction})"
    return match[0]


def _both_signs(match):
    r"""1\pm 2 -> 1+ 2,1- 2"""
    return match[0].replace(r"\pm", "+") + "," + match[0].replace(r"\pm", "-")


# Many spellings become one, in this order. Beside each pattern: what it alone makes of an example
# (tests/test_answers.py reads these comments).
_REWRITES = [
    (r"[−–]", "-"),  # −5 -> -5
    (r"[×·]|\\(?:cdot|times)(?![A-Za-z])", "*"),  # 2\cdot 3 -> 2* 3
    (r"\\div(?![A-Za-z])", "/"),  # 6\div 3 -> 6/ 3
    (r"，", ","),  # 1，2 -> 1,2
    (  # $\left(1{,}234\right)$ -> (1234)
        r"\\!|\{,\}|\\?[$%]|\\[()\[\]]|\\(?:left|right|[bB]igg?[lr]?|displaystyle)(?![A-Za-z])",
        "",
    ),
    (r"π", r"\\pi "),  # 2π+1 -> 2\pi +1
    (r"\\[,;: ]|~|\\q?quad|\s+", " "),  # 5\,m\quad 6 -> 5 m  6
    (r"\^?\s*\{?\s*\\(?:circ|degree)(?![A-Za-z])\s*\}?|°", ""),  # 90^{\circ} -> 90
    (r",?\s*\\text\s*\{\s*(?:and|or)\s*\}|,? (?:and|or) ", ","),  # 2\text{ and }3 or 4 -> 2,3,4
    (r"√\s*([0-9]+)", r"\\sqrt{\1}"),  # √12 -> \sqrt{12}
    (r"√", r"\\sqrt "),  # √(2) -> \sqrt (2)
    (  # 5\text{ cm}^2 -> 5
        r"([0-9)}!])\s*\\(?:text|mathrm|mbox)\s*\{(?!\s*[ie]\s*\})[^{}]*\}(?:\^\{?[0-9]\}?)?",
        r"\1",
    ),
    (  # \textbf{(C)} -> {(C)}
        r"\\(?:text(?:bf|it|rm)?|math(?:bf|it|rm)|mbox|boxed|fbox)(?![A-Za-z])",
        "",
    ),
    (r"\\[dtc]frac", r"\\frac"),  # \dfrac{1}{2} -> \frac{1}{2}
    (r"\\(frac|sqrt)\s*([0-9])", r"\\\1{\2}"),  # \frac 12 -> \frac{1}2
    (r"(\\frac\s*\{[^{}]*\})\s*([0-9])", r"\1{\2}"),  # \frac{1}2 -> \frac{1}{2}
    (r"\\([{}])", r"\1"),  # \{1,2\} -> {1,2}
    (  # 12 red apples, 5cm^2 -> 12, 5
        r"(?<=[0-9)}])(?:\s*[cmk]m|(?:\s+[A-Za-z]{2,})+)(?:\^\{?[0-9]\}?)?(?=\s*(?:,|$))",
        "",
    ),
    (  # 1\frac{1}{2} -> (1+\frac{1}{2})
        r"(?<![0-9.^])([0-9]+)\s*(\\frac\s*\{([0-9]+)\}\s*\{([0-9]+)\})",
        _mixed_number,
    ),
    (r"[^,]*\\pm[^,]*", _both_signs),  # 1\pm 2 -> 1+ 2,1- 2
    (r"(?:[^,=()]|\([^()]*\))*=", ""),  # f(1,2)=x=5 -> 5
    (r"[ .,;]+$", ""),  # 5 ., -> 5
]
_THOUSANDS = re.compile(r"(?<![0-9.,(\[])[1-9][0-9]{0,2}(?:,[0-9]{3})+(?![0-9]|,[0-9])")


@lru_cache(maxsize=4096)  # a vote compares the same few answers again and again
def _readings(text):
    """The values that `text` may stand for, its commas read as they are and as thousands marks."""
    for pattern, replacement in _REWRITES:
        text = re.sub(pattern, replacement, text)
    if not text:
        return []
    values = [_value(text)]
    joined = _THOUSANDS.sub(lambda match: match[0].replace(",", ""), text)
    if joined != text:
        values.append(_value(joined))
    return values


def _same(value, expected):
    """Equality of two values: numbers (Fraction or complex), Values, or str for what is neither."""
    if isinstance(value, Values) and isinstance(expected, Values):
        return _same_list(value, expected)
    exact = isinstance(value, Fraction) and isinstance(expected, Fraction)
    if exact or not (_is_number(value) and _is_number(expected)):
        return value == expected
    return abs(value - expected) <= 1e-9 * max(abs(value), abs(expected))


def _same_list(values, expected):
    """Equality of two lists; order counts if the expected one has brackets."""
    if len(values.items) != len(expected.items):
        return False
    if values.brackets and expected.brackets and values.brackets != expected.brackets:
        return False
    if expected.brackets:
        return all(map(_same, values.items, expected.items))
    for item in expected.items:
        found = sum(_same(other, item) for other in values.items)
        if found != sum(_same(other, item) for other in expected.items):
            return False
    return True


# The value of a rewritten answer

_TOKEN = re.compile(
    r"\\?[A-Za-z]+"
    r"|[0-9.](?:[0-9. ]*[0-9.])?(?:[eE][+-]?[0-9]{1,3}(?![0-9]))?"  # "10 000" is no product
    r"|\S"
)
_CONSTANTS = {r"\pi": complex(math.pi), "i": 1j, "e": complex(math.e)}
_OPERATIONS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}
# How tightly a sign binds; any other token starts a factor: 2(3) is a product.
_SUM = 1
_PRODUCT = 2
_SIGN = 3
_POWER = 4
_FACTORIAL = 5
_ARGUMENT = 9  # of a macro: one operand, as no sign binds so tightly
_STRENGTHS = {"+": _SUM, "-": _SUM, "*": _PRODUCT, "/": _PRODUCT, "^": _POWER, "!": _FACTORIAL}
_STRENGTHS |= dict.fromkeys([")", "]", "}", ",", ""], 0)  # the last is the end of the text


class _Unreadable(ValueError):
    """What the grammar has no place for."""


def _value(text):
    r"""The Fraction, complex number or Values that a rewritten text stands for, else the text.

    Read are + - * / ^ !, products without a sign (as *: 1/2\pi is half of pi), brackets, \frac,
    \sqrt[n], \pi i e. Of other text spaces, braces around one character and (of one word) case go.
    """
    with suppress(ValueError, ArithmeticError):
        parser = _Parser("{" + text + "}")
        value = parser.expression(_SUM)
        if parser.peek() == "":
            return value
    compact = re.sub(r"(?<![0-9]) | (?![0-9])", "", text)
    compact = re.sub(r"\{(\w)\}", r"\1", compact)
    return compact.casefold() if compact.isalpha() else compact


class _Parser:
    """Reads an answer by operator precedence.

    What it cannot read or reckon raises ValueError or ArithmeticError.
    """

    def __init__(self, text):
        self.tokens = _TOKEN.findall(text)
        self.place = 0
        self.depth = 0

    def peek(self):
        """The next token, or "" at the end."""
        return self.tokens[self.place] if self.place < len(self.tokens) else ""

    def take(self):
        """The next token, which counts as read."""
        token = self.peek()
        if token == "":
            raise _Unreadable
        self.place += 1
        return token

    def expression(self, rank):
        """What comes next, as far as its signs bind as tightly as `rank` or tighter."""
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise _Unreadable
        value = self.operand()
        while _STRENGTHS.get(self.peek(), _PRODUCT) >= rank:
            value = self.operation(value)
        self.depth -= 1
        return value

    def operand(self):
        """A bracket, a signed operand, a macro and its arguments, a constant, name or number."""
        token = self.take()
        if token in ("(", "[", "{"):
            return self.bracketed(token)
        if token == "+":
            return _number(self.expression(_SIGN))
        if token == "-":
            # Not -x: that gives a real number the imaginary part -0, and its powers another branch.
            return Fraction(0) - _number(self.expression(_SIGN))
        if token == r"\frac":
            numerator = self.argument()
            return _number(numerator / self.argument())
        if token == r"\sqrt":
            index = self.argument() if self.peek() == "[" else Fraction(2)
            return _number(_power(self.argument(), 1 / index))
        if token in _CONSTANTS:
            return _CONSTANTS[token]
        if token[-1].isalpha():
            return token.casefold() if token.isalpha() else token
        decimals = token.partition(".")[2]
        if len(decimals) < 9:
            return _number(Fraction(token))
        return _number(complex(float(token)))  # so many decimals are a rounded number

    def argument(self):
        """The number that a macro takes next."""
        return _number(self.expression(_ARGUMENT))

    def bracketed(self, opening):
        """What stands between an opening bracket and its closing one: one value, or Values."""
        items = [self.expression(_SUM)]
        closing = self.take()
        while closing == ",":
            items.append(self.expression(_SUM))
            closing = self.take()
        brackets = opening + closing
        if len(items) == 1 and brackets in ("()", "[]", "{}"):
            return items[0]
        return Values(brackets.strip("{}"), items)

    def operation(self, left):
        """The result of the next sign, applied to the value before it and what stands behind it."""
        left = _number(left)
        sign = self.peek()
        if sign in _STRENGTHS:
            self.take()
        if sign == "!":
            return _factorial(left)
        if sign == "^":  # a^b^c is a^(b^c)
            return _number(_power(left, _number(self.expression(_POWER))))
        strength = _STRENGTHS.get(sign, _PRODUCT)
        right = _number(self.expression(strength + 1))
        apply = _OPERATIONS.get(sign, operator.mul)
        return _number(apply(left, right))


def _is_number(value):
    return isinstance(value, (Fraction, complex))


def _number(value):
    """The value itself if it is a number of a size to reckon with. _Unreadable otherwise."""
    if _is_number(value) and abs(value) < HUGE:
        return value
    raise _Unreadable


def _factorial(number):
    if number not in range(171):  # 171! is above HUGE
        raise _Unreadable
    return Fraction(math.factorial(int(number.real)))


def _power(base, exponent):
    """Exact if the exponent is whole; an odd root of a negative number is the real one."""
    rational = isinstance(base, Fraction) and isinstance(exponent, Fraction)
    if rational and exponent.denominator == 1:
        size = max(abs(base.numerator), base.denominator)
        bits = (size.bit_length() - 1) * abs(exponent)
        if bits > HUGE.bit_length():
            raise _Unreadable
        return base ** int(exponent)
    if rational and base < 0 and exponent.denominator % 2 == 1:
        sign = (-1) ** exponent.numerator
        return sign * complex(-base) ** complex(exponent)
    return complex(base) ** complex(exponent)
