"""What the reference itself computes for the inputs of a case: the expected outputs, and how far
others may lie off.

A row is a quantity that certify compares: {row: its value}. Rows of prefixes are lists with one
entry for each prefix, rows of runs one for each run. States, logits, scores and gradients are
computed in float64 by the plain decoder; paths by the project's rooms.
"""
import numpy as np
import torch

import rounding
from commands.stop import logits_and_states
from compare import LEVELS
from plain_decoder import Port
from sample import Path, branch_key, draw, generate, path_key, prefill, probabilities, uniform
from stop import best_paths, launch_check_resume, vote

LAST = 4  # hidden states are shown at the last so many positions of a prefix


def signed(key):
    """The int64 with the bits of a 64-bit key."""
    return (key + 2 ** 63) % 2 ** 64 - 2 ** 63


def numbers_of(key, positions):
    """A path's numbers (T,) float64 in [0, 1) for these positions."""
    keys = torch.full((len(positions),), signed(key))
    return uniform(keys, torch.tensor(positions))


def path_numbers(run, index, branches, count):
    """The numbers (count,) of a path that took these branches of a run."""
    key = path_key(int(run["seed"]), run["prompt_ids"], index)
    numbers = numbers_of(key, list(range(count)))
    checkpoints = [stage[0] for stage in run["stages"] if len(stage) == 3 and stage[2] > 1]
    for checkpoint, branch in zip(checkpoints, branches):
        if branch > 0:
            key = branch_key(key, checkpoint, branch) % 2 ** 64
        numbers[checkpoint:] = numbers_of(key, list(range(count)))[checkpoint:]
    return numbers


def single(value):
    """The float32 numbers of a tensor in float64; other values as they are."""
    return value.detach().float() if isinstance(value, torch.Tensor) else value


@torch.no_grad()
def prefix_rows(port, inputs):
    """The rows of the levels `decoder` and `score`, in float64."""
    rows = {}
    if "decoder" in inputs["levels"]:
        rows["rope"] = [port.rope_table(position) for position in inputs["rope_positions"]]
    for prefix in inputs["prefixes"]:
        entry = port.decoder_entry(prefix["ids"]) if "decoder" in inputs["levels"] else {}
        for row, value in (entry | port.score_entry(prefix["ids"])).items():
            rows.setdefault(row, []).append(value)
    order = LEVELS["decoder"] + LEVELS["score"]
    return {row: rows[row] for row in order if row in rows}


def score_gradients(port, prefixes):
    """[(log odds, {tensor's name: d log odds / d tensor})] of some prefixes, in float64."""
    saved = port.parts
    port.parts = {name: part.clone().requires_grad_() for name, part in saved.items()}
    found = []
    for ids in prefixes:
        logits = port.score_entry(ids)["logits"]
        z = logits[0] if len(logits) == 1 else logits[1] - logits[0]
        gradients = torch.autograd.grad(z, port.parts.values())
        found.append((z.item(), dict(zip(port.parts, gradients))))
    port.parts = saved
    return found


def training_rows(port, inputs, steps=()):
    """The loss of the labelled prefixes, its gradients by the names of the STOP's tensors, and how
    far these may lie off: ({row: value}, {name: tolerance of a gradient}). steps: the tolerances
    of the prefixes' logits."""
    labels = inputs["labels"]
    prefixes = [prefix["ids"] for prefix in inputs["prefixes"][:len(labels)]]
    loss = 0.0
    gradients = {name: torch.zeros_like(part) for name, part in port.parts.items()}
    allowed = dict.fromkeys(gradients, 1e-30)
    count = len(port.parts["head.bias"])
    steps = list(steps) or [0.0] * len(labels)
    gradients_of = score_gradients(port, prefixes)
    for label, step, (z, found) in zip(labels, steps, gradients_of):
        loss += (rounding.softplus(z) - label * z) / len(labels)
        error = (rounding.sigmoid(z) - label) / len(labels)
        moved = rounding.moves(rounding.sigmoid, [z], step * count) + rounding.SCORES / 8
        for name, gradient in found.items():
            gradients[name] += error * gradient
            size = gradient.abs().max().item()
            allowed[name] += (rounding.GRADIENTS * abs(error) + moved / len(labels)) * size
    return {"loss": loss, "grad": gradients}, allowed


def tolerance_of_head(port, hidden):
    """How far each logit of the last [STOP] position's hidden state may lie off."""
    terms = (port.parts["head.weight"] * hidden).abs().sum(-1) + port.parts["head.bias"].abs()
    return rounding.LOGITS * terms.max().item()


def moved_by_float32(rows, in_float32):
    """{row: how far each entry lies off where the plain decoder computes in float32}."""
    moved = {}
    for row, entries in rows.items():
        if row != "experts":
            moved[row] = [(entry - other.double()).abs().max().item()
                          for entry, other in zip(entries, in_float32[row])]
    return moved


