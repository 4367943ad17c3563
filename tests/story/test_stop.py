"""The STOP module and the loop: the authors' numbers, what a check does, cascades and branches by
hand, votes, the guideline, saved modules, and the script."""
import copy
import json
import math
import shutil

import pytest
import torch
from helpers import (
    GOLDEN, KINDS, REAL, ROOT, Told, call_script, close, meta_model, random_model,
    random_prompt, random_stop, raw_config, write_checkpoint, write_tokenizer)
from safetensors.torch import load_file

import sample
from baselines import CONFIDENCES, confidence
from commands import questions
from commands import stop as stop_command
from engine import launch
from lora import LoRA
from model import load
from plumbing.problems import read_problems
from plumbing.tokenizer import Tokenizer
from sample import generate, prefill
from stop import Stop, Watcher, decide, launch_check_resume, retention, solve, vote

SCORERS = sorted(folder.name for folder in (GOLDEN / "scorers").iterdir())
SAMPLING = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "seed": 5}
PROMPT = random_prompt(9)
EARLY = tuple(range(3, 61, 7))  # end tokens that most paths soon meet


@pytest.fixture(scope="module", params=KINDS)
def pair(request):
    model = random_model(request.param)
    return model, random_stop(model)


# ----------------------------------------------------------------------------- the authors' numbers


class Release:
    """A golden scorer of the authors' code: its folder, its base model and what is expected."""

    def __init__(self, name):
        folder = GOLDEN / "scorers" / name
        self.folder = folder / "checkpoint"
        self.info = json.loads((folder / "expected.json").read_text())
        self.tensors = load_file(folder / "expected.safetensors")
        self.model = load(GOLDEN / self.info["base_checkpoint"])
        self.stop = Stop.load(self.folder, self.model)
        self.prefixes = []
        masks = self.tensors["prefix_attention_mask"].bool()
        for ids, mask in zip(self.tensors["prefix_ids"], masks):
            self.prefixes.append(ids[mask].tolist())
        self.labels = self.tensors["labels"][:, 1]


@pytest.fixture(params=SCORERS)
def release(request):
    return Release(request.param)


def parameter_name(key):
    """Ours for a parameter of the authors' modules."""
    names = {
        "assess_token_embedding": "tokens",
        "classifier_head.weight": "head.weight",
        "classifier_head.bias": "head.bias"}
    if key in names:
        return names[key]
    linear = key.replace("lora/", "").removeprefix("base_model.model.")
    return "lora." + linear.replace(".classifier.", ".")


def test_the_authors_scores(release):
    """LoRA on the prefix, wrong positions, a missing scale: all show."""
    found = release.stop.score(release.model, release.prefixes)
    close(found, release.tensors["prob"], 1e-5)


def test_the_authors_loss_and_every_gradient(release):
    stop = release.stop
    cache, _ = prefill(release.model, release.prefixes, stop.m)
    loss = stop.loss(stop(release.model, cache), release.labels)
    close(loss.detach()[None], release.tensors["loss"], 1e-5)
    loss.backward()
    own = dict(stop.named_parameters())
    expected = {}
    for key, gradient in release.tensors.items():
        if key.startswith("grad/"):
            expected[parameter_name(key.removeprefix("grad/"))] = gradient
    assert expected.keys() == own.keys()
    for name, gradient in expected.items():
        found = own[name].grad.reshape(gradient.shape)
        assert (found - gradient).abs().max() <= 1e-4 * gradient.abs().max(), name


def test_five_steps_of_the_authors_training(release):
    stop = release.stop
    optimizer = torch.optim.AdamW(stop.parameters(), lr=1e-3, weight_decay=0.01)
    cache, _ = prefill(release.model, release.prefixes, stop.m)
    losses = []
    for step in range(6):
        logits = stop(release.model, cache)
        loss = stop.loss(logits, release.labels)
        losses.append(loss.item())
        if step < 5:
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    close(torch.tensor(losses), release.tensors["train.losses"], 1e-5)
    close(logits.detach(), release.tensors["train.final_logits"], 5e-5)


