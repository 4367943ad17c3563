"""The house rules: floors, packages, docstrings, columns, blank lines, nothing unpickled, small
data, pinned requirements, and a README that says in which order to read."""
import ast
import functools
import re
import sys

import pytest
from helpers import ROOT

FLOORS = {
    "plumbing": 1, "kvcache": 1, "lora": 1, "model": 2, "sample": 3, "stop": 4, "baselines": 4,
    "eval": 5, "train": 5, "engine": 6, "commands": 7}
PACKAGE_FLOORS = ("plumbing", "engine", "commands")
ROOMS = [name for name in FLOORS if name not in PACKAGE_FLOORS]
SCRIPTS = ("sample", "stop", "eval", "train")
PACKAGES = {"torch", "safetensors", "tokenizers", "huggingface_hub", "numpy"}
WITH_TORCH = {"jinja2", "sympy", "mpmath"}  # torch brings them along; plumbing may use them
OPTIONAL = {"transformers", "peft", "matplotlib"}  # of studies, oracle and tests
COLUMNS = 100
PICKLERS = {"dill", "shelve", "joblib", "cloudpickle"}
DEFINITION = (ast.FunctionDef, ast.ClassDef)


def files_in(*places):
    """The project's Python files there; not those of a virtual environment or of a run that lies in
    its folder."""
    files = []
    for place in places:
        files += sorted((ROOT / place).glob("*.py"))
    assert files
    return files


def every_file():
    tests = [f"tests/{folder}" for folder in (
        ".", "story", "engine", "commands", "plumbing", "studies", "oracle")]
    return files_in(".", *PACKAGE_FLOORS, "studies", "oracle", "oracle/making", "toy", *tests)


def name_of(file):
    return str(file.relative_to(ROOT))


@functools.cache
def read(file):
    return file.read_text(encoding="utf-8")


@functools.cache
def parse(file):
    return ast.parse(read(file))


def imports_of(tree):
    """Dotted names of all that is imported anywhere: `from a import b` gives a and a.b."""
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "a relative import: there is no package"
            names.append(node.module)
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


def top_level(names):
    """First parts of dotted names."""
    return {name.partition(".")[0] for name in names}


# ------------------------------------------------------------------------------- floors, packages


def test_the_top_holds_exactly_the_eight_scripts():
    """A ninth would escape the floors."""
    assert {file.stem for file in files_in(".")} == set(ROOMS)


@pytest.mark.parametrize("name", ROOMS)
def test_imports_run_downward_only(name):
    """A room knows the floors below it, nothing of its own floor or above, no study and no test,
    and five packages. Its last line alone, where it is a script, knows its command."""
    tree = parse(ROOT / f"{name}.py")
    if name in SCRIPTS:
        last = f"if __name__ == '__main__':\n    from commands.{name} import main\n    main()"
        assert ast.unparse(tree.body[-1]) == last
        tree = ast.Module(tree.body[:-1], [])
    require_lower_floors(tree, name, f"{name}.py")


@pytest.mark.parametrize("folder", ("engine", "commands"))
def test_engine_and_commands_know_what_is_below_them(folder):
    """Each file of a folder knows the floors below it, and its neighbours without a cycle."""
    for file in files_in(folder):
        require_lower_floors(parse(file), folder, name_of(file))
    require_no_cycle(folder)


def require_lower_floors(tree, floor, name):
    """The imports of a file on this floor are of lower ones, of its own folder, or known
    packages."""
    for other in top_level(imports_of(tree)):
        if other in FLOORS:
            is_below = FLOORS[other] < FLOORS[floor]
            is_own = other == floor and other in PACKAGE_FLOORS
            assert is_below or is_own, f"{name} imports {other}"
        else:
            is_known = other in PACKAGES or other in sys.stdlib_module_names
            assert is_known, f"{name} imports {other}"


def test_plumbing_knows_no_room():
    for file in files_in("plumbing"):
        others = top_level(imports_of(parse(file)))
        assert others <= PACKAGES | WITH_TORCH | {"plumbing"} | sys.stdlib_module_names, file.name


def test_plumbing_has_no_cycle():
    """Its files may use each other, downward."""
    require_no_cycle("plumbing")


def require_no_cycle(folder):
    """The files of a folder use each other downward."""
    names = {file.stem for file in files_in(folder)}
    below = {}
    for file in files_in(folder):
        used = imports_of(parse(file))
        below[file.stem] = {name for name in names if f"{folder}.{name}" in used}
    while below:
        lowest = {name for name, others in below.items() if not others & below.keys()}
        assert lowest, f"a cycle among {sorted(below)}"
        for name in lowest:
            del below[name]


def test_what_uses_the_rooms_does_not_need_the_tests_or_optional_packages():
    """Studies, the oracle and the toy's maker know the rooms and each other. What may be missing is
    not imported at the top of a file."""
    places = ("studies", "oracle", "oracle/making", "toy")
    own = {file.stem for file in files_in(*places)} | set(places)
    known = PACKAGES | OPTIONAL | set(FLOORS) | own | sys.stdlib_module_names
    for file in files_in(*places):
        tree = parse(file)
        assert top_level(imports_of(tree)) <= known, name_of(file)
        for node in tree.body:
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                names = top_level(imports_of(node))
                assert not names & OPTIONAL, f"{name_of(file)}:{node.lineno}"


