"""A plain decoder and check for single prefixes: the reference, and each known mistake.

One masked pass over the prefix and the m [STOP] vectors, without a cache, as clauses D1 to C9 of
oracle/README.md say, and a place for each mistake. Without one, and in float64, it computes the
expected numbers, so that their own rounding is no part of them.
"""
import math

import torch
import torch.nn.functional as F

from model import rope_frequencies

LAST = 4               # hidden states are shown at the last so many positions of a prefix
QUERIES_AT_ONCE = 512  # so that long prefixes need little memory

# {key: what is wrong}, in the order of computation
DECODER = {
    "bfloat16-weights": "the weights are rounded to bfloat16",
    "bfloat16-residual": "the residual stream is kept in bfloat16",
    "bfloat16-cache": "keys and values are kept in bfloat16",
    "bfloat16-positions": "positions are rounded to bfloat16",
    "mxfp4-nibbles": "MXFP4: the high half of a byte is taken first",
    "mxfp4-scale": "MXFP4: scales of 2 ** (byte - 128), half of what they are",
    "embedding-scaled": "embeddings are multiplied by sqrt(hidden)",
    "eps": "RMSNorm with another eps",
    "norm-plus-one": "RMSNorm multiplies by 1 + weight",
    "layer-norm": "the mean is subtracted before normalising",
    "post-norm-missing": "the norm before the feed-forward is missing",
    "qkv-bias": "the biases of q, k and v are missing",
    "o-bias": "the bias of o_proj is missing",
    "qk-norm": "q_norm and k_norm are missing",
    "qk-norm-late": "q_norm and k_norm come after RoPE",
    "rope-missing": "RoPE is missing",
    "rope-pairs": "RoPE turns neighbouring pairs instead of halves",
    "rope-sign": "RoPE turns the other way",
    "theta": "RoPE with theta 10000 instead of the config's",
    "yarn": "YaRN is ignored",
    "yarn-length": "YaRN with max_position_embeddings as its original length",
    "yarn-truncate": "YaRN rounds its bounds, though truncate is false",
    "yarn-scale": "YaRN's factor on cos and sin is missing",
    "yarn-scale-once": "YaRN's factor is on the queries only",
    "yarn-linear": "YaRN slows down every dimension",
    "positions-capped": "positions stop at 63",
    "ring-64": "a query sees the last 64 keys only",
    "not-causal": "a query sees the keys behind it too",
    "scale-missing": "attention scores are not scaled",
    "scale-hidden": "attention scores are scaled by hidden ** -0.5",
    "kv-tiled": "query head h reads key head h mod K instead of h // G",
    "sinks": "sinks are ignored",
    "sinks-scaled": "sinks are scaled as the scores are",
    "window-missing": "windows are ignored",
    "window-wide": "windows are one key too wide",
    "window-narrow": "windows are one key too narrow",
    "window-everywhere": "every layer has the window",
    "window-swapped": "the layers with and without a window are exchanged",
    "window-inert": "the sliding_window that is switched off is applied",
    "gate-up-swapped": "gate and up are exchanged",
    "gate-up-halves": "gate and up are taken as halves instead of alternating",
    "gelu": "gelu instead of silu",
    "up-plus-one": "up + 1 is taken as up",
    "clamp": "gate and up are not clamped",
    "gate-clamped-below": "gate is clamped from below too",
    "swish-alpha": "sigmoid(gate) instead of sigmoid(1.702 gate)",
    "router-bias": "the router's bias is missing",
    "router-softmax": "softmax over all experts before the best are taken, not after",
    "router-renormalised": "the chosen experts weigh the same",
    "expert-bias": "the experts' biases are missing",
    "experts-fewer": "one expert too few a token",
    "experts-more": "one expert too many a token",
    "final-norm": "the final norm is missing",
    "states-shifted": "states are shown before each layer, not after",
    "states-normed": "the last layer's states are shown after the final norm"}

