"""Check a run by following it: for paths whose tokens nobody can foretell.

In bfloat16, and for fresh inputs, tokens cannot be compared with published ones. So the reference
reads each path that was handed in, and asks of every token whether the path's number draws it from
the reference's distribution, or how far it lies from the stretch of numbers that do; and of every
score how far it lies from the reference's. The rest must be consistent: lengths, statuses, ranks.
"""
import functools
import math

import numpy as np
import torch

import cases
import reference
from compare import FAIL, NOT_SHOWN, PASS, Result, entries_of, paths_by_name
from plain_decoder import ACCEPTABLE, Port
from plain_sampler import choices_rows, sampler_rows
from rounded import ALLOWED
from rounding import LOGITS
from sample import probabilities
from vector_files import in_json, write_json

# In float32: the mean distance of numbers, and the largest one
GAP = 2e-6
LARGEST_GAP = 1e-4
CLOSE_EXPERTS = 2e-5
SCORE_ROUNDING = 1e-3  # in bfloat16 a port may rank scores that it hands in rounded
RUN_ROWS = ("uninterrupted", "paths", "kept")


class Fresh:
    """What a case asks for and expects with inputs made from a seed."""

    def __init__(self, name, seed):
        self.name = name
        self.case = cases.BY_NAME.get(name)
        if self.case is None:
            inputs = cases.fresh_model_free(name, seed)
            make = sampler_rows if name == "sampler" else choices_rows
            self.inputs = in_json(inputs)
            self.expected = in_json(make(self.inputs))
            self.allowed = {}
            return
        self.model = self.case.model()
        self.stop = self.case.stop(self.model)
        self.inputs = cases.fresh_case(self.case, seed, self.model.config.vocab_size)
        self._make_firm(seed)

    def _make_firm(self, seed):
        """Put other ids in the place of prefixes where two experts are so close that float32 may
        choose either: there right ports differ."""
        port = Port(self.model, self.stop, None, torch.float64)
        generator = cases.fresh_generator(f"{self.name} again", seed)
        for prefix in self.inputs["prefixes"]:
            while not port.is_firm(prefix["ids"], CLOSE_EXPERTS):
                prefix["ids"] = cases.random_ids(
                    len(prefix["ids"]), self.model.config.vocab_size, generator)

    @functools.cached_property
    def rows(self):
        """({row: value}, {row: tolerances}) that the reference computes."""
        rows, allowed = reference.model_rows(self.model, self.stop, self.inputs)
        rows.pop("experts", None)  # the choice may be close
        rows |= {row: [None] * len(self.inputs["runs"]) for row in RUN_ROWS if self.inputs["runs"]}
        if self.inputs["runs"]:
            allowed["paths"] = reference.path_tolerances(
                self.inputs["runs"], rows["logits"], allowed["logits"])
        return in_json(rows), in_json(allowed)

    @functools.cached_property
    def expected(self):
        """{row: value}."""
        return self.rows[0]

    @functools.cached_property
    def allowed(self):
        """{row: tolerances}."""
        return self.rows[1]

    @functools.cache
    def accepted(self, key):
        """{row: value} with a rounding that a port may choose."""
        return in_json(reference.acceptable_rows(self.model, self.stop, self.inputs, key))

    def alternatives(self, row):
        """Pairs of the name of such a rounding and {label: the numbers it gives} of a row."""
        for key, what in ACCEPTABLE.items() if self.case is not None else ():
            yield what, entries_of(row, self.accepted(key).get(row))


def write_inputs(name, seed, folder):
    """Write a case's inputs from a seed to folder/NAME/case.json; -> the file."""
    file = folder / name / "case.json"
    write_json(file, Fresh(name, seed).inputs)
    return file


def check_shape(run, whole, paths, vocab):
    """What is inconsistent in a run's paths, as text; "" where nothing is."""
    stages = run["stages"]
    checkpoints = [stage[0] for stage in stages]
    if whole.keys() != set(map(str, range(run["n"]))):
        return f"uninterrupted: expected the paths 0 to {run['n'] - 1}"
    if {path["index"] for path in paths.values()} != set(range(run["n"])):
        return f"expected paths of the indices 0 to {run['n'] - 1}"
    for name, path in [*whole.items(), *paths.items()]:
        fault = check_path(run, path, checkpoints, vocab)
        if fault:
            return f"path {name}: {fault}"
    if any(path["status"] == "pruned" for path in whole.values()):
        return "uninterrupted: a path is pruned, though nothing is pruned without a check"
    kept = [path for path in paths.values() if path["status"] != "pruned"]
    if branches(run):
        return check_branches(run, paths)
    if len(kept) != stages[-1][1]:
        return f"{len(kept)} paths are kept, expected {stages[-1][1]}"
    return check_ranks(run, paths, kept)


def check_branches(run, paths):
    """What is inconsistent in the branches of paths: each branching has all its copies, the same
    tokens up to it, and at each check the best have stayed."""
    for path in paths.values():
        taken = path.get("branches", [])
        copies = [(stage[0], stage[2]) for stage in run["stages"] if len(stage) == 3]
        if len(taken) > len(copies):
            return f"path {reference_name(path)}: more branches than branchings"
        for depth, branch in enumerate(taken):
            checkpoint, count = copies[depth]
            if not 0 <= branch < count or len(path["ids"]) < checkpoint:
                return f"path {reference_name(path)}: a branch that cannot be"
            for other in range(count):
                sibling = [one for one in paths.values() if one["index"] == path["index"]
                           and one.get("branches", [])[:depth + 1] == [*taken[:depth], other]]
                if not sibling or sibling[0]["ids"][:checkpoint] != path["ids"][:checkpoint]:
                    return f"path {reference_name(path)}: a branch beside it is missing"
    return ""


