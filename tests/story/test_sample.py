"""The sampler: the distribution, the noise, that a path's tokens are its own (invariant 5), that
work is counted (6), prompts read once."""
import copy
import dataclasses
import math

import pytest
import torch
from helpers import KINDS, NAMES, close, golden, random_model, random_prompt

from plumbing import memory
from sample import (
    Batch, Path, Sampling, draw, generate, mix, path_key, prefill, probabilities, uniform)

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


# ----------------------------------------------------------------------------- paths in plain steps

PROMPTS = [random_prompt(length) for length in (9, 3, 26)]
SAMPLING = {"temperature": 1.0, "top_k": 20, "top_p": 0.95, "seed": 11}
LIMIT = 30
ENDS = (3, 11, 30)  # some paths end early, others do not


@pytest.fixture(scope="module", params=KINDS)
def model(request):
    return random_model(request.param)


def sampled(model, n=5, prompts=PROMPTS, **changes):
    settings = SAMPLING | {"max_new_tokens": LIMIT, "eos_ids": ENDS} | changes
    return generate(model, prompts, n, **settings)


def tokens_of(groups):
    return [[path.ids for path in group] for group in groups]


def test_tokens_are_those_of_a_plain_loop(model):
    """No cache, no batch: the whole row through the model for each token, with the same noise. The
    sampler in six lines."""
    for path in sum(sampled(model), []):
        key = torch.tensor([signed(path_key(11, path.prompt_ids, path.index))])
        ids = []
        while len(ids) < LIMIT and not set(ids) & set(ENDS):
            logits = model.logits(model(torch.tensor([path.prompt_ids + ids]))[:, -1])
            probs = probabilities(logits, 1.0, 20, 0.95)
            ids.append(draw(probs, uniform(key, len(ids))).item())
        assert ids == path.ids


def test_a_path_says_what_it_is(model):
    groups = sampled(model)
    assert {path.status for path in sum(groups, [])} == {"eos", "length"}
    for prompt, group in zip(PROMPTS, groups):
        for index, path in enumerate(group):
            assert path.prompt_ids == prompt
            assert path.index == index
            assert path.score is None
            assert not set(path.ids[:-1]) & set(ENDS)
            if path.ids[-1] in ENDS:
                assert path.status == "eos"
            else:
                assert path.status == "length"
                assert len(path.ids) == LIMIT


def test_tokens_depend_on_the_path_alone(model):
    """Not on how many there are, on other prompts, on who ends, or on the limit."""
    known = tokens_of(sampled(model))
    assert tokens_of(sampled(model, 3)) == [group[:3] for group in known]
    assert tokens_of(sampled(model, prompts=PROMPTS[::-1])) == known[::-1]
    for longer in (sampled(model, eos_ids=()), sampled(model, max_new_tokens=50)):
        for path, short in zip(sum(tokens_of(longer), []), sum(known, [])):
            assert path[:len(short)] == short
    other = sum(tokens_of(sampled(model, seed=12)), [])
    assert sum(ids != short for ids, short in zip(other, sum(known, []))) > 7


def test_greedy_needs_no_noise(model):
    greedy = {"prompts": PROMPTS[:1], "temperature": 0.0, "eos_ids": ()}
    (paths,) = tokens_of(sampled(model, 3, **greedy))
    (others,) = tokens_of(sampled(model, 3, seed=99, **greedy))
    assert paths == others
    assert paths[0] == paths[1] == paths[2]
    assert len(paths[0]) == LIMIT


def test_no_prompt_gives_no_paths(model):
    assert sampled(model, prompts=[]) == []


def test_the_models_own_end_tokens_are_the_default(model):
    own = copy.copy(model)
    own.config = dataclasses.replace(model.config, eos_ids=ENDS)
    found = generate(own, PROMPTS, n=2, max_new_tokens=LIMIT, **SAMPLING)
    assert tokens_of(found) == tokens_of(sampled(model, 2))


def test_a_path_has_the_public_fields():
    path = Path([1, 2], 0)
    assert path.ids == []
    assert path.score is None
    assert path.status == "running"
    assert path.prompt_ids == [1, 2]
    assert path.ids is not Path([1], 0).ids


@pytest.mark.parametrize("temperature", (0.0, 1.0))
def test_a_model_that_gives_nan_is_stopped_in_one_line(temperature):
    model = random_model("qwen2")
    model.lm_head.weight[17, 3] = math.nan
    message = "^logits: found NaN or infinity, expected finite"
    with pytest.raises(ValueError, match=message) as caught:
        generate(model, PROMPTS, n=2, max_new_tokens=5, temperature=temperature)
    assert "\n" not in str(caught.value)


# ---------------------------------------------------------------------------- work done is counted


@pytest.fixture
def passes(model, monkeypatch):
    """Shapes (rows, positions) of every pass through the model, in order."""
    seen = []
    run = model.run

    def noted(ids, *rest, **more):
        seen.append(tuple(ids.shape[:2]))
        return run(ids, *rest, **more)

    monkeypatch.setattr(model, "run", noted)
    return seen


def new_batch(model, n=9, capacity=70):
    """(a Batch of n new paths, the paths)."""
    paths = [Path(PROMPTS[0], index) for index in range(n)]
    return Batch(model, paths, capacity, LIMIT, Sampling(**SAMPLING), eos_ids=ENDS), paths


def test_decoded_is_what_was_decoded(model, passes):
    """No row is computed after its path has ended, and every row that was computed is counted. The
    prompt is read once and not once for each path."""
    batch, paths = new_batch(model)
    assert passes == [(1, 9)]
    batch.decode(LIMIT)
    assert batch.decoded == sum(len(path.ids) for path in paths)
    computed = []
    for step in range(LIMIT):
        running = sum(len(path.ids) > step for path in paths)
        if running:
            computed.append((running, 1))
    assert passes[1:] == computed


def test_a_stopped_batch_goes_on(model):
    """Decoded in parts, as Launch and Resume do: the tokens of one run, and live rows = running
    paths at each stop."""
    batch, paths = new_batch(model)
    for until in (4, 5, 21, LIMIT):
        batch.decode(until)
        running = [path for path in paths if path.status == "running"]
        assert [id(path) for path in batch.live] == [id(path) for path in running]
        assert batch.cache.rows == len(batch.live) == len(batch.keys)
        assert all(len(path.ids) == until for path in batch.live)
        batch.settle()
        lengths = [len(path.prompt_ids) + len(path.ids) for path in batch.live]
        assert batch.cache.lengths.tolist() == lengths
    (whole,) = sampled(model, 9, prompts=PROMPTS[:1])
    assert [path.ids for path in paths] == [path.ids for path in whole]


# ------------------------------------------------------------------------------ prompts are read


@pytest.mark.parametrize("at_once", (1, 7, 16, 40, 8192))
def test_prefill_in_pieces_is_one_pass(model, passes, monkeypatch, at_once):
    """Several short prompts share a pass, a long one takes several; none is longer than allowed,
    and caches and hidden states are those of each prompt alone."""
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
