"""Problem files: what is read, how it is converted, every complaint in one line."""
import csv
import json
from pathlib import Path

import pytest
from huggingface_hub.errors import GatedRepoError, HTTPError, LocalEntryNotFoundError

from plumbing import problems as room
from plumbing.problems import (
    Problem, instruction, read_problems, read_sources, without_held_out, without_repeats)


def test_read_problems_from_lines_and_lists(tmp_path):
    records = [{"problem": "1+1?", "answer": 2, "year": 1983},
               {"id": "q", "question": "2+2?", "answer": " 4 "},
               {"problem_idx": 9, "question": "Which?", "answer": "B", "options": ["x", "y"]},
               {"id": 7, "problem": "Which?", "answer": "F",
                "options": dict(zip("ABCDEF", "uvwxyz"))}]
    lines, listed = tmp_path / "p.jsonl", tmp_path / "p.json"
    lines.write_text("\n\n".join(map(json.dumps, records)), encoding="utf-8-sig")
    listed.write_text(json.dumps(records, indent=1))
    problems = read_problems(lines)
    assert problems == read_problems(str(listed))
    assert [p.id for p in problems] == ["1", "q", "9", "7"]
    assert [p.answer for p in problems] == ["2", "4", "B", "F"]
    assert [p.kind for p in problems] == ["math", "math", "choice", "choice"]
    assert problems[0].options is None and problems[2].options == {"A": "x", "B": "y"}
    assert instruction(problems[0]).startswith("1+1?") and "\\boxed{}" in instruction(problems[0])
    assert "A. x\nB. y" in instruction(problems[2]) and '"ANSWER": "C"' in instruction(problems[2])


def test_the_instructions_are_the_papers():
    """Appendix C.3, word for word."""
    assert instruction(Problem("1", "1+1?", "2")) == (
        "1+1?\n\nPlease reason step by step, and put your final answer within \\boxed{}.")
    assert instruction(Problem("1", "Which?", "B", {"A": "x", "B": "y"})) == (
        "Which?\n\nA. x\nB. y\n\nPlease show your choice in the answer field with only the "
        'choice letter, e.g., "ANSWER": "C".')


@pytest.mark.parametrize("content, message", [
    (b"", "FILE: found no record, expected JSON lines or a JSON list of problems"),
    (b"[]", "FILE: found no record, expected JSON lines or a JSON list of problems"),
    (b'{"problem": "a", "answer": 1}\n{"problem": "b", "ans\n',
     "FILE:2: not JSON: Unterminated string"),
    (b'[{"problem": "a", "answer": 1},', "FILE: not JSON: Expecting value"),
    (b'{"problem": "\xff"}', "FILE:1: not JSON: 'utf-8' codec"),
    (b"[" * 100_000, "FILE: not JSON: maximum recursion"),
    (b'{"answer": 1}',
     "FILE:1: problem: found nothing, expected the text of a `problem` or `question`"),
    (b'[{"question": " ", "answer": 1}]', 'FILE: record 1: question: found " ", expected the text'),
    (b'{"problem": "a"}', "FILE:1: answer: found nothing, expected text or a number"),
    (b'{"problem": "a", "answer": null}', "FILE:1: answer: found null, expected text or a number"),
    (b'{"problem": "a", "answer": true}', "FILE:1: answer: found true, expected text or a number"),
    (b'{"problem": "a", "answer": NaN}', "FILE:1: answer: found NaN, expected a finite number"),
    (b'{"problem": "a", "answer": -Infinity}',
     "FILE:1: answer: found -Infinity, expected a finite number"),
    (b'{"problem": "a", "answer": 1e999}',
     "FILE:1: answer: found Infinity, expected a finite number"),
    (b'{"problem": "a", "answer": ' + b"1" * 5000 + b"}", "FILE:1: not JSON: Exceeds the limit"),
    (b'{"problem": "a", "answer": [' + b"1," * 500 + b"1]}",
     "FILE:1: answer: found [1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1,..., "
     "expected text or a number"),
    (b'{"problem": "a\\ud800", "answer": 1}',
     "FILE:1: problem: found a lone surrogate at character 2, expected Unicode text"),
    (b'[{"question": "a", "answer": "\\udfff"}]',
     "FILE: record 1: answer: found a lone surrogate at character 1"),
    (b'{"id": "\\ud800", "problem": "a", "answer": 1}',
     "FILE:1: id: found a lone surrogate at character 1"),
    (b'{"problem": "a", "answer": "A", "options": ["x\\ud800", "y"]}',
     "FILE:1: options: found a lone surrogate"),
    (b'{"problem": "a", "answer": "A", "options": []}',
     "FILE:1: options: found [], expected letters A to F"),
    (b'{"problem": "a", "answer": "A", "choices": "xy"}',
     'FILE:1: choices: found "xy", expected letters A to F'),
    (b'["a"]', "FILE: record 1: found str, expected a JSON object"),
    (b'3', "FILE:1: found int, expected a JSON object"),
    (b'{"problem": "a", "answer": "C", "options": ["x", "y"]}',
     'FILE:1: answer: found "C", expected one of the letters A, B'),
    (b'{"problem": "a", "answer": "A", "options": "xy"}',
     'FILE:1: options: found "xy", expected letters A to F'),
    (b'{"problem": "a", "answer": "G", "options": [1, 2, 3, 4, 5, 6, 7]}',
     "FILE:1: options: found [1, 2, 3"),
    (b'{"id": 1, "problem": "a", "answer": 1}\n{"id": "1", "problem": "b", "answer": 2}',
     'FILE:2: id: found "1", expected an id of its own'),
    (b'{"id": null, "problem": "a", "answer": 1}',
     "FILE:1: id: found null, expected an id of its own")])
