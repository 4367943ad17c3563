"""Everything that is measured on a GPU, by one command of about ten minutes.

    python tests/bench_gpu.py [--out runs/bench_gpu] [--parts decode,check] [--device cuda] [--tiny]

Real shapes, random weights made on the device, cached lengths set instead of decoded. In order:
tests/story/test_cuda.py; flash attention beside the plain one; two runs of one seed; waits and
launches of a decode step; a soak over all lengths at the rows that memory.py chooses; bandwidth;
decoding, prefill, check, refill, fit, gpt-oss-20b; train.py on the toy beside the same run on the
CPU; transformers last. Each part writes OUT/PART.json as it ends, so that a run that is cut off
keeps what it has. --tiny: small shapes, on a CPU: a dry run.
"""
import argparse
import dataclasses
import json
import math
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from engine.attention import Flash, Tiled, equip, fault_of_flash  # noqa: E402
from model import Decoder, attend, visibility  # noqa: E402
from plumbing import memory  # noqa: E402
from plumbing.checkpoint import Config  # noqa: E402
from engine.refill import Batch  # noqa: E402
from sample import Path as SampledPath, Sampling, prefill  # noqa: E402
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


TINY = {
    "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 999}
TINY_RUN = (
    "--problems 6 --epochs 1 --paths 6 --low 1 --high 5 --rollouts 2 --prefix 24 --n 4 --keep 2")


@dataclasses.dataclass
class Bench:
    """Where and how large. tiny: shapes, rows, lengths and steps as small as a test needs."""
    device: str
    dtype: torch.dtype
    tiny: bool = False

    def size(self, real, tiny):
        """A number of the measurement, or its small stand-in."""
        return tiny if self.tiny else real

    def model(self, raw):
        """A Decoder of this config.json with random weights, made on the device, as a command would
        run it."""
        if self.tiny:
            raw = raw | TINY | ({"num_local_experts": 4} if "num_local_experts" in raw else {})
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
        line = equip(model)
        if line:
            print(line, flush=True)
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


def batch_at(model, rows, length, limit=512):
    """A Batch of `rows` paths of one short prompt whose cache claims `length` positions: zeros,
    which are read as fast as others."""
    prompt = random_ids(1, 8, model.config.vocab_size)[0]
    paths = [SampledPath(prompt, index) for index in range(rows)]
    batch = Batch(model, paths, length + limit, limit, Sampling(), eos_ids=())
    batch.cache.advance(length - 8)
    return batch


@torch.inference_mode()
def measure_steps(bench, batch, steps=32):
    """Seconds of one decode step."""
    done = 0
    steps = bench.size(steps, 2)

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


def relative(found, exact):
    """The norm of the difference over the norm."""
    return ((found.float() - exact).norm() / exact.norm()).item()


@torch.inference_mode()
def attention(bench):
    """Plain and flash attention of one layer at 1.5B, 64 ragged rows of up to 8,448 slots: how far
    each is from float32, also with biases like Qwen2's, and milliseconds."""
    raw = QWEN_1_5B | {"num_hidden_layers": 1} | (TINY if bench.tiny else {})
    config = Config.from_dict(raw)
    device = torch.device(bench.device)
    fault = fault_of_flash(config, device, bench.dtype)
    figures = {"fault": fault}
    B, slots = bench.size(64, 4), bench.size(8448, 64)
    H, K, D = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    held = torch.randint(1, slots - 8, (B,), device=device)

    def random(*shape):
        return torch.randn(shape, device=device).to(bench.dtype)

    for T in (1, 4):
        positions = held[:, None] + torch.arange(T, device=device)
        mask = visibility(positions, 0, slots, None)
        q, k, v = random(B, T, H, D), random(B, K, slots, D), random(B, K, slots, D)
        for name, q_bias, k_bias in (("plain inputs", 0, 0), ("biased", 3.5, 25)):
            q = q + q_bias * random(1, 1, H, D)
            k = k + k_bias * random(1, K, 1, D)
            exact = attend(q.float(), k.float(), v.float(), mask)
            row = {}
            for how in (Tiled,) if fault else (Tiled, Flash):
                made = how(config, positions, None, slots)
                row[how.__name__] = {
                    "off": relative(made(q, k, v, None), exact),
                    "ms": 1e3 * bench.seconds(lambda: made(q, k, v, None), 5)}
            figures[f"T {T}, {name}"] = row
    return figures


@torch.inference_mode()
def two_runs(bench):
    """Whether a run gives the same tokens again, and in a smaller batch (which rounding may
    change)."""
    model = bench.model(QWEN_1_5B)
    runs = []
    new = bench.size(128, 6)
    for rows in (16, 16, 12):
        paths = [SampledPath([5, 6, 7], index) for index in range(16)]
        Batch(model, paths, 300, new, Sampling(), (), rows).decode(until=new)
        runs.append([path.ids for path in paths])
    same = sum(one == other for one, other in zip(runs[0], runs[2]))
    return {"again": runs[0] == runs[1], "paths_alike_in_a_smaller_batch": same, "paths": 16}


@torch.inference_mode()
def waits(bench):
    """Waits for the device and kernels launched in a decode step, by the profiler."""
    model = bench.model(QWEN_1_5B)
    batch = batch_at(model, bench.size(64, 4), bench.size(2048, 32))
    batch.decode(until=8)
    activities = [torch.profiler.ProfilerActivity.CPU]
    if bench.device.startswith("cuda"):
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profile:
        batch.decode(until=16)
    events = profile.key_averages()
    names = {"waits": ("Synchronize",), "launches": ("cudaLaunchKernel",),
             "graphs": ("cudaGraphLaunch",)}
    figures = {}
    for what, parts in names.items():
        count = sum(event.count for event in events if any(part in event.key for part in parts))
        figures[f"{what}_a_step"] = count / 8
    return figures


@torch.inference_mode()
def soak(bench):
    """1.5B at the rows that memory.py chooses for 16,600 positions, at every 256th length: seconds
    of a capture, milliseconds of a step, and memory, which must not grow."""
    model = bench.model(QWEN_1_5B)
    capacity = bench.size(16600, 800)
    rows = bench.size(None, 4) or memory.choose_rows(model, capacity)
    prompt = random_ids(1, 100, model.config.vocab_size)[0]
    paths = [SampledPath(prompt, index) for index in range(rows)]
    batch = Batch(model, paths, capacity, capacity - 100, Sampling(), (), rows)
    done = 0
    seconds = []
    held = []
    while batch.cache.longest + 258 < capacity:
        for _ in range(2):  # where a new graph is needed, in the first of them
            done += 1
            bench.wait()
            start = time.perf_counter()
            batch.decode(until=done)
            bench.wait()
            seconds.append(time.perf_counter() - start)
        held.append(memory_held(bench))
        batch.cache.advance(254)
    return {"rows": rows, "first_step_s": seconds[0],
            "last_steps_ms": [1e3 * step for step in seconds[-2:]],
            "graphs": len(batch.model_step.graphs), "held_GB": held[-1] / 1e9,
            "grew_GB": (held[-1] - held[0]) / 1e9}


def memory_held(bench):
    """Bytes that PyTorch has taken from the device."""
    return torch.cuda.memory_reserved() if bench.device.startswith("cuda") else 0


def bandwidth(bench):
    """Bytes a second of a device copy, read and written: what bounds a decode step."""
    source = torch.empty(bench.size(2 ** 30, 2 ** 16), dtype=torch.uint8, device=bench.device)
    target = torch.empty_like(source)
    return {"copy_GB_s": 2 * source.nbytes / bench.seconds(lambda: target.copy_(source)) / 1e9}


def decode(bench):
    """1.5B: tokens a second by batch and length, and the share of what the bandwidth allows."""
    model = bench.model(QWEN_1_5B)
    weights = sum(weight.nbytes for weight in model.parameters())
    bound = bandwidth(bench)["copy_GB_s"] * 1e9
    figures = {}
    for length in (bench.size(2048, 24), bench.size(8192, 40)):
        for rows in (1, bench.size(64, 2), bench.size(256, 3)):
            batch = batch_at(model, rows, length, limit=160)
            step = measure_steps(bench, batch)
            position = batch.cache.nbytes / (rows * batch.cache.capacity)
            read = weights + rows * length * position
            figures[f"{rows} x {length}"] = {
                "tok_s": rows / step, "ms": 1e3 * step, "share_of_bound": read / bound / step}
            del batch
    return figures


@torch.inference_mode()
def prefills(bench):
    """1.5B: tokens a second of reading one prompt."""
    model = bench.model(QWEN_1_5B)
    figures = {}
    for length in (bench.size(2048, 20), bench.size(16384, 30)):
        prompt = random_ids(1, length, model.config.vocab_size)
        figures[str(length)] = {"tok_s": length / bench.seconds(lambda: prefill(model, prompt))}
    return figures


@torch.inference_mode()
def check(bench):
    """The check against its launch: 64 paths at 1.5B, and 16 at 7B with rank 128, of 2,048 tokens.
    The launch is 2,048 steps at their mean length."""
    figures = {}
    length = bench.size(2048, 24)
    for name, raw, rows in (("1.5B n 64", QWEN_1_5B, 64), ("7B n 16", QWEN_7B, 16)):
        rows = bench.size(rows, 3)
        model = bench.model(raw)
        stop = Stop(model, m=4, rank=bench.size(128, 2))
        launch = length * measure_steps(bench, batch_at(model, rows, length // 2, limit=160))
        batch = batch_at(model, rows, length)
        seconds = bench.seconds(lambda: stop(model, batch.cache))
        figures[name] = {"launch_s": launch, "check_s": seconds, "share": seconds / launch}
        del model, stop, batch
    return figures


@torch.inference_mode()
def refill(bench):
    """1.5B: 256 paths of very different lengths on 64 rows, with freed rows refilled and in
    waves."""
    model = bench.model(QWEN_1_5B)
    count, rows, longest = bench.size((256, 64, 480), (9, 3, 12))
    lengths = [2 + int(longest * (i * 0.618 % 1) ** 3) for i in range(count)]  # a long tail

    def run(waves):
        ended = 0
        for wave in waves:
            paths = paths_of_lengths(model, [lengths[index] for index in wave])
            limit = longest + 2
            batch = Batch(model, paths, limit + 80, limit, Sampling(), (), rows)
            batch.decode(until=limit)
            ended += sum(len(path.ids) == path.length for path in paths)
        assert ended == count, f"{ended} of {count} paths ended where they should"

    waves = [range(first, min(first + rows, count)) for first in range(0, count, rows)]
    together = bench.seconds(lambda: run([range(count)]), times=1)
    apart = bench.seconds(lambda: run(waves), times=1)
    tokens = sum(lengths)
    return {"refill_tok_s": tokens / together, "waves_tok_s": tokens / apart,
            "ratio": apart / together}


class PathOfLength(SampledPath):
    """A path that ends, as at an end token, when it holds `length` tokens."""
    length = None

    @property
    def status(self):
        if self._status == "running" and self.length is not None and len(self.ids) >= self.length:
            return "eos"
        return self._status

    @status.setter
    def status(self, value):
        self._status = value


def paths_of_lengths(model, lengths):
    """Paths of one prompt that end at these lengths."""
    prompt = random_ids(1, 8, model.config.vocab_size)[0]
    paths = []
    for index, length in enumerate(lengths):
        path = PathOfLength(prompt, index)
        path.length = length
        paths.append(path)
    return paths


def fit_step(bench):
    """One pass of the fit, forwards and backwards: 16 prefixes of 2,252 tokens."""
    figures = {}
    length, rows = bench.size((2252, 16), (12, 2))
    for name, raw, rank in (("1.5B", QWEN_1_5B, 128), ("8B", QWEN3_8B, 256)):
        model = bench.model(raw)
        stop = Stop(model, m=4, rank=bench.size(rank, 2))
        prefixes = random_ids(rows, length, model.config.vocab_size)
        with torch.no_grad():
            read = bench.seconds(lambda: prefill(model, prefixes, 4), times=1)
            cache, _ = prefill(model, prefixes, 4)
        labels = torch.full((rows,), 0.5, device=bench.device)

        def step():
            stop.loss(stop(model, cache), labels).backward()

        figures[name] = {"prefill_s": read, "step_s": bench.seconds(step)}
        del model, stop, cache
    return figures


@torch.inference_mode()
def gpt_oss(bench):
    """gpt-oss-20b in bfloat16: its size, decoding, and a check over more than 128 positions."""
    model = bench.model(GPT_OSS_20B)
    length = bench.size(2048, 24)
    figures = {"weights_GB": sum(weight.nbytes for weight in model.parameters()) / 1e9}
    for rows in (1, bench.size(64, 3)):
        step = measure_steps(bench, batch_at(model, rows, length, limit=160), steps=16)
        figures[f"{rows} x {length}"] = {"tok_s": rows / step, "ms": 1e3 * step}
    stop = Stop(model, m=4, rank=bench.size(128, 2))
    batch = batch_at(model, 40, length)
    figures["check_s"] = bench.seconds(lambda: stop(model, batch.cache))
    return figures


def train_toy(bench):
    """train.py on the toy in float32, here and on the CPU: how many labels are alike."""
    flags = bench.size("--problems 60 --epochs 2", TINY_RUN).split()
    labels = {}
    for device in (bench.device, "cpu"):
        out = ROOT / "runs" / f"bench-{device.replace(':', '-')}"
        shutil.rmtree(out, ignore_errors=True)
        command = [sys.executable, "train.py", "--dtype", "float32", "--device", device,
                   "--out", str(out), *flags]
        run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if run.returncode != 0:
            return {"device": device, "status": run.returncode, "error": run.stderr.strip()[-300:]}
        lines = (out / "labels.jsonl").read_text().splitlines()
        labels[device] = [line for line in lines if "soft_label" in line]
    here, there = labels[bench.device], labels["cpu"]
    return {"labels": len(there), "alike": len(set(here) & set(there))}


def beside_transformers(bench):
    """64 rows of 2,048 positions by transformers' generate on its own caches, for 64 tokens."""
    import transformers
    raw = QWEN_1_5B | (TINY if bench.tiny else {})
    config = transformers.Qwen2Config(**{k: v for k, v in raw.items() if k != "model_type"})
    with torch.device(bench.device):
        torch.set_default_dtype(bench.dtype)
        model = transformers.Qwen2ForCausalLM(config).eval()
        torch.set_default_dtype(torch.float32)
    figures = {}
    rows, length, most = bench.size((64, 2048, 65), (2, 12, 3))
    ids = torch.tensor(random_ids(rows, length, raw["vocab_size"]), device=bench.device)
    for cache in ("dynamic", "static"):
        seconds = {}
        for new in (1, most):
            settings = dict(max_new_tokens=new, min_new_tokens=new, do_sample=True, top_k=40,
                            top_p=0.95, temperature=0.6, cache_implementation=cache,
                            eos_token_id=None, pad_token_id=0)
            seconds[new] = bench.seconds(lambda: model.generate(ids, **settings), times=1)
        step = (seconds[most] - seconds[1]) / (most - 1)  # the prefill cancels out
        figures[f"{rows} x {length} {cache}"] = {"tok_s": rows / step, "ms": 1e3 * step}
    return figures


PARTS = {
    "tests": cuda_tests,
    "attention": attention,
    "two-runs": two_runs,
    "waits": waits,
    "soak": soak,
    "bandwidth": bandwidth,
    "decode": decode,
    "prefill": prefills,
    "check": check,
    "refill": refill,
    "fit": fit_step,
    "gpt-oss": gpt_oss,
    "train": train_toy,
    "transformers": beside_transformers}


def about():
    """What the figures were taken on; the commit where git is at hand."""
    commit = None
    if shutil.which("git"):
        git = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT,
                             capture_output=True, text=True)
        commit = git.stdout.strip() or None
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"gpu": gpu, "torch": torch.__version__, "python": platform.python_version(),
            "commit": commit}


def main():
    """Run the parts, one after another; a part that fails says so and the next one follows."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="runs/bench_gpu", help="folder for a JSON file a part")
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="small shapes: a dry run")
    options = parser.parse_args()
    names = options.parts.split(",")
    unknown = [name for name in names if name not in PARTS]
    if unknown:
        parser.exit(2, f"error: parts: found {unknown[0]!r}, expected some of {', '.join(PARTS)}\n")
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        parser.exit(2, "error: no GPU was found: nothing to measure\n")
    bench = Bench(options.device, torch.bfloat16, options.tiny)
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    (out / "about.json").write_text(json.dumps(about(), indent=1) + "\n")
    for name in names:
        start = time.perf_counter()
        try:
            figures = PARTS[name](bench)
        except Exception as error:  # a figure that is missing must not cost the others
            figures = {"failed": f"{type(error).__name__}: {error}"[:500]}
        figures["part_s"] = round(time.perf_counter() - start, 1)
        print(name, json.dumps(figures), flush=True)
        (out / f"{name}.json").write_text(json.dumps(figures, indent=1) + "\n")
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
