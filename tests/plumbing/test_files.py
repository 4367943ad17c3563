"""plumbing/files.py: pipes, devices, sockets and folders are neither read nor written over, and
other formats are called by their names."""
import bz2
import gzip
import io
import lzma
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import zipfile
from pathlib import Path

import hostile
import numpy as np
import pytest
import torch
from helpers import ROOT
from hostile import attempt

from plumbing import files
from plumbing.budget_plan import read_plans
from plumbing.checkpoint import open_tensors, read_tensors
from plumbing.files import embedded, foreign_format, require_file, require_target
from plumbing.problems import read_problems
from plumbing.records import locked, read_json, read_records, read_sealed, write_atomic

NO_FILES = ("a folder", "a pipe", "a socket", "a device")


@pytest.fixture(autouse=True)
def no_hang():
    """What waits for a pipe's other end is ended."""
    def hangs(*_):
        raise AssertionError("hangs")

    before = signal.signal(signal.SIGALRM, hangs)
    signal.alarm(120)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def put(kind, path):
    """Put something that is no file at a path."""
    if kind == "a folder":
        path.mkdir()
    elif kind == "a pipe":
        os.mkfifo(path)
    elif kind == "a device":
        path.symlink_to("/dev/zero")
    else:
        folder = os.open(path.parent, os.O_RDONLY)  # a socket's path may be of 107 bytes only
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(f"/proc/self/fd/{folder}/{path.name}")
        os.close(folder)


def refused(function, *args):
    """The one line of the ValueError that a call raises."""
    with pytest.raises(ValueError) as caught:
        function(*args)
    message = str(caught.value)
    assert "\n" not in message
    return message


# ----------------------------------------------------------------------------------------- inputs

READERS = {
    "a.json": (
        require_file, read_json, lambda path: list(read_records(path)),
        lambda path: read_sealed(path, "", ""), read_problems),
    "a.safetensors": (open_tensors, read_tensors),
    "a.pth": (read_tensors,),
    "plan.json": (lambda path: read_plans(path.parent, ""),)}


@pytest.mark.parametrize("linked", (False, True))
@pytest.mark.parametrize("kind", NO_FILES)
def test_what_is_no_file_is_not_read(tmp_path, kind, linked):
    for name, readers in READERS.items():
        path = tmp_path / name
        put(kind, path)
        if linked:
            path.rename(tmp_path / f"there-{name}")
            path.symlink_to(tmp_path / f"there-{name}")
        for reader in readers:
            assert refused(reader, path) == f"{path}: found {kind}, expected a file"


def test_a_link_to_a_file_is_read(tmp_path):
    (tmp_path / "there").write_text('{"a": 1}')
    (tmp_path / "a.json").symlink_to("there")
    assert read_json(tmp_path / "a.json") == {"a": 1}
    assert list(read_records(tmp_path / "a.json")) == [(1, {"a": 1})]


def test_links_in_a_circle_and_to_nothing_are_not_read(tmp_path):
    (tmp_path / "a").symlink_to("b")
    assert "cannot be read: No such file or directory" in refused(require_file, tmp_path / "a")
    (tmp_path / "b").symlink_to("a")
    assert "cannot be read: Too many levels" in refused(require_file, tmp_path / "a")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return hostile.write_world(tmp_path_factory.mktemp("files") / "it")


WHERE = {  # file -> the script that reads it
    "config.json": "sample",
    "generation_config.json": "sample",
    "tokenizer.json": "sample",
    "tokenizer_config.json": "sample",
    "chat_template.jinja": "sample",
    "model.safetensors": "sample",
    "model.safetensors.index.json": "sample",
    "recipe.json": "train",
    "train.jsonl": "train",
    "test.jsonl": "eval",
    "prefixes.jsonl": "score",
    "stop/stop.json": "score",
    "stop/stop.safetensors": "score"}


@pytest.mark.parametrize("kind", NO_FILES)
@pytest.mark.parametrize("name", WHERE)
def test_no_script_reads_what_is_no_file(world, tmp_path, name, kind):
    copy = shutil.copytree(world, tmp_path / "copy")
    if name == "model.safetensors.index.json":
        (copy / "model.safetensors").unlink()
    (copy / name).unlink(missing_ok=True)
    put(kind, copy / name)
    script = WHERE[name]
    words = ["--out", tmp_path / "out"] if script in ("eval", "train") else []
    is_refused, line = attempt((name, kind), script, copy, *words)
    assert is_refused and f"{copy / name}: " in line and f"found {kind}, expected a file" in line


