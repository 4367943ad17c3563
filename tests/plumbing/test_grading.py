"""Kinds of answers that people and models write, several of each, by hand: the pairs that are one
answer and those that are two; and answers as they are drawn from responses."""
import time

import pytest

from plumbing.answers import MAX_ANSWER, extract_answer, same_answer, same_vote
from plumbing.readings import readings_of

KINDS = {  # kind: (pairs that are one answer, pairs that are two)
    "equations": (
        [
            ("x^2+y^2=1", "1=x^2+y^2"), ("y=2x+3", "2x-y+3=0"), ("y=2x+3", "2x+3"),
            ("2x+3=y", "y = 3+2x"), ("x = 5", "5"), ("x-5=0", "x=5"), ("f(x)=x^2-1", "(x-1)(x+1)"),
            ("5=x", "5"), (r"\frac{x^2}{4}+\frac{y^2}{9}=1", "9x^2+4y^2=36"),
            ("x^2 = 4y", "4y = x^2"), (r"r = 2\sin\theta", r"r=2\sin(\theta)"),
            ("3x+2y=6", "6x+4y-12=0"), (r"\text{Area} = 12", "12"), ("AB=5", "5"),
            (r"\angle ABC = 40^\circ", "40"), ("a_n = 2n+1", "2n+1"), ("f^{-1}(x)=x/2", "x/2"),
            (r"S = 3 \cdot 4 = 12", "12"), ("PV=nRT", "nRT=PV"),
            (r"\theta=\frac{\pi}{3}", r"\frac{\pi}{3}"), ("x^2-5x+6=0", "x^2+6=5x"),
            (r"P(A)=\frac{1}{3}", "1/3"), ("y' = 2y", "2y=y'"), (r"y=\sqrt{x}+1", r"\sqrt{x}=y-1"),
            ("(x,y)=(2,3)", "(2,3)"), ("(x,y)=(2,3)", "x=2, y=3"), ("E=mc^2", "mc^2 = E"),
            ("y = -x + 4", "x+y=4"), ("(x-1)^2+(y+2)^2=9", "(y+2)^2 + (x-1)^2 = 9"),
        ],
        [
            ("x^2+y^2=1", "x^2-y^2=1"), ("y=2x+3", "y=2x-3"), ("x^2=4", "4"), ("2x=10", "10"),
            ("2x=10", "5"), ("x=3", "y=3"), ("3x+2y=6", "2x+3y=6"),
            ("x^2=4y", "y^2=4x"), ("PV=nRT", "nRT"),
            ("y^2=x", "x"), ("f(x+1)=f(x)+f(1)", "f(2x)=2f(x)"),
            ("y=x^2+1", "x=y^2+1"), ("x=5", "x=-5"), ("a+b=c", "a-b=c"),
            ("y=3", "y=4"), ("x^2-5x+6=0", "x^2-5x-6=0"), ("3=4", "4"), ("x>2", "x<2"),
            ("x>2", r"x\ge 2"), ("x=", "y="), (r"y=\sqrt{x}", r"y=-\sqrt{x}"),
            (r"x \equiv 1 \pmod 3", r"x \equiv 2 \pmod 3"), ("y = x", "y = -x"),
            ("x = y^2", "y = y^2"),
        ],
    ),
    "names in lists": (
        [
            ("a=2, b=3", "b=3, a=2"), ("x=1,x=2", "x=2, x=1"), ("x=1, 2", "x=2, x=1"),
            (r"x=2 \text{ and } y=3", "y=3, x=2"), ("x=2,y=3", "(2,3)"), ("x=1 or x=2", "2,1"),
            ("m=1/2, n=3", "n=3.0, m=0.5"), (r"\{x=1, y=2\}", "y=2, x=1"),
            (r"\alpha=1, \beta=2", r"\beta=2, \alpha=1"),
            ("apples = 2, pears = 3", "pears=3, apples=2"), ("x=y=2", "x=2, y=2"),
            ("x = 4; y = 7", "x=4,y=7"),
        ],
        [
            ("a=2, b=3", "a=3, b=2"), ("x=2, y=3", "x=3, y=2"), ("p=1,q=1,r=2", "p=1,q=2,r=1"),
            ("apples = 2, pears = 3", "apples=3, pears=2"), ("x=3,y=2", "(2,3)"),
            (r"\alpha=1, \beta=2", r"\alpha=2, \beta=1"), ("a_1=4, a_2=5", "a_1=5, a_2=4"),
            ("x=1,y=2", "x=1"), ("P(A)=1/2, P(B)=1/3", "P(A)=1/3, P(B)=1/2"),
            ("(x,y)=(1,2)", "(x,y)=(2,1)"), ("(x,y)=(1,2),(3,4)", "(x,y)=(1,4),(3,2)"),
            ("m=3, b=-1", "m=-1, b=3"),
        ],
    ),
    "plain text": (
        [
            ("sqrt(3)/2", r"\frac{\sqrt{3}}{2}"), ("2*sqrt(3)", r"2\sqrt3"),
            ("pi/4", r"\frac{\pi}{4}"), ("3*x", "3x"), ("2pi", r"2\pi"), ("2 pi", r"2\pi"),
            ("(1+sqrt(5))/2", r"\frac{1+\sqrt{5}}{2}"), ("x**2+1", "x^2+1"), ("x*y", "xy"),
            ("3/(2*pi)", r"\frac{3}{2\pi}"), ("sqrt(2)*sqrt(3)", r"\sqrt{6}"), ("sin(pi/6)", "1/2"),
            ("e^(2)", "e^2"), ("exp(2)", "e^2"), ("ln(2)", r"\ln 2"),
            ("log(2)/log(3)", r"\log_3 2"), ("2x+3", "3+2x"), ("(x+1)^2", "x^2+2x+1"),
            ("x(x-1)", "x^2-x"), ("4*pi*r^2", r"4\pi r^2"), ("n(n+1)/2", r"\frac{n^2+n}{2}"),
            ("sqrt3/3", r"\frac{1}{\sqrt{3}}"), ("-3*sqrt(7)", r"-3\sqrt{7}"),
            ("2^(1/3)", r"\sqrt[3]{2}"), ("abs(-3)", "3"), ("cos(0)", "1"),
            ("arctan(1)", r"\frac{\pi}{4}"), ("10*sqrt(2)", r"10\sqrt2"),
        ],
        [
            ("sqrt(3)/2", r"\frac{\sqrt{2}}{3}"), ("pi/4", r"\frac{\pi}{3}"), ("3*x", "3+x"),
            ("|x|", "x"), (r"\sqrt{x^2}", "x"), ("sqrt(3)/2", r"\sqrt{\frac{3}{2}}"), ("x", "y"),
            ("xy", "x+y"), ("ab", "cd"), ("2x+3", "2y+3"), ("no", "on"), ("A", "B"),
            ("sin(x)", "cos(x)"), ("2^x", "x^2"), (r"\frac{x}{yz}", r"\frac{xy}{z}"),
        ],
    ),
    "exact and huge": (
        [
            ("2^{-1500}", "1/2^{1500}"), ("2^{1500}", "4^{750}"),
            ("2^{2024}-1", r"2 \cdot 2^{2023} - 1"), ("2024!", r"2024 \cdot 2023!"),
            (r"\frac{1}{3^{800}}", "9^{-400}"), ("10^{400}", "100^{200}"),
            (r"2^{1000}\sqrt{2}", "2^{1000.5}"),
            (r"\left(\frac{2}{3}\right)^{2000}", r"\frac{2^{2000}}{3^{2000}}"),
            ("1" + "0" * 350, "10^{350}"), (r"\sqrt{2^{4000}}", "2^{2000}"),
            (r"3^{-700}\pi", r"\frac{\pi}{3^{700}}"), ("e^{800}", "(e^{400})^2"),
            ("(-1)^{2023}", "-1"),
        ],
        [
            ("2^{-1500}", "2^{-1501}"), ("2^{1500}", "2^{1500}+1"), ("2024!", "2025!"),
            ("2^{2024}", "2^{2024}-1"), ("10^{400}", "10^{401}"), ("9^{9^{9}}", "9^{9^{8}}"),
            (r"2^{1000}\sqrt{2}", r"2^{1000}\sqrt{3}"), ("0", "2^{-1500}"), ("e^{800}", "e^{801}"),
        ],
    ),
    "binomials and logarithms": (
        [
            (r"\binom{10}{3}", "120"), (r"\dbinom{6}{2}", "15"), (r"\binom52", "10"),
            (r"\ln e^2", "2"), (r"\log_2 8", "3"), (r"\log_{10} 1000", "3"), (r"\log 100", "2"),
            (r"\ln 8", r"3\ln 2"), (r"\log_{2}{5}", r"\frac{\ln 5}{\ln 2}"), (r"\log_4 8", "1.5"),
            (r"\ln(2)+\ln(3)", r"\ln 6"), (r"\sin 30^\circ", "1/2"), (r"\cos\frac{\pi}{3}", "0.5"),
            (r"\tan 45^{\circ}", "1"), (r"\sin^2 60^\circ", "3/4"), (r"\arctan 1", r"\pi/4"),
            (r"\sin^{-1} 1", r"\frac{\pi}{2}"), (r"\sec 60^\circ", "2"),
            (r"\binom{2024}{1012}", r"\frac{2024!}{1012!^2}"),
            (r"\operatorname{arcsin}\frac12", r"\pi/6"), (r"\sin 2x", r"\sin(2x)"),
            (r"\sin x\cos x", r"\cos x \sin x"), (r"2\sin x\cos x", r"\sin 2x"),
            (r"e^{\ln 5}", "5"), (r"\ln\frac{1}{2}", r"-\ln 2"),
            (r"\frac{\ln 3}{2}", r"\ln\sqrt{3}"), (r"\cosh 0", "1"), (r"\cot\frac{\pi}{4}", "1"),
        ],
        [
            (r"\binom{10}{3}", "121"), (r"\binom{10}{3}", r"\binom{10}{4}"),
            (r"\ln 2", r"\log_2 3"), (r"\ln 2", r"\log 2"), (r"\sin 30", "1/2"),
            (r"\log_2 3", r"\log_3 2"), (r"\sin 2x", r"2\sin x"), (r"\ln 2", r"\ln 3"),
            (r"\binom{n}{2}", r"\binom{n}{3}"),
        ],
    ),
    "units, approximations and marks": (
        [
            (r"3\pi \text{ cm}", r"3\pi"), (r"2\sqrt{3}\text{ m}^2", r"2\sqrt3"),
            (r"20\pi\,\mathrm{cm}^3", r"20\pi"), (r"5\sqrt{2} \approx 7.07", r"5\sqrt{2}"),
            (r"\frac{22}{7} ≈ 3.143", "22/7"), (r"x = \sqrt{3} \approx 1.73", r"\sqrt3"),
            (r"x \approx 7.07", "7.07"), (r"23\,456", "23456"), (r"1\,234\,567", "1234567"),
            (r"12\;000", "12000"), ("10 000", "10000"), (r"1\ 500", "1500"),
            (r"[1,+\infty)", r"[1,\infty)"), (r"(-\infty,+\infty)", r"(-\infty, \infty)"),
            (r"+\infty", r"\infty"), (r"x \in [2,5]", "[2,5]"),
            (r"x\in(-\infty,3)", r"(-\infty,3)"), (r"n \in \{1,2,3\}", "1,2,3"),
            (r"100^\circ C", "100"), (r"37.5^{\circ}\text{C}", "37.5"), ("451 °F", "451"),
            (r"0.\overline{3}", "1/3"), (r"0.1\overline{6}", "1/6"), (r"2.\overline{09}", "23/11"),
            (r"0.\overline{142857}", "1/7"), (r"1.2\bar{3}", "37/30"), ("0.(3)", "1/3"),
            ("10^{-3} m", "0.001"), (r"2\times10^{-3}\text{ m}", "0.002"),
            (r"6.02\times 10^{23}", r"602 \cdot 10^{21}"), ("5 m/s", "5"),
            (r"9.8 \text{ m/s}^2", "9.8"), ("60 miles per hour", "60"),
            (r"\frac{3}{4}\text{ hours}", "0.75"), ("3{,}14", "3.14"), (r"5 \text{ cm}", "5"),
            (r"25\,\text{km}/\text{h}", "25"), ("3 × 10^{-5} J", r"3\times 10^{-5}"),
            (r"\$3.50", "3.5"), (r"(-\infty,1)\cup(2,+\infty)", r"(2,\infty) \cup (-\infty,1)"),
            (r"5\sqrt{2} (\approx 7.07)", r"5\sqrt2"), ("(3 cm, 4 cm)", "(3,4)"),
            (r"3\pi \text{ square units}", r"3\pi"), (r"e^2\text{ units}", "e^2"), (r"\infty", "∞"),
        ],
        [
            (r"3\pi \text{ cm}", r"2\pi"), (r"5\sqrt{2} \approx 7.07", r"7\sqrt{2}"),
            (r"23\,456", "23"), (r"[1,+\infty)", r"(1,\infty)"), (r"+\infty", r"-\infty"),
            (r"x \in [2,5]", "[2,6]"), (r"x\in[2,5]", "(2,5)"), (r"0.\overline{3}", "0.3"),
            (r"0.\overline{3}", "0.33"), (r"0.1\overline{6}", r"0.\overline{16}"),
            ("10^{-3} m", "1000"), ("3m", "3"), ("2x", "2"), (r"\pi r^2 h", r"\pi r^2"),
            (r"n \text{ odd}", r"n \text{ even}"), ("3 xy", "3"), ("2 pi", "2"),
            (r"(-\infty,1)\cup(2,+\infty)", r"(-\infty,1)\cup[2,+\infty)"), ("12 345 6", "123456"),
            ("12 34", "1234"),
        ],
    ),
    "matrices": (
        [
            (r"\begin{pmatrix}3\\4\end{pmatrix}", r"\begin{pmatrix} 3 \\ 4 \end{pmatrix}"),
            (r"\begin{bmatrix}1&2\\3&4\end{bmatrix}",
             r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}"),
            (r"\begin{pmatrix}1/2\\0\end{pmatrix}",
             r"\begin{pmatrix} \frac{1}{2} \\ 0 \end{pmatrix}"),
            (r"\begin{pmatrix}-1\\ 2\\ 0\end{pmatrix}",
             r"\begin{pmatrix} -1 \\[2pt] 2 \\ 0 \end{pmatrix}"),
            (r"\left(\begin{array}{cc}1&2\\3&4\end{array}\right)",
             r"\begin{pmatrix}1&2\\3&4\end{pmatrix}"),
            (r"\begin{pmatrix} a & b \\ c & d \end{pmatrix}",
             r"\begin{pmatrix}a&b\\c&d\end{pmatrix}"),
            (r"\begin{pmatrix}3\\4\\\end{pmatrix}", r"\begin{pmatrix}3\\4\end{pmatrix}"),
            (r"A=\begin{pmatrix}3\\4\end{pmatrix}", r"\begin{pmatrix}3\\ 4\end{pmatrix}"),
            (r"\begin{cases}x=1\\y=2\end{cases}", r"\begin{cases} x=1 \\ y=2 \end{cases}"),
        ],
        [
            (r"\begin{pmatrix}3\\4\end{pmatrix}", r"\begin{pmatrix}4\\3\end{pmatrix}"),
            (r"\begin{pmatrix}3\\4\end{pmatrix}", r"\begin{pmatrix}3&4\end{pmatrix}"),
            (r"\begin{pmatrix}3\\4\end{pmatrix}", r"\begin{pmatrix}34\end{pmatrix}"),
            (r"\begin{bmatrix}1&2\\3&4\end{bmatrix}", r"\begin{bmatrix}1&3\\2&4\end{bmatrix}"),
            (r"\begin{cases}x=1\\y=2\end{cases}", r"\begin{cases}x=2\\y=1\end{cases}"),
            (r"\begin{vmatrix}1&2\\3&4\end{vmatrix}", r"\begin{pmatrix}1&2\\3&4\end{pmatrix}"),
        ],
    ),
    "time of day": (
        [
            ("9:15 PM", "9:15 p.m."), (r"9:15\text{ PM}", "9:15 pm"),
            ("9:15PM", r"9{:}15\ \text{PM}"), ("09:15 AM", "9:15 a.m."), ("7:30 A.M.", "7:30 AM"),
            ("3 PM", "3:00 PM"), ("12:30 AM", "12:30 a.m."), (r"\text{9:15 PM}", "9:15 PM"),
            ("9:15", "9:15"), ("21:15", "21:15"),
        ],
        [
            ("9:15", "9:15 PM"), ("9:15 AM", "9:15 PM"), ("7:30", r"7:30\text{ a.m.}"),
            ("12:30 AM", "12:30 PM"), ("3 PM", "3"), ("3:00 PM", "3:30 PM"), ("9:15 PM", "8:15 PM"),
            ("11 AM", "11"), ("9:15", "9:16"),
        ],
    ),
    "mixed": (
        [
            (r"x = \frac{1}{2}", "0.5"), (r"\boxed{5}", "5"), (r"y=\frac{1}{x}", r"\frac{1}{x}=y"),
            (r"2 \times 3", "6"), (r"x=3 \text{ or } x=-3", r"\pm 3"), (r"x=\pm 3", "3,-3"),
            (r"x = -1 \pm \sqrt{2}", r"-1+\sqrt2, -1-\sqrt2"),
            (r"5\text{ cm}\times 3\text{ cm}", r"5\text{ cm}\times 3\text{ cm} "),
            ("1,000 km", "1000"), (r"\frac{3\sqrt{2}}{2}\text{ cm}", r"1.5\sqrt2"),
            (r"k=2,\ b=3", "b=3,k=2"), ("a = 1, b = -2, c = 3", "c=3, a=1, b=-2"),
            ("(2, 3)", r"\left(2,3\right)"), (r"\left\{1,2\right\}", r"\{2,1\}"),
            (r"x\in\mathbb{R}", r"x \in \mathbb{R}"), (r"\mathbb{R}", r"\mathbb{R}"),
            (r"12\%", "12"), (r"\frac{\sqrt 3}{2}", r"\frac{\sqrt{3}}{2}"),
            (r"-\infty < x < 3", r"3>x>-\infty"), ("1<x<2", "1 < x < 2"), ("2>x>1", "1<x<2"),
            (r"x\geq 3", r"3\leq x"), (r"\log_3{81}", "4"), (r"\lg 1000", "3"), (r"\ln(e^3)", "3"),
            (r"{10 \choose 3}", "120"), ("C_{10}^{3}", "C_{10}^3"), ("2^{10}", "1024"),
            (r"\sqrt[3]{27}", "3"), (r"\frac{1}{2}x+3", "x/2+3"), ("0.5x", "x/2"),
            ("n^2+n", "n(n+1)"), ("7 PM", "7:00 p.m."), (r"\text{7:00 PM}", "7 PM"),
            (r"\begin{bmatrix} 1 \\ 2 \end{bmatrix}", r"\begin{bmatrix}1\\2\end{bmatrix}"),
            ("x^2 + 4x + 4 = 0", "(x+2)^2=0"), (r"\text{no solution}", "no solution"),
            (r"3\frac{1}{2}\text{ hours}", "3.5"), (r"\$1{,}234.50", "1234.5"),
            (r"45^\circ", "45 degrees"), (r"\text{(A)}", "A"), (r"15\text{ mph}", "15"),
            (r"2.5 \times 10^{6} \text{ m/s}", "2500000"), (r"10^{-3}\,m", "0.001"),
            (r"4\pi r^2", r"4r^2\pi"), (r"\frac{4}{3}\pi r^3", r"4\pi r^3/3"),
            ("f(x) = 2x^2 - 3", "2x^2-3"), ("P(x)=x^3", "x^3"),
            (r"\frac{x^2-1}{x-1}", r"\frac{(x-1)(x+1)}{x-1}"), (r"\left[ -2, 5 \right)", "[-2,5)"),
            (r"x \in (-\infty, 2) \cup (3, \infty)", r"(-\infty,2)\cup(3,\infty)"),
            (r"\{2, 3\}", "2 and 3"), ("2 and 3", "3, 2"), (r"\dfrac{7}{3}", "7/3"),
            ("1.25", "5/4"), (r"\angle A = 60^\circ", "60"), (r"x=60^{\circ}", "60"),
            (r"10\sqrt{3}\approx 17.32", r"10\sqrt3"), (r"\approx 17.32", "17.32"),
            (r"3.14 \text{ (approximately)}", "3.14"),
            ("(x-2)^2+(y-3)^2=25", "(x-2)^2+(y-3)^2-25=0"), ("2x - 3y = 6", r"y=\frac{2}{3}x-2"),
            ("y-2=3(x-1)", "y=3x-1"), (r"\vec{a}=(1,2)", r"\vec{a} = (1, 2)"), ("xy=1", "1=xy"),
            (r"9\ \text{cm}", "9"), (r"60^\circ\text{ and }120^\circ", "120,60"),
            ("4:30 PM", r"4:30\,\text{PM}"), ("-x^2+3", "3-x^2"), (r"\frac{-3}{4}", r"-\frac34"),
            (r"\sin\theta", r"\sin(\theta)"), (r"2\cos^2 x-1", r"\cos 2x"),
            (r"1 - \cos^2 x", r"\sin^2 x"), ("e^{-x}", r"\frac{1}{e^x}"),
            (r"\ln x + C", r"C + \ln x"), ("x^2+C", "C+x^2"), (r"\tan^{-1}(1)", r"\pi/4"),
            ("1/2 + 1/3", "5/6"), ("3 + 4i", "4i+3"), (r"(3,\, 4)", "(3,4)"), (r"\sqrt{-4}", "2i"),
            ("|{-7}|", "7"), (r"\left|-7\right|", "7"), (r"y \leq 2x+1", r"2x+1 \geq y"),
            (r"\text{All real numbers}", "all real numbers"), ("9:05 a.m.", "9:05 AM"),
            ("23~456", "23456"), (r"5.0 \text{m}", "5"), ("m=2", "2"), (r"\text{5 cm}", "5"),
            (r"\frac{1}{3}\text{ of the total}", "1/3"), ("x_1=1, x_2=2", "x_2=2,x_1=1"),
            ("x_{1}=1", "x_1=1"),
        ],
        [
            ("x^2=9", "9"), ("y^2=4x", "4x"), ("a^2+b^2=c^2", "c^2"), ("x+2y=4", "4"),
            ("x=1,y=2", "x=2,y=1"), ("k=2,b=3", "k=3,b=2"), ("y=2x", "y=x/2"),
            (r"\frac{x^2}{9}-\frac{y^2}{16}=1", r"\frac{y^2}{16}-\frac{x^2}{9}=1"),
            ("1<x<2", "1<x<3"), ("x>1", "x<1"), (r"x \neq 1", "x=1"), (r"\text{no}", r"\text{yes}"),
            ("4:30 PM", "4:30 AM"), ("4:30", "4:30 PM"), ("2^{10}", "2^{11}"),
            (r"\log_2 3", r"\log_2 5"), ("(1,2)", "[1,2]"), ("[1,2)", "(1,2]"), ("5^2", "5"),
            (r"2\sqrt{3}", r"3\sqrt{2}"), ("ABC", "ACB"), ("x", "-x"), ("x^2", "x^3"),
            ("n!", "(n+1)!"), (r"\alpha", r"\beta"), (r"\sin x", r"\sin y"),
            (r"0.\overline{12}", "0.12"), (r"0.\overline{12}", r"0.1\overline{2}"),
            (r"12^\circ 30'", "12"),
            (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix}1\\3\end{pmatrix}"),
            ("10^{-3} m", "10^{3} m"), (r"5\sqrt2\approx 7.07", r"5\sqrt3 \approx 8.66"),
            ("1{,}234", "1.234"), ("3{,}5", "35"), ("x=2", "x=3"), (r"x\in[1,2]", r"x\in[1,3]"),
            ("2:3", "3:2"), ("12_3", "12_5"), ("f(x)=x", "f(x)=-x"), (r"-\frac{1}{2}", r"\frac12"),
            ("(x+1)^2", "x^2+1"), (r"\frac{a+b}{c}", r"a+\frac{b}{c}"),
            (r"\sqrt{a+b}", r"\sqrt a+\sqrt b"), (r"3 \text{ or } 5", "3"),
            (r"x=3 \text{ or } 5", "x=3"), (r"\ln 5", r"\log 5"), (r"\infty", r"-\infty"),
            (r"\{1,2\}", r"\{1,3\}"), (r"4\pi", "4"), ("e", "2.718"), ("2024!", "2023!"),
            (r"\binom{20}{10}", r"\binom{20}{9}"), ("y=|x|", "y=x"), ("a>b", "b>a"),
            ("x+y+z=1", "x+y-z=1"), ("x=y", "x=-y"),
        ],
    ),
}


