"""The short form of `make torture`: a few runs are killed and hindered, and all end as if nothing had happened."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("torture.py")


@pytest.mark.skipif(sys.platform != "linux", reason="forks, and reads /proc")
def test_nothing_is_lost() -> None:
    command = [sys.executable, str(SCRIPT), "--kills", "6", "--others", "9"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["kills"] == 6
    assert found["identical"] == found["runs"] > 9
