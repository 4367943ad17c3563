"""Hostile input by the hundred, drawn by a seed: flags, recipes, configs, STOP files, tensors,
problem files, labels, and what lies in a run's folder.

Whatever comes in, a script ends in one of two ways: with a result that holds no NaN, or with
status 2 and one line. Flags, settings and keys are taken from the dataclasses and from the files
themselves, so that the next one is covered without anybody thinking of it.
"""
import dataclasses
import json
import random
import shutil

import hostile
import pytest
import torch
from hostile import SCRIPTS, attempt
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from commands import train as train_command
from plumbing.command_line import value_type

# What no setting of a type may be, as a flag and as JSON.
BAD_FLAGS = {
    int: ["", "x", "1.5", "nan", "9" * 400, "9" * 5000, str(2 ** 64), "0x10", "1e3", "\udcff"],
    float: ["", "x", "nan", "inf", "-inf", "1e400", "-1e30", "9" * 400, "0,5", "\udcff"],
    str: [""]}
BAD_VALUES = {
    int: ["true", "0.5", "4.0", "1e3", '"4"', "[]", "{}", "NaN", "-Infinity", "9" * 400,
          str(2 ** 64), "[1]", '"a\\nb"', '"\\ud800"'],
    float: ["true", '"4"', '"nan"', "[]", "{}", "NaN", "Infinity", "1e400", "9" * 400, "[0.5]"],
    bool: ["0", "1", '"true"', "[]", "0.5", "{}"],
    str: ["true", "0.5", "[]", "{}", "NaN", '""', '"a\\u0000b"', '["a"]']}
# Values that a key of a file may or may not take: the outcome is open, its form is not.
JUNK = [
    "null", "true", "-1", "0", "0.5", "NaN", "-Infinity", "1e400", '""', '"x"', "[]", "{}", "[1]",
    "[null]", '{"a": 1}', "9" * 400, "9" * 5000, '"a\\nb"', '"\\u0000"', '"\\ud800"', "[1, 2, 3]",
    '"' + "x" * 3000 + '"', "2147483648", "-0.0"]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return hostile.write_world(tmp_path_factory.mktemp("fuzz") / "it")


@pytest.fixture
def copy(world, tmp_path):
    """A copy of the world that may be damaged."""
    return shutil.copytree(world, tmp_path / "copy")


@pytest.fixture
def draw(request):
    """Random numbers of this test alone."""
    return random.Random(request.node.name)


def out_flags(script, folder):
    """The flags that keep a script's files in `folder`."""
    return ["--out", str(folder)] if script in ("eval", "train") else []


# ------------------------------------------------------------------------- flags and the recipe


@pytest.mark.parametrize("script", SCRIPTS)
def test_no_flag_takes_what_its_type_cannot_be(world, tmp_path, draw, script):
    out = tmp_path / "out"
    for field in dataclasses.fields(SCRIPTS[script].Settings):
        kind = value_type(field)
        if kind is bool or field.name in ("model", "targets"):
            continue
        flag = "--" + field.name.replace("_", "-")
        for value in draw.sample(BAD_FLAGS[kind], min(4, len(BAD_FLAGS[kind]))):
            words = [*out_flags(script, out), f"{flag}={value}"]
            refused, line = attempt((flag, value), script, world, *words)
            assert refused, f"{flag} {value[:40]!r} was taken"
            assert field.name in line.replace("-", "_"), line
    assert not out.exists()


@pytest.mark.parametrize("script, words", (
    ("sample", ["--n", "0"]), ("sample", ["--n", "2147483647"]), ("sample", ["--batch", "0"]),
    ("sample", ["--seed", str(2 ** 64)]), ("sample", ["--device", "meta"]),
    ("sample", ["--device", "cuda:99"]), ("sample", ["--device", "cpu:7"]),
    ("sample", ["--dtype", "int8"]), ("sample", ["--prompt", "\udcff\udcfe"]),
    ("sample", ["--prompt", "\ud800"]), ("sample", ["--chat-format", "llama"]),
    ("sample", ["--max-new-tokens", "2147483647"]), ("sample", ["--no-such-flag"]),
    ("stop", ["--kind", "chioce"]), ("stop", ["--keep", "9"]), ("stop", ["--prefix", "0"]),
    ("stop", ["--cascade", "4:2,3:1"]), ("stop", ["--cascade", "4:2x0"]),
    ("stop", ["--branch", "0"]), ("score", ["--cascade", "4"]),
    ("score", ["--prompt", "a"]), ("score", ["--score", "none"]),
    ("eval", ["--judge-aggregate", "sum"]), ("eval", ["--window", "0"]), ("eval", ["--keep", "5"]),
    ("eval", ["--stop", "none"]), ("eval", ["--data", "none.jsonl"]),
    ("train", ["--prefix", "40,40"]), ("train", ["--prefix", "8"]), ("train", ["--clip", "-1"]),
    ("train", ["--m", "60"]), ("train", ["--head", "linear"]), ("train", ["--problems", "1"]),
    ("train", ["--targets", "q_proj,router"]), ("train", ["--lr", "0"]),
    ("train", ["--paths", "2147483647"]), ("train", ["--rollouts", "2147483647"]),
    ("train", ["--n", "2147483647"]), ("train", ["--labels", "none.jsonl"])), ids=str)
