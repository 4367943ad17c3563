"""A plain sampler, from logits to a token, with keys, numbers, ranks and votes: the reference, and
each known mistake.

numpy and Python integers, as clauses S1 to S9, R4 and R8 of oracle/README.md say, and a place for
each mistake. Several variants may bear one title: they are one mistake to different degrees.
"""
import math
from fractions import Fraction

import numpy as np

from compare import LEVELS
from plumbing.answers import same_vote

SAMPLER = {
    "temperature-last": "temperature comes after top-k and top-p",
    "temperature-multiplied": "logits are multiplied by the temperature",
    "temperature-ignored": "the temperature is ignored",
    "temperature-floor-0.1": "the temperature has a floor",
    "temperature-floor-0.05": "the temperature has a floor",
    "temperature-floor-0.01": "the temperature has a floor",
    "temperature-floor-0.001": "the temperature has a floor",
    "temperature-floor-0.0001": "the temperature has a floor",
    "temperature-floor-0.00001": "the temperature has a floor",
    "temperature-small-is-greedy": "small temperatures are taken as 0",
    "temperature-zero-is-one": "temperature 0 samples as temperature 1 does",
    "greedy-last": "temperature 0 takes the highest id of equals",
    "temperature-reciprocal": "the difference is multiplied by 1 / temperature",
    "temperature-float64": "the temperature is not rounded to float32",
    "logits-float64": "logits are not rounded to float32 when they are read",
    "top-k-ignored": "top-k is ignored",
    "top-k-fewer": "top-k keeps one too few",
    "top-k-more": "top-k keeps one too many",
    "top-k-by-logit": "top-k compares logits, not z",
    "top-k-zero": "top-k 0 keeps one token",
    "top-k-ties-cut": "ties at top-k are cut",
    "top-p-ignored": "top-p is ignored",
    "top-p-all": "top-p counts the mass that top-k removed, as if it came first",
    "top-p-short": "top-p drops the token that crosses p",
    "top-p-more": "top-p keeps one too many",
    "top-p-inclusive-64": "top-p goes on where the mass before equals p",
    "top-p-inclusive": "top-p goes on where the mass before equals p",
    "top-p-float32": "top-p's running sum is in float32",
    "top-p-ties-cut": "ties at top-p are cut",
    "top-p-close": "z that differ by less than 1e-6 are taken as equal at top-p",
    "ties-cut": "ties at top-k and at top-p are cut",
    "not-renormalised": "probabilities are not renormalised",
    "draw-or-equal": "a token is drawn whose cumulative probability equals the number",
    "draw-float32": "cumulative sums in float32",
    "draw-float32-sums": "cumulative sums in float32",
    "draw-float32-parts": "cumulative sums in float32",
    "draw-unscaled": "the number is not multiplied by the probabilities' sum",
    "draw-by-size": "tokens are drawn in the order of their probabilities",
    "draw-reversed": "tokens are drawn from the highest id down",
    "seed-32": "the seed is cut to 32 bits",
    "seed-31": "the seed is cut to 31 bits",
    "seed-16": "the seed is cut to 16 bits",
    "seed-8": "the seed is cut to 8 bits",
    "seed-53": "the seed goes through a float64",
    "seed-ignored": "the seed is ignored",
    "seed-last": "the seed is folded after the prompt",
    "prompt-ignored": "the prompt is not in the key",
    "prompt-last-512": "the key drops all but the last prompt ids",
    "prompt-last-256": "the key drops all but the last prompt ids",
    "prompt-last-1024": "the key drops all but the last prompt ids",
    "prompt-first-512": "the key drops all but the first prompt ids",
    "prompt-first-256": "the key drops all but the first prompt ids",
    "prompt-first-1024": "the key drops all but the first prompt ids",
    "prompt-without-last": "the key leaves out the last prompt id",
    "prompt-without-first": "the key leaves out the first prompt id",
    "prompt-reversed": "the key folds the prompt ids from the last to the first",
    "index-ignored": "the path index is not in the key",
    "index-zero": "the path index is not in the key",
    "index-8": "the path index is taken modulo a small number",
    "index-16": "the path index is taken modulo a small number",
    "index-32": "the path index is taken modulo a small number",
    "index-64": "the path index is taken modulo a small number",
    "index-256": "the path index is taken modulo a small number",
    "index-from-one": "path indices begin at 1",
    "index-first": "the path index is folded before the prompt",
    "index-added": "the path index is added to the prompt's key",
    "fold-by-addition": "parts of the key are added, not exclusive-ored",
    "key-unmixed": "the path's key is not mixed",
    "key-32": "the key is cut to 32 bits",
    "key-bytes": "the key's bytes are reversed",
    "mix-without-increment": "mix leaves out the increment",
    "mix-signed": "mix shifts with the sign",
    "mix-factors": "mix has its two factors exchanged",
    "mix-last-shift": "mix leaves out the last shift",
    "position-from-one": "a path's numbers begin at t = 1",
    "position-added": "t is added to the key, not exclusive-ored",
    "position-steps": "t advances the generator's state: mix(key + t * increment)",
    "position-32": "t is taken modulo a small number",
    "position-64": "t is taken modulo a small number",
    "position-256": "t is taken modulo a small number",
    "position-65536": "t is cut to 16 bits",
    "position-32768": "t is cut to 15 bits",
    "position-4294967296": "t is cut to 32 bits",
    "number-52": "numbers have fewer than 53 bits",
    "number-32": "numbers have fewer than 53 bits",
    "number-24": "numbers have fewer than 53 bits",
    "number-float32": "numbers are rounded to float32",
    "number-low": "numbers are made of the low bits",
    "number-rounded": "all 64 bits are rounded to a float64",
    "number-closed": "numbers are divided by 2 ** 53 - 1",
    "number-centred": "numbers lie half a step higher",
    "number-unmixed": "the number is not mixed: the bits of key ^ t"}

