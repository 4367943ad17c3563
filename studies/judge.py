"""An external judge (type II) trained on STOP's own soft labels: "Type II-retrain" (paper).

    python train.py && python studies/judge.py            # the embedded toy: its labels, its judge
    python studies/judge.py --model M --labels runs/M/labels.jsonl --out runs/M/judge --lr 1e-5 \\
        --batch-size 1 --accumulation 64
    python eval.py --judge runs/toy/judge                 # as a scorer beside the others

A copy of the base model with a reward head of two logits (bad, good) in place of the next token's.
All weights learn by soft cross-entropy at the last token of prompt + prefix. What sets it apart
from STOP is what sets type II apart from type IV (sections 2 and 7): a second model, all of it
trained, that reads the whole text again.
"""
import dataclasses
import json
import math
import sys
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save

sys.path.insert(0, str(Path(__file__).parent.parent))
import train
from commands import train as train_command
from commands.common import open_model
from model import Decoder, load
from plumbing.checkpoint import find_folder
from plumbing.command_line import Common, command_line, option, refuse_flags, require_choice
from plumbing.progress import progress, say
from plumbing.records import read_json, write_atomic
from sample import require_finite
from shared import labels_file, require_targets
from stop import like_lengths

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")


@dataclasses.dataclass(kw_only=True)
class Settings(Common):
    """What `python studies/judge.py` can be told. The defaults are the toy's; a model of 1B and
    more wants lr 1e-5."""
    labels: str | None = option(
        None, "labels.jsonl of a run of train.py (default: in runs/ and the model's name)")
    out: str | None = option(None, "folder of the judge (default: judge/ beside the labels)")
    dtype: str = option("float32", "of the weights while they are trained")
    stored: str = option("bfloat16", "of the weights as they are saved")
    lr: float = option(5e-4, "AdamW's learning rate")
    weight_decay: float = option(0.01, "AdamW's")
    epochs: int = option(6, "passes over the training prefixes")
    batch_size: int = option(64, "prefixes a pass")
    accumulation: int = option(1, "passes an optimiser step")
    warmup: int = option(20, "optimiser steps of linear warm-up")
    cosine: bool = option(True, "cosine decay to zero instead of a constant rate")
    clip: float = option(1.0, "largest gradient norm (0 = off)")
    validation: float = option(0.1, "share of the problems held out to choose the best epoch")


def recipe(flags):
    """No defaults of a file's. ValueError on flags that have no effect here."""
    of_sampling = ("max_new_tokens", "temperature", "top_k", "top_p", "batch", "chat_format")
    refuse_flags(flags, of_sampling, "a judge is trained on labels, and nothing is sampled")
    return {}, None


def check(settings):
    """ValueError on settings that cannot be, before any work is done."""
    require_choice(settings, "stored", "float32", "bfloat16", "float16")
    as_in_training = train_command.Settings()
    for field in dataclasses.fields(train_command.Settings):
        if hasattr(settings, field.name):
            setattr(as_in_training, field.name, getattr(settings, field.name))
    train_command.validate(as_in_training)


def try_folder(out):
    """Create the judge's folder and write to it, so that no training is lost: OSError where that
    fails, ValueError where a checkpoint is there already."""
    if (out / "model.safetensors").exists():
        raise ValueError(
            f"{out}: holds a checkpoint already: choose another --out, or remove the folder")
    require_targets(out, "config.json", "judge.json")
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=out) as probe:
        probe.write(b"probe")


# The judge


def new_judge(model, seed):
    """A Decoder with the weights of `model` and a reward head; all of it takes gradients.
    The head's first layer is random by the seed, its second zero, so that every chance starts at
    one half."""
    torch.manual_seed(seed)
    config = dataclasses.replace(model.config, reward=True, tie_word_embeddings=False)
    judge = Decoder(config)
    weights = model.state_dict() | judge.score.state_dict(prefix="score.")
    del weights["lm_head.weight"]
    judge.load_state_dict(weights)
    torch.nn.init.zeros_(judge.score[-1].weight)
    torch.nn.init.zeros_(judge.score[-1].bias)
    dtype = model.model.embed_tokens.weight.dtype
    return judge.to(model.device, dtype).requires_grad_(True)


def read(judge, prefixes):
    """The judge's two logits (B, 2) float32 at the last tokens of prefixes (lists of token ids)."""
    rows = [torch.tensor(prefix) for prefix in prefixes]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(judge.device)
    hidden = judge(ids)  # (B, T, hidden), padded on the right, where no token looks
    ends = [len(prefix) - 1 for prefix in prefixes]
    return judge.logits(hidden[range(len(prefixes)), ends]).float()


def loss_of(logits, labels):
    """Mean soft cross-entropy of logits (B, 2) against labels (B,) in [0, 1]."""
    return F.cross_entropy(logits, torch.stack((1 - labels, labels), -1))


# Training


