"""Conversations to prompts, as transformers renders them, by templates that may be hostile."""

import functools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bestiary.errors import CheckpointMalformed, EngineError, RequestError
from bestiary.text import ChatTemplate, worker
from bestiary.text import template as template_module
from bestiary.text.worker import Worker

# Written for these tests, after the forms in which checkpoints publish theirs.
CHATML = """
{%- if messages[0].role != 'system' %}
    {{- '<|im_start|>system\nBe brief.<|im_end|>\n' }}
{%- endif %}
{%- for message in messages %}
    {{- '<|im_start|>' + message['role'] + '\n' + message['content'] | trim + '<|im_end|>' + '\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\n\n</think>\n\n' }}
    {%- endif %}
{%- endif %}
"""
LLAMA_3 = """
{{- bos_token }}
{%- if not tools is defined %}
    {%- set tools = none %}
{%- endif %}
{%- if not date_string is defined %}
    {%- set date_string = strftime_now("%d %b %Y") %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\n\n" }}
{{- "Today Date: " + date_string + "\n\n" }}
{%- if tools is not none %}
    {{- "You have these functions:\n" }}
    {%- for t in tools %}
        {{- t | tojson(indent=4) }}
        {{- "\n\n" }}
    {%- endfor %}
{%- endif %}
{{- system_message + "<|eot_id|>" }}
{%- for message in messages %}
    {%- if 'tool_calls' in message %}
        {%- set call = message.tool_calls[0].function %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\n\n{"name": "' + call.name + '", ' }}
        {{- '"parameters": ' + call.arguments | tojson + "}<|eot_id|>" }}
    {%- elif message.role == "tool" %}
        {{- "<|start_header_id|>ipython<|end_header_id|>\n\n" + message.content | tojson + "<|eot_id|>" }}
    {%- elif message.content is string %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim }}
        {{- '<|eot_id|>' }}
    {%- else %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}
        {%- for part in message.content if part.type == 'text' %}{{ part.text }}{% endfor %}
        {{- '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}
"""
MISTRAL = """{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{%- set ns = namespace(index=0) %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if (message["role"] == "user") != (ns.index % 2 == 0) %}
        {{- raise_exception("roles must alternate user/assistant, not " + message.role) }}
    {%- endif %}
    {%- set ns.index = ns.index + 1 %}
    {%- if message["role"] == "user" %}
        {%- if loop.last and system_message is defined %}
            {{- "[INST]" + system_message + "\n\n" + message["content"] + "[/INST]" }}
        {%- else %}
            {{- "[INST]" + message["content"] + "[/INST]" }}
        {%- endif %}
    {%- else %}
        {%- generation %}
            {{- message["content"] + eos_token }}
        {%- endgeneration %}
    {%- endif %}
{%- endfor %}
"""
GEMMA = """{{ bos_token }}
{%- for message in messages -%}
    {%- if message['role'] == 'system' -%}
        {% continue %}
    {%- endif -%}
    {% set role = 'model' if message['role'] == 'assistant' else message['role'] -%}
    {{ '<start_of_turn>' ~ role ~ '
' ~ message['content'] | trim ~ '<end_of_turn>
' }}
{%- endfor -%}
{% if add_generation_prompt %}
    {{ '<start_of_turn>model
' }}
{% endif %}
"""
TEMPLATES = {"ChatML": CHATML, "Llama 3": LLAMA_3, "Mistral": MISTRAL, "Gemma": GEMMA}
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
USER = {"role": "user", "content": "What is <b>2 & 2</b>?"}
CHATS = [
    [USER],
    [{"role": "system", "content": "Be kind. "}, USER],
    [USER, {"role": "assistant", "content": "vier, 四, 🌍"}, {"role": "user", "content": " \n and {{ 3 }}?"}],
]
TOOLS = [
    {
        "type": "function",
        "function": {"name": "wetter", "description": "Größe & <Wetter>", "parameters": {"b": 1}},
    }
]


