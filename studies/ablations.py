"""What each part of STOP is worth (paper, Tables 3 to 6): variants on the same labels and paths.

    python train.py && python studies/ablations.py   # the embedded toy: its labels and test paths
    python studies/ablations.py --only probe,tokens,m1 --seeds 0,1,2
    python studies/ablations.py --model M --labels runs/M/labels.jsonl --test heldout.jsonl

On the toy, at a late checkpoint, of 1,000 further problems:

    python toy/make.py --more 1000 --out runs
    python studies/ablations.py --test runs/more.jsonl --stored runs --prefix 80 \
        --only probe,scatr,step,tokens,otv,hard,k1,m1,m8,r4,ranking,set,every --seeds 0,1,2 \
        --out runs/at-80 --ceiling runs/ceiling/ceiling.json

    default   STOP as train.py trains it for one checkpoint
    every     one STOP for all checkpoints of the labels, as train.py trains it for several
    probe     linear head on the prefix's last state
    tokens    no LoRA: [STOP] tokens and head only (Table 4)
    scatr     Linear-ReLU-Linear on the last token's state behind the last layer but one (SCATR,
              arXiv 2604.16535)
    step      Linear-ReLU-Linear on the state at each end of a step, outcome labels; the score is
              the mean over the steps so far (STEP, arXiv 2601.09093)
    otv       one token, outcome labels (OTV's)
    hard      labels rounded: 1 from one half on
    k1, k8    labels of so many rollouts (Table 3)
    m1, m8    so many [STOP] tokens (Table 5)
    r4, r32   LoRA of such a rank (Table 6); k, m and r take any number
    ranking   to the default's loss is added that of the pairs of a problem in a batch
    set       one attention layer across a problem's [STOP] states, on top of the default of the
              same seed; it starts as the default and is trained on the sets that the labels hold

Single rollouts are not stored, so those of kN are drawn from a prefix's successes without
replacement, by the seed. An outcome label is k1's: whether one continuation ended right, which the
path that the prefix was cut from also is. A variant is trained and validated on its own labels.
A step ends at a token with a blank line in it, or at the toy's <nl>.
Test paths are cut at the first checkpoint of --prefix, and all variants but `every` are trained on
the labels of that checkpoint (labels that name none count as such). What is finished is read from
the out folder. Train.py's flags that shape labels (data, paths, rollouts, ...) are refused.
"""
import dataclasses
import functools
import io
import json
import math
import re
import sys
from pathlib import Path
from typing import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent))
import train
from commands import train as train_command
from commands.common import open_model
from commands.stop import recorded_states
from engine import fit as engine_fit
from engine.stored import model_digest
from eval import cell, evaluate
from model import Decoder
from plumbing.budget_plan import parse_checkpoints
from plumbing.checkpoint import find_folder
from plumbing.command_line import command_line, option, refuse_flags, require_positive, shown
from plumbing.problems import read_problems
from plumbing.progress import progress
from plumbing.records import (
    claim, digest, locked, read_records, read_sealed, write_atomic, write_sealed)
from plumbing.statistics import Interval, interval
from plumbing.tokenizer import Tokenizer
from sample import prefill, require_finite, validate_prompts
from shared import labels_file, read_ceilings, read_seeds, require, stored_paths
from stop import Stop, like_lengths

HIDDEN = 512  # of the two-layer heads, as STEP has it
BATCH = 64    # prefixes scored in one pass
STEP_ENDS = ("\n\n", "<nl>")  # a token that holds one of these ends a step
NO_PART_OF_A_VARIANT = train_command.NO_PART_OF_A_RUN + (
    "only", "seeds", "keep", "labels", "stored", "ceiling")


@dataclasses.dataclass(kw_only=True)
class Settings(train_command.Settings):
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
    ceiling: str | None = option(
        None, "ceiling.json of studies/ceiling.py: what any scorer could reach")


# The variants


