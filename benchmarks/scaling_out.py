"""What several processes cost and gain: two on this machine, and what their messages would mean for more.

python benchmarks/scaling_out.py [--pairs wrn resnet] [--rounds 5]     (about ten minutes on two cores)

Measured, at the pair's batch in fp32: a step of one process with two threads and of two processes with one thread each,
in turns; the messages of a step and their bytes, counted where they are sent, and the bytes that the loopback device
moved. Beside them the bytes that follow from the networks' sizes alone.

Computed, not measured: efficiency at up to 64 devices, from the operations of a step, the counted messages, and the
stated speed of a device and of the links between them (a ring: each device sends 2 (R - 1) / R of a message, in
2 (R - 1) pieces); and the batch per device at which messages take a tenth of the time.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import record
from zskt.bench.step_time import PAIRS, Pair
from zskt.method.build import arrange, belief_matching
from zskt.method.matching import BeliefMatching
from zskt.method.recipe import load_recipe
from zskt.networks import models, ranks
from zskt.networks.checks import as_teacher
from zskt.networks.classifier import Classifier
from zskt.networks.observe import batchnorm_layers
from zskt.networks.synchronised import synchronise
from zskt.runtime import arithmetic, seeded
from zskt.settings import replace

DEVICES = [2, 4, 8, 16, 32, 64]
LINKS = {"10 Gbit/s Ethernet": (1.25e9, 30e-6), "NVLink": (300e9, 10e-6)}
"""Bytes per second and seconds per piece of a message."""
SPEED = 10e12
"""Operations per second that a device attains: stated, of the order of a tenth of a data-centre GPU's in bf16."""


def build(pair: Pair, batch: int) -> tuple[BeliefMatching, Classifier, nn.Module]:
    changes = {"batch_size": batch, "steps": 1_000_000, "generator.width": 128}
    config = replace(load_recipe(pair.recipe), changes)
    with seeded(0):
        module, student = (models.build(spec, 10, pair.input_size) for spec in (pair.teacher, pair.student))
        middle, spread = [0.5] * pair.input_size[0], [0.25] * pair.input_size[0]
        teacher = as_teacher(Classifier(module, input_size=pair.input_size, mean=middle, std=spread))
        for network in (teacher, student):
            arrange(network, config)
        synchronise(student, "student")
        return belief_matching(teacher, student, config), teacher, student


def counted() -> dict[str, int]:
    """Counters of messages and of bytes handed to them, from here on."""
    found = {"messages": 0, "bytes": 0}

    def watch(send: Callable[..., Any], which: int) -> Callable[..., Any]:
        def sent(*arguments: Any) -> Any:
            found["messages"] += 1
            found["bytes"] += arguments[which].nbytes
            return send(*arguments)

        return sent

    dist.all_reduce, dist.all_gather = watch(dist.all_reduce, 0), watch(dist.all_gather, 1)
    return found


def loopback() -> int:
    """Bytes that the loopback device has moved."""
    line = next(line for line in Path("/proc/net/dev").read_text().splitlines() if line.strip().startswith("lo:"))
    return int(line.split(":")[1].split()[0])


def work(pair: Pair, steps: int) -> dict[str, Any]:
    """Seconds of steps, and what was sent in them, in this process."""
    torch.set_num_threads(1 if ranks.started() else 2)
    with ranks.joined(), arithmetic():
        method, _, _ = build(pair, pair.batch_size)
        method.step()
        found, before = counted(), loopback()
        seconds = []
        for _ in range(steps):
            begun = time.perf_counter()
            method.step()
            ranks.most(0)  # as a run does, which asks whether to stop
            seconds.append(time.perf_counter() - begun)
        return {
            "seconds": seconds,
            "messages": found["messages"] / steps,
            "bytes": found["bytes"] / steps,
            "loopback": (loopback() - before) / steps,
        }


def formula(pair: Pair, count: int) -> dict[str, int]:
    """Messages of a step on `count` devices, and their bytes, from the sizes of the networks.

    A gradient is one message, with the loss and its terms. A BatchNorm layer in training mode sends 2 C numbers forward
    and gets R x 2 C back; without gradients, only the first.
    """
    method, _, student = build(pair, 2)
    generator, learner = method.generator_updates, method.student_updates
    layers = {name: batchnorm_layers(module) for name, module in (("g", method.generator), ("s", student))}
    channels = {name: sum(layer.num_features for layer in each) for name, each in layers.items()}

    def gradient(updates: Any) -> int:
        return 4 * (sum(p.numel() for p in updates.parameters) + 1 + len(updates.loss))

    forward = {name: 4 * 2 * c for name, c in channels.items()}
    both = {name: 4 * 2 * c * (1 + count) for name, c in channels.items()}
    nets = len(layers["g"]), len(layers["s"])
    n_g, n_s = generator.count, learner.count
    draws = n_s if method.replay.__class__.__name__ == "Fresh" else 1
    messages = n_g * (1 + 2 * sum(nets)) + draws * nets[0] + n_s * (1 + 2 * nets[1]) + 1
    size = n_g * (gradient(generator) + sum(both.values())) + draws * forward["g"]
    size += n_s * (gradient(learner) + both["s"]) + 8
    return {"messages": messages, "bytes": size}


