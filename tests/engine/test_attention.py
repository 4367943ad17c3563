"""engine/attention.py: tiles, flash attention and few experts give what the plain model gives.
Flash attention's kernel is emulated (emulations.py): what is shown is what it is asked for."""
import functools

import pytest
import torch
from emulations import flash_attention_forward, flash_on_cpu
from helpers import (
    KINDS, REAL, close, meta_model, random_ids, random_model, random_prompt, random_stop,
    raw_config)

from engine import attention
from engine.attention import Flash, Tiled, equip, fault_of_flash
from model import Attend, Decoder, attend, visibility
from plumbing.checkpoint import Config
from sample import generate
from stop import launch_check_resume

# ------------------------------------------------------------------------------------------- tiles


@pytest.fixture
def attended(monkeypatch):
    """Sizes (rows, queries, keys) of each call of `attend` by tiles."""
    calls = []

    def noted(q, k, v, mask, sinks):
        calls.append((q.shape[0], q.shape[1], k.shape[2]))
        return attend(q, k, v, mask, sinks)

    monkeypatch.setattr(attention, "attend", noted)
    return calls


def equipped(kind, **changes):
    """A small random model as commands run it on a CPU."""
    model = random_model(kind, **changes)
    equip(model)
    return model


def test_a_long_prefill_goes_in_blocks_of_queries(attended):
    """Where the scores would be large; really several, and each right."""
    model = equipped(
        "qwen2", num_attention_heads=1024, num_key_value_heads=1, head_dim=2, num_hidden_layers=1)
    ids = random_ids(1, 365)
    cache = model.new_cache(1, 365)
    whole = model(ids, cache=cache)
    queries = [count for _, count, _ in attended]
    assert len(queries) > 1
    assert sum(queries) == 365
    model.attend = Attend
    close(whole, model(ids))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", (1, 3))
def test_rows_attend_in_blocks_of_their_own_length(attended, monkeypatch, kind, count):
    """Rows side by side that are short read few slots, whatever the others hold; each row's hidden
    states are those of the row alone. The last block is not full."""
    model = equipped(kind)
    lengths = [40, 37, 33, 12, 9, 8, 5]
    rows = [random_prompt(length) for length in lengths]
    ids = torch.tensor([row + [0] * (40 - len(row)) for row in rows])
    cache = model.new_cache(7, 64)
    model(ids, cache=cache)
    cache.set_lengths(lengths)
    new = random_ids(7, count, seed=5)
    attended.clear()
    monkeypatch.setattr(attention, "ROWS_AT_ONCE", 3)
    hidden = model(new, cache=cache)

    blocks = set(attended)
    assert {rows for rows, _, _ in blocks} == {3, 1}
    unwindowed = {(3, count, 40 + count), (3, count, 12 + count), (1, count, 5 + count)}
    assert unwindowed <= blocks
    if kind == "gpt_oss":  # the window of 6 begins at that of the block's shortest row
        windowed = {(3, count, 40 + count - 28), (3, count, 12 + count - 3)}
        assert windowed <= blocks
    model.attend = Attend
    for found, row, more in zip(hidden, rows, new.tolist()):
        close(found, model(torch.tensor([row + more]))[0, -count:])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows, count, held", ((5, 1, 30), (70, 3, 12), (2, 40, 0), (130, 1, 9)))
def test_an_equipped_model_is_the_plain_one(kind, rows, count, held):
    """Decode steps, checks and prefills, few rows and more than a block of them, in one pass and
    over a span."""
    plain = random_model(kind)
    fast = equipped(kind)
    hidden = []
    for model in (plain, fast):
        cache = model.new_cache(rows, 64)
        model(random_ids(rows, max(held, 1)), cache=cache)
        cache.set_lengths([held - row % 4 if held else 0 for row in range(rows)])
        new = random_ids(rows, count, seed=7)
        hidden += [model.run(new, cache), model.run(new, cache, 48), model(new)]
    for one, other in zip(hidden[:3], hidden[3:]):
        close(one, other)


