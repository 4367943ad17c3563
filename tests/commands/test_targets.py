"""Whoever names a pipe, a device or a folder as the file to write is told before the work begins,
and nothing is replaced. `--model none`: what looked at the model first would complain of that."""
import importlib
import os
import sys

import pytest
from helpers import ROOT, call_script

sys.path += [str(ROOT / "studies"), str(ROOT / "oracle")]
NO_MODEL = ["--model", "none"]

TARGETS = {  # the file to write -> (module, the words that name it; a folder for a file in one)
    "scores.jsonl": ("commands.stop", [*NO_MODEL, "--score", "none.jsonl", "--out"]),
    "run.html": ("commands.stop", [*NO_MODEL, "--prompt", "a", "--picture"]),
    "report.json": ("certify", [str(ROOT), "--json"]),
    "oracle.tar.gz": ("archive", ["--out"]),
    "page.md": ("walkthrough", ["--out"]),
    "drawing.svg": ("picture", [*NO_MODEL, "--out"]),
    "out/attention.html": ("attention", [*NO_MODEL, "--out"]),
    "out/guideline.json": ("guideline", [*NO_MODEL, "--out"]),
    "out/overhead.json": ("overhead", [*NO_MODEL, "--out"]),
    "out/figure4.csv": ("scaling", [*NO_MODEL, "--out"])}


def put_device(path):
    os.symlink("/dev/null", path)


@pytest.mark.parametrize("put, kind", (
    (os.mkfifo, "a pipe"), (os.mkdir, "a folder"), (put_device, "a device")))
@pytest.mark.parametrize("name", TARGETS)
def test_what_is_no_file_is_refused_before_the_work(
        tmp_path, monkeypatch, capsys, name, put, kind):
    module, words = TARGETS[name]
    script = importlib.import_module(module)
    file = tmp_path / name
    file.parent.mkdir(exist_ok=True)
    put(file)
    before = os.lstat(file)
    given = file if file.parent == tmp_path else file.parent
    if module == "certify":
        monkeypatch.setattr(sys, "argv", ["certify.py", *words, str(given)])
        status = script.main()
        err = capsys.readouterr().err
    else:
        status, _, err = call_script(monkeypatch, capsys, script, *words, given)
    assert (status, err) == (2, f"error: {file}: found {kind}, expected a file or none\n")
    after = os.lstat(file)
    assert (after.st_ino, after.st_mode) == (before.st_ino, before.st_mode)
