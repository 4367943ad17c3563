"""The embedded toy: its generator, its tokenizer, and that the files of toy/ agree with each other."""
import importlib.util
import json
import random
import re
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from tokenizers import Tokenizer

TOY = Path(__file__).resolve().parent.parent / "toy"


@pytest.fixture(scope="module")
def make():
    spec = importlib.util.spec_from_file_location("toy_make", TOY / "make.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.from_file(str(TOY / "tokenizer.json"))


def read_json(name):
    return json.loads((TOY / name).read_text())


def read_records(name):
    return [json.loads(line) for line in (TOY / name).read_text().splitlines()]


# A second, independent reading of the sentences: text in, right counts out.
RULES = [
    (r"gets (\d+) bags with (\d+) each", lambda count, x, y: count + x * y),
    (r"gives (\d+) to each of (\d+) friends", lambda count, x, y: count - x * y),
    (r"has (\d+) more than the box , which is the count now", lambda count, x: count - x),
    (r"finds twice as many again", lambda count: 3 * count),
    (r"buys (\d+) , drops (\d+)", lambda count, x, y: count + x - y),
    (r"finds (\d+)", lambda count, x: count + x),
    (r"loses (\d+)", lambda count, x: count - x),
]
TRAPS = RULES[:5]


def solve(problem):
    """(right counts, which rules) of a problem's text."""
    told = re.fullmatch(r"Q : \w+ has (\d+) \w+ \. (.*) \. What is the count \? <nl>", problem)
    counts, used = [int(told[1])], []
    for sentence in told[2].split(" . "):
        (rule, match), = [(rule, match) for rule in RULES if (match := re.fullmatch(rule[0], sentence))]
        counts.append(rule[1](counts[-1], *map(int, match.groups())))
        used.append(rule)
    return counts, used


def check_problem(text, answer):
    counts, used = solve(text)
    assert str(counts[-1]) == answer
    assert all(0 <= number <= 99 for number in counts) and 5 <= counts[0] <= 30
    assert len(used) in (7, 8) and sum(rule in TRAPS for rule in used) == 3
    assert sum(rule in TRAPS for rule in used[:3]) == 2


def test_generator_is_right_by_a_second_reading(make):
    rng = random.Random("test")
    for _ in range(500):
        problem = make.draw_problem(rng)
        check_problem(problem.text, str(problem.counts[-1]))
        assert solve(problem.text)[0] == problem.counts


def test_generator_follows_its_seed(make):
    def draw(seed):
        rng = random.Random(seed)
        problems = [make.draw_problem(rng) for _ in range(50)]
        return [(problem.text, make.write_path(problem, rng)) for problem in problems]
    assert draw("a") == draw("a") != draw("b")


def follow(path, counts):
    """Check a path's sums and that each line goes on from the count before it; its boxed answer."""
    *lines, last = path.split(" <nl> ")
    assert lines[0].startswith(f"Start : {counts[0]} ") and lines[0].endswith(" .")
    count, before, position = counts[0], [counts[0]], 0
    for line in lines[1:]:
        if back := re.fullmatch(r"Wait , no \. Back to (\d+) \.", line):
            position -= 1
            assert int(back[1]) == before[position]
            del before[position + 1:]
        elif redo := re.fullmatch(r"Wait , no \. Redo From the Start : (\d+) \.", line):
            assert int(redo[1]) == counts[0] and before[position] != counts[position]
            position, before = 0, [counts[0]]
        else:
            sums = re.fullmatch(r"(?:Next|Then) .* : (.*) \.", line)[1].split(" , ")
            results = []
            for left, operator, second, equals, result in map(str.split, sums):
                value = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__}[operator](int(left), int(second))
                assert equals == "=" and int(result) == value and 0 <= value <= 99
                results.append(value)
            assert str(before[position]) in " ".join(sums).split()
            position += 1
            before.append(results[-1])
        count = before[position]
    assert position == len(counts) - 1 and last == f"Answer : \\boxed{{ {count} }}"
    return count


def test_the_author_of_the_corpus(make, tokenizer):
    rng, right, wait, total = random.Random("author"), 0, 0, 0
    for _ in range(1500):
        problem = make.draw_problem(rng)
        path = make.write_path(problem, rng)
        if path is None:
            continue
        assert len(tokenizer.encode(path).ids) + 1 <= make.LONGEST
        total, wait = total + 1, wait + ("Wait" in path)
        right += follow(path, problem.counts) == problem.counts[-1]
    assert total > 1350  # observed .95; the figures below have standard errors of .012
    assert .26 < right / total < .40 and .18 < wait / total < .32


