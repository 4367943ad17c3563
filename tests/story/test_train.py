"""Supervision and fit, on the embedded toy in small: labels, what is trained, kills and restarts,
one process and two, bad input."""
import dataclasses
import json
import math
import os
import pathlib
import random
import shutil
import signal
import time

import pytest
import torch
from helpers import (
    ROOT, Fuse, Killed, close, flags_of, read_lines, run_script, start_script, write_lines)
from huggingface_hub.utils import tqdm
from safetensors.torch import load_file

import train
from commands import train as train_command
from engine import forecast, refill, stored
from engine import fit as engine_fit
from engine.fit import Prefixes
from model import load
from plumbing import grading, memory, processes
from plumbing.answers import extract_answer, same_answer
from plumbing.labels import LABEL_KEYS
from plumbing.problems import Problem, read_problems
from plumbing.records import Job, locked
from plumbing.tokenizer import Tokenizer
from sample import Path, generate, prefill
from stop import Stop
from train import Example

TOY = ROOT / "toy"
SMALL = {  # with values for all that is in the toy's recipe
    "model": str(TOY), "problems": 6, "paths": 8, "low": 1, "high": 7, "prefix": "40",
    "prefixes": 2, "rollouts": 4, "max_new_tokens": 200, "batch": 8, "rank": 2, "epochs": 3,
    "batch_size": 4, "accumulation": 2, "lr": 1e-3, "warmup": 0, "cosine": False, "clip": 0.0,
    "validation": 0.3, "n": 2, "keep": 1, "device": "cpu", "dtype": "float32"}


def small(**changes):
    """Settings of a small run on the toy."""
    return train_command.Settings(**SMALL | changes)


def skip_measuring(monkeypatch):
    """The plan takes no time to measure rates: they are not what is tested here."""
    monkeypatch.setattr(forecast, "decoding_rate", lambda *_: 1000.0)
    monkeypatch.setattr(forecast, "fit_seconds", lambda *_: 1.0)


@pytest.fixture(autouse=True)
def unmeasured(monkeypatch):
    skip_measuring(monkeypatch)


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    """Two held-out problems: the evaluation at the end is not what is tested here."""
    file = tmp_path_factory.mktemp("few") / "test.jsonl"
    write_lines(file, read_lines(TOY / "test.jsonl")[:2])
    return str(file)


@pytest.fixture(scope="module")
def run(few, tmp_path_factory):
    """The folder of one uninterrupted run."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    with pytest.MonkeyPatch.context() as monkeypatch:
        skip_measuring(monkeypatch)
        train_command.run(small(test=few, out=str(out)))
    return out


class Toy:
    """The toy's Decoder and Tokenizer."""

    def __init__(self):
        self.model = load(TOY)
        self.tokenizer = Tokenizer(TOY)


@pytest.fixture(scope="module")
def toy():
    return Toy()


# ------------------------------------------------------------------------------------- supervision


def is_right(toy, problem, ids):
    return same_answer(extract_answer(toy.tokenizer.decode(ids)), problem.answer)


def test_labels_are_the_share_of_right_rollouts(run, toy):
    """Counted again, prefix by prefix, from fresh continuations; problems outside low..high are
    gone, prefixes are cut."""
    problems = {problem.id: problem for problem in read_problems(TOY / "train.jsonl")[:6]}
    paths = {}
    kept = []
    for name, problem in problems.items():
        (paths[name],) = generate(toy.model, [toy.tokenizer.ask(problem)], 8, 200)
        right = sum(is_right(toy, problem, path.ids) for path in paths[name])
        if 1 <= right <= 7:
            kept.append(name)
    assert kept
    records = read_lines(run / "labels.jsonl")
    expected = [(name, number) for name in kept for number in range(2)]
    assert [(record["id"], record["path"]) for record in records] == expected
    for record in records:
        problem = problems[record["id"]]
        path = paths[record["id"]][record["path"]]
        prefix = path.ids[:40]
        assert record["prefix_token_ids"] == path.prompt_ids + prefix
        (ends,) = generate(toy.model, [path.prompt_ids + prefix], 4, 160)
        right = sum(is_right(toy, problem, prefix + end.ids) for end in ends)
        assert record["successes"] == right
        assert record["rollouts"] == 4
        assert record["soft_label"] == right / 4


def test_a_path_that_ends_early_is_its_own_label(toy, tmp_path):
    """With the checkpoint behind most ends, the prefix is the whole path and nothing is rolled
    out."""
    problems = read_problems(TOY / "train.jsonl")[:3]
    settings = small(prefix="199", low=0, high=8)
    stored.make_labels(toy.model, toy.tokenizer, problems, settings, tmp_path)
    by_id = {problem.id: problem for problem in problems}
    ended = []
    for record in read_lines(tmp_path / "labels.jsonl"):
        if record["prefix_token_ids"][-1] in toy.model.config.eos_ids:
            ended.append(record)
    assert len(ended) >= 4
    for record in ended:
        right = is_right(toy, by_id[record["id"]], record["prefix_token_ids"])
        assert record["soft_label"] == float(right)


class Counted:
    """A tokenizer whose completion is the ids themselves, as text."""

    def completion(self, ids):
        return " ".join(map(str, ids))


def stored_paths(counts, paths):
    """A function in place of sample_paths: a record of 32 paths for each count of right ones."""
    records = []
    for count in counts:
        right = [number < count for number in range(32)]
        records.append({"id": str(count), "prompt_ids": [5, 6], "right": right, "paths": paths})
    return lambda *_: records


def label_records(folder):
    """The records of labels.jsonl, as they were made."""
    records = read_lines(folder / "labels.jsonl")
    for record in records:
        assert record.pop("seal")
    return records


