"""One decode step, on CUDA captured as a graph and replayed: a step is hundreds of small kernels,
and launching them one by one takes longer than running them. It gives what `model(tokens, cache)`
gives: tests/engine/test_cuda_graph.py.
"""
import functools
from typing import NamedTuple

import torch


class Captured(NamedTuple):
    """A captured step. Its input and output lie outside the pool, which later steps write over."""
    graph: torch.cuda.CUDAGraph
    fed: torch.Tensor      # its input: token ids (B,)
    hidden: torch.Tensor   # its output (B, hidden)


class Workshop(NamedTuple):
    """Where all steps of a device are captured. One pool for all graphs, or each would hold the
    memory of a step to itself: replays never overlap."""
    stream: torch.cuda.Stream
    pool: tuple
    keeper: torch.cuda.CUDAGraph  # PyTorch gives a pool up with its last graph: this one stays


@functools.cache
def workshop(device):
    """The Workshop of a torch device."""
    stream = torch.cuda.Stream(device)
    pool = torch.cuda.graph_pool_handle()
    keeper = torch.cuda.CUDAGraph()
    with torch.cuda.graph(keeper, pool=pool, stream=stream):
        torch.zeros(1, device=device)
    return Workshop(stream, pool, keeper)


class DecodeStep:
    """One position for every row: token ids (B,) -> hidden states (B, hidden), which hold until
    the next step.

    On CUDA the step is captured as a graph and replayed, one graph for a number of rows. So that
    few graphs are made, rows of ended paths leave in groups of 8 there; elsewhere at once. Under
    flash attention a step holds for rows of any length. Under plain attention it reads a number of
    slots, which is a power of two."""

    def __init__(self, model):
        self.model = model
        self.captured = model.device.type == "cuda"
        self.group = 8 if self.captured else 1
        self.graphs = {}  # (rows, slots read) -> Captured

    def __call__(self, tokens, cache):
        if not self.captured:
            return self.model(tokens[:, None], cache=cache)[:, 0]
        if cache.longest == cache.capacity:
            raise ValueError(f"KV cache: all of its {cache.capacity} positions are taken")
        span = self._span(cache)
        if (cache.rows, span) not in self.graphs:
            self._capture(tokens, cache, span)
        step = self.graphs[cache.rows, span]
        step.fed.copy_(tokens)
        step.graph.replay()
        cache.advance(1)
        return step.hidden

    def forget(self):
        """Drop the graphs: they read buffers that are no longer the cache's."""
        self.graphs.clear()

    def _span(self, cache):
        """How many slots a step reads, so that each row's keys are among them."""
        if self.model.attend.own_lengths:
            return cache.capacity
        span = 256
        while span <= cache.longest:
            span *= 2
        return min(span, cache.capacity)

    def _capture(self, tokens, cache, span):
        device = self.model.device
        place = workshop(device)
        fed = tokens.clone()
        hidden = cache.keys[0].new_empty(cache.rows, self.model.config.hidden_size)
        place.stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(place.stream):  # warms up; it writes what the replay writes again
            self.model.run(fed[:, None], cache, span)
        torch.cuda.current_stream(device).wait_stream(place.stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=place.pool, stream=place.stream):
            hidden.copy_(self.model.run(fed[:, None], cache, span)[:, 0])
        for rows, slots in list(self.graphs):
            if rows != cache.rows:  # they never come back
                del self.graphs[rows, slots]
        self.graphs[cache.rows, span] = Captured(graph, fed, hidden)
