"""What a check costs (paper, Tables 7 and 16): generation, verification, throughput of all types.

    python studies/overhead.py                           # the embedded toy, 64 paths, checkpoint 40
    python studies/overhead.py --model M --stop S --judge J --n 16 --prefix 2048

One prompt, n paths that never end before the limit (end tokens are sampled like any other), so that
all types do the same work: launch to the checkpoint, verify, resume the best. Verify: I compares
token sets, II re-reads the text with a second model, III takes the logits of a second pass over the
prefixes (a server that keeps what it computes while it decodes pays nearly nothing), IV appends
[STOP] to the cache that is there. Medians of `rounds` after a warm-up, types in turns. On CUDA the
seconds of launch and resume include capturing their decode steps as graphs.
"""
import dataclasses
import json
import os
import pathlib
import platform
import subprocess
import sys
import time
from statistics import median

import torch

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))
from baselines import CONFIDENCES, JUDGE, confidence, judge_scores, redundancy
from commands.common import open_model
from engine.refill import Batch
from eval import STOP, select
from plumbing.command_line import command_line, option, require_positive
from plumbing.records import write_atomic
from sample import Path, Sampling, sampling_of, validate_prompts
from shared import StopSettings, load_judge, load_problems, load_stop, require, require_targets
from stop import StopSignal, score_live

NO_PRUNING = "no pruning"
COLUMNS = (
    "type", "generation, s", "verify, s", "share", "tok/s to the checkpoint", "change",
    "whole run, s", "tokens", "whole run, tok/s", "peak, MB")

ROW = (
    "| {name} | {launch_s:.4g} | {verify_s:.4g} | {verify_share:.2%} | {checkpoint_tok_per_s:,.0f} "
    "| {throughput_change:+.2%} | {whole_run_s:.4g} | {tokens:,} | {whole_run_tok_per_s:,.0f} "
    "| {memory} |")


@dataclasses.dataclass(kw_only=True)
class Settings(StopSettings):
    """What `python studies/overhead.py` can be told."""
    judge: str | None = option(
        None, "reward model for type II (default: judge/ in the model's directory, if any)")
    out: str = option("runs/overhead", "folder for overhead.json")
    n: int = option(64, "paths")
    keep: int | None = option(None, "paths resumed (default: an eighth)")
    prefix: int | None = option(
        None, "the checkpoint, in new tokens (default: what STOP was trained for, or 2048)")
    threads: int = option(0, "CPU threads (0 = as many as torch takes)")
    rounds: int = option(5, "runs of each type; the median counts")


# The machine


def now(device):
    """Seconds, once the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def reset_peak(device):
    """Start the peak of memory anew: CUDA's allocations, or Linux's resident pages."""
    clear = pathlib.Path("/proc/self/clear_refs")
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif clear.exists():
        clear.write_text("5")


def peak(device):
    """Bytes, weights included, at the peak since `reset_peak`; None where that is not known."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = pathlib.Path("/proc/self/status")
    if not status.exists():
        return None
    kilobytes = status.read_text().split("VmHWM:")[1].split()[0]
    return int(kilobytes) * 1024


