"""plumbing/tokenizer.py: texts and tokens, chat formats, and the prompts of chat templates.

chat_templates.json holds published templates with what transformers makes of them; where it is
installed, it is asked again.
"""
import datetime
import json
import os
import time
from pathlib import Path

import pytest
from helpers import GOLDEN, NAMES, golden, write_tokenizer
from tokenizers import processors

from plumbing import chat_template
from plumbing.problems import Problem, instruction
from plumbing.tokenizer import Tokenizer

BOS = "<\uff5cbegin\u2581of\u2581sentence\uff5c>"
EOS = "<\uff5cend\u2581of\u2581sentence\uff5c>"
USER = "<\uff5cUser\uff5c>"
ASSISTANT = "<\uff5cAssistant\uff5c>"
R1 = (BOS, USER, ASSISTANT, EOS, "<think>", "</think>")
CHATML = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>")
HARMONY = (
    "<|startoftext|>", "<|endoftext|>", "<|return|>", "<|channel|>", "<|start|>", "<|end|>",
    "<|message|>")
TEXT = "Café 数学: what is\n1 + 1? {x} 🙂"
SYSTEM = """You are ChatGPT, a large language model trained by OpenAI.
Knowledge cutoff: 2024-06
Current date: 2025-08-05

Reasoning: medium

# Valid channels: analysis, commentary, final. Channel must be included for every message."""
PLAIN_CHATML = f"<|im_start|>user\n{TEXT}<|im_end|>\n<|im_start|>assistant\n"
EXPECTED = {
    "r1": (R1, f"{BOS}{USER}{TEXT}{ASSISTANT}<think>\n"),
    "chatml": (CHATML, PLAIN_CHATML),
    "harmony": (
        HARMONY,
        f"<|start|>system<|message|>{SYSTEM}<|end|>"
        f"<|start|>user<|message|>{TEXT}<|end|><|start|>assistant"),
    "raw": ((), TEXT)}


# ----------------------------------------------------------------------------- texts and tokens


@pytest.mark.parametrize("name", EXPECTED)
def test_chat_formats(tmp_path, name):
    """Told apart by the special tokens; the prompt is this text, and its marks are single
    tokens."""
    special, text = EXPECTED[name]
    tokenizer = Tokenizer(write_tokenizer(tmp_path, special))
    assert tokenizer.format == name
    ids = tokenizer.prompt(TEXT)
    assert tokenizer.decode(ids) == text
    for mark in special:
        token = tokenizer.library.token_to_id(mark)
        assert token is not None
        assert ids.count(token) == text.count(mark)
    assert all(token < 256 for token in tokenizer.encode(TEXT))
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT
    if special:
        assert special[1] not in tokenizer.decode(ids, skip_special_tokens=True)


def test_what_training_left_in_the_file_cuts_no_prompt(tmp_path):
    """Many fine-tuned uploads hold the truncation and padding of their training."""
    plain = Tokenizer(write_tokenizer(tmp_path / "plain"))
    folder = write_tokenizer(tmp_path / "left")
    plain.library.enable_truncation(5)
    plain.library.enable_padding(length=12, direction="left")
    plain.library.save(str(folder / "tokenizer.json"))
    assert "max_length" in (folder / "tokenizer.json").read_text()
    ids = Tokenizer(folder).prompt(TEXT)
    assert ids == Tokenizer(tmp_path / "plain").prompt(TEXT)
    assert len(ids) > 12


