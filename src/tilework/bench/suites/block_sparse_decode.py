"""Attention of one query token to blocks of its cache, contiguous or paged, as in generation.

Sizes: ``B`` sequences of ``S`` tokens, ``H`` heads of queries, ``G`` heads of keys and values of
``E`` features, and ``K`` blocks of 64 tokens that each head selects. Where ``K`` is all blocks,
there are no lists, and this is dense attention. Peers that know no pages put them in order first,
which is timed with them; masks are made before.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from tilework.attention import BlockLayout, block_sparse_decode, paged_block_sparse_decode
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
    by_kind,
    implementations,
)

CONTIGUOUS, PAGED = "contiguous", "paged"
BLOCK, PAGE = 64, 16


def cases(device: str) -> list[Case]:
    """A tenth of the blocks and all of them, many sequences and one; a small one."""
    sizes = {"B": 8, "S": 16384, "H": 16, "G": 4, "E": 128}
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    if device != "cpu":
        sizes |= {"S": 131072, "H": 32, "G": 8}
        dtypes = ("bfloat16",)
    blocks = sizes["S"] // BLOCK
    return [
        *(
            Case(kind, sizes | {"B": batch, "K": kept}, dtypes)
            for kind, batch, kept in (
                (CONTIGUOUS, 8, blocks // 10),
                (CONTIGUOUS, 1, blocks),
                (PAGED, 8, blocks // 10),
                (CONTIGUOUS, 1, blocks // 10),
                (PAGED, 1, blocks),
                (CONTIGUOUS, 8, blocks),
                (PAGED, 1, blocks // 10),
                (PAGED, 8, blocks),
            )
        ),
        Case(PAGED, {"B": 2, "S": 2048, "H": 4, "G": 2, "E": 64, "K": 3}, ("float32",), quick=True),
    ]


def growth() -> tuple[Growth, ...]:
    """The length at a quarter of the blocks, then the blocks of one length."""
    sizes = {"B": 1, "S": 65536, "H": 32, "G": 8, "E": 64}
    by_length = [sizes | {"S": 2**power, "K": 2**power // BLOCK // 4} for power in range(10, 18)]
    by_blocks = [sizes | {"K": 2**power} for power in range(2, 10)]
    return tuple(
        Growth(over, tuple(Case(CONTIGUOUS, sizes, ("float32",)) for sizes in series))
        for over, series in (("S", by_length), ("K", by_blocks))
    )


def inputs(case: Case, dtype: torch.dtype, device: torch.device) -> Inputs:
    """Queries, the cache, and which blocks are selected; with pages, where they are."""
    batch, tokens, heads, kv_heads, features, kept = case.sizes.values()
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, generator=generator).to(dtype)

    scores = torch.rand(batch, kv_heads, tokens // BLOCK, device=device, generator=generator)
    shape = (batch, kv_heads, tokens, features)
    others = {"blocks": scores.topk(kept).indices.sort().values.int()}
    if case.kind == PAGED:
        pages = batch * tokens // PAGE
        shape = (pages, PAGE, kv_heads, features)
        order = torch.randperm(pages, device=device, generator=generator)
        others["table"] = order.view(batch, -1).int()
        others["lengths"] = torch.full((batch,), tokens, dtype=torch.int32, device=device)
    query = normal(batch, heads, 1, features)
    return {"query": query, "key": normal(*shape), "value": normal(*shape), **others}


def truth(case: Case, inputs: Inputs) -> Results:
    """The softmax over the selected tokens in float64, for one head of keys at a time."""
    batch, _, heads, kv_heads, features, _ = case.sizes.values()
    query = inputs["query"].double().view(batch, kv_heads, heads // kv_heads, features)
    output = torch.zeros_like(query)
    inside = torch.arange(BLOCK, device=query.device)
    for row in range(batch):
        for head in range(kv_heads):
            tokens = (inputs["blocks"][row, head, :, None].long() * BLOCK + inside).flatten()
            keys, values = (
                _tokens(inputs, name, row, head, tokens).double() for name in ("key", "value")
            )
            scores = query[row, head] @ keys.T * features**-0.5
            output[row, head] = scores.softmax(1) @ values
    return {"output": output.view(batch, heads, 1, features)}


def _tokens(inputs: Inputs, name: str, row: int, head: int, tokens: Tensor) -> Tensor:
    """What a head's cache holds of some tokens of a sequence."""
    if "table" not in inputs:
        return inputs[name][row, head, tokens]
    pages = inputs["table"][row].long()[tokens // PAGE]
    return inputs[name][pages, tokens % PAGE, head]


def flops(case: Case) -> int:
    """Two products of each head with the selected tokens."""
    batch, _, heads, _, features, kept = case.sizes.values()
    return batch * heads * kept * BLOCK * pair_operations(features, features)


def traffic(case: Case, dtype: torch.dtype) -> int:
    """Read the selected keys and values, and the query; write the output. Lists hardly count."""
    batch, _, heads, kv_heads, features, kept = case.sizes.values()
    return 2 * batch * features * (kv_heads * kept * BLOCK + heads) * dtype.itemsize


def _run(attention: Callable[[], Tensor]) -> Callable[[], Results]:
    def run() -> Results:
        with torch.no_grad():
            return {"output": attention()}

    return run


def _is_dense(case: Case) -> bool:
    return case.sizes["K"] * BLOCK == case.sizes["S"]


def _ours(case: Case, inputs: Inputs, implementation: str) -> Callable[[], Results]:
    if implementation == "reference" and case.sizes["B"] * case.sizes["S"] > 2**14:
        raise Unavailable("it copies all keys and values, several times")
    query, key, value = (inputs[name] for name in ("query", "key", "value"))
    blocks = None if _is_dense(case) else inputs["blocks"]

    def attention() -> Tensor:
        if case.kind == PAGED:
            output = paged_block_sparse_decode(
                query,
                key,
                value,
                inputs["table"],
                inputs["lengths"],
                blocks,
                block_size=BLOCK,
                implementation=implementation,
            )
        else:
            output = block_sparse_decode(
                query, key, value, blocks, block_size=BLOCK, implementation=implementation
            )
        assert isinstance(output, Tensor)
        return output

    return _run(attention)


def _in_order(inputs: Inputs, cache: Tensor) -> Tensor:
    """Keys or values as attention takes them; pages are copied."""
    if "table" not in inputs:
        return cache
    return cache[inputs["table"]].flatten(1, 2).transpose(1, 2)


def _selected(inputs: Inputs, cache: Tensor) -> Tensor:
    """The keys or values of the selected blocks, copied."""
    blocks = inputs["blocks"]
    batch, kv_heads, _ = blocks.shape
    row = torch.arange(batch, device=blocks.device)[:, None, None]
    head = torch.arange(kv_heads, device=blocks.device)[:, None]
    if "table" not in inputs:
        return cache.view(batch, kv_heads, -1, BLOCK, cache.shape[3])[row, head, blocks].flatten(
            2, 3
        )
    parts = torch.arange(BLOCK // PAGE, device=blocks.device)
    places = (blocks[..., None] * len(parts) + parts).flatten(2)
    pages = inputs["table"][row, places]
    return cache[pages, :, head].flatten(2, 3)


def _torch(
    inputs: Inputs, part: Callable[[Inputs, Tensor], Tensor], visible: Tensor | None = None
) -> Tensor:
    key, value = (part(inputs, inputs[name]) for name in ("key", "value"))
    return F.scaled_dot_product_attention(
        inputs["query"], key, value, attn_mask=visible, enable_gqa=True
    )


def _dense(case: Case, inputs: Inputs) -> Step:
    if not _is_dense(case):
        raise Unavailable("it attends to all blocks")

    return Step(_run(lambda: _torch(inputs, _in_order)), "F.scaled_dot_product_attention")


def _given(case: Case, inputs: Inputs) -> dict[str, int]:
    return dict.fromkeys(("features", "values"), case.sizes["E"])


def _masked(case: Case, inputs: Inputs) -> Step:
    batch, tokens, heads, kv_heads, *_ = case.sizes.values()
    query, blocks = inputs["query"], inputs["blocks"]
    active = torch.zeros(batch, kv_heads, tokens // BLOCK, dtype=torch.bool, device=query.device)
    active.scatter_(2, blocks.long(), True)
    visible = active.repeat_interleave(BLOCK, 2).repeat_interleave(heads // kv_heads, 1)

    kernel = "F.scaled_dot_product_attention with a mask"
    return Step(_run(lambda: _torch(inputs, _in_order, visible[:, :, None])), kernel)


def _gathered(case: Case, inputs: Inputs) -> Step:
    if _is_dense(case):
        raise Unavailable("it would copy all blocks")

    kernel = "F.scaled_dot_product_attention of a copy"
    return Step(_run(lambda: _torch(inputs, _selected)), kernel)


def _flex(case: Case, inputs: Inputs) -> Step:
    from torch.nn.attention.flex_attention import flex_attention

    if case.kind == PAGED:
        raise Unavailable("it is not measured with pages")
    query, blocks = inputs["query"], inputs["blocks"]
    batch, tokens, heads, kv_heads, *_ = case.sizes.values()
    active = torch.zeros(batch, kv_heads, 1, tokens // BLOCK, dtype=torch.bool, device=query.device)
    active.scatter_(3, blocks.long()[:, :, None], True)
    layout = BlockLayout.from_dense(active, BLOCK, seq_lengths=(1, tokens))
    mask = layout.to_flex(num_heads=heads)
    compiled = torch.compile(flex_attention, dynamic=False)

    def attention() -> Tensor:
        result: Tensor = compiled(
            query, inputs["key"], inputs["value"], block_mask=mask, enable_gqa=True
        )
        return result

    return Step(_run(attention), "inductor of flex_attention")


SUITE = Suite(
    module=__name__,
    about="attention of one query token to blocks of 64 tokens of its cache",
    cases=cases,
    inputs=inputs,
    candidates=(
        *by_kind(
            {
                CONTIGUOUS: implementations("attention.block_sparse_decode", _ours, _given),
                PAGED: implementations("attention.paged_block_sparse_decode", _ours, _given),
            }
        ),
        Candidate("torch sdpa (mask)", _masked),
        Candidate("torch sdpa (gathered)", _gathered),
        Candidate("torch sdpa (dense)", _dense),
        Candidate("torch flex_attention (compiled)", _flex),
    ),
    composition="torch sdpa (mask)",
    truth=truth,
    flops=flops,
    products=True,
    traffic=traffic,
    rank=3,
    growth=growth(),
)
