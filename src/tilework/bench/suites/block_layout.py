"""Lists of the blocks with the highest scores, for causal attention, as a gate selects them.

Sizes: ``L`` positions in blocks of 64, ``H`` heads, ``K`` blocks for each block of queries, the
diagonal one among them. What this costs is to be compared with the attention that it steers.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from tilework.attention import BlockLayout
from tilework.bench.suites import Candidate, Case, Growth, Inputs, Results, Step, Suite

ROWS, BOTH = "rows", "rows and columns"
BLOCK = 64


def cases(device: str) -> list[Case]:
    """What inference needs, what training needs, and a small one."""
    sizes = {"L": 32768, "H": 32, "K": 26}
    return [
        *(Case(kind, sizes, ("float32",)) for kind in (ROWS, BOTH)),
        Case(BOTH, {"L": 4096, "H": 4, "K": 8}, ("float32",), quick=True),
    ]


def growth() -> tuple[Growth, ...]:
    """The length at a tenth of the blocks."""
    lengths = [4096 * factor for factor in (1, 2, 3, 4, 6, 8, 12)]
    sizes = [{"L": length, "H": 4, "K": length // BLOCK // 10} for length in lengths]
    return (Growth("L", tuple(Case(BOTH, one, ("float32",)) for one in sizes)),)


def inputs(case: Case, dtype: torch.dtype, device: torch.device) -> Inputs:
    """Scores of blocks; in a row no two are equal."""
    length, heads, _ = case.sizes.values()
    generator = torch.Generator(device).manual_seed(0)
    blocks = length // BLOCK
    scores = torch.rand(1, heads, blocks, blocks, device=device, generator=generator)
    return {"scores": scores.argsort().to(dtype)}


def truth(case: Case, inputs: Inputs) -> Results:
    """Which blocks are active, by their ranks in a sorted row."""
    scores = inputs["scores"].double()
    block = torch.arange(scores.shape[3], device=scores.device)
    scores = scores.masked_fill(block > block[:, None], -torch.inf)
    scores.diagonal(dim1=2, dim2=3).fill_(torch.inf)
    ranks = scores.argsort(descending=True).argsort()
    active = ((ranks < case.sizes["K"]) & (scores > -torch.inf)).float()
    return {"rows": active} if case.kind == ROWS else {"rows": active, "columns": active.mT}


def compared(results: Results) -> Results:
    """Which blocks are in the lists."""
    masks = {}
    for name in ("rows", "columns"):
        if f"{name} counts" in results:
            counts, indices = results[f"{name} counts"], results[f"{name} indices"].long()
            listed = torch.arange(indices.shape[3], device=indices.device) < counts[..., None]
            mask = torch.zeros(*counts.shape, counts.shape[2] + 1, device=counts.device)
            mask.scatter_(3, indices.where(listed, counts.shape[2]), 1.0)
            masks[name] = mask[..., :-1]
    return masks


def flops(case: Case) -> int:
    """A comparison for each score."""
    length, heads, _ = case.sizes.values()
    return heads * (length // BLOCK) ** 2


def traffic(case: Case, dtype: torch.dtype) -> int:
    """Read the scores, write the lists."""
    length, heads, kept = case.sizes.values()
    blocks = length // BLOCK
    lists = 4 * heads * blocks * (1 + kept) * (2 if case.kind == BOTH else 1)
    return heads * blocks**2 * dtype.itemsize + lists


def _ours(case: Case, inputs: Inputs) -> Step:
    def run() -> Results:
        layout = BlockLayout.from_scores_topk(
            inputs["scores"], case.sizes["K"], BLOCK, is_causal=True
        )
        results = {"rows counts": layout.kv_num_blocks, "rows indices": layout.kv_indices}
        if case.kind == BOTH:
            results |= {
                "columns counts": layout.q_num_blocks,
                "columns indices": layout.q_indices,
            }
        return results

    return Step(run, "tilework BlockLayout.from_scores_topk", default=True)


def _torch(case: Case, inputs: Inputs) -> Callable[[], Results]:
    """As FlexAttention makes lists of a mask: by sorting it."""
    blocks = inputs["scores"].shape[3]
    block = torch.arange(blocks, device=inputs["scores"].device)
    hidden, diagonal = block > block[:, None], block == block[:, None]

    def lists(mask: Tensor) -> tuple[Tensor, Tensor]:
        return mask.sum(3, dtype=torch.int32), mask.int().argsort(
            descending=True, stable=True
        ).int()

    def run() -> Results:
        scores = inputs["scores"].masked_fill(hidden, -torch.inf).masked_fill(diagonal, torch.inf)
        chosen = scores.topk(case.sizes["K"]).indices
        mask = torch.zeros_like(scores, dtype=torch.bool).scatter_(3, chosen, True) & ~hidden
        counts, indices = lists(mask)
        results = {"rows counts": counts, "rows indices": indices}
        if case.kind == BOTH:
            whole = BlockMask.from_kv_blocks(counts, indices, BLOCK_SIZE=BLOCK)
            parts = {"counts": "q_num_blocks", "indices": "q_indices"}
            results |= {f"columns {part}": getattr(whole, name) for part, name in parts.items()}
        return results

    return run


def _eager(case: Case, inputs: Inputs) -> Step:
    return Step(_torch(case, inputs), "topk, argsort, BlockMask.from_kv_blocks")


SUITE = Suite(
    module=__name__,
    about="lists of the blocks with the highest scores",
    cases=cases,
    inputs=inputs,
    candidates=(
        Candidate("tilework", _ours, peer=False),
        Candidate("torch eager", _eager),
    ),
    composition="torch eager",
    truth=truth,
    flops=flops,
    products=False,
    traffic=traffic,
    growth=growth(),
    compared=compared,
)
