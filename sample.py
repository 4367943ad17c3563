"""Batched sampling on the static cache (section 5 has the settings).

    python sample.py --model DIR --prompt "What is 1 + 1?" --n 8
    python sample.py --model DIR --data problems.jsonl --problems 3

A path's noise for its t-th new token is a hash of (seed, prompt, path index, t): neither another
row of the batch, nor the number of rows, nor who was pruned has a part in it. So a batch that works
in another order draws the same tokens (up to the logits' last bits, which differ with its shape):
engine/refill.py is the one that the scripts run.

Letters: B rows, V vocabulary.
"""
import plumbing  # first: what is imported next takes seconds (plumbing/__init__.py)

import dataclasses
import math

import numpy as np
import torch

from plumbing import memory
from plumbing.grading import grade

# splitmix64's constants, as the signed 64-bit numbers that torch can hold
GOLDEN = 0x9E3779B97F4A7C15 - 2 ** 64
FACTOR_1 = 0xBF58476D1CE4E5B9 - 2 ** 64
FACTOR_2 = 0x94D049BB133111EB - 2 ** 64


@dataclasses.dataclass(frozen=True)
class Sampling:
    """What a path's tokens depend on besides its prompt. The defaults are the paper's (section 5).
    Raises ValueError on settings that describe no distribution."""
    temperature: float = 0.6  # 0 = greedy
    top_k: int = 40           # 0 = off
    top_p: float = 0.95       # 1 = off
    seed: int = 0

    def __post_init__(self):
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature: found {self.temperature}, expected a number >= 0")
        if self.top_k < 0:
            raise ValueError(f"top-k: found {self.top_k}, expected an integer >= 0 (0 = off)")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top-p: found {self.top_p}, expected a number in (0, 1] (1 = off)")
        if not -2 ** 63 <= self.seed < 2 ** 64:
            raise ValueError(f"seed: found {str(self.seed)[:60]}, expected an integer of 64 bits")


# ------------------------------------------------------------------------------------------- noise


def shift_right(x, bits):
    """x >> bits as on unsigned 64-bit numbers: the sign is not repeated."""
    return (x >> bits) & (2 ** (64 - bits) - 1)


def mix(x):
    """splitmix64 of a Python int, or of each number of an int64 tensor: 64 well-mixed bits."""
    x = x + GOLDEN
    x = (x ^ shift_right(x, 30)) * FACTOR_1
    x = (x ^ shift_right(x, 27)) * FACTOR_2
    x = x ^ shift_right(x, 31)
    return x % 2 ** 64 if isinstance(x, int) else x  # a Python int has grown beyond its 64 bits


def prompt_key(seed, prompt_ids):
    """splitmix64 folded over the seed and the ids of a prompt: key = mix(key ^ part), from 0."""
    key = 0
    for part in (seed, *prompt_ids):
        key = mix(key ^ part)
    return key


def path_key(seed, prompt_ids, index):
    """The 64-bit key of path `index` of a prompt: the index is folded last."""
    return mix(prompt_key(seed, prompt_ids) ^ index)


def branch_key(key, length, branch):
    """The key of branch 1, 2, ... of a path that branches when it holds `length` new tokens.
    Branch 0 goes on with the path's own key. All three may be tensors."""
    return mix(mix(key ^ length) ^ branch)


def uniform(keys, position):
    """The top 53 bits of mix(key ^ position) as a number in [0, 1).
    keys (B,) int64 with the bits of `path_key`, position an int or (B,) -> (B,) float64."""
    bits = shift_right(mix(keys ^ position), 11)
    return bits.double() * 2.0 ** -53


# ------------------------------------------------------------------------------ logits to token


def probabilities(logits, temperature=0.6, top_k=40, top_p=0.95):
    """Probabilities (..., V) float32 of logits (..., V): temperature, then top-k (the k largest),
    then top-p (the smallest set of the largest with a mass of p), then softmax.

    A tie with the last token kept stays, in both. top_k 0 and top_p 1 are off. Temperature 0 is
    one-hot at the largest logit, the lowest id of equals."""
    return distribution(logits, Sampling(temperature, top_k, top_p))


def largest_of(logits, k):
    """The k largest of logits (..., V), in falling order."""
    return logits.topk(k).values


