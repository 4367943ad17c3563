"""The manifest of the vectors: version, levels, clauses, tolerances, and every file's digest."""
from pathlib import Path

import cases
import compare
from plumbing.records import read_json
from vector_files import file_digest, write_json

HERE = Path(__file__).resolve().parent
VERSION = "1.0.0"
GOLDEN = "golden: transformers 5.23.0, peft 0.21.2 and the authors' code; see golden/README.md"
OURS = "ours: oracle/make_vectors.py"


def described_files(out):
    """{path from oracle/: {sha256, provenance}} of all inputs and outputs."""
    files = {}
    for folder in (HERE / "golden" / "checkpoints", HERE / "golden" / "mxfp4",
                   HERE / "golden" / "scorers"):
        for file in sorted(folder.rglob("*")):
            if file.is_file():
                name = str(file.relative_to(HERE))
                files[name] = {"sha256": file_digest(file), "provenance": GOLDEN}
    for file in sorted(out.rglob("*")):
        if file.is_file() and file.name != "manifest.json":
            name = f"vectors/{file.relative_to(out)}"
            files[name] = {"sha256": file_digest(file), "provenance": OURS}
    return files


def write(out):
    """Write manifest.json for the vectors in a folder."""
    tolerances = {}
    for row, (tolerance, floor) in compare.FLOATS.items():
        tolerances[row] = {"tolerance": tolerance, "floor": floor}
    levels = {}
    for level, rows in compare.LEVELS.items():
        levels[level] = {"rows": list(rows), "cases": cases_of(level)}
    bfloat16 = HERE / "bfloat16.json"
    write_json(out / "manifest.json", {
        "version": VERSION,
        "levels": levels,
        "diagnostic": list(compare.DIAGNOSTIC),
        "clauses": compare.CLAUSES,
        "float32": tolerances,
        "path_score": compare.PATH_SCORE,
        "bfloat16": read_json(bfloat16) if bfloat16.is_file() else {},
        "files": described_files(out)})


def cases_of(level):
    """The names of the cases that show a level."""
    if level == "sampler":
        return ["sampler"]
    names = [case.name for case in cases.CASES if level in case.levels]
    return ["choices"] + names if level == "run" else names
