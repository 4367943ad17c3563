"""Write a STOP (section 3) in the layout of the authors' released code, as their script saves it.

    python oracle/export.py --stop FOLDER --model M --out DIR

For PEFT (`PeftModel.from_pretrained(base, DIR/adapter/classifier)`) and the authors' scripts. Their
layout knows one vector for all [STOP] tokens and two logits: a head of one logit z is written as
the logits [0, z], whose softmax is its sigmoid; different vectors cannot be written. `Stop.load`
reads the folder again, to the same scores.
"""
import dataclasses
import io
import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save
from tokenizers import AddedToken

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))  # the project's root, for its rooms
from model import load  # noqa: E402
from plumbing.checkpoint import find_folder  # noqa: E402
from plumbing.command_line import command_line, option  # noqa: E402
from plumbing.records import read_json, write_atomic  # noqa: E402
from plumbing.tokenizer import Tokenizer  # noqa: E402
from stop import Stop  # noqa: E402

ASSESS = "[ASSESS]"  # the authors' name of the token


@dataclasses.dataclass(kw_only=True)
class Settings:
    """What `python oracle/export.py` can be told."""
    stop: str = option(dataclasses.MISSING, "folder of the STOP to write, ours or released")
    model: str = option("toy", "checkpoint directory or Hub id of its base model")
    out: str = option(dataclasses.MISSING, "folder to write; it must be empty or not there")


def export(stop, model, out, base="", library=None):
    """Write `stop`, a Stop for `model`, to the folder `out`.

    base: the model's name. library: its tokenizer (tokenizers.Tokenizer), which gets the [ASSESS]
    token. ValueError where the layout cannot express the STOP; then nothing is written."""
    out = Path(out)
    check_that_it_fits(stop, out)
    number = assess_number(model, library)
    token = {"assess_token": ASSESS, "special_token_id": number}
    files = {
        "adapter/classifier/adapter_model.safetensors": adapter_weights(stop),
        "adapter/classifier/adapter_config.json": json.dumps(adapter_config(stop, base), indent=2),
        "assess_token_config.json": json.dumps(token | {
            "num_assess_tokens": stop.m,
            "tokenizer_dir": "tokenizer",
            "embedding_path": "assess_token_embedding.pth"}, indent=2),
        "classifier_head.pth": pickled(two_logits(stop)),
        "assess_token_embedding.pth": pickled(token | {
            "input_embedding": stop.tokens[0].detach().cpu().clone(),
            "output_embedding": output_row(model, number)})}
    if library is not None:
        files["tokenizer/tokenizer.json"] = library.to_str(pretty=True)
    for name, content in files.items():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        write_atomic(out / name, content)


def check_that_it_fits(stop, out):
    """Raise ValueError unless the layout has a place for this STOP, and the folder is free."""
    rows = stop.tokens.detach()
    if not (rows == rows[0]).all():
        raise ValueError(
            f"tokens: found {stop.m} different vectors, expected one that all [STOP] tokens share: "
            "the released layout has no place for more (train with --shared)")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out}: found something there, expected an empty folder or none")


def assess_number(model, library):
    """The id of the [ASSESS] token; a tokenizer that lacks it gets it."""
    if library is None:
        return model.config.vocab_size
    if library.token_to_id(ASSESS) is None:
        library.add_tokens([AddedToken(ASSESS, special=False)])
    return library.token_to_id(ASSESS)


def two_logits(stop):
    """The head as one of two logits: {weight (2, hidden), bias (2,)}."""
    parts = {"weight": stop.head.weight.detach().cpu(), "bias": stop.head.bias.detach().cpu()}
    if stop.head_kind == "softmax":
        return parts
    return {name: torch.cat((torch.zeros_like(part), part)) for name, part in parts.items()}


def output_row(model, number):
    """The row of lm_head that belongs to the token, which their code saves and never reads."""
    if number >= model.config.vocab_size or model.config.reward:
        return None
    return model.lm_head.weight[number].detach().float().cpu().clone()


def adapter_weights(stop):
    """The bytes of PEFT's adapter_model.safetensors."""
    weights = {}
    for name, tensor in stop.lora.state_dict().items():
        weights[f"base_model.model.{name}"] = tensor.detach().cpu().contiguous()
    return save(weights, {"format": "pt"})


def adapter_config(stop, base):
    """PEFT's adapter_config.json."""
    return {
        "base_model_name_or_path": str(base),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": stop.lora.alpha,
        "lora_dropout": stop.lora.dropout,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": stop.lora.rank,
        "target_modules": sorted(stop.lora.targets),
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": False}


def pickled(content):
    """The bytes of a .pth file."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def main(settings):
    """Load, write, load what was written, and show one score of both."""
    folder = find_folder(settings.model)
    model = load(settings.model)
    stop = Stop.load(settings.stop, model)
    tokenizer = Tokenizer(settings.model)
    export(stop, model, settings.out, settings.model, tokenizer.library)
    config = folder / "tokenizer_config.json"
    if config.is_file():
        copy = Path(settings.out) / "tokenizer" / config.name
        write_atomic(copy, json.dumps(read_json(config), indent=2))
    again = Stop.load(settings.out, model)
    prefix = list(range(min(8, model.config.vocab_size)))
    print(json.dumps({
        "out": settings.out,
        "score": stop.score(model, [prefix]).item(),
        "score_of_what_was_written": again.score(model, [prefix]).item()}))


if __name__ == "__main__":
    command_line(Settings, main)
