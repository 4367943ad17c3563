"""How to spend a budget of labels: the three ways by hand, rows cut from one cache beside whole
passes, rollouts beside `generate`, and the study as it is typed."""
import itertools
import json
import re
import sys
from types import SimpleNamespace

import pytest
import torch
from helpers import ROOT, close, random_ids, random_model
from test_studies import check_refusal, folder, lively, run, write_lines  # noqa: F401 (fixtures)

sys.path.insert(0, str(ROOT / "studies"))
import labels
from commands import train as train_command
from model import load
from plumbing import grading
from plumbing.tokenizer import Tokenizer
from sample import generate, prefill


def study_of(**changes):
    """What labelling looks at of a Study."""
    settings = labels.Settings(**({"prefix": "2,4", "paths": 3, "prefixes": 2} | changes))
    return SimpleNamespace(settings=settings, checkpoints=[2, 4])


def drawn_problem(name, right, rollout_tokens=0):
    """A Drawn problem of three paths of 6, 6 and 3 tokens; the first two agree up to 2."""
    record = {"id": name, "prompt_ids": [9, 9], "right": right,
              "paths": [[1, 2, 3, 4, 5, 6], [1, 2, 4, 4, 5, 6], [7, 7, 7]]}
    successes = {(2, (1, 2)): 4, (4, (1, 2, 3, 4)): 2, (4, (1, 2, 4, 4)): 0}
    return labels.Drawn(record, successes, rollout_tokens)


def test_labels_by_hand():
    """8 rollouts of the first two paths' prefixes, whose prefix at 2 is one; the third path ends
    before 4."""
    drawn = drawn_problem("p", [True, False, True])
    study = study_of()
    found = {}
    for way in labels.WAYS:
        prefixes = labels.labelled_problem(study, drawn, way, first_row=10)
        found[way] = [(prefix.ids[2:], prefix.row, prefix.label) for prefix in prefixes]
    a, b, c, d = [1, 2], [1, 2, 3, 4], [1, 2, 4, 4], [7, 7]
    whole = [7, 7, 7]
    assert found["outcomes"] == [
        (a, 10, 1), (b, 10, 1), (a, 11, 0), (c, 11, 0), (d, 12, 1), (whole, 12, 1)]
    assert found["rollouts"] == [(a, 10, 4 / 8), (b, 10, 2 / 8), (a, 11, 4 / 8), (c, 11, 0)]
    assert found["mixed"] == [
        (a, 10, 5 / 9), (b, 10, 3 / 9), (a, 11, 4 / 9), (c, 11, 0), (d, 12, 1), (whole, 12, 1)]


def test_a_budget_buys_the_first_problems_it_pays_for():
    """15 tokens of paths a problem, 10 of rollouts where there are some; a problem without a wrong
    path is paid for and gives nothing, not even rows."""
    pool = [drawn_problem("a", [True, False, False], 10), drawn_problem("b", [True] * 3),
            drawn_problem("c", [False, False, True], 10), drawn_problem("d", [False, True, True])]
    study = study_of()
    expected = {("outcomes", 45): (45, 3), ("outcomes", 44): (30, 2), ("rollouts", 45): (40, 2),
                ("rollouts", 64): (40, 2), ("mixed", 65): (65, 3)}
    for (way, budget), (tokens, count) in expected.items():
        prefixes, spent, problems = labels.labelled(study, pool, way, budget)
        assert (spent, problems) == (tokens, count)
        staying = [name for name in ("a", "c")[:1 + (count > 2)]]
        assert list(dict.fromkeys(prefix.problem for prefix in prefixes)) == staying
        assert max(prefix.row for prefix in prefixes) == 3 * len(staying) - 1 - (way == "rollouts")