def continue_by_number(asked):
    """A function in place of sample_all: continuation i is the token i; `asked` notes the calls."""
    def sample_all(model, prompts, n, limit, sampling, on_complete, eos_ids=None, batch=None,
                   bar=None):
        asked.append((prompts, n, limit, sampling.temperature, sampling.seed))
        for number, prompt in reversed(list(enumerate(prompts))):  # finished in any order
            on_complete(number, [Path(prompt, i, [i]) for i in range(n)])

    return sample_all


def answer_if_listed(texts):
    """A function in place of extract_answer: right is what ends with one of these texts."""
    return lambda text, kind: "1" if text in texts else "0"


def test_labels_by_hand(toy, tmp_path, monkeypatch):
    """Who stays (low and high included), what is continued and how far, and what is graded: prefix
    and continuation as one text. Off by one at either bound, a prefix graded alone, a continuation
    beyond the limit: each gives another record."""
    problems = [Problem(str(count), "?", "1") for count in (3, 4, 28, 29)]
    paths = [[7, 8]] + [[9, i, 9, 9] for i in range(1, 32)]
    asked = []
    monkeypatch.setattr(stored, "sample_paths", stored_paths((3, 4, 28, 29), paths))
    monkeypatch.setattr(stored, "sample_all", continue_by_number(asked))
    monkeypatch.setattr(grading, "extract_answer", answer_if_listed(("9 1 0", "9 1 2", "9 2 3")))
    settings = train_command.Settings(
        prefix="2", prefixes=3, rollouts=4, batch=12, max_new_tokens=10, temperature=0.7, seed=3)
    stored.make_labels(toy.model, Counted(), problems, settings, tmp_path)
    records = label_records(tmp_path)
    expected = []
    for name in ("4", "28"):
        for number, ids, successes in ((0, [7, 8], 4), (1, [9, 1], 2), (2, [9, 2], 1)):
            expected.append({
                "id": name, "path": number, "checkpoint": 2, "prefix_token_ids": [5, 6] + ids,
                "soft_label": successes / 4, "successes": successes, "rollouts": 4})
    assert records == expected
    prompts = [[5, 6, 9, 1], [5, 6, 9, 2]]
    assert asked == [(prompts * 2, 4, 8, 0.7, 3)]


def test_labels_at_several_checkpoints_by_hand(toy, tmp_path, monkeypatch):
    """Each path is cut at every checkpoint, one that has ended by then once; what is continued has
    the room that the limit leaves behind its own checkpoint."""
    paths = [[7, 8, 7]] + [[9, i, 9, 9, 9] for i in range(1, 32)]
    asked = []
    monkeypatch.setattr(stored, "sample_paths", stored_paths((4,), paths))
    monkeypatch.setattr(stored, "sample_all", continue_by_number(asked))
    monkeypatch.setattr(
        grading, "extract_answer", answer_if_listed(("7 8 1", "9 1 0", "9 1 9 9 1", "9 1 9 9 0")))
    settings = train_command.Settings(
        prefix="4,2", prefixes=2, rollouts=2, max_new_tokens=10, temperature=0.7, seed=3)
    stored.make_labels(toy.model, Counted(), [Problem("4", "?", "1")], settings, tmp_path)
    records = label_records(tmp_path)
    found = []
    for record in records:
        prefix = record["prefix_token_ids"][2:]
        found.append((record["path"], record["checkpoint"], prefix, record["successes"]))
    assert found == [
        (0, 2, [7, 8], 1), (0, 4, [7, 8, 7], 2), (1, 2, [9, 1], 1), (1, 4, [9, 1, 9, 9], 2)]
    assert asked == [
        ([[5, 6, 7, 8], [5, 6, 9, 1]], 2, 8, 0.7, 3), ([[5, 6, 9, 1, 9, 9]], 2, 6, 0.7, 3)]


def test_without_rollouts_labels_are_the_paths_outcomes(toy, tmp_path, monkeypatch):
    """Each prefix at each checkpoint has the grade of its own path, and nothing is continued."""
    paths = [[7, 8, 7]] + [[9, i, 9, 9, 9] for i in range(1, 32)]
    monkeypatch.setattr(stored, "sample_paths", stored_paths((5, 29), paths))
    monkeypatch.setattr(stored, "sample_all", None)
    settings = train_command.Settings(prefix="4,2", prefixes=6, rollouts=0, max_new_tokens=10)
    train_command.validate(settings)
    problems = [Problem("5", "?", "1"), Problem("29", "?", "1")]
    stored.make_labels(toy.model, Counted(), problems, settings, tmp_path)
    records = label_records(tmp_path)
    expected = []
    for number in range(6):
        for checkpoint in (2, 4):
            right = int(number < 5)
            prefix = [5, 6] + paths[number][:checkpoint]
            expected.append({
                "id": "5", "path": number, "checkpoint": checkpoint, "prefix_token_ids": prefix,
                "soft_label": float(right), "successes": right, "rollouts": 0})
    assert records == expected
    assert read_lines(tmp_path / "labels.jsonl")[0]["soft_label"] == 1.0


def test_a_run_without_rollouts(few, toy, tmp_path, capsys):
    """From paths to a STOP; the plan has no tokens of rollouts, and the labels train as any."""
    settings = small(rollouts=0, prefixes=8, epochs=1, test=few, out=str(tmp_path / "out"))
    train_command.run(dataclasses.replace(settings, plan=True, out=None))
    plan = capsys.readouterr().out
    assert "plan: 48 prefixes, labelled by their paths' outcomes\n" in plan
    assert "rollouts" not in plan
    train_command.run(settings)
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["validation_loss"] > 0
    records = read_lines(tmp_path / "out" / "labels.jsonl")
    right = {}
    for file in (tmp_path / "out").glob("paths-*.jsonl"):  # those of the evaluation too
        right |= {record["id"]: record["right"] for record in read_lines(file)}
    right = {name: right[name] for name in right if name.startswith("toy-train")}
    staying = [name for name, grades in right.items() if 1 <= sum(grades) <= 7]
    assert [(record["id"], record["path"], record["soft_label"]) for record in records] == [
        (name, number, float(right[name][number])) for name in staying for number in range(8)]
    Stop.load(tmp_path / "out" / "stop", toy.model)


