"""One question of the embedded toy, from launch to vote, in the paper's order and beside its
equations (sections 3 and 4). Every line with a tick is an assertion that held in this run.

    python studies/walkthrough.py                                # prints Markdown
    python studies/walkthrough.py --out studies/walkthrough.md   # writes the page that is kept

Eight paths, of which two are kept, on the CPU in float32. Letters: N paths, k kept, m [STOP]
tokens, L tokens of a prefix (prompt included).
"""
import contextlib
import dataclasses
import math
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import sample
from lora import Linear
from model import load
from plumbing.answers import extract_answer, same_answer
from plumbing.command_line import command_line, option
from plumbing.files import require_target
from plumbing.problems import read_problems
from plumbing.records import write_atomic
from plumbing.tokenizer import Tokenizer
from sample import Batch, Sampling, generate, prefill
from stop import Stop, Watcher, best_paths, launch_check_resume, vote
from toy.reading import wrong_part

N = 8
KEEP = 2
ROLLOUTS = 32
SAMPLING = Sampling()  # the paper's: temperature 0.6, top-k 40, top-p 0.95; seed 0
CLOSE = 1e-4           # float32, added up in another order


@dataclasses.dataclass(kw_only=True)
class Settings:
    """What `python studies/walkthrough.py` can be told."""
    out: str | None = option(None, "file of the page (default: printed)")
    question: str = option("toy-test-0082", "which problem of toy/test.jsonl")
    stop: str = option(str(ROOT / "toy" / "stop"), "folder of the trained STOP")


class Page:
    """Markdown, written from top to bottom."""

    def __init__(self):
        self.parts = []

    def write(self, text):
        """A paragraph, or a heading."""
        self.parts.append(text)

    def claim(self, holds, text):
        """A statement that must be true."""
        assert holds, text
        self.parts.append(f"✓ {text}")

    def code(self, text):
        """Text as it is."""
        self.parts.append(f"```\n{text}\n```")

    def table(self, columns, rows):
        """Rows of cells under the names of their columns."""
        lines = []
        for cells in (columns, ["---"] * len(columns), *rows):
            line = " | ".join(map(str, cells))
            lines.append(f"| {line} |")
        self.parts.append("\n".join(lines))

    def text(self):
        """The whole page."""
        return "\n\n".join(self.parts) + "\n"


class Walk:
    """One question's run, made step by step."""

    def __init__(self, settings):
        folder = str(ROOT / "toy")
        self.model = load(folder)
        self.tokenizer = Tokenizer(folder)
        self.stop = Stop.load(settings.stop, self.model)
        problems = {problem.id: problem for problem in read_problems(ROOT / "toy" / "test.jsonl")}
        if settings.question not in problems:
            raise ValueError(f"question: found {settings.question[:60]!r}, expected the id of a "
                             "problem in toy/test.jsonl")
        self.problem = problems[settings.question]
        self.prompt = self.tokenizer.ask(self.problem)
        self.checkpoint = self.stop.trained_for()[0]
        self.limit = self.stop.trained_limit()
        self.page = Page()

    def answer_of(self, ids):
        """The answer in a path's new tokens, or None."""
        return extract_answer(self.tokenizer.completion(ids), self.problem.kind)

    def is_right(self, ids):
        """Whether a path's new tokens end right."""
        return same_answer(self.answer_of(ids), self.problem.answer, self.problem.kind)

    def lines(self, ids):
        """A path's text, a line each, with an arrow at the line where it goes wrong."""
        text = self.tokenizer.decode(ids)
        wrong = wrong_part(self.problem.problem, text)
        if wrong is not None:
            end = wrong[1] - len("<nl>")
            text = text[:end] + "   <-- wrong " + text[end:]
        return text.replace(" <nl> ", "\n").replace(" <nl>", "")


# ------------------------------------------------------------------------------- what is looked at


