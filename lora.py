"""Hand-rolled LoRA that is active only at [STOP] positions: the Critique Adapter of section 3.

y = W x + (alpha / r) * 1[STOP] * B A x

The adapter is an object of its own and the base model never changes: a pass without it is the
base model, bit for bit and at no cost. There is no merge: merged weights would act on the prefix
too, whose keys and values must stay the base model's. 1[STOP] is 1 at [STOP] positions and 0
elsewhere. A starts random (Kaiming, as in the code of the LoRA paper, arXiv 2106.09685), B starts
at zero.
"""
import dataclasses
import math

import torch
import torch.nn.functional as F
from torch import nn

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class Linear(nn.Linear):
    """A linear map (..., in) -> (..., out) that an adapter may change.
    `name` is its name in the checkpoint; the model sets it."""

    def forward(self, x, adapter=None):
        y = F.linear(x, self.weight, self.bias)
        return y if adapter is None else adapter.join(self.name, x, y)


class LoRA(nn.Module):
    """Low-rank pairs for the linears of `model` whose last name is in `targets`; None: in TARGETS.

    Parameters are named as PEFT names them on disk, behind its `base_model.model.`: `<linear's
    name>.lora_A.weight` (r, in) and `.lora_B.weight` (out, r). They are float32 also beside a
    bfloat16 model.
    Raises ValueError on a target that the model does not have.
    """

    def __init__(self, model, rank, alpha, targets=None, dropout=0.0, seed=0):
        super().__init__()
        self.rank = rank
        self.alpha = alpha
        self.dropout = dropout
        linears = {name: part for name, part in model.named_modules() if isinstance(part, Linear)}
        known = {_last(name) for name in linears}
        if targets is None:
            targets = [target for target in TARGETS if target in known]
        self.targets = tuple(targets)
        for target in self.targets:
            if target not in known:
                names = ", ".join(sorted(known))
                raise ValueError(
                    f"targets: found {target!r}, expected some of the model's linears: {names}")
        generator = torch.Generator().manual_seed(seed)
        self.pairs = {}
        for name, linear in linears.items():
            if _last(name) in self.targets:
                self.pairs[name] = self._add_pair(name, linear, generator)

    def _add_pair(self, name, linear, generator):
        """A and B of one linear, in a tree of modules whose names spell the linear's name, so that
        `state_dict` has PEFT's names."""
        pair = self
        for part in name.split("."):
            if part not in pair._modules:
                pair.add_module(part, nn.Module())
            pair = pair._modules[part]
        device = linear.weight.device
        bound = 1 / math.sqrt(linear.in_features)  # Kaiming uniform with a = sqrt(5)
        # Drawn on the CPU, so that a seed means the same numbers on every device.
        drawn_on = "meta" if device.type == "meta" else "cpu"
        a = torch.empty(self.rank, linear.in_features, device=drawn_on)
        a.uniform_(-bound, bound, generator=generator)
        b = torch.zeros(linear.out_features, self.rank, device=device)
        pair.lora_A = nn.Module()
        pair.lora_B = nn.Module()
        pair.lora_A.weight = nn.Parameter(a.to(device))
        pair.lora_B.weight = nn.Parameter(b)
        return pair

    def at(self, active):
        """The adapter of one pass: this LoRA at the positions where `active` (B, T) bool is
        true."""
        return Adapter(self, active)


@dataclasses.dataclass
class Adapter:
    """A LoRA and the positions (B, T) bool of a pass where it acts."""
    lora: LoRA
    active: torch.Tensor

    def join(self, name, x, y):
        """y + (alpha / r) * 1[active] * B A x for the linear `name`: x (B, T, in), y (B, T,
        out)."""
        lora = self.lora
        if name not in lora.pairs:
            return y
        a = lora.pairs[name].lora_A.weight
        b = lora.pairs[name].lora_B.weight
        x = F.dropout(x.to(a.dtype), lora.dropout, lora.training)
        update = F.linear(F.linear(x, a), b) * (lora.alpha / lora.rank)
        return y + torch.where(self.active[..., None], update, 0.0).to(y.dtype)


def _last(name):
    """The last part of a dotted name."""
    return name.rpartition(".")[2]
