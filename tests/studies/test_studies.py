"""The studies on tiny models: each figure beside a direct computation, each script as typed."""
import csv
import dataclasses
import json
import math
import random
import re
import statistics
import sys
from html.parser import HTMLParser

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    KINDS, ROOT, close, random_ids, random_model, raw_config, write_checkpoint, write_tokenizer)

sys.path.insert(0, str(ROOT / "studies"))
import ablations
import attention
import guideline
import judge
import model as modeling
import overhead
import scaling
import shared
import train
from baselines import CONFIDENCES, JUDGE, confidence, judge_scores, redundancy
from commands import train as train_command
from engine import refill
from engine.stored import sample_paths
from eval import STOP
from model import load
from plumbing.answers import same_answer
from plumbing.command_line import command_line
from plumbing.problems import Problem, read_problems
from plumbing.statistics import interval
from plumbing.tokenizer import Tokenizer
from sample import Sampling, generate
from stop import Stop, retention, vote
from train import Example


def lively(model, m=4):
    """A Stop whose adapter and head do something: B and head are random, not zero."""
    stop = Stop(model, m=m, rank=2).eval()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in stop.named_parameters():
            if "lora_B" in name or "head" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return stop


def column(rows, key):
    """One value of each row, a dict."""
    return [row[key] for row in rows]


def labels_of(examples):
    """The labels of train.Examples."""
    return [example.label for example in examples]


def write_lines(file, records):
    """JSON lines."""
    lines = [json.dumps(record) + "\n" for record in records]
    file.write_text("".join(lines))


def write_labels(file):
    """Two prefixes of each of six problems, of eight rollouts each."""
    records = []
    for i in range(12):
        records.append({
            "id": f"q{i // 2}",
            "path": i % 2,
            "prefix_token_ids": random_ids(5 + i, vocab=256, seed=i).tolist(),
            "soft_label": (i % 9) / 8,
            "successes": i % 9,
            "rollouts": 8})
    write_lines(file, records)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint directory with a byte tokenizer, a STOP, six problems and labels."""
    raw = raw_config("qwen2", vocab_size=256, eos_token_id=[3, 50, 99])
    folder = write_checkpoint(tmp_path_factory.mktemp("study") / "it", raw)
    write_tokenizer(folder)
    stop = lively(load(folder))
    stop.save(folder / "stop", {"settings": {"prefix": 4, "max_new_tokens": 12}})
    problems = [{"id": f"<p{i}>", "problem": f"{i}?", "answer": i} for i in range(6)]
    write_lines(folder / "test.jsonl", problems)
    write_labels(folder / "labels.jsonl")
    return folder


@pytest.fixture(scope="module")
def judged(folder):
    """The folder with a judge in labels' place, untrained but for one epoch."""
    judge.main(judge.Settings(
        model=str(folder), labels=str(folder / "labels.jsonl"), epochs=1, batch_size=4,
        validation=0.3, device="cpu"))
    return folder


@dataclasses.dataclass
class Outcome:
    """What a script left."""
    status: int
    out: list  # lines of stdout
    err: list  # lines of stderr

    @property
    def last(self):
        """The object in its last line."""
        return json.loads(self.out[-1])


@pytest.fixture
def run(monkeypatch, capsys):
    """A function that runs a study as if typed, and gives its Outcome."""
    def run_study(study, *argv):
        typed = [study.__name__, *map(str, argv), "--device", "cpu", "--dtype", "float32"]
        monkeypatch.setattr("sys.argv", typed)
        status = 0
        try:
            command_line(study.Settings, study.main)
        except SystemExit as ended:
            status = ended.code
        captured = capsys.readouterr()
        return Outcome(status, captured.out.splitlines(), captured.err.splitlines())

    return run_study


def check_refusal(outcome, message):
    """Exit status 2 and one line that holds the message."""
    assert outcome.status == 2
    assert len(outcome.err) == 1, outcome.err
    assert message in outcome.err[0]


# The judge


def memory_of(model):
    """Where its parameters lie."""
    return {parameter.data_ptr() for parameter in model.parameters()}


def test_the_judge_starts_as_the_model():
    """Hidden states of the model, a head that gives one half, every weight trained, the model's own
    untouched."""
    base = random_model("qwen2", tie_word_embeddings=True)
    copy = judge.new_judge(base, 0)
    ids = random_ids(2, 9)
    with torch.no_grad():
        assert torch.equal(copy(ids), base(ids))
        assert torch.equal(copy.logits(copy(ids)), torch.zeros(2, 9, 2))
    assert all(parameter.requires_grad for parameter in copy.parameters())
    assert not any(parameter.requires_grad for parameter in base.parameters())
    assert not hasattr(copy, "lm_head")
    assert memory_of(base).isdisjoint(memory_of(copy))


def test_the_judges_head_follows_the_seed():
    base = random_model("qwen2")
    head = judge.new_judge(base, 0).score[0].weight
    assert torch.equal(judge.new_judge(base, 0).score[0].weight, head)
    assert not torch.equal(judge.new_judge(base, 1).score[0].weight, head)


def test_the_judge_reads_the_last_token():
    """Ragged rows in a batch = each alone; the loss = the soft cross-entropy written out."""
    reader = judge.new_judge(random_model("qwen2"), 0)
    prefixes = [random_ids(n, seed=n).tolist() for n in (7, 2, 11)]
    labels = [0.25, 1.0, 0.0]
    alone = []
    with torch.no_grad():
        weight = torch.randn(2, 32, generator=torch.Generator().manual_seed(0))
        reader.score[-1].weight.copy_(weight)
        logits = judge.read(reader, prefixes)
        for prefix in prefixes:
            hidden = reader(torch.tensor([prefix]))
            alone.append(reader.logits(hidden[0, -1]))
    alone = torch.stack(alone)
    close(logits, alone, 1e-5)

    total = 0.0
    for label, (bad, good) in zip(labels, alone.double().softmax(-1).tolist()):
        total -= label * math.log(good) + (1 - label) * math.log(bad)
    loss = judge.loss_of(logits, torch.tensor(labels)).item()
    assert loss == pytest.approx(total / 3, rel=1e-5)


