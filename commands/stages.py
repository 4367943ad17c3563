"""How many paths a run of stop.py launches and what its checks keep: by flags, by STOP's plan.json,
or by the paper's guideline (section "interaction scaling law").
"""
import dataclasses

from commands.common import stop_folder
from engine.budget import by_guideline
from engine.stored import stop_digest
from plumbing import processes
from plumbing.budget_plan import parse_cascade, plan_for, read_plans, validate_stages
from plumbing.command_line import shown
from stop import retention

LAUNCHED = 64  # paths, where neither --n nor --budget says


def by_plan(settings, stop, limit):
    """The settings with the plan that STOP's plan.json has for --budget, or as they are without
    one. limit: of a path, in new tokens."""
    folder = stop_folder(settings)
    plans = None
    if settings.budget is not None:
        plans = read_plans(folder, stop_digest(stop))
        if plans is None:
            tell(f"budget: no plan.json in {folder}: the paper's guideline")
    if plans is None:
        return settings
    for name in ("n", "keep", "retention", "task_length", "prefix", "cascade", "branch"):
        found = getattr(settings, name)
        if found is not None:
            raise ValueError(f"{name}: found {shown(found)}, expected none beside --budget: the "
                             f"plan in {folder} has its own")
    plan = plan_for(plans, settings.budget, folder)
    place = f"{folder / 'plan.json'}: the plan for {plan.budget} tokens"
    validate_stages(plan.stages, plan.n, limit, place)
    tell(f"plan for {plan.budget} tokens, the largest listed that {settings.budget} allows: "
         f"{plan}; about {plan.expected['tokens']:.0f} tokens")
    cascade = ",".join(map(str, plan.stages))
    return dataclasses.replace(settings, n=plan.n, cascade=cascade, budget=None)


def paths_of(settings, prefix, limit):
    """(paths launched, paths resumed) of a run: --n and --keep or --retention, by default 64 and an
    eighth; or the guideline's for --budget."""
    if settings.budget is not None:
        return paths_for_budget(settings, prefix, limit)
    launched = settings.n or LAUNCHED
    if settings.keep is not None:
        return launched, settings.keep
    share = 1 / 8 if settings.retention is None else settings.retention
    return launched, max(1, round(launched * share))


def paths_for_budget(settings, prefix, limit):
    """(paths launched, paths resumed) by the paper's guideline. ValueError where --n is more than
    the budget pays for."""
    task = min(8650, limit) if settings.task_length is None else settings.task_length
    launched, kept = by_guideline(settings.budget, prefix, task)
    share = retention(settings.budget, prefix, task)
    rest = max(0, task - prefix)
    if settings.n is not None:
        launched = settings.n
        left = settings.budget - launched * prefix - rest  # beside one path that is finished
        if left < 0:
            most = (settings.budget - rest) // prefix
            raise ValueError(f"n: found {launched}, expected at most {most}, which the budget of "
                             f"{settings.budget} tokens pays for")
        kept = min(max(1, round(share * launched)), launched)
        if rest > 0:
            kept = min(kept, 1 + left // rest)
    tell(f"guideline: keep {share:.2g} of {launched} paths (1 / {1 / share:,.2f}), at least 1; a "
         f"usual response has {task} tokens: {launched * prefix + kept * rest} in all")
    return launched, kept


def stages_asked(settings, stop, limit):
    """(paths launched, the checks) of a run. ValueError where a checkpoint is not below the limit
    of a path, naming what set it."""
    checkpoint = settings.prefix
    if checkpoint is None:
        checkpoint = stop.trained_for()[0]
    n, keep = paths_of(settings, checkpoint, limit)
    if settings.cascade is not None:
        stages = parse_cascade(settings.cascade)
        validate_stages(stages, n, limit, "cascade")
        return n, stages
    if settings.prefix is None and checkpoint >= limit:
        raise ValueError(
            f"prefix: found {checkpoint}, for which the STOP in {stop_folder(settings)} was "
            f"trained, expected less than the {limit} new tokens that a path may have: give "
            "--prefix, or a larger --max-new-tokens")
    return n, [(checkpoint, keep, settings.branch or 1)]


def tell(line):
    """Print a line, once for all processes."""
    if processes.is_first():
        print(line, flush=True)
