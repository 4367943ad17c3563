"""How to spend a budget of labels: outcomes of many paths, or rollouts of few prefixes? (Beyond the
paper.)

    python toy/make.py --more 15000 --out runs
    python studies/labels.py --data runs/more.jsonl                     # the embedded toy
    python studies/labels.py --data runs/more.jsonl --budgets 500000,1100000,2200000,4400000
    python studies/labels.py --model M --data problems.jsonl --test heldout.jsonl --prefix 512,1024

The paper's label of a prefix is the share of its K rollouts that end right (section 4), and nearly
all that its supervision costs is rollouts. But a path is a rollout of each of its own prefixes, and
it is there already. Three ways to spend B tokens on paths and rollouts:

    outcomes   paths alone, of as many problems as B pays for; every prefix of every path has its
               path's outcome, 0 or 1, as its label
    rollouts   paths of fewer problems; the first few of each are cut, and each cut gets K rollouts
    mixed      what `rollouts` paid for and all that it says: a path's outcome counts as one more
               rollout, (right rollouts + outcome) / (K + 1), and prefixes without rollouts have
               their path's outcome

What is equal for all: the problems, in an order drawn by the seed, of which a way takes the first
that B pays for; 8 paths a problem; problems without a right or without a wrong path are paid for
and dropped; one STOP for both checkpoints; equal prefixes of a problem are rolled out, and paid
for, once. A seed is that of the problems' order, of paths and rollouts, and of the fit.

The fit is train.py's with the recipe of the model. The rule for its length, the same for all: the
recipe's epochs, but between LEAST_STEPS and MOST_STEPS optimiser steps, in whole epochs; of them
that with the lowest validation loss on held-out problems is taken, by the way's own labels.

What is measured: the share of right ones among the kept paths of held-out problems, whose paths are
sampled once. Intervals: 95%, by bootstrap over problems and seeds; differences are paired.
"""
import dataclasses
import functools
import io
import json
import math
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import plot
import train
from ablations import interval_with_seeds, score, stop_chances
from commands import train as train_command
from commands.common import open_model
from engine import fit as engine_fit
from engine.refill import sample_all
from engine.stored import about, model_digest, sample_paths
from eval import cell, evaluate
from model import Decoder
from plumbing.budget_plan import parse_checkpoints
from plumbing.checkpoint import find_folder
from plumbing.command_line import Common, check_values, command_line, option, require_positive
from plumbing.problems import read_problems, read_sources, without_held_out, without_repeats
from plumbing.processes import side_by_side
from plumbing.progress import progress
from plumbing.records import Job, claim, digest, locked, read_sealed, write_atomic, write_sealed
from plumbing.statistics import Interval
from plumbing.tokenizer import Tokenizer
from sample import prefill, room, sampling_of
from shared import numbers, read_seeds, require, stored_paths

LOOKS = (  # of the figure: each way, what it labels, its colour
    ("outcomes", "of every path", "high"),
    ("rollouts", "of a few prefixes", "bad"),
    ("mixed", "of both", "quiet"))
WAYS = tuple(way for way, _, _ in LOOKS)
PAIRS = (("outcomes", "rollouts"), ("mixed", "rollouts"), ("mixed", "outcomes"))
LEAST_STEPS = 300   # of a fit
MOST_STEPS = 1200
BLOCK = 250         # problems that are decoded together, before more are asked for


@dataclasses.dataclass(kw_only=True)
class Settings(Common):
    """What `python studies/labels.py` can be told. How a STOP is trained stands in the model's
    recipe.json, and the limit of a path too, unless it is given."""
    data: str | None = option(
        None, "problems to make labels from (default: train.jsonl in the model's directory)")
    test: str | None = option(
        None, "held-out problems (default: test.jsonl in the model's directory)")
    out: str = option("runs/labels", "folder for all that is made, taken up by the same command")
    budgets: str = option("500000,1100000,2200000", "tokens of paths and rollouts")
    seeds: str = option("0,1,2", "seeds, each of its own labels and fits")
    jobs: int = option(1, "seeds at a time, each a process of one thread")
    prefix: str = option("40,80", "the checkpoints, in new tokens")
    paths: int = option(8, "paths a problem")
    prefixes: int = option(3, "of them to be cut and rolled out")
    rollouts: int = option(8, "of a prefix")
    n: int = option(64, "evaluation: paths a problem")
    keep: int = option(8, "evaluation: paths kept")


