"""The documents say what is: commands are accepted, code runs, numbers were measured, messages are ours."""

import ast
import functools
import importlib.util
import json
import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from types import ModuleType
from typing import Any

import pytest
import torch

import zskt
from small import SMALL_BANK, call, make_teacher, run
from zskt.cli.given import Overrides
from zskt.cli.main import COMMANDS
from zskt.evaluate.measures import pseudo_image_warnings

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
RESULTS = ROOT / "benchmarks" / "results"


def blocks(page: Path, language: str) -> list[str]:
    """The code of that language on a page."""
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.DOTALL)


def commands(page: Path) -> list[list[str]]:
    """The zskt commands in the blocks of a page, as words."""
    lines = "\n".join(blocks(page, "sh")).replace("\\\n", " ").splitlines()
    found = [shlex.split(line, comments=True) for line in lines if line.startswith("zskt ")]
    return [words[1:] for words in found if words[1] in COMMANDS]


def rows(text: str) -> list[list[str]]:
    """The cells of a text's tables."""
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]


@pytest.fixture
def pages() -> ModuleType:
    """scripts/pages.py."""
    found = importlib.util.spec_from_file_location("pages", ROOT / "scripts" / "pages.py")
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_command_on_a_page_is_accepted(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By its options; nothing runs."""

    def without_work(command: Callable[..., Any]) -> Callable[..., Any]:
        return functools.wraps(command)(lambda *arguments, **options: {"accepted": True})

    monkeypatch.setattr("zskt.cli.main._guarded", without_work)
    for words in commands(page):
        status, out, err = call(*words)
        assert (status, out) == (0, '{"accepted": true}\n'), f"{words}\n{err}"


def test_the_pages_have_commands() -> None:
    assert sum(len(commands(page)) for page in PAGES) >= 35


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A teacher's folder in the current folder."""
    monkeypatch.chdir(tmp_path)
    zskt.save_teacher("teacher", make_teacher())
    with torch.random.fork_rng():
        yield tmp_path


def test_the_code_of_own_methods_runs(workplace: Path) -> None:
    namespace: dict[str, object] = {}
    found = blocks(ROOT / "docs" / "own-method.md", "python")
    found = [code for code in found if "import wandb" not in code and "import mlflow" not in code]  # test_loggers.py
    assert len(found) == 2
    for block in found:
        exec(block.replace("2_000", "2").replace("1_000", "2"), namespace)


def test_the_code_of_deploying_runs(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    compare, deployed = blocks(ROOT / "docs" / "deploy.md", "python")
    tiny = {"steps": 2, "batch_size": 8, "generator.width": 8, "student.updates": 1} | SMALL_BANK
    zskt.distill(zskt.load_teacher("teacher"), zskt.models.wide_resnet(10, 1), settings=tiny, out="runs/a")
    run("export", "runs/a", "--out", "student.onnx")
    namespace: dict[str, Any] = {}
    for block in (compare, deployed):
        exec(block, namespace)
    assert namespace["logits"].shape == (2, 10)
    student = namespace["student"]
    with torch.no_grad():
        own = student(student.normalise(torch.from_numpy(namespace["images"])))
    assert torch.allclose(torch.from_numpy(namespace["logits"]), own, atol=1e-4)
    assert "they agree on" in capsys.readouterr().out


def test_the_readmes_numbers_are_a_recorded_result() -> None:
    recorded = (RESULTS / "2026-11-22-demo-split-0.md").read_text()
    (mean,) = (row for row in rows(recorded) if row[0] == "mean ± std")
    for cell in mean[1:3]:
        value, spread = map(float, cell.split(" ± "))
        assert f"{100 * value:.2f} ± {100 * spread:.2f} %" in (ROOT / "README.md").read_text()


@pytest.mark.parametrize("page", ["results", "costs"])
def test_tables_are_those_of_the_recorded_files(page: str) -> None:
    """Line by line; the table of costs that is computed from them has a test of its own."""
    recorded = {line for path in RESULTS.glob("*.md") for line in path.read_text().splitlines()}
    lines = (ROOT / "docs" / f"{page}.md").read_text().splitlines()
    tables = [line for line in lines if line.startswith("|") and not COST.match(line)]
    assert tables
    assert [line for line in tables if line not in recorded and not re.fullmatch(r"\|[-|]+", line)] == []


COST = re.compile(r"\| (pair, pixels|\S+ -> \S+, \d+ x \d+) \|")


def test_costs_follow_from_the_recorded_steps() -> None:
    """Minutes, PFLOP and hours of docs/costs.md, from the seconds and operations of a step."""
    steps = [json.loads(path.read_text()) for path in RESULTS.glob("*step-time*.json")]
    (roof,) = (json.loads(path.read_text()) for path in RESULTS.glob("*roofline*.json"))
    names = {"convnet-32": "digits", "lenet-5": "lenet", "wrn-40-2": "wrn", "resnet-34": "resnet"}
    table = [row for row in rows((ROOT / "docs" / "costs.md").read_text()) if row[0].split(" -> ")[0] in names]
    assert len(table) == 8
    for pair, precision, seconds, minutes, work, length, hours in table:
        name = names[pair.split(" -> ")[0]]
        (measured,) = (found[name][f"seconds_{precision}"] for found in steps if name in found)
        assert seconds == f"{measured:.3f}"
        assert minutes == f"{measured * 1_000 / 60:.1f}"
        if name in roof:
            phases = roof[name][precision]["phases"]
            assert work == f"{phases['step']['operations'] * 1_000 / 1e15:.3f}"
        else:
            assert work == "not measured"
        if length == "none":
            assert hours == ""
        else:
            assert hours == f"{measured * int(length.replace(',', '')) / 3600:.1f}"


def ours() -> str:
    """All texts in the code, with a gap for every value that is filled in."""
    found = []
    for path in (ROOT / "src" / "zskt").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = (str(part.value) if isinstance(part, ast.Constant) else "\0" for part in node.values)
                found.append("".join(parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return "\n".join(found)


def test_every_message_among_the_remedies_is_one_of_ours() -> None:
    """So that a changed message does not leave its remedy behind."""
    texts, quoted = ours(), set[str]()
    for row in rows((ROOT / "docs" / "remedies.md").read_text()):
        quoted |= set(re.findall(r"`([^`]+)`", row[0]))
    quoted -= {"zskt evaluate teacher --data", "--eval"}  # where a sign is seen, no message
    assert len(quoted) > 25
    missing = [text for text in quoted if not all(part.strip() in texts for part in text.split("..."))]
    assert missing == []


def test_every_warning_of_a_run_has_a_remedy() -> None:
    nothing = {"class_entropy": 0, "class_counts": [64] + [0] * 9, "teacher_confidence": 0.1, "pseudo_variation": 0}
    found = pseudo_image_warnings(nothing | {"pseudo_agreement": 0.1})
    found |= pseudo_image_warnings(nothing | {"pseudo_agreement": 0.4})
    found |= pseudo_image_warnings(nothing | {"pseudo_agreement": 1.0, "adversary_kl": 0.0}, 0.5)
    assert len(found) == 6
    page = (ROOT / "docs" / "remedies.md").read_text().split("## The run stops")[0]
    quoted = [re.findall(r"`([^`]+)`", row[0]) for row in rows(page)]
    heads = [texts[0] for texts in quoted if texts]
    for kind, text in found.items():
        assert any(all(part.strip() in text for part in head.split("...")) for head in heads), kind


def test_the_command_reference_has_every_option(pages: ModuleType) -> None:
    text = pages.page(PurePosixPath("docs/commands.md"))
    for name in COMMANDS:
        assert f"\n## zskt {name}\n" in text
    for option in (
        "--student",
        "--budget",
        "--generator.loss.kl",
        "--trust",
        "--least-agreement",
        "--images-per-class",
    ):
        assert f"| `{option}" in text
    assert "Example:" not in text
    assert text.count("| `--") > len(Overrides.__dataclass_fields__)


def test_the_python_reference_has_every_public_name(pages: ModuleType) -> None:
    places = re.findall(r"^::: (\S+)$", pages.page(PurePosixPath("docs/api.md")), re.MULTILINE)
    assert sorted(place.split(".")[-1] for place in places) == sorted(set(zskt.__all__) - {"__version__", "Make"})


def test_pages_take_along_what_they_link_to(pages: ModuleType, tmp_path: Path) -> None:
    pages.write([PurePosixPath("docs/method.md")], tmp_path / "pages")
    assert "# matching.py" in (tmp_path / "pages" / "src/zskt/method/matching.py.md").read_text()
    assert "(../src/zskt/method/matching.py.md)" in (tmp_path / "pages" / "docs" / "method.md").read_text()


def test_a_link_that_leads_nowhere_ends_the_build(
    pages: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "README.md").write_text("[gone](docs/gone.md)")
    monkeypatch.setattr(pages, "ROOT", tmp_path)
    with pytest.raises(SystemExit, match=r"README.md: the link docs/gone.md leads nowhere"):
        pages.write([PurePosixPath("README.md")], tmp_path / "pages")