def test_a_value_out_of_range_is_refused_before_anything_is_written(world, tmp_path, script, words):
    out = tmp_path / "out"
    refused, _ = attempt(words, script, world, *out_flags(script, out), *words)
    assert refused
    assert not out.exists() or not any(out.iterdir())


@pytest.mark.parametrize("share", (-0.5, 0, 1.5))
def test_a_share_of_paths_is_no_more_than_all_and_more_than_none(world, share):
    words = ["--retention", share]
    assert attempt(words, "stop", world, *words)[0]


def with_key(record, key, value):
    """A JSON object as text, in which a key has a value that is JSON already."""
    rest = {name: other for name, other in record.items() if name != key}
    head = json.dumps(rest)[:-1]
    return f"{head}{', ' if rest else ''}{json.dumps(key)}: {value}}}"


def test_no_recipe_takes_what_a_setting_cannot_be(copy, tmp_path, draw):
    """Refused by the recipe's name and the key's, before a line of the run is written."""
    file = copy / "recipe.json"
    recipe = json.loads(file.read_text())
    out = tmp_path / "out"
    for field in dataclasses.fields(train_command.Settings):
        values = [*draw.sample(BAD_VALUES[value_type(field)], 3)]
        if value_type(field) in (int, float) and field.name not in ("seed", "temperature"):
            values.append("-1")
        for value in values:
            if field.name == "targets" and value == '""' or field.name == "out":
                continue
            file.write_text(with_key(recipe, field.name, value))
            refused, line = attempt((field.name, value), "train", copy, "--out", out)
            assert refused, f"{field.name}: {value[:40]} was taken"
            assert "recipe.json" in line and field.name in line.replace("-", "_"), line
    for key in ("no_such_key", "a\nb", "", "x" * 500):
        file.write_text(with_key(recipe, key, "1"))
        refused, line = attempt(key, "train", copy, "--out", out)
        assert refused and "recipe.json" in line
    assert not out.exists()


# ----------------------------------------------------------------------------- files of a model


def keys_of(value, before=()):
    """Every path of keys in nested objects."""
    found = []
    if isinstance(value, dict):
        for key, inner in value.items():
            found += [before + (key,), *keys_of(inner, before + (key,))]
    return found


def put(text, keys, value):
    """The text of a JSON file in which the value under `keys` is another, JSON already."""
    whole = json.loads(text)
    inner = whole
    for key in keys[:-1]:
        inner = inner[key]
    inner[keys[-1]] = "@@"
    return json.dumps(whole).replace('"@@"', value)


def damage(content, draw):
    """(what was done, bytes to which it was done)."""
    how = draw.choice(("flip", "cut", "insert", "repeat", "zeros", "empty"))
    place = draw.randrange(len(content))
    changed = bytearray(content)
    if how == "flip":
        changed[place] ^= 1 << draw.randrange(8)
    elif how == "cut":
        del changed[place:]
    elif how == "insert":
        odd = (b"\xff", b"\0", b'"', b"{", b"NaN", b"\xed\xa0\x80", b"\r")
        changed[place:place] = draw.choice(odd)
    elif how == "repeat":
        changed[place:place] = changed[place:place + 40]
    elif how == "zeros":
        changed = bytes(len(content))
    else:
        changed = b""
    return f"{how} at {place}", bytes(changed)


