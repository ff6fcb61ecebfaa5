"""The sweep over optimizers: what it trains next, and the page that its rows fill."""

import importlib
import math
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks/results"

pytestmark = pytest.mark.untyped


@pytest.fixture(scope="module")
def demo() -> Any:
    """The demo's modules, which are scripts."""
    names = ("sweep", "spikes", "optimizers", "training", "model", "data", "report")
    sys.path.insert(0, str(ROOT / "examples/demo"))
    try:
        yield {name: importlib.import_module(name) for name in names}
    finally:
        sys.path.pop(0)
        for name in names:
            sys.modules.pop(name, None)


def row(sweep: Any, rate: float, validation: float, seed: int = 0) -> Any:
    return sweep.Row("adamw", rate, seed, 300, validation, 5.0, 8.0, [(300, validation)])


@pytest.mark.parametrize("part", [4, 0.25])
def test_rates_are_tried_until_the_best_has_worse_ones_beside_it(demo: Any, part: float) -> None:
    sweep = demo["sweep"]
    rows: list[Any] = []
    best = part * sweep.CHOICES["adamw"].rate
    while (settings := sweep.next_training(rows, "adamw")) is not None:
        assert len(rows) < 20
        distance = abs(math.log2(settings.learning_rate / best))
        diverges = settings.learning_rate > 3 * best
        loss = math.nan if diverges else 1 + distance + settings.seed
        rows.append(row(sweep, settings.learning_rate, loss, settings.seed))
    tried = sweep.of(rows, "adamw")
    assert min(tried.values(), key=sweep.loss).rate == pytest.approx(best)
    assert {best / 2, best, 2 * best} <= set(tried)
    assert [len(sweep.of(rows, "adamw", seed)) for seed in (1, 2)] == [1, 1]
    (summary,) = [one for one in sweep.summaries(rows) if one.name == "adamw"]
    assert (summary.rate, summary.validation) == (best, 2.0)
    assert summary.deviation == pytest.approx(1.0)


def test_rows_are_read_as_they_were_written(demo: Any, tmp_path: Path) -> None:
    sweep = demo["sweep"]
    path = tmp_path / "rows.jsonl"
    assert sweep.read(path) == []
    import json

    one = row(sweep, 0.1, 2.0)
    path.write_text(json.dumps(asdict(one)) + "\n")
    (found,) = sweep.read(path)
    assert asdict(found) == asdict(replace(one, curve=[[300, 2.0]]))


def test_the_page_holds_what_was_recorded(demo: Any, tmp_path: Path) -> None:
    sweep, spikes = demo["sweep"], demo["spikes"]
    machine = "cpu-amd-epyc-2-cores.jsonl"
    clean = sweep.read(RESULTS / f"demo-optimizers-{machine}")
    assert {one.name for one in sweep.summaries(clean)} == set(sweep.CHOICES)
    page, copy = ROOT / "benchmarks/optimizers.md", tmp_path / "page.md"
    copy.write_text(page.read_text())
    sweep.fill(copy, "sweep", sweep.table(clean))
    sweep.fill(copy, "spikes", spikes.table(clean, sweep.read(RESULTS / f"demo-spikes-{machine}")))
    assert copy.read_text() == page.read_text()


def test_the_demo_begins_with_rates_of_the_sweep(demo: Any) -> None:
    """But for AdamW, whose two models would part too far at the best one."""
    sweep = demo["sweep"]
    clean = sweep.read(RESULTS / "demo-optimizers-cpu-amd-epyc-2-cores.jsonl")
    for one in sweep.summaries(clean):
        if one.name != "adamw":
            assert sweep.CHOICES[one.name].rate == pytest.approx(one.rate)
