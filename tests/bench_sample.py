"""Tokens per second of the sampler against transformers' `generate`, in one process, in turns.

    python tests/bench_sample.py [--size toy|100m] [--threads 2]        # CPU, float32
    python tests/bench_sample.py --size 1.5b|gpt-oss-20b --device cuda  # bfloat16
    python tests/bench_sample.py --model DIR                            # a published checkpoint

64 paths from one 64-token prompt, 128 new tokens each, of a random checkpoint; temperature 0.6,
top-k 40, top-p 0.95, no end token. Seconds are whole runs, prefill included, after a warm-up run;
on CUDA the capture of graphs is reported apart. transformers runs with its dynamic and with its
static cache, and the faster one counts. Without transformers ours is measured alone. pytest does
not collect this file.

--model measures a checkpoint directory or Hub id instead: 8, 32 and 64 paths of a question of usual
length, 48 new tokens each, in each dtype of --dtype (bfloat16,float32 unless it says otherwise),
with the memory beyond the weights, and the time of a check beside that of its launch.
"""
import ctypes
import dataclasses
import json
import os
import pathlib
import platform
import subprocess
import sys
import tempfile
import time
from statistics import median

import torch
from safetensors.torch import save_file

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))
from engine.attention import equip
from engine.refill import Batch, generate
from model import Decoder, load
from plumbing.checkpoint import Config
from plumbing.command_line import command_line, option, require_positive
from plumbing.problems import Problem
from plumbing.tokenizer import Tokenizer
from sample import Path, Sampling, prefill
from stop import Stop

try:
    import transformers
except ImportError:
    transformers = None

ROWS = 64         # paths
PROMPT = 64       # tokens
NEW = 128         # tokens of each path
EARLY_ROWS = 16   # paths that end early, in one of the measurements,
EARLY_AT = 32     # with so many tokens
SAMPLING = {"temperature": 0.6, "top_k": 40, "top_p": 0.95}
REAL_ROWS = (8, 32, 64)  # of a published checkpoint,
REAL_NEW = 48            # with so many tokens a path
QUESTION = (
    "A school buys 14 boxes of pencils with 24 pencils in each box. It gives 9 pencils to each of "
    "its 31 pupils, and the rest are shared equally among 3 classrooms. How many pencils does each "
    "classroom get?")

QWEN2 = {
    "model_type": "qwen2",
    "architectures": ["Qwen2ForCausalLM"],
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "max_position_embeddings": 4096}
SIZES = {
    "toy": QWEN2 | {
        "hidden_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "intermediate_size": 256,
        "vocab_size": 200,
        "tie_word_embeddings": True},
    "100m": QWEN2 | {
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "intermediate_size": 2048,
        "vocab_size": 32000,
        "tie_word_embeddings": True},
    "1.5b": QWEN2 | {
        "hidden_size": 1536,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "intermediate_size": 8960,
        "vocab_size": 151936,
        "tie_word_embeddings": False},
    "gpt-oss-20b": {
        "model_type": "gpt_oss",
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 131072,
        "hidden_size": 2880,
        "num_hidden_layers": 24,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "intermediate_size": 2880,
        "vocab_size": 201088,
        "num_local_experts": 32,
        "num_experts_per_tok": 4,
        "sliding_window": 128,
        "rope_theta": 150000.0,
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 32.0,
            "original_max_position_embeddings": 4096,
            "truncate": False}}}
ON_CPU = ("toy", "100m")
GOALS = {("toy", "cpu"): 3.0, ("100m", "cpu"): 1.5, ("1.5b", "cuda"): 2.0}


@dataclasses.dataclass
class Settings:
    """What the benchmark can be told."""
    size: str = option(
        "all", f"{', '.join(SIZES)}, or all: toy and 100m on the CPU, 1.5b on CUDA")
    model: str | None = option(None, "a checkpoint directory or Hub id, instead of a size")
    device: str = option("cuda" if torch.cuda.is_available() else "cpu", "torch device")
    dtype: str | None = option(
        None, "default: float32 on the CPU, bfloat16 on CUDA; of --model bfloat16,float32")
    threads: int = option(2, "CPU threads")
    rounds: int = option(3, "runs of each, in turns; the median counts")


