"""Softmax attention that is restricted to blocks of keys for each block of queries."""

from typing import Literal, overload

import torch
from jaxtyping import Float
from torch import Tensor

from tilework import _checks, _implementations
from tilework._implementations import TABLES, Implementation
from tilework.attention._tensors import cast_under_autocast, check_scale, check_tensors
from tilework.attention.block_layout import BlockLayout
from tilework.attention.block_sparse import operators
from tilework.attention.block_sparse.common import Attention
from tilework.catalog import implements

__all__ = ["block_sparse_attention"]

_NAME = "block_sparse_attention"
_BACKWARD = "first order; higher orders by scores of active blocks, forward mode by the reference"

IMPLEMENTATIONS = TABLES["attention.block_sparse_attention"] = (
    Implementation.triton(
        "the log-sum-exp",
        backward=_BACKWARD,
        refuses=lambda _, **sizes: operators.refusal(**sizes),
        when="blocks of 16, 32, 64 or 128, up to 256 features",
    ),
    Implementation(
        "tiled",
        "query, key and value in float32, and the blocks of a million scores",
        backward=_BACKWARD,
    ),
    Implementation.reference("all scores, several times"),
)


@overload
def block_sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: BlockLayout,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    return_lse: Literal[False] = False,
    implementation: str | None = None,
) -> Tensor: ...


@overload
def block_sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: BlockLayout,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    return_lse: Literal[True],
    implementation: str | None = None,
) -> tuple[Tensor, Tensor]: ...


@overload
def block_sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: BlockLayout,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    return_lse: bool,
    implementation: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]: ...


@implements(
    "SeerAttention: Learning Intrinsic Sparse Attention in Your LLMs",
    year=2024,
    arxiv="2410.13276",
)
def block_sparse_attention(
    query: Float[Tensor, "batch heads queries features"],
    key: Float[Tensor, "batch kv_heads keys features"],
    value: Float[Tensor, "batch kv_heads keys values"],
    layout: BlockLayout,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    return_lse: bool = False,
    implementation: str | None = None,
) -> (
    Float[Tensor, "batch heads queries values"]
    | tuple[Float[Tensor, "batch heads queries values"], Float[Tensor, "batch heads queries"]]
):
    r"""Attention of each block of queries to the blocks of keys that a layout selects for it.

    With the rows :math:`q_i`, :math:`k_j`, :math:`v_j` of a head, the set :math:`A` of active
    blocks of ``layout``, its block size :math:`(b_q, b_k)` and :math:`\alpha` = ``scale``:

    .. math::

        V_i &= \{j : (\lfloor i / b_q \rfloor, \lfloor j / b_k \rfloor) \in A\}
            \quad\text{and, with } \texttt{is\_causal},\; j \le i \\
        \mathrm{lse}_i &= \log \sum_{j \in V_i} e^{\alpha q_i^\top k_j}, \qquad
        o_i = \sum_{j \in V_i} e^{\alpha q_i^\top k_j - \mathrm{lse}_i} v_j

    A query that sees no key gives zeros, a log-sum-exp of :math:`-\infty` and zero gradients.
    Except with ``"reference"``, time grows with the number of active blocks, and no block of keys
    or values is read that the layout does not select. Products and sums are computed in float32
    (float64 for float64), the output is rounded once. Deterministic.

    Args:
        query: Shape ``(B, Hq, Lq, E)``.
        key: Shape ``(B, Hkv, Lk, E)``, of ``query``'s dtype.
        value: Shape ``(B, Hkv, Lk, Ev)``, of ``query``'s dtype.
        layout: The active blocks, of as many rows and columns of blocks as the lengths have; its
            batch is 1 or ``B``, its heads are 1, ``Hkv`` or ``Hq``.
        is_causal: Key ``j`` is visible to query ``i`` if ``j <= i``, both counted from 0.
        scale: Factor of the scores; None is ``1 / sqrt(E)``.
        enable_gqa: Query head ``h`` reads key and value head ``h // (Hq // Hkv)``.
        return_lse: Whether to return the log-sum-exp too; it is differentiable.
        implementation: ``"triton"`` (CUDA; blocks of 16, 32, 64 or 128, at most 256 features),
            ``"tiled"`` (gathers the active blocks) or ``"reference"`` (stores all scores). None
            picks the first of these that takes the arguments.

    Returns:
        Shape ``(B, Hq, Lq, Ev)``, of ``query``'s dtype; with ``return_lse`` the pair of it and the
        log-sum-exp, shape ``(B, Hq, Lq)``, float32 (float64 for float64).

    Raises:
        ValueError: A shape, option or implementation is not one of those above, or the layout does
            not fit the lengths, the batch or the heads.
        TypeError: A tensor is not of one of the dtypes above, or ``layout`` is no ``BlockLayout``.

    Example:
        >>> import torch
        >>> from tilework.attention import BlockLayout, block_sparse_attention
        >>> query = key = value = torch.randn(2, 4, 256, 32)
        >>> layout = BlockLayout.from_window((256, 256), left=1, num_sink_blocks=1, is_causal=True)
        >>> block_sparse_attention(query, key, value, layout, is_causal=True).shape
        torch.Size([2, 4, 256, 32])

    Deviations:
        The released kernels expand keys and values for grouped heads, need lengths that are
        multiples of the block, visit every block to test a flag, and give nan to a query that sees
        nothing.

    Reference:
        Yizhao Gao, Zhichen Zeng, Dayou Du, Shijie Cao, Peiyuan Zhou, Jiaxing Qi, Junjie Lai, Hayden
        Kwok-Hay So, Ting Cao, Fan Yang, Mao Yang. SeerAttention: Learning Intrinsic Sparse
        Attention in Your LLMs. 2024. arXiv:2410.13276.
    """
    check_tensors(_NAME, query, key, value, enable_gqa)
    _check_layout(query, key, layout)
    output, lse = attend(
        _NAME, query, key, value, layout, None, None, is_causal, scale, implementation
    )
    return (output, lse) if return_lse else output


