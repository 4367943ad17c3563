"""studies/rollouts.py: what the estimates are on average, by enumeration of every outcome."""
import io
import itertools
import json
import os
import signal
import sys

import numpy as np
import pytest
import torch
from helpers import (
    ROOT, call_script, close, random_model, random_prompt, random_stop, raw_config,
    read_lines, write_checkpoint, write_lines, write_tokenizer)

sys.path.insert(0, str(ROOT / "studies"))
import rollouts
from engine.stored import model_digest, stop_digest
from model import load
from plumbing import grading
from plumbing.problems import read_problems
from plumbing.tokenizer import Tokenizer
from rollouts import Draw, Weights
from sample import Path, generate
from stop import Stop

EXACT = 1e-9
REWARDS = (1.0, 0.0, 0.0, 1.0)
SCORES = {
    "good": (0.9, 0.2, 0.1, 0.7),
    "useless": (0.4, 0.4, 0.4, 0.4),
    "wrong": (0.1, 0.9, 0.8, 0.2)}
WEIGHTED = (rollouts.reweighted, rollouts.reweighted_with_scores)
UNWEIGHTED = (rollouts.kept_only, rollouts.pruned_as_zero)


def numbers(values):
    return torch.tensor(values, dtype=torch.float64)


def own_chances(scores):
    """pi of each path from its own score."""
    return (1.3 * scores ** 2).clamp(0.15, 1.0)


def chances_of_all(scores):
    """pi of each path from all scores of the group."""
    return (2 * scores / scores.sum()).clamp(0.1, 0.9)


def patterns(chances):
    """Every keep/prune pattern of a group, with its probability: (kept (N,), probability)."""
    for pattern in itertools.product((0.0, 1.0), repeat=len(chances)):
        kept = numbers(pattern)
        yield kept, (kept * chances + (1 - kept) * (1 - chances)).prod()


def mean_over_coins(form, rewards, scores, chances):
    """The Weights that a form gives on average over all patterns; pruned paths' rewards are nan."""
    prefix = torch.zeros_like(rewards)
    rest = torch.zeros_like(rewards)
    for kept, probability in patterns(chances):
        known = torch.where(kept > 0, rewards, torch.nan)
        weights = form(Draw(known, scores, chances, kept))
        prefix += probability * weights.prefix
        rest += probability * weights.rest
    return Weights(prefix, rest)


def leave_one_out(rewards):
    """(r_i - mean of the others' rewards) / N, by a loop."""
    found = []
    for i in range(len(rewards)):
        others = [r for j, r in enumerate(rewards.tolist()) if j != i]
        found.append((rewards[i].item() - sum(others) / len(others)) / len(rewards))
    return numbers(found)


# ------------------------------------------------------------------- one group, all 16 patterns


@pytest.mark.parametrize("scores", SCORES.values(), ids=SCORES)
@pytest.mark.parametrize("choose", [own_chances, chances_of_all])
@pytest.mark.parametrize("form", WEIGHTED)
def test_reweighted_forms_are_the_whole_group_on_average(form, choose, scores):
    """Whatever the scores, and also where a path's chance depends on the others' scores."""
    scores = numbers(scores)
    found = mean_over_coins(form, numbers(REWARDS), scores, choose(scores))
    expected = leave_one_out(numbers(REWARDS))
    close(found.prefix, expected, EXACT)
    close(found.rest, expected, EXACT)


@pytest.mark.parametrize("scores", SCORES.values(), ids=SCORES)
@pytest.mark.parametrize("form", UNWEIGHTED)
def test_the_others_are_not(form, scores):
    scores = numbers(scores)
    found = mean_over_coins(form, numbers(REWARDS), scores, own_chances(scores))
    assert (found.prefix - leave_one_out(numbers(REWARDS))).abs().max() > 0.01


@pytest.mark.parametrize("scores", SCORES.values(), ids=SCORES)
def test_the_critic_is_on_average_what_it_is_without_pruning(scores):
    """On prefixes the whole group's weights, on the rest r - s."""
    scores = numbers(scores)
    rewards = numbers(REWARDS)
    found = mean_over_coins(rollouts.scores_as_critic, rewards, scores, own_chances(scores))
    close(found.prefix, leave_one_out(rewards), EXACT)
    close(found.rest, (rewards - scores) / 4, EXACT)


@pytest.mark.parametrize("form", [rollouts.whole_group, rollouts.kept_only,
                                  rollouts.pruned_as_zero, *WEIGHTED])
