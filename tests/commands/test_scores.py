"""plumbing/scores.py and `python stop.py --score`: a score a record, printed or in a file that is
taken up where it stopped, and traces of the [STOP] positions' states."""
import json

import pytest
import torch
from helpers import (
    Fuse, Killed, call_script, close, random_ids, random_prompt, random_stop, raw_config,
    read_lines, write_checkpoint, write_lines, write_tokenizer)
from safetensors.torch import load_file

from commands import stop as room
from model import load
from plumbing import scores
from plumbing.labels import LABEL_KEYS, read_prefixes
from plumbing.records import Job, locked
from plumbing.scores import summary

LENGTHS = (12, 3, 30, 7, 19, 3, 25)


class Checkpoint:
    """A folder with a model and its STOP, and prefixes to score, some with labels."""

    def __init__(self, folder):
        self.folder = folder / "it"
        write_checkpoint(self.folder, raw_config("qwen2", vocab_size=300))
        write_tokenizer(self.folder)
        self.model = load(self.folder)
        self.stop = random_stop(self.model)
        self.stop.save(self.folder / "stop")
        self.prefixes = [random_prompt(n, seed=i, vocab=300) for i, n in enumerate(LENGTHS)]
        records = [{"prefix_token_ids": ids, "id": i} for i, ids in enumerate(self.prefixes)]
        records[1]["soft_label"] = 0.75
        records[4]["soft_label"] = 0.0
        del records[5]["id"]
        self.file = write_lines(folder / "prefixes.jsonl", records)

    def words(self, *more):
        return ["--model", self.folder, "--score", self.file, "--device", "cpu", *more]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return Checkpoint(tmp_path_factory.mktemp("scores"))


@pytest.fixture
def script(checkpoint, monkeypatch, capsys):
    """A function that runs `stop.py --score` with more words -> (status, stdout, stderr)."""
    return lambda *more: call_script(monkeypatch, capsys, room, *checkpoint.words(*more))


# ------------------------------------------------------------------------------------- the scores


def test_scores_are_printed_in_the_order_of_the_file(checkpoint, script):
    """In float32, whatever the device's usual dtype is; the last line counts them."""
    status, out, _ = script()
    assert status == 0
    records = [json.loads(line) for line in out.splitlines()[1:]]
    last = records.pop()
    expected = checkpoint.stop.score(checkpoint.model, checkpoint.prefixes)
    close(torch.tensor([record["score"] for record in records]), expected, 1e-6)
    for number, record in enumerate(records, 1):
        assert record["line"] == number
        assert record["id"] == (None if number == 6 else str(number - 1))
        assert record["label"] == {2: 0.75, 5: 0.0}.get(number)
        assert record["dtype"] == "float32"
        margin = torch.tensor(record["logits"]).double()
        assert torch.sigmoid(margin).item() == pytest.approx(record["score"], abs=1e-7)
    assert len({record["model"] for record in records}) == 1
    assert len({record["stop"] for record in records}) == 1
    assert last["count"] == 7
    assert last["mean_score"] == pytest.approx(expected.mean().item(), abs=1e-6)
    assert last["labels"] == 2


def test_the_summary_by_hand():
    """Right is what lies above one half, of scores and of labels, as the authors' evaluator has
    it."""
    report = summary([0.2, 0.6, 0.5, 0.9], [0.5, 1.0, None, 0.25])
    assert report["count"] == 4
    assert report["mean_score"] == pytest.approx(0.55)
    assert report["labels"] == 3
    assert report["mse"] == pytest.approx((0.3 ** 2 + 0.4 ** 2 + 0.65 ** 2) / 3)
    assert report["hard_label_accuracy"] == pytest.approx(2 / 3)
    assert summary([0.2], [None]).keys() == {"count", "mean_score"}


def test_a_file_of_scores_is_what_is_printed(script, tmp_path):
    _, printed, _ = script()
    status, out, _ = script("--out", tmp_path / "scored.jsonl")
    assert status == 0
    stored = read_lines(tmp_path / "scored.jsonl")
    for record in stored:
        assert record.pop("seal")
    assert stored == [json.loads(line) for line in printed.splitlines()[1:-1]]
    assert out.splitlines()[-1] == printed.splitlines()[-1]
    assert [file.name for file in tmp_path.iterdir()] == ["scored.jsonl"]


