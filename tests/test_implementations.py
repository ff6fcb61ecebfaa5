"""The choice of an implementation, and the tables that it reads."""

import inspect
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tilework import _implementations, catalog
from tilework._implementations import TABLES, Implementation

ENTRIES = catalog.entries()
SLOW = Implementation("slow", "none", dtypes=(torch.float32, torch.float64))
FAST = replace(SLOW, name="fast", dtypes=(torch.float32,))
ELSEWHERE = replace(FAST, name="elsewhere", devices=("cuda",))
TABLE = ELSEWHERE, FAST, SLOW
INPUT = torch.zeros(1)


def never(*_: object, **__: object) -> Any:
    raise AssertionError("not asked")


def refusing(entry: Implementation, why: str | None) -> Implementation:
    return replace(entry, refuses=lambda *_, **__: why, when="odd ones")


def choose(table: _implementations.Table, name: str | None, *tensors: Tensor, **given: Any) -> str:
    return _implementations.choose("f", table, name, *tensors, **given)


def test_the_first_that_is_made_for_the_device_and_takes_the_call() -> None:
    assert choose(TABLE, None, INPUT) == "fast"
    assert choose((replace(ELSEWHERE, refuses=never, when="x"), FAST), None, INPUT) == "fast"
    assert choose((refusing(FAST, None), SLOW), None, INPUT) == "fast"
    assert choose((refusing(FAST, "it is odd"), SLOW), None, INPUT) == "slow"
    # What does not take the tensor is not asked about the rest.
    asked = replace(FAST, refuses=never, prefers=never, when="x")
    assert choose((asked, SLOW), None, INPUT.double()) == "slow"


def test_all_tensors_must_be_taken() -> None:
    for tensors in ((INPUT, INPUT.double()), (INPUT.double(), INPUT)):
        assert choose(TABLE, None, *tensors) == "slow"
        with pytest.raises(ValueError, match="it takes float32, not float64"):
            choose(TABLE, "fast", *tensors)
    assert choose(TABLE, None, INPUT, INPUT) == "fast"


def test_a_named_one_is_taken_or_refused() -> None:
    assert choose((replace(FAST, refuses=never, when="x"), SLOW), "slow", INPUT) == "slow"
    assert choose((refusing(FAST, None), SLOW), "fast", INPUT) == "fast"
    odd = refusing(FAST, "it is odd"), SLOW
    with pytest.raises(ValueError, match="f: implementation='fast' cannot be used: it is odd"):
        choose(odd, "fast", INPUT)
    with pytest.raises(ValueError, match="cannot be used: it takes float32, not float64"):
        choose((replace(FAST, refuses=never, when="x"), SLOW), "fast", INPUT.double())
    with pytest.raises(ValueError, match="cannot be used: it runs on cuda, not on cpu"):
        choose(TABLE, "elsewhere", INPUT)
    with pytest.raises(ValueError, match="package no_such_module is not installed"):
        choose((replace(FAST, needs="no_such_module"),), "fast", INPUT)
    with pytest.raises(ValueError, match=r"f: implementation must be .*'fast'.*, got 'quick'"):
        choose(TABLE, "quick", INPUT)


def test_a_preference_counts_where_none_is_named() -> None:
    large = replace(FAST, prefers=lambda input, *, size: size > 9, when="more than 9")
    assert choose((large, SLOW), None, INPUT, size=10) == "fast"
    assert choose((large, SLOW), None, INPUT, size=9) == "slow"
    assert choose((large, SLOW), "fast", INPUT, size=9) == "fast"
    assert choose((replace(large, prefers=never), SLOW), "fast", INPUT) == "fast"


@pytest.mark.untyped
def test_a_preference_may_ask_for_the_compiler() -> None:
    eager = replace(
        FAST, prefers=lambda input: not torch.compiler.is_compiling(), when="eager calls"
    )
    table = ELSEWHERE, eager, SLOW
    where = {"fast": 1.0, "slow": 2.0}

    def run(input: Tensor) -> Tensor:
        return input + where[choose(table, None, input)]

    assert run(INPUT) == 1
    assert torch.compile(run, backend="eager", fullgraph=True)(INPUT) == 2


