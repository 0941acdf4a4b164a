"""What `make wheel` builds works on its own: installed without the sources, beside the torch that is there."""

import json
import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

import zskt

ROOT = Path(__file__).parent.parent


def run(*command: object, cwd: Path) -> str:
    """A command's stdout; without PYTHONPATH, which would lead back to the sources."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([*map(str, command)], cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_demo_runs_from_an_installed_wheel(tmp_path: Path) -> None:
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet")
    run(*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", tmp_path, ROOT, cwd=tmp_path)
    (wheel,) = tmp_path.glob("zskt-*.whl")
    assert wheel.name == f"zskt-{zskt.__version__}-py3-none-any.whl"
    venv.create(tmp_path / "env", with_pip=False)
    python = tmp_path / "env" / "bin" / "python"
    (site,) = (tmp_path / "env").rglob("site-packages")
    (site / "outer.pth").write_text(sysconfig.get_path("purelib"))  # torch and others, but no editable installation
    run(*pip, "--python", python, "install", "--no-deps", "--no-index", wheel, cwd=tmp_path)
    where, version = run(python, "-c", "import zskt; print(zskt.__file__, zskt.__version__)", cwd=tmp_path).split()
    assert Path(where).is_relative_to(tmp_path)
    assert run(tmp_path / "env" / "bin" / "zskt", "--version", cwd=tmp_path) == f"zskt {version}\n"
    recipes = json.loads(run(python, "-m", "zskt", "recipes", cwd=tmp_path))
    assert {"auto", "zskt", "zskt-prior", "bank"} <= recipes.keys()
    result = json.loads(run(tmp_path / "env" / "bin" / "zskt", "demo", cwd=tmp_path).splitlines()[-1])
    assert result["student_accuracy"] > 0.9
    assert (tmp_path / "runs" / "demo-1" / "report.html").exists()