def test_few_tokens_are_computed_by_all_experts_and_many_by_the_chosen(monkeypatch):
    """The same, either way; a decode step of many rows is few tokens too."""
    model = equipped("gpt_oss", num_hidden_layers=2)
    looped = []
    experts = model.model.layers[0].mlp.experts
    monkeypatch.setattr(
        type(experts), "forward", lambda self, *parts: looped.append(self) or loop(self, *parts))
    ids = random_ids(1, 400)
    cache = model.new_cache(1, 400)
    pieces = [model(piece, cache=cache) for piece in ids.split(100, 1)]
    model(random_ids(200, 1))
    assert not looped
    close(model(ids), torch.cat(pieces, 1))
    assert len(looped) == 2


def loop(experts, x, weights, chosen):
    """The chosen experts, a token at a time."""
    out = torch.zeros_like(x)
    for token in range(len(x)):
        for weight, e in zip(weights[token], chosen[token].tolist()):
            gate_up = x[token] @ experts.gate_up_proj[e] + experts.gate_up_proj_bias[e]
            y = experts.swiglu(gate_up) @ experts.down_proj[e] + experts.down_proj_bias[e]
            out[token] += weight * y
    return out


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", (8, 200))
@pytest.mark.parametrize("how", (Tiled, Flash))
def test_a_step_never_asks_the_device(kind, rows, how):
    """On meta there is no data: any .item(), .tolist() or data-dependent shape in a decode step
    raises."""
    model = meta_model(raw_config(kind)).to("meta").to(torch.bfloat16)
    equip(model)
    model.attend = how
    cache = model.new_cache(rows, 64)
    cache.advance(20)
    ids = torch.zeros(rows, 1, dtype=torch.int64, device="meta")
    hidden = model.run(ids, cache, 32)
    assert hidden.shape == (rows, 1, 32)
    assert model.logits(hidden[:, 0]).shape == (rows, 61)


# ------------------------------------------------------------------------------------------- flash


class Shape:
    """Random queries and a cache of ragged rows, in the values of bfloat16."""

    def __init__(self, B, T, H, K, D, slots, window, has_sinks, more_rows=0):
        generator = torch.Generator().manual_seed(B * T + H * D + slots)

        def random(*shape):
            return torch.randn(shape, generator=generator).bfloat16().float()

        self.config = Config.from_dict(raw_config(
            "gpt_oss", num_attention_heads=H, num_key_value_heads=K, head_dim=D))
        self.window = window
        self.sinks = random(H) if has_sinks else None
        held = torch.randint(slots - T + 1, (B,), generator=generator)
        held[0] = slots - T
        held[-1] = 0
        self.positions = held[:, None] + torch.arange(T)
        self.q = 2 * random(B, T, H, D)
        self.k = random(B + more_rows, K, slots, D)
        self.v = random(B + more_rows, K, slots, D)
        self.dead = torch.arange(slots) >= held[:, None] + T

    def exact(self):
        mask = visibility(self.positions, 0, self.k.shape[2], self.window)
        B = len(self.q)
        return attend(self.q, self.k[:B], self.v[:B], mask, self.sinks)

    def by_flash(self):
        """With NaN in every dead slot, and in rows that are not in use."""
        k = self.k.clone()
        v = self.v.clone()
        for part in (k, v):
            part[len(self.q):] = torch.nan
            part[:len(self.q)].masked_fill_(self.dead[:, None, :, None], torch.nan)
        how = Flash(self.config, self.positions)
        with flash_on_cpu():
            return how(self.q, k, v, self.window, self.sinks)


SHAPES = (  # B, T, H, K, D, slots, window, sinks, rows that are not in use
    (3, 1, 4, 2, 16, 20, None, False), (5, 1, 6, 1, 8, 33, None, True, 2),
    (2, 1, 8, 8, 24, 40, None, False), (4, 1, 6, 3, 16, 50, 9, True), (3, 1, 4, 2, 8, 12, 1, False),
    (2, 4, 8, 2, 8, 30, None, True), (3, 5, 6, 2, 16, 41, 4, True, 3),
    (2, 7, 5, 1, 32, 25, 30, False),
    (2, 3, 6, 2, 8, 19, None, False), (1, 12, 2, 2, 8, 12, 5, True), (2, 2, 4, 2, 8, 40, 2, False))


