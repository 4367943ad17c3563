"""toy/make.py as it is typed: what it refuses, and what it leaves behind."""
import importlib.util
import json
import pathlib
import sys

import pytest
import torch
from helpers import ROOT

from plumbing.command_line import command_line


@pytest.fixture(scope="module")
def make():
    spec = importlib.util.spec_from_file_location("toy_make_script", ROOT / "toy" / "make.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def run(make, monkeypatch, capsys):
    """A function that runs make.py as if typed: (exit status, lines of stdout, lines of stderr)."""
    def run_make(*argv):
        threads = torch.get_num_threads()
        monkeypatch.setattr("sys.argv", ["make.py", *map(str, argv), "--threads", "1"])
        status = 0
        try:
            command_line(make.Settings, make.main)
        except SystemExit as ended:
            status = ended.code
        torch.set_num_threads(threads)
        captured = capsys.readouterr()
        return status, captured.out.splitlines(), captured.err.splitlines()

    return run_make


def untrained(*arguments):
    """In the place of pretrain: the model stays as it is."""
    return 0.0


NUMBERS = (
    "train", "test", "easy-tokens", "easy-lr", "real-tokens", "real-lr", "batch-tokens", "warmup",
    "clip")


@pytest.mark.parametrize("value", (0, -1))
@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_of_0_or_below_are_refused(make, tmp_path, monkeypatch, run, name, value):
    """In one line, and before anything is made."""
    monkeypatch.setattr(make, "pretrain", None)
    status, _, err = run(f"--{name}", value, "--out", tmp_path / "out")
    assert status == 2
    assert len(err) == 1
    assert err[0].startswith(f"error: {name.replace('-', '_')}: found {value}")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name, value", (
    ("measure", -1), ("weight-decay", -0.5), ("batch-tokens", 511)))
def test_numbers_below_their_least_are_refused(make, tmp_path, monkeypatch, run, name, value):
    monkeypatch.setattr(make, "pretrain", None)
    status, _, err = run(f"--{name}", value, "--out", tmp_path / "out")
    assert status == 2
    assert len(err) == 1
    assert f"found {value}, expected at least" in err[0]


def test_the_folder_is_tried_before_training(make, tmp_path, monkeypatch, run):
    monkeypatch.setattr(make, "pretrain", None)
    (tmp_path / "file").write_text("")
    status, _, err = run("--out", tmp_path / "file" / "below")
    assert status == 2
    assert len(err) == 1
    assert "Not a directory" in err[0]


def test_a_full_disk_is_one_line_and_leaves_nothing(make, tmp_path, monkeypatch, run):
    def no_space(path, content):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(make, "pretrain", untrained)
    monkeypatch.setattr(pathlib.Path, "write_bytes", no_space)
    status, _, err = run("--out", tmp_path, "--train", 2, "--test", 2)
    assert status == 2
    assert len(err) == 1
    assert "No space left on device" in err[0]
    assert not list(tmp_path.iterdir())


def test_what_it_writes(make, tmp_path, monkeypatch, run):
    """All files and no other; the checkpoint is measured as it was stored."""
    monkeypatch.setattr(make, "pretrain", untrained)
    status, out, err = run(
        "--out", tmp_path / "new", "--train", 3, "--test", 2, "--measure", 1, "--seed", 5)
    assert status == 0, err
    names = {path.name for path in (tmp_path / "new").iterdir()}
    assert names == {
        "config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json",
        "model.safetensors", "train.jsonl", "test.jsonl"}
    lines = (tmp_path / "new" / "train.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert [record["id"] for record in records] == [f"toy-train-000{i}" for i in (1, 2, 3)]
    last = json.loads(out[-1])
    assert last["problems"] == 1
    assert last["paths"] == 32


def test_a_loss_that_is_no_number_ends_the_run(make, tmp_path, run):
    status, _, err = run(
        "--out", tmp_path, "--train", 2, "--test", 2, "--easy-lr", 1e18, "--easy-tokens", 9000,
        "--warmup", 1)
    assert status == 2
    assert "error: easy: the loss of step" in err[-1]
    assert not list(tmp_path.iterdir())
