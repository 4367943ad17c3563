"""What is asked and what counts as right: problem records, prompts, answer extraction, grading, JSON lines.

The paper's protocol (appendix on prompts and evaluation) rests on one notion of "this path ended right": labels, avg@k
and votes all stand on `extract_answer` and `same_answer`. These read what a model wrote: no input may raise or hang.
"""
import cmath
import json
import math
import os
import operator
import re
from dataclasses import dataclass, field
from fractions import Fraction
from functools import lru_cache
from itertools import accumulate
from pathlib import Path

MAX_ANSWER = 400        # characters; a longer answer equals only itself, which bounds patterns and recursion
HUGE = 10 ** 300        # no larger number, numerator or denominator: 2^{99} is exact, 9^{9^9} refused unseen


@dataclass
class Problem:
    """One question. `options`: letter -> text, or None; `extra`: the record's other keys, kept."""
    id: str
    problem: str
    answer: str
    options: dict | None = None
    extra: dict = field(default_factory=dict)

    @property
    def kind(self):
        return "choice" if self.options else "math"


def _parse(raw, place):
    """bytes -> JSON value; ValueError in one line that begins with `place`."""
    try:
        return json.loads(raw.decode("utf-8-sig").rstrip())
    except (ValueError, RecursionError) as error:       # also: not UTF-8, a number or a nesting without end
        raise ValueError(f"{place}: not JSON: {str(error).replace('line 1 column', 'column')}") from None


def read_json(path):
    """The object in a JSON file. Raises ValueError naming the file."""
    try:
        content = _parse(Path(path).read_bytes(), path)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: found {type(content).__name__}, expected a JSON object")
    return content


def read_records(path):
    """Yield (line number, dict) for each non-blank line of a JSON-lines file; ValueError naming file:line otherwise."""
    with open(path, "rb") as file:
        for number, raw in enumerate(file, 1):
            if raw.strip():
                record = _parse(raw, f"{path}:{number}")
                if not isinstance(record, dict):
                    raise ValueError(f"{path}:{number}: found {type(record).__name__}, expected a JSON object")
                yield number, record


def open_for_append(path):
    """-> (complete records, file for more): go on where a killed writer stopped, no record lost, none twice.
    A half-written last line is cut off. Each written `json.dumps(record) + "\\n"` reaches the system at once."""
    Path(path).touch()
    with open(path, "rb+") as file:
        size, last = 0, b"\n"
        for last in file:
            size += len(last)
        if not last.endswith(b"\n"):
            try:
                _parse(last, path)
                file.write(b"\n")                       # killed between the record and its line end
            except ValueError:
                file.truncate(size - len(last))
    return [record for _, record in read_records(path)], open(path, "a", buffering=1, encoding="utf-8")


def write_atomic(path, data):
    """Put str or bytes at `path`, all or nothing: after a failure the old file is intact and no other is left."""
    data = data.encode() if isinstance(data, str) else data
    beside = Path(f"{path}.{os.getpid()}.{os.urandom(4).hex()}.tmp")
    try:
        with open(beside, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def read_problems(path):
    """list[Problem] from JSON lines or a JSON list. Keys: `problem` or `question`; `answer`, text or number; if wanted
    `id` (else `problem_idx`, else the position) and `options`, by letter or a list: the answer is then a letter.
    ValueError in one line: file and record, field, what was found, what was expected."""
    content = Path(path).read_bytes()
    if content.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"["):
        records = ((f"{path}: record {n}", record) for n, record in enumerate(_parse(content, path), 1))
    else:
        records = ((f"{path}:{n}", record) for n, record in read_records(path))
    problems = {}
    for place, record in records:
        def check(good, name, expected):
            if not good:
                found = json.dumps(record[name])[:60] if name in record else "nothing"
                raise ValueError(f"{place}: {name}: found {found}, expected {expected}")

        if not isinstance(record, dict):
            raise ValueError(f"{place}: found {type(record).__name__}, expected a JSON object")
        asked = "question" if "question" in record and "problem" not in record else "problem"
        text, answer, options = record.get(asked), record.get("answer"), record.get("options")
        check(isinstance(text, str) and text.strip(), asked, "the text of a `problem` or `question`")
        check(type(answer) in (str, int, float) and str(answer).strip(), "answer", "text or a number")
        answer = str(answer).strip()
        if isinstance(options, list):
            options = {chr(ord("A") + i): option for i, option in enumerate(options)}
        if options is not None:
            check(isinstance(options, dict) and options and set(options) <= set("ABCDEF"), "options", "letters A to F")
            check(answer in options, "answer", f"one of the letters {', '.join(options)}")
        key = "id" if "id" in record else "problem_idx"
        name = record.get(key, len(problems) + 1)
        check(type(name) in (str, int) and str(name) not in problems, key, "an id of its own, text or a whole number")
        extra = {k: v for k, v in record.items() if k not in (asked, "answer", "options", "id")}
        problems[str(name)] = Problem(str(name), text, answer, options, extra)
    if not problems:
        raise ValueError(f"{path}: found no record, expected JSON lines or a JSON list of problems")
    return list(problems.values())