@contextlib.contextmanager
def watched_linears(model):
    """A list that takes (linear, x, adapter, y) of every linear that runs meanwhile."""
    seen = []

    def note(linear, inputs, output):
        x, adapter = inputs
        seen.append((linear, x, adapter, output))

    with contextlib.ExitStack() as hooks:
        for part in model.modules():
            if isinstance(part, Linear) and part.name != "lm_head":
                hooks.enter_context(part.register_forward_hook(note))
        yield seen


def snapshot(cache):
    """Copies of all that a cache's rows hold, dead slots left out, and of their lengths."""
    held = []
    for buffer in cache.keys + cache.values:
        for row, length in enumerate(cache.counts):
            held.append(buffer[row, :, :length].clone())
    return held, cache.lengths.clone()


def is_equal(before, after):
    """Whether two snapshots agree, bit for bit."""
    same = [torch.equal(one, other) for one, other in zip(before[0], after[0])]
    return all(same) and torch.equal(before[1], after[1])


def is_close(found, expected):
    """Whether two tensors agree but for rounding."""
    return torch.allclose(found, expected, atol=CLOSE, rtol=CLOSE)


# ---------------------------------------------------------------------------------------- the steps


def ask(walk):
    """The question."""
    page = walk.page
    prompt = walk.prompt
    page.write("# One question, from launch to vote")
    page.write(
        "The embedded toy counts things through a story with traps. Its right readings are known, "
        "so every step can be held against the truth. The question was chosen among the 300 of "
        "`toy/test.jsonl` because STOP separates its paths clearly; RESULTS.md has the figures "
        "over all of them. This page is the output of `python studies/walkthrough.py`; a line with "
        "a tick is an assertion in that script.")
    page.write("## The question x")
    page.code(walk.problem.problem)
    page.write(f"The right answer is {walk.problem.answer}. The trap that most paths fall into is "
               "\"buys 3 , drops 3\", which leaves the count as it was. A token of the toy is a "
               f"word, a sign or a number; the question has {len(prompt)}:")
    page.code(wrapped(prompt))
    page.claim(walk.tokenizer.decode(prompt) == walk.problem.problem,
               "the tokens spell the question, and nothing was added to it")


def wrapped(ids):
    """Token ids, twenty a line."""
    lines = []
    for start in range(0, len(ids), 20):
        lines.append("".join(f"{token:4}" for token in ids[start:start + 20]))
    return "\n".join(lines)


def launch(walk):
    """Launch: N paths on one static cache. -> the Batch that decodes them."""
    page = walk.page
    model = walk.model
    L = len(walk.prompt) + walk.checkpoint
    paths = [sample.Path(walk.prompt, index) for index in range(N)]
    capacity = L + walk.stop.m
    batch = Batch(model, paths, capacity, walk.limit, SAMPLING)
    page.write("## Launch")
    page.write(f"N = {N} paths start from the same question. It is read once, and its keys and "
               f"values are copied to the {N} rows of a static cache of {capacity} positions.")
    cache = batch.cache
    held = [buffer[:, :, :cache.longest] for buffer in cache.keys + cache.values]
    page.claim(all(map(rows_agree, held)),
               f"all rows hold the same {cache.longest} positions. The question's last token is "
               "not among them: the first step of decoding puts it there, and draws the first new "
               "token")
    with watched_linears(model) as seen:
        batch.decode(until=walk.checkpoint)
        batch.settle()
    seen_in_training = ", ".join(map(str, sorted(walk.stop.trained_for())))
    page.write(f"Each path is decoded up to the checkpoint of {walk.checkpoint} new tokens (this "
               f"STOP was trained on prefixes of {seen_in_training} tokens). The "
               "token at position t of path i is drawn with a noise that depends on (seed, "
               "question, i, t) alone. The prefixes, with an arrow where one has gone wrong:")
    for path in paths:
        page.code(f"path {path.index}\n{walk.lines(path.ids)}")
    page.claim(all(adapter is None for _, _, adapter, _ in seen),
               f"no adapter took part: {len(seen):,} times a linear ran, always without one, so "
               "the prefixes are the frozen model's own")
    page.claim(batch.cache.counts.tolist() == [L] * N,
               f"every row holds L = {len(walk.prompt)} + {walk.checkpoint} = {L} positions")
    return batch


