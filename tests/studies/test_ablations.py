"""Variants of STOP that read other states, other loss or other prefixes: each beside a direct
computation."""
import json
import math
import re
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import ROOT, close, random_ids, random_model
from test_studies import check_refusal, folder, lively, run  # noqa: F401 (fixtures)

sys.path.insert(0, str(ROOT / "studies"))
import ablations
import shared
from commands import train as train_command
from engine.stored import model_digest
from model import load
from plumbing.statistics import interval
from plumbing.tokenizer import Tokenizer
from stop import Stop
from train import Example

# STEP's and SCATR's states


def test_the_ends_of_steps():
    """Of the path, not of the prompt; a path without one is read at its end."""
    assert ablations.Text([7, 1, 2, 7, 3, 7], 2).step_ends({7}) == [3, 5]
    assert ablations.Text([7, 1, 2, 7, 3, 7], 3).step_ends({7, 3}) == [3, 4, 5]
    assert ablations.Text([7, 1, 2], 1).step_ends({7}) == [2]


def test_where_a_path_begins():
    examples = [
        Example([1, 2, 3, 4, 5], 0.5, "p", 2),
        Example([1, 2, 3], 0.5, "p", None)]
    assert [text.begin for text in ablations.texts_of(examples)] == [3, 0]


def test_tokens_that_end_a_step(folder):
    tokenizer = Tokenizer(folder)
    marks = ablations.step_marks(tokenizer, 256)
    expected = {i for i in range(256) if "\n\n" in tokenizer.decode([i])}
    assert marks == expected
    toy = Tokenizer(ROOT / "toy")
    words = [toy.decode([i]) for i in ablations.step_marks(toy, 170)]
    assert words == ["<nl>"]


def test_states_of_every_text():
    """Behind the last layer but one: the final norm of it is what a model without the last layer
    gives. At the step ends: the whole pass of each text alone."""
    model = random_model("qwen2")
    texts = []
    for n in (9, 3, 14, 6, 3):
        texts.append(ablations.Text(random_ids(n, seed=n).tolist(), 1))
    marks = set(texts[0].ids[2:5])
    found = ablations.read_states(model, texts, marks, batch=2)
    with torch.no_grad():
        for text, states in zip(texts, found.steps):
            whole = model(torch.tensor([text.ids]))[0]
            close(states, whole[text.step_ends(marks)])
        last = model.model["layers"][-1]
        del model.model["layers"][-1]
        for text, state in zip(texts, found.penultimate):
            shorter = model(torch.tensor([text.ids]))[0, -1]
            close(model.model["norm"](state), shorter)
        model.model["layers"].append(last)
    assert len(found.steps[0]) >= 3


def test_chances_of_states():
    """STEP: the mean of the sigmoids of a path's steps; SCATR: one state's sigmoid."""
    head = torch.nn.Linear(2, 1)
    head.weight.data = torch.tensor([[1.0, -2.0]])
    head.bias.data = torch.tensor([0.5])
    states = ablations.States(
        torch.tensor([[1.0, 0.0], [0.0, 1.0]]),
        [torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 2.0]]), torch.tensor([[0.0, 0.0]])])

    def sigmoid(z):
        return 1 / (1 + math.exp(-z))

    step = ablations.state_chances("step", head, states).tolist()
    assert step == pytest.approx([(sigmoid(1.5) + 2 * sigmoid(-1.5)) / 3, sigmoid(0.5)])
    scatr = ablations.state_chances("scatr", head, states).tolist()
    assert scatr == pytest.approx([sigmoid(1.5), sigmoid(-1.5)])


# The set


@pytest.mark.parametrize("kind", ("sigmoid", "softmax"))
def test_a_set_head_begins_as_stop(kind):
    """Before training the set's score is STOP's own chance."""
    model = random_model("qwen2")
    stop = Stop(model, m=2, rank=2, head=kind).eval()
    with torch.no_grad():
        for name, parameter in stop.named_parameters():
            if "lora_B" in name or "head" in name:
                parameter.copy_(torch.randn(parameter.shape) * 0.3)
    prefixes = [random_ids(n, seed=n).tolist() for n in (9, 3, 14, 6)]

    def read(cache, hidden):
        return ablations.stop_states(stop, model, cache, hidden)

    states = torch.from_numpy(ablations.score(model, {"set": read}, prefixes, 2, batch=3)["set"])
    head = ablations.SetHead(stop, seed=0)
    close(ablations.set_chances(head, states, 2), stop.score(model, prefixes), 1e-5)


