"""The inputs of the vectors: prefixes, labels, runs, and small sampler problems without a model.

Each input names the clauses of oracle/README.md that it tests, its flags, and an id that stays:
new inputs are put behind the old ones. `fresh_case` makes inputs from a seed, which nobody can have
copied.
"""
import dataclasses
import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from model import load
from stop import Stop

HERE = Path(__file__).resolve().parent.parent  # oracle/
VECTORS = HERE / "vectors"


@dataclasses.dataclass
class Case:
    """A base model, a STOP for it, and which levels are tried with them."""
    name: str
    checkpoint: str          # from oracle/
    lengths: tuple           # of the prefixes that follow the golden data's, if there are any
    levels: tuple
    golden: str | None = None    # folder of the authors' STOP; its prefixes and labels come first
    m: int = 3               # the rest describes a STOP of our own
    rank: int = 2
    alpha: float = 3
    head: str = "sigmoid"
    head_spread: float = 0.1
    chosen_prefixes: tuple = ()  # (ids that were looked for, clause, flag); they come last

    def model(self, dtype=torch.float32):
        return load(HERE / self.checkpoint, dtype=dtype)

    def stop(self, model, vectors=VECTORS):
        return Stop.load(self.stop_folder(vectors), model)

    def stop_folder(self, vectors=VECTORS):
        """Where the STOP lies that certify and the reference load."""
        if self.golden is not None:
            return HERE / self.golden / "checkpoint"
        return vectors / self.name / "stop"

    @property
    def stop_name(self):
        """The STOP's folder as a case names it, from oracle/."""
        return str(self.stop_folder().relative_to(HERE))


MODEL_LEVELS = ("decoder", "score", "training")
CASES = (
    Case("qwen2", "golden/checkpoints/qwen2-tied-sharded", (4, 29, 11, 18, 1, 65, 300, 2),
         MODEL_LEVELS + ("run",)),
    Case("qwen3", "golden/checkpoints/qwen3-tiny", (1, 65, 300, 4100), MODEL_LEVELS + ("run",),
         golden="golden/scorers/qwen3-tiny.qv"),
    Case("gpt_oss", "golden/checkpoints/gptoss-tiny", (1, 65, 300, 4100), MODEL_LEVELS + ("run",),
         golden="golden/scorers/gptoss-tiny.attn",
         chosen_prefixes=(((52,), "D11", "gate below -7"),)),
    Case("mxfp4", "golden/mxfp4/gptoss-mxfp4-tiny", (1, 9, 33, 65, 300), MODEL_LEVELS + ("run",),
         m=1, rank=3, alpha=5, head_spread=16.0),
    Case("m8", "golden/checkpoints/qwen3-tiny", (1, 3, 20, 65), ("score", "training"),
         m=8, rank=2, alpha=5, head="softmax", head_spread=0.2))
BY_NAME = {case.name: case for case in CASES}
MODEL_FREE = ("sampler", "choices")


def make_stop(case, model):
    """A STOP of our own, none of whose parts is zero, and whose m vectors are all different."""
    stop = Stop(model, m=case.m, rank=case.rank, alpha=case.alpha, head=case.head)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in stop.named_parameters():
            spread = case.head_spread if name == "head.weight" else 0.3
            parameter.copy_(spread * torch.randn(parameter.shape, generator=generator))
    return stop.eval()


def random_ids(count, vocab, generator):
    """`count` token ids below `vocab`."""
    return torch.randint(vocab, (count,), generator=generator).tolist()


def prefixes_of(case, vocab):
    """[{"ids", "clauses"}] and the labels of the first four."""
    rows = []
    labels = [0.25, 0.9375, 0.5, 0.125]
    if case.head_spread > 1:
        labels = [0.0, 1.0, 0.75, 0.125]
    if case.golden is not None:
        golden = load_file(HERE / case.golden / "expected.safetensors")
        labels = golden["labels"][:, 1].tolist()
        for ids, mask in zip(golden["prefix_ids"], golden["prefix_attention_mask"].bool()):
            rows.append(ids[mask].tolist())
    generator = torch.Generator().manual_seed(0)
    for length in case.lengths:
        rows.append(random_ids(length, vocab, generator))
    chosen = {ids: about for ids, *about in case.chosen_prefixes}
    rows += map(list, chosen)
    prefixes = [{"ids": ids, "clauses": clauses_of_row(case, len(ids))} for ids in rows]
    for prefix in prefixes:
        length = len(prefix["ids"])
        flags = {"one token": length == 1, "long": length > 256, "beyond window": length > 8,
                 "saturated": case.head_spread > 1}
        if tuple(prefix["ids"]) in chosen:
            clause, flag = chosen[tuple(prefix["ids"])]
            flags[flag] = True
            prefix["clauses"] = [clause]
        prefix["flags"] = [flag for flag, holds in flags.items() if holds]
    return with_ids(case.name, "prefix", prefixes), labels


