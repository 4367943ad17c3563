"""Metrics beside slow, direct versions; the report by hand; the run; the script."""
import dataclasses
import json
import math
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from helpers import ROOT, raw_config, write_checkpoint, write_tokenizer

import eval as story
from baselines import CONFIDENCES, JUDGE, Signal
from commands import eval as eval_command
from commands import train as train_command
from commands.eval import Settings
from engine import protocol, refill
from engine.protocol import Options, run
from eval import STOP, evaluate, select, summary, table
from model import load
from plumbing.problems import Problem
from plumbing.statistics import auroc, calibration_error, interval, pairwise_accuracy, spearman
from plumbing.tokenizer import Tokenizer
from stop import Stop

PROBLEMS = [Problem(name, f"What is {name}?", "1") for name in "abcde"]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A tiny random model that ends some paths early, and a byte tokenizer."""
    raw = raw_config("qwen2", vocab_size=256, eos_token_id=[3, 50, 99])
    folder = write_checkpoint(tmp_path_factory.mktemp("tiny") / "it", raw)
    write_tokenizer(folder)
    return load(folder), Tokenizer(folder)


# -------------------------------------------------------------------------------------- statistics


def direct_auroc(scores, positive):
    pairs = []
    for a, p in zip(scores, positive):
        for b, q in zip(scores, positive):
            if p and not q:
                pairs.append((a > b) + 0.5 * (a == b))
    return sum(pairs) / len(pairs)


def direct_ranks(values):
    ranks = []
    for a in values:
        below = sum(b < a for b in values)
        equal = sum(b == a for b in values)
        ranks.append(1 + below + (equal - 1) / 2)
    return ranks


@pytest.mark.parametrize("values", (2, 5, 1000))
def test_auroc_is_the_share_of_pairs(values):
    """Ties counted whole or not at all, ranks from 0, classes swapped: all would show."""
    rng = np.random.default_rng(values)
    scores, positive = rng.integers(0, values, 60), rng.random(60) < 0.3
    expected = direct_auroc(scores, positive)
    assert auroc(scores, positive) == pytest.approx(expected, abs=1e-12)
    assert auroc(-scores, positive) == pytest.approx(1 - expected, abs=1e-12)
    assert math.isnan(auroc(scores, positive | True))
    assert math.isnan(auroc(scores, positive & False))


def test_auroc_is_the_rank_sum_test():
    """Another program's number, on scores with many ties."""
    stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(0)
    scores, positive = rng.integers(0, 9, 200), rng.random(200) < 0.5
    u = stats.mannwhitneyu(scores[positive], scores[~positive]).statistic
    expected = u / positive.sum() / (~positive).sum()
    assert auroc(scores, positive) == pytest.approx(expected, abs=1e-12)


def test_auroc_is_that_of_scikit_learn():
    metrics = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(3)
    scores, positive = rng.integers(0, 9, 200) / 8, rng.random(200) < 0.2
    expected = metrics.roc_auc_score(positive, scores)
    assert auroc(scores, positive) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("values", (2, 5, 1000))
def test_spearman_is_the_correlation_of_mean_ranks(values):
    """Ties in both; ordinal ranks, or Pearson's of the values, give another number."""
    rng = np.random.default_rng(values)
    a, b = rng.integers(0, values, 50), rng.integers(0, values, 50) ** 2
    b = b + a * (a > values / 2)
    x, y = (np.array(direct_ranks(v)) - 25.5 for v in (a, b))
    expected = (x * y).sum() / math.sqrt((x * x).sum() * (y * y).sum())
    assert spearman(a, b) == pytest.approx(expected, abs=1e-12)
    assert math.isnan(spearman(a, [1] * 50)) and math.isnan(spearman([0.1] * 50, b))
    stats = pytest.importorskip("scipy.stats")
    assert spearman(a, b) == pytest.approx(stats.spearmanr(a, b).statistic, abs=1e-12)


