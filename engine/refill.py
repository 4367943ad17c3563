"""`sample.Batch` and `sample.generate` for more paths than fit the memory at once, of many prompts:
a row whose path has ended takes the next path. tests/engine/test_refill.py and test_9_generate
(tests/test_invariants.py) compare them.
"""
import collections

import numpy as np
import torch

import sample
from engine.cuda_graph import DecodeStep
from engine.draw import TIED, choose_from_largest, draw_in_full
from plumbing import memory
from sample import (
    Path, Sampling, as_int64, mix, prefill, prompt_key, require_counts, require_finite, uniform,
    validate_prompts)


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
        longest = max(map(len, wanted))
        for path in waiting:
            longest = max(longest, len(path.prompt_ids))
            if len(wanted) >= self.AHEAD or longest * (len(wanted) + 1) > memory.PREFILL_TOKENS:
                break  # more would take a second pass, and memory that nobody has counted
            wanted.add(tuple(path.prompt_ids))
        prompts = sorted(wanted, key=len)  # like lengths together: little padding
        self.cache = None  # old and new are not held together
        self.cache, _ = prefill(self.model, prompts)
        # The last token of a prompt is decoded as a path's newest token is: in the next step.
        self.cache.set_lengths([len(prompt) - 1 for prompt in prompts])
        self.places = {prompt: row for row, prompt in enumerate(prompts)}
        self.keys = {prompt: prompt_key(self.sampling.seed, prompt) for prompt in prompts}


class Batch(sample.Batch):
    """A `sample.Batch` of paths of any prompts. More paths than rows wait, and begin as rows become
    free. On CUDA a decode step is captured as a graph."""
    BEGIN_AT_ONCE = 64
    SORT_EVERY = 32  # steps until rows of like length are put side by side: they read fewer slots

    def __init__(self, model, paths, capacity, limit, sampling, eos_ids=None, rows=None, bar=None,
                 on_end=None):
        """rows: at most so many at a time; None: one for each path. bar: a progress bar that counts
        tokens, its total at first limit x paths. on_end(path) is called as each path ends. The rest
        as in `sample.Batch`."""
        self.waiting = collections.deque(paths)
        self.free = []  # rows whose path has ended
        self.bar = bar
        self.on_end = on_end
        self.prompts = Prompts(model, sampling)
        self.model_step = DecodeStep(model)
        self.steps = 0
        rows = len(paths) if rows is None else min(rows, len(paths))
        super().__init__(model, [None] * rows, capacity, limit, sampling, eos_ids)

    def _launch(self, capacity):
        rows = len(self.live)
        device = self.model.device
        self.cache = self.model.new_cache(rows, capacity)
        self.keys = torch.zeros(rows, dtype=torch.int64, device=device)
        self.drawn = torch.zeros(rows, dtype=torch.int64, device=device)
        self.pending = torch.zeros(rows, dtype=torch.int64, device=device)
        self.hidden = None
        self._begin(list(range(rows)))

    def decode(self, until):
        """As in `sample.Batch`. ValueError while paths wait and `until` is less than their limit:
        no row would become free for them."""
        if self.waiting and until < self.limit:
            raise ValueError(f"until: found {until}, expected the limit of {self.limit} while "
                             f"{len(self.waiting)} paths wait for a row")
        while any(path.status == "running" and len(path.ids) < until for path in self.live):
            self.settle()
            self._append(self._draw())
            self._fill_free_rows()
        self._keep_running()

    def settle(self):
        if self.hidden is None and self.live:
            self.hidden = self.model_step(self.pending, self.cache)

    def prune(self, paths):
        running = [path for path in paths if path.status == "running"]
        super().prune(paths)
        for path in running:
            self._tell_end(path)

    def finish(self, status):
        """All paths end here; what waits never begins."""
        self.waiting.clear()
        for path in self.live:
            if path.status == "running":
                path.status = status
                self._tell_end(path)

    def resume(self, copies, capacity):
        new_paths = super().resume(copies, capacity)
        self.model_step.forget()
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
        keys = []
        for row, path, prompt in zip(rows, paths, prompts):
            self.live[row] = path
            keys.append(mix(self.prompts.keys[prompt] ^ path.index))
        device = self.model.device
        self.keys[rows] = as_int64(keys).to(device)
        self.drawn[rows] = 0
        self.pending[rows] = torch.tensor([prompt[-1] for prompt in prompts]).to(device)

    def _draw(self):
        """As in `sample.Batch`, a block of rows at a time, and with one wait for the device."""
        logits = self.model.logits(self.hidden)  # (B, V)
        V = logits.shape[-1]
        noise = uniform(self.keys, self.drawn)
        at_once = 2 ** 24 if logits.is_cuda else 2 ** 20  # numbers in a temporary
        block = max(1, at_once // V)
        tokens = []
        for part, numbers in zip(logits.split(block), noise.split(block)):
            tokens.append(choose_from_largest(part, numbers, self.sampling))
        totals = logits.sum(-1, dtype=torch.float32)  # not finite where a logit is not
        self.steps += 1
        tokens = self._drew(torch.where(totals.isfinite(), torch.cat(tokens), V))
        tied = [row for row, token in enumerate(tokens) if token == TIED]
        if tied:
            self.pending[tied] = draw_in_full(logits[tied], noise[tied], self.sampling)
            tokens = self.pending.tolist()
        if max(tokens) == V:
            require_finite(totals, "logits")
        return tokens

    def _append(self, tokens):
        if self.bar is not None:
            self.bar.update(len(self.live) - len(self.free))
        ended = []
        for row, path in enumerate(self.live):
            if path.status == "running":
                self._take(path, tokens[row])
                if path.status != "running":
                    self.free.append(row)
                    ended.append(path)
        for path in ended:  # behind the loop: on_end may `finish` others, but none of this step's
            self._tell_end(path)

    def _tell_end(self, path):
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


@torch.inference_mode()
def sample_all(model, prompts, n, limit, sampling, on_complete, eos_ids=None, batch=None, bar=None,
               on_end=None):
    """Sample n paths of at most `limit` new tokens for each prompt, with freed rows taking the
    next path at once. on_complete(i, paths) is called as soon as all n paths of prompts[i] have
    ended, in whatever order that happens; then they are let go. The rest as in `generate`."""
    validate_prompts(model, prompts, limit)
    memory.require_paths(len(prompts) * n)
    paths = []
    unfinished = {}  # prompt number -> its paths so far, of which some still run
    for number, prompt in enumerate(prompts):
        shared = list(prompt)  # by all of its paths: a copy each would be gigabytes in a large run
        unfinished[number] = [Path(shared, index, prompt_number=number) for index in range(n)]
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
    group = Batch(model, paths, capacity, limit, sampling, eos_ids, rows, bar, ended)
    paths.clear()  # or it would keep the paths of finished prompts alive
    group.decode(until=limit)


def generate(model, prompts, n=1, max_new_tokens=1024, temperature=0.6, top_k=40, top_p=0.95,
             seed=0, eos_ids=None, batch=None, bar=None, on_end=None):
    """`sample.generate`, all paths in one batch. batch: rows at a time (None: as many as fit the
    free memory), which changes no token. bar, on_end: as in `Batch`."""
    require_counts(n=n, max_new_tokens=max_new_tokens, batch=batch)
    sampling = Sampling(temperature, top_k, top_p, seed)
    results = [None] * len(prompts)

    def take(number, paths):
        results[number] = paths

    sample_all(model, prompts, n, max_new_tokens, sampling, take, eos_ids, batch, bar, on_end)
    return results
