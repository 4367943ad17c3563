"""The cache: any split of the tokens, any mix of rows and any detour gives the logits of one plain
pass (invariant 1)."""
import pytest
import torch
from helpers import KINDS, close, random_ids, random_model, random_prompt

LENGTHS = [5, 31, 17, 40]  # the window is 6, the original context 16


@pytest.fixture(scope="module", params=KINDS)
def model(request):
    return random_model(request.param)


def prefill(model, rows, capacity=64):
    """A cache of ragged rows (lists of ids), read right-padded in one pass, and the hidden state
    of each row's last token."""
    longest = max(map(len, rows))
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    cache = model.new_cache(len(rows), capacity)
    hidden = model(ids, cache=cache)
    cache.set_lengths([len(row) for row in rows])
    last = [hidden[r, len(row) - 1] for r, row in enumerate(rows)]
    return cache, torch.stack(last)


def ragged():
    return [random_prompt(length, seed=r) for r, length in enumerate(LENGTHS)]


def lengthened(rows, new):
    """Rows (lists of ids) with new (B, T) behind them."""
    return [row + more for row, more in zip(rows, new.tolist())]


def alone(model, row):
    """Hidden states (T, hidden) of one row in a pass of its own."""
    return model(torch.tensor([row]))[0]


def check_rows(model, cache, rows, seed):
    """The next three tokens of every row of the cache are those of the rows alone."""
    assert cache.rows == len(rows)
    assert cache.lengths.tolist() == cache.counts.tolist() == [len(row) for row in rows]
    new = random_ids(len(rows), 3, seed=seed)
    hidden = model(new, cache=cache)
    for found, row in zip(hidden, lengthened(rows, new)):
        close(found, alone(model, row)[-3:])


def live_slots(cache):
    """What each row holds, of every buffer: [(K, length, D)]."""
    slots = []
    for buffer in cache.keys + cache.values:
        for row, length in enumerate(cache.counts):
            slots.append(buffer[row, :, :length].clone())
    return slots


def all_equal(some, others):
    return all(torch.equal(one, other) for one, other in zip(some, others, strict=True))


# ------------------------------------------------------------------------------- one pass or many


