"""Attention for large batches, long prompts and GPUs. Tiled and Flash give what model.Attend gives,
few_experts what model.MoE gives: tests/engine/test_attention.py.

    line = equip(model)     # the attention that suits the model's device; a line that says which

Tiled cuts a pass into blocks, so that no row reads the longest row's slots and no pass holds all
scores at once. Flash is PyTorch's own kernel on CUDA in half precision, each row over its own
length. No machine of ours can run it, so it proves itself: it is used where, on the device at hand
and for the model's own heads, it gives what `attend` gives.

Letters as in model.py: B rows, T new positions, H query heads, K key/value heads, G = H / K, D
head_dim.
"""
import functools
from typing import NamedTuple

import torch

from model import Attend, MoE, attend, visibility

SCORES_AT_ONCE = 2 ** 27  # attention scores held at a time; a long prefill takes blocks of queries
ROWS_AT_ONCE = 64         # rows that share a span of keys; more would read more dead slots
HALF_ROWS_AT_ONCE = 8     # in half precision, where `attend` makes a float32 copy of the keys
FEW_TOKENS = 128          # which all experts compute at once
HALF = (torch.bfloat16, torch.float16)
LARGEST_FAULT = 0.03      # of flash, relative: rounding to bfloat16 gives a third of it


def equip(model, asked=None):
    """Give a model the attention that is fast on its device -> a line that says which and why, or
    None where there is no choice (elsewhere than on CUDA).

    asked: "plain" or "flash"; None: flash where it proves right. Raises ValueError where flash is
    asked for and cannot be."""
    model.attend = Tiled
    for module in model.modules():
        if isinstance(module, MoE):
            module.mix = functools.partial(few_experts, module.experts)
    dtype = model.model.embed_tokens.weight.dtype
    if asked == "plain":
        reason = "asked for"
    elif model.device.type != "cuda" or dtype not in HALF:
        name = str(dtype).removeprefix("torch.")
        reason = f"flash needs bfloat16 or float16 on cuda, not {name} on {model.device.type}"
    else:
        reason = fault_of_flash(model.config, model.device, dtype)
    if reason is None:
        model.attend = Flash
        return "attention: flash, which gives what plain attention gives on this device"
    if asked == "flash":
        raise ValueError(f"attention: found 'flash', expected 'plain': {reason}")
    return f"attention: plain ({reason})" if model.device.type == "cuda" else None


# ------------------------------------------------------------------------------------------- tiles


class Block(NamedTuple):
    """Queries that attend together: those of some rows, at some of the T positions. They read the
    keys in slots start..stop-1, under a mask (rows, queries, stop - start) that is added to the
    scores."""
    rows: slice
    queries: slice
    keys: slice
    mask: torch.Tensor


class Tiled:
    """model.Attend in Blocks: rows whose keys end at about the same slot, and as many queries as
    SCORES_AT_ONCE allows."""
    own_lengths = False

    def __init__(self, config, positions, cache=None, span=None):
        self.positions = positions
        self.heads = config.num_attention_heads
        self.counts = None if cache is None else cache.counts
        self.span = span
        self.blocks = {}  # window -> its Blocks, made when a layer asks for them

    def __call__(self, q, k, v, window, sinks=None):
        if window not in self.blocks:
            self.blocks[window] = self._cut(window, q.dtype)
        B, T, H, D = q.shape
        out = q.new_empty(B, T, H * D)
        for rows, queries, keys, mask in self.blocks[window]:
            part = attend(q[rows, queries], k[rows, :, keys], v[rows, :, keys], mask, sinks)
            out[rows, queries] = part
        return out

    def _cut(self, window, dtype):
        B, T = self.positions.shape
        rows_at_once = HALF_ROWS_AT_ONCE if dtype in HALF else ROWS_AT_ONCE
        if self.span is not None or self.counts is None:
            rows_at_once = B  # all read the same slots
        blocks = []
        for first in range(0, B, rows_at_once):
            rows = slice(first, min(first + rows_at_once, B))
            start, stop = self._keys_of(rows, window)
            scores = (rows.stop - first) * self.heads * (stop - start)  # of one query a row
            queries_at_once = max(1, SCORES_AT_ONCE // scores)
            for query in range(0, T, queries_at_once):
                queries = slice(query, min(query + queries_at_once, T))
                mask = visibility(self.positions[rows, queries], start, stop, window)
                blocks.append(Block(rows, queries, slice(start, stop), mask))
        return blocks

    def _keys_of(self, rows, window):
        """(first slot, slot behind the last) of the keys that these rows may read. A span holds for
        any lengths: it is what a captured step reads."""
        if self.span is not None:
            return 0, self.span
        T = self.positions.shape[1]
        if self.counts is None:
            return 0, T
        counts = self.counts[rows]
        start = 0 if window is None else max(0, int(counts.min()) + 1 - window)
        return start, int(counts.max()) + T


# ------------------------------------------------------------------------------------------- flash


class Flash(Tiled):
    """Flash attention (arXiv 2307.08691) by PyTorch's own kernel: no scores are stored or rounded,
    and each row reads its own slots alone. How many these are is read on the device, so that a
    captured step holds for rows of any length. Where a gradient is wanted, a pass is Tiled.

    Each (row, key/value head) of the cache is a sequence of its own among those that the kernel
    takes: its keys are the row's slots of that head, of which the kernel reads the first `used`;
    its queries are the last positions in them."""
    own_lengths = True

    def __init__(self, config, positions, cache=None, span=None):
        super().__init__(config, positions, cache, span)
        B = len(positions)
        K = config.num_key_value_heads
        self.numbers = torch.arange(B * K + 1, dtype=torch.int32, device=positions.device)
        self.starts = {}  # length of a sequence -> where each one begins (B * K + 1,)
        used = positions[:, -1:] + 1  # (B, 1)
        self.used = used.expand(B, K).flatten().to(torch.int32)

    def __call__(self, q, k, v, window, sinks=None):
        wants_gradient = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad)
        if q.dtype not in HALF or wants_gradient:
            return super().__call__(q, k, v, window, sinks)
        B, T, H, D = q.shape
        K, slots = k.shape[1:3]
        G = H // K
        q = q.view(B, T, K, G, D).transpose(1, 2)  # (B, K, T, G, D)

        # In a decode step the G heads see the same keys. As G queries of one head they read them
        # once, not G times; no query is behind another then.
        folded = T == 1 and window is None
        queries = G if folded else T
        heads = 1 if folded else G
        out, logsumexp = torch.ops.aten._flash_attention_forward(
            q.reshape(B * K * queries, heads, D),
            k[:B].reshape(B * K * slots, 1, D),
            v[:B].reshape(B * K * slots, 1, D),
            self._starts_of(queries),
            self._starts_of(slots),
            queries,
            slots,
            0.0,         # dropout
            not folded,  # causal: the last query sees all `used` keys, the one before it one less
            False,       # no debug mask
            scale=D ** -0.5,
            window_size_left=-1 if window is None else window - 1,
            window_size_right=-1 if folded else 0,
            seqused_k=self.used)[:2]

        out = out.view(B, K, T, G, D)
        if sinks is not None:
            logsumexp = logsumexp.T.reshape(B, K, T, G)
            left = torch.sigmoid(logsumexp - sinks.view(K, 1, G).float())  # see attend
            out = (out * left[..., None]).to(out.dtype)
        return out.transpose(1, 2).reshape(B, T, H * D)

    def _starts_of(self, length):
        if length not in self.starts:
            self.starts[length] = self.numbers * length
        return self.starts[length]


