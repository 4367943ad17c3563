"""What a run says and looks at before it works, and that a flag which would do nothing is refused:
the scripts' entries, in this process, on the small world of hostile.py."""
import json
import math
import os
import re
import resource
import shutil
import sys

import hostile
import huggingface_hub
import pytest
import torch
from helpers import random_model, random_stop, read_lines, write_lines

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
    assert "path " in out and "\nanswer: " in out and " tokens in " in out.splitlines()[-1]


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


def checks_in(out):
    """The checks that stop.py has printed: for each a list of (score, names kept, names pruned)."""
    checks = []
    for text in out.split("check at ")[1:]:
        lines = []
        joined = re.sub(r"\n {10,}", " ", text)
        for line in joined.splitlines():
            if line.startswith("  score "):
                score, names = re.fullmatch(r"  score ([\d.]+) +\d+ paths?: (.*)", line).groups()
                groups = {"kept": [], "pruned": []}
                for part in names.split("; "):
                    what, _, found = part.partition(" ")
                    groups[what] = found.split(", ")
                lines.append((score, groups["kept"], groups["pruned"]))
        checks.append(lines)
    return checks


def test_equal_scores_stand_together_and_the_best_first(world):
    """64 paths, of which many are alike; each once, with what became of it."""
    status, out, err = stop_run(
        world, *BUDGET, "--n", 64, "--keep", 8, "--prefix", 2, "--max-new-tokens", 4, "--no-decide",
        "--temperature", 1, "--top-k", 3)
    assert status == 0, err
    (lines,) = checks_in(out)
    scores = [score for score, _, _ in lines]
    assert scores == sorted(set(scores), reverse=True) and len(scores) < 64
    kept = [name for _, names, _ in lines for name in names]
    pruned = [name for _, _, names in lines for name in names]
    assert len(kept) == 8 and sorted(map(int, kept + pruned)) == list(range(64))
    lowest = min(i for i, (_, _, pruned) in enumerate(lines) if pruned)
    assert not any(kept for _, kept, _ in lines[lowest + 1:])
    assert max(map(len, out[out.index("check at"):out.index("\npath ")].splitlines())) <= 100


def test_the_answer_stands_behind_the_text_of_its_best_path(world):
    status, out, err = stop_run(
        world, *BUDGET, "--n", 16, "--keep", 8, "--prefix", 3, "--max-new-tokens", 8, "--no-decide",
        "--temperature", 1, "--answer", 1)
    assert status == 0, err
    lines = out.splitlines()
    result = json.loads(lines[-1])
    votes = {}
    for line in lines:
        found = re.fullmatch(r"path (\d+) \(\w+, \d+ tokens, score ([\d.]+)\): (\S+)( [✓✗])?", line)
        if found and found[3] != "None":
            votes.setdefault(found[3], []).append((float(found[2]), found[1]))
    weights = {answer: sum(score for score, _ in group) for answer, group in votes.items()}
    winner = max(weights, key=weights.get)
    assert result["answer"] == result["weighted"] == winner
    best = max(score for score, _ in votes[winner])
    (said,) = [line for line in lines if line.startswith("the best of those that answer ")]
    assert f"answer {winner}, path " in said and f"score {best:.4f}):" in said
    (answer,) = [line for line in lines if line.startswith("answer: ")]
    found = re.fullmatch(
        r"answer: (\S+) \(score-weighted vote: ([\d.]+) of ([\d.]+); majority: (\S+), (\d+) of "
        r"(\d+) votes\) ([✓✗])", answer)
    assert found[1] == winner and found[4] == result["majority"]
    assert float(found[2]) == pytest.approx(weights[winner], abs=0.01)
    assert float(found[3]) == pytest.approx(sum(weights.values()), abs=0.01)
    assert int(found[5]) == len(votes[found[4]])
    assert int(found[6]) == sum(map(len, votes.values()))
    assert found[7] == ("✓" if winner == "1" else "✗")
    text = lines[lines.index(said) + 1]
    assert text.startswith("  ") and f"\\boxed{{{winner}}}" in text


def test_a_run_without_an_answer_says_so(world):
    """Greedy paths that end before they say one, or never do."""
    status, out, err = stop_run(
        world, "--prompt", "a", *BUDGET[2:], "--n", 2, "--keep", 1, "--prefix", 1,
        "--max-new-tokens", 2, "--temperature", 0)
    assert status == 0, err
    result = json.loads(out.splitlines()[-1])
    if result["answer"] is None:
        assert "\nanswer: none (1 path, none with an answer)\n" in out
    else:
        assert f"answer: {result['answer']} (" in out


