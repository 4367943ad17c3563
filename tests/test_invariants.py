"""The nine invariants, in their order: the specification of this project, as short as it can be
said. The other tests look closer at each."""
import json
import os

import pytest
import torch
from helpers import (
    KINDS, ROOT, Fuse, Killed, close, random_ids, random_model, random_prompt, random_stop)

import sample
import train
from commands import eval as eval_command
from commands import train as train_command
from engine import fit, forecast, launch, protocol, refill, stored
from eval import STOP
from eval import protocol as plain_protocol
from model import load
from plumbing.problems import read_problems
from plumbing.tokenizer import Tokenizer
from sample import Path, Sampling, draw, generate, path_key, prefill, probabilities, uniform
from stop import Stop, Watcher, launch_check_resume

SAMPLING = {"temperature": 1.0, "top_k": 20, "top_p": 0.95, "seed": 7}
PROMPT = random_prompt(9)
LIMIT = 40
EOS = (3, 11, 30)  # some paths end early, others do not


@pytest.fixture(scope="module", params=KINDS)
def model(request):
    return random_model(request.param)


@pytest.fixture(scope="module")
def stop(model):
    return random_stop(model)


@pytest.fixture(scope="module")
def whole(model):
    """Twelve uninterrupted paths of the prompt."""
    (paths,) = generate(model, [PROMPT], 12, LIMIT, eos_ids=EOS, **SAMPLING)
    assert {path.status for path in paths} == {"eos", "length"}
    return paths


def live_slots(cache):
    """The keys and values that each row holds."""
    slots = []
    for buffer in cache.keys + cache.values:
        for row, length in enumerate(cache.counts):
            slots.append(buffer[row, :, :length].clone())
    return slots


# 1. Cached in any split = one full pass; a batch = its rows one by one; dead cache slots filled
#    with 1e30 change nothing.


@pytest.mark.parametrize("split", ([40], [1] * 40, [7, 1, 20, 12], [39, 1]), ids=len)
def test_1_cached_in_any_split_is_one_full_pass(model, split):
    ids = random_ids(2, 40)
    cache = model.new_cache(2, 40)
    parts = [model(part, cache=cache) for part in ids.split(split, 1)]
    close(torch.cat(parts, 1), model(ids))


def test_1_a_batch_is_its_rows_one_by_one(model):
    prompts = [random_prompt(length) for length in (31, 5, 40, 17)]
    cache, hidden = prefill(model, prompts, extra=1)
    new = torch.tensor([[1], [2], [3], [4]])
    after = model(new, cache=cache)
    for row, ids in enumerate(prompts):
        alone = model(torch.tensor([ids + new[row].tolist()]))[0]
        close(hidden[row], alone[-2])
        close(after[row], alone[-1:])


def test_1_dead_slots_change_nothing(model):
    hidden = []
    for value in (0.0, 1e30):
        cache, _ = prefill(model, [random_prompt(31), random_prompt(5)], extra=9)
        for buffer in cache.keys + cache.values:
            for row, length in enumerate(cache.counts):
                buffer[row, :, length:] = value
        hidden.append(model(random_ids(2, 3), cache=cache))
    assert torch.equal(*hidden)


# 2. Attaching STOP changes no logit of the base model: bit-equal with the adapter loaded and off.


def test_2_attaching_stop_changes_no_logit(model):
    ids = random_ids(2, 40)
    before = model.logits(model(ids))
    stop = random_stop(model)
    off = stop.lora.at(torch.zeros(2, 40, dtype=torch.bool))
    assert torch.equal(model.logits(model(ids, adapter=off)), before)
    stop.score(model, ids.tolist())
    assert torch.equal(model.logits(model(ids)), before)


# 3. One masked pass over prompt + prefix + [STOP] = the two-stage cached computation.


@pytest.mark.parametrize("length", (5, 40))
def test_3_one_masked_pass_is_the_two_stages(model, stop, length):
    ids = random_ids(1, length)
    embedded = torch.cat((model.model.embed_tokens(ids), stop.tokens[None]), 1)
    active = torch.arange(length + stop.m)[None] >= length
    with torch.no_grad():
        hidden = model(embedded, adapter=stop.lora.at(active))
        chance = torch.sigmoid(stop.head(hidden[:, -1])[:, 0])
    close(stop.score(model, ids.tolist()), chance, 1e-5)


# 4. The check leaves every row's cache and length as it found them: with keep = n the finished
#    paths equal an uninterrupted run, token for token.


def test_4_the_check_leaves_the_cache_as_it_was(model, stop):
    cache, _ = prefill(model, [random_prompt(7), random_prompt(30)], stop.m)
    before = live_slots(cache)
    with torch.no_grad():
        stop(model, cache)
    assert cache.lengths.tolist() == cache.counts.tolist() == [7, 30]
    for now, then in zip(live_slots(cache), before, strict=True):
        assert torch.equal(now, then)


