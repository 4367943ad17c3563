"""Whole runs with one known mistake each: in the paths, at the check, and behind it.

A run without mistakes is known from its uninterrupted paths and the scores of their prefixes: each
kept path is its uninterrupted self, each pruned one is cut at the check. Mistakes behind the check
need the paths to be sampled on: each token by one pass over the whole row, without a cache.
"""
import numpy as np
import torch

from model import Positions
from plain_decoder import Port
from reference import numbers_of, without_head
from rounding import log_odds, sigmoid
from sample import draw, path_key, probabilities
from plain_sampler import kept_indices, mix

# In the paths themselves
PATHS = {
    "end-dropped": "the end token does not belong to its path",
    "end-ignored": "end tokens do not end a path",
    "end-at-limit": "an end token as the last one allowed is called length",
    "limit-more": "a path may have one token too many",
    "limit-fewer": "a path may have one token too few",
    "counter-from-one": "the run counts t from 1",
    "counter-prompt": "the run counts t from the prompt's length",
    "index-rows": "every path of a run has the numbers of path 0"}

# At the check
CHECK = {
    "check-early": "the check comes one token too early",
    "check-late": "the check comes one token too late",
    "check-without-last": "the check does not see the last token drawn",
    "check-without-prompt": "the check does not see the prompt",
    "ended-never-kept": "ended paths are never kept",
    "ended-always-kept": "ended paths are always kept",
    "ended-without-end": "an ended path is scored without its end token",
    "ended-not-pruned": "an ended path that is not kept keeps its status",
    "ended-not-checked": "ended paths bear no score of their own: they count as 0",
    "pruned-whole": "pruned paths are finished all the same",
    "run-ties-higher": "ties of scores go to the higher index",
    "run-lowest": "the paths of the lowest scores are kept",
    "run-more": "one path too many is kept",
    "run-fewer": "one path too few is kept",
    "run-threshold": "paths with scores above one half are kept, whatever keep says",
    "cascade-first": "a cascade makes its first check only",
    "cascade-last": "a cascade makes its last check only",
    "cascade-old-scores": "later checks of a cascade rank by the first check's scores",
    "cascade-stale": "a path that ends between two checks keeps the score of its shorter prefix",
    "cascade-ended-exempt": "a path that has ended and was kept once is not checked again",
    "run-logits": "paths are ranked by logits, or by scores in float64, not by scores in float32",
    "run-float64": "paths are ranked by logits, or by scores in float64, not by scores in float32",
    "run-clamped-15": "small scores are equal when they are ranked: clamped, or 1 less the rest",
    "run-clamped-20": "small scores are equal when they are ranked: clamped, or 1 less the rest",
    "run-clamped-30": "small scores are equal when they are ranked: clamped, or 1 less the rest",
    "run-one-minus": "small scores are equal when they are ranked: clamped, or 1 less the rest",
    "cascade-from-all": "later checks of a cascade choose among the pruned paths too",
    "paths-without-scores": "paths bear the score of the lowest index for all"}

# Behind the check
RESUME = {
    "cache-left": "the [STOP] keys and values are left in the cache, and the row is longer by m",
    "cache-seen": "the [STOP] keys and values are still seen, though positions are right",
    "positions-advanced": "positions go on behind the [STOP] tokens, whose keys are gone",
    "positions-back": "positions behind the check are one too low",
    "counter-advanced": "the noise counter goes on m too far behind the check",
    "counter-restarted": "the noise counter restarts at 0 behind the check",
    "counter-skipped": "the noise counter skips one number at the check",
    "counter-back": "the noise counter repeats one number at the check",
    "lora-left-on": "LoRA stays on behind the check",
    "last-token-twice": "the last token before the check is fed twice",
    "next-from-stop": "the first token behind the check is drawn from a [STOP] position",
    "rows-renumbered": "kept paths go on with the numbers of their new rows"}

# Where paths branch
BRANCHES = {
    "branch-same": "branches of a path take the same numbers",
    "branch-no-length": "the key of a branch leaves out the length at which it branched",
    "branch-zero-folded": "branch 0 gets a key of its own too",
    "branch-from-one": "branches are numbered from 1",
    "branch-restarted": "the noise counter restarts at 0 where a path branches",
    "branch-ended": "paths that have ended branch too",
    "branch-ties-new": "of equal scores the paths that branched first stay, whatever their index",
    "branch-ties-later": "of equal scores the later branch stays",
    "branch-ties-made": "of equal scores of one index the paths that were made first stay",
    "branch-whole": "a branch shows the tokens behind its branching only"}


