"""The paper's protocol (section 6, Table 2): what the paths are worth that each signal keeps.

    python eval.py                                  # the embedded toy: its STOP and its judge
    python eval.py --model M --stop S --data test.jsonl --judge Qwen/Qwen2.5-Math-PRM-7B
    torchrun --nproc-per-node 8 -- eval.py --model M --stop S --data test.jsonl

N full paths of each problem are sampled once, graded and stored. Every scorer, of types I to IV,
scores their prefixes, the best k of each problem are kept, and the kept paths are compared. The
tokens of a path do not depend on which others are pruned: all scorers choose among the same paths.
"""
import plumbing  # first: what is imported next takes seconds (plumbing/__init__.py)

import contextlib
import dataclasses
import json
import math
import platform
import subprocess
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from baselines import (
    AGGREGATES, JUDGE, confidence, judge_scores, progress, redundancy, token_set_cover)
from plumbing import processes
from plumbing.answers import extract_answer, same_answer
from plumbing.budget_plan import check_stages, plan_for, read_plans
from plumbing.checkpoint import find_folder
from plumbing.command_line import Common, command_line, option
from plumbing.problems import read_problems
from plumbing.records import locked, write_atomic
from plumbing.statistics import (
    Interval, auroc, calibration_error, interval, pairwise_accuracy, spearman)
from sample import check_prompts, open_model, room, sample_paths, sampling_of
from stop import Stop, launch_check_resume, stop_digest, vote

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


def no_number(name):
    """JSON has no NaN: null stands for a metric that is not defined."""
    return None


def write_report(report, file):
    """Write the report as strict JSON, with the versions that it depends on."""
    command = "git describe --always --dirty"
    git = subprocess.run(
        command, shell=True, cwd=Path(__file__).parent, capture_output=True, text=True)
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
    }
    whole = {"commit": git.stdout.strip(), "versions": versions} | report
    text = json.dumps(whole, default=np.ndarray.tolist)
    strict = json.loads(text, parse_constant=no_number)
    write_atomic(file, json.dumps(strict, indent=1) + "\n")


# The run


@dataclasses.dataclass(kw_only=True)
class Settings(Common):
    """What `python eval.py` can be told."""
    stop: str | None = option(None, "folder of the trained STOP (default: the model's stop/)")
    data: str | None = option(None, "problems (default: the model's test.jsonl)")
    out: str = option("runs/eval", "folder of report.json and of the paths, which are used again")
    problems: int | None = option(None, "only the first so many problems")
    n: int = option(64, "paths a problem")
    keep: int = option(8, "paths kept")
    prefix: int | None = option(
        None, "the checkpoint, in new tokens (default: what STOP was trained for, or 2048)")
    window: int | None = option(
        None, "DeepConf's, in tokens (default: an eighth of the checkpoint, 256 of 2048)")
    judge: str | None = option(
        None, "reward model for type II (default: the model's judge/, if it has one)")
    judge_aggregate: str = option("last", "how rewards of steps become a score: last, min or mean")
    budget: int | None = option(
        None, "tokens a problem: the plan for them in STOP's plan.json is run too, a row of its "
        "own")
    verify: bool = option(
        False, "launch each problem again, with STOP's check, and compare the kept paths")


def check(settings, window, aggregate):
    """ValueError on a setting that cannot be. One that is None is not known yet."""
    sampling_of(settings)
    positive = ("n", "keep", "prefix", "problems", "max_new_tokens", "batch", "budget")
    given = {name: getattr(settings, name, None) for name in positive} | {"window": window}
    for name, found in given.items():
        if found is not None and found < 1:
            raise ValueError(f"{name}: found {found}, expected at least 1")
    if settings.keep > settings.n:
        raise ValueError(f"keep: found {settings.keep}, expected 1 to n = {settings.n}")
    if aggregate not in AGGREGATES:
        raise ValueError(f"judge_aggregate: found {aggregate!r}, expected last, min or mean")