@functools.cache
def _reference() -> Any:
    import tokenizers
    from transformers import PreTrainedTokenizerFast

    empty = tokenizers.Tokenizer(tokenizers.models.BPE())
    return PreTrainedTokenizerFast(tokenizer_object=empty, **SPECIAL)


def expected(template: Any, messages: Any, **options: Any) -> str:
    """What transformers renders."""
    return _reference().apply_chat_template(messages, chat_template=template, tokenize=False, **options)


@pytest.fixture
def own(monkeypatch: pytest.MonkeyPatch) -> Iterator[Worker]:
    """A renderer for one test, so that it can be harmed."""
    own = Worker()
    monkeypatch.setattr(template_module, "_worker", own)
    yield own
    if own._child is not None:
        own._child.end()


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES.keys())
@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("add_generation_prompt", [True, False])
def test_prompts_are_those_of_transformers(template: str, chat: Any, add_generation_prompt: bool) -> None:
    ours = ChatTemplate(template, SPECIAL).render(chat, add_generation_prompt=add_generation_prompt)
    assert ours == expected(template, chat, add_generation_prompt=add_generation_prompt)


@settings(deadline=None, max_examples=50)
@given(
    st.lists(st.text(st.characters(exclude_categories=["Cs"])), min_size=1, max_size=5), st.sampled_from([*TEMPLATES])
)
def test_any_text_is_rendered_as_transformers_does(texts: list[str], name: str) -> None:
    chat = [{"role": ("user", "assistant")[place % 2], "content": text} for place, text in enumerate(texts)]
    ours = ChatTemplate(TEMPLATES[name], SPECIAL).render(chat)
    assert ours == expected(TEMPLATES[name], chat, add_generation_prompt=True)


def test_tools_calls_and_their_results_are_rendered_as_transformers_does() -> None:
    call = {"function": {"name": "wetter", "arguments": {"ort": "Köln", "n": 1.5, "x": None}}}
    chat = [
        USER,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": {"grad": 20}},
    ]
    with pytest.raises(RequestError, match=r"messages\[2\]\.content must be a text"):
        ChatTemplate(LLAMA_3, SPECIAL).render(chat, tools=TOOLS)
    chat[2]["content"] = "20 °C"
    ours = ChatTemplate(LLAMA_3, SPECIAL).render(chat, tools=TOOLS)
    assert ours == expected(LLAMA_3, chat, tools=TOOLS, add_generation_prompt=True)
    assert "Größe & <Wetter>" in ours


def test_variables_that_the_template_reads_may_be_set() -> None:
    for value in (True, False):
        ours = ChatTemplate(CHATML).render([USER], enable_thinking=value)
        assert ours == expected(CHATML, [USER], add_generation_prompt=True, enable_thinking=value)
    ours = ChatTemplate(LLAMA_3, SPECIAL).render([USER], date_string="1 Jan 2030")
    assert "Today Date: 1 Jan 2030" in ours


@pytest.mark.parametrize(
    "name",
    [
        "tokenize",
        "return_dict",
        "__class__",
        "messages",
        "bos_token",
        "raise_exception",
        "enable_thinkin",
        "chat_template",
    ],
)
def test_any_other_variable_is_refused_with_those_that_there_are(name: str) -> None:
    template = "{{ bos_token }}{{ enable_thinking }}{{ __class__ }}{{ raise_exception }}{{ messages }}"
    with pytest.raises(RequestError, match=f"'{name}' is no variable.*it has: enable_thinking$"):
        ChatTemplate(template, SPECIAL).render([USER], **{name: 1})


def test_values_that_are_huge_or_no_data_are_refused() -> None:
    with pytest.raises(RequestError, match="bytes"):
        ChatTemplate(CHATML).render([USER], enable_thinking="x" * 40_000_000)
    for value in (object(), float, {1, 2}, functools.reduce(lambda inner, _: [inner], range(100_000), [])):
        with pytest.raises(RequestError, match="plain JSON data"):
            ChatTemplate(CHATML).render([USER], enable_thinking=value)


