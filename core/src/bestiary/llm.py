"""The offline interface: prompts in, results in the order of the prompts. Names are those that vLLM users know."""

import warnings
from collections import Counter
from collections.abc import Callable, Generator, Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bestiary import hub, registry
from bestiary.architecture import Task
from bestiary.checkpoint import generation
from bestiary.config import EngineConfig
from bestiary.engine import Engine
from bestiary.errors import RequestError
from bestiary.media import Medium, collect, spelled_out
from bestiary.output import (
    ClassificationOutput,
    EmbeddingOutput,
    Pooled,
    PooledRequestOutput,
    PoolingOutput,
    RequestOutput,
)
from bestiary.prompts import ParsedPrompt, Prompt, parse_prompts, process
from bestiary.sampling.params import SamplingParams
from bestiary.text import ChatTemplate, Tokenizer

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["LLM"]

Message = Mapping[str, Any]
#: The name of an adapter for all prompts, or for each of them one or None.
Lora = str | Sequence[str | None] | None
#: Of generation_config.json; max_new_tokens is max_tokens here.
_SAMPLING_DEFAULTS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "max_new_tokens")


class LLM:
    """A model, ready to generate.

    `model` is a folder, a Hugging Face id, `modelscope:ID` or `demo`; the other arguments are the fields of
    EngineConfig. Raises a CheckpointError, PluginError or SettingError that says what to do.
    """

    def __init__(self, model: str, **settings: Any) -> None:
        self.config = EngineConfig.resolve(model=model, **settings)
        self._folder = hub.locate(model, self.config.revision)
        self.engine = Engine.load(self.config, self._folder)
        self._numbers = count()

    def get_tokenizer(self) -> Tokenizer:
        """The model's tokenizer. Raises RequestError where it was not loaded."""
        if self.engine.tokenizer is None:
            raise RequestError("there is no tokenizer (skip_tokenizer_init=True): give token ids instead of text")
        return self.engine.tokenizer

    def get_default_sampling_params(self) -> SamplingParams:
        """What `generate` uses where no parameters are given: those of generation_config.json over the defaults."""
        found = generation(self._folder) if self.config.generation_config == "auto" else {}
        return SamplingParams(**{name.replace("_new", ""): found[name] for name in _SAMPLING_DEFAULTS if name in found})

    def generate(
        self,
        prompts: Any,
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool | Callable[..., Any] = True,
        lora: Lora = None,
    ) -> list[RequestOutput]:
        """Complete prompts: texts, token ids, or dictionaries with `prompt` or `prompt_token_ids`; one or many.

        `lora` is the name of an adapter, or for each prompt one or None.

        Raises RequestError before anything runs if one of them cannot be served. A request that fails while it runs
        comes back with finish_reason "error" and a warning; the others are not touched by it.
        """
        self._require(Task.GENERATE)
        parsed = self._read(prompts)
        return self._run(parsed, self._params_for(len(parsed), sampling_params), use_tqdm, lora)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool | Callable[..., Any] = True,
        *,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        lora: Lora = None,
    ) -> list[RequestOutput]:
        """Answer one conversation, a list of `{"role": ..., "content": ...}`, or many of them."""
        conversations: Any = [messages] if messages and isinstance(messages[0], Mapping) else messages
        self._require(Task.GENERATE)
        template = self._chat_template(chat_template)
        variables = {"add_generation_prompt": add_generation_prompt, "tools": tools, **(chat_template_kwargs or {})}
        parsed = [self._render(template, conversation, variables) for conversation in conversations]
        return self._run(parsed, self._params_for(len(parsed), sampling_params), use_tqdm, lora)

    def embed(
        self, prompts: Any, *, use_tqdm: bool | Callable[..., Any] = True, lora: Lora = None
    ) -> list[PooledRequestOutput[EmbeddingOutput]]:
        """A vector for each prompt, from a model that declares the task. Prompts are those of `generate`."""
        return self._pool(Task.EMBED, prompts, use_tqdm, lora, lambda rows: EmbeddingOutput(rows[-1].tolist()))

    def classify(
        self, prompts: Any, *, use_tqdm: bool | Callable[..., Any] = True, lora: Lora = None
    ) -> list[PooledRequestOutput[ClassificationOutput]]:
        """The probability of each label, for each prompt."""
        return self._pool(
            Task.CLASSIFY, prompts, use_tqdm, lora, lambda rows: ClassificationOutput(rows[-1].softmax(-1).tolist())
        )

    def reward(
        self, prompts: Any, *, use_tqdm: bool | Callable[..., Any] = True, lora: Lora = None
    ) -> list[PooledRequestOutput[PoolingOutput]]:
        """What a reward model gives each token of each prompt; that of the last stands for the whole."""
        return self._pool(Task.REWARD, prompts, use_tqdm, lora, PoolingOutput)

    def _pool(
        self,
        task: Task,
        prompts: Any,
        use_tqdm: bool | Callable[..., Any],
        lora: Lora,
        make: "Callable[[Tensor], Pooled]",
    ) -> list[PooledRequestOutput[Pooled]]:
        self._require(task)
        parsed = self._read(prompts)
        return [_pooled(output, make) for output in self._run(parsed, [None] * len(parsed), use_tqdm, lora)]

    def _read(self, prompts: Any) -> list[ParsedPrompt]:
        return parse_prompts(prompts, self.engine.tokenizer, self.engine.processor, self.engine.admission)

    def _require(self, task: Task) -> None:
        if self.engine.architecture is not None:
            registry.require(self.engine.architecture, task=task)

    def stream(
        self, prompt: Any, sampling_params: SamplingParams | None = None, *, lora: str | None = None
    ) -> Generator[RequestOutput, None, None]:
        """Serve one prompt, or one conversation, and yield all there is of it whenever a token was added.

        Each answer's `text` only grows. Leaving the loop early, or closing the iterator, ends the request. Raises
        RequestError as `generate` and `chat` do, and for any other request until the stream has ended.
        """
        if isinstance(prompt, Sequence) and prompt and isinstance(prompt[0], Mapping) and "role" in prompt[0]:
            parsed = self._render(self._chat_template(None), prompt, {})
        elif len(prompts := self._read(prompt)) == 1:
            parsed = prompts[0]
        else:
            raise RequestError(f"a stream serves one prompt, not {len(prompts)}: open one after the other")
        params = self._params_for(1, sampling_params)[0]
        self.engine.check(parsed.token_ids, params, parsed.inputs)
        if lora is not None:
            self.engine.adapters.find(lora)
        return self._stream(parsed, params, lora)

    def _stream(
        self, prompt: ParsedPrompt, params: SamplingParams, lora: str | None
    ) -> Generator[RequestOutput, None, None]:
        self._check_idle()
        request_id = str(next(self._numbers))
        try:
            self.engine.add_request(
                request_id,
                prompt.token_ids,
                params,
                prompt=prompt.text,
                cache_salt=prompt.cache_salt,
                inputs=prompt.inputs,
                lora=lora,
            )
            while self.engine.has_unfinished_requests():
                yield from self.engine.step()
        finally:
            self.engine.abort([request_id])

    def has_chat_template(self) -> bool:
        """The model knows conversations; base models often do not."""
        return ChatTemplate.load(self._folder) is not None

    def _check_idle(self) -> None:
        """What one caller's steps bring for another caller's request would be lost."""
        if self.engine.has_unfinished_requests():
            raise RequestError("an answer is being streamed: read it to its end, or close it, before the next request")

    def _render(
        self, template: ChatTemplate, conversation: Sequence[Message], variables: Mapping[str, Any]
    ) -> ParsedPrompt:
        """The prompt of a conversation. The template writes the special tokens itself, and what stands for media."""
        plain, media = collect(conversation)
        admission = self.engine.admission
        fetched = admission.fetched(media)  # first: the template of a model of text alone fails less clearly
        text = self._rendered(template, plain, media, variables)
        ids = self.get_tokenizer().encode(text, add_special_tokens=False)
        prompt = Prompt(text, ids, fetched)
        return process(prompt, self.engine.tokenizer, self.engine.processor, admission)

    def _rendered(
        self,
        template: ChatTemplate,
        plain: Sequence[Message],
        media: Sequence[Medium],
        variables: Mapping[str, Any],
    ) -> str:
        """What the template makes of a conversation; an item that it has no place for is written into the text."""
        known: Mapping[str, str] = getattr(self.engine.processor, "placeholders", {})
        wanted = Counter(known[medium.kind] for medium in media if medium.kind in known)
        try:
            text = template.render(plain, **variables)
        except RequestError:  # some refuse parts, others leave them out
            if not wanted:
                raise
            text = ""
        if all(text.count(placeholder) >= count for placeholder, count in wanted.items()):
            return text
        return template.render(spelled_out(plain, known), **variables)

    def _chat_template(self, given: str | None) -> ChatTemplate:
        if given is not None:
            return ChatTemplate(given, self.get_tokenizer().special_tokens)
        if (own := ChatTemplate.load(self._folder)) is not None:
            return own
        raise RequestError(
            f"{self.config.model} has no chat template, as base models often have not: "
            "use `generate`, or give one with chat_template="
        )

    def _params_for(self, n: int, given: SamplingParams | Sequence[SamplingParams] | None) -> list[SamplingParams]:
        if given is None or isinstance(given, SamplingParams):
            return [given or self.get_default_sampling_params()] * n
        if len(given) != n:
            raise RequestError(f"{len(given)} sampling_params for {n} prompts: give one for all, or one for each")
        return list(given)

    def _run(
        self,
        prompts: Sequence[ParsedPrompt],
        params: Sequence[SamplingParams | None],
        use_tqdm: bool | Callable[..., Any],
        lora: Lora,
    ) -> list[RequestOutput]:
        self._check_idle()
        names = _names(lora, len(prompts))
        for known in filter(None, names):
            self.engine.adapters.find(known)
        for i, (prompt, wanted) in enumerate(zip(prompts, params, strict=True)):
            try:
                self.engine.check(prompt.token_ids, wanted, prompt.inputs)
            except RequestError as error:
                raise RequestError(f"prompt {i}: {error}") from error
        ids = [str(next(self._numbers)) for _ in prompts]
        try:
            for request_id, prompt, wanted, name in zip(ids, prompts, params, names, strict=True):
                self.engine.add_request(
                    request_id,
                    prompt.token_ids,
                    wanted,
                    prompt=prompt.text,
                    cache_salt=prompt.cache_salt,
                    final_only=True,
                    inputs=prompt.inputs,
                    lora=name,
                )
            done = self._drain(len(ids), use_tqdm)
        finally:
            self.engine.abort(ids)
        return [done[request_id] for request_id in ids]

    def _drain(self, total: int, use_tqdm: bool | Callable[..., Any]) -> dict[str, RequestOutput]:
        """Step until every request is done."""
        done: dict[str, RequestOutput] = {}
        with _progress(total, use_tqdm) as bar:
            while self.engine.has_unfinished_requests():
                for output in self.engine.step():
                    done[output.request_id] = output
                    bar.update(1)
                    _warn_of_errors(output)
        return done

    def load_lora(self, name: str, path: str | Path) -> None:
        """Let requests use a LoRA adapter, a folder as PEFT saves it, by this name, also while requests run.

        Where the name is in use already, those that run with it go on with the old content. Raises AdapterError,
        RequestError or CapabilityMissing, and then everything is as it was.
        """
        self.engine.adapters.load(name, Path(path))

    def unload_lora(self, name: str) -> None:
        """Take an adapter's name away. Raises RequestError where there is none."""
        self.engine.adapters.unload(name)

    def list_loras(self) -> list[str]:
        """The names of the adapters that are loaded."""
        return [entry.name for entry in self.engine.adapters]

    def restart(self) -> None:
        """Load the model anew, after a process that ran a part of it died."""
        self.engine.restart()

    def close(self) -> None:
        """Let the model go."""
        self.engine.close()


