"""The best answer for a given number of tokens: which plan to run for a budget (beyond the paper).

    python studies/budget.py --budgets 700,1000,1400,2100,3300 --write      # the embedded toy
    torchrun --nproc-per-node 2 -- studies/budget.py --budgets ...          # the same, faster

The paper fixes the checkpoint and tunes the share of paths kept. Here (N, checkpoint, keep),
cascades of checks and branching are chosen together. Every plan of a grid is run on the first half
of the problems, with several seeds of paths; for each budget the plan with the best score-weighted
vote is chosen among those whose tokens fit (the upper end of the mean's 95% interval), ties going
to avg, and reported on the other half, which took no part in the choice. Intervals: 95%, by
bootstrap over problems of the mean over seeds.

"Chosen from": plans of one check without branches; these and cascades of checks; plans of one
check with or without branches; all plans, cascades that branch included.

All plans are run for real, branches with noise of their own included; stretches that plans have in
common are decoded once (forest.py). Tokens as the paper counts them: every decoded token, a shared
prefix once. With --cost seconds a measured cost model takes their place:

    seconds = prompt + a * steps + b * tokens + c * checks + d * rows checked

Beside the planner's choice: no pruning; the paper's default, 64 launched at STOP's usual
checkpoint, 8 kept; the paper's guideline for the budget; minus entropy under the same planner (by
its majority, as it gives no weights, and on the first seed of paths); the ceiling
(studies/ceiling.py) of plans of one check. Then, for two plans, how much hangs on the score.
"""
import contextlib
import dataclasses
import functools
import json
import operator
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import plot
from commands.common import open_model, stop_folder
from engine.budget import by_guideline, least_budget
from engine.forecast import decoding_rate
from engine.refill import generate
from engine.stored import stop_digest
from eval import cell
from forest import (
    VALUES, ChangedSignal, EntropySignal, Field, Plan, StopSignal, at_random, blurred, measure,
    upside_down)
from plumbing import processes
from plumbing.budget_plan import METRICS, BudgetPlan, Stage, write_plans
from plumbing.command_line import command_line, option, require_choice, require_positive
from plumbing.files import require_target
from plumbing.records import locked, write_atomic
from plumbing.statistics import Interval, interval
from sample import prefill, sampling_of, validate_prompts
from shared import (
    StopSettings, load_problems, load_stop, numbers, read_ceilings, read_seeds, require,
    write_table)

LAUNCHED = (6, 8, 10, 12, 16, 20, 24, 28, 32, 36, 40, 48, 64)
ENDINGS = (  # (keep, branch) of an only check
    (4, 1), (8, 1), (16, 1), (2, 2), (4, 2), (8, 2), (1, 4), (2, 4), (4, 4))
LAUNCHED_BEFORE_MORE = (8, 12, 20, 24, 36, 40)  # paths before a cascade
SHARES = ((2, 1), (2, 2), (4, 4))                # an earlier check keeps N / first, and branches
LAST_OF_MORE = ((8, 1), (4, 2), (2, 4))          # (keep, branch) of a cascade's last check
USUAL_PATHS = (6, 8, 12, 17, 28)  # the budgets by default, in usual paths
FAMILIES = ("one check", "cascade", "branching", "all plans")


@dataclasses.dataclass(kw_only=True)
class Settings(StopSettings):
    """What `python studies/budget.py` can be told."""
    out: str = option("runs/budget", "folder for table, figure, and the measured plans")
    problems: int | None = option(None, "only the first so many problems")
    budgets: str | None = option(
        None, "tokens a problem, as in 700,1400 (default: those of 6, 8, 12, 17 and 28 usual "
        "paths)")
    seeds: str = option("0,1,2", "seeds of paths, added to --seed, as in 0,1,2")
    checkpoints: str | None = option(None, "as in 24,40 (default: all that STOP was trained for)")
    n: int = option(64, "most paths launched, and those of the paper's default")
    keep: int = option(8, "paths kept by the paper's default")
    cost: str = option(
        "tokens", "tokens; or seconds, of a measured cost model: budgets are in seconds then")
    compare: bool = option(True, "other signals too: minus entropy, and scores made worse")
    ceiling: str | None = option(
        None, "ceiling.json of studies/ceiling.py, for the column of ceilings")
    write: bool = option(False, "write plan.json into the STOP's folder")


# The plans


