"""A checkpoint's tokenizer.json, and the prompts that its chat template makes of a user's message.

    tokenizer = Tokenizer("directory or Hub id")
    ids = tokenizer.prompt("What is 1 + 1?")

A prompt is what transformers' apply_chat_template gives, of one user message and with
add_generation_prompt; only the date that a template may ask for is pinned (chat_template.py).
Without a template the frame is one of four, by the tokenizer's special tokens.
"""
import dataclasses
from pathlib import Path

import tokenizers

from plumbing.chat_template import render
from plumbing.checkpoint import find_folder, shorten
from plumbing.files import is_there, read_bytes
from plumbing.problems import instruction
from plumbing.records import read_json, require_keys_once

EFFORTS = ("low", "medium", "high")
PROBE = "What is 1 + 1?"  # a message that shows what a template puts around one
WITHOUT_BOS = (  # tokenizer classes of transformers that have no bos_token by default
    None, "PreTrainedTokenizerFast", "TokenizersBackend", "Qwen2Tokenizer", "Qwen2TokenizerFast")

HARMONY_SYSTEM = """\
You are ChatGPT, a large language model trained by OpenAI.
Knowledge cutoff: 2024-06
Current date: 2025-08-05

Reasoning: {effort}

# Valid channels: analysis, commentary, final. Channel must be included for every message."""


@dataclasses.dataclass(frozen=True)
class Format:
    """A chat format of its own, for checkpoints without a template."""
    marks: tuple  # special tokens that a tokenizer of this format has
    frame: str    # of a prompt: {text}, {effort}


FORMATS = {  # the first that fits is taken
    "harmony": Format(
        marks=("<|start|>", "<|channel|>", "<|message|>"),
        frame="<|start|>system<|message|>" + HARMONY_SYSTEM + "<|end|>"
              "<|start|>user<|message|>{text}<|end|><|start|>assistant"),
    "r1": Format(
        marks=("<｜User｜>", "<｜Assistant｜>"),
        frame="<｜begin▁of▁sentence｜><｜User｜>{text}<｜Assistant｜><think>\n"),
    "chatml": Format(
        marks=("<|im_start|>", "<|im_end|>"),
        frame="<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"),
    "raw": Format(marks=(), frame="{text}")}


class Tokenizer:
    """The tokenizer of a checkpoint (directory or Hub id) and its chat format.
    The format is the checkpoint's chat template; without one, or by wish (chat_format): r1 =
    DeepSeek-R1-Distill, chatml = Qwen, harmony = gpt-oss, raw = none. Raises ValueError, in one
    line, on a missing or broken file, a format without its special tokens, or a template that
    cannot be rendered."""

    def __init__(self, path, chat_format=None):
        folder = find_folder(path)
        self.library = read_library(folder / "tokenizer.json")
        fits = [name for name in FORMATS if self.has_tokens(FORMATS[name].marks)]
        if chat_format is not None and chat_format not in fits:
            found = f"chat format: found {shorten(chat_format)}"
            raise ValueError(f"{found}, expected one that fits {folder}: {', '.join(fits)}")

        self.template = read_template(folder) if chat_format is None else None
        self.format = chat_format or ("template" if self.template else fits[0])
        is_plain = chat_format is None and self.format == "raw"
        self.front = put_in_front(self.library) if is_plain else []
        self.opening = opened_thinking(self.chat(PROBE), PROBE)

    def has_tokens(self, marks):
        """Whether the vocabulary holds each of these texts as one token."""
        return all(self.library.token_to_id(mark) is not None for mark in marks)

    @property
    def unknown(self):
        """The token that stands for whatever the vocabulary does not hold; None: there is none."""
        return getattr(self.library.model, "unk_token", None)

    def count_unknown(self, ids):
        """How many of these token ids stand for something unknown."""
        unknown = self.unknown
        return 0 if unknown is None else ids.count(self.library.token_to_id(unknown))

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

    def chat(self, text, effort=None):
        """A user's message in the chat format, up to where the model goes on.
        effort: how long gpt-oss should reason (low, medium, high; None: what its template says);
        the others ignore it."""
        if effort not in (None, *EFFORTS):
            raise ValueError(f"effort: found {shorten(effort)}, expected {' or '.join(EFFORTS)}")
        if self.template is not None:
            return self.template.chat(text, effort)
        return FORMATS[self.format].frame.format(text=text, effort=effort or "medium")

    def prompt(self, text, effort=None):
        """Token ids of a user's message in the chat format (see `chat`). Of a tokenizer without
        one they begin as it begins every text; with chat_format "raw" the text is all."""
        return self.front + self.encode(self.chat(text, effort))

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
    if not is_there(file):
        raise ValueError(f"{file}: missing: no tokenizer of this checkpoint")
    content = read_bytes(file)
    require_keys_once(file, content)
    library = call_library(
        f"{file}: not a tokenizer", tokenizers.Tokenizer.from_buffer, content)
    # What a fine-tuning run left in the file would cut prompts, or fill them up. transformers, too,
    # asks for neither unless it is told to.
    library.no_truncation()
    library.no_padding()
    return library


