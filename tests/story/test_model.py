"""The decoder: the golden data, transformers where it is installed, the adapter's silence, and what
a config means."""
import copy
import math

import numpy as np
import pytest
import torch
from helpers import (
    GOLDEN, KINDS, LLAMA_8B, NAMES, PARAMETERS, REAL, YARN_0528, YARN_GPT_OSS, close, fill, golden,
    meta_model, random_ids, random_model, random_prompt, raw_config, write_checkpoint)
from torch.utils._python_dispatch import TorchDispatchMode

import model as room
from lora import LoRA
from model import load, rope_frequencies
from plumbing.checkpoint import Config
from sample import generate


class Case:
    """A golden checkpoint, loaded, and what is expected of it."""

    def __init__(self, name):
        self.model = load(GOLDEN / "checkpoints" / name)
        self.tensors, self.info = golden(name)
        self.rows = [row["input_ids"] for row in self.info["rows"]]

    def compare(self, key, found):
        """Whether `key` is among the expected tensors; if it is, it must be what was found."""
        if key not in self.tensors:
            return False
        close(found, self.tensors[key])
        return True


@pytest.fixture(scope="module", params=NAMES)
def case(request):
    return Case(request.param)


# -------------------------------------------------------------------------------- the golden data


def test_golden_hidden_states_and_logits(case):
    """Every structural mistake moves these logits by more than 1; an epsilon off by 10 by more than
    1e-3."""
    compared = 0
    for r, row in enumerate(case.rows):
        hidden = case.model(torch.tensor([row]))[0]
        compared += case.compare(f"hidden.row{r}", hidden)
        compared += case.compare(f"logits.row{r}", case.model.logits(hidden))
    assert compared


def test_golden_logits_from_the_cache(case):
    """In the split that was recorded: half at once, then one at a time."""
    for r, row in enumerate(case.rows):
        ids = torch.tensor([row])
        start = case.info["rows"][r]["prefill"]
        cache = case.model.new_cache(1, len(row))
        parts = [case.model(ids[:, :start], cache=cache)]
        for t in range(start, len(row)):
            parts.append(case.model(ids[:, t:t + 1], cache=cache))
        logits = case.model.logits(torch.cat(parts, 1))[0]
        close(logits, case.model.logits(case.model(ids))[0])
        case.compare(f"incremental.logits.row{r}", logits)
        case.compare(f"logits.row{r}", logits)


def test_golden_long_row(case):
    """300 tokens, many windows long, in one pass and in pieces of 64."""
    ids = case.tensors["long.input_ids"][None]
    cache = case.model.new_cache(1, 300)
    pieces = torch.cat([case.model(piece, cache=cache) for piece in ids.split(64, 1)], 1)
    for hidden in (case.model(ids), pieces):
        close(hidden[0, -4:], case.tensors["long.hidden_last4"])
        close(case.model.logits(hidden[0, -4:]), case.tensors["long.logits_last4"])


def greedy(case, prompts, eos_ids=None):
    """24 greedy tokens of each prompt, the prompts in one ragged batch."""
    groups = generate(
        case.model, prompts, max_new_tokens=24, temperature=0.0, eos_ids=eos_ids)
    return [path for (path,) in groups]


def test_golden_greedy_tokens(case):
    """Exact, with end tokens ignored."""
    found = greedy(case, case.rows, eos_ids=[])
    assert [path.ids for path in found] == [row["greedy"] for row in case.info["rows"]]


def test_golden_greedy_tokens_up_to_the_checkpoints_end_tokens(case):
    """generation_config.json's end tokens are the model's, whatever config.json says."""
    eos = case.info["generation_config_eos_token_id"]
    assert case.model.config.eos_ids == tuple(eos if isinstance(eos, list) else [eos])
    found = greedy(case, case.rows)
    assert [path.ids for path in found] == case.info["greedy_with_generation_config_eos"]


def test_golden_greedy_tokens_up_to_given_end_tokens(case):
    known = case.info["greedy_eos"]
    (path,) = greedy(case, [case.rows[known["row"]]], known["eos_token_id"])
    assert path.ids == known["tokens"]
    assert path.status == "eos"


