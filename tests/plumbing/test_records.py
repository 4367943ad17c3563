"""plumbing/records.py: JSON files, atomic writes, sealed files, and jobs that may be killed at any
moment."""
import hashlib
import itertools
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest
from helpers import ROOT, Fuse, Killed, read_lines

from plumbing import processes, records
from plumbing.records import (
    Job, claim, digest, locked, read_json, read_records, read_sealed, write_atomic, write_sealed)


def refused(function, *args):
    """The one line of the ValueError that a call raises."""
    with pytest.raises(ValueError) as caught:
        function(*args)
    message = str(caught.value)
    assert "\n" not in message
    return message


# --------------------------------------------------------------------------------------- JSON files


@pytest.mark.parametrize("content", (
    b'{"a": 1}', b'\xef\xbb\xbf{"a": 1}', b'  {"a":1}\r\n\n', b'{\n "a": 1\n}'))
def test_an_object_is_read(tmp_path, content):
    """Also with a byte order mark and white space."""
    file = tmp_path / "a.json"
    file.write_bytes(content)
    assert read_json(file) == {"a": 1}
    assert read_json("b.json", content) == {"a": 1}


@pytest.mark.parametrize("content, reason", (
    (b"{'a': 1}", "not JSON: Expecting property name"),
    (b'{"a": 1', "not JSON: "),
    (b"", "not JSON: "),
    (b'{"a": "\xff"}', "not JSON: 'utf-8' codec"),
    (b"[" * 100_000, "not JSON: "),
    (b"9" * 5000, "not JSON: "),
    (b'{"a": 1} {"b": 2}', "not JSON: Extra data"),
    (b"[1]", "found list, expected a JSON object"),
    (b"null", "found NoneType, expected a JSON object"),
    (b'"text"', "found str, expected a JSON object")), ids=lambda value: repr(value)[:40])
def test_a_file_that_is_no_object_is_refused_by_name(tmp_path, content, reason):
    file = tmp_path / "a.json"
    file.write_bytes(content)
    assert refused(read_json, file).startswith(f"{file}: {reason}")


def test_a_list_may_be_expected():
    assert read_json("a.json", b"[1, 2]", list) == [1, 2]
    message = refused(read_json, "a.json", b"{}", list)
    assert message == "a.json: found dict, expected a JSON list"


def test_a_file_that_is_not_there_is_named(tmp_path):
    message = refused(read_json, tmp_path / "none.json")
    assert message == f"{tmp_path / 'none.json'}: cannot be read: No such file or directory"


def test_records_are_numbered_by_their_lines(tmp_path):
    """Blank lines are skipped and counted."""
    file = tmp_path / "a.jsonl"
    file.write_bytes(b'{"a": 1}\n\n  \r\n{"a": 2}\r\n{"a": 3}')
    assert list(read_records(file)) == [(1, {"a": 1}), (4, {"a": 2}), (5, {"a": 3})]


