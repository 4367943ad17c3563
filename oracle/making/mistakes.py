"""Write the negative vectors: for each known mistake, the wrong outputs that it gives.

`vectors/mistakes/KEY.json`: key, what (the name that certify gives), chain, and for each case and
row the entries that come out wrong. Of long entries some numbers are published: "values" at the
flat places "at". What is not listed comes out right, or, where "unknown" says so, was not tried.
"""
import numpy as np
import torch

import cases
from compare import (
    CHAINS, LEVELS, NUMBER_ROWS, PASS, PATH_ROWS, allowed_of, as_numbers, compare_paths, entries_of,
    name_of)
from clauses import clauses_of_mistake
from plain_decoder import DECODER, ROUNDED, SCORE, Port
from plumbing.records import read_json
from vector_files import write_json
from wrong_run import BRANCHES, CHECK, PATHS, RESUME, wrong_run_rows
from plain_sampler import CHOICES, SAMPLER, choices_rows, sampler_rows
from wrong_training import TRAINING, training_rows

TITLES = DECODER | SCORE | TRAINING | PATHS | CHECK | RESUME | BRANCHES | SAMPLER | CHOICES
LONGEST = 70         # longer prefixes are not tried with mistakes,
FAR = ("bfloat16-positions", "ring-64", "positions-capped", "yarn-length", "yarn-truncate")
FAR_LONGEST = 300    # but with those that show far behind
SHOWS = 2            # a mistake counts where it moves a number by so many times what is allowed
LARGEST = 10         # places shown of an entry: where it changes most,
SPREAD = 6           # and some at equal distances


def chosen_places(change):
    """Flat places of an entry to publish: where it changes most, and some spread evenly."""
    largest = np.argsort(-change, kind="stable")[:LARGEST]
    spread = np.linspace(0, len(change) - 1, SPREAD).astype(int)
    return sorted({int(place) for place in (*largest, *spread)})


def numbers_entry(expected, wrong, allowed):
    """(the published entry or None where it is right, its change in units of what is allowed)."""
    shape, right = as_numbers(expected)
    right = np.array(right)
    wrong = np.asarray(torch.as_tensor(wrong).float()).astype(np.float64)
    if wrong.shape != shape:
        return {"shape": list(wrong.shape)}, SHOWS + 1
    change = np.abs(wrong.reshape(-1) - right)
    units = float(change.max()) / allowed
    if units <= 0.5:
        return None, units
    at = chosen_places(change)
    values = wrong.reshape(-1)[at].astype(np.float32)
    return {"at": at, "values": values}, units


def paths_entry(expected, wrong, allowed):
    """The paths that a mistake changes, and the names of those that are gone."""
    right = {name_of(path): path for path in expected}
    changed = []
    for path in wrong:
        name = name_of(path)
        plain = path | {"score": float(path["score"])} if "score" in path else path
        if name not in right or compare_paths([right[name]], [plain], allowed).state != PASS:
            changed.append(path)
    gone = sorted(right.keys() - {name_of(path) for path in wrong})
    if not changed and not gone:
        return None, 0.0
    entry = {"value": changed}
    return (entry | {"gone": gone} if gone else entry), SHOWS + 1


def entry_of(row, expected, wrong, allowed):
    """(the published entry or None, its change in units of what is allowed), for any row."""
    if row in NUMBER_ROWS:
        return numbers_entry(expected, wrong, allowed)
    if row in PATH_ROWS:
        return paths_entry(expected, wrong, allowed)
    if wrong == expected:
        return None, 0.0
    return {"value": wrong}, SHOWS + 1


def wrong_rows(expected_rows, found_rows, allowed):
    """({row: {"entries", "unknown"}}, the largest change) of what a mistake gives in a case."""
    rows = {}
    largest = 0.0
    for row, found in found_rows.items():
        expected = entries_of(row, expected_rows[row])
        wrong = entries_of(row, found)
        entries = {}
        unknown = []
        for label, right in expected.items():
            if wrong.get(label) is None and right is not None and row != "votes":
                unknown.append(label)
                continue
            limit = allowed_of(row, label, allowed)
            entry, units = entry_of(row, right, wrong[label], limit)
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
    rows = {row: [] for row in CHAINS["model"] if row not in ("rope", "loss", "grad")}
    for prefix in inputs["prefixes"]:
        entry = {}
        if len(prefix["ids"]) <= (FAR_LONGEST if wrong in FAR else LONGEST):
            with torch.inference_mode():
                entry = port.decoder_entry(prefix["ids"]) | (port.score_entry(prefix["ids"]) or {})
        for row, entries in rows.items():
            entries.append(entry.get(row))
    if "decoder" not in case.levels:
        for row in LEVELS["decoder"]:
            rows.pop(row, None)
        return rows
    if not port.gpt_oss:
        rows.pop("experts")
    return {"rope": [port.rope_table(place) for place in inputs["rope_positions"]]} | rows


class Writer:
    """What each mistake gives in every case, on top of what its file holds already."""

    def __init__(self, out, renewed, keys):
        """renewed: names of the cases that are made again, for the mistakes `keys`."""
        self.folder = out / "mistakes"
        self.keys = keys
        self.mistakes = {}
        self.largest = {}
        for file in sorted(self.folder.glob("*.json")):
            mistake = read_json(file)
            key = mistake["key"]
            kept = mistake["cases"]
            if key in keys:
                kept = {name: rows for name, rows in kept.items() if name not in renewed}
            if key in TITLES:
                if kept:
                    self.largest[key] = SHOWS + 1
                self.mistakes[key] = mistake | {"cases": kept, "what": TITLES[key]}
            file.unlink()

    def add(self, key, chain, case, expected, found, allowed, unknown_rows=()):
        """What the mistake `key` gives in a case."""
        rows, largest = wrong_rows(expected, found, allowed)
        self.largest[key] = max(self.largest.get(key, 0.0), largest)
        if not rows:
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
            clauses = clauses_of_mistake(key, mistake["chain"])
            shows = self.largest.get(key, SHOWS + 1) > SHOWS  # in one case, and then all are listed
            if shows and mistake["cases"]:
                write_json(self.folder / f"{key}.json", mistake | {"clauses": clauses})
            else:
                print(f"{key}: shows nowhere", flush=True)


def add_model_case(writer, case, out):
    """Try every mistake on a case with a model."""
    inputs = read_json(out / case.name / "case.json")
    expected = read_json(out / case.name / "expected.json")
    allowed = read_json(out / case.name / "allowed.json")
    model = case.model()
    stop = case.stop(model, out)
    for key in writer.wanted(DECODER | SCORE):
        found = port_rows(case, model, stop, inputs, key)
        writer.add(key, "model", case.name, expected, found, allowed,
                   ("loss", "grad"))
    prefixes = [prefix["ids"] for prefix in inputs["prefixes"]]
    for key in writer.wanted(TRAINING):
        found = training_rows(model, stop, prefixes, inputs["labels"], key)
        writer.add(key, "model", case.name, expected, found, allowed)
    if inputs["runs"]:
        for key in writer.wanted(PATHS | CHECK | RESUME | BRANCHES):
            found = wrong_run_rows(model, stop, inputs["runs"], expected, key)
            writer.add(key, "run", case.name, expected, found, allowed)


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
                    writer.add(key, "sampler", name, expected, sampler_rows(inputs, key), {})
            else:
                for key in writer.wanted(CHOICES):
                    chain = "ranks" if key.startswith("rank-") else "votes"
                    writer.add(key, chain, name, expected, choices_rows(inputs, key), {})
        print(f"{name}: {len(writer.mistakes)} mistakes", flush=True)
    writer.write()
