"""plumbing/tokenizer.py: texts and tokens, chat formats, and the prompts of published chat
templates.

The templates are abridged from the published ones (tools, earlier assistant turns), in their own
spelling. The oracle is Jinja, set up as transformers sets it up.
"""
import datetime
import json

import pytest
from helpers import GOLDEN, NAMES, golden, write_tokenizer

from plumbing.problems import Problem, instruction
from plumbing.tokenizer import CONDITIONS, Tokenizer

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
    assert chat.ask(problem) == chat.prompt(instruction(problem))
    assert raw.decode(raw.ask(problem)) == "What is 1 + 1?"


# ------------------------------------------------------------------------------- the templates

TOOLS = r"""
    {{- "\n\n# Tools\n\nYou may call one or more functions to assist.\n\n<tools>" }}
    {%- for tool in tools %}
        {{- "\n" }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- "\n</tools>\n\n<tool_call>\n{\"name\": <function-name>}\n</tool_call><|im_end|>\n" }}
"""
QWEN25 = r"""{%- if tools %}
    {{- '<|im_start|>system\n' }}
    {%- if messages[0]['role'] == 'system' %}
        {{- messages[0]['content'] }}
    {%- else %}
        {{- 'SYSTEM' }}
    {%- endif %}""" + TOOLS + r"""{%- else %}
    {%- if messages[0]['role'] == 'system' %}
        {{- '<|im_start|>system\n' + messages[0]['content'] + '<|im_end|>\n' }}
    {%- else %}
        {{- '<|im_start|>system\nSYSTEM<|im_end|>\n' }}
    {%- endif %}
{%- endif %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) or (message.role == "assistant" and not message.tool_calls) %}
        {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}
    {%- elif message.role == "assistant" %}
        {{- '<|im_start|>' + message.role }}
        {%- for tool_call in message.tool_calls %}
            {{- '\n<tool_call>\n{"name": "' }}
            {{- tool_call.name }}
            {{- '", "arguments": ' }}
            {{- tool_call.arguments | tojson }}
            {{- '}\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\n' }}
    {%- elif message.role == "tool" %}
        {{- '<|im_start|>user' }}
        {{- '\n<tool_response>\n' }}
        {{- message.content }}
        {{- '\n</tool_response>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
{%- endif %}
"""
QWQ = r"""{%- if tools %}
    {{- '<|im_start|>system\n' }}
    {%- if messages[0]['role'] == 'system' %}
        {{- messages[0]['content'] }}
    {%- else %}
        {{- '' }}
    {%- endif %}""" + TOOLS + r"""{%- else %}
    {%- if messages[0]['role'] == 'system' %}
        {{- '<|im_start|>system\n' + messages[0]['content'] + '<|im_end|>\n' }}
  {%- endif %}
{%- endif %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}
    {%- elif message.role == "assistant" and not message.tool_calls %}
        {%- set content = message.content.split('</think>')[-1].lstrip('\n') %}
        {{- '<|im_start|>' + message.role + '\n' + content + '<|im_end|>' + '\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n<think>\n' }}
{%- endif %}
"""
QWEN3_TURNS = r"""{%- if tools %}
    {{- '<|im_start|>system\n' }}
    {%- if messages[0].role == 'system' %}
        {{- messages[0].content + '\n\n' }}
    {%- endif %}""" + TOOLS + r"""{%- else %}
    {%- if messages[0].role == 'system' %}
        {{- '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}
    {%- endif %}
{%- endif %}
{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == "user" and message.content is string and not(message.content.startswith('<tool_response>') and message.content.endswith('</tool_response>')) %}
        {%- set ns.multi_step_tool = false %}
        {%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.content is string %}
        {%- set content = message.content %}
    {%- else %}
        {%- set content = '' %}
    {%- endif %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\n' + content + '<|im_end|>' + '\n' }}
    {%- elif message.role == "assistant" %}
        {%- set reasoning_content = '' %}
        {%- if '</think>' in content %}
            {%- set reasoning_content = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\n') %}
        {%- endif %}
        {{- '<|im_start|>' + message.role + '\n<think>\n' + reasoning_content.strip('\n') + '\n</think>\n\n' + content.lstrip('\n') }}
        {{- '<|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
"""
QWEN3 = QWEN3_TURNS + r"""{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\n\n</think>\n\n' }}
    {%- endif %}
{%- endif %}"""
QWEN3_THINKING = QWEN3_TURNS + r"""{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n<think>\n' }}
{%- endif %}"""
TWO_BRANCHES = QWEN3_TURNS + r"""{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\n\n</think>\n\n' }}
    {%- else %}
        {{- '<think>\n' }}
    {%- endif %}
{%- endif %}"""
QWEN2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
R1_START = (
    "{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif %}"
    "{% set ns = namespace(is_first=false, is_tool=false, is_output_first=true, system_prompt='') %}"
    "{%- for message in messages %}{%- if message['role'] == 'system' %}"
    "{% set ns.system_prompt = message['content'] %}{%- endif %}{%- endfor %}"
    "{{bos_token}}{{ns.system_prompt}}{%- for message in messages %}"
    "{%- if message['role'] == 'user' %}{%- set ns.is_tool = false -%}"
    "{{'<｜User｜>' + message['content']}}{%- endif %}"
    "{%- if message['role'] == 'assistant' and message['content'] is not none %}"
    "{% set content = message['content'] %}"
    "{% if '</think>' in content %}{% set content = content.split('</think>')[-1] %}{% endif %}"
    "{{'<｜Assistant｜>' + content + '<｜end▁of▁sentence｜>'}}{%- endif %}{%- endfor -%}"
    "{% if ns.is_tool %}{{'<｜tool▁outputs▁end｜>'}}{% endif %}")
