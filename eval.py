"""The paper's protocol (section 6, Table 2): what the paths are worth that each signal keeps.

    python eval.py                                  # the embedded toy: its STOP and its judge
    python eval.py --model M --stop S --data test.jsonl --judge Qwen/Qwen2.5-Math-PRM-7B
    torchrun --nproc-per-node 8 -- eval.py --model M --stop S --data test.jsonl

N full paths of each problem are sampled once, graded and stored. Every scorer, of types I to IV,
scores their prefixes, the best k of each problem are kept, and the kept paths are compared. The
tokens of a path do not depend on which others are pruned: all scorers choose among the same paths.
"""
import plumbing  # first: what is imported next takes seconds (plumbing/__init__.py)

import math

import numpy as np

from baselines import JUDGE
from plumbing.answers import same_answer
from plumbing.statistics import (
    Interval, auroc, calibration_error, interval, pairwise_accuracy, spearman)
from stop import vote

STOP = "STOP (IV)"
COLUMNS = (
    "avg", "gain", "stop_minus", "cons", "weighted", "pass", "tokens", "saved",
    "auroc", "spearman", "pairwise", "calibration")


def select(scores, keep):
    """Indices of the `keep` highest scores, best first; of equal scores the lower index."""
    order = np.argsort(-np.asarray(scores, float), kind="stable")
    return order[:keep].tolist()


# What a scorer's choice is worth


def vote_accuracy(problems, records, kept, weights):
    """Whether the vote of each problem's kept paths is right, (problems,) float64.
    kept: (problems, keep) path indices, best first; weights: (problems, n), of the paths' votes."""
    right = []
    for problem, record, chosen, weight in zip(problems, records, kept, weights):
        answers = [record["answers"][path] for path in chosen]
        winner = vote(answers, weight[chosen].tolist(), problem.kind)
        right.append(same_answer(winner, problem.answer, problem.kind))
    return np.array(right, float)


def tokens_spent(lengths, kept, prefix, reread):
    """Tokens as the paper counts them: every path up to the checkpoint, the kept ones to their end,
    and all prefixes again where a second model reads them. lengths: (problems, n)."""
    begun = np.minimum(lengths, prefix)
    rest = np.take_along_axis(lengths - begun, kept, axis=1)
    spent = begun.sum() + rest.sum()
    if reread:
        spent += begun.sum()
    return spent


def metrics(scores, right, chances):
    """How well scores (problems, n) tell right paths from wrong ones, over all problems and within
    each. chances: whether the scores claim to be the chance of being right."""
    groups = np.repeat(np.arange(len(scores)), scores.shape[1])
    scores = scores.ravel()
    right = right.ravel()
    return {
        "auroc": auroc(scores, right),
        "spearman": spearman(scores, right),
        "pairwise": pairwise_accuracy(scores, right, groups),
        "calibration": calibration_error(scores, right) if chances else math.nan,
    }


def worth(problems, records, scores, prefix, keep, reread=False, chances=False):
    """A row of the report: what the best `keep` paths by scores (problems, n) are worth."""
    right = np.array([record["right"] for record in records], float)  # (problems, n)
    lengths = np.array([list(map(len, record["paths"])) for record in records])
    kept = np.array([select(line, keep) for line in scores])  # (problems, keep)
    hits = np.take_along_axis(right, kept, axis=1)
    values = {  # (problems,) each
        "avg": hits.mean(1),
        "gain": hits.mean(1) - right.mean(1),
        "pass": hits.max(1),
    }
    values["cons"] = vote_accuracy(problems, records, kept, np.ones_like(scores))
    if (scores >= 0).all():
        values["weighted"] = vote_accuracy(problems, records, kept, scores)
    row = {key: interval(value) for key, value in values.items()}
    spent = tokens_spent(lengths, kept, prefix, reread)
    row["tokens"] = spent / len(lengths)  # of a problem
    row["saved"] = 1 - spent / lengths.sum()
    row["per_problem"] = values
    row["kept"] = kept
    return row | metrics(scores, right, chances)


def evaluate(problems, records, scorers, prefix, keep, reread=()):
    """The report on scorers, {name: scores (paths,)}; its row "all n" is what no pruning gives.
    reread: names of those that read the prefixes again, at a cost in tokens.
    ValueError where a score is not a number."""
    n = len(records[0]["paths"])
    shape = (len(records), n)
    for name, scores in scorers.items():
        if not np.isfinite(scores).all():
            place = np.isfinite(scores).argmin()
            problem = records[place // n]["id"]
            raise ValueError(
                f"{name}: found {scores[place]}, expected a score for each path of {problem}")

    rows = {f"all {n}": worth(problems, records, np.ones(shape), prefix, keep=n)}
    for name, scores in scorers.items():
        grid = np.reshape(scores, shape)
        trained = name.endswith(("(II)", "(IV)"))
        rows[name] = worth(
            problems, records, grid, prefix, keep, reread=name in reread, chances=trained)
    if STOP in rows:
        for row in rows.values():
            ahead = rows[STOP]["per_problem"]["avg"] - row["per_problem"]["avg"]
            row["stop_minus"] = interval(ahead)
    return {
        "problems": len(records),
        "n": n,
        "keep": keep,
        "prefix": prefix,
        "ids": [record["id"] for record in records],
        "rows": rows,
    }


# The report


def cell(value):
    """A cell of the table; blank where a metric is not defined."""
    if isinstance(value, Interval):
        return f"{value.mean:.3f} [{value.low:.3f}, {value.high:.3f}]"
    return "" if math.isnan(value) else f"{value:.3f}"


def table(report):
    """The report in Markdown, like the paper's Table 2. [low, high]: 95% interval over problems."""
    lines = [
        "{problems} problems, {n} paths each, {keep} kept at {prefix} tokens".format(**report),
        "",
        f"| type | scorer | {' | '.join(COLUMNS)} |",
        "|" + " --- |" * (len(COLUMNS) + 2),
    ]
    for name, row in report["rows"].items():
        scorer, _, kind = name.removesuffix(")").partition(" (")
        cells = [cell(row.get(column, math.nan)) for column in COLUMNS]
        lines.append(f"| {kind} | {scorer} | {' | '.join(cells)} |")
    if JUDGE not in report["rows"]:
        lines += ["", "Type II is left out: no judge was given (--judge)."]
    return "\n".join(lines)


def summary(report):
    """What of a report goes into a script's last line."""
    return {f"avg {name}": round(row["avg"].mean, 4) for name, row in report["rows"].items()}


if __name__ == "__main__":
    from commands.eval import main
    main()
