"""SamplingParams: vLLM's names and defaults, and every value that cannot be is refused by name."""

import math
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest

from bestiary.errors import RequestError
from bestiary.sampling.params import SamplingParams

#: vLLM's names, each with vLLM's default. Changing this list changes the public interface.
FIELDS: dict[str, Any] = {
    "n": 1,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "repetition_penalty": 1.0,
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 0,
    "min_p": 0.0,
    "seed": None,
    "stop": None,
    "stop_token_ids": None,
    "include_stop_str_in_output": False,
    "ignore_eos": False,
    "max_tokens": 16,
    "min_tokens": 0,
    "logprobs": None,
    "prompt_logprobs": None,
    "detokenize": True,
    "skip_special_tokens": True,
    "logit_bias": None,
}
#: What no field takes.
NOT_EVEN_NUMBERS: list[Any] = ["1", "", b"1", [], [1], {}, {"a": 1}, object(), 1j, True, False]
HUGE = [10**30, 10**400, 10**5000, -(10**30), -(10**400), -(10**5000)]
OUT_OF_RANGE: dict[str, list[Any]] = {
    "n": [0, -1, 16385, 1.0, 1.5, None, math.nan],
    "top_k": [-2, 2**31, 1.0, None, math.inf],
    "seed": [2**63, -(2**63) - 1, 0.5, math.nan],
    "max_tokens": [0, -1, 2**31, 16.0, math.inf],
    "min_tokens": [-1, 2**31, 0.0, None],
    "logprobs": [-1, 2**31, 1.0],
    "prompt_logprobs": [-1, 2**31, 1.0],
    "presence_penalty": [2.01, -2.01, math.nan, math.inf, -math.inf, 1e308, None],
    "frequency_penalty": [2.01, -2.01, math.nan, math.inf, -math.inf, 1e308, None],
    "repetition_penalty": [0, 0.0, -0.1, 101, math.nan, math.inf, -math.inf, 1e308, None],
    "temperature": [-0.01, 101, math.nan, math.inf, -math.inf, 1e308, None],
    "top_p": [0, 0.0, -0.1, 1.01, math.nan, math.inf, -math.inf, None],
    "min_p": [-0.01, 1.01, math.nan, math.inf, -math.inf, None],
}
SWITCHES = ("include_stop_str_in_output", "ignore_eos", "detokenize", "skip_special_tokens")
LISTS: dict[str, list[Any]] = {
    "stop": [
        "", [""], ["a", ""], 0, 5, 1.5, True, False, b"x", {"x": 1}, {"x"}, [None], [1], [["a"]], ["x"] * 65,
        "x" * 1025, ["\ud800"], "a\udfff", range(10**15),
    ],
    "stop_token_ids": [
        0, 5, 1.5, True, "12", "", b"12", {1: 2}, {1}, [-1], [2**31], [10**5000], [1.0], [True], ["1"], [None], [[1]],
        [0] * 1025, range(10**15), [math.nan],
    ],
    "logit_bias": [
        0, 5, True, "", "1", [1], [(1, 2.0)], {-1: 0.0}, {2**31: 0.0}, {1.0: 0.0}, {True: 1.0}, {"1": 1.0}, {None: 1.0},
        {1: None}, {1: "1"}, {1: True}, {1: math.nan}, {1: math.inf}, {1: -math.inf}, {1: 100.5}, {1: -100.5},
        {1: 10**400}, {1: 10**5000}, dict.fromkeys(range(1025), 0.0),
    ],
}  # fmt: skip


def bad_values() -> Iterator[Any]:
    for name, values in OUT_OF_RANGE.items():
        for value in (*values, *HUGE, *NOT_EVEN_NUMBERS):
            yield name, value
    for name in SWITCHES:
        for value in (0, 1, 1.0, None, "true", [], {}, 10**5000):
            yield name, value
    for name, values in LISTS.items():
        for value in values:
            yield name, value


@pytest.mark.parametrize(("name", "value"), list(bad_values()), ids=lambda value: type(value).__name__)
def test_a_value_that_cannot_be_is_refused_by_the_fields_name(name: str, value: Any) -> None:
    with pytest.raises(RequestError, match=name) as caught:
        SamplingParams(**{name: value})
    assert isinstance(caught.value, ValueError) and len(str(caught.value)) < 200


