"""The sampler: the distribution, the noise, that a path's tokens are its own (invariant 5), and that work is counted (6)."""
import dataclasses
import math

import pytest
import torch
from helpers import GOLDEN, KINDS, NAMES, close, golden, random_ids, random_model, write_tokenizer

import sample
from sample import Batch, Path, Tokenizer, draw, generate, mix, path_key, probabilities, uniform

SETTINGS = [(0.6, 40, 0.95), (1.0, 0, 0.9), (0.8, 5, 1.0), (1.3, 0, 0.5), (1.0, 0, 1.0), (2.0, 7, 0.3), (0.25, 1, 1.0)]
BITS = (1 << 64) - 1


# ------------------------------------------------------------------------------------------------------ the distribution


@pytest.mark.parametrize("name", NAMES)
def test_golden_probabilities(name):
    """Within 1e-6 and the kept set exact: catches another order of the three, top-p on probabilities before top-k."""
    tensors, info = golden(name)
    compared = 0
    for key, setting in info["sampling"].items():
        found = probabilities(tensors["sampling.logits"], *(setting[k] for k in ("temperature", "top_k", "top_p")))
        assert (found > 0).sum() == setting["kept"]
        if f"sampling.{key}.probs" in tensors:
            expected = tensors[f"sampling.{key}.probs"]
            assert torch.equal(found > 0, expected > 0)
            close(found, expected, 1e-6)
            compared += 1
    assert compared


def slow_probabilities(logits, temperature, top_k, top_p):
    """One row, by the definition, in Python floats; a tie with the last one kept stays."""
    logits = logits.double().tolist()
    if temperature == 0:
        return [float(i == logits.index(max(logits))) for i in range(len(logits))]
    ranked = sorted(logits, reverse=True)
    kept = [x for x in ranked if top_k == 0 or x >= ranked[min(top_k, len(ranked)) - 1]]
    weights = [math.exp((x - ranked[0]) / temperature) for x in kept]
    total, mass, last = sum(weights), 0.0, kept[-1]
    for x, weight in zip(kept, weights):
        mass += weight
        if top_p < 1 and mass >= top_p * total:
            last = x
            break
    weights = [math.exp((x - ranked[0]) / temperature) if x >= last else 0.0 for x in logits]
    return [weight / sum(weights) for weight in weights]


@pytest.mark.parametrize("setting", SETTINGS + [(0.0, 0, 1.0), (0.6, 1000, 0.95), (50.0, 20, 0.99), (1e-3, 0, 0.9)], ids=str)
def test_probabilities_by_the_definition(setting):
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(4, 5, 60, generator=generator)
    logits[:2] = logits[:2].round()  # many ties
    logits[2, :, ::3] = float("-inf")
    found = probabilities(logits, *setting)
    assert found.shape == logits.shape and found.dtype == torch.float32
    expected = torch.tensor([[slow_probabilities(row, *setting) for row in block] for block in logits])
    assert torch.equal(found > 0, expected > 1e-38)
    close(found, expected, 1e-6)
    close(probabilities(logits[3, 2], *setting), found[3, 2], 1e-7)


def test_ties_stay():
    """At the k-th place, at the top-p threshold, and in both at once: no token is preferred for its number."""
    logits = torch.tensor([1.0, 3.0, 1.0, 1.0, -2.0])
    assert (probabilities(logits, 1.0, 2, 1.0) > 0).tolist() == [True, True, True, True, False]
    assert (probabilities(logits, 1.0, 0, 0.8) > 0).tolist() == [True, True, True, True, False]
    assert (probabilities(logits, 1.0, 0, 0.7) > 0).tolist() == [False, True, False, False, False]
    assert (probabilities(torch.zeros(6), 1.0, 3, 0.1) == 1 / 6).all()
    assert probabilities(torch.tensor([0.0, 2.0, 2.0]), 0.0).tolist() == [0, 1, 0]  # greedy takes the first


