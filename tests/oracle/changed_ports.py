"""Change a right port in one place after another, and count what certify says of it.

    python tests/oracle/changed_ports.py --part sampler [--count 100] [--seed 1] [--fresh SEED]

The port is tests/port_numpy.py without the mistakes that it can make on demand. One place of its
code is changed at a time: < becomes <=, + becomes -, a number grows by one, `and` becomes `or`,
... The places are drawn at random from those that belong to a part: sampler, choices, model
(decoder and score) or run. None of these changes was chosen with the vectors in mind, so they tell
how many mistakes go unnoticed that nobody has listed.

A line for each changed port: where, what, and what certify says; then the counts. A port that stops
with an error, or does not end, hands in nothing. What passes is to be looked at: some changes
change nothing.
"""
import argparse
import ast
import contextlib
import copy
import functools
import importlib.util
import io
import json
import random
import signal
import sys
import tempfile
from pathlib import Path

TESTS = Path(__file__).resolve().parent.parent
ROOT = TESTS.parent
PORT = TESTS / "port_numpy.py"
sys.path[:0] = [str(ROOT), str(ROOT / "oracle"), str(ROOT / "oracle" / "making")]
import certify  # noqa: E402

# part: the functions and classes of the port that belong to it, and the cases that show it
PARTS = {
    "sampler": (("mix", "make_key", "make_number", "distribution", "pick"), ("sampler",)),
    "choices": (("rank", "number_of", "votes", "ranked"), ("choices",)),
    "model": (("unpack", "sigmoid", "softmax", "Model"),
              ("m8", "mxfp4", "qwen2", "qwen3", "gpt_oss")),
    "run": (("score_of", "Paths", "Branching"), ("qwen2",))}
SHORT = 70            # longer prefixes are left out at first, and so are these runs:
LONG_RUNS = (0, 1)
SECONDS = 120         # for all that a changed port computes
SWAPS = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq, ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Add: ast.Sub, ast.Sub: ast.Add,
    ast.Mult: ast.Div, ast.Div: ast.Mult, ast.LShift: ast.RShift, ast.RShift: ast.LShift,
    ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd, ast.BitXor: ast.BitOr, ast.And: ast.Or,
    ast.Or: ast.And}
NAMES = {"max": "min", "min": "max", "floor": "ceil", "ceil": "floor", "cos": "sin",
         "sin": "cos", "minimum": "maximum", "maximum": "minimum"}


# -------------------------------------------------------------------------- the port made right


def is_wrong(node):
    """Whether an expression is the name of the mistake to make: w, self.w."""
    return isinstance(node, ast.Name) and node.id == "w" or (
        isinstance(node, ast.Attribute) and node.attr == "w")


def value_of(node):
    """A constant's value, None of anything else."""
    return node.value if isinstance(node, ast.Constant) else None


class Right(ast.NodeTransformer):
    """Takes the mistakes out: what is asked of w is answered as if there were none."""

    def visit_Compare(self, node):
        self.generic_visit(node)
        if is_wrong(node.left):
            return ast.Constant(isinstance(node.ops[0], (ast.NotEq, ast.NotIn)))
        return node

    def visit_Call(self, node):
        self.generic_visit(node)
        if isinstance(node.func, ast.Attribute):
            if node.func.attr == "get" and is_wrong(node.args[0]):
                return node.args[1] if len(node.args) > 1 else ast.Constant(None)
            if node.func.attr == "startswith" and is_wrong(node.func.value):
                return ast.Constant(False)
        return node

    def visit_BoolOp(self, node):
        self.generic_visit(node)
        neutral = isinstance(node.op, ast.And)
        kept = [part for part in node.values if value_of(part) is not neutral]
        if any(value_of(part) is (not neutral) for part in kept):
            return ast.Constant(not neutral)
        if len(kept) > 1:
            return ast.BoolOp(node.op, kept)
        return kept[0] if kept else ast.Constant(neutral)

    def visit_BinOp(self, node):
        self.generic_visit(node)
        left, right = value_of(node.left), value_of(node.right)
        if isinstance(node.op, ast.Mult) and (right is True or left == 0):
            return node.left
        if isinstance(node.op, (ast.Mult, ast.Div)) and type(right) is int and right == 1:
            return node.left
        if isinstance(node.op, ast.Add) and right is not None and right == 0:
            return node.left
        return node

    def visit_AugAssign(self, node):
        self.generic_visit(node)
        inert = {ast.Add: (False, 0), ast.Mult: (True, 1)}.get(type(node.op), ())
        return None if value_of(node.value) in inert else node

    def visit_IfExp(self, node):
        self.generic_visit(node)
        if isinstance(value_of(node.test), bool):
            return node.body if node.test.value else node.orelse
        return node

    def visit_If(self, node):
        self.generic_visit(node)
        if isinstance(value_of(node.test), bool):
            return node.body if node.test.value else node.orelse
        return node