def test_each_bad_file_gets_one_clear_line(tmp_path, content, message):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(content)
    with pytest.raises(ValueError) as error:
        read_problems(path)
    assert str(error.value).startswith(message.replace("FILE", str(path)))
    assert "\n" not in str(error.value)


AIME = [["ID", "Year", "Problem Number", "Question", "Answer", "Part"],
        ["1983-1", "1983", "1", 'Let $x$, "so"\nto say', "060", ""],
        ["2023-II-15", "2023", "15", "Find $m+n$.", "958", "II"],
        ["2024-I-1", "2024", "1", "Every morning", "204", "I"]]
GPQA = [["Question", "Correct Answer", "Incorrect Answer 1", "Incorrect Answer 2",
         "Incorrect Answer 3", "Record ID"]] + [
    [f"Which, {n}?", f"right {n}\n", f"wrong {n}", f"bad, {n}", f"off {n}", f"rec{n}"]
    for n in range(40)]


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """{dataset: {file: rows of a CSV, or records}} stands in for the Hub."""
    sets = {}

    def snapshot_download(repo, repo_type, allow_patterns):
        assert repo_type == "dataset"
        if isinstance(sets[repo], Exception):
            raise sets[repo]
        for name, content in sets[repo].items():
            path = tmp_path / repo / name
            if any(path.match(pattern) for pattern in allow_patterns):
                path.parent.mkdir(parents=True, exist_ok=True)
                if name.endswith(".csv"):
                    with open(path, "w", newline="") as file:
                        csv.writer(file).writerows(content)
                else:
                    lines = "\n".join(map(json.dumps, content))
                    path.write_text(lines if name.endswith("l") else json.dumps(content))
        return str(tmp_path / repo)

    monkeypatch.setattr(room.huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.setattr(room.huggingface_hub, "list_repo_files",
                        lambda repo, repo_type: ["README.md", *sets[repo]])
    return sets


def test_hub_sets_of_mathematics(hub):
    hub["di-zhang-fdu/AIME_1983_2024"] = {"AIME_Dataset_1983_2024.csv": AIME}
    assert read_problems("hf:di-zhang-fdu/AIME_1983_2024") == [
        Problem("1983-1", 'Let $x$, "so"\nto say', "060"),
        Problem("2023-II-15", "Find $m+n$.", "958")]
    hub["opencompass/AIME2025"] = {
        "aime2025-II.jsonl": [{"question": "c", "answer": "3"}],
        "aime2025-I.jsonl": [{"question": "a", "answer": "1"}, {"question": "b", "answer": "2"}]}
    assert read_problems("hf:opencompass/AIME2025") == [
        Problem("1", "a", "1"), Problem("2", "b", "2"), Problem("3", "c", "3")]
    assert [p.answer for p in read_problems("hf:opencompass/AIME2025/aime2025-II.jsonl")] == ["3"]


PARQUET_ONLY = {
    "HuggingFaceH4/aime_2024": "data/train-00000-of-00001.parquet",
    "MathArena/hmmt_feb_2025": "data/train-00000-of-00001.parquet",
    "MathArena/brumo_2025": "data/train-00000-of-00001.parquet",
    "allenai/ZebraLogicBench": "mc_mode/test-00000-of-00001.parquet"}


@pytest.mark.parametrize("name", PARQUET_ONLY)
def test_a_set_of_parquet_alone_is_refused_with_the_place_where_json_lies(hub, name):
    hub[name] = {PARQUET_ONLY[name]: []}
    with pytest.raises(ValueError) as error:
        read_problems(f"hf:{name}")
    for word in (f"hf:{name}: found README.md, {PARQUET_ONLY[name]}", "bijiaxihh/STOP",
                 "data/benchmark", "aime_2024, aime_2025, brumo_2025, hmmt_25", "zebralogic_hard"):
        assert word in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content, expected", [
    ("""[
    {
      "problem": "Every day Ana walks $9$ km.",
      "solution": "$204$ minutes.\\n It is \\\\boxed{204}.",
      "answer": "025",
      "year": 2024,
      "aime_number": 1,
      "problem_number": 1,
      "difficulty": 2
    }
]
""", Problem("1", "Every day Ana walks $9$ km.", "025")),
    ("""[{"problem_idx":1,"problem":"Circles $C_{1}$ ?\\n","answer":"2^{99}","""
     """"problem_type":["Geometry"]}]""",
     Problem("1", "Circles $C_{1}$ ?\n", "2^{99}")),
    ("""[{"id": "61", "problem": "Bases", "answer": "70"}]""", Problem("61", "Bases", "70")),
    ("""[{"problem": "Who?", "options": {"A": "a", "B": "b", "C": "c", "D": "d", "E": "e", """
     """"F": "f"}, "answer": "F"}]""",
     Problem("1", "Who?", "F", dict(zip("ABCDEF", "abcdef"))))])