# --------------------------------------------------------------------------------- how it is told


def test_every_file_says_what_it_is():
    silent = [name_of(file) for file in every_file() if not ast.get_docstring(parse(file))]
    assert not silent


def test_public_names_have_docstrings():
    silent = []
    for file in files_in(".", *PACKAGE_FLOORS, "studies", "oracle", "oracle/making", "toy"):
        for node in parse(file).body:
            is_public = isinstance(node, DEFINITION) and not node.name.startswith("_")
            if is_public and not ast.get_docstring(node):
                silent.append(f"{name_of(file)}: {node.name}")
    assert not silent


def test_lines_are_at_most_100_columns_wide():
    wide = []
    for file in every_file():
        for number, line in enumerate(read(file).split("\n"), 1):
            if len(line) > COLUMNS:
                wide.append(f"{name_of(file)}:{number}")
    assert not wide


def is_blank_around(before, node, lines):
    """Whether two blank lines stand between two neighbours at the top of a file, one of which is a
    definition: behind it, and before it and the comment directly above it."""
    decorators = getattr(node, "decorator_list", [])
    first = min([node.lineno] + [decorator.lineno for decorator in decorators])
    between = lines[before.end_lineno:first - 1]
    if isinstance(before, DEFINITION) and between[:2] != ["", ""]:
        return False
    while between and between[-1].startswith("#"):
        between.pop()
    return not isinstance(node, DEFINITION) or between[-2:] == ["", ""]


def test_two_blank_lines_stand_between_definitions():
    crowded = []
    for file in every_file():
        body = parse(file).body
        lines = read(file).split("\n")
        for before, node in zip(body, body[1:]):
            if not is_blank_around(before, node, lines):
                crowded.append(f"{name_of(file)}:{node.lineno}")
        if "\n\n\n\n" in read(file):
            crowded.append(f"{name_of(file)}: three blank lines")
    assert not crowded


def test_lines_end_where_their_text_ends():
    """One line end at the end of a file, no white space at those of its lines, no tab."""
    untidy = []
    for file in every_file():
        text = read(file)
        ends_well = text.endswith("\n") and not text.endswith("\n\n")
        if re.search(r"[ \t]\n|\t|\r", text) or not ends_well:
            untidy.append(name_of(file))
    assert not untidy


# ----------------------------------------------------------------------------- nothing is unpickled


def test_nothing_is_unpickled():
    """torch.load only with weights_only=True, no numpy objects, and of pickle only its error: a
    checkpoint runs no code."""
    for file in every_file():
        names = imports_of(parse(file))
        assert not top_level(names) & PICKLERS, name_of(file)
        loaders = {"torch.load", "pickle.load", "pickle.loads", "pickle.Unpickler"}
        assert not loaders & set(names), name_of(file)
        for node in ast.walk(parse(file)):
            check_node(node, name_of(file))


def check_node(node, name):
    """No expression of a file unpickles anything or runs text as code."""
    place = f"{name}:{getattr(node, 'lineno', 0)}"
    if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "pickle":
        assert node.attr == "UnpicklingError", place
    if isinstance(node, ast.Call):
        called = ast.unparse(node.func)
        settings = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        assert called not in ("eval", "exec", "torch.hub.load"), place
        assert settings.get("allow_pickle", "False") == "False", place
        if called == "torch.load":
            assert settings.get("weights_only") == "True", place


# ------------------------------------------------------------------------------- data, README, pins


def test_golden_data_stays_small():
    """The data the tests carry: at most 8 MB in all, and within it nothing but data and READMEs."""
    files = [file for file in (ROOT / "oracle" / "golden").rglob("*") if file.is_file()]
    assert 0 < sum(file.stat().st_size for file in files) <= 8_000_000
    assert {file.suffix for file in files} <= {".json", ".safetensors", ".md", ".bin", ".pth"}


def test_requirements_are_pinned():
    """Exactly the packages that the rooms may import, and pytest, each at one version."""
    pins = {}
    for line in (ROOT / "requirements.txt").read_text().splitlines():
        if line and not line.startswith(("#", "-")):
            name, version = re.fullmatch(r"([\w-]+)==([\d.]+)", line).groups()
            pins[name] = version
    assert set(pins) == PACKAGES | {"pytest"}
    assert pins["torch"] == "2.13.0"


def test_the_readme_has_the_reading_order():
    """The story from the bottom up, then what is looked up."""
    _, _, text = read(ROOT / "README.md").partition("## Reading order")
    section, _, _ = text.partition("\n## ")
    story = [name for name in ROOMS if name != "baselines"]
    for name in ROOMS:
        assert f"`{name}.py`" in section, f"{name}.py is not in the reading order"
    places = {name: section.index(f"`{name}.py`") for name in story}
    assert sorted(story, key=places.get)[:5] == ["kvcache", "lora", "model", "sample", "stop"]
    assert "`plumbing/`" in section
