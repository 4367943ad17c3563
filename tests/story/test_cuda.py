"""On a GPU, where there is one: the captured decode step, refilled rows, compaction and the whole
loop give what the CPU gives, in float32. What a captured step may not change is in
test_cuda_graph.py."""
import pytest
import torch
from helpers import GOLDEN, REAL, close, random_model

from engine.attention import equip, fault_of_flash
from engine.cuda_graph import DecodeStep
from engine.launch import launch_check_resume
from engine.refill import generate
from model import load
from plumbing import memory
from plumbing.checkpoint import Config
from sample import prefill
from stop import Stop

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
NAMES = ("qwen2-tied-sharded", "qwen3-tiny", "gptoss-tiny")


class Pair:
    """The same checkpoint on both devices."""

    def __init__(self, name):
        self.cpu = load(GOLDEN / "checkpoints" / name)
        self.cuda = load(GOLDEN / "checkpoints" / name, "cuda")
        vocab = self.cpu.config.vocab_size
        generator = torch.Generator().manual_seed(3)
        self.prompts = []
        for length in (5, 17, 30):
            self.prompts.append(torch.randint(vocab, (length,), generator=generator).tolist())
        self.eos = list(range(0, vocab, 97))


@pytest.fixture(scope="module", params=NAMES)
def pair(request):
    return Pair(request.param)


def tokens_of(groups):
    return [path.ids for group in groups for path in group]


def test_hidden_states(pair):
    ids = torch.tensor([pair.prompts[2]] * 3)
    close(pair.cuda(ids.cuda()).cpu(), pair.cpu(ids), 1e-4)


def test_prefill_of_a_ragged_batch(pair):
    cache, hidden = prefill(pair.cuda, pair.prompts, extra=4)
    _, expected = prefill(pair.cpu, pair.prompts, extra=4)
    close(hidden.cpu(), expected, 1e-4)
    assert cache.lengths.tolist() == cache.counts.tolist() == [5, 17, 30]


def test_a_replayed_step_is_a_step(pair):
    """300 new tokens: graphs that read 256 slots and 512, and of fewer rows after some have ended.
    top_k 20: without it rounding anywhere in a cumulative sum could flip a token."""
    settings = {
        "n": 8, "max_new_tokens": 300, "temperature": 0.8, "top_k": 20, "top_p": 1.0, "seed": 1,
        "eos_ids": pair.eos}
    found = tokens_of(generate(pair.cuda, pair.prompts, **settings))
    expected = tokens_of(generate(pair.cpu, pair.prompts, **settings))
    assert found == expected
    assert len({len(ids) for ids in expected}) > 3


@pytest.mark.parametrize("batch", (4, 10))
def test_refilled_rows_change_no_token(pair, batch):
    """Long prompts first: freed rows take shorter ones than any when the step was captured."""
    settings = {
        "n": 8, "max_new_tokens": 60, "temperature": 0.8, "top_k": 20, "top_p": 1.0, "seed": 1,
        "eos_ids": pair.eos}
    prompts = pair.prompts[::-1]
    expected = tokens_of(generate(pair.cpu, prompts, **settings))
    assert tokens_of(generate(pair.cuda, prompts, batch=batch, **settings)) == expected


def test_launch_check_resume(pair):
    """The kept set, the scores and the finished paths; graphs are captured anew after the cache has
    shrunk."""
    runs = []
    for model in (pair.cpu, pair.cuda):
        stop = Stop(model, m=2, rank=4).eval()
        weights = torch.linspace(-1, 1, stop.head.weight.numel()).view_as(stop.head.weight)
        stop.head.weight.data.copy_(weights)
        runs.append(launch_check_resume(
            model, stop, pair.prompts[1], 16, 6, 40, max_new_tokens=120, eos_ids=()))
    expected, found = runs
    assert [path.status for path in found] == [path.status for path in expected]
    assert [path.ids for path in found] == [path.ids for path in expected]
    for one, other in zip(found, expected):
        assert one.score == pytest.approx(other.score, abs=1e-4)


@pytest.mark.parametrize("name", REAL)
def test_flash_attention_proves_right(name):
    """For the heads of the paper's models, on any card of compute capability 8 or more."""
    if torch.cuda.get_device_capability()[0] < 8:
        pytest.skip("flash attention needs compute capability 8")
    config = Config.from_dict(REAL[name])
    assert fault_of_flash(config, torch.device("cuda", 0), torch.bfloat16) is None


def test_graphs_share_their_memory():
    """Captures for ever more slots and other rows hold no more than the first ones."""
    model = random_model("qwen2", hidden_size=256, intermediate_size=4096).to("cuda")
    equip(model)
    held = []
    for rows in (64, 48, 32):
        step = DecodeStep(model)
        cache = model.new_cache(rows, 2100)
        for length in (0, 256, 512, 1024, 2048):
            cache.set_lengths([0] * rows)
            cache.advance(length)
            step(torch.zeros(rows, dtype=torch.int64, device="cuda"), cache)
        del cache, step
        torch.cuda.empty_cache()
        held.append(torch.cuda.memory_reserved())
    assert held[2] <= held[0] + 2 ** 26


def test_free_memory_is_counted(pair):
    """What PyTorch holds and does not use is free."""
    total = torch.cuda.get_device_properties(0).total_memory
    before = memory.free_bytes("cuda")
    block = torch.empty(2 ** 28, device="cuda")
    held = memory.free_bytes("cuda")
    del block
    after = memory.free_bytes("cuda")
    assert before <= total
    assert before - held >= 2 ** 30
    assert abs(after - before) < 2 ** 26


def test_half_precision_runs(pair):
    """bfloat16 is what a GPU is used with: the loop comes to its end, every path has a score."""
    model = pair.cuda.to(torch.bfloat16)  # the module's last test
    stop = Stop(model, m=2, rank=4).eval()
    paths = launch_check_resume(
        model, stop, pair.prompts[0], 8, 2, 10, max_new_tokens=30, eos_ids=())
    assert sum(path.status == "length" for path in paths) == 2
    assert all(path.score is not None for path in paths)
