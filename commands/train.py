"""Supervision and training of a STOP module (sections 4 and 5), then a short evaluation (section
6).

    python train.py                                             # the embedded toy, end to end
    python train.py --model M --data problems.jsonl --out DIR   # on your model and problems
    python train.py --model M --labels labels.jsonl --out DIR   # on labels that exist
    torchrun --nproc-per-node 8 -- train.py --model M ...       # the same on eight GPUs

Supervision: 32 paths a problem; problems with 4 to 28 right ones stay. Each path cut at the
checkpoint is a prefix, and the share of its 32 continuations that end right is its soft label; with
--rollouts 0 nothing is continued, and whether its own path ended right is its label.
Fit: frozen base model, prefix without gradient; LoRA, [STOP] embeddings and head by AdamW.
A run that was killed goes on where it stopped, to the same labels and the same weights.
"""
import contextlib
import dataclasses
import functools
import json
import pathlib

from commands.common import open_model, say_other_sampling, say_unknown_in_data
from engine.fit import fit
from engine.forecast import make_forecast, restate
from engine.protocol import run as run_protocol
from engine.stored import make_labels, model_digest
from eval import summary
from plumbing import processes
from plumbing.budget_plan import parse_checkpoints
from plumbing.checkpoint import find_folder
from plumbing.command_line import (
    Common, command_line, option, refuse_flags, require_choice, require_positive, shown)
from plumbing.files import is_there
from plumbing.labels import read_prefixes
from plumbing.problems import read_problems, read_sources, without_held_out, without_repeats
from plumbing.records import claim, digest, locked, read_json
from sample import sampling_of, validate_prompts
from train import Example, require_room, require_several

BESIDE_LABELS = ("data", "problems", "paths", "low", "high", "prefixes", "rollouts")  # of no use
NO_PART_OF_A_RUN = (  # settings that change no result, or only which problems, which are a part
    "batch", "attention", "device", "cache_gb", "out", "plan", "test_problems")


@dataclasses.dataclass(kw_only=True)
class Settings(Common):
    """What `python train.py` can be told. The defaults are the paper's; a checkpoint's recipe.json
    comes before them."""
    data: str | None = option(
        None, "training problems, one source or several with commas between (default: train.jsonl "
        "in the model's directory)", heading="the run")
    test: str | None = option(
        None, "held-out problems, to evaluate at the end (default: test.jsonl there, if any)")
    labels: str | None = option(None, "train on these records instead of making them")
    out: str | None = option(None, "folder of the run (default: runs/ and the model's name)")
    problems: int | None = option(None, "only the first so many training problems")
    test_problems: int | None = option(None, "only the first so many held-out problems")
    plan: bool = option(False, "only say what the run will take, and end")

    paths: int = option(32, "paths a problem, to stratify", heading="supervision (section 4)")
    low: int = option(4, "fewest right paths of a problem that stays")
    high: int = option(28, "most right paths of a problem that stays")
    prefix: str = option(
        "2048", "the checkpoint: new tokens of a prefix; or several, as in 2048,1024,4096, of "
        "which the first is the usual one of stop.py and eval.py")
    prefixes: int = option(32, "prefixes a problem and checkpoint, of its first paths")
    rollouts: int = option(
        32, "continuations of a prefix; 0: none, its label is the outcome of its own path")

    m: int = option(4, "[STOP] tokens", heading="the STOP (section 5)")
    shared: bool = option(False, "one vector for all [STOP] tokens, as the authors' code has it")
    head: str = option("sigmoid", "sigmoid (paper: one logit) or softmax (release: two)")
    rank: int = option(128, "of the LoRA")
    alpha: float | None = option(None, "of the LoRA (default: twice the rank)")
    targets: str | None = option(
        None, "linears with LoRA, as in q_proj,v_proj or none (default: all seven that are there)",
        may_be_empty=True)
    dropout: float = option(0.0, "before the LoRA")

    lr: float = option(2e-5, "AdamW's learning rate", heading="the fit")
    weight_decay: float = option(0.01, "AdamW's")
    epochs: int = option(15, "passes over the training prefixes")
    batch_size: int = option(16, "prefixes a pass")
    accumulation: int = option(8, "passes an optimiser step")
    warmup: int = option(0, "optimiser steps of linear warm-up")
    cosine: bool = option(False, "cosine decay to zero instead of a constant rate")
    clip: float = option(0.0, "largest gradient norm (0 = off)")
    validation: float = option(0.1, "share of the problems held out to choose the best epoch")
    cache_gb: float | None = option(
        None, "prefixes' KV caches kept between epochs (default: half of the free memory)")

    n: int = option(64, "paths a problem", heading="the evaluation at the end")
    keep: int = option(8, "paths kept")


