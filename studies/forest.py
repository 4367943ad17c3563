"""Many plans at once: the paths of all plans for a question, grown together, every stretch once.

No study itself, and not run: budget.py and its tests import it. What a path is depends on seed,
prompt, index and the branches that it took, and on nothing else (sample.py). Plans that agree up to
a check therefore share their paths up to there, and a path that two plans keep is decoded once for
both. The paths of all plans of a problem are a tree; it grows from checkpoint to checkpoint, and a
path goes on, or branches, as soon as one plan wants it. Each plan gets what `launch_check_resume`
would give it, to the token, its branches included: nothing is taken from paths that it would not
have had.

Letters: N launched paths, B rows, P plans.
"""
import collections
import dataclasses
import math
from typing import NamedTuple

import numpy as np
import torch

import stop
from baselines import entropy
from engine.refill import Batch
from engine.stored import model_digest, stop_digest
from plumbing import processes
from plumbing.answers import extract_answer, same_answer, same_vote
from plumbing.progress import progress
from plumbing.records import Job, digest
from sample import Path, branch_key, uniform

TOGETHER = 1024  # rows launched in one batch: several problems
VALUES = ("tokens", "steps", "checked", "avg", "cons", "weighted", "pass")  # of a plan on a problem


class Plan(NamedTuple):
    """N launched paths, and the checks they go through; or the first part of such a plan."""
    n: int
    stages: tuple  # of plumbing.budget_plan.Stage

    def __str__(self):
        checks = ",".join(map(str, self.stages))
        return f"{self.n} @ {checks}" if checks else f"{self.n}, no pruning"


# Signals: what decides which paths go on


class StopSignal(stop.StopSignal):
    """STOP's chances (B,) float64, equal ones of equal paths: several problems share a batch."""
    name = "STOP"
    is_chance = True  # so that votes are weighted by it; others vote with equal weights

    def of_live(self, batch):
        return alike(batch.live, super().of_live(batch).double())

    def of_ended(self, paths, batch):
        prefixes = [path.prompt_ids + path.ids for path in paths]
        return self.stop.score(self.model, prefixes, batch=64).double()


class ChangedSignal:
    """A signal made worse on purpose: change(scores, noise) -> scores, (paths,) each. The noise in
    [0, 1) is a function of the path alone."""

    def __init__(self, signal, name, change, is_chance):
        self.signal = signal
        self.name = name
        self.change = change
        self.is_chance = is_chance

    def of_live(self, batch):
        noise = uniform(batch.keys, batch.drawn + 2 ** 40)  # beyond the noise that draws tokens
        return self.change(self.signal.of_live(batch), noise)

    def of_ended(self, paths, batch):
        keys = torch.stack([batch.ended[id(path)].key for path in paths])
        return self.change(self.signal.of_ended(paths, batch), uniform(keys, 2 ** 40))


class EntropySignal:
    """Minus the mean entropy of a path's tokens (type III; the paper, appendix C.5)."""
    name = "minus entropy"
    is_chance = False

    def of_live(self, batch):
        return alike(batch.live, -batch.entropy / batch.drawn)

    def of_ended(self, paths, batch):
        means = torch.stack([batch.ended[id(path)].mean_entropy for path in paths])
        return alike(paths, -means)


def alike(paths, scores):
    """The scores (paths,), in which equal paths of a prompt have one (`stop.of_first_equal`)."""
    prefixes = [(path.prompt_number, *path.ids) for path in paths]
    return scores.new_tensor(stop.of_first_equal(prefixes, scores.tolist()))


def at_random(scores, noise):
    """A score that knows nothing."""
    return noise


def upside_down(scores, noise):
    """The worst paths first."""
    return 1 - scores


def blurred(spread):
    """A change that adds normal noise of this spread to the logit of a chance."""
    def blur(scores, noise):
        logits = torch.logit(scores, 1e-6)
        return torch.sigmoid(logits + spread * torch.special.ndtri(noise.clamp(1e-12)))
    return blur


# The trees


class Ended(NamedTuple):
    """What is kept of a row when its path ends."""
    key: torch.Tensor
    mean_entropy: torch.Tensor


