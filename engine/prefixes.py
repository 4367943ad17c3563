"""Every prefix read once, for all that is asked of it: its tokens' probabilities (type III), and
then, on the cache that this leaves behind, STOP's check.

It equals the plain `eval.read_prefixes`, in which each reads prompt and prefix by itself
(tests/engine/test_prefixes.py compares them). A problem's prompt is read once and copied to the
rows of its paths, and equal prefixes of a problem share a row: reading is bound by compute, and is
most of what an evaluation takes on a large model.
"""
import numpy as np
import torch

from baselines import CONFIDENCES, confidence_of, read_steps
from plumbing import memory
from plumbing.progress import progress
from sample import prefill
from stop import like_lengths

ROWS = 64  # prefixes of one pass, at most


@torch.inference_mode()
def read_prefixes(model, stop, records, prefix, window):
    """(type III's {name of CONFIDENCES: (paths,)}, STOP's chances (paths,)), float64, of the first
    `prefix` tokens of every path, problem by problem."""
    confidences = {name: [] for name in CONFIDENCES}
    chances = []
    with progress("reading", sum(len(record["paths"]) for record in records), "prefix") as bar:
        for record in records:
            begun = [tuple(path[:prefix]) for path in record["paths"]]
            found = read_problem(model, stop, record["prompt_ids"], list(dict.fromkeys(begun)),
                                 window)
            for path in begun:
                values, chance = found[path]
                chances.append(chance)
                for name, value in values.items():
                    confidences[name].append(value)
            bar.update(len(begun))
    return {name: np.array(values) for name, values in confidences.items()}, np.array(chances)


def read_problem(model, stop, prompt, paths, window):
    """{path: (type III's {name: value}, STOP's chance)} of different begun paths of a prompt."""
    longest = max(map(len, paths))
    rows = min(ROWS, max(1, memory.PREFILL_TOKENS // longest))
    rows = min(rows, memory.rows_beside_others(model, len(prompt) + longest + stop.m))
    prompt_cache, prompt_end = prefill(model, [prompt])  # (1, hidden): what the first is drawn from
    found = {}
    for numbers in like_lengths(paths, rows):
        group = [paths[i] for i in numbers]
        lengths = [len(path) for path in group]
        tensors = [torch.tensor(path) for path in group]
        ids = torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True).to(model.device)  # (B, T)
        cache = model.new_cache(len(group), len(prompt) + ids.shape[1] + stop.m)
        cache.copy_rows(list(range(len(group))), prompt_cache, [0] * len(group))
        hidden = model(ids, cache=cache)  # (B, T, hidden)
        cache.set_lengths([len(prompt) + length for length in lengths])
        scores = stop.check(model, cache).double().tolist()
        for path, states, score in zip(group, hidden, scores):
            drawn_from = torch.cat((prompt_end, states[:len(path) - 1]))  # (T, hidden)
            steps = read_steps(model, drawn_from, list(path))
            found[path] = confidence_of(steps, window), score
    return found
