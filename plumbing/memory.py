"""How many rows fit: free memory, bytes a row, and what is said where they do not.

The arithmetic is on shapes alone, so that it can be checked for machines that are not there:
a row holds `capacity` positions of keys and values for every layer, and while it is decoded its
attention scores and its logits.
"""
import os
from pathlib import Path

import torch

from plumbing import processes

MOST_ROWS = 1024  # more rows a step than this no longer raise the rate
PREFILL_TOKENS = 8192  # positions of one prefill pass: enough to keep a GPU busy
SHARE = 0.85  # of the free memory; the rest is for allocators, fragments and other programs
SCORE_COPIES = 12  # bytes an attention score: float32 scores, their softmax, one in the making
PATH_BYTES = 500  # of a sample.Path that has not begun
GB = 1e9


def free_bytes(device):
    """Memory that can be had on a torch device now, in bytes; of the CPU's, this process's
    share."""
    device = torch.device(device)
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        reserved = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return free + reserved  # what PyTorch holds and does not use is free for it
    return min(_free_of_machine(), _free_of_group()) // processes.count()


def _free_of_machine():
    """MemAvailable of Linux, elsewhere half of the memory."""
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def _free_of_group():
    """What the control group (a container's limit) still grants; no limit: very much. Of what it
    counts as used, files that were read and are kept for another time are given up when asked."""
    group = Path("/sys/fs/cgroup")
    limit = group / "memory.max"
    if not limit.is_file() or limit.read_text().strip() == "max":
        return 2 ** 62
    used = int((group / "memory.current").read_text())
    for line in (group / "memory.stat").read_text().splitlines():
        if line.startswith("inactive_file "):
            used -= int(line.split()[1])
    return max(0, int(limit.read_text()) - used)


def position_bytes(config, element):
    """Bytes of the keys and values of one position; `element`: bytes of one number in the cache."""
    return 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * element


def row_bytes(config, capacity, element):
    """Bytes of one row of `capacity` positions while it is decoded."""
    scores = config.num_attention_heads * SCORE_COPIES
    logits = config.vocab_size * 8  # as the head gives them, and in float32
    return capacity * (position_bytes(config, element) + scores) + logits


def working_bytes(config, capacity, element):
    """Bytes that a pass needs beside the rows: one prefill, and the prompts that it has read."""
    width = max(3 * config.intermediate_size, 4 * config.hidden_size)
    activations = PREFILL_TOKENS * width * element
    scores = min(2 ** 27, PREFILL_TOKENS * config.num_attention_heads * capacity) * SCORE_COPIES
    prompts = 2 * max(PREFILL_TOKENS, capacity) * position_bytes(config, element)
    return activations + scores + prompts


def rows_that_fit(config, capacity, element, free):
    """How many rows of `capacity` positions fit `free` bytes beside the weights, at most MOST_ROWS.
    Raises ValueError with both numbers where not even one does."""
    usable = SHARE * free - working_bytes(config, capacity, element)
    rows = int(usable // row_bytes(config, capacity, element))
    if rows < 1:
        needed = working_bytes(config, capacity, element) + row_bytes(config, capacity, element)
        raise ValueError(
            f"memory: one row of {capacity:,} positions needs {needed / SHARE / GB:.1f} GB beside "
            f"the weights, {free / GB:.1f} GB are free: lower --max-new-tokens, or take a larger "
            "device")
    return min(rows, MOST_ROWS)


def choose_rows(model, capacity, batch=None):
    """Rows to decode at a time: `batch` if given, else as many as fit the memory that is free
    now."""
    if batch is not None:
        return batch
    element = model.model.embed_tokens.weight.element_size()
    return rows_that_fit(model.config, capacity, element, free_bytes(model.device))


def rows_beside_others(model, capacity):
    """How many rows of `capacity` positions fit beside what is held already; one at least."""
    try:
        return choose_rows(model, capacity)
    except ValueError:
        return 1


def describe_rows(model, rows, capacity):
    """One line on the rows decoded at a time."""
    element = model.model.embed_tokens.weight.element_size()
    taken = rows * row_bytes(model.config, capacity, element)
    free = free_bytes(model.device)
    return (f"{rows:,} rows at a time, {capacity:,} positions each: {taken / GB:.2f} GB "
            f"of {free / GB:.1f} GB free")


def require_paths(count):
    """Raise ValueError where even the records of so many paths do not fit the host's memory."""
    free = free_bytes("cpu")
    needed = count * PATH_BYTES
    if needed > free:
        raise ValueError(
            f"paths: found {count:,}, which need {needed / GB:,.1f} GB at least, {free / GB:.1f} "
            "GB are free: lower the number of paths or of rollouts")


def require_weights(folder, needed, device):
    """Raise ValueError with both numbers where a model's weights (bytes) do not fit a device."""
    if torch.device(device).type == "meta":
        return
    free = free_bytes(device)
    if needed > free:
        raise ValueError(
            f"{folder}: its weights need {needed / GB:.1f} GB, {device} has {free / GB:.1f} GB "
            "free: take another --dtype or a larger device")