def test_accumulation_changes_nothing(monkeypatch):
    """Passes of 2, two a step, are passes of 4: the same weights after the same steps, a ragged
    last one included."""
    base = random_model("qwen2")
    examples = []
    for i in range(12):
        examples.append(Example(random_ids(6, seed=i).tolist(), i / 11, f"p{i % 5}", None))
    shuffled = torch.randperm

    def in_order(n, **settings):  # the order of the batches; the split keeps its generator
        return shuffled(n, **settings) if settings else torch.arange(n)

    monkeypatch.setattr(torch, "randperm", in_order)
    states = []
    for size, accumulation in ((2, 2), (4, 1)):
        settings = judge.Settings(
            epochs=1, batch_size=size, accumulation=accumulation, validation=0.2, stored="float32",
            warmup=0)
        state, _ = judge.fit(judge.new_judge(base, 0), examples, settings)
        states.append(state)
    for name, tensor in states[0].items():
        close(tensor, states[1][name], 1e-5)


@pytest.fixture
def judge_flags(folder):
    """The flags of a short training."""
    return (
        "--model", folder, "--labels", folder / "labels.jsonl", "--epochs", 4, "--batch-size", 4,
        "--lr", 3e-3, "--warmup", 1, "--stored", "float32", "--validation", 0.3)


def test_the_judge_is_a_checkpoint(folder, judge_flags, tmp_path, run):
    """What is written loads as a reward model and scores as it validated; the best epoch is kept;
    it learns: the training loss falls."""
    outcome = run(judge, *judge_flags, "--out", tmp_path / "a")
    assert outcome.status == 0, outcome.err
    tokenizer = Tokenizer(tmp_path / "a")
    assert tokenizer.format == "raw"
    reader = load(tmp_path / "a")
    assert reader.config.reward and reader.config.eos_ids == (3, 50, 99)

    examples = train_command.given_labels(folder / "labels.jsonl", reader, tokenizer, 0, [])
    _, validation = train.split(examples, 0.3, 0)
    total = 0.0
    with torch.no_grad():
        for example in validation:
            hidden = reader(torch.tensor([example.ids]))
            bad, good = reader.logits(hidden[0, -1]).log_softmax(-1).tolist()
            total -= example.label * good + (1 - example.label) * bad
    loss = total / len(validation)
    about = json.loads((tmp_path / "a" / "judge.json").read_text())
    assert outcome.last["validation_loss"] == about["metrics"]["validation_loss"]
    assert about["metrics"]["validation_loss"] == pytest.approx(loss, abs=1e-5)

    epochs = []
    for line in outcome.out:
        if line.startswith("epoch"):
            pairs = line.split(": ")[1].split(", ")
            epochs.append(dict(pair.split(" ") for pair in pairs))
    assert len(epochs) == 4
    assert float(epochs[-1]["train_loss"]) < float(epochs[0]["train_loss"])
    losses = list(map(float, column(epochs, "validation_loss")))
    assert min(losses) == losses[about["epoch"] - 1]
    assert min(losses) == pytest.approx(loss, rel=1e-3)


def test_the_judges_training_repeats(judge_flags, tmp_path, run):
    for name in ("a", "b"):
        outcome = run(judge, *judge_flags, "--out", tmp_path / name)
        assert outcome.status == 0, outcome.err
    first = (tmp_path / "a" / "model.safetensors").read_bytes()
    assert (tmp_path / "b" / "model.safetensors").read_bytes() == first


def test_no_checkpoint_is_overwritten(folder, judge_flags, tmp_path, run):
    (tmp_path / "model.safetensors").write_text("a judge")
    for out in (tmp_path, folder):
        outcome = run(judge, *judge_flags, "--out", out)
        check_refusal(outcome, "holds a checkpoint already")


@pytest.mark.parametrize("flag, value, message", (
    ("--stored", "int8", "stored: found 'int8'"),
    ("--epochs", 0, "epochs: found 0"),
    ("--clip", -1, "clip: found -1"),
    ("--validation", 1, "validation: found 1"),
    ("--labels", "nowhere.jsonl", "nowhere.jsonl"),
    ("--lr", 1e30, "lr: found 1e+30"),
    ("--lr", 1e15, "found NaN or infinity, expected finite numbers")))
def test_a_judge_that_cannot_be(folder, tmp_path, run, flag, value, message):
    """One line, and no file written."""
    flags = {
        "--model": folder, "--labels": folder / "labels.jsonl", "--out": tmp_path / "out",
        "--epochs": 2, "--batch-size": 4}
    flags[flag] = value
    words = []
    for name, word in flags.items():
        words += [name, word]
    check_refusal(run(judge, *words), message)
    assert not list(tmp_path.glob("out/*"))


def test_the_judges_folder_is_tried_before_training(judge_flags, tmp_path, monkeypatch, run):
    monkeypatch.setattr(judge, "fit", None)
    (tmp_path / "file").write_text("")
    check_refusal(run(judge, *judge_flags, "--out", tmp_path / "file" / "below"), "Not a directory")

    def full_disk(*arguments, **settings):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tempfile.TemporaryFile", full_disk)
    check_refusal(run(judge, *judge_flags, "--out", tmp_path / "out"), "No space left on device")


# Attention


def rotated(x, angles, scale):
    """RoPE written out, on halves: x (S, heads, D), angles (S, D)."""
    half = x.shape[-1] // 2
    swapped = torch.cat((-x[..., half:], x[..., :half]), -1)
    return x * (angles.cos() * scale)[:, None] + swapped * (angles.sin() * scale)[:, None]


def softmax_of_last(part, config, q, k):
    """The last query's weights (H, S) by softmax written out; q (S, H, D), k (S, K, D) rotated."""
    S = len(q)
    heads = config.num_attention_heads
    rows = []
    for head in range(heads):
        group = head * config.num_key_value_heads // heads
        scores = (k[:, group] @ q[-1, head]) / math.sqrt(config.head_dim)
        if part.window is not None:
            scores[:max(0, S - part.window)] = -math.inf
        powers = scores.exp()
        total = powers.sum()
        if part.sinks is not None:
            total += part.sinks[head].double().exp()
        rows.append(powers / total)
    return torch.stack(rows)