# Models


def random_state(config, device, dtype):
    """A state dict of seeded random weights, std 0.02, norms 1; a tied head is left out."""
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in Decoder(config).state_dict().items()}
    if config.tie_word_embeddings:
        del shapes["lm_head.weight"]
    generator = torch.Generator(device).manual_seed(0)
    state = {}
    for name, shape in shapes.items():
        if "norm" in name:
            state[name] = torch.ones(shape, device=device, dtype=dtype)
        else:
            empty = torch.empty(shape, device=device, dtype=dtype)
            state[name] = empty.normal_(0, 0.02, generator=generator)
    return state


def random_model(config, device, dtype):
    """A Decoder of such weights, made on the device: no file, no second copy."""
    with torch.device("meta"):
        model = Decoder(config)
    state = random_state(config, device, dtype)
    if config.tie_word_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state, assign=True)
    model.requires_grad_(False).to(device)
    equip(model)
    return model


def models_from_file(config_json, device, dtype):
    """(ours, transformers' or None) of one random checkpoint."""
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        state = random_state(Config.from_dict(config_json), "cpu", dtype)
        save_file(state, folder / "model.safetensors", {"format": "pt"})
        (folder / "config.json").write_text(json.dumps(config_json))
        ours = load(folder, device, dtype)
        equip(ours)  # as the scripts do
        theirs = None
        if transformers is not None:
            transformers.logging.set_verbosity_error()
            theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
            theirs = theirs.to(device).eval()
    return ours, theirs


# Both sides


def now(device):
    """Seconds, once the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def make_prompt(vocab):
    """64 seeded token ids."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(vocab, (PROMPT,), generator=generator).tolist()


def new_batch(model, new=NEW, behind=0):
    """64 paths of at most `new` tokens from our prompt, which was read once and copied to every
    row. behind: positions of a row behind these."""
    prompt = make_prompt(model.config.vocab_size)
    paths = [Path(prompt, index) for index in range(ROWS)]
    capacity = PROMPT + new + behind
    return Batch(model, paths, capacity, new, Sampling(**SAMPLING), eos_ids=())


@dataclasses.dataclass
class Run:
    """One run of ours, in seconds."""
    prefill: float
    decode: float    # without capturing graphs
    capture: float
    tokens: int

    @property
    def seconds(self):
        """Of the whole run, without capturing graphs."""
        return self.prefill + self.decode

    @property
    def rate(self):
        """Tokens a second."""
        return self.tokens / self.seconds


def stretch(batch, until):
    """Decode to `until` new tokens: (seconds, seconds of graph capture).

    A graph is captured within the first three steps (once more after rows have left). On CUDA
    these are therefore reckoned at the pace of the others, and what they took beyond it is given
    apart."""
    device = batch.model.device
    first = 3
    steps = until - batch.steps
    start = now(device)
    batch.decode(until=batch.steps + first)
    warm = now(device)
    batch.decode(until=until)
    end = now(device)
    if device.type != "cuda":
        return end - start, 0.0
    pace = (end - warm) / (steps - first)
    return steps * pace, warm - start - first * pace


@torch.inference_mode()
def run_ours(model, early=0, leave=True):
    """One Run. `early` paths end at EARLY_AT tokens: their rows leave the batch or (leave=False)
    are decoded along for nothing; their further tokens do not count."""
    start = now(model.device)
    batch = new_batch(model)
    run = Run(now(model.device) - start, 0.0, 0.0, ROWS * NEW - early * (NEW - EARLY_AT))
    paths = list(batch.live)
    ends = (EARLY_AT, NEW) if early else (NEW,)
    for until in ends:
        seconds, capture = stretch(batch, until)
        run.decode += seconds
        run.capture += capture
        if until < NEW and leave:
            batch.prune(paths[:early])
    decoded = sum(len(path.ids) for path in paths)
    assert decoded == (run.tokens if leave else ROWS * NEW)
    return run


