"""Measure how far implementations in bfloat16 lie from the vectors: writes bfloat16.json.

    python oracle/measure_bfloat16.py DIR...    # outputs of others, computed in bfloat16

Our own rooms are measured too; of all the larger number counts.
"""
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]  # the project's root, for its rooms
import cases  # noqa: E402
import follow  # noqa: E402
import reference  # noqa: E402
import rounded  # noqa: E402
from hand_in import read_hand_in  # noqa: E402
from plumbing.records import read_json  # noqa: E402
from vector_files import to_json, write_json  # noqa: E402


def our_outputs(case):
    """What the rooms compute in bfloat16, as it would be handed in."""
    inputs = cases.read_case(case.name)
    model = case.model(torch.bfloat16)
    rows = reference.case_rows(case, model, case.stop(model), inputs)
    return json.loads(to_json(rows))


def measure(case, found):
    """Of one implementation: rows {row: {mean, largest}}, runs {number: {mean_gap, mean_score}}."""
    expected = read_json(HERE / "vectors" / case.name / "expected.json")
    rows = {}
    for row in rounded.ROWS:
        if row in expected:
            off = list(rounded.distances(row, expected[row], found.get(row)).values())
            if off:
                rows[row] = {"mean": float(np.mean(off)), "largest": float(max(off))}
    runs = {}
    model = case.model()
    stop = case.stop(model)
    for number, run in enumerate(cases.read_case(case.name)["runs"]):
        if follow.branches(run) or not follow.is_shown(found, number):
            continue
        result = follow.follow_run(model, stop, run, found, number)
        if result["fault"]:
            raise ValueError(f"{case.name}: run {number}: {result['fault']}")
        runs[str(number)] = {"mean_gap": float(result["gaps"].mean()),
                             "mean_score": float(np.mean(result["scores"]))}
    return SimpleNamespace(rows=rows, runs=runs)


def larger(numbers):
    """{key: the largest of several objects' numbers}."""
    keys = numbers[0].keys()
    return {key: max(entry[key] for entry in numbers) for key in keys}


def main():
    """Measure all, and write the table."""
    torch.set_num_threads(1)
    table = {"rows": {}, "runs": {}, "measured": {}}
    for case in cases.CASES:
        expected = read_json(HERE / "vectors" / case.name / "expected.json")
        measured = {"rooms": measure(case, our_outputs(case))}
        for folder in sys.argv[1:]:
            found = read_hand_in(Path(folder), case.name, expected)
            if found:
                measured[Path(folder).name] = measure(case, found)
        table["rows"][case.name] = {}
        for row in measured["rooms"].rows:
            known = [one.rows[row] for one in measured.values() if row in one.rows]
            table["rows"][case.name][row] = larger(known)
        table["runs"][case.name] = {}
        for number in measured["rooms"].runs:
            known = [one.runs[number] for one in measured.values() if number in one.runs]
            table["runs"][case.name][number] = larger(known)
        for name, one in measured.items():
            about = {"rows": one.rows, "runs": one.runs}
            table["measured"].setdefault(name, {})[case.name] = about
        print(case.name, sorted(measured), flush=True)
    write_json(HERE / "bfloat16.json", table)


if __name__ == "__main__":
    main()
