"""The embedded toy: its generator, its tokenizer, and that the files of toy/ agree with each
other."""
import importlib.util
import json
import random
import re
import sys

import pytest
import torch
from helpers import ROOT, read_lines
from safetensors import safe_open
from tokenizers import Tokenizer

from model import Decoder, load
from plumbing.checkpoint import Config
from stop import Stop

TOY = ROOT / "toy"


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


# ---------------------------------------------------------------------- the problems, read again


def gain_bags(count, x, y):
    return count + x * y


def give_each(count, x, y):
    return count - x * y


def has_more_than_the_box(count, x):
    return count - x


def gain_twice(count):
    return 3 * count


def gain_and_lose(count, x, y):
    return count + x - y


def gain(count, x):
    return count + x


def lose(count, x):
    return count - x


RULES = {  # a second, independent reading of the sentences: text in, right counts out
    r"gets (\d+) bags with (\d+) each": gain_bags,
    r"gives (\d+) to each of (\d+) friends": give_each,
    r"has (\d+) more than the box , which is the count now": has_more_than_the_box,
    r"finds twice as many again": gain_twice,
    r"buys (\d+) , drops (\d+)": gain_and_lose,
    r"finds (\d+)": gain,
    r"loses (\d+)": lose}
TRAPS = list(RULES)[:5]


class Solution:
    """The right counts of a problem's text, and which rules it uses."""

    def __init__(self, text):
        told = re.fullmatch(
            r"Q : \w+ has (\d+) \w+ \. (.*) \. What is the count \? <nl>", text)
        self.counts = [int(told[1])]
        self.rules = []
        for sentence in told[2].split(" . "):
            matches = {rule: re.fullmatch(rule, sentence) for rule in RULES}
            (rule,) = [rule for rule, match in matches.items() if match]
            numbers = [int(number) for number in matches[rule].groups()]
            self.counts.append(RULES[rule](self.counts[-1], *numbers))
            self.rules.append(rule)


def count_traps(rules):
    return sum(rule in TRAPS for rule in rules)


def check_problem(text, answer):
    """A problem's answer is right, its numbers are small, and it has three traps, two of them
    early."""
    solution = Solution(text)
    assert str(solution.counts[-1]) == answer
    assert all(0 <= number <= 99 for number in solution.counts)
    assert 5 <= solution.counts[0] <= 30
    assert len(solution.rules) in (7, 8)
    assert count_traps(solution.rules) == 3
    assert count_traps(solution.rules[:3]) == 2


def test_the_generator_is_right_by_a_second_reading(make):
    rng = random.Random("test")
    for _ in range(500):
        problem = make.draw_problem(rng)
        check_problem(problem.text, str(problem.counts[-1]))
        assert Solution(problem.text).counts == list(problem.counts)


def test_the_generator_follows_its_seed(make):
    def draw(seed):
        rng = random.Random(seed)
        problems = [make.draw_problem(rng) for _ in range(50)]
        return [(problem.text, make.write_path(problem, rng)) for problem in problems]

    assert draw("a") == draw("a")
    assert draw("a") != draw("b")


def test_problems_are_right_distinct_and_small():
    train = read_lines(TOY / "train.jsonl")
    test = read_lines(TOY / "test.jsonl")
    assert len(train) == 1300
    assert len(test) == 300
    for record in train + test:
        assert set(record) == {"id", "problem", "answer"}
        check_problem(record["problem"], record["answer"])
    assert len({record["problem"] for record in train + test}) == 1600
    assert len({record["id"] for record in train + test}) == 1600
    made = ("make.py", "config.json", "generation_config.json", "model.safetensors",
            "tokenizer.json", "tokenizer_config.json", "train.jsonl", "test.jsonl")
    assert sum((TOY / name).stat().st_size for name in made) < 4_000_000


# ------------------------------------------------------------------------------------- the corpus

OPERATORS = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__}


class Follower:
    """Follows a path line by line: each goes on from the count before it, each sum is right."""

    def __init__(self, counts):
        self.counts = counts     # the right ones
        self.before = [counts[0]]  # the path's own
        self.position = 0

    def read(self, line):
        back = re.fullmatch(r"Wait , no \. Back to (\d+) \.", line)
        redo = re.fullmatch(r"Wait , no \. Redo From the Start : (\d+) \.", line)
        if back:
            self.position -= 1
            assert int(back[1]) == self.before[self.position]
            del self.before[self.position + 1:]
        elif redo:
            assert int(redo[1]) == self.counts[0]
            assert self.before[self.position] != self.counts[self.position]
            self.position = 0
            self.before = [self.counts[0]]
        else:
            self.read_sums(line)

    def read_sums(self, line):
        """A step in one or two sums, the first of which begins with the count before it."""
        sums = re.fullmatch(r"(?:Next|Then) .* : (.*) \.", line)[1].split(" , ")
        for text in sums:
            left, operator, second, equals, result = text.split()
            assert equals == "="
            assert int(result) == OPERATORS[operator](int(left), int(second))
            assert 0 <= int(result) <= 99
        assert str(self.before[self.position]) in " ".join(sums).split()
        self.position += 1
        self.before.append(int(result))


