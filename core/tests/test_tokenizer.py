"""Text to token ids and back, as transformers has it, from tokenizer.json alone."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from bestiary.errors import CheckpointMalformed, CheckpointNotFound, RequestError
from bestiary.text import Tokenizer

TEXTS = ["", "hello world", "  two  spaces\n", "naïve 你好 🌍", "<s>typed</s> by hand", "nul\0 and tab\t"]


def made() -> tokenizers.Tokenizer:
    """A byte-level BPE with three special tokens, which adds none of them to a prompt."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<s>", "</s>", "<pad>"],
    )
    backend.train_from_iterator(["hello world, typed by hand " * 3], trainer)
    return backend


MADE = made().to_str()

Save = Callable[..., Path]


@pytest.fixture
def save(tmp_path: Path) -> Save:
    """Write a checkpoint's text files; keyword arguments replace entries of tokenizer.json."""

    def save(config: dict[str, Any] | None = None, **changes: Any) -> Path:
        (tmp_path / "tokenizer.json").write_text(json.dumps(json.loads(MADE) | changes), encoding="utf-8")
        if config is not None:
            (tmp_path / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
        return tmp_path

    return save


def reference(backend: tokenizers.Tokenizer, **settings: Any) -> Any:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=backend, **settings)


def test_ids_and_text_are_those_of_transformers(save: Save) -> None:
    ours = Tokenizer.load(save({"bos_token": "<s>", "eos_token": {"content": "</s>"}}))
    theirs = reference(made(), bos_token="<s>", eos_token="</s>")
    for text in TEXTS:
        ids = theirs.encode(text)
        assert ours.encode(text) == ids
        for skip in (True, False):
            assert ours.decode(ids, skip) == theirs.decode(ids, skip_special_tokens=skip)
    assert ours.encode_batch(TEXTS) == [theirs.encode(text) for text in TEXTS]
    assert (ours.bos_id, ours.eos_id) == (theirs.bos_token_id, theirs.eos_token_id)
    assert ours.vocab_size == len(theirs)


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("eos", [True, False])
def test_begin_and_end_tokens_are_added_where_the_configuration_says_so(save: Save, bos: bool, eos: bool) -> None:
    flags = {"add_bos_token": bos, "add_eos_token": eos}
    ours = Tokenizer.load(save({"bos_token": "<s>", "eos_token": "</s>", **flags}))
    theirs = reference(made(), bos_token="<s>", eos_token="</s>", **flags)
    for text in TEXTS:
        assert ours.encode(text) == theirs.encode(text)
        assert ours.encode(text, add_special_tokens=False) == theirs.encode(text, add_special_tokens=False)


@pytest.mark.parametrize("template", ["<s> $A", "$A </s>", "<s> $A </s>"])
@pytest.mark.parametrize("eos", ["</s>", "<s>"])
def test_a_begin_token_that_tokenizer_json_adds_is_not_added_twice(save: Save, template: str, eos: str) -> None:
    backend = made()
    template = template.replace("</s>", eos)
    special = [(token, backend.token_to_id(token)) for token in ("<s>", "</s>") if token in template]
    backend.post_processor = processors.TemplateProcessing(single=template, special_tokens=special)
    folder = save({"bos_token": "<s>", "eos_token": eos, "add_bos_token": True})
    backend.save(str(folder / "tokenizer.json"))
    ids = Tokenizer.load(folder).encode("hello")
    body = Tokenizer.load(folder).encode("hello", add_special_tokens=False)
    ends = [backend.token_to_id(eos)] if template.endswith(eos) else []
    # Where both are one token, a single one counts as the beginning.
    begins = [] if template == "$A <s>" else [backend.token_to_id("<s>")]
    assert ids == [*begins, *body, *ends]


def test_neither_padding_nor_truncation_of_the_training_is_left(save: Save) -> None:
    cut = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    fill = {"strategy": {"Fixed": 64}, "direction": "Left", "pad_to_multiple_of": None, "pad_id": 2, "pad_type_id": 0}
    folder = save({}, truncation=cut, padding={**fill, "pad_token": "<pad>"})
    assert Tokenizer.load(folder).encode("hello world") == made().encode("hello world").ids


def test_named_tokens_are_special_even_where_the_vocabulary_has_them_as_words(save: Save) -> None:
    folder = save({"eos_token": "hello", "pad_token": "<not there>", "bos_token": None}, added_tokens=[])
    ours = Tokenizer.load(folder)
    hello = made().token_to_id("hello")
    assert ours.special_ids == {hello}
    assert ours.special_tokens == {"eos_token": "hello"}
    assert (ours.bos_id, ours.eos_id) == (None, hello)
    assert ours.decode(ours.encode("a hello!")) == "a !"
    assert ours.decode(ours.encode("a hello!"), skip_special_tokens=False) == "a hello!"
    theirs = reference(tokenizers.Tokenizer.from_str(json.dumps(json.loads(MADE) | {"added_tokens": []})))
    theirs.add_special_tokens({"eos_token": "hello"})
    assert theirs.decode(theirs.encode("a hello!"), skip_special_tokens=True) == "a !"


def test_a_named_token_keeps_what_tokenizer_json_says_of_it(save: Save) -> None:
    tokens = json.loads(MADE)["added_tokens"]
    tokens[2]["lstrip"] = True
    folder = save({"pad_token": "<pad>"}, added_tokens=tokens)
    assert Tokenizer.load(folder).encode("a   <pad>") == [*made().encode("a").ids, 2]


def test_older_checkpoints_name_their_tokens_in_a_file_of_its_own(save: Save) -> None:
    folder = save({"eos_token": "<pad>"})
    (folder / "special_tokens_map.json").write_text('{"bos_token": {"content": "<s>"}, "eos_token": "</s>"}')
    ours = Tokenizer.load(folder)
    assert ours.special_tokens == {"bos_token": "<s>", "eos_token": "<pad>"}


