"""What the public names accept, refuse and hold."""

import pickle
import re
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch

from tilework._implementations import TABLES
from tilework.losses import LinearKLDivLoss, linear_kl_div

import samples
from calls import Call, draw
from losses.linear_kl_div.problem import IMPLEMENTATIONS

HIDDEN, HEAD = torch.ones(4, 7), torch.ones(9, 7)
TEACHER_HIDDEN, TEACHER_HEAD = torch.ones(4, 5), torch.ones(9, 5)
BATCH, TEACHER_BATCH = torch.ones(2, 3, 7), torch.ones(2, 3, 5)
EIGHT = torch.float8_e4m3fn
ARGUMENTS = {
    "student_input": HIDDEN,
    "student_weight": HEAD,
    "teacher_input": TEACHER_HIDDEN,
    "teacher_weight": TEACHER_HEAD,
}

BAD: list[tuple[str, type[Exception], dict[str, Any]]] = [
    ("student_input must be a floating-point", TypeError, {"student_input": HIDDEN.long()}),
    ("student_input must be a floating-point", TypeError, {"student_input": [1.0]}),
    ("student_input must be of shape (..., D)", ValueError, {"student_input": HIDDEN[0, 0]}),
    ("student_weight must be of student_input's", TypeError, {"student_weight": HEAD.half()}),
    ("student_weight must be of shape (V, 7)", ValueError, {"student_weight": HEAD[:, :6]}),
    ("student_weight must be of shape (V, 7)", ValueError, {"student_weight": HEAD[:0]}),
    ("student_bias must be of shape (9,)", ValueError, {"student_bias": torch.ones(7)}),
    (
        "student_bias must be of student_input's torch.float32",
        TypeError,
        {"student_bias": torch.ones(9).double()},
    ),
    ("teacher_input must be a floating-point", TypeError, {"teacher_input": HIDDEN.long()}),
    ("teacher_input must be of shape (..., D)", ValueError, {"teacher_input": HIDDEN[0, 0]}),
    (
        "teacher_input must be of shape (4, 5), with the positions of student_input, got float32 "
        "of shape (3, 5)",
        ValueError,
        {"teacher_input": TEACHER_HIDDEN[:3]},
    ),
    ("teacher_input must be of shape (4, 5)", ValueError, {"teacher_input": TEACHER_BATCH}),
    ("teacher_weight must be a floating-point", TypeError, {"teacher_weight": HEAD.int()}),
    (
        "teacher_weight must be of teacher_input's torch.float32",
        TypeError,
        {"teacher_weight": TEACHER_HEAD.half()},
    ),
    ("teacher_weight must be of shape (V, 5)", ValueError, {"teacher_weight": HEAD}),
    (
        "teacher_weight must be of shape (9, 5), with student_weight's classes, got float32 of "
        "shape (8, 5)",
        ValueError,
        {"teacher_weight": TEACHER_HEAD[:8]},
    ),
    ("teacher_bias must be of shape (9,)", ValueError, {"teacher_bias": torch.ones(7)}),
    ("temperature must be a finite number above 0", ValueError, {"temperature": 0.0}),
    ("temperature must be a finite number above 0", ValueError, {"temperature": float("nan")}),
    ("temperature must be a number", TypeError, {"temperature": "1"}),
    (
        "divergence must be one of 'forward', 'reverse', 'jsd', got 'js'",
        ValueError,
        {"divergence": "js"},
    ),
    ("beta must be a number above 0 and below 1, got 0.0", ValueError, {"beta": 0.0}),
    ("beta must be a number above 0 and below 1, got 1", ValueError, {"beta": 1}),
    ("beta must be a number above 0", ValueError, {"beta": float("nan")}),
    ("beta must be a number", TypeError, {"beta": None}),
    ("student_softcap must be a finite number above 0", ValueError, {"student_softcap": 0.0}),
    ("teacher_softcap must be a finite number above 0", ValueError, {"teacher_softcap": -1}),
    ("mask must be bool of shape (4,)", TypeError, {"mask": torch.ones(4)}),
    ("mask must be bool of shape (4,)", TypeError, {"mask": [True] * 4}),
    ("mask must be of shape (4,)", ValueError, {"mask": torch.ones(3, dtype=torch.bool)}),
    ("token_weight must be a floating-point", TypeError, {"token_weight": torch.ones(4).int()}),
    ("token_weight must be of shape (4,)", ValueError, {"token_weight": torch.ones(9)}),
    (
        "token_weight must not require a gradient",
        ValueError,
        {"token_weight": torch.ones(4).requires_grad_()},
    ),
    ("reduction must be one of 'mean', 'sum', 'none', got 'avg'", ValueError, {"reduction": "avg"}),
    (
        "implementation must be one of 'triton', 'tiled', 'reference', got 'cuda'",
        ValueError,
        {"implementation": "cuda"},
    ),
    (
        "no implementation takes these tensors (triton: it takes float16, bfloat16, float32, not",
        TypeError,
        {"student_input": HIDDEN.to(EIGHT), "student_weight": HEAD.to(EIGHT)},
    ),
    (
        "no implementation takes these tensors (triton: it takes float16, bfloat16, float32, not",
        TypeError,
        {"teacher_input": TEACHER_HIDDEN.to(EIGHT), "teacher_weight": TEACHER_HEAD.to(EIGHT)},
    ),
    (
        "implementation='triton' cannot be used: it takes float16, bfloat16, float32, not float64",
        ValueError,
        {
            "teacher_input": TEACHER_HIDDEN.double(),
            "teacher_weight": TEACHER_HEAD.double(),
            "implementation": "triton",
        },
    ),
    (
        "teacher_weight must lie on the device of student_input, cpu, got meta",
        ValueError,
        {"teacher_weight": TEACHER_HEAD.to("meta")},
    ),
]


