"""STOP (arXiv 2604.16029, section 3): Launch N paths, Check their prefixes, Resume the best k, and
vote.

    python stop.py --prompt "..." --n 64 --keep 8 --prefix 2048
    python stop.py --score prefixes.jsonl --out scored.jsonl --trace DIR    # one score per record

A frozen model, m learned [STOP] embeddings appended to a cached prefix, a LoRA that is active only
there, and a head on the last [STOP] position's final hidden state h_m:

    h = f([prefix; S]),  p = sigmoid(w h_m + b)  =  the chance that this path ends right   (eq. 4)
"""
import plumbing  # first: what is imported next takes seconds (plumbing/__init__.py)

import contextlib
import dataclasses
import functools
import json
import math
import pathlib
import re
import time

import torch
import torch.nn.functional as F
from huggingface_hub.utils import tqdm

from lora import TARGETS, LoRA
from plumbing import memory, picture
from plumbing.answers import extract_answer, same_vote
from plumbing.budget_plan import (
    Stage, check_stages, parse_cascade, plan_for, read_plans)
from plumbing.checkpoint import find_folder, fingerprint, weights_digest
from plumbing.command_line import (
    Common, command_line, option, require_choice, require_positive, shown)
from plumbing.labels import read_prefixes
from plumbing.problems import Problem
from plumbing.records import digest
from plumbing.scores import score_file
from plumbing.stop_files import match, read_stop, write_stop
from plumbing.votes import is_decided
from sample import (
    Batch, Path, Sampling, check_prompts, model_digest, open_model, prefill, require_finite, room,
    sampling_of, token_bar)