NO_PART_OF_A_FIT = (  # settings that change no fit
    "out", "test", "budgets", "seeds", "seed", "jobs", "n", "keep", "batch", "attention", "device")


@dataclasses.dataclass
class Study:
    """What all fits share."""
    settings: Settings
    recipe: train_command.Settings  # how a STOP is trained
    model: Decoder
    tokenizer: Tokenizer
    problems: list    # of Problem, to make labels from
    tests: list       # of Problem
    limit: int        # of a path, in new tokens
    out: Path

    @property
    def checkpoints(self):
        """In new tokens, ascending."""
        return sorted(parse_checkpoints(self.settings.prefix))

    def sampling(self, seed):
        """The Sampling of a seed's paths and rollouts."""
        return sampling_of(dataclasses.replace(self.settings, seed=seed))

    def ordered(self, seed):
        """The problems in a seed's order."""
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(self.problems), generator=generator)
        return [self.problems[i] for i in order.tolist()]

    @functools.cached_property
    def claimed(self):
        """What shapes the fits, as JSON values."""
        known = dataclasses.asdict(self.settings)
        for name in NO_PART_OF_A_FIT:
            del known[name]
        recipe = dataclasses.asdict(self.recipe)
        asked = [dataclasses.asdict(problem) for problem in self.problems]
        return {**known, "recipe": digest(recipe), "limit": self.limit, "data": digest(asked),
                "weights": model_digest(self.model), "steps": [LEAST_STEPS, MOST_STEPS]}


# What a seed decodes


@dataclasses.dataclass
class Drawn:
    """A problem with what was decoded for it."""
    record: dict                # of sample_paths
    successes: dict | None = None  # {(checkpoint, prefix): right rollouts}; None: not rolled out
    rollout_tokens: int = 0

    @property
    def path_tokens(self):
        """Of all of its paths."""
        return sum(map(len, self.record["paths"]))

    @property
    def stays(self):
        """Whether it has both right and wrong paths."""
        return len(set(self.record["right"])) == 2

    def cost(self, way):
        """Tokens that this way of labelling pays for it."""
        return self.path_tokens + (0 if way == "outcomes" else self.rollout_tokens)


def make_pool(study, seed):
    """The Drawn problems of a seed, in its order: as many as the largest budget pays for, without
    rollouts and with them. ValueError where there are too few problems."""
    settings = study.settings
    folder = study.out / f"seed-{seed}"
    largest = max(numbers("budgets", settings.budgets))
    problems = study.ordered(seed)
    pool = []
    spent = {"outcomes": 0, "rollouts": 0}
    while spent["outcomes"] < largest:
        block = problems[len(pool):len(pool) + BLOCK]
        if not block:
            raise ValueError(
                f"data: found {len(problems)} problems, whose paths have {spent['outcomes']:,} "
                f"tokens, expected enough for the budget of {largest:,}")
        records = sample_paths(
            study.model, study.tokenizer, block, folder, settings.paths, study.limit,
            study.sampling(seed), settings.batch)
        drawn = [Drawn(record) for record in records]
        if spent["rollouts"] < largest:
            roll_out(study, drawn, block, folder, seed)
        for way in spent:
            spent[way] += sum(one.cost(way) for one in drawn)
        pool += drawn
        print(f"seed {seed}: {len(pool)} problems, {spent['outcomes']:,} tokens of paths",
              flush=True)
    return pool


def cuts_to_roll_out(study, drawn, problem):
    """The train.Cuts of a problem that stays whose prefixes are rolled out, equal ones once."""
    cuts = {}
    if drawn.stays:
        for number in range(study.settings.prefixes):
            for checkpoint in study.checkpoints:
                cut = train.Cut(drawn.record, problem, number, checkpoint)
                if not cut.ended:
                    cuts.setdefault((checkpoint, tuple(cut.prefix)), cut)
    return list(cuts.values())