@pytest.mark.parametrize("seed", range(4))
def test_any_split_is_one_pass(model, seed):
    """Catches wrong positions, masks or windows for several tokens behind a filled cache, where a
    causal mask alone is wrong."""
    ids = random_ids(3, 40, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    count = (1, 3, 9, 39)[seed]
    cuts = sorted(torch.randperm(39, generator=generator)[:count].add(1).tolist())
    cache = model.new_cache(3, 40)
    parts = []
    for start, stop in zip([0] + cuts, cuts + [40]):
        parts.append(model(ids[:, start:stop], cache=cache))
    assert cache.lengths.tolist() == [40] * 3
    assert cache.longest == 40
    close(torch.cat(parts, 1), model(ids))


def test_a_batch_is_its_rows_one_by_one(model):
    """Catches rows that see each other, and more than 128 tokens at once (the experts' loop) unlike
    fewer (all experts together)."""
    ids = random_ids(4, 50, seed=1)
    rows = [model(row[None]) for row in ids]
    close(model(ids), torch.cat(rows))


def test_a_ragged_batch_is_its_rows_one_by_one(model):
    """Catches one length used for all rows: positions of row 0, padding that is seen, a window
    counted from the longest."""
    rows = ragged()
    cache, last = prefill(model, rows)
    for found, row in zip(last, rows):
        close(found, alone(model, row)[-1])
    for step, count in enumerate((1, 3, 1, 7, 1)):  # 13 more for each row, in pieces
        new = random_ids(4, count, seed=50 + step)
        hidden = model(new, cache=cache)
        rows = lengthened(rows, new)
        for found, row in zip(hidden, rows):
            close(found, alone(model, row)[-count:])
    assert cache.lengths.tolist() == [len(row) for row in rows]
    assert cache.longest == max(map(len, rows))
    assert cache.rows == 4


@pytest.mark.parametrize("count", (1, 4))
def test_dead_slots_change_nothing(model, count):
    """Slots at and behind a row's length, and rows that left, hold 1e30: catches a mask that lets a
    little of them through."""
    rows = ragged()
    new = random_ids(3, count, seed=9)
    results = []
    for value in (0.0, 1e30):
        cache, _ = prefill(model, rows)
        cache.keep([0, 1, 3])
        for buffer in cache.keys + cache.values:
            buffer[3:] = value
            for row, length in enumerate(cache.counts):
                buffer[row, :, length:] = value
        results.append(model(new, cache=cache))
    assert torch.equal(*results)


# ------------------------------------------------------------------------------- tentative passes


def test_a_pass_that_is_not_advanced_leaves_no_trace(model):
    """Check in small: positions behind each row that never belong to it; going on is bit-equal to
    never having been there."""
    rows = ragged()
    branch = random_ids(4, 5, seed=7)
    new = random_ids(4, 2, seed=8)
    plain, _ = prefill(model, rows)
    branched, _ = prefill(model, rows)
    model.run(branch, branched)
    assert torch.equal(branched.lengths, plain.lengths)
    assert branched.longest == plain.longest
    assert all_equal(live_slots(branched), live_slots(plain))
    assert torch.equal(model(new, cache=branched), model(new, cache=plain))
    assert all_equal(live_slots(branched), live_slots(plain))


def test_run_reads_and_does_not_advance(model):
    """No layer moves a length: `run` twice gives the same, also over a span as wide as the cache,
    which is what a CUDA graph reads."""
    cache, _ = prefill(model, ragged())
    new = random_ids(4, 2, seed=4)
    once = model.run(new, cache, cache.longest + 2)
    close(model.run(new, cache, cache.capacity), once, 1e-5)
    close(model.run(new, cache), once, 1e-5)
    assert cache.lengths.tolist() == LENGTHS
    assert cache.longest == 40
    cache.advance(2)
    assert cache.lengths.tolist() == cache.counts.tolist() == [n + 2 for n in LENGTHS]
    assert cache.longest == 42


def test_rows_cut_back_to_the_front_of_the_window(model):
    """Cut to before the place where a window started reading: catches a sliding cache that has
    forgotten what comes back."""
    ids = random_ids(2, 40, seed=3)
    cache = model.new_cache(2, 40)
    model(ids, cache=cache)
    cache.set_lengths([10, 10])
    close(model(ids[:, 10:25], cache=cache), model(ids)[:, 10:25])


# ------------------------------------------------------------------------------- rows on the move

ORDERS = [[0, 1, 2, 3], [3, 2, 1, 0], [2, 0, 3], [1, 3, 0, 2], [1], [3, 1]]
REPEATS = [[1, 1, 0, 1, 3, 0], [2, 2]]


@pytest.mark.parametrize("order", ORDERS, ids=str)
def test_rows_are_kept_in_any_order(model, order):
    """Catches a row overwritten before it has moved, and lengths that do not move with it."""
    rows = ragged()
    cache, _ = prefill(model, rows)
    cache.keep(order)
    check_rows(model, cache, [rows[row] for row in order], seed=5)


@pytest.mark.parametrize("order", ORDERS + REPEATS, ids=str)
def test_rows_are_rebuilt_in_any_order(model, order):
    """Also one row several times: its copies go on differently and do not write into each other."""
    rows = ragged()
    cache, _ = prefill(model, rows)
    cache.rebuild(order, 60)
    assert cache.capacity == 60
    check_rows(model, cache, [rows[row] for row in order], seed=5)


def test_one_prompt_becomes_many_rows(model):
    """Rows of one prompt are copies, not views: they go on differently and do not write into each
    other."""
    prompts = ragged()
    order = [1, 1, 0, 1, 3, 0]
    source, _ = prefill(model, prompts, capacity=40)
    cache = model.new_cache(6, 50)
    cache.copy_rows([0, 1, 2, 3, 4, 5], source, order)
    rows = [prompts[row] for row in order]
    for step in range(4):
        new = random_ids(6, 1, seed=60 + step)
        hidden = model(new, cache=cache)
        rows = lengthened(rows, new)
    for found, row in zip(hidden, rows):
        close(found[0], alone(model, row)[-1])


def test_a_freed_row_takes_another_prompt(model):
    """Into the middle of a batch, over a longer row and over a shorter one: nothing of the row that
    was there is seen, and the others do not notice."""
    rows = ragged()
    cache, _ = prefill(model, rows)
    prompts = [random_prompt(9, seed=21), random_prompt(25, seed=22)]
    source, _ = prefill(model, prompts, capacity=25)
    cache.copy_rows([3, 0], source, [0, 1])
    assert cache.longest == 31
    check_rows(model, cache, [prompts[1], rows[1], rows[2], prompts[0]], seed=23)


def test_keep_moves_in_place_and_rebuild_frees(model):
    """`keep` must leave the buffers where a captured graph reads them; `rebuild` must give their
    memory back."""
    cache, _ = prefill(model, ragged())
    addresses = [buffer.data_ptr() for buffer in cache.keys + cache.values]
    lengths = cache.lengths.data_ptr()
    size = cache.nbytes
    cache.keep([0, 2])
    assert [buffer.data_ptr() for buffer in cache.keys + cache.values] == addresses
    assert cache.lengths.data_ptr() == lengths
    assert cache.nbytes == size
    cache.rebuild([0, 1], 44)
    assert cache.capacity == 44
    assert cache.nbytes == size * 2 // 4 * 44 // 64
    for buffer in cache.keys + cache.values:
        assert len(buffer) == 2
        assert buffer.shape[2] == 44


def test_several_operations_in_a_row(model):
    """Rows launched, a tentative branch, some kept, a smaller cache, on: the way that stop.py takes
    through the cache."""
    prompts = ragged()
    source, _ = prefill(model, prompts)
    cache = model.new_cache(5, 64)
    cache.copy_rows([0, 1, 2, 3, 4], source, [3, 0, 2, 1, 1])
    model.run(random_ids(5, 6, seed=70), cache)
    cache.keep([4, 1, 2])
    cache.rebuild([0, 1, 2], 45)
    check_rows(model, cache, [prompts[1], prompts[0], prompts[2]], seed=71)


# ---------------------------------------------------------------------------------------- refusals


def test_what_does_not_fit_is_refused():
    """A write past the end would go into the next row. A refused pass changes nothing."""
    model = random_model("qwen2")
    cache = model.new_cache(2, 8)
    with pytest.raises(ValueError, match="0 . 9 positions do not fit its capacity of 8"):
        model(random_ids(2, 9), cache=cache)
    model(random_ids(2, 6), cache=cache)
    before = [buffer.clone() for buffer in cache.keys + cache.values]
    with pytest.raises(ValueError, match="6 . 3 positions do not fit its capacity of 8"):
        model(random_ids(2, 3), cache=cache)
    assert all_equal(cache.keys + cache.values, before)
    assert cache.lengths.tolist() == cache.counts.tolist() == [6, 6]


def test_the_longest_row_is_the_one_that_must_fit():
    model = random_model("qwen2")
    cache = model.new_cache(2, 8)
    model(random_ids(2, 6), cache=cache)
    cache.set_lengths([2, 5])
    model(random_ids(2, 3), cache=cache)
    with pytest.raises(ValueError, match="8 . 1 positions do not fit"):
        model(random_ids(2, 1), cache=cache)
    with pytest.raises(ValueError, match="8 positions do not fit a capacity of 7"):
        cache.rebuild([0, 1], 7)
    assert cache.lengths.tolist() == [5, 8]


@pytest.mark.parametrize("lengths", ([2, 6], [3, 5], [-1, 2], [2], [2, 2, 2]), ids=str)
def test_rows_are_cut_and_never_lengthened(lengths):
    """A row made longer would read slots that hold nothing of it."""
    model = random_model("qwen2")
    cache = model.new_cache(2, 8)
    model(random_ids(2, 6), cache=cache)
    cache.set_lengths([2, 5])
    with pytest.raises(ValueError, match="cannot cut 2 rows"):
        cache.set_lengths(lengths)
    assert cache.lengths.tolist() == cache.counts.tolist() == [2, 5]
