"""plumbing/checkpoint.py and plumbing/stop_files.py: what a config.json means, and files that are
whole, broken or odd."""
import json
import math
import shutil
import subprocess
import sys

import huggingface_hub
import numpy
import pytest
import torch
from helpers import GOLDEN, KINDS, NAMES, ROOT, random_model, raw_config, write_checkpoint
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from plumbing import checkpoint
from plumbing.checkpoint import (
    Config, dequantize_mxfp4, find_folder, fingerprint, parameter_bytes, read_config, read_tensors,
    read_weights, weights_digest)
from plumbing.stop_files import PEFT_INITS, match, read_stop, write_stop


def shapes_of(model):
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def read(folder, dtype=torch.float32, device="cpu"):
    """What model.load reads: {name: tensor} for the decoder that the folder's config describes."""
    from model import Decoder
    config = read_config(folder)
    with torch.device("meta"):
        model = Decoder(config)
    return read_weights(folder, config, shapes_of(model), device, dtype)


def edit(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def without_keys(raw, *keys):
    return {key: value for key, value in raw.items() if key not in keys}


# ----------------------------------------------------------------------------------- the config

BASE_1_5B = {  # config.json of DeepSeek-R1-Distill-Qwen-1.5B
    "architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151643,
    "eos_token_id": 151643, "hidden_act": "silu", "hidden_size": 1536, "initializer_range": 0.02,
    "intermediate_size": 8960, "max_position_embeddings": 131072, "max_window_layers": 21,
    "model_type": "qwen2", "num_attention_heads": 12, "num_hidden_layers": 28,
    "num_key_value_heads": 2, "rms_norm_eps": 1e-06, "rope_theta": 10000, "sliding_window": 4096,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16", "transformers_version": "4.44.0",
    "use_cache": True, "use_mrope": False, "use_sliding_window": False, "vocab_size": 151936}
QWEN3_8B = {  # config.json of DeepSeek-R1-0528-Qwen3-8B
    "architectures": ["Qwen3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "bos_token_id": 151643, "eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu",
    "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 12288,
    "max_position_embeddings": 131072, "max_window_layers": 36, "model_type": "qwen3",
    "num_attention_heads": 32, "num_hidden_layers": 36, "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768,
                     "attn_factor": 0.8782488562869419},
    "rope_theta": 1000000, "sliding_window": None, "tie_word_embeddings": False,
    "torch_dtype": "bfloat16", "transformers_version": "4.51.0", "use_cache": True,
    "use_sliding_window": False, "vocab_size": 151936}
GPT_OSS_20B = {  # config.json of gpt-oss-20b
    "architectures": ["GptOssForCausalLM"], "attention_bias": True, "attention_dropout": 0.0,
    "eos_token_id": 200002, "experts_per_token": 4, "head_dim": 64, "hidden_act": "silu",
    "hidden_size": 2880, "initial_context_length": 4096, "initializer_range": 0.02,
    "intermediate_size": 2880, "layer_types": ["sliding_attention", "full_attention"] * 12,
    "max_position_embeddings": 131072, "model_type": "gpt_oss", "num_attention_heads": 64,
    "num_experts_per_tok": 4, "num_hidden_layers": 24, "num_key_value_heads": 8,
    "num_local_experts": 32, "output_router_logits": False, "pad_token_id": 199999,
    "quantization_config": {
        "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router",
                                   "model.embed_tokens", "lm_head"],
        "quant_method": "mxfp4"},
    "rms_norm_eps": 1e-05,
    "rope_scaling": {"beta_fast": 32.0, "beta_slow": 1.0, "factor": 32.0,
                     "original_max_position_embeddings": 4096, "rope_type": "yarn",
                     "truncate": False},
    "rope_theta": 150000, "router_aux_loss_coef": 0.9, "sliding_window": 128, "swiglu_limit": 7.0,
    "tie_word_embeddings": False, "transformers_version": "4.55.0.dev0", "use_cache": True,
    "vocab_size": 201088}
LLAMA_8B = {  # config.json of DeepSeek-R1-Distill-Llama-8B
    "architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "bos_token_id": 128000, "eos_token_id": 128001, "head_dim": 128, "hidden_act": "silu",
    "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 14336,
    "max_position_embeddings": 131072, "mlp_bias": False, "model_type": "llama",
    "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8,
    "pretraining_tp": 1, "rms_norm_eps": 1e-05,
    "rope_scaling": {"factor": 8.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
                     "original_max_position_embeddings": 8192, "rope_type": "llama3"},
    "rope_theta": 500000.0, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    "transformers_version": "4.46.3", "use_cache": True, "vocab_size": 128256}
QWEN2_5_0_5B = BASE_1_5B | {
    "hidden_size": 896, "intermediate_size": 4864, "max_position_embeddings": 32768,
    "max_window_layers": 24, "num_attention_heads": 14, "num_hidden_layers": 24,
    "rope_theta": 1000000.0, "sliding_window": 32768, "tie_word_embeddings": True}
PRM_7B = BASE_1_5B | {
    "architectures": ["Qwen2ForProcessRewardModel"],
    "auto_map": {"AutoConfig": "configuration_qwen2_rm.Qwen2RMConfig",
                 "AutoModel": "modeling_qwen2_rm.Qwen2ForProcessRewardModel"},
    "hidden_size": 3584, "intermediate_size": 18944, "max_position_embeddings": 4096,
    "num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152064,
    "pad_token_id": 151643}
REAL = {
    "DeepSeek-R1-Distill-Qwen-1.5B": BASE_1_5B,
    "DeepSeek-R1-0528-Qwen3-8B": QWEN3_8B,
    "gpt-oss-20b": GPT_OSS_20B,
    "DeepSeek-R1-Distill-Llama-8B": LLAMA_8B,
    "Qwen2.5-0.5B": QWEN2_5_0_5B,
    "Qwen2.5-Math-PRM-7B": PRM_7B,
    "QwQ-32B": BASE_1_5B | {
        "rope_scaling": {"factor": 4.0, "original_max_position_embeddings": 32768, "type": "yarn"}},
    "an upload of Unsloth's": BASE_1_5B | {
        "_name_or_path": "unsloth/deepseek-r1-distill-qwen-1.5b", "pad_token_id": 151654,
        "rope_scaling": None, "unsloth_fixed": True, "unsloth_version": "2025.3.9",
        "_attn_implementation_autoset": True, "head_dim": 128},
    "a fine-tune saved by transformers 5": without_keys(BASE_1_5B, "rope_theta", "torch_dtype") | {
        "dtype": "bfloat16", "layer_types": ["full_attention"] * 28, "sliding_window": None,
        "rope_parameters": {"rope_theta": 10000, "rope_type": "default"}, "use_mrope": False,
        "pad_token_id": -1},
}


@pytest.mark.parametrize("name", REAL)
def test_a_published_config_is_read(name):
    config = Config.from_dict(REAL[name])
    assert config.vocab_size == REAL[name]["vocab_size"]
    assert config.reward == ("PRM" in name)
    assert config.tie_word_embeddings == (name == "Qwen2.5-0.5B")
    assert config.rope["rope_theta"] == REAL[name].get("rope_theta", 10000)