CHOICES = {
    "rank-ties-higher": "ties of scores go to the higher index",
    "rank-lowest": "the paths of the lowest scores are kept",
    "rank-rounded-2": "paths are ranked by rounded scores",
    "rank-rounded-3": "paths are ranked by rounded scores",
    "rank-rounded-4": "paths are ranked by rounded scores",
    "rank-float16": "paths are ranked by scores in float16",
    "rank-bfloat16": "paths are ranked by scores in bfloat16",
    "rank-float64": "paths are ranked by scores in float64",
    "rank-more": "one path too many is kept",
    "rank-fewer": "one path too few is kept",
    "rank-text": "scores are compared as text",
    "rank-threshold": "paths with scores above one half are kept, whatever keep says",
    "vote-none-counts": "a path without an answer votes",
    "vote-by-text": "equal answers in different spellings vote apart",
    "vote-last-tie": "ties of votes go to the answer that came last",
    "vote-smallest-tie": "ties of votes go to the first answer in the alphabet",
    "vote-unweighted": "weights are ignored",
    "vote-zero-null": "votes of no weight give no answer",
    "vote-zero-last": "of votes without weight the last wins",
    "vote-mean": "weights are averaged, not added",
    "vote-max": "the largest weight of an answer counts, not the sum",
    "vote-first-weight": "the first weight of an answer counts, not the sum",
    "vote-last-weight": "the last weight of an answer counts, not the sum",
    "vote-majority": "without an absolute majority the first answer wins",
    "vote-sign": "answers are compared without their sign",
    "vote-zero-answer": "the answer 0 does not vote",
    "vote-rounded": "answers are compared to four decimals",
    "vote-float64": "answers are compared as float64 numbers, not exactly",
    "vote-last-spelling": "the winner is shown in its last spelling"}

