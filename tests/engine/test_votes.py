"""Decided votes (10,000 random cases, and on paths of a model), and branching, against second
versions by hand."""
import itertools
import math
import random

import numpy as np
import pytest
import torch
from helpers import Told, random_ids, random_model, random_stop

import sample
from engine import launch
from engine.decided import Decider, is_decided, may_be_equal
from engine.refill import Batch
from plumbing.answers import same_answer, same_vote
from sample import draw, generate, probabilities
from stop import StopSignal, Watcher, decide, launch_check_resume, vote

SPELLINGS = (  # answers in several spellings; those of a line are the same, but for the last line
    ("1/2", "0.5", "\\frac{1}{2}", "\\dfrac12"),
    ("3", "3.0", "+3", "6/2"),
    ("x+1", "x + 1"),
    ("\\sqrt{4}", "2", "2.0"),
    ("7",),
    ("-1",),
    ("1,234", "1234", "1, 234", "(1,234)", "234, 1"))
SAMPLING = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "seed": 5}
PROMPT = random_ids(9).tolist()
ENDS = tuple(range(3, 61, 7))  # end tokens: about one token in seven


# ----------------------------------------------------------------------------------- decided votes


def random_case(generator):
    """(answers, weights, whether each has ended) of 2 to 12 paths, in the order in which they
    vote."""
    pool = generator.sample(SPELLINGS, generator.randint(1, 4))
    count = generator.randint(2, 12)
    answers = []
    weights = []
    for _ in range(count):
        spellings = generator.choice(pool)
        answers.append(generator.choice([None, *spellings, *spellings]))
        some = generator.random()
        weights.append(generator.choice([0.0, 1.0, 1.0, some, some / 50]))
    ended = [generator.random() < 0.8 for _ in range(count)]
    return answers, weights, ended


def only(values, wanted):
    return [value for value, is_wanted in zip(values, wanted) if is_wanted]


def equal(one, other):
    if one is None or other is None:
        return one is other
    return same_answer(one, other) or same_answer(other, one)


@pytest.mark.parametrize("weighted", (False, True))
def test_a_decided_vote_is_the_vote(weighted):
    """10,000 random cases: where those that have ended decide, all together elect the same answer,
    whichever the others vote for and wherever they stand among them."""
    generator = random.Random(0)
    decided = 0
    for _ in range(5000):
        answers, weights, ended = random_case(generator)
        if not weighted:
            weights = [1.0] * len(answers)
        outstanding = sum(only(weights, [not has for has in ended]))
        found = only(answers, ended)
        counted = only(weights, ended)
        if is_decided(found, counted, outstanding):
            decided += 1
            assert equal(vote(found, counted), vote(answers, weights)), (answers, weights, ended)
    assert decided > 500


TRICKY = (  # what models write, much of it with more than one reading
    "5", "4", "0.5", "1/2", r"\frac{1}{2}", "1,234", "1234", "(1,234)", "(1 and 2)", "[1 and 2]",
    "1 or 2", "(2 and 1)", "(1，2)", "[1，2]", "1，2", r"\pm 2", "(2 and -2)", "(-2 and 2)",
    "3 or 4 (both were accepted)", "5 or 4 (both were accepted)", "10^{10}", "10^{10}+9",
    r"10^{10}+\sqrt{25}", "0,005", "(0,5)", "[0,5]", "005", "5.0", "x=5", r"5\%", "50%",
    r"\text{5}", "(5)", "{5}", "3=4", "-0", "1 000", "1000", r"1\,000", "1e3", "12 1/2",
    r"12\frac{1}{2}", "12.5", "2,5", "2.5", "(2,5)", "1/3", "0.3333333333",
    "1,000,000", "1000000", "(1,000,000)", "B", "(B)", "x-5=0", "5=x", "y=5", "2x=10", "x-4=0",
    "x=4",
    "x=1, y=2", "y=2, x=1", "(x,y)=(1,2)", "x=1,234-1229", "1,234-1229", "1,-995", "x=B", "x-B=0",
    "x=1,2", "0.5000000004", "0.5000000008", "0.4999999996", r"x \in \{5\}", r"5 \approx 5.0",
    "5 m", "sqrt(25)", r"\log_2 32", "2x+3", "y=2x+3", "2x-y+3=0", "3+2x", r"0.\overline{3}",
    "9:15 PM")


