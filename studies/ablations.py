"""What each part of STOP is worth (paper, Tables 3 to 6): variants on the same labels and paths.

    python train.py && python studies/ablations.py   # the embedded toy: its labels and test paths
    python studies/ablations.py --only probe,tokens,m1 --seeds 0,1,2
    python studies/ablations.py --model M --labels runs/M/labels.jsonl --test heldout.jsonl

    default   STOP as train.py trains it
    probe     linear head on the prefix's last state
    tokens    no LoRA: [STOP] tokens and head only (Table 4)
    step      Linear-ReLU-Linear on the prefix's last state, outcome labels (STEP's)
    otv       one token, outcome labels (OTV's)
    hard      labels rounded: 1 from one half on
    k1, k8    labels of so many rollouts (Table 3)
    m1, m8    so many [STOP] tokens (Table 5)
    r4, r32   LoRA of such a rank (Table 6); k, m and r take any number

Single rollouts are not stored, so those of kN are drawn from a prefix's successes without
replacement, by the seed. An outcome label is k1's: whether one continuation ended right, which the
path that the prefix was cut from also is. A variant is trained and validated on its own labels.
What is finished is read from the out folder. Test paths are cut at the first checkpoint of
--prefix. Of train.py's flags those that shape labels (data, paths, rollouts, ...) have no effect
here.
"""
import dataclasses
import functools
import io
import json
import math
import re
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent))
import train
from baselines import progress
from eval import evaluate, interval
from model import Decoder
from plumbing.checkpoint import find_folder
from plumbing.command_line import command_line, option, require_positive, shown
from plumbing.problems import read_problems
from plumbing.records import (
    claim, digest, locked, read_records, read_sealed, write_atomic, write_sealed)
from sample import check_prompts, model_digest, open_model, prefill, require_finite
from shared import labels_file, require, stored_paths
from stop import like_lengths, parse_checkpoints

HIDDEN = 512  # of the two-layer head, as STEP has it
BATCH = 64    # prefixes scored in one pass
NO_PART_OF_A_VARIANT = train.NO_PART_OF_A_RUN + ("only", "seeds", "keep", "labels", "stored")


@dataclasses.dataclass(kw_only=True)
class Settings(train.Settings):
    """What `python studies/ablations.py` can be told: train.py's flags, and these."""
    labels: str | None = option(
        None, "labels.jsonl of a run of train.py (default: in runs/ and the model's name)")
    stored: str | None = option(
        None, "folder of the test paths, to be used again (default: that of the labels)")
    out: str | None = option(
        None, "folder of the finished variants (default: ablations/ beside the labels)")
    only: str = option(
        "probe,tokens,step,otv,hard,k1,k4,m1,m2,m8,r4,r8,r32", "variants beside the default")
    seeds: str = option("0", "seeds, as in 0,1,2: each trains every variant once")
    head_epochs: int = option(
        100, "passes over the training prefixes of the heads without tokens")


# The variants


@dataclasses.dataclass
class Variant:
    """What sets a variant apart from the default."""
    changes: dict = dataclasses.field(default_factory=dict)  # of train.py's settings
    rollouts: int | None = None  # of so many its labels are; None: of all
    rounded: bool = False        # whether its labels are 0 or 1
    head: str | None = None      # probe or step: a head on the last state, without [STOP]


NAMED = {
    "default": Variant(),
    "probe": Variant(head="probe"),
    "tokens": Variant(changes={"targets": ""}),
    "step": Variant(head="step", rollouts=1),
    "otv": Variant(changes={"m": 1}, rollouts=1),
    "hard": Variant(rounded=True)}


def read_variant(name):
    """The Variant of a name."""
    if name in NAMED:
        return NAMED[name]
    if not re.fullmatch(r"[kmr][1-9][0-9]{0,3}", name):
        known = ", ".join(NAMED)
        raise ValueError(
            f"only: found {shown(name)}, expected {known}, or k, m or r with a number as in m8")
    number = int(name[1:])
    if name.startswith("k"):
        return Variant(rollouts=number)
    setting = "m" if name.startswith("m") else "rank"
    return Variant(changes={setting: number})


