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


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("products", [True, False])
def test_limits_do_the_work_that_they_claim(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, products: bool
) -> None:
    monkeypatch.setattr(timing, "_fastest", lambda dtype, device: dtype)
    product, copy, own = timing.limits(dtype, CPU, products=products, traffic=1001)
    assert [one.rate for one in (product, copy, own)] == [timing.PRODUCT, timing.COPY, timing.COPY]
    wider = torch.float64 if dtype == torch.float64 else torch.float32
    with FlopCounterMode(display=False) as counter:
        assert product.run().dtype == (dtype if products else wider)
    assert counter.get_total_flops() == product.work
    for limit, size in ((copy, 2**26), (own, 500)):
        copied = limit.run()
        assert 2 * copied.nbytes == limit.work == 2 * size
        assert copied.all()
    # A copy is never larger than what is reserved, nor empty.
    for traffic, work in ((2**40, 2**27), (0, 2)):
        limits = timing.limits(dtype, CPU, products=products, traffic=traffic)
        assert limits[-1].work == work
        assert limits[-1].run().nbytes == work // 2


@pytest.mark.parametrize("slow", [torch.bfloat16, torch.float32])
def test_products_of_half_precision_are_bounded_by_the_faster_way_to_do_them(
    monkeypatch: pytest.MonkeyPatch, slow: torch.dtype
) -> None:
    monkeypatch.setattr(timing, "sample", lambda run, device: 2.0 if run().dtype == slow else 1.0)
    other = {torch.bfloat16: torch.float32, torch.float32: torch.bfloat16}[slow]
    assert timing._fastest(torch.bfloat16, CPU) == other
    assert timing._fastest(torch.float32, CPU) == torch.float32
    assert timing._fastest(torch.float64, CPU) == torch.float64


def test_a_rate_is_the_best_one_of_its_kind() -> None:
    limits = [
        timing.Limit(rate, 12, lambda: None) for rate in (timing.PRODUCT, timing.COPY, timing.COPY)
    ]
    timed = [timing.Timed([3.0, 2.0, 4.0]), timing.Timed([1.0, 2.0]), timing.Timed([12.0, 6.0])]
    assert timing.rates(limits, timed) == {timing.PRODUCT: 6.0, timing.COPY: 12.0}
    assert timing.rates(limits, timed[:1] + timed[:0:-1])[timing.COPY] == 12.0
    timed[1] = timing.Timed([1.0], MemoryError("full"))
    with pytest.raises(MemoryError, match="full"):
        timing.rates(limits, timed)


def test_cpus_of_others_are_those_that_this_process_did_not_use(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    second = os.sysconf("SC_CLK_TCK")
    seconds = {"process_time": 5.0, "perf_counter": 100.0}
    now = {name: lambda name=name: seconds[name] for name in seconds}
    monkeypatch.setattr(timing, "time", SimpleNamespace(**now))
    monkeypatch.setattr(timing, "STAT", tmp_path / "stat")

    def stat(user: int, system: int, idle: int, waiting: int, stolen: int, guest: int) -> None:
        counts = (user, 0, system, idle, waiting, 0, 0, stolen, guest, guest)
        fields = [count * second for count in counts]
        (tmp_path / "stat").write_text(f"cpu {' '.join(map(str, fields))}\ncpu0 1 2 3\n")

    assert timing.Others().cpus() is None
    stat(10, 10, 10, 9, 0, 7)
    others = timing.Others()
    stat(40, 12, 90, 59, 3, 27)
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
