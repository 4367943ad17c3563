"""Problem files (JSON lines, a JSON list, CSV, or a data set of the Hub), read as lists of Problem.

Data and prompts are the paper's: it trains on AIME 1983-2023 and on GPQA without its Diamond part.
No data belong to this project; users name their own. What differs from set to set is converted at
the edge, so that one format is read inside:

    {"problem": "Which?", "answer": "B", "id": "7", "options": {"A": "this", "B": "that"}}

Looked up, not run: every script reads its --data and --test through here.
"""
import csv
import io
import json
import math
import random
import re
from dataclasses import dataclass
from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import GatedRepoError, HTTPError

from plumbing.answers import extract_answer
from plumbing.files import embedded, foreign_format, read_bytes
from plumbing.records import read_json, read_records

LETTERS = "ABCDEF"  # ZebraLogic has six options
LAST_TRAINING_YEAR = 2023  # of AIME: the paper trains on 1983 to 2023 and tests on the years after
AIME_COLUMNS = {"year", "problem number", "part"}  # of AIME_1983_2024, which holds both
# The files of the sets that hold more than one that we read.
HUB_FILES = {
    "Idavidrein/gpqa": ["gpqa_diamond.csv"],
    "opencompass/AIME2025": ["*-I.jsonl", "*-II.jsonl"],
}
ANY_FILE = ["*.[cj]s[vo]*"]  # .csv, .json, .jsonl
PARQUET = (
    "parquet needs converting to JSON lines first (aime_2024, aime_2025, brumo_2025, hmmt_25 and "
    "zebralogic_hard are JSON files in data/benchmark of github.com/bijiaxihh/STOP)"
)
# A reference of more characters or plain words than this is a worked solution.
LONGEST_ANSWER = 300
MOST_WORDS = 20
# The paper's sentences, word for word.
ASK_FOR_BOX = "Please reason step by step, and put your final answer within \\boxed{}."
ASK_FOR_LETTER = (
    "Please show your choice in the answer field with only the choice letter, "
    'e.g., "ANSWER": "C".'
)


@dataclass
class Problem:
    """One question. `answer`: the right one; None where it is not known. `options`: letter -> text
    where the answer is a letter (empty: they stand in the question's own text), else None."""

    id: str
    problem: str
    answer: str | None
    options: dict | None = None

    @property
    def kind(self):
        """Which of the kinds of plumbing.answers it is: "choice" where the answer is a letter, else
        "math"."""
        return "math" if self.options is None else "choice"


def instruction(problem):
    """The paper's user message (appendix C.3). A raw-text model gets `problem.problem` alone."""
    if problem.kind == "math":
        return f"{problem.problem}\n\n{ASK_FOR_BOX}"
    options = "\n".join(f"{letter}. {text}" for letter, text in problem.options.items())
    parts = [problem.problem, options, ASK_FOR_LETTER]
    return "\n\n".join(part for part in parts if part)


