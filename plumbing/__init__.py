"""What is looked up, not read: files, formats, command lines. The story stands one folder up.

The scripts import this package first of all, since the imports that follow take seconds: Ctrl-C
during them ends the program in one line, as it does later (command_line.py).
"""
import os
import signal
import sys
import threading
from pathlib import Path


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


if is_script() and threading.current_thread() is threading.main_thread():
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, leave)