@pytest.mark.parametrize("name, rank, count", (
    ("R1-Distill-Qwen-1.5B", 128, 147_718_144),
    ("R1-Distill-Qwen-7B", 256, 645_922_816),
    ("R1-0528-Qwen3-8B", 256, 698_351_616),
    ("gpt-oss-20b", 2048, 1_019_215_872)))
def test_lora_sizes_of_the_paper(name, rank, count):
    """All linears that a LoRA can reach, and no other: the counts of the paper's Table 6."""
    model = meta_model(REAL[name])
    with torch.device("meta"):
        stop = Stop(model, rank=rank)
    assert sum(parameter.numel() for parameter in stop.lora.parameters()) == count


# ---------------------------------------------------------------------------------------- one check


def test_scores_do_not_depend_on_batch_or_order(pair):
    model, stop = pair
    prefixes = [random_prompt(length) for length in (3, 40, 17, 25, 8)]
    alone = torch.cat([stop.score(model, [prefix]) for prefix in prefixes])
    close(stop.score(model, prefixes, batch=2), alone, 1e-5)
    close(stop.score(model, prefixes[::-1]), alone.flip(0), 1e-5)


def test_no_prefix_has_no_score(pair):
    model, stop = pair
    assert stop.score(model, []).shape == (0,)


@pytest.mark.parametrize("head", ("sigmoid", "softmax"))
def test_the_chance_and_the_loss_by_hand(head):
    model = random_model("qwen2")
    stop = Stop(model, rank=2, head=head)
    logits = torch.tensor([[-1.0, 2.0], [0.5, -0.5], [3.0, 3.0]])
    labels = torch.tensor([0.0, 0.25, 1.0])
    if head == "sigmoid":
        logits = logits[:, :1]
        margins = [-1.0, 0.5, 3.0]
    else:
        margins = [3.0, -1.0, 0.0]
    chances = [1 / (1 + math.exp(-margin)) for margin in margins]
    losses = []
    for chance, label in zip(chances, labels.tolist()):
        losses.append(-label * math.log(chance) - (1 - label) * math.log(1 - chance))
    close(stop.chance(logits), torch.tensor(chances), 1e-6)
    assert stop.loss(logits, labels).item() == pytest.approx(sum(losses) / 3, rel=1e-5)


def test_an_untrained_stop_gives_every_path_one_half(pair):
    model, _ = pair
    scores = Stop(model, rank=2).score(model, [random_prompt(9), random_prompt(20)])
    assert scores.tolist() == [0.5, 0.5]


def test_a_score_that_is_no_number_stops_the_run(pair):
    """In one line, and before a path is pruned by it."""
    model, stop = pair
    broken = copy.deepcopy(stop)
    with torch.no_grad():
        broken.head.bias[0] = math.nan
    message = "^STOP's score: found NaN or infinity, expected finite numbers"
    with pytest.raises(ValueError, match=message) as caught:
        broken.score(model, [PROMPT])
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=message):
        launch_check_resume(model, broken, PROMPT, 4, 2, 5, max_new_tokens=9, **SAMPLING)


# ------------------------------------------------------------------------- Launch, Check and Resume


class Batches(Watcher):
    """The Batches that a run makes (`make`), and what is told of its checks."""

    def __init__(self):
        self.made = []
        self.told = []
        self.sizes = []  # of the cache behind each check: rows, rows of buffers, paths, capacity

    def make(self, *args):
        """A Batch that notes its size as it resumes."""
        batches = self

        class Noted(sample.Batch):
            def resume(self, copies, capacity):
                new_paths = super().resume(copies, capacity)
                cache = self.cache
                size = (cache.rows, len(cache.keys[0]), len(self.live), cache.capacity)
                batches.sizes.append(size)
                return new_paths

        self.made.append(Noted(*args))
        return self.made[-1]

    def checked(self, stage, checked, kept):
        running = [path for path in kept if path.status == "running"]
        assert {id(path) for path in self.made[0].live} == {id(path) for path in running}
        self.told.append((stage.checkpoint, len(checked), [path.index for path in kept]))


@pytest.fixture
def batches():
    return Batches()


def best_of(scores, count):
    """The indices of the highest scores, the best first; of equal ones the lower index."""
    return sorted(scores, key=lambda index: (-scores[index], index))[:count]