MASK = 2 ** 64 - 1
INCREMENT = 0x9E3779B97F4A7C15
FACTORS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)


def number_in(wrong):
    """The number at the end of a variant's key: seed-32 -> 32."""
    return int(wrong.rpartition("-")[2])


# --------------------------------------------------------------------------------- probabilities


def probabilities(logits, temperature, top_k, top_p, wrong=None):
    """Probabilities (V,) float64 of logits (V,) float32."""
    logits = np.asarray(logits, dtype=np.float64 if wrong == "logits-float64" else np.float32)
    V = len(logits)
    if wrong is not None and wrong.startswith("temperature-floor"):
        temperature = max(temperature, float(wrong.rpartition("-")[2]))
    if wrong == "temperature-small-is-greedy" and temperature < 1e-5:
        temperature = 0
    if temperature == 0:
        if wrong == "temperature-zero-is-one":
            return probabilities(logits, 1.0, top_k, top_p)
        best = np.flatnonzero(logits == logits.max())
        return np.eye(V)[best[-1 if wrong == "greedy-last" else 0]]
    if wrong == "temperature-ignored":
        temperature = 1.0
    scaled = (logits - logits.max()).astype(np.float32)
    divided = scaled / np.float32(temperature)
    if wrong == "temperature-reciprocal":
        divided = scaled * np.float32(1 / temperature)
    if wrong == "temperature-float64":
        divided = (scaled.astype(np.float64) / temperature).astype(np.float32)
    if wrong == "temperature-multiplied":
        divided = scaled * np.float32(temperature)
    ranked = scaled if wrong == "temperature-last" else divided
    kept = kept_by_top_k(logits if wrong == "top-k-by-logit" else ranked, top_k, wrong)
    kept = kept_by_top_p(ranked, kept, top_p, wrong)
    weights = np.exp(divided).astype(np.float64)
    total = weights.sum() if wrong == "not-renormalised" else weights[kept].sum()
    return np.where(kept, weights, 0) / total


def kept_by_top_k(values, top_k, wrong):
    """(V,) bool."""
    V = len(values)
    if top_k == 0 and wrong == "top-k-zero":
        top_k = 1
    if top_k == 0 or wrong == "top-k-ignored":
        return np.ones(V, bool)
    if wrong == "top-k-fewer":
        top_k = max(1, top_k - 1)
    if wrong == "top-k-more":
        top_k += 1
    if top_k >= V:
        return np.ones(V, bool)
    order = np.argsort(-values, kind="stable")
    if wrong in ("top-k-ties-cut", "ties-cut"):
        kept = np.zeros(V, bool)
        kept[order[:top_k]] = True
        return kept
    return values >= values[order[top_k - 1]]


def kept_by_top_p(values, kept, top_p, wrong):
    """(V,) bool: of those kept so far."""
    if top_p == 1 or wrong == "top-p-ignored":
        return kept
    # As the rooms do: exponentials in float32, sums in float64.
    weights = np.exp(values).astype(np.float32).astype(np.float64)
    if wrong == "top-p-inclusive-64":
        weights = np.exp(values.astype(np.float64))
    order = np.argsort(-values, kind="stable")
    order = order[kept[order]]
    if wrong == "top-p-float32":
        sums = np.cumsum(weights[order], dtype=np.float32)
        before = np.concatenate(([0], sums[:-1])).astype(np.float64)
    else:
        before = np.cumsum(weights[order]) - weights[order]
    total = weights.sum() if wrong == "top-p-all" else weights[kept].sum()
    stays = before < top_p * total
    if wrong in ("top-p-inclusive", "top-p-inclusive-64"):
        stays = before <= top_p * total
    if wrong == "top-p-short":
        stays = np.cumsum(weights[order]) <= top_p * total
    count = max(1, int(stays.sum()))
    if wrong == "top-p-more":
        count = min(count + 1, len(order))
    if wrong in ("top-p-ties-cut", "ties-cut"):
        chosen = np.zeros(len(values), bool)
        chosen[order[:count]] = True
        return chosen
    close = np.float32(1e-6) if wrong == "top-p-close" else 0
    return kept & (values >= values[order[count - 1]] - close)


