"""Settings to flags, and a user's mistake to one line: what every script of the project does at
its start.

A script's settings are a dataclass, one field a flag. A flag comes before the checkpoint's
recipe.json, and that before the dataclass's default. Each value's type is checked here, whether it
comes from a flag or a recipe; ranges that several scripts share are checked here too, a script's
own ranges in the script. """
import argparse
import dataclasses
import json
import sys
import types

import torch

from plumbing import processes

KEPT = "finished records are kept: the same command takes them up"
EXPECTED = {
    int: "an integer of at most 64 bits",
    float: "a number of at most 64 bits",
    str: "a text",
    bool: "true or false"}


def option(default, text):
    """A dataclass field with its default and its help text."""
    return dataclasses.field(default=default, metadata={"help": text})


@dataclasses.dataclass
class Common:
    """Flags of every script that runs a model; the paper's sampling settings are the defaults."""
    model: str = option("toy", "checkpoint directory or Hub id")
    max_new_tokens: int | None = option(
        None, "limit of a path (default: what the context leaves, at most 16384)")
    temperature: float = option(0.6, "0 = greedy")
    top_k: int = option(40, "0 = off")
    top_p: float = option(0.95, "1 = off")
    seed: int = option(0, "of all randomness")
    chat_format: str | None = option(
        None, "raw, r1, chatml or harmony (default: by the tokenizer's special tokens)")
    device: str = option("cuda" if torch.cuda.is_available() else "cpu", "torch device")
    dtype: str = option(
        "bfloat16" if torch.cuda.is_available() else "float32", "float32, bfloat16 or float16")
    batch: int | None = option(
        None, "rows decoded at a time (default: as many as memory holds); changes no token")


class OneLineParser(argparse.ArgumentParser):
    """A parser whose complaints are one line, without the usage in front."""

    def error(self, message):
        print(f"error: {one_line(message)} (see --help)", file=sys.stderr)
        sys.exit(2)


def parse(settings, argv=None):
    """The flags given, as {field name: value}. Unknown flags end the program with status 2."""
    parser = OneLineParser(
        description=sys.modules[settings.__module__].__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    for field in dataclasses.fields(settings):
        kind = value_type(field)
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


def value_type(field):
    """The type of a field's values: int of `int`, and of `int | None`."""
    if isinstance(field.type, types.UnionType):
        return field.type.__args__[0]
    return field.type


def check_values(settings, values, source=None):
    """Raise ValueError unless each of values {field name: value} has its field's type, and numbers
    are finite and of at most 64 bits. source: the file that they come from; None: flags."""
    place = "" if source is None else f"{source}: "
    fields = {field.name: field for field in dataclasses.fields(settings)}
    for name, value in values.items():
        if name not in fields:
            raise ValueError(
                f"{place}{one_line(name)}: found {shown(value)}, expected no such setting")
        kind = value_type(fields[name])
        allowed = (int, float) if kind is float else (kind,)
        optional = isinstance(fields[name].type, types.UnionType)
        fits = type(value) in allowed or value is None and optional
        if fits and type(value) in (int, float):
            fits = -2 ** 63 <= value < 2 ** 64  # refuses nan and infinity too
        if not fits:
            raise ValueError(f"{place}{name}: found {shown(value)}, expected {EXPECTED[kind]}")


def require_positive(settings, *names):
    """Raise ValueError unless these settings are above 0, or not given."""
    for name in names:
        value = getattr(settings, name)
        if value is not None and value <= 0:
            raise ValueError(f"{name}: found {shown(value)}, expected more than 0")


def require_choice(settings, name, *choices):
    """Raise ValueError unless a setting is one of these."""
    value = getattr(settings, name)
    if value not in choices:
        raise ValueError(f"{name}: found {shown(value)}, expected {', '.join(choices)}")


def shown(value):
    """A found value for a message: on one line, and cut."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def one_line(message):
    """A message on one line of printable characters, whatever a path or a key in it contains."""
    text = "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(message))
    return text if len(text) <= 1000 else text[:997] + "..."


def is_out_of_memory(error):
    """Whether PyTorch or Python could not allocate."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and "allocate memory" in str(error)


def command_line(settings, main, recipe=None):
    """Run main(settings(...)). recipe(flags): (a dict of defaults that come before the
    dataclass's, the file that they stand in). What a user can mend is one line on stderr: exit
    status 2 for a mistake (ValueError, OSError) or too little memory, 130 for an interruption."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # a locale without UTF-8 loses no text
    try:
        flags = parse(settings)
        check_values(settings, flags)
        defaults, source = recipe(flags) if recipe else ({}, None)
        check_values(settings, defaults, source)
        resolved = settings(**(defaults | flags))
        if processes.is_first():
            print(f"settings: {json.dumps(dataclasses.asdict(resolved))}", flush=True)
        main(resolved)
        processes.leave()
    except KeyboardInterrupt:
        stop_with(130, f"interrupted; {KEPT}")
    except (ValueError, OSError) as error:
        stop_with(2, f"error: {one_line(error)}")
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        stop_with(2, "error: out of memory: lower --batch (rows at a time), --max-new-tokens or "
                     f"--n; {KEPT}")


def stop_with(status, line):
    """End the program with one line on stderr."""
    print(line, file=sys.stderr, flush=True)
    sys.exit(status)
