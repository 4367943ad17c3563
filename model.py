"""The frozen reasoning model (section 5): Qwen2, Qwen3, Llama and GPT-OSS decoders by hand, from
safetensors.

    model = load("directory or Hub id", device="cpu", dtype=torch.float32)
    hidden = model(ids)                  # (B, T) -> (B, T, hidden) after the final norm, no cache
    logits = model.logits(hidden)        # (B, T, vocab)

The file reads bottom-up: positions, attention, feed-forward, layer, decoder. Modules are named as
checkpoints name them. Reading config.json and the weights is plumbing/checkpoint.py's work.

Letters: B rows, T new positions, S keys, H query heads, K key/value heads, G = H / K, D head_dim,
E experts.
"""
import math

import torch
import torch.nn.functional as F
from torch import nn

from kvcache import KVCache
from lora import Linear
from plumbing import memory
from plumbing.checkpoint import find_folder, parameter_bytes, read_config, read_weights


def rope_frequencies(config):
    """RoPE's inverse frequencies (D / 2,) float32 and the factor on cos and sin."""
    rope = config.rope
    D = config.head_dim
    exponents = torch.arange(0, D, 2, dtype=torch.int64, device="cpu").to(torch.float32) / D
    powers = float(rope["rope_theta"]) ** exponents
    if rope["rope_type"] == "yarn":
        return yarn_frequencies(powers, rope, D), yarn_scale(config)
    if rope["rope_type"] == "llama3":
        return llama3_frequencies(1.0 / powers, rope), 1.0
    return 1.0 / powers, 1.0


