"""The paper's protocol (section 6, Table 2): what the paths are worth that each signal keeps.

    python eval.py                                  # the embedded toy: its STOP and its judge
    python eval.py --model M --stop S --data test.jsonl --judge Qwen/Qwen2.5-Math-PRM-7B
    torchrun --nproc-per-node 8 -- eval.py --model M --stop S --data test.jsonl

N full paths of each problem are sampled once and graded. Every scorer, of types I to IV, scores
their prefixes, the best k of each problem are kept, and the kept paths are compared. The tokens of
a path do not depend on which others are pruned: all scorers choose among the same paths.

`protocol` does this in plain steps; the script runs engine/protocol.py, which stores the paths.
"""
import plumbing  # first: what is imported next takes seconds (plumbing/__init__.py)

import math
import re

import numpy as np

from baselines import (
    CONFIDENCES, COVER, JACCARD, JUDGE, Signal, confidence, judge_scores, redundancy,
    token_set_cover)
from plumbing.answers import same_answer
from plumbing.progress import progress
from plumbing.statistics import (
    Interval, auroc, calibration_error, interval, pairwise_accuracy, spearman)
from sample import sample_paths
from stop import are_weights, vote

STOP = Signal("STOP", "IV")
RANDOM = Signal("random")


def protocol(model, tokenizer, stop, problems, n, keep, prefix, limit, sampling, judge=None):
    """The report on all scorers, for n paths of at most `limit` new tokens a problem, of which
    `keep` go on at `prefix` tokens. judge: its (Decoder, Tokenizer), or None."""
    records = sample_paths(model, tokenizer, problems, n, limit, sampling)
    scorers = {RANDOM: random_scores(records)}
    scorers |= all_scores(model, tokenizer, stop, problems, records, prefix, judge)
    return evaluate(problems, records, scorers, prefix, keep)


def random_scores(records):
    """(paths,) what knows nothing."""
    return np.random.default_rng(0).random(len(records) * len(records[0]["paths"]))