@pytest.mark.parametrize("length", (1, 600, 601, 5000))
def test_of_a_long_text_the_end_is_shown(length):
    words = ("word " * 1000)[:length - 1] + "X"
    shown = stop_command.end_of(words)
    assert shown.endswith("X") and len(shown) <= 604
    assert (shown == words) == (length <= 600)
    if length > 600:
        assert shown.startswith("... word ")
    assert stop_command.end_of("x" * 700) == "... " + "x" * 600


def test_unknown_words_are_counted(world, tmp_path):
    for words, said in ((["a zebra b gnu"], "prompt: 2 of 4 tokens are unknown to this tokenizer "
                         "(<unk>)\n"), (["a b"], None)):
        for script in ("stop", "sample"):
            status, out, err = hostile.run(script, world, "--prompt", *words)
            assert status == 0, err
            assert said in out if said else "unknown" not in out
    problems = [{"problem": "a zebra", "answer": "1"}, {"problem": "a b", "answer": "1"},
                {"problem": "gnu gnu", "answer": "1"}]
    data = write_lines(tmp_path / "p.jsonl", problems)
    status, out, err = hostile.run(
        "eval", world, "--data", str(data), "--out", str(tmp_path / "out"))
    assert status == 0, err
    assert "data: 2 of 3 problems hold words unknown to this tokenizer (<unk>)\n" in out
    status, out, err = hostile.run(
        "train", world, "--data", str(data), "--out", str(tmp_path / "t"), "--plan")
    assert status == 0, err
    assert "data: 2 of 6 problems hold words unknown" in out
    assert re.search(r"\nplan: at most .*; together (under 1 s|\d+ s|[\d.]+ min), an estimate", out)
    assert "\nplan: likely about " in out and "0.00 h" not in out


def test_paths_of_the_first_problems_of_a_file(world, tmp_path):
    data = write_lines(tmp_path / "p.jsonl", [{"problem": word} for word in ("a b", "c", "d")])
    words = ["--data", data, "--problems", 2, *hostile.PLAIN, "--n", 3]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hostile, "words_of", lambda script, folder: [])
        status, out, err = hostile.run("sample", world, *map(str, words))
    assert status == 0, err
    found = re.findall(r"^--- path (\d) of problem (\d) ", out, re.MULTILINE)
    assert sorted(found) == [(str(i), str(p)) for i in range(3) for p in (1, 2)]
    status, out, err = hostile.run("sample", world, "--data", str(data))
    assert status == 2 and err == "error: prompt, data: found both, expected one of the two\n"
    status, out, err = hostile.run("sample", world, "--problems", "2")
    assert status == 2 and err.startswith("error: problems: found 2, expected none: it counts")


def test_held_out_problems_that_are_not_evaluated_are_not_trained_on_either(world, tmp_path):
    data = write_lines(tmp_path / "p.jsonl", [
        *read_lines(world / "train.jsonl"), read_lines(world / "test.jsonl")[2] | {"id": "z"}])
    out = tmp_path / "out"
    words = ["--data", data, "--out", out, "--test-problems"]
    status, printed, err = hostile.run("train", world, *map(str, words), "2")
    assert status == 0, err
    assert "data: 1 problems are held-out ones and were dropped" in printed
    assert "plan: 2 held-out problems x " in printed
    assert json.loads((out / "report.json").read_text())["problems"] == 2
    status, _, err = hostile.run("train", world, *map(str, words), "1")
    assert status == 2 and "the held-out problems differ" in err


def test_names_do_not_change_before_the_check_that_made_them(world):
    """Two checks that branch: at each of them paths have the names under which they ran."""
    status, out, err = stop_run(
        world, *BUDGET, "--n", 4, "--cascade", "2:2x2,4:2x3", "--max-new-tokens", 9, "--no-decide",
        "--temperature", 1, "--top-k", 0, "--seed", 5)
    assert status == 0, err
    names = [[name for _, kept, pruned in lines for name in kept + pruned]
             for lines in checks_in(out)]
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
    for flag in ("n", "keep", "test-problems"):
        line = refused("train", alone, f"--{flag}", 2)
        name = flag.replace("-", "_")
        assert line.startswith(f"{name}: found 2, expected none: there are no held-out problems")
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