def with_ids(case, kind, items):
    """Inputs with an id each, which stays theirs: "qwen2/prefix/3"."""
    return [{"id": f"{case}/{kind}/{number}"} | item for number, item in enumerate(items)]


def clauses_of_row(case, length):
    """What a prefix of this length is there for, besides what every prefix tests."""
    clauses = ["D14"]
    if length == 1:
        clauses.append("C1")
    if case.name in ("gpt_oss", "mxfp4") and length > 8:
        clauses.append("D8")
    if case.name == "gpt_oss" and length > 4096:
        clauses.append("D6")
    if case.head_spread > 1:
        clauses += ["C8", "T2"]
    return clauses


# --------------------------------------------------------------------------------------- runs


@dataclasses.dataclass
class Run:
    """Settings of a whole run. The seed is found by make_vectors: see `first_seed`."""
    name: str
    clauses: tuple
    n: int
    stages: tuple            # ((checkpoint, keep) or (checkpoint, keep, branch), ...)
    max_new_tokens: int
    temperature: float
    top_k: int
    top_p: float
    prompt_length: int
    first_seed: int
    eos_step: int = 37       # end tokens: 3, 3 + step, 3 + 2 * step, ...
    zero_head: bool = False  # the head's weight is replaced by zeros: all scores are equal
    cases: tuple = ("qwen2", "qwen3", "gpt_oss")


RUNS = (
    Run("main", ("R1", "R2", "R3", "R4", "R5", "R6"), 34, ((10, 5),), 36, 0.8, 20, 0.95,
        prompt_length=9, first_seed=2 ** 32 + 11),
    Run("keep all", ("R1", "R3", "R5", "S8"), 10, ((1, 10),), 6, 1.0, 0, 1.0,
        prompt_length=523, first_seed=2 ** 63 + 2 ** 33 + 5),
    Run("cascade", ("R2", "R3", "R4", "R6", "R7"), 16, ((3, 9), (7, 5)), 12, 1.3, 50, 0.9,
        prompt_length=2, first_seed=12345678901234567, eos_step=13),
    Run("branches", ("R5", "R6", "R7", "R9"), 9, ((4, 3, 3), (8, 4, 2)), 14, 1.2, 60, 0.98,
        prompt_length=12, first_seed=2 ** 50 + 7, eos_step=23),
    Run("ties", ("R4", "S2"), 5, ((4, 2),), 8, 0.0, 40, 0.95,
        prompt_length=30, first_seed=3, zero_head=True),
    Run("branch ties", ("R4", "R9"), 6, ((4, 3, 3), (8, 5)), 12, 1.2, 60, 0.98,
        prompt_length=5, first_seed=2 ** 52 + 1, eos_step=61, zero_head=True),
    Run("ended in a cascade", ("R3", "R4", "R6", "R7"), 12, ((4, 8), (8, 4)), 12, 1.3, 50, 0.95,
        prompt_length=7, first_seed=2 ** 41 + 5, eos_step=11),
    Run("branch ties twice", ("R4", "R9"), 2, ((2, 2, 2), (4, 3, 2), (6, 2)), 10, 1.2, 60, 0.98,
        prompt_length=6, first_seed=2 ** 47 + 9, eos_step=61, zero_head=True),
    Run("saturated", ("C8", "R4"), 12, ((5, 4),), 9, 1.0, 40, 0.95,
        prompt_length=6, first_seed=2 ** 35 + 3, cases=("mxfp4",)),
    Run("small scores", ("C8", "R4"), 12, ((5, 9),), 9, 1.0, 40, 0.95,
        prompt_length=8, first_seed=2 ** 39 + 7, cases=("mxfp4",)))


