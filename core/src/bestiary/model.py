"""From a description to a model that runs: describe, choose formats, keep this stage, cut, allocate, fill, pack.

Knows no architecture.

Every pass is one function over the tree, and `build` is their fixed order. None of them is called by a plugin.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from math import prod
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor

from bestiary import registry
from bestiary.architecture import Architecture
from bestiary.blocks import Decoder, Format, Head, Kept, Kind, Leaf, Linear, Mixer, Rope
from bestiary.blocks.leaf import Block
from bestiary.checkpoint import Checkpoint, ConfigFile, Names, fill
from bestiary.errors import ConfigUnsupported, PluginBroken, SettingError
from bestiary.parallel import Mesh
from bestiary_kernels import PackedLinear
from bestiary_kernels.memory import free_memory

__all__ = [
    "Described",
    "ModelModule",
    "Other",
    "build",
    "choose_device",
    "choose_dtype",
    "describe",
    "is_elsewhere",
    "keeps",
    "kinds",
    "language_model",
    "leaves",
    "model_module",
    "num_parameters",
    "part",
    "processor",
    "quantise",
]


@dataclass(frozen=True)
class Other:
    """Another checkpoint that a model is made of: its tensors behind the prefix `within` count as behind `prefix`."""

    #: A folder or a hub's name, as a user would give it.
    model: str
    prefix: str
    within: str = ""


class ModelModule(Protocol):
    """What a plugin's model module holds; beside it, perhaps, `others(config)`, which gives a sequence of `Other`."""

    #: Reads config.json: a frozen dataclass with `read(file: ConfigFile) -> Self`.
    Config: Any
    #: The table of names, or what makes it of a configuration, where the model has another one inside.
    NAMES: Names | Callable[[Any], Names]

    def describe(self, config: Any) -> Decoder:
        """The tree of blocks for a configuration."""


class Described(NamedTuple):
    """A model before any tensor: its tree, its names in checkpoints, and what it needs beside its own checkpoint."""

    tree: Decoder
    names: Names
    others: tuple[Other, ...] = ()


def model_module(architecture: Architecture, file: ConfigFile) -> ModelModule:
    """Import the module that runs this checkpoint. Raises PluginBroken with the cause."""
    name = architecture.module_for(file.values)
    return cast(ModelModule, _module(architecture, name, "model", ("Config", "NAMES", "describe")))


def processor(architecture: Architecture) -> Callable[..., Any]:
    """The class that a plugin's processor module holds: called with config.json, folder and tokenizer it gives one."""
    name = str(architecture.processor)
    found: Callable[..., Any] = _module(architecture, name, "processor", ("Processor",)).Processor
    return found


def _module(architecture: Architecture, name: str, what: str, parts: Iterable[str]) -> Any:
    try:
        module = import_module(name)
    except Exception as e:
        raise PluginBroken(
            f"{architecture.name}: its {what} module {name!r} fails to import ({type(e).__name__}: {e})"
        ) from e
    if lacking := [part for part in parts if not hasattr(module, part)]:
        raise PluginBroken(f"{architecture.name}: its {what} module {name!r} lacks {', '.join(lacking)}")
    return module


def describe(architecture: Architecture, file: ConfigFile) -> Described:
    """The model as its plugin describes it, without a tensor."""
    module = model_module(architecture, file)
    config = module.Config.read(file)
    names = module.NAMES if isinstance(module.NAMES, Names) else module.NAMES(config)
    others: Callable[[Any], Iterable[Other]] | None = getattr(module, "others", None)
    return Described(module.describe(config), names, tuple(others(config)) if others else ())


def language_model(section: ConfigFile, architectures: Mapping[str, str]) -> Described:
    """The model that a part of config.json describes, by the plugin for it that is installed: for models around others.

    `architectures` says which architecture each `model_type` stands for that the part may have. Raises
    ConfigUnsupported for others, and PluginNotInstalled where nothing installed serves it.
    """
    kind = section.expect("model_type", *architectures)
    return describe(registry.find(architectures[kind]).load(), section)


def build(
    model: Decoder,
    names: Names,
    checkpoint: Checkpoint | None,
    *,
    dtype: torch.dtype,
    device: torch.device,
    length: int,
    mesh: Mesh | None = None,
    quantization: str | None = None,
) -> Decoder:
    """Make a described tree run on this rank, for contexts of up to `length` tokens; random without a checkpoint.

    Raises SettingError where the device has no room for the weights.
    """
    groups = kinds(keeps(model))
    quantise(model, quantization)
    part(model, mesh or Mesh())
    if (needed := sum(leaf.nbytes(dtype) for _, leaf in leaves(model))) > (free := free_memory(device)):
        raise SettingError(
            f"the weights take {needed / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB are free on device {device}: free "
            "memory, set quantization, or share the model out with tensor_parallel_size or pipeline_parallel_size"
        )
    _allocate(model, dtype, device)
    _number_caches(model, groups)
    _lay_out_positions(model, length, device)
    if checkpoint is None:
        _draw(model, device)
    else:
        fill(dict(leaves(model)), names, checkpoint, elsewhere=lambda path: is_elsewhere(path, model))
    _pack(model)
    return model


def part(model: Decoder, mesh: Mesh) -> None:
    """Leave of a described tree what this rank has: the layers of its stage, and its shard of every matrix."""
    _stage(model, mesh)
    _cut(model, mesh)


def quantise(model: Decoder, quantization: str | None) -> None:
    """Have the matrices of the layers stored in a format. Embedding, head, norms and experts keep the model's dtype.

    So does whatever decides where a token goes. A matrix takes its format when it is filled, one after the other.
    """
    if quantization is None:
        return
    for block in model.layers.modules():
        if isinstance(block, Linear) and not block.exact:
            block.format = cast(Format, quantization)


