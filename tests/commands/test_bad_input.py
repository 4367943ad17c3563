"""What a user can get wrong with generate and on the command line: one ValueError, one line, status
2. Wrong files are in test_checkpoint, test_tokenizer, test_problems and test_train."""
import dataclasses
import json
import math
import re

import pytest
import torch
from helpers import (
    call_script, random_model, random_prompt, raw_config, start_script, write_checkpoint,
    write_tokenizer)

from commands import sample
from engine.refill import generate
from lora import LoRA
from plumbing import command_line as room
from plumbing.command_line import check_values, describe, option, shown

# ------------------------------------------------------------------------------------- the sampler


@pytest.fixture(scope="module")
def model():
    return random_model("qwen2", max_position_embeddings=40)


LONG = random_prompt(36)
CALLS = {
    "n of 0": ({"n": 0}, "n: found 0"),
    "n below 0": ({"n": -1}, "n: found -1"),
    "no new tokens": ({"max_new_tokens": 0}, "max_new_tokens: found 0"),
    "batch of 0": ({"batch": 0}, "batch: found 0"),
    "batch below 0": ({"batch": -2}, "batch: found -2"),
    "temperature below 0": ({"temperature": -0.1}, "temperature: found -0.1"),
    "temperature nan": ({"temperature": math.nan}, "temperature: found nan"),
    "temperature inf": ({"temperature": math.inf}, "temperature: found inf"),
    "top-p of 0": ({"top_p": 0.0}, "top-p: found 0.0"),
    "top-p above 1": ({"top_p": 1.01}, "top-p: found 1.01"),
    "top-p nan": ({"top_p": math.nan}, "top-p: found nan"),
    "top-k below 0": ({"top_k": -1}, "top-k: found -1"),
    "seed beyond 64 bits": ({"seed": 2 ** 64}, "seed: found 18446744073709551616"),
    "token id too large": ({"prompts": [[1], [2, 61]]}, "prompt 1.*61.*vocabulary of 61"),
    "token id below 0": ({"prompts": [[1, -1]]}, "prompt 0.*-1.*vocabulary"),
    "empty prompt": ({"prompts": [[1], []]}, "prompt 1.*no token"),
    "prompt beyond the context": ({"prompts": [LONG + LONG]}, "prompt 0.*72.*context of 40"),
    "no room for new tokens": ({"prompts": [[1], LONG]}, "prompt 1.*36.*5.*context of 40"),
}


@pytest.mark.parametrize("what", CALLS)
def test_a_wrong_call_of_generate(model, what):
    changes, message = CALLS[what]
    good = {"prompts": [[1, 2]], "n": 2, "max_new_tokens": 5, "temperature": 1.0, "top_k": 5,
            "top_p": 0.9}
    assert generate(model, **good)
    with pytest.raises(ValueError, match=message) as caught:
        generate(model, **good | changes)
    assert "\n" not in str(caught.value)


def test_the_context_may_be_filled_to_the_end(model):
    ((path,),) = generate(model, [LONG[:35]], max_new_tokens=5)
    assert len(path.ids) == 5


def test_a_lora_target_that_is_not_there(model):
    with pytest.raises(ValueError, match="targets: found 'router', expected some of .* q_proj"):
        LoRA(model, 4, 8, ("q_proj", "router"))


# --------------------------------------------------------------------------------- the command line

FLAGS = {  # what is wrong -> (words behind good ones, what the error line must say)
    "no such directory": (["--model", "none"], "none.*no such directory"),
    "unknown flag": (["--temprature", "1"], "temprature"),
    "unknown architecture": (["--model", "BAD"], "config.json.*model_type.*mistral"),
    "beyond the context": (["--prompt", "x" * 600], "600.*context of 512"),
    "empty prompt": (["--prompt", ""], "prompt: found '', expected a text of at least one"),
    "n of 0": (["--n", "0"], "n: found 0"),
    "n below 0": (["--n", "-3"], "n: found -3"),
    "no new tokens": (["--max-new-tokens", "0"], "max.new.tokens.*0"),
    "batch of 0": (["--batch", "0"], "batch.*0"),
    "temperature below 0": (["--temperature", "-1"], "temperature.*-1"),
    "temperature nan": (["--temperature", "nan"], "temperature: found nan"),
    "top-p of 0": (["--top-p", "0"], "top-p.*0"),
    "top-k below 0": (["--top-k", "-1"], "top-k.*-1"),
    "a seed beyond 64 bits": (["--seed", "99999999999999999999"], "seed: found 9999.*64 bits"),
    "a number of many digits": (["--n", "9" * 400], "n: found 9+[.]{3}, expected"),
    "a word for a number": (["--n", "two"], "--n.*two"),
    "a missing value": (["--n"], "--n"),
    "an abbreviation": (["--max-new", "3"], "--max-new"),
    "an argument too many": (["extra"], "extra"),
    "a line end in an argument": (["--model", "no\nne"], "no.*ne.*no such directory"),
    "unknown dtype": (["--dtype", "int8"], "dtype.*int8"),
    "unknown device": (["--device", "abacus"], "device: found 'abacus'"),
    "a device that is not there": (["--device", "cuda:99"], "device: found 'cuda:99'"),
    "a device without numbers": (["--device", "meta"], "device: found 'meta'"),
    "unknown format": (["--chat-format", "llama"], "chat format.*llama"),
    "a broken template": (
        ["--model", "TORN"], "torn/tokenizer_config.json: chat template: TemplateSyntaxError"),
}