@pytest.mark.parametrize("prefixes", (4, 3))
def test_finished_labels_are_read_and_not_made(toy, tmp_path, monkeypatch, prefixes):
    """A run that has all its labels rolls nothing out when it is started again."""
    paths = [[9, i, 9, 9] for i in range(32)]
    monkeypatch.setattr(stored, "sample_paths", stored_paths((8,), paths))
    settings = train_command.Settings(
        prefix="2", prefixes=prefixes, rollouts=2, batch=4, max_new_tokens=10)
    problems = [Problem("8", "?", "1")]
    records = stored.make_labels(toy.model, toy.tokenizer, problems, settings, tmp_path)
    content = (tmp_path / "labels.jsonl").read_bytes()
    monkeypatch.setattr(refill, "Batch", None)
    again = stored.make_labels(toy.model, toy.tokenizer, problems, settings, tmp_path)
    assert again == records
    assert len(records) == prefixes
    assert (tmp_path / "labels.jsonl").read_bytes() == content


# --------------------------------------------------------------------------------------------- fit


def examples_of(run):
    """The examples that a run made."""
    examples = []
    for record in read_lines(run / "labels.jsonl"):
        examples.append(Example(
            record["prefix_token_ids"], record["soft_label"], record["id"], record["checkpoint"]))
    return examples


def random_examples(count=11, problems=4):
    """Examples of unlike lengths; labels that no constant fits."""
    generator = torch.Generator().manual_seed(0)
    examples = []
    for i in range(count):
        ids = torch.randint(5, 60, (3 + 2 * i,), generator=generator).tolist()
        examples.append(Example(ids, i % 5 / 4, f"p{i % problems}", None))
    return examples


def random_module(model, size=0.1, **settings):
    """A Stop that is not fresh."""
    stop = Stop(model, 4, 2, **settings)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in stop.parameters():
            parameter.add_(size * torch.randn(parameter.shape, generator=generator))
    return stop


def prefixes_of(model, examples, batch_size=4, cache_bytes=0):
    return Prefixes(model, examples, batch_size, 4, cache_bytes)


def epoch_of(model, stop, examples, settings, optimizer, epoch=0):
    """The row of one epoch."""
    prefixes = prefixes_of(model, examples, settings.batch_size)
    return engine_fit.train_epoch(
        model, stop, optimizer, prefixes, settings, epoch, tqdm(disable=True))


def states(stop):
    return {key: value.clone() for key, value in stop.state_dict().items()}


def test_only_the_module_is_trained(run, toy, tmp_path):
    """Base weights are bit-equal and without gradient; every part of STOP moves."""
    before = states(toy.model)
    stop = engine_fit.fit(toy.model, examples_of(run), small(), tmp_path, "run")
    for name, value in toy.model.state_dict().items():
        assert torch.equal(value, before[name]), name
    for parameter in toy.model.parameters():
        assert not parameter.requires_grad
        assert parameter.grad is None
    fresh = Stop(toy.model, rank=2, seed=0).state_dict()
    moved = {key for key, value in stop.state_dict().items() if not torch.equal(value, fresh[key])}
    assert {"tokens", "head.weight", "head.bias"} < moved
    assert any("lora_B" in key for key in moved)


def test_the_prefix_pass_builds_no_graph(toy):
    for kept in (0, 2 ** 30):
        cache, _ = prefixes_of(toy.model, random_examples(), cache_bytes=kept)[0]
        for buffer in cache.keys + cache.values:
            assert not buffer.requires_grad


def test_a_step_is_the_mean_over_all_its_prefixes(run, toy):
    """Batches of 4 two at a time are batches of 8: same first loss and gradients, also where the
    last one is ragged."""
    model = toy.model
    examples = sorted(examples_of(run), key=lambda example: len(example.ids))[:7]
    losses = []
    gradients = []
    for size, accumulation in ((4, 2), (7, 1)):
        stop = Stop(model, rank=2)
        torch.nn.init.normal_(stop.head.weight, generator=torch.Generator().manual_seed(1))
        before = states(stop)
        optimizer = torch.optim.SGD(stop.parameters(), lr=1.0)
        settings = small(batch_size=size, accumulation=accumulation, epochs=1)
        row = epoch_of(model, stop, examples, settings, optimizer)
        losses.append(row["train_loss"])
        gradients.append({key: before[key] - value for key, value in states(stop).items()})
    stop.load_state_dict(before)
    logits = []
    for example in examples:
        cache, _ = prefill(model, [example.ids], 4)
        logits.append(stop(model, cache)[0])
    labels = torch.tensor([example.label for example in examples])
    expected = stop.loss(torch.stack(logits), labels).item()
    assert losses == pytest.approx([expected, expected], rel=1e-5)
    for key, gradient in gradients[0].items():
        close(gradient, gradients[1][key], 1e-4)


