"""Digests of items: equal for equal content and options, different for anything else; their numbers limited."""

import subprocess
import sys
from collections.abc import Mapping
from struct import pack

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from bestiary.errors import CapabilityMissing, RequestError, SettingError
from bestiary.media import Audio, MediaLimits, Video, check_counts, digest
from bestiary.media.decoders import extra

BYTES = bytes(range(24))
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=4),
    max_leaves=12,
)


def typed(value: object) -> object:
    """A form in which Python's equality tells 1 from True and from 1.0."""
    if isinstance(value, Mapping):
        return "mapping", {key: typed(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return "list", [typed(inner) for inner in value]
    return type(value).__name__, str(value)


@given(VALUES, VALUES)
def test_two_values_share_a_digest_only_when_they_are_equal(one: object, other: object) -> None:
    assert (digest("image", one) == digest("image", other)) == (typed(one) == typed(other))


def test_equal_bytes_of_another_size_mode_type_kind_or_option_differ() -> None:
    array = np.frombuffer(BYTES, np.uint8)
    items = [
        digest("image", Image.frombytes("RGB", (4, 2), BYTES)),
        digest("image", Image.frombytes("RGB", (2, 4), BYTES)),
        digest("image", Image.frombytes("RGBA", (3, 2), BYTES)),
        digest("image", Image.frombytes("HSV", (4, 2), BYTES)),
        digest("image", Image.frombytes("L", (24, 1), BYTES)),
        *(digest("image", array.reshape(shape)) for shape in [(24,), (2, 4, 3), (4, 2, 3), (2, 12), (1, 24)]),
        digest("image", array.astype(np.int8)),
        digest("image", array.view(np.int16)),
        digest("image", array.view(">i2")),
        digest("image", array.view(np.float32)),
        digest("audio", array),
        digest("image", array, decoding={"alpha": "white"}),
        digest("image", array, processor={"alpha": "white"}),
        digest("image", array, processor={"alpha": None}),
        digest("image", array, processor={"size": 1}),
        digest("image", array, processor={"size": True}),
        digest("image", array, processor={"size": 1.0}),
        digest("image", array, processor={"size": "1"}),
        digest("audio", Audio(array.view(np.float32), 16_000)),
        digest("audio", Audio(array.view(np.float32), 8_000)),
        digest("video", Video(array.reshape(1, 4, 2, 3), None, None)),
        digest("video", Video(array.reshape(2, 2, 2, 3), None, None)),
        digest("video", Video(array.reshape(2, 2, 2, 3), 2.0, np.array([0, 0.5]))),
        digest("video", Video(array.reshape(2, 2, 2, 3), 2.0, np.array([0, 1.0]))),
        digest("image", [array[:12], array[12:]]),
        digest("image", [array[:8], array[8:]]),
    ]
    assert len(set(items)) == len(items)
    assert {len(item) for item in items} == {32}


def test_content_that_imitates_the_border_of_two_fields_is_still_one_field() -> None:
    border = pack("<Q", 2) + b"str"
    text = border.decode()
    assert digest("image", [f"x{text}y", "z"]) != digest("image", ["x", f"y{text}z"])


def test_the_same_content_in_another_place_or_order_of_memory_has_the_same_digest() -> None:
    array = np.frombuffer(BYTES, np.uint8).reshape(4, 6)
    assert digest("image", array) == digest("image", np.asfortranarray(array)) == digest("image", array[::-1][::-1])
    one, other = {"a": 1, "b": [2, 3]}, {"b": (2, 3), "a": 1}
    assert digest("image", array, processor=one) == digest("image", array, processor=other)


@pytest.mark.parametrize("content", [{1: 2}, {"a": object()}, [{2}], np.array([object()])])
def test_what_has_no_content_of_its_own_is_refused(content: object) -> None:
    with pytest.raises(TypeError):
        digest("image", content)


def test_counts_are_held_to_the_model_and_to_the_setting() -> None:
    model = {"image": None, "audio": 2}
    check_counts({"image": 4, "audio": 2}, {"image": 4}, model)
    check_counts({"image": 10**6, "video": 0}, {}, model)
    with pytest.raises(RequestError, match=r"5 of image, more than the 4 .* raise limit_mm_per_prompt\['image'\]"):
        check_counts({"image": 5}, {"image": 4}, model)
    with pytest.raises(RequestError, match="3 of audio; the model reads at most 2"):
        check_counts({"audio": 3}, {"audio": 9}, model)
    with pytest.raises(RequestError, match="1 of audio, more than the 0"):
        check_counts({"audio": 1}, {"audio": 0}, model)
    with pytest.raises(RequestError, match="brings video; beside text the model reads: audio, image"):
        check_counts({"video": 1}, {}, model)
    with pytest.raises(RequestError, match="the model reads: nothing"):
        check_counts({"image": 1}, {}, {})


@pytest.mark.parametrize("setting", [{"image": -1}, {"image": 1.5}, {"image": True}, {"film": 1}])
def test_a_setting_of_counts_that_cannot_be_is_refused(setting: dict[str, int]) -> None:
    with pytest.raises(SettingError, match="limit_mm_per_prompt"):
        check_counts({}, setting, {"image": None})


@pytest.mark.parametrize("value", [0, -1, float("nan"), True, "9", None])
def test_a_limit_that_cannot_be_is_refused(value: object) -> None:
    with pytest.raises(SettingError, match="max_image_bytes"):
        MediaLimits(max_image_bytes=value)


def test_a_number_that_is_none_is_over_every_limit() -> None:
    with pytest.raises(RequestError, match="seconds: nan"):
        MediaLimits().check("max_audio_seconds", float("nan"), "the audio")


def test_a_missing_decoder_is_named_with_the_line_that_installs_it() -> None:
    with pytest.raises(CapabilityMissing, match=r"pip install 'bestiary\[video\]'"), extra("video"):
        import no_such_decoder  # noqa: F401


def test_the_package_imports_no_decoder() -> None:
    heavy = "{'PIL', 'soundfile', 'soxr', 'av', 'numpy', 'torch', 'transformers'}"
    program = f"import sys, bestiary.media; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