def run_theirs(model, cache, new=NEW):
    """Seconds of one run of transformers' generate with the "dynamic" or the "static" cache."""
    ids = torch.tensor([make_prompt(model.config.vocab_size)], device=model.device)
    settings = transformers.GenerationConfig(
        do_sample=True, max_new_tokens=new, num_return_sequences=ROWS, pad_token_id=0,
        cache_implementation=cache, **SAMPLING)
    start = now(model.device)
    out = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=settings)
    seconds = now(model.device) - start
    assert out.shape == (ROWS, PROMPT + new)
    return seconds


# Where the time goes


@torch.inference_mode()
def product_share(model, steps=16):
    """Share of matrix products in the CPU time of some decode steps in the middle of a run."""
    batch = new_batch(model)
    middle = (NEW - steps) // 2
    batch.decode(until=middle)
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities) as profile:
        batch.decode(until=middle + steps)
    products = 0.0
    total = 0.0
    for event in profile.key_averages():
        total += event.self_cpu_time_total
        if event.key in ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm"):
            products += event.self_cpu_time_total
    return products / total


def bytes_of_a_step(model):
    """Bytes that a decode step in the middle of a run must read: weights, and live keys and values,
    each once."""
    config = model.config
    weight = model.lm_head.weight
    count = sum(parameter.numel() for parameter in model.parameters())  # a tied head counts once
    if not config.tie_word_embeddings:
        count -= model.model.embed_tokens.weight.numel()  # of the embeddings only 64 rows are read
    length = PROMPT + NEW / 2
    per_position = 2 * config.num_key_value_heads * config.head_dim
    for window in config.windows:
        count += ROWS * min(length, window or length) * per_position
    return count * weight.itemsize


