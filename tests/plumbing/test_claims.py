"""What a person says of answers beside a reference, kind by kind: number words, values that an
equation states, letters behind a space, spellings."""
import itertools
import random

import pytest
from test_grading import KINDS

from plumbing.answers import same_answer, same_vote

RIGHT = {  # kind: (answer, reference) that a person calls right
    "number words": [
        (r"5\text{ million}", "5000000"), ("5 million", "5,000,000"), ("3 dozen", "36"),
        ("3 dozen eggs", "36"), (r"3\text{ dozen eggs}", "36"), (r"\$2.5\text{ billion}", "2.5e9"),
        (r"2\text{ hundred thousand}", "200000"), ("2 hundred thousand dollars", "200000"),
        (r"1.2 \text{ thousand}", "1200"), (r"\frac12\text{ million}", "500000"),
        (r"1\frac12\text{ million people}", "1500000"), (r"4\,\mathrm{trillion}", "4*10^{12}"),
        ("7 Million", "7000000"), ("5 million", r"5\text{ million}"), ("5 lakh", "500000"),
        (r"\text{5 million}", "5000000"), ("3 hundredths", "0.03"), (r"7\text{ tenths}", "0.7"),
        ("2 thirds", r"\frac{2}{3}"), ("6 dozens", "72"),
    ],
    "values that an equation states": [
        ("m+n=204", "204"), ("a+b+c=204", "204"), ("m + n = 107 + 9 = 116", "116"),
        (r"\sin\theta=\frac12", "1/2"), ("[ABC]=84", "84"), ("|z|=5", "5"), ("2+2=5", "5"),
        (r"\frac{[ABC]}{[DEF]}=\frac{4}{9}", "4/9"), (r"\gcd(a,b)=6", "6"), ("84=[ABC]", "84"),
        (r"\cos 2x = -\frac{7}{25}", "-7/25"), ("100m+n=1,234", "1234"), ("x+y=12", "12"),
        ("x-y=3", "3"),
        (r"\lfloor x\rfloor=3", "3"), (r"P(A\cap B)=0.25", "1/4"), (r"\log_2 x=3", "3"),
        (r"\angle A+\angle B=90^\circ", "90"), ("f(2)+f(3)=12", "12"), ("AB^2=75", "75"),
        ("m=3, n=4, m+n=7", "7"), (r"x=3 \text{ and } y=4, x+y=7", "7"),
        (r"\vec{a}+\vec{b}=(1,2)", "(1,2)"), (r"A\cup B=\{1,2,3\}", "1,2,3"),
        (r"m+n = 116 = 4\cdot 29", "116"), (r"p+q+r = \boxed{37}", "037"),
        (r"\frac{3}{56} = 0.05357", "3/56"), (r"P=\frac{3}{56}=0.05357", r"\frac{3}{56}"),
        (r"\frac{3}{56} = 0.05357", "0.05357"), (r"\frac23=0.66", "2/3"),
        (r"\sqrt2=1.414", r"\sqrt2"),
        (r"\frac{m}{n}=\frac{3}{4}, m+n=7", "7"), ("p(1)+p(2)=4", "4"),
        ("m+n=80", "080 or 081 (both were accepted)"), ("m+n=0.3333333333", "1/3"),
    ],
    "letters behind a space": [
        ("4 h", "4h"), ("4h", "4 h"), ("4 h", "4"), ("2 rh", "2rh"), (r"2\,rh", "2rh"),
        (r"\frac12 bh", r"\frac{bh}{2}"), ("2 sinx", r"2\sin x"), ("12 kg", "12"), ("5 ft", "5"),
        ("3 hr", "3"), ("12 men", "12"), ("5 sec", "5"), ("4 oz", "4"), ("60 mph", "60"),
        ("3 sq ft", "3"), ("5 of the red apples", "5"), ("7 kWh", "7"), ("50 USD", "50"),
        ("12 boys", "12"), ("6 cu in", "6"), ("8 km/h", "8"), ("5 eggs", "5"),
        ("6 days", "6"), ("2 lbs", "2"), ("3 cm, 4 cm", "3,4"), ("5cm", "5"),
        ("60 miles an hour", "60"), (r"\frac{1}{2} g", "g/2"),
        ("3 GB", "3"), ("30 sq. units", "30"),
    ],
    "spellings": [
        ("3 1/2", "3.5"), ("-3 1/2", "-3.5"), (r"3\ 1/2\text{ hours}", "7/2"), ("x=2 3/4", "11/4"),
        (r"1 \over 2", "1/2"), (r"{\sqrt{3} \over 2}", r"\frac{\sqrt3}{2}"),
        (r"x = {a+b \over 2}", r"\frac{a+b}{2}"), (r"{\bf 204}", "204"), (r"\large 204", "204"),
        (r"\color{red}{204}", "204"), (r"\textcolor{blue}{x+1}", "x+1"), (r"{\rm C}", "C"),
        (r"5\ {\rm cm}", "5"), (r"\underline{18}", "18"), ("18/day", "18"), ("18 per day", "18"),
        (r"18/\text{day}", "18"), (r"\$18/hour", "18"),
        (r"60\frac{\text{miles}}{\text{hour}}", "60"),
        (r"9.8\,\frac{\mathrm{m}}{\mathrm{s}^2}", "9.8"), (r"\text{-}3", "-3"), ("€18", "18"),
        ("18 €", "18"), (r"\pounds 18", "18"), (r"1\text{, }2", "1,2"), (r"1\text{, and }2", "1,2"),
        ("2516", "2516_8"), ("1A3", "1A3_{16}"), ("１８", "18"), ("－３．５", "-3.5"),
        ("x>5", r"(5,\infty)"), (r"x \ge 5", r"[5,\infty)"), ("5<x", r"(5,\infty)"),
        (r"-1 \le x < 3", "[-1,3)"), ("3 > x > 1", "(1,3)"), (r"(5,\infty)", "x>5"),
        (r"x<1 \text{ or } x>3", r"(-\infty,1)\cup(3,\infty)"), (r"-\infty<t\le 2", r"(-\infty,2]"),
        (r"x\ne 3", r"(-\infty,3)\cup(3,\infty)"), (r"\mathbb{R}", r"(-\infty,\infty)"),
        (r"x\in(5,\infty)", "x>5"), (r"\text{€}18", "18"), (r"1\text{,}2", "1, 2"),
        (r"x\in\mathbb{R}", r"(-\infty,+\infty)"), ("all real numbers", r"(-\infty,\infty)"),
    ],
}