def test_the_interpreter_runs_kernels_that_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    table = Implementation.triton("none"), SLOW
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="it runs on cuda, not on cpu"):
        choose(table, "triton", INPUT)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert choose(table, "triton", INPUT) == "triton"
    assert choose(table, None, INPUT) == "slow"


def test_where_none_is_left_all_reasons_are_given() -> None:
    rare = replace(FAST, prefers=lambda *_: False, when="rare calls")
    with pytest.raises(TypeError, match=r"f: .* \(fast: rare calls; elsewhere: it runs on cuda"):
        choose((rare, ELSEWHERE), None, INPUT)
    with pytest.raises(TypeError, match=r"fast: it takes float32, not int64 .*; slow: it is odd"):
        choose(
            (FAST, refusing(replace(SLOW, dtypes=(torch.int64,)), "it is odd")), None, INPUT.long()
        )


def test_defaults_are_what_the_tensor_alone_leaves_open() -> None:
    sometimes = replace(FAST, prefers=never, when="x")
    assert _implementations.defaults(TABLE, INPUT) == ["fast"]
    assert _implementations.defaults((sometimes, SLOW, FAST), INPUT) == ["fast", "slow"]
    assert _implementations.defaults((sometimes, SLOW, FAST), INPUT.double()) == ["slow"]
    assert _implementations.defaults(TABLE, INPUT.long()) == []


def test_a_rule_comes_with_words() -> None:
    for options in ({"prefers": never}, {"refuses": never}, {"when": "always"}):
        with pytest.raises(ValueError, match="must come with when"):
            replace(FAST, **options)


def test_tables_of_the_same_entries_are_one(monkeypatch: pytest.MonkeyPatch) -> None:
    tables = {"losses.a": TABLE, "losses.b": (SLOW,), "norms.c": TABLE}
    monkeypatch.setattr(_implementations, "TABLES", tables)
    shared = _implementations.shared()
    assert shared == [(["losses.a", "norms.c"], TABLE), (["losses.b"], (SLOW,))]


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)
def test_what_takes_an_implementation_has_a_table(entry: catalog.Entry) -> None:
    found = _implementations.find(entry.name)
    options = inspect.signature(entry.object).parameters
    if "implementation" in options:
        assert found is not None
        if inspect.isfunction(entry.object):
            assert f"tilework.{found}" == entry.name


@pytest.mark.parametrize("name", TABLES)
def test_every_table(name: str) -> None:
    assert catalog.find(name).name == f"tilework.{name}"
    table = TABLES[name]
    names = [entry.name for entry in table]
    assert len(set(names)) == len(names)
    last = table[-1]
    assert not last.devices, "nothing is left for other devices"
    assert last.prefers is None, "nothing is left where no rule holds"
    assert last.refuses is None
    for entry in table:
        assert set(entry.dtypes) <= set(last.dtypes), "an implementation without a reference"
        if entry.name == "triton":
            assert (entry.devices, entry.needs) == (("cuda",), "triton")


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("tilework.attention.block_sparse_attention", "attention.block_sparse_attention"),
        ("tilework.attention.BlockLayout", "attention.BlockLayout"),
        ("tilework.losses.linear_squentropy", "losses.linear_squentropy"),
        ("tilework.losses.LinearCrossEntropy", "losses.linear_cross_entropy"),
        ("tilework.losses.LinearCrossEntropyLoss", "losses.linear_cross_entropy"),
        ("tilework.losses.LinearKLDivLoss", "losses.linear_kl_div"),
        ("tilework.losses.LinearLogProbs", "losses.linear_log_probs"),
        ("tilework.norms.RMSNorm", "norms.rms_norm"),
        ("tilework.norms.PartialRMSNorm", "norms.partial_rms_norm"),
        ("tilework.norms.LayerNorm", "norms.layer_norm"),
        ("tilework.losses.emo_loss", None),
        ("tilework.attention.SeerGate", None),
    ],
)
def test_find(name: str, key: str | None) -> None:
    assert _implementations.find(name) == key
    assert catalog.find(name).name == name
