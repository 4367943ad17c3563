"""The batch that the scripts run: rows that become free take the next path, a token is drawn from
few of many logits, prompts are read once."""
import math

import pytest
import torch
from helpers import KINDS, random_model, random_prompt

import sample
from engine import refill
from engine.cuda_graph import DecodeStep
from engine.draw import choose
from engine.refill import Batch, generate
from sample import Path, Sampling, draw, path_key, prefill, probabilities, uniform

SETTINGS = [
    (0.6, 40, 0.95), (1.0, 0, 0.9), (0.8, 5, 1.0), (1.3, 0, 0.5), (1.0, 0, 1.0), (2.0, 7, 0.3),
    (0.25, 1, 1.0), (0.0, 0, 1.0), (0.6, 1000, 0.95), (50.0, 20, 0.99), (1e-3, 0, 0.9)]
LARGE_NOISE = 1 - 2 ** -40


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def keys_of(count):
    """Noise keys (B,) int64 of the first paths of a prompt."""
    keys = [path_key(0, (1, 2, 3), index) for index in range(count)]
    return torch.tensor([key - 2 ** 64 if key >= 2 ** 63 else key for key in keys])


# ------------------------------------------------------------------- a draw from a large vocabulary


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
@pytest.mark.parametrize("ties", ("none", "some", "all"))
def test_a_draw_that_looks_at_few_tokens_is_exact(setting, ties):
    """Bit for bit the token that the whole distribution gives, also where the k-th largest logit
    ties with more tokens than are looked at, and in bfloat16, where many tie."""
    logits = 3 * normal(300, 1500, seed=2)
    if ties == "some":
        logits = logits.bfloat16()
    if ties == "all":
        logits[::2] = logits[::2].round()
        logits[1::4] = 0.0
    noise = uniform(keys_of(300), 0)
    noise[:2] = torch.tensor([0.0, LARGE_NOISE], dtype=torch.float64)
    expected = draw(probabilities(logits, *setting), noise)
    assert torch.equal(choose(logits, noise, Sampling(*setting)), expected)


@pytest.mark.parametrize("vocab", (7, 50, 1024))
@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_a_draw_from_a_small_vocabulary_is_exact(setting, vocab):
    logits = 3 * normal(300, vocab, seed=2)
    logits[::2] = logits[::2].round()
    noise = uniform(keys_of(300), 0)
    expected = draw(probabilities(logits, *setting), noise)
    assert torch.equal(choose(logits, noise, Sampling(*setting)), expected)


DAMAGE = {
    "one nan": [math.nan],
    "one infinity": [math.inf],
    "infinities": [math.inf, math.inf, -math.inf],
    "nan and infinity": [math.nan, math.inf],
    "no possible token": [-math.inf] * 2000}


@pytest.mark.parametrize("batch", (sample.Batch, Batch))
@pytest.mark.parametrize("vocab", (50, 1500))
@pytest.mark.parametrize("setting", SETTINGS, ids=str)
@pytest.mark.parametrize("what", DAMAGE)
def test_a_row_of_nan_draws_no_token(vocab, setting, what, batch):
    """The run ends in one line, whatever the rows beside it hold."""
    logits = normal(3, vocab)
    count = len(logits[1, 7:]) if what == "no possible token" else len(DAMAGE[what])
    logits[1, 7:7 + count] = torch.tensor(DAMAGE[what][:count])
    model = random_model("qwen2")
    drawing = batch(model, [Path([1, 2], i) for i in range(3)], 9, 5, Sampling(*setting))
    drawing.settle()
    model.logits = lambda hidden: logits
    with pytest.raises(ValueError, match="^logits: found NaN or infinity, expected finite"):
        drawing._draw()


# ----------------------------------------------------------------------------- paths are their own

PROMPTS = [random_prompt(length) for length in (9, 3, 26)]
SAMPLING = {"temperature": 1.0, "top_k": 20, "top_p": 0.95, "seed": 11}
LIMIT = 30


class Sampled:
    """Nine paths of each prompt in one batch, and end tokens that about half of them meet."""

    def __init__(self, kind):
        self.model = random_model(kind)
        tokens = []
        for group in self.generate(3, eos_ids=None):
            for path in group:
                tokens += path.ids
        drawn = torch.bincount(torch.tensor(tokens))
        self.eos = drawn.argsort(descending=True)[14:16].tolist()
        self.groups = self.generate(9)
        self.paths = [path for group in self.groups for path in group]

    def generate(self, n, prompts=PROMPTS, **changes):
        eos = changes.pop("eos_ids", getattr(self, "eos", None))
        settings = SAMPLING | {"max_new_tokens": LIMIT} | changes
        return generate(self.model, prompts, n=n, eos_ids=eos, **settings)

    def new_batch(self, rows=27, n=9, capacity=70):
        """(a Batch of n new paths of each prompt, the paths)."""
        paths = []
        for prompt in PROMPTS:
            paths += [Path(prompt, index) for index in range(n)]
        batch = Batch(
            self.model, paths, capacity, LIMIT, Sampling(**SAMPLING), self.eos, rows)
        return batch, paths


