"""What several tests need: golden data, small random models and STOPs, checkpoints and tokenizers
on disk, and ways to kill a run or to start it on several processes."""
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import tokenizers
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.pre_tokenizers import ByteLevel

from model import Decoder
from plumbing.checkpoint import Config
from plumbing.command_line import command_line
from stop import Stop, Watcher

# The models are tiny: a second thread only waits, and for long where the cores are shared.
torch.set_num_threads(1)

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = Path(os.environ.get("STOP_GOLDEN", ROOT / "oracle" / "golden"))
NAMES = sorted(folder.name for folder in (GOLDEN / "checkpoints").iterdir())
KINDS = ("qwen2", "qwen3", "llama", "gpt_oss")

YARN_0528 = {
    "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768,
    "attn_factor": 0.8782488562869419}
YARN_GPT_OSS = {
    "rope_type": "yarn", "factor": 32.0, "original_max_position_embeddings": 4096,
    "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False}
QWEN_1_5B = {
    "model_type": "qwen2", "hidden_size": 1536, "intermediate_size": 8960,
    "num_hidden_layers": 28, "num_attention_heads": 12, "num_key_value_heads": 2,
    "vocab_size": 151936, "rope_theta": 10000, "rms_norm_eps": 1e-6,
    "max_position_embeddings": 131072, "tie_word_embeddings": False, "sliding_window": 4096,
    "use_sliding_window": False, "use_mrope": None}
QWEN_7B = QWEN_1_5B | {
    "hidden_size": 3584, "intermediate_size": 18944, "num_attention_heads": 28,
    "num_key_value_heads": 4, "vocab_size": 152064}
QWEN3_8B = {
    "model_type": "qwen3", "hidden_size": 4096, "intermediate_size": 12288,
    "num_hidden_layers": 36, "head_dim": 128, "num_attention_heads": 32,
    "num_key_value_heads": 8, "vocab_size": 151936, "rope_theta": 1000000,
    "rope_scaling": YARN_0528, "rms_norm_eps": 1e-6, "max_position_embeddings": 131072,
    "tie_word_embeddings": False, "attention_bias": False}
GPT_OSS_20B = {
    "model_type": "gpt_oss", "hidden_size": 2880, "intermediate_size": 2880,
    "num_hidden_layers": 24, "head_dim": 64, "num_attention_heads": 64,
    "num_key_value_heads": 8, "vocab_size": 201088, "rope_theta": 150000,
    "rope_scaling": YARN_GPT_OSS, "rms_norm_eps": 1e-5, "max_position_embeddings": 131072,
    "num_local_experts": 32, "num_experts_per_tok": 4, "experts_per_token": 4,
    "sliding_window": 128, "swiglu_limit": 7.0, "attention_bias": True,
    "tie_word_embeddings": False,
    "quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}}
LLAMA_8B = {  # DeepSeek-R1-Distill-Llama-8B
    "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "head_dim": 128, "num_attention_heads": 32,
    "num_key_value_heads": 8, "vocab_size": 128256, "rope_theta": 500000.0,
    "rope_scaling": {
        "factor": 8.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192, "rope_type": "llama3"},
    "rms_norm_eps": 1e-5, "max_position_embeddings": 131072, "tie_word_embeddings": False,
    "attention_bias": False, "mlp_bias": False, "pretraining_tp": 1}
REAL = {  # the paper's models
    "R1-Distill-Qwen-1.5B": QWEN_1_5B,
    "R1-Distill-Qwen-7B": QWEN_7B,
    "R1-0528-Qwen3-8B": QWEN3_8B,
    "gpt-oss-20b": GPT_OSS_20B}
PARAMETERS = {  # as transformers counts them
    "R1-Distill-Qwen-1.5B": 1_777_088_000,
    "R1-Distill-Qwen-7B": 7_615_616_512,
    "R1-0528-Qwen3-8B": 8_190_735_360,
    "gpt-oss-20b": 20_914_757_184}


# --------------------------------------------------------------------------------- comparisons


def golden(name):
    """(tensors, json) that checkpoint `name` is expected to give."""
    folder = GOLDEN / "expected" / name
    with safe_open(folder / "expected.safetensors", "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}
    return tensors, json.loads((folder / "expected.json").read_text(encoding="utf-8"))


def close(found, expected, tolerance=1e-4):
    """The largest absolute difference is within `tolerance`; shapes agree; nothing is nan."""
    assert found.shape == expected.shape
    difference = (found - expected).abs().max().item()
    assert difference <= tolerance, f"differs by {difference:.3g}"


# -------------------------------------------------------------------------------- small models


def raw_config(kind, **changes):
    """A small config.json. GPT-OSS has a window of 6 and an original context of 16, so that rows
    of 40 outgrow both."""
    raw = {
        "model_type": kind, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
        "vocab_size": 61, "num_attention_heads": 4, "num_key_value_heads": 2,
        "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "max_position_embeddings": 512,
        "hidden_act": "silu", "tie_word_embeddings": False, "eos_token_id": 3}
    if kind == "qwen3":
        raw["head_dim"] = 12  # not hidden / heads
    if kind == "llama":  # of its four frequencies one is kept, one interpolated, two slowed down
        raw["rope_scaling"] = {
            "rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 16,
            "low_freq_factor": 0.2, "high_freq_factor": 2.0}
    if kind == "gpt_oss":
        raw |= {
            "head_dim": 8, "num_hidden_layers": 4, "num_local_experts": 5,
            "num_experts_per_tok": 2, "sliding_window": 6,
            "rope_scaling": {
                "rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 16,
                "beta_fast": 4.0, "beta_slow": 1.0, "truncate": False}}
    return raw | changes


def fill(model, seed=0):
    """Seeded normal weights: matrices keep the scale of what they read, norms lie around 1, biases
    and sinks around 0."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name:
                noise = 1 + 0.3 * noise
            elif parameter.dim() == 1 or name.endswith("_bias"):
                noise = 0.5 * noise
            elif "embed_tokens" not in name:
                noise = noise * 2 / math.sqrt(parameter.shape[1])
            parameter.copy_(noise)
    return model.requires_grad_(False)


def random_model(kind, seed=0, **changes):
    """A Decoder of a small random config, without end tokens."""
    model = Decoder(Config.from_dict(raw_config(kind, **changes)))
    model.config.eos_ids = ()
    return fill(model, seed)


def meta_model(raw):
    """A Decoder of a config.json, of shapes alone: no number is stored."""
    with torch.device("meta"):
        return Decoder(Config.from_dict(raw))


def random_ids(*shape, vocab=61, seed=0):
    """Token ids (shape) int64."""
    return torch.randint(vocab, shape, generator=torch.Generator().manual_seed(seed))


def random_prompt(length, seed=None, vocab=61):
    """A list of token ids."""
    return random_ids(length, vocab=vocab, seed=length if seed is None else seed).tolist()


def random_stop(model, seed=0, **settings):
    """A Stop none of whose parts is zero."""
    stop = Stop(model, **{"m": 3, "rank": 4, "seed": seed} | settings)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in stop.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return stop.eval()


# -------------------------------------------------------------------------------- files on disk


def write_checkpoint(folder, raw, tensors=None, shards=1, seed=0):
    """A checkpoint's directory of `raw` with `tensors` (default: a random model's), dealt out to
    `shards` files."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(raw))
    if tensors is None:
        tensors = random_model(raw["model_type"], seed, **raw).state_dict()
        if raw["tie_word_embeddings"]:
            del tensors["lm_head.weight"]
    names = sorted(tensors)
    if shards == 1:
        write_tensors(folder / "model.safetensors", tensors, names)
        return folder
    listed = {}
    for shard in range(shards):
        # Neighbours in the alphabet, as *_blocks and *_scales are, go to different files.
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        own = names[shard::shards]
        write_tensors(folder / file, tensors, own)
        listed |= dict.fromkeys(own, file)
    index = {"metadata": {}, "weight_map": listed}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def write_tensors(file, tensors, names):
    save_file({name: tensors[name].contiguous() for name in names}, file)


def write_tokenizer(folder, special=(), template=None):
    """A tokenizer with one token per byte (so that every text survives) and the special tokens
    given."""
    folder.mkdir(exist_ok=True)
    vocab = {byte: i for i, byte in enumerate(sorted(ByteLevel.alphabet()))}
    library = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=[]))
    library.pre_tokenizer = ByteLevel(add_prefix_space=False)
    library.decoder = ByteLevelDecoder()
    library.add_special_tokens(list(special))
    library.save(str(folder / "tokenizer.json"))
    if template is not None:
        config = {"chat_template": template}
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def read_lines(file):
    """The records of a file of JSON lines."""
    return [json.loads(line) for line in file.read_text().splitlines()]


