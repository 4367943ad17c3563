"""Plans for a budget: plan.json, paths grown together beside runs one by one, the choice, the
ceiling on data whose truth is known, and the scripts."""
import csv
import dataclasses
import json
import math
import random
import shutil
import sys

import numpy as np
import pytest
import torch
from helpers import (
    ROOT, call_script, random_ids, random_model, random_stop, raw_config, write_checkpoint,
    write_lines, write_tokenizer)

from baselines import confidence
from commands import eval as eval_command
from commands import stop as stop_command
from engine.budget import by_guideline
from engine.stored import stop_digest
from model import load
from plumbing.answers import extract_answer, same_answer
from plumbing.budget_plan import (
    BudgetPlan, Stage, parse_cascade, plan_for, read_plans, validate_stages, write_plans)
from plumbing.problems import Problem, read_problems
from plumbing.tokenizer import Tokenizer
from sample import Sampling, generate
from stop import Stop, launch_check_resume, retention, vote

sys.path.insert(0, str(ROOT / "studies"))
import budget
import ceiling
import shared
import forest
from forest import Plan

EXPECTED = {"tokens": 100.5, "avg": 0.25, "cons": 0.5, "weighted": 0.5, "pass": 1.0}
TEXTS = (  # plans that share some stretches and not others
    (12, "4:8"), (12, "4:3"), (8, "4:3x2"), (12, "4:3x2"), (12, "4:3x4"), (12, "8:2x4"),
    (12, "4:6,8:2x2"), (12, "4:3x4,8:3x2"), (12, "2:4x2,4:4x2,8:3"), (6, "8:6"))