def test_nothing_unites_what_is_told_apart():
    """Two answers that cannot be equal: no third is in one vote with both."""
    def together(one, other):
        return same_vote(one, other) or same_vote(other, one)

    apart = 0
    for one, other in itertools.combinations(TRICKY, 2):
        if not may_be_equal(one, other, "math"):
            apart += 1
            for third in TRICKY:
                assert not (together(one, third) and together(other, third)), (one, other, third)
    assert apart > 300


def test_a_decision_holds_whatever_is_said():
    """Against every outcome of one path that still runs, before the others and behind them."""
    generator = random.Random(1)
    decided = 0
    for _ in range(6000):
        pool = generator.sample(TRICKY, generator.randint(2, 4))
        answers = generator.choices(pool, k=generator.randint(1, 7))
        if not is_decided(answers, [1.0] * len(answers), 1.0):
            continue
        decided += 1
        winner = vote(answers)
        for said in TRICKY:
            assert equal(winner, vote([said, *answers])), (answers, said)
            assert equal(winner, vote([*answers, said])), (answers, said)
    assert decided > 200


def test_a_path_gives_no_note():
    """`3 or 4 (both were accepted)` is said by references; in a vote it is neither 3 nor 4."""
    note = "3 or 4 (both were accepted)"
    assert same_answer("3", note) and same_answer("4", note)
    assert not same_vote("3", note) and not same_vote(note, "4")
    assert vote([note, "3", "4", "4"]) == "4"


@pytest.mark.parametrize("count", (1, 2, 3, 5))
def test_a_decision_is_as_early_as_it_can_be(count):
    """Answers that nobody could mix up: as soon as the lead is larger than what is outstanding, and
    not before, for then the outstanding can still turn it."""
    generator = random.Random(count)
    for _ in range(300):
        answers = generator.choices(["7", "8", "9"], k=generator.randint(1, 9))
        votes = sorted((answers.count(answer) for answer in set(answers)), reverse=True)
        lead = votes[0] - (votes[1] if len(votes) > 1 else 0)
        assert is_decided(answers, [1.0] * len(answers), count) == (lead > count)


def test_nobody_voting_decides_nothing():
    """Not even where what is outstanding has no weight: it would still name an answer."""
    assert not is_decided([], [], 0)
    assert not is_decided([None, None], [1.0, 1.0], 0)
    assert not is_decided(["1", "2"], [1.0, 1.0], 0), "a tie that order breaks"


def test_a_comma_may_be_either():
    """1,234 is 1234 and is the list 1, 234: three spellings that a fourth vote may join."""
    assert may_be_equal("1,234", "1234", "math")
    assert not is_decided(["5", "5", "1234", "1, 234"], [1.0] * 4, 1.0)
    assert is_decided(["5"] * 4 + ["1234", "1, 234"], [1.0] * 6, 1.0)
    assert not is_decided(["1,234"] * 9, [1.0] * 9, 1.0), "the name of the winner is open"


def test_an_equation_in_the_winning_group_decides_nothing():
    """x = 5 is 5 and y = 5 is 5, but they are not one: the name of the winner is open."""
    assert not is_decided(["x=5", "5", "5", "5", "5"], [1.0] * 5, 1.0)
    assert is_decided(["x=4", "5", "5", "5", "5"], [1.0] * 5, 1.0)
    assert may_be_equal("6", "x-6=0", "math"), "x = 6 is both"
    assert not is_decided(["5", "5", "5", "6", "x-6=0"], [1.0] * 5, 1.0)


@pytest.fixture(scope="module")
def pair():
    model = random_model("qwen2")
    return model, random_stop(model)


def answer_of(path):
    """An answer that depends on all tokens of a path: one of three, or none."""
    return [None, "1/2", "0.5", "3", "4"][sum(path.ids) % 5]