def rows_agree(buffer):
    """Whether all rows of a buffer hold the same."""
    return bool((buffer == buffer[:1]).all())


def check(walk, batch):
    """Check: what [STOP] adds, what LoRA does to it, and what the head reads. -> chances (N,)."""
    page = walk.page
    model = walk.model
    stop = walk.stop
    m = stop.m
    L = batch.cache.longest
    own_spread = model.model.embed_tokens.weight.std()
    page.write("## Check")
    page.code("h = f([x; S])        p = sigmoid(w h_m + b)                       (equation 4)")
    page.write(
        f"S is m = {m} learned vectors of {stop.tokens.shape[1]} numbers, appended to each prefix "
        f"as if they were embeddings of tokens. Their spread is {stop.tokens.std():.2f}, that of "
        f"the model's own embeddings {own_spread:.2f}. They take positions {L} to {L + m - 1}, in "
        f"the dead slots behind each row's {L}.")
    before = snapshot(batch.cache)
    with watched_linears(model) as seen:
        logits = stop(model, batch.cache)
    after = snapshot(batch.cache)
    page.claim(all(x.shape[:2] == (N, m) for _, x, _, _ in seen),
               f"one pass over {N} rows x {m} positions; the prefixes are not computed again, "
               "only read")
    adapters(walk, seen)
    chances = head(walk, batch, logits)
    page.write("### The cache, before and after")
    size = sum(part.numel() for part in before[0])
    page.claim(is_equal(before, after),
               f"{size:,} numbers of keys and values and {N} lengths are bit for bit what they "
               "were. The [STOP] positions lie behind the rows' ends, where no later pass reads "
               "them; the next tokens are written over them")
    whole_pass(walk, batch, chances)
    return chances


def adapters(walk, seen):
    """Which linears had LoRA on, and how much it changed them."""
    page = walk.page
    lora = walk.stop.lora
    page.write("### The adapter")
    page.code("y = W x + (alpha / r) 1[STOP] B A x")
    shares = {}
    by_hand = []
    for linear, x, _, y in seen:
        pair = lora.pairs[linear.name]
        frozen = torch.nn.functional.linear(x, linear.weight, linear.bias)
        A = pair.lora_A.weight
        B = pair.lora_B.weight
        update = lora.alpha / lora.rank * (x @ A.T @ B.T)
        by_hand.append(is_close(y, frozen + update))
        share = update.norm() / frozen.norm()
        shares.setdefault(linear.name.rpartition(".")[2], []).append(f"{share:.2f}")
    page.write(f"r = {lora.rank}, alpha = {lora.alpha}. How large the second term is beside the "
               "first (the ratio of their norms in this pass):")
    rows = [[name, *found] for name, found in shares.items()]
    layers = [f"layer {layer}" for layer in range(walk.model.config.num_hidden_layers)]
    page.table(["linear", *layers], rows)
    active = [bool(adapter.active.all()) for _, _, adapter, _ in seen]
    page.claim(all(active) and len(seen) == len(lora.pairs),
               f"all {len(seen)} linears of the blocks had it on, at every [STOP] position")
    page.claim(all(by_hand), "each of them gave what the equation gives, computed by hand")


def head(walk, batch, logits):
    """The head's number of each path. -> chances (N,)."""
    page = walk.page
    stop = walk.stop
    page.write("### The head")
    chances = stop.chance(logits)
    scored = stop.score(walk.model, [walk.prompt + path.ids for path in batch.live])
    rows = []
    for path, logit, chance in zip(batch.live, logits[:, 0].tolist(), chances.tolist()):
        path.score = chance
        rows.append([path.index, f"{logit:.2f}", f"{chance:.2f}"])
    page.table(["path", "w h_m + b", "p"], rows)
    page.claim(is_close(chances, scored),
               "`Stop.score` gives the same for the prefixes as lists of token ids")
    return chances