class Stop(torch.nn.Module):
    """The three trained parts: `tokens` (m, hidden; one row if shared), `lora`, and `head`.

    head "sigmoid": one logit, soft binary cross-entropy (the paper, eq. 4). head "softmax": two
    logits, index 1 = good, soft cross-entropy (the authors' released code). targets None: all
    seven linears, or those of them that the model has. The head starts at zero, so that every
    chance is one half; the tokens start at random with the spread of the model's embeddings.
    """

    def __init__(self, model, m=4, rank=128, alpha=None, targets=None, head="sigmoid", shared=False,
                 dropout=0.0, seed=0):
        super().__init__()
        assert head in ("sigmoid", "softmax") and m >= 1 and rank >= 1
        self.m = m
        self.shared = shared
        self.head_kind = head
        self.base_fingerprint = fingerprint(model.config)
        self.trained = {}  # settings and metrics of its training

        embeddings = model.model.embed_tokens.weight
        hidden = embeddings.shape[1]
        device = embeddings.device
        generator = torch.Generator().manual_seed((seed + 1) % 2 ** 64)
        noise = torch.randn(1 if shared else m, hidden, generator=generator)
        self.tokens = torch.nn.Parameter(noise.to(device) * embeddings.float().std())

        if targets is None:
            linears = {name.rpartition(".")[2] for name, _ in model.named_modules()}
            targets = [target for target in TARGETS if target in linears]
        self.lora = LoRA(model, rank, 2 * rank if alpha is None else alpha, targets, dropout, seed)

        self.head = torch.nn.Linear(hidden, 1 if head == "sigmoid" else 2, device=device)
        torch.nn.init.zeros_(self.head.weight)
        torch.nn.init.zeros_(self.head.bias)

    def forward(self, model, cache):
        """Head logits (B, 1 or 2) for the prefixes in a cache's rows, which stay as they are: the
        [STOP] keys and values go to dead slots behind each row, and no row becomes longer."""
        tokens = self.tokens.expand(cache.rows, self.m, -1)  # (B, m, hidden)
        tokens = tokens.to(cache.keys[0].dtype)
        everywhere = tokens.new_ones(tokens.shape[:2], dtype=torch.bool)
        hidden = model.run(tokens, cache, adapter=self.lora.at(everywhere))
        return self.head(hidden[:, -1].float())

    def chance(self, logits):
        """Head logits (B, 1 or 2) -> (B,) the chance that the path ends right."""
        if self.head_kind == "sigmoid":
            return logits.sigmoid()[:, 0]
        return logits.softmax(-1)[:, 1]

    def loss(self, logits, labels):
        """Mean soft cross-entropy between head logits (B, 1 or 2) and labels (B,) in [0, 1]."""
        if self.head_kind == "sigmoid":
            return F.binary_cross_entropy_with_logits(logits[:, 0], labels)
        return F.cross_entropy(logits, torch.stack((1 - labels, labels), -1))

    @torch.inference_mode()
    def score(self, model, prefixes, batch=16, bar=None):
        """Chances (N,) float32 that prefixes (prompt + prefix, lists of token ids, ragged) end
        right. Equal prefixes are scored once."""
        check_prompts(model, prefixes, self.m)
        places = {}  # of the different prefixes in `distinct`
        for prefix in prefixes:
            places.setdefault(tuple(prefix), len(places))
        distinct = list(map(list, places))
        if prefixes:
            longest = max(len(prefix) for prefix in prefixes)
            batch = min(batch, memory.rows_beside_others(model, longest + self.m))
        scores = torch.zeros(len(distinct), device=self.head.weight.device)
        for numbers in like_lengths(distinct, batch):
            cache, _ = prefill(model, [distinct[i] for i in numbers], self.m)
            scores[numbers] = self.chance(self(model, cache))
            if bar is not None:
                bar.update(len(numbers))
        require_finite(scores, "STOP's score")
        if bar is not None:
            bar.update(len(prefixes) - len(distinct))
        return scores[[places[tuple(prefix)] for prefix in prefixes]]

    def trained_for(self):
        """The checkpoints (in new tokens) whose prefixes it was trained on, the usual one first."""
        found = self.trained.get("settings", {}).get("prefix", 2048)
        return parse_checkpoints(str(found))

    def limit(self, asked=None):
        """The limit of a path, in new tokens: `asked`, or the one that it was trained with; None:
        what the context leaves."""
        if asked is not None:
            return asked
        return self.trained.get("settings", {}).get("max_new_tokens")

    def about(self):
        """What must agree between a saved STOP's two files, and with the model it is loaded for."""
        return {
            "m": self.m,
            "shared": self.shared,
            "rank": self.lora.rank,
            "alpha": self.lora.alpha,
            "targets": list(self.lora.targets),
            "head": self.head_kind,
            "base_fingerprint": self.base_fingerprint}

    def weights(self):
        """{name on disk: tensor}: LoRA's pairs bear the names of their linears."""
        return {name.removeprefix("lora."): tensor for name, tensor in self.state_dict().items()}

    def save(self, folder, trained=None):
        """Write stop.safetensors and stop.json (with `trained`: settings and metrics) to a
        folder."""
        self.trained = trained or self.trained
        write_stop(folder, self.about(), self.weights(), self.trained)

    @classmethod
    def load(cls, folder, model):
        """The Stop in a folder, in our layout or that of the authors' released code, for `model`.
        ValueError where a file is missing or broken, or the STOP belongs to another model."""
        saved = read_stop(folder)
        expected = fingerprint(model.config)
        if saved.base_fingerprint not in (None, expected):
            raise ValueError(
                f"{saved.file}: base_fingerprint: found {saved.base_fingerprint!r}, expected "
                f"{expected!r}, the model's: this STOP was trained for another model")
        stop = cls(model, **saved.settings)
        stop.trained = saved.trained
        weights = stop.weights()
        match(saved, {name: weight.shape for name, weight in weights.items()})
        for name, weight in weights.items():
            weight.copy_(saved.tensors[name])
        return stop.eval()  # no dropout