def expected_tokens(plan, usual):
    """About how many tokens a plan takes where a usual path has `usual`."""
    tokens = 0
    rows = plan.n
    start = 0
    for stage in plan.stages:
        end = min(stage.checkpoint, usual)
        tokens += rows * (end - start)
        rows = stage.keep * stage.branch
        start = end
    return tokens + rows * (usual - start)


def one_check(n, checkpoints):
    """Plans of one check."""
    plans = []
    for launched in LAUNCHED:
        for checkpoint in checkpoints:
            for keep, branch in ENDINGS:
                if launched <= n and keep < launched:
                    plans.append(Plan(launched, (Stage(checkpoint, keep, branch),)))
    return plans


def more_checks(plans, checkpoints):
    """For each plan so far one more check at a later checkpoint, before the last one: it keeps a
    share of the paths, and may branch."""
    longer = []
    for plan in plans:
        last = plan.stages[-1].checkpoint if plan.stages else 0
        rows = plan.stages[-1].keep * plan.stages[-1].branch if plan.stages else plan.n
        for checkpoint in checkpoints:
            for divisor, branch in SHARES:
                if checkpoint > last and rows // divisor >= 2:
                    stage = Stage(checkpoint, rows // divisor, branch)
                    longer.append(Plan(plan.n, (*plan.stages, stage)))
    return longer


def cascades(n, checkpoints):
    """Plans of two or three checks."""
    starts = [Plan(launched, ()) for launched in LAUNCHED_BEFORE_MORE if launched <= n]
    two = more_checks(starts, checkpoints)
    three = [plan for plan in more_checks(two, checkpoints)
             if plan.stages[0].branch == plan.stages[1].branch]
    plans = []
    for plan in two + three:
        rows = plan.stages[-1].keep * plan.stages[-1].branch
        for checkpoint in checkpoints:
            for keep, branch in LAST_OF_MORE:
                if checkpoint > plan.stages[-1].checkpoint and keep < rows:
                    plans.append(Plan(plan.n, (*plan.stages, Stage(checkpoint, keep, branch))))
    return plans


def grid(n, checkpoints, least, most, usual):
    """All plans that take about `least` to `most` tokens, each once."""
    checkpoints = sorted(checkpoints)
    plans = []
    for plan in one_check(n, checkpoints) + cascades(n, checkpoints):
        if least <= expected_tokens(plan, usual) <= most:
            plans.append(plan)
    return list(dict.fromkeys(plans))


def in_family(plan, family):
    """Whether a plan is one of a family of FAMILIES."""
    branches = any(stage.branch > 1 for stage in plan.stages)
    if family == "one check":
        return len(plan.stages) == 1 and not branches
    if family == "cascade":
        return not branches
    if family == "branching":
        return len(plan.stages) == 1
    return True


def without_pruning(budget, usual, n):
    """As many whole paths as a budget buys."""
    return Plan(min(max(1, int(budget / usual)), n), ())


# Costs


class CostModel(NamedTuple):
    """Seconds of a question: of its prompt, of a decoding step, a token, a check and a checked
    row."""
    prompt: float
    step: float
    token: float
    check: float
    row: float

    def seconds(self, values, checks):
        """values (..., VALUES) of plans with so many checks -> (...)."""
        tokens = values[..., VALUES.index("tokens")]
        steps = values[..., VALUES.index("steps")]
        checked = values[..., VALUES.index("checked")]
        return (self.prompt + self.step * steps + self.token * tokens
                + self.check * checks + self.row * checked)


@torch.inference_mode()
def measure_costs(model, stop, prompts, n, limit, sampling):
    """The CostModel of this machine: straight lines through the times of n rows and of an
    eighth."""
    prompt = max(prompts, key=len)
    rows = [max(1, n // 8), n]
    step_seconds = []
    check_seconds = []
    for count in rows:
        rate = decoding_rate(model, prompt, count, limit, sampling)
        step_seconds.append(count / rate)
        cache, _ = prefill(model, [prompt] * count, stop.m)
        check_seconds.append(time_of(functools.partial(stop, model, cache)))
    per_row, step = np.polyfit(rows, step_seconds, 1).tolist()
    row, check = np.polyfit(rows, check_seconds, 1).tolist()
    reading = time_of(functools.partial(prefill, model, [prompt]))
    return CostModel(reading, max(0.0, step), per_row, max(0.0, check), row)


def time_of(work, times=5):
    """The median of the seconds that some work takes."""
    seconds = []
    for _ in range(times):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return float(np.median(seconds))


# The choice


class Measured:
    """What plans are worth on some problems, all seeds together: values (problems, seeds, P,
    VALUES) and their costs (problems, seeds, P), in tokens or seconds."""

    def __init__(self, plans, values, costs):
        self.plans = plans
        self.values = values
        if costs is None:
            self.costs = self.column("tokens")
        else:
            checks = np.array([len(plan.stages) for plan in plans])
            self.costs = costs.seconds(values, checks)

    def column(self, name):
        """One of VALUES: (problems, seeds, P)."""
        return self.values[..., VALUES.index(name)]

    def fitting(self, budget):
        """Numbers of the plans that keep to a budget: so does the upper end of the 95% interval of
        their mean cost."""
        means = self.costs.mean(1)  # (problems, P): over seeds
        error = means.std(0, ddof=1) / len(means) ** 0.5
        return np.flatnonzero(means.mean(0) + 1.96 * error <= budget)

    def best(self, budget, family, criterion):
        """The plan of the best mean criterion (one of VALUES) among those of a family that keep to
        a budget; ties go to avg, then to the lower cost. None if none does."""
        goal = self.column(criterion).mean((0, 1))
        avg = self.column("avg").mean((0, 1))
        cost = self.costs.mean((0, 1))
        fitting = [i for i in self.fitting(budget) if in_family(self.plans[i], family)]
        if not fitting:
            return None
        order = np.lexsort((-cost[fitting], avg[fitting], goal[fitting]))
        return self.plans[fitting[order[-1]]]

    def row(self, plan):
        """The Interval of each of VALUES, and of the cost, of a plan; `per_problem`: means over the
        seeds (problems,)."""
        i = self.plans.index(plan)
        own = {name: self.column(name)[..., i].mean(1) for name in VALUES}
        own["cost"] = self.costs[..., i].mean(1)
        row = {name: interval(values) for name, values in own.items()}
        return row | {"plan": plan, "per_problem": own}


def measured(field, signal, plans, samplings, costs):
    """The Measured of plans with a signal, on the problems of a Field."""
    by_seed = [measure(field, signal, plans, sampling) for sampling in samplings]
    return Measured(plans, np.stack(by_seed, axis=1), costs)


@dataclasses.dataclass
class Choice:
    """A plan for a budget and where it comes from."""
    budget: float | None  # None: of no budget, as the paper's default
    source: str
    signal: str
    plan: Plan


def choose(budgets, known, sources, signal, criterion):
    """The Choices of the planner: for each budget the best plan of each family, from what is known
    of plans on the choosing half."""
    choices = []
    for budget in budgets:
        for family in sources:
            plan = known.best(budget, family, criterion)
            if plan is not None:
                choices.append(Choice(budget, family, signal, plan))
    return choices


def references(settings, budgets, prefix, usual):
    """The Choices of the paper, and of no pruning."""
    choices = [
        Choice(None, "no pruning", "STOP", Plan(settings.n, ())),
        Choice(None, "paper's default", "STOP", Plan(settings.n, (Stage(prefix, settings.keep),)))]
    for budget, tokens in zip(budgets.asked, budgets.tokens):
        whole = without_pruning(tokens, usual, settings.n)
        choices.append(Choice(budget, "no pruning", "STOP", whole))
        if tokens >= least_budget(prefix, usual):  # less pays for no path by the guideline
            launched, kept = by_guideline(tokens, prefix, usual, settings.n)
            guided = Plan(launched, (Stage(prefix, kept),))
            choices.append(Choice(budget, "paper's guideline", "STOP", guided))
    return choices


# How much hangs on the score


def worse_signals(signal):
    """The signals to compare: STOP's score, made worse and worse, and others."""
    return [
        signal,
        ChangedSignal(signal, "STOP, logit noise 1", blurred(1.0), is_chance=True),
        ChangedSignal(signal, "STOP, logit noise 2", blurred(2.0), is_chance=True),
        EntropySignal(),
        ChangedSignal(signal, "random", at_random, is_chance=False),
        ChangedSignal(signal, "STOP upside down", upside_down, is_chance=False)]


# The report


COLUMNS = ("avg", "cons", "weighted", "pass")


def ceiling_of(plan, known):
    """The ceiling of avg for a plan of one check, or None."""
    if len(plan.stages) != 1:
        return None
    stage = plan.stages[0]
    return known.get((stage.checkpoint, plan.n, stage.keep))


def report_rows(choices, rows, default, known_ceilings):
    """One dict of numbers for each Choice; rows: {(signal, plan): Measured.row}."""
    report = []
    for choice in choices:
        row = rows[choice.signal, choice.plan]
        ahead = interval(row["per_problem"]["weighted"] - default["per_problem"]["weighted"])
        line = {
            "budget": choice.budget,
            "source": choice.source,
            "signal": choice.signal,
            "plan": str(choice.plan),
            "tokens": row["tokens"].mean,
            "cost": row["cost"].mean}
        for name in COLUMNS:
            line |= flat(name, row[name])
        line |= flat("ahead", ahead)
        line["ceiling"] = ceiling_of(choice.plan, known_ceilings)
        report.append(line)
    return report


def flat(name, value):
    """An Interval as three columns of a table."""
    return {name: value.mean, f"{name}_low": value.low, f"{name}_high": value.high}


def table(report, title, base):
    """The report in Markdown; [low, high]: 95% interval over problems. base: what `ahead` compares
    with."""
    lines = [
        title, "",
        "| budget | chosen from | signal | plan | tokens | avg | cons | weighted | pass | "
        f"weighted, ahead of {base} | ceiling of avg |",
        "|" + " --- |" * 11]
    for line in report:
        cells = ["" if line["budget"] is None else f"{line['budget']:g}", line["source"],
                 line["signal"], line["plan"], f"{line['tokens']:.0f}"]
        for name in (*COLUMNS, "ahead"):
            cells.append(cell(Interval(line[name], line[f"{name}_low"], line[f"{name}_high"])))
        cells.append("" if line["ceiling"] is None else f"{line['ceiling']:.3f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


CURVES = (  # (chosen from, name, a note below it, colour)
    ("no pruning", "no pruning", "{}, all to the end", "quiet"),
    ("paper's default", "the paper's recipe", "the best {} of {} go on", "ink"),
    ("one check", "one check, tuned", "when, and how many stay", "bad"),
    ("all plans", "checks and branches, tuned", "the best go on as several paths", "high"))


def draw_figure(file, report, problems):
    """Score-weighted votes that are right against tokens: no pruning, the paper's default, and what
    the planner chose among plans of one check and among all. The numbers are drawn as the table
    shows them, so that it can stand for the figure. problems: how many were reported on."""
    curves = []
    for source, name, note, look in CURVES:
        own = [line for line in report if line["source"] == source and line["signal"] == "STOP"]
        if not own:
            continue
        own.sort(key=operator.itemgetter("tokens"))
        if "{}" in note:
            note = note.format(*counts(source, [line["plan"] for line in own]))
        curves.append(plot.Curve(name, note, look, [point_of(line) for line in own]))
    points = [point for curve in curves for point in curve.points]
    tokens = [point.x for point in points]
    x = plot.Axis("tokens a problem (log scale)",
                  plot.log_ticks(min(tokens), max(tokens)), is_log=True)
    ticks = plot.linear_ticks(min(point.y.low for point in points),
                              max(point.y.high for point in points))
    y = plot.Axis("problems whose vote is right", ticks, form=".0%")
    panel = plot.Panel(60, 124, plot.WIDTH - 40, 400, x, y)
    notes = ["A path is one attempt at a problem; those that reach the end vote for its answer.",
             "A check scores unfinished paths; the best go on, their scores weigh their votes.",
             f"Shaded, or as a bar: 95% intervals over {problems} problems."]
    plot.write(file, "Right answers for the tokens spent", notes,
               plot.draw_curves(panel, curves), height=456)


def point_of(line):
    """The figure's point of a row of the report."""
    value = Interval(*[round(line[f"weighted{end}"], 3) for end in ("", "_low", "_high")])
    tokens = round(line["tokens"])
    about = (f"{line['plan']}: {value.mean:.1%} right [{value.low:.1%}, {value.high:.1%}], "
             f"{tokens:,} tokens")
    return plot.Point(tokens, value, about)


def counts(source, plans):
    """What a curve's note tells of its plans, from their texts: of `64, no pruning` how many paths
    there are, of `64 @ 40:8` how many are kept of how many."""
    if source == "no pruning":
        paths = sorted({int(plan.partition(",")[0]) for plan in plans})
        return [f"{paths[0]} paths" if len(paths) == 1 else f"{paths[0]} to {paths[-1]} paths"]
    launched, _, stage = plans[0].partition(" @ ")
    return [stage.partition(":")[2], launched]


# The run


def usual_length(model, prompts, limit, sampling):
    """The mean length of a path, from 8 paths of each of 16 problems."""
    sample = generate(model, prompts[:16], 8, limit, **dataclasses.asdict(sampling))
    return float(np.mean([len(path.ids) for paths in sample for path in paths]))


def open_field(settings):
    """(Field of all problems, the checkpoints of the plans, the usual one first)."""
    model, tokenizer = open_model(settings)
    stop = load_stop(settings, model)
    problems = load_problems(settings)[:settings.problems]
    require("problems", len(problems) >= 4, len(problems), "at least 4, for two halves")
    prompts = [tokenizer.ask(problem) for problem in problems]
    limit = min(stop.limit(model, prompt, settings.max_new_tokens) for prompt in prompts)
    checkpoints = stop.trained_for()
    if settings.checkpoints is not None:
        checkpoints = numbers("checkpoints", settings.checkpoints)
        different = len(set(checkpoints)) == len(checkpoints)
        require("checkpoints", different, settings.checkpoints, "each checkpoint once")
    require("checkpoints", max(checkpoints) < limit, checkpoints, f"less than {limit} new tokens")
    validate_prompts(model, prompts, max(limit, max(checkpoints) + stop.m))
    return Field(model, tokenizer, stop, problems, limit, Path(settings.out)), checkpoints


def write_plan_file(settings, field, reported, rows):
    """plan.json of the choices among all plans, in the STOP's folder."""
    chosen = {
        "by": "score-weighted vote", "problems": len(field.problems) - len(field.problems) // 2,
        "reported_on": len(field.problems) // 2, "seeds": settings.seeds,
        "temperature": settings.temperature, "top_k": settings.top_k, "top_p": settings.top_p}
    plans = []
    for choice in reported:
        if choice.source == "all plans" and choice.signal == "STOP":
            row = rows["STOP", choice.plan]
            expected = {name: round(row[name].mean, 4) for name in METRICS}
            plans.append(
                BudgetPlan(int(choice.budget), choice.plan.n, choice.plan.stages, expected))
    require("budgets", plans, settings.budgets, "one that some plan keeps to: nothing was written")
    folder = stop_folder(settings)
    write_plans(folder, stop_digest(field.stop), chosen, plans)
    print(f"wrote {len(plans)} plans to {folder}/plan.json")


def read_samplings(settings):
    """The Sampling of each of --seeds."""
    base = sampling_of(settings)
    seeds = read_seeds(settings.seeds)
    return [dataclasses.replace(base, seed=base.seed + seed) for seed in seeds]


class Budgets(NamedTuple):
    """The budgets as they were asked for, rising, and about as many tokens."""
    asked: list
    tokens: list


def read_budgets(settings, usual, costs):
    """The Budgets of --budgets, or of some usual paths. costs: a CostModel if they are in
    seconds."""
    per_token = 1.0
    if costs is not None:
        per_token = costs.token + costs.step / settings.n
    if settings.budgets is not None:
        asked = numbers("budgets", settings.budgets, float)
    else:
        asked = [usual * paths * per_token for paths in USUAL_PATHS]
    if costs is None:
        asked = [round(budget) for budget in asked]
    asked = sorted(set(asked))
    return Budgets(asked, [budget / per_token for budget in asked])


def check(settings):
    """ValueError on settings that cannot be."""
    require_positive(settings, "n", "keep", "problems", "max_new_tokens", "batch")
    require_choice(settings, "cost", "tokens", "seconds")
    in_tokens = settings.cost == "tokens" or not settings.write
    require("cost", in_tokens, settings.cost, "tokens, for plan.json")
    require("keep", settings.keep < settings.n, settings.keep, f"less than n = {settings.n}")


def halves(field):
    """Two Fields: the first half of the problems to choose on, the other to report on."""
    middle = len(field.problems) - len(field.problems) // 2
    first = dataclasses.replace(field, problems=field.problems[:middle])
    second = dataclasses.replace(field, problems=field.problems[middle:])
    return first, second


def main(settings):
    """Measure, choose, report; the last line is one JSON object."""
    check(settings)
    samplings = read_samplings(settings)
    field, checkpoints = open_field(settings)
    if settings.write:
        require_target(stop_folder(settings) / "plan.json")
    known_ceilings = {}
    if settings.ceiling is not None:
        known_ceilings = read_ceilings(settings.ceiling, field.model).reached
    field.folder.mkdir(parents=True, exist_ok=True)
    with locked(field.folder) if processes.is_first() else contextlib.nullcontext():
        run(settings, field, checkpoints, samplings, known_ceilings)


def run(settings, field, checkpoints, samplings, known_ceilings):
    """The whole study, in its folder. The problems to report on shape nothing."""
    first, second = halves(field)
    prompts = [field.tokenizer.ask(problem) for problem in first.problems]
    usual = usual_length(field.model, prompts, field.limit, samplings[0])
    costs = None
    if settings.cost == "seconds":
        costs = measure_costs(
            field.model, field.stop, prompts, settings.n, field.limit, samplings[0])
        print(f"cost model, in seconds: {json.dumps(costs._asdict())}")
    budgets = read_budgets(settings, usual, costs)
    plans = grid(settings.n, checkpoints, budgets.tokens[0] / 2, budgets.tokens[-1], usual)
    require("budgets", plans, budgets.asked, f"one that a plan of at most n = {settings.n} paths "
            f"of {usual:.0f} tokens about fills")
    if processes.is_first():
        print(f"{len(plans)} plans, a usual path has {usual:.0f} tokens; chosen on "
              f"{len(first.problems)} problems, reported on {len(second.problems)} others; "
              f"{len(samplings)} seeds of paths", flush=True)

    signal = StopSignal(field.model, field.stop)
    known = measured(first, signal, plans, samplings, costs)
    choices = references(settings, budgets, checkpoints[0], usual)
    chosen = choose(budgets.asked, known, FAMILIES, signal.name, "weighted")
    served = {choice.budget for choice in chosen}
    for budget in budgets.asked:
        if budget not in served and processes.is_first():
            print(f"budget {budget:g}: no plan keeps to it")
    choices += chosen
    rows = report_on(second, signal, choices, samplings, costs)
    compared = []
    if settings.compare:
        usual_budget = budgets.asked[len(budgets.asked) * 3 // 4]
        compared = [choice for choice in choices if choice.budget == usual_budget
                    and choice.source in ("one check", "all plans")]
        entropy = EntropySignal()
        known = measured(first, entropy, plans, samplings[:1], costs)
        own = choose(budgets.asked, known, ("one check", "all plans"), entropy.name, "cons")
        rows |= report_on(second, entropy, own, samplings, costs)
        choices += own
    default = rows[signal.name, choices[1].plan]
    report = report_rows(choices, rows, default, known_ceilings)
    scores = compare_signals(second, signal, compared, samplings[:1], costs)
    if processes.is_first():
        write_report(field.folder, report, scores, len(second.problems), samplings)
        if settings.write:
            write_plan_file(settings, field, choices, rows)
        print(json.dumps(summary(settings, report)))


def write_report(folder, report, scores, problems, samplings):
    """Print the tables and write budget.md, budget.csv, signals.csv and budget.svg."""
    title = (f"{problems} problems that took no part in the choice, {len(samplings)} seeds of "
             "paths; in brackets 95% intervals over problems")
    text = table(report, title, "the default")
    write_table(folder / "budget.csv", report)
    if scores:
        write_table(folder / "signals.csv", scores)
        title = f"The same plans under other signals, seed {samplings[0].seed}"
        text += "\n\n" + table(scores, title, "the first row")
    print(text)
    write_atomic(folder / "budget.md", text + "\n")
    draw_figure(folder / "budget.svg", report, problems)


def summary(settings, report):
    """What goes into the last line: score-weighted votes, of the default and by budget."""
    line = {"out": settings.out}
    for row in report:
        if row["signal"] == "STOP" and row["source"] == "paper's default":
            line["default"] = round(row["weighted"], 4)
        if row["signal"] == "STOP" and row["source"] == "all plans":
            line[f"{row['budget']:g}"] = round(row["weighted"], 4)
    return line


def report_on(field, signal, choices, samplings, costs):
    """{(signal, plan): Measured.row} of chosen plans on the other half."""
    plans = list(dict.fromkeys(choice.plan for choice in choices))
    known = measured(field, signal, plans, samplings, costs)
    return {(signal.name, plan): known.row(plan) for plan in plans}


def compare_signals(field, signal, choices, samplings, costs):
    """The report's rows of the same plans under every signal of `worse_signals`; none of none."""
    if not choices:
        return []
    own = []
    rows = {}
    for other in worse_signals(signal):
        rows |= report_on(field, other, choices, samplings, costs)
        own += [dataclasses.replace(choice, signal=other.name) for choice in choices]
    default = rows[signal.name, choices[0].plan]
    return report_rows(own, rows, default, {})


if __name__ == "__main__":
    command_line(Settings, main, shares_work=True)
