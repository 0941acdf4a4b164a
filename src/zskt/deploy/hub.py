"""A network as a folder in the Hugging Face layout: weights, config, preprocessing and model card. Nothing pickled.

A network of the transformers library becomes a folder that transformers loads by itself; any other is read by zskt
(`Classifier.from_pretrained`, `load_student`). Written without a network connection.
"""

import html
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from zskt.errors import printable
from zskt.files import read_json, write_json, write_tensors, write_text
from zskt.networks.checks import bare
from zskt.networks.classifier import Classifier
from zskt.networks.folder import HUB_TYPE, describe_network
from zskt.networks.foreign import quiet
from zskt.networks.rebuild import without_code
from zskt.run.report import MEASURES
from zskt.runtime import __version__

_TEXTS = ("recipe", "reason", "teacher_fingerprint", "teacher_model", "imported_from", "sha256", "how")
_NUMBERS = ("step", "steps", "seed", "seconds", "teacher_parameters", "images")


def write_hub(folder: Path, network: Classifier, metadata: Mapping[str, Any]) -> None:
    """Write config.json, model.safetensors, preprocessor_config.json and README.md; it says what `metadata` lacks."""
    described = {**known_metadata(metadata), **describe_network(network)}
    described["rebuild"] = _without_folder(described["rebuild"])
    names = network.class_names or [str(k) for k in range(network.num_classes)]
    labels: dict[str, Any] = {
        "id2label": {str(k): name for k, name in enumerate(names)},
        "label2id": {name: k for k, name in enumerate(names)},
    }
    path = folder / "config.json"
    if "transformers" in described["rebuild"]:
        module: Any = bare(network.module)
        with quiet():
            module.save_pretrained(folder)
        config = without_code(read_json(path), path) | (labels if network.class_names else {})
    else:
        write_tensors(folder / "model.safetensors", bare(network.module).state_dict(), {"format": "pt"})
        architecture = printable(type(bare(network.module)).__name__)
        config = {"model_type": HUB_TYPE, "architectures": [architecture], **labels, **described}
        config["zskt_version"] = __version__
    channels, height, width = network.input_size
    preprocessing = {
        "image_processor_type": "ViTImageProcessor",  # the plain one: resize, rescale, normalise
        "do_resize": True,
        "size": {"height": height, "width": width},
        "resample": 2,  # bilinear
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": network.mean.flatten().tolist(),
        "image_std": network.std.flatten().tolist(),
        "do_convert_rgb": channels == 3,
    }
    write_json(folder / "preprocessor_config.json", preprocessing)
    write_text(folder / "README.md", model_card(folder.name, network, described))
    write_json(path, config)