def instruction(problem):
    """The user message of the paper's protocol. (A raw-text model is given `problem.problem`: the caller's choice.)"""
    if problem.kind == "math":
        return problem.problem + "\n\nPlease reason step by step, and put your final answer within \\boxed{}."
    options = "\n".join(f"{letter}. {text}" for letter, text in problem.options.items())
    return (f"{problem.problem}\n\n{options}\n\nPlease reason step by step, and give the letter of your choice "
            'in an answer field, for example "ANSWER": "C".')


_BRACE = re.compile(r"(\\(?:boxed|fbox)\s*)?\{|\}|\\[{}]")
_FIELD = re.compile(    # neither the start of a word or formula (C6H6, D'Alembert), nor the article in "answer: a good"
    r"(?i:answer)[^A-Za-z0-9:]{0,8}:[^A-Za-z0-9]{0,12}(?:(?i:boxed|text|textbf|option|choice)[^A-Za-z0-9]{1,6}){0,2}"
    r"([A-F]|[a-f](?! +[A-Za-z]))(?![A-Za-z0-9]|['’-][A-Za-z])")    # six: a later letter, I, is mostly prose


def extract_answer(text, kind="math", whole=False):
    r"""The answer in a response, as it was written, or None. Never raises; linear in the text.
    Thinking is cut: what follows the last `</think>` counts, or harmony's last `final` message; thinking without an end
    holds no answer. Without such marks all counts: if the prompt opened `<think>`, pass "<think>" + text. `whole` looks
    everywhere. "math": the last balanced \boxed{...} or \fbox{...}, with braces. "choice": the last `answer: letter`,
    else a boxed letter, else a letter alone on the last line; A to F in either case, quotes and brackets allowed."""
    if not isinstance(text, str):
        return None
    if "<|channel|>" in text and not whole:
        _, found, text = text.rpartition("<|channel|>final")
        text = re.split(r"<\|(?:end|return)\|>", text.partition("<|message|>")[2])[0] if found else ""
    elif not whole:
        text = text.rpartition("</think>")[2]
        text = "" if "<think>" in text else text
    text = re.sub(r"<[|｜][^<>\n]{0,40}[|｜]>|</s>", "", text).rstrip()  # <|im_end|> and its like
    box, begins, opened = None, -1, []                  # opened: where the box of each open brace begins; -1: no box
    first_box = re.search(r"\\(?:boxed|fbox)", text)
    for match in _BRACE.finditer(text, first_box.start()) if first_box else ():
        if match[0] == "}" and opened:
            begin = opened.pop()
            if begin > begins and text[begin:match.start()].strip():
                box, begins = text[begin:match.start()].strip(), begin
        elif match[0] == "{" or match[1]:
            opened.append(match.end() if match[1] else -1)
    if kind != "choice":
        return box
    fields = _FIELD.findall(text)
    return fields[-1].upper() if fields else _letter(box or "") or _letter(text.rpartition("\n")[2])


def _letter(text):
    r"""C of "C", "(c)", "**C**", "\textbf{(C)}"; else None."""
    match = re.fullmatch(r"(?:\\[A-Za-z]+|[\W_])*([A-Fa-f])[\W_]*", text[:100])
    return match and match[1].upper()