def resolve(settings, stop, model, prompts):
    """The settings with the checkpoint and the limit filled in: as asked; else as STOP was trained;
    else 2048, and what the context leaves to the longest prompt."""
    prefix = settings.prefix
    if prefix is None:
        prefix = stop.trained_for()[0]
    limit = stop.limit(settings.max_new_tokens)
    limit = min(room(model, prompt, limit) for prompt in prompts)
    return dataclasses.replace(settings, prefix=prefix, max_new_tokens=limit)


def shared(score, problems, records):
    """The scores {name: (paths,)} of all records, of which each process scores its share.
    score: a function of problems and their records that returns such scores."""
    n = len(records[0]["paths"])
    own = score(processes.mine(problems), processes.mine(records))
    whole = {}
    for name, scores in own.items():
        by_problem = list(scores.reshape(-1, n))
        whole[name] = np.concatenate(processes.gather(by_problem))
    return whole


def verify_kept(model, stop, records, kept, settings):
    """Launch, Check and Resume each problem again: the paths that finish must be the kept ones, to
    the token. In float32 a problem that differs is a ValueError."""
    sampling = dataclasses.asdict(sampling_of(settings))
    share = processes.mine(list(zip(records, kept.tolist())))
    same = []
    with progress(len(share), "problem", "verify") as bar:
        for record, chosen in share:
            paths = launch_check_resume(
                model, stop, record["prompt_ids"], settings.n, settings.keep, settings.prefix,
                max_new_tokens=settings.max_new_tokens, **sampling)
            finished = {path.index: path.ids for path in paths if path.status != "pruned"}
            expected = {index: record["paths"][index] for index in chosen}
            same.append(finished == expected)
            bar.update()
    same = processes.gather(same)
    report_same(same, settings.dtype)


# A plan for a budget


def run_plan(model, tokenizer, stop, problems, records, plan, settings):
    """The finished paths of a BudgetPlan, run on each problem, the best first: {number: list of
    Path} of the problems that are this process's share; and the tokens that each took."""
    sampling = dataclasses.asdict(sampling_of(settings))
    finished = {}
    tokens = {}
    share = processes.mine(range(len(problems)))
    with progress(len(share), "problem", "plan") as bar:
        for i in share:
            paths = launch_check_resume(
                model, stop, records[i]["prompt_ids"], plan.n, cascade=list(plan.stages),
                max_new_tokens=settings.max_new_tokens, **sampling)
            kept = [path for path in paths if path.status != "pruned"]
            finished[i] = sorted(kept, key=lambda path: -path.score)
            tokens[i] = sum(len(path.ids) - path.inherited for path in paths)
            bar.update()
    return finished, tokens


def plan_row(model, tokenizer, stop, problems, records, plan, settings):
    """(a row of the report: what a BudgetPlan is worth, run for real on the problems; whether each
    problem's paths are those that a replay of the stored ones gives, where it can be replayed)."""
    finished, tokens = run_plan(model, tokenizer, stop, problems, records, plan, settings)
    found = []
    for i, paths in finished.items():
        problem = problems[i]
        answers = [extract_answer(tokenizer.completion(path.ids), problem.kind) for path in paths]
        right = [same_answer(answer, problem.answer, problem.kind) for answer in answers]
        by_number = vote(answers, kind=problem.kind)
        by_weight = vote(answers, [path.score for path in paths], problem.kind)
        values = {
            "avg": float(np.mean(right)),
            "gain": float(np.mean(right) - np.mean(records[i]["right"])),
            "pass": float(max(right)),
            "cons": float(same_answer(by_number, problem.answer, problem.kind)),
            "weighted": float(same_answer(by_weight, problem.answer, problem.kind)),
            "tokens": tokens[i]}
        if can_be_replayed(plan, len(records[i]["paths"])):
            expected = replay(model, stop, records[i], plan)
            values["replayed"] = {path.index: path.ids for path in paths} == expected
        found.append(values)
    found = processes.gather(found)
    columns = {name: np.array([values[name] for values in found]) for name in found[0]}
    same = columns.pop("replayed", None)
    tokens = columns.pop("tokens")
    row = {name: interval(values) for name, values in columns.items()}
    row["tokens"] = float(tokens.mean())
    total = sum(len(path) for record in records for path in record["paths"])
    row["saved"] = 1 - tokens.sum() / total
    row["per_problem"] = columns
    row["expected"] = plan.expected
    return row, same


