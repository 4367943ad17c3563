"""Supervision and fit, on the embedded toy in small: labels, what is trained, kills and restarts, bad input."""
import json
import random
import signal
import subprocess
import sys
import time

import pytest
import torch
from helpers import ROOT, close

import eval
import sample
import task
import train
from model import load
from sample import Tokenizer, generate
from stop import Stop
from task import extract_answer, read_problems, same_answer

SMALL = {"model": str(ROOT / "toy"), "problems": 8, "paths": 8, "low": 1, "high": 7, "prefix": 40, "prefixes": 2,
         "rollouts": 4, "max_new_tokens": 200, "batch": 8, "rank": 2, "epochs": 3, "batch_size": 4, "accumulation": 2,
         "lr": 1e-3, "validation": 0.3, "n": 2, "keep": 1, "device": "cpu", "dtype": "float32"}


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    """Two held-out problems: the evaluation at the end is not what is tested here."""
    file = tmp_path_factory.mktemp("few") / "test.jsonl"
    file.write_text("".join((ROOT / "toy" / "test.jsonl").read_text().splitlines(True)[:2]))
    return str(file)


@pytest.fixture(scope="module")
def run(few, tmp_path_factory):
    """(settings, folder) of one uninterrupted run."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    settings = train.Settings(**SMALL, test=few, out=str(out))
    train.main(settings)
    return settings, out


@pytest.fixture(scope="module")
def toy():
    return load(ROOT / "toy"), Tokenizer(ROOT / "toy")


def records_of(out):
    return [json.loads(line) for line in (out / "labels.jsonl").read_text().splitlines()]


# --------------------------------------------------------------------------------------------------------- supervision


def test_labels_are_the_share_of_right_rollouts(run, toy):
    """Counted again, prefix by prefix, from fresh continuations; problems outside low..high are gone, prefixes are cut."""
    settings, out = run
    model, tokenizer = toy
    problems = {problem.id: problem for problem in read_problems(ROOT / "toy" / "train.jsonl")[:8]}
    paths = {name: generate(model, [tokenizer.ask(problem)], 8, 200)[0] for name, problem in problems.items()}

    def is_right(problem, ids):
        return same_answer(extract_answer(tokenizer.decode(ids)), problem.answer)

    kept = [name for name, group in paths.items() if 1 <= sum(is_right(problems[name], p.ids) for p in group) <= 7]
    records = records_of(out)
    assert [(r["id"], r["path"]) for r in records] == [(name, path) for name in kept for path in range(2)] and kept
    for record in records:
        path, problem = paths[record["id"]][record["path"]], problems[record["id"]]
        assert record["prefix_token_ids"] == path.prompt_ids + path.ids[:40]
        ends = generate(model, [record["prefix_token_ids"]], 4, 160)[0]
        right = sum(is_right(problem, path.ids[:40] + end.ids) for end in ends)
        assert (record["successes"], record["rollouts"], record["soft_label"]) == (right, 4, right / 4)


def test_a_path_that_ends_early_is_its_own_label(toy, tmp_path):
    """With the checkpoint behind most ends, the prefix is the whole path and nothing is rolled out."""
    model, tokenizer = toy
    problems = read_problems(ROOT / "toy" / "train.jsonl")[:3]
    settings = train.Settings(**SMALL | {"prefix": 199, "low": 0, "high": 8})
    train.make_labels(model, tokenizer, problems, settings, tmp_path)
    ended = [r for r in records_of(tmp_path) if r["prefix_token_ids"][-1] in model.config.eos_ids]
    assert len(ended) >= 4 and {r["soft_label"] for r in ended} <= {0.0, 1.0}
    texts = [(r, next(p for p in problems if p.id == r["id"])) for r in ended]
    for record, problem in texts:
        right = same_answer(extract_answer(tokenizer.decode(record["prefix_token_ids"])), problem.answer)
        assert record["soft_label"] == float(right)


# ----------------------------------------------------------------------------------------------------------------- fit


def examples_of(out, model):
    return train.read_labels(out / "labels.jsonl", model, 4)


def test_only_the_module_is_trained(run, toy, tmp_path):
    """Invariant 7: base weights bit-equal and without gradient, the prefix pass builds no graph, every part of STOP moves."""
    settings, out = run
    model, _ = toy
    before = {key: value.clone() for key, value in model.state_dict().items()}
    stop = train.fit(model, examples_of(out, model), settings, tmp_path)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in model.parameters())
    fresh = Stop(model, rank=2, seed=settings.seed).state_dict()
    moved = {key for key, value in stop.state_dict().items() if not torch.equal(value, fresh[key])}
    assert {"tokens", "head.weight", "head.bias"} < moved and any("lora_B" in key for key in moved)
    cache, _ = train.Prefixes(model, examples_of(out, model), settings)[0]
    assert not any(buffer.requires_grad for buffer in cache.keys + cache.values)


def test_a_step_is_the_mean_over_all_its_prefixes(run, toy, tmp_path):
    """Batches of 4 two at a time are batches of 8: same first loss and gradients, also where the last one is ragged."""
    settings, out = run
    model, _ = toy
    examples = sorted(examples_of(out, model), key=lambda example: len(example[0]))[:7]
    seen = []
    for size, accumulation in ((4, 2), (7, 1)):
        own = train.Settings(**SMALL | {"batch_size": size, "accumulation": accumulation, "epochs": 1})
        stop = Stop(model, rank=2)
        torch.nn.init.normal_(stop.head.weight, generator=torch.Generator().manual_seed(1))
        optimizer = torch.optim.SGD(stop.parameters(), lr=1.0)
        before = {key: value.clone() for key, value in stop.state_dict().items()}
        row = train.train_epoch(model, stop, optimizer, train.Prefixes(model, examples, own), own, 0, eval.tqdm(disable=True))
        seen.append((row["train_loss"], {key: before[key] - value for key, value in stop.state_dict().items()}))
    stop.load_state_dict(before)
    logits = torch.stack([train.prefill(model, [ids], 4)[0] and stop(model, train.prefill(model, [ids], 4)[0])[0]
                          for ids, _, _ in examples])
    expected = stop.loss(logits, torch.tensor([label for _, label, _ in examples])).item()
    assert seen[0][0] == pytest.approx(expected, rel=1e-5) and seen[1][0] == pytest.approx(expected, rel=1e-5)
    for key, gradient in seen[0][1].items():
        close(gradient, seen[1][1][key], 1e-4)


def test_the_best_epoch_is_saved(run, toy):
    """What out/stop holds scores the validation loss that its metrics name, and no epoch had a lower one."""
    settings, out = run
    model, _ = toy
    stop = Stop.load(out / "stop", model)
    held = train.Prefixes(model, train.split(examples_of(out, model), settings.validation, settings.seed)[1], settings)
    metrics = stop.trained["metrics"]
    assert train.validate(model, stop, held)["validation_loss"] == pytest.approx(metrics["validation_loss"], rel=1e-5)
    assert torch.load(out / "fit.pt", weights_only=True)["best"] == metrics["validation_loss"]


def test_validation_problems_are_held_out(run, toy):
    examples = examples_of(run[1], toy[0])
    parts = train.split(examples, 0.3, 0)
    assert not {e[2] for e in parts[0]} & {e[2] for e in parts[1]} and sum(map(len, parts)) == len(examples)


@pytest.mark.parametrize("key", train.LABEL_KEYS)
def test_the_authors_records_and_recipe(run, toy, tmp_path, key):
    """Records with only ids and a label under any of their names train, by the released recipe, the same way twice."""
    model, _ = toy
    file = tmp_path / "labels.jsonl"
    file.write_text("".join(json.dumps({"prefix_token_ids": r["prefix_token_ids"], key: r["soft_label"]}) + "\n"
                            for r in records_of(run[1])))
    settings = train.Settings(**SMALL | {"shared": True, "head": "softmax", "targets": "q_proj,v_proj", "dropout": 0.05,
                                         "epochs": 1})
    stops = []
    for name in "ab":
        (tmp_path / name).mkdir()
        stops.append(train.fit(model, train.read_labels(file, model, 4), settings, tmp_path / name).state_dict())
    assert stops[0]["tokens"].shape == (1, 96) and stops[0]["head.bias"].shape == (2,)
    assert {k.split(".")[-3] for k in stops[0] if "lora_A" in k} == {"q_proj", "v_proj"}
    assert all(torch.equal(stops[0][k], stops[1][k]) for k in stops[0])


def test_rates():
    """Warm-up rises in a line, cosine ends near zero, constant stays."""
    settings = train.Settings(**SMALL | {"warmup": 4, "cosine": True, "lr": 1.0})
    rates = [train.learning_rate(step, 100, settings) for step in range(100)]
    assert rates[0] == 0.25 and rates[1] == pytest.approx(0.5, rel=1e-3) and rates[99] < 1e-3
    assert train.learning_rate(99, 100, train.Settings(**SMALL | {"lr": 1.0})) == 1.0


# ------------------------------------------------------------------------------------------------------ killed at will


class Killed(BaseException):
    """What no handler of the program catches: the run is over where it stands."""


def interrupted(settings, monkeypatch, after):
    """Run until `after` decode steps, optimiser steps, file writes and renames; True if it came to its end first."""
    count = 0

    def counted(function):
        def step(*args, **kwargs):
            nonlocal count
            count += 1
            if count > after:
                raise Killed
            return function(*args, **kwargs)
        return step

    with monkeypatch.context() as patch:
        patch.setattr(sample.Batch, "settle", counted(sample.Batch.settle))
        patch.setattr(torch.optim.AdamW, "step", counted(torch.optim.AdamW.step))
        patch.setattr(task.os, "fsync", counted(task.os.fsync))
        patch.setattr(task.os, "replace", counted(task.os.replace))
        patch.setattr(json, "dumps", counted(json.dumps))
        try:
            train.main(settings)
            return True
        except Killed:
            return False


def assert_same_run(out, whole):
    assert (out / "labels.jsonl").read_bytes() == (whole / "labels.jsonl").read_bytes()
    assert (out / "stop" / "stop.safetensors").read_bytes() == (whole / "stop" / "stop.safetensors").read_bytes()


def test_killed_and_started_again(run, few, tmp_path, monkeypatch):
    """Invariant 8: over 20 random kills in both stages, half of them inside a line, then the same labels and weights."""
    rng, out, kills = random.Random(0), tmp_path / "killed", []
    settings = train.Settings(**SMALL, test=few, out=str(out))
    while len(kills) < 60:
        fitting = (out / "fit.pt").is_file()
        if interrupted(settings, monkeypatch, rng.randrange(1, 12 if fitting or len(kills) % 2 else 400)):
            break
        kills.append("fit" if (out / "labels.jsonl").is_file() and len(records_of_whole(out)) == len(records_of(run[1]))
                     else "supervision")
        if rng.random() < 0.5:
            for file in out.glob("*.jsonl"):  # killed in the middle of a line
                with open(file, "a") as opened:
                    opened.write('{"id": "toy-tra')
    else:
        train.main(settings)
    assert len(kills) >= 20 and kills.count("supervision") >= 5 and kills.count("fit") >= 3, kills
    assert_same_run(out, run[1])


def records_of_whole(out):
    return [line for line in (out / "labels.jsonl").read_text().splitlines() if line.endswith("}")]


def test_killed_by_the_system(run, few, tmp_path):
    """Three real kills at random moments, then the README's way of going on: the same command again."""
    rng, out = random.Random(1), tmp_path / "killed"
    command = [sys.executable, "-c", "import torch; torch.set_num_threads(1); import sample, train; "
               "sample.command_line(train.Settings, train.main)"]
    for key, value in (SMALL | {"test": few, "out": str(out)}).items():
        command += ["--" + key.replace("_", "-"), str(value)]
    for _ in range(3):
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(rng.uniform(2.5, 6))
        process.send_signal(signal.SIGKILL)
        process.wait()
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    assert_same_run(out, run[1])


