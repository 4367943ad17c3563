"""A small world for hostile tests: a checkpoint of 24 words, its problems, a trained STOP, prefixes
to score; and the five scripts' entries, run in this process in fractions of a second."""
import contextlib
import io
import json
import sys

import tokenizers
from helpers import raw_config, write_checkpoint, write_lines

from commands import sample, stop, train
from commands import eval as evaluation

WORDS = ["<unk>", "<eos>", "\\boxed{0}", "\\boxed{1}", "\\boxed{2}", *"abcdefghijklmnopqrs"]
SCRIPTS = {"sample": sample, "stop": stop, "score": stop, "eval": evaluation, "train": train}
RECIPE = {
    "paths": 4, "low": 0, "high": 4, "prefix": "4,2", "prefixes": 2, "rollouts": 2,
    "max_new_tokens": 8, "m": 2, "rank": 2, "epochs": 2, "batch_size": 4, "accumulation": 2,
    "lr": 0.01, "validation": 0.4, "n": 4, "keep": 2, "batch": 8, "device": "cpu",
    "dtype": "float32"}
PLAIN = ["--device", "cpu", "--dtype", "float32", "--batch", "8", "--max-new-tokens", "8"]


def write_world(folder):
    """A checkpoint with tokenizer, recipe, problems, prefixes and a trained STOP."""
    raw = raw_config(
        "qwen2", vocab_size=len(WORDS), hidden_size=16, intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=64, eos_token_id=1)
    write_checkpoint(folder, raw)
    vocab = {word: number for number, word in enumerate(WORDS)}
    library = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, "<unk>"))
    library.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    library.save(str(folder / "tokenizer.json"))
    (folder / "recipe.json").write_text(json.dumps(RECIPE))
    for name, letters in (("train", "abcde"), ("test", "fgh")):
        problems = []
        for name_of_one, other in zip(letters, "mnomn"):
            problems.append({
                "problem": f"{name_of_one} {other}", "answer": "1", "id": name_of_one})
        write_lines(folder / f"{name}.jsonl", problems)
    records = [{"prefix_token_ids": list(range(5, 7 + i)), "soft_label": i / 8, "id": f"p{i // 2}"}
               for i in range(8)]
    write_lines(folder / "prefixes.jsonl", records)
    status, _, err = run("train", folder, "--out", str(folder.parent / "made"))
    assert status == 0, err
    (folder.parent / "made" / "stop").rename(folder / "stop")
    return folder


def words_of(script, folder):
    """The command line of a small, good run of a script, where flags may be added behind."""
    return {
        "sample": ["--prompt", "a b c", "--n", "3", *PLAIN],
        "stop": ["--prompt", "a b c", "--n", "4", "--keep", "2", "--prefix", "4", *PLAIN],
        "score": ["--score", str(folder / "prefixes.jsonl"), "--device", "cpu", "--batch", "3"],
        "eval": ["--n", "4", "--keep", "2", *PLAIN],
        "train": [],
    }[script]


def run(script, folder, *words):
    """A script's entry with the command line of a good run and more words -> (status, stdout,
    stderr). An error that is not one of the program's own lines comes through as it is."""
    module = SCRIPTS[script]
    before = sys.argv
    sys.argv = [f"{script}.py", "--model", str(folder), *words_of(script, folder), *words]
    out = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    err = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    status = 0
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            module.main()
    except SystemExit as error:
        status = error.code
    finally:
        sys.argv = before
    texts = []
    for stream in (out, err):
        stream.flush()
        texts.append(stream.buffer.getvalue().decode())
    return status, *texts


def attempt(label, script, folder, *words):
    """Run a script on input that may be bad -> (whether it was refused, its line). AssertionError
    with the label unless it ends in a result without NaN, or with status 2 and one line."""
    try:
        status, out, err = run(script, folder, *map(str, words))
    except Exception as error:
        raise AssertionError(f"{label}: {type(error).__name__}: {error}") from error
    if status == 0:
        json.loads(out.splitlines()[-1], parse_constant=no_number)
        return False, ""
    lines = err.splitlines()
    found = f"{label}: status {status}, {err[:2000]}"
    assert status == 2 and len(lines) == 1 and lines[0].startswith("error: "), found
    assert len(lines[0]) < 1200 and lines[0].isprintable(), found
    return True, lines[0]


def no_number(name):
    raise AssertionError(f"found {name} in a result")