def roll_out(study, drawn, problems, folder, seed):
    """K rollouts of the prefixes that get some, in a file; they are put into the Drawn problems."""
    K = study.settings.rollouts
    cuts = []
    owners = []
    for one, problem in zip(drawn, problems):
        found = cuts_to_roll_out(study, one, problem)
        cuts += found
        owners += [one] * len(found)
        one.successes = {}
    sampling = study.sampling(seed)
    graded = [[problem.kind, problem.answer] for problem in problems]
    heads = [about(cut) for cut in cuts]
    identity = digest(model_digest(study.model), dataclasses.asdict(sampling), graded, K,
                      study.limit, heads)
    job = Job(folder / f"rollouts-{identity[:12]}.jsonl", identity, heads)
    todo = job.todo()
    with job:
        for checkpoint in study.checkpoints:
            chosen = [i for i in todo if cuts[i].checkpoint == checkpoint]

            def grade(place, paths):
                i = chosen[place]
                job.add(i, {"successes": train.count_right(study.tokenizer, cuts[i], paths),
                            "tokens": sum(len(path.ids) for path in paths)})

            sample_all(
                study.model, [heads[i]["prefix_token_ids"] for i in chosen], K,
                study.limit - checkpoint, sampling, grade, batch=study.settings.batch)
    for one, cut, record in zip(owners, cuts, job.finish(), strict=True):
        one.successes[cut.checkpoint, tuple(cut.prefix)] = record["successes"]
        one.rollout_tokens += record["tokens"]


# Labels


@dataclasses.dataclass
class Prefix(train.Example):
    """A prefix to train on, as a row of the cache that holds all paths."""
    row: int = 0


def affordable(pool, way, budget):
    """How many of a pool's problems, from the first on, a budget pays for."""
    costs = np.cumsum([drawn.cost(way) for drawn in pool])
    return int(np.searchsorted(costs, budget, side="right"))


def labelled(study, pool, way, budget):
    """The Prefixes that a budget buys, and what was spent: (list, tokens, problems)."""
    count = affordable(pool, way, budget)
    bought = pool[:count]
    prefixes = []
    first_row = 0
    for drawn in bought:
        if drawn.stays:
            prefixes += labelled_problem(study, drawn, way, first_row)
            first_row += len(drawn.record["paths"])
    return prefixes, sum(drawn.cost(way) for drawn in bought), count


def labelled_problem(study, drawn, way, first_row):
    """The Prefixes of one problem; its paths' rows begin at first_row. An ended path counts once,
    with its own outcome."""
    K = study.settings.rollouts
    record = drawn.record
    prefixes = []
    count = study.settings.prefixes if way == "rollouts" else len(record["paths"])
    for number, (path, right) in enumerate(zip(record["paths"][:count], record["right"])):
        for checkpoint in study.checkpoints:
            prefix = path[:checkpoint]
            label = float(right)
            if way != "outcomes":
                successes = drawn.successes.get((checkpoint, tuple(prefix)))
                if successes is not None:
                    label = successes / K if way == "rollouts" else (successes + right) / (K + 1)
            prefixes.append(Prefix(
                record["prompt_ids"] + prefix, label, record["id"], checkpoint, first_row + number))
            if len(path) <= checkpoint:
                break
    return prefixes


def read_paths(study, pool):
    """A KVCache with a row for each path of the problems that stay, read up to the last checkpoint:
    every prefix is a part of a row."""
    texts = []
    for drawn in pool:
        if drawn.stays:
            for path in drawn.record["paths"]:
                texts.append(drawn.record["prompt_ids"] + path[:study.checkpoints[-1]])
    with torch.no_grad():
        cache, _ = prefill(study.model, texts)
    return cache


