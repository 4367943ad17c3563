"""Pruned rollouts for reinforcement learning: which estimate of the policy gradient is honest,
and does pruning pay? (Beyond the paper.)

    python studies/rollouts.py --jobs 2           # the embedded toy, training on two cores
    python studies/rollouts.py --train-tokens 0   # the gradients alone

A group is N paths of a problem, with rewards r_i of 0 or 1. STOP scores each prefix: s_i, the
chance that the path ends right. Path i is finished (k_i = 1) with chance pi_i = clip(c f(s_i),
least, 1), by a coin of its own; of a pruned path nothing but the prefix is known. (Keeping the best
k gives some paths no chance at all, and no weight corrects that.) Every estimate is

    g = sum over i of  a_i grad log p(prefix_i)  +  c_i grad log p(rest_i given prefix_i)

and the forms differ in a_i and c_i. With w_i = k_i / pi_i and b_-i the mean of the others' values:

    whole group           a = c = (r_i - b_-i) / N        values r_j; nothing is pruned
    kept only             a = c = (r_i - b_-i) / kept     values r_j, of kept paths only
    pruned as 0           a = (k_i r_i - b_-i) / N        values k_j r_j; c = k_i a
    reweighted            a = c = w_i (r_i - b_-i) / N    values w_j r_j
    reweighted, scores    a = c = w_i (r_i - b_-i) / N    values v_j = s_j + w_j (r_j - s_j)
    scores as critic      a = (v_i - b_-i) / N            values v_j; c = w_i (r_i - s_i) / N

On average over the coins the two reweighted forms are the whole group's estimate, and so unbiased,
whatever the scores: E[w_i] = 1, and b_-i depends on the others' coins only, so that E[w_i b_-i] =
E[b_-i], the mean of the others' rewards. It is not needed that each pi_i comes from path i's own
score: the coins must be independent once all pi are fixed from the prefixes, and no pi_i may be 0.

The last form is unbiased as well. v_i estimates r_i without bias; and for what follows the
checkpoint any function of the prefix may serve as the baseline, s_i as well as b. The kept-only
form takes the mean of the kept for the mean of all. "Pruned as 0" is the exact gradient of
something else: the chance of being kept and right.

Which pi is best? A path adds E[u / pi] to the variance, beside what pi does not touch, where u is
the mean of |what w_i multiplies|^2 given s_i; and it adds prefix + pi rest to the tokens. Variance
times tokens is least at pi_i = min(1, c sqrt(u_i)), for some c. Up to a factor, if gradients are of
one size:

    reweighted forms      u = s (1 - 2 b) + b^2           shape "advantage"
    scores as critic      u = s (1 - s)                   shape "doubt"
"""
import dataclasses
import io
import json
import math
import pathlib
import sys
from typing import Callable, NamedTuple

import numpy as np
import torch
from torch.nn.utils import clip_grad_norm_, parameters_to_vector

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))
import plot
from commands.common import open_model
from commands.picture import upright, words
from engine.refill import Batch, generate
from engine.stored import model_digest, stop_digest
from plumbing.answers import extract_answer, same_answer
from plumbing.checkpoint import find_folder
from plumbing.command_line import command_line, option, refuse_flags, require_positive
from plumbing.files import is_there
from plumbing.problems import read_problems
from plumbing.processes import side_by_side
from plumbing.progress import progress
from plumbing.records import Job, digest, locked, read_sealed, write_atomic, write_sealed
from plumbing.statistics import Interval
from sample import Path, prefill, require_finite, sampling_of
from shared import (
    StopSettings, load_problems, load_stop, numbers, path_lengths, require, stored_paths,
    write_table)
from stop import StopSignal, like_lengths, score_ended, score_live

SKETCH = 512            # numbers that a gradient of all weights is folded to
SHARES = (0.25, 0.4, 0.6, 0.8)
STEPS = (32, 1024)      # groups in a step, for the mean squared error of biased forms
OTHER_SCORES = ("useless", "wrong")
OTHER_SHARE = 0.6       # kept, where scores are compared
REFITTED = ("kept only", "reweighted, scores", "scores as critic")
OF_TRAINING = (  # flags that say how is trained, and nothing of the gradients
    "train_data", "train_prefix", "train_share", "train_group", "step_tokens", "lr", "refit_lr",
    "seeds", "evaluations", "test_problems", "test_paths", "jobs")
NO_PART_OF_TRAINING = (  # settings that change no training run
    "out", "jobs", "batch", "attention", "device", "prefixes", "problems", "paths", "group",
    "rounds")


@dataclasses.dataclass(kw_only=True)
class Settings(StopSettings):
    """What `python studies/rollouts.py` can be told."""
    out: str = option("runs/rollouts", "folder for all that is made, taken up by the same command")
    top_k: int = option(0, "off: the gradient is that of the whole distribution")
    top_p: float = option(1.0, "off, likewise")
    train_data: str | None = option(
        None, "problems to train on (default: train.jsonl in the model's directory)")
    prefixes: str = option("24,40,80", "checkpoints to try, in new tokens")
    problems: int = option(32, "gradients: problems, the first of --data")
    paths: int = option(64, "gradients: paths a problem")
    group: int = option(16, "gradients: paths a group")
    rounds: int = option(16, "gradients: random ways to form groups and to toss coins")
    least: float = option(0.1, "the least chance to be kept")
    train_prefix: int = option(40, "training: the checkpoint")
    train_share: float = option(0.5, "training: the share of the paths that is kept")
    train_group: int = option(8, "training: paths a group")
    train_tokens: int = option(40_000, "training: tokens of a run; 0: no training")
    step_tokens: int = option(4_000, "training: tokens of a step")
    lr: float = option(5e-4, "training: Adam's learning rate")
    refit_lr: float = option(1e-3, "training: AdamW's learning rate for a STOP that is refitted")
    seeds: int = option(3, "training: runs of each form")
    evaluations: int = option(3, "training: how often a run is evaluated")
    test_problems: int = option(64, "training: held-out problems, the last of --data")
    test_paths: int = option(2, "training: paths of each of them")
    jobs: int = option(1, "training: runs at a time, each a process of one thread")