def test_golden_routing(case, monkeypatch):
    """The experts chosen, exact, and their weights: catches softmax before top-k, and a router
    without its bias."""
    if "debug.router.indices.row0" not in case.tensors:
        pytest.skip("no experts")
    seen = []
    forward = room.Experts.forward

    def noted(self, x, weights, chosen):
        seen.append((weights, chosen))
        return forward(self, x, weights, chosen)

    monkeypatch.setattr(room.Experts, "forward", noted)
    case.model(torch.tensor([case.rows[0]]))
    assert len(seen) == len(case.model.model.layers)
    for layer, (weights, chosen) in enumerate(seen):
        indices = case.tensors["debug.router.indices.row0"][layer]
        expected = case.tensors["debug.router.weights.row0"][layer]
        order = chosen.argsort(-1)
        expected_order = indices.argsort(-1)
        assert torch.equal(chosen.gather(-1, order), indices.gather(-1, expected_order))
        close(weights.gather(-1, order), expected.gather(-1, expected_order), 1e-5)


def test_golden_rope(case):
    frequencies, scale = rope_frequencies(case.model.config)
    torch.testing.assert_close(frequencies, case.tensors["debug.rope.inv_freq"], rtol=1e-6, atol=0)
    assert scale == pytest.approx(case.info["rope_attention_scaling"], abs=1e-7)


# ------------------------------------------------------------------------------------ the adapter

TARGETS = {
    "qwen2": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    "qwen3": ("q_proj", "v_proj", "down_proj"),
    "llama": ("k_proj", "o_proj", "gate_proj"),
    "gpt_oss": ("q_proj", "k_proj", "v_proj", "o_proj")}


def random_lora(model, b=1.0):
    """A LoRA whose B is random numbers of size b."""
    lora = LoRA(model, rank=3, alpha=5, targets=TARGETS[model.config.model_type], seed=1)
    with torch.no_grad():
        for name, parameter in lora.named_parameters():
            if name.endswith("lora_B.weight"):
                generator = torch.Generator().manual_seed(len(name))
                parameter.copy_(b * torch.randn(parameter.shape, generator=generator))
    return lora.requires_grad_(False)


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_changes_nothing_where_it_is_off(kind):
    """Bit-equal once attached, active nowhere, with B = 0, and before the first active position."""
    model = random_model(kind)
    ids = random_ids(3, 20)
    base = model(ids)
    lora = random_lora(model)
    everywhere = torch.ones(3, 20, dtype=torch.bool)
    assert torch.equal(model(ids), base)
    assert torch.equal(model(ids, adapter=lora.at(~everywhere)), base)
    assert torch.equal(model(ids, adapter=random_lora(model, b=0.0).at(everywhere)), base)

    late = torch.zeros(3, 20, dtype=torch.bool)
    late[0, 7:] = True
    late[1, 12] = True
    mixed = model(ids, adapter=lora.at(late))
    assert torch.equal(mixed[0, :7], base[0, :7])
    assert torch.equal(mixed[1, :12], base[1, :12])
    assert torch.equal(mixed[2], base[2])
    assert (mixed[0, 7:] - base[0, 7:]).abs().amin(0).max() > 1e-3
    assert (mixed[1, 12] - base[1, 12]).abs().max() > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_that_is_on_adds_its_product(kind):
    """Active everywhere it is the base model with W + (alpha / r) B A in place of W. Catches a
    wrong scale, a wrong linear, and a pair whose name is no checkpoint name."""
    model = random_model(kind)
    ids = random_ids(2, 20)
    lora = random_lora(model, b=0.2)
    merged = copy.deepcopy(model)
    pairs = dict(lora.named_parameters())
    for name, parameter in merged.named_parameters():
        linear = name.removesuffix(".weight")
        if linear + ".lora_A.weight" in pairs:
            a = pairs.pop(linear + ".lora_A.weight")
            b = pairs.pop(linear + ".lora_B.weight")
            parameter += 5 / 3 * b @ a
    assert not pairs
    found = model(ids, adapter=lora.at(torch.ones(2, 20, dtype=torch.bool)))
    close(found, merged(ids))
    assert (found - model(ids)).abs().max() > 0.05


@pytest.mark.parametrize("kind", KINDS)
def test_embeddings_may_stand_for_ids(kind):
    """The [STOP] positions are vectors: those of tokens must give what the tokens give."""
    model = random_model(kind)
    ids = random_ids(2, 9)
    assert torch.equal(model(model.model.embed_tokens(ids)), model(ids))


