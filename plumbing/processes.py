"""One process, or several side by side: `torchrun --nproc-per-node N train.py ...`
(torch.distributed, data parallel), and a study's own workers.

Without torchrun every function here does what one process needs: nothing. Work is dealt out by
problem: process r of N takes items r, r + N, ...; rank 0 prints, draws the bars and writes what is
written once.
"""
import collections
import datetime
import multiprocessing
import multiprocessing.connection
import os
import signal
import socket
import sys
import threading
import time

import torch
import torch.distributed as distributed

import plumbing

TO_MEET = datetime.timedelta(minutes=30)  # until all processes have started
TO_WAIT = datetime.timedelta(days=7)      # one may wait long for the others' last paths


# --------------------------------------------------------------------------------------- torchrun


def start(device):
    """Join the processes that torchrun started, if it did; -> the device of this one ("cuda"
    becomes "cuda:1"). ValueError where its variables are not whole, or the others do not come."""
    check_environment()
    if "WORLD_SIZE" not in os.environ:
        return device
    backend = "nccl" if device == "cuda" else "gloo"
    own = None
    if device == "cuda":
        device = f"cuda:{_local_rank()}"
        own = torch.device(device)
        torch.cuda.set_device(own)  # first: whatever joins by nccl takes the current device
    if not distributed.is_initialized():
        if "TORCHELASTIC_RUN_ID" in os.environ:  # its launcher is there as long as the run
            end_with(plumbing.PARENT, "torchrun")
        distributed.init_process_group(
            backend, store=_meet(), rank=rank(), world_size=launched(), timeout=TO_WAIT,
            device_id=own)
    return device


def check_environment():
    """Raise ValueError unless all the variables are there that torchrun sets, or none of them is:
    half of them make a process that waits for others, or that does all of their work."""
    misfit = _misfit()
    if misfit is not None:
        name, expected = misfit
        found = repr(os.environ[name])[:60] if name in os.environ else "none"
        raise ValueError(f"{name}: found {found}, expected {expected} (as torchrun sets it; "
                         "without torchrun unset WORLD_SIZE and RANK)")


def _misfit():
    """(variable, what is expected of it) of the first one that is not as torchrun sets it, or
    None."""
    if "WORLD_SIZE" not in os.environ and "RANK" not in os.environ:
        return None
    processes = _number("WORLD_SIZE", 0)
    if processes < 1:
        return "WORLD_SIZE", "a number of processes"
    if not 0 <= _number("RANK", -1) < processes:
        return "RANK", f"0 to {processes - 1}, of WORLD_SIZE={processes} processes"
    if not os.environ.get("MASTER_ADDR"):
        return "MASTER_ADDR", "the host where the processes meet"
    if not 0 < _number("MASTER_PORT", 0) < 2 ** 16:
        return "MASTER_PORT", "a port, 1 to 65535"
    return None


def _number(name, otherwise):
    """A whole number in the environment; `otherwise` where there is none."""
    text = os.environ.get(name, "")
    is_number = text.isascii() and text.isdecimal() and len(text) <= 9
    return int(text) if is_number else otherwise


def _local_rank():
    """Which of the processes on this machine this one is."""
    number = _number("LOCAL_RANK", None)
    if number is None:
        found = os.environ.get("LOCAL_RANK")
        raise ValueError(f"LOCAL_RANK: found {found!r:.60}, expected a number, as torchrun sets it")
    return number


def _meet():
    """The store by which the processes find each other. ValueError where they do not."""
    host = os.environ["MASTER_ADDR"]
    port = os.environ["MASTER_PORT"]
    try:
        socket.getaddrinfo(host, port)
        store, _, _ = next(distributed.rendezvous("env://", timeout=TO_MEET))
    except (RuntimeError, ValueError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"MASTER_ADDR: found {host!r:.60}, where {launched()} processes do not meet by port "
            f"{port}: {reason}") from None
    store.set_timeout(TO_WAIT)
    return distributed.PrefixStore("default_pg", store)


def leave():
    """Part from the other processes, when all have come here, and end this one.
    It ends at once: threads of gloo that are still at work abort an interpreter that takes its
    time."""
    if distributed.is_initialized():
        distributed.barrier()
        distributed.destroy_process_group()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def count():
    """How many processes work together."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def launched():
    """How many processes torchrun started, whether or not they have joined yet."""
    return _number("WORLD_SIZE", 1)


def rank():
    """Which of them this one is, from 0; known before they have joined."""
    return _number("RANK", 0) if "WORLD_SIZE" in os.environ else 0


def is_first():
    """Whether this process prints and writes what is printed and written once. Known before
    `start` too, so that a mistake in the flags is said once; of processes that cannot know which
    they are each speaks for itself."""
    return rank() == 0 or _misfit() is not None


def mine(items):
    """This process's share of a list."""
    return items[rank()::count()]