def _names(lora: Lora, n: int) -> list[str | None]:
    names = [lora] * n if lora is None or isinstance(lora, str) else list(lora)
    if len(names) != n:
        raise RequestError(f"{len(names)} names of adapters for {n} prompts: give one for all, or one for each")
    return names


def _pooled(output: RequestOutput, make: "Callable[[Tensor], Pooled]") -> PooledRequestOutput[Pooled]:
    import torch

    (answer,) = output.outputs
    if answer.finish_reason != "stop":
        raise RequestError(f"request {output.request_id} failed: {answer.stop_reason}")
    return PooledRequestOutput(
        output.request_id,
        output.prompt,
        output.prompt_token_ids,
        make(torch.cat(output.vectors)),
        num_cached_tokens=output.num_cached_tokens,
    )


def _progress(total: int, use_tqdm: bool | Callable[..., Any]) -> Any:
    from tqdm import tqdm

    make = use_tqdm if callable(use_tqdm) else tqdm
    return make(total=total, desc="Processed prompts", dynamic_ncols=True, disable=use_tqdm is False)


def _warn_of_errors(output: RequestOutput) -> None:
    for answer in output.outputs:
        if answer.finish_reason == "error":
            warnings.warn(f"request {output.request_id} failed: {answer.stop_reason}", RuntimeWarning, stacklevel=5)