# ------------------------------------------------------------------------------------- changes


def changed(node):
    """The changes of one node: a list of (what, new node)."""
    new = copy.deepcopy(node)
    if isinstance(node, ast.Compare) and type(node.ops[0]) in SWAPS:
        new.ops[0] = SWAPS[type(node.ops[0])]()
    elif isinstance(node, (ast.BinOp, ast.BoolOp, ast.AugAssign)) and type(node.op) in SWAPS:
        new.op = SWAPS[type(node.op)]()
    elif isinstance(node, ast.Constant) and type(node.value) in (int, float):
        new.value = node.value + 1
    elif isinstance(node, ast.Constant) and type(node.value) is bool:
        new.value = not node.value
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.USub, ast.Not)):
        new = new.operand
    elif isinstance(node, ast.Attribute) and node.attr in NAMES:
        new.attr = NAMES[node.attr]
    elif isinstance(node, ast.Name) and node.id in NAMES:
        new.id = NAMES[node.id]
    else:
        return None
    return new


class Change(ast.NodeTransformer):
    """Puts a changed node in the place of one."""

    def __init__(self, old, new):
        self.old = old
        self.new = new

    def visit(self, node):
        return self.new if node is self.old else self.generic_visit(node)


def places(tree, names):
    """[(function's name, statement, node, changed node)] of the top-level definitions `names`."""
    found = []
    for definition in tree.body:
        if getattr(definition, "name", None) not in names:
            continue
        functions = [definition]
        if isinstance(definition, ast.ClassDef):
            functions = [part for part in definition.body if isinstance(part, ast.FunctionDef)]
        for function in functions:
            statements = [node for node in ast.walk(function)
                          if isinstance(node, ast.stmt) and not is_about_mistakes(node)]
            for statement in statements:
                for node in own_nodes(statement):
                    new = changed(node)
                    if new is not None:
                        found.append((function.name, statement, node, new))
    return found


def is_about_mistakes(statement):
    """Whether a statement only reads the name of the mistake to make."""
    targets = getattr(statement, "targets", ())
    return any(isinstance(target, ast.Name) and target.id in ("w", "tail") for target in targets)


def own_nodes(statement):
    """A statement's nodes without those of the statements inside it."""
    waiting = [statement]
    while waiting:
        node = waiting.pop()
        yield node
        waiting += [child for child in ast.iter_child_nodes(node)
                    if not isinstance(child, (ast.stmt, ast.arguments))]


def first_line(node):
    """The first line of a statement, as text."""
    return ast.unparse(node).splitlines()[0]


# ------------------------------------------------------------------------------ what comes of it


