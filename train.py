"""Supervision and training of a STOP module (sections 4 and 5), then a short evaluation (section
6).

    python train.py                                             # the embedded toy, end to end
    python train.py --model M --data problems.jsonl --out DIR   # on your model and problems
    python train.py --model M --labels labels.jsonl --out DIR   # on labels that exist
    torchrun --nproc-per-node 8 -- train.py --model M ...       # the same on eight GPUs

Supervision: 32 paths a problem; problems with 4 to 28 right ones stay. Each path cut at the
checkpoint is a prefix, and the share of its 32 continuations that end right is its soft label.
Fit: frozen base model, prefix without gradient; LoRA, [STOP] embeddings and head by AdamW.
A run that was killed goes on where it stopped, to the same labels and the same weights.
"""
import plumbing  # first: what is imported next takes seconds (plumbing/__init__.py)

import contextlib
import dataclasses
import functools
import io
import json
import math
import pathlib
import time

import torch
from huggingface_hub.utils import tqdm

from eval import run as evaluate_run
from eval import summary
from plumbing import memory, processes
from plumbing.answers import extract_answer, same_answer
from plumbing.checkpoint import find_folder, is_there
from plumbing.command_line import (
    Common, command_line, option, require_choice, require_positive, shown)
from plumbing.labels import read_prefixes
from plumbing.plan import Plan
from plumbing.problems import Problem, read_problems, read_sources, without_held_out
from plumbing.records import (
    Job, claim, digest, locked, read_json, read_sealed, write_sealed)
from plumbing.statistics import auroc, pairwise_accuracy
from plumbing.stop_files import files_digest
from sample import (
    check_prompts, decoding_rate, model_digest, open_model, prefill, require_finite, room,
    sample_all, sample_paths, sampling_of, token_bar)
from stop import Stop, parse_checkpoints


@dataclasses.dataclass(kw_only=True)
class Settings(Common):
    """What `python train.py` can be told. The defaults are the paper's; a checkpoint's recipe.json
    comes before them."""
    data: str | None = option(
        None, "training problems, one source or several with commas between (default: train.jsonl "
        "in the model's directory)")
    test: str | None = option(
        None, "held-out problems, to evaluate at the end (default: test.jsonl there, if any)")
    labels: str | None = option(None, "train on these records instead of making them")
    out: str | None = option(None, "folder of the run (default: runs/ and the model's name)")
    problems: int | None = option(None, "only the first so many training problems")
    paths: int = option(32, "paths a problem, to stratify")
    low: int = option(4, "fewest right paths of a problem that stays")
    high: int = option(28, "most right paths of a problem that stays")
    prefix: str = option(
        "2048", "the checkpoint: new tokens of a prefix; or several, as in 2048,1024,4096, of "
        "which the first is the usual one of stop.py and eval.py")
    prefixes: int = option(32, "prefixes a problem and checkpoint, of its first paths")
    rollouts: int = option(32, "continuations of a prefix")
    m: int = option(4, "[STOP] tokens")
    shared: bool = option(False, "one vector for all [STOP] tokens, as the authors' code has it")
    head: str = option("sigmoid", "sigmoid (paper: one logit) or softmax (release: two)")
    rank: int = option(128, "of the LoRA")
    alpha: float | None = option(None, "of the LoRA (default: twice the rank)")
    targets: str | None = option(
        None, "linears with LoRA, as in q_proj,v_proj or none (default: all seven that are there)",
        may_be_empty=True)
    dropout: float = option(0.0, "before the LoRA")
    lr: float = option(2e-5, "AdamW's learning rate")
    weight_decay: float = option(0.01, "AdamW's")
    epochs: int = option(15, "passes over the training prefixes")
    batch_size: int = option(16, "prefixes a pass")
    accumulation: int = option(8, "passes an optimiser step")
    warmup: int = option(0, "optimiser steps of linear warm-up")
    cosine: bool = option(False, "cosine decay to zero instead of a constant rate")
    clip: float = option(0.0, "largest gradient norm (0 = off)")
    validation: float = option(0.1, "share of the problems held out to choose the best epoch")
    cache_gb: float | None = option(
        None, "prefixes' KV caches kept between epochs (default: half of the free memory)")
    n: int = option(64, "evaluation: paths a problem")
    keep: int = option(8, "evaluation: paths kept")
    plan: bool = option(False, "only say what the run will take, and end")