def relabel(examples, file, k, seed):
    """The examples of a labels file with labels of `k` of each prefix's rollouts, drawn without
    replacement. ValueError where the file does not say how many rollouts a label stands for, or
    they are fewer than k."""
    generator = np.random.default_rng(seed)
    relabelled = []
    for example, (line, record) in zip(examples, read_records(file), strict=True):
        right = record.get("successes")
        rollouts = record.get("rollouts")
        counts = type(right) is int and type(rollouts) is int
        if not counts or not 0 <= right <= rollouts or rollouts < k:
            found = f"{shown(right)} and {shown(rollouts)}"
            raise ValueError(
                f"{file}:{line}: successes and rollouts: found {found}, expected whole numbers, "
                f"at least {k} rollouts")
        drawn = int(generator.hypergeometric(right, rollouts - right, k))
        relabelled.append(dataclasses.replace(example, label=drawn / k))
    return relabelled


def round_labels(examples):
    """The examples with hard labels: 1 from one half on."""
    rounded = []
    for example in examples:
        rounded.append(dataclasses.replace(example, label=float(example.label >= 0.5)))
    return rounded


# Heads on the frozen last state


@torch.inference_mode()
def last_states(model, sequences, batch=BATCH):
    """The final hidden states (N, hidden) float32 at the last tokens of lists of token ids."""
    states = torch.zeros(len(sequences), model.config.hidden_size)
    for rows in like_lengths(sequences, batch):
        _, hidden = prefill(model, [sequences[i] for i in rows])
        states[rows] = hidden.float().cpu()
    return states


@dataclasses.dataclass
class StateExample:
    """An example as a head sees it."""
    state: torch.Tensor  # (hidden,)
    label: float
    problem: str


def stack(examples):
    """States (N, hidden) and labels (N, 1) of StateExamples."""
    states = torch.stack([example.state for example in examples])
    labels = torch.tensor([[example.label] for example in examples])
    return states, labels


def fit_head(head, states, examples, settings):
    """Train a head (N, hidden) -> (N, 1) on frozen states by soft cross-entropy; it ends as at its
    best epoch."""
    inputs = []
    for state, example in zip(states, examples):
        inputs.append(StateExample(state, example.label, example.problem))
    training, validation = train.split(inputs, settings.validation, settings.seed)
    x, y = stack(training)
    held_x, held_y = stack(validation)
    optimizer = torch.optim.AdamW(
        head.parameters(), lr=settings.lr, weight_decay=settings.weight_decay)
    generator = torch.Generator().manual_seed(settings.seed)
    size = settings.batch_size * settings.accumulation
    steps = settings.epochs * math.ceil(len(x) / size)
    step = 0
    best = math.inf
    best_state = None
    for _ in range(settings.epochs):
        for rows in torch.randperm(len(x), generator=generator).split(size):
            rate = train.learning_rate(step, steps, settings)
            optimizer.param_groups[0]["lr"] = rate
            optimizer.zero_grad()
            loss = F.binary_cross_entropy_with_logits(head(x[rows]), y[rows])
            require_finite(loss, f"head: the loss of step {step + 1}")
            loss.backward()
            optimizer.step()
            step += 1
        with torch.no_grad():
            loss = F.binary_cross_entropy_with_logits(head(held_x), held_y)
        require_finite(loss, "head: the validation loss")
        if loss < best:
            best = loss.item()
            best_state = {name: weight.clone() for name, weight in head.state_dict().items()}
    head.load_state_dict(best_state)
    return head.requires_grad_(False)


def new_head(kind, hidden, seed):
    """An untrained head, probe or step, on states of this size."""
    torch.manual_seed(seed)
    if kind == "probe":
        return nn.Linear(hidden, 1)
    return nn.Sequential(nn.Linear(hidden, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 1))


# Training and scoring


@dataclasses.dataclass
class Study:
    """What all variants share."""
    settings: Settings
    model: Decoder
    file: Path        # of the labels
    examples: list    # of train.Example, in the order of the file
    tests: list       # of Problem
    records: list     # of sample.sample_paths: the tests' paths
    checkpoint: int   # where these are cut, in new tokens
    prefixes: list    # what remains of them: token ids, prompt included
    out: Path

    def claimed(self):
        """What shapes the variants, as JSON values."""
        about = {
            "labels": digest(self.file.read_text(encoding="utf-8"), self.prefixes),
            "weights": model_digest(self.model)}
        for key, value in dataclasses.asdict(self.settings).items():
            if key not in NO_PART_OF_A_VARIANT:
                about[key] = value
        return about

    def folder(self, name, seed):
        """Where a variant lies once it is trained."""
        return self.out / f"{name}-{seed}"


