"""The cache: any split of the tokens, any mix of rows and any detour gives the logits of one plain pass (invariant 1)."""
import pytest
import torch
from helpers import KINDS, close, random_ids, random_model

LENGTHS = [5, 31, 17, 40]  # the window is 6, the original context 16


@pytest.fixture(scope="module", params=KINDS)
def model(request):
    return random_model(request.param)


def prefill(model, rows, capacity=64):
    """A cache with ragged rows (lists of ids), prefilled right-padded in one pass; the hidden state of each last token."""
    longest = max(map(len, rows))
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    cache = model.new_cache(len(rows), capacity)
    hidden = model(ids, cache=cache)
    cache.truncate([len(row) for row in rows])
    return cache, torch.stack([hidden[r, len(row) - 1] for r, row in enumerate(rows)])


def ragged(seed=0, lengths=LENGTHS):
    return [random_ids(length, seed=seed + r).tolist() for r, length in enumerate(lengths)]


def snapshot(cache):
    return [buffer.clone() for buffer in cache.keys + cache.values], cache.lengths.clone(), cache.longest


def live_equal(a, b):
    """Both caches hold the same rows: lengths and all that lies in front of them."""
    assert a.lengths.tolist() == b.lengths.tolist()
    for one, other in zip(a.keys + a.values, b.keys + b.values):
        for row, length in enumerate(a.lengths.tolist()):
            torch.testing.assert_close(one[row, :, :length], other[row, :, :length], rtol=0, atol=1e-4)


