"""Make the embedded toy from nothing: a small reasoning model, its tokenizer and its problems.

    python toy/make.py                      # everything in this folder, about 12 minutes on 2 cores
    python toy/make.py --out /tmp/toy --seed 1
    python toy/make.py --more 1000 --out runs   # runs/more.jsonl: further held-out problems

The task: count one person's things through 7 or 8 sentences, three of which are traps that readers
misread ("gives 3 to each of 2 friends": 3 or 6?). The author of the corpus misreads a trap about
half the time and seldom notices, so the model learns to go wrong early and hardly ever to recover:
the situation of the paper's section 1. A right path is rare (about .5 ** 3), not the likeliest one,
and not to be told by confidence alone.
"""
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))  # the project's root
import plumbing  # first: what is imported next takes seconds (plumbing/__init__.py)

import dataclasses
import json
import math
import os
import random
import tempfile
import time
from typing import Callable, NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import save
from tokenizers import Tokenizer, models, pre_tokenizers

from engine.refill import generate
from model import Decoder, load
from plumbing.answers import extract_answer, same_answer
from plumbing.checkpoint import Config
from plumbing.command_line import command_line, option, refuse_flags, require_positive
from plumbing.progress import progress
from sample import require_finite


@dataclasses.dataclass
class Settings:
    """What `python toy/make.py` can be told."""
    out: str = option(str(HERE), "folder to write")
    seed: int = option(0, "everything random follows from it")
    train: int = option(1300, "problems in train.jsonl")
    test: int = option(300, "problems in test.jsonl")
    easy_tokens: int = option(5_500_000, "first phase: tokens of the easier mixture")
    easy_lr: float = option(3e-3, "first phase: peak learning rate")
    real_tokens: int = option(4_100_000, "second phase: tokens of the real mixture")
    real_lr: float = option(1.5e-3, "second phase: peak learning rate")
    batch_tokens: int = option(2048, "tokens in a batch, padding included")
    warmup: int = option(50, "warm-up steps of each phase; then cosine to a twentieth")
    weight_decay: float = option(0.05, "of the matrices")
    clip: float = option(1.0, "gradient norm")
    measure: int = option(
        100, "fresh problems for the closing measurement, 32 paths each; 0 skips it")
    threads: int = option(2, "CPU threads")
    more: int = option(
        0, "only write more.jsonl: so many problems that are in neither train.jsonl nor test.jsonl")


CONTEXT = 512  # tokens: prompt and path together


OF_THE_MODEL = (  # flags that have no part in --more
    "easy_tokens", "easy_lr", "real_tokens", "real_lr", "batch_tokens", "warmup", "weight_decay",
    "clip", "measure")


def recipe(flags):
    """No defaults of a file's. ValueError on flags that have no effect beside --more."""
    if flags.get("more", 0) > 0:
        refuse_flags(flags, OF_THE_MODEL, "--more writes problems, and trains no model")
    return {}, None


def check(settings):
    """ValueError on settings that cannot be, before any work is done."""
    require_positive(
        settings, "train", "test", "easy_tokens", "easy_lr", "real_tokens", "real_lr", "warmup",
        "clip", "threads")
    for name, least in (("batch_tokens", CONTEXT), ("weight_decay", 0), ("measure", 0),
                        ("more", 0)):
        found = getattr(settings, name)
        if found < least:
            raise ValueError(f"{name}: found {found}, expected at least {least}")
    if settings.threads > 1024:
        raise ValueError(f"threads: found {settings.threads}, expected at most 1024")


def try_folder(out):
    """Create the folder and write to it, so that no training is lost. OSError where that fails."""
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=out) as probe:
        probe.write(b"probe")


# How a sentence is read

OPERATORS = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__}


class Sum(NamedTuple):
    """One sum that a reader writes: left operator right."""
    left: int
    operator: str
    right: int

    @property
    def result(self):
        """What it comes to."""
        return OPERATORS[self.operator](self.left, self.right)

    @property
    def fits(self):
        """Whether the tokenizer knows all of its numbers."""
        return all(0 <= number <= 99 for number in (self.left, self.right, self.result))

    @property
    def text(self):
        """As it stands in a path."""
        return f"{self.left} {self.operator} {self.right} = {self.result}"


# Readings: (count, x, y) -> the sums that a reader writes. The result of the last is the new count.


def gain(count, x, y):
    """x more."""
    return [Sum(count, "+", x)]


