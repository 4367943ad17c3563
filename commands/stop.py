"""STOP (arXiv 2604.16029, section 3): Launch N paths, Check their prefixes, Resume the best k, and
vote.

    python stop.py --prompt "..." --n 64 --keep 8 --prefix 2048
    python stop.py --score prefixes.jsonl --out scored.jsonl --trace DIR    # one score per record

A frozen model, m learned [STOP] embeddings appended to a cached prefix, a LoRA that is active only
there, and a head on the last [STOP] position's final hidden state h_m:

    h = f([prefix; S]),  p = sigmoid(w h_m + b)  =  the chance that this path ends right   (eq. 4)
"""
import contextlib
import dataclasses
import functools
import json
import time

import torch

from commands import picture
from commands.common import open_model, say_other_sampling, stop_folder
from engine.budget import by_guideline
from engine.decided import Decider
from engine.launch import launch_check_resume
from engine.stored import model_digest, stop_digest
from plumbing.answers import extract_answer, same_answer
from plumbing.budget_plan import parse_cascade, plan_for, read_plans, validate_stages
from plumbing.command_line import (
    Common, command_line, option, refuse_flags, require_choice, require_positive, shown)
from plumbing.files import require_target
from plumbing.labels import read_prefixes
from plumbing.problems import Problem
from plumbing.progress import progress, say
from plumbing.scores import score_file
from sample import decoded_tokens, prefill, sampling_of, validate_prompts
from stop import Stop, Watcher, decide, like_lengths, retention, vote

LAUNCHED = 64  # paths, where neither --n nor --budget says

# A setting that says all that these others say, each of which would have no effect beside it
ALTERNATIVES = {
    "cascade": ("keep", "retention", "budget", "prefix", "branch"),
    "keep": ("retention", "budget"),
    "retention": ("budget",)}

# Settings that say how a question is answered, and nothing of how prefixes are scored
OF_A_PROMPT = (
    "n", "keep", "retention", "budget", "task_length", "prefix", "cascade", "branch", "decide",
    "kind", "answer", "picture", "max_new_tokens", "temperature", "top_k", "top_p", "seed",
    "chat_format")


@dataclasses.dataclass(kw_only=True)
class Settings(Common):
    """What `python stop.py` can be told."""
    prompt: str | None = option(None, "the question")
    score: str | None = option(
        None, "instead of a question, prefixes to score: JSON lines with prefix_token_ids")
    out: str | None = option(
        None, "with --score: file of the scores, taken up where it stopped (default: printed)")
    trace: str | None = option(
        None, "with --score: folder for the [STOP] positions' hidden states, layer by layer")
    stop: str | None = option(
        None, "folder of the trained STOP (default: stop/ in the model's directory)")
    n: int | None = option(
        None, "paths launched (default: 64, or as many as --budget pays for)")
    keep: int | None = option(None, "paths resumed (default: an eighth)")
    retention: float | None = option(None, "paths resumed, as a share of n")
    budget: int | None = option(
        None, "all tokens to spend: by the plan for them in STOP's plan.json; where there is none, "
        "by the paper's guideline")
    task_length: int | None = option(
        None, "tokens of a usual response, for the guideline (default: 8650, as in the paper, or "
        "the limit of a path where that is less)")
    prefix: int | None = option(
        None, "the checkpoint, in new tokens (default: what STOP was trained for, or 2048)")
    cascade: str | None = option(
        None, "several checkpoints, checkpoint:keep or checkpoint:keepxbranch, as in "
        "2048:32,4096:4x2")
    branch: int | None = option(
        None, "how many paths each resumed prefix goes on as (default: 1)")
    decide: bool = option(True, "stop when the running paths can no longer change the vote")
    kind: str = option("math", "math or choice: what the answer is")
    answer: str | None = option(
        None, "the right answer, where it is known: what is right is marked")
    picture: str | None = option(
        None, "file for a picture of the run: a page (.html) or a drawing (.svg)")


