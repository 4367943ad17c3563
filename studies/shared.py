"""What several studies share: flags, a model with its STOP and its judge, and stored paths.

No study itself, and not run: attention.py, overhead.py, scaling.py, guideline.py, judge.py and
ablations.py import it. Letters: n paths a problem are stored, N of them are launched.
"""
import collections
import csv
import dataclasses
import io
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np

from commands.common import open_model, stop_folder
from engine.stored import model_digest, sample_paths
from model import Decoder
from plumbing.answers import same_vote
from plumbing.checkpoint import find_folder
from plumbing.command_line import Common, option, require_positive, shown
from plumbing.files import require_target
from plumbing.problems import read_problems
from plumbing.progress import progress
from plumbing.records import locked, read_json, write_atomic
from plumbing.tokenizer import Tokenizer
from sample import sampling_of
from stop import Stop


def require(name, fits, found, expected):
    """ValueError unless a setting fits."""
    if not fits:
        raise ValueError(f"{name}: found {shown(found)}, expected {expected}")


def numbers(name, text, kind=int):
    """The positive numbers in a flag's text, with commas between: a list of `kind`. None is so
    large that no run could be meant (2^31 of a whole number, 2^53 of another)."""
    pattern = r"\d{1,10}" if kind is int else r"[\d.]{1,20}(e[+-]?\d{1,3})?"
    most = 2 ** 31 if kind is int else 2 ** 53
    found = []
    for part in text.split(","):
        fits = re.fullmatch(pattern, part, re.ASCII) and part.count(".") <= 1 and part != "."
        found.append(kind(part) if fits else 0)
    positive = all(0 < number < most for number in found)
    require(name, positive, text, f"positive numbers below {most} with commas")
    return found


def read_seeds(text):
    """The different seeds in a flag's text."""
    fits = re.fullmatch(r"\d{1,9}(,\d{1,9})*", text, re.ASCII)
    require("seeds", fits, text, "whole numbers of at most 9 digits, as in 0,1,2")
    seeds = [int(seed) for seed in text.split(",")]
    require("seeds", len(set(seeds)) == len(seeds), text, "each seed once")
    return seeds


def labels_file(settings):
    """The labels of --labels, or those of train.py's run of this model."""
    run = Path("runs") / Path(settings.model).name
    return Path(settings.labels or run / "labels.jsonl")


# A model with its STOP and judge


@dataclasses.dataclass(kw_only=True)
class StopSettings(Common):
    """Flags of a study of a trained STOP."""
    stop: str | None = option(
        None, "folder of the trained STOP (default: stop/ in the model's directory)")
    data: str | None = option(None, "problems (default: test.jsonl in the model's directory)")


def load_stop(settings, model):
    """The Stop of --stop, or the one in the model's directory."""
    return Stop.load(stop_folder(settings), model)


def load_problems(settings):
    """The problems of --data, or those in the model's directory."""
    source = settings.data or find_folder(settings.model) / "test.jsonl"
    problems = read_problems(source)
    if not problems:
        raise ValueError(f"{source}: found no problem, expected at least 1")
    return problems


def load_judge(settings):
    """(Decoder, Tokenizer) of --judge, or of judge/ in the model's directory; None without both."""
    path = settings.judge
    beside = find_folder(settings.model) / "judge"
    if path is None and beside.is_dir():
        path = str(beside)
    if path is None:
        return None
    return open_model(dataclasses.replace(settings, model=path, chat_format=None))


# The ceiling


class Ceilings(NamedTuple):
    """What a ceiling.json of studies/ceiling.py says."""
    reached: dict  # (checkpoint, launched, kept) -> the avg that any score could reach
    random: dict   # checkpoint -> the avg of keeping at random


def read_ceilings(file, model):
    """The Ceilings in a file. ValueError where it is broken, or was made of another model."""
    content = read_json(file)
    expected = model_digest(model)
    if content.get("model") != expected:
        raise ValueError(
            f"{file}: model: found {shown(content.get('model'))}, expected {expected!r}: it was "
            "made of another model's paths; run studies/ceiling.py again")
    reached = {}
    for place, record in _records(file, content, "ceilings"):
        key = tuple(_count(place, record, name) for name in ("checkpoint", "launched", "kept"))
        reached[key] = _share(f"{place}: avg", record.get("avg"))
    random = {}
    for place, record in _records(file, content, "rows"):
        interval = record.get("random")
        fits = isinstance(interval, list) and len(interval) == 3
        require(f"{place}: random", fits, interval, "a mean and its interval")
        checkpoint = _count(place, record, "checkpoint")
        random[checkpoint] = _share(f"{place}: random", interval[0])
    return Ceilings(reached, random)


def _records(file, content, key):
    """Yield (place, dict) of each record in a list of a JSON file's content."""
    records = content.get(key)
    require(f"{file}: {key}", isinstance(records, list) and records, records, "a list of records")
    for number, record in enumerate(records):
        place = f"{file}: {key}[{number}]"
        require(place, isinstance(record, dict), record, "a JSON object")
        yield place, record


