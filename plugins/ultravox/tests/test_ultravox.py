"""What the kit does not ask: several folders as one model, placeholders in a text, recordings of odd lengths."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
from safetensors.torch import load_file, save_file
from transformers import WhisperFeatureExtractor

from bestiary.checkpoint import ConfigFile
from bestiary.config import EngineConfig
from bestiary.engine import Engine
from bestiary.errors import ConfigUnsupported, RequestError, TensorMismatch
from bestiary.inputs import Inputs
from bestiary.llm import LLM
from bestiary.media import Attachment
from bestiary.prompts import Prompt, parse_prompts
from bestiary.sampling.params import SamplingParams
from bestiary.testing import Sample, sound
from bestiary.text import Tokenizer
from bestiary_ultravox.oracle import Together, Ultravox
from bestiary_ultravox.processor import Processor
from bestiary_ultravox.proof import AUDIO, END, LATER, LLAMA, PUBLISHED, WHISPER, samples
from bestiary_ultravox.ultravox import Config

NEW = 12


def saved(folder: Path, config: Mapping[str, Any], *, parted: bool) -> Together:
    folder.mkdir(exist_ok=True)
    oracle = Ultravox(parted).build(config, seed=0)
    oracle.save(folder)
    return oracle


def load(folder: Path, **settings: Any) -> Engine:
    given = {"dtype": "float32", "device": "cpu", "skip_tokenizer_init": True, "kv_cache_memory_bytes": 2**24}
    return Engine.load(EngineConfig.resolve(model=str(folder), max_logprobs=96, **{**given, **settings}), folder)


def answer(engine: Engine, prompt: Mapping[str, Any]) -> tuple[list[int], torch.Tensor]:
    """Greedy tokens, and the log-probabilities of all that could have stood in their place."""
    (parsed,) = parse_prompts(prompt, engine.tokenizer, engine.processor, engine.admission)
    params = SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True, detokenize=False, logprobs=96)
    engine.add_request("0", parsed.token_ids, params, inputs=parsed.inputs, final_only=True)
    (output,) = [output for _ in range(100) if engine.has_unfinished_requests() for output in engine.step()]
    (found,) = output.outputs
    assert found.finish_reason == "length", found.stop_reason
    table = torch.tensor([[row[token].logprob for token in range(96)] for row in found.logprobs or []])
    return list(found.token_ids), table


def agree(engine: Engine, oracle: Together, given: Sequence[Sample], *, least: int = 6) -> None:
    """Every log-probability, and answers that are not one token again and again."""
    distinct: set[int] = set()
    for sample in given:
        tokens, table = answer(engine, sample.prompt())
        expected = oracle.judge(sample, tokens)[-NEW:]
        torch.testing.assert_close(table, expected, atol=1e-4, rtol=0)
        assert tokens == expected.argmax(-1).tolist()
        distinct |= set(tokens)
    assert len(distinct) >= least


# Several checkpoints.


@pytest.mark.parametrize("config", [PUBLISHED, LATER], ids=["0.4", "0.5"])
@pytest.mark.parametrize("chunk", [2048, 7])
def test_language_model_and_tower_may_be_in_folders_of_their_own(
    tmp_path: Path, config: Mapping[str, Any], chunk: int
) -> None:
    oracle = saved(tmp_path, config, parted=True)
    assert all(name.startswith("multi_modal_projector.") for name in load_file(tmp_path / "model.safetensors"))
    agree(load(tmp_path, max_num_batched_tokens=chunk), oracle, samples())


def test_of_a_tensor_that_both_have_the_checkpoints_own_counts(tmp_path: Path) -> None:
    """As of 0.5, whose towers were trained further and are stored whole."""
    oracle, trained = saved(tmp_path, LATER, parted=True), Ultravox().build(LATER, seed=1)
    tower = {f"audio_tower.{name}": tensor for name, tensor in trained.whisper.model.encoder.state_dict().items()}
    save_file(load_file(tmp_path / "model.safetensors") | tower, tmp_path / "model.safetensors")
    oracle.whisper = trained.whisper
    agree(load(tmp_path), oracle, samples())


def test_the_tower_may_be_whole_in_the_checkpoint_and_the_language_model_elsewhere(tmp_path: Path) -> None:
    oracle = saved(tmp_path, LATER, parted=True)
    tower = {f"audio_tower.{name}": tensor for name, tensor in oracle.whisper.model.encoder.state_dict().items()}
    save_file(load_file(tmp_path / "model.safetensors") | tower, tmp_path / "model.safetensors")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "audio_model_id": None, "audio_config": WHISPER}))
    agree(load(tmp_path), oracle, samples())


def test_what_a_section_says_holds_over_what_its_model_says(tmp_path: Path) -> None:
    saved(tmp_path, PUBLISHED, parted=True)
    config = json.loads((tmp_path / "config.json").read_text())
    found = Config.read(ConfigFile({**config, "text_config": {"rms_norm_eps": 0.5}}, tmp_path / "config.json"))
    assert found.text.need("rms_norm_eps", float) == 0.5
    assert found.text.need("vocab_size", int) == 96
    assert (found.audio.width, found.audio.positions) == (64, 20)


def test_a_part_that_is_nowhere_is_missed_by_name(tmp_path: Path) -> None:
    saved(tmp_path, PUBLISHED, parted=True)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "text_model_id": None, "text_config": LLAMA}))
    with pytest.raises(TensorMismatch, match="language_model"):
        load(tmp_path)


# What config.json says.


def read(config: Mapping[str, Any]) -> Config:
    return Config.read(ConfigFile(config, Path("config.json")))


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"projector_act": "gelu"}, "projector_act"),
        ({"num_projector_layers": 2}, "num_projector_layers"),
        ({"audio_latency_block_size": 100}, "audio_latency_block_size"),
        ({"hidden_size": 97}, "hidden_size"),
        ({"audio_config": {**WHISPER, "model_type": "wav2vec2"}}, "wav2vec2"),
        ({"audio_config": None}, "audio_config is missing"),
        ({"text_config": None}, "text_config is missing"),
    ],
)
def test_what_is_not_served_is_refused(change: Mapping[str, Any], complaint: str) -> None:
    with pytest.raises(ConfigUnsupported, match=complaint):
        read({**PUBLISHED, **change})


def test_a_language_model_that_is_not_served_is_refused(tmp_path: Path) -> None:
    saved(tmp_path, {**PUBLISHED}, parted=False)
    text = {**LLAMA, "model_type": "gpt_bigcode"}
    (tmp_path / "config.json").write_text(
        json.dumps({**PUBLISHED, "architectures": ["UltravoxModel"], "text_config": text})
    )
    with pytest.raises(ConfigUnsupported, match="gpt_bigcode"):
        load(tmp_path)


def test_a_text_config_may_hold_only_what_differs_from_its_class() -> None:
    text = read({**PUBLISHED, "text_config": {"vocab_size": 128256}}).text
    assert (text.values["model_type"], text.values["vocab_size"], text.values["hidden_size"]) == ("llama", 128256, 4096)


# How long a recording is.

#: Samples: fewer than two frames, an odd end, one over a frame, a whole window, one over it, two and a half.
LENGTHS = (1, 100, 480, 641, 1601, 6400, 6401, 16000)


@pytest.mark.parametrize("length", LENGTHS)
def test_lengths_and_frames_are_those_of_the_published_processor(length: int) -> None:
    """From November 2024 on: two frames at least, the last one filled; the mask of transformers counts them."""
    recording = np.pad(sound(0, length), (0, max(320 - length, 0)))
    made = WhisperFeatureExtractor(feature_size=80)(
        recording,
        sampling_rate=16000,
        padding="longest",
        pad_to_multiple_of=160,
        truncation=False,
        return_attention_mask=True,
        return_tensors="pt",
    )
    (item,) = processed(LATER, Prompt(token_ids=[AUDIO], media=given(length))).items
    torch.testing.assert_close(item.tensors["spectrogram"], made["input_features"][0], atol=1e-4, rtol=0)
    frames = int(made["attention_mask"].sum())
    windows = [min(40, frames - start) for start in range(0, frames, 40)]
    assert item.num_vectors == sum(-(-window // 16) for window in windows)


@pytest.mark.parametrize("length", LENGTHS[2:6])
def test_before_that_a_frame_that_is_not_whole_is_left_out(length: int) -> None:
    (item,) = processed(PUBLISHED, Prompt(token_ids=[AUDIO], media=given(length))).items
    assert item.tensors["spectrogram"].shape == (80, length // 160)
    assert item.num_vectors == -(-round(length / 320 + 1e-4) // 8)


@pytest.mark.parametrize("positions", [20, 16, 21, 1500])
def test_the_encoder_makes_as_many_vectors_as_are_counted(positions: int) -> None:
    config = read({**LATER, "audio_config": {**WHISPER, "max_source_positions": positions}})
    for frames in range(1, 130):
        pieces = [min(config.window, frames - start) for start in range(0, frames, config.window)]
        assert config.num_vectors(frames) == sum(-(-piece // 16) for piece in pieces)


def test_recordings_of_any_length_agree_with_the_reference(tmp_path: Path) -> None:
    oracle = saved(tmp_path, LATER, parted=False)
    given = [Sample((1, AUDIO, 7), {"audio": [(sound(i, length), 16000)]}) for i, length in enumerate(LENGTHS)]
    agree(load(tmp_path), oracle, given)


def test_a_window_may_be_half_a_minute(tmp_path: Path) -> None:
    config = {**LATER, "audio_config": {**WHISPER, "max_source_positions": 1500}, "text_config": LONG}
    oracle = saved(tmp_path, config, parted=False)
    sample = Sample((1, AUDIO, 7), {"audio": [(sound(1, 31 * 16000 + 77), 16000)]})
    engine = load(tmp_path)
    (parsed,) = parse_prompts(sample.prompt(), None, engine.processor, engine.admission)
    assert [item.num_vectors for item in parsed.inputs.items] == [188 + 7]
    agree(engine, oracle, [sample], least=1)


LONG = {**LLAMA, "max_position_embeddings": 1024}


# Placeholders.

TOKENIZER = {
    "version": "1.0",
    "added_tokens": [
        {"id": id, "content": text, "single_word": False, "lstrip": False, "rstrip": False}
        | {"normalized": False, "special": True}
        for id, text in ((1, "<s>"), (END, "</s>"))
    ],
    "pre_tokenizer": {"type": "Whitespace"},
    "post_processor": {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
    },
    "model": {
        "type": "WordLevel",
        "unk_token": "w0",
        "vocab": {f"w{i}": i for i in range(96) if i not in (1, END)} | {"<s>": 1, "</s>": END},
    },
}
NAMED = {"bos_token": "<s>", "eos_token": "</s>"}
WORDS = Tokenizer(tokenizers.Tokenizer.from_str(json.dumps(TOKENIZER)), NAMED)
#: As Ultravox's users write it: the placeholder where the part of a recording stands.
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% for part in message.content %}"
    "{{ part.text if part.type == 'text' else '<|audio|>' }} {% endfor %}{% endfor %}"
)


def given(*lengths: int) -> dict[str, list[Attachment]]:
    return {"audio": [Attachment((sound(i, length), 16000)) for i, length in enumerate(lengths)]}


def processed(config: Mapping[str, Any], prompt: Prompt, tokenizer: Tokenizer | None = None) -> Inputs:
    return Processor(ConfigFile(config, Path("config.json")), Path(), tokenizer)(prompt)[1]


def words(config: Mapping[str, Any], prompt: Prompt) -> tuple[list[int], list[tuple[int, int]]]:
    ids, inputs = Processor(ConfigFile(config, Path("config.json")), Path(), WORDS)(prompt)
    return ids, [(span.start, span.end) for span in inputs.spans]


def test_in_a_text_the_placeholder_is_no_token_and_special_tokens_come_once() -> None:
    text = "w5 <|audio|>w6 w7<|audio|>"
    ids, spans = words(LATER, Prompt(text=text, media=given(3300, 6400)))
    assert ids == [1, 5, END, END, 6, 7, END, END, END]
    assert spans == [(2, 4), (6, 9)]


def test_a_token_like_those_of_a_recording_is_no_recording() -> None:
    ids, spans = words(LATER, Prompt(text="</s> <|audio|> </s>", media=given(3300)))
    assert ids == [1, END, END, END, END]
    assert spans == [(2, 4)]


def test_a_rendered_conversation_has_its_special_tokens_already() -> None:
    text = "<s>w5 <|audio|> w6"
    ids = WORDS.encode(text, add_special_tokens=False)
    found, spans = words(LATER, Prompt(text, ids, given(3300)))
    assert found == [1, 5, END, END, 6]
    assert spans == [(2, 4)]


def test_a_conversation_with_a_recording_is_answered_as_its_prompt(tmp_path: Path) -> None:
    oracle = saved(tmp_path, LATER, parted=False)
    (tmp_path / "tokenizer.json").write_text(json.dumps(TOKENIZER))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**NAMED, "chat_template": TEMPLATE}))
    llm = LLM(str(tmp_path), dtype="float32", device="cpu", kv_cache_memory_bytes=2**24)
    params = SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True)
    recording = (sound(1, 5000), 16000)
    parts = [{"type": "text", "text": "w5"}, {"type": "audio", "audio": recording}, {"type": "text", "text": "w6"}]
    chat = llm.chat([{"role": "user", "content": parts}], params, use_tqdm=False)[0]
    prompt = {"prompt": "w5 <|audio|> w6", "multi_modal_data": {"audio": recording}}
    text = llm.generate(prompt, params, use_tqdm=False)[0]
    tokens = list(text.outputs[0].token_ids)
    assert chat.prompt_token_ids == text.prompt_token_ids == [1, 5, END, END, 6]
    assert list(chat.outputs[0].token_ids) == tokens
    expected = oracle.judge(Sample((1, 5, AUDIO, 6), {"audio": [recording]}), tokens)
    assert tokens == expected[-NEW:].argmax(-1).tolist()


def test_text_without_a_recording_is_as_the_tokenizer_makes_it() -> None:
    assert words(LATER, Prompt(text="w5 w6")) == ([1, 5, 6], [])
    assert words(LATER, Prompt(token_ids=[5, 6])) == ([5, 6], [])


def test_a_placeholder_that_is_a_word_of_the_vocabulary_is_one() -> None:
    """The first configurations name 32000, which Llama 3 has for a word."""
    assert words(LATER, Prompt(token_ids=[1, AUDIO, 5])) == ([1, AUDIO, 5], [])
    ids, spans = words({**LATER, "audio_token_index": 1000}, Prompt(token_ids=[1, 1000, 5], media=given(3300)))
    assert (ids, spans) == ([1, END, END, 5], [(1, 3)])


@pytest.mark.parametrize(
    ("prompt", "complaint"),
    [
        (Prompt(text="w5 <|audio|>"), r"1 placeholders for 0 of audio: write <\|audio\|> where"),
        (Prompt(text="w5", media=given(3300)), r"0 placeholders for 1 of audio"),
        (Prompt(text="<|audio|> <|audio|>", media=given(3300)), "2 placeholders for 1"),
        (Prompt(token_ids=[5], media=given(3300)), r"write <\|audio\|> in a text where"),
        (Prompt(text="<|audio|>", embeddings={"audio": {"audio_embeds": torch.ones(2, 128)}}), "give a list"),
    ],
)
def test_recordings_and_placeholders_must_be_as_many(prompt: Prompt, complaint: str) -> None:
    with pytest.raises(RequestError, match=complaint):
        words(LATER, prompt)


def test_without_a_tokenizer_the_placeholder_is_that_of_the_configuration() -> None:
    for config, complaint in ((LATER, f"the token {AUDIO}"), ({**LATER, "audio_token_index": None}, "in a text")):
        with pytest.raises(RequestError, match=complaint):
            processed(config, Prompt(token_ids=[5], media=given(3300)))


def test_silence_without_end_and_sound_that_is_too_short_are_told_apart() -> None:
    processed(LATER, Prompt(token_ids=[AUDIO], media={"audio": [Attachment((np.zeros(6401, np.float32), 16000))]}))
    with pytest.raises(RequestError, match="200 samples"):
        processed(PUBLISHED, Prompt(token_ids=[AUDIO], media=given(200)))


def test_a_recording_at_another_rate_is_brought_to_that_of_the_model() -> None:
    (item,) = processed(LATER, Prompt(token_ids=[AUDIO], media={"audio": [Attachment((sound(1, 8000), 8000))]})).items
    assert item.tensors["spectrogram"].shape == (80, 100)