def read_problems(path, with_answers=True):
    """The problems of one source, in its order, as list[Problem].

    path: a JSON list, JSON lines or CSV file, or hf:owner/dataset or hf:owner/dataset/file (Hub).
    Keys, in either case: `problem` or `question` (behind the `body` of SVAMP and ASDiv, where there
    is one); `answer`, text or a number; if wanted `id` (else `record id`, `problem_idx`, the
    position from 1) and `options` or `choices`, by letter or a list: the answer is then a letter,
    which may stand under `correct` (AQuA). GPQA's four answers are shuffled, always the same way.
    Of a worked solution the answer is what stands behind GSM8K's last `####`, or in the last box;
    without an `answer` it is the box of the `solution` (MATH). with_answers: whether each record
    must have one; else the answer of one without is None.
    ValueError in one line names file, record and key.
    """
    try:
        return _read_source(str(path), with_answers)
    except OSError as error:
        raise ValueError(f"{_on_one_line(str(path))}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise ValueError(_on_one_line(str(error))) from None


def read_sources(paths):
    """The problems of several sources, one source after another, as list[Problem] with unique ids.

    paths: a list, or text with commas between the sources. Ids stay as they are unless two sources
    share one. Then every id becomes NAME/ID, where NAME is the source's file (without its suffix)
    or data set; if two names are the same, positions come before them: 1-train/7, 2-train/7.
    """
    if isinstance(paths, str):
        paths = [path.strip() for path in paths.split(",") if path.strip()]
    elif isinstance(paths, Path):
        paths = [paths]
    if not paths:
        raise ValueError("data: found no source, expected a file or hf:owner/dataset")
    sources = [read_problems(path) for path in paths]
    problems = []
    for source in sources:
        problems.extend(source)
    ids = {problem.id for problem in problems}
    if len(ids) < len(problems):
        for name, source in zip(_names(paths), sources):
            for problem in source:
                problem.id = f"{name}/{problem.id}"
    return problems


def _names(paths):
    """A name for each source, no two the same."""
    names = [Path(path).stem for path in paths]
    if len(set(names)) == len(names):
        return names
    return [f"{position}-{name}" for position, name in enumerate(names, 1)]


def without_held_out(problems, tests):
    """(the problems to train on, those dropped because their text is that of a held-out problem).

    White space, letter case and TeX's marks of mathematics ($, \\(, {, ...) make no difference
    between two texts.
    """
    held_out = {_folded(test) for test in tests}
    kept = []
    dropped = []
    for problem in problems:
        group = dropped if _folded(problem) in held_out else kept
        group.append(problem)
    return kept, dropped


def without_repeats(problems):
    """(the problems, those dropped because an earlier one has the same text and options): of two
    equal ones one might be trained on and the other held out for validation."""
    kept = {}
    dropped = []
    for problem in problems:
        options = problem.options or {}
        asked = (_folded(problem), *sorted(options.items()))
        if kept.setdefault(asked, problem) is not problem:
            dropped.append(problem)
    return list(kept.values()), dropped


def _folded(problem):
    return re.sub(r"\s|\$|\\[()\[\],;!]|[{}]", "", problem.problem).casefold()


# One source: its files, their records, the conversions of the sets that need one


def _read_source(path, with_answers):
    on_hub = path.startswith("hf:")
    files = _fetch(path.removeprefix("hf:")) if on_hub else [embedded(path)]
    problems = {}
    for file in files:
        for place, record in _records(file):
            record = _lower_case_keys(place, record)
            if AIME_COLUMNS <= record.keys() and _is_after_training(place, record):
                continue
            if "correct answer" in record:
                record = _from_gpqa(place, record)
            problem = _problem(place, record, len(problems) + 1, problems, with_answers)
            problems[problem.id] = problem
    if not problems:
        raise ValueError(f"{path}: found no record, expected JSON lines or a JSON list of problems")
    return list(problems.values())


def _fetch(name):
    """Paths of the problem files of owner/dataset, or of owner/dataset/file, fetched or cached."""
    repo = "/".join(name.split("/")[:2])
    file = name.removeprefix(repo).strip("/")
    patterns = [file] if file else HUB_FILES.get(repo, ANY_FILE)
    try:
        folder = huggingface_hub.snapshot_download(
            repo, repo_type="dataset", allow_patterns=patterns)
        files = []
        for pattern in patterns:
            files.extend(Path(folder).rglob(pattern))
        files = [file for file in files if file.suffix != ".parquet"]
        if len(files) == len(patterns):
            return files
        in_repo = list(huggingface_hub.list_repo_files(repo, repo_type="dataset"))
    except GatedRepoError:
        reason = "access is gated"
    except (HTTPError, OSError, ValueError) as error:
        reason = (str(error) or repr(error)).splitlines()[0]
    else:
        raise ValueError(f"hf:{name}: {_what_is_wrong_with(in_repo, repo)}")
    raise ValueError(
        f"hf:{name}: not cached, and not fetched: {reason} (gated: accept its terms at "
        f"https://huggingface.co/datasets/{repo}, then `hf auth login`; offline: connect once)"
    )


def _what_is_wrong_with(in_repo, repo):
    """Why the files of a data set are not read, and what to do."""
    found = _cut(", ".join(in_repo), 200)
    expected = f"one file of CSV, JSON or JSON lines, or hf:{repo}/FILE to choose one"
    message = f"found {found}; expected {expected}"
    if any(file.endswith(".parquet") for file in in_repo):
        message += f"; {PARQUET}"
    return message


def _records(path):
    """Yield (place, record) of a CSV file with a header, a JSON list or JSON lines.

    A place is "FILE:LINE" or "FILE: record NUMBER".
    """
    content = read_bytes(path)
    foreign = foreign_format(content)
    if foreign is not None:
        raise ValueError(f"{path}: {foreign}")
    if str(path).lower().endswith(".csv"):
        records = _csv_rows(path, content)
    elif content.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"["):
        records = read_json(path, content, list)
    else:
        for line, record in read_records(path):
            yield f"{path}:{line}", record
        return
    for number, record in enumerate(records, 1):
        yield f"{path}: record {number}", record