def test_the_json_lists_of_the_authors_repository_are_read(tmp_path, content, expected):
    """Their spelling and keys (data/benchmark of github.com/bijiaxihh/STOP), other content."""
    (tmp_path / "set.json").write_text(content)
    assert read_problems(tmp_path / "set.json") == [expected]


def test_gpqa_is_shuffled_the_same_way_each_time(hub):
    hub["Idavidrein/gpqa"] = {"gpqa_diamond.csv": GPQA, "gpqa_main.csv": GPQA[:3],
                              "gpqa_experts.csv": [["Name"]]}
    problems = read_problems("hf:Idavidrein/gpqa")
    assert problems == read_problems("hf:Idavidrein/gpqa")
    # whatever else is in the file
    assert problems[:2] == read_problems("hf:Idavidrein/gpqa/gpqa_main.csv")
    for n, problem in enumerate(problems):
        assert problem.id == f"rec{n}" and problem.kind == "choice"
        assert list(problem.options) == list("ABCD")
        assert problem.options[problem.answer] == f"right {n}"  # and no line end behind it
        texts = {f"right {n}", f"wrong {n}", f"bad, {n}", f"off {n}"}
        assert set(problem.options.values()) == texts
    letters = [problem.answer for problem in problems]
    assert len(problems) == 40 and all(3 < letters.count(letter) < 18 for letter in "ABCD")


class Response:
    """What an HfHubHTTPError asks of its response."""
    headers, request, status_code = {}, None, 403