def write_lines(file, records):
    """Records as a file of JSON lines."""
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return file


# ------------------------------------------------------------------------- runs that are cut short


class Told(Watcher):
    """Calls told(checkpoint, checked, kept) after each check."""

    def __init__(self, told):
        self.checked = lambda stage, checked, kept: told(stage.checkpoint, checked, kept)


class Killed(BaseException):
    """What no handler of the program catches: the run is over where it stands."""


class Fuse:
    """The functions that it wraps may be called `calls` times together; the next call is Killed."""

    def __init__(self, calls):
        self.left = calls

    def __call__(self, function):
        def wrapped(*args, **kwargs):
            if self.left == 0:
                raise Killed
            self.left -= 1
            return function(*args, **kwargs)

        return wrapped


def call_script(monkeypatch, capsys, script, *words):
    """Run a script's entry in this process with a command line -> (exit status, stdout, stderr).
    script: the module; words: the arguments, paths and numbers included."""
    name = script.__name__.removeprefix("commands.")
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, words)])
    status = 0
    try:
        if name != script.__name__:
            script.main()
        else:
            command_line(script.Settings, script.main, getattr(script, "recipe", None))
    except SystemExit as error:
        status = error.code
    printed = capsys.readouterr()
    return status, printed.out, printed.err


def flags_of(settings):
    """A dict of settings as words of a command line."""
    words = []
    for key, value in settings.items():
        flag = key.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            words += [f"--{flag}", str(value)]
    return words


def heed_interruptions():
    """What runs in the background of a shell ignores SIGINT, and so would what it starts."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def start_script(script, words, processes=1):
    """Start `python script.py words`, by torchrun where there are several processes -> Popen."""
    launcher = []
    if processes > 1:
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
                    str(processes), "--"]
    return subprocess.Popen(
        [sys.executable, *launcher, script, *map(str, words)], cwd=ROOT, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=os.environ | {"OMP_NUM_THREADS": "1"},
        preexec_fn=heed_interruptions)


def run_script(script, words, processes=1, timeout=200):
    """Run a script to its end -> (exit status, stdout, stderr)."""
    running = start_script(script, words, processes)
    out, err = running.communicate(timeout=timeout)
    return running.returncode, out, err