def _csv_rows(path, content):
    """The rows of a CSV file as dicts. ValueError where one has more cells than the header, or
    where a name stands twice in that."""
    try:
        text = content.decode("utf-8-sig")
        if "\0" in text:  # newer versions of Python read it
            raise csv.Error("it contains NUL")
        file = io.StringIO(text, newline="")
        reader = csv.DictReader(file, restkey="surplus", strict=True)
        rows = list(reader)
        header = reader.fieldnames or []
    except (UnicodeError, csv.Error) as error:
        raise ValueError(f"{path}: not CSV: {error}") from None
    if len(header) == 1 and re.search("[;|]", header[0]):
        raise ValueError(f"{path}: found the header {_cut(repr(header[0]), 60)}, expected commas "
                         "between the cells: write it as CSV with commas")
    for name in header:
        if header.count(name) > 1:
            raise ValueError(f"{path}: {_cut(name, 60)}: found this column twice, expected it once")
    for number, row in enumerate(rows, 1):
        place = f"{path}: record {number}"
        _expect("surplus" not in row, place, row, "surplus", "a cell for each name in the header")
    return rows


def _lower_case_keys(place, record):
    """The record with its keys in lower case."""
    if not isinstance(record, dict):
        raise ValueError(f"{place}: found {type(record).__name__}, expected a JSON object")
    lower = {}
    for key, value in record.items():
        if key.lower() in lower:
            raise ValueError(f"{place}: {_cut(key, 60)}: found this key twice, in upper and lower "
                             "case, expected it once")
        lower[key.lower()] = value
    return lower


def _is_after_training(place, record):
    """Whether a record of AIME_1983_2024 is of a year that the paper tests on."""
    year = str(record.get("year"))
    _expect(re.fullmatch("[0-9]{4}", year), place, record, "year", "a year")
    return int(year) > LAST_TRAINING_YEAR


def _from_gpqa(place, record):
    """A record of GPQA with `options`, its four answers shuffled, and the right one's letter."""
    _, question = _question(place, record)
    keys = ["correct answer", "incorrect answer 1", "incorrect answer 2", "incorrect answer 3"]
    texts = [record.get(key) for key in keys]
    _expect(all(texts), place, record, "correct answer", "this and three `incorrect answer`s")
    order = random.Random(question).sample(range(4), 4)  # whatever else is in the file
    options = {letter: str(texts[n]).strip() for letter, n in zip(LETTERS, order)}
    return {**record, "options": options, "answer": LETTERS[order.index(0)]}


# One record


def _problem(place, record, position, taken, with_answers):
    """The Problem of a record. `position` stands for a missing id, `taken` holds the ids before."""
    key, question = _question(place, record)
    options = _options(place, record)
    answer = _answer(place, record, options, with_answers)
    name = _id(place, record, position, taken)
    _expect_unicode(place, key, question)
    _expect_unicode(place, "answer", answer or "")
    _expect_unicode(place, "id", name)
    for text in (options or {}).values():
        _expect_unicode(place, "options", str(text))
    return Problem(name, question, answer, options)


def _question(place, record):
    """(its key, the question)."""
    key = _first_of(record, "problem", "question", "question_concat")
    text = record.get(key)
    good = isinstance(text, str) and text.strip()
    _expect(good, place, record, key, "the text of a `problem` or `question`")
    if key == "question" and "body" in record:  # SVAMP: the story, and what is asked about it
        body = record["body"]
        _expect(isinstance(body, str) and body.strip(), place, record, "body", "the story's text")
        text = f"{body.strip()} {text.strip()}"
    return key, text


def _first_of(record, *keys):
    """The first of some keys that a record holds; if none, the first."""
    return next((key for key in keys if key in record), keys[0])


def _options(place, record):
    """The options as {letter: text}, or None."""
    key = _first_of(record, "options", "choices")
    options = record.get(key)
    if options is None:
        return None
    if isinstance(options, list) and len(options) <= len(LETTERS):
        options = dict(zip(LETTERS, _without_letters(options)))
    good = isinstance(options, dict) and options and set(options) <= set(LETTERS)
    _expect(good, place, record, key, f"letters {LETTERS[0]} to {LETTERS[-1]}")
    return options