def copy_rate(device):
    """GB/s of a plain copy, what it reads and writes together."""
    source = torch.empty(2 ** 30, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    times = []
    for _ in range(20):
        start = now(device)
        target.copy_(source)
        times.append(now(device) - start)
    return 2 * len(source) / median(times) / 1e9


def process_memory(key):
    """A figure of /proc/self/status, in bytes."""
    status = pathlib.Path("/proc/self/status").read_text()
    return int(status.split(key)[1].split()[0]) * 1024


def working_memory(device, run):
    """Peak bytes of run() beyond what was held before it (weights): CUDA's allocations, or Linux's
    resident pages."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        return torch.cuda.max_memory_allocated() - before
    ctypes.CDLL(None).malloc_trim(0)  # what earlier runs freed goes back to the system
    before = process_memory("VmRSS:")
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    run()
    return process_memory("VmHWM:") - before


# One size


def measure(size, settings):
    """All figures of one size, {name: value}."""
    device = torch.device(settings.device)
    default = "bfloat16" if device.type == "cuda" else "float32"
    dtype = getattr(torch, settings.dtype or default)
    theirs = None
    if size == "gpt-oss-20b":  # too large for a file and a second model beside it
        model = random_model(Config.from_dict(SIZES[size]), device, dtype)
    else:
        model, theirs = models_from_file(SIZES[size], device, dtype)
    caches = () if theirs is None else ("dynamic", "static")

    ours = []
    seconds = {cache: [] for cache in caches}
    for _ in range(settings.rounds + 1):  # the first is the warm-up
        ours.append(run_ours(model))
        for cache in caches:
            seconds[cache].append(run_theirs(theirs, cache))
    middle = sorted(ours[1:], key=lambda run: run.seconds)[settings.rounds // 2]
    row = {
        "size": size,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "dtype": str(dtype),
        "warmup": ours[0].seconds + ours[0].capture,
        "seconds": middle.seconds,
        "prefill": middle.prefill,
        "capture": middle.capture,
        "step": middle.decode / NEW,
        "tok_per_s": middle.rate}
    if theirs is not None:
        row |= compare(ours[1:], middle, theirs, seconds)
        row["goal"] = GOALS.get((size, device.type))
    row |= measure_early_ends(model, settings.rounds)
    if device.type == "cuda":
        row["gb_per_s"] = bytes_of_a_step(model) / row["step"] / 1e9
        row["copy_gb_per_s"] = copy_rate(device)
        row["share_of_copy_bandwidth"] = row["gb_per_s"] / row["copy_gb_per_s"]
    else:
        row["product_share"] = product_share(model)

    def one_run():
        run_ours(model)

    row["working_memory"] = working_memory(device, one_run)
    for cache in caches:
        def one_run_of_theirs():
            run_theirs(theirs, cache)

        figure = f"transformers_{cache}_working_memory"
        row[figure] = working_memory(device, one_run_of_theirs)
    return row


def compare(ours, middle, theirs, seconds):
    """The figures of transformers, and ours over theirs. ours: Runs, of which `middle` is the
    median; seconds: {cache: of its runs, the first of which warmed up}."""
    medians = {cache: median(times[1:]) for cache, times in seconds.items()}
    best = min(medians, key=medians.get)
    prefill = median(run_theirs(theirs, best, new=1) for _ in range(3))
    fastest = min(run.seconds for run in ours)
    row = {}
    for cache, middle_of_theirs in medians.items():
        row[f"transformers_{cache}_tok_per_s"] = ROWS * NEW / middle_of_theirs
    return row | {
        "transformers_warmup": seconds[best][0],
        "transformers_prefill": prefill,
        "ratio": medians[best] / middle.seconds,
        "ratio_of_fastest": min(seconds[best][1:]) / fastest,
        "ratio_decode_only": (medians[best] - prefill) / middle.decode}


def measure_early_ends(model, rounds):
    """Tokens a second where some paths end early, their rows leaving the batch or not."""
    leaving = []
    staying = []
    for _ in range(rounds):
        leaving.append(run_ours(model, EARLY_ROWS).rate)
        staying.append(run_ours(model, EARLY_ROWS, leave=False).rate)
    return {
        "early_tok_per_s": median(leaving),
        "early_without_compaction_tok_per_s": median(staying)}


# A published checkpoint


@torch.inference_mode()
def ours_of_question(model, prompt, rows):
    """Seconds of `rows` paths of REAL_NEW tokens from one prompt."""
    start = now(model.device)
    generate(model, [prompt], rows, REAL_NEW, **SAMPLING, eos_ids=(), batch=rows)
    return now(model.device) - start


@torch.inference_mode()
def theirs_of_question(model, prompt, rows):
    """The same by transformers' generate, whose end tokens are off too."""
    ids = torch.tensor([prompt], device=model.device)
    settings = transformers.GenerationConfig(
        do_sample=True, max_new_tokens=REAL_NEW, num_return_sequences=rows, pad_token_id=0,
        **SAMPLING)
    model.generation_config = settings  # the checkpoint's own would fill in what is not set here
    start = now(model.device)
    out = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=settings)
    seconds = now(model.device) - start
    assert out.shape == (rows, len(prompt) + REAL_NEW)
    return seconds


@torch.inference_mode()
def launch_and_check(model, prompt, rows):
    """Seconds of decoding `rows` paths to REAL_NEW tokens, and of a check there: m 4, LoRA of rank
    8 on q_proj and v_proj."""
    stop = Stop(model, m=4, rank=8, targets=["q_proj", "v_proj"])
    launch = ours_of_question(model, prompt, rows)
    cache, _ = prefill(model, [prompt + prompt[:REAL_NEW]] * rows, stop.m)
    stop(model, cache)  # warms up
    start = now(model.device)
    stop.chance(stop(model, cache)).tolist()
    return launch, now(model.device) - start