def distribution(logits, sampling, k_largest=largest_of):
    """`probabilities` for a Sampling, whose settings have been validated. k_largest: what finds
    them (engine/draw.py has a faster way for small vocabularies)."""
    logits = logits.float()
    if sampling.temperature < 1e-30:  # so small a number would divide to nan
        best = logits.argmax(-1, keepdim=True)
        return torch.zeros_like(logits).scatter_(-1, best, 1.0)
    logits = (logits - logits.amax(-1, keepdim=True)).div_(sampling.temperature)
    V = logits.shape[-1]
    k = V if sampling.top_k == 0 else min(sampling.top_k, V)
    if k == V and sampling.top_p == 1:
        return logits.softmax(-1)

    # Totals in float64: rounded to float32 they do not depend on the zeros between, so that
    # engine/draw.py gets the same numbers from the likeliest tokens' logits alone.
    largest = k_largest(logits, k)
    weights = logits.exp().mul_(logits >= largest[..., -1:])
    if sampling.top_p < 1:
        # A token stays if those before it weigh less than p of all; the first stays always.
        mass = largest.exp().double()
        before = mass.cumsum(-1) - mass
        stays = before < sampling.top_p * weights.sum(-1, keepdim=True, dtype=torch.float64)
        place_of_last = stays[..., 1:].sum(-1, keepdim=True)
        weights.mul_(logits >= largest.gather(-1, place_of_last))
    total = weights.sum(-1, keepdim=True, dtype=torch.float64)
    return weights.div_(total.float())


def draw(probs, noise):
    """The smallest token whose cumulative probability exceeds noise * total.
    probs (B, V), noise (B,) float64 in [0, 1) -> (B,) int64."""
    cumulative = probs.cumsum(-1, dtype=torch.float64)
    target = noise[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, target, right=True)[:, 0]


# -------------------------------------------------------------------------------- paths and batch


@dataclasses.dataclass
class Path:
    """One sampled path. `ids` are its new tokens only, an end token included."""
    prompt_ids: list
    index: int                     # which path of its prompt: it fixes the noise
    ids: list = dataclasses.field(default_factory=list)
    status: str = "running"        # running, eos, length, pruned (stop.py), decided (engine/)
    score: float | None = None     # at its last check, the chance that it ends right
    branches: tuple = ()           # at each branching, which of the copies it is
    inherited: int = 0             # how many of `ids` were decoded before it branched off
    prompt_number: int = 0         # which of the prompts that are sampled together

    @property
    def name(self):
        """Its index, with the branches that it took: 7, or 7.0.2."""
        return ".".join(str(number) for number in (self.index, *self.branches))

    def branch(self, number):
        """A copy of this path that goes its own way from here: its branch 1, 2, ..."""
        return dataclasses.replace(
            self, ids=list(self.ids), branches=self.branches + (number,), inherited=len(self.ids))


def prefill(model, prompts, extra=0):
    """Read prompts (lists of token ids, ragged) -> a KVCache with a row for each and room for
    `extra` more positions, and the hidden states (B, hidden) at the prompts' ends.

    Passes of at most PREFILL_TOKENS positions: several short prompts, or a piece of a long one."""
    cache = model.new_cache(len(prompts), max(len(prompt) for prompt in prompts) + extra)
    hidden = []
    start = 0
    while start < len(prompts):
        count = _prompts_of_one_pass(prompts, start)
        part, ends = _prefill_one_pass(model, prompts[start:start + count])
        cache.copy_rows(list(range(start, start + count)), part, list(range(count)))
        hidden.append(ends)
        start += count
    return cache, torch.cat(hidden)


def _prompts_of_one_pass(prompts, start):
    """How many prompts from `start` on share a pass, padded to the longest of them."""
    longest = 0
    for count, prompt in enumerate(prompts[start:]):
        longest = max(longest, len(prompt))
        if count > 0 and longest * (count + 1) > memory.PREFILL_TOKENS:
            return count
    return len(prompts) - start


def _prefill_one_pass(model, prompts):
    """A cache of these prompts, right-padded, and the hidden states (B, hidden) at their ends."""
    lengths = [len(prompt) for prompt in prompts]
    rows = [torch.tensor(prompt) for prompt in prompts]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(model.device)
    cache = model.new_cache(*ids.shape)
    pieces = [model(piece, cache=cache) for piece in ids.split(memory.PREFILL_TOKENS, 1)]
    cache.set_lengths(lengths)
    hidden = torch.cat(pieces, 1)  # (B, T, hidden)
    ends = [length - 1 for length in lengths]
    return cache, hidden[range(len(prompts)), ends]