JSON_FILES = {  # file -> (script that reads it, keys that it does not hold)
    "config.json": ("sample", ("eos_token_id", "rope_scaling", "rope_parameters", "layer_types",
                               "quantization_config", "logit_softcap", "a\nb")),
    "generation_config.json": ("sample", ("eos_token_id",)),
    "tokenizer_config.json": ("sample", ("chat_template", "bos_token")),
    "tokenizer.json": ("sample", ("normalizer", "truncation", "padding")),
    "recipe.json": ("train", ()),
    "stop/stop.json": ("score", ("digest",)),
}


@pytest.mark.parametrize("name", JSON_FILES)
def test_a_json_file_of_anything(copy, tmp_path, draw, name):
    file = copy / name
    script, more_keys = JSON_FILES[name]
    if not file.exists():
        file.write_text("{}")
    good = file.read_text()
    keys = [*keys_of(json.loads(good)), *((key,) for key in more_keys)]
    cases = [(key, value) for key in keys for value in JUNK]
    for key, value in draw.sample(cases, min(35, len(cases))):
        file.write_text(put(good, key, value))
        attempt((key, value), script, copy, *out_flags(script, tmp_path / "out"), "--device", "cpu")
    for _ in range(10):
        what, content = damage(good.encode(), draw)
        file.write_bytes(content)
        attempt(what, script, copy, *out_flags(script, tmp_path / "out"), "--device", "cpu")
    file.unlink()
    file.mkdir()
    refused, _ = attempt("a folder", script, copy, *out_flags(script, tmp_path / "out"))
    assert refused, f"a folder in the place of {name} was passed over"


def objects_of(value, before=()):
    """Every path of keys and places that leads to an object which is not empty."""
    found = []
    if isinstance(value, dict):
        found = [before] if value else []
    for place, inner in value.items() if isinstance(value, dict) else enumerate(value):
        if isinstance(inner, (dict, list)):
            found += objects_of(inner, before + (place,))
    return found


def with_a_key_twice(text, place, draw):
    """(the key, the text of a JSON value in which the object at `place` has that key twice)."""
    whole = json.loads(text)
    inner = whole
    for key in place:
        inner = inner[key]
    key = draw.choice(sorted(inner))
    inner["@@"] = draw.choice((inner[key], None, 7))
    return key, json.dumps(whole).replace('"@@"', json.dumps(key))


READERS_OF_JSON = {  # file -> the script that reads it
    **{name: script for name, (script, _) in JSON_FILES.items()},
    "model.safetensors.index.json": "sample", "model.safetensors": "sample",
    "stop/stop.safetensors": "score", "prefixes.jsonl": "score", "test.jsonl": "eval"}


def json_in(name, content):
    """(what comes before, the first JSON value, what comes behind) of a file's bytes."""
    if name.endswith(".safetensors"):
        end = 8 + int.from_bytes(content[:8], "little")
        return content[:8], content[8:end], content[end:]
    if name.endswith(".jsonl"):
        first, _, rest = content.partition(b"\n")
        return b"", first, b"\n" + rest
    return b"", content, b""


@pytest.mark.parametrize("name", READERS_OF_JSON)
def test_a_key_that_stands_twice_is_refused_at_any_depth(copy, tmp_path, draw, name):
    file = copy / name
    if name == "model.safetensors.index.json":
        (copy / "model.safetensors").rename(copy / "one.safetensors")
        names = load_file(copy / "one.safetensors")
        file.write_text(json.dumps({"weight_map": dict.fromkeys(names, "one.safetensors")}))
    if not file.exists():
        file.write_text('{"chat_template": null, "a": {"b": 1}}')
    before, good, behind = json_in(name, file.read_bytes())
    places = objects_of(json.loads(good))
    for place in draw.sample(places, min(6, len(places))):
        key, text = with_a_key_twice(good, place, draw)
        changed = text.encode()
        if before:  # of safetensors: the header's length
            before = len(changed).to_bytes(8, "little")
        file.write_bytes(before + changed + behind)
        script = READERS_OF_JSON[name]
        refused, line = attempt((place, key), script, copy, *out_flags(script, tmp_path / "out"))
        assert refused and name in line, f"{place}: {key}: {line}"
        assert f"{key!r}: found this key twice" in line, f"{place}: {line}"


@pytest.mark.parametrize("value", ("null", "7", '"x"', "[]", '{"prefix": 0}', '{"prefix": "4,"}',
                                   '{"prefix": true}', '{"max_new_tokens": -1}',
                                   '{"max_new_tokens": "8"}', '{"max_new_tokens": 1e3}'))
