"""Numbers of answers: exact fractions while they last, otherwise 100 digits by mpmath.

A number is a Fraction, or an mpf or mpc of CONTEXT. Every function here takes bounded time,
whatever the numbers: what would take more raises ValueError (Unreadable) or ArithmeticError before
it is computed.
"""
import math
from fractions import Fraction

import mpmath

CONTEXT = mpmath.MPContext()  # of our own, as other code may set the digits of mpmath.mp
CONTEXT.dps = 100
NOISE = CONTEXT.mpf(10) ** -75  # beside the terms of a sum, a rounding error and no number
CLOSE = CONTEXT.mpf(10) ** -40  # relative; two numbers that people write differ by more, or are one
MAX_BITS = 20_000  # of a number: 2025! is exact, 9^{9^9} is refused unseen
PI = +CONTEXT.pi
E = CONTEXT.exp(1)
I = CONTEXT.mpc(0, 1)
MAX_ROOT = 99  # up to this one, odd roots of negative numbers are the real ones


class Unreadable(ValueError):
    """What the grammar has no place for, or what is too large to be computed."""


def is_number(value):
    """Whether a value is a number of these kinds."""
    return isinstance(value, Fraction | CONTEXT.mpf | CONTEXT.mpc)


def is_real(number):
    """Whether a number has no imaginary part."""
    return not isinstance(number, CONTEXT.mpc)


def inexact(number):
    """An mpf or mpc of a number."""
    if isinstance(number, Fraction):
        return CONTEXT.mpf(number.numerator) / number.denominator
    return number


def same_number(one, other, tolerance=CLOSE):
    """Equality: of two fractions exact where the tolerance is CLOSE, else relative."""
    fractions = isinstance(one, Fraction) and isinstance(other, Fraction)
    if one == other or fractions and tolerance == CLOSE:
        return one == other
    if fractions and one.denominator == other.denominator == 1:
        return False
    one = inexact(one)
    other = inexact(other)
    return abs(one - other) <= tolerance * max(abs(one), abs(other))


def bits(number):
    """The size of a number, in bits; an inexact one has a few."""
    if isinstance(number, Fraction):
        return number.numerator.bit_length() + number.denominator.bit_length()
    return CONTEXT.prec


def checked(number):
    """The number itself. Unreadable if it is none, not finite, or too large or small to go on."""
    if isinstance(number, Fraction):
        size = bits(number)
    elif is_number(number) and CONTEXT.isfinite(number):
        size = abs(CONTEXT.mag(number)) if number else 0
    else:
        raise Unreadable
    if size > 2 * MAX_BITS:
        raise Unreadable
    return number


def without_noise(number, scale):
    """An inexact number without what is a rounding error beside `scale`; exact if it is whole."""
    if isinstance(number, Fraction):
        return number
    noise = NOISE * abs(scale)
    real = number.real
    if abs(number.imag) > noise:
        return CONTEXT.mpc(real if abs(real) > noise else 0, number.imag)
    if abs(real) < 10**20:
        nearest = int(CONTEXT.nint(real))
        if abs(real - nearest) <= noise:
            return Fraction(nearest)
    return real


def whole(number):
    """The int that a number is. Unreadable if it is not whole."""
    if isinstance(number, Fraction) and number.denominator == 1:
        return number.numerator
    raise Unreadable


def add(one, other):
    """The sum, exactly 0 where only rounding errors are left of it."""
    if isinstance(one, Fraction) and isinstance(other, Fraction):
        return one + other
    one = inexact(one)
    other = inexact(other)
    return without_noise(one + other, max(abs(one), abs(other)))


def negative(number):
    """Unreadable if it is no number."""
    return -checked(number)


def multiply(one, other):
    """The product."""
    if isinstance(one, Fraction) and isinstance(other, Fraction):
        return one * other
    product = inexact(one) * inexact(other)
    return without_noise(product, abs(product))


def divide(one, other):
    """The quotient."""
    if isinstance(one, Fraction) and isinstance(other, Fraction):
        return one / other
    quotient = inexact(one) / inexact(other)
    return without_noise(quotient, abs(quotient))