def recipe(flags):
    """(a model's own defaults, the file they stand in): recipe.json in its directory, or
    among a Hub id's files, if it is there. ValueError on flags that have no effect."""
    folder = find_folder(flags.get("model", Settings.model))
    file = folder / "recipe.json"
    content = read_json(file) if is_there(file) else {}
    if "model" in content:
        raise ValueError(f"{file}: model: found this setting, expected it as a flag alone")
    refuse_idle(content | flags, flags, folder)
    if type(content.get("prefix")) is int:
        content["prefix"] = str(content["prefix"])
    return content, file


def refuse_idle(values, flags, folder):
    """Raise ValueError on a flag that would have no effect beside these values (flags and
    recipe)."""
    if values.get("labels") is not None:
        refuse_flags(flags, BESIDE_LABELS, "it shapes labels, and --labels brings its own")
    if values.get("targets") in ("", "none"):
        refuse_flags(flags, ("rank", "alpha", "dropout"), "--targets none leaves no LoRA")
    if values.get("test") is None and not is_there(folder / "test.jsonl"):
        refuse_flags(
            flags, ("n", "keep", "test_problems"), "there are no held-out problems (--test)")


def validate(settings):
    """Raise ValueError on settings that cannot be, before any work is done."""
    def require(name, fine, expected):
        if not fine:
            raise ValueError(f"{name}: found {shown(getattr(settings, name))}, expected {expected}")

    sampling_of(settings)
    require_positive(
        settings, "max_new_tokens", "batch", "problems", "test_problems", "paths", "prefixes", "m",
        "rank", "alpha", "lr", "epochs", "batch_size", "accumulation", "n", "keep")
    parse_checkpoints(settings.prefix)
    require_choice(settings, "head", "sigmoid", "softmax")
    require("prefixes", settings.prefixes <= settings.paths, f"at most paths = {settings.paths}")
    require("rollouts", settings.rollouts >= 0, "0 or more")
    require("low", settings.low >= 0, "at least 0")
    require("high", settings.low <= settings.high <= settings.paths,
            f"{settings.low} to paths, {settings.paths}")
    require("keep", settings.keep <= settings.n, f"at most n = {settings.n}")
    require("validation", 0 < settings.validation < 1, "a share in (0, 1)")
    require("dropout", 0 <= settings.dropout < 1, "a share in [0, 1)")
    require("weight_decay", settings.weight_decay >= 0, "0 or more")
    require("clip", settings.clip >= 0, "0 or more")
    require("warmup", settings.warmup >= 0, "0 or more")
    require("cache_gb", settings.cache_gb is None or settings.cache_gb >= 0, "0 or more")


def given_labels(file, model, tokenizer, m, tests):
    """The examples of a file of labels, ours or the authors'. Records of one problem share `id`
    (or `problem_id`); one without either stands for itself. ValueError on a held-out problem's
    record."""
    def check_ids(ids):
        validate_prompts(model, [ids], m)

    held_out = [(problem.id, tokenizer.ask(problem)) for problem in tests]
    examples = []
    for prefix in read_prefixes(file, check_ids):
        if prefix.label is None:
            raise ValueError(
                f"{file}:{prefix.line}: soft_label: found none, expected a number in [0, 1]")
        for name, prompt in held_out:
            if prefix.ids[:len(prompt)] == prompt:
                raise ValueError(
                    f"{file}:{prefix.line}: problem {prefix.problem} is held-out problem {name}")
        problem = f"line {prefix.line}" if prefix.problem is None else prefix.problem
        examples.append(Example(prefix.ids, prefix.label, problem, prefix.checkpoint))
    return examples


def training_problems(settings, folder, tests):
    """The problems to train on, without those that are held out."""
    problems = read_sources(settings.data or folder / "train.jsonl")
    problems, dropped = without_held_out(problems, tests)
    problems, repeated = without_repeats(problems)
    if dropped and processes.is_first():
        print(f"data: {len(dropped)} problems are held-out ones and were dropped")
    if repeated and processes.is_first():
        print(f"data: {len(repeated)} problems stand there twice and were dropped once")
    if not problems:
        raise ValueError("data: found no problem beside held-out ones, expected some to train on")
    return problems[:settings.problems]