def test_calibration_error_by_hand():
    """Bins of a tenth: two in the lowest, one on an edge (the upper bin's), one at 1 (the last
    bin's, with 0.95)."""
    scores, labels = [0.02, 0.08, 0.1, 0.55, 0.95, 1.0], [0, 1, 0, 1, 1, 0]
    by_bin = [2 * abs(0.05 - 0.5), 1 * abs(0.1 - 0), 1 * abs(0.55 - 1), 2 * abs(0.975 - 0.5)]
    assert calibration_error(scores, labels) == pytest.approx(sum(by_bin) / 6)
    two = [3 * abs(0.2 / 3 - 1 / 3), 3 * abs(2.5 / 3 - 2 / 3)]
    assert calibration_error(scores, labels, bins=2) == pytest.approx(sum(two) / 6)
    assert calibration_error([0.25] * 4, [0, 0, 1, 0]) == 0.0


def test_pairwise_accuracy_stays_within_the_group():
    """Pairs across problems, pairs of equal labels, or groups that must lie side by side would
    change the share."""
    rng = np.random.default_rng(1)
    scores, labels = rng.integers(0, 6, 80), rng.integers(0, 4, 80) / 4
    groups = rng.integers(0, 7, 80)
    pairs = []
    for i in range(80):
        for j in range(80):
            if groups[i] == groups[j] and labels[i] > labels[j]:
                pairs.append((scores[i] > scores[j]) + 0.5 * (scores[i] == scores[j]))
    expected = sum(pairs) / len(pairs)
    assert pairwise_accuracy(scores, labels, groups) == pytest.approx(expected, abs=1e-12)
    names = [f"p{group}" for group in groups]
    assert pairwise_accuracy(scores, labels, names) == pytest.approx(expected)
    assert math.isnan(pairwise_accuracy([1, 2], [0.5, 0.5], [0, 0]))


def test_the_interval_is_95_percent():
    """Its width is that of the mean's normal interval; of 200 samples it misses the true mean about
    ten times."""
    rng = np.random.default_rng(2)
    values = rng.random(400)
    mean, low, high = interval(values)
    error = values.std() / 20
    assert mean == pytest.approx(values.mean()) and (low, high) == interval(values)[1:]
    assert low == pytest.approx(mean - 1.96 * error, abs=0.25 * error)
    assert high == pytest.approx(mean + 1.96 * error, abs=0.25 * error)
    found = [interval(rng.random(50), draws=400) for _ in range(200)]
    assert 3 <= sum(not each.low <= 0.5 <= each.high for each in found) <= 24


def test_select_takes_the_highest_and_the_lower_index():
    """Catches an unstable or reversed sort: every order of three values, ties among them."""
    assert select([0.2, 0.9, 0.2, 0.9, 0.5], 3) == [1, 3, 4]
    assert select([0.5] * 4, 2) == [0, 1]
    assert select([0.1, 0.1, 0.7], 2) == [2, 0]
    assert select([-3.0, -1.0, -2.0], 1) == [1]


# -------------------------------------------------------------------------------------- the report


def hand_made():
    """Two problems of four paths; A keeps 0, 2 | 1, 3; B keeps 0, 1 | 2, 3; C keeps 1, 3 | 0, 1."""
    problems = [Problem("a", "?", "1"), Problem("b", "?", "C", {"C": "it"})]
    records = [
        {"id": "a", "prompt_ids": [5, 6], "paths": [[7] * 10, [7] * 20, [7] * 30, [7] * 2],
         "answers": ["1", "3", "1.0", "3"], "right": [True, False, True, False]},
        {"id": "b", "prompt_ids": [5], "paths": [[8] * 8, [8] * 5, [8] * 4, [8] * 9],
         "answers": ["A", "C", None, "C"], "right": [False, True, False, True]},
    ]
    scorers = {
        Signal("C", "I"): [-9, -1, -8, -2, -1, -2, -9, -8],
        Signal("B", "II"): [0.9, 0.8, 0.1, 0.0, 0.1, 0.2, 0.9, 0.8],
        STOP: [0.9, 0.1, 0.8, 0.2, 0.3, 0.9, 0.1, 0.8],
    }
    return problems, records, {name: np.array(scores, float) for name, scores in scorers.items()}


