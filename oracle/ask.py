"""Ask an implementation for the rows of a case: a server over HTTP, or a command a case.

PORTING.md says what they must answer. Needs the standard library alone.
"""
import http.client
import json
import os
import shlex
import signal
import subprocess
import threading
import time
import urllib.error
import urllib.request

from compare import shortened
from hand_in import LARGEST, Rows, only_known, parse_json

NOT_OFFERED = (404, 405, 501)
LAST_WORDS = 4096  # bytes of a command's error output that are kept


def post(url, request, timeout):
    """The JSON object that an engine answers, or None where it does not offer this."""
    body = json.dumps(request).encode()
    headers = {"Content-Type": "application/json"}
    try:
        message = urllib.request.Request(url, body, headers)
        with urllib.request.urlopen(message, timeout=timeout) as answer:
            raw = answer.read(LARGEST + 1)
    except urllib.error.HTTPError as error:
        if error.code in NOT_OFFERED:
            return None
        raise ValueError(f"{url}: found status {error.code}, expected 200, 404 or 501") from None
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise ValueError(f"{shortened(url)}: no answer: {error}") from None
    found = parse_json(raw, url)
    if "error" in found:
        raise ValueError(f"{url}: answered an error: {shortened(found['error'])}")
    return found


def ask_server(url, name, inputs, expected, options):
    """The Rows of a case, gathered from an engine's answers."""
    url = url.rstrip("/")
    if name in ("sampler", "choices"):
        answer = post(f"{url}/stop/{name}", inputs, options.timeout)
        return only_known(answer or {}, expected, f"{url}/stop/{name}")
    about = {"case": name, "checkpoint": inputs["checkpoint"], "stop": inputs["stop"],
             "dtype": options.dtype}
    rows = Rows()

    def gather(address, requests):
        """Ask for the entries of rows, one request each."""
        for number, request in enumerate(requests):
            answer = post(f"{url}/stop/{address}", about | request, options.timeout)
            if answer is None:
                return
            known = only_known(answer, expected, f"{url}/stop/{address}")
            rows.notes += [note for note in known.notes if note not in rows.notes]
            for row, value in known.values.items():
                rows.values.setdefault(row, [None] * len(requests))[number] = value

    gather("score", [{"prefix_token_ids": prefix["ids"]} for prefix in inputs["prefixes"]])
    labels = inputs["labels"]
    labelled = [prefix["ids"] for prefix in inputs["prefixes"][:len(labels)]]
    training = post(f"{url}/stop/train", about | {"prefixes": labelled, "labels": labels},
                    options.timeout)
    known = only_known(training or {}, expected, f"{url}/stop/train")
    rows.values |= known.values
    rows.notes += known.notes
    gather("run", inputs["runs"])
    return rows


def ask_command(command, name, inputs, expected, options):
    """The Rows of a case: the command gets the case on its standard input, and writes the hand-in
    to its standard output."""
    request = inputs | {"name": name, "dtype": options.dtype, "root": str(options.root)}
    source = f"{shortened(command)}, case {name}"
    try:
        words = shlex.split(command)
        if not words:
            raise ValueError("found no word in it, expected a program")
        process = subprocess.Popen(
            words, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, start_new_session=True)
    except (OSError, ValueError) as error:
        raise ValueError(f"--command: {shortened(command)}: cannot be started: {error}") from None
    try:
        out, err = talk(process, json.dumps(request).encode(), options.timeout)
    except subprocess.TimeoutExpired:
        raise ValueError(f"{source}: no answer within {options.timeout:g} seconds") from None
    finally:
        stop_all(process)
    if len(out) > LARGEST:
        raise ValueError(f"{source}: found more than {LARGEST:,} bytes on its standard output, "
                         "expected at most so many")
    if process.returncode != 0:
        last = err.decode(errors="replace").strip().splitlines()[-1:] or [""]
        raise ValueError(f"{source}: exit status {process.returncode}: {shortened(last[0])}")
    return only_known(parse_json(out, source), expected, source)


class Reader(threading.Thread):
    """Reads a pipe to its end. Of more bytes than `most` it keeps the last, or, where it stops
    there, the first and one more."""

    def __init__(self, pipe, most, stops):
        super().__init__(daemon=True)
        self.pipe = pipe
        self.most = most
        self.stops = stops
        self.content = bytearray()

    def run(self):
        while part := self.pipe.read1(2 ** 16):
            self.content += part
            if len(self.content) > self.most:
                if self.stops:
                    return
                del self.content[:-self.most]


def feed(pipe, request):
    """Write a request to a command, which need not read it."""
    try:
        pipe.write(request)
        pipe.close()
    except OSError:
        pass


def talk(process, request, timeout):
    """(standard output, the end of the error output) of a command that gets a request. Of more than
    LARGEST bytes it reads on no further, and waits no longer. TimeoutExpired where it does not end
    in time."""
    end = time.monotonic() + timeout
    out = Reader(process.stdout, LARGEST, True)
    err = Reader(process.stderr, LAST_WORDS, False)
    threading.Thread(target=feed, args=(process.stdin, request), daemon=True).start()
    for reader in (out, err):
        reader.start()
    out.join(timeout)
    if out.is_alive():
        raise subprocess.TimeoutExpired(process.args, timeout)
    if len(out.content) <= LARGEST:
        process.wait(max(0.0, end - time.monotonic()))
        err.join(1)
    return bytes(out.content), bytes(err.content)


def stop_all(process):
    """End a command and what it started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except OSError:
        pass  # all have ended
    process.wait()