def loaded(tree):
    """A port as a module."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "changed_port.py"
        file.write_text(ast.unparse(tree))
        spec = importlib.util.spec_from_file_location("changed_port", file)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    module.ORACLE = ROOT / "oracle"
    return module


def hand_in(tree, names, cases, short):
    """{case: rows} of a port. short: without long prefixes and runs."""
    module = loaded(tree)
    found = {}
    for name in names:
        inputs = copy.deepcopy(cases[name])
        runs = name not in ("m8", "sampler", "choices") and names == PARTS["run"][1]
        if runs:
            inputs["prefixes"] = []
            inputs["rope_positions"] = []
            if short:
                inputs["runs"] = [run for number, run in enumerate(inputs["runs"])
                                  if number not in LONG_RUNS or len(inputs["runs"]) < 4]
        rows = module.outputs(name, longest=SHORT if short else None, runs=runs, case=inputs)
        if runs:
            left_out = len(cases[name]["runs"]) - len(inputs["runs"])
            rows = {row: [None] * left_out + rows[row]
                    for row in ("uninterrupted", "paths", "kept")}
        found[name] = json.loads(json.dumps(rows, default=lambda array: array.tolist()))
    return found


def verdict(rows, names, fresh):
    """(whether a level fails, the cause that certify names or None)."""
    with tempfile.TemporaryDirectory() as folder:
        for name, value in rows.items():
            (Path(folder) / f"{name}.json").write_text(json.dumps(value))
        words = [folder, "--cases", ",".join(names), "--json", f"{folder}/report"]
        sys.argv = ["certify.py", *words, *(() if fresh is None else ("--fresh", str(fresh)))]
        shown = io.TextIOWrapper(io.BytesIO())
        with contextlib.redirect_stdout(shown), contextlib.redirect_stderr(shown):
            status = certify.main()
        if status == 2:
            return True, None  # it cannot be read
        report = json.loads((Path(folder) / "report").read_text())
    causes = [about["cause"] for about in report["causes"] if about["cause"]]
    return "FAIL" in report["levels"].values(), causes[0] if causes else None


class TooLong(Exception):
    """A changed port does not end."""


def stop_it(*_):
    raise TooLong


def judged(tree, names, cases, fresh):
    """What becomes of a changed port: "stops", "passes", "refused", or the cause named."""
    signal.signal(signal.SIGALRM, stop_it)
    for short in (True, False):
        signal.alarm(SECONDS)
        try:
            rows = hand_in(tree, names, cases, short)
        except Exception:
            return "stops"
        finally:
            signal.alarm(0)
        fails, cause = verdict(rows, names, fresh)
        if fails:
            return "refused" if cause is None else f"named: {cause}"
    return "passes"


def cases_of(names, fresh):
    """{name: inputs}, and certify told to make a fresh case once only."""
    if fresh is not None:
        made = functools.cache(lambda name: certify.follower().Fresh(name, fresh))
        certify.case_of = lambda name, options: made(name)
        return {name: made(name).inputs for name in names}
    return {name: certify.published(name, "case") for name in names}


def main():
    """Change, run, certify, count."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=PARTS, required=True)
    parser.add_argument("--count", type=int, help="so many places (default: all)")
    parser.add_argument("--seed", type=int, default=1, help="of the places drawn")
    parser.add_argument("--fresh", type=int, help="try them on fresh inputs of this seed")
    options = parser.parse_args()
    tree = ast.fix_missing_locations(Right().visit(ast.parse(PORT.read_text())))
    functions, names = PARTS[options.part]
    cases = cases_of(names, options.fresh)
    if judged(tree, names, cases, options.fresh) != "passes":
        raise SystemExit("the port without a change is refused")
    found = places(tree, functions)
    random.Random(options.seed).shuffle(found)
    counts = {}
    for function, statement, node, new in found[:options.count]:
        before = first_line(statement)
        other = Change(node, new).visit(copy_but(tree, node))
        what = judged(ast.fix_missing_locations(other), names, cases, options.fresh)
        print(f"{what:12} {function}:{node.lineno}: {ast.unparse(node)} -> {ast.unparse(new)}"
              f"   in   {before}", flush=True)
        kind = what.partition(":")[0]
        counts[kind] = counts.get(kind, 0) + 1
    print(json.dumps({"places": len(found)} | counts))


def copy_but(tree, node):
    """A copy of a tree that holds this one node itself."""
    return copy.deepcopy(tree, {id(node): node})


if __name__ == "__main__":
    main()
