"""What the [STOP] token attends to (paper, Figures 7 and 10): one HTML page of paths side by side.

    python studies/attention.py          # the embedded toy; writes runs/attention/attention.html
    python studies/attention.py --model M --stop S --data problems.jsonl --layer 20

High-scored paths stand on the left, low-scored ones on the right. The weights are those of the last
[STOP] position, whose state the head reads, over every position before it: the mean over layers and
heads, or one layer's. A token's shade is its weight over the largest in its prefix. The page needs
no other file.
"""
import contextlib
import dataclasses
import html
import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from commands.common import open_model
from engine.refill import generate
from model import Attend
from plumbing.answers import extract_answer, same_answer
from plumbing.command_line import command_line, option, require_positive
from plumbing.problems import Problem
from plumbing.records import write_atomic
from sample import prefill, sampling_of
from shared import StopSettings, load_problems, load_stop, require, require_targets

PARTS = ("prompt", "prefix", "stop")  # what is attended to


@dataclasses.dataclass(kw_only=True)
class Settings(StopSettings):
    """What `python studies/attention.py` can be told."""
    out: str = option("runs/attention", "folder for attention.html")
    problems: int = option(4, "the first so many problems")
    n: int = option(16, "paths a problem, to choose from")
    show: int = option(2, "highest and lowest scored paths shown of each problem")
    prefix: int | None = option(
        None, "the checkpoint, in new tokens (default: what STOP was trained for, or 2048)")
    layer: int | None = option(None, "one layer, from 0 (default: the mean of all)")


# The weights


