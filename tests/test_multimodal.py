"""Pictures in prompts, from every door: Python, conversations, streams, the command line; over a tiny LLaVA."""

import io
import json
import os
import signal
import subprocess
import sys
from base64 import b64encode
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL.Image import Image

from bestiary import LLM, SamplingParams
from bestiary.cli import main
from bestiary.cli.chat import Conversation
from bestiary.errors import CapabilityMissing, RequestError, SettingError
from bestiary.output import RequestOutput
from bestiary.testing import picture
from bestiary.testing.fixture import Fixture
from bestiary.testing.tiny import tiny_checkpoint
from bestiary_llava.proof import CASES, IMAGE

VECTORS = 9
GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
SIZED: dict[str, Any] = {"kv_cache_memory_bytes": 2**22, "max_num_seqs": 4, "dtype": "float32", "device": "cpu"}
FLAGS = ("--temperature", "0", "--max-tokens", "8", "--ignore-eos", "--kv-cache-memory-bytes", str(2**22))
RED, BLUE, GREEN = picture(1, 40, 20), picture(2, 18, 33), picture(3, 30, 30)
#: A user's message in brackets of tokens; parts in their order.
TEMPLATE = """\
{%- for message in messages -%}
w1 {{ 'w2' if message.role == 'user' else 'w3' }} {% if message.content is string -%}
{{ message.content }} {% else -%}
{%- for part in message.content -%}
{{ '<image>' if part.type == 'image' else part.text }} {% endfor -%}
{%- endif -%}
{%- endfor -%}
w4"""
TOKENIZER = {
    "version": "1.0",
    "added_tokens": [
        {"id": IMAGE, "content": "<image>", "single_word": False, "lstrip": False, "rstrip": False}
        | {"normalized": False, "special": True}
    ],
    "pre_tokenizer": {"type": "WhitespaceSplit"},
    "model": {"type": "WordLevel", "unk_token": "w0", "vocab": {f"w{i}": i for i in range(IMAGE)}},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = Fixture("LlavaForConditionalGeneration", CASES[0], tmp_path_factory.mktemp("llava")).folder
    (found / "tokenizer.json").write_text(json.dumps(TOKENIZER))
    (found / "chat_template.jinja").write_text(TEMPLATE)
    return found


@pytest.fixture(scope="module")
def llm(folder: Path) -> LLM:
    return LLM(str(folder), enable_prefix_caching=False, **SIZED)


@pytest.fixture(autouse=True)
def nothing_stays_behind(llm: LLM) -> Iterator[None]:
    yield
    check_idle(llm)


def check_idle(llm: LLM) -> None:
    """The engine serves, and holds nothing for requests that have ended."""
    llm.engine.check_integrity()
    assert not llm.engine.has_unfinished_requests()
    assert llm.engine.scheduler.cache.is_empty


def ask(llm: LLM, text: str, *pictures: Any) -> RequestOutput:
    prompt = {"prompt": text, "multi_modal_data": {"image": list(pictures)}}
    return llm.generate(prompt, GREEDY, use_tqdm=False)[0]


def tokens(output: RequestOutput) -> list[int]:
    assert output.outputs[0].finish_reason == "length", output.outputs[0].stop_reason
    return list(output.outputs[0].token_ids)


def png(image: Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def data_url(image: Image) -> str:
    return f"data:image/png;base64,{b64encode(png(image)).decode()}"


def user(*content: Any) -> dict[str, Any]:
    parts = [{"type": "text", "text": part} if isinstance(part, str) else part for part in content]
    return {"role": "user", "content": parts}


def image_url(url: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}}


def chat(llm: LLM, *content: Any) -> RequestOutput:
    return llm.chat([user(*content)], GREEDY, use_tqdm=False)[0]


# --- generate -----------------------------------------------------------------------------------------------------


def test_a_picture_is_the_same_in_whatever_form_it_comes(llm: LLM, tmp_path: Path) -> None:
    file = tmp_path / "red.png"
    file.write_bytes(png(RED))
    forms = [RED, np.asarray(RED), png(RED), file, str(file), data_url(RED)]
    answers = [tokens(ask(llm, "w5 <image> w6 w7", form)) for form in forms]
    assert answers == answers[:1] * len(forms)
    assert tokens(ask(llm, "w5 <image> w6 w7", BLUE)) != answers[0]


def test_one_picture_needs_no_list_and_ids_do_as_well_as_text(llm: LLM) -> None:
    prompt = {"prompt_token_ids": [5, IMAGE, 6], "multi_modal_data": {"image": RED}}
    given = llm.generate(prompt, GREEDY, use_tqdm=False)[0]
    assert tokens(given) == tokens(ask(llm, "w5 <image> w6", RED))
    assert given.prompt_token_ids == [5, *[IMAGE] * VECTORS, 6]


def test_pictures_go_to_placeholders_in_their_order(llm: LLM) -> None:
    both = tokens(ask(llm, "w5 <image> w6 <image> w7", RED, BLUE))
    assert both == tokens(ask(llm, "w5 <image> w6 <image> w7", png(RED), np.asarray(BLUE)))
    assert both != tokens(ask(llm, "w5 <image> w6 <image> w7", BLUE, RED))


def test_many_prompts_are_answered_as_each_alone(llm: LLM) -> None:
    prompts: list[Any] = [
        {"prompt": "w5 <image> w6", "multi_modal_data": {"image": RED}},
        "w8 w9 w10",
        {"prompt": "<image> w6 <image>", "multi_modal_data": {"image": [GREEN, BLUE]}},
        {"prompt": "w5 <image> w6", "multi_modal_data": {"image": BLUE}},
    ]
    together = [tokens(output) for output in llm.generate(prompts, GREEDY, use_tqdm=False)]
    assert together == [tokens(llm.generate(prompt, GREEDY, use_tqdm=False)[0]) for prompt in prompts]
    assert together[0] != together[3]


@pytest.mark.parametrize("nothing", ["w5 w6", {"prompt": "w5 w6", "multi_modal_data": {}}, [5, 6]], ids=repr)
def test_a_prompt_of_text_alone_needs_nothing(llm: LLM, nothing: Any) -> None:
    output = llm.generate([nothing], GREEDY, use_tqdm=False)[0]
    assert output.prompt_token_ids == [5, 6]
    assert tokens(output)


@pytest.mark.parametrize(
    ("text", "pictures"),
    [("w5", [RED]), ("w5 <image>", []), ("<image> <image>", [RED]), ("<image>", [RED, BLUE])],
    ids=["none for one", "one for none", "two for one", "one for two"],
)
def test_placeholders_and_pictures_are_as_many(llm: LLM, text: str, pictures: list[Any]) -> None:
    with pytest.raises(RequestError, match=rf"prompt 0: it has {text.count('<')} placeholders"):
        ask(llm, text, *pictures)


@pytest.mark.parametrize("name", ["audio", "video", "smell"])
def test_what_the_model_does_not_read_is_named(llm: LLM, name: str) -> None:
    with pytest.raises(RequestError, match=f"it brings {name}; beside text the model reads: image"):
        llm.generate({"prompt": "w5", "multi_modal_data": {name: [b""]}}, GREEDY, use_tqdm=False)


def test_a_prompt_brings_no_more_than_the_setting_allows(folder: Path) -> None:
    one = LLM(str(folder), limit_mm_per_prompt={"image": 1}, **SIZED)
    tokens(ask(one, "<image> w5", RED))
    two = [image_url(data_url(RED)), image_url("https://nowhere.example/never fetched")]
    with pytest.raises(RequestError, match="more than the 1 allowed"):
        ask(one, "<image> <image>", RED, object())
    with pytest.raises(RequestError, match="more than the 1 allowed"):
        chat(one, *two)
    with pytest.raises(RequestError, match="more than the 1 allowed"):
        llm_embeds(one, "<image> <image>", [torch.zeros(VECTORS, 128)] * 2)
    check_idle(one)


def test_a_limit_for_what_the_model_does_not_read_is_refused(folder: Path) -> None:
    with pytest.raises(SettingError, match="'audio'; the model reads: image"):
        LLM(str(folder), limit_mm_per_prompt={"audio": 1}, **SIZED)


def test_a_broken_picture_is_named_with_its_prompt_and_the_engine_serves_on(llm: LLM) -> None:
    good = {"prompt": "w5 <image> w6", "multi_modal_data": {"image": RED}}
    broken = {**good, "multi_modal_data": {"image": png(RED)[:60]}}
    before = tokens(llm.generate(good, GREEDY, use_tqdm=False)[0])
    with pytest.raises(RequestError, match="prompt 1: the image"):
        llm.generate([good, broken, good], GREEDY, use_tqdm=False)
    check_idle(llm)
    assert tokens(llm.generate(good, GREEDY, use_tqdm=False)[0]) == before


# --- the encoder and the caches -----------------------------------------------------------------------------------


class Counted:
    """Stands for an encoder, and counts its calls; fails over pictures whose first pixel is in `refused`."""

    def __init__(self, encoder: Any) -> None:
        self.encoder, self.calls, self.refused = encoder, 0, set[float]()

    def __call__(self, modality: str, inputs: Any) -> torch.Tensor:
        self.calls += 1
        if float(inputs["pixels"].flatten()[0]) in self.refused:
            raise RuntimeError("the tower fell")
        found: torch.Tensor = self.encoder(modality, inputs)
        return found


@pytest.fixture
def counted(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> Counted:
    encoding = llm.engine.executor.runner.encoding  # type: ignore[attr-defined]
    encoding.forget()
    monkeypatch.setattr(encoding, "_encoder", Counted(encoding._encoder))
    found: Counted = encoding._encoder
    return found


def test_a_picture_is_encoded_once_however_often_it_is_asked_about(llm: LLM, counted: Counted) -> None:
    prompts = [{"prompt": f"w{i} <image> w6", "multi_modal_data": {"image": RED}} for i in range(6)]
    llm.generate(prompts, GREEDY, use_tqdm=False)
    ask(llm, "<image> w9 <image>", png(RED), np.asarray(RED))
    assert counted.calls == 1
    ask(llm, "<image> w9 <image>", RED, BLUE)
    assert counted.calls == 2


def test_a_prompt_in_chunks_encodes_its_picture_once_and_is_answered_alike(folder: Path, llm: LLM) -> None:
    small = LLM(str(folder), enable_prefix_caching=False, max_num_batched_tokens=4, **SIZED)
    encoding = small.engine.executor.runner.encoding  # type: ignore[attr-defined]
    encoding._encoder = Counted(encoding._encoder)
    assert tokens(ask(small, "w5 <image> w6 <image>", RED, BLUE)) == tokens(
        ask(llm, "w5 <image> w6 <image>", RED, BLUE)
    )
    assert encoding._encoder.calls == 2
    check_idle(small)


def test_an_encoder_that_fails_ends_its_own_request_alone(llm: LLM, counted: Counted) -> None:
    prompts = [{"prompt": "w5 <image> w6", "multi_modal_data": {"image": image}} for image in (RED, BLUE, GREEN)]
    alone = [tokens(llm.generate(prompt, GREEDY, use_tqdm=False)[0]) for prompt in prompts]
    encoding = llm.engine.executor.runner.encoding  # type: ignore[attr-defined]
    encoding.forget()
    ((item,),) = [prompt.inputs.items for prompt in llm._read(prompts[1])]
    counted.refused = {float(item.tensors["pixels"].flatten()[0])}
    with pytest.warns(RuntimeWarning, match="the tower fell"):
        first, second, third = llm.generate(prompts, GREEDY, use_tqdm=False)
    assert second.outputs[0].finish_reason == "error"
    assert [tokens(first), tokens(third)] == [alone[0], alone[2]]
    check_idle(llm)
    counted.refused = set()
    assert tokens(llm.generate(prompts[1], GREEDY, use_tqdm=False)[0]) == alone[1]


def test_cached_prefixes_tell_pictures_apart(folder: Path) -> None:
    cached = LLM(str(folder), block_size=4, **SIZED)
    text = "w5 w6 w7 w8 <image> " + " ".join(f"w{i}" for i in range(10, 20))  # 4 + 9 + 10 tokens
    first = ask(cached, text, RED)
    again = ask(cached, text, png(RED))
    other = ask(cached, text, BLUE)
    assert first.prompt_token_ids == again.prompt_token_ids == other.prompt_token_ids
    assert [first.num_cached_tokens, again.num_cached_tokens, other.num_cached_tokens] == [0, 20, 4]
    assert tokens(again) == tokens(first)
    uncached = LLM(str(folder), enable_prefix_caching=False, **SIZED)
    assert tokens(other) == tokens(ask(uncached, text, BLUE))
    # A salt keeps two askers apart, with the same picture too.
    salted = {"prompt": text, "multi_modal_data": {"image": RED}, "cache_salt": "mine"}
    assert cached.generate(salted, GREEDY, use_tqdm=False)[0].num_cached_tokens == 0


# --- ready embeddings ---------------------------------------------------------------------------------------------


def llm_embeds(llm: LLM, text: str, vectors: Any) -> RequestOutput:
    return llm.generate({"prompt": text, "multi_modal_embeds": {"image": vectors}}, GREEDY, use_tqdm=False)[0]


def encoded(llm: LLM, image: Image) -> torch.Tensor:
    """The vectors of a picture, as a server of encoders would send them."""
    (prompt,) = llm._read({"prompt": "<image>", "multi_modal_data": {"image": image}})
    (item,) = prompt.inputs.items
    runner = llm.engine.executor.runner  # type: ignore[attr-defined]
    found: torch.Tensor = runner.encode(item).clone()
    return found


def test_ready_embeddings_are_answered_as_the_pictures_themselves(llm: LLM) -> None:
    red, blue = encoded(llm, RED), encoded(llm, BLUE)
    assert tokens(llm_embeds(llm, "w5 <image> w6", red)) == tokens(ask(llm, "w5 <image> w6", RED))
    both = tokens(llm_embeds(llm, "<image> w6 <image>", [red, blue]))
    assert both == tokens(ask(llm, "<image> w6 <image>", RED, BLUE))


@pytest.mark.parametrize("wrong", [torch.zeros(9, 64), torch.full((9, 128), torch.nan), torch.zeros(9, 128).int()])
def test_embeddings_that_cannot_be_are_refused(llm: LLM, wrong: torch.Tensor) -> None:
    with pytest.raises(RequestError, match="prompt 0: the embeddings of image"):
        llm_embeds(llm, "<image>", [wrong])


# --- conversations and streams ------------------------------------------------------------------------------------


def test_a_conversation_with_a_picture_is_the_prompt_that_its_template_writes(llm: LLM) -> None:
    direct = ask(llm, "w1 w2 <image> w6 w7 w4", RED)
    for part in (
        image_url(data_url(RED)),
        {"type": "image", "image": RED},
        {"type": "image", "image": png(RED)},
        {"type": "image", "image": np.asarray(RED)},
        {"type": "image_pil", "image_pil": RED},
    ):
        found = chat(llm, part, "w6 w7")
        assert (tokens(found), found.prompt_token_ids) == (tokens(direct), direct.prompt_token_ids)


@pytest.mark.parametrize("part", ["message.content", "(message.content if message.content is string else 'w8')"])
def test_a_template_of_text_alone_gets_the_placeholders_in_the_text(llm: LLM, part: str) -> None:
    """One that refuses parts, and one that leaves them out."""
    template = "{% for message in messages %}w1 {{ " + part + " }} w4{% endfor %}"
    turn = user(image_url(data_url(RED)), "w6 w7", image_url(data_url(BLUE)))
    found = llm.chat([turn], GREEDY, use_tqdm=False, chat_template=template)[0]
    direct = ask(llm, "w1 <image>\nw6 w7\n<image> w4", RED, BLUE)
    assert (tokens(found), found.prompt_token_ids) == (tokens(direct), direct.prompt_token_ids)


def test_pictures_of_several_messages_keep_their_order(llm: LLM) -> None:
    turns = [
        user(image_url(data_url(RED)), "w5"),
        {"role": "assistant", "content": "w9"},
        user("w6", image_url(data_url(BLUE))),
    ]
    found = llm.chat(turns, GREEDY, use_tqdm=False)[0]
    assert tokens(found) == tokens(ask(llm, "w1 w2 <image> w5 w1 w3 w9 w1 w2 w6 <image> w4", RED, BLUE))


def test_a_conversation_names_files_only_below_the_folder_that_is_allowed(
    folder: Path, llm: LLM, tmp_path: Path
) -> None:
    inside, outside = tmp_path / "media" / "red.png", tmp_path / "blue.png"
    inside.parent.mkdir()
    inside.write_bytes(png(RED))
    outside.write_bytes(png(BLUE))
    named = {"type": "image", "image": str(inside)}
    for part in (named, image_url(inside.as_uri())):
        with pytest.raises(RequestError, match=r"part 0: .*allowed_local_media_path"):
            chat(llm, part, "w6 w7")
    # Whoever has a Path has no stranger's text.
    own = tokens(chat(llm, {"type": "image", "image": inside}, "w6 w7"))
    allowed = LLM(str(folder), allowed_local_media_path=str(inside.parent), **SIZED)
    for part in (named, image_url(inside.as_uri()), {"type": "image", "image": "red.png"}):
        assert tokens(chat(allowed, part, "w6 w7")) == own
    for path in (str(outside), "../blue.png", outside.as_uri()):
        with pytest.raises(RequestError, match="is no file below allowed_local_media_path"):
            chat(allowed, image_url(path), "w6")


def test_a_conversation_fetches_from_no_host_that_is_not_allowed(llm: LLM) -> None:
    with pytest.raises(RequestError, match=r"message 0, part 1: .*allowed_media_domains"):
        chat(llm, "w5", image_url("https://images.example/red.png"))


def test_a_conversation_with_what_the_model_does_not_read_names_it(llm: LLM) -> None:
    with pytest.raises(RequestError, match="it brings audio; beside text the model reads: image"):
        chat(llm, {"type": "audio_url", "audio_url": {"url": "data:audio/wav;base64,"}}, "w5")


def test_a_model_of_text_alone_says_so_before_its_template_fails(tmp_path: Path) -> None:
    text_alone = LLM(str(tiny_checkpoint(tmp_path, "LlamaForCausalLM")), kv_cache_memory_bytes=10_000_000)
    with pytest.raises(RequestError, match="it brings image; beside text the model reads: nothing"):
        chat(text_alone, image_url(data_url(RED)), "Who?")
    with pytest.raises(RequestError, match="it brings image; beside text the model reads: nothing"):
        ask(text_alone, "Who?", RED)


def test_a_stream_takes_pictures_in_prompts_and_in_conversations(llm: LLM) -> None:
    whole = ask(llm, "w1 w2 <image> w6 w4", RED)
    prompt = {"prompt": "w1 w2 <image> w6 w4", "multi_modal_data": {"image": RED}}
    for asked in (prompt, [user(image_url(data_url(RED)), "w6")]):
        steps = list(llm.stream(asked, GREEDY))
        assert [len(step.outputs[0].token_ids) for step in steps] == list(range(1, 9))
        assert tokens(steps[-1]) == tokens(whole)
        assert steps[-1].outputs[0].text == whole.outputs[0].text


def test_a_stream_that_is_left_holds_nothing(llm: LLM) -> None:
    stream = llm.stream([user(image_url(data_url(RED)), "w6")], GREEDY)
    next(stream)
    stream.close()
    check_idle(llm)


# --- the command line ---------------------------------------------------------------------------------------------

Printed = pytest.CaptureFixture[str]


@pytest.fixture
def red(tmp_path: Path) -> str:
    (tmp_path / "a red one.png").write_bytes(png(RED))
    return str(tmp_path / "a red one.png")


@pytest.fixture
def blue(tmp_path: Path) -> str:
    (tmp_path / "blue.png").write_bytes(png(BLUE))
    return str(tmp_path / "blue.png")


def answer(output: RequestOutput) -> str:
    return output.outputs[0].text + "\n"


def test_run_puts_pictures_before_the_question(folder: Path, llm: LLM, red: str, blue: str, capsys: Printed) -> None:
    """A plain path of the user's own needs no leave."""
    assert main(["run", str(folder), "--image", red, "w6 w7", "--image", blue, *FLAGS]) == 0
    expected = chat(llm, image_url(data_url(RED)), image_url(data_url(BLUE)), "w6 w7")
    assert capsys.readouterr() == (answer(expected), "")


def test_run_completes_a_prompt_in_which_the_user_wrote_the_placeholder(
    folder: Path, llm: LLM, red: str, capsys: Printed
) -> None:
    assert main(["run", str(folder), "w5 <image> w6", "--no-chat", "--image", data_url(RED), *FLAGS]) == 0
    assert capsys.readouterr() == (answer(ask(llm, "w5 <image> w6", RED)), "")
    assert main(["run", str(folder), "w5 w6", "--no-chat", "--image", red, *FLAGS]) == 1
    assert "it has 0 placeholders" in capsys.readouterr().err


def test_run_in_a_process_of_its_own(folder: Path, llm: LLM, red: str) -> None:
    command = [sys.executable, "-m", "bestiary", "run", str(folder), "w6", "--image", red, *FLAGS]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert (done.returncode, done.stdout) == (0, answer(chat(llm, image_url(data_url(RED)), "w6"))), done.stderr


def test_run_says_what_it_cannot_serve(folder: Path, red: str, tmp_path: Path, capsys: Printed) -> None:
    text = tmp_path / "text.png"
    text.write_text("no picture")
    for arguments, says in (
        (["--audio", red], "it brings audio; beside text the model reads: image"),
        (["--image", red, "--image", red, "--limit-mm-per-prompt", "image=1"], "more than the 1 allowed"),
        (["--image", "https://images.example/red.png"], "allowed_media_domains"),
        (["--image", str(text)], "the image is of no format that is read here"),
        (["--limit-mm-per-prompt", "audio=1"], "names 'audio'; the model reads: image"),
    ):
        assert main(["run", str(folder), "w6", *arguments, *FLAGS]) == 1
        out, err = capsys.readouterr()
        assert out == ""
        assert says in err
        assert "Traceback" not in err


def test_run_fetches_from_a_domain_that_is_allowed(
    folder: Path, llm: LLM, capsys: Printed, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, list[str]]] = []

    def fetch(url: str, domains: Any, **_: Any) -> bytes:
        asked.append((url, list(domains)))
        return png(RED)

    monkeypatch.setattr("bestiary.media.web.fetch", fetch)
    flags = ["--image", "https://images.example/red.png", "--allowed-media-domains", "images.example"]
    assert main(["run", str(folder), "w6", *flags, *FLAGS]) == 0
    assert asked == [("https://images.example/red.png", ["images.example"])]
    assert capsys.readouterr().out == answer(chat(llm, image_url(data_url(RED)), "w6"))


def test_run_says_what_to_install(folder: Path, red: str, capsys: Printed, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: Any, **__: Any) -> None:
        raise CapabilityMissing("reading image needs a package: pip install 'bestiary[image]'")

    monkeypatch.setattr("bestiary.media.attachments.load_image", missing)
    assert main(["run", str(folder), "w6", "--image", red, *FLAGS]) == 1
    assert "pip install 'bestiary[image]'" in capsys.readouterr().err


def test_chat_attaches_pictures_to_the_first_question(
    folder: Path, llm: LLM, red: str, capsys: Printed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("w6\nw7\n/clear\nw7\n"))
    assert main(["chat", str(folder), "--image", red, *FLAGS]) == 0
    first = chat(llm, image_url(data_url(RED)), "w6")
    turns = [user(image_url(data_url(RED)), "w6"), {"role": "assistant", "content": first.outputs[0].text}]
    second = llm.chat([*turns, user("w7")], GREEDY, use_tqdm=False)[0]
    cleared = chat(llm, "w7")
    assert capsys.readouterr().out == answer(first) + answer(second) + answer(cleared)


def test_chat_attaches_what_a_command_names_to_the_next_question(
    llm: LLM, red: str, blue: str, capsys: Printed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(Path(blue).parent))
    talk = Conversation(llm, GREEDY)
    for line in (f"/image {red}", "/image ~/blue.png"):
        assert talk.take(line)
    Path(red).unlink()  # it was read already
    talk.take("w6")
    expected = chat(llm, image_url(data_url(RED)), image_url(data_url(BLUE)), "w6")
    assert capsys.readouterr().out == answer(expected)
    assert talk.attached == []
    talk.take(f"/image {blue}")
    talk.take("/clear")
    assert (talk.turns, talk.attached) == ([], [])
    talk.take("/help")
    listed = capsys.readouterr().out
    assert all(f"/{kind} PATH" in listed for kind in ("image", "audio", "video"))


def test_chat_tells_what_it_cannot_attach_and_goes_on(llm: LLM, red: str, capsys: Printed) -> None:
    talk = Conversation(llm, GREEDY)
    for line, says in (
        ("/image", "/image PATH"),
        ("/image /missing.png", "'/missing.png' is no file"),
        (f"/audio {red}", "it brings audio; beside text the model reads: image"),
        ("/video https://films.example/a.mp4", "it brings video"),
        ("/image https://images.example/a.png", "allowed_media_domains"),
        ("/image file:///etc/passwd", "allowed_local_media_path"),
    ):
        assert talk.take(line)
        assert says in capsys.readouterr().err
        assert talk.attached == []


def test_chat_forgets_a_picture_that_is_broken_with_its_question(llm: LLM, tmp_path: Path, capsys: Printed) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(png(RED)[:60])
    talk = Conversation(llm, GREEDY)
    talk.take(f"/image {broken}")
    talk.take("w6")
    assert "the image" in capsys.readouterr().err
    assert (talk.turns, talk.attached) == ([], [])
    talk.take("w6")
    assert capsys.readouterr().out == answer(chat(llm, "w6"))


def test_chat_counts_the_pictures_of_the_whole_conversation(folder: Path, red: str, capsys: Printed) -> None:
    talk = Conversation(LLM(str(folder), limit_mm_per_prompt={"image": 1}, **SIZED), GREEDY)
    talk.take(f"/image {red}")
    talk.take("w6")
    talk.take(f"/image {red}")
    assert "more than the 1 allowed" in capsys.readouterr().err
    talk.take("/clear")
    talk.take(f"/image {red}")
    assert (len(talk.attached), capsys.readouterr().err) == (1, "")


def test_a_question_that_was_interrupted_keeps_its_pictures(
    llm: LLM, red: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stream(*_: Any, **__: Any) -> Iterator[RequestOutput]:
        for _i in range(2):
            os.kill(os.getpid(), signal.SIGINT)
        yield from ()

    talk = Conversation(llm, GREEDY)
    talk.take(f"/image {red}")
    monkeypatch.setattr(llm, "stream", stream)
    talk.take("w6")
    assert (talk.turns, len(talk.attached)) == ([], 1)
