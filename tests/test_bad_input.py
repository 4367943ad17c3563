"""What a user can get wrong: each is one ValueError that names the file, the tensor or the key; on the command line, exit 2."""
import json
import math
import os
import re
import subprocess
import sys

import huggingface_hub
import pytest
import torch
from helpers import KINDS, ROOT, random_ids, random_model, raw_config, write_checkpoint, write_tokenizer

from lora import LoRA
from model import Config, load
from sample import Settings, Tokenizer, command_line, generate, main

# --------------------------------------------------------------------------------------------------- the directory


def edit(folder, name="config.json", **changes):
    raw = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps(raw | changes))


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
    "config.json is not JSON": (lambda f: (f / "config.json").write_text("{'model_type': qwen2}"), r"config\.json.*JSON"),
    "config.json is cut": (lambda f: cut(f / "config.json"), r"config\.json.*JSON"),
    "config.json is not text": (lambda f: (f / "config.json").write_bytes(b"\xff\xfe\x00"), r"config\.json.*JSON"),
    "config.json is a list": (lambda f: (f / "config.json").write_text("[1]"), r"config\.json.*list.*object"),
    "config.json is too deep": (lambda f: (f / "config.json").write_text("[" * 100000), r"config\.json.*JSON"),
    "generation_config.json is not JSON": (lambda f: (f / "generation_config.json").write_text("{"),
                                           r"generation_config\.json.*JSON"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), r"model\.safetensors"),
    "weights cut in the data": (lambda f: cut(f / "model.safetensors"), r"model\.safetensors.*not a whole safetensors"),
    "weights cut in the header": (lambda f: cut(f / "model.safetensors", 0.001), r"model\.safetensors.*not a whole"),
    "empty weights": (lambda f: cut(f / "model.safetensors", 0), r"model\.safetensors.*not a whole"),
    "weights are something else": (lambda f: (f / "model.safetensors").write_bytes(b"PK\x03\x04" * 99), r"model\.safetensors"),
}
SHARDED = {
    "a shard is missing": (lambda f: next(f.glob("*-00002-*")).unlink(), "00002-of-00003.safetensors"),
    "a shard is cut": (lambda f: cut(next(f.glob("*-00002-*"))), "00002-of-00003.safetensors.*not a whole"),
    "a shard outside": (lambda f: change_shard(f, "../elsewhere.safetensors"), "elsewhere.*outside"),
    "an absolute shard": (lambda f: change_shard(f, "/etc/model.safetensors"), "/etc.*outside"),
    "a shard that is the parent": (lambda f: change_shard(f, ".."), "outside"),
    "a shard that is a number": (lambda f: change_shard(f, 3), r"index\.json.*weight_map"),
    "no weight_map": (lambda f: (f / "model.safetensors.index.json").write_text("{}"), r"index\.json.*weight_map"),
    "the index is not JSON": (lambda f: cut(f / "model.safetensors.index.json"), r"index\.json.*JSON"),
}


@pytest.mark.parametrize("what", list(SINGLE) + list(SHARDED))
def test_a_broken_directory(tmp_path, what):
    harm, message = {**SINGLE, **SHARDED}[what]
    folder = write_checkpoint(tmp_path / "it", raw_config("qwen2"), shards=1 if what in SINGLE else 3)
    (tmp_path / "elsewhere.safetensors").write_bytes(b"")
    assert load(folder)
    harm(folder)
    with pytest.raises(ValueError, match=message) as caught:
        load(folder)
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)


@pytest.mark.parametrize("where", ("none", "./none", "/none/at/all", "../none/../x", "a b/c", "hub-id"))
def test_no_such_directory(where):
    with pytest.raises(ValueError, match="no such directory"):
        load(where)


def test_what_the_hub_does_not_give(monkeypatch):
    """A Hub id that fails is the user's mistake or the network's: one line, not the library's traceback."""
    def fail(*_, **__):
        raise huggingface_hub.errors.LocalEntryNotFoundError("Cannot find it.\nMore lines.\n")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(ValueError, match="owner/name.*Cannot find it") as caught:
        load("owner/name")
    assert "\n" not in str(caught.value)


# ----------------------------------------------------------------------------------------------------- the tensors