@pytest.mark.parametrize("stages", ([(4, 9)], [(3, 3, 4)], [(3, 8), (6, 2, 4)]))
@pytest.mark.parametrize("seed", range(12))
def test_a_run_that_stops_early_gives_the_same_answers(pair, stages, seed):
    """Of both votes; each path is the beginning of what it would have been, and no token is
    added."""
    model, stop = pair
    prompt = random_ids(7, seed=seed).tolist()
    how = SAMPLING | {"stages": stages, "max_new_tokens": 40, "eos_ids": ENDS}
    whole = launch.launch_check_resume(model, stop, prompt, 12, **how)
    decider = Decider(answer_of)
    early = launch.launch_check_resume(model, stop, prompt, 12, watcher=decider, **how)
    for weights_of in (lambda path: 1.0, lambda path: path.score):
        votes = []
        for paths in (whole, early):
            finished = [path for path in paths if path.status in ("eos", "length")]
            answers = [answer_of(path) for path in finished]
            votes.append(vote(answers, [weights_of(path) for path in finished]))
        assert equal(*votes)
    for path, full in zip(early, whole, strict=True):
        assert path.name == full.name and path.ids == full.ids[:len(path.ids)]
        assert path.ids == full.ids or path.status == "decided"


class Shifted(StopSignal):
    """Another signal than a chance: some or all of its scores are below zero."""

    def __init__(self, model, stop, shift):
        super().__init__(model, stop)
        self.shift = shift

    def of_live(self, batch):
        return super().of_live(batch) - self.shift

    def of_ended(self, paths, batch):
        return super().of_ended(paths, batch) - self.shift


@pytest.mark.parametrize("shift", (0.5, 2.0))
def test_scores_that_are_no_weights_have_no_vote(pair, shift):
    """The vote of the whole run is the majority's then, and a run that is ended early says the
    same."""
    model, stop = pair
    ended_early = 0
    for seed in range(12):
        prompt = random_ids(7, seed=seed).tolist()
        how = SAMPLING | {"stages": [(4, 9)], "max_new_tokens": 40, "eos_ids": ENDS,
                          "signal": Shifted(model, stop, shift)}
        answers = []
        for watcher in (Watcher(), Decider(answer_of)):
            paths = launch.launch_check_resume(model, stop, prompt, 12, watcher=watcher, **how)
            ended_early += any(path.status == "decided" for path in paths)
            voting = [path for path in paths if path.status in ("eos", "length")]
            found = [answer_of(path) for path in voting]
            answers.append(decide(found, [path.score for path in voting]))
        assert equal(*answers)
    assert ended_early >= 1


def test_a_decided_run_takes_fewer_tokens(pair):
    """Not always, but in some of the cases above: otherwise nothing is tested there."""
    model, stop = pair
    fewer = 0
    for seed in range(12):
        prompt = random_ids(7, seed=seed).tolist()
        paths = launch.launch_check_resume(
            model, stop, prompt, 12, stages=[(4, 9)], max_new_tokens=40, eos_ids=ENDS,
            watcher=Decider(answer_of), **SAMPLING)
        fewer += any(path.status == "decided" for path in paths)
    assert fewer >= 2


# --------------------------------------------------------------------------------------- branching


def fold(key, part):
    """splitmix64 of key ^ part, in Python's own numbers."""
    x = ((key ^ part) + 0x9E3779B97F4A7C15) % 2 ** 64
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2 ** 64
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2 ** 64
    return x ^ (x >> 31)


@torch.inference_mode()
def go_on(model, prompt, index, ids, turns, until, seed=5):
    """The tokens of a path from `ids` on, by passes over all of it. turns: [(length, branch),
    ...]."""
    key = 0
    for part in (seed, *prompt, index):
        key = fold(key, part)
    for length, branch in turns:
        if branch > 0:
            key = fold(fold(key, length), branch)
    ids = list(ids)
    while len(ids) < until and not (ids and ids[-1] in ENDS):
        logits = model.logits(model(torch.tensor([prompt + ids]))[:, -1])
        noise = (fold(key, len(ids)) >> 11) * 2.0 ** -53
        probs = probabilities(logits, 1.0, 0, 1.0)
        ids += draw(probs, torch.tensor([noise], dtype=torch.float64)).tolist()
    return ids