@dataclasses.dataclass
class Variant:
    """What sets a variant apart from the default."""
    changes: dict = dataclasses.field(default_factory=dict)  # of train.py's settings
    rollouts: int | None = None  # of so many its labels are; None: of all
    rounded: bool = False        # whether its labels are 0 or 1
    head: str | None = None      # probe, scatr or step: a head on the path's states, without [STOP]
    ranking: bool = False        # whether its loss also looks at pairs within a problem
    among: bool = False          # whether its score depends on the problem's other prefixes
    every: bool = False          # whether it is trained on the labels of all checkpoints


NAMED = {
    "default": Variant(),
    "probe": Variant(head="probe"),
    "tokens": Variant(changes={"targets": ""}),
    "scatr": Variant(head="scatr"),
    "step": Variant(head="step", rollouts=1),
    "otv": Variant(changes={"m": 1}, rollouts=1),
    "hard": Variant(rounded=True),
    "ranking": Variant(ranking=True),
    "set": Variant(among=True),
    "every": Variant(every=True)}


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


# Heads on frozen states


@torch.inference_mode()
def last_states(model, sequences, batch=BATCH):
    """The final hidden states (N, hidden) float32 at the last tokens of lists of token ids."""
    states = torch.zeros(len(sequences), model.config.hidden_size)
    for rows in like_lengths(sequences, batch):
        _, hidden = prefill(model, [sequences[i] for i in rows])
        states[rows] = hidden.float().cpu()
    return states


@dataclasses.dataclass
class Text:
    """What a head reads: token ids, and where in them the path begins."""
    ids: list
    begin: int  # length of the prompt

    def step_ends(self, marks):
        """The positions of the path's tokens that end a step; its last position where none does."""
        places = [i for i in range(self.begin, len(self.ids)) if self.ids[i] in marks]
        return places or [len(self.ids) - 1]


def texts_of(examples):
    """The Texts of train.Examples. Where the checkpoint is not known the prompt counts as path."""
    texts = []
    for example in examples:
        length = len(example.ids)
        begin = 0 if example.checkpoint is None else max(0, length - example.checkpoint)
        texts.append(Text(example.ids, begin))
    return texts


@dataclasses.dataclass
class States:
    """Hidden states of N texts, float32."""
    penultimate: torch.Tensor  # (N, hidden): at the last token, behind the last layer but one
    steps: list                # N of (step ends, hidden): behind the final norm


@torch.inference_mode()
def read_states(model, texts, marks, batch=BATCH):
    """The States of Texts. marks: the ids of tokens that end a step."""
    sequences = [text.ids for text in texts]
    device = model.device
    penultimate = torch.zeros(len(texts), model.config.hidden_size)
    steps = [None] * len(texts)
    with recorded_states(model) as passes, progress("states", len(texts), "prefix") as bar:
        for rows in like_lengths(sequences, batch):
            passes.clear()
            tensors = [torch.tensor(sequences[i]) for i in rows]
            # (B, T), padded on the right, where no token looks
            ids = nn.utils.rnn.pad_sequence(tensors, batch_first=True)
            final = model(ids.to(device)).float().cpu()
            before_last = passes[-3].float().cpu()  # the last two are the last layer and the norm
            for place, i in enumerate(rows):
                penultimate[i] = before_last[place, len(sequences[i]) - 1]
                steps[i] = final[place, texts[i].step_ends(marks)]
            bar.update(len(rows))
    return States(penultimate, steps)


def step_marks(tokenizer, size):
    """The ids below `size` of the tokens that end a step."""
    marks = set()
    for token in range(size):
        text = tokenizer.decode([token])
        if any(end in text for end in STEP_ENDS):
            marks.add(token)
    return marks


@dataclasses.dataclass
class Row:
    """A row of a table of states, as `train.split` takes it."""
    number: int
    problem: str


def split_rows(examples, settings):
    """The numbers (tensors) of the examples to train on, and of those to validate on."""
    rows = [Row(number, example.problem) for number, example in enumerate(examples)]
    training, validation = train.split(rows, settings.validation, settings.seed)
    return (torch.tensor([row.number for row in training]),
            torch.tensor([row.number for row in validation]))


