"""plumbing/processes.py: one process alone, three real ones side by side on the CPU, and workers
that die."""
import contextlib
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
import torch.distributed as distributed
from helpers import ROOT, call_script, run_script, start_script

import plumbing
from commands import eval as evaluation
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
    status, _, err = run_script(str(script), [], processes=2)
    assert status != 0
    assert err.count("error: found no problem") == 1


# ----------------------------------------------------------------------- what torchrun sets, or not

WHOLE = {"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
BROKEN = {  # what is changed (None: not set) -> how the line begins
    "no rank": ({"RANK": None}, "RANK: found none, expected 0 to 1"),
    "a rank beyond": ({"RANK": "2"}, "RANK: found '2', expected 0 to 1"),
    "a rank below": ({"RANK": "-1"}, "RANK: found '-1', expected 0 to 1"),
    "a rank that is a word": ({"RANK": "first"}, "RANK: found 'first', expected 0 to 1"),
    "an empty rank": ({"RANK": ""}, "RANK: found '', expected 0 to 1"),
    "no size": ({"WORLD_SIZE": None}, "WORLD_SIZE: found none, expected a number"),
    "a size of 0": ({"WORLD_SIZE": "0"}, "WORLD_SIZE: found '0', expected a number"),
    "a size that is a word": ({"WORLD_SIZE": "two"}, "WORLD_SIZE: found 'two', expected a number"),
    "a size of many digits": ({"WORLD_SIZE": "9" * 5000}, "WORLD_SIZE: found '999"),
    "no host": ({"MASTER_ADDR": None}, "MASTER_ADDR: found none, expected the host"),
    "an empty host": ({"MASTER_ADDR": ""}, "MASTER_ADDR: found '', expected the host"),
    "no port": ({"MASTER_PORT": None}, "MASTER_PORT: found none, expected a port"),
    "no such port": ({"MASTER_PORT": "70000"}, "MASTER_PORT: found '70000', expected a port")}


def set_environment(monkeypatch, variables):
    for name, value in variables.items():
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, value)


@pytest.mark.parametrize("what", BROKEN)
def test_half_of_what_torchrun_sets_is_one_line(monkeypatch, capsys, tmp_path, what):
    """From every process: none knows whether it is the first."""
    changes, message = BROKEN[what]
    set_environment(monkeypatch, WHOLE | changes)
    status, out, err = call_script(
        monkeypatch, capsys, evaluation, "--out", tmp_path / "out", "--problems", 1)
    (line,) = err.splitlines()
    assert (status, out) == (2, "")
    assert line.startswith(f"error: {message}")
    assert not (tmp_path / "out").exists()


def test_a_host_that_is_none_is_one_line(monkeypatch):
    set_environment(monkeypatch, WHOLE | {"MASTER_ADDR": "no such host"})
    with pytest.raises(ValueError, match="^MASTER_ADDR: found 'no such host', where 2 processes"):
        processes.start("cpu")
    assert not distributed.is_initialized()


def test_a_process_takes_its_gpu_before_it_joins_the_others(monkeypatch):
    """nccl talks through the GPU that is current when it joins."""
    done = []
    set_environment(monkeypatch, WHOLE | {"LOCAL_RANK": "3"})
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: done.append(("set", device)))
    monkeypatch.setattr(processes, "_meet", lambda: "a store")

    def join(backend, **how):
        done.append((backend, how["device_id"]))
        assert (how["rank"], how["world_size"], how["store"]) == (1, 2, "a store")

    monkeypatch.setattr(distributed, "init_process_group", join)
    assert processes.start("cuda") == "cuda:3"
    gpu = torch.device("cuda:3")
    assert done == [("set", gpu), ("nccl", gpu)]


def test_a_gpu_needs_to_know_which_process_of_its_machine_this_is(monkeypatch):
    for found in (None, "", "one"):
        set_environment(monkeypatch, WHOLE | {"LOCAL_RANK": found})
        with pytest.raises(ValueError, match="^LOCAL_RANK: found (None|''|'one'), expected"):
            processes.start("cuda")


SHARED = """
import dataclasses
import pathlib
import sys
import time

from plumbing import processes
from plumbing.command_line import command_line, option

@dataclasses.dataclass
class Settings:
    out: str = option("", "folder", may_be_empty=True)

def main(settings):
    processes.start("cpu")
    time.sleep(processes.rank())
    (pathlib.Path(settings.out) / f"done{processes.rank()}").write_text("")

if __name__ == "__main__":
    command_line(Settings, main, shares_work=True)
    (pathlib.Path(sys.argv[2]) / "nobody is here").write_text("")
"""


