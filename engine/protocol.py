"""`eval.protocol` on stored paths, shared by the processes of a run, with a plan for a budget as a
row of its own, what --verify asks for, and the report as a file.
test_9_protocol (tests/test_invariants.py) compares them.
"""
import dataclasses
import json
import platform
import subprocess
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from baselines import AGGREGATES, Signal
from engine.budget import plan_row, report_same, verify_kept
from engine.prefixes import read_prefixes
from engine.stored import sample_paths
from eval import RANDOM, STOP, all_scores, evaluate, random_scores, table
from plumbing import processes
from plumbing.budget_plan import BudgetPlan, validate_stages
from plumbing.records import write_atomic
from plumbing.statistics import interval
from sample import require_counts, sampling_of, validate_prompts


class Options(NamedTuple):
    """What the protocol can be asked for beside its settings."""
    judge: tuple | None = None    # its (Decoder, Tokenizer)
    window: int | None = None     # DeepConf's, in tokens; None: an eighth of the checkpoint
    aggregate: str = "last"       # how rewards of steps become a score: last, min or mean
    verify: bool = False          # launch each problem again, and compare the kept paths
    plan: BudgetPlan | None = None  # to run too


def validate(settings, window, aggregate):
    """ValueError on a setting that cannot be. One that is None is not known yet."""
    sampling_of(settings)
    require_counts(
        n=settings.n, keep=settings.keep, prefix=settings.prefix, problems=settings.problems,
        max_new_tokens=settings.max_new_tokens, batch=settings.batch, window=window)
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
    limit = min(stop.limit(model, prompt, settings.max_new_tokens) for prompt in prompts)
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


def run(model, tokenizer, stop, problems, settings, out, options=Options()):
    """The whole protocol: prints the table, writes out/report.json, returns the report.

    settings: eval.py's, or train.py's. out: a pathlib.Path. ValueError on a setting that cannot be,
    before any path is sampled.
    """
    judge, window, aggregate, verify, plan = options
    if not problems:
        raise ValueError("problems: found 0, expected at least 1")
    prompts = [tokenizer.ask(problem) for problem in problems]
    settings = resolve(settings, stop, model, prompts)
    prefix = settings.prefix
    limit = settings.max_new_tokens
    if window is None:
        window = max(1, prefix // 8)
    validate(settings, window, aggregate)
    validate_prompts(model, prompts, max(limit, min(limit, prefix) + stop.m))
    if verify and prefix >= limit:
        raise ValueError(f"prefix: found {prefix}, expected less than {limit} new tokens to verify")
    if plan is not None:
        place = f"plan.json: the plan for {plan.budget} tokens"
        validate_stages(plan.stages, plan.n, limit, place)

    records = sample_paths(
        model, tokenizer, problems, out, settings.n, limit, sampling_of(settings), settings.batch)

    def score(problems, records):
        return all_scores(
            model, tokenizer, stop, problems, records, prefix, judge, window, aggregate,
            read=read_prefixes)

    scorers = {RANDOM: random_scores(records)} | shared(score, problems, records)
    report = {"settings": dataclasses.asdict(settings) | {"window": window}}
    report |= evaluate(problems, records, scorers, prefix, settings.keep)
    same = None
    if plan is not None:
        row, same = plan_row(model, tokenizer, stop, problems, records, plan, settings)
        ahead = report["rows"][STOP]["per_problem"]["avg"] - row["per_problem"]["avg"]
        row["stop_minus"] = interval(ahead)
        report["rows"][Signal(f"plan for {plan.budget} tokens: {plan}")] = row
    if processes.is_first():
        print(table(report))
        write_report(report, out / "report.json")
    if verify:
        verify_kept(model, stop, records, report["rows"][STOP]["kept"], settings)
        if same is not None:
            report_same(same, settings.dtype)
    return report


def no_number(name):
    """JSON has no NaN: null stands for a metric that is not defined."""
    return None


def write_report(report, file):
    """Write the report as strict JSON, with the versions that it depends on."""
    command = "git describe --always --dirty"
    git = subprocess.run(
        command, shell=True, cwd=Path(__file__).parent.parent, capture_output=True, text=True)
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
    }
    whole = {"commit": git.stdout.strip(), "versions": versions} | report
    text = json.dumps(whole, default=np.ndarray.tolist)
    strict = json.loads(text, parse_constant=no_number)
    write_atomic(file, json.dumps(strict, indent=1) + "\n")
