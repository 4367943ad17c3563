"""What STOP costs inside the loop (paper, Tables 7 and 16), and what sharing a prefix saves its rollouts.

    python tests/bench_stop.py [--size toy|100m] [--prefix 512]

Launch 64 prefixes, check them, and compare: seconds of the check over seconds of the launch; tokens per second with and
without the check. Then K = 32 continuations of one prefix: its prefill once and copied, against 32 prefills. Random
weights, m = 4, LoRA of rank 16 on all seven linears. Medians of `rounds`. Not a test. Last line: one JSON object.
"""
import dataclasses
import json
import statistics

import torch

from bench_sample import ROWS, SAMPLING, SIZES, make_prompt, now, random_state
from model import Config, Decoder
from sample import Batch, Path, command_line, option, prefill
from stop import Stop


@dataclasses.dataclass
class Settings:
    """What the benchmark can be told."""

    size: str = option("100m", f"one of {', '.join(SIZES)}")
    prefix: int = option(512, "new tokens at the checkpoint")
    rollouts: int = option(32, "continuations of one prefix")
    device: str = option("cuda" if torch.cuda.is_available() else "cpu", "torch device")
    dtype: str = option("bfloat16" if torch.cuda.is_available() else "float32", "of the base model")
    threads: int = option(2, "CPU threads")
    rounds: int = option(3, "runs of each; the median counts")


def main(settings):
    torch.set_num_threads(settings.threads)
    device, dtype = torch.device(settings.device), getattr(torch, settings.dtype)
    config = Config.from_dict(SIZES[settings.size])
    with torch.device("meta"):
        model = Decoder(config)
    state = random_state(config, device, dtype)
    model.load_state_dict(state | {"lm_head.weight": state.get("lm_head.weight", state["model.embed_tokens.weight"])},
                          assign=True)
    model.requires_grad_(False).to(device)
    stop, prompt = Stop(model, rank=16).eval(), make_prompt(config.vocab_size)
    launch, check, once, each = [], [], [], []
    with torch.inference_mode():
        for _ in range(settings.rounds + 1):  # the first warms up
            paths = [Path(prompt, index) for index in range(ROWS)]
            began = now(device)
            batch = Batch(model, paths, len(prompt) + settings.prefix + stop.m, eos_ids=(), **SAMPLING)
            batch.decode(settings.prefix)
            batch.settle()
            middle = now(device)
            stop.chance(stop(model, batch.cache)).tolist()
            launch.append(middle - began)
            check.append(now(device) - middle)
            prefix = prompt + paths[0].ids
            began = now(device)
            prefill(model, [prefix])[0].regroup([0] * settings.rollouts, len(prefix) + 1)
            middle = now(device)
            prefill(model, [prefix] * settings.rollouts, 1)
            once.append(middle - began)
            each.append(now(device) - middle)
    launch, check, once, each = (statistics.median(times[1:]) for times in (launch, check, once, each))
    tokens = ROWS * settings.prefix
    print(json.dumps({
        "size": settings.size, "prefix": settings.prefix, "torch": torch.__version__, "launch_s": round(launch, 3),
        "check_s": round(check, 4), "check_share": round(check / launch, 5),
        "tok_per_s_without": round(tokens / launch, 1), "tok_per_s_with": round(tokens / (launch + check), 1),
        "throughput_drop": round(check / (launch + check), 5), "shared_prefill_s": round(once, 4),
        "separate_prefills_s": round(each, 4), "separate_over_shared": round(each / once, 1)}))


if __name__ == "__main__":
    command_line(Settings, main)
