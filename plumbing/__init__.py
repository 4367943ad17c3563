"""What is looked up, not read: files, formats, command lines. The story stands one folder up.

The scripts import this package first of all, since the imports that follow take seconds: Ctrl-C
during them ends the program in one line, as it does later (command_line.py). Whether a stream is
closed and who started the program is looked at here, before anything can have changed it.
"""
import os
import signal
import sys
import threading
from pathlib import Path

PARENT = os.getppid()  # the process that started this one (processes.py)


def open_streams():
    """Let stdin, stdout and stderr lead nowhere where they are closed (2>&-): a line that nobody
    reads ends no run, and no file that is opened later takes their place and receives it."""
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free: this one
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))


def leave(*_):
    """Ctrl-C before there is anything to keep. Of several processes (torchrun) one says so."""
    if os.environ.get("RANK", "0") == "0":
        print("interrupted; nothing was begun", file=sys.stderr, flush=True)
    os._exit(130)


def is_script():
    """Whether one of the project's scripts was started, and not a test or another program."""
    started = getattr(sys.modules["__main__"], "__file__", None)
    folder = Path(__file__).resolve().parent.parent
    return started is not None and Path(started).resolve().parent in (folder, folder / "toy")


open_streams()
if is_script() and threading.current_thread() is threading.main_thread():
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, leave)