@pytest.fixture(scope="module")
def arguments(tmp_path_factory):
    """A function: the words of a command line behind good ones."""
    folder = tmp_path_factory.mktemp("cli")
    for name in ("good", "bad"):
        write_tokenizer(write_checkpoint(folder / name, raw_config("qwen2", vocab_size=256)))
    config = raw_config("qwen2", vocab_size=256, model_type="mistral")
    (folder / "bad" / "config.json").write_text(json.dumps(config))
    torn = write_checkpoint(folder / "torn", raw_config("qwen2", vocab_size=256))
    write_tokenizer(torn, template="{{ messages[0].content")
    others = {"BAD": str(folder / "bad"), "TORN": str(torn)}
    good = ["--model", str(folder / "good"), "--prompt", "hi", "--max-new-tokens", "4", "--n", "2",
            "--device", "cpu", "--dtype", "float32"]

    def words(more=()):
        return good + [others.get(word, word) for word in more]

    return words


@pytest.mark.parametrize("what", FLAGS)
def test_a_users_mistake_is_one_line(arguments, capsys, monkeypatch, what):
    """On stderr, with exit status 2: the script's entry, in this process."""
    more, message = FLAGS[what]
    status, _, err = call_script(monkeypatch, capsys, sample, *arguments(more))
    (line,) = err.splitlines()
    assert status == 2
    assert line.startswith("error: ")
    assert re.search(message, line), line
    assert len(line) < 1100


FAILURES = {  # what is raised inside -> (exit status, what the line says)
    "an interruption": (KeyboardInterrupt(), 130, "interrupted; nothing was kept"),
    "no memory": (MemoryError(), 2, "error: out of memory: lower --batch"),
    "no memory of a GPU": (
        torch.OutOfMemoryError("CUDA"), 2, "error: out of memory: lower --batch"),
    "no memory for a tensor": (
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), 2,
        "error: out of memory: lower --batch"),
    "a full disk": (OSError(28, "No space left on device"), 2, "error: [Errno 28] No space left"),
    "a mistake of two lines": (ValueError("a\nb\x1b[31m"), 2, r"error: a\nb\x1b[31m")}


@pytest.mark.parametrize("what", FAILURES)
def test_what_a_user_can_mend_is_one_line(arguments, capsys, monkeypatch, what):
    error, expected, message = FAILURES[what]

    def fail(*_):
        raise error

    monkeypatch.setattr(sample, "open_model", fail)
    status, _, err = call_script(monkeypatch, capsys, sample, *arguments())
    assert status == expected
    assert err.startswith(message)
    assert err.count("\n") == 1


def test_a_mistake_of_the_program_is_not_hidden(arguments, capsys, monkeypatch):
    def fail(*_):
        raise RuntimeError("size mismatch")

    monkeypatch.setattr(sample, "open_model", fail)
    with pytest.raises(RuntimeError, match="size mismatch"):
        call_script(monkeypatch, capsys, sample, *arguments())


# ---------------------------------------------------------------------- values of flags and recipes


