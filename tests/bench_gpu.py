"""Everything that is measured on a GPU, by one command of at most ten minutes.

    python tests/bench_gpu.py [--out bench_gpu.json] [--parts decode,check] [--device cuda]

Real shapes, random weights made on the device, cached lengths set instead of decoded. In order: the
tests of tests/story/test_cuda.py, the copy bandwidth that bounds a decode step, decoding at 1.5B
beside transformers, prefill, the check against its launch, refill, a step of the fit, gpt-oss-20b.
Figures are written after each part, so that a run that is cut off keeps those it has.
"""
import argparse
import dataclasses
import json
import math
import platform
import subprocess
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from model import Decoder  # noqa: E402
from plumbing.checkpoint import Config  # noqa: E402
from sample import Batch, Path as SampledPath, Sampling, prefill  # noqa: E402
from stop import Stop  # noqa: E402

QWEN_1_5B = {
    "model_type": "qwen2", "vocab_size": 151936, "hidden_size": 1536, "intermediate_size": 8960,
    "num_hidden_layers": 28, "num_attention_heads": 12, "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6, "rope_theta": 10000, "max_position_embeddings": 131072,
    "tie_word_embeddings": False, "eos_token_id": 151643}
QWEN_7B = QWEN_1_5B | {
    "vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944,
    "num_attention_heads": 28, "num_key_value_heads": 4}
QWEN3_8B = {
    "model_type": "qwen3", "vocab_size": 151936, "hidden_size": 4096, "intermediate_size": 12288,
    "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
    "rms_norm_eps": 1e-6, "rope_theta": 1000000, "max_position_embeddings": 131072,
    "tie_word_embeddings": False, "eos_token_id": 151645}
GPT_OSS_20B = {
    "model_type": "gpt_oss", "vocab_size": 201088, "hidden_size": 2880, "intermediate_size": 2880,
    "num_hidden_layers": 24, "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 64,
    "rms_norm_eps": 1e-5, "rope_theta": 150000, "max_position_embeddings": 131072,
    "tie_word_embeddings": False, "sliding_window": 128, "num_local_experts": 32,
    "num_experts_per_tok": 4, "eos_token_id": 200002,
    "rope_scaling": {"rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0,
                     "original_max_position_embeddings": 4096, "truncate": False}}


@dataclasses.dataclass
class Bench:
    """Where and how large."""
    device: str
    dtype: torch.dtype

    def model(self, raw):
        """A Decoder of this config.json with random weights, made on the device."""
        with torch.device("meta"):
            model = Decoder(Config.from_dict(raw))
        frequencies = model.frequencies  # made on the CPU, whatever the default device
        model = model.to(self.dtype).to_empty(device=self.device)
        model.frequencies = frequencies.to(self.device)
        generator = torch.Generator(self.device).manual_seed(0)
        with torch.no_grad():
            for weight in model.parameters():
                scale = 1.0 if weight.dim() == 1 else 1 / math.sqrt(weight.shape[-1])
                weight.normal_(0, scale, generator=generator)
        return model.requires_grad_(False)

    def wait(self):
        """Return when the device has done what it was told."""
        if self.device.startswith("cuda"):
            torch.cuda.synchronize()

    def seconds(self, work, times=3):
        """The shortest of several runs of work(), after one that warms up."""
        work()
        shortest = math.inf
        for _ in range(times):
            self.wait()
            start = time.perf_counter()
            work()
            self.wait()
            shortest = min(shortest, time.perf_counter() - start)
        return shortest