# Runs on which mistakes in the paths and behind the check are not tried: they take time
NOT_TRIED = ("branch ties", "branch ties twice", "ended in a cascade", "saturated", "small scores")


class Rows:
    """Passes over whole rows of one base model, with [STOP] vectors anywhere among the tokens."""

    def __init__(self, model, stop):
        self.model = model
        self.stop = stop
        self.scores = {}

    def score(self, ids):
        """The score of prompt + prefix, kept for the next time."""
        key = (bool(self.stop.head.weight.any()), *ids)
        if key not in self.scores:
            self.scores[key] = self.stop.score(self.model, [ids]).item()
        return self.scores[key]

    def log_odds(self, ids):
        """The number whose sigmoid is the score, in float64."""
        logits = Port(self.model, self.stop, None, torch.float64).score_entry(ids)["logits"]
        return log_odds(logits.tolist())

    def logits(self, x, positions, seen, active=None):
        """Next-token logits (V,) at the last of the inputs x (T, hidden), where seen(window) is
        (T, T) bool and LoRA is active at `active` (T,) bool."""
        model = self.model
        T = len(x)
        places = Positions(model, positions[None], x.dtype)
        for window in places.attend.masks:
            mask = torch.zeros(T, T).masked_fill(~seen(window), -torch.inf)
            places.attend.masks[window] = mask[None]
        adapter = None if active is None else self.stop.lora.at(active[None])
        x = x[None]
        for layer in model.model.layers:
            x = layer(x, places, None, adapter)
        return model.logits(model.model.norm(x)[0, -1])

    def embed(self, ids):
        return self.model.model.embed_tokens(torch.tensor(ids, dtype=torch.int64))


def next_logits(rows, prompt, ids, checkpoint, wrong):
    """Logits (V,) for the token behind `ids`, of which `checkpoint` stood before the check."""
    m = rows.stop.m
    before = prompt + ids[:checkpoint]
    behind = ids[checkpoint:]
    if wrong == "last-token-twice":
        before = before + before[-1:]
    L = len(before)
    inserted = wrong in ("cache-left", "cache-seen")
    if wrong == "next-from-stop" and not behind:
        inserted = True
    parts = [rows.embed(before)]
    if inserted:
        parts.append(rows.stop.tokens.expand(m, -1))
    parts.append(rows.embed(behind))
    x = torch.cat(parts)
    slots = torch.arange(len(x))
    stops = torch.zeros(len(x), dtype=torch.bool)
    stops[L:L + m] = inserted
    later = slots >= L
    positions = slots
    if wrong == "cache-seen":
        positions = torch.where(later & ~stops, slots - m, slots)
    elif wrong == "positions-advanced":
        positions = torch.where(later, slots + m, slots)
    elif wrong == "positions-back":
        positions = torch.where(later, slots - 1, slots)
    active = stops if inserted else None
    if wrong == "lora-left-on":
        active = later

    def seen(window):
        queries = positions[:, None]
        keys = positions[None]
        mask = (slots[None] <= slots[:, None])
        if window is not None:
            mask = mask & (keys > queries - window)
        return mask

    if wrong in ("cache-seen", "cache-left") and not behind:
        # The last token before the check has already been read.
        return rows.logits(rows.embed(before), torch.arange(L), causal(L))
    return rows.logits(x, positions, seen, active)


def causal(T):
    """The visibility of an ordinary pass."""
    slots = torch.arange(T)

    def seen(window):
        mask = slots[None] <= slots[:, None]
        if window is not None:
            mask = mask & (slots[None] > slots[:, None] - window)
        return mask

    return seen


def noise_position(t, checkpoint, m, prompt_length, wrong):
    """Which number the token after t others takes."""
    behind = t >= checkpoint
    if wrong == "counter-from-one":
        return t + 1
    if wrong == "counter-prompt":
        return t + prompt_length
    if not behind:
        return t
    moved = {
        "counter-advanced": t + m,
        "counter-restarted": t - checkpoint,
        "counter-skipped": t + 1,
        "counter-back": t - 1}
    return moved.get(wrong, t)