@pytest.mark.parametrize("content, name, messages", [
    (GatedRepoError("403 Client Error.\n\nAccess to it is restricted.", response=Response()),
     "Idavidrein/gpqa",
     ["hf:Idavidrein/gpqa: not cached", "access is gated",
     "https://huggingface.co/datasets/Idavidrein/gpqa", "login"]),
    (LocalEntryNotFoundError("Got: ConnectError: no name\nAn error happened"), "a/b",
     ["hf:a/b: not cached", "fetched: Got: ConnectError: no name (", "connect once"]),
    (HTTPError("timed out"), "a/b", ["hf:a/b: not cached", "fetched: timed out (", "connect once"]),
    ({"data/train-00000-of-00001.parquet": []}, "a/b",
     ["hf:a/b: found README.md, data/train-00000-of-00001.parquet",
     "parquet needs converting to JSON lines first"]),
    ({"data/train.parquet": []}, "a/b/data/train.parquet",
     ["hf:a/b/data/train.parquet: found", "parquet needs"]),
    ({"x.json": [], "y.jsonl": []}, "a/b",
     ["hf:a/b: found README.md, x.json, y.jsonl", "hf:a/b/FILE"]),
    ({"x.json": []}, "a/b/y.json", ["hf:a/b/y.json: found README.md, x.json"]),
    ({"x.csv": GPQA[:1] + [GPQA[1][:4]]}, "a/b",
     ["x.csv: record 1: correct answer", "three `incorrect answer`s"]),
    ({"x.csv": [["Question", "Answer"], ["1,000?", "5", "9"]]}, "a/b",
     ['x.csv: record 1: surplus: found ["9"]']),
    ({"x.csv": [["Question", "Answer"], ["1?"]]}, "a/b", ["x.csv: record 1: answer: found null"]),
    ({"x.json": [{"question": "?", "puzzle": "five houses", "choices": ["x", "y"],
                  "answer": "???"}]}, "a/b",
     ['x.json: record 1: answer: found "???", expected one of the letters A, B'])])
def test_what_the_hub_does_not_give_is_said_in_one_line(hub, content, name, messages):
    hub["/".join(name.split("/")[:2])] = content
    with pytest.raises(ValueError) as error:
        read_problems(f"hf:{name}")
    assert "\n" not in str(error.value)
    for message in messages:
        assert message in str(error.value)


@pytest.mark.parametrize("content", [b"question,answer\n\xff,1\n", b'question,answer\n"open,1\n'])
def test_a_damaged_csv_is_named(tmp_path, content):
    (tmp_path / "p.csv").write_bytes(content)
    with pytest.raises(ValueError, match="p.csv: not CSV: "):
        read_problems(tmp_path / "p.csv")


def test_problem_kind_follows_the_options():
    assert Problem("1", "q", "5").kind == "math"
    assert Problem("1", "q", "A", {"A": "x"}).kind == "choice"


def test_a_key_of_json_may_have_any_name(tmp_path):
    (tmp_path / "p.jsonl").write_text('{"surplus": 1, "problem": "a", "answer": 1, "a\\nb": NaN}')
    assert read_problems(tmp_path / "p.jsonl") == [Problem("1", "a", "1")]


def test_a_nul_in_a_csv_is_named(tmp_path):
    (tmp_path / "p.csv").write_bytes(b"question,answer\nwhat\0,1\n")
    with pytest.raises(ValueError, match="p.csv: not CSV: .*NUL"):
        read_problems(tmp_path / "p.csv")


def test_a_year_that_is_none_is_refused_and_not_dropped(hub):
    hub["di-zhang-fdu/AIME_1983_2024"] = {"a.csv": [AIME[0], ["x", "", "1", "Find", "1", ""]]}
    with pytest.raises(ValueError, match='a.csv: record 1: year: found "", expected a year'):
        read_problems("hf:di-zhang-fdu/AIME_1983_2024")


@pytest.mark.parametrize("name", ["missing.jsonl", "missing.csv", "missing\nfile.json"])
def test_a_missing_file_is_one_line_whatever_its_name(tmp_path, name):
    with pytest.raises(ValueError) as error:
        read_problems(tmp_path / name)
    assert "missing" in str(error.value) and "cannot be read: " in str(error.value)
    assert str(error.value).isprintable()


def test_a_complaint_is_one_line_whatever_path_and_keys_hold(tmp_path):
    path = tmp_path / "two\nlines\x1b.jsonl"  # ASCII: a plain locale can name it
    for content in ('{"problem": "a"}', "{", '["a"]', "",
                    '{"a\\nb": "\\u2028", "problem": "x\\ny", "answer": ["\\n"]}'):
        path.write_text(content)
        with pytest.raises(ValueError) as error:
            read_problems(path)
        assert str(error.value).isprintable() and r"two\nlines\x1b.jsonl" in str(error.value)


