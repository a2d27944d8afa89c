"""What keeps the code as it is: sizes, unsafe primitives, names that may not appear."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CORE, KERNELS = ROOT / "core/src/bestiary", ROOT / "kernels/src/bestiary_kernels"
PLUGINS = sorted(ROOT.glob("plugins/*/src/*"))
SOURCES = [path for top in (CORE, KERNELS, *PLUGINS) for path in sorted(top.rglob("*.py"))]


def code_lines(path: Path) -> int:
    """Lines that hold code: neither blank, nor comment, nor docstring."""
    tree = ast.parse(path.read_text())
    skipped: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            skipped.update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    lines = enumerate(path.read_text().splitlines(), 1)
    return sum(1 for n, line in lines if line.strip() and not line.strip().startswith("#") and n not in skipped)


def functions(path: Path) -> Iterator[tuple[str, int]]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield f"{path.relative_to(ROOT)}:{node.lineno} {node.name}", (node.end_lineno or 0) - node.lineno + 1


def test_core_stays_small() -> None:
    """Without the conformance kit, which runs no model for anybody."""
    sizes = {path: code_lines(path) for path in sorted(CORE.rglob("*.py")) if "testing" not in path.parts}
    print(f"\ncore: {sum(sizes.values())} lines of code in {len(sizes)} files")
    assert sum(sizes.values()) < 11_000


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_file_is_longer_than_four_hundred_lines(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 400


def test_no_function_is_longer_than_seventy_lines() -> None:
    assert [where for path in SOURCES for where, lines in functions(path) if lines > 70] == []


def test_a_plugins_model_file_stays_under_one_hundred_and_fifty_lines() -> None:
    models = [path for top in PLUGINS for path in top.rglob("*.py") if "def describe(" in path.read_text()]
    assert models
    assert [path.name for path in models if code_lines(path) >= 150] == []


def test_no_file_of_a_plugin_is_longer_than_two_hundred_lines() -> None:
    files = [path for top in PLUGINS for path in top.rglob("*.py")]
    assert [path.name for path in files if len(path.read_text().splitlines()) > 200] == []


FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__"}
FORBIDDEN_MODULES = {"pickle", "cPickle", "dill", "marshal", "shelve", "cloudpickle"}


def unsafe(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        where = f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.Import) and any(
            alias.name.partition(".")[0] in FORBIDDEN_MODULES for alias in node.names
        ):
            yield f"{where} imports a module that runs what it reads"
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] in FORBIDDEN_MODULES:
            yield f"{where} imports a module that runs what it reads"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in FORBIDDEN_CALLS:
            yield f"{where} calls {node.func.id}"
        if isinstance(node, ast.Attribute) and ast.unparse(node) in ("torch.load", "torch.jit.load", "torch.hub"):
            yield f"{where} uses {ast.unparse(node)}"


def test_nothing_that_runs_what_it_reads() -> None:
    """No pickle, no torch.load, no eval: S23, S24 and R16."""
    assert [found for path in SOURCES for found in unsafe(path)] == []


WORDS_OF_CORE = re.compile(r"\b(rank|world_size|lora_\w+|block_tables?|quant\w*|all_reduce)\b", re.IGNORECASE)


def test_a_plugins_model_knows_nothing_of_paging_splits_adapters_or_quantisation() -> None:
    models = [path for top in PLUGINS for path in top.rglob("*.py") if "def describe(" in path.read_text()]
    assert [path.name for path in models if WORDS_OF_CORE.search(path.read_text())] == []


def test_plugins_import_only_public_modules_of_core() -> None:
    private = re.compile(r"^\s*(from|import) bestiary(\.\w+)*\._|from bestiary[\w.]* import _", re.MULTILINE)
    assert [path.name for top in PLUGINS for path in top.rglob("*.py") if private.search(path.read_text())] == []


def test_core_names_no_architecture() -> None:
    """Only the index that core ships as data may; code that knew one would treat it better than the others."""
    name = re.compile(r"\b(?!Auto)\w+(ForCausalLM|LMHeadModel|ForConditionalGeneration)\b")
    found = [f"{p.relative_to(ROOT)}: {m[0]}" for p in sorted(CORE.rglob("*.py")) for m in name.finditer(p.read_text())]
    assert found == []


def public_names(path: Path) -> tuple[set[str], set[str]]:
    """What a module defines without an underscore, and what its `__all__` lists."""
    body = ast.parse(path.read_text()).body
    defined = {n.name for n in body if isinstance(n, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef)}
    lists = [n.value for n in body if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == "__all__"]
    return {name for name in defined if not name.startswith("_")}, set().union(*map(ast.literal_eval, lists))


def test_all_lists_every_public_name() -> None:
    forgotten = {}
    for path in SOURCES:
        defined, listed = public_names(path)
        if defined - listed:
            forgotten[str(path.relative_to(ROOT))] = sorted(defined - listed)
    assert forgotten == {}