def test_a_base_models_prompt_begins_as_its_tokenizer_begins_texts(tmp_path, transformers):
    """Llama's tokenizer puts its BOS there. Where raw is asked for, the text is all."""
    folder = write_tokenizer(tmp_path, ("<|begin_of_text|>", "<s>"))
    library = Tokenizer(folder).library
    begin = library.token_to_id("<|begin_of_text|>")
    library.post_processor = processors.TemplateProcessing(
        single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", begin)])
    library.save(str(folder / "tokenizer.json"))
    tokenizer = Tokenizer(folder)
    assert tokenizer.format == "raw"
    assert tokenizer.prompt(TEXT) == [begin, *tokenizer.encode(TEXT)]
    assert tokenizer.ask(Problem("1", TEXT, "2")) == tokenizer.prompt(TEXT)
    assert Tokenizer(folder, "raw").prompt(TEXT) == tokenizer.encode(TEXT)
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    assert tokenizer.prompt(TEXT) == theirs(TEXT)["input_ids"]


def test_a_format_may_be_given(tmp_path):
    """R1-0528-Qwen3 has both marks, and is R1; anything else is on request, if its tokens are
    there."""
    both = write_tokenizer(tmp_path, R1 + CHATML[1:3])
    assert Tokenizer(both).format == "r1"
    for name in ("chatml", "raw"):
        tokenizer = Tokenizer(both, name)
        assert tokenizer.format == name
        assert tokenizer.decode(tokenizer.prompt(TEXT)) == EXPECTED[name][1]
    for name in ("harmony", "llama"):
        with pytest.raises(ValueError, match=f"chat format.*{name}"):
            Tokenizer(both, name)


def test_harmony_effort(tmp_path):
    tokenizer = Tokenizer(write_tokenizer(tmp_path, HARMONY))
    assert tokenizer.decode(tokenizer.prompt("x", effort="high")).count("Reasoning: high\n") == 1
    with pytest.raises(ValueError, match="effort: found 'extreme', expected low or medium or high"):
        tokenizer.prompt("x", effort="extreme")


@pytest.mark.parametrize("name", EXPECTED)
def test_stream_is_decode_in_pieces(tmp_path, name):
    """Multi-byte characters come whole, when their last byte has come; nothing is lost or
    doubled."""
    tokenizer = Tokenizer(write_tokenizer(tmp_path, EXPECTED[name][0]))
    ids = tokenizer.prompt(TEXT) + tokenizer.encode("naïve 🙂🙂 x")
    step = tokenizer.stream()
    pieces = [step(token) for token in ids]
    assert "".join(pieces) == tokenizer.decode(ids)
    assert "" in pieces and "数" in pieces
    assert not any("\ufffd" in piece for piece in pieces)
    other = tokenizer.stream()
    again = tokenizer.stream()
    for token, piece in zip(ids, pieces):  # streams know nothing of each other
        assert other(token) == piece
        assert again(token) == piece


@pytest.mark.parametrize("name", NAMES)
def test_golden_tokenizer(name):
    tokenizer = Tokenizer(GOLDEN / "checkpoints" / name)
    _, info = golden(name)
    for known in info["tokenizer"]["cases"]:
        assert tokenizer.encode(known["text"]) == known["ids"]
        assert tokenizer.decode(known["ids"]) == known["decoded"]
        skipped = tokenizer.decode(known["ids"], skip_special_tokens=True)
        assert skipped == known["decoded_skip_special"]
        step = tokenizer.stream()
        assert "".join(step(token) for token in known["ids"]) == known["decoded"]
    assert tokenizer.format == ("harmony" if "gptoss" in name else "chatml")


def test_a_problem_is_asked_with_the_papers_instruction(tmp_path):
    """A raw model gets the problem as it is."""
    problem = Problem(id="1", problem="What is 1 + 1?", answer="2")
    chat = Tokenizer(write_tokenizer(tmp_path / "chat", CHATML))
    raw = Tokenizer(write_tokenizer(tmp_path / "raw"))
    template = "{{ messages[0].content }}"
    same = Tokenizer(write_tokenizer(tmp_path / "same", template=template))
    assert chat.ask(problem) == chat.prompt(instruction(problem))
    assert same.decode(same.ask(problem)) == instruction(problem)
    assert raw.decode(raw.ask(problem)) == "What is 1 + 1?"


# ------------------------------------------------------------------------- published templates

PUBLISHED = json.loads(Path(__file__).with_name("chat_templates.json").read_text("utf-8"))
TEMPLATES = PUBLISHED["templates"]
RENDERED = [name for name in TEMPLATES if TEMPLATES[name]["prompts"]]
NOT_RENDERED = sorted(set(TEMPLATES) - set(RENDERED))  # they want tools or functions
SPECIAL = ("<bos>", "<eos>", "<pad>", "<think>", "</think>")
QWEN3 = TEMPLATES["Qwen3-0.6B"]["template"]
QWEN2 = TEMPLATES["Qwen2-7B-Instruct"]["template"]
GPT_OSS = TEMPLATES["gpt-oss-120b"]["template"]
QWEN2_SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"


def write_template(folder, template, config=None, special=SPECIAL):
    """A tokenizer with a chat template in a file of its own."""
    write_tokenizer(folder, special)
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def transformers(monkeypatch):
    """transformers, on the day that is pinned here."""
    library = pytest.importorskip("transformers")

    class Today(datetime.datetime):
        @classmethod
        def now(cls):
            return cls(2025, 8, 5)

    monkeypatch.setattr(library.utils.chat_template_utils, "datetime", Today)
    return library


def apply_chat_template(library, folder, message, tokenize=False, **settings):
    """What transformers makes of a user's message."""
    tokenizer = library.AutoTokenizer.from_pretrained(folder)
    return tokenizer.apply_chat_template(
        [{"role": "user", "content": message}], add_generation_prompt=True, tokenize=tokenize,
        return_dict=False, **settings)


@pytest.mark.parametrize("where", ("chat_template.jinja", "tokenizer_config.json"))
@pytest.mark.parametrize("name", RENDERED)
def test_a_prompt_is_what_the_template_renders(tmp_path, name, where):
    template = TEMPLATES[name]["template"]
    config = dict(PUBLISHED["tokenizer_config"])
    folder = write_template(tmp_path / "it", template, config)
    if where == "tokenizer_config.json":
        (folder / "chat_template.jinja").unlink()
        (folder / where).write_text(json.dumps(config | {"chat_template": template}))
    tokenizer = Tokenizer(folder)
    assert tokenizer.format == "template"
    for message, expected in zip(PUBLISHED["messages"], TEMPLATES[name]["prompts"], strict=True):
        assert tokenizer.chat(message) == expected
        assert tokenizer.decode(tokenizer.prompt(message)) == expected
    opened = TEMPLATES[name]["prompts"][0].endswith("<think>\n")
    assert tokenizer.completion([]) == ("<think>\n" if opened else "")


@pytest.mark.parametrize("name", NOT_RENDERED)
def test_a_template_that_renders_no_plain_message_is_refused(tmp_path, name):
    folder = write_template(tmp_path / "it", TEMPLATES[name]["template"])
    with pytest.raises(ValueError, match="chat_template.jinja: chat template: .*Error: '"):
        Tokenizer(folder)
    assert Tokenizer(folder, "raw").format == "raw"


@pytest.mark.parametrize("name", TEMPLATES)
def test_transformers_renders_the_same(tmp_path, transformers, name):
    """The recorded prompts are today's, and their token ids are ours."""
    folder = write_template(
        tmp_path / "it", TEMPLATES[name]["template"], PUBLISHED["tokenizer_config"])
    if name in NOT_RENDERED:
        with pytest.raises(Exception, match="is undefined|not iterable"):
            apply_chat_template(transformers, folder, "x")
        return
    tokenizer = Tokenizer(folder)
    for message, expected in zip(PUBLISHED["messages"], TEMPLATES[name]["prompts"], strict=True):
        assert apply_chat_template(transformers, folder, message) == expected
        ids = apply_chat_template(transformers, folder, message, tokenize=True)
        assert tokenizer.prompt(message) == ids


def test_harmony_efforts_are_the_templates(tmp_path):
    folder = write_template(tmp_path / "it", GPT_OSS)
    tokenizer = Tokenizer(folder)
    without = Tokenizer(write_tokenizer(tmp_path / "without", HARMONY))
    for effort in ("low", "medium", "high"):
        assert f"\n\nReasoning: {effort}\n\n" in tokenizer.chat(TEXT, effort)
        assert tokenizer.chat(TEXT, effort) == without.chat(TEXT, effort)
    assert tokenizer.chat(TEXT) == without.chat(TEXT) == without.chat(TEXT, "medium")


# --------------------------------------------------------------------- what a template may do

SAID = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
CASES = {  # template -> its prompt of the message " hi "; None: what transformers says
    "thinking is switched off": (
        "{%- set enable_thinking = false -%}" + QWEN3,
        "<|im_start|>user\n hi <|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"),
    "thinking is opened in plain text": (QWEN2 + "<think>\n", None),
    "a system message in plain text": ("<|system|>Be brief.</s>{{ messages[0].content }}", None),
    "a system message in a variable": ("{% set system_message = 'Think.' %}{{ system_message }}",
                                       "Think."),
    "something is added": ("{{ messages[0]['content'] + ' /no_think' }}", " hi  /no_think"),
    "the message is trimmed": ("{{ messages[0].content | trim }}", "hi"),
    "a system message in parts": (
        QWEN2.replace("You are a helpful assistant.", "You are ' }}{{ 'Qwen.' }}{{ '"), None),
    "blocks are trimmed": ("a\n  {% if true %}\n  b\n  {% endif %}\nc\n", "a\n  b\nc"),
    "JSON keeps its signs": ("{{ {'a': '<&>\\'é'} | tojson }}", '{"a": "<&>\'é"}'),
    "JSON is indented": ("{{ [1, 'x'] | tojson(indent=2) }}", '[\n  1,\n  "x"\n]'),
    "a loop is left": (
        "{% for i in range(9) %}{% if i == 1 %}{% continue %}{% endif %}"
        "{% if i > 3 %}{% break %}{% endif %}{{ i }}{% endfor %}", "023"),
    "the model's part": (
        "{% set x = 1 %}{% generation %}{% set x = 2 %}{{ x }}{% endgeneration %}{{ x }}", "21"),
    "tools and documents are none": ("{{ tools is none and documents is none }}", "True"),
    "the pinned day": ("{{ strftime_now('%d %b %Y %H:%M') }}", "05 Aug 2025 00:00"),
    "nothing is said of effort": ("{{ reasoning_effort is defined }}", "False"),
    "Windows' line ends": ("a\r\n{{ messages[0].content }}\r\nb", "a\n hi \nb"),
}


@pytest.mark.parametrize("what", CASES)
def test_what_a_template_does_is_done(tmp_path, what, transformers):
    template, expected = CASES[what]
    folder = write_template(tmp_path / "it", template)
    prompt = Tokenizer(folder).chat(" hi ")
    assert prompt == apply_chat_template(transformers, folder, " hi ")
    assert expected in (None, prompt)


@pytest.mark.parametrize("what", [what for what in CASES if CASES[what][1] is not None])
def test_what_a_template_does_is_this(tmp_path, what):
    """The same without transformers."""
    template, expected = CASES[what]
    assert Tokenizer(write_template(tmp_path / "it", template)).chat(" hi ") == expected


SHOWN = "[{{ bos_token }}|{{ eos_token }}|{{ pad_token }}|{{ unk_token }}|{{ image_token }}]"
ADDED = {"__type": "AddedToken", "content": "<bos>", "lstrip": False, "normalized": False,
         "rstrip": False, "single_word": False}
TOKENS = {  # tokenizer_config.json, special_tokens_map.json, what is shown
    "texts": ({"bos_token": "<bos>", "eos_token": "<eos>"}, None, "[<bos>|<eos>|||]"),
    "added tokens": ({"bos_token": ADDED, "image_token": "<pad>"}, None, "[<bos>||||<pad>]"),
    "null": ({"bos_token": None, "eos_token": "<eos>", "add_bos_token": True}, None, "[|<eos>|||]"),
    "none": (None, None, "[||||]"),
    "a map": ({}, {"bos_token": {"content": "<bos>"}, "pad_token": "<pad>"}, "[<bos>||<pad>||]"),
    "a map that is late": (
        {"added_tokens_decoder": {}, "bos_token": "<bos>"}, {"bos_token": "<eos>"}, "[<bos>||||]"),
    "of the model": ({"extra_special_tokens": {"image_token": "<pad>"}}, None, "[||||<pad>]"),
}


def write_tokens(folder, what):
    config, listed, _ = TOKENS[what]
    if config is not None:
        config = config | {"tokenizer_class": "PreTrainedTokenizerFast"}
    write_template(folder, SHOWN, config)
    if listed is not None:
        (folder / "special_tokens_map.json").write_text(json.dumps(listed))
    return folder


@pytest.mark.parametrize("what", TOKENS)
def test_a_template_sees_the_special_tokens(tmp_path, what):
    assert Tokenizer(write_tokens(tmp_path / "it", what)).chat("hi") == TOKENS[what][2]


def test_a_bos_token_that_only_the_tokenizers_class_knows_is_refused(tmp_path):
    """transformers takes <bos> for Gemma's and nothing for Qwen's, whatever the file lists."""
    folder = write_template(tmp_path / "it", SHOWN, {"tokenizer_class": "GemmaTokenizerFast"})
    with pytest.raises(ValueError, match="tokenizer_config.json: bos_token: missing"):
        Tokenizer(folder)
    write_template(folder, SHOWN, {"tokenizer_class": "Qwen2TokenizerFast"})
    assert Tokenizer(folder).chat("hi") == "[||||]"
    write_template(folder, "none", {"tokenizer_class": "GemmaTokenizerFast"})
    assert Tokenizer(folder).chat("hi") == "none"


@pytest.mark.parametrize("what", TOKENS)
def test_transformers_shows_the_same_special_tokens(tmp_path, transformers, what):
    folder = write_tokens(tmp_path / "it", what)
    assert apply_chat_template(transformers, folder, "hi") == TOKENS[what][2]


def test_a_template_of_its_own_file_comes_first(tmp_path):
    """As in transformers: chat_template.jinja before tokenizer_config.json; further templates
    beside them count for nothing."""
    folder = write_template(tmp_path / "it", "first", {"chat_template": "second"})
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "rag.jinja").write_text("third")
    assert Tokenizer(folder).chat("hi") == "first"
    (folder / "chat_template.jinja").unlink()
    assert Tokenizer(folder).chat("hi") == "second"


