"""Flags that several verbs share, by the names that vLLM users know. A flag that is not given leaves its setting alone.

Knows settings by name only: what they mean, and which values they take, is said where they are checked.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from bestiary.cli.terminal import note
from bestiary.errors import SettingError
from bestiary.installed import preferences

if TYPE_CHECKING:
    from bestiary.llm import LLM
    from bestiary.sampling.params import SamplingParams

__all__ = ["AsJson", "EngineFlags", "MediaFlags", "Model", "ModelFlags", "SamplingFlags", "System", "flag"]


def flag(about: str) -> Parameter:
    """A flag with that help, without a negative form, whose default goes without saying."""
    return Parameter(help=about, negative="", show_default=False)


Model = Annotated[str, Parameter(help="Folder, owner/name, modelscope:owner/name, or demo.")]
AsJson = Annotated[bool, flag("As JSON, for programs.")]
System = Annotated[str | None, flag("What the model is told before the conversation.")]


@Parameter(name="*")
@dataclass(frozen=True)
class ModelFlags:
    """Which model is meant, and how its numbers are stored."""

    revision: Annotated[str | None, flag("Branch, tag or commit of a hub's repository.")] = None
    dtype: Annotated[str | None, flag("auto, bfloat16, float16 or float32.")] = None
    quantization: Annotated[
        str | None,
        Parameter(
            name=("--quantization", "-q"),
            help="int8 or int4: how the layers' matrices are stored; without it as --dtype says.",
            show_default=False,
        ),
    ] = None
    device: Annotated[str | None, flag("auto, cpu, cuda, cuda:1, ...")] = None
    plugin: Annotated[
        tuple[str, ...], flag("NAME=DIST: which distribution serves a name that several claim. May be repeated.")
    ] = ()

    def settings(self) -> dict[str, Any]:
        """The settings that were given. Raises SettingError for a `plugin` that is not NAME=DIST."""
        given = _changed(self)
        if self.plugin:
            given["plugin"] = preferences(",".join(self.plugin))
        return given


@Parameter(name="*")
@dataclass(frozen=True)
class EngineFlags(ModelFlags):
    """How the engine serves the model."""

    tokenizer: Annotated[str | None, flag("Take the tokenizer of another model, named as MODEL is.")] = None
    load_format: Annotated[str | None, flag("auto, or dummy: random weights, for measurements.")] = None
    max_model_len: Annotated[int | None, flag("Longest prompt plus answer, in tokens.")] = None
    max_num_seqs: Annotated[int | None, flag("Most answers in the making at once.")] = None
    max_num_batched_tokens: Annotated[int | None, flag("Most tokens of one step.")] = None
    kv_cache_memory_bytes: Annotated[int | None, flag("Size of the cache of keys and values.")] = None
    gpu_memory_utilization: Annotated[float | None, flag("Share of a GPU's memory to use.")] = None
    tensor_parallel_size: Annotated[
        int | None,
        Parameter(name=("--tensor-parallel-size", "-tp"), help="Ranks that share every matrix.", show_default=False),
    ] = None
    pipeline_parallel_size: Annotated[
        int | None,
        Parameter(
            name=("--pipeline-parallel-size", "-pp"),
            help="Stages, each with its share of the layers.",
            show_default=False,
        ),
    ] = None
    executor: Annotated[str | None, flag("What starts the ranks: auto, mp (processes) or ray.")] = None
    nnodes: Annotated[int | None, flag("Hosts; the same command runs on each, with another --node-rank.")] = None
    node_rank: Annotated[int | None, flag("This host's number. 0 answers; the others serve it.")] = None
    master_addr: Annotated[str | None, flag("Address of node 0.")] = None
    master_port: Annotated[int | None, flag("Port of node 0 where the others come.")] = None
    lora: Annotated[tuple[str, ...], flag("NAME=FOLDER: a LoRA adapter to answer with.")] = ()
    max_lora_rank: Annotated[int | None, flag("Largest rank of an adapter.")] = None
    limit_mm_per_prompt: Annotated[
        tuple[str, ...], flag("NAME=NUMBER, such as image=2: the most items of a prompt. May be repeated.")
    ] = ()
    allowed_media_domains: Annotated[
        tuple[str, ...], flag("A host from which media may be fetched. May be repeated.")
    ] = ()

    def settings(self) -> dict[str, Any]:
        """As for any model. Raises SettingError for a `limit_mm_per_prompt` that is not NAME=NUMBER, too."""
        given = super().settings()
        if self.limit_mm_per_prompt:
            given["limit_mm_per_prompt"] = _counts(self.limit_mm_per_prompt)
        if given.pop("lora", ()):
            given["lora_modules"] = self.adapters()
        return given

    def adapters(self) -> dict[str, str]:
        """Folders of adapters by name. Raises SettingError for one that is not NAME=FOLDER, or a name given twice."""
        found: dict[str, str] = {}
        for item in self.lora:
            name, _, folder = item.partition("=")
            if not name or not folder or name in found:
                raise SettingError(f"--lora {item}: write NAME=FOLDER, each name once")
            found[name] = folder
        return found

    def adapter(self) -> str | None:
        """The name of the one to answer with. Raises SettingError where several are given."""
        if len(self.lora) > 1:
            raise SettingError("--lora was given more than once: one adapter answers")
        return next(iter(self.adapters()), None)

    def load(self, model: str) -> LLM:
        """The model, ready to generate."""
        self.join_nodes(model)
        from bestiary.llm import LLM

        return LLM(model, **self.settings())

    def join_nodes(self, model: str) -> None:
        """On another host than the driver's: serve the driver, and never return. Raises EngineError if not taken."""
        from bestiary.config import EngineConfig

        config = EngineConfig.resolve(model=model, **self.settings())
        place = f"{config.master_addr}:{config.master_port}"
        if config.node_rank == 0:
            if config.nnodes > 1:
                note(f"node 0 of {config.nnodes}: the others come to {place}")
            return
        from bestiary.executor import node
        from bestiary.executor.nodes import introduction

        note(f"node {config.node_rank} of {config.nnodes}: serves the driver at {place}")
        node.serve(config.master_addr, config.master_port, introduction(config.node_rank, config.nnodes))
        note("the driver has ended, and so does this node")
        raise SystemExit(0)