@pytest.mark.untyped
@pytest.mark.parametrize(("message", "error", "change"), BAD)
def test_bad_input(message: str, error: type[Exception], change: dict[str, Any]) -> None:
    with pytest.raises(error, match="linear_kl_div: .*" + re.escape(message)):
        linear_kl_div(**{**ARGUMENTS, **change})


@pytest.mark.untyped
@pytest.mark.parametrize(
    "option",
    [
        {"temperature": 0},
        {"divergence": "kl"},
        {"beta": 2},
        {"student_softcap": -1.0},
        {"teacher_softcap": 0},
        {"reduction": "avg"},
        {"implementation": "cuda"},
    ],
)
def test_module_refuses_options_at_construction(option: dict[str, Any]) -> None:
    (name,) = option
    with pytest.raises(ValueError, match=name):
        LinearKLDivLoss(**option)


@pytest.mark.untyped
def test_misspelt_and_positional_options() -> None:
    with pytest.raises(TypeError, match="temprature"):
        linear_kl_div(**ARGUMENTS, temprature=2.0)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="positional"):
        linear_kl_div(*ARGUMENTS.values(), torch.rand(9))  # type: ignore[misc]
    with pytest.raises(TypeError, match="positional"):
        LinearKLDivLoss(2.0)  # type: ignore[misc]


def test_default_on_the_cpu_is_tiled(monkeypatch: pytest.MonkeyPatch) -> None:
    from tilework.losses.linear_kl_div import operators

    chosen = []
    divergences = operators.divergences
    monkeypatch.setattr(
        operators,
        "divergences",
        lambda given: chosen.append(given.implementation) or divergences(given),
    )
    linear_kl_div(**ARGUMENTS)
    linear_kl_div(**ARGUMENTS, implementation="reference")
    assert chosen == ["tiled", "reference"]