def known_metadata(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The entries that zskt writes, if they have the right type: a folder may come from anywhere."""
    known: dict[str, Any] = {name: printable(metadata[name]) for name in _TEXTS if isinstance(metadata.get(name), str)}
    known |= {name: value for name in _NUMBERS if _finite(value := metadata.get(name))}
    measured, warnings, versions = (metadata.get(name) for name in ("measured", "warnings", "versions"))
    if isinstance(measured, dict):
        known["measured"] = {name: measured[name] for name in MEASURES if _finite(measured.get(name))}
    if isinstance(warnings, list):
        known["warnings"] = [printable(line) for line in warnings if isinstance(line, str)]
    if isinstance(versions, dict):
        known["versions"] = {
            name: printable(versions[name]) for name in ("zskt", "torch", "python") if name in versions
        }
    return known


def _finite(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 1e18


def model_card(name: str, network: Classifier, described: Mapping[str, Any]) -> str:
    """README.md: what the network is, where it comes from, what was measured and what was not, how to load it."""
    how: Mapping[str, Any] = described["rebuild"]
    kind, what = next(iter(how.items()))
    own = described.get("images")
    data_free = described.get("recipe") and not own
    header = {
        "library_name": "transformers" if kind == "transformers" else "zskt",
        "pipeline_tag": "image-classification",
        "tags": ["zskt", "image-classification", *(["data-free-distillation"] if data_free else [])],
    }
    size, names = " x ".join(map(str, network.input_size)), network.class_names
    model = what if kind == "spec" else f"{what} ({'Python object' if kind == 'python' else kind})"
    rows = {
        "network": model,
        "parameters": f"{described['parameters']:,}",
        "images": f"{size} (channels, height, width)",
        "classes": f"{network.num_classes:,}" + (f": {', '.join(names)}" if names and len(names) <= 20 else ""),
        "mean, for pixels in [0, 1]": ", ".join(f"{m:g}" for m in network.mean.flatten().tolist()),
        "standard deviation": ", ".join(f"{s:g}" for s in network.std.flatten().tolist()),
    }
    parameters = described.get("teacher_parameters")
    origin = {
        "teacher": described.get("teacher_model"),
        "teacher parameters": None if parameters is None else f"{parameters:,}",
        "teacher fingerprint (SHA-256)": described.get("teacher_fingerprint"),
        "recipe": described.get("recipe"),
        "why this recipe": described.get("reason"),
        "steps": None if described.get("steps") is None else f"{described.get('step', described['steps']):,}",
        "seed": described.get("seed"),
    }
    found = described.get("measured") or {}
    measures = MEASURES if origin["recipe"] else {"accuracy": "accuracy", "calibration_error": "calibration error"}
    measured = {label: f"{found[key]:.4f}" if key in found else "not measured" for key, label in measures.items()}
    distilled = "Distilled from its teacher without any data, by zero-shot knowledge transfer."
    if own:
        distilled = f"Distilled from its teacher on pseudo images and {own:,} unlabelled images, so not without data."
    paragraphs = [
        "\n".join(["---", *(f"{key}: {json.dumps(value)}" for key, value in header.items()), "---"]),
        f"# {name}",
        f"An image classifier. {distilled}" if origin["recipe"] else "An image classifier.",
        _table("network", rows),
        "## Where it comes from",
        _table("origin", {key: "not recorded" if value is None else value for key, value in origin.items()}),
        *(f"Warning of the run: {html.escape(light)}" for light in described.get("warnings") or []),
        "## What was measured",
        "On the test images given to the command that made it; accuracies and agreement are fractions in [0, 1].",
        _table("measure", measured),
        "## How to use it",
        _usage(name, kind, size.replace(" x ", ", ")),
        f"Written by zskt {__version__}. Its licence is up to whoever trained the teacher.",
    ]
    return "\n\n".join(paragraphs) + "\n"


def _usage(name: str, kind: str, size: str) -> str:
    """How to load the folder, by what rebuilds the network."""
    if kind == "transformers":
        return f"""With transformers; zskt is not needed:

```python
from transformers import AutoImageProcessor, AutoModelForImageClassification

processor = AutoImageProcessor.from_pretrained("{name}")
model = AutoModelForImageClassification.from_pretrained("{name}")
logits = model(**processor(images, return_tensors="pt")).logits
```"""
    load = {
        "factory": f'Classifier.from_pretrained("{name}", trust=True)  # runs the code that makes the network',
        "python": f'load_student("{name}", module=module)  # the network, made by its own code',
    }.get(kind, f'Classifier.from_pretrained("{name}")')
    return f"""Loading it needs zskt (`pip install zskt`), as its architecture is not one of transformers:

```python
import zskt

network = zskt.{load}
logits = network(network.normalise(images))  # uint8 or [0, 1] images (N, {size})
```"""


def _without_folder(how: Mapping[str, Any]) -> dict[str, Any]:
    """A factory in a file by that file's name alone: the folder may be shared, and paths reveal its maker."""
    place, colon, name = str(how.get("factory", "")).rpartition(":")
    return {**how, "factory": f"{Path(place).name}:{name}"} if colon and place.endswith(".py") else dict(how)


def _table(head: str, rows: Mapping[str, Any]) -> str:
    texts = {str(key): html.escape(printable(value), quote=False) for key, value in rows.items()}
    cells = ((key, " ".join(text.split()).replace("|", "\\|")) for key, text in texts.items())
    return "\n".join([f"| {head} | |", "|---|---|", *(f"| {key} | {value} |" for key, value in cells)])