def train_variant(study, identity, name, seed):
    """Train one variant -> a function of a cache with B prefixes and of their last states
    (B, hidden) that gives their chances (B,)."""
    variant = read_variant(name)
    model = study.model
    examples = study.examples
    if variant.rollouts is not None:
        examples = relabel(examples, study.file, variant.rollouts, seed)
    if variant.rounded:
        examples = round_labels(examples)

    if variant.head is not None:
        settings = dataclasses.replace(
            study.settings, seed=seed, epochs=study.settings.head_epochs)
        head = new_head(variant.head, model.config.hidden_size, seed)
        states = last_states(model, [example.ids for example in examples])
        fit_head(head, states, examples, settings)
        return functools.partial(head_chances, head.to(model.device))

    settings = dataclasses.replace(study.settings, seed=seed, **variant.changes)
    out = study.folder(name, seed)
    out.mkdir(parents=True, exist_ok=True)
    stop = train.fit(model, examples, settings, out, digest(identity, name, seed))
    return functools.partial(stop_chances, stop, model)


def head_chances(head, cache, hidden):
    """Chances (B,) by a head on the last states (B, hidden) of the prefixes in a cache."""
    return head(hidden.float()).sigmoid()[:, 0]


def stop_chances(stop, model, cache, hidden):
    """Chances (B,) by STOP of the prefixes in a cache."""
    return stop.chance(stop(model, cache))


@torch.inference_mode()
def score(model, scorers, prefixes, longest, batch=BATCH):
    """{key: chances (N,) float32} of all scorers on the prefixes, each of which is prefilled once,
    with `longest` positions behind it."""
    check_prompts(model, prefixes, longest)
    found = {key: np.zeros(len(prefixes), np.float32) for key in scorers}
    with progress(len(prefixes), "prefix", "check") as bar:
        for rows in like_lengths(prefixes, batch):
            cache, hidden = prefill(model, [prefixes[i] for i in rows], longest)
            for key, scorer in scorers.items():
                chances = scorer(cache, hidden)
                require_finite(chances, f"{key}: score")
                found[key][rows] = chances.cpu().numpy()
            bar.update(len(rows))
    return found


def make_scores(study, identity, names, seeds):
    """Train what is not in the out folder yet, and write its scores of the test prefixes there."""
    scorers = {}
    for name in names:
        for seed in seeds:
            if not (study.folder(name, seed) / "scores").is_file():
                print(f"--- {name}, seed {seed}", flush=True)
                scorers[name, seed] = train_variant(study, identity, name, seed)
    if not scorers:
        return
    longest = most_tokens(names, study.settings)
    found = score(study.model, scorers, study.prefixes, longest)
    for (name, seed), chances in found.items():
        folder = study.folder(name, seed)
        folder.mkdir(parents=True, exist_ok=True)
        content = io.BytesIO()
        np.save(content, chances)
        write_sealed(folder / "scores", digest(identity, name, seed), content.getvalue())


def read_scores(study, identity, name, seed):
    """A variant's scores (N,) of the test prefixes."""
    file = study.folder(name, seed) / "scores"
    advice = "remove it to score again"
    content = read_sealed(file, digest(identity, name, seed), advice)
    return np.load(io.BytesIO(content))


def most_tokens(names, settings):
    """The most [STOP] tokens of any of these variants."""
    return max(read_variant(name).changes.get("m", settings.m) for name in names)


# The table


@dataclasses.dataclass
class Row:
    """What a variant's kept paths are worth, seed by seed."""
    avg: list = dataclasses.field(default_factory=list)       # (seeds, problems)
    cons: list = dataclasses.field(default_factory=list)      # (seeds, problems)
    auroc: list = dataclasses.field(default_factory=list)     # (seeds,)
    pairwise: list = dataclasses.field(default_factory=list)  # (seeds,)


