"""The full-length runs, in slices of a few minutes on a GPU, with their state in files of at most 15 MiB.

python benchmarks/accelerator.py time --device cuda --out out
python benchmarks/accelerator.py wrn-teacher --data cifar10-train.zip cifar10-test.zip --out out --stop-after 9m
python benchmarks/accelerator.py wrn-student --data ... --state out --out next --stop-after 9m    (and so on)

Each call writes the state (`state.000`, ...), which the next one takes as --state, and `STAGE.json`, whose "finished"
tells whether the stage is complete. A finished stage also has its accuracy and, for a teacher, that of its weights
rounded to bfloat16. `--scale 0.001` rehearses everything on a CPU.
"""

import argparse
import io
import json
import shutil
import statistics
import tarfile
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from zskt import load_teacher
from zskt.bench import step_time as bench
from zskt.bench.roofline import count, peaks
from zskt.cli.main import main as zskt
from zskt.data.images import read
from zskt.evaluate.measures import measure
from zskt.run.cuda_graph import CapturedStep
from zskt.runtime import arithmetic, circumstances, pick_device, short, synchronise

PART = 15 * 2**20
"""Bytes per file of the state."""


@dataclass(frozen=True)
class Teach:
    """A teacher trained on CIFAR-10."""

    model: str
    epochs: int = 100
    batch_size: int = 512
    learning_rate: float = 0.4


@dataclass(frozen=True)
class Distil:
    """A student distilled from one of the teachers."""

    teacher: str
    student: str
    recipe: str
    steps: int


STAGES: dict[str, Teach | Distil] = {
    "wrn-teacher": Teach("wrn-40-2"),
    "wrn-student": Distil("wrn-teacher", "wrn-16-1", "zskt", 80_000),
    "resnet-teacher": Teach("resnet-34"),
    "resnet-mmrazor": Distil("resnet-teacher", "resnet-18", "zskt-mmrazor", 25_000),
    "resnet-prior": Distil("resnet-teacher", "resnet-18", "zskt-prior", 25_000),
}


def pack(work: Path, out: Path) -> None:
    """Save the folder `work` in `out`, as state.000, state.001, ..."""
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        tar.add(work, arcname=".", filter=lambda member: None if "/samples" in member.name else member)
    for index, start in enumerate(range(0, archive.tell(), PART)):
        (out / f"state.{index:03}").write_bytes(archive.getbuffer()[start : start + PART])


def unpack(state: Path, work: Path) -> None:
    """Restore in `work` what `pack` saved in `state`, if anything."""
    parts = sorted(state.glob("state.*"))
    whole = io.BytesIO(b"".join(part.read_bytes() for part in parts))
    if parts:
        with tarfile.open(fileobj=whole) as tar:
            tar.extractall(work, filter="data")


def command(stage: str, work: Path, arguments: argparse.Namespace) -> list[str]:
    """The zskt command for this stage, with --resume if it was started before."""
    plan, folder = STAGES[stage], work / stage
    begun = (folder / "checkpoint").exists()
    words = ["--out", folder, "--device", arguments.device, "--precision", arguments.precision]
    words += ["--stop-after", arguments.stop_after, *(["--resume"] if begun else [])]
    data = list(map(str, arguments.data))
    if isinstance(plan, Teach):
        settings: dict[str, Any] = {"epochs": max(1, round(plan.epochs * arguments.scale))}
        settings |= {"batch-size": plan.batch_size, "learning-rate": plan.learning_rate}
        head = ["teach", "--model", plan.model, "--data", *data]
    else:
        settings = {"steps": max(2, round(plan.steps * arguments.scale)), "student": plan.student}
        settings |= {"recipe": plan.recipe, "set": f"cuda_graph={str(arguments.graph).lower()}"}
        head = ["distill", str(work / plan.teacher), "--eval", *data]
    return [*head, *(word for name, value in settings.items() for word in (f"--{name}", str(value))), *map(str, words)]