SCORE = {
    "lora-everywhere": "LoRA is active on the prefix too",
    "lora-last-prefix": "LoRA is active on the last token of the prefix too",
    "lora-not-first": "LoRA is not active at the first [STOP] position",
    "lora-only-last": "LoRA is active at the last [STOP] position only",
    "lora-off": "LoRA is not active at all, as PEFT's activated LoRA on input embeddings alone",
    "lora-unscaled": "LoRA's factor alpha / r is missing",
    "lora-r-over-alpha": "LoRA's factor is r / alpha",
    "lora-alpha": "LoRA's factor is alpha, not divided by r",
    "lora-sqrt": "LoRA's factor is alpha / sqrt(r)",
    "lora-attention-only": "LoRA is missing in the feed-forward",
    "lora-qv-only": "LoRA is in q_proj and v_proj only",
    "lora-no-o": "LoRA is missing in o_proj",
    "position-high": "[STOP] positions are one too high",
    "position-low": "[STOP] positions are one too low",
    "position-high-window": "[STOP] positions are one too high",
    "position-low-window": "[STOP] positions are one too low",
    "position-same": "all [STOP] tokens stand at one position",
    "position-zero": "[STOP] positions begin at 0",
    "tokens-reversed": "[STOP] vectors in reversed order",
    "tokens-first": "the first [STOP] vector is used for all",
    "tokens-one-fewer": "one [STOP] token too few",
    "tokens-one-more": "one [STOP] token too many",
    "tokens-blind": "[STOP] tokens do not see each other",
    "tokens-see-all": "[STOP] tokens see the later ones too",
    "prefix-short": "the last token of the prefix is missing in the cache",
    "prefix-doubled": "the last token of the prefix is in the cache twice",
    "prefix-first": "the first token of the prefix is missing",
    "check-window": "[STOP] positions see beyond the window",
    "read-first": "the head reads the first [STOP] position",
    "read-mean": "the head reads the mean of the [STOP] positions",
    "read-before-norm": "the head reads the state before the final norm",
    "read-norm-twice": "the final norm is applied twice",
    "head-no-bias": "the head's bias is missing",
    "head-bfloat16": "the head's logits are rounded to bfloat16",
    "score-logit": "the logit is handed in for the chance",
    "score-log": "the logarithm of the chance is handed in",
    "score-bad": "the chance of a bad end is taken for that of a good one",
    "score-one-logit": "sigmoid of one of two logits",
    "score-clipped": "scores are clipped to 0.05 to 0.95",
    "score-rounded": "scores are rounded to two digits",
    "score-bfloat16": "scores are rounded to bfloat16",
    "score-tempered": "the head's logits are divided by 0.6 before the score",
    "score-clamped-15": "the head's logit is clamped before the score",
    "score-clamped-20": "the head's logit is clamped before the score",
    "score-clamped-30": "the head's logit is clamped before the score",
    "score-one-minus": "the score is 1 less the chance of a bad end, which loses small scores"}

# Where a rounding in between can fall either way, so that numbers agree in the main only.
ROUNDED = ("bfloat16-residual", "bfloat16-cache")


# Roundings that a right port may choose: other readings of D5
ACCEPTABLE = {
    "angles-float64": "RoPE's frequencies and angles in float64, not rounded to float32",
    "frequencies-float64": "RoPE's frequencies in float64, angles rounded to float32",
    "frequencies-once-angles-float64":
        "RoPE's frequencies rounded to float32 once, when they are finished; angles in float64",
    "products-float64": "RoPE's angles in float64, of frequencies in float32"}


FLOAT64_ANGLES = ("angles-float64", "frequencies-once-angles-float64", "products-float64")


def bfloat16(x):
    """x rounded to bfloat16, in its own dtype."""
    return x.to(torch.bfloat16).to(x.dtype)


