"""What STOP costs inside the loop (paper, Tables 7 and 16), and what sharing a prefix saves.

    python tests/bench_stop.py [--size toy|100m] [--prefix 512]

Launch 64 prefixes, check them, and compare: seconds of the check over seconds of the launch; tokens
per second with and without the check. Then K = 32 continuations of one prefix, as supervision needs
them: its prefill once and copied, against 32 prefills. Random weights, m = 4, LoRA of rank 16 on
all seven linears. Medians of `rounds` after a warm-up. Not a test. Last line: one JSON object.
"""
import dataclasses
import json
from statistics import median

import torch

from bench_sample import ROWS, SIZES, new_batch, now, random_model
from plumbing.checkpoint import Config
from plumbing.command_line import command_line, option, require_choice, require_positive
from sample import prefill
from stop import Stop, StopSignal, score_live


@dataclasses.dataclass
class Settings:
    """What the benchmark can be told."""
    size: str = option("100m", f"one of {', '.join(SIZES)}")
    prefix: int = option(512, "new tokens at the checkpoint")
    rollouts: int = option(32, "continuations of one prefix")
    device: str = option("cuda" if torch.cuda.is_available() else "cpu", "torch device")
    dtype: str = option(
        "bfloat16" if torch.cuda.is_available() else "float32", "of the base model")
    threads: int = option(2, "CPU threads")
    rounds: int = option(3, "runs of each; the median counts")


@dataclasses.dataclass
class Run:
    """Seconds of one run."""
    launch: float
    check: float
    shared: float    # one prefill, its row copied
    separate: float  # a prefill for every continuation


@torch.inference_mode()
def run_once(model, stop, prefix, rollouts):
    """One Run."""
    device = model.device
    start = now(device)
    batch = new_batch(model, prefix + 1, stop.m)  # at its limit a path would end, and leave
    paths = list(batch.live)
    batch.decode(until=prefix)
    batch.settle()
    launched = now(device)
    score_live(StopSignal(model, stop), batch)
    checked = now(device)

    prefix_ids = paths[0].prompt_ids + paths[0].ids
    cache, _ = prefill(model, [prefix_ids])
    cache.rebuild([0] * rollouts, len(prefix_ids) + 1)
    shared = now(device)
    prefill(model, [prefix_ids] * rollouts, 1)
    separate = now(device)
    return Run(launched - start, checked - launched, shared - checked, separate - shared)


def main(settings):
    """Measure; the last line is one JSON object."""
    require_choice(settings, "size", *SIZES)
    require_positive(settings, "prefix", "rollouts", "threads", "rounds")
    torch.set_num_threads(settings.threads)
    device = torch.device(settings.device)
    config = Config.from_dict(SIZES[settings.size])
    model = random_model(config, device, getattr(torch, settings.dtype))
    stop = Stop(model, rank=16).eval()
    runs = []
    for _ in range(settings.rounds + 1):  # the first warms up
        runs.append(run_once(model, stop, settings.prefix, settings.rollouts))

    def middle(figure):
        return median(getattr(run, figure) for run in runs[1:])

    launch = middle("launch")
    check = middle("check")
    both = launch + check
    shared = middle("shared")
    separate = middle("separate")
    tokens = ROWS * settings.prefix
    row = {"size": settings.size, "prefix": settings.prefix, "torch": torch.__version__}
    row["launch_s"] = round(launch, 3)
    row["check_s"] = round(check, 4)
    row["check_share"] = round(check / launch, 5)
    row["tok_per_s_without"] = round(tokens / launch, 1)
    row["tok_per_s_with"] = round(tokens / both, 1)
    row["throughput_drop"] = round(check / both, 5)
    row["shared_prefill_s"] = round(shared, 4)
    row["separate_prefills_s"] = round(separate, 4)
    row["separate_over_shared"] = round(separate / shared, 1)
    print(json.dumps(row))


if __name__ == "__main__":
    command_line(Settings, main)
