"""The example that quantizes trained models in every way."""

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tilework import quant

EXAMPLES = Path(__file__).parent.parent / "examples"
NAMES = ("quantization", "subjects", "training", "data", "model", "optimizers")


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Any:
    for folder in ("demo", "quantize"):
        monkeypatch.syspath_prepend(EXAMPLES / folder)
    for name in NAMES:
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield importlib.import_module("quantization")
    for name in NAMES:
        sys.modules.pop(name, None)


def few() -> list[tuple[str, float, Any]]:
    common: dict[str, Any] = {"bits": 2, "group_size": 16}
    return [("RTN", 2, quant.RTNConfig(**common)), ("GPTQ", 2, quant.GPTQConfig(**common))]


@pytest.mark.untyped
def test_rows_tables_and_a_figure(
    example: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(example, "configurations", few)
    page, out = tmp_path / "page.md", tmp_path / "rows.jsonl"
    page.write_text("before\n<!-- demo -->\n<!-- end -->\nafter\n")
    files = {"out": out, "figure": tmp_path / "figure.png", "page": page}
    example.main(["quick"], checkpoint=tmp_path / "model.pt", **files)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["algorithm"] for row in rows] == ["float32", "RTN", "GPTQ"]
    base, nearest, ours = rows
    assert base["over_float"] == 0
    assert ours["bits_per_weight"] == nearest["bits_per_weight"] == 2 + 64 / 16
    assert ours["bytes_on_disk"] < base["bytes_on_disk"]
    assert abs(ours["over_float"]) < nearest["over_float"]
    text = page.read_text()
    assert text.startswith("before\n<!-- demo -->\n\n| algorithm |")
    assert text.count("\n| ") == 5
    assert (tmp_path / "figure.png").stat().st_size > 1000
    monkeypatch.setattr(example, "measured", None)  # nothing is measured again
    example.main(["quick"], checkpoint=tmp_path / "model.pt", **files)
    assert page.read_text() == text


@pytest.mark.untyped
def test_every_way_is_accepted(example: Any) -> None:
    ways = list(example.configurations())
    assert len({(name, bits) for name, bits, _ in ways}) == len(ways)
    for _, _, config in ways:
        config.check()


@pytest.mark.untyped
def test_the_encoder_says_what_it_needs(example: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    subjects = sys.modules["subjects"]
    with pytest.raises(ModuleNotFoundError, match=r"pip install --no-deps antiberty"):
        subjects.encoder()
    ids = subjects._batch(["AC", "A"], ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "A", "C"])
    assert ids["input_ids"].tolist() == [[2, 5, 6, 3], [2, 5, 3, 0]]
    assert ids["attention_mask"].sum() == 7
    assert torch.is_tensor(ids["input_ids"])