R1_FIRST = R1_START + "{% if add_generation_prompt and not ns.is_tool %}{{'<｜Assistant｜>'}}{% endif %}"
R1_LATER = (
    R1_START
    + r"{% if add_generation_prompt and not ns.is_tool %}{{'<｜Assistant｜><think>\n'}}{% endif %}")
R1_0528 = (
    "{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif %}"
    "{% set ns = namespace(is_first=false, is_tool=false, is_output_first=true, system_prompt='', "
    "is_first_sp=true, is_last_user=false) %}{%- for message in messages %}"
    "{%- if message['role'] == 'system' %}{%- if ns.is_first_sp %}"
    "{% set ns.system_prompt = ns.system_prompt + message['content'] %}{% set ns.is_first_sp = false %}"
    r"{%- else %}{% set ns.system_prompt = ns.system_prompt + '\n\n' + message['content'] %}{%- endif %}"
    "{%- endif %}{%- endfor %}{{ bos_token }}{{ ns.system_prompt }}{%- for message in messages %}"
    "{% set content = message['content'] %}{%- if message['role'] == 'user' %}"
    "{%- set ns.is_tool = false -%}{%- set ns.is_first = false -%}{%- set ns.is_last_user = true -%}"
    "{{'<｜User｜>' + content + '<｜Assistant｜>'}}{%- endif %}"
    "{%- if message['role'] == 'assistant' %}{% if '</think>' in content %}"
    "{% set content = content.split('</think>')[-1] %}{% endif %}{% endif %}"
    "{%- if message['role'] == 'assistant' and message['content'] is not none %}"
    "{%- set ns.is_last_user = false -%}{{content + '<｜end▁of▁sentence｜>'}}{%- endif %}{%- endfor -%}"
    "{% if ns.is_tool %}{{'<｜tool▁outputs▁end｜>'}}{% endif %}"
    "{% if add_generation_prompt and not ns.is_last_user and not ns.is_tool %}{{'<｜Assistant｜>'}}{% endif %}")
GPT_OSS_START = r"""{#-
  In addition to the normal inputs of `messages` and `tools`, this template also accepts the
  "reasoning_effort": a string that describes the reasoning effort, it's "medium" by default.
 #}
{%- macro build_system_message() -%}
    {%- if model_identity is not defined %}
        {%- set model_identity = "You are ChatGPT, a large language model trained by OpenAI." %}
    {%- endif %}
    {{- model_identity + "\n" }}
    {{- "Knowledge cutoff: 2024-06\n" }}
    {{- "Current date: " + strftime_now("%Y-%m-%d") + "\n\n" }}
    {%- if reasoning_effort is not defined %}
        {%- set reasoning_effort = "medium" %}
    {%- endif %}
    {{- "Reasoning: " + reasoning_effort + "\n\n" }}
    {%- if builtin_tools %}
        {{- "# Tools\n\n" }}
    {%- endif -%}
"""
GPT_OSS_END = r"""
{%- endmacro -%}
{{- "<|start|>system<|message|>" }}
{{- build_system_message() }}
{{- "<|end|>" }}
{%- set loop_messages = messages %}
{%- for message in loop_messages -%}
    {%- if message.role == 'assistant' -%}
        {{- "<|start|>assistant<|channel|>final<|message|>" + message.content + "<|end|>" }}
    {%- elif message.role == 'user' -%}
        {{- "<|start|>user<|message|>" + message.content + "<|end|>" }}
    {%- endif -%}
{%- endfor -%}

{#- Generation prompt #}
{%- if add_generation_prompt -%}
<|start|>assistant
{%- endif -%}
"""
GPT_OSS = GPT_OSS_START + r"""
    {{- "# Valid channels: analysis, commentary, final. Channel must be included for every message." }}
    {%- if tools -%}
        {{- "\nCalls to these tools must go to the commentary channel: 'functions'." }}
    {%- endif -%}
""" + GPT_OSS_END
GPT_OSS_FIRST = GPT_OSS_START + r"""
    {{- "# Valid channels: analysis, commentary, final. Channel must be included for every message.\n" }}
    {{- "Calls to these tools must go to the commentary channel: 'functions'." }}
""" + GPT_OSS_END

