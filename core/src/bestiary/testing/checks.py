"""What is checked of a plugin, and of each of its cases. Each check's docstring says what it proves.

L0 the declaration, L1 hygiene, L2 the same numbers as the reference. What the engine may never change, L3, is in
`invariants`, and what concerns pictures, sounds and videos in `media_checks`.
"""

import json
import subprocess
import sys
import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

import torch

from bestiary import registry
from bestiary.architecture import API, Architecture, Task
from bestiary.errors import BestiaryError, CapabilityMissing, TensorMismatch
from bestiary.testing.checklist import NotApplicable, check, require
from bestiary.testing.fixture import NEW_TOKENS, Fixture
from bestiary.testing.references import Oracle
from bestiary.testing.samples import Sample

__all__ = ["DIFFERENCE", "TOLERANCE"]

#: How near every log-probability must be to the reference's.
TOLERANCE = 1e-4
#: What switching a feature off must change at least.
DIFFERENCE = 1e-2
#: In bfloat16: how far log-probabilities may be from the reference's on average, and vectors; and how often the
#: likeliest token is the same. Tiny random models are less certain of themselves than any that was trained.
_ROUNDED, _ROUNDED_VECTORS, _ROUNDED_AGREEMENT = 0.2, 0.05, 0.75


# ---- L0: the declaration --------------------------------------------------------------------------------------------


@check("L0", of_case=False)
def _declaration(architecture: Architecture) -> None:
    """The entry points resolve to a valid declaration of this contract's version."""
    for name in (architecture.name, *architecture.aliases):
        require(registry.find(name).load() == architecture, f"the entry point {name} leads to another declaration")
    require(architecture.api == API, f"it is written for version {architecture.api} of the contract, not {API}")
    require(architecture.proof is not None, "it declares no `proof`: nothing shows that it computes what it should")


@check("L0", of_case=False)
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
    require(done.returncode == 0, f"importing {arguments[0]} fails: {done.stderr.strip().splitlines()[-1:]}")
    return json.loads(done.stdout.splitlines()[-1])


@check("L1", of_case=False)
def _light_declaration(architecture: Architecture) -> None:
    """Loading the declaration imports nothing heavy, opens no socket, changes no module, and takes under 50 ms."""
    module = registry.find(architecture.name).value.partition(":")[0]
    found = min((_in_a_process(_IMPORT, module) for _ in range(2)), key=lambda one: one["seconds"])
    require(not found["heavy"], f"it imports {', '.join(found['heavy'])}")
    require(not found["changed"], f"it changes {', '.join(found['changed'])}")
    require(found["seconds"] < 0.05, f"it takes {found['seconds'] * 1000:.0f} ms of processor time")


@check("L1", of_case=False)
def _no_global_state(architecture: Architecture) -> None:
    """Importing the model module leaves torch, the environment and the process as they were."""
    changed = _changed_by_models().get(architecture.model) or []
    require(not changed, f"it changes {', '.join(changed)}")


@cache
def _changed_by_models() -> Any:
    """What importing each installed architecture's model changes; one process for all, since torch takes its time."""
    models = {found.load().model for plugins in registry.scan().values() for found in plugins}
    return _in_a_process(_STATE, *sorted(models))


@check("L1")
def _no_code_of_the_checkpoint(fixture: Fixture) -> None:
    """A checkpoint with `auto_map` and modules of its own runs none of them."""
    evil = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    folder = fixture.variant("auto_map", {"auto_map": evil})
    trace = folder / "it-ran"
    for name in ("evil.py", "modeling_evil.py", "configuration_evil.py", "tokenization_evil.py"):
        (folder / name).write_text(f"open({str(trace)!r}, 'w')\nclass Config: ...\nclass Model: ...\n")
    fixture.engine(folder)
    require(not trace.exists(), "a module of the checkpoint was run")


# ---- L2: the reference's numbers ------------------------------------------------------------------------------------


def _judge(fixture: Fixture) -> Oracle:
    """The reference, where what is installed of it is whole."""
    if shortcoming := getattr(fixture.case.reference, "shortcoming", str)():
        raise NotApplicable(shortcoming)
    return fixture.oracle


def _disagreement(fixture: Fixture, folder: object = None, sample: Sample | None = None) -> float:
    """How far an answer is from the reference's, in any number; infinite where a token differs."""
    sample = sample or fixture.samples[0]
    judge = _judge(fixture)
    (answer,) = fixture.answers(fixture.engine(folder), [sample], logprobs=True)  # type: ignore[arg-type]
    if fixture.pools:
        wanted = judge.vectors(sample)
        return float((answer.vectors - wanted).abs().max()) if answer.vectors.shape == wanted.shape else float("inf")
    judged = judge.judge(sample, answer.tokens)
    if answer.tokens != judged[-len(answer.tokens) :].argmax(-1).tolist():
        return float("inf")
    own = torch.cat((answer.prompt_logprobs, answer.logprobs))
    worst = float((own - judged).abs().max()) if own.shape == judged.shape else float("inf")
    return worst if worst == worst else float("inf")