NORM, Q = "model.layers.1.input_layernorm.weight", "model.layers.0.self_attn.q_proj.weight"


def without(tensors, name):
    del tensors[name]


def put(tensors, name, tensor):
    tensors[name] = tensor


TENSORS = {
    "one missing": (lambda t: without(t, NORM), rf"missing tensor {NORM}.*\[32\]"),
    "lm_head missing, not tied": (lambda t: without(t, "lm_head.weight"), r"missing tensor lm_head.weight.*\[61, 32\]"),
    "one too many": (lambda t: put(t, "model.layers.0.self_attn.q_proj.extra", torch.zeros(2)), "unexpected.*q_proj.extra"),
    "a layer too many": (lambda t: put(t, NORM.replace("1", "3"), t[NORM].clone()), "unexpected.*layers.3"),
    "a wrong shape": (lambda t: put(t, Q, torch.zeros(32, 16)), rf"{Q}.*\[32, 16\].*\[32, 32\]"),
    "a dimension more": (lambda t: put(t, NORM, torch.zeros(1, 32)), rf"{NORM}.*\[1, 32\].*\[32\]"),
    "integers": (lambda t: put(t, Q, torch.zeros(32, 32, dtype=torch.int64)), f"{Q}.*I64.*F32"),
    "bytes": (lambda t: put(t, Q, torch.zeros(32, 32, dtype=torch.uint8)), f"{Q}.*U8.*F32"),
}


@pytest.mark.parametrize("shards", (1, 3))
@pytest.mark.parametrize("what", TENSORS)
def test_wrong_tensors(tmp_path, what, shards):
    """The message names the tensor, its file (where it has one), what was found and what was expected."""
    harm, message = TENSORS[what]
    raw = raw_config("qwen2")
    tensors = random_model("qwen2", **raw).state_dict()
    harm(tensors)
    with pytest.raises(ValueError, match=message) as caught:
        load(write_checkpoint(tmp_path / "it", raw, tensors, shards))
    assert str(tmp_path / "it") in str(caught.value) and ("missing" in what or ".safetensors" in str(caught.value))


def test_a_config_that_does_not_fit_the_tensors(tmp_path):
    """The other way round: the tensors are whole, the config says something else."""
    folder = write_checkpoint(tmp_path / "it", raw_config("qwen2"))
    for changes, message in (({"num_hidden_layers": 2}, "unexpected tensor model.layers.2"), ({"vocab_size": 62}, r"\[61, 32\].*\[62, 32\]"),
                             ({"model_type": "qwen3", "head_dim": 8}, "q_norm|k_norm|bias"), ({"intermediate_size": 50}, r"\b50\b")):
        edit(folder, **{**raw_config("qwen2"), **changes})
        with pytest.raises(ValueError, match=message):
            load(folder)


