"""The package as a whole: its reading order, its public names, its size, its README."""

import ast
import graphlib
import re
import subprocess
import sys
from pathlib import Path

import zskt

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src" / "zskt"
ORDER = ["errors", "files", "runtime", "settings"]
ORDER += ["networks", "data", "method", "evaluate", "run", "deploy", "paper", "bench", "cli"]
"""The rooms, lowest first: arrows between them go down only."""


def imports(path: Path) -> set[str]:
    """The modules and packages of ours, by their names at the top level, that a file imports, wherever in the file."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("zskt.")}
            assert all(alias.name != "zskt" for alias in node.names), f"{path.name} imports the package itself"
        elif isinstance(node, ast.ImportFrom) and node.module == "zskt":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("zskt."):
            found.add(node.module.split(".")[1])
    return found


def room(path: Path) -> str:
    """The top-level module or package that a file belongs to."""
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def test_arrows_between_rooms_go_down_only() -> None:
    rooms = {room(path) for path in SOURCE.rglob("*.py")} - {"__init__", "__main__", "api"}
    assert rooms == set(ORDER)
    for path in SOURCE.rglob("*.py"):
        if (name := room(path)) in ORDER:
            assert imports(path) <= set(ORDER[: ORDER.index(name) + 1]), path


def test_no_module_imports_in_a_circle() -> None:
    """Even within a room: every module loads on its own, first."""
    names = [".".join(path.relative_to(SOURCE.parent).with_suffix("").parts) for path in SOURCE.rglob("*.py")]
    order: dict[str, set[str]] = {}
    for name, path in zip(names, SOURCE.rglob("*.py"), strict=True):
        nodes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)]
        known = {node.module for node in nodes} | {f"{node.module}.{a.name}" for node in nodes for a in node.names}
        order[name] = {str(module) for module in known} & set(names)
    order["zskt.networks.classifier"].remove("zskt.networks.loading")  # within Classifier.from_pretrained, when called
    list(graphlib.TopologicalSorter(order).static_order())


def test_the_house_is_small_and_its_plan_names_every_room() -> None:
    there = {path.name.removesuffix(".py") for path in SOURCE.iterdir() if path.name != "__pycache__"}
    assert len(there) <= 17
    text = (ROOT / "docs" / "design.md").read_text()
    for name in ORDER:
        assert f"`{name}.py`" in text or f"`{name}/`" in text, name


def test_the_package_itself_needs_no_data_and_its_commands_no_export_packages() -> None:
    assert not imports(SOURCE / "api.py") & {"data", "paper", "bench", "cli"}
    script = "import sys, zskt; print({'torch'} & {*sys.modules})\n"  # so that a command can mind a Ctrl-C at once
    script += "zskt.distill; print({'zskt.data', 'sklearn'} & {*sys.modules})\n"
    script += "import zskt.cli; print({'onnx', 'onnxscript', 'onnxruntime'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["set()"] * 3


def test_the_package_imports_without_modules_of_one_platform() -> None:
    """As on Windows, where there is no fcntl and no resource."""
    script = (
        "import sys; sys.modules.update(fcntl=None, resource=None, grp=None, pwd=None); import zskt.api, zskt.cli.main"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_api_page_lists_the_public_names() -> None:
    """Everything else is private."""
    text = (ROOT / "docs" / "api.md").read_text()
    assert sorted(re.findall(r"^\| `zskt\.(\w+)`", text, re.MULTILINE)) == sorted(set(zskt.__all__) - {"__version__"})


def test_reference_imports_nothing_of_ours() -> None:
    assert imports(SOURCE / "bench" / "reference.py") == set()


def test_modules_are_short_and_the_step_is_shorter() -> None:
    lengths = {path: len(path.read_text().splitlines()) for path in SOURCE.rglob("*.py")}
    assert max(lengths.values()) <= 400, max(lengths, key=lengths.__getitem__)
    assert lengths[SOURCE / "method" / "matching.py"] <= 200


def test_the_step_does_no_input_or_output_and_knows_no_recipe() -> None:
    text = (SOURCE / "method" / "matching.py").read_text()
    tree = ast.parse(text)
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    assert not names & {"open", "print", "Path", "input"}
    recipes = [path.stem for path in (SOURCE / "method" / "recipes").glob("*.toml")]
    strings = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    assert not strings & set(recipes)


def test_public_names() -> None:
    assert zskt.__all__ == sorted(zskt.__all__)
    assert set(zskt.__all__) <= set(vars(zskt))
    for name in zskt.__all__:
        assert getattr(zskt, name).__doc__ or name in {"__version__", "Make"}, name


def test_every_public_function_and_class_has_a_docstring() -> None:
    for path in SOURCE.rglob("*.py"):
        tree = ast.parse(path.read_text())
        assert ast.get_docstring(tree), path
        for node in tree.body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
                assert ast.get_docstring(node), f"{path.name}: {node.name}"


def test_version_is_the_changelogs_newest() -> None:
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest
    assert newest[1] == zskt.__version__
    assert f"version: {zskt.__version__}" in (ROOT / "CITATION.cff").read_text()


def test_pins_cover_the_dependencies() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = {line.split("==")[0].lower().replace("_", "-") for line in lines}
    declared = re.findall(r'^\s+"([A-Za-z-]+)[=><]', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert {name.lower() for name in declared} <= pins


def test_continuous_integration_runs_the_readmes_test_command() -> None:
    assert re.search(r"^make test ", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert (ROOT / ".ci" / "run").read_text().strip().endswith("make test")


def test_links_in_the_documents_lead_somewhere() -> None:
    for document in (*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")):
        for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", document.read_text()):
            if not target.startswith("http"):
                assert (document.parent / target).exists(), f"{document.name}: {target}"
