"""A stranger's port of STOP in plain numpy, from oracle/README.md: it imports nothing of ours.

    python tests/port_numpy.py --out DIR [--cases qwen2,sampler] [--dtype float64] [--inputs DIR]

It reads safetensors by hand, keeps a KV cache a path, and checks on top of it. `wrong` makes one
deliberate change, named by the key of a mistake in oracle/vectors/mistakes: what the tests try
certify with.
"""

import argparse
import json
import math
from fractions import Fraction
from pathlib import Path

import numpy as np

ORACLE = Path(__file__).resolve().parent.parent / "oracle"
F = np.float32  # what it computes in; `compute_in` changes it
MASK = (1 << 64) - 1
NOT_FLOAT = {"U8": np.uint8}


def compute_in(dtype):
    """Whether all is computed in float32 or, RoPE's angles included, in float64."""
    global F
    F = {"float32": np.float32, "float64": np.float64}[dtype]


def bf16(x):
    """Rounded to bfloat16, half to even."""
    bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32).astype(np.uint64)
    bits = (bits + 0x7FFF + ((bits >> np.uint64(16)) & np.uint64(1))) & np.uint64(0xFFFF0000)
    return bits.astype(np.uint32).view(np.float32).reshape(np.shape(x))


def read_safetensors(file):
    raw = file.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + size])
    tensors = {}
    for name, about in header.items():
        if name == "__metadata__":
            continue
        start, stop = about["data_offsets"]
        part = raw[8 + size + start : 8 + size + stop]
        if about["dtype"] == "BF16":
            values = (np.frombuffer(part, np.uint16).astype(np.uint32) << 16).view(np.float32)
        else:
            values = np.frombuffer(part, {"F32": np.float32, "U8": np.uint8}[about["dtype"]])
        tensors[name] = values.reshape(about["shape"])
    return tensors


CODES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6], F)


def unpack(blocks, scales, w):
    """MXFP4 -> (experts, in, out)."""
    low = CODES[blocks & 15]
    high = CODES[blocks >> 4]
    pair = (high, low) if w == "mxfp4-nibbles" else (low, high)
    bias = 128 if w == "mxfp4-scale" else 127
    values = np.stack(pair, -1).reshape(*scales.shape, 32)
    values = values * (F(2) ** (scales.astype(F) - bias))[..., None]
    return values.reshape(*values.shape[:2], -1).transpose(0, 2, 1).astype(F)


def sigmoid(x):
    with np.errstate(over="ignore"):
        return (1 / (1 + np.exp(-x))).astype(F)


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


SCORED_OTHERWISE = ("score-clamped-15", "score-clamped-20", "score-clamped-30", "score-one-minus")