QWEN_SYSTEM = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
MATH_SYSTEM = r"Please reason step by step, and put your final answer within \\boxed{}."
TEMPLATES = {  # special tokens, template, and how the prompt begins or ends
    "Qwen2-7B-Instruct": (
        CHATML, QWEN2, "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"),
    "Qwen2.5-7B": (
        CHATML, QWEN25.replace("SYSTEM", "You are a helpful assistant."),
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"),
    "Qwen2.5-7B-Instruct": (
        CHATML, QWEN25.replace("SYSTEM", QWEN_SYSTEM),
        f"<|im_start|>system\n{QWEN_SYSTEM}<|im_end|>\n"),
    "Qwen2.5-Math-7B-Instruct": (
        CHATML, QWEN25.replace("SYSTEM", MATH_SYSTEM),
        "<|im_start|>system\nPlease reason step by step, and put your final answer within "
        "\\boxed{}.<|im_end|>\n"),
    "QwQ-32B": (CHATML, QWQ, "<|im_start|>assistant\n<think>\n"),
    "Qwen3-8B": (CHATML, QWEN3, "<|im_start|>assistant\n"),
    "Qwen3-4B-Thinking-2507": (CHATML, QWEN3_THINKING, "<|im_start|>assistant\n<think>\n"),
    "thinking in an else": (CHATML, TWO_BRANCHES, "<|im_start|>assistant\n<think>\n"),
    "R1-Distill, first": (R1, R1_FIRST, ASSISTANT),
    "R1-Distill": (R1, R1_LATER, ASSISTANT + "<think>\n"),
    "R1-0528-Qwen3-8B": (R1 + CHATML[:3], R1_0528, ASSISTANT),
    "gpt-oss": (HARMONY, GPT_OSS, "<|start|>assistant"),
    "gpt-oss, first": (HARMONY, GPT_OSS_FIRST, "<|start|>assistant")}


def render(template, text, **settings):
    """A prompt as transformers' apply_chat_template makes it."""
    sandbox = pytest.importorskip("jinja2.sandbox")
    environment = sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.globals["strftime_now"] = datetime.date(2025, 8, 5).strftime
    messages = [{"role": "user", "content": text}]
    return environment.from_string(template).render(
        messages=messages, add_generation_prompt=True, tools=None, **settings)


def write_template(folder, special, template, where="chat_template.jinja", bos=None):
    """A tokenizer whose chat template stands in one file or the other."""
    write_tokenizer(folder, special)
    config = {"bos_token": bos}
    if where == "chat_template.jinja":
        (folder / where).write_text(template, encoding="utf-8")
    else:
        config["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("where", ("chat_template.jinja", "tokenizer_config.json"))
@pytest.mark.parametrize("name", TEMPLATES)
def test_a_prompt_is_what_the_template_renders(tmp_path, name, where):
    special, template, part = TEMPLATES[name]
    bos = {"__type": "AddedToken", "content": BOS} if special[0] == BOS else None
    tokenizer = Tokenizer(write_template(tmp_path / "it", special, template, where, bos))
    expected = render(template, TEXT, bos_token=BOS if bos else "")
    assert tokenizer.decode(tokenizer.prompt(TEXT)) == expected
    assert expected.startswith(part) or expected.endswith(part)
    opened = expected.endswith("<think>\n")
    assert tokenizer.completion([]) == ("<think>\n" if opened else "")


@pytest.mark.parametrize("condition", CONDITIONS)
def test_a_condition_on_thinking_is_what_it_is_by_default(tmp_path, condition):
    """Where enable_thinking is not set, as here: Jinja's word on either branch."""
    branches = "{{- 'yes' }}{%- else %}{{- 'no' }}{%- endif %}{%- endif %}"
    template = QWEN3.partition("{%- if enable_thinking")[0] + "{%- " + condition + " %}" + branches
    tokenizer = Tokenizer(write_template(tmp_path / "it", CHATML, template))
    assert tokenizer.decode(tokenizer.prompt(TEXT)) == render(template, TEXT)
    assert tokenizer.opening in ("yes", "no")


def test_harmony_efforts_are_the_templates(tmp_path):
    tokenizer = Tokenizer(write_template(tmp_path / "it", HARMONY, GPT_OSS))
    for effort in ("low", "medium", "high"):
        expected = render(GPT_OSS, TEXT, reasoning_effort=effort)
        assert tokenizer.decode(tokenizer.prompt(TEXT, effort)) == expected


@pytest.mark.parametrize("bos, shown", ((None, ""), ("<think>", "<think>")))
def test_bos_is_the_tokenizers_where_the_template_shows_it(tmp_path, bos, shown):
    tokenizer = Tokenizer(write_template(tmp_path / "it", R1, R1_LATER, bos=bos))
    assert tokenizer.decode(tokenizer.prompt(TEXT)) == render(R1_LATER, TEXT, bos_token=shown)


def test_a_template_of_its_own_file_comes_first(tmp_path):
    """As in transformers: chat_template.jinja before tokenizer_config.json."""
    folder = write_template(tmp_path / "it", CHATML, QWQ)
    other = QWEN25.replace("SYSTEM", QWEN_SYSTEM)
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": other}))
    tokenizer = Tokenizer(folder)
    assert tokenizer.decode(tokenizer.prompt(TEXT)) == PLAIN_CHATML + "<think>\n"


def test_of_several_templates_the_default_is_taken(tmp_path):
    named = [{"name": "tool_use", "template": "{{ tools }}"}, {"name": "default", "template": QWQ}]
    tokenizer = Tokenizer(write_template(tmp_path / "it", CHATML, named, "tokenizer_config.json"))
    assert tokenizer.opening == "<think>\n"


def test_a_template_says_which_format(tmp_path):
    """A fine-tune of R1-0528-Qwen3 keeps R1's tokens and may speak ChatML."""
    tokenizer = Tokenizer(write_template(tmp_path / "it", R1 + CHATML[:3], QWEN3))
    assert tokenizer.format == "chatml"
    assert tokenizer.decode(tokenizer.prompt(TEXT)) == PLAIN_CHATML


@pytest.mark.parametrize("template, opening", (
    (None, "<think>\n"),
    ("{{ '" + ASSISTANT + "<think>\\n' }}", "<think>\n"),
    ("{{ '" + ASSISTANT + "' }}", "")))
@pytest.mark.parametrize("where", ("tokenizer_config.json", "chat_template.jinja"))
def test_who_opens_the_thinking(tmp_path, template, opening, where):
    """R1-Distill's template opens it for the model; a checkpoint whose template does not is
    believed."""
    folder = write_tokenizer(tmp_path, R1, template if where == "tokenizer_config.json" else None)
    if where == "chat_template.jinja" and template:
        (folder / where).write_text(template)
    tokenizer = Tokenizer(folder)
    assert tokenizer.decode(tokenizer.prompt("x")) == f"{BOS}{USER}x{ASSISTANT}{opening}"
    assert tokenizer.completion(tokenizer.encode("so </think> 2")) == opening + "so </think> 2"


REFUSED = {  # a template that renders something else than our frame -> what the line says
    "another format": (
        "{{ '[INST] ' + messages[0]['content'] + ' [/INST]' }}", "none of the chat formats"),
    "a system message in a variable": (
        "{% set system_message = 'Think.' %}" + QWEN2, "system message in a variable, 'Think.'"),
    "a system message of variables": (
        QWEN2.replace("'<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n'",
                      "'<|im_start|>system\n' + today + '<|im_end|>\n'"),
        "default system message in variables"),
    "a system message in parts": (
        QWEN2.replace("You are a helpful assistant.<|im_end|>\n' }}", "' }}{{ today }}"),
        "in parts"),
    "a condition of its own": (
        QWEN3.replace("enable_thinking is defined and enable_thinking is false", "deep"),
        "'if deep'"),
    "a variable opening": (
        QWQ.replace("assistant\\n<think>\\n' }}", "assistant\\n' }}{{ opening }}"), "opening"),
    "no turn of the model": (
        QWQ.replace("'<|im_start|>assistant\\n<think>\\n'", "''"), "model's turn"),
    "trimmed messages": (QWQ.replace("+ message.content +", "+ message.content | trim +"), "trims"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_template_that_is_not_reproduced_is_refused(tmp_path, what):
    """Never a silent difference: one line names the file; chat format raw remains."""
    template, message = REFUSED[what]
    folder = write_template(tmp_path / "it", CHATML, template)
    with pytest.raises(ValueError, match=message) as caught:
        Tokenizer(folder)
    assert "chat_template.jinja: chat_template: " in str(caught.value)
    assert "\n" not in str(caught.value)
    assert Tokenizer(folder, "raw").format == "raw"


def test_another_system_message_of_gpt_oss_is_refused(tmp_path):
    changed = GPT_OSS.replace("Knowledge cutoff: 2024-06", "Knowledge cutoff: 2031-01")
    with pytest.raises(ValueError, match="Knowledge cutoff: 2024-06.*missing"):
        Tokenizer(write_template(tmp_path / "it", HARMONY, changed))


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
