"""STOP (arXiv 2604.16029, section 3): Launch N paths, Check their prefixes, Resume the best k, and
vote.

    python stop.py --prompt "..." --n 64 --keep 8
    python stop.py --data questions.jsonl --out answers.jsonl               # one answer per record
    python stop.py --score prefixes.jsonl --out scored.jsonl --trace DIR    # one score per record

A frozen model, m learned [STOP] embeddings appended to a cached prefix, a LoRA that is active only
there, and a head on the last [STOP] position's final hidden state h_m:

    h = f([prefix; S]),  p = sigmoid(w h_m + b)  =  the chance that this path ends right   (eq. 4)
"""
import contextlib
import dataclasses
import functools
import json
import textwrap
import time

import torch

from commands import picture
from commands.common import (
    open_model, say_other_sampling, say_unknown_in_data, say_unknown_in_prompt, stop_folder)
from commands.questions import answer_file, answer_question
from commands.stages import LAUNCHED, by_plan, stages_asked
from engine.stored import model_digest, stop_digest
from plumbing.answers import same_answer
from plumbing.budget_plan import parse_cascade, validate_stages
from plumbing.command_line import (
    Common, command_line, option, refuse_flags, require_choice, require_one_process,
    require_positive, shown)
from plumbing.files import require_target
from plumbing.labels import read_prefixes
from plumbing.problems import Problem, read_problems
from plumbing.progress import progress, say, shown_time
from plumbing.scores import score_file
from sample import prefill, sampling_of, validate_prompts
from stop import Stop, Watcher, like_lengths

# What there may be to work on, and the flags of what is written of it
FILES = {"prompt": (), "data": ("out",), "score": ("out", "trace")}

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
OF_ONE_PROMPT = ("kind", "answer", "picture")  # those of them that a file of questions does not ask

WIDTH = 100       # columns of what is printed of a check
SHOWN_TEXT = 600  # characters of the path that is shown beside the answer


@dataclasses.dataclass(kw_only=True)
class Settings(Common):
    """What `python stop.py` can be told."""
    prompt: str | None = option(None, "the question", heading="what to work on")
    data: str | None = option(
        None, "instead of one question, a file of them: JSON lines with problem and, if known, "
        "answer, or as eval.py reads them")
    problems: int | None = option(None, "with --data: only the first so many questions")
    score: str | None = option(
        None, "instead of a question, prefixes to score: JSON lines with prefix_token_ids")
    kind: str = option("math", "math or choice: what the answer is")
    answer: str | None = option(
        None, "the right answer, where it is known: what is right is marked")
    stop: str | None = option(
        None, "folder of the trained STOP (default: stop/ in the model's directory)")

    n: int | None = option(
        None, "paths launched (default: 64, or as many as --budget pays for)",
        heading="which paths go on")
    keep: int | None = option(None, "paths resumed (default: an eighth)")
    retention: float | None = option(None, "paths resumed, as a share of n")
    prefix: int | None = option(
        None, "the checkpoint, in new tokens (default: what STOP was trained for, or 2048)")
    branch: int | None = option(
        None, "how many paths each resumed prefix goes on as (default: 1)")
    cascade: str | None = option(
        None, "several checkpoints, checkpoint:keep or checkpoint:keepxbranch, as in "
        "2048:32,4096:4x2")
    budget: int | None = option(
        None, "all tokens to spend: by the plan for them in STOP's plan.json; where there is none, "
        "by the paper's guideline")
    task_length: int | None = option(
        None, "tokens of a usual response, for the guideline (default: 8650, as in the paper, or "
        "the limit of a path where that is less)")
    decide: bool = option(True, "stop when the running paths can no longer change the vote")

    out: str | None = option(
        None, "file of the answers of --data, or of the scores of --score (default: printed); "
        "taken up where it stopped", heading="what is written")
    trace: str | None = option(
        None, "with --score: folder for the [STOP] positions' hidden states, layer by layer")
    picture: str | None = option(
        None, "file for a picture of the run: a page (.html) or a drawing (.svg)")