def direct_weights(model, stop, prefix):
    """(per layer (H, S): attention of the last position, score) in one masked pass over prefix and
    [STOP], from what hooks see of q and k."""
    captured = []
    handles = []

    def capture(module, inputs, output):
        captured.append(output[0])

    for layer in model.model.layers:
        for linear in (layer.self_attn.q_proj, layer.self_attn.k_proj):
            handles.append(linear.register_forward_hook(capture))
    embedded = model.model.embed_tokens(torch.tensor([prefix]))
    embedded = torch.cat((embedded, stop.tokens[None]), 1)
    S = embedded.shape[1]
    active = torch.arange(S)[None] >= len(prefix)
    hidden = model(embedded, adapter=stop.lora.at(active))
    for handle in handles:
        handle.remove()

    frequencies, scale = modeling.rope_frequencies(model.config)
    angles = torch.arange(S)[:, None].double() * torch.cat((frequencies, frequencies)).double()
    D = model.config.head_dim
    result = []
    for number, layer in enumerate(model.model.layers):
        part = layer.self_attn
        q = part.q_norm(captured[2 * number].unflatten(-1, (-1, D))).double()
        k = part.k_norm(captured[2 * number + 1].unflatten(-1, (-1, D))).double()
        q = rotated(q, angles, scale)
        k = rotated(k, angles, scale)
        result.append(softmax_of_last(part, model.config, q, k))
    return result, stop.chance(stop.head(hidden[:, -1])).item()


@pytest.mark.parametrize("kind", KINDS)
def test_attention_of_the_last_position(kind):
    """Each layer's weights = softmax written out, windows and sinks included; rows sum to one, less
    the sinks' share; the score is that of Stop.score; afterwards the model attends as before."""
    model = random_model(kind)
    stop = lively(model, m=3)
    prefix = random_ids(20).tolist()
    plain = model.attend
    with torch.inference_mode():
        direct, chance = direct_weights(model, stop, prefix)
    totals = []
    for layer, rows in enumerate(direct):
        score, weights = attention.weights_of(model, stop, prefix, layer)
        close(weights.double(), rows.mean(0), 1e-5)
        assert score == pytest.approx(chance, abs=1e-5)
        assert score == pytest.approx(stop.score(model, [prefix]).item(), abs=1e-6)
        totals.append(weights.sum().item())
    _, weights = attention.weights_of(model, stop, prefix)
    close(weights.double(), torch.stack(direct).mean((0, 1)), 1e-5)
    assert max(totals) < 1 + 1e-5
    if kind == "gpt_oss":
        assert min(totals) < 0.95
    else:
        assert totals == pytest.approx([1] * len(direct), abs=1e-5)
    assert model.attend is plain


class Page(HTMLParser):
    """The page's text, its spans with their shade, and every tag."""

    def __init__(self, text):
        super().__init__()
        self.tags = set()
        self.shades = []
        self.words = []  # of the spans
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        if tag == "span":
            shade = re.search(r"([\d.]+)\)$", dict(attrs)["style"])[1]
            self.shades.append(float(shade))
            self.words.append("")

    def handle_data(self, data):
        self.text += data
        if self.words:
            self.words[-1] += data


class Words:
    """A tokenizer of five tokens: markup, and a character of two tokens."""

    def stream(self):
        return ["<script>", '"&', "", "\u00e9", "</script>"].__getitem__


def test_hostile_text_is_escaped():
    """Markup in tokens, a problem or an answer stays text; a character of two tokens is one span
    with their sum."""
    reading = attention.Reading(
        index=0, score=0.5, answer="<b>", right=False, ids=range(5),
        weights=[0.05, 0.01, 0.01, 0.02, 0.04],
        shares={"prompt": 0.5, "prefix": 0.3, "stop": 0.2})
    problem = Problem("<i>", "<img src=x>", "</td>")
    contrast = attention.Contrast(problem, [reading], [reading])
    found = Page(attention.page(Words(), [contrast], "<u>"))
    assert found.tags.isdisjoint({"script", "b", "i", "img", "u"})
    for piece in ('<script>"&\u00e9</script>', "<b>", "<i>", "<img src=x>", "</td>", "<u>"):
        assert piece in found.text, piece
    assert found.shades == pytest.approx([1, 0.2, 0.6, 0.8] * 2, abs=1e-3)
    assert found.words[:3] == ["<script>", '"&', "\u00e9"]


def test_the_page(folder, tmp_path, run):
    """High beside low: the shown scores are the largest and the smallest; nothing is fetched."""
    argv = ("--model", folder, "--out", tmp_path, "--n", 6)
    outcome = run(attention, *argv, "--problems", 2, "--show", 2)
    assert outcome.status == 0, outcome.err
    text = (tmp_path / "attention.html").read_text()
    found = Page(text)
    scores = list(map(float, re.findall(r"score ([\d.]+),", found.text)))
    assert len(scores) == 8
    assert scores[0] >= scores[2] >= scores[3] >= scores[1]
    assert "<p0>" in found.text
    assert not re.search(r"\b(src|href|https?|url|import)\b", text)
    assert outcome.last["high_prompt"] > 0
    shares = [outcome.last[f"low_{part}"] for part in ("prompt", "prefix", "stop")]
    assert sum(shares) == pytest.approx(1, abs=1e-3)
    check_refusal(run(attention, *argv, "--layer", 3), "layer: found 3, expected 0 to 2")
    check_refusal(run(attention, *argv, "--show", 4), "show: found 4")
    check_refusal(run(attention, *argv, "--problems", 0), "problems: found 0")


# Ablations


def test_labels_of_fewer_rollouts(tmp_path):
    """Drawn without replacement: the hypergeometric shares (with replacement, none right of 3 in 8
    would come twice as often); all rollouts give the label back, and the seed decides."""
    file = tmp_path / "labels.jsonl"
    record = {"prefix_token_ids": [1], "soft_label": 3 / 8, "successes": 3, "rollouts": 8}
    write_lines(file, [record] * 4000)
    examples = [Example([1], 3 / 8, "p", None)] * 4000
    drawn = labels_of(ablations.relabel(examples, file, 4, 0))
    for right in range(5):
        share = math.comb(3, right) * math.comb(5, 4 - right) / math.comb(8, 4)
        error = 4.5 * math.sqrt(share * (1 - share) / 4000)  # false alarm: 1 in 10^5
        assert abs(drawn.count(right / 4) / 4000 - share) <= error, right
    assert ablations.relabel(examples, file, 8, 0) == examples
    assert labels_of(ablations.relabel(examples, file, 4, 1)) != drawn


