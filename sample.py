"""Batched sampling on the static cache (section 5 has the settings), and paths stored for later
use.

python sample.py --model DIR --prompt "What is 1 + 1?" --n 8

A path's noise for its t-th new token is a hash of (seed, prompt, path index, t): neither another
row of the batch, nor the number of rows, nor who was pruned has a part in it.

Letters: B rows, V vocabulary.
"""
import plumbing  # first: what is imported next takes seconds (plumbing/__init__.py)

import collections
import dataclasses
import math

import numpy as np
import torch

from plumbing import memory
from plumbing.cuda_graph import DecodeStep

# splitmix64's constants, as the signed 64-bit numbers that torch can hold
GOLDEN = 0x9E3779B97F4A7C15 - 2 ** 64
FACTOR_1 = 0xBF58476D1CE4E5B9 - 2 ** 64
FACTOR_2 = 0x94D049BB133111EB - 2 ** 64
SPARE = 256  # logits looked at beyond the k largest, so that ties with the k-th are seen


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
    Sampling(temperature, top_k, top_p)  # refuses what describes no distribution
    logits = logits.float()
    if temperature < 1e-30:  # so small a number would divide to nan
        peak, best = logits.max(-1, keepdim=True)
        one = peak - peak + 1  # nan where the logits are not finite, which `draw` shows as V
        return torch.zeros_like(logits).scatter_(-1, best, one)
    logits = (logits - logits.amax(-1, keepdim=True)).div_(temperature)
    V = logits.shape[-1]
    if top_k == 0 or top_k > V:
        top_k = V
    if top_k == V and top_p == 1:
        return logits.softmax(-1)

    # Totals in float64: rounded to float32 they do not depend on the zeros between (see `choose`).
    largest = _largest(logits, top_k)
    weights = logits.exp().mul_(logits >= largest[..., -1:])
    if top_p < 1:
        mass = largest.exp()
        before = mass.cumsum(-1) - mass  # of the tokens larger than each
        stays = before < top_p * weights.sum(-1, keepdim=True, dtype=torch.float64)
        last = (stays.sum(-1, keepdim=True) - 1).clamp(min=0)  # a row of nan has none that stays
        weights.mul_(logits >= largest.gather(-1, last))
    total = weights.sum(-1, keepdim=True, dtype=torch.float64)
    return weights.div_(total.float())


def _largest(logits, count):
    """The `count` largest of logits (..., V), in falling order."""
    if logits.device.type == "cpu" and logits.shape[-1] <= 1024:  # numpy is faster there
        array = logits.detach().numpy()
        top = np.sort(np.partition(array, -count)[..., -count:])
        return torch.from_numpy(top).flip(-1)
    return logits.topk(count).values


def draw(probs, noise):
    """The smallest token whose cumulative probability exceeds noise * total.
    probs (B, V), noise (B,) float64 in [0, 1) -> (B,) int64."""
    cumulative = probs.cumsum(-1, dtype=torch.float64)
    target = noise[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, target, right=True)[:, 0]


def choose(logits, noise, sampling):
    """The token that `draw` takes from `probabilities` for each row: logits (B, V), noise (B,) ->
    (B,).

    A large vocabulary is not looked at in full. The k + SPARE largest logits, put back in the
    order of their ids, give the same distribution and the same cumulative sums. Only where the
    smallest of them still ties with the k-th may there be more: such a row is done in full."""
    temperature, top_k, top_p = sampling.temperature, sampling.top_k, sampling.top_p
    count = top_k + SPARE
    if top_k == 0 or count >= logits.shape[-1]:
        return draw(probabilities(logits, temperature, top_k, top_p), noise)
    largest = logits.topk(count)  # (B, count), falling
    ids, order = largest.indices.sort(-1)
    candidates = largest.values.gather(-1, order)
    place = draw(probabilities(candidates, temperature, top_k, top_p), noise)
    beyond = place == count  # nan or infinity: no place at all
    tokens = ids.gather(-1, place.clamp(max=count - 1)[:, None])[:, 0]
    tokens = torch.where(beyond, logits.shape[-1], tokens)
    fall = (largest.values.float() - largest.values[:, :1].float()).div_(max(temperature, 1e-30))
    tied = fall[:, -1] == fall[:, top_k - 1]
    if tied.any():
        probs = probabilities(logits[tied], temperature, top_k, top_p)
        tokens[tied] = draw(probs, noise[tied])
    return tokens


# -------------------------------------------------------------------------------- paths and batch