def test_a_set_head_sees_its_set_and_no_other():
    head = ablations.SetHead(lively(random_model("qwen2")), seed=0)
    torch.nn.init.normal_(head.attention.out_proj.weight)
    states = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    sets = torch.tensor([0, 1, 0, 1, 0])
    with torch.no_grad():
        whole = head(states, sets)
        changed = states.clone()
        changed[2] = -changed[2]
        moved = head(changed, sets)
    assert torch.equal(whole[[1, 3]], moved[[1, 3]])
    assert (whole[[0, 4]] - moved[[0, 4]]).abs().min() > 1e-4
    close(ablations.set_chances(head, states[sets == 0], 3), whole[sets == 0].sigmoid(), 1e-5)


def test_a_set_head_learns_what_only_the_set_tells():
    """Labels that hang on the set's mean: on held-out problems far below the loss of a head on one
    state alone."""
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(800, 8, generator=generator)
    means = states[:, 0].view(200, 4).mean(1, keepdim=True)
    labels = (8 * means).sigmoid().expand(200, 4).flatten()
    examples = []
    for i, label in enumerate(labels.tolist()):
        examples.append(Example([1], label, f"p{i // 4}", 3))
    settings = train_command.Settings(
        lr=0.02, batch_size=16, accumulation=1, epochs=60, validation=0.25, cosine=True,
        weight_decay=0.0)
    stop = Stop(random_model("qwen2", hidden_size=8, num_attention_heads=2, num_key_value_heads=1))
    head = ablations.fit_set_head(ablations.SetHead(stop, 0), states, examples, settings)
    alone = ablations.fit_head(torch.nn.Linear(8, 1), states, examples, settings)
    _, held = ablations.split_rows(examples, settings)
    with torch.no_grad():
        by_set = ablations.set_chances(head, states, 4)[held]
        by_one = alone(states)[:, 0].sigmoid()[held]
    entropy = F.binary_cross_entropy(labels[held], labels[held])
    excess = F.binary_cross_entropy(by_set, labels[held]) - entropy
    assert excess < 0.5 * (F.binary_cross_entropy(by_one, labels[held]) - entropy)


# The loss that ranks


def test_the_ranking_loss_by_loops():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(7, generator=generator)
    labels = torch.tensor([0.0, 0.5, 0.5, 1.0, 0.25, 0.75, 0.0])
    problems = ["a", "b", "a", "a", "b", "c", "b"]
    total = 0.0
    weights = 0.0
    for i in range(7):
        for j in range(7):
            if problems[i] == problems[j] and labels[i] > labels[j]:
                gap = float(labels[i] - labels[j])
                total += gap * math.log1p(math.exp(-float(logits[i] - logits[j])))
                weights += gap
    found = ablations.ranking_loss(logits, labels, problems)
    assert found.item() == pytest.approx(total / weights, rel=1e-5)


def test_without_pairs_the_ranking_loss_is_0():
    logits = torch.randn(3)
    assert ablations.ranking_loss(logits, torch.tensor([0.0, 1.0, 0.5]), ["a", "b", "c"]) == 0
    assert ablations.ranking_loss(logits, torch.tensor([0.5, 0.5, 0.5]), ["a", "a", "a"]) == 0


# The table


def test_intervals_over_seeds_too():
    """One seed: as over problems alone. Problems that are equal: the seeds' spread alone."""
    values = np.random.default_rng(0).random(400)
    plain = interval(values)
    found = ablations.interval_with_seeds([values])
    assert found.mean == plain.mean
    assert found.low == pytest.approx(plain.low, abs=0.004)
    assert found.high == pytest.approx(plain.high, abs=0.004)
    equal = ablations.interval_with_seeds(np.repeat([[0.1], [0.2], [0.3]], 50, axis=1))
    assert equal == pytest.approx((0.2, 0.1, 0.3))