# ---------------------------------------------------------------------------- waits for the device


class Waits(TorchDispatchMode):
    """Counts what waits for the device, were there one: numbers that Python reads, and results
    whose size depends on data."""
    WAIT = ("_local_scalar_dense", "nonzero", "bincount", "unique", "masked_select", "equal.")

    def __init__(self, monkeypatch):
        super().__init__()
        self.count = 0
        tolist = torch.Tensor.tolist

        def counted(tensor):
            self.count += 1
            return tolist(tensor)

        monkeypatch.setattr(torch.Tensor, "tolist", counted)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += any(name in str(func) for name in self.WAIT)
        return func(*args, **(kwargs or {}))


def test_the_experts_loop_waits_once_a_layer(monkeypatch):
    """However many experts there are: a check over more than 128 positions would else wait for the
    device hundreds of times."""
    model = random_model("gpt_oss")
    ids = random_ids(3, 60)
    with Waits(monkeypatch) as waits:
        model(ids)
    assert waits.count == len(model.model.layers)


# -------------------------------------------------------------------------------------- arithmetic


def test_scores_are_not_rounded_to_bfloat16():
    """Biases of Qwen2's q and k make scores of thousands. bfloat16 has steps of 64 there, of more
    than a unit once they are scaled, and the softmax is another. Inputs and weights alone are
    rounded."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(shape, generator=generator)

    q = (random(3, 2, 4, 128) + 10 * random(1, 1, 4, 128)).bfloat16()
    k = (random(3, 2, 40, 128) + 200 * random(1, 2, 1, 128)).bfloat16()
    v = random(3, 2, 40, 128).bfloat16()
    wide = k.double().repeat_interleave(2, 1)  # (B, H, S, D)
    raw = torch.einsum("bthd,bhsd->bhts", q.double(), wide)
    assert raw.abs().max() > 10000

    def result(raw):
        weights = (raw / 128 ** 0.5).softmax(-1)
        return torch.einsum("bhts,bhsd->bthd", weights, v.double().repeat_interleave(2, 1))

    exact = result(raw)
    rounded = result(raw.bfloat16().double())
    found = room.attend(q, k, v, torch.zeros(3, 2, 40)).view(3, 2, 4, 128).double()
    assert (rounded - exact).norm() > 0.2 * exact.norm()
    assert (found - exact).norm() < 0.005 * exact.norm()


@pytest.mark.parametrize("kind", KINDS)
def test_norms_in_bfloat16(kind):
    """Qwen rounds before the weight, GPT-OSS after it: an order that float32 cannot see."""
    norm = random_model(kind).model.norm.to(torch.bfloat16)
    x = torch.randn(50, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    squares = x.float().pow(2).mean(-1, keepdim=True)
    scaled = x.float() * (squares + norm.eps).rsqrt()
    rounded_first = scaled.bfloat16() * norm.weight
    rounded_last = (scaled * norm.weight.float()).bfloat16()
    right = rounded_last if kind == "gpt_oss" else rounded_first
    wrong = rounded_first if kind == "gpt_oss" else rounded_last
    found = norm(x)
    assert (found == right).float().mean() > 0.99
    assert (found == wrong).float().mean() < 0.95


def yarn(dim, theta, rope):
    """YaRN's inverse frequencies, one dimension at a time, from the paper's wavelengths (arXiv
    2309.00071, 3.2)."""
    original = rope["original_max_position_embeddings"]

    def border(turns):
        """The (real) dimension whose wave turns so often within the original context."""
        return dim / 2 * math.log(original / (2 * math.pi * turns), theta)

    low = border(rope.get("beta_fast", 32))
    high = border(rope.get("beta_slow", 1))
    if rope.get("truncate", True):
        low = math.floor(low)
        high = math.ceil(high)
    low = max(low, 0)
    high = min(high, dim - 1)
    frequencies = []
    for i in range(dim // 2):
        slowed = min(max((i - low) / (high - low), 0.0), 1.0)  # 0: turns often, kept; 1: by factor
        frequency = theta ** (-2 * i / dim)
        frequencies.append((1 - slowed) * frequency + slowed * frequency / rope["factor"])
    return torch.tensor(frequencies)


@pytest.mark.parametrize("kind, dim, theta, rope", (
    ("qwen3", 128, 1000000, YARN_0528),
    ("gpt_oss", 64, 150000, YARN_GPT_OSS),
    ("gpt_oss", 64, 150000, YARN_GPT_OSS | {"truncate": True}),
    ("gpt_oss", 8, 10000.0, raw_config("gpt_oss")["rope_scaling"])))
def test_yarn(kind, dim, theta, rope):
    raw = raw_config(kind, head_dim=dim, rope_theta=theta, rope_scaling=rope)
    frequencies, scale = rope_frequencies(Config.from_dict(raw))
    torch.testing.assert_close(frequencies, yarn(dim, theta, rope), rtol=1e-5, atol=0)
    assert scale == pytest.approx(0.1 * math.log(rope["factor"]) + 1)


def test_the_attn_factor_of_0528_qwen3_8b():
    """transformers ignores it (1.1386), vLLM applies it (1.0): the choice is explicit, and
    transformers' by default."""
    raw = raw_config("qwen3", rope_scaling=YARN_0528)
    ignored = Config.from_dict(raw)
    applied = Config.from_dict(raw, apply_attn_factor=True)
    given = Config.from_dict(
        raw_config("qwen3", rope_scaling=YARN_0528 | {"attention_factor": 1.25}))
    assert rope_frequencies(ignored)[1] == pytest.approx(1.1386294)
    assert rope_frequencies(applied)[1] == pytest.approx(1.0)
    assert rope_frequencies(given)[1] == 1.25


