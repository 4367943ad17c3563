"""Write IMPLEMENTATIONS.md from certify's reports.

    python oracle/certify.py DIR --name "numpy" --json oracle/reports/numpy.json
    python oracle/making/implementations.py

oracle/reports holds the reports, as `--json` writes them. A report of another version of the
vectors is shown with its version.
"""
import json
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
LEVELS = ("decoder", "score", "training", "sampler", "run")
TEXT = """# Implementations

Who passes what of the vectors in `oracle/`, version {version}, as `python oracle/certify.py` says:
made by `python oracle/making/implementations.py` from the reports in `oracle/reports`. Send yours
with `--name TEXT --json FILE`: it holds the version, the digests of what was handed in, and every
row.

| implementation | dtype | decoder | score | training step | sampler | whole run | cases |
|---|---|---|---|---|---|---|---|
{lines}
NOT SHOWN: not all of the level was handed in: the numpy port has no training step, that of
transformers no sampler of its own and no branches. What this project hands in is written by
`python oracle/making/rooms.py`. It and the two ports in `tests/` ran with torch 2.13.0,
transformers 5.24.0 and PEFT 0.21.2 on a CPU, attention `eager` in transformers.
No engine (vLLM, SGLang, llama.cpp) has been tried.
"""


def verdict(report, level):
    """A level's verdict, and what was left out of it."""
    state = report["levels"].get(level, "NOT ASKED")
    rows = [row for row in report["rows"] if row["level"] == level and row["shown"]]
    if state == "NOT SHOWN" and rows:
        shown = sum(row["shown"] for row in rows)
        count = sum(row["entries"] for row in rows)
        return f"NOT SHOWN: {shown} of {count} entries, none of them fails"
    return state


def line(report, version):
    """A row of the table."""
    name = report["implementation"] or "no name"
    if report["version"] != version:
        name += f" (vectors {report['version']})"
    shown = {row["case"] for row in report["rows"] if row["shown"]}
    cells = [name, report["dtype"], *[verdict(report, level) for level in LEVELS],
             ", ".join(case for case in report["cases"] if case in shown)]
    return "| " + " | ".join(cell.replace("|", "/") for cell in cells) + " |\n"


def text():
    """IMPLEMENTATIONS.md."""
    manifest = json.loads((ROOT / "oracle" / "vectors" / "manifest.json").read_text())
    reports = []
    for file in sorted((ROOT / "oracle" / "reports").glob("*.json")):
        reports.append(json.loads(file.read_text()))
    lines = "".join(line(report, manifest["version"]) for report in reports)
    return TEXT.format(version=manifest["version"], lines=lines)


def main():
    """Write IMPLEMENTATIONS.md."""
    (ROOT / "IMPLEMENTATIONS.md").write_text(text())


if __name__ == "__main__":
    main()
