"""What a budget of tokens buys: the paper's guideline, a plan run for real, and the same plan
replayed on stored paths, which gives the paths of `stop.launch_check_resume`: eval.py --verify
compares them, and test_eval_runs_a_plan (tests/studies/test_budget.py)."""
import dataclasses
import math

import numpy as np

from engine.launch import launch_check_resume
from eval import select
from plumbing import processes
from plumbing.answers import same_answer
from plumbing.grading import grade
from plumbing.progress import progress
from plumbing.statistics import interval
from sample import decoded_tokens, sampling_of
from stop import retention, vote


def least_budget(prefix, task):
    """The tokens of one path that is checked and finished: less pays for nothing."""
    return max(prefix, task)


def by_guideline(budget, prefix, task, most=math.inf):
    """(paths launched, paths kept) by the guideline for a budget, in tokens: as many paths as it
    pays for, at most `most`, all up to the prefix and the kept ones up to a usual response.
    ValueError on a budget that pays for none."""
    if budget < least_budget(prefix, task):
        raise ValueError(
            f"budget: found {budget}, expected at least {least_budget(prefix, task)}: one path up "
            f"to the checkpoint of {prefix} and to a usual response of {task} tokens")
    share = retention(budget, prefix, task)
    rest = max(0, task - prefix)
    launched = max(1, min(int(budget / (prefix + share * rest)), most))
    kept = min(max(1, round(share * launched)), int(budget // (prefix + rest)))
    launched = min(launched, int((budget - kept * rest) // prefix))  # what the kept ones leave
    return launched, min(kept, launched)


def run_plan(model, tokenizer, stop, problems, records, plan, settings):
    """The finished paths of a BudgetPlan, run on each problem, the best first: {number: list of
    Path} of the problems that are this process's share; and the tokens that each took."""
    sampling = dataclasses.asdict(sampling_of(settings))
    finished = {}
    tokens = {}
    share = processes.mine(range(len(problems)))
    with progress("plan", len(share), "problem") as bar:
        for i in share:
            paths = launch_check_resume(
                model, stop, records[i]["prompt_ids"], plan.n, stages=list(plan.stages),
                max_new_tokens=settings.max_new_tokens, **sampling)
            kept = [path for path in paths if path.status != "pruned"]
            finished[i] = sorted(kept, key=lambda path: -path.score)
            tokens[i] = decoded_tokens(paths)
            bar.update()
    return finished, tokens


def plan_row(model, tokenizer, stop, problems, records, plan, settings):
    """(a row of the report: what a BudgetPlan is worth, run for real on the problems; whether each
    problem's paths are those that a replay of the stored ones gives, where it can be replayed)."""
    finished, tokens = run_plan(model, tokenizer, stop, problems, records, plan, settings)
    found = []
    for i, paths in finished.items():
        problem = problems[i]
        answers, right = grade(tokenizer, problem, [path.ids for path in paths])
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


def verify_kept(model, stop, records, kept, settings):
    """Launch, Check and Resume each problem again: the paths that finish must be the kept ones, to
    the token. In float32 a problem that differs is a ValueError."""
    sampling = dataclasses.asdict(sampling_of(settings))
    share = processes.mine(list(zip(records, kept.tolist())))
    same = []
    with progress("verify", len(share), "problem") as bar:
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
