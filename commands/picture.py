"""A picture of one run, from launch to vote: an SVG, or one HTML page that needs no other file.

    python stop.py --prompt "..." --picture run.html

A bar is a path along its new tokens, the stronger its colour the higher its score, on a scale from
0 to 1. A vertical line is a check: pruned paths end there, in a stub. A path that branched off
another starts in a fork of that one's bar. Beside it the same question may stand without pruning:
every path whole, all of them voting. On the page, pointing at a bar shows the path's text, a click
or an arrow key keeps it.

Texts of models are data here: they are escaped, characters that would hide or reorder text are
spelled out, and the page's policy lets no script run but its own.
"""
import base64
import collections
import dataclasses
import hashlib
import html
import unicodedata
from pathlib import Path

from plumbing.answers import same_answer, same_vote
from plumbing.command_line import shown
from plumbing.files import require_target
from plumbing.records import write_atomic
from sample import decoded_tokens
from stop import decide

SHADES = 10  # classes of scores
LIGHT = {
    "paper": "#fbfaf7", "ink": "#23272c", "quiet": "#6a7078", "line": "#dedad0", "low": "#cdc8ba",
    "high": "#0b6b64", "bad": "#b2481e", "bad-paper": "#fbe6da"}
DARK = {
    "paper": "#15181b", "ink": "#e7e6e2", "quiet": "#9aa2aa", "line": "#2d3339", "low": "#444b53",
    "high": "#5fe3d0", "bad": "#ff9d6e", "bad-paper": "#43271a"}


# ------------------------------------------------------------------------------------ what is drawn


@dataclasses.dataclass
class Bar:
    """One path, as it is drawn."""
    name: str             # of sample.Path: 7, or 7.0.2
    parent: str | None    # name of the path that it branched off
    start: int            # tokens that it inherited from that one
    end: int              # tokens that it holds
    score: float | None   # None: it was never checked
    status: str           # of sample.Path
    text: str
    cuts: list            # of Cut
    answer: str | None    # None: it did not vote, or said nothing
    right: bool | None    # None: not known
    wrong: tuple | None   # (first, behind the last) character of the line where it goes wrong

    @property
    def voted(self):
        """Whether it was finished."""
        return self.status in ("eos", "length")


@dataclasses.dataclass
class Cut:
    """A place in a path's text where a check stands."""
    position: int  # in characters
    label: str


@dataclasses.dataclass
class Check:
    """What happened at a checkpoint."""
    checkpoint: int  # in new tokens
    stayed: int      # paths that were kept
    went_on: int     # these and their new branches

    @property
    def text(self):
        """8 go on; or, where they branch, 5 go on as 20."""
        branched = f" as {self.went_on}" if self.went_on > self.stayed else ""
        return f"{self.stayed} go on{branched}"


def check_of(stage, kept):
    """The Check at a budget_plan.Stage where these Paths were kept: those that still run branch."""
    running = sum(path.status == "running" for path in kept)
    return Check(stage.checkpoint, len(kept), len(kept) + (stage.branch - 1) * running)


@dataclasses.dataclass
class Vote:
    """An answer, and the bars that gave it."""
    answer: str
    bars: list

    @property
    def weight(self):
        """The sum of their scores; None where there are none."""
        scores = [bar.score for bar in self.bars]
        return None if None in scores else sum(scores)


@dataclasses.dataclass
class Run:
    """All that is drawn."""
    question: str
    bars: list         # of Bar, in the order in which they are drawn, from the top
    checks: list       # of Check; none: nothing was pruned
    votes: list        # of Vote, the winner first
    launched: int
    tokens: int        # decoded
    saved: str         # in words, and against what; "" where nothing is said of it

    @property
    def longest(self):
        """Tokens of the longest path."""
        return max(bar.end for bar in self.bars)


