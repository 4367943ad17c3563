"""Plans: how many paths to launch, where to check them and how many go on, for a number of tokens.

A plan's checks are written as in 24:6x4,80:2x4: at 24 new tokens the best 6 paths stay and go on as
4 paths each; of these 24 the best 2 stay at 80 tokens, and again become 4 each. `studies/budget.py`
chooses plans by measurement, and writes them to plan.json in a STOP's folder:

    {"stop": digits that stand for the STOP, "chosen": how,
     "plans": [{"budget": 2100, "n": 20, "stages": "80:2x4", "tokens": 2053.1, "avg": 0.68, ...},
     ...]}
"""
import dataclasses
import json
import math
import re
from pathlib import Path
from typing import NamedTuple

from plumbing.command_line import shown
from plumbing.files import is_there
from plumbing.records import read_json, write_atomic

NAME = "plan.json"
CHECKPOINTS = re.compile(r"[1-9]\d{0,8}(,[1-9]\d{0,8})*", re.ASCII)  # numbers of new tokens
METRICS = ("tokens", "avg", "cons", "weighted", "pass")  # what a plan is expected to take and give


class Stage(NamedTuple):
    """One check: at `checkpoint` new tokens the best `keep` paths stay, each going on as `branch`
    paths."""
    checkpoint: int
    keep: int
    branch: int = 1

    def __str__(self):
        text = f"{self.checkpoint}:{self.keep}"
        return text if self.branch == 1 else f"{text}x{self.branch}"


def parse_checkpoints(text):
    """"2048,1024" -> [2048, 1024]: different numbers of new tokens."""
    if CHECKPOINTS.fullmatch(text):
        checkpoints = [int(number) for number in text.split(",")]
        if len(set(checkpoints)) == len(checkpoints):
            return checkpoints
    raise ValueError(
        f"prefix: found {shown(text)}, expected a number of tokens, or several as in 1024,2048")


def parse_cascade(text):
    """"2048:32,4096:4x2" -> [Stage(2048, 32, 1), Stage(4096, 4, 2)]: at 2,048 tokens 32 paths stay,
    at 4,096 tokens 4 that go on as 2 each."""
    stages = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d{1,9}):(\d{1,9})(?:x(\d{1,9}))?", part, re.ASCII)
        if match is None:
            raise ValueError(
                f"cascade: found {shown(text)}, expected checkpoint:keep pairs as in "
                "2048:32,4096:16")
        stages.append(Stage(*(int(number) for number in match.groups("1"))))
    return stages


def validate_stages(stages, n, max_new_tokens=math.inf, source=None):
    """Raise ValueError unless checkpoints rise and no check keeps more paths than there are.
    source: where they stand, if not in --prefix, --keep and --branch."""
    try:
        _validate_stages(stages, n, max_new_tokens)
    except ValueError as error:
        raise ValueError(str(error) if source is None else f"{source}: {error}") from None


def _validate_stages(stages, n, max_new_tokens):
    earlier = 0
    had = n
    for stage in stages:
        if not earlier < stage.checkpoint < max_new_tokens:
            limit = "" if max_new_tokens == math.inf else (
                f", less than the {max_new_tokens} new tokens that a path may have")
            raise ValueError(f"prefix: found {stage.checkpoint}, expected {earlier + 1} to "
                             f"{max_new_tokens - 1}{limit}")
        if not 1 <= stage.keep <= had:
            raise ValueError(f"keep: found {stage.keep}, expected 1 to {had}")
        if stage.branch < 1:
            raise ValueError(f"branch: found {stage.branch}, expected at least 1")
        earlier = stage.checkpoint
        had = stage.keep * stage.branch


@dataclasses.dataclass(frozen=True)
class BudgetPlan:
    """What to do with `budget` tokens a question, and what it gave on problems that were not used
    to choose it: `expected` has the METRICS."""
    budget: int
    n: int
    stages: tuple  # of Stage
    expected: dict

    def __str__(self):
        return f"{self.n} paths, {','.join(map(str, self.stages))}"


def read_plans(folder, stop):
    """The BudgetPlans in a STOP's folder, the smallest first; None where it has no plan.json. stop:
    digits that stand for that STOP. ValueError on a plan.json that is broken or another STOP's."""
    file = Path(folder) / NAME
    if not is_there(file):
        return None
    content = read_json(file)
    if content.get("stop") != stop:
        found = shown(content.get("stop"))
        raise ValueError(f"{file}: stop: found {found}, expected {stop!r}: it was chosen for "
                         "another STOP; run studies/budget.py --write again")
    records = content.get("plans")
    if not isinstance(records, list) or not records:
        raise ValueError(
            f"{file}: plans: found {shown(records)}, expected a list of at least 1 plan")
    plans = []
    for number, record in enumerate(records):
        plans.append(_read_plan(f"{file}: plans[{number}]", record))
    budgets = [plan.budget for plan in plans]
    if budgets != sorted(set(budgets)):
        raise ValueError(f"{file}: plans: found budgets {shown(budgets)}, expected rising ones")
    return plans


def _read_plan(place, record):
    """The BudgetPlan of one record. place: where it stands, for a complaint."""
    if not isinstance(record, dict):
        raise ValueError(f"{place}: found {shown(record)}, expected a JSON object")
    for key in ("budget", "n"):
        value = record.get(key)
        if type(value) is not int or not 1 <= value < 2 ** 31:
            raise ValueError(
                f"{place}: {key}: found {shown(value)}, expected a positive integer of 32 bits")
    for key in METRICS:
        value = record.get(key)
        most = 2 ** 31 if key == "tokens" else 1
        if type(value) not in (int, float) or not 0 <= value <= most:
            expected = "a number of tokens" if key == "tokens" else "a share in [0, 1]"
            raise ValueError(f"{place}: {key}: found {shown(value)}, expected {expected}")
    text = record.get("stages")
    if not isinstance(text, str):
        raise ValueError(f"{place}: stages: found {shown(text)}, expected text as in 24:6x4,80:2x4")
    try:
        stages = parse_cascade(text)
        validate_stages(stages, record["n"])
    except ValueError as error:
        raise ValueError(f"{place}: stages: {error}") from None
    expected = {key: record[key] for key in METRICS}
    return BudgetPlan(record["budget"], record["n"], tuple(stages), expected)


def write_plans(folder, stop, chosen, plans):
    """Write plan.json into a STOP's folder. stop: digits that stand for it; chosen: a dict that
    says how the BudgetPlans were chosen."""
    records = []
    for plan in plans:
        stages = ",".join(map(str, plan.stages))
        records.append({"budget": plan.budget, "n": plan.n, "stages": stages} | plan.expected)
    content = {"stop": stop, "chosen": chosen, "plans": records}
    write_atomic(Path(folder) / NAME, json.dumps(content, indent=1) + "\n")


def plan_for(plans, budget, folder):
    """The plan of the largest budget that is at most `budget`. ValueError if all need more."""
    fitting = [plan for plan in plans if plan.budget <= budget]
    if not fitting:
        raise ValueError(f"budget: found {budget}, expected at least {plans[0].budget}, the "
                         f"smallest in {Path(folder) / NAME}")
    return fitting[-1]