class Model:
    def __init__(self, folder, stop, wrong=None):
        self.w = wrong
        self.c = c = json.loads((folder / "config.json").read_text())
        self.kind = c["model_type"]
        tensors = {}
        for file in sorted(folder.glob("*.safetensors")):
            tensors |= read_safetensors(file)
        for name in [name for name in tensors if name.endswith("_blocks")]:
            base = name.removesuffix("_blocks")
            tensors[base] = unpack(tensors.pop(name), tensors.pop(base + "_scales"), wrong)
        if wrong == "bfloat16-weights":
            tensors = {name: bf16(tensor) for name, tensor in tensors.items()}
        self.t = {name: tensor.astype(F) for name, tensor in tensors.items()}
        self.H = c["num_attention_heads"]
        self.K = c["num_key_value_heads"]
        self.D = c.get("head_dim") or c["hidden_size"] // self.H
        self.N = c["num_hidden_layers"]
        self.s = stop
        self.st = {name: np.array(value, F) for name, value in stop["tensors"].items()}
        self.rope()

    def rope(self):
        c = self.c
        w = self.w
        theta = 10000.0 if w == "theta" else float(c["rope_theta"])
        half = np.arange(self.D // 2)
        f = 1 / theta ** (2 * half / self.D)
        self.rscale = 1.0
        y = c.get("rope_scaling")
        if y and w != "yarn":
            o = y["original_max_position_embeddings"]
            if w == "yarn-length":
                o = c["max_position_embeddings"]
            low, high = [
                self.D * math.log(o / (b * 2 * math.pi)) / (2 * math.log(theta))
                for b in (y["beta_fast"], y["beta_slow"])
            ]
            if w == "yarn-truncate":
                low, high = math.floor(low), math.ceil(high)
            low, high = max(low, 0), min(high, self.D - 1)
            ramp = np.clip((half - low) / max(high - low, 1e-3), 0, 1)
            if w == "yarn-linear":
                ramp = np.ones_like(ramp)
            f = f / y["factor"] * ramp + f * (1 - ramp)
            self.rscale = 1.0 if w == "yarn-scale" else 0.1 * math.log(y["factor"]) + 1
        self.f = f.astype(F) * (w != "rope-missing")

    def norm(self, x, name):
        eps = self.c["rms_norm_eps"]
        if self.w == "eps":
            eps = {1e-6: 1e-5, 1e-5: 1e-6}[eps]
        if self.w == "layer-norm":
            x = x - x.mean(-1, keepdims=True)
        g = self.t[name + ".weight"] + F(self.w == "norm-plus-one")
        return (x / np.sqrt((x * x).mean(-1, keepdims=True) + F(eps)) * g).astype(F)

    def lin(self, x, name, on):
        short = name.split(".")[-1]
        y = x @ self.t[name + ".weight"].T
        drop = {"qkv-bias": ("q_proj", "k_proj", "v_proj"), "o-bias": ("o_proj",)}.get(self.w, ())
        if name + ".bias" in self.t and short not in drop:
            y = y + self.t[name + ".bias"]
        a = self.st.get(name + ".lora_A.weight")
        skip = {
            "lora-attention-only": ("gate_proj", "up_proj", "down_proj"),
            "lora-no-o": ("o_proj",),
            "lora-qv-only": ("k_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
        }
        if a is None or on is None or short in skip.get(self.w, ()):
            return y
        r = self.s["rank"]
        alpha = self.s["alpha"]
        z = {
            "lora-off": 0,
            "lora-unscaled": 1,
            "lora-r-over-alpha": r / alpha,
            "lora-alpha": alpha,
            "lora-sqrt": alpha / r**0.5,
        }.get(self.w, alpha / r)
        return y + F(z) * on[:, None] * ((x @ a.T) @ self.st[name + ".lora_B.weight"].T)

    def turn(self, x, pos, scale):
        if self.w == "bfloat16-positions":
            pos = bf16(pos)
        ang = pos.astype(F)[:, None, None] * self.f
        cos = np.cos(ang) * F(scale)
        sin = np.sin(ang) * F(scale) * (-1 if self.w == "rope-sign" else 1)
        if self.w == "rope-pairs":
            out = np.empty_like(x)
            out[..., ::2] = x[..., ::2] * cos - x[..., 1::2] * sin
            out[..., 1::2] = x[..., 1::2] * cos + x[..., ::2] * sin
            return out
        a, b = np.split(x, 2, -1)
        return np.concatenate((a * cos - b * sin, b * cos + a * sin), -1)

    def win(self, i):
        size = self.c.get("sliding_window")
        if self.kind == "gpt_oss":
            has = self.c["layer_types"][i] == "sliding_attention"
            has = {
                "window-missing": False,
                "window-everywhere": True,
                "window-swapped": not has,
            }.get(self.w, has)
            size = size + {"window-wide": 1, "window-narrow": -1}.get(self.w, 0)
            return size if has else None
        return size if self.w == "window-inert" and self.kind == "qwen2" else None

    def attend(self, x, i, cache, pos, on, stops):
        """x (T, hidden) behind the cache's rows; stops (T,) bool."""
        p = f"model.layers.{i}.self_attn."
        T = len(x)
        q = self.lin(x, p + "q_proj", on).reshape(T, self.H, self.D)
        k = self.lin(x, p + "k_proj", on).reshape(T, self.K, self.D)
        v = self.lin(x, p + "v_proj", on).reshape(T, self.K, self.D)
        qk = self.kind == "qwen3" and self.w != "qk-norm"
        if qk and self.w != "qk-norm-late":
            q, k = self.norm(q, p + "q_norm"), self.norm(k, p + "k_norm")
        q = self.turn(q, pos, self.rscale)
        k = self.turn(k, pos, 1.0 if self.w == "yarn-scale-once" else self.rscale)
        if qk and self.w == "qk-norm-late":
            q, k = self.norm(q, p + "q_norm"), self.norm(k, p + "k_norm")
        if self.w == "bfloat16-cache":
            k, v = bf16(k), bf16(v)
        n = len(cache[i][0])
        cache[i] = [
            np.concatenate((old, new)) for old, new in zip(cache[i], (k, v, stops[:, None]))
        ]
        k, v, kstop = cache[i]
        S = len(k)
        rep = self.H // self.K
        if self.w == "kv-tiled":
            k, v = np.tile(k, (1, rep, 1)), np.tile(v, (1, rep, 1))
        else:
            k, v = np.repeat(k, rep, 1), np.repeat(v, rep, 1)
        scale = {"scale-missing": 1, "scale-hidden": self.c["hidden_size"] ** -0.5}.get(
            self.w, self.D**-0.5
        )
        out = np.empty((T, self.H, self.D), F)
        for a in range(0, T, 256):
            b = min(a + 256, T)
            sc = np.einsum("thd,shd->hts", q[a:b], k, optimize=True) * F(scale)
            seen = self.seen(
                i, np.arange(n + a, n + b), np.arange(S), pos[a:b], stops[a:b], kstop[:, 0]
            )
            sc[:, ~seen] = -np.inf
            sink = self.t.get(p + "sinks")
            if sink is not None and self.w != "sinks":
                col = np.broadcast_to(
                    sink[:, None, None] * F(scale if self.w == "sinks-scaled" else 1),
                    (self.H, b - a, 1),
                )
                pr = softmax(np.concatenate((sc, col), -1))[..., :-1]
            else:
                pr = softmax(sc)
            out[a:b] = np.einsum("hts,shd->thd", pr, v, optimize=True)
        return self.lin(out.reshape(T, -1), p + "o_proj", on)

    def seen(self, i, qs, ks, pos, qstop, kstop):
        w = self.w
        ok = ks[None] <= qs[:, None]
        both = qstop[:, None] & kstop[None]
        if w == "not-causal":
            ok = ok | ~kstop[None]
        if w == "tokens-see-all":
            ok = ok | both
        if w == "tokens-blind":
            ok = ok & ~(both & (ks[None] != qs[:, None]))
        if w == "ring-64":
            ok = ok & (qs[:, None] - ks[None] < 64)
        size = self.win(i)
        if size is None:
            return ok
        base = pos if w in ("position-high-window", "position-low-window") else qs
        near = base[:, None] - ks[None] < size
        if w == "check-window":
            near = near | qstop[:, None]
        return ok & near

    def ffn(self, x, i, on):
        p = f"model.layers.{i}.mlp."
        w = self.w
        if self.kind != "gpt_oss":
            g, u = self.lin(x, p + "gate_proj", on), self.lin(x, p + "up_proj", on)
            if w == "gate-up-swapped":
                g, u = u, g
            return self.lin((gelu(g) if w == "gelu" else g * sigmoid(g)) * u, p + "down_proj", on)
        r = x @ self.t[p + "router.weight"].T
        if w != "router-bias":
            r = r + self.t[p + "router.bias"]
        k = self.c["num_experts_per_tok"] + {"experts-fewer": -1, "experts-more": 1}.get(w, 0)
        best = np.argsort(-r, -1, kind="stable")[:, :k]
        self.chosen.append(np.sort(best, -1))
        share = softmax(np.take_along_axis(r, best, -1))
        if w == "router-softmax":
            share = np.take_along_axis(softmax(r), best, -1)
        if w == "router-renormalised":
            share = np.full_like(share, 1 / k)
        e = p + "experts."
        out = np.zeros_like(x)
        for n in range(self.c["num_local_experts"]):
            at, rank = np.nonzero(best == n)
            bias = F(w != "expert-bias")
            h = x[at] @ self.t[e + "gate_up_proj"][n] + bias * self.t[e + "gate_up_proj_bias"][n]
            g, u = h[:, ::2], h[:, 1::2]
            if w == "gate-up-halves":
                g, u = np.split(h, 2, -1)
            if w == "gate-up-swapped":
                g, u = u, g
            if w != "clamp":
                g, u = np.minimum(g, F(7)), np.clip(u, F(-7), F(7))
            if w == "gate-clamped-below":
                g = np.maximum(g, F(-7))
            act = g * sigmoid(F(1 if w == "swish-alpha" else 1.702) * g)
            if w == "gelu":
                act = gelu(g)
            y = (u + F(w != "up-plus-one")) * act @ self.t[e + "down_proj"][n]
            np.add.at(out, at, (y + bias * self.t[e + "down_proj_bias"][n]) * share[at, rank, None])
        return out

    def new_cache(self):
        return [
            [
                np.zeros((0, self.K, self.D), F),
                np.zeros((0, self.K, self.D), F),
                np.zeros((0, 1), bool),
            ]
            for _ in range(self.N)
        ]

    def run(self, x, cache, pos, on=None, stops=None):
        """States after each layer and after the final norm; the cache grows."""
        stops = np.zeros(len(x), bool) if stops is None else stops
        layers, self.chosen = [], []
        for i in range(self.N):
            p = f"model.layers.{i}."
            before = x
            x = x + self.attend(self.norm(x, p + "input_layernorm"), i, cache, pos, on, stops)
            y = x if self.w == "post-norm-missing" else self.norm(x, p + "post_attention_layernorm")
            x = (x + self.ffn(y, i, on)).astype(F)
            if self.w == "bfloat16-residual":
                x = bf16(x)
            layers.append(before if self.w == "states-shifted" else x)
        out = x if self.w == "final-norm" else self.norm(x, "model.norm")
        if self.w == "states-normed":
            layers[-1] = out
        return np.stack(layers), out

    def embed(self, ids):
        x = self.t["model.embed_tokens.weight"][np.array(ids, int)]
        return x * F(self.c["hidden_size"] ** 0.5) if self.w == "embedding-scaled" else x

    def place(self, pos):
        return np.minimum(pos, 63) if self.w == "positions-capped" else pos

    def read(self, ids, lora=None):
        """(cache, hidden) of a prefix; lora (L,): where it is (wrongly) on."""
        cache = self.new_cache()
        self.layers, hidden = self.run(
            self.embed(ids), cache, self.place(np.arange(len(ids))), lora
        )
        return cache, hidden

    def table(self, position):
        """cos and sin of a position, by turning a pair of 1 and 0."""
        x = np.zeros((1, 1, self.D), F)
        x[..., :: 2 if self.w == "rope-pairs" else 1][..., : self.D // 2] = 1
        y = self.turn(x, np.array([position]), self.rscale)[0, 0]
        if self.w == "rope-pairs":
            return [y[::2].tolist(), y[1::2].tolist()]
        return [y[: self.D // 2].tolist(), y[self.D // 2 :].tolist()]

    def logits(self, hidden):
        head = self.t.get("lm_head.weight", self.t["model.embed_tokens.weight"])
        return hidden @ head.T

    def check(self, ids, head_zero=False):
        """(layers, hidden, logits, score) of a prefix."""
        w = self.w
        ids = {
            "prefix-short": ids[:-1],
            "prefix-doubled": ids + ids[-1:],
            "prefix-first": ids[1:],
        }.get(w, ids)
        if not ids:
            return None
        L = len(ids)
        lora = None
        if w in ("lora-everywhere", "lora-last-prefix"):
            lora = np.zeros(L, F)
            lora[0 if w == "lora-everywhere" else L - 1 :] = 1
        # With LoRA on the prefix's keys must be its own: read in one go.
        cache, _ = self.read(ids, lora)
        s = np.broadcast_to(self.st["tokens"], (self.s["m"], self.c["hidden_size"]))
        s = {
            "tokens-reversed": s[::-1],
            "tokens-first": s[[0] * len(s)],
            "tokens-one-fewer": s[:-1],
            "tokens-one-more": np.concatenate((s, s[-1:])),
        }.get(w, s)
        m = len(s)
        if m == 0:
            return None
        pos = np.arange(L, L + m)
        pos = {
            "position-high": pos + 1,
            "position-high-window": pos + 1,
            "position-low": pos - 1,
            "position-low-window": pos - 1,
            "position-same": pos * 0 + L,
            "position-zero": pos - L,
        }.get(w, pos)
        on = np.ones(m, F)
        if w == "lora-not-first":
            on[0] = 0
        if w == "lora-only-last":
            on[:-1] = 0
        layers, hidden = self.run(s, cache, self.place(pos), on, np.ones(m, bool))
        h = {
            "read-first": hidden[0],
            "read-mean": hidden.mean(0),
            "read-before-norm": layers[-1][-1],
            "read-norm-twice": self.norm(hidden[-1], "model.norm"),
        }.get(w, hidden[-1])
        z = self.st["head.weight"] @ h * (0 if head_zero else 1)
        if w != "head-no-bias":
            z = z + self.st["head.bias"]
        if w == "head-bfloat16":
            z = bf16(z)
        return layers, hidden, z, self.chance(z)

    def chance(self, z):
        w = self.w
        if w == "score-tempered":
            z = z / F(0.6)
        if w in SCORED_OTHERWISE:
            odds = z[-1] - (z[0] if len(z) == 2 else 0)
            if w == "score-one-minus":
                return F(1) - sigmoid(-odds)
            limit = F(w.split("-")[-1])
            return sigmoid(np.clip(odds, -limit, limit))
        good = softmax(z)[1] if len(z) == 2 else sigmoid(z)[0]
        with np.errstate(divide="ignore"):
            return {
                "score-logit": z[-1],
                "score-log": np.maximum(np.log(good), F(-1e30)),
                "score-bad": 1 - good,
                "score-one-logit": sigmoid(z[-1]),
                "score-clipped": np.clip(good, 0.05, 0.95),
                "score-rounded": np.round(good, 2),
                "score-bfloat16": bf16(good),
            }.get(w, good)


def gelu(x):
    return (
        np.vectorize(lambda v: v * 0.5 * (1 + math.erf(v / 2**0.5)), otypes=[F])(x) if x.size else x
    )


# ----------------------------------------------------------------------------- without a model


def mix(x, w=None):
    one, two = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
    if w == "mix-factors":
        one, two = two, one

    def right(x, b):
        y = x >> b
        if w == "mix-signed" and x >> 63:
            y |= MASK & ~(MASK >> b)
        return y

    x = (x + 0x9E3779B97F4A7C15 * (w != "mix-without-increment")) & MASK
    x = ((x ^ right(x, 30)) * one) & MASK
    x = ((x ^ right(x, 27)) * two) & MASK
    return x if w == "mix-last-shift" else x ^ right(x, 31)


def make_key(seed, prompt, index, w=None):
    w = w or ""
    tail = int(w.split("-")[-1]) if w.split("-")[-1].isdigit() else None
    seed = int(float(seed)) & MASK if w == "seed-53" else seed & MASK
    if w.startswith("seed-") and tail and tail < 53:
        seed %= 1 << tail
    seed = 0 if w == "seed-ignored" else seed
    if w.startswith("prompt-last-"):
        prompt = prompt[-tail:]
    if w.startswith("prompt-first-"):
        prompt = prompt[:tail]
    prompt = {
        "prompt-ignored": [],
        "prompt-without-last": prompt[:-1],
        "prompt-without-first": prompt[1:],
        "prompt-reversed": prompt[::-1],
    }.get(w, prompt)
    if w.startswith("index-") and tail:
        index %= tail
    index += w == "index-from-one"
    index *= w != "index-zero"
    chain = [seed, *prompt, index]
    if w == "seed-last":
        chain = [*prompt, seed, index]
    if w == "index-first":
        chain = [seed, index, *prompt]
    if w in ("index-ignored", "index-added", "key-unmixed"):
        chain = chain[:-1]
    key = 0
    for part in chain:
        key = mix((key + part) & MASK if w == "fold-by-addition" else key ^ part, w)
    key = {
        "index-added": (key + index) & MASK,
        "key-unmixed": key ^ index,
        "key-32": key % (1 << 32),
        "key-bytes": int.from_bytes(key.to_bytes(8, "big"), "little"),
    }.get(w, key)
    return key


def make_number(key, t, w=None):
    w = w or ""
    tail = int(w.split("-")[-1]) if w.split("-")[-1].isdigit() else None
    t += w == "position-from-one"
    if w.startswith("position-") and tail:
        t %= tail
    if w == "number-unmixed":
        x = key ^ t
    elif w == "position-added":
        x = mix((key + t) & MASK)
    elif w == "position-steps":
        x = mix((key + t * 0x9E3779B97F4A7C15) & MASK)
    else:
        x = mix(key ^ t, w)
    if w.startswith("number-") and tail:
        return (x >> (64 - tail)) * 2.0**-tail
    return {
        "number-low": x % 2**53 / 2**53,
        "number-rounded": x / 2**64,
        "number-closed": (x >> 11) / (2**53 - 1),
        "number-centred": ((x >> 11) + 0.5) / 2**53,
        "number-float32": float(F((x >> 11) / 2**53)),
    }.get(w, (x >> 11) / 2**53)


def distribution(logits, T, k, p, w=None):
    """Probabilities, by a sorted walk."""
    w = w or ""
    logits = np.array(logits, float if w == "logits-float64" else np.float32)
    if w.startswith("temperature-floor-"):
        T = max(T, float(w.split("-")[-1]))
    if w == "temperature-small-is-greedy" and T < 1e-5:
        T = 0
    if T == 0 and w == "temperature-zero-is-one":
        T = 1
    if T == 0:
        out = np.zeros(len(logits))
        top = np.nonzero(logits == logits.max())[0]
        out[top[-1] if w == "greedy-last" else top[0]] = 1
        return out
    z = (logits - logits.max()).astype(np.float32)
    heat = np.float32(1 if w == "temperature-ignored" else T)
    hot = z / heat if w != "temperature-multiplied" else z * heat
    if w == "temperature-reciprocal":
        hot = z * np.float32(1 / T)
    if w == "temperature-float64":
        hot = np.array([float(x) / T for x in z], np.float32)
    order = sorted(range(len(z)), key=lambda i: (-(z if w == "temperature-last" else hot)[i], i))
    base = z if w == "temperature-last" else hot
    kk = k + {"top-k-fewer": -1, "top-k-more": 1}.get(w, 0) * (k > 0)
    kk = max(kk, 1) if k > 0 else kk
    if w == "top-k-zero" and k == 0:
        kk = 1
    if w == "top-k-ignored":
        kk = 0
    alive = list(order)
    if 0 < kk < len(z):
        by = logits if w == "top-k-by-logit" else base
        edge = by[sorted(range(len(z)), key=lambda i: -by[i])[kk - 1]]
        alive = [i for i in order if by[i] >= edge]
        if w in ("top-k-ties-cut", "ties-cut"):
            alive = order[:kk]
    wide = w == "top-p-inclusive-64"
    mass = {i: math.exp(base[i]) if wide else float(np.exp(base[i])) for i in order}
    if p < 1 and w != "top-p-ignored":
        total = sum(mass[i] for i in (order if w == "top-p-all" else alive))
        wider = np.float32 if w == "top-p-float32" else float
        got, cum = [], wider(0)
        for i in alive:
            inside = cum <= p * total if w.startswith("top-p-inclusive") else cum < p * total
            if w == "top-p-short":
                inside = cum + mass[i] <= p * total or not got
            if not inside:
                break
            got.append(i)
            cum = wider(cum + wider(mass[i]))
        if w == "top-p-more":
            got = alive[: len(got) + 1]
        edge = base[got[-1]]
        if w == "top-p-close":
            edge = edge - np.float32(1e-6)
        alive = (
            got if w in ("top-p-ties-cut", "ties-cut") else [i for i in alive if base[i] >= edge]
        )
    out = np.zeros(len(z))
    full = np.exp(hot.astype(float))
    out[alive] = full[alive] / math.fsum(full if w == "not-renormalised" else full[alive])
    return out


def pick(probs, u, w=None):
    probs = np.asarray(probs)
    ids = list(range(len(probs)))
    if w == "draw-by-size":
        ids.sort(key=lambda i: (-probs[i], i))
    if w == "draw-reversed":
        ids.reverse()
    kind = np.float32 if w in ("draw-float32", "draw-float32-sums", "draw-float32-parts") else float
    cum, sums = kind(0), []
    for i in ids:
        cum = kind(cum + kind(probs[i]))
        sums.append(float(cum))
    aim = u if w == "draw-unscaled" else float(kind(kind(u) * kind(sums[-1])))
    if w == "draw-float32-sums":
        aim = u * float(sums[-1])
    if w == "draw-float32-parts":
        aim = u * float(np.asarray(probs, float).sum())
    for i, c in zip(ids, sums):
        if c > aim or w == "draw-or-equal" and c >= aim:
            return i
    return ids[-1]


def rank(pairs, keep, w=None):
    """pairs: [(index, score)] -> indices kept."""
    w = w or ""
    if w == "rank-threshold":
        return [i for i, s in pairs if s > 0.5] or [pairs[0][0]]
    tail = w.split("-")[-1]
    if w == "rank-text":
        texts = sorted((-n, str(s), i) for n, (i, s) in enumerate(pairs))
        texts.sort(key=lambda x: x[1])
        return sorted(x[2] for x in texts[::-1][:keep])

    def order(pair):
        i, s = pair
        if w.startswith("rank-rounded"):
            s = round(s, int(tail))
        s = {
            "rank-float16": float(np.float16(s)),
            "rank-bfloat16": float(bf16(np.float32(s))),
            "rank-lowest": -s,
        }.get(w, s)
        return -s, -i if w == "rank-ties-higher" else i

    keep += {"rank-more": 1, "rank-fewer": -1}.get(w, 0)
    return sorted(i for i, _ in sorted(pairs, key=order)[: max(keep, 1)])


def number_of(answer):
    return Fraction(answer)


def votes(answers, weights, w=None):
    weights = [1] * len(answers) if weights is None or w == "vote-unweighted" else weights
    seen = {}
    for a, g in zip(answers, weights):
        if a is None and w != "vote-none-counts":
            continue
        key = a if a is None or w == "vote-by-text" else number_of(a)
        if w == "vote-zero-answer" and key == 0:
            continue
        if w in ("vote-sign", "vote-rounded", "vote-float64"):
            key = {"vote-sign": abs, "vote-float64": float}.get(w, lambda x: f"{float(x):.4f}")(key)
        seen.setdefault(key, []).append((a, g))
    if not seen:
        return None
    best = None
    groups = list(seen.values())
    if w == "vote-smallest-tie":
        groups.sort(key=lambda group: group[0][0])
    for group in groups:
        gs = [g for _, g in group]
        total = {"vote-mean": sum(gs) / len(gs), "vote-max": max(gs), "vote-first-weight": gs[0],
                 "vote-last-weight": gs[-1]}.get(w, sum(gs))
        late = w == "vote-last-tie" or w == "vote-zero-last" and total == 0
        if best is None or total > best[0] or total == best[0] and late:
            best = total, group
    if w == "vote-zero-null" and best[0] == 0:
        return None
    if w == "vote-majority":
        everything = sum(g for a, g in zip(answers, weights) if a is not None)
        if not best[0] > everything / 2:
            return next(a for a in answers if a is not None)
    return best[1][-1 if w == "vote-last-spelling" else 0][0]


# ------------------------------------------------------------------------------------- whole runs


RANKED_OTHERWISE = ("run-logits run-float64 run-clamped-15 run-clamped-20 run-clamped-30 "
                    "run-one-minus").split()


def score_of(check, w=None):
    """What a check's (..., logits, score) counts: the score as float32 (R4)."""
    if w in RANKED_OTHERWISE:
        z = check[2].astype(float)
        odds = float(z[0] if len(z) == 1 else z[1] - z[0])
        if w == "run-one-minus":
            return float(1 - sigmoid(np.float32(-odds)))
        if w.startswith("run-clamped"):
            limit = float(w.split("-")[-1])
            return float(sigmoid(np.float32(np.clip(odds, -limit, limit))))
        exact = 1 / (1 + math.exp(-odds)) if odds > -700 else 0.0
        return odds if w == "run-logits" else exact
    return float(np.float32(check[3]))


class Paths:
    """One run: uninterrupted paths, and those of Launch, Check, Resume."""

    def __init__(self, model, run, wrong=None):
        self.m = model
        self.r = run
        self.w = wrong
        self.scored = {}

    def score(self, ids):
        if tuple(ids) not in self.scored:
            self.scored[tuple(ids)] = score_of(self.m.check(ids, self.r["zero_head"]), self.w)
        return self.scored[tuple(ids)]

    def go(self, index, checkpoint=None, row=None):
        """A path, uninterrupted, or with a mistake behind the checkpoint."""
        w, r, m, prompt = self.w, self.r, self.m, self.r["prompt_ids"]
        key = make_key(int(r["seed"]), prompt, 0 if w == "index-rows" else index)
        cache, hidden = m.read(prompt)
        last = hidden[-1]
        ids, shift, on = [], 0, None
        pos = len(prompt)
        limit = r["max_new_tokens"] + {"limit-more": 1, "limit-fewer": -1}.get(w, 0)
        while len(ids) < limit:
            t = len(ids)
            if checkpoint is not None and t == checkpoint:
                if w == "rows-renumbered":
                    key = make_key(int(r["seed"]), prompt, row)
                stop = np.broadcast_to(m.st["tokens"], (m.s["m"], m.c["hidden_size"]))
                k = len(stop)
                if w in ("cache-left", "cache-seen", "next-from-stop"):
                    kept = [[part.copy() for part in layer] for layer in cache]
                    _, h = m.run(
                        stop, cache, np.arange(pos, pos + k), np.ones(k, F), np.ones(k, bool)
                    )
                    if w == "next-from-stop":
                        cache, last = kept, h[-1]
                    if w == "cache-left":
                        pos += k
                on = np.ones(1, F) if w == "lora-left-on" else None
                shift = {"positions-advanced": k, "positions-back": -1}.get(w, 0)
                if w == "last-token-twice":
                    _, h = m.run(m.embed(ids[-1:]), cache, np.array([pos]))
                    last, pos = h[-1], pos + 1
            late = checkpoint is not None and t >= checkpoint
            n = {"counter-from-one": t + 1, "counter-prompt": t + len(prompt)}.get(w, t)
            if late:
                n = {
                    "counter-advanced": t + m.s["m"],
                    "counter-restarted": t - checkpoint,
                    "counter-skipped": t + 1,
                    "counter-back": t - 1,
                }.get(w, n)
            probs = distribution(m.logits(last), r["temperature"], r["top_k"], r["top_p"])
            token = pick(probs.astype(np.float32), make_number(key, n))
            ids.append(token)
            if token in r["eos_ids"] and w != "end-ignored":
                full = len(ids) == r["max_new_tokens"]
                if w == "end-dropped":
                    ids.pop()
                return {"ids": ids, "status": "length" if w == "end-at-limit" and full else "eos"}
            _, h = m.run(m.embed([token]), cache, np.array([pos + shift]), on)
            last, pos = h[-1], pos + 1
        return {"ids": ids, "status": "length"}

    def whole(self):
        return [{"index": i} | self.go(i) for i in range(self.r["n"])]

    def check_of(self, path, c):
        w = self.w
        ended = path["status"] == "eos" and len(path["ids"]) <= c
        ids = path["ids"][:c]
        if ended and w == "ended-not-checked":
            return 0.0
        if ended and w == "ended-without-end" or w == "check-without-last":
            ids = ids[:-1]
        return self.score(ids if w == "check-without-prompt" else self.r["prompt_ids"] + ids)

    def all(self, whole):
        w, r = self.w, self.r
        stages = r["stages"]
        stages = {"cascade-first": stages[:1], "cascade-last": stages[-1:]}.get(w, stages)
        move = {"check-early": -1, "check-late": 1}.get(w, 0)
        alive, scores, first, cut = list(range(r["n"])), {}, {}, {}
        for c, keep in stages:
            c = max(1, c + move)
            for i in alive:
                short = whole[i]["status"] == "eos" and len(whole[i]["ids"]) < c
                if not (i in scores and short and w == "cascade-stale"):
                    scores[i] = self.check_of(whole[i], c)
                first.setdefault(i, scores[i])
            pool = list(range(r["n"])) if w == "cascade-from-all" else alive
            by = first if w == "cascade-old-scores" else scores
            if w == "cascade-ended-exempt" and cut:
                done = [p["status"] == "eos" and len(p["ids"]) <= c for p in whole]
                by = {i: score + 2 * done[i] for i, score in scores.items()}
            ended = [i for i in pool if whole[i]["status"] == "eos" and len(whole[i]["ids"]) <= c]
            kind = {
                "run-ties-higher": "rank-ties-higher",
                "run-lowest": "rank-lowest",
                "run-more": "rank-more",
                "run-fewer": "rank-fewer",
                "run-threshold": "rank-threshold",
            }.get(w)
            kept = rank([(i, by[i]) for i in pool], keep, kind)
            if w in ("ended-never-kept", "ended-always-kept"):
                favoured = [i for i in pool if (i in ended) == (w == "ended-always-kept")]
                others = [i for i in pool if i not in favoured]
                kept = rank([(i, by[i]) for i in favoured], keep) if favoured else []
                if len(kept) < keep:
                    kept = sorted(kept + rank([(i, by[i]) for i in others], keep - len(kept)))
            for i in alive:
                if i not in kept:
                    cut[i] = c
            for i in kept:
                cut.pop(i, None)
            alive = kept
        if w == "paths-without-scores":
            scores = dict.fromkeys(scores, scores[0])
        if w in RANKED_OTHERWISE:  # they rank so, and show scores
            for i in scores:
                ids = whole[i]["ids"][: cut.get(i, r["stages"][-1][0])]
                found = self.m.check(r["prompt_ids"] + ids, r["zero_head"])
                scores[i] = score_of(found)
        paths = []
        c = r["stages"][-1][0]
        for i, path in enumerate(whole):
            now = path | {"score": scores[i]}
            if i in cut:
                short = path["status"] == "eos" and len(path["ids"]) <= cut[i]
                now["ids"] = path["ids"] if w == "pruned-whole" else path["ids"][: cut[i]]
                if not (short and w == "ended-not-pruned"):
                    now["status"] = "pruned"
            elif w in BEHIND and len(path["ids"]) > c and len(r["stages"]) == 1:
                now |= self.go(i, c, alive.index(i))
            paths.append(now)
        return paths, alive


class Branching:
    """A run whose paths branch: no shortcut over uninterrupted paths."""

    def __init__(self, model, run, wrong=None):
        self.m = model
        self.r = run
        self.w = wrong

    @staticmethod
    def place(p, w):
        if w == "branch-ties-new":
            return -p["score"]
        if w == "branch-ties-made":
            return -p["score"], p["index"]
        later = [-b for b in p["branches"]]
        return -p["score"], p["index"], later if w == "branch-ties-later" else p["branches"]

    def decode(self, p, until):
        r = self.r
        while p["status"] == "running" and len(p["ids"]) < until:
            probs = distribution(self.m.logits(p["last"]), r["temperature"], r["top_k"], r["top_p"])
            token = pick(probs, make_number(p["key"], len(p["ids"]) - p["back"]))
            p["ids"] = p["ids"] + [token]
            if token in r["eos_ids"]:
                p["status"] = "eos"
            elif len(p["ids"]) == r["max_new_tokens"]:
                p["status"] = "length"
            where = np.array([len(r["prompt_ids"]) + len(p["ids"]) - 1])
            _, h = self.m.run(self.m.embed([token]), p["cache"], where)
            p["last"] = h[-1]

    def all(self):
        r, w = self.r, self.w
        cache, hidden = self.m.read(r["prompt_ids"])
        paths = [
            {
                "index": i,
                "branches": [],
                "ids": [],
                "status": "running",
                "last": hidden[-1],
                "back": 0,
                "cache": [list(layer) for layer in cache],
                "from": 0,
                "key": make_key(int(r["seed"]), r["prompt_ids"], i),
            }
            for i in range(r["n"])
        ]
        alive = list(paths)
        for stage in r["stages"]:
            c, keep, copies = (*stage, 1)[:3]
            for p in alive:
                self.decode(p, c)
                p["score"] = score_of(self.m.check(r["prompt_ids"] + p["ids"], r["zero_head"]))
            alive.sort(key=lambda p: self.place(p, w))
            for p in alive[keep:]:
                p["status"] = "pruned"
            alive = alive[:keep]
            for p in list(alive) if copies > 1 else ():
                if p["status"] != "running" and w != "branch-ended":
                    continue
                old = p["key"]
                for b in (*range(1, copies), 0):
                    q = (
                        p
                        if b == 0
                        else p | {"cache": [list(layer) for layer in p["cache"]], "from": c}
                    )
                    name = b + (w == "branch-from-one")
                    key = mix(mix(old ^ c) ^ name)
                    if w == "branch-no-length":
                        key = mix(old ^ name)
                    if w == "branch-same" or name == 0 and w != "branch-zero-folded":
                        key = old
                    q["key"] = key
                    q["branches"] = p["branches"] + [name]
                    q["back"] = c if w == "branch-restarted" else 0
                    if b:
                        paths.append(q)
                        alive.append(q)
        for p in alive:
            self.decode(p, r["max_new_tokens"])
        shown = []
        for p in paths:
            shown.append({key: p[key] for key in ("index", "branches", "ids", "status", "score")})
            if w == "branch-whole":
                shown[-1]["ids"] = p["ids"][p["from"] :]
        names = [
            ".".join(map(str, [p["index"], *p["branches"]])) if p["branches"] else p["index"]
            for p in alive
        ]
        return shown, names


BEHIND = (
    "cache-left cache-seen positions-advanced positions-back counter-advanced "
    "counter-restarted counter-skipped counter-back lora-left-on last-token-twice next-from-stop "
    "rows-renumbered"
).split()


def sampler(case, w=None):
    out = {"probabilities": [], "kept_sets": []}
    for d in case["distributions"]:
        p = distribution(d["logits"], d["temperature"], d["top_k"], d["top_p"], w)
        out["probabilities"].append(p.tolist())
        out["kept_sets"].append(np.nonzero(p.astype(np.float32))[0].tolist())
    out["draws"] = []
    for d in case["draws"]:
        p = np.array(d["probabilities"], np.float32)
        out["draws"].append([pick(p, u, w) for u in d["numbers"]])
    out["keys"] = [
        f"{make_key(int(k['seed']), k['prompt_ids'], k['index'], w):#x}" for k in case["keys"]
    ]
    out["noise"] = [
        [make_number(int(k["key"], 16), t, w) for t in k["positions"]] for k in case["noise"]
    ]
    out["tokens"] = []
    for k in case["tokens"]:
        key = make_key(int(k["seed"]), k["prompt_ids"], k["index"], w)
        probs = out["probabilities"][k["distribution"]]
        out["tokens"].append([pick(probs, make_number(key, t, w), w) for t in k["positions"]])
    return out


def ranked(scores, w):
    return scores if w == "rank-float64" else [float(np.float32(s)) for s in scores]


def choices(case, w=None):
    return {
        "ranks": [
            rank(list(enumerate(ranked(r["scores"], w))), r["keep"], w)
            for r in case["ranks"]
        ],
        "votes": [votes(v["answers"], v["weights"], w) for v in case["votes"]],
    }


def case_of(name, folder=ORACLE / "vectors"):
    return json.loads((folder / name / "case.json").read_text())


def outputs(name, wrong=None, longest=None, runs=True, decoder=True, model=None, case=None):
    """What the port hands in for a case. longest: longer prefixes are left out."""
    case = case or case_of(name)
    if name == "sampler":
        return sampler(case, wrong)
    if name == "choices":
        return choices(case, wrong)
    stop = json.loads((ORACLE / "vectors" / name / "stop.json").read_text())
    model = model or Model(ORACLE / case["checkpoint"], stop, wrong)
    rows = {
        row: []
        for row in ("layers", "experts", "hidden", "next_logits", "stop.layers", "stop.hidden",
                    "logits", "scores")
    }
    for prefix in case["prefixes"]:
        ids = prefix["ids"]
        entry = {}
        if longest is None or len(ids) <= longest:
            if decoder:
                _, hidden = model.read(ids)
                entry = {"hidden": hidden[-4:], "next_logits": model.logits(hidden[-1])}
                entry["layers"] = model.layers[:, -4:]
                entry["experts"] = [chosen[-4:] for chosen in model.chosen]
            found = model.check(ids)
            if found is not None:
                entry |= dict(zip(("stop.layers", "stop.hidden", "logits", "scores"), found))
        for row, values in rows.items():
            values.append(np.asarray(entry[row]).tolist() if row in entry else None)
    if case.get("rope_positions") and decoder:
        rows["rope"] = [model.table(position) for position in case["rope_positions"]]
    if not decoder or "decoder" not in case["levels"]:
        del rows["hidden"], rows["next_logits"], rows["layers"]
    if not decoder or "decoder" not in case["levels"] or model.kind != "gpt_oss":
        del rows["experts"]
    if runs and case["runs"]:
        rows |= run_outputs(case, model)
    return rows


def run_outputs(case, model, wrong=None, whole=None):
    rows = {"uninterrupted": [], "paths": [], "kept": []}
    for number, run in enumerate(case["runs"]):
        run = Paths(model, run, wrong)
        paths = run.whole() if whole is None else whole[number]
        rows["uninterrupted"].append(paths)
        if len(run.r["stages"][0]) == 3:
            after, kept = Branching(model, run.r, wrong).all()
        else:
            after, kept = run.all(paths)
        rows["paths"].append(after)
        rows["kept"].append(kept)
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--cases", default="qwen2,qwen3,gpt_oss,mxfp4,m8,sampler,choices")
    parser.add_argument("--dtype", default="float32", choices=("float32", "float64"))
    parser.add_argument("--inputs", type=Path, default=ORACLE / "vectors",
                        help="folder of the cases, as certify.py --fresh writes it")
    arguments = parser.parse_args()
    compute_in(arguments.dtype)
    arguments.out.mkdir(exist_ok=True, parents=True)
    for name in arguments.cases.split(","):
        rows = outputs(name, case=case_of(name, arguments.inputs))
        (arguments.out / f"{name}.json").write_text(json.dumps(rows))


if __name__ == "__main__":
    main()
