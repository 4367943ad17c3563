"""Read what another implementation hands in for a case: NAME.json, NAME.safetensors, or both."""
from plumbing.checkpoint import read_tensors, shorten
from plumbing.files import is_there
from plumbing.records import read_json


def read_hand_in(folder, name, expected):
    """{row: value} handed in. ValueError where a file is broken or a name is unknown."""
    found = {}
    file = folder / f"{name}.json"
    if is_there(file):
        found = read_json(file)
        check_names(found, expected, file)
    file = folder / f"{name}.safetensors"
    if is_there(file):
        add_tensors(found, read_tensors(file), expected, file)
    return found


def check_names(found, expected, file):
    """Raise ValueError on the name of a row that the case does not have."""
    for key in found:
        if key not in expected:
            known = ", ".join(expected)
            raise ValueError(f"{file}: {shorten(key)}: unknown, expected some of {known}")


def add_tensors(found, tensors, expected, file):
    """Put tensors into `found`: `grad.NAME`, `ROW.i` for one entry of a row, or ROW for all."""
    for key, tensor in tensors.items():
        values = tensor.double().tolist()
        row, _, place = key.partition(".")
        if row == "grad" and "grad" in expected:
            found.setdefault("grad", {})[place] = values
        elif key in expected:
            found[key] = values[0] if key == "loss" and isinstance(values, list) else values
        else:
            row, _, place = key.rpartition(".")
            check_names([row], expected, file)
            if not place.isascii() or not place.isdigit() or int(place) >= len(expected[row]):
                last = len(expected[row]) - 1
                raise ValueError(
                    f"{file}: {shorten(key)}: unknown, expected {row}.0 to {row}.{last}")
            entries = found.setdefault(row, [None] * len(expected[row]))
            entries[int(place)] = values
