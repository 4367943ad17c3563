"""Certify another implementation of STOP (section 3 of the paper) against the published vectors.

    python oracle/certify.py DIR [--cases qwen2,qwen3] [--levels decoder,score] [--json FILE]
    python oracle/certify.py DIR --dtype bfloat16
    python oracle/certify.py --fresh SEED --write DIR     # inputs that nobody can have copied
    python oracle/certify.py DIR --fresh SEED             # and the answers to them
    python oracle/certify.py --server URL

DIR holds NAME.json for each case, with what the other implementation computes from
vectors/NAME/case.json, under the names of vectors/NAME/expected.json. Exit status: 0 no level fails
and at least one passes; 1 a level fails or none is shown; 2 something cannot be read.
"""
import argparse
import functools
import json
import sys
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]  # the project's root, for its rooms
import cases  # noqa: E402
import follow  # noqa: E402
import rounded  # noqa: E402
import server  # noqa: E402
from compare import (  # noqa: E402
    CHAINS, CLAUSES, DIAGNOSTIC, FAIL, LEVELS, LEVEL_OF, NOT_SHOWN, PASS, PATH_ROWS, Result,
    compare_row, name_cause, summary_of)
from hand_in import read_hand_in  # noqa: E402
from plumbing.files import require_target  # noqa: E402
from plumbing.records import read_json, write_atomic  # noqa: E402
from vector_files import file_digest, write_json  # noqa: E402


def read_expected(name, fresh):
    """{row: value} that a case must give: published, or made by the reference for a fresh one."""
    if fresh is None:
        return read_json(HERE / "vectors" / name / "expected.json")
    return follow.fresh_rows(name, fresh)


def compared_rows(name, expected, found, options):
    """{row: {label: Result}} of one case, of the levels asked for."""
    rows = {}
    for row, value in expected.items():
        if LEVEL_OF[row] not in options.levels:
            continue
        is_run = row in PATH_ROWS or row == "kept"
        if is_run and (options.dtype == "bfloat16" or options.fresh is not None):
            continue
        if options.dtype == "bfloat16" and row in rounded.ROWS:
            rows[row] = rounded.compare_row(name, row, value, found.get(row), options.manifest)
        else:
            rows[row] = compare_row(row, value, found.get(row))
    followed = options.dtype == "bfloat16" or options.fresh is not None
    if followed and "run" in options.levels and "uninterrupted" in expected:
        rows |= follow.run_rows(name, found, options)
    return rows


def level_state(level, compared):
    """PASS, FAIL or NOT SHOWN of a level, over all cases that were looked at."""
    states = []
    for about in compared.values():
        for row, results in about["rows"].items():
            if LEVEL_OF[row] != level:
                continue
            state = summary_of(results).state
            absent = all(result.state == NOT_SHOWN and not result.place
                         for result in results.values())
            if row in DIAGNOSTIC and absent:
                continue
            states.append(state)
    if FAIL in states:
        return FAIL
    if not states or NOT_SHOWN in states:
        return NOT_SHOWN
    return PASS


def row_line(name, row, summary):
    """One line of the table."""
    numbers = ""
    if summary.allowed:
        numbers = f"{summary.difference:<9.3g} {summary.allowed:<9.3g}"
    clauses = " ".join(CLAUSES[row][:4]) + (" ..." if len(CLAUSES[row]) > 4 else "")
    return f"{name:9}{row:15}{summary.state:10}{numbers:20}{clauses:18}{summary.place}"


def print_rows(compared):
    """Print the table of all rows."""
    print(f"{'case':9}{'row':15}{'result':10}{'worst':10}{'allowed':10}{'clauses':18}first place")
    for name, about in compared.items():
        for row, results in about["rows"].items():
            print(row_line(name, row, summary_of(results)))


@functools.cache
def read_mistakes():
    """The negative vectors."""
    folder = HERE / "vectors" / "mistakes"
    return [read_json(file) for file in sorted(folder.glob("*.json"))]


def find_causes(compared):
    """The first failing row of each chain of computation and, where it is known, its cause.

    A run is not explained where something that it is built on fails already."""
    built_on = LEVELS["decoder"] + LEVELS["score"] + LEVELS["sampler"] + CHAINS["ranks"]
    causes = []
    for chain, rows in CHAINS.items():
        explained = chain != "run" or not any_failure(compared, built_on)
        if explained and any_failure(compared, rows):
            causes.append(name_cause(read_mistakes(), chain, compared))
    return causes


def any_failure(compared, rows):
    """Whether any case fails in one of these rows."""
    for about in compared.values():
        for row, results in about["rows"].items():
            if row in rows and summary_of(results).state == FAIL:
                return True
    return False


def print_causes(causes):
    """Print where each chain of computation first fails, and why if that is known."""
    for about in causes:
        first = f"{about['case']}: first failure at {about['row']}{about['place']}"
        if about["cause"] is not None:
            print(f"{first}; cause: {about['cause']}")
        elif about["candidates"]:
            print(f"{first}; not decided between: {'; or '.join(about['candidates'])}")
        else:
            print(f"{first}; no known mistake gives these numbers")