class Port:
    """The decoder and the check for single prefixes, with one mistake, or none (None)."""

    def __init__(self, model, stop, wrong=None, dtype=torch.float32):
        """wrong: a key of DECODER, SCORE or ACCEPTABLE. dtype: what all is computed in."""
        self.config = model.config
        self.wrong = wrong
        self.dtype = dtype
        self.weights = {name: weight.detach().to(dtype) for name, weight in
                        model.named_parameters()}
        self.stop = stop
        self.parts = {name: part.detach().to(dtype) for name, part in stop.weights().items()}
        self.layers = model.config.num_hidden_layers
        self.gpt_oss = model.config.model_type == "gpt_oss"
        if wrong == "bfloat16-weights":
            self.weights = {name: bfloat16(weight) for name, weight in self.weights.items()}
        if wrong in ("mxfp4-nibbles", "mxfp4-scale"):
            self._spoil_mxfp4()
        self.chosen = []  # the experts of each layer, in the last pass
        self.margin = math.inf  # by which the last expert chosen led the next one, at least
        self.frequencies, self.rope_scale = self._rope()
        self.scaling = self._lora_scaling()

    def _spoil_mxfp4(self):
        """Read the experts as a port would that mistakes the packing."""
        if not self.config.quantized:
            return
        for name, weight in self.weights.items():
            if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
                E, inner, out = weight.shape
                pairs = weight.view(E, inner // 2, 2, out)
                swapped = pairs.flip(2).reshape(E, inner, out)
                spoiled = swapped if self.wrong == "mxfp4-nibbles" else weight / 2
                self.weights = self.weights | {name: spoiled}

    def _rope(self):
        config = self.config
        saved = config.rope
        rope = dict(saved)
        if self.wrong == "theta":
            rope["rope_theta"] = 10000.0
        if rope["rope_type"] == "yarn":
            if self.wrong == "yarn":
                rope["rope_type"] = "default"
            elif self.wrong == "yarn-length":
                rope["original_max_position_embeddings"] = config.max_position_embeddings
            elif self.wrong == "yarn-truncate":
                rope["truncate"] = True
        try:
            config.rope = rope
            frequencies, scale = rope_frequencies(config)
        finally:
            config.rope = saved
        if self.wrong in ACCEPTABLE and self.wrong != "products-float64":
            frequencies = self._exact_frequencies(rope)
            if self.wrong.startswith("frequencies-once"):
                frequencies = frequencies.float()
        if self.wrong == "rope-missing":
            frequencies = frequencies * 0
        if self.wrong == "yarn-linear" and rope["rope_type"] == "yarn":
            steps = torch.arange(0, config.head_dim, 2) / config.head_dim
            frequencies = 1 / (rope["factor"] * rope["rope_theta"] ** steps)
        return frequencies, 1.0 if self.wrong == "yarn-scale" else scale

    def _exact_frequencies(self, rope):
        """RoPE's frequencies (D / 2,) in float64, by D5 and D6 once more."""
        D = self.config.head_dim
        theta = float(rope["rope_theta"])
        steps = torch.arange(D // 2, dtype=torch.float64)
        frequencies = theta ** (-2 * steps / D)
        if rope["rope_type"] != "yarn":
            return frequencies
        bounds = []
        for turns in (rope["beta_fast"], rope["beta_slow"]):
            length = rope["original_max_position_embeddings"] / (2 * math.pi * turns)
            bounds.append(D * math.log(length) / (2 * math.log(theta)))
        low, high = bounds
        if rope["truncate"]:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, D - 1)
        slowed = ((steps - low) / (high - low)).clamp(0, 1)
        return frequencies / rope["factor"] * slowed + frequencies * (1 - slowed)

    def _lora_scaling(self):
        alpha = self.stop.lora.alpha
        rank = self.stop.lora.rank
        others = {
            "lora-off": 0.0,
            "lora-unscaled": 1.0,
            "lora-r-over-alpha": rank / alpha,
            "lora-alpha": alpha,
            "lora-sqrt": alpha / math.sqrt(rank)}
        return others.get(self.wrong, alpha / rank)

    # ------------------------------------------------------------------------------- the layers

    def norm(self, x, name):
        eps = self.config.rms_norm_eps
        if self.wrong == "eps":
            eps = 1e-6 if eps > 5e-6 else 1e-5
        if self.wrong == "layer-norm":
            x = x - x.mean(-1, keepdim=True)
        weight = self.weights[name + ".weight"]
        if self.wrong == "norm-plus-one":
            weight = weight + 1
        return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + eps) * weight

    def linear(self, x, name, active):
        """W x + b, and LoRA where it is active (T,)."""
        last = name.rpartition(".")[2]
        bias = self.weights.get(name + ".bias")
        if self.wrong == "qkv-bias" and last in ("q_proj", "k_proj", "v_proj"):
            bias = None
        if self.wrong == "o-bias" and last == "o_proj":
            bias = None
        y = F.linear(x, self.weights[name + ".weight"], bias)
        down = self.parts.get(name + ".lora_A.weight")
        if down is None or active is None or self._without_lora(last):
            return y
        update = F.linear(F.linear(x, down), self.parts[name + ".lora_B.weight"])
        return y + active[:, None] * self.scaling * update

    def _without_lora(self, last):
        """Whether the mistake leaves LoRA out of this linear."""
        if self.wrong == "lora-attention-only":
            return last in ("gate_proj", "up_proj", "down_proj")
        if self.wrong == "lora-qv-only":
            return last not in ("q_proj", "v_proj")
        return self.wrong == "lora-no-o" and last == "o_proj"

    def turns(self, positions):
        """cos and sin (T, 1, D / 2) of RoPE's angles, without YaRN's factor."""
        positions = positions.double()
        if self.wrong == "bfloat16-positions":
            positions = bfloat16(positions)
        angles = positions[:, None, None] * self.frequencies.double()
        if self.wrong not in FLOAT64_ANGLES:
            angles = angles.float()
        angles = angles.to(self.dtype)
        return angles.cos(), angles.sin()

    def rotate(self, x, positions, scale):
        """RoPE: x (T, heads, D)."""
        cos, sin = self.turns(positions)
        cos = cos * scale
        sin = sin * scale
        if self.wrong == "rope-sign":
            sin = -sin
        if self.wrong == "rope-pairs":
            even = x[..., ::2]
            odd = x[..., 1::2]
            turned = torch.stack((even * cos - odd * sin, odd * cos + even * sin), -1)
            return turned.flatten(-2)
        low, high = x.chunk(2, -1)
        return torch.cat((low * cos - high * sin, high * cos + low * sin), -1)

    def attention(self, x, i, places, active):
        config = self.config
        name = f"model.layers.{i}.self_attn"
        T = len(x)
        H = config.num_attention_heads
        K = config.num_key_value_heads
        q = self.linear(x, f"{name}.q_proj", active).view(T, H, -1)
        k = self.linear(x, f"{name}.k_proj", active).view(T, K, -1)
        v = self.linear(x, f"{name}.v_proj", active).view(T, K, -1)
        normed = config.model_type == "qwen3" and self.wrong != "qk-norm"
        late = self.wrong == "qk-norm-late"
        if normed and not late:
            q = self.norm(q, f"{name}.q_norm")
            k = self.norm(k, f"{name}.k_norm")
        q = self.rotate(q, places.positions, self.rope_scale)
        k_scale = 1.0 if self.wrong == "yarn-scale-once" else self.rope_scale
        k = self.rotate(k, places.positions, k_scale)
        if normed and late:
            q = self.norm(q, f"{name}.q_norm")
            k = self.norm(k, f"{name}.k_norm")
        if self.wrong == "bfloat16-cache":
            k = bfloat16(k)
            v = bfloat16(v)
        heads = torch.arange(H)
        source = heads % K if self.wrong == "kv-tiled" else heads // (H // K)
        scale = config.head_dim ** -0.5
        if self.wrong == "scale-missing":
            scale = 1.0
        if self.wrong == "scale-hidden":
            scale = config.hidden_size ** -0.5
        k = k[:, source]
        v = v[:, source]
        parts = []
        for start in range(0, T, QUERIES_AT_ONCE):
            some = slice(start, start + QUERIES_AT_ONCE)
            scores = torch.einsum("thd,shd->hts", q[some], k) * scale
            scores = scores.masked_fill(~places.seen(i, some), -math.inf)
            weights = self._softmax(scores, name, scale)
            parts.append(torch.einsum("hts,shd->thd", weights, v))
        return self.linear(torch.cat(parts).flatten(1), f"{name}.o_proj", active)

    def _softmax(self, scores, name, scale):
        sinks = self.weights.get(name + ".sinks")
        if sinks is None or self.wrong == "sinks":
            return scores.softmax(-1)
        if self.wrong == "sinks-scaled":
            sinks = sinks * scale
        column = sinks[:, None, None].expand(-1, scores.shape[1], 1)
        return torch.cat((scores, column), -1).softmax(-1)[..., :-1]

    def feed_forward(self, x, i, active):
        name = f"model.layers.{i}.mlp"
        if self.gpt_oss:
            return self.experts(x, name)
        gate = self.linear(x, f"{name}.gate_proj", active)
        up = self.linear(x, f"{name}.up_proj", active)
        if self.wrong == "gate-up-swapped":
            gate, up = up, gate
        gate = F.gelu(gate) if self.wrong == "gelu" else F.silu(gate)
        return self.linear(gate * up, f"{name}.down_proj", active)

    def experts(self, x, name):
        config = self.config
        per_token = config.experts_per_token
        if self.wrong == "experts-fewer":
            per_token -= 1
        if self.wrong == "experts-more":
            per_token += 1
        bias = self.weights[f"{name}.router.bias"]
        logits = F.linear(x, self.weights[f"{name}.router.weight"],
                          None if self.wrong == "router-bias" else bias)
        if per_token < logits.shape[-1]:
            best = logits.topk(per_token + 1, -1).values
            self.margin = min(self.margin, (best[:, -2] - best[:, -1]).min().item())
        top, chosen = logits.topk(per_token, -1)
        self.chosen.append(chosen.sort(-1).values)
        shares = top.softmax(-1)
        if self.wrong == "router-softmax":
            shares = logits.softmax(-1).gather(-1, chosen)
        if self.wrong == "router-renormalised":
            shares = torch.full_like(shares, 1 / per_token)
        share = torch.zeros_like(logits).scatter(-1, chosen, shares)  # (T, E)
        with_bias = self.wrong != "expert-bias"
        out = torch.zeros_like(x)
        for e in range(config.experts):
            up_bias = self.weights[f"{name}.experts.gate_up_proj_bias"][e]
            down_bias = self.weights[f"{name}.experts.down_proj_bias"][e]
            gate_up = x @ self.weights[f"{name}.experts.gate_up_proj"][e] + up_bias * with_bias
            y = self._swiglu(gate_up) @ self.weights[f"{name}.experts.down_proj"][e]
            out = out + share[:, e, None] * (y + down_bias * with_bias)
        return out

    def _swiglu(self, gate_up):
        config = self.config
        gate = gate_up[..., ::2]
        up = gate_up[..., 1::2]
        if self.wrong == "gate-up-halves":
            gate, up = gate_up.chunk(2, -1)
        if self.wrong == "gate-up-swapped":
            gate, up = up, gate
        if self.wrong != "clamp":
            low = -config.swiglu_limit if self.wrong == "gate-clamped-below" else -math.inf
            gate = gate.clamp(low, config.swiglu_limit)
            up = up.clamp(-config.swiglu_limit, config.swiglu_limit)
        alpha = 1.0 if self.wrong == "swish-alpha" else config.swiglu_alpha
        if self.wrong == "gelu":
            return (up + 1) * F.gelu(gate)
        shift = 0 if self.wrong == "up-plus-one" else 1
        return (up + shift) * gate * torch.sigmoid(alpha * gate)

    # ------------------------------------------------------------------------------ whole passes

    def stop_vectors(self):
        """The [STOP] vectors (m, hidden) that are fed."""
        vectors = self.parts["tokens"].expand(self.stop.m, -1)
        if self.wrong == "tokens-reversed":
            return vectors.flip(0)
        if self.wrong == "tokens-first":
            return vectors[:1].expand(self.stop.m, -1)
        if self.wrong == "tokens-one-fewer":
            return vectors[:-1]
        if self.wrong == "tokens-one-more":
            return torch.cat((vectors, vectors[-1:]))
        return vectors

    def cached_ids(self, ids):
        """The token ids of a prefix that [STOP] reads."""
        if self.wrong == "prefix-short":
            return ids[:-1]
        if self.wrong == "prefix-doubled":
            return ids + ids[-1:]
        if self.wrong == "prefix-first":
            return ids[1:]
        return ids

    def states(self, ids, vectors):
        """States after each layer, and after the final norm, of token ids and input vectors."""
        x = self.weights["model.embed_tokens.weight"][torch.tensor(ids, dtype=torch.int64)]
        if self.wrong == "embedding-scaled":
            x = x * math.sqrt(self.config.hidden_size)
        if vectors is not None:
            x = torch.cat((x, vectors))
        places = Places(self, len(ids), len(x))
        active = places.lora_active() if vectors is not None else None
        states = []
        for i in range(self.layers):
            name = f"model.layers.{i}"
            before = x
            x = x + self.attention(self.norm(x, f"{name}.input_layernorm"), i, places, active)
            normed = x
            if self.wrong != "post-norm-missing":
                normed = self.norm(x, f"{name}.post_attention_layernorm")
            x = x + self.feed_forward(normed, i, active)
            if self.wrong == "bfloat16-residual":
                x = bfloat16(x)
            states.append(before if self.wrong == "states-shifted" else x)
        hidden = x if self.wrong == "final-norm" else self.norm(x, "model.norm")
        if self.wrong == "states-normed":
            states[-1] = hidden
        return states, hidden

    def rope_table(self, position):
        """(2, D / 2): cos and sin of a position's angles, with YaRN's factor."""
        cos, sin = self.turns(torch.tensor([position]))
        sin = -sin if self.wrong == "rope-sign" else sin
        return torch.cat((cos[0], sin[0])) * self.rope_scale

    def decoder_entry(self, ids):
        """{row: value} of the decoder's level for one prefix."""
        self.chosen = []
        states, hidden = self.states(ids, None)
        head = self.weights.get("lm_head.weight", self.weights["model.embed_tokens.weight"])
        entry = {
            "layers": torch.stack([state[-LAST:] for state in states]),
            "hidden": hidden[-LAST:],
            "next_logits": F.linear(hidden[-1], head)}
        if self.chosen:
            entry["experts"] = [experts[-LAST:].tolist() for experts in self.chosen]
        return entry

    def score_entry(self, ids):
        """{row: value} of the level `score` for a prefix; None where the mistake leaves nothing."""
        vectors = self.stop_vectors()
        cached = self.cached_ids(ids)
        if len(vectors) == 0 or len(cached) == 0:
            return None
        states, hidden = self.states(cached, vectors)
        m = len(vectors)
        layers = torch.stack([state[-m:] for state in states])
        logits = self.head_logits(layers[-1], hidden[-m:])
        return {
            "stop.layers": layers,
            "stop.hidden": hidden[-m:],
            "logits": logits,
            "scores": self.chance(logits)}

    @torch.no_grad()
    def is_firm(self, ids, close):
        """Whether no choice of experts hangs on router logits closer than `close`."""
        self.margin = math.inf
        if self.gpt_oss:
            self.score_entry(ids)
        return self.margin > close

    def head_logits(self, before_norm, after_norm):
        read = after_norm[-1]
        if self.wrong == "read-first":
            read = after_norm[0]
        elif self.wrong == "read-mean":
            read = after_norm.mean(0)
        elif self.wrong == "read-before-norm":
            read = before_norm[-1]
        elif self.wrong == "read-norm-twice":
            read = self.norm(read, "model.norm")
        bias = None if self.wrong == "head-no-bias" else self.parts["head.bias"]
        logits = F.linear(read, self.parts["head.weight"], bias)
        return bfloat16(logits) if self.wrong == "head-bfloat16" else logits

    def chance(self, logits):
        if self.wrong == "score-tempered":
            logits = logits / 0.6
        two = len(logits) == 2
        good = logits.softmax(-1)[1] if two else logits.sigmoid()[0]
        odds = logits[1] - logits[0] if two else logits[0]
        if self.wrong is not None and self.wrong.startswith("score-clamped"):
            limit = int(self.wrong.rpartition("-")[2])
            return odds.clamp(-limit, limit).sigmoid()
        if self.wrong == "score-one-minus":
            return 1 - (-odds).float().sigmoid()
        others = {
            "score-logit": logits[-1],
            "score-log": good.log().clamp(min=-1e30),
            "score-bad": 1 - good,
            "score-one-logit": logits[-1].sigmoid(),
            "score-clipped": good.clamp(0.05, 0.95),
            "score-rounded": (good * 100).round() / 100,
            "score-bfloat16": bfloat16(good)}
        return others.get(self.wrong, good)


