"""engine/cuda_graph.py on the CPU, where a captured step is emulated (emulations.py): a replay
repeats the operations of the capture on the very memory that it was captured with, whatever Python
would choose now. tests/story/test_cuda.py has the real one."""
import pytest
import torch
from emulations import Cuda, flash_on_cpu
from helpers import KINDS, random_model, random_prompt, random_stop

from engine import attention, cuda_graph, refill
from engine.attention import Flash, equip
from engine.cuda_graph import DecodeStep
from engine.launch import launch_check_resume
from engine.refill import generate
from kvcache import KVCache

SAMPLING = {"temperature": 1.0, "top_k": 20, "top_p": 0.95, "seed": 4}
EOS = (3, 11, 30, 41)
LOOP = SAMPLING | {"n": 12, "stages": [(4, 9), (10, 5, 2)], "max_new_tokens": 30, "eos_ids": EOS}


@pytest.fixture
def captured(monkeypatch):
    """A function: from now on decode steps are captured and replayed -> what keeps account."""
    def capture_steps():
        cuda = Cuda()
        cuda.install(monkeypatch, cuda_graph)
        return cuda

    return capture_steps


def equipped(kind):
    model = random_model(kind)
    equip(model)
    return model


@pytest.fixture(params=KINDS)
def model(request):
    return equipped(request.param)


def tokens_of(groups):
    return [path.ids for group in groups for path in group]


def by_name(paths):
    """Of a loop with branches, whose new paths stand in the order of their rows: rows leave in
    other groups on CUDA."""
    return {path.name: (path.ids, path.status, round(path.score, 4)) for path in paths}


@pytest.mark.parametrize("batch", (27, 10, 4))
@pytest.mark.parametrize("eos", ((), EOS), ids=("no ends", "early ends"))
def test_replayed_steps_change_no_token(model, captured, batch, eos):
    """Also where freed rows take shorter prompts than any had when the step was captured."""
    prompts = [random_prompt(length) for length in (40, 26, 3)]
    settings = SAMPLING | {"n": 9, "max_new_tokens": 30, "eos_ids": eos}
    expected = tokens_of(generate(model, prompts, **settings))
    cuda = captured()
    assert tokens_of(generate(model, prompts, batch=batch, **settings)) == expected
    assert cuda.replays > 3 * cuda.captures > 0


def test_a_step_reads_twice_as_many_slots_when_a_row_outgrows_them(model, captured):
    """So that a long run has few graphs."""
    prompts = [random_prompt(250), random_prompt(9)]
    settings = SAMPLING | {"n": 3, "max_new_tokens": 20, "eos_ids": ()}
    expected = tokens_of(generate(model, prompts, **settings))
    cuda = captured()
    assert tokens_of(generate(model, prompts, **settings)) == expected
    assert cuda.captures == 2
    assert cuda.replays == 20


@pytest.mark.parametrize("capacity, spans", (
    (16600, [256, 512, 1024, 2048, 4096, 8192, 16384, 16600]), (200, [200]),
    (600, [256, 512, 600])))
def test_how_many_slots_are_read(capacity, spans):
    """At every length the row's newest position is among them."""
    model = random_model("qwen2", max_position_embeddings=20000)
    step = DecodeStep(model)
    cache = model.new_cache(2, capacity)
    found = []
    for length in range(capacity):
        cache.counts[1] = length
        span = step._span(cache)
        assert length < span <= capacity
        if span not in found:
            found.append(span)
    assert found == spans
    model.attend = Flash
    assert step._span(cache) == capacity


def test_steps_are_captured_anew_after_a_check(model, captured):
    """The cache that they read is gone: Check has moved the kept rows to a smaller one."""
    stop = random_stop(model)
    expected = by_name(launch_check_resume(model, stop, random_prompt(9), **LOOP))
    cuda = captured()
    assert by_name(launch_check_resume(model, stop, random_prompt(9), **LOOP)) == expected
    assert cuda.captures >= 3


def test_as_many_rows_after_a_check_as_before(model, captured):
    """The number of rows is that of a graph which is of no use any more."""
    stop = random_stop(model)
    settings = LOOP | {"stages": [(4, 6, 2)], "eos_ids": ()}
    expected = by_name(launch_check_resume(model, stop, random_prompt(9), **settings))
    cuda = captured()
    assert by_name(launch_check_resume(model, stop, random_prompt(9), **settings)) == expected
    assert cuda.captures == 2


def test_rows_put_in_order_are_read_where_they_are(model, captured, monkeypatch):
    """Rows move in place, under the same graph."""
    monkeypatch.setattr(refill.Batch, "SORT_EVERY", 2)
    prompts = [random_prompt(length) for length in (26, 3, 40)]
    settings = SAMPLING | {"n": 9, "max_new_tokens": 20, "eos_ids": EOS}
    expected = tokens_of(generate(model, prompts, **settings))
    captured()
    assert tokens_of(generate(model, prompts, batch=6, **settings)) == expected


# ------------------------------------------------------------------------------- flash attention


@pytest.fixture
def flash(monkeypatch):
    """Flash attention, emulated, in float32 too."""
    monkeypatch.setattr(attention, "HALF", (torch.float32,))
    with flash_on_cpu():
        yield


