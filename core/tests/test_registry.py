"""Discovery by name, from metadata alone, and each way in which it can fail."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from bestiary import installed, registry
from bestiary.architecture import API, Architecture, Modality, Task, Variant
from bestiary.errors import (
    CapabilityMissing,
    PluginBroken,
    PluginConflict,
    PluginIncompatible,
    PluginNotInstalled,
    SettingError,
    UnknownArchitecture,
)

Install = Callable[..., Path]

OWL = """
from bestiary.architecture import API, Architecture, Task
OWL = Architecture(name="OwlForCausalLM", model="owl.model", tasks={Task.GENERATE}, aliases=("Owl2ForCausalLM",)%s)
"""
#: A module that no look-up may import.
TRAP = "raise SystemExit('imported')\n"


def owl(install: Install, extra: str = "", **given: object) -> Path:
    points = {"OwlForCausalLM": "owl:OWL", "Owl2ForCausalLM": "owl:OWL"}
    return install("bestiary-owl", architectures=points, **{"files": {"owl/__init__.py": OWL % extra}, **given})


def trap(install: Install, name: str, *architectures: str, **given: object) -> Path:
    module = name.replace("-", "_")
    return install(
        name, architectures=dict.fromkeys(architectures, f"{module}:IT"), files={f"{module}.py": TRAP}, **given
    )


# What is found


def test_scan_tells_name_distribution_version_and_value_without_importing(install: Install) -> None:
    trap(install, "bestiary-owl", "OwlForCausalLM", version="2.3")
    install("other", files={"other.py": TRAP})
    assert registry.scan() == {
        "OwlForCausalLM": [
            registry.Installed("bestiary.architectures", "OwlForCausalLM", "bestiary_owl:IT", "bestiary-owl", "2.3")
        ]
    }


def test_names_come_in_order(install: Install) -> None:
    trap(install, "bestiary-b", "Wolf", "Bee")
    trap(install, "bestiary-a", "Cat", "Ape")
    assert list(registry.scan()) == ["Ape", "Bee", "Cat", "Wolf"]


def test_a_found_plugin_loads_its_declaration(install: Install) -> None:
    owl(install)
    architecture = registry.find("OwlForCausalLM").load()
    assert architecture == Architecture(
        name="OwlForCausalLM", model="owl.model", tasks={Task.GENERATE}, aliases=("Owl2ForCausalLM",)
    )
    assert "owl.model" not in sys.modules


def test_an_alias_finds_the_architecture_by_its_own_entry_point(install: Install) -> None:
    owl(install)
    assert registry.find("Owl2ForCausalLM").load().name == "OwlForCausalLM"


def test_an_entry_point_may_name_extras_and_a_nested_attribute(install: Install) -> None:
    nest = OWL % "" + "class Nest:\n    EGG = OWL\n"
    install(
        "bestiary-owl",
        architectures={"OwlForCausalLM": "owl.nest : Nest.EGG [gguf]"},
        files={"owl/__init__.py": "", "owl/nest.py": nest},
    )
    assert registry.find("OwlForCausalLM").load().name == "OwlForCausalLM"


def test_of_a_distribution_that_is_on_the_path_twice_the_first_counts(install: Install, tmp_path: Path) -> None:
    trap(install, "bestiary-owl", "OwlForCausalLM", "OldOwl", version="1.0", into=tmp_path / "later")
    trap(install, "Bestiary_Owl", "OwlForCausalLM", version="2.0")
    sys.path.append(str(tmp_path / "later"))
    assert [plugin.version for plugin in registry.scan()["OwlForCausalLM"]] == ["2.0"]
    assert "OldOwl" not in registry.scan()


def test_a_first_one_that_declares_nothing_hides_a_later_one_that_does(install: Install, tmp_path: Path) -> None:
    trap(install, "bestiary-owl", "OwlForCausalLM", version="1.0", into=tmp_path / "later")
    install("bestiary-owl", "2.0")
    sys.path.append(str(tmp_path / "later"))
    assert registry.scan() == {}


def test_metadata_is_read_once_until_refreshed(install: Install) -> None:
    info = trap(install, "bestiary-owl", "OwlForCausalLM")
    registry.find("OwlForCausalLM")
    (info / "entry_points.txt").write_text("[bestiary.architectures]\nElk = elk:ELK\n")
    assert list(registry.scan()) == ["OwlForCausalLM"]
    installed.refresh()
    assert list(registry.scan()) == ["Elk"]


def test_a_folder_that_joins_sys_path_is_seen_without_a_refresh(install: Install, tmp_path: Path) -> None:
    trap(install, "bestiary-owl", "OwlForCausalLM", into=tmp_path / "more")
    assert registry.scan() == {}
    sys.path.append(str(tmp_path / "more"))
    assert list(registry.scan()) == ["OwlForCausalLM"]


def test_development_metadata_of_setuptools_counts_too(install: Install) -> None:
    site = Path(sys.path[0])
    (site / "bestiary_owl.egg-info").mkdir(parents=True)
    (site / "bestiary_owl.egg-info" / "PKG-INFO").write_text("Name: bestiary-owl\nVersion: 0.1\n")
    (site / "bestiary_owl.egg-info" / "entry_points.txt").write_text(
        "[bestiary.architectures]\nOwlForCausalLM = owl:OWL"
    )
    (site / "owl.py").write_text(OWL % "")
    assert registry.find("OwlForCausalLM").owner == "bestiary-owl 0.1"
    assert registry.find("OwlForCausalLM").load().name == "OwlForCausalLM"


# A hundred plugins

#: Processor time, which is nearly all of it: a busy machine must not fail the test.
MEASURE = """
import sys, time
from bestiary import installed, registry
taken = []
for _ in range(5):
    installed.refresh()
    start = time.process_time()
    assert len(registry.scan()) == 300
    plugin = registry.find("Beast42ForCausalLM")
    taken.append(time.process_time() - start)