def llama3(dim, theta, rope):
    """Llama 3.1's inverse frequencies, one dimension at a time, by its wavelength, as in Meta's
    code (llama-models, apply_scaling)."""
    original = rope["original_max_position_embeddings"]
    shortest_slowed = original / rope["low_freq_factor"]
    longest_kept = original / rope["high_freq_factor"]
    frequencies = []
    for i in range(dim // 2):
        frequency = theta ** (-2 * i / dim)
        wavelength = 2 * math.pi / frequency
        if wavelength > shortest_slowed:
            frequency = frequency / rope["factor"]
        elif wavelength >= longest_kept:
            smooth = original / wavelength - rope["low_freq_factor"]
            smooth = smooth / (rope["high_freq_factor"] - rope["low_freq_factor"])
            frequency = (1 - smooth) * frequency / rope["factor"] + smooth * frequency
        frequencies.append(frequency)
    return torch.tensor(frequencies)


LLAMA_32_3B = {  # rope_scaling of Llama-3.2-3B
    "rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192}


@pytest.mark.parametrize("dim, theta, rope", (
    (128, 500000.0, LLAMA_8B["rope_scaling"]),
    (64, 500000.0, LLAMA_32_3B),
    (8, 10000.0, raw_config("llama")["rope_scaling"])))
def test_llama3_frequencies(dim, theta, rope):
    """Some are kept, some interpolated, some slowed down; cos and sin are not scaled."""
    raw = raw_config("llama", head_dim=dim, rope_theta=theta, rope_scaling=rope)
    frequencies, scale = rope_frequencies(Config.from_dict(raw))
    torch.testing.assert_close(frequencies, llama3(dim, theta, rope), rtol=1e-5, atol=0)
    assert scale == 1.0
    plain, _ = rope_frequencies(Config.from_dict(raw | {"rope_scaling": None}))
    slowness = plain / frequencies
    factor = rope["factor"]
    assert (slowness == 1).any()
    assert torch.isclose(slowness, torch.tensor(factor)).any()
    assert ((slowness > 1.001) & (slowness < factor - 0.001)).any()


def test_a_llama_without_rope_scaling_is_an_ordinary_one():
    config = Config.from_dict(raw_config("llama", rope_scaling=None))
    other = Config.from_dict(raw_config("qwen2"))
    assert config.rope == other.rope
    assert torch.equal(rope_frequencies(config)[0], rope_frequencies(other)[0])


def test_a_llama_in_numpy():
    """A second decoder, written from the paper's description without torch: RMSNorm, rotated
    halves, grouped heads, SwiGLU, no biases. One row of 40, past the original context."""
    model = random_model("llama", num_hidden_layers=2, tie_word_embeddings=True)
    ids = random_prompt(40)
    weights = {name: weight.double().numpy() for name, weight in model.state_dict().items()}
    config = model.config
    frequencies = llama3(config.head_dim, 10000.0, raw_config("llama")["rope_scaling"])
    expected = llama_in_numpy(weights, ids, config, frequencies.double().numpy())
    close(model(torch.tensor([ids]))[0], torch.from_numpy(expected).float(), 1e-5)


def llama_in_numpy(weights, ids, config, frequencies):
    """Hidden states (T, hidden) float64 after the final norm."""
    T = len(ids)
    H, K, D = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    angles = np.outer(np.arange(T), frequencies)

    def norm(x, name):
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + config.rms_norm_eps) * weights[name]

    def rotate(x):  # (T, D): dimension i turns with dimension i + D / 2
        first, second = x[:, :D // 2], x[:, D // 2:]
        cos, sin = np.cos(angles), np.sin(angles)
        return np.concatenate((first * cos - second * sin, second * cos + first * sin), 1)

    x = weights["model.embed_tokens.weight"][ids]
    for layer in range(config.num_hidden_layers):
        name = f"model.layers.{layer}."
        normed = norm(x, name + "input_layernorm.weight")
        q, k, v = (normed @ weights[f"{name}self_attn.{part}_proj.weight"].T for part in "qkv")
        heads = []
        for head in range(H):
            group = head // (H // K)
            own = slice(head * D, (head + 1) * D)
            shared = slice(group * D, (group + 1) * D)
            scores = rotate(q[:, own]) @ rotate(k[:, shared]).T / np.sqrt(D)
            scores[np.triu_indices(T, 1)] = -np.inf
            shares = np.exp(scores - scores.max(-1, keepdims=True))
            heads.append(shares / shares.sum(-1, keepdims=True) @ v[:, shared])
        x = x + np.concatenate(heads, 1) @ weights[name + "self_attn.o_proj.weight"].T
        normed = norm(x, name + "post_attention_layernorm.weight")
        gate = normed @ weights[name + "mlp.gate_proj.weight"].T
        up = normed @ weights[name + "mlp.up_proj.weight"].T
        x = x + gate / (1 + np.exp(-gate)) * up @ weights[name + "mlp.down_proj.weight"].T
    return norm(x, "model.norm.weight")


@pytest.mark.parametrize("name", REAL)
def test_parameters_of_the_real_shapes(name):
    """transformers' counts. Catches a bias too many, a head tied or not, head_dim derived instead
    of read."""
    model = meta_model(REAL[name])
    assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS[name]


def test_parameters_of_a_real_llama():
    """As DeepSeek-R1-Distill-Llama-8B's index counts them: 16,060,522,496 bytes in bfloat16."""
    model = meta_model(LLAMA_8B)
    assert 2 * sum(parameter.numel() for parameter in model.parameters()) == 16_060_522_496


# ----------------------------------------------------------------------------------------- loading


@pytest.mark.parametrize("shards", (1, 3))
@pytest.mark.parametrize("tied", (False, True))
@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_is_loaded_as_it_was_written(tmp_path, kind, tied, shards):
    """One file or shards, tied or not: the tensors that were written, frozen."""
    raw = raw_config(kind, tie_word_embeddings=tied)
    state = random_model(kind, **raw).state_dict()
    if tied:
        state.pop("lm_head.weight")
    model = load(write_checkpoint(tmp_path / "it", raw, state, shards))
    found = model.state_dict()
    for name, tensor in state.items():
        assert torch.equal(tensor, found[name]), name
    assert tied == (model.lm_head.weight is model.model.embed_tokens.weight)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert model.config.eos_ids == (3,)


@pytest.fixture(scope="module", params=KINDS)
def in_two_dtypes(request, tmp_path_factory):
    """The same checkpoint loaded in float32 and in bfloat16."""
    folder = tmp_path_factory.mktemp("dtypes") / "it"
    write_checkpoint(folder, raw_config(request.param))
    return load(folder), load(folder, dtype=torch.bfloat16)


def test_a_checkpoint_is_loaded_in_the_dtype_asked_for(in_two_dtypes):
    single, half = in_two_dtypes
    assert {tensor.dtype for tensor in half.state_dict().values()} == {torch.bfloat16}
    assert half.frequencies.dtype == torch.float32  # angles of position 100,000 need it
    ids = random_ids(2, 20)
    difference = (half(ids).float() - single(ids)).abs()
    assert difference.median() < 0.2  # the median: one expert chosen otherwise moves a position far


def test_far_positions_in_bfloat16(in_two_dtypes):
    """Angles stay float32: position 400 is no bfloat16 number, and rounding there would turn the
    keys by a radian."""
    single, half = in_two_dtypes
    rounded = copy.deepcopy(single)
    rounded.load_state_dict(half.state_dict())  # the same rounded weights, other arithmetic
    ids = random_ids(1, 500)
    difference = (half(ids).float() - rounded(ids))[0].abs()
    assert difference[400:].median() < 4 * difference[:20].median()


# ------------------------------------------------------------------------------------ transformers

DRAWN = (  # three models unlike each other in every size
    {"num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 16, "hidden_size": 64,
     "intermediate_size": 96, "num_hidden_layers": 2, "rope_theta": 10000.0, "rms_norm_eps": 1e-6,
     "tie_word_embeddings": True},
    {"num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 8, "hidden_size": 48,
     "intermediate_size": 56, "num_hidden_layers": 3, "rope_theta": 1000000.0,
     "rms_norm_eps": 1e-5, "tie_word_embeddings": False},
    {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 24, "hidden_size": 48,
     "intermediate_size": 100, "num_hidden_layers": 2, "rope_theta": 500.0, "rms_norm_eps": 1e-3,
     "tie_word_embeddings": False})
DRAWN_ROPE = (
    {"factor": 4.0, "beta_fast": 4.0, "beta_slow": 1.0, "truncate": False},
    {"factor": 8.0, "beta_fast": 8.0, "beta_slow": 1.0, "truncate": True},
    {"factor": 2.0, "beta_fast": 2.0, "beta_slow": 1.0, "truncate": False})
DRAWN_LLAMA3 = (
    {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 0.5, "high_freq_factor": 4.0},
    {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 3.0})
DRAWN_EXPERTS = (
    {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 5},
    {"num_local_experts": 7, "num_experts_per_tok": 3, "sliding_window": 16},
    {"num_local_experts": 3, "num_experts_per_tok": 1, "sliding_window": 1})


def drawn_settings(kind, drawn):
    """Settings of a transformers config."""
    settings = DRAWN[drawn] | {
        "vocab_size": 80, "max_position_embeddings": 256, "bos_token_id": None,
        "pad_token_id": None, "eos_token_id": 3, "attn_implementation": "eager",
        "experts_implementation": "eager"}
    rope = {"rope_type": "yarn", "original_max_position_embeddings": 32,
            "rope_theta": settings["rope_theta"], "factor": DRAWN_ROPE[drawn]["factor"]}
    if kind == "qwen2":
        del settings["head_dim"]
    if kind == "gpt_oss":
        settings |= DRAWN_EXPERTS[drawn]
        settings["rope_parameters"] = rope | DRAWN_ROPE[drawn]
    elif kind == "llama" and drawn > 0:
        settings["rope_parameters"] = rope | DRAWN_LLAMA3[drawn - 1]
    elif drawn == 1:
        settings["rope_parameters"] = rope
    return settings


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("drawn", range(3))
def test_transformers_agrees(tmp_path, kind, drawn):
    """Checkpoints as transformers writes them, with random weights: config, names and arithmetic in
    one."""
    transformers = pytest.importorskip("transformers")
    config = transformers.AutoConfig.for_model(kind, **drawn_settings(kind, drawn))
    theirs = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    fill(theirs, seed=drawn)
    theirs.save_pretrained(tmp_path)
    ours = load(tmp_path)
    ids = random_ids(2, 90, vocab=80, seed=drawn)
    with torch.no_grad():
        expected = theirs(
            ids, attention_mask=torch.ones_like(ids), output_hidden_states=True)
    hidden = ours(ids)
    close(hidden, expected.hidden_states[-1])
    close(ours.logits(hidden), expected.logits)
    count = sum(parameter.numel() for parameter in ours.parameters())
    assert count == sum(parameter.numel() for parameter in theirs.parameters())