def lose(count, x, y):
    """x fewer."""
    return [Sum(count, "-", x)]


def gain_bags(count, x, y):
    """x bags of y."""
    return [Sum(x, "*", y), Sum(count, "+", x * y)]


def misread_bags(count, x, y):
    """The numbers are added up, or the bags are overlooked."""
    if (x + y) % 2 == 0:
        return [Sum(x, "+", y), Sum(count, "+", x + y)]
    return [Sum(count, "+", y)]


def give_each(count, x, y):
    """x to each of y."""
    return [Sum(x, "*", y), Sum(count, "-", x * y)]


def gain_twice(count, x, y):
    """Twice the count on top of it."""
    return [Sum(2, "*", count), Sum(count, "+", 2 * count)]


def misread_twice(count, x, y):
    """Twice the count instead of it."""
    return [Sum(2, "*", count)]


def gain_and_lose(count, x, y):
    """x more, then y fewer."""
    return [Sum(count, "+", x), Sum(count + x, "-", y)]


def misread_loss(count, x, y):
    """x more, then y more."""
    return [Sum(count, "+", x), Sum(count + x, "+", y)]


class Kind(NamedTuple):
    """A kind of sentence."""
    text: str
    x: range
    y: range
    right: Callable
    wrong: Callable | None = None  # the typical misreading
    misread: float = 0.0           # how often the author of the corpus falls for it


TO_5 = range(2, 6)
TO_6 = range(2, 7)
TO_9 = range(2, 10)
MORE = "has {x} more than the box , which is the count now"
TRAPS = [
    Kind("gets {x} bags with {y} each", TO_6, TO_5, gain_bags, misread_bags, .50),
    Kind("gives {x} to each of {y} friends", TO_6, TO_5, give_each, lose, .50),
    Kind(MORE, TO_9, TO_9, lose, gain, .53),
    Kind("finds twice as many again", TO_9, TO_9, gain_twice, misread_twice, .45),
    Kind("buys {x} , drops {y}", TO_9, TO_9, gain_and_lose, misread_loss, .45)]
PLAIN = [
    Kind("finds {x}", TO_9, TO_9, gain),
    Kind("loses {x}", TO_9, TO_9, lose)]


class Reading(NamedTuple):
    """A sentence as somebody read it."""
    sums: str   # as text
    count: int  # after it


class Sentence(NamedTuple):
    """A sentence of a problem."""
    kind: Kind
    x: int
    y: int

    @property
    def text(self):
        """Its words."""
        return self.kind.text.format(x=self.x, y=self.y)

    def read(self, count, wrong=False):
        """Its Reading where `count` things are there; None where nobody reads it so, or a number
        leaves 0..99."""
        rule = self.kind.wrong if wrong else self.kind.right
        if rule is None:
            return None
        sums = rule(count, self.x, self.y)
        if not all(one.fits for one in sums):
            return None
        return Reading(" , ".join(one.text for one in sums), sums[-1].result)


# The problems

NAMES = ("Tom", "Ann", "Ben", "Eva")
THINGS = ("coins", "cards", "pens", "shells")


class Mixture(NamedTuple):
    """How many sentences of either kind a problem has: one of these numbers each."""
    traps: tuple
    plain: tuple


REAL = Mixture(traps=(3,), plain=(4, 5))
EASY = Mixture(traps=(0, 1, 2), plain=(2, 3, 4))  # here the model first learns to copy and to add


class Problem(NamedTuple):
    """A problem and its right reading."""
    text: str
    thing: str
    sentences: list
    counts: list  # before the first and after each sentence; the last one is the answer


def draw_problem(rng, mixture=REAL):
    """A Problem whose numbers stay within 0..99."""
    while True:
        problem = try_problem(rng, mixture)
        if problem is not None:
            return problem


def try_problem(rng, mixture):
    """A Problem, or None where a number leaves 0..99. Two of three traps stand among the first
    three sentences: by the checkpoint most paths have met one."""
    traps = rng.choices(TRAPS, k=rng.choice(mixture.traps))
    plain = rng.choices(PLAIN, k=rng.choice(mixture.plain))
    early = traps[:2] + plain[:1]
    late = traps[2:] + plain[1:]
    rng.shuffle(early)
    rng.shuffle(late)
    sentences = []
    for kind in early + late:
        x = rng.choice(kind.x)
        y = rng.choice(kind.y)
        sentences.append(Sentence(kind, x, y))
    name = rng.choice(NAMES)
    thing = rng.choice(THINGS)
    counts = [rng.randint(5, 30)]
    told = [f"{name} has {counts[0]} {thing}"]
    for sentence in sentences:
        reading = sentence.read(counts[-1])
        if reading is None:
            return None
        counts.append(reading.count)
        told.append(sentence.text)
    text = f"Q : {' . '.join(told)} . What is the count ? <nl>"
    return Problem(text, thing, sentences, counts)


