"""Certify another implementation of STOP (section 3 of the paper) against the published vectors.

    python oracle/certify.py DIR [--cases qwen2,qwen3] [--levels decoder,score] [--json FILE]
    python oracle/certify.py --command "./port"           # a case on stdin, its hand-in on stdout
    python oracle/certify.py --server URL
    python oracle/certify.py DIR --dtype bfloat16
    python oracle/certify.py --fresh SEED --write DIR     # inputs that nobody can have copied
    python oracle/certify.py DIR --fresh SEED             # and the answers to them

DIR holds NAME.json for each case, with what the other implementation computes from
vectors/NAME/case.json, under the names of vectors/NAME/expected.json. The standard library is
enough; --fresh, and runs in bfloat16, are followed by the reference itself, which needs torch and
this project. Exit status: 0 no level fails and at least one passes; 1 a level fails or none is
shown; 2 something cannot be read.
"""
import argparse
import functools
import hashlib
import json
import os
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))  # python -I leaves it out
import ask  # noqa: E402
import rounded  # noqa: E402
from causes import Case, name_cause  # noqa: E402
from compare import (  # noqa: E402
    ACCEPTABLE, CHAINS, CLAUSES, DIAGNOSTIC, FAIL, LEVELS, LEVEL_OF, NOT_SHOWN, PASS,
    Result, accept, compare_row, summary_of)
from digest import MANIFEST_SHA256  # noqa: E402
from hand_in import kind_of, parse_json, read_hand_in, strange_files  # noqa: E402

VECTORS = HERE / "vectors"
MODEL_FREE = ("sampler", "choices")
FOLLOWED = ("uninterrupted", "paths", "kept")  # in bfloat16 and for fresh inputs


# ------------------------------------------------------------------------------ the published files


def file_digest(file):
    """SHA-256 of a file's bytes, in hexadecimal."""
    about = file.stat()
    return digest_as_of(file, about.st_mtime_ns, about.st_size)


@functools.cache
def digest_as_of(file, changed, size):
    """The same, of a file that was last changed then and has this size: read once."""
    return hashlib.sha256(file.read_bytes()).hexdigest()


def read_manifest():
    """The manifest of the vectors, tolerances included. ValueError where it is not the one that
    this certify was published with."""
    file = VECTORS / "manifest.json"
    if not file.is_file():
        raise ValueError("vectors/manifest.json: missing: the folder vectors belongs beside "
                         "certify.py, as it was published")
    if file_digest(file) != MANIFEST_SHA256:
        raise ValueError("vectors/manifest.json: its SHA-256 is not that of digest.py: the file "
                         "was changed, or is of another version than certify.py")
    return parse_json(file.read_bytes(), file)


def require_unchanged(manifest):
    """Raise ValueError where a published file is not the one of the manifest."""
    files = manifest["files"]
    for name, about in files.items():
        file = HERE / name
        if not file.is_file():
            if name.startswith("vectors/"):
                raise ValueError(f"{name}: missing, though vectors/manifest.json lists it")
            continue  # the archive leaves some originals out
        if file_digest(file) != about["sha256"]:
            raise ValueError(f"{name}: its SHA-256 is not that of vectors/manifest.json: the file "
                             "was changed")
    for file in sorted(VECTORS.rglob("*.json")):
        name = file.relative_to(HERE).as_posix()
        if name not in files and name != "vectors/manifest.json":
            raise ValueError(f"{name}: vectors/manifest.json does not list it")


@functools.cache
def published(name, what):
    """A published file of a case, {} where it has none."""
    file = VECTORS / name / f"{what}.json"
    return parse_json(file.read_bytes(), file) if file.is_file() else {}


@functools.cache
def read_all(folder):
    """The objects in the JSON files of a folder of the vectors."""
    return [parse_json(file.read_bytes(), file)
            for file in sorted((VECTORS / folder).glob("*.json"))]


def follower():
    """The reference that follows runs and answers fresh inputs."""
    sys.path[:0] = [str(HERE.parent), str(HERE / "making")]  # the project's rooms
    try:
        import follow
    except ImportError as error:
        raise ValueError(f"the reference cannot be run here: {error}: --fresh and runs in bfloat16 "
                         "need torch and the whole project") from None
    return follow