def test_a_killed_scoring_goes_on_to_the_same_bytes(script, tmp_path, monkeypatch):
    """Killed before any of its records; what was scored is not scored again."""
    script("--out", tmp_path / "whole.jsonl", "--batch", 2)
    whole = (tmp_path / "whole.jsonl").read_bytes()
    for calls in range(7):
        file = tmp_path / f"{calls}.jsonl"
        with monkeypatch.context() as patch:
            patch.setattr(Job, "_line", Fuse(calls)(Job._line))
            with pytest.raises(Killed):
                script("--out", file, "--batch", 2)
        assert file.read_text().count("\n") == calls
        scored = []
        honest = room.logits_and_states

        def noted(model, stop, prefixes):
            scored.append(len(prefixes))
            return honest(model, stop, prefixes)

        with monkeypatch.context() as patch:
            patch.setattr(room, "logits_and_states", noted)
            status, _, _ = script("--out", file, "--batch", 2)
        assert status == 0
        assert file.read_bytes() == whole
        assert len(scored) == 4 - calls // 2


def test_scores_of_something_else_are_refused(checkpoint, script, tmp_path):
    """Another dtype, another STOP, another input: by file and line, and the file stays."""
    file = tmp_path / "scored.jsonl"
    script("--out", file)
    content = file.read_bytes()
    other = tmp_path / "stop"
    random_stop(checkpoint.model, seed=9).save(other)
    records = read_lines(checkpoint.file)
    records[2]["prefix_token_ids"][0] += 1
    changed = write_lines(tmp_path / "changed.jsonl", records)
    for more, line in ((("--dtype", "bfloat16"), 1), (("--stop", other), 1),
                       (("--score", changed), 3)):
        status, _, err = script("--out", file, *more)
        assert status == 2
        assert err.startswith(f"error: {file}:{line}: found ")
        assert err.count("\n") == 1
        assert file.read_bytes() == content


def test_an_edited_score_is_refused(script, tmp_path):
    file = tmp_path / "scored.jsonl"
    script("--out", file)
    records = read_lines(file)
    records[3]["score"] = 0.5
    write_lines(file, records)
    status, _, err = script("--out", file)
    assert status == 2
    assert err.startswith(f"error: {file}:4: found an edited line")


def test_a_score_that_is_no_number_is_named_by_its_line(checkpoint, script, tmp_path, monkeypatch):
    """And what was scored before stays in the file."""
    honest = room.logits_and_states

    def broken(model, stop, prefixes):
        logits, states = honest(model, stop, prefixes)
        if checkpoint.prefixes[2] in prefixes:
            logits = logits * float("nan")
        return logits, states

    monkeypatch.setattr(room, "logits_and_states", broken)
    file = tmp_path / "scored.jsonl"
    status, _, err = script("--out", file, "--batch", 1)
    assert status == 2
    assert err.startswith("error: line 3: score: found NaN or infinity, expected a finite number")
    assert err.count("\n") == 1
    assert len(read_lines(file)) == 6


# ------------------------------------------------------------------------------------- the traces


def states_by_hand(checkpoint, ids):
    """Layer by layer, one pass over prefix and [STOP] -> (layers, m, hidden), (m, hidden)."""
    model = checkpoint.model
    stop = checkpoint.stop
    embedded = model.model.embed_tokens(torch.tensor([ids]))
    embedded = torch.cat((embedded, stop.tokens[None]), 1)
    active = torch.arange(len(ids) + stop.m)[None] >= len(ids)
    layers = []

    def record(module, inputs, output):
        layers.append(output[0, len(ids):])

    hooks = [layer.register_forward_hook(record) for layer in model.model.layers]
    with torch.no_grad():
        hidden = model(embedded, adapter=stop.lora.at(active))[0, len(ids):]
    for hook in hooks:
        hook.remove()
    return torch.stack(layers), hidden