def stop_digest(stop):
    """Digits that stand for a STOP: its shape and every byte of its weights."""
    return digest(stop.about(), weights_digest(stop))


def stop_folder(settings):
    """The folder of the STOP that a script's settings name."""
    return pathlib.Path(settings.stop or find_folder(settings.model) / "stop")


def like_lengths(prefixes, batch):
    """Numbers of the prefixes in groups of at most `batch`, like lengths together: little
    padding."""
    order = sorted(range(len(prefixes)), key=lambda i: len(prefixes[i]))
    return [order[start:start + batch] for start in range(0, len(order), batch)]


# -------------------------------------------------------------------- Launch, Check, Resume, vote


def retention(budget, prefix, task):
    """Share of paths to keep (section "interaction scaling law"), for lengths in tokens.

    budget: all generated tokens; prefix: the checkpoint; task: a usual response. Fitted on a 1.5B
    model: 1 / gamma = 1.17e4 * C ** 0.46 * L_prefix ** 0.40 / L_task ** 4.55 in units of 1,024
    tokens; at most 1."""
    for name, value in (("budget", budget), ("prefix", prefix), ("task", task)):
        if value <= 0:
            raise ValueError(f"{name}: found {value}, expected a positive number of tokens")
    C = budget / 1024
    L_prefix = prefix / 1024
    L_task = task / 1024
    return min(1.0, L_task ** 4.55 / (1.17e4 * C ** 0.46 * L_prefix ** 0.40))


def by_guideline(budget, prefix, task, most=math.inf):
    """(paths launched, paths kept) by the guideline for a budget, in tokens: as many paths as it
    pays for, all up to the prefix and the kept ones up to a usual response; 2 to `most`."""
    share = retention(budget, prefix, task)
    rest = max(0, task - prefix)
    launched = min(int(budget / (prefix + share * rest)), most)
    kept = max(1, round(share * launched))
    paid_for = int((budget - kept * rest) / prefix)  # beside the rest of the kept ones
    launched = max(2, min(launched, paid_for))
    return launched, min(kept, launched)


@torch.inference_mode()
def launch_check_resume(model, stop, prompt_ids, n=64, keep=8, prefix=2048, cascade=None,
                        max_new_tokens=16384, temperature=0.6, top_k=40, top_p=0.95, seed=0,
                        branch=1, answer_of=None, kind="math", eos_ids=None, bar=None,
                        on_check=None):
    """n paths of a prompt, of which `keep` are finished: a list of Path, by index, pruned ones
    included.

    cascade: [(checkpoint, keep), ...] or [(checkpoint, keep, branch), ...] instead of (prefix,
    keep, branch). A path that ends before a checkpoint is scored whole and competes: exactly
    `keep` paths vote. Ties go to the lower index; with keep = n the paths are those of `generate`.
    With branch = b each kept path that still runs goes on as b paths (an ended one is never
    revived); new paths stand behind the n. answer_of(path): its answer of this kind, or None; with
    it, decoding stops as soon as no running path can change the vote (`is_decided`), and those
    that still ran are "decided". on_check(checkpoint, checked, kept) is called after each check
    with the paths that it scored and those that go on, new ones included; bar counts tokens.
    Raises ValueError on stages that cannot be."""
    sampling = Sampling(temperature, top_k, top_p, seed)
    stages = [Stage(*stage) for stage in cascade or [(prefix, keep, branch)]]
    check_stages(stages, n, max_new_tokens)
    ends = [stage.checkpoint for stage in stages] + [max_new_tokens]
    check_prompts(model, [prompt_ids], max(max_new_tokens, stages[-1].checkpoint + stop.m))
    capacities = [len(prompt_ids) + end + stop.m for end in ends]
    require_rows(model, n, stages, capacities)

    paths = [Path(list(prompt_ids), index) for index in range(n)]
    batch = Batch(model, paths, n, capacities[0], max_new_tokens, sampling, eos_ids, bar)
    alive = list(paths)
    for stage, capacity in zip(stages, capacities[1:]):
        running = list(batch.live)
        batch.decode(until=stage.checkpoint)     # Launch: all paths up to the checkpoint
        score_live(model, stop, batch)           # Check: [STOP] on the cache, which stays as it was
        score_ended(model, stop, running)        #        ended paths have left it: prefilled again
        checked = alive
        alive, pruned = rank(checked, stage.keep)
        batch.prune(pruned)                      # Resume: the best go on, other rows are freed
        new_paths = batch.resume(stage.branch, capacity)
        alive += new_paths
        paths += new_paths
        if on_check is not None:
            on_check(stage.checkpoint, checked, alive)
    if answer_of is not None:
        batch.on_end = stop_when_decided(batch, alive, answer_of, kind)
        batch.on_end(None)  # those that have ended already may decide it
    batch.decode(until=max_new_tokens)
    return paths


