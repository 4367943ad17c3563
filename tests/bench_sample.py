"""Tokens per second of the sampler against transformers' `generate`: one random checkpoint, one process, in turns.

    python tests/bench_sample.py [--size toy|100m] [--threads 2]               # CPU, float32
    python tests/bench_sample.py --size 1.5b|gpt-oss-20b --device cuda         # bfloat16; graph capture reported apart

64 paths from one 64-token prompt, 128 new tokens each, temperature 0.6 / top-k 40 / top-p 0.95, no end token. Seconds are
whole runs, prefill included, after a warm-up run. transformers runs with its dynamic and its static cache; the faster
one counts. Without transformers ours is measured alone. Not a test: pytest does not collect it. Last line: one JSON object.
"""
import dataclasses
import json
import multiprocessing
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path as File

import torch
from safetensors.torch import save_file

sys.path.insert(0, str(File(__file__).parent.parent))
from model import Config, Decoder, load
from sample import Batch, Path, command_line, option

try:
    import transformers
except ImportError:
    transformers = None

ROWS, PROMPT, NEW, EARLY_ROWS, EARLY_AT = 64, 64, 128, 16, 32
SAMPLING = {"temperature": 0.6, "top_k": 40, "top_p": 0.95}
QWEN2 = {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "hidden_act": "silu", "rms_norm_eps": 1e-6,
         "rope_theta": 10000.0, "max_position_embeddings": 4096, "initializer_range": 0.02}
SIZES = {
    "toy": QWEN2 | {"hidden_size": 96, "num_hidden_layers": 4, "num_attention_heads": 3, "num_key_value_heads": 1,
                    "intermediate_size": 256, "vocab_size": 200, "tie_word_embeddings": True},
    "100m": QWEN2 | {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "num_key_value_heads": 2,
                     "intermediate_size": 2048, "vocab_size": 32000, "tie_word_embeddings": True},
    "1.5b": QWEN2 | {"hidden_size": 1536, "num_hidden_layers": 28, "num_attention_heads": 12, "num_key_value_heads": 2,
                     "intermediate_size": 8960, "vocab_size": 151936, "tie_word_embeddings": False},
    "gpt-oss-20b": {"model_type": "gpt_oss", "hidden_act": "silu", "rms_norm_eps": 1e-5, "max_position_embeddings": 131072,
                    "hidden_size": 2880, "num_hidden_layers": 24, "num_attention_heads": 64, "num_key_value_heads": 8,
                    "head_dim": 64, "intermediate_size": 2880, "vocab_size": 201088, "tie_word_embeddings": False,
                    "num_local_experts": 32, "num_experts_per_tok": 4, "sliding_window": 128, "rope_theta": 150000.0,
                    "rope_scaling": {"rope_type": "yarn", "factor": 32.0, "original_max_position_embeddings": 4096,
                                     "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False}}}
GOALS = {("toy", "cpu"): 3.0, ("100m", "cpu"): 1.5, ("1.5b", "cuda"): 2.0}
PRODUCTS = {"aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::linear", "aten::matmul", "aten::mkldnn_linear"}


@dataclasses.dataclass
class Settings:
    """What the benchmark can be told."""

    size: str = option("all", f"{', '.join(SIZES)}, or all: toy and 100m on the CPU, 1.5b on CUDA")
    device: str = option("cuda" if torch.cuda.is_available() else "cpu", "torch device")
    dtype: str | None = option(None, "default: float32 on the CPU, bfloat16 on CUDA")
    threads: int = option(2, "CPU threads")
    rounds: int = option(3, "runs of each, in turns; the median counts")


# ---------------------------------------------------------------------------------------------------- the random model


def random_state(config, device, dtype):
    """A state dict of seeded random weights, std 0.02 (biases too), norms 1, made on `device`."""
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in Decoder(config).state_dict().items()}
    if config.tie_word_embeddings:
        del shapes["lm_head.weight"]
    generator = torch.Generator(device).manual_seed(0)
    return {name: torch.ones(shape, device=device, dtype=dtype) if "norm" in name else
            torch.empty(shape, device=device, dtype=dtype).normal_(0, 0.02, generator=generator)
            for name, shape in shapes.items()}


def write_checkpoint(folder, raw, dtype):
    """A checkpoint directory that both libraries read."""
    save_file(random_state(Config.from_dict(raw), "cpu", dtype), File(folder) / "model.safetensors", {"format": "pt"})
    (File(folder) / "config.json").write_text(json.dumps(raw))


def build(raw, device, dtype):
    """A Decoder of random weights made on the device: no file, no second copy. Untied heads only."""
    config = Config.from_dict(raw)
    with torch.device("meta"):
        model = Decoder(config)
    model.load_state_dict(random_state(config, device, dtype), assign=True)
    return model.requires_grad_(False).to(device)


def make_prompt(vocab):
    return torch.randint(vocab, (PROMPT,), generator=torch.Generator().manual_seed(1)).tolist()


# ------------------------------------------------------------------------------------------------------- the two sides


def now(device):
    """Seconds, once the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def stretch(batch, until):
    """Decode to `until` new tokens: (seconds, seconds of graph capture).

    A graph is captured within the first three steps (after rows have left: once more); on CUDA these are therefore
    reckoned at the pace of the others, and what they took beyond it is given apart.
    """
    start, count = now(batch.device), 3
    batch.decode(batch.steps + count)
    warm, steps = now(batch.device), until - batch.steps
    batch.decode(until)
    end = now(batch.device)
    if batch.device.type != "cuda":
        return end - start, 0.0
    pace = (end - warm) / steps
    return (steps + count) * pace, warm - start - count * pace


@torch.inference_mode()
def run_ours(model, early=0, compact=True):
    """One run; `early` rows end at EARLY_AT tokens and leave the batch, or (compact=False) are decoded along."""
    prompt, device = make_prompt(model.config.vocab_size), model.lm_head.weight.device
    start = now(device)
    batch = Batch(model, [Path(prompt, index) for index in range(ROWS)], PROMPT + NEW, eos_ids=(), **SAMPLING)
    prefill = now(device) - start
    paths = list(batch.live)
    if not compact:
        batch.group = ROWS + 1
    seconds = capture = 0.0
    for until in (EARLY_AT, NEW) if early else (NEW,):
        stretched, captured = stretch(batch, until)
        seconds, capture = seconds + stretched, capture + captured
        for path in paths[:early]:
            path.status = "eos"
    tokens = sum(len(path.ids) for path in paths)
    assert tokens == ROWS * NEW - early * (NEW - EARLY_AT)
    return {"seconds": prefill + seconds, "prefill": prefill, "capture": capture, "step": seconds / NEW,
            "tok_per_s": tokens / (prefill + seconds)}


@torch.inference_mode()
def run_theirs(model, cache, new=NEW):
    """One run of transformers' generate with the "dynamic" or the "static" cache: seconds."""
    ids = torch.tensor([make_prompt(model.config.vocab_size)], device=model.device)
    how = transformers.GenerationConfig(do_sample=True, max_new_tokens=new, num_return_sequences=ROWS, pad_token_id=0,
                                        cache_implementation=cache, **SAMPLING)
    start = now(model.device)
    out = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=how)
    seconds = now(model.device) - start
    assert out.shape == (ROWS, PROMPT + new)
    return seconds


def load_theirs(folder, device, dtype):
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device).eval()