def test_without_pruning_all_are_the_leave_one_out_estimate(form):
    ones = torch.ones(4, dtype=torch.float64)
    weights = form(Draw(numbers(REWARDS), numbers(SCORES["good"]), ones, ones))
    close(weights.prefix, leave_one_out(numbers(REWARDS)), EXACT)
    close(weights.rest, leave_one_out(numbers(REWARDS)), EXACT)


@pytest.mark.parametrize("form", rollouts.FORMS, ids=[form.name for form in rollouts.FORMS])
def test_what_follows_a_pruned_prefix_has_no_weight(form):
    if form.prunes:
        kept = numbers((1.0, 0.0, 1.0, 0.0))
        chances = own_chances(numbers(SCORES["good"]))
        weights = form.weights(Draw(numbers(REWARDS), numbers(SCORES["good"]), chances, kept))
        assert weights.rest[1] == 0 and weights.rest[3] == 0


def test_one_kept_path_alone_teaches_nothing():
    kept = numbers((0.0, 1.0, 0.0, 0.0))
    scores = numbers(SCORES["good"])
    weights = rollouts.kept_only(Draw(numbers(REWARDS), scores, own_chances(scores), kept))
    assert not weights.prefix.any()


# ------------------------------------------- a whole policy: every group of paths, every pattern


