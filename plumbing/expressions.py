r"""Reads the notation of answers, rewritten to few spellings (`readings.py`), to values.

    Parser(r"\frac{1}{2}, 2\sqrt{3}", point=0).read()

The grammar: + - * / ^ !, products without a sign (as *: 1/2\pi is half of pi), brackets and lists,
\frac, \sqrt[n], \binom, | |, functions (FUNCTIONS, in TeX or plain), \pi i e, matrices, unions of
intervals, and variables, which stand for fixed numbers: expressions that agree at all POINTS are
one. Nothing of a text is ever run. What the grammar has no place for raises ValueError or
ArithmeticError, and so does what would take long: MAX_DEPTH and MAX_WORK bound it.
"""
import re
import zlib
from fractions import Fraction
from typing import NamedTuple

from plumbing import arithmetic
from plumbing.arithmetic import ANGULAR, FUNCTIONS, Unreadable

MAX_DEPTH = 100  # of brackets, signs and powers
MAX_WORK = 10**10  # sum of the squares of the results' sizes in bits, of one text at one point
POINTS = 3  # at which expressions with variables are compared


class Values(NamedTuple):
    """A list of values: 1,2 has no brackets, (1,2) has "()", [0,1) has "[)"; other lists have names
    in place of brackets. Those in ORDERLESS are multisets."""

    brackets: str
    items: list


ORDERLESS = ("", "union")

GREEK = """alpha beta gamma delta epsilon varepsilon zeta eta theta vartheta iota kappa lambda mu
    nu xi rho sigma tau upsilon phi varphi chi psi omega Gamma Delta Theta Lambda Xi Pi Sigma
    Upsilon Phi Psi Omega ell hbar""".split()
_SUBSCRIPT = r"_(?:\{[A-Za-z0-9]{1,9}\}|[A-Za-z0-9])"
_LETTER = rf"[A-Za-z](?:{_SUBSCRIPT}'*|'+)"  # x_1, y'
_GREEK_LETTER = rf"\\(?:{'|'.join(GREEK)})(?![A-Za-z])(?:{_SUBSCRIPT})?'*"
VARIABLE = rf"(?:{_LETTER}|[A-Za-z]|{_GREEK_LETTER})"
CONSTANTS = {r"\pi": arithmetic.PI, "i": arithmetic.I, "e": arithmetic.E}
_PLAIN_NAMES = "|".join(sorted([*FUNCTIONS, "sqrt", "pi"], key=len, reverse=True))
_TOKEN = re.compile(
    r"[0-9]+(?:\.[0-9]+)?(?:[eE][+-]?[0-9]{1,3}(?![0-9]))?|\.[0-9]+"
    rf"|\\(?:begin|end)\{{[A-Za-z]+\}}|{_GREEK_LETTER}|\\[A-Za-z]+|{_LETTER}|[A-Za-z]+|\S"
)
_WORD = re.compile(rf"({_PLAIN_NAMES})?([A-Za-z]*)")
_MAX_LETTERS = 3  # of a product without signs: xyz; a longer word is a word
# A word that is a product also where it stands alone: ab, xyz; not so ABC, no, and cab.
_PRODUCT_ALONE = re.compile("a[bcxy]|[bcxyz]a|[bcdfghjkmnpqrstvwxyz]{2,3}")
_FUNCTION_LETTERS = re.compile(r"[fghFGHP](?![A-Za-z])")  # f(2) is no product

# How tightly a sign binds; any other token starts a factor: 2(3) is a product.
_SUM = 1
_PRODUCT = 2
_SIGN = 3
_POWER = 4
_POSTFIX = 5
_ARGUMENT = 9  # of a macro: one operand, as no sign binds so tightly
_STRENGTHS = {"+": _SUM, "-": _SUM, "*": _PRODUCT, "/": _PRODUCT, "^": _POWER, "!": _POSTFIX,
              "°": _POSTFIX}
_CLOSERS = (")", "]", "}", ",", "&", r"\cr", r"\cup", "")  # the last is the end of the text
_STRENGTHS |= dict.fromkeys(_CLOSERS, 0)
_INFINITY = {r"\infty": r"\infty", r"+\infty": r"\infty", r"-\infty": r"-\infty"}
_MATRICES = {"matrix": "matrix", "pmatrix": "matrix", "bmatrix": "matrix", "Bmatrix": "matrix",
             "array": "matrix", "smallmatrix": "matrix", "vmatrix": "determinant"}