def fit_module(module, loss_of, units, held, settings):
    """Train a module on units (a list of row numbers (tensors) that stay together); it ends as at
    its best epoch. loss_of: of row numbers; held: those to validate on."""
    optimizer = torch.optim.AdamW(
        module.parameters(), lr=settings.lr, weight_decay=settings.weight_decay)
    generator = torch.Generator().manual_seed(settings.seed)
    size = settings.batch_size * settings.accumulation
    steps = settings.epochs * math.ceil(len(units) / size)
    step = 0
    best = math.inf
    best_state = None
    for _ in range(settings.epochs):
        for chosen in torch.randperm(len(units), generator=generator).split(size):
            rate = train.learning_rate(step, steps, settings)
            optimizer.param_groups[0]["lr"] = rate
            optimizer.zero_grad()
            loss = loss_of(torch.cat([units[i] for i in chosen.tolist()]))
            require_finite(loss, f"head: the loss of step {step + 1}")
            loss.backward()
            optimizer.step()
            step += 1
        with torch.no_grad():
            loss = loss_of(held)
        require_finite(loss, "head: the validation loss")
        if loss < best:
            best = loss.item()
            best_state = {name: weight.clone() for name, weight in module.state_dict().items()}
    module.load_state_dict(best_state)
    return module.requires_grad_(False)


def fit_head(head, states, examples, settings):
    """Train a head (N, hidden) -> (N, 1) on frozen states (N, hidden) of N examples by soft
    cross-entropy."""
    labels = torch.tensor([[example.label] for example in examples])
    training, held = split_rows(examples, settings)

    def loss_of(rows):
        return F.binary_cross_entropy_with_logits(head(states[rows]), labels[rows])

    return fit_module(head, loss_of, training.split(1), held, settings)


def new_head(kind, hidden, seed):
    """An untrained head on states of this size: linear for a probe, else of two layers."""
    torch.manual_seed(seed)
    if kind == "probe":
        return nn.Linear(hidden, 1)
    return nn.Sequential(nn.Linear(hidden, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 1))


def fit_step_head(head, steps, examples, settings):
    """Train STEP's head on the state at each end of a step, which bears its path's label."""
    of_steps = []
    for example, states in zip(examples, steps):
        of_steps += [example] * len(states)
    return fit_head(head, torch.cat(steps), of_steps, settings)


@torch.inference_mode()
def state_chances(kind, head, states):
    """Chances (N,) of States by SCATR's head, or by STEP's: the mean over the steps."""
    if kind == "scatr":
        return head(states.penultimate).sigmoid()[:, 0]
    means = [head(of_path).sigmoid().mean() for of_path in states.steps]
    return torch.stack(means)


# A score that sees the set


class SetHead(nn.Module):
    """One attention layer across the [STOP] states h_i of a set, and a head:

        z_i = w (h_i + O attend(norm h_i, norm h_j for all j of the set)) + b

    O starts at zero, w and b as STOP's own head: before training it is STOP."""

    def __init__(self, stop, seed):
        super().__init__()
        torch.manual_seed(seed)
        hidden = stop.head.weight.shape[1]
        self.attention = nn.MultiheadAttention(hidden, num_heads=1)
        nn.init.zeros_(self.attention.out_proj.weight)
        nn.init.zeros_(self.attention.out_proj.bias)
        self.head = nn.Linear(hidden, 1)
        with torch.no_grad():
            weight = stop.head.weight[-1:]
            bias = stop.head.bias[-1:]
            if stop.head_kind == "softmax":  # sigmoid(z1 - z0)
                weight = weight - stop.head.weight[:1]
                bias = bias - stop.head.bias[:1]
            self.head.weight.copy_(weight)
            self.head.bias.copy_(bias)

    def forward(self, states, sets):
        """Logits (B,) of states (B, hidden); sets (B,): the number of each one's set."""
        normed = F.layer_norm(states, states.shape[-1:])
        apart = sets[:, None] != sets  # (B, B): True where one does not see the other
        seen, _ = self.attention(normed, normed, normed, attn_mask=apart, need_weights=False)
        return self.head(states + seen)[:, 0]