def rounded_accuracy(folder: Path, data: list[Path]) -> float:
    """Test accuracy of a teacher with its weights rounded to bfloat16."""
    teacher = load_teacher(folder)
    for tensor in (*teacher.module.parameters(), *teacher.module.buffers()):
        if tensor.is_floating_point():
            tensor.data = tensor.data.bfloat16().float()
    test = read(list(map(str, data)), "test", size=teacher.input_size)
    return measure(teacher, test.images, test.labels)["accuracy"]


def run_stage(arguments: argparse.Namespace) -> dict[str, Any]:
    """Run one stage, or continue it."""
    stage: str = arguments.stage
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        if arguments.state is not None:
            unpack(arguments.state, work)
        words = command(stage, work, arguments)
        started = time.monotonic()
        status = zskt(words)
        kind = "teacher" if isinstance(STAGES[stage], Teach) else "student"
        metadata = work / stage / f"{kind}.json"
        result: dict[str, Any] = {"stage": stage, "status": status, "finished": metadata.exists(), **circumstances()}
        result |= {"seconds": round(time.monotonic() - started, 1), "command": " ".join(map(short, words))}
        if metadata.exists():
            result["measured"] = json.loads(metadata.read_text())["measured"]
            if kind == "teacher":
                result["accuracy_in_bfloat16"] = rounded_accuracy(work / stage, arguments.data)
        for name in ("metrics.jsonl", "student.safetensors"):
            if (work / stage / name).exists():
                shutil.copy(work / stage / name, arguments.out / f"{stage}-{name}")
        pack(work, arguments.out)
    return result


def time_steps(arguments: argparse.Namespace) -> dict[str, Any]:
    """Steps of both pairs after warm-up, launched kernel by kernel and as a CUDA graph, in fp32 and bf16."""
    device = pick_device(arguments.device)
    steps = max(2, round(2000 * arguments.scale))
    result: dict[str, Any] = {"stage": "time", "steps": steps, **circumstances()}
    pairs = {
        "wrn": bench.PAIRS["wrn"],
        "resnet": bench.Pair("resnet-34", "resnet-18", (3, 32, 32), "zskt-mmrazor", 256),
    }
    for name, pair in pairs.items():
        pair = replace(pair, batch_size=max(8, round(pair.batch_size * min(1.0, arguments.scale))))
        for precision in bench.ENGINE:
            for graph in (False, True) if device.type == "cuda" else (False,):
                matching = bench.engine(pair, precision, device)
                works = count(matching)
                step: Any = CapturedStep(matching) if graph else matching.step
                few = steps if name == "wrn" else max(2, steps // 20)
                with arithmetic():
                    for _ in range(2):
                        step()
                    synchronise(device)
                    times = []
                    for _ in range(5):
                        begun = time.perf_counter()
                        for _ in range(max(1, few // 5)):
                            step()
                        synchronise(device)
                        times.append((time.perf_counter() - begun) / max(1, few // 5))
                seconds = statistics.median(times)
                operations = sum(work.operations for work in works.values())
                rate, _ = peaks(device, torch.bfloat16 if precision == "bf16" else torch.float32)
                result[f"{name}-{precision}{'-graph' if graph else ''}"] = {
                    "seconds": seconds,
                    "minutes_for_80000": seconds * 80_000 / 60,
                    "share_of_matmul_rate": operations / seconds / rate,
                }
    return result


def main() -> None:
    """One stage, or the timing of both pairs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=["time", *STAGES])
    parser.add_argument("--data", nargs="+", type=Path, default=[], help="CIFAR-10, training and test images")
    parser.add_argument("--state", type=Path, help="the --out of an earlier call")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--precision", default="bf16", choices=["fp32", "bf16"])
    parser.add_argument("--graph", action="store_true", help="replay the step as a CUDA graph")
    parser.add_argument("--stop-after", default="9m")
    parser.add_argument(
        "--scale", type=float, default=1.0, help="factor on epochs and steps; for time, on the batch size"
    )
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    result = time_steps(arguments) if arguments.stage == "time" else run_stage(arguments)
    (arguments.out / f"{arguments.stage}.json").write_text(json.dumps(result, indent=1))
    print(json.dumps(result))


if __name__ == "__main__":
    main()
