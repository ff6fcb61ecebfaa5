import os
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tilework.bench import timing

CPU = torch.device("cpu")


class Clock:
    """Time that passes only where a run says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now

    def run(self, *costs: float) -> Callable[[], None]:
        """A run of which each call takes the next of the costs, then always the last."""
        left = list(costs)

        def run() -> None:
            self.now += left.pop(0) if len(left) > 1 else left[0]

        return run


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=clock.perf_counter))
    return clock


def test_quartiles() -> None:
    assert timing.Quartiles.of([4.0, 1.0, 3.0, 2.0, 5.0]) == timing.Quartiles(2.0, 3.0, 4.0)


def test_candidates_take_turns_and_the_first_round_is_thrown_away(clock: Clock) -> None:
    calls: list[str] = []

    def logged(name: str, run: Callable[[], None]) -> Callable[[], None]:
        return lambda: (calls.append(name), run())[1]

    runs = {"a": logged("a", clock.run(9, 1, 2, 3)), "b": logged("b", clock.run(8, 4))}
    timed = timing.alternate(runs, CPU, seconds=0.0, rounds=(3, 9))
    assert calls == ["a", "b"] * 4
    assert timed["a"].samples == [1, 2, 3]
    assert timed["b"].samples == [4, 4, 4]


def test_rounds_go_on_until_the_time_is_spent(clock: Clock) -> None:
    parts: list[float] = []
    runs = {"a": clock.run(1.0)}
    timed = timing.alternate(runs, CPU, seconds=10.0, rounds=(2, 1000), progress=parts.append)
    assert len(timed["a"].samples) == 9
    assert parts == sorted(parts)
    assert 0 < parts[0] < 0.5 < parts[-1] <= 1


@pytest.mark.parametrize(("seconds", "rounds"), [(0.0, 2), (1000.0, 4)])
def test_there_are_never_fewer_or_more_rounds_than_asked_for(
    clock: Clock, seconds: float, rounds: int
) -> None:
    timed = timing.alternate({"a": clock.run(1.0)}, CPU, seconds=seconds, rounds=(2, 4))
    assert len(timed["a"].samples) == rounds


def test_a_short_call_is_repeated_within_a_sample(clock: Clock) -> None:
    cost = timing.SHORTEST_SAMPLE / 10
    timed = timing.alternate({"a": clock.run(cost)}, CPU, seconds=0.0, rounds=(2, 2))
    assert timed["a"].samples == pytest.approx([cost, cost])
    assert clock.now == pytest.approx(21 * cost)


def test_an_error_ends_one_candidate_and_not_the_others(clock: Clock) -> None:
    calls = 0

    def fails() -> None:
        nonlocal calls
        calls += 1
        clock.now += 1
        if calls == 2:
            raise RuntimeError("late")

    runs = {"fails": fails, "works": clock.run(1.0)}
    timed = timing.alternate(runs, CPU, seconds=0.0, rounds=(3, 3))
    assert str(timed["fails"].error) == "late"
    assert calls == 2
    assert timed["works"] == timing.Timed([1.0] * 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_limits_do_the_work_that_they_claim(dtype: torch.dtype) -> None:
    limits = timing.limits(dtype, CPU)
    flops, product = limits["matmul_flops_per_second"]
    with FlopCounterMode(display=False) as counter:
        assert product().dtype == dtype
    assert counter.get_total_flops() == flops
    traffic, copy = limits["copy_bytes_per_second"]
    copied = copy()
    assert 2 * copied.nbytes == traffic
    assert copied.all()


def test_cpus_of_others_are_those_that_this_process_did_not_use(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    second = os.sysconf("SC_CLK_TCK")
    seconds = {"process_time": 5.0, "perf_counter": 100.0}
    now = {name: lambda name=name: seconds[name] for name in seconds}
    monkeypatch.setattr(timing, "time", SimpleNamespace(**now))
    monkeypatch.setattr(timing, "STAT", tmp_path / "stat")

    def stat(user: int, system: int, idle: int, stolen: int) -> None:
        fields = (user * second, 0, system * second, idle * second, 9, 0, 0, stolen * second, 7, 7)
        (tmp_path / "stat").write_text(f"cpu {' '.join(map(str, fields))}\ncpu0 1 2 3\n")

    assert timing.Others().cpus() is None
    stat(10, 10, 10, 0)
    others = timing.Others()
    stat(40, 12, 90, 3)
    seconds |= {"process_time": 25.0, "perf_counter": 110.0}
    assert others.cpus() == pytest.approx((35 - 20) / 10)


@pytest.mark.gpu
def test_gpu_time_is_that_of_the_device_not_of_the_launch() -> None:
    device = torch.device("cuda")
    left = torch.randn(8192, 8192, device=device)
    begin = time.perf_counter()
    seconds = timing.sample(lambda: left @ left, device, calls=3)
    assert 3 * seconds <= time.perf_counter() - begin
    assert 2 * 8192**3 / seconds < 1e15