_REWRITES = [(re.compile(pattern), replacement) for pattern, replacement in (
    ("[−–]", "-"), ("[×·]", "*"), ("，", ","), ("π", r"\\pi "),
    (r"√\s*([0-9]+)", r"\\sqrt{\1}"), ("√", r"\\sqrt "),
    (r"\\!|\{,\}|\\?\$|\\[()\[\]]|\\(?:left|right|[bB]igg?[lr]?|displaystyle)(?![A-Za-z])", ""),
    (r"\\[,;: ]|~|\\q?quad|\s+", " "), (r"\\[dtc]frac", r"\\frac"),
    (r"\\?%|\^?\s*\{?\s*\\(?:circ|degree)(?![A-Za-z])\s*\}?|°", ""),
    (r",?\s*\\text\s*\{\s*(?:and|or)\s*\}|,? (?:and|or) ", ","),
    (r"([0-9)}!])\s*\\(?:text|mathrm|mbox)\s*\{(?!\s*[ie]\s*\})[^{}]*\}(?:\^\{?[0-9]\}?)?", r"\1"), # units
    (r"\\(?:text(?:bf|it|rm)?|math(?:bf|it|rm)|mbox|boxed|fbox)(?![A-Za-z])", ""),                  # their {...} stays
    (r"\\(frac|sqrt)\s*([0-9])", r"\\\1{\2}"), (r"(\\frac\s*\{[^{}]*\})\s*([0-9])", r"\1{\2}"), (r"\\([{}])", r"\1"),
    (r"(?<=[0-9)}])(?:\s*[cmk]m|(?:\s+[A-Za-z]{2,})+)(?:\^\{?[0-9]\}?)?(?=\s*(?:,|$))", ""),        # plain units
    (r"(?<![0-9.^])([0-9]+)\s*(\\frac\s*\{([0-9]+)\}\s*\{([0-9]+)\})",                              # mixed numbers
     lambda m: f"({m[1]}+{m[2]})" if int(m[3]) < int(m[4]) else m[0]))]
_THOUSANDS = re.compile(r"(?<![0-9.,(\[])[0-9]{1,3}(?:,[0-9]{3})+(?![0-9]|,[0-9])")
_TOKEN = re.compile(r"\\[A-Za-z]+|[0-9.](?:[0-9. ]*[0-9.])?(?:[eE][+-]?[0-9]{1,3}(?![0-9]))?|\S")   # "10 000" is none
_CLOSING = {"(": ")", "[": "]", "{": "}"}


def same_answer(answer, reference, kind="math"):
    r"""Whether an extracted answer equals the published one. Never raises; bounded work; None or blank equals nothing.
    "choice": the same letter. "math": rationals compare exactly, other numbers to a relative 1e-9, the rest as text.
    Units, percent and degree signs are dropped (50\% is 50); the right side of the last `=` counts; \pm gives two.
    A comma list, bare or in braces, is a multiset; a reference in ( ) or [ ] (point, interval) fixes the order too, and
    the brackets if the answer has some. `1,234` may be one number or two. A whole number before a proper fraction is a
    mixed number: 1\frac{1}{2} is 3/2, but 2\frac{5}{3} is 10/3. 1e-3 is 0.001; any other e is Euler's."""
    answer, reference = (str(x).strip() if isinstance(x, (str, float)) or isinstance(x, int) and abs(x) < HUGE else ""
                         for x in (answer, reference))
    if kind == "choice":
        return _letter(answer) is not None and _letter(answer) == _letter(reference)
    if answer == reference or max(len(answer), len(reference)) > MAX_ANSWER:
        return answer == reference != ""
    return any(b != "" and _same(a, b) for a in _readings(answer) for b in _readings(reference))


@lru_cache(maxsize=4096)                                # a vote compares the same few answers again and again
def _readings(text):
    """The values that `text` may stand for: its commas read as thousands separators, and not."""
    for pattern, replacement in _REWRITES:
        text = pattern.sub(replacement, text)
    text = text.rstrip(" .,;")
    return [_value(t) for t in {text, _THOUSANDS.sub(lambda match: match[0].replace(",", ""), text)} if t]


def _same(a, b):
    """Equality of two values; of two lists, b says whether order counts."""
    if isinstance(a, tuple) and isinstance(b, tuple):
        (fence, left), (fixed, right) = a, b
        if len(left) != len(right) or (fence and fixed and fence != fixed):
            return False
        if fixed:
            return all(map(_same, left, right))
        return all(sum(_same(y, x) for y in left) == sum(_same(y, x) for y in right) for x in right)    # multisets
    if isinstance(a, (str, tuple)) or isinstance(b, (str, tuple)) or complex not in (type(a), type(b)):
        return a == b
    return cmath.isclose(a, b, rel_tol=1e-9)


