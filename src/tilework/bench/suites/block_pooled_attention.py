"""The map of causal attention, reduced without storing it: pooled by blocks, by keys, by queries.

Sizes: ``L`` positions, ``H`` heads of ``E`` features, blocks of ``B`` queries and keys. The
log-sum-exp is given, as that of a forward pass before.

The sums over blocks are one dense attention too, whose values say in which block a key is. Where
there are as many blocks as features, it is as large as attention itself, and its time is the
yardstick of all kinds.
"""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from tilework.attention import attention_column_mass, attention_entropy, block_pooled_attention
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

MAX, SUM, MASS, ENTROPY = "max of blocks", "sum of blocks", "mass of keys", "entropy of queries"
OPERATORS = {
    SUM: "block_pooled_attention",
    MAX: "block_pooled_attention",
    MASS: "attention_column_mass",
    ENTROPY: "attention_entropy",
}
TRUTH_ROWS = 1024

Reduction = Callable[[Tensor, Tensor, Tensor], Tensor]


def cases(device: str) -> list[Case]:
    """Every kind, first that with the yardstick; on a GPU also a map that fits in memory."""
    sizes = {"L": 4096, "H": 4, "E": 64, "B": 64}
    dtypes: tuple[str, ...] = ("float32",)
    full = [Case(kind, sizes, dtypes) for kind in OPERATORS]
    if device != "cpu":
        sizes, dtypes = {"L": 32768, "H": 32, "E": 128, "B": 64}, ("bfloat16",)
        full = [
            Case(SUM, sizes | {"B": 256}, dtypes),
            Case(MAX, sizes, dtypes),
            *(Case(kind, sizes | {"L": 8192}, dtypes) for kind in (SUM, MAX)),
            *(Case(kind, sizes, dtypes) for kind in (MASS, ENTROPY)),
        ]
    return [*full, Case(SUM, {"L": 512, "H": 2, "E": 32, "B": 16}, dtypes, quick=True)]


def growth() -> tuple[Growth, ...]:
    """The length."""
    lengths = [512 * factor for factor in (1, 2, 3, 4, 6, 8, 12, 16)]
    sizes = [{"L": length, "H": 1, "E": 64, "B": 64} for length in lengths]
    return (Growth("L", tuple(Case(MAX, one, ("float32",)) for one in sizes)),)


def inputs(case: Case, dtype: torch.dtype, device: torch.device) -> Inputs:
    """Queries, keys and the log-sum-exp of their scores."""
    length, heads, features, _ = case.sizes.values()
    generator = torch.Generator(device).manual_seed(0)
    query, key = (
        torch.randn(1, heads, length, features, device=device, generator=generator).to(dtype)
        for _ in range(2)
    )
    tensors = {"query": query, "key": key}
    rows = [scores.logsumexp(1) for _, _, scores in _scores(case, tensors)]
    return {**tensors, "lse": torch.cat(rows).float().view(1, heads, length)}