@pytest.fixture(scope="module", params=KINDS)
def sampled(request):
    return Sampled(request.param)


def tokens_of(paths):
    return [path.ids for path in paths]


def test_the_batch_is_what_the_invariants_need(sampled):
    """Not a property: rows end early at different steps, some do not, and paths differ, so that the
    tests below can fail."""
    ended = sum(path.status == "eos" for path in sampled.paths)
    assert 4 < ended < 23
    assert len({len(path.ids) for path in sampled.paths}) > 5
    assert len({tuple(path.ids) for path in sampled.paths}) > 24  # two may both end at once


def test_a_path_says_what_it_is(sampled):
    for prompt, group in zip(PROMPTS, sampled.groups):
        for index, path in enumerate(group):
            assert path.prompt_ids == prompt
            assert path.index == index
            assert path.score is None
            assert not set(path.ids[:-1]) & set(sampled.eos)
            if path.ids[-1] in sampled.eos:
                assert path.status == "eos"
            else:
                assert path.status == "length"
                assert len(path.ids) == LIMIT


@pytest.mark.parametrize("n, batch", ((3, None), (9, 4), (3, 1), (9, 26), (3, 5)))
def test_tokens_depend_on_the_path_alone(sampled, n, batch):
    """Fewer paths, some rows at a time, one row at a time: path i of a prompt is the same, token
    for token."""
    found = sampled.generate(n, batch=batch)
    for group, expected in zip(found, sampled.groups):
        assert tokens_of(group) == tokens_of(expected[:n])


def test_tokens_do_not_depend_on_the_other_prompts(sampled):
    """Alone, in another order, beside itself: the same tokens."""
    (alone,) = sampled.generate(9, prompts=[PROMPTS[1]])
    assert tokens_of(alone) == tokens_of(sampled.groups[1])
    turned = sampled.generate(5, prompts=PROMPTS[::-1] + [PROMPTS[0]])
    for group, number in zip(turned, (2, 1, 0, 0)):
        assert tokens_of(group) == tokens_of(sampled.groups[number][:5])


def test_tokens_do_not_depend_on_who_ends(sampled):
    """Without end tokens the paths go on, and what came before is unchanged: catches rows mixed
    up as others leave."""
    free = sampled.generate(9, eos_ids=[])
    for path, short in zip(sum(free, []), sampled.paths):
        assert path.ids[:len(short.ids)] == short.ids
        assert len(path.ids) == LIMIT
        assert path.status == "length"


def test_a_longer_limit_only_goes_on(sampled):
    longer = sampled.generate(9, max_new_tokens=50)
    for path, short in zip(sum(longer, []), sampled.paths):
        assert path.ids[:len(short.ids)] == short.ids
        if short.status == "eos":
            assert len(path.ids) == len(short.ids)


def test_seed_and_index_matter(sampled):
    other = sampled.generate(9, seed=12)
    pairs = zip(sum(other, []), sampled.paths)
    assert sum(path.ids != known.ids for path, known in pairs) > 24


def test_tokens_are_those_of_the_plain_generate(sampled):
    settings = SAMPLING | {"max_new_tokens": LIMIT, "eos_ids": sampled.eos}
    plain = sample.generate(sampled.model, PROMPTS, 9, **settings)
    for group, expected in zip(plain, sampled.groups, strict=True):
        for path, known in zip(group, expected, strict=True):
            assert vars(path) == vars(known) | {"prompt_number": 0}


def test_no_prompt_gives_no_paths(sampled):
    assert sampled.generate(3, prompts=[]) == []


def test_a_batch_with_waiting_paths_does_not_stop_early(sampled):
    """It would leave paths that never began, without a word."""
    batch, _ = sampled.new_batch(rows=4)
    with pytest.raises(ValueError, match="^until: found 5, expected the limit of 30 while 23"):
        batch.decode(5)


# ---------------------------------------------------------------------------- work done is counted


@pytest.fixture
def passes(sampled, monkeypatch):
    """Shapes (rows, positions) of every pass through the model, in order."""
    seen = []
    run = sampled.model.run

    def noted(ids, *rest, **more):
        seen.append(tuple(ids.shape[:2]))
        return run(ids, *rest, **more)

    monkeypatch.setattr(sampled.model, "run", noted)
    return seen


