"""plumbing/progress.py: what a log file says of a long job, by a clock that does not tick."""
import re
import sys

import pytest
from huggingface_hub.utils import tqdm

from plumbing import progress as room
from plumbing.progress import Lines, progress, shown_rate, shown_time


class Clock:
    """Time that passes only while somebody waits; `during(minute)` is what is done meanwhile."""

    def __init__(self, minutes, during=lambda minute: None):
        self.now = 1000.0
        self.left = minutes
        self.minute = 0
        self.during = during

    def __call__(self):
        return self.now

    def wait(self, seconds):
        """As threading.Event.wait: True when the job has ended."""
        if self.left == 0:
            return True
        self.left -= 1
        self.minute += 1
        self.now += seconds
        self.during(self.minute)
        return False


def test_a_line_a_minute_says_stage_count_rate_and_time_left(capsys):
    clock = Clock(3, lambda minute: lines.update(600))
    lines = Lines("paths", 7200, "tok", clock=clock)
    lines.tell(clock.wait)
    assert capsys.readouterr().err.splitlines() == [
        "paths: 600 of 7,200 tok (8%), 10 tok/s, 11.0 min left",
        "paths: 1,200 of 7,200 tok (17%), 10 tok/s, 10.0 min left",
        "paths: 1,800 of 7,200 tok (25%), 10 tok/s, 9.0 min left"]


def test_what_was_there_before_has_no_part_in_the_rate(capsys):
    clock = Clock(1, lambda minute: lines.update(30))
    lines = Lines("fit", 200, "step", 100, clock)
    lines.set_postfix_str("loss 0.5")
    lines.tell(clock.wait)
    expected = "fit: 130 of 200 step (65%), 0.5 step/s, 2.3 min left, loss 0.5\n"
    assert capsys.readouterr().err == expected


def test_a_job_that_stands_still_says_so_and_a_total_may_change(capsys):
    def during(minute):
        if minute == 2:
            lines.total -= 50
            lines.update(1)

    clock = Clock(2, during)
    lines = Lines("verify", 60, "problem", clock=clock)
    lines.tell(clock.wait)
    assert capsys.readouterr().err.splitlines() == [
        "verify: 0 of 60 problem (0%), 0.0 problem/s, time left not known yet",
        "verify: 1 of 10 problem (10%), 2.0 min a problem, 18.0 min left"]


def test_a_long_job_also_says_its_end_and_a_short_one_nothing(capsys):
    for minutes, expected in ((0, ""), (90, "paths: 5 of 5 tok (100%), 18.0 min a tok, 1.5 h in "
                                            "all\n")):
        clock = Clock(0)
        lines = Lines("paths", 5, "tok", clock=clock)
        with lines:
            lines.update(5)
            clock.now += 60 * minutes
        assert capsys.readouterr().err == expected


def test_the_thread_writes_while_the_job_is_at_work(monkeypatch, capsys):
    monkeypatch.setattr(room, "EVERY", 0.01)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: False, raising=False)
    with progress("check", 3, "prefix") as bar:
        bar.update()
        bar.ended.wait(0.2)
    err = capsys.readouterr().err
    assert len(re.findall(r"^check: 1 of 3 prefix \(33%\), ", err, re.MULTILINE)) >= 3
    assert not bar.thread.is_alive()


def test_a_stderr_that_cannot_be_written_ends_nothing(monkeypatch):
    class Full:
        def isatty(self):
            return False

        def write(self, text):
            raise OSError(28, "No space left on device")

    clock = Clock(2)
    monkeypatch.setattr(sys, "stderr", Full())
    Lines("paths", 5, "tok", clock=clock).tell(clock.wait)


def test_a_terminal_has_a_bar_and_other_processes_are_silent(monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with progress("paths", 5, "tok") as bar:
        assert isinstance(bar, tqdm) and not bar.disable
    monkeypatch.setattr(sys.stderr, "isatty", lambda: False, raising=False)
    assert isinstance(progress("paths", 5, "tok"), Lines)
    monkeypatch.setattr(room.processes, "is_first", lambda: False)
    with progress("paths", 5, "tok", done=2) as bar:
        bar.update(3)
        bar.total += 1
        assert bar.disable


@pytest.mark.parametrize("seconds, text", (
    (0, "0 s"), (89.4, "89 s"), (90, "1.5 min"), (5399, "90.0 min"), (5400, "1.5 h"),
    (360_000, "100.0 h")))
def test_times_are_in_seconds_minutes_or_hours(seconds, text):
    assert shown_time(seconds) == text


@pytest.mark.parametrize("rate, text", (
    (12_345.6, "12,346 tok/s"), (9.94, "9.9 tok/s"), (0.1, "0.1 tok/s"), (0.05, "20 s a tok"),
    (0, "0.0 tok/s")))
def test_slow_rates_are_seconds_a_unit(rate, text):
    assert shown_rate(rate, "tok") == text
