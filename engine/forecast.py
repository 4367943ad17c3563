"""What a run of train.py will take: counts, memory and time, said before it begins. It equals no
function of the story (tests/engine/test_forecast.py).

Tokens are those of paths, rollouts and the evaluation, at most (every path as long as it may be)
until the lengths of real paths are known. Rates are measured on the machine at hand, by a few
steps.
"""
import dataclasses
import math
import time

import torch

from engine.fit import Prefixes, cache_bytes
from engine.refill import Batch
from plumbing import memory, processes
from plumbing.budget_plan import parse_checkpoints
from plumbing.progress import shown_time
from sample import Path, room, sampling_of
from train import Example, new_stop

LIKELY = 1 / 2  # of the longest length: a guess, until real paths are there


@dataclasses.dataclass
class Forecast:
    """A run's work, in numbers. Lengths are in tokens, rates in tokens a second, times in
    seconds."""
    problems: int           # to make labels from; 0 where the labels are given
    paths: int              # a problem
    prefixes: int           # to label or, where labels are given, to train on
    rollouts: int           # a prefix; 0: labels are outcomes of paths, or are given
    tests: int              # held-out problems
    n: int                  # paths of each, to evaluate
    path_length: float      # of a path, prompt apart
    rollout_length: float   # of a rollout, from the checkpoint on
    rate: float             # of decoding
    fit_seconds: float

    def tokens(self):
        """{part: tokens to decode}."""
        return {
            "paths": self.problems * self.paths * self.path_length,
            "rollouts": self.prefixes * self.rollouts * self.rollout_length,
            "evaluation": self.tests * self.n * self.path_length}

    def seconds(self):
        """{part: seconds}, in the order of the work."""
        decoding = {part: count / self.rate for part, count in self.tokens().items()}
        return {
            "paths": decoding["paths"],
            "rollouts": decoding["rollouts"],
            "fit": self.fit_seconds,
            "evaluation": decoding["evaluation"]}

    def describe_work(self):
        """Lines that say how much there is to do."""
        tokens = self.tokens()
        lines = []
        if self.problems:
            lines.append(
                f"{self.problems:,} problems x {self.paths} paths, "
                f"{tokens['paths'] / 1e6:,.1f} M tokens")
            if self.rollouts:
                lines.append(
                    f"{self.prefixes:,} prefixes x {self.rollouts} rollouts, "
                    f"{tokens['rollouts'] / 1e6:,.1f} M tokens")
            else:
                lines.append(f"{self.prefixes:,} prefixes, labelled by their paths' outcomes")
        if self.tests:
            lines.append(
                f"{self.tests:,} held-out problems x {self.n} paths, "
                f"{tokens['evaluation'] / 1e6:,.1f} M tokens")
        return lines

    def describe_times(self):
        """One line of the time that each part takes, and all together."""
        seconds = self.seconds()
        parts = ", ".join(
            f"{part} {in_time(value)}" for part, value in seconds.items() if value > 0)
        total = in_time(sum(seconds.values()))
        return f"{parts}; together {total}, an estimate from {self.rate:,.0f} tok/s"

    def describe_likely(self):
        """One line of what is likely, where the lengths of paths are bounds yet."""
        shorter = dataclasses.replace(
            self, path_length=self.path_length * LIKELY,
            rollout_length=self.rollout_length * LIKELY)
        total = in_time(sum(shorter.seconds().values()))
        what = "paths and rollouts have" if self.rollouts else "paths have"
        return (f"likely about {total}, if {what} half of the tokens that they may have, and no "
                "problem is dropped")


def in_time(seconds):
    """Seconds in words; what is less than one is not nothing."""
    return "under 1 s" if seconds < 1 else shown_time(seconds)