@check("L2")
def _logits(fixture: Fixture) -> None:
    """Greedy tokens are the reference's, and every log-probability, of prompt and answer, is within 1e-4 of it."""
    for number, sample in enumerate(fixture.samples if fixture.case.samples else fixture.samples[:1]):
        found = _disagreement(fixture, None, sample)
        require(found <= TOLERANCE, f"the answer to prompt {number} is {found:.2g} off the reference")


@check("L2")
def _many_tokens(fixture: Fixture) -> None:
    """A prompt of more tokens than kernels for a few rows take gives the reference's numbers, in bfloat16 nearly so."""
    if fixture.case.samples:
        raise NotApplicable("the case has prompts of its own")
    judge, sample = _judge(fixture), fixture.long_sample
    if fixture.engine().executor.max_model_len < len(sample.token_ids) + NEW_TOKENS:
        raise NotApplicable("the case's contexts are too short")
    for dtype, tolerance in (("float32", TOLERANCE), ("bfloat16", _ROUNDED)):
        (answer,) = fixture.answers(fixture.engine(dtype=dtype), [sample], logprobs=True)
        if fixture.pools:
            off = (answer.vectors - judge.vectors(sample)).abs()
        else:
            off = (torch.cat((answer.prompt_logprobs, answer.logprobs)) - judge.judge(sample, answer.tokens)).abs()
        found = float(off.max() if dtype == "float32" else off.mean())
        require(found <= tolerance, f"in {dtype} the numbers are {found:.2g} off the reference")


@check("L2")
def _reference_dialect(fixture: Fixture) -> None:
    """The same from config.json as the reference itself writes it (`rope_parameters`, `dtype`)."""
    if getattr(fixture.case.reference, "config", None) is not None:
        raise NotApplicable("the reference is another architecture's class")
    found = _disagreement(fixture, fixture.in_reference_dialect())
    require(found <= TOLERANCE, f"the answer is {found:.2g} off the reference")


@check("L2")
def _namings(fixture: Fixture) -> None:
    """Every published generation of tensor names gives the same numbers."""
    if not fixture.case.namings:
        raise NotApplicable("the case names no other generation")
    for naming in fixture.case.namings:
        found = _disagreement(fixture, fixture.renamed(naming))
        require(found <= TOLERANCE, f"under the names of {naming.name!r} the answer is {found:.2g} off")


@check("L2")
def _mutations(fixture: Fixture) -> None:
    """Every feature that the configuration names matters: switched off, the answer is another, or nothing loads."""
    if not fixture.case.mutations:
        raise NotApplicable("the case names no feature")
    for feature, changes in fixture.case.mutations.items():
        try:
            with warnings.catch_warnings():
                # Where the feature is a head of its own, it is left out on purpose.
                warnings.filterwarnings("ignore", "the stored head differs", RuntimeWarning)
                found = _disagreement(fixture, fixture.variant(f"without {feature}", changes))
        except BestiaryError:
            continue  # refused: that is a difference too
        require(found > DIFFERENCE, f"{feature} changes nothing: without it the answer is {found:.2g} off")


@check("L2")
def _bfloat16(fixture: Fixture) -> None:
    """In bfloat16 the answer stays near the reference's in float32: nothing is rounded that must not be."""
    judge, sample = _judge(fixture), fixture.samples[0]
    (answer,) = fixture.answers(fixture.engine(dtype="bfloat16"), [sample], logprobs=True)
    if fixture.pools:
        off = float((answer.vectors - judge.vectors(sample)).abs().mean())
        require(off <= _ROUNDED_VECTORS, f"vectors are {off:.2g} off on average")
        return
    judged = judge.judge(sample, answer.tokens)
    own = torch.cat((answer.prompt_logprobs, answer.logprobs))
    off = float((own - judged).abs().mean())
    agreement = float((own.argmax(-1) == judged.argmax(-1)).float().mean())
    require(off <= _ROUNDED, f"log-probabilities are {off:.2g} off on average")
    require(agreement >= _ROUNDED_AGREEMENT, f"the likeliest token is the reference's at {agreement:.0%} of the places")


@check("L2")
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
        require(name.rpartition(".")[0] in str(error), f"{name} is {what}, and the error does not name it: {error}")
        return
    raise AssertionError(f"{name} is {what}, and the checkpoint loads all the same")
