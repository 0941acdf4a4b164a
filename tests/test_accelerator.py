"""benchmarks/accelerator.py, rehearsed: the full-length runs at a thousandth of their length, state in small parts."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from small import coloured, write_images
from zskt.run.checkpoint import read_lines

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "accelerator.py"


def call(*arguments: object) -> dict[str, Any]:
    done = subprocess.run([sys.executable, SCRIPT, *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Sixty images of CIFAR-10's size for training and as many for testing."""
    train, test = (coloured(60, classes=10, size=(3, 32, 32), seed=seed) for seed in (0, 1))
    return write_images(tmp_path / "images", train=train, test=test)


@pytest.mark.slow
def test_teacher_and_student_in_slices(images: Path, tmp_path: Path) -> None:
    common = ["--data", images, "--device", "cpu", "--scale", "0.001"]
    taught = call("wrn-teacher", *common, "--out", tmp_path / "0", "--precision", "fp32")
    assert taught["finished"]
    assert 0 <= taught["accuracy_in_bfloat16"] <= 1
    student = ["wrn-student", *common, "--state"]
    first = call(*student, tmp_path / "0", "--out", tmp_path / "1", "--stop-after", "30")
    assert (first["finished"], first["status"]) == (False, 0)
    second = call(*student, tmp_path / "1", "--out", tmp_path / "2", "--stop-after", "9m")
    assert second["finished"]
    lines = read_lines(tmp_path / "2" / "wrn-student-metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, 81))
    for path in (tmp_path / "1").iterdir():
        assert path.stat().st_size <= 16 * 2**20


@pytest.mark.slow
def test_the_large_pair_at_two_steps(images: Path, tmp_path: Path) -> None:
    common = ["--data", images, "--device", "cpu", "--scale", "0.00004"]
    assert call("resnet-teacher", *common, "--out", tmp_path / "0")["finished"]
    assert len(list((tmp_path / "0").glob("state.*"))) > 4  # 85 MB
    for index, stage in enumerate(("resnet-mmrazor", "resnet-prior")):
        out = tmp_path / str(index + 1)
        found = call(stage, *common, "--state", tmp_path / str(index), "--out", out)
        assert found["finished"]
        assert 0 <= found["measured"]["accuracy"] <= 1
        assert (out / f"{stage}-student.safetensors").exists()


@pytest.mark.slow
def test_timing(tmp_path: Path) -> None:
    found = call("time", "--device", "cpu", "--scale", "0.001", "--out", tmp_path)
    for name in ("wrn-fp32", "wrn-bf16", "resnet-fp32", "resnet-bf16"):
        assert found[name]["seconds"] > 0
        assert 0 < found[name]["share_of_matmul_rate"] < 1