def test_tokens_are_looked_up_as_the_vocabulary_spells_them(save: Save) -> None:
    ours = Tokenizer.load(save())
    assert [ours.token(0), ours.token(1)] == ["<s>", "</s>"]
    assert [ours.token(absurd) for absurd in (-1, ours.vocab_size, 2**32, 2**70)] == [None] * 4


def test_ids_of_no_token_have_no_text_and_ids_that_cannot_be_are_refused(save: Save) -> None:
    ours = Tokenizer.load(save())
    assert ours.decode([ours.vocab_size + 5, *ours.encode("hello")]) == "hello"
    for absurd in (-1, 2**32):
        with pytest.raises(RequestError, match="decode"):
            ours.decode([absurd])


def test_a_folder_without_a_tokenizer_names_both_remedies(tmp_path: Path) -> None:
    with pytest.raises(CheckpointNotFound, match=r"skip_tokenizer_init=True.*convert"):
        Tokenizer.load(tmp_path)


NONSENSE = {
    "nothing": "",
    "no tokenizer": "{}",
    "cut off": MADE[: len(MADE) // 2],
    "not even text": "\x00\xff",
    "a merge of tokens that do not exist": {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": ["a b"]}},
    "a bad pattern": {
        "pre_tokenizer": {"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated", "invert": False}
    },
    "a panic while it is read": {"normalizer": {"type": "Precompiled", "precompiled_charsmap": ""}},
    "a panic when it is used": {
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<gone>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
            "special_tokens": {},
        }
    },
}


@pytest.mark.parametrize("nonsense", NONSENSE.values(), ids=NONSENSE.keys())
def test_a_tokenizer_that_makes_no_sense_is_a_typed_error(tmp_path: Path, nonsense: Any) -> None:
    text = nonsense if isinstance(nonsense, str) else json.dumps(json.loads(MADE) | nonsense)
    (tmp_path / "tokenizer.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(CheckpointMalformed, match=r"tokenizer\.json"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", '{"bos_token": ', "\udc80"])
def test_a_configuration_that_is_no_json_object_is_a_typed_error(save: Save, text: str) -> None:
    folder = save()
    (folder / "tokenizer_config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(CheckpointMalformed, match=r"tokenizer_config\.json"):
        Tokenizer.load(folder)


def test_configuration_entries_of_strange_types_name_no_token(save: Save) -> None:
    config = {"bos_token": 3, "eos_token": {"content": None}, "add_bos_token": "yes", "unk_token": ["<s>"]}
    ours = Tokenizer.load(save(config))
    assert (ours.special_tokens, ours.bos_id, ours.eos_id) == ({}, None, None)
    assert ours.encode("hello") == made().encode("hello").ids


def test_a_lone_surrogate_is_refused_with_its_place(save: Save) -> None:
    ours = Tokenizer.load(save())
    with pytest.raises(RequestError, match=r"U\+D83D.* at character 5"):
        ours.encode("hello\ud83d world")
    with pytest.raises(RequestError, match="U\\+DC00"):
        ours.encode_batch(["fine", "\udc00"])
    assert ours.encode("hello\ud83c\udf0d".encode("utf-16", "surrogatepass").decode("utf-16"))


def test_what_is_no_text_is_refused(save: Save) -> None:
    with pytest.raises(RequestError, match="not int"):
        Tokenizer.load(save()).encode(3)  # type: ignore[arg-type]


def test_a_text_over_which_the_library_panics_fails_alone(save: Save) -> None:
    breaking = {"type": "Replace", "pattern": {"Regex": "(?:a*)*"}, "content": "x"}
    ours = Tokenizer.load(save(normalizer=breaking))
    with pytest.raises(RequestError, match="cannot encode"):
        ours.encode("hi")
    assert ours.encode("") == []
    assert ours.decode(made().encode("hello").ids) == "hello"


def test_a_text_that_the_vocabulary_cannot_spell_is_refused(save: Save) -> None:
    ours = Tokenizer.load(save(model={"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "<unk>"}))
    with pytest.raises(RequestError, match="UNK"):
        ours.encode("b")


class Interrupted:
    def decode(self, *args: Any, **options: Any) -> str:
        raise KeyboardInterrupt

    encode_batch_fast = decode


def test_an_interrupt_stays_an_interrupt(save: Save) -> None:
    ours = Tokenizer.load(save())
    ours._backend = Interrupted()
    with pytest.raises(KeyboardInterrupt):
        ours.encode("a")
    with pytest.raises(KeyboardInterrupt):
        ours.decode([1])


def test_threads_may_share_a_tokenizer(save: Save) -> None:
    ours = Tokenizer.load(save())
    texts = [f"hello world {number} 你好" for number in range(200)]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda text: ours.decode(ours.encode(text)), texts)) == texts


@pytest.mark.parametrize(("before", "after"), [(None, "false"), ("true", "true")])
def test_the_librarys_threads_are_off_unless_the_user_wants_them(
    save: Save, monkeypatch: pytest.MonkeyPatch, before: str | None, after: str
) -> None:
    if before is None:
        monkeypatch.delenv("TOKENIZERS_PARALLELISM", raising=False)
    else:
        monkeypatch.setenv("TOKENIZERS_PARALLELISM", before)
    Tokenizer.load(save())
    assert os.environ["TOKENIZERS_PARALLELISM"] == after


def test_text_needs_neither_torch_nor_transformers() -> None:
    program = (
        "import sys, bestiary.output, bestiary.text;print(sorted({'torch', 'transformers', 'jinja2'} & {*sys.modules}))"
    )
    ran = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert ran.stdout.strip() == "[]", ran.stderr
