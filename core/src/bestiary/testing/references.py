"""Oracles: implementations that we did not write, with random weights. Imports torch only when one is built."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from bestiary.testing.samples import Sample

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = ["Oracle", "Reference", "Transformers", "last_token", "never", "write_config"]

#: What a model answers with: a distribution for each next token, or vectors.
Kind = Literal["decoder", "encoder-decoder", "embedding", "reward"]
Tensors = dict[str, "Tensor"]


class Oracle(Protocol):
    """A built reference."""

    def save(self, folder: Path) -> None:
        """Write model.safetensors under published names, and config.json as the reference writes it."""

    def judge(self, sample: Sample, answer: Sequence[int]) -> Tensor:
        """[tokens, vocabulary] log-probabilities of each next token, the answer's own tokens being given.

        One row for each token of the prompt but the first, as the model reads it, then one for each of the answer.
        """

    def vectors(self, sample: Sample) -> Tensor:
        """[rows, width] what a model that pools answers."""


class Reference(Protocol):
    """How an oracle is made."""

    def build(self, config: Mapping[str, Any], seed: int) -> Oracle:
        """With random weights of that seed, for a configuration as published."""


def last_token(hidden_TD: Tensor, extra: Tensors) -> Tensor:
    """[1, width] the last token's state, of length 1: how most decoders are made to embed."""
    last_1D = hidden_TD[-1:]
    return last_1D / (last_1D**2).sum(-1, keepdim=True).sqrt()


def never(*token_ids: int) -> Callable[[Tensors], Tensors]:
    """Weights with which a model hardly ever says these tokens: an oracle would take a placeholder for an item."""

    def rewrite(tensors: Tensors) -> Tensors:
        for name, tensor in tensors.items():
            if name.endswith(("lm_head.weight", "embed_tokens.weight")):
                rows = [token for token in token_ids if token < len(tensor)]
                tensor[rows] = 0
        return tensors

    return rewrite


def _same(tensors: Tensors) -> Tensors:
    return tensors


@dataclass(frozen=True)
class Transformers:
    """A class of transformers by its name.

    `changes` are made to the published configuration first, where the class wants it otherwise; `config` may rewrite it
    whole. `tensors` makes published names and layouts of those that the class saves, for an architecture that
    transformers computes but does not have. `vectors` makes the answer of a model that pools from the last hidden
    states [T, width] and the tensors that `extra` adds.
    """

    model: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    config: Callable[[dict[str, Any]], dict[str, Any]] | None = None
    tensors: Callable[[Tensors], Tensors] = _same
    #: Changes of the random weights that the class computes with.
    weights: Callable[[Tensors], Tensors] | None = None
    kind: Kind = "decoder"
    attention: Literal["eager", "sdpa"] = "eager"
    vectors: Callable[[Tensor, Tensors], Tensor] | None = None
    #: What the class's `forward` is given for a prompt and an answer, where it is more than token ids.
    feed: Callable[[Sample, Sequence[int]], Mapping[str, Any]] | None = None
    #: Tensors that the class lacks, added to what it saves: name -> shape, from the configuration.
    extra: Callable[[dict[str, Any]], dict[str, tuple[int, ...]]] | None = None
    #: The first version whose class computes all that a configuration says, and what the earlier ones leave out.
    since: tuple[str, str] = ("5", "")

    def shortcoming(self) -> str:
        """Why the numbers of the version that is installed prove nothing; "" where they do."""
        import transformers
        from packaging.version import Version

        first, left_out = self.since
        if Version(transformers.__version__) >= Version(first):
            return ""
        return f"transformers {transformers.__version__} leaves out {left_out}; {first} is the first that does not"

    def build(self, config: Mapping[str, Any], seed: int) -> Oracle:
        """Make the class's model with random weights."""
        return _Built(self, deepcopy(dict(config)), seed)  # classes write into what they are given


class _Built:
    def __init__(self, how: Transformers, config: dict[str, Any], seed: int) -> None:
        import torch
        import transformers

        from bestiary.testing.recipe import randomise

        transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
        model_class = getattr(transformers, how.model)
        changed = how.config(config) if how.config else config
        values = {key: value for key, value in {**changed, **how.changes}.items() if key != "architectures"}
        self._how = how
        self._config = model_class.config_class(**values)
        self._config._attn_implementation = how.attention
        self.model = model_class(self._config).eval().float()
        generator = torch.Generator().manual_seed(seed)
        self.extra: Tensors = {
            name: torch.randn(shape, generator=generator) * shape[-1] ** -0.5
            for name, shape in (how.extra(config) if how.extra else {}).items()
        }
        randomise(self.model, generator)
        if how.weights is not None:
            self.model.load_state_dict(how.weights(self.model.state_dict()))

    def save(self, folder: Path) -> None:
        """As `save_pretrained` does it, then in published names."""
        from safetensors.torch import load_file, save_file

        self.model.save_pretrained(folder)
        path = folder / "model.safetensors"
        published = {**self._how.tensors(load_file(path)), **self.extra}
        save_file({name: tensor.contiguous() for name, tensor in published.items()}, path, {"format": "pt"})

    def judge(self, sample: Sample, answer: Sequence[int]) -> Tensor:
        """Teacher forcing: the whole answer is given."""
        import torch

        with torch.inference_mode():
            logits = self.model(**self._fed(sample, answer)).logits[0, :-1]
        found: torch.Tensor = logits.float().log_softmax(-1)
        return found

    def _fed(self, sample: Sample, answer: Sequence[int]) -> dict[str, Any]:
        import torch

        if self._how.feed is not None:
            return dict(self._how.feed(sample, answer))
        if self._how.kind == "encoder-decoder":
            given = torch.tensor([[int(self._config.decoder_start_token_id), *answer]])
            return {"input_ids": torch.tensor([sample.token_ids]), "decoder_input_ids": given}
        return {"input_ids": torch.tensor([[*sample.token_ids, *answer]])}

    def vectors(self, sample: Sample) -> Tensor:
        """Of the last hidden states."""
        import torch

        assert self._how.vectors is not None
        with torch.inference_mode():
            return self._how.vectors(self.model(torch.tensor([sample.token_ids])).last_hidden_state[0], self.extra)


def write_config(folder: Path, config: Mapping[str, Any], architecture: str) -> None:
    """config.json of a checkpoint of that architecture."""
    (folder / "config.json").write_text(json.dumps({**config, "architectures": [architecture]}, indent=2))
