"""studies/walkthrough.py, and the README's Python: the six lines that define the method, and the
example that ends in an answer.

The page that is kept is made again and compared; the lines are taken out of README.md and run."""
import os
import re
import runpy
import subprocess
import sys

import pytest
import torch
from helpers import ROOT

sys.path.insert(0, str(ROOT / "studies"))
import walkthrough
from model import load
from sample import Path
from stop import Stop, best_paths

PAGE = ROOT / "studies" / "walkthrough.md"
README = ROOT / "README.md"
MARKER = "<!-- STOP in six lines: tests/studies/test_walkthrough.py runs this block -->"
EXAMPLE = "<!-- the library example: tests/studies/test_walkthrough.py runs this block -->"


def python_behind(marker):
    """The block of Python behind a marker in README.md."""
    block = re.compile(re.escape(marker) + r"\s*```python\n(.*?)```", re.DOTALL)
    (code,) = block.findall(README.read_text(encoding="utf-8"))
    return code


@pytest.fixture(scope="module")
def made():
    """The page as the script makes it now."""
    return walkthrough.walk_through(walkthrough.Settings())


def test_the_page_is_what_the_script_makes(made):
    """python studies/walkthrough.py --out studies/walkthrough.md writes it again."""
    assert made == PAGE.read_text(encoding="utf-8")


def test_what_the_page_claims_is_asserted():
    page = walkthrough.Page()
    page.claim(True, "one is one")
    with pytest.raises(AssertionError, match="one is two"):
        page.claim(False, "one is two")
    assert page.text() == "✓ one is one\n"


def test_the_page_goes_from_the_question_to_the_vote(made):
    headings = re.findall(r"^## (.*)$", made, re.MULTILINE)
    assert headings == [
        "The question x", "Launch", "Check", "What the prefixes were worth", "Resume", "Vote",
        "A path that ends before the checkpoint"]


@pytest.mark.parametrize("change", ["tokens", "lora", "head"])
def test_the_page_does_not_come_out_with_another_stop(monkeypatch, tmp_path, change):
    """Each of the three trained parts matters to what it shows."""
    model = load(str(ROOT / "toy"))
    stop = Stop.load(ROOT / "toy" / "stop", model)
    with torch.no_grad():
        for name, parameter in stop.named_parameters():
            if name.startswith(change):
                parameter.mul_(-1 if change == "head" else 0.1)
    stop.save(tmp_path / "stop")
    try:
        text = walkthrough.walk_through(walkthrough.Settings(stop=str(tmp_path / "stop")))
    except AssertionError:
        return
    assert text != PAGE.read_text(encoding="utf-8")


def test_the_readmes_six_lines_are_the_method(monkeypatch, tmp_path):
    """Their p is Stop.score's, and the paths that they keep are those that the check keeps."""
    code = python_behind(MARKER)
    method = code.rstrip().rpartition("\n\n")[2]
    assert len(method.splitlines()) == 6
    script = tmp_path / "six_lines.py"
    script.write_text(code, encoding="utf-8")
    monkeypatch.chdir(ROOT)
    names = runpy.run_path(str(script))
    prefixes = names["prefixes"].tolist()
    scores = names["stop"].score(names["model"], prefixes)
    torch.testing.assert_close(names["p"].detach(), scores, atol=1e-5, rtol=1e-5)
    paths = [Path([], index, score=score) for index, score in enumerate(scores.tolist())]
    kept, _ = best_paths(paths, len(names["kept"]))
    expected = sorted(path.score for path in kept)
    assert sorted(scores[names["kept"]].tolist()) == pytest.approx(expected)


def test_the_readmes_library_example_ends_in_the_answer_that_it_shows(tmp_path):
    """Run in a process of its own, from another directory: `toy` is found from there too."""
    code = python_behind(EXAMPLE)
    (shown,) = re.findall(r"print\(.*\)  # (.*)$", code, re.MULTILINE)
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"})
    assert (done.stdout, done.stderr) == (f"{shown}\n", "")
