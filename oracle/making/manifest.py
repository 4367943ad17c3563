"""The manifest of the vectors: version, levels, clauses, tolerances, and every file's digest."""
from pathlib import Path

import cases
import compare
import rounding
from plumbing.records import read_json
from vector_files import file_digest, write_json

HERE = Path(__file__).resolve().parent.parent  # oracle/
VERSION = "1.1.1"
GOLDEN = "golden: transformers 5.23.0, peft 0.21.2 and the authors' code; see golden/README.md"
OURS = "ours: oracle/making/make_vectors.py"
DIGEST = '''"""What certify holds vectors/manifest.json against; written by making/manifest.py."""
MANIFEST_SHA256 = "{digest}"
'''


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
    levels = {}
    for level, rows in compare.LEVELS.items():
        levels[level] = {"rows": list(rows), "cases": cases_of(level)}
    bfloat16 = HERE / "making" / "bfloat16.json"
    write_json(out / "manifest.json", {
        "version": VERSION,
        "levels": levels,
        "diagnostic": list(compare.DIAGNOSTIC),
        "clauses": compare.CLAUSES,
        "float32": {
            "states": rounding.STATES, "stop.states": rounding.STOP_STATES,
            "logits": rounding.LOGITS, "scores": rounding.SCORES, "loss": rounding.LOSS,
            "small_scores": rounding.SMALL_SCORES, "grad": rounding.GRADIENTS,
            "probabilities": compare.PROBABILITY,
            "times_float32": rounding.FLOAT32},
        "bfloat16": allowed_in(read_json(bfloat16)),
        "files": described_files(out)})
    if out.resolve() == HERE / "vectors":
        digest = file_digest(out / "manifest.json")
        (HERE / "digest.py").write_text(DIGEST.format(digest=digest))


def allowed_in(measured):
    """What certify needs of bfloat16.json."""
    return {key: measured[key] for key in ("inputs", "rows", "runs")}


def cases_of(level):
    """The names of the cases that show a level."""
    if level == "sampler":
        return ["sampler"]
    names = [case.name for case in cases.CASES if level in case.levels]
    return ["choices"] + names if level == "run" else names
