"""Level L4: a real checkpoint reads a text as the reference does. Needs the model's memory, and network for it."""

import math
import time
from importlib import import_module, metadata
from typing import Any

import torch
from torch import Tensor

from bestiary import LLM, SamplingParams, hub, registry
from bestiary.architecture import Architecture, Task
from bestiary.checkpoint import ConfigFile
from bestiary.testing.references import Transformers
from bestiary.testing.report import Result

__all__ = ["TEXT", "prove"]

#: Prose, numbers, code and other scripts, so that a tokenizer of any language has something to say.
TEXT = """\
The lighthouse keeper wrote three lines a day for forty years: the wind, the ships, and what was for supper. On
12 March 1907 there were 17 ships, a gale from the north-west, and herring. Nobody asked him to. When the station was
closed, his daughter found 14,610 entries, and not one of them mentioned her mother, who had cooked the supper.

def mean(numbers: list[float]) -> float:
    if not numbers:
        raise ValueError("there is nothing to take the mean of")
    return sum(numbers) / len(numbers)

Der Fluss war im Winter zugefroren, und die Kinder liefen von Dorf zu Dorf. El tren llegó a las once y media, vacío.
Il est plus facile de construire un phare que d'y vivre. 山の上に小さな駅があります。 Море было спокойным до вечера.
"""
#: How far a log-probability may be from the reference's: float32, through some dozens of layers.
_TOLERANCE = 2e-3


def prove(model: str) -> list[Result]:
    """The level's checks of a checkpoint: a folder, a hub's name, or `demo`. Raises what locating and loading raise."""
    folder = hub.locate(model)
    architecture = registry.resolve(ConfigFile.load(folder).architectures)
    if reason := _unfit(architecture):
        return [_result(architecture, model, "not applicable", reason, 0.0)]
    start = time.perf_counter()
    ours, ids = _ours(str(folder))
    theirs = _theirs(_reference(architecture), str(folder), ids)
    off = float((ours - theirs).abs().max())
    found, wanted = (math.exp(-float(values.mean())) for values in (ours, theirs))
    told = f"perplexity {found:.4f}, the reference's {wanted:.4f}; {len(ids) - 1} log-probabilities, {off:.2g} off"
    status = "passed" if off <= _TOLERANCE else "failed"
    return [_result(architecture, model, status, told, time.perf_counter() - start)]


def _unfit(architecture: Architecture) -> str:
    """Why there is nothing to compare; empty where there is."""
    if Task.GENERATE not in architecture.tasks:
        return "it writes no text"
    reference = _reference(architecture)
    if not isinstance(reference, Transformers) or reference.config or reference.kind != "decoder":
        return "no class of transformers reads its checkpoints as they are"
    return ""


def _reference(architecture: Architecture) -> Any:
    return import_module(str(architecture.proof)).CASES[0].reference


def _ours(folder: str) -> tuple[Tensor, list[int]]:
    """[tokens - 1] log-probability of each token of the text after the first, and the tokens."""
    llm = LLM(model=folder, dtype="float32", enable_prefix_caching=False)
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
    (output,) = llm.generate([TEXT], params, use_tqdm=False)
    llm.close()
    ids = output.prompt_token_ids
    rows = (output.prompt_logprobs or [])[1:]
    return torch.tensor([row[token].logprob for row, token in zip(rows, ids[1:], strict=True) if row]), ids


def _theirs(reference: Transformers, folder: str, ids: list[int]) -> Tensor:
    import transformers

    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    model = getattr(transformers, reference.model).from_pretrained(
        folder, dtype=torch.float32, attn_implementation=reference.attention
    )
    with torch.inference_mode():
        logits = model(torch.tensor([ids])).logits[0, :-1].float()
    found: Tensor = logits.log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
    return found


def _result(architecture: Architecture, model: str, status: str, reason: str, seconds: float) -> Result:
    plugin = registry.find(architecture.name)
    return Result(
        core=metadata.version("bestiary"),
        plugin=f"{plugin.distribution} {plugin.version}",
        architecture=architecture.name,
        level="L4",
        check="real_checkpoint",
        case=model,
        status=status,
        reason=reason,
        seed=None,
        seconds=round(seconds, 3),
    )
