"""Make the embedded toy from nothing: a small reasoning model, its tokenizer and its problems.

    python toy/make.py                      # everything in this folder, about 12 minutes on 2 CPU cores
    python toy/make.py --out /tmp/toy --seed 1

The task: count one person's things through 7 or 8 sentences, three of which are traps that readers misread ("gives 3
to each of 2 friends": 3 or 6?). The author of the corpus misreads a trap about half the time and seldom notices, so the
model learns to go wrong early and hardly ever to recover: the situation of the paper's section 1. A right path is rare
(about .5 ** 3), not the likeliest one, and not to be told by confidence alone.
"""
import dataclasses
import json
import math
import os
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Callable, NamedTuple

import torch
import torch.nn.functional as F
from huggingface_hub.utils import tqdm
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))  # the project's root
from model import Config, Decoder, load  # noqa: E402
from sample import command_line, generate, option  # noqa: E402
from task import extract_answer, same_answer  # noqa: E402


@dataclasses.dataclass
class Settings:
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
    measure: int = option(100, "fresh problems for the closing measurement, 32 paths each; 0 skips it")
    threads: int = option(2, "CPU threads")


# ------------------------------------------------------------------------------------------------------- the problems

NAMES, THINGS = ("Tom", "Ann", "Ben", "Eva"), ("coins", "cards", "pens", "shells")
OPERATORS = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__}
TO5, TO6, TO9 = range(2, 6), range(2, 7), range(2, 10)


class Kind(NamedTuple):
    """A reading maps (count, x, y) to the sums that a reader writes; the last one's result is the new count."""
    text: str
    x: range
    y: range
    right: Callable
    wrong: Callable | None = None  # the typical misreading
    misread: float = 0.0           # how often the author of the corpus falls for it


TRAPS = [
    Kind("gets {x} bags with {y} each", TO6, TO5, lambda v, x, y: [(x, "*", y), (v, "+", x * y)],
         lambda v, x, y: [(v, "+", y)] if (x + y) % 2 else [(x, "+", y), (v, "+", x + y)], .50),
    Kind("gives {x} to each of {y} friends", TO6, TO5, lambda v, x, y: [(x, "*", y), (v, "-", x * y)],
         lambda v, x, y: [(v, "-", x)], .50),
    Kind("has {x} more than the box , which is the count now", TO9, TO9, lambda v, x, y: [(v, "-", x)],
         lambda v, x, y: [(v, "+", x)], .53),
    Kind("finds twice as many again", TO9, TO9, lambda v, x, y: [(2, "*", v), (v, "+", 2 * v)],
         lambda v, x, y: [(2, "*", v)], .45),
    Kind("buys {x} , drops {y}", TO9, TO9, lambda v, x, y: [(v, "+", x), (v + x, "-", y)],
         lambda v, x, y: [(v, "+", x), (v + x, "+", y)], .45),
]
PLAIN = [
    Kind("finds {x}", TO9, TO9, lambda v, x, y: [(v, "+", x)]),
    Kind("loses {x}", TO9, TO9, lambda v, x, y: [(v, "-", x)]),
]


class Sentence(NamedTuple):
    kind: Kind
    x: int
    y: int

    @property
    def text(self):
        return self.kind.text.format(x=self.x, y=self.y)

    def read(self, count, wrong=False):
        """(the sums as text, the new count), or None without such a reading or where a number leaves 0..99."""
        reading, parts = self.kind.wrong if wrong else self.kind.right, []
        for left, operator, right in reading(count, self.x, self.y) if reading else ():
            count = OPERATORS[operator](left, right)
            if not all(0 <= number <= 99 for number in (left, right, count)):
                return None
            parts.append(f"{left} {operator} {right} = {count}")
        return (" , ".join(parts), count) if parts else None


class Problem(NamedTuple):
    text: str
    thing: str
    sentences: list[Sentence]
    counts: list[int]  # the right count before the first and after each sentence; the last one is the answer