def write_ceiling(file, model, **changes):
    """A file as studies/ceiling.py writes it for a model."""
    row = {"checkpoint": 4, "launched": 5, "kept": 2, "avg": 0.7} | changes
    content = {
        "model": model_digest(model), "rows": [{"checkpoint": 4, "random": [0.2, 0.1, 0.3]}],
        "ceilings": [row]}
    file.write_text(json.dumps(content))


def test_the_way_to_the_ceiling(tmp_path):
    """.2 to .7 on the ceiling's problems; on the study's, random has .3: .55 is half of the way."""
    file = tmp_path / "ceiling.json"
    model = random_model("qwen2")
    write_ceiling(file, model)
    records = [{"right": [True, False]}, {"right": [False, False]}, {"right": [True, True]}]
    records += [{"right": [False, False]}, {"right": [False, False]}]
    study = SimpleNamespace(
        model=model, records=records, checkpoint=4, settings=SimpleNamespace(n=5, keep=2))
    reach = ablations.read_reach(file, study)
    assert reach.share(0.55) == pytest.approx((0.55 - 0.3) / 0.5)
    write_ceiling(file, model, launched=6)
    message = "ceiling.json: ceilings: found none, expected one at 4 of"
    with pytest.raises(ValueError, match=message):
        ablations.read_reach(file, study)


def test_the_new_variants_as_typed(folder, tmp_path, monkeypatch, run):
    """All of them are trained, by two seeds, and not again; the ceiling stands in the table."""
    write_ceiling(tmp_path / "ceiling.json", load(folder))
    argv = (
        "--model", folder, "--labels", folder / "labels.jsonl", "--stored", tmp_path,
        "--out", tmp_path / "out", "--prefix", 4, "--max-new-tokens", 12, "--n", 5, "--keep", 2,
        "--rank", 2, "--m", 3, "--epochs", 2, "--lr", 0.05, "--batch-size", 4,
        "--accumulation", 1, "--validation", 0.3, "--head-epochs", 4, "--batch", 30,
        "--temperature", 2.0, "--top-k", 0, "--top-p", 1.0, "--seeds", "0,1",
        "--only", "scatr,step,ranking,set", "--ceiling", tmp_path / "ceiling.json")
    outcome = run(ablations, *argv)
    assert outcome.status == 0, outcome.err
    monkeypatch.setattr(ablations, "train_variant", None)
    again = run(ablations, *argv)
    assert again.status == 0, again.err
    names = ("default", "scatr", "step", "ranking", "set")
    rows = {line.split(" | ")[0].strip("| ") for line in again.out if line.startswith("|")}
    assert set(names) <= rows
    assert any("of the way to the ceiling" in line for line in again.out)
    scores = {}
    for name in names:
        for seed in (0, 1):
            content = (tmp_path / "out" / f"{name}-{seed}" / "scores").read_bytes()
            scores[content] = name
    assert len(scores) == 10  # no variant is another one
    (tmp_path / "ceiling.json").write_text("{}")
    check_refusal(run(ablations, *argv), "ceiling.json: model: found None")


BROKEN = {  # what is changed in a ceiling.json -> what the line says
    "another model": ({"model": "0" * 16}, "model: found '0000000000000000', expected '"),
    "a number": ({"ceilings": 5}, "ceilings: found 5, expected a list"),
    "none": ({"ceilings": []}, r"ceilings: found \[\], expected a list"),
    "no object": ({"ceilings": [[4, 5]]}, r"ceilings\[0\]: found \[4, 5\], expected a JSON object"),
    "a text": ({"checkpoint": "4"}, r"ceilings\[0\]: checkpoint: found '4', expected a positive"),
    "a fraction": ({"kept": 2.0}, r"ceilings\[0\]: kept: found 2.0, expected a positive integer"),
    "no count": ({"launched": None}, r"ceilings\[0\]: launched: found None, expected a positive"),
    "beyond 1": ({"avg": 17.0}, r"ceilings\[0\]: avg: found 17.0, expected a share"),
    "NaN": ({"avg": math.nan}, r"ceilings\[0\]: avg: found nan, expected a share"),
    "no rows": ({"rows": None}, "rows: found None, expected a list"),
    "random": ({"random": 0.2}, r"rows\[0\]: random: found 0.2, expected a mean"),
    "random below 0": ({"random": [-1, 0, 1]}, r"rows\[0\]: random: found -1, expected a share")}


