import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from bench import hungry_suite

from tilework.bench import memory

pytestmark = pytest.mark.untyped  # the measurement is a process of its own, which has no checker
MB = 10**6


@pytest.fixture(autouse=True)
def suites_of_the_tests_in_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]), prepend=":")


def peak(candidate: str) -> int:
    case = hungry_suite.SUITE.cases("cpu")[0]
    return memory.in_fresh_process(hungry_suite.SUITE, case, "float32", candidate)


def test_the_peak_is_what_a_run_allocates_above_its_inputs() -> None:
    # Two of the three tensors of 64 MB are alive at any time.
    assert 127 * MB <= peak("three at once, two live") <= 136 * MB


def test_memory_of_the_first_run_alone_does_not_count() -> None:
    assert 63 * MB <= peak("hungry at first") <= 72 * MB


def test_the_process_has_the_threads_and_the_case_of_this_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[dict[str, object]] = []

    def run(command: list[str], **_: object) -> SimpleNamespace:
        asked.append(json.loads(command[-1]))
        return SimpleNamespace(returncode=0, stdout="a warning\n42\n")

    monkeypatch.setattr(memory.subprocess, "run", run)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    assert peak("hungry at first") == 42
    assert asked == [
        {
            "module": "bench.hungry_suite",
            "kind": "add",
            "sizes": {"n": hungry_suite.N},
            "dtype": "float32",
            "candidate": "hungry at first",
            "threads": 7,
        }
    ]


def test_a_failing_process_says_why() -> None:
    with pytest.raises(memory.Unmeasured, match="StopIteration"):
        peak("no such candidate")


def test_without_a_mark_to_reset_there_is_no_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "CLEAR", Path("/proc/self/no_such_file"))
    with pytest.raises(memory.Unmeasured, match="Linux"):
        peak("hungry at first")


def test_patience_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "PATIENCE", 0.01)
    with pytest.raises(memory.Unmeasured, match="more than"):
        peak("hungry at first")


@pytest.mark.gpu
def test_gpu_memory_counts_results_and_temporaries() -> None:
    device = torch.device("cuda")
    input = torch.ones(16 * MB, device=device)
    assert memory.on_gpu(lambda: (input + 1) * 2, device) == pytest.approx(128 * MB, rel=0.05)
