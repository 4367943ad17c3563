"""What a run says and looks at before it works, and that a flag which would do nothing is refused:
the scripts' entries, in this process, on the small world of hostile.py."""
import json
import math
import os
import resource
import shutil
import sys

import hostile
import huggingface_hub
import pytest
import torch
from helpers import random_model, random_stop

from commands import common
from commands import stop as stop_command
from commands import train as train_command
from engine.fit import Prefixes, validate
from engine.refill import Batch
from engine.stored import stop_digest
from model import load
from plumbing.budget_plan import BudgetPlan, Stage, write_plans
from plumbing.problems import ASK_FOR_LETTER, Problem, instruction
from plumbing.tokenizer import Tokenizer
from sample import Path, Sampling
from stop import Stop
from train import Example

EXPECTED = {"tokens": 60.0, "avg": 0.5, "cons": 0.5, "weighted": 0.5, "pass": 0.9}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return hostile.write_world(tmp_path_factory.mktemp("runs") / "it")


def refused(script, world, *words):
    """The line with which a script refuses a command line."""
    status, out, err = hostile.run(script, world, *map(str, words))
    (line,) = err.splitlines()
    assert status == 2 and line.startswith("error: "), (status, out, err)
    return line.removeprefix("error: ")


# ------------------------------------------------------------------------------------- the picture


def forbidden(*_, **__):
    raise AssertionError("paths were decoded for nothing")


@pytest.mark.parametrize("what", ("a folder", "no folder", "a long name", "a pipe", "a name alone"))
def test_a_picture_that_cannot_be_written_is_refused_before_anything_is_decoded(
        world, tmp_path, monkeypatch, what):
    file = {
        "a folder": tmp_path / "folder.svg", "no folder": tmp_path / "none" / "x.svg",
        "a long name": tmp_path / ("x" * 241 + ".svg"), "a pipe": tmp_path / "pipe.html",
        "a name alone": "x" * 300 + ".html"}[what]
    if what == "a folder":
        file.mkdir()
    if what == "a pipe":
        os.mkfifo(file)
    monkeypatch.setattr(stop_command, "open_model", forbidden)
    before = sorted(tmp_path.iterdir())
    assert str(file)[:30] in refused("stop", world, "--picture", file)
    assert sorted(tmp_path.iterdir()) == before


