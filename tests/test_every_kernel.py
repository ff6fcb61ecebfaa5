"""What every kernel keeps, of the primitives to come too, and every reference beside it."""

import importlib
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("triton")

import tilework
from tilework import _triton
from tilework._triton import Tuned
from tilework.attention import (
    BlockLayout,
    attention_column_mass,
    attention_entropy,
    attention_lse,
    block_pooled_attention,
    block_sparse_attention,
    block_sparse_attention_varlen,
    block_sparse_decode,
)
from tilework.attention._attention_map import tiled as map_tiled
from tilework.attention.block_sparse import tiled as sparse_tiled
from tilework.attention.block_sparse_decode import tiled as decode_tiled
from tilework.losses import linear_cross_entropy, linear_kl_div, linear_log_probs, linear_squentropy
from tilework.losses._classes import blocks, tiles
from tilework.losses._classes.linear import chunked
from tilework.losses._classes.logits.common import LogitStats
from tilework.losses._classes.logits.operators import logit_stats
from tilework.norms import layer_norm, rms_norm
from tilework.norms._row_norm import tiled as norm_tiled
from tilework.optim import AdamW, Lion
from tilework.optim._optimizer import step
from tilework.quant import packed_linear
from tilework.quant.products.packed_linear import common as packed_common

from helpers import HALF, assert_exact, dtype_name

pytestmark = [
    pytest.mark.untyped,
    pytest.mark.skipif(not _triton.INTERPRETED, reason="the tiles are those of the interpreter"),
]


class KernelCall(NamedTuple):
    """A call of what has kernels: of the tensors that it draws, and by an implementation's name."""

    draw: Callable[[], list[Tensor]]
    function: Callable[..., Any]
    differentiable: bool = True

    def solve(self, leaves: list[Tensor], implementation: str) -> list[Tensor]:
        """The results, and with them the gradients of all, where there are some."""
        leaves = [leaf.detach().requires_grad_(self.differentiable) for leaf in leaves]
        results = self.function(*leaves, implementation)
        results = [results] if isinstance(results, Tensor) else list(results)
        found = [result.detach() for result in results]
        if self.differentiable:
            used = [result for result in results if result.requires_grad]
            # Exact in every dtype.
            grads = [torch.arange(one.numel()).view(one.shape) % 7 / 2 - 1 for one in used]
            grads = [one.to(result) for one, result in zip(grads, used, strict=True)]
            found += torch.autograd.grad(used, leaves, grads)
        return found


def normal(*shapes: tuple[int, ...]) -> list[Tensor]:
    return [torch.randn(shape) for shape in shapes]


def attended(features: int = 9, values: int | None = None, queries: int = 29) -> list[Tensor]:
    """Query and key of grouped heads, and a value."""
    tensors = normal((1, 4, queries, features), (1, 2, 27, features))
    return tensors if values is None else [*tensors, *normal((1, 2, 27, values))]


def of_rows(function: Callable[..., Tensor], **options: Any) -> Callable[..., Tensor]:
    """A reduction of the map under the log-sum-exp of its scores."""

    def call(query: Tensor, key: Tensor, implementation: str) -> Tensor:
        given = query.detach().double(), key.detach().double()
        lse = attention_lse(*given, is_causal=True, enable_gqa=True, implementation="reference")
        lse = lse.to(torch.promote_types(query.dtype, torch.float32))
        more = options | {"is_causal": True, "enable_gqa": True, "implementation": implementation}
        return function(query, key, lse, **more)

    return call


def sparse(query: Tensor, key: Tensor, value: Tensor, implementation: str) -> Any:
    layout = BlockLayout.from_window((query.shape[2], key.shape[2]), (16, 16), left=1)
    return block_sparse_attention(
        query,
        key,
        value,
        layout,
        is_causal=True,
        enable_gqa=True,
        return_lse=True,
        implementation=implementation,
    )


