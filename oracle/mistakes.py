"""Write the negative vectors: for each known mistake, the wrong outputs that it gives.

`vectors/mistakes/KEY.json`: key, what (the name that certify gives), chain, and for each case and
row the entries that come out wrong. Of long entries some numbers are published: "values" at the
flat places "at". What is not listed comes out right, or, where "unknown" says so, was not tried.
"""
import numpy as np
import torch

import cases
from compare import CHAINS, FLOATS, allowed_difference, as_numbers, compare_paths, entries_of
from compare import PASS, PATH_ROWS, name_of
from vector_files import write_json
from plumbing.records import read_json
from wrong_decoder import DECODER, ROUNDED, SCORE, Port
from wrong_run import BRANCHES, CHECK, PATHS, RESUME, wrong_run_rows
from wrong_sampler import CHOICES, SAMPLER, choices_rows, sampler_rows
from wrong_training import TRAINING, training_rows

TITLES = DECODER | SCORE | TRAINING | PATHS | CHECK | RESUME | BRANCHES | SAMPLER | CHOICES
LONGEST = 300        # longer prefixes are not tried with mistakes
SHOWS = 2            # a mistake counts where it moves a number by so many times what is allowed
LARGEST = 10         # places shown of an entry: where it changes most,
SPREAD = 6           # and some at equal distances


def chosen_places(change):
    """Flat places of an entry to publish: where it changes most, and some spread evenly."""
    largest = np.argsort(-change, kind="stable")[:LARGEST]
    spread = np.linspace(0, len(change) - 1, SPREAD).astype(int)
    return sorted({int(place) for place in (*largest, *spread)})


def numbers_entry(row, expected, wrong):
    """(the published entry or None where it is right, its change in units of what is allowed)."""
    expected = as_numbers(expected)
    wrong = np.asarray(torch.as_tensor(wrong).float()).astype(np.float64)
    if wrong.shape != expected.shape:
        return {"shape": list(wrong.shape)}, SHOWS + 1
    change = np.abs(wrong - expected).reshape(-1)
    units = float(change.max()) / allowed_difference(row, expected)
    if units <= 0.5:
        return None, units
    at = chosen_places(change)
    values = wrong.reshape(-1)[at].astype(np.float32)
    return {"at": at, "values": values}, units


def paths_entry(expected, wrong):
    """The paths that a mistake changes, and the names of those that are gone."""
    right = {name_of(path): path for path in expected}
    changed = []
    for path in wrong:
        name = name_of(path)
        plain = path | {"score": float(path["score"])} if "score" in path else path
        if name not in right or compare_paths([right[name]], [plain]).state != PASS:
            changed.append(path)
    gone = sorted(right.keys() - {name_of(path) for path in wrong})
    if not changed and not gone:
        return None, 0.0
    entry = {"value": changed}
    return (entry | {"gone": gone} if gone else entry), SHOWS + 1


def exact_entry(row, expected, wrong):
    """The same as `numbers_entry` for what must be equal."""
    if row in PATH_ROWS:
        return paths_entry(expected, wrong)
    if wrong == expected:
        return None, 0.0
    return {"value": wrong}, SHOWS + 1


def wrong_rows(expected_rows, found_rows):
    """({row: {"entries", "unknown"}}, the largest change) of what a mistake gives in a case."""
    rows = {}
    largest = 0.0
    for row, found in found_rows.items():
        expected = entries_of(row, expected_rows[row])
        wrong = entries_of(row, found)
        entries = {}
        unknown = []
        for label, right in expected.items():
            if wrong.get(label) is None and right is not None:
                unknown.append(label)
                continue
            make = numbers_entry if row in FLOATS else exact_entry
            entry, units = make(row, right, wrong[label])
            largest = max(largest, units)
            if entry is not None:
                entries[label] = entry
        if entries or unknown:
            rows[row] = {"entries": entries}
            if unknown:
                rows[row]["unknown"] = unknown
    return rows, largest