def pairs_of(place):
    return [(kind, *pair) for kind, pairs in KINDS.items() for pair in pairs[place]]


@pytest.mark.parametrize("kind, one, other", pairs_of(0))
def test_one_answer_in_two_spellings(kind, one, other):
    assert same_answer(one, other) and same_answer(other, one)
    assert same_vote(one, other) and same_vote(other, one)


@pytest.mark.parametrize("kind, one, other", pairs_of(1))
def test_two_answers(kind, one, other):
    assert not same_answer(one, other) and not same_answer(other, one)
    assert not same_vote(one, other) and not same_vote(other, one)


BOXES = [
    (r"\boxed{57\ }", "57"), (r"\boxed{57\,}", "57"), (r"\boxed{ \frac12 \; }", r"\frac12"),
    (r"\boxed{5\\ }", "5\\\\"), (r"The roots are $\boxed{4}$ and $\boxed{7}$.", "4, 7"),
    (r"$x=\boxed{4}$, $y=\boxed{7}$", "4, 7"),
    (r"so \boxed{3}, \boxed{5}, and \boxed{7}.", "3, 5, 7"),
    (r"First, \boxed{3}. Then \boxed{4}", "4"), (r"\boxed{3}, but actually \boxed{4}", "4"),
    (r"\boxed{\frac{10}{4}} = \boxed{\frac52}", r"\frac52"), (r"\boxed{1/2} or \boxed{0.5}", "1/2"),
    (r"\boxed{5}<|im_end|><|im_start|>user x<|im_end|>\boxed{9}", "5"),
    (r"\boxed{5}<|eot_id|>\boxed{9}", "5"), (r"\boxed{5}<|endoftext|> Human: \boxed{9}", "5"),
    (r"\boxed{5}<｜end▁of▁sentence｜><｜User｜>\boxed{9}", "5"), (r"\boxed{5}<|return|>\boxed{9}", "5"),
    (r"\boxed{5}</s>[INST] \boxed{9}", "5"), (r"\boxed{5}<|end|><|user|>\boxed{9}", "5"),
    (r"\boxed{5}<end_of_turn>\boxed{9}", "5"), (r"<|im_end|>\boxed{9}", None),
    ("\\boxed{4}\n\nand \\boxed{7}", "7"),
    (r"She spends $\boxed{12}$, leaving her with $\boxed{30}$.", "30"),
    (r"m=\boxed{3} and n=\boxed{4}, and m+n=\boxed{7}", "7"),
    (r"He has \boxed{5} and the total is \boxed{9}", "9"),
    (r"A is \boxed{5}, and adding them we get \boxed{9}", "9"),
    (r"The cost is $\boxed{4}$ per item and $\boxed{20}$ in total.", "20"),
    (r"$x=\boxed{2}$, and $x^2=\boxed{4}$", "4"),
    (r"$x=\boxed{2}$, and the answer is $\boxed{4}$", "4"),
    (r"$x=\boxed{2}$ or $x=\boxed{3}$", "2, 3"), (r"$\boxed{4}$ and $\boxed{7}$", "4, 7"),
    (r"One is \boxed{4}, the other is \boxed{7}.", "4, 7"),
    (r"\(a_1=\boxed{4}\), \(a_2=\boxed{7}\)", "4, 7"), (r"**\boxed{4}** and **\boxed{7}**", "4, 7"),
    (r"$\boxed{4}\text{ cm}$ or $\boxed{7}\text{ cm}$", "4, 7"),
    (r"$\angle A=\boxed{40}^\circ$ and $\angle B=\boxed{70}^\circ$", "40, 70"),
    (r"each ate \(\boxed{4}\) crackers and \(\boxed{3}\) cakes.", "4, 3"),
    (r"It has $\boxed{4}$ apples, $\boxed{3}$ pears, and $\boxed{2}$ figs.", "4, 3, 2"),
    (r"$\boxed{4}$ pens and pays $\boxed{3}$", "3"), (r"$\boxed{4}$ each, $\boxed{12}$", "12"),
    (r"$\boxed{3}\text{ and }\boxed{5}$", "3, 5"),
    (r"\boxed{1}, \boxed{2}, and also \boxed{3}", "1, 2, 3"),
    (r"It is $\boxed 18$.", "18"), (r"\boxed 18", "18"), (r"\boxed18", "18"),
    (r"\boxed 1/2", "1/2"),
    (r"\boxed{5} or rather \boxed 6.", "6"), (r"\(\boxed -3.5\)", "-3.5"), (r"\boxed 2^{9}", None),
    (r"\boxed 3\pi", None), (r"put it in \boxed please", None),
]