# ---------------------------------------------------------------------------------------- targets


@pytest.mark.parametrize("linked", (False, True))
@pytest.mark.parametrize("kind", NO_FILES)
def test_what_is_no_file_is_not_written_over(tmp_path, kind, linked):
    path = tmp_path / "a.json"
    put(kind, path)
    if linked:
        path.rename(tmp_path / "there")
        path.symlink_to(tmp_path / "there")
    before = os.lstat(path)
    for write in (lambda path: write_atomic(path, "new"), require_target):
        assert refused(write, path) == f"{path}: found {kind}, expected a file or none"
    after = os.lstat(path)
    assert (after.st_ino, after.st_mode) == (before.st_ino, before.st_mode)
    assert set(os.listdir(tmp_path)) == ({"a.json", "there"} if linked else {"a.json"})


@pytest.mark.parametrize("exists", (True, False))
def test_a_link_stays_and_the_file_behind_it_is_written(tmp_path, exists):
    (tmp_path / "folder").mkdir()
    there = tmp_path / "folder" / "there"
    if exists:
        there.write_text("old")
    link = tmp_path / "a.json"
    link.symlink_to("folder/there")
    require_target(link)
    assert there.exists() == exists
    write_atomic(link, "new")
    assert link.is_symlink() and there.read_text() == "new"
    assert os.listdir(tmp_path / "folder") == ["there"]


@pytest.mark.parametrize("name, reason", (
    ("none/a.json", "No such file or directory"), ("file/a.json", "Not a directory"),
    ("x" * 250, "File name too long"), ("loop", "Too many levels")))
def test_where_no_file_can_be_written_is_said_before_the_work(tmp_path, name, reason):
    (tmp_path / "file").write_text("")
    (tmp_path / "loop").symlink_to("loop")
    line = refused(require_target, tmp_path / name)
    assert line.startswith(f"{tmp_path / name}: cannot be written: {reason}")
    assert set(os.listdir(tmp_path)) == {"file", "loop"}


def test_a_folder_that_takes_no_file_is_said_before_the_work(tmp_path, monkeypatch):
    """As of another user; whoever runs as root may write everywhere."""
    monkeypatch.setattr(os, "access", lambda path, mode: mode & os.W_OK == 0)
    line = refused(require_target, tmp_path / "a")
    assert line == f"{tmp_path / 'a'}: cannot be written: Permission denied"


def test_a_target_that_may_be_written_is_left_as_it_is(tmp_path):
    (tmp_path / "a").write_text("old")
    require_target(tmp_path / "a")
    require_target(tmp_path / "b")
    assert os.listdir(tmp_path) == ["a"] and (tmp_path / "a").read_text() == "old"


@pytest.mark.parametrize("name", ("stdout", "stderr"))
def test_the_file_that_a_stream_goes_to_is_no_target(tmp_path, name):
    """What had been printed would be gone."""
    file = tmp_path / "a.json"
    code = (
        "import sys; from plumbing.files import target\n"
        f"try: target({str(file)!r})\n"
        f"except ValueError as error: print(error, file=sys.{name})")
    with open(file, "w") as stream:
        subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, **{name: stream})
    expected = f"{file}: found what <{name}> goes to, expected another file\n"
    assert file.read_text() == expected


@pytest.mark.parametrize("kind", NO_FILES)
@pytest.mark.parametrize("name", ("report.json", "labels.jsonl", "stop/stop.json"))
def test_a_runs_folder_is_looked_through_before_the_work(tmp_path, name, kind):
    (tmp_path / "stop").mkdir()
    put(kind, tmp_path / name)
    with pytest.raises(ValueError, match=f"{name}: found {kind}, expected a file or none$"):
        with locked(tmp_path):
            pass
    assert sorted(os.listdir(tmp_path)) == sorted({"stop", name.partition("/")[0]})


# ---------------------------------------------------------------------------------- other formats


def zipped():
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        archive.writestr("xl/workbook.xml", "<workbook/>")
    return content.getvalue()


def saved(save, value):
    content = io.BytesIO()
    save(content, value)
    return content.getvalue()


def database(file):
    with sqlite3.connect(file) as connection:
        connection.execute("create table problems (problem, answer)")
    connection.close()
    return file.read_bytes()


