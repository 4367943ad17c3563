"""What the reference itself computes for the inputs of a case: the expected outputs.

A row is a quantity that certify compares: {row: its value}. Rows of prefixes are lists with one
entry for each prefix, rows of runs one for each run.
"""
import numpy as np
import torch

from commands.stop import logits_and_states
from compare import LEVELS
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


@torch.inference_mode()
def decoder_rows(model, prefixes):
    """hidden: after the final norm, at each prefix's last positions; next_logits: at its last."""
    hidden = [model(torch.tensor([ids]))[0, -LAST:] for ids in prefixes]
    return {
        "hidden": [states.float() for states in hidden],
        "next_logits": [model.logits(states[-1]).float() for states in hidden]}


def score_rows(model, stop, prefixes):
    """The [STOP] positions' states, the head's logits and the scores."""
    rows = {"stop.layers": [], "stop.hidden": [], "logits": [], "scores": []}
    for ids in prefixes:
        logits, states = logits_and_states(model, stop, [ids])
        rows["stop.layers"].append(states[0, :-1])
        rows["stop.hidden"].append(states[0, -1])
        rows["logits"].append(logits[0])
        rows["scores"].append(stop.chance(logits)[0])
    return rows


def training_rows(model, stop, prefixes, labels):
    """The loss of the labelled prefixes, and its gradients by the names of the STOP's tensors."""
    cache, _ = prefill(model, prefixes[:len(labels)], stop.m)
    stop.zero_grad()
    loss = stop.loss(stop(model, cache), torch.tensor(labels))
    loss.backward()
    gradients = {}
    for name, parameter in stop.named_parameters():
        gradients[name.removeprefix("lora.")] = parameter.grad
    return {"loss": loss.detach().float(), "grad": gradients}


def sampler_rows(inputs):
    """Probabilities, kept sets, draws, keys, noise and tokens of the problems without a model."""
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


def choices_rows(inputs):
    """Which paths stay, by their scores, and which answer wins."""
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


def case_rows(case, model, stop, inputs):
    """All rows of a case's levels."""
    prefixes = [prefix["ids"] for prefix in inputs["prefixes"]]
    rows = {}
    if "decoder" in case.levels:
        rows |= decoder_rows(model, prefixes)
    if "score" in case.levels:
        rows |= score_rows(model, stop, prefixes)
    if "training" in case.levels:
        rows |= training_rows(model, stop, prefixes, inputs["labels"])
    if "run" in case.levels:
        rows |= run_rows(model, stop, inputs["runs"])
    return rows