def test_exactly_the_best_finish(pair, batches):
    """The pruned are cut where they were checked; work is as counted; the others' memory is
    freed."""
    model, stop = pair
    eos = (3, 11)
    (whole,) = generate(model, [PROMPT], 8, 40, eos_ids=eos, **SAMPLING)
    paths = launch_check_resume(
        model, stop, PROMPT, 8, 3, 10, max_new_tokens=40, eos_ids=eos, new_batch=batches.make,
        **SAMPLING)
    scores = stop.score(model, [PROMPT + path.ids[:10] for path in whole]).tolist()
    kept = best_of(dict(enumerate(scores)), 3)
    for index, (path, full) in enumerate(zip(paths, whole, strict=True)):
        assert path.index == index
        assert path.score == pytest.approx(scores[index], abs=1e-4)
        if index in kept:
            assert path.status == full.status
            assert path.ids == full.ids
        else:
            assert path.status == "pruned"
            assert path.ids == full.ids[:10]
    running = sum(len(whole[index].ids) > 10 for index in kept)
    assert batches.sizes == [(running, running, running, 9 + 40 + 3)]
    assert batches.made[0].decoded == sum(len(path.ids) for path in paths)


class MeanLogProbability:
    """A signal of type III, from passes over whole paths."""

    def __init__(self, model):
        self.model = model

    def of_live(self, batch):
        return self.of_ended(batch.live, batch)

    def of_ended(self, paths, batch):
        scores = []
        for path in paths:
            ids = torch.tensor([path.prompt_ids + path.ids])
            chances = self.model.logits(self.model(ids)).log_softmax(-1)[0, :-1]
            drawn = chances.gather(-1, ids[0, 1:, None])[len(path.prompt_ids) - 1:]
            scores.append(drawn.mean())
        return torch.stack(scores)


def test_another_signal_ranks_the_paths(pair, batches):
    """The kept ones are those that type III's own function puts first; ended paths are among
    them, and votes have equal weights."""
    model, stop = pair
    (whole,) = generate(model, [PROMPT], 8, 40, eos_ids=EARLY, **SAMPLING)
    assert any(len(path.ids) < 6 for path in whole)
    record = {"prompt_ids": PROMPT, "paths": [path.ids for path in whole]}
    scores = confidence(model, [record], 6, 1)[CONFIDENCES[0]]
    paths = launch_check_resume(
        model, stop, PROMPT, 8, 3, 6, max_new_tokens=40, eos_ids=EARLY, new_batch=batches.make,
        signal=MeanLogProbability(model), **SAMPLING)
    close(torch.tensor([path.score for path in paths]), torch.tensor(scores).float(), 1e-4)
    kept = {path.index for path in paths if path.status != "pruned"}
    assert kept == set(best_of(dict(enumerate(scores.tolist())), 3))
    for path in paths:
        if path.index in kept:
            assert path.ids == whole[path.index].ids


def test_scores_below_zero_weigh_no_votes():
    assert decide(["7", "8", "8"], [0.9, 0.3, 0.3]) == "7"
    assert decide(["7", "8", "8"], [-0.1, -0.9, -0.9]) == "8"
    assert decide(["7", "8", "8"], [0.9, 0.3, -0.3]) == "8"
    assert decide(["7", "8", "8"], [0.9, None, 0.3]) == "8"
    assert decide(["7", "8", "8"]) == "8"


def test_an_answer_is_the_vote_of_the_paths_that_went_on():
    """On the toy: as the script's own way answers."""
    model = load(ROOT / "toy")
    tokenizer = Tokenizer(ROOT / "toy")
    stop = Stop.load(ROOT / "toy" / "stop", model)
    settings = stop_command.Settings(device="cpu", dtype="float32")
    answers = set()
    for problem in read_problems(ROOT / "toy" / "test.jsonl")[:4]:
        prompt = tokenizer.ask(problem)
        answered = questions.answer_question(
            model, stop, tokenizer, prompt, "math", 8, [(40, 3, 1)], 110, settings)
        answers.add(answered.answer)
        assert answered.answer == solve(
            model, stop, tokenizer, prompt, n=8, keep=3, prefix=40, max_new_tokens=110)
    assert len(answers) > 1


