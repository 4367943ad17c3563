"""What the command lines share: the model that they name, its STOP, the memory that it took."""
import re
import resource
import sys

import torch

from engine.attention import equip
from model import load
from plumbing import processes
from plumbing.answers import END_OF_TURN
from plumbing.checkpoint import find_folder
from plumbing.files import PROJECT, embedded, is_there
from plumbing.records import read_json
from plumbing.tokenizer import PROBE, Tokenizer


def open_model(settings):
    """The Decoder and the Tokenizer that a script's settings name, with the attention that suits
    the device. ValueError on an unknown device, dtype or attention."""
    if settings.attention not in (None, "plain", "flash"):
        raise ValueError(f"attention: found {settings.attention!r}, expected plain or flash")
    if settings.dtype not in ("float32", "bfloat16", "float16"):
        raise ValueError(f"dtype: found {settings.dtype!r}, expected float32, bfloat16 or float16")
    try:
        if re.fullmatch("cpu|mps|cuda(:[0-9]+)?", settings.device) is None:
            raise RuntimeError("expected cpu, cuda, cuda:0 or mps")
        device = processes.start(settings.device)
        torch.empty(0, device=device)
        if ":" in device:
            torch.cuda.set_device(device)  # what names no device is meant for this one
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device: found {settings.device!r}: {reason}") from None
    model = load(settings.model, device, getattr(torch, settings.dtype))
    chosen = equip(model, settings.attention)
    if chosen and processes.is_first():
        print(chosen, flush=True)
    tokenizer = Tokenizer(settings.model, settings.chat_format)
    mark = unstopped_turn(tokenizer, model.config.eos_ids)
    if mark is not None and processes.is_first():
        print(f"{settings.model}: {mark} ends a turn in the chat format, but is no stop id: paths "
              "go on behind it, and answers are read up to it", file=sys.stderr, flush=True)
    return model, tokenizer


def unstopped_turn(tokenizer, eos_ids):
    """The mark with which a turn ends in the chat format, if no path stops at it; else None."""
    _, _, behind_message = tokenizer.chat(PROBE).partition(PROBE)
    for mark in END_OF_TURN:
        if mark in behind_message and tokenizer.library.token_to_id(mark) not in eos_ids:
            return mark
    return None


def peak_memory():
    """The most memory that was in use, in bytes: of the GPU if one was used, else of this
    process."""
    on_gpu = torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux kilobytes
    return on_gpu or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def stop_folder(settings):
    """The folder of the STOP that a script's settings name."""
    if settings.stop is None:
        return find_folder(settings.model) / "stop"
    return embedded(settings.stop)


def say_unknown_in_prompt(tokenizer, prompt_ids, settings):
    """Print a line where a prompt holds what the tokenizer does not know."""
    count = tokenizer.count_unknown(prompt_ids)
    if count:
        say_unknown(f"prompt: {count} of {len(prompt_ids)} tokens are unknown", tokenizer, settings)


def say_unknown_in_data(tokenizer, problems, settings):
    """Print a line where Problems hold what the tokenizer does not know."""
    count = sum(tokenizer.count_unknown(tokenizer.ask(problem)) > 0 for problem in problems)
    if count:
        say_unknown(
            f"data: {count} of {len(problems)} problems hold words unknown", tokenizer, settings)


def say_unknown(found, tokenizer, settings):
    """Print what was found, once for all processes, and what it is read as."""
    is_toy = find_folder(settings.model).resolve() == PROJECT / "toy"
    hint = "; the toy's language is described in docs/toy.md" if is_toy else ""
    if processes.is_first():
        print(f"{found} to this tokenizer ({tokenizer.unknown}){hint}", flush=True)


def say_other_sampling(settings, folder):
    """Print a line for each file of a STOP's folder that was made of paths sampled in another way
    than this run samples: what it says of this run's paths may not hold."""
    for name, keys in (("stop.json", ("trained", "settings")), ("plan.json", ("chosen",))):
        file = folder / name
        found = recorded_sampling(file, keys)
        now = {key: getattr(settings, key) for key in found}
        if found != now and processes.is_first():
            print(f"{file}: made at {in_words(found)}; this run samples at {in_words(now)}: what "
                  "it says of these paths may not hold", flush=True)


def recorded_sampling(file, keys):
    """The sampling settings that a JSON file names below these keys; empty where it names none.
    Who uses the file refuses one that is broken."""
    try:
        content = read_json(file) if is_there(file) else {}
    except ValueError:
        return {}
    for key in keys:
        content = content.get(key) if isinstance(content, dict) else None
    if not isinstance(content, dict):
        return {}
    return {key: content[key] for key in ("temperature", "top_k", "top_p") if key in content}


def in_words(sampling):
    """Sampling settings for a line."""
    return ", ".join(f"{key} {value}" for key, value in sampling.items())