@pytest.mark.parametrize("kind", ("qwen2", "gpt_oss"))
def test_under_flash_attention_one_graph_holds_for_rows_of_any_length(kind, captured, flash):
    """One capture for a number of rows, though rows grow beyond every power of two and freed ones
    take shorter prompts."""
    model = equipped(kind)
    prompts = [random_prompt(length) for length in (254, 26, 3)]
    settings = SAMPLING | {"n": 4, "max_new_tokens": 12, "eos_ids": ()}
    expected = tokens_of(generate(model, prompts, **settings))
    model.attend = Flash
    cuda = captured()
    assert tokens_of(generate(model, prompts, batch=4, **settings)) == expected
    assert cuda.captures == 1
    assert cuda.replays == 36


@pytest.mark.parametrize("kind", ("qwen2", "gpt_oss"))
def test_the_loop_under_flash_attention(kind, captured, flash):
    model = equipped(kind)
    stop = random_stop(model)
    expected = by_name(launch_check_resume(model, stop, random_prompt(9), **LOOP))
    model.attend = Flash
    cuda = captured()
    assert by_name(launch_check_resume(model, stop, random_prompt(9), **LOOP)) == expected
    assert cuda.captures >= 3


# ------------------------------------------------------------------------ memory, streams, devices


def test_all_captures_share_a_pool_and_a_stream(captured):
    """Of one batch and of the next: graphs of their own pools would fill the memory of a long run.
    A graph is kept that holds the pool, and those of other numbers of rows are let go."""
    model = equipped("qwen2")
    cuda = captured()
    steps = []
    for rows in (6, 4):
        step = DecodeStep(model)
        cache = model.new_cache(rows, 300)
        steps.append(step)
        for length in (0, 255, 256):
            cache.set_lengths([0] * rows)
            cache.advance(length)
            step(torch.zeros(rows, dtype=torch.int64), cache)
            assert {held for held, _ in step.graphs} == {rows}
        cache.keep(list(range(rows - 2)))
        step(torch.zeros(rows - 2, dtype=torch.int64), cache)
        assert set(step.graphs) == {(rows - 2, 300)}
    assert cuda.captures == 6
    assert len(cuda.places) == 1
    ((pool, stream),) = cuda.places
    assert pool is not None and stream is not None
    assert stream.device == model.device
    assert cuda_graph.workshop(model.device).keeper is cuda.graphs[0]


def test_a_step_gives_hidden_states_that_another_graph_leaves_alone(captured):
    """They lie outside the pool: a batch may be replayed while another's are in use."""
    model = equipped("qwen2")
    captured()
    first = DecodeStep(model)
    second = DecodeStep(model)
    tokens = torch.tensor([5, 9])
    hidden = first(tokens, model.new_cache(2, 20))
    kept = hidden.clone()
    second(tokens + 1, model.new_cache(2, 20))
    assert torch.equal(hidden, kept)


def test_a_full_cache_is_refused(captured):
    model = equipped("qwen2")
    captured()
    cache = model.new_cache(2, 4)
    cache.advance(4)
    with pytest.raises(ValueError, match="all of its 4 positions are taken"):
        DecodeStep(model)(torch.tensor([1, 2]), cache)


# --------------------------------------------------------------- what the emulation can find out


def out_of_place(self, count):
    self.lengths = self.lengths + count  # the graph goes on reading the old tensor
    self.counts = self.counts + count


def test_a_stale_pointer_is_found_out(captured, monkeypatch):
    model = equipped("qwen2")
    settings = SAMPLING | {"n": 3, "max_new_tokens": 12, "eos_ids": ()}
    expected = tokens_of(generate(model, [random_prompt(9)], **settings))
    monkeypatch.setattr(KVCache, "advance", out_of_place)
    assert tokens_of(generate(model, [random_prompt(9)], **settings)) == expected
    captured()
    assert tokens_of(generate(model, [random_prompt(9)], **settings)) != expected


def test_buffers_that_are_gone_are_found_out(captured):
    """A step that was not told to forget its graphs reads rows that have moved away."""
    model = equipped("qwen2")
    captured()
    tokens = torch.tensor([5, 9])
    found = []
    for forgets in (False, True):
        step = DecodeStep(model)
        cache = model.new_cache(2, 20)
        step(tokens, cache)
        cache.rebuild([1, 0], 20)
        if forgets:
            step.forget()
        found.append(step(tokens, cache).clone())
    cache.set_lengths([1, 1])
    expected = model(tokens[:, None], cache=cache)[:, 0]
    assert not torch.allclose(found[0], expected, atol=0.01)
    torch.testing.assert_close(found[1], expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("wait", (
    lambda cache: cache.lengths.max().item(), lambda cache: cache.lengths.nonzero(),
    lambda cache: torch.tensor([1, 2, 3])))
def test_a_wait_within_a_capture_is_found_out(captured, monkeypatch, wait):
    model = equipped("qwen2")
    captured()
    run = model.run

    def waiting(ids, cache, span):
        wait(cache)
        return run(ids, cache, span)

    monkeypatch.setattr(model, "run", waiting)
    with pytest.raises(AssertionError, match="within a capture"):
        DecodeStep(model)(torch.tensor([1, 2]), model.new_cache(2, 20))