@pytest.mark.parametrize("values, message", (
    ({"n": "8"}, "n: found '8', expected an integer of at most 32 bits"),
    ({"n": 8.0}, "n: found 8.0, expected an integer"),
    ({"n": True}, "n: found True, expected an integer"),
    ({"n": None}, "n: found None, expected an integer"),
    ({"n": 2 ** 31}, "n: found 2147483648, expected an integer of at most 32 bits"),
    ({"seed": 2 ** 64}, "seed: found 18446744073709551616, expected an integer of at most 64 bits"),
    ({"temperature": "1"}, "temperature: found '1', expected a finite number"),
    ({"temperature": math.nan}, "temperature: found nan, expected a finite number"),
    ({"temperature": math.inf}, "temperature: found inf, expected a finite number"),
    ({"model": 5}, "model: found 5, expected a text"),
    ({"model": ""}, "model: found '', expected a text of at least one character"),
    ({"batch": [1]}, r"batch: found \[1\], expected an integer"),
    ({"paths": 3}, "paths: found 3, expected no such setting"),
    ({"a\nb": 3}, r"a\\nb: found 3, expected no such setting"),
    ({"model": ["x" * 500]}, r"model: found \['x+[.]{3}, expected a text")), ids=str)
def test_a_value_of_another_type_is_refused(values, message):
    with pytest.raises(ValueError, match=f"^recipe.json: {message}") as caught:
        check_values(sample.Settings, values, "recipe.json")
    assert len(str(caught.value)) < 150
    assert "\n" not in str(caught.value)


def test_values_of_the_right_types_are_let_through():
    check_values(sample.Settings, {
        "n": 8, "temperature": 1, "top_p": 0.5, "batch": None, "model": "x", "seed": -1,
        "max_new_tokens": 2 ** 31 - 1})


def test_found_values_are_cut():
    assert shown("short") == "'short'"
    assert shown("a\nb") == r"'a\nb'"
    assert len(shown("x" * 500)) == 60
    assert shown("x" * 500).endswith("...")


@dataclasses.dataclass
class Few:
    """Settings of a script."""
    n: int = option(8, "a number")
    share: float | None = option(None, "a share")
    cosine: bool = option(False, "a flag")
    out: str | None = option(None, "a file")


@pytest.mark.parametrize("given, recipe, said", (
    ({}, {}, "all at their defaults"),
    ({"n": 8, "out": None}, {}, "all at their defaults"),  # given, but no other value
    ({"n": 4, "share": 1.0}, {}, "n 4, share 1.0"),
    ({"n": 4}, {"share": 0.5, "cosine": True}, "n 4; from x.json: share 0.5, cosine true"),
    ({}, {"n": 5, "cosine": False}, "from x.json: n 5"),
    ({"out": "a b\n"}, {}, r"out 'a b\n'"),
    ({"out": "runs/é"}, {}, "out runs/é")))
def test_the_settings_that_differ_are_said(given, recipe, said):
    assert describe(Few(**(recipe | given)), recipe, "x.json" if recipe else None) == said


def test_a_setting_says_its_default(capsys, monkeypatch):
    """--help names every flag, with its default where there is one."""
    status, out, _ = call_script(monkeypatch, capsys, sample, "--help")
    assert status == 0
    assert "python sample.py --model DIR" in out
    for text in ("--top-k", "--max-new-tokens", "0.6", "[8]", "--chat-format"):
        assert text in out
    _, own, rest = out.partition("what to sample:")
    own_flags, shared, shared_flags = rest.partition("the model and its sampling:")
    assert own and shared
    assert "--prompt" in own_flags and "--n N" in own_flags
    assert "--top-k" in shared_flags and "--prompt" not in shared_flags
    assert option(3, "text").metadata["help"] == "text"
    assert room.KEPT in "finished records are kept: the same command takes them up"


# ---------------------------------------------------------------------------------- really started


@pytest.fixture(scope="module")
def started(arguments):
    """(exit status, stdout, stderr) of two wrong and one good command line, run all at once."""
    words = {
        "good": arguments(),
        "no such directory": arguments(["--model", "none"]),
        "unknown flag": arguments(["--temprature", "1"])}
    running = {what: start_script("sample.py", line) for what, line in words.items()}
    results = {}
    for what, process in running.items():
        out, err = process.communicate(timeout=200)
        results[what] = (process.returncode, out, err)
    return results


@pytest.mark.parametrize("what", ("no such directory", "unknown flag"))
def test_the_script_fails_in_one_line(started, what):
    status, _, err = started[what]
    (line,) = err.splitlines()
    assert status == 2
    assert re.search(FLAGS[what][1], line)


def test_the_script_runs(started):
    """The same arguments without the mistake: both paths are shown, and the last line is the JSON
    that counts them."""
    status, out, err = started["good"]
    assert status == 0
    assert err == ""
    last = json.loads(out.splitlines()[-1])
    assert 0 < last["tokens"] <= 8
    assert last["peak_memory_bytes"] > 0
    assert last["seconds"] > 0
    assert last["tok_per_s"] > 0
    assert out.count("--- path ") == 2