@pytest.mark.parametrize("head", ("sigmoid", "softmax"))
@pytest.mark.parametrize("clip", (0.0, 1e-3))
def test_a_step_by_autograd(toy, head, clip):
    """One optimiser step over ragged batches moves every parameter by lr times the gradient of one
    mean over all rows, cut to the norm asked for. A sum, a mean of means, a step whose loss is
    scaled, or clipping left out: another step."""
    examples = random_examples()
    stop = random_module(toy.model, head=head)
    cache, _ = prefill(toy.model, [example.ids for example in examples], 4)
    labels = torch.tensor([example.label for example in examples])
    loss = stop.loss(stop(toy.model, cache), labels)
    names = [name for name, _ in stop.named_parameters()]
    gradients = dict(zip(names, torch.autograd.grad(loss, list(stop.parameters()))))

    def norm_of(part):
        squares = [g.square().sum().item() for name, g in gradients.items() if part in name]
        return math.sqrt(sum(squares))

    before = states(stop)
    optimizer = torch.optim.SGD(stop.parameters(), lr=9.0)  # the schedule's rate replaces this one
    settings = small(accumulation=8, epochs=1, clip=clip, lr=0.5, head=head)
    row = epoch_of(toy.model, stop, examples, settings, optimizer)
    assert row["train_loss"] == pytest.approx(loss.item(), rel=1e-5)
    for part in ("tokens", "lora", "head"):
        assert row[f"grad_{part}"] == pytest.approx(norm_of(part), rel=1e-3)
    norm = norm_of("")
    scale = min(1.0, clip / norm) if clip else 1.0
    for name, value in states(stop).items():
        difference = before[name] - value - 0.5 * scale * gradients[name]
        assert difference.abs().max() <= 1e-3 * 0.5 * scale * norm, name


def test_the_best_epoch_is_saved(run, toy):
    """What out/stop holds scores the validation loss that its metrics name."""
    stop = Stop.load(run / "stop", toy.model)
    _, held = train.split(examples_of(run), 0.3, 0)
    found = engine_fit.validate(toy.model, stop, prefixes_of(toy.model, held))
    known = stop.trained["metrics"]["validation_loss"]
    assert found["validation_loss"] == pytest.approx(known, rel=1e-5)


def test_the_best_epoch_is_not_the_last(toy, tmp_path, monkeypatch):
    """Validation losses 3, 1, 2, 1: the second epoch is saved and returned, not the last, nor the
    later one that is equal."""
    seen = []
    losses = iter((3.0, 1.0, 2.0, 1.0))

    def validate(model, stop, prefixes):
        seen.append(states(stop))
        return {"validation_loss": next(losses)}

    monkeypatch.setattr(engine_fit, "validate", validate)
    stop = engine_fit.fit(toy.model, random_examples(), small(epochs=4), tmp_path, "run")
    assert stop.trained["epoch"] == 2
    assert stop.trained["settings"]["epochs"] == 4
    for key, value in stop.state_dict().items():
        assert torch.equal(value, seen[1][key])
    assert not torch.equal(seen[3]["tokens"], seen[1]["tokens"])


def test_kept_caches_change_nothing(toy, tmp_path):
    """With and without room to keep the prefixes' caches from epoch to epoch: bit-equal weights."""
    found = []
    for gigabytes in (4.0, 0.0):
        out = tmp_path / str(gigabytes)
        out.mkdir()
        settings = small(cache_gb=gigabytes, epochs=2)
        stop = engine_fit.fit(toy.model, random_examples(), settings, out, "run")
        found.append(states(stop))
    for key, value in found[0].items():
        assert torch.equal(value, found[1][key])


def test_caches_are_kept_while_there_is_room(toy):
    prefixes = prefixes_of(toy.model, random_examples(), cache_bytes=2 ** 30)
    cache, _ = prefixes[0]
    assert prefixes[0][0] is cache
    room = cache.nbytes + prefixes[1][0].nbytes
    prefixes = prefixes_of(toy.model, random_examples(), cache_bytes=room)
    kept = [prefixes[i][0] for i in range(3)]
    again = [prefixes[i][0] for i in range(3)]
    assert [one is other for one, other in zip(kept, again)] == [True, True, False]


class DropoutRun:
    """One epoch with dropout, and two validations after it."""

    def __init__(self, toy, epoch, seed=0, dropout=0.5):
        settings = small(dropout=dropout, epochs=9, lr=0.0, seed=seed)
        examples = random_examples()
        stop = random_module(toy.model, dropout=dropout)
        optimizer = torch.optim.SGD(stop.parameters(), lr=0.0)
        row = epoch_of(toy.model, stop, examples, settings, optimizer, epoch)
        self.loss = row["train_loss"]
        prefixes = prefixes_of(toy.model, examples)
        self.validation = engine_fit.validate(toy.model, stop, prefixes)["validation_loss"]
        again = engine_fit.validate(toy.model, stop, prefixes)["validation_loss"]
        assert self.validation == again


def test_dropout_acts_in_training_only(toy):
    """Off in validation (it repeats), on in a step (it differs from a run without), other in the
    next epoch, and the seed's."""
    runs = [
        DropoutRun(toy, 0), DropoutRun(toy, 0), DropoutRun(toy, 1), DropoutRun(toy, 0, seed=7),
        DropoutRun(toy, 0, dropout=0.0)]
    assert runs[0].loss == runs[1].loss
    assert len({run.loss for run in runs}) == 4
    assert len({run.validation for run in runs}) == 1
    assert runs[4].loss == pytest.approx(runs[4].validation, rel=1e-4)
    assert abs(runs[0].loss - runs[0].validation) > 1e-4


def share_above(pairs):
    """Share of (score, score) pairs whose first is larger."""
    return sum(one > other for one, other in pairs) / len(pairs)