def test_what_a_stop_was_trained_with_is_checked_where_it_is_read(copy, value):
    file = copy / "stop" / "stop.json"
    file.write_text(put(file.read_text(), ("trained", "settings"), value))
    refused, line = attempt(value, "score", copy)
    assert refused == (value != "null"), value
    assert not refused or "stop.json" in line


def spoil(tensors, draw):
    """Spoil one of {name: tensor} beyond use -> what was done."""
    name = draw.choice(sorted(tensors))
    tensor = tensors[name]
    how = draw.choice(("nan", "inf", "-inf", "int8", "bool", "shape", "drop", "add", "rename"))
    if how in ("nan", "inf", "-inf"):
        tensor.view(-1)[draw.randrange(tensor.numel())] = float(how)
    elif how in ("int8", "bool"):
        tensors[name] = tensor.to(getattr(torch, how))
    elif how == "shape":
        tensors[name] = tensor[None].contiguous()
    elif how == "drop":
        del tensors[name]
    elif how == "add":
        tensors[name + ".x\n"] = torch.ones(2)
    else:
        tensors[name.upper()] = tensors.pop(name)
    return f"{how} {name}"


@pytest.mark.parametrize("name, script", (
    ("model.safetensors", "sample"), ("stop/stop.safetensors", "score")))
def test_spoilt_tensors_are_refused_by_name(copy, draw, name, script):
    file = copy / name
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    for _ in range(25):
        tensors = load_file(file)
        tensors = {key: tensor.clone() for key, tensor in tensors.items()}
        good = {key: tensor.clone() for key, tensor in tensors.items()}
        what = spoil(tensors, draw)
        save_file(tensors, file, metadata)
        refused, line = attempt(what, script, copy)
        assert refused, what
        assert what.split()[1] in line or name.split("/")[-1] in line, f"{what}: {line}"
        save_file(good, file, metadata)


def test_a_damaged_stop_is_never_loaded(copy, draw):
    """One flipped bit is enough; of the base model no digest is known."""
    for name in ("stop/stop.safetensors", "model.safetensors"):
        file = copy / name
        good = file.read_bytes()
        for _ in range(25):
            what, content = damage(good, draw)
            file.write_bytes(content)
            refused, _ = attempt((name, what), "score", copy)
            assert refused or name[0] == "m" or content == good, f"{name}: {what}"
        file.write_bytes(good)


# -------------------------------------------------------------------------- problems and labels


@pytest.mark.parametrize("name, script, flag", (
    ("test.jsonl", "eval", "--data"), ("train.jsonl", "train", "--data"),
    ("prefixes.jsonl", "score", "--score"), ("prefixes.jsonl", "train", "--labels")))
def test_records_of_anything(copy, tmp_path, draw, name, script, flag):
    """The outcome is open; what was refused is blamed on the file, and nothing was written."""
    file = copy / name
    good = file.read_text()
    lines = good.splitlines()
    keys = [*json.loads(lines[0]), "options", "checkpoint", "answer"]
    for number in range(40):
        changed = list(lines)
        place = draw.randrange(len(lines))
        key = draw.choice(keys)
        value = draw.choice(JUNK)
        changed[place] = with_key(json.loads(lines[place]), key, value)
        content = ("\n".join(changed) + "\n").encode()
        what = (key, value)
        if number % 4 == 0:
            what, content = damage(good.encode(), draw)
        file.write_bytes(content)
        out = tmp_path / f"out{number}"
        refused, line = attempt(what, script, copy, flag, file, *out_flags(script, out))
        if refused:
            assert name in line or "labels: found 1 problem" in line, f"{what}: {line}"
            assert not list(out.rglob("*")) or "labels: found" in line, f"{what}: {line}"


# --------------------------------------------------------------------------------- a run's folder


def flags_for(script, folder):
    if script == "score":
        return ["--out", str(folder / "scored.jsonl"), "--trace", str(folder / "traces")]
    return ["--out", str(folder)]


def files_of(folder):
    """{name: content} of the files that a later run reads."""
    found = {}
    for file in sorted(folder.rglob("*")):
        if file.is_file() and file.name != "report.json":
            found[str(file.relative_to(folder))] = file.read_bytes()
    return found


def change_lines(content, draw):
    """What somebody may do to a file of lines -> (what, the new content)."""
    lines = content.splitlines(True)
    how = draw.choice(("swap", "double", "remove", "edit"))
    place = draw.randrange(len(lines))
    if how == "swap":
        draw.shuffle(lines)
    elif how == "double":
        lines.insert(draw.randrange(len(lines)), lines[place])
    elif how == "remove":
        del lines[place]
    else:
        digits = [i for i, byte in enumerate(lines[place]) if chr(byte).isdigit()]
        edited = bytearray(lines[place])
        at = draw.choice(digits)
        edited[at] = ord("7") if edited[at] != ord("7") else ord("3")
        lines[place] = bytes(edited)
    return f"{how} at line {place + 1}", b"".join(lines)


