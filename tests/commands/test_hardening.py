"""What happens around a run: Ctrl-C, output that nobody takes, too little memory, a folder in
use, a plain locale; and what README says about Python."""
import importlib.metadata
import json
import os
import re
import resource
import signal
import subprocess
import sys
import time

import hostile
import pytest
from helpers import ROOT, run_script, start_script
from hostile import attempt

from engine import protocol
from plumbing.command_line import KEPT, NOTHING_KEPT
from plumbing.records import locked


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return hostile.write_world(tmp_path_factory.mktemp("hardening") / "it")


# ------------------------------------------------------------------------------- interruptions


def wait_for(condition, running, seconds=200):
    """Return as soon as the condition is true of a process that runs."""
    end = time.monotonic() + seconds
    while not condition():
        assert running.poll() is None and time.monotonic() < end
        time.sleep(0.005)


def test_an_interruption_while_the_imports_run_is_one_line():
    running = start_script("eval.py", ["--problems", "3"])
    maps = f"/proc/{running.pid}/maps"

    def imports_run():
        with open(maps) as file:
            return "libtorch" in file.read()

    wait_for(imports_run, running)
    running.send_signal(signal.SIGINT)
    _, err = running.communicate(timeout=100)
    assert (running.returncode, err) == (130, "interrupted; nothing was begun\n")


def test_an_interruption_of_a_run_says_what_is_kept(world, tmp_path):
    out = tmp_path / "out"
    words = ["--model", world, "--out", out, "--n", "60", "--max-new-tokens", "50",
             "--device", "cpu", "--dtype", "float32", "--batch", "2"]
    running = start_script("eval.py", words)
    wait_for(lambda: any(file.stat().st_size for file in out.glob("paths-*")), running)
    running.send_signal(signal.SIGINT)
    _, err = running.communicate(timeout=100)
    assert (running.returncode, err) == (130, f"interrupted; {KEPT}\n")
    assert not (out / "lock").exists()


@pytest.mark.parametrize("script", ("sample", "stop", "train", "eval"))
def test_a_run_that_has_finished_nothing_says_so(world, tmp_path, monkeypatch, script):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(hostile.SCRIPTS[script], "open_model", interrupted)
    words = ["--out", str(tmp_path)] if script in ("train", "eval") else []
    status, _, err = hostile.run(script, world, *words)
    assert (status, err) == (130, f"interrupted; {NOTHING_KEPT}\n")


def test_what_an_earlier_run_has_finished_is_kept(world, tmp_path, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    assert hostile.run("eval", world, "--out", str(tmp_path))[0] == 0
    monkeypatch.setattr(protocol, "evaluate", interrupted)
    status, _, err = hostile.run("eval", world, "--out", str(tmp_path))
    assert (status, err) == (130, f"interrupted; {KEPT}\n")


# -------------------------------------------------------------------------------------- output


SAMPLE = ["--prompt", "a b", "--n", "2", "--max-new-tokens", "4", "--device", "cpu"]


def shell(world, behind, words=(), **environment):
    """Run sample.py in a shell -> (status, stdout, stderr)."""
    command = [sys.executable, "sample.py", "--model", str(world), *SAMPLE, *words]
    done = subprocess.run(
        ["bash", "-c", f'"$@" {behind}', "bash", *command], cwd=ROOT, capture_output=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment)
    return done.returncode, done.stdout.decode(), done.stderr.decode()


def test_a_full_disk_behind_stdout_is_one_line(world):
    status, _, err = shell(world, "> /dev/full")
    (line,) = err.splitlines()
    assert status == 2 and line.startswith("error: ") and "No space left" in line


def test_a_reader_who_has_read_enough_is_no_error(world):
    _, out, err = shell(world, "| head -c 16")
    assert (out, err) == ("settings: model ", "")


def test_a_closed_stdout_is_no_error(world):
    assert shell(world, ">&-") == (0, "", "")


@pytest.mark.parametrize("words, status, printed", (
    ([], 0, True), (["--n", "0"], 2, False)))
def test_a_closed_stderr_changes_nothing_else(world, words, status, printed):
    found, out, err = shell(world, "2>&-", words)
    assert (found, err) == (status, "")
    assert out.splitlines()[-1].startswith('{"tokens": ') == printed


def test_a_locale_without_utf_8_loses_no_text(world):
    plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0",
             "PYTHONIOENCODING": "ascii"}
    status, out, err = shell(world, "", ["--prompt", "a é b"], **plain)
    assert (status, err) == (0, "")
    assert json.loads(out.splitlines()[-1])["tokens"] > 0
    assert out.isascii()


# -------------------------------------------------------------------------------------- memory


@pytest.mark.parametrize("script, words", (
    ("sample", ["--n", "40000", "--batch", "40000", "--max-new-tokens", "50"]),
    ("train", ["--rank", "500000"]), ("eval", ["--n", "60000", "--batch", "100000"])))
def test_too_little_memory_is_one_line(world, tmp_path, script, words):
    if script != "sample":
        words = [*words, "--out", str(tmp_path / "out")]
    before = resource.getrlimit(resource.RLIMIT_AS)
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 2 ** 24, before[1]))
    try:
        refused, line = attempt("memory", script, world, *words)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
    assert refused and ("out of memory" in line or "annot allocate memory" in line)


# ------------------------------------------------------------------------------ a folder in use


@pytest.mark.parametrize("script", ("train", "eval", "score"))
def test_a_folder_in_use_is_refused_and_left(world, tmp_path, script):
    out = tmp_path / "out"
    words = ["--out", str(out)]
    held = out
    out.mkdir()
    if script == "score":
        words = ["--out", str(out / "scored.jsonl")]
        held = out / "scored.jsonl"
    with locked(held):
        refused, line = attempt("in use", script, world, *words)
    assert refused and "another process is at work there" in line
    assert not list(out.iterdir())
    assert not attempt("free again", script, world, *words)[0]


def test_two_processes_of_torchrun_say_it_too(world, tmp_path):
    """The second process ends because the first did, which has said why."""
    with locked(tmp_path):
        status, _, err = run_script("train.py", ["--model", world, "--out", tmp_path], 2)
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert status != 0
    assert sum("another process is at work there" in line for line in lines) == 1
    assert "Traceback" not in err.partition("torch/distributed")[0]


@pytest.mark.parametrize("script", ["sample.py", "stop.py"])
def test_what_cannot_share_its_work_is_refused_under_torchrun(script):
    status, out, err = run_script(script, ["--prompt", "Q"], 2)
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert status != 0 and out == ""
    assert len(lines) == 1 and "torchrun: found 2 processes, expected 1" in lines[0]
    assert "Traceback" not in err.partition("torch/distributed")[0]


# -------------------------------------------------------------------------------------- README


def test_readme_names_the_oldest_python_that_the_pinned_packages_run_on():
    oldest = 0
    for line in (ROOT / "requirements.txt").read_text().splitlines():
        name, _, version = line.partition("==")
        if importlib.metadata.version(name).partition("+")[0] != version:
            pytest.skip(f"{name} {version} is not installed")
        needs = importlib.metadata.metadata(name)["Requires-Python"]
        oldest = max(oldest, int(re.match(r">=3\.(\d+)", needs)[1]))
    named = re.findall(r"Python 3\.(\d+)", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert {int(minor) for minor in named} == {oldest}