def draw(probs, number, wrong=None):
    """The token that a number draws from probabilities (V,)."""
    probs = np.asarray(probs)
    order = np.arange(len(probs))
    if wrong == "draw-by-size":
        order = np.argsort(-probs, kind="stable")
    if wrong == "draw-reversed":
        order = order[::-1]
    in_float32 = wrong in ("draw-float32", "draw-float32-sums", "draw-float32-parts")
    dtype = np.float32 if in_float32 else np.float64
    cumulative = np.cumsum(probs[order].astype(dtype), dtype=dtype)
    if wrong == "draw-float32":
        number = np.float32(number)
    if wrong in ("draw-float32-sums", "draw-float32-parts"):
        total = probs.astype(np.float64).sum() if wrong == "draw-float32-parts" else cumulative[-1]
        cumulative = cumulative.astype(np.float64)
        target = number * float(total)
    else:
        target = number if wrong == "draw-unscaled" else dtype(number) * cumulative[-1]
    side = "left" if wrong == "draw-or-equal" else "right"
    place = int(np.searchsorted(cumulative, target, side=side))
    return int(order[min(place, len(probs) - 1)])


# -------------------------------------------------------------------------------- keys and numbers


def shift(x, bits, wrong):
    """x >> bits; with `mix-signed` the sign is repeated."""
    if wrong == "mix-signed" and x >> 63:
        return (x >> bits) | (MASK ^ (MASK >> bits))
    return x >> bits


def mix(x, wrong=None):
    """splitmix64 of a 64-bit number."""
    first, second = FACTORS
    if wrong == "mix-factors":
        second, first = FACTORS
    if wrong != "mix-without-increment":
        x = (x + INCREMENT) & MASK
    x = (x ^ shift(x, 30, wrong)) * first & MASK
    x = (x ^ shift(x, 27, wrong)) * second & MASK
    return x if wrong == "mix-last-shift" else x ^ shift(x, 31, wrong)


def fold(key, part, wrong):
    """The key with one more part in it."""
    part = part & MASK
    if wrong == "fold-by-addition":
        return mix((key + part) & MASK, wrong)
    return mix(key ^ part, wrong)


def seed_of(seed, wrong):
    """The seed as a port with this mistake takes it."""
    if wrong in ("seed-32", "seed-31", "seed-16", "seed-8"):
        return seed & (2 ** number_in(wrong) - 1)
    if wrong == "seed-53":
        return int(float(seed))
    return 0 if wrong == "seed-ignored" else seed


def prompt_of(prompt, wrong):
    """The prompt ids that a port with this mistake folds."""
    if wrong is None or not wrong.startswith("prompt-"):
        return prompt
    if wrong.startswith("prompt-last"):
        return prompt[-number_in(wrong):]
    if wrong.startswith("prompt-first"):
        return prompt[:number_in(wrong)]
    others = {
        "prompt-ignored": [],
        "prompt-without-last": prompt[:-1],
        "prompt-without-first": prompt[1:],
        "prompt-reversed": prompt[::-1]}
    return others[wrong]


def index_of(index, wrong):
    """The path index as a port with this mistake takes it."""
    if wrong in ("index-8", "index-16", "index-32", "index-64", "index-256"):
        return index % number_in(wrong)
    if wrong == "index-from-one":
        return index + 1
    return 0 if wrong == "index-zero" else index