def batches(examples, size):
    """Examples (train.Example) in batches of like length: lists of at most `size`."""
    groups = []
    for numbers in like_lengths(ids_of(examples), size):
        groups.append([examples[i] for i in numbers])
    return groups


def ids_of(examples):
    """Their prefixes, lists of token ids."""
    return [example.ids for example in examples]


def labels_of(examples):
    """Their soft labels (N,) float32."""
    return torch.tensor([example.label for example in examples])


@torch.no_grad()
def validate(judge, held):
    """Metrics on batches of validation examples."""
    logits = []
    for batch in held:
        logits.append(read(judge, ids_of(batch)).cpu())
    logits = torch.cat(logits)
    scores = logits.softmax(-1)[:, 1]
    require_finite(scores, "validation: the judge's score")
    examples = sum(held, [])
    labels = labels_of(examples)
    problems = [example.problem for example in examples]
    metrics = {"validation_loss": loss_of(logits, labels).item()}
    return metrics | train.discrimination(scores, labels, problems)


def train_epoch(judge, optimizer, training, settings, epoch, bar):
    """One pass over the training batches -> the mean loss. The loss of a step is the mean over all
    its prefixes, however many passes they take."""
    torch.manual_seed(settings.seed + epoch)
    steps = torch.randperm(len(training)).split(settings.accumulation)
    first = (epoch - 1) * len(steps)
    total = 0.0
    for step, chosen in enumerate(steps, first):
        passes = [training[number] for number in chosen]
        rows = sum(map(len, passes))
        for batch in passes:
            labels = labels_of(batch).to(judge.device)
            loss = loss_of(read(judge, ids_of(batch)), labels) * len(batch)
            require_finite(loss, f"judge: the loss of step {step + 1}")
            (loss / rows).backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(judge.parameters(), settings.clip or math.inf)
        rate = train.learning_rate(step, settings.epochs * len(steps), settings)
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()
        bar.update()
    return total / sum(map(len, training))


def fit(judge, examples, settings):
    """Train all weights -> (state dict of the epoch with the lowest validation loss, as it is to be
    stored; that epoch)."""
    training, validation = train.split(examples, settings.validation, settings.seed)
    training = batches(training, settings.batch_size)
    validation = batches(validation, settings.batch_size)
    optimizer = torch.optim.AdamW(
        judge.parameters(), lr=settings.lr, weight_decay=settings.weight_decay)
    steps = math.ceil(len(training) / settings.accumulation)  # an epoch
    dtype = getattr(torch, settings.stored)
    lowest = math.inf
    best_state = None
    best_epoch = None
    with progress("judge", settings.epochs * steps, "step") as bar:
        for epoch in range(1, settings.epochs + 1):
            row = {"train_loss": train_epoch(judge, optimizer, training, settings, epoch, bar)}
            row |= validate(judge, validation)
            values = [f"{key} {value:.4g}" for key, value in row.items() if value is not None]
            say(f"epoch {epoch}: {', '.join(values)}")
            if row["validation_loss"] < lowest:
                lowest = row["validation_loss"]
                best_epoch = epoch
                best_state = {}
                for name, tensor in judge.state_dict().items():
                    best_state[name] = tensor.to("cpu", dtype, copy=True).contiguous()
    return best_state, best_epoch


# The checkpoint


def write_checkpoint(out, source, state):
    """Write a checkpoint directory of a state dict: config and tokenizer are those in `source`."""
    config = read_json(source / "config.json")
    config["architectures"] = ["Qwen2ForProcessRewardModel"]
    config.pop("quantization_config", None)  # GPT-OSS's experts are saved as they were trained
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            write_atomic(out / name, (source / name).read_bytes())
    write_atomic(out / "config.json", json.dumps(config, indent=1) + "\n")
    write_atomic(out / "model.safetensors", save(state, {"format": "pt"}))


def main(settings):
    """Train a judge, then write its checkpoint directory; the last line is one JSON object."""
    file = labels_file(settings)
    out = Path(settings.out or file.parent / "judge")
    check(settings)
    model, tokenizer = open_model(settings)
    examples = train_command.given_labels(file, model, tokenizer, m=0, tests=[])
    try_folder(out)
    judge = new_judge(model, settings.seed)
    count = sum(parameter.numel() for parameter in judge.parameters())
    print(f"{len(examples)} prefixes; {count:,} trained parameters", flush=True)
    state, epoch = fit(judge, examples, settings)

    write_checkpoint(out, find_folder(settings.model), state)
    stored = load(out, settings.device, getattr(torch, settings.dtype))
    _, validation = train.split(examples, settings.validation, settings.seed)
    metrics = validate(stored, batches(validation, settings.batch_size))
    about = {"settings": dataclasses.asdict(settings), "epoch": epoch, "metrics": metrics}
    write_atomic(out / "judge.json", json.dumps(about, indent=1) + "\n")
    print(json.dumps({"out": str(out), "epoch": epoch, **metrics}))


if __name__ == "__main__":
    command_line(Settings, main, recipe)
