"""Whether a vote is decided before all have voted: exact, so that nothing is lost by stopping
there."""
import re

from plumbing.answers import same_answer

OPEN_ENDED = re.compile(r"[0-9]{4}|,")  # 1,234 is 1234, and is the list 1, 234


def is_decided(answers, weights, outstanding, kind="math"):
    """Whether votes still out, `outstanding` of weight together, cannot change the winner of these.

    The bound holds whatever they say. The winner counts only with votes that are spelled alike; an
    outstanding vote may be for anybody, and may even show two different answers to be equal, so
    answers that may turn out equal count together. A tie is never decided: order breaks it. Nor is
    a winner decided that may be read in two ways: an outstanding vote could name it otherwise."""
    spelled = {}
    for answer, weight in zip(answers, weights):
        if answer is not None:
            spelled[answer] = spelled.get(answer, 0.0) + weight
    if not spelled:
        return False  # even a vote of no weight would name an answer
    winner = max(spelled, key=spelled.get)
    if OPEN_ENDED.search(winner):
        return False
    strongest = 0.0
    for group in groups_that_may_be_equal(spelled.keys() - {winner}, kind):
        strongest = max(strongest, sum(spelled[answer] for answer in group))
    margin = 1e-9 * (sum(spelled.values()) + outstanding)  # sums in another order round differently
    return spelled[winner] > strongest + outstanding + margin


def groups_that_may_be_equal(answers, kind):
    """The answers in lists: two that may be equal, directly or through others, are in the same
    one."""
    groups = []
    for answer in answers:
        joined = [answer]
        apart = []
        for group in groups:
            if any(may_be_equal(answer, other, kind) for other in group):
                joined += group
            else:
                apart.append(group)
        groups = [*apart, joined]
    return groups


def may_be_equal(one, other, kind):
    """Whether two spellings are the same answer, or a third could be the same as both."""
    if OPEN_ENDED.search(one) and OPEN_ENDED.search(other):
        return True
    return same_answer(one, other, kind) or same_answer(other, one, kind)