def port_rows(case, model, stop, inputs, wrong):
    """The decoder's and the score's rows of a wrong Port."""
    port = Port(model, stop, wrong)
    rows = {row: [] for row in CHAINS["model"] if row not in ("loss", "grad")}
    for prefix in inputs["prefixes"]:
        entry = {}
        if len(prefix["ids"]) <= LONGEST:
            with torch.inference_mode():
                entry = port.decoder_entry(prefix["ids"]) | (port.score_entry(prefix["ids"]) or {})
        for row, entries in rows.items():
            entries.append(entry.get(row))
    if "decoder" not in case.levels:
        rows.pop("hidden")
        rows.pop("next_logits")
    return rows


class Writer:
    """What each mistake gives in every case, on top of what its file holds already."""

    def __init__(self, out, renewed, keys):
        """renewed: names of the cases that are made again, for the mistakes `keys`."""
        self.folder = out / "mistakes"
        self.keys = keys
        self.mistakes = {}
        for file in sorted(self.folder.glob("*.json")):
            mistake = read_json(file)
            key = mistake["key"]
            kept = mistake["cases"]
            if key in keys:
                kept = {name: rows for name, rows in kept.items() if name not in renewed}
            if kept and key in TITLES:
                self.mistakes[key] = mistake | {"cases": kept, "what": TITLES[key]}
            file.unlink()

    def add(self, key, chain, case, expected, found, unknown_rows=()):
        """What the mistake `key` gives in a case."""
        rows, largest = wrong_rows(expected, found)
        if largest <= SHOWS:
            return
        mistake = self.mistakes.setdefault(key, {
            "key": key,
            "what": TITLES[key],
            "chain": chain,
            "rounded": key in ROUNDED,
            "unknown_rows": list(unknown_rows),
            "cases": {}})
        mistake["cases"][case] = rows

    def wanted(self, kinds):
        """Those of some mistakes that are made again."""
        return [key for key in kinds if key in self.keys]

    def write(self):
        for key, mistake in self.mistakes.items():
            write_json(self.folder / f"{key}.json", mistake)


def add_model_case(writer, case, out):
    """Try every mistake on a case with a model."""
    inputs = read_json(out / case.name / "case.json")
    expected = read_json(out / case.name / "expected.json")
    model = case.model()
    stop = case.stop(model, out)
    for key in writer.wanted(DECODER | SCORE):
        found = port_rows(case, model, stop, inputs, key)
        writer.add(key, "model", case.name, expected, found, ("loss", "grad"))
    prefixes = [prefix["ids"] for prefix in inputs["prefixes"]]
    for key in writer.wanted(TRAINING):
        found = training_rows(model, stop, prefixes, inputs["labels"], key)
        writer.add(key, "model", case.name, expected, found)
    if inputs["runs"]:
        for key in writer.wanted(PATHS | CHECK | RESUME | BRANCHES):
            found = wrong_run_rows(model, stop, inputs["runs"], expected, key)
            writer.add(key, "run", case.name, expected, found)


def write_all(out, names, keys=None):
    """Write the mistakes that show in the vectors of the folder `out`, those of these cases anew;
    keys: of these mistakes only."""
    writer = Writer(out, names, TITLES if keys is None else keys)
    for name in names:
        if name in cases.BY_NAME:
            add_model_case(writer, cases.BY_NAME[name], out)
        else:
            inputs = read_json(out / name / "case.json")
            expected = read_json(out / name / "expected.json")
            if name == "sampler":
                for key in writer.wanted(SAMPLER):
                    writer.add(key, "sampler", name, expected, sampler_rows(inputs, key))
            else:
                for key in writer.wanted(CHOICES):
                    chain = "ranks" if key.startswith("rank-") else "votes"
                    writer.add(key, chain, name, expected, choices_rows(inputs, key))
        print(f"{name}: {len(writer.mistakes)} mistakes", flush=True)
    writer.write()
