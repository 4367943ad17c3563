"""Write the acceptable vectors: what comes out with roundings that a right port may choose.

`vectors/acceptable/KEY.json`: key, what, and for each case and row the entries that lie further off
than rounding explains, whole. A port that agrees with all of one file is right too.
"""
import torch

import cases
import reference
from compare import allowed_of, as_numbers, distance, entries_of
from plain_decoder import ACCEPTABLE
from plumbing.records import read_json
from vector_files import write_json

SHARE = 0.2  # entries that differ by less than this share of what is allowed are left out


def plain(value):
    """A value as it would be read from JSON."""
    return as_numbers(value.tolist() if isinstance(value, torch.Tensor) else float(value))


def differing(rows, expected, allowed):
    """{row: {label: value}} of the entries that differ from those expected."""
    found = {}
    for row, value in rows.items():
        wanted = entries_of(row, expected[row])
        for label, entry in entries_of(row, value).items():
            numbers = plain(entry)
            right = as_numbers(wanted[label])
            off = max(map(distance, right.values, numbers.values), default=0.0)
            if off > SHARE * allowed_of(row, label, allowed):
                found.setdefault(row, {})[label] = entry
    return found


def write_all(out, names):
    """Write the roundings that a port may choose, for these cases anew."""
    for key, what in ACCEPTABLE.items():
        file = out / "acceptable" / f"{key}.json"
        about = read_json(file)["cases"] if file.is_file() else {}
        for name in names:
            case = cases.BY_NAME[name]
            model = case.model()
            rows = reference.acceptable_rows(
                model, case.stop(model, out), read_json(out / name / "case.json"), key)
            found = differing(rows, read_json(out / name / "expected.json"),
                              read_json(out / name / "allowed.json"))
            about.pop(name, None)
            if found:
                about[name] = found
        if about:
            write_json(file, {"key": key, "what": what, "cases": about})
