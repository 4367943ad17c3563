"""Paths stored for later use: a record as soon as it is made, named by all that shapes it."""
import copy
import dataclasses
import json
import re
import shutil

import pytest
from helpers import (
    ROOT, Fuse, Killed, random_model, raw_config, read_lines, write_checkpoint, write_lines,
    write_tokenizer)

import sample
from engine import refill, stored
from engine.refill import Batch
from engine.stored import sample_paths
from model import load
from plumbing import grading
from plumbing.problems import Problem
from plumbing.tokenizer import Tokenizer
from sample import Sampling

PROBLEMS = [Problem(name, f"What is {name}?", "1") for name in "abcde"]
STORED = Sampling(temperature=1.0, top_k=0, top_p=1.0, seed=0)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A tiny random model that ends some paths early, and a byte tokenizer."""
    raw = raw_config("qwen2", vocab_size=256, eos_token_id=[3, 50, 99])
    folder = write_checkpoint(tmp_path_factory.mktemp("tiny") / "it", raw)
    write_tokenizer(folder)
    return load(folder), Tokenizer(folder)


def store(pair, folder, problems=PROBLEMS, n=3, max_new_tokens=8, sampling=STORED, batch=6):
    """The records of sample_paths."""
    return sample_paths(*pair, problems, folder, n, max_new_tokens, sampling, batch)


def only_file(folder):
    (file,) = folder.iterdir()
    return file


def test_stored_paths_are_those_of_generate(pair, tmp_path):
    """Paths, prompts, answers and grades of each problem, in the order of the problems."""
    model, tokenizer = pair
    records = store(pair, tmp_path)
    lines = read_lines(only_file(tmp_path))
    for line in lines:
        assert line.pop("seal")
        assert line.pop("grader") == grading.grader()
    assert lines == records
    assert [record["id"] for record in records] == list("abcde")
    assert records == sample.sample_paths(model, tokenizer, PROBLEMS, 3, 8, STORED)
    for record, problem in zip(records, PROBLEMS):
        prompt = tokenizer.ask(problem)
        (paths,) = sample.generate(model, [prompt], 3, 8, temperature=1.0, top_k=0, top_p=1.0)
        assert record["prompt_ids"] == prompt
        assert record["paths"] == [path.ids for path in paths]


def test_stored_grades_of_another_grader_are_made_anew(pair, tmp_path, monkeypatch, capsys):
    """Also those of files from before graders had names. The file stays as it is."""
    records = store(pair, tmp_path)
    file = only_file(tmp_path)
    before = file.read_bytes()
    capsys.readouterr()
    assert store(pair, tmp_path) == records
    assert "grader" not in capsys.readouterr().out

    monkeypatch.setattr(stored, "grader", lambda: "another")
    monkeypatch.setattr(grading, "extract_answer", lambda text, kind: "1")
    again = store(pair, tmp_path)
    assert all(record["right"] == [True] * 3 for record in again)
    assert [record["paths"] for record in again] == [record["paths"] for record in records]
    assert "those of 5 problems were graded by another version" in capsys.readouterr().out
    assert file.read_bytes() == before


def test_a_graders_name_stands_for_all_of_its_code():
    """Every module of plumbing/ that grading reaches."""
    reached = set()
    waiting = ["grading"]
    while waiting:
        name = waiting.pop()
        if name not in reached:
            reached.add(name)
            code = (ROOT / "plumbing" / f"{name}.py").read_text(encoding="utf-8")
            waiting += re.findall(r"^from plumbing\.(\w+) import", code, re.MULTILINE)
    assert reached == set(grading.CODE)


class Counted:
    """A tokenizer that keeps of a path only how long it is."""
    format = "raw"

    def ask(self, problem):
        return list(problem.problem.encode())

    def completion(self, ids):
        return "x" * len(ids)


def test_stored_answers_are_graded(pair, tmp_path, monkeypatch):
    """Each path against its own problem's answer: 1 where the path has an odd number of tokens,
    else 2."""
    monkeypatch.setattr(grading, "extract_answer", lambda text, kind: str(2 - len(text) % 2))
    problems = [Problem("a", "What?", "1"), Problem("b", "Who?", "2")]
    records = store((pair[0], Counted()), tmp_path, problems, n=12)
    grades = set()
    for record, odd in zip(records, (1, 0)):
        lengths = [len(path) for path in record["paths"]]
        assert record["answers"] == [str(2 - length % 2) for length in lengths]
        assert record["right"] == [length % 2 == odd for length in lengths]
        grades.update(record["right"])
    assert grades == {True, False}


@pytest.mark.parametrize("after", range(1, 40, 5))
def test_interrupted_sampling_goes_on(pair, tmp_path, monkeypatch, after):
    """Killed at any decode step or between any two answers, again and again, and started again with
    another number of rows: the same bytes at the end."""
    store(pair, tmp_path / "whole")
    kills = 0
    while kills < 50:
        fuse = Fuse(after + 5 * kills)  # longer each time, or no problem would ever be finished
        with monkeypatch.context() as patch:
            patch.setattr(Batch, "settle", fuse(Batch.settle))
            patch.setattr(grading, "extract_answer", fuse(grading.extract_answer))
            try:
                store(pair, tmp_path / "killed", batch=(6, 1, 4, None)[kills % 4])
                break
            except Killed:
                kills += 1
    assert kills > 0
    whole = only_file(tmp_path / "whole").read_bytes()
    assert only_file(tmp_path / "killed").read_bytes() == whole


def test_a_finished_problem_is_on_disk_before_the_others_are(pair, tmp_path, monkeypatch):
    """A record at a time: what is stored when the run is killed is not sampled again."""
    fuse = Fuse(9)  # the third problem's answers, after three of each before it
    with monkeypatch.context() as patch:
        patch.setattr(grading, "extract_answer", fuse(grading.extract_answer))
        with pytest.raises(Killed):
            store(pair, tmp_path, batch=3)
    found = read_lines(only_file(tmp_path))
    assert len(found) == 3
    asked = []
    sample_all = stored.sample_all

    def noted(model, prompts, *rest, **more):
        asked.extend(prompts)
        return sample_all(model, prompts, *rest, **more)

    monkeypatch.setattr(stored, "sample_all", noted)
    records = store(pair, tmp_path, batch=3)
    known = [record["prompt_ids"] for record in found]
    prompts = [record["prompt_ids"] for record in records]
    assert asked == [prompt for prompt in prompts if prompt not in known]


@pytest.mark.parametrize("count", (4, 5))
def test_finished_paths_are_read_and_not_sampled(pair, tmp_path, monkeypatch, count):
    """A second run on the same folder decodes nothing and leaves the file as it is."""
    records = store(pair, tmp_path, PROBLEMS[:count])
    content = only_file(tmp_path).read_bytes()
    monkeypatch.setattr(refill, "Batch", None)
    assert store(pair, tmp_path, PROBLEMS[:count]) == records
    assert only_file(tmp_path).read_bytes() == content


def test_one_limit_for_all(pair, tmp_path):
    """Where the context gives the limit, a problem's paths do not depend on what else is sampled.
    """
    problems = [Problem(str(count), "?" * count, "1") for count in (480, 470, 490)]
    records = store(pair, tmp_path, problems, max_new_tokens=None)
    lengths = [len(path) for record in records for path in record["paths"]]
    assert max(lengths) == 512 - 490


CHANGED_SAMPLING = {
    "temperature": dataclasses.replace(STORED, temperature=0.5),
    "top_k": dataclasses.replace(STORED, top_k=9),
    "top_p": dataclasses.replace(STORED, top_p=0.5),
    "seed": dataclasses.replace(STORED, seed=1)}


@pytest.mark.parametrize("change", (
    {"n": 2}, {"max_new_tokens": 7}, *({"sampling": value} for value in CHANGED_SAMPLING.values()),
    {"problems": [Problem("a", "Another?", "1")]},
    {"problems": [Problem("a", PROBLEMS[0].problem, "2")]},
    {"problems": [Problem("a", PROBLEMS[0].problem, "A", {"A": "it"})]}), ids=str)
def test_other_settings_make_another_file(pair, tmp_path, change):
    """A setting left out of the name would hand out paths that were sampled otherwise, or graded
    against another answer."""
    store(pair, tmp_path, PROBLEMS[:1])
    store(pair, tmp_path, **{"problems": PROBLEMS[:1]} | change)
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("change", ({"rope_theta": 5000.0}, {"seed": 1}, {"eos": (1, 2)}), ids=str)
def test_another_model_makes_another_file(pair, tmp_path, change):
    """Another config, other weights, or other end tokens."""
    model = random_model(
        "qwen2", vocab_size=256, seed=change.get("seed", 0),
        rope_theta=change.get("rope_theta", 10000.0))
    model.config.eos_ids = change.get("eos", pair[0].config.eos_ids)
    store(pair, tmp_path, PROBLEMS[:1])
    store((model, pair[1]), tmp_path, PROBLEMS[:1])
    assert len(list(tmp_path.iterdir())) == 2


def test_another_dtype_makes_another_file(pair, tmp_path):
    """The same weights, computed with in other precision, give other paths."""
    half = copy.deepcopy(pair[0]).bfloat16()
    store((half, pair[1]), tmp_path, PROBLEMS[:1])
    store((copy.deepcopy(half).float(), pair[1]), tmp_path, PROBLEMS[:1])
    assert len(list(tmp_path.iterdir())) == 2


def test_the_same_model_finds_its_file(pair, tmp_path):
    """Loaded again it is the same model, and the number of rows at a time is no part of the name.
    """
    again = random_model("qwen2", vocab_size=256)
    again.config.eos_ids = pair[0].config.eos_ids
    store(pair, tmp_path, PROBLEMS[:1], batch=2)
    store((again, pair[1]), tmp_path, PROBLEMS[:1], batch=3)
    assert len(list(tmp_path.iterdir())) == 1


def change_token(record):
    record["paths"][0][0] = (record["paths"][0][0] + 1) % 256


def change_grade(record):
    record["right"][0] = not record["right"][0]


def change_answer(record):
    record["answers"][1] = "1"


def change_id(record):
    record["id"] = "z"


def drop_seal(record):
    del record["seal"]


def shorten_prompt(record):
    record["prompt_ids"].pop()


def drop_path(record):
    record["paths"].pop()


@pytest.mark.parametrize("number, edit", (
    (2, change_token), (1, change_grade), (3, change_answer), (1, change_id), (4, drop_seal),
    (1, shorten_prompt), (5, drop_path)))
def test_an_edited_line_is_refused(pair, tmp_path, number, edit):
    """By file and line: a token, a grade, an answer, an id, a prompt, a path, a seal."""
    store(pair, tmp_path)
    file = only_file(tmp_path)
    records = read_lines(file)
    edit(records[number - 1])
    write_lines(file, records)
    content = file.read_bytes()
    with pytest.raises(ValueError) as caught:
        store(pair, tmp_path)
    assert str(caught.value).startswith(f"{file}:{number}: found an edited line")
    assert "\n" not in str(caught.value)
    assert file.read_bytes() == content


def test_a_line_too_many_is_refused(pair, tmp_path):
    store(pair, tmp_path)
    file = only_file(tmp_path)
    records = read_lines(file)
    write_lines(file, records + records[-1:])
    with pytest.raises(ValueError, match=f"{file}:6: found a record for the second time"):
        store(pair, tmp_path)
    file.write_text("{}\n" + file.read_text())
    with pytest.raises(ValueError, match=f"{file}:1: found an edited line"):
        store(pair, tmp_path)


def test_lines_in_any_order_and_a_lost_one_are_mended(pair, tmp_path):
    """Records are finished in any order: a file that is not in order, or lacks one, is completed.
    """
    records = store(pair, tmp_path)
    file = only_file(tmp_path)
    content = file.read_bytes()
    lines = content.splitlines(True)
    file.write_bytes(b"".join([lines[4], lines[1], lines[0], lines[3]]))
    assert store(pair, tmp_path) == records
    assert file.read_bytes() == content


def test_another_models_file_is_refused(pair, tmp_path):
    """Two models of one config and one tokenizer, the file of one under the name of the other's."""
    other = random_model("qwen2", seed=1, vocab_size=256)
    other.config.eos_ids = pair[0].config.eos_ids
    store(pair, tmp_path / "a")
    store((other, pair[1]), tmp_path / "b")
    ours = only_file(tmp_path / "a")
    shutil.copy(only_file(tmp_path / "b"), ours)
    with pytest.raises(ValueError, match=f"{ours}:1: found an edited line or another run's"):
        store(pair, tmp_path / "a")


def test_a_record_is_json_of_one_line(pair, tmp_path):
    """What is read back is what was stored, whatever characters a problem has."""
    problem = Problem("ä\u2028\n", "Zwei\u2028und\nzwei?", "4")
    records = store(pair, tmp_path, [problem])
    (line,) = only_file(tmp_path).read_bytes().splitlines()
    assert json.loads(line)["id"] == records[0]["id"] == problem.id
    assert store(pair, tmp_path, [problem]) == records
