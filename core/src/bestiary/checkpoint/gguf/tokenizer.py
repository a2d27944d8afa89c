"""From `tokenizer.ggml.*` to the text of a tokenizer.json: byte-level BPE. Knows no architecture.

GGUF names the pre-tokenizer instead of describing it; `SPLITS` holds the names that are known here.
"""

from dataclasses import dataclass

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors

from bestiary.checkpoint.gguf.file import GGUFFile
from bestiary.errors import CapabilityMissing, CheckpointMalformed

__all__ = ["special_tokens", "tokenizer_json"]

CONTROL, USER_DEFINED = 3, 4  # of tokenizer.ggml.token_type
MARKS = {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad"}  # GGUF's word -> Hugging Face's


@dataclass(frozen=True)
class _Split:
    """How a text is cut into words before the merges, and what goes with it."""

    pattern: str | None = None  # None: GPT-2's own pattern, which is built into the byte-level step
    single_digits: bool = False
    ignore_merges: bool = False  # a word that is a token as a whole is taken as it is
    add_bos: bool = False  # where the file does not say

    def pre_tokenizer(self) -> pre_tokenizers.PreTokenizer:
        steps: list[pre_tokenizers.PreTokenizer] = []
        if self.single_digits:
            steps.append(pre_tokenizers.Digits(individual_digits=True))
        if self.pattern is not None:
            steps.append(pre_tokenizers.Split(Regex(self.pattern), "isolated"))
        steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=self.pattern is None))
        return pre_tokenizers.Sequence(steps)


_LLAMA_BPE = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPLITS = {
    "gpt-2": _Split(),
    "smollm": _Split(single_digits=True),
    "llama-bpe": _Split(pattern=_LLAMA_BPE, ignore_merges=True, add_bos=True),
}


def tokenizer_json(gguf: GGUFFile) -> str:
    """Return the text of the tokenizer.json that tokenizes as the file says.

    Control tokens become special added tokens, user-defined ones plain added tokens. Raises CapabilityMissing for a
    kind of tokenizer or a pre-tokenizer that is not known, and CheckpointMalformed where the parts do not fit.
    """
    kind = gguf.need("tokenizer.ggml.model", str)
    if kind != "gpt2":
        raise CapabilityMissing(
            f"{gguf.path}: its tokenizer is of the kind {kind!r} (SentencePiece, where it says 'llama'), and only "
            "byte-level BPE ('gpt2') can be imported from GGUF; take the model's original folder instead"
        )
    name = gguf.get("tokenizer.ggml.pre", str, "default")
    if name not in SPLITS:
        raise CapabilityMissing(
            f"{gguf.path}: its pre-tokenizer is {name!r}, and known are {', '.join(SPLITS)}; "
            "take the model's original folder instead"
        )
    return _build(gguf, SPLITS[name]).to_str()


def special_tokens(gguf: GGUFFile) -> dict[str, tuple[int, str]]:
    """Return id and text of those of bos, eos, unk and pad that the file names."""
    tokens = _texts(gguf, "tokenizer.ggml.tokens")
    found = {}
    for word, mark in MARKS.items():
        key = f"tokenizer.ggml.{word}_token_id"
        if key not in gguf.metadata:
            continue
        if (i := gguf.need(key, int)) >= len(tokens):
            raise CheckpointMalformed(f"{gguf.path}: {key} is {i}, and there are {len(tokens)} tokens")
        found[mark] = i, tokens[i]
    return found


def _build(gguf: GGUFFile, split: _Split) -> Tokenizer:
    tokens = _texts(gguf, "tokenizer.ggml.tokens")
    vocabulary = {token: i for i, token in enumerate(tokens)}
    if len(vocabulary) != len(tokens):
        raise CheckpointMalformed(f"{gguf.path}: tokenizer.ggml.tokens holds a token twice")
    merges = [_pair(merge) for merge in _texts(gguf, "tokenizer.ggml.merges")]
    try:
        tokenizer = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=split.ignore_merges))
    except Exception as error:  # tokenizers raises nothing narrower, and it can only be about its two arguments
        raise CheckpointMalformed(f"{gguf.path}: tokenizer.ggml.merges do not fit the tokens: {error}") from error
    tokenizer.pre_tokenizer = split.pre_tokenizer()
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = _frame(gguf, split)
    tokenizer.add_tokens(_added(gguf, tokens))
    return tokenizer


def _pair(merge: str) -> tuple[str, str]:
    left, _, right = merge.partition(" ")
    return left, right


def _added(gguf: GGUFFile, tokens: list[str]) -> list[AddedToken]:
    """The tokens that are found in a text before it is split: control tokens and the user's own."""
    kinds = gguf.need("tokenizer.ggml.token_type", list)
    if len(kinds) != len(tokens):
        raise CheckpointMalformed(f"{gguf.path}: {len(tokens)} tokens, and {len(kinds)} in tokenizer.ggml.token_type")
    return [
        AddedToken(token, special=kind == CONTROL, normalized=False)
        for token, kind in zip(tokens, kinds, strict=True)
        if kind in (CONTROL, USER_DEFINED)
    ]


def _frame(gguf: GGUFFile, split: _Split) -> processors.PostProcessor:
    """What is put around every text: nothing, the begin token, the end token or both."""
    marks = special_tokens(gguf)
    wanted = {
        "bos": gguf.get("tokenizer.ggml.add_bos_token", bool, split.add_bos),
        "eos": gguf.get("tokenizer.ggml.add_eos_token", bool, False),
    }
    if missing := [mark for mark, is_wanted in wanted.items() if is_wanted and mark not in marks]:
        raise CheckpointMalformed(
            f"{gguf.path}: tokenizer.ggml.{missing[0]}_token_id is missing, and it is to be added"
        )
    byte_level = processors.ByteLevel(trim_offsets=False)
    if not any(wanted.values()):
        return byte_level
    before, after = ([marks[mark][1]] if wanted[mark] else [] for mark in ("bos", "eos"))
    template = processors.TemplateProcessing(
        single=[*before, "$A", *after],
        pair=[*before, "$A", *after, *(f"{token}:1" for token in before), "$B:1", *(f"{token}:1" for token in after)],
        special_tokens=[(text, i) for i, text in marks.values()],
    )
    return processors.Sequence([byte_level, template])


def _texts(gguf: GGUFFile, key: str) -> list[str]:
    values = gguf.need(key, list)
    if not all(isinstance(value, str) for value in values):
        raise CheckpointMalformed(f"{gguf.path}: {key} should hold texts")
    return values
