"""Read what another implementation hands in for a case: NAME.json, NAME.safetensors, or both.

Needs the standard library alone. Whatever is handed in, a file is read, or refused in one line.
"""
import json
import os
import stat
import struct
from pathlib import Path

from compare import shortened

LARGEST = 64 * 2 ** 20  # bytes of a file or an answer; whole ones have less than four million
FORMATS = {"F64": "d", "F32": "f", "I64": "q", "I32": "i"}


class Rows:
    """The rows of a case that were handed in, and notes on what was not taken."""

    def __init__(self, values=None):
        self.values = values or {}
        self.notes = []


def parse_json(raw, source):
    """The JSON object in bytes. ValueError naming the source where they hold none, or a key twice.
    """
    if len(raw) > LARGEST:
        raise ValueError(f"{source}: found {len(raw):,} bytes, expected at most {LARGEST:,}")

    def only_once(pairs):
        found = {}
        for key, value in pairs:
            if key in found:
                raise ValueError(f"the key {shortened(key)} stands twice")
            found[key] = value
        return found

    try:
        value = json.loads(raw.decode("utf-8-sig"), object_pairs_hook=only_once)
    except (ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{source}: not JSON: {reason}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{source}: found {shortened(value)}, expected a JSON object")
    return value


def kind_of(path):
    """What lies at a path, behind links, in words; None where there is nothing."""
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        return None
    kinds = ((stat.S_ISREG, "a file"), (stat.S_ISDIR, "a folder"), (stat.S_ISFIFO, "a pipe"),
             (stat.S_ISCHR, "a device"), (stat.S_ISBLK, "a device"))
    return next((name for test, name in kinds if test(mode)), "something else")


def read_bytes(file):
    """The content of a file of ordinary size."""
    found = kind_of(file)
    if found != "a file":
        raise ValueError(f"{file}: found {found or 'a link to nothing'}, expected a file")
    size = os.stat(file).st_size
    if size > LARGEST:
        raise ValueError(f"{file}: found {size:,} bytes, expected at most {LARGEST:,}")
    return Path(file).read_bytes()


def read_json(file):
    """The JSON object in a file. ValueError naming it where it holds none."""
    return parse_json(read_bytes(file), file)


def read_hand_in(folder, name, expected):
    """The Rows handed in for a case. ValueError where a file is broken."""
    rows = Rows()
    file = folder / f"{name}.json"
    if os.path.lexists(file):
        rows = only_known(read_json(file), expected, file)
    file = folder / f"{name}.safetensors"
    if os.path.lexists(file):
        add_tensors(rows, read_tensors(file), expected, file)
    return rows


def only_known(found, expected, source):
    """The Rows of a hand-in: those that the case has; others are noted."""
    rows = Rows()
    for key, value in found.items():
        if key in expected:
            rows.values[key] = value
        else:
            known = ", ".join(expected)
            rows.notes.append(f"{source}: {shortened(key)}: unknown, expected some of {known}")
    return rows


def strange_files(folder, names):
    """A note on each entry of a folder that belongs to no case."""
    notes = []
    for file in sorted(folder.iterdir()):
        if file.suffix in (".json", ".safetensors") and file.stem not in names:
            notes.append(f"{ascii(file.name)[1:-1]}: no case has this name, expected some of "
                         + ", ".join(f"{name}.json" for name in names))
    return notes


def read_tensors(file):
    """{name: nested lists} of a safetensors file. ValueError where it is broken."""
    raw = read_bytes(file)
    broken = ValueError(f"{file}: not a whole safetensors file")
    if len(raw) < 8:
        raise broken
    (size,) = struct.unpack("<Q", raw[:8])
    if size > len(raw) - 8:
        raise broken
    header = parse_json(raw[8:8 + size], f"{file}: header")
    header.pop("__metadata__", None)
    data = raw[8 + size:]
    tensors = {}
    for name, about in header.items():
        try:
            start, stop = about["data_offsets"]
            shape = about["shape"]
            count = 1
            for length in shape:
                count *= length
            if not 0 <= start <= stop <= len(data):
                raise ValueError
            values = numbers_of(about["dtype"], data[start:stop], count)
        except (TypeError, ValueError, KeyError, struct.error):
            raise ValueError(f"{file}: {shortened(name)}: not a tensor of F64, F32, F16, BF16, "
                             "I64 or I32 with its data") from None
        tensors[name] = nested(values, shape)
    return tensors


def numbers_of(dtype, raw, count):
    """The numbers in a tensor's bytes."""
    if dtype == "BF16":
        halves = struct.unpack(f"<{count}H", raw)
        return list(struct.unpack(f"<{count}f", struct.pack(f"<{count}I", *(
            half << 16 for half in halves))))
    return list(struct.unpack(f"<{count}{'e' if dtype == 'F16' else FORMATS[dtype]}", raw))


def nested(values, shape):
    """Numbers in row order as nested lists."""
    for width in reversed(shape[1:]):
        values = [values[i:i + width] for i in range(0, len(values), max(1, width))]
    return values if shape else values[0]


def add_tensors(rows, tensors, expected, file):
    """Put tensors into `rows`: `grad.NAME`, `ROW.i` for one entry of a row, or ROW for all."""
    found = rows.values
    for key, values in tensors.items():
        row, _, place = key.partition(".")
        if row == "grad" and "grad" in expected:
            found.setdefault("grad", {})[place] = values
            continue
        if key in expected:
            found[key] = values[0] if key == "loss" and isinstance(values, list) else values
            continue
        row, _, place = key.rpartition(".")
        count = len(expected[row]) if isinstance(expected.get(row), list) else 0
        if not place.isascii() or not place.isdigit() or int(place[:9]) >= count:
            rows.notes.append(f"{file}: {shortened(key)}: unknown, expected ROW or ROW.NUMBER")
            continue
        entries = found.setdefault(row, [None] * count)
        entries[int(place)] = values
