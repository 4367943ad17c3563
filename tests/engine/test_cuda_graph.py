"""plumbing/cuda_graph.py on the CPU: a captured step repeats exactly the kernels that it was
captured with, whatever Python would choose now. Here a step is captured as a call whose Python
numbers are frozen; tests/story/test_cuda.py has the real one."""
import contextlib

import pytest
import torch
from helpers import KINDS, random_model, random_prompt, random_stop

import sample
from model import Positions
from plumbing.cuda_graph import DecodeStep
from sample import generate
from stop import launch_check_resume

SAMPLING = {"temperature": 1.0, "top_k": 20, "top_p": 0.95, "seed": 4}
EOS = (3, 11, 30, 41)


class Recorder:
    """In place of torch.cuda: what runs within `graph` is recorded and can be replayed."""

    def __init__(self, model):
        self.model = model
        self.run = model.run
        self.captures = 0
        self.replays = 0
        self.recording = None

    def graph(self, graph):
        """torch.cuda.graph: a context that records into a graph."""
        self.captures += 1
        return self.recorded_into(graph)

    @contextlib.contextmanager
    def recorded_into(self, graph):
        self.recording = graph
        yield
        self.recording = None

    def run_and_record(self, ids, cache=None, span=None, adapter=None):
        """The model's `run`; within `graph` its Python numbers are kept for the replay."""
        if self.recording is None:
            return self.run(ids, cache, span, adapter)
        graph = self.recording
        graph.recorder = self
        graph.inputs = (ids, cache, span, adapter)
        with frozen_keys(graph.keys, replay=False):
            graph.output = self.run(*graph.inputs)
        return graph.output


class Graph:
    """torch.cuda.CUDAGraph: the call that was recorded, with the keys that each block read."""

    def __init__(self):
        self.keys = []

    def replay(self):
        self.recorder.replays += 1
        with frozen_keys(self.keys, replay=True):
            self.output.copy_(self.recorder.run(*self.inputs))


@contextlib.contextmanager
def frozen_keys(keys, replay):
    """Note which slots each block of a pass reads, or read the ones that were noted."""
    honest = Positions._keys_of
    noted = iter(list(keys))

    def keys_of(self, rows, window):
        if replay:
            return next(noted)
        keys.append(honest(self, rows, window))
        return keys[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Positions, "_keys_of", keys_of)
        yield


class Stream:
    """torch.cuda.Stream."""

    def wait_stream(self, other):
        """There is only one."""


@pytest.fixture
def captured(monkeypatch):
    """A function: from now on decode steps of this model are captured and replayed."""
    def capture_steps(model):
        recorder = Recorder(model)
        begin = DecodeStep.__init__

        def on_cuda(self, model):
            begin(self, model)
            self.captured = True
            self.group = 8

        monkeypatch.setattr(DecodeStep, "__init__", on_cuda)
        monkeypatch.setattr(model, "run", recorder.run_and_record)
        monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
        monkeypatch.setattr(torch.cuda, "graph", recorder.graph)
        monkeypatch.setattr(torch.cuda, "Stream", Stream)
        monkeypatch.setattr(torch.cuda, "current_stream", Stream)
        monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
        return recorder

    return capture_steps


@pytest.fixture(params=KINDS)
def model(request):
    return random_model(request.param)


def tokens_of(groups):
    return [path.ids for group in groups for path in group]


def by_name(paths):
    return {path.name: (path.ids, path.status) for path in paths}


@pytest.mark.parametrize("batch", (27, 10, 4))
@pytest.mark.parametrize("eos", ((), EOS), ids=("no ends", "early ends"))
def test_replayed_steps_change_no_token(model, captured, batch, eos):
    """Also where freed rows take shorter prompts than any had when the step was captured: a
    window's keys begin at the shortest row's."""
    prompts = [random_prompt(length) for length in (40, 26, 3)]
    settings = SAMPLING | {"n": 9, "max_new_tokens": 30, "eos_ids": eos}
    expected = tokens_of(generate(model, prompts, **settings))
    recorder = captured(model)
    assert tokens_of(generate(model, prompts, batch=batch, **settings)) == expected
    assert recorder.replays > 3 * recorder.captures > 0


def test_steps_beyond_a_block_of_slots(model, captured):
    """Slots are read in blocks of 256: a row that outgrows one is captured anew."""
    prompts = [random_prompt(250), random_prompt(9)]
    settings = SAMPLING | {"n": 3, "max_new_tokens": 20, "eos_ids": ()}
    expected = tokens_of(generate(model, prompts, **settings))
    recorder = captured(model)
    assert tokens_of(generate(model, prompts, **settings)) == expected
    assert recorder.captures == 2
    assert recorder.replays == 20


def test_steps_are_captured_anew_after_a_check(model, captured):
    """The cache that they read is gone: Check has moved the kept rows to a smaller one."""
    stop = random_stop(model)
    settings = SAMPLING | {
        "n": 12, "cascade": [(4, 9), (10, 5, 2)], "max_new_tokens": 30, "eos_ids": EOS}
    expected = launch_check_resume(model, stop, random_prompt(9), **settings)
    recorder = captured(model)
    paths = launch_check_resume(model, stop, random_prompt(9), **settings)
    # New branches stand in the order of their rows, and rows leave in other groups on CUDA.
    assert by_name(paths) == by_name(expected)
    assert recorder.captures >= 3


def test_rows_put_in_order_are_read_where_they_are(model, captured, monkeypatch):
    """Rows move in place, under the same graph."""
    monkeypatch.setattr(sample.Batch, "SORT_EVERY", 2)
    prompts = [random_prompt(length) for length in (26, 3, 40)]
    settings = SAMPLING | {"n": 9, "max_new_tokens": 20, "eos_ids": EOS}
    expected = tokens_of(generate(model, prompts, **settings))
    captured(model)
    assert tokens_of(generate(model, prompts, batch=6, **settings)) == expected