@torch.inference_mode()
def decoding_rate(model, prompt, rows, limit, sampling, seconds=2.0):
    """Tokens a second of decoding `rows` paths, measured for a moment: an estimate. Their lengths
    are spread from the prompt's to nearly the limit, as where freed rows take waiting paths. The
    cached keys are zeros there: they are read as fast as others. All are paths of one prompt: to
    read hundreds takes minutes."""
    capacity = len(prompt) + limit
    paths = [Path(prompt, i) for i in range(rows)]
    batch = Batch(model, paths, capacity, limit, sampling, eos_ids=())
    most_steps = 1 + limit // 8
    spread = max(0, limit - most_steps - 1)
    begun = batch.cache.counts.tolist()
    lengths = [length + spread * row // rows for row, length in enumerate(begun)]
    batch.cache.advance(spread)
    batch.cache.set_lengths(lengths)
    start = time.perf_counter()
    batch.decode(until=1)
    steps = 1
    if most_steps > 1:  # the first step warmed up
        start = time.perf_counter()
        steps = 0
    while 1 + steps < most_steps and time.perf_counter() - start < seconds:
        steps += 1
        batch.decode(until=1 + steps)
    return rows * max(steps, 1) / (time.perf_counter() - start)


def make_forecast(model, prompts, prefixes, tests, settings):
    """The Forecast of a run from prompts (of its problems, or else of its tests) and the number of
    prefixes, with every path as long as it may be. Rates are measured by a few steps."""
    limit = min(room(model, prompt, settings.max_new_tokens) for prompt in prompts)
    capacity = max(len(prompt) for prompt in prompts) + limit
    checkpoints = parse_checkpoints(settings.prefix)
    labelling = settings.labels is None
    problems = len(prompts) if labelling else 0
    paths = problems * settings.paths + len(tests) * settings.n
    memory.require_paths(max(paths, settings.rollouts))
    rows = memory.choose_rows(model, capacity, settings.batch)
    if processes.is_first():
        print(f"plan: {memory.describe_rows(model, rows, capacity)}", flush=True)
    longest = max(prompts, key=len)
    rate = decoding_rate(model, longest, max(1, min(rows, paths)), limit, sampling_of(settings))
    return Forecast(
        problems=problems,
        paths=settings.paths,
        prefixes=prefixes,
        rollouts=settings.rollouts if labelling else 0,
        tests=len(tests),
        n=settings.n,
        path_length=limit,
        rollout_length=max(0, limit - sum(checkpoints) / len(checkpoints)),
        rate=rate * processes.count(),
        fit_seconds=fit_seconds(model, longest, prefixes, settings) / processes.count())


def fit_seconds(model, prompt, prefixes, settings):
    """How long a fit on so many prefixes takes, from one pass over prefixes of the usual length."""
    checkpoints = parse_checkpoints(settings.prefix)
    length = len(prompt) + sum(checkpoints) // len(checkpoints)
    ids = (prompt * (length // len(prompt) + 1))[:length]
    examples = [Example(ids, 0.5, "", None)] * min(settings.batch_size, prefixes)
    stop = new_stop(model, settings)
    seconds = []
    for _ in range(2):  # the first warms up
        start = time.perf_counter()
        batch = Prefixes(model, examples, settings.batch_size, settings.m, cache_bytes=0)
        cache, labels = batch[0]
        read = time.perf_counter()
        stop.loss(stop(model, cache), labels).backward()
        stop.head.bias.grad.sum().item()  # waits for the device
        seconds = [read - start, time.perf_counter() - read]
    reading, step = seconds
    passes = math.ceil(prefixes / settings.batch_size)
    kept = cache.nbytes * passes <= cache_bytes(model, settings)
    return passes * (reading * (1 if kept else settings.epochs) + step * settings.epochs)


def restate(forecast, records, cuts):
    """Print the forecast again once the paths are there: their lengths and the prefixes that stay
    are known."""
    lengths = [len(path) for record in records for path in record["paths"]]
    beyond = [len(cut.path) - len(cut.prefix) for cut in cuts]
    forecast = dataclasses.replace(
        forecast,
        problems=0,
        prefixes=len(cuts),
        path_length=sum(lengths) / len(lengths),
        rollout_length=sum(beyond) / max(1, len(beyond)),
        fit_seconds=forecast.fit_seconds * len(cuts) / forecast.prefixes)
    print(f"plan: paths have {forecast.path_length:,.0f} tokens on average; still to come: "
          f"{forecast.describe_times()}", flush=True)