def as_on_cuda(monkeypatch):
    """Rows of ended paths leave in groups of 8, as where steps are captured as graphs."""
    begin = DecodeStep.__init__

    def grouped(self, model):
        begin(self, model)
        self.group = 8

    monkeypatch.setattr(DecodeStep, "__init__", grouped)


def test_decoded_is_what_was_decoded(sampled, passes):
    """No row is computed after its path has ended, and every row that was computed is counted. The
    prompts are read in one pass, each once and not once for each path."""
    batch, paths = sampled.new_batch()
    assert passes == [(3, 26)]
    batch.decode(LIMIT)
    assert tokens_of(paths) == tokens_of(sampled.paths)
    assert batch.decoded == sum(len(path.ids) for path in paths)
    computed = []
    for step in range(LIMIT):
        running = sum(len(path.ids) > step for path in paths)
        if running:
            computed.append((running, 1))
    assert passes[1:] == computed


@pytest.mark.parametrize("rows", (4, 10))
def test_a_freed_row_takes_the_next_path_at_once(sampled, passes, rows):
    """The number of live rows stays up until nothing waits; the work is that of one large batch."""
    batch, paths = sampled.new_batch(rows)
    steps = []
    while batch.live:
        steps.append((len(batch.live), len(batch.waiting)))
        assert all(path.status == "running" for path in batch.live)
        before = batch.decoded
        batch.settle()
        batch._append(batch._draw())
        batch._fill_free_rows()
        assert batch.decoded == before + steps[-1][0]
    for count, waiting in steps:
        assert count == rows or waiting == 0
    assert tokens_of(paths) == tokens_of(sampled.paths)
    assert batch.decoded == sum(len(path.ids) for path in paths)
    assert batch.decoded == sum(rows for rows, positions in passes if positions == 1)


@pytest.mark.parametrize("rows", (4, 10))
def test_rows_that_leave_in_groups_change_no_token(sampled, passes, monkeypatch, rows):
    """On CUDA rows of ended paths wait to leave. They are counted while they are computed, and do
    not outgrow the cache while the last of the waiting paths go to their limit."""
    as_on_cuda(monkeypatch)
    batch, paths = sampled.new_batch(rows, capacity=26 + LIMIT)
    batch.decode(LIMIT)
    assert tokens_of(paths) == tokens_of(sampled.paths)
    assert batch.decoded >= sum(len(path.ids) for path in paths)
    assert batch.decoded == sum(rows for rows, positions in passes if positions == 1)


@pytest.mark.parametrize("grouped", (False, True))
@pytest.mark.parametrize("every", (3,))
def test_rows_put_in_order_of_length_change_no_token(sampled, monkeypatch, every, grouped):
    """Every so many steps while paths wait."""
    if grouped:
        as_on_cuda(monkeypatch)
    monkeypatch.setattr(Batch, "SORT_EVERY", every)
    orders = []
    rearrange = Batch._rearrange

    def noted(self, order):
        orders.append(order)
        rearrange(self, order)

    monkeypatch.setattr(Batch, "_rearrange", noted)
    found = sampled.generate(9, batch=6)
    for group, expected in zip(found, sampled.groups):
        assert tokens_of(group) == tokens_of(expected)
    assert any(sorted(order) != order for order in orders)


def test_a_stopped_batch_goes_on(sampled):
    """Decoded in parts, as Launch and Resume do: the tokens of one run, and live rows = running
    paths at each stop."""
    batch, paths = sampled.new_batch()
    for until in (4, 5, 21, LIMIT):
        batch.decode(until)
        running = [path for path in paths if path.status == "running"]
        assert {id(path) for path in batch.live} == {id(path) for path in running}
        assert batch.cache.rows == len(batch.live) == len(batch.keys) == len(running)
        assert all(len(path.ids) == until for path in batch.live)
        assert batch.steps <= until
        batch.settle()
        lengths = [len(path.prompt_ids) + len(path.ids) for path in batch.live]
        assert batch.cache.lengths.tolist() == lengths
    assert tokens_of(paths) == tokens_of(sampled.paths)