@torch.no_grad()
def tolerances(port, inputs, rows, in_float32):
    """{row: how far its entries may lie off} of the rows of `prefix_rows`, in float64 and in
    float32."""
    allowed = {}
    moved = moved_by_float32(rows, in_float32)
    for row, entries in rows.items():
        if row == "rope":
            allowed[row] = [2e-6 + rounding.ANGLES * position * port.rope_scale
                            for position in inputs["rope_positions"]]
        elif row in ("layers", "hidden", "next_logits", "stop.layers", "stop.hidden"):
            share = rounding.STOP_STATES if row.startswith("stop.") else rounding.STATES
            allowed[row] = [share * max(1.0, entry.abs().max().item())
                            for entry in entries]
            allowed[row] = largest_of_each(allowed[row], moved[row])
        elif row == "logits":
            allowed[row] = [tolerance_of_head(port, states[-1]) for states in
                            rows["stop.hidden"]]
            allowed[row] = largest_of_each(allowed[row], moved[row])
        elif row == "scores":
            pairs = zip(rows["logits"], allowed["logits"])
            allowed[row] = [rounding.score_tolerance(logits.tolist(), step)
                            for logits, step in pairs]
    return allowed


def gradient_tolerances(allowed, trained, in_float32):
    """{name: how far a gradient may lie off}: what follows from the logits, or from how far float32
    moved it."""
    found = {}
    for name, gradient in trained["grad"].items():
        step = (gradient - in_float32["grad"][name].double()).abs().max().item()
        found[name] = max(allowed[name], rounding.FLOAT32 * step)
    return found


def largest_of_each(allowed, moved):
    """The tolerances of entries, or what follows from how far float32 moved them."""
    return [max(pair) for pair in zip(allowed, [rounding.FLOAT32 * step for step in moved])]


def model_rows(model, stop, inputs):
    """({row: value}, {row: tolerances}) of a case's prefixes and its training step."""
    port = Port(model, stop, None, torch.float64)
    rows = prefix_rows(port, inputs)
    plain = Port(model, stop)  # in float32
    allowed = tolerances(port, inputs, rows, prefix_rows(plain, inputs))
    if "training" in inputs["levels"]:
        trained, grad = training_rows(port, inputs, allowed["logits"])
        labels = inputs["labels"]
        allowed["loss"] = rounding.loss_tolerance(
            trained["loss"], [logits.tolist() for logits in rows["logits"]], labels,
            allowed["logits"])
        allowed["grad"] = gradient_tolerances(grad, trained, training_rows(plain, inputs)[0])
        rows |= trained
    rows["loss"] = np.float32(rows["loss"])
    rows["grad"] = {name: single(value) for name, value in rows["grad"].items()}
    exact = {row: value for row, value in rows.items() if row in ("loss", "grad")}
    shown = {row: [single(entry) for entry in entries] for row, entries in rows.items()
             if row not in exact}
    return shown | exact, allowed


def path_tolerances(runs, logits, allowed):
    """How far the scores of each run's paths may lie off: as for the prefixes (logits, allowed),
    but with a head's sum half as large again, and at the steepest place of the sigmoid."""
    steepest = 1.5 * max(allowed) * len(logits[0]) / 4
    return [rounding.SCORES + (0 if run["zero_head"] else steepest) for run in runs]


@torch.no_grad()
def acceptable_rows(model, stop, inputs, key):
    """The rows of `prefix_rows` and the training step with a rounding that a port may choose."""
    port = Port(model, stop, key, torch.float64)
    rows = {row: [single(entry) for entry in entries]
            for row, entries in prefix_rows(port, inputs).items() if row != "experts"}
    with torch.enable_grad():
        trained, _ = training_rows(port, inputs)
    rows["loss"] = np.float32(trained["loss"])
    rows["grad"] = {name: single(value) for name, value in trained["grad"].items()}
    return rows


# ------------------------------------------------------------------------------ the rooms' own rows


@torch.inference_mode()
def decoder_rows(model, prefixes):
    """What the rooms give: hidden, after the final norm, at each prefix's last positions;
    next_logits at its last."""
    hidden = [model(torch.tensor([ids]))[0, -LAST:] for ids in prefixes]
    return {
        "hidden": [states.float() for states in hidden],
        "next_logits": [model.logits(states[-1]).float() for states in hidden]}


def score_rows(model, stop, prefixes):
    """What the rooms give: the [STOP] positions' states, the head's logits and the scores."""
    rows = {"stop.layers": [], "stop.hidden": [], "logits": [], "scores": []}
    for ids in prefixes:
        logits, states = logits_and_states(model, stop, [ids])
        rows["stop.layers"].append(states[0, :-1])
        rows["stop.hidden"].append(states[0, -1])
        rows["logits"].append(logits[0])
        rows["scores"].append(stop.chance(logits)[0])
    return rows


def rooms_training_rows(model, stop, prefixes, labels):
    """What the rooms give: the loss of the labelled prefixes, and its gradients."""
    cache, _ = prefill(model, prefixes[:len(labels)], stop.m)
    stop.zero_grad()
    loss = stop.loss(stop(model, cache), torch.tensor(labels))
    loss.backward()
    gradients = {}
    for name, parameter in stop.named_parameters():
        gradients[name.removeprefix("lora.")] = parameter.grad
    return {"loss": loss.detach().float(), "grad": gradients}