def wait_for_all():
    """Return when every process has come here."""
    if count() > 1:
        distributed.barrier()


def gather(share):
    """The whole list, on every process, of which each holds its share as `mine` deals it out."""
    if count() == 1:
        return share
    shares = [None] * count()
    distributed.all_gather_object(shares, share)
    whole = [None] * sum(len(part) for part in shares)
    for place, part in enumerate(shares):
        whole[place::count()] = part
    return whole


def add_up(tensors):
    """Replace each tensor by its sum over the processes, in place."""
    if count() > 1:
        for tensor in tensors:
            distributed.all_reduce(tensor)


# ------------------------------------------------------------------------- parents and own workers


def end_with(parent, name, every=1.0):
    """End this process soon after the one that started it (its id, its name) has ended: left
    alone it would hold the run's lock, and wait for others for ever."""
    def watch():
        while os.getppid() == parent:
            time.sleep(every)
        if is_first():
            try:
                print(f"error: {name} has ended, and this run with it", file=sys.stderr, flush=True)
            except OSError:  # nobody is there to read it
                pass
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


class Worker:
    """A process that does one task after another, and what it is at."""

    def __init__(self, context, work):
        self.connection, other = context.Pipe()
        self.process = context.Process(target=_serve, args=(work, other), daemon=True)
        self.process.start()
        other.close()  # so that the pipe ends where the process does
        self.task = None

    def begin(self, number, task):
        self.task = number
        try:
            self.connection.send(task)
        except OSError:  # it has died: `result` says so
            pass

    def result(self):
        """What its task gives. What the task raised is raised here. EOFError: it has died."""
        try:
            is_result, value = self.connection.recv()
        except OSError:
            raise EOFError from None
        if not is_result:
            raise value
        return value

    def death(self):
        """How it ended, in words."""
        self.process.join(10)
        code = self.process.exitcode
        if code is None or code >= 0:
            return f"ended with exit status {code}"
        number = -code
        hint = ", as a system does that has no memory left" if number == signal.SIGKILL else ""
        return f"was ended by signal {number} ({signal.Signals(number).name}{hint})"


def side_by_side(work, tasks, jobs, name):
    """Yield (number, work(*task)) for each of the tasks, as they end, `jobs` at a time, each in a
    process of its own. name(number): the task in words. ValueError naming the task whose process
    died, and how; what a task raises is raised. None of the processes outlives this one."""
    context = multiprocessing.get_context("spawn")  # a fork would share torch's threads
    waiting = collections.deque(range(len(tasks)))
    workers = {}  # connection -> its Worker, at work
    started = []
    try:
        with _without_interruptions():
            for _ in range(min(jobs, len(tasks))):
                started.append(Worker(context, work))
        for worker in started:
            number = waiting.popleft()
            worker.begin(number, tasks[number])
            workers[worker.connection] = worker
        while workers:
            for connection in multiprocessing.connection.wait(list(workers)):
                worker = workers.pop(connection)
                number = worker.task
                try:
                    result = worker.result()
                except EOFError:
                    raise ValueError(
                        f"{name(number)}: its process {worker.death()}, expected a result: the "
                        "same command begins it again") from None
                if waiting:
                    following = waiting.popleft()
                    worker.begin(following, tasks[following])
                    workers[connection] = worker
                yield number, result
    finally:
        for worker in started:
            worker.process.terminate()
            worker.process.join()


class _without_interruptions:
    """Ctrl-C reaches every process of a terminal; those that are started here leave it to this
    one, which ends them."""

    def __enter__(self):
        self.is_main = threading.current_thread() is threading.main_thread()
        if self.is_main:
            self.before = signal.signal(signal.SIGINT, signal.SIG_IGN)

    def __exit__(self, *_):
        if self.is_main:
            signal.signal(signal.SIGINT, self.before)


def _serve(work, connection):
    """A Worker's process: tasks in, (True, result) or (False, what it raised) out."""
    end_with(multiprocessing.parent_process().pid, "the study")
    while True:
        try:
            task = connection.recv()
        except (EOFError, OSError):
            return
        try:
            answer = True, work(*task)
        except (ValueError, OSError, RuntimeError, MemoryError) as error:
            answer = False, error
        connection.send(answer)