def recipe(flags):
    """Scores are made in float32 unless --dtype says otherwise: they are what others check
    against. ValueError on flags that have no effect beside others."""
    if "score" in flags:
        refuse_flags(flags, OF_A_PROMPT, "it shapes the paths of a --prompt, and no --score")
    if "budget" not in flags:
        refuse_flags(flags, ["task_length"], "it serves the guideline of a --budget alone")
    return ({"dtype": "float32"} if "score" in flags else {}), None


def validate(settings):
    """Raise ValueError on settings that cannot be, before any work is done."""
    sampling_of(settings)
    require_positive(settings, "max_new_tokens", "batch", "n", "keep", "retention", "budget",
                     "task_length", "prefix", "branch")
    require_choice(settings, "kind", "math", "choice")
    if settings.cascade is not None:
        validate_stages(parse_cascade(settings.cascade), settings.n or LAUNCHED, source="cascade")
    if settings.retention is not None and settings.retention > 1:
        raise ValueError(
            f"retention: found {shown(settings.retention)}, expected a share in (0, 1]")
    for name, others in ALTERNATIVES.items():
        for other in others:
            if getattr(settings, name) is not None and getattr(settings, other) is not None:
                raise ValueError(f"{other}: found beside --{name}, expected one of the two")
    if settings.picture is not None:
        picture.check_file(settings.picture)
    if settings.score is not None and settings.out is not None:
        require_target(settings.out)


