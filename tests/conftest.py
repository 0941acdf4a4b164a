"""One torch thread per process: several processes with several threads each slow one another down many times."""

import base64
import os
from collections.abc import Iterator

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

torch.set_num_threads(1)

BLANK = base64.b64decode("iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGNgAAAAAgABSK+kcQAAAABJRU5ErkJggg==")
"""A PNG of one pixel."""


@pytest.fixture(autouse=True)
def one_seed() -> None:
    """Tensors drawn in a test are the same wherever and after whatever else it runs."""
    torch.manual_seed(0)


@pytest.fixture(scope="module", autouse=True)
def one_seed_for_a_module() -> None:
    """The same for what a module's tests share."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def few_probes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A finished student is asked about 100 images of each kind, not 1,000."""
    monkeypatch.setattr("zskt.run.without_data.FLOPS", 0)


@pytest.fixture(scope="module", autouse=True)
def no_curves(request: pytest.FixtureRequest) -> Iterator[None]:
    """Reports have a blank picture where curves would be drawn for seconds, but for the tests marked `drawn`."""
    with pytest.MonkeyPatch.context() as patch:
        if request.node.get_closest_marker("drawn") is None:
            patch.setattr("zskt.run.report.readable_curves", lambda runs: (BLANK, []))
            patch.setattr("zskt.run.report.run_classes", lambda lines, names: BLANK)
        yield


@pytest.fixture(scope="module")
def tiny_recipes() -> Iterator[None]:
    """Every recipe by its name, but with networks and batches that take milliseconds."""
    from small import tiny_recipe

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("zskt.method.recipe.load_recipe", tiny_recipe)
        yield


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what this machine cannot run, and the slow tests unless they are asked for."""
    no_gpu = pytest.mark.skip(reason="needs an NVIDIA GPU")
    slow = pytest.mark.skip(reason="takes minutes: ask for it with -m slow")
    for item in items:
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(no_gpu)
        if "slow" in item.keywords and "slow" not in (config.option.markexpr or ""):
            item.add_marker(slow)
