"""One flipped bit in any file of a run is noticed or does no harm."""

import functools
import json
import random
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import zskt
from small import refused
from torture import RUNS, outcome
from zskt.files import CHECKSUM, read_tensors, write_tensors
from zskt.networks.folder import load_network
from zskt.run.checkpoint import HALF_WAY
from zskt.run.distill import begun_config, sampler
from zskt.run.report import METADATA, read_run


def flip(path: Path, position: int, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1 << bit
    path.write_bytes(content)


def places(folder: Path, count: int) -> Iterator[tuple[Path, int, int]]:
    """About `count` bits of every file, half of them in its first kilobyte, where headers are."""
    rng = random.Random(0)
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        size = path.stat().st_size
        for i in range(min(count, 8 * size)):
            yield path, rng.randrange(min(size, 1_000) if i % 2 else size), rng.randrange(8)


def use(folder: Path) -> list[Any]:
    """All that is made of a finished run or teacher."""
    network = load_network(folder)
    found: list[Any] = [list(network.state_dict().items()), network.class_names, network.input_size]
    if (folder / "student.json").exists():
        run = read_run(folder)
        shown = [run["metadata"].get(name) for name in (*METADATA, "measured", "warnings", "class_names")]
        found += [sampler(folder, network)(4, 0), run["config"], run["lines"], shown]
    return found


def same(first: Any, second: Any) -> bool:
    if isinstance(first, torch.Tensor):
        return torch.equal(first, second)
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(map(same, first, second))
    return bool(first == second)


COUNTS = [pytest.param(4, id="short"), pytest.param(25, id="long", marks=pytest.mark.slow)]


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("kind", RUNS)
def test_a_flipped_bit_of_a_finished_run_is_noticed_or_harmless(kind: str, count: int, tmp_path: Path) -> None:
    RUNS[kind](tmp_path / "run")
    whole = use(tmp_path / "run")
    ended: Counter[str] = Counter()
    for path, position, bit in places(tmp_path / "run", count):
        flip(path, position, bit)
        try:
            found = use(tmp_path / "run")
        except zskt.ZsktError:
            ended["noticed"] += 1
        else:
            assert same(found, whole), (path.name, position, bit)
            ended["harmless"] += 1
        flip(path, position, bit)
    print(f"{kind}, finished: {dict(ended)}")
    assert ended["noticed"] > 0


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("kind", RUNS)
def test_a_flipped_bit_of_an_interrupted_run_is_noticed_or_harmless(kind: str, count: int, tmp_path: Path) -> None:
    RUNS[kind](tmp_path / "whole")
    RUNS[kind](tmp_path / "kept", stop_after=5)
    whole = outcome(tmp_path / "whole")
    ended: Counter[str] = Counter()
    for path, position, bit in places(tmp_path / "kept", count):
        shutil.copytree(tmp_path / "kept", tmp_path / "run")
        flip(tmp_path / "run" / path.relative_to(tmp_path / "kept"), position, bit)
        try:
            RUNS[kind](tmp_path / "run", resume=True)
        except zskt.ZsktError:
            ended["noticed"] += 1
        else:
            found = outcome(tmp_path / "run")
            differing = {name for name in whole.keys() | found if whole.get(name) != found.get(name)}
            later = set()  # what is not read before the run is looked at, and has a checksum of its own
            if path.suffix == ".png":
                later = {f"samples/{path.name}"}
            elif path.stem == HALF_WAY:
                later = {path.name}
                if differing:
                    refused(functools.partial(read_tensors, tmp_path / "run" / path.name))
            assert differing <= later, (path, position, bit)
            ended["harmless"] += 1
        shutil.rmtree(tmp_path / "run")
    print(f"{kind}, interrupted: {dict(ended)}")
    assert ended["noticed"] + ended["harmless"] > count


def damage(path: Path) -> None:
    flip(path, path.stat().st_size - 20, 3)


@pytest.mark.parametrize("kind", RUNS)
def test_of_two_checkpoints_a_damaged_one_is_passed_over_and_two_are_refused(kind: str, tmp_path: Path) -> None:
    RUNS[kind](tmp_path / "whole")
    RUNS[kind](tmp_path / "run", stop_after=5)
    older, newest = sorted((tmp_path / "run" / "checkpoint").iterdir())
    damage(newest)
    shutil.copytree(tmp_path / "run", tmp_path / "both")
    result = RUNS[kind](tmp_path / "run", resume=True, stop_after=2)
    (line,) = (line for line in result.warnings if "damaged" in line)
    assert line == f"{newest} is damaged: it does not match its checksum; resumed from step {int(older.stem)} instead"
    whole = [int(path.stem) for path in (tmp_path / "run" / "checkpoint").iterdir()]
    assert sorted(whole) == [4, 6]  # two generations again, both whole
    RUNS[kind](tmp_path / "run", resume=True)
    assert outcome(tmp_path / "run") == outcome(tmp_path / "whole")
    damage(tmp_path / "both" / "checkpoint" / older.name)
    words = refused(lambda: RUNS[kind](tmp_path / "both", resume=True))
    assert words.startswith(
        f"{tmp_path / 'both' / 'checkpoint' / newest.name} is damaged: it does not match its checksum"
    )
    assert words.endswith("restore it from a copy, or start again with another --out")


def test_damaged_rows_of_the_newest_checkpoint_lead_to_the_one_before(tmp_path: Path) -> None:
    RUNS["bank"](tmp_path / "whole")
    RUNS["bank"](tmp_path / "run", stop_after=4)
    before = set((tmp_path / "run" / "rows").iterdir())
    RUNS["bank"](tmp_path / "run", resume=True, stop_after=1)
    (new,) = set((tmp_path / "run" / "rows").iterdir()) - before
    damage(new)
    RUNS["bank"](tmp_path / "run", resume=True)
    assert outcome(tmp_path / "run") == outcome(tmp_path / "whole")


def test_what_was_written_without_checksums_is_read(tmp_path: Path) -> None:
    """Files of other programs, and of the first days of this format."""
    RUNS["belief matching"](tmp_path / "whole")
    RUNS["belief matching"](tmp_path / "run", stop_after=5)
    for path in (tmp_path / "run" / "checkpoint").iterdir():
        tensors, texts = read_tensors(path)
        metadata = json.loads(texts["metadata"])
        for name in ("metrics_sha256", "timing_sha256"):
            del metadata[name]
        del metadata["identity"]["settings"]
        save_file(tensors, path, {"metadata": json.dumps(metadata)})
    RUNS["belief matching"](tmp_path / "run", resume=True)
    assert outcome(tmp_path / "run") == outcome(tmp_path / "whole")
    whole = use(tmp_path / "run")
    for name in ("student", "generator"):
        save_file(load_file(tmp_path / "run" / f"{name}.safetensors"), tmp_path / "run" / f"{name}.safetensors")
    facts = json.loads((tmp_path / "run" / "student.json").read_text())
    del facts[CHECKSUM], facts["files"]
    (tmp_path / "run" / "student.json").write_text(json.dumps(facts))
    assert same(use(tmp_path / "run")[:4], whole[:4])


def test_an_edited_description_says_how_it_is_meant(tmp_path: Path) -> None:
    RUNS["teach"](tmp_path / "teacher")
    path = tmp_path / "teacher" / "teacher.json"
    path.write_text(path.read_text().replace("0.2", "0.25"))
    assert "not as it was written" in (words := refused(lambda: load_network(tmp_path / "teacher")))
    assert words.endswith(f'delete its line "{CHECKSUM}"')
    path.write_text("\n".join(line for line in path.read_text().splitlines() if CHECKSUM not in line))
    assert load_network(tmp_path / "teacher").mean.item() == 0.25


def test_settings_that_the_checkpoint_does_not_have_are_refused(tmp_path: Path) -> None:
    """Some are taken from config.toml on resume, so that comparing with it is not enough."""
    RUNS["belief matching"](tmp_path / "run", stop_after=5)
    path = tmp_path / "run" / "checkpoint" / "00000005.safetensors"
    tensors, texts = read_tensors(path)
    metadata = json.loads(texts["metadata"])
    assert metadata["identity"]["settings"]["steps"] == 6
    metadata["identity"]["settings"]["steps"] = 7
    write_tensors(path, tensors, {"metadata": json.dumps(metadata)})
    assert "differs in settings" in refused(lambda: RUNS["belief matching"](tmp_path / "run", resume=True))


def test_a_run_that_begins_anew_takes_nothing_from_its_old_settings(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text("damaged")
    assert begun_config(tmp_path) is None
