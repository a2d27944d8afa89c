"""Sound to numbers: the spectrogram that Whisper reads (Radford et al. 2022, arXiv 2212.04356). Knows no tower."""

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from bestiary.errors import RequestError

__all__ = ["RATE", "fit_length", "log_mel", "num_frames"]

#: Samples a second, of a frame's window, and from one frame to the next.
RATE, _WINDOW, _HOP = 16_000, 400, 160

_TOP_HZ = 8000.0
#: Powers of ten below the loudest that are told apart.
_DECADES = 8.0


def num_frames(samples: int) -> int:
    """How many frames `log_mel` makes of so many samples."""
    return samples // _HOP


def fit_length(samples_S: NDArray[np.float32], length: int) -> NDArray[np.float32]:
    """The first `length` samples, with silence after them where there are fewer."""
    fitted = np.zeros(length, np.float32)
    kept = samples_S[:length]
    fitted[: len(kept)] = kept
    return fitted


def log_mel(samples_S: NDArray[np.float32], bins: int) -> NDArray[np.float32]:
    """[bins, frames] float32 of mono samples at `RATE`: the power in each band of pitch, its logarithm near -1 to 1.

    Raises RequestError for sound that is shorter than half a window.
    """
    if len(samples_S) <= _WINDOW // 2:
        raise RequestError(
            f"the audio has {len(samples_S)} samples; the model needs more than {_WINDOW // 2}: send more"
        )
    mirrored = np.pad(samples_S.astype(np.float64), _WINDOW // 2, mode="reflect")
    windows_FW = np.lib.stride_tricks.sliding_window_view(mirrored, _WINDOW)[::_HOP][: num_frames(len(samples_S))]
    # A window of 400 is one period: the point that would begin the next is left out.
    power_FK = np.abs(np.fft.rfft(windows_FW * np.hanning(_WINDOW + 1)[:-1])) ** 2
    log_BF = np.log10(np.maximum(_mel_filters(bins).T @ power_FK.T, 1e-10))
    found: NDArray[np.float64] = (np.maximum(log_BF, log_BF.max() - _DECADES) + 4.0) / 4.0
    return found.astype(np.float32)


@lru_cache
def _mel_filters(bins: int) -> NDArray[np.float64]:
    """[frequencies, bins]: triangles that are as wide as pitch is heard, each of area one (Slaney 1998)."""
    frequencies = np.linspace(0.0, RATE / 2, _WINDOW // 2 + 1)
    corners = _hertz(np.linspace(0.0, _mel(_TOP_HZ), bins + 2))
    low, middle, high = corners[:-2], corners[1:-1], corners[2:]
    rising = (frequencies[:, None] - low) / (middle - low)
    falling = (high - frequencies[:, None]) / (high - middle)
    filters: NDArray[np.float64] = np.maximum(0.0, np.minimum(rising, falling)) * 2.0 / (high - low)
    return filters


#: Slaney's scale of pitch: even up to 1000 Hz, which is 15; above, 27 steps for each factor of 6.4.
_STEP_HZ, _BEND_HZ, _BEND, _STEPS = 200.0 / 3.0, 1000.0, 15.0, 27.0 / np.log(6.4)


def _mel(hertz: float) -> float:
    """Of a frequency above the bend."""
    return float(_BEND + np.log(hertz / _BEND_HZ) * _STEPS)


def _hertz(mel: NDArray[np.float64]) -> NDArray[np.float64]:
    above = _BEND_HZ * np.exp((np.maximum(mel, _BEND) - _BEND) / _STEPS)
    return np.where(mel < _BEND, mel * _STEP_HZ, above)
