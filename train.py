"""Supervision and training of a STOP module (sections 4 and 5).

    python train.py                                             # the embedded toy, end to end
    python train.py --model M --data problems.jsonl --out DIR   # on your model and problems

Supervision: 32 paths a problem; problems with 4 to 28 right ones stay. Each path cut at the
checkpoint is a prefix, and the share of its 32 continuations that end right is its soft label; with
--rollouts 0 nothing is continued, and whether its own path ended right is its label.
Fit: frozen base model, prefix without gradient; LoRA, [STOP] embeddings and head by AdamW.

Both stand here in plain steps. The script runs engine/stored.py and engine/fit.py, which do the
same and go on after a kill, and ends with a short evaluation (section 6). `settings` are those of
the script (commands/train.py); the paper's:

    paths 32, low 4, high 28      of a problem; how many of them are right where it stays
    prefix 2048, prefixes 32      the checkpoint (several: "2048,1024"), and cut paths a problem
    rollouts 32                   continuations of a prefix
    m 4, head sigmoid, rank 128, alpha 2 x rank, all seven linears                   of the STOP
    lr 2e-5, weight_decay .01, epochs 15, batch_size 16, accumulation 8, dropout 0   of the fit
    validation .1                 share of the problems that chooses the epoch
"""
import plumbing  # first: what is imported next takes seconds (plumbing/__init__.py)

import copy
import dataclasses
import math

import torch

from plumbing.budget_plan import parse_checkpoints
from plumbing.grading import grade
from plumbing.problems import Problem
from plumbing.statistics import auroc, pairwise_accuracy
from sample import (
    generate, prefill, require_finite, room, sample_paths, sampling_of, validate_prompts)
from stop import Stop


# -------------------------------------------------------------------------- supervision (section 4)


@dataclasses.dataclass
class Example:
    """A prefix to train on."""
    ids: list      # prompt + prefix
    label: float   # share of its continuations that end right, or its own path's outcome
    problem: str   # which problem it belongs to
    checkpoint: int | None  # where its path was cut; None: not known


def make_labels(model, tokenizer, problems, settings):
    """Examples from problems: paths, of which the prefixes get soft labels."""
    limit = require_room(model, [tokenizer.ask(problem) for problem in problems], settings)
    records = sample_paths(
        model, tokenizer, problems, settings.paths, limit, sampling_of(settings))
    examples = []
    for cut in cut_prefixes(stratify(records, problems, settings), settings):
        label = roll_out(model, tokenizer, cut, limit, settings)
        examples.append(Example(cut.prefix_ids, label, cut.problem.id, cut.checkpoint))
    return examples


def require_room(model, prompts, settings):
    """The limit of these prompts' paths, in new tokens. Raises ValueError unless every checkpoint
    leaves room for rollouts and for [STOP] tokens."""
    last = max(parse_checkpoints(settings.prefix))
    limit = min(room(model, prompt, settings.max_new_tokens) for prompt in prompts)
    if limit <= last:
        raise ValueError(
            f"prefix: found {last}, expected less than the limit of {limit} new tokens")
    validate_prompts(model, prompts, max(limit, last + settings.m))
    return limit


def stratify(records, problems, settings):
    """(record, problem) of those that stay: neither too hard nor too easy for this model."""
    staying = []
    for record, problem in zip(records, problems):
        if settings.low <= sum(record["right"]) <= settings.high:
            staying.append((record, problem))
    return staying


@dataclasses.dataclass
class Cut:
    """A graded path cut at a checkpoint: the prefix that is to get a label."""
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
    def prefix_ids(self):
        """Prompt and prefix."""
        return self.record["prompt_ids"] + self.prefix

    @property
    def ended(self):
        """Whether the path had ended by then."""
        return len(self.path) <= self.checkpoint


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


def roll_out(model, tokenizer, cut, limit, settings):
    """The soft label of a Cut: the share of K continuations that end right, prefix and continuation
    together of at most `limit` new tokens. A path that has ended gets its own grade; with K = 0
    every path does."""
    K = settings.rollouts
    if K == 0 or cut.ended:
        return float(cut.record["right"][cut.number])
    sampling = vars(sampling_of(settings))  # the prefix as prompt gives other noise than the path's
    (paths,) = generate(model, [cut.prefix_ids], K, limit - cut.checkpoint, **sampling)
    return count_right(tokenizer, cut, paths) / K


def count_right(tokenizer, cut, paths):
    """How many of these continuations of a prefix end right."""
    _, right = grade(tokenizer, cut.problem, [cut.prefix + path.ids for path in paths])
    return sum(right)


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
    training = []
    validation = []
    for example in examples:
        part = validation if example.problem in held else training
        part.append(example)
    return training, validation


# ---------------------------------------------------------------------------------- fit (section 5)