def test_what_probabilities_does_with_its_input():
    """Catches arithmetic in bfloat16, an argument changed in place, nan out of -inf or large logits, a sum unlike 1."""
    logits = 5 * torch.randn(3, 500, generator=torch.Generator().manual_seed(1))
    half, before = logits.bfloat16(), logits.clone()
    for setting in SETTINGS:
        found = probabilities(logits, *setting)
        assert torch.equal(logits, before)
        assert torch.equal(probabilities(half, *setting), probabilities(half.float(), *setting))
        close(found.double().sum(-1), torch.ones(3, dtype=torch.float64), 1e-5)
        extreme = probabilities(torch.tensor([1e30, -1e30, float("-inf"), 1e30]), *setting)
        assert extreme.tolist() == ([0.5, 0, 0, 0.5])
    close(probabilities(logits, 1e6, 0, 1.0), torch.full((3, 500), 1 / 500), 1e-6)


@pytest.mark.parametrize("setting", [(-0.1, 0, 1.0), (math.nan, 0, 1.0), (math.inf, 0, 1.0), (1.0, -1, 1.0), (1.0, 0, 0.0),
                                     (1.0, 0, 1.1), (1.0, 0, -0.5), (1.0, 0, math.nan)], ids=str)
def test_settings_that_describe_no_distribution(setting):
    with pytest.raises(ValueError, match="expected"):
        probabilities(torch.zeros(5), *setting)


# ------------------------------------------------------------------------------------------------------------- the noise


