"""Reader, extractor and grader: spellings, hostile input, every complaint, and files that survive a kill."""
import json
import os
import time

import pytest

import task
from task import (Problem, extract_answer, instruction, open_for_append, read_problems, read_records, same_answer,
                  write_atomic)

PUBLISHED = [r"2^{25} \cdot 26!", r"1-\frac{2}{\pi}", r"2,3,\frac{3+i\sqrt{3}}{2},\frac{3-i\sqrt{3}}{2}",
             r"\sqrt{\frac{95}{24}}", r"\frac{-1+\sqrt{17}}{2}, \frac{-1-\sqrt{17}}{2}", r"\sqrt{23}-2 \sqrt{3}",
             r"2^{99}", r"\frac{1}{9}", r"3+2\sqrt{2}", r"20\pi", r"-\frac{2431}{50}", r"\frac{9\sqrt{30}}{4}", "025",
             "204"]

EQUAL = [
    ("025", "25"), ("1,234", "1234"), ("1{,}234", "1234"), (r"1,\!234", "1234"), (r"12,345\text{ km}", "12345"),
    ("1.50", "1.5"), ("1.5", "3/2"), ("3/2", r"1\frac{1}{2}"), (r"1\frac12", "1.5"), (r"-1\frac{1}{2}", "-1.5"),
    (r"2\frac{5}{3}", "10/3"), (r"-\frac{1}{2}", r"\frac{-1}{2}"), (r"-\frac{1}{2}", "-.5"),
    (r"\dfrac{3}{4}", r"\tfrac34"),
    (r"\frac 1 2", "0.5"), (r"\frac1{23}", "1/23"), (r"\frac\pi2", r"0.5\pi"), ("0.33333333333", "1/3"),
    ("1e-3", "10^{-3}"),
    (r"2\sqrt3", r"\sqrt{12}"), (r"\sqrt 23", r"3\sqrt{2}"), ("√12", r"2\sqrt{3}"), (r"\sqrt[3]{-8}", "-2"),
    (r"\sqrt[3]{2}", "2^{1/3}"), (r"\left(\frac{1}{2}\right)^{2}", ".25"), ("-2^2", "-4"), ("2^{3^{2}}", "2^3^2"),
    (r"2\cdot-3", "-6"), ("3!!", "720"), ("20π", r"\pi\times 20"), ("−5", "-5"), (r"i^2", "-1"), (r"2\mathrm{i}", "2i"),
    (r"50\%", "50"), (r"90^\circ", "90"), (r"90^{\circ}", "90"), (r"\$12", "12"), (r"$12.$", "12"),
    ("12 apples", "12"), ("3 cm, 5 cm", "5,3"),
    (r"5\text{ cm}^2", "5"), (r"5\,\mathrm{cm}", "5"), ("x=5", "5"), ("f(1,2)=5", "5"), (r"\boxed{5}", "5"),
    (r"\text{(C)}", "c"), (r"\boxed{\textbf{(C)}}", "C"), (r"\text{Even}", "even"), ("x^{2}+1", "x^2 + 1"),
    ("3, 2", "2,3"), (r"\{1,2\}", "2, 1"), ("x=1, x=2", "2,1"), (r"2\text{ and }3", "2,3"), ("100,200", "200, 100"),
    (r"\pm 3", "3,-3"), ("(1,2)", "(1, 2)"), ("1,2", "(1,2)"), (r"(0.5, 3)", r"(\frac{1}{2},3)"),
    ("(1,2),(3,4)", "(3,4),(1,2)"),
    (r"[0,\infty)", r"\left[0, \infty\right)"), (r"26! \times 33554432", PUBLISHED[0]),
    (r"\frac{\pi-2}{π}", PUBLISHED[1]),
    (r"\frac{3 \pm i\sqrt3}{2}, 3, 2", PUBLISHED[2]), (r"\frac{\sqrt{570}}{12}", PUBLISHED[3]),
    (r"\frac{-1 \pm \sqrt{17}}{2}", PUBLISHED[4]), (r"-\sqrt{12}+\sqrt{23}", PUBLISHED[5]),
    (r"18\frac{35}{39}", "737/39")]