@torch.inference_mode()
def go_on(rows, run, index, ids, wrong, row_number=None):
    """(ids, status) of a path sampled on from `ids` to its end."""
    prompt = run["prompt_ids"]
    checkpoint = len(ids)
    noise_index = index
    if wrong == "rows-renumbered":
        noise_index = row_number
    if wrong == "index-rows":
        noise_index = 0
    key = path_key(int(run["seed"]), prompt, noise_index)
    limit = run["max_new_tokens"]
    limit += {"limit-more": 1, "limit-fewer": -1}.get(wrong, 0)
    ids = list(ids)
    while len(ids) < limit:
        logits = next_logits(rows, prompt, ids, checkpoint, wrong)
        probs = probabilities(logits, run["temperature"], run["top_k"], run["top_p"])
        t = noise_position(len(ids), checkpoint, rows.stop.m, len(prompt), wrong)
        ids.append(draw(probs[None], numbers_of(key, [t])).item())
        if ids[-1] in run["eos_ids"] and wrong != "end-ignored":
            if wrong == "end-dropped":
                ids.pop()
            at_limit = wrong == "end-at-limit" and len(ids) == limit
            return {"ids": ids, "status": "length" if at_limit else "eos"}
    return {"ids": ids, "status": "length"}


def wrong_paths(rows, run, whole, wrong):
    """The row `uninterrupted` of one run, with a mistake in the paths."""
    paths = []
    for path in whole:
        if wrong in ("end-dropped", "end-at-limit") and path["status"] == "eos":
            at_limit = len(path["ids"]) == run["max_new_tokens"]
            ids = path["ids"][:-1] if wrong == "end-dropped" else path["ids"]
            late = wrong == "end-at-limit" and at_limit
            paths.append({"ids": ids, "status": "length" if late else "eos"})
        elif wrong in ("end-dropped", "end-at-limit"):
            paths.append({"ids": path["ids"], "status": path["status"]})
        elif wrong == "limit-fewer" and len(path["ids"]) < run["max_new_tokens"]:
            paths.append({"ids": path["ids"], "status": path["status"]})
        elif wrong == "limit-fewer":
            paths.append({"ids": path["ids"][:-1], "status": "length"})
        elif wrong == "limit-more" and path["status"] == "eos":
            paths.append({"ids": path["ids"], "status": "eos"})
        else:
            start = {"limit-more": path["ids"], "end-ignored": path["ids"]}.get(wrong, [])
            paths.append(go_on(rows, run, path["index"], start, wrong))
    return [{"index": index} | path for index, path in enumerate(paths)]


def prefix_score(rows, run, path, checkpoint, wrong):
    """The score that a check at `checkpoint` gives to a path."""
    ended = path["status"] == "eos" and len(path["ids"]) <= checkpoint
    ids = path["ids"][:checkpoint]
    if ended and wrong == "ended-not-checked":
        return 0.0
    if ended and wrong == "ended-without-end":
        ids = ids[:-1]
    if wrong == "check-without-last":
        ids = ids[:-1]
    if wrong == "check-without-prompt":
        return rows.score(ids)
    return rows.score(run["prompt_ids"] + ids)


def stages_of(run, wrong):
    """[[checkpoint, keep], ...] as a port with this mistake has them."""
    stages = run["stages"]
    if wrong == "cascade-first":
        return stages[:1]
    if wrong == "cascade-last":
        return stages[-1:]
    moved = {"check-early": -1, "check-late": 1}.get(wrong, 0)
    return [[max(1, checkpoint + moved), keep] for checkpoint, keep in stages]


@torch.inference_mode()
def checked_run(rows, run, whole, wrong=None):
    """The rows `paths` and `kept` of one run, from its uninterrupted paths."""
    n = run["n"]
    alive = list(range(n))
    scores = {}
    first_scores = {}
    cut = {}  # index -> new tokens when it was pruned
    for checkpoint, keep in stages_of(run, wrong):
        candidates = list(range(n)) if wrong == "cascade-from-all" and cut else alive
        for index in alive:
            path = whole[index]
            ended = path["status"] == "eos" and len(path["ids"]) < checkpoint
            stale = wrong == "cascade-stale" and index in scores and ended
            if not stale:
                scores[index] = prefix_score(rows, run, path, checkpoint, wrong)
            first_scores.setdefault(index, scores[index])
        ranked = first_scores if wrong == "cascade-old-scores" else scores
        if wrong in ("run-logits", "run-float64"):
            ranked = dict(scores)
            for index in alive:
                ids = run["prompt_ids"] + whole[index]["ids"][:checkpoint]
                ranked[index] = 0.0 if run["zero_head"] else rows.log_odds(ids)
                if wrong == "run-float64":
                    ranked[index] = sigmoid(ranked[index])
        if wrong is not None and wrong.startswith(("run-clamped", "run-one-minus")):
            ranked = {}
            for index in alive:
                ids = run["prompt_ids"] + whole[index]["ids"][:checkpoint]
                odds = 0.0 if run["zero_head"] else rows.log_odds(ids)
                ranked[index] = small_score(odds, wrong)
        if wrong == "cascade-ended-exempt" and cut:
            ranked = {index: score + 2 * has_ended(whole[index], checkpoint)
                      for index, score in ranked.items()}
        kept = keep_some(candidates, ranked, keep, whole, checkpoint, wrong)
        for index in alive:
            if index not in kept:
                cut[index] = checkpoint
        alive = kept
        for index in kept:
            cut.pop(index, None)
    if wrong == "paths-without-scores":
        scores = dict.fromkeys(scores, scores[0])
    return described_run(rows, run, whole, alive, scores, cut, wrong)