def test_the_report_by_hand():
    """avg, gain, cons, weighted cons, pass, saved, AUROC, Spearman, pairwise, calibration, and what
    STOP is ahead by."""
    problems, records, scorers = hand_made()
    report = evaluate(problems, records, scorers, 5, 2)
    rows = report["rows"]
    names = ["all 4", "C (I)", "B (II)", "STOP (IV)"]
    assert list(rows) == names

    def each(key):
        return [list(rows[name]["per_problem"].get(key, ())) for name in names]

    assert each("avg") == [[0.5, 0.5], [0, 0.5], [0.5, 0.5], [1, 1]]
    assert each("gain") == [[0, 0], [-0.5, 0], [0, 0], [0.5, 0.5]]
    # all: 1 and 3 tie, the first wins, and C has two of three votes; C (I): 3, then A before C;
    # B: 1 before 3, C alone
    assert each("cons") == [[1, 1], [0, 0], [1, 1], [1, 1]]
    assert each("weighted") == [[1, 1], [], [1, 1], [1, 1]]  # not by scores below zero
    assert each("pass") == [[1, 1], [0, 1], [1, 1], [1, 1]]
    for name, average in zip(names, (0.5, 0.25, 0.5, 1.0)):
        assert rows[name]["avg"] == interval(rows[name]["per_problem"]["avg"])
        assert rows[name]["avg"].mean == average
    assert [rows[name]["stop_minus"].mean for name in names] == [0.5, 0.75, 0.5, 0]
    assert rows["C (I)"]["stop_minus"] == interval([1, 0.5])
    kept = [rows[name]["kept"].tolist() for name in names[1:]]
    assert kept == [[[1, 3], [0, 1]], [[0, 1], [2, 3]], [[0, 2], [1, 3]]]

    total, prefixes = 62 + 26, 5 + 5 + 5 + 2 + 5 + 5 + 4 + 5
    assert rows["STOP (IV)"]["saved"] == pytest.approx(1 - (prefixes + 5 + 25 + 0 + 4) / total)
    assert rows["B (II)"]["saved"] == pytest.approx(1 - (2 * prefixes + 5 + 15 + 0 + 4) / total)
    assert rows["C (I)"]["saved"] == pytest.approx(1 - (prefixes + 15 + 0 + 3 + 0) / total)
    assert rows["all 4"]["saved"] == 0

    right = [1, 0, 1, 0, 0, 1, 0, 1]
    assert rows["STOP (IV)"]["auroc"] == 1.0 and rows["STOP (IV)"]["pairwise"] == 1.0
    assert rows["B (II)"]["auroc"] == pytest.approx(direct_auroc(scorers["B (II)"], right))
    assert rows["B (II)"]["pairwise"] == pytest.approx((3 + 2) / 8)
    correlation = np.corrcoef(direct_ranks(scorers["C (I)"].tolist()), direct_ranks(right))[0, 1]
    assert rows["C (I)"]["spearman"] == pytest.approx(correlation)
    by_hand = (2 * 0.1 + 2 * 0.1 + 2 * 0.2 + 0.2 + 0.3) / 8
    assert rows["STOP (IV)"]["calibration"] == pytest.approx(by_hand)
    assert math.isnan(rows["C (I)"]["calibration"])

    assert (report["problems"], report["n"], report["keep"], report["prefix"]) == (2, 4, 2, 5)
    assert report["ids"] == ["a", "b"]
    averages = {"avg all 4": 0.5, "avg C (I)": 0.25, "avg B (II)": 0.5, "avg STOP (IV)": 1.0}
    assert summary(report) == averages