class Published:
    """What a case of the vectors asks for and expects."""

    def __init__(self, name):
        self.name = name
        self.inputs = published(name, "case")
        self.expected = published(name, "expected")
        self.allowed = published(name, "allowed")

    def alternatives(self, row):
        """Pairs of a rounding that a port may choose and {label: the numbers it gives}."""
        for about in read_all("acceptable"):
            entries = about["cases"].get(self.name, {}).get(row)
            if entries:
                yield about["what"], entries


def case_of(name, options):
    """What a case asks for and expects: published, or made by the reference for a fresh one."""
    if options.fresh is None:
        return Published(name)
    return follower().Fresh(name, options.fresh)


# ---------------------------------------------------------------------------------- the comparison


def compared_rows(case, found, options):
    """{row: {label: Result}} of one case, of the levels asked for."""
    rows = {}
    follows = options.dtype == "bfloat16" or options.fresh is not None
    for row, value in case.expected.items():
        if LEVEL_OF[row] not in options.levels or not value:
            continue
        if follows and row in FOLLOWED:
            continue
        if options.dtype == "bfloat16" and row in rounded.ROWS:
            rows[row] = rounded.compare_row(
                case.name, row, case.expected, found.get(row), case.inputs, case.allowed,
                options.manifest["bfloat16"])
        elif options.dtype == "bfloat16" and row in ("rope", "experts"):
            continue  # choices between close experts may differ
        else:
            rows[row] = compare_row(row, value, found.get(row), case.allowed)
            if any(result.state == FAIL for result in rows[row].values()):
                accept(row, rows[row], case.alternatives(row), found.get(row), case.allowed)
    if follows and "run" in options.levels and case.inputs.get("runs"):
        if any(found.get(row) is not None for row in FOLLOWED):
            results = follower().run_results(case, found, options)
        else:
            results = {"": Result(NOT_SHOWN)}
        rows["paths"] = results
    return rows


def level_state(level, compared):
    """PASS, ACCEPTABLE, FAIL or NOT SHOWN of a level, over all cases that were looked at."""
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
    for state in (FAIL, NOT_SHOWN, ACCEPTABLE):
        if state in states:
            return state
    return PASS if states else NOT_SHOWN


def find_causes(compared):
    """The first failing row of each chain of computation and, where it is known, its cause.

    A run is not explained where something that it is built on fails already."""
    built_on = LEVELS["decoder"] + LEVELS["score"] + LEVELS["sampler"] + CHAINS["ranks"]
    judged = {name: Case(about["case"].expected, about["found"].values, about["rows"],
                         about["case"].allowed) for name, about in compared.items()}
    causes = []
    for chain, rows in CHAINS.items():
        explained = chain != "run" or not any_failure(compared, built_on)
        if explained and any_failure(compared, rows):
            causes.append(name_cause(read_all("mistakes"), chain, judged))
    return causes


def any_failure(compared, rows):
    """Whether any case fails in one of these rows."""
    for about in compared.values():
        for row, results in about["rows"].items():
            if row in rows and summary_of(results).state == FAIL:
                return True
    return False


# --------------------------------------------------------------------------------------- the report


def row_line(name, row, summary):
    """One line of the table."""
    numbers = ""
    if summary.allowed:
        numbers = f"{summary.difference:<9.3g} {summary.allowed:<9.3g}"
    clauses = " ".join(CLAUSES[row][:4]) + (" ..." if len(CLAUSES[row]) > 4 else "")
    return f"{name:9}{row:15}{summary.state:11}{numbers:20}{clauses:18}{summary.place}"


def cause_line(about):
    """Where a chain of computation first fails, and why if that is known."""
    first = f"{about['case']}: first failure at {about['row']}{about['place']}"
    if about["cause"] is not None:
        return f"{first}; cause: {about['cause']}"
    if about["candidates"]:
        return f"{first}; not decided between: {'; or '.join(about['candidates'])}"
    return f"{first}; no known mistake gives these numbers"