def test_fields_of_the_real_models():
    small = Config.from_dict(BASE_1_5B)
    assert small.head_dim == 128
    assert small.windows == (None,) * 28
    oss = Config.from_dict(GPT_OSS_20B)
    assert oss.windows == (128, None) * 12
    assert (oss.experts, oss.experts_per_token, oss.quantized) == (32, 4, True)
    assert oss.rope["truncate"] is False
    assert Config.from_dict(QWEN3_8B).rope["attn_factor"] == 0.8782488562869419
    llama = Config.from_dict(LLAMA_8B)
    assert llama == Config.from_dict(without_keys(LLAMA_8B, "head_dim"))
    assert llama.head_dim == 128
    assert llama.rope == {
        "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    assert Config.from_dict(QWEN3_8B, apply_attn_factor=True).apply_attn_factor


INERT = {
    "use_mrope": False, "unsloth_fixed": True, "_attn_implementation_autoset": True,
    "attn_implementation": "flash_attention_2", "torch_dtype": "bfloat16", "unknown": None,
    "another": False, "text_config": {}, "pruned_heads": {}, "rope_scaling": None,
    "pad_token_id": -1, "pretraining_tp": 1, "mlp_bias": False, "qkv_bias": True,
    "attention_bias": True, "attention_dropout": 0.1, "temperature": 0.7, "do_sample": True,
    "max_window_layers": 21, "sliding_window": 4096, "use_sliding_window": False,
    "quantization_config": None, "partial_rotary_factor": 1.0, "is_causal": True,
    "layer_types": ["full_attention"] * 3, "dual_chunk_attention_config": None}


@pytest.mark.parametrize("key", INERT)
def test_what_changes_nothing_is_accepted(key):
    found = Config.from_dict(raw_config("qwen2", **{key: INERT[key]}))
    assert found == Config.from_dict(raw_config("qwen2"))


CHANGES_RESULTS = {
    "use_mrope": True, "mlp_bias": True, "qkv_bias": False, "text_config": {"hidden_size": 8},
    "partial_rotary_factor": 0.5, "is_causal": False, "logit_softcap": 30.0, "num_local_experts": 4,
    "dual_chunk_attention_config": {"chunk_size": 262144}, "head_gate": 0, "use_qk_norm": True,
    "quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 128}}


@pytest.mark.parametrize("key", CHANGES_RESULTS)
def test_what_changes_results_is_refused_by_name(key):
    with pytest.raises(ValueError, match=f"^config.json: {key}: found "):
        Config.from_dict(raw_config("qwen2", **{key: CHANGES_RESULTS[key]}))


QUANTIZED = {  # as the Hub's uploads spell it
    "gptq": {"bits": 4, "checkpoint_format": "gptq", "desc_act": True, "group_size": 128,
             "quant_method": "gptq", "sym": True},
    "awq": {"bits": 4, "group_size": 128, "quant_method": "awq", "version": "gemm",
            "zero_point": True},
    "fp8": {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8",
            "weight_block_size": [128, 128]},
    "bitsandbytes": {"_load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "load_in_4bit": True,
                     "quant_method": "bitsandbytes"},
    "compressed-tensors": {"config_groups": {"group_0": {}}, "quant_method": "compressed-tensors"}}


@pytest.mark.parametrize("method", QUANTIZED)
@pytest.mark.parametrize("kind", KINDS)
def test_a_quantised_upload_is_refused_for_that(kind, method):
    """Not for another key that its tool has left behind, and by the method's name."""
    raw = {"some_tools_key": 1} | raw_config(kind, quantization_config=QUANTIZED[method])
    message = "^config.json: quantization_config: found .*not quantised"
    with pytest.raises(ValueError, match=message):
        Config.from_dict(raw)
    mlx = {"some_tools_key": 1} | raw_config(kind, quantization={"group_size": 64, "bits": 4})
    with pytest.raises(ValueError, match="^config.json: quantization: found"):
        Config.from_dict(mlx)


def test_a_long_value_is_cut():
    """No line of a refusal grows with what was found, and none holds a newline."""
    with pytest.raises(ValueError) as caught:
        Config.from_dict(raw_config("qwen2", odd_key="a\nb" * 1000))
    assert len(str(caught.value)) < 200
    assert "\n" not in str(caught.value)


YARN = {"rope_type": "yarn", "factor": 4.0}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
SIZES = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size",
    "max_position_embeddings")
CONFIGS = [  # architecture, changes, what the message must say
    ("qwen2", {"model_type": "mistral"}, "model_type.*mistral.*qwen2.*llama"),
    ("qwen2", {"model_type": None}, "model_type"),
    ("qwen2", {"model_type": ["qwen2"]}, "model_type"),
    ("qwen2", {"use_sliding_window": True}, "use_sliding_window"),
    ("qwen3", {"use_sliding_window": True}, "use_sliding_window"),
    ("qwen2", {"layer_types": ["sliding_attention"] * 3, "sliding_window": 4}, "layer_types"),
    ("qwen2", {"layer_types": ["full_attention"] * 2}, "layer_types"),
    ("gpt_oss", {"layer_types": ["chunked"] * 4}, "layer_types"),
    ("qwen2", {"hidden_act": "gelu"}, "hidden_act.*gelu.*silu"),
    ("gpt_oss", {"hidden_act": "relu"}, "hidden_act"),
    ("qwen2", {"attention_bias": False}, "attention_bias"),
    ("qwen3", {"attention_bias": True}, "attention_bias"),
    ("qwen2", {"quantization_config": {"quant_method": "mxfp4"}}, "quantization_config"),
    ("gpt_oss", {"quantization_config": {"quant_method": "awq"}}, "quantization_config.*awq"),
    ("qwen3", {"quantization_config": {"bits": 4}}, "quantization_config"),
    ("qwen2", {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "rope_type.*linear.*yarn"),
    ("qwen2", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type.*dynamic"),
    ("llama", {"attention_bias": True}, "attention_bias: found True, expected False for llama"),
    ("llama", {"mlp_bias": True}, "mlp_bias"),
    ("llama", {"use_sliding_window": True}, "use_sliding_window"),
    ("llama", {"rope_scaling": {"rope_type": "llama3"}}, "factor"),
    ("llama", {"rope_scaling": LLAMA3 | {"low_freq_factor": None}}, "low_freq_factor"),
    ("llama", {"rope_scaling": LLAMA3 | {"high_freq_factor": "4"}}, "high_freq_factor"),
    ("llama", {"rope_scaling": LLAMA3 | {"high_freq_factor": 1}}, "high_freq_factor.*more than"),
    ("llama", {"rope_scaling": LLAMA3 | {"mscale": 0.7}}, "mscale"),
    ("qwen2", {"rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}}, "mrope"),
    ("qwen2", {"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}}, "longrope"),
    ("qwen2", {"rope_scaling": {"rope_type": "yarn"}}, "factor"),
    ("qwen2", {"rope_scaling": YARN, "rope_parameters": {"rope_type": "default",
                                                          "rope_theta": 1e4}}, "rope_scaling"),
    ("gpt_oss", {"rope_scaling": None}, "rope_scaling"),
    ("qwen2", {"rope_scaling": YARN | {"mscale": 0.7}}, "mscale"),
    ("qwen2", {"rope_scaling": YARN | {"factor": 0}}, "factor"),
    ("qwen2", {"rope_scaling": YARN | {"factor": "4"}}, "factor"),
    ("qwen2", {"rope_theta": None}, "rope_theta"),
    ("qwen2", {"rope_theta": -1.0}, "rope_theta"),
    ("qwen2", {"rope_theta": math.inf}, "rope_theta"),
    ("qwen2", {"num_key_value_heads": 3}, "num_key_value_heads.*3"),
    ("qwen2", {"num_attention_heads": 64, "num_key_value_heads": 64}, "head_dim"),
    ("qwen3", {"head_dim": 7}, "head_dim.*7.*even"),
    ("qwen3", {"head_dim": None}, "head_dim"),
    ("gpt_oss", {"sliding_window": None}, "sliding_window"),
    ("gpt_oss", {"experts_per_token": 3}, "experts_per_token"),
    ("gpt_oss", {"num_experts_per_tok": 6}, "num_experts_per_tok"),
    ("qwen2", {"eos_token_id": "end"}, "eos_token_id"),
    ("qwen2", {"eos_token_id": 61}, "eos_token_id: found 61, expected token ids from 0 to 60"),
    ("qwen2", {"eos_token_id": [1, -1]}, "eos_token_id"),
    ("qwen2", {"eos_token_id": True}, "eos_token_id"),
    ("qwen2", {"tie_word_embeddings": "no"}, "tie_word_embeddings"),
    *[("qwen2", {key: value}, key) for key in SIZES for value in (0, -4, 3.5, "64", True, 2 ** 70)],
    *[("qwen2", {"rms_norm_eps": value}, "rms_norm_eps") for value in (0, "x", None)]]


@pytest.mark.parametrize("kind, changes, message", CONFIGS, ids=lambda value: str(value)[:60])
def test_a_config_that_is_not_built_here(tmp_path, kind, changes, message):
    """Refused by the key's name, never ignored: the wrong arithmetic would be silent."""
    (tmp_path / "config.json").write_text(json.dumps(raw_config(kind) | changes))
    with pytest.raises(ValueError, match=message) as caught:
        read_config(tmp_path)
    assert "config.json: " in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", KINDS)
def test_any_wrong_type_is_a_value_error(tmp_path, kind):
    """Every key with every kind of JSON value: refused, or read; never a TypeError."""
    layers = raw_config(kind)["num_hidden_layers"]
    raw = raw_config(kind, layer_types=["full_attention"] * layers, quantization_config=None)
    raw |= {"rope_parameters": raw.get("rope_scaling"), "use_sliding_window": False}
    raw |= {"torch_dtype": "float32", "architectures": None, "qkv_bias": None}
    values = (None, True, 0, 2.5, "x", ["x"], [[]], {"x": 1}, {"rope_type": []}, math.nan)
    for key in raw:
        for value in values:
            (tmp_path / "config.json").write_text(json.dumps(raw | {key: value}))
            try:
                read_config(tmp_path)
            except ValueError:
                pass


def test_mxfp4_needs_blocks_of_32():
    """48 inputs do not fill blocks of 32: refused before any tensor is read."""
    quantization = {"quant_method": "mxfp4"}
    for key in ("intermediate_size", "hidden_size"):
        raw = raw_config("gpt_oss", quantization_config=quantization, **{key: 48})
        if key == "hidden_size":
            raw["intermediate_size"] = 32
        with pytest.raises(ValueError, match=f"{key}.*48.*32"):
            Config.from_dict(raw)


@pytest.mark.parametrize("name", NAMES)
def test_both_spellings_of_a_config(name):
    """transformers 4 (rope_theta, rope_scaling, torch_dtype) and 5 (rope_parameters, dtype): the
    same Config."""
    folder = GOLDEN / "checkpoints" / name
    four = json.loads((folder / "config.json").read_text())
    five = json.loads((folder / "config.transformers5.json").read_text())
    assert "rope_parameters" in five and "rope_parameters" not in four
    assert Config.from_dict(four) == Config.from_dict(five)
    assert fingerprint(Config.from_dict(four)) == fingerprint(Config.from_dict(five))


# ------------------------------------------------------------------------------- the end tokens


@pytest.mark.parametrize("generation, config, expected", (
    (None, 3, (3,)), (None, [3, 5], (3, 5)), ({}, 3, (3,)), ({"eos_token_id": [7, 8]}, 3, (7, 8)),
    ({"eos_token_id": 7}, None, (7,)), ({"eos_token_id": None}, 3, (3,)), (None, None, ())))
def test_where_generation_ends(tmp_path, generation, config, expected):
    """generation_config.json before config.json; null there hides nothing."""
    (tmp_path / "config.json").write_text(json.dumps(raw_config("qwen2", eos_token_id=config)))
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    assert read_config(tmp_path).eos_ids == expected


@pytest.mark.parametrize("file", ("config.json", "generation_config.json"))
@pytest.mark.parametrize("value", ("end", [3, "x"], 61, -1, 2.0, True, [[3]]))
def test_a_bad_end_token_is_blamed_on_its_file(tmp_path, file, value):
    (tmp_path / "config.json").write_text(json.dumps(raw_config("qwen2")))
    (tmp_path / "generation_config.json").write_text("{}")
    edit(tmp_path / file, eos_token_id=value)
    with pytest.raises(ValueError, match=f"/{file}: eos_token_id: found .* from 0 to 60"):
        read_config(tmp_path)


# ------------------------------------------------------------------------------ the fingerprint

DIGITS = {  # STOP checkpoints carry them: as they were when the first were written
    "gptoss-mxfp4-tiny": "b5b99ba144e5d4fb", "gptoss-tiny": "968f9c7522fc03b8",
    "qwen2-tied-sharded": "342ced54bc2f0e85", "qwen2-tiny": "3d9a73c82a89419c",
    "qwen3-tiny": "59700fdca4dc538c"}


@pytest.mark.parametrize("name", [name for name in NAMES if name in DIGITS])
def test_the_fingerprint_never_changes(name):
    config = read_config(GOLDEN / "checkpoints" / name)
    assert fingerprint(config) == DIGITS[name]


def test_the_toys_stop_is_the_toys():
    saved = read_stop(ROOT / "toy" / "stop")
    assert saved.base_fingerprint == fingerprint(read_config(ROOT / "toy"))


@pytest.mark.parametrize("change", (
    {"num_attention_heads": 2, "num_key_value_heads": 1}, {"rms_norm_eps": 1e-5},
    {"vocab_size": 62}, {"num_hidden_layers": 2}, {"tie_word_embeddings": True},
    {"rope_theta": 5000.0}, {"rope_scaling": YARN}))
def test_the_fingerprint_sees(change):
    """A field left out of the digest would let a STOP score another base model's prefixes."""
    plain = Config.from_dict(raw_config("qwen2"))
    assert fingerprint(plain) != fingerprint(Config.from_dict(raw_config("qwen2", **change)))


@pytest.mark.parametrize("kind, changes", (
    ("qwen2", {"eos_token_id": [1, 2]}), ("gpt_oss", {"max_position_embeddings": 99}),
    ("qwen2", {"max_position_embeddings": 99}), ("qwen3", {"rope_theta": 10000}),
    ("gpt_oss", {"swiglu_limit": 7}),
    ("qwen2", {"rope_scaling": {"rope_type": "default", "factor": 8.0}})))
def test_the_fingerprint_does_not_see(kind, changes):
    """Where generation ends, how much context is served, and 1e4 or 10000 change no hidden
    state."""
    plain = Config.from_dict(raw_config(kind))
    assert fingerprint(plain) == fingerprint(Config.from_dict(raw_config(kind, **changes)))


# ----------------------------------------------------------------------------------- the folder


def cut(file, share=0.6):
    content = file.read_bytes()
    file.write_bytes(content[:int(len(content) * share)])


def change_shard(folder, shard):
    index = folder / "model.safetensors.index.json"
    listed = json.loads(index.read_text())
    listed["weight_map"]["model.norm.weight"] = shard
    index.write_text(json.dumps(listed))


SINGLE = {  # what is done to a good checkpoint -> what the message must say
    "no config.json": (lambda f: (f / "config.json").unlink(), r"it/config\.json"),
    "config.json is not JSON": (
        lambda f: (f / "config.json").write_text("{'model_type': qwen2}"), r"config\.json.*JSON"),
    "config.json is cut": (lambda f: cut(f / "config.json"), r"config\.json.*JSON"),
    "config.json is not text": (
        lambda f: (f / "config.json").write_bytes(b"\xff\xfe\x00"), r"config\.json.*JSON"),
    "config.json is a list": (
        lambda f: (f / "config.json").write_text("[1]"), r"config\.json.*list.*object"),
    "config.json is too deep": (
        lambda f: (f / "config.json").write_text("[" * 100000), r"config\.json.*JSON"),
    "generation_config.json is not JSON": (
        lambda f: (f / "generation_config.json").write_text("{"), r"generation_config\.json.*JSON"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), r"model\.safetensors"),
    "weights cut in the data": (
        lambda f: cut(f / "model.safetensors"), r"model\.safetensors.*not a whole safetensors"),
    "weights cut in the header": (
        lambda f: cut(f / "model.safetensors", 0.001), r"model\.safetensors.*not a whole"),
    "empty weights": (
        lambda f: cut(f / "model.safetensors", 0), r"model\.safetensors.*not a whole"),
    "weights are something else": (
        lambda f: (f / "model.safetensors").write_bytes(b"PK\x03\x04" * 99), r"model\.safetensors"),
}
SHARDED = {
    "a shard is missing": (
        lambda f: next(f.glob("*-00002-*")).unlink(), "00002-of-00003.safetensors"),
    "a shard is cut": (lambda f: cut(next(f.glob("*-00002-*"))), "00002-of-00003.*not a whole"),
    "a shard outside": (
        lambda f: change_shard(f, "../elsewhere.safetensors"), "elsewhere.*outside"),
    "an absolute shard": (lambda f: change_shard(f, "/etc/model.safetensors"), "/etc.*outside"),
    "a shard that is the parent": (lambda f: change_shard(f, ".."), "outside"),
    "a shard that is a number": (lambda f: change_shard(f, 3), r"index\.json.*weight_map"),
    "no weight_map": (
        lambda f: (f / "model.safetensors.index.json").write_text("{}"),
        r"index\.json.*weight_map"),
    "the index is not JSON": (
        lambda f: cut(f / "model.safetensors.index.json"), r"index\.json.*JSON"),
}


@pytest.mark.parametrize("what", [*SINGLE, *SHARDED])
def test_a_broken_directory(tmp_path, what):
    harm, message = (SINGLE | SHARDED)[what]
    shards = 1 if what in SINGLE else 3
    folder = write_checkpoint(tmp_path / "it", raw_config("qwen2"), shards=shards)
    (tmp_path / "elsewhere.safetensors").write_bytes(b"")
    assert read(folder)
    harm(folder)
    with pytest.raises(ValueError, match=message) as caught:
        read(folder)
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize("where", (
    "none", "./none", "/none/at/all", "../none/../x", "a b/c", "hub-id"))
def test_no_such_directory(where):
    with pytest.raises(ValueError, match="no such directory"):
        find_folder(where)


def test_a_file_is_no_directory(tmp_path, monkeypatch):
    """Nor is "toy/model.safetensors" asked of the Hub."""
    monkeypatch.chdir(write_checkpoint(tmp_path / "it", raw_config("qwen2")).parent)
    with pytest.raises(ValueError, match="^it/model.safetensors: found a file, expected"):
        find_folder("it/model.safetensors")


def test_what_the_hub_does_not_give(monkeypatch):
    """A Hub id that fails is the user's mistake or the network's: one line, not the library's
    traceback."""
    def fail(*_, **__):
        raise huggingface_hub.errors.LocalEntryNotFoundError("Cannot find it.\nMore lines.\n")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(ValueError, match="owner/name.*Cannot find it") as caught:
        find_folder("owner/name")
    assert "\n" not in str(caught.value)


def test_of_a_hub_repository_the_top_level_is_taken(monkeypatch, tmp_path):
    """Filtered as the Hub library itself filters a repository's listing."""
    wanted = {"config.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors",
              "model.safetensors.index.json", "tokenizer.json", "chat_template.jinja"}
    unwanted = {"checkpoint-500/model.safetensors", "adapter/adapter_config.json", "README.md",
                "original/model.safetensors", "metal/model.bin", "original/config.json",
                "a/b/c.json"}
    asked = {}

    def download(repository, **settings):
        asked.update(settings)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert find_folder("owner/name") == tmp_path
    kept = huggingface_hub.utils.filter_repo_objects(sorted(wanted | unwanted), **asked)
    assert set(kept) == wanted


# ---------------------------------------------------------------------------------- the weights


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shards", (1, 3))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_weights_are_those_that_were_written(tmp_path, kind, shards, dtype):
    raw = raw_config(kind)
    written = random_model(kind, **raw).state_dict()
    found = read(write_checkpoint(tmp_path / "it", raw, written, shards), dtype)
    assert found.keys() == written.keys()
    for name, tensor in written.items():
        assert torch.equal(found[name], tensor.to(dtype))


def test_weights_do_not_hang_on_their_file(tmp_path):
    """They are copies: a file that is written again changes no model in memory."""
    raw = raw_config("qwen2")
    folder = write_checkpoint(tmp_path / "it", raw)
    found = read(folder)
    before = {name: tensor.clone() for name, tensor in found.items()}
    file = folder / "model.safetensors"
    with open(file, "r+b") as opened:
        size = file.stat().st_size
        opened.seek(size // 2)
        opened.write(b"\x00" * (size // 2))
    assert all(torch.equal(tensor, before[name]) for name, tensor in found.items())


NORM = "model.layers.1.input_layernorm.weight"
Q = "model.layers.0.self_attn.q_proj.weight"


def without(tensors, name):
    del tensors[name]


def put(tensors, name, tensor):
    tensors[name] = tensor


TENSORS = {
    "one missing": (lambda t: without(t, NORM), rf"missing tensor {NORM}.*\[32\]"),
    "lm_head missing, not tied": (
        lambda t: without(t, "lm_head.weight"), r"missing tensor lm_head.weight.*\[61, 32\]"),
    "one too many": (
        lambda t: put(t, "model.layers.0.self_attn.q_proj.extra", torch.zeros(2)),
        "unexpected.*q_proj.extra"),
    "a layer too many": (
        lambda t: put(t, NORM.replace("1", "3"), t[NORM].clone()), "unexpected.*layers.3"),
    "a wrong shape": (lambda t: put(t, Q, torch.zeros(32, 16)), rf"{Q}.*\[32, 16\].*\[32, 32\]"),
    "a dimension more": (lambda t: put(t, NORM, torch.zeros(1, 32)), rf"{NORM}.*\[1, 32\].*\[32\]"),
    "integers": (lambda t: put(t, Q, torch.zeros(32, 32, dtype=torch.int64)), f"{Q}.*I64.*F32"),
    "bytes": (lambda t: put(t, Q, torch.zeros(32, 32, dtype=torch.uint8)), f"{Q}.*U8.*F32"),
}


@pytest.mark.parametrize("shards", (1, 3))
@pytest.mark.parametrize("what", TENSORS)
def test_wrong_tensors(tmp_path, what, shards):
    """The message names the tensor, its file (where it has one), what was found and what was
    expected."""
    harm, message = TENSORS[what]
    raw = raw_config("qwen2")
    tensors = random_model("qwen2", **raw).state_dict()
    harm(tensors)
    with pytest.raises(ValueError, match=message) as caught:
        read(write_checkpoint(tmp_path / "it", raw, tensors, shards))
    assert str(tmp_path / "it") in str(caught.value)
    assert "missing" in what or ".safetensors" in str(caught.value)


def test_headers_are_checked_before_any_weight_is_read(tmp_path, monkeypatch):
    """A wrong shape in the last of many shards is not found after minutes of reading."""
    raw = raw_config("qwen2")
    tensors = random_model("qwen2", **raw).state_dict()
    tensors["model.norm.weight"] = torch.ones(31)
    folder = write_checkpoint(tmp_path / "it", raw, tensors, 3)
    monkeypatch.setattr(checkpoint, "check_finite", None)
    with pytest.raises(ValueError, match=r"model.norm.weight: found shape \[31\] of F32"):
        read(folder)


@pytest.mark.parametrize("value", (math.nan, math.inf, -math.inf))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_a_weight_that_is_no_number(tmp_path, value, dtype):
    raw = raw_config("qwen2")
    tensors = random_model("qwen2", **raw).state_dict()
    tensors[Q][3, 5] = value
    with pytest.raises(ValueError, match=f"model.safetensors: {Q}: found NaN or infinity"):
        read(write_checkpoint(tmp_path / "it", raw, tensors), dtype)


def test_a_weight_that_overflows_in_float16(tmp_path):
    """70,000 is a number in bfloat16 and none in float16: the message says that the dtype is the
    cause."""
    raw = raw_config("qwen2")
    tensors = random_model("qwen2", **raw).bfloat16().state_dict()
    tensors[Q][3, 5] = -70000
    folder = write_checkpoint(tmp_path / "it", raw, tensors)
    assert read(folder, torch.bfloat16)[Q][3, 5] == -70144
    message = f"{Q}: found a value of 7.01e.04, .*float16: take another dtype"
    with pytest.raises(ValueError, match=message):
        read(folder, torch.float16)


def test_a_tied_head_on_disk(tmp_path):
    """The one tensor that may be absent or present: equal to the embeddings it is accepted, else
    refused."""
    raw = raw_config("qwen2", tie_word_embeddings=True)
    state = random_model("qwen2", **raw).state_dict()
    state = {name: tensor.clone() for name, tensor in state.items()}
    for dtype in (torch.float32, torch.float16):
        present = read(write_checkpoint(tmp_path / "present", raw, state), dtype)
        absent = read(write_checkpoint(tmp_path / "absent", raw), dtype)
        assert present.keys() == absent.keys()
        assert "lm_head.weight" not in present
    state["lm_head.weight"][5, 5] += 1
    with pytest.raises(ValueError, match="lm_head.weight.*tie_word_embeddings"):
        read(write_checkpoint(tmp_path / "other", raw, state))
    state["lm_head.weight"] = torch.zeros(60, 32)
    with pytest.raises(ValueError, match="lm_head.weight.*tie_word_embeddings"):
        read(write_checkpoint(tmp_path / "shape", raw, state))


def test_a_reward_models_unused_head(tmp_path):
    """Qwen2.5-Math-PRM-7B's files hold an lm_head.weight that its model has no use for."""
    raw = raw_config("qwen2", architectures=["Qwen2ForProcessRewardModel"])
    state = random_model("qwen2", **raw).state_dict()
    unused = {"lm_head.weight": torch.ones(61, 32)}
    found = read(write_checkpoint(tmp_path / "it", raw, state | unused))
    assert found.keys() == state.keys()


def test_the_bytes_of_a_model():
    shapes = {"a": (3, 5), "b": (7,), "c": ()}
    assert parameter_bytes(shapes, torch.float32) == 23 * 4
    assert parameter_bytes(shapes, torch.bfloat16) == 23 * 2


MEASURE = """
import json, re, sys
from pathlib import Path
import torch
from safetensors.torch import save_file
from plumbing.checkpoint import Config, read_weights

def high_water():  # ru_maxrss would begin at that of the parent
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024

folder = Path(sys.argv[1])
config = Config.from_dict(json.loads((folder / "config.json").read_text()))
shapes = {f"t{i}": (2 ** 12, 2 ** 12) for i in range(8)}
before = high_water()
found = read_weights(folder, config, shapes, "cpu", torch.float32)
print(high_water() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_host_memory_stays_below_the_model_and_one_shard(tmp_path):
    """8 shards of 32 MiB, in float32 512 MiB of model: the high-water mark may rise by 544 MiB, and
    a little for the reader."""
    (tmp_path / "config.json").write_text(json.dumps(raw_config("qwen2")))
    listed = {}
    for i in range(8):
        name = f"model-{i}.safetensors"
        save_file({f"t{i}": torch.ones(2 ** 12, 2 ** 12, dtype=torch.bfloat16)}, tmp_path / name)
        listed[f"t{i}"] = name
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": listed}))
    run = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    assert 512 < float(run.stdout) < 512 + 32 + 16, run.stderr


# --------------------------------------------------------------------------------------- MXFP4


def unpack_slowly(blocks, scales):
    """MXFP4 by the letter, one nibble at a time: (E, out, groups, 16), (E, out, groups) -> (E,
    groups * 32, out)."""
    values = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    E, rows, groups, _ = blocks.shape
    out = torch.zeros(E, groups * 32, rows)
    for e in range(E):
        for row in range(rows):
            for group in range(groups):
                scale = 2.0 ** (int(scales[e, row, group]) - 127)
                for byte, both in enumerate(blocks[e, row, group].tolist()):
                    for half, code in enumerate((both % 16, both // 16)):
                        value = -values[code - 8] if code > 7 else values[code]
                        out[e, group * 32 + byte * 2 + half, row] = value * scale
    return out


def test_golden_mxfp4():
    """Bit-equal: catches swapped nibbles, a lost sign, a scale off by one."""
    unit = read_tensors(GOLDEN / "mxfp4_unit.safetensors", "blocks", "scales", "dequant")
    found = dequantize_mxfp4(unit["blocks"], unit["scales"])
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, unit["dequant"])
    assert torch.equal(found.view(torch.int16), unit["dequant"].view(torch.int16))  # -0.0 too
    assert torch.equal(found.float(), unpack_slowly(unit["blocks"], unit["scales"]))


def packed_pair(seed=0):
    """(raw config, tensors with MXFP4 experts, the same tensors unpacked by the slow loop)."""
    raw = raw_config(
        "gpt_oss", intermediate_size=64, hidden_size=32, num_hidden_layers=2, num_local_experts=3)
    state = random_model("gpt_oss", **raw).state_dict()
    dense = {name: tensor.to(torch.bfloat16) for name, tensor in state.items()}
    packed = dict(dense)
    generator = torch.Generator().manual_seed(seed)
    for name in dense:
        if name.endswith(("gate_up_proj", "down_proj")):
            E, inner, out = packed.pop(name).shape
            shape = (E, out, inner // 32)
            blocks = torch.randint(256, (*shape, 16), generator=generator, dtype=torch.uint8)
            scales = torch.randint(122, 126, shape, generator=generator, dtype=torch.uint8)
            packed[name + "_blocks"] = blocks
            packed[name + "_scales"] = scales
            dense[name] = unpack_slowly(blocks, scales)
    return raw | {"quantization_config": {"quant_method": "mxfp4"}}, packed, dense


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_an_mxfp4_checkpoint(tmp_path, dtype):
    """Blocks and scales in different shards, against what a slow loop unpacks; bit-equal."""
    raw, packed, dense = packed_pair()
    folder = write_checkpoint(tmp_path / "it", raw, packed, shards=2)
    listed = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    blocks = [name for name in listed if name.endswith("_blocks")]
    assert any(listed[name] != listed[name.replace("_blocks", "_scales")] for name in blocks)
    found = read(folder, dtype)
    assert found.keys() == dense.keys()
    for name, tensor in dense.items():
        assert torch.equal(found[name], tensor.to(dtype)), name


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")
def test_mxfp4_on_the_gpu_is_that_on_the_cpu(tmp_path):
    raw, packed, dense = packed_pair()
    found = read(write_checkpoint(tmp_path / "it", raw, packed), torch.bfloat16, "cuda")
    for name, tensor in dense.items():
        assert found[name].is_cuda
        assert torch.equal(found[name].cpu(), tensor.bfloat16()), name


@pytest.mark.parametrize("what", ("missing", "shape", "dtype", "infinity"))
def test_wrong_mxfp4_tensors(tmp_path, what):
    raw, packed, _ = packed_pair()
    name = "model.layers.0.mlp.experts.down_proj_scales"
    if what == "missing":
        del packed[name]
    elif what == "shape":
        packed[name] = packed[name][:, :5]
    elif what == "dtype":
        packed[name] = packed[name].float()
    else:
        packed[name][:] = 255
        name = name.removesuffix("_scales")
    with pytest.raises(ValueError, match=name):
        read(write_checkpoint(tmp_path / "it", raw, packed))


# ------------------------------------------------------------------------------ weights_digest


def test_the_digest_of_weights_sees_every_byte():
    """A bit, a name, a shape and a dtype each change it; a copy does not, nor a view with other
    strides."""
    def layer(**changes):
        torch.manual_seed(0)
        module = torch.nn.Linear(3, 4, **changes)
        return module.requires_grad_(False)

    plain = weights_digest(layer())
    assert len(plain) == 16 and plain == weights_digest(layer())
    flipped = layer()
    flipped.weight.view(torch.int32)[2, 1] ^= 1
    reshaped = layer()
    reshaped.weight = torch.nn.Parameter(reshaped.weight.view(3, 4))
    strided = layer()
    strided.weight = torch.nn.Parameter(strided.weight.T.contiguous().T)
    renamed = torch.nn.Sequential(layer())
    others = [flipped, reshaped, renamed, layer(bias=False), layer().bfloat16()]
    digests = {weights_digest(module) for module in others} | {plain}
    assert len(digests) == len(others) + 1
    assert not strided.weight.is_contiguous()
    assert weights_digest(strided) == plain


def test_the_digest_sees_a_dtype_whose_bytes_are_the_same():
    zeros = [torch.nn.ParameterDict({"a": torch.zeros(5, dtype=dtype)})
             for dtype in (torch.float16, torch.bfloat16)]
    assert weights_digest(zeros[0]) != weights_digest(zeros[1])


def test_the_digest_of_more_than_one_piece():
    """64 MiB go at a time: a change behind the first piece counts."""
    module = torch.nn.ParameterDict({"a": torch.zeros(2 ** 24 + 5)})
    before = weights_digest(module)
    with torch.no_grad():
        module["a"][-1] = 1
    assert weights_digest(module) != before


# ------------------------------------------------------------------------------- STOP, our files

ABOUT = {
    "m": 3, "shared": False, "rank": 2, "alpha": 4, "targets": ["q_proj", "v_proj"],
    "head": "sigmoid", "base_fingerprint": "0123456789abcdef"}


def stop_tensors(seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        "tokens": (3, 8), "head.weight": (1, 8), "head.bias": (1,),
        "model.layers.0.self_attn.q_proj.lora_A.weight": (2, 8),
        "model.layers.0.self_attn.q_proj.lora_B.weight": (8, 2),
        "model.layers.0.self_attn.v_proj.lora_A.weight": (2, 8),
        "model.layers.0.self_attn.v_proj.lora_B.weight": (4, 2)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


@pytest.fixture
def saved_folder(tmp_path):
    write_stop(tmp_path / "stop", ABOUT, stop_tensors(), {"settings": {"prefix": 7}})
    return tmp_path / "stop"


def write_metadata(folder, about):
    """stop.safetensors with another description, its tensors as they were."""
    file = folder / "stop.safetensors"
    save_file(load_file(file), file, {"stop": json.dumps(about)})


def test_a_stop_is_read_as_it_was_written(saved_folder):
    saved = read_stop(saved_folder)
    about = {key: value for key, value in ABOUT.items() if key != "base_fingerprint"}
    assert saved.settings == about | {"dropout": 0.0}
    assert saved.base_fingerprint == ABOUT["base_fingerprint"]
    assert saved.trained == {"settings": {"prefix": 7}}
    assert saved.tensors.keys() == stop_tensors().keys()
    for name, tensor in stop_tensors().items():
        assert torch.equal(saved.tensors[name], tensor)
        assert saved.sources[name] == saved.file == saved_folder / "stop.safetensors"
    match(saved, {name: tensor.shape for name, tensor in stop_tensors().items()})


def test_the_files_are_laid_out_as_they_were(saved_folder):
    """Both files repeat the description: the first in its metadata, under `stop`."""
    with safe_open(saved_folder / "stop.safetensors", "pt") as opened:
        assert json.loads(opened.metadata()["stop"]) == ABOUT
    written = json.loads((saved_folder / "stop.json").read_text())
    assert {key: written[key] for key in ABOUT} == ABOUT
    assert written.keys() - ABOUT.keys() == {"digest", "trained"}


@pytest.mark.parametrize("where", (0.3, 0.6, 0.99))
def test_one_flipped_bit_is_noticed(saved_folder, where):
    """In the middle of the tensors' bytes, where nothing else would show it."""
    file = saved_folder / "stop.safetensors"
    content = bytearray(file.read_bytes())
    header = int.from_bytes(content[:8], "little") + 8
    content[header + int((len(content) - header) * where)] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match="stop.safetensors: found tensors of digest .* damaged"):
        read_stop(saved_folder)


def test_an_older_stop_has_no_digest(saved_folder):
    file = saved_folder / "stop.json"
    about = json.loads(file.read_text())
    del about["digest"]
    file.write_text(json.dumps(about))
    assert read_stop(saved_folder).settings["m"] == 3


@pytest.mark.parametrize("digest", (3, "", "0" * 64))
def test_a_digest_of_something_else(saved_folder, digest):
    edit(saved_folder / "stop.json", digest=digest)
    with pytest.raises(ValueError, match="digest"):
        read_stop(saved_folder)


WRONG = {
    "m": (0, -1, 2.0, "3", True, None), "rank": (0, 1.5, None),
    "alpha": (0, -2, "x", None, math.nan),
    "targets": ("q_proj", [1], ["q_proj", "q_proj"], 5), "head": ("relu", None, 3),
    "shared": (0, "no", None), "base_fingerprint": ("0", None, 7, "0123456789ABCDEF"),
    "dropout": (1.0, -0.1, "x")}


@pytest.mark.parametrize("key, value", [(key, value) for key in WRONG for value in WRONG[key]])
def test_a_value_that_no_stop_has(saved_folder, key, value):
    """Type and range of each, in the metadata and in stop.json alike."""
    write_metadata(saved_folder, ABOUT | {key: value})
    edit(saved_folder / "stop.json", **{key: value})
    with pytest.raises(ValueError, match=f"stop.safetensors.*{key}") as caught:
        read_stop(saved_folder)
    assert "\n" not in str(caught.value)
    write_metadata(saved_folder, ABOUT)
    with pytest.raises(ValueError, match=f"stop.json: {key}: found"):
        read_stop(saved_folder)


@pytest.mark.parametrize("key, value", (
    ("m", 5), ("rank", 5), ("alpha", 1), ("head", "softmax"), ("targets", ["q_proj"]),
    ("base_fingerprint", "f" * 16), ("shared", True)))
def test_an_edited_stop_json(saved_folder, key, value):
    edit(saved_folder / "stop.json", **{key: value})
    with pytest.raises(ValueError, match=f"stop.json: {key}: found .*as in stop.safetensors"):
        read_stop(saved_folder)


def test_files_that_disagree(tmp_path):
    """stop.json belongs to its tensors: that of another rank is refused, whichever of the two was
    exchanged."""
    write_stop(tmp_path / "a", ABOUT, stop_tensors(), {})
    write_stop(tmp_path / "b", ABOUT | {"rank": 5}, stop_tensors(), {})
    for name in ("stop.json", "stop.safetensors"):
        folder = tmp_path / name
        shutil.copytree(tmp_path / "a", folder)
        shutil.copyfile(tmp_path / "b" / name, folder / name)
        with pytest.raises(ValueError, match="stop.json: rank: found [25], expected [52]"):
            read_stop(folder)


@pytest.mark.parametrize("about", ("[1]", "{", '{"m": 3}', '"x"', ""))
def test_metadata_that_is_none(saved_folder, about):
    """Whatever stands in the metadata, the error is a ValueError that names the file."""
    file = saved_folder / "stop.safetensors"
    save_file(load_file(file), file, {"stop": about})
    with pytest.raises(ValueError, match="stop.safetensors"):
        read_stop(saved_folder)
    save_file(load_file(file), file)
    with pytest.raises(ValueError, match="stop.safetensors: its metadata describe no STOP"):
        read_stop(saved_folder)


@pytest.mark.parametrize("name", ("stop.json", "stop.safetensors"))
def test_half_a_stop(saved_folder, name):
    """A folder that lost one of its two files: one line with the file's name."""
    (saved_folder / name).unlink()
    with pytest.raises(ValueError, match=f"{name}: ") as caught:
        read_stop(saved_folder)
    assert "\n" not in str(caught.value)


def test_broken_stop_files(saved_folder):
    file = saved_folder / "stop.safetensors"
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(ValueError, match="stop.safetensors: not a whole"):
        read_stop(saved_folder)
    with pytest.raises(ValueError, match="nowhere"):
        read_stop(saved_folder / "nowhere")


@pytest.mark.parametrize("name", ("tokens", "head.bias"))
@pytest.mark.parametrize("value", (math.nan, math.inf))
def test_a_stop_that_holds_no_number(tmp_path, name, value):
    tensors = stop_tensors()
    tensors[name].view(-1)[0] = value
    write_stop(tmp_path, ABOUT, tensors, {})
    with pytest.raises(ValueError, match=f"stop.safetensors: {name}: found NaN or infinity"):
        read_stop(tmp_path)
    write_stop(tmp_path, ABOUT, tensors | {name: torch.ones(3, dtype=torch.int64)}, {})
    with pytest.raises(ValueError, match=f"stop.safetensors: {name}: found torch.int64"):
        read_stop(tmp_path)


def test_tensors_of_other_shapes(saved_folder):
    """match names file, tensor and both shapes; a tensor too many or too few is one with shape
    none."""
    saved = read_stop(saved_folder)
    shapes = {name: tuple(tensor.shape) for name, tensor in saved.tensors.items()}
    for changed, message in (
            (shapes | {"head.bias": (2,)}, r"head.bias: found shape \[1\], expected \[2\]"),
            (shapes | {"extra": (2,)}, r"extra: found shape none, expected \[2\]"),
            ({name: shape for name, shape in shapes.items() if name != "tokens"},
             r"tokens: found shape \[3, 8\], expected none")):
        with pytest.raises(ValueError, match="stop.safetensors: " + message):
            match(saved, changed)


@pytest.mark.parametrize("name", ("open", "fsync", "replace"))
def test_a_disk_that_fills_up_anywhere(saved_folder, tmp_path, monkeypatch, name):
    """At the first file, whichever call fails: the old checkpoint whole, no litter; a new one
    leaves none."""
    before = {file.name: file.read_bytes() for file in saved_folder.iterdir()}

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    target = "builtins.open" if name == "open" else f"plumbing.records.os.{name}"
    monkeypatch.setattr(target, full)
    for folder in (saved_folder, tmp_path / "new"):
        with pytest.raises(OSError):
            write_stop(folder, ABOUT, stop_tensors(seed=9), {})
    monkeypatch.undo()
    assert {file.name: file.read_bytes() for file in saved_folder.iterdir()} == before
    assert not list((tmp_path / "new").iterdir())


# ------------------------------------------------------------------- STOP, the authors' release

SCORERS = sorted(folder.name for folder in (GOLDEN / "scorers").iterdir())
ADAPTER = "adapter/classifier/adapter_config.json"


@pytest.fixture
def released(tmp_path):
    """A copy of an authors' folder."""
    folder = GOLDEN / "scorers" / SCORERS[0] / "checkpoint"
    shutil.copytree(folder, tmp_path / "it", copy_function=shutil.copyfile)
    return tmp_path / "it"


@pytest.mark.parametrize("name", SCORERS)
def test_a_release_is_read(name):
    """Its tensors are those of its files, under our names."""
    folder = GOLDEN / "scorers" / name / "checkpoint"
    config = json.loads((folder / ADAPTER).read_text())
    saved = read_stop(folder)
    assert saved.settings["rank"] == config["r"]
    assert saved.settings["alpha"] == config["lora_alpha"]
    assert set(saved.settings["targets"]) == set(config["target_modules"])
    assert (saved.settings["head"], saved.settings["shared"]) == ("softmax", True)
    assert saved.base_fingerprint is None
    stored = torch.load(folder / "assess_token_embedding.pth", weights_only=True)
    assert torch.equal(saved.tensors["tokens"][0], stored["input_embedding"])
    pairs = [key for key in saved.tensors if key.startswith("model.layers.")]
    assert len(pairs) == len(saved.tensors) - 3
    assert all(key.endswith((".lora_A.weight", ".lora_B.weight")) for key in pairs)


@pytest.mark.parametrize("key, value", (
    ("use_rslora", True), ("use_dora", True), ("rank_pattern", {"q_proj": 2}),
    ("alpha_pattern", {"q_proj": 2}), ("modules_to_save", ["lm_head"]), ("bias", "all"),
    ("lora_bias", True), ("fan_in_fan_out", True), ("layer_replication", [[0, 2]]),
    ("target_parameters", ["mlp.experts.down_proj"]), ("use_qalora", True)))
def test_a_peft_setting_that_would_change_scores(released, key, value):
    """Ignored, each of them would give other scores than the release without a word."""
    edit(released / ADAPTER, **{key: value})
    with pytest.raises(ValueError, match=f"adapter_config.json: {key}: found"):
        read_stop(released)


@pytest.mark.parametrize("init", (
    "pissa", "pissa_niter_4", "olora", "OLoRA", "corda", "loftq", "lora_ga", "unheard of", 3, {}))
def test_a_peft_init_that_changes_the_base_weights(released, init):
    """Its adapter is one for what is left of them."""
    edit(released / ADAPTER, init_lora_weights=init)
    with pytest.raises(ValueError, match="adapter_config.json: init_lora_weights: found"):
        read_stop(released)


@pytest.mark.parametrize("init", (
    True, False, None, "gaussian", "Gaussian", "eva", "orthogonal", "mica"))
def test_a_peft_init_that_leaves_the_base_weights(released, init):
    before = read_stop(released)
    edit(released / ADAPTER, init_lora_weights=init)
    assert read_stop(released).settings == before.settings


def test_peft_changes_the_base_weights_just_under_the_inits_that_are_refused():
    """The library itself begins a training of each kind that needs no data."""
    peft = pytest.importorskip("peft")

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.q_proj = torch.nn.Linear(8, 8, bias=False)

    for init in (True, False, "gaussian", "orthogonal", "mica", "eva", "pissa", "pissa_niter_2",
                 "olora"):
        base = Model()
        weight = base.q_proj.weight.detach().clone()
        try:
            config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=init)
            adapted = peft.get_peft_model(base, config)
        except ValueError:  # not known to this version
            continue
        found = adapted.base_model.model.q_proj.base_layer.weight
        assert torch.equal(found, weight) == (init in PEFT_INITS), init


@pytest.mark.parametrize("key, value", (
    ("peft_type", "LOHA"), ("alora_invocation_tokens", [1, 2]), ("layers_to_transform", [0]),
    ("layers_pattern", "layers"), ("exclude_modules", ["o_proj"]), ("kasa_config", {"beta": 1}),
    ("trainable_token_indices", [5]), ("use_bdlora", {"a": 1}), ("arrow_config", {"k": 3}),
    ("megatron_config", {"a": 1}), ("a key of next year", 1), ("target_modules", ["o_proj"])))
def test_a_peft_setting_that_is_not_known_to_be_inert(released, key, value):
    edit(released / ADAPTER, **{key: value})
    with pytest.raises(ValueError, match=f"adapter_config.json: {key}: found"):
        read_stop(released)


def test_what_peft_itself_writes_is_read(released):
    """Every key of an adapter_config.json of the installed version, at its default."""
    peft = pytest.importorskip("peft")
    config = json.loads((released / ADAPTER).read_text())
    lora = peft.LoraConfig(
        r=config["r"], lora_alpha=config["lora_alpha"], target_modules=config["target_modules"])
    lora.save_pretrained(released / ADAPTER.rpartition("/")[0])
    assert set(read_stop(released).settings["targets"]) == set(config["target_modules"])


@pytest.mark.parametrize("targets", ("all-linear", "q_proj|k_proj|v_proj|o_proj"))
def test_a_pattern_of_targets_is_left_to_the_tensors(released, targets):
    before = read_stop(released)
    edit(released / ADAPTER, target_modules=targets)
    assert read_stop(released).settings == before.settings


def test_released_dropout_is_kept_for_more_training(released):
    edit(released / ADAPTER, lora_dropout=0.5)
    assert read_stop(released).settings["dropout"] == 0.5


def without_alpha(file):
    config = json.loads(file.read_text())
    del config["lora_alpha"]
    file.write_text(json.dumps(config))


HEAD = "classifier_head.pth"
TOKEN = "assess_token_embedding.pth"
COUNT = "assess_token_config.json"
NANS = torch.full((2, 64), math.nan)
BROKEN = {  # what is done to which file
    "an empty head": (HEAD, lambda file: file.write_bytes(b"")),
    "half a head": (HEAD, lambda file: file.write_bytes(file.read_bytes()[:1000])),
    "a head without bias": (HEAD, lambda file: torch.save({"weight": torch.zeros(2, 64)}, file)),
    "a head that is a list": (HEAD, lambda file: torch.save([1], file)),
    "a head that is code": (HEAD, lambda file: torch.save(print, file)),
    "a head of NaN": (
        HEAD, lambda file: torch.save({"weight": NANS, "bias": torch.zeros(2)}, file)),
    "no head": (HEAD, lambda file: file.unlink()),
    "a token that is text": (TOKEN, lambda file: torch.save({"input_embedding": "x"}, file)),
    "a token that is ragged": (
        TOKEN, lambda file: torch.save({"input_embedding": [[1], [2, 3]]}, file)),
    "no token": (TOKEN, lambda file: file.unlink()),
    "no number of tokens": (COUNT, lambda file: edit(file, num_assess_tokens=None)),
    "a number of tokens that is text": (COUNT, lambda file: edit(file, num_assess_tokens="4")),
    "no token's config": (COUNT, lambda file: file.unlink()),
    "no rank": (ADAPTER, lambda file: edit(file, r=None)),
    "a rank of zero": (ADAPTER, lambda file: edit(file, r=0)),
    "no alpha": (ADAPTER, without_alpha),
    "a dropout that is text": (ADAPTER, lambda file: edit(file, lora_dropout="x")),
    "a config that is a list": (ADAPTER, lambda file: file.write_text("[]")),
    "no config": (ADAPTER, lambda file: file.unlink())}


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_release(released, what):
    """On the command line only ValueError and OSError are one line and exit status 2. The line
    names the file."""
    name, harm = BROKEN[what]
    harm(released / name)
    with pytest.raises(ValueError) as caught:
        read_stop(released)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("suffix", (".bin", ".safetensors"))
def test_a_release_without_weights(released, suffix):
    file = next((released / "adapter" / "classifier").glob("adapter_model.*"))
    if suffix == file.suffix:
        file.write_bytes(b"junk")
    else:
        file.unlink()
    with pytest.raises(ValueError, match="adapter_model") as caught:
        read_stop(released)
    assert "\n" not in str(caught.value)


def test_a_released_tensor_is_matched_with_its_own_file(released):
    saved = read_stop(released)
    shapes = {name: tuple(tensor.shape) for name, tensor in saved.tensors.items()}
    for name, file in (("tokens", TOKEN), ("head.bias", HEAD)):
        with pytest.raises(ValueError, match=f"{file}: {name}: found shape"):
            match(saved, shapes | {name: (99,)})


def test_want_of_memory_is_not_a_broken_file(tmp_path, monkeypatch):
    folder = write_checkpoint(tmp_path / "it", raw_config("qwen2"))

    def refuse(*arguments, **settings):
        raise OSError("Cannot allocate memory (os error 12)")

    monkeypatch.setattr(checkpoint, "safe_open", refuse)
    monkeypatch.setattr(checkpoint, "load_file", refuse)
    with pytest.raises(MemoryError):
        read(folder)
    with pytest.raises(MemoryError):
        read_tensors(folder / "model.safetensors")