def test_weighted_votes():
    """Two paths of low score are outvoted by one of high score, which the count of votes does not
    see."""
    problems = [Problem("a", "?", "1")]
    records = [{"id": "a", "prompt_ids": [5], "paths": [[7]] * 4, "answers": ["1", "2", "2", None],
                "right": [True, False, False, False]}]
    scorers = {"it": np.array([0.9, 0.3, 0.4, 0.95])}
    row = evaluate(problems, records, scorers, 5, 4)["rows"]["it"]
    assert row["cons"].mean == 0.0 and row["weighted"].mean == 1.0
    assert "stop_minus" not in row


def test_gain_is_over_the_problems_own_average():
    """An easy problem and a hard one: against the average of all, the interval would hold their
    difference too."""
    problems = [Problem("a", "?", "1"), Problem("b", "?", "1")]
    records = []
    for problem, right in zip(problems, ([True, True, True, False], [False, False, False, True])):
        answers = ["1" if each else "2" for each in right]
        records.append({"id": problem.id, "prompt_ids": [5], "paths": [[7]] * 4,
                        "answers": answers, "right": right})
    scorers = {"it": np.array([1, 0, 0, 0, 0, 0, 0, 1.0])}
    row = evaluate(problems, records, scorers, 5, 1)["rows"]["it"]
    assert row["per_problem"]["gain"].tolist() == [0.25, 0.75]
    assert row["gain"] == interval([0.25, 0.75])


@pytest.mark.parametrize("name", ("C (I)", "B (II)", "STOP (IV)"))
def test_a_score_that_is_not_a_number_is_refused_by_its_scorers_name(name):
    """It would be sorted somewhere, and the paths kept would be another scorer's merit."""
    problems, records, scorers = hand_made()
    scorers[name][6] = math.nan
    with pytest.raises(ValueError) as caught:
        evaluate(problems, records, scorers, 5, 2)
    assert str(caught.value) == f"{name}: found nan, expected a score for each path of b"


def test_the_table():
    """For a person: 100 columns, types in a column of their own, undefined cells blank, a legend, a
    line where there is no judge."""
    problems, records, scorers = hand_made()
    report = evaluate(problems, records, scorers, 5, 2)
    lines = table(report).splitlines()
    assert lines[0] == "2 problems, 4 paths each, 2 kept at 5 tokens"
    assert all(len(line) <= 100 for line in lines)
    head, ours = row_of(lines, "avg "), row_of(lines, "STOP")
    assert ours.split()[:5] == ["STOP", "IV", "1.000", "[1.000,", "1.000]"]
    place = head.index("auroc")
    assert ours[place:place + 5] == "1.000"
    assert row_of(lines, "all 4").startswith("all 4 ")
    assert "nan" not in table(report)
    assert "Type II is left out" in lines[-1]
    report = evaluate(problems, records, scorers | {JUDGE: scorers["B (II)"]}, 5, 2)
    assert "left out" not in table(report)
    long = Signal("plan for 2,100 tokens: 20 @ 24:5x4,80:2x4")
    report["rows"][long] = report["rows"]["STOP (IV)"]
    lines = table(report).splitlines()
    place = lines.index(long)
    assert lines[place + 1].split()[0] == "1.000"


def row_of(lines, start):
    """The first line that begins so, spaces apart."""
    return next(line for line in lines if line.lstrip().startswith(start))


def test_keep_all_saves_nothing():
    """Every scorer then has the average of all, and no token is saved: a cut path counted whole, or
    twice, would show."""
    problems, records, scorers = hand_made()
    for name, row in evaluate(problems, records, scorers, 5, 4)["rows"].items():
        assert row["avg"].mean == 0.5 and row["gain"].mean == 0.0, name
        assert row["saved"] == 0.0 or name.type == "II", name  # a judge reads the prefixes again