UNEQUAL = [
    ("1", "2"), ("(1,2)", "(2,1)"), ("2,1", "(1,2)"), ("[1,2]", "(1,2)"), ("1,2", "1,2,2"), ("1,1,2", "1,2,2"),
    ("C", "D"),
    ("2^{99}", "2^{99}+1"), (r"2^{25} \cdot 26!", r"2^{25} \cdot 26! - 1"), ("0.333", "1/3"), ("50%", "0.5"),
    ("10 000", "0"), ("10 000", "10"), (r"\frac{x}{yz}", r"\frac{xy}{z}"), ("x", "y"), ("x=", "y="), (",2", "2,-2"),
    ("5", "x"),
    (r"(0,\infty)", r"[0,\infty)"), (r"\Delta", r"\delta"), ("0.5^{2000}", "0"), ("1/0", "2/0"), ("", ""), (" ", " "),
    (None, None), (None, "1"), ("1", None), ([], []), (b"1", "1")]


@pytest.mark.parametrize("a, b", EQUAL)
def test_equal_spellings(a, b):
    assert same_answer(a, b) is True and same_answer(b, a) is True


@pytest.mark.parametrize("a, b", UNEQUAL)
def test_unequal_answers(a, b):
    assert same_answer(a, b) is False


def test_a_reference_list_without_brackets_asks_for_no_order():
    assert same_answer("(3,2)", "2,3") and not same_answer("2,3", "(3,2)")


def test_published_answers_are_read_as_numbers_and_differ():
    for a in PUBLISHED:
        assert not any(isinstance(value, str) for value in task._readings(a)), a
        assert [b for b in PUBLISHED if same_answer(b, a)] == [a]
        assert same_answer(extract_answer(rf"So \boxed{{{a}}}."), a)


def test_choice_answers_compare_as_letters():
    for spelling in ("C", "c", "(C)", r"\text{C}", r"\textbf{(C)}", "**C**", '"C"'):
        assert same_answer(spelling, "C", "choice") and not same_answer(spelling, "D", "choice")
    assert not same_answer("5", "5", "choice") and not same_answer(None, None, "choice")


MATH = [
    (r"So \boxed{5}", "5"), (r"\boxed{ 38 }", "38"), (r"\boxed{\frac{1}{\sqrt{2}}}", r"\frac{1}{\sqrt{2}}"),
    (r"\fbox{7}", "7"),
    (r"\boxed{1} or \boxed{2}", "2"), (r"\boxed{1} then \boxed{\frac{1}{2", "1"), (r"\boxed{3 and \boxed{4}", "4"),
    (r"\boxed{\boxed{5}}", "5"), (r"\boxed {6}", "6"), (r"} \boxed{\{1,2\}} {", r"\{1,2\}"),
    (r"\boxed{5}, thus \boxed{}", "5"),
    (r"<think>\boxed{1}</think>\boxed{2}", "2"), (r"\boxed{1}</think> no box", None), (r"<think>\boxed{1}", None),
    (r"<think>a</think>\boxed{1}<think>\boxed{2}", None), (r"\boxed{1}</think>\boxed{2}</think>\boxed{3}", "3"),
    ("no box", None), ("", None), (r"\boxed{12}<|im_end|>", "12"), (r"\boxed{12<｜end▁of▁sentence｜>}", "12"),
    (r"<|channel|>analysis<|message|>\boxed{1}<|end|><|start|>assistant<|channel|>final<|message|>\boxed{2}<|return|>",
     "2"),
    (r"<|channel|>final<|message|>\boxed{1}<|end|><|start|>assistant<|channel|>analysis<|message|>\boxed{2}<|end|>",
     "1"),
    (r"<|channel|>final<|message|>\boxed{1}<|end|><|channel|>final<|message|>\boxed{2}<|return|>\boxed{3}", "2"),
    (r"<|channel|>analysis<|message|>\boxed{1}", None), (None, None), (5, None), (b"\\boxed{5}", None)]

