"""Tokens to text: what is released is right at once, complete in the end, and never taken back."""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import pytest
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from bestiary.errors import EngineError, RequestError
from bestiary.output import CompletionOutput, Delta, Detokenizer, Logprob, OutputText, RequestOutput
from bestiary.text import Tokenizer

BROKEN = "\N{REPLACEMENT CHARACTER}"
WORDS = "hello world, hello there: the quick brown fox naïve café 你好世界 你好 🌍🌍 👨‍👩‍👧 안녕 "


@cache
def byte_level() -> Tokenizer:
    """GPT-2's kind: every byte is a token, and a token may hold a part of a character."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=340,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<s>", "</s>"],
    )
    backend.train_from_iterator([WORDS] * 3, trainer)
    return Tokenizer(backend, {"bos_token": "<s>", "eos_token": "</s>"})


LLAMA_2 = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁hello", "lo", "a", "▁b", "é"]
FIRST_BYTE = 3


@cache
def byte_fallback() -> Tokenizer:
    """Llama 2's kind: words carry their leading space, and what has no token is spelled in bytes."""
    vocabulary = {token: place for place, token in enumerate(LLAMA_2)}
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    return Tokenizer(backend)


def beyond(full: str, prompt: str) -> str:
    """What a text has beyond its prompt's, where the prompt's last character may have been half a one."""
    while not full.startswith(prompt):
        assert prompt.endswith(BROKEN)
        prompt = prompt[:-1]
    return full[len(prompt) :]


def stream(tokenizer: Tokenizer, prompt: Sequence[int], ids: Sequence[int], skip: bool = True) -> list[str]:
    detokenizer = Detokenizer(tokenizer, prompt, skip)
    return [*(detokenizer.push(token) for token in ids), detokenizer.flush()]


def spelled(ids: Sequence[int], skip: bool = True) -> str:
    """Llama 2's text by hand: a run of bytes gives the characters that it begins with, and U+FFFD for each byte after.

    (The library breaks those characters too. They were shown, so they stay.)
    """
    text, run = "", b""
    for token in [*ids, None]:
        if token is not None and FIRST_BYTE <= token < FIRST_BYTE + 256:
            run += bytes([token - FIRST_BYTE])
            continue
        if skip and token is not None and token < FIRST_BYTE:
            continue
        try:
            text += run.decode()
        except UnicodeDecodeError as error:
            text += run[: error.start].decode() + BROKEN * (len(run) - error.start)
        text, run = text + ("" if token is None else LLAMA_2[token].replace("▁", " ")), b""
    return text.removeprefix(" ")


byte_level_ids = st.lists(st.integers(0, 339), max_size=24)
# Mostly the bytes of two- to four-byte characters, so that characters come about. No space as a byte: at the beginning
# it is stripped, so it was never shown, and breaks with what follows it.
byte_fallback_ids = st.lists(
    st.one_of(
        st.sampled_from([byte + FIRST_BYTE for byte in "你é🌍".encode()]),
        st.integers(0, len(LLAMA_2) - 1).filter(lambda token: token != FIRST_BYTE + 0x20),
        st.integers(FIRST_BYTE + 256, len(LLAMA_2) - 1),
    ),
    max_size=24,
)


@settings(deadline=None, max_examples=150)
@given(byte_level_ids, byte_level_ids, st.booleans())
def test_streamed_text_is_the_batch_text_for_any_bytes(prompt: list[int], ids: list[int], skip: bool) -> None:
    tokenizer = byte_level()
    expected = beyond(tokenizer.decode(prompt + ids, skip), tokenizer.decode(prompt, skip))
    assert "".join(stream(tokenizer, prompt, ids, skip)) == expected


@settings(deadline=None, max_examples=150)
@given(byte_fallback_ids, byte_fallback_ids, st.booleans())
@example([], [LLAMA_2.index("▁"), LLAMA_2.index("▁hello")], True)
@example([FIRST_BYTE + 0xC3, FIRST_BYTE + 0xA9, FIRST_BYTE + 0xC3], [FIRST_BYTE + 0xA9], True)
def test_streamed_text_with_byte_fallback_keeps_each_character_shown(
    prompt: list[int], ids: list[int], skip: bool
) -> None:
    expected = beyond(spelled(prompt + ids, skip), spelled(prompt, skip))
    assert "".join(stream(byte_fallback(), prompt, ids, skip)) == expected