@torch.inference_mode()
def fault_of_flash(config, device, dtype):
    """What is wrong with Flash on this device for a model's heads, in words; None if it gives what
    `attend` gives in float32: on ragged rows of 1 to 300 slots, for a decode step, a check and a
    prefill, with the model's windows and sinks, and NaN in the dead slots. A fraction of a
    second."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(shape, generator=generator).to(device, dtype)

    held = torch.tensor([0, 1, 62, 63, 64, 127, 128, 200, 255, 260], device=device)
    slots = torch.arange(320, device=device)
    H, K, D = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    k = random(len(held), K, len(slots), D)
    v = random(len(held), K, len(slots), D)
    sinks = random(H) if config.model_type == "gpt_oss" else None
    for T in (1, 4, 40):
        q = 2 * random(len(held), T, H, D)
        positions = held[:, None] + torch.arange(T, device=device)
        dead = (slots >= held[:, None] + T)[:, None, :, None]
        poisoned = [part.masked_fill(dead, torch.nan) for part in (k, v)]
        for window in set(config.windows):
            mask = visibility(positions, 0, len(slots), window)
            exact = attend(q.float(), k.float(), v.float(), mask, sinks)
            try:
                found = Flash(config, positions)(q, *poisoned, window, sinks).float()
            except (AttributeError, RuntimeError, TypeError) as error:
                reason = str(error).splitlines() or [type(error).__name__]
                return f"flash fails here: {reason[0][:200]}"
            off = (found - exact).norm(dim=-1) / exact.norm(dim=-1)  # (B, T)
            worst = off.nan_to_num(nan=torch.inf).max().item()
            if worst > LARGEST_FAULT:
                return f"flash differs here by {worst:.2g} of its norm: {T} positions, {window=}"
    return None


# ----------------------------------------------------------------------------------------- experts


def few_experts(experts, x, weights, chosen):
    """model.MoE.mix without waiting for the device, for a decode step and other passes of few
    tokens: every expert computes all of them. Nearly all weights are read anyway; this way none are
    copied, and no size depends on the router, so that a step can be captured."""
    B, T, hidden = x.shape
    x = x.flatten(0, 1)  # (N, hidden)
    weights = weights.flatten(0, 1)
    chosen = chosen.flatten(0, 1)
    if T > 1 and len(x) > FEW_TOKENS:
        return experts(x, weights, chosen).view(B, T, hidden)
    E = len(experts.down_proj)
    share = x.new_zeros(len(x), E).scatter(1, chosen, weights)  # (N, E), 0 where not chosen
    x = x.expand(E, -1, -1)
    gate_up = torch.baddbmm(experts.gate_up_proj_bias[:, None], x, experts.gate_up_proj)
    y = torch.baddbmm(experts.down_proj_bias[:, None], experts.swiglu(gate_up), experts.down_proj)
    return torch.einsum("ne,enh->nh", share, y).view(B, T, hidden)