def test_validation_by_hand(toy):
    """AUROC takes one half as positive, pairs stay within a problem, the loss is the mean over
    ragged batches."""
    examples = random_examples(9, 3)
    stop = Stop(toy.model, 4, 2)
    torch.nn.init.normal_(stop.head.weight, generator=torch.Generator().manual_seed(1))
    found = engine_fit.validate(toy.model, stop, prefixes_of(toy.model, examples))
    scores = stop.score(toy.model, [example.ids for example in examples]).tolist()
    losses = []
    good = []
    bad = []
    for score, example in zip(scores, examples):
        label = example.label
        losses.append(-label * math.log(score) - (1 - label) * math.log(1 - score))
        group = good if label >= 0.5 else bad
        group.append(score)
    assert 0.5 in [example.label for example in examples]
    assert found["validation_loss"] == pytest.approx(sum(losses) / 9, rel=1e-4)
    across = [(one, other) for one in good for other in bad]
    assert found["auroc"] == pytest.approx(share_above(across))
    within = []
    for one, a in zip(scores, examples):
        for other, b in zip(scores, examples):
            if a.problem == b.problem and a.label > b.label:
                within.append((one, other))
    assert found["pairwise"] == pytest.approx(share_above(within))
    assert found["mean_score"] == pytest.approx(sum(scores) / 9, rel=1e-4)


def test_a_loss_that_is_no_number_stops_the_run(toy, tmp_path):
    """By name and in one line, and nothing is saved: neither a STOP nor a state to go on from."""
    settings = small(lr=1e30, epochs=3)
    with pytest.raises(ValueError, match="found NaN or infinity, expected finite") as caught:
        engine_fit.fit(toy.model, random_examples(), settings, tmp_path, "run")
    assert "\n" not in str(caught.value)
    for file in tmp_path.rglob("stop.safetensors"):
        for tensor in load_file(file).values():
            assert torch.isfinite(tensor).all()


def test_rates():
    """Warm-up rises in a line, cosine ends near zero, constant stays."""
    settings = small(warmup=4, cosine=True, lr=1.0)
    rates = [train.learning_rate(step, 100, settings) for step in range(100)]
    assert rates[0] == 0.25
    assert rates[1] == pytest.approx(0.5, rel=1e-3)
    assert rates[99] < 1e-3
    assert train.learning_rate(99, 100, small(lr=1.0)) == 1.0


CHANGES = (
    {}, {"weight_decay": 0.9}, {"seed": 5}, {"lr": 1e-2}, {"alpha": 1.0}, {"warmup": 9}, {"m": 2},
    {"clip": 0.1}, {"cosine": True}, {"dropout": 0.5}, {"targets": "q_proj"}, {"shared": True})


def test_settings_reach_the_module(toy, tmp_path, monkeypatch):
    """A setting that is read and then dropped would leave the same weights."""
    losses = iter(range(99, 0, -1))  # the last epoch is the best
    monkeypatch.setattr(engine_fit, "validate", lambda *_: {"validation_loss": next(losses)})
    heads = set()
    for number, changes in enumerate(CHANGES):
        out = tmp_path / str(number)
        out.mkdir()
        settings = small(**{"epochs": 3, "lr": 5e-3, "validation": 0.5} | changes)
        stop = engine_fit.fit(toy.model, random_examples(), settings, out, "run")
        heads.add(tuple(stop.head.weight.flatten().tolist()))
    assert len(heads) == len(CHANGES)


# ---------------------------------------------------------------------------------- given examples


@pytest.mark.parametrize("key", LABEL_KEYS)
def test_the_authors_records_and_recipe(run, toy, tmp_path, key):
    """Records with only ids and a label under any of their names train, by the released recipe, the
    same way twice."""
    file = tmp_path / "labels.jsonl"
    records = []
    for record in read_lines(run / "labels.jsonl"):
        ids = record["prefix_token_ids"]
        records.append({"prefix_token_ids": ids, key: record["soft_label"]})
    write_lines(file, records)
    settings = small(
        shared=True, head="softmax", targets="q_proj,v_proj", dropout=0.05, epochs=1)
    found = []
    for name in "ab":
        out = tmp_path / name
        out.mkdir()
        examples = train_command.given_labels(file, toy.model, toy.tokenizer, 4, [])
        found.append(states(engine_fit.fit(toy.model, examples, settings, out, "run")))
    assert found[0]["tokens"].shape == (1, 96)
    assert found[0]["head.bias"].shape == (2,)
    linears = {name.split(".")[-3] for name in found[0] if "lora_A" in name}
    assert linears == {"q_proj", "v_proj"}
    for name, value in found[0].items():
        assert torch.equal(value, found[1][name])


def test_records_without_a_problem(toy, tmp_path):
    """`problem_id` groups as `id` does; a record with neither stands for itself, or the split would
    hold out all or none."""
    keys = ({"id": 4}, {"problem_id": 4}, {"problem_id": "x", "id": "y"}, {}, {})
    record = {"prefix_token_ids": [5], "soft_label": 1}
    file = write_lines(tmp_path / "labels.jsonl", [record | key for key in keys])
    examples = train_command.given_labels(file, toy.model, toy.tokenizer, 4, [])
    found = [example.problem for example in examples]
    assert found == ["4", "4", "y", "line 4", "line 5"]


@pytest.mark.parametrize("lines, message", (
    (['{"prefix_token_ids": [5], "soft_label": 1.5}'], ":1: soft_label: found 1.5"),
    (['{"prefix_token_ids": [5], "soft_label": 0.5}', '{"prefix_token_ids": [5], "sof'],
     ":2: not JSON"),
    (['{"prefix_token_ids": [5], "soft_label": null}'], ":1: soft_label: found None"),
    (['{"prefix_token_ids": [5], "soft_label": true}'], ":1: soft_label: found True"),
    (['{"prefix_token_ids": [5]}'], ":1: soft_label: found none, expected a number"),
    (['{"prefix_token_ids": "5", "soft_label": 0.5}'], ":1: prefix_token_ids"),
    (['{"prefix_token_ids": [5.0], "soft_label": 0.5}'], ":1: prefix_token_ids"),
    (['{"prefix_token_ids": [99999], "soft_label": 0.5}'], ":1: .*99999.*vocabulary"),
    (['{"prefix_token_ids": [], "soft_label": 0.5}'], ":1: .*found no token"),
    (['{"soft_label": 0.5}'], ":1: prefix_token_ids"),
    ([], "found no record"),
    (["[1]"], ":1: found list")))