LETTERS = [
    (r"\boxed{E: None of these}", "E"), (r"\boxed{C) 12}", "C"), (r"\boxed{(C) 12}", "C"),
    (r"\boxed{\text{C. A worm}}", "C"), (r"Answer: $\mathbf{C}$", "C"),
    ("Option D is correct", "D"), ("So option (B) is correct.", "B"),
    ("Therefore, (D) is the correct answer.", "D"), ("D is correct.", "D"),
    ("choice C is the right answer.", "C"), (r"\boxed{\textbf{(D)}\ 12}", "D"),
    (r"\boxed{\text{Option B}}", "B"), (r"\boxed{\mathrm{E}}", "E"), (r"Answer: $\text{B}$", "B"),
    (r"\boxed{\text{B}: 5}", "B"), ("**C) 12**", "C"), ("**Answer: C) 12**", "C"),
    ("Final Answer: The correct option is B", "B"), (r"The answer is $\mathbf{(B)}\ 7$.", "B"),
    (r"$\boxed{\textbf{(A) } 5}$", "A"), ("Thus, option **C** is the correct choice.", "C"),
    (r"Answer: \textbf{D}", "D"), (r"\boxed{D. 15}", "D"),
    ("Option A is the best answer because it fits.", "A"), ("Answer: A or D", None),
    ("Answer: A and C", None), ("Answer: A, D", None), ("Answer: (A) or (D)", None),
    (r"\boxed{A, C}", None), (r"\boxed{A \text{ or } B}", None), (r"\boxed{A} and \boxed{B}", None),
    ("The answer is A or B", None), ("Options A and D are correct", None),
    ("A and D is correct", None), ("Either A or D is correct", None), ("Answer: **A**/**B**", None),
    ("If option D is correct, then no", None), ("Option D is not correct", None),
    ("vitamin D is correct", None), ("Is option D is correct?", None),
    ("Option D is correct, but wait", None), ("A) 5\nB) 6\nD) 15 is too large.", None),
    ("Answer: A & B", None), ("ANSWER: B or C", None), (r"\boxed{C: 5, D: 6}", None),
    (r"\boxed{C_6H_6}", None), (r"\boxed{A+B}", None), (r"\boxed{12}", None),
    (r"\boxed{a good one}", None), (r"Answer: $\mathbf{A}$ or $\mathbf{B}$", None),
    ("Answer: A is wrong.\nThe correct choice is \\boxed{C}.", "C"),
    ("Answer: E=mc^2 so C\n\\boxed{C}", "C"), (r"Checking answer: B) is wrong ... \boxed{D}", "D"),
    ("Answer: A\nNo, it is \\boxed{C}", "C"), ("\\boxed{C}\nAnswer: A", "A"),
    ("Answer: C\nwhere x = \\boxed{5}", "C"), ("Answer: B\n\\boxed{A, C}", None),
    ("Answer: A is incorrect.\nThe correct answer is C.", "C"), ("Answer: B is not it", None),
    ("Answer: **B** is wrong", None), ("Answer: B\nAnswer: C is wrong", "B"),
    ("Answer: B\nThe answer: B isn't right. \\boxed{C}", "C"), ("Answer: E = mc^2", None),
    ("Answer: D is ruled out", None), ("Answer: C is correct", "C"), ("It is $\\boxed C$.", "C"),
    ("Answer: \\boxed{\\text{E}}", "E"), ("Answer: B\nso \\boxed{\\text{(D)}}", "D"),
    ("\\boxed A good one", None),
]


