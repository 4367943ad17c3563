"""A checkpoint's tokenizer.json, and the prompts that its chat template makes of a user's message.

    tokenizer = Tokenizer("directory or Hub id")
    ids = tokenizer.prompt("What is 1 + 1?")

A chat template is a program in Jinja, which is not run here: of the four formats below the frame is
known, and what a template adds to it (a default system message, an opened <think>) is read from the
template's text. A template that does something else is refused by name. The prompts of
DeepSeek-R1-Distill, R1-0528-Qwen3-8B, Qwen2, Qwen2.5 (also Math), Qwen3, QwQ and gpt-oss are those
that transformers renders; of gpt-oss with a pinned date, where the template takes today's.
"""
import dataclasses
import re

import tokenizers

from plumbing.checkpoint import find_folder, is_there, shorten
from plumbing.problems import instruction
from plumbing.records import read_json

BOS = "<｜begin▁of▁sentence｜>"
THINK = "<think>\n"
EFFORTS = ("low", "medium", "high")

HARMONY_SYSTEM = """\
You are ChatGPT, a large language model trained by OpenAI.
Knowledge cutoff: 2024-06
Current date: 2025-08-05

Reasoning: {effort}

# Valid channels: analysis, commentary, final. Channel must be included for every message."""


@dataclasses.dataclass(frozen=True)
class Format:
    """The frame of a chat format."""
    marks: tuple          # special tokens that a tokenizer of this format has
    frame: str            # of a prompt: {bos}, {system}, {text}, {effort}, {opening}
    generation: str = ""  # what begins the model's turn, behind which a template may open <think>
    system: str = ""      # how a system message begins
    bos: str = ""         # where no template says otherwise
    opening: str = ""     # likewise


FORMATS = {  # the first that fits is taken
    "harmony": Format(
        marks=("<|start|>", "<|channel|>", "<|message|>"),
        frame="<|start|>system<|message|>" + HARMONY_SYSTEM + "{system}<|end|>"
              "<|start|>user<|message|>{text}<|end|><|start|>assistant"),
    "r1": Format(
        marks=("<｜User｜>", "<｜Assistant｜>"),
        frame="{bos}<｜User｜>{text}<｜Assistant｜>{opening}",
        generation="<｜Assistant｜>",
        bos=BOS,
        opening=THINK),
    "chatml": Format(
        marks=("<|im_start|>", "<|im_end|>"),
        frame="{bos}{system}<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n{opening}",
        generation="<|im_start|>assistant\n",
        system="<|im_start|>system\n"),
    "raw": Format(marks=(), frame="{text}")}


class Tokenizer:
    """The tokenizer of a checkpoint (directory or Hub id) and its chat format.
    The format is told from the special tokens and the chat template: r1 = DeepSeek-R1-Distill,
    chatml = Qwen, harmony = gpt-oss, raw = none. Raises ValueError, in one line, on a missing or
    broken file, a format without its special tokens, or a template that is not reproduced here."""

    def __init__(self, path, chat_format=None):
        folder = find_folder(path)
        self.library = read_library(folder / "tokenizer.json")
        fits = [name for name in FORMATS if self.has_tokens(FORMATS[name].marks)]
        config_file = folder / "tokenizer_config.json"
        config = read_json(config_file) if is_there(config_file) else {}
        template = read_template(folder, config)
        if chat_format is not None and chat_format not in fits:
            found = f"chat format: found {shorten(chat_format)}"
            raise ValueError(f"{found}, expected one that fits {folder}: {', '.join(fits)}")

        self.format = chat_format or choose_format(fits, template)
        self.frame = FORMATS[self.format]
        self.bos = self.frame.bos
        self.system = ""
        self.opening = self.frame.opening
        if template is not None and template.is_of(self.frame):
            if self.format == "harmony":
                self.system = template.read_harmony()
            else:
                self.bos = template.read_bos(config, self.frame)
                self.system = template.read_system(self.frame)
                self.opening = template.read_opening(self.frame)

    def has_tokens(self, marks):
        """Whether the vocabulary holds each of these texts as one token."""
        return all(self.library.token_to_id(mark) is not None for mark in marks)

    def encode(self, text):
        """Token ids of a text; special tokens in it are read as such, none are added."""
        what = f"text {shorten(text)}"
        try:
            text = text.encode("utf-8", "surrogateescape").decode()  # bytes of a plain locale
        except UnicodeError:
            raise ValueError(f"{what}: found bytes that are not UTF-8, or half a surrogate pair, "
                             "expected Unicode text") from None
        return call_library(what, self.library.encode, text, add_special_tokens=False).ids

    def decode(self, ids, skip_special_tokens=False):
        """The text of token ids."""
        return call_library(
            f"token ids {shorten(ids[:16])}",
            self.library.decode, ids, skip_special_tokens=skip_special_tokens)

    def prompt(self, text, effort="medium"):
        """Token ids of a user's message in the chat format, up to where the model goes on.
        effort: how long gpt-oss should reason (low, medium, high); the others ignore it."""
        if effort not in EFFORTS:
            raise ValueError(f"effort: found {shorten(effort)}, expected {' or '.join(EFFORTS)}")
        whole = self.frame.frame.format(
            bos=self.bos, system=self.system, text=text, effort=effort, opening=self.opening)
        return self.encode(whole)

    def ask(self, problem):
        """Token ids that put a Problem to the model.
        It comes with the paper's instruction, and as it is where the chat format is raw."""
        if self.format == "raw":
            return self.prompt(problem.problem)
        return self.prompt(instruction(problem))

    def completion(self, ids):
        """A path's text as a grader reads it: with special tokens, and the prompt's <think>."""
        return self.opening + self.decode(ids)

    def stream(self):
        """A function from one token id to the text that it completes: "" inside a character."""
        state = tokenizers.decoders.DecodeStream(skip_special_tokens=False)

        def step(token):
            return call_library(f"token id {token}", state.step, self.library, token) or ""

        return step


