"""commands/common.py: what a command does with the device that it is told, and from where it finds
the toy."""
import json
import os
import subprocess
import sys
import types

import pytest
import torch
from helpers import ROOT

from commands import common


class Reached(Exception):
    """The model would be loaded now."""


@pytest.mark.parametrize("device, expected", (
    ("cuda:1", ["cuda:1"]), ("cuda:0", ["cuda:0"]), ("cuda", []), ("cpu", [])))
def test_a_gpu_that_is_named_is_the_current_one(monkeypatch, device, expected):
    """Before anything is put there: streams, captures and workspaces go to the current one."""
    current = []

    def load(path, device, dtype):
        raise Reached

    monkeypatch.setattr(torch, "empty", lambda *sizes, device: None)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    monkeypatch.setattr(common, "load", load)
    settings = types.SimpleNamespace(
        model="it", device=device, dtype="bfloat16", attention=None, chat_format=None)
    with pytest.raises(Reached):
        common.open_model(settings)
    assert current == expected


@pytest.mark.parametrize("attention", ("sdpa", "Flash", "plain,flash"))
def test_an_unknown_attention_is_refused(attention):
    settings = types.SimpleNamespace(
        model="it", device="cpu", dtype="float32", attention=attention, chat_format=None)
    with pytest.raises(ValueError, match=f"attention: found '{attention}', expected plain or"):
        common.open_model(settings)


def test_the_toy_answers_from_another_directory(tmp_path):
    """Model, STOP and problems: by the default, and by their names."""
    named = ["--model", "toy", "--stop", "toy/stop"]
    for words in ([], named):
        done = subprocess.run(
            [sys.executable, ROOT / "stop.py", "--prompt", "Q : Tom has 5 pens . <nl>", "--n", "2",
             "--keep", "1", "--max-new-tokens", "44", "--device", "cpu", *words],
            cwd=tmp_path, capture_output=True, text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"})
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout.splitlines()[-1])["n"] == 2
    assert list(tmp_path.iterdir()) == []