def yarn_frequencies(powers, rope, D):
    """YaRN (arXiv 2309.00071): a dimension that turns often within the original context keeps its
    frequency, one that turns seldom is slowed down by `factor`, those between are interpolated.
    powers (D / 2,): the inverse of the frequencies as they were."""
    theta = float(rope["rope_theta"])

    def dimension_that_turns(turns):
        """The (fractional) dimension that turns so many times within the original context."""
        original = rope["original_max_position_embeddings"]
        return D * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low = dimension_that_turns(rope["beta_fast"])
    high = dimension_that_turns(rope["beta_slow"])
    if rope["truncate"]:
        low = math.floor(low)
        high = math.ceil(high)
    low = max(low, 0)
    high = min(high, D - 1)
    index = torch.arange(D // 2, dtype=torch.float32, device="cpu")
    slowed = ((index - low) / max(high - low, 0.001)).clamp(0, 1)  # 0: as it was, 1: by `factor`
    return slowed / (rope["factor"] * powers) + (1 - slowed) / powers


def yarn_scale(config):
    """YaRN's factor on cos and sin."""
    rope = config.rope
    scale = rope.get("attention_factor")
    if not scale:
        scale = 0.1 * math.log(rope["factor"]) + 1.0 if rope["factor"] > 1 else 1.0
    if config.apply_attn_factor:
        scale *= rope.get("attn_factor", 1.0)
    return scale


def llama3_frequencies(frequencies, rope):
    """Llama 3.1's variant: what turns `high_freq_factor` times or more within the original context
    keeps its frequency, what turns `low_freq_factor` times or less is slowed down by `factor`."""
    low = rope["low_freq_factor"]
    high = rope["high_freq_factor"]
    turns = rope["original_max_position_embeddings"] / (2 * math.pi / frequencies)
    kept = ((turns - low) / (high - low)).clamp(0, 1)  # 1: as it was, 0: slowed by `factor`
    return (1 - kept) * frequencies / rope["factor"] + kept * frequencies


class Positions:
    """Where T new positions of B rows stand. Made once a pass, read by every layer.

    positions (B, T): absolute. slots (B, K, T): where their keys and values go in the cache.
    cos, sin (B, T, 1, D): RoPE's angles. attend: the attention of this pass (see Attend).
    """

    def __init__(self, model, positions, dtype, cache=None, span=None):
        self.positions = positions
        self.slots = None if cache is None else cache.slots(positions.shape[1])
        self.attend = model.attend(model.config, positions, cache, span)

        angles = positions[..., None, None].float() * model.frequencies  # (B, T, 1, D / 2)
        cos = (angles.cos() * model.rope_scale).to(dtype)
        sin = (angles.sin() * model.rope_scale).to(dtype)
        self.cos = torch.cat((cos, cos), -1)
        self.sin = torch.cat((-sin, sin), -1)

    def rotate(self, x):
        """RoPE on halves: x (B, T, heads, D)."""
        half = x.shape[-1] // 2
        return torch.addcmul(x * self.cos, x.roll(half, -1), self.sin)


class Attend:
    """The attention of one pass by its definition: every query over all slots up to the longest
    row's end, under a mask. engine/attention.py has faster ones that are made and called alike.

    One rule says what a query sees: the keys at or before its own position, within its window. New
    positions follow their row's length directly, so a dead slot is never at or before a query.
    """
    own_lengths = False  # whether rows read their own slots alone, whatever `span` says

    def __init__(self, config, positions, cache=None, span=None):
        """positions (B, T) absolute; without a cache the pass stands alone. span: the slots
        0..span-1 are read; None: as few as the rows' lengths allow."""
        if span is None:
            held = 0 if cache is None else cache.longest
            span = held + positions.shape[1]
        self.masks = {}  # window -> (B, T, span)
        for window in set(config.windows):
            self.masks[window] = visibility(positions, 0, span, window)

    def __call__(self, q, k, v, window, sinks=None):
        """q (B, T, H, D), k and v (B or more, K, slots, D) -> (B, T, H * D). (Where rows have left
        a cache, its buffers still hold them, behind the B.)"""
        mask = self.masks[window]
        B, _, span = mask.shape
        return attend(q, k[:B, :, :span], v[:B, :, :span], mask, sinks)


def visibility(positions, start, stop, window):
    """The mask (B, T, stop - start) float32 of queries at `positions` (B, T) over keys
    start..stop-1."""
    keys = torch.arange(start, stop, device=positions.device)
    queries = positions[..., None]
    unseen = keys > queries
    if window is not None:
        unseen = unseen | (keys <= queries - window)
    zeros = torch.zeros(unseen.shape, device=positions.device)
    return zeros.masked_fill_(unseen, -math.inf)  # added: many times faster than filling scores


def attend(q, k, v, mask, sinks=None):
    """Grouped-query attention, scores and softmax in float32.
    q (B, T, H, D), k and v (B, K, S, D), mask (B, T, S) added to the scores -> (B, T, H * D).

    sinks (H,): one more logit a head that joins the softmax and is then dropped (GPT-OSS), which
    multiplies the weights on the keys by sigmoid(logsumexp(scores) - sink)."""
    B, T, H, D = q.shape
    K = k.shape[1]
    G = H // K
    q = q.view(B, T, K, G, D).permute(0, 2, 3, 1, 4).reshape(B, K, G * T, D)
    # Never rounded to bfloat16: the biases of Qwen2's q and k make scores of thousands.
    scores = (q.float() @ k.float().transpose(-1, -2)).view(B, K, G, T, -1)
    scores = torch.add(mask[:, None, None], scores, alpha=D ** -0.5)
    weights = scores.softmax(-1)
    if sinks is not None:
        sinks = sinks.view(K, G, 1, 1).float()
        weights = weights * torch.sigmoid(scores.logsumexp(-1, keepdim=True) - sinks)
    out = weights.to(v.dtype).view(B, K, G * T, -1) @ v  # (B, K, G * T, D)
    return out.view(B, K, G, T, D).permute(0, 3, 1, 2, 4).reshape(B, T, H * D)


class RMSNorm(nn.Module):
    """x / rms(x) * weight. GPT-OSS rounds to the model's dtype after it has multiplied by the
    weight, the others before (this shows in half precision only)."""

    def __init__(self, size, config):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = config.rms_norm_eps
        self.round_first = config.model_type != "gpt_oss"

    def forward(self, x):
        if self.round_first and x.dtype != torch.float32:
            return F.rms_norm(x, self.weight.shape, eps=self.eps) * self.weight
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class Attention(nn.Module):
    """Self-attention of one layer, with Qwen3's norms a head, or GPT-OSS's sinks and window."""

    def __init__(self, config, layer):
        super().__init__()
        hidden = config.hidden_size
        H = config.num_attention_heads
        K = config.num_key_value_heads
        D = config.head_dim
        qwen3 = config.model_type == "qwen3"
        gpt_oss = config.model_type == "gpt_oss"
        biased = config.model_type in ("qwen2", "gpt_oss")
        self.layer = layer
        self.head_dim = D
        self.window = config.windows[layer]
        self.q_proj = Linear(hidden, H * D, bias=biased)
        self.k_proj = Linear(hidden, K * D, bias=biased)
        self.v_proj = Linear(hidden, K * D, bias=biased)
        self.o_proj = Linear(H * D, hidden, bias=gpt_oss)
        self.q_norm = RMSNorm(D, config) if qwen3 else nn.Identity()
        self.k_norm = RMSNorm(D, config) if qwen3 else nn.Identity()
        self.sinks = nn.Parameter(torch.zeros(H)) if gpt_oss else None

    def forward(self, x, positions, cache=None, adapter=None):
        q = self.q_proj(x, adapter).unflatten(-1, (-1, self.head_dim))  # (B, T, H, D)
        k = self.k_proj(x, adapter).unflatten(-1, (-1, self.head_dim))  # (B, T, K, D)
        v = self.v_proj(x, adapter).unflatten(-1, (-1, self.head_dim))
        q = positions.rotate(self.q_norm(q))
        k = positions.rotate(self.k_norm(k)).transpose(1, 2)  # (B, K, T, D)
        v = v.transpose(1, 2)
        if cache is not None:
            k, v = cache.write(self.layer, positions.slots, k, v)  # all slots of the layer

        out = positions.attend(q, k, v, self.window, self.sinks)  # (B, T, H * D)
        return self.o_proj(out, adapter)


class MLP(nn.Module):
    """The gated feed-forward of Qwen and Llama."""

    def __init__(self, config):
        super().__init__()
        hidden = config.hidden_size
        inner = config.intermediate_size
        self.gate_proj = Linear(hidden, inner, bias=False)
        self.up_proj = Linear(hidden, inner, bias=False)
        self.down_proj = Linear(inner, hidden, bias=False)

    def forward(self, x, adapter=None):
        gate = F.silu(self.gate_proj(x, adapter))
        up = self.up_proj(x, adapter)
        return self.down_proj(gate * up, adapter)


class Experts(nn.Module):
    """GPT-OSS's expert weights, [E, in, out]; even columns of gate_up are the gate, odd ones up."""

    def __init__(self, config):
        super().__init__()
        E = config.experts
        hidden = config.hidden_size
        inner = config.intermediate_size
        self.limit = config.swiglu_limit
        self.alpha = config.swiglu_alpha
        self.gate_up_proj = nn.Parameter(torch.empty(E, hidden, 2 * inner))
        self.gate_up_proj_bias = nn.Parameter(torch.zeros(E, 2 * inner))
        self.down_proj = nn.Parameter(torch.empty(E, inner, hidden))
        self.down_proj_bias = nn.Parameter(torch.zeros(E, hidden))

    def swiglu(self, gate_up):
        """(up + 1) * gate * sigmoid(alpha * gate) of gate and up in turns, both clamped."""
        gate = gate_up[..., ::2].clamp(max=self.limit)
        up = gate_up[..., 1::2].clamp(-self.limit, self.limit)
        return (up + 1) * gate * torch.sigmoid(self.alpha * gate)

    def forward(self, x, weights, chosen):
        """The weighted sum of the chosen experts: x (N, hidden), weights and chosen (N, k)."""
        out = torch.zeros_like(x)
        E = len(self.down_proj)
        chosen = chosen.flatten()
        by_expert = chosen.argsort(stable=True)  # numbers of (token, rank), flat
        counts = chosen.new_zeros(E).scatter_add_(0, chosen, torch.ones_like(chosen))
        for e, places in enumerate(by_expert.split(counts.tolist())):  # one wait for the device
            row = places // weights.shape[1]
            gate_up = torch.addmm(self.gate_up_proj_bias[e], x[row], self.gate_up_proj[e])
            y = torch.addmm(self.down_proj_bias[e], self.swiglu(gate_up), self.down_proj[e])
            out.index_add_(0, row, y * weights.flatten()[places, None])
        return out


class MoE(nn.Module):
    """GPT-OSS's feed-forward: the router's top k logits and their softmax. No adapter reaches
    it."""

    def __init__(self, config):
        super().__init__()
        self.per_token = config.experts_per_token
        self.router = nn.Linear(config.hidden_size, config.experts)
        self.experts = Experts(config)

    def forward(self, x, adapter=None):
        top, chosen = self.router(x).topk(self.per_token, dim=-1)  # (B, T, k)
        return self.mix(x, top.softmax(-1), chosen)

    def mix(self, x, weights, chosen):
        """The chosen experts' weighted sum (B, T, hidden): x (B, T, hidden), weights and chosen
        (B, T, k). engine/attention.py has a way without waiting, for few tokens."""
        mixed = self.experts(x.flatten(0, 1), weights.flatten(0, 1), chosen.flatten(0, 1))
        return mixed.view_as(x)


class Layer(nn.Module):
    """One decoder block, pre-norm, residual."""

    def __init__(self, config, layer):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config)
        self.mlp = MoE(config) if config.experts else MLP(config)

    def forward(self, x, positions, cache=None, adapter=None):
        x = x + self.self_attn(self.input_layernorm(x), positions, cache, adapter)
        return x + self.mlp(self.post_attention_layernorm(x), adapter)


