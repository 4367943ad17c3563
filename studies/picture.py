"""A picture of one run, beside what is known of its question: right and wrong answers, and, on the
embedded toy, the line where a path goes wrong.

    python studies/picture.py                                  # writes runs/picture.html
    python studies/picture.py --problem toy-test-0268 --whole  # beside the run without pruning
    python studies/picture.py --model M --data problems.jsonl --problem ID --out run.svg

`python stop.py --prompt "..." --picture run.html` draws any question, without that knowledge.
"""
import dataclasses
import functools
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
from commands import picture
from commands.common import open_model
from commands.stop import Narrator
from engine.launch import launch_check_resume
from engine.refill import generate
from plumbing.answers import extract_answer
from plumbing.budget_plan import parse_cascade
from plumbing.command_line import command_line, option, require_positive, shown
from sample import decoded_tokens, sampling_of
from shared import StopSettings, load_problems, load_stop
from toy.reading import wrong_part


@dataclasses.dataclass(kw_only=True)
class Settings(StopSettings):
    """What `python studies/picture.py` can be told."""
    problem: str | None = option(None, "id of the problem (default: the first)")
    n: int = option(64, "paths launched")
    keep: int = option(8, "paths resumed")
    prefix: int | None = option(
        None, "the checkpoint, in new tokens (default: what STOP was trained for, or 2048)")
    cascade: str | None = option(None, "several checkpoints, as stop.py takes them")
    whole: bool = option(False, "the same question without pruning beside it: n whole paths")
    out: str = option("runs/picture.html", "file to write: a page (.html) or a drawing (.svg)")


def find_problem(problems, name):
    """The problem of this id, or the first."""
    if name is None:
        return problems[0]
    for problem in problems:
        if problem.id == name:
            return problem
    raise ValueError(f"problem: found {shown(name)}, expected the id of a problem in the data")


def runs_of(model, tokenizer, stop, problem, settings):
    """The picture.Run of a problem, and that without pruning, or None."""
    prompt = tokenizer.ask(problem)
    limit = stop.limit(model, prompt, settings.max_new_tokens)
    prefix = settings.prefix
    if prefix is None:
        prefix = stop.trained_for()[0]
    stages = [(prefix, settings.keep)]
    if settings.cascade is not None:
        stages = parse_cascade(settings.cascade)
    narrator = Narrator(quiet=True)

    def answer_of(path):
        return extract_answer(tokenizer.completion(path.ids), problem.kind)

    def drawn(paths, checks, saved):
        return picture.record(
            problem.problem, paths, checks, tokenizer, answer_of, saved, problem.kind,
            problem.answer, functools.partial(wrong_part, problem.problem))

    sampling = dataclasses.asdict(sampling_of(settings))
    paths = launch_check_resume(
        model, stop, prompt, settings.n, stages=stages, max_new_tokens=limit, watcher=narrator,
        **sampling)
    tokens = decoded_tokens(paths)
    if not settings.whole:
        kept = [path for path in paths if path.status != "pruned"]
        return drawn(paths, narrator.checks, picture.saved_against(settings.n, tokens, kept)), None
    (whole,) = generate(model, [prompt], settings.n, limit, **sampling)
    all_tokens = decoded_tokens(whole)
    saved = f"{1 - tokens / all_tokens:.0%} less than {settings.n} whole paths"
    return drawn(paths, narrator.checks, saved), drawn(whole, [], "")


def main(settings):
    """Run, draw, write; the last line is one JSON object."""
    require_positive(settings, "n", "keep", "prefix", "max_new_tokens", "batch")
    Path(settings.out).absolute().parent.mkdir(parents=True, exist_ok=True)
    picture.check_file(settings.out)
    model, tokenizer = open_model(settings)
    stop = load_stop(settings, model)
    problem = find_problem(load_problems(settings), settings.problem)
    run, whole = runs_of(model, tokenizer, stop, problem, settings)
    picture.write(settings.out, run, whole)
    answer = run.votes[0].answer if run.votes else None
    print(f"wrote {settings.out}")
    print(json.dumps({"picture": settings.out, "answer": answer, "tokens": run.tokens}))


if __name__ == "__main__":
    command_line(Settings, main)