class Batch:
    """Paths of one prompt, decoded together on one static cache: row r of it is the path live[r].

    A path's newest token (or its prompt's last one) is `pending`: not yet in the cache. `settle`
    puts it there and leaves in `hidden` the states from which the next tokens are drawn. `decoded`
    counts the tokens that were computed, rows x steps. It comes in small methods, of which
    engine/refill.py replaces some.
    """

    def __init__(self, model, paths, capacity, limit, sampling, eos_ids=None):
        """paths: new ones. capacity: positions of a row. limit: new tokens of a path. eos_ids: end
        tokens; None: the model's own."""
        self.model = model
        self.live = list(paths)
        self.limit = limit
        self.sampling = sampling
        self.eos_ids = set(model.config.eos_ids if eos_ids is None else eos_ids)
        self.decoded = 0
        self._launch(capacity)

    def _launch(self, capacity):
        """The prompt is read once, and every row begins as a copy of it."""
        rows = len(self.live)
        device = self.model.device
        prompt = self.live[0].prompt_ids
        assert all(path.prompt_ids == prompt for path in self.live)
        read, _ = prefill(self.model, [prompt])
        # Its last token is decoded as a path's newest token is: each step begins with a token that
        # is not yet in the cache, the first one too.
        read.set_lengths([len(prompt) - 1])
        self.cache = self.model.new_cache(rows, capacity)
        self.cache.copy_rows(list(range(rows)), read, [0] * rows)
        keys = [path_key(self.sampling.seed, prompt, path.index) for path in self.live]
        self.keys = as_int64(keys).to(device)                               # (B,) of the noise
        self.drawn = torch.zeros(rows, dtype=torch.int64, device=device)    # (B,) new tokens so far
        self.pending = torch.full((rows,), prompt[-1], device=device)       # (B,) token ids
        self.hidden = None  # (B, hidden) once the pending tokens are in the cache

    def decode(self, until):
        """Decode until each path has ended or holds `until` new tokens. Rows of ended paths leave
        the batch."""
        while any(len(path.ids) < until for path in self.live):
            self.settle()
            self._append(self._draw())
            self._keep_running()

    def settle(self):
        """Put the pending tokens into the cache, so that it holds every path in full."""
        if self.hidden is None and self.live:
            self.hidden = self.model(self.pending[:, None], cache=self.cache)[:, 0]

    def prune(self, paths):
        """These paths end here, and their rows leave the batch."""
        for path in paths:
            path.status = "pruned"
        self._keep_running()

    def resume(self, copies, capacity):
        """Go on with the live paths in rows of `capacity` positions, each as `copies` paths.
        Returns the new paths. A copy differs from now on: its branch is folded into its noise."""
        live = []
        rows = []
        new_paths = []
        for row, path in enumerate(self.live):
            branched = [path.branch(number) for number in range(1, copies)]  # from its name so far
            if branched:
                path.branches += (0,)  # copy 0 is the path itself
            live += [path, *branched]
            rows += [row] * copies
            new_paths += branched
        if rows:
            self.live = live
            self.cache.rebuild(rows, capacity)
            self._take_rows(rows)
            number = torch.arange(len(rows), device=self.keys.device) % copies  # 0, 1, .. of each
            branch_keys = branch_key(self.keys, self.drawn, number)
            self.keys = torch.where(number == 0, self.keys, branch_keys)
        return new_paths

    def _draw(self):
        """The next token of every row, a list; it becomes the pending one."""
        logits = self.model.logits(self.hidden)  # (B, V)
        require_finite(logits, "logits")
        probs = distribution(logits, self.sampling)
        return self._drew(draw(probs, uniform(self.keys, self.drawn)))

    def _drew(self, tokens):
        """Note the tokens (B,) that were drawn for the rows -> them as a list."""
        self.pending = tokens
        self.hidden = None
        self.drawn += 1
        self.decoded += len(self.live)
        return tokens.tolist()  # waits for the device

    def _append(self, tokens):
        """Each path takes its token, and ends if it is an end token or the last one allowed."""
        for path, token in zip(self.live, tokens):
            self._take(path, token)

    def _take(self, path, token):
        """A path's next token is this one."""
        path.ids.append(token)
        if token in self.eos_ids:
            path.status = "eos"
        elif len(path.ids) == self.limit:
            path.status = "length"

    def _keep_running(self):
        """Go on with the rows of running paths only."""
        running = [row for row, path in enumerate(self.live) if path.status == "running"]
        if len(running) < len(self.live):
            self._rearrange(running)

    def _rearrange(self, order):
        """Row j of the batch and of its cache becomes the old row order[j]."""
        self.live = [self.live[row] for row in order]
        self.cache.keep(order)
        self._take_rows(order)

    def _take_rows(self, rows):
        """The same for what is known of each row besides."""
        self.keys = self.keys[rows]
        self.drawn = self.drawn[rows]
        self.pending = self.pending[rows]
        if self.hidden is not None:
            self.hidden = self.hidden[rows]