def test_rows_cut_from_one_cache():
    """STOP's logits on prefixes that are parts of rows of a larger cache: those of the prefixes
    read alone. The cache of all paths stays as it is."""
    model = random_model("qwen2")
    stop = lively(model)
    texts = [random_ids(n, seed=n).tolist() for n in (9, 14, 6)]
    with torch.no_grad():
        paths, _ = prefill(model, texts)
    before = [buffer.clone() for buffer in paths.keys + paths.values]
    prefixes = []
    for row, length in ((0, 4), (1, 4), (2, 6), (1, 14), (0, 9)):
        prefixes.append(labels.Prefix(texts[row][:length], length / 20, f"p{row}", length, row))
    cut = labels.CutRows(model, prefixes, 2, stop.m, paths)
    seen = []
    with torch.no_grad():
        for i, batch in enumerate(cut.batches):
            cache, wanted = cut[i]
            alone, _ = prefill(model, [prefix.ids for prefix in batch], stop.m)
            close(stop(model, cache), stop(model, alone), 1e-5)
            assert wanted.tolist() == pytest.approx([len(prefix.ids) / 20 for prefix in batch])
            seen += batch
    assert sorted(len(prefix.ids) for prefix in seen) == [4, 4, 6, 9, 14]
    for buffer, old in zip(paths.keys + paths.values, before):
        assert torch.equal(buffer, old)


@pytest.mark.parametrize("prefixes, epochs", [
    (640, 30),      # 10 steps an epoch: the least number of steps, 300
    (64 * 50, 15),  # 750 steps: the recipe's epochs
    (64 * 100, 12), (64 * 400, 3), (64 * 5000, 1)])  # the most, 1,200; one epoch at least
def test_the_rule_of_epochs(prefixes, epochs):
    recipe = train_command.Settings(epochs=15, batch_size=64, accumulation=1)
    assert labels.epochs_of(prefixes, recipe) == epochs
    halves = train_command.Settings(epochs=15, batch_size=32, accumulation=2)
    assert labels.epochs_of(prefixes, halves) == epochs


@pytest.fixture
def lenient(monkeypatch):
    """A random model has no right path: those with an even number of tokens are called right."""
    def even(text):
        return str(len(text) % 2)

    def is_even(answer, reference, kind):
        return answer == "0"

    monkeypatch.setattr(grading, "extract_answer", lambda text, kind: even(text))
    monkeypatch.setattr(grading, "same_answer", is_even)


def flags(folder, out, budgets, **changes):
    """The study's flags on a tiny model."""
    write_lines(folder / "train.jsonl", [
        {"id": f"t{i}", "problem": f"{i}, {i * 7}?", "answer": i} for i in range(40)])
    recipe = {"rank": 2, "m": 3, "epochs": 2, "lr": 0.05, "batch_size": 8, "accumulation": 1,
              "validation": 0.3, "max_new_tokens": 12}
    (folder / "recipe.json").write_text(json.dumps(recipe))
    given = {"seeds": "0,1", "prefix": "3,5", "paths": 4, "prefixes": 2, "rollouts": 3, "n": 5,
             "keep": 2, "temperature": 2.0, "top_k": 0, "top_p": 1.0} | changes
    argv = ["--model", folder, "--out", out, "--budgets", budgets]
    for name, value in given.items():
        argv += ["--" + name.replace("_", "-"), value]
    return argv


@pytest.fixture
def short(monkeypatch):
    """Fits of a few steps, and blocks of few problems."""
    monkeypatch.setattr(labels, "LEAST_STEPS", 4)
    monkeypatch.setattr(labels, "MOST_STEPS", 6)
    monkeypatch.setattr(labels, "BLOCK", 4)