assert plugin.owner == "bestiary-beast42 1.0", plugin
slow = ("torch", "transformers", "packaging", "numpy")
loaded = [module for module in sys.modules if module.startswith("bestiary_beast") or module in slow]
assert not loaded, loaded
print(min(taken))
"""


def test_one_name_among_a_hundred_plugins_is_found_in_60_ms_and_nothing_is_imported(
    install: Install, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for i in range(100):
        trap(install, f"bestiary-beast{i}", *(f"Beast{i}For{task}" for task in ("CausalLM", "Reward", "Embedding")))
    for i in range(60):
        install(f"ordinary{i}", metadata={"entry_points.txt": f"[console_scripts]\nordinary{i} = ordinary:main\n"})
    monkeypatch.undo()  # the subprocess gets the real path back, with the made-up one in front
    core = Path(registry.__file__).parents[1]
    path = os.pathsep.join([str(tmp_path / "site"), str(core), os.environ.get("PYTHONPATH", "")])
    environment = {
        **os.environ,
        "PYTHONPATH": path,
        "BESTIARY_LOAD_PLUGINS": ",".join(f"bestiary-beast{i}" for i in range(100)),
    }
    done = subprocess.run([sys.executable, "-c", MEASURE], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 0.060


# Which one


def test_two_distributions_that_claim_a_name_are_a_conflict_that_names_both(install: Install) -> None:
    trap(install, "bestiary-owl", "OwlForCausalLM")
    trap(install, "acme-owl", "OwlForCausalLM", version="3.1")
    with pytest.raises(PluginConflict, match=r"acme-owl 3\.1, bestiary-owl 1\.0") as caught:
        registry.find("OwlForCausalLM")
    assert "--plugin OwlForCausalLM=acme-owl" in str(caught.value)
    assert "BESTIARY_PLUGIN=OwlForCausalLM=acme-owl" in str(caught.value)


def test_a_conflict_leaves_other_names_alone(install: Install) -> None:
    trap(install, "acme-owl", "OwlForCausalLM", "Emu")
    trap(install, "bestiary-owl", "OwlForCausalLM")
    assert registry.find("Emu").distribution == "acme-owl"


@pytest.mark.parametrize(("wanted", "given"), [("bestiary-owl", "Bestiary_Owl"), ("acme.owl", "acme-owl")])
def test_a_preference_settles_a_conflict_however_the_distribution_is_spelt(
    install: Install, wanted: str, given: str
) -> None:
    trap(install, "bestiary-owl", "OwlForCausalLM")
    trap(install, "acme.owl", "OwlForCausalLM")
    assert registry.find("OwlForCausalLM", {"OwlForCausalLM": given}).distribution == wanted


def test_the_environment_settles_a_conflict_and_an_argument_overrules_it(
    install: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    trap(install, "bestiary-owl", "OwlForCausalLM")
    trap(install, "acme-owl", "OwlForCausalLM")
    monkeypatch.setenv("BESTIARY_PLUGIN", "Emu=x, OwlForCausalLM=acme-owl,")
    assert registry.find("OwlForCausalLM").distribution == "acme-owl"
    assert registry.find("OwlForCausalLM", {"OwlForCausalLM": "bestiary-owl"}).distribution == "bestiary-owl"


def test_a_preferred_distribution_that_does_not_offer_the_name_is_not_passed_over(install: Install) -> None:
    trap(install, "bestiary-owl", "OwlForCausalLM")
    with pytest.raises(PluginNotInstalled, match=r"acme-owl was chosen for OwlForCausalLM.*bestiary-owl 1\.0"):
        registry.find("OwlForCausalLM", {"OwlForCausalLM": "acme-owl"})


def test_preferences_are_read_as_written_on_the_command_line() -> None:
    assert installed.preferences("A=b, C = d-e,") == {"A": "b", "C": "d-e"}
    assert installed.preferences("") == {}


@pytest.mark.parametrize("text", ["Owl", "Owl=", "=owl", "A=b=c", "A=b,Owl"])
def test_a_malformed_preference_says_how_it_is_written(text: str) -> None:
    with pytest.raises(SettingError, match="NAME=DISTRIBUTION"):
        installed.preferences(text)


@pytest.mark.parametrize(
    ("switch", "left"),
    [("", []), ("acme-owl", ["Emu"]), ("acme_owl, Bestiary.Owl", ["Emu", "OwlForCausalLM"]), ("missing", [])],
)
def test_the_switch_leaves_only_the_distributions_it_lists(
    install: Install, monkeypatch: pytest.MonkeyPatch, switch: str, left: list[str]
) -> None:
    trap(install, "bestiary-owl", "OwlForCausalLM")
    trap(install, "acme-owl", "Emu")
    monkeypatch.setenv("BESTIARY_LOAD_PLUGINS", switch)
    assert list(registry.scan()) == left


def test_what_the_switch_keeps_out_is_told(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    trap(install, "bestiary-owl", "OwlForCausalLM")
    monkeypatch.setenv("BESTIARY_LOAD_PLUGINS", "")
    with pytest.raises(PluginNotInstalled, match=r"bestiary-owl 1\.0, which BESTIARY_LOAD_PLUGINS keeps out"):
        registry.find("OwlForCausalLM")


# Unknown, or known and not installed


def test_an_unknown_architecture_says_how_to_see_what_is_installed(install: Install) -> None:
    with pytest.raises(UnknownArchitecture, match=r"'Sphinx'.*`bestiary list`") as caught:
        registry.find("Sphinx")
    assert "Did you mean" not in str(caught.value)


def test_a_misspelt_name_is_answered_with_close_ones_installed_or_known(install: Install) -> None:
    trap(install, "bestiary-owl", "OwlForCausalLM")
    with pytest.raises(UnknownArchitecture, match=r"Did you mean .*OwlForCausalLM"):
        registry.find("OwllForCausalLM")
    with pytest.raises(UnknownArchitecture, match=r"Did you mean MistralForCausalLM"):
        registry.find("MistrallForCausalLM")


def test_a_known_architecture_says_what_to_install(install: Install) -> None:
    with pytest.raises(PluginNotInstalled, match=r"pip install bestiary-qwen2-vl$"):
        registry.find("Qwen2VLForConditionalGeneration")


def test_the_index_maps_every_spelling_to_a_distribution() -> None:
    known = registry.known()
    assert known["LLaMAForCausalLM"] == known["LlamaForCausalLM"] == "bestiary-llama"
    assert known["PhimoeForCausalLM"] == known["PhiMoEForCausalLM"] == "bestiary-phi"
    assert known["NVLM_D"] == known["NVLM_D_Model"] == "bestiary-nvlm"
    assert len(known) >= 80
    assert all(distribution == distribution.lower() for distribution in known.values())
    assert all(distribution.startswith("bestiary-") for distribution in known.values())


def test_the_first_installed_name_of_config_json_is_resolved(install: Install) -> None:
    owl(install)
    assert registry.resolve(["Sphinx", "MistralForCausalLM", "OwlForCausalLM"]).name == "OwlForCausalLM"


def test_a_preference_reaches_the_resolved_name(install: Install) -> None:
    owl(install)
    trap(install, "acme-owl", "OwlForCausalLM")
    assert registry.resolve(["OwlForCausalLM"], {"OwlForCausalLM": "bestiary-owl"}).model == "owl.model"


def test_where_none_is_installed_the_error_tells_about_every_name(install: Install) -> None:
    with pytest.raises(PluginNotInstalled, match=r"'Sphinx'[\s\S]*pip install bestiary-mistral"):
        registry.resolve(["Sphinx", "MistralForCausalLM"])
    with pytest.raises(UnknownArchitecture, match=r"'Sphinx'[\s\S]*'Griffin'"):
        registry.resolve(["Sphinx", "Griffin"])


def test_a_config_without_architectures_is_told() -> None:
    with pytest.raises(UnknownArchitecture, match="'architectures' is missing or empty"):
        registry.resolve([])


# Installed, and incompatible


@pytest.mark.parametrize(("api", "behind"), [(7, "bestiary"), (0, "bestiary-owl")])
def test_a_plugin_for_another_contract_says_which_side_to_upgrade(install: Install, api: int, behind: str) -> None:
    owl(install, f", api={api}")
    with pytest.raises(
        PluginIncompatible, match=rf"bestiary-owl 1\.0 .* version {api} .*this Bestiary has version {API}"
    ) as caught:
        registry.resolve(["OwlForCausalLM"])
    assert str(caught.value).endswith(f"pip install --upgrade {behind}")


def test_a_plugin_for_another_bestiary_is_refused_before_it_is_imported(install: Install) -> None:
    install("bestiary", "0.1.0")
    trap(install, "bestiary-owl", "OwlForCausalLM", requires=["bestiary>=0.2,<0.3"])
    with pytest.raises(PluginIncompatible) as caught:
        registry.find("OwlForCausalLM").load()
    assert "bestiary-owl 1.0 needs bestiary<0.3,>=0.2, and bestiary 0.1.0 is installed" in str(caught.value)
    assert "pip install --upgrade bestiary-owl 'bestiary<0.3,>=0.2'" in str(caught.value)


def test_any_installed_dependency_with_a_wrong_version_is_named(install: Install) -> None:
    install("Feather_Lib", "3.0")
    owl(install, requires=["feather.lib<3"])
    with pytest.raises(PluginIncompatible, match=r"needs feather\.lib<3, and feather\.lib 3\.0 is installed"):
        registry.find("OwlForCausalLM").load()


def test_requirements_that_hold_here_or_are_not_for_here_let_the_plugin_load(install: Install) -> None:
    install("bestiary", "0.2.0.dev3+local")
    install("feather", "1.0")
    owl(
        install,
        requires=[
            "bestiary>=0.1,<0.3",
            "bestiary[gguf]",
            "feather>=2; extra == 'demo'",
            "feather>=2; python_version < '3'",
            "feather; python_version > '3'",
            "absent>=1",
        ],
    )
    assert registry.find("OwlForCausalLM").load().name == "OwlForCausalLM"


# Installed, and broken


def test_a_failing_import_carries_its_cause(install: Install) -> None:
    owl(install, files={"owl/__init__.py": "1 / 0"})
    with pytest.raises(
        PluginBroken, match=r"bestiary-owl 1\.0.*'owl:OWL'.*ZeroDivisionError: division by zero"
    ) as caught:
        registry.resolve(["Sphinx", "OwlForCausalLM"])
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    assert "pip install --upgrade --force-reinstall bestiary-owl" in str(caught.value)


def test_a_plugin_that_exits_on_import_does_not_end_the_program(install: Install) -> None:
    trap(install, "bestiary-owl", "OwlForCausalLM")
    with pytest.raises(PluginBroken, match="SystemExit: imported"):
        registry.find("OwlForCausalLM").load()


def test_a_missing_dependency_is_named_beside_the_failed_import(install: Install) -> None:
    owl(install, files={"owl/__init__.py": "import feather"}, requires=["feather>=2"])
    with pytest.raises(
        PluginBroken, match=r"No module named 'feather'\. It requires what is not installed: feather>=2"
    ):
        registry.find("OwlForCausalLM").load()


@pytest.mark.parametrize("value", ["owl:EAGLE", "owl.eagle:OWL", "owl: OWL.egg", "not a reference", ""])
def test_an_entry_point_that_leads_nowhere_is_named(install: Install, value: str) -> None:
    install("bestiary-owl", architectures={"OwlForCausalLM": value}, files={"owl/__init__.py": OWL % ""})
    with pytest.raises(PluginBroken, match=r"bestiary-owl 1\.0: loading OwlForCausalLM = "):
        registry.find("OwlForCausalLM").load()


def test_something_that_is_no_architecture_is_named_by_its_type(install: Install) -> None:
    owl(install, files={"owl/__init__.py": "OWL = {}"})
    with pytest.raises(PluginBroken, match=r"'owl:OWL' is a dict, not an Architecture"):
        registry.find("OwlForCausalLM").load()


def test_a_declaration_that_does_not_know_the_entry_points_name_is_refused(install: Install) -> None:
    install("bestiary-owl", architectures={"Emu": "owl:OWL"}, files={"owl/__init__.py": OWL % ""})
    with pytest.raises(PluginBroken, match="declares OwlForCausalLM, Owl2ForCausalLM, and not Emu"):
        registry.find("Emu").load()


def test_a_declaration_that_cannot_be_meant_is_told_with_its_distribution(install: Install) -> None:
    owl(install, ", api='1'")
    with pytest.raises(
        PluginBroken, match=r"bestiary-owl 1\.0.*Architecture 'OwlForCausalLM': api='1' must be a whole"
    ):
        registry.find("OwlForCausalLM").load()


def test_code_of_another_distribution_is_refused(install: Install) -> None:
    owl(install)
    install("bestiary-magpie", architectures={"Magpie": "owl:OWL"}, files={"magpie/__init__.py": ""})
    with pytest.raises(PluginBroken, match=r"bestiary-magpie 1\.0.*imported from .*owl.*not a file of bestiary-magpie"):
        registry.find("Magpie").load()


def test_a_folder_that_hides_the_installed_module_is_told(install: Install, tmp_path: Path) -> None:
    owl(install)
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "owl.py").write_text(OWL % "")
    sys.path.insert(0, str(tmp_path / "here"))
    with pytest.raises(PluginBroken, match=r"here/owl\.py, which is not a file of bestiary-owl"):
        registry.find("OwlForCausalLM").load()


def test_a_linked_file_is_still_the_distributions_own(install: Install, tmp_path: Path) -> None:
    owl(install)
    file = Path(sys.path[0]) / "owl" / "__init__.py"
    file.rename(tmp_path / "store.py")
    file.symlink_to(tmp_path / "store.py")
    assert registry.find("OwlForCausalLM").load().name == "OwlForCausalLM"


@pytest.mark.parametrize(
    "metadata",
    [
        {
            "direct_url.json": '{"dir_info": {"editable": true}, "url": "file:///src"}',
            "RECORD": "__editable__.pth,,\n\n",
        },
        {"RECORD": ""},
    ],
    ids=["editable", "without a record"],
)
def test_where_a_distributions_files_cannot_be_told_any_folder_will_do(
    install: Install, tmp_path: Path, metadata: dict[str, str]
) -> None:
    install("bestiary-owl", architectures={"OwlForCausalLM": "owl:OWL"}, metadata=metadata)
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "owl.py").write_text(OWL % "")
    sys.path.append(str(tmp_path / "src"))
    assert registry.find("OwlForCausalLM").load().name == "OwlForCausalLM"


def test_a_requirement_that_is_none_is_told(install: Install) -> None:
    owl(install, requires=["feather >>> 2"])
    with pytest.raises(PluginBroken, match=r"bestiary-owl: its requirement 'feather >>> 2' cannot be checked"):
        registry.find("OwlForCausalLM").load()


def test_a_dependency_of_no_version_that_can_be_compared_is_told(install: Install) -> None:
    install("feather", "new")
    owl(install, requires=["feather>=2"])
    with pytest.raises(PluginBroken, match=r"'feather>=2' cannot be checked: Invalid version: 'new'"):
        registry.find("OwlForCausalLM").load()


@pytest.mark.parametrize(
    "metadata",
    [
        {"entry_points.txt": "[bestiary.architectures]\nno value\n"},
        {"METADATA": "Version: 1.0\n"},
        {"METADATA": "Name: bestiary-wreck\n"},
        {"METADATA": ""},
    ],
    ids=["malformed entry points", "no name", "no version", "no metadata"],
)
def test_unreadable_metadata_harms_no_other_plugin_and_is_told_where_something_is_missed(
    install: Install, metadata: dict[str, str]
) -> None:
    owl(install)
    trap(install, "bestiary-wreck", "Wreck", metadata=metadata)
    assert registry.find("OwlForCausalLM").load().name == "OwlForCausalLM"
    assert ["bestiary_wreck-1.0.dist-info" in fault.where for fault in installed.unreadable()] == [True]
    with pytest.raises(UnknownArchitecture, match=r"bestiary_wreck-1\.0\.dist-info could not be read"):
        registry.find("Wreck")
    with pytest.raises(PluginNotInstalled, match=r"bestiary_wreck-1\.0\.dist-info could not be read"):
        registry.find("MistralForCausalLM")


def test_bytes_that_are_no_text_harm_no_other_plugin(install: Install) -> None:
    owl(install)
    (install("wreck") / "entry_points.txt").write_bytes(b"\xff\xfe\x00")
    assert registry.find("OwlForCausalLM").distribution == "bestiary-owl"
    assert "UnicodeDecodeError" in installed.unreadable()[0].reason


# Installed, and lacking what is asked


def test_what_is_declared_is_granted() -> None:
    everything = Architecture(
        name="Owl",
        model="owl",
        tasks={Task.GENERATE, Task.EMBED},
        modalities={"image": Modality()},
        lora=True,
        pipeline=True,
        tensor=True,
    )
    registry.require(everything)
    registry.require(everything, task=Task.EMBED, modality="image", lora=True, pipeline=True, tensor=True)


def test_everything_that_is_lacking_is_named_and_what_is_supported() -> None:
    owl = Architecture(name="Owl", model="owl", tasks={Task.GENERATE}, modalities={"image": Modality()}, tensor=True)
    with pytest.raises(CapabilityMissing) as caught:
        registry.require(owl, task=Task.EMBED, modality="video", lora=True, pipeline=True, tensor=True)
    assert str(caught.value) == (
        "Owl does not support the task embed, video input, LoRA adapters, pipeline parallelism. "
        "It supports tasks generate, inputs text image, tensor. Leave out what it lacks, or choose another model."
    )


@pytest.mark.parametrize(
    ("asked", "lacking"),
    [
        ({"task": Task.REWARD}, "the task reward"),
        ({"modality": "audio"}, "audio input"),
        ({"lora": True}, "LoRA adapters"),
        ({"pipeline": True}, "pipeline parallelism"),
        ({"tensor": True}, "tensor parallelism"),
    ],
)
def test_each_capability_is_asked_for_on_its_own(asked: dict[str, object], lacking: str) -> None:
    with pytest.raises(CapabilityMissing, match=rf"^Owl does not support {lacking}\."):
        registry.require(Architecture(name="Owl", model="owl", tasks={Task.GENERATE}), **asked)  # type: ignore[arg-type]


# The declaration itself


def test_a_declaration_is_kept_frozen() -> None:
    tasks, modalities = {Task.GENERATE}, {"image": Modality()}
    architecture = Architecture(name="Owl", model="owl", tasks=tasks, modalities=modalities)
    tasks.clear()
    modalities.clear()
    assert architecture.tasks == frozenset({Task.GENERATE})
    assert dict(architecture.modalities) == {"image": Modality()}
    with pytest.raises(TypeError):
        architecture.modalities["video"] = Modality()  # type: ignore[index]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("name", ""),
        ("name", "Owl Two"),
        ("name", None),
        ("model", ""),
        ("tasks", set()),
        ("tasks", {"sing"}),
        ("modalities", {"image": True}),
        ("api", "1"),
        ("api", True),
        ("aliases", "Owl2"),
        ("examples", ["acme/owl"]),
        ("variants", []),
    ],
)
def test_a_declaration_that_cannot_be_meant_names_the_field(field: str, value: object) -> None:
    given = {"name": "Owl", "model": "owl", "tasks": {Task.GENERATE}, field: value}
    with pytest.raises(PluginBroken, match=f"{field}=.* must be"):
        Architecture(**given)  # type: ignore[arg-type]


def test_a_variant_is_told_by_the_config() -> None:
    chimera = Architecture(
        name="Chimera",
        model="chimera.goat",
        tasks={Task.GENERATE},
        variants=(Variant(when=lambda config: "wings" in config, model="chimera.dragon"),),
    )
    assert chimera.module_for(json.loads('{"wings": 2}')) == "chimera.dragon"
    assert chimera.module_for({}) == "chimera.goat"