def test_names_and_defaults_are_vllms() -> None:
    made = SamplingParams()
    assert {field.name: field.default for field in msgspec.structs.fields(SamplingParams)} == FIELDS
    lists: dict[str, Any] = {"stop": [], "stop_token_ids": []}
    assert msgspec.structs.asdict(made) == {**FIELDS, **lists}


def test_a_name_that_does_not_exist_is_a_type_error() -> None:
    with pytest.raises(TypeError, match="best_of"):
        SamplingParams(best_of=2)  # type: ignore[call-arg]
    with pytest.raises(TypeError):
        SamplingParams(1)  # type: ignore[call-arg]


@pytest.mark.parametrize(
    "values",
    [
        {"n": 16384},
        {"temperature": 0, "top_p": 1, "min_p": 0, "repetition_penalty": 1, "presence_penalty": -2},
        {"temperature": 100.0, "top_p": 1e-9, "min_p": 1.0, "repetition_penalty": 100, "frequency_penalty": 2},
        {"top_k": -1},
        {"top_k": 2**31 - 1},
        {"seed": -(2**63)},
        {"seed": 2**63 - 1},
        {"max_tokens": None, "min_tokens": 2**31 - 1},
        {"max_tokens": 5, "min_tokens": 5},
        {"logprobs": 0, "prompt_logprobs": 0},
        {"stop": ["x" * 1024] * 64, "include_stop_str_in_output": True},
        {"stop_token_ids": [0, 2**31 - 1]},
        {"logit_bias": {0: -100, 2**31 - 1: 100.0}},
        {"detokenize": False, "stop_token_ids": [1], "ignore_eos": True, "skip_special_tokens": False},
    ],
    ids=str,
)
def test_what_lies_at_the_edge_of_a_range_is_taken(values: dict[str, Any]) -> None:
    made = SamplingParams(**values)
    assert {name: getattr(made, name) for name in values} == values


def test_one_stop_string_is_a_list_of_one() -> None:
    assert SamplingParams(stop="END").stop == ["END"]
    assert SamplingParams(stop=("a", "b"), stop_token_ids=(1, 2)).stop == ["a", "b"]
    assert SamplingParams(stop=[], stop_token_ids=[], logit_bias={}).stop == []


def test_what_was_given_can_change_afterwards() -> None:
    stop, ids, biases = ["a"], [1], {1: 2}
    made = SamplingParams(stop=stop, stop_token_ids=ids, logit_bias=biases)
    stop.append("b")
    ids.append(-1)
    biases[2] = 999
    assert (made.stop, made.stop_token_ids, made.logit_bias) == (["a"], [1], {1: 2.0})


@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        ({"min_tokens": 17}, r"min_tokens=17 is more than max_tokens=16"),
        ({"stop": ["a"], "detokenize": False}, r"stop is a text to find: leave detokenize=True"),
    ],
)
def test_values_that_contradict_each_other_are_refused(values: dict[str, Any], complaint: str) -> None:
    with pytest.raises(RequestError, match=complaint):
        SamplingParams(**values)


def test_a_clone_is_checked_anew_and_apart() -> None:
    made = SamplingParams(stop=["a"], temperature=0.5)
    clone = made.clone()
    assert clone == made and clone is not made and clone.stop is not made.stop
    made.temperature = math.nan
    assert clone.temperature == 0.5
    with pytest.raises(RequestError, match="temperature=nan"):
        made.clone()


@pytest.mark.parametrize("temperature", [0, 0.0, 9e-6])
def test_next_to_no_temperature_is_greedy(temperature: float) -> None:
    assert SamplingParams(temperature=temperature).is_greedy
    assert not SamplingParams(temperature=1e-5).is_greedy


@pytest.mark.parametrize("values", [{"logit_bias": {3: 1.0, 100: 1.0}}, {"stop_token_ids": [3, 100]}], ids=str)
def test_token_ids_beyond_the_vocabulary_are_refused_once_that_is_known(values: dict[str, Any]) -> None:
    made = SamplingParams(**values)
    made.check_vocabulary(101)
    with pytest.raises(RequestError, match=f"{next(iter(values))} has token id 100, and the model's ids end at 99"):
        made.check_vocabulary(100)
    SamplingParams().check_vocabulary(1)