@pytest.mark.parametrize("stages", ([(10, 12)], [(4, 12), (10, 12), (20, 12)]), ids=len)
def test_4_keeping_all_is_an_uninterrupted_run(model, stop, whole, stages):
    paths = launch_check_resume(
        model, stop, PROMPT, 12, stages=stages, max_new_tokens=LIMIT, eos_ids=EOS, **SAMPLING)
    assert [path.ids for path in paths] == [path.ids for path in whole]
    assert [path.status for path in paths] == [path.status for path in whole]
    prefixes = [PROMPT + path.ids[:stages[-1][0]] for path in whole]
    scores = torch.tensor([path.score for path in paths])
    close(scores, stop.score(model, prefixes))


# 5. Path i's tokens depend on (seed, problem, i) alone: not on n, keep, batch size, refilling,
#    number of processes, or which others were pruned. Its noise for position t is a pure function
#    of (seed, problem, i, t).


@pytest.mark.parametrize("n, batch", ((12, 5), (12, 1), (3, 12), (5, 2)))
def test_5_tokens_depend_on_the_path_alone(model, whole, n, batch):
    """Few rows are refilled, many are not; another prompt is in the batch."""
    prompts = [random_prompt(20), PROMPT]
    _, paths = refill.generate(model, prompts, n, LIMIT, eos_ids=EOS, batch=batch, **SAMPLING)
    assert [path.ids for path in paths] == [path.ids for path in whole[:n]]


def test_5_tokens_do_not_depend_on_who_was_pruned(model, stop, whole):
    paths = launch_check_resume(
        model, stop, PROMPT, 12, 4, 10, max_new_tokens=LIMIT, eos_ids=EOS, **SAMPLING)
    kept = [path for path in paths if path.status != "pruned"]
    assert len(kept) == 4
    for path in kept:
        assert path.ids == whole[path.index].ids


def test_5_noise_is_a_function_of_seed_problem_path_and_position(model, whole):
    """No cache and no batch, the whole path through the model for each token."""
    path = whole[3]
    key = path_key(7, PROMPT, 3)
    keys = torch.tensor([key - 2 ** 64 if key >= 2 ** 63 else key])
    for position, token in enumerate(path.ids):
        logits = model.logits(model(torch.tensor([PROMPT + path.ids[:position]]))[:, -1])
        probs = probabilities(logits, 1.0, 20, 0.95)
        assert draw(probs, uniform(keys, position)).item() == token


# 6. Work done is work counted: decoded tokens reported = rows x steps actually computed, and
#    after the check the cache holds the kept rows only.


@pytest.mark.parametrize("rows", (12, 4))
def test_6_work_done_is_work_counted(model, whole, monkeypatch, rows):
    computed = []
    run = model.run

    def noted(ids, *rest, **more):
        if ids.shape[1] == 1:
            computed.append(len(ids))
        return run(ids, *rest, **more)

    monkeypatch.setattr(model, "run", noted)
    paths = [Path(PROMPT, index) for index in range(12)]
    batch = refill.Batch(model, paths, 9 + LIMIT, LIMIT, Sampling(**SAMPLING), EOS, rows)
    batch.decode(LIMIT)
    assert batch.decoded == sum(computed) == sum(len(path.ids) for path in whole)


@pytest.mark.parametrize("batch", (sample.Batch, refill.Batch))
def test_6_after_the_check_the_cache_holds_the_kept_rows_only(model, stop, batch):
    caches = []

    class Looker(Watcher):
        def resumed(self, batch, paths):
            caches.append(batch.cache)
            assert batch.cache.rows == batch.cache.keys[0].shape[0] == 4
            assert batch.cache.nbytes == model.new_cache(4, 9 + LIMIT + stop.m).nbytes

    launch_check_resume(
        model, stop, PROMPT, 12, 4, 10, max_new_tokens=LIMIT, eos_ids=(), watcher=Looker(),
        new_batch=batch, **SAMPLING)
    assert len(caches) == 1


# 7. Training touches LoRA, the [STOP] embedding and the head, nothing else; the prefix pass
#    builds no graph.


def test_7_training_touches_the_module_and_nothing_else(model):
    stop = random_stop(model)
    examples = [train.Example(random_prompt(length), 0.5, "p", None) for length in (5, 9, 30)]
    prefixes = train.Prefixes(model, examples, 3, stop.m)
    cache, labels = prefixes[0]
    assert not any(buffer.requires_grad for buffer in cache.keys + cache.values)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    module = {name: value.clone() for name, value in stop.state_dict().items()}

    optimizer = torch.optim.AdamW(stop.parameters(), lr=1e-3)
    stop.loss(stop(model, cache), labels).backward()
    optimizer.step()
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert all(parameter.grad is None for parameter in model.parameters())
    for name, value in stop.state_dict().items():
        assert not torch.equal(value, module[name]), name


# 8. Killed at any moment, `train.py` started again continues: no record lost, none twice, the
#    same labels and weights as an uninterrupted run.


def train_toy(out, test):
    """A very small run of train.py on the embedded toy."""
    train_command.run(train_command.Settings(
        model=str(ROOT / "toy"), test=str(test), out=str(out), problems=4, paths=4, low=0, high=4,
        prefix="40", prefixes=2, rollouts=2, max_new_tokens=90, batch=6, rank=2, epochs=2,
        batch_size=4, accumulation=1, validation=0.3, n=2, keep=1, device="cpu", dtype="float32"))