WRONG = {
    "number words": [
        (r"5\text{ million}", "5"), ("3 dozen", "3"), ("5 million", "5 thousand"),
        ("5 million", "5 billion"), (r"2\text{ hundred}", "2"), ("3 hundredths", "300"),
        ("3 hundredths", "3"), ("5 thousand", "5 hundred"), ("3 third graders", "1"),
    ],
    "values that an equation states": [
        ("x>5", "5"), ("x=3 or x=5", "5"), ("0 = x - 5", "5"), ("x-5=0", "0"), ("2x=10", "5"),
        ("2x=10", "10"), ("x^2=9", "9"), ("m+n=204", "203"), ("m+n=204", "m-n=204"),
        ("204", "m+n=204"), ("x+y=5, x-y=3", "3"), ("3=4", "4"), ("3=4", "3"), ("2+2=5", "4"),
        ("m+n=5 or m+n=7", "7"), ("3, m+n=5", "5"), (r"m+n \ne 5", "5"), (r"m+n \ge 5", "5"),
        (r"\frac52=3", "5/2"), (r"\frac{3}{56}=0.07", "3/56"), (r"\frac23=0.65", "2/3"),
        ("x=3, x=5", "5"), ("m+n=x", "5"), (r"m+n\approx 5", "6"), ("m=3, n=4, m+n=7", "3"),
        ("m=107, n=9", "116"), ("n!=120", "120"), ("107+9=116", "107"), (r"f(x)\equiv 5", "5"),
        ("x+2y=4", "4"), ("3x+2y=6", "6"), (r"\frac{x^2}{4}+\frac{y^2}{9}=1", "1"),
        ("m+n=2+3i", "2"), ("a+b=5, 6", "5"),
    ],
    "letters behind a space": [
        ("3 rs", "3 pq"), ("3 rs", "3"), (r"\frac12 bh", r"\frac12 ah"), ("2 sinx", "2 cosx"),
        ("2 sinx", "2"), ("3 pqr", "3 klm"), ("2 abcd", "2 wxyz"), ("4h", "4"), ("2rh", "2"),
        ("4 h", "5h"), ("3 mn", "3"), (r"\frac{1}{2} at", "1/2"),
        ("3nm", "3"),
    ],
    "spellings": [
        ("3 1/2", "3/2"), ("3 1/2", "1.5"), ("3 1/2", "3, 1/2"), ("5 3 1/2", "17.5"),
        (r"1 \over 2", "2"), ("18/ab", "18"), ("18/xy", "18"), ("18/pi", "18"), (r"18/\pi", "18"),
        (r"60\frac{m}{s}", "60"), ("2516_8", "2516"), ("2516", "2517_8"), ("2516_7", "2516_8"),
        ("1", "x_1"), ("A", "A_1"), ("x>5", r"[5,\infty)"), ("x<5", r"(5,\infty)"),
        ("x>5", "5,\\infty"), ("1<x<2", "1,2"), ("1<x<2", "[1,2]"), ("1,2", "1<x<2"),
        ("1<x<2", "x=1, y=2"),
        (r"x<3 \text{ and } x>1", r"(-\infty,3)\cup(1,\infty)"), ("x>y", r"(5,\infty)"),
        (r"\mathbb{R}^2", r"(-\infty,\infty)"), (r"\mathbb{Z}", r"(-\infty,\infty)"),
        (r"\text{-}3", "3"), (r"\color{red}{204}", "205"),
    ],
}


