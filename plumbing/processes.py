"""One process, or several side by side: `torchrun --nproc-per-node N train.py ...`
(torch.distributed, data parallel).

Without torchrun every function here does what one process needs: nothing. Work is dealt out by
problem: process r of N takes items r, r + N, ...; rank 0 prints, draws the bars and writes what is
written once.
"""
import datetime
import os
import sys

import torch
import torch.distributed as distributed


def start(device):
    """Join the processes that torchrun started, if it did; -> the device of this one ("cuda"
    becomes "cuda:1")."""
    if "WORLD_SIZE" not in os.environ:
        return device
    if not distributed.is_initialized():
        backend = "nccl" if device == "cuda" else "gloo"
        days = datetime.timedelta(days=7)  # one may wait long for the others' last paths
        distributed.init_process_group(backend, timeout=days)
    if device == "cuda":
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    return device


def leave():
    """Part from the other processes, when all have come here, and end this one.
    It ends at once: threads of gloo that are still at work abort an interpreter that takes its
    time."""
    if distributed.is_initialized():
        distributed.barrier()
        distributed.destroy_process_group()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def count():
    """How many processes work together."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def launched():
    """How many processes torchrun started, whether or not they have joined yet."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank():
    """Which of them this one is, from 0; known before they have joined."""
    return int(os.environ["RANK"]) if "WORLD_SIZE" in os.environ else 0


def is_first():
    """Whether this process prints and writes what is printed and written once. Known before
    `start` too, so that a mistake in the flags is said once."""
    if "WORLD_SIZE" in os.environ and not distributed.is_initialized():
        return os.environ["RANK"] == "0"
    return rank() == 0


def mine(items):
    """This process's share of a list."""
    return items[rank()::count()]


def wait_for_all():
    """Return when every process has come here."""
    if count() > 1:
        distributed.barrier()


def gather(share):
    """The whole list, on every process, of which each holds its share as `mine` deals it out."""
    if count() == 1:
        return share
    shares = [None] * count()
    distributed.all_gather_object(shares, share)
    whole = [None] * sum(len(part) for part in shares)
    for place, part in enumerate(shares):
        whole[place::count()] = part
    return whole


def add_up(tensors):
    """Replace each tensor by its sum over the processes, in place."""
    if count() > 1:
        for tensor in tensors:
            distributed.all_reduce(tensor)
