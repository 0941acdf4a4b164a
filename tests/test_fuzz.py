"""Short forms of `make fuzz`; and properties of what settings and command lines may hold."""

import os
import re
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import hypothesis
import hypothesis.strategies as st
import pytest
import tomli_w

import fuzz
from small import call
from zskt.errors import UsageError
from zskt.method.config import Config
from zskt.runtime import parse_limit
from zskt.settings import flat, from_text, from_toml, replace, to_toml

QUICK = hypothesis.settings(max_examples=150, deadline=None, derandomize=True, database=None)


@pytest.fixture(scope="module")
def fuzzer(tmp_path_factory: pytest.TempPathFactory) -> fuzz.Fuzzer:
    return fuzz.Fuzzer(tmp_path_factory.mktemp("fuzz"))


def failing(cases: range, fuzzer: fuzz.Fuzzer) -> dict[int, str]:
    result = fuzz.fuzz(fuzzer, cases)
    assert result["cases"] == len(cases)
    return result["failures"]


def test_mutated_files_and_command_lines_are_read_or_refused(fuzzer: fuzz.Fuzzer) -> None:
    assert failing(range(30), fuzzer) == {}


@pytest.mark.slow
def test_ten_thousand_of_them(fuzzer: fuzz.Fuzzer) -> None:
    assert failing(range(10_000), fuzzer) == {}


def test_every_format_is_read_before_it_is_mutated(fuzzer: fuzz.Fuzzer, tmp_path: Path) -> None:
    """So that mutations reach the readers: what fails here, fails for the classes or programs in it."""
    for name, form in fuzzer.formats.items():
        folder = tmp_path / name / "in"
        folder.mkdir(parents=True)
        fuzzer.make(name, folder)
        assert list(folder.glob(form.mutable)), name
        out = str(tmp_path / name / "out")
        outcome = fuzz.forked([word.replace("{}", str(folder)).replace("{out}", out) for word in form.command])
        assert outcome.problem() == "", (name, outcome)
        refused = {"payload": b"wants to run", "exported": b"--trust", "svhn": b"3 classes", "cifar": b"3 classes"}
        expected = next((text for part, text in refused.items() if name.startswith(part)), b"")
        assert bool(outcome.status) == bool(expected), (name, outcome.err)
        assert expected in outcome.err, (name, outcome.err)


def crash(arguments: Sequence[str]) -> int:
    raise KeyError("x")


def hang(arguments: Sequence[str]) -> int:
    while True:
        time.process_time()


def grow(arguments: Sequence[str]) -> int:
    return 0 * len(b"x" * (fuzz.MEMORY + 2**24))


def escape(arguments: Sequence[str]) -> int:
    os.write(2, b"zskt: \x1b[31m\n")
    return 1


def babble(arguments: Sequence[str]) -> int:
    os.write(1, b"{}\n")
    return 1


def spawn(arguments: Sequence[str]) -> int:
    subprocess.run(["true"])
    return 0


@pytest.mark.parametrize(
    ("command", "problem"),
    [(crash, "exit 99"), (hang, "SIGXCPU|SIGKILL"), (grow, "MiB"), (escape, "control"), (babble, "beside"),
     (spawn, "Popen"), (lambda words: 3, "exit 3"), (lambda words: 1, "not one line"), (lambda words: 0, "^$")],
)  # fmt: skip
def test_the_fuzzer_sees_what_it_looks_for(command: Any, problem: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuzz, "main", command)
    monkeypatch.setattr(fuzz, "SECONDS", 1)
    monkeypatch.setattr(fuzz, "MEMORY", 2**27)
    assert re.search(problem, fuzz.forked([]).problem())


