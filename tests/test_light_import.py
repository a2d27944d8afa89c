"""What answers before a model runs loads neither torch nor anything else that is slow to import."""

import subprocess
import sys

import pytest

HEAVY = ("torch", "transformers", "tokenizers", "numpy")
LIGHT = (
    "bestiary",
    "bestiary.errors",
    "bestiary.architecture",
    "bestiary.installed",
    "bestiary.hooks",
    "bestiary.registry",
    "bestiary.config",
    "bestiary_llama",
)


def run(code: str) -> str:
    """What this code prints in a fresh interpreter."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_discovery_settings_and_declarations_load_nothing_heavy() -> None:
    """One process imports them in turn, so that the one that loads something is named."""
    report = run(
        f"""
import importlib, sys
for name in {LIGHT}:
    importlib.import_module(name)
    heavy = [module for module in {HEAVY} if module in sys.modules]
    if heavy:
        sys.exit(f"{{name}} imported {{heavy}}")
print("light")
"""
    )
    assert report == "light\n"


def test_looking_up_and_loading_a_declaration_stays_light() -> None:
    report = run(
        f"""
import sys
from bestiary import hooks, registry
from bestiary.errors import PluginError
for name in [*registry.scan(), "Sphinx"]:
    try:
        registry.find(name).load()
    except PluginError as error:
        print(type(error).__name__)
hooks.sources()
print([module for module in {HEAVY} if module in sys.modules])
"""
    )
    assert report == "UnknownArchitecture\n[]\n"


@pytest.mark.parametrize("name", ["LLM", "SamplingParams"])
def test_the_public_names_are_there_and_loaded_when_asked_for(name: str) -> None:
    report = run(
        f"""
import sys, bestiary
assert {name!r} in bestiary.__all__
before = "bestiary.llm" in sys.modules or "bestiary.sampling.params" in sys.modules
print(before, getattr(bestiary, {name!r}).__name__)
"""
    )
    assert report == f"False {name}\n"


def test_a_name_that_bestiary_does_not_have_is_an_ordinary_attribute_error() -> None:
    assert run("import bestiary\nprint(hasattr(bestiary, 'Sphinx'))") == "False\n"