def record(question, paths, checks, tokenizer, answer_of, saved="", kind="math", expected=None,
           wrong_part=None):
    """The Run of sample.Paths: of stop.launch_check_resume, with its Checks, or of sample.generate,
    with none.

    answer_of(path): its answer or None. saved: in words, how much was saved, against what.
    expected: the right answer where it is known. wrong_part(text): where a path's text goes wrong,
    (first, behind the last) character, or None.
    """
    names = {identity(path.index, path.branches): path.name for path in paths}
    bars = {}  # in the order of the paths: by name
    for path in paths:
        voted = path.status in ("eos", "length")
        answer = answer_of(path) if voted else None
        right = None
        if voted and expected is not None:
            right = same_answer(answer, expected, kind)
        text, cuts = text_with_cuts(path, checks, tokenizer)
        bars[path.name] = Bar(
            name=path.name,
            parent=names.get(parent_identity(path)),
            start=path.inherited,
            end=len(path.ids),
            score=path.score,
            status=path.status,
            text=text,
            cuts=cuts,
            answer=answer,
            right=right,
            wrong=wrong_part(text) if wrong_part else None)
    return Run(
        question=question,
        bars=[bars[path.name] for path in in_families(paths)] if checks else by_answer(bars),
        checks=list(checks),
        votes=tally(list(bars.values()), kind),
        launched=sum(path.inherited == 0 for path in paths),
        tokens=decoded_tokens(paths),
        saved=saved)


def saved_against(n, tokens, kept):
    """In words: what a run of so many tokens saved against n paths as long as the kept ones (Paths)
    are on average."""
    whole = n * sum(len(path.ids) for path in kept) / len(kept)
    return f"about {1 - tokens / whole:.0%} less than {counted(n, 'path')} as long as the kept ones"


def identity(index, branches):
    """(index, branches) without the zeros at the end: what a path was named when it began."""
    branches = list(branches)
    while branches and branches[-1] == 0:
        branches.pop()
    return (index, *branches)


def parent_identity(path):
    """The identity of the path that this one branched off; None of a launched path."""
    own = identity(path.index, path.branches)
    if len(own) == 1:
        return None
    return identity(own[0], own[1:-1])


def in_families(paths):
    """Paths with those that branched off them: families with a kept path first, and then by their
    best score. Within a family a path stands under the one that it branched off."""
    families = {}
    for path in paths:
        families.setdefault(path.index, []).append(path)

    def order(family):
        kept = [path.score for path in family if path.status != "pruned"]
        best = max(path.score for path in family)
        return (not kept, -max(kept, default=best), family[0].index)

    ordered = []
    for family in sorted(families.values(), key=order):
        ordered += sorted(family, key=lambda path: path.branches)
    return ordered


def by_answer(bars):
    """The bars {name: Bar} of a run without a check: those of one answer together, the most first;
    paths without an answer last."""
    groups = collections.Counter(bar.answer for bar in bars.values())

    def order(bar):
        return bar.answer is None, -groups[bar.answer], bar.answer or "", int(bar.name)

    return sorted(bars.values(), key=order)


def text_with_cuts(path, checks, tokenizer):
    """A path's text, and the Cuts where checks stand in it."""
    labels = {check.checkpoint: f"check at {check.checkpoint}" for check in checks}
    text_of = tokenizer.stream()
    text = ""
    cuts = []
    for count, token in enumerate(path.ids, 1):
        text += text_of(token)
        if count in labels:
            branched = count == path.inherited
            label = labels[count] + (", branched here" if branched else "")
            cuts.append(Cut(len(text), label))
    for cut in cuts:  # behind a space rather than before it
        if text[cut.position:cut.position + 1] == " ":
            cut.position += 1
    return text, cuts


def tally(bars, kind):
    """The Votes of bars in the order of their paths, the winner first, as `stop.decide` finds it;
    then by weight, or by number where there are no scores."""
    voters = [bar for bar in bars if bar.answer is not None]
    if not voters:
        return []
    scores = [bar.score for bar in voters]
    winner = decide([bar.answer for bar in voters], scores, kind)
    votes = []
    for bar in voters:
        for vote in votes:
            if same_vote(bar.answer, vote.answer, kind):
                vote.bars.append(bar)
                break
        else:
            votes.append(Vote(bar.answer, [bar]))

    def order(vote):
        amount = len(vote.bars) if vote.weight is None else vote.weight
        return vote.answer != winner, -amount

    return sorted(votes, key=order)


