"""What any scorer could reach at a checkpoint, and how far STOP goes (beyond the paper).

    python studies/ceiling.py                                     # the embedded toy: its STOP
    python studies/ceiling.py --model M --stop S --data test.jsonl --prefixes 512,1024 --rollouts 32

The best score of a prefix is its own chance q to end right. It is not known, but K fresh rollouts
of the prefix tell of it: x of them end right. To keep the k prefixes of most x and to count their x
as well flatters (the lucky ones are chosen); to choose by one half of the rollouts and count the
other (`halves`) is honest but falls short, as half the rollouts choose worse than q. The ceiling
takes the noise out:

    x | q ~ Binomial(K, q),   q ~ a histogram on a grid, one for each problem
    histogram_p ~ sum over its prefixes of P(q | x) + SHARED * histogram of all problems      (EM)
    ceiling = mean over problems and draws of the mean of the k largest of q_1 .. q_N,
              q_i ~ P(q | x_i)

Prefixes that are equal have one q; each of their paths counts. Equal prefixes are rolled out once:
their number says how much there is to choose from. STOP's and random's values are means of x / K
over what they keep, which no choice has touched. `share`: of the way from random to the ceiling,
how much STOP goes. Intervals: 95%, by bootstrap over problems.
"""
import contextlib
import dataclasses
import json
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))
import train
from commands import train as train_command
from engine.protocol import no_number
from engine.stored import model_digest, roll_out
from eval import cell, select
from plumbing import processes
from plumbing.command_line import Common, command_line, option, require_positive
from plumbing.records import locked, write_atomic
from plumbing.statistics import Interval, interval
from shared import StoredSettings, open_stored, stop_scores

GRID = np.linspace(0, 1, 65)  # the values that q may have
SHARED = 1.0                  # prefixes' worth of the histogram of all problems
ROUNDS = 200                  # of EM
DRAWS = 200                   # of all q
LAUNCHED = (6, 8, 10, 12, 16, 20, 24, 28, 32, 36, 40, 48, 64)
KEPT = (1, 2, 4, 8, 16)


@dataclasses.dataclass(kw_only=True)
class Settings(StoredSettings):
    """What `python studies/ceiling.py` can be told."""
    out: str = option("runs/ceiling", "folder for the rollouts and ceiling.json")
    problems: int | None = option(60, "only the first so many problems")
    rollouts: int = option(16, "fresh rollouts of a prefix")
    keep: int = option(8, "paths kept, in the table")


# The rollouts


def distinct(paths, checkpoint):
    """For each path the number of the first one that has the same prefix."""
    firsts = {}
    return [firsts.setdefault(tuple(path[:checkpoint]), i) for i, path in enumerate(paths)]


def successes(stored, checkpoint, settings, folder):
    """How many of K rollouts of each path's prefix end right, (problems, n); equal prefixes share
    theirs. Stored in the folder, and taken up where a killed run stopped."""
    groups = [distinct(record["paths"], checkpoint) for record in stored.records]
    cuts = []
    for record, problem, group in zip(stored.records, stored.problems, groups):
        cuts += [train.Cut(record, problem, number, checkpoint) for number in sorted(set(group))]
    folder.mkdir(parents=True, exist_ok=True)
    common = {field.name: getattr(settings, field.name) for field in dataclasses.fields(Common)}
    how = train_command.Settings(**common, prefix=str(checkpoint), rollouts=settings.rollouts)
    prompts = [record["prompt_ids"] for record in stored.records]
    limit = train.require_room(stored.model, prompts, how)
    labels = roll_out(stored.model, stored.tokenizer, cuts, limit, how, folder)
    by_prefix = {(label["id"], label["path"]): label["successes"] for label in labels}
    counts = []
    for record, group in zip(stored.records, groups):
        counts.append([by_prefix[record["id"], first] for first in group])
    return np.array(counts), np.array(groups)


# The ceiling