@pytest.mark.parametrize("length, saving", ((11950, 0.739), (8650, 0.674)))
def test_the_papers_savings_from_its_lengths(length, saving):
    """Table 2, 1.5B: AIME24 saves 73.9%, GPQA-D 67.4%; section 8's responses of 11,950 and 8,650
    tokens, fitted on these two."""
    records = [{"id": "a", "prompt_ids": [0], "paths": [[0] * length] * 64, "answers": ["1"] * 64,
                "right": [True] * 64}]
    scorers = {"it": np.arange(64.0), JUDGE: np.arange(64.0)}
    rows = evaluate([Problem("a", "?", "1")], records, scorers, 2048, 8)["rows"]
    assert rows["it"]["saved"] == pytest.approx(saving, abs=0.02)
    assert rows["it"]["saved"] - rows[JUDGE]["saved"] == pytest.approx(2048 / length)


# ----------------------------------------------------------------------------------------- the run


@pytest.fixture
def plain_reading(monkeypatch):
    """The plain way to read prefixes, which asks `Stop.score`: that is what a Known answers."""
    monkeypatch.setattr(protocol, "read_prefixes", story.read_prefixes)


class Known:
    """A Stop whose scores are given, and which notes what it was asked."""
    m = 4
    trained_for = Stop.trained_for
    limit = Stop.limit
    trained_limit = Stop.trained_limit

    def __init__(self, scores, **trained):
        self.scores = scores
        self.trained = {"settings": trained}
        self.asked = None

    def score(self, model, prefixes, batch, bar):
        self.asked = prefixes
        return torch.tensor(self.scores)


def take_the_trained(folder, pair, settings, prefix, limit):
    """A run on a Stop that was trained at 4 of 7 tokens: its checkpoint and limit are these."""
    stop = Known([0.5] * 6, prefix=4, max_new_tokens=7)
    report = run(*pair, stop, PROBLEMS[:3], settings, folder)
    (file,) = folder.glob("paths-*")
    records = [json.loads(line) for line in file.read_text().splitlines()]
    records = [record for record in records if "paths" in record]
    asked = []
    lengths = []
    for record in records:
        asked += [record["prompt_ids"] + path[:prefix] for path in record["paths"]]
        lengths += [len(path) for path in record["paths"]]
    assert max(lengths) == limit and report["prefix"] == prefix
    assert stop.asked == asked


@pytest.mark.usefixtures("plain_reading")
@pytest.mark.parametrize("given, prefix, limit", (
    ({}, 4, 7), ({"prefix": 3, "max_new_tokens": 6}, 3, 6)))
def test_a_run_takes_what_stop_was_trained_for(pair, tmp_path, given, prefix, limit):
    """The checkpoint and the limit are STOP's own where none are given; a given one comes first."""
    settings = Settings(n=2, keep=1, batch=4, seed=1, **given)
    take_the_trained(tmp_path / "out", pair, settings, prefix, limit)


@pytest.mark.usefixtures("plain_reading")
def test_a_run_takes_the_settings_of_training(pair, tmp_path):
    settings = train_command.Settings(n=2, keep=1, batch=4, seed=1, prefix=2)
    take_the_trained(tmp_path / "out", pair, settings, 2, 7)


@pytest.mark.usefixtures("plain_reading")
def test_the_report_file(pair, tmp_path):
    """Strict JSON with all of it: resolved settings, versions, per-problem values; the window is an
    eighth of the prefix."""
    def strict(name):
        raise AssertionError(f"{name} is not JSON")

    settings = Settings(n=2, keep=1, batch=4, prefix=17, max_new_tokens=20)
    report = run(*pair, Known([0.5] * 6), PROBLEMS[:3], settings, tmp_path)
    stored = json.loads((tmp_path / "report.json").read_text(), parse_constant=strict)
    assert stored["settings"] == dataclasses.asdict(settings) | {"window": 2}
    assert stored["versions"].keys() == {"python", "torch", "numpy"}
    assert stored["versions"]["torch"] == torch.__version__
    assert "commit" in stored and stored["ids"] == ["a", "b", "c"]
    names = list(stored["rows"])
    type_i = ["Jaccard (I)", "token set cover (I)"]
    assert names == ["all 2", "random", *type_i, *CONFIDENCES, "STOP (IV)"]
    for name in names:
        average = report["rows"][name]["per_problem"]["avg"]
        assert stored["rows"][name]["per_problem"]["avg"] == average.tolist()


