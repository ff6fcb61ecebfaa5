"""The kernels as compilers for GPUs see them, and on a GPU where there is one."""

import mmap
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from tilework.losses import linear_cross_entropy

import ahead_of_time
from helpers import assert_exact, dtype_name
from losses.linear_cross_entropy.problem import Problem, composed


@pytest.fixture(scope="module")
def reports() -> list[dict[str, Any]]:
    return ahead_of_time.compiled(Path(__file__).with_name("launches.py"))


@pytest.mark.untyped
def test_every_kernel_compiles_for_every_architecture(reports: list[dict[str, Any]]) -> None:
    seen = {(report["arch"], report["kernel"]) for report in reports}
    products = {"forward_kernel", "backward_kernel", "kept_product_kernel"}
    kernels = products | {"merge_kernel", "keep_kernel"}
    assert seen == {(arch, kernel) for arch in ahead_of_time.SHARED_MEMORY for kernel in kernels}
    for report in reports:
        assert report["spilled"] == 0, report
        assert report["shared"] <= ahead_of_time.SHARED_MEMORY[report["arch"]], report
        if report["kernel"] in products and "float32" not in report["launch"]:
            assert report["matrix"] > 0, report


def test_offsets_within_a_tile_fit_32_bits() -> None:
    from tilework.losses._classes import kernels

    for stride in (2**23, 2**40):
        long = torch.empty_strided((3, 4), (stride, 1), device="meta")
        assert kernels.short_strides(long).stride() == (4, 1)
    usual = torch.empty(1000, 2**14, device="meta")
    assert kernels.short_strides(usual) is usual


@pytest.mark.parametrize(
    "options",
    [
        {"implementation": "tiled"},
        {"implementation": "chunked"},
        {"implementation": "triton"},
        {"implementation": "triton", "gradient_filter": 1e-6},
    ],
    ids=["tiled", "chunked", "triton", "triton-filter"],
)
@pytest.mark.parametrize(("tokens", "classes"), [(3, 600), (600, 5)])
def test_addresses_beyond_32_bits(options: dict[str, Any], tokens: int, classes: int) -> None:
    def far_apart(rows: int) -> torch.Tensor:
        """Rows 2**22 elements apart, in memory of which only the rows are ever touched."""
        memory = mmap.mmap(-1, 2 * rows << 22)
        if hasattr(mmap, "MADV_NOHUGEPAGE"):
            memory.madvise(mmap.MADV_NOHUGEPAGE)
        values = torch.frombuffer(memory, dtype=torch.bfloat16)
        return values.as_strided((rows, 4), (2**22, 1)).normal_()

    hidden, head = far_apart(tokens), far_apart(classes)
    assert max(tokens, classes) * 2**22 > 2**31
    target = torch.randint(classes, (tokens,))
    function = partial(linear_cross_entropy, **options)
    far = Problem(hidden.requires_grad_(), head.requires_grad_(), target)
    near = Problem(
        hidden.detach().contiguous().requires_grad_(),
        head.detach().contiguous().requires_grad_(),
        target,
    )
    for result, expected in zip(far.solve(function), near.solve(function), strict=True):
        torch.testing.assert_close(result, expected)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "options",
    [
        {"implementation": "triton"},
        {"implementation": "triton", "gradient_filter": 0.1},
        {"implementation": "chunked"},
    ],
    ids=["triton", "triton-filter", "chunked"],
)
def test_cuda_graph(options: dict[str, Any]) -> None:
    problem = Problem.random(64, 32, 500, torch.bfloat16).on("cuda")
    function = partial(linear_cross_entropy, **options)
    expected = problem.solve(function)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = problem.solve(function)
    graph.replay()
    for result, truth in zip(captured, expected, strict=True):
        assert torch.equal(result, truth)


@pytest.mark.gpu
@pytest.mark.parametrize("implementation", ["triton", "chunked"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=dtype_name)
@pytest.mark.parametrize("every_option", [False, True])
@pytest.mark.parametrize(
    ("tokens", "features", "classes"),
    [(1, 1, 1), (100, 63, 1000), (333, 512, 5000), (1024, 768, 50304), (9000, 64, 5001)],
)
def test_on_a_gpu(
    tokens: int,
    features: int,
    classes: int,
    every_option: bool,
    dtype: torch.dtype,
    implementation: str,
) -> None:
    options: dict[str, Any] = (
        {"label_smoothing": 0.1, "softcap": 20.0, "z_loss": 1e-3} if every_option else {}
    )
    problem = Problem.random(
        tokens,
        features,
        classes,
        dtype,
        bias=every_option,
        weight=every_option,
        token_weight=every_option,
        scale=features**-0.5,
        **options,
    ).on("cuda")
    function = partial(linear_cross_entropy, implementation=implementation)
    actual, again = problem.solve(function), problem.solve(function)
    composition = problem.to(dtype).solve(composed)
    truth = problem.to(torch.float64).solve(composed)
    for result, second, *others in zip(actual, again, composition, truth, strict=True):
        assert torch.equal(result, second)
        assert_exact(result, *others)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=dtype_name)
@pytest.mark.parametrize("every_option", [False, True])
@pytest.mark.parametrize(
    ("tokens", "features", "classes"),
    [(1, 7, 63), (100, 63, 1000), (333, 512, 5000), (9000, 64, 5001)],
)
def test_gradient_filter_on_a_gpu(
    tokens: int,
    features: int,
    classes: int,
    every_option: bool,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Few classes are likely: the products are of few tiles, and the gradients within the bound."""
    from tilework.losses._classes.linear.triton import filter

    options: dict[str, Any] = {"softcap": 60.0, "z_loss": 1e-3} if every_option else {}
    problem = Problem.random(
        tokens, features, classes, dtype, scale=features**-0.5, reduction="sum", **options
    )
    rank = torch.randperm(classes)
    problem.linear_bias = (-0.05 * rank).clamp(min=-50).to(dtype).requires_grad_()
    problem.target = rank.argsort()[problem.target % min(classes, 50)].where(
        problem.target >= 0, problem.target
    )
    problem = problem.on("cuda")
    counts = []
    kept_tiles = filter.kept_tiles

    def record(*args: Any) -> torch.Tensor:
        kept = kept_tiles(*args)
        counts.append((kept.sum(), kept.numel()))
        return kept

    fraction = 1e-2
    filtered = partial(linear_cross_entropy, implementation="triton", gradient_filter=fraction)
    with monkeypatch.context() as patch:
        patch.setattr(filter, "kept_tiles", record)
        actual = problem.solve(filtered)
    again = problem.solve(filtered)
    for result, second in zip(actual, again, strict=True):
        assert torch.equal(result, second)
    if classes >= 1000:
        assert sum(int(kept) for kept, _ in counts) < 0.7 * sum(size for _, size in counts)

    composition = problem.to(dtype).solve(composed)
    truth = problem.to(torch.float64).solve(composed)
    for index in (0, 3):  # the loss and the bias lose nothing
        assert_exact(actual[index], composition[index], truth[index])
    rounding = (composition[1].double() - truth[1]).norm(dim=1)
    logits = torch.nn.functional.linear(*(leaf.double() for leaf in problem.leaves))
    coefficient = 1 + 2 * options.get("z_loss", 0.0) * logits.logsumexp(1).abs()
    longest = problem.linear_weight.double().norm(dim=1).max()
    lost = (actual[1].double() - truth[1]).norm(dim=1)
    assert (lost <= fraction * coefficient * longest + 2 * rounding + 1e-3 * longest).all()
