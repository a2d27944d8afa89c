"""What is checked, by level, and of which case. Each check says what it proves in its docstring, which errors repeat.

L0 the declaration, L1 hygiene, L2 the same numbers as the reference, L3 what the engine may never change.
"""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from bestiary import registry
from bestiary.architecture import API, Architecture, Task
from bestiary.config import ENGINE_CAPABILITIES
from bestiary.errors import BestiaryError, CapabilityMissing, TensorMismatch
from bestiary.prompts import parse_prompts
from bestiary.testing.fixture import Answer, Fixture

__all__ = ["CHECKS", "TOLERANCE", "Check", "NotApplicable", "NotOffered"]

#: How near every log-probability must be to the reference's.
TOLERANCE = 1e-4
#: What switching a feature off must change at least.
_DIFFERENCE = 1e-2


class NotApplicable(Exception):
    """There is nothing to check here, and why."""


class NotOffered(Exception):
    """The plugin declares it, and this version of the engine does not do it yet."""


@dataclass(frozen=True)
class Check:
    """One check. `of_case` is False for those that concern the plugin, and not one of its cases."""

    level: str
    name: str
    run: Callable[..., None]
    of_case: bool


CHECKS: list[Check] = []


def _check(level: str, *, of_case: bool = True) -> Callable[[Callable[..., None]], Callable[..., None]]:
    def register(function: Callable[..., None]) -> Callable[..., None]:
        CHECKS.append(Check(level, function.__name__.removeprefix("_"), function, of_case))
        return function

    return register


def _require(holds: bool, what: str) -> None:
    if not holds:
        raise AssertionError(what)


# ---- L0: the declaration --------------------------------------------------------------------------------------------


@_check("L0", of_case=False)
def _declaration(architecture: Architecture) -> None:
    """The entry points resolve to a valid declaration of this contract's version."""
    for name in (architecture.name, *architecture.aliases):
        _require(registry.find(name).load() == architecture, f"the entry point {name} leads to another declaration")
    _require(architecture.api == API, f"it is written for version {architecture.api} of the contract, not {API}")
    _require(architecture.proof is not None, "it declares no `proof`: nothing shows that it computes what it should")


@_check("L0", of_case=False)
def _undeclared_is_refused(architecture: Architecture) -> None:
    """What the plugin does not declare is refused with the capability error."""
    flags = {name: False for name in ("lora", "pipeline", "tensor") if not getattr(architecture, name)}
    asked: list[dict[str, object]] = [{name: True} for name in flags]
    asked += [{"task": task} for task in Task if task not in architecture.tasks]
    asked += [{"modality": kind} for kind in ("image", "video", "audio") if kind not in architecture.modalities]
    for wish in asked:
        try:
            registry.require(architecture, **wish)  # type: ignore[arg-type]
        except CapabilityMissing:
            continue
        raise AssertionError(f"{wish} is not declared, and it is not refused")


# ---- L1: hygiene ----------------------------------------------------------------------------------------------------

_IMPORT = """
import importlib, json, socket, sys, time
import bestiary.architecture, bestiary.errors
def watch(*args, **kwargs):
    raise RuntimeError("a socket was opened")
socket.socket.__init__ = watch
def look():
    import builtins, os
    return {f"{m.__name__}.{k}": id(v) for m in (builtins, os, sys, json, socket) for k, v in list(vars(m).items())
            if not k.startswith("_") and k not in ("path_importer_cache", "last_exc", "last_value", "last_type")}
before = look()
start = time.process_time()
module = importlib.import_module(sys.argv[1])
took = time.process_time() - start
changed = [k for k, v in look().items() if before.get(k, v) != v]
heavy = [name for name in ("torch", "transformers", "numpy", "PIL") if name in sys.modules]
print(json.dumps({"seconds": took, "heavy": heavy, "changed": changed}))
"""