def test_a_shared_scripts_processes_leave_together(tmp_path):
    """None goes on behind command_line, where gloo's threads may abort the interpreter."""
    script = tmp_path / "work.py"
    script.write_text(f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n{SHARED}")
    status, out, err = run_script(str(script), ["--out", tmp_path], processes=2)
    assert status == 0, err
    assert out.startswith("settings: ") and out.count("settings: ") == 1
    assert (tmp_path / "done0").exists() and (tmp_path / "done1").exists()
    assert not (tmp_path / "nobody is here").exists()


# ----------------------------------------------------------------------------------- those that die


def is_alive(pid):
    """Whether a process runs; one that nobody has buried yet does not."""
    with contextlib.suppress(OSError):
        with open(f"/proc/{pid}/stat", encoding="utf-8") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    return False


def wait_for(condition, seconds=200):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


ENDLESS = """
import os
import pathlib
import sys
import time
from plumbing import processes
from plumbing.records import locked
processes.start("cpu")
folder = pathlib.Path(sys.argv[1])
(folder / f"{processes.rank()}.new").write_text(str(os.getpid()))
os.rename(folder / f"{processes.rank()}.new", folder / f"{processes.rank()}.pid")
if processes.rank() == 0:
    with locked(folder):
        processes.wait_for_all()
processes.wait_for_all()
time.sleep(1000)
"""


def test_workers_whose_launcher_was_killed_end_and_release_the_lock(tmp_path):
    """At work, or waiting for each other."""
    script = tmp_path / "work.py"
    script.write_text(f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n{ENDLESS}")
    running = start_script(str(script), [tmp_path], processes=2)
    wait_for(lambda: len(list(tmp_path.glob("*.pid"))) == 2)
    pids = [int(file.read_text()) for file in tmp_path.glob("*.pid")]
    assert all(map(is_alive, pids))
    running.send_signal(signal.SIGKILL)
    running.communicate(timeout=100)
    wait_for(lambda: not any(map(is_alive, pids)))


def square(number, folder):
    """A worker's task: 2 dies, 3 leaves, 4 raises; the others say who they are."""
    if number == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    if number == 3:
        os._exit(7)
    if number == 4:
        raise ValueError("number: found 4")
    if folder is not None:
        file = os.path.join(folder, f"{number}.pid")
        with open(file + ".new", "w", encoding="utf-8") as opened:
            opened.write(str(os.getpid()))
        os.rename(file + ".new", file)
        time.sleep(1000)
    return number * number, os.getpid()


def name_of(number):
    return f"run {number}"


def test_workers_do_all_tasks_each_in_a_process_beside_this_one():
    tasks = [(number, None) for number in (5, 6, 7, 8, 9)]
    found = dict(processes.side_by_side(square, tasks, 2, name_of))
    assert [found[i][0] for i in range(5)] == [25, 36, 49, 64, 81]
    pids = {pid for _, pid in found.values()}
    assert len(pids) == 2 and os.getpid() not in pids
    assert not any(map(is_alive, pids))
    assert list(processes.side_by_side(square, [], 2, name_of)) == []


@pytest.mark.parametrize("number, message", (
    (2, r"^run 1: its process was ended by signal 9 \(SIGKILL, as a system does that has no memory "
        r"left\), expected a result"),
    (3, "^run 1: its process ended with exit status 7, expected a result"),
    (4, "^number: found 4$")))
def test_a_worker_that_dies_is_one_line_that_says_which_and_how(number, message):
    with pytest.raises(ValueError, match=message):
        list(processes.side_by_side(square, [(5, None), (number, None)], 1, name_of))


PARENT = """
import sys
sys.path[:0] = [{root!r}, {tests!r}, {here!r}]
from plumbing import processes
from test_processes import name_of, square
if __name__ == "__main__":
    list(processes.side_by_side(square, [(8, sys.argv[1]), (9, sys.argv[1])], 2, name_of))
"""


def test_a_parent_that_dies_leaves_no_orphans(tmp_path):
    script = tmp_path / "parent.py"
    script.write_text(PARENT.format(
        root=str(ROOT), tests=str(ROOT / "tests"), here=os.path.dirname(__file__)))
    running = subprocess.Popen([sys.executable, script, tmp_path], stderr=subprocess.PIPE)
    wait_for(lambda: len(list(tmp_path.glob("*.pid"))) == 2)
    pids = [int(file.read_text()) for file in tmp_path.glob("*.pid")]
    running.send_signal(signal.SIGKILL)
    running.communicate(timeout=100)
    wait_for(lambda: not any(map(is_alive, pids)))


CLOSED = """
import os
import sys
sys.path.insert(0, {root!r})
import plumbing
with open({file!r}, "w") as file:
    print("said to nobody", file=sys.stderr)
    print("said to nobody")
    os.write(2, b"by a library")
    assert file.fileno() > 2
"""


@pytest.mark.parametrize("closed", ("2>&-", ">&-", "<&-", "<&- >&- 2>&-"))
def test_closed_streams_lead_nowhere_and_no_file_takes_their_place(tmp_path, closed):
    file = tmp_path / "file"
    script = tmp_path / "script.py"
    script.write_text(CLOSED.format(root=str(ROOT), file=str(file)))
    done = subprocess.run(["bash", "-c", f'"$@" {closed}', "bash", sys.executable, script])
    assert done.returncode == 0
    assert file.read_text() == ""
    assert plumbing.PARENT == os.getppid()