def stop_states(stop, model, cache, hidden):
    """The last [STOP] position's final states (B, hidden) float32, of the prefixes in a cache."""
    with recorded_states(model) as passes:
        stop(model, cache)
    return passes[-1][:, -1].float()


def fit_set_head(head, states, examples, settings):
    """Train a SetHead on the sets of a problem's prefixes at one checkpoint."""
    numbers = {}
    sets = []
    for example in examples:
        sets.append(numbers.setdefault((example.problem, example.checkpoint), len(numbers)))
    sets = torch.tensor(sets)
    labels = torch.tensor([example.label for example in examples])
    training, held = split_rows(examples, settings)
    units = [training[sets[training] == number] for number in sets[training].unique()]

    def loss_of(rows):
        logits = head(states[rows], sets[rows])
        return F.binary_cross_entropy_with_logits(logits, labels[rows])

    return fit_module(head, loss_of, units, held, settings)


@torch.inference_mode()
def set_chances(head, states, n):
    """Chances (N,) by a SetHead of states (N, hidden), of which n follow each other in a set."""
    chances = []
    for of_set in states.split(n):
        sets = torch.zeros(len(of_set), dtype=torch.int64)
        chances.append(head(of_set, sets).sigmoid())
    return torch.cat(chances)


# A loss that ranks


def ranking_loss(logits, labels, problems):
    """Mean over the pairs of one problem with different labels y of

        |y_i - y_j| * ln(1 + exp(-(z_i - z_j)))    (i is the better one)

    weighted by |y_i - y_j|; 0 where there is no pair. logits z, labels (B,); problems: B names."""
    numbers = {}
    groups = torch.tensor([numbers.setdefault(name, len(numbers)) for name in problems])
    gap = labels[:, None] - labels  # (B, B)
    same = (groups[:, None] == groups).to(gap.device)
    weight = gap.clamp(min=0) * same
    losses = F.softplus(logits - logits[:, None])
    return (weight * losses).sum() / weight.sum().clamp(min=1e-9)


def fit_ranking(model, examples, settings, out):
    """Train a Stop on its own loss and `ranking_loss`; that of the epoch with the lowest sum on the
    validation problems is returned, and lies in out/stop."""
    training, validation = train.split(examples, settings.validation, settings.seed)
    kept = engine_fit.cache_bytes(model, settings) / 2
    training = engine_fit.Prefixes(model, training, settings.batch_size, settings.m, kept)
    validation = engine_fit.Prefixes(model, validation, settings.batch_size, settings.m, kept)
    stop = train.new_stop(model, settings)

    def loss_of(prefixes, number):
        cache, labels = prefixes[number]
        logits = stop(model, cache)
        chances = stop.chance(logits)
        problems = [example.problem for example in prefixes.batches[number]]
        return stop.loss(logits, labels) + ranking_loss(chances.logit(1e-6), labels, problems)

    def validation_loss():
        losses = [loss_of(validation, number) for number in range(len(validation.batches))]
        sizes = [len(batch) for batch in validation.batches]
        return np.average(torch.stack(losses).tolist(), weights=sizes)

    optimizer = torch.optim.AdamW(
        stop.parameters(), lr=settings.lr, weight_decay=settings.weight_decay)
    steps = settings.epochs * math.ceil(len(training.batches) / settings.accumulation)
    step = 0
    best = math.inf
    for epoch in range(settings.epochs):
        stop.train()
        torch.manual_seed(settings.seed + epoch)
        for numbers in torch.randperm(len(training.batches)).split(settings.accumulation):
            for number in numbers.tolist():
                loss = loss_of(training, number) / len(numbers)
                require_finite(loss, f"ranking: the loss of step {step + 1}")
                loss.backward()
            nn.utils.clip_grad_norm_(stop.parameters(), settings.clip or math.inf)
            optimizer.param_groups[0]["lr"] = train.learning_rate(step, steps, settings)
            optimizer.step()
            optimizer.zero_grad()
            step += 1
        stop.eval()
        with torch.no_grad():
            loss = validation_loss()
        if loss < best:
            best = loss
            trained = {
                "settings": dataclasses.asdict(settings),
                "epoch": epoch + 1,
                "metrics": {"validation_loss": loss}}
            stop.save(out / "stop", trained)
    return Stop.load(out / "stop", model)


