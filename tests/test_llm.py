"""LLM as its users meet it: what they may give, what they get, and what happens when it is wrong."""

import json
import shutil
import weakref
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from bestiary import LLM, SamplingParams
from bestiary.errors import (
    AdapterError,
    BestiaryError,
    CheckpointError,
    CheckpointMalformed,
    CheckpointNotFound,
    ConfigUnsupported,
    RequestError,
    SettingError,
    TensorMismatch,
    UnknownArchitecture,
)
from bestiary.executor.protocol import Immediate
from bestiary.step import StepResult, StepRow
from bestiary.testing.tiny import tiny_checkpoint

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("tiny"), "LlamaForCausalLM")


@pytest.fixture(scope="module")
def served(folder: Path) -> LLM:
    return LLM(str(folder), max_model_len=128, max_num_seqs=8)


@pytest.fixture
def llm(served: LLM) -> Iterator[LLM]:
    """The model, and the check that a test left it as it was: serving, and holding nothing."""
    yield served
    served.engine.check_integrity()
    assert served.engine.scheduler.cache.is_empty
    assert len(texts(served, ["still here?"])) == 1


@pytest.mark.parametrize("quantization", [None, "int8"])
def test_random_weights_need_nothing_but_a_configuration(tmp_path: Path, quantization: str | None) -> None:
    config = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_hidden_layers": 2}
    config |= {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 64, "rms_norm_eps": 1e-5}
    (tmp_path / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 64}))
    llm = LLM(str(tmp_path), load_format="dummy", quantization=quantization, skip_tokenizer_init=True)
    params = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True, detokenize=False)
    (output,) = llm.generate([[1, 2, 3]], params, use_tqdm=False)
    assert len(output.outputs[0].token_ids) == 5 and output.outputs[0].finish_reason == "length"
    llm.close()
    with pytest.raises(CheckpointError):
        LLM(str(tmp_path), skip_tokenizer_init=True)


def texts(llm: LLM, prompts: Any, params: SamplingParams = GREEDY) -> list[str]:
    return [output.outputs[0].text for output in llm.generate(prompts, params, use_tqdm=False)]


# --- what may be given --------------------------------------------------------------------------------------------


def test_text_ids_and_dictionaries_are_the_same_prompt(llm: LLM) -> None:
    ids = llm.get_tokenizer().encode("The griffin")
    expected = texts(llm, "The griffin")
    assert texts(llm, ["The griffin"]) == texts(llm, ids) == texts(llm, [ids]) == expected
    assert texts(llm, {"prompt": "The griffin"}) == texts(llm, [{"prompt_token_ids": ids}]) == expected


def test_results_come_in_the_order_of_the_prompts(llm: LLM) -> None:
    prompts = [f"{n}, " * (n % 5 + 1) for n in range(30)]
    outputs = llm.generate(
        prompts, [SamplingParams(max_tokens=1 + n % 7, ignore_eos=True) for n in range(30)], use_tqdm=False
    )
    assert [output.prompt for output in outputs] == prompts
    assert [len(output.outputs[0].token_ids) for output in outputs] == [1 + n % 7 for n in range(30)]


def test_no_prompts_give_no_results(llm: LLM) -> None:
    assert llm.generate([], GREEDY, use_tqdm=False) == []


def test_chat_renders_the_template_and_encodes_it_once(llm: LLM) -> None:
    output = llm.chat([{"role": "user", "content": "Who?"}], GREEDY, use_tqdm=False)[0]
    assert output.prompt == "<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\n"
    assert output.prompt_token_ids == llm.get_tokenizer().encode(output.prompt, add_special_tokens=False)


def test_many_conversations_are_answered_in_their_order(llm: LLM) -> None:
    conversations = [[{"role": "user", "content": f"Number {n}?"}] for n in range(5)]
    outputs = llm.chat(conversations, GREEDY, use_tqdm=False)
    assert [f"Number {n}?" in (output.prompt or "") for n, output in enumerate(outputs)] == [True] * 5


