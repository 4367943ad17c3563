"""plumbing/memory.py: how many rows fit, on the shapes of the paper's models and of cards that are
not there; free memory; and refusals with both numbers."""
import functools

import pytest
import torch
from emulations import Peak
from helpers import (
    PARAMETERS, REAL, meta_model, random_model, random_prompt, raw_config, write_checkpoint)

from engine.attention import Flash, Tiled, equip
from engine.launch import launch_check_resume
from engine.refill import generate
from model import load
from plumbing import memory, processes
from plumbing.checkpoint import Config
from sample import prefill
from stop import Stop

GB = 1e9
CARDS = (24, 80, 141)  # GB: a desktop's, an H100, an H200
BFLOAT16 = 2  # bytes of a number


def weights_of(name):
    """Bytes of a model in bfloat16."""
    return PARAMETERS[name] * BFLOAT16


def cache_bytes(name, rows, capacity):
    """Bytes of the real KVCache, counted on tensors without data."""
    model = meta_model(REAL[name]).to("meta").to(torch.bfloat16)
    return model.new_cache(rows, capacity).nbytes


@functools.cache
def shapes_of(name, how):
    """The model of two layers (a step's intermediate results are those of a layer), of shapes
    alone, as a command runs it."""
    model = meta_model(REAL[name] | {"num_hidden_layers": 2}).to("meta").to(torch.bfloat16)
    model.frequencies = model.frequencies.to("meta", torch.float32)
    equip(model)
    model.attend = how
    return model


@torch.inference_mode()
def step_peak(name, how, rows, capacity):
    """Bytes of the intermediate results of a decode step over all slots, as they come and go."""
    model = shapes_of(name, how)
    cache = model.new_cache(rows, capacity)
    ids = torch.zeros(rows, 1, dtype=torch.int64, device="meta")
    with Peak() as peak:
        model.run(ids, cache, capacity)
    return peak.bytes


@torch.inference_mode()
def prefill_peak(name, how, lengths, monkeypatch):
    """Bytes that reading prompts of these lengths takes, of all layers. Of GPT-OSS's experts, as if
    all tokens went to one of them: how many do depends on data."""
    model = shapes_of(name, how)
    for layer in model.model.layers:
        if model.config.experts:
            monkeypatch.setattr(layer.mlp, "mix", functools.partial(one_expert, layer.mlp.experts))
    with Peak() as peak:
        cache, _ = prefill(model, [[1] * length for length in lengths])
    padded = max(sum(lengths), max(lengths))
    held = cache_bytes(name, 1, padded)
    return peak.bytes + 2 * held * (1 - 2 / REAL[name]["num_hidden_layers"])


def one_expert(experts, x, weights, chosen):
    x = x.flatten(0, 1)
    gate_up = torch.addmm(experts.gate_up_proj_bias[0], x, experts.gate_up_proj[0])
    y = torch.addmm(experts.down_proj_bias[0], experts.swiglu(gate_up), experts.down_proj[0])
    return (torch.zeros_like(x) + y).view(*weights.shape[:2], -1)


# ------------------------------------------------------------------------------------ rows that fit


@pytest.mark.parametrize("capacity", (300, 2300, 16600, 32768))
@pytest.mark.parametrize("name", REAL)
def test_a_row_takes_what_its_cache_and_its_step_take_and_little_more(name, capacity):
    """Beside keys and values, the intermediate results of a real step, whatever its attention, and
    the logits that it gives."""
    config = Config.from_dict(REAL[name])
    taken = memory.row_bytes(config, capacity, BFLOAT16)
    cache = cache_bytes(name, 1, capacity)
    logits = config.vocab_size * 4
    steps = [step_peak(name, how, 32, capacity) / 32 for how in (Tiled, Flash)]
    assert taken >= cache + max(steps) + logits
    assert taken <= 1.07 * cache + 4 * logits


@pytest.mark.parametrize("lengths", ((16384,), (8192,), (2252, 2252, 2252), (300,) * 20), ids=str)
@pytest.mark.parametrize("how", (Tiled, Flash))
@pytest.mark.parametrize("name", REAL)
def test_a_prefill_fits_what_is_set_aside_for_it(name, how, lengths, monkeypatch):
    """One long prompt, or as many as a pass takes."""
    config = Config.from_dict(REAL[name])
    capacity = max(lengths) + 1
    set_aside = memory.working_bytes(config, capacity, BFLOAT16)
    assert prefill_peak(name, how, lengths, monkeypatch) <= set_aside