def small_score(odds, wrong):
    """A score that is computed so that small ones are lost, in float32."""
    if wrong == "run-one-minus":
        return float(np.float32(1) - np.float32(sigmoid(-odds)))
    limit = int(wrong.rpartition("-")[2])
    return float(np.float32(sigmoid(min(max(odds, -limit), limit))))


def has_ended(path, checkpoint):
    """Whether a path has ended when it comes to a check."""
    return path["status"] == "eos" and len(path["ids"]) <= checkpoint


def keep_some(candidates, scores, keep, whole, checkpoint, wrong):
    """The indices that a check keeps, rising."""
    ended = []
    for index in candidates:
        if whole[index]["status"] == "eos" and len(whole[index]["ids"]) <= checkpoint:
            ended.append(index)
    if wrong in ("ended-never-kept", "ended-always-kept"):
        first = [index for index in candidates if index not in ended]
        if wrong == "ended-always-kept":
            first = ended
        others = [index for index in candidates if index not in first]
        kept = kept_indices(first, scores, keep)
        return sorted(kept + kept_indices(others, scores, keep - len(kept))) if len(kept) < keep \
            else kept
    names = {
        "run-ties-higher": "rank-ties-higher",
        "run-lowest": "rank-lowest",
        "run-more": "rank-more",
        "run-fewer": "rank-fewer",
        "run-threshold": "rank-threshold"}
    return kept_indices(candidates, scores, keep, names.get(wrong))


def described_run(rows, run, whole, kept, scores, cut, wrong):
    """The rows `paths` and `kept` of one run as they are handed in."""
    last_checkpoint = run["stages"][-1][0]
    paths = []
    for index, path in enumerate(whole):
        about = {"index": index, "ids": path["ids"], "status": path["status"]}
        about["score"] = np.float32(scores[index])
        if index in cut:
            about["ids"] = path["ids"][:cut[index]]
            ended = path["status"] == "eos" and len(path["ids"]) <= cut[index]
            if wrong == "pruned-whole":
                about["ids"] = path["ids"]
            if not (ended and wrong == "ended-not-pruned"):
                about["status"] = "pruned"
        elif wrong in RESUME and len(path["ids"]) > last_checkpoint:
            ids = path["ids"][:last_checkpoint]
            about |= go_on(rows, run, index, ids, wrong, kept.index(index))
        paths.append(about)
    return {"paths": paths, "kept": sorted(kept)}


# ------------------------------------------------------------------------------------- branches


def branch_of(key, length, branch, wrong):
    """The key of a branch: branch 0 keeps its path's."""
    if wrong == "branch-from-one":
        branch += 1
    if branch == 0 and wrong != "branch-zero-folded" or wrong == "branch-same":
        return key
    if wrong == "branch-no-length":
        return mix(key ^ branch)
    return mix(mix(key ^ length) ^ branch)


@torch.inference_mode()
def decode_to(rows, run, path, until, wrong):
    """Sample a branching run's path on, until it has so many tokens or has ended."""
    prompt = run["prompt_ids"]
    while path["status"] == "running" and len(path["ids"]) < until:
        ids = path["ids"]
        x = rows.embed(prompt + ids)
        logits = rows.logits(x, torch.arange(len(x)), causal(len(x)))
        probs = probabilities(logits, run["temperature"], run["top_k"], run["top_p"])
        t = len(ids) - path["restart"]
        ids.append(draw(probs[None], numbers_of(path["key"], [t])).item())
        if ids[-1] in run["eos_ids"]:
            path["status"] = "eos"
        elif len(ids) == run["max_new_tokens"]:
            path["status"] = "length"


