"""The paper's protocol (section 6, Table 2): what the paths are worth that each signal keeps.

    python eval.py                                  # the embedded toy: its STOP and its judge
    python eval.py --model M --stop S --data test.jsonl --judge Qwen/Qwen2.5-Math-PRM-7B
    torchrun --nproc-per-node 8 -- eval.py --model M --stop S --data test.jsonl

N full paths of each problem are sampled once, graded and stored. Every scorer, of types I to IV,
scores their prefixes, the best k of each problem are kept, and the kept paths are compared. The
tokens of a path do not depend on which others are pruned: all scorers choose among the same paths.
"""
import contextlib
import dataclasses
import json
from pathlib import Path

from commands.common import open_model, say_other_sampling, say_unknown_in_data, stop_folder
from engine.protocol import Options, validate
from engine.protocol import run as run_protocol
from engine.stored import stop_digest
from eval import summary
from plumbing import processes
from plumbing.budget_plan import plan_for, read_plans
from plumbing.checkpoint import find_folder
from plumbing.command_line import Common, command_line, option, require_positive
from plumbing.problems import read_problems
from plumbing.records import locked
from stop import Stop


@dataclasses.dataclass(kw_only=True)
class Settings(Common):
    """What `python eval.py` can be told."""
    stop: str | None = option(
        None, "folder of the trained STOP (default: the model's stop/)", heading="the evaluation")
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


def read_plan(folder, stop, budget):
    """The BudgetPlan for a budget in a STOP's folder. ValueError where there is none."""
    plans = read_plans(folder, stop_digest(stop))
    if plans is None:
        raise ValueError(f"budget: found no plan.json in {folder}, expected one: "
                         "studies/budget.py --write makes it")
    return plan_for(plans, budget, folder)


def run(settings):
    """Sample or read the paths, score, report; the last line is one JSON object."""
    require_positive(settings, "budget")
    validate(settings, settings.window, settings.judge_aggregate)
    folder = find_folder(settings.model)
    problems = read_problems(settings.data or folder / "test.jsonl")[:settings.problems]
    model, tokenizer = open_model(settings)
    stop = Stop.load(stop_folder(settings), model)
    say_other_sampling(settings, stop_folder(settings))
    say_unknown_in_data(tokenizer, problems, settings)
    plan = None
    if settings.budget is not None:
        plan = read_plan(stop_folder(settings), stop, settings.budget)
    judge = settings.judge
    if judge is None and (folder / "judge").is_dir():
        judge = str(folder / "judge")
    if judge is None and settings.judge_aggregate != Settings.judge_aggregate:
        raise ValueError(f"judge_aggregate: found {settings.judge_aggregate!r}, expected none: "
                         "there is no judge (--judge)")
    if judge is not None:
        judge = open_model(dataclasses.replace(settings, model=judge, chat_format=None))
    out = Path(settings.out)
    out.mkdir(parents=True, exist_ok=True)
    with locked(out) if processes.is_first() else contextlib.nullcontext():
        options = Options(
            judge, settings.window, settings.judge_aggregate, settings.verify, plan)
        report = run_protocol(model, tokenizer, stop, problems, settings, out, options)
    if processes.is_first():
        print(json.dumps({"out": settings.out, **summary(report)}))


def main():
    """The command line."""
    command_line(Settings, run, shares_work=True)