def attend(
    function: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: BlockLayout,
    query_starts: Tensor | None,
    key_starts: Tensor | None,
    is_causal: bool,
    scale: float | None,
    implementation: str | None,
) -> tuple[Tensor, Tensor]:
    """Choose an implementation for checked tensors and run it; return the log-sum-exp too."""
    scale = check_scale(function, scale)
    query, key, value = cast_under_autocast(query, key, value)
    chosen = _implementations.choose(
        function,
        IMPLEMENTATIONS,
        implementation,
        query,
        block_size=layout.block_size,
        features=query.shape[-1],
        values=value.shape[-1],
    )
    # Only the kernels' backward pass walks columns.
    trains = torch.is_grad_enabled() and any(one.requires_grad for one in (query, key, value))
    transposed = chosen == "triton" and trains
    return operators.attention(
        Attention(
            query,
            key,
            value,
            layout.kv_num_blocks,
            layout.kv_indices,
            layout.q_num_blocks if transposed else None,
            layout.q_indices if transposed else None,
            query_starts,
            key_starts,
            list(layout.block_size),
            is_causal,
            scale,
            chosen,
        )
    )


def check_lists(function: str, query: Tensor, layout: object, batch: int, kv_heads: int) -> None:
    """Refuse what is no layout for a batch and the heads of a query (B, H, L, E)."""
    if not isinstance(layout, BlockLayout):
        accepted = (
            "a BlockLayout, which BlockLayout.from_dense makes of a mask of blocks, "
            "BlockLayout.from_flex of a BlockMask"
        )
        raise _checks.bad_type(function, "layout", accepted, layout)
    heads = query.shape[1]
    if layout.shape[1] not in (1, kv_heads, heads):
        raise ValueError(
            f"{function}: layout must have 1, {kv_heads} or {heads} heads, got {layout.shape[1]}"
        )
    if layout.shape[0] not in (1, batch):
        raise ValueError(
            f"{function}: layout must have a batch of 1 or {batch}, got {layout.shape[0]}"
        )
    _checks.same_device(function, query=query, layout=layout.kv_indices)


def _check_layout(query: Tensor, key: Tensor, layout: BlockLayout) -> None:
    check_lists(_NAME, query, layout, query.shape[0], key.shape[1])
    lengths = query.shape[2], key.shape[2]
    if layout.seq_lengths is not None and tuple(layout.seq_lengths) != lengths:
        raise ValueError(
            f"{_NAME}: layout must be of the lengths of query and key, {lengths}, "
            f"got {tuple(layout.seq_lengths)}"
        )
    blocks = tuple(
        -(-length // size) for length, size in zip(lengths, layout.block_size, strict=True)
    )
    if layout.shape[2:] != blocks:
        raise ValueError(
            f"{_NAME}: layout must have {blocks} blocks, as query and key have {lengths} positions "
            f"in blocks of {tuple(layout.block_size)}, got {tuple(layout.shape[2:])}"
        )