# Training and scoring


@dataclasses.dataclass
class Study:
    """What all variants share."""
    settings: Settings
    model: Decoder
    tokenizer: Tokenizer
    file: Path        # of the labels
    examples: list    # of train.Example, in the order of the file: of all checkpoints
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

    def at_checkpoint(self, examples):
        """Of examples in the order of the file those at this study's checkpoint."""
        return [example for example in examples
                if example.checkpoint in (None, self.checkpoint)]

    def folder(self, name, seed):
        """Where a variant lies once it is trained."""
        return self.out / f"{name}-{seed}"

    @functools.cached_property
    def marks(self):
        """The ids of tokens that end a step."""
        return step_marks(self.tokenizer, self.tokenizer.library.get_vocab_size())

    @functools.cached_property
    def states(self):
        """The States of the training prefixes."""
        return read_states(
            self.model, texts_of(self.at_checkpoint(self.examples)), self.marks)

    @functools.cached_property
    def test_states(self):
        """The States of the test prefixes."""
        texts = []
        prefixes = iter(self.prefixes)
        for record in self.records:
            for _ in record["paths"]:
                texts.append(Text(next(prefixes), len(record["prompt_ids"])))
        return read_states(self.model, texts, self.marks)


def train_variant(study, identity, name, seed):
    """Train one variant -> its Scorer."""
    variant = read_variant(name)
    model = study.model
    examples = study.examples
    if variant.rollouts is not None:
        examples = relabel(examples, study.file, variant.rollouts, seed)
    if variant.rounded:
        examples = round_labels(examples)
    if not variant.every:
        examples = study.at_checkpoint(examples)

    if variant.head is not None or variant.among:
        settings = dataclasses.replace(
            study.settings, seed=seed, epochs=study.settings.head_epochs)
        if variant.among:
            return train_set(study, examples, settings, seed)
        return train_head(study, variant.head, examples, settings, seed)

    settings = dataclasses.replace(study.settings, seed=seed, **variant.changes)
    out = study.folder(name, seed)
    out.mkdir(parents=True, exist_ok=True)
    if variant.ranking:
        stop = fit_ranking(model, examples, settings, out)
    else:
        stop = engine_fit.fit(model, examples, settings, out, digest(identity, name, seed))
    return Scorer(of_cache=functools.partial(stop_chances, stop, model))


def train_head(study, kind, examples, settings, seed):
    """The Scorer of a head on frozen states."""
    model = study.model
    head = new_head(kind, model.config.hidden_size, seed)
    if kind == "probe":
        states = last_states(model, [example.ids for example in examples])
        fit_head(head, states, examples, settings)
        return Scorer(of_cache=functools.partial(head_chances, head.to(model.device)))
    if kind == "scatr":
        fit_head(head, study.states.penultimate, examples, settings)
    else:
        fit_step_head(head, study.states.steps, examples, settings)
    return Scorer(of_states=functools.partial(state_chances, kind, head))


def train_set(study, examples, settings, seed):
    """The Scorer of a SetHead on the default of the same seed, which is trained by now."""
    stop = Stop.load(study.folder("default", seed) / "stop", study.model)
    read = functools.partial(stop_states, stop, study.model)
    ids = [example.ids for example in examples]
    found = score(study.model, {"set": read}, ids, stop.m)
    head = SetHead(stop, seed)
    fit_set_head(head, torch.from_numpy(found["set"]), examples, settings)
    return Scorer(of_cache=read, of_sets=functools.partial(set_chances, head))