def table(compared, states, causes, notes, options):
    """The report as lines of text."""
    lines = [f"{'case':9}{'row':15}{'result':11}{'worst':10}{'allowed':10}{'clauses':18}"
             "first place"]
    for name, about in compared.items():
        for row, results in about["rows"].items():
            lines.append(row_line(name, row, summary_of(results)))
    lines += [f"note: {note}" for note in notes]
    lines += [cause_line(about) for about in causes]
    whole = set(options.cases) == set(all_names())
    for level, state in states.items():
        names = [name for name, about in compared.items()
                 if any(LEVEL_OF[row] == level for row in about["rows"])]
        only = "" if whole or state == NOT_SHOWN else f" (only {', '.join(names)})"
        lines.append(f"{level:9} {options.dtype:9} {state}{only}")
    return lines


def entry_ids(case, row, results):
    """The ids of the entries of a row that fail."""
    lists = {"distributions": ("probabilities", "kept_sets"), "runs": FOLLOWED}
    key = next((key for key, rows in lists.items() if row in rows), row)
    items = case.inputs.get(key, [] if row == "rope" else case.inputs.get("prefixes", []))
    failing = [label for label, result in results.items() if result.state == FAIL]
    found = []
    for label in failing:
        if label.isdigit() and int(label) < len(items) and isinstance(items[int(label)], dict):
            found.append(items[int(label)].get("id", label))
        elif label not in ("", "unknown", "mean"):
            found.append(label)
    return found


def report(compared, states, causes, notes, options):
    """All that was found, as one JSON value."""
    rows = []
    for name, about in compared.items():
        for row, results in about["rows"].items():
            summary = summary_of(results)
            worst = summary.difference
            rows.append({
                "case": name,
                "row": row,
                "level": LEVEL_OF[row],
                "result": summary.state,
                "shown": sum(result.state != NOT_SHOWN for result in results.values()),
                "entries": len(results),
                "failing": entry_ids(about["case"], row, results),
                "worst": worst if abs(worst) < 1e300 else None,
                "allowed": summary.allowed,
                "place": summary.place,
                "clauses": CLAUSES[row]})
    handed_in = {}
    if options.folder is not None:
        for name in options.cases:
            for file in (options.folder / f"{name}.json", options.folder / f"{name}.safetensors"):
                if file.is_file():
                    handed_in[file.name] = file_digest(file)
    return {
        "implementation": options.name,
        "version": options.manifest["version"],
        "manifest_sha256": file_digest(VECTORS / "manifest.json"),
        "dtype": options.dtype,
        "fresh": options.fresh,
        "cases": list(compared),
        "levels": states,
        "rows": rows,
        "causes": causes,
        "notes": notes,
        "handed_in_sha256": handed_in}


def certify(options):
    """Compare everything that was asked for, print it; -> the exit status."""
    compared = {}
    notes = []
    if options.folder is not None:
        ours = None if options.json is None else Path(options.json).resolve()
        notes += [note for note in strange_files(options.folder, all_names())
                  if ours is None or not note.startswith(f"{ours.name}:")]
    for name in options.cases:
        case = case_of(name, options)
        if options.server is not None:
            found = ask.ask_server(options.server, name, case.inputs, case.expected, options)
        elif options.command is not None:
            found = ask.ask_command(options.command, name, case.inputs, case.expected, options)
        else:
            found = read_hand_in(options.folder, name, case.expected)
        notes += found.notes
        rows = compared_rows(case, found.values, options)
        compared[name] = {"case": case, "found": found, "rows": rows}
    states = {level: level_state(level, compared) for level in options.levels}
    exact = options.dtype == "float32" and options.fresh is None
    causes = find_causes(compared) if exact else []
    lines = table(compared, states, causes, notes, options)
    print("\n".join(lines), file=sys.stderr if options.json == "-" else sys.stdout)
    if options.json is not None:
        text = json.dumps(report(compared, states, causes, notes, options), indent=1)
        write_report(options.json, text + "\n")
    shown = states.values()
    return 0 if FAIL not in shown and (PASS in shown or ACCEPTABLE in shown) else 1


def write_report(target, text):
    """Write a report to a file, all or nothing; "-" is stdout."""
    if target == "-":
        sys.stdout.write(text)
        return
    require_target(target)
    file = Path(os.path.realpath(target))  # a link stays a link
    beside = file.with_name(f"{file.name}.{os.getpid()}.tmp")
    try:
        beside.write_text(text, encoding="utf-8")
        os.replace(beside, file)
    finally:
        beside.unlink(missing_ok=True)