@dataclasses.dataclass
class Material:
    """What a run starts from."""
    problems: list        # to make labels from; empty where labels are given
    examples: list | None  # the labels that are given
    tests: list           # held-out problems, to evaluate on

    def parts(self, settings):
        """What it is made of, for people: {thing: where it came from, how much, its digest}."""
        found = {
            "training problems": (settings.data or "train.jsonl", self.problems),
            "labels": (settings.labels, self.examples),
            "held-out problems": (settings.test or "test.jsonl", self.tests)}
        parts = {}
        for thing, (source, records) in found.items():
            if records:
                content = [dataclasses.asdict(record) for record in records]
                parts[thing] = f"{source}, {len(records)} records ({digest(content)})"
        return parts


def read_material(settings, model, tokenizer, folder):
    """The Material that the settings name. ValueError on whatever is wrong with it."""
    test = settings.test
    if test is None and is_there(folder / "test.jsonl"):
        test = folder / "test.jsonl"
    tests = read_problems(test) if test else []
    evaluated = tests[:settings.test_problems]  # none of the others is trained on either
    if settings.labels:
        examples = given_labels(settings.labels, model, tokenizer, settings.m, tests)
        require_several({example.problem for example in examples})
        return Material([], examples, evaluated)
    problems = training_problems(settings, folder, tests)
    require_several(problems)
    return Material(problems, None, evaluated)


def forecast_of(material, model, tokenizer, settings):
    """The Forecast of a run on this material. Raises ValueError where it cannot be run to its
    end."""
    prompts = [tokenizer.ask(problem) for problem in material.problems or material.tests]
    if material.problems:
        require_room(model, prompts, settings)
    for problem in material.tests:
        validate_prompts(model, [tokenizer.ask(problem)], settings.max_new_tokens or settings.m)
    checkpoints = parse_checkpoints(settings.prefix)
    prefixes = len(prompts) * settings.prefixes * len(checkpoints)
    if material.examples is not None:
        prefixes = len(material.examples)
    if not prompts:
        prompts = [example.ids[:-checkpoints[0]] or example.ids for example in material.examples]
    return make_forecast(model, prompts, prefixes, material.tests, settings)


def run_in_folder(settings, model, tokenizer, folder, out):
    """Make labels (unless given), fit, evaluate (where there are held-out problems)."""
    material = read_material(settings, model, tokenizer, folder)
    say_unknown_in_data(tokenizer, material.problems + material.tests, settings)
    forecast = forecast_of(material, model, tokenizer, settings)
    if processes.is_first():
        lines = [*forecast.describe_work(), f"at most {forecast.describe_times()}"]
        if material.problems or material.tests:
            lines.append(forecast.describe_likely())
        for line in lines:
            print(f"plan: {line}", flush=True)
    if settings.plan:
        return
    identity = claim_run(settings, model, material, out)
    examples = material.examples
    if examples is None:
        restated = functools.partial(restate, forecast)
        examples = make_labels(model, tokenizer, material.problems, settings, out, restated)
        require_several({example.problem for example in examples})
    identity = digest(identity, [dataclasses.asdict(example) for example in examples])
    stop = fit(model, examples, settings, out, identity)
    scores = {}
    if material.tests:
        settings = dataclasses.replace(settings, prefix=None)  # the usual one of this STOP
        report = run_protocol(model, tokenizer, stop, material.tests, settings, out)
        scores = summary(report)
    if processes.is_first():
        print(json.dumps(
            {"out": str(out), "stop": str(out / "stop"), **stop.trained["metrics"], **scores}))


def claim_run(settings, model, material, out):
    """Make the folder this run's: its settings.json says what run it is. -> digits that stand for
    it. ValueError where the folder holds another run."""
    known = dataclasses.asdict(settings)
    for name in NO_PART_OF_A_RUN:
        del known[name]
    content = dataclasses.asdict(material)
    weights = model_digest(model)
    known |= {"content": digest(content), "weights": weights,
              "eos_ids": list(model.config.eos_ids)}
    parts = {
        "content": material.parts(settings),
        "weights": {"model's weights": f"{settings.model} ({weights})"}}
    claim(out / "settings.json", known, parts)
    return digest(known)


def run(settings):
    """The whole run, in its folder, which no other process may use meanwhile."""
    validate(settings)
    model, tokenizer = open_model(settings)
    folder = find_folder(settings.model)
    say_other_sampling(settings, folder / "stop")
    out = pathlib.Path(settings.out or pathlib.Path("runs") / pathlib.Path(settings.model).name)
    if settings.plan:
        run_in_folder(settings, model, tokenizer, folder, out)
        return
    out.mkdir(parents=True, exist_ok=True)
    with locked(out) if processes.is_first() else contextlib.nullcontext():
        run_in_folder(settings, model, tokenizer, folder, out)


def main():
    """The command line."""
    command_line(Settings, run, recipe, shares_work=True)
