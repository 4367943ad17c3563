"""Batched sampling on the static cache (section 5 has the settings): paths of a prompt, or of the
first problems of a file.

    python sample.py --model DIR --prompt "What is 1 + 1?" --n 8
    python sample.py --model DIR --data problems.jsonl --problems 3

A path's noise for its t-th new token is a hash of (seed, prompt, path index, t): neither another
row of the batch, nor the number of rows, nor who was pruned has a part in it.

Letters: B rows, V vocabulary.
"""
import dataclasses
import json
import time

from commands.common import (
    open_model, peak_memory, say_unknown_in_data, say_unknown_in_prompt)
from engine.refill import generate
from plumbing.command_line import (
    Common, command_line, option, refuse_flags, require_positive)
from plumbing.problems import read_problems
from plumbing.progress import progress, say
from sample import decoded_tokens, room, sampling_of


@dataclasses.dataclass(kw_only=True)
class Settings(Common):
    """What `python sample.py` can be told."""
    prompt: str | None = option(
        None, "the user's message, as it is", heading="what to sample")
    data: str | None = option(
        None, "instead of one message, a file of problems (as eval.py reads it), which come with "
        "the paper's instruction")
    problems: int | None = option(None, "with --data: only the first so many problems")
    n: int = option(8, "paths of each")


def recipe(flags):
    """No defaults of its own. ValueError on flags that have no effect beside others."""
    if "data" not in flags:
        refuse_flags(flags, ["problems"], "it counts the problems of --data")
    return {}, None


def read_prompts(settings, tokenizer):
    """{name: token ids} of what is asked: one prompt, named "", or problems by their ids."""
    if settings.data is None:
        prompt_ids = tokenizer.prompt(settings.prompt)
        say_unknown_in_prompt(tokenizer, prompt_ids, settings)
        return {"": prompt_ids}
    problems = read_problems(settings.data, with_answers=False)[:settings.problems]
    say_unknown_in_data(tokenizer, problems, settings)
    return {problem.id: tokenizer.ask(problem) for problem in problems}


def run(settings):
    """Print n paths of each prompt as they end; the last line is one JSON object."""
    if (settings.prompt is None) == (settings.data is None):
        found = "none" if settings.prompt is None else "both"
        raise ValueError(f"prompt, data: found {found}, expected one of the two")
    require_positive(settings, "n", "batch", "max_new_tokens", "problems")
    sampling = sampling_of(settings)
    model, tokenizer = open_model(settings)
    prompts = read_prompts(settings, tokenizer)
    limit = min(room(model, ids, settings.max_new_tokens) for ids in prompts.values())
    names = {tuple(ids): name for name, ids in prompts.items()}

    def show(path):
        name = names[tuple(path.prompt_ids)]
        of_problem = f" of problem {name}" if name else ""
        text = tokenizer.decode(path.ids)
        say(f"--- path {path.index}{of_problem} ({path.status}, {len(path.ids)} tokens)\n{text}")

    start = time.perf_counter()
    with progress("paths", len(prompts) * settings.n * limit, "tok") as bar:
        groups = generate(
            model, list(prompts.values()), settings.n, limit, **dataclasses.asdict(sampling),
            batch=settings.batch, bar=bar, on_end=show)
    seconds = time.perf_counter() - start
    tokens = sum(decoded_tokens(paths) for paths in groups)
    print(json.dumps({
        "tokens": tokens,
        "seconds": round(seconds, 3),
        "tok_per_s": round(tokens / seconds, 1),
        "peak_memory_bytes": peak_memory()}))


def main():
    """The command line."""
    command_line(Settings, run, recipe)