class CutRows(engine_fit.Prefixes):
    """Prefixes whose caches are rows of one cache, each cut to its prefix: paths are read once for
    all fits."""

    def __init__(self, model, prefixes, batch_size, m, paths):
        super().__init__(model, prefixes, batch_size, m, cache_bytes=0)
        self.paths = paths

    def __getitem__(self, i):
        batch = self.batches[i]
        cache = self.model.new_cache(len(batch), self.paths.longest + self.m)
        rows = [prefix.row for prefix in batch]
        cache.copy_rows(list(range(len(batch))), self.paths, rows)
        cache.set_lengths([len(prefix.ids) for prefix in batch])
        labels = torch.tensor([prefix.label for prefix in batch], device=self.model.device)
        return cache, labels


# The fits


def epochs_of(prefixes, recipe):
    """How many epochs a fit on so many training prefixes takes, by the rule of this study."""
    steps = math.ceil(math.ceil(prefixes / recipe.batch_size) / recipe.accumulation)  # an epoch
    wanted = min(max(recipe.epochs * steps, LEAST_STEPS), MOST_STEPS)
    return max(1, round(wanted / steps))


def fit(study, prefixes, paths, seed):
    """Train a Stop as train.py does; -> (its state of the epoch with the lowest validation loss,
    the metrics of that epoch)."""
    recipe = dataclasses.replace(study.recipe, seed=seed)
    training, held = train.split(prefixes, recipe.validation, seed)
    recipe.epochs = epochs_of(len(training), recipe)
    training = CutRows(study.model, training, recipe.batch_size, recipe.m, paths)
    held = CutRows(study.model, held, recipe.batch_size, recipe.m, paths)
    stop = train.new_stop(study.model, recipe)
    optimizer = torch.optim.AdamW(stop.parameters(), lr=recipe.lr, weight_decay=recipe.weight_decay)
    best = math.inf
    steps = recipe.epochs * math.ceil(len(training.batches) / recipe.accumulation)
    with progress("fit", steps, "step") as bar:
        for epoch in range(recipe.epochs):
            engine_fit.train_epoch(study.model, stop, optimizer, training, recipe, epoch, bar)
            row = engine_fit.validate(study.model, stop, held)
            if row["validation_loss"] < best:
                best = row["validation_loss"]
                metrics = row | {"epoch": epoch + 1, "epochs": recipe.epochs, "steps": steps}
                state = {name: weight.clone() for name, weight in stop.state_dict().items()}
    return state, metrics


def fit_file(study, way, budget, seed):
    """Where a fit lies once it is made."""
    return study.out / f"seed-{seed}" / f"{way}-{budget}"


def identity_of(study, way, budget, seed):
    """Digits that stand for a fit."""
    return digest(study.claimed, way, budget, seed)


def make_fits(study, budgets, seed):
    """Make the fits of a seed that are not in its folder yet."""
    todo = []
    for budget in budgets:
        for way in WAYS:
            if not fit_file(study, way, budget, seed).is_file():
                todo.append((way, budget))
    if not todo:
        return
    pool = make_pool(study, seed)
    used = max(affordable(pool, way, budget) for way, budget in todo)
    paths = read_paths(study, pool[:used])
    for way, budget in todo:
        prefixes, tokens, problems = labelled(study, pool, way, budget)
        train.require_several({prefix.problem for prefix in prefixes})
        state, metrics = fit(study, prefixes, paths, seed)
        about = {"tokens": tokens, "problems": problems, "prefixes": len(prefixes), **metrics}
        print(f"seed {seed}, {way}, {budget:,}: {json.dumps(about)}", flush=True)
        content = io.BytesIO()
        torch.save({"stop": state, "about": about}, content)
        write_sealed(fit_file(study, way, budget, seed), identity_of(study, way, budget, seed),
                     content.getvalue())


def make_fits_alone(settings, budgets, seed):
    """The same in a process of its own."""
    torch.set_num_threads(1)
    make_fits(open_study(settings), budgets, seed)


def read_fit(study, way, budget, seed):
    """(a fit's Stop, what is known about it)."""
    file = fit_file(study, way, budget, seed)
    content = read_sealed(file, identity_of(study, way, budget, seed), "remove it to fit again")
    saved = torch.load(io.BytesIO(content), map_location=study.model.device, weights_only=True)
    stop = train.new_stop(study.model, study.recipe)
    stop.load_state_dict(saved["stop"])
    return stop.eval(), saved["about"]