@pytest.mark.usefixtures("plain_reading")
@pytest.mark.parametrize("window, resolved", ((None, 2), (9, 9)))
def test_the_window_reaches_the_scores(pair, tmp_path, monkeypatch, window, resolved):
    """The one given, else an eighth of the checkpoint."""
    asked = []
    honest = story.confidence

    def noted(model, records, prefix, window):
        asked.append((prefix, window))
        return honest(model, records, prefix, window)

    monkeypatch.setattr(story, "confidence", noted)
    settings = Settings(n=2, keep=1, batch=4, prefix=17, max_new_tokens=20)
    report = run(*pair, Known([0.5] * 2), PROBLEMS[:1], settings, tmp_path, Options(window=window))
    assert asked == [(17, resolved)] and report["settings"]["window"] == resolved


@pytest.mark.usefixtures("plain_reading")
def test_nothing_is_printed_of_scores_that_are_no_numbers(pair, tmp_path, capsys):
    settings = Settings(n=2, keep=1, prefix=4, max_new_tokens=7)
    stop = Known([0.5, 0.5, math.nan, 0.5])
    with pytest.raises(ValueError, match="^STOP \\(IV\\): found nan, expected a score for each"):
        run(*pair, stop, PROBLEMS[:2], settings, tmp_path)
    assert "|" not in capsys.readouterr().out and not (tmp_path / "report.json").exists()


@pytest.mark.parametrize("change, how, message", (
    ({"keep": 0}, {}, "keep: found 0, expected at least 1"),
    ({"keep": 3}, {}, "keep: found 3, expected 1 to n = 2"),
    ({"n": 0}, {}, "n: found 0, expected at least 1"),
    ({"prefix": 0}, {}, "prefix: found 0, expected at least 1"),
    ({"max_new_tokens": 0}, {}, "max_new_tokens: found 0, expected at least 1"),
    ({"batch": 0}, {}, "batch: found 0, expected at least 1"),
    ({"problems": -3}, {}, "problems: found -3, expected at least 1"),
    ({"temperature": -1.0}, {}, "temperature: found -1.0"),
    ({"max_new_tokens": 600}, {}, "exceed the context of 512"),
    ({"prefix": 500}, {}, "exceed the context of 512"),  # the [STOP] tokens do not fit behind it
    ({"prefix": 9, "max_new_tokens": 9}, {"verify": True}, "prefix: found 9, expected less than 9"),
    ({}, {"window": 0}, "window: found 0, expected at least 1"),
    ({}, {"aggregate": "sum"}, "judge_aggregate: found 'sum', expected last, min or mean"),
    ({}, {"problems": []}, "problems: found 0, expected at least 1")))
def test_settings_are_checked_before_any_work(pair, tmp_path, change, how, message):
    """More than n kept would be counted as n; none would be a mean of nothing."""
    settings = Settings(**{"n": 2, "keep": 1} | change)
    problems = how.pop("problems", PROBLEMS)
    with pytest.raises(ValueError, match=message):
        run(*pair, Known([]), problems, settings, tmp_path / "none", Options(**how))
    assert not (tmp_path / "none").exists()


@pytest.fixture(scope="module")
def stop(pair):
    stop = Stop(pair[0], rank=2)
    generator = torch.Generator().manual_seed(0)
    for parameter in stop.parameters():
        torch.nn.init.normal_(parameter, generator=generator)
    return stop.requires_grad_(False)