# --------------------------------------------------------------------------------------- characters


HIDING = set("\u200e\u200f\u061c\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


def visible(text):
    """Text in which characters that break lines unseen, reorder text or cannot stand in a file are
    spelled out, as in \\u2028."""
    shown = []
    for character in text:
        hidden = character in HIDING or unicodedata.category(character) in ("Cc", "Zl", "Zp", "Cs")
        if hidden and character not in "\n\t":
            character = f"\\u{ord(character):04x}"
        shown.append(character)
    return "".join(shown)


def escaped(text):
    """Text as it may stand in HTML or SVG, between tags and in quoted attributes."""
    return html.escape(visible(text))


def shortened(text, length):
    """Text on one line of at most so many characters."""
    line = " ".join(text.split())
    return line if len(line) <= length else line[:length - 1] + "…"


# ------------------------------------------------------------------------------------------ colours


def mixed(low, high, share):
    """The colour at `share` of the way between two, as #rrggbb."""
    channels = []
    for place in (1, 3, 5):
        first = int(low[place:place + 2], 16)
        last = int(high[place:place + 2], 16)
        channels.append(f"{round(first + share * (last - first)):02x}")
    return "#" + "".join(channels)


def colours(scheme):
    """CSS variables of a colour scheme, with a shade for each class of scores."""
    lines = [f"--{name}:{colour}" for name, colour in scheme.items()]
    for shade in range(SHADES):
        colour = mixed(scheme["low"], scheme["high"], shade / (SHADES - 1))
        lines.append(f"--shade-{shade}:{colour}")
    return ";".join(lines)


def palette():
    """CSS that sets the colours, light or dark as the reader's system has it."""
    shades = " ".join(f".s{shade}{{fill:var(--shade-{shade})}}" for shade in range(SHADES))
    shades += " .right{fill:var(--high)} .wrong{fill:var(--bad)} .unknown{fill:var(--quiet)}"
    return (f":root{{color-scheme:light dark;{colours(LIGHT)}}}\n"
            f"@media (prefers-color-scheme:dark){{:root{{{colours(DARK)}}}}}\n{shades}")


def shade_of(bar):
    """The class of a bar's colour: of its score, on a scale from 0 to 1; without one, of whether
    its answer is right."""
    if bar.score is None:
        return {True: "right", False: "wrong", None: "unknown"}[bar.right]
    return f"s{min(SHADES - 1, int(bar.score * SHADES))}"


# -------------------------------------------------------------------------------------- the drawing


FONT = "ui-sans-serif,system-ui,-apple-system,'Segoe UI',Helvetica,Arial,sans-serif"
SVG_STYLE = f"""
svg.run{{font:12px {FONT};display:block;max-width:100%;height:auto}}
.run text{{fill:var(--ink)}} .run .quiet{{fill:var(--quiet)}} .run .small{{font-size:11px}}
.run .strong{{font-weight:650}} .run .end{{text-anchor:end}} .run .middle{{text-anchor:middle}}
.run .number{{font-variant-numeric:tabular-nums}} .run .heading{{font-size:14px}}
.run .grid{{stroke:var(--line)}} .run .check{{stroke:var(--ink);stroke-dasharray:2 3}}
.run .fork{{stroke:var(--quiet);fill:none}} .run .card{{fill:var(--paper)}}
.run .halo{{stroke:var(--paper);stroke-width:5;paint-order:stroke}}
.run .good{{fill:var(--high)}} .run .bad{{fill:var(--bad)}} .run .hit{{fill:transparent}}
.run .pruned{{opacity:.55}} .run .stub{{stroke:var(--quiet);stroke-width:1.5}}
"""

MARKS = {True: " ✓", False: " ✗", None: ""}      # behind what is right, wrong, or not known
TONES = {True: " good", False: " bad", None: ""}  # its class
MOST_VOTES = 6                                    # answers listed


def tag(name, content="", **attributes):
    """An element around markup. Attributes are escaped; class_ is class, aria_label aria-label."""
    parts = [name]
    for key, value in attributes.items():
        if isinstance(value, float):
            value = f"{value:.1f}"
        key = key.rstrip("_").replace("_", "-")
        parts.append(f'{key}="{escaped(str(value))}"')
    return f"<{' '.join(parts)}>{content}</{name}>"


def words(x, y, text, classes):
    """A line of text in a drawing, escaped."""
    return tag("text", escaped(text), class_=classes, x=float(x), y=float(y))


def box(x, y, width, height, classes, radius=0.0):
    """A rectangle."""
    return tag("rect", class_=classes, x=float(x), y=float(y), width=float(width),
               height=float(height), rx=float(radius))


def upright(x, top, bottom, classes):
    """A vertical line."""
    return tag("line", class_=classes, x1=float(x), x2=float(x), y1=float(top), y2=float(bottom))


class Frame:
    """Where things stand in a drawing of some width, in pixels."""
    LEFT = 84   # room for names and scores
    RIGHT = 96  # room for answers behind the ends of bars
    TOP = 52    # room for the checks' labels
    KEPT = 20   # height of a kept path's row, where there is room for all of them
    GAP = 12    # between families with a kept path and the others
    VOTE = 22   # height of an answer's row

    def __init__(self, run, width, longest=None, number=0):
        """longest: tokens to have room for, where runs are compared. number: of the first bar."""
        self.run = run
        self.width = width
        self.number = number
        self.longest = longest or run.longest
        self.scale = (width - self.LEFT - self.RIGHT) / self.longest
        self.pruned = sum(bar.status == "pruned" for bar in run.bars)
        self.kept_height = min(self.KEPT, max(3.0, 480 / max(1, len(run.bars) - self.pruned)))
        self.rows = {}            # name -> (top, height)
        self.first_pruned = None  # top of the first family without a kept path
        self.bottom = self._place_rows()
        self.votes_top = self.bottom + 58
        listed = max(1, min(MOST_VOTES, len(run.votes)))
        self.height = self.votes_top + self.VOTE * listed + 14

    def _place_rows(self):
        """Fill `rows`; returns where the last one ends."""
        pruned_height = min(16.0, max(3.0, 360 / max(1, self.pruned)))
        kept_families = {family(bar) for bar in self.run.bars if bar.status != "pruned"}
        top = self.TOP
        for bar in self.run.bars:
            if self.first_pruned is None and family(bar) not in kept_families:
                top += self.GAP
                self.first_pruned = top
            height = pruned_height if bar.status == "pruned" else self.kept_height
            self.rows[bar.name] = (top, height)
            top += height
        return top

    def x(self, tokens):
        """Where a number of tokens lies."""
        return self.LEFT + tokens * self.scale

    def middle(self, name):
        """The middle of a path's row."""
        top, height = self.rows[name]
        return top + height / 2


def family(bar):
    """Which launched path it comes from."""
    return bar.name.partition(".")[0]


def tick_step(longest, count):
    """1, 2 or 5 times a power of ten, so that at most `count` steps fit."""
    power = 1
    while True:
        for factor in (1, 2, 5):
            if longest / (factor * power) <= count:
                return factor * power
        power *= 10


def drawing(run, width, number=0):
    """The picture as an <svg> of so many pixels, without a style of its own. number: of the first
    bar, where a page shows several runs."""
    frame = Frame(run, width, number=number)
    return wrapped(draw(frame), summary(run), width, frame.height)


def wrapped(parts, label, width, height):
    """Parts of a drawing in their <svg>."""
    return tag(
        "svg", "\n".join(parts), xmlns="http://www.w3.org/2000/svg", class_="run", role="group",
        aria_label=label, viewBox=f"0 0 {width} {height:.0f}", width=width, height=f"{height:.0f}")


def draw(frame):
    """All parts of the picture."""
    parts = draw_axis(frame) + draw_legend(frame)
    for number, bar in enumerate(frame.run.bars, frame.number):
        if bar.parent is not None:
            parts.append(draw_fork(frame, bar))
        parts.append(draw_path(frame, bar, number))
    return parts + draw_checks(frame) + draw_votes(frame)


def draw_axis(frame):
    """Grid lines and numbers of tokens."""
    longest = frame.longest
    step = tick_step(longest, max(2, (frame.width - 180) // 80))
    y = frame.bottom + 18
    parts = []
    for tokens in range(0, longest + 1, step):
        x = frame.x(tokens)
        parts.append(upright(x, frame.TOP - 6, frame.bottom + 4, "grid"))
        parts.append(words(x, y, f"{tokens:,}", "quiet small middle number"))
    parts.append(words(frame.x(longest) + 12, y, "new tokens", "quiet small"))
    return parts


def draw_legend(frame):
    """The shades of scores from 0 to 1."""
    if not frame.run.checks:
        return []
    x = frame.width - 150
    parts = [words(x - 6, 17, "score 0", "quiet small end number")]
    for shade in range(SHADES):
        parts.append(box(x + 12 * shade, 8, 12, 10, f"s{shade}"))
    parts.append(words(x + 12 * SHADES + 6, 17, "1", "quiet small number"))
    return parts


def draw_path(frame, bar, number):
    """A path: its name and score, its bar, and its answer."""
    top, height = frame.rows[bar.name]
    middle = top + height / 2
    thick = height * 0.62
    start = frame.x(bar.start)
    length = max(1.0, frame.x(bar.end) - start)
    kept = bar.status != "pruned"
    parts = [box(0, top, frame.width, height, "hit")]
    if height >= 12:
        label = "small end number" if kept else "small end number quiet"
        strong = label + " strong" if kept else label
        parts.append(words(40, middle + 4, bar.name, label))
        if bar.score is not None:
            parts.append(words(frame.LEFT - 10, middle + 4, f"{bar.score:.2f}", strong))
    radius = min(3, thick / 2)
    classes = f"bar {shade_of(bar)}" if kept else f"bar {shade_of(bar)} pruned"
    parts.append(box(start, middle - thick / 2, length, thick, classes, radius))
    if not kept:
        parts.append(upright(start + length, top + 0.5, top + height - 0.5, "stub"))
    elif height >= 12:
        parts.append(draw_answer(frame, bar, start + length + 8, middle + 4))
    return tag("g", "".join(parts), class_="path", data_path=number, role="button", tabindex="-1",
               aria_label=described(bar))


def draw_answer(frame, bar, x, y):
    """What stands behind the end of a kept path."""
    if not bar.voted:
        return words(x, y, bar.status, "quiet small")
    if bar.answer is None:
        return words(x, y, "no answer", "quiet small")
    room = max(4, int((frame.width - x) / 7) - len(MARKS[bar.right]))
    answer = shortened(bar.answer, room)
    return words(x, y, answer + MARKS[bar.right], "strong" + TONES[bar.right])


def draw_fork(frame, bar):
    """From the bar that a path branched off to its own."""
    x = frame.x(bar.start)
    above = frame.middle(bar.parent)
    own = frame.middle(bar.name)
    line = f"M{x - 7:.1f} {above:.1f} V{own - 4:.1f} Q{x - 7:.1f} {own:.1f} {x:.1f} {own:.1f}"
    return tag("path", class_="fork", d=line)


def draw_checks(frame):
    """A line a check, with how many went on."""
    run = frame.run
    parts = []
    for number, check in enumerate(run.checks):
        x = frame.x(check.checkpoint)
        y = frame.TOP - 11 - 14 * (number % 2)  # neighbours do not write over each other
        parts.append(upright(x, y + 2, frame.bottom + 4, "check"))
        label = f"check at {check.checkpoint:,}: {check.text}"
        parts.append(words(x + 6, y, label, "small strong"))
    if len(run.checks) == 1 and frame.first_pruned is not None:
        parts += draw_savings(frame)
    return parts


def draw_savings(frame):
    """What pruning left out, beside the ends of pruned paths, where there is room for it."""
    run = frame.run
    space = frame.bottom - frame.first_pruned
    if space < 44:
        return []
    x = frame.x(run.checks[0].checkpoint) + 18
    y = frame.first_pruned + space / 2
    return [words(x, y - 4, f"{counted(frame.pruned, 'path')} pruned", "quiet halo"),
            words(x, y + 13, spent(run), "quiet small number halo")]


def draw_votes(frame):
    """The answers, a square for each vote."""
    run = frame.run
    parts = [words(16, frame.votes_top - 14, "The vote", "strong")]
    if not run.votes:
        parts.append(words(frame.LEFT, frame.votes_top + 6, "no answer", "quiet"))
    for place, vote in enumerate(run.votes[:MOST_VOTES]):
        y = frame.votes_top + place * frame.VOTE + 6
        parts += draw_vote(frame, vote, y, " strong" if place == 0 else "")
    return parts


def draw_vote(frame, vote, y, strong):
    """One answer, its votes, and their number and weight. strong: a class of the winner."""
    right = vote.bars[0].right
    room = frame.width - frame.LEFT - 150
    step = min(15.0, room / len(vote.bars))
    answer = shortened(vote.answer, 10)
    parts = [words(frame.LEFT - 10, y, answer, "end" + strong + TONES[right])]
    bars = sorted(vote.bars, key=lambda bar: -(bar.score or 0))
    for i, bar in enumerate(bars):
        parts.append(box(frame.LEFT + i * step, y - 10, step * 0.8, 12, shade_of(bar), 2))
    weight = "" if vote.weight is None else f", weight {vote.weight:.2f}"
    total = f"{counted(len(bars), 'vote')}{weight}{MARKS[right]}"
    x = frame.LEFT + len(bars) * step + 6
    return [*parts, words(x, y, total, "quiet small number" + strong)]


def counted(number, noun):
    """1 vote, 2 votes."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def spent(run):
    """The tokens of a run, and what was saved."""
    tokens = f"{run.tokens:,} tokens"
    return f"{tokens}; {run.saved}" if run.saved else tokens


def summary(run):
    """A run in one line."""
    parts = [counted(run.launched, "path") + " launched"]
    for check in run.checks:
        parts.append(f"at {check.checkpoint:,} tokens {check.text}")
    parts.append(spent(run))
    answer = shortened(run.votes[0].answer, 40) if run.votes else "none"
    parts.append(f"the vote's answer: {answer}")
    return "; ".join(parts)


ENDS = {"eos": "finished", "length": "cut at the limit", "pruned": "pruned",
        "decided": "stopped, as the vote was decided"}


def described(bar):
    """A path in one line."""
    parts = [f"path {bar.name}", ENDS[bar.status], f"{bar.end:,} tokens"]
    if bar.score is not None:
        parts.insert(1, f"score {bar.score:.3f}")
    if bar.parent is not None:
        parts.append(f"{bar.start:,} of them inherited from {bar.parent}")
    if bar.voted:
        answer = "none" if bar.answer is None else shortened(bar.answer, 60)
        parts.append(f"answer {answer}{MARKS[bar.right]}")
    return ", ".join(parts)


def svg(run, whole=None):
    """The picture as a file of its own; whole: the Run of the same question without pruning, to
    stand beside it."""
    if whole is None:
        frames = [Frame(run, 960)]
    else:
        longest = max(run.longest, whole.longest)
        frames = [Frame(whole, 480, longest), Frame(run, 480, longest)]
    height = max(frame.height for frame in frames)
    label = "; ".join(f"{heading(frame.run)}: {summary(frame.run)}" for frame in frames)
    parts = [tag("title", escaped(label)),
             f"<style>{palette()}{SVG_STYLE}</style>",
             box(0, 0, 960, height, "card", 8)]
    left = 0
    for frame in frames:
        own = [words(16, 20, heading(frame.run), "strong heading"), *draw(frame)]
        parts.append(tag("g", "\n".join(own), transform=f"translate({left} 0)"))
        left += frame.width
    return wrapped(parts, label, 960, height) + "\n"


def heading(run):
    """What a run is and what its vote says, in a few words."""
    answer = "no answer"
    if run.votes:
        winner = run.votes[0]
        answer = f"{shortened(winner.answer, 12)}{MARKS[winner.bars[0].right]}"
    paths = counted(len(run.bars), "whole path")
    if run.checks:
        paths = f"{sum(bar.voted for bar in run.bars)} of {counted(len(run.bars), 'path')}"
    return f"{paths}, {run.tokens:,} tokens: {answer}"


# ----------------------------------------------------------------------------------------- the page


PAGE_STYLE = f"""
body{{margin:0;background:var(--paper);color:var(--ink);font:15px/1.55 {FONT}}}
main{{max-width:1400px;margin:0 auto;padding:28px 28px 40px}}
h1{{font-size:20px;margin:0 0 4px}} h2{{font-size:17px;margin:22px 0 2px}}
.quiet{{color:var(--quiet)}}
.question{{white-space:pre-wrap;overflow-wrap:anywhere;max-height:9em;overflow:auto;
  margin:12px 0 20px;padding:10px 14px;border-left:3px solid var(--line)}}
.columns{{display:grid;grid-template-columns:minmax(0,960px) minmax(280px,1fr);gap:28px;
  align-items:start}}
.texts{{position:sticky;top:16px;max-height:calc(100vh - 32px);overflow:auto;
  border:1px solid var(--line);border-radius:8px;padding:14px 16px;box-sizing:border-box}}
article h2{{font-size:15px;margin:0}} article p{{margin:0 0 10px}}
.text{{font:13px/1.65 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;white-space:pre-wrap;
  overflow-wrap:anywhere}}
.cut{{display:block;margin:6px 0;border-top:1px dashed var(--quiet);color:var(--quiet);
  font:11px {FONT}}}
.wrong{{background:var(--bad-paper);color:var(--bad);border-radius:3px;
  text-decoration:underline wavy;text-underline-offset:3px;text-decoration-thickness:1px}}
.path{{cursor:pointer;outline:none}} .path .bar{{transition:opacity .1s}}
.path.shown .hit{{fill:var(--line);opacity:.55}} .path:focus-visible .hit{{stroke:var(--ink)}}
.narrow{{display:none}}
@media (max-width:1100px){{.columns{{grid-template-columns:minmax(0,1fr)}}
  .texts{{top:auto;bottom:0;max-height:44vh;background:var(--paper);
    box-shadow:0 -6px 18px rgb(0 0 0/.12)}}}}
@media (max-width:700px){{main{{padding:16px 12px}} .wide{{display:none}} .narrow{{display:block}}}}
@media print{{article[hidden]{{display:block!important}} .texts{{max-height:none}}}}
"""

SCRIPT = """
"use strict";
const bars = [...document.querySelectorAll(".path")];
const texts = [...document.querySelectorAll("article")];
let kept = document.querySelector("article:not([hidden])").dataset.path;

function show(number) {
  for (const text of texts) text.hidden = text.dataset.path !== number;
  for (const bar of bars) bar.classList.toggle("shown", bar.dataset.path === number);
}

function keep(number) {
  kept = number;
  for (const bar of bars) bar.tabIndex = bar.dataset.path === number ? 0 : -1;
  show(number);
}

function move(bar, step) {
  const own = [...bar.parentElement.querySelectorAll(".path")];
  const next = own[own.indexOf(bar) + step];
  if (next) { keep(next.dataset.path); next.focus(); }
}

for (const bar of bars) {
  bar.addEventListener("pointerenter", () => show(bar.dataset.path));
  bar.addEventListener("pointerleave", () => show(kept));
  bar.addEventListener("click", () => keep(bar.dataset.path));
  bar.addEventListener("focus", () => keep(bar.dataset.path));
  bar.addEventListener("keydown", event => {
    const step = {ArrowDown: 1, ArrowUp: -1}[event.key];
    if (step) { event.preventDefault(); move(bar, step); }
  });
}
keep(kept);
"""

# Scripts: the one above, known by its digest. Nothing is fetched, sent or framed.
POLICY = ("default-src 'none'; style-src 'unsafe-inline'; img-src data:; "
          "script-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'")

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<title>A run of STOP</title>
<link rel="icon" href="data:,">
<style>{style}</style>
<noscript><style>
article[hidden]{{display:block}} .texts{{max-height:none;position:static}}
</style></noscript>
</head>
<body>
<main>
<h1>{heading}</h1>
<div class="quiet">{about}.
Point at a bar to read its path; a click or the arrow keys keep it.</div>
<div class="question">{question}</div>
<div class="columns">
<div>{drawings}</div>
<section class="texts" aria-live="polite" tabindex="0" aria-label="The text of a path">
{texts}
</section>
</div>
</main>
<script>{script}</script>
</body>
</html>
"""


def page(run, whole=None):
    """The picture as an HTML page; whole: the Run of the same question without pruning, to stand
    below it."""
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    bars = list(run.bars)
    drawings = both_widths(run)
    if whole is not None:
        drawings += tag("h2", f"Without pruning: {escaped(heading(whole))}")
        drawings += both_widths(whole, number=len(bars))
        bars += whole.bars
    first = first_shown(run)
    articles = [article(bar, number, number == first) for number, bar in enumerate(bars)]
    return PAGE.format(
        policy=POLICY.format(digest=digest),
        style=palette() + SVG_STYLE + PAGE_STYLE,
        heading=escaped(verdict(run)),
        about=escaped(summary(run)),
        question=escaped(broken(run.question)),
        drawings=drawings,
        texts="\n".join(articles),
        script=SCRIPT)


def both_widths(run, number=0):
    """Two drawings of a run, of which a page shows the one that fits its width."""
    wide = tag("div", drawing(run, 960, number), class_="wide")
    return wide + tag("div", drawing(run, 380, number), class_="narrow")


def first_shown(run):
    """The number of the bar whose text a page opens with: the best one with the winning answer."""
    if not run.votes:
        return 0
    winner = max(run.votes[0].bars, key=lambda bar: bar.score or 0)
    return run.bars.index(winner)


def verdict(run):
    """The page's heading."""
    if not run.votes:
        return "No answer"
    winner = run.votes[0]
    return f"Answer: {shortened(winner.answer, 80)}{MARKS[winner.bars[0].right]}"


def article(bar, number, is_shown):
    """A path's text on the page."""
    name, _, rest = described(bar).partition(", ")
    content = (tag("h2", escaped(name)) + tag("p", escaped(rest), class_="quiet")
               + tag("div", text_of(bar), class_="text"))
    hidden = {} if is_shown else {"hidden": ""}
    return tag("article", content, data_path=number, **hidden)


def text_of(bar):
    """HTML of a path's text, with its checks, and the wrong line marked."""
    text = broken(bar.text)
    places = {0, len(text), *(cut.position for cut in bar.cuts), *(bar.wrong or ())}
    labels = {cut.position: cut.label for cut in bar.cuts}
    ordered = sorted(places)
    parts = []
    for start, end in zip(ordered, ordered[1:]):
        piece = escaped(text[start:end])
        if bar.wrong is not None and bar.wrong[0] <= start < bar.wrong[1]:
            piece = tag("mark", piece, class_="wrong", title="here it goes wrong")
        parts.append(piece)
        if end in labels:
            parts.append(tag("span", escaped(labels[end]), class_="cut"))
    return "".join(parts)


def broken(text):
    """Text of the same length with new lines behind the toy's mark for one."""
    return text.replace("<nl> ", "<nl>\n")


def check_file(file):
    """Raise ValueError unless a picture can be written there, before a long run is made for it."""
    if Path(file).suffix not in (".html", ".svg"):
        raise ValueError(f"picture: found {shown(file)}, expected a file named .html or .svg")
    if not Path(file).absolute().parent.is_dir():
        raise ValueError(f"picture: found {shown(file)}, expected a file in a folder that exists")
    require_target(file)


def write(file, run, whole=None):
    """Write a Run to a file as its name says: a page (.html) or a drawing (.svg)."""
    form = svg if Path(file).suffix == ".svg" else page
    write_atomic(file, form(run, whole))