def pairs_of(kinds):
    return [(kind, *pair) for kind, pairs in kinds.items() for pair in pairs]


@pytest.mark.parametrize("kind, answer, reference", pairs_of(RIGHT))
def test_a_person_says_right(kind, answer, reference):
    assert same_answer(answer, reference)


@pytest.mark.parametrize("kind, answer, reference", pairs_of(WRONG))
def test_a_person_says_wrong(kind, answer, reference):
    assert not same_answer(answer, reference)


@pytest.mark.parametrize("one, other", [
    ("m+n=204", "204"), ("2516", "2516_8"), (r"\frac{3}{56} = 0.05357", "3/56"), ("4 h", "4h"),
    ("x+y=5", "5"), ("xy=6", "6"), (r"\sin x=\frac{1}{2}", "1/2"), ("x^2+y^2=25", "25"),
    ("|z|=5", "5"), ("x>5", r"(5,\infty)"), ("(2,1)", "{1,2}"), ("(3,2)", "2,3"),
    ("2+2=5", "5")])
def test_what_a_reference_accepts_and_a_vote_does_not(one, other):
    assert not same_vote(one, other) and not same_vote(other, one)


def test_a_vote_does_not_depend_on_which_of_two_comes_first():
    """Over 6,000 pairs of all that stands here and in test_grading.py."""
    generator = random.Random(0)
    texts = {text for _, *pair in pairs_of(RIGHT) + pairs_of(WRONG) for text in pair}
    for one_answer, two_answers in KINDS.values():
        texts.update(itertools.chain(*one_answer, *two_answers))
    texts.update(["(2,1)", "{1,2}", "2,1", "[1,2]", "1,2", "((1,2),(3,4))", "{(1,2),{3,4}}"])
    texts = sorted(texts)
    pairs = [generator.sample(texts, 2) for _ in range(6000)]
    pairs += itertools.combinations(["(2,1)", "{1,2}", "2,1", "[1,2]", "1,2", "(1,2)"], 2)
    for one, other in pairs:
        assert same_vote(one, other) == same_vote(other, one), (one, other)