# The corpus

AT_ONCE = .10  # how often the author notices a misreading right after it,
LATER = .04    # and on each later line while the count is wrong
LONGEST = 230  # tokens; longer paths are dropped


def read_as_author(sentence, count, careful, rng):
    """The Readings of a sentence that the author writes down, one after another: the last one
    counts. Empty where no reading stays within 0..99."""
    right = sentence.read(count)
    wrong = sentence.read(count, wrong=True)
    if right is None and wrong is None:
        return []
    if right is None:
        return [wrong]  # from a wrong count the right reading may leave 0..99
    if wrong is None or wrong.count == right.count:
        return [right]
    if careful or rng.random() >= sentence.kind.misread:
        return [right]
    if rng.random() < AT_ONCE:
        return [wrong, right]
    return [wrong]


def write_path(problem, rng):
    """A path by the author of the corpus; None where a sentence cannot be read within 0..99 or the
    path is too long."""
    start = problem.counts[0]
    lines = [f"Start : {start} {problem.thing} . <nl>"]
    count = start
    careful = False
    i = 0
    while i < len(problem.sentences):
        is_wrong = count != problem.counts[i]
        if is_wrong and rng.random() < LATER:
            lines.append(f"Wait , no . Redo From the Start : {start} . <nl>")
            count = start
            careful = True
            i = 0
        sentence = problem.sentences[i]
        readings = read_as_author(sentence, count, careful, rng)
        if not readings:
            return None
        for number, reading in enumerate(readings):
            if number > 0:
                lines.append(f"Wait , no . Back to {count} . <nl>")
            begin = rng.choice(("Next", "Then"))
            lines.append(f"{begin} {sentence.text} : {reading.sums} . <nl>")
        count = readings[-1].count
        i += 1
    lines.append(f"Answer : \\boxed{{ {count} }}")
    path = " ".join(lines)
    fits = len(path.split()) < LONGEST  # a token a word, and one for the end
    return path if fits else None


def build_tokenizer():
    """Every word, sign and number 0..99 is one token; a text is its tokens with single spaces
    between them."""
    texts = [kind.text.format(x="", y="") for kind in TRAPS + PLAIN]
    texts += [*NAMES, *THINGS]
    texts += ["Q : has . What is the count ? <nl> Start Next Then + - * = , Answer \\boxed{ }"]
    texts += ["Wait , no . Back to Redo From the Start"]
    words = sorted(set(" ".join(texts).split()))
    special = ["<pad>", "<eos>", "<unk>"]
    tokens = [*special, *map(str, range(100)), *words]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(special)
    return tokenizer


class Trace(NamedTuple):
    """A problem and a path to learn."""
    ids: list    # prompt, path and end token
    prompt: int  # how many of them are the prompt's


def draw_traces(rng, mixture, tokenizer, held, seen):
    """2,000 Traces, the shortest first. Problems in `held` are left out, others join `seen`."""
    eos = tokenizer.token_to_id("<eos>")
    traces = []
    while len(traces) < 2000:
        problem = draw_problem(rng, mixture)
        path = write_path(problem, rng)
        if path is not None and problem.text not in held:
            seen.add(problem.text)
            prompt = tokenizer.encode(problem.text).ids
            ids = prompt + tokenizer.encode(path).ids + [eos]
            traces.append(Trace(ids, len(prompt)))
    return sorted(traces, key=lambda trace: len(trace.ids))


def cut_traces(traces, size):
    """Traces, the shortest first, in groups of at most `size` tokens, padding included."""
    groups = [[]]
    for trace in traces:
        if (len(groups[-1]) + 1) * len(trace.ids) > size:
            groups.append([])
        groups[-1].append(trace)
    return groups