def test_of_several_templates_the_default_is_taken(tmp_path):
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "plain"}]
    folder = write_tokenizer(tmp_path / "it", template=named)
    assert Tokenizer(folder).chat("hi") == "plain"
    write_tokenizer(folder, template=named[:1])
    with pytest.raises(ValueError, match="tokenizer_config.json: chat_template: .*named default"):
        Tokenizer(folder)


def test_a_template_comes_before_the_special_tokens(tmp_path):
    """A fine-tune of R1-0528-Qwen3 keeps R1's tokens and may speak ChatML; a format may be
    wished for."""
    folder = write_template(tmp_path / "it", QWEN3, special=R1 + CHATML[:3])
    assert Tokenizer(folder).chat(TEXT) == PLAIN_CHATML
    assert Tokenizer(folder, "r1").chat(TEXT) == EXPECTED["r1"][1]
    assert Tokenizer(folder, "raw").chat(TEXT) == TEXT


@pytest.mark.parametrize("template, opening", (
    (None, "<think>\n"),
    ("{{ messages[0].content }}" + ASSISTANT + "<think>{{ '\n' }}", "<think>\n"),
    ("{{ messages[0].content }}" + ASSISTANT + "<think>Hm, ", "<think>Hm, "),
    ("{{ messages[0].content }}" + ASSISTANT, ""),
    ("{{ messages[0].content }}" + ASSISTANT + "<think></think>", ""),
    ("Open with <think>. {{ messages[0].content }}" + ASSISTANT, "")))
