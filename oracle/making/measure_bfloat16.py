"""Measure how far implementations in bfloat16 lie from float32: writes bfloat16.json.

    python oracle/making/rooms.py --out rooms-bf16 --dtype bfloat16
    python tests/port_transformers.py --out transformers-bf16 --dtype bfloat16
    python oracle/making/measure_bfloat16.py --hand-ins rooms-bf16,transformers-bf16

For each seed our rooms compute the fresh prefixes of every case (their first 64 tokens) in
bfloat16 and in float32, whose own rounding is a thousandth of that. Of each row the largest
distance of all entries is kept, and the largest mean over the entries of a seed; and beside it what
was handed in for the published inputs, of our rooms and of transformers with PEFT: of all that the
largest. Runs are as 1.0 measured them. --seeds 21-40 --out FILE measures other seeds.
"""
import argparse
import sys
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent.parent  # oracle/
sys.path[:0] = [str(HERE.parent), str(HERE), str(HERE / "making")]  # the root has the rooms
import cases  # noqa: E402
import reference  # noqa: E402
import rounded  # noqa: E402
import rounding  # noqa: E402
from compare import entries_of  # noqa: E402
from plumbing.records import read_json, write_atomic  # noqa: E402
from vector_files import in_json, to_json  # noqa: E402

LONGEST = 64
FILE = HERE / "making" / "bfloat16.json"


def inputs_of(case, seed, vocab):
    """A case's fresh inputs, cut short and without runs."""
    inputs = cases.fresh_case(case, seed, vocab)
    for prefix in inputs["prefixes"]:
        prefix["ids"] = prefix["ids"][:LONGEST]
    return inputs | {"runs": []}


def tolerances(stop, expected):
    """{"logits": the tolerances in float32}, from which sum |w h| follows."""
    weight = stop.head.weight.detach()
    bias = stop.head.bias.detach().abs()
    allowed = []
    for states in expected["stop.hidden"]:
        terms = (weight * torch.tensor(states[-1])).abs().sum(-1) + bias
        allowed.append(rounding.LOGITS * terms.max().item())
    return {"logits": allowed}


def measure(case, first, last):
    """{row: [the distances of a seed's entries]} of our rooms."""
    models = {dtype: case.model(dtype) for dtype in (torch.float32, torch.bfloat16)}
    stops = {dtype: case.stop(model) for dtype, model in models.items()}
    found = {}
    for seed in range(first, last + 1):
        inputs = inputs_of(case, seed, models[torch.float32].config.vocab_size)
        rows = {dtype: in_json(reference.rooms_rows(case, model, stops[dtype], inputs))
                for dtype, model in models.items()}
        expected = rows[torch.float32]
        allowed = tolerances(stops[torch.float32], expected)
        for row in rounded.ARRAYS + ("logits",):
            if entries_of(row, expected.get(row)):
                off = rounded.distances(row, expected[row], rows[torch.bfloat16][row], allowed)
                found.setdefault(row, []).append(list(off.values()))
    return found


def measure_hand_ins(folders):
    """{case: {row: {"largest", "mean"}}} of what lies in some folders, for the published inputs."""
    found = {}
    for case in cases.CASES:
        expected = read_json(HERE / "vectors" / case.name / "expected.json")
        allowed = read_json(HERE / "vectors" / case.name / "allowed.json")
        for folder in folders:
            rows = read_json(folder / f"{case.name}.json")
            for row in rounded.ARRAYS + ("logits",):
                if rows.get(row) is None or row not in expected:
                    continue
                off = rounded.distances(row, expected[row], rows[row], allowed)
                known = found.setdefault(case.name, {}).get(row, {})
                found[case.name][row] = {key: value for key, value in summary(
                    [list(off.values())], known).items() if key != "count"}
    return found


def summary(entries, known):
    """The largest of a row's distances and of what was known."""
    return {
        "largest": max([known.get("largest", 0.0), *[max(off) for off in entries]]),
        "mean": max([known.get("mean", 0.0), *[sum(off) / len(off) for off in entries]]),
        "count": sum(map(len, entries))}


def main():
    """Measure all, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", default="1-6", help="as in 1-6")
    parser.add_argument("--out", type=Path, default=FILE, help="file to write")
    parser.add_argument("--hand-ins", help="folders of bfloat16's answers to the published inputs")
    settings = parser.parse_args()
    first, last = map(int, settings.seeds.split("-"))
    torch.set_num_threads(1)
    written = read_json(FILE)
    if settings.hand_ins is not None:
        written["published"] = measure_hand_ins(list(map(Path, settings.hand_ins.split(","))))
    written["inputs"] = (f"fresh seeds {first} to {last} of our rooms; the published ones, of our "
                         "rooms and of transformers with PEFT")
    for case in cases.CASES:
        rows = {}
        for row, entries in measure(case, first, last).items():
            rows[row] = summary(entries, written["published"].get(case.name, {}).get(row, {}))
        if "hidden" in rows:
            rows["layers"] = rows["hidden"]  # before the final norm they lie no further off
        written["rows"][case.name] = rows
        print(case.name, flush=True)
    write_atomic(settings.out, to_json(written) + "\n")


if __name__ == "__main__":
    main()
