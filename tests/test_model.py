"""The decoder: the golden data, transformers where it is installed, the adapter's silence, and what a config means."""
import copy
import json
import math

import pytest
import torch
from helpers import GOLDEN, KINDS, NAMES, close, fill, golden, random_ids, random_model, raw_config, write_checkpoint
from safetensors import safe_open
from safetensors.torch import save_file

import model as rooms
from lora import LoRA
from model import Config, Decoder, dequantize_mxfp4, load, rope_frequencies
from sample import generate


@pytest.fixture(scope="module", params=NAMES)
def case(request):
    """(name, the loaded model, expected tensors, expected json)."""
    return request.param, load(GOLDEN / "checkpoints" / request.param), *golden(request.param)


# ------------------------------------------------------------------------------------------------------ the golden data


def test_golden_hidden_states_and_logits(case):
    """Every structural mistake moves these logits by more than 1; an epsilon off by 10 by more than 1e-3."""
    _, model, tensors, info = case
    compared = 0
    for r, row in enumerate(info["rows"]):
        hidden = model(torch.tensor([row["input_ids"]]))[0]
        for key, found in ((f"hidden.row{r}", hidden), (f"logits.row{r}", model.logits(hidden))):
            if key in tensors:
                close(found, tensors[key])
                compared += 1
    assert compared


def test_golden_logits_from_the_cache(case):
    """In the split that was recorded (half at once, then one at a time), and on the ragged batch of all rows."""
    _, model, tensors, info = case
    for r, row in enumerate(info["rows"]):
        ids = torch.tensor([row["input_ids"]])
        cache, start = model.new_cache(1, ids.shape[1]), row["prefill"]
        parts = [model(ids[:, :start], cache=cache)]
        parts += [model(ids[:, t:t + 1], cache=cache) for t in range(start, ids.shape[1])]
        logits = model.logits(torch.cat(parts, 1))[0]
        close(logits, model.logits(model(ids))[0])
        for key in (f"incremental.logits.row{r}", f"logits.row{r}"):
            if key in tensors:
                close(logits, tensors[key])


def test_golden_long_row(case):
    """300 tokens, many windows long, in one pass and in pieces of 64."""
    _, model, tensors, _ = case
    ids = tensors["long.input_ids"][None]
    cache = model.new_cache(1, 300)
    pieces = torch.cat([model(piece, cache=cache) for piece in ids.split(64, 1)], 1)
    for hidden in (model(ids), pieces):
        close(hidden[0, -4:], tensors["long.hidden_last4"])
        close(model.logits(hidden[0, -4:]), tensors["long.logits_last4"])


def test_golden_greedy(case):
    """24 tokens, exact, the three rows in one ragged batch: with end tokens ignored, the checkpoint's own, and given ones."""
    _, model, _, info = case
    prompts = [row["input_ids"] for row in info["rows"]]
    greedy = {"max_new_tokens": 24, "temperature": 0.0}
    ignored = generate(model, prompts, eos_ids=[], **greedy)
    assert [path.ids for (path,) in ignored] == [row["greedy"] for row in info["rows"]]
    own = generate(model, prompts, **greedy)
    assert [path.ids for (path,) in own] == info["greedy_with_generation_config_eos"]
    known = info["greedy_eos"]
    given = generate(model, [prompts[known["row"]]], eos_ids=known["eos_token_id"], **greedy)
    assert given[0][0].ids == known["tokens"] and given[0][0].status == "eos"


def test_golden_generation_config(case):
    """generation_config.json's end tokens are the model's, whatever config.json says."""
    _, model, _, info = case
    eos = info["generation_config_eos_token_id"]
    assert model.config.eos_ids == tuple(eos if isinstance(eos, list) else [eos])