@settings(deadline=None)
@given(st.text(), st.text(), st.sampled_from([byte_level, byte_fallback]))
def test_text_that_was_encoded_is_streamed_without_a_broken_character(
    before: str, after: str, make: Callable[[], Tokenizer]
) -> None:
    tokenizer = make()
    before, after = before.replace(BROKEN, ""), after.replace(BROKEN, "")
    if make is byte_fallback:
        before, after = before.replace("▁", ""), after.replace("▁", "")
    prompt, ids = tokenizer.encode(before), tokenizer.encode(before + after)
    if ids[: len(prompt)] != prompt:
        return
    pieces = stream(tokenizer, prompt, ids[len(prompt) :])
    assert "".join(pieces) == after
    assert not any(BROKEN in piece for piece in pieces)


def test_a_character_is_released_with_its_last_byte_and_not_before() -> None:
    ids = [byte + FIRST_BYTE for byte in "🌍é".encode()]
    assert stream(byte_fallback(), [], ids) == ["", "", "", "🌍", "", "é", ""]


def test_a_words_leading_space_depends_on_the_prompt() -> None:
    hello = LLAMA_2.index("▁hello")
    assert stream(byte_fallback(), [], [hello]) == ["hello", ""]
    assert stream(byte_fallback(), [1, hello], [hello]) == [" hello", ""]
    assert stream(byte_fallback(), [hello, *[2] * 100], [hello]) == [" hello", ""], "special tokens are no context"


def test_a_prompt_that_ends_within_a_character_is_not_repeated() -> None:
    tokenizer = byte_level()
    earth = tokenizer.encode("hello 好🌏")
    split = len(earth) - 1
    assert tokenizer.decode(earth[:split]).endswith(BROKEN)
    assert stream(tokenizer, earth[:split], [earth[-1], *tokenizer.encode("!")]) == ["🌏", "!", ""]
    assert stream(tokenizer, earth[:split], tokenizer.encode("!")) == ["!", ""]


def test_a_long_run_of_bytes_in_the_prompt_is_read_from_its_beginning() -> None:
    prompt = [byte + FIRST_BYTE for byte in "你好世界你好世界".encode()]
    assert "".join(stream(byte_fallback(), prompt, [byte + FIRST_BYTE for byte in "你".encode()])) == "你"


def test_a_byte_that_makes_earlier_ones_invalid_takes_no_text_back_and_loses_none() -> None:
    ids = [byte + FIRST_BYTE for byte in "你".encode()] + [FIRST_BYTE + 0xFF, LLAMA_2.index("▁hello")]
    assert byte_fallback().decode(ids) == BROKEN * 4 + " hello", "the batch decoder breaks the whole run"
    assert stream(byte_fallback(), [], ids) == ["", "", "你", "", BROKEN + " hello", ""]


@pytest.mark.parametrize("make", [byte_level, byte_fallback])
def test_endless_invalid_bytes_are_released_in_bounded_time(make: Callable[[], Tokenizer]) -> None:
    tokenizer = make()
    (bad,) = (place for place in range(300) if tokenizer.token(place) in ("<0xFF>", "ÿ"))
    pieces = stream(tokenizer, [], [bad] * 200 + tokenizer.encode("a"))
    assert "".join(pieces).replace(" ", "") == BROKEN * 200 + "a"
    assert sum(map(len, pieces[:100])) > 50, "not all of them are held to the end"


def test_invalid_bytes_before_a_character_do_not_break_it_where_they_are_released() -> None:
    tokenizer = byte_level()
    by_token = {tokenizer.token(place): place for place in range(340)}
    bad, earth = by_token["ÿ"], [by_token[token] for token in ("ð", "Ł", "Į", "Ĳ")]
    for number in range(25, 45):
        ids = [bad] * number + earth + tokenizer.encode("a")
        assert "".join(stream(tokenizer, [], ids)) == tokenizer.decode(ids) == BROKEN * number + "🌐a"


def test_tokens_without_text_do_not_pile_up() -> None:
    tokenizer = byte_level()
    detokenizer = Detokenizer(tokenizer, tokenizer.encode("hello"))
    for _ in range(1000):
        assert detokenizer.push(1) == ""
    assert detokenizer.push(tokenizer.encode(" world")[0]) == tokenizer.decode(tokenizer.encode(" world")[:1])
    assert len(detokenizer._window) < 50