_STATE = """
import importlib, json, logging, os, sys, warnings
import torch
def look():
    return {"dtype": str(torch.get_default_dtype()), "threads": torch.get_num_threads(),
            "grad": torch.is_grad_enabled(), "seed": torch.random.get_rng_state().sum().item(),
            "environment": dict(os.environ), "warnings": len(warnings.filters), "log level": logging.getLogger().level,
            "linear": id(torch.nn.Linear.forward), "path": list(sys.path), "cwd": os.getcwd()}
import bestiary.model, bestiary.blocks
found = {}
for module in sys.argv[1:]:
    before = look()
    try:
        importlib.import_module(module)
    except Exception as failure:
        found[module] = [f"nothing: it cannot be imported ({failure})"]
        continue
    after = look()
    found[module] = [name for name in before if before[name] != after[name]]
print(json.dumps(found))
"""


def _in_a_process(script: str, *arguments: str) -> Any:
    done = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, timeout=120)
    _require(done.returncode == 0, f"importing {arguments[0]} fails: {done.stderr.strip().splitlines()[-1:]}")
    return json.loads(done.stdout.splitlines()[-1])


@_check("L1", of_case=False)
def _light_declaration(architecture: Architecture) -> None:
    """Loading the declaration imports nothing heavy, opens no socket, changes no module, and takes under 50 ms."""
    module = registry.find(architecture.name).value.partition(":")[0]
    found = min((_in_a_process(_IMPORT, module) for _ in range(2)), key=lambda one: one["seconds"])
    _require(not found["heavy"], f"it imports {', '.join(found['heavy'])}")
    _require(not found["changed"], f"it changes {', '.join(found['changed'])}")
    _require(found["seconds"] < 0.05, f"it takes {found['seconds'] * 1000:.0f} ms of processor time")


@_check("L1", of_case=False)
def _no_global_state(architecture: Architecture) -> None:
    """Importing the model module leaves torch, the environment and the process as they were."""
    changed = _changed_by_models().get(architecture.model) or []
    _require(not changed, f"it changes {', '.join(changed)}")


@cache
def _changed_by_models() -> Any:
    """What importing each installed architecture's model changes; one process for all, since torch takes its time."""
    models = {found.load().model for plugins in registry.scan().values() for found in plugins}
    return _in_a_process(_STATE, *sorted(models))


@_check("L1")
def _no_code_of_the_checkpoint(fixture: Fixture) -> None:
    """A checkpoint with `auto_map` and modules of its own runs none of them."""
    evil = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    folder = fixture.variant("auto_map", {"auto_map": evil})
    trace = folder / "it-ran"
    for name in ("evil.py", "modeling_evil.py", "configuration_evil.py", "tokenization_evil.py"):
        (folder / name).write_text(f"open({str(trace)!r}, 'w')\nclass Config: ...\nclass Model: ...\n")
    fixture.engine(folder)
    _require(not trace.exists(), "a module of the checkpoint was run")


# ---- L2: the reference's numbers ------------------------------------------------------------------------------------


def _worst(fixture: Fixture, answer: Answer, prompt: list[int]) -> float:
    """The largest difference of any log-probability from the reference's, given the answer's own tokens."""
    judged = fixture.oracle.judge(prompt, answer.tokens)
    worst = float((answer.logprobs - judged).abs().max())
    if len(answer.prompt_logprobs):
        own = fixture.oracle.judge(prompt[:1], prompt[1:])
        worst = max(worst, float((answer.prompt_logprobs - own).abs().max()))
    return worst if worst == worst else float("inf")


def _disagreement(fixture: Fixture, folder: object = None) -> float:
    """How far the first prompt's answer is from the reference's, in any number; infinite where a token differs."""
    prompt = fixture.prompts[0]
    if fixture.pools:
        (answer,) = fixture.answers(fixture.engine(folder), [prompt])  # type: ignore[arg-type]
        wanted = fixture.oracle.vectors(prompt)
        return float((answer.vectors - wanted).abs().max()) if answer.vectors.shape == wanted.shape else float("inf")
    (answer,) = fixture.answers(fixture.engine(folder), [prompt], logprobs=True)  # type: ignore[arg-type]
    return _worst(fixture, answer, prompt) if answer.tokens == fixture.expected else float("inf")


@_check("L2")
def _logits(fixture: Fixture) -> None:
    """Greedy tokens are the reference's, and every log-probability, of prompt and answer, is within 1e-4 of it."""
    found = _disagreement(fixture)
    _require(found <= TOLERANCE, f"the answer is {found:.2g} off the reference")


