"""Settings: documented, read by somebody, exact in and out of TOML, refused in one line where they make no sense."""

import ast
import dataclasses
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

import zskt
from small import refused
from zskt.cli.options import documentation
from zskt.errors import UsageError
from zskt.files import write_text
from zskt.method import config as config_module
from zskt.method.config import Config, read_config
from zskt.method.recipe import load_recipe, recipe_texts
from zskt.settings import flat, from_text, from_toml, replace, to_toml

SOURCE = Path(zskt.__file__).parent
SECTIONS: list[Any] = [kind for kind in vars(config_module).values() if dataclasses.is_dataclass(kind)]


def test_every_field_has_documentation() -> None:
    for kind in SECTIONS:
        assert documentation(kind).keys() == {entry.name for entry in dataclasses.fields(kind)}


def test_every_field_is_read_by_the_package() -> None:
    read: set[str] = set()
    for path in set(SOURCE.rglob("*.py")) - {SOURCE / "method" / "config.py"}:  # which checks them all
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                read.add(node.attr)
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "interval":
                read |= {str(a.value) for a in node.args if isinstance(a, ast.Constant)}
    assert {entry.name for kind in SECTIONS for entry in dataclasses.fields(kind)} <= read


@pytest.mark.parametrize("name", ["", *recipe_texts()])
def test_toml_round_trip(name: str) -> None:
    changes = {"steps": 12_345, "student.learning_rate": 1 / 3, "machine.device": 'a "word" \\', "checkpoint_every": 7}
    config = replace(load_recipe(name) if name else Config(), changes)
    assert from_toml(Config, to_toml(config), "here") == config
    assert set(flat(tomllib_config(to_toml(config)))) == set(flat(config))  # every value is spelled out
    assert from_toml(Config, "", "here") == Config()


def test_a_config_of_before_is_read_without_what_had_no_effect(tmp_path: Path) -> None:
    text = to_toml(replace(load_recipe("zskt"), {"steps": 77}))
    path = tmp_path / "config.toml"
    for name, value in Config.GONE.items():
        section, _, last = name.rpartition(".")
        write_text(path, text.replace(f"[{section}]\n", f"[{section}]\n{last} = {value}\n"))
        assert last in path.read_text()
        assert read_config(path) == from_toml(Config, text, "here")
        write_text(path, text.replace(f"[{section}]\n", f"[{section}]\n{last} = 1.5\n"))
        with pytest.raises(UsageError, match=f"unknown setting '{name}'"):
            read_config(path)


def tomllib_config(text: str) -> Any:
    """TOML as objects with fields, for `flat`: sections become dataclasses."""

    def build(tree: dict[str, Any]) -> Any:
        values = {key: build(value) if isinstance(value, dict) else value for key, value in tree.items()}
        return dataclasses.make_dataclass("Section", values)(**values)

    return build(tomllib.loads(text))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"student.learning_rat": 0.1}, ["'student.learning_rat'", "did you mean student.learning_rate"]),
        ({"generator": 3}, ["unknown setting 'generator'"]),
        ({"steps": 1.5}, ["steps = 1.5", "a whole number"]),
        ({"steps": True}, ["steps = True", "a whole number"]),
        ({"machine.fused": 1}, ["machine.fused = 1", "true or false"]),
        ({"machine.device": 0}, ["machine.device = 0", "a word"]),
        ({"student.clip": "5"}, ["student.clip = '5'", "a number"]),
        ({"log_every": "often"}, ["log_every", "a whole number or auto"]),
        ({"student.loss.kl_scale": "mean"}, ["kl_scale = 'mean'", "per_class or batchmean"]),
        ({"memory.kind": "same"}, ["setting memory.kind is now replay.kind"]),
        ({"format": 1}, ["format = 1: expected 2"]),
        ({"replay.kind": ["same"]}, ["replay.kind", "same or fresh or buffer"]),
        ({"schedule.milestones": 0.5}, ["schedule.milestones = 0.5", "a list of numbers"]),
        ({"schedule.milestones": ["a"]}, ["schedule.milestones", "a list of numbers"]),
        ({"schedule.milestones": (0.5,)}, ["schedule.milestones", "multistep"]),
        ({"schedule.kind": "multistep"}, ["schedule.milestones", "set both or neither"]),
        ({"schedule.kind": "multistep", "schedule.milestones": [0.5, 0.2]}, ["increasing fractions"]),
        ({"schedule.kind": "multistep", "schedule.milestones": [0.5, 1]}, ["increasing fractions"]),
        ({"student.momentum": 0.9}, ["student.momentum", "adam"]),
        ({"replay.kind": "buffer"}, ["replay.capacity", "set both or neither"]),
        ({"replay.capacity": 3}, ["replay.capacity", "set both or neither"]),
        ({"student.loss.kl": 0.0, "student.loss.attention": 0.0}, ["all weights of student.loss are 0"]),
        ({"generator.loss.kl": 0.0}, ["all weights of generator.loss are 0"]),
        ({"student.loss.kl": 0, "student.loss.temperature": 4}, ["student.loss.temperature", "set both or neither"]),
        ({"student.loss.kl": float("nan")}, ["student.loss.kl"]),  # JSON and TOML can both say it
        ({"generator.clip": float("nan")}, ["generator.clip"]),
        ({"student.learning_rate": float("inf")}, ["student.learning_rate"]),
        *(({name: -1}, [name, "expected 0 or a positive number"]) for name in sorted(config_module._NOT_NEGATIVE)),
        *(({name: 0}, [name, "expected a positive number"]) for name in sorted(config_module._POSITIVE)),
        *(({name: -1}, [name, "expected a positive number"]) for name in sorted(config_module._POSITIVE)),
    ],
    ids=str,
)
def test_senseless_values_are_refused_in_one_line(changes: dict[str, Any], words: list[str]) -> None:
    message = refused(lambda: replace(Config(), changes), UsageError)
    assert all(word in message for word in words), message