def plan_of(n, text):
    return Plan(n, tuple(parse_cascade(text)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint directory whose paths end early and late, with a STOP and eight problems."""
    raw = raw_config("qwen2", vocab_size=256, eos_token_id=list(range(0, 256, 9)))
    folder = write_checkpoint(tmp_path_factory.mktemp("budget") / "it", raw)
    write_tokenizer(folder)
    stop = random_stop(load(folder))
    stop.save(folder / "stop", {"settings": {"prefix": "8,4", "max_new_tokens": 24}})
    problems = [{"id": f"p{i}", "problem": f"{i}?", "answer": str(i)} for i in range(8)]
    write_lines(folder / "test.jsonl", problems)
    return folder


@pytest.fixture(scope="module")
def house(folder):
    """Its model, tokenizer, STOP and problems."""
    model = load(folder)
    stop = Stop.load(folder / "stop", model)
    problems = read_problems(folder / "test.jsonl")
    return forest.Field(model, Tokenizer(folder), stop, problems, 24, folder / "measured")


# --------------------------------------------------------------------------------------- plan.json


def test_plans_are_read_as_they_were_written(tmp_path):
    plans = [BudgetPlan(100, 4, (Stage(8, 2, 1),), EXPECTED),
             BudgetPlan(300, 20, (Stage(24, 6, 4), Stage(80, 2, 4)), EXPECTED)]
    write_plans(tmp_path, "abc", {"by": "hand"}, plans)
    assert read_plans(tmp_path, "abc") == plans
    assert json.loads((tmp_path / "plan.json").read_text())["plans"][1]["stages"] == "24:6x4,80:2x4"
    assert str(plans[1]) == "20 paths, 24:6x4,80:2x4"
    assert read_plans(tmp_path / "elsewhere", "abc") is None
    with pytest.raises(ValueError, match="plan.json: stop: found 'abc', expected 'xyz'"):
        read_plans(tmp_path, "xyz")


def test_the_plan_of_the_largest_budget_that_fits(tmp_path):
    plans = [BudgetPlan(size, 4, (Stage(8, 2),), EXPECTED) for size in (100, 300, 900)]
    for asked, expected in ((100, 100), (299, 100), (300, 300), (10 ** 9, 900)):
        assert plan_for(plans, asked, tmp_path).budget == expected
    with pytest.raises(ValueError, match=r"budget: found 99, expected at least 100.*plan.json"):
        plan_for(plans, 99, tmp_path)


@pytest.mark.parametrize("key, value, complaint", (
    ("budget", None, r"plans\[1\]: budget: found None, expected a positive integer"),
    ("budget", 5, r"plans: found budgets \[100, 5\], expected rising"),
    ("budget", 2.5, "budget: found 2.5, expected a positive integer"),
    ("n", 0, "n: found 0, expected a positive integer"),
    ("n", True, "n: found True, expected a positive integer"),
    ("n", 1, "stages: keep: found 2, expected 1 to 1"),
    ("stages", 8, "stages: found 8, expected text"),
    ("stages", "", "stages: cascade: found '', expected checkpoint:keep"),
    ("stages", "8:2x0", "stages: branch: found 0, expected at least 1"),
    ("stages", "8:2,8:1", "stages: prefix: found 8, expected 9 to"),
    ("stages", "8:2\n", "stages: cascade: found"),
    ("stages", "8:1x3,9:4", "stages: keep: found 4, expected 1 to 3"),
    ("avg", 1.5, r"avg: found 1.5, expected a share in \[0, 1\]"),
    ("weighted", "much", "weighted: found 'much', expected a share"),
    ("pass", math.nan, "pass: found nan, expected a share"),
    ("tokens", None, "tokens: found None, expected a number of tokens"),
    ("tokens", 10 ** 400, "tokens: found 1000.*, expected a number of tokens"),
    ("tokens", math.inf, "tokens: found inf, expected a number of tokens"),
    ("n", 10 ** 400, "n: found 1000.*, expected a positive integer of 32 bits")))
def test_a_broken_plan_is_refused_in_one_line(tmp_path, key, value, complaint):
    plans = [BudgetPlan(size, 4, (Stage(8, 2),), EXPECTED) for size in (100, 300)]
    write_plans(tmp_path, "abc", {}, plans)
    content = json.loads((tmp_path / "plan.json").read_text())
    content["plans"][1][key] = value
    (tmp_path / "plan.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=complaint) as caught:
        read_plans(tmp_path, "abc")
    assert "\n" not in str(caught.value) and "plan.json" in str(caught.value)


@pytest.mark.parametrize("plans", (None, [], {}, [3], "x"))
def test_a_plan_file_without_plans_is_refused(tmp_path, plans):
    (tmp_path / "plan.json").write_text(json.dumps({"stop": "abc", "plans": plans}))
    with pytest.raises(ValueError, match="plan.json: plans"):
        read_plans(tmp_path, "abc")


def test_stages_must_fit_the_limit():
    validate_stages([Stage(8, 2, 4), Stage(12, 8)], 2, 13)
    with pytest.raises(ValueError, match="prefix: found 12, expected 9 to 11"):
        validate_stages([Stage(8, 2, 4), Stage(12, 8)], 2, 12)


# ----------------------------------------------------------------------------- paths grown together


def real_run(house, prompt, plan, seed):
    """The paths that one plan alone gives."""
    return launch_check_resume(
        house.model, house.stop, prompt, plan.n, stages=list(plan.stages),
        max_new_tokens=house.limit, seed=seed, temperature=1.0, top_k=0, top_p=1.0)


def by_hand(problem, tokenizer, paths):
    """forest.VALUES of a run's paths, but for steps and rows."""
    finished = sorted((path for path in paths if path.status != "pruned"),
                      key=lambda path: (-path.score, path.index, path.branches))
    answers = [extract_answer(tokenizer.completion(path.ids), problem.kind) for path in finished]
    right = [same_answer(answer, problem.answer) for answer in answers]
    scores = [path.score for path in finished]
    return {
        "tokens": sum(len(path.ids) - path.inherited for path in paths),
        "avg": sum(right) / len(right),
        "cons": float(same_answer(vote(answers), problem.answer)),
        "weighted": float(same_answer(vote(answers, scores), problem.answer)),
        "pass": float(any(right))}


@pytest.mark.parametrize("seed", (0, 1))
def test_plans_grown_together_are_the_runs_one_by_one(house, seed):
    """Every plan gets the paths, the scores and the tokens of a run of its own, branches
    included."""
    plans = [plan_of(n, text) for n, text in TEXTS]
    prompts = [house.tokenizer.ask(problem) for problem in house.problems[:3]]
    sampling = Sampling(1.0, 0, 1.0, seed)
    signal = forest.StopSignal(house.model, house.stop)
    trees = forest.grow(house.model, signal, prompts, plans, house.limit, sampling, house.stop.m)
    for prompt, tree in zip(prompts, trees):
        for plan in plans:
            expected = real_run(house, prompt, plan, seed)
            kept = {path.name: path for path in expected if path.status != "pruned"}
            found = [tree.paths[number] for number in tree.alive[plan]]
            assert sorted(path.ids for path in found) == sorted(path.ids for path in kept.values())
            weights = sorted(path.score for path in kept.values())
            assert np.allclose(sorted(tree.weights[plan]), weights, atol=1e-5)
            start = plan.stages[-1].checkpoint
            tokens = tree.stretch(plan, start, math.inf).sum()
            spent = sum(len(path.ids) - path.inherited for path in expected)
            assert tree.tokens[plan] + tokens == spent, plan
    lengths = {path.status for tree in trees for path in tree.paths}
    assert {"eos", "running"} & lengths and any(len(path.ids) <= 4 for path in trees[0].paths)


class Digits:
    """A tokenizer whose texts have an answer: a digit that depends on all tokens, or none."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def ask(self, problem):
        return self.tokenizer.ask(problem)

    def completion(self, ids):
        digit = sum(ids) % 5
        return "no answer" if digit == 4 else "\\boxed{%s}" % ("0", "1", "1.0", "2/1")[digit]


def test_what_plans_are_worth(house, tmp_path):
    """Votes, shares and tokens of the stored measurement, beside stop.vote and same_answer on runs
    of their own; the second time it is read."""
    plans = [plan_of(n, text) for n, text in TEXTS]
    field = dataclasses.replace(house, tokenizer=Digits(house.tokenizer), folder=tmp_path,
                                problems=[Problem(f"q{i}", f"{i}?", str(i % 3)) for i in range(6)])
    signal = forest.StopSignal(house.model, house.stop)
    sampling = Sampling(1.0, 0, 1.0, 3)
    values = forest.measure(field, signal, plans, sampling)
    assert values.shape == (6, len(plans), len(forest.VALUES))
    right = 0
    for i, problem in enumerate(field.problems):
        for j, plan in enumerate(plans):
            paths = real_run(house, field.tokenizer.ask(problem), plan, 3)
            expected = by_hand(problem, field.tokenizer, paths)
            found = dict(zip(forest.VALUES, values[i, j]))
            for name, value in expected.items():
                assert found[name] == pytest.approx(value), (name, plan, problem)
            right += expected["cons"]
    assert 10 < right < 50, "votes that are right, and votes that are wrong"
    again = forest.measure(field, signal, plans, sampling)
    assert (again == values).all() and len(list(tmp_path.glob("*.jsonl"))) == 1


def test_steps_and_checked_rows(house):
    """What the cost model is fed: the longest path's steps, and rows at every check; a path that
    had ended before is not checked again."""
    plan = plan_of(12, "4:3x4,8:3x2")
    signal = forest.StopSignal(house.model, house.stop)
    prompt = house.tokenizer.ask(house.problems[0])
    (tree,) = forest.grow(
        house.model, signal, [prompt], [plan], house.limit, Sampling(1.0, 0, 1.0, 0), house.stop.m)
    paths = real_run(house, prompt, plan, 0)
    longest = max(len(path.ids) for path in paths)
    after_first = sum(len(path.branches) > 0 and path.inherited in (0, 4) for path in paths)
    assert tree.checked[plan] == 12 + after_first
    assert tree.steps[plan] + tree.stretch(plan, 8, math.inf).max() == longest


def test_without_a_check_all_paths_are_whole(house):
    prompts = [house.tokenizer.ask(house.problems[0])]
    sampling = Sampling(1.0, 0, 1.0, 0)
    signal = forest.StopSignal(house.model, house.stop)
    plans = [Plan(5, ()), plan_of(12, "4:2")]
    (tree,) = forest.grow(house.model, signal, prompts, plans, house.limit, sampling, house.stop.m)
    whole = generate(house.model, prompts, 5, house.limit, 1.0, 0, 1.0, 0)[0]
    assert [tree.paths[i].ids for i in tree.alive[plans[0]]] == [path.ids for path in whole]
    assert tree.stretch(plans[0], 0, math.inf).sum() == sum(len(path.ids) for path in whole)


def test_minus_entropy_is_that_of_the_baseline(house):
    """Also of paths that ended before the check."""
    prompts = [house.tokenizer.ask(house.problems[0])]
    sampling = Sampling(1.0, 0, 1.0, 0)
    plan = plan_of(12, "8:12")
    (tree,) = forest.grow(
        house.model, forest.EntropySignal(), prompts, [plan], house.limit, sampling, house.stop.m)
    paths = [path.ids for path in tree.paths]
    assert any(len(path) < 8 for path in paths)
    record = {"prompt_ids": prompts[0], "paths": paths}
    expected = confidence(house.model, [record], 8)["minus entropy (III)"]
    assert np.allclose(tree.weights[plan], expected, atol=1e-5)


def test_worse_signals():
    """Upside down keeps the worst; noise leaves a chance a chance and its order likely; random is
    uniform and deaf to the score."""
    scores = torch.linspace(0.01, 0.99, 500, dtype=torch.float64)
    noise = torch.rand(500, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(forest.upside_down(scores, noise).argsort(), scores.flip(0).argsort())
    blurred = forest.blurred(1.0)(scores, noise)
    shift = torch.logit(blurred) - torch.logit(scores)
    assert abs(shift.mean()) < 0.15 and abs(shift.std() - 1) < 0.1
    assert 0 < blurred.min() and blurred.max() < 1
    assert torch.equal(forest.at_random(scores, noise), noise)


# --------------------------------------------------------------------------------------- the choice


def made_up(plans, seed=0, problems=40):
    """A budget.Measured of random values, with tokens near 100, 200, 300, ..."""
    generator = np.random.default_rng(seed)
    values = generator.random((problems, 2, len(plans), len(forest.VALUES)))
    values[..., 0] = 100 * np.arange(1, len(plans) + 1) + generator.normal(size=values.shape[:3])
    return budget.Measured(plans, values, None)


def test_the_best_plan_that_fits():
    """Of the plans within the budget the best by the criterion; a tie goes to avg."""
    plans = [plan_of(n, text) for n, text in TEXTS[:6]]
    known = made_up(plans)
    for limit in (150, 350, 650):
        fitting = [i for i in range(6) if 100 * (i + 1) < limit]
        best = max(fitting, key=lambda i: known.column("weighted")[..., i].mean())
        assert known.best(limit, "all plans", "weighted") == plans[best]
    assert known.best(50, "all plans", "weighted") is None
    weighted = known.values[..., forest.VALUES.index("weighted")]
    weighted[:] = 0.5
    best = max(range(6), key=lambda i: known.column("avg")[..., i].mean())
    assert known.best(1000, "all plans", "weighted") == plans[best]


def test_a_plan_that_may_exceed_the_budget_does_not_fit():
    """The upper end of the mean's interval counts, not the mean."""
    known = made_up([plan_of(*TEXTS[0])])
    mean = known.costs.mean()
    error = known.costs.mean(1).std(ddof=1) / math.sqrt(40)
    assert not len(known.fitting(mean + 1.9 * error)) and len(known.fitting(mean + 2.0 * error))


def test_families():
    plans = {"12 @ 4:8": 4, "12 @ 4:6,8:4": 2, "12 @ 4:3x2": 2, "12 @ 4:3x4,8:3x2": 1}
    for name, count in plans.items():
        n, text = name.split(" @ ")
        found = [budget.in_family(plan_of(int(n), text), family) for family in budget.FAMILIES]
        assert sum(found) == count and found[-1], name


def test_the_grid_keeps_to_the_tokens():
    """Every plan once, can be run, and takes about what was asked for; the toy's best by hand are
    in it."""
    plans = budget.grid(64, [40, 24, 56, 80], 350, 3300, 121)
    assert len(set(plans)) == len(plans) > 300
    for plan in plans:
        validate_stages(plan.stages, plan.n, 240)
        assert 350 <= budget.expected_tokens(plan, 121) <= 3300
    for n, text in ((20, "80:2x4"), (36, "80:8"), (36, "80:4"), (48, "56:8"), (24, "40:6x4,80:2x4"),
                    (24, "40:12,80:8"), (12, "24:3x4,56:3x4,80:2x4")):
        assert plan_of(n, text) in plans, text
    assert budget.expected_tokens(plan_of(20, "80:2x4"), 121) == 20 * 80 + 8 * 41
    assert budget.expected_tokens(plan_of(24, "40:6x4,80:2x4"), 121) == 24 * 40 + 24 * 40 + 8 * 41


def test_the_guideline_spends_the_budget():
    """Worked with a retention that keeps several: N paths of the prefix and gamma N of the rest."""
    share = retention(158 * 1024, 2048, 8650)
    launched, kept = by_guideline(158 * 1024, 2048, 8650)
    assert launched * 2048 + kept * (8650 - 2048) == pytest.approx(158 * 1024, rel=0.03)
    assert kept / launched == pytest.approx(share, abs=0.5 / launched)
    assert by_guideline(158 * 1024, 2048, 8650, 10) == (10, 1)
    for tokens in (10, 300, 5000, 8649):
        with pytest.raises(ValueError, match=f"budget: found {tokens}, expected at least 8650"):
            by_guideline(tokens, 2048, 8650)
    assert by_guideline(8650, 2048, 8650) == (1, 1)


def test_what_the_guideline_launches_never_costs_more_than_the_budget():
    """Over many budgets, checkpoints, usual lengths and largest numbers; and what it leaves would
    not pay for one path more."""
    generator = random.Random(0)
    for _ in range(20_000):
        prefix = generator.randint(1, 10 ** generator.randint(1, 5))
        task = generator.randint(1, 10 ** generator.randint(1, 5))
        tokens = generator.randint(1, 10 ** generator.randint(1, 9))
        most = generator.choice((math.inf, generator.randint(1, 100)))
        if tokens < max(prefix, task):
            with pytest.raises(ValueError, match="^budget: found"):
                by_guideline(tokens, prefix, task, most)
            continue
        launched, kept = by_guideline(tokens, prefix, task, most)
        assert 1 <= kept <= launched <= most
        assert launched * prefix + kept * max(0, task - prefix) <= tokens
    assert budget.without_pruning(1000, 120, 64) == Plan(8, ())


def test_seconds_of_a_plan():
    costs = budget.CostModel(prompt=1.0, step=0.1, token=0.01, check=0.5, row=0.001)
    values = np.zeros((1, 1, 1, len(forest.VALUES)))
    values[..., :3] = (2000, 120, 36)  # tokens, steps, rows checked
    assert costs.seconds(values, np.array([2])) == pytest.approx(1 + 12 + 20 + 1 + 0.036)


def test_the_halves_share_no_problem(house):
    first, second = budget.halves(dataclasses.replace(house, problems=house.problems[:7]))
    assert len(first.problems) == 4 and len(second.problems) == 3
    assert first.problems + second.problems == house.problems[:7]


# ------------------------------------------------------------------------------------- the ceiling


def synthetic(generator, kind, K, problems=100, n=64):
    """Successes of K rollouts, groups of equal prefixes, and the true mean of the best 8."""
    counts = []
    groups = []
    truth = []
    for _ in range(problems):
        different = int(generator.integers(8, 40))
        if kind == "beta":
            middle = generator.beta(1, 4)
            chances = generator.beta(4 * middle + 0.05, 4 * (1 - middle) + 0.05, different)
        else:
            hopeless = generator.random(different) < 0.5
            chances = np.where(hopeless, 0.01, generator.beta(2, 4, different))
        x = generator.binomial(K, chances)
        which = generator.integers(0, different, n)
        firsts = {}
        groups.append([firsts.setdefault(prefix, i) for i, prefix in enumerate(which)])
        counts.append(x[which])
        truth.append(np.sort(chances[which])[-8:].mean())
    return np.array(counts), np.array(groups), float(np.mean(truth))


@pytest.mark.parametrize("kind", ("beta", "many hopeless"))
@pytest.mark.parametrize("K", (16, 32))
def test_the_ceiling_takes_the_noise_out(kind, K):
    """Known chances: the estimate is within .02, where counting the same rollouts is too high and
    halving them too low."""
    counts, groups, truth = synthetic(np.random.default_rng(7), kind, K)
    known = ceiling.Ceiling(counts, groups, K)
    estimate = known.reach(64, 8).mean()
    halves = known.halves(64, 8).mean()
    naive = known.naive(64, 8).mean()
    assert abs(estimate - truth) < 0.02
    assert halves < truth - 0.01 and naive > truth + 0.01
    assert abs(estimate - truth) < min(truth - halves, naive - truth)


def test_many_rollouts_leave_no_doubt():
    """K large: ceiling, halves and naive are all the truth."""
    counts, groups, truth = synthetic(np.random.default_rng(7), "beta", 4000, problems=20)
    known = ceiling.Ceiling(counts, groups, 4000)
    for found in (known.reach(64, 8), known.halves(64, 8), known.naive(64, 8)):
        assert found.mean() == pytest.approx(truth, abs=0.012)


def test_halves_are_honest():
    """Prefixes of one chance: no choice can be better than any, and halving says so."""
    generator = np.random.default_rng(0)
    chances = generator.beta(1, 3, 200)
    counts = generator.binomial(16, chances[:, None], (200, 32))
    groups = np.tile(np.arange(32), (200, 1))
    known = ceiling.Ceiling(counts, groups, 16)
    assert known.halves(32, 4).mean() == pytest.approx(chances.mean(), abs=0.01)
    assert known.naive(32, 4).mean() > chances.mean() + 0.1


def test_the_value_of_a_score_and_its_share():
    counts = np.array([[0, 4, 2, 0], [4, 0, 0, 0]])
    known = ceiling.Ceiling(counts, np.tile(np.arange(4), (2, 1)), 4)
    scores = np.array([[0.1, 0.9, 0.8, 0.2], [0.1, 0.2, 0.3, 0.4]])
    assert known.value(scores, 2).tolist() == [0.75, 0.0]
    share = ceiling.share_of_the_way(np.full(9, 0.2), np.full(9, 0.3), np.full(9, 0.4))
    assert tuple(share) == pytest.approx((0.5, 0.5, 0.5))


def test_equal_prefixes():
    paths = [[1, 2, 3], [1, 2, 4], [1, 3, 3], [1, 2]]
    assert ceiling.distinct(paths, 2) == [0, 0, 2, 0]
    assert ceiling.distinct(paths, 3) == [0, 1, 2, 3]


# ------------------------------------------------------------------------------------- the scripts


FLAGS = (
    "--device", "cpu", "--dtype", "float32", "--temperature", 1.0, "--top-k", 0, "--top-p", 1.0)


def small_grid(monkeypatch):
    """A grid for paths of 24 tokens."""
    monkeypatch.setattr(budget, "LAUNCHED", (4, 8, 12))
    monkeypatch.setattr(budget, "LAUNCHED_BEFORE_MORE", (8,))


def study(monkeypatch, capsys, folder, *words):
    """studies/budget.py's (status, last line or "", stderr)."""
    small_grid(monkeypatch)
    status, out, err = call_script(
        monkeypatch, capsys, budget, "--model", folder, *FLAGS, "--n", 12, "--keep", 3,
        "--budgets", "60,120", "--seeds", "0,2", *words)
    return status, out, err


def test_the_study_from_its_command_line(monkeypatch, capsys, folder, tmp_path):
    """Tables, CSV and plan.json; the plan is then run by stop.py and by eval.py."""
    out = tmp_path / "out"
    stop_at = tmp_path / "stop"
    Stop.load(folder / "stop", load(folder)).save(stop_at)
    status, printed, err = study(
        monkeypatch, capsys, folder, "--stop", stop_at, "--out", out, "--write")
    assert status == 0, err
    last = json.loads(printed.splitlines()[-1])
    assert last["out"] == str(out) and {"default", "60", "120"} <= last.keys()
    assert "| 120 | all plans | STOP |" in printed and "upside down" in printed
    assert "no pruning" in (out / "budget.svg").read_text()
    rows = list(csv.DictReader((out / "budget.csv").open()))
    sources = {row["source"] for row in rows}
    assert {"no pruning", "paper's default", "paper's guideline", *budget.FAMILIES} >= sources
    assert any(row["signal"] == "minus entropy" for row in rows)

    content = json.loads((stop_at / "plan.json").read_text())
    assert [plan["budget"] for plan in content["plans"]] == [60, 120]
    for plan in content["plans"]:
        (row,) = [row for row in rows if row["budget"] == str(plan["budget"])
                  and row["source"] == "all plans" and row["signal"] == "STOP"]
        assert row["plan"] == f"{plan['n']} @ {plan['stages']}"
        assert float(row["tokens"]) == pytest.approx(plan["tokens"], abs=1e-3)

    words = ("--model", folder, "--stop", stop_at, *FLAGS)
    status, printed, err = call_script(
        monkeypatch, capsys, stop_command, *words, "--prompt", "0?", "--budget", 119,
        "--max-new-tokens", 24)
    assert status == 0, err
    plan = content["plans"][0]
    assert "plan for 60 tokens, the largest listed that 119 allows" in printed
    assert f": {plan['n']} paths, {plan['stages']};" in printed
    assert json.loads(printed.splitlines()[-1])["n"] == plan["n"]
    status, _, err = call_script(
        monkeypatch, capsys, stop_command, *words, "--prompt", "0?", "--budget", 59)
    assert status == 2 and "found 59, expected at least 60" in err
    status, _, err = call_script(
        monkeypatch, capsys, stop_command, *words, "--prompt", "0?", "--budget", 60, "--n", 7)
    assert status == 2 and "n: found 7, expected none beside --budget" in err


def test_without_a_plan_the_guideline_is_taken_and_said(monkeypatch, capsys, folder):
    status, printed, err = call_script(
        monkeypatch, capsys, stop_command, "--model", folder, *FLAGS, "--prompt", "0?", "--n", 8,
        "--budget", 100, "--task-length", 24, "--max-new-tokens", 24)
    assert status == 0, err
    assert "no plan.json in" in printed and "guideline: keep" in printed
    assert json.loads(printed.splitlines()[-1])["n"] == 8
    for budget_asked in (100, 300):
        status, printed, err = call_script(
            monkeypatch, capsys, stop_command, "--model", folder, *FLAGS, "--prompt", "0?",
            "--budget", budget_asked, "--prefix", 4, "--max-new-tokens", 24)
        assert status == 0, err
        last = json.loads(printed.splitlines()[-1])
        assert last["n"] == by_guideline(budget_asked, 4, 24)[0]  # the limit is the usual length
        assert last["tokens"] <= budget_asked
    status, _, err = call_script(
        monkeypatch, capsys, eval_command, "--model", folder, *FLAGS, "--n", 8, "--keep", 2,
        "--budget", 100)
    assert status == 2 and "budget: found no plan.json" in err


def test_the_choice_does_not_see_the_other_half(monkeypatch, capsys, folder, tmp_path):
    """Other problems in the second half: the same plans."""
    problems = read_problems(folder / "test.jsonl")
    plans = []
    for name, moved in (("one", 0), ("two", 100)):
        records = []
        for i, problem in enumerate(problems):
            number = i if i < 4 else i + moved
            records.append({"id": f"p{number}", "problem": f"{number}?", "answer": problem.answer})
        data = write_lines(tmp_path / f"{name}.jsonl", records)
        status, _, err = study(monkeypatch, capsys, folder, "--data", data, "--no-compare",
                               "--out", tmp_path / name)
        assert status == 0, err
        rows = list(csv.DictReader((tmp_path / name / "budget.csv").open()))
        plans.append([(row["budget"], row["source"], row["plan"]) for row in rows
                      if row["source"] in budget.FAMILIES])
    assert plans[0] == plans[1]


@pytest.mark.parametrize("words, complaint", (
    (("--budgets", "1"), "budgets: found [1], expected one that a plan of at most n = 12 paths"),
    (("--seeds", "0,0"), "seeds: found '0,0', expected each seed once"),
    (("--checkpoints", "4,4"), "checkpoints: found '4,4', expected each checkpoint once"),
    (("--seeds", "9" * 40), "seeds: found '999"),
    (("--budgets", "1e400"), "budgets: found '1e400', expected positive numbers below"),
    (("--checkpoints", "4," + "9" * 30), "checkpoints: found '4,999"),
    (("--ceiling", "none.json"), "none.json")))
def test_what_the_study_cannot_do_is_said_at_once(
        monkeypatch, capsys, folder, tmp_path, words, complaint):
    small_grid(monkeypatch)
    monkeypatch.setattr(budget, "measured", None)
    status, _, err = study(monkeypatch, capsys, folder, "--out", tmp_path, *words)
    assert status == 2 and complaint in err, err


def test_a_budget_that_no_plan_keeps_to_is_said(monkeypatch, capsys, folder, tmp_path):
    """Two budgets of which the smaller serves no plan; and no plan.json where none is served."""
    small_grid(monkeypatch)
    stop_at = tmp_path / "stop"
    shutil.copytree(folder / "stop", stop_at)
    words = ("--stop", stop_at, "--out", tmp_path / "out", "--write", "--no-compare")
    status, printed, err = study(monkeypatch, capsys, folder, *words, "--budgets", "25,120,120.2")
    assert status == 0, err
    assert "budget 25: no plan keeps to it" in printed
    plans = read_plans(stop_at, stop_digest(Stop.load(stop_at, load(folder))))
    assert [plan.budget for plan in plans] == [120]
    status, _, err = study(monkeypatch, capsys, folder, *words, "--budgets", "25")
    assert status == 2 and "budgets: found [25], expected" in err
    assert read_plans(stop_at, stop_digest(Stop.load(stop_at, load(folder)))) == plans


@pytest.mark.parametrize("words, complaint", (
    (("--cascade", "4:3", "--branch", 2), "branch: found beside --cascade"),
    (("--budget", 60, "--branch", 1), "branch: found 1, expected none beside --budget"),
    (("--budget", 60, "--n", 64), "n: found 64, expected none beside --budget"),
    (("--budget", 60, "--task-length", 9), "task_length: found 9, expected none beside --budget")))
def test_nothing_given_is_ignored(monkeypatch, capsys, folder, tmp_path, words, complaint):
    stop_at = tmp_path / "stop"
    shutil.copytree(folder / "stop", stop_at)
    digits = stop_digest(Stop.load(stop_at, load(folder)))
    write_plans(stop_at, digits, {}, [BudgetPlan(60, 4, (Stage(4, 2),), EXPECTED)])
    status, _, err = call_script(
        monkeypatch, capsys, stop_command, "--model", folder, "--stop", stop_at, *FLAGS,
        "--prompt", "0?", *words)
    assert status == 2 and complaint in err, err


def test_a_plan_file_that_is_a_folder_is_not_none(tmp_path):
    (tmp_path / "plan.json").mkdir()
    with pytest.raises(ValueError, match=r"plan\.json"):
        read_plans(tmp_path, "abc")


def test_seconds_instead_of_tokens(monkeypatch, capsys, folder, tmp_path):
    small_grid(monkeypatch)
    status, printed, err = call_script(
        monkeypatch, capsys, budget, "--model", folder, *FLAGS, "--n", 12, "--keep", 3,
        "--seeds", "0", "--no-compare", "--cost", "seconds", "--out", tmp_path)
    assert status == 0, err
    assert "cost model, in seconds" in printed
    status, _, err = study(monkeypatch, capsys, folder, "--cost", "seconds", "--write")
    assert status == 2 and "cost: found 'seconds', expected tokens" in err


def test_the_ceiling_from_its_command_line(monkeypatch, capsys, folder, tmp_path):
    status, printed, err = call_script(
        monkeypatch, capsys, ceiling, "--model", folder, *FLAGS, "--n", 8, "--keep", 2,
        "--rollouts", 4, "--problems", 3, "--stored", tmp_path / "paths", "--out", tmp_path / "out")
    assert status == 0, err
    content = json.loads((tmp_path / "out" / "ceiling.json").read_text())
    assert [row["checkpoint"] for row in content["rows"]] == [4, 8]
    assert {"checkpoint": 4, "launched": 8, "kept": 2} in [
        {key: record[key] for key in ("checkpoint", "launched", "kept")}
        for record in content["ceilings"]]
    assert "| 4 |" in printed and "share 8" in printed
    known = shared.read_ceilings(tmp_path / "out" / "ceiling.json", load(folder)).reached
    assert budget.ceiling_of(plan_of(8, "4:2x4"), known) == known[4, 8, 2]
    assert budget.ceiling_of(plan_of(8, "4:4,8:2"), known) is None


@pytest.mark.parametrize("stages, replayed", (("4:6,8:2", True), ("4:3x2", False)))
def test_eval_runs_a_plan(monkeypatch, capsys, folder, tmp_path, stages, replayed):
    """Its row is what runs one by one give; a plan without branches is replayed too (--verify)."""
    model = load(folder)
    stop = Stop.load(folder / "stop", model)
    stop.save(tmp_path / "stop")
    plan = BudgetPlan(50, 8, tuple(parse_cascade(stages)), EXPECTED)
    write_plans(tmp_path / "stop", stop_digest(stop), {}, [plan])
    status, printed, err = call_script(
        monkeypatch, capsys, eval_command, "--model", folder, "--stop", tmp_path / "stop", *FLAGS,
        "--n", 12, "--keep", 3, "--budget", 70, "--out", tmp_path / "out", "--verify")
    assert status == 0, err
    assert printed.count("8 of 8 problems keep the same paths") == 1 + replayed
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    row = report["rows"][f"plan for 50 tokens: 8 paths, {stages}"]
    tokenizer = Tokenizer(folder)
    house = forest.Field(model, tokenizer, stop, None, 24, None)
    found = []
    for problem in read_problems(folder / "test.jsonl"):
        paths = real_run(house, tokenizer.ask(problem), plan, 0)
        found.append(by_hand(problem, tokenizer, paths))
    for name in ("avg", "cons", "weighted", "pass"):
        assert row[name][0] == pytest.approx(np.mean([values[name] for values in found]))
    assert row["tokens"] == pytest.approx(np.mean([values["tokens"] for values in found]))
    assert report["rows"]["all 12"]["tokens"] * (1 - row["saved"]) == pytest.approx(row["tokens"])