@pytest.mark.parametrize("text, expected", BOXES)
def test_what_boxes_hold(text, expected):
    assert extract_answer(text) == expected


@pytest.mark.parametrize("text, letter", LETTERS)
def test_which_letter_is_chosen(text, letter):
    assert extract_answer(text, "choice") == letter


# Repeated to the length at which an answer is still read, and far beyond it
HOSTILE = [
    r"\binom{9999}{4999}", r"\binom{5000}{2500}+", "2025!*", "2025!/2024!+", "2^{9999}", "9^{9^9}",
    "x^{999}+", "x^{999}*", r"\sin ", r"\sin x", r"\arctan 3+", "ln2", "e^", "e^{999}", "|x",
    "||x|", r"\sqrt{x}+", r"\sqrt[9]{2}+", "x+", "x=", "x<", "x,", "x=1,", "(x,y)=", r"\pm1",
    r"\pm", "1,234,", "1 234 ", r"\begin{pmatrix}", "1&", r"1\\", r"(1,2)\cup", r"\text{a}",
    "5 cm ", "cm/", "{", "}", "[", "(1,", "^2", "!", "°", r"0.\overline{3}+", r"\in", r"\approx",
    "9:15 ", "A or ", "and ", r"\frac1", r"\frac{1}{x}+", "i^", "(1+i)^{99}", "(1+i)^",
    r"\log_2 3+", r"\log_", r"\sin^2 ", "1e300", "9e999*", "1e-999+", "f(x)=", "{x=1}", "sinx",
    "sin(", "sqrt(", "1\\frac12", r"\tan 90°+", r"\binom{x}{2}", "7^{1/99}+", "(-8)^{1/3}+",
    "x^{x}+", "2^{x}*", r"\exp(", "½", "²", "10^{-3}m", "\\", "\\ ", " ", "\t", "٣",
    "D is correct ", "Answer: A or ", "<|im_end|", "~",
]