class Parser:
    """Reads a text by operator precedence, its variables at one of the points."""

    def __init__(self, text, point, words=True):
        """words: whether a short word alone is a word (and no product, as in an equation)."""
        self.tokens = split_words(_TOKEN.findall(text), words)
        self.place = 0
        self.depth = 0
        self.open_bars = 0
        self.in_angle = False
        self.work = 0
        self.point = point
        self.variables = set()

    def read(self):
        """The value of the whole text: a number, a name as str, or Values."""
        items = self.items()
        if self.peek() != "":
            raise Unreadable
        return fold_names(items[0] if len(items) == 1 else Values("", items))

    def read_number(self):
        """The value of the whole text, which is a number."""
        number = self.number(self.expression(_SUM))
        if self.peek() != "":
            raise Unreadable
        return number

    # tokens

    def peek(self, ahead=0):
        """A token to come, or "" at the end."""
        place = self.place + ahead
        return self.tokens[place] if place < len(self.tokens) else ""

    def take(self):
        """The next token, which counts as read."""
        token = self.peek()
        if token == "":
            raise Unreadable
        self.place += 1
        return token

    def expect(self, token):
        if self.take() != token:
            raise Unreadable

    # lists

    def items(self):
        """What stands between commas."""
        items = [self.item()]
        while self.peek() == ",":
            self.take()
            items.append(self.item())
        return items

    def item(self):
        """A name or an infinity alone, a union, or an expression."""
        token = self.peek()
        alone = self.peek(1) in _CLOSERS
        if token in ("+", "-") and self.peek(1) == r"\infty":
            token += self.peek(1)
            alone = self.peek(2) in _CLOSERS
        if alone and token in _INFINITY:
            self.place += len(token.partition("\\")[0]) + 1
            return _INFINITY[token]
        if alone and token[-1:].isalpha() and token not in CONSTANTS and token != "pi":
            return self.take()
        parts = [self.expression(_SUM)]
        while self.peek() == r"\cup":
            self.take()
            parts.append(self.expression(_SUM))
        return parts[0] if len(parts) == 1 else Values("union", parts)

    def bracketed(self, opening):
        """What stands between an opening bracket and its closing one: one value, or Values."""
        items = self.items()
        brackets = opening + self.take()
        if brackets not in ("()", "[]", "{}", "[)", "(]"):
            raise Unreadable
        if len(items) == 1 and brackets in ("()", "[]", "{}"):
            return items[0]
        return Values(brackets.strip("{}"), items)

    def matrix(self, kind):
        """The rows up to \\end{kind}."""
        if kind not in _MATRICES:
            raise Unreadable
        if kind == "array" and self.peek() == "{":
            while self.take() != "}":  # how its columns are aligned
                pass
        rows = [Values("row", [self.item()])]
        while not self.peek().startswith(r"\end"):
            mark = self.take()
            if mark == "&":
                rows[-1].items.append(self.item())
            elif mark == r"\cr":
                if not self.peek().startswith(r"\end"):
                    rows.append(Values("row", [self.item()]))
            else:
                raise Unreadable
        self.expect(rf"\end{{{kind}}}")
        return Values(_MATRICES[kind], rows)

    # numbers

    def number(self, value):
        """The value itself if it is a number of a size to reckon with; of a name its variable's."""
        if isinstance(value, str) and re.fullmatch(VARIABLE, value):
            value = self.variable(value)
        number = arithmetic.checked(value)
        self.work += arithmetic.bits(number) ** 2
        if self.work > MAX_WORK:
            raise Unreadable
        return number

    def expression(self, rank):
        """What comes next, as far as its signs bind as tightly as `rank` or tighter."""
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise Unreadable
        value = self.operand()
        while self.strength() >= rank:
            value = self.operation(value)
        self.depth -= 1
        return value

    def strength(self):
        """How tightly the next token binds to what stands before it."""
        token = self.peek()
        if token == "|" and self.open_bars > 0 or token.startswith(r"\end"):
            return 0
        return _STRENGTHS.get(token, _PRODUCT)

    def operation(self, left):
        """The result of the next sign, applied to the value before it and what stands behind it."""
        left = self.number(left)
        sign = self.peek()
        if sign in _STRENGTHS:
            self.take()
        if sign == "!":
            return self.number(arithmetic.factorial(left))
        if sign == "°":
            degree = arithmetic.PI / 180 if self.in_angle else Fraction(1)
            return self.number(arithmetic.multiply(left, degree))
        if sign == "^":  # a^b^c is a^(b^c)
            exponent = self.number(self.expression(_POWER))
            return self.number(arithmetic.power(left, exponent))
        if sign not in _STRENGTHS:
            self.check_product()
        right = self.number(self.expression(_STRENGTHS.get(sign, _PRODUCT) + 1))
        if sign == "+":
            return self.number(arithmetic.add(left, right))
        if sign == "-":
            return self.number(arithmetic.add(left, -right))
        if sign == "/":
            return self.number(arithmetic.divide(left, right))
        return self.number(arithmetic.multiply(left, right))

    def check_product(self):
        """Unreadable if what comes next cannot be a factor without a sign: 1 2, x2, f(2)."""
        before = self.tokens[self.place - 1]
        after = self.peek()
        is_name = before[0].isalpha() and before not in CONSTANTS
        if after[0].isdigit() and (before[-1].isdigit() or is_name):
            raise Unreadable
        if after == "(" and _FUNCTION_LETTERS.match(before):
            raise Unreadable

    def operand(self):
        """A bracket, a signed operand, a macro and its arguments, a constant, name or number."""
        token = self.take()
        if token in ("(", "[", "{"):
            return self.bracketed(token)
        if token == "|":
            return self.between_bars()
        if token == "+":
            return self.number(self.expression(_SIGN))
        if token == "-":
            return -self.number(self.expression(_SIGN))
        if token in CONSTANTS:
            return CONSTANTS[token]
        if token.startswith(r"\begin"):
            return self.matrix(token[len(r"\begin{"):-1])
        if re.fullmatch(VARIABLE, token):
            return self.variable(token)
        name = token.removeprefix("\\")
        if name.isalpha():
            return self.macro(name)
        return self.number(Fraction(token))

    def between_bars(self):
        self.open_bars += 1
        value = self.number(self.expression(_SUM))
        self.expect("|")
        self.open_bars -= 1
        return self.number(arithmetic.modulus(value))

    def variable(self, name):
        """The number that a variable stands for at this point."""
        name = name.replace("{", "").replace("}", "")
        self.variables.add(name)
        return variable_value(name, self.point)

    def macro(self, name):
        """The value of a macro or of a function's plain name, with its arguments."""
        if name == "pi":
            return CONSTANTS[r"\pi"]
        if name == "frac":
            numerator = self.argument()
            return self.number(arithmetic.divide(numerator, self.argument()))
        if name == "binom":
            n = self.argument()
            return self.number(arithmetic.binomial(n, self.argument()))
        if name == "sqrt":
            index = self.argument() if self.peek() == "[" else Fraction(2)
            return self.number(arithmetic.root(self.argument(), index))
        if name in FUNCTIONS:
            return self.function(name)
        raise Unreadable

    def argument(self):
        """The number that a macro takes next."""
        return self.number(self.expression(_ARGUMENT))

    def function(self, name):
        r"""\sin x, \sin^2 x, \sin^{-1} x (the arcsine), \log_2 x: the base and power come first."""
        base = None
        exponent = None
        while self.peek() in ("_", "^"):
            if self.take() == "_" and name == "log":
                base = self.argument()
            elif exponent is None and self.tokens[self.place - 1] == "^":
                exponent = self.argument()
            else:
                raise Unreadable
        if exponent == -1 and "arc" + name in FUNCTIONS:
            name = "arc" + name
            exponent = None
        number = self.function_argument(name in ANGULAR)
        if base is None:
            value = FUNCTIONS[name](number)
        else:
            value = arithmetic.logarithm(number, base)
        if exponent is not None:
            value = arithmetic.power(value, exponent)
        return self.number(value)

    def function_argument(self, is_angle):
        """What a function takes: a bracket, or the factors up to a sign, bracket or function."""
        outer = self.in_angle
        self.in_angle = is_angle
        if self.peek() in ("(", "[", "{"):
            number = self.argument()
            if self.peek() == "°":
                number = self.operation(number)
        else:
            number = self.number(self.expression(_POWER))
            while self.continues_argument():
                self.check_product()
                factor = self.number(self.expression(_POWER))
                number = self.number(arithmetic.multiply(number, factor))
        self.in_angle = outer
        return number

    def continues_argument(self):
        token = self.peek()
        name = token.removeprefix("\\")
        if self.strength() != _PRODUCT or token in ("*", "/", "(", "[", "|"):
            return False
        return name not in FUNCTIONS