def test_bad_labels(toy, tmp_path, lines, message):
    file = tmp_path / "labels.jsonl"
    file.write_text("".join(line + "\n" for line in lines))
    with pytest.raises(ValueError, match=message) as caught:
        train_command.given_labels(file, toy.model, toy.tokenizer, 4, [])
    assert str(caught.value).startswith(str(file))
    assert "\n" not in str(caught.value)


def test_labels_of_a_held_out_problem_are_refused(toy, few, tmp_path):
    """Labels made elsewhere must not hold what the evaluation asks: told by the prompt's token ids,
    whatever the id."""
    prompt = toy.tokenizer.ask(read_problems(few)[1])
    records = []
    for i, ids in enumerate(([5, 6, 7], prompt + [9])):
        records.append({"id": i, "prefix_token_ids": ids, "soft_label": 0.5})
    file = write_lines(tmp_path / "labels.jsonl", records)
    out = tmp_path / "out"
    with pytest.raises(ValueError, match="labels.jsonl:2: problem 1 is held-out problem"):
        train_command.run(small(test=few, labels=str(file), out=str(out)))
    assert not list(out.rglob("*"))


def test_validation_problems_are_held_out(run):
    examples = examples_of(run)
    training, validation = train.split(examples, 0.3, 0)
    ours = {example.problem for example in training}
    assert not ours & {example.problem for example in validation}
    assert len(training) + len(validation) == len(examples)


def test_the_split_is_by_the_seed_and_the_share():
    """A third of nine problems, whole, other ones by another seed, the same ones again, however the
    records are ordered."""
    examples = [Example([1], 0.5, f"p{i % 9}", None) for i in range(36)]

    def held(seed, examples=examples, share=1 / 3):
        _, validation = train.split(examples, share, seed)
        return frozenset(example.problem for example in validation)

    drawn = [held(seed) for seed in range(6)]
    assert [len(problems) for problems in drawn] == [3] * 6
    assert len(set(drawn)) > 2
    assert held(1) == held(1, examples[::-1])
    assert len(held(0, share=0.01)) == 1


# -------------------------------------------------------------------------------- killed at will


def interrupted(settings, calls):
    """Run until so many decode steps, optimiser steps, lines, file writes and renames are done;
    whether it was killed before its end."""
    fuse = Fuse(calls)
    with pytest.MonkeyPatch.context() as patch:
        skip_measuring(patch)
        patch.setattr(refill.Batch, "settle", fuse(refill.Batch.settle))
        patch.setattr(torch.optim.AdamW, "step", fuse(torch.optim.AdamW.step))
        patch.setattr(Job, "_line", fuse(Job._line))
        patch.setattr(os, "fsync", fuse(os.fsync))
        patch.setattr(os, "replace", fuse(os.replace))
        patch.setattr(pathlib.Path, "unlink", fuse(pathlib.Path.unlink))
        try:
            train_command.run(settings)
            return False
        except Killed:
            return True


def assert_same_run(out, whole):
    for name in ("labels.jsonl", "stop/stop.safetensors"):
        assert (out / name).read_bytes() == (whole / name).read_bytes()
    stored = [sorted(folder.glob("paths-*")) for folder in (out, whole)]
    for found, known in zip(*stored, strict=True):
        assert found.name == known.name
        assert found.read_bytes() == known.read_bytes()
    litter = list(out.rglob("*.part*")) + list(out.rglob("*lock"))
    assert not litter


def has_all_labels(out, whole):
    """Whether the fit has begun."""
    file = out / "labels.jsonl"
    return file.is_file() and file.read_bytes() == (whole / "labels.jsonl").read_bytes()


def tear_last_lines(out):
    """Leave what a writer leaves that is killed in the middle of a line."""
    for file in out.glob("*.jsonl"):
        with open(file, "a") as opened:
            opened.write('{"id": "toy-tra')


def kill_until_done(settings, out, rng, longest, done):
    """Start a run again and again, each time killed within so many calls, half of the times
    inside a line, until `done()` -> how many kills it took."""
    for kills in range(1, 40):
        again = dataclasses.replace(settings, batch=rng.choice((8, 5, 12)))
        if not interrupted(again, rng.randrange(1, longest[kills % len(longest)])):
            break
        if rng.random() < 0.5:
            tear_last_lines(out)
        if done():
            break
    return kills


def test_killed_and_started_again(run, few, tmp_path):
    """At 20 random moments in supervision and in the fit, with another number of rows each time;
    then the same paths, labels and weights."""
    rng = random.Random(0)
    out = tmp_path / "killed"
    settings = small(test=few, out=str(out))

    def end():
        raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_command, "fit", lambda *_: end())
        kills = kill_until_done(settings, out, rng, (350, 40), lambda: has_all_labels(out, run))
    assert has_all_labels(out, run)
    assert kills >= 10
    fit_kills = kill_until_done(settings, out, rng, (14, 7), lambda: False)
    assert fit_kills >= 10
    train_command.run(settings)
    assert_same_run(out, run)


def kill(running):
    """Kill a script and the processes that it has started, without a chance to say goodbye."""
    running.send_signal(signal.SIGKILL)
    running.communicate()


def flags_for(few, out, **changes):
    return flags_of(SMALL | {"test": few, "out": str(out)} | changes)


def test_killed_by_the_system(run, few, tmp_path):
    """A real kill, then the README's way of going on: the same command again."""
    out = tmp_path / "killed"
    words = flags_for(few, out)
    running = start_script("train.py", words)
    deadline = time.time() + 120
    while not list(out.glob("paths-*")) and time.time() < deadline:
        time.sleep(0.1)
    time.sleep(2)
    kill(running)
    assert (out / "lock").is_file()
    status, _, err = run_script("train.py", words)
    assert status == 0, err
    assert_same_run(out, run)