@dataclasses.dataclass
class Scorer:
    """How a trained variant scores the test prefixes: by one of these, or `of_sets` on what
    `of_cache` gives."""
    of_cache: Callable | None = None   # a cache of B prefixes, their last states -> chances (B,)
    of_states: Callable | None = None  # States of N prefixes -> chances (N,)
    of_sets: Callable | None = None    # [STOP] states (N, hidden), paths a problem -> chances (N,)


def head_chances(head, cache, hidden):
    """Chances (B,) by a head on the last states (B, hidden) of the prefixes in a cache."""
    return head(hidden.float()).sigmoid()[:, 0]


def stop_chances(stop, model, cache, hidden):
    """Chances (B,) by STOP of the prefixes in a cache."""
    return stop.chance(stop(model, cache))


@torch.inference_mode()
def score(model, scorers, prefixes, longest, batch=BATCH):
    """{key: (N, ...) float32} of all scorers on the prefixes, each of which is prefilled once, with
    `longest` positions behind it. A scorer gives chances (B,), or states (B, hidden)."""
    validate_prompts(model, prefixes, longest)
    found = {}
    with progress("check", len(prefixes), "prefix") as bar:
        for rows in like_lengths(prefixes, batch):
            cache, hidden = prefill(model, [prefixes[i] for i in rows], longest)
            for key, scorer in scorers.items():
                values = scorer(cache, hidden)
                require_finite(values, f"{key}: score")
                if key not in found:
                    found[key] = np.zeros((len(prefixes), *values.shape[1:]), np.float32)
                found[key][rows] = values.cpu().numpy()
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
    of_cache = {key: scorer.of_cache for key, scorer in scorers.items() if scorer.of_cache}
    found = {}
    if of_cache:
        longest = most_tokens(names, study.settings)
        found = score(study.model, of_cache, study.prefixes, longest)
    for (name, seed), scorer in scorers.items():
        if scorer.of_states is not None:
            chances = scorer.of_states(study.test_states).numpy()
        else:
            chances = found[name, seed]
        if scorer.of_sets is not None:
            chances = scorer.of_sets(torch.from_numpy(chances), study.settings.n).numpy()
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
class Worth:
    """What a variant's kept paths are worth, seed by seed."""
    avg: list = dataclasses.field(default_factory=list)       # (seeds, problems)
    cons: list = dataclasses.field(default_factory=list)      # (seeds, problems)
    auroc: list = dataclasses.field(default_factory=list)     # (seeds,)
    pairwise: list = dataclasses.field(default_factory=list)  # (seeds,)


def compare(study, identity, names, seeds):
    """{name: Worth} of the scores in the out folder."""
    rows = {name: Worth() for name in names}
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


def interval_with_seeds(values, draws=2000):
    """The Interval of values (seeds, problems), by bootstrap over both. Few seeds say little of
    other seeds: it is rather too narrow."""
    values = np.asarray(values)
    generator = np.random.default_rng(0)
    seeds, problems = values.shape
    means = []
    for _ in range(draws):
        of_seeds = values[generator.integers(0, seeds, seeds)]
        means.append(of_seeds.mean(0)[generator.integers(0, problems, problems)].mean())
    low, high = np.quantile(means, (0.025, 0.975)).tolist()
    return Interval(float(values.mean()), low, high)