REAL = (3,), (4, 5)             # how many traps and how many plain sentences: one of these each
EASY = (0, 1, 2), (2, 3, 4)     # shorter and with fewer traps: here the model first learns to copy and to add


def draw_problem(rng, mixture=REAL):
    """Two of three traps stand among the first three sentences: by the checkpoint most paths have met one."""
    while True:
        traps, plain = (rng.choices(kinds, k=rng.choice(many)) for kinds, many in zip((TRAPS, PLAIN), mixture))
        early, late = traps[:2] + plain[:1], traps[2:] + plain[1:]
        rng.shuffle(early)
        rng.shuffle(late)
        sentences = [Sentence(kind, rng.choice(kind.x), rng.choice(kind.y)) for kind in early + late]
        name, thing, counts = rng.choice(NAMES), rng.choice(THINGS), [rng.randint(5, 30)]
        for sentence in sentences:
            reading = sentence.read(counts[-1])
            if reading is None:
                break  # a number leaves 0..99: draw again
            counts.append(reading[1])
        else:
            told = " . ".join([f"{name} has {counts[0]} {thing}", *(sentence.text for sentence in sentences)])
            return Problem(f"Q : {told} . What is the count ? <nl>", thing, sentences, counts)


# --------------------------------------------------------------------------------------------------------- the corpus

AT_ONCE, LATER = .10, .04  # how often the author notices: right after a misreading, and on each later line while wrong
LONGEST = 230              # tokens; longer paths are dropped


def write_path(problem, rng):
    """A path by the author of the corpus; None where a sentence cannot be read within 0..99 or the path is too long."""
    start, i, careful = problem.counts[0], 0, False
    count, lines = start, [f"Start : {start} {problem.thing} . <nl>"]
    while i < len(problem.sentences):
        if count != problem.counts[i] and rng.random() < LATER:
            lines.append(f"Wait , no . Redo From the Start : {start} . <nl>")
            count, i, careful = start, 0, True
        sentence = problem.sentences[i]
        right, wrong = sentence.read(count), sentence.read(count, wrong=True)
        if wrong is None or (right is not None and wrong[1] == right[1]):
            readings = [right]
        elif right is None:
            readings = [wrong]  # from a wrong count the right reading may leave 0..99
        elif careful or rng.random() >= sentence.kind.misread:
            readings = [right]
        else:
            readings = [wrong, right] if rng.random() < AT_ONCE else [wrong]
        if readings == [None]:
            return None
        for again, (sums, after) in enumerate(readings):
            if again:
                lines.append(f"Wait , no . Back to {count} . <nl>")
            lines.append(f"{rng.choice(('Next', 'Then'))} {sentence.text} : {sums} . <nl>")
        count, i = after, i + 1
    path = " ".join(lines + [f"Answer : \\boxed{{ {count} }}"])
    return path if len(path.split()) < LONGEST else None  # a token per word, and one for the end


def build_tokenizer():
    """Every word, sign and number 0..99 is one token; a text is its tokens with single spaces between."""
    frames = [kind.text.format(x="", y="") for kind in TRAPS + PLAIN] + [*NAMES, *THINGS]
    frames += ["Q : has . What is the count ? <nl> Start Next Then + - * = , Answer \\boxed{ }",
               "Wait , no . Back to Redo From the Start"]
    words = sorted({word for frame in frames for word in frame.split()})
    tokens = ["<pad>", "<eos>", "<unk>", *map(str, range(100)), *words]
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(tokens[:3])
    return tokenizer


# ---------------------------------------------------------------------------------------------------- the pre-training