# The estimates of a group


class Draw(NamedTuple):
    """Groups after the coins were tossed; each is (..., N) float. Rewards of pruned paths may be
    anything: they are not known."""
    rewards: torch.Tensor
    scores: torch.Tensor
    chances: torch.Tensor  # pi, to be kept
    kept: torch.Tensor     # 1 or 0


class Weights(NamedTuple):
    """What the gradients of a group's paths are added up with; each is (..., N)."""
    prefix: torch.Tensor
    rest: torch.Tensor


def known_rewards(draw):
    """Rewards, with 0 where a path was pruned."""
    return torch.where(draw.kept > 0, draw.rewards, 0.0)


def mean_of_others(values):
    """For each path of a group the mean of the other paths' values."""
    N = values.shape[-1]
    return (values.sum(-1, keepdim=True) - values) / (N - 1)


def values_with_scores(draw):
    """Estimates of all rewards: the score, and if a path was kept, the reweighted difference."""
    surprise = draw.kept / draw.chances * (known_rewards(draw) - draw.scores)
    return draw.scores + surprise


def whole_group(draw):
    """Leave-one-out baseline (RLOO); all paths must have been kept."""
    advantages = draw.rewards - mean_of_others(draw.rewards)
    weights = advantages / advantages.shape[-1]
    return Weights(weights, weights)


def kept_only(draw):
    """The kept paths as if they had been the group: what is usually done."""
    rewards = known_rewards(draw)
    count = draw.kept.sum(-1, keepdim=True)
    others = (rewards.sum(-1, keepdim=True) - rewards) / (count - 1).clamp(min=1)
    weights = draw.kept * (rewards - others) / count.clamp(min=1)
    weights = torch.where(count > 1, weights, 0.0)  # one path has nothing to be compared with
    return Weights(weights, weights)


def pruned_as_zero(draw):
    """A pruned path is a path that ended wrong at the checkpoint."""
    rewards = known_rewards(draw)
    weights = (rewards - mean_of_others(rewards)) / rewards.shape[-1]
    return Weights(weights, draw.kept * weights)


def reweighted(draw):
    """Inverse-probability weights, in the sum and in the baseline."""
    rewards = known_rewards(draw)
    factors = draw.kept / draw.chances
    weights = factors * (rewards - mean_of_others(factors * rewards)) / rewards.shape[-1]
    return Weights(weights, weights)


def reweighted_with_scores(draw):
    """The same, and pruned paths join the baseline by their scores."""
    rewards = known_rewards(draw)
    baseline = mean_of_others(values_with_scores(draw))
    weights = draw.kept / draw.chances * (rewards - baseline) / rewards.shape[-1]
    return Weights(weights, weights)


def scores_as_critic(draw):
    """Prefixes of pruned paths take part with their scores; a score is the baseline of what follows
    its own prefix."""
    N = draw.rewards.shape[-1]
    values = values_with_scores(draw)
    surprise = draw.kept / draw.chances * (known_rewards(draw) - draw.scores)
    return Weights((values - mean_of_others(values)) / N, surprise / N)


# The chances to be kept


def alike(scores, base):
    """Every path has the same chance."""
    return torch.ones_like(scores)


def by_score(scores, base):
    """The promising ones are kept."""
    return scores


def by_advantage(scores, base):
    """Root mean square of r - base where r is 1 with chance s."""
    return (scores * (1 - 2 * base) + base ** 2).sqrt()


def by_doubt(scores, base):
    """Root mean square of r - s where r is 1 with chance s."""
    return (scores * (1 - scores)).sqrt()


def keep_chances(shape, scores, share, least):
    """pi = clip(c f(s), least, 1), with the c that makes their mean over all scores the share."""
    wanted = shape(scores, scores.mean()).clamp(min=1e-9)
    low = -30.0
    high = 30.0
    for _ in range(60):
        middle = (low + high) / 2
        chances = (wanted * math.exp(middle)).clamp(least, 1.0)
        if chances.mean() < share:
            low = middle
        else:
            high = middle
    return chances


class Form(NamedTuple):
    """An estimate, and how its paths are kept in training."""
    name: str
    weights: Callable
    is_unbiased: bool
    shape: Callable
    prunes: bool = True


FORMS = [
    Form("whole group", whole_group, True, alike, prunes=False),
    Form("kept only", kept_only, False, by_score),
    Form("pruned as 0", pruned_as_zero, False, by_score),
    Form("reweighted", reweighted, True, by_advantage),
    Form("reweighted, scores", reweighted_with_scores, True, by_advantage),
    Form("scores as critic", scores_as_critic, True, by_doubt),
    Form("scores as critic, no pruning", scores_as_critic, True, alike, prunes=False)]
SHAPES = {"alike": alike, "score": by_score, "advantage": by_advantage, "doubt": by_doubt}
SHAPE_NAMES = {shape: name for name, shape in SHAPES.items()}


# Gradients of the model's own weights


def log_chances(model, paths, temperature):
    """(log p (B, T), number (B, T)) of Paths, right-padded: the log-probability of each token,
    and which new token of its path it is. Numbers below 0 are the prompt's; padding has -1."""
    rows = []
    first = []  # where the first new token is predicted
    count = []  # new tokens
    for path in paths:
        rows.append(torch.tensor(path.prompt_ids + path.ids))
        first.append(len(path.prompt_ids) - 1)
        count.append(len(path.ids))
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(model.device)
    logits = model.logits(model(ids[:, :-1])).float() / temperature
    logp = logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    first = torch.tensor(first, device=ids.device)[:, None]
    count = torch.tensor(count, device=ids.device)[:, None]
    number = torch.arange(logp.shape[1], device=ids.device) - first
    return logp, torch.where(number < count, number, -1)