NO_PART_OF_A_RUN = ("batch", "device", "cache_gb", "out", "plan")  # settings that change no result


def recipe(flags):
    """(a checkpoint's own defaults, the file they stand in): recipe.json in its directory, if it
    is there."""
    file = pathlib.Path(flags.get("model", Settings.model)) / "recipe.json"
    content = read_json(file) if is_there(file) else {}
    if "model" in content:
        raise ValueError(f"{file}: model: found this setting, expected it as a flag alone")
    if type(content.get("prefix")) is int:
        content["prefix"] = str(content["prefix"])
    return content, file


def check(settings):
    """Raise ValueError on settings that cannot be, before any work is done."""
    def require(name, fine, expected):
        if not fine:
            raise ValueError(f"{name}: found {shown(getattr(settings, name))}, expected {expected}")

    sampling_of(settings)
    require_positive(
        settings, "max_new_tokens", "batch", "problems", "paths", "prefixes", "rollouts", "m",
        "rank", "alpha", "lr", "epochs", "batch_size", "accumulation", "n", "keep")
    parse_checkpoints(settings.prefix)
    require_choice(settings, "head", "sigmoid", "softmax")
    require("prefixes", settings.prefixes <= settings.paths, f"at most paths = {settings.paths}")
    require("low", settings.low >= 0, "at least 0")
    require("high", settings.low <= settings.high <= settings.paths,
            f"{settings.low} to paths, {settings.paths}")
    require("keep", settings.keep <= settings.n, f"at most n = {settings.n}")
    require("validation", 0 < settings.validation < 1, "a share in (0, 1)")
    require("dropout", 0 <= settings.dropout < 1, "a share in [0, 1)")
    require("weight_decay", settings.weight_decay >= 0, "0 or more")
    require("clip", settings.clip >= 0, "0 or more")
    require("warmup", settings.warmup >= 0, "0 or more")
    require("cache_gb", settings.cache_gb is None or settings.cache_gb >= 0, "0 or more")


# -------------------------------------------------------------------------- supervision (section 4)


@dataclasses.dataclass
class Example:
    """A prefix to train on."""
    ids: list      # prompt + prefix
    label: float   # share of its continuations that end right
    problem: str   # which problem it belongs to
    checkpoint: int | None  # where its path was cut; None: not known


def make_labels(model, tokenizer, problems, settings, out, plan):
    """Soft labels of prefixes, a record each in out/labels.jsonl; -> the records, in order."""
    sampling = sampling_of(settings)
    records = sample_paths(model, tokenizer, problems, out, settings.paths, settings.max_new_tokens,
                           sampling, settings.batch)
    staying = stratify(records, settings)
    pairs = zip(records, problems)
    kept = [pair for pair, stays in zip(pairs, staying) if stays]
    cuts = cut_prefixes(kept, settings)
    if processes.is_first():
        print(f"stratified: {len(kept)} of {len(problems)} problems stay, with {len(cuts)} "
              "prefixes", flush=True)
        restate(plan, records, cuts)
    limit = require_room(model, [record["prompt_ids"] for record in records], settings)
    return roll_out(model, tokenizer, cuts, limit, settings, out)


def stratify(records, settings):
    """Whether each problem stays: neither too hard nor too easy for this model."""
    return [settings.low <= sum(record["right"]) <= settings.high for record in records]


@dataclasses.dataclass
class Cut:
    """A stored path cut at a checkpoint: the prefix that is to get a label."""
    record: dict      # of sample_paths
    problem: Problem
    number: int       # which of the record's paths
    checkpoint: int   # in new tokens

    @property
    def path(self):
        """The whole path's new tokens."""
        return self.record["paths"][self.number]

    @property
    def prefix(self):
        """The new tokens up to the checkpoint."""
        return self.path[:self.checkpoint]

    @property
    def ended(self):
        """Whether the path had ended by then."""
        return len(self.path) <= self.checkpoint

    def head(self):
        """The fields of its label that say which one it is."""
        return {"id": self.record["id"], "path": self.number, "checkpoint": self.checkpoint,
                "prefix_token_ids": self.record["prompt_ids"] + self.prefix}


def cut_prefixes(pairs, settings):
    """The Cuts of (record, problem) pairs: their first paths at every checkpoint, an ended path
    once."""
    cuts = []
    for record, problem in pairs:
        for number in range(settings.prefixes):
            for checkpoint in sorted(parse_checkpoints(settings.prefix)):
                cut = Cut(record, problem, number, checkpoint)
                cuts.append(cut)
                if cut.ended:
                    break
    return cuts


