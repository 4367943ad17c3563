"""commands/questions.py: a file of questions through Launch, Check, Resume, on the small world of
hostile.py. What a record says is compared with a run by hand on the story's own functions."""
import json

import hostile
import pytest
from helpers import Fuse, Killed, read_lines, run_script, write_lines

from commands import questions as room
from commands import stop as stop_command
from model import load
from plumbing.answers import extract_answer, same_answer
from plumbing.records import Job
from plumbing.tokenizer import Tokenizer
from stop import Stop, launch_check_resume, vote

ASKED = [
    {"id": "known", "problem": "a m", "answer": "1"},
    {"question": "b c d"},
    {"problem": "e zebra", "answer": "2"},
    {"problem": "a b", "options": {"A": "c", "B": "d"}},
    {"problem": "f", "answer": None}]
PLAIN = ["--device", "cpu", "--dtype", "float32", "--max-new-tokens", "8"]
FEW = ["--n", "6", "--keep", "3", "--prefix", "4", "--temperature", "1", "--seed", "3"]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return hostile.write_world(tmp_path_factory.mktemp("questions") / "it")


@pytest.fixture(scope="module")
def asked(world):
    return write_lines(world.parent / "asked.jsonl", ASKED)


def ask(world, *words):
    """stop.py on the world, with these words and no --prompt -> (status, stdout, stderr)."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hostile, "words_of", lambda script, folder: PLAIN)
        return hostile.run("stop", world, *map(str, words))


@pytest.fixture(scope="module")
def answered(world, asked):
    """(the file of answers, what was printed) of a run that nothing interrupted."""
    out = world.parent / "answers.jsonl"
    status, printed, err = ask(world, "--data", asked, "--out", out, *FEW, "--no-decide")
    assert status == 0, err
    return out, printed


def test_a_record_is_what_a_run_by_hand_says(world, answered):
    model = load(world)
    stop = Stop.load(world / "stop", model)
    tokenizer = Tokenizer(world)
    records = read_lines(answered[0])
    assert [record["id"] for record in records] == ["known", "2", "3", "4", "5"]
    for record in records:
        prompt = tokenizer.encode(record["problem"])
        kind = "math"
        if record["id"] == "4":
            prompt, kind = None, "choice"
        if prompt is None:
            continue
        paths = launch_check_resume(
            model, stop, prompt, n=6, keep=3, prefix=4, max_new_tokens=8, temperature=1.0, seed=3)
        kept = [path for path in paths if path.status != "pruned"]
        answers = [extract_answer(tokenizer.completion(path.ids), kind) for path in kept]
        scores = [path.score for path in kept]
        assert record["answer"] == vote(answers, scores)
        assert record["majority"] == vote(answers)
        assert record["scores"] == {path.name: round(path.score, 6) for path in kept}
        assert (record["n"], record["kept"]) == (6, 3)
        assert record["tokens"] == sum(len(path.ids) for path in paths)
        for answer, votes in record["votes"].items():
            own = [score for said, score in zip(answers, scores) if said == answer]
            assert votes == {"number": len(own), "weight": pytest.approx(sum(own), abs=2e-6)}
        assert sum(votes["number"] for votes in record["votes"].values()) == sum(
            answer is not None for answer in answers)


def test_what_is_right_is_said_where_the_answer_is_known(answered):
    out, printed = answered
    records = read_lines(out)
    assert [record.get("expected") for record in records] == ["1", None, "2", None, None]
    for record in records:
        assert ("right" in record) == ("expected" in record)
        if "right" in record:
            assert record["right"] == same_answer(record["answer"], record["expected"])
    result = json.loads(printed.splitlines()[-1])
    right = sum(record.get("right", False) for record in records)
    assert result["questions"] == 5 and result["graded"] == 2
    assert result["right"] == right and result["accuracy"] == right / 2
    assert result["tokens"] == sum(record["tokens"] for record in records)
    assert "data: 1 of 5 problems hold words unknown to this tokenizer (<unk>)\n" in printed


def test_without_answers_nothing_is_graded(world, tmp_path):
    data = write_lines(tmp_path / "q.jsonl", [{"problem": "a b"}])
    status, printed, err = ask(world, "--data", data, "--out", tmp_path / "out.jsonl", *FEW)
    assert status == 0, err
    result = json.loads(printed.splitlines()[-1])
    assert result["questions"] == 1 and "accuracy" not in result and "right" not in result


@pytest.mark.parametrize("calls", (0, 2, 4))
def test_a_killed_run_loses_no_record_and_repeats_none(
        world, asked, answered, tmp_path, monkeypatch, calls):
    out = tmp_path / "out.jsonl"
    words = ["--data", asked, "--out", out, *FEW, "--no-decide"]
    with monkeypatch.context() as patch:
        patch.setattr(Job, "add", Fuse(calls)(Job.add))
        with pytest.raises(Killed):
            ask(world, *words)
    with open(out, "a", encoding="utf-8") as file:
        file.write('{"id": "torn')
    made = []
    answer_question = room.answer_question
    monkeypatch.setattr(room, "answer_question", lambda *args: (
        made.append(1), answer_question(*args))[1])
    status, printed, err = ask(world, *words)
    assert status == 0, err
    assert len(made) == 5 - calls
    assert out.read_bytes() == answered[0].read_bytes()
    assert (f"{calls} of 5 questions are answered already" in printed) == (calls > 0)


def test_questions_may_be_added(world, asked, answered, tmp_path):
    """The first of them by --problems; the others later, to the same file."""
    out = tmp_path / "out.jsonl"
    words = ["--data", asked, "--out", out, *FEW, "--no-decide"]
    assert ask(world, *words, "--problems", 2)[0] == 0
    assert len(read_lines(out)) == 2
    assert ask(world, *words)[0] == 0
    assert out.read_bytes() == answered[0].read_bytes()


@pytest.mark.parametrize("words", (
    ["--seed", "4"], ["--keep", "2"], ["--n", "7"], ["--prefix", "3"], ["--temperature", "0.9"],
    ["--cascade", "4:3"]))
def test_another_runs_file_is_refused_and_left_alone(world, asked, answered, tmp_path, words):
    out = tmp_path / "out.jsonl"
    out.write_bytes(answered[0].read_bytes())
    given = ["--n", "6", "--temperature", "1", "--seed", "3"] if words[0] == "--cascade" else FEW
    status, _, err = ask(world, "--data", asked, "--out", out, *given, "--no-decide", *words)
    if words[0] == "--cascade":  # the same checks by another flag
        assert status == 0, err
    else:
        assert status == 2 and f"{out}:1: found an edited line or another run's" in err
    assert out.read_bytes() == answered[0].read_bytes()


@pytest.mark.parametrize("words, message", (
    (["--data", "x"], "out: found none, expected a file for the answers of --data"),
    (["--data", "x", "--out", "y", "--prompt", "a"], "found --prompt --data --out, expected"),
    (["--data", "x", "--out", "y", "--score", "z"], "n: found|found --data --score --out, exp"),
    (["--data", "x", "--out", "y", "--trace", "z"], "found --data --out --trace, expected"),
    (["--out", "y"], "found --out, expected --prompt, or --data and --out, or"),
    (["--prompt", "a", "--out", "y"], "found --prompt --out, expected"),
    (["--data", "x", "--out", "y", "--answer", "1"], "answer: found '1', expected none: it serves"),
    (["--data", "x", "--out", "y", "--kind", "math"], "kind: found 'math', expected none: it"),
    (["--data", "x", "--out", "y", "--picture", "p.svg"], "picture: found 'p.svg', expected none"),
    (["--prompt", "a", "--problems", "3"], "problems: found 3, expected none: it counts"),
    (["--data", "x", "--out", "y", "--problems", "0"], "problems: found 0, expected more than 0"),
    (["--data", "none.jsonl", "--out", "y"], "none.jsonl: cannot be read"),
    ([], "found none, expected --prompt, or --data and --out")))
def test_what_cannot_be_is_refused_before_a_model_is_loaded(
        world, tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(stop_command, "open_model", None)
    if "--score" in words:
        monkeypatch.setitem(globals(), "PLAIN", PLAIN[:4])
    status, _, err = ask(world, *words)
    assert status == 2
    assert any(f"error: {one}" in err for one in message.split("|")), err
    assert list(tmp_path.iterdir()) == []


def test_a_question_without_room_is_refused_before_any_is_answered(world, tmp_path):
    data = write_lines(tmp_path / "q.jsonl", [{"problem": "a"}, {"problem": "b " * 62}])
    out = tmp_path / "out.jsonl"
    status, _, err = ask(world, "--data", data, "--out", out, *FEW)
    assert status == 2 and len(err.splitlines()) == 1
    assert not out.exists()


def test_two_processes_make_the_same_file(world, asked, answered, tmp_path):
    out = tmp_path / "out.jsonl"
    words = ["--model", world, *PLAIN, *FEW, "--no-decide", "--data", asked, "--out", out]
    status, printed, err = run_script("stop.py", words, processes=2)
    assert status == 0, err
    assert out.read_bytes() == answered[0].read_bytes()
    assert printed.count("settings: ") == 1 and printed.count('{"out": ') == 1
    assert sorted(file.name for file in tmp_path.iterdir()) == ["out.jsonl"]


def test_one_prompt_is_not_shared(world):
    status, _, err = run_script(
        "stop.py", ["--model", world, *PLAIN, "--prompt", "a"], processes=2)
    assert status != 0 and "torchrun: found 2 processes, expected 1" in err