def test_half_a_character_with_nothing_after_it_is_given_up_at_last() -> None:
    tokenizer = byte_level()
    half = tokenizer.encode("🌍")[0] if len(tokenizer.encode("🌏")) == 1 else tokenizer.encode("🌏")[0]
    pieces = stream(tokenizer, [], [half] + [1] * 100)
    assert "".join(pieces) == tokenizer.decode([half])
    assert pieces[-1] == ""


class Spelled(Tokenizer):
    """A tokenizer whose tokens are given texts."""

    def __init__(self, *texts: str) -> None:
        self.texts = texts

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return "".join(self.texts[token] for token in ids)


def output_of(texts: Sequence[str], **options: Any) -> tuple[OutputText, list[Delta]]:
    output = OutputText(Spelled(*texts), **options)
    deltas = []
    for token in range(len(texts)):
        deltas.append(output.push(token, final=token == len(texts) - 1))
        if deltas[-1].stopped_by is not None:
            break
    return output, deltas


def first_stop(texts: Sequence[str], stops: Sequence[str], min_tokens: int) -> tuple[int, int, str] | None:
    """The naive way: after each character, does the whole text end with a stop string?"""
    text = ""
    for token, piece in enumerate(texts):
        for character in piece:
            text += character
            for stop in stops:
                if text.endswith(stop) and token + 1 > min_tokens:
                    return token, len(text), stop
    return None


few = st.text("ab", min_size=1, max_size=4)


@settings(deadline=None, max_examples=200)
@given(
    texts=st.lists(st.text("abc", max_size=3), min_size=1, max_size=12),
    stops=st.lists(few, max_size=3, unique=True),
    include=st.booleans(),
    min_tokens=st.integers(0, 5),
)
def test_stop_strings_are_found_as_in_the_complete_text(
    texts: list[str], stops: list[str], include: bool, min_tokens: int
) -> None:
    output = OutputText(Spelled(*texts), stop=stops, include_stop=include)
    expected = first_stop(texts, stops, min_tokens)
    released = ""
    for token in range(len(texts)):
        final = token == len(texts) - 1
        delta = output.push(token, final=final, may_stop=token + 1 > min_tokens)
        released += delta.text
        assert output.text == released
        if expected is not None and token == expected[0]:
            _, end, stop = expected
            assert delta.stopped_by == stop
            assert released == "".join(texts)[: end if include else end - len(stop)]
            return
        assert delta.stopped_by is None
        so_far = "".join(texts[: token + 1])
        held = max(
            (size for stop in stops for size in range(1, len(stop)) if so_far.endswith(stop[:size])),
            default=0,
        )
        assert released == (so_far if final else so_far[: len(so_far) - held]), "all that is certain, and no more"
    assert expected is None


def test_a_stop_string_across_token_borders_never_shows() -> None:
    output, deltas = output_of(["Hi", " Us", "er", ":", " x"], stop=["User:"])
    assert deltas == [("Hi", None), (" ", None), ("", None), ("", "User:")]
    assert output.text == "Hi "


def test_text_that_only_looked_like_a_stop_string_comes_back_at_once() -> None:
    _, deltas = output_of(["a#", "#", "b", "#"], stop=["###"])
    assert [delta.text for delta in deltas] == ["a", "", "##b", "#"]


def test_the_stop_string_that_is_completed_first_wins_and_then_the_one_named_first() -> None:
    assert output_of(["xabcd"], stop=["abcd", "bc"])[1] == [("xa", "bc")]
    assert output_of(["xabc"], stop=["c", "abc"])[1] == [("xab", "c")]
    assert output_of(["xabc"], stop=["abc", "c"])[1] == [("x", "abc")]


def test_a_stop_string_is_kept_on_request_and_nothing_after_it() -> None:
    assert output_of(["ab", "!?c"], stop=["!"], include_stop=True)[0].text == "ab!"


def test_a_stop_string_that_passed_below_min_tokens_is_not_found_later() -> None:
    output = OutputText(Spelled("xb", "c"), stop=["b", "xbcd"])
    assert output.push(0, may_stop=False) == ("", None)
    assert output.push(1) == ("", None)
    assert output.finish() == ("xbc", None)


def test_a_stop_string_is_found_in_text_that_the_last_token_sets_free() -> None:
    tokenizer = byte_level()
    half = tokenizer.encode("🌏")[0]
    output = OutputText(tokenizer, stop=[BROKEN])
    assert output.push(half, final=True) == Delta("", BROKEN)