def require_room(model, prompts, settings):
    """The limit of these prompts' paths, in new tokens. Raises ValueError unless every checkpoint
    leaves room for rollouts and for [STOP] tokens."""
    last = max(parse_checkpoints(settings.prefix))
    limit = min(room(model, prompt, settings.max_new_tokens) for prompt in prompts)
    if limit <= last:
        raise ValueError(
            f"prefix: found {last}, expected less than the limit of {limit} new tokens")
    check_prompts(model, prompts, max(limit, last + settings.m))
    return limit


def roll_out(model, tokenizer, cuts, limit, settings, out):
    """The soft labels of Cuts: the share of K continuations that end right, prefix and continuation
    together of at most `limit` new tokens. A path that has ended gets its own grade."""
    if not cuts:
        raise ValueError(
            f"data: found no problem with {settings.low} to {settings.high} of {settings.paths} "
            "paths right, expected some to train on")
    K = settings.rollouts
    sampling = sampling_of(settings)
    graded = [[cut.problem.kind, cut.problem.answer] for cut in cuts]
    identity = digest(model_digest(model), dataclasses.asdict(sampling), graded, K, limit)
    job = Job(out / "labels.jsonl", identity, [cut.head() for cut in cuts])

    def add(i, successes):
        job.add(i, {"soft_label": successes / K, "successes": successes, "rollouts": K})

    with job:
        running = []
        for i in processes.mine(job.todo()):
            if cuts[i].ended:
                add(i, K * cuts[i].record["right"][cuts[i].number])
            else:
                running.append(i)
        for checkpoint in sorted({cuts[i].checkpoint for i in running}):
            chosen = [i for i in running if cuts[i].checkpoint == checkpoint]
            prompts = [job.heads[i]["prefix_token_ids"] for i in chosen]

            def grade(place, paths):
                cut = cuts[chosen[place]]
                add(chosen[place], count_right(tokenizer, cut, paths))

            length = limit - checkpoint
            with token_bar(f"rollouts from {checkpoint}", len(prompts) * K * length) as bar:
                sample_all(
                    model, prompts, K, length, sampling, grade, batch=settings.batch, bar=bar)
    return job.finish()


def count_right(tokenizer, cut, paths):
    """How many of these continuations of a prefix end right."""
    kind = cut.problem.kind
    answers = [extract_answer(tokenizer.completion(cut.prefix + path.ids), kind) for path in paths]
    return sum(same_answer(answer, cut.problem.answer, kind) for answer in answers)


def given_labels(file, model, tokenizer, m, tests):
    """The examples of a file of labels, ours or the authors'. Records of one problem share `id`
    (or `problem_id`); one without either stands for itself. ValueError on a held-out problem's
    record."""
    def check_ids(ids):
        check_prompts(model, [ids], m)

    held_out = [(problem.id, tokenizer.ask(problem)) for problem in tests]
    examples = []
    for prefix in read_prefixes(file, check_ids):
        if prefix.label is None:
            raise ValueError(
                f"{file}:{prefix.line}: soft_label: found none, expected a number in [0, 1]")
        for name, prompt in held_out:
            if prefix.ids[:len(prompt)] == prompt:
                raise ValueError(
                    f"{file}:{prefix.line}: problem {prefix.problem} is held-out problem {name}")
        problem = f"line {prefix.line}" if prefix.problem is None else prefix.problem
        examples.append(Example(prefix.ids, prefix.label, problem, prefix.checkpoint))
    return examples


def require_several(problems):
    """Raise ValueError on a single problem: some are trained on, others are held out."""
    if len(problems) < 2:
        raise ValueError(
            f"labels: found {len(problems)} problem(s), expected several, to hold some out for "
            "validation")


def split(examples, share, seed):
    """(training, validation) examples, by whole problems, drawn by the seed.
    ValueError if no problem is left to train on."""
    problems = sorted({example.problem for example in examples})
    require_several(problems)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(problems), generator=generator).tolist()
    count = min(max(1, round(share * len(problems))), len(problems) - 1)
    held = {problems[i] for i in order[:count]}
    training = [example for example in examples if example.problem not in held]
    validation = [example for example in examples if example.problem in held]
    return training, validation


# ---------------------------------------------------------------------------------- fit (section 5)