class Grove(Batch):
    """A Batch that adds up each path's entropy, and whose rows can be copied each as often as it is
    wanted."""

    def __init__(self, *args):
        super().__init__(*args)
        self.entropy = torch.zeros(len(self.live), dtype=torch.float64, device=self.model.device)
        self.ended = {}  # id of an ended path -> Ended

    def _draw(self):
        logp = self.model.logits(self.hidden).float().log_softmax(-1)  # (B, V)
        self.entropy += entropy(logp)
        return super()._draw()

    def _rearrange(self, order):
        for row, path in enumerate(self.live):
            if path.status != "running":
                mean = self.entropy[row] / self.drawn[row]
                self.ended[id(path)] = Ended(self.keys[row].clone(), mean)
        self.entropy = self.entropy[order]
        super()._rearrange(order)

    def copy(self, wanted, capacity):
        """Go on with `wanted` [(row, path), ...] in rows of `capacity` positions. A path that is
        not the row's own is a new branch of it."""
        rows = [row for row, _ in wanted]
        branches = [0 if self.live[row] is path else path.branches[-1] for row, path in wanted]
        self.live = [path for _, path in wanted]
        self.cache.rebuild(rows, capacity)
        self.model_step.forget()
        self.drawn = self.drawn[rows]
        self.pending = self.pending[rows]
        self.hidden = self.hidden[rows]
        self.entropy = self.entropy[rows]
        keys = self.keys[rows]
        number = torch.tensor(branches, device=keys.device)
        self.keys = torch.where(number == 0, keys, branch_key(keys, self.drawn, number))


class Tree:
    """The paths of all plans for one problem, by number; the first N are the launched ones."""

    def __init__(self, prompt_ids, number, n):
        self.paths = [Path(list(prompt_ids), index, prompt_number=number) for index in range(n)]
        self.scores = np.zeros(n)  # of the paths, at their last check in any plan
        self.children = {}  # (path number, checkpoint, branch) -> path number
        self.alive = {}     # Plan so far -> path numbers, in the order in which ties are broken
        self.weights = {}   # Plan so far -> their scores at its last check
        self.tokens = collections.Counter()   # Plan so far -> tokens decoded for it
        self.steps = collections.Counter()    #             -> steps of its batch
        self.checked = collections.Counter()  #             -> rows that were checked for it

    def launch(self, plan):
        """A plan begins: its first N paths run."""
        self.alive[plan] = np.arange(plan.n)
        self.weights[plan] = np.ones(plan.n)

    def stretch(self, plan, start, end):
        """The tokens of a plan's paths from one checkpoint to the next; 0 of a path that had ended
        before."""
        lengths = [len(self.paths[number].ids) for number in self.alive[plan]]
        return np.maximum(np.minimum(lengths, end) - start, 0).astype(int)

    def check(self, plan, stage, start):
        """A plan so far, `plan`, goes through its next check."""
        longer = Plan(plan.n, (*plan.stages, stage))
        alive = self.alive[plan]
        tokens = self.stretch(plan, start, stage.checkpoint)
        self.tokens[longer] = self.tokens[plan] + int(tokens.sum())
        self.steps[longer] = self.steps[plan] + int(tokens.max(initial=0))
        self.checked[longer] = self.checked[plan] + int(np.count_nonzero(tokens))
        best = np.argsort(-self.scores[alive], kind="stable")[:stage.keep]
        kept = alive[np.sort(best)]
        if stage.branch > 1:
            kept = np.array([i for number in kept for i in self.family(number, stage)])
        self.alive[longer] = kept
        self.weights[longer] = self.scores[kept]

    def family(self, number, stage):
        """The numbers of a kept path and of its branches; an ended path has none."""
        numbers = [number]
        if self.paths[number].status != "running":
            return numbers
        for branch in range(1, stage.branch):
            key = (number, stage.checkpoint, branch)
            if key not in self.children:
                self.children[key] = len(self.paths)
                self.paths.append(self.paths[number].branch(branch))
                self.scores = np.append(self.scores, self.scores[number])
            numbers.append(self.children[key])
        return numbers