def test_labels_that_have_no_fewer_rollouts(tmp_path):
    file = tmp_path / "labels.jsonl"
    example = Example([1], 0.5, "p", None)
    record = {"prefix_token_ids": [1], "soft_label": 0.5, "successes": 4, "rollouts": 8}
    write_lines(file, [record])
    with pytest.raises(ValueError, match=r"labels.jsonl:1: .*8, expected .*at least 9"):
        ablations.relabel([example], file, 9, 0)
    write_lines(file, [{"prefix_token_ids": [1], "soft_label": 0.5}])
    with pytest.raises(ValueError, match=r"labels.jsonl:1: successes and rollouts: found None"):
        ablations.relabel([example], file, 1, 0)


def test_a_probe_finds_the_best_line():
    """On states whose labels are a line's sigmoid: as good, on held-out problems, as the optimum
    that LBFGS finds."""
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(600, 5, generator=generator)
    line = torch.randn(5, generator=generator)
    examples = []
    for i, label in enumerate((states @ line).sigmoid().tolist()):
        examples.append(Example([i], label, f"p{i % 60}", None))
    settings = train_command.Settings(
        lr=0.02, batch_size=32, accumulation=1, epochs=60, validation=0.2, cosine=True,
        weight_decay=0.0)
    head = ablations.fit_head(torch.nn.Linear(5, 1), states, examples, settings)
    training, validation = train.split(examples, 0.2, 0)

    def loss(model, part):
        numbers = [example.ids[0] for example in part]
        labels = torch.tensor(labels_of(part))
        return F.binary_cross_entropy_with_logits(model(states[numbers])[:, 0], labels)

    best = torch.nn.Linear(5, 1)
    optimizer = torch.optim.LBFGS(best.parameters(), max_iter=200)

    def closure():
        optimizer.zero_grad()
        value = loss(best, training)
        value.backward()
        return value

    optimizer.step(closure)
    expected = loss(best, validation).item()
    assert loss(head, validation).item() == pytest.approx(expected, rel=2e-3)


def test_scores_of_shared_prefixes():
    """Scorers of 1, 2 and 5 tokens and a head on one prefilled cache = each prefix alone; the order
    is the input's."""
    model = random_model("qwen2")
    prefixes = [random_ids(n, seed=n).tolist() for n in (9, 3, 14, 6, 3)]
    stops = {m: lively(model, m=m) for m in (1, 2, 5)}

    def one_state(cache, hidden):
        return hidden[:, 7]

    def scorer_of(stop):
        def score(cache, hidden):
            return stop.chance(stop(model, cache))
        return score

    scorers = {m: scorer_of(stop) for m, stop in stops.items()}
    scorers["head"] = one_state
    found = ablations.score(model, scorers, prefixes, 5, batch=2)
    with torch.no_grad():
        last = torch.stack([model(torch.tensor([prefix]))[0, -1] for prefix in prefixes])
    close(torch.tensor(found["head"]), last[:, 7])
    close(ablations.last_states(model, prefixes, batch=2), last)
    for m, stop in stops.items():
        alone = torch.cat([stop.score(model, [prefix]) for prefix in prefixes])
        close(torch.tensor(found[m]), alone, 1e-5)


VARIANTS = ("default", "probe", "tokens", "step", "otv", "hard", "k2", "m5", "r1")


@pytest.fixture(scope="module")
def variants(folder, tmp_path_factory):
    """The flags of a study of all kinds of variants, and the folder of its finished ones."""
    place = tmp_path_factory.mktemp("variants")
    argv = (
        "--model", folder, "--labels", folder / "labels.jsonl", "--stored", place,
        "--out", place / "out", "--prefix", 4, "--max-new-tokens", 12, "--n", 5, "--keep", 2,
        "--rank", 2, "--m", 3, "--epochs", 2, "--lr", 0.05, "--batch-size", 4,
        "--accumulation", 1, "--validation", 0.3, "--head-epochs", 4, "--batch", 30,
        "--temperature", 2.0, "--top-k", 0, "--top-p", 1.0)
    asked = ("--only", ",".join(VARIANTS[1:]), "--seeds", "0,1")
    return argv, asked, place


def test_every_variant_is_what_its_name_says(folder, variants, run):
    argv, asked, place = variants
    outcome = run(ablations, *argv, *asked)
    assert outcome.status == 0, outcome.err
    model = load(folder)
    found = {}
    tokens = {}
    for name in VARIANTS:
        if name not in ("probe", "step"):
            stop = Stop.load(place / "out" / f"{name}-0" / "stop", model)
            found[name] = (stop.m, stop.lora.rank if stop.lora.pairs else 0)
            tokens[name] = stop.tokens
    assert found == {
        "default": (3, 2), "tokens": (3, 0), "otv": (1, 2), "hard": (3, 2), "k2": (3, 2),
        "m5": (5, 2), "r1": (3, 1)}
    assert not torch.equal(tokens["hard"], tokens["default"])


def stored_records(folder, place):
    """The test paths of the study, as records."""
    model = load(folder)
    problems = read_problems(folder / "test.jsonl")
    sampling = Sampling(temperature=2.0, top_k=0, top_p=1.0, seed=0)
    return sample_paths(model, Tokenizer(folder), problems, place, 5, 12, sampling)


def mean_grades(model, place, name, records, right):
    """(6,): the mean grade of the best two of five paths a problem, by two seeds' modules."""
    prefixes = []
    for record in records:
        prefixes += [record["prompt_ids"] + path[:4] for path in record["paths"]]
    rows = []
    for seed in (0, 1):
        stop = Stop.load(place / "out" / f"{name}-{seed}" / "stop", model)
        scores = stop.score(model, prefixes).view(6, 5).tolist()
        row = []
        for i, line in enumerate(scores):
            best = sorted(range(5), key=lambda j: -line[j])[:2]
            row.append(sum(right[i][j] for j in best) / 2)
        rows.append(row)
    return torch.tensor(rows, dtype=torch.float64).mean(0)