def last_weights(q, k, mask, sinks):
    """Attention weights (B, H, S) float32 of the last query; the arguments are model.attend's.
    With sinks a row sums to less than one."""
    B, _, H, D = q.shape
    K = k.shape[1]
    last = q[:, -1].view(B, K, H // K, D)
    scores = torch.einsum("bkgd,bksd->bkgs", last, k) * D ** -0.5
    scores = scores.float() + mask[:, -1, None, None]
    scores = scores.reshape(B, H, -1)
    if sinks is None:
        return scores.softmax(-1)
    sink = sinks.float().view(1, H, 1).expand(B, H, 1)  # one more logit, that is dropped again
    return torch.cat((scores, sink), -1).softmax(-1)[..., :-1]


@contextlib.contextmanager
def watched_attention(model):
    """A list that takes, while this lasts, the weights (B, H, S) of the last query in every
    layer."""
    seen = []
    usual = model.attend

    class Watched(Attend):
        """The plain attention, which keeps what it gives the last query."""

        def __call__(self, q, k, v, window, sinks=None):
            mask = self.masks[window]
            seen.append(last_weights(q, k[:len(q), :, :mask.shape[-1]], mask, sinks))
            return super().__call__(q, k, v, window, sinks)

    model.attend = Watched
    try:
        yield seen
    finally:
        model.attend = usual


@torch.inference_mode()
def weights_of(model, stop, prefix_ids, layer=None):
    """(score, weights): STOP's score of one prefix, and where the last [STOP] position looks,
    (prefix + m,) float32: the mean over heads of `layer`, or of all layers. Zero where a window
    hides a position."""
    cache, _ = prefill(model, [prefix_ids], stop.m)
    with watched_attention(model) as seen:
        score = stop.chance(stop(model, cache)).item()
    rows = [weights[0].mean(0) for weights in seen]
    weights = torch.stack(rows).mean(0) if layer is None else rows[layer]
    return score, weights.cpu()


# The paths


@dataclasses.dataclass
class Reading:
    """A path whose prefix was scored, and where the last [STOP] position looked."""
    index: int           # which path of its problem
    score: float
    answer: str | None
    right: bool
    ids: list            # the prefix's new tokens
    weights: list        # the attention on each of them
    shares: dict         # of PARTS -> the attention on it


@dataclasses.dataclass
class Contrast:
    """The highest and the lowest scored paths of a problem."""
    problem: Problem
    high: list   # of Reading, the highest first
    low: list    # of Reading, the lowest first


def read_path(model, stop, tokenizer, problem, path, checkpoint, layer):
    """The Reading of a sampled path."""
    prompt = path.prompt_ids
    ids = path.ids[:checkpoint]
    score, weights = weights_of(model, stop, prompt + ids, layer)
    answer = extract_answer(tokenizer.completion(path.ids), problem.kind)
    parts = weights.split([len(prompt), len(ids), stop.m])
    return Reading(
        index=path.index,
        score=score,
        answer=answer,
        right=same_answer(answer, problem.answer, problem.kind),
        ids=ids,
        weights=parts[1].tolist(),
        shares={name: part.sum().item() for name, part in zip(PARTS, parts)})


def contrast(model, stop, tokenizer, problem, settings, checkpoint):
    """The Contrast of a problem: n paths are sampled and scored, some of both ends are read."""
    prompt = tokenizer.ask(problem)
    limit = stop.limit(model, prompt, settings.max_new_tokens)
    sampling = dataclasses.asdict(sampling_of(settings))
    (paths,) = generate(model, [prompt], settings.n, limit, batch=settings.batch, **sampling)
    scores = stop.score(model, [prompt + path.ids[:checkpoint] for path in paths]).tolist()
    ranked = sorted(paths, key=lambda path: (-scores[path.index], path.index))

    def read(chosen):
        readings = []
        for path in chosen:
            readings.append(
                read_path(model, stop, tokenizer, problem, path, checkpoint, settings.layer))
        return readings

    lowest = ranked[::-1]
    return Contrast(problem, read(ranked[:settings.show]), read(lowest[:settings.show]))


def mean_shares(contrasts):
    """{high_prompt, ..., low_stop}: the mean share of the attention on each part, by side."""
    means = {}
    for side in ("high", "low"):
        readings = []
        for one in contrasts:
            readings += getattr(one, side)
        for part in PARTS:
            shares = [reading.shares[part] for reading in readings]
            means[f"{side}_{part}"] = sum(shares) / len(shares)
    return means


# The page

STYLE = """body{font:14px/1.5 system-ui,sans-serif;margin:2em;max-width:90em}
td{vertical-align:top;width:50%;padding:.7em;border:1px solid #ccc}
.text{font-family:monospace;white-space:pre-wrap;overflow-wrap:anywhere}.about{color:#555}
table{border-collapse:collapse;width:100%}"""

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>What [STOP] attends to</title>
<style>{style}</style></head>
<body><h1>What [STOP] attends to</h1><p>{about}</p>
{body}
</body></html>
"""

PROBLEM = """<h2>{id}</h2><p class=text>{problem}</p><p class=about>answer: {answer}</p>
<table><tr><th>high scores</th><th>low scores</th></tr>
{rows}
</table>"""

CELL = (
    '<td><p class="about">path {index}, score {score:.3f}, ended {verdict} ({answer}); attention: '
    "{prompt:.1%} on the prompt, {prefix:.1%} on the prefix, {stop:.1%} on the [STOP] tokens</p>"
    '<div class="text">{text}</div></td>')

TOKEN = '<span style="background:rgba(255,120,0,{shade:.3f})" title="{weight:.4f}">{text}</span>'


def shaded(tokenizer, ids, weights):
    """HTML of tokens, each shaded by its weight. A character of several tokens stands with its last
    one, under the sum of their weights."""
    largest = max(max(weights), 1e-12)
    text_of = tokenizer.stream()
    spans = []
    pending = 0.0  # weight of tokens whose character is not complete
    for token, weight in zip(ids, weights):
        pending += weight
        text = text_of(token)
        if text:
            shade = min(1.0, pending / largest)
            spans.append(TOKEN.format(shade=shade, weight=pending, text=html.escape(text)))
            pending = 0.0
    return "".join(spans)


def cell(tokenizer, reading):
    """HTML of one path."""
    return CELL.format(
        index=reading.index,
        score=reading.score,
        verdict="right" if reading.right else "wrong",
        answer=html.escape(str(reading.answer)),
        text=shaded(tokenizer, reading.ids, reading.weights),
        **reading.shares)


def page(tokenizer, contrasts, about):
    """The whole HTML page. about: the line under the title."""
    sections = []
    for one in contrasts:
        rows = []
        for high, low in zip(one.high, one.low):
            rows.append(f"<tr>{cell(tokenizer, high)}{cell(tokenizer, low)}</tr>")
        sections.append(PROBLEM.format(
            id=html.escape(one.problem.id),
            problem=html.escape(one.problem.problem),
            answer=html.escape(one.problem.answer),
            rows="\n".join(rows)))
    return PAGE.format(style=STYLE, about=html.escape(about), body="\n".join(sections))


def main(settings):
    """Sample, score, choose, write the page; the last line is JSON: mean shares of attention."""
    require_positive(settings, "problems", "n", "prefix", "max_new_tokens", "batch")
    fits = 1 <= settings.show <= settings.n // 2
    require("show", fits, settings.show, f"1 to half of n = {settings.n}")
    require_targets(settings.out, "attention.html")
    model, tokenizer = open_model(settings)
    layers = model.config.num_hidden_layers
    layer = settings.layer
    require("layer", layer is None or 0 <= layer < layers, layer, f"0 to {layers - 1}")
    stop = load_stop(settings, model)
    problems = load_problems(settings)[:settings.problems]
    checkpoint = settings.prefix
    if checkpoint is None:
        checkpoint = stop.trained_for()[0]

    contrasts = []
    for problem in problems:
        contrasts.append(contrast(model, stop, tokenizer, problem, settings, checkpoint))
    which = f"mean over {layers} layers" if layer is None else f"layer {layer} of {layers}"
    about = (
        f"{settings.model}: attention of the last of {stop.m} [STOP] positions over prefixes of at "
        f"most {checkpoint} tokens, {which} and over heads; the darker, the more, within each "
        "prefix.")
    out = Path(settings.out)
    out.mkdir(parents=True, exist_ok=True)
    write_atomic(out / "attention.html", page(tokenizer, contrasts, about))
    last = {"page": str(out / "attention.html")}
    for name, share in mean_shares(contrasts).items():
        last[name] = round(share, 4)
    print(json.dumps(last))


if __name__ == "__main__":
    command_line(Settings, main)
