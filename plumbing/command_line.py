"""Settings to flags, and a user's mistake to one line: what every script of the project does at its start.

A script's settings are a dataclass, one field a flag. A flag comes before the checkpoint's recipe.json, and that before
the dataclass's default.
"""
import argparse
import dataclasses
import json
import sys

import torch

from plumbing import processes


def option(default, text):
    """A dataclass field with its default and its help text."""
    return dataclasses.field(default=default, metadata={"help": text})


@dataclasses.dataclass
class Common:
    """Flags of every script that runs a model; the paper's sampling settings are the defaults."""
    model: str = option("toy", "checkpoint directory or Hub id")
    max_new_tokens: int | None = option(None, "limit of a path (default: what the context leaves, at most 16384)")
    temperature: float = option(0.6, "0 = greedy")
    top_k: int = option(40, "0 = off")
    top_p: float = option(0.95, "1 = off")
    seed: int = option(0, "of all randomness")
    chat_format: str | None = option(None, "raw, r1, chatml or harmony (default: by the tokenizer's special tokens)")
    device: str = option("cuda" if torch.cuda.is_available() else "cpu", "torch device")
    dtype: str = option("bfloat16" if torch.cuda.is_available() else "float32", "float32, bfloat16 or float16")
    batch: int | None = option(None, "rows decoded at a time (default: as many as memory holds); changes no token")


def parse(settings, argv=None):
    """The flags given, as {field name: value}. Unknown flags end the program with status 2."""
    parser = argparse.ArgumentParser(
        description=sys.modules[settings.__module__].__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    for field in dataclasses.fields(settings):
        kind = getattr(field.type, "__args__", [field.type])[0]  # int of int | None
        how = {"action": argparse.BooleanOptionalAction} if kind is bool else {"type": kind}
        text = field.metadata["help"]
        if field.default not in (None, dataclasses.MISSING):
            text += f" [{field.default}]"
        parser.add_argument(
            "--" + field.name.replace("_", "-"),
            help=text,
            required=field.default is dataclasses.MISSING,
            default=argparse.SUPPRESS,
            **how)
    return vars(parser.parse_args(argv))


def command_line(settings, main, recipe=None):
    """Run main(settings(...)). recipe(flags): a dict of defaults that come before the dataclass's.
    A user's mistake (ValueError, OSError) is one line on stderr and exit status 2."""
    flags = parse(settings)
    try:
        defaults = recipe(flags) if recipe else {}
        resolved = settings(**(defaults | flags))
        if processes.is_first():
            print(f"settings: {json.dumps(dataclasses.asdict(resolved))}", flush=True)
        main(resolved)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