def operations(pair: Pair) -> int:
    """Operations of a step for one image of the batch."""
    method, _, _ = build(pair, 2)
    with FlopCounterMode(display=False) as counter:
        method.step()
    return int(counter.get_total_flops()) // 2


def efficiency(pair: Pair, count: int, batch: float, per_image: int, link: tuple[float, float]) -> float:
    """Share of the time of a step that is computation, with `batch` images on each of `count` devices."""
    speed, latency = link
    sent = formula(pair, count)
    compute = batch * per_image / SPEED
    pieces = 2 * (count - 1)
    talk = sent["bytes"] * pieces / count / speed + sent["messages"] * pieces * latency
    return compute / (compute + talk)


def measured(pair: str, rounds: int, steps: int) -> dict[str, Any]:
    """One process and two, in turns."""
    script = [str(Path(__file__)), "--worker", pair, "--steps", str(steps)]
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    arms: dict[str, list[dict[str, Any]]] = {"one": [], "two": []}
    for _ in range(rounds):
        for arm, command in (("one", script), ("two", [*launch, *script])):
            with tempfile.TemporaryDirectory() as folder:
                words = [sys.executable, *command, "--out", f"{folder}/found.json"]
                threads = {"OMP_NUM_THREADS": "2" if arm == "one" else "1"}
                subprocess.run(words, check=True, env={**os.environ, **threads})
                arms[arm].append(json.loads(Path(folder, "found.json").read_text()))
    seconds = {arm: [statistics.median(each["seconds"]) for each in found] for arm, found in arms.items()}
    ratios = [one / two for one, two in zip(seconds["one"], seconds["two"], strict=True)]
    last = arms["two"][-1]
    return {
        "seconds_one_process": statistics.median(seconds["one"]),
        "seconds_two_processes": statistics.median(seconds["two"]),
        "speedup": statistics.median(ratios),
        "speedup_from_to": [min(ratios), max(ratios)],
        "messages": last["messages"],
        "bytes": last["bytes"],
        "loopback_bytes": last["loopback"],
    }


def main() -> None:
    """Measure, compute, and write the dated table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", nargs="+", default=["wrn", "resnet"], choices=["wrn", "resnet", "digits"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        found = work(PAIRS[arguments.worker], arguments.steps)
        if os.environ.get("RANK", "0") == "0":
            arguments.out.write_text(json.dumps(found))
        os._exit(0)  # torch's threads may abort a process while it is taken down
    result: dict[str, Any] = {}
    rows = []
    for name in arguments.pairs:
        pair = PAIRS[name]
        here = measured(name, arguments.rounds, arguments.steps)
        expected, per_image = formula(pair, 2), operations(pair)
        computed = {
            link: {
                "efficiency": {
                    str(count): round(efficiency(pair, count, pair.batch_size, per_image, speeds), 4)
                    for count in DEVICES
                },
                "batch_for_a_tenth": next(
                    (b for b in (2**k for k in range(24)) if efficiency(pair, 8, b, per_image, speeds) >= 0.9), None
                ),
            }
            for link, speeds in LINKS.items()
        }
        result[name] = {
            "measured": here,
            "formula": expected,
            "operations_per_image": per_image,
            "computed": {"device_operations_per_second": SPEED, "batch_per_device": pair.batch_size, **computed},
        }
        low, high = here["speedup_from_to"]
        label = f"{pair.teacher} -> {pair.student}, batch {pair.batch_size}"
        rows += [
            [label, "seconds of a step, 1 process x 2 threads", f"{here['seconds_one_process']:.3f}", "measured"],
            ["", "2 processes x 1 thread", f"{here['seconds_two_processes']:.3f}", "measured"],
            ["", "speed-up", f"{here['speedup']:.2f} ({low:.2f} to {high:.2f})", "measured, in turns"],
            ["", "messages of a step", f"{here['messages']:.0f}, by formula {expected['messages']}", "counted"],
            ["", "MB of a step", f"{here['bytes'] / 1e6:.3f}, by formula {expected['bytes'] / 1e6:.3f}", "counted"],
            ["", "MB over loopback", f"{here['loopback_bytes'] / 1e6:.3f}", "measured"],
        ]
        for link, found in computed.items():
            curve = ", ".join(f"{count}: {100 * value:.0f} %" for count, value in found["efficiency"].items())
            rows.append(["", f"efficiency by devices, {link}", curve, "computed"])
            batch = found["batch_for_a_tenth"]
            rows.append(["", f"batch per device for 10 % messages, 8 devices, {link}", str(batch), "computed"])
    record.write("scaling-out", "One run on several processes", result, ["pair", "what", "value", "how"], rows)


if __name__ == "__main__":
    main()
