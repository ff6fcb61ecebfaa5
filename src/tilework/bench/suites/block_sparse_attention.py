"""Causal attention restricted to blocks, forward and backward, against torch's attentions.

Sizes: ``L`` positions, ``H`` heads of ``E`` features, and ``K`` blocks of 64 keys that a block of
queries sees. Where ``K`` is all blocks, this is dense causal attention.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tilework.attention import BlockLayout, block_sparse_attention
from tilework.attention.block_sparse.common import pair_operations
from tilework.bench.suites import (
    Candidate,
    Case,
    Growth,
    Inputs,
    Results,
    Step,
    Suite,
    Unavailable,
    implementations,
)

FORWARD, TRAINING = "forward", "forward+backward"
BLOCK = 64
NAMES = ("query", "key", "value")

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def cases(device: str) -> list[Case]:
    """An eighth of causal attention, a quarter and all of it, other shares, and a small one."""
    sizes = {"L": 8192, "H": 4, "E": 64}
    dtypes: tuple[str, ...] = ("float32",)
    if device != "cpu":
        sizes, dtypes = {"L": 32768, "H": 32, "E": 128}, ("bfloat16",)
    blocks = sizes["L"] // BLOCK
    return [
        *(
            Case(kind, sizes | {"K": kept}, dtypes)
            for kept in (blocks // 16, blocks // 8, blocks)
            for kind in (FORWARD, TRAINING)
        ),
        *(Case(TRAINING, sizes | {"K": blocks // part}, dtypes) for part in (32, 4)),
        Case(TRAINING, {"L": 512, "H": 2, "E": 32, "K": 3}, dtypes, quick=True),
    ]


def growth() -> tuple[Growth, ...]:
    """The length at an eighth of the blocks, then the blocks of one length."""
    lengths = [1024 * factor for factor in (1, 2, 3, 4, 6, 8, 12, 16)]
    by_length = [{"L": length, "H": 1, "E": 64, "K": length // BLOCK // 8} for length in lengths]
    by_blocks = [{"L": 8192, "H": 1, "E": 64, "K": 2**power} for power in range(8)]
    return tuple(
        Growth(over, tuple(Case(TRAINING, sizes, ("float32",)) for sizes in series))
        for over, series in (("L", by_length), ("K", by_blocks))
    )


def inputs(case: Case, dtype: torch.dtype, device: torch.device) -> Inputs:
    """Queries, keys, values, the gradient of the output, and which blocks are active."""
    length, heads, features, kept = case.sizes.values()
    generator = torch.Generator(device).manual_seed(0)

    def normal() -> Tensor:
        shape = (1, heads, length, features)
        return torch.randn(shape, device=device, generator=generator).to(dtype)

    blocks = length // BLOCK
    scores = torch.rand(1, heads, blocks, blocks, device=device, generator=generator)
    layout = BlockLayout.from_scores_topk(scores, kept, BLOCK, is_causal=True)
    tensors = {name: normal().requires_grad_(case.kind == TRAINING) for name in NAMES}
    return {**tensors, "upstream": normal(), "active": layout.to_dense()}


def truth(case: Case, inputs: Inputs) -> Results:
    """The closed form in float64, for a block of queries at a time; no autograd."""
    query, key, value, upstream = (
        inputs[name].detach()[0].double() for name in (*NAMES, "upstream")
    )
    length, _, features, _ = case.sizes.values()
    output, *grads = (torch.zeros_like(tensor) for tensor in (query, query, key, value))
    position = torch.arange(length, device=query.device)
    for head, active in enumerate(inputs["active"][0]):
        for row, columns in enumerate(active):
            places = position.view(-1, BLOCK)[columns].flatten()
            rows = position[row * BLOCK : (row + 1) * BLOCK]
            scores = query[head, rows] @ key[head, places].T * features**-0.5
            weights = scores.masked_fill(places > rows[:, None], -torch.inf).softmax(1)
            result = weights @ value[head, places]
            output[head, rows] = result
            if case.kind == FORWARD:
                continue
            above = upstream[head, rows]
            slope = above @ value[head, places].T - (above * result).sum(1, keepdim=True)
            of_scores = weights * slope * features**-0.5
            grads[0][head, rows] = of_scores @ key[head, places]
            grads[1][head].index_add_(0, places, of_scores.T @ query[head, rows])
            grads[2][head].index_add_(0, places, weights.T @ above)
    results = {"output": output[None]}
    if case.kind == TRAINING:
        results |= {f"grad {name}": grad[None] for name, grad in zip(NAMES, grads, strict=True)}
    return results


def pairs(case: Case) -> int:
    """The pairs of query and key that see each other, in all heads."""
    length, heads, _, kept = case.sizes.values()
    blocks = sum(min(kept, row + 1) for row in range(length // BLOCK))
    hidden = length * (BLOCK - 1) // 2  # above the diagonal of diagonal blocks
    return heads * (blocks * BLOCK**2 - hidden)


def flops(case: Case) -> int:
    """Two matrix products forward, five backward."""
    features = case.sizes["E"]
    of_pair = pair_operations(features, features)
    if case.kind == TRAINING:
        of_pair += pair_operations(features, features, NAMES)
    return of_pair * pairs(case)


def traffic(case: Case, dtype: torch.dtype) -> int:
    """Read query, key and value, write the output; backward its gradient and three more."""
    length, heads, features, _ = case.sizes.values()
    return (8 if case.kind == TRAINING else 4) * length * heads * features * dtype.itemsize


def _run(case: Case, inputs: Inputs, attention: Attention) -> Callable[[], Results]:
    tensors = [inputs[name] for name in NAMES]

    def forward() -> Results:
        with torch.no_grad():
            return {"output": attention(*tensors)}

    def forward_and_backward() -> Results:
        output = attention(*tensors)
        grads = torch.autograd.grad(output, tensors, inputs["upstream"])
        named = zip((f"grad {name}" for name in NAMES), grads, strict=True)
        return {"output": output.detach(), **dict(named)}

    return forward_and_backward if case.kind == TRAINING else forward


def _layout(inputs: Inputs) -> BlockLayout:
    length = inputs["query"].shape[2]
    return BlockLayout.from_dense(inputs["active"], BLOCK, seq_lengths=(length, length))


def _ours(case: Case, inputs: Inputs, implementation: str) -> Callable[[], Results]:
    layout = _layout(inputs)
    if implementation == "reference" and case.sizes["L"] > 2048:
        raise Unavailable("it stores all scores, several times")

    def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        result = block_sparse_attention(
            query, key, value, layout, is_causal=True, implementation=implementation
        )
        assert isinstance(result, Tensor)
        return result

    return _run(case, inputs, attention)


def _given(case: Case, inputs: Inputs) -> dict[str, Any]:
    features = case.sizes["E"]
    return {"block_size": (BLOCK, BLOCK), "features": features, "values": features}


def _masked(case: Case, inputs: Inputs) -> Step:
    visible = _layout(inputs).to_elements().tril()

    def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=visible)

    return Step(_run(case, inputs, attention), "F.scaled_dot_product_attention with a mask")


def _causal(case: Case, inputs: Inputs) -> Step:
    if case.sizes["K"] * BLOCK < case.sizes["L"]:
        raise Unavailable("it attends to all blocks")

    def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, is_causal=True)

    return Step(_run(case, inputs, attention), "F.scaled_dot_product_attention, causal")


def _flex(case: Case, inputs: Inputs) -> Step:
    from torch.nn.attention.flex_attention import flex_attention

    if case.kind == TRAINING and inputs["query"].device.type == "cpu":
        raise Unavailable("it has no backward pass on the CPU")
    mask = _layout(inputs).to_flex(is_causal=True)
    compiled = torch.compile(flex_attention, dynamic=False)

    def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        result: Tensor = compiled(query, key, value, block_mask=mask)
        return result

    return Step(_run(case, inputs, attention), "inductor of flex_attention")


SUITE = Suite(
    module=__name__,
    about="causal attention restricted to blocks of 64 x 64",
    cases=cases,
    inputs=inputs,
    candidates=(
        *implementations("attention.block_sparse_attention", _ours, _given),
        Candidate("torch sdpa (mask)", _masked),
        Candidate("torch sdpa (causal)", _causal),
        Candidate("torch flex_attention (compiled)", _flex),
    ),
    composition="torch sdpa (mask)",
    truth=truth,
    flops=flops,
    products=True,
    traffic=traffic,
    rank=1,
    growth=growth(),
)
