"""The whole protocol of eval.py on stored paths, shared by a run's processes, and its report."""
import dataclasses
import json
import platform
import subprocess
from pathlib import Path

import numpy as np
import torch

from baselines import (
    AGGREGATES, JUDGE, confidence, judge_scores, redundancy, token_set_cover)
from engine.budget import plan_row, report_same, verify_kept
from engine.stored import sample_paths
from eval import STOP, evaluate, table
from plumbing import processes
from plumbing.budget_plan import check_stages
from plumbing.progress import progress
from plumbing.records import write_atomic
from plumbing.statistics import interval
from sample import check_prompts, room, sampling_of


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
        check_stages(plan.stages, plan.n, limit, f"plan.json: the plan for {plan.budget} tokens")

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
        with progress("check", len(prefixes), "prefix") as bar:
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
