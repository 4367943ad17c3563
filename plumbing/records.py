"""JSON files, JSON lines, and long jobs that finish a record at a time and may be killed at any
moment.

Nothing here belongs to the paper. Whatever a run leaves in its folder is written whole or not at
all, and is believed later only if its seal says that this run wrote it.
"""
import collections
import contextlib
import fcntl
import glob
import hashlib
import json
import os
import re
from pathlib import Path

from plumbing import kept, processes
from plumbing.files import (
    FILE_SUFFIXES, foreign_format, is_there, read_bytes, require_file, target, unfinished, what_is)

LEFTOVER = re.compile(r"(.+)\.(\d{1,7})\.[0-9a-f]{8}\.tmp", re.DOTALL)  # see `files.unfinished`
LOCK = b"stop: a run is at work here\n"  # in each lock file, which is told by it


class KeyTwice(ValueError):
    """A key of a JSON object that stands twice in it."""


def read_json(path, raw=None, expected=dict):
    """The object (or `expected`: list) in a JSON file, or in `raw`, bytes of it. ValueError in one
    line naming path; KeyTwice, which is one, names a key that stands twice too."""
    content = read_bytes(path) if raw is None else raw
    try:
        value = json.loads(content.decode("utf-8-sig").rstrip(), object_pairs_hook=_unique)
    except KeyTwice as error:
        raise KeyTwice(f"{path}: {error}") from None
    except (ValueError, RecursionError) as error:  # also not UTF-8, or a nesting without end
        reason = foreign_format(content) or str(error).replace("line 1 column", "column")
        raise ValueError(f"{path}: not JSON: {reason}") from None
    if not isinstance(value, expected):
        names = {dict: "object", list: "list"}
        raise ValueError(f"{path}: found {type(value).__name__}, expected a JSON {names[expected]}")
    return value


def _unique(pairs):
    """The dict of a JSON object's keys and values."""
    found = dict(pairs)
    if len(found) < len(pairs):
        counts = collections.Counter(key for key, _ in pairs)
        (twice, _), = counts.most_common(1)
        raise KeyTwice(f"{repr(twice)[:60]}: found this key twice in an object, expected it once")
    return found


def require_keys_once(path, raw):
    """Raise KeyTwice where a key stands twice in JSON that a library is to read, which would take
    the last. Of all else that is wrong with it the library speaks."""
    try:
        read_json(path, raw)
    except KeyTwice:
        raise
    except ValueError:
        pass


def read_records(path):
    """Yield (line number, dict) for each non-blank line of a JSON-lines file. ValueError names
    file and line."""
    require_file(path)
    with open(path, "rb") as file:
        for number, raw in enumerate(file, 1):
            if raw.strip():
                yield number, read_json(f"{path}:{number}", raw)