def machine(device):
    """What the figures were measured on, in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = pathlib.Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    cores = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{cores[0]}, {len(cores)} CPUs" if cores else platform.platform()


def commit():
    """The commit of this code, as git describes it."""
    command = ["git", "-C", str(pathlib.Path(__file__).parent), "describe", "--always", "--dirty"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip()


# One run


@dataclasses.dataclass
class Work:
    """What every run does. Lengths in tokens."""
    prompt: list        # token ids
    n: int              # paths launched
    keep: int           # paths resumed, where there is a check
    prefix: int         # the checkpoint
    limit: int          # new tokens of a path
    m: int              # positions that a check needs behind the prefix
    sampling: Sampling


@dataclasses.dataclass
class Cost:
    """What a run took: seconds, decoded tokens, bytes at the peak of memory (None: not known)."""
    launch: float
    verify: float
    resume: float
    tokens: int
    peak: int | None

    @property
    def seconds(self):
        """Of the whole run."""
        return self.launch + self.verify + self.resume

    @property
    def rate(self):
        """Tokens a second of the whole run."""
        return self.tokens / self.seconds


@torch.inference_mode()
def run_once(model, work, verify):
    """The Cost of one whole run.
    verify(batch) -> n scores of the paths in batch.live; None: all paths go on, without a check."""
    device = model.device
    prompt_length = len(work.prompt)
    reset_peak(device)
    start = now(device)
    paths = [Path(list(work.prompt), index) for index in range(work.n)]
    capacity = prompt_length + work.limit + work.m
    batch = Batch(model, paths, capacity, work.limit, work.sampling, eos_ids=())
    batch.decode(until=work.prefix)
    batch.settle()
    launched = now(device)
    verified = launched
    if verify is not None:
        kept = select(verify(batch), work.keep)
        verified = now(device)
        batch.prune([path for path in paths if path.index not in kept])
        batch.resume(1, prompt_length + work.limit)
    batch.decode(until=work.limit)
    end = now(device)
    tokens = sum(len(path.ids) for path in paths)
    return Cost(launched - start, verified - launched, end - verified, tokens, peak(device))


def verifiers(model, stop, judge, tokenizer, problem, prefix):
    """{type: a function of a batch at the checkpoint that scores its paths, or None}.
    judge: its (Decoder, Tokenizer), or None."""
    def record_of(batch):
        prompt_ids = batch.live[0].prompt_ids
        return {"prompt_ids": prompt_ids, "paths": [path.ids for path in batch.live]}

    def compare(batch):
        return redundancy([record_of(batch)], prefix)

    def reread(batch):
        return judge_scores(*judge, tokenizer, [problem], [record_of(batch)], prefix)

    def doubt(batch):
        return confidence(model, [record_of(batch)], prefix)[CONFIDENCES[0]]

    def check(batch):
        score_live(StopSignal(model, stop), batch)
        return [path.score for path in batch.live]

    found = {NO_PRUNING: None, "Jaccard (I)": compare}
    if judge is not None:
        found[JUDGE] = reread
    return found | {"confidence (III)": doubt, STOP: check}


def measure(model, work, functions, rounds):
    """{type: `rounds` Costs} of the types in turns, after one run of each that warms up."""
    costs = {}
    for turn in range(rounds + 1):
        for name, verify in functions.items():
            cost = run_once(model, work, verify)
            if turn > 0:
                costs.setdefault(name, []).append(cost)
    return costs


# The table


def middle(costs, figure):
    """The median of one figure of some Costs."""
    return median(getattr(cost, figure) for cost in costs)


def summarise(costs, n, prefix):
    """Rows {type: figures} of {type: Costs}: medians. Throughputs in tokens a second: to the
    checkpoint, check included (n * prefix tokens over launch + verify), and of whole runs; the
    change is against no pruning."""
    launch = middle(sum(costs.values(), []), "launch")  # the same work for all: one figure
    rows = {}
    for name, group in costs.items():
        verify = middle(group, "verify")
        peaks = [cost.peak for cost in group if cost.peak is not None]
        rows[name] = {
            "launch_s": launch,
            "verify_s": verify,
            "verify_share": verify / launch,
            "checkpoint_tok_per_s": n * prefix / (launch + verify),
            "tokens": group[0].tokens,
            "whole_run_s": middle(group, "seconds"),
            "whole_run_tok_per_s": middle(group, "rate"),
            "peak_bytes": max(peaks, default=None)}
    base = rows[NO_PRUNING]["checkpoint_tok_per_s"]
    for row in rows.values():
        row["throughput_change"] = row["checkpoint_tok_per_s"] / base - 1
    return rows


def table(rows):
    """Rows of `summarise` in Markdown."""
    lines = [f"| {' | '.join(COLUMNS)} |", "|" + "---|" * len(COLUMNS)]
    for name, row in rows.items():
        memory = "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e6:,.0f}"
        lines.append(ROW.format(name=name, memory=memory, **row))
    return "\n".join(lines)


# The study


def plan(settings, stop, prompt):
    """The Work of a study's settings. ValueError on a setting that cannot be."""
    prefix = settings.prefix
    if prefix is None:
        prefix = stop.trained_for()[0]
    limit = settings.max_new_tokens or stop.trained_limit() or 2 * prefix
    keep = settings.keep
    if keep is None:
        keep = max(1, settings.n // 8)
    below = f"1 to less than the limit of {limit} new tokens"
    require("prefix", prefix < limit, prefix, below)
    require("keep", keep <= settings.n, keep, f"1 to n = {settings.n}")
    return Work(prompt, settings.n, keep, prefix, limit, stop.m, sampling_of(settings))


def main(settings):
    """Measure, print the machine and the table, write overhead.json; the last line is JSON."""
    require_positive(settings, "n", "keep", "prefix", "rounds", "max_new_tokens")
    require("threads", 0 <= settings.threads <= 1024, settings.threads, "0 to 1024")
    require_targets(settings.out, "overhead.json")
    model, tokenizer = open_model(settings)
    if settings.threads:
        torch.set_num_threads(settings.threads)
    stop = load_stop(settings, model)
    judge = load_judge(settings)
    problem = load_problems(settings)[0]
    work = plan(settings, stop, tokenizer.ask(problem))
    validate_prompts(model, [work.prompt], work.limit + stop.m)
    functions = verifiers(model, stop, judge, tokenizer, problem, work.prefix)
    costs = measure(model, work, functions, settings.rounds)
    rows = summarise(costs, work.n, work.prefix)

    about = {
        "machine": machine(model.device),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": commit(),
        "model": settings.model,
        "dtype": settings.dtype}
    for key in ("n", "keep", "prefix", "limit"):
        about[key] = getattr(work, key)
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    print(f"\n{table(rows)}")
    if judge is None:
        print("\nType II is left out: no judge was given (--judge).")
    out = pathlib.Path(settings.out)
    out.mkdir(parents=True, exist_ok=True)
    content = json.dumps(about | {"rows": rows}, indent=1) + "\n"
    write_atomic(out / "overhead.json", content)
    last = {"out": settings.out}
    for name, row in rows.items():
        last[f"verify_s {name}"] = float(f"{row['verify_s']:.4g}")
    print(json.dumps(last))


if __name__ == "__main__":
    command_line(Settings, main)