def test_a_progress_bar_is_shown_unless_refused(llm: LLM, capfd: pytest.CaptureFixture[str]) -> None:
    llm.generate(["a", "b"], GREEDY)
    assert "2/2" in capfd.readouterr().err
    llm.generate(["a", "b"], GREEDY, use_tqdm=False)
    assert capfd.readouterr().err == ""


def test_a_step_whose_interruption_came_before_it_ran_is_nobody_elses(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C between the sending of a step and its run."""
    expected = texts(llm, ["a", "b"])
    executor = llm.engine.executor
    submit = executor.submit

    def interrupted(rows: Any) -> None:
        submit(rows)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(executor, "submit", interrupted)
        with pytest.raises(KeyboardInterrupt):
            llm.generate("The griffin", GREEDY, use_tqdm=False)
    assert texts(llm, ["a", "b"]) == expected


def test_an_executor_keeps_nothing_of_a_step_that_ran() -> None:
    """The rows of a request that has ended may hold pictures."""

    class Rows(list[StepRow]):
        pass

    class Idle(Immediate):
        def execute(self, rows: Sequence[StepRow]) -> list[StepResult]:
            return []

    rows, executor = Rows(), Idle()
    seen = weakref.ref(rows)
    executor.submit(rows)
    del rows
    executor.collect()
    assert seen() is None


def test_without_a_tokenizer_token_ids_are_served(folder: Path, tmp_path: Path) -> None:
    bare = shutil.copytree(folder, tmp_path / "bare", ignore=shutil.ignore_patterns("tokenizer*", "*.jinja"))
    llm = LLM(str(bare), skip_tokenizer_init=True, max_model_len=64)
    output = llm.generate({"prompt_token_ids": [5, 6, 7]}, GREEDY, use_tqdm=False)[0]
    assert len(output.outputs[0].token_ids) == 12
    assert output.outputs[0].text == ""
    with pytest.raises(RequestError, match="skip_tokenizer_init"):
        llm.generate("text", GREEDY)
    with pytest.raises(CheckpointNotFound, match="skip_tokenizer_init"):
        LLM(str(bare), max_model_len=64)


def test_default_sampling_follows_generation_config(folder: Path, tmp_path: Path) -> None:
    own = shutil.copytree(folder, tmp_path / "own")
    said = {"temperature": 0.25, "top_k": 7, "eos_token_id": [1, 2], "max_new_tokens": 20}
    (own / "generation_config.json").write_text(json.dumps(said))
    defaults = LLM(str(own), max_model_len=64).get_default_sampling_params()
    assert (defaults.temperature, defaults.top_k, defaults.top_p, defaults.max_tokens) == (0.25, 7, 1.0, 20)
    assert LLM(str(own), max_model_len=64, generation_config="none").get_default_sampling_params() == SamplingParams()


# --- what comes back ----------------------------------------------------------------------------------------------


def test_a_seed_gives_the_same_text_in_any_company(llm: LLM) -> None:
    params = SamplingParams(temperature=1.5, seed=11, max_tokens=12, ignore_eos=True)
    alone = texts(llm, "The griffin", params)[0]
    others = [SamplingParams(temperature=1.0 + n / 10, max_tokens=3 + n, ignore_eos=True) for n in range(7)]
    mixed = llm.generate(["The griffin"] * 8, [*others[:4], params, *others[4:]], use_tqdm=False)
    assert mixed[4].outputs[0].text == alone
    assert (
        texts(llm, "The griffin", SamplingParams(temperature=1.5, seed=12, max_tokens=12, ignore_eos=True))[0] != alone
    )


def test_n_answers_differ_and_repeat_with_the_seed(llm: LLM) -> None:
    params = SamplingParams(n=4, temperature=1.5, seed=3, max_tokens=10, ignore_eos=True)
    first, second = (llm.generate("A basilisk", params, use_tqdm=False)[0] for _ in range(2))
    assert [answer.index for answer in first.outputs] == [0, 1, 2, 3]
    assert len({answer.text for answer in first.outputs}) == 4
    assert [answer.text for answer in first.outputs] == [answer.text for answer in second.outputs]


def test_logprobs_are_those_of_the_whole_distribution(llm: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=5, logprobs=3, prompt_logprobs=2, ignore_eos=True)
    output = llm.generate("The griffin sleeps", params, use_tqdm=False)[0]
    answer = output.outputs[0]
    assert answer.logprobs is not None
    assert output.prompt_logprobs is not None
    assert answer.cumulative_logprob == pytest.approx(
        sum(step[token].logprob for step, token in zip(answer.logprobs, answer.token_ids, strict=True))
    )
    for step, token in zip(answer.logprobs, answer.token_ids, strict=True):
        assert len(step) == 3
        assert step[token].rank == 1
    assert output.prompt_logprobs[0] is None
    assert len(output.prompt_logprobs) == len(output.prompt_token_ids)
    # The prompt's numbers, read again as an answer's: the same model said both.
    shorter = llm.generate({"prompt_token_ids": output.prompt_token_ids[:-1]}, params, use_tqdm=False)[0].outputs[0]
    assert shorter.logprobs is not None
    last = output.prompt_logprobs[-1]
    assert last is not None
    for token, entry in shorter.logprobs[0].items():
        if token in last:
            assert last[token].logprob == pytest.approx(entry.logprob, abs=1e-4)


def test_prompt_logprobs_do_not_depend_on_chunks_or_cache(folder: Path, llm: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=1)
    prompt = "Who wakes the basilisk must not look at it: its glance kills"
    whole = llm.generate(prompt, params, use_tqdm=False)[0]
    chunked = LLM(str(folder), max_model_len=128, max_num_batched_tokens=5)
    for _ in range(2):  # the second time its blocks are in the cache
        again = chunked.generate(prompt, params, use_tqdm=False)[0]
        assert again.prompt_logprobs is not None
        assert whole.prompt_logprobs is not None
        for ours, theirs in zip(again.prompt_logprobs[1:], whole.prompt_logprobs[1:], strict=True):
            assert ours is not None
            assert theirs is not None
            assert {t: pytest.approx(e.logprob, abs=1e-4) for t, e in ours.items()} == {
                t: e.logprob for t, e in theirs.items()
            }


def test_stop_strings_end_the_text_before_them(llm: LLM) -> None:
    full = texts(llm, "The griffin")[0]
    stop = full[4:6]
    output = llm.generate(
        "The griffin", SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, stop=stop), use_tqdm=False
    )[0]
    answer = output.outputs[0]
    assert answer.text == full[: full.index(stop)]
    assert (answer.finish_reason, answer.stop_reason) == ("stop", stop)


def test_stop_token_ids_end_the_answer_and_are_kept_among_its_ids(llm: LLM) -> None:
    ids = list(llm.generate("The griffin", GREEDY, use_tqdm=False)[0].outputs[0].token_ids)
    stop = ids[3]
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, stop_token_ids=[stop])
    answer = llm.generate("The griffin", params, use_tqdm=False)[0].outputs[0]
    assert list(answer.token_ids) == ids[: ids.index(stop) + 1]
    assert (answer.finish_reason, answer.stop_reason) == ("stop", stop)


def test_the_end_token_ends_an_answer_and_can_be_forbidden_or_ignored(folder: Path, tmp_path: Path) -> None:
    probe = LLM(str(folder), max_model_len=128)
    ids = list(probe.generate("The griffin", GREEDY, use_tqdm=False)[0].outputs[0].token_ids)
    own = shutil.copytree(folder, tmp_path / "own")
    (own / "generation_config.json").write_text(json.dumps({"eos_token_id": ids[2]}))
    llm = LLM(str(own), max_model_len=128)

    def answer(**params: Any) -> list[int]:
        asked = SamplingParams(temperature=0, max_tokens=12, **params)
        return list(llm.generate("The griffin", asked, use_tqdm=False)[0].outputs[0].token_ids)

    assert answer() == ids[: ids.index(ids[2]) + 1]
    assert answer(ignore_eos=True) == ids
    assert ids[2] not in answer(min_tokens=12)[:12]
    assert len(answer(min_tokens=12)) == 12


def test_what_the_tokenizer_calls_the_end_ends_an_answer_too(folder: Path, tmp_path: Path) -> None:
    """A model that was taught a new end of turn often keeps the configurations of the one that it was made of."""
    prompt, probe = {"prompt_token_ids": [5, 6, 7]}, LLM(str(folder), max_model_len=128)
    ids = list(probe.generate(prompt, GREEDY, use_tqdm=False)[0].outputs[0].token_ids)
    own = shutil.copytree(folder, tmp_path / "own")
    (own / "tokenizer_config.json").write_text(json.dumps({"eos_token": probe.get_tokenizer().token(ids[2])}))
    (own / "generation_config.json").write_text(json.dumps({"eos_token_id": 0}))
    params = SamplingParams(temperature=0, max_tokens=12)
    answer = LLM(str(own), max_model_len=128).generate(prompt, params, use_tqdm=False)[0].outputs[0]
    assert list(answer.token_ids) == ids[: ids.index(ids[2]) + 1]
    assert answer.finish_reason == "stop"


def test_an_answer_ends_where_the_context_does(folder: Path) -> None:
    llm = LLM(str(folder), max_model_len=20)
    output = llm.generate(
        {"prompt_token_ids": [5] * 15}, SamplingParams(max_tokens=None, ignore_eos=True), use_tqdm=False
    )[0]
    assert len(output.outputs[0].token_ids) == 5
    assert output.outputs[0].finish_reason == "length"


def test_a_tenants_salt_keeps_its_blocks_to_itself(llm: LLM) -> None:
    ids = list(range(5, 75))

    def cached(salt: str) -> int:
        return llm.generate({"prompt_token_ids": ids, "cache_salt": salt}, GREEDY, use_tqdm=False)[0].num_cached_tokens

    assert [cached("a"), cached("a"), cached("b"), cached("a"), cached("")] == [0, 64, 0, 64, 0]


def test_a_stream_grows_and_ends_as_the_whole_answer(llm: LLM) -> None:
    seen = [output.outputs[0].text for output in llm.stream("The griffin", GREEDY)]
    assert seen[-1] == texts(llm, "The griffin")[0]
    assert all(later.startswith(earlier) for earlier, later in pairwise(seen))
    assert len(seen) == 12


def test_leaving_a_stream_ends_its_request(llm: LLM) -> None:
    stream = llm.stream("The griffin", GREEDY)
    next(stream)
    stream.close()
    assert not llm.engine.has_unfinished_requests()


# --- what is wrong: requests --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "says"),
    [
        ("", "empty"),
        ([[]], "empty"),
        ({"prompt_token_ids": []}, "empty"),
        ([5, -1], "token 1 is -1"),
        ([5, 10**12], "token 1 is 1000000000000"),
        ([5, 2**70], "token 1"),
        ({"prompt_token_ids": [5, True]}, "token 1 is True"),
        ({"prompt_token_ids": [5, "6"]}, "token 1 is '6'"),
        ({"prompt_token_ids": [5, 1.0]}, r"token 1 is 1\.0"),
        ({"prompt_token_ids": "abc"}, "list of token ids"),
        ({"prompt": 5}, "neither a text"),
        ({}, "neither a text"),
        ({"promt": "x"}, "'promt'"),
        ({"prompt": "x", "cache_salt": "s" * 1000}, "cache_salt"),
        ([5] * 128, "128 tokens.*max_model_len=128"),
        ([5] * 1_000_000, "1000000 tokens"),
        ("word " * 500, "max_model_len=128"),
        ("\ud800", "surrogate|Unicode|unicode"),
        (17, "int"),
        ([["a"]], "token 0"),
        ([None], "prompt 0: it is of type NoneType"),
    ],
)
def test_a_bad_prompt_is_refused_before_anything_runs(llm: LLM, prompt: Any, says: str) -> None:
    with pytest.raises(RequestError, match=says):
        llm.generate(prompt, GREEDY, use_tqdm=False)


@pytest.mark.parametrize(
    ("params", "says"),
    [
        ({"logprobs": 21}, "max_logprobs=20"),
        ({"prompt_logprobs": 10**6}, "max_logprobs=20"),
        ({"logit_bias": {10**6: 1.0}}, "logit_bias has token id 1000000"),
        ({"stop_token_ids": [10**6]}, "stop_token_ids has token id 1000000"),
    ],
)
def test_parameters_that_this_model_cannot_serve_are_refused(llm: LLM, params: dict[str, Any], says: str) -> None:
    with pytest.raises(RequestError, match=says):
        llm.generate("x", SamplingParams(**params), use_tqdm=False)


def test_one_bad_prompt_among_many_leaves_no_trace(llm: LLM) -> None:
    with pytest.raises(RequestError, match="prompt 1: the prompt is empty"):
        llm.generate(["good", "", "good"], GREEDY, use_tqdm=False)
    assert not llm.engine.has_unfinished_requests()


def test_parameters_for_another_number_of_prompts_are_refused(llm: LLM) -> None:
    with pytest.raises(RequestError, match="2 sampling_params for 3 prompts"):
        llm.generate(["a", "b", "c"], [GREEDY, GREEDY], use_tqdm=False)


def test_bad_messages_are_refused(llm: LLM) -> None:
    with pytest.raises(RequestError, match=r"message|role"):
        llm.chat([{"content": "no role"}], GREEDY, use_tqdm=False)
    with pytest.raises(RequestError, match=r"messages\[0\] is of type str: it must be an object with role and content"):
        llm.chat("no message", GREEDY, use_tqdm=False)  # type: ignore[arg-type]


def test_a_base_model_says_that_it_cannot_chat(tmp_path: Path) -> None:
    llm = LLM(str(tiny_checkpoint(tmp_path, "LlamaForCausalLM", chat=False)), max_model_len=64)
    with pytest.raises(RequestError, match=r"no chat template.*chat_template="):
        llm.chat([{"role": "user", "content": "hi"}], GREEDY, use_tqdm=False)


# --- what is wrong: models and settings -----------------------------------------------------------------------------


def broken(folder: Path, tmp_path: Path, **config: Any) -> Path:
    """A copy of the model with other keys in its config.json."""
    own = shutil.copytree(folder, tmp_path / "broken")
    values = json.loads((own / "config.json").read_text())
    (own / "config.json").write_text(json.dumps({**values, **config}))
    return own


def refusal(folder: Path, kind: type[BestiaryError], **settings: Any) -> str:
    with pytest.raises(kind) as caught:
        LLM(str(folder), **{"max_model_len": 64, **settings})
    return str(caught.value)


def test_a_folder_without_weights_says_so(folder: Path, tmp_path: Path) -> None:
    own = broken(folder, tmp_path)
    (own / "model.safetensors").unlink()
    assert "safetensors" in refusal(own, CheckpointNotFound)


def test_pickled_weights_are_never_read(folder: Path, tmp_path: Path) -> None:
    own = broken(folder, tmp_path)
    (own / "model.safetensors").unlink()
    (own / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch /tmp/never'\ntR.")
    said = refusal(own, CheckpointNotFound)
    assert "pickle" in said
    assert "safetensors" in said


def test_an_unknown_architecture_names_what_is_near(folder: Path, tmp_path: Path) -> None:
    assert "LlamaForCausalML" in refusal(
        broken(folder, tmp_path, architectures=["LlamaForCausalML"]), UnknownArchitecture
    )


def test_code_that_a_checkpoint_brings_is_not_run(folder: Path, tmp_path: Path) -> None:
    """S23 and S24: auto_map and a module beside the weights."""
    marker = tmp_path / "ran"
    own = broken(folder, tmp_path, auto_map={"AutoModelForCausalLM": "modeling_x.Model"}, trust_remote_code=True)
    for name in ("modeling_x.py", "sitecustomize.py", "x.pth"):
        (own / name).write_text(f"import pathlib; pathlib.Path({str(marker)!r}).touch()\n")
    assert len(texts(LLM(str(own), max_model_len=64), "x")) == 1
    assert not marker.exists()


def test_truncated_weights_are_malformed(folder: Path, tmp_path: Path) -> None:
    own = broken(folder, tmp_path)
    data = (own / "model.safetensors").read_bytes()
    for size in (0, 7, 100, len(data) // 2, len(data) - 1):
        (own / "model.safetensors").write_bytes(data[:size])
        assert "model.safetensors" in refusal(own, CheckpointMalformed)


def test_a_missing_tensor_is_named(folder: Path, tmp_path: Path) -> None:
    assert "layers.2" in refusal(broken(folder, tmp_path, num_hidden_layers=3), TensorMismatch)


def test_an_extra_tensor_is_named(folder: Path, tmp_path: Path) -> None:
    assert "layers.1" in refusal(broken(folder, tmp_path, num_hidden_layers=1), TensorMismatch)


@pytest.mark.parametrize(
    "bad", [{"hidden_size": "wide"}, {"num_attention_heads": 0}, {"num_hidden_layers": -1}, {"hidden_size": 65}]
)
def test_a_config_that_cannot_be_is_refused(bad: dict[str, Any], folder: Path, tmp_path: Path) -> None:
    assert next(iter(bad)) in refusal(broken(folder, tmp_path, **bad), ConfigUnsupported)


def test_a_config_that_is_no_json_is_malformed(folder: Path, tmp_path: Path) -> None:
    own = broken(folder, tmp_path)
    (own / "config.json").write_text("{")
    assert "config.json" in refusal(own, CheckpointMalformed)


def test_no_such_model_is_not_found() -> None:
    assert "nowhere" in refusal(Path("/nowhere/at/all"), CheckpointNotFound)


@pytest.mark.parametrize(
    ("settings", "kind", "says"),
    [
        ({"max_model_len": 10**9}, SettingError, "max_model_len=1000000000"),
        ({"kv_cache_memory_bytes": 1}, SettingError, "kv_cache_memory_bytes"),
        ({"num_gpu_blocks_override": 1}, SettingError, "max_model_len=64"),
        ({"device": "abacus"}, SettingError, "device='abacus'"),
        ({"device": "meta"}, SettingError, "device='meta': choose auto, cpu, cuda or cuda:N"),
        ({"device": "cuda:99"}, SettingError, "device='cuda:99': this machine"),
        ({"tensor_parallel_size": 0}, SettingError, "tensor_parallel_size=0"),
        ({"pipeline_parallel_size": 0}, SettingError, "pipeline_parallel_size=0"),
        ({"max_loras": 0}, SettingError, "max_loras=0"),
        ({"lora_modules": {"a": "/nowhere/at/all"}}, AdapterError, "/nowhere/at/all is not a folder"),
    ],
)
def test_settings_that_do_not_fit_are_refused(
    settings: dict[str, Any], kind: type[BestiaryError], says: str, folder: Path
) -> None:
    assert says in refusal(folder, kind, **settings)


def test_a_gpu_that_is_not_there_is_said_to_be_missing(folder: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    assert "no CUDA device" in refusal(folder, SettingError, device="cuda")


def test_an_unknown_setting_is_a_type_error(folder: Path) -> None:
    with pytest.raises(TypeError, match="max_model_length"):
        LLM(str(folder), max_model_length=64)