def report(compared, states, causes, options):
    """All that was found, as one JSON value."""
    rows = []
    for name, about in compared.items():
        for row, results in about["rows"].items():
            summary = summary_of(results)
            rows.append({
                "case": name,
                "row": row,
                "level": LEVEL_OF[row],
                "result": summary.state,
                "shown": sum(result.state != NOT_SHOWN for result in results.values()),
                "entries": len(results),
                "worst": summary.difference if summary.difference < 1e300 else None,
                "allowed": summary.allowed,
                "place": summary.place,
                "clauses": CLAUSES[row]})
    handed_in = {}
    if options.folder is not None:
        for file in sorted(options.folder.glob("*.json")):
            handed_in[file.name] = file_digest(file)
    return {
        "version": options.manifest["version"],
        "manifest_sha256": file_digest(HERE / "vectors" / "manifest.json"),
        "dtype": options.dtype,
        "fresh": options.fresh,
        "cases": list(compared),
        "levels": states,
        "rows": rows,
        "causes": causes,
        "handed_in_sha256": handed_in}


def certify(options):
    """Compare everything that was asked for, print it; -> the exit status."""
    compared = {}
    for name in options.cases:
        expected = read_expected(name, options.fresh)
        if options.server is not None:
            found = server.ask(options.server, name, options)
        else:
            found = read_hand_in(options.folder, name, expected)
        compared[name] = {
            "expected": expected,
            "found": found,
            "rows": compared_rows(name, expected, found, options)}
    print_rows(compared)
    states = {level: level_state(level, compared) for level in options.levels}
    exact = options.dtype == "float32" and options.fresh is None
    causes = find_causes(compared) if exact else []
    print_causes(causes)
    everything = set(options.cases) == set(all_names(options.fresh))
    looked_at = "" if everything else f" (only {', '.join(options.cases)})"
    for level, state in states.items():
        print(f"{level:9} {options.dtype:9} {state}{looked_at}")
    if options.json is not None:
        text = json.dumps(report(compared, states, causes, options), indent=1)
        if options.json == "-":
            print(text)
        else:
            write_atomic(options.json, text + "\n")
    return 0 if PASS in states.values() and FAIL not in states.values() else 1


def all_names(fresh):
    """The names of all cases; the fresh ones need a model."""
    names = [case.name for case in cases.CASES]
    return names if fresh is not None else [*names, *cases.MODEL_FREE]


def chosen(text, known, flag):
    """The names in a comma-separated list, each of them known."""
    if text is None:
        return list(known)
    names = text.split(",")
    for name in names:
        if name not in known:
            raise ValueError(f"{flag}: found {name[:40]!r}, expected {', '.join(known)}")
    return names


def read_options(arguments):
    """The options, checked."""
    options = arguments
    options.cases = chosen(options.cases, all_names(options.fresh), "--cases")
    options.levels = chosen(options.levels, LEVELS, "--levels")
    options.manifest = read_json(HERE / "vectors" / "manifest.json")
    sources = [options.folder, options.server, options.write]
    if sum(source is not None for source in sources) != 1:
        raise ValueError("found none or several, expected one of DIR, --server URL and --write DIR")
    if options.write is not None and options.fresh is None:
        raise ValueError("--write: found no --fresh, expected --fresh SEED --write DIR")
    if options.fresh is not None and not 0 <= options.fresh < 2 ** 62:
        raise ValueError(f"--fresh: found {options.fresh}, expected 0 to 2 ** 62 - 1")
    if options.folder is not None and not options.folder.is_dir():
        raise ValueError(f"{options.folder}: no such folder")
    if options.json not in (None, "-"):
        require_target(options.json)
    return options


def write_fresh(options):
    """Write the inputs that a seed gives: DIR/NAME/case.json."""
    for name in options.cases:
        file = Path(options.write) / name / "case.json"
        write_json(file, follow.fresh_inputs(name, options.fresh))
        print(file)
    return 0


def main():
    """The command line; -> the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", metavar="DIR",
                        help="the other implementation's outputs")
    parser.add_argument("--cases", help="those to look at, as in qwen2,sampler (default: all)")
    parser.add_argument("--levels", help="those to look at, as in sampler,run (default: all)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32",
                        help="what the outputs were computed in")
    parser.add_argument("--json", metavar="FILE", help="write the report there, too; - prints it")
    parser.add_argument("--fresh", type=int, metavar="SEED", help="inputs made from this seed")
    parser.add_argument("--write", metavar="DIR", help="with --fresh: write the inputs there")
    parser.add_argument("--server", metavar="URL", help="ask an engine; see PORTING.md")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    try:
        options = read_options(arguments)
        return write_fresh(options) if options.write is not None else certify(options)
    except (ValueError, OSError) as error:
        reason = str(error).replace("\n", " ")
        print(f"error: {reason}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