@pytest.mark.parametrize("number", (2, 3))
def test_equal_prefixes_have_equal_scores(number):
    """On the toy many prefixes are equal; with 41 rows those at the end of the batch round
    differently, and without care the last would win the tie."""
    model = load(ROOT / "toy")
    stop = Stop.load(ROOT / "toy" / "stop", model)
    problem = read_problems(ROOT / "toy" / "test.jsonl")[number]
    seen = []

    def check(checkpoint, checked, kept):
        for path in checked:
            seen.append((tuple(path.ids), path.score, path.index, path in kept))

    prompt = Tokenizer(ROOT / "toy").ask(problem)
    launch_check_resume(model, stop, prompt, 41, 6, 24, max_new_tokens=26,
                        watcher=Told(check))
    prefixes = {ids for ids, *_ in seen}
    assert len(prefixes) < 20
    for ids in prefixes:
        alike = [(score, index, kept) for other, score, index, kept in seen if other == ids]
        assert len({score for score, _, _ in alike}) == 1
        kept = [index for _, index, kept in alike if kept]
        assert kept == sorted(index for _, index, _ in alike)[:len(kept)]
    again = stop.score(model, [prompt + list(ids) for ids, *_ in seen], batch=7).tolist()
    for score, (_, expected, _, _) in zip(again, seen, strict=True):
        assert score == pytest.approx(expected, abs=1e-5)
    assert len(set(again)) <= len(prefixes)


def test_equal_scores_go_to_the_lower_index(pair):
    """A fresh head is zero: all scores are one half."""
    model, _ = pair
    paths = launch_check_resume(
        model, Stop(model, rank=2), PROMPT, 6, 2, 5, max_new_tokens=9, eos_ids=(), **SAMPLING)
    assert {path.score for path in paths} == {0.5}
    assert [path.status for path in paths] == ["length"] * 2 + ["pruned"] * 4


STAGES = [(4, 9), (10, 5), (20, 2)]


@pytest.mark.parametrize("eos", ((), EARLY), ids=("no ends", "early ends"))
def test_a_cascade_by_hand(pair, batches, eos):
    """Stage by stage from whole paths and `score`. Catches pruned paths that come back, ended
    ones that are scored again at the next checkpoint or cut, a stage that ranks all n, a cache
    that keeps pruned rows, tokens that are not counted."""
    model, stop = pair
    (whole,) = generate(model, [PROMPT], 12, 40, eos_ids=eos, **SAMPLING)
    if eos:
        assert min(len(path.ids) for path in whole) <= 4
        assert any(4 < len(path.ids) <= 20 for path in whole)
    paths = launch_check_resume(
        model, stop, PROMPT, 12, stages=STAGES, max_new_tokens=40, eos_ids=eos, watcher=batches,
        new_batch=batches.make, **SAMPLING)

    alive = list(range(12))
    scores = {}
    cut = {}  # index of a pruned path -> its length
    for (checkpoint, keep), said in zip(STAGES, batches.told, strict=True):
        prefixes = [PROMPT + whole[i].ids[:checkpoint] for i in alive]
        found = dict(zip(alive, stop.score(model, prefixes).tolist()))
        scores |= found
        kept = best_of(found, keep)
        for index in set(alive) - set(kept):
            cut[index] = min(checkpoint, len(whole[index].ids))
        alive = kept
        assert said == (checkpoint, len(found), kept)
    for index, (path, full) in enumerate(zip(paths, whole, strict=True)):
        assert path.ids == full.ids[:cut.get(index)]
        assert path.status == ("pruned" if index in cut else full.status)
        assert path.score == pytest.approx(scores[index], abs=1e-4)
    assert sum(path.status != "pruned" for path in paths) == 2
    for rows, buffers, paths_live, _ in batches.sizes:
        assert not paths_live or rows == buffers == paths_live
    assert batches.made[0].decoded == sum(len(path.ids) for path in paths)


class Bar:
    """What tqdm would be told."""

    def __init__(self, total):
        self.total = total
        self.n = 0

    def update(self, count):
        self.n += count


