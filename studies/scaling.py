"""What the same tokens buy (paper, Figures 4 and 5), from the paths that eval.py has stored.

    python eval.py && python studies/scaling.py   # the embedded toy; with matplotlib also curves
    python studies/scaling.py --model M --stop S --data test.jsonl --prefixes 512,1024 --judge J

Figure 4: accuracy of the vote (cons@N) against tokens a problem, for N = 2, 4, ... launched paths
of which each scorer keeps half. Smaller N are nested subsets of the stored paths, the same for all
scorers, averaged over random orders of the paths. Tokens as the paper counts them; the judge is
charged for reading the prefixes again. Figure 5: mean accuracy of STOP's kept paths against
retention, checkpoint by checkpoint.
"""
import dataclasses
import io
import json
import sys
from pathlib import Path

import numpy as np

try:
    import matplotlib.figure
except ImportError:
    matplotlib = None

sys.path.insert(0, str(Path(__file__).parent.parent))
from baselines import JUDGE, confidence, judge_scores, redundancy
from eval import STOP, select, tokens_spent, worth
from plumbing.command_line import command_line, option, require_positive
from plumbing.records import write_atomic
from plumbing.statistics import interval
from shared import (
    StoredSettings, group_answers, load_judge, open_stored, orders, path_lengths, require,
    require_targets, stop_scores, vote_is_right, write_table)

NO_PRUNING = "no pruning"
COLOURS = 10  # of matplotlib's curves, before they begin again


@dataclasses.dataclass(kw_only=True)
class Settings(StoredSettings):
    """What `python studies/scaling.py` can be told."""
    out: str = option("runs/scaling", "folder for the tables and curves")
    prefix: int | None = option(
        None, "the checkpoint of Figure 4 (default: what STOP was trained for, or 2048)")
    retention: float = option(0.5, "share of the paths kept, in Figure 4")
    judge: str | None = option(
        None, "reward model for type II (default: judge/ in the model's directory, if any)")
    window: int | None = option(
        None, "DeepConf's, in tokens (default: an eighth of the checkpoint)")


# Figure 4


def against_tokens(problems, records, scorers, prefix, retention, permutations, reread=()):
    """Figure 4's points: [{scorer, paths, kept, tokens, cons, low, high}] for N = 2, 4, ... up to
    all n stored paths. tokens: the mean of a problem.

    scorers: name -> scores (problems, n), or a function of records that gives them where a score
    depends on the other paths. permutations (draws, problems, n): orders of the paths; the first N
    are launched. reread: names of those that read the prefixes again. "no pruning" keeps all.
    """
    groups = [group_answers(record, problem.kind) for record, problem in zip(records, problems)]
    lengths = path_lengths(records)
    scorers = {NO_PRUNING: np.ones(lengths.shape)} | scorers
    points = []
    for N in launched_counts(lengths.shape[1]):
        for name, scorer in scorers.items():
            keep = N if name == NO_PRUNING else max(1, round(N * retention))
            cons = []  # (draws, problems)
            tokens = 0
            for order in permutations[:, :, :N]:
                scores = scores_of(scorer, records, order)  # (problems, N)
                best = np.array([select(line, keep) for line in scores])  # (problems, keep)
                cons.append(right_votes(np.take_along_axis(order, best, 1), groups, records))
                launched = np.take_along_axis(lengths, order, 1)
                tokens += tokens_spent(launched, best, prefix, name in reread)
            accuracy = interval(np.mean(cons, axis=0))
            points.append({
                "scorer": name,
                "paths": N,
                "kept": keep,
                "tokens": round(tokens / np.size(cons), 1),
                "cons": accuracy.mean,
                "low": accuracy.low,
                "high": accuracy.high})
    return points


def launched_counts(n):
    """2, 4, 8, ... below n, and n."""
    counts = []
    count = 2
    while count < n:
        counts.append(count)
        count *= 2
    return counts + [n]


def scores_of(scorer, records, order):
    """Scores (problems, N) of the paths in `order` (problems, N), which alone are launched."""
    if not callable(scorer):
        return np.take_along_axis(scorer, order, 1)
    subsets = []
    for record, row in zip(records, order):
        subsets.append(record | {"paths": [record["paths"][i] for i in row]})
    return np.reshape(scorer(subsets), order.shape)


def right_votes(chosen, groups, records):
    """1.0 or 0.0 for each problem: is the vote of its chosen paths (problems, keep) right?"""
    verdicts = []
    for row, group, record in zip(chosen, groups, records):
        verdicts.append(vote_is_right(row, group, record["right"]))
    return verdicts


# Figure 5