def require_rows(model, n, stages, capacities):
    """Raise ValueError where the rows of a stretch do not fit the free memory: all prefixes are
    held until they are checked. capacities: positions of a row before each check, and behind the
    last."""
    element = model.model.embed_tokens.weight.element_size()
    free = memory.free_bytes(model.device)
    rows = [n] + [stage.keep * stage.branch for stage in stages]
    for count, capacity in zip(rows, capacities):
        needed = count * memory.row_bytes(model.config, capacity, element)
        if needed > free:
            raise ValueError(
                f"n: found {n}; {count} rows of {capacity:,} positions need "
                f"{needed / memory.GB:.1f} GB, {free / memory.GB:.1f} GB are free: lower --n, "
                "--keep or --prefix")


def score_live(model, stop, batch):
    """Score the paths whose prefixes the cache holds."""
    if batch.live:
        batch.settle()
        scores = stop.chance(stop(model, batch.cache))
        require_finite(scores, "STOP's score")
        prefixes = [tuple(path.ids) for path in batch.live]
        for path, score in zip(batch.live, of_first_equal(prefixes, scores.tolist())):
            path.score = score


def of_first_equal(prefixes, scores):
    """The scores, in which equal prefixes have one, that of the first of them: rounding differs
    with a row's place in the batch, and would break ties."""
    known = {}
    return [known.setdefault(prefix, score) for prefix, score in zip(prefixes, scores)]


def score_ended(model, stop, paths):
    """Score those of `paths`, which ran at the last check, that have ended since, whole: their rows
    have left the cache."""
    ended = [path for path in paths if path.status != "running"]
    scores = stop.score(model, [path.prompt_ids + path.ids for path in ended])
    for path, score in zip(ended, scores.tolist()):
        path.score = score


def rank(paths, keep):
    """(the best `keep` paths, the others); ties go to the lower index, and to the lower branch."""
    ranked = sorted(paths, key=lambda path: (-path.score, path.index, path.branches))
    return ranked[:keep], ranked[keep:]


def vote(answers, weights=None, kind="math"):
    """The answer with most votes, or most weight. None is no vote; equal answers (1/2, 0.5) vote
    together, under the first of them; ties go to the answer that came first."""
    if weights is None:
        weights = [1.0] * len(answers)
    votes = {}
    for answer, weight in zip(answers, weights):
        if answer is None:
            continue
        for known in votes:
            if same_vote(answer, known, kind):
                answer = known
                break
        votes[answer] = votes.get(answer, 0.0) + weight
    return max(votes, key=votes.get) if votes else None


def stop_when_decided(batch, paths, answer_of, kind):
    """A function for batch.on_end that ends all paths as soon as neither vote of `paths`, by
    majority or by score, can change any more."""
    answers = {}  # name of an ended path -> its answer

    def ended(path):
        if path is not None and path.status == "decided":
            return
        done = [other for other in paths if other.status != "running"]
        running = [other for other in paths if other.status == "running"]
        for other in done:
            if other.name not in answers:
                answers[other.name] = answer_of(other)
        found = [answers[other.name] for other in done]
        scores = [other.score for other in done]
        open_scores = sum(other.score for other in running)
        by_majority = is_decided(found, [1.0] * len(done), len(running), kind)
        if by_majority and is_decided(found, scores, open_scores, kind):
            batch.finish("decided")

    return ended