def model_config(vocab, eos):
    """The content of config.json: a small Qwen2."""
    return {
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "vocab_size": vocab, "hidden_size": 96,
        "num_hidden_layers": 4, "num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 32,
        "intermediate_size": 256, "hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta": 10000.0,
        "max_position_embeddings": 512, "use_sliding_window": False, "sliding_window": None, "max_window_layers": 4,
        "tie_word_embeddings": False, "attention_dropout": 0.0, "initializer_range": 0.02, "use_cache": True,
        "torch_dtype": "bfloat16", "bos_token_id": None, "eos_token_id": eos, "pad_token_id": 0}


def batches(rng, mixture, tokenizer, held, seen, size):
    """Endless batches (ids (B, T), wanted (B, T)) of at most `size` tokens, from fresh pools sorted by length.

    wanted: the next token where it belongs to the path, else -100. Problems in `held` are left out, others join `seen`.
    """
    eos = tokenizer.token_to_id("<eos>")
    while True:
        pool = []  # (ids of prompt and path, how many of them are the prompt's)
        while len(pool) < 2000:
            problem = draw_problem(rng, mixture)
            path = write_path(problem, rng)
            if path is not None and problem.text not in held:
                seen.add(problem.text)
                prompt = tokenizer.encode(problem.text).ids
                pool.append((prompt + tokenizer.encode(path).ids + [eos], len(prompt)))
        pool.sort(key=lambda row: len(row[0]))
        cuts, first = [], 0
        for i, (tokens, _) in enumerate(pool):
            if (i + 1 - first) * len(tokens) > size:  # no room for row i
                cuts.append(pool[first:i])
                first = i
        cuts.append(pool[first:])
        rng.shuffle(cuts)
        for cut in cuts:
            ids = torch.zeros(len(cut), len(cut[-1][0]), dtype=torch.int64)
            wanted = torch.full_like(ids, -100)
            for row, (tokens, prompt) in enumerate(cut):  # padded on the right, where causal attention never looks
                ids[row, :len(tokens)] = torch.tensor(tokens)
                wanted[row, prompt - 1:len(tokens) - 1] = ids[row, prompt:len(tokens)]
            yield ids, wanted


def pretrain(model, corpus, tokens, peak, name, settings):
    """One phase of `tokens` tokens: AdamW, warm-up, cosine. Returns the last 100 steps' mean loss per path token."""
    groups = [{"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": settings.weight_decay},
              {"params": [p for p in model.parameters() if p.dim() == 1], "weight_decay": 0.0}]
    optimizer, done, losses = torch.optim.AdamW(groups, betas=(0.9, 0.98), fused=True), 0, []
    with tqdm(total=tokens, desc=name, unit="tok", unit_scale=True, mininterval=2) as bar:
        while done < tokens:
            ids, wanted = next(corpus)
            cosine = 0.05 + 0.95 * (1 + math.cos(math.pi * done / tokens)) / 2
            for group in optimizer.param_groups:
                group["lr"] = peak * min(cosine, (len(losses) + 1) / settings.warmup)
            chosen = wanted != -100
            loss = F.cross_entropy(model.logits(model(ids)[chosen]), wanted[chosen])
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip)
            optimizer.step()
            losses.append(loss.item())
            done += ids.numel()
            bar.set_postfix_str(f"loss {sum(losses[-100:]) / len(losses[-100:]):.3f}", refresh=False)
            bar.update(ids.numel())
    return sum(losses[-100:]) / max(1, len(losses[-100:]))


# ----------------------------------------------------------------------------------------------------------- the files

def write_checkpoint(folder, model, config, tokenizer):
    """A checkpoint directory like any other; the weights are stored in bfloat16."""
    files = {"config.json": config, "generation_config.json": {
        "eos_token_id": config["eos_token_id"], "pad_token_id": config["pad_token_id"], "do_sample": True,
        "temperature": 0.6, "top_k": 40, "top_p": 0.95}, "tokenizer_config.json": {
        "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": config["max_position_embeddings"],
        "bos_token": None, "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>",
        "clean_up_tokenization_spaces": False}}
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")
    tokenizer.save(str(folder / "tokenizer.json"))
    save_file({name: tensor.to(torch.bfloat16) for name, tensor in model.state_dict().items()},
              folder / "model.safetensors", metadata={"format": "pt"})