def run(pair, n, stages, limit=20, seed=5, watcher=Watcher(), eos_ids=ENDS, batch=Batch):
    """Paths of a run by name."""
    model, stop = pair
    paths = launch_check_resume(
        model, stop, PROMPT, n, stages=stages, max_new_tokens=limit, eos_ids=eos_ids,
        watcher=watcher, new_batch=batch, **SAMPLING | {"seed": seed})
    assert len({path.name for path in paths}) == len(paths)
    return {path.name: path for path in paths}


@pytest.mark.parametrize("stages", ([(4, 3)], [(3, 8), (6, 2)]))
def test_one_branch_is_plain_pruning(pair, stages):
    """b = 1, bit for bit: names, tokens, scores and states of the paths."""
    plain = run(pair, 12, stages)
    branched = run(pair, 12, [(*stage, 1) for stage in stages])
    assert {name: vars(path) for name, path in plain.items()} == \
        {name: vars(path) for name, path in branched.items()}
    assert all(path.branches == () and path.inherited == 0 for path in plain.values())


def test_branch_0_is_the_path_itself(pair):
    """The parent goes on as if nothing had happened, to the token of an uninterrupted run."""
    model, _ = pair
    whole = generate(model, [PROMPT], 12, 20, eos_ids=ENDS, **SAMPLING)[0]
    paths = run(pair, 12, [(3, 4, 3), (6, 4, 2)])
    firsts = [path for path in paths.values() if set(path.branches) <= {0}]
    assert len(firsts) == 12
    for path in firsts:
        assert path.ids == whole[path.index].ids[:len(path.ids)]
        assert path.status in ("pruned", whole[path.index].status)


def test_branches_have_noise_of_their_own(pair):
    """Each branch, at one check and at two, token for token as a sampler by hand gives it, with the
    hash chain written out."""
    model, _ = pair
    stages = [(3, 4, 3), (6, 4, 2)]
    paths = run(pair, 12, stages)
    new = [path for path in paths.values() if set(path.branches) - {0}]
    assert {len(path.branches) for path in new} == {1, 2} and len(new) > 4
    for path in new:
        turns = list(zip((3, 6), path.branches))
        first_turn = next(length for length, branch in turns if branch > 0)
        model_ids = go_on(model, PROMPT, path.index, [], [], first_turn)
        expected = model_ids
        for turn in range(1, len(turns) + 1):
            until = 6 if turn < len(turns) or len(turns) == 1 and path.status == "pruned" else 20
            expected = go_on(model, PROMPT, path.index, expected, turns[:turn], until)
        assert path.ids == expected[:len(path.ids)], path.name
        assert path.status == "pruned" or path.ids == expected


def test_a_branch_does_not_depend_on_the_others(pair):
    """Not on how many paths were launched, kept or branched: paths of one name are the same."""
    runs = [run(pair, n, [(3, keep, branch)])
            for n, keep, branch in ((12, 12, 3), (12, 6, 2), (8, 8, 2), (8, 4, 5))]
    compared = 0
    for paths in runs[1:]:
        for name, path in paths.items():
            other = runs[0].get(name)
            if other is not None and "pruned" not in (path.status, other.status):
                compared += bool(path.branches)
                assert path.ids == other.ids
    assert compared > 10


def test_branches_differ(pair):
    """Copies of one path part ways, and those of another seed take another."""
    paths = run(pair, 6, [(3, 2, 4)], eos_ids=())
    others = run(pair, 6, [(3, 2, 4)], seed=6, eos_ids=())
    for index in {path.index for path in paths.values() if path.branches}:
        family = [tuple(path.ids) for path in paths.values() if path.index == index]
        assert len(set(family)) == len(family) == 4
        assert len({ids[:3] for ids in family}) == 1
    long = {tuple(path.ids) for path in paths.values() if path.status == "length"}
    assert len(long) == 8
    assert long.isdisjoint(tuple(path.ids) for path in others.values())