def peak_in_child(side, folder, threads, dtype, pipe):
    """In a process of its own on the CPU: load, run once, send the process's peak memory in bytes."""
    torch.set_num_threads(threads)
    if side == "ours":
        run_ours(load(folder, "cpu", dtype))
    else:
        run_theirs(load_theirs(folder, torch.device("cpu"), dtype), side)
    pipe.send(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


def peak(side, model, folder, settings, dtype):
    """Peak bytes of one run: a process of its own on the CPU, this one's allocations (all models loaded) on CUDA."""
    if settings.device == "cpu":
        spawn = multiprocessing.get_context("spawn")
        receive, send = spawn.Pipe(duplex=False)
        child = spawn.Process(target=peak_in_child, args=(side, folder, settings.threads, dtype, send))
        child.start()
        found = receive.recv()
        child.join()
        return found
    torch.cuda.reset_peak_memory_stats()
    run_ours(model) if side == "ours" else run_theirs(model, side)
    return torch.cuda.max_memory_allocated()


# ------------------------------------------------------------------------------------------------ where the time goes


@torch.inference_mode()
def product_share(model, steps=16):
    """Share of matrix products in the CPU time of some decode steps in the middle of a run, by torch.profiler."""
    prompt = make_prompt(model.config.vocab_size)
    batch = Batch(model, [Path(prompt, index) for index in range(ROWS)], PROMPT + NEW, eos_ids=(), **SAMPLING)
    batch.decode((NEW - steps) // 2)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        batch.decode(batch.steps + steps)
    events = profile.key_averages()
    return sum(event.self_cpu_time_total for event in events if event.key in PRODUCTS) / \
        sum(event.self_cpu_time_total for event in events)


def bandwidth_share(model, step):
    """GB/s of a decode step (weights and live keys and values, each read once) and of a plain copy, on CUDA."""
    config, weight = model.config, model.lm_head.weight
    count = sum(parameter.numel() for parameter in model.parameters())  # a tied head is counted, and read, once
    if not config.tie_word_embeddings:
        count -= model.model.embed_tokens.weight.numel()  # of the embeddings only 64 rows are read
    live = 0
    for window in config.windows:
        length = PROMPT + NEW / 2
        live += ROWS * min(length, window or length) * 2 * config.num_key_value_heads * config.head_dim
    source = torch.empty(2 ** 30, dtype=torch.uint8, device=weight.device)
    target, times = torch.empty_like(source), []
    for _ in range(20):
        start = now(weight.device)
        target.copy_(source)
        times.append(now(weight.device) - start)
    ours, copy = (count + live) * weight.itemsize / step / 1e9, 2 * len(source) / statistics.median(times) / 1e9
    return {"gb_per_s": ours, "copy_gb_per_s": copy, "share_of_copy_bandwidth": ours / copy}


def measure(size, settings, folder):
    """All figures of one size."""
    device, raw = torch.device(settings.device), SIZES[size]
    dtype = getattr(torch, settings.dtype or ("bfloat16" if device.type == "cuda" else "float32"))
    alone = transformers is None or size == "gpt-oss-20b"
    if size == "gpt-oss-20b":
        model = build(raw, device, dtype)
    else:
        write_checkpoint(folder, raw, dtype)
        model = load(folder, device, dtype)
    theirs = {} if alone else dict.fromkeys(("dynamic", "static"), load_theirs(folder, device, dtype))
    row = {"size": size, "parameters": sum(parameter.numel() for parameter in model.parameters()), "dtype": str(dtype)}
    runs, seconds = [], {side: [] for side in theirs}
    for turn in range(settings.rounds + 1):  # turn 0 is the warm-up
        runs.append(run_ours(model))
        for side in theirs:
            seconds[side].append(run_theirs(theirs[side], side))
    middle = sorted(runs[1:], key=lambda run: run["seconds"])[settings.rounds // 2]
    row |= {"warmup_s": runs[0]["seconds"], **middle}
    if theirs:
        median = {side: statistics.median(seconds[side][1:]) for side in theirs}
        best = min(median, key=median.get)
        first = statistics.median(run_theirs(theirs[best], best, new=1) for _ in range(3))
        row |= {f"transformers_{side}_tok_per_s": ROWS * NEW / median[side] for side in median}
        row |= {"transformers_warmup_s": seconds[best][0], "transformers_prefill": first, "ratio": median[best] / middle["seconds"],
                "ratio_decode": (median[best] - first) / (middle["seconds"] - middle["prefill"]), "goal": GOALS.get((size, device.type))}
    for name, compact in (("early_tok_per_s", True), ("early_no_compaction_tok_per_s", False)):
        row[name] = statistics.median(run_ours(model, EARLY_ROWS, compact)["tok_per_s"] for _ in range(settings.rounds))
    row |= bandwidth_share(model, middle["step"]) if device.type == "cuda" else {"product_share": product_share(model)}
    row |= {f"peak_memory_{side}": peak(side, theirs.get(side, model), folder, settings, dtype) for side in ("ours", *theirs)}
    return row


def main(settings):
    """Print one table for each size; the last line is one JSON object."""
    device = torch.device(settings.device)
    sizes = list(SIZES) if settings.size == "all" else [settings.size]
    if settings.size == "all":
        sizes = ["1.5b"] if device.type == "cuda" else ["toy", "100m"]
    if sizes[0] not in SIZES:
        raise ValueError(f"size: found {settings.size!r}, expected all, {', '.join(SIZES)}")
    if device.type != "cuda":
        print("no CUDA device in use: 1.5b and gpt-oss-20b are skipped")
        sizes = [size for size in sizes if size in ("toy", "100m")]
    torch.set_num_threads(settings.threads)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=File(__file__).parent)
    result = {"commit": commit.stdout.strip(), "machine": torch.cuda.get_device_name() if device.type == "cuda" else
              platform.processor() or platform.machine(), "threads": settings.threads, "torch": torch.__version__,
              "transformers": transformers and transformers.__version__, "sizes": []}
    if transformers is None:
        print("transformers is not installed: ours alone")
    for size in sizes:
        with tempfile.TemporaryDirectory() as folder:
            row = measure(size, settings, folder)
        print(f"\n{size}: {ROWS} paths, {PROMPT} + {NEW} tokens")
        for name, value in row.items():
            unit = f"{value / 2 ** 20:,.0f} MiB" if "memory" in name else f"{value:,.4g}" if isinstance(value, float) else value
            print(f"  {name:32} {unit}")
        result["sizes"].append({name: round(value, 5) if isinstance(value, float) else value for name, value in row.items()})
    print(json.dumps(result))


if __name__ == "__main__":
    command_line(Settings, main)
