"""Chat templates, rendered as transformers' apply_chat_template renders them.

    text = render(template, messages=[{"role": "user", "content": "hi"}], ...)

A template is a program in Jinja from whoever published the checkpoint. It runs in jinja2's
sandbox, which keeps it from files and from Python, and in a process of its own, which the system
ends where it loops or grows without end. That process is this file, run as a script: one for all
templates, started when first needed, gone when this one is.
"""
import datetime
import functools
import json
import os
import resource
import signal
import subprocess
import sys
import threading

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

SECONDS = 0.5             # of computing, for one text
MEMORY = 2 ** 30          # bytes of the process
LONGEST = 1_000_000       # characters of a text: more than a context holds
TODAY = datetime.datetime(2025, 8, 5)  # whenever it is run: gpt-oss's prompt holds the date


# ----------------------------------------------------------------- in this process: asking for it


class Renderer:
    """The process that renders, as seen from here."""

    def __init__(self):
        self.process = None
        self.owner = None  # the process that started it: after a fork, another needs its own
        self.lock = threading.Lock()

    def answer(self, request):
        """What it answers: a text or an error."""
        with self.lock:
            if self.owner != os.getpid() or self.process.poll() is not None:
                self.start()
            try:
                self.process.stdin.write(json.dumps(request) + "\n")
                self.process.stdin.flush()
                line = self.process.stdout.readline()
            except BrokenPipeError:
                line = ""
            except BaseException:  # Ctrl-C: the next request would read this one's answer
                self.process.kill()
                self.process.wait()
                raise
            if line:
                return json.loads(line)
            status = self.process.wait()
        if status == -signal.SIGPROF:
            return {"error": f"it takes more than {SECONDS} seconds"}
        return {"error": f"it ends the process that renders it (status {status})"}

    def start(self):
        self.process = subprocess.Popen(
            [sys.executable, "-P", __file__],  # -P: a file beside this one hides no module
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            encoding="ascii")
        self.owner = os.getpid()


RENDERER = Renderer()


def render(template, **variables):
    """The text that a template makes of its variables. ValueError, in one line, where it makes
    none."""
    answer = RENDERER.answer({"template": template, "variables": variables})
    if "error" in answer:
        raise ValueError(answer["error"])
    return answer["text"]


# ---------------------------------------------------------- in the process of its own: rendering


class Generation(Extension):
    """{% generation %} text {% endgeneration %}: the model's part of a training text, shown as it
    is."""
    tags = {"generation"}

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
        return jinja2.nodes.Scope(body).set_lineno(line)


def raise_exception(message):
    """How a template refuses messages."""
    raise jinja2.TemplateError(message)


def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    """JSON without Jinja's escapes for HTML."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators,
        sort_keys=sort_keys)


@functools.cache
def compiled(template):
    """A template's program, in the environment that transformers gives it."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = TODAY.strftime
    return environment.from_string(template)


def attempt(request):
    """The answer to a request: its text, or the error that came of it."""
    try:
        text = compiled(request["template"]).render(request["variables"])
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        return {"error": f"{type(error).__name__}: {lines[0][:300]}".removesuffix(": ")}
    if len(text) > LONGEST:
        return {"error": f"found {len(text)} characters, expected at most {LONGEST}"}
    return {"text": text}


def serve():
    """Answer requests, a line of JSON each, until there are no more.
    The limits are the system's, so that nothing a template does gets round them: a timer of
    computing time that ends the process, and (on Linux) memory that it is not given."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for who asked
    if sys.platform == "linux":
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    for line in sys.stdin:
        request = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        answer = attempt(request)
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    serve()