def variable_value(name, point):
    """The number that a variable stands for at a point: positive at the first, else of any sign."""
    digest = zlib.crc32(f"{name} {point}".encode())
    value = Fraction(1009 + digest % 7919, (101, 103, 107)[point])
    return -value if point > 0 and digest >> 20 & 1 else value


def split_words(tokens, words):
    """The tokens, with short words cut into names of functions and letters: sinx, xyz, nRT."""
    parts = []
    for place, token in enumerate(tokens):
        if len(token) == 1 or not token.isalpha():
            parts.append(token)
            continue
        function, rest = _WORD.fullmatch(token).groups()
        before = tokens[place - 1] if place > 0 else ","
        after = tokens[place + 1] if place + 1 < len(tokens) else ","
        alone = before in ("(", "[", "{", *_CLOSERS) and after in _CLOSERS
        is_word = words and alone and function != token and not _PRODUCT_ALONE.fullmatch(token)
        if len(rest) > _MAX_LETTERS or is_word:
            parts.append(token)
        else:
            parts += [part for part in (function, *rest) if part]
    return parts


def fold_names(value):
    """The value with words that are no part of a formula in lower case: the choice (C), Even."""
    if isinstance(value, Values):
        return Values(value.brackets, [fold_names(item) for item in value.items])
    return value.casefold() if isinstance(value, str) and value.isalpha() else value
