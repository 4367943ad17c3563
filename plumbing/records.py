"""JSON files, JSON lines, and long jobs that finish a record at a time and may be killed at any moment.

Nothing here belongs to the paper. Whatever a run leaves in its folder is written whole or not at all, and is believed
later only if its seal says that this run wrote it.
"""
import hashlib
import json
import os
from pathlib import Path

from plumbing import processes


def read_json(path, raw=None, expected=dict):
    """The object (or `expected`: list) in a JSON file, or in `raw`, bytes of it. ValueError in one line naming path."""
    try:
        content = Path(path).read_bytes() if raw is None else raw
        value = json.loads(content.decode("utf-8-sig").rstrip())
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:  # also: not UTF-8, a number or a nesting without end
        reason = str(error).replace("line 1 column", "column")
        raise ValueError(f"{path}: not JSON: {reason}") from None
    if not isinstance(value, expected):
        names = {dict: "object", list: "list"}
        raise ValueError(f"{path}: found {type(value).__name__}, expected a JSON {names[expected]}")
    return value


def read_records(path):
    """Yield (line number, dict) for each non-blank line of a JSON-lines file. ValueError names file and line."""
    with open(path, "rb") as file:
        for number, raw in enumerate(file, 1):
            if raw.strip():
                yield number, read_json(f"{path}:{number}", raw)


def write_atomic(path, data):
    """Put str or bytes at `path`, all or nothing: after a failure the old file is intact and no other is left."""
    content = data.encode() if isinstance(data, str) else data
    beside = Path(f"{path}.{os.getpid()}.{os.urandom(4).hex()}.tmp")
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