def test_the_table_of_variants(folder, variants, monkeypatch, run):
    """The table = the kept paths' grades by the saved modules, averaged over seeds; the paired
    difference is of the same problems; finished variants are not trained again."""
    argv, asked, place = variants
    outcome = run(ablations, *argv, *asked)
    assert outcome.status == 0, outcome.err
    records = stored_records(folder, place)
    right = [list(record["right"]) for record in records]
    for i, j in enumerate([0, 1, 2, 3, 4, 0]):
        right[i][j] = True  # random paths are never right: some are graded so
    right[0][2] = True
    graded = [record | {"right": row} for record, row in zip(records, right)]
    model = load(folder)
    default = mean_grades(model, place, "default", records, right)
    m5 = mean_grades(model, place, "m5", records, right)

    def graded_paths(*arguments):
        return graded

    monkeypatch.setattr(ablations, "stored_paths", graded_paths)
    monkeypatch.setattr(train_command, "fit", None)
    monkeypatch.setattr(ablations, "fit_head", None)
    outcome = run(ablations, *argv, *asked)
    assert outcome.status == 0, outcome.err
    rows = {}
    for line in outcome.out:
        if line.startswith("|"):
            cells = line.split(" | ")
            rows[cells[0].strip("| ")] = cells
    written = (place / "out" / "ablations.md").read_text().splitlines()
    assert written == outcome.out[1:-1]
    assert set(VARIANTS) <= set(rows)
    for name, column, values in (
            ("default", 1, default), ("default", 2, default * 0), ("m5", 1, m5),
            ("m5", 2, m5 - default)):
        expected = "{:.3f} [{:.3f}, {:.3f}]".format(*interval(values.tolist()))
        assert rows[name][column] == expected, (name, column)
    assert default.any()
    assert outcome.last["m5"] == pytest.approx(m5.mean().item(), abs=1e-4)


@pytest.mark.parametrize("text, kind, expected", (
    ("3", int, [3]), ("512,1024", int, [512, 1024]), ("0.5,1,2e3,.25", float, [0.5, 1, 2000, 0.25]),
    (str(2 ** 31 - 1), int, [2 ** 31 - 1])))
def test_numbers_of_a_flag(text, kind, expected):
    assert shared.numbers("prefixes", text, kind) == expected


@pytest.mark.parametrize("kind", (int, float))
@pytest.mark.parametrize("text", (
    "", ",", "3,", "0", "-1", "3,1000000000000000000000000000000", "9" * 5000, "1e400", "nan",
    "inf", " 3", "1_0", "٣", "3;4", "1.2.3", ".", "0x10"))
def test_what_is_no_list_of_positive_numbers_is_refused(text, kind):
    """Also what Python would read, and what no array of 64 bits could hold."""
    with pytest.raises(ValueError, match="^prefixes: found '.*, expected positive numbers below"):
        shared.numbers("prefixes", text, kind)


def test_prefixes_that_cannot_be_are_refused_before_any_path_is_sampled(folder, run, monkeypatch):
    monkeypatch.setattr(shared, "sample_paths", None)
    for script in (scaling, guideline):
        outcome = run(script, "--model", folder, "--prefixes", "3,1000000000000000000000000000000")
        check_refusal(outcome, "prefixes: found '3,1000")


@pytest.mark.parametrize("changed, message", (
    (("--seeds", "a"), "seeds:"),
    (("--only", "q3"), "only: found 'q3'"),
    (("--only", "k9"), "at least 9 rollouts"),
    (("--head-epochs", 0), "head_epochs: found 0"),
    (("--plan",), "plan: found True")))
def test_ablations_that_cannot_be(variants, run, changed, message):
    argv, _, _ = variants
    check_refusal(run(ablations, *argv, *changed), message)


def test_one_folder_holds_one_study(variants, run):
    """Other settings are refused, and so is a second process."""
    argv, _, place = variants
    outcome = run(ablations, *argv, "--only", "r1")
    assert outcome.status == 0, outcome.err
    other = run(ablations, *argv, "--only", "r1", "--lr", 0.01)
    check_refusal(other, "settings.json: lr")
    with shared.locked(place / "out"):
        check_refusal(run(ablations, *argv, "--only", "r1"), "another process is at work there")


def test_edited_scores_are_noticed(variants, run):
    argv, _, place = variants
    outcome = run(ablations, *argv, "--only", "r1")
    assert outcome.status == 0, outcome.err
    file = place / "out" / "r1-0" / "scores"
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    changed = run(ablations, *argv, "--only", "r1")
    check_refusal(changed, "r1-0/scores: damaged, or another run's")
    file.write_bytes(content)


# Votes and scaling


def make_records(problems=4, n=12, seed=0):
    """(problems, records): random paths, answers (equal ones spelled differently, and none) and
    grades."""
    rng = random.Random(seed)
    spellings = ["0.5", r"\frac{1}{2}", "3", "3.0", "7", None]
    asked = []
    records = []
    for i in range(problems):
        answers = [rng.choice(spellings) for _ in range(n)]
        paths = []
        for _ in range(n):
            length = rng.randrange(3, 20)
            paths.append([rng.randrange(9) for _ in range(length)])
        asked.append(Problem(f"p{i}", f"{i}?", "1/2"))
        records.append({
            "id": f"p{i}",
            "prompt_ids": [1, 2],
            "answers": answers,
            "paths": paths,
            "right": [same_answer(answer, "1/2") for answer in answers]})
    return asked, records