def harms(name, content, draw, count):
    """Yield (what, the new content) of harms to a file: of lines always a torn last one, which is
    made again, and one with another seal, which is refused; whatever is drawn, both are seen."""
    if not name.endswith("jsonl"):
        for _ in range(count):
            yield damage(content, draw)
        return
    yield "torn", content[:-2]
    yield "another seal", content.replace(b'"seal": "', b'"seal": "0', 1)
    for number in range(4):
        yield (change_lines if number % 2 else damage)(content, draw)


@pytest.mark.parametrize("script", ("train", "eval", "score"))
def test_a_runs_folder_is_believed_only_where_it_is_as_the_run_left_it(
        world, tmp_path, draw, script):
    """Started again over a damaged folder, a run either says so or leaves the right bytes."""
    out = tmp_path / "out"
    out.mkdir()
    words = flags_for(script, out)
    assert attempt("first", script, world, *words) == (False, "")
    good = files_of(out)
    seen = set()
    for name, content in good.items():
        for what, changed in harms(name, content, draw, 1 if script == "score" else 6):
            (out / name).write_bytes(changed)
            refused, line = attempt((name, what), script, world, *words)
            seen.add(refused)
            if refused:
                assert str(out) in line, line
            else:
                assert files_of(out) == good, f"{name}: {what}: taken as it was"
            for other, right in good.items():
                (out / other).write_bytes(right)
    assert seen == {True, False}


def test_a_folder_is_that_of_one_model_one_stop_and_one_input(world, copy, tmp_path):
    """Same names, other content: weights, the STOP, problems, prefixes."""
    tensors = load_file(copy / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"] * 1.5
    for script in ("train", "score"):
        out = tmp_path / script
        out.mkdir()
        assert not attempt("first", script, copy, *flags_for(script, out))[0]
    (copy / "prefixes.jsonl").rename(copy / "old.jsonl")
    lines = (copy / "old.jsonl").read_text().splitlines(True)
    (copy / "prefixes.jsonl").write_text("".join(lines[1:]))
    refused, line = attempt("prefixes", "score", copy, *flags_for("score", tmp_path / "score"))
    assert refused and "scored.jsonl:1" in line
    (copy / "old.jsonl").rename(copy / "prefixes.jsonl")
    refused, _ = attempt(
        "head", "train", copy, "--head", "softmax", *flags_for("train", tmp_path / "train"))
    assert refused
    save_file(tensors, copy / "model.safetensors")
    refused, line = attempt("weights", "train", copy, *flags_for("train", tmp_path / "train"))
    assert refused and "the model's weights differ" in line
    refused, line = attempt("weights", "score", copy, *flags_for("score", tmp_path / "score"))
    assert refused and "scored.jsonl:1" in line


# ---------------------------------------------------------------------------------------- numbers


@pytest.mark.parametrize("words", (
    ["--lr", "1e15"], ["--lr", "1e19", "--head", "softmax"], ["--lr", "1e12", "--alpha", "1e15"]))
def test_a_fit_that_diverges_saves_no_nan(world, tmp_path, words):
    out = tmp_path / "out"
    attempt(words, "train", world, "--out", out, "--epochs", "4", *words)
    for file in out.rglob("*.safetensors"):
        for tensor in load_file(file).values():
            assert torch.isfinite(tensor).all()
    for file in out.rglob("*.json*"):
        assert b"NaN" not in file.read_bytes() and b"Infinity" not in file.read_bytes()


@pytest.mark.parametrize("script", ("sample", "stop", "score", "eval"))
def test_an_overflow_in_float16_is_one_line(copy, tmp_path, script):
    """The weights fit float16; what they give does not."""
    tensors = load_file(copy / "model.safetensors")
    for name in tensors:
        if "embed" in name or "down_proj" in name or "lm_head" in name:
            tensors[name] = tensors[name] * 1e4
    save_file(tensors, copy / "model.safetensors")
    words = [*out_flags(script, tmp_path / "out"), "--dtype", "float16"]
    refused, line = attempt(script, script, copy, *words)
    assert refused and "NaN or infinity" in line
