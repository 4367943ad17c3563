"""The sampler: the distribution, the noise, that a path's tokens are its own (invariant 5), that
work is counted (6), freed rows, prompts read once, and paths stored for later use."""
import copy
import dataclasses
import json
import math
import shutil

import pytest
import torch
from helpers import (
    KINDS, NAMES, Fuse, Killed, close, golden, random_model, random_prompt, raw_config, read_lines,
    write_checkpoint, write_lines, write_tokenizer)

import sample
from engine import stored
from engine.stored import sample_paths
from model import load
from plumbing import memory
from plumbing.problems import Problem
from plumbing.tokenizer import Tokenizer
from sample import (
    Batch, Path, Sampling, choose, draw, generate, mix, path_key, prefill, probabilities, uniform)

SETTINGS = [
    (0.6, 40, 0.95), (1.0, 0, 0.9), (0.8, 5, 1.0), (1.3, 0, 0.5), (1.0, 0, 1.0), (2.0, 7, 0.3),
    (0.25, 1, 1.0)]  # temperature, top-k, top-p
BITS = (1 << 64) - 1
LARGEST_NOISE = math.nextafter(1.0, 0.0)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# -------------------------------------------------------------------------------- the distribution


@pytest.mark.parametrize("name", NAMES)
def test_golden_probabilities(name):
    """Within 1e-6 and the kept set exact: catches another order of the three, and top-p on
    probabilities before top-k."""
    tensors, info = golden(name)
    compared = 0
    for key, setting in info["sampling"].items():
        found = probabilities(
            tensors["sampling.logits"], setting["temperature"], setting["top_k"], setting["top_p"])
        assert (found > 0).sum() == setting["kept"]
        if f"sampling.{key}.probs" in tensors:
            expected = tensors[f"sampling.{key}.probs"]
            assert torch.equal(found > 0, expected > 0)
            close(found, expected, 1e-6)
            compared += 1
    assert compared


def slow_probabilities(logits, temperature, top_k, top_p):
    """One row (a list), by the definition, in Python floats; a tie with the last one kept stays."""
    if temperature == 0:
        best = logits.index(max(logits))
        return [float(token == best) for token in range(len(logits))]
    ranked = sorted(logits, reverse=True)
    kept = ranked
    if top_k > 0:
        smallest = ranked[min(top_k, len(ranked)) - 1]
        kept = [x for x in ranked if x >= smallest]
    weights = [math.exp((x - ranked[0]) / temperature) for x in kept]
    mass = 0.0
    last = kept[-1]
    for x, weight in zip(kept, weights):
        mass += weight
        if top_p < 1 and mass >= top_p * sum(weights):
            last = x
            break
    weights = [math.exp((x - ranked[0]) / temperature) if x >= last else 0.0 for x in logits]
    return [weight / sum(weights) for weight in weights]


MORE_SETTINGS = [(0.0, 0, 1.0), (0.6, 1000, 0.95), (50.0, 20, 0.99), (1e-3, 0, 0.9)]


@pytest.mark.parametrize("setting", SETTINGS + MORE_SETTINGS, ids=str)
def test_probabilities_by_the_definition(setting):
    logits = 3 * normal(4, 5, 60)
    logits[:2] = logits[:2].round()  # many ties
    logits[2, :, ::3] = -math.inf
    found = probabilities(logits, *setting)
    assert found.shape == logits.shape
    assert found.dtype == torch.float32
    rows = [slow_probabilities(row, *setting) for row in logits.view(20, 60).double().tolist()]
    expected = torch.tensor(rows).view(4, 5, 60)
    assert torch.equal(found > 0, expected > 1e-38)
    close(found, expected, 1e-6)
    close(probabilities(logits[3, 2], *setting), found[3, 2], 1e-7)