@pytest.mark.parametrize("settled", (False, True))
def test_pruned_paths_leave_the_batch(sampled, settled):
    """As Check prunes, with tokens waiting and with none: kept rows stay themselves, the others
    cost nothing more, and their memory is freed."""
    batch, paths = sampled.new_batch()
    batch.decode(6)
    if settled:
        batch.settle()
    count = len(batch.live)
    kept = [path for row, path in enumerate(batch.live) if row % 3 == 1 or row == count - 1]
    kept_ids = {id(path) for path in kept}
    pruned = [path for path in batch.live if id(path) not in kept_ids]
    before = batch.decoded
    batch.prune(pruned)
    batch.resume(1, 60)
    assert {id(path) for path in batch.live} == kept_ids
    assert batch.cache.rows == len(kept)
    assert batch.cache.capacity == 60
    assert all(len(buffer) == len(kept) for buffer in batch.cache.keys)
    batch.decode(LIMIT)
    for path, whole in zip(paths, sampled.paths):
        if path.status == "pruned":
            assert path.ids == whole.ids[:6]
        else:
            assert path.ids == whole.ids
    assert sum(path.status == "pruned" for path in paths) == len(pruned) > 0
    assert batch.decoded == sum(len(path.ids) for path in paths)
    assert batch.decoded - before == sum(len(path.ids) - 6 for path in kept)


class Bar:
    """What tqdm would be told."""

    def __init__(self, total):
        self.total = total
        self.n = 0

    def update(self, count):
        self.n += count


@pytest.mark.parametrize("batch", (None, 10))
def test_each_path_is_reported_once_as_it_ends(sampled, batch):
    bar = Bar(27 * LIMIT)
    seen = []
    sampled.generate(9, batch=batch, bar=bar, on_end=seen.append)
    assert len({id(path) for path in seen}) == len(seen) == 27
    assert all(path.status in ("eos", "length") for path in seen)
    assert bar.total == bar.n == sum(len(path.ids) for path in sampled.paths)


# ------------------------------------------------------------------------------ prompts are read


def test_a_prompt_is_read_once_for_all_its_paths(sampled, monkeypatch):
    """However few rows there are; and no more prompts ahead than are held. Only a prompt whose
    paths begin partly before a reading and partly with it is read again."""
    read = []

    def noted(model, prompts, extra=0):
        read.append(len(prompts))
        return prefill(model, prompts, extra)

    monkeypatch.setattr(refill, "prefill", noted)
    prompts = [random_prompt(5 + i % 3, seed=i) for i in range(40)]
    for batch in (4, 6):
        read.clear()
        generate(sampled.model, prompts, n=2, max_new_tokens=3, batch=batch)
        assert max(read) <= refill.Prompts.AHEAD
        assert 40 <= sum(read) <= 40 + 2
        assert len(read) == 3


def test_paths_of_a_prompt_share_its_list():
    """230,400 copies of 2,300 ids would take gigabytes of the host's memory."""
    model = random_model("qwen2")
    for paths in generate(model, [random_prompt(9), random_prompt(5)], n=3, max_new_tokens=2):
        assert len({id(path.prompt_ids) for path in paths}) == 1


@pytest.mark.parametrize("tokens, lengths, read", (
    (8192, [5] * 30, 16), (40, [13] * 30, 3), (40, [50, 50, 50], 1), (40, [5, 30, 5, 5], 1)))
def test_prompts_are_read_ahead_as_far_as_one_pass_goes(monkeypatch, tokens, lengths, read):
    """What is held of them is counted as one pass (memory.working_bytes)."""
    monkeypatch.setattr(refill.memory, "PREFILL_TOKENS", tokens)
    model = random_model("qwen2")
    paths = [Path(random_prompt(length, seed=i), 0) for i, length in enumerate(lengths)]
    prompts = refill.Prompts(model, Sampling())
    prompts.read(paths[:1], paths[1:])
    assert len(prompts.places) == read


def test_a_step_waits_for_the_device_once_and_tied_rows_are_done_in_full(monkeypatch):
    """Tokens are those of `choose`, and only where rows tie is there a second wait."""
    model = random_model("qwen2", vocab_size=999)
    plain_logits = model.logits
    counts = []
    tolist = torch.Tensor.tolist

    def every_second_ties(hidden):
        logits = plain_logits(hidden)
        logits[::2] = 0
        return logits

    def counted(tensor):
        counts.append(len(tensor))
        return tolist(tensor)

    def no_wait(tensor):
        raise AssertionError("a wait for the device")

    for logits, waits in ((plain_logits, 1), (every_second_ties, 2)):
        monkeypatch.setattr(model, "logits", logits)
        paths = [Path([5, 6, index], index) for index in range(6)]
        batch = Batch(model, paths, 20, 8, Sampling(), ())
        batch.settle()
        noise = uniform(batch.keys, batch.drawn)
        expected = choose(logits(batch.hidden), noise, Sampling()).tolist()
        with monkeypatch.context() as patch:
            patch.setattr(torch.Tensor, "tolist", counted)
            patch.setattr(torch.Tensor, "item", no_wait)
            patch.setattr(torch.Tensor, "__bool__", no_wait)
            counts.clear()
            found = batch._draw()
        assert found == expected == batch.pending.tolist()
        assert len(counts) == waits