@pytest.mark.untyped
@pytest.mark.parametrize("double", ["student", "teacher", None])
def test_default_where_there_is_a_gpu(double: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    from tilework.losses.linear_kl_div import sharding

    # Kernels serve where they take both heads.
    kernels, *others = TABLES["losses.linear_kl_div"]
    table = (replace(kernels, devices=("cpu",)), *others)
    chosen = []

    def record(shard: Any, given: Any) -> torch.Tensor:
        chosen.append(given.implementation)
        return torch.zeros(4)

    monkeypatch.setattr(sys.modules[linear_kl_div.__module__], "IMPLEMENTATIONS", table)
    monkeypatch.setattr(sharding, "divergences", record)
    linear_kl_div(
        **{
            name: tensor.double() if double and name.startswith(double) else tensor
            for name, tensor in ARGUMENTS.items()
        }
    )
    assert chosen == ["tiled" if double else "triton"]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_module_equals_the_function(implementation: str) -> None:
    options: dict[str, Any] = {
        "temperature": 2.0,
        "divergence": "jsd",
        "beta": 0.3,
        "student_softcap": 5.0,
        "teacher_softcap": 4.0,
        "reduction": "none",
        "implementation": implementation,
    }
    tensors = {
        "student_bias": torch.randn(9),
        "teacher_bias": torch.randn(9),
        "mask": torch.rand(2, 3) < 0.7,
        "token_weight": torch.rand(2, 3),
    }
    heads = [torch.randn(shape) for shape in ((2, 3, 7), (9, 7), (2, 3, 5), (9, 5))]
    expected = linear_kl_div(*heads, **tensors, **options)
    criterion = LinearKLDivLoss(**options)
    assert expected.shape == (2, 3)
    assert torch.equal(criterion(*heads, **tensors), expected)
    assert torch.equal(pickle.loads(pickle.dumps(criterion))(*heads, **tensors), expected)
    assert not criterion.state_dict()
    for name, value in options.items():
        assert f"{name}={value!r}" in repr(criterion)
        assert name not in repr(LinearKLDivLoss())
        other = {**options, name: getattr(LinearKLDivLoss(), name)}
        if name != "implementation":
            assert not torch.equal(LinearKLDivLoss(**other)(*heads, **tensors), expected)


@pytest.mark.parametrize(
    ("divergence", "mode"), [("forward", "train"), ("jsd", "train"), ("reverse", "infer")]
)
def test_memory_stays_within_the_promise(divergence: str, mode: str) -> None:
    # Some seconds, of logits that are more than the rest of the process.
    # Half of one head's logits, which are 250 MiB; the gradient of the weight takes 8 MiB of it.
    code = """if True:
        import resource, sys, torch
        from tilework.losses import linear_kl_div
        torch.manual_seed(0)
        divergence, train = sys.argv[1], sys.argv[2] == "train"
        def call(tokens, classes):
            hidden = torch.randn(tokens, 64, requires_grad=train)
            head = torch.randn(classes, 64, requires_grad=train)
            teacher_hidden, teacher_head = torch.randn(tokens, 16), torch.randn(classes, 16)
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            loss = linear_kl_div(
                hidden, head, teacher_hidden, teacher_head, divergence=divergence
            )
            if train:
                loss.backward()
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        call(64, 2000)
        print(call(2048, 32000) / 1024)
    """
    output = subprocess.run(
        [sys.executable, "-c", code, divergence, mode], check=True, capture_output=True, text=True
    ).stdout
    assert float(output) < 125


@samples.of(Call)
def calls() -> list[Call]:
    return [
        Call(
            linear_kl_div,
            lambda: {
                "student_input": draw(13, 6),
                "student_weight": draw(17, 6),
                "teacher_input": draw(13, 4),
                "teacher_weight": draw(17, 4),
                "student_bias": draw(17),
                "mask": torch.rand(13) < 0.8,
            },
            differentiable=("student_input", "student_weight", "student_bias"),
            options=(
                {},
                {"divergence": "reverse", "reduction": "none"},
                {"divergence": "jsd", "temperature": 2.0},
            ),
        ),
    ]