@pytest.mark.parametrize("what", ("missing", "shape", "dtype"))
def test_wrong_mxfp4_tensors(tmp_path, what):
    raw = raw_config("gpt_oss", intermediate_size=32, num_hidden_layers=1)
    tensors = random_model("gpt_oss", **raw).state_dict()
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        E, inner, out = tensors.pop(name).shape
        tensors[name + "_blocks"] = torch.zeros(E, out, inner // 32, 16, dtype=torch.uint8)
        tensors[name + "_scales"] = torch.full((E, out, inner // 32), 127, dtype=torch.uint8)
    raw["quantization_config"] = {"quant_method": "mxfp4"}
    assert load(write_checkpoint(tmp_path / "good", raw, tensors))
    scales = "model.layers.0.mlp.experts.down_proj_scales"
    if what == "missing":
        del tensors[scales]
    else:
        tensors[scales] = tensors[scales][:, :5] if what == "shape" else tensors[scales].float()
    with pytest.raises(ValueError, match=scales):
        load(write_checkpoint(tmp_path / "it", raw, tensors))


# ------------------------------------------------------------------------------------------------------ the config

YARN = {"rope_type": "yarn", "factor": 4.0}
CONFIGS = [  # architecture, changes, the key that the message must name
    ("qwen2", {"model_type": "llama"}, "model_type.*llama.*qwen2"), ("qwen2", {"model_type": None}, "model_type"),
    ("qwen2", {"use_sliding_window": True}, "use_sliding_window"), ("qwen3", {"use_sliding_window": True}, "use_sliding_window"),
    ("qwen2", {"layer_types": ["sliding_attention"] * 3, "sliding_window": 4}, "layer_types"),
    ("qwen2", {"layer_types": ["full_attention"] * 2}, "layer_types"), ("gpt_oss", {"layer_types": ["chunked"] * 4}, "layer_types"),
    ("qwen2", {"hidden_act": "gelu"}, "hidden_act.*gelu.*silu"), ("gpt_oss", {"hidden_act": "relu"}, "hidden_act"),
    ("qwen2", {"attention_bias": False}, "attention_bias"), ("qwen3", {"attention_bias": True}, "attention_bias"),
    ("qwen2", {"quantization_config": {"quant_method": "mxfp4"}}, "quantization_config"),
    ("gpt_oss", {"quantization_config": {"quant_method": "awq"}}, "quantization_config.*awq"),
    ("qwen3", {"quantization_config": {"bits": 4}}, "quantization_config"),
    ("qwen2", {"logit_softcap": 30.0}, "logit_softcap"), ("qwen2", {"num_local_experts": 4}, "num_local_experts"),
    ("qwen2", {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "rope_type.*linear.*yarn"),
    ("qwen2", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type.*dynamic"),
    ("qwen2", {"rope_scaling": {"rope_type": "llama3"}}, "rope_type.*llama3"),
    ("qwen2", {"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}}, "rope_type.*longrope"),
    ("qwen2", {"rope_scaling": {"rope_type": "yarn"}}, "factor"), ("qwen2", {"rope_scaling": YARN | {"mscale": 0.7}}, "mscale"),
    ("qwen2", {"rope_scaling": YARN | {"factor": 0}}, "factor"), ("qwen2", {"rope_scaling": YARN | {"factor": "4"}}, "factor"),
    ("qwen2", {"rope_theta": None}, "rope_theta"), ("qwen2", {"rope_theta": -1.0}, "rope_theta"),
    ("qwen2", {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ("qwen2", {"num_key_value_heads": 3}, "num_key_value_heads.*3"), ("qwen3", {"head_dim": 7}, "head_dim.*7.*even"),
    ("qwen3", {"head_dim": None}, "head_dim"), ("gpt_oss", {"sliding_window": None}, "sliding_window"),
    ("gpt_oss", {"experts_per_token": 3}, "experts_per_token"), ("gpt_oss", {"num_experts_per_tok": 6}, "num_experts_per_tok"),
    ("qwen2", {"eos_token_id": "end"}, "eos_token_id"), ("qwen2", {"tie_word_embeddings": "no"}, "tie_word_embeddings"),
] + [("qwen2", {key: value}, key) for key in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads",
                                              "intermediate_size", "max_position_embeddings")
     for value in (0, -4, 3.5, "64", True, None)] + [("qwen2", {"rms_norm_eps": value}, "rms_norm_eps") for value in (0, "x", None)]


@pytest.mark.parametrize("kind, changes, message", CONFIGS, ids=lambda value: str(value)[:60])
def test_a_config_that_is_not_built_here(tmp_path, kind, changes, message):
    """Refused by the key's name, never ignored: the wrong arithmetic would be silent."""
    folder = write_checkpoint(tmp_path / "it", raw_config(kind))
    edit(folder, **changes)
    with pytest.raises(ValueError, match=message) as caught:
        load(folder)
    assert "config.json" in str(caught.value)


@pytest.mark.parametrize("kind", KINDS)
def test_any_wrong_type_is_a_value_error(tmp_path, kind):
    """Every key with every kind of JSON value: refused, or taken as far as the absent weights; never a TypeError."""
    raw = raw_config(kind, layer_types=["full_attention"] * raw_config(kind)["num_hidden_layers"], quantization_config=None)
    raw |= {"rope_parameters": raw.get("rope_scaling"), "use_sliding_window": False, "torch_dtype": "float32"}
    escaped = []
    for key in raw:
        for value in (None, True, 0, 2.5, "x", ["x"], [[]], {"x": 1}, {"rope_type": []}, math.nan):
            (tmp_path / "config.json").write_text(json.dumps(raw | {key: value}))
            try:
                with pytest.raises(ValueError):
                    load(tmp_path)
            except Exception as error:
                escaped.append(f"{key} = {value!r}: {type(error).__name__}: {error}")
    assert not escaped, "\n".join(escaped)


def test_mxfp4_needs_blocks_of_32():
    """48 inputs do not fill blocks of 32: refused before any tensor is read."""
    raw = raw_config("gpt_oss", intermediate_size=48, quantization_config={"quant_method": "mxfp4"})
    with pytest.raises(ValueError, match="intermediate_size.*48.*32"):
        Config.from_dict(raw)


def test_what_changes_nothing_is_accepted():
    """Keys of real checkpoints that are inert, and null for anything unknown."""
    inert = {"architectures": ["X"], "torch_dtype": "bfloat16", "transformers_version": "4.43", "use_cache": True, "unknown": None,
             "sliding_window": 4096, "use_sliding_window": False, "max_window_layers": 21, "attention_dropout": 0.0,
             "initializer_range": 0.02, "bos_token_id": 1, "pad_token_id": None, "rope_scaling": None}
    assert Config.from_dict(raw_config("qwen2") | inert) == Config.from_dict(raw_config("qwen2"))


# ---------------------------------------------------------------------------------------------------- the sampler


@pytest.fixture(scope="module")
def model():
    return random_model("qwen2", max_position_embeddings=40)


LONG = random_ids(36).tolist()
CALLS = {
    "n of 0": ({"n": 0}, "n.*0"), "n below 0": ({"n": -1}, "n.*-1"), "no new tokens": ({"max_new_tokens": 0}, "max_new_tokens.*0"),
    "batch of 0": ({"batch": 0}, "batch.*0"), "batch below 0": ({"batch": -2}, "batch.*-2"),
    "temperature below 0": ({"temperature": -0.1}, "temperature.*-0.1"), "temperature nan": ({"temperature": math.nan}, "temperature.*nan"),
    "temperature inf": ({"temperature": math.inf}, "temperature.*inf"),
    "top-p of 0": ({"top_p": 0.0}, "top-p.*0.0"), "top-p above 1": ({"top_p": 1.01}, "top-p.*1.01"),
    "top-p nan": ({"top_p": math.nan}, "top-p.*nan"), "top-k below 0": ({"top_k": -1}, "top-k.*-1"),
    "token id too large": ({"prompts": [[1], [2, 61]]}, "prompt 1.*61.*vocabulary of 61"),
    "token id below 0": ({"prompts": [[1, -1]]}, "prompt 0.*-1.*vocabulary"),
    "empty prompt": ({"prompts": [[1], []]}, "prompt 1.*no token"),
    "prompt beyond the context": ({"prompts": [LONG + LONG]}, "prompt 0.*72.*context of 40"),
    "no room for new tokens": ({"prompts": [[1], LONG]}, "prompt 1.*36.*5.*context of 40"),
}


@pytest.mark.parametrize("what", CALLS)
def test_a_wrong_call_of_generate(model, what):
    changes, message = CALLS[what]
    good = {"prompts": [[1, 2]], "n": 2, "max_new_tokens": 5, "temperature": 1.0, "top_k": 5, "top_p": 0.9}
    assert generate(model, **good)
    with pytest.raises(ValueError, match=message):
        generate(model, **good | changes)


def test_the_context_may_be_filled_to_the_end(model):
    (path,), = generate(model, [LONG[:35]], max_new_tokens=5)
    assert len(path.ids) == 5


def test_a_lora_target_that_is_not_there(model):
    with pytest.raises(ValueError, match="router.*q_proj"):
        LoRA(model, 4, 8, ("q_proj", "router"))


def test_no_tokenizer(tmp_path):
    folder = write_checkpoint(tmp_path / "it", raw_config("qwen2"))
    with pytest.raises(ValueError, match=r"tokenizer\.json.*missing"):
        Tokenizer(folder)
    for content in ("{", "[]", '{"model": 3}', ""):
        (folder / "tokenizer.json").write_text(content)
        with pytest.raises(ValueError, match=r"tokenizer\.json.*not a tokenizer"):
            Tokenizer(folder)
    with pytest.raises(ValueError, match="no such directory"):
        Tokenizer(tmp_path / "none")


# ------------------------------------------------------------------------------------------------ the command line

FLAGS = {  # what is wrong -> (arguments behind good ones, what the error line must say)
    "no such directory": (["--model", "none"], "none.*no such directory"),
    "unknown flag": (["--temprature", "1"], "temprature"),
    "unknown architecture": (["--model", "BAD"], "config.json.*model_type.*llama"),
    "beyond the context": (["--prompt", "x" * 600], "600.*context of 512"),
    "empty prompt": (["--prompt", ""], "no token"),
    "n of 0": (["--n", "0"], "n: found 0"),
    "n below 0": (["--n", "-3"], "n: found -3"),
    "no new tokens": (["--max-new-tokens", "0"], "max.new.tokens.*0"),
    "batch of 0": (["--batch", "0"], "batch.*0"),
    "temperature below 0": (["--temperature", "-1"], "temperature.*-1"),
    "top-p of 0": (["--top-p", "0"], "top-p.*0"),
    "top-k below 0": (["--top-k", "-1"], "top-k.*-1"),
    "a word for a number": (["--n", "two"], "--n.*two"),
    "a missing value": (["--n"], "--n"),
    "an abbreviation": (["--max-new", "3"], "--max-new"),
    "an argument too many": (["extra"], "extra"),
    "unknown dtype": (["--dtype", "int8"], "dtype.*int8"),
    "unknown device": (["--device", "abacus"], "abacus"),
    "unknown format": (["--chat-format", "llama"], "chat format.*llama"),
}


@pytest.fixture(scope="module")
def arguments(tmp_path_factory):
    """A function: the words of a command line behind good ones."""
    folder = tmp_path_factory.mktemp("cli")
    for name in ("good", "bad"):
        write_tokenizer(write_checkpoint(folder / name, raw_config("qwen2", vocab_size=256)))
    edit(folder / "bad", model_type="llama")
    good = ["--model", str(folder / "good"), "--prompt", "hi", "--max-new-tokens", "4", "--n", "2"]
    return lambda words=(): good + [str(folder / "bad") if word == "BAD" else word for word in words]


@pytest.mark.parametrize("what", FLAGS)
def test_the_command_line(arguments, capsys, monkeypatch, what):
    """Exit status 2 and one `error:` line that says what is wrong; the script's entry, in this process."""
    words, message = FLAGS[what]
    monkeypatch.setattr(sys, "argv", ["sample.py", *arguments(words)])
    with pytest.raises(SystemExit) as caught:
        command_line(Settings, main)
    lines = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert caught.value.code == 2 and len(lines) == 1 and re.search(message, lines[0]), lines


@pytest.fixture(scope="module")
def started(arguments):
    """(stdout, stderr, exit status) of two wrong and one good command line, really run, all at once."""
    one = {"cwd": ROOT, "text": True, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE,
           "env": os.environ | {"OMP_NUM_THREADS": "1"}}
    lines = {"good": (), "no such directory": ["--model", "none"], "unknown flag": ["--temprature", "1"]}
    runs = {what: subprocess.Popen([sys.executable, "sample.py", *arguments(words)], **one) for what, words in lines.items()}
    return {what: (*run.communicate(timeout=200), run.returncode) for what, run in runs.items()}


@pytest.mark.parametrize("what", ("no such directory", "unknown flag"))
def test_the_script_fails_in_one_line(started, what):
    _, errors, status = started[what]
    lines = [line for line in errors.splitlines() if "error:" in line]
    assert status == 2 and len(lines) == 1 and re.search(FLAGS[what][1], lines[0]) and "Traceback" not in errors


def test_the_script_runs(started):
    """The same arguments without the mistake: both paths are shown, and the last line is the JSON that counts them."""
    out, errors, status = started["good"]
    assert status == 0 and "error" not in errors
    last = json.loads(out.splitlines()[-1])
    assert 0 < last["tokens"] <= 8 and last["peak_memory_bytes"] > 0 and last["seconds"] > 0 and last["tok_per_s"] > 0
    assert out.count("--- path ") == 2