def test_tools_without_a_place_for_them_are_refused_and_not_forgotten() -> None:
    with pytest.raises(RequestError, match="no place for tools"):
        ChatTemplate(CHATML).render([USER], tools=TOOLS)
    for tools in ("search", ["search"], 3):
        with pytest.raises(RequestError, match="tools must be a list of objects"):
            ChatTemplate(LLAMA_3, SPECIAL).render([USER], tools=tools)  # type: ignore[arg-type]


def test_a_conversation_that_the_template_refuses_gives_its_reason() -> None:
    with pytest.raises(RequestError, match=r"line 11: roles must alternate user/assistant, not user$"):
        ChatTemplate(MISTRAL, SPECIAL).render([USER, USER])


PARTS = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]


def test_parts_go_to_a_template_that_reads_them() -> None:
    chat = [{"role": "user", "content": PARTS}]
    ours = ChatTemplate(LLAMA_3, SPECIAL).render(chat)
    assert ours == expected(LLAMA_3, chat, add_generation_prompt=True)
    assert "onetwo" in ours


@pytest.mark.parametrize("template", [CHATML, MISTRAL, GEMMA, "{{ messages[0].content }}", "{{ messages | tojson }}"])
def test_parts_are_joined_for_a_template_that_knows_only_texts(template: str) -> None:
    ours = ChatTemplate(template, SPECIAL).render([{"role": "user", "content": PARTS}])
    assert ours == expected(template, [{"role": "user", "content": "one\ntwo"}], add_generation_prompt=True)


def test_a_part_that_is_no_text_is_refused_by_a_template_that_knows_only_texts() -> None:
    chat = [USER, {"role": "user", "content": [*PARTS, {"type": "image", "image": "x.png"}]}]
    with pytest.raises(RequestError, match=r"messages\[1\] has a part of type 'image'.*text only"):
        ChatTemplate(CHATML).render(chat)


@pytest.mark.parametrize(
    ("messages", "place"),
    [
        ("hello", "messages"),
        (USER, "messages"),
        ([], "messages"),
        (3, "messages"),
        ([USER, "hello"], r"messages\[1\]"),
        ([USER, {"content": "hello"}], r"messages\[1\] has no role"),
        ([{"role": 3, "content": "hello"}], r"messages\[0\] has no role"),
        ([USER, {"role": "user", "content": 3}], r"messages\[1\]\.content"),
        ([USER, {"role": "user", "content": b"a"}], r"messages\[1\]\.content"),
        ([{"role": "user", "content": ["hello"]}], r"messages\[0\]\.content\[0\]"),
        ([{"role": "user", "content": [*PARTS, {"text": "hello"}]}], r"messages\[0\]\.content\[2\]"),
        ([{"role": "user", "content": [{"type": "text", "text": None}]}], r"messages\[0\]\.content\[0\]"),
    ],
)
def test_a_message_of_the_wrong_form_is_named(messages: Any, place: str) -> None:
    with pytest.raises(RequestError, match=f"^{place}"):
        ChatTemplate(CHATML).render(messages)


def write(folder: Path, **files: Any) -> Path:
    for name, content in files.items():
        path = folder / name.replace("__", "/").replace("_json", ".json").replace("_jinja", ".jinja")
        path.parent.mkdir(exist_ok=True)
        path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8", newline="")
    return folder


def text_of(template: ChatTemplate | None, **options: Any) -> str:
    assert template is not None
    return template.render([USER], **options)