def as_int64(keys):
    """A tensor (B,) int64 with the bits of 64-bit keys, Python ints."""
    return torch.from_numpy(np.array(keys, np.uint64).view(np.int64))


@torch.inference_mode()
def generate(model, prompts, n=1, max_new_tokens=1024, temperature=0.6, top_k=40, top_p=0.95,
             seed=0, eos_ids=None):
    """n paths for each prompt (a list of token ids): a list, per prompt, of n finished Path.

    eos_ids: end tokens (None: the model's own). Raises ValueError on bad settings, or as
    `validate_prompts` does. engine/refill.py has the same for many prompts and any memory."""
    sampling = Sampling(temperature, top_k, top_p, seed)
    require_counts(n=n, max_new_tokens=max_new_tokens)
    validate_prompts(model, prompts, max_new_tokens)
    groups = []
    for prompt in prompts:
        paths = [Path(list(prompt), index) for index in range(n)]
        capacity = len(prompt) + max_new_tokens
        batch = Batch(model, paths, capacity, max_new_tokens, sampling, eos_ids)
        batch.decode(until=max_new_tokens)
        groups.append(paths)
    return groups


def sample_paths(model, tokenizer, problems, n, limit, sampling):
    """n finished, graded paths of each problem: records in the order of the problems, {"id",
    "prompt_ids", "answers", "right", "paths"}, the last three with an entry a path. limit: new
    tokens of a path. engine/stored.py keeps them in a file."""
    records = []
    for problem in problems:
        prompt_ids = tokenizer.ask(problem)
        (paths,) = generate(model, [prompt_ids], n, limit, **vars(sampling))
        ids = [path.ids for path in paths]
        answers, right = grade(tokenizer, problem, ids)
        records.append({
            "id": problem.id,
            "prompt_ids": prompt_ids,
            "answers": answers,
            "right": right,
            "paths": ids})
    return records


# ------------------------------------------------------------------------------- what is asked for


def validate_prompts(model, prompts, new):
    """Raise ValueError unless every prompt is a non-empty list of known token ids with room for
    `new` more in the model's context."""
    vocab = model.config.vocab_size
    context = model.config.max_position_embeddings
    for i, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(f"prompt {i}: found no token, expected at least one")
        if len(prompt) + new > context:
            raise ValueError(
                f"prompt {i}: {len(prompt)} tokens and {new} new ones exceed the context "
                f"of {context}")
        for token in prompt:
            if not 0 <= token < vocab:
                raise ValueError(
                    f"prompt {i}: token id {token} lies outside the vocabulary of {vocab}")


def require_counts(**counts):
    """Raise ValueError unless each of these numbers is at least 1, or None."""
    for name, value in counts.items():
        if value is not None and value < 1:
            raise ValueError(f"{name}: found {value}, expected at least 1")


def require_finite(values, what):
    """Raise ValueError if a tensor holds NaN or infinity: nothing is printed, chosen or saved by
    one."""
    if not torch.isfinite(values).all():
        raise ValueError(f"{what}: found NaN or infinity, expected finite numbers (overflow in "
                         "float16, or weights or a learning rate that diverge)")


def room(model, prompt_ids, limit=None):
    """How many new tokens a path may have: `limit`, or what the context leaves, at most 16,384
    (section 5)."""
    if limit is not None:
        return limit
    return max(1, min(16384, model.config.max_position_embeddings - len(prompt_ids)))


def sampling_of(settings):
    """The Sampling in a script's settings."""
    return Sampling(settings.temperature, settings.top_k, settings.top_p, settings.seed)


def decoded_tokens(paths):
    """How many tokens were decoded for these paths: those that branches share were decoded once."""
    return sum(len(path.ids) - path.inherited for path in paths)


if __name__ == "__main__":
    from commands.sample import main
    main()