def test_who_opens_the_thinking(tmp_path, template, opening):
    """R1-Distill's template opens it for the model; one that does not is believed."""
    tokenizer = Tokenizer(write_tokenizer(tmp_path, R1, template))
    assert tokenizer.chat("x").endswith(opening)
    assert tokenizer.completion(tokenizer.encode("so </think> 2")) == opening + "so </think> 2"


# ------------------------------------------------------------------------- hostile templates

LOOP = "{% for i in range(99999) %}"
HOSTILE = {  # template -> what the line says
    "it refuses": ("{{ raise_exception('No\nsystem') }}", "TemplateError: No"),
    "no Jinja": ("{{ 1 if }}", "TemplateSyntaxError: unexpected"),
    "an unknown name": ("{{ a.b }}", "UndefinedError: 'a' is undefined"),
    "an unknown filter": ("{{ 1 | nothing }}", "TemplateAssertionError: No filter named"),
    "a division by 0": ("{{ 1 / 0 }}", "ZeroDivisionError"),
    "an opened brace": ("{{" * 10_000, "RecursionError"),
    "brackets": ("{{" + "(" * 20_000, "RecursionError"),
    "blocks": ("{% if x %}" * 20_000, "RecursionError"),
    "a macro without end": ("{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}", "RecursionError"),
    "a long range": ("{% for i in range(10**9) %}{% endfor %}", "OverflowError: Range too big"),
    "a loop in a loop": (LOOP * 2 + "{% endfor %}" * 2, "more than 0.5 seconds"),
    "a slow filter": (LOOP + "{{ range(99999) | sort }}{% endfor %}", "0.5 seconds|MemoryError"),
    "a long text": ("{{ 'x' * 10**7 }}", "10000000 characters, expected at most 1000000"),
    "a text beyond memory": ("{{ 'x' * 10**11 }}", "MemoryError|0.5 seconds"),
    "a list beyond memory": ("{{ [0] * 10**11 }}", "MemoryError|0.5 seconds"),
    "a wide field": ("{{ '%99999999999d' | format(1) }}", "MemoryError|OverflowError|ValueError"),
    "doubled": (
        "{% set n = namespace(x='x') %}" + LOOP + "{% set n.x = n.x ~ n.x %}{% endfor %}",
        "MemoryError|0.5 seconds"),
    "a great number": ("{{ 9 ** 999 ** 99 }}", "0.5 seconds|MemoryError|ValueError"),
    "Python's inside": ("{{ ''.__class__.__mro__ }}", "SecurityError: access to attribute"),
    "a function's inside": ("{{ cycler.__init__.__globals__ }}", "SecurityError"),
    "a file": ("{% include '/etc/passwd' %}", "TypeError: no loader"),
    "the messages": ("{{ messages.append(1) }}", "SecurityError"),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_hostile_template_is_one_line(tmp_path, what):
    """It names the file. The next template is rendered as ever, and raw is the way out."""
    template, message = HOSTILE[what]
    folder = write_template(tmp_path / "it", template)
    begun = time.perf_counter()
    with pytest.raises(ValueError, match=message) as caught:
        Tokenizer(folder)
    assert time.perf_counter() - begun < 30  # half a second of computing, if the machine is busy
    assert str(caught.value).startswith(f"{folder / 'chat_template.jinja'}: chat template: ")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600
    assert Tokenizer(folder, "raw").chat(TEXT) == TEXT
    assert Tokenizer(write_template(tmp_path / "good", QWEN2)).chat("hi") == QWEN2_SYSTEM + SAID


def test_a_template_that_turns_hostile_later(tmp_path):
    """Rendered in a process of its own every time, not only when it is looked at first."""
    bomb = LOOP * 2 + "{% endfor %}" * 2
    template = "{% if 'bomb' in messages[0].content %}" + bomb + "{% endif %}"
    tokenizer = Tokenizer(write_template(tmp_path / "it", template))
    with pytest.raises(ValueError, match="chat_template.jinja: .*0.5 seconds"):
        tokenizer.prompt("a bomb")
    assert tokenizer.chat("hi") == ""


def test_a_template_is_read_once_for_all_prompts(tmp_path):
    tokenizer = Tokenizer(write_template(tmp_path / "it", GPT_OSS))
    begun = time.perf_counter()
    for i in range(500):
        assert f"<|message|>{i}<|end|>" in tokenizer.chat(str(i))
    assert time.perf_counter() - begun < 20  # 0.3 s; 25 s of computing if it were read each time


def test_ctrl_c_does_not_mix_up_answers(monkeypatch):
    """The process that was interrupted in an answer gives no further one."""
    renderer = chat_template.Renderer()
    monkeypatch.setattr(chat_template, "RENDERER", renderer)
    assert chat_template.render("a") == "a"
    first = renderer.process

    class Interrupted:
        def readline(self):
            raise KeyboardInterrupt

    answers = first.stdout
    first.stdout = Interrupted()
    with pytest.raises(KeyboardInterrupt):
        chat_template.render("b")
    answers.close()
    assert first.returncode is not None
    assert chat_template.render("c") == "c"
    assert renderer.process is not first


def test_a_renderer_that_was_killed_or_inherited_is_replaced(monkeypatch):
    renderer = chat_template.Renderer()
    monkeypatch.setattr(chat_template, "RENDERER", renderer)
    assert chat_template.render("a") == "a"
    first = renderer.process
    first.kill()
    first.wait()
    assert chat_template.render("b") == "b"
    second = renderer.process
    renderer.owner = -1  # as in a process that was forked from this one
    assert chat_template.render("c") == "c"
    assert renderer.process is not second
    second.kill()
    second.wait()


def test_the_renderer_ends_with_who_asked():
    renderer = chat_template.Renderer()
    assert renderer.answer({"template": "a", "variables": {}}) == {"text": "a"}
    renderer.process.stdin.close()
    assert renderer.process.wait(timeout=10) == 0


# ------------------------------------------------------------------------------------ bad input


def test_no_tokenizer(tmp_path):
    with pytest.raises(ValueError, match=r"tokenizer\.json.*missing"):
        Tokenizer(tmp_path)
    for content in ("{", "[]", '{"model": 3}', ""):
        (tmp_path / "tokenizer.json").write_text(content)
        with pytest.raises(ValueError, match=r"tokenizer\.json.*not a tokenizer") as caught:
            Tokenizer(tmp_path)
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="no such directory"):
        Tokenizer(tmp_path / "none")