@dataclasses.dataclass
class Span:
    """From which checkpoint to which the paths of a plan so far are decoded."""
    start: int
    end: float


def spans(plans):
    """{Plan so far: Span} of all plans; the end of a whole plan is infinite."""
    found = {}
    for plan in plans:
        start = 0
        for count in range(len(plan.stages) + 1):
            so_far = Plan(plan.n, plan.stages[:count])
            whole = count == len(plan.stages)
            end = math.inf if whole else plan.stages[count].checkpoint
            span = found.setdefault(so_far, Span(start, end))
            span.end = max(span.end, end)
            start = end
    return found


def checks_at(checkpoint, plans):
    """The (Plan so far, Stage) pairs of all checks at a checkpoint, each once."""
    pairs = {}
    for plan in plans:
        for count, stage in enumerate(plan.stages):
            if stage.checkpoint == checkpoint:
                pairs[Plan(plan.n, plan.stages[:count]), stage] = None
    return list(pairs)


@torch.inference_mode()
def grow(model, signal, prompts, plans, limit, sampling, extra):
    """The finished Trees of prompts (lists of token ids), with all that `plans` want. limit: new
    tokens of a path; extra: positions that a check needs behind a row (STOP's m)."""
    checkpoints = sorted({stage.checkpoint for plan in plans for stage in plan.stages})
    known = spans(plans)
    n = max(plan.n for plan in plans)
    longest = max(map(len, prompts)) + extra
    trees = [Tree(prompt, number, n) for number, prompt in enumerate(prompts)]
    for tree in trees:
        for plan, span in known.items():
            if span.start == 0:
                tree.launch(plan)

    paths = [path for tree in trees for path in tree.paths]
    ends = [*checkpoints, limit]
    batch = Grove(model, paths, longest + ends[0], limit, sampling)
    for checkpoint, end in zip(checkpoints, ends[1:]):
        running = list(batch.live)
        batch.decode(until=checkpoint)
        score(trees, batch, signal, running)
        pairs = checks_at(checkpoint, plans)
        going_on = [plan for plan, span in known.items() if span.start <= checkpoint < span.end]
        for tree in trees:
            for plan, stage in pairs:
                tree.check(plan, stage, known[plan].start)
        thin_out(trees, batch, checkpoint, going_on, longest + end)
    batch.decode(until=limit)
    return trees


def score(trees, batch, signal, running):
    """Give their new scores to the trees: of the batch's paths, and of those that ended just
    before."""
    scored = list(batch.live)
    scores = []
    if scored:
        batch.settle()
        scores += signal.of_live(batch).tolist()
    ended = [path for path in running if path.status != "running"]
    if ended:
        scores += signal.of_ended(ended, batch).tolist()
    by_path = dict(zip(map(id, scored + ended), scores))
    for tree in trees:
        for number, path in enumerate(tree.paths):
            if id(path) in by_path:
                tree.scores[number] = by_path[id(path)]


def thin_out(trees, batch, checkpoint, plans, capacity):
    """Only the paths that one of `plans` still has go on, and the new branches begin."""
    origins = {}  # id of a new branch -> the path that it branches from
    staying = []
    for tree in trees:
        for (number, place, _), child in tree.children.items():
            if place == checkpoint:
                origins[id(tree.paths[child])] = tree.paths[number]
        numbers = np.unique(np.concatenate([tree.alive[plan] for plan in plans]))
        staying += [tree.paths[number] for number in numbers]
    rows = {id(path): row for row, path in enumerate(batch.live)}
    wanted = []
    for path in staying:
        origin = origins.get(id(path), path)
        if path.status == "running":
            wanted.append((rows[id(origin)], path))
    if wanted:
        batch.copy(wanted, capacity)
    else:
        batch.live = []


# What a plan is worth on a problem