def run_inputs(run, seed, vocab):
    """A run's settings as a porter reads them. The seed is text: not every language's numbers
    hold 64 bits."""
    generator = torch.Generator().manual_seed(run.prompt_length)
    return {
        "name": run.name,
        "clauses": list(run.clauses),
        "flags": flags_of(run),
        "prompt_ids": random_ids(run.prompt_length, vocab, generator),
        "n": run.n,
        "stages": [list(stage) for stage in run.stages],
        "max_new_tokens": run.max_new_tokens,
        "temperature": run.temperature,
        "top_k": run.top_k,
        "top_p": run.top_p,
        "seed": str(seed),
        "eos_ids": list(range(3, vocab, run.eos_step)),
        "zero_head": run.zero_head}


def flags_of(run):
    """What is special about a run."""
    flags = {
        "tie": run.zero_head or run.name == "saturated",
        "saturated": run.name in ("saturated", "small scores"),
        "cascade": len(run.stages) > 1,
        "branches": len(run.stages[0]) == 3,
        "greedy": run.temperature == 0,
        "long": run.prompt_length > 256}
    return [flag for flag, holds in flags.items() if holds]


# ----------------------------------------------------------------------------- without a model


def distribution(name, clauses, logits, temperature=1.0, top_k=0, top_p=1.0):
    """One problem for S1 to S5."""
    return {
        "name": name,
        "clauses": list(clauses),
        "logits": np.asarray(logits, dtype=np.float32),
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p}


def distributions(generator):
    """Logits and settings whose probabilities are asked for."""
    small = torch.randn(48, generator=generator).numpy() * 2
    large = torch.randn(700, generator=generator).numpy() * 3
    tied = np.round(torch.randn(40, generator=generator).numpy() * 2)
    near = [1.0, 1.01, 0.99, 1.005, 0.5, 1.012]
    almost_equal = [1.0, 1 + 2 ** -21, 1 + 2 ** -20, 0.9]
    problems = []

    def ask(*problem):
        problems.append(distribution(*problem))

    ask("everything", ["S1", "S3", "S4"], small, 0.6, 20, 0.95)
    ask("the paper's settings", ["S1", "S3", "S4"], large, 0.6, 40, 0.95)
    ask("temperature above one", ["S1"], small, 1.7, 12, 0.8)
    ask("temperature below one", ["S1"], small, 0.3, 30, 0.9)
    ask("all off", ["S3", "S4"], small, 1.0, 0, 1.0)
    ask("only temperature", ["S1"], large, 1.3, 0, 1.0)
    ask("only top-k", ["S3"], small, 1.0, 5, 1.0)
    ask("only top-p", ["S4"], small, 1.0, 0, 0.7)
    ask("a small p after top-k", ["S1", "S4"], large, 1.5, 50, 0.3)
    ask("top-k of one", ["S3"], small, 1.0, 1, 0.9)
    ask("top-k as large as the vocabulary", ["S3"], small, 0.9, 48, 1.0)
    ask("top-k beyond the vocabulary", ["S3"], small, 0.9, 100, 0.95)
    ask("a tie at top-k", ["S3"], [3, 1, 2, 1, 0, 1, -1, 3], 1.0, 4, 1.0)
    ask("many ties at top-k", ["S3"], tied, 0.7, 7, 1.0)
    ask("a tie at top-p", ["S4"], [4, 2, 2, 2, 0, 1, 0], 1.0, 0, 0.7)
    ask("many ties at top-p", ["S4"], tied, 1.0, 25, 0.6)
    ask("all equal", ["S3", "S4"], [1, 1, 1, 1, 1, 1], 0.8, 2, 0.5)
    ask("a mass of p just before the crossing", ["S4", "S5"],
        [0.0, -0.6931472, -0.6931472], 1.0, 0, 0.5)
    ask("a mass of p at the crossing, in float64", ["S4", "S5"],
        [0.0, -0.6933140754699707, -0.6933140754699707], 1.0, 0, 0.5000417237274095)
    ask("p of very little", ["S4"], small, 1.0, 0, 1e-9)
    ask("greedy", ["S2"], small, 0.0, 40, 0.95)
    ask("greedy with equals", ["S2"], [1, 5, 2, 5, 5, 0], 0.0, 0, 1.0)
    ask("a temperature close to zero", ["S1", "S2"], near, 0.01, 0, 1.0)
    ask("a temperature closer to zero", ["S1", "S2"], near, 0.001, 4, 0.99)
    ask("a temperature of almost zero", ["S1", "S2"], almost_equal, 1e-6, 0, 1.0)
    # In 1.1: logits that differ, and whose z do not; parts too small for a float32 sum to grow by.
    ask("a tie of z at top-k", ["S1", "S3"], [10, 1e-7, 2e-7, 3e-7], 1.0, 2, 1.0)
    ask("a tie of z at top-p", ["S1", "S4"], [10, 1e-7, 2e-7, 3e-7], 1.0, 0, 0.99992)
    tiny = np.log(2.0 ** -25) - 1e-4 * np.arange(400)
    ask("parts below a float32 sum's step", ["S4", "S5"], [0.0, *tiny], 1.0, 0, 0.999995)
    ask("a temperature that float32 rounds", ["S1"], [0.3, 0.7, 0.1, 0.2], 0.1, 0, 0.9)
    weights_near_zero = [0.0, -80.0, -120.0, -150.0]
    ask("probabilities that are 0 in float32", ["S5"], weights_near_zero, 1.0, 0, 1.0)
    # In 1.1.1: z that are equal, or are not, by the order and the width of the roundings
    ask("a tie of z by 1 / temperature only", ["S1", "S3"],
        [0.0, -2.9354941844940186, -2.9354944229125977], 0.6, 2, 1.0)
    ask("a tie of z by an exact temperature only", ["S1", "S3"],
        [0.0, -2.879438638687134, -2.879438877105713], 0.6, 2, 1.0)
    ask("a tie of z by a float32 temperature only", ["S1", "S3"],
        [0.0, -2.554225444793701, -2.5542256832122803], 0.6, 2, 1.0)
    ask("no tie of z that are close", ["S4"], [0.0, -5.0, -5.000000476837158], 1.0, 0, 0.99)
    return problems