def all_scores(model, tokenizer, stop, problems, records, prefix, judge=None, window=None,
               aggregate="last", read=None):
    """{Signal: scores (paths,)} of the prefixes, by all that there is. window: DeepConf's, in
    tokens; None: an eighth of the prefix. aggregate: of the judge's rewards. read: what reads the
    prefixes (engine/prefixes.py has a faster one); None: `read_prefixes`."""
    if window is None:
        window = max(1, prefix // 8)
    read = read or read_prefixes
    confidences, checked = read(model, stop, records, prefix, window)
    token_chances = np.exp(confidences[CONFIDENCES[0]])  # geometric mean of a prefix's tokens
    scores = {
        JACCARD: redundancy(records, prefix),
        COVER: token_set_cover(records, prefix, token_chances)}
    if judge is not None:
        scores[JUDGE] = judge_scores(*judge, tokenizer, problems, records, prefix, aggregate)
    scores |= confidences
    scores[STOP] = checked
    return scores


def read_prefixes(model, stop, records, prefix, window):
    """(type III's {name: (paths,)}, STOP's chances (paths,)) float64 of the first `prefix` tokens
    of every path. Each reads prompts and prefixes by itself."""
    prefixes = []
    for record in records:
        prefixes += [record["prompt_ids"] + path[:prefix] for path in record["paths"]]
    with progress("check", len(prefixes), "prefix") as bar:
        chances = stop.score(model, prefixes, batch=64, bar=bar)
    return confidence(model, records, prefix, window), chances.double().cpu().numpy()


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


def metrics(scores, right, are_chances):
    """How well scores (problems, n) tell right paths from wrong ones, over all problems and within
    each. are_chances: whether the scores claim to be the chance of being right."""
    groups = np.repeat(np.arange(len(scores)), scores.shape[1])
    scores = scores.ravel()
    right = right.ravel()
    return {
        "auroc": auroc(scores, right),
        "spearman": spearman(scores, right),
        "pairwise": pairwise_accuracy(scores, right, groups),
        "calibration": calibration_error(scores, right) if are_chances else math.nan,
    }


def worth(problems, records, scores, prefix, keep, reread=False, are_chances=False):
    """A row of the report: what the best `keep` paths by scores (problems, n) are worth."""
    right = np.array([record["right"] for record in records], float)  # (problems, n)
    lengths = np.array([list(map(len, record["paths"])) for record in records])
    kept = np.array([select(line, keep) for line in scores])  # (problems, keep)
    hits = np.take_along_axis(right, kept, axis=1)
    average = hits.mean(1)
    values = {"avg": average}  # (problems,) each
    values["gain"] = average - right.mean(1)
    values["pass"] = hits.max(1)
    values["cons"] = vote_accuracy(problems, records, kept, np.ones_like(scores))
    if are_weights(scores.ravel()):
        values["weighted"] = vote_accuracy(problems, records, kept, scores)
    row = {key: interval(value) for key, value in values.items()}
    spent = tokens_spent(lengths, kept, prefix, reread)
    row["tokens"] = spent / len(lengths)  # of a problem
    row["saved"] = 1 - spent / lengths.sum()
    row["per_problem"] = values
    row["kept"] = kept
    return row | metrics(scores, right, are_chances)


def evaluate(problems, records, scorers, prefix, keep):
    """The report on scorers, {name or Signal: scores (paths,)}; its row "all n" is what no pruning
    gives. ValueError where a score is not a number."""
    n = len(records[0]["paths"])
    shape = (len(records), n)
    rows = {Signal(f"all {n}"): worth(problems, records, np.ones(shape), prefix, keep=n)}
    for name, scores in scorers.items():
        require_numbers(name, scores, records)
        signal = Signal.of(name)
        rereads = signal.type == "II"           # a second model reads the prefixes again
        are_chances = signal.type in ("II", "IV")  # trained to be the chance of being right
        grid = np.reshape(scores, shape)
        rows[signal] = worth(problems, records, grid, prefix, keep, rereads, are_chances)
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


def require_numbers(name, scores, records):
    """Raise ValueError where a score (paths,) is NaN or infinite."""
    finite = np.isfinite(scores)
    if not finite.all():
        place = finite.argmin()
        problem = records[place // len(records[0]["paths"])]["id"]
        raise ValueError(
            f"{name}: found {scores[place]}, expected a score for each path of {problem}")


# The report


LEGEND = """\
avg      share of the kept paths that are right; [low, high] 95% over problems
behind   STOP's avg minus this one, paired
vote     the kept paths' vote is right, weighted by the scores where none is negative
tokens   decoded a problem; saved: of those of all whole paths
auroc    how often a right path scores above a wrong one; within: of the same problem"""


def table(report):
    """The report as text of at most 100 columns, like the paper's Table 2; report.json has more."""
    title = "{problems} problems, {n} paths each, {keep} kept at {prefix} tokens".format(**report)
    head = line_of("", "", "avg", "behind", "vote", "tokens", "saved", "auroc", "within")
    lines = [title, "", head]
    for signal, row in report["rows"].items():
        vote_of = row.get("weighted", row["cons"])
        lines += named(signal.scorer, line_of(
            signal.scorer, signal.type, cell(row["avg"]), cell(row.get("stop_minus")),
            f"{vote_of.mean:.3f}", f"{row['tokens']:,.0f}", f"{row['saved']:.0%}",
            cell(row.get("auroc")), cell(row.get("pairwise"))))
    lines += ["", LEGEND]
    if JUDGE not in report["rows"]:
        lines.append("Type II is left out: there is no judge.")
    return "\n".join(lines)


NAME = 21  # columns of a scorer's name


def line_of(name, kind, avg, behind, vote, tokens, saved, auroc, within):
    """A line of the table."""
    return (f"{name[:NAME]:{NAME}} {kind:3} {avg:20} {behind:20} {vote:>5} {tokens:>7} {saved:>5} "
            f"{auroc:>5} {within:>6}").rstrip()


def named(name, line):
    """The lines of a row: a long name stands in one of its own."""
    return [line] if len(name) <= NAME else [name, " " * NAME + line[NAME:]]


def cell(value):
    """A figure without the zero before its point; blank where it is not defined."""
    if isinstance(value, Interval):
        return f"{cell(value.mean)} [{cell(value.low)}, {cell(value.high)}]"
    if value is None or math.isnan(value):
        return ""
    return re.sub(r"^(-?)0\.", r"\1.", f"{value:.3f}")


def summary(report):
    """What of a report goes into a script's last line."""
    return {f"avg {name}": round(row["avg"].mean, 4) for name, row in report["rows"].items()}


if __name__ == "__main__":
    from commands.eval import main
    main()
