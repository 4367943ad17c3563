"""How many rows fit: free memory, bytes a row, and what is said where they do not.

The arithmetic is on shapes alone, so that it can be checked for machines that are not there:
a row holds `capacity` positions of keys and values for every layer, and while it is decoded a
step's intermediate results and its logits.
"""
import os
from pathlib import Path

import torch

from plumbing import processes

MOST_ROWS = 1024  # more rows a step than this no longer raise the rate
PREFILL_TOKENS = 8192  # positions of one prefill pass: enough to keep a GPU busy
SHARE = 0.85  # of the free memory; the rest is for allocators, fragments and other programs
SCORE_COPIES = 12  # bytes an attention score: float32 scores, their softmax, one in the making
GPU_WORKSPACES = 1e9  # of cuBLAS on two streams, of graphs, and of sorting whole vocabularies
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
    """Bytes of one row of `capacity` positions while it is decoded: its keys and values, the
    intermediate results of a step (which a captured graph holds on to), and its logits."""
    logits = config.vocab_size * 8  # as the head gives them, and in float32
    cache = capacity * position_bytes(config, element)
    return cache + step_bytes(config, capacity, element) + logits


def step_bytes(config, capacity, element):
    """Bytes of a row's intermediate results in a decode step: attention's scores, with the float32
    copy that it makes of half-precision keys, and the feed-forward, of GPT-OSS by all experts.
    Under flash attention there are neither: then this is a few in a hundred too much."""
    keys = config.num_key_value_heads * config.head_dim * 4 if element < 4 else 0
    attention = capacity * (config.num_attention_heads * SCORE_COPIES + keys)
    inner = config.intermediate_size
    hidden = config.hidden_size
    width = 4 * inner + 6 * hidden + config.experts * (6 * inner + hidden)
    return attention + width * element


def working_bytes(config, capacity, element, on_gpu=False):
    """Bytes that are needed beside the rows: those of one prefill, and of the prompts that it has
    read, which are held while their paths begin."""
    width = max(3 * config.intermediate_size, 4 * config.hidden_size)
    if config.experts:
        width = 7 * config.intermediate_size + config.hidden_size
    activations = PREFILL_TOKENS * width * element
    scores = min(2 ** 27, PREFILL_TOKENS * config.num_attention_heads * capacity) * SCORE_COPIES
    masks = len(set(config.windows)) * PREFILL_TOKENS * capacity * 4
    prompts = 2 * max(PREFILL_TOKENS, capacity) * position_bytes(config, element)
    return activations + scores + masks + prompts + (GPU_WORKSPACES if on_gpu else 0)


def rows_that_fit(config, capacity, element, free, on_gpu=False):
    """How many rows of `capacity` positions fit `free` bytes beside the weights, at most MOST_ROWS.
    Raises ValueError with both numbers where not even one does."""
    work = working_bytes(config, capacity, element, on_gpu)
    row = row_bytes(config, capacity, element)
    rows = int((SHARE * free - work) // row)
    if rows < 1:
        raise ValueError(
            f"memory: one row of {capacity:,} positions needs {(work + row) / SHARE / GB:.1f} GB "
            f"beside the weights, {free / GB:.1f} GB are free: lower --max-new-tokens, or take a "
            "larger device")
    return min(rows, MOST_ROWS)


def choose_rows(model, capacity, batch=None):
    """Rows to decode at a time: `batch` if given, else as many as fit the memory that is free
    now."""
    if batch is not None:
        return batch
    element = model.model.embed_tokens.weight.element_size()
    on_gpu = model.device.type == "cuda"
    return rows_that_fit(model.config, capacity, element, free_bytes(model.device), on_gpu)


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
