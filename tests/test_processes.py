"""plumbing/processes.py: one process alone, and three real ones side by side on the CPU."""
import json
import os

import pytest
import torch
from helpers import ROOT, run_script

from plumbing import processes

# What each of three processes does, in a file that torchrun starts. Each writes what it saw.
SCRIPT = """
import json
import sys
import time
from pathlib import Path

import torch

from plumbing import processes

early = [processes.rank(), processes.is_first()]
device = processes.start("cpu")
folder = Path(sys.argv[1])
rank = processes.rank()
seen = {
    "early": early, "rank": rank, "count": processes.count(), "device": device,
    "is_first": processes.is_first(), "mine": {}, "gathered": {}}
for length in (0, 1, 2, 3, 7, 9):
    items = [f"item {i}" for i in range(length)]
    share = processes.mine(items)
    seen["mine"][length] = share
    seen["gathered"][length] = processes.gather([item.upper() for item in share])
    assert list(processes.mine(range(length))) == list(range(length))[rank::3]

tensors = [torch.full((2, 2), 10.0 ** rank), torch.arange(3) + rank]
processes.add_up(tensors)
seen["sums"] = [tensor.tolist() for tensor in tensors]
logits = [torch.full((i + 1, 2), float(i)) for i in processes.mine(list(range(4)))]
seen["tensors"] = torch.cat(processes.gather(logits))[:, 0].tolist()

time.sleep(0.3 * rank)
(folder / f"before{rank}").write_text("")
processes.wait_for_all()
seen["waited"] = len(list(folder.glob("before*")))
(folder / f"{rank}.json").write_text(json.dumps(seen))
processes.leave()
(folder / "nobody is here").write_text("")
"""


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    """What each of three processes saw, by rank."""
    folder = tmp_path_factory.mktemp("three")
    script = folder / "work.py"
    script.write_text(f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n{SCRIPT}")
    status, _, err = run_script(str(script), [folder], processes=3)
    assert status == 0, err
    assert not (folder / "nobody is here").exists()  # they end where they leave
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(3)]


def test_each_process_knows_which_one_it_is(three):
    """Before the processes have joined, too: only the first prints from its first line on."""
    for rank, seen in enumerate(three):
        assert seen["rank"] == rank
        assert seen["early"] == [rank, rank == 0]
        assert seen["count"] == 3
        assert seen["is_first"] == (rank == 0)
        assert seen["device"] == "cpu"


@pytest.mark.parametrize("length", (0, 1, 2, 3, 7, 9))
def test_shares_are_dealt_out_and_gathered_in_order(three, length):
    """Also where there are fewer items than processes."""
    items = [f"item {i}" for i in range(length)]
    shares = [seen["mine"][str(length)] for seen in three]
    assert sorted(sum(shares, [])) == sorted(items)
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    for seen in three:
        assert seen["gathered"][str(length)] == [item.upper() for item in items]


def test_tensors_are_gathered_and_added_up(three):
    for seen in three:
        assert seen["sums"] == [[[111.0, 111.0], [111.0, 111.0]], [3, 6, 9]]
        assert seen["tensors"] == [0.0] + [1.0] * 2 + [2.0] * 3 + [3.0] * 4


def test_all_wait_for_the_last(three):
    assert [seen["waited"] for seen in three] == [3, 3, 3]


def test_a_process_alone_does_everything():
    tensor = torch.ones(2)
    processes.add_up([tensor])
    processes.wait_for_all()
    processes.leave()
    assert processes.start("cuda:5") == "cuda:5"
    assert processes.rank() == 0
    assert processes.count() == 1
    assert processes.is_first()
    assert processes.mine([1, 2, 3]) == [1, 2, 3]
    assert processes.gather([1, 2, 3]) == [1, 2, 3]
    assert tensor.tolist() == [1, 1]
    assert "WORLD_SIZE" not in os.environ


def test_a_process_that_fails_ends_the_others(tmp_path):
    """In one line of its own, while the others wait for it: nothing hangs."""
    script = tmp_path / "work.py"
    script.write_text(f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from plumbing import processes
processes.start("cpu")
if processes.rank() == 1:
    print("error: found no problem", file=sys.stderr)
    sys.exit(2)
processes.wait_for_all()
""")
    status, _, err = run_script(str(script), [], processes=2, timeout=100)
    assert status != 0
    assert err.count("error: found no problem") == 1
