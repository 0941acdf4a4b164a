"""A network written as a torch.export archive or an ONNX file, with its normalisation folded in, and quantised to int8.

N images of shape (C, H, W), K classes; any N. The packages of the `export` extra are imported only when needed.
`export.py` checks the files.
"""

import copy
import json
import os
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from zskt.errors import failing
from zskt.networks.classifier import Classifier
from zskt.networks.foreign import optional, quiet
from zskt.runtime import __version__

Input = Literal["fraction", "uint8", "normalised"]

INPUTS: dict[str, str] = {
    "fraction": "images in [0, 1]",
    "uint8": "images as bytes, 0..255",
    "normalised": "images in [0, 1] after (x - mean) / std",
}
CALIBRATED = 16  # images per calibration batch


def need(package: str) -> Any:
    """A package of the `export` extra, imported now; onnxruntime only after its telemetry is off."""
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # else it leaves files in the home folder
    return optional(package, "export")


def feed(network: Classifier, x: Tensor, fed: Input) -> Tensor:
    """Normalised images (N, C, H, W) as an exported network takes them, clipped to what a real image could be."""
    if fed == "normalised":
        return x.float()
    images = network.denormalise(x).float()  # (N, C, H, W) in [0, 1]
    return images if fed == "fraction" else (images * 255).round().to(torch.uint8)


class Deployed(nn.Module):
    """A network in float32 that normalises its own input, as it is exported."""

    mean: Tensor
    std: Tensor

    def __init__(self, network: Classifier, fed: Input) -> None:
        super().__init__()
        self.network = copy.deepcopy(network).float().to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
        self.fed = fed
        self.register_buffer("mean", network.mean.float().clone())
        self.register_buffer("std", network.std.float().clone())
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        x = images  # (N, C, H, W)
        if self.fed == "uint8":
            x = x.float() / 255
        if self.fed != "normalised":
            x = (x - self.mean) / self.std
        logits: Tensor = self.network(x)  # (N, K)
        return logits


def trace(network: Classifier, fed: Input) -> torch.export.ExportedProgram:
    """The network as a graph for any batch size, without the file names of this machine."""
    example = feed(network, torch.zeros(2, *network.input_size), fed)  # (2, C, H, W)
    with failing("torch.export cannot trace this network for arbitrary batch sizes", "use --format hub"), quiet():
        program = torch.export.export(
            Deployed(network, fed), (example,), dynamic_shapes={"images": {0: torch.export.Dim("batch")}}
        )
    for module in program.graph_module.modules():
        for node in module.graph.nodes if isinstance(module, torch.fx.GraphModule) else ():
            node.meta.pop("stack_trace", None)
    return program


def describe(network: Classifier, fed: Input) -> dict[str, str]:
    """The metadata inside an exported file; lists are JSON."""
    return {
        "zskt_version": __version__,
        "input": f"{fed}: {INPUTS[fed]}",
        "input_size": json.dumps(list(network.input_size)),
        "mean": json.dumps(network.mean.flatten().tolist()),
        "std": json.dumps(network.std.flatten().tolist()),
        "class_names": json.dumps(network.class_names or [str(k) for k in range(network.num_classes)]),
    }


def write_pt2(path: Path, network: Classifier, fed: Input) -> None:
    """A torch.export archive; `zskt.json` in it holds what `describe` returns."""
    with quiet():
        torch.export.save(trace(network, fed), path, extra_files={"zskt.json": json.dumps(describe(network, fed))})


def write_onnx(path: Path, network: Classifier, fed: Input) -> None:
    """An ONNX file with input "images" and output "logits"; its metadata hold what `describe` returns."""
    program = trace(network, fed)
    with failing("torch.onnx cannot convert this network", "use --format pt2 or hub"), quiet():
        converted = torch.onnx.export(
            program,
            (),
            dynamo=True,
            input_names=["images"],
            output_names=["logits"],
            dynamic_shapes={"images": {0: "batch"}},
            verbose=False,
        )
        assert converted is not None
        for node in converted.model.graph.all_nodes():
            node.metadata_props.clear()  # where in our source it came from
        converted.model.metadata_props.update(describe(network, fed))
        converted.save(path, external_data=False)


def quantise(plain: Path, path: Path, images: Tensor) -> None:
    """Static int8 quantisation of an ONNX file, per channel, its ranges taken from images (N, C, H, W) as it is fed.

    Activations become uint8, which onnxruntime computes fastest on x86; the 99.999th percentile bounds them, since a
    generator's images have outliers.
    """
    onnx, quantization = need("onnx"), need("onnxruntime.quantization")
    batches = torch.split(images, CALIBRATED)

    class Reader(quantization.CalibrationDataReader):  # type: ignore[misc, name-defined]
        def __len__(self) -> int:
            return len(batches)

        def set_range(self, start_index: int, end_index: int) -> None:
            self.rest = iter(batches[start_index:end_index])

        def get_next(self) -> dict[str, Any] | None:
            batch = next(self.rest, None)
            return None if batch is None else {"images": batch.numpy()}

    prepared = plain.with_name("prepared.onnx")
    with failing("onnxruntime cannot quantise this network", "leave --int8 out"), quiet():
        quantization.quant_pre_process(plain, prepared, skip_symbolic_shape=True)
        quantization.quantize_static(
            prepared,
            path,
            Reader(),
            quant_format=quantization.QuantFormat.QDQ,
            per_channel=True,
            activation_type=quantization.QuantType.QUInt8,
            weight_type=quantization.QuantType.QInt8,
            calibrate_method=quantization.CalibrationMethod.Percentile,
            extra_options={"CalibStridedMinMax": 1},  # one batch at a time: it keeps every layer's output
        )
        model = onnx.load(path)
        onnx.helper.set_model_props(model, {p.key: p.value for p in onnx.load(plain).metadata_props})
        onnx.save(model, path)


def open_onnx(path: Path) -> Any:
    """An onnxruntime session on one thread of the CPU."""
    runtime = need("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3  # errors
    return runtime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
