"""What several tests need: the golden data, small random models of each architecture, checkpoints and tokenizers on disk."""
import json
import math
import os
from pathlib import Path

import tokenizers
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.pre_tokenizers import ByteLevel

from model import Config, Decoder

torch.set_num_threads(1)  # the models are tiny: a second thread only waits, and for long where the cores are shared

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = Path(os.environ.get("STOP_GOLDEN", ROOT / "oracle" / "golden"))
NAMES = sorted(folder.name for folder in (GOLDEN / "checkpoints").iterdir())
KINDS = ("qwen2", "qwen3", "gpt_oss")


def golden(name):
    """(tensors, json) that checkpoint `name` is expected to give."""
    folder = GOLDEN / "expected" / name
    with safe_open(folder / "expected.safetensors", "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}
    return tensors, json.loads((folder / "expected.json").read_text(encoding="utf-8"))


def raw_config(kind, **changes):
    """A small config.json. GPT-OSS: window 6 and an original context of 16, so that rows of 40 outgrow both."""
    raw = {"model_type": kind, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "vocab_size": 61,
           "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-6, "rope_theta": 10000.0,
           "max_position_embeddings": 512, "hidden_act": "silu", "tie_word_embeddings": False, "eos_token_id": 3}
    if kind == "qwen3":
        raw |= {"head_dim": 12}  # not hidden / heads
    if kind == "gpt_oss":
        raw |= {"head_dim": 8, "num_hidden_layers": 4, "num_local_experts": 5, "num_experts_per_tok": 2, "sliding_window": 6,
                "rope_scaling": {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 16,
                                 "beta_fast": 4.0, "beta_slow": 1.0, "truncate": False}}
    return raw | changes


def fill(model, seed=0):
    """Seeded normal weights: matrices keep the scale of what they read, norms lie around 1, biases and sinks around 0."""
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
    """A Decoder of a small random config."""
    model = Decoder(Config.from_dict(raw_config(kind, **changes)))
    model.config.eos_ids = ()
    return fill(model, seed)


def random_ids(*shape, vocab=61, seed=0):
    return torch.randint(vocab, shape, generator=torch.Generator().manual_seed(seed))


def write_checkpoint(folder, raw, tensors=None, shards=1, seed=0):
    """A checkpoint directory of `raw` with `tensors` (default: a random model's), dealt out to `shards` files."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(raw))
    if tensors is None:
        tensors = random_model(raw["model_type"], seed, **raw).state_dict()
        if raw["tie_word_embeddings"]:
            del tensors["lm_head.weight"]
    names = sorted(tensors)
    if shards == 1:
        save_file({name: tensors[name].contiguous() for name in names}, folder / "model.safetensors")
        return folder
    listed = {}
    for shard in range(shards):  # neighbours in the alphabet, as *_blocks and *_scales, go to different files
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        save_file({name: tensors[name].contiguous() for name in names[shard::shards]}, folder / file)
        listed |= dict.fromkeys(names[shard::shards], file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": listed}))
    return folder


def write_tokenizer(folder, special=(), template=None):
    """A tokenizer with one token per byte (so that every text survives) and the special tokens given."""
    folder.mkdir(exist_ok=True)
    vocab = {byte: i for i, byte in enumerate(sorted(ByteLevel.alphabet()))}
    library = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=[]))
    library.pre_tokenizer, library.decoder = ByteLevel(add_prefix_space=False), ByteLevelDecoder()
    library.add_special_tokens(list(special))
    library.save(str(folder / "tokenizer.json"))
    if template is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    return folder


def close(found, expected, tolerance=1e-4):
    """The largest absolute difference is within `tolerance`; shapes agree; nothing is nan."""
    assert found.shape == expected.shape
    difference = (found - expected).abs().max().item()
    assert difference <= tolerance, f"differs by {difference:.3g}"