def _without_letters(options):
    """A list of options, without their letters where all have theirs: AQuA's "A)21"."""
    texts = []
    for letter, option in zip(LETTERS, options):
        match = re.fullmatch(rf"\s*\(?{letter}[).:]\s*(\S.*)", str(option), re.DOTALL)
        if match is None:
            return options
        texts.append(match[1])
    return texts


def _answer(place, record, options, with_answers):
    """The answer as text; a letter where there are options. None where there is none, if that may
    be."""
    key = _first_of(record, "answer", "solution" if options is None else "correct")
    value = record.get(key)
    if value is None and not with_answers:
        return None
    good = type(value) in (str, int, float) and str(value).strip()  # bool is no number here
    _expect(good, place, record, key, "text or a number")
    if isinstance(value, float):
        _expect(math.isfinite(value), place, record, key, "a finite number")
        value = int(value) if value.is_integer() else value  # SVAMP's 51.0
    answer = str(value).strip()
    if options is not None:
        letters = ", ".join(options)
        _expect(answer in options, place, record, key, f"one of the letters {letters}")
        return answer
    if key == "solution" or re.search(r"####|\\f?boxed", answer):
        answer = _final_answer(answer)
        expected = "one with its final answer in \\boxed{}, or behind ####, or a key `answer`"
        _expect(answer, place, record, key, expected)
    if "body" in record:
        answer = _without_units(answer)
    expected = (
        f"the final answer alone: on one line, of at most {LONGEST_ANSWER} characters and "
        f"{MOST_WORDS} words (or a solution with it in \\boxed{{}}, or behind ####)")
    _expect(not _is_solution(answer), place, record, key, expected)
    return answer


def _final_answer(solution):
    """What stands behind the last #### of a worked solution (GSM8K), or in its last box (MATH), or
    None."""
    if "####" in solution:
        return _plain_number(solution.rpartition("####")[2].strip())
    box = extract_answer(solution, whole=True)
    unbraced = re.findall(r"\\boxed +([^\s{}$]+)\$", solution)  # some of MATH's: $\boxed 2$
    return unbraced[-1] if box is None and unbraced else box


def _plain_number(text):
    """1,200 and $18 as a number alone; any other text as it is."""
    match = re.fullmatch(r"\\?\$?(-?)\\?\$? ?(\d{1,3}(?:,\d{3})+|\d+)(\.\d+)?", text)
    return match[1] + match[2].replace(",", "") + (match[3] or "") if match else text


def _without_units(answer):
    """ASDiv's answers without the units behind them: "9 (apples); 4 (pears)" -> "9, 4"."""
    parts = re.split(r"\s*;\s*", answer)
    return ", ".join(re.sub(r"\s+\([^()\d]+\)$", "", part) for part in parts)


def _is_solution(answer):
    """Whether an answer is a worked solution, which no answer of a model will equal."""
    lines = [line for line in answer.splitlines() if line.strip()]
    words = re.findall(r"(?<![\\A-Za-z])[A-Za-z]{2,}", answer)
    is_long = len(answer) > LONGEST_ANSWER or len(words) > MOST_WORDS
    is_matrix = "\\begin{" in answer
    return is_long or len(lines) > 1 and not is_matrix or re.search("<<.*=.*>>", answer) is not None


def _id(place, record, position, taken):
    """The id of a record, or its position, as text."""
    key = "problem_idx"
    for other in ("record id", "id"):
        if other in record:
            key = other
    name = record.get(key, position)
    good = type(name) in (str, int) and str(name) not in taken
    _expect(good, place, record, key, "an id of its own, text or a whole number")
    return str(name)


def _expect(good, place, record, key, expected):
    """ValueError naming the place, the key and what was found there, unless good."""
    if not good:
        found = _cut(json.dumps(record[key]), 60) if key in record else "nothing"
        raise ValueError(f"{place}: {key}: found {found}, expected {expected}")


def _expect_unicode(place, key, text):
    """ValueError where a text holds half a surrogate pair, which no tokenizer or file takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        found = f"a lone surrogate at character {error.start + 1}"
        raise ValueError(f"{place}: {key}: found {found}, expected Unicode text") from None


def _cut(text, length):
    return text if len(text) <= length else text[:length] + "..."


def _on_one_line(text):
    """The text with line ends and other unprintable characters escaped."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