def path_key(seed, prompt, index, wrong=None):
    """The 64-bit key of a path."""
    parts = [seed_of(seed, wrong), *prompt_of(prompt, wrong)]
    index = index_of(index, wrong)
    if wrong == "seed-last":
        parts = parts[1:] + parts[:1]
    if wrong == "index-first":
        parts = [parts[0], index, *parts[1:]]
    key = 0
    for part in parts:
        key = fold(key, part, wrong)
    if wrong == "index-added":
        return (key + index) & MASK
    if wrong == "key-unmixed":
        return key ^ index
    if wrong not in ("index-first", "index-ignored"):
        key = fold(key, index, wrong)
    if wrong == "key-32":
        return key & (2 ** 32 - 1)
    if wrong == "key-bytes":
        return int.from_bytes(key.to_bytes(8, "little"), "big")
    return key


def number(key, t, wrong=None):
    """A path's number in [0, 1) for its t-th new token."""
    if wrong == "position-from-one":
        t += 1
    if wrong is not None and wrong.startswith("position-") and wrong[9:].isdigit():
        t %= number_in(wrong)
    if wrong == "number-unmixed":
        bits = key ^ t
    elif wrong == "position-added":
        bits = mix((key + t) & MASK)
    elif wrong == "position-steps":
        bits = mix((key + t * INCREMENT) & MASK)
    else:
        bits = mix(key ^ t, wrong)
    return number_of_bits(bits, wrong)


def number_of_bits(bits, wrong):
    """64 bits as a number in [0, 1)."""
    if wrong in ("number-52", "number-32", "number-24"):
        width = number_in(wrong)
        return (bits >> (64 - width)) / 2 ** width
    if wrong == "number-low":
        return (bits & (2 ** 53 - 1)) / 2 ** 53
    if wrong == "number-rounded":
        return bits / 2 ** 64
    if wrong == "number-closed":
        return (bits >> 11) / (2 ** 53 - 1)
    if wrong == "number-centred":
        return ((bits >> 11) + 0.5) / 2 ** 53
    right = (bits >> 11) / 2 ** 53
    return float(np.float32(right)) if wrong == "number-float32" else right


def sampler_rows(inputs, wrong=None):
    """All rows of the level `sampler`."""
    rows = {row: [] for row in LEVELS["sampler"]}
    for problem in inputs["distributions"]:
        probs = probabilities(problem["logits"], problem["temperature"], problem["top_k"],
                              problem["top_p"], wrong)
        probs = probs.astype(np.float32)
        rows["probabilities"].append(probs)
        rows["kept_sets"].append(np.flatnonzero(probs).tolist())
    for problem in inputs["draws"]:
        probs = np.asarray(problem["probabilities"], dtype=np.float32)
        rows["draws"].append([draw(probs, u, wrong) for u in problem["numbers"]])
    for problem in inputs["keys"]:
        key = path_key(int(problem["seed"]), problem["prompt_ids"], problem["index"], wrong)
        rows["keys"].append(f"{key:016x}")
    for problem in inputs["noise"]:
        key = int(problem["key"], 16)
        rows["noise"].append([number(key, t, wrong) for t in problem["positions"]])
    for problem in inputs["tokens"]:
        probs = rows["probabilities"][problem["distribution"]]
        key = path_key(int(problem["seed"]), problem["prompt_ids"], problem["index"], wrong)
        numbers = [number(key, t, wrong) for t in problem["positions"]]
        rows["tokens"].append([draw(probs, u, wrong) for u in numbers])
    return rows


# ------------------------------------------------------------------------------- ranks and votes


def ranked_score(score, wrong):
    """What a score counts in the ranking."""
    if wrong in ("rank-rounded-2", "rank-rounded-3", "rank-rounded-4"):
        return round(score, number_in(wrong))
    if wrong == "rank-float16":
        return float(np.float16(score))
    if wrong == "rank-bfloat16":
        bits = np.float32(score).view(np.uint32)
        rounded = (int(bits) + 0x7FFF + (int(bits) >> 16 & 1)) & 0xFFFF0000
        return float(np.uint32(rounded).view(np.float32))
    return -score if wrong == "rank-lowest" else score