def test_a_disk_that_is_full_behind_the_run_loses_no_answer(world, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(stop_command.picture, "write", full)
    status, out, err = hostile.run("stop", world, "--picture", str(tmp_path / "x.svg"))
    assert status == 2 and err.startswith("error: [Errno 28] No space left on device")
    assert "path " in out and "answer by score: " in out.splitlines()[-1]


def test_the_picture_comes_before_the_last_line(world, tmp_path):
    file = tmp_path / "x.svg"
    status, out, _ = hostile.run("stop", world, "--picture", str(file))
    lines = out.splitlines()
    assert status == 0 and file.is_file()
    assert lines[-2] == f"wrote {file}" and json.loads(lines[-1])["n"] == 4


# ------------------------------------------------------------------------------- plans and budgets


@pytest.fixture
def planned(world, tmp_path):
    """A folder with the world's STOP and a plan.json for it."""
    folder = tmp_path / "stop"
    shutil.copytree(world / "stop", folder)
    digits = stop_digest(Stop.load(folder, load(world)))
    chosen = {"temperature": 0.6, "top_k": 40, "top_p": 0.95}
    write_plans(folder, digits, chosen, [BudgetPlan(60, 8, (Stage(3, 4), Stage(7, 2)), EXPECTED)])
    return folder


# The world's good command line without what a plan brings itself
BUDGET = ["--prompt", "a b c", "--device", "cpu", "--dtype", "float32"]


def stop_run(world, *words):
    """stop.py on the world, with these words alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hostile, "words_of", lambda script, folder: [])
        return hostile.run("stop", world, *map(str, words))


def test_a_plan_that_does_not_fit_the_limit_is_named(world, planned):
    status, _, err = stop_run(
        world, *BUDGET, "--stop", planned, "--budget", 70, "--max-new-tokens", 5)
    assert status == 2
    assert err == (f"error: {planned / 'plan.json'}: the plan for 60 tokens: prefix: found 7, "
                   "expected 4 to 4, less than the 5 new tokens that a path may have\n")


def test_the_checkpoint_that_stop_was_trained_for_is_named(world):
    status, _, err = stop_run(world, *BUDGET, "--max-new-tokens", 4)
    assert status == 2 and f"for which the STOP in {world / 'stop'} was trained" in err
    status, _, err = stop_run(world, *BUDGET, "--max-new-tokens", 4, "--cascade", "3:4,4:2")
    assert status == 2 and err.startswith("error: cascade: prefix: found 4, expected 4 to 3")


def test_a_budget_that_pays_for_nothing_is_refused_without_a_plan_too(world):
    for budget in (1, 7):
        status, _, err = stop_run(world, *BUDGET, "--budget", budget, "--max-new-tokens", 8)
        assert status == 2
        assert err.startswith(f"error: budget: found {budget}, expected at least 8: one path")


def test_no_budget_is_overspent(world):
    """Where the limit is the usual length, to the token; --n takes part in it."""
    for budget in (8, 9, 12, 23, 60, 250):
        status, out, err = stop_run(world, *BUDGET, "--budget", budget, "--max-new-tokens", 8)
        assert status == 0, err
        assert json.loads(out.splitlines()[-1])["tokens"] <= budget
    status, out, err = stop_run(
        world, *BUDGET, "--budget", 60, "--max-new-tokens", 8, "--n", 14)
    assert status == 0, err
    last = json.loads(out.splitlines()[-1])
    assert last["n"] == 14 and last["tokens"] <= 60
    status, _, err = stop_run(world, *BUDGET, "--budget", 60, "--max-new-tokens", 8, "--n", 15)
    assert status == 2 and err.startswith("error: n: found 15, expected at most 14, which the")


def test_plans_and_stops_of_another_sampling_are_named(world, planned, tmp_path):
    words = ["--stop", planned, "--budget", 70, "--max-new-tokens", 9]
    status, out, err = stop_run(world, *BUDGET, *words)
    assert status == 0 and "may not hold" not in out, err
    status, out, err = stop_run(world, *BUDGET, *words, "--temperature", "0.7")
    assert status == 0, err
    told = ("made at temperature 0.6, top_k 40, top_p 0.95; this run samples at temperature 0.7, "
            "top_k 40, top_p 0.95: what it says of these paths may not hold")
    assert f"{planned / 'stop.json'}: {told}" in out and f"{planned / 'plan.json'}: {told}" in out
    for script in ("eval", "train"):
        words = ["--temperature", "0.7", "--out", str(tmp_path / script)]
        status, out, err = hostile.run(script, world, *words)
        assert status == 0, err
        assert f"{world / 'stop' / 'stop.json'}: {told}" in out


# ------------------------------------------------------------------------------- what the run says


def test_names_do_not_change_before_the_check_that_made_them(world):
    """Two checks that branch: at each of them paths have the names under which they ran."""
    status, out, err = stop_run(
        world, *BUDGET, "--n", 4, "--cascade", "2:2x2,4:2x3", "--max-new-tokens", 9, "--no-decide",
        "--temperature", 1, "--top-k", 0, "--seed", 5)
    assert status == 0, err
    checks = out.split("check at ")[1:]
    names = []
    for check in checks:
        lines = [line for line in check.splitlines() if line.startswith("  path ")]
        names.append([line.split()[1] for line in lines])
    assert sorted(names[0]) == ["0", "1", "2", "3"]
    kept = {name.partition(".")[0] for name in names[1]}
    assert len(kept) == 2 and set(names[1]) <= {f"{i}.{j}" for i in kept for j in (0, 1)} | kept


def test_a_letter_is_asked_for_where_a_letter_is_graded(world, monkeypatch):
    asked = []
    before = Tokenizer.ask
    monkeypatch.setattr(Tokenizer, "ask", lambda self, problem: (
        asked.append(problem), before(self, problem))[1])
    prompt = "a b\nA. c\nB. d"
    for kind in ("choice", "math"):
        status, _, err = stop_run(
            world, "--prompt", prompt, "--kind", kind, *BUDGET[2:], "--n", 2, "--max-new-tokens", 8)
        assert status == 0, err
    assert [problem.kind for problem in asked] == ["choice", "math"]
    assert instruction(asked[0]) == f"{prompt}\n\n{ASK_FOR_LETTER}"
    assert ASK_FOR_LETTER not in instruction(asked[1])
    with_options = Problem("1", "a b", "A", {"A": "c", "B": "d"})
    assert instruction(with_options) == f"a b\n\nA. c\nB. d\n\n{ASK_FOR_LETTER}"


@pytest.mark.parametrize("system, unit", (("linux", 1024), ("darwin", 1)))
def test_the_memory_of_this_process_is_in_bytes(monkeypatch, system, unit):
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 0)
    monkeypatch.setattr(sys, "platform", system)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert before * unit <= common.peak_memory() <= 1.5 * before * unit


# ------------------------------------------------------------------------------------- idle flags


IDLE = [
    ("score", flag, value) for flag, value in (
        ("n", 2), ("keep", 1), ("retention", 0.5), ("budget", 100), ("task_length", 9),
        ("prefix", 3), ("cascade", "2:1"), ("branch", 2), ("kind", "math"), ("picture", "x.svg"),
        ("max_new_tokens", 9), ("temperature", 1), ("top_k", 3), ("top_p", 0.5), ("seed", 1),
        ("chat_format", "raw"))]
IDLE += [("stop", "task_length", 9)]
LABELS = [("data", "x.jsonl"), ("problems", 3), ("paths", 4), ("low", 0), ("high", 4),
          ("prefixes", 2), ("rollouts", 3)]


@pytest.mark.parametrize("script, flag, value", IDLE)
def test_a_flag_that_would_do_nothing_is_refused(world, script, flag, value):
    line = refused(script, world, f"--{flag.replace('_', '-')}", value)
    assert line.startswith(f"{flag}: found ") and "expected none: it " in line


@pytest.mark.parametrize("flag, value", LABELS)
def test_flags_that_shape_labels_are_refused_beside_labels(world, tmp_path, flag, value):
    """As flags; what the checkpoint's recipe says of them stands there for other runs."""
    out = tmp_path / "out"
    labels = world / "prefixes.jsonl"
    line = refused("train", world, "--labels", labels, f"--{flag}", value, "--out", out)
    assert line.startswith(f"{flag}: found {value!r}, expected none: it shapes labels")
    assert not out.exists()


def test_other_flags_of_train_that_would_do_nothing_are_refused(world, tmp_path):
    for flag, value in (("rank", 4), ("alpha", 2), ("dropout", 0.1)):
        line = refused("train", world, "--targets", "none", f"--{flag}", value)
        assert line.startswith(f"{flag}: found ") and "leaves no LoRA" in line
    alone = tmp_path / "alone"
    shutil.copytree(world, alone)
    (alone / "test.jsonl").unlink()
    for flag in ("n", "keep"):
        line = refused("train", alone, f"--{flag}", 2)
        assert line.startswith(f"{flag}: found 2, expected none: there are no held-out problems")
    line = refused("eval", world, "--judge-aggregate", "min")
    assert line.startswith("judge_aggregate: found 'min', expected none: there is no judge")


def test_labels_that_exist_are_trained_on_with_the_checkpoints_recipe(world, tmp_path):
    words = ["--labels", str(world / "prefixes.jsonl"), "--out", str(tmp_path / "out")]
    status, out, err = hostile.run("train", world, *words)
    assert status == 0, err


# ----------------------------------------------------------------------------------- a reused --out


def test_a_reused_folder_says_what_differs(world, tmp_path):
    """Which problems, by their file and number, and not two digests."""
    own = tmp_path / "it"
    shutil.copytree(world, own)
    out = tmp_path / "out"
    assert hostile.run("train", own, "--out", str(out))[0] == 0
    lines = (own / "train.jsonl").read_text().splitlines(keepends=True)
    (own / "train.jsonl").write_text("".join(lines[:-1]))
    line = refused("train", own, "--out", out)
    assert line.startswith(f"{out / 'settings.json'}: another run's, the training problems differ: "
                           "found train.jsonl, 5 records (")
    assert "expected train.jsonl, 4 records (" in line and line.endswith("take another --out")
    (own / "train.jsonl").write_text("".join(lines))

    lines = (own / "test.jsonl").read_text()
    (own / "test.jsonl").write_text(lines.replace('"1"', '"2"'))
    line = refused("train", own, "--out", out)
    assert "the held-out problems differ: found test.jsonl, 3 records (" in line
    (own / "test.jsonl").write_text(lines)

    line = refused("train", own, "--out", out, "--labels", own / "prefixes.jsonl")
    assert line.startswith(f"{out / 'settings.json'}: labels: found None, expected '")
    line = refused("train", own, "--out", out, "--seed", 3)
    assert line.startswith(f"{out / 'settings.json'}: seed: found 0, expected 3 as asked")

    weights = (own / "model.safetensors").read_bytes()
    (own / "model.safetensors").write_bytes(weights[:-4] + b"\0\0\0\x3f")
    line = refused("train", own, "--out", out)
    assert f"the model's weights differ: found {own} (" in line
    (own / "model.safetensors").write_bytes(weights)
    assert hostile.run("train", own, "--out", str(out))[0] == 0


def test_a_run_begun_without_its_parts_goes_on(world, tmp_path):
    """As an earlier version of the project wrote its settings."""
    out = tmp_path / "out"
    assert hostile.run("train", world, "--out", str(out))[0] == 0
    whole = (out / "settings.json").read_bytes()
    settings = json.loads(whole)
    del settings["parts"]
    (out / "settings.json").write_text(json.dumps(settings))
    assert hostile.run("train", world, "--out", str(out))[0] == 0
    assert (out / "settings.json").read_bytes() == whole


# ------------------------------------------------------------------------------------------ the Hub


def test_the_recipe_of_a_hub_id_is_used(world, tmp_path, monkeypatch):
    """From the Hub library's own cache, offline."""
    cache = tmp_path / "hub"
    snapshot = cache / "models--owner--name" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    for file in world.iterdir():
        if file.is_file():
            shutil.copy(file, snapshot)
    (cache / "models--owner--name" / "refs").mkdir()
    (cache / "models--owner--name" / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    download = huggingface_hub.snapshot_download
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download",
        lambda *words, **how: download(*words, **how, cache_dir=str(cache), local_files_only=True))
    content, file = train_command.recipe({"model": "owner/name"})
    assert file == snapshot / "recipe.json"
    assert content == hostile.RECIPE
    with pytest.raises(ValueError, match="owner/other: no such directory"):
        train_command.recipe({"model": "owner/other"})


# ---------------------------------------------------------------------------- numbers, and a batch


@pytest.mark.parametrize("value", (math.inf, -math.inf, math.nan))
@pytest.mark.parametrize("head", ("sigmoid", "softmax"))
def test_a_head_logit_that_is_not_finite_is_no_score(head, value):
    """Infinity would be a chance of 1."""
    model = random_model("qwen2")
    stop = random_stop(model, head=head)
    with torch.no_grad():
        stop.head.bias[-1] = value
    message = "STOP's score: found NaN or infinity"
    with pytest.raises(ValueError, match=message):
        stop.score(model, [[5, 6, 7]])
    with pytest.raises(ValueError, match=message):
        stop.chance(torch.tensor([[0.0] * (len(stop.head.bias) - 1) + [value]]))
    examples = [Example([5, 6, 7], 0.5, "p", None), Example([5, 6], 0.5, "q", None)]
    prefixes = Prefixes(model, examples, 2, stop.m, 0)
    with pytest.raises(ValueError, match="^validation: STOP's score: found NaN or infinity"):
        validate(model, stop, prefixes)


def test_a_batch_with_waiting_paths_decodes_to_the_limit_or_not_at_all():
    model = random_model("qwen2")
    paths = [Path([5, 6, 7], index) for index in range(5)]
    batch = Batch(model, paths, rows=2, capacity=20, limit=8, sampling=Sampling())
    with pytest.raises(ValueError, match="until: found 4, expected the limit of 8 while 3 paths"):
        batch.decode(until=4)
    assert all(not path.ids for path in paths)
    batch.decode(until=8)
    assert [len(path.ids) for path in paths] == [8] * 5
