"""Batched sampling on the static cache (section 5 has the settings), and paths stored for later
use.

python sample.py --model DIR --prompt "What is 1 + 1?" --n 8

A path's noise for its t-th new token is a hash of (seed, prompt, path index, t): neither another
row of the batch, nor the number of rows, nor who was pruned has a part in it.

Letters: B rows, V vocabulary.
"""
import dataclasses
import json
import time

from commands.common import open_model, peak_memory
from engine.refill import generate
from plumbing.command_line import Common, command_line, option, require_positive
from plumbing.progress import progress, say
from sample import decoded_tokens, room, sampling_of


@dataclasses.dataclass(kw_only=True)
class Settings(Common):
    """What `python sample.py` can be told."""
    prompt: str = option(dataclasses.MISSING, "the user's message")
    n: int = option(8, "paths")


def run(settings):
    """Print n paths as they end; the last line is one JSON object."""
    require_positive(settings, "n", "batch", "max_new_tokens")
    sampling = sampling_of(settings)
    model, tokenizer = open_model(settings)
    prompt_ids = tokenizer.prompt(settings.prompt)
    limit = room(model, prompt_ids, settings.max_new_tokens)

    def show(path):
        text = tokenizer.decode(path.ids)
        say(f"--- path {path.index} ({path.status}, {len(path.ids)} tokens)\n{text}")

    start = time.perf_counter()
    with progress("paths", settings.n * limit, "tok") as bar:
        (paths,) = generate(
            model, [prompt_ids], settings.n, limit, **dataclasses.asdict(sampling),
            batch=settings.batch, bar=bar, on_end=show)
    seconds = time.perf_counter() - start
    tokens = decoded_tokens(paths)
    print(json.dumps({
        "tokens": tokens,
        "seconds": round(seconds, 3),
        "tok_per_s": round(tokens / seconds, 1),
        "peak_memory_bytes": peak_memory()}))


def main():
    """The command line."""
    command_line(Settings, run)