def kept_indices(indices, scores, keep, wrong=None):
    """The indices that stay, rising."""
    if wrong == "rank-threshold":
        return [index for index in indices if scores[index] > 0.5] or indices[:1]
    if wrong == "rank-text":
        order = sorted(indices, key=lambda index: str(scores[index]), reverse=True)
        return sorted(order[:keep])  # of equal ones the first stays: the sort is stable
    order = []
    for index in indices:
        tie = -index if wrong == "rank-ties-higher" else index
        order.append([-ranked_score(scores[index], wrong), tie, index])
    order.sort()
    keep = max(1, keep + {"rank-more": 1, "rank-fewer": -1}.get(wrong, 0))
    return sorted(entry[2] for entry in order[:keep])


def vote(answers, weights, wrong=None):
    """The answer that wins."""
    if weights is None or wrong == "vote-unweighted":
        weights = [1.0] * len(answers)
    groups = []
    for answer, weight in zip(answers, weights):
        if answer is None and wrong != "vote-none-counts":
            continue
        if wrong == "vote-zero-answer" and answer is not None and Fraction(answer) == 0:
            continue
        group = find_group(groups, answer, wrong)
        group["spellings"].append(answer)
        group["weights"].append(weight)
    if not groups:
        return None
    if wrong == "vote-smallest-tie":
        groups.sort(key=first_spelling)
    best = None
    for group in groups:
        total = weight_of(group["weights"], wrong)
        group["total"] = total
        ties_late = wrong == "vote-last-tie" or wrong == "vote-zero-last" and total == 0
        late = ties_late and best is not None and total == best["total"]
        if best is None or total > best["total"] or late:
            best = group
    if wrong == "vote-zero-null" and best["total"] == 0:
        return None
    if wrong == "vote-majority":
        if best["total"] <= math.fsum(group["total"] for group in groups) / 2:
            best = groups[0]
    return best["spellings"][-1 if wrong == "vote-last-spelling" else 0]


def weight_of(weights, wrong):
    """What the weights of an answer count together."""
    others = {
        "vote-mean": math.fsum(weights) / len(weights),
        "vote-max": max(weights),
        "vote-first-weight": weights[0],
        "vote-last-weight": weights[-1]}
    return others.get(wrong, math.fsum(weights))


def first_spelling(group):
    """How the first answer of a group is spelled."""
    return str(group["spellings"][0])


def find_group(groups, answer, wrong):
    """The group that an answer votes with; a new one if there is none."""
    for group in groups:
        known = group["spellings"][0]
        if answer == known:
            return group
        if wrong != "vote-by-text" and answer is not None and known is not None:
            if same_value(answer, known, wrong):
                return group
    groups.append({"spellings": [], "weights": []})
    return groups[-1]


def same_value(answer, known, wrong):
    """Whether two answers are one in a vote. The mistakes read numbers of this case only."""
    if wrong not in ("vote-sign", "vote-rounded", "vote-float64"):
        return same_vote(answer, known)
    values = [Fraction(answer), Fraction(known)]
    if wrong == "vote-sign":
        values = [abs(value) for value in values]
    if wrong == "vote-rounded":
        values = [round(float(value), 4) for value in values]
    if wrong == "vote-float64":
        values = [float(value) for value in values]
    return values[0] == values[1]


def choices_rows(inputs, wrong=None):
    """The rows `ranks` and `votes`."""
    ranks = []
    for problem in inputs["ranks"]:
        scores = [float(np.float32(score)) for score in problem["scores"]]
        if wrong == "rank-float64":
            scores = problem["scores"]
        indices = list(range(len(scores)))
        ranks.append(kept_indices(indices, scores, problem["keep"], wrong))
    votes = []
    for problem in inputs["votes"]:
        votes.append(vote(problem["answers"], problem["weights"], wrong))
    return {"ranks": ranks, "votes": votes}