# ----------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("lines, message", (
    (['{"prefix_token_ids": [5], "soft_label": 1.5}'], ":1: soft_label: found 1.5"),
    (['{"prefix_token_ids": [5], "soft_label": 0.5}', '{"prefix_token_ids": [5], "sof'], ":2: not JSON"),
    (['{"prefix_token_ids": [5], "soft_label": null}'], ":1: soft_label: found None"),
    (['{"prefix_token_ids": "5", "soft_label": 0.5}'], ":1: prefix_token_ids"),
    (['{"prefix_token_ids": [99999], "soft_label": 0.5}'], ":1: .*99999.*vocabulary"),
    (['{"soft_label": 0.5}'], ":1: prefix_token_ids"), ([], "found no record"), (["[1]"], ":1: found list")))
def test_bad_labels(toy, tmp_path, lines, message):
    file = tmp_path / "labels.jsonl"
    file.write_text("".join(line + "\n" for line in lines))
    with pytest.raises(ValueError, match=message):
        train.read_labels(file, toy[0], 4)


def test_bad_runs(run, toy, tmp_path, few):
    """Other settings in the same folder, a held-out problem in the data, a problem without answer, one problem only."""
    settings, out = run
    with pytest.raises(ValueError, match="lr: found 0.001, expected 0.5"):
        train.main(train.Settings(**SMALL | {"lr": 0.5}, test=few, out=str(out)))
    with pytest.raises(ValueError, match="toy-test-0001.*held-out"):
        train.main(train.Settings(**SMALL, data=few, test=few, out=str(tmp_path / "a")))
    data = tmp_path / "data.jsonl"
    data.write_text('{"problem": "What?"}\n')
    with pytest.raises(ValueError, match="data.jsonl:1: answer"):
        train.main(train.Settings(**SMALL, data=str(data), out=str(tmp_path / "b")))
    with pytest.raises(ValueError, match="1 problem, expected several"):
        train.split([([1], 0.5, "a")] * 4, 0.1, 0)
    with pytest.raises(ValueError, match="prefix: found 200"):
        train.make_labels(*toy, read_problems(ROOT / "toy" / "train.jsonl")[:1],
                          train.Settings(**SMALL | {"prefix": 200, "low": 0, "high": 8}), tmp_path)