@pytest.mark.parametrize("what", BROKEN)
def test_a_ceiling_that_is_broken_is_refused_by_name(tmp_path, what):
    changes, message = BROKEN[what]
    file = tmp_path / "ceiling.json"
    model = random_model("qwen2")
    write_ceiling(file, model)
    content = json.loads(file.read_text())
    for key, value in changes.items():
        place = content
        if key == "random":
            place = content["rows"][0]
        elif key not in content:
            place = content["ceilings"][0]
        place[key] = value
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=f"^{re.escape(str(file))}: {message}"):
        shared.read_ceilings(file, model)


# One STOP for several checkpoints


def trained_tokens(run, folder, labels, out, only):
    """The [STOP] tokens of variants trained on a file of labels at checkpoint 4, by name."""
    outcome = run(
        ablations, "--model", folder, "--labels", labels, "--stored", out, "--out", out / "out",
        "--prefix", "4,9", "--max-new-tokens", 12, "--n", 5, "--keep", 2, "--rank", 2, "--m", 3,
        "--epochs", 2, "--lr", 0.05, "--batch-size", 4, "--accumulation", 1, "--validation", 0.3,
        "--head-epochs", 2, "--temperature", 2.0, "--only", only)
    assert outcome.status == 0, outcome.err
    model = load(folder)
    tokens = {}
    for stop in (out / "out").glob("*/stop"):
        tokens[stop.parent.name] = Stop.load(stop, model).tokens
    return tokens


def test_only_every_sees_the_labels_of_other_checkpoints(folder, tmp_path, run):
    """Trained on a file with labels at 4 and 9: the same as on a file with those at 4 alone; but
    `every` is what the default is on a file whose labels name no checkpoint."""
    files = {name: tmp_path / name for name in ("mixed", "alone", "nameless", "late")}
    lines = {name: [] for name in files}
    for i, line in enumerate((folder / "labels.jsonl").read_text().splitlines()):
        record = json.loads(line)
        checkpoint = 9 if i % 3 == 0 else 4
        marked = json.dumps(record | {"checkpoint": checkpoint}) + "\n"
        lines["nameless"].append(line + "\n")
        lines["mixed"].append(marked)
        lines["late" if checkpoint == 9 else "alone"].append(marked)
    for name, file in files.items():
        file.write_text("".join(lines[name]))

    found = {}
    for name, only in (("mixed", "every,probe,step,set"), ("alone", "probe,step"),
                       ("nameless", "probe")):
        found[name] = trained_tokens(run, folder, files[name], tmp_path / f"by-{name}", only)
    assert torch.equal(found["mixed"]["default-0"], found["alone"]["default-0"])
    assert torch.equal(found["mixed"]["every-0"], found["nameless"]["default-0"])
    assert not torch.equal(found["mixed"]["every-0"], found["mixed"]["default-0"])
    for head in ("probe-0", "step-0"):
        scores = []
        for name in ("mixed", "alone"):
            content = (tmp_path / f"by-{name}" / "out" / head / "scores").read_bytes()
            scores.append(content[-5 * 6 * 4:])  # float32, 5 paths of 6 problems
        assert scores[0] == scores[1]
    outcome = run(ablations, "--model", folder, "--labels", files["late"], "--stored", tmp_path,
                  "--prefix", 4, "--max-new-tokens", 12, "--n", 5, "--keep", 2, "--only", "probe")
    check_refusal(outcome, "late: checkpoint: found no record of 4, expected some")