def measure(folder, rng, count, n=32):
    """How the model as stored does on fresh problems, n paths each, at the paper's sampling settings."""
    model, tokenizer = load(str(folder)), Tokenizer.from_file(str(folder / "tokenizer.json"))
    problems = [draw_problem(rng) for _ in range(count)]
    groups = generate(model, [tokenizer.encode(p.text).ids for p in problems], n, max_new_tokens=320, batch=1024)
    texts = [[tokenizer.decode(path.ids) for path in group] for group in groups]
    answers = [[extract_answer(text) for text in group] for group in texts]
    right = [sum(same_answer(answer, str(p.counts[-1])) for answer in row) for p, row in zip(problems, answers)]
    totals = {"avg": sum(right) / n, "eighth_to_seven_eighths_right": sum(n / 8 <= r <= n * 7 / 8 for r in right),
              "different_answers": sum(len(set(row)) for row in answers),
              "mean_length": sum(len(path.ids) for group in groups for path in group) / n,
              "self_correction": sum("Wait" in text for group in texts for text in group) / n}
    return {"problems": count, "paths": n} | {name: round(total / count, 4) for name, total in totals.items()}


def main(settings):
    print(f"settings: {json.dumps(dataclasses.asdict(settings))}")
    torch.set_num_threads(settings.threads)
    torch.manual_seed(settings.seed)
    began, out = time.perf_counter(), Path(settings.out)
    random_of = {name: random.Random(f"{settings.seed} {name}") for name in ("problems", "easy", "real", "fresh")}

    held = {}  # text -> problem: those of train.jsonl, then those of test.jsonl
    while len(held) < settings.train + settings.test:
        problem = draw_problem(random_of["problems"])
        held.setdefault(problem.text, problem)
    problems = list(held.values())

    tokenizer, seen = build_tokenizer(), set()
    config = model_config(tokenizer.get_vocab_size(), tokenizer.token_to_id("<eos>"))
    model = Decoder(Config.from_dict(config))
    for name, parameter in model.named_parameters():  # matrices normal with deviation 0.02, biases 0, norms 1
        matrix, norm = parameter.dim() > 1, name.endswith("norm.weight")
        parameter.data = torch.randn_like(parameter) * 0.02 if matrix else torch.full_like(parameter, float(norm))
    print(f"{sum(parameter.numel() for parameter in model.parameters()):,} parameters")
    for name, mixture, tokens, peak in (("easy", EASY, settings.easy_tokens, settings.easy_lr),
                                        ("real", REAL, settings.real_tokens, settings.real_lr)):
        corpus = batches(random_of[name], mixture, tokenizer, held, seen, settings.batch_tokens)
        loss = pretrain(model, corpus, tokens, peak, name, settings)
        print(f"{name}: loss {loss:.4f} per path token, {time.perf_counter() - began:.0f} s", flush=True)
    assert seen.isdisjoint(held), "a problem of train.jsonl or test.jsonl is in the corpus"

    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".making-", dir=out) as beside:  # renamed at the end: nothing half-made
        write_checkpoint(Path(beside), model, config, tokenizer)
        for name, part in (("train", problems[:settings.train]), ("test", problems[settings.train:])):
            records = [{"id": f"toy-{name}-{number:04d}", "problem": problem.text, "answer": str(problem.counts[-1])}
                       for number, problem in enumerate(part, 1)]
            Path(beside, f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        for file in sorted(Path(beside).iterdir()):
            os.replace(file, out / file.name)
    result = measure(out, random_of["fresh"], settings.measure) if settings.measure else {}
    print(json.dumps({"out": str(out), "seconds": round(time.perf_counter() - began), "loss": loss, **result}))


if __name__ == "__main__":
    command_line(Settings, main)