def follow(path, counts):
    """The answer of a path whose every line is checked."""
    *lines, last = path.split(" <nl> ")
    assert lines[0].startswith(f"Start : {counts[0]} ")
    assert lines[0].endswith(" .")
    follower = Follower(counts)
    for line in lines[1:]:
        follower.read(line)
    assert follower.position == len(counts) - 1
    answer = follower.before[follower.position]
    assert last == f"Answer : \\boxed{{ {answer} }}"
    return answer


def test_the_author_of_the_corpus(make, tokenizer):
    """How often it is right, and how often it turns back. The shares have standard errors of
    .012."""
    rng = random.Random("author")
    right = 0
    turning = 0
    total = 0
    for _ in range(1500):
        problem = make.draw_problem(rng)
        path = make.write_path(problem, rng)
        if path is None:
            continue
        assert len(tokenizer.encode(path).ids) + 1 <= make.LONGEST
        total += 1
        turning += "Wait" in path
        right += follow(path, problem.counts) == problem.counts[-1]
    assert total > 1350  # observed .95
    assert .26 < right / total < .40
    assert .18 < turning / total < .32


def test_batches_of_the_corpus(make, tokenizer):
    """The loss sees the path and its end, nothing else; problems held back stay out."""
    held = make.draw_problem(random.Random("batches")).text
    seen = set()
    eos = tokenizer.token_to_id("<eos>")
    start = tokenizer.token_to_id("Start")
    corpus = make.batches(random.Random("batches"), make.REAL, tokenizer, {held}, seen, 2048)
    for _ in range(20):
        ids, wanted = next(corpus)
        assert ids.numel() <= 2048
        assert ids.shape == wanted.shape
        for row, target in zip(ids.tolist(), wanted.tolist()):
            first = row.index(start)
            last = row.index(eos)
            assert target[first - 1:last] == row[first:last + 1]
            assert set(target[:first - 1] + target[last:]) == {-100}
            assert not any(row[last + 1:])
    assert len(seen) == 2000
    assert held not in seen


# ------------------------------------------------------------------------------ tokenizer, files


def test_the_tokenizer_goes_there_and_back(make, tokenizer):
    """A word a token, nothing unknown, nothing in front of a prompt or behind it."""
    config = read_json("config.json")
    unknown = tokenizer.token_to_id("<unk>")
    assert make.build_tokenizer().to_str() == tokenizer.to_str()
    rng = random.Random("round trip")
    for _ in range(200):
        problem = make.draw_problem(rng)
        for text in (problem.text, make.write_path(problem, rng)):
            if text is None:
                continue
            ids = tokenizer.encode(text).ids
            assert tokenizer.decode(ids) == text
            assert len(ids) == len(text.split())
            assert unknown not in ids
            assert max(ids) < config["vocab_size"]
    for number in range(100):
        assert len(tokenizer.encode(str(number)).ids) == 1
    prompt = tokenizer.encode(problem.text).ids
    assert prompt[0] == tokenizer.token_to_id("Q")
    assert prompt[-1] == tokenizer.token_to_id("<nl>")
    boxed = "Answer : \\boxed{ 38 }"
    assert tokenizer.decode(tokenizer.encode(boxed).ids + [config["eos_token_id"]]) == boxed


def test_the_files_agree(make, tokenizer):
    config = read_json("config.json")
    generation = read_json("generation_config.json")
    words = read_json("tokenizer_config.json")
    size = tokenizer.get_vocab_size()
    assert config == make.model_config(size, tokenizer.token_to_id("<eos>"))
    assert tokenizer.id_to_token(config["eos_token_id"]) == words["eos_token"] == "<eos>"
    assert tokenizer.id_to_token(config["pad_token_id"]) == words["pad_token"] == "<pad>"
    assert generation["eos_token_id"] == config["eos_token_id"]
    assert generation["pad_token_id"] == config["pad_token_id"]
    assert max(tokenizer.get_vocab().values()) == size - 1
    with safe_open(TOY / "model.safetensors", "pt") as file:
        names = list(file.keys())
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in names}
        dtypes = {file.get_tensor(name).dtype for name in names}
    assert dtypes == {torch.bfloat16}
    expected = Decoder(Config.from_dict(config)).state_dict()
    assert shapes == {name: tuple(tensor.shape) for name, tensor in expected.items()}
    assert shapes["lm_head.weight"] == (size, config["hidden_size"])


def test_the_model_starts_a_path(tokenizer):
    """Greedy, from the weights as stored: the path restates the start, whatever it makes of the
    traps."""
    model = load(TOY)
    for record in read_lines(TOY / "test.jsonl")[:5]:
        ids = tokenizer.encode(record["problem"]).ids
        for _ in range(5):
            with torch.no_grad():
                hidden = model(torch.tensor([ids]))[0, -1]
                ids.append(int(model.logits(hidden).argmax()))
        _, _, _, _, count, thing = record["problem"].split()[:6]
        assert tokenizer.decode(ids[-5:]) == f"Start : {count} {thing} ."


def test_the_toys_stop_is_the_toys():
    """It loads, says what it was trained with, and gives prefixes unlike chances."""
    model = load(TOY)
    stop = Stop.load(TOY / "stop", model)
    assert stop.trained["settings"]["rank"] == read_json("recipe.json")["rank"]
    assert stop.trained_for() == [int(n) for n in read_json("recipe.json")["prefix"].split(",")]
    scores = stop.score(model, [[5, 6, 7], [8, 9], [10, 11, 12, 13]])
    assert len(set(scores.tolist())) == 3