def test_a_case_at_the_limit_has_a_second_try(fuzzer: fuzz.Fuzzer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine may be busy; what really hangs hangs twice, on the same files."""
    statuses, seen = [-9, 0, -9, -24], []

    def ended(arguments: Sequence[str]) -> fuzz.Outcome:
        files = [path.read_bytes() for path in sorted((fuzzer.root / "case" / "in").rglob("*")) if path.is_file()]
        seen.append((list(arguments), files))
        return fuzz.Outcome(statuses.pop(0), b"", b"", 0, b"")

    monkeypatch.setattr(fuzz, "forked", ended)
    assert fuzzer.case(1)[1:] == (0, "")
    assert seen[0] == seen[1]
    assert fuzzer.case(1)[2].startswith("killed by SIGXCPU")


def test_the_fuzzer_sees_what_is_left_behind(fuzzer: fuzz.Fuzzer, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert fuzzer.left_behind(out, 1) == ""
    out.mkdir()
    assert fuzzer.left_behind(out, 0) == ""
    assert "failed and left" in fuzzer.left_behind(out, 1)
    (out / "diverged.safetensors").touch()  # kept on purpose
    assert fuzzer.left_behind(out, 1) == ""
    (tmp_path / ".x.tmp").touch()
    assert "left" in fuzzer.left_behind(out, 0)
    fuzzer.canary.mkdir()
    assert fuzzer.left_behind(out, 0) == "code was executed"


# Settings

NAMES = st.sampled_from([*flat(Config()), "student", "generator.loss", "x", "student.x"])
NUMBERS = st.one_of(st.integers(), st.floats(), st.integers(-3, 200), st.floats(-2, 2))
WORDS = st.one_of(
    st.text(max_size=20), st.sampled_from(["auto", "sgd", "buffer", "bank", "cosine", "1", "10m", "eval"])
)
VALUES = st.recursive(
    st.one_of(st.booleans(), NUMBERS, WORDS, st.dates()),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=2)),
    max_leaves=5,
)


def refusal(error: BaseException) -> None:
    assert "\n" not in str(error)
    assert str(error).isprintable()


@QUICK
@hypothesis.given(st.dictionaries(NAMES, VALUES, max_size=4))
def test_settings_are_refused_in_a_line_or_survive_being_written(changes: dict[str, Any]) -> None:
    try:
        config = replace(Config(), changes)
    except UsageError as error:
        refusal(error)
    else:
        assert from_toml(Config, to_toml(config), "here") == config


@QUICK
@hypothesis.given(st.one_of(st.text(), st.dictionaries(NAMES, VALUES, max_size=3).map(tomli_w.dumps)))
def test_a_settings_file_is_refused_in_a_line_or_read(text: str) -> None:
    try:
        config = from_toml(Config, text, "here")
    except UsageError as error:
        refusal(error)
    else:
        assert isinstance(config, Config)


@QUICK
@hypothesis.given(st.text(), st.text())
def test_assignments_and_times_are_refused_in_a_line_or_read(name: str, value: str) -> None:
    for work in (lambda: from_text(f"{name}={value}"), lambda: from_text(name), lambda: parse_limit(value)):
        try:
            assert isinstance(work(), tuple)
        except UsageError as error:
            refusal(error)


COMMANDS = ["recipes", "report", "evaluate", "sample", "inspect", "distill", "import", "export", "belief"]
OPTIONS = [
    "--out",
    "--student",
    "--data",
    "--set",
    "--steps",
    "--seed",
    "--trust",
    "--recipe",
    "--resume",
    "--help",
    "--mean",
]


@hypothesis.settings(QUICK, max_examples=60, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])
@hypothesis.given(
    st.sampled_from(COMMANDS),
    st.lists(st.one_of(st.sampled_from([*OPTIONS, "zskt", "1", "/", "x=1"]), WORDS), max_size=6),
)
def test_any_command_line_has_an_exit_status_and_a_line(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch, command: str, words: list[str]
) -> None:
    monkeypatch.chdir(tmp_path_factory.getbasetemp())
    try:
        status, out, err = call(command, *words)
    except SystemExit as leaving:  # of the argument parser, after its own message
        status, out, err = int(leaving.code or 0), "", ""
    assert status in (0, 1, 2)
    assert status == 0 or not out
    assert "Traceback" not in err
    assert "unexpected " not in err
    assert "\x1b" not in err