# ----------------------------------------------------------------------------------- command line


LAUNCHED = 64  # paths, where neither --n nor --budget says


@dataclasses.dataclass(kw_only=True)
class Settings(Common):
    """What `python stop.py` can be told."""
    prompt: str | None = option(None, "the question")
    score: str | None = option(
        None, "instead of a question, prefixes to score: JSON lines with prefix_token_ids")
    out: str | None = option(
        None, "with --score: file of the scores, taken up where it stopped (default: printed)")
    trace: str | None = option(
        None, "with --score: folder for the [STOP] positions' hidden states, layer by layer")
    stop: str | None = option(
        None, "folder of the trained STOP (default: stop/ in the model's directory)")
    n: int | None = option(
        None, "paths launched (default: 64, or as many as --budget pays for)")
    keep: int | None = option(None, "paths resumed (default: an eighth)")
    retention: float | None = option(None, "paths resumed, as a share of n")
    budget: int | None = option(
        None, "all tokens to spend: by the plan for them in STOP's plan.json; where there is none, "
        "by the paper's guideline")
    task_length: int | None = option(
        None, "tokens of a usual response, for the guideline (default: 8650, as in the paper, or "
        "the limit of a path where that is less)")
    prefix: int | None = option(
        None, "the checkpoint, in new tokens (default: what STOP was trained for, or 2048)")
    cascade: str | None = option(
        None, "several checkpoints, checkpoint:keep or checkpoint:keepxbranch, as in "
        "2048:32,4096:4x2")
    branch: int | None = option(
        None, "how many paths each resumed prefix goes on as (default: 1)")
    decide: bool = option(True, "stop when the running paths can no longer change the vote")
    kind: str = option("math", "math or choice: what the answer is")
    picture: str | None = option(
        None, "file for a picture of the run: a page (.html) or a drawing (.svg)")


def parse_checkpoints(text):
    """"2048,1024" -> [2048, 1024]: different numbers of new tokens."""
    if re.fullmatch(r"[1-9]\d{0,8}(,[1-9]\d{0,8})*", text, re.ASCII):
        checkpoints = [int(number) for number in text.split(",")]
        if len(set(checkpoints)) == len(checkpoints):
            return checkpoints
    raise ValueError(
        f"prefix: found {shown(text)}, expected a number of tokens, or several as in 1024,2048")


def by_plan(settings, stop):
    """The settings with the plan that STOP's plan.json has for --budget, or as they are without
    one."""
    folder = stop_folder(settings)
    plans = None
    if settings.budget is not None:
        plans = read_plans(folder, stop_digest(stop))
        if plans is None:
            print(f"budget: no plan.json in {folder}: the paper's guideline")
    if plans is None:
        return settings
    for name in ("n", "keep", "retention", "task_length", "prefix", "cascade", "branch"):
        found = getattr(settings, name)
        if found is not None:
            raise ValueError(f"{name}: found {shown(found)}, expected none beside --budget: the "
                             f"plan in {folder} has its own")
    plan = plan_for(plans, settings.budget, folder)
    print(f"plan for {plan.budget} tokens, the largest listed that {settings.budget} allows: "
          f"{plan}; about {plan.expected['tokens']:.0f} tokens")
    cascade = ",".join(map(str, plan.stages))
    return dataclasses.replace(settings, n=plan.n, cascade=cascade, budget=None)