def _value(text, fence=""):
    """Normalised text -> Fraction or complex; (fence, values) for a list, fence "" or its brackets; else str."""
    text = text.strip()
    depths = list(accumulate((c in "([{") - (c in ")]}") for c in text))
    if text and text[0] in _CLOSING and 0 not in depths[:-1] and depths[-1] == 0:       # brackets around everything
        return _value(text[1:-1], text[0] + text[-1])
    commas = [i for i, c in enumerate(text) if c == "," and depths[i] == 0]
    if "=" in text and not commas:
        return _value(text.rpartition("=")[2])
    pieces = [text[i + 1:j] for i, j in zip([-1] + commas, commas + [len(text)])]
    pieces = [piece.replace(r"\pm", sign) for piece in pieces for sign in ("+-" if r"\pm" in piece else "+")]
    if len(pieces) > 1:
        return "" if fence == "{}" else fence, [_value(piece) for piece in pieces]
    try:
        return _evaluate(text)
    except (ValueError, ArithmeticError, IndexError):
        text = re.sub(r"\{(\w)\}", r"\1", re.sub(r"(?<![0-9]) | (?![0-9])", "", text))
        return text.casefold() if text.isalpha() else text


def _power(base, exponent):
    """Exact if the exponent is whole; an odd root of a negative number is the real one."""
    if isinstance(base, Fraction) and isinstance(exponent, Fraction):
        if exponent.denominator == 1:
            if (max(abs(base.numerator), base.denominator).bit_length() - 1) * abs(exponent) > HUGE.bit_length():
                raise OverflowError("too large")
            return base ** int(exponent)
        if base < 0 and exponent.denominator % 2:
            return (-1) ** exponent.numerator * complex(-base) ** complex(exponent)
    return complex(base) ** complex(exponent)


_CONSTANTS = {r"\pi": complex(math.pi), "i": 1j, "e": complex(math.e)}
_OPERATORS = dict.fromkeys(("*", r"\cdot", r"\times"), (2, operator.mul)) | dict.fromkeys(")]}", (0, None)) | {
    "+": (1, operator.add), "-": (1, operator.sub), "/": (2, operator.truediv), r"\div": (2, operator.truediv),
    "^": (4, _power), "!": (5, lambda n: Fraction(math.factorial(range(171).index(n))))}     # or ValueError


def _evaluate(text):
    r"""The number a LaTeX expression stands for: a Fraction while all of it is rational, else a finite complex.
    + - * / ^ !, products without a sign (left to right with /: 1/2\pi is half of pi), brackets, \frac, \sqrt[n], \pi,
    i, e. ValueError, ArithmeticError or IndexError for anything else and for what is too large."""
    tokens = _TOKEN.findall(text)[::-1]                 # a stack

    def read(rank):
        """The value of what comes next and binds as tightly as `rank` or tighter; rank 9: the argument of a macro."""
        token = tokens.pop()
        if token in _CLOSING:
            value = read(1)
            if tokens.pop() != _CLOSING[token]:
                raise ValueError("brackets do not match")
        elif token in ("+", "-"):
            value = read(3) * (1 if token == "+" else -1)
        elif token == r"\frac":
            value = read(9) / read(9)
        elif token == r"\sqrt":
            index = read(9) if tokens[-1] == "[" else Fraction(2)
            value = _power(read(9), 1 / index)
        elif token in _CONSTANTS:
            value = _CONSTANTS[token]
        else:                                           # nine decimals are a rounded number, fewer an exact one
            value = Fraction(token) if len(token.partition(".")[2]) < 9 else complex(float(token))
        while True:
            if not abs(value) < HUGE or getattr(value, "denominator", 1) > HUGE:
                raise OverflowError("too large")
            sign = tokens[-1] if tokens else ")"
            strength, apply = _OPERATORS.get(sign, (2, operator.mul))   # no sign: a product
            if strength < rank:
                return value
            if sign in _OPERATORS:
                tokens.pop()
            value = apply(value) if sign == "!" else apply(value, read(strength + (sign != "^")))   # a^b^c is a^(b^c)

    value = read(1)
    if tokens:
        raise ValueError("a bracket too many")
    return value
