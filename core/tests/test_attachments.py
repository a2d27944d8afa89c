"""What a prompt may bring: forms and counts of media, ready embeddings; how items are told apart and placed."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from bestiary.architecture import Architecture, Modality, Task
from bestiary.config import EngineConfig
from bestiary.errors import RequestError, SettingError
from bestiary.inputs import Item, Piece, place
from bestiary.media import Admission, Attachment, MediaLimits, Sampling, Sources, collect
from bestiary.media.messages import Medium

WIDTH = 4
MANY = Modality(many=True, embeddings=True)
ALL = Admission({"image": MANY, "audio": MANY, "video": MANY}, width=WIDTH)
PICTURE = Image.new("RGB", (4, 3), "red")
FRAMES = np.zeros((5, 3, 4, 3), np.uint8)
SAMPLES = np.linspace(-0.5, 0.5, 800, dtype=np.float32)


class Untouchable:
    """Fails a test in which anything but its type is looked at."""

    def __getattribute__(self, name: str) -> Any:
        if name in ("ndim", "getbands"):  # by which one item is told from a list
            raise AttributeError(name)
        if name != "__class__":
            raise AssertionError(f"it was decoded: {name}")
        return object.__getattribute__(self, name)


def items(modality: str, value: Any) -> list[Attachment]:
    return ALL.attachments({modality: value})[modality]


# --- forms --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", [PICTURE, np.asarray(PICTURE)], ids=["PIL", "array"])
def test_one_picture_needs_no_list(source: Any) -> None:
    (found,), (same, again) = items("image", source), items("image", [source, source])
    for attachment in (found, same, again):
        assert (attachment.image().mode, attachment.image().size) == ("RGB", (4, 3))


def test_a_file_is_a_path_or_its_bytes(tmp_path: Path) -> None:
    PICTURE.save(tmp_path / "red.png")
    for source in (tmp_path / "red.png", str(tmp_path / "red.png"), (tmp_path / "red.png").read_bytes()):
        ((found,),) = (items("image", source),)
        assert found.image().tobytes() == PICTURE.tobytes()


def test_a_video_is_an_array_or_a_list_of_pictures() -> None:
    for source in (FRAMES, [PICTURE] * 5, (FRAMES, 2.0), ([PICTURE] * 5, 2.0)):
        for found in (items("video", source), items("video", [source])):
            assert [attachment.video().frames.shape for attachment in found] == [(5, 3, 4, 3)]
            assert found[0].video(Sampling(num_frames=2)).frames.shape[0] == 2


def test_several_videos_are_a_list_or_an_array_of_five_axes() -> None:
    for source in ([FRAMES, FRAMES], np.stack([FRAMES, FRAMES]), [[PICTURE] * 5, (FRAMES, 2.0)]):
        assert [attachment.video().frames.shape for attachment in items("video", source)] == [(5, 3, 4, 3)] * 2


def test_a_recording_is_samples_and_their_rate() -> None:
    for source in ((SAMPLES, 8000), (SAMPLES.tolist(), 8000), [(SAMPLES, 8000)]):
        (found,) = items("audio", source)
        assert (len(found.audio(8000).samples), len(found.audio(16000).samples)) == (800, 1600)


def test_samples_alone_are_one_recording_at_the_models_rate() -> None:
    for source in (SAMPLES.tolist(), SAMPLES, [SAMPLES]):
        (found,) = items("audio", source)
        assert len(found.audio(16000).samples) == len(SAMPLES)
    assert len(items("audio", [(SAMPLES, 8000), (SAMPLES, 8000)])) == 2


def test_nothing_given_is_nothing_brought() -> None:
    assert ALL.attachments({}) == ALL.attachments({"image": None}) == {}
    assert ALL.attachments({"image": [], "audio": []}) == {"image": [], "audio": []}
    assert Admission().attachments({"image": []}) == {"image": []}
    assert ALL.embeddings({"image": None}) == {}


@pytest.mark.parametrize("given", [[PICTURE], PICTURE, "red.png", 3], ids=lambda given: type(given).__name__)
def test_what_is_no_dictionary_is_refused(given: Any) -> None:
    with pytest.raises(RequestError, match="multi_modal_data must be a dictionary"):
        ALL.attachments(given)
    with pytest.raises(RequestError, match="multi_modal_embeds must be a dictionary"):
        ALL.embeddings(given)


def test_limits_go_with_each_item() -> None:
    small = Admission({"image": MANY}, limits=MediaLimits(max_image_pixels=11))
    (found,) = small.attachments({"image": PICTURE})["image"]
    with pytest.raises(RequestError, match="max_image_pixels"):
        found.image()


# --- counts -------------------------------------------------------------------------------------------------------


def test_what_is_too_many_is_refused_before_anything_is_decoded() -> None:
    bound = Admission({"image": MANY, "audio": Modality()}, {"image": 2}, width=WIDTH)
    assert len(bound.attachments({"image": [Untouchable()] * 2, "audio": Untouchable()})) == 2
    for given, says in (
        ({"image": [Untouchable()] * 3}, "3 of image, more than the 2 allowed"),
        ({"audio": [Untouchable()] * 2}, "2 of audio; the model reads at most 1"),
        ({"video": Untouchable()}, "it brings video; beside text the model reads: audio, image"),
    ):
        with pytest.raises(RequestError, match=says):
            bound.attachments(given)


def test_a_limit_of_nought_forbids_a_modality() -> None:
    with pytest.raises(RequestError, match="more than the 0 allowed"):
        Admission({"image": MANY}, {"image": 0}).attachments({"image": PICTURE})


def test_a_conversation_is_counted_before_anything_is_fetched() -> None:
    bound = Admission({"image": MANY}, {"image": 1}, sources=Sources(allowed_media_domains=["a.example"]))
    media = [Medium("image", f"https://a.example/{i}", f"message {i}, part 0") for i in range(2)]
    with pytest.raises(RequestError, match="2 of image, more than the 1 allowed"):
        bound.fetched(media)


def test_an_architecture_and_its_settings_make_an_admission(tmp_path: Path) -> None:
    architecture = Architecture(name="A", model="a", tasks={Task.GENERATE}, modalities={"image": Modality()})
    config = EngineConfig(
        model="m",
        limit_mm_per_prompt={"image": 1},
        allowed_media_domains=["a.example"],
        allowed_local_media_path=str(tmp_path),
    )
    found = Admission.of(architecture, config, WIDTH)
    assert (found.width, found.asked, list(found.modalities)) == (WIDTH, {"image": 1}, ["image"])
    assert (found.sources.allowed_media_domains, found.sources.allowed_local_media_path) == (
        ["a.example"],
        str(tmp_path),
    )
    with pytest.raises(SettingError, match="names 'audio'; the model reads: image"):
        Admission.of(architecture, EngineConfig(model="m", limit_mm_per_prompt={"audio": 1}), WIDTH)


# --- conversations ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", [Path("red.png"), b"bytes", PICTURE, np.asarray(PICTURE)], ids=type)
@pytest.mark.parametrize("kind", ["image", "audio", "video"])
def test_what_is_no_text_passes_through_a_conversation_untouched(kind: str, source: Any) -> None:
    messages: Any = [{"role": "user", "content": [{"type": kind, kind: source}, {"type": "text", "text": "What?"}]}]
    plain, media = collect(messages)
    assert plain == [{"role": "user", "content": [{"type": kind}, {"type": "text", "text": "What?"}]}]
    (found,) = ALL.fetched(media)[kind]
    assert found.source is source
    assert messages[0]["content"][0].keys() == {"type", kind}  # the caller's own is left alone


def test_a_text_in_a_conversation_is_a_strangers(tmp_path: Path) -> None:
    PICTURE.save(tmp_path / "red.png")
    message = {"role": "user", "content": [{"type": "image", "image": str(tmp_path / "red.png")}]}
    _, media = collect([message])
    with pytest.raises(RequestError, match=r"message 0, part 0: .*allowed_local_media_path"):
        ALL.fetched(media)


# --- ready embeddings ---------------------------------------------------------------------------------------------

GOOD = torch.ones(3, WIDTH)


class Posing(torch.Tensor):
    """A tensor that could say of itself what it likes."""


@pytest.mark.parametrize("given", [GOOD, [GOOD], (GOOD,), GOOD[None]], ids=["one", "list", "tuple", "stacked"])
def test_embeddings_are_one_tensor_or_several(given: Any) -> None:
    (found,) = ALL.embeddings({"image": given})["image"]
    assert torch.equal(torch.as_tensor(found), GOOD)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_embeddings_may_have_any_floating_point_type_and_lose_their_gradient(dtype: torch.dtype) -> None:
    (found,) = ALL.embeddings({"image": GOOD.to(dtype).requires_grad_()})["image"]
    assert isinstance(found, torch.Tensor)
    assert (found.dtype, found.requires_grad) == (dtype, False)


@pytest.mark.parametrize(
    "wrong",
    [
        GOOD.to_sparse(),
        GOOD.int(),
        GOOD.bool(),
        GOOD.to(torch.complex64),
        GOOD * torch.nan,
        GOOD * torch.inf,
        GOOD[:, 1:],
        GOOD[:0],
        GOOD[0],
        GOOD[None, None],
        GOOD.as_subclass(Posing),
        torch.nn.Parameter(GOOD),
        GOOD.to("meta"),
        GOOD.numpy(),
        GOOD.tolist(),
        "embeddings.pt",
        b"embeddings",
        None,
    ],
    ids=lambda wrong: f"{type(wrong).__name__} {getattr(wrong, 'dtype', '')} {getattr(wrong, 'shape', '')}",
)
def test_embeddings_that_could_harm_are_refused(wrong: Any) -> None:
    with pytest.raises(RequestError, match="the embeddings of image"):
        ALL.embeddings({"image": [GOOD, wrong]})


@pytest.mark.parametrize("wrong", ["embeddings.pt", 3, GOOD.to_sparse()], ids=lambda wrong: type(wrong).__name__)
def test_embeddings_that_are_no_list_of_tensors_are_refused(wrong: Any) -> None:
    with pytest.raises(RequestError, match="the embeddings of image"):
        ALL.embeddings({"image": wrong})


def test_embeddings_in_a_plugins_own_form_are_dense_tensors_by_name() -> None:
    grid = torch.tensor([[1, 3]])
    found = ALL.embeddings({"image": {"image_embeds": GOOD, "grid": grid}})["image"]
    assert isinstance(found, Mapping)
    assert torch.equal(found["grid"], grid)
    for wrong in (GOOD.to_sparse(), GOOD.as_subclass(Posing), [1, 3], "grid"):
        with pytest.raises(RequestError, match="the embeddings of image: grid"):
            ALL.embeddings({"image": {"image_embeds": GOOD, "grid": wrong}})
    for wrong in (GOOD * torch.nan, GOOD[:, 1:], GOOD.int()):
        with pytest.raises(RequestError, match="the embeddings of image"):
            ALL.embeddings({"image": {"image_embeds": wrong, "grid": grid}})


def test_embeddings_are_taken_where_they_are_declared_and_no_more_than_allowed() -> None:
    bound = Admission({"image": MANY, "audio": Modality(many=True)}, {"image": 1}, width=WIDTH)
    with pytest.raises(RequestError, match="2 of image, more than the 1 allowed"):
        bound.embeddings({"image": [GOOD, GOOD]})
    for name in ("audio", "video"):
        with pytest.raises(RequestError, match=f"takes no ready embeddings of {name}"):
            bound.embeddings({name: [GOOD]})


def test_a_width_that_is_not_known_is_not_asked_for() -> None:
    assert Admission({"image": MANY}).embeddings({"image": torch.ones(2, 7)})


# --- items --------------------------------------------------------------------------------------------------------


def digest(modality: str = "image", **tensors: torch.Tensor) -> bytes:
    return Item.of(modality, tensors, 1).digest


def test_equal_tensors_have_equal_digests() -> None:
    pixels, sizes = torch.arange(12.0).view(3, 4), torch.tensor([3])
    base = digest(pixels=pixels, sizes=sizes)
    assert len(base) == 32
    assert digest(sizes=sizes.clone(), pixels=pixels.clone()) == base
    assert digest(sizes=sizes, pixels=pixels.T.contiguous().T) == base  # however it lies in memory
    assert digest(sizes=sizes, pixels=torch.arange(24.0).view(3, 8)[:, :4]) != base
    assert digest(sizes=sizes, pixels=pixels.clone().requires_grad_()) == base


def test_digests_tell_apart_what_an_encoder_would() -> None:
    pixels = torch.arange(12.0).view(3, 4)
    found = [
        digest(pixels=pixels),
        digest("video", pixels=pixels),
        digest(pixel=pixels),
        digest(pixels=pixels.double()),
        digest(pixels=pixels.view(torch.int32)),
        digest(pixels=pixels.view(4, 3)),
        digest(pixels=pixels[None]),
        digest(pixels=pixels + torch.eye(3, 4) * 1e-6),
        digest(pixels=pixels, sizes=torch.tensor([3])),
        digest(pixels=pixels[:2], rest=pixels[2:]),
        digest(embeddings=pixels),
        digest(),
    ]
    assert len(set(found)) == len(found)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.bool, torch.int64, torch.uint8])
def test_any_type_and_shape_has_a_digest(dtype: torch.dtype) -> None:
    shapes = [(), (0,), (1,), (0, 3), (2, 1)]
    assert len({digest(x=torch.ones(shape).to(dtype)) for shape in shapes}) == len(shapes)


# --- places -------------------------------------------------------------------------------------------------------

SEEN, HEARD = 90, 91


def item(num_vectors: int, modality: str = "image") -> Item:
    return Item.of(modality, {"x": torch.full((num_vectors,), 1.0)}, num_vectors)


def test_pieces_take_the_places_of_their_placeholders_in_order() -> None:
    first, second, heard = item(2), item(3), item(1, "audio")
    pieces = {
        ("image", SEEN): [
            Piece.filled(first, SEEN),
            Piece(second, (7, SEEN, SEEN, SEEN, 8), (False, *[True] * 3, False)),
        ],
        ("audio", HEARD): [Piece.filled(heard, 5)],
    }
    ids, spans = place([1, SEEN, 2, HEARD, SEEN], pieces)
    assert ids == [1, SEEN, SEEN, 2, 5, 7, SEEN, SEEN, SEEN, 8]
    assert [(span.item, span.start, span.end) for span in spans] == [(first, 1, 3), (heard, 4, 5), (second, 5, 10)]
    assert spans[2].between(0, 10) == ([6, 7, 8], range(3))
    assert spans[2].between(7, 8) == ([7], range(1, 2))
    assert spans[2].between(8, 20) == ([8], range(2, 3))
    assert spans[2].between(0, 5) == spans[2].between(10, 12) == ([], range(0))


def test_a_piece_that_holds_its_own_placeholder_is_placed_once() -> None:
    ids, spans = place([SEEN], {("image", SEEN): [Piece.filled(item(3), SEEN)]})
    assert (ids, len(spans)) == ([SEEN] * 3, 1)


def test_without_pieces_a_prompt_stays_as_it_is() -> None:
    assert place([1, 2], {}) == ([1, 2], [])
    assert place([1, 2], {("image", SEEN): []}) == ([1, 2], [])
    assert place([1, HEARD], {("image", SEEN): []}) == ([1, HEARD], [])


@pytest.mark.parametrize(("ids", "count"), [([1, SEEN], 0), ([1], 1), ([SEEN, SEEN], 1), ([SEEN], 2)], ids=str)
def test_placeholders_and_items_that_differ_in_number_are_refused(ids: list[int], count: int) -> None:
    says = f"it has {ids.count(SEEN)} placeholders .token {SEEN}. for {count} of image"
    with pytest.raises(RequestError, match=says):
        place(ids, {("image", SEEN): [Piece.filled(item(1), SEEN)] * count})