def can_be_replayed(plan, n):
    """Whether n stored paths hold all that a plan needs: branches are paths of their own."""
    return plan.n <= n and all(stage.branch == 1 for stage in plan.stages)


def replay(model, stop, record, plan):
    """{path number: its token ids} of the paths that a plan keeps, from a record's stored paths."""
    alive = list(range(plan.n))
    for checkpoint, keep, _ in plan.stages:
        prefixes = [record["prompt_ids"] + record["paths"][i][:checkpoint] for i in alive]
        scores = stop.score(model, prefixes, batch=64).tolist()
        alive = sorted(alive[place] for place in select(scores, keep))
    return {i: record["paths"][i] for i in alive}


def verify_decided(model, tokenizer, stop, problems, records, plan, settings):
    """Run a BudgetPlan to the end and until its votes are decided: both votes must be the same, and
    no token more. ValueError where they are not; else prints what it saves."""
    sampling = dataclasses.asdict(sampling_of(settings))
    spent = []  # a problem: tokens to the end, and until decided
    for problem, record in processes.mine(list(zip(problems, records))):

        def answer_of(path):
            return extract_answer(tokenizer.completion(path.ids), problem.kind)

        tokens = []
        votes = []
        for asked in (None, answer_of):
            paths = launch_check_resume(
                model, stop, record["prompt_ids"], plan.n, cascade=list(plan.stages),
                max_new_tokens=settings.max_new_tokens, answer_of=asked, kind=problem.kind,
                **sampling)
            finished = [path for path in paths if path.status in ("eos", "length")]
            answers = [answer_of(path) for path in finished]
            scores = [path.score for path in finished]
            votes.append(
                [vote(answers, kind=problem.kind), vote(answers, scores, problem.kind)])
            tokens.append(sum(len(path.ids) - path.inherited for path in paths))
        for whole, early in zip(*votes):
            if whole != early and not same_answer(early, whole, problem.kind):
                raise ValueError(f"decided votes: found {early!r:.60} for problem {record['id']}, "
                                 f"expected {whole!r:.60}")
        if tokens[1] > tokens[0]:
            raise ValueError(f"decided votes: found {tokens[1]} tokens for problem {record['id']}, "
                             f"expected at most {tokens[0]}")
        spent.append(tokens)
    whole, early = np.sum(processes.gather(spent), axis=0).tolist()
    if processes.is_first():
        print(f"decided votes: the same answers on all {len(problems)} problems, "
              f"{1 - early / whole:.2%} fewer tokens")


def report_same(same, dtype):
    """Say on how many problems a second run kept the same paths and tokens; in float32 a problem
    that differs is a ValueError."""
    agree = int(sum(same))
    if processes.is_first():
        print(f"verify: {agree} of {len(same)} problems keep the same paths and tokens "
              "when launched again")
    if agree < len(same) and dtype == "float32":
        raise ValueError(
            f"verify: found {len(same) - agree} problems that differ, expected none in float32")


# The whole protocol