def test_a_hub_listing_is_cut(hub):
    hub["a/b"] = {f"{n}.json": [] for n in range(1000)}
    with pytest.raises(ValueError) as error:
        read_problems("hf:a/b")
    assert len(str(error.value)) < 400 and "hf:a/b/FILE" in str(error.value)


def lines(path, *records):
    path.parent.mkdir(exist_ok=True)
    path.write_text("\n".join(map(json.dumps, records)))
    return str(path)


def test_several_sources_are_read_one_after_another(tmp_path):
    a = lines(tmp_path / "a.jsonl", {"id": "x", "problem": "1?", "answer": 1},
              {"id": "y", "problem": "2?", "answer": 2})
    b = lines(tmp_path / "b.jsonl", {"id": "z", "problem": "3?", "answer": 3})
    for paths in (f"{b},{a}", f" {b} , {a} ,", [b, a], (Path(b), Path(a))):
        assert [problem.id for problem in read_sources(paths)] == ["z", "x", "y"]
    for path in (a, [a], Path(a)):
        assert read_sources(path) == read_problems(a)


def test_ids_that_two_sources_share_are_told_apart_by_the_source(tmp_path, hub):
    hub["Idavidrein/gpqa"] = {"gpqa_main.csv": GPQA[:2]}
    a = lines(tmp_path / "a.jsonl", {"problem": "1?", "answer": 1},
              {"id": "y", "problem": "2?", "answer": 2})
    b = lines(tmp_path / "b.jsonl", {"problem": "3?", "answer": 3})
    c = lines(tmp_path / "c" / "a.jsonl", {"problem": "4?", "answer": 4})
    gpqa = "hf:Idavidrein/gpqa/gpqa_main.csv"
    ids = [problem.id for problem in read_sources([a, b, gpqa])]
    assert ids == ["a/1", "a/y", "b/1", "gpqa_main/rec0"]
    assert [problem.id for problem in read_sources([a, c])] == ["1-a/1", "1-a/y", "2-a/1"]
    assert [problem.problem for problem in read_sources([a, c])] == ["1?", "2?", "4?"]
    assert [problem.id for problem in read_sources([c, gpqa])] == ["1", "rec0"]


@pytest.mark.parametrize("paths", ["", " , ", [], ()])
def test_no_source_is_refused(paths):
    with pytest.raises(ValueError, match="data: found no source"):
        read_sources(paths)


def test_a_local_copy_of_aime_is_cut_at_the_same_year(tmp_path):
    """Recognised by its columns: the paper tests on the years after 2023."""
    file = tmp_path / "aime.csv"
    with open(file, "w", newline="") as stream:
        csv.writer(stream).writerows(AIME)
    assert [problem.id for problem in read_problems(file)] == ["1983-1", "2023-II-15"]
    file = tmp_path / "mine.jsonl"
    file.write_text(json.dumps({"problem": "a", "answer": "1", "year": 2024}))
    assert [problem.answer for problem in read_problems(file)] == ["1"]


@pytest.mark.parametrize("one, other, same", (
    ("Find $x$ if $x+1=2$.", "Find x if x + 1 = 2.", True),
    ("Find \\(x\\).", "find $x$.", True),
    ("Find $\\frac{1}{2}$.", "Find \\frac12.", True),
    ("Find $x+1$.", "Find $x-1$.", False),
    ("Find $2(3+4)$.", "Find $23+4$.", False),
    ("Find $1.5$.", "Find $15$.", False)))
def test_a_text_in_other_dress_is_the_same(one, other, same):
    first = Problem("a", one, "1")
    second = Problem("b", other, "1")
    assert without_held_out([first], [second]) == (([], [first]) if same else ([first], []))
    kept, dropped = without_repeats([first, second])
    assert (kept, dropped) == (([first], [second]) if same else ([first, second], []))


def test_choices_with_other_options_are_other_problems():
    first = Problem("a", "Which?", "A", {"A": "1", "B": "2"})
    second = Problem("b", "Which?", "A", {"A": "3", "B": "2"})
    third = Problem("c", "Which ?", "B", {"A": "1", "B": "2"})
    assert without_repeats([first, second, third]) == ([first, second], [third])