def test_a_bad_record_is_named_by_file_and_line(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_bytes(b'{"a": 1}\n{"a"\n{"a": 3}\n')
    assert refused(list, read_records(file)).startswith(f"{file}:2: not JSON: ")


TWICE = (
    b'{"a": 1, "a": 1}', b'{"a": 1, "b": 2, "a": {}}', b'{"c": {"a": 1, "a": 2}}',
    b'{"c": [[{"b": 0}, {"a": 1, "\\u0061": 2}]]}', b'{"c": {"a": {}, "a": {"a": 1}}}')


@pytest.mark.parametrize("content", TWICE)
def test_a_key_that_stands_twice_is_refused_by_name(tmp_path, content):
    """At any depth, also where both have the same value or another spelling."""
    message = "'a': found this key twice in an object, expected it once"
    assert refused(read_json, "a.json", content) == f"a.json: {message}"
    assert refused(read_json, "a.json", b"[" + content + b"]", list) == f"a.json: {message}"
    (tmp_path / "a.jsonl").write_bytes(b"{}\n" + content)
    assert refused(list, read_records(tmp_path / "a.jsonl")) == f"{tmp_path}/a.jsonl:2: {message}"


def test_a_key_may_stand_in_several_objects():
    assert read_json("a.json", b'{"a": {"a": 1}, "b": [{"a": 1}, {"a": 1}]}')


def test_a_long_key_that_stands_twice_is_cut():
    key = "x\\n" * 5000
    assert len(refused(read_json, "a.json", f'{{"{key}": 1, "{key}": 1}}'.encode())) < 150


def test_many_keys_take_no_long_time():
    keys = ", ".join(f'"{n}": 1' for n in range(200_000))
    start = time.process_time()
    assert "'7'" in refused(read_json, "a.json", f'{{{keys}, "7": 1}}'.encode())
    assert time.process_time() - start < 10


# ------------------------------------------------------------------------------------ whole or not


@pytest.mark.parametrize("content", ("text: ä", b"\x00bytes"))
def test_a_file_is_written_in_place_of_the_old_one(tmp_path, content):
    file = tmp_path / "a"
    write_atomic(file, "old")
    write_atomic(file, content)
    expected = content.encode() if isinstance(content, str) else content
    assert file.read_bytes() == expected
    assert os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize("name", ("open", "fsync", "replace"))  # fsync: where a full disk may show
def test_a_failed_write_leaves_the_old_file_and_no_litter(tmp_path, monkeypatch, name):
    file = tmp_path / "a.json"
    write_atomic(file, "old")

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        if name == "open":
            patch.setattr("builtins.open", full)
        else:
            patch.setattr(os, name, full)
        with pytest.raises(OSError, match="No space"):
            write_atomic(file, "new")
    assert file.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.json"]


def test_writers_at_once_do_not_meet(tmp_path, monkeypatch):
    """Each writes beside under a name of its own; the last to finish wins, whole."""
    file = tmp_path / "a"
    replace = os.replace
    beside = []

    def meet(source, target):
        beside.append(source)
        if len(beside) == 1:
            write_atomic(file, "second")
        replace(source, target)

    monkeypatch.setattr(os, "replace", meet)
    write_atomic(file, "first")
    assert len(set(beside)) == 2
    assert file.read_text() == "first"


WRITE = """
import os, sys, time
from plumbing.records import write_atomic
def stuck(*_):
    print("stuck", flush=True)
    time.sleep(60)
os.replace = stuck
write_atomic(sys.argv[1], "half")
"""


def test_what_a_killed_writer_left_goes_with_the_next_write_of_its_target(tmp_path):
    """While the writer lives, it stays; so does all that has not just such a name."""
    file = tmp_path / "plan.json"
    kept = {
        f"plan.json.{os.getpid()}.0123abcd.tmp", "plan.json.4194303.0123ABCD.tmp",
        "plan.json.4194303.0123abc.tmp", "plan.json.4194303.0123abcd.tmp.txt",
        "plan.json.99999999999999999999.0123abcd.tmp", "other.json.4194303.0123abcd.tmp",
        "xplan.json.4194303.0123abcd.tmp", "plan.json.4194303.0123abcd", "plan.json"}
    (tmp_path / "plan.json.4194303.00000000.tmp").symlink_to("other")
    (tmp_path / "plan.json.4194303.00000001.tmp").mkdir()
    for name in kept:
        (tmp_path / name).write_text("")
    kept |= {"plan.json.4194303.00000000.tmp", "plan.json.4194303.00000001.tmp"}
    writer = subprocess.Popen(
        [sys.executable, "-c", WRITE, str(file)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert writer.stdout.readline() == "stuck\n"
        (left,) = set(os.listdir(tmp_path)) - kept
        write_atomic(file, "new")
        assert set(os.listdir(tmp_path)) == kept | {left}
    finally:
        writer.send_signal(signal.SIGKILL)
        writer.communicate()
    write_atomic(file, "newer")
    assert set(os.listdir(tmp_path)) == kept
    assert file.read_text() == "newer"


# ------------------------------------------------------------------------------- digests and seals


def test_a_digest_is_that_of_the_values():
    """Not of the order of keys; sixteen digits of the SHA-256 of their JSON, in every process."""
    assert digest({"a": 1, "b": [2.5, None]}) == digest({"b": [2.5, None], "a": 1})
    values = [1, 2, "1", 1.5, None, True, [1], [[1]], {"a": 1}, {"a": 2}, {"b": 1}, "é"]
    assert len({digest(value) for value in values}) == len(values)
    assert digest(1, 2) != digest([1, 2]) != digest(12)
    assert digest("known") == hashlib.sha256(b'["known"]').hexdigest()[:16]


def test_a_sealed_file_is_read_as_it_was_written(tmp_path):
    file = tmp_path / "fit.pt"
    content = b"first\nsecond\x00" * 9
    write_sealed(file, "run", content)
    assert read_sealed(file, "run", "remove it") == content


def flip(content):
    return content[:-1] + bytes([content[-1] ^ 1])


@pytest.mark.parametrize("harm", (
    flip, lambda content: content[:-1], lambda content: content + b"x", lambda content: b"",
    lambda content: content[1:], lambda content: b"\xff" + content))
def test_a_changed_sealed_file_is_refused(tmp_path, harm):
    file = tmp_path / "fit.pt"
    write_sealed(file, "run", b"content")
    file.write_bytes(harm(file.read_bytes()))
    message = refused(read_sealed, file, "run", "remove it to fit again")
    assert message == f"{file}: damaged, or another run's: remove it to fit again"


def test_a_sealed_file_of_another_run_is_refused(tmp_path):
    file = tmp_path / "fit.pt"
    write_sealed(file, "run", b"content")
    assert "another run's" in refused(read_sealed, file, "another", "remove it")


# ------------------------------------------------------------------------------ a folder's settings

SETTINGS = {"lr": 0.1, "data": None, "targets": ["q_proj"], "seed": 7}


def test_a_folder_is_claimed_once_and_for_the_same_settings(tmp_path):
    file = tmp_path / "settings.json"
    claim(file, SETTINGS)
    content = file.read_bytes()
    claim(file, dict(reversed(SETTINGS.items())))
    assert file.read_bytes() == content
    assert read_json(file) == SETTINGS


@pytest.mark.parametrize("change, message", (
    ({"lr": 0.5}, "lr: found 0.1, expected 0.5 as asked: take another --out"),
    ({"data": "x"}, "data: found None, expected 'x' as asked"),
    ({"new": 1}, "new: found 'nothing', expected 1 as asked")))
def test_a_folder_of_another_run_is_refused_by_the_setting(tmp_path, change, message):
    file = tmp_path / "settings.json"
    claim(file, SETTINGS)
    assert refused(claim, file, SETTINGS | change).startswith(f"{file}: {message}")


def test_a_folder_whose_run_had_another_setting_is_refused(tmp_path):
    file = tmp_path / "settings.json"
    claim(file, SETTINGS | {"old": 3})
    message = refused(claim, file, SETTINGS)
    assert message.startswith(f"{file}: old: found 3, expected 'no such key'")


def test_long_values_are_cut_and_stay_on_one_line(tmp_path):
    file = tmp_path / "settings.json"
    claim(file, {"data": "x\n" * 500})
    message = refused(claim, file, {"data": "y\n" * 500})
    assert len(message) < len(str(file)) + 250


@pytest.mark.parametrize("harm", (
    bytes.rstrip, lambda content: content.replace(b"\n", b"\r\n"), lambda content: content + b"\n"))
def test_settings_in_another_spacing_are_written_anew(tmp_path, harm):
    """So that a run that goes on leaves the bytes of one that nobody touched."""
    file = tmp_path / "settings.json"
    claim(file, SETTINGS)
    content = file.read_bytes()
    file.write_bytes(harm(content))
    claim(file, SETTINGS)
    assert file.read_bytes() == content


def test_only_the_first_process_claims(tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "rank", lambda: 1)
    claim(tmp_path / "settings.json", SETTINGS)
    assert not list(tmp_path.iterdir())


def test_damaged_settings_are_refused(tmp_path):
    file = tmp_path / "settings.json"
    file.write_text('{"lr"')
    assert refused(claim, file, SETTINGS).startswith(f"{file}: not JSON")


# -------------------------------------------------------------------------------------------- a job

IDENTITY = {"model": "m", "n": 3}
HEADS = [{"id": "a", "path": 0}, {"id": "a", "path": 1}, {"id": "é\u2028", "path": 0},
         {"id": "c", "path": 5}]
FIELDS = [{"ids": [1, 2]}, {"ids": [], "right": True}, {"share": 0.1}, {"text": "x\n"}]
WHOLE = [head | fields for head, fields in zip(HEADS, FIELDS)]


def work(file, order=(0, 1, 2, 3), identity=IDENTITY):
    """Make what is missing, in this order -> the records."""
    job = Job(file, identity, HEADS)
    missing = job.todo()
    with job:
        for i in order:
            if i in missing:
                job.add(i, FIELDS[i])
    return job.finish()


@pytest.fixture
def file(tmp_path):
    return tmp_path / "labels.jsonl"


@pytest.fixture
def content(tmp_path):
    """The bytes of a file that was never interrupted."""
    work(tmp_path / "whole.jsonl")
    content = (tmp_path / "whole.jsonl").read_bytes()
    (tmp_path / "whole.jsonl").unlink()
    return content


def test_a_job_makes_its_records_in_order(file):
    assert work(file) == WHOLE
    lines = read_lines(file)
    for line in lines:
        assert line.pop("seal")
    assert lines == WHOLE


@pytest.mark.parametrize("order", list(itertools.permutations(range(4))))
def test_records_may_be_finished_in_any_order(file, content, order):
    assert work(file, order) == WHOLE
    assert file.read_bytes() == content
    assert os.listdir(file.parent) == [file.name]


def test_a_record_is_on_disk_when_it_is_added(file):
    """Not when the file is closed: a kill loses at most the record that is being made."""
    with Job(file, IDENTITY, HEADS) as job:
        for count, i in enumerate((2, 0, 3), 1):
            job.add(i, FIELDS[i])
            found = read_lines(file)
            assert len(found) == count
            assert found[-1].items() >= WHOLE[i].items()


def test_a_finished_job_makes_nothing(file, content):
    work(file)
    job = Job(file, IDENTITY, HEADS)
    assert job.todo() == []
    assert job.finish() == WHOLE
    assert file.read_bytes() == content


def test_a_job_goes_on_wherever_its_writer_was_cut(file, content, tmp_path):
    """At every byte of a file whose records were finished in another order: none is lost but the
    one that was being written, none stands twice, and the file is the same in the end."""
    unordered = tmp_path / "unordered.jsonl"
    with Job(unordered, IDENTITY, HEADS) as job:
        for i in (2, 3, 0, 1):
            job.add(i, FIELDS[i])
    written = unordered.read_bytes()
    for cut in range(len(written) + 1):
        file.write_bytes(written[:cut])
        lines = written[:cut].count(b"\n")
        job = Job(file, IDENTITY, HEADS)
        assert job.todo() == sorted((2, 3, 0, 1)[lines:])
        assert work(file) == WHOLE
        assert file.read_bytes() == content


@pytest.mark.parametrize("calls", range(4))
def test_a_job_killed_while_it_puts_its_file_in_order_goes_on(file, content, monkeypatch, calls):
    """Before and after each write and rename."""
    fuse = Fuse(calls)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fuse(os.fsync))
        patch.setattr(os, "replace", fuse(os.replace))
        patch.setattr(processes, "wait_for_all", fuse(processes.wait_for_all))
        with pytest.raises(Killed):
            work(file, (3, 2, 1, 0))
            work(file, (3, 2, 1, 0))
    assert work(file) == WHOLE
    assert file.read_bytes() == content


def test_an_unfinished_job_says_how_much_is_missing(file):
    job = Job(file, IDENTITY, HEADS)
    with job:
        job.add(1, FIELDS[1])
    assert refused(job.finish) == f"{file}: 3 of 4 records are missing"


def test_a_job_of_nothing_is_done(file):
    job = Job(file, IDENTITY, [])
    with job:
        pass
    assert job.finish() == []


# -------------------------------------------------------------------- a file that was tampered with


def edited(lines, number, **changes):
    """Lines whose record `number`, from 1, has other fields."""
    record = json.loads(lines[number - 1]) | changes
    return lines[:number - 1] + [json.dumps(record)] + lines[number:]


TAMPERED = {
    "a field": (lambda lines: edited(lines, 1, ids=[1, 3]), 1),
    "a share": (lambda lines: edited(lines, 3, share=0.2), 3),
    "a head": (lambda lines: edited(lines, 2, path=7), 2),
    "a new key": (lambda lines: edited(lines, 4, more=1), 4),
    "a seal": (lambda lines: edited(lines, 2, seal="0" * 16), 2),
    "a seal that is none": (lambda lines: edited(lines, 2, seal=None), 2),
    "a record of ours without a seal": (lambda lines: lines + ["{}"], 5)}


@pytest.mark.parametrize("what", TAMPERED)
def test_an_edited_line_is_refused_by_file_and_line(file, what):
    work(file)
    harm, line = TAMPERED[what]
    file.write_text("\n".join(harm(file.read_text().splitlines())) + "\n")
    before = file.read_bytes()
    assert refused(work, file).startswith(f"{file}:{line}: found an edited line or another run's")
    assert file.read_bytes() == before


def test_a_line_that_stands_twice_is_refused(file):
    work(file)
    lines = file.read_text().splitlines(True)
    file.write_text("".join(lines + lines[1:2]))
    assert refused(work, file).startswith(f"{file}:5: found a record for the second time")


def test_a_record_that_was_not_asked_for_is_refused(file):
    """Sealed by a job of the same identity with other heads."""
    other = Job(file, IDENTITY, [{"id": "z", "path": 0}])
    with other:
        other.add(0, {})
    assert refused(work, file).startswith(f"{file}:1: found a record that was not asked for")


def test_another_jobs_file_is_refused(file):
    work(file, identity={"model": "another"})
    assert refused(work, file).startswith(f"{file}:1: found an edited line or another run's")


@pytest.mark.parametrize("harm", (
    lambda content: content.replace(b"\n", b"\r\n"), lambda content: b"\n" + content,
    lambda content: content.replace(b", ", b","), lambda content: content + b"\n"))
def test_lines_in_another_spacing_are_written_anew(file, content, harm):
    work(file)
    file.write_bytes(harm(content))
    assert Job(file, IDENTITY, HEADS).todo() == []
    assert work(file) == WHOLE
    assert file.read_bytes() == content


def test_a_line_with_a_key_twice_is_refused(file, content):
    file.write_bytes(content.replace(b'{"id": "a",', b'{"id": "a", "id": "a",', 1))
    assert refused(work, file).startswith(f"{file}:1: 'id': found this key twice")


def test_damage_inside_is_reported_and_left(file):
    """Only a last line without an end is what a killed writer leaves."""
    work(file)
    lines = file.read_bytes().splitlines(True)
    damaged = lines[0] + lines[1][:9] + b"\n" + lines[2]
    file.write_bytes(damaged)
    assert refused(work, file).startswith(f"{file}:2: not JSON")
    assert file.read_bytes() == damaged


# -------------------------------------------------------------------------------- several processes


def take_part(file, rank, numbers, monkeypatch):
    """What process `rank` of two does with these records, up to where they are put together."""
    with monkeypatch.context() as patch:
        patch.setattr(processes, "count", lambda: 2)
        patch.setattr(processes, "rank", lambda: rank)
        patch.setattr(processes, "wait_for_all", lambda: None)
        job = Job(file, IDENTITY, HEADS)
        missing = job.todo()
        with job:
            for i in numbers:
                if i in missing:
                    job.add(i, FIELDS[i])
        return job


def finish_together(job, monkeypatch):
    """What the first process does once both have made their records."""
    with monkeypatch.context() as patch:
        patch.setattr(processes, "count", lambda: 2)
        patch.setattr(processes, "wait_for_all", lambda: None)
        return job.finish()


def test_processes_write_apart_and_are_put_together(file, content, monkeypatch):
    job = take_part(file, 0, [0, 2], monkeypatch)
    take_part(file, 1, [3, 1], monkeypatch)
    assert sorted(os.listdir(file.parent)) == ["labels.jsonl.part0", "labels.jsonl.part1"]
    assert finish_together(job, monkeypatch) == WHOLE
    assert file.read_bytes() == content
    assert os.listdir(file.parent) == [file.name]


@pytest.mark.parametrize("torn", (b"", b'{"id": "a", "pa'))
def test_parts_of_a_killed_run_are_taken_up_by_one_process(file, content, monkeypatch, torn):
    take_part(file, 0, [2], monkeypatch)
    take_part(file, 1, [1], monkeypatch)
    with open(f"{file}.part1", "ab") as opened:
        opened.write(torn)
    assert Job(file, IDENTITY, HEADS).todo() == [0, 3]
    assert work(file) == WHOLE
    assert file.read_bytes() == content
    assert os.listdir(file.parent) == [file.name]


def test_a_run_of_one_process_is_taken_up_by_two(file, content, monkeypatch):
    with Job(file, IDENTITY, HEADS) as job:
        job.add(3, FIELDS[3])
    job = take_part(file, 0, [0, 2], monkeypatch)
    take_part(file, 1, [1, 3], monkeypatch)
    assert finish_together(job, monkeypatch) == WHOLE
    assert file.read_bytes() == content
    assert os.listdir(file.parent) == [file.name]


@pytest.mark.parametrize("calls", range(4))
def test_a_run_killed_while_its_parts_are_put_together_goes_on(file, content, monkeypatch, calls):
    """Also after the whole file is there and before both parts are gone."""
    job = take_part(file, 0, [0, 2], monkeypatch)
    take_part(file, 1, [1, 3], monkeypatch)
    fuse = Fuse(calls)
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fuse(os.replace))
        patch.setattr(pathlib.Path, "unlink", fuse(pathlib.Path.unlink))
        with pytest.raises(Killed):
            finish_together(job, monkeypatch)
            raise Killed
    assert work(file) == WHOLE
    assert file.read_bytes() == content
    parts = list(file.parent.glob("labels.jsonl.part*"))
    assert not parts


def test_parts_of_a_file_with_odd_characters_are_found(tmp_path, monkeypatch):
    """A pattern's characters in a file's name are no pattern."""
    file = tmp_path / "l[a-b]*?.jsonl"
    job = take_part(file, 0, [0, 2, 1, 3], monkeypatch)
    assert finish_together(job, monkeypatch) == WHOLE
    assert os.listdir(tmp_path) == [file.name]


# -------------------------------------------------------------------------------------------- locks


@pytest.mark.parametrize("name", ("folder", "scores.jsonl"))
def test_a_locked_path_is_refused_to_another_and_free_afterwards(tmp_path, name):
    """A folder has its lock in it, a file (which may not be there yet) beside it."""
    path = tmp_path / name
    if name == "folder":
        path.mkdir()
    for _ in range(2):
        with locked(path):
            with pytest.raises(ValueError, match=f"^{path}: another process is at work there"):
                with locked(path):
                    pass
            assert len(list(tmp_path.rglob("*lock"))) == 1
        assert not list(tmp_path.rglob("*lock"))


def test_a_lock_is_freed_by_an_error(tmp_path):
    with pytest.raises(KeyError):
        with locked(tmp_path):
            raise KeyError
    with locked(tmp_path):
        pass


HOLD = """
import sys, time
from plumbing.records import locked
with locked(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


def test_the_lock_of_a_killed_process_is_free(tmp_path):
    """While it lives, it is not."""
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(ValueError, match="another process"):
            with locked(tmp_path):
                pass
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.communicate()
    assert (tmp_path / "lock").is_file()
    with locked(tmp_path):
        pass
    assert not (tmp_path / "lock").exists()


def test_a_lock_that_was_replaced_in_this_moment_is_not_held(tmp_path, monkeypatch):
    """Its holder has removed it after we opened it: we would hold a file that nobody else sees."""
    flock = records.fcntl.flock

    def replaced(file, how):
        (tmp_path / "lock").unlink()
        (tmp_path / "lock").write_text("")
        flock(file, how)

    monkeypatch.setattr(records.fcntl, "flock", replaced)
    with pytest.raises(ValueError, match="another process"):
        with locked(tmp_path):
            pass


NOT_OURS = (b"x", b"my notes\n", records.LOCK + b"x", records.LOCK[1:], b"\0")


@pytest.mark.parametrize("content", NOT_OURS)
@pytest.mark.parametrize("name", ("folder", "scores.jsonl"))
def test_a_file_of_the_users_with_the_name_of_a_lock_is_left(tmp_path, name, content):
    path = tmp_path / name
    lock = tmp_path / "scores.jsonl.lock"
    if name == "folder":
        path.mkdir()
        lock = path / "lock"
    lock.write_bytes(content)
    for _ in range(2):
        message = refused(hold, path)
        assert message.startswith(f"{lock}: found something else under this name")
        assert lock.read_bytes() == content


def hold(path):
    with locked(path):
        pass


@pytest.mark.parametrize("there", (None, b"", b"text", records.LOCK))
def test_a_link_with_the_name_of_a_lock_is_left(tmp_path, there):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "lock").symlink_to(tmp_path / "there")
    if there is not None:
        (tmp_path / "there").write_bytes(there)
    assert "found something else under this name" in refused(hold, folder)
    assert (folder / "lock").is_symlink()
    if there is None:
        assert os.listdir(tmp_path) == ["folder"]
    else:
        assert (tmp_path / "there").read_bytes() == there


@pytest.mark.parametrize("make", (os.mkdir, os.mkfifo))
def test_what_is_no_file_but_has_the_name_of_a_lock_is_left(tmp_path, make):
    make(tmp_path / "lock")
    assert "found something else under this name" in refused(hold, tmp_path)
    assert os.listdir(tmp_path) == ["lock"]


@pytest.mark.parametrize("content", (b"", records.LOCK[:9], records.LOCK))
def test_a_lock_that_is_left_over_is_taken(tmp_path, content):
    """Also an empty one, as earlier versions left them, or one that a kill cut short."""
    (tmp_path / "lock").write_bytes(content)
    with locked(tmp_path):
        assert (tmp_path / "lock").read_bytes() == records.LOCK
    assert not (tmp_path / "lock").exists()