def pad(traces):
    """(ids (B, T), wanted (B, T)) of Traces, the shortest first, padded on the right, where causal
    attention never looks. wanted: the next token where it belongs to the path, else -100."""
    ids = torch.zeros(len(traces), len(traces[-1].ids), dtype=torch.int64)
    wanted = torch.full_like(ids, -100)
    for row, trace in enumerate(traces):
        end = len(trace.ids)
        ids[row, :end] = torch.tensor(trace.ids)
        wanted[row, trace.prompt - 1:end - 1] = ids[row, trace.prompt:end]
    return ids, wanted


def batches(rng, mixture, tokenizer, held, seen, size):
    """Endless batches of at most `size` tokens from fresh problems, as `pad` gives them."""
    while True:
        traces = draw_traces(rng, mixture, tokenizer, held, seen)
        groups = cut_traces(traces, size)
        rng.shuffle(groups)
        for group in groups:
            yield pad(group)


# The pre-training


def model_config(vocab, eos):
    """The content of config.json: a small Qwen2."""
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "vocab_size": vocab,
        "hidden_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "intermediate_size": 256,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "max_position_embeddings": CONTEXT,
        "use_sliding_window": False,
        "sliding_window": None,
        "max_window_layers": 4,
        "tie_word_embeddings": False,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "use_cache": True,
        "torch_dtype": "bfloat16",
        "bos_token_id": None,
        "eos_token_id": eos,
        "pad_token_id": 0}


def new_model(config):
    """A Decoder before training: matrices normal with deviation 0.02, biases 0, norms 1."""
    model = Decoder(Config.from_dict(config))
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            parameter.data = torch.randn_like(parameter) * 0.02
        elif name.endswith("norm.weight"):
            parameter.data = torch.ones_like(parameter)
        else:
            parameter.data = torch.zeros_like(parameter)
    return model


def new_optimizer(model, weight_decay):
    """AdamW, with weight decay on the matrices only."""
    matrices = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.dim() == 1]
    groups = [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, betas=(0.9, 0.98), fused=True)


def recent_mean(losses):
    """The mean of the last 100."""
    recent = losses[-100:]
    return sum(recent) / len(recent)


def pretrain(model, corpus, tokens, peak, name, settings):
    """One phase of `tokens` tokens: AdamW, warm-up, cosine. Returns the last 100 steps' mean loss
    a path token."""
    optimizer = new_optimizer(model, settings.weight_decay)
    losses = []
    done = 0
    with progress(name, tokens, "tok") as bar:
        while done < tokens:
            ids, wanted = next(corpus)
            cosine = 0.05 + 0.95 * (1 + math.cos(math.pi * done / tokens)) / 2
            for group in optimizer.param_groups:
                group["lr"] = peak * min(cosine, (len(losses) + 1) / settings.warmup)
            of_path = wanted != -100
            logits = model.logits(model(ids)[of_path])
            loss = F.cross_entropy(logits, wanted[of_path])
            require_finite(loss, f"{name}: the loss of step {len(losses) + 1}")
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip)
            optimizer.step()
            losses.append(loss.item())
            done += ids.numel()
            bar.set_postfix_str(f"loss {recent_mean(losses):.3f}", refresh=False)
            bar.update(ids.numel())
    return recent_mean(losses)


# The files


def problem_lines(problems, name):
    """Problems as JSON lines."""
    lines = []
    for number, problem in enumerate(problems, 1):
        record = {
            "id": f"toy-{name}-{number:04d}",
            "problem": problem.text,
            "answer": str(problem.counts[-1])}
        lines.append(json.dumps(record) + "\n")
    return "".join(lines)


def checkpoint_files(model, config, tokenizer):
    """{name: content} of a checkpoint directory like any other; weights are stored in bfloat16."""
    generation = {
        "eos_token_id": config["eos_token_id"],
        "pad_token_id": config["pad_token_id"],
        "do_sample": True,
        "temperature": 0.6,
        "top_k": 40,
        "top_p": 0.95}
    words = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": config["max_position_embeddings"],
        "bos_token": None,
        "eos_token": "<eos>",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
        "clean_up_tokenization_spaces": False}
    weights = {name: tensor.to(torch.bfloat16) for name, tensor in model.state_dict().items()}
    return {
        "config.json": as_json(config),
        "generation_config.json": as_json(generation),
        "tokenizer_config.json": as_json(words),
        "tokenizer.json": tokenizer.to_str(pretty=True).encode(),
        "model.safetensors": save(weights, {"format": "pt"})}


def as_json(content):
    """The bytes of a JSON file."""
    return (json.dumps(content, indent=2) + "\n").encode()