def reference_name(path):
    """A path's index and branches."""
    return ".".join(map(str, [path["index"], *path.get("branches", [])]))


def check_path(run, path, checkpoints, vocab):
    """What is wrong with one path's ids and status."""
    ids = path.get("ids")
    if not isinstance(ids, list) or not ids or not all(type(token) is int for token in ids):
        return "ids: expected a list of token ids"
    if not all(0 <= token < vocab for token in ids):
        return f"ids: expected token ids from 0 to {vocab - 1}"
    ends = set(run["eos_ids"])
    if ends.intersection(ids[:-1]):
        return "it goes on behind an end token"
    ended = ids[-1] in ends
    status = path.get("status")
    if status == "pruned":
        fits = len(ids) in checkpoints or ended and len(ids) < checkpoints[-1]
        return "" if fits else f"pruned with {len(ids)} tokens"
    if status not in ("eos", "length"):
        return "status: expected eos, length or pruned"
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
def gaps(model, run, path):
    """(T,) float64: how far each token's number lies from the stretch of numbers that draw it."""
    prompt = run["prompt_ids"]
    ids = path["ids"]
    hidden = model(torch.tensor([prompt + ids]))[0, len(prompt) - 1:-1]
    probs = probabilities(model.logits(hidden), run["temperature"], run["top_k"], run["top_p"])
    cumulative = probs.double().cumsum(-1)
    cumulative = cumulative / cumulative[:, -1:]
    rows = torch.arange(len(ids))
    tokens = torch.tensor(ids)
    high = cumulative[rows, tokens]
    low = high - probs[rows, tokens].double()
    noise = reference.path_numbers(run, path["index"], path.get("branches", []), len(ids))
    below = (low - noise).clamp(min=0)
    above = (noise - high).clamp(min=0)
    return torch.maximum(below, above).numpy()


def reference_scores(model, stop, run, paths):
    """What the reference gives to each path at the check that gave it its score."""
    prefixes = []
    for path in paths:
        prefixes.append(run["prompt_ids"] + path["ids"][:run["stages"][-1][0]])
    with reference.without_head(stop, run["zero_head"]):
        return stop.score(model, prefixes).tolist()


def follow_run(model, stop, run, found, number):
    """{"fault", "gaps", "scores"} of a run: what is inconsistent, and distances."""
    whole = paths_by_name(found["uninterrupted"][number])
    paths = paths_by_name(found["paths"][number])
    if whole is None or paths is None:
        return {"fault": "expected objects of index, ids, status and score"}
    for name, path in paths.items():
        score = path.get("score")
        if type(score) not in (int, float) or not abs(score) <= 1e30:
            return {"fault": f"path {name}: expected a score"}
    fault = check_shape(run, whole, paths, model.config.vocab_size)
    kept = sorted(name for name, path in paths.items() if path["status"] != "pruned")
    given = found["kept"][number]
    if not fault and (not isinstance(given, list) or sorted(map(str, given)) != kept):
        fault = f"kept: expected {', '.join(kept)}, the paths that are not pruned"
    if fault:
        return {"fault": fault}
    distances = [gaps(model, run, path) for path in [*whole.values(), *paths.values()]]
    expected = reference_scores(model, stop, run, list(paths.values()))
    differences = [abs(path["score"] - score) for path, score in zip(paths.values(), expected)]
    return {"fault": "", "gaps": np.concatenate(distances), "scores": differences}


def kind_of(run):
    """Runs without noise are measured apart: there a close token is another one at once."""
    return "greedy" if run["temperature"] == 0 else "sampled"


def tolerances(case, options, number):
    """{"mean_gap", "largest_gap", "mean_score"} that a run may show."""
    run = case.inputs["runs"][number]
    if options.dtype == "float32":
        return {"mean_gap": GAP, "largest_gap": LARGEST_GAP,
                "mean_score": case.allowed["paths"][number]}
    measured = options.manifest["bfloat16"]
    share = ALLOWED * measured["rows"][case.name]["logits"]["largest"] / LOGITS
    return {
        "mean_gap": ALLOWED * measured["runs"][case.name][kind_of(run)]["mean_gap"],
        "largest_gap": 1.0,
        "mean_score": share * case.allowed["paths"][number]}


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


def run_results(case, found, options):
    """{label: Result} of a case's runs, followed."""
    known = cases.BY_NAME[case.name]
    model = known.model()
    stop = known.stop(model)
    results = {}
    for number, run in enumerate(case.inputs["runs"]):
        if not is_shown(found, number):
            results[str(number)] = Result(NOT_SHOWN)
            continue
        allowed = tolerances(case, options, number)
        results[str(number)] = judge(follow_run(model, stop, run, found, number), allowed)
    return results


def branches(run):
    """Whether paths of a run branch."""
    return any(len(stage) == 3 for stage in run["stages"])


def is_shown(found, number):
    """Whether all of a run was handed in."""
    for row in RUN_ROWS:
        entries = found.get(row)
        if not isinstance(entries, list) or entries[number:number + 1] in ([], [None]):
            return False
    return True