def rooms_sampler_rows(inputs):
    """What the rooms give: probabilities, kept sets, draws, keys, noise and tokens."""
    rows = {row: [] for row in LEVELS["sampler"]}
    for problem in inputs["distributions"]:
        logits = torch.tensor(np.asarray(problem["logits"], dtype=np.float32))
        probs = probabilities(logits, problem["temperature"], problem["top_k"], problem["top_p"])
        rows["probabilities"].append(probs)
        rows["kept_sets"].append(probs.nonzero()[:, 0].tolist())
    for problem in inputs["draws"]:
        probs = torch.tensor(np.asarray(problem["probabilities"], dtype=np.float32))
        numbers = torch.tensor(problem["numbers"], dtype=torch.float64)
        rows["draws"].append(draw(probs.expand(len(numbers), -1), numbers).tolist())
    for problem in inputs["keys"]:
        key = path_key(int(problem["seed"]), problem["prompt_ids"], problem["index"])
        rows["keys"].append(f"{key:016x}")
    for problem in inputs["noise"]:
        rows["noise"].append(numbers_of(int(problem["key"], 16), problem["positions"]).tolist())
    for problem in inputs["tokens"]:
        probs = rows["probabilities"][problem["distribution"]]
        key = path_key(int(problem["seed"]), problem["prompt_ids"], problem["index"])
        numbers = numbers_of(key, problem["positions"])
        rows["tokens"].append(draw(probs.expand(len(numbers), -1), numbers).tolist())
    return rows


def rooms_choices_rows(inputs):
    """What the rooms give: which paths stay, by their scores, and which answer wins."""
    ranks = []
    for problem in inputs["ranks"]:
        scores = [float(np.float32(score)) for score in problem["scores"]]
        paths = [Path([], index, score=score) for index, score in enumerate(scores)]
        kept, _ = best_paths(paths, problem["keep"])
        ranks.append(sorted(path.index for path in kept))
    votes = []
    for problem in inputs["votes"]:
        votes.append(vote(problem["answers"], problem["weights"], problem["kind"]))
    return {"ranks": ranks, "votes": votes}


class without_head:
    """While this is entered, the head's weight is zero: every score is that of its bias."""

    def __init__(self, stop, zero):
        self.weight = stop.head.weight
        self.zero = zero

    def __enter__(self):
        self.saved = self.weight.data
        if self.zero:
            self.weight.data = torch.zeros_like(self.saved)

    def __exit__(self, *_):
        self.weight.data = self.saved


def settings_of(run):
    """The sampling settings that `generate` and `launch_check_resume` take."""
    names = ("max_new_tokens", "temperature", "top_k", "top_p", "eos_ids")
    settings = {name: run[name] for name in names}
    return settings | {"seed": int(run["seed"])}


def describe(paths):
    """Paths as a porter hands them in."""
    described = []
    for path in paths:
        about = {"index": path.index}
        if path.branches:
            about["branches"] = list(path.branches)
        about |= {"ids": path.ids, "status": path.status}
        if path.score is not None:
            about["score"] = np.float32(path.score)
        described.append(about)
    return described


def kept_names(paths):
    """Which paths are not pruned: the index of each or, where it branched, its name."""
    kept = [path for path in paths if path.status != "pruned"]
    return [path.name if path.branches else path.index for path in kept]


def run_rows(model, stop, runs):
    """The runs without any check, with their checks, and which paths are kept."""
    rows = {"uninterrupted": [], "paths": [], "kept": []}
    for run in runs:
        prompt = run["prompt_ids"]
        whole = generate(model, [prompt], run["n"], **settings_of(run))[0]
        stages = [tuple(stage) for stage in run["stages"]]
        with without_head(stop, run["zero_head"]):
            paths = launch_check_resume(
                model, stop, prompt, run["n"], stages=stages, **settings_of(run))
        rows["uninterrupted"].append(describe(whole))
        rows["paths"].append(describe(paths))
        rows["kept"].append(kept_names(paths))
    return rows


def rooms_rows(case, model, stop, inputs):
    """All rows that the rooms themselves compute for a case, in the model's dtype: a hand-in."""
    prefixes = [prefix["ids"] for prefix in inputs["prefixes"]]
    rows = {}
    if "decoder" in case.levels:
        rows |= decoder_rows(model, prefixes)
    rows |= score_rows(model, stop, prefixes)
    rows |= rooms_training_rows(model, stop, prefixes, inputs["labels"])
    if inputs["runs"]:
        rows |= run_rows(model, stop, inputs["runs"])
    return rows


def case_rows(case, model, stop, inputs):
    """({row: value}, {row: tolerances}) of a case with a model: what is published."""
    rows, allowed = model_rows(model, stop, inputs)
    if inputs["runs"]:
        rows |= run_rows(model, stop, inputs["runs"])
        allowed["paths"] = path_tolerances(inputs["runs"], rows["logits"], allowed["logits"])
    return rows, allowed
