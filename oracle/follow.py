"""Check a run by following it: for paths whose tokens nobody can foretell.

In bfloat16, and for fresh inputs, tokens cannot be compared with published ones. So the reference
reads each path that was handed in, and asks of every token whether the path's number draws it from
the reference's distribution, or how far it lies from the stretch of numbers that do; and of every
score how far it lies from the reference's. The rest must be consistent: lengths, statuses, ranks.
"""
import math

import numpy as np
import torch

import cases
import reference
from compare import FAIL, NOT_SHOWN, PASS, Result, paths_by_name
from rounded import ALLOWED, LEAST
from sample import path_key, probabilities

# In float32: the mean distance of numbers, and the largest difference of scores
GAP = 2e-6
LARGEST_GAP = 1e-4
SCORE = 2e-5
SCORE_ROUNDING = 1e-3  # in bfloat16 a port may rank scores that it hands in rounded


def fresh_inputs(name, seed):
    """A case's inputs from a seed."""
    case = cases.BY_NAME[name]
    vocab = case.model().config.vocab_size
    return cases.fresh_case(case, seed, vocab)


def fresh_rows(name, seed):
    """What the reference computes for fresh inputs."""
    case = cases.BY_NAME[name]
    model = case.model()
    return reference.case_rows(case, model, case.stop(model), fresh_inputs(name, seed))


def check_shape(run, whole, paths):
    """What is inconsistent in a run's paths, as text; "" where nothing is."""
    stages = run["stages"]
    checkpoints = [stage[0] for stage in stages]
    for index in map(str, range(run["n"])):
        if index not in whole or index not in paths:
            return f"path {index} is missing"
        for path in (whole[index], paths[index]):
            fault = check_path(run, path, checkpoints)
            if fault:
                return f"path {index}: {fault}"
        if whole[index]["status"] == "pruned":
            return f"path {index}: pruned, though nothing is pruned without a check"
    kept = [path for path in paths.values() if path["status"] != "pruned"]
    if len(kept) != stages[-1][1]:
        return f"{len(kept)} paths are kept, expected {stages[-1][1]}"
    return check_ranks(run, paths, kept)


def check_path(run, path, checkpoints):
    """What is wrong with one path's ids and status."""
    ids = path.get("ids")
    if not isinstance(ids, list) or not ids or not all(type(token) is int for token in ids):
        return "ids: expected a list of token ids"
    ends = set(run["eos_ids"])
    if ends.intersection(ids[:-1]):
        return "it goes on behind an end token"
    ended = ids[-1] in ends
    status = path.get("status")
    if status == "pruned":
        fits = len(ids) in checkpoints or ended and len(ids) < checkpoints[-1]
        return "" if fits else f"pruned with {len(ids)} tokens"
    if status not in ("eos", "length"):
        return f"status {status!r}"
    if status == "eos" and not ended or status == "length" and ended:
        return f"status {status} does not fit its last token"
    if status == "length" and len(ids) != run["max_new_tokens"]:
        return f"status length with {len(ids)} tokens"
    return "" if len(ids) <= run["max_new_tokens"] else "too long"


def check_ranks(run, paths, kept):
    """Whether the paths kept have the best scores of those that the last check saw."""
    last = run["stages"][-1][0]
    lowest = min(kept, key=score_of)
    for path in paths.values():
        seen = len(run["stages"]) == 1 or len(path["ids"]) == last
        if path["status"] != "pruned" or not seen:
            continue
        above = path["score"] > lowest["score"]
        tie = path["score"] == lowest["score"] and path["index"] < lowest["index"]
        if above and path["score"] - lowest["score"] > SCORE_ROUNDING or tie and run["zero_head"]:
            return f"path {path['index']} is pruned, though its score is above that of a path kept"
    return ""


def score_of(path):
    """The score of a path that was handed in."""
    return path["score"]


@torch.inference_mode()
def gaps(model, run, index, ids):
    """(T,) float64: how far each token's number lies from the stretch of numbers that draw it."""
    prompt = run["prompt_ids"]
    hidden = model(torch.tensor([prompt + ids]))[0, len(prompt) - 1:-1]
    probs = probabilities(model.logits(hidden), run["temperature"], run["top_k"], run["top_p"])
    cumulative = probs.double().cumsum(-1)
    cumulative = cumulative / cumulative[:, -1:]
    rows = torch.arange(len(ids))
    tokens = torch.tensor(ids)
    high = cumulative[rows, tokens]
    low = high - probs[rows, tokens].double()
    key = path_key(int(run["seed"]), prompt, index)
    noise = reference.numbers_of(key, list(range(len(ids))))
    below = (low - noise).clamp(min=0)
    above = (noise - high).clamp(min=0)
    return torch.maximum(below, above).numpy()


