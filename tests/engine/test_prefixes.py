"""engine/prefixes.py: one reading gives what the plain functions give, each of which reads every
prefix by itself."""
import numpy as np
import pytest
import torch
from helpers import ROOT

from baselines import CONFIDENCES
from engine import prefixes as room
from eval import read_prefixes
from model import load
from sample import generate
from stop import Stop


@pytest.fixture(scope="module")
def toy():
    model = load(str(ROOT / "toy"))
    return model, Stop.load(ROOT / "toy" / "stop", model)


def records_of(model, prompts, n=6):
    """Records of sampled paths of unlike lengths, some of which end before the checkpoint."""
    paths = generate(model, prompts, n=n, max_new_tokens=60, seed=3)
    records = []
    for prompt, group in zip(prompts, paths):
        ids = [path.ids[:5 + 11 * i] for i, path in enumerate(group)]
        records.append({"prompt_ids": prompt, "paths": [*ids, ids[-1], ids[0]]})
    return records


@pytest.mark.parametrize("rows", [1, 3, 64])
def test_one_reading_gives_what_two_give(toy, monkeypatch, rows):
    model, stop = toy
    records = records_of(model, [[5, 9, 17, 4], [33, 2], [7] * 19])
    monkeypatch.setattr(room, "ROWS", rows)
    confidences, chances = room.read_prefixes(model, stop, records, prefix=40, window=5)
    plain, plain_chances = read_prefixes(model, stop, records, 40, 5)
    assert list(confidences) == list(CONFIDENCES) == list(plain)
    for name, values in plain.items():
        np.testing.assert_allclose(confidences[name], values, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(chances, plain_chances, rtol=1e-4, atol=1e-6)


def test_equal_prefixes_have_equal_values(toy):
    """To the last bit: ties go by the index then, and not by rounding."""
    model, stop = toy
    records = records_of(model, [[5, 9, 17, 4]])
    confidences, chances = room.read_prefixes(model, stop, records, prefix=40, window=5)
    for values in (*confidences.values(), chances):
        assert values[5] == values[6] and values[0] == values[7]


def test_each_prompt_and_each_different_prefix_is_read_once(toy, monkeypatch):
    model, stop = toy
    records = records_of(model, [[5, 9, 17, 4], [33, 2]])
    seen = []
    run = model.run

    def counted(ids, *others, **settings):
        if not ids.is_floating_point():
            seen.append(tuple(ids.shape))
        return run(ids, *others, **settings)

    monkeypatch.setattr(model, "run", counted)
    room.read_prefixes(model, stop, records, prefix=40, window=5)
    expected = []
    for record in records:
        begun = {tuple(path[:40]) for path in record["paths"]}
        expected += [(1, len(record["prompt_ids"])), (len(begun), max(map(len, begun)))]
    assert seen == expected


def test_a_score_that_is_no_number_is_refused(toy):
    model, _ = toy
    stop = Stop(model, rank=2)
    with torch.no_grad():
        stop.head.weight.fill_(float("inf"))
    with pytest.raises(ValueError, match="found NaN or infinity"):
        room.read_prefixes(model, stop, records_of(model, [[5, 9]]), prefix=40, window=5)
