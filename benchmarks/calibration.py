"""int8 quantisation of a teacher by onnxruntime, calibrated on real images, on those of zskt images, and on noise.

zskt images TEACHER --out images --count 128
python benchmarks/calibration.py TEACHER images --data cifar10-train-1.zip cifar10-train-2.zip cifar10-test.zip

As many real training images and noises are used as there are synthetic images.
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import record
from zskt.data.images import read
from zskt.deploy.formats import open_onnx, quantise, write_onnx
from zskt.evaluate.measures import accuracy
from zskt.networks.loading import load_teacher


def measured(path: Path, images: Tensor, labels: Tensor) -> tuple[float, Tensor]:
    """Accuracy of an ONNX file on images (M, C, H, W) as bytes, and its predictions (M,)."""
    session = open_onnx(path)
    batches = [session.run(["logits"], {"images": (batch.float() / 255).numpy()})[0] for batch in images.split(500)]
    logits = torch.from_numpy(np.concatenate(batches))  # (M, K)
    return accuracy(logits, labels), logits.argmax(dim=1)


def main() -> None:
    """Quantise three times, measure each on all test images, record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("teacher")
    parser.add_argument("images", type=Path)
    parser.add_argument("--data", nargs="+", required=True)
    arguments = parser.parse_args()
    network = load_teacher(arguments.teacher)
    train = read(arguments.data, "train", size=network.input_size)
    test = read(arguments.data, "test", size=network.input_size)
    with np.load(arguments.images / "images.npz") as arrays:
        synthetic = torch.from_numpy(arrays["images"])  # (R, C, H, W)
    rng = torch.Generator().manual_seed(0)
    drawn = torch.randperm(len(train.images), generator=rng)[: len(synthetic)]
    calibration = {
        "real training images": train.images[drawn].float() / 255,
        "zskt images, no data": synthetic,
        "uniform noise": torch.rand(synthetic.shape, generator=rng),
    }
    with tempfile.TemporaryDirectory() as folder:
        plain = Path(folder) / "fp32" / "teacher.onnx"
        plain.parent.mkdir()
        write_onnx(plain, network, "fraction")
        exact, before = measured(plain, test.images, test.labels)
        result = {"fp32": {"accuracy": exact, "bytes": plain.stat().st_size}}
        rows = [["fp32, not quantised", f"{exact:.4f}", ""]]
        for number, (name, images) in enumerate(calibration.items()):
            path = Path(folder) / f"{number}.onnx"
            quantise(plain, path, images)
            found, after = measured(path, test.images, test.labels)
            kept = float((before == after).double().mean())
            result[name] = {"accuracy": found, "agreement": kept, "bytes": path.stat().st_size}
            rows.append([f"int8, {name}", f"{found:.4f}", f"{kept:.4f}"])
    title = f"int8 of {Path(arguments.teacher).name} on {train.name}, calibrated on {len(synthetic)} images"
    head = ["calibrated on", f"accuracy on {len(test.images):,} test images", "agreement with fp32"]
    record.write(f"calibration-{train.name}", title, {"images": len(synthetic), **result}, head, rows)


if __name__ == "__main__":
    main()