def reference_scores(model, stop, run, paths):
    """What the reference gives to each path at the check that gave it its score."""
    prefixes = []
    for path in paths:
        last = run["stages"][-1][0]
        prefixes.append(run["prompt_ids"] + path["ids"][:last])
    with reference.without_head(stop, run["zero_head"]):
        return stop.score(model, prefixes).tolist()


def follow_run(model, stop, run, found, number):
    """{"fault", "gaps", "scores"} of a run: what is inconsistent, and distances."""
    whole = paths_by_name(found["uninterrupted"][number])
    paths = paths_by_name(found["paths"][number])
    if whole is None or paths is None:
        return {"fault": "expected objects of index, ids, status and score"}
    for path in paths.values():
        if type(path.get("score")) not in (int, float) or not math.isfinite(path["score"]):
            return {"fault": f"path {path['index']}: expected a score"}
    fault = check_shape(run, whole, paths)
    kept = sorted(path["index"] for path in paths.values() if path["status"] != "pruned")
    if not fault and sorted(found["kept"][number]) != kept:
        fault = f"kept: expected {kept}, the paths that are not pruned"
    if fault:
        return {"fault": fault}
    distances = []
    for path in [*whole.values(), *paths.values()]:
        distances.append(gaps(model, run, path["index"], path["ids"]))
    order = list(paths)
    expected = reference_scores(model, stop, run, [paths[index] for index in order])
    differences = [abs(paths[index]["score"] - score) for index, score in zip(order, expected)]
    return {"fault": "", "gaps": np.concatenate(distances), "scores": differences}


def allowed_of(options, name, number):
    """{"mean_gap", "largest_gap", "mean_score"} that a run may show."""
    if options.dtype == "float32":
        return {"mean_gap": GAP, "largest_gap": LARGEST_GAP, "mean_score": SCORE}
    measured = options.manifest["bfloat16"]["runs"][name][str(number)]
    return {
        "mean_gap": ALLOWED * max(LEAST, measured["mean_gap"]),
        "largest_gap": 1.0,
        "mean_score": ALLOWED * max(LEAST, measured["mean_score"])}


def judge(result, allowed):
    """The Result of one run that was followed."""
    if result["fault"]:
        return Result(FAIL, f": {result['fault']}", math.inf)
    mean_gap = float(result["gaps"].mean())
    mean_score = float(np.mean(result["scores"]))
    if mean_gap > allowed["mean_gap"] or result["gaps"].max() > allowed["largest_gap"]:
        what = ": tokens that their numbers do not draw"
        return Result(FAIL, what, mean_gap, allowed["mean_gap"])
    if mean_score > allowed["mean_score"]:
        return Result(FAIL, ": scores of paths", mean_score, allowed["mean_score"])
    return Result(PASS, "", mean_gap, allowed["mean_gap"])


def run_inputs(name, options):
    """The runs of a case: published or fresh ones."""
    if options.fresh is not None:
        return fresh_inputs(name, options.fresh)["runs"]
    return cases.read_case(name)["runs"]


def run_rows(name, found, options):
    """{"paths": {label: Result}} of a case's runs, followed."""
    case = cases.BY_NAME[name]
    model = case.model()
    stop = case.stop(model)
    results = {}
    for number, run in enumerate(run_inputs(name, options)):
        if branches(run):
            continue
        if not is_shown(found, number):
            results[str(number)] = Result(NOT_SHOWN)
            continue
        allowed = allowed_of(options, name, number)
        results[str(number)] = judge(follow_run(model, stop, run, found, number), allowed)
    return {"paths": results}


def branches(run):
    """Whether paths of a run branch; such a run is compared in float32 only."""
    return any(len(stage) == 3 for stage in run["stages"])


def is_shown(found, number):
    """Whether all of a run was handed in."""
    for row in ("uninterrupted", "paths", "kept"):
        entries = found.get(row)
        if not isinstance(entries, list) or entries[number:number + 1] in ([], [None]):
            return False
    return True
