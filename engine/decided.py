"""Ends a run as soon as its vote is decided, before all have voted: exact, so that nothing is lost
by stopping there. `stop.vote` on the paths of the whole run gives the same answer, as
tests/engine/test_votes.py says.
"""
import re

from plumbing.answers import same_vote
from stop import Watcher, are_weights

# Answers with one reading: numbers that are told apart beyond any rounding, and letters.
PLAIN = re.compile(
    r"-?[0-9]{1,8}|-?[0-9]{1,3}[./][0-9]{1,3}|-?\\frac\{[0-9]{1,3}\}\{[0-9]{1,3}\}|[A-Z]")
# 1234 may be written 1,234, which is the list 1, 234 too.
FOUR_DIGITS = re.compile(r"[0-9]{4}")


class Decider(Watcher):
    """Ends all paths as soon as neither vote, by majority or by score, can change any more; those
    that still ran are "decided". For runs on engine.refill.Batch. Scores that are no weights
    (`stop.are_weights`) have no vote."""

    def __init__(self, answer_of, kind="math"):
        """answer_of(path): its answer of this kind, or None."""
        self.answer_of = answer_of
        self.kind = kind
        self.answers = {}  # name of an ended path -> its answer
        self.batch = None
        self.paths = []

    def resumed(self, batch, paths):
        self.batch = batch
        self.paths = paths
        batch.on_end = self.ended
        self.end_if_decided()  # those that have ended already may decide it

    def ended(self, path):
        """A path has ended: by itself, or because it was decided."""
        if path.status != "decided":
            self.end_if_decided()

    def end_if_decided(self):
        """End the paths that still run if they cannot change a vote."""
        done = [path for path in self.paths if path.status != "running"]
        running = [path for path in self.paths if path.status == "running"]
        for path in done:
            if path.name not in self.answers:
                self.answers[path.name] = self.answer_of(path)
        found = [self.answers[path.name] for path in done]
        decided = is_decided(found, [1.0] * len(done), len(running), self.kind)
        scores = [path.score for path in done]
        if decided and are_weights(scores):
            open_scores = [path.score for path in running]
            if not are_weights(open_scores):
                return  # those that have voted must not be taken for all that vote by score
            decided = is_decided(found, scores, sum(open_scores), self.kind)
        if decided:
            self.batch.finish("decided")


def is_decided(answers, weights, outstanding, kind="math"):
    """Whether votes still out, `outstanding` of weight together, cannot change the winner of these.

    The bound holds whatever they say; it is exact, not the earliest. The winner counts only with
    votes that are spelled alike; an outstanding vote may be for anybody, and may even show two
    different answers to be equal, so answers that may turn out equal count together. A tie is
    never decided: order breaks it. Nor is a winner decided that may have more than one reading: an
    outstanding vote could show it to be another. (Another spelling of the winner that comes first
    in the end gives it its name: 1/2 for 0.5.)"""
    spelled = {}
    for answer, weight in zip(answers, weights):
        if answer is not None:
            spelled[answer] = spelled.get(answer, 0.0) + weight
    if not spelled:
        return False  # even a vote of no weight would name an answer
    winner = max(spelled, key=spelled.get)
    if not is_closed(winner):
        return False
    if any(is_equation(answer) and same_vote(answer, winner, kind) for answer in spelled):
        return False  # under the name x = 5, which an outstanding y = 5 could change
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


def is_closed(answer):
    """Whether all that equals an answer is equal."""
    return PLAIN.fullmatch(answer) is not None and not FOUR_DIGITS.search(answer)


def may_be_equal(one, other, kind):
    """Whether two spellings are the same answer, or a third could be the same as both.

    What equals a closed answer is equal, but for equations: x = 5 is 5, and is x - 5 = 0."""
    if same_vote(one, other, kind) or same_vote(other, one, kind):
        return True
    if PLAIN.fullmatch(one) and PLAIN.fullmatch(other):
        return False
    if is_closed(one):
        return is_equation(other)
    return not is_closed(other) or is_equation(one)


def is_equation(answer):
    """Whether an answer has an equals sign."""
    return "=" in answer or "＝" in answer