def write_atomic(path, data):
    """Put str or bytes at `path`, all or nothing: after a failure the old file is intact and no
    other is left. A link stays, and the file behind it is written. ValueError where something else
    than a file lies there."""
    content = data.encode() if isinstance(data, str) else data
    path = target(path)
    _remove_leftovers_of(path)
    beside = Path(unfinished(path))
    try:
        with open(beside, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def digest(*parts):
    """Sixteen hexadecimal digits that stand for JSON values: equal values, equal digits."""
    content = json.dumps(parts, sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def claim(file, settings, parts=None):
    """Write a run's settings (a dict) to `file`, or make sure that the file there holds the same.
    ValueError naming the key where it holds a run with others.

    parts: for settings that are digests of several things what these are, {key: {thing: text}};
    they are written beside the settings, so that the line can say which of them differs."""
    if is_there(file):
        found = read_json(file)
        known = found.pop("parts", None)
        differing = [key for key in found.keys() | settings.keys()
                     if key not in found or key not in settings or found[key] != settings[key]]
        if differing:
            plain_first = sorted(differing, key=lambda key: (key in (parts or {}), key))
            _refuse_other_run(file, plain_first[0], found, settings, known, parts)
        settings = found
    if parts is not None:
        settings = settings | {"parts": parts}
    content = json.dumps(settings, indent=1) + "\n"
    if processes.is_first() and not (is_there(file) and read_bytes(file) == content.encode()):
        write_atomic(file, content)  # the same settings in another spacing are written anew
    processes.wait_for_all()


def _refuse_other_run(file, key, found, settings, known_parts, parts):
    """Raise the ValueError of `claim` about a key whose values differ."""
    before = known_parts.get(key) if isinstance(known_parts, dict) else None
    now = (parts or {}).get(key)
    if isinstance(before, dict) and now is not None:
        for thing in sorted(before.keys() | now.keys()):
            was = str(before.get(thing, "none"))[:200]
            asked = now.get(thing, "none")
            if was != asked:
                raise ValueError(
                    f"{file}: another run's, the {thing} differ: found {was}, expected {asked} as "
                    "asked: take another --out")
    was = repr(found.get(key, "nothing"))[:60]
    asked = repr(settings.get(key, "no such key"))[:60]
    raise ValueError(f"{file}: {key}: found {was}, expected {asked} as asked: take another --out")


def write_sealed(file, identity, content):
    """Write bytes below a line with their seal: a digest of an identity (text) and of them."""
    seal = hashlib.sha256(identity.encode() + content).hexdigest()
    write_atomic(file, seal.encode() + b"\n" + content)
    kept.note()


def read_sealed(file, identity, advice):
    """The bytes that `write_sealed` wrote for this identity. ValueError with an advice where they
    are not."""
    seal, _, content = read_bytes(file).partition(b"\n")
    if seal.decode("latin-1") != hashlib.sha256(identity.encode() + content).hexdigest():
        raise ValueError(f"{file}: damaged, or another run's: {advice}")
    kept.note()
    return content


class Job:
    """A long piece of work that finishes a record at a time, in any order, in a file of JSON lines.

        job = Job(file, identity, heads)         # reads what an earlier, killed run has finished
        with job:
            for i in job.todo():
                job.add(i, {...})                # written at once
        records = job.finish()                   # all of them, in order, in the file too

    heads: for each record the fields (a dict) that say which one it is. identity: JSON values for
    all that shapes the records. Each line carries a seal, a digest of identity and line. A line
    without its seal, of another identity or with a head that is not asked for, or one that stands
    twice, is a ValueError that names file and line; a torn last line is cut and its record made
    again.

    Several processes (torchrun) append to a file each, which `finish` puts together.
    """

    def __init__(self, file, identity, heads):
        self.file = Path(file)
        self.identity = identity
        self.heads = heads
        self.records = [None] * len(heads)
        self.output = None
        target(self.file)
        self._read()

    def todo(self):
        """The numbers of the records that are still to be made."""
        return [i for i, record in enumerate(self.records) if record is None]

    def __enter__(self):
        processes.wait_for_all()  # nobody appends while another still reads
        own = self.file
        if processes.count() > 1:
            own = self.file.with_name(f"{self.file.name}.part{processes.rank()}")
        self.output = open(own, "a", buffering=1, encoding="utf-8")
        return self

    def __exit__(self, *_):
        self.output.close()

    def add(self, i, fields):
        """Write record i: its head and these fields."""
        self.records[i] = self.heads[i] | fields
        self.output.write(self._line(i))
        kept.note()

    def finish(self):
        """All records, in order; then the one file holds them in order, whatever was
        interrupted."""
        processes.wait_for_all()
        if processes.count() > 1:
            self._read()
        missing = len(self.todo())
        if missing:
            raise ValueError(f"{self.file}: {missing} of {len(self.heads)} records are missing")
        processes.wait_for_all()
        if processes.is_first():
            if not self._is_whole():
                write_atomic(self.file, "".join(self._line(i) for i in range(len(self.heads))))
            for part in self._parts():
                part.unlink()
        processes.wait_for_all()
        return self.records

    def _line(self, i):
        record = self.records[i]
        return json.dumps(record | {"seal": digest(self.identity, record)}) + "\n"

    def _is_whole(self):
        """Whether the one file holds the lines of all records, in order, and nothing else."""
        if not self.file.exists():
            return False
        with open(self.file, "rb") as file:
            for i in range(len(self.heads)):
                if file.readline() != self._line(i).encode():
                    return False
            return not file.read(1)

    def _parts(self):
        """Files of single processes, which a killed run may have left."""
        return sorted(self.file.parent.glob(f"{glob.escape(self.file.name)}.part*"))

    def _read(self):
        """Take in every finished record."""
        numbers = {digest(head): i for i, head in enumerate(self.heads)}
        head_keys = set().union(*self.heads)
        self.records = [None] * len(self.heads)
        for file in [self.file, *self._parts()]:
            if not file.exists():
                continue
            _cut_torn_line(file)
            for line, record in read_records(file):
                seal = record.pop("seal", None)
                if seal != digest(self.identity, record):
                    raise ValueError(
                        f"{file}:{line}: found an edited line or another run's: remove the line "
                        "or the file")
                head = {key: value for key, value in record.items() if key in head_keys}
                number = numbers.get(digest(head))
                place = f"{file}:{line}"
                if number is None:
                    raise ValueError(f"{place}: found a record that was not asked for: remove it")
                if self.records[number] is None:
                    self.records[number] = record
                    kept.note()
                elif file == self.file:  # a part may repeat it: `finish` was killed before it left
                    raise ValueError(f"{place}: found a record for the second time: remove it")


def _cut_torn_line(file):
    """Cut what a killed writer left of its last line."""
    content = read_bytes(file)
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        os.truncate(file, whole)


@contextlib.contextmanager
def locked(path):
    """Hold `path` (a run's folder, or a file) for this process alone, with a lock file beside or
    in it. ValueError where another process holds it, or where something lies there that no run
    leaves. A lock whose process has died is free, and what that process left half written is
    removed."""
    path = Path(path)
    lock = path / "lock" if path.is_dir() else Path(f"{path}.lock")
    with _open_lock(lock) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(file.fileno()).st_ino != os.stat(lock).st_ino:
                raise OSError("the lock file was replaced in this moment")
        except OSError:
            raise ValueError(
                f"{path}: another process is at work there: wait for it, or choose another "
                "--out") from None
        try:
            _mark(file)
            remove_leftovers(path)
            _require_plain_content(path)
            yield
        finally:
            lock.unlink(missing_ok=True)


def _open_lock(lock):
    """Open a lock file. ValueError, and it is left alone, where what lies there is not ours."""
    if is_there(lock) and (lock.is_symlink() or what_is(lock) != "a file" or not _is_ours(lock)):
        raise ValueError(
            f"{lock}: found something else under this name, expected a run's lock or nothing: "
            "move it away, or choose another --out")
    return open(lock, "ab")


def _is_ours(lock):
    """Whether a file holds what `_mark` writes, or the beginning of it, as after a kill."""
    try:
        with open(lock, "rb") as file:
            return LOCK.startswith(file.read(len(LOCK) + 1))
    except FileNotFoundError:  # its holder has left in this moment
        return True


def _mark(file):
    """Make a lock file that is held known as ours."""
    file.write(LOCK[os.fstat(file.fileno()).st_size:])
    file.flush()


def _require_plain_content(path):
    """Raise ValueError where in a run's folder, or in a folder in it, something else than files and
    folders lies, or a folder with a file's name: it would be read or written only later."""
    if not path.is_dir():
        return
    for file in [*path.iterdir(), *path.glob("*/*")]:
        found = what_is(file)
        is_folder = found == "a folder" and file.suffix not in FILE_SUFFIXES
        if not is_folder and found not in ("a file", None):
            raise ValueError(f"{file}: found {found}, expected a file or none")


def remove_leftovers(path):
    """Remove the unfinished files of killed writers (`write_atomic`): in a run's folder and its
    stop/, or beside a file."""
    if path.is_dir():
        for file in [*path.glob("*.tmp"), *path.glob("stop/*.tmp")]:
            if LEFTOVER.fullmatch(file.name) and not file.is_symlink():
                file.unlink()
    else:
        _remove_leftovers_of(target(path))


def _remove_leftovers_of(path):
    """Remove the unfinished files of one target whose writers have died."""
    folder, name = os.path.split(path)
    with os.scandir(folder) as found:
        for file in found:
            match = LEFTOVER.fullmatch(file.name)
            if match and match[1] == name and file.is_file(follow_symlinks=False):
                if not _is_alive(int(match[2])):
                    os.unlink(file.path)


def _is_alive(process):
    """Whether a process of this number runs."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # somebody else's
        pass
    return True