@pytest.mark.parametrize("seed", range(4))
def test_any_split_is_one_pass(model, seed):
    """Catches wrong positions, masks or windows for several tokens behind a filled cache (is_causal there is wrong)."""
    ids = random_ids(3, 40, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    cuts = sorted(torch.randperm(39, generator=generator)[:(1, 3, 9, 39)[seed]].add(1).tolist())
    cache, parts = model.new_cache(3, 40), []
    for start, stop in zip([0] + cuts, cuts + [40]):
        parts.append(model(ids[:, start:stop], cache=cache))
    assert cache.lengths.tolist() == [40] * 3 and cache.longest == 40
    close(torch.cat(parts, 1), model(ids))


def test_batch_is_its_rows_one_by_one(model):
    """Catches rows that see each other, and >128 tokens at once (experts loop) unlike <=128 (experts dense)."""
    ids = random_ids(4, 50, seed=1)
    close(model(ids), torch.cat([model(row[None]) for row in ids]))


def test_a_ragged_batch_is_its_rows_one_by_one(model):
    """Catches one length used for all rows: positions read from row 0, padding that is seen, a window from the longest."""
    rows = ragged()
    cache, last = prefill(model, rows)
    for r, row in enumerate(rows):
        close(last[r], model(torch.tensor([row]))[0, -1])
    for step, count in enumerate((1, 3, 1, 7, 1)):  # 13 more for each row, in pieces
        new = random_ids(4, count, seed=50 + step)
        hidden = model(new, cache=cache)
        rows = [row + more for row, more in zip(rows, new.tolist())]
        for r, row in enumerate(rows):
            close(hidden[r], model(torch.tensor([row]))[0, -count:])
    assert cache.lengths.tolist() == [len(row) for row in rows]
    assert cache.longest == max(map(len, rows)) and cache.rows == 4


@pytest.mark.parametrize("count", (1, 4))
def test_dead_slots_change_nothing(model, count):
    """Slots behind a row's length, and rows that left, hold 1e30: catches a mask that lets a little of them through."""
    rows = ragged()
    new = random_ids(3, count, seed=9)
    results = []
    for value in (0.0, 1e30):
        cache, _ = prefill(model, rows)
        cache.keep([0, 1, 3])
        for buffer in cache.keys + cache.values:
            buffer[3:] = value
            for row, length in enumerate(cache.lengths.tolist()):
                buffer[row, :, length:] = value
        results.append(model(new, cache=cache))
    assert torch.equal(*results)


def test_a_rewound_branch_leaves_no_trace(model):
    """Check in small: some positions are laid behind each row and taken back; going on is bit-equal to never having."""
    rows, branch, new = ragged(), random_ids(4, 5, seed=7), random_ids(4, 2, seed=8)
    plain, _ = prefill(model, rows)
    branched, _ = prefill(model, rows)
    before = branched.lengths.clone(), branched.longest
    model(branch, cache=branched)
    branched.rewind(5)
    assert torch.equal(branched.lengths, before[0]) and branched.longest == before[1]
    live_equal(branched, plain)
    assert torch.equal(model(new, cache=branched), model(new, cache=plain))
    live_equal(branched, plain)


def test_rewind_to_the_front_of_the_window(model):
    """Rewinding past where a window started reading: catches a sliding cache that has forgotten what comes back."""
    ids = random_ids(2, 40, seed=3)
    cache = model.new_cache(2, 40)
    model(ids, cache=cache)
    cache.rewind(30)
    close(model(ids[:, 10:25], cache=cache), model(ids)[:, 10:25])


ORDERS = [[0, 1, 2, 3], [3, 2, 1, 0], [2, 0, 3], [1, 3, 0, 2], [1], [3, 1]]


@pytest.mark.parametrize("how", ("keep", "regroup"))
@pytest.mark.parametrize("order", ORDERS, ids=str)
def test_rows_taken_in_any_order(model, how, order):
    """Catches a row overwritten before it has moved, and lengths that do not move with their rows."""
    rows = ragged()
    cache, _ = prefill(model, rows)
    cache.keep(order) if how == "keep" else cache.regroup(order, 60)
    rows = [rows[row] for row in order]
    assert cache.rows == len(order) and cache.lengths.tolist() == [len(row) for row in rows]
    new = random_ids(len(order), 3, seed=5)
    hidden = model(new, cache=cache)
    for r, row in enumerate(rows):
        close(hidden[r], model(torch.tensor([row + new[r].tolist()]))[0, -3:])


def test_one_prompt_becomes_many_rows(model):
    """Repeats are copies, not views: rows of one prompt go on differently and do not write into each other."""
    prompt, order = ragged(), [1, 1, 0, 1, 3, 0]
    cache, _ = prefill(model, prompt, capacity=40)
    cache.regroup(order, 50)
    assert cache.capacity == 50 and cache.rows == 6
    rows = [prompt[row] for row in order]
    for step in range(4):
        new = random_ids(6, 1, seed=60 + step)
        hidden = model(new, cache=cache)
        rows = [row + more for row, more in zip(rows, new.tolist())]
    for r, row in enumerate(rows):
        close(hidden[r, 0], model(torch.tensor([row]))[0, -1])


def test_keep_moves_in_place_and_regroup_frees(model):
    """`keep` must leave the buffers where a captured graph reads them; `regroup` must give their memory back."""
    cache, _ = prefill(model, ragged())
    addresses = [buffer.data_ptr() for buffer in cache.keys + cache.values]
    size = cache.nbytes
    cache.keep([0, 2])
    assert [buffer.data_ptr() for buffer in cache.keys + cache.values] == addresses and cache.nbytes == size
    cache.regroup([0, 1], 44)
    assert cache.nbytes == size * 2 // 4 * 44 // 64
    assert all(len(buffer) == 2 and buffer.shape[2] == 44 for buffer in cache.keys + cache.values)


def test_several_operations_in_a_row(model):
    """Launch, a tentative branch, some rows kept, a smaller cache, on: the path that stop.py takes through the cache."""
    rows = ragged()
    cache, _ = prefill(model, rows)
    cache.regroup([3, 0, 2, 1, 1], 64)
    rows = [rows[row] for row in (3, 0, 2, 1, 1)]
    model(random_ids(5, 6, seed=70), cache=cache)
    cache.rewind(6)
    cache.keep([4, 1, 2])
    cache.regroup([0, 1, 2], 45)
    rows = [rows[row] for row in (4, 1, 2)]
    new = random_ids(3, 5, seed=71)
    hidden = model(new, cache=cache)
    for r, row in enumerate(rows):
        close(hidden[r], model(torch.tensor([row + new[r].tolist()]))[0, -5:])


def test_run_reads_but_does_not_advance(model):
    """No layer moves a length: `run` twice gives the same, with a span as wide as the cache too (a graph's view)."""
    cache, _ = prefill(model, ragged())
    lengths, new = cache.lengths.clone(), random_ids(4, 2, seed=4)
    once = model.run(new, cache, cache.longest + 2)
    close(model.run(new, cache, cache.capacity), once, 1e-5)
    assert torch.equal(cache.lengths, lengths) and cache.longest == 40
    cache.advance(2)
    assert cache.lengths.tolist() == [length + 2 for length in LENGTHS] and cache.longest == 42


def test_what_does_not_fit_is_refused():
    """Catches a write past the end (into the next row!) and lengths below zero."""
    model = random_model("qwen2")
    cache = model.new_cache(2, 8)
    with pytest.raises(ValueError, match="8"):
        model(random_ids(2, 9), cache=cache)
    model(random_ids(2, 6), cache=cache)
    kept = snapshot(cache)
    with pytest.raises(ValueError, match="8"):
        model(random_ids(2, 3), cache=cache)
    assert all(map(torch.equal, snapshot(cache)[0], kept[0])) and torch.equal(cache.lengths, kept[1])
    cache.truncate([2, 5])
    with pytest.raises(ValueError, match="3.*2"):  # the shortest row counts
        cache.rewind(3)
    for lengths in ([2, 6], [-1, 2], [2], [2, 2, 2]):
        with pytest.raises(ValueError, match="cut"):
            cache.truncate(lengths)
    with pytest.raises(ValueError, match="4"):
        cache.regroup([0, 1], 4)
    assert cache.lengths.tolist() == [2, 5]
    model(random_ids(2, 3), cache=cache)  # the longest row is full now
    with pytest.raises(ValueError, match="8"):
        model(random_ids(2, 1), cache=cache)