def draw_problem(name, clauses, probabilities, numbers):
    """One problem for S6: the tokens that these numbers draw from these probabilities."""
    return {
        "name": name,
        "clauses": list(clauses),
        "probabilities": np.asarray(probabilities, dtype=np.float32),
        "numbers": [float(number) for number in numbers]}


def between_sums(probabilities, count):
    """Numbers that lie between a cumulative sum in float32 and the same sum in float64."""
    exact = np.cumsum(probabilities, dtype=np.float64)
    rounded = np.cumsum(probabilities, dtype=np.float32).astype(np.float64)
    numbers = (exact / exact[-1] + rounded / rounded[-1]) / 2
    apart = np.abs(exact / exact[-1] - rounded / rounded[-1])
    widest = np.argsort(-apart)[:count]
    return numbers[np.sort(widest)]


def draws(generator):
    """Probabilities and numbers whose tokens are asked for."""
    many = torch.rand(500, generator=generator).softmax(-1).numpy()
    skewed = (torch.randn(300, generator=generator) * 2).softmax(-1).numpy()
    exact = [0.25, 0.0, 0.25, 0.5]
    short = [0.5, 0.25, 0.125, 0.0]
    step = 2.0 ** -53
    problems = []

    def ask(*problem):
        problems.append(draw_problem(*problem))

    ask("a number on a cumulative sum", ["S6"], exact, [0.0, 0.25, 0.5, 0.75])
    ask("a number beside a cumulative sum", ["S6"], exact,
        [0.25 - step / 2, 0.25 + step, 0.5 - step, 0.5 + step, 1 - step])
    ask("a sum below one", ["S6"], short, [0.0, 0.6, 0.9, 0.999, 1 - step])
    ask("a first token of no probability", ["S6"], [0, 0.5, 0.5], [0.0, 0.49, 0.5])
    ask("between two sums in float64", ["S5", "S6"], many, between_sums(many, 12))
    ask("skewed, between two sums", ["S5", "S6"], skewed, between_sums(skewed, 12))
    ask("tokens by id, not by size", ["S6"], [0.1, 0.2, 0.4, 0.3],
        [0.05, 0.15, 0.35, 0.65, 0.75, 0.95])
    small = np.full(3000, 2.0 ** -25, dtype=np.float32)  # each is lost in a float32 sum beyond 1
    ask("parts below a float32 sum's step", ["S5", "S6"], [1.0, *small],
        [0.5, 0.99999, 0.99992, 0.99995, 0.99998])
    steps = (torch.rand(1200, generator=generator) + 0.01).numpy()
    ask("many, between two sums", ["S5", "S6"], steps / steps.sum(), between_sums(steps, 8))
    return problems