@pytest.mark.parametrize("branch", (1, 2))
@pytest.mark.parametrize("eos", ((), EARLY), ids=("no ends", "early ends"))
def test_the_bar_ends_full(pair, eos, branch):
    """After pruning, early ends and branches the total is what was really decoded: else rate and
    time left are wrong all along."""
    bar = Bar(12 * 40)
    paths = launch.launch_check_resume(
        *pair, PROMPT, 12, stages=[(4, 9), (10, 5, branch)], max_new_tokens=40, eos_ids=eos,
        bar=bar, **SAMPLING)
    spent = sum(len(path.ids) - path.inherited for path in paths)
    assert bar.n == spent
    assert bar.total == spent


def test_paths_that_have_all_ended(pair):
    """Nothing is left to check or decode; the best of them still win."""
    model, stop = pair
    paths = launch_check_resume(
        model, stop, PROMPT, 5, stages=[(3, 4), (6, 2)], max_new_tokens=9, eos_ids=range(61),
        **SAMPLING)
    scores = stop.score(model, [PROMPT + path.ids for path in paths]).tolist()
    best = best_of(dict(enumerate(scores)), 2)
    for index, path in enumerate(paths):
        assert path.status == ("eos" if index in best else "pruned")


@pytest.mark.parametrize("settings, message", (
    ({"keep": 9}, "keep: found 9, expected 1 to 8"),
    ({"keep": 0}, "keep: found 0"),
    ({"prefix": 20}, "prefix: found 20, expected 1 to 19"),
    ({"prefix": 0}, "prefix: found 0"),
    ({"stages": [(5, 4), (5, 2)]}, "prefix: found 5, expected 6 to 19"),
    ({"stages": [(5, 4), (9, 6)]}, "keep: found 6, expected 1 to 4"),
    ({"stages": [(5, 4, 0)]}, "branch: found 0"),
    ({"max_new_tokens": 600}, "context of 512"),
    ({"temperature": -1}, "temperature: found -1"),
    ({"top_p": 0}, "top-p: found 0")))
def test_a_run_that_cannot_be(pair, settings, message):
    model, stop = pair
    usual = {"n": 8, "keep": 2, "prefix": 5, "max_new_tokens": 20}
    with pytest.raises(ValueError, match=message) as caught:
        launch_check_resume(model, stop, PROMPT, **usual | settings)
    assert "\n" not in str(caught.value)


# ----------------------------------------------------------------------------- votes, the guideline


def test_votes():
    """Equal answers vote together under the first of them; a tie goes to the first; None never
    votes; weights count."""
    assert vote(["2", "1/2", "0.5", None, None, None]) == "1/2"
    assert vote(["7", "8", "8", "7"]) == "7"
    assert vote(["7", "8", "8"], [0.9, 0.3, 0.3]) == "7"
    assert vote(["7", "8", "8"], [0.5, 0.3, 0.3]) == "8"
    assert vote(["b", "(B)", "C"], kind="choice") == "b"
    assert vote([None, None]) is None
    assert vote([]) is None


@pytest.mark.parametrize("inverse, budget, prefix, task", (
    ("9.63", 158, 2048, 8650), ("3.36", 275, 3072, 11950), ("5.23", 140, 512, 8650),
    ("8.13", 200, 1024, 8650), ("14.13", 300, 2560, 8650), ("1.87", 200, 1024, 11950),
    ("3.39", 400, 2048, 11950), ("5.90", 600, 5120, 11950)))
def test_the_guideline(inverse, budget, prefix, task):
    """The worked values and table cells of the paper, to the printed digits."""
    assert f"{1 / retention(budget * 1024, prefix, task):.2f}" == inverse


def test_the_guideline_keeps_at_most_all():
    assert retention(10, 10, 100_000) == 1.0


@pytest.mark.parametrize("name", ("budget", "prefix", "task"))
def test_the_guideline_needs_positive_lengths(name):
    with pytest.raises(ValueError, match=f"{name}: found 0, expected a positive number"):
        retention(**{"budget": 9, "prefix": 2048, "task": 8650} | {name: 0})


# -------------------------------------------------------------------------------- saved and loaded