CHOICE = [
    ('"ANSWER": "C"', "C"), ("Answer: (b)", "B"), ("**Answer:** D", "D"), (r"Answer: \boxed{\text{E}}", "E"),
    ("answer: f.", "F"),
    ("Answer: A\nno, Answer: B", "B"), ("Answer: option C because", "C"), (r"\boxed{A} Answer: B", "B"),
    (r"It is \boxed{\textbf{(D)}}", "D"), ("reasons\n\n(C)\n", "C"), ("reasons\n**c**<|im_end|>", "C"),
    ("A is tempting", None),
    ("Answer: a good question. \\boxed{B}", "B"), ("Answer: C6H6", None), ("Answer: G", None),
    ("Answer: Because", None),
    ("<think>Answer: A", None), ("<think>Answer: A</think>Answer: B", "B"), ("", None), (None, None)]


@pytest.mark.parametrize("text, expected", MATH)
def test_extract_math(text, expected):
    assert extract_answer(text) == expected


@pytest.mark.parametrize("text, expected", CHOICE)
def test_extract_choice(text, expected):
    assert extract_answer(text, kind="choice") == expected


def test_extract_whole_ignores_where_thinking_ends():
    assert extract_answer(r"<think>\boxed{1}", whole=True) == "1"
    assert extract_answer(r"<|channel|>analysis<|message|>\boxed{1}", whole=True) == "1"


def test_hostile_input_neither_raises_nor_hangs():
    hostile = ["9^{9^{9^9}}", "10000000!", "(" * 100_000 + ")" * 100_000, "(" * 199 + "1" + ")" * 199, "(" * 400,
               "-" * 400,
               "\\" * 1_000_000, "1e999", "1e99999999", "0/0", "0^{-1}", r"\sqrt[0]{2}", r"\frac{" * 66, r"\sqrt" * 80,
               r"\frac{1}{" * 40 + "1" + "}" * 40, "2^" * 199 + "2", "1/9^{99}" * 40, "!" * 400, "5" + "!" * 300,
               "=" * 400,
               ",".join("1" * 200), ",".join(map(str, range(100))), r"\pm," * 100, r"\text{" * 60, "\ud800", "\x00",
               "٣", "^",
               r"(1+i)^{10^{10}}", "1^{10^{200}}", "e^{10^{200}}", r"\boxed{" * 50_000,
               r"\boxed{" * 30_000 + "}" * 30_000,
               "{" * 300_000, "answer:" * 30_000, "<|" * 100_000, r"\boxed" + " " * 300_000, "A" * 300_000,
               "<|channel|>" * 10_000,
               None, 1, 2.5, float("nan"), float("inf"), 10 ** 5000, b"x", [], {}, object()]
    start = time.process_time()
    for x in hostile:
        for kind in ("math", "choice"):
            assert extract_answer(x, kind) is None or isinstance(x, str)
            for answer, reference in ((x, "7"), ("7", x), (x, x)):
                assert same_answer(answer, reference, kind) in (True, False)
        assert not same_answer(x, "7")
    assert time.process_time() - start < 1


def test_read_problems_from_lines_and_lists(tmp_path):
    records = [{"problem": "1+1?", "answer": 2, "year": 1983}, {"id": "q", "question": "2+2?", "answer": " 4 "},
               {"problem_idx": 9, "question": "Which?", "answer": "B", "options": ["x", "y"]},
               {"id": 7, "problem": "Which?", "answer": "F", "options": dict(zip("ABCDEF", "uvwxyz"))}]
    lines, listed = tmp_path / "p.jsonl", tmp_path / "p.json"
    lines.write_text("\n\n".join(map(json.dumps, records)), encoding="utf-8-sig")
    listed.write_text(json.dumps(records, indent=1))
    problems = read_problems(lines)
    assert problems == read_problems(str(listed))
    assert [p.id for p in problems] == ["1", "q", "9", "7"]
    assert [p.answer for p in problems] == ["2", "4", "B", "F"]
    assert [p.kind for p in problems] == ["math", "math", "choice", "choice"]
    assert problems[0].extra == {"year": 1983} and problems[2].options == {"A": "x", "B": "y"}
    assert instruction(problems[0]).startswith("1+1?") and "\\boxed{}" in instruction(problems[0])
    assert "A. x\nB. y" in instruction(problems[2]) and '"ANSWER": "C"' in instruction(problems[2])