def test_held_out_problems_are_dropped_by_their_text_and_reported():
    tests = [Problem("t", "What is\n1 + 1?", "2")]
    kept = Problem("b", "What is 2 + 1?", "3")
    dropped = Problem("a", " What  is 1 + 1? ", "2")
    assert without_held_out([dropped, kept], tests) == ([kept], [dropped])
    assert without_held_out([dropped, kept], []) == ([dropped, kept], [])


def test_svamp_is_read_as_published(tmp_path):
    """Its records split a problem into a story and a question, and have floats as answers."""
    file = tmp_path / "svamp.json"
    file.write_text(json.dumps([{
        "ID": "chal-1",
        "Body": "Each pack costs 76 dollars. If there is a discount of 25 dollars ",
        "Question": "How much do you have to pay?",
        "Equation": "( 76.0 - 25.0 )",
        "Answer": 51.0,
        "Type": "Subtraction"}]))
    (problem,) = read_problems(file)
    assert problem.problem == (
        "Each pack costs 76 dollars. If there is a discount of 25 dollars How much do you have to "
        "pay?")
    assert problem.answer == "51"
    assert problem.id == "chal-1"


def one(tmp_path, **record):
    """The Problem of a record."""
    (tmp_path / "one.jsonl").write_text(json.dumps(record))
    (problem,) = read_problems(tmp_path / "one.jsonl")
    return problem


def complaint(tmp_path, **record):
    """What is wrong with a record, behind the place."""
    with pytest.raises(ValueError) as error:
        one(tmp_path, **record)
    message = str(error.value)
    assert "\n" not in message
    return message.removeprefix(f"{tmp_path}/one.jsonl:1: ")


@pytest.mark.parametrize("behind, answer", (
    ("18", "18"), (" 1,200", "1200"), ("-5", "-5"), ("$18", "18"),
    ("-$1,234,567.50", "-1234567.50"), ("$-3", "-3"), ("\\$7", "7"), (" 3.5 \n", "3.5"), ("0", "0"),
    ("1/2", "1/2"), ("x=2", "x=2"), ("7:30", "7:30"), ("12,34", "12,34"), ("5%", "5%")))
def test_gsm8k_is_read_as_published(tmp_path, behind, answer):
    """The reference is what stands behind the last ####."""
    solution = f"She sells 48/2 = <<48/2=24>>24.\n#### no\nAltogether 24+48.\n####{behind}"
    problem = one(tmp_path, question="How many?", answer=solution)
    assert (problem.answer, problem.problem, problem.kind) == (answer, "How many?", "math")


@pytest.mark.parametrize("solution, answer", (
    ("So $x = \\boxed{204}$.", "204"), ("First \\boxed{1}.\n\nThen $\\boxed{2}$.", "2"),
    ("$\\boxed{\\frac{1}{2}}$", "\\frac{1}{2}"), ("a \\fbox{7}", "7"), ("So $\\boxed 5$.", "5"),
    ("$\\boxed{\\text{(C)}}$", "\\text{(C)}"), ("\\boxed{3} and \\boxed{4", "3")))
def test_math_is_read_as_published(tmp_path, solution, answer):
    """problem, level, type, solution: the last balanced box is the reference."""
    problem = one(tmp_path, problem="?", level="Level 5", type="Algebra", solution=solution)
    assert (problem.answer, problem.kind) == (answer, "math")


def test_an_answer_comes_before_a_solution(tmp_path):
    assert one(tmp_path, problem="?", solution="\\boxed{1}", answer="2").answer == "2"


@pytest.mark.parametrize("solution", ("The answer is 5.", "\\boxed{5", "\\boxed{}", "", "42"))
def test_a_solution_without_a_box_is_refused(tmp_path, solution):
    message = complaint(tmp_path, problem="?", solution=solution)
    assert message.startswith("solution: found ")


@pytest.mark.parametrize("answer", (
    "She has 48/2 = <<48/2=24>>24 clips.", "First 5.\nThen 6.", "x" * 301, "5\n\n6", "####",
    "She had five of them in the morning, then gave two to her brother and bought another four at "
    "the shop, so seven.", "$1$" * 200, "It is \\boxed{5", "#### 5\nor 6"))
def test_an_answer_that_is_a_solution_is_refused(tmp_path, answer):
    message = complaint(tmp_path, problem="?", answer=answer)
    assert message.startswith("answer: found ")
    assert "\\boxed{}" in message and "behind ####" in message