class Prefixes:
    """Examples in batches of like length. Their KV caches, without gradient or LoRA, are kept
    between epochs as long as they fit `cache_bytes`; the others are made again."""

    def __init__(self, model, examples, batch_size, m, cache_bytes, share_rows=False):
        examples = sorted(examples, key=lambda example: len(example.ids))
        self.model = model
        self.m = m
        self.labels = torch.tensor([example.label for example in examples])
        self.problems = [example.problem for example in examples]
        self.checkpoints = [example.checkpoint for example in examples]
        self.batches = []
        for start in range(0, len(examples), batch_size):
            self.batches.append(examples[start:start + batch_size])
        self.free_bytes = cache_bytes
        self.caches = {}  # batch number -> its KVCache
        self.share_rows = share_rows

    def own(self, numbers):
        """Those of the batches `numbers` on which this process works: its share of them or, with
        `share_rows`, all of which it has rows."""
        if not self.share_rows:  # always the same, whose caches it keeps
            return [i for i in numbers if i % processes.count() == processes.rank()]
        return [i for i in numbers if processes.mine(self.batches[i])]

    def __getitem__(self, i):
        """(cache, labels (B,)) of batch i, or of this process's share of its rows."""
        batch = self.batches[i]
        if self.share_rows:
            batch = processes.mine(batch)
        cache = self.caches.get(i)
        if cache is None:
            with torch.no_grad():
                cache, _ = prefill(self.model, [example.ids for example in batch], self.m)
            if cache.nbytes <= self.free_bytes:
                self.free_bytes -= cache.nbytes
                self.caches[i] = cache
        labels = torch.tensor([example.label for example in batch], device=self.model.device)
        return cache, labels


def validate(model, stop, prefixes):
    """Metrics on the validation problems, and those of each checkpoint where there are several."""
    stop.eval()
    with torch.no_grad():
        own = prefixes.own(range(len(prefixes.batches)))
        logits = [stop(model, prefixes[i][0]).cpu() for i in own]
    logits = torch.cat(processes.gather(logits))
    scores = stop.chance(logits)
    require_finite(scores, "validation: STOP's score")
    metrics = {"validation_loss": stop.loss(logits, prefixes.labels).item()}
    metrics |= discrimination(scores, prefixes.labels, prefixes.problems)
    checkpoints = sorted(set(prefixes.checkpoints) - {None})
    if len(checkpoints) > 1:
        for checkpoint in checkpoints:
            rows = [i for i, place in enumerate(prefixes.checkpoints) if place == checkpoint]
            problems = [prefixes.problems[i] for i in rows]
            of_checkpoint = discrimination(scores[rows], prefixes.labels[rows], problems)
            for name, value in of_checkpoint.items():
                metrics[f"{name}_{checkpoint}"] = value
    return metrics


def discrimination(scores, labels, problems):
    """How well scores tell good prefixes from bad ones; None where that is not defined. AUROC
    counts a label of at least one half as positive; `pairwise` looks within problems."""
    values = {
        "auroc": auroc(scores, labels >= 0.5),
        "pairwise": pairwise_accuracy(scores, labels, problems),
        "mean_score": scores.mean().item()}
    return {name: None if math.isnan(value) else value for name, value in values.items()}


def learning_rate(step, steps, settings):
    """The rate of optimiser step `step` of `steps`: linear warm-up, then constant or cosine to
    zero."""
    rate = settings.lr * min(1.0, (step + 1) / max(1, settings.warmup))
    if settings.cosine:
        rate *= 0.5 + 0.5 * math.cos(math.pi * step / steps)
    return rate


def train_epoch(model, stop, optimizer, prefixes, settings, epoch, bar):
    """One pass over the training prefixes -> {train_loss, gradient norms of the last step by
    group}. The loss of a step is the mean over all its prefixes, however many passes and processes
    they take."""
    stop.train()
    torch.manual_seed((settings.seed + epoch) % 2 ** 64)  # dropout, and the order of the batches
    steps = torch.randperm(len(prefixes.batches)).split(settings.accumulation)
    total = 0.0
    for number, batches in enumerate(steps, epoch * len(steps)):
        rows = sum(len(prefixes.batches[i]) for i in batches)
        for i in prefixes.own(batches.tolist()):
            cache, labels = prefixes[i]
            loss = stop.loss(stop(model, cache), labels) * len(labels)
            require_finite(loss, f"fit: the loss of step {number + 1}")
            (loss / rows).backward()
            total += loss.item()
        sum_gradients(stop)
        norms = gradient_norms(stop)
        torch.nn.utils.clip_grad_norm_(stop.parameters(), settings.clip or math.inf)
        rate = learning_rate(number, settings.epochs * len(steps), settings)
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()
        bar.update()
    total = sum(processes.gather([total]))
    return {"train_loss": total / len(prefixes.labels), **norms}