def quickly(function, *args):
    """What a call gives. It must take less than a quarter of a second of process time, as others
    may use the machine too; at one of three tries, as a collection of the whole run's garbage may
    fall into one."""
    for _ in range(3):
        readings_of.cache_clear()
        start = time.process_time()
        result = function(*args)
        seconds = time.process_time() - start
        if seconds < 0.25:
            return result
    raise AssertionError(f"{seconds:.2f} s: {str(args)[:200]}")


@pytest.mark.parametrize("piece", HOSTILE)
def test_hostile_pieces_take_a_quarter_of_a_second_at_most(piece):
    """No exception, whatever is repeated; process time, as others may use the machine too."""
    full = (piece * MAX_ANSWER)[:MAX_ANSWER]
    answers = [full, "x=" + full[:-2], "(" + full[:-2] + ")", full.rstrip("+*=,^ "), full[:99]]
    for answer in answers:
        for pair in ((answer, "7"), ("7", answer), (answer, "x+1.1234567890")):
            assert quickly(same_answer, *pair) in (True, False)
    many = piece * (100_000 // len(piece))
    boxes = (rf"\boxed{{{full[:60]}}} and " * 3000)
    for text in (many, rf"\boxed{{{many}}}", boxes, "Answer: " + many):
        for kind in ("math", "choice"):
            assert isinstance(quickly(extract_answer, text, kind), str | None)


@pytest.mark.parametrize("text", [
    "(" * 50_000 + "1" + ")" * 50_000, "{" * 100_000, "\\" * 100_000, "2^" * 50_000 + "2",
    r"\binom{10^{9}}{5\cdot 10^{8}}", r"\binom{10^{999}}{3}", r"\ln(10^{10^{10}})", r"\ln 0",
    r"\log_1 5", r"\log_0 0", r"\tan\frac{\pi}{2}", r"\sin(10^{5000})", "e^{e^{e^{e}}}",
    "i^{i^{i}}",
    "0^0", "0^{-1}", r"0^{\pi}", "(-1)!", r"(1/2)!", r"\sqrt[0]{2}", r"\sqrt[10^9]{2}", "1/0=2/0",
    "2^{2^{2^{2^{2^2}}}}", r"\cosh(10^{9})", r"\infty-\infty", r"0\cdot\infty", "(1,2)+(3,4)",
    r"\begin{pmatrix}", r"\begin{array}{", r"\end{pmatrix}", "x=" * 100, "\ud800", "\0", "=" * 400,
    r"1234567!", "9" * 400, "0." + "9" * 390, r"\arcsin(10^{4000})", r"|10^{4000}i|"])
def test_hostile_values_neither_raise_nor_take_long(text):
    for pair in ((text, "7"), ("7", text), (text, text + " "), ("x=" + text, text)):
        assert quickly(same_answer, *pair) in (True, False)
    assert not same_answer(text, "7")