def test_verify_agrees(pair, stop, tmp_path, capsys):
    """Launch, Check, Resume from scratch keeps the paths that were selected from the stored ones,
    to the token."""
    settings = Settings(n=6, keep=2, batch=12, prefix=4, max_new_tokens=12, dtype="float32")
    report = run(*pair, stop, PROBLEMS, settings, tmp_path, Options(verify=True))
    assert "verify: 5 of 5 problems" in capsys.readouterr().out
    scores = stop.score(pair[0], [[1], [2, 3], [4]]).tolist()
    assert len({round(score, 6) for score in scores}) == 3
    assert len({tuple(row) for row in report["rows"][STOP]["kept"].tolist()}) > 1


@pytest.mark.parametrize("where", (1, -1))
def test_verify_catches_a_doctored_path(pair, stop, tmp_path, capsys, monkeypatch, where):
    """One token of one kept path, before the checkpoint or after it, in a file sealed anew."""
    settings = Settings(n=6, keep=2, batch=12, prefix=4, max_new_tokens=12, dtype="float32")
    report = run(*pair, stop, PROBLEMS, settings, tmp_path)
    honest = protocol.sample_paths
    chosen = report["rows"][STOP]["kept"][2]

    def doctored(*args, **how):
        records = honest(*args, **how)
        kept = max((records[2]["paths"][i] for i in chosen), key=len)
        kept[where] = (kept[where] + 1) % 256
        return records

    monkeypatch.setattr(protocol, "sample_paths", doctored)
    message = "^verify: found 1 problems that differ, expected none in float32$"
    with pytest.raises(ValueError, match=message):
        run(*pair, stop, PROBLEMS, settings, tmp_path, Options(verify=True))
    assert "verify: 4 of 5 problems" in capsys.readouterr().out
    rounded = dataclasses.replace(settings, dtype="bfloat16")  # reported, no error
    run(*pair, stop, PROBLEMS, rounded, tmp_path, Options(verify=True))
    assert "verify: 4 of 5 problems" in capsys.readouterr().out


# -------------------------------------------------------------------------------------- the script

PRM = ["Qwen2ForProcessRewardModel"]


@pytest.fixture
def checkpoint(tmp_path):
    """A checkpoint's folder, with a STOP and four problems."""
    folder = write_checkpoint(tmp_path / "it", raw_config("qwen2", vocab_size=256))
    write_tokenizer(folder)
    lines = [json.dumps({"problem": f"{i}?", "answer": i}) + "\n" for i in range(4)]
    (folder / "test.jsonl").write_text("".join(lines))
    Stop(load(folder), rank=2).save(folder / "stop")
    return folder


def flags_for(folder, out, *more):
    """The command line of a small run."""
    return [
        "eval.py", "--model", str(folder), "--out", str(out), "--n", "3", "--keep", "1",
        "--prefix", "4", "--problems", "3", "--max-new-tokens", "6", "--batch", "3",
        "--device", "cpu", "--dtype", "float32", *more]


@pytest.fixture
def call(checkpoint, tmp_path, monkeypatch, capsys):
    """A function that runs the script with more flags -> (status, out, err)."""
    def script(*more):
        monkeypatch.setattr("sys.argv", flags_for(checkpoint, tmp_path / "out", *more))
        status = 0
        try:
            eval_command.main()
        except SystemExit as error:
            status = error.code
        return status, *capsys.readouterr()
    return script


def write_judge(folder, special=(), **changes):
    raw = raw_config("qwen2", **{"vocab_size": 256, "architectures": PRM} | changes)
    write_tokenizer(write_checkpoint(folder / "judge", raw), special)


def test_the_script_prints_the_table_and_a_json_line(call, tmp_path, monkeypatch):
    """Started again it reads its paths."""
    for flags in ((), (), ("--verify",)):
        status, out, _ = call(*flags)
        last = json.loads(out.splitlines()[-1])
        assert status == 0 and {"out", "avg all 3", "avg STOP (IV)"} <= set(last)
        assert re.search("^STOP +IV ", out, re.MULTILINE) and "Type II is left out" in out
        monkeypatch.setattr(refill, "Batch", None)
    assert "verify: 3 of 3 problems" in out
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["problems"] == 3 and report["settings"]["max_new_tokens"] == 6