@pytest.fixture
def single(monkeypatch):
    """Flash in float32 too: then every index shows."""
    monkeypatch.setattr(attention, "HALF", (torch.float32, torch.bfloat16))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_flash_gives_what_attend_gives(single, shape):
    shape = Shape(*shape)
    found = shape.by_flash()
    assert found.isfinite().all()
    close(found, shape.exact(), 2e-6)


@pytest.mark.parametrize("shape", SHAPES[:6], ids=str)
def test_flash_in_bfloat16(shape):
    shape = Shape(*shape)
    exact = shape.exact()
    for name in ("q", "k", "v"):
        setattr(shape, name, getattr(shape, name).bfloat16())
    found = shape.by_flash()
    assert found.dtype == torch.bfloat16
    assert (found.float() - exact).norm() < 0.01 * exact.norm()


SETTINGS = {"temperature": 1.0, "top_k": 20, "top_p": 0.95, "seed": 4}


@pytest.mark.parametrize("kind", KINDS)
def test_whole_runs_by_flash(single, kind):
    """Prefill of ragged prompts, decode steps, the check, resumed rows: the paths of plain
    attention, and their scores."""
    plain = random_model(kind)
    fast = equipped(kind)
    fast.attend = Flash
    settings = SETTINGS | {"max_new_tokens": 9, "eos_ids": (3, 11)}
    prompts = [random_prompt(length) for length in (20, 7, 3)]
    runs = []
    for model in (plain, fast):
        stop = random_stop(model)
        with flash_on_cpu():
            groups = generate(model, prompts, n=2, **settings)
            checked = launch_check_resume(
                model, stop, prompts[0], n=5, keep=2, prefix=4, **settings)
        runs.append(([path.ids for group in groups for path in group],
                     [(path.ids, path.status, round(path.score, 4)) for path in checked]))
    assert runs[0] == runs[1]


def test_a_pass_with_a_gradient_is_tiled(single, attended):
    """The fit of [STOP]: flash attention would give its gradients no way."""
    model = equipped("qwen2")
    model.attend = Flash
    stop = random_stop(model)
    cache = model.new_cache(2, 20)
    with torch.no_grad(), flash_on_cpu():
        model(random_ids(2, 9), cache=cache)
    assert not attended
    with flash_on_cpu(fails):
        stop.loss(stop(model, cache), torch.tensor([0.0, 1.0])).backward()
    assert attended
    assert all(parameter.grad.abs().sum() > 0 for parameter in stop.parameters())


@pytest.mark.parametrize("name", REAL)
@pytest.mark.parametrize("rows, count", ((64, 1), (16, 4), (2, 600)))
def test_pytorch_takes_what_flash_asks_of_it(name, rows, count):
    """PyTorch's own operation, on tensors without data: names and number of its arguments, shapes
    and dtypes, for a decode step, a check and a prefill of the paper's models."""
    config = REAL[name] | {"num_hidden_layers": 2}
    model = meta_model(config).to("meta").to(torch.bfloat16)
    equip(model)
    model.attend = Flash
    model.frequencies = model.frequencies.to("meta", torch.float32)
    if model.config.experts and count > 1:  # whose number of tokens depends on data
        for layer in model.model.layers:
            layer.mlp.mix = lambda x, weights, chosen: x
    cache = model.new_cache(rows, 16600)
    cache.advance(9000)
    ids = torch.zeros(rows, count, dtype=torch.int64, device="meta")
    with torch.inference_mode():
        assert model.run(ids, cache).shape == (rows, count, config["hidden_size"])


# -------------------------------------------------------------------------- proof at first contact


def config_of(kind):
    return random_model(kind).config


def broken(**changes):
    """The emulated kernel, called with other arguments than it was asked with."""
    @functools.wraps(flash_attention_forward)
    def kernel(*args, **kwargs):
        for name, change in changes.items():
            kwargs[name] = change(kwargs[name])
        return flash_attention_forward(*args, **kwargs)

    return kernel