def test_ended_paths_are_never_revived(pair):
    """A path that ended before the check may be kept: it stays one path, as long as it was."""
    model, _ = pair
    whole = generate(model, [PROMPT], 12, 20, eos_ids=ENDS, **SAMPLING)[0]
    paths = run(pair, 12, [(5, 12, 3), (9, 36, 2)])
    early = [path for path in whole if len(path.ids) <= 5 and path.status == "eos"]
    assert 2 <= len(early) < 12
    for path in early:
        family = [other for other in paths.values() if other.index == path.index]
        assert [other.ids for other in family] == [path.ids]
        assert family[0].branches == () and family[0].status == "eos"
    twice = [path for path in paths.values() if len(path.branches) == 2]
    once = [path for path in paths.values() if len(path.branches) == 1]
    assert twice and once and all(5 < len(path.ids) <= 9 for path in once)


@pytest.mark.parametrize("kind", (sample.Batch, Batch))
def test_tokens_are_counted_once(pair, kind):
    """What the batch decodes is what the paths hold, a shared prefix once; each path says how much
    it inherited."""
    batches = []

    class Counting(kind):
        def __init__(self, *args):
            super().__init__(*args)
            batches.append(self)

    paths = run(pair, 12, [(3, 4, 3), (6, 4, 2)], batch=Counting)
    assert batches[0].decoded == sum(len(path.ids) - path.inherited for path in paths.values())
    by_ids = {tuple(path.ids) for path in paths.values()}
    prefixes = set()
    for path in paths.values():
        start = path.inherited
        prefixes |= {(path.name, length) for length in range(start, len(path.ids))}
        assert start in (0, 3, 6) and (start == 0) == (set(path.branches) <= {0})
    assert len(prefixes) == batches[0].decoded and len(by_ids) > 12


@pytest.mark.parametrize("kind", (sample.Batch, Batch))
def test_the_cache_holds_the_kept_rows_only(pair, kind):
    """Work done is work counted: after a check as many rows as paths that run."""
    rows = []

    class Watched(kind):
        def resume(self, copies, capacity):
            new_paths = super().resume(copies, capacity)
            rows.append((copies, self.cache.rows, len(self.cache.keys[0]), len(new_paths)))
            return new_paths

    run(pair, 12, [(3, 4, 3), (6, 4, 2)], eos_ids=(), batch=Watched)
    assert rows == [(3, 12, 12, 8), (2, 8, 8, 4)]


def test_a_path_that_ends_between_two_checks_is_scored_whole(pair):
    """Its score at the first check was that of its prefix; at the second it stands for all of
    it."""
    model, stop = pair
    seen = {}

    def told(checkpoint, paths, kept):
        seen[checkpoint] = {path.name: path.score for path in paths}

    paths = run(pair, 12, [(3, 12), (9, 12)], watcher=Told(told))
    between = [path for path in paths.values() if path.status == "eos" and 3 < len(path.ids) < 9]
    assert len(between) >= 2
    whole = stop.score(model, [PROMPT + path.ids for path in between]).tolist()
    for path, score in zip(between, whole):
        assert path.score == pytest.approx(score, abs=1e-5)
    assert any(abs(seen[3][path.name] - path.score) > 1e-3 for path in between)


def test_weights_are_those_of_the_last_check(pair):
    """A branch votes with the score of the prefix that it was branched from."""
    paths = run(pair, 12, [(3, 4, 3)])
    for path in paths.values():
        if path.branches:
            parent = paths[f"{path.index}.0"]
            assert path.score == parent.score
    scores = np.array([path.score for path in paths.values()])
    assert np.isfinite(scores).all() and not math.isclose(scores.min(), scores.max())


def test_names_do_not_change_before_their_check_is_told(pair):
    """A path that branches has no other name than those beside it while its check is shown."""
    names = []

    def told(checkpoint, checked, kept):
        names.append([path.name for path in checked])

    run(pair, 12, [(3, 4, 3), (6, 4, 2)], watcher=Told(told))
    assert names[0] == [str(number) for number in range(12)]
    assert {name.count(".") for name in names[1]} <= {0, 1}