def fit(model, examples, settings):
    """Train a Stop on examples: that of the epoch with the lowest validation loss. The loss of a
    step is the mean over all its prefixes, in however many batches they are read."""
    training, validation = split(examples, settings.validation, settings.seed)
    training = Prefixes(model, training, settings.batch_size, settings.m)
    validation = Prefixes(model, validation, settings.batch_size, settings.m)
    stop = new_stop(model, settings)
    optimizer = new_optimizer(stop, settings)
    best = math.inf
    for epoch in range(settings.epochs):
        stop.train()
        steps = shuffled_steps(training, settings, epoch)
        for step, numbers in enumerate(steps, epoch * len(steps)):
            rows = sum(len(training.batches[i]) for i in numbers)
            for i in numbers:
                cache, labels = training[i]  # the prefixes: frozen, no gradient
                logits = stop(model, cache)  # [STOP] on them: LoRA, embeddings and head
                loss = stop.loss(logits, labels) * len(labels)  # the sum over this batch
                require_finite(loss, f"fit: the loss of step {step + 1}")
                (loss / rows).backward()  # the batches of a step add up to the mean over its rows
            take_step(stop, optimizer, step, len(steps), settings)

        stop.eval()
        with torch.no_grad():
            # batch by batch, which is the order of validation.labels
            logits = [stop(model, validation[i][0]) for i in range(len(validation.batches))]
        metrics = measure(stop, torch.cat(logits).cpu(), validation)
        if metrics["validation_loss"] < best:
            best = metrics["validation_loss"]
            weights = copy.deepcopy(stop.state_dict())
    stop.load_state_dict(weights)
    return stop.eval()


class Prefixes:
    """Examples in batches of like length. Item i is batch i as it is read: a cache of its prefixes
    with room for [STOP], made without gradient or LoRA, and its labels (B,)."""

    def __init__(self, model, examples, batch_size, m):
        examples = sorted(examples, key=lambda example: len(example.ids))
        self.model = model
        self.m = m
        self.labels = torch.tensor([example.label for example in examples])
        self.problems = [example.problem for example in examples]
        self.checkpoints = [example.checkpoint for example in examples]
        self.batches = []
        for start in range(0, len(examples), batch_size):
            self.batches.append(examples[start:start + batch_size])

    def __getitem__(self, i):
        batch = self.batches[i]
        return self.read(batch), self.labels_of(batch)

    def read(self, batch):
        """A cache of these examples' prefixes."""
        with torch.no_grad():
            cache, _ = prefill(self.model, [example.ids for example in batch], self.m)
        return cache

    def labels_of(self, batch):
        """Their labels (B,), on the model's device."""
        return torch.tensor([example.label for example in batch], device=self.model.device)


def new_stop(model, settings):
    """An untrained Stop."""
    targets = settings.targets
    if targets is not None:
        targets = [] if targets in ("", "none") else targets.split(",")
    return Stop(model, settings.m, settings.rank, settings.alpha, targets, settings.head,
                settings.shared, settings.dropout, settings.seed)


def new_optimizer(stop, settings):
    """AdamW on all that is trained."""
    return torch.optim.AdamW(
        stop.parameters(), lr=settings.lr, weight_decay=settings.weight_decay)


def shuffled_steps(prefixes, settings, epoch):
    """The numbers of the batches of each optimiser step of an epoch. Their order and dropout depend
    on the seed and the epoch alone."""
    torch.manual_seed((settings.seed + epoch) % 2 ** 64)
    order = torch.randperm(len(prefixes.batches))
    return [step.tolist() for step in order.split(settings.accumulation)]


def take_step(stop, optimizer, number, steps_an_epoch, settings):
    """Optimiser step `number` of a fit, from the gradients that are there."""
    if settings.clip:
        torch.nn.utils.clip_grad_norm_(stop.parameters(), settings.clip)
    rate = learning_rate(number, settings.epochs * steps_an_epoch, settings)
    optimizer.param_groups[0]["lr"] = rate
    optimizer.step()
    optimizer.zero_grad()


def learning_rate(step, steps, settings):
    """The rate of optimiser step `step` of `steps`: linear warm-up; constant, or times a cosine
    that falls to zero over all steps."""
    rate = settings.lr * min(1.0, (step + 1) / max(1, settings.warmup))
    if settings.cosine:
        rate *= 0.5 + 0.5 * math.cos(math.pi * step / steps)
    return rate


def measure(stop, logits, prefixes):
    """Metrics of head logits (N, 1 or 2) on prefixes, the validation problems', and those of each
    checkpoint where there are several."""
    require_finite(logits, "validation: STOP's score")
    scores = stop.chance(logits)
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


if __name__ == "__main__":
    from commands.train import main
    main()