@pytest.mark.parametrize("capacity", (300, 2300, 16600))
@pytest.mark.parametrize("card", CARDS)
@pytest.mark.parametrize("name", REAL)
def test_weights_rows_graph_and_prefill_fit_the_card(name, card, capacity, monkeypatch):
    """All that a run holds at a time, from shapes: weights, the rows' cache, a captured step, its
    logits, a prefill at its peak, a gigabyte of workspaces. And one row more would go beyond what
    is allowed, unless there are rows enough."""
    config = Config.from_dict(REAL[name])
    free = card * GB - weights_of(name)
    try:
        rows = memory.rows_that_fit(config, capacity, BFLOAT16, free, on_gpu=True)
    except ValueError:
        rows = 0
    if rows:
        prompt = min(capacity, 2300)
        for how in (Tiled, Flash):
            held = weights_of(name) + cache_bytes(name, rows, capacity)
            held += step_peak(name, how, rows, capacity)
            held += rows * config.vocab_size * BFLOAT16
            held += prefill_peak(name, how, (prompt,) * max(1, 8192 // prompt), monkeypatch)
            assert held + 1 * GB <= card * GB
    if rows < memory.MOST_ROWS:
        work = memory.working_bytes(config, capacity, BFLOAT16, on_gpu=True)
        row = memory.row_bytes(config, capacity, BFLOAT16)
        assert (rows + 1) * row + work > memory.SHARE * free


@pytest.mark.parametrize("name, card, fits", (
    ("R1-Distill-Qwen-1.5B", 24, True), ("R1-Distill-Qwen-7B", 24, True),
    ("R1-0528-Qwen3-8B", 24, False), ("gpt-oss-20b", 24, False),
    *((name, card, True) for name in REAL for card in (80, 141))))
def test_which_models_run_at_the_papers_length(name, card, fits):
    """16,384 new tokens behind a prompt of 216. What does not fit is refused with both numbers:
    what a row needs and what there is."""
    config = Config.from_dict(REAL[name])
    free = card * GB - weights_of(name)
    if fits:
        assert memory.rows_that_fit(config, 16600, BFLOAT16, free, on_gpu=True) >= 1
        return
    with pytest.raises(ValueError) as caught:
        memory.rows_that_fit(config, 16600, BFLOAT16, free, on_gpu=True)
    message = str(caught.value)
    row = memory.row_bytes(config, 16600, BFLOAT16)
    needed = (memory.working_bytes(config, 16600, BFLOAT16, on_gpu=True) + row) / memory.SHARE
    assert f"one row of 16,600 positions needs {needed / GB:.1f} GB" in message
    assert f"{free / GB:.1f} GB are free" in message
    assert "\n" not in message


@pytest.mark.parametrize("name", REAL)
def test_more_memory_and_shorter_rows_mean_more_rows(name):
    config = Config.from_dict(REAL[name])
    counts = []
    for card in (60, 80, 141, 300):
        free = card * GB - weights_of(name)
        short = memory.rows_that_fit(config, 2300, BFLOAT16, free)
        long = memory.rows_that_fit(config, 4600, BFLOAT16, free)
        single = memory.rows_that_fit(config, 2300, 4, free)
        assert long < short or short == memory.MOST_ROWS
        assert single < short or short == memory.MOST_ROWS
        counts.append(short)
    assert counts == sorted(counts)
    assert memory.rows_that_fit(config, 300, BFLOAT16, 1e15) == memory.MOST_ROWS


def test_a_card_that_holds_a_model_and_a_row_is_enough():
    """Numbers that are read only when a prompt is (logits of a whole prompt, say) are not counted:
    the paper's lengths on a common card are not refused for memory that is never taken."""
    config = Config.from_dict(REAL["R1-Distill-Qwen-7B"])
    cache = cache_bytes("R1-Distill-Qwen-7B", 1, 16600)
    work = memory.working_bytes(config, 16600, BFLOAT16)
    scores = 12 * 2 ** 27  # of one block of queries, in float32, with their softmax
    mask = 4 * 8192 * 16600
    assert work < scores + mask + 2 * cache + 1.5 * GB


# ------------------------------------------------------------------------------- what is there now


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A function that sets what the system's files say about memory, in bytes."""
    def put(path, text):
        file = tmp_path / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)

    def describe(available, limit=None, used=0, kept_files=0):
        put("proc/meminfo",
            f"MemTotal: 99 kB\nMemFree:  1 kB\nMemAvailable:   {available // 1024} kB\n")
        if limit is not None:
            put("sys/fs/cgroup/memory.max", f"{limit}\n")
            put("sys/fs/cgroup/memory.current", f"{used}\n")
            put("sys/fs/cgroup/memory.stat",
                f"anon 5\nfile 7\ninactive_anon 3\ninactive_file {kept_files}\nactive_file 9\n")

    monkeypatch.setattr(memory, "Path", lambda path: tmp_path / path.lstrip("/"))
    return describe


def test_free_memory_is_what_the_machine_can_give(machine):
    machine(available=3 * 2 ** 30)
    assert memory.free_bytes("cpu") == 3 * 2 ** 30


def test_free_memory_is_what_the_container_grants(machine):
    """Where that is less. Files that the kernel keeps for another time are no memory in use."""
    machine(available=64 * 2 ** 30, limit=8 * 2 ** 30, used=5 * 2 ** 30, kept_files=2 ** 30)
    assert memory.free_bytes("cpu") == 4 * 2 ** 30
    machine(available=2 * 2 ** 30, limit=8 * 2 ** 30, used=5 * 2 ** 30)
    assert memory.free_bytes("cpu") == 2 * 2 ** 30
    machine(available=2 ** 30, limit=2 ** 30, used=2 ** 31)
    assert memory.free_bytes("cpu") == 0


def test_a_container_without_a_limit_grants_all(machine):
    machine(available=3 * 2 ** 30, limit="max", used=2 ** 40)
    assert memory.free_bytes("cpu") == 3 * 2 ** 30


def test_processes_share_what_is_free(machine, monkeypatch):
    machine(available=8 * 2 ** 30)
    monkeypatch.setattr(processes, "count", lambda: 4)
    assert memory.free_bytes("cpu") == 2 * 2 ** 30


def test_elsewhere_half_of_the_memory_is_taken_to_be_free(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "Path", lambda path: tmp_path / path.lstrip("/"))
    assert 2 ** 28 < memory.free_bytes("cpu") < 2 ** 44


def test_free_memory_of_this_machine_is_plausible():
    assert 2 ** 26 < memory.free_bytes("cpu") < 2 ** 44
    assert memory.free_bytes(torch.device("cpu")) > 0


# ------------------------------------------------------------------------------- refused beforehand


def test_a_model_that_does_not_fit_is_refused_with_both_numbers(tmp_path, monkeypatch):
    """Before a weight is read."""
    folder = write_checkpoint(tmp_path / "it", raw_config("qwen2"))
    needed = sum(parameter.nbytes for parameter in load(folder).parameters())
    monkeypatch.setattr(memory, "free_bytes", lambda device: needed)
    load(folder)
    monkeypatch.setattr(memory, "free_bytes", lambda device: needed - 1)
    monkeypatch.setattr("model.read_weights", None)
    with pytest.raises(ValueError) as caught:
        load(folder)
    message = str(caught.value)
    assert message.startswith(f"{folder}: its weights need {needed / GB:.1f} GB, cpu has ")
    assert f"{needed / GB:.1f} GB free" in message


def test_a_half_precision_model_needs_half(tmp_path, monkeypatch):
    folder = write_checkpoint(tmp_path / "it", raw_config("qwen2"))
    needed = sum(parameter.nbytes for parameter in load(folder).parameters())
    monkeypatch.setattr(memory, "free_bytes", lambda device: needed // 2)
    load(folder, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="its weights need"):
        load(folder)


@pytest.fixture(scope="module")
def model():
    return random_model("qwen2")


def test_rows_are_as_many_as_fit_unless_they_are_given(model, monkeypatch):
    row = memory.row_bytes(model.config, 100, 4)
    work = memory.working_bytes(model.config, 100, 4)
    monkeypatch.setattr(memory, "free_bytes", lambda device: (work + 7.5 * row) / memory.SHARE)
    assert memory.choose_rows(model, 100) == 7
    assert memory.choose_rows(model, 100, batch=3) == 3
    assert memory.choose_rows(model, 100, batch=99) == 99


def test_generate_takes_the_rows_that_fit_and_changes_no_token(model, monkeypatch):
    prompts = [random_prompt(5), random_prompt(9)]
    expected = generate(model, prompts, n=4, max_new_tokens=6)
    row = memory.row_bytes(model.config, 15, 4)
    work = memory.working_bytes(model.config, 15, 4)
    sizes = []
    new_cache = model.new_cache

    def noted(rows, capacity):
        sizes.append((rows, capacity))
        return new_cache(rows, capacity)

    monkeypatch.setattr(model, "new_cache", noted)
    monkeypatch.setattr(memory, "free_bytes", lambda device: (work + 3.5 * row) / memory.SHARE)
    found = generate(model, prompts, n=4, max_new_tokens=6)
    assert [path.ids for path in sum(found, [])] == [path.ids for path in sum(expected, [])]
    assert (3, 15) in sizes
    assert max(sizes) == (3, 15)


def test_paths_that_do_not_fit_are_refused_with_both_numbers(model, monkeypatch):
    monkeypatch.setattr(memory, "free_bytes", lambda device: 1e6)
    message = "memory: one row of 15 positions needs .* 0.0 GB are free"
    with pytest.raises(ValueError, match=message):
        generate(model, [random_prompt(9)], max_new_tokens=6)


def test_prefixes_that_cannot_be_held_together_are_refused(model, monkeypatch):
    """All are held until they are checked: how many, what they need, what is free, what to do."""
    monkeypatch.setattr(memory, "free_bytes", lambda device: 1e6)
    stop = Stop(model, m=2, rank=2)
    with pytest.raises(ValueError) as caught:
        launch_check_resume(
            model, stop, random_prompt(9), n=64, keep=8, prefix=40, max_new_tokens=60)
    message = str(caught.value)
    assert message.startswith("n: found 64; 64 rows of 51 positions need 0.0 GB, 0.0 GB are free")
    assert "lower --n" in message


def test_rows_are_described_on_one_line(model, monkeypatch):
    monkeypatch.setattr(memory, "free_bytes", lambda device: 3e9)
    line = memory.describe_rows(model, 1024, 2000)
    taken = 1024 * memory.row_bytes(model.config, 2000, 4)
    assert line == f"1,024 rows at a time, 2,000 positions each: {taken / GB:.2f} GB of 3.0 GB free"
