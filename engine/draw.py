"""The same token as `sample.draw` takes from `sample.distribution`, without looking at all logits:
tests/engine/test_refill.py compares them bit for bit.
"""
import numpy as np
import torch

from sample import distribution, draw

TIED = -1    # in place of a token: more logits than were looked at may tie with the k-th
SPARE = 256  # logits looked at beyond the k largest, so that ties with the k-th are seen


def k_largest(logits, k):
    """`sample.largest_of`; of a small vocabulary on the CPU by numpy, which is faster there."""
    if logits.device.type != "cpu" or logits.shape[-1] > 1024:
        return logits.topk(k).values
    array = logits.detach().numpy()
    top = np.sort(np.partition(array, -k)[..., -k:])
    return torch.from_numpy(top).flip(-1)


def choose(logits, noise, sampling):
    """The token that `draw` takes from the distribution of each row: logits (B, V), noise (B,) ->
    (B,). A row that holds NaN or infinity draws any token."""
    tokens = choose_from_largest(logits, noise, sampling)
    tied = tokens == TIED
    if tied.any():
        tokens[tied] = draw_in_full(logits[tied], noise[tied], sampling)
    return tokens


def choose_from_largest(logits, noise, sampling):
    """`choose` without a wait for the device; TIED where a row has to be done in full.

    Of a large vocabulary the k + SPARE largest logits, put back in the order of their ids, give the
    same distribution and the same cumulative sums. Only where the smallest of them still ties with
    the k-th may there be more."""
    count = sampling.top_k + SPARE
    if sampling.top_k == 0 or count >= logits.shape[-1]:
        return draw_in_full(logits, noise, sampling)
    largest = logits.topk(count)  # (B, count), falling
    ids, order = largest.indices.sort(-1)
    candidates = largest.values.gather(-1, order)
    place = draw_in_full(candidates, noise, sampling)
    tokens = ids.gather(-1, place[:, None])[:, 0]

    values = largest.values.float()
    fall = (values - values[:, :1]).div_(max(sampling.temperature, 1e-30))
    return torch.where(fall[:, -1] == fall[:, sampling.top_k - 1], TIED, tokens)


def draw_in_full(logits, noise, sampling):
    """The token of each row, from all of its logits."""
    tokens = draw(distribution(logits, sampling, k_largest), noise)
    return tokens.clamp(max=logits.shape[-1] - 1)  # a row of NaN has no token
