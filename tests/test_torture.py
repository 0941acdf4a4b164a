"""The short form of torture.py: a few runs are killed and hindered, and all end as if nothing had happened."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("torture.py")


@pytest.mark.skipif(sys.platform != "linux", reason="forks, and reads /proc")
@pytest.mark.parametrize(
    ("kills", "others"), [(6, 9), pytest.param(200, 100, marks=pytest.mark.slow)], ids=["short", "long"]
)
def test_nothing_is_lost(kills: int, others: int) -> None:
    command = [sys.executable, str(SCRIPT), "--kills", str(kills), "--others", str(others)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["kills"] == kills
    assert found["identical"] == found["runs"] > others