def whole_pass(walk, batch, chances):
    """The same score without a cache."""
    page = walk.page
    model = walk.model
    stop = walk.stop
    ids = torch.tensor([walk.prompt + path.ids for path in batch.live])
    x = model.model.embed_tokens(ids)
    h = torch.cat((x, stop.tokens.expand(N, stop.m, -1)), 1)
    is_stop = (torch.arange(h.shape[1]) >= ids.shape[1]).expand(N, -1)
    h = model(h, adapter=stop.lora.at(is_stop))
    by_definition = stop.head(h[:, -1]).sigmoid()[:, 0]
    page.write("### The definition, once more")
    page.claim(is_close(by_definition, chances),
               "one pass over the whole [x; S] without a cache, LoRA masked to the [STOP] "
               "positions, gives the same p: the cache saves time and changes nothing")


def worth(walk, batch, chances):
    """What the prefixes were worth: the soft labels of section 4."""
    page = walk.page
    prefixes = [walk.prompt + path.ids for path in batch.live]
    room = walk.limit - walk.checkpoint
    groups = generate(walk.model, prefixes, ROLLOUTS, room, **dataclasses.asdict(SAMPLING))
    successes = []
    for path, group in zip(batch.live, groups):
        successes.append(sum(walk.is_right(path.ids + rollout.ids) for rollout in group))
    labels = torch.tensor(successes) / ROLLOUTS
    page.write("## What the prefixes were worth")
    page.code("s = right continuations / K        loss = -s log p - (1 - s) log(1 - p)")
    page.write(f"STOP was trained on such labels of other questions' prefixes. Here each prefix is "
               f"continued K = {ROLLOUTS} times.")
    losses = torch.nn.functional.binary_cross_entropy(chances, labels, reduction="none")
    rows = []
    for path, count, chance, loss in zip(batch.live, successes, chances.tolist(), losses.tolist()):
        wrong = wrong_part(walk.problem.problem, walk.tokenizer.decode(path.ids))
        state = "no wrong line so far" if wrong is None else "has gone wrong"
        right = f"{count} / {ROLLOUTS}"
        rows.append([path.index, f"{chance:.2f}", right, state, f"{loss:.2f}"])
    page.table(["path", "p", "right continuations", "its lines", "loss"], rows)
    best = set(chances.topk(KEEP).indices.tolist())
    page.claim(best == set(labels.topk(KEEP).indices.tolist()),
               f"the {KEEP} with the highest p are the {KEEP} whose continuations are right most "
               "often")


def resume(walk, batch):
    """Resume: the best k go on. -> all paths."""
    page = walk.page
    paths = list(batch.live)
    alive, pruned = best_paths(paths, KEEP)
    held = batch.cache.nbytes
    held_positions = N * batch.cache.capacity
    page.write("## Resume")
    page.code(f"gamma = k / N = {KEEP} / {N}")
    batch.prune(pruned)
    batch.resume(1, len(walk.prompt) + walk.limit)
    kept = [path for path in paths if path in alive]
    names = " and ".join(path.name for path in kept)
    page.write(f"Paths {names} go on; the rows of the other {N - KEEP} are freed.")
    page.claim(batch.cache.nbytes * held_positions == held * KEEP * batch.cache.capacity,
               f"the cache has {KEEP} rows now, with room for {walk.limit} new tokens each, and "
               "holds memory for no others")
    batch.decode(until=walk.limit)
    for path in kept:
        page.code(f"path {path.index}, answer {walk.answer_of(path.ids)}\n{walk.lines(path.ids)}")
    return paths


def same_as_uninterrupted(walk, paths):
    """That the check disturbed nothing. -> the paths of a run without it."""
    page = walk.page
    settings = dataclasses.asdict(SAMPLING)
    (whole,) = generate(walk.model, [walk.prompt], N, walk.limit, **settings)
    kept = [path for path in paths if path.status != "pruned"]
    page.claim(all(path.ids == whole[path.index].ids for path in kept),
               "token for token what a run without any check gives: the check left no trace")
    again = launch_check_resume(
        walk.model, walk.stop, walk.prompt, N, KEEP, walk.checkpoint, max_new_tokens=walk.limit,
        **settings)
    page.claim([path.ids for path in again] == [path.ids for path in paths],
               "`launch_check_resume`, the function that does all this in one call, gives the same "
               "paths")
    return whole


