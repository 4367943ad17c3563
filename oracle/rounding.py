"""How far numbers may lie off in float32, and what a difference of logits does to what follows.

The expected numbers are computed in float64; a right port in float32 lies some roundings away. How
far these carry depends on the input: so the plain decoder computes each entry in float32 too, and
ten times what that moved it is allowed, or the number here, whichever is more.
Needs the standard library alone.
"""
import math

STATES = 2e-5    # of an entry's largest number, at least of 1: of the decoder,
STOP_STATES = 5e-5  # and at the [STOP] positions
FLOAT32 = 10     # times what float32 moved in the plain decoder
LOGITS = 4e-6    # of sum |w h| + |b|, over what the head adds up
SCORES = 1e-6    # beside what the logits' own tolerance gives,
SMALL_SCORES = 1e-4  # or this share of the score, if that is less:
FLUSHED = 1e-37  # scores smaller than this need not differ from 0
LOSS = 1e-6      # of the loss, at least of 1, beside the same
GRADIENTS = 1e-4  # of a gradient's largest number, beside the same
ANGLES = 2.0 ** -23  # of a position, in radians: two roundings of an angle of at most that size


def log_odds(logits):
    """The number whose sigmoid is the score: one logit, or the second less the first."""
    return logits[0] if len(logits) == 1 else logits[1] - logits[0]


def sigmoid(z):
    """1 / (1 + exp(-z)), whatever its size."""
    if z >= 0:
        return 1 / (1 + math.exp(-z))
    return math.exp(z) / (1 + math.exp(z))


def softplus(z):
    """ln(1 + exp(z)), whatever its size."""
    return max(z, 0.0) + math.log1p(math.exp(-abs(z)))


def moves(function, logits, allowed):
    """How far a function of the log odds moves when each logit moves by `allowed`."""
    z = log_odds(logits)
    step = allowed * len(logits)
    return max(abs(function(z + step) - function(z)), abs(function(z - step) - function(z)))


def score_tolerance(logits, allowed):
    """How far a score may lie off whose logits may lie off by `allowed`. Small scores rank too: of
    them it is a share."""
    rounded = min(SCORES, SMALL_SCORES * sigmoid(log_odds(logits)) + FLUSHED)
    return rounded + moves(sigmoid, logits, allowed)


def loss_tolerance(loss, logits, labels, allowed):
    """How far the mean loss may lie off. logits, allowed: of each prefix; labels in [0, 1]."""
    total = 0.0
    for row, label, step in zip(logits, labels, allowed):
        total += moves(lambda z: softplus(z) - label * z, row, step)
    return LOSS * max(1.0, loss) + total / len(labels)
