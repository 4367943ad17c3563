"""plumbing/picture.py, studies/picture.py and stop.py --picture: what is drawn, and that no text of
a model can be anything but text. The page is opened in a browser where there is one."""
import dataclasses
import html.parser
import importlib.util
import json
import random
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree

import pytest
from helpers import ROOT, call_script, run_script, write_tokenizer

from commands import picture, stop
from plumbing.answers import extract_answer
from plumbing.budget_plan import Stage
from plumbing.tokenizer import Tokenizer
from sample import Path
from stop import decide
from toy.reading import right_lines, wrong_part

HOSTILE = (
    "</script><script>document.title = 'broken'</script> \"quotes\" & 'single' </div></article> "
    "<img src=x onerror=\"document.title = 'broken'\"> &lt;b&gt; ]]> --> </style></svg> "
    "line\u2028separator \u202eright to left\x00 {braces} %s")
SHOWN = HOSTILE.replace("\u2028", r"\u2028").replace("\u202e", r"\u202e").replace("\x00", r"\u0000")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return Tokenizer(write_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def path_of(tokenizer, index, text, score, status="eos", branches=(), inherited=0):
    """A sampled path of this text, a token a byte."""
    return Path([1], index, tokenizer.encode(text), status, score, branches, inherited)


def drawn(tokenizer, paths, checks=((5, 2),), answers=None, **settings):
    """The Run of these paths; answers: name -> answer (default: the path's text)."""
    def answer_of(path):
        return tokenizer.decode(path.ids) if answers is None else answers.get(path.name)

    question = settings.pop("question", "1 + 1?")
    checks = [picture.Check(checkpoint, went_on, went_on) for checkpoint, went_on in checks]
    return picture.record(
        question, paths, checks, tokenizer, answer_of, "a quarter less", **settings)


def four_paths(tokenizer):
    """Two kept paths of 10 and 8 tokens, and two pruned at 5."""
    return [
        path_of(tokenizer, 0, "a" * 5, 0.1, "pruned"),
        path_of(tokenizer, 1, "b" * 10, 0.7),
        path_of(tokenizer, 2, "c" * 5, 0.3, "pruned"),
        path_of(tokenizer, 3, "d" * 8, 0.9, "length")]


class Reader(html.parser.HTMLParser):
    """What a browser makes of a page: its elements, and the text in each article's .text."""

    def __init__(self, page):
        super().__init__()
        self.elements = []
        self.texts = []
        self.scripts = []
        self.inside = None
        self.reading = False  # whether this is the text of a path
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        self.inside = tag
        if dict(attributes).get("class") == "text":
            self.texts.append("")
            self.reading = True

    def handle_endtag(self, tag):
        if tag == "div":
            self.reading = False
        self.inside = None

    def handle_data(self, data):
        if self.inside == "script":
            self.scripts.append(data)
        elif self.reading and self.inside != "span":
            self.texts[-1] += data


def boxes_of(drawing):
    """number of a path -> (x, width) of its bar."""
    found = {}
    for group in ElementTree.fromstring(drawing).iter("{http://www.w3.org/2000/svg}g"):
        for box in group:
            if box.get("class", "").startswith("bar "):
                found[int(group.get("data-path"))] = (float(box.get("x")), float(box.get("width")))
    return found


# ------------------------------------------------------------------------------------ what is drawn


def test_kept_paths_stand_on_top_by_score_and_pruned_ones_end_at_the_check(tokenizer):
    run = drawn(tokenizer, four_paths(tokenizer))
    assert [bar.name for bar in run.bars] == ["3", "1", "2", "0"]
    boxes = boxes_of(picture.svg(run))
    starts = {start for start, _ in boxes.values()}
    per_token = [width / bar.end for bar, (_, width) in zip(run.bars, boxes.values())]
    assert len(starts) == 1
    assert max(per_token) - min(per_token) < 0.05
    assert run.tokens == 10 + 8 + 5 + 5 and run.launched == 4


def test_the_shades_follow_the_scores(tokenizer):
    """On a scale from 0 to 1, whatever the run's own range is."""
    run = drawn(tokenizer, four_paths(tokenizer))
    shades = {bar.score: picture.shade_of(bar) for bar in run.bars}
    assert shades == {0.9: "s9", 0.7: "s7", 0.3: "s3", 0.1: "s1"}


def test_equal_scores_are_drawn(tokenizer):
    paths = [dataclasses.replace(path, score=0.5) for path in four_paths(tokenizer)]
    assert len(boxes_of(picture.svg(drawn(tokenizer, paths)))) == 4


def test_a_branch_starts_where_it_branched_off_under_its_parent(tokenizer):
    """7 branches at 4 tokens into 7.0 and 7.1, which branch at 8: 7.1.1 comes from 7.1."""
    paths = [
        path_of(tokenizer, 7, "a" * 12, 0.6, branches=(0, 0)),
        path_of(tokenizer, 8, "b" * 4, 0.1, "pruned"),
        path_of(tokenizer, 7, "a" * 4 + "c" * 8, 0.9, branches=(1, 0), inherited=4),
        path_of(tokenizer, 7, "a" * 12, 0.6, branches=(0, 2), inherited=8),
        path_of(tokenizer, 7, "a" * 4 + "c" * 8, 0.8, branches=(1, 1), inherited=8)]
    run = drawn(tokenizer, paths, checks=[(4, 2), (8, 4)])
    parents = {bar.name: bar.parent for bar in run.bars}
    assert parents == {
        "7.0.0": None, "7.0.2": "7.0.0", "7.1.0": "7.0.0", "7.1.1": "7.1.0", "8": None}
    assert list(parents) == ["7.0.0", "7.0.2", "7.1.0", "7.1.1", "8"]
    assert run.tokens == 12 + 4 + 8 + 4 + 4
    drawing = picture.svg(run)
    boxes = boxes_of(drawing)
    per_token = boxes[0][1] / 12
    for number, inherited in enumerate((0, 8, 4, 8, 0)):
        assert abs(boxes[number][0] - boxes[0][0] - inherited * per_token) < 0.2
    assert drawing.count('class="fork"') == 3
    cuts = [cut.label for cut in run.bars[1].cuts]
    assert cuts == ["check at 4", "check at 8, branched here"]


@pytest.mark.parametrize("answers", [
    {"0": "5", "1": "4", "2": "4"}, {"0": "1/2", "1": "4", "2": "0.5"}, {"0": "9", "1": "8"},
    {"1": "8", "2": "9"}, {}])
def test_the_votes_are_those_of_the_method(tokenizer, answers):
    """Equal answers vote together, a tie goes to the first, None is no vote."""
    paths = [path_of(tokenizer, index, "x" * 9, 0.9 - index / 5) for index in range(3)]
    run = drawn(tokenizer, paths, answers=answers)
    given = [answers.get(str(index)) for index in range(3)]
    expected = decide(given, [path.score for path in paths])
    assert (run.votes[0].answer if run.votes else None) == expected
    assert sum(len(vote.bars) for vote in run.votes) == len(answers)


def test_the_pictures_answer_is_that_of_the_score_weighted_vote(tokenizer):
    """Two weak votes lose against a strong one, on the page as on the terminal."""
    paths = [path_of(tokenizer, index, "x" * 9, score) for index, score in enumerate((.2, .3, .9))]
    run = drawn(tokenizer, paths, answers={"0": "16", "1": "16", "2": "21"})
    assert [vote.answer for vote in run.votes] == ["21", "16"]
    assert "Answer: 21" in picture.page(run)


def test_paths_without_a_check_are_drawn_whole_beside_the_run(tokenizer):
    """Their colours say what is right; those of one answer stand together, the most first."""
    whole = [path_of(tokenizer, index, "x" * (6 + index), None) for index in range(5)]
    answers = {"0": "7", "1": "8", "2": "8", "3": "9", "4": "8"}
    beside = drawn(tokenizer, whole, checks=(), answers=answers, expected="7")
    assert [bar.name for bar in beside.bars] == ["1", "2", "4", "0", "3"]
    assert [picture.shade_of(bar) for bar in beside.bars] == ["wrong"] * 3 + ["right", "wrong"]
    assert beside.votes[0].answer == "8" and beside.votes[0].weight is None
    run = drawn(tokenizer, four_paths(tokenizer), answers={"1": "7", "3": "7"}, expected="7")
    drawing = picture.svg(run, beside)
    assert "5 whole paths, 40 tokens: 8 ✗" in drawing and "2 of 4 paths, 28 tokens: 7 ✓" in drawing
    page = picture.page(run, beside)
    assert len(Reader(page).texts) == 4 + 5


def test_a_page_opens_on_the_best_path_with_the_winning_answer(tokenizer):
    paths = four_paths(tokenizer)
    page = picture.page(drawn(tokenizer, paths, answers={"1": "7", "3": None}))
    shown = [attributes["data-path"] for tag, attributes in Reader(page).elements
             if tag == "article" and "hidden" not in attributes]
    assert shown == ["1"]  # path 1, the second from the top


def test_pruned_paths_end_in_a_stub(tokenizer):
    """So that a pruned path tied with a kept one looks otherwise."""
    drawing = picture.svg(drawn(tokenizer, four_paths(tokenizer)))
    assert drawing.count('class="stub"') == 2
    assert len(re.findall(r'class="bar s\d pruned"', drawing)) == 2


def test_a_branching_check_says_how_many_stay_and_as_how_many():
    kept = [Path([1], 0, [5] * 4), Path([1], 1, [5, 3], status="eos"), Path([1], 2, [6] * 4)]
    check = picture.check_of(Stage(4, 3, 2), kept)
    assert check == picture.Check(4, 3, 5)
    assert check.text == "3 go on as 5"


def test_right_answers_are_ticked_where_the_right_one_is_known(tokenizer):
    paths = four_paths(tokenizer)
    answers = {"1": "4", "3": "5"}
    known = picture.svg(drawn(tokenizer, paths, answers=answers, expected="4"))
    assert "4 ✓" in known and "5 ✗" in known
    unknown = picture.svg(drawn(tokenizer, paths, answers=answers))
    assert "✓" not in unknown and "✗" not in unknown


def test_a_pruned_path_has_no_answer_and_no_vote(tokenizer):
    run = drawn(tokenizer, four_paths(tokenizer), answers={"0": "7", "1": "8", "2": "7", "3": "8"})
    assert [vote.answer for vote in run.votes] == ["8"]


@pytest.mark.parametrize("count", [1, 2, 30, 300])
def test_any_number_of_paths_can_be_drawn(tokenizer, count):
    paths = [path_of(tokenizer, index, "x" * 5, index / count, "pruned") for index in range(count)]
    paths.append(path_of(tokenizer, count, "x" * 2000, 1.0))
    for width in (380, 960):
        assert len(boxes_of(picture.drawing(drawn(tokenizer, paths), width))) == count + 1


# ----------------------------------------------------------------------------- texts are only text


def test_hostile_text_stays_text(tokenizer):
    paths = [path_of(tokenizer, 0, HOSTILE, 0.5), path_of(tokenizer, 1, HOSTILE, 0.4, "pruned")]
    run = drawn(tokenizer, paths, question=HOSTILE, wrong_part=lambda text: (3, 30))
    page = picture.page(run)
    reader = Reader(page)
    assert reader.scripts == [picture.SCRIPT]
    assert reader.texts == [SHOWN, SHOWN]
    tags = [tag for tag, _ in reader.elements]
    assert "img" not in tags and tags.count("article") == 2
    for tag, attributes in reader.elements:
        assert not any(name.startswith("on") for name in attributes), tag


def test_hostile_text_in_the_drawing_is_escaped(tokenizer):
    run = drawn(tokenizer, [path_of(tokenizer, 0, HOSTILE, 0.5)], expected="4")
    tree = ElementTree.fromstring(picture.svg(run))  # well-formed, or this raises
    names = {element.tag.rpartition("}")[2] for element in tree.iter()}
    assert names <= {"svg", "title", "style", "g", "rect", "line", "text", "path"}


def test_the_page_loads_nothing(tokenizer):
    """Its policy forbids it, and nothing in it asks for it."""
    page = picture.page(drawn(tokenizer, four_paths(tokenizer)))
    assert "default-src 'none'" in page
    for tag, attributes in Reader(page).elements:
        assert "src" not in attributes, tag
        assert attributes.get("href", "data:,") == "data:,", tag
    assert "url(" not in page and "@import" not in page
    assert set(re.findall(r"https?://[^\s\"']+", page)) == {"http://www.w3.org/2000/svg"}


def test_characters_of_all_languages_stay(tokenizer):
    text = "né 数学 √2 \u00a0\u202f🙂\u200d tab\tline\nend"
    assert picture.visible(text) == text


def test_the_wrong_line_is_marked(tokenizer):
    path = path_of(tokenizer, 0, "right. wrong. on", 0.5)
    run = drawn(tokenizer, [path], checks=[(9, 1)], wrong_part=lambda text: (7, 13))
    marked = re.findall(r"<mark[^>]*>(.*?)</mark>", picture.page(run))
    assert marked == ["wr", "ong."]  # the check stands between


# --------------------------------------------------------------- where a path of the toy goes wrong


def load_make():
    spec = importlib.util.spec_from_file_location("toy_make", ROOT / "toy" / "make.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["toy_make"] = module
    spec.loader.exec_module(module)
    return module


def test_the_wrong_line_of_the_toy_is_the_first_that_is_never_taken_back():
    """Held against the generator of the corpus: its problems' right counts, and its paths."""
    make = load_make()
    rng = random.Random(3)
    seen = {"right": 0, "wrong": 0, "taken back": 0}
    while min(seen.values()) < 20:
        problem = make.draw_problem(rng)
        lines = right_lines(problem.text)
        assert [count for _, count in lines] == problem.counts[1:]
        path = make.write_path(problem, rng)
        if path is None:
            continue
        span = wrong_part(problem.text, path)
        right = extract_answer(path) == str(problem.counts[-1])
        if span is None:
            assert right
            seen["taken back" if "Wait" in path else "right"] += 1
            continue
        seen["wrong"] += 1
        reached = int(re.findall(r"= (\d+)", path[span[0]:span[1]])[-1])
        assert path[span[0]:span[1]].endswith("<nl>")
        sentence = path[span[0]:span[1]].partition(" ")[2].partition(" : ")[0]
        assert reached not in [count for text, count in lines if text == sentence]
        assert wrong_part(problem.text, path[:span[0]]) is None


def test_another_question_has_no_wrong_line():
    assert wrong_part("What is 1 + 1?", "Next finds 3 : 1 + 3 = 5 . <nl>") is None


# ------------------------------------------------------------------------------------ command lines


QUESTION = (
    "Q : Tom has 14 pens . buys 3 , drops 3 . buys 7 , drops 4 . finds 2 . finds 5 . loses 4 . "
    "finds twice as many again . loses 4 . What is the count ? <nl>")


@pytest.mark.parametrize("file, opening", [("run.html", "<!doctype html>"), ("run.svg", "<svg ")])
def test_stop_draws_its_run(monkeypatch, capsys, tmp_path, file, opening):
    monkeypatch.chdir(ROOT)
    status, out, _ = call_script(
        monkeypatch, capsys, stop, "--prompt", QUESTION, "--n", 6, "--keep", 2, "--prefix", 20,
        "--max-new-tokens", 60, "--device", "cpu", "--dtype", "float32",
        "--picture", tmp_path / file)
    assert status == 0 and json.loads(out.splitlines()[-1])["n"] == 6
    assert (tmp_path / file).read_text(encoding="utf-8").startswith(opening)


@pytest.mark.parametrize("words, message", [
    (("--prompt", "a", "--picture", "run.png"), "expected a file named .html or .svg"),
    (("--prompt", "a", "--picture", "missing/run.svg"), "expected a file in a folder that exists"),
    (("--score", "a.jsonl", "--picture", "run.svg"), "it shapes the paths of a --prompt")])
def test_a_picture_that_cannot_be_is_refused_at_once(monkeypatch, capsys, tmp_path, words, message):
    monkeypatch.chdir(tmp_path)
    status, _, err = call_script(monkeypatch, capsys, stop, *words)
    assert status == 2 and message in err and err.startswith("error: picture: ")


@pytest.mark.parametrize("answer, mark", [("17", " ✗"), (None, "")])
def test_a_given_answer_marks_what_is_right(monkeypatch, capsys, tmp_path, answer, mark):
    monkeypatch.chdir(ROOT)
    flags = [] if answer is None else ["--answer", answer]
    status, out, _ = call_script(
        monkeypatch, capsys, stop, "--prompt", QUESTION, "--n", 6, "--keep", 2, "--prefix", 20,
        "--max-new-tokens", 200, "--device", "cpu", "--dtype", "float32", *flags,
        "--picture", tmp_path / "run.svg")
    assert status == 0
    weighted = json.loads(out.splitlines()[-1])["weighted"]
    assert weighted not in (None, "17")
    assert re.search(rf"\nanswer: {weighted} \(.*\){mark}\n", out)
    assert ("✗" in (tmp_path / "run.svg").read_text(encoding="utf-8")) == bool(mark)


def test_the_study_marks_wrong_lines(tmp_path):
    status, out, err = run_script("studies/picture.py", [
        "--problem", "toy-test-0082", "--n", 6, "--keep", 2, "--device", "cpu",
        "--dtype", "float32", "--out", tmp_path / "run.html"])
    assert status == 0, err
    assert json.loads(out.splitlines()[-1])["tokens"] > 0
    page = (tmp_path / "run.html").read_text(encoding="utf-8")
    assert "buys 3 , drops 3 : 14 + 3 = 17 , 17 + 3 = 20" in "".join(
        re.findall(r"<mark[^>]*>(.*?)</mark>", page))


def test_the_readmes_drawing_is_of_a_run_of_64_paths():
    """python studies/picture.py --problem toy-test-0268 --whole --out studies/run.svg writes it
    again: the whole paths vote wrongly, the kept ones rightly."""
    drawing = (ROOT / "studies" / "run.svg").read_text(encoding="utf-8")
    assert re.search("64 whole paths, [0-9,]+ tokens: 34 ✗", drawing)
    assert re.search("8 of 64 paths, [0-9,]+ tokens: 26 ✓", drawing)
    assert "check at 40: 8 go on" in drawing


# ------------------------------------------------------------------------------------- in a browser


BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
needs_browser = pytest.mark.skipif(BROWSER is None, reason="no Chromium here")


def opened(folder, page):
    """(the DOM after the page's scripts ran, what the browser complained about)."""
    file = folder / "run.html"
    file.write_text(page, encoding="utf-8")
    profile = folder / "profile"
    command = [
        BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr",
        f"--user-data-dir={profile}", "--window-size=1400,900", "--dump-dom", file.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    complaints = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return done.stdout, complaints


@needs_browser
def test_a_browser_runs_nothing_of_a_path(tokenizer, tmp_path):
    paths = [path_of(tokenizer, 0, HOSTILE, 0.5), path_of(tokenizer, 1, HOSTILE, 0.4, "pruned")]
    dom, complaints = opened(tmp_path, picture.page(drawn(tokenizer, paths, question=HOSTILE)))
    assert complaints == []
    assert "<title>A run of STOP</title>" in dom
    assert Reader(dom).texts == [SHOWN, SHOWN]
    assert dom.count('class="path shown"') == 2  # the page's own script ran: wide and narrow


ACTIONS = """
const steps = [];
const visible = () => texts.filter(text => !text.hidden).map(text => text.dataset.path).join();
const at = number => bars.find(bar => bar.dataset.path === String(number));
steps.push(visible());
at(2).dispatchEvent(new PointerEvent("pointerenter")); steps.push(visible());
at(2).dispatchEvent(new PointerEvent("pointerleave")); steps.push(visible());
at(3).dispatchEvent(new MouseEvent("click")); steps.push(visible());
at(1).dispatchEvent(new FocusEvent("focus")); steps.push(visible());
at(1).dispatchEvent(new KeyboardEvent("keydown", {key: "ArrowDown"})); steps.push(visible());
document.title = steps.join(" ");
"""


@needs_browser
def test_pointing_clicking_and_arrow_keys_show_a_path(tokenizer, tmp_path):
    """The page's script with the actions behind it; its policy would refuse them."""
    page = picture.page(drawn(tokenizer, four_paths(tokenizer)))
    page = re.sub(r"<meta http-equiv[^>]*>", "", page)
    page = page.replace(picture.SCRIPT, picture.SCRIPT + ACTIONS)
    dom, complaints = opened(tmp_path, page)
    assert complaints == []
    assert re.search("<title>(.*?)</title>", dom)[1] == "0 2 0 3 1 2"
