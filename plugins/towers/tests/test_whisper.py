"""Whisper's encoder and its spectrogram beside transformers' classes."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import WhisperConfig, WhisperFeatureExtractor
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from bestiary.blocks.leaf import Block
from bestiary.checkpoint import ConfigFile
from bestiary.errors import ConfigUnsupported, RequestError
from bestiary_towers import sound, whisper

Build = Callable[..., Block]
Section = Callable[[Any], ConfigFile]

BINS, WIDTH, POSITIONS = 10, 32, 12
CONFIG = WhisperConfig(
    d_model=WIDTH,
    encoder_layers=3,
    encoder_attention_heads=4,
    encoder_ffn_dim=48,
    num_mel_bins=BINS,
    max_source_positions=POSITIONS,
)


@pytest.fixture
def reference(randomised: Callable[[nn.Module], nn.Module]) -> nn.Module:
    return randomised(WhisperEncoder(CONFIG))


@pytest.fixture
def tower(reference: nn.Module, section: Section, build: Build) -> Block:
    stored = {f"audio_tower.{name}": tensor for name, tensor in reference.state_dict().items()}
    assert not any("k_proj.bias" in name for name in stored)
    return build(
        whisper.describe(whisper.Config.read(section(CONFIG))), whisper.NAMES.under("audio_tower.", ""), stored
    )


def test_whole_windows_are_encoded_as_in_the_reference(reference: nn.Module, tower: Block) -> None:
    x = torch.randn(2, BINS, 2 * POSITIONS)
    with torch.no_grad():
        expected = reference(x).last_hidden_state
    torch.testing.assert_close(tower(list(x)), expected.flatten(0, 1), atol=1e-4, rtol=1e-4)


def encode(reference: nn.Module, x: Tensor, mask: Tensor | None = None) -> Tensor:
    """The reference's own modules, without its demand for a whole window: [items, bins, frames] to [items, ...]."""
    with torch.no_grad():
        convolved = nn.functional.gelu(reference.conv2(nn.functional.gelu(reference.conv1(x)))).transpose(1, 2)
        stream = convolved + reference.embed_positions.weight[: convolved.shape[1]]
        for layer in reference.layers:
            stream = layer(stream, mask)
        found: Tensor = reference.layer_norm(stream)
    return found


def test_sound_of_several_lengths_is_encoded_without_padding(reference: nn.Module, tower: Block) -> None:
    items = [torch.randn(BINS, frames) for frames in (24, 1, 2, 7, 16)]
    expected = [encode(reference, item[None])[0] for item in items]
    assert [len(states) for states in expected] == [whisper.Config.num_states(item.shape[1]) for item in items]
    torch.testing.assert_close(tower(items), torch.cat(expected), atol=1e-4, rtol=1e-4)


def test_a_recording_is_not_changed_by_those_beside_it(tower: Block) -> None:
    items = [torch.randn(BINS, frames) for frames in (24, 5, 8)]
    spoilt = [items[0] * torch.nan, items[1], items[2] * torch.nan]
    found = tower(spoilt)
    assert found.isnan().all(-1).tolist() == [True] * 12 + [False] * 3 + [True] * 4
    torch.testing.assert_close(found[12:15], tower(items[1:2]), atol=1e-5, rtol=1e-5)


def test_states_of_added_silence_are_not_seen_by_others_and_see_the_sound(reference: nn.Module, tower: Block) -> None:
    x = torch.randn(2, BINS, 2 * POSITIONS)
    heard = [5, POSITIONS]
    seen = torch.zeros(2, 1, POSITIONS, POSITIONS)
    seen[0, :, :, 5:] = -torch.inf
    expected = encode(reference, x, seen)
    found = tower(list(x), heard)
    torch.testing.assert_close(found, expected.flatten(0, 1), atol=1e-4, rtol=1e-4)
    assert (found - tower(list(x)))[:POSITIONS].abs().max() > 1e-3


def test_sound_beyond_the_table_of_positions_is_refused(tower: Block) -> None:
    with pytest.raises(RequestError, match="25 frames; the model hears at most 24"):
        tower([torch.randn(BINS, 25)])


def test_heads_that_do_not_divide_the_width_are_refused(section: Section) -> None:
    with pytest.raises(ConfigUnsupported, match="encoder_attention_heads"):
        whisper.Config.read(section(WhisperConfig(d_model=30, encoder_attention_heads=4)))


# The spectrogram.


def recording(samples: int) -> NDArray[np.float32]:
    """A chord that swells, some noise, and a stretch of silence."""
    rng, time = np.random.default_rng(samples), np.arange(samples) / sound.RATE
    wave = sum(np.sin(2 * np.pi * f * time) for f in (220.0, 554.4, 3000.0)) * np.linspace(0, 0.3, samples)
    wave += rng.normal(0, 0.01, samples)
    wave[samples // 2 : samples // 2 + samples // 8] = 0
    return wave.astype(np.float32)


@pytest.mark.parametrize("bins", [80, 128])
@pytest.mark.parametrize("samples", [480, 1601, 16_000, 40_001])
def test_a_spectrogram_is_the_references(samples: int, bins: int) -> None:
    """Of its two ways, that in double precision; the one through torch rounds more on its way."""
    extractor = WhisperFeatureExtractor(feature_size=bins)
    wave = recording(samples)
    found = sound.log_mel(wave, bins)
    assert found.dtype == np.float32 and found.shape == (bins, sound.num_frames(samples))
    np.testing.assert_allclose(found, extractor._np_extract_fbank_features(wave[None], "cpu")[0], atol=1e-6, rtol=0)
    np.testing.assert_allclose(found, extractor._torch_extract_fbank_features(wave), atol=1e-4, rtol=0)


def test_sound_is_filled_with_silence_to_a_window_as_in_the_reference() -> None:
    extractor = WhisperFeatureExtractor(chunk_length=2)
    for samples in (20_000, 32_000, 50_000):
        wave = recording(samples)
        expected = extractor(wave, sampling_rate=sound.RATE, return_tensors="np")["input_features"][0]
        found = sound.log_mel(sound.fit_length(wave, 2 * sound.RATE), 80)
        np.testing.assert_allclose(found, expected, atol=1e-4, rtol=0)


def test_less_than_half_a_window_of_sound_is_refused() -> None:
    with pytest.raises(RequestError, match="200 samples"):
        sound.log_mel(np.zeros(200, np.float32), 80)