def paths_of(settings, prefix, limit):
    """(paths launched, paths resumed) of a run: --n and --keep or --retention, by default 64 and an
    eighth; or the guideline's for --budget."""
    launched = settings.n or LAUNCHED
    if settings.keep is not None:
        return launched, settings.keep
    share = 1 / 8 if settings.retention is None else settings.retention
    if settings.budget is not None:
        task = min(8650, limit) if settings.task_length is None else settings.task_length
        share = retention(settings.budget, prefix, task)
        if settings.n is None:
            launched, _ = by_guideline(settings.budget, prefix, task)
        print(f"guideline: keep {share:.2g} of {launched} paths (1 / {1 / share:,.2f}), at least "
              f"1; a usual response has {task} tokens")
    return launched, max(1, round(launched * share))


def show_check(checkpoint, checked, kept):
    """Print the scores of one check, the best first."""
    names = {path.name for path in checked}
    new_paths = [path for path in kept if path.name not in names]
    stay = len(kept) - len(new_paths)
    branches = f", and {len(new_paths)} new branches" if new_paths else ""
    tqdm.write(f"check at {checkpoint} tokens: {stay} of {len(checked)} paths stay{branches}")
    for path in sorted(checked, key=lambda path: -path.score):
        tqdm.write(f"  path {path.name:>4}  score {path.score:.4f}  {path.status}")


def answer_prompt(model, stop, tokenizer, settings):
    """Run one question through Launch, Check, Resume; print scores, answers and votes."""
    settings = by_plan(settings, stop)
    prompt_ids = tokenizer.ask(Problem("prompt", settings.prompt, ""))
    limit = room(model, prompt_ids, stop.limit(settings.max_new_tokens))
    prefix = settings.prefix
    if prefix is None:
        prefix = stop.trained_for()[0]
    n, keep = paths_of(settings, prefix, limit)
    cascade = None if settings.cascade is None else parse_cascade(settings.cascade)

    start = time.perf_counter()
    sampling = dataclasses.asdict(sampling_of(settings))
    checks = []  # (checkpoint, how many paths went on), for the picture

    def answer_of(path):
        return extract_answer(tokenizer.completion(path.ids), settings.kind)

    def on_check(checkpoint, checked, kept):
        show_check(checkpoint, checked, kept)
        checks.append((checkpoint, len(kept)))

    with token_bar("paths", n * limit) as bar:
        paths = launch_check_resume(
            model, stop, prompt_ids, n, keep, prefix, cascade, limit, **sampling,
            branch=settings.branch or 1, answer_of=answer_of if settings.decide else None,
            kind=settings.kind, bar=bar, on_check=on_check)
    seconds = time.perf_counter() - start

    finished = [path for path in paths if path.status in ("eos", "length")]
    answers = [answer_of(path) for path in finished]
    for path, answer in zip(finished, answers):
        print(f"path {path.name} ({path.status}, {len(path.ids)} tokens, "
              f"score {path.score:.4f}): {answer}")
    spent = sum(len(path.ids) - path.inherited for path in paths)
    # what n paths would have taken, had each become as long as the kept ones are on average
    unpruned = n * sum(len(path.ids) for path in finished) / len(finished)
    saved = 1 - spent / unpruned
    if settings.picture is not None:
        run = picture.record(
            settings.prompt, paths, checks, tokenizer, answer_of, saved, settings.kind)
        picture.write(settings.picture, run)
        print(f"wrote {settings.picture}")
    majority = vote(answers, kind=settings.kind)
    weighted = vote(answers, [path.score for path in finished], settings.kind)
    print(f"answer by score: {weighted}; by majority: {majority}")
    print(json.dumps({
        "weighted": weighted,
        "majority": majority,
        "kept": sum(path.status != "pruned" for path in paths),
        "decided_early": sum(path.status == "decided" for path in paths),
        "n": n,
        "tokens": spent,
        "tokens_saved_estimate": round(saved, 4),
        "seconds": round(seconds, 3)}))


