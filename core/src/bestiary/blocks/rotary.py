"""Rotary position embedding (Su et al. 2021, arXiv 2104.09864) and its stretches. Angles depend on position alone."""

import math
from dataclasses import dataclass, field, replace
from typing import Literal, Self, cast, get_args

import torch
from torch import Tensor

from bestiary.checkpoint import ConfigFile
from bestiary.errors import ConfigUnsupported

__all__ = ["Rope"]

Stretch = Literal["default", "linear", "dynamic", "llama3", "yarn"]


@dataclass(frozen=True)
class Rope:
    """The first `dim` numbers of each head turn by position x base^(-2i/dim).

    `stretch` reaches beyond the trained context: `linear` (positions divided by `factor`), `dynamic` (the base grows
    with the position), `llama3` (long wavelengths divided, short ones kept), `yarn` (Peng et al. 2023, arXiv
    2309.00071). `trained` is the context before the stretch.
    """

    dim: int
    base: float
    stretch: Stretch = "default"
    factor: float = 1.0
    trained: int = 0
    interleaved: bool = False
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    #: Multiplies cosine and sine; None: what the stretch itself says.
    attention_factor: float | None = field(default=None)
    #: How many frequencies, in order, turn with each axis of the positions (Wang et al. 2024, arXiv 2409.12191).
    sections: tuple[int, ...] = ()

    @classmethod
    def read(cls, file: ConfigFile, dim: int, *, interleaved: bool = False) -> Self:
        """From config.json, in either dialect; `dim` is the head size. Raises ConfigUnsupported for other kinds."""
        found = file.rope()
        if found.type == "mrope":  # the name that several axes had before they were a setting of their own
            found = replace(found, type="default")
        if found.type not in get_args(Stretch):
            raise ConfigUnsupported(
                f"{file.path}: rope type {found.type!r} is not supported; supported are: {', '.join(get_args(Stretch))}"
            )
        given = {name: value for name in _OPTIONAL if (value := getattr(found, name)) is not None}
        trained = found.original_max_position_embeddings or file.get("max_position_embeddings", int, 2048)
        if found.mscale and found.mscale_all_dim and found.attention_factor is None:
            factor = found.factor or 1.0
            given["attention_factor"] = _mscale(factor, found.mscale) / _mscale(factor, found.mscale_all_dim)
        dim = int(dim * (found.partial_rotary_factor or 1))
        sections = found.mrope_section
        file.must(sum(sections) in (0, dim // 2), "rope_scaling", f"has mrope_section {sections} for {dim // 2} angles")
        stretch = cast(Stretch, found.type)
        return cls(dim, found.theta, stretch, trained=trained, interleaved=interleaved, sections=sections, **given)

    def reach(self, stated: int) -> int:
        """The context in tokens where config.json states `stated`: old kinds multiply it, new ones state the result."""
        if self.stretch in ("linear", "dynamic"):
            return int(stated * self.factor)
        return int(max(stated, self.trained * self.factor)) if self.stretch == "yarn" else stated

    def table(self, length: int) -> Tensor:
        """Cosines and sines of positions 0..length: [length, 2, dim / 2] float32."""
        positions = torch.arange(length, dtype=torch.float32)
        if self.stretch == "dynamic":
            angles = positions[:, None] * self._dynamic_frequencies(length)
        else:
            angles = torch.outer(positions, self._frequencies())
        return torch.stack((angles.cos(), angles.sin()), 1) * self._amplitude()

    def turned(self, table: Tensor, axes: Tensor) -> Tensor:
        """[T, 2, dim / 2] of a table: each frequency's row is that of the position on its axis, of `axes` [axes, T]."""
        axis_of = torch.repeat_interleave(torch.arange(len(self.sections)), torch.tensor(self.sections))
        frequency = torch.arange(self.dim // 2, device=table.device)
        return table[axes[axis_of.to(axes.device)].T, :, frequency].transpose(1, 2).contiguous()

    def _frequencies(self) -> Tensor:
        plain = _inverse(self.base, self.dim)
        if self.stretch == "linear":
            return plain / self.factor
        if self.stretch == "llama3":
            return self._llama3(plain)
        if self.stretch == "yarn":
            return self._yarn(plain)
        return plain

    def _dynamic_frequencies(self, length: int) -> Tensor:
        """[length, dim / 2]: each position turns by the base that a context ending with it calls for, as in decoding.

        The reference takes one base for a whole prompt, from its length; ours does not depend on how it is cut.
        """
        seen = torch.arange(1, length + 1, dtype=torch.float64).clamp(min=self.trained)
        grown = self.factor * seen / self.trained - (self.factor - 1)
        return _inverse(self.base * grown[:, None] ** (self.dim / (self.dim - 2)), self.dim).float()

    def _llama3(self, plain: Tensor) -> Tensor:
        """Wavelengths beyond trained / low are divided, those below trained / high kept; between, a blend of both."""
        wavelength = 2 * math.pi / plain
        share = (self.trained / wavelength - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        share = share.clamp(0, 1)
        return (1 - share) * plain / self.factor + share * plain

    def _yarn(self, plain: Tensor) -> Tensor:
        """Dimensions that turn over beta_fast times in the trained context are kept, under beta_slow times divided."""

        def dimension(turns: float) -> float:
            return self.dim * math.log(self.trained / (turns * 2 * math.pi)) / (2 * math.log(self.base))

        low, high = dimension(self.beta_fast), dimension(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, self.dim - 1)
        width = (high - low) or 0.001
        divided = ((torch.arange(self.dim // 2, dtype=torch.float32) - low) / width).clamp(0, 1)
        return divided * plain / self.factor + (1 - divided) * plain

    def _amplitude(self) -> float:
        if self.attention_factor is not None:
            return self.attention_factor
        return _mscale(self.factor) if self.stretch == "yarn" else 1.0


#: Settings whose names are the same here and in config.json.
_OPTIONAL = ("factor", "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow", "attention_factor", "truncate")


def _mscale(factor: float, mscale: float = 1.0) -> float:
    """YaRN's temperature of attention (section 3.4), as DeepSeek generalises it."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def _inverse(base: float | Tensor, dim: int) -> Tensor:
    return 1.0 / base ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