def key_problems(generator):
    """Seeds, prompts and path indices whose keys are asked for."""
    short = random_ids(4, 500, generator)
    long = random_ids(1100, 150000, generator)
    seeds = [0, 1, 255, 256, 2 ** 32 - 1, 2 ** 32, 2 ** 32 + 1, 2 ** 53 + 1, 2 ** 63, 2 ** 64 - 1,
             -1]
    problems = []
    for seed in seeds:
        problems.append({"seed": str(seed), "prompt_ids": short, "index": 0})
    for index in (1, 7, 8, 9, 16, 33, 64, 300, 70000):
        problems.append({"seed": "5", "prompt_ids": short, "index": index})
    for prompt in ([0], [7, 0], [0, 7], long[:512], long[:513], long):
        problems.append({"seed": str(2 ** 40 + 3), "prompt_ids": prompt, "index": 2})
    for prompt in ([65535], [65536], [65537, 255], [256, 1]):
        problems.append({"seed": "6", "prompt_ids": prompt, "index": 65537})
    for problem in problems:
        problem["clauses"] = ["S7", "S8"]
    return problems


def sampler_inputs():
    """All that the level `sampler` asks for."""
    generator = torch.Generator().manual_seed(7)
    distributions_asked = distributions(generator)
    draws_asked = draws(generator)
    keys = key_problems(generator)
    positions = [0, 1, 2, 7, 8, 31, 32, 63, 64, 255, 256, 2047, 2048, 16383, 40000]
    noise = []
    for key in ("0000000000000000", "0123456789abcdef", "fedcba9876543210", "ffffffffffffffff"):
        noise.append({"key": key, "positions": positions, "clauses": ["S7", "S9"]})
    far = [32767, 32768, 65535, 65536, 65537, 2 ** 24 + 1, 2 ** 31, 2 ** 32, 2 ** 32 + 7]
    noise.append({"key": "0123456789abcdef", "positions": far, "clauses": ["S9"]})
    tokens = []
    for i, problem in enumerate(distributions_asked):
        tokens.append({
            "distribution": i,
            "seed": str(2 ** 33 * i + 9),
            "prompt_ids": random_ids(3 + 250 * (i % 4), 1000, generator),
            "index": 5 * i,
            "positions": list(range(8)) + [30 + i, 300 + i],
            "clauses": ["S6", "S8", "S9"]})
    return described("sampler", {
        "distributions": distributions_asked,
        "draws": draws_asked,
        "keys": keys,
        "noise": noise,
        "tokens": tokens})


def described(case, lists):
    """Lists of inputs with ids and flags."""
    kinds = {"distributions": "distribution", "draws": "draw", "keys": "key", "noise": "noise",
             "tokens": "token", "ranks": "rank", "votes": "vote"}
    result = {}
    for name, items in lists.items():
        flagged = [{"flags": flags_of_problem(item)} | item for item in items]
        result[name] = with_ids(case, kinds[name], flagged)
    return result


def flags_of_problem(item):
    """What is special about an input without a model."""
    name = item.get("name", "")
    equal = "scores" in item and len(set(np.float32(item["scores"]))) < len(item["scores"])
    flags = {
        "tie": "tie" in name or "equal" in name or equal,
        "greedy": item.get("temperature") == 0,
        "long": len(item.get("prompt_ids", ())) > 256 or max(item.get("positions", [0])) > 65535,
        "64 bits": abs(int(item.get("seed", 0))) >= 2 ** 53}
    return [flag for flag, holds in flags.items() if holds]