def against_retention(problems, records, scores, prefix):
    """Figure 5's points of one checkpoint:
    [{prefix, kept, retention, avg, low, high, cons, saved}]. scores: (problems, n).
    Retention halves from 1 on, down to one path."""
    n = scores.shape[1]
    points = []
    for power in reversed(range(n.bit_length())):
        keep = n >> power
        row = worth(problems, records, scores, prefix, keep)
        points.append({
            "prefix": prefix,
            "kept": keep,
            "retention": keep / n,
            "avg": row["avg"].mean,
            "low": row["avg"].low,
            "high": row["avg"].high,
            "cons": row["cons"].mean,
            "saved": row["saved"]})
    return points


# The run


def other_scorers(stored, judge, prefix, window):
    """Types I to III, as `against_tokens` takes them. judge: its (Decoder, Tokenizer), or None."""
    def jaccard(records):
        return redundancy(records, prefix)

    scorers = {"Jaccard (I)": jaccard}
    if judge is not None:
        rewards = judge_scores(*judge, stored.tokenizer, stored.problems, stored.records, prefix)
        scorers[JUDGE] = rewards.reshape(stored.shape)
    for name, scores in confidence(stored.model, stored.records, prefix, window).items():
        scorers[name] = scores.reshape(stored.shape)
    return scorers


def draw_curves(file, points, line, x, y, x_label, y_label, legend):
    """Curves of y over x as SVG, one for each value of a point's `line`; the interval is a band."""
    def column(points, key):
        return [point[key] for point in points]

    figure = matplotlib.figure.Figure((7, 5), layout="constrained")
    axes = figure.subplots()
    for number, name in enumerate(dict.fromkeys(column(points, line))):
        own = [point for point in points if point[line] == name]
        style = "-" if number < COLOURS else "--"
        axes.plot(column(own, x), column(own, y), style, marker="o", markersize=3, label=str(name))
        axes.fill_between(column(own, x), column(own, "low"), column(own, "high"), alpha=0.1)
    axes.set_xscale("log", base=2)
    axes.set(xlabel=x_label, ylabel=y_label)
    axes.legend(title=legend, fontsize="small")
    content = io.BytesIO()
    figure.savefig(content, format="svg")
    write_atomic(file, content.getvalue())


def draw_figures(figure4, figure5, retention, out):
    """Both figures' curves, where matplotlib is installed."""
    if matplotlib is None:
        print("matplotlib is not installed: no curves are drawn, the CSV files hold their points")
        return
    draw_curves(
        out / "figure4.svg", figure4, line="scorer",
        x="tokens", x_label="tokens a problem",
        y="cons", y_label="accuracy of the vote", legend=f"retention {retention:g}")
    draw_curves(
        out / "figure5.svg", figure5, line="prefix",
        x="retention", x_label="retention",
        y="avg", y_label="mean accuracy of the kept paths", legend="checkpoint")


def main(settings):
    """Both figures as CSV, and as SVG with matplotlib; the last line is one JSON object."""
    share = settings.retention
    require("retention", 0 < share <= 1, share, "a share in (0, 1]")
    require_positive(settings, "prefix", "window")
    require_targets(
        settings.out, "figure4.csv", "figure5.csv", "figure4.svg", "figure5.svg")
    stored = open_stored(settings)
    judge = load_judge(settings)
    prefix = settings.prefix
    if prefix is None:
        prefix = stored.stop.trained_for()[0]
    window = settings.window
    if window is None:
        window = max(1, prefix // 8)

    chances = {}  # checkpoint -> STOP's scores (problems, n)
    for length in [prefix, *stored.prefixes]:
        if length not in chances:
            chances[length] = stop_scores(stored, length)
    scorers = other_scorers(stored, judge, prefix, window)
    scorers[STOP] = chances[prefix]
    permutations = orders(stored.records, settings.draws, settings.seed)
    figure4 = against_tokens(
        stored.problems, stored.records, scorers, prefix, share, permutations, reread={JUDGE})
    figure5 = []
    for length in stored.prefixes:
        figure5 += against_retention(stored.problems, stored.records, chances[length], length)

    out = Path(settings.out)
    out.mkdir(parents=True, exist_ok=True)
    write_table(out / "figure4.csv", figure4)
    write_table(out / "figure5.csv", figure5)
    draw_figures(figure4, figure5, share, out)
    result = {"out": str(out), "problems": len(stored.records)}
    line = "{scorer:30} {tokens:10.1f} tokens, cons {cons:.3f} [{low:.3f}, {high:.3f}]"
    for point in figure4:
        if point["paths"] == settings.n:
            print(line.format(**point))
            result[point["scorer"]] = round(point["cons"], 4)
    print(json.dumps(result))


if __name__ == "__main__":
    command_line(Settings, main)