def test_the_template_is_looked_for_in_three_files(tmp_path: Path) -> None:
    assert ChatTemplate.load(tmp_path) is None
    write(tmp_path, chat_template_json={"chat_template": "third {{ eos_token }}"})
    assert text_of(ChatTemplate.load(tmp_path)) == "third "
    write(tmp_path, tokenizer_config_json={"chat_template": "second {{ eos_token }}", "eos_token": {"content": "</s>"}})
    assert text_of(ChatTemplate.load(tmp_path)) == "second </s>"
    write(tmp_path, chat_template_jinja="first\r\n{% if 1 %}\r\n  {% endif %}{{ eos_token }}")
    assert text_of(ChatTemplate.load(tmp_path)) == "first\n</s>"


def test_of_several_templates_the_one_for_tools_is_taken_with_tools(tmp_path: Path) -> None:
    named = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "{{ tools | length }} tools"}]
    in_config = ChatTemplate.load(write(tmp_path, tokenizer_config_json={"chat_template": named}))
    (tmp_path / "tokenizer_config.json").unlink()
    write(tmp_path, chat_template_jinja="plain", additional_chat_templates__tool_use_jinja="{{ tools | length }} tools")
    for template in (in_config, ChatTemplate.load(tmp_path)):
        assert text_of(template) == "plain"
        assert text_of(template, tools=TOOLS) == "1 tools"


def test_several_templates_and_none_for_this_conversation_is_an_error_that_names_them() -> None:
    template = ChatTemplate({"tool_use": "x {{ tools }}", "rag": "y"})
    with pytest.raises(CheckpointMalformed, match="rag, tool_use"):
        template.render([USER])


@pytest.mark.parametrize("value", [3, [{"name": "default"}], ["x"], [{"name": "default", "template": 3}], True])
def test_a_template_entry_of_a_strange_type_is_a_typed_error(tmp_path: Path, value: Any) -> None:
    write(tmp_path, tokenizer_config_json={"chat_template": value})
    with pytest.raises(CheckpointMalformed, match=r"chat_template in .*tokenizer_config\.json"):
        ChatTemplate.load(tmp_path)


def test_a_template_file_that_is_no_text_is_a_typed_error(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(CheckpointMalformed, match=r"chat_template\.jinja"):
        ChatTemplate.load(tmp_path)


def test_a_template_that_is_no_jinja_is_the_checkpoints_fault_and_names_the_line() -> None:
    with pytest.raises(CheckpointMalformed, match="line 3: TemplateSyntaxError"):
        ChatTemplate("a\nb\n{% if %}").render([USER])


def test_an_error_while_it_renders_names_the_templates_line() -> None:
    with pytest.raises(RequestError, match=r"line 2: UndefinedError: .*'missing'"):
        ChatTemplate("a\n{{ messages[0].missing.deeper }}").render([USER])


TAKES_TIME = {
    "an endless loop": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "one endless operation": "{{ 7 ** (7 ** (7 ** 7)) }}",
    "doubling": "{% set ns = namespace(x='a') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    "a gigabyte at once": "{{ 'a' * 10 ** 9 }}",
    "a gigabyte in pieces": "{% for i in range(99999) %}{{ 'a' * 10000 }}{% endfor %}",
    "a list of a billion": "{{ ([0] * 10 ** 9) | length }}",
    "a range of a billion": "{% for i in range(10 ** 9) %}x{% endfor %}",
    "endless recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "a format that pads": "{{ '%1000000000d' | format(1) }}",
    "nesting": "{{ " + "(" * 20_000 + "1" + ")" * 20_000 + " }}",
    "nested blocks": "{% if 1 %}" * 5000 + "{% endif %}" * 5000,
    "a slow filter": "{{ ('a ' * 10 ** 7) | wordwrap(1) | length }}",
}


@pytest.mark.parametrize("template", TAKES_TIME.values(), ids=TAKES_TIME.keys())
def test_a_template_that_asks_for_too_much_fails_soon_and_harms_nothing(template: str) -> None:
    start = time.monotonic()
    with pytest.raises((RequestError, CheckpointMalformed)):
        ChatTemplate(template).render([USER])
    assert time.monotonic() - start < 8, "a second of processor time, on a machine that may be busy"
    assert ChatTemplate("{{ messages[0].role }}").render([USER]) == "user"


ESCAPES = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages.__class__.__base__ }}",
    "{{ cycler.__init__.__globals__.os.system('true') }}",
    "{{ lipsum.__globals__['os'] }}",
    "{{ raise_exception.__globals__ }}",
    "{{ strftime_now.__globals__['sys'] }}",
    "{{ ''|attr('__class__')|attr('__mro__') }}",
    "{{ self._TemplateReference__context.environment }}",
    "{{ namespace.__init__.__globals__ }}",
    "{{ (messages|map(attribute='__class__')|list)[0].__mro__ }}",
    "{{ '{0.__class__.__mro__}'.format('') }}",
    "{{ joiner.__init__.__code__ }}",
    "{% for x in (1).__class__.mro() %}{{ x }}{% endfor %}",
    "{{ messages.append(1) }}",
    "{% set f = '{0.__class__}'.format %}{{ f(1) }}",
    "{% import 'os' as os %}",
    "{% include '/etc/passwd' %}",
]