def table(rows, n, keep, reach):
    """The rows in Markdown. reach: a Reach, or None."""
    head = ["variant", f"avg@{keep} of {n}", "minus default, paired", "the same, over seeds too",
            "cons", "AUROC", "pairwise", "avg by seed"]
    if reach is not None:
        head.append("of the way to the ceiling")
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    default = np.array(rows["default"].avg)  # (seeds, problems)
    for name, row in rows.items():
        avg = np.mean(row.avg, axis=0)
        by_seed = [f"{np.mean(values):.3f}" for values in row.avg]
        cells = [
            name,
            show_interval(avg),
            show_interval(avg - default.mean(0)),
            cell(interval_with_seeds(row.avg - default)),
            show_interval(np.mean(row.cons, axis=0)),
            f"{np.mean(row.auroc):.3f}",
            f"{np.mean(row.pairwise):.3f}",
            " ".join(by_seed)]
        if reach is not None:
            cells.append(f"{reach.share(avg.mean()):.2f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


@dataclasses.dataclass
class Reach:
    """What any scorer could gain over keeping at random, by studies/ceiling.py, and what keeping at
    random gives on the paths of this study."""
    random: float
    gain: float

    def share(self, avg):
        """Of the way from random to the ceiling, how much a mean accuracy of the kept goes."""
        return (avg - self.random) / self.gain


def read_reach(file, study):
    """The Reach of a study. The ceiling may be that of fewer problems: it is its gain over random
    on its own problems that is used. ValueError where the file does not hold it."""
    ceilings = read_ceilings(file, study.model)
    key = (study.checkpoint, study.settings.n, study.settings.keep)
    if key not in ceilings.reached or study.checkpoint not in ceilings.random:
        raise ValueError(f"{file}: ceilings: found none, expected one at {key[0]} of {key[1]} "
                         f"paths, {key[2]} kept")
    here = float(np.mean([record["right"] for record in study.records]))
    return Reach(here, ceilings.reached[key] - ceilings.random[study.checkpoint])


# The study


def recipe(flags):
    """train.py's: the checkpoint's recipe.json. ValueError on flags that have no effect here."""
    refuse_flags(flags, train_command.BESIDE_LABELS, "it shapes labels, which --labels brings here")
    return train_command.recipe(flags)


def read_names(text):
    """The variants in a flag's text, behind the default."""
    names = ["default"]
    for name in text.split(","):
        if name and name not in names:
            read_variant(name)
            names.append(name)
    return names


def check(settings):
    """ValueError on settings that cannot be, before any work is done."""
    train_command.validate(settings)
    require_positive(settings, "head_epochs")
    require("plan", not settings.plan, settings.plan, "a run of train.py: a study has no plan")


def open_study(settings, names):
    """The Study of these settings and variants. Test paths that are not there are sampled."""
    model, tokenizer = open_model(settings)
    tests = read_problems(settings.test or find_folder(settings.model) / "test.jsonl")
    file = labels_file(settings)
    longest = most_tokens(names, settings)
    examples = train_command.given_labels(file, model, tokenizer, longest, tests)
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
    study = Study(
        settings, model, tokenizer, file, examples, tests, records, checkpoint, prefixes, out)
    if not study.at_checkpoint(examples):
        raise ValueError(f"{file}: checkpoint: found no record of {checkpoint}, expected some")
    return study


def main(settings):
    """Train, score, compare; prints the table, also in out/ablations.md; the last line is JSON."""
    check(settings)
    names = read_names(settings.only)
    seeds = read_seeds(settings.seeds)
    study = open_study(settings, names)
    reach = None
    if settings.ceiling is not None:
        reach = read_reach(settings.ceiling, study)
    claimed = study.claimed()
    identity = digest(claimed)
    study.out.mkdir(parents=True, exist_ok=True)
    with locked(study.out):
        claim(study.out / "settings.json", claimed)
        make_scores(study, identity, names, seeds)
        rows = compare(study, identity, names, seeds)
        title = (
            f"{len(study.tests)} problems, {settings.n} paths each, checkpoint {study.checkpoint}, "
            f"{len(study.at_checkpoint(study.examples))} training prefixes, "
            f"seeds {settings.seeds}; "
            "[low, high]: 95% bootstrap over problems")
        text = f"{title}\n\n{table(rows, settings.n, settings.keep, reach)}"
        if reach is not None:
            text += f"\n\nat random {reach.random:.3f}, ceiling {reach.random + reach.gain:.3f}"
        print(text)
        write_atomic(study.out / "ablations.md", text + "\n")
    last = {"out": str(study.out)}
    for name, row in rows.items():
        last[name] = round(float(np.mean(row.avg)), 4)
    print(json.dumps(last))


if __name__ == "__main__":
    command_line(Settings, main, recipe)
