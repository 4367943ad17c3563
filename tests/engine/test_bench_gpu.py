"""A dry run of tests/bench_gpu.py: every part that needs no GPU, at small sizes on the CPU. Each
writes figures, in its own file, and none of them fails."""
import json
import math
import subprocess
import sys

import pytest
from helpers import ROOT

PARTS = ("attention", "two-runs", "waits", "soak", "bandwidth", "decode", "prefill", "check",
         "refill", "fit", "gpt-oss")


def run(out, *words):
    return subprocess.run(
        [sys.executable, "tests/bench_gpu.py", "--out", str(out), *words], cwd=ROOT,
        capture_output=True, text=True, env={"PATH": "", "OMP_NUM_THREADS": "1"})  # without git


def numbers_of(figures):
    for value in figures.values():
        if isinstance(value, dict):
            yield from numbers_of(value)
        elif type(value) in (int, float):
            yield value


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    out = tmp_path_factory.mktemp("bench")
    done = run(out, "--tiny", "--device", "cpu", "--parts", ",".join(PARTS))
    assert done.returncode == 0, done.stderr
    return out


@pytest.mark.parametrize("part", PARTS)
def test_a_part_writes_its_figures(bench, part):
    figures = json.loads((bench / f"{part}.json").read_text())
    assert "failed" not in figures, figures
    numbers = list(numbers_of(figures))
    assert numbers and all(math.isfinite(number) for number in numbers)


def test_what_it_was_measured_on_is_said_without_git(bench):
    about = json.loads((bench / "about.json").read_text())
    assert about["commit"] is None
    assert about["torch"] and about["python"]


def test_two_runs_are_alike(bench):
    figures = json.loads((bench / "two-runs.json").read_text())
    assert figures["again"] is True


def test_parts_that_are_not_there_and_a_gpu_that_is_not_are_refused(tmp_path):
    done = run(tmp_path, "--device", "cpu", "--parts", "decode,colour")
    assert done.returncode == 2
    assert "parts: found 'colour'" in done.stderr
    done = run(tmp_path)
    assert (done.returncode, done.stderr) == (2, "error: no GPU was found: nothing to measure\n")