def power(base, exponent):
    """Exact if the exponent is whole or the root is; an odd root of a negative number is real."""
    if isinstance(exponent, Fraction) and isinstance(base, Fraction):
        if exponent.denominator == 1:
            size = max(abs(base.numerator), base.denominator)
            if (size.bit_length() - 1) * abs(exponent) > MAX_BITS:
                raise Unreadable
            return base ** int(exponent)
        if base < 0 and exponent.denominator % 2 == 1 and exponent.denominator <= MAX_ROOT:
            sign = (-1) ** exponent.numerator
            return sign * power(-base, exponent)
        if exponent.denominator == 2 and base > 0:
            root = Fraction(math.isqrt(base.numerator), math.isqrt(base.denominator))
            if root * root == base:
                return power(root, 2 * exponent)
    if base == 0:
        if is_real(exponent) and exponent > 0:
            return Fraction(0)
        raise Unreadable
    base = inexact(base)
    exponent = inexact(exponent)
    if abs(exponent) * abs(CONTEXT.log(base)) > MAX_BITS:
        raise Unreadable
    result = base ** exponent
    return without_noise(result, abs(result))


def root(number, index):
    """The index-th root of a number, by the rules of `power`."""
    odd = isinstance(index, Fraction) and index.denominator == 1 and index % 2 == 1
    if odd and is_real(number) and number < 0 and 0 < index <= MAX_ROOT:
        return -power(-number, 1 / index)
    return power(number, divide(Fraction(1), index))


def factorial(number):
    """n! of a whole number."""
    n = whole(number)
    if n < 0 or n > 1000 and n * (math.log2(n) - 1.4) > MAX_BITS:
        raise Unreadable
    return Fraction(math.factorial(n))


def binomial(n, k):
    """n over k, of whole numbers."""
    n = whole(n)
    k = whole(k)
    if k < 0 or n < 0:
        raise Unreadable
    if k <= n:
        size = math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
        if size > MAX_BITS / 4:  # math.comb is slow beyond
            raise Unreadable
    return Fraction(math.comb(n, k))


def modulus(number):
    """The absolute value."""
    return without_noise(inexact(abs(number)), 1) if not is_real(number) else abs(number)


def logarithm(number, base=None):
    """To base e, or to `base`."""
    result = without_noise(CONTEXT.log(inexact(number)), 1)
    return result if base is None else divide(result, logarithm(base))


def exponential(number):
    """e to this power."""
    return power(E, number)


def sine(angle):
    """Of an angle in radians."""
    return without_noise(CONTEXT.sin(bounded(angle)), 1)


def cosine(angle):
    """Of an angle in radians."""
    return without_noise(CONTEXT.cos(bounded(angle)), 1)


def tangent(angle):
    """Of an angle in radians."""
    return divide(sine(angle), cosine(angle))


def inverse(function):
    """1 / function: the secant of the cosine."""
    return lambda number: divide(Fraction(1), function(number))


def by_mpmath(function):
    """A function of mpmath's, of numbers of bounded size."""
    return lambda number: without_noise(function(bounded(number)), 1)


def bounded(number):
    """The argument of a function that takes long for large ones."""
    if abs(number) > MAX_BITS:
        raise Unreadable
    return inexact(number)


FUNCTIONS = {
    "sin": sine, "cos": cosine, "tan": tangent,
    "sec": inverse(cosine), "csc": inverse(sine), "cot": inverse(tangent),
    "arcsin": by_mpmath(CONTEXT.asin), "arccos": by_mpmath(CONTEXT.acos),
    "arctan": by_mpmath(CONTEXT.atan),
    "sinh": by_mpmath(CONTEXT.sinh), "cosh": by_mpmath(CONTEXT.cosh),
    "tanh": by_mpmath(CONTEXT.tanh),
    "ln": logarithm, "exp": exponential, "abs": modulus,
    "log": lambda number: logarithm(number, Fraction(10)),
    "lg": lambda number: logarithm(number, Fraction(10)),
}
ANGULAR = ("sin", "cos", "tan", "sec", "csc", "cot")  # 30^\circ is an angle there, else a 30