def random_scores(problems, n, seed):
    """(problems, n) float64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(problems, n, generator=generator).double().numpy()


def direct_vote(problem, record, chosen):
    """1.0 if the vote of the chosen paths is right."""
    answer = vote([record["answers"][i] for i in chosen])
    return float(same_answer(answer, problem.answer))


def test_votes_by_groups():
    """The same verdict as the vote itself, on every kind of tie, of spelling and of silence."""
    (problem,), (record,) = make_records(1, 40)
    groups = shared.group_answers(record, "math")
    silent = [answer is None for answer in record["answers"]]
    assert [group is None for group in groups] == silent
    rng = random.Random(1)
    verdicts = set()
    for _ in range(300):
        chosen = rng.sample(range(40), rng.randrange(1, 8))
        verdict = shared.vote_is_right(chosen, groups, record["right"])
        assert verdict == direct_vote(problem, record, chosen)
        verdicts.add(verdict)
    assert verdicts == {0.0, 1.0}


def similarity(record, i, subset):
    """The largest Jaccard similarity of path i's first five tokens to another's of the subset."""
    sets = {j: set(record["paths"][j][:5]) for j in subset}
    return max(len(sets[i] & sets[j]) / len(sets[i] | sets[j]) for j in subset if j != i)


def test_figure_4_directly():
    """Every point by loops: nested subsets, the best half, Jaccard among the subset alone, tokens
    with re-reading."""
    asked, records = make_records()
    orders = shared.orders(records, 3, 0)
    for draw in orders.tolist():
        assert all(sorted(order) == list(range(12)) for order in draw)
    assert orders[0].tolist() != orders[1].tolist()
    known = random_scores(4, 12, 0)
    known[:, :6] = 0.5  # ties go to the path that comes first in the subset

    def jaccard(subsets):
        return redundancy(subsets, 5)

    scorers = {"jaccard": jaccard, "known": known}
    points = scaling.against_tokens(asked, records, scorers, 5, 0.5, orders, {"known"})
    found = {(point["scorer"], point["paths"]): point for point in points}
    names = ("no pruning", "jaccard", "known")
    expected = [(name, N) for name in names for N in (2, 4, 8, 12)]
    assert sorted(found) == sorted(expected)

    for (name, N), point in found.items():
        cons = torch.zeros(4)
        tokens = 0
        for draw in orders.tolist():
            for i, (problem, record) in enumerate(zip(asked, records)):
                subset = draw[i][:N]

                def score(j):
                    if name == "known":
                        return known[i, j]
                    return -similarity(record, j, subset) if name == "jaccard" else 0

                keep = N if name == "no pruning" else N // 2
                chosen = sorted(subset, key=lambda j: -score(j))[:keep]
                cons[i] += direct_vote(problem, record, chosen) / 3
                for j in subset:
                    length = len(record["paths"][j])
                    tokens += length if j in chosen else min(length, 5)
                    tokens += min(length, 5) if name == "known" else 0
        assert point["cons"] == pytest.approx(cons.mean().item(), abs=1e-6)
        assert point["tokens"] == pytest.approx(tokens / 12, abs=0.051)
        _, low, high = interval(cons.tolist())
        assert [point["low"], point["high"]] == pytest.approx([low, high], abs=1e-6)


def test_figure_5_ends():
    """All kept: the plain mean and nothing saved; one kept: the highest scored path's outcome; else
    the best's mean."""
    asked, records = make_records()
    scores = random_scores(4, 12, 2)
    points = scaling.against_retention(asked, records, scores, 5)
    points = {point["kept"]: point for point in points}
    right = torch.tensor(column(records, "right")).double()
    assert list(points) == [1, 3, 6, 12]
    assert points[12]["saved"] == 0
    assert points[3]["retention"] == 0.25
    for keep, point in points.items():
        best = torch.tensor(scores).topk(keep).indices
        assert point["avg"] == pytest.approx(right.gather(1, best).mean().item())
        assert point["low"] <= point["avg"] <= point["high"]


@pytest.fixture
def scaling_flags(judged, tmp_path):
    """The flags of a small study; it writes to out/."""
    return (
        "--model", judged, "--stored", tmp_path / "paths", "--out", tmp_path / "out", "--n", 6,
        "--draws", 2, "--problems", 4)


def test_the_curves(scaling_flags, tmp_path, monkeypatch, run):
    """All four types, every N and checkpoint, as CSV; SVG if possible; again from the stored paths
    without sampling."""
    out = tmp_path / "out"
    outcome = run(scaling, *scaling_flags)
    assert outcome.status == 0, outcome.err
    figure4 = list(csv.DictReader((out / "figure4.csv").open()))
    figure5 = list(csv.DictReader((out / "figure5.csv").open()))
    scorers = {"no pruning", "Jaccard (I)", JUDGE, *CONFIDENCES, STOP}
    assert set(column(figure4, "scorer")) == scorers
    assert set(column(figure4, "paths")) == {"2", "4", "6"}
    assert set(column(figure5, "prefix")) == {"2", "4", "6", "8"}
    tokens = {}
    for row in figure4:
        if row["paths"] == "6":
            tokens[row["scorer"]] = float(row["tokens"])
    assert tokens[JUDGE] - 6 * 4 > tokens[STOP] - 12
    assert max(tokens.values()) <= 6 * 12 + 24
    if scaling.matplotlib:
        for name in ("figure4.svg", "figure5.svg"):
            assert "</svg>" in (out / name).read_text()
    else:
        assert "matplotlib is not installed" in "\n".join(outcome.out)
        assert not list(out.glob("*.svg"))

    monkeypatch.setattr(refill, "Batch", None)
    before = (out / "figure4.csv").read_bytes()
    assert run(scaling, *scaling_flags).status == 0
    assert (out / "figure4.csv").read_bytes() == before


@pytest.mark.parametrize("flag, value, message", (
    ("--retention", 0, "retention: found 0"),
    ("--retention", "nan", "retention: found nan"),
    ("--draws", 0, "draws: found 0"),
    ("--prefixes", "4,x", "prefixes: found '4,x'"),
    ("--prefix", 0, "prefix: found 0"),
    ("--window", 0, "window: found 0")))
def test_curves_that_cannot_be(scaling_flags, run, flag, value, message):
    check_refusal(run(scaling, *scaling_flags, flag, value), message)


def test_two_studies_do_not_sample_into_one_folder(scaling_flags, tmp_path, run):
    (tmp_path / "paths").mkdir()
    with shared.locked(tmp_path / "paths"):
        check_refusal(run(scaling, *scaling_flags), "another process is at work there")


# The guideline


def cells_of(a, b, c, d, noise=0.0, seed=0):
    """Cells whose best retention is that of a law written out: all combinations of a few lengths,
    in tokens."""
    rng = random.Random(seed)
    cells = []
    for task in (8650, 11950, 10000):
        for prefix in (512, 1024, 2560):
            for budget in (140e3, 200e3, 300e3):
                inverse = a * (budget / 1024) ** b * (prefix / 1024) ** c / (task / 1024) ** d
                gamma = math.exp(rng.gauss(0, noise)) / inverse
                cells.append({"task": task, "prefix": prefix, "budget": budget, "gamma": gamma})
    return cells