def test_golden_routing(case):
    """The experts chosen, exact, and their weights: catches softmax before top-k, and a router without its bias."""
    _, model, tensors, info = case
    if "debug.router.indices.row0" not in tensors:
        pytest.skip("no experts")
    seen = []
    for layer in model.model.layers:
        layer.mlp.experts.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[1:3]))
    model(torch.tensor([info["rows"][0]["input_ids"]]))
    for layer, (weights, chosen) in enumerate(seen):
        expected, indices = tensors["debug.router.weights.row0"][layer], tensors["debug.router.indices.row0"][layer]
        order, expected_order = chosen.argsort(-1), indices.argsort(-1)
        assert torch.equal(chosen.gather(-1, order), indices.gather(-1, expected_order))
        close(weights.gather(-1, order), expected.gather(-1, expected_order), 1e-5)
        layer_ = model.model.layers[layer].mlp.experts
        layer_._forward_pre_hooks.clear()
    assert len(seen) == len(model.model.layers)


def test_golden_rope(case):
    _, model, tensors, info = case
    frequencies, scale = rope_frequencies(model.config)
    torch.testing.assert_close(frequencies, tensors["debug.rope.inv_freq"], rtol=1e-6, atol=0)
    assert scale == pytest.approx(info["rope_attention_scaling"], abs=1e-7)


def test_both_spellings_of_a_config(case):
    """transformers 4 (rope_theta, rope_scaling, torch_dtype) and 5 (rope_parameters, dtype): the same Config."""
    folder = GOLDEN / "checkpoints" / case[0]
    four, five = (json.loads((folder / f"config{name}.json").read_text()) for name in ("", ".transformers5"))
    assert "rope_parameters" in five and "rope_parameters" not in four
    assert Config.from_dict(four) == Config.from_dict(five)


# ------------------------------------------------------------------------------------------------------------ MXFP4