class Decoder(nn.Module):
    """A causal language model. An adapter (lora.Adapter) may join a single pass."""
    attend = Attend  # the class of which each pass makes its attention

    def __init__(self, config):
        super().__init__()
        self.config = config
        hidden = config.hidden_size
        self.model = nn.ModuleDict({
            "embed_tokens": nn.Embedding(config.vocab_size, hidden),
            "layers": nn.ModuleList(Layer(config, i) for i in range(config.num_hidden_layers)),
            "norm": RMSNorm(hidden, config)})
        if config.reward:
            self.score = nn.Sequential(nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, 2))
        else:
            self.lm_head = nn.Linear(hidden, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        for name, module in self.named_modules():
            module.name = name  # by which a Linear finds its pair in an adapter
        frequencies, self.rope_scale = rope_frequencies(config)
        self.register_buffer("frequencies", frequencies, persistent=False)

    @property
    def device(self):
        """Where the weights are."""
        return self.frequencies.device

    def new_cache(self, rows, capacity):
        """An empty KVCache of `rows` rows of at most `capacity` positions, in the model's dtype."""
        config = self.config
        weight = self.model.embed_tokens.weight
        return KVCache(config.num_hidden_layers, rows, config.num_key_value_heads, capacity,
                       config.head_dim, weight.device, weight.dtype)

    def forward(self, ids, cache=None, *, adapter=None):
        """Hidden states (B, T, hidden) after the final norm.

        ids: token ids (B, T) int64, or input embeddings (B, T, hidden). With a cache the T
        positions follow each row's length and are appended to it."""
        if cache is None:
            return self.run(ids, adapter=adapter)
        hidden = self.run(ids, cache, adapter=adapter)
        cache.advance(ids.shape[1])
        return hidden

    def run(self, ids, cache=None, span=None, *, adapter=None):
        """`forward` without advancing the cache: what Check runs. span: for CUDA graphs alone; they
        read the slots 0..span-1 whatever the rows' lengths (engine/cuda_graph.py)."""
        x = ids if ids.is_floating_point() else self.model.embed_tokens(ids)
        B, T, _ = x.shape
        positions = torch.arange(T, device=x.device).expand(B, T)
        if cache is not None:
            positions = positions + cache.lengths[:, None]
        positions = Positions(self, positions, x.dtype, cache, span)
        for layer in self.model.layers:
            x = layer(x, positions, cache, adapter)
        return self.model.norm(x)

    def logits(self, hidden):
        """Next-token logits (..., vocab) of hidden states (..., hidden); a reward model's are
        (..., 2): bad, good."""
        return self.score(hidden) if self.config.reward else self.lm_head(hidden)


def load(path, device="cpu", dtype=torch.float32, apply_attn_factor=False):
    """The Decoder of a checkpoint, a local directory or a Hub id: frozen, in `dtype`, on `device`.

    Raises ValueError on a missing, unexpected or wrongly shaped tensor, naming it, its file and
    both shapes, and on a model whose weights do not fit the device's free memory.
    apply_attn_factor: of R1-0528-Qwen3-8B; transformers ignores it, vLLM does not (Config)."""
    folder = find_folder(path)
    config = read_config(folder, apply_attn_factor)
    with torch.device("meta"):
        model = Decoder(config)
    shapes = {name: tuple(weight.shape) for name, weight in model.named_parameters()}
    memory.require_weights(folder, parameter_bytes(shapes, dtype), device)
    weights = read_weights(folder, config, shapes, device, dtype)
    weights = {name: nn.Parameter(weight) for name, weight in weights.items()}
    if config.tie_word_embeddings:  # one Parameter under both names stays tied
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    model.load_state_dict(weights, assign=True)
    return model.requires_grad_(False).to(device)