def recipe(flags):
    """Scores are made in float32 unless --dtype says otherwise: they are what others check
    against. ValueError on flags that have no effect beside others."""
    if "score" in flags:
        refuse_flags(flags, OF_A_PROMPT, "it shapes the paths of a --prompt, and no --score")
    if "data" in flags:
        refuse_flags(flags, OF_ONE_PROMPT, "it serves one --prompt, and no --data")
    else:
        refuse_flags(flags, ["problems"], "it counts the questions of --data")
        require_one_process()
    if "budget" not in flags:
        refuse_flags(flags, ["task_length"], "it serves the guideline of a --budget alone")
    return ({"dtype": "float32"} if "score" in flags else {}), None


def require_one_task(settings):
    """Raise ValueError unless the settings name one thing to work on, and only files that it
    has."""
    given = [flag for flag in (*FILES, "out", "trace") if getattr(settings, flag) is not None]
    if not given or given[0] not in FILES or not set(given[1:]) <= set(FILES[given[0]]):
        found = " ".join(f"--{flag}" for flag in given) or "none"
        raise ValueError(f"found {found}, expected --prompt, or --data and --out, or --score, "
                         "--out and --trace")


def validate(settings):
    """Raise ValueError on settings that cannot be, before any work is done."""
    require_one_task(settings)
    sampling_of(settings)
    require_positive(settings, "max_new_tokens", "batch", "n", "keep", "retention", "budget",
                     "task_length", "prefix", "branch", "problems")
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
    if settings.data is not None and settings.out is None:
        raise ValueError("out: found none, expected a file for the answers of --data")
    if settings.out is not None:
        require_target(settings.out)


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
            show_check(self.checks[-1], checked, kept)

    def resumed(self, batch, paths):
        if self.decider is not None:
            self.decider.resumed(batch, paths)


def show_check(check, checked, kept):
    """Print the scores of one picture.Check, the best first, equal ones on a line."""
    new = check.went_on - check.stayed
    branches = f", and {new} new branches" if new else ""
    say(f"check at {check.checkpoint} tokens: {check.stayed} of {len(checked)} paths "
        f"stay{branches}")
    names_kept = {path.name for path in kept}
    groups = {}  # score as it is shown -> {"kept" or "pruned": names}
    for path in sorted(checked, key=lambda path: (path.index, path.branches)):
        group = groups.setdefault(f"{path.score:.4f}", {})
        group.setdefault("kept" if path.name in names_kept else "pruned", []).append(path.name)
    for score, group in sorted(groups.items(), reverse=True):
        count = sum(map(len, group.values()))
        names = "; ".join(f"{what} {', '.join(group[what])}" for what in sorted(group))
        line = f"  score {score}  {picture.counted(count, 'path'):>8}: {names}"
        say(textwrap.fill(line, WIDTH, subsequent_indent=" " * 26))