def random_ids(count, length, vocab):
    """`count` different lists of token ids."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(vocab, (count, length), generator=generator).tolist()


def batch_at(bench, model, rows, length, limit=512):
    """A Batch of `rows` paths of one short prompt whose cache claims `length` positions: zeros,
    which are read as fast as others."""
    prompt = random_ids(1, 64, model.config.vocab_size)[0]
    paths = [SampledPath(prompt, index) for index in range(rows)]
    batch = Batch(model, paths, rows, length + limit, limit, Sampling(), eos_ids=())
    batch.cache.advance(length - 64)
    return batch


@torch.inference_mode()
def measure_steps(bench, batch, steps=32):
    """Seconds of one decode step."""
    done = 0

    def run():
        nonlocal done
        done += steps
        batch.decode(until=done)

    return bench.seconds(run) / steps


def cuda_tests(bench):
    """tests/story/test_cuda.py in a process of its own: its last line."""
    command = [sys.executable, "-m", "pytest", "-q", "tests/story/test_cuda.py"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    return {"status": run.returncode, "result": (run.stdout.strip().splitlines() or [""])[-1]}


def bandwidth(bench):
    """Bytes a second of a device copy, read and written: what bounds a decode step."""
    source = torch.empty(2 ** 30, dtype=torch.uint8, device=bench.device)
    target = torch.empty_like(source)
    return {"copy_GB_s": 2 * source.nbytes / bench.seconds(lambda: target.copy_(source)) / 1e9}


def decode(bench):
    """1.5B: tokens a second by batch and length, and the share of what the bandwidth allows."""
    model = bench.model(QWEN_1_5B)
    weights = sum(weight.nbytes for weight in model.parameters())
    bound = bandwidth(bench)["copy_GB_s"] * 1e9
    figures = {}
    for length in (2048, 8192):
        for rows in (1, 16, 64, 256):
            batch = batch_at(bench, model, rows, length, limit=160)
            step = measure_steps(bench, batch)
            read = weights + rows * length * batch.cache.nbytes / (rows * batch.cache.capacity)
            figures[f"{rows} x {length}"] = {
                "tok_s": rows / step, "ms": 1e3 * step, "share_of_bound": read / bound / step}
            del batch
    return figures


def beside_transformers(bench):
    """The same sizes by transformers' generate on its own caches, for the same number of tokens."""
    import transformers
    config = transformers.Qwen2Config(**{k: v for k, v in QWEN_1_5B.items() if k != "model_type"})
    with torch.device(bench.device):
        torch.set_default_dtype(bench.dtype)
        model = transformers.Qwen2ForCausalLM(config).eval()
        torch.set_default_dtype(torch.float32)
    figures = {}
    for length in (2048, 8192):
        ids = torch.tensor(random_ids(64, length, QWEN_1_5B["vocab_size"]), device=bench.device)
        for cache in ("dynamic", "static"):
            seconds = {}
            for new in (1, 65):
                settings = dict(max_new_tokens=new, min_new_tokens=new, do_sample=True, top_k=40,
                                top_p=0.95, temperature=0.6, cache_implementation=cache,
                                eos_token_id=None, pad_token_id=0)
                seconds[new] = bench.seconds(lambda: model.generate(ids, **settings), times=1)
            step = (seconds[65] - seconds[1]) / 64  # the prefill cancels out
            figures[f"64 x {length} {cache}"] = {"tok_s": 64 / step, "ms": 1e3 * step}
    return figures


@torch.inference_mode()
def prefills(bench):
    """1.5B: tokens a second of reading one prompt."""
    model = bench.model(QWEN_1_5B)
    figures = {}
    for length in (2048, 16384):
        prompt = random_ids(1, length, model.config.vocab_size)
        figures[str(length)] = {"tok_s": length / bench.seconds(lambda: prefill(model, prompt))}
    return figures


@torch.inference_mode()
def check(bench):
    """The check against its launch: 64 paths at 1.5B, and 16 at 7B with rank 128, of 2,048 tokens.
    The launch is 2,048 steps at their mean length."""
    figures = {}
    for name, raw, rows in (("1.5B n 64", QWEN_1_5B, 64), ("7B n 16", QWEN_7B, 16)):
        model = bench.model(raw)
        stop = Stop(model, m=4, rank=128)
        launch = 2048 * measure_steps(bench, batch_at(bench, model, rows, 1024, limit=160))
        batch = batch_at(bench, model, rows, 2048)
        seconds = bench.seconds(lambda: stop(model, batch.cache))
        figures[name] = {"launch_s": launch, "check_s": seconds, "share": seconds / launch}
        del model, stop, batch
    return figures