def test_a_changed_state_is_not_gone_on_from(run, few, tmp_path):
    """A fit.pt with one bit flipped, or of another run, is refused with what to do."""
    out = tmp_path / "out"
    shutil.copytree(run, out)
    settings = small(test=few, out=str(out))
    file = out / "fit.pt"
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    message = "fit.pt: damaged, or another run's: remove it to fit again"
    with pytest.raises(ValueError, match=message):
        train_command.run(settings)
    file.unlink()
    train_command.run(settings)
    assert_same_run(out, run)


# ---------------------------------------------------------------------------------- two processes

TOGETHER = SMALL | {"accumulation": 4, "batch_size": 1, "epochs": 2}


@pytest.fixture(scope="module")
def alone(few, tmp_path_factory):
    """The folder of a run on one process, with steps of four passes."""
    out = tmp_path_factory.mktemp("alone") / "out"
    with pytest.MonkeyPatch.context() as monkeypatch:
        skip_measuring(monkeypatch)
        train_command.run(train_command.Settings(**TOGETHER | {"test": few, "out": str(out)}))
    return out


def assert_same_within_rounding(out, alone):
    """Labels and paths byte for byte, weights within 1e-6; nothing else is left in the folder."""
    names = sorted(str(file.relative_to(alone)) for file in alone.rglob("*"))
    assert sorted(str(file.relative_to(out)) for file in out.rglob("*")) == names
    for name in ("labels.jsonl", *(name for name in names if name.startswith("paths-"))):
        assert (out / name).read_bytes() == (alone / name).read_bytes()
    found = load_file(out / "stop" / "stop.safetensors")
    expected = load_file(alone / "stop" / "stop.safetensors")
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        close(found[name], value, 1e-6)


def test_two_processes_make_the_same_run(alone, few, tmp_path):
    """And only one of them prints."""
    out = tmp_path / "out"
    words = flags_of(TOGETHER | {"test": few, "out": str(out)})
    status, printed, err = run_script("train.py", words, processes=2)
    assert status == 0, err
    assert printed.count("settings: ") == 1
    assert printed.count('"stop": ') == 2 - 1
    assert_same_within_rounding(out, alone)


@pytest.fixture(scope="module")
def broken_off(few, tmp_path_factory):
    """The folder of a run on two processes, of which one was killed while it made paths."""
    out = tmp_path_factory.mktemp("broken") / "out"
    running = start_script("train.py", flags_of(TOGETHER | {"test": few, "out": str(out)}), 2)
    deadline = time.time() + 120
    while not list(out.glob("*.part1")) and time.time() < deadline:
        time.sleep(0.1)
    time.sleep(1)
    children = child_processes(running.pid)
    assert len(children) == 2
    os.kill(children[1], signal.SIGKILL)
    running.communicate(timeout=100)
    assert running.returncode != 0  # torchrun has ended the other one
    return out


@pytest.mark.parametrize("count", (1, 2))
def test_a_run_of_which_one_process_was_killed_goes_on(alone, few, broken_off, tmp_path, count):
    """Started again with one process or with two, the run is the same."""
    out = tmp_path / "out"
    shutil.copytree(broken_off, out)
    words = flags_of(TOGETHER | {"test": few, "out": str(out)})
    status, _, err = run_script("train.py", words, processes=count)
    assert status == 0, err
    assert_same_within_rounding(out, alone)


def child_processes(pid):
    """Ids of a process's children, the first started first."""
    children = pathlib.Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in children]


# --------------------------------------------------------------------------------------- bad input


def test_another_run_in_the_same_folder_is_refused(run, few):
    with pytest.raises(ValueError, match="lr: found 0.001, expected 0.5"):
        train_command.run(small(lr=0.5, test=few, out=str(run)))


def test_other_end_tokens_in_the_same_folder_are_refused(run, few, monkeypatch):
    """As somebody does who corrects them after a warning: rollouts would end elsewhere."""
    open_model = train_command.open_model

    def with_another_end(settings):
        model, tokenizer = open_model(settings)
        model.config.eos_ids = (*model.config.eos_ids, 5)
        return model, tokenizer

    monkeypatch.setattr(train_command, "open_model", with_another_end)
    with pytest.raises(ValueError, match=r"eos_ids: found \[.*\], expected \[.*5\] as asked"):
        train_command.run(small(test=few, out=str(run)))


def test_a_folder_at_work_is_refused(few, tmp_path):
    with locked(tmp_path):
        with pytest.raises(ValueError, match="another process is at work there"):
            train_command.run(small(test=few, out=str(tmp_path)))


@pytest.mark.parametrize("changed, what", (("data", "training problems"), ("labels", "labels")))
def test_other_data_in_the_same_folder_is_refused(run, few, tmp_path, changed, what):
    """The file's name is the same and its content is not: old labels among new ones, or the old
    weights as if new."""
    file = tmp_path / "it.jsonl"
    source = TOY / "train.jsonl" if changed == "data" else run / "labels.jsonl"
    records = read_lines(source)
    settings = small(
        epochs=1, rollouts=1, max_new_tokens=80, prefix="20", low=0, high=8, test=few,
        out=str(tmp_path / "out"), **{changed: str(file)})
    write_lines(file, records[:7])
    train_command.run(settings)
    others = records[1:8]
    if changed == "labels":
        others = [record | {"soft_label": 0.25} for record in records[:7]]
    write_lines(file, others)
    with pytest.raises(ValueError, match=f"settings.json: another run's, the {what} differ"):
        train_command.run(settings)


