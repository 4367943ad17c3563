"""What is read, and what is written over, is a plain file; and what other formats are called.

A pipe would hang a run and a device feed it without end; as targets both would be replaced, and
with them what others rely on. Links to plain files are followed, for reading and for writing.
Looked up, not run.
"""
import errno
import os
import re
import stat
import sys
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent

KINDS = {
    stat.S_IFREG: "a file",
    stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device", stat.S_IFBLK: "a device"}

# Of the files that a run leaves; a folder with one of them stands where a file should.
FILE_SUFFIXES = {".json", ".jsonl", ".md", ".npy", ".pt", ".safetensors", ".html", ".svg"}

# What files of other formats begin with, what they are, and what to do with them.
TO_LINES = "convert it to JSON lines"
BY_PANDAS = f"{TO_LINES}: pandas.read_{{}}(IN).to_json(OUT, orient='records', lines=True)"
FORMATS = {
    b"PAR1": ("parquet", BY_PANDAS.format("parquet")),
    b"ARROW1": ("Arrow", BY_PANDAS.format("feather")),
    b"FEA1": ("Feather", BY_PANDAS.format("feather")),
    b"\xff\xff\xff\xff": (
        "an Arrow stream", f"{TO_LINES}: datasets.Dataset.from_file(IN).to_json(OUT)"),
    b"\x1f\x8b": ("gzip", "unpack it: gunzip -k IN"),
    b"BZh": ("bzip2", "unpack it: bunzip2 -k IN"),
    b"\xfd7zXZ\0": ("xz", "unpack it: unxz -k IN"),
    b"\x28\xb5\x2f\xfd": ("zstd", "unpack it: unzstd IN"),
    b"7z\xbc\xaf\x27\x1c": ("7z", "unpack it"),
    b"PK\x03\x04": (
        "a zip archive (.xlsx, .npz and .pt are such)",
        "unpack it, or save a spreadsheet as CSV with commas, in UTF-8"),
    b"\xd0\xcf\x11\xe0": ("a spreadsheet (.xls)", "save it as CSV with commas, in UTF-8"),
    b"\x93NUMPY": ("a numpy array", TO_LINES),
    b"\x89HDF": ("HDF5", TO_LINES),
    b"SQLite format 3": ("an SQLite database", TO_LINES),
    b"%PDF": ("PDF", TO_LINES),
    b"\xff\xfe": ("text in UTF-16", "save it in UTF-8"),
    b"\xfe\xff": ("text in UTF-16", "save it in UTF-8"),
    b"version https://git-lfs": ("a pointer of Git LFS", "fetch the file itself: git lfs pull"),
    b"<": ("a web page or XML", "fetch the file itself"),
    b"%YAML": ("YAML", "convert it to JSON")}
FORMATS |= {b"\x80" + bytes([n]): ("a pickle", TO_LINES) for n in range(2, 6)}
YAML_LINE = re.compile(rb"---|- |[A-Za-z_][\w -]*:(\s|$)")


def embedded(path):
    """`path`, as a Path; of the embedded toy ("toy", "toy/stop") the one in the project's own
    folder, where the working directory has nothing called toy."""
    path = Path(path)
    is_toy = path.parts[:1] == ("toy",) and ".." not in path.parts
    if is_toy and not os.path.lexists("toy") and (PROJECT / path).exists():
        return PROJECT / path
    return path


def is_there(file):
    """Whether an optional file is there; it may then be a folder, a pipe or a dangling link, which
    its reader refuses."""
    return os.path.lexists(file)


def what_is(path):
    """"a file", "a folder", "a pipe", "a socket" or "a device", behind links; None where there is
    nothing."""
    try:
        return _kind(os.stat(path))
    except FileNotFoundError:  # also at the end of a link
        return None


def require_file(path):
    """Raise ValueError unless a plain file, or a link to one, lies there to be read."""
    try:
        found = _kind(os.stat(path))
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from None
    if found != "a file":
        raise ValueError(f"{path}: found {found}, expected a file")


def read_bytes(path):
    """The content of a plain file. ValueError in one line where there is none."""
    require_file(path)
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from None


def target(path):
    """The path, behind links, of what is to be written at `path`. ValueError unless a plain file
    lies there, or nothing."""
    try:
        found = os.stat(path)
    except FileNotFoundError:
        return os.path.realpath(path)
    except OSError as error:
        raise ValueError(f"{path}: cannot be written: {error.strerror}") from None
    if _kind(found) != "a file":
        raise ValueError(f"{path}: found {_kind(found)}, expected a file or none")
    for stream in (sys.__stdout__, sys.__stderr__):
        if stream is not None and _goes_to(stream, found):
            raise ValueError(f"{path}: found what {stream.name} goes to, expected another file")
    return os.path.realpath(path)


def require_target(path):
    """Raise ValueError unless a file can be written at `path`: to be called before the work whose
    result it is to hold."""
    folder, name = os.path.split(unfinished(target(path)))
    wrong = None
    if not os.path.isdir(folder):
        wrong = errno.ENOENT
    elif not os.access(folder, os.W_OK | os.X_OK):  # nothing is written: a kill would leave it
        wrong = errno.EACCES
    elif len(os.fsencode(name)) > os.pathconf(folder, "PC_NAME_MAX"):
        wrong = errno.ENAMETOOLONG
    if wrong is not None:
        raise ValueError(f"{path}: cannot be written: {os.strerror(wrong)}")


def unfinished(path):
    """A new name for what becomes the file at `path` when it is whole: PATH.PID.RANDOM.tmp."""
    return f"{path}.{os.getpid()}.{os.urandom(4).hex()}.tmp"


def foreign_format(content):
    """"found X: what to do" of bytes that are of another format than JSON or CSV with commas, as
    far as their first line shows; else None."""
    start = content.removeprefix(b"\xef\xbb\xbf").lstrip(b" \r\n")
    for magic, (name, advice) in FORMATS.items():
        if content.startswith(magic) or start.startswith(magic):
            return f"found {name}: {advice}"
    line = start.partition(b"\n")[0].strip(b"\r")
    if line[:1] in (b"{", b"["):
        return None
    if YAML_LINE.match(line):
        return "found YAML: convert it to JSON"
    if b"\t" in line.strip(b"\t"):
        return f"found cells between tabs (TSV): write it as CSV with commas, or {TO_LINES}"
    return None


def _goes_to(stream, found):
    """Whether a stream goes to the file of this os.stat."""
    try:
        return os.path.samestat(os.fstat(stream.fileno()), found)
    except (OSError, ValueError):  # closed, or no file
        return False


def _kind(found):
    """What an os.stat is of, in words."""
    return KINDS.get(stat.S_IFMT(found.st_mode), "something else")
