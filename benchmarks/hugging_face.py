"""A foreign classifier end to end: a transformers ResNet trained on MNIST, saved, distilled and deployed.

python benchmarks/hugging_face.py MNIST-FOLDER     (about a quarter of an hour on two cores)

The training uses only torch and transformers, and everything after it the `zskt` commands that a user would type, and
onnxruntime on the raw test images. Three seeds of the distillation, the last iterate of each.
"""

import argparse
import contextlib
import io
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from rich.progress import track

import record
from zskt.cli.main import main as zskt
from zskt.data.images import read
from zskt.deploy.formats import need

SEEDS = (0, 1, 2)
EPOCHS, BATCH = 4, 128


def train(folder: Path, images: torch.Tensor, labels: torch.Tensor) -> None:
    """A transformers ResNet for images (M, 1, 28, 28), saved by `save_pretrained`."""
    transformers = need("transformers")
    torch.manual_seed(0)
    config = transformers.ResNetConfig(
        num_channels=1,
        embedding_size=32,
        hidden_sizes=[32, 64, 128],
        depths=[1, 1, 1],
        layer_type="basic",
        num_labels=10,
    )
    model = transformers.ResNetForImageClassification(config).train()
    steps = EPOCHS * (len(images) // BATCH)
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 3e-3, total_steps=steps)
    order = torch.cat([torch.randperm(len(images))[: steps // EPOCHS * BATCH] for _ in range(EPOCHS)])
    for chosen in track(order.split(BATCH), "training the classifier"):
        x = (images[chosen].float() / 255 - 0.5) / 0.5  # (N, 1, 28, 28)
        loss = F.cross_entropy(model(x).logits, labels[chosen])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    model.eval().save_pretrained(folder)
    processor = {"do_resize": True, "size": {"height": 28, "width": 28}, "do_rescale": True, "rescale_factor": 1 / 255}
    processor |= {"do_normalize": True, "image_mean": [0.5], "image_std": [0.5]}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))


def run(*arguments: object) -> dict[str, Any]:
    """The JSON that a zskt command prints."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        status = zskt([str(argument) for argument in arguments])
    if status:
        raise SystemExit(status)
    result: dict[str, Any] = json.loads(out.getvalue())
    return result


def deployed_accuracy(path: Path, images: torch.Tensor, labels: torch.Tensor) -> float:
    """Accuracy of an ONNX file on uint8 images (M, 1, 28, 28), through onnxruntime alone."""
    session = need("onnxruntime").InferenceSession(path, providers=["CPUExecutionProvider"])
    logits = np.concatenate([session.run(["logits"], {"images": batch.numpy()})[0] for batch in images.split(500)])
    return float((logits.argmax(axis=1) == labels.numpy()).mean())


def main() -> None:
    """Train, inspect, distil, evaluate, export; write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path, help="folder with MNIST's original files")
    parser.add_argument("--steps", type=int, default=1000)
    arguments = parser.parse_args()
    test = read([str(arguments.data)], "test")
    rows, seeds = [], []
    with tempfile.TemporaryDirectory() as scratch:
        folder, source = Path(scratch), read([str(arguments.data)], "train")
        train(folder / "classifier", source.images, source.labels)
        inspected = run("inspect", folder / "classifier", "--student", "auto:0.25")
        teacher = run("evaluate", folder / "classifier", "--data", arguments.data)
        for seed in SEEDS:
            out = folder / f"run-{seed}"
            command = ["distill", folder / "classifier", "--student", "auto:0.25", "--steps", arguments.steps]
            distilled = run(*command, "--seed", seed, "--out", out)
            found = run("evaluate", out, "--data", arguments.data, "--teacher", folder / "classifier")
            files = {"fp32": folder / f"{seed}.onnx", "int8": folder / f"{seed}-int8.onnx"}
            exports = {
                name: run(
                    *("export", out, "--format", "onnx", "--input", "uint8", "--out", path),
                    *(["--int8"] if name == "int8" else ["--teacher", folder / "classifier"]),
                )
                for name, path in files.items()
            }
            accuracy = {name: deployed_accuracy(path, test.images, test.labels) for name, path in files.items()}
            seeds.append({"distill": distilled, "evaluate": found, "exports": exports, "onnxruntime": accuracy})
            values = found["accuracy"], found["agreement"], accuracy["fp32"], accuracy["int8"]
            rows.append([str(seed), f"{teacher['accuracy']:.4f}", *(f"{value:.4f}" for value in values)])
    columns = list(zip(*(map(float, row[2:]) for row in rows), strict=True))
    spread = [f"{statistics.fmean(column):.4f} ± {statistics.stdev(column):.4f}" for column in columns]
    rows.append(["mean ± std", rows[0][1], *spread])
    sizes = [f"{inspected[key]:,}" for key in ("parameters", "student_parameters")]
    record.write(
        "hugging-face",
        f"MNIST, a ResNet of transformers ({sizes[0]} parameters) -> auto:0.25 ({sizes[1]}), recipe "
        f"{inspected['recipe']}, {arguments.steps:,} steps",
        {"inspect": inspected, "teacher": teacher, "seeds": seeds},
        ["seed", "teacher", "student", "agreement", "ONNX, uint8 input", "int8 ONNX, uint8 input"],
        rows,
    )


if __name__ == "__main__":
    main()