def compare(study, identity, names, seeds):
    """{name: Row} of the scores in the out folder."""
    rows = {name: Row() for name in names}
    for seed in seeds:
        scores = {name: read_scores(study, identity, name, seed) for name in names}
        report = evaluate(
            study.tests, study.records, scores, study.checkpoint, study.settings.keep)
        for name, row in rows.items():
            found = report["rows"][name]
            row.avg.append(found["per_problem"]["avg"])
            row.cons.append(found["per_problem"]["cons"])
            row.auroc.append(found["auroc"])
            row.pairwise.append(found["pairwise"])
    return rows


def show_interval(values):
    """The mean of one value a problem, and its interval."""
    found = interval(values)
    return f"{found.mean:.3f} [{found.low:.3f}, {found.high:.3f}]"


def table(rows, n, keep):
    """The rows in Markdown."""
    head = ("variant", f"avg@{keep} of {n}", "minus default, paired", "cons", "AUROC", "pairwise",
            "avg by seed")
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    default = np.mean(rows["default"].avg, axis=0)  # (problems,)
    for name, row in rows.items():
        avg = np.mean(row.avg, axis=0)
        by_seed = [f"{np.mean(values):.3f}" for values in row.avg]
        cells = (
            name,
            show_interval(avg),
            show_interval(avg - default),
            show_interval(np.mean(row.cons, axis=0)),
            f"{np.mean(row.auroc):.3f}",
            f"{np.mean(row.pairwise):.3f}",
            " ".join(by_seed))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


# The study


def read_names(text):
    """The variants in a flag's text, behind the default."""
    names = ["default"]
    for name in text.split(","):
        if name and name not in names:
            read_variant(name)
            names.append(name)
    return names


def read_seeds(text):
    """Different seeds in a flag's text."""
    if not re.fullmatch(r"\d{1,9}(,\d{1,9})*", text, re.ASCII):
        raise ValueError(f"seeds: found {shown(text)}, expected whole numbers as in 0,1,2")
    return list(dict.fromkeys(int(seed) for seed in text.split(",")))


def check(settings):
    """ValueError on settings that cannot be, before any work is done."""
    train.check(settings)
    require_positive(settings, "head_epochs")
    require("plan", not settings.plan, settings.plan, "a run of train.py: a study has no plan")


def open_study(settings, names):
    """The Study of these settings and variants. Test paths that are not there are sampled."""
    model, tokenizer = open_model(settings)
    tests = read_problems(settings.test or find_folder(settings.model) / "test.jsonl")
    file = labels_file(settings)
    longest = most_tokens(names, settings)
    examples = train.given_labels(file, model, tokenizer, longest, tests)
    for name in names:
        k = read_variant(name).rollouts
        if k is not None:
            relabel(examples, file, k, seed=0)  # labels that cannot serve are found at once

    folder = Path(settings.stored or file.parent)
    records = stored_paths(
        model, tokenizer, tests, folder, settings.n, settings.max_new_tokens, settings)
    checkpoint = parse_checkpoints(settings.prefix)[0]
    prefixes = []
    for record in records:
        prefixes += [record["prompt_ids"] + path[:checkpoint] for path in record["paths"]]
    out = Path(settings.out or file.parent / "ablations")
    return Study(settings, model, file, examples, tests, records, checkpoint, prefixes, out)


def main(settings):
    """Train, score, compare; prints the table, also in out/ablations.md; the last line is JSON."""
    check(settings)
    names = read_names(settings.only)
    seeds = read_seeds(settings.seeds)
    study = open_study(settings, names)
    claimed = study.claimed()
    identity = digest(claimed)
    study.out.mkdir(parents=True, exist_ok=True)
    with locked(study.out):
        claim(study.out / "settings.json", claimed)
        make_scores(study, identity, names, seeds)
        rows = compare(study, identity, names, seeds)
        title = (
            f"{len(study.tests)} problems, {settings.n} paths each, checkpoint {study.checkpoint}, "
            f"{len(study.examples)} training prefixes, seeds {settings.seeds}; "
            "[low, high]: 95% bootstrap over problems")
        text = f"{title}\n\n{table(rows, settings.n, settings.keep)}"
        print(text)
        write_atomic(study.out / "ablations.md", text + "\n")
    last = {"out": str(study.out)}
    for name, row in rows.items():
        last[name] = round(float(np.mean(row.avg)), 4)
    print(json.dumps(last))


if __name__ == "__main__":
    command_line(Settings, main, train.recipe)