def count_votes(walk, paths, whole):
    """The vote, with and without pruning."""
    page = walk.page
    problem = walk.problem
    page.write("## Vote")
    kept = [path for path in paths if path.status != "pruned"]
    answers = [walk.answer_of(path.ids) for path in kept]
    all_answers = [walk.answer_of(path.ids) for path in whole]
    spent = sum(len(path.ids) for path in paths)
    unpruned = sum(len(path.ids) for path in whole)
    without = [f"{N} paths, no check", ", ".join(all_answers), vote(all_answers), unpruned]
    with_check = [f"{KEEP} of {N} kept", ", ".join(answers), vote(answers), spent]
    page.table(["", "answers", "the vote", "tokens"], [without, with_check])
    page.claim(same_answer(vote(answers), problem.answer),
               f"the vote of the kept paths is right: {problem.answer}")
    page.claim(not same_answer(vote(all_answers), problem.answer),
               "without the check the wrong paths would have outvoted the right ones")
    page.claim(spent < unpruned, f"the check saved {1 - spent / unpruned:.0%} of the tokens. One "
               "question shows how it works, and proves nothing: RESULTS.md has the table over 300")


def ends_early(walk, whole):
    """What happens to a path that ends before the checkpoint."""
    page = walk.page
    late = min(len(path.ids) for path in whole) + 1
    seen = []

    class Looker(Watcher):
        def checked(self, stage, checked, kept):
            for path in checked:
                seen.append((path, len(path.ids), path in kept))

    launch_check_resume(
        walk.model, walk.stop, walk.prompt, N, KEEP, late, max_new_tokens=walk.limit,
        watcher=Looker(), **dataclasses.asdict(SAMPLING))
    page.write("## A path that ends before the checkpoint")
    page.write(f"With the checkpoint at {late} tokens some paths have ended by then. Their rows "
               "have left the cache, so they are read again, whole, and scored; they compete for "
               f"the {KEEP} places like the others. A kept one votes with the answer that it has; "
               "a pruned one does not vote, although it has an answer.")
    ended = [path for path, length, _ in seen if length < late]
    scores = walk.stop.score(walk.model, [walk.prompt + path.ids for path in ended])
    rows = []
    for path, length, kept in seen:
        state = "ended" if length < late else "running"
        rows.append([path.index, length, state, f"{path.score:.2f}", "kept" if kept else "pruned"])
    page.table(["path", "tokens at the check", "then", "p", ""], rows)
    page.claim(len(ended) > 0 and is_close(scores, torch.tensor([path.score for path in ended])),
               f"the {len(ended)} that had ended have the scores of their whole texts")
    page.claim(sum(kept for _, _, kept in seen) == KEEP, f"exactly {KEEP} vote")
    page.write(f"This STOP was trained on prefixes of at most {max(walk.stop.trained_for())} "
               f"tokens; {late} lie outside of what it has seen.")


@torch.inference_mode()
def walk_through(settings):
    """The page's Markdown."""
    walk = Walk(settings)
    ask(walk)
    batch = launch(walk)
    chances = check(walk, batch)
    worth(walk, batch, chances)
    paths = resume(walk, batch)
    whole = same_as_uninterrupted(walk, paths)
    count_votes(walk, paths, whole)
    ends_early(walk, whole)
    return walk.page.text()


def main(settings):
    """Write or print the page."""
    if settings.out is not None:
        require_target(settings.out)
    text = walk_through(settings)
    if settings.out is None:
        print(text, end="")
    else:
        write_atomic(Path(settings.out), text)


if __name__ == "__main__":
    command_line(Settings, main)