def test_a_judge_in_the_models_folder_joins(call, checkpoint, tmp_path):
    write_judge(checkpoint)
    status, out, _ = call("--judge-aggregate", "mean")
    assert status == 0 and re.search("^judge +II ", out, re.MULTILINE) and "left out" not in out
    rows = json.loads((tmp_path / "out" / "report.json").read_text())["rows"]
    assert rows[JUDGE]["saved"] < rows["Jaccard (I)"]["saved"]  # charged its reading


def no_stop(folder):
    shutil.rmtree(folder / "stop")


def no_record(folder):
    (folder / "test.jsonl").write_text("")


def no_question(folder):
    (folder / "test.jsonl").write_text('{"text": "1?", "answer": 1}\n')


def no_problems(folder):
    (folder / "test.jsonl").unlink()


def small_judge(folder):
    write_judge(folder, vocab_size=255)


def judge_without_head(folder):
    write_judge(folder, architectures=["Qwen2ForCausalLM"])


def judge_of_other_tokens(folder):
    write_judge(folder, ("<x>",), vocab_size=300)


@pytest.mark.parametrize("break_it, flags, message", (
    (no_stop, (), "stop.json"),
    (no_record, (), "test.jsonl: found no record"),
    (no_question, (), "test.jsonl:1: problem: found nothing"),
    (no_problems, (), "test.jsonl"),
    (None, ("--judge", "nowhere"), "nowhere"),
    (small_judge, (), "judge: vocab_size: found 255, expected more than 255"),
    (judge_without_head, (), "judge: head: found"),
    (judge_of_other_tokens, (), "judge: tokenizer: found another")))
def test_a_users_mistake_is_one_line(call, checkpoint, break_it, flags, message):
    if break_it is not None:
        break_it(checkpoint)
    status, out, err = call(*flags)
    (error,) = err.splitlines()
    assert status == 2 and error.startswith("error: ") and message in error


@pytest.mark.parametrize("flags, message", (
    (("--problems", "0"), "problems: found 0"),
    (("--problems", "-3"), "problems: found -3"),
    (("--keep", "4"), "keep: found 4, expected 1 to n = 3"),
    (("--window", "0"), "window: found 0"),
    (("--top-p", "0"), "top-p: found 0.0"),
    (("--judge-aggregate", "sum"), "judge_aggregate: found 'sum', expected last, min or mean")))
def test_a_wrong_setting_is_refused_before_the_model_is_read(call, monkeypatch, flags, message):
    monkeypatch.setattr(eval_command, "open_model", None)
    status, out, err = call(*flags)
    (error,) = err.splitlines()
    assert status == 2 and error.startswith("error: ") and message in error


def test_two_processes_print_one_table_with_the_same_numbers(checkpoint, tmp_path):
    """Three problems on two processes, so the shares differ; a judge that reads the questions, and
    --verify."""
    marks = ("<extra_0>", "<|im_start|>", "<|im_end|>")
    write_judge(checkpoint, marks, vocab_size=260)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--"]
    rows, printed = [], []
    for name, launcher in (("alone", []), ("together", torchrun)):
        out = tmp_path / name
        command = [sys.executable, *launcher, *flags_for(checkpoint, out, "--verify")]
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"})
        assert done.returncode == 0, done.stderr
        rows.append(json.loads((out / "report.json").read_text())["rows"])
        printed.append(done.stdout)
    for text in printed:
        assert len(re.findall("^STOP +IV ", text, re.MULTILINE)) == 1
    assert printed[1].count("verify: 3 of 3 problems") == 1
    assert rows[0].keys() == rows[1].keys()
    for name, row in rows[0].items():
        other = rows[1][name]
        assert row["kept"] == other["kept"] and row["per_problem"] == other["per_problem"], name
        assert row["auroc"] == other["auroc"] and row["saved"] == other["saved"], name
    calibration = [each[JUDGE]["calibration"] for each in rows]
    assert calibration[0] == pytest.approx(calibration[1], abs=1e-6)
