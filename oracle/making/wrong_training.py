"""Training steps with one known mistake each: the loss of soft labels, and its gradients."""
import torch
import torch.nn.functional as F

from plain_decoder import Port
from sample import prefill

TRAINING = {
    "loss-sum": "the loss is summed over the batch, not averaged",
    "loss-hard": "labels are rounded to 0 and 1",
    "loss-inverted": "labels are those of a bad end",
    "loss-squares": "squared errors instead of cross-entropy",
    "loss-clipped": "the loss is taken of a score that is kept away from 0 and 1",
    "loss-clipped-7": "the loss is taken of a score that is kept away from 0 and 1",
    "loss-clipped-100": "the loss is taken of a score that is kept away from 0 and 1",
    "loss-positive-only": "the loss lacks the part of the bad end",
    "grad-sum": "gradients are summed over the batch, the loss is averaged",
    "grad-tokens-mean": "the gradient of a shared [STOP] vector is averaged over its m places",
    "grad-tokens-last": "the gradient of a shared [STOP] vector is that of its last place",
    "grad-tokens-first": "the gradient of a shared [STOP] vector is that of its first place",
    "grad-lora-unscaled": "LoRA's gradients lack the factor alpha / r",
    "grad-lora-scaled-twice": "LoRA's gradients have the factor alpha / r twice",
    "grad-lora-last": "LoRA's gradients come from the last [STOP] position only",
    "grad-lora-zero": "LoRA gets no gradient",
    "grad-tokens-zero": "the [STOP] vectors get no gradient",
    "grad-head-zero": "the head gets no gradient",
    "grad-no-bias": "the head's bias gets no gradient",
    "grad-bfloat16": "gradients are rounded to bfloat16",
    "grad-cut": "no gradient flows through the [STOP] positions' keys and values",
    "grad-through-prefix": "LoRA is active on the prefix too, and learns from it",
    "grad-clipped": "gradients are clipped to a norm of 1",
    "grad-negative": "gradients have the other sign"}


class Detached:
    """A cache that writes [STOP] keys and values without their graph."""

    def __init__(self, cache):
        self.cache = cache

    def __getattr__(self, name):
        return getattr(self.cache, name)

    def write(self, layer, slots, keys, values):
        return self.cache.write(layer, slots, keys.detach(), values.detach())


class LastOnly:
    """A LoRA's adapter whose parameters learn from the last position only."""

    def __init__(self, adapter):
        self.adapter = adapter

    def join(self, name, x, y):
        live = self.adapter.join(name, x, y)
        fixed = self._without_parameters(name, x, y)
        last = torch.zeros_like(self.adapter.active)
        last[:, -1] = True
        return torch.where(last[..., None], live, fixed)

    def _without_parameters(self, name, x, y):
        lora = self.adapter.lora
        if name not in lora.pairs:
            return y
        a = lora.pairs[name].lora_A.weight.detach()
        b = lora.pairs[name].lora_B.weight.detach()
        return y + F.linear(F.linear(x, a), b) * (lora.alpha / lora.rank)


def step_through_prefix(model, stop, prefixes, labels):
    """(loss, {name: gradient}) where LoRA is active at every position, and the graph with it."""
    port = Port(model, stop, "lora-everywhere")
    port.parts = {name: part.clone().requires_grad_() for name, part in port.parts.items()}
    logits = torch.stack([port.score_entry(ids)["logits"] for ids in prefixes])
    loss = stop.loss(logits, torch.tensor(labels))
    gradients = torch.autograd.grad(loss, port.parts.values())
    return loss.detach(), dict(zip(port.parts, gradients))


def step(model, stop, prefixes, labels, wrong):
    """(loss, {name: gradient}) of a training step with a mistake."""
    cache, _ = prefill(model, prefixes, stop.m)
    if wrong == "grad-cut":
        cache = Detached(cache)
    labels = torch.tensor(labels)
    vectors = stop.tokens.detach().expand(stop.m, -1).clone().requires_grad_()  # one a place
    fed = vectors.expand(len(prefixes), -1, -1)
    adapter = stop.lora.at(torch.ones(fed.shape[:2], dtype=torch.bool))
    if wrong == "grad-lora-last":
        adapter = LastOnly(adapter)
    logits = stop.head(model.run(fed, cache, adapter=adapter)[:, -1])
    loss = loss_of(stop, logits, labels, wrong)
    stop.zero_grad()
    loss.backward()
    gradients = {}
    for name, parameter in stop.named_parameters():
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        gradients[name.removeprefix("lora.")] = gradient
    places = vectors.grad
    gradients["tokens"] = places.sum(0, keepdim=True) if stop.shared else places
    if stop.shared:
        shared = {
            "grad-tokens-mean": places.mean(0, keepdim=True),
            "grad-tokens-last": places[-1:],
            "grad-tokens-first": places[:1]}
        gradients["tokens"] = shared.get(wrong, gradients["tokens"])
    return loss.detach(), changed(gradients, stop, len(prefixes), wrong)


def loss_of(stop, logits, labels, wrong):
    """The loss of head logits (B, 1 or 2) as a port with this mistake has it."""
    if wrong == "loss-hard":
        labels = (labels > 0.5).float()
    if wrong == "loss-inverted":
        labels = 1 - labels
    chances = stop.chance(logits)
    if wrong == "loss-squares":
        return ((chances - labels) ** 2).mean()
    if wrong in ("loss-clipped", "loss-clipped-7"):
        edge = 1e-6 if wrong == "loss-clipped" else 1e-7
        chances = chances.clamp(edge, 1 - edge)
        return F.binary_cross_entropy(chances, labels)
    if wrong == "loss-clipped-100":
        return F.binary_cross_entropy(chances, labels)
    if wrong == "loss-positive-only":
        return -(labels * chances.clamp(min=1e-30).log()).mean()
    loss = stop.loss(logits, labels)
    return loss * len(labels) if wrong == "loss-sum" else loss


def changed(gradients, stop, batch, wrong):
    """The gradients as a port with this mistake has them."""
    scaling = stop.lora.alpha / stop.lora.rank
    norm = torch.stack([gradient.norm() for gradient in gradients.values()]).norm()
    result = {}
    for name, gradient in gradients.items():
        is_lora = ".lora_" in name
        factor = 1.0
        if wrong == "grad-sum":
            factor = batch
        elif wrong == "grad-lora-unscaled" and is_lora:
            factor = 1 / scaling
        elif wrong == "grad-lora-scaled-twice" and is_lora:
            factor = scaling
        elif wrong == "grad-lora-zero" and is_lora:
            factor = 0.0
        elif wrong == "grad-tokens-zero" and name == "tokens":
            factor = 0.0
        elif wrong == "grad-head-zero" and name.startswith("head"):
            factor = 0.0
        elif wrong == "grad-no-bias" and name == "head.bias":
            factor = 0.0
        elif wrong == "grad-clipped" and norm > 1:
            factor = 1 / norm
        elif wrong == "grad-negative":
            factor = -1.0
        result[name] = gradient.detach() * factor
        if wrong == "grad-bfloat16":
            result[name] = result[name].to(torch.bfloat16).float()
    return result


def training_rows(model, stop, prefixes, labels, wrong):
    """The rows `loss` and `grad`."""
    prefixes = prefixes[:len(labels)]
    if wrong == "grad-through-prefix":
        loss, gradients = step_through_prefix(model, stop, prefixes, labels)
    else:
        loss, gradients = step(model, stop, prefixes, labels, wrong)
    return {"loss": loss, "grad": gradients}
