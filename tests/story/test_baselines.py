"""Types I and III beside slow, direct versions of their formulas, a judge beside transformers."""
import math

import numpy as np
import pytest
import torch
from helpers import (
    KINDS, random_ids, random_model, raw_config, write_checkpoint, write_tokenizer)

from baselines import CONFIDENCES, confidence, judge_scores, redundancy, token_set_cover
from model import load
from plumbing.problems import Problem, instruction
from plumbing.tokenizer import Tokenizer

# ------------------------------------------------------------------------------------------ type I


def test_redundancy_by_hand():
    """Sets, not counts; within the prefix; the nearest other path of the same problem only."""
    records = [
        {"paths": [[1, 1, 2, 9], [2, 1, 1, 8], [2, 3, 3, 4, 5], [6]]},
        {"paths": [[1, 2, 3], [7, 8]]},
        {"paths": [[1]]},
    ]
    assert redundancy(records, 3).tolist() == [-1, -1, -1 / 3, 0, 0, 0, 0]


def test_redundancy_is_minus_the_largest_jaccard_similarity():
    rng = np.random.default_rng(0)
    record = {"paths": [rng.integers(0, 9, size).tolist() for size in (3, 9, 5, 8, 30)]}
    sets = [set(path[:6]) for path in record["paths"]]
    direct = []
    for i, a in enumerate(sets):
        similarity = [len(a & b) / len(a | b) for j, b in enumerate(sets) if j != i]
        direct.append(-max(similarity))
    assert redundancy([record], 6) == pytest.approx(direct)
    assert len(set(direct)) > 2


def test_a_token_set_cover_by_hand():
    """Within the prefix; sets, not counts; confidence times what is new; a second cover of the
    rest; problems apart; ties to the lower index."""
    records = [
        {"paths": [[1, 2, 3, 9], [1, 2, 4, 8], [5, 5, 5], [4, 3, 2]]},
        {"paths": [[1], [1], [1, 2]]},
    ]
    confidences = np.array([0.5, 0.9, 0.8, 0.6, 0.9, 0.9, 0.2])
    # The first problem: gains 1.5, 2.7, .8, 1.8: path 1. Then .5, -, .8, .6: path 2.
    # Then .5 and .6 (token 3 alone is new): path 3. All is covered: path 0 is left.
    # The second: .9, .9, .4: path 0. Then path 1 has nothing new, path 2 has: path 2, then path 1.
    found = token_set_cover(records, 3, confidences)
    assert found.tolist() == [-3, 0, -1, -2, 0, -2, -1]


def test_a_token_set_cover_by_its_definition():
    """Every turn takes a path that no other beats, by the tokens of the paths before it since the
    last full cover."""
    rng = np.random.default_rng(0)
    paths = [rng.integers(0, 9, rng.integers(1, 9)).tolist() for _ in range(12)]
    confidences = rng.random(12) + 0.1
    scores = token_set_cover([{"paths": paths}], 6, confidences)
    order = np.argsort(-scores).tolist()
    assert sorted(-scores) == list(range(12))
    seen = set()
    for turn, taken in enumerate(order):
        left = order[turn:]
        if all(set(paths[i][:6]) <= seen for i in left):
            seen = set()
        gains = {i: confidences[i] * len(set(paths[i][:6]) - seen) for i in left}
        assert gains[taken] == max(gains.values())
        seen |= set(paths[taken][:6])


# ---------------------------------------------------------------------------------------- type III

RECORDS = []
for prompt_size, path_sizes in ((9, (40, 1, 12)), (2, (5, 33, 7))):
    RECORDS.append({
        "prompt_ids": random_ids(prompt_size, seed=prompt_size, vocab=12).tolist(),
        "paths": [random_ids(size, seed=size, vocab=12).tolist() for size in path_sizes],
    })


def direct_confidence(model, prompt, path, window):
    """The papers' formulas, token by token and in double precision."""
    logs, nats, C, bits = [], [], [], []
    for t, token in enumerate(path):
        hidden = model(torch.tensor([prompt + path[:t]]))
        p = model.logits(hidden)[0, -1].double().softmax(-1).tolist()
        top = sorted(p)[-20:]
        logs.append(math.log(p[token]))
        nats.append(-sum(x * math.log(x) for x in p))
        C.append(-sum(math.log(x) for x in top) / len(top))
        bits.append(-sum(x / sum(top) * math.log2(x / sum(top)) for x in top))
    groups = [sum(C[i:i + window]) / window for i in range(len(C) - window + 1)]
    if not groups:
        groups = [sum(C) / len(C)]
    lowest = sorted(groups)[:max(1, int(0.1 * len(groups)))]
    return {
        "mean log-probability (III)": np.mean(logs),
        "minus entropy (III)": -np.mean(nats),
        "DeepConf mean (III)": np.mean(C),
        "DeepConf lowest group (III)": min(groups),
        "DeepConf bottom 10% (III)": np.mean(lowest),
        "DeepConf tail (III)": np.mean(C[-window:]),
        "Think Just Enough (III)": -np.mean(bits),
    }