@pytest.mark.parametrize("content, message", (
    (b"\xff\xfe", "chat_template.jinja: not a text"),
    (None, "tokenizer_config.json: chat_template: found 3")))
def test_a_template_that_is_no_text(tmp_path, content, message):
    folder = write_tokenizer(tmp_path, CHATML, template=3)
    if content is not None:
        (folder / "chat_template.jinja").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        Tokenizer(folder)


def test_a_template_that_is_no_plain_file(tmp_path):
    folder = write_tokenizer(tmp_path / "it", CHATML)
    os.mkfifo(folder / "chat_template.jinja")
    with pytest.raises(ValueError, match="chat_template.jinja: found a pipe, expected a file"):
        Tokenizer(folder)


def test_a_special_token_that_is_no_text(tmp_path):
    folder = write_template(tmp_path / "it", "hi", {"bos_token": 3, "add_bos_token": True})
    with pytest.raises(ValueError, match="tokenizer_config.json: bos_token: found 3, expected a"):
        Tokenizer(folder)


def test_a_text_with_half_a_character(tmp_path):
    """A lone surrogate, as json.loads makes of "\\ud83d": one line that shows the text."""
    tokenizer = Tokenizer(write_tokenizer(tmp_path))
    for text in (json.loads('"x \\ud83d y"'), json.loads('"\\ud83d"') + "long " * 100):
        with pytest.raises(ValueError, match="ud83d") as caught:
            tokenizer.prompt(text)
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 250
        str(caught.value).encode("utf-8")


def test_token_ids_that_are_none(tmp_path):
    tokenizer = Tokenizer(write_tokenizer(tmp_path))
    for ids in ([-1], [2 ** 40], ["x"]):
        with pytest.raises(ValueError, match="token ids"):
            tokenizer.decode(ids)
        with pytest.raises(ValueError, match="token id"):
            tokenizer.stream()(ids[0])


def test_a_panic_of_the_library_is_one_line(tmp_path, monkeypatch):
    """Rust's panics arrive as a BaseException; Ctrl-C still is one."""
    class PanicException(BaseException):
        pass

    class Library:
        error = PanicException("called unwrap() on None\nnote: run with RUST_BACKTRACE=1")

        def encode(self, *_, **__):
            raise self.error

    tokenizer = Tokenizer(write_tokenizer(tmp_path))
    monkeypatch.setattr(tokenizer, "library", Library())
    with pytest.raises(ValueError, match=r"^text 'x': called unwrap\(\) on None$"):
        tokenizer.encode("x")
    Library.error = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        tokenizer.encode("x")