def sum_gradients(stop):
    """Add up the gradients that the processes computed from their shares of a step: each has
    divided its loss by the rows of the whole step, so that the sum is the mean."""
    for parameter in stop.parameters():
        if parameter.grad is None:  # this process had no batch in this step
            parameter.grad = torch.zeros_like(parameter)
    processes.add_up([parameter.grad for parameter in stop.parameters()])


def gradient_norms(stop):
    """The gradient's norm of each of the three trained parts."""
    norms = {}
    for group in ("tokens", "lora", "head"):
        squares = 0.0
        for name, parameter in stop.named_parameters():
            if name.startswith(group):
                squares += parameter.grad.square().sum().item()
        norms[f"grad_{group}"] = math.sqrt(squares)
    return norms


def fit(model, examples, settings, out, identity):
    """Train a Stop on examples; that of the epoch with the lowest validation loss lies in out/stop
    and is returned. After each epoch all that shapes the next ones is in out/fit.pt: a killed run
    repeats at most one epoch."""
    training, validation = split(examples, settings.validation, settings.seed)
    free = cache_bytes(model, settings)
    prepare = functools.partial(Prefixes, model, batch_size=settings.batch_size, m=settings.m)
    few = settings.accumulation < processes.count()  # a step has a batch for some processes only
    training = prepare(training, cache_bytes=free * (1 - settings.validation), share_rows=few)
    validation = prepare(validation, cache_bytes=free * settings.validation)
    stop = new_stop(model, settings)
    optimizer = torch.optim.AdamW(
        stop.parameters(), lr=settings.lr, weight_decay=settings.weight_decay)
    first, best, saved = resume_fit(stop, optimizer, out, identity)
    if processes.is_first():
        describe(training, "fit")
        describe(validation, "validation")
        print(f"{sum(p.numel() for p in stop.parameters()):,} trained parameters", flush=True)

    steps = math.ceil(len(training.batches) / settings.accumulation)  # an epoch
    silent = None if processes.is_first() else True
    with tqdm(total=settings.epochs * steps, initial=first * steps, unit="step", desc="fit",
              disable=silent) as bar:
        for epoch in range(first, settings.epochs):
            row = train_epoch(model, stop, optimizer, training, settings, epoch, bar)
            row |= validate(model, stop, validation)
            if processes.is_first():
                values = [f"{key} {value:.4g}" for key, value in row.items() if value is not None]
                tqdm.write(f"epoch {epoch + 1}: {', '.join(values)}")
                if row["validation_loss"] < best:
                    best = row["validation_loss"]
                    trained = {
                        "settings": dataclasses.asdict(settings),
                        "epoch": epoch + 1,
                        "metrics": row}
                    stop.save(out / "stop", trained)
                    saved = files_digest(out / "stop")
                save_fit(stop, optimizer, out, identity, epoch + 1, best, saved)
    if processes.is_first() and files_digest(out / "stop") != saved:
        raise ValueError(f"{out / 'stop'}: found other files than this run wrote, or none: remove "
                         f"{out / 'fit.pt'} to fit again; the labels are kept")
    processes.wait_for_all()
    return Stop.load(out / "stop", model)


def new_stop(model, settings):
    """An untrained Stop."""
    targets = settings.targets
    if targets is not None:
        targets = [] if targets in ("", "none") else targets.split(",")
    return Stop(model, settings.m, settings.rank, settings.alpha, targets, settings.head,
                settings.shared, settings.dropout, settings.seed)


def cache_bytes(model, settings):
    """Bytes of KV caches that a fit may keep between epochs."""
    if settings.cache_gb is not None:
        return settings.cache_gb * 2 ** 30
    return memory.free_bytes(model.device) / 2


def describe(prefixes, name):
    """Print what a part of the examples holds."""
    print(f"{name}: {len(prefixes.labels)} prefixes, {len(set(prefixes.problems))} problems, "
          f"{prefixes.labels.mean():.3f} right")