@pytest.mark.parametrize("content, message", [
    (b"", "FILE: found no record, expected JSON lines or a JSON list of problems"),
    (b"[]", "FILE: found no record, expected JSON lines or a JSON list of problems"),
    (b'{"problem": "a", "answer": 1}\n{"problem": "b", "ans\n', "FILE:2: not JSON: Unterminated string"),
    (b'[{"problem": "a", "answer": 1},', "FILE: not JSON: Expecting value"),
    (b'\xff\xfe', "FILE:1: not JSON: 'utf-8' codec"), (b"[" * 100_000, "FILE: not JSON: maximum recursion"),
    (b'{"answer": 1}', "FILE:1: problem: found nothing, expected the text of a `problem` or `question`"),
    (b'[{"question": " ", "answer": 1}]', 'FILE: record 1: question: found " ", expected the text'),
    (b'{"problem": "a"}', "FILE:1: answer: found nothing, expected text or a number"),
    (b'{"problem": "a", "answer": null}', "FILE:1: answer: found null, expected text or a number"),
    (b'{"problem": "a", "answer": true}', "FILE:1: answer: found true, expected text or a number"),
    (b'["a"]', "FILE: record 1: found str, expected a JSON object"),
    (b'3', "FILE:1: found int, expected a JSON object"),
    (b'{"problem": "a", "answer": "C", "options": ["x", "y"]}',
     'FILE:1: answer: found "C", expected one of the letters A, B'),
    (b'{"problem": "a", "answer": "A", "options": "xy"}', 'FILE:1: options: found "xy", expected letters A to F'),
    (b'{"problem": "a", "answer": "G", "options": [1, 2, 3, 4, 5, 6, 7]}', "FILE:1: options: found [1, 2, 3"),
    (b'{"id": 1, "problem": "a", "answer": 1}\n{"id": "1", "problem": "b", "answer": 2}',
     'FILE:2: id: found "1", expected an id of its own'),
    (b'{"id": null, "problem": "a", "answer": 1}', "FILE:1: id: found null, expected an id of its own")])
def test_each_bad_file_gets_one_clear_line(tmp_path, content, message):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(content)
    with pytest.raises(ValueError) as error:
        read_problems(path)
    assert str(error.value).startswith(message.replace("FILE", str(path))) and "\n" not in str(error.value)


def test_a_killed_writer_goes_on_wherever_it_was_cut(tmp_path):
    path, records = tmp_path / "labels.jsonl", [{"id": i, "text": "é" * i} for i in range(4)]
    whole = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records).encode()
    for cut in range(len(whole) + 1):
        path.write_bytes(whole[:cut])
        done, file = open_for_append(path)
        assert done == records[:len(done)]
        for record in records[len(done):]:
            file.write(json.dumps(record) + "\n")
            assert list(read_records(path))[-1] == (record["id"] + 1, record)     # on disk before any close
        file.close()
        assert [record for _, record in read_records(path)] == records


def test_append_starts_a_missing_file_and_reports_damage_inside(tmp_path):
    path = tmp_path / "new.jsonl"
    done, file = open_for_append(path)
    file.close()
    assert done == [] and path.read_bytes() == b""
    path.write_bytes(b'{"a": 1}\n{"a"\n{"a": 3}\n')
    with pytest.raises(ValueError, match="new.jsonl:2: not JSON"):
        open_for_append(path)
    assert path.read_bytes() == b'{"a": 1}\n{"a"\n{"a": 3}\n'


@pytest.mark.parametrize("failing", ["replace", "fsync"])                # fsync is where a full disk may show
def test_atomic_write_leaves_the_old_file_and_no_litter(tmp_path, monkeypatch, failing):
    path = tmp_path / "a.json"
    write_atomic(path, "old")
    write_atomic(path, b"older")

    def full(*_):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(os, failing, full)
    with pytest.raises(OSError, match="No space"):
        write_atomic(path, "new")
    assert path.read_text() == "older" and os.listdir(tmp_path) == ["a.json"]


def test_problem_kind_follows_the_options():
    assert Problem("1", "q", "5").kind == "math" and Problem("1", "q", "A", {"A": "x"}).kind == "choice"
