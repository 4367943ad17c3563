"""Prefixes in JSON lines, with or without soft labels: ours, and the authors' released records.

    {"prefix_token_ids": [...], "soft_label": 0.25, "id": "17"}

`prefix_token_ids` is prompt + prefix. Two uses: to train on (section 4), and to be scored.
"""
import dataclasses

from plumbing.checkpoint import shorten
from plumbing.records import read_records

# ours, then the authors'
LABEL_KEYS = ("soft_label", "Soft_label", "good_probability", "label_prob", "score")


@dataclasses.dataclass
class LabelledPrefix:
    """One prefix and what is known of it."""
    ids: list              # prompt + prefix
    label: float | None    # share of its continuations that end right
    problem: str | None    # `id` or `problem_id`: which problem it belongs to
    checkpoint: int | None # where its path was cut, in new tokens; None: not said
    line: int              # of its file


def read_prefixes(file, check):
    """The LabelledPrefix of each line of a file. check(ids) raises ValueError on ids that the
    model cannot read. Raises ValueError naming file and line, also where the file holds none."""
    found = []
    for line, record in read_records(file):
        place = f"{file}:{line}"
        ids = record.get("prefix_token_ids")
        if not isinstance(ids, list) or not all(type(token) is int for token in ids):
            raise ValueError(
                f"{place}: prefix_token_ids: found {shorten(ids)}, expected a list of token ids")
        try:
            check(ids)
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from None
        problem = _read_problem(record, place)
        label = _read_label(record, place)
        checkpoint = record.get("checkpoint")
        is_length = type(checkpoint) is int and 1 <= checkpoint < 2 ** 31
        if checkpoint is not None and not is_length:
            raise ValueError(
                f"{place}: checkpoint: found {shorten(checkpoint)}, expected a positive integer")
        found.append(LabelledPrefix(ids, label, problem, checkpoint, line))
    if not found:
        raise ValueError(f"{file}: found no record, expected JSON lines with prefix_token_ids")
    return found


def _read_problem(record, place):
    """Which problem a record belongs to, as text, or None."""
    for key in ("id", "problem_id"):
        problem = record.get(key)
        if problem is not None:
            if type(problem) not in (int, str):
                raise ValueError(
                    f"{place}: {key}: found {shorten(problem)}, expected a text or a whole number")
            return str(problem)
    return None


def _read_label(record, place):
    """The soft label of a record under any of its names, or None."""
    for key in LABEL_KEYS:
        if key in record:
            label = record[key]
            if type(label) not in (int, float) or not 0 <= label <= 1:
                raise ValueError(
                    f"{place}: {key}: found {shorten(label)}, expected a number in [0, 1]")
            return float(label)
    return None