def packed(query: Tensor, key: Tensor, value: Tensor, implementation: str) -> Any:
    longest = query.shape[2] - 5, key.shape[2] - 5
    layout = BlockLayout.from_window(longest, (16, 16), is_causal=True)
    return block_sparse_attention_varlen(
        *(tensor[0].transpose(0, 1) for tensor in (query, key, value)),
        layout,
        torch.tensor([0, 5, query.shape[2]], dtype=torch.int32),
        torch.tensor([0, 5, key.shape[2]], dtype=torch.int32),
        is_causal=True,
        enable_gqa=True,
        return_lse=True,
        implementation=implementation,
    )


def decode(query: Tensor, key: Tensor, value: Tensor, implementation: str) -> Any:
    return block_sparse_decode(
        query,
        key,
        value,
        torch.tensor([[[0, 2]]]),
        seq_lengths=torch.tensor([25]),
        block_size=12,
        is_causal=query.shape[2] > 1,
        return_lse=True,
        implementation=implementation,
    )


def cache_of(length: int, features: int = 9, values: int = 6) -> list[Tensor]:
    return normal((1, 4, length, features), (1, 2, 27, features), (1, 2, 27, values))


def head(features: int = 9) -> list[Tensor]:
    """Hidden states, weight and bias."""
    return normal((21, features), (37, features), (37,))


def targets(input: Tensor, classes: int) -> Tensor:
    """A class for each row, of which some are ignored."""
    target = torch.arange(len(input)) * 7 % classes
    return target.masked_fill(target % 5 == 3, -100)


