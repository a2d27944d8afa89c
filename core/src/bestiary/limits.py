"""What can never be served: prompts, inputs and parameters beyond an engine's limits. Knows no request under way."""

from collections.abc import Sequence

from bestiary.config import EngineConfig
from bestiary.errors import EngineError, RequestError
from bestiary.executor import Executor
from bestiary.inputs import Inputs
from bestiary.sampling.params import SamplingParams

__all__ = ["check"]


def check(
    config: EngineConfig,
    executor: Executor,
    has_tokenizer: bool,
    prompt_ids: Sequence[int],
    params: SamplingParams | None,
    inputs: Inputs,
) -> None:
    """Raise RequestError for a request that can never be served; without `params` it is one for vectors."""
    if (params is None) != (executor.pools is not None):
        gives = "vectors: use embed, reward or classify" if params else "tokens: use generate or chat"
        raise RequestError(f"{config.model} gives {gives}")
    _check_prompt(executor, prompt_ids, 0 if params is None else 1)
    _check_inputs(config, executor, prompt_ids, inputs)
    if params is not None:
        _check_params(config, executor, has_tokenizer, params)


def _check_prompt(executor: Executor, prompt_ids: Sequence[int], room: int) -> None:
    vocabulary, longest = executor.vocabulary, executor.max_model_len
    if not prompt_ids:
        raise RequestError("the prompt is empty: give at least one token")
    if len(prompt_ids) + room > longest:
        raise RequestError(
            f"the prompt has {len(prompt_ids)} tokens, and max_model_len={longest} leaves room for "
            f"{longest - room}{' before the first token of an answer' * room}: shorten it, or raise max_model_len"
        )
    for place, token in enumerate(prompt_ids):
        if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < vocabulary:
            raise RequestError(f"prompt token {place} is {token!r}: ids are whole numbers from 0 to {vocabulary - 1}")


def _check_inputs(config: EngineConfig, executor: Executor, prompt_ids: Sequence[int], inputs: Inputs) -> None:
    chunk, most = config.max_num_batched_tokens, executor.most_crossed
    if inputs.prefix > chunk:
        raise RequestError(
            f"the first {inputs.prefix} tokens of the prompt must be computed together, and "
            f"max_num_batched_tokens={chunk}: raise it, or shorten the prompt"
        )
    if inputs.num_crossed > most:
        raise RequestError(
            f"the prompt brings {inputs.num_crossed} vectors for the model to look at, and it has room for {most}"
        )
    if inputs.spans and inputs.spans[-1].end > len(prompt_ids):
        raise EngineError("an item stands beyond the end of its prompt")


def _check_params(config: EngineConfig, executor: Executor, has_tokenizer: bool, params: SamplingParams) -> None:
    params.check_vocabulary(executor.vocabulary)
    for name in ("logprobs", "prompt_logprobs"):
        if (asked := getattr(params, name)) is not None and asked > config.max_logprobs:
            raise RequestError(f"{name}={asked}: at most max_logprobs={config.max_logprobs} are given")
    if params.stop and not has_tokenizer:
        raise RequestError("stop strings need a tokenizer: use stop_token_ids, or load the model with one")