def save_fit(stop, optimizer, out, identity, epochs, best, saved):
    """Write all that the coming epochs need to out/fit.pt."""
    content = io.BytesIO()
    state = {
        "epochs": epochs,
        "best": best,
        "saved": saved,
        "stop": stop.state_dict(),
        "optimizer": optimizer.state_dict()}
    torch.save(state, content)
    write_sealed(out / "fit.pt", identity, content.getvalue())


def resume_fit(stop, optimizer, out, identity):
    """Take up a fit from out/fit.pt, if it is there; -> (epochs done, best validation loss, digest
    of the STOP's files that were saved then)."""
    file = out / "fit.pt"
    if not file.is_file():
        return 0, math.inf, None
    advice = "remove it to fit again from the first epoch; the labels are kept"
    content = read_sealed(file, identity, advice)
    device = stop.head.weight.device
    state = torch.load(io.BytesIO(content), map_location=device, weights_only=True)
    stop.load_state_dict(state["stop"])
    optimizer.load_state_dict(state["optimizer"])
    return state["epochs"], state["best"], state["saved"]


# --------------------------------------------------------------------------------------- the plan


def make_plan(model, prompts, prefixes, tests, settings):
    """The Plan of a run from prompts (of its problems, or else of its tests) and the number of
    prefixes, with every path as long as it may be. Rates are measured by a few steps."""
    limit = min(room(model, prompt, settings.max_new_tokens) for prompt in prompts)
    capacity = max(len(prompt) for prompt in prompts) + limit
    checkpoints = parse_checkpoints(settings.prefix)
    labelling = settings.labels is None
    problems = len(prompts) if labelling else 0
    paths = problems * settings.paths + len(tests) * settings.n
    memory.require_paths(max(paths, settings.rollouts))
    rows = memory.choose_rows(model, capacity, settings.batch)
    if processes.is_first():
        print(f"plan: {memory.describe_rows(model, rows, capacity)}", flush=True)
    rate = decoding_rate(model, prompts, max(1, min(rows, paths)), limit, sampling_of(settings))
    longest = max(prompts, key=len)
    return Plan(
        problems=problems,
        paths=settings.paths,
        prefixes=prefixes,
        rollouts=settings.rollouts if labelling else 0,
        tests=len(tests),
        n=settings.n,
        path_length=limit,
        rollout_length=max(0, limit - sum(checkpoints) / len(checkpoints)),
        rate=rate * processes.count(),
        fit_seconds=fit_seconds(model, longest, prefixes, settings) / processes.count())