def write_files(out, files):
    """Write {name: bytes} to a folder, first beside, then renamed: no file is ever half-made."""
    with tempfile.TemporaryDirectory(prefix=".making-", dir=out) as beside:
        for name, content in files.items():
            Path(beside, name).write_bytes(content)
        for name in sorted(files):
            os.replace(Path(beside, name), out / name)


def measure(folder, rng, count, n=32):
    """How the model as stored does on `count` fresh problems, n paths each, at the paper's sampling
    settings."""
    model = load(str(folder))
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    problems = [draw_problem(rng) for _ in range(count)]
    prompts = [tokenizer.encode(problem.text).ids for problem in problems]
    groups = generate(model, prompts, n, max_new_tokens=320)
    right_paths = 0
    hard = 0  # problems of which an eighth to seven eighths of the paths are right
    different = 0
    tokens = 0
    corrected = 0
    for problem, group in zip(problems, groups):
        texts = [tokenizer.decode(path.ids) for path in group]
        answers = [extract_answer(text) for text in texts]
        expected = str(problem.counts[-1])
        right = sum(same_answer(answer, expected) for answer in answers)
        right_paths += right
        if n / 8 <= right <= n * 7 / 8:
            hard += 1
        different += len(set(answers))
        tokens += sum(len(path.ids) for path in group)
        corrected += sum("Wait" in text for text in texts)
    return {
        "problems": count,
        "paths": n,
        "avg": round(right_paths / (n * count), 4),
        "eighth_to_seven_eighths_right": round(hard / count, 4),
        "different_answers": round(different / count, 4),
        "mean_length": round(tokens / (n * count), 4),
        "self_correction": round(corrected / (n * count), 4)}


# The run


def draw_held(rng, count):
    """{text: Problem} of `count` different problems: train.jsonl's, then test.jsonl's."""
    held = {}
    while len(held) < count:
        problem = draw_problem(rng)
        held.setdefault(problem.text, problem)
    return held


def draw_more(rng, settings):
    """The `more` Problems that come behind those of train.jsonl and test.jsonl."""
    made = settings.train + settings.test
    problems = draw_held(rng, made + settings.more)
    return list(problems.values())[made:]


def main(settings):
    """Problems, pre-training in two phases, files, measurement; the last line is JSON."""
    check(settings)
    out = Path(settings.out)
    try_folder(out)
    torch.set_num_threads(settings.threads)
    torch.manual_seed(settings.seed)
    began = time.perf_counter()

    def random_of(name):
        return random.Random(f"{settings.seed} {name}")

    if settings.more:
        problems = draw_more(random_of("problems"), settings)
        write_files(out, {"more.jsonl": problem_lines(problems, "more").encode()})
        print(json.dumps({"out": str(out), "problems": len(problems)}))
        return

    held = draw_held(random_of("problems"), settings.train + settings.test)
    problems = list(held.values())
    tokenizer = build_tokenizer()
    config = model_config(tokenizer.get_vocab_size(), tokenizer.token_to_id("<eos>"))
    model = new_model(config)
    print(f"{sum(parameter.numel() for parameter in model.parameters()):,} parameters")

    seen = set()
    phases = (
        ("easy", EASY, settings.easy_tokens, settings.easy_lr),
        ("real", REAL, settings.real_tokens, settings.real_lr))
    for name, mixture, tokens, peak in phases:
        rng = random_of(name)
        corpus = batches(rng, mixture, tokenizer, held, seen, settings.batch_tokens)
        loss = pretrain(model, corpus, tokens, peak, name, settings)
        seconds = time.perf_counter() - began
        print(f"{name}: loss {loss:.4f} per path token, {seconds:.0f} s", flush=True)
    assert seen.isdisjoint(held), "a problem of train.jsonl or test.jsonl is in the corpus"

    files = checkpoint_files(model, config, tokenizer)
    files["train.jsonl"] = problem_lines(problems[:settings.train], "train").encode()
    files["test.jsonl"] = problem_lines(problems[settings.train:], "test").encode()
    write_files(out, files)
    result = {}
    if settings.measure:
        result = measure(out, random_of("fresh"), settings.measure)
    seconds = round(time.perf_counter() - began)
    print(json.dumps({"out": str(out), "seconds": seconds, "loss": loss, **result}))


if __name__ == "__main__":
    command_line(Settings, main, recipe)