def fault(kind, kernel, dtype=torch.bfloat16):
    with flash_on_cpu(kernel):
        return fault_of_flash(config_of(kind), torch.device("cpu"), dtype)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_a_right_kernel_proves_right(monkeypatch, kind, dtype):
    assert fault(kind, flash_attention_forward, dtype) is None


def transposed(*args, **kwargs):
    out, logsumexp, *rest = flash_attention_forward(*args, **kwargs)
    return out, logsumexp.flip(0), *rest


def fails(*args, **kwargs):
    raise RuntimeError("no kernel image is available for execution on the device\nmore")


BROKEN = {
    "one key too few": ("qwen2", broken(seqused_k=lambda used: (used - 1).clamp(min=1))),
    "dead slots are read": ("qwen2", broken(seqused_k=lambda used: used + 1)),
    "all slots are read": ("qwen3", broken(seqused_k=lambda used: used * 0 + 320)),
    "lengths of other rows": ("llama", broken(seqused_k=lambda used: used.flip(0))),
    "another scale": ("qwen2", broken(scale=lambda scale: scale * 1.1)),
    "no window": ("gpt_oss", broken(window_size_left=lambda left: -1)),
    "a window of one more": ("gpt_oss", broken(window_size_left=lambda left: left + (left > 0))),
    "sinks of other heads": ("gpt_oss", transposed)}


@pytest.mark.parametrize("what", BROKEN)
def test_a_wrong_kernel_is_found_out(what):
    """And what is wrong is said in words."""
    kind, kernel = BROKEN[what]
    assert fault(kind, kernel).startswith("flash differs here by ")


def test_a_kernel_that_fails_is_found_out():
    message = "flash fails here: no kernel image is available for execution on the device"
    assert fault("qwen2", fails) == message


def test_a_kernel_that_is_missing_is_found_out():
    """As it is on a CPU."""
    found = fault_of_flash(config_of("qwen2"), torch.device("cpu"), torch.bfloat16)
    assert found.startswith("flash fails here: ")
    assert "\n" not in found


@pytest.mark.parametrize("asked, dtype, device, reason, expected", (
    (None, torch.bfloat16, "cuda", None, "flash"),
    ("flash", torch.bfloat16, "cuda", None, "flash"),
    (None, torch.float16, "cuda", None, "flash"),
    (None, torch.bfloat16, "cuda", "it is off", "plain (it is off)"),
    ("plain", torch.bfloat16, "cuda", None, "plain (asked for)"),
    (None, torch.float32, "cuda", None, "plain (flash needs bfloat16"),
    (None, torch.bfloat16, "cpu", None, None),
    ("plain", torch.float32, "cpu", None, None)))
def test_which_attention_a_model_gets(monkeypatch, asked, dtype, device, reason, expected):
    """And the line that says so, on CUDA."""
    model = random_model("qwen2").to(dtype)
    monkeypatch.setattr(Decoder, "device", torch.device(device))
    monkeypatch.setattr(attention, "fault_of_flash", lambda config, device, dtype: reason)
    line = equip(model, asked)
    assert (model.attend is Flash) == (expected == "flash")
    assert (model.attend is Tiled) == (expected != "flash")
    if expected is None:
        assert line is None
    else:
        assert line.startswith(f"attention: {expected}")


@pytest.mark.parametrize("dtype, device, reason, message", (
    (torch.float32, "cuda", None, "flash needs bfloat16 or float16 on cuda, not float32"),
    (torch.bfloat16, "cpu", None, "flash needs bfloat16 or float16 on cuda, not bfloat16 on cpu"),
    (torch.bfloat16, "cuda", "flash differs here by 1", "flash differs here by 1")))
def test_flash_that_cannot_be_had_is_refused(monkeypatch, dtype, device, reason, message):
    """Where it was asked for, plain attention would be another thing."""
    model = random_model("qwen2").to(dtype)
    monkeypatch.setattr(Decoder, "device", torch.device(device))
    monkeypatch.setattr(attention, "fault_of_flash", lambda config, device, dtype: reason)
    with pytest.raises(ValueError) as caught:
        equip(model, "flash")
    assert str(caught.value).startswith("attention: found 'flash', expected 'plain': " + message)