@pytest.mark.parametrize("law", ((1.17e4, 0.46, 0.40, 4.55), (0.9, -0.3, 1.7, 0.2)))
def test_the_fit_recovers_the_law(law):
    """Known coefficients come back, the paper's among them."""
    found = guideline.fit(cells_of(*law))
    coefficients = [found[key] for key in "abcd"]
    assert coefficients == pytest.approx(law, rel=1e-6)
    assert found["spread"] < 1e-6


def test_the_fit_is_the_least_squares_of_the_logs():
    """With noise: no coefficient can be moved to a smaller sum of squares."""
    noisy = cells_of(300.0, 0.5, 0.4, 2.0, 0.3)
    found = guideline.fit(noisy)

    def squares(law):
        total = 0.0
        for cell in noisy:
            gamma = guideline.recommend(law, cell["budget"], cell["prefix"], cell["task"])
            assert gamma < 0.95  # none is capped at 1
            total += (math.log(gamma) - math.log(cell["gamma"])) ** 2
        return total

    assert found["spread"] == pytest.approx(math.sqrt(squares(found) / 27), rel=1e-6)
    for key in "abcd":
        for factor in (0.99, 1.01):
            assert squares(found | {key: found[key] * factor}) > squares(found), key


def test_the_standard_errors_are_those_of_repeated_fits():
    """400 draws know a spread to 3.5%, and the mean squared error to 1.5%."""
    fits = [guideline.fit(cells_of(300.0, 0.5, 0.4, 2.0, 0.3, seed)) for seed in range(400)]
    errors = torch.tensor(column(fits, "errors"), dtype=torch.float64)  # (fits, 4)
    for i, key in enumerate("abcd"):
        values = column(fits, key)
        if key == "a":
            values = [math.log(value) for value in values]
        expected = statistics.stdev(values)
        mean_error = errors[:, i].square().mean().sqrt().item()
        assert mean_error == pytest.approx(expected, rel=0.16), key


def test_cells_that_determine_no_law():
    cells = cells_of(300.0, 0.5, 0.4, 2.0, 0.3)
    for key in ("budget", "prefix", "task"):
        with pytest.raises(ValueError, match=f"{key}: found 1 value"):
            guideline.fit([cell | {key: 1000} for cell in cells])
    with pytest.raises(ValueError, match="determine 3 coefficients"):
        guideline.fit([cell | {"prefix": cell["budget"] / 2} for cell in cells])


@pytest.mark.parametrize("budget, prefix, task, inverse", (
    (158 * 1024, 2048, 8650, 9.63), (275 * 1024, 3072, 11950, 3.36),
    (140 * 1024, 512, 8650, 5.23)))
def test_the_papers_law_is_the_one_that_stop_has(budget, prefix, task, inverse):
    """Both give the paper's worked values."""
    found = guideline.recommend(guideline.PAPER, budget, prefix, task)
    assert found == pytest.approx(retention(budget, prefix, task), rel=1e-12)
    assert 1 / found == pytest.approx(inverse, rel=0.01)


def test_what_a_budget_buys():
    """16 * 40 tokens to the checkpoint, 4 * 80 beyond it: 960 of 1,000."""
    assert guideline.afford(1000, 40, 120, 0.25) == (16, 4)


def test_the_sweep_directly():
    """Each cell's best retention by loops and the vote itself; cells that need more paths than are
    stored are left out."""
    asked, records = make_records(6, 16, seed=3)
    scores = {prefix: random_scores(6, 16, prefix) for prefix in (2, 5)}
    gammas = [0.5, 0.25, 0.125]
    budgets = [12, 30, 60, 90, 900]
    orders = shared.orders(records, 2, 0)
    cells, left_out = guideline.sweep(asked, records, scores, budgets, gammas, 2, orders)
    means = [sum(map(len, record["paths"])) / 16 for record in records]
    ranked = sorted(range(6), key=lambda i: means[i])

    def accuracy(members, prefix, N, kept):
        total = 0.0
        for draw in orders.tolist():
            for i in members:
                best = sorted(draw[i][:N], key=lambda j: -scores[prefix][i, j])[:kept]
                total += direct_vote(asked[i], records[i], best)
        return total / 6

    expected = []  # (task, prefix, budget, gamma, accuracy)
    for members in (ranked[:3], ranked[3:]):
        task = sum(means[i] for i in members) / 3
        for prefix in scores:
            for budget in budgets:
                worth = {}
                for gamma in gammas:
                    N = math.floor(budget / (prefix + gamma * (task - prefix)))
                    kept = round(gamma * N)
                    if kept >= 1:
                        worth[gamma] = None if N > 16 else accuracy(members, prefix, N, kept)
                if len(worth) > 1 and None not in worth.values():
                    top = max(worth.values())
                    best = max(gamma for gamma in worth if worth[gamma] > top - 1e-9)
                    expected.append((task, prefix, budget, best, top))
    assert 6 <= len(expected) < 20 - 5
    assert left_out == 20 - len(expected)
    assert len({gamma for _, _, _, gamma, _ in expected}) > 1
    for cell, (task, prefix, budget, gamma, top) in zip(cells, expected, strict=True):
        assert (cell["prefix"], cell["budget"], cell["gamma"]) == (prefix, budget, gamma)
        assert cell["task"] == pytest.approx(task)
        assert cell["accuracy"] == pytest.approx(top)


@pytest.fixture
def guideline_flags(folder, tmp_path):
    """The flags of a small study; it writes to out/."""
    return (
        "--model", folder, "--stored", tmp_path, "--out", tmp_path / "out", "--n", 12,
        "--groups", 2, "--draws", 2, "--prefixes", "2,3", "--retentions", "0.5,0.25,0.2",
        "--budgets", "30,36,40", "--temperature", 3.0, "--top-k", 0, "--top-p", 1.0)