def run(model, tokenizer, stop, problems, settings, out, judge=None, window=None,
        aggregate="last", verify=False, plan=None):
    """The whole protocol: prints the table, writes out/report.json, returns the report.

    settings: these, or train.py's. out: a pathlib.Path. judge: its (Decoder, Tokenizer), or None.
    window, aggregate (judge_aggregate), verify: as in Settings. plan: a BudgetPlan to run, or None.
    ValueError on a setting that cannot be, before any path is sampled.
    """
    if not problems:
        raise ValueError("problems: found 0, expected at least 1")
    prompts = [tokenizer.ask(problem) for problem in problems]
    settings = resolve(settings, stop, model, prompts)
    prefix = settings.prefix
    limit = settings.max_new_tokens
    if window is None:
        window = max(1, prefix // 8)
    check(settings, window, aggregate)
    check_prompts(model, prompts, max(limit, min(limit, prefix) + stop.m))
    if verify and prefix >= limit:
        raise ValueError(f"prefix: found {prefix}, expected less than {limit} new tokens to verify")
    if plan is not None:
        check_stages(plan.stages, plan.n, limit)

    records = sample_paths(
        model, tokenizer, problems, out, settings.n, limit, sampling_of(settings), settings.batch)

    def score(problems, records):
        confidences = confidence(model, records, prefix, window)
        chances = np.exp(confidences["mean log-probability (III)"])  # of a token, geometric mean
        scores = {
            "Jaccard (I)": redundancy(records, prefix),
            "token set cover (I)": token_set_cover(records, prefix, chances)}
        if judge is not None:
            scores[JUDGE] = judge_scores(*judge, tokenizer, problems, records, prefix, aggregate)
        scores |= confidences
        prefixes = []
        for record in records:
            prefixes += [record["prompt_ids"] + path[:prefix] for path in record["paths"]]
        with progress(len(prefixes), "prefix", "check") as bar:
            chances = stop.score(model, prefixes, batch=64, bar=bar)
        scores[STOP] = chances.double().cpu().numpy()
        return scores

    scorers = {"random": np.random.default_rng(0).random(len(records) * settings.n)}
    scorers |= shared(score, problems, records)
    report = {"settings": dataclasses.asdict(settings) | {"window": window}}
    report |= evaluate(problems, records, scorers, prefix, settings.keep, reread={JUDGE})
    same = None
    if plan is not None:
        row, same = plan_row(model, tokenizer, stop, problems, records, plan, settings)
        ahead = report["rows"][STOP]["per_problem"]["avg"] - row["per_problem"]["avg"]
        row["stop_minus"] = interval(ahead)
        report["rows"][f"plan for {plan.budget} tokens: {plan}"] = row
    if processes.is_first():
        print(table(report))
        write_report(report, out / "report.json")
    if verify:
        verify_kept(model, stop, records, report["rows"][STOP]["kept"], settings)
        if same is not None:
            report_same(same, settings.dtype)
        if plan is not None:
            verify_decided(model, tokenizer, stop, problems, records, plan, settings)
    return report


def read_plan(folder, stop, budget):
    """The BudgetPlan for a budget in a STOP's folder. ValueError where there is none."""
    plans = read_plans(folder, stop_digest(stop))
    if plans is None:
        raise ValueError(f"budget: found no plan.json in {folder}, expected one: "
                         "studies/budget.py --write makes it")
    return plan_for(plans, budget, folder)


def main(settings):
    """Sample or read the paths, score, report; the last line is one JSON object."""
    check(settings, settings.window, settings.judge_aggregate)
    folder = find_folder(settings.model)
    problems = read_problems(settings.data or folder / "test.jsonl")[:settings.problems]
    model, tokenizer = open_model(settings)
    stop = Stop.load(settings.stop or folder / "stop", model)
    plan = None
    if settings.budget is not None:
        plan = read_plan(settings.stop or folder / "stop", stop, settings.budget)
    judge = settings.judge
    if judge is None and (folder / "judge").is_dir():
        judge = str(folder / "judge")
    if judge is not None:
        judge = open_model(dataclasses.replace(settings, model=judge, chat_format=None))
    out = Path(settings.out)
    out.mkdir(parents=True, exist_ok=True)
    with locked(out) if processes.is_first() else contextlib.nullcontext():
        report = run(
            model, tokenizer, stop, problems, settings, out, judge, settings.window,
            settings.judge_aggregate, settings.verify, plan)
    if processes.is_first():
        print(json.dumps({"out": settings.out, **summary(report)}))


if __name__ == "__main__":
    command_line(Settings, main, shares_work=True)
