"""The inputs of the vectors: prefixes, labels, runs, and small sampler problems without a model.

Each input names the clauses of oracle/README.md that it tests. `fresh_case` makes inputs from a
seed, which nobody can have copied.
"""
import dataclasses
import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from model import load
from stop import Stop

HERE = Path(__file__).resolve().parent
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
         golden="golden/scorers/gptoss-tiny.attn"),
    Case("mxfp4", "golden/mxfp4/gptoss-mxfp4-tiny", (1, 9, 33, 65, 300), MODEL_LEVELS,
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
    return [{"ids": ids, "clauses": clauses_of_row(case, len(ids))} for ids in rows], labels


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
        prompt_length=30, first_seed=3, zero_head=True))


def run_inputs(run, seed, vocab):
    """A run's settings as a porter reads them. The seed is text: not every language's numbers
    hold 64 bits."""
    generator = torch.Generator().manual_seed(run.prompt_length)
    return {
        "name": run.name,
        "clauses": list(run.clauses),
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
    tokens = []
    for i, problem in enumerate(distributions_asked):
        tokens.append({
            "distribution": i,
            "seed": str(2 ** 33 * i + 9),
            "prompt_ids": random_ids(3 + 250 * (i % 4), 1000, generator),
            "index": 5 * i,
            "positions": list(range(8)) + [30 + i, 300 + i],
            "clauses": ["S6", "S8", "S9"]})
    return {
        "distributions": distributions_asked,
        "draws": draws_asked,
        "keys": keys,
        "noise": noise,
        "tokens": tokens}


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
    return {"ranks": ranks, "votes": votes}


# -------------------------------------------------------------------------------------- fresh


def fresh_case(case, seed, vocab):
    """Inputs of a case from a seed: prefixes of random lengths, labels and one run."""
    text = f"{case.name} {seed}"
    generator = torch.Generator().manual_seed(int.from_bytes(text.encode()[:16], "big") % 2 ** 62)
    generator.manual_seed(torch.randint(2 ** 60, (1,), generator=generator).item() ^ seed)
    lengths = torch.randint(1, 420, (6,), generator=generator).tolist()
    lengths.append(torch.randint(600, 1500, (1,), generator=generator).item())
    prefixes = [{"ids": random_ids(length, vocab, generator), "clauses": []} for length in lengths]
    labels = torch.rand(4, generator=generator).tolist()
    run_seed = int(torch.randint(2 ** 62, (1,), generator=generator))
    run = Run("fresh", (), 12, ((6, 4),), 16, 0.9, 30, 0.95,
              prompt_length=lengths[0] % 40 + 1, first_seed=run_seed, eos_step=29)
    return {
        "name": case.name,
        "checkpoint": case.checkpoint,
        "stop": case.stop_name,
        "prefixes": prefixes,
        "labels": labels,
        "runs": [run_inputs(run, run_seed, vocab)] if "run" in case.levels else []}


def read_case(name):
    """The published inputs of a case."""
    return json.loads((HERE / "vectors" / name / "case.json").read_text())