def test_the_recommendation(guideline_flags, tmp_path, run):
    """From the command line to both recommendations."""
    at = ("--budget", 200 * 1024, "--prefix", 1024, "--task", 11950)
    outcome = run(guideline, *guideline_flags, *at)
    assert outcome.status == 0, outcome.err
    cells = list(csv.DictReader((tmp_path / "out" / "cells.csv").open()))
    assert outcome.last["gamma_paper"] == pytest.approx(1 / 1.87, rel=0.01)
    assert outcome.last["cells"] == len(cells)
    assert "\n| paper" in "\n".join(outcome.out)


@pytest.mark.parametrize("flag, value, message", (
    ("--retentions", "2", "retentions: found 2"),
    ("--retentions", "0.5,nan", "retentions: found '0.5,nan'"),
    ("--groups", 9, "groups: found 9"),
    ("--groups", 0, "groups: found 0"),
    ("--groups", 1, "task: found 1 value"),
    ("--budgets", "9000", "budgets: found none"),
    ("--task", 0, "task: found 0")))
def test_recommendations_that_cannot_be(guideline_flags, run, flag, value, message):
    check_refusal(run(guideline, *guideline_flags, flag, value), message)


# Overhead


def test_a_timed_run_does_the_work(judged):
    """The verified paths are generate's first tokens, the kept ones go on as generate would, the
    others stop; each type's scores are those of its own function."""
    model = load(judged)
    tokenizer = Tokenizer(judged)
    stop = Stop.load(judged / "stop", model)
    problem = read_problems(judged / "test.jsonl")[0]
    prompt = tokenizer.ask(problem)
    sampling = Sampling(temperature=1.0, top_k=0, top_p=1.0, seed=4)
    loose = dataclasses.asdict(sampling)
    (whole,) = generate(model, [prompt], 6, 11, **loose, eos_ids=())
    prefixes = [path.ids[:5] for path in whole]
    record = [{"prompt_ids": prompt, "paths": prefixes}]
    reader = (load(judged / "judge"), Tokenizer(judged / "judge"))
    expected = {
        STOP: stop.score(model, [prompt + ids for ids in prefixes]).tolist(),
        "Jaccard (I)": redundancy(record, 5),
        JUDGE: judge_scores(*reader, tokenizer, [problem], record, 5),
        "confidence (III)": confidence(model, record, 5)["mean log-probability (III)"]}

    work = overhead.Work(prompt, n=6, keep=2, prefix=5, limit=11, m=stop.m, sampling=sampling)
    functions = overhead.verifiers(model, stop, reader, tokenizer, problem, 5)
    assert set(functions) == {"no pruning", *expected}
    whole_run = overhead.run_once(model, work, functions.pop("no pruning"))
    assert whole_run.tokens == 66 and whole_run.verify == 0.0
    for name, verify in functions.items():
        seen = {}

        def watched(batch):
            seen["paths"] = list(batch.live)
            seen["ids"] = [list(path.ids) for path in batch.live]
            seen["scores"] = list(verify(batch))
            return seen["scores"]

        cost = overhead.run_once(model, work, watched)
        scores = seen["scores"]
        assert seen["ids"] == prefixes
        assert scores == pytest.approx(list(expected[name]), abs=1e-5)
        kept = sorted(range(6), key=lambda i: (-scores[i], i))[:2]
        for i, path in enumerate(seen["paths"]):
            assert path.ids == (whole[i].ids if i in kept else prefixes[i])
        assert cost.tokens == 6 * 5 + 2 * 6
        assert min(cost.launch, cost.verify, cost.resume) > 0
        assert cost.peak is None or cost.peak > 10 ** 7


def test_the_table_of_costs():
    """Shares, throughputs and changes of two types, by hand: medians, not means or bests."""
    plain = [
        overhead.Cost(2.0, 0, 6.0, 800, 5),
        overhead.Cost(2.0, 0, 6.0, 800, 7),
        overhead.Cost(9.0, 0, 1.0, 800, 6)]
    pruned = [
        overhead.Cost(2.0, 0.5, 1.5, 300, 8),
        overhead.Cost(2.0, 0.1, 0.9, 300, 8),
        overhead.Cost(2.0, 0.9, 0.0, 300, 9)]
    rows = overhead.summarise({"no pruning": plain, "it": pruned}, 10, 20)
    assert rows["it"] == {
        "launch_s": 2.0,
        "verify_s": 0.5,
        "verify_share": 0.25,
        "checkpoint_tok_per_s": 80.0,
        "tokens": 300,
        "whole_run_s": 3.0,
        "whole_run_tok_per_s": 100.0,
        "peak_bytes": 9,
        "throughput_change": pytest.approx(-0.2)}
    base = rows["no pruning"]
    assert base["checkpoint_tok_per_s"] == base["whole_run_tok_per_s"] == 100.0
    assert base["peak_bytes"] == 7
    assert base["verify_share"] == base["throughput_change"] == 0
    line = "| it | 2 | 0.5 | 25.00% | 80 | -20.00% | 3 | 300 | 100 | 0 |"
    assert line in overhead.table(rows)


@pytest.fixture
def overhead_flags(judged, tmp_path):
    """The flags of a small study; it writes to tmp_path."""
    return (
        "--model", judged, "--out", tmp_path, "--n", 6, "--rounds", 1, "--max-new-tokens", 8)


def test_the_costs(overhead_flags, tmp_path, run):
    """All types in one run, the machine and the versions."""
    outcome = run(overhead, *overhead_flags)
    assert outcome.status == 0, outcome.err
    about = json.loads((tmp_path / "overhead.json").read_text())
    names = ["no pruning", "Jaccard (I)", JUDGE, "confidence (III)", STOP]
    assert list(about["rows"]) == names
    assert about["rows"][STOP]["tokens"] == 6 * 4 + 1 * 4
    assert about["torch"] == torch.__version__
    assert about["machine"]


@pytest.mark.parametrize("flag, value, message", (
    ("--prefix", 8, "prefix: found 8, expected 1 to less than"),
    ("--keep", 7, "keep: found 7"),
    ("--keep", 0, "keep: found 0"),
    ("--rounds", 0, "rounds: found 0"),
    ("--threads", -1, "threads: found -1"),
    ("--judge", ROOT / "tests", "config.json")))
def test_costs_that_cannot_be(overhead_flags, run, flag, value, message):
    check_refusal(run(overhead, *overhead_flags, flag, value), message)
