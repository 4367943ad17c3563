"""How many paths to keep: the paper's "interaction scaling law" (section 8), fitted anew.

    python eval.py && python studies/guideline.py           # the embedded toy
    python studies/guideline.py --model M --data test.jsonl --prefixes 512,1024,2048 \\
        --budgets 140000,200000,300000

    1 / gamma = a * C^b * L_prefix^c / L_task^d

Lengths in units of 1,024 tokens; C: all tokens of a problem. The problems are dealt by their mean
path length into `groups`; L_task is the mean length of a group's paths, so that d can be seen. In a
cell (group, checkpoint, budget) a retention gamma buys N launched paths,

    N = C / (L_prefix + gamma * (L_task - L_prefix)), rounded down,

of which STOP keeps gamma * N, rounded. Its worth is the accuracy of their vote, averaged over the
group's problems and random orders of their paths, of which the first N are launched. The best gamma
of a cell has the highest accuracy, a tie going to the larger. A cell counts if every gamma of the
grid that keeps a path at all needs no more paths than are stored, and two of them can be compared.
Then ln(1 / gamma) is fitted by least squares on 1, ln C, ln L_prefix and -ln L_task, every cell
with the same weight.
"""
import dataclasses
import json
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))
from eval import select
from plumbing.command_line import command_line, option, require_positive
from plumbing.records import write_atomic
from shared import (
    StoredSettings, group_answers, numbers, open_stored, orders, path_lengths, require,
    require_targets, stop_scores, vote_is_right, write_table)
from stop import retention

UNIT = 1024  # tokens; the paper's coefficients are in these
PAPER = {"a": 1.17e4, "b": 0.46, "c": 0.40, "d": 4.55}
LENGTHS = ("budget", "prefix", "task")  # C, L_prefix, L_task
USUAL_PATHS = (2, 3, 4, 6, 8, 12)  # the budgets that are tried by default


@dataclasses.dataclass(kw_only=True)
class Settings(StoredSettings):
    """What `python studies/guideline.py` can be told."""
    out: str = option("runs/guideline", "folder for cells.csv and guideline.json")
    retentions: str = option(
        "0.5,0.3333,0.25,0.1667,0.125,0.0833,0.0625,0.0417,0.03125", "grid (paper: 1/2 to 1/32)")
    budgets: str | None = option(
        None, "tokens a problem (default: those of 2, 3, 4, 6, 8 and 12 usual paths)")
    groups: int = option(3, "groups of problems by length")
    budget: float | None = option(
        None, "recommend for this many tokens (default: the median of the cells)")
    prefix: float | None = option(None, "and this checkpoint (default: the median of the cells)")
    task: float | None = option(None, "and this usual response (default: the median of the cells)")


# The sweep


class Purchase(NamedTuple):
    """What a budget buys at a retention."""
    launched: int
    kept: int


def afford(budget, prefix, task, gamma):
    """The Purchase of `budget` tokens, for a usual response of `task` tokens."""
    launched = int(budget / (prefix + gamma * (task - prefix)))
    return Purchase(launched, round(gamma * launched))


def purchases(budget, prefix, task, gammas, stored):
    """{gamma: Purchase} of a cell, the largest gamma first. Empty where the cell does not count."""
    bought = {}
    for gamma in sorted(gammas, reverse=True):
        purchase = afford(budget, prefix, task, gamma)
        if purchase.kept >= 1:
            bought[gamma] = purchase
    most = max((purchase.launched for purchase in bought.values()), default=0)
    counts = prefix < task and len(bought) >= 2 and most <= stored
    return bought if counts else {}


@dataclasses.dataclass
class Group:
    """Problems of like length, and what their paths are worth."""
    task: float          # mean tokens of their paths
    members: np.ndarray  # indices among all problems
    answers: list        # per problem, which of its paths vote together (shared.group_answers)
    right: list          # per problem, which of its paths are right


def group_problems(problems, records, count):
    """`count` Groups of problems, by the mean length of their paths."""
    lengths = path_lengths(records).mean(1)
    groups = []
    for members in np.array_split(np.argsort(lengths, kind="stable"), count):
        answers = [group_answers(records[i], problems[i].kind) for i in members]
        right = [records[i]["right"] for i in members]
        groups.append(Group(float(lengths[members].mean()), members, answers, right))
    return groups


def vote_accuracy(group, purchase, scores, permutations):
    """Accuracy of the vote of the best `kept` of the first `launched` paths of each order, averaged
    over the group's problems and the orders. scores (problems, n) and permutations (draws,
    problems, n) are those of all problems."""
    verdicts = []
    for order in permutations:
        for i, answers, right in zip(group.members, group.answers, group.right):
            launched = order[i, :purchase.launched]
            best = launched[select(scores[i, launched], purchase.kept)]
            verdicts.append(vote_is_right(best, answers, right))
    return sum(verdicts) / len(verdicts)


def sweep(problems, records, scores, budgets, gammas, group_count, permutations):
    """The cells that count, [{task, prefix, budget, gamma, accuracy, tried}], and how many do not.
    scores: {checkpoint: (problems, n)}; gamma: the best retention; tried: among how many."""
    stored = permutations.shape[2]
    cells = []
    left_out = 0
    for group in group_problems(problems, records, group_count):
        for prefix, grid in scores.items():
            for budget in budgets:
                bought = purchases(budget, prefix, group.task, gammas, stored)
                if not bought:
                    left_out += 1
                    continue
                accuracies = {}
                for gamma, purchase in bought.items():
                    accuracies[gamma] = vote_accuracy(group, purchase, grid, permutations)
                best = max(accuracies, key=accuracies.get)  # the first of equals: the largest
                cells.append({
                    "task": group.task,
                    "prefix": prefix,
                    "budget": budget,
                    "gamma": best,
                    "accuracy": accuracies[best],
                    "tried": len(accuracies)})
    return cells, left_out