@contextlib.contextmanager
def recorded_states(model):
    """A list that takes the hidden states (B, T, hidden) after each decoder layer and the final
    norm."""
    states = []

    def record(module, inputs, output):
        states.append(output)

    with contextlib.ExitStack() as hooks:
        for module in (*model.model["layers"], model.model["norm"]):
            hooks.enter_context(module.register_forward_hook(record))
        yield states


@torch.inference_mode()
def logits_and_states(model, stop, prefixes):
    """Of one batch of prefixes: head logits (B, 1 or 2), and the [STOP] positions' hidden states
    (B, layers + 1, m, hidden) float32: after each decoder layer and, last, after the final norm."""
    cache, _ = prefill(model, prefixes, stop.m)
    with recorded_states(model) as states:
        logits = stop(model, cache)
    return logits, torch.stack(states, 1).float().cpu()


def score_prefixes(model, stop, settings):
    """Score a file of prefixes, one JSON line a record; taken up where a killed run stopped."""
    def check_ids(ids):
        check_prompts(model, [ids], stop.m)

    prefixes = read_prefixes(settings.score, check_ids)
    who = {"dtype": settings.dtype,
           "model": model_digest(model),
           "stop": stop_digest(stop)}
    batches = like_lengths([prefix.ids for prefix in prefixes], settings.batch or 16)
    check = functools.partial(logits_and_states, model, stop)
    score_file(prefixes, batches, check, stop.chance, who, settings.out, settings.trace)


def main(settings):
    """Answer a prompt, or score a file of prefixes; the last line is one JSON object."""
    check(settings)
    flags = ("prompt", "score", "out", "trace")
    given = [flag for flag in flags if getattr(settings, flag) is not None]
    if given != ["prompt"] and given[:1] != ["score"]:
        found = " ".join(f"--{flag}" for flag in given) or "neither"
        raise ValueError(f"found {found}, expected --prompt, or --score, --out and --trace")
    model, tokenizer = open_model(settings)
    stop = Stop.load(stop_folder(settings), model)
    if settings.score is not None:
        score_prefixes(model, stop, settings)
    else:
        answer_prompt(model, stop, tokenizer, settings)


def recipe(flags):
    """Scores are made in float32 unless --dtype says otherwise: they are what others check
    against."""
    return ({"dtype": "float32"} if "score" in flags else {}), None


# A setting that says all that these others say, each of which would have no effect beside it
ALTERNATIVES = {
    "cascade": ("keep", "retention", "budget", "prefix", "branch"),
    "keep": ("retention", "budget"),
    "retention": ("budget",)}


# Settings that say how a question is answered, and nothing of how prefixes are scored
OF_A_PROMPT = (
    "n", "keep", "retention", "budget", "task_length", "prefix", "cascade", "branch", "decide",
    "kind", "picture")


def check(settings):
    """Raise ValueError on settings that cannot be, before any work is done."""
    sampling_of(settings)
    require_positive(settings, "max_new_tokens", "batch", "n", "keep", "retention", "budget",
                     "task_length", "prefix", "branch")
    require_choice(settings, "kind", "math", "choice")
    if settings.cascade is not None:
        check_stages(parse_cascade(settings.cascade), settings.n or LAUNCHED)
    if settings.retention is not None and settings.retention > 1:
        raise ValueError(
            f"retention: found {shown(settings.retention)}, expected a share in (0, 1]")
    for name, others in ALTERNATIVES.items():
        for other in others:
            if getattr(settings, name) is not None and getattr(settings, other) is not None:
                raise ValueError(f"{other}: found beside --{name}, expected one of the two")
    if settings.picture is not None:
        picture.check_file(settings.picture)
    if settings.score is not None:
        for name in OF_A_PROMPT:
            if getattr(settings, name) != getattr(Settings, name):
                raise ValueError(f"{name}: found beside --score, expected beside --prompt")


if __name__ == "__main__":
    command_line(Settings, main, recipe)