@pytest.mark.parametrize("settings", (
    {}, {"shared": True, "head": "softmax", "targets": ["q_proj", "v_proj"], "alpha": 7}), ids=str)
def test_a_stop_is_loaded_as_it_was_saved(pair, tmp_path, settings):
    model, _ = pair
    stop = random_stop(model, **settings)
    stop.save(tmp_path, {"settings": {"prefix": 7}})
    again = Stop.load(tmp_path, model)
    prefixes = [random_prompt(12)]
    assert torch.equal(again.score(model, prefixes), stop.score(model, prefixes))
    assert again.trained == {"settings": {"prefix": 7}}
    assert again.about() == stop.about()
    names = set(load_file(tmp_path / "stop.safetensors"))
    linear = "model.layers.0.self_attn.q_proj"
    assert {"tokens", "head.weight", "head.bias", f"{linear}.lora_A.weight"} <= names


def test_what_was_trained_is_kept(pair, tmp_path):
    """Loaded and saved again without new settings, the old ones stay."""
    model, stop = pair
    stop.save(tmp_path / "a", {"settings": {"prefix": 7}})
    Stop.load(tmp_path / "a", model).save(tmp_path / "b")
    assert Stop.load(tmp_path / "b", model).trained == {"settings": {"prefix": 7}}


def test_another_base_model_is_refused(tmp_path):
    """Same shapes, another rope: the scores would be nonsense; told by the fingerprint."""
    random_stop(random_model("qwen2")).save(tmp_path)
    message = "base_fingerprint: found '[0-9a-f]+', expected '[0-9a-f]+'"
    with pytest.raises(ValueError, match=message):
        Stop.load(tmp_path, random_model("qwen2", rope_theta=5000.0))


def test_a_release_for_another_model_is_refused():
    """Of other widths: by the tensor's name."""
    with pytest.raises(ValueError, match="found shape .*, expected"):
        Stop.load(GOLDEN / "scorers" / SCORERS[0] / "checkpoint", random_model("qwen3"))


def test_dropout_is_for_training_only(tmp_path):
    """A released dropout is kept for more training, and a score does not draw from it."""
    release = Release(SCORERS[0])
    folder = tmp_path / "it"
    shutil.copytree(release.folder, folder, copy_function=shutil.copyfile)
    file = folder / "adapter" / "classifier" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"lora_dropout": 0.5}))
    stop = Stop.load(folder, release.model)
    assert stop.lora.dropout == 0.5
    found = stop.score(release.model, [[5, 6, 7]])
    assert torch.equal(found, release.stop.score(release.model, [[5, 6, 7]]))


def test_a_lora_joins_the_linears_that_are_there():
    model = random_model("gpt_oss")
    assert LoRA(model, 2, 4, ("q_proj", "o_proj")).targets == ("q_proj", "o_proj")
    assert Stop(model, rank=2).lora.targets == ("q_proj", "k_proj", "v_proj", "o_proj")
    with pytest.raises(ValueError, match="targets: found 'gate_proj', expected some of .* q_proj"):
        Stop(model, rank=2, targets=["q_proj", "gate_proj"])


# -------------------------------------------------------------------------------------- the script


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A checkpoint's folder with a tokenizer and a STOP."""
    folder = tmp_path_factory.mktemp("stop") / "it"
    write_checkpoint(folder, raw_config("qwen2", vocab_size=300))
    write_tokenizer(folder)
    random_stop(load(folder)).save(folder / "stop", {"settings": {"prefix": 4}})
    return folder


def words_for(folder, *more):
    return ["--model", folder, "--prompt", "hi", "--n", 6, "--prefix", 4, "--max-new-tokens", 9,
            "--device", "cpu", "--dtype", "float32", *more]


@pytest.mark.parametrize("more, kept", (
    ((), 1), (("--keep", 2), 2), (("--retention", 0.5), 3), (("--cascade", "2:4,4:2"), 2)))
def test_the_script_keeps_what_it_is_told(checkpoint, monkeypatch, capsys, more, kept):
    """From a checkpoint's folder to a JSON line."""
    words = words_for(checkpoint, *more)
    if "--cascade" in more:  # which says the checkpoint itself
        at = words.index("--prefix")
        del words[at:at + 2]
    status, out, _ = call_script(monkeypatch, capsys, stop_command, *words)
    last = json.loads(out.splitlines()[-1])
    assert status == 0
    assert last["kept"] == kept
    assert last["n"] == 6


