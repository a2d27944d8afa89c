"""`bestiary info`: what a model is and what fits, from config.json and the plugin's description; reads no weights."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from bestiary.cli.options import AsJson, Model, ModelFlags
from bestiary.cli.terminal import columns, one_line, print_json, size, stored

if TYPE_CHECKING:
    import torch

    from bestiary.checkpoint import ConfigFile
    from bestiary.config import EngineConfig
    from bestiary.registry import Installed

__all__ = ["command"]

_MODEL = ModelFlags()


@dataclass(frozen=True)
class _Fit:
    """What this machine has room for once the weights are loaded. Sizes in bytes; the rest in tokens and sequences."""

    device: str
    free_bytes: int
    free_after_weights_bytes: int
    cache_tokens: int
    longest_context: int
    full_length_sequences: int


@dataclass(frozen=True)
class _Facts:
    """What is known of a model before it is loaded."""

    model: str
    folder: str
    architecture: str
    distribution: str
    version: str
    tasks: tuple[str, ...]
    modalities: tuple[str, ...]
    parameters: int
    dtype: str
    quantization: str | None
    weight_bytes: int
    kv_bytes_per_token: int
    state_bytes_per_sequence: int
    context_length: int
    layers: int
    vocabulary_size: int
    chat_template: bool
    memory: _Fit


def command(
    model: Model,
    /,
    *,
    json: AsJson = False,
    options: ModelFlags = _MODEL,
) -> None:
    """Print what a model is."""
    from bestiary import hub
    from bestiary.config import EngineConfig

    config = EngineConfig.resolve(model=model, **options.settings())
    facts = _facts(config, hub.locate(model, config.revision))
    if json:
        print_json(asdict(facts))
    else:
        print(columns(_lines(facts)))


def _facts(config: EngineConfig, folder: Path) -> _Facts:
    from bestiary import model, planner, registry
    from bestiary.cache import store
    from bestiary.checkpoint import ConfigFile
    from bestiary.model import choose_device
    from bestiary.text import ChatTemplate
    from bestiary_kernels.memory import free_memory

    file = ConfigFile.load(folder)
    architecture = registry.resolve(file.architectures, prefer=config.plugin)
    plugin = _plugin(file, (architecture.name, *architecture.aliases), config)
    tree = model.describe(architecture, file).tree
    dtype = model.choose_dtype(config.dtype, file)
    model.quantise(tree, config.quantization)
    weight_bytes = planner.weight_bytes(tree, dtype)
    kept = model.keeps(tree)
    token_bytes, state_bytes = store.bytes_per_token(kept, dtype), store.bytes_per_sequence(kept, dtype)
    device = choose_device(config.device)
    return _Facts(
        model=config.model,
        folder=str(folder),
        architecture=plugin.name,
        distribution=plugin.distribution,
        version=plugin.version,
        tasks=tuple(sorted(architecture.tasks)),
        modalities=("text", *sorted(architecture.modalities)),
        parameters=model.num_parameters(tree),
        dtype=str(dtype).removeprefix("torch."),
        quantization=config.quantization,
        weight_bytes=weight_bytes,
        kv_bytes_per_token=token_bytes,
        state_bytes_per_sequence=state_bytes,
        context_length=tree.context,
        layers=tree.layers.count,
        vocabulary_size=tree.embed.vocabulary,
        chat_template=ChatTemplate.load(folder) is not None,
        memory=_fit(device, free_memory(device), weight_bytes, token_bytes, state_bytes, tree.context),
    )


def _plugin(file: ConfigFile, names: tuple[str, ...], config: EngineConfig) -> Installed:
    """The distribution behind the architecture that serves this file."""
    from bestiary import registry

    return registry.find(next(found for found in file.architectures if found in names), config.plugin)


def _fit(device: torch.device, free: int, weight_bytes: int, token_bytes: int, state_bytes: int, context: int) -> _Fit:
    """Windows are not counted on: what they save depends on how prompts are cut."""
    left = max(0, free - weight_bytes)
    tokens = max(0, left - state_bytes) // max(token_bytes, 1)
    sequences = left // max(token_bytes * context + state_bytes, 1)
    return _Fit(str(device), free, left, tokens, min(context, tokens), sequences)


def _lines(facts: _Facts) -> list[tuple[str, str]]:
    fit = facts.memory
    return [
        ("model", one_line(facts.model)),
        ("folder", one_line(facts.folder)),
        ("served by", one_line(f"{facts.distribution} {facts.version}, as {facts.architecture}")),
        ("does", one_line(f"{' '.join(facts.tasks)}; reads {' '.join(facts.modalities)}")),
        ("chat template", "yes" if facts.chat_template else "no"),
        ("parameters", f"{facts.parameters:,}"),
        ("weights", f"{size(facts.weight_bytes)} in {stored(facts.dtype, facts.quantization)}"),
        ("layers", f"{facts.layers}"),
        ("vocabulary", f"{facts.vocabulary_size:,} tokens"),
        ("context", f"{facts.context_length:,} tokens"),
        ("cache", f"{size(facts.kv_bytes_per_token)} per token"),
        *(
            [("state", f"{size(facts.state_bytes_per_sequence)} per sequence")]
            if facts.state_bytes_per_sequence
            else []
        ),
        ("", ""),
        (f"memory of {fit.device}", f"{size(fit.free_bytes)} free"),
        *_fit_lines(facts),
    ]


def _fit_lines(facts: _Facts) -> list[tuple[str, str]]:
    fit = facts.memory
    if fit.free_bytes < facts.weight_bytes:
        return [("does not fit", f"the weights alone take {size(facts.weight_bytes)}")]
    return [
        ("beside the weights", f"{size(fit.free_after_weights_bytes)}, or {fit.cache_tokens:,} tokens of cache"),
        ("longest context", f"{fit.longest_context:,} tokens"),
        ("at full length", f"{fit.full_length_sequences:,} sequences at once"),
    ]