def require_target(target):
    """Raise ValueError unless a plain file lies there or nothing, in a folder that is there: what
    others rely on is not replaced."""
    found = kind_of(target)
    if found not in (None, "a file"):
        raise ValueError(f"{target}: found {found}, expected a file or none")
    folder = Path(os.path.realpath(target)).parent
    if not folder.is_dir():
        raise ValueError(f"{target}: cannot be written: found no folder {folder}")


# --------------------------------------------------------------------------------- the command line


def all_names():
    """The names of all cases."""
    return sorted((file.parent.name for file in VECTORS.glob("*/case.json")),
                  key=lambda name: (name in MODEL_FREE, name))


def chosen(text, known, flag):
    """The names in a comma-separated list, each of them known."""
    if text is None:
        return list(known)
    names = text.split(",")
    for name in names:
        if name not in known:
            raise ValueError(f"{flag}: found {name[:40]!r}, expected {', '.join(known)}")
    return list(dict.fromkeys(names))


def read_options(options):
    """The options, checked."""
    if options.json not in (None, "-"):
        require_target(options.json)
    options.root = HERE
    options.manifest = read_manifest()
    require_unchanged(options.manifest)
    options.cases = chosen(options.cases, all_names(), "--cases")
    options.levels = chosen(options.levels, LEVELS, "--levels")
    sources = [options.folder, options.server, options.command, options.write]
    if sum(source is not None for source in sources) != 1:
        raise ValueError("found none or several, expected one of DIR, --command, --server and "
                         "--write")
    if options.write is not None and options.fresh is None:
        raise ValueError("--write: found no --fresh, expected --fresh SEED --write DIR")
    if options.fresh is not None and options.dtype == "bfloat16":
        raise ValueError("--dtype: found bfloat16 beside --fresh, expected float32: on inputs made "
                         "from a seed right ports in bfloat16 lie too far apart to be judged; "
                         "compare the published inputs in bfloat16, and fresh ones in float32")
    if options.fresh is not None and not 0 <= options.fresh < 2 ** 62:
        raise ValueError(f"--fresh: found {options.fresh}, expected 0 to 2 ** 62 - 1")
    if options.folder is not None and not options.folder.is_dir():
        raise ValueError(f"{options.folder}: no such folder")
    if not 0 < options.timeout <= 10 ** 6:
        raise ValueError(f"--timeout: found {options.timeout}, expected seconds, above 0")
    return options


def write_fresh(options):
    """Write the inputs that a seed gives: DIR/NAME/case.json."""
    making = follower()
    for name in options.cases:
        print(making.write_inputs(name, options.fresh, Path(options.write)))
    return 0


def main():
    """The command line; -> the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False)
    parser.add_argument("folder", type=Path, nargs="?", metavar="DIR",
                        help="the other implementation's outputs")
    parser.add_argument("--cases", help="those to look at, as in qwen2,sampler (default: all)")
    parser.add_argument("--levels", help="those to look at, as in sampler,run (default: all)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32",
                        help="what the outputs were computed in; float64 counts as float32")
    parser.add_argument("--json", metavar="FILE",
                        help="write the report there, too; - writes it, and it alone, to stdout")
    parser.add_argument("--fresh", type=int, metavar="SEED", help="inputs made from this seed")
    parser.add_argument("--write", metavar="DIR", help="with --fresh: write the inputs there")
    parser.add_argument("--server", metavar="URL", help="ask an engine; see PORTING.md")
    parser.add_argument("--command", metavar="COMMAND",
                        help="run this once a case: the case on stdin, its hand-in on stdout")
    parser.add_argument("--timeout", type=float, default=600, metavar="SECONDS",
                        help="for one answer of a server or a command (default: 600)")
    parser.add_argument("--name", metavar="TEXT", help="what was tried, for the report")
    arguments = parser.parse_args()
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")
    try:
        options = read_options(arguments)
        return write_fresh(options) if options.write is not None else certify(options)
    except MemoryError:
        reason = "what was handed in does not fit the memory"
    except (ValueError, OSError) as error:
        reason = " ".join(str(error).split())
    print(f"error: {reason}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