def call_library(what, function, *inputs, **settings):
    """The library's answer, or a ValueError that begins with `what`.
    Its errors are plain Exceptions, and its panics (Rust's) BaseExceptions."""
    try:
        return function(*inputs, **settings)
    except (KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(f"{what}: {lines[0]}") from None


def read_library(file):
    """The tokenizers.Tokenizer of a tokenizer.json."""
    if not file.is_file():
        raise ValueError(f"{file}: missing: no tokenizer of this checkpoint")
    return call_library(
        f"{file}: not a tokenizer", tokenizers.Tokenizer.from_file, str(file))


def choose_format(fits, template):
    """The first format that the special tokens allow and the template, if any, is written in."""
    if template is None:
        return fits[0]
    for name in fits:
        if template.is_of(FORMATS[name]):
            return name
    template.refuse("found none of the chat formats that the special tokens allow")


# ------------------------------------------------------------------------------- chat templates

# Jinja: a literal in quotes, and the tags {{ shown }}, {% done %}, {# a comment #}.
LITERAL = r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*\""""
INSIDE = rf"(?:{LITERAL}|[^'\"])*?"
TAG = re.compile(
    rf"\{{\{{[-+]?(?P<shown>{INSIDE})[-+]?\}}\}}"
    rf"|\{{%[-+]?(?P<done>{INSIDE})[-+]?%\}}"
    r"|\{#.*?#\}", re.DOTALL)
ONE_LITERAL = re.compile(rf"\s*({LITERAL})\s*", re.DOTALL)
ANY_LITERAL = re.compile(LITERAL, re.DOTALL)

# Conditions that may stand behind the mark of the model's turn, and what they are by default.
CONDITIONS = {
    "if enable_thinking is false": False,
    "if enable_thinking is defined and enable_thinking is false": False,
    "if enable_thinking is defined and not enable_thinking": False,
    "if enable_thinking is defined and enable_thinking is true": False,
    "if enable_thinking is defined and enable_thinking": False,
    "if enable_thinking": False,
    "if not enable_thinking": True,
    "if enable_thinking is not defined or enable_thinking": True,
    "if enable_thinking is not defined or enable_thinking is true": True,
    "if enable_thinking is undefined or enable_thinking is true": True}
SYSTEM_VARIABLE = re.compile(rf"system\w*\s*=\s*({LITERAL})", re.DOTALL)
TRIMMED = re.compile(r"message(\.content|\[['\"]content['\"]\])\s*(\|\s*trim|\.strip\()")
HARMONY_LINES = (
    "You are ChatGPT, a large language model trained by OpenAI.",
    "Knowledge cutoff: 2024-06",
    "# Valid channels: analysis, commentary, final. Channel must be included for every message.")
HARMONY_TOOLS = "Calls to these tools must go to the commentary channel: 'functions'."


def read_template(folder, config):
    """The ChatTemplate of a folder, or None.
    As in transformers, a file of its own comes before tokenizer_config.json."""
    file = folder / "chat_template.jinja"
    if is_there(file):
        try:
            return ChatTemplate(file.read_text(encoding="utf-8"), file)
        except (OSError, ValueError) as error:
            raise ValueError(f"{file}: not a text: {error}") from None

    file = folder / "tokenizer_config.json"
    found = config.get("chat_template")
    if isinstance(found, list):  # of several, by name
        found = named_default(found)
    if found is None:
        return None
    if not isinstance(found, str):
        message = f"chat_template: found {shorten(found)}, expected a text"
        raise ValueError(f"{file}: {message}, or a list with one named default")
    return ChatTemplate(found, file)


def named_default(templates):
    """Of [{"name", "template"}, ...] the one named default, or the list if there is none."""
    for entry in templates:
        if isinstance(entry, dict) and entry.get("name") == "default":
            return entry.get("template")
    return templates


def unquote(literal):
    r"""The text of a literal, unescaped as Jinja does: '\\boxed' -> \boxed."""
    return literal[1:-1].encode("ascii", "backslashreplace").decode("unicode-escape")


def begins_with(shown, text):
    """Whether what a {{ }} tag shows begins with a literal that begins with `text`."""
    literal = ANY_LITERAL.match(shown.lstrip())
    return literal is not None and unquote(literal[0]).startswith(text)


class ChatTemplate:
    """The text of a chat template, and what it says about a prompt of one user message."""

    def __init__(self, text, file):
        self.text = text
        self.file = file
        self.tags = list(TAG.finditer(text))

    def refuse(self, found):
        raise ValueError(
            f"{self.file}: chat_template: {found}: this template is not reproduced here "
            "(chat format raw takes a whole prompt as it is)")

    def is_of(self, frame):
        """Whether it is written in this format."""
        return any(mark in self.text for mark in frame.marks)

    def shown(self):
        """The {{ }} tags, in order."""
        return [tag for tag in self.tags if tag["shown"] is not None]

    def read_harmony(self):
        """What ends the system message: the first snapshots of gpt-oss speak of tools regardless.
        A system message that is not gpt-oss's is refused."""
        for line in HARMONY_LINES:
            if line not in self.text:
                self.refuse(f"gpt-oss's line {shorten(line)} is missing")
        done = ""
        for tag in self.tags:
            done = tag["done"] or done
            if HARMONY_TOOLS in (tag["shown"] or "") and done.strip() != "if tools":
                return "\n" + HARMONY_TOOLS
        return ""

    def read_bos(self, config, frame):
        """What the template shows as bos_token: the tokenizer's, "" where that is null."""
        shows_bos = any("bos_token" in tag["shown"] for tag in self.shown())
        if not shows_bos or "bos_token" not in config:
            return frame.bos
        token = config["bos_token"]
        if isinstance(token, dict):
            token = token.get("content")
        if not isinstance(token, str | None):
            raise ValueError(f"{self.file}: bos_token: found {shorten(token)}, expected a text")
        return token or ""

    def check_messages(self):
        """Refuse what would change a message, or put one into a variable."""
        for literal in SYSTEM_VARIABLE.findall(self.text):
            text = unquote(literal)
            if text:
                self.refuse(f"a default system message in a variable, {shorten(text)}")
        if TRIMMED.search(self.text):
            self.refuse("it trims messages")

    def read_system(self, frame):
        """The system message, marks included, where the user gives none; "" without one."""
        self.check_messages()
        if not frame.system:
            return ""
        found = set()
        done = ""
        for tag in self.tags:
            done = tag["done"] or done
            if tag["shown"] is not None and begins_with(tag["shown"], frame.system):
                found.add(self.read_default(tag["shown"], done, frame))
        found.discard("")
        if len(found) > 1:
            self.refuse(f"{len(found)} default system messages")
        return found.pop() if found else ""

    def read_default(self, shown, done, frame):
        """The system message that a {{ }} tag shows where the user gives none.
        done: what stands in the {% %} tag before it."""
        literal = ONE_LITERAL.fullmatch(shown)
        if literal is None:
            if "message" not in shown:  # not that of the user
                self.refuse(f"a default system message in variables, {shorten(shown)}")
            return ""
        text = unquote(literal[1])
        if text == frame.system:
            if "tools" not in done:  # what introduces tools, of which there are none
                self.refuse("a default system message in parts")
            return ""
        return text

    def read_opening(self, frame):
        """What the template puts behind the mark of the model's turn: "<think>\\n", or nothing."""
        opening = None
        for place, tag in enumerate(self.tags):
            for literal in ANY_LITERAL.findall(tag["shown"] or ""):
                _, mark, rest = unquote(literal).rpartition(frame.generation)
                if mark:
                    opening = rest
                    after = place + 1
        if opening is None:
            self.refuse(f"found no {frame.generation!r}, which begins the model's turn")
        return opening + self.read_rest(self.tags[after:])

    def read_rest(self, tags):
        """What is shown behind the mark of the model's turn, where enable_thinking is not set."""
        text = ""
        skipping = False
        for tag in tags:
            if tag["done"] is not None:
                words = " ".join(tag["done"].split())
                if words in CONDITIONS:
                    skipping = not CONDITIONS[words]
                elif words == "else":
                    skipping = not skipping
                elif words == "endif":
                    skipping = False
                else:
                    self.refuse(f"behind the mark of the model's turn, {shorten(words)}")
            elif tag["shown"] is not None and not skipping:
                literal = ONE_LITERAL.fullmatch(tag["shown"])
                if literal is None:
                    self.refuse(f"behind the mark of the model's turn, {shorten(tag['shown'])}")
                text += unquote(literal[1])
        return text