def by_plan(settings, stop, limit):
    """The settings with the plan that STOP's plan.json has for --budget, or as they are without
    one. limit: of a path, in new tokens."""
    folder = stop_folder(settings)
    plans = None
    if settings.budget is not None:
        plans = read_plans(folder, stop_digest(stop))
        if plans is None:
            print(f"budget: no plan.json in {folder}: the paper's guideline")
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
    print(f"plan for {plan.budget} tokens, the largest listed that {settings.budget} allows: "
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
    print(f"guideline: keep {share:.2g} of {launched} paths (1 / {1 / share:,.2f}), at least 1; a "
          f"usual response has {task} tokens: {launched * prefix + kept * rest} in all")
    return launched, kept


class Narrator(Watcher):
    """Prints each check, and notes it for the picture."""

    def __init__(self, quiet=False, decider=None):
        """decider: what may end the run early."""
        self.quiet = quiet
        self.decider = decider
        self.checks = []  # of picture.Check

    def checked(self, stage, checked, kept):
        self.checks.append(picture.check_of(stage, kept))
        if not self.quiet:
            show_check(self.checks[-1], checked)

    def resumed(self, batch, paths):
        if self.decider is not None:
            self.decider.resumed(batch, paths)


def show_check(check, checked):
    """Print the scores of one picture.Check, the best first."""
    new = check.went_on - check.stayed
    branches = f", and {new} new branches" if new else ""
    say(f"check at {check.checkpoint} tokens: {check.stayed} of {len(checked)} paths "
        f"stay{branches}")
    for path in sorted(checked, key=lambda path: -path.score):
        say(f"  path {path.name:>4}  score {path.score:.4f}  {path.status}")


def answer_prompt(model, stop, tokenizer, settings):
    """Run one question through Launch, Check, Resume; print scores, answers and votes."""
    options = {} if settings.kind == "choice" else None  # they stand in the prompt's own text
    prompt_ids = tokenizer.ask(Problem("prompt", settings.prompt, "", options))
    limit = stop.limit(model, prompt_ids, settings.max_new_tokens)
    settings = by_plan(settings, stop, limit)
    n, stages = stages_asked(settings, stop, limit)

    def answer_of(path):
        return extract_answer(tokenizer.completion(path.ids), settings.kind)

    decider = Decider(answer_of, settings.kind) if settings.decide else None
    narrator = Narrator(decider=decider)
    start = time.perf_counter()
    with progress("paths", n * limit, "tok") as bar:
        paths = launch_check_resume(
            model, stop, prompt_ids, n, stages=stages, max_new_tokens=limit, watcher=narrator,
            bar=bar, **dataclasses.asdict(sampling_of(settings)))
    seconds = time.perf_counter() - start

    finished = [path for path in paths if path.status in ("eos", "length")]
    answers = [answer_of(path) for path in finished]
    for path, answer in zip(finished, answers):
        print(f"path {path.name} ({path.status}, {len(path.ids)} tokens, "
              f"score {path.score:.4f}): {answer}{mark_of(answer, settings)}")
    spent = decoded_tokens(paths)
    # what n paths would have taken, had each become as long as the kept ones are on average
    unpruned = n * sum(len(path.ids) for path in finished) / len(finished)
    saved = 1 - spent / unpruned
    majority = vote(answers, kind=settings.kind)
    weighted = decide(answers, [path.score for path in finished], settings.kind)
    print(f"answer by score: {weighted}{mark_of(weighted, settings)}; by majority: "
          f"{majority}{mark_of(majority, settings)}", flush=True)
    if settings.picture is not None:  # behind the answers: a disk may be full by now
        run = picture.record(
            settings.prompt, paths, narrator.checks, tokenizer, answer_of,
            picture.saved_against(n, spent, finished), settings.kind, settings.answer)
        picture.write(settings.picture, run)
        print(f"wrote {settings.picture}")
    print(json.dumps({
        "weighted": weighted,
        "majority": majority,
        "kept": sum(path.status != "pruned" for path in paths),
        "decided_early": sum(path.status == "decided" for path in paths),
        "n": n,
        "tokens": spent,
        "tokens_saved_estimate": round(saved, 4),
        "seconds": round(seconds, 3)}))


def mark_of(answer, settings):
    """What stands behind an answer where the right one is known."""
    if settings.answer is None:
        return ""
    return picture.MARKS[same_answer(answer, settings.answer, settings.kind)]


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


@contextlib.contextmanager
def recorded_states(model):
    """A list that takes the hidden states (B, T, hidden) after each decoder layer and the final
    norm."""
    states = []

    def record(module, inputs, output):
        states.append(output)

    with contextlib.ExitStack() as hooks:
        for module in (*model.model["layers"], model.model["norm"]):
            hooks.enter_context(module.register_forward_hook(record))
        yield states


@torch.inference_mode()
def logits_and_states(model, stop, prefixes):
    """Of one batch of prefixes: head logits (B, 1 or 2), and the [STOP] positions' hidden states
    (B, layers + 1, m, hidden) float32: after each decoder layer and, last, after the final norm."""
    cache, _ = prefill(model, prefixes, stop.m)
    with recorded_states(model) as states:
        logits = stop(model, cache)
    return logits, torch.stack(states, 1).float().cpu()


def score_prefixes(model, stop, settings):
    """Score a file of prefixes, one JSON line a record; taken up where a killed run stopped."""
    def check_ids(ids):
        validate_prompts(model, [ids], stop.m)

    prefixes = read_prefixes(settings.score, check_ids)
    who = {"dtype": settings.dtype,
           "model": model_digest(model),
           "stop": stop_digest(stop)}
    batches = like_lengths([prefix.ids for prefix in prefixes], settings.batch or 16)
    check = functools.partial(logits_and_states, model, stop)
    score_file(prefixes, batches, check, stop.chance, who, settings.out, settings.trace)


def run(settings):
    """Answer a prompt, or score a file of prefixes; the last line is one JSON object."""
    validate(settings)
    flags = ("prompt", "score", "out", "trace")
    given = [flag for flag in flags if getattr(settings, flag) is not None]
    if given != ["prompt"] and given[:1] != ["score"]:
        found = " ".join(f"--{flag}" for flag in given) or "neither"
        raise ValueError(f"found {found}, expected --prompt, or --score, --out and --trace")
    model, tokenizer = open_model(settings)
    stop = Stop.load(stop_folder(settings), model)
    if settings.score is not None:
        score_prefixes(model, stop, settings)
    else:
        say_other_sampling(settings, stop_folder(settings))
        answer_prompt(model, stop, tokenizer, settings)


def main():
    """The command line."""
    command_line(Settings, run, recipe)