@torch.inference_mode()
def branching_run(rows, run, wrong):
    """The rows `paths` and `kept` of one run that branches."""
    paths = []
    for index in range(run["n"]):
        key = path_key(int(run["seed"]), run["prompt_ids"], index)
        paths.append({"index": index, "branches": [], "ids": [], "status": "running", "score": 0.0,
                      "key": key, "restart": 0, "inherited": 0})
    alive = list(paths)
    for stage in run["stages"]:
        checkpoint, keep, copies = (*stage, 1)[:3]
        for path in alive:
            decode_to(rows, run, path, checkpoint, wrong)
            path["score"] = rows.score(run["prompt_ids"] + path["ids"])
        place = place_in_ranking
        if wrong == "branch-ties-later":
            place = later_branches_first
        if wrong == "branch-ties-new":
            place = by_score_alone
        if wrong == "branch-ties-made":
            place = by_score_and_index
        alive.sort(key=place)
        for path in alive[keep:]:
            path["status"] = "pruned"
        kept = alive[:keep]
        alive = list(kept)
        for path in kept:
            if copies == 1:
                continue
            if path["status"] == "running" or wrong == "branch-ended" and path["status"] == "eos":
                new = branched(path, checkpoint, copies, wrong)
                alive += new
                paths += new
    for path in alive:
        decode_to(rows, run, path, run["max_new_tokens"], wrong)
    names = []
    for path in alive:
        named = path["branches"]
        names.append(".".join(map(str, [path["index"], *named])) if named else path["index"])
    return {"paths": [described_path(path, wrong) for path in paths], "kept": names}


def place_in_ranking(path):
    """Sorts the paths of a branching run: the best first."""
    return -path["score"], path["index"], path["branches"]


def later_branches_first(path):
    """The same, with the later of two branches first."""
    return -path["score"], path["index"], [-branch for branch in path["branches"]]


def by_score_alone(path):
    """The same, with ties left in the order in which the paths came to be."""
    return -path["score"]


def by_score_and_index(path):
    """The same, with ties of one index left in that order."""
    return -path["score"], path["index"]


def branched(path, length, copies, wrong):
    """The new paths that a path branches into; it becomes the first of them itself."""
    new = []
    first = 1 if wrong == "branch-from-one" else 0
    for number in range(1, copies):
        new.append(path | {
            "ids": list(path["ids"]),
            "branches": path["branches"] + [number + first],
            "key": branch_of(path["key"], length, number, wrong),
            "restart": length if wrong == "branch-restarted" else path["restart"],
            "inherited": length})
    path["key"] = branch_of(path["key"], length, 0, wrong)
    path["branches"] = path["branches"] + [first]
    if wrong == "branch-restarted":
        path["restart"] = length
    return new


def described_path(path, wrong):
    """A path of a branching run as it is handed in."""
    ids = path["ids"][path["inherited"]:] if wrong == "branch-whole" else path["ids"]
    about = {"index": path["index"], "ids": ids, "status": path["status"]}
    if path["branches"]:
        about["branches"] = path["branches"]
    return about | {"score": np.float32(path["score"])}


def wrong_run_rows(model, stop, runs, expected, wrong):
    """{row: list of the runs' values}; None where the mistake was not tried on a run."""
    rows = Rows(model, stop)
    found = {"uninterrupted": [], "paths": [], "kept": []}
    for number, run in enumerate(runs):
        whole = expected["uninterrupted"][number]
        if wrong in (PATHS | RESUME) and run["name"] in NOT_TRIED:
            for entries in found.values():
                entries.append(None)
            continue
        if wrong in PATHS:
            found["uninterrupted"].append(wrong_paths(rows, run, whole, wrong))
            found["paths"].append(None)
            found["kept"].append(None)
            continue
        found["uninterrupted"].append(whole)
        branching = len(run["stages"][0]) == 3
        if branching and (wrong in BRANCHES or wrong is None):
            with without_head(stop, run["zero_head"]):
                result = branching_run(rows, run, wrong)
            found["paths"].append(result["paths"])
            found["kept"].append(result["kept"])
            continue
        if branching:
            found["paths"].append(None)
            found["kept"].append(None)
            continue
        if wrong in RESUME and len(run["stages"]) > 1:
            found["paths"].append(None)
            found["kept"].append(None)
            continue
        with without_head(stop, run["zero_head"]):
            result = checked_run(rows, run, whole, wrong)
        found["paths"].append(result["paths"])
        found["kept"].append(result["kept"])
    return found