def unpack_slowly(blocks, scales):
    """MXFP4 by the letter, one nibble at a time: (E, out, groups, 16), (E, out, groups) -> (E, groups * 32, out)."""
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
    with safe_open(GOLDEN / "mxfp4_unit.safetensors", "pt") as file:
        blocks, scales, dequant = (file.get_tensor(name) for name in ("blocks", "scales", "dequant"))
    found = dequantize_mxfp4(blocks, scales)
    assert found.dtype == torch.bfloat16 and torch.equal(found, dequant)
    assert torch.equal(found.float(), unpack_slowly(blocks, scales))


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_an_mxfp4_checkpoint(tmp_path, dtype):
    """Blocks and scales in different shards, against the dense checkpoint that a slow loop unpacks; bit-equal."""
    raw = raw_config("gpt_oss", intermediate_size=64, hidden_size=32, num_hidden_layers=2, num_local_experts=3)
    dense = {name: tensor.to(torch.bfloat16) for name, tensor in random_model("gpt_oss", **raw).state_dict().items()}
    packed, generator = dict(dense), torch.Generator().manual_seed(0)
    for name in [name for name in dense if name.endswith(("gate_up_proj", "down_proj"))]:
        E, inner, out = packed.pop(name).shape
        blocks = torch.randint(256, (E, out, inner // 32, 16), generator=generator, dtype=torch.uint8)
        scales = torch.randint(122, 126, (E, out, inner // 32), generator=generator, dtype=torch.uint8)
        packed[name + "_blocks"], packed[name + "_scales"] = blocks, scales
        dense[name] = unpack_slowly(blocks, scales)
    small = write_checkpoint(tmp_path / "mxfp4", raw | {"quantization_config": {"quant_method": "mxfp4"}}, packed, shards=2)
    listed = json.loads((small / "model.safetensors.index.json").read_text())["weight_map"]
    assert any(listed[name] != listed[name.replace("_blocks", "_scales")] for name in listed if name.endswith("_blocks"))
    large = load(write_checkpoint(tmp_path / "dense", raw, dense), dtype=dtype)
    small = load(small, dtype=dtype)
    for name, tensor in large.state_dict().items():
        assert torch.equal(tensor, small.state_dict()[name]), name
    ids = random_ids(2, 20)
    assert torch.equal(large(ids), small(ids)) and small(ids).dtype == dtype


# ------------------------------------------------------------------------------------------------- the adapter is silent

TARGETS = {"qwen2": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
           "qwen3": ("q_proj", "v_proj", "down_proj"), "gpt_oss": ("q_proj", "k_proj", "v_proj", "o_proj")}


def random_adapter(model, b=1.0):
    adapter = LoRA(model, rank=3, alpha=5, targets=TARGETS[model.config.model_type], seed=1)
    with torch.no_grad():
        for name, parameter in adapter.named_parameters():
            if name.endswith("lora_B.weight"):
                parameter.copy_(b * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))))
    return adapter.requires_grad_(False)


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_changes_nothing_where_it_is_off(kind):
    """Invariant 2, the decoder's half: bit-equal once attached, under an all-false mask, with B = 0, and before the mask."""
    model, ids = random_model(kind), random_ids(3, 20)
    base = model(ids)
    adapter, everywhere = random_adapter(model), torch.ones(3, 20, dtype=torch.bool)
    assert torch.equal(model(ids), base)
    assert torch.equal(model(ids, lora=adapter, mask=~everywhere), base)
    assert torch.equal(model(ids, lora=random_adapter(model, b=0.0), mask=everywhere), base)
    late = torch.zeros_like(everywhere)
    late[0, 7:], late[1, 12] = True, True
    mixed = model(ids, lora=adapter, mask=late)
    assert torch.equal(mixed[0, :7], base[0, :7]) and torch.equal(mixed[1, :12], base[1, :12])
    assert torch.equal(mixed[2], base[2])
    assert (mixed[0, 7:] - base[0, 7:]).abs().amin(0).max() > 1e-3 and (mixed[1, 12] - base[1, 12]).abs().max() > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_that_is_on_adds_its_product(kind):
    """With the mask all true: the base model with W + (alpha / r) B A in place of W. Catches a wrong scale or linear."""
    model, ids = random_model(kind), random_ids(2, 20)
    adapter, merged = random_adapter(model, b=0.2), copy.deepcopy(model)
    pairs = dict(adapter.named_parameters())
    for name, parameter in merged.named_parameters():
        stem = name.removesuffix(".weight")
        if stem + ".lora_A.weight" in pairs:
            parameter += 5 / 3 * pairs.pop(stem + ".lora_B.weight") @ pairs.pop(stem + ".lora_A.weight")
    assert not pairs, "an adapter's pair whose name is no checkpoint name"
    found = model(ids, lora=adapter, mask=torch.ones(2, 20, dtype=torch.bool))
    close(found, merged(ids))
    assert (found - model(ids)).abs().max() > 0.05


# -------------------------------------------------------------------------------------------------------- arithmetic


def test_experts_alone_and_together():
    """GPT-OSS computes few tokens with all experts at once, many with one expert after another: the same, either way."""
    model, ids = random_model("gpt_oss", num_hidden_layers=2), random_ids(1, 400)
    cache = model.new_cache(1, 400)
    pieces = [model(piece, cache=cache) for piece in ids.split(100, 1)]
    close(model(ids), torch.cat(pieces, 1))


def test_a_long_prefill_in_blocks(monkeypatch):
    """Queries go through attention a block at a time where the scores would be large: really several, and each right.

    With one layer the keys and values do not depend on the blocks, so the last positions can be done again alone.
    """
    model = random_model("qwen2", num_attention_heads=1024, num_key_value_heads=1, head_dim=2, num_hidden_layers=1)
    ids, blocks, attend = random_ids(1, 365), [], rooms.attend
    monkeypatch.setattr(rooms, "attend", lambda *inputs: (blocks.append(inputs[0].shape[1]), attend(*inputs))[1])
    cache = model.new_cache(1, 365)
    whole = model(ids, cache=cache)
    assert len(blocks) > 1 and sum(blocks) == 365
    cache.rewind(blocks[-1] + 2)
    close(whole[:, -blocks[-1] - 2:], model(ids[:, -blocks[-1] - 2:], cache=cache))
    close(whole[:, :40], model(ids[:, :40]))


@pytest.mark.parametrize("kind", KINDS)
def test_embeddings_may_stand_for_ids(kind):
    """What stop.py lays behind a prefix are vectors: those of tokens must give what the tokens give."""
    model, ids = random_model(kind), random_ids(2, 9)
    assert torch.equal(model(model.model.embed_tokens(ids)), model(ids))


@pytest.mark.parametrize("kind", KINDS)
def test_norms_in_bfloat16(kind):
    """Qwen rounds before the weight, GPT-OSS after it: an order that float32 cannot see."""
    norm = random_model(kind).model.norm.to(torch.bfloat16)
    x = torch.randn(50, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    scaled = x.float() * (x.float().pow(2).mean(-1, keepdim=True) + norm.eps).rsqrt()
    before, after = scaled.bfloat16() * norm.weight, (scaled * norm.weight.float()).bfloat16()
    right, wrong = (after, before) if kind == "gpt_oss" else (before, after)
    assert (norm(x) == right).float().mean() > 0.99 > 0.95 > (norm(x) == wrong).float().mean()


def yarn(dim, theta, factor, original, fast, slow, truncate):
    """YaRN's inverse frequencies, one dimension at a time, from the paper's wavelengths (arXiv 2309.00071, 3.2)."""
    def border(turns):  # the (real) dimension whose wave turns so often within the original context
        return dim / 2 * math.log(original / (2 * math.pi * turns), theta)

    low, high = border(fast), border(slow)
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high, out = max(low, 0), min(high, dim - 1), []
    for i in range(dim // 2):
        slowed = min(max((i - low) / (high - low), 0.0), 1.0)  # 0: turns often, kept; 1: interpolated
        frequency = theta ** (-2 * i / dim)
        out.append((1 - slowed) * frequency + slowed * frequency / factor)
    return torch.tensor(out)


ROPE_0528 = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768,
             "attn_factor": 0.8782488562869419}
ROPE_GPT_OSS = {"rope_type": "yarn", "factor": 32.0, "original_max_position_embeddings": 4096, "beta_fast": 32.0,
                "beta_slow": 1.0, "truncate": False}


@pytest.mark.parametrize("kind, dim, theta, rope", (
    ("qwen3", 128, 1000000, ROPE_0528), ("gpt_oss", 64, 150000, ROPE_GPT_OSS),
    ("gpt_oss", 64, 150000, ROPE_GPT_OSS | {"truncate": True}), ("gpt_oss", 8, 10000.0, raw_config("gpt_oss")["rope_scaling"])))
def test_yarn(kind, dim, theta, rope):
    config = Config.from_dict(raw_config(kind, head_dim=dim, rope_theta=theta, rope_scaling=rope))
    frequencies, scale = rope_frequencies(config)
    expected = yarn(dim, theta, rope["factor"], rope["original_max_position_embeddings"], rope.get("beta_fast", 32),
                    rope.get("beta_slow", 1), rope.get("truncate", True))
    torch.testing.assert_close(frequencies, expected, rtol=1e-5, atol=0)
    assert scale == pytest.approx(0.1 * math.log(rope["factor"]) + 1)


def test_the_attn_factor_of_0528_qwen3_8b():
    """transformers ignores it (1.1386), vLLM applies it (1.0): the choice is explicit and transformers' by default."""
    raw = raw_config("qwen3", rope_scaling=ROPE_0528)
    assert rope_frequencies(Config.from_dict(raw))[1] == pytest.approx(1.1386294)
    assert rope_frequencies(Config.from_dict(raw, apply_attn_factor=True))[1] == pytest.approx(1.0)
    given = raw_config("qwen3", rope_scaling={**ROPE_0528, "attention_factor": 1.25})
    assert rope_frequencies(Config.from_dict(given))[1] == 1.25


# ------------------------------------------------------------------------------------------------------ the real shapes

QWEN_1_5B = {"model_type": "qwen2", "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28,
             "num_attention_heads": 12, "num_key_value_heads": 2, "vocab_size": 151936, "rope_theta": 10000,
             "rms_norm_eps": 1e-6, "max_position_embeddings": 131072, "tie_word_embeddings": False,
             "sliding_window": 4096, "use_sliding_window": False, "use_mrope": None}
REAL = {
    "R1-Distill-Qwen-1.5B": (1_777_088_000, QWEN_1_5B),
    "R1-Distill-Qwen-7B": (7_615_616_512, QWEN_1_5B | {
        "hidden_size": 3584, "intermediate_size": 18944, "num_attention_heads": 28, "num_key_value_heads": 4,
        "vocab_size": 152064}),
    "R1-0528-Qwen3-8B": (8_190_735_360, {
        "model_type": "qwen3", "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "head_dim": 128,
        "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 151936, "rope_theta": 1000000,
        "rope_scaling": ROPE_0528, "rms_norm_eps": 1e-6, "max_position_embeddings": 131072, "tie_word_embeddings": False,
        "attention_bias": False}),
    "gpt-oss-20b": (20_914_757_184, {
        "model_type": "gpt_oss", "hidden_size": 2880, "intermediate_size": 2880, "num_hidden_layers": 24, "head_dim": 64,
        "num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 201088, "rope_theta": 150000,
        "rope_scaling": ROPE_GPT_OSS, "rms_norm_eps": 1e-5, "max_position_embeddings": 131072, "num_local_experts": 32,
        "num_experts_per_tok": 4, "experts_per_token": 4, "sliding_window": 128, "swiglu_limit": 7.0,
        "attention_bias": True, "quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}}),
}


@pytest.mark.parametrize("name", REAL)
def test_parameters_of_the_real_shapes(name):
    """transformers' counts. Catches a bias too many, a head tied or not, head_dim derived instead of read."""
    count, raw = REAL[name]
    with torch.device("meta"):
        model = Decoder(Config.from_dict(raw))
    assert sum(parameter.numel() for parameter in model.parameters()) == count


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", (8, 200))
def test_a_step_never_asks_the_device(kind, rows):
    """On meta there is no data: any .item(), .tolist() or data-dependent shape in a decode step raises."""
    with torch.device("meta"):
        model = Decoder(Config.from_dict(raw_config(kind))).to("meta")
    cache = model.new_cache(rows, 64)
    cache.advance(20)
    hidden = model.run(torch.zeros(rows, 1, dtype=torch.int64, device="meta"), cache, 32)
    assert hidden.shape == (rows, 1, 32) and model.logits(hidden[:, 0]).shape == (rows, 61)


# ---------------------------------------------------------------------------------------------------- the checkpoint


@pytest.mark.parametrize("kind", KINDS)
def test_saved_and_loaded(tmp_path, kind):
    """One file or shards, tied or not: the tensors that were written, frozen, in the dtype asked for."""
    for tied in (False, True):
        raw = raw_config(kind, tie_word_embeddings=tied)
        state = random_model(kind, **raw).state_dict()
        if tied:
            state.pop("lm_head.weight")
        for shards in (1, 3):
            model = load(write_checkpoint(tmp_path / f"{tied}{shards}", raw, state, shards))
            assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in state.items())
            assert tied == (model.lm_head.weight is model.model.embed_tokens.weight)
            assert not any(parameter.requires_grad for parameter in model.parameters())
            assert model.config.eos_ids == (3,)
    half = load(tmp_path / "False1", dtype=torch.bfloat16)
    assert {tensor.dtype for tensor in half.state_dict().values()} == {torch.bfloat16}
    assert half.frequencies.dtype == torch.float32  # angles of position 100,000 need it
    ids = random_ids(2, 20)
    difference = (half(ids).float() - load(tmp_path / "False1")(ids)).abs()
    assert difference.median() < 0.2  # the median, since one expert chosen otherwise moves a position far


@pytest.mark.parametrize("kind", KINDS)
def test_far_positions_in_bfloat16(tmp_path, kind):
    """Angles stay float32: position 400 is no bfloat16 number, and rounding there would turn the keys by a radian."""
    folder, ids = write_checkpoint(tmp_path / "it", raw_config(kind)), random_ids(1, 500)
    half, single = load(folder, dtype=torch.bfloat16), load(folder)
    single.load_state_dict(half.state_dict())  # the same rounded weights, other arithmetic
    difference = (half(ids).float() - single(ids))[0].abs()
    assert difference[400:].median() < 4 * difference[:20].median()


def test_a_tied_head_on_disk(tmp_path):
    """The one tensor that may be absent or present: equal to the embeddings it is accepted, else refused."""
    raw = raw_config("qwen2", tie_word_embeddings=True)
    state = {name: tensor.clone() for name, tensor in random_model("qwen2", **raw).state_dict().items()}
    assert torch.equal(load(write_checkpoint(tmp_path / "equal", raw, state)).lm_head.weight, state["lm_head.weight"])
    state["lm_head.weight"][5, 5] += 1
    with pytest.raises(ValueError, match="lm_head.weight.*tie_word_embeddings"):
        load(write_checkpoint(tmp_path / "other", raw, state))


# -------------------------------------------------------------------------------------------------------- transformers

DRAWN = [  # heads, kv heads, head_dim, hidden, ffn, layers, theta, eps, tied
    (4, 1, 16, 64, 96, 2, 10000.0, 1e-6, True), (6, 3, 8, 48, 56, 3, 1000000.0, 1e-5, False),
    (2, 2, 24, 48, 100, 2, 500.0, 1e-3, False)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("drawn", range(3))
def test_transformers_agrees(tmp_path, kind, drawn):
    """Checkpoints as transformers writes them, with random weights: config, names and arithmetic in one."""
    transformers = pytest.importorskip("transformers")
    heads, kv_heads, dim, hidden, inner, layers, theta, eps, tied = DRAWN[drawn]
    settings = {"vocab_size": 80, "hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers,
                "num_attention_heads": heads, "num_key_value_heads": kv_heads, "rms_norm_eps": eps, "rope_theta": theta,
                "tie_word_embeddings": tied, "max_position_embeddings": 256, "bos_token_id": None, "pad_token_id": None,
                "eos_token_id": 3, "attn_implementation": "eager", "experts_implementation": "eager"}
    if kind != "qwen2":
        settings["head_dim"] = dim
    rope = {"rope_type": "yarn", "factor": (4.0, 8.0, 2.0)[drawn], "original_max_position_embeddings": 32, "rope_theta": theta}
    if kind == "gpt_oss":
        rope |= {"beta_fast": (4.0, 8.0, 2.0)[drawn], "beta_slow": 1.0, "truncate": drawn == 1}
        settings |= {"num_local_experts": (4, 7, 3)[drawn], "num_experts_per_tok": (2, 3, 1)[drawn],
                     "sliding_window": (5, 16, 1)[drawn], "rope_parameters": rope}
    elif drawn == 1:
        settings["rope_parameters"] = rope
    config = transformers.AutoConfig.for_model(kind, **settings)
    theirs = fill(transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval(), seed=drawn)
    theirs.save_pretrained(tmp_path)
    ours, ids = load(tmp_path), random_ids(2, 90, vocab=80, seed=drawn)
    with torch.no_grad():
        expected = theirs(ids, attention_mask=torch.ones_like(ids), output_hidden_states=True)
    hidden = ours(ids)
    close(hidden, expected.hidden_states[-1])
    close(ours.logits(hidden), expected.logits)
    assert sum(map(torch.numel, ours.parameters())) == sum(map(torch.numel, theirs.parameters()))