def _scores(case: Case, inputs: Inputs) -> Iterator[tuple[int, slice, Tensor]]:
    """The scores of each head in float64, for some blocks of queries at a time."""
    length, heads, features, block = case.sizes.values()
    step = max(1, TRUTH_ROWS // block) * block
    position = torch.arange(length, device=inputs["query"].device)
    for head in range(heads):
        query, key = (inputs[name][0, head].double() for name in ("query", "key"))
        for start in range(0, length, step):
            rows = slice(start, min(start + step, length))
            hidden = position > position[rows, None]
            scores = query[rows] @ key.T * features**-0.5
            yield head, rows, scores.masked_fill_(hidden, -torch.inf)


def truth(case: Case, inputs: Inputs) -> Results:
    """The map in float64, for some blocks of queries at a time, and what is made of it."""
    length, heads, _, block = case.sizes.values()
    blocks = length // block
    shape = {MASS: (heads, length), ENTROPY: (heads, length)}
    result = inputs["query"].new_zeros(
        shape.get(case.kind, (heads, blocks, blocks)), dtype=torch.float64
    )
    for head, rows, scores in _scores(case, inputs):
        weights = (scores - inputs["lse"][0, head, rows, None]).exp()
        if case.kind == MASS:
            result[head] += weights.sum(0)
        elif case.kind == ENTROPY:
            result[head, rows] = torch.special.entr(weights).sum(1)
        else:
            for row in range(rows.start // block, rows.stop // block):
                some = weights[row * block - rows.start :][:block].view(block, blocks, block)
                pooled = some.amax((0, 2)) if case.kind == MAX else some.sum((0, 2))
                result[head, row] = pooled
    return {"result": result[None]}


def flops(case: Case) -> int:
    """The product of queries and keys that see each other."""
    length, heads, features, _ = case.sizes.values()
    return 2 * features * heads * length * (length + 1) // 2


def traffic(case: Case, dtype: torch.dtype) -> int:
    """Read query, key and log-sum-exp, write the result in float32."""
    length, heads, features, block = case.sizes.values()
    results = length if case.kind in (MASS, ENTROPY) else (length // block) ** 2
    return heads * (2 * length * features * dtype.itemsize + 4 * length + 4 * results)


def _run(inputs: Inputs, reduction: Reduction) -> Callable[[], Results]:
    tensors = [inputs[name] for name in ("query", "key", "lse")]

    def run() -> Results:
        with torch.no_grad():
            return {"result": reduction(*tensors)}

    return run


def _ours(case: Case, inputs: Inputs, implementation: str) -> Callable[[], Results]:
    if implementation == "reference" and case.sizes["L"] > 2048:
        raise Unavailable("it stores all scores, several times")

    def reduction(query: Tensor, key: Tensor, lse: Tensor) -> Tensor:
        if case.kind == MASS:
            return attention_column_mass(
                query, key, lse, is_causal=True, implementation=implementation
            )
        if case.kind == ENTROPY:
            return attention_entropy(query, key, lse, is_causal=True, implementation=implementation)
        return block_pooled_attention(
            query,
            key,
            lse,
            block_size=case.sizes["B"],
            is_causal=True,
            pool="max" if case.kind == MAX else "sum",
            implementation=implementation,
        )

    return _run(inputs, reduction)


def _composition(case: Case, inputs: Inputs, softmax: bool = False) -> Reduction:
    """All scores in memory, by the log-sum-exp or by a softmax, which needs none."""
    length, heads, features, block = case.sizes.values()
    hidden = torch.ones(length, length, dtype=torch.bool, device=inputs["query"].device).triu_(1)

    def reduction(query: Tensor, key: Tensor, lse: Tensor) -> Tensor:
        scores = (query @ key.mT * features**-0.5).masked_fill(hidden, -torch.inf)
        if softmax:
            weights: Tensor = scores.softmax(-1, dtype=torch.float32)
        else:
            weights = (scores.float() - lse[..., None]).exp()
        if case.kind == MASS:
            return weights.sum(2)
        if case.kind == ENTROPY:
            return -torch.xlogy(weights, weights).sum(3)
        blocks = weights.view(1, heads, length // block, block, length // block, block)
        return blocks.amax((3, 5)) if case.kind == MAX else blocks.sum((3, 5))

    return reduction


def _eager(case: Case, inputs: Inputs) -> Step:
    return Step(_run(inputs, _composition(case, inputs)), "torch's operators")


def _softmax(case: Case, inputs: Inputs) -> Step:
    return Step(_run(inputs, _composition(case, inputs, softmax=True)), "softmax")


def _compiled(case: Case, inputs: Inputs) -> Step:
    if case.quick:
        raise Unavailable("it is left out of --quick, as it takes long to compile")
    compiled = torch.compile(_composition(case, inputs), dynamic=False)
    return Step(_run(inputs, compiled), "inductor of torch's operators")


def _dense(case: Case, inputs: Inputs) -> Step:
    """Attention whose values are 1 in the column of the key's block."""
    length, heads, features, block = case.sizes.values()
    if case.kind != SUM:
        raise Unavailable("it adds up")
    if length // block != features:
        raise Unavailable(f"with {length // block} blocks it is not of the size of attention")
    place = torch.arange(length, device=inputs["query"].device) // block
    value = F.one_hot(place).to(inputs["query"].dtype).expand(1, heads, length, features)
    value = value.contiguous()

    def reduction(query: Tensor, key: Tensor, lse: Tensor) -> Tensor:
        output = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        blocks = output.reshape(1, heads, features, block, features)
        return blocks.sum(3, dtype=torch.float32)

    return Step(_run(inputs, reduction), "F.scaled_dot_product_attention, causal")


SUITE = Suite(
    module=__name__,
    about="the map of causal attention, pooled without storing it",
    cases=cases,
    inputs=inputs,
    candidates=(
        *by_kind(
            {
                kind: implementations(f"attention.{operator}", _ours)
                for kind, operator in OPERATORS.items()
            }
        ),
        Candidate("torch eager", _eager),
        Candidate("torch eager (softmax)", _softmax),
        Candidate("torch compile", _compiled),
        Candidate("torch sdpa (dense forward)", _dense),
    ),
    composition="torch eager",
    truth=truth,
    flops=flops,
    products=True,
    traffic=traffic,
    growth=growth(),
)