def test_a_trace_holds_the_states_of_the_stop_positions(checkpoint, script, tmp_path):
    """After each decoder layer, and after the final norm; a file a line."""
    status, _, _ = script("--out", tmp_path / "scored.jsonl", "--trace", tmp_path / "trace")
    assert status == 0
    names = sorted(file.name for file in (tmp_path / "trace").iterdir())
    assert names == [f"{line:06}.safetensors" for line in range(1, 8)]
    for line, ids in enumerate(checkpoint.prefixes, 1):
        found = load_file(tmp_path / "trace" / f"{line:06}.safetensors")
        layers, hidden = states_by_hand(checkpoint, ids)
        close(found["layers"], layers, 1e-3)  # some are above 100
        close(found["hidden"], hidden)


@pytest.mark.parametrize("calls", range(14))
def test_no_score_is_ever_without_its_trace(script, tmp_path, monkeypatch, calls):
    """Killed at any write of a trace or of a score; started again, both are complete."""
    words = ("--out", tmp_path / "scored.jsonl", "--trace", tmp_path / "trace", "--batch", 1)
    fuse = Fuse(calls)
    with monkeypatch.context() as patch:
        patch.setattr(scores, "write_atomic", fuse(scores.write_atomic))
        patch.setattr(Job, "_line", fuse(Job._line))
        with pytest.raises(Killed):
            script(*words)
    scored = {record["line"] for record in read_lines(tmp_path / "scored.jsonl")}
    traced = {int(file.stem) for file in (tmp_path / "trace").iterdir()}
    assert len(scored) == calls // 2
    assert scored <= traced
    status, _, _ = script(*words)
    assert status == 0
    assert len(read_lines(tmp_path / "scored.jsonl")) == 7
    assert len(list((tmp_path / "trace").iterdir())) == 7


def test_a_score_whose_trace_is_gone_or_another_is_refused(script, tmp_path):
    words = ("--out", tmp_path / "scored.jsonl", "--trace", tmp_path / "trace")
    script(*words)
    third = tmp_path / "trace" / "000003.safetensors"
    third.write_bytes((tmp_path / "trace" / "000002.safetensors").read_bytes())
    status, _, err = script(*words)
    assert status == 2
    assert err.startswith(f"error: {third}: found other states than those of its score")
    third.unlink()
    status, _, err = script(*words)
    assert status == 2
    assert err.startswith(f"error: {third}: missing, but ")


def test_scores_made_without_traces_cannot_get_them(script, tmp_path):
    script("--out", tmp_path / "scored.jsonl")
    status, _, err = script("--out", tmp_path / "scored.jsonl", "--trace", tmp_path / "trace")
    assert status == 2
    assert "000001.safetensors: missing, but " in err


def test_traces_of_printed_scores(script, tmp_path):
    status, out, _ = script("--trace", tmp_path / "trace")
    assert status == 0
    assert len(list((tmp_path / "trace").iterdir())) == 7
    assert json.loads(out.splitlines()[1])["trace"]


# ------------------------------------------------------------------------------ prefixes in a file


def accept(ids):
    """Any ids can be read."""


@pytest.mark.parametrize("key", LABEL_KEYS)
def test_a_label_is_read_under_any_of_its_names(tmp_path, key):
    """Ours and the authors'; a record without one has none."""
    records = [{"prefix_token_ids": [1, 2], key: 0.25, "id": 7}, {"prefix_token_ids": [3]}]
    file = write_lines(tmp_path / "labels.jsonl", records)
    first, second = read_prefixes(file, accept)
    assert (first.ids, first.label, first.problem, first.line) == ([1, 2], 0.25, "7", 1)
    assert (second.ids, second.label, second.problem, second.line) == ([3], None, None, 2)


def test_prefixes_that_the_model_cannot_read_are_named_by_line(checkpoint, script, tmp_path):
    """A token id beyond the vocabulary, no token, no room for [STOP] in the context."""
    for ids, message in (([300], "token id 300 lies outside"), ([], "found no token"),
                         (random_ids(510).tolist(), "exceed the context of 512")):
        file = write_lines(
            tmp_path / "prefixes.jsonl", [{"prefix_token_ids": [1]}, {"prefix_token_ids": ids}])
        status, _, err = script("--score", file)
        assert status == 2
        assert err.startswith(f"error: {file}:2: ")
        assert message in err
        assert err.count("\n") == 1


def test_a_file_at_work_is_refused(script, tmp_path):
    with locked(tmp_path / "scored.jsonl"):
        status, _, err = script("--out", tmp_path / "scored.jsonl")
    assert status == 2
    assert "another process is at work there" in err