def test_ties_stay():
    """At the k-th place, at the top-p threshold, and in both at once: no token is preferred for its
    number. Greedy takes the first."""
    logits = torch.tensor([1.0, 3.0, 1.0, 1.0, -2.0])
    assert (probabilities(logits, 1.0, 2, 1.0) > 0).tolist() == [True, True, True, True, False]
    assert (probabilities(logits, 1.0, 0, 0.8) > 0).tolist() == [True, True, True, True, False]
    assert (probabilities(logits, 1.0, 0, 0.7) > 0).tolist() == [False, True, False, False, False]
    assert (probabilities(torch.zeros(6), 1.0, 3, 0.1) == 1 / 6).all()
    assert probabilities(torch.tensor([0.0, 2.0, 2.0]), 0.0).tolist() == [0, 1, 0]


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_what_probabilities_does_with_its_input(setting):
    """Catches arithmetic in bfloat16, an argument changed in place, nan out of -inf or large
    logits, and a sum unlike 1."""
    logits = 5 * normal(3, 500, seed=1)
    before = logits.clone()
    half = logits.bfloat16()
    found = probabilities(logits, *setting)
    assert torch.equal(logits, before)
    assert torch.equal(probabilities(half, *setting), probabilities(half.float(), *setting))
    close(found.double().sum(-1), torch.ones(3, dtype=torch.float64), 1e-5)
    extreme = torch.tensor([1e30, -1e30, -math.inf, 1e30])
    assert probabilities(extreme, *setting).tolist() == [0.5, 0, 0, 0.5]


def test_extreme_temperatures():
    """A large one makes all tokens alike; 1e-46 is 0 in float32, and 0 / 0 no probability."""
    flat = probabilities(5 * normal(3, 500), 1e6, 0, 1.0)
    close(flat, torch.full((3, 500), 1 / 500), 1e-6)
    logits = torch.tensor([[1.0, 3.0, 2.0]])
    assert probabilities(logits, 1e-46, 2, 0.9).tolist() == [[0.0, 1.0, 0.0]]


@pytest.mark.parametrize("setting", [
    (-0.1, 0, 1.0), (math.nan, 0, 1.0), (math.inf, 0, 1.0), (1.0, -1, 1.0), (1.0, 0, 0.0),
    (1.0, 0, 1.1), (1.0, 0, -0.5), (1.0, 0, math.nan)], ids=str)
def test_settings_that_describe_no_distribution(setting):
    with pytest.raises(ValueError, match="found .*, expected"):
        probabilities(torch.zeros(5), *setting)
    with pytest.raises(ValueError, match="found .*, expected"):
        Sampling(*setting)


@pytest.mark.parametrize("seed", (2 ** 64, -2 ** 63 - 1))
def test_a_seed_beyond_64_bits_is_refused(seed):
    with pytest.raises(ValueError, match="seed: found .*, expected an integer of 64 bits"):
        Sampling(seed=seed)


# --------------------------------------------------------------------------------------- the noise