def test_rollouts_of_prefixes(folder, tmp_path, lenient, short):
    """Right rollouts and their tokens are those of `generate` from the prefix itself."""
    flags(folder, tmp_path, "300")
    settings = labels.Settings(
        model=str(folder), out=str(tmp_path), budgets="300", prefix="3,5", paths=4, prefixes=2,
        rollouts=3, temperature=2.0, top_k=0, top_p=1.0, n=5, keep=2, device="cpu",
        dtype="float32")
    study = labels.open_study(settings)
    pool = labels.make_pool(study, seed=7)
    assert {drawn.record["id"] for drawn in pool} < {f"t{i}" for i in range(40)}
    assert [drawn.record["id"] for drawn in pool] != [f"t{i}" for i in range(len(pool))]
    rolled = [drawn for drawn in pool if drawn.successes]
    assert rolled
    model = load(folder)
    tokenizer = Tokenizer(folder)
    for drawn in rolled:
        assert drawn.stays
        tokens = 0
        for (checkpoint, prefix), successes in drawn.successes.items():
            assert len(prefix) == checkpoint
            prompt = drawn.record["prompt_ids"] + list(prefix)
            (paths,) = generate(model, [prompt], 3, 12 - checkpoint, 2.0, 0, 1.0, seed=7)
            texts = [tokenizer.completion(list(prefix) + path.ids) for path in paths]
            assert successes == sum(len(text) % 2 == 0 for text in texts)
            tokens += sum(len(path.ids) for path in paths)
        assert drawn.rollout_tokens == tokens
        asked = {path[:c].__repr__() for path in drawn.record["paths"][:2] for c in (3, 5)
                 if len(path) > c}
        assert len(drawn.successes) == len(asked)


def test_the_study_as_typed(folder, tmp_path, lenient, short, monkeypatch, run):
    """Every way, budget and seed is a fit of its own; typed again nothing is made again; another
    budget is added to what is there; other settings in the same folder are refused by name."""
    out = tmp_path / "out"
    outcome = run(labels, *flags(folder, out, "300,600"))
    assert outcome.status == 0, outcome.err
    content = json.loads((out / "labels.json").read_text())
    assert len(content["rows"]) == 6
    for row in content["rows"]:
        assert len(row["fits"]) == 2
        for about in row["fits"]:
            assert 0.5 * row["budget"] < about["tokens"] <= row["budget"]
    files = sorted(out.glob("seed-*/*-*00"))
    assert len(files) == 12
    assert len({file.read_bytes() for file in files}) == 12
    dots = re.findall(r"<title>(\w+): ", (out / "labels.svg").read_text())
    assert sorted(dots) == sorted(4 * labels.WAYS)  # 2 budgets, 2 checkpoints
    report = (out / "labels.md").read_text()
    assert report.count("| mixed minus rollouts |") == 2
    assert json.loads(outcome.out[-1]).keys() >= {"out", "outcomes 300", "mixed 600"}

    made = labels.make_pool
    monkeypatch.setattr(labels, "make_pool", None)
    again = run(labels, *flags(folder, out, "600,300"))
    assert again.status == 0, again.err
    assert (out / "labels.md").read_text() == report
    monkeypatch.setattr(labels, "make_pool", made)
    more = run(labels, *flags(folder, out, "300,600,800"))
    assert more.status == 0, more.err
    grown = json.loads((out / "labels.json").read_text())
    assert grown["rows"][:6] == content["rows"]
    other = run(labels, *flags(folder, out, "300", rollouts=4))
    check_refusal(other, "settings.json: rollouts: found 3, expected 4 as asked")


@pytest.mark.parametrize("changes, message", [
    ({"paths": 1, "prefixes": 1}, "paths: found 1, expected at least 2"),
    ({"prefixes": 5}, "prefixes: found 5, expected at most paths = 4"),
    ({"keep": 6}, "keep: found 6, expected at most n = 5"),
    ({"prefix": "3,11"}, "prefix: found 11, expected at most 9"),
    ({"budgets": "0"}, "budgets: found '0', expected positive numbers"),
    ({"seeds": "x"}, "seeds: found 'x', expected whole numbers")])
def test_settings_that_cannot_be_are_refused(folder, tmp_path, run, changes, message):
    budgets = changes.pop("budgets", "300")
    check_refusal(run(labels, *flags(folder, tmp_path, budgets, **changes)), message)


def test_a_budget_beyond_the_problems_is_refused(folder, tmp_path, lenient, short, run):
    outcome = run(labels, *flags(folder, tmp_path, "90000", seeds=0))
    check_refusal(outcome, "data: found 40 problems, whose paths have ")