@torch.inference_mode()
def refill(bench):
    """1.5B: 256 paths of very different lengths on 64 rows, with freed rows refilled and in
    waves."""
    model = bench.model(QWEN_1_5B)
    prompt = random_ids(1, 64, model.config.vocab_size)[0]
    limits = [32 + int(480 * (i * 0.618 % 1) ** 3) for i in range(256)]  # a long tail

    def run(waves):
        for wave in waves:
            paths = [SampledPath(prompt, index) for index in wave]
            batch = Batch(model, paths, 64, 640, 512, Sampling(), eos_ids=())
            ends = {index: limits[index] for index in wave}
            batch.eos_ids = EndsAt(batch, ends)
            batch.decode(until=512)

    tokens = sum(limits)
    together = bench.seconds(lambda: run([range(256)]), times=1)
    apart = bench.seconds(lambda: run([range(i, i + 64) for i in range(0, 256, 64)]), times=1)
    return {"refill_tok_s": tokens / together, "waves_tok_s": tokens / apart,
            "ratio": apart / together}


class EndsAt:
    """Stands in for a set of end tokens: a path ends at a length that was drawn for it."""

    def __init__(self, batch, ends):
        self.batch = batch
        self.ends = ends
        self.row = -1

    def __contains__(self, token):
        """Asked once a step for each running row, in the order of the rows."""
        live = self.batch.live
        self.row = (self.row + 1) % len(live)
        while live[self.row].status != "running":
            self.row = (self.row + 1) % len(live)
        path = live[self.row]
        return len(path.ids) >= self.ends[path.index]


def fit_step(bench):
    """One pass of the fit, forwards and backwards: 16 prefixes of 2,252 tokens."""
    figures = {}
    for name, raw, rank in (("1.5B", QWEN_1_5B, 128), ("8B", QWEN3_8B, 256)):
        model = bench.model(raw)
        stop = Stop(model, m=4, rank=rank)
        with torch.no_grad():
            read = bench.seconds(
                lambda: prefill(model, random_ids(16, 2252, model.config.vocab_size), 4), times=1)
            cache, _ = prefill(model, random_ids(16, 2252, model.config.vocab_size), 4)
        labels = torch.full((16,), 0.5, device=bench.device)

        def step():
            stop.loss(stop(model, cache), labels).backward()

        figures[name] = {"prefill_s": read, "step_s": bench.seconds(step)}
        del model, stop, cache
    return figures


@torch.inference_mode()
def gpt_oss(bench):
    """gpt-oss-20b in bfloat16: its size, and decoding."""
    model = bench.model(GPT_OSS_20B)
    figures = {"weights_GB": sum(weight.nbytes for weight in model.parameters()) / 1e9}
    for rows in (1, 64):
        step = measure_steps(bench, batch_at(bench, model, rows, 2048, limit=160), steps=16)
        figures[f"{rows} x 2048"] = {"tok_s": rows / step, "ms": 1e3 * step}
    return figures


PARTS = {
    "tests": cuda_tests,
    "bandwidth": bandwidth,
    "decode": decode,
    "transformers": beside_transformers,
    "prefill": prefills,
    "check": check,
    "refill": refill,
    "fit": fit_step,
    "gpt-oss": gpt_oss}


def about():
    """What the figures were taken on."""
    git = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True,
                         text=True)
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"gpu": gpu, "torch": torch.__version__, "python": platform.python_version(),
            "commit": git.stdout.strip()}


def main():
    """Run the parts, one after another; a part that fails says so and the next one follows."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="bench_gpu.json")
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.exit(2, "error: no GPU was found: nothing to measure\n")
    bench = Bench(options.device, torch.bfloat16)
    report = about()
    for name in options.parts.split(","):
        start = time.perf_counter()
        try:
            report[name] = PARTS[name](bench)
        except Exception as error:  # a figure that is missing must not cost the others
            report[name] = {"failed": f"{type(error).__name__}: {error}"[:500]}
        report[name]["part_s"] = round(time.perf_counter() - start, 1)
        print(name, json.dumps(report[name]), flush=True)
        Path(options.out).write_text(json.dumps(report, indent=1) + "\n")
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