def likelihood(counts, K):
    """P(x | q) up to a constant, for x successes of K: (prefixes,) -> (prefixes, grid)."""
    x = np.asarray(counts)[:, None]
    with np.errstate(divide="ignore", invalid="ignore"):
        right = np.where(x > 0, x * np.log(GRID), 0.0)
        wrong = np.where(x < K, (K - x) * np.log1p(-GRID), 0.0)
    logs = right + wrong
    return np.exp(logs - logs.max(1, keepdims=True))


def normalised(weights):
    """Weights (..., grid) that sum to 1."""
    return weights / weights.sum(-1, keepdims=True)


def posteriors(counts_by_problem, K):
    """P(q | x) of the different prefixes of each problem: [(prefixes,)] -> [(prefixes, grid)].

    The prior of a problem is a histogram of its own, which leans on that of all problems; both are
    found by EM."""
    likelihoods = [likelihood(counts, K) for counts in counts_by_problem]
    overall = np.full(len(GRID), 1 / len(GRID))
    own = [overall] * len(likelihoods)
    for _ in range(ROUNDS):
        totals = []
        for i, chances in enumerate(likelihoods):
            total = normalised(chances * own[i]).sum(0)
            own[i] = normalised(total + SHARED * overall)
            totals.append(total)
        overall = normalised(np.sum(totals, 0))
    return [normalised(chances * prior) for chances, prior in zip(likelihoods, own)]


def draw_chances(posterior, generator):
    """DRAWS values of each prefix's q: (prefixes, grid) -> (DRAWS, prefixes)."""
    cumulative = posterior.cumsum(1)
    noise = generator.random((DRAWS, len(posterior), 1))
    places = (noise > cumulative[None] - 1e-12).sum(-1)
    return GRID[np.minimum(places, len(GRID) - 1)]


def best_mean(values, keep):
    """The mean of the `keep` largest along the last axis."""
    return np.sort(values, axis=-1)[..., -keep:].mean(-1)


class Ceiling:
    """What the rollouts of one checkpoint say. counts (problems, n): successes of K for each path's
    prefix; groups (problems, n): the first path with the same prefix."""

    def __init__(self, counts, groups, K, seed=0):
        self.counts = counts
        self.groups = groups
        self.K = K
        firsts = [np.unique(group) for group in groups]
        found = posteriors([row[first] for row, first in zip(counts, firsts)], K)
        generator = np.random.default_rng(seed)
        self.chances = []  # (DRAWS, n) a problem
        for first, group, posterior in zip(firsts, groups, found):
            drawn = draw_chances(posterior, generator)
            self.chances.append(drawn[:, np.searchsorted(first, group)])
        self.generator = generator

    def reach(self, launched, keep):
        """The ceiling (problems,) of the mean of `keep` of the first `launched` paths."""
        values = [best_mean(chances[:, :launched], keep).mean() for chances in self.chances]
        return np.array(values)

    def naive(self, launched, keep):
        """The best by all rollouts, counted by the same ones: flattered."""
        return best_mean(self.counts[:, :launched] / self.K, keep)

    def halves(self, launched, keep):
        """The best by one half of the rollouts, counted by the other, mean over 20 ways to
        halve."""
        values = []
        for counts, group in zip(self.counts[:, :launched], self.groups[:, :launched]):
            half = self.K // 2
            _, first, which = np.unique(group, return_index=True, return_inverse=True)
            own = counts[first]
            means = []
            for _ in range(20):
                chosen = self.generator.hypergeometric(own, self.K - own, half)
                rest = (own - chosen) / (self.K - half)
                best = select(chosen[which], keep)
                means.append(rest[which][best].mean())
            values.append(np.mean(means))
        return np.array(values)

    def value(self, scores, keep):
        """The mean of x / K over the best `keep` by scores (problems, n): (problems,)."""
        kept = np.array([select(row, keep) for row in scores])
        return np.take_along_axis(self.counts, kept, 1).mean(1) / self.K