@pytest.mark.parametrize("answer", (
    "\\frac{1}{2}", "(-\\infty, 3) \\cup (5, \\infty)", "Yes, for all real numbers", "x" * 300,
    "\\begin{pmatrix} 1 \\\\\n2 \\end{pmatrix}", "a << b", "x=1, y=2", "10:30", "#5",
    "\\frac{a}{b} + " * 15 + "1"))
def test_an_answer_that_is_one_is_left_as_it_is(tmp_path, answer):
    assert one(tmp_path, problem="?", answer=answer).answer == answer


def test_a_boxed_answer_is_what_is_in_its_box(tmp_path):
    assert one(tmp_path, problem="?", answer="So it is $\\boxed{5}$.").answer == "5"


@pytest.mark.parametrize("key", ("question", "Question"))
@pytest.mark.parametrize("answer, expected", (
    ("9 (apples)", "9"), ("3 (feet); 4 (inches)", "3, 4"), ("2:05", "2:05"), ("145.0", "145.0"),
    (145.0, "145"), ("$5", "$5"), ("(1, 2)", "(1, 2)")))
def test_asdiv_is_read_as_published(tmp_path, key, answer, expected):
    """Its answers have their units behind them."""
    problem = one(tmp_path, Body="Seven red apples.", **{key: "How many?"}, Answer=answer,
                  Formula="7+2=9")
    assert (problem.problem, problem.answer) == ("Seven red apples. How many?", expected)


def test_svamp_with_both_texts_in_one(tmp_path):
    whole = {"question_concat": "A story. How many?", "Answer": "9.0"}
    assert one(tmp_path, **whole).problem == "A story. How many?"
    assert one(tmp_path, **whole, Body="A story.", Question="How many?").problem == (
        "A story. How many?")


@pytest.mark.parametrize("options", (
    ["A)21", "B)21.5", "C)22"], ["A) 21", "B) 21.5", "C) 22"], ["(A) 21", "(B) 21.5", "(C)22"],
    ["A. 21", "B. 21.5", "C. 22"], ["21", "21.5", "22"]))
def test_aqua_is_read_as_published(tmp_path, options):
    """Options that hold their letters, the answer under `correct`."""
    problem = one(tmp_path, question="?", options=options, rationale="long\ntext", correct="B")
    assert problem.answer == "B"
    assert problem.options == {"A": "21", "B": "21.5", "C": "22"}


def test_options_that_only_look_like_letters_are_left(tmp_path):
    problem = one(tmp_path, question="?", options=["B) 1", "A) 2"], answer="A")
    assert problem.options == {"A": "B) 1", "B": "A) 2"}
    assert complaint(tmp_path, question="?", options=["A)1"], correct="F").startswith(
        'correct: found "F", expected one of the letters A')


@pytest.mark.parametrize("record, key", (
    ('{"problem": "a", "answer": 1, "answer": 2}', "'answer': found this key twice"),
    ('{"problem": "a", "answer": 1, "Answer": 2}', "Answer: found this key twice, in upper and"),
    ('{"PROBLEM": "a", "Problem": "b", "answer": 2}', "Problem: found this key twice")))
def test_a_key_that_stands_twice_is_refused(tmp_path, record, key):
    (tmp_path / "a.jsonl").write_text(record)
    with pytest.raises(ValueError, match=f"a.jsonl:1: {key}"):
        read_problems(tmp_path / "a.jsonl")


@pytest.mark.parametrize("header, message", (
    ("question,answer,answer", "answer: found this column twice"),
    ("question;answer", "found the header 'question;answer', expected commas"),
    ("question|answer", "found the header 'question|answer', expected commas"),
    ("question\tanswer", "found cells between tabs"),
    ('"question"\t"answer"', "found cells between tabs")))
@pytest.mark.parametrize("name", ("p.csv", "P.CSV"))
def test_a_csv_of_other_columns_is_named(tmp_path, name, header, message):
    (tmp_path / name).write_text(f"{header}\n1+1?,2,3\n")
    with pytest.raises(ValueError) as error:
        read_problems(tmp_path / name)
    assert str(error.value).startswith(f"{tmp_path / name}: {message}")