@pytest.mark.parametrize("kind, vocab, window", [(kind, 61, 4) for kind in KINDS] + [
    ("qwen2", 12, 4), ("qwen2", 61, 1), ("qwen2", 61, 100)])
def test_confidence_of_every_row(kind, vocab, window):
    """Off by one, padding read, rows out of order, partial windows, 19 or 21 tokens, nats for bits,
    a temperature: all show."""
    model = random_model(kind, vocab_size=vocab)
    expected = []
    with torch.inference_mode():
        for record in RECORDS:
            for path in record["paths"]:
                direct = direct_confidence(model, record["prompt_ids"], path[:30], window)
                expected.append(direct)
    for batch in (1, 4):
        found = confidence(model, RECORDS, 30, window, batch)
        assert tuple(found) == CONFIDENCES == tuple(expected[0])
        for name, scores in found.items():
            assert scores.shape == (6,) and scores.dtype == np.float64
            assert scores == pytest.approx([row[name] for row in expected], abs=1e-4), name
    names = [name for name in found if name.startswith("DeepConf")]
    values = [round(expected[0][name], 3) for name in names]
    assert len(set(values)) == (1 if window == 100 else 4), values  # one window: all are the mean


def test_confidence_holds_few_logits_at_once(monkeypatch):
    """As with a vocabulary of 16 million: blocks of three positions, and the same scores."""
    model = random_model("qwen2")
    whole = confidence(model, RECORDS, 30, 4)
    logits = model.logits
    seen = []

    def noted(hidden):
        seen.append(hidden.shape)
        return logits(hidden)

    model.config.vocab_size = 2 ** 24
    monkeypatch.setattr(model, "logits", noted)
    parts = confidence(model, RECORDS, 30, 4)
    assert max(shape[0] for shape in seen) == 3
    for name, scores in whole.items():
        assert np.allclose(parts[name], scores, atol=1e-5), name


def test_no_records_have_no_scores():
    """As for a process without a problem to score, where problems are fewer than processes."""
    assert redundancy([], 5).shape == (0,)
    assert token_set_cover([], 5, np.zeros(0)).shape == (0,)
    for scores in confidence(random_model("qwen2"), [], 5).values():
        assert scores.shape == (0,)


# ----------------------------------------------------------------------------------------- type II

PRM = ["Qwen2ForProcessRewardModel"]
MARKS = ("<extra_0>", "<|im_start|>", "<|im_end|>")
TEXTS = (
    ("Two and two.\n\n makes <extra_0>five \n\n\n\nno", "\n\n", "four"),
    ("x" * 60, "A\n\nB"))
ASKED = [
    Problem("a", "What is 2 + 2?", "4"),
    Problem("b", "Which %s?", "B", {"A": "this", "B": "that"})]


def judge_case(tmp_path, special, seed=5, **changes):
    """(judge, its tokenizer, the model's tokenizer, records) with a small random reward model."""
    raw = raw_config("qwen2", **{"vocab_size": 260, "architectures": PRM} | changes)
    folder = write_checkpoint(tmp_path / "judge", raw, seed=seed)
    write_tokenizer(folder, special)
    own = Tokenizer(write_tokenizer(tmp_path / "own"))
    records = []
    for problem, texts in zip(ASKED, TEXTS):
        paths = [own.encode(text) for text in texts]
        records.append({"prompt_ids": own.ask(problem), "paths": paths})
    return load(folder), Tokenizer(folder), own, records


def transformers_rewards(judge, rows):
    """softmax[1] at every position, by transformers' Qwen2Model under the two linears."""
    transformers = pytest.importorskip("transformers")
    raw = raw_config("qwen2", vocab_size=260)
    del raw["model_type"]
    theirs = transformers.Qwen2Model(transformers.Qwen2Config(**raw)).eval()
    head = torch.nn.Sequential(torch.nn.Linear(32, 32), torch.nn.ReLU(), torch.nn.Linear(32, 2))
    parts = {"model.": {}, "score.": {}}
    for name, tensor in judge.state_dict().items():
        for prefix, part in parts.items():
            if name.startswith(prefix):
                part[name.removeprefix(prefix)] = tensor
    theirs.load_state_dict(parts["model."])
    head.load_state_dict(parts["score."])
    rewards = []
    with torch.inference_mode():
        for row in rows:
            hidden = theirs(torch.tensor([row])).last_hidden_state[0]
            rewards.append(head(hidden).softmax(-1)[:, 1].tolist())
    return rewards