def share_of_the_way(low, value, high, seed=0, draws=2000):
    """The Interval of (value - low) / (high - low), each a mean over problems (problems,)."""
    generator = np.random.default_rng(seed)
    chosen = generator.integers(0, len(low), (draws, len(low)))
    gained = (value - low)[chosen].mean(1)
    possible = (high - low)[chosen].mean(1)
    with np.errstate(invalid="ignore", divide="ignore"):  # nan where there is nothing to gain
        bounds = np.quantile(gained / possible, (0.025, 0.975)).tolist()
        mean = float((value - low).mean() / (high - low).mean())
    return Interval(mean, *bounds)


# The report


def table(rows):
    """The rows in Markdown; [low, high]: 95% interval over problems."""
    names = ("random", "STOP", "ceiling", "share", "halves", "naive")
    lines = [f"| checkpoint | different prefixes | {' | '.join(names)} |",
             "|" + " --- |" * (2 + len(names))]
    for row in rows:
        cells = [str(row["checkpoint"]), f"{row['different']:.1f}"]
        cells += [cell(row[name]) for name in names]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main(settings):
    """Roll out, estimate, report; the last line is one JSON object."""
    require_positive(settings, "rollouts", "keep")
    if settings.keep > settings.n:
        raise ValueError(f"keep: found {settings.keep}, expected 1 to n = {settings.n}")
    if settings.rollouts < 2:
        raise ValueError(
            f"rollouts: found {settings.rollouts}, expected at least 2, for two halves")
    stored = open_stored(settings)
    if settings.prefixes is None:
        stored.prefixes = sorted(stored.stop.trained_for())
    limit = settings.max_new_tokens or stored.stop.trained_limit()
    settings = dataclasses.replace(settings, max_new_tokens=limit)
    out = Path(settings.out)
    out.mkdir(parents=True, exist_ok=True)
    with locked(out) if processes.is_first() else contextlib.nullcontext():
        run(settings, stored, out)


def run(settings, stored, out):
    """The whole study, in its folder."""
    rows = []
    reached = []
    for checkpoint in stored.prefixes:
        counts, groups = successes(stored, checkpoint, settings, out / f"at-{checkpoint}")
        known = Ceiling(counts, groups, settings.rollouts, settings.seed)
        scores = stop_scores(stored, checkpoint)
        random = counts.mean(1) / settings.rollouts
        value = known.value(scores, settings.keep)
        ceiling = known.reach(settings.n, settings.keep)
        rows.append({
            "checkpoint": checkpoint,
            "different": float(np.mean([len(set(group)) for group in groups.tolist()])),
            "random": interval(random),
            "STOP": interval(value),
            "ceiling": interval(ceiling),
            "share": share_of_the_way(random, value, ceiling),
            "halves": interval(known.halves(settings.n, settings.keep)),
            "naive": interval(known.naive(settings.n, settings.keep))})
        for launched in LAUNCHED:
            for kept in KEPT:
                if kept <= launched <= settings.n:
                    avg = float(known.reach(launched, kept).mean())
                    reached.append(
                        {"checkpoint": checkpoint, "launched": launched, "kept": kept, "avg": avg})
    if processes.is_first():
        text = (f"{len(stored.records)} problems, {settings.n} paths each, {settings.keep} kept, "
                f"{settings.rollouts} rollouts a prefix\n\n{table(rows)}")
        print(text)
        write_atomic(out / "ceiling.md", text + "\n")
        content = {
            "settings": dataclasses.asdict(settings), "model": model_digest(stored.model),
            "rows": rows, "ceilings": reached}
        write_atomic(out / "ceiling.json", strict_json(content, indent=1) + "\n")
        shares = {f"share {row['checkpoint']}": round(row["share"].mean, 4) for row in rows}
        print(strict_json({"out": settings.out, **shares}))


def strict_json(value, indent=None):
    """JSON text in which null stands for what is not defined."""
    return json.dumps(json.loads(json.dumps(value), parse_constant=no_number), indent=indent)


if __name__ == "__main__":
    command_line(Settings, main, shares_work=True)