def splitmix(state):
    """splitmix64 (Steele, Lea, Flood 2014), written down again."""
    z = (state + 0x9E3779B97F4A7C15) % 2 ** 64
    z = (z ^ (z // 2 ** 30)) * 0xBF58476D1CE4E5B9 % 2 ** 64
    z = (z ^ (z // 2 ** 27)) * 0x94D049BB133111EB % 2 ** 64
    return z ^ (z // 2 ** 31)


def signed(key):
    """The int64 with the bits of a key."""
    return key - 2 ** 64 if key >= 2 ** 63 else key


def keys_of(count, seed=0, prompt=(1, 2, 3)):
    return torch.tensor([signed(path_key(seed, prompt, index)) for index in range(count)])


def test_mix_is_splitmix64():
    """Published outputs of the generator seeded with 1234567, and this file's own version."""
    states = [1234567 + i * 0x9E3779B97F4A7C15 & BITS for i in range(5)]
    assert [mix(state) for state in states] == [
        6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431,
        16408922859458223821]
    for state in (0, 1, 2 ** 63, 2 ** 64 - 1, 0x123456789ABCDEF0):
        assert mix(state) == splitmix(state)


def test_uniform_is_the_hash_of_key_and_position():
    """Catches the arithmetic shift of int64, and any use of state: the same for rows in another
    order, alone, or each at a position of its own."""
    keys = []
    for seed in (0, 7, 2 ** 63 + 9):
        for prompt in ([5], [5, 6], list(range(300))):
            keys += [path_key(seed, prompt, index) for index in (0, 1, 63)]
    rows = torch.tensor([signed(key) for key in keys])
    for position in (0, 1, 2047, 131071):
        expected = [splitmix(key ^ position) // 2 ** 11 / 2 ** 53 for key in keys]
        found = uniform(rows, position)
        assert found.dtype == torch.float64
        assert found.tolist() == expected
        assert uniform(rows[4:5], position).tolist() == expected[4:5]
        assert uniform(rows, torch.full((27,), position)).tolist() == expected


def test_path_key_folds_seed_prompt_and_index():
    state = splitmix(42)
    for token in (9, 8, 200000):
        state = splitmix(state ^ token)
    assert path_key(42, [9, 8, 200000], 17) == splitmix(state ^ 17)
    keys = set()
    for seed in range(5):
        for prompt in ([1], [2], [1, 2], [2, 1], [0, 1], [1, 0]):
            keys.update(path_key(seed, prompt, index) for index in range(50))
    assert len(keys) == 5 * 6 * 50


def test_noise_looks_uniform_and_independent():
    """200 paths x 200 positions: mean, variance, and correlation between neighbours in both
    directions. Each of the four statistics lies within 4.5 of its standard errors; a false alarm
    would have a chance below 3e-5 in all, were the seed random."""
    keys = keys_of(200)
    u = torch.stack([uniform(keys, position) for position in range(200)])
    n = u.numel()
    assert u.min() >= 0
    assert u.max() < 1
    assert abs(u.mean() - 0.5) < 4.5 * math.sqrt(1 / 12 / n)
    assert abs(u.var() - 1 / 12) < 4.5 * math.sqrt(1 / 180 / n)
    for a, b in ((u[1:], u[:-1]), (u[:, 1:], u[:, :-1])):
        covariance = ((a - 0.5) * (b - 0.5)).mean()
        assert abs(covariance) < 4.5 / 12 / math.sqrt(a.numel())


def chi_square_p(counts, expected):
    """(p-value of Pearson's statistic, how many cells). Cells are joined from the rarest on until
    10 are expected in each."""
    cells = []
    count = 0.0
    share = 0.0
    for i in expected.argsort().tolist():
        count += counts[i].item()
        share += expected[i].item()
        if share >= 10:
            cells.append([count, share])
            count = 0.0
            share = 0.0
    cells[-1][0] += count
    cells[-1][1] += share
    statistic = sum((count - share) ** 2 / share for count, share in cells)
    freedom = torch.tensor((len(cells) - 1) / 2, dtype=torch.float64)
    half = torch.tensor(statistic / 2, dtype=torch.float64)
    return torch.special.gammaincc(freedom, half).item(), len(cells)


@pytest.mark.parametrize("setting", SETTINGS[:6], ids=str)
def test_drawn_tokens_follow_the_distribution(setting):
    """Chi-square over 20,000 draws (paths x positions). A false alarm would have a chance of 1e-4
    per setting, were the seed random; it is fixed. The test sees a temperature that is 10% off."""
    logits = 2 * normal(80, seed=5)
    probs = probabilities(logits, *setting)
    keys = keys_of(1000, seed=3)
    rows = probs.expand(1000, -1)
    tokens = torch.cat([draw(rows, uniform(keys, position)) for position in range(20)])
    counts = torch.bincount(tokens, minlength=80)
    possible = probs > 0
    assert (counts[~possible] == 0).all()
    p, cells = chi_square_p(counts[possible], 20000 * probs[possible].double())
    assert p > 1e-4
    assert cells > 1
    wrong = probabilities(logits, setting[0] * 1.1, *setting[1:])
    if torch.equal(wrong > 0, possible):
        p, _ = chi_square_p(counts[possible], 20000 * wrong[possible].double())
        assert p < 1e-4


def test_draw_never_takes_an_impossible_token():
    """At both ends of [0, 1), with zeros in front, behind and between, and sums unlike 1."""
    rows = torch.tensor([
        [0, 0, 0.25, 0, 0.75, 0, 0],
        [1.0, 0, 0, 0, 0, 0, 0],
        [0, 0, 0, 0, 0, 0, 1],
        [0, 1e-30, 0, 1 - 1e-7, 0, 1e-30, 0],
        [0, 0.3, 0.3, 0.3, 0, 0, 0]])
    smallest = torch.zeros(5, dtype=torch.float64)
    largest = torch.full((5,), LARGEST_NOISE, dtype=torch.float64)
    assert draw(rows, smallest).tolist() == [2, 0, 6, 1, 1]
    assert draw(rows, largest).tolist() == [4, 0, 6, 3, 3]
    around = torch.tensor([0.2499, 0.25, 0.2501, 0.9], dtype=torch.float64)
    assert draw(rows[:1].expand(4, -1), around).tolist() == [2, 4, 4, 4]


@pytest.mark.parametrize("noise", (0.0, LARGEST_NOISE))
def test_drawn_tokens_are_always_possible(noise):
    probs = probabilities(4 * normal(3200, 1000), 0.6, 40, 0.95)
    tokens = draw(probs, torch.full((3200,), noise, dtype=torch.float64))
    assert (probs.gather(1, tokens[:, None]) > 0).all()


def test_sampling_never_asks_the_device():
    """From logits to probabilities to tokens on meta: a number asked for on the host would raise.
    """
    logits = torch.zeros(7, 50, device="meta", dtype=torch.bfloat16)
    noise = uniform(torch.zeros(7, dtype=torch.int64, device="meta"), 5)
    tokens = draw(probabilities(logits, 0.6, 40, 0.95), noise)
    assert tokens.shape == (7,)
    assert tokens.dtype == torch.int64
    assert probabilities(logits, 0.0).shape == (7, 50)


# ------------------------------------------------------------------- a draw from a large vocabulary


@pytest.mark.parametrize("setting", SETTINGS + MORE_SETTINGS, ids=str)
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
    noise[:2] = torch.tensor([0.0, LARGEST_NOISE])
    expected = draw(probabilities(logits, *setting), noise)
    assert torch.equal(choose(logits, noise, Sampling(*setting)), expected)


DAMAGE = {
    "one nan": [math.nan],
    "one infinity": [math.inf],
    "infinities": [math.inf, math.inf, -math.inf],
    "nan and infinity": [math.nan, math.inf]}


@pytest.mark.parametrize("vocab", (50, 1500))
@pytest.mark.parametrize("setting", SETTINGS + [(0.0, 0, 1.0), (0.0, 40, 0.95)], ids=str)
@pytest.mark.parametrize("what", DAMAGE)
def test_a_row_of_nan_draws_no_token(vocab, setting, what):
    """It draws `vocab`, which is no token's id; the rows beside it draw what they always do."""
    logits = normal(3, vocab)
    noise = uniform(keys_of(3), 0)
    sampling = Sampling(*setting)
    expected = choose(logits, noise, sampling)
    damaged = logits.clone()
    damaged[1, 7:7 + len(DAMAGE[what])] = torch.tensor(DAMAGE[what])
    expected[1] = vocab
    assert torch.equal(choose(damaged, noise, sampling), expected)


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_a_row_without_any_possible_token_draws_none(setting):
    """Every logit is -inf."""
    logits = torch.full((1, 1500), -math.inf)
    assert choose(logits, torch.tensor([0.5]).double(), Sampling(*setting)).item() == 1500


@pytest.mark.parametrize("temperature", (0.0, 1.0))
def test_a_model_that_gives_nan_is_stopped_in_one_line(temperature):
    model = random_model("qwen2")
    model.lm_head.weight[17, 3] = math.nan
    message = "^logits: found NaN or infinity, expected finite"
    with pytest.raises(ValueError, match=message) as caught:
        generate(model, PROMPTS, n=2, max_new_tokens=5, temperature=temperature)
    assert "\n" not in str(caught.value)


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
            self.model, paths, rows, capacity, LIMIT, Sampling(**SAMPLING), eos_ids=self.eos)
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


def test_tokens_are_those_of_a_plain_loop(sampled):
    """No cache, no batch: the whole row through the model for each token, with the same noise. The
    sampler in six lines."""
    model = sampled.model
    for path in sampled.paths[3::9] + sampled.paths[4::9]:
        key = torch.tensor([signed(path_key(11, path.prompt_ids, path.index))])
        ids = []
        while len(ids) < LIMIT and not set(ids) & set(sampled.eos):
            logits = model.logits(model(torch.tensor([path.prompt_ids + ids]))[:, -1])
            probs = probabilities(logits, 1.0, 20, 0.95)
            ids.append(draw(probs, uniform(key, len(ids))).item())
        assert ids == path.ids


def test_greedy_needs_no_noise(sampled):
    (paths,) = sampled.generate(3, prompts=PROMPTS[:1], temperature=0.0, eos_ids=[])
    (others,) = sampled.generate(3, prompts=PROMPTS[:1], temperature=0.0, eos_ids=[], seed=99)
    assert tokens_of(paths) == tokens_of(others)
    assert paths[0].ids == paths[1].ids == paths[2].ids
    assert len(paths[0].ids) == LIMIT


def test_no_prompt_gives_no_paths(sampled):
    assert sampled.generate(3, prompts=[]) == []


def test_the_models_own_end_tokens_are_the_default(sampled):
    model = copy.copy(sampled.model)
    model.config = dataclasses.replace(sampled.model.config, eos_ids=tuple(sampled.eos))
    found = generate(model, PROMPTS, n=2, max_new_tokens=LIMIT, **SAMPLING)
    for group, expected in zip(found, sampled.groups):
        assert tokens_of(group) == tokens_of(expected[:2])


def test_a_path_has_the_public_fields():
    path = Path([1, 2], 0)
    assert path.ids == []
    assert path.score is None
    assert path.status == "running"
    assert path.prompt_ids == [1, 2]
    assert path.ids is not Path([1], 0).ids


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
    begin = sample.DecodeStep.__init__

    def grouped(self, model):
        begin(self, model)
        self.group = 8

    monkeypatch.setattr(sample.DecodeStep, "__init__", grouped)


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


@pytest.mark.parametrize("at_once", (1, 7, 16, 40, 8192))
def test_prefill_in_pieces_is_one_pass(sampled, passes, monkeypatch, at_once):
    """Several short prompts share a pass, a long one takes several; none is longer than allowed,
    and caches and hidden states are those of each prompt alone."""
    model = sampled.model
    prompts = [random_prompt(length) for length in (26, 3, 9, 1, 17, 2, 40)]
    monkeypatch.setattr(memory, "PREFILL_TOKENS", at_once)
    cache, hidden = prefill(model, prompts, extra=4)
    assert cache.lengths.tolist() == cache.counts.tolist() == [len(ids) for ids in prompts]
    assert cache.capacity == 44
    for rows, positions in passes:
        assert rows * positions <= at_once
    if at_once == 8192:
        assert passes == [(7, 40)]
    new = torch.arange(28).view(7, 4)
    after = model(new, cache=cache)
    for row, ids in enumerate(prompts):
        close(hidden[row], model(torch.tensor([ids]))[0, -1])
        close(after[row], model(torch.tensor([ids + new[row].tolist()]))[0, -4:])


def test_a_prompt_is_read_once_for_all_its_paths(sampled, monkeypatch):
    """However few rows there are; and no more prompts ahead than are held. Only a prompt whose
    paths begin partly before a reading and partly with it is read again."""
    read = []

    def noted(model, prompts, extra=0):
        read.append(len(prompts))
        return prefill(model, prompts, extra)

    monkeypatch.setattr(sample, "prefill", noted)
    prompts = [random_prompt(5 + i % 3, seed=i) for i in range(40)]
    for batch in (4, 6):
        read.clear()
        generate(sampled.model, prompts, n=2, max_new_tokens=3, batch=batch)
        assert max(read) <= sample.Prompts.AHEAD
        assert 40 <= sum(read) <= 40 + 2
        assert len(read) == 3


# ------------------------------------------------------------------------------------ stored paths

PROBLEMS = [Problem(name, f"What is {name}?", "1") for name in "abcde"]
STORED = Sampling(temperature=1.0, top_k=0, top_p=1.0, seed=0)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A tiny random model that ends some paths early, and a byte tokenizer."""
    raw = raw_config("qwen2", vocab_size=256, eos_token_id=[3, 50, 99])
    folder = write_checkpoint(tmp_path_factory.mktemp("tiny") / "it", raw)
    write_tokenizer(folder)
    return load(folder), Tokenizer(folder)


def store(pair, folder, problems=PROBLEMS, n=3, max_new_tokens=8, sampling=STORED, batch=6):
    """The records of sample_paths."""
    return sample_paths(*pair, problems, folder, n, max_new_tokens, sampling, batch)


def only_file(folder):
    (file,) = folder.iterdir()
    return file


def test_stored_paths_are_those_of_generate(pair, tmp_path):
    """Paths, prompts, answers and grades of each problem, in the order of the problems."""
    model, tokenizer = pair
    records = store(pair, tmp_path)
    lines = read_lines(only_file(tmp_path))
    for line in lines:
        assert line.pop("seal")
    assert lines == records
    assert [record["id"] for record in records] == list("abcde")
    for record, problem in zip(records, PROBLEMS):
        prompt = tokenizer.ask(problem)
        (paths,) = generate(model, [prompt], 3, 8, temperature=1.0, top_k=0, top_p=1.0)
        assert record["prompt_ids"] == prompt
        assert record["paths"] == [path.ids for path in paths]


class Counted:
    """A tokenizer that keeps of a path only how long it is."""
    format = "raw"

    def ask(self, problem):
        return list(problem.problem.encode())

    def completion(self, ids):
        return "x" * len(ids)


def test_stored_answers_are_graded(pair, tmp_path, monkeypatch):
    """Each path against its own problem's answer: 1 where the path has an odd number of tokens,
    else 2."""
    monkeypatch.setattr(stored, "extract_answer", lambda text, kind: str(2 - len(text) % 2))
    problems = [Problem("a", "What?", "1"), Problem("b", "Who?", "2")]
    records = store((pair[0], Counted()), tmp_path, problems, n=12)
    grades = set()
    for record, odd in zip(records, (1, 0)):
        lengths = [len(path) for path in record["paths"]]
        assert record["answers"] == [str(2 - length % 2) for length in lengths]
        assert record["right"] == [length % 2 == odd for length in lengths]
        grades.update(record["right"])
    assert grades == {True, False}


@pytest.mark.parametrize("after", range(1, 40, 5))
def test_interrupted_sampling_goes_on(pair, tmp_path, monkeypatch, after):
    """Killed at any decode step or between any two answers, again and again, and started again with
    another number of rows: the same bytes at the end."""
    store(pair, tmp_path / "whole")
    kills = 0
    while kills < 50:
        fuse = Fuse(after + 5 * kills)  # longer each time, or no problem would ever be finished
        with monkeypatch.context() as patch:
            patch.setattr(Batch, "settle", fuse(Batch.settle))
            patch.setattr(stored, "extract_answer", fuse(stored.extract_answer))
            try:
                store(pair, tmp_path / "killed", batch=(6, 1, 4, None)[kills % 4])
                break
            except Killed:
                kills += 1
    assert kills > 0
    whole = only_file(tmp_path / "whole").read_bytes()
    assert only_file(tmp_path / "killed").read_bytes() == whole


def test_a_finished_problem_is_on_disk_before_the_others_are(pair, tmp_path, monkeypatch):
    """A record at a time: what is stored when the run is killed is not sampled again."""
    fuse = Fuse(9)  # the third problem's answers, after three of each before it
    with monkeypatch.context() as patch:
        patch.setattr(stored, "extract_answer", fuse(stored.extract_answer))
        with pytest.raises(Killed):
            store(pair, tmp_path, batch=3)
    found = read_lines(only_file(tmp_path))
    assert len(found) == 3
    asked = []
    sample_all = stored.sample_all

    def noted(model, prompts, *rest, **more):
        asked.extend(prompts)
        return sample_all(model, prompts, *rest, **more)

    monkeypatch.setattr(stored, "sample_all", noted)
    records = store(pair, tmp_path, batch=3)
    known = [record["prompt_ids"] for record in found]
    prompts = [record["prompt_ids"] for record in records]
    assert asked == [prompt for prompt in prompts if prompt not in known]


@pytest.mark.parametrize("count", (4, 5))
def test_finished_paths_are_read_and_not_sampled(pair, tmp_path, monkeypatch, count):
    """A second run on the same folder decodes nothing and leaves the file as it is."""
    records = store(pair, tmp_path, PROBLEMS[:count])
    content = only_file(tmp_path).read_bytes()
    monkeypatch.setattr(sample, "Batch", None)
    assert store(pair, tmp_path, PROBLEMS[:count]) == records
    assert only_file(tmp_path).read_bytes() == content


def test_one_limit_for_all(pair, tmp_path):
    """Where the context gives the limit, a problem's paths do not depend on what else is sampled.
    """
    problems = [Problem(str(count), "?" * count, "1") for count in (480, 470, 490)]
    records = store(pair, tmp_path, problems, max_new_tokens=None)
    lengths = [len(path) for record in records for path in record["paths"]]
    assert max(lengths) == 512 - 490


CHANGED_SAMPLING = {
    "temperature": dataclasses.replace(STORED, temperature=0.5),
    "top_k": dataclasses.replace(STORED, top_k=9),
    "top_p": dataclasses.replace(STORED, top_p=0.5),
    "seed": dataclasses.replace(STORED, seed=1)}


@pytest.mark.parametrize("change", (
    {"n": 2}, {"max_new_tokens": 7}, *({"sampling": value} for value in CHANGED_SAMPLING.values()),
    {"problems": [Problem("a", "Another?", "1")]},
    {"problems": [Problem("a", PROBLEMS[0].problem, "2")]},
    {"problems": [Problem("a", PROBLEMS[0].problem, "A", {"A": "it"})]}), ids=str)
def test_other_settings_make_another_file(pair, tmp_path, change):
    """A setting left out of the name would hand out paths that were sampled otherwise, or graded
    against another answer."""
    store(pair, tmp_path, PROBLEMS[:1])
    store(pair, tmp_path, **{"problems": PROBLEMS[:1]} | change)
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("change", ({"rope_theta": 5000.0}, {"seed": 1}, {"eos": (1, 2)}), ids=str)
def test_another_model_makes_another_file(pair, tmp_path, change):
    """Another config, other weights, or other end tokens."""
    model = random_model(
        "qwen2", vocab_size=256, seed=change.get("seed", 0),
        rope_theta=change.get("rope_theta", 10000.0))
    model.config.eos_ids = change.get("eos", pair[0].config.eos_ids)
    store(pair, tmp_path, PROBLEMS[:1])
    store((model, pair[1]), tmp_path, PROBLEMS[:1])
    assert len(list(tmp_path.iterdir())) == 2


def test_another_dtype_makes_another_file(pair, tmp_path):
    """The same weights, computed with in other precision, give other paths."""
    half = copy.deepcopy(pair[0]).bfloat16()
    store((half, pair[1]), tmp_path, PROBLEMS[:1])
    store((copy.deepcopy(half).float(), pair[1]), tmp_path, PROBLEMS[:1])
    assert len(list(tmp_path.iterdir())) == 2


def test_the_same_model_finds_its_file(pair, tmp_path):
    """Loaded again it is the same model, and the number of rows at a time is no part of the name.
    """
    again = random_model("qwen2", vocab_size=256)
    again.config.eos_ids = pair[0].config.eos_ids
    store(pair, tmp_path, PROBLEMS[:1], batch=2)
    store((again, pair[1]), tmp_path, PROBLEMS[:1], batch=3)
    assert len(list(tmp_path.iterdir())) == 1


def change_token(record):
    record["paths"][0][0] = (record["paths"][0][0] + 1) % 256


def change_grade(record):
    record["right"][0] = not record["right"][0]


def change_answer(record):
    record["answers"][1] = "1"


def change_id(record):
    record["id"] = "z"


def drop_seal(record):
    del record["seal"]


def shorten_prompt(record):
    record["prompt_ids"].pop()


def drop_path(record):
    record["paths"].pop()


@pytest.mark.parametrize("number, edit", (
    (2, change_token), (1, change_grade), (3, change_answer), (1, change_id), (4, drop_seal),
    (1, shorten_prompt), (5, drop_path)))
def test_an_edited_line_is_refused(pair, tmp_path, number, edit):
    """By file and line: a token, a grade, an answer, an id, a prompt, a path, a seal."""
    store(pair, tmp_path)
    file = only_file(tmp_path)
    records = read_lines(file)
    edit(records[number - 1])
    write_lines(file, records)
    content = file.read_bytes()
    with pytest.raises(ValueError) as caught:
        store(pair, tmp_path)
    assert str(caught.value).startswith(f"{file}:{number}: found an edited line")
    assert "\n" not in str(caught.value)
    assert file.read_bytes() == content


def test_a_line_too_many_is_refused(pair, tmp_path):
    store(pair, tmp_path)
    file = only_file(tmp_path)
    records = read_lines(file)
    write_lines(file, records + records[-1:])
    with pytest.raises(ValueError, match=f"{file}:6: found a record for the second time"):
        store(pair, tmp_path)
    file.write_text("{}\n" + file.read_text())
    with pytest.raises(ValueError, match=f"{file}:1: found an edited line"):
        store(pair, tmp_path)


def test_lines_in_any_order_and_a_lost_one_are_mended(pair, tmp_path):
    """Records are finished in any order: a file that is not in order, or lacks one, is completed.
    """
    records = store(pair, tmp_path)
    file = only_file(tmp_path)
    content = file.read_bytes()
    lines = content.splitlines(True)
    file.write_bytes(b"".join([lines[4], lines[1], lines[0], lines[3]]))
    assert store(pair, tmp_path) == records
    assert file.read_bytes() == content


def test_another_models_file_is_refused(pair, tmp_path):
    """Two models of one config and one tokenizer, the file of one under the name of the other's."""
    other = random_model("qwen2", seed=1, vocab_size=256)
    other.config.eos_ids = pair[0].config.eos_ids
    store(pair, tmp_path / "a")
    store((other, pair[1]), tmp_path / "b")
    ours = only_file(tmp_path / "a")
    shutil.copy(only_file(tmp_path / "b"), ours)
    with pytest.raises(ValueError, match=f"{ours}:1: found an edited line or another run's"):
        store(pair, tmp_path / "a")


def test_a_record_is_json_of_one_line(pair, tmp_path):
    """What is read back is what was stored, whatever characters a problem has."""
    problem = Problem("ä\u2028\n", "Zwei\u2028und\nzwei?", "4")
    records = store(pair, tmp_path, [problem])
    (line,) = only_file(tmp_path).read_bytes().splitlines()
    assert json.loads(line)["id"] == records[0]["id"] == problem.id
    assert store(pair, tmp_path, [problem]) == records