class Places:
    """Where the T positions of a pass stand, what they see, and where LoRA is active."""

    def __init__(self, port, prefix, T):
        self.port = port
        self.wrong = port.wrong
        self.prefix = prefix
        self.slots = torch.arange(T)
        self.stops = self.slots >= prefix
        self.positions = self._positions()
        self.masks = {}

    def _positions(self):
        slots = self.slots
        if self.wrong == "positions-capped":
            return slots.clamp(max=63)
        moved = {
            "position-high": slots + 1,
            "position-high-window": slots + 1,
            "position-low": slots - 1,
            "position-low-window": slots - 1,
            "position-same": torch.full_like(slots, self.prefix),
            "position-zero": slots - self.prefix}
        return torch.where(self.stops, moved.get(self.wrong, slots), slots)

    def lora_active(self):
        """(T,) float: 1 where LoRA is active."""
        active = self.stops
        if self.wrong == "lora-everywhere":
            active = torch.ones_like(self.stops)
        elif self.wrong == "lora-last-prefix":
            active = self.slots >= self.prefix - 1
        elif self.wrong == "lora-not-first":
            active = self.slots > self.prefix
        elif self.wrong == "lora-only-last":
            active = self.slots == len(self.slots) - 1
        return active.to(self.port.dtype)

    def window(self, layer):
        """How many keys the layer's queries see, or None."""
        windows = self.port.config.windows
        window = windows[layer]
        known = [size for size in windows if size is not None]
        if self.wrong == "window-missing":
            return None
        if self.wrong == "window-everywhere" and known:
            return known[0]
        if self.wrong == "window-swapped" and known:
            return known[0] if window is None else None
        if self.wrong == "window-inert" and self.port.config.model_type == "qwen2":
            return 6
        if window is None:
            return None
        return window + {"window-wide": 1, "window-narrow": -1}.get(self.wrong, 0)

    def seen(self, layer, some):
        """(queries, T) bool: whether the queries of a slice see a key."""
        window = self.window(layer)
        if (window, some.start) not in self.masks:
            self.masks[window, some.start] = self._seen(window, some)
        return self.masks[window, some.start]

    def _seen(self, window, some):
        queries = self.slots[some, None]
        keys = self.slots[None]
        before = keys <= queries
        stop_queries = self.stops[some, None]
        stop_pairs = stop_queries & self.stops[None]
        if self.wrong == "not-causal":
            before = before | ~self.stops[None]
        if self.wrong == "tokens-see-all":
            before = before | stop_pairs
        if self.wrong == "tokens-blind":
            before = before & ~(stop_pairs & (keys != queries))
        if self.wrong == "ring-64":
            before = before & (keys > queries - 64)
        if window is None:
            return before
        places = queries
        if self.wrong in ("position-high-window", "position-low-window"):
            places = self.positions[some, None]
        near = keys > places - window
        if self.wrong == "check-window":
            near = near | stop_queries
        return before & near