def test_only_values_without_a_sign_of_their_own_may_be_negative() -> None:
    signed = ("generator.loss.", "student.loss.")
    checked = config_module._POSITIVE | config_module._NOT_NEGATIVE
    numbers = {name for name, value in flat(Config()).items() if type(value) in (int, float)}
    assert {name for name in numbers - checked if not name.startswith(signed)} == {"format"}
    assert checked <= set(flat(Config()))


@pytest.mark.parametrize("text", ["[generator]\nwidht = 3", "generator = 3", "steps =", "steps = 'many'"])
def test_errors_in_a_file_name_it_in_one_line(text: str) -> None:
    message = refused(lambda: from_toml(Config, text, "runs/a/config.toml"), UsageError)
    assert re.match(r"runs/a/config\.toml[: ]", message)


def test_whole_numbers_are_accepted_as_floats() -> None:
    config = replace(Config(), {"student.clip": 3, "schedule.kind": "multistep", "schedule.milestones": [0.5]})
    assert (config.student.clip, type(config.student.clip)) == (3.0, float)
    assert config.schedule.milestones == (0.5,)
    assert from_toml(Config, "[student.loss]\nattention = 1", "here").student.loss.attention == 1.0


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("steps=5", ("steps", 5)),
        ("steps = 1_000", ("steps", 1000)),
        ("student.learning_rate=1e-3", ("student.learning_rate", 1e-3)),
        ("machine.fused=false", ("machine.fused", False)),
        ("schedule.milestones=[0.2, 0.4]", ("schedule.milestones", [0.2, 0.4])),
        ("generator.width=auto", ("generator.width", "auto")),
        ('generator.width="auto"', ("generator.width", "auto")),
        ("machine.device=cuda:0", ("machine.device", "cuda:0")),
    ],
)
def test_assignments_of_the_command_line(text: str, expected: tuple[str, Any]) -> None:
    assert from_text(text) == expected
    assert type(from_text(text)[1]) is type(expected[1])
    replace(Config(), {"schedule.kind": "multistep", "schedule.milestones": [0.1]} | dict([from_text(text)]))


@pytest.mark.parametrize(("name", "text"), recipe_texts().items())
def test_recipes_hold_their_header_and_differences_only(name: str, text: str) -> None:
    header = [line for line in text.splitlines() if line.startswith("#")]
    assert re.fullmatch(r"# \S.*\.", header[0])
    assert text.splitlines()[1] == "#"
    entries = [re.match(r"# (Source|Published|Cost|Command|Here): +\S", line) for line in header]
    assert [entry[1] for entry in entries if entry] == ["Source", "Published", "Cost", "Command", "Here"]
    assert f"--recipe {name} " in text
    values = flat(tomllib_config(text))
    assert values.pop("recipe") == name == load_recipe(name).recipe
    defaults, loaded = flat(Config()), flat(load_recipe(name))
    assert {key for key in defaults if loaded[key] != defaults[key]} - {"recipe"} == set(values)


def test_no_recipe_file_is_left_out() -> None:
    assert sorted(recipe_texts()) == sorted(path.stem for path in (SOURCE / "method" / "recipes").iterdir())


@pytest.mark.parametrize("value", ["[" * 5_000, "9" * 5_000])
def test_a_value_too_long_or_too_deep_is_refused_in_a_short_line(value: str) -> None:
    message = refused(lambda: from_text(f"steps={value}"), UsageError)
    assert "shorter or less nested" in message
    assert len(message) < 200
    refused(lambda: from_toml(Config, f"steps = {value}", "here"), UsageError)
    assert len(refused(lambda: from_toml(Config, f"steps = '{'x' * 5_000}'", "here"), UsageError)) < 200