def _count(place, record, name):
    """A positive integer in a record."""
    value = record.get(name)
    fits = type(value) is int and 1 <= value < 2 ** 31
    require(f"{place}: {name}", fits, value, "a positive integer of 32 bits")
    return value


def _share(place, value):
    """A share that stands somewhere, as a float."""
    fits = type(value) in (int, float) and 0 <= value <= 1
    require(place, fits, value, "a share in [0, 1]")
    return float(value)


# Stored paths


@dataclasses.dataclass(kw_only=True)
class StoredSettings(StopSettings):
    """Flags of a study on stored paths."""
    stored: str = option(
        "runs/eval", "folder of the stored paths: eval.py's, or they are sampled into it")
    problems: int | None = option(None, "only the first so many problems")
    n: int = option(64, "paths a problem")
    prefixes: str | None = option(
        None, "checkpoints, as in 512,1024 (default: 1/2, 1, 3/2 and 2 times STOP's own)")
    draws: int = option(8, "random orders of a problem's paths, of which smaller N are the first")


@dataclasses.dataclass
class Stored:
    """Stored paths, and what they were made with."""
    model: Decoder
    tokenizer: Tokenizer
    stop: Stop
    problems: list   # of Problem
    records: list    # of sample.sample_paths, in the order of the problems
    prefixes: list   # checkpoints to try, in new tokens

    @property
    def shape(self):
        """(problems, n)."""
        return len(self.records), len(self.records[0]["paths"])


def open_stored(settings):
    """The Stored of a study's settings (StoredSettings). Paths that are not there are sampled."""
    require_positive(settings, "n", "draws", "problems", "max_new_tokens", "batch")
    model, tokenizer = open_model(settings)
    stop = load_stop(settings, model)
    problems = load_problems(settings)[:settings.problems]
    prefixes = checkpoints(settings, stop)
    limit = settings.max_new_tokens or stop.trained_limit()
    records = stored_paths(
        model, tokenizer, problems, Path(settings.stored), settings.n, limit, settings)
    return Stored(model, tokenizer, stop, problems, records, prefixes)


def stored_paths(model, tokenizer, problems, folder, n, limit, settings):
    """The records of sample.sample_paths, in a folder that no other process uses meanwhile."""
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder):
        return sample_paths(
            model, tokenizer, problems, folder, n, limit, sampling_of(settings), settings.batch)


def checkpoints(settings, stop):
    """The checkpoints of --prefixes, or some around the one that STOP was trained for."""
    if settings.prefixes is not None:
        return numbers("prefixes", settings.prefixes)
    own = stop.trained_for()[0]
    return [max(1, own // 2), own, own * 3 // 2, own * 2]


def stop_scores(stored, prefix):
    """STOP's chances for the first `prefix` tokens of every path: (problems, n) float64."""
    prefixes = []
    for record in stored.records:
        prefixes += [record["prompt_ids"] + path[:prefix] for path in record["paths"]]
    with progress(f"check at {prefix}", len(prefixes), "prefix") as bar:
        chances = stored.stop.score(stored.model, prefixes, batch=64, bar=bar)
    return chances.double().cpu().numpy().reshape(stored.shape)


def path_lengths(records):
    """Tokens of every path: (problems, n) int64."""
    return np.array([list(map(len, record["paths"])) for record in records])


def orders(records, draws, seed):
    """Random orders of each problem's paths, the same for every scorer: (draws, problems, n)."""
    generator = np.random.default_rng(seed)
    n = len(records[0]["paths"])
    sorted_paths = np.tile(np.arange(n), (draws, len(records), 1))
    return generator.permuted(sorted_paths, axis=2)


# Votes


def group_answers(record, kind):
    """Which paths of a record vote together: for each path the index of the first one with an equal
    answer, None without an answer. Made once, it spares comparing answers in every vote."""
    answers = record["answers"]
    firsts = []
    groups = []
    for i, answer in enumerate(answers):
        if answer is None:
            groups.append(None)
            continue
        equals = (first for first in firsts if same_vote(answer, answers[first], kind))
        group = next(equals, i)
        if group == i:
            firsts.append(i)
        groups.append(group)
    return groups


def vote_is_right(chosen, groups, right):
    """1.0 if the answer with most votes among the chosen paths (indices) is right, else 0.0. A tie
    goes to the answer that came first; without any answer the vote is wrong."""
    votes = collections.Counter(groups[i] for i in chosen if groups[i] is not None)
    if not votes:
        return 0.0
    winner = max(votes, key=votes.get)
    return float(right[winner])


# Tables


def require_targets(folder, *names):
    """Raise ValueError where a study could not write one of its files into its folder, which may
    not be there yet: to be called before the work."""
    if Path(folder).exists():
        for name in names:
            require_target(Path(folder) / name)


def write_table(file, rows):
    """Write rows, dicts of the same keys, as CSV; floats with four decimals."""
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0], lineterminator="\n")
    writer.writeheader()
    for row in rows:
        cells = dict(row)
        for key, value in row.items():
            if isinstance(value, float):
                cells[key] = f"{value:.4f}"
        writer.writerow(cells)
    write_atomic(file, text.getvalue())