# What they are worth


def score_tests(study, records, stops):
    """{(key, checkpoint): scores (paths,) float32} of all Stops, {key: Stop}, on the paths of
    stored records. Scores that are there already are read; equal prefixes are scored once."""
    found = {}
    for checkpoint in study.checkpoints:
        prefixes = []
        for record in records:
            prefixes += [tuple(record["prompt_ids"] + path[:checkpoint])
                         for path in record["paths"]]
        identity = digest(study.claimed, prefixes)
        places = {prefix: place for place, prefix in enumerate(dict.fromkeys(prefixes))}
        files = {}
        scorers = {}
        for key, stop in stops.items():
            fitted = fit_file(study, *key)
            files[key] = fitted.with_name(f"{fitted.name}-scores-{identity[:12]}")
            if not files[key].is_file():
                scorers[key] = functools.partial(stop_chances, stop, study.model)
        if scorers:
            distinct = score(study.model, scorers, list(map(list, places)), study.recipe.m)
            order = [places[prefix] for prefix in prefixes]
            for key, scores in distinct.items():
                content = io.BytesIO()
                np.save(content, scores[order])
                write_sealed(files[key], digest(identity, key), content.getvalue())
        for key in stops:
            content = read_sealed(files[key], digest(identity, key), "remove it to score again")
            found[key, checkpoint] = np.load(io.BytesIO(content))
    return found


@dataclasses.dataclass
class Worth:
    """What a way is worth for a budget; lists have an entry a seed."""
    budget: int
    way: str
    about: list       # of what is known about each fit
    values: dict      # {(name, checkpoint): (seeds, problems) array}; name: avg, weighted
    auroc: dict       # {checkpoint: list}

    def mean(self, name):
        """The mean over seeds of what is known about the fits."""
        return float(np.mean([about[name] for about in self.about]))


def compare(study, records, budgets, seeds):
    """The Worths of all budgets and ways."""
    stops = {}
    about = {}
    for budget in budgets:
        for way in WAYS:
            for seed in seeds:
                key = (way, budget, seed)
                stops[key], about[key] = read_fit(study, *key)
    scores = score_tests(study, records, stops)
    worths = []
    reports = {}
    for checkpoint in study.checkpoints:
        named = {str(key): scores[key, checkpoint] for key in stops}
        reports[checkpoint] = evaluate(
            study.tests, records, named, checkpoint, study.settings.keep)["rows"]
    for budget in budgets:
        for way in WAYS:
            worth = Worth(budget, way, [about[way, budget, seed] for seed in seeds], {}, {})
            for checkpoint, rows in reports.items():
                own = [rows[str((way, budget, seed))] for seed in seeds]
                for name in ("avg", "weighted"):
                    worth.values[name, checkpoint] = np.array(
                        [row["per_problem"][name] for row in own])
                worth.auroc[checkpoint] = [row["auroc"] for row in own]
            worths.append(worth)
    return worths


