"""The fit of a STOP that goes on where it was killed, and keeps the prefixes' caches between
epochs."""
import dataclasses
import functools
import io
import math

import torch

from plumbing import memory, processes
from plumbing.progress import progress, say
from plumbing.records import read_sealed, write_sealed
from plumbing.stop_files import files_digest
from stop import Stop
from train import Prefixes, split, train_epoch, validate


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