# The law


def column(cells, key):
    """One value of every cell: (cells,) float64."""
    return np.array([cell[key] for cell in cells], float)


def fit(cells):
    """{a, b, c, d, spread, errors} by least squares in logs.

    spread: standard deviation of ln(1 / gamma) about the fit. errors: standard errors of ln a, b, c
    and d, as if the cells were independent (they share paths, so the true ones are larger); None
    where there are but four cells. ValueError where the cells do not tell the coefficients apart.
    """
    for key in LENGTHS:
        different = len(set(column(cells, key)))
        if different < 2:
            raise ValueError(
                f"{key}: found {different} value in the {len(cells)} cells that count, expected "
                "several, to fit its exponent: try other --budgets, --prefixes, --groups, or a "
                "larger --n")
    C = np.log(column(cells, "budget") / UNIT)
    L_prefix = np.log(column(cells, "prefix") / UNIT)
    L_task = np.log(column(cells, "task") / UNIT)
    terms = np.stack((np.ones(len(cells)), C, L_prefix, -L_task), axis=1)  # (cells, 4)
    target = -np.log(column(cells, "gamma"))
    solution, _, rank, _ = np.linalg.lstsq(terms, target, rcond=None)
    if rank < 4:
        raise ValueError(
            f"cells: found {len(cells)} that determine {rank} coefficients, expected 4: budget, "
            "prefix and task go together in them; try other --budgets, --prefixes or --groups")

    rest = target - terms @ solution
    free = len(cells) - 4
    errors = None
    if free > 0:
        covariance = np.linalg.inv(terms.T @ terms) * (rest @ rest) / free
        errors = np.sqrt(np.diag(covariance)).tolist()
    ln_a, b, c, d = solution.tolist()
    return {
        "a": float(np.exp(ln_a)),
        "b": b,
        "c": c,
        "d": d,
        "spread": float(np.std(rest)),
        "errors": errors}


def recommend(law, budget, prefix, task):
    """Retention by a law {a, b, c, d}, for lengths in tokens; at most 1."""
    C = budget / UNIT
    L_prefix = prefix / UNIT
    L_task = task / UNIT
    inverse = law["a"] * C ** law["b"] * L_prefix ** law["c"] / L_task ** law["d"]
    return min(1.0, 1 / inverse)


# The run


def show(law, cells, left_out, usual):
    """Print the fitted law beside the paper's."""
    print(f"{len(cells)} cells, {left_out} left out (see --help); usual path: {usual:.0f} tokens")
    print("| law | a | b | c | d |\n|---|---|---|---|---|")
    line = "| {name} | {a:.4g} | {b:.3f} | {c:.3f} | {d:.3f} |"
    print(line.format(name="fitted", **law))
    print(line.format(name="paper (1.5B; AIME24, GPQA-D)", **PAPER))
    errors = "none, of four cells"
    if law["errors"] is not None:
        errors = ", ".join(f"{error:.2g}" for error in law["errors"])
    print(f"spread of ln(1 / gamma) about the fit: {law['spread']:.3f}; "
          f"standard errors of ln a, b, c, d: {errors}")


def main(settings):
    """Sweep, fit, recommend; the last line is one JSON object."""
    require_positive(settings, "groups", *LENGTHS)
    gammas = numbers("retentions", settings.retentions, float)
    require("retentions", max(gammas) <= 1, max(gammas), "at most 1")
    budgets = None
    if settings.budgets is not None:
        budgets = numbers("budgets", settings.budgets, float)
    require_targets(settings.out, "cells.csv", "guideline.json")
    stored = open_stored(settings)
    count = len(stored.problems)
    fits = settings.groups <= count
    require("groups", fits, settings.groups, f"1 to {count}, the number of problems")
    usual = float(path_lengths(stored.records).mean())
    if budgets is None:
        budgets = [round(usual * paths) for paths in USUAL_PATHS]
    scores = {prefix: stop_scores(stored, prefix) for prefix in stored.prefixes}
    permutations = orders(stored.records, settings.draws, settings.seed)
    cells, left_out = sweep(
        stored.problems, stored.records, scores, budgets, gammas, settings.groups, permutations)
    if not cells:
        raise ValueError(
            f"budgets: found none whose retentions can be compared with {settings.n} stored paths, "
            "expected some: try other --budgets or --prefixes, or a larger --n")

    out = Path(settings.out)
    out.mkdir(parents=True, exist_ok=True)
    write_table(out / "cells.csv", cells)
    law = fit(cells)
    show(law, cells, left_out, usual)
    at = {}
    for key in LENGTHS:
        at[key] = getattr(settings, key)
        if at[key] is None:
            at[key] = float(np.median(column(cells, key)))
    ours = recommend(law, **at)
    paper = retention(**at)
    lengths = "C = {budget:.0f}, L_prefix = {prefix:.0f}, L_task = {task:.0f} tokens".format(**at)
    print(f"at {lengths}: keep {ours:.4f} (1 / {1 / ours:.2f}); "
          f"by the paper's coefficients {paper:.3g} (1 / {1 / paper:.3g})")
    result = {"cells": len(cells)} | law | at | {"gamma": ours, "gamma_paper": paper}
    whole = result | {"settings": dataclasses.asdict(settings)}
    write_atomic(out / "guideline.json", json.dumps(whole, indent=1) + "\n")
    last = {"out": str(out), "errors": result.pop("errors")}
    for key, value in result.items():
        last[key] = float(f"{value:.5g}")
    print(json.dumps(last))


if __name__ == "__main__":
    command_line(Settings, main)