def worth_table(worths, checkpoints):
    """The Worths in Markdown, means over seeds."""
    head = ["budget", "labels", "tokens", "problems", "prefixes"]
    for checkpoint in checkpoints:
        head += [f"avg at {checkpoint}", "by seed", "weighted", "AUROC"]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for worth in worths:
        cells = [f"{worth.budget:,}", worth.way]
        cells += [f"{worth.mean(name):,.0f}" for name in ("tokens", "problems", "prefixes")]
        for checkpoint in checkpoints:
            avg = worth.values["avg", checkpoint]
            cells += [
                cell(interval_with_seeds(avg)),
                " ".join(f"{value:.3f}" for value in avg.mean(1)),
                cell(interval_with_seeds(worth.values["weighted", checkpoint])),
                f"{np.mean(worth.auroc[checkpoint]):.3f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def differences(worths, checkpoints):
    """{(budget, one way, another, checkpoint): Interval of the difference in avg, paired}."""
    by_name = {(worth.budget, worth.way): worth.values for worth in worths}
    found = {}
    for budget in dict.fromkeys(worth.budget for worth in worths):
        for one, other in PAIRS:
            for checkpoint in checkpoints:
                ahead = by_name[budget, one]["avg", checkpoint]
                ahead = ahead - by_name[budget, other]["avg", checkpoint]
                found[budget, one, other, checkpoint] = interval_with_seeds(ahead)
    return found


def difference_table(found, checkpoints):
    """`differences` in Markdown."""
    head = ["budget", "difference of avg, paired", *[f"at {number}" for number in checkpoints]]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for budget, one, other in dict.fromkeys(key[:3] for key in found):
        cells = [cell(found[budget, one, other, checkpoint]) for checkpoint in checkpoints]
        lines.append(f"| {' | '.join([f'{budget:,}', f'{one} minus {other}', *cells])} |")
    return "\n".join(lines)


def draw_figure(file, rows, checkpoints, unpruned):
    """Accuracy against the labels' tokens as SVG, a panel a checkpoint. rows: of `numbers_of`;
    unpruned: the accuracy of all paths."""
    tokens = [row["tokens"] for row in rows]
    x = plot.Axis("tokens of paths and rollouts (log scale)", is_log=True,
                  ticks=plot.log_ticks(min(tokens), max(tokens)))
    parts = []
    top = 124
    for checkpoint in checkpoints:
        key = f"avg_{checkpoint}"
        lows = [row[key][1] for row in rows]
        highs = [row[key][2] for row in rows]
        y = plot.Axis(f"right ones among the kept, checked at {checkpoint} tokens", form=".0%",
                      ticks=plot.linear_ticks(min(unpruned, *lows), max(highs)))
        panel = plot.Panel(60, top, plot.WIDTH - 40, top + 220, x, y)
        curves = []
        for way, note, look in LOOKS:
            own = [row for row in rows if row["labels"] == way]
            curves.append(plot.Curve(way, note, look, [point_of(row, key) for row in own]))
        parts += plot.draw_curves(panel, curves)
        top += 320
    notes = ["What a STOP learns from: the outcome of every path, or rollouts of a few prefixes.",
             f"All paths without pruning: {unpruned:.0%} right.",
             "Shaded, or as a bar: 95% intervals over problems and seeds."]
    plot.write(file, "How to spend a budget of labels", notes, parts, height=top - 48)


def point_of(row, key):
    """The figure's point of a row."""
    value = Interval(*[round(part, 3) for part in row[key]])
    tokens = round(row["tokens"])
    about = (f"{row['labels']}: {value.mean:.1%} right [{value.low:.1%}, {value.high:.1%}], "
             f"{tokens:,} tokens")
    return plot.Point(tokens, value, about)


def numbers_of(worths, found, checkpoints):
    """The tables as JSON values."""
    rows = []
    for worth in worths:
        row = {"budget": worth.budget, "labels": worth.way, "tokens": worth.mean("tokens"),
               "fits": worth.about}
        for checkpoint in checkpoints:
            for name in ("avg", "weighted"):
                values = worth.values[name, checkpoint]
                row[f"{name}_{checkpoint}"] = interval_with_seeds(values)
                row[f"{name}_{checkpoint}_by_seed"] = values.mean(1).tolist()
            row[f"auroc_{checkpoint}_by_seed"] = worth.auroc[checkpoint]
        rows.append(row)
    pairs = []
    for (budget, one, other, checkpoint), difference in found.items():
        pairs.append({"budget": budget, "minuend": one, "subtrahend": other,
                      "checkpoint": checkpoint, "avg": difference})
    return {"rows": rows, "differences": pairs}


# The study


def check(settings):
    """ValueError on settings that cannot be, before any work is done."""
    sampling_of(settings)
    require_positive(settings, "jobs", "paths", "prefixes", "rollouts", "n", "keep", "batch",
                     "max_new_tokens")
    require("jobs", settings.jobs <= 1024, settings.jobs, "at most 1024")
    require("paths", settings.paths >= 2, settings.paths, "at least 2: a right and a wrong one")
    require("prefixes", settings.prefixes <= settings.paths, settings.prefixes,
            f"at most paths = {settings.paths}")
    require("keep", settings.keep <= settings.n, settings.keep, f"at most n = {settings.n}")
    parse_checkpoints(settings.prefix)


def read_recipe(settings):
    """train.py's settings of the model's recipe.json, for a STOP of this study's checkpoints."""
    content, file = train_command.recipe({"model": settings.model})
    check_values(train_command.Settings, content, file)
    recipe = train_command.Settings(**content)
    train_command.validate(recipe)
    return dataclasses.replace(recipe, prefix=settings.prefix)


def open_study(settings):
    """The Study of these settings."""
    recipe = read_recipe(settings)
    model, tokenizer = open_model(settings)
    folder = find_folder(settings.model)
    tests = read_problems(settings.test or folder / "test.jsonl")
    problems, _ = without_held_out(read_sources(settings.data or folder / "train.jsonl"), tests)
    problems, _ = without_repeats(problems)
    for name, found in (("data", problems), ("test", tests)):
        require(name, found, 0, "at least one problem")
    asked = settings.max_new_tokens or recipe.max_new_tokens
    limit = min(room(model, tokenizer.ask(problem), asked) for problem in problems + tests)
    last = max(parse_checkpoints(settings.prefix))
    require("prefix", last + recipe.m <= limit, last,
            f"at most {limit - recipe.m}: the limit of a path less {recipe.m} [STOP] tokens")
    return Study(settings, recipe, model, tokenizer, problems, tests, limit, Path(settings.out))


def make_all_fits(study, budgets, seeds):
    """Make the fits of all seeds, `jobs` seeds at a time."""
    jobs = min(study.settings.jobs, len(seeds))
    if jobs == 1:
        for seed in seeds:
            make_fits(study, budgets, seed)
        return
    tasks = [(study.settings, budgets, seed) for seed in seeds]

    def name(number):
        return f"fits of seed {seeds[number]}"

    for _ in side_by_side(make_fits_alone, tasks, jobs, name):
        pass


def main(settings):
    """Decode, label, fit, score, compare; the tables are printed, and lie in the out folder with
    labels.json and labels.svg; the last line is JSON."""
    check(settings)
    budgets = sorted(set(numbers("budgets", settings.budgets)))
    seeds = read_seeds(settings.seeds)
    study = open_study(settings)
    out = study.out
    out.mkdir(parents=True, exist_ok=True)
    with locked(out):
        claim(out / "settings.json", study.claimed)
        make_all_fits(study, budgets, seeds)
        records = stored_paths(
            study.model, study.tokenizer, study.tests, out / "test", settings.n, study.limit,
            settings)
        worths = compare(study, records, budgets, seeds)
        found = differences(worths, study.checkpoints)
        unpruned = float(np.mean([record["right"] for record in records]))
        title = (
            f"{len(study.tests)} held-out problems, {settings.n} paths each, {settings.keep} kept; "
            f"{settings.paths} paths a problem to label, {settings.rollouts} rollouts of "
            f"{settings.prefixes}; seeds {settings.seeds}; without pruning {unpruned:.3f} right; "
            "[low, high]: 95% bootstrap over problems and seeds")
        text = "\n\n".join([
            title, worth_table(worths, study.checkpoints),
            difference_table(found, study.checkpoints)])
        print(text)
        write_atomic(out / "labels.md", text + "\n")
        content = {"unpruned": unpruned} | numbers_of(worths, found, study.checkpoints)
        write_atomic(out / "labels.json", json.dumps(content, indent=1) + "\n")
        draw_figure(out / "labels.svg", content["rows"], study.checkpoints, unpruned)
    last = {"out": str(out)}
    for worth in worths:
        avg = worth.values["avg", study.checkpoints[-1]].mean()
        last[f"{worth.way} {worth.budget}"] = round(float(avg), 4)
    print(json.dumps(last))


if __name__ == "__main__":
    command_line(Settings, main)