@dataclasses.dataclass
class Path:
    """One sampled path. `ids` are its new tokens only, an end token included."""
    prompt_ids: list
    index: int                     # which path of its prompt: it fixes the noise
    ids: list = dataclasses.field(default_factory=list)
    status: str = "running"        # running (or waiting), eos, length, pruned, decided (stop.py)
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


class Prompts:
    """Prompts that were read once and are copied to every row where one of their paths begins."""
    AHEAD = 16  # prompts read in one go

    def __init__(self, model, sampling):
        self.model = model
        self.sampling = sampling
        self.cache = None
        self.places = {}  # prompt -> its row in `cache`
        self.keys = {}    # prompt -> its folded noise key

    def read(self, paths, waiting):
        """Make sure that the prompts of `paths` are read; if not, with some of those `waiting`."""
        wanted = {tuple(path.prompt_ids) for path in paths}
        if wanted <= self.places.keys():
            return
        for path in waiting:
            if len(wanted) >= self.AHEAD:
                break
            wanted.add(tuple(path.prompt_ids))
        prompts = sorted(wanted, key=len)  # like lengths together: little padding
        self.cache, _ = prefill(self.model, prompts)
        # The last token of a prompt is decoded as a path's newest token is: in the next step.
        self.cache.set_lengths([len(prompt) - 1 for prompt in prompts])
        self.places = {prompt: row for row, prompt in enumerate(prompts)}
        self.keys = {prompt: prompt_key(self.sampling.seed, prompt) for prompt in prompts}