def choices_inputs():
    """Scores to rank and answers to vote on."""
    close = [0.5, 0.5000001, 0.50000006, 0.4999999, 0.50001, 0.49999]
    digits = [0.123451, 0.123449, 0.123454, 0.12341, 0.12349]
    ranks = []
    votes = []

    def ask_ranks(scores, keep):
        scores = np.asarray(scores, dtype=np.float32)
        ranks.append({"clauses": ["R4"], "scores": scores, "keep": keep})

    def ask_votes(answers, weights=None):
        votes.append({"clauses": ["R8"], "answers": answers, "weights": weights, "kind": "math"})

    ask_ranks([0.1, 0.9, 0.5, 0.7], 2)
    ask_ranks([0.5, 0.5, 0.5, 0.5, 0.5], 2)
    ask_ranks([0.2, 0.7, 0.7, 0.9, 0.7, 0.1], 3)
    ask_ranks([1.0, 0.3, 1.0, 1.0, 0.0, 0.0], 2)
    ask_ranks([0.0, 0.0, 1e-30, 0.0], 2)
    ask_ranks(close, 2)
    ask_ranks(digits, 2)
    ask_ranks([0.1211, 0.1234, 0.1222], 1)
    ask_ranks([0.12312, 0.12319, 0.12337], 1)
    ask_ranks([0.123411, 0.123433, 0.123422], 1)
    ask_ranks([0.90021, 0.90017, 0.90026], 1)
    ask_ranks([0.9012, 0.9016, 0.9004], 1)
    ask_ranks([0.97, 0.99, 0.96, 0.98], 2)
    ask_ranks([0.01, 0.03, 0.02, 0.04], 1)
    ask_ranks([0.4, 0.6, 0.2], 3)
    # In 1.1: equal in float32 only
    ranks.append({"clauses": ["R4"], "scores": [0.5, 0.50000001, 0.49999999, 0.50000002],
                  "keep": 2})
    ranks.append({"clauses": ["R4"], "scores": [0.99999999, 1.0, 0.999999995, 0.9], "keep": 1})
    # In 1.1.1: numbers that text puts in another order; scores whose logits are beyond -30
    ask_ranks([0.5, 9e-7], 1)
    ask_ranks([3e-8, 0.25, 1e-7, 0.125, 9e-9], 3)
    ask_ranks([4e-18, 6e-17, 2e-20, 5e-17], 2)

    ask_votes(["7", "12", "12", "7", "12"])
    ask_votes(["5", "3", "3", "5"])
    ask_votes(["8", "2", "9"])
    ask_votes(["1/2", "3", "0.5", "3", "0.50"])
    ask_votes(["0.5", "4", "4", "1/2"])
    ask_votes([None, None, "6", None])
    ask_votes([None, None, None])
    ask_votes([])
    ask_votes(["007", "6", "6", "7", "7.0"])
    ask_votes(["1", "2", "2"], [0.9, 0.3, 0.3])
    ask_votes(["1", "2", "2"], [0.5, 0.25, 0.25])
    ask_votes(["3", None, "4", "4"], [0.3, 5.0, 0.1, 0.1])
    ask_votes(["1/4", "9", "0.25"], [0.25, 0.375, 0.25])
    # In 1.1: weights that are all zero
    ask_votes(["4", "5", "5"], [0.0, 0.0, 0.0])
    ask_votes([None, "6", "7"], [1.0, 0.0, 0.0])
    # In 1.1.1: what else could be counted, and values that are close or differ in sign
    ask_votes(["1", "2", "2", "3", "4"])
    ask_votes(["2", "3", "3", "-2"])
    ask_votes(["0", "0", "1"])
    ask_votes(["2", "2", "1/3", "0.3333", "0.33333"])
    ask_votes(["2", "2", "1/3", "0.3333333333333333", "0.33333333333333333"])
    ask_votes(["1", "2", "2"], [0.5, 0.6, 0.1])
    ask_votes(["1", "2", "2"], [0.5, 0.1, 0.6])
    ask_votes(["1", "2", "2", "2"], [0.3, 0.1, 0.1, 0.9])
    ask_votes(["1", "2", "2", "2"], [0.3, 0.1, 0.4, 0.4])
    ask_votes(["1", "2", "2"], [0.5, 0.3, 0.3])
    ask_votes(["5", "6", "6"], [1.0, 1.0, 0.00000001])
    return described("choices", {"ranks": ranks, "votes": votes})


# -------------------------------------------------------------------------------------- fresh


def fresh_generator(name, seed):
    """A generator of random numbers that belongs to a case and a seed."""
    text = f"{name} {seed}"
    generator = torch.Generator().manual_seed(int.from_bytes(text.encode()[:16], "big") % 2 ** 62)
    generator.manual_seed(torch.randint(2 ** 60, (1,), generator=generator).item() ^ seed)
    return generator