FOREIGN = {  # written by the libraries that know them, where they are in Python
    "gzip: unpack it: gunzip": gzip.compress(b'{"problem": "a", "answer": 1}'),
    "bzip2": bz2.compress(b"{}"),
    "xz": lzma.compress(b"{}"),
    "a zip archive": zipped(),
    "a numpy array": saved(np.save, np.ones(3)),
    "a zip archive (.xlsx, .npz": saved(np.savez, np.ones(3)),
    "a zip archive (.xlsx, .npz and .pt": saved(lambda file, it: torch.save(it, file), [1]),
    "a pickle": b"\x80\x04\x95\x05\0\0\0\0\0\0\0]K\x01a.",
    "parquet: convert it to JSON lines: pandas.read_parquet": b"PAR1\x15\x04\x15\x10PAR1",
    "Arrow: convert it": b"ARROW1\0\0\xff\xff\xff\xff\x10\0\0\0",
    "an Arrow stream": b"\xff\xff\xff\xff\x10\x01\0\0\x10\0\0\0",
    "a spreadsheet (.xls)": b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(9),
    "text in UTF-16: save it in UTF-8": '{"problem": "a"}'.encode("utf-16"),
    "a pointer of Git LFS": b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 2\n",
    "a web page or XML": b"\n<!DOCTYPE html>\n<html>",
    "YAML: convert it to JSON": b"- problem: a\n  answer: 1\n",
    "YAML": b"problem: |\n  a\nanswer: 1\n",
    "YAML: ": b"---\nproblem: a\n",
    "cells between tabs (TSV): write it as CSV with commas": b"problem\tanswer\n1+1?\t2\n",
    "cells between tabs": b'\xef\xbb\xbf"1+1?"\t"2"\r\n'}


@pytest.mark.parametrize("name", FOREIGN)
def test_another_format_is_called_by_its_name(tmp_path, name):
    """Whatever the file is called, and whoever reads it."""
    content = FOREIGN[name]
    assert foreign_format(content).startswith(f"found {name}")
    for suffix in ("jsonl", "json", "csv", "tsv"):
        file = tmp_path / f"a.{suffix}"
        file.write_bytes(content)
        assert refused(read_problems, file).startswith(f"{file}: found {name}")
        assert refused(read_json, file).startswith(f"{file}: not JSON: found {name}")
        line = refused(lambda: list(read_records(file)))
        assert f"not JSON: found {name}" in line or "web page" in name


def test_a_database_is_called_by_its_name(tmp_path):
    assert foreign_format(database(tmp_path / "a")).startswith("found an SQLite database")


@pytest.mark.parametrize("content", (
    b"", b"{}", b"[]", b'  {"a\\t": 1}', b"[\t1]", b'{"a":\t1}', b"question,answer\n", b"-5", b"3",
    b'"a: b"', b"null"))
def test_what_is_read_is_not_taken_for_another_format(content):
    assert foreign_format(content) is None


def test_parquet_and_arrow_as_their_library_writes_them(tmp_path):
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    table = arrow.table({"problem": ["a"], "answer": ["1"]})
    parquet.write_table(table, tmp_path / "a.parquet")
    with arrow.OSFile(str(tmp_path / "a.arrow"), "wb") as file:
        with arrow.ipc.new_stream(file, table.schema) as writer:
            writer.write_table(table)
    assert "found parquet: " in refused(read_problems, tmp_path / "a.parquet")
    assert "found an Arrow stream: " in refused(read_problems, tmp_path / "a.arrow")


def test_every_suffix_of_a_runs_files_is_known():
    assert {".json", ".jsonl", ".safetensors", ".pt"} <= files.FILE_SUFFIXES


# -------------------------------------------------------------------------------- the embedded toy


@pytest.mark.parametrize("path", ("toy", "toy/stop", "toy/judge", "toy/test.jsonl", "./toy/"))
def test_the_toy_is_found_from_everywhere(tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    assert embedded(path) == ROOT / path and embedded(Path(path)) == ROOT / path


@pytest.mark.parametrize("path", (
    "toys", "toy/none", "toy/../model.py", "owner/toy", "/toy", "../toy", "", "."))
def test_nothing_else_is(tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    assert embedded(path) == Path(path)


def test_what_is_called_toy_in_the_working_directory_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "toy").mkdir()
    assert embedded("toy") == Path("toy") and embedded("toy/stop") == Path("toy/stop")