@Parameter(name="*")
@dataclass(frozen=True)
class MediaFlags:
    """What the question brings beside text: files or addresses, in this order."""

    image: Annotated[tuple[str, ...], flag("A picture's file or address. May be repeated.")] = ()
    audio: Annotated[tuple[str, ...], flag("A recording's file or address. May be repeated.")] = ()
    video: Annotated[tuple[str, ...], flag("A video's file or address. May be repeated.")] = ()

    def named(self) -> list[tuple[str, str]]:
        """Modality and place of each."""
        return [(f.name, place) for f in fields(self) for place in getattr(self, f.name)]


@Parameter(name="*")
@dataclass(frozen=True)
class SamplingFlags:
    """How tokens are chosen; what is not given comes from the model's generation_config.json."""

    max_tokens: Annotated[int | None, flag("Most tokens of an answer. Without it: until the model ends.")] = None
    min_tokens: Annotated[int | None, flag("No end before this many tokens.")] = None
    temperature: Annotated[float | None, flag("0 takes the most likely token, always.")] = None
    top_p: Annotated[float | None, flag("Draw among the likeliest tokens that reach this probability.")] = None
    top_k: Annotated[int | None, flag("Draw among this many tokens; 0: among all.")] = None
    min_p: Annotated[float | None, flag("Drop tokens less probable than this share of the likeliest.")] = None
    repetition_penalty: Annotated[float | None, flag("Above 1 disfavours tokens that occurred.")] = None
    presence_penalty: Annotated[float | None, flag("Above 0 favours tokens that are new to the answer.")] = None
    frequency_penalty: Annotated[float | None, flag("Above 0 disfavours tokens by their count.")] = None
    seed: Annotated[int | None, flag("The same seed gives the same text.")] = None
    stop: Annotated[tuple[str, ...], flag("Text that ends the answer. May be repeated.")] = ()
    ignore_eos: Annotated[bool, flag("Go on after the model's end token.")] = False

    def over(self, defaults: SamplingParams) -> SamplingParams:
        """The model's own parameters, with what was given on the command line. Raises RequestError."""
        import msgspec

        return msgspec.structs.replace(defaults, **{"max_tokens": None, **_changed(self)})


def _counts(texts: tuple[str, ...]) -> dict[str, int]:
    """NAME=NUMBER each, or several of them with commas between."""
    found = {}
    for item in ",".join(texts).split(","):
        name, _, number = map(str.strip, item.partition("="))
        if not name or not number.isdecimal():
            raise SettingError(f"limit_mm_per_prompt: {item!r} is no limit: write NAME=NUMBER, such as image=2")
        found[name] = int(number)
    return found


def _changed(flags: ModelFlags | SamplingFlags) -> dict[str, Any]:
    """The flags that were given: those that are not at their default. A zero is a value like any other."""
    return {f.name: value for f in fields(flags) if (value := getattr(flags, f.name)) != f.default}