def fit_seconds(model, prompt, prefixes, settings):
    """How long a fit on so many prefixes takes, from one pass over prefixes of the usual length."""
    checkpoints = parse_checkpoints(settings.prefix)
    length = len(prompt) + sum(checkpoints) // len(checkpoints)
    ids = (prompt * (length // len(prompt) + 1))[:length]
    examples = [Example(ids, 0.5, "", None)] * min(settings.batch_size, prefixes)
    stop = new_stop(model, settings)
    seconds = []
    for _ in range(2):  # the first warms up
        start = time.perf_counter()
        batch = Prefixes(model, examples, settings.batch_size, settings.m, cache_bytes=0)
        cache, labels = batch[0]
        read = time.perf_counter()
        stop.loss(stop(model, cache), labels).backward()
        stop.head.bias.grad.sum().item()  # waits for the device
        seconds = [read - start, time.perf_counter() - read]
    reading, step = seconds
    passes = math.ceil(prefixes / settings.batch_size)
    kept = cache.nbytes * passes <= cache_bytes(model, settings)
    return passes * (reading * (1 if kept else settings.epochs) + step * settings.epochs)


def restate(plan, records, cuts):
    """Print the plan again once the paths are there: their lengths and the prefixes that stay are
    known."""
    lengths = [len(path) for record in records for path in record["paths"]]
    beyond = [len(cut.path) - len(cut.prefix) for cut in cuts]
    plan = dataclasses.replace(
        plan,
        problems=0,
        prefixes=len(cuts),
        path_length=sum(lengths) / len(lengths),
        rollout_length=sum(beyond) / max(1, len(beyond)),
        fit_seconds=plan.fit_seconds * len(cuts) / plan.prefixes)
    print(f"plan: paths have {plan.path_length:,.0f} tokens on average; still to come: "
          f"{plan.describe_hours()}", flush=True)


# ------------------------------------------------------------------------------------ command line


def training_problems(settings, folder, tests):
    """The problems to train on, without those that are held out."""
    problems = read_sources(settings.data or folder / "train.jsonl")
    problems, dropped = without_held_out(problems, tests)
    if dropped and processes.is_first():
        print(f"data: {len(dropped)} problems are held-out ones and were dropped")
    if not problems:
        raise ValueError("data: found no problem beside held-out ones, expected some to train on")
    return problems[:settings.problems]


@dataclasses.dataclass
class Material:
    """What a run starts from."""
    problems: list        # to make labels from; empty where labels are given
    examples: list | None  # the labels that are given
    tests: list           # held-out problems


def read_material(settings, model, tokenizer, folder):
    """The Material that the settings name. ValueError on whatever is wrong with it."""
    test = settings.test
    if test is None and (folder / "test.jsonl").is_file():
        test = folder / "test.jsonl"
    tests = read_problems(test) if test else []
    if settings.labels:
        examples = given_labels(settings.labels, model, tokenizer, settings.m, tests)
        split(examples, settings.validation, settings.seed)  # refuses labels of one problem alone
        return Material([], examples, tests)
    problems = training_problems(settings, folder, tests)
    require_several(problems)
    return Material(problems, None, tests)


def plan_of(material, model, tokenizer, settings):
    """The Plan of a run on this material. Raises ValueError where it cannot be run to its end."""
    prompts = [tokenizer.ask(problem) for problem in material.problems or material.tests]
    if material.problems:
        require_room(model, prompts, settings)
    for problem in material.tests:
        check_prompts(model, [tokenizer.ask(problem)], settings.max_new_tokens or settings.m)
    checkpoints = parse_checkpoints(settings.prefix)
    prefixes = len(prompts) * settings.prefixes * len(checkpoints)
    if material.examples is not None:
        prefixes = len(material.examples)
    if not prompts:
        prompts = [example.ids[:-checkpoints[0]] or example.ids for example in material.examples]
    return make_plan(model, prompts, prefixes, material.tests, settings)


def run(settings, model, tokenizer, folder, out):
    """Make labels (unless given), fit, evaluate (where there are held-out problems)."""
    material = read_material(settings, model, tokenizer, folder)
    plan = plan_of(material, model, tokenizer, settings)
    if processes.is_first():
        for line in [*plan.describe_work(), f"at most {plan.describe_hours()}"]:
            print(f"plan: {line}", flush=True)
    if settings.plan:
        return
    identity = claim_run(settings, model, material, out)
    examples = material.examples
    if examples is None:
        labels = make_labels(model, tokenizer, material.problems, settings, out, plan)
        examples = []
        for label in labels:
            examples.append(Example(label["prefix_token_ids"], label["soft_label"], label["id"],
                                    label["checkpoint"]))
        split(examples, settings.validation, settings.seed)
    identity = digest(identity, [dataclasses.asdict(example) for example in examples])
    stop = fit(model, examples, settings, out, identity)
    scores = {}
    if material.tests:
        settings = dataclasses.replace(settings, prefix=None)  # the usual one of this STOP
        report = evaluate_run(model, tokenizer, stop, material.tests, settings, out)
        scores = summary(report)
    if processes.is_first():
        print(json.dumps(
            {"out": str(out), "stop": str(out / "stop"), **stop.trained["metrics"], **scores}))


def claim_run(settings, model, material, out):
    """Make the folder this run's: its settings.json says what run it is. -> digits that stand for
    it. ValueError where the folder holds another run."""
    known = dataclasses.asdict(settings)
    for name in NO_PART_OF_A_RUN:
        del known[name]
    content = dataclasses.asdict(material)
    known |= {"content": digest(content), "weights": model_digest(model)}
    claim(out / "settings.json", known)
    return digest(known)


def main(settings):
    """The whole run, in its folder, which no other process may use meanwhile."""
    check(settings)
    model, tokenizer = open_model(settings)
    out = pathlib.Path(settings.out or pathlib.Path("runs") / pathlib.Path(settings.model).name)
    if settings.plan:
        run(settings, model, tokenizer, find_folder(settings.model), out)
        return
    out.mkdir(parents=True, exist_ok=True)
    with locked(out) if processes.is_first() else contextlib.nullcontext():
        run(settings, model, tokenizer, find_folder(settings.model), out)


if __name__ == "__main__":
    command_line(Settings, main, recipe, shares_work=True)