class Sketch:
    """Gradients of all of a model's weights, folded to SKETCH numbers: weight j is added to number
    j mod SKETCH with a random sign. Inner products stay what they were, on average over signs."""

    def __init__(self, model, seed):
        self.weights = list(model.parameters())
        self.size = parameters_to_vector(self.weights).numel()
        generator = torch.Generator().manual_seed(seed)
        rows = math.ceil(self.size / SKETCH)
        bits = torch.randint(2, (rows * SKETCH,), generator=generator)
        self.signs = bits * 2.0 - 1.0

    def __call__(self, value, retain=False):
        """The folded gradient (SKETCH,) of a number."""
        parts = torch.autograd.grad(value, self.weights, retain_graph=retain)
        flat = torch.zeros_like(self.signs)
        flat[:self.size] = parameters_to_vector(parts).cpu()
        return (flat * self.signs).view(-1, SKETCH).sum(0)


class Pool(NamedTuple):
    """Stored paths with their gradients. Q problems, M paths each."""
    rewards: torch.Tensor   # (Q, M)
    lengths: torch.Tensor   # (Q, M) tokens
    scores: dict            # checkpoint -> (Q, M)
    prefix: dict            # checkpoint -> (Q, M, SKETCH), of log p of the first so many tokens
    whole: torch.Tensor     # (Q, M, SKETCH), of log p of the path


def pool_of(model, stop, records, checkpoints, settings, folder):
    """The Pool of the records of sample_paths; its gradients are stored in the folder."""
    identity = digest(
        model_digest(model), records, checkpoints, settings.temperature, settings.seed, SKETCH)
    file = folder / f"gradients-{identity[:12]}.npy"
    if not is_there(file):
        found = gradients_of(model, records, checkpoints, settings)
        require_finite(found, "gradients")
        content = io.BytesIO()
        np.save(content, found.numpy(), allow_pickle=False)
        write_sealed(file, identity, content.getvalue())
    content = read_sealed(file, identity, "remove it, and it is made again")
    gradients = torch.from_numpy(np.load(io.BytesIO(content), allow_pickle=False))
    shape = (len(records), len(records[0]["paths"]))
    scores = {}
    prefix = {}
    for place, checkpoint in enumerate(checkpoints):
        prefix[checkpoint] = gradients[place].view(*shape, SKETCH)
        prefixes = []
        for record in records:
            prefixes += [record["prompt_ids"] + ids[:checkpoint] for ids in record["paths"]]
        scores[checkpoint] = stop.score(model, prefixes, batch=64).cpu().view(shape)
    rewards = torch.tensor([record["right"] for record in records], dtype=torch.float32)
    lengths = torch.from_numpy(path_lengths(records))
    return Pool(rewards, lengths, scores, prefix, gradients[-1].view(*shape, SKETCH))


def gradients_of(model, records, checkpoints, settings):
    """Folded gradients (checkpoints + 1, paths, SKETCH) float32: of each prefix, and last of the
    path."""
    model.requires_grad_(True)
    sketch = Sketch(model, settings.seed)
    paths = []
    for record in records:
        paths += [Path(record["prompt_ids"], i, ids) for i, ids in enumerate(record["paths"])]
    found = torch.zeros(len(checkpoints) + 1, len(paths), SKETCH)
    with progress("gradients", len(paths), "path") as bar:
        for i, path in enumerate(paths):
            logp, number = log_chances(model, [path], settings.temperature)
            for place, checkpoint in enumerate(checkpoints):
                is_prefix = (number >= 0) & (number < checkpoint)
                found[place, i] = sketch(logp[is_prefix].sum(), retain=True)
            found[-1, i] = sketch(logp[number >= 0].sum())
            bar.update()
    model.requires_grad_(False)
    return found


# Bias, variance, tokens


class Plan(NamedTuple):
    """How paths are kept."""
    checkpoint: int
    shape: str    # of SHAPES
    share: float
    scores: str = "STOP"  # or useless, wrong


class Measured(NamedTuple):
    """What one form gives under one plan, a problem each."""
    form: Form
    plan: Plan
    variance: torch.Tensor  # (Q,) of a group's estimate, over paths and coins
    halves: torch.Tensor    # (2, Q, SKETCH) its mean over either half of the paths
    tokens: torch.Tensor    # (Q,) of a group


def changed_scores(scores, kind, seed):
    """STOP's scores (Q, M), or others of the same values that say nothing, or the opposite."""
    if kind == "useless":
        generator = torch.Generator().manual_seed(seed + 1)
        order = torch.rand(scores.shape, generator=generator).argsort(-1)
        return scores.gather(-1, order)
    if kind == "wrong":
        rising = scores.sort(-1).values
        places = (-scores).argsort(-1).argsort(-1)
        return rising.gather(-1, places)  # the best prefix gets the lowest score
    return scores


