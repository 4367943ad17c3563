"""`train.fit` that goes on where it was killed, keeps the prefixes' caches between epochs, and is
shared by the processes of a run. test_9_labels_and_fit (tests/test_invariants.py) compares them;
tests/story/test_train.py kills it.
"""
import dataclasses
import functools
import io
import math

import torch

import train
from plumbing import memory, processes
from plumbing.progress import progress, say
from plumbing.records import read_sealed, write_sealed
from plumbing.stop_files import files_digest
from sample import require_finite
from stop import Stop
from train import measure, new_optimizer, new_stop, shuffled_steps, split, take_step


class Prefixes(train.Prefixes):
    """`train.Prefixes` whose caches are kept between epochs as long as they fit `cache_bytes`; the
    others are made again."""

    def __init__(self, model, examples, batch_size, m, cache_bytes, share_rows=False):
        """share_rows: each process has a share of every batch's rows, not some of the batches."""
        super().__init__(model, examples, batch_size, m)
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
            cache = self.read(batch)
            if cache.nbytes <= self.free_bytes:
                self.free_bytes -= cache.nbytes
                self.caches[i] = cache
        return cache, self.labels_of(batch)


def fit(model, examples, settings, out, identity):
    """The Stop of `train.fit`, which lies in out/stop. After each epoch all that shapes the next
    ones is in out/fit.pt: a killed run repeats at most one epoch."""
    training, validation = prepare(model, examples, settings)
    stop = new_stop(model, settings)
    optimizer = new_optimizer(stop, settings)
    first, best, saved = resume_fit(stop, optimizer, out, identity)
    if processes.is_first():
        describe(training, "fit")
        describe(validation, "validation")
        print(f"{sum(p.numel() for p in stop.parameters()):,} trained parameters", flush=True)

    steps = math.ceil(len(training.batches) / settings.accumulation)  # an epoch
    with progress("fit", settings.epochs * steps, "step", first * steps) as bar:
        for epoch in range(first, settings.epochs):
            row = train_epoch(model, stop, optimizer, training, settings, epoch, bar)
            row |= validate(model, stop, validation)
            if processes.is_first():
                values = [f"{key} {value:.4g}" for key, value in row.items() if value is not None]
                say(f"epoch {epoch + 1}: {', '.join(values)}")
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


def prepare(model, examples, settings):
    """The Prefixes of the training and of the validation examples; they share the memory."""
    training, validation = split(examples, settings.validation, settings.seed)
    free = cache_bytes(model, settings)
    few = settings.accumulation < processes.count()  # a step has a batch for some processes only
    prefixes = functools.partial(Prefixes, model, batch_size=settings.batch_size, m=settings.m)
    training = prefixes(training, cache_bytes=free * (1 - settings.validation), share_rows=few)
    validation = prefixes(validation, cache_bytes=free * settings.validation)
    return training, validation


def train_epoch(model, stop, optimizer, prefixes, settings, epoch, bar):
    """An epoch of `train.fit` -> {train_loss, gradient norms of the last step by group}. Each
    process works on its own batches of a step, and the gradients are added up."""
    stop.train()
    steps = shuffled_steps(prefixes, settings, epoch)
    total = 0.0
    for number, numbers in enumerate(steps, epoch * len(steps)):
        rows = sum(len(prefixes.batches[i]) for i in numbers)
        for i in prefixes.own(numbers):
            cache, labels = prefixes[i]
            loss = stop.loss(stop(model, cache), labels) * len(labels)
            require_finite(loss, f"fit: the loss of step {number + 1}")
            (loss / rows).backward()
            total += loss.item()
        sum_gradients(stop)
        if number + 1 == (epoch + 1) * len(steps):
            norms = gradient_norms(stop)
        take_step(stop, optimizer, number, len(steps), settings)
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
    names = []
    squares = []
    for name, parameter in stop.named_parameters():
        names.append(name)
        squares.append(parameter.grad.square().sum())
    totals = {"tokens": 0.0, "lora": 0.0, "head": 0.0}
    for name, square in zip(names, torch.stack(squares).tolist()):  # one wait for the device
        totals[name.partition(".")[0]] += square
    return {f"grad_{group}": math.sqrt(total) for group, total in totals.items()}


def validate(model, stop, prefixes):
    """`train.measure` on the validation problems, of which each process reads its batches."""
    stop.eval()
    with torch.no_grad():
        own = prefixes.own(range(len(prefixes.batches)))
        logits = [stop(model, prefixes[i][0]).cpu() for i in own]
    return measure(stop, torch.cat(processes.gather(logits)), prefixes)


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
