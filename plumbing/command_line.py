"""Settings to flags, and a user's mistake to one line: what every script of the project does at
its start.

A script's settings are a dataclass, one field a flag. A flag comes before the checkpoint's
recipe.json, and that before the dataclass's default. Each value's type is checked here, whether it
comes from a flag or a recipe; ranges that several scripts share are checked here too, a script's
own ranges in the script.
"""
import argparse
import contextlib
import dataclasses
import errno
import functools
import os
import signal
import sys
import time
import types

import torch

import plumbing
from plumbing import kept, processes

KEPT = "finished records are kept: the same command takes them up"
NOTHING_KEPT = "nothing was kept: the same command begins again"
FIRST_SPEAKS = 30.0  # seconds that the other processes leave to the first, to say a mistake
EXPECTED = {
    int: "an integer of at most 32 bits",
    float: "a finite number of at most 64 bits",
    str: "a text",
    bool: "true or false"}
# What PyTorch's plain RuntimeErrors say when memory is short.
OUT_OF_MEMORY = (
    "allocate memory", "out of memory", "ALLOC_FAILED", "bad_alloc", "Storage size calculation",
    "could not create a memory", "can't start new thread")
# What the other processes of a run say when one of them has ended.
OTHER_PROCESS_GONE = ("closed by peer", "reset by peer", "Broken pipe")


def option(default, text, may_be_empty=False, heading=None):
    """A dataclass field with its default and its help text. may_be_empty: whether "" is a value
    of it; elsewhere it is what a shell makes of a variable that is not set. heading: what --help
    writes above this field and those that follow."""
    metadata = {"help": text, "may_be_empty": may_be_empty, "heading": heading}
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass
class Common:
    """Flags of every script that runs a model; the paper's sampling settings are the defaults."""
    model: str = option(
        "toy", "checkpoint directory or Hub id", heading="the model and its sampling")
    max_new_tokens: int | None = option(
        None, "limit of a path (default: what the context leaves, at most 16384)")
    temperature: float = option(0.6, "0 = greedy")
    top_k: int = option(40, "0 = off")
    top_p: float = option(0.95, "1 = off")
    seed: int = option(0, "of all randomness")
    chat_format: str | None = option(
        None, "raw, r1, chatml or harmony (default: the checkpoint's chat template; without one, "
              "by the tokenizer's special tokens)")
    device: str = option("cuda" if torch.cuda.is_available() else "cpu", "torch device")
    dtype: str = option(
        "bfloat16" if torch.cuda.is_available() else "float32", "float32, bfloat16 or float16")
    batch: int | None = option(
        None, "rows decoded at a time (default: as many as memory holds); changes no token")
    attention: str | None = option(
        None, "plain or flash (default: flash in half precision on a GPU where it proves right)")


class OneLineParser(argparse.ArgumentParser):
    """A parser whose complaints are one line, without the usage in front."""

    def error(self, message):
        stop_with(2, f"error: {one_line(message)} (see --help)")