def with_head(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    def call(input: Tensor, weight: Tensor, bias: Tensor, implementation: str) -> Any:
        more: dict[str, Any] = {"implementation": implementation, "linear_bias": bias} | options
        if more.get("gradient_filter") and implementation == "reference":
            more["gradient_filter"] = None
        result = function(input, weight, targets(input, len(weight)), **more)
        return result if isinstance(result, Tensor) else list(result[:3])

    return call


def divergence(name: str) -> Callable[..., Tensor]:
    def call(input: Tensor, weight: Tensor, bias: Tensor, implementation: str) -> Tensor:
        with torch.no_grad():
            teacher = [0.5 * one.roll(1, 0) for one in (input, weight, bias)]
        return linear_kl_div(
            input,
            weight,
            *teacher[:2],
            student_bias=bias,
            teacher_bias=teacher[2],
            divergence=name,
            implementation=implementation,
        )

    return call


def statistics(logits: Tensor, implementation: str) -> list[Tensor]:
    target = torch.arange(logits.shape[0] * logits[0, 0].numel()) % logits.shape[1]
    target = target.view(logits.shape[:1] + logits.shape[2:])
    weight = torch.arange(logits.shape[1]) / 64
    weight = weight.to(torch.promote_types(logits.dtype, torch.float32))
    given = LogitStats(logits, target, weight, 3, True, True, implementation)
    return list(logit_stats(given)[1:6])


def normalized(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    def call(input: Tensor, residual: Tensor, *parameters: Tensor) -> Any:
        *weights, implementation = parameters
        more = options | {"residual": residual, "implementation": implementation}
        return function(input, input.shape[-1], *weights, **more)

    return call


def of_codes(input: Tensor, implementation: str) -> Tensor:
    """The product with weights of 4 bits in groups, and a bias."""
    columns = input.shape[1]
    codes = torch.arange(23 * -(-columns // 2)) * 37 % 251
    scale, zero_point = (1 + torch.arange(23 * -(-columns // 8)) % n for n in (5, 13))
    return packed_linear(
        input,
        codes.view(23, -1).to(torch.uint8),
        scale.view(23, -1) / 16,
        zero_point.view(23, -1) + 0.25,
        torch.arange(23).to(input) / 8,
        bits=4,
        group_size=8,
        implementation=implementation,
    )


def stepped(kind: Any, **options: Any) -> Callable[..., list[Tensor]]:
    """A step of parameters and gradients, and the states after it."""

    def call(values: Tensor, implementation: str) -> list[Tensor]:
        pairs = [one.chunk(2) for one in values.detach().clone().split((6, 14, 74))]
        parameters = [torch.nn.Parameter(p) for p, _ in pairs]
        for parameter, (_, gradient) in zip(parameters, pairs, strict=True):
            parameter.grad = gradient
        optimizer = kind(parameters, lr=0.1, weight_decay=0.1, **options)
        with pytest.MonkeyPatch.context() as patch:
            if implementation == "triton":
                patch.setattr(step, "_KERNEL_DEVICES", ("cpu",))
            optimizer.step()
        states = [optimizer.state[p][name] for p in parameters for name in optimizer.state[p]]
        return [*[p.detach() for p in parameters], *[state for state in states if state.dim()]]

    return call


CALLS: dict[str, KernelCall] = {
    "attention_lse": KernelCall(
        attended,
        lambda q, k, name: attention_lse(
            q, k, is_causal=True, enable_gqa=True, implementation=name
        ),
    ),
    "attention_entropy": KernelCall(attended, of_rows(attention_entropy)),
    "attention_column_mass": KernelCall(
        attended, of_rows(attention_column_mass, query_window=22), differentiable=False
    ),
    "block_pooled_attention max": KernelCall(
        attended, of_rows(block_pooled_attention, block_size=(20, 5)), differentiable=False
    ),
    "block_pooled_attention sum": KernelCall(
        attended,
        of_rows(block_pooled_attention, block_size=(5, 20), pool="sum"),
        differentiable=False,
    ),
    "block_sparse_attention": KernelCall(partial(attended, values=6), sparse),
    "block_sparse_attention_varlen": KernelCall(partial(attended, values=6), packed),
    "block_sparse_decode one": KernelCall(partial(cache_of, 1), decode, differentiable=False),
    "block_sparse_decode several": KernelCall(partial(cache_of, 3), decode, differentiable=False),
    "linear_cross_entropy": KernelCall(
        head, with_head(linear_cross_entropy, softcap=5.0, label_smoothing=0.1, reduction="none")
    ),
    "linear_cross_entropy filtered": KernelCall(
        head, with_head(linear_cross_entropy, gradient_filter=1e-12)
    ),
    "linear_squentropy": KernelCall(head, with_head(linear_squentropy)),
    "linear_log_probs": KernelCall(head, with_head(linear_log_probs, temperature=0.7)),
    **{
        f"linear_kl_div {name}": KernelCall(head, divergence(name))
        for name in ("forward", "reverse")
    },
    "linear_kl_div jsd": KernelCall(head, divergence("jsd")),
    "logit_stats": KernelCall(lambda: normal((21, 37)), statistics),
    "logit_stats of images": KernelCall(lambda: normal((3, 21, 7)), statistics),
    "rms_norm": KernelCall(
        lambda: normal((21, 37), (21, 37), (37,)), normalized(rms_norm, weight_offset=1.0)
    ),
    "layer_norm": KernelCall(
        lambda: normal((21, 37), (21, 37), (37,), (37,)), normalized(layer_norm)
    ),
    "packed_linear": KernelCall(lambda: normal((21, 37)), of_codes),
    "adamw": KernelCall(lambda: normal((94,)), stepped(AdamW, amsgrad=True), differentiable=False),
    "lion": KernelCall(lambda: normal((94,)), stepped(Lion), differentiable=False),
}
every_call = pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())


@cache
def sources() -> dict[str, list[str]]:
    """The modules of kernels, and the kernels of each."""
    root = Path(tilework.__file__).parent
    found = {}
    for path in sorted(root.rglob("*.py")):
        names = re.findall(r"^@triton\.jit(?:\(.*\))?\ndef (\w+_kernel)\(", path.read_text(), re.M)
        if names:
            parts = path.relative_to(root.parent).with_suffix("").parts
            found[".".join(parts).removesuffix(".__init__")] = names
    return found


def tables() -> Iterator[Tuned[Any]]:
    """All tables of block sizes."""
    for module in sources():
        for value in vars(importlib.import_module(module)).values():
            some = value.values() if isinstance(value, dict) else [value]
            yield from (one for one in some if isinstance(one, Tuned))


class Launch(NamedTuple):
    kernel: str
    arguments: dict[str, Any]


@contextmanager
def launches(*, run: bool = True) -> Iterator[list[Launch]]:
    """Note what is launched, and run it or not."""
    from triton.runtime.interpreter import InterpretedFunction

    noted: list[Launch] = []
    original = InterpretedFunction.run

    def note(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        named = dict(zip(kernel.arg_names, args, strict=False)) | options
        noted.append(Launch(kernel.__name__, named))
        return original(kernel, *args, grid=grid, warmup=warmup or not run, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InterpretedFunction, "run", note)
        yield noted


@pytest.mark.parametrize("tall", [True, False], ids=["tall", "wide"])
@every_call
def test_tiles_on_both_sides_of_square(call: KernelCall, tall: bool) -> None:
    sizes = (16, 4) if tall else (4, 16)
    leaves = call.draw()
    truth = call.solve([leaf.double() for leaf in leaves], "reference")
    composed = call.solve(leaves, "reference")
    with small_blocks(*sizes):
        found = call.solve(leaves, "triton")
    for actual, other, exact in zip(found, composed, truth, strict=True):
        assert_exact(actual, other, exact)


@pytest.mark.parametrize("dtype", HALF, ids=dtype_name)
@pytest.mark.parametrize(
    ("name", "implementation"),
    [
        (name, implementation)
        for name in CALLS
        for implementation in ("reference", "tiled")
        # Gradients of these start from rounded results, unless they are the definition's.
        if implementation == "reference" or not re.match("block_sparse_attention|.*norm", name)
    ],
)
def test_rounds_once(
    name: str, implementation: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half precision is that of the arguments and of the results, not of what is between."""
    monkeypatch.setattr(tiles, "_BFLOAT16_PRODUCTS", False)
    call = CALLS[name]
    leaves = [leaf.to(dtype) for leaf in call.draw()]
    truth = call.solve([leaf.double() for leaf in leaves], "reference")
    for actual, exact in zip(call.solve(leaves, implementation), truth, strict=True):
        unit = torch.finfo(actual.dtype).eps if actual.dtype == dtype else 0.0
        single = 64 * torch.finfo(torch.float32).eps * exact[exact.isfinite()].abs().max()
        torch.testing.assert_close(actual.double(), exact, rtol=0.51 * unit, atol=float(single))


def lowered(name: str, leaves: list[Tensor]) -> list[Tensor]:
    """The same with all logits or scores about a thousand lower."""
    if len(leaves) == 1:
        return [leaves[0] - 1000]
    if name.startswith("linear"):
        return [*leaves[:2], leaves[2] - 1000]
    query, key, *value = leaves
    # A feature more of -64 and 64, and others of 0 that make the scale a power of 2.
    query, key = (
        F.pad(F.pad(one, (1, 0), value=size), (0, 15 - one.shape[-1]))
        for one, size in ((query, -64), (key, 64))
    )
    return [query, key, *value]


@pytest.mark.parametrize(
    ("name", "implementation"),
    [
        (name, implementation)
        for name in CALLS
        if "norm" not in name
        for implementation in ("tiled", "chunked", "triton")
        if implementation != "chunked" or name.startswith(("linear_c", "linear_s"))
    ],
)
def test_logits_far_below_zero(
    name: str, implementation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No running sum may start from a peak of 0, nor decay by another than its own."""
    small_tiles(monkeypatch)
    call = CALLS[name]
    leaves = lowered(name, call.draw())
    truth = call.solve([leaf.double() for leaf in leaves], "reference")
    composed = call.solve(leaves, "reference")
    for actual, other, exact in zip(
        call.solve(leaves, implementation), composed, truth, strict=True
    ):
        assert_exact(actual, other, exact)


def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make small problems take several tiles in plain PyTorch, and chunks."""
    for module, values in (
        (tiles, {"TOKENS": 8, "TILE": 8 * 12, "_BFLOAT16_PRODUCTS": False}),
        (chunked, {"CPU_TOKENS": 8, "MIN_CPU_TOKENS": 8}),
        (blocks, {"ELEMENTS": 8 * 12}),
        (map_tiled, {"QUERIES": 8, "KEYS": 8, "SCORES": 2 * 8 * 8}),
        (sparse_tiled, {"SCORES": 2 * 16 * 16}),
        (decode_tiled, {"ELEMENTS": 256, "PLACES": 4}),
        (norm_tiled, {"TILE": 64}),
        (packed_common, {"ELEMENTS": 256}),
    ):
        for name, value in values.items():
            monkeypatch.setattr(module, name, value)


def swing(dtype: torch.dtype, *shape: int, dim: int = 0) -> Tensor:
    """Numbers of a dtype whose sums grow over the first half of a dimension, and then come back.

    They end near a rounding unit of what they were on their way.
    """
    units = round(1 / torch.finfo(dtype).eps)
    there = torch.randint(units, 2 * units, shape)
    back = (there.flip(dim) + torch.randint(-3, 4, shape)).clamp(units, 2 * units - 1)
    return torch.cat((there, -back), dim) / units


def gradients(
    results: Tensor, leaves: list[Tensor], upstream: Tensor | None = None
) -> list[Tensor]:
    upstream = torch.ones_like(results) if upstream is None else upstream.to(results)
    return list(torch.autograd.grad(results, leaves, upstream, retain_graph=True))


def map_sums(query: Tensor, key: Tensor, implementation: str) -> list[Tensor]:
    lse = attention_lse(query, key, enable_gqa=True, implementation=implementation)
    return gradients(lse, [query, key])


def attention_sums(
    query: Tensor, key: Tensor, value: Tensor, upstream: Tensor, implementation: str
) -> list[Tensor]:
    lengths = query.shape[2], key.shape[2]
    output, lse = block_sparse_attention(
        query,
        key,
        value,
        BlockLayout.from_window(lengths, (16, 16)),
        enable_gqa=True,
        return_lse=True,
        implementation=implementation,
    )
    return [output, *gradients(lse, [query, key]), *gradients(output, [value], upstream)]


def decoding_sums(query: Tensor, key: Tensor, value: Tensor, implementation: str) -> list[Tensor]:
    with torch.no_grad():
        return [block_sparse_decode(query, key, value, implementation=implementation)]


def head_sums(
    input: Tensor, weight: Tensor, implementation: str, gradient_filter: float | None = None
) -> list[Tensor]:
    loss = linear_cross_entropy(
        input,
        weight,
        torch.zeros(len(input), dtype=torch.int64),
        reduction="sum",
        gradient_filter=None if implementation == "reference" else gradient_filter,
        implementation=implementation,
    )
    return gradients(loss, [input, weight])


def divergence_sums(input: Tensor, weight: Tensor, implementation: str) -> list[Tensor]:
    # The teacher knows that it is the first class.
    bias = torch.full((len(weight),), -torch.inf, dtype=weight.dtype)
    bias[0] = 0
    zeros = [torch.zeros_like(one).detach() for one in (input, weight)]
    loss = linear_kl_div(
        input, weight, *zeros, teacher_bias=bias, reduction="sum", implementation=implementation
    )
    return gradients(loss, [input, weight])


def norm_sums(
    input: Tensor, weight: Tensor, bias: Tensor, upstream: Tensor, implementation: str
) -> list[Tensor]:
    shape = input.shape[-1]
    centered = layer_norm(input, shape, weight, bias, 0.0, implementation=implementation)
    plain = rms_norm(input, shape, weight, 0.0, implementation=implementation)
    found = gradients(centered, [weight, bias], upstream)
    return found + gradients(plain, [weight], upstream)


def apart(dtype: torch.dtype, *leading: int) -> list[Tensor]:
    """Two swings of 64 rows whose products are 0."""
    query = torch.zeros(*leading, 64, 8)
    key = query[:, :1].clone() if leading else query.clone()
    query[..., :4] = swing(dtype, *query.shape[:-2], 32, 4, dim=-2)
    key[..., 4:] = swing(dtype, *key.shape[:-2], 32, 4, dim=-2)
    return [query, key]


def first_is_nothing(dtype: torch.dtype) -> list[Tensor]:
    """Hidden states and a head whose first class, the target, adds nothing."""
    input, weight = apart(dtype)
    weight[[0, -1]] = 0
    return [input, weight]


def product_sums(input: Tensor, upstream: Tensor, implementation: str) -> list[Tensor]:
    """With weights of ones."""
    grids = torch.ones(64, 1), torch.zeros(64, 1)
    codes = torch.full((64, 32), 17, dtype=torch.uint8)
    output = packed_linear(input, codes, *grids, bits=4, implementation=implementation)
    return [output, *gradients(output, [input], upstream)]


def signs(rows: int, columns: int) -> Tensor:
    """Columns of ones and of minus ones."""
    return (1 - 2.0 * (torch.arange(columns) % 2)).repeat(rows, 1)


SUMS: dict[str, tuple[Callable[..., list[Tensor]], Callable[[torch.dtype], list[Tensor]]]] = {
    "_attention_map": (map_sums, lambda dtype: apart(dtype, 1, 2)),
    "block_sparse": (
        attention_sums,
        lambda dtype: [
            *apart(dtype, 1, 2),
            swing(dtype, 1, 1, 32, 4, dim=-2),
            swing(dtype, 1, 2, 32, 4, dim=-2),
        ],
    ),
    "block_sparse_decode": (
        decoding_sums,
        lambda dtype: [
            torch.zeros(1, 2, 1, 4),
            *(swing(dtype, 1, 1, 32, 4, dim=-2) for _ in range(2)),
        ],
    ),
    "linear": (head_sums, first_is_nothing),
    "linear filtered": (partial(head_sums, gradient_filter=1e-12), first_is_nothing),
    "linear_kl_div": (divergence_sums, first_is_nothing),
    "_row_norm": (
        norm_sums,
        lambda dtype: [signs(64, 8), torch.ones(8), torch.ones(8), swing(dtype, 32, 8)],
    ),
    "packed_linear": (
        product_sums,
        lambda dtype: [swing(dtype, 3, 32, dim=1), swing(dtype, 3, 32, dim=1)],
    ),
}


@pytest.mark.parametrize(
    ("name", "implementation", "dtype"),
    [
        pytest.param(name, implementation, dtype, id=f"{name}-{implementation}-{dtype_name(dtype)}")
        for name in SUMS
        for implementation in ("reference", "tiled", "chunked", "triton")
        for dtype in HALF
        if implementation != "chunked" or name == "linear"
        if implementation != "triton" or dtype == torch.float16  # the interpreter is slow
    ],
)
def test_sums_are_rounded_at_their_end(
    name: str, implementation: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Terms are exact in half precision, sums on their way are not."""
    small_tiles(monkeypatch)
    function, draw = SUMS[name]
    tensors = draw(dtype)
    for tensor in tensors:
        assert torch.equal(tensor.to(dtype).float(), tensor)

    def solve(dtype: torch.dtype, implementation: str) -> list[Tensor]:
        leaves = [tensor.to(dtype).requires_grad_() for tensor in tensors]
        return function(*leaves, implementation)

    with small_blocks(16, 16):
        found = solve(dtype, implementation)
    for actual, exact in zip(found, solve(torch.float64, "reference"), strict=True):
        assert actual.dtype == dtype
        assert_exact(actual, exact.to(dtype), exact)


@contextmanager
def small_blocks(first: int, second: int) -> Iterator[None]:
    """Tiles of a size in all kernels."""
    with ExitStack() as stack:
        for table in tables():
            entry = table.choose("interpreter", torch.float32)
            sizes = dict(zip(entry._fields, (first, second), strict=False))
            if "block_inner" in entry._fields:  # no larger than tiles of it
                sizes["block_inner"] = 4
            stack.enter_context(table.override(entry._replace(**sizes)))
        yield


ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "gfx942", "sm_120")


@pytest.mark.parametrize("features", [3, 200])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=dtype_name)
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_launches_are_what_compilers_take(
    arch: str, dtype: torch.dtype, features: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_triton, "INTERPRETED", False)
    monkeypatch.setattr(_triton, "architecture", lambda device: arch)
    # The wider of keys and values decides.
    fewer = features // 10 + 1
    draws = {
        "attended": partial(attended, features, fewer),
        "attended values": partial(attended, fewer, features),
        "one": partial(cache_of, 1, features, fewer),
        "several": partial(cache_of, 3, fewer, features),
        "head": partial(head, features),
    }
    calls: list[tuple[Callable[[], list[Tensor]], KernelCall]] = [
        *((draws[name], CALLS["block_sparse_attention"]) for name in draws if "attended" in name),
        *((draws[name], CALLS[f"block_sparse_decode {name}"]) for name in ("one", "several")),
        (lambda: normal((features, 256)), CALLS["packed_linear"]),
        *((draws["head"], call) for name, call in CALLS.items() if name.startswith("linear")),
        *(
            (partial(attended, features), call)
            for name, call in CALLS.items()
            if name.startswith(("attention", "block_pooled"))
        ),
    ]
    for draw, call in calls:
        for allow_tf32 in (False, True):
            with ExitStack() as stack, launches(run=False) as launched:
                stack.enter_context(tf32(allow_tf32))
                asked = [stack.enter_context(table.asked()) for table in tables()]
                call.solve([leaf.to(dtype) for leaf in draw()], "triton")
            entries = [
                (place, table.choose(*place))
                for table, places in zip(tables(), asked, strict=True)
                for place in places
            ]
            assert launched
            for kernel, given in launched:
                check_launch(kernel, given, entries, allow_tf32)


@contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """What torch was told of float32 products."""
    matmul = torch.backends.cuda.matmul
    before, matmul.allow_tf32 = matmul.allow_tf32, allowed
    try:
        yield
    finally:
        matmul.allow_tf32 = before


def check_launch(
    kernel: str, given: dict[str, Any], entries: list[tuple[_triton.Place, Any]], allow_tf32: bool
) -> None:
    if "PRECISION" not in given:
        return
    assert given["PRECISION"] == ("tf32" if allow_tf32 else "ieee"), kernel
    constants = {
        name: value
        for name, value in given.items()
        if name.isupper() and type(value) is int and name not in ("PACK", "GROUP", "BITS", "UNIT")
    }
    for name, value in constants.items():
        assert value >= 16, f"{kernel}: a product takes no {name} of {value}"
        assert value & (value - 1) == 0, f"{kernel}: {name} of {value}"
    assert given["num_warps"] in {entry.num_warps for _, entry in entries}, kernel
    widest = max(constants.get("FEATURES", 0), constants.get("VALUES", 0))
    assert widest in (0, *(place.size for place, _ in entries)), f"{kernel}: a tile for others"
    assert all(place.dtype is not None for place, _ in entries)


def test_every_kernel_is_here() -> None:
    """Of those with sums; a layout's take whole numbers and have no tables."""
    names = {
        name for module, names in sources().items() for name in names if "layout" not in module
    }
    with launches(run=False) as launched:
        for call in CALLS.values():
            call.solve(call.draw(), "triton")
    assert {kernel for kernel, _ in launched} == names


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("implementation", ["reference", "tiled", "triton"])
@pytest.mark.parametrize(
    ("name", "last", "blind"),
    [
        ("attention_lse", 26, (slice(None), slice(None), slice(26))),
        ("attention_entropy", 26, (slice(None), slice(None), slice(26))),
        ("block_sparse_attention", 26, (slice(None), slice(None), slice(26))),
        ("block_sparse_attention_varlen", 26, (slice(26),)),
        ("block_sparse_decode several", 24, (slice(None), slice(None), slice(2))),
    ],
)
def test_hidden_keys_do_not_reach_a_result(
    name: str, last: int, blind: Any, implementation: str, bad: float
) -> None:
    """Of the keys, the last is in one tile with others; the blind queries do not see it."""
    call = CALLS[name]._replace(differentiable=False)
    query, key, *value = call.draw()
    spoiled = key.clone()
    spoiled[:, :, last:] = bad
    with small_blocks(16, 16):
        clean, found = (call.solve([query, one, *value], implementation) for one in (key, spoiled))
    for before, after in zip(clean, found, strict=True):
        torch.testing.assert_close(after[blind], before[blind])
