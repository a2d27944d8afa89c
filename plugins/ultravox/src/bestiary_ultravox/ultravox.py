"""Ultravox (Fixie 2024): a recording, through Whisper's encoder and a projector, among the tokens of somebody's text.

The language model, and often the encoder, are other checkpoints, which config.json names.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor
from torch.nn import functional as F

from bestiary import hub
from bestiary.blocks import Decoder, Encoder, Linear, RMSNorm
from bestiary.blocks.leaf import Block
from bestiary.checkpoint import ConfigFile, Names, Split
from bestiary.model import Other
from bestiary_towers import languages, whisper

__all__ = ["NAMES", "Config", "Projector", "UltravoxEncoder", "describe", "others"]

_EPS = 1e-6


@dataclass(frozen=True)
class Config:
    """What config.json says of an Ultravox."""

    text: ConfigFile
    audio: whisper.Config
    #: Where their tensors are, if not in the checkpoint itself.
    text_model: str | None
    audio_model: str | None
    inner: int
    stack: int
    #: The second norm stands between the products (0.5 and later), or after them (up to 0.4.1).
    norm_between: bool
    #: A recording's last frame is made whole (November 2024 and later), or left out.
    whole_frames: bool
    audio_token: int | None

    @classmethod
    def read(cls, file: ConfigFile) -> Self:
        """Raises ConfigUnsupported for a projector or a language model that is not served."""
        file.expect("projector_act", "swiglu", default="swiglu")
        file.expect("num_projector_layers", 0, default=0)
        file.expect("audio_latency_block_size", None, 0)
        inner = file.size("hidden_size", 4096)
        file.must(inner % 2 == 0, "hidden_size", f"is {inner}; a gate and what it lets through halve it")
        text_model, audio_model = file.get("text_model_id", str), file.get("audio_model_id", str)
        audio = _part(file, "audio_config", audio_model)
        audio.expect("model_type", "whisper", default="whisper")
        return cls(
            text=languages.read(_part(file, "text_config", text_model), "llama", "mistral", "qwen2"),
            audio=whisper.Config.read(audio),
            text_model=text_model,
            audio_model=audio_model,
            inner=inner,
            stack=file.size("stack_factor", 8),
            norm_between=file.get("projector_ln_mid", bool, False),
            # Keys that came into files with that way of cutting recordings, most often as null.
            whole_frames=not file.values.keys().isdisjoint({"audio_latency_block_size", "projector_ln_mid"}),
            audio_token=file.get("audio_token_index", int),
        )

    def num_vectors(self, frames: int) -> int:
        """How many vectors a recording of so many frames becomes, cut into pieces that the tower can hear."""
        pieces, rest = divmod(frames, self.window)
        return sum(-(-length // (2 * self.stack)) for length in (*[self.window] * pieces, rest))

    @property
    def window(self) -> int:
        """Frames that the tower hears at once."""
        return 2 * self.audio.positions


def _part(file: ConfigFile, key: str, model: str | None) -> ConfigFile:
    """What a part's own section says, and beyond that the config.json of the model that it is."""
    if model is None:
        return file.section(key)
    known = ConfigFile.load(hub.locate(model))
    return file.section(key).filled(known.values) if key in file else known


class Projector(Block):
    """Norm, a gated product of two, with a norm between or after them."""

    def __init__(self, inputs: int, inner: int, width: int, *, norm_between: bool) -> None:
        super().__init__()
        half = inner // 2
        self.before = RMSNorm(inputs, _EPS)
        self.up = Linear(inputs, {"gate": half, "up": half}, "column")
        self.between = RMSNorm(half, _EPS) if norm_between else None
        self.down = Linear(half, width, "row")
        self.after = None if norm_between else RMSNorm(width, _EPS)

    def forward(self, x_TI: Tensor) -> Tensor:
        """[T, inputs] to [T, width]."""
        x_TH = self.up.activated(self.before(x_TI)[0], "silu", gated=True)
        y_TD: Tensor = self.down(x_TH if self.between is None else self.between(x_TH)[0])
        return y_TD if self.after is None else self.after(y_TD)[0]


class UltravoxEncoder(Encoder):
    """A recording in pieces that the tower can hear, each to vectors, several states of the tower in one."""

    def __init__(self, c: Config, width: int) -> None:
        super().__init__()
        self.stack, self.window = c.stack, c.window
        self.tower = whisper.describe(c.audio)
        self.projector = Projector(c.audio.width * c.stack, c.inner, width, norm_between=c.norm_between)

    def forward(self, modality: str, inputs: Mapping[str, Tensor]) -> Tensor:
        """[vectors, width] of a spectrogram [bins, frames]."""
        pieces = list(torch.split(inputs["spectrogram"], self.window, 1))
        heard = [whisper.Config.num_states(piece.shape[1]) for piece in pieces]
        if len(pieces) > 1:
            pieces[-1] = self._filled(pieces[-1])
        lengths = [whisper.Config.num_states(piece.shape[1]) for piece in pieces]
        states = self.tower(pieces, heard).split_with_sizes(lengths)
        y_TD: Tensor = self.projector(torch.cat([self._stacked(part) for part in states]))
        return y_TD

    def _filled(self, piece_BF: Tensor) -> Tensor:
        """A piece that goes on from another one is filled with zeros to a whole window.

        Of these count those alone whose states stand in one vector with some of the sound.
        """
        frames, step = piece_BF.shape[1], 2 * self.stack
        return F.pad(piece_BF, (0, min(-(-frames // step) * step, self.window) - frames))

    def _stacked(self, x_TD: Tensor) -> Tensor:
        """[T, width] to [T / stack, width x stack], zeros after the last."""
        return F.pad(x_TD, (0, 0, 0, -len(x_TD) % self.stack)).view(-1, self.stack * x_TD.shape[1])


def describe(c: Config) -> Decoder:
    """The tree of an Ultravox: the language model's, with an encoder."""
    decoder = languages.describe(c.text).tree
    decoder.encoder = UltravoxEncoder(c, decoder.embed.width)
    return decoder


def NAMES(c: Config) -> Names:
    """The language model's names and the tower's, each behind a prefix, and the projector's."""
    text, projector = languages.describe(c.text).names, "multi_modal_projector."
    found: Names = text.under("language_model.", "") + whisper.NAMES.under("audio_tower.", "encoder.tower.")
    return found + Names(
        ("ln_pre", "before"),
        ("linear_1", "up", Split("up", "gate")),
        ("ln_mid", "between"),
        ("linear_2", "down"),
        ("ln_post", "after"),
    ).under(projector, "encoder.projector.")


def others(c: Config) -> Sequence[Other]:
    """The checkpoints of the language model and of the tower."""
    texts = [Other(c.text_model, "language_model.")] if c.text_model else []
    return [*texts, Other(c.audio_model, "audio_tower.", within="model.encoder.")] if c.audio_model else texts
