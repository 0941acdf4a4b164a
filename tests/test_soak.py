"""The short form of `make soak`: what one process may be asked to do again and again leaves nothing behind."""

import math
import os
import signal
import warnings
from pathlib import Path

import matplotlib
import pytest
import torch

import soak
from small import make_teacher, student_for


def test_rounds_of_runs_leave_the_process_as_it_was(tmp_path: Path) -> None:
    found = soak.soak(tmp_path, math.inf, rounds=soak.WARM_UP + 2)
    assert found["rounds"] == soak.WARM_UP + 2
    assert found["changed"] == []
    assert found["flat"], found


@pytest.mark.parametrize(
    ("leak", "name"),
    [
        (lambda: torch.rand(1), "random"),
        (lambda: torch.set_num_threads(2), "threads of torch"),
        (lambda: torch.set_default_dtype(torch.float64), "dtype"),
        (lambda: torch.set_flush_denormal(True), "denormals"),
        (lambda: os.environ.update(A="b"), "environment"),
        (lambda: matplotlib.rcParams.update({"font.size": 3}), "matplotlib"),
        (lambda: warnings.simplefilter("ignore"), "warnings"),
        (lambda: signal.signal(signal.SIGTERM, signal.SIG_IGN), "signals"),
    ],
)
def test_a_change_of_the_process_is_seen(leak: object, name: str, tmp_path: Path) -> None:
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings(), matplotlib.rc_context():
        kept = torch.get_num_threads(), dict(os.environ), signal.getsignal(signal.SIGTERM)
        teacher = make_teacher(student_for(make_teacher(size=soak.SIZE)), size=soak.SIZE)
        before = soak.global_state(teacher)
        try:
            assert callable(leak)
            leak()
            after = soak.global_state(teacher)
        finally:
            torch.set_num_threads(kept[0])
            torch.set_default_dtype(torch.float32)
            torch.set_flush_denormal(False)
            os.environ.pop("A", None)
            signal.signal(signal.SIGTERM, kept[2])
    assert [each for each in before if before[each] != after[each]] == [name]


def test_hooks_that_stay_are_seen() -> None:
    teacher = make_teacher(student_for(make_teacher(size=soak.SIZE)), size=soak.SIZE)
    before = soak.global_state(teacher)
    handle = teacher.module.register_forward_hook(lambda *_: None)
    assert soak.global_state(teacher)["hooks"] != before["hooks"]
    handle.remove()
    assert soak.global_state(teacher) == before