@_check("L2")
def _reference_dialect(fixture: Fixture) -> None:
    """The same from config.json as the reference itself writes it (`rope_parameters`, `dtype`)."""
    if getattr(fixture.case.reference, "config", None) is not None:
        raise NotApplicable("the reference is another architecture's class")
    found = _disagreement(fixture, fixture.in_reference_dialect())
    _require(found <= TOLERANCE, f"the answer is {found:.2g} off the reference")


@_check("L2")
def _namings(fixture: Fixture) -> None:
    """Every published generation of tensor names gives the same numbers."""
    if not fixture.case.namings:
        raise NotApplicable("the case names no other generation")
    for naming in fixture.case.namings:
        found = _disagreement(fixture, fixture.renamed(naming))
        _require(found <= TOLERANCE, f"under the names of {naming.name!r} the answer is {found:.2g} off")


@_check("L2")
def _mutations(fixture: Fixture) -> None:
    """Every feature that the configuration names matters: switched off, the answer is another, or nothing loads."""
    if not fixture.case.mutations:
        raise NotApplicable("the case names no feature")
    for feature, changes in fixture.case.mutations.items():
        try:
            found = _disagreement(fixture, fixture.variant(f"without {feature}", changes))
        except BestiaryError:
            continue  # refused: that is a difference too
        _require(found > _DIFFERENCE, f"{feature} changes nothing: without it the answer is {found:.2g} off")