def test_a_recipe_with_an_unknown_key(tmp_path):
    (tmp_path / "recipe.json").write_text('{"learning_rate": 1}')
    with pytest.raises(ValueError, match="recipe.json: learning_rate"):
        train.recipe({"model": str(tmp_path)})


# ------------------------------------------------------------------------------------------------------- the evaluation


def test_metrics():
    """Against pairs counted by hand."""
    scores, positive = [0.1, 0.4, 0.4, 0.8, 0.2], [False, True, False, True, False]
    pairs = [(0.4, 0.1), (0.4, 0.4), (0.4, 0.2), (0.8, 0.1), (0.8, 0.4), (0.8, 0.2)]
    assert eval.auroc(scores, positive) == pytest.approx(sum((a > b) + 0.5 * (a == b) for a, b in pairs) / 6)
    assert eval.pairwise_accuracy([1, 2, 3, 1], [0.0, 0.5, 0.2, 0.9], ["a", "a", "a", "b"]) == pytest.approx(2 / 3)
    assert eval.pairwise_accuracy([1, 2], [0, 1], "ab") != eval.pairwise_accuracy([1, 2], [0, 1], "ab")  # nan: no pair
    mean, low, high = eval.interval([0.0, 1.0] * 50)
    assert mean == 0.5 and 0.35 < low < 0.45 < 0.55 < high < 0.65 and eval.interval([1, 2, 3]) == eval.interval([1, 2, 3])
    assert eval.select([0.5, 0.9, 0.9, 0.1], 2) == [1, 2] and eval.select([0.5] * 3, 2) == [0, 1]


