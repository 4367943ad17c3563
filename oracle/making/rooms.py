"""What this project itself hands in: a hand-in for certify, by the code that stop.py runs.

    python oracle/making/rooms.py --out DIR [--cases qwen2,sampler] [--dtype bfloat16]
    python oracle/certify.py DIR

--inputs DIR reads the cases that `certify.py --fresh SEED --write DIR` wrote.
"""
import dataclasses
import sys
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent.parent  # oracle/
sys.path[:0] = [str(HERE.parent), str(HERE), str(HERE / "making")]  # the root has the rooms
import cases  # noqa: E402
import reference  # noqa: E402
from plumbing.command_line import command_line, option  # noqa: E402
from plumbing.records import read_json  # noqa: E402
from vector_files import write_json  # noqa: E402

MODEL_FREE = {
    "sampler": reference.rooms_sampler_rows,
    "choices": reference.rooms_choices_rows}


@dataclasses.dataclass
class Settings:
    """What `python oracle/making/rooms.py` can be told."""
    out: str = option("rooms", "folder to write NAME.json to")
    cases: str | None = option(None, "those to compute, as in qwen2,sampler (default: all)")
    dtype: str = option("float32", "of base model and cache: float32 or bfloat16")
    inputs: str = option(str(HERE / "vectors"), "folder of the cases")


def rows_of(name, inputs, dtype):
    """{row: value} of a case."""
    if name in MODEL_FREE:
        return MODEL_FREE[name](inputs)
    case = cases.BY_NAME[name]
    model = case.model(dtype)
    return reference.rooms_rows(case, model, case.stop(model), inputs)


def main(settings):
    """Write a hand-in of each case."""
    torch.set_num_threads(1)
    known = [*cases.BY_NAME, *MODEL_FREE]
    names = known if settings.cases is None else settings.cases.split(",")
    for name in names:
        if name not in known:
            raise ValueError(f"cases: found {name[:60]!r}, expected some of {', '.join(known)}")
    if settings.dtype not in ("float32", "bfloat16"):
        raise ValueError(f"dtype: found {settings.dtype[:60]!r}, expected float32 or bfloat16")
    for name in names:
        inputs = read_json(Path(settings.inputs) / name / "case.json")
        rows = rows_of(name, inputs, getattr(torch, settings.dtype))
        write_json(Path(settings.out) / f"{name}.json", rows)
        print(name, flush=True)


if __name__ == "__main__":
    command_line(Settings, main)