def last(rewards):
    return rewards[-1]


def mean(rewards):
    return sum(rewards) / len(rewards)


@pytest.mark.parametrize("aggregate, of", (("last", last), ("min", min), ("mean", mean)))
def test_a_judge_reads_marked_steps(tmp_path, aggregate, of):
    """The text as Qwen's card has it, a mark after every step; one that the path wrote is none."""
    judge, judge_tokenizer, tokenizer, records = judge_case(tmp_path, MARKS)
    choice = instruction(ASKED[1])
    assert choice.startswith("Which %s?\n\nA. this\nB. that\n\n")
    questions = ["What is 2 + 2?"] * 3 + [choice] * 2
    steps = [
        "Two and two.<extra_0>makes five<extra_0>no<extra_0>",
        "<extra_0>",
        "four<extra_0>",
        "x" * 41 + "<extra_0>",
        "A<extra_0>B<extra_0>",
    ]
    rows = []
    for question, text in zip(questions, steps):
        chat = (
            "<|im_start|>system\n"
            "Please reason step by step, and put your final answer within \\boxed{}.<|im_end|>\n"
            f"<|im_start|>user\n{question}<|im_end|>\n"
            f"<|im_start|>assistant\n{text}<|im_end|>\n")
        rows.append(judge_tokenizer.library.encode(chat).ids)
    mark = judge_tokenizer.library.token_to_id("<extra_0>")
    expected = []
    for row, rewards in zip(rows, transformers_rewards(judge, rows)):
        expected.append(of([reward for token, reward in zip(row, rewards) if token == mark]))
    found = judge_scores(
        judge, judge_tokenizer, tokenizer, ASKED, records, 41, aggregate=aggregate, batch=2)
    assert found.shape == (5,) and found == pytest.approx(expected, abs=1e-5)
    assert np.ptp(found) > 0.01


def test_a_judge_with_the_models_tokens_reads_its_ids(tmp_path):
    """The reward at the end of prompt and prefix, as long as the prefix is."""
    judge, judge_tokenizer, tokenizer, records = judge_case(tmp_path, ())
    rows = []
    for record in records:
        rows += [record["prompt_ids"] + path[:9] for path in record["paths"]]
    expected = [rewards[-1] for rewards in transformers_rewards(judge, rows)]
    found = judge_scores(judge, judge_tokenizer, tokenizer, ASKED, records, 9)
    assert found == pytest.approx(expected, abs=1e-5) and np.ptp(found) > 0.01


def test_a_judge_without_records_has_no_scores(tmp_path):
    judge, judge_tokenizer, tokenizer, _ = judge_case(tmp_path, MARKS)
    assert judge_scores(judge, judge_tokenizer, tokenizer, [], [], 9).shape == (0,)


@pytest.mark.parametrize("special, changes, how, message", (
    (MARKS, {"architectures": ["Qwen2ForCausalLM"]}, {},
     "judge: head: found next tokens, expected two logits"),
    (MARKS, {"vocab_size": 258}, {}, "judge: vocab_size: found 258, expected more than 258"),
    ((), {"vocab_size": 200}, {}, "judge: vocab_size: found 200, expected more than 255"),
    (("<other>",), {}, {}, "judge: tokenizer: found another, expected <extra_0> or the model's"),
    (MARKS, {"max_position_embeddings": 100}, {}, "judge: context: found 100, expected at least 2"),
    (MARKS, {}, {"aggregate": "sum"}, "judge: aggregate: found sum, expected last, min or mean")))
def test_a_judge_that_does_not_fit_is_refused(tmp_path, special, changes, how, message):
    judge, judge_tokenizer, tokenizer, records = judge_case(tmp_path, special, **changes)
    with pytest.raises(ValueError) as caught:
        judge_scores(judge, judge_tokenizer, tokenizer, ASKED, records, 9, **how)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_token_the_judge_has_no_row_for_is_refused(tmp_path):
    """A model may write ids beyond its tokenizer's, where its vocabulary is padded; a smaller judge
    cannot read them."""
    judge, judge_tokenizer, tokenizer, records = judge_case(tmp_path, ())
    records[0]["paths"][0][0] = 300
    with pytest.raises(ValueError, match="judge: vocab_size: found 260, expected more than 300"):
        judge_scores(judge, judge_tokenizer, tokenizer, ASKED, records, 9)