class Graded:
    """A finished Tree whose answers are grouped once: paths of one class vote together."""

    def __init__(self, tree, tokenizer, problem, plans):
        numbers = np.unique(np.concatenate([tree.alive[plan] for plan in plans]))
        self.tree = tree
        self.classes = np.full(len(tree.paths), -1)     # -1: no answer
        self.right = np.zeros(len(tree.paths), bool)
        known = {}  # spelling -> class
        firsts = []  # a spelling of each class
        for number in numbers:
            text = tokenizer.completion(tree.paths[number].ids)
            answer = extract_answer(text, problem.kind)
            if answer is None:
                continue
            if answer not in known:
                equal = (i for i, first in enumerate(firsts)
                         if same_vote(answer, first, problem.kind))
                known[answer] = next(equal, len(firsts))
                if known[answer] == len(firsts):
                    firsts.append(answer)
            self.classes[number] = known[answer]
        correct = [same_answer(first, problem.answer, problem.kind) for first in firsts]
        voting = self.classes >= 0
        self.right[voting] = np.array(correct, bool)[self.classes[voting]]
        self.truth = set(self.classes[self.right].tolist())  # classes that are right

    def worth(self, plan, start, weighted):
        """The VALUES of a plan. Its paths vote in the order of their scores: a tie goes to the
        answer of the best. weighted: whether the scores are weights."""
        tree = self.tree
        alive = tree.alive[plan]
        tokens = tree.stretch(plan, start, math.inf)
        order = np.argsort(-tree.weights[plan], kind="stable")
        right = self.right[alive[order]]
        classes = self.classes[alive[order]].tolist()
        ones = [1.0] * len(classes)
        weights = tree.weights[plan][order].tolist() if weighted else ones
        cons = vote(classes, ones)
        by_weight = vote(classes, weights)
        return [
            tree.tokens[plan] + int(tokens.sum()),
            tree.steps[plan] + int(tokens.max(initial=0)),
            tree.checked[plan],
            float(right.mean()),
            float(cons in self.truth),
            float(by_weight in self.truth),
            float(right.any())]


def vote(classes, weights):
    """The class with most weight, as stop.vote has it: -1 is no vote, ties go to the first; None if
    nobody votes."""
    votes = {}
    for number, weight in zip(classes, weights):
        if number >= 0:
            votes[number] = votes.get(number, 0.0) + weight
    return max(votes, key=votes.get) if votes else None


# Measured and stored


@dataclasses.dataclass
class Field:
    """Where plans are measured."""
    model: torch.nn.Module
    tokenizer: object
    stop: torch.nn.Module
    problems: list   # of Problem
    limit: int       # new tokens of a path
    folder: object   # pathlib.Path, for the results


def measure(field, signal, plans, sampling):
    """What plans are worth with a signal on the problems of a Field: (problems, P, VALUES) float64.
    Stored in the folder, a record a problem; a run that was killed goes on where it stopped."""
    prompts = [field.tokenizer.ask(problem) for problem in field.problems]
    graded = [[problem.id, problem.kind, problem.answer] for problem in field.problems]
    names = [str(plan) for plan in plans]
    identity = digest(
        model_digest(field.model), stop_digest(field.stop), signal.name, names, prompts, graded,
        field.limit, dataclasses.asdict(sampling))
    field.folder.mkdir(parents=True, exist_ok=True)
    heads = [{"id": problem.id} for problem in field.problems]
    job = Job(field.folder / f"plans-{identity[:12]}.jsonl", identity, heads)
    starts = [span.start for span in map(spans(plans).get, plans)]
    together = max(1, TOGETHER // max(plan.n for plan in plans))
    todo = processes.mine(job.todo())
    with job, progress(f"{signal.name}, seed {sampling.seed}", len(todo), "problem") as bar:
        for first in range(0, len(todo), together):
            chosen = todo[first:first + together]
            trees = grow(field.model, signal, [prompts[i] for i in chosen], plans, field.limit,
                         sampling, field.stop.m)
            for i, tree in zip(chosen, trees):
                known = Graded(tree, field.tokenizer, field.problems[i], plans)
                values = []
                for plan, start in zip(plans, starts):
                    values.append(known.worth(plan, start, signal.is_chance))
                job.add(i, {"values": values})
                bar.update()
    return np.array([record["values"] for record in job.finish()])