def fresh_case(case, seed, vocab):
    """Inputs of a case from a seed: prefixes of random lengths, labels and runs."""
    generator = fresh_generator(case.name, seed)
    lengths = torch.randint(1, 300, (5,), generator=generator).tolist()
    lengths.append(torch.randint(400, 1000, (1,), generator=generator).item())
    prefixes = [{"ids": random_ids(length, vocab, generator), "clauses": [], "flags": []}
                for length in lengths]
    labels = torch.rand(4, generator=generator).tolist()
    run_seed = int(torch.randint(2 ** 62, (1,), generator=generator))
    prompt = lengths[0] % 40 + 1
    runs = [
        Run("fresh", (), 12, ((6, 4),), 16, 0.9, 30, 0.95, prompt, run_seed, eos_step=29),
        Run("fresh cascade", (), 9, ((3, 6), (7, 3)), 12, 1.2, 50, 0.9, prompt + 3, run_seed + 1,
            eos_step=17),
        Run("fresh branches", (), 5, ((4, 3, 2), (8, 3)), 12, 1.1, 60, 0.97, prompt + 5,
            run_seed + 2, eos_step=41)]
    asked = [run_inputs(run, run.first_seed, vocab) for run in runs]
    return {
        "name": case.name,
        "checkpoint": case.checkpoint,
        "stop": case.stop_name,
        "levels": list(case.levels),
        "rope_positions": [],
        "prefixes": with_ids(case.name, "fresh-prefix", prefixes),
        "labels": labels,
        "runs": with_ids(case.name, "fresh-run", asked) if "run" in case.levels else []}


def fresh_model_free(name, seed):
    """Inputs of the case `sampler` or `choices` from a seed."""
    generator = fresh_generator(name, seed)

    def number(least, most):
        """A random integer from least to most."""
        return int(torch.randint(least, most + 1, (1,), generator=generator))

    if name == "choices":
        ranks = []
        votes = []
        for i in range(12):
            scores = torch.randint(0, 6, (number(2, 12),), generator=generator).float() / 7
            ranks.append({"clauses": [], "scores": scores.numpy(),
                          "keep": number(1, len(scores)) if i % 4 else 1})
            count = number(1, 9)
            answers = [[None, "1/2", "0.5", "3", "4", "-2"][number(0, 5)] for _ in range(count)]
            weights = [number(0, 8) / 8 for _ in range(count)] if number(0, 1) else None
            if i % 6 == 0:  # equal sums
                first = number(0, 2)
                answers, weights = ["3", "4", "-2", "3", "4", "-2"][first:first + 3], None
            votes.append({"clauses": [], "answers": answers, "weights": weights, "kind": "math"})
        return {"name": name} | described(name, {"ranks": ranks, "votes": votes})
    problems = []
    for i in range(12):
        logits = torch.randn(number(5, 400), generator=generator).numpy() * number(1, 4)
        temperature = number(2, 20) / 10 if i % 6 < 5 else 0  # and of equals, too:
        top_k = number(1, 60) if i % 4 else 0
        top_p = number(1, 20) / 20 if i % 4 != 1 else 1.0
        problems.append(distribution("fresh", [], np.round(logits) if i % 3 == 2 else logits,
                                     temperature, top_k, top_p))
    drawn = []
    for i in range(6):
        probs = torch.rand(number(3, 300), generator=generator).softmax(-1).numpy()
        probs = probs * number(5, 9) / 10 if i % 2 else probs  # sums other than one
        numbers = torch.rand(12, generator=generator, dtype=torch.float64).tolist()
        drawn.append(draw_problem("fresh", [], probs, numbers))
    keys = []
    tokens = []
    noise = []
    for i in range(12):
        about = {"seed": str(number(0, 2 ** 62)), "index": number(0, 300), "clauses": [],
                 "prompt_ids": random_ids(number(1, 300), 150000, generator)}
        keys.append(about)
        tokens.append(about | {"distribution": i,
                               "positions": [number(0, 70000) for _ in range(8)]})
        noise.append({"key": f"{number(0, 2 ** 62):016x}", "clauses": [],
                      "positions": [number(0, 2 ** 34) for _ in range(6)]})
    return {"name": name} | described(name, {
        "distributions": problems, "draws": drawn, "keys": keys, "noise": noise,
        "tokens": tokens})


def read_case(name):
    """The published inputs of a case."""
    return json.loads((HERE / "vectors" / name / "case.json").read_text())