def parse(settings, argv=None):
    """The flags given, as {field name: value}. Unknown flags end the program with status 2."""
    parser = OneLineParser(
        description=sys.modules[settings.__module__].__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    shared = {field.name for field in dataclasses.fields(Common)}
    fields = sorted(dataclasses.fields(settings), key=lambda field: field.name in shared)
    group = parser
    for field in fields:  # the script's own flags first
        if field.metadata["heading"] is not None:
            group = parser.add_argument_group(field.metadata["heading"])
        kind = value_type(field)
        if kind is bool:
            how = {"action": argparse.BooleanOptionalAction}
        else:
            how = {"type": functools.partial(convert, kind)}
        text = field.metadata["help"]
        if field.default not in (None, dataclasses.MISSING):
            text += f" [{field.default}]"
        group.add_argument(
            "--" + field.name.replace("_", "-"),
            help=text,
            required=field.default is dataclasses.MISSING,
            default=argparse.SUPPRESS,
            **how)
    return vars(parser.parse_args(argv))


def convert(kind, text):
    """A flag's text as a value of its type."""
    try:
        return kind(text)
    except ValueError:
        message = f"found {shown(text)}, expected {EXPECTED[kind]}"
        raise argparse.ArgumentTypeError(message.replace("%", "%%")) from None


def value_type(field):
    """The type of a field's values: int of `int`, and of `int | None`."""
    if isinstance(field.type, types.UnionType):
        return field.type.__args__[0]
    return field.type


def check_values(settings, values, source=None):
    """Raise ValueError unless each of values {field name: value} has its field's type, numbers are
    finite and not too large, and texts are not empty. source: the file that they come from; None:
    flags."""
    place = "" if source is None else f"{source}: "
    fields = {field.name: field for field in dataclasses.fields(settings)}
    for name, value in values.items():
        if name not in fields:
            raise ValueError(
                f"{place}{one_line(name)}: found {shown(value)}, expected no such setting")
        expected = misfit(fields[name], value)
        if expected is not None:
            raise ValueError(f"{place}{name}: found {shown(value)}, expected {expected}")


def misfit(field, value):
    """What is expected of a field's value, if this one is not; None where it is."""
    kind = value_type(field)
    if value is None and isinstance(field.type, types.UnionType):
        return None
    if field.name == "seed":
        fits = type(value) is int and -2 ** 63 <= value < 2 ** 64
        return None if fits else "an integer of at most 64 bits"
    if kind is str and value == "" and not field.metadata["may_be_empty"]:
        return "a text of at least one character (it would hold no token and name no file)"
    if kind is str and type(value) is str and "\0" in value:
        return "a text without the character NUL"
    fits = type(value) is kind
    if kind is int and fits:
        fits = -2 ** 31 <= value < 2 ** 31
    if kind is float and type(value) in (int, float):
        fits = -2 ** 63 <= value < 2 ** 64  # refuses nan and infinity too
    return None if fits else EXPECTED[kind]


def describe(settings, recipe, source):
    """What differs from the defaults, in words; of what stands in `recipe`, a dict, the file it
    comes from (source) is named."""
    by_flag = []
    by_recipe = []
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if value != field.default:
            is_recipes = source is not None and field.name in recipe
            group = by_recipe if is_recipes else by_flag
            group.append(f"{field.name} {plainly(value)}")
    parts = []
    if by_flag:
        parts.append(", ".join(by_flag))
    if by_recipe:
        parts.append(f"from {source}: {', '.join(by_recipe)}")
    return "; ".join(parts) or "all at their defaults"


def plainly(value):
    """A setting's value for people: true and false as in JSON, a single word without quotes."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str) and value and not any(c.isspace() or c in ",;" for c in value):
        return value if len(value) <= 100 else value[:97] + "..."
    return shown(value)


def require_positive(settings, *names):
    """Raise ValueError unless these settings are above 0, or not given."""
    for name in names:
        value = getattr(settings, name)
        if value is not None and value <= 0:
            raise ValueError(f"{name}: found {shown(value)}, expected more than 0")


def refuse_flags(flags, names, reason):
    """Raise ValueError where one of these flags was given: it would have no effect."""
    for name in names:
        if name in flags:
            raise ValueError(f"{name}: found {shown(flags[name])}, expected none: {reason}")


def require_one_process():
    """Raise ValueError where torchrun has started several processes."""
    if processes.launched() > 1:
        raise ValueError(
            f"torchrun: found {processes.launched()} processes, expected 1: here each would do all "
            "of the work")


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
    return isinstance(error, RuntimeError) and any(text in str(error) for text in OUT_OF_MEMORY)


def is_other_process(error):
    """Whether this process of several fails because another has ended, which says why itself."""
    gone = any(text in str(error) for text in OTHER_PROCESS_GONE)
    return processes.count() > 1 and isinstance(error, RuntimeError) and gone


def command_line(settings, main, recipe=None, shares_work=False):
    """Run main(settings(...)). recipe(flags): (a dict of defaults that come before the
    dataclass's, the file that they stand in); it raises ValueError on flags that have no effect
    beside each other. shares_work: whether several processes of torchrun
    may run this script side by side. What a user can mend is one line on stderr: exit status 2 for
    a mistake (ValueError, OSError) or too little memory, 130 for an interruption."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # a locale without UTF-8 loses no text
    kept.begin()
    if signal.getsignal(signal.SIGINT) is plumbing.leave:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    resolved = None
    defaults = {}
    source = None
    try:
        flags = parse(settings)
        processes.check_environment()
        if not shares_work:
            require_one_process()
        check_values(settings, flags)
        if recipe is not None:
            defaults, source = recipe(flags)
        check_values(settings, defaults, source)
        defaults = {name: value for name, value in defaults.items() if name not in flags}
        resolved = settings(**(defaults | flags))
        if processes.is_first():
            print(f"settings: {one_line(describe(resolved, defaults, source))}", flush=True)
        main(resolved)
        sys.stdout.flush()  # a full disk is to be found out here, not behind all handlers
        processes.leave()
    except KeyboardInterrupt:
        stop_with(130, f"interrupted; {what_is_kept()}")
    except BrokenPipeError:  # whoever read the output has read enough
        stop_with(141, "")
    except ValueError as error:
        stop_with(2, f"error: {one_line(name_source(str(error), defaults, source))}")
    except OSError as error:
        full = f"; {what_is_kept()}" if error.errno == errno.ENOSPC else ""
        stop_with(2, f"error: {one_line(error)}{full}")
    except (RuntimeError, MemoryError) as error:
        if is_other_process(error):
            stop_with(2, "error: another process of this run has ended: its own line says why")
        if not is_out_of_memory(error):
            raise
        stop_with(2, "error: out of memory: lower --batch (rows at a time), --max-new-tokens or "
                     f"--n; {what_is_kept()}")


def name_source(message, defaults, source):
    """A complaint about a setting ("name: found ..."), with the file that the setting stands in
    where it came from there."""
    name = message.partition(": found ")[0].replace("-", "_")
    return f"{source}: {message}" if source and name in defaults else message


def what_is_kept():
    """What an interrupted run leaves for the next one, in words."""
    return KEPT if kept.is_some() else NOTHING_KEPT


def leave_the_word_to_the_first():
    """Before torchrun's processes have joined, a mistake is the same in all of them, and the first
    says it: torchrun ends the others as soon as it ends. One that ended earlier would end the first
    before it has spoken. If the first does not fail, this process goes on to say it."""
    if not processes.is_first():
        time.sleep(FIRST_SPEAKS)


def stop_with(status, line):
    """End the program with one line on stderr, or none. Of what stdout still holds, what cannot be
    written is dropped."""
    if status == 2 and processes.count() == 1:
        leave_the_word_to_the_first()
    with contextlib.suppress(OSError):
        if line and (processes.is_first() or status == 2):
            print(line, file=sys.stderr, flush=True)
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if processes.count() > 1:
        os._exit(status)  # as in processes.leave
    sys.exit(status)