def choose_dtype(setting: str, file: ConfigFile) -> torch.dtype:
    """The dtype of weights and cache: the setting, else what config.json says, else float32."""
    name = {"half": "float16", "float": "float32", "auto": file.dtype or "float32"}.get(setting, setting)
    dtype = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}.get(name)
    if dtype is None:
        raise ConfigUnsupported(
            f"{file.path}: dtype {name!r} cannot be served as it is; choose one with dtype=bfloat16 or float32"
        )
    return dtype


def choose_device(setting: str) -> torch.device:
    """The device for a setting: auto takes a GPU where there is one. Raises SettingError for one that is not there."""
    if setting == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if re.fullmatch(r"(cpu|cuda)(:\d\d?)?", setting) is None:
        raise SettingError(f"device={setting!r}: choose auto, cpu, cuda or cuda:N")
    device = torch.device(setting)
    if device.type == "cuda" and (device.index or 0) >= (count := torch.cuda.device_count()):
        raise SettingError(
            f"device={setting!r}: this machine, or this build of torch, has {count or 'no'} CUDA devices, counted "
            "from 0: use one that is there, or device='cpu'"
        )
    return device


def num_parameters(model: Decoder) -> int:
    """Numbers that the model stores, a tied head's once."""
    return sum(prod(shape) for _, leaf in leaves(model) for shape in leaf.shapes().values())


def keeps(model: Decoder) -> list[Kept]:
    """What each caching layer of this rank keeps, in the order of the batch's caches."""
    return [mixer.keeps for mixer in _mixers(model)]


def kinds(kept: Iterable[Kept]) -> list[Kind]:
    """The groups of layers whose tables are alike; a mixer's group is its place."""
    return list(dict.fromkeys(layer.kind for layer in kept))


def _mixers(model: Decoder) -> Iterator[Mixer]:
    return (block for block in model.modules() if isinstance(block, Mixer))


def leaves(model: Decoder) -> Iterator[tuple[str, Leaf]]:
    """Leaves that own tensors; a tied head has none, though the checkpoint may carry one for it."""
    for path, module in model.named_modules():
        if isinstance(module, Leaf):
            yield path, module


def _stage(model: Decoder, mesh: Mesh) -> None:
    """Keep the layers of this pipeline stage; the embedding goes with the first, norm and head with the last."""
    model.is_first, model.is_last = mesh.is_first, mesh.is_last
    model.layers.keep(mesh.layers_of(model.layers.count))
    if not mesh.is_last:
        del model.norm, model.head
    if not (mesh.is_first or (mesh.is_last and model.head.tied)):
        del model.embed
    if not mesh.is_first:
        del model.positions, model.embed_norm, model.encoder


def is_elsewhere(path: str, model: Decoder) -> bool:
    """Another stage owns this place of the tree."""
    top, _, rest = path.partition(".")
    if top == "layers":
        number = rest.partition(".")[0]
        return number.isdigit() and int(number) < model.layers.count and number not in model.layers
    return top in ("embed", "positions", "embed_norm", "encoder", "norm", "head") and not hasattr(model, top)


def _allocate(model: Decoder, dtype: torch.dtype, device: torch.device) -> None:
    for _, leaf in leaves(model):
        leaf.allocate(dtype, device)


def _draw(model: Decoder, device: torch.device) -> None:
    """Weights for a measurement: matrices that keep the size of what goes through them, gains of 1, no biases."""
    generator = torch.Generator(device).manual_seed(0)  # the shards of a stage draw alike
    for _, leaf in leaves(model):
        for part, suffix, *index in leaf.expected():
            shape = leaf.parts[part], *leaf.shapes()[suffix][2 if index else 1 :]
            if len(shape) > 1:
                drawn = torch.randn(shape, generator=generator, device=device) * shape[-1] ** -0.5
            else:
                drawn = torch.full(shape, 0.0 if "bias" in suffix else 1.0, device=device)
            leaf.fill(part, suffix, drawn, index[0] if index else None)


def _cut(model: Decoder, mesh: Mesh) -> None:
    """Leave this shard what is its own of every matrix."""
    if mesh.shards > 1:
        for block in model.modules():
            if isinstance(block, Block):
                block.cut(mesh)


def _number_caches(model: Decoder, groups: Sequence[Kind]) -> None:
    for slot, mixer in enumerate(_mixers(model)):
        mixer.slot, mixer.group = slot, groups.index(mixer.keeps.kind)


def _lay_out_positions(model: Decoder, length: int, device: torch.device) -> None:
    """One table of angles for all layers that turn alike, and the slopes of those that do not turn."""
    tables: dict[Rope, Tensor] = {}
    for mixer in _mixers(model):
        if mixer.alibi is not None:
            slopes = mixer.alibi.slopes().to(device)
            mixer.slopes = slopes if mixer.own_heads is None else slopes[list(mixer.own_heads)]
        if mixer.rope is not None:
            if mixer.rope not in tables:
                tables[mixer.rope] = mixer.rope.table(length).to(device)
            mixer.angles = tables[mixer.rope]


def _pack(model: Decoder) -> None:
    """Lay every matrix out for the device, one after the other, so that two copies exist of one at a time."""
    tied = model.head if model.is_last and isinstance(model.head, Head) and model.head.tied else None
    if tied is not None:
        tied.weight = model.embed.weight
    for _, leaf in leaves(model):
        leaf.pack()
    if tied is not None and isinstance(tied.packed, PackedLinear):
        model.embed.share(tied.packed)
    for block in model.modules():
        if isinstance(block, Block):
            block.settle()