def test_8_a_killed_run_continues_to_the_same_labels_and_weights(tmp_path, monkeypatch):
    monkeypatch.setattr(forecast, "decoding_rate", lambda *_: 1000.0)
    monkeypatch.setattr(forecast, "fit_seconds", lambda *_: 1.0)
    test = tmp_path / "test.jsonl"
    test.write_text((ROOT / "toy" / "test.jsonl").read_text().splitlines(True)[0])
    train_toy(tmp_path / "whole", test)
    kills = 0
    while kills < 30:
        fuse = Fuse(40 + 20 * kills)
        with monkeypatch.context() as patch:
            patch.setattr(refill.Batch, "settle", fuse(refill.Batch.settle))
            patch.setattr(torch.optim.AdamW, "step", fuse(torch.optim.AdamW.step))
            patch.setattr(os, "replace", fuse(os.replace))
            try:
                train_toy(tmp_path / "killed", test)
                break
            except Killed:
                kills += 1
    assert kills >= 4
    for name in ("labels.jsonl", "stop/stop.safetensors"):
        again = (tmp_path / "killed" / name).read_bytes()
        assert again == (tmp_path / "whole" / name).read_bytes()
    lines = (tmp_path / "whole" / "labels.jsonl").read_text().splitlines()
    names = [(json.loads(line)["id"], json.loads(line)["path"]) for line in lines]
    assert len(names) == len(set(names)) == 4 * 2


# 9. The engine equals the story: plain and fast generate, launch_check_resume, labels, fit and
#    protocol give the same.


@pytest.mark.parametrize("batch", (None, 5))
def test_9_generate(model, batch):
    """The very paths: tokens, status, noise."""
    prompts = [random_prompt(20), PROMPT]
    plain = generate(model, prompts, 6, LIMIT, eos_ids=EOS, **SAMPLING)
    fast = refill.generate(model, prompts, 6, LIMIT, eos_ids=EOS, batch=batch, **SAMPLING)
    for group, others in zip(plain, fast, strict=True):
        assert [path.ids for path in group] == [path.ids for path in others]
        assert [path.status for path in group] == [path.status for path in others]


@pytest.mark.parametrize("stages", ([(10, 4)], [(4, 9, 2), (10, 5, 3)]), ids=str)
def test_9_launch_check_resume(model, stop, stages):
    how = {"stages": stages, "max_new_tokens": LIMIT, "eos_ids": EOS, **SAMPLING}
    plain = launch_check_resume(model, stop, PROMPT, 12, **how)
    fast = launch.launch_check_resume(model, stop, PROMPT, 12, **how)
    fast = {path.name: path for path in fast}
    assert len(fast) == len(plain)
    for path in plain:
        other = fast[path.name]
        assert (path.ids, path.status) == (other.ids, other.status)
        assert path.score == pytest.approx(other.score, abs=1e-6)


@pytest.fixture(scope="module")
def toy():
    """The embedded toy, its STOP and its tokenizer."""
    model = load(ROOT / "toy")
    return model, Stop.load(ROOT / "toy" / "stop", model), Tokenizer(ROOT / "toy")


def test_9_labels_and_fit(toy, tmp_path):
    """Bit for bit."""
    model, _, tokenizer = toy
    settings = train_command.Settings(
        model=str(ROOT / "toy"), paths=4, low=1, high=3, prefix="24,40", prefixes=2, rollouts=3,
        max_new_tokens=200, batch=7, rank=2, epochs=3, lr=0.01, dropout=0.2, batch_size=4,
        accumulation=2, validation=0.4, cache_gb=0.001)
    problems = read_problems(ROOT / "toy" / "train.jsonl")[:10]
    examples = train.make_labels(model, tokenizer, problems, settings)
    assert len(examples) > 8
    assert stored.make_labels(model, tokenizer, problems, settings, tmp_path) == examples
    plain = train.fit(model, examples, settings)
    fast = fit.fit(model, examples, settings, tmp_path, "run")
    for name, value in plain.state_dict().items():
        assert torch.equal(value, fast.state_dict()[name]), name


def test_9_protocol(toy, tmp_path):
    model, stop, tokenizer = toy
    settings = eval_command.Settings(n=6, keep=2, prefix=40, max_new_tokens=200, batch=7)
    problems = read_problems(ROOT / "toy" / "test.jsonl")[:3]
    sampling = sample.sampling_of(settings)
    plain = plain_protocol(model, tokenizer, stop, problems, 6, 2, 40, 200, sampling)
    fast = protocol.run(model, tokenizer, stop, problems, settings, tmp_path)
    assert list(plain["rows"]) == list(fast["rows"])
    for name, row in plain["rows"].items():
        assert row["kept"].tolist() == fast["rows"][name]["kept"].tolist()
        assert row["avg"] == fast["rows"][name]["avg"]
    assert plain["rows"][STOP]["auroc"] == fast["rows"][STOP]["auroc"]