def answer_prompt(model, stop, tokenizer, settings):
    """Run one question through Launch, Check, Resume; print scores, answers and votes."""
    options = {} if settings.kind == "choice" else None  # they stand in the prompt's own text
    prompt_ids = tokenizer.ask(Problem("prompt", settings.prompt, "", options))
    say_unknown_in_prompt(tokenizer, prompt_ids, settings)
    limit = stop.limit(model, prompt_ids, settings.max_new_tokens)
    settings = by_plan(settings, stop, limit)
    n, stages = stages_asked(settings, stop, limit)
    narrator = Narrator()

    def with_narrator(decider):
        narrator.decider = decider
        return narrator

    start = time.perf_counter()
    with progress("paths", n * limit, "tok") as bar:
        answered = answer_question(
            model, stop, tokenizer, prompt_ids, settings.kind, n, stages, limit, settings,
            with_narrator, bar)
    seconds = time.perf_counter() - start

    finished = [ballot.path for ballot in answered.ballots]
    for ballot in answered.ballots:
        print(f"{named(ballot.path)}: {ballot.answer}{mark_of(ballot.answer, settings)}")
    show_answer(answered, tokenizer, settings)
    # what n paths would have taken, had each become as long as the kept ones are on average
    unpruned = n * sum(len(path.ids) for path in finished) / len(finished)
    saved = picture.saved_against(n, answered.tokens, finished)
    print(f"{answered.tokens:,} tokens in {shown_time(seconds)}, {saved}", flush=True)
    if settings.picture is not None:  # behind the answers: a disk may be full by now
        answers = {ballot.path.name: ballot.answer for ballot in answered.ballots}
        run = picture.record(
            settings.prompt, answered.paths, narrator.checks, tokenizer,
            lambda path: answers[path.name], saved, settings.kind, settings.answer)
        picture.write(settings.picture, run)
        print(f"wrote {settings.picture}")
    print(json.dumps({
        "answer": answered.answer,
        "weighted": answered.answer,
        "majority": answered.majority,
        "kept": sum(path.status != "pruned" for path in answered.paths),
        "decided_early": sum(path.status == "decided" for path in answered.paths),
        "n": n,
        "tokens": answered.tokens,
        "tokens_saved_estimate": round(1 - answered.tokens / unpruned, 4),
        "seconds": round(seconds, 3)}))


def named(path):
    """A finished path in words."""
    return f"path {path.name} ({path.status}, {len(path.ids)} tokens, score {path.score:.4f})"


def show_answer(answered, tokenizer, settings):
    """Print the text of the best path that gives the answer of an Answered, and the answer."""
    if answered.best is None:
        count = picture.counted(len(answered.ballots), "path")
        print(f"answer: none ({count}, none with an answer)", flush=True)
        return
    text = tokenizer.decode(answered.best.path.ids, skip_special_tokens=True).strip()
    print(f"the best of those that answer {answered.answer}, {named(answered.best.path)}:")
    print(textwrap.indent(picture.visible(end_of(text)), "  "))
    winner = answered.of(answered.answer)
    most = answered.of(answered.majority)
    weight = sum(vote.weight for vote in answered.votes)
    voters = sum(len(vote.bars) for vote in answered.votes)
    decided = sum(path.status == "decided" for path in answered.paths)
    remark = f"; {decided} more could not change it" if decided else ""
    print(f"answer: {answered.answer} (score-weighted vote: {winner.weight:.2f} of {weight:.2f}; "
          f"majority: {answered.majority}, {len(most.bars)} of {picture.counted(voters, 'vote')}"
          f"{remark}){mark_of(answered.answer, settings)}", flush=True)


def end_of(text):
    """A text, or its last characters, from the beginning of a word."""
    if len(text) <= SHOWN_TEXT:
        return text
    end = text[-SHOWN_TEXT:]
    first, space, rest = end.partition(" ")
    return "... " + (rest if space else first)


def mark_of(answer, settings):
    """What stands behind an answer where the right one is known."""
    if settings.answer is None:
        return ""
    return picture.MARKS[same_answer(answer, settings.answer, settings.kind)]


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
    """Answer a prompt or a file of questions, or score a file of prefixes; the last line is one
    JSON object."""
    validate(settings)
    problems = None
    if settings.data is not None:
        problems = read_problems(settings.data, with_answers=False)[:settings.problems]
    model, tokenizer = open_model(settings)
    stop = Stop.load(stop_folder(settings), model)
    if settings.score is not None:
        score_prefixes(model, stop, settings)
        return
    say_other_sampling(settings, stop_folder(settings))
    if settings.data is not None:
        say_unknown_in_data(tokenizer, problems, settings)
        answer_file(model, stop, tokenizer, problems, settings)
    else:
        answer_prompt(model, stop, tokenizer, settings)


def main():
    """The command line."""
    command_line(Settings, run, recipe, shares_work=True)