class Batch:
    """Paths decoded together on one static cache: row r of the cache is the path live[r].

    More paths than rows wait, and begin as rows become free. A path's newest token (or its prompt's
    last one) is `pending`: not yet in the cache. `settle` puts it there and gives the hidden states
    from which the next tokens are drawn. `decoded` counts rows x steps as they were computed.
    """
    BEGIN_AT_ONCE = 64
    SORT_EVERY = 32  # steps until rows of like length are put side by side: they read fewer slots

    def __init__(self, model, paths, rows, capacity, limit, sampling, eos_ids=None, bar=None,
                 on_end=None):
        """rows: at most so many at a time. capacity: positions of a row. limit: new tokens of a
        path. bar: of plumbing.progress, counts tokens, its total at first limit x paths.
        on_end(path) is called as each path ends."""
        self.model = model
        self.waiting = collections.deque(paths)
        self.limit = limit
        self.sampling = sampling
        self.eos_ids = set(model.config.eos_ids if eos_ids is None else eos_ids)
        self.bar = bar
        self.on_end = on_end
        self.prompts = Prompts(model, sampling)
        self.model_step = DecodeStep(model)
        self.steps = 0
        self.decoded = 0

        rows = min(rows, len(self.waiting))
        device = model.device
        self.cache = model.new_cache(rows, capacity)
        self.live = [None] * rows
        self.free = []  # rows whose path has ended
        self.keys = torch.zeros(rows, dtype=torch.int64, device=device)     # (B,) of the noise
        self.drawn = torch.zeros(rows, dtype=torch.int64, device=device)    # (B,) new tokens so far
        self.pending = torch.zeros(rows, dtype=torch.int64, device=device)  # (B,) token ids
        self.hidden = None  # (B, hidden) once the pending tokens are in the cache
        self._begin(list(range(rows)))

    def decode(self, until):
        """Decode until each path has ended or holds `until` new tokens. Then only running ones are
        live. ValueError while paths wait and `until` is less than their limit: no row would become
        free for them."""
        if self.waiting and until < self.limit:
            raise ValueError(f"until: found {until}, expected the limit of {self.limit} while "
                             f"{len(self.waiting)} paths wait for a row")
        while any(path.status == "running" and len(path.ids) < until for path in self.live):
            self.settle()
            tokens = self._draw()
            self._append(tokens)
            self._fill_free_rows()
        self._keep_running()

    def settle(self):
        """Put the pending tokens into the cache, so that it holds every path in full."""
        if self.hidden is None and self.live:
            self.hidden = self.model_step(self.pending, self.cache)

    def prune(self, paths, status="pruned"):
        """These paths end here, and their rows leave the batch."""
        for path in paths:
            if path.status == "running":
                self._end(path, status)
            path.status = status  # also of one that ended before: its end was told then
        self._keep_running()

    def finish(self, status):
        """All paths end here; what waits never begins."""
        self.waiting.clear()
        for path in self.live:
            if path.status == "running":
                self._end(path, status)

    def resume(self, copies, capacity):
        """Go on with the live paths in rows of `capacity` positions, each as `copies` paths.
        Returns the new paths. A copy differs from now on: its branch is folded into its noise."""
        live = []
        rows = []
        new_paths = []
        for row, path in enumerate(self.live):
            branched = [path.branch(number) for number in range(1, copies)]
            if branched:
                path.branches += (0,)  # copy 0 is the path itself
            rows += [row] * copies
            live += [path, *branched]
            new_paths += branched
        if not rows:
            return []
        self.live = live
        self.cache.rebuild(rows, capacity)
        self.model_step.forget()
        self.drawn = self.drawn[rows]
        self.pending = self.pending[rows]
        if self.hidden is not None:
            self.hidden = self.hidden[rows]
        keys = self.keys[rows]
        number = torch.arange(len(rows), device=keys.device) % copies  # 0, 1, .. of each path
        self.keys = torch.where(number == 0, keys, branch_key(keys, self.drawn, number))
        if self.bar is not None:
            self.bar.total += sum(self.limit - len(path.ids) for path in new_paths)
        return new_paths

    def _begin(self, rows):
        """The next waiting paths begin in these rows: each is a copy of its prompt's."""
        for start in range(0, len(rows), self.BEGIN_AT_ONCE):
            self._begin_some(rows[start:start + self.BEGIN_AT_ONCE])

    def _begin_some(self, rows):
        """A few of them, so that few prompts are held beside the rows."""
        paths = [self.waiting.popleft() for _ in rows]
        self.prompts.read(paths, self.waiting)
        prompts = [tuple(path.prompt_ids) for path in paths]
        places = [self.prompts.places[prompt] for prompt in prompts]
        self.cache.copy_rows(rows, self.prompts.cache, places)
        keys = [mix(self.prompts.keys[prompt] ^ path.index) for prompt, path in zip(prompts, paths)]
        for row, path in zip(rows, paths):
            self.live[row] = path
        self.keys[rows] = self._to_device(np.array(keys, np.uint64).view(np.int64))
        self.drawn[rows] = 0
        self.pending[rows] = self._to_device([prompt[-1] for prompt in prompts])

    def _to_device(self, numbers):
        return torch.as_tensor(numbers, dtype=torch.int64).to(self.model.device)

    def _draw(self):
        """The next token (B,) of every row; it becomes the pending one."""
        logits = self.model.logits(self.hidden)  # (B, V)
        noise = uniform(self.keys, self.drawn)
        at_once = 2 ** 24 if logits.is_cuda else 2 ** 20  # numbers in a temporary
        block = max(1, at_once // logits.shape[-1])
        tokens = []
        for part, numbers in zip(logits.split(block), noise.split(block)):
            tokens.append(choose(part, numbers, self.sampling))
        finite = logits.sum(-1, dtype=torch.float32).isfinite()  # no NaN or infinity in a row
        self.pending = torch.where(finite, torch.cat(tokens), logits.shape[-1])
        self.hidden = None
        self.drawn += 1
        self.steps += 1
        self.decoded += len(self.live)
        return self.pending.tolist()  # the step's one wait for the device

    def _append(self, tokens):
        """Each running path takes its token, and ends if it is an end token or the last one
        allowed."""
        if self.bar is not None:
            self.bar.update(len(self.live) - len(self.free))
        if max(tokens) >= self.model.config.vocab_size:  # what `_draw` gives for such a row
            raise ValueError("logits: found NaN or infinity, expected finite numbers (overflow in "
                             f"{self.cache.keys[0].dtype}, or damaged weights)")
        ended = []
        for row, path in enumerate(self.live):
            if path.status != "running":
                continue
            path.ids.append(tokens[row])
            if tokens[row] in self.eos_ids:
                path.status = "eos"
            elif len(path.ids) == self.limit:
                path.status = "length"
            if path.status != "running":
                self.free.append(row)
                ended.append(path)
        for path in ended:  # behind the loop: on_end may `finish` others, but none of this step's
            self._end(path, path.status)

    def _end(self, path, status):
        path.status = status
        if self.bar is not None:
            self.bar.total -= self.limit - len(path.ids)
        if self.on_end is not None:
            self.on_end(path)

    def _fill_free_rows(self):
        """Rows of ended paths take waiting paths; when none waits, they leave the batch."""
        if self.waiting and self.free:
            taken = self.free[:len(self.waiting)]
            self.free = self.free[len(taken):]
            self._begin(taken)
        is_full = self.cache.longest == self.cache.capacity  # a row of an ended path grows on
        if len(self.free) >= self.model_step.group or is_full:
            self._keep_running()
        # While paths wait, every free row was just filled: no row number in `free` goes stale.
        if self.waiting and self.steps % self.SORT_EVERY == 0 and not self.model_step.captured:
            self._rearrange(np.argsort(-self.cache.counts).tolist())

    def _keep_running(self):
        """Go on with the rows of running paths only. A row moves only into the place of one that
        left: of live a b c d, where b has ended: a d c, and only d is copied."""
        running = [row for row, path in enumerate(self.live) if path.status == "running"]
        self.free = []
        if len(running) == len(self.live):
            return
        staying = set(running)
        order = []
        for place in range(len(running)):
            order.append(place if place in staying else running.pop())
        self._rearrange(order)

    def _rearrange(self, order):
        """Row j of the batch and of its cache becomes the old row order[j]."""
        self.live = [self.live[row] for row in order]
        self.cache.keep(order)
        self.keys = self.keys[order]
        self.drawn = self.drawn[order]
        self.pending = self.pending[order]
        if self.hidden is not None:
            self.hidden = self.hidden[order]


# ------------------------------------------------------------------------------------ whole prompts


def check_prompts(model, prompts, longest):
    """Raise ValueError unless every prompt is a non-empty list of known token ids with room for
    `longest` more in the model's context."""
    vocab = model.config.vocab_size
    context = model.config.max_position_embeddings
    for i, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(f"prompt {i}: found no token, expected at least one")
        if len(prompt) + longest > context:
            raise ValueError(
                f"prompt {i}: {len(prompt)} tokens and {longest} new ones exceed the context "
                f"of {context}")
        for token in prompt:
            if not 0 <= token < vocab:
                raise ValueError(
                    f"prompt {i}: token id {token} lies outside the vocabulary of {vocab}")


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


@torch.inference_mode()
def sample_all(model, prompts, n, limit, sampling, on_complete, eos_ids=None, batch=None, bar=None,
               on_end=None):
    """Sample n paths of at most `limit` new tokens for each prompt, with freed rows taking the
    next path at once. on_complete(i, paths) is called as soon as all n paths of prompts[i] have
    ended, in whatever order that happens; then they are let go. The rest as in `generate`."""
    check_prompts(model, prompts, limit)
    memory.require_paths(len(prompts) * n)
    paths = []
    unfinished = {}  # prompt number -> its paths so far, of which some still run
    for number, prompt in enumerate(prompts):
        unfinished[number] = [Path(list(prompt), index, prompt_number=number) for index in range(n)]
        paths += unfinished[number]
    if not paths:
        return
    running = collections.Counter({number: n for number in unfinished})

    def ended(path):
        if on_end is not None:
            on_end(path)
        running[path.prompt_number] -= 1
        if running[path.prompt_number] == 0:
            on_complete(path.prompt_number, unfinished.pop(path.prompt_number))

    capacity = max(len(prompt) for prompt in prompts) + limit
    rows = memory.choose_rows(model, capacity, batch)
    group = Batch(model, paths, rows, capacity, limit, sampling, eos_ids, bar, ended)
    paths.clear()  # or it would keep the paths of finished prompts alive
    group.decode(until=limit)


def generate(model, prompts, n=1, max_new_tokens=1024, temperature=0.6, top_k=40, top_p=0.95,
             seed=0, eos_ids=None, batch=None, bar=None, on_end=None):
    """n paths for each prompt (a list of token ids): a list, per prompt, of n finished Path.

    eos_ids: end tokens (None: the model's own). batch: rows at a time (None: as many as fit the
    free memory), which changes no token. bar: of plumbing.progress, counts tokens. on_end(path) is
    called as each path ends. Raises ValueError on bad settings, or as `check_prompts` does."""
    for name, value in (("n", n), ("max_new_tokens", max_new_tokens), ("batch", batch)):
        if value is not None and value < 1:
            raise ValueError(f"{name}: found {value}, expected at least 1")
    sampling = Sampling(temperature, top_k, top_p, seed)
    results = [None] * len(prompts)

    def take(number, paths):
        results[number] = paths

    sample_all(model, prompts, n, max_new_tokens, sampling, take, eos_ids, batch, bar, on_end)
    return results


def sampling_of(settings):
    """The Sampling in a script's settings."""
    return Sampling(settings.temperature, settings.top_k, settings.top_p, settings.seed)


if __name__ == "__main__":
    from commands.sample import main
    main()
