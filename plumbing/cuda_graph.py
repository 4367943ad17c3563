"""One decode step, on CUDA captured as a graph and replayed: a step is hundreds of small kernels,
and launching them one by one takes longer than running them.
"""
from typing import NamedTuple

import torch


class Captured(NamedTuple):
    """A captured step. Where a layer has a window, it holds for rows of at least `shortest`
    positions: the keys that it reads begin at the shortest row's window."""
    graph: torch.cuda.CUDAGraph
    fed: torch.Tensor      # its input: token ids (B,)
    hidden: torch.Tensor   # its output (B, hidden)
    shortest: int


class DecodeStep:
    """One position for every row: token ids (B,) -> hidden states (B, hidden).

    On CUDA the step is captured as a graph and replayed, one graph for a number of rows and a
    number of slots, which are read in blocks of 256. So that few graphs are made, rows of ended
    paths leave in groups of 8 there; elsewhere at once."""

    def __init__(self, model):
        self.model = model
        self.captured = model.device.type == "cuda"
        self.group = 8 if self.captured else 1
        self.has_windows = set(model.config.windows) != {None}
        self.graphs = {}  # (rows, slots read) -> Captured

    def __call__(self, tokens, cache):
        if not self.captured:
            return self.model(tokens[:, None], cache=cache)[:, 0]
        if cache.longest == cache.capacity:
            raise ValueError(f"KV cache: all of its {cache.capacity} positions are taken")
        span = min(cache.capacity, (cache.longest // 256 + 1) * 256)
        step = self.graphs.get((cache.rows, span))
        if step is None or self.has_windows and cache.counts.min() < step.shortest:
            step = self._capture(tokens, cache, span)
        step.fed.copy_(tokens)
        step.graph.replay()
        cache.advance(1)
        return step.hidden

    def forget(self):
        """Drop the graphs: they read buffers that are no longer the cache's."""
        self.graphs.clear()

    def _capture(self, tokens, cache, span):
        for rows, slots in list(self.graphs):
            if rows != cache.rows:  # they never come back: the graph would only hold memory
                del self.graphs[rows, slots]
        fed = tokens.clone()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # warm-up; it writes the slots that the replay writes again
            self.model.run(fed[:, None], cache, span)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            hidden = self.model.run(fed[:, None], cache, span)[:, 0]
        step = Captured(graph, fed, hidden, int(cache.counts.min()))
        self.graphs[cache.rows, span] = step
        return step