def test_tokenizer_round_trip(make, tokenizer):
    config, unknown = read_json("config.json"), tokenizer.token_to_id("<unk>")
    assert make.build_tokenizer().to_str() == tokenizer.to_str()
    rng = random.Random("round trip")
    for _ in range(200):
        problem = make.draw_problem(rng)
        for text in filter(None, (problem.text, make.write_path(problem, rng))):
            ids = tokenizer.encode(text).ids
            assert tokenizer.decode(ids) == text and len(ids) == len(text.split())
            assert unknown not in ids and max(ids) < config["vocab_size"]
    for number in range(100):
        assert len(tokenizer.encode(str(number)).ids) == 1
    prompt = tokenizer.encode(problem.text).ids  # nothing is put before or behind a prompt
    assert prompt[0] == tokenizer.token_to_id("Q") and prompt[-1] == tokenizer.token_to_id("<nl>")
    boxed = "Answer : \\boxed{ 38 }"
    assert tokenizer.decode(tokenizer.encode(boxed).ids + [config["eos_token_id"]]) == boxed


def test_the_files_agree(make, tokenizer):
    config, generation, words = map(read_json, ("config.json", "generation_config.json", "tokenizer_config.json"))
    assert config == make.model_config(tokenizer.get_vocab_size(), tokenizer.token_to_id("<eos>"))
    assert tokenizer.id_to_token(config["eos_token_id"]) == words["eos_token"] == "<eos>"
    assert tokenizer.id_to_token(config["pad_token_id"]) == words["pad_token"] == "<pad>"
    assert generation["eos_token_id"] == config["eos_token_id"] and generation["pad_token_id"] == config["pad_token_id"]
    assert max(tokenizer.get_vocab().values()) == tokenizer.get_vocab_size() - 1
    with safe_open(TOY / "model.safetensors", "pt") as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
        assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.bfloat16}
    expected = make.Decoder(make.Config.from_dict(config)).state_dict()
    assert shapes == {name: tuple(tensor.shape) for name, tensor in expected.items()}
    assert shapes["lm_head.weight"] == (tokenizer.get_vocab_size(), config["hidden_size"])


def test_problems_are_right_distinct_and_small():
    train, test = read_records("train.jsonl"), read_records("test.jsonl")
    assert (len(train), len(test)) == (1300, 300)
    for record in train + test:
        assert set(record) == {"id", "problem", "answer"}
        check_problem(record["problem"], record["answer"])
    assert len({record["problem"] for record in train + test}) == 1600 == len({record["id"] for record in train + test})
    made = ("make.py", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
            "tokenizer_config.json", "train.jsonl", "test.jsonl")
    assert sum((TOY / name).stat().st_size for name in made) < 4_000_000


def test_the_model_starts_a_path(make, tokenizer):
    """Greedy, from the weights as stored: the path restates the start, whatever it makes of the traps."""
    model = make.load(str(TOY))
    for record in read_records("test.jsonl")[:5]:
        ids = tokenizer.encode(record["problem"]).ids
        for _ in range(5):
            with torch.no_grad():
                ids.append(int(model.logits(model(torch.tensor([ids]))[0, -1]).argmax()))
        _, _, name, _, count, thing = record["problem"].split()[:6]
        assert tokenizer.decode(ids[-5:]) == f"Start : {count} {thing} ."


def test_batches_of_the_corpus(make, tokenizer):
    """The loss sees the path and its end, nothing else; problems held back stay out."""
    held = make.draw_problem(random.Random("batches")).text
    seen, eos, start = set(), tokenizer.token_to_id("<eos>"), tokenizer.token_to_id("Start")
    corpus = make.batches(random.Random("batches"), make.REAL, tokenizer, {held}, seen, 2048)
    for ids, wanted in (next(corpus) for _ in range(20)):
        assert ids.numel() <= 2048 and ids.shape == wanted.shape
        for row, target in zip(ids.tolist(), wanted.tolist()):
            first, last = row.index(start), row.index(eos)
            assert target[first - 1:last] == row[first:last + 1]
            assert set(target[:first - 1] + target[last:]) == {-100} and not any(row[last + 1:])
    assert len(seen) == 2000 and held not in seen