def measure_checkpoint(folder, dtype, settings):
    """A row of figures for each number of REAL_ROWS; of several rounds the fastest counts."""
    device = torch.device(settings.device)
    model = load(folder, device, dtype)
    equip(model)  # as the scripts do
    prompt = Tokenizer(folder).ask(Problem("pencils", QUESTION, "19"))
    theirs = None
    if transformers is not None:
        transformers.logging.set_verbosity_error()
        theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        theirs = theirs.to(device).eval()
    rows = []
    for count in REAL_ROWS:
        seconds = []
        others = []
        for _ in range(settings.rounds):
            seconds.append(ours_of_question(model, prompt, count))
            if theirs is not None:
                others.append(theirs_of_question(theirs, prompt, count))
        row = {
            "dtype": str(dtype),
            "prompt": len(prompt),
            "rows": count,
            "tok_per_s": count * REAL_NEW / min(seconds)}

        def one_run():
            ours_of_question(model, prompt, count)

        row["working_memory"] = working_memory(device, one_run)
        if theirs is not None:
            row["transformers_tok_per_s"] = count * REAL_NEW / min(others)
            row["ratio"] = min(others) / min(seconds)

            def one_run_of_theirs():
                theirs_of_question(theirs, prompt, count)

            row["transformers_working_memory"] = working_memory(device, one_run_of_theirs)
        launch, check = launch_and_check(model, prompt, count)
        row["check_over_launch"] = check / launch
        rows.append(row)
    return rows


def sizes_to_measure(settings):
    """The sizes of --size that this device can take."""
    cuda = torch.device(settings.device).type == "cuda"
    sizes = [settings.size]
    if settings.size == "all":
        sizes = ["1.5b"] if cuda else list(ON_CPU)
    if sizes[0] not in SIZES:
        raise ValueError(f"size: found {settings.size!r}, expected all, {', '.join(SIZES)}")
    if cuda:
        return sizes
    print("no CUDA device in use: 1.5b and gpt-oss-20b are skipped")
    return [size for size in sizes if size in ON_CPU]


def show(title, row):
    """Print the figures of one size, or of one number of rows."""
    print(f"\n{title}")
    for name, value in row.items():
        text = f"{value:,.4g}" if isinstance(value, float) else value
        print(f"  {name:36}{text}")


def main(settings):
    """Print one table for each size; the last line is one JSON object."""
    require_positive(settings, "threads", "rounds")
    cuda = torch.device(settings.device).type == "cuda"
    if settings.model is None:
        sizes = sizes_to_measure(settings)
    elif settings.size != "all":
        raise ValueError(f"size: found {settings.size!r} beside --model, expected one of the two")
    if transformers is None:
        print("transformers is not installed: ours alone")
    torch.set_num_threads(settings.threads)
    git = ["git", "-C", pathlib.Path(__file__).parent, "describe", "--always", "--dirty"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    result = {
        "commit": commit,
        "machine": torch.cuda.get_device_name() if cuda else platform.platform(),
        "threads": settings.threads,
        "load_at_start": os.getloadavg()[0],
        "torch": torch.__version__,
        "transformers": transformers and transformers.__version__,
        "sizes": []}
    if settings.model is not None:
        for dtype in (settings.dtype or "bfloat16,float32").split(","):
            for row in measure_checkpoint(settings.model, getattr(torch, dtype), settings):
                show(f"{settings.model}: {row['rows']} paths, {row['prompt']} + {REAL_NEW} tokens",
                     row)
                result["sizes"].append(rounded(row))
    else:
        for size in sizes:
            row = measure(size, settings)
            show(f"{size}: {ROWS} paths, {PROMPT} + {NEW} tokens; times in seconds", row)
            result["sizes"].append(rounded(row))
    print(json.dumps(result))


def rounded(row):
    """The row for JSON."""
    return {
        name: round(value, 5) if isinstance(value, float) else value
        for name, value in row.items()}


if __name__ == "__main__":
    command_line(Settings, main)
