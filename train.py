"""Supervision and training of a STOP module (sections 4 and 5), then a short evaluation (section
6).

    python train.py                                             # the embedded toy, end to end
    python train.py --model M --data problems.jsonl --out DIR   # on your model and problems
    python train.py --model M --labels labels.jsonl --out DIR   # on labels that exist
    torchrun --nproc-per-node 8 -- train.py --model M ...       # the same on eight GPUs

Supervision: 32 paths a problem; problems with 4 to 28 right ones stay. Each path cut at the
checkpoint is a prefix, and the share of its 32 continuations that end right is its soft label; with
--rollouts 0 nothing is continued, and whether its own path ended right is its label.
Fit: frozen base model, prefix without gradient; LoRA, [STOP] embeddings and head by AdamW.
A run that was killed goes on where it stopped, to the same labels and the same weights.
"""
import plumbing  # first: what is imported next takes seconds (plumbing/__init__.py)

import dataclasses
import math

import torch

from plumbing import processes
from plumbing.answers import extract_answer, same_answer
from plumbing.problems import Problem
from plumbing.statistics import auroc, pairwise_accuracy
from sample import prefill, require_finite
from stop import parse_checkpoints


# -------------------------------------------------------------------------- supervision (section 4)


@dataclasses.dataclass
class Example:
    """A prefix to train on."""
    ids: list      # prompt + prefix
    label: float   # share of its continuations that end right, or its own path's outcome
    problem: str   # which problem it belongs to
    checkpoint: int | None  # where its path was cut; None: not known


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


def count_right(tokenizer, cut, paths):
    """How many of these continuations of a prefix end right."""
    kind = cut.problem.kind
    answers = [extract_answer(tokenizer.completion(cut.prefix + path.ids), kind) for path in paths]
    return sum(same_answer(answer, cut.problem.answer, kind) for answer in answers)


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
    parts = dict(stop.named_parameters())
    squares = torch.stack([part.grad.square().sum() for part in parts.values()])
    squares = dict(zip(parts, squares.tolist()))  # one wait for the device
    norms = {}
    for group in ("tokens", "lora", "head"):
        total = sum(square for name, square in squares.items() if name.startswith(group))
        norms[f"grad_{group}"] = math.sqrt(total)
    return norms


if __name__ == "__main__":
    from commands.train import main
    main()