def splitmix(state):
    """splitmix64 (Steele, Lea, Flood 2014), written down again."""
    z = (state + 0x9E3779B97F4A7C15) % 2 ** 64
    z = (z ^ (z // 2 ** 30)) * 0xBF58476D1CE4E5B9 % 2 ** 64
    z = (z ^ (z // 2 ** 27)) * 0x94D049BB133111EB % 2 ** 64
    return z ^ (z // 2 ** 31)


def signed(key):
    return key - 2 ** 64 if key >= 2 ** 63 else key


def keys_of(count, seed=0, prompt=(1, 2, 3)):
    return torch.tensor([signed(path_key(seed, prompt, index)) for index in range(count)])


def test_mix_is_splitmix64():
    """Published outputs of the generator seeded with 1234567, and this file's own version."""
    known = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821]
    assert [mix(1234567 + i * 0x9E3779B97F4A7C15 & BITS) for i in range(5)] == known
    for state in (0, 1, 2 ** 63, 2 ** 64 - 1, 0x123456789ABCDEF0):
        assert mix(state) == splitmix(state)


def test_uniform_is_the_hash_of_key_and_position():
    """Catches the arithmetic shift of int64, and any use of state: the same for rows in another order or alone."""
    keys = [path_key(seed, prompt, index) for seed in (0, 7, 2 ** 70) for prompt in ([5], [5, 6], list(range(300)))
            for index in (0, 1, 63)]
    for position in (0, 1, 2047, 131071):
        found = uniform(torch.tensor([signed(key) for key in keys]), position)
        assert found.dtype == torch.float64
        assert found.tolist() == [splitmix(key ^ position) // 2 ** 11 / 2 ** 53 for key in keys]
        assert uniform(torch.tensor([signed(keys[4])]), position).item() == found[4].item()


def test_path_key_folds_seed_prompt_and_index():
    state = splitmix(42)
    for token in (9, 8, 200000):
        state = splitmix(state ^ token)
    assert path_key(42, [9, 8, 200000], 17) == splitmix(state ^ 17)
    keys = {path_key(seed, prompt, index) for seed in range(5) for prompt in ([1], [2], [1, 2], [2, 1], [0, 1], [1, 0])
            for index in range(50)}
    assert len(keys) == 5 * 6 * 50


def test_noise_looks_uniform_and_independent():
    """200 paths x 200 positions: mean, variance, and correlation between neighbours in both directions.

    Each of the four statistics is within 4.5 of its standard errors; false alarm below 3e-5 in all, were the seed random.
    """
    keys = keys_of(200)
    u = torch.stack([uniform(keys, position) for position in range(200)])
    n = u.numel()
    assert 0 <= u.min() and u.max() < 1
    assert abs(u.mean() - 0.5) < 4.5 * math.sqrt(1 / 12 / n)
    assert abs(u.var() - 1 / 12) < 4.5 * math.sqrt(1 / 180 / n)
    for a, b in ((u[1:], u[:-1]), (u[:, 1:], u[:, :-1])):
        assert abs(((a - 0.5) * (b - 0.5)).mean()) < 4.5 / 12 / math.sqrt(a.numel())


def chi_square_p(counts, expected):
    """P-value of Pearson's statistic; cells are joined from the rarest on until 10 are expected in each."""
    order = expected.argsort()
    cells, c, e = [], 0.0, 0.0
    for i in order.tolist():
        c, e = c + counts[i].item(), e + expected[i].item()
        if e >= 10:
            cells.append((c, e))
            c = e = 0.0
    cells[-1] = cells[-1][0] + c, cells[-1][1] + e
    statistic = sum((c - e) ** 2 / e for c, e in cells)
    half = torch.tensor([(len(cells) - 1) / 2, statistic / 2], dtype=torch.float64)
    return torch.special.gammaincc(half[0], half[1]).item(), len(cells)


@pytest.mark.parametrize("setting", SETTINGS[:6], ids=str)
def test_drawn_tokens_follow_the_distribution(setting):
    """Chi-square over 20,000 draws (paths x positions). False alarm 1e-4 per setting, were the seed random; it is fixed."""
    logits = 2 * torch.randn(80, generator=torch.Generator().manual_seed(5))
    probs = probabilities(logits, *setting)
    keys = keys_of(1000, seed=3)
    tokens = torch.cat([draw(probs.expand(1000, -1), uniform(keys, position)) for position in range(20)])
    counts = torch.bincount(tokens, minlength=80)
    assert (counts[probs == 0] == 0).all()
    p, cells = chi_square_p(counts[probs > 0], 20000 * probs[probs > 0].double())
    assert p > 1e-4 and cells > 1
    wrong = probabilities(logits, setting[0] * 1.1, *setting[1:])  # the test must be able to see a temperature 10% off
    if torch.equal(wrong > 0, probs > 0):
        assert chi_square_p(counts[probs > 0], 20000 * wrong[probs > 0].double())[0] < 1e-4


def test_draw_never_takes_an_impossible_token():
    """At both ends of [0, 1), with zeros in front, behind and between, and sums unlike 1."""
    largest = math.nextafter(1.0, 0.0)
    rows = torch.tensor([[0, 0, 0.25, 0, 0.75, 0, 0], [1.0, 0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0, 1],
                         [0, 1e-30, 0, 1 - 1e-7, 0, 1e-30, 0], [0, 0.3, 0.3, 0.3, 0, 0, 0]])
    assert draw(rows, torch.zeros(5, dtype=torch.float64)).tolist() == [2, 0, 6, 1, 1]
    assert draw(rows, torch.full((5,), largest, dtype=torch.float64)).tolist() == [4, 0, 6, 3, 3]
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        probs = probabilities(4 * torch.randn(64, 1000, generator=generator), 0.6, 40, 0.95)
        for noise in (0.0, largest):
            tokens = draw(probs, torch.full((64,), noise, dtype=torch.float64))
            assert (probs.gather(1, tokens[:, None]) > 0).all()
    quarter = draw(rows[:1].expand(4, -1), torch.tensor([0.2499, 0.25, 0.2501, 0.9], dtype=torch.float64))
    assert quarter.tolist() == [2, 4, 4, 4]


def test_sampling_never_asks_the_device():
    """From logits to tokens on meta: a number asked for on the host would raise."""
    probs = probabilities(torch.zeros(7, 50, device="meta", dtype=torch.bfloat16), 0.6, 40, 0.95)
    tokens = draw(probs, uniform(torch.zeros(7, dtype=torch.int64, device="meta"), 5))
    assert tokens.shape == (7,) and tokens.dtype == torch.int64
    assert probabilities(torch.zeros(7, 50, device="meta"), 0.0).shape == (7, 50)


# -------------------------------------------------------------------------------------------------- paths are their own

PROMPTS = [random_ids(length, seed=length).tolist() for length in (9, 3, 26)]
SAMPLING = {"temperature": 1.0, "top_k": 20, "top_p": 0.95, "seed": 11, "max_new_tokens": 30}


@pytest.fixture(scope="module", params=KINDS)
def sampled(request):
    """(model, end tokens that about half of the paths meet, 9 paths of each prompt sampled in one batch)."""
    model = random_model(request.param)
    free = generate(model, PROMPTS, n=3, **SAMPLING)
    drawn = torch.bincount(torch.tensor([token for group in free for path in group for token in path.ids]))
    eos = drawn.argsort(descending=True)[14:16].tolist()
    return model, eos, generate(model, PROMPTS, n=9, eos_ids=eos, **SAMPLING)


def tokens_of(paths):
    return [path.ids for path in paths]


def test_the_batch_is_what_the_invariants_need(sampled):
    """Not a property: that rows end early at different steps, some do not, and paths differ, so the tests below can fail."""
    _, eos, groups = sampled
    paths = [path for group in groups for path in group]
    assert 4 < sum(path.status == "eos" for path in paths) < 23 and len({len(path.ids) for path in paths}) > 5
    assert len({tuple(path.ids) for path in paths}) > 24  # two may both end at once
    for path, (prompt, index) in zip(paths, ((prompt, index) for prompt in PROMPTS for index in range(9))):
        assert path.prompt_ids == prompt and path.index == index and path.score is None
        assert not set(path.ids[:-1]) & set(eos)
        assert path.status == ("eos" if path.ids[-1] in eos else "length") and (path.status == "eos" or len(path.ids) == 30)


@pytest.mark.parametrize("change", ({"n": 3}, {"batch": 4}, {"batch": 1}, {"batch": 26}, {"n": 3, "batch": 5}), ids=str)
def test_tokens_depend_on_the_path_alone(sampled, change):
    """Invariant 5: fewer paths, waves of some rows, one row at a time: path i of a prompt is the same, token for token."""
    model, eos, groups = sampled
    other = generate(model, PROMPTS, eos_ids=eos, **{"n": 9, **SAMPLING, **change})
    for group, expected in zip(other, groups):
        assert tokens_of(group) == tokens_of(expected[:change.get("n", 9)])


def test_tokens_do_not_depend_on_the_other_prompts(sampled):
    """Alone, in another order, beside itself: the same tokens."""
    model, eos, groups = sampled
    alone = generate(model, [PROMPTS[1]], n=9, eos_ids=eos, **SAMPLING)
    assert tokens_of(alone[0]) == tokens_of(groups[1])
    turned = generate(model, PROMPTS[::-1] + [PROMPTS[0]], n=5, eos_ids=eos, **SAMPLING)
    for group, r in zip(turned, (2, 1, 0, 0)):
        assert tokens_of(group) == tokens_of(groups[r][:5])


def test_tokens_do_not_depend_on_who_ends(sampled):
    """Without end tokens the paths go on, and what came before is unchanged: catches rows mixed up as others leave."""
    model, eos, groups = sampled
    free = generate(model, PROMPTS, n=9, eos_ids=[], **SAMPLING)
    for group, expected in zip(free, groups):
        for path, short in zip(group, expected):
            assert path.ids[:len(short.ids)] == short.ids and len(path.ids) == 30 and path.status == "length"


def test_a_longer_limit_only_goes_on(sampled):
    model, eos, groups = sampled
    longer = generate(model, PROMPTS, n=4, eos_ids=eos, **SAMPLING | {"max_new_tokens": 50})
    for group, expected in zip(longer, groups):
        for path, short in zip(group, expected):
            assert path.ids[:len(short.ids)] == short.ids and (short.status != "eos" or len(path.ids) == len(short.ids))


def test_seed_and_index_matter(sampled):
    model, eos, groups = sampled
    other = generate(model, PROMPTS, n=9, eos_ids=eos, **SAMPLING | {"seed": 12})
    assert sum(a.ids != b.ids for one, two in zip(other, groups) for a, b in zip(one, two)) > 24


def test_tokens_are_those_of_a_plain_loop(sampled):
    """No cache, no batch: the whole row through the model for each token, the same noise. The sampler in six lines."""
    model, eos, groups = sampled
    for prompt, group in zip(PROMPTS, groups):
        for path in group[3:5]:
            ids, key = list(prompt), torch.tensor([signed(path_key(11, prompt, path.index))])
            while len(ids) < len(prompt) + 30 and not set(ids[len(prompt):]) & set(eos):
                probs = probabilities(model.logits(model(torch.tensor([ids]))[:, -1]), 1.0, 20, 0.95)
                ids.append(draw(probs, uniform(key, len(ids) - len(prompt))).item())
            assert ids[len(prompt):] == path.ids


def test_greedy_needs_no_noise(sampled):
    model, _, _ = sampled
    greedy = SAMPLING | {"temperature": 0.0}
    (paths,) = generate(model, PROMPTS[:1], n=3, **greedy)
    assert tokens_of(paths) == tokens_of(generate(model, PROMPTS[:1], n=3, **greedy | {"seed": 99})[0])
    assert paths[0].ids == paths[1].ids == paths[2].ids and len(paths[0].ids) == 30


# --------------------------------------------------------------------------------------------------- work done, counted


def new_batch(model, eos, n=9, capacity=70):
    paths = [Path(prompt, index) for prompt in PROMPTS for index in range(n)]
    settings = {key: value for key, value in SAMPLING.items() if key != "max_new_tokens"}
    return Batch(model, paths, capacity, eos_ids=eos, **settings), paths


def test_decoded_is_what_was_decoded(sampled):
    """Invariant 6: no row is computed after it has ended, and every row that was computed is counted."""
    model, eos, groups = sampled
    rows, run = [], model.run
    model.run = lambda ids, *rest: (rows.append(ids.numel()), run(ids, *rest))[1]
    try:
        batch, paths = new_batch(model, eos)
        prefilled = len(rows)
        batch.decode(30)
    finally:
        del model.run
    assert prefilled == 1 and rows[0] == 3 * 26  # each prompt once, not once for each path
    assert batch.decoded == sum(len(path.ids) for path in paths)
    assert tokens_of(paths) == [path.ids for group in groups for path in group]
    computed = [sum(len(path.ids) > step for path in paths) for step in range(1, 30)]
    assert rows[1:] == [count for count in computed if count]


def test_a_stopped_batch_goes_on(sampled):
    """Decode in three parts, as Launch and Resume do: the tokens of one run, and live rows = running paths at each stop."""
    model, eos, groups = sampled
    batch, paths = new_batch(model, eos)
    for until in (4, 5, 21, 30):
        batch.decode(until)
        assert sorted(map(id, batch.live)) == sorted(id(path) for path in paths if path.status == "running")
        assert batch.cache.rows == len(batch.live) == len(batch.keys)
        assert all(len(path.ids) == until for path in batch.live) and batch.steps <= until
        batch.settle()
        lengths = [len(path.prompt_ids) + len(path.ids) for path in batch.live]
        assert batch.cache.lengths.tolist() == lengths
    assert tokens_of(paths) == [path.ids for group in groups for path in group]


def test_retained_rows_alone_are_in_the_cache(sampled):
    """Prune as Check does, with tokens waiting and with none: kept rows stay themselves, the others cost nothing more."""
    model, eos, groups = sampled
    expected = [path.ids for group in groups for path in group]
    for settled in (False, True):
        batch, paths = new_batch(model, eos)
        batch.decode(6)
        if settled:
            batch.settle()
        count, before = len(batch.live), batch.decoded
        rows = [row for row in range(count) if row % 3 == 1 or row == count - 1]
        kept = {id(batch.live[row]) for row in rows}
        batch.retain(rows)
        assert {id(path) for path in batch.live} == kept and batch.cache.rows == len(rows)
        batch.resize(60)
        assert batch.cache.capacity == 60 and all(len(buffer) == len(rows) for buffer in batch.cache.keys)
        batch.decode(30)
        for path, ids in zip(paths, expected):
            assert path.ids == (ids if id(path) in kept or len(ids) <= 6 and path.status == "eos" else ids[:6])
        assert batch.decoded == sum(len(path.ids) for path in paths)
        assert batch.decoded - before == sum(len(path.ids) - 6 for path in paths if id(path) in kept)


def test_each_path_is_reported_once_as_it_ends(sampled):
    model, eos, groups = sampled

    class Bar:
        """What tqdm would be told."""
        total, n = 9 * 3 * 30, 0

        def update(self, count):
            self.n += count

    seen, bar = [], Bar()
    generate(model, PROMPTS, n=9, eos_ids=eos, bar=bar, batch=10, on_end=seen.append, **SAMPLING)
    assert len({id(path) for path in seen}) == len(seen) == 27 and all(path.status in ("eos", "length") for path in seen)
    assert bar.total == bar.n == sum(len(path.ids) for group in groups for path in group)


def test_the_models_own_end_tokens_are_the_default(sampled):
    model, eos, groups = sampled
    model.config.eos_ids = tuple(eos)
    try:
        found = generate(model, PROMPTS, n=2, **SAMPLING)
    finally:
        model.config.eos_ids = ()
    assert [tokens_of(group) for group in found] == [tokens_of(group[:2]) for group in groups]


def test_a_path_has_the_public_fields():
    fields = {field.name for field in dataclasses.fields(Path)}
    assert {"prompt_ids", "ids", "score", "status"} <= fields
    path = Path([1, 2], 0)
    assert path.ids == [] and path.score is None and path.status == "running" and path.ids is not Path([1], 0).ids


# ------------------------------------------------------------------------------------------------------ text and tokens

BOS, USER, ASSISTANT = "<\uff5cbegin\u2581of\u2581sentence\uff5c>", "<\uff5cUser\uff5c>", "<\uff5cAssistant\uff5c>"
R1 = (BOS, USER, ASSISTANT, "<\uff5cend\u2581of\u2581sentence\uff5c>", "<think>", "</think>")
CHATML = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>")
HARMONY = ("<|startoftext|>", "<|endoftext|>", "<|return|>", "<|channel|>", "<|start|>", "<|end|>", "<|message|>")
TEXT = "Café 数学: what is\n1 + 1? 🙂"
SYSTEM = """You are ChatGPT, a large language model trained by OpenAI.
Knowledge cutoff: 2024-06
Current date: 2025-08-05

Reasoning: medium

# Valid channels: analysis, commentary, final. Channel must be included for every message."""
EXPECTED = {
    "r1": (R1, f"{BOS}{USER}{TEXT}{ASSISTANT}<think>\n"),
    "chatml": (CHATML, f"<|im_start|>user\n{TEXT}<|im_end|>\n<|im_start|>assistant\n"),
    "harmony": (HARMONY, f"<|start|>system<|message|>{SYSTEM}<|end|><|start|>user<|message|>{TEXT}<|end|><|start|>assistant"),
    "raw": ((), TEXT)}


@pytest.mark.parametrize("name", EXPECTED)
def test_chat_formats(tmp_path, name):
    """Told apart by the special tokens; the prompt is this text, and its marks are single tokens."""
    special, text = EXPECTED[name]
    tokenizer = Tokenizer(write_tokenizer(tmp_path, special))
    assert tokenizer.format == name
    ids = tokenizer.prompt(TEXT)
    assert tokenizer.decode(ids) == text
    marks = {mark: tokenizer.library.token_to_id(mark) for mark in special}
    for mark, token in marks.items():
        assert token is not None and ids.count(token) == text.count(mark)
    assert tokenizer.encode(TEXT) == [token for token in tokenizer.encode(TEXT) if token < 256]
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT
    if special:
        assert tokenizer.decode(ids, skip_special_tokens=True).count(special[1]) == 0


def test_a_format_may_be_given(tmp_path):
    """R1-0528-Qwen3 has both marks, and is R1; anything else is on request, if its tokens are there."""
    both = write_tokenizer(tmp_path, R1 + CHATML[1:3])
    assert Tokenizer(both).format == "r1"
    for name in ("chatml", "raw"):
        tokenizer = Tokenizer(both, name)
        assert tokenizer.format == name and tokenizer.decode(tokenizer.prompt(TEXT)) == EXPECTED[name][1]
    for name in ("harmony", "llama"):
        with pytest.raises(ValueError, match=f"chat format.*{name}"):
            Tokenizer(both, name)


def test_harmony_effort(tmp_path):
    tokenizer = Tokenizer(write_tokenizer(tmp_path, HARMONY))
    assert tokenizer.decode(tokenizer.prompt("x", effort="high")).count("Reasoning: high\n") == 1


@pytest.mark.parametrize("template, opening", (
    (None, "<think>\n"), ("{{ '" + ASSISTANT + "<think>\\n' }}", "<think>\n"), ("{{ '" + ASSISTANT + "' }}", "")))
@pytest.mark.parametrize("where", ("tokenizer_config.json", "chat_template.jinja"))
def test_who_opens_the_thinking(tmp_path, template, opening, where):
    """R1-Distill's template opens it for the model; a checkpoint whose template does not is believed."""
    folder = write_tokenizer(tmp_path, R1, template if where == "tokenizer_config.json" else None)
    if where == "chat_template.jinja" and template:
        (folder / where).write_text(template)
    tokenizer = Tokenizer(folder)
    assert tokenizer.decode(tokenizer.prompt("x")) == f"{BOS}{USER}x{ASSISTANT}{opening}"
    assert tokenizer.completion(tokenizer.encode("so </think> 2")) == opening + "so </think> 2"


@pytest.mark.parametrize("name", EXPECTED)
def test_stream_is_decode_in_pieces(tmp_path, name):
    """Multi-byte characters come whole, when their last byte has come; nothing is lost or doubled."""
    tokenizer = Tokenizer(write_tokenizer(tmp_path, EXPECTED[name][0]))
    ids = tokenizer.prompt(TEXT) + tokenizer.encode("naïve 🙂🙂 x")
    step = tokenizer.stream()
    pieces = [step(token) for token in ids]
    assert "".join(pieces) == tokenizer.decode(ids) and "" in pieces and "数" in pieces
    assert not any("\ufffd" in piece for piece in pieces)
    other, again = tokenizer.stream(), tokenizer.stream()  # streams know nothing of each other
    assert [(other(token), again(token))[1] for token in ids] == pieces


@pytest.mark.parametrize("name", NAMES)
def test_golden_tokenizer(name):
    tokenizer, (_, info) = Tokenizer(GOLDEN / "checkpoints" / name), golden(name)
    for known in info["tokenizer"]["cases"]:
        assert tokenizer.encode(known["text"]) == known["ids"]
        assert tokenizer.decode(known["ids"]) == known["decoded"]
        assert tokenizer.decode(known["ids"], skip_special_tokens=True) == known["decoded_skip_special"]
        step = tokenizer.stream()
        assert "".join(step(token) for token in known["ids"]) == known["decoded"]
    assert tokenizer.format == ("harmony" if "gptoss" in name else "chatml")


def test_a_tiny_temperature_is_greedy():
    """1e-46 is 0 in float32, and 0 / 0 no probability."""
    logits = torch.tensor([[1.0, 3.0, 2.0]])
    assert probabilities(logits, 1e-46, 2, 0.9).tolist() == [[0.0, 1.0, 0.0]]