class TinyPolicy:
    """Two prefixes, each with two ends: four paths. Logits are the weights, 6 in all."""

    def __init__(self):
        self.weights = numbers((0.3, -0.2, 0.5, -0.4, -0.6, 0.1)).requires_grad_()
        self.rewards = numbers((1.0, 0.0, 0.0, 1.0))  # of path 2 * prefix + end

    def logs(self):
        """log p (2,) of the prefixes, and (2, 2) of the ends given the prefix."""
        first = self.weights[:2].log_softmax(0)
        then = self.weights[2:].view(2, 2).log_softmax(1)
        return first, then

    def gradients(self):
        """grad log p of the four prefixes and of the four ends: (4, 6) each; chances (4,)."""
        prefix = []
        rest = []
        chances = []
        for path in range(4):
            first, then = self.logs()
            of_prefix = first[path // 2]
            of_end = then[path // 2, path % 2]
            chances.append((of_prefix + of_end).exp().item())
            prefix.append(torch.autograd.grad(of_prefix, self.weights)[0])
            rest.append(torch.autograd.grad(of_end, self.weights)[0])
        return torch.stack(prefix), torch.stack(rest), numbers(chances)

    def true_gradient(self, worth=None):
        """The gradient of the expected reward, or of the expected `worth` (4,) of a path."""
        first, then = self.logs()
        chances = (first[:, None] + then).exp().flatten()
        expected = (chances * (self.rewards if worth is None else worth)).sum()
        return torch.autograd.grad(expected, self.weights)[0]


def expected_gradient(policy, form, of_prefixes, choose, N=3):
    """The expectation of a form's estimate over all groups of N paths and all patterns.
    of_prefixes: the scores of the two prefixes."""
    prefix, rest, chances = policy.gradients()
    total = torch.zeros(6, dtype=torch.float64)
    for group in itertools.product(range(4), repeat=N):
        group = list(group)
        scores = of_prefixes[[path // 2 for path in group]]
        weights = mean_over_coins(form, policy.rewards[group], scores, choose(scores))
        estimate = weights.prefix @ prefix[group] + weights.rest @ rest[group]
        total += chances[group].prod() * estimate
    return total


PREFIX_SCORES = {"good": (0.7, 0.45), "useless": (0.5, 0.5), "wrong": (0.05, 0.95)}


@pytest.mark.parametrize("scores", PREFIX_SCORES.values(), ids=PREFIX_SCORES)
@pytest.mark.parametrize("choose", [own_chances, chances_of_all])
@pytest.mark.parametrize("form", [*WEIGHTED, rollouts.scores_as_critic])
def test_weighted_forms_are_the_policy_gradient(form, choose, scores):
    policy = TinyPolicy()
    found = expected_gradient(policy, form, numbers(scores), choose)
    close(found, policy.true_gradient(), EXACT)


@pytest.mark.parametrize("scores", PREFIX_SCORES.values(), ids=PREFIX_SCORES)
@pytest.mark.parametrize("form", UNWEIGHTED)
def test_unweighted_forms_are_not_the_policy_gradient(form, scores):
    policy = TinyPolicy()
    found = expected_gradient(policy, form, numbers(scores), own_chances)
    assert (found - policy.true_gradient()).norm() > 0.05 * policy.true_gradient().norm()


@pytest.mark.parametrize("scores", PREFIX_SCORES.values(), ids=PREFIX_SCORES)
def test_counting_pruned_paths_as_0_is_the_gradient_of_being_kept_and_right(scores):
    policy = TinyPolicy()
    scores = numbers(scores)
    found = expected_gradient(policy, rollouts.pruned_as_zero, scores, own_chances)
    worth = own_chances(scores).repeat_interleave(2) * policy.rewards
    close(found, policy.true_gradient(worth), EXACT)


def test_the_best_k_cannot_be_mended_by_weights():
    """A path that is never kept is missing from every weighted sum: here, that of prefix 1."""
    policy = TinyPolicy()

    def best(scores):
        """Chance 1 for the better prefix, next to none for the other, whose weight stays 1."""
        return torch.where(scores > 0.5, 1.0, 1e-12)

    def never(draw):
        kept = torch.where(draw.chances == 1.0, draw.kept, 0.0)
        return rollouts.reweighted(draw._replace(kept=kept))

    found = expected_gradient(policy, never, numbers((0.7, 0.3)), best)
    assert (found - policy.true_gradient()).norm() > 0.1 * policy.true_gradient().norm()


# --------------------------------------------------------------------------- chances to be kept


@pytest.mark.parametrize("shape", rollouts.SHAPES.values(), ids=rollouts.SHAPES)
def test_chances_have_the_share_for_their_mean(shape):
    scores = torch.rand(40, generator=torch.Generator().manual_seed(1))
    chances = rollouts.keep_chances(shape, scores, 0.4, 0.1)
    assert abs(chances.mean().item() - 0.4) < 1e-4
    assert chances.min() >= 0.1 - 1e-6 and chances.max() <= 1


def test_perfect_scores_gain_nothing_where_half_of_the_paths_are_right():
    """Both outcomes then surprise alike: every path has the same weight in the variance."""
    assert rollouts.with_perfect_scores(0.5, 0.0) == pytest.approx(1.0)
    assert rollouts.with_perfect_scores(0.2, 0.0) == pytest.approx(0.64, abs=0.01)
    assert rollouts.with_perfect_scores(0.02, 0.0) < 0.15


# -------------------------------------------------------------------------- gradients of a model


def test_log_chances_of_a_padded_batch_are_each_paths_own():
    """Beside a pass of one path alone, and a softmax by hand."""
    model = random_model("qwen2")
    paths = [
        Path(random_prompt(5), 0, random_prompt(9)),
        Path(random_prompt(3), 1, random_prompt(4))]
    logp, number = rollouts.log_chances(model, paths, 0.7)
    for row, path in enumerate(paths):
        ids = path.prompt_ids + path.ids
        logits = model.logits(model(torch.tensor([ids])))[0] / 0.7
        for place, token in enumerate(path.ids):
            position = len(path.prompt_ids) + place - 1
            expected = logits[position, token] - logits[position].logsumexp(0)
            assert number[row, position] == place
            assert logp[row, position].item() == pytest.approx(expected.item(), abs=1e-4)
        assert (number[row] >= 0).sum() == len(path.ids)


def test_a_sketch_keeps_inner_products_on_average():
    """Over 30 draws of signs, the folded gradient's square is the gradient's."""
    model = random_model("qwen2").requires_grad_(True)
    value = model(torch.tensor([random_prompt(6)])).sum()
    weights = [weight for weight in model.model.parameters()]
    parts = torch.autograd.grad(value, weights, retain_graph=True)
    expected = sum(part.square().sum() for part in parts).item()
    value = value + 0 * model.lm_head.weight.sum()  # so that every weight has a gradient
    found = []
    for seed in range(30):
        folded = rollouts.Sketch(model, seed)(value, retain=True)
        found.append(folded.square().sum().item())
    assert sum(found) / 30 == pytest.approx(expected, rel=0.15)


# ----------------------------------------------------------------------------------- training


def settings_of(**changes):
    return rollouts.Settings(**{
        "max_new_tokens": 10, "train_prefix": 4, "train_group": 4, "train_share": 0.5,
        "temperature": 1.0} | changes)


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    """(folder, model, tokenizer, stop, problems) of a tiny random checkpoint whose directory holds
    all that the study reads."""
    raw = raw_config("qwen2", vocab_size=256, eos_token_id=[3, 50, 99])
    folder = write_checkpoint(tmp_path_factory.mktemp("rollouts") / "it", raw)
    write_tokenizer(folder)
    model = load(folder)
    stop = random_stop(model)
    stop.save(folder / "stop", {"settings": {"prefix": 4, "max_new_tokens": 10}})
    problems = [{"id": f"p{i}", "problem": f"{i}?", "answer": i} for i in range(6)]
    for name in ("train.jsonl", "test.jsonl"):
        write_lines(folder / name, problems)
    return folder, model, Tokenizer(folder), stop, read_problems(folder / "train.jsonl")


def form_named(name):
    return next(form for form in rollouts.FORMS if form.name == name)


def test_pruning_shortens_paths_and_changes_no_other_token(material):
    """Kept paths are those that `generate` gives; pruned ones are their first tokens."""
    _, model, tokenizer, stop, problems = material
    settings = settings_of()
    launched = rollouts.roll_out(
        model, stop, tokenizer, problems[:2], form_named("reweighted"), 7, settings)
    prompts = [tokenizer.ask(problem) for problem in problems[:2]]
    whole = generate(model, prompts, 4, 10, temperature=1.0, top_k=0, top_p=1.0, seed=7)
    expected = whole[0] + whole[1]
    statuses = set()
    for path, other, kept in zip(launched.paths, expected, launched.draw.kept.flatten().tolist()):
        statuses.add(path.status)
        if path.status == "pruned":
            assert kept == 0 and path.ids == other.ids[:4]
        else:
            assert kept == 1 and path.ids == other.ids
    assert "pruned" in statuses and len(statuses) > 1
    assert launched.tokens == sum(len(path.ids) for path in launched.paths)
    ended = [path.status == "eos" and len(path.ids) <= 4 for path in launched.paths]
    assert (launched.draw.chances.flatten()[torch.tensor(ended)] == 1).all()


@pytest.mark.parametrize("name", ["whole group", "pruned as 0", "scores as critic"])
def test_the_models_gradient_is_the_estimate(material, name):
    """Beside a sum over paths one by one, from a softmax by hand."""
    _, model, tokenizer, stop, problems = material
    settings = settings_of()
    form = form_named(name)
    launched = rollouts.roll_out(model, stop, tokenizer, problems[:2], form, 3, settings)
    rewards = torch.rand(2, 4, generator=torch.Generator().manual_seed(1)).round()
    launched = launched._replace(draw=launched.draw._replace(rewards=rewards))
    weights = form.weights(launched.draw)
    model.requires_grad_(True)
    total = 0.0
    for i, path in enumerate(launched.paths):
        logits = model.logits(model(torch.tensor([path.prompt_ids + path.ids])))[0]
        for place, token in enumerate(path.ids):
            row = logits[len(path.prompt_ids) + place - 1]
            weight = weights.prefix if place < 4 else weights.rest
            total = total - weight.flatten()[i] / 2 * (row[token] - row.logsumexp(0))
    expected = torch.autograd.grad(total, list(model.parameters()))
    model.requires_grad_(False)
    rollouts.add_gradient(model, launched, form, settings)
    for parameter, gradient in zip(model.parameters(), expected):
        close(parameter.grad, gradient, 1e-4)
        parameter.grad = None


def test_refitting_moves_the_stop_and_not_the_model(material):
    folder, model, tokenizer, _, problems = material
    stop = Stop.load(folder / "stop", model)
    form = form_named("scores as critic")
    launched = rollouts.roll_out(model, stop, tokenizer, problems[:2], form, 3, settings_of())
    optimizer = torch.optim.AdamW(stop.parameters(), lr=0.01)
    models = model_digest(model)
    stops = stop_digest(stop)
    rollouts.refit(model, stop, optimizer, launched, settings_of())
    assert stop_digest(stop) != stops
    assert model_digest(model) == models


def test_the_script_as_it_is_typed(material, tmp_path, monkeypatch, capsys):
    """Tables, points and the last line; typed again, it trains nothing again. (A random model has
    no right path: every third stored one is called right.)"""
    folder = material[0]
    turns = itertools.count()

    def every_third(answer, reference, kind):
        return next(turns) % 3 == 0

    monkeypatch.setattr(grading, "same_answer", every_third)
    flags = ["--model", folder, "--out", tmp_path, "--prefixes", "3,4", "--problems", 3,
             "--paths", 8, "--group", 4, "--rounds", 2, "--train-prefix", 4, "--train-group", 4,
             "--train-tokens", 60, "--step-tokens", 40, "--seeds", 1, "--evaluations", 1,
             "--test-problems", 2, "--test-paths", 1]
    status, out, err = call_script(monkeypatch, capsys, rollouts, *flags)
    assert status == 0, err
    result = json.loads(out.splitlines()[-1])
    assert result["whole group"] == 1.0
    report = (tmp_path / "rollouts.md").read_text()
    for form in rollouts.FORMS:
        assert f"| {form.name} |" in report
    assert (tmp_path / "gradients.csv").read_text().startswith("form,checkpoint,")
    assert "after training" in (tmp_path / "rollouts.svg").read_text()

    def forbidden(*words):
        raise AssertionError("a run was made again")

    monkeypatch.setattr(rollouts, "train_run", forbidden)
    monkeypatch.setattr(rollouts, "gradients_of", forbidden)
    again, _, err = call_script(monkeypatch, capsys, rollouts, *flags)
    assert again == 0, err
    assert (tmp_path / "rollouts.md").read_text() == report

    (file,) = tmp_path.glob("gradients-*.npy")
    whole = file.read_bytes()
    middle = len(whole) // 2
    flipped = whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1:]
    seal, _, array = whole.partition(b"\n")
    gradients = np.load(io.BytesIO(array))
    gradients[0, 0, 0] = np.nan
    other = io.BytesIO()
    np.save(other, gradients)
    for damaged in (flipped, whole[:-4], array, seal + b"\n" + other.getvalue(), b""):
        file.write_bytes(damaged)
        status, out, err = call_script(monkeypatch, capsys, rollouts, *flags)
        assert status == 2 and "gradients" not in out
        assert err == (f"error: {file}: damaged, or another run's: remove it, and it is made "
                       "again\n")


def test_another_runs_gradients_are_refused(material, tmp_path):
    """Under a name that is this run's."""
    folder, model, tokenizer, stop, problems = material
    prompt = tokenizer.ask(problems[0])
    record = {"prompt_ids": prompt, "paths": [[5, 6, 7, 8]], "right": [True]}
    for seed in (0, 1):
        settings = settings_of(seed=seed)
        rollouts.pool_of(model, stop, [record], [2], settings, tmp_path)
    one, other = sorted(tmp_path.glob("gradients-*.npy"))
    one.write_bytes(other.read_bytes())
    refusals = 0
    for seed in (0, 1):
        try:
            rollouts.pool_of(model, stop, [record], [2], settings_of(seed=seed), tmp_path)
        except ValueError as error:
            assert str(error).startswith(f"{one}: damaged, or another run's")
            refusals += 1
    assert refusals == 1


def test_a_run_that_dies_is_one_line(material, tmp_path, monkeypatch):
    """It names the form and its seed; what ended before is kept."""
    folder, model, tokenizer, stop, _ = material
    monkeypatch.setattr(rollouts, "train_run", die_as_kept_only)
    settings = settings_of(model=str(folder), seeds=1, test_problems=2, train_tokens=60)
    with pytest.raises(ValueError, match="^training: kept only, seed 0: its process was ended by"):
        rollouts.study_training(model, stop, tokenizer, settings, tmp_path)
    (file,) = tmp_path.glob("training-*.jsonl")
    assert [record["form"] for record in read_lines(file)] == ["whole group"]


def die_as_kept_only(name, is_refitted, seed, settings):
    """What stands for a run of training."""
    if name == "kept only":
        os.kill(os.getpid(), signal.SIGKILL)
    return {"tokens": [1], "accuracy": [0.0], "brier": [0.0]}


@pytest.mark.parametrize("flags, message", [
    (["--paths", "24"], "paths: found 24, expected a multiple of twice the group of 16"),
    (["--top-k", "40"], "expected the whole distribution"),
    (["--train-tokens", "0", "--seeds", "2"], "seeds: found 2, expected none: --train-tokens 0"),
    (["--least", "0.3"], "least: found 0.3, expected below 0.25"),
    (["--train-share", "1"], "train_share: found 1.0, expected a share between")])
def test_settings_that_cannot_be_are_refused(flags, message, monkeypatch, capsys):
    status, _, err = call_script(monkeypatch, capsys, rollouts, *flags)
    assert status == 2
    assert message in err