@pytest.mark.parametrize("template", ESCAPES)
def test_a_template_does_not_reach_what_is_outside(template: str) -> None:
    try:
        text = ChatTemplate(template).render([USER])
    except (RequestError, CheckpointMalformed):
        return
    assert text == "", "an attribute that is not there prints as nothing"


@pytest.mark.skipif(not Path("/proc/self/limits").exists(), reason="reads /proc")
def test_the_renderer_has_no_files_no_children_and_no_secrets(own: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_TOKEN", "hunter2")
    assert text_of(ChatTemplate("{{ strftime_now('%Y') | length }}")) == "4"
    process = Path(f"/proc/{pid_of(own)}")
    limits = {line[:26].strip(): line[26:].split()[:2] for line in (process / "limits").read_text().splitlines()}
    for name in ("Max open files", "Max file size", "Max processes"):
        assert limits[name] == ["0", "0"]
    assert int(limits["Max address space"][1]) <= 2**30
    assert b"hunter2" not in (process / "environ").read_bytes()
    assert "torch" not in (process / "maps").read_text()


def pid_of(renderer: Worker) -> int:
    assert renderer._child is not None
    return renderer._child._process.pid


def test_one_process_renders_until_it_is_killed_and_then_another(own: Worker) -> None:
    template = ChatTemplate("{{ messages[0].role }}")
    assert text_of(template) == "user"
    first = pid_of(own)
    assert (text_of(template), pid_of(own)) == ("user", first)
    os.kill(first, signal.SIGKILL)
    time.sleep(0.05)
    assert text_of(template) == "user"
    assert pid_of(own) != first


def test_warming_starts_the_process_that_renders(own: Worker) -> None:
    ChatTemplate.warm()
    warmed = pid_of(own)
    ChatTemplate.warm()
    assert text_of(ChatTemplate("x")) == "x"
    assert pid_of(own) == warmed


def test_a_render_that_ran_out_of_time_leaves_no_process(own: Worker) -> None:
    own.limit_s = 0.1
    with pytest.raises(RequestError, match=r"did not finish within 0\.1 s"):
        text_of(ChatTemplate(TAKES_TIME["an endless loop"]))
    with pytest.raises(ProcessLookupError):
        os.kill(pid_of(own), 0)


def test_threads_share_one_renderer(own: Worker) -> None:
    template = ChatTemplate("{{ messages[0].content }}")
    texts = [f"text {number} " + "x" * number * 100 for number in range(100)]
    with ThreadPoolExecutor(8) as pool:
        rendered = list(pool.map(lambda text: template.render([{"role": "user", "content": text}]), texts))
    assert rendered == texts


def test_a_conversation_larger_than_a_pipe_goes_through() -> None:
    text = "grüße 🌍 " * 100_000
    assert ChatTemplate("{{ messages[0].content }}").render([{"role": "user", "content": text}]) == text


def test_an_interrupt_in_the_middle_leaves_the_next_render_right(own: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    template = ChatTemplate("{{ messages[0].content }}")
    assert text_of(template) == USER["content"]

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(worker._Child, "_receive", interrupt)
        with pytest.raises(KeyboardInterrupt):
            text_of(template)
    assert template.render([{"role": "user", "content": "next"}]) == "next"


READ = "sys.stdin.buffer.read(int.from_bytes(sys.stdin.buffer.read(4), 'big'))\n"
WAIT = "; sys.stdout.flush(); time.sleep(60)"
FAULTY = {
    "leaves": (READ + "sys.exit(3)", "it left with code 3"),
    "floods": (READ + "sys.stdout.buffer.write(b'\\xff' * 8)" + WAIT, "a reply of"),
    "mumbles": (READ + "sys.stdout.buffer.write(b'\\0\\0\\0\\2hm')" + WAIT, "Expecting value"),
    "hangs": (READ + "time.sleep(60)", "did not finish"),
    "does not listen": ("time.sleep(60)", "did not finish"),
    "closes its ears": ("os.close(0); os.write(1, bytes(4)); time.sleep(60)", "ended over this conversation"),
}


@pytest.mark.parametrize(("fault", "reason"), FAULTY.values(), ids=FAULTY.keys())
def test_whatever_the_process_does_the_error_is_typed(
    own: Worker, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, fault: str, reason: str
) -> None:
    program = tmp_path / "faulty.py"
    program.write_text(f"import os, sys, time\nos.write(1, bytes(4))\n{fault}\n")
    monkeypatch.setattr(worker, "_PROGRAM", program)
    own.limit_s = 0.05
    with pytest.raises(RequestError, match=reason):
        ChatTemplate("x").render([{"role": "user", "content": "x" * 200_000}])
    with pytest.raises(ProcessLookupError):
        os.kill(pid_of(own), 0)


@pytest.mark.parametrize("program", ["/bin/false", "/nonexistent/python"])
def test_a_renderer_that_does_not_start_is_a_typed_error(
    own: Worker, monkeypatch: pytest.MonkeyPatch, program: str
) -> None:
    monkeypatch.setattr(sys, "executable", program)
    with pytest.raises(EngineError, match="process that renders chat templates"):
        text_of(ChatTemplate("x"))


def test_a_missing_dependency_is_named(own: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(EngineError, match="pip install"):
        text_of(ChatTemplate("x"))


SCRIPT = """
import os, signal, sys, time
from bestiary.text import ChatTemplate
from bestiary.text.template import _worker
template = ChatTemplate("{{ messages[0].content }}")
ask = lambda text: template.render([{"role": "user", "content": text}])
assert ask("a") == "a"
"""


def script(lines: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", SCRIPT + lines],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )


@pytest.mark.parametrize("end", ["sys.exit(0)", "os._exit(0)", "os.kill(os.getpid(), signal.SIGKILL)"])
def test_no_renderer_outlives_its_parent(end: str) -> None:
    ran = script(f"print(_worker._child._process.pid, flush=True)\n{end}\n")
    assert ran.stderr == ""
    deadline = time.monotonic() + 10
    while is_running(int(ran.stdout)):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def is_running(pid: int) -> bool:
    """Zombies are not: nobody may be there to collect them."""
    stat = Path(f"/proc/{pid}/stat")
    if not stat.parent.parent.joinpath("self").exists():
        pytest.skip("reads /proc")
    try:
        return stat.read_text().rsplit(")")[-1].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_fork_renders_in_a_process_of_its_own() -> None:
    ran = script(
        """
first = _worker._child._process.pid
if child := os.fork():
    assert os.waitpid(child, 0)[1] == 0
    assert ask("parent") == "parent" and _worker._child._process.pid == first
    print("well")
else:
    assert ask("child") == "child" and _worker._child._process.pid != first
    sys.exit(0)
"""
    )
    assert (ran.stdout, ran.stderr) == ("well\n", "")