@_check("L2")
def _missing_tensor(fixture: Fixture) -> None:
    """A tensor that is missing, cut short or unknown is an error that names it."""
    names = fixture.tensor_names()
    for name in (names[0], names[len(names) // 2], names[-1]):
        _fails_for(fixture, name, "lacks", lambda tensors, name=name: {k: v for k, v in tensors.items() if k != name})
        _fails_for(fixture, name, "misshapen", lambda tensors, name=name: {**tensors, name: tensors[name][..., :-1]})
    _fails_for(fixture, "model.griffin.weight", "unknown", lambda t: {**t, "model.griffin.weight": torch.zeros(2, 2)})


def _fails_for(fixture: Fixture, name: str, what: str, rewrite: Callable[..., object]) -> None:
    try:
        fixture.engine(fixture.rewritten("broken", rewrite))
    except TensorMismatch as error:
        _require(name.rpartition(".")[0] in str(error), f"{name} is {what}, and the error does not name it: {error}")
        return
    raise AssertionError(f"{name} is {what}, and the checkpoint loads all the same")


# ---- L3: what may change nothing ------------------------------------------------------------------------------------


def _same(fixture: Fixture, found: list[Answer], what: str) -> None:
    """The answers are those of each prompt served alone."""
    for prompt, answer, alone in zip(fixture.prompts, found, _alone(fixture), strict=False):
        _require(answer.tokens == alone.tokens, f"{what}: the prompt {prompt} is answered differently")
        if fixture.pools:
            off = float((answer.vectors - alone.vectors).abs().max())
            _require(off <= TOLERANCE, f"{what}: vectors differ by {off:.2g}")


def _alone(fixture: Fixture) -> list[Answer]:
    if not hasattr(fixture, "alone"):
        engine = fixture.engine(enable_prefix_caching=False)
        fixture.alone = [fixture.answers(engine, [prompt])[0] for prompt in fixture.prompts]  # type: ignore[attr-defined]
    found: list[Answer] = fixture.alone  # type: ignore[attr-defined]
    return found


@_check("L3")
def _company(fixture: Fixture) -> None:
    """An answer does not depend on who else is in the batch."""
    engine = fixture.engine(enable_prefix_caching=False)
    _same(fixture, fixture.answers(engine, fixture.prompts), "together")


@_check("L3")
def _chunks(fixture: Fixture) -> None:
    """Nor on how a prompt is cut: one token a step, seven, or all."""
    for size in (1, 7):
        engine = fixture.engine(enable_prefix_caching=False, max_num_batched_tokens=size)
        _same(fixture, fixture.answers(engine, fixture.prompts), f"in chunks of {size}")


@_check("L3")
def _block_sizes(fixture: Fixture) -> None:
    """Nor on the size of the cache's blocks."""
    for size in (1, 5):
        engine = fixture.engine(block_size=size, max_num_batched_tokens=11)
        _same(fixture, fixture.answers(engine, fixture.prompts), f"with blocks of {size}")


@_check("L3")
def _prefix_hits(fixture: Fixture) -> None:
    """Nor on what is found in the cache."""
    engine = fixture.engine(block_size=4)
    for _ in range(2):
        found = fixture.answers(engine, fixture.prompts)
        _same(fixture, found, "with prefixes shared")
    if any(group.fixed is not None for group in engine.executor.groups):
        raise NotApplicable("a state belongs to all of a sequence: no prefix of it is shared")
    can_hit = engine.executor.pools != "all" and not any(group.crossed for group in engine.executor.groups)
    _require(not can_hit or found[0].num_cached > 0, "a prompt that was just served is not found again")


@_check("L3")
def _preemption(fixture: Fixture) -> None:
    """Nor on giving all blocks up in the middle of it."""
    engine = fixture.engine(block_size=4, max_num_seqs=3, max_num_batched_tokens=9)
    for i, prompt in enumerate(fixture.prompts):
        fixture.add(engine, str(i), prompt)
    found: dict[str, Answer] = {}
    for moment in range(6):
        for _ in range(2 + moment):
            for output in engine.step() if engine.has_unfinished_requests() else ():
                (one,) = output.outputs
                vectors = torch.cat(output.vectors) if output.vectors else torch.empty(0)
                found[output.request_id] = Answer(list(one.token_ids), torch.empty(0), torch.empty(0), 0, vectors)
        if engine.scheduler.running:
            engine.scheduler.preempt(engine.scheduler.running[-1])
    found |= fixture.drain(engine)
    _same(fixture, [found[str(i)] for i in range(len(fixture.prompts))], "preempted")


@_check("L3")
def _abort(fixture: Fixture) -> None:
    """An answer that is given up leaves nothing behind, and the others alone."""
    engine = fixture.engine(enable_prefix_caching=False)
    for i, prompt in enumerate(fixture.prompts):
        fixture.add(engine, str(i), prompt)
    engine.step()
    engine.abort(["1"])
    found = fixture.drain(engine)
    _same(fixture, [found.get(str(i), _alone(fixture)[i]) for i in range(len(fixture.prompts))], "beside an abort")


@_check("L3")
def _reused_slots(fixture: Fixture) -> None:
    """A sequence finds nothing of the one that had its place before."""
    engine = fixture.engine(max_num_seqs=1, enable_prefix_caching=False, block_size=8)
    for _ in range(2):
        _same(fixture, fixture.answers(engine, fixture.prompts), "one after the other")


@_check("L3")
def _text_alone(fixture: Fixture) -> None:
    """A model that reads text alone refuses anything else, naming what."""
    engine = fixture.engine(enable_prefix_caching=False)
    if engine.architecture is not None and engine.architecture.modalities:
        raise NotApplicable("it reads more than text")
    try:
        parse_prompts({"prompt_token_ids": [5], "multi_modal_data": {"image": [0]}}, None, engine.processor)
    except BestiaryError:
        return
    raise AssertionError("an image for a model that reads text alone is not refused")


@_check("L3", of_case=False)
def _pipeline(architecture: Architecture) -> None:
    """Two stages give the same numbers as one."""
    _offered(architecture, "pipeline")


@_check("L3", of_case=False)
def _tensor(architecture: Architecture) -> None:
    """Two ranks that share every matrix give the same numbers as one."""
    _offered(architecture, "tensor")


@_check("L3", of_case=False)
def _lora(architecture: Architecture) -> None:
    """An adapter does what merging it would do."""
    _offered(architecture, "lora")


def _offered(architecture: Architecture, capability: str) -> None:
    if not getattr(architecture, capability):
        raise NotApplicable("not declared")
    if capability not in ENGINE_CAPABILITIES:
        raise NotOffered("declared; this version of the engine does not do it yet")