def test_a_stop_token_is_shown_only_where_it_is_asked_for() -> None:
    for include, text in ((False, "a"), (True, "ab")):
        output = OutputText(Spelled("a", "b"), include_stop=include)
        output.push(0)
        output.push(1, stop_token=True)
        assert output.text == text


def test_the_end_releases_what_was_held() -> None:
    output = OutputText(Spelled("a#", "b"), stop=["##"])
    assert output.push(0) == ("a", None)
    assert output.push(0, stop_token=True) == ("#", None)
    assert output.text == "a#"


def test_an_abort_releases_what_was_held_once() -> None:
    output = OutputText(Spelled("a#"), stop=["##"])
    output.push(0)
    assert output.finish() == ("#", None)
    assert output.finish() == ("", None)
    assert output.text == "a#"


@settings(deadline=None, max_examples=100)
@given(data=st.data(), end=st.sampled_from(["final", "stop_token", "abort"]))
def test_text_that_is_read_at_the_end_only_is_made_there_and_is_the_same(data: st.DataObject, end: str) -> None:
    tokenizer = byte_level()
    prompt, answer = (data.draw(st.lists(st.integers(0, 255), min_size=least, max_size=12)) for least in (0, 1))
    texts = []
    for at_end in (False, True):
        output = OutputText(tokenizer, prompt, at_end=at_end)
        for token in answer[:-1]:
            assert not output.push(token).text or not at_end
        if end == "abort":
            output.push(answer[-1])
            output.finish()
        else:
            output.push(answer[-1], final=end == "final", stop_token=end == "stop_token")
        texts.append(output.text)
    assert texts[0] == texts[1]


def test_text_at_the_end_can_be_read_before_it_and_stop_strings_are_found_meanwhile() -> None:
    output = OutputText(Spelled("a", "b", "c"), at_end=True)
    assert [output.push(0), output.push(1)] == [("", None), ("", None)]
    assert output.text == "ab"
    assert output.push(2, final=True) == ("c", None)
    assert output.text == "abc"
    stopped = OutputText(Spelled("a", "b", "c"), stop=["b"], at_end=True)
    assert [stopped.push(0), stopped.push(1)] == [("a", None), ("", "b")]


def test_a_token_after_the_end_is_an_error() -> None:
    for options in ({"final": True}, {"stop_token": True}):
        output = OutputText(Spelled("a"))
        output.push(0, **options)
        with pytest.raises(EngineError, match="after the end"):
            output.push(0)
    stopped, _ = output_of(["a"], stop=["a"])
    with pytest.raises(EngineError):
        stopped.push(0)


def test_without_a_tokenizer_there_is_no_text_and_no_error() -> None:
    output = OutputText(None, [1, 2])
    assert output.push(3) == Delta("", None)
    assert output.finish() == Delta("", None)
    assert output.text == ""


def test_stop_strings_without_text_are_refused() -> None:
    with pytest.raises(RequestError, match="stop_token_ids"):
        OutputText(None, stop=["a"])
    with pytest.raises(RequestError, match="empty"):
        OutputText(Spelled("a"), stop=["a", ""])


def test_special_tokens_are_shown_where_they_are_asked_for() -> None:
    tokenizer = byte_level()
    for skip, text in ((True, "hello"), (False, "<s>hello")):
        output = OutputText(tokenizer, skip_special_tokens=skip)
        for token in tokenizer.encode("<s>hello"):
            output.push(token)
        assert output.text == text


def test_results_have_the_fields_that_vllm_users_read() -> None:
    answer = CompletionOutput(0, "Paris", [5, 6], -0.5, [{5: Logprob(-0.2, 1, "Par")}], "stop", "\n")
    result = RequestOutput("7", "Capital?", [1, 2], None, [answer], finished=True, num_cached_tokens=1)
    assert answer.finished()
    assert not CompletionOutput(0, "", []).finished()
    assert result.outputs[0].text == "Paris"
    assert result.outputs[0].logprobs[0][5].decoded_token == "Par"
    assert repr(answer) == (
        "CompletionOutput(index=0, text='Paris', token_ids=[5, 6], cumulative_logprob=-0.5, "
        "logprobs=[{5: Logprob(logprob=-0.2, rank=1, decoded_token='Par')}], finish_reason='stop', stop_reason='\\n')"
    )
    with pytest.raises(AttributeError):
        result.output = []  # a misspelled field is not made up