def test_held_out_problems_are_dropped_and_counted(few, tmp_path, capsys):
    """Told by their text, whatever their id and blanks; the labels are those of the others."""
    tests = read_lines(pathlib.Path(few))
    held_out = []
    for number, record in enumerate(tests):
        text = record["problem"].replace(" ", "  ")
        held_out.append({"id": f"hidden {number}", "problem": text, "answer": record["answer"]})
    records = read_lines(TOY / "train.jsonl")[:5]
    data = write_lines(tmp_path / "data.jsonl", records[:2] + held_out + records[2:])
    settings = small(
        data=str(data), test=few, out=str(tmp_path / "out"), low=0, high=2, paths=2, rollouts=1,
        prefix="20", max_new_tokens=60, epochs=1)
    train_command.run(settings)
    assert "data: 2 problems are held-out ones and were dropped" in capsys.readouterr().out
    names = {record["id"] for record in read_lines(tmp_path / "out" / "labels.jsonl")}
    assert names == {record["id"] for record in records}


def test_data_that_are_all_held_out_are_refused(few, tmp_path):
    with pytest.raises(ValueError, match="data: found no problem"):
        train_command.run(small(data=few, test=few, out=str(tmp_path)))


def test_a_problem_without_an_answer_is_refused(few, tmp_path):
    data = write_lines(tmp_path / "data.jsonl", [{"problem": "What?"}])
    with pytest.raises(ValueError, match="data.jsonl:1: answer"):
        train_command.run(small(data=str(data), test=few, out=str(tmp_path)))


def test_one_problem_cannot_be_split():
    examples = [Example([1], 0.5, "a", None)] * 4
    with pytest.raises(ValueError, match="labels: found 1 problem.*expected several"):
        train.split(examples, 0.1, 0)


def test_no_problem_in_range_is_refused(toy, tmp_path):
    problems = read_problems(TOY / "train.jsonl")[:1]
    settings = small(low=8, high=8)
    with pytest.raises(ValueError, match="data: found no problem with 8 to 8 of 8 paths right"):
        stored.make_labels(toy.model, toy.tokenizer, problems, settings, tmp_path)


def test_a_checkpoint_beyond_the_limit_is_refused(toy, tmp_path):
    problems = read_problems(TOY / "train.jsonl")[:1]
    settings = small(prefix="200", low=0, high=8)
    with pytest.raises(ValueError, match="prefix: found 200, expected less than the limit of 200"):
        stored.make_labels(toy.model, toy.tokenizer, problems, settings, tmp_path)


@pytest.mark.parametrize("changes", (
    {"keep": 3}, {"prefixes": 9}, {"rollouts": -1}, {"epochs": 0}, {"accumulation": 0},
    {"problems": 0}, {"problems": -1}, {"head": "linear"}, {"prefix": "0"}, {"prefix": "4,4"},
    {"low": -1}, {"high": 9}, {"high": 0}, {"validation": 1.0}, {"validation": 0.0},
    {"dropout": 1.0}, {"lr": 0.0}, {"clip": -1.0}, {"warmup": -1}, {"weight_decay": -0.1},
    {"m": 0}, {"rank": 0}, {"alpha": 0.0}, {"batch": 0}, {"cache_gb": -1.0}, {"temperature": -1.0},
    {"top_p": 0.0}), ids=str)
def test_settings_that_cannot_be(few, tmp_path, monkeypatch, changes):
    """Refused by name before a model is loaded, not after hours of supervision."""
    monkeypatch.setattr(train_command, "open_model", None)
    (name,) = changes
    message = f"^{name.replace('top_p', 'top-p')}: found"
    with pytest.raises(ValueError, match=message) as caught:
        train_command.run(small(**changes, test=few, out=str(tmp_path / "out")))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_the_toys_recipe_is_overruled_here():
    """Not a property: the runs of these tests are the same as commands and in this process."""
    content, _ = train_command.recipe({"model": str(TOY)})
    assert content.keys() <= SMALL.keys()


def test_what_comes_first(tmp_path):
    """A flag before the recipe, the recipe before the defaults. A checkpoint may be a number."""
    (tmp_path / "recipe.json").write_text('{"rank": 7, "lr": 0.5, "prefix": 40}')
    content, source = train_command.recipe({"model": str(tmp_path)})
    assert content == {"rank": 7, "lr": 0.5, "prefix": "40"}
    assert source == tmp_path / "recipe.json"
    (tmp_path / "recipe.json").unlink()
    content, _ = train_command.recipe({"model": str(tmp_path)})
    assert content == {}


# ----------------------------------------------------------------------------------- the settings


def test_what_changes_no_result_is_no_part_of_a_run():
    """Rows at a time, the device, kept caches, the folder itself: a run goes on with others. Which
    held-out problems are evaluated is told from these problems, which are a part of it."""
    names = {field.name for field in dataclasses.fields(train_command.Settings)}
    assert set(train_command.NO_PART_OF_A_RUN) <= names
    assert set(train_command.NO_PART_OF_A_RUN) == {
        "batch", "attention", "device", "cache_gb", "out", "plan", "test_problems"}


def test_half_of_the_free_memory_is_for_caches(toy, monkeypatch):
    monkeypatch.setattr(memory, "free_bytes", lambda device: 8e9)
    assert engine_fit.cache_bytes(toy.model, small()) == 4e9
    assert engine_fit.cache_bytes(toy.model, small(cache_gb=0.5)) == 2 ** 29


def test_the_last_line_is_json(run, few, capsys):
    """A finished run, started again, only evaluates again and says where everything is."""
    train_command.run(small(test=few, out=str(run)))
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert last["out"] == str(run)
    assert last["stop"] == str(run / "stop")
    assert {"validation_loss", "auroc", "pairwise", "train_loss", "avg STOP (IV)"} <= set(last)
    assert processes.count() == 1
