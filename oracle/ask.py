"""Ask an implementation for the rows of a case: a server over HTTP, or a command a case.

PORTING.md says what they must answer. Needs the standard library alone.
"""
import http.client
import json
import os
import shlex
import signal
import subprocess
import urllib.error
import urllib.request

from compare import shortened
from hand_in import LARGEST, Rows, only_known, parse_json

NOT_OFFERED = (404, 405, 501)


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
        process = subprocess.Popen(
            shlex.split(command), stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, start_new_session=True)
    except (OSError, ValueError, IndexError) as error:
        raise ValueError(f"--command: {shortened(command)}: cannot be started: {error}") from None
    try:
        out, err = process.communicate(json.dumps(request).encode(), options.timeout)
    except subprocess.TimeoutExpired:
        raise ValueError(f"{source}: no answer within {options.timeout:g} seconds") from None
    finally:
        stop_all(process)
    if process.returncode != 0:
        last = err.decode(errors="replace").strip().splitlines()[-1:] or [""]
        raise ValueError(f"{source}: exit status {process.returncode}: {shortened(last[0])}")
    return only_known(parse_json(out, source), expected, source)


def stop_all(process):
    """End a command and what it started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except OSError:
        pass  # all have ended
    process.wait()