def random_groups(Q, M, N, generator):
    """Path numbers (Q, M / N, N): the first half of the groups has the first half of the paths."""
    first = torch.rand(Q, M // 2, generator=generator).argsort(-1)
    second = torch.rand(Q, M // 2, generator=generator).argsort(-1) + M // 2
    return torch.cat((first, second), 1).view(Q, M // N, N)


def measure(pool, plan, forms, settings):
    """The Measured of each form under a plan."""
    Q, M = pool.rewards.shape
    generator = torch.Generator().manual_seed(settings.seed)
    scores = changed_scores(pool.scores[plan.checkpoint], plan.scores, settings.seed)
    chances = keep_chances(SHAPES[plan.shape], scores, plan.share, settings.least)
    ended = pool.lengths <= plan.checkpoint
    chances = torch.where(ended, 1.0, chances)  # nothing is saved by pruning these
    if plan.share == 1:
        chances = torch.ones_like(chances)
    read = pool.lengths.clamp(max=plan.checkpoint)
    tokens = (read + chances * (pool.lengths - read)).mean(-1) * settings.group

    prefix = pool.prefix[plan.checkpoint]  # (Q, M, SKETCH)
    rest = pool.whole - prefix
    variance = torch.zeros(Q, len(forms))
    halves = torch.zeros(Q, len(forms), 2, SKETCH)
    for _ in range(settings.rounds):
        groups = random_groups(Q, M, settings.group, generator)
        draw = toss(groups, pool.rewards, scores, chances, generator)
        on_prefix = []
        on_rest = []
        for form in forms:
            weights = form.weights(draw)
            on_prefix.append(by_path(weights.prefix, groups, M))
            on_rest.append(by_path(weights.rest, groups, M))
        found = torch.cat(on_prefix, 1) @ prefix + torch.cat(on_rest, 1) @ rest
        found = found.unflatten(1, (len(forms), -1))  # (Q, forms, groups, SKETCH)
        variance += found.var(2).sum(-1) / settings.rounds
        halves += found.unflatten(2, (2, -1)).mean(3) / settings.rounds
    measured = []
    for number, form in enumerate(forms):
        own = halves[:, number].transpose(0, 1)
        measured.append(Measured(form, plan, variance[:, number], own, tokens))
    return measured


def toss(groups, rewards, scores, chances, generator):
    """The Draw of groups (Q, G, N) of path numbers; the others are (Q, M)."""
    def grouped(values):
        return values.gather(1, groups.flatten(1)).view(groups.shape)

    coins = torch.rand(groups.shape, generator=generator)
    own = grouped(chances)
    return Draw(grouped(rewards), grouped(scores), own, (coins < own).float())


def by_path(weights, groups, M):
    """Weights (Q, G, N) of the paths of each group as weights (Q, G, M) of all paths."""
    Q, G, _ = groups.shape
    return torch.zeros(Q, G, M).scatter(2, groups, weights)


def quality(measured, whole, chosen):
    """A form against the whole group on the chosen problems: a dict of numbers, relative where they
    can be. Products of the two halves of the paths have no noise of their own in the mean."""
    bias = (measured.halves - whole.halves)[:, chosen].mean(1)  # (2, SKETCH)
    found = measured.halves[:, chosen].mean(1)
    truth = whole.halves[:, chosen].mean(1)
    size = truth[0] @ truth[1]
    bias_square = (bias[0] @ bias[1]).clamp(min=0)
    along = (found[0] @ truth[1] + found[1] @ truth[0]) / 2
    cosine = along / (size * (found[0] @ found[1])).sqrt()  # nan: both are lost in the noise
    tokens = measured.tokens[chosen].mean() / whole.tokens[chosen].mean()
    variance = measured.variance[chosen].mean() / whole.variance[chosen].mean()
    row = {
        "bias": (bias_square / size).sqrt().item(),
        "cosine": cosine.item(),
        "variance": variance.item(),
        "tokens": tokens.item()}
    if measured.form.is_unbiased:
        bias_square = 0.0
    for groups in STEPS:
        own = bias_square * groups / whole.variance[chosen].mean()
        row[f"mse_{groups}"] = (variance * tokens + own).item()
    return row


def row_of(measured, whole, chosen):
    """Form, plan and `quality` on the chosen problems, with 95% intervals by jackknife over them:
    a dict with an Interval for each number."""
    everything = quality(measured, whole, chosen)
    without = []
    for left_out in chosen:
        others = [problem for problem in chosen if problem != left_out]
        without.append(quality(measured, whole, others))
    row = {"form": measured.form.name, **measured.plan._asdict()}
    for name, value in everything.items():
        values = np.array([other[name] for other in without])
        spread = 1.96 * math.sqrt((len(chosen) - 1) * values.var())
        row[name] = Interval(value, value - spread, value + spread)
    return row


def study_gradients(pool, checkpoints, settings):
    """The Measured of every form under every plan; the first is the whole group's."""
    pruning = [form for form in FORMS if form.prunes]
    unpruned = [form for form in FORMS if not form.prunes]
    found = []
    for checkpoint in checkpoints:
        found += measure(pool, Plan(checkpoint, "alike", 1.0), unpruned, settings)
        plans = [Plan(checkpoint, shape, share) for shape in SHAPES for share in SHARES]
        for kind in OTHER_SCORES:
            plans += [Plan(checkpoint, shape, OTHER_SHARE, kind) for shape in SHAPES]
        with progress(f"pruning at {checkpoint}", len(plans), "plan") as bar:
            for plan in plans:
                found += measure(pool, plan, pruning, settings)
                bar.update()
    return found


def best_plans(rows, groups):
    """For each form its row with the least mean squared error at a step of so many groups."""
    best = {}
    for row in rows:
        if row["scores"] == "STOP":
            known = best.get(row["form"])
            if known is None or row[f"mse_{groups}"].mean < known[f"mse_{groups}"].mean:
                best[row["form"]] = row
    return list(best.values())


def with_other_scores(rows, checkpoint):
    """Rows of each form at one plan at a checkpoint, with STOP's scores and with others."""
    found = []
    for form in FORMS:
        own = SHAPE_NAMES[form.shape]
        for row in rows:
            same_plan = (row["shape"], row["share"]) == (own, OTHER_SHARE)
            if row["form"] == form.name and same_plan and row["checkpoint"] == checkpoint:
                found.append(row)
    return found


def by_difficulty(measurements, pool):
    """The unbiased forms at their best plans on the half of the problems with the fewest right
    paths, and on the other half: [(share of right paths, rows), ...]."""
    whole = measurements[0]
    order = pool.rewards.mean(-1).argsort().tolist()
    middle = len(order) // 2
    found = []
    for chosen in (order[:middle], order[middle:]):
        rows = []
        for measured in measurements:
            if measured.form.is_unbiased:
                rows.append(row_of(measured, whole, chosen))
        right = pool.rewards[chosen].mean().item()
        found.append((right, best_plans(rows, STEPS[0])))
    return found


def with_perfect_scores(right, prefix_share):
    """The least variance x tokens of the reweighted forms, relative to no pruning, where scores are
    perfect (0 or 1), `right` is the share of right paths, and a prefix takes this share of a path's
    tokens. |g|^2 is neglected, and gradients are as large of right paths as of wrong ones."""
    of_right = right * (1 - right) ** 2
    of_wrong = (1 - right) * right ** 2
    least = 1.0
    for keep_right in np.linspace(0.01, 1, 100):
        keep_wrong = np.linspace(0.01, 1, 100)
        variance = (of_right / keep_right + of_wrong / keep_wrong) / (of_right + of_wrong)
        kept = right * keep_right + (1 - right) * keep_wrong
        tokens = prefix_share + (1 - prefix_share) * kept
        least = min(least, float((variance * tokens).min()))
    return least


# Training by each form


class Launched(NamedTuple):
    """Groups of one step, after Launch, Check, the coins and Resume; G groups of N paths."""
    paths: list        # of Path, group by group
    draw: Draw         # each (G, N)
    tokens: int        # decoded


@torch.no_grad()
def roll_out(model, stop, tokenizer, problems, form, seed, settings):
    """The Launched of these problems, a group each: paths are pruned at the checkpoint by coins
    that depend on the seed."""
    N = settings.train_group
    checkpoint = settings.train_prefix
    limit = settings.max_new_tokens
    prompts = [tokenizer.ask(problem) for problem in problems]
    paths = []
    for number, prompt in enumerate(prompts):
        paths += [Path(prompt, i, prompt_number=number) for i in range(N)]
    sampling = dataclasses.replace(sampling_of(settings), seed=seed)
    capacity = max(len(prompt) for prompt in prompts) + limit + stop.m
    batch = Batch(model, paths, capacity, limit, sampling)
    chances = torch.ones(len(paths))
    kept = torch.ones(len(paths))
    if form.prunes or form.weights is scores_as_critic:
        batch.decode(until=checkpoint)
        signal = StopSignal(model, stop)
        score_live(signal, batch)
        score_ended(signal, paths, batch)
    if form.prunes:
        chances = chances_of(paths, form, settings)
        coins = torch.rand(len(paths), generator=torch.Generator().manual_seed(seed))
        kept = (coins < chances).float()
        batch.prune([paths[i] for i in (kept == 0).nonzero()])
    batch.decode(until=limit)
    rewards = []
    scores = []
    tokens = 0
    for path in paths:
        rewards.append(float(is_right(path, problems[path.prompt_number], tokenizer)))
        scores.append(path.score or 0.0)  # no score: no form reads it
        tokens += len(path.ids)
    draw = Draw(torch.tensor(rewards).view(-1, N), torch.tensor(scores).view(-1, N),
                chances.view(-1, N), kept.view(-1, N))
    return Launched(paths, draw, tokens)


def chances_of(paths, form, settings):
    """The chance (paths,) of each to be kept. One that has ended is kept: it costs nothing more."""
    scores = torch.tensor([path.score for path in paths])
    chances = keep_chances(form.shape, scores, settings.train_share, settings.least)
    for i, path in enumerate(paths):
        if path.status != "running":
            chances[i] = 1.0
    return chances


def is_right(path, problem, tokenizer):
    """Whether a path's answer is the problem's; a pruned path's is not."""
    answer = extract_answer(tokenizer.completion(path.ids), problem.kind)
    return path.status != "pruned" and same_answer(answer, problem.answer, problem.kind)


def add_gradient(model, launched, form, settings):
    """Leave minus a form's estimate, the mean over groups, in the gradients of the model's
    weights."""
    weights = form.weights(launched.draw)
    groups = len(weights.prefix)
    on_prefix = weights.prefix.flatten() / groups
    on_rest = weights.rest.flatten() / groups
    matters = (on_prefix != 0) | (on_rest != 0)
    chosen = matters.nonzero()[:, 0].tolist()
    sequences = [launched.paths[i].prompt_ids + launched.paths[i].ids for i in chosen]
    model.requires_grad_(True)
    for places in like_lengths(sequences, batch=32):
        part = [chosen[place] for place in places]
        paths = [launched.paths[i] for i in part]
        logp, number = log_chances(model, paths, settings.temperature)
        is_prefix = number < settings.train_prefix
        factor = torch.where(is_prefix, on_prefix[part, None], on_rest[part, None])
        factor = torch.where(number >= 0, factor, 0.0)  # neither prompt nor padding
        (-factor * logp).sum().backward()
    model.requires_grad_(False)


def refit(model, stop, optimizer, launched, settings):
    """One step of STOP on what the finished paths say: their outcomes are the labels, weighted by
    w = k / pi, so that the pruned are stood for."""
    finished = []
    prefixes = []
    for i, path in enumerate(launched.paths):
        if path.status != "pruned":
            finished.append(i)
            prefixes.append(path.prompt_ids + path.ids[:settings.train_prefix])
    labels = launched.draw.rewards.flatten()[finished]
    factors = 1 / launched.draw.chances.flatten()[finished]
    with torch.no_grad():
        cache, _ = prefill(model, prefixes, stop.m)
    logits = stop(model, cache)[:, 0]
    losses = torch.nn.functional.binary_cross_entropy_with_logits(
        logits, labels, weight=factors, reduction="sum")
    (losses / factors.sum()).backward()
    clip_grad_norm_(stop.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()


def accuracy(model, tokenizer, problems, settings):
    """The share of right paths on problems that no run was trained on; the same noise each time."""
    prompts = [tokenizer.ask(problem) for problem in problems]
    sampling = dataclasses.asdict(sampling_of(settings))
    sampling["seed"] += 10 ** 6
    found = generate(
        model, prompts, settings.test_paths, settings.max_new_tokens, **sampling)
    right = 0
    for problem, paths in zip(problems, found):
        right += sum(is_right(path, problem, tokenizer) for path in paths)
    return right / (len(problems) * settings.test_paths)


def train_run(name, is_refitted, seed, settings):
    """Train the model by one form -> {"tokens": [...], "accuracy": [...], "brier": [...]}, a
    value an evaluation. brier: STOP's mean squared error since the last evaluation."""
    torch.set_num_threads(1)
    form = next(form for form in FORMS if form.name == name)
    model, tokenizer = open_model(settings)
    stop = load_stop(settings, model)
    problems = training_problems(settings)
    tests = load_problems(settings)[-settings.test_problems:]
    optimizer = torch.optim.Adam(model.parameters(), lr=settings.lr)
    of_stop = torch.optim.AdamW(stop.parameters(), lr=settings.refit_lr)
    order = np.random.default_rng(settings.seed + seed)
    group_tokens = settings.train_group * 120  # a guess for the first step
    spent = 0
    found = {"tokens": [], "accuracy": [], "brier": []}
    squares = []
    while spent < settings.train_tokens:
        groups = max(1, round(settings.step_tokens / group_tokens))
        chosen = [problems[i] for i in order.integers(0, len(problems), groups)]
        step_seed = settings.seed + 1000 * (seed + 1) + spent
        launched = roll_out(model, stop, tokenizer, chosen, form, step_seed, settings)
        add_gradient(model, launched, form, settings)
        clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if is_refitted:
            refit(model, stop, of_stop, launched, settings)
        squares.append(squared_error(launched.draw))
        spent += launched.tokens
        group_tokens = launched.tokens / groups
        if spent >= settings.train_tokens * (len(found["tokens"]) + 1) / settings.evaluations:
            found["tokens"].append(spent)
            found["accuracy"].append(accuracy(model, tokenizer, tests, settings))
            found["brier"].append(float(np.mean(squares)))
            squares = []
    return found


def squared_error(draw):
    """Mean of (r - s)^2 over a step's paths, estimated from the finished ones. (Of unscored paths
    s is 0, which is no score at all: the table leaves theirs out.)"""
    surprise = (draw.rewards - draw.scores) ** 2
    return (draw.kept / draw.chances * surprise).mean().item()


def training_problems(settings):
    """The problems of --train-data, or those in the model's directory."""
    return read_problems(settings.train_data or find_folder(settings.model) / "train.jsonl")


def training_heads(settings):
    """What runs there are: each form with STOP fixed, and some with a STOP that is refitted."""
    heads = []
    for seed in range(settings.seeds):
        for form in FORMS:
            heads.append({"form": form.name, "refitted": False, "seed": seed})
        for name in REFITTED:
            heads.append({"form": name, "refitted": True, "seed": seed})
    return heads


def study_training(model, stop, tokenizer, settings, folder):
    """The records of all training runs, and the accuracy before any; taken up where it stopped."""
    known = dataclasses.asdict(settings)
    for name in NO_PART_OF_TRAINING:
        del known[name]
    tests = load_problems(settings)[-settings.test_problems:]
    problems = [dataclasses.asdict(problem) for problem in training_problems(settings) + tests]
    identity = digest(known, model_digest(model), stop_digest(stop), problems)
    job = Job(folder / f"training-{identity[:12]}.jsonl", identity, training_heads(settings))
    todo = job.todo()
    tasks = []
    for i in todo:
        head = job.heads[i]
        tasks.append((head["form"], head["refitted"], head["seed"], settings))

    def name(number):
        form, is_refitted, seed, _ = tasks[number]
        return f"training: {form}{', STOP refitted' if is_refitted else ''}, seed {seed}"

    with job, progress("training", len(todo), "run") as bar:
        for number, found in side_by_side(train_run, tasks, settings.jobs, name):
            job.add(todo[number], found)
            bar.update()
    return job.finish(), accuracy(model, tokenizer, tests, settings)


# The report


def shown_interval(value):
    """An Interval as a cell."""
    return f"{value.mean:.2f} [{value.low:.2f}, {value.high:.2f}]"


def markdown(header, rows):
    """A table of cells, texts."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def gradient_cells(row):
    """A row of the table of gradients as texts."""
    plan = "no pruning"
    if row["share"] < 1:
        plan = f"{row['share']:g} by {row['shape']} @ {row['checkpoint']}, {row['scores']}"
    names = ("bias", "cosine", "variance")
    cells = [shown_interval(row[name]) for name in names]
    cells.append(f"{row['tokens'].mean:.2f}")
    cells += [shown_interval(row[f"mse_{groups}"]) for groups in STEPS]
    return [row["form"], plan, *cells]


def gradient_table(rows):
    """Rows of the study of gradients in Markdown."""
    header = ["form", "pi", "bias / size of g", "cosine of its mean", "variance", "tokens"]
    header += [f"MSE at equal tokens, step of {groups} groups" for groups in STEPS]
    return markdown(header, [gradient_cells(row) for row in rows])


def difficulty_table(halves):
    """What `by_difficulty` gives, in Markdown."""
    lines = []
    for right, rows in halves:
        for row in rows:
            lines.append([f"{right:.3f}", *gradient_cells(row)[:2],
                          shown_interval(row["variance"]), f"{row['tokens'].mean:.2f}",
                          shown_interval(row[f"mse_{STEPS[0]}"])])
    header = ["right paths of the half", "form", "its best pi there", "variance", "tokens",
              "MSE at equal tokens"]
    return markdown(header, lines)


def perfect_table():
    """`with_perfect_scores` in Markdown."""
    shares = (0, 0.1, 0.2, 0.3, 0.5)
    header = ["right paths"] + [f"prefix {share:g} of a path" for share in shares]
    rows = []
    for right in (0.5, 0.3, 0.2, 0.1, 0.05, 0.02):
        row = [f"{right:g}"]
        for share in shares:
            row.append(f"{with_perfect_scores(right, share):.2f}")
        rows.append(row)
    return markdown(header, rows)


def training_rows(records):
    """Records of one form and kind of STOP together: dicts, values a seed and an evaluation."""
    together = {}
    for record in records:
        name = record["form"] + (", STOP refitted" if record["refitted"] else "")
        together.setdefault(name, []).append(record)
    return together


def training_table(records, before):
    """Accuracy at each evaluation: the mean over seeds and, at the end, each seed's; and STOP's
    error."""
    rows = []
    for name, runs in training_rows(records).items():
        accuracies = np.array([run["accuracy"] for run in runs])  # (seeds, evaluations)
        briers = np.array([run["brier"] for run in runs]).mean(0)
        cells = [f"{value:.3f}" for value in accuracies.mean(0)]
        last = ", ".join(f"{value:.3f}" for value in accuracies[:, -1])
        drift = f"{briers[0]:.3f} to {briers[-1]:.3f}"
        rows.append([name, f"{before:.3f}", *cells, last, "" if name == "whole group" else drift])
    header = ["form", "before"]
    for tokens in np.mean([record["tokens"] for record in records], 0):
        header.append(f"about {round(tokens, -3):,.0f} tokens")
    return markdown([*header, "each seed at last", "STOP's (r - s)^2"], rows)


SHOWN = (  # (form, its name in the figure, a note below it, colour); few lines can be read
    ("whole group", "nothing pruned", "all paths go to the end", "quiet"),
    ("scores as critic, no pruning", "nothing pruned, scores", "as forecasts of rewards", "quiet"),
    ("reweighted", "weighted", "kept 1 in 3: counts 3 times", "high"),
    ("scores as critic", "weighted, scores", "as forecasts of rewards", "high"),
    ("pruned as 0", "pruned count as wrong", "whatever they would say", "bad"),
    ("kept only", "kept paths alone", "as if they were all", "bad"))


def draw_figure(file, rows, records, before):
    """Each form's squared error in steps of STEPS and, where something was trained, the accuracy
    that training by it reached. rows: of `best_plans`. The numbers are drawn as the tables show
    them, so that these can stand for the figure."""
    by_form = {row["form"]: row for row in rows}
    drawn = []
    for form, name, note, look in SHOWN:
        marks = [error_marks(by_form[form]), accuracy_marks(records, form)]
        drawn.append(plot.Row(name, note, look, marks))
    notes = ["Squared errors of policy gradients from groups of paths, for the same tokens.",
             f"Filled: steps of {STEPS[0]} groups; hollow: of {STEPS[1]:,}. Bars: 95% intervals."]
    top = 140
    bottom = top + 46 * len(drawn)
    panels = [plot.Panel(228, top, 404 if records else plot.WIDTH - 40, bottom, error_axis(drawn))]
    parts = heads(panels[0], "gradient's error", "nothing pruned = 1", 1.0)
    if records:
        notes.append("After training: the mean over runs; bars from their least to their most.")
        panels.append(plot.Panel(444, top, plot.WIDTH - 40, bottom, accuracy_axis(drawn, before)))
        parts += heads(panels[1], "after training", f"right; {before:.0%} before", before)
    plot.write(file, "Does pruning paths pay in reinforcement learning?", notes,
               [*plot.draw_rows(panels, drawn), *parts], height=bottom + 34)


def error_marks(row):
    """A form's squared error in small steps and, hollow, in large ones."""
    marks = []
    for groups in STEPS:
        value = row[f"mse_{groups}"]
        about = f"{row['form']}, steps of {groups:,} groups: {shown_interval(value)}"
        mean, low, high = [round(number, 2) for number in value]
        marks.append(plot.Mark(mean, (low, high), about, is_hollow=groups == STEPS[-1]))
    return marks


def accuracy_marks(records, form):
    """The accuracy at the end of a form's runs with STOP fixed: their mean, from least to most; no
    mark of no runs."""
    reached = [round(record["accuracy"][-1], 3) for record in records
               if record["form"] == form and not record["refitted"]]
    if not reached:
        return []
    mean = float(np.mean(reached))
    if len(reached) == 1:
        return [plot.Mark(mean, None, f"{form}: {mean:.1%}")]
    least = min(reached)
    most = max(reached)
    about = f"{form}, {len(reached)} runs: {mean:.1%}, from {least:.1%} to {most:.1%}"
    return [plot.Mark(mean, (least, most), about)]


def error_axis(drawn):
    """The axis of the errors of Rows: logarithmic, as some are many times others. What an interval
    has below 0 is not on it."""
    values = []
    for row in drawn:
        for mark in row.marks[0]:
            values += [mark.value, *mark.interval]
    values = [value for value in values if 0 < value < math.inf]
    return plot.Axis("", plot.log_ticks(min(values), max(values)), is_log=True)


def accuracy_axis(drawn, before):
    """The axis of the accuracies of Rows, with that before training on it."""
    values = [before]
    for row in drawn:
        for mark in row.marks[1]:
            values += [mark.value, *(mark.interval or ())]
    return plot.Axis("", plot.linear_ticks(min(values), max(values), most=4), form=".0%")


def heads(panel, name, note, reference):
    """What a panel shows, above it, and a dotted line at what all else is compared with."""
    x = panel.across(reference)
    return [words(panel.left, panel.top - 10 - plot.LINE, name, "strong"),
            words(panel.left, panel.top - 10, note, "quiet"),
            upright(x, panel.top, panel.bottom, "reference")]


def flat_rows(rows):
    """Rows with each Interval as three numbers, for a CSV file."""
    flat = []
    for row in rows:
        numbers_of_row = {}
        for name, value in row.items():
            if isinstance(value, Interval):
                numbers_of_row[name] = value.mean
                numbers_of_row[f"{name}_low"] = value.low
                numbers_of_row[f"{name}_high"] = value.high
            else:
                numbers_of_row[name] = value
        flat.append(numbers_of_row)
    return flat


def recipe(flags):
    """No defaults of a file's. ValueError on flags that have no effect beside --train-tokens 0."""
    if flags.get("train_tokens") == 0:
        refuse_flags(flags, OF_TRAINING, "--train-tokens 0 trains nothing")
    return {}, None


def check(settings):
    """ValueError on settings that cannot be, before any work is done."""
    require_positive(settings, "problems", "paths", "group", "rounds", "least", "max_new_tokens",
                     "train_prefix", "train_share", "train_group", "step_tokens", "lr", "refit_lr",
                     "seeds", "evaluations", "test_problems", "test_paths", "jobs", "batch")
    require("jobs", settings.jobs <= 1024, settings.jobs, "at most 1024")
    for name in ("group", "train_group", "problems"):
        value = getattr(settings, name)
        require(name, value >= 2, value, "at least 2")
    require("paths", settings.paths % (2 * settings.group) == 0, settings.paths,
            f"a multiple of twice the group of {settings.group}")
    is_whole = settings.top_k == 0 and settings.top_p == 1 and settings.temperature > 0
    require("temperature, top_k, top_p", is_whole,
            (settings.temperature, settings.top_k, settings.top_p),
            "the whole distribution: a temperature above 0, top-k 0, top-p 1")
    require("least", settings.least < min(SHARES), settings.least, f"below {min(SHARES)}")
    require("train_share", settings.least < settings.train_share < 1, settings.train_share,
            f"a share between least = {settings.least} and 1")
    require("train_tokens", settings.train_tokens >= 0, settings.train_tokens, "0 or more")


def main(settings):
    """Both studies; the last line is one JSON object."""
    check(settings)
    checkpoints = numbers("prefixes", settings.prefixes)
    model, tokenizer = open_model(settings)
    stop = load_stop(settings, model)
    limit = settings.max_new_tokens or stop.trained_limit()
    settings = dataclasses.replace(settings, max_new_tokens=limit)
    out = pathlib.Path(settings.out)
    out.mkdir(parents=True, exist_ok=True)
    problems = load_problems(settings)[:settings.problems]
    records = stored_paths(
        model, tokenizer, problems, out, settings.paths, settings.max_new_tokens, settings)
    with locked(out):
        run(model, stop, tokenizer, records, checkpoints, settings, out)


def run(model, stop, tokenizer, records, checkpoints, settings, out):
    """The whole study, in its folder."""
    pool = pool_of(model, stop, records, checkpoints, settings, out)
    if pool.rewards.min() == pool.rewards.max():
        raise ValueError("data: found no right path, or no wrong one, expected both: there is no "
                         "gradient")
    measurements = study_gradients(pool, checkpoints, settings)
    everything = list(range(len(records)))
    rows = [row_of(measured, measurements[0], everything) for measured in measurements]
    best = best_plans(rows, STEPS[0])
    right = pool.rewards.mean().item()
    others = with_other_scores(rows, checkpoints[len(checkpoints) // 2])
    text = "\n\n".join([
        f"Gradients: {len(records)} problems, {settings.paths} paths each, {right:.3f} right, "
        f"groups of {settings.group}, least pi {settings.least:g}. Each form at its best pi:",
        gradient_table(best),
        "With STOP's scores, with the same ones shuffled, and with the order turned round:",
        gradient_table(others),
        "Harder and easier problems:",
        difficulty_table(by_difficulty(measurements, pool)),
        "With perfect scores, the least variance x tokens of the reweighted forms (no pruning "
        "is 1):",
        perfect_table()]) + "\n"
    print(text, flush=True)
    write_table(out / "gradients.csv", flat_rows(rows))
    runs = []
    before = math.nan
    if settings.train_tokens > 0:
        runs, before = study_training(model, stop, tokenizer, settings, out)
        trained = (f"Training: {settings.step_tokens:,} tokens a step, groups of "
                   f"{settings.train_group}, {settings.train_share:g} kept @ "
                   f"{settings.train_prefix}, {settings.seeds} seeds; accuracy on "
                   f"{settings.test_problems} held-out problems, {settings.test_paths} paths "
                   f"each\n\n{training_table(runs, before)}\n")
        print(trained, flush=True)
        text += "\n" + trained
    write_atomic(out / "rollouts.md", text)
    draw_figure(out / "rollouts.svg", best, runs, before)
    result = {"out": settings.out, "problems": len(records)}
    for row in best:
        result[row["form"]] = round(row[f"mse_{STEPS[0]}"].mean, 4)
    print(json.dumps(result))


if __name__ == "__main__":
    command_line(Settings, main, recipe)