def test_the_guideline_chooses_for_a_budget(checkpoint, monkeypatch, capsys):
    """Where STOP's folder has no plan for it."""
    words = words_for(checkpoint, "--budget", 9000, "--task-length", 3000)
    status, out, _ = call_script(monkeypatch, capsys, stop_command, *words)
    share = retention(9000, 4, 3000)
    last = json.loads(out.splitlines()[-1])
    assert status == 0
    assert f"guideline: keep {share:.2g} of 6 paths" in out
    assert last["kept"] == max(1, round(6 * share))


def test_a_stop_that_is_not_there_is_one_line(tmp_path, monkeypatch, capsys):
    folder = write_checkpoint(tmp_path / "it", raw_config("qwen2", vocab_size=300))
    write_tokenizer(folder)
    status, _, err = call_script(monkeypatch, capsys, stop_command, *words_for(folder))
    assert status == 2
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert "stop.json" in err


def test_what_the_script_says(checkpoint, monkeypatch, capsys):
    """Tokens are those of all paths, the saving is against the kept ones' mean, the votes are those
    of the kept alone: path i answers whether it is 2 or 3, and its score is the larger the higher
    i."""
    status = ["eos", "pruned", "eos", "eos", "pruned", "length"]
    lengths = [10, 4, 20, 30, 4, 40]
    scores = [0.1, 0.9, 0.2, 0.25, 0.05, 0.15]

    def known(model, stop, prompt_ids, n, stages, **_):
        assert (n, stages) == (6, [(4, 1, 1)])
        paths = []
        for i in range(6):
            paths.append(sample.Path(prompt_ids, i, [i] * lengths[i], status[i], scores[i]))
        return paths

    monkeypatch.setattr(questions, "launch_check_resume", known)
    monkeypatch.setattr(
        Tokenizer, "completion", lambda self, ids: "\\boxed{%d}" % (ids[0] in (2, 3)))
    _, out, _ = call_script(monkeypatch, capsys, stop_command, *words_for(checkpoint))
    last = json.loads(out.splitlines()[-1])
    assert last["majority"] == "0"
    assert last["weighted"] == "1"
    assert last["kept"] == 4
    assert last["tokens"] == 108
    assert "108 tokens in " in out and "about 28% less than 6 paths as long as the kept ones" in out
    assert "answer: 1 (score-weighted vote: 0.45 of 0.70; majority: 0, 2 of 4 votes)\n" in out
    assert last["tokens_saved_estimate"] == pytest.approx(1 - 108 / (6 * 25), abs=1e-4)


@pytest.mark.parametrize("words, message", (
    (["--prompt", "hi", "--score", "x.jsonl"], "found --prompt --score, expected --prompt, or"),
    ([], "found none, expected --prompt, or --data and --out, or --score"),
    (["--prompt", "hi", "--out", "x"], "found --prompt --out, expected"),
    (["--prompt", "hi", "--keep", "0"], "keep: found 0, expected more than 0"),
    (["--prompt", "hi", "--retention", "1.5"], "retention: found 1.5, expected a share in"),
    (["--prompt", "hi", "--cascade", "2048"], "cascade: found '2048', expected checkpoint:keep"),
    (["--prompt", "hi", "--cascade", "a:b"], "cascade: found 'a:b'"),
    (["--prompt", "hi", "--cascade", "1:2,"], "cascade: found '1:2,'"),
    (["--prompt", "hi", "--keep", "99"], "keep: found 99, expected 1 to 64"),
    (["--prompt", "hi", "--kind", "essay"], "kind: found 'essay', expected math, choice"),
    (["--score", "none.jsonl"], "none.jsonl")))
def test_a_users_mistake_is_one_line(checkpoint, monkeypatch, capsys, words, message):
    words = ["--model", checkpoint, "--device", "cpu", "--dtype", "float32", *words]
    status, _, err = call_script(monkeypatch, capsys, stop_command, *words)
    assert status == 2
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert message in err