def put_in_front(library):
    """Token ids that the tokenizer itself puts before a text, as Llama's does with its BOS."""
    marked = library.encode("a", add_special_tokens=True)
    mask = marked.special_tokens_mask
    return marked.ids[:mask.index(0)] if 0 in mask else []


def opened_thinking(prompt, message):
    """The <think> that a prompt opens behind its message, with what follows it; "" for none."""
    behind = prompt.rpartition(message)[2]
    _, mark, begun = behind.rpartition("<think>")
    return mark + begun if "</think>" not in begun and mark else ""


# ------------------------------------------------------------------------------- chat templates


@dataclasses.dataclass(frozen=True)
class ChatTemplate:
    """The chat template of a checkpoint."""
    text: str             # Jinja
    file: Path            # where it stands
    special_tokens: dict  # name, as bos_token -> text

    def chat(self, message, effort):
        """The prompt that it makes of a user's message. ValueError where it makes none."""
        settings = {"reasoning_effort": effort} if effort else {}
        try:
            return render(
                self.text, messages=[{"role": "user", "content": message}], tools=None,
                documents=None, add_generation_prompt=True, **self.special_tokens, **settings)
        except ValueError as error:
            raise ValueError(
                f"{self.file}: chat template: {error} "
                "(--chat-format raw takes a whole prompt as it is)") from None


def read_template(folder):
    """The ChatTemplate of a folder, or None.
    As in transformers, a file of its own comes before tokenizer_config.json."""
    file = folder / "tokenizer_config.json"
    config = read_json(file) if is_there(file) else {}
    found = config.get("chat_template")
    if is_there(folder / "chat_template.jinja"):
        file = folder / "chat_template.jinja"
        try:
            found = read_bytes(file).decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{file}: not a text: {error}") from None
    if found is None:
        return None
    if isinstance(found, list):  # of several, by name
        found = named_default(found)
    if not isinstance(found, str):
        message = f"chat_template: found {shorten(found)}, expected a text"
        raise ValueError(f"{file}: {message}, or a list with one named default")
    return ChatTemplate(found, file, read_special_tokens(folder, config, found))


def named_default(templates):
    """Of [{"name", "template"}, ...] the one named default, or the list if there is none."""
    for entry in templates:
        if isinstance(entry, dict) and entry.get("name") == "default":
            return entry.get("template")
    return templates


def read_special_tokens(folder, config, template):
    """The special tokens that have a name, as a template sees them: bos_token, image_token, ...
    As in transformers, special_tokens_map.json counts where tokenizer_config.json lists no added
    tokens. A bos_token that stands in neither, but that transformers' class may know, is refused
    where the template shows it."""
    found = dict(config)
    file = folder / "special_tokens_map.json"
    if "added_tokens_decoder" not in config and is_there(file):
        found |= read_json(file)
    if isinstance(found.get("extra_special_tokens"), dict):
        found |= found["extra_special_tokens"]
    file = folder / "tokenizer_config.json"
    if "bos_token" in template and config.get("tokenizer_class") not in WITHOUT_BOS:
        if "bos_token" not in found:
            raise ValueError(f"{file}: bos_token: missing, and the chat template shows it")

    tokens = {}
    for name, token in found.items():
        if not name.endswith("_token"):
            continue
        if isinstance(token, dict):
            token = token.get("content")
        if isinstance(token, str):
            tokens[name] = token
        elif not isinstance(token, bool | None):  # a flag, as add_bos_token, or no token
            raise ValueError(f"{file}: {name}: found {shorten(token)}, expected a text")
    return tokens