def test_confidence_token_by_token(toy):
    """Mean log-probability and minus mean entropy, from one growing pass per path, a short path among them."""
    model, tokenizer = toy
    prompt = tokenizer.ask(read_problems(ROOT / "toy" / "test.jsonl")[0])
    paths = [path.ids for path in generate(model, [prompt], 3, 60)[0]] + [[7]]
    found = eval.confidence(model, [{"prompt_ids": prompt, "paths": paths}], 25, batch=3)
    for row, path in zip(found, paths):
        logs, entropies = [], []
        for t, token in enumerate(path[:25]):
            p = model.logits(model(torch.tensor([prompt + path[:t]]))[0, -1]).softmax(-1)
            logs.append(p[token].log().item())
            entropies.append(-(p * p.log()).sum().item())
        assert row[0] == pytest.approx(sum(logs) / len(logs), abs=1e-4)
        assert row[1] == pytest.approx(-sum(entropies) / len(entropies), abs=1e-4)


def test_the_report(toy):
    """A table by hand: two problems, four paths, scores that are known; tokens as the paper counts them."""
    class Known:
        def score(self, model, prefixes, batch, bar):
            return torch.tensor([0.9, 0.1, 0.8, 0.2, 0.3, 0.9, 0.3, 0.8])

    problems = [task.Problem("a", "?", "1"), task.Problem("b", "?", "2")]
    records = [{"prompt_ids": [5, 6], "paths": [[7] * 10, [7] * 20, [7] * 30, [7] * 2], "answers": ["1", "3", "1", None],
                "right": [True, False, True, False]},
               {"prompt_ids": [5], "paths": [[7] * 8] * 4, "answers": ["2", "4", "2", "4"], "right": [True, False] * 2}]
    report = eval.evaluate(toy[0], Known(), problems, records, 5, 2)
    row = report["rows"]["STOP (IV)"]
    assert row["avg"][0] == 0.5 and row["gain"][0] == 0.0 and row["cons"][0] == 0.5 and report["pass"] == 1.0
    spent = 3 * 5 + 2 + (10 - 5) + (30 - 5) + 4 * 5 + 2 * 3  # checkpoints, then the kept to their end
    assert row["saved"] == pytest.approx(1 - spent / (62 + 32))
    assert report["rows"]["all 4"]["cons"][0] == 1.0 and "| STOP (IV) | 0.500" in eval.table(report)


def test_stored_paths(toy, tmp_path):
    """Interrupted sampling goes on to the same file; another seed makes another file."""
    problems = read_problems(ROOT / "toy" / "test.jsonl")[:3]
    settings = dict(n=4, max_new_tokens=150, temperature=0.6, top_k=40, top_p=0.95, seed=0, batch=8)
    whole = eval.sample_paths(*toy, problems, tmp_path, **settings)
    (file,) = tmp_path.iterdir()
    content = file.read_bytes()
    file.write_bytes(content[:len(content) // 2])
    assert eval.sample_paths(*toy, problems, tmp_path, **settings) == whole and file.read_bytes() == content
    eval.sample_paths(*toy, problems, tmp_path, **settings | {"seed": 1})
    assert len(list(tmp_path.iterdir())) == 2
