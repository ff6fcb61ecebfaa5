"""Block-sparse attention of sequences that are packed one after another."""

from typing import Literal, overload

import torch
from jaxtyping import Float, Integer
from torch import Tensor

from tilework import _checks
from tilework._implementations import TABLES
from tilework.attention import block_sparse
from tilework.attention._tensors import check_tensors
from tilework.attention.block_layout import BlockLayout
from tilework.catalog import implements

__all__ = ["block_sparse_attention_varlen"]

_NAME = "block_sparse_attention_varlen"
TABLES["attention.block_sparse_attention_varlen"] = block_sparse.IMPLEMENTATIONS


@overload
def block_sparse_attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: BlockLayout,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None = None,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    return_lse: Literal[False] = False,
    implementation: str | None = None,
) -> Tensor: ...


@overload
def block_sparse_attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: BlockLayout,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None = None,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    return_lse: Literal[True],
    implementation: str | None = None,
) -> tuple[Tensor, Tensor]: ...


@overload
def block_sparse_attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: BlockLayout,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None = None,
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
def block_sparse_attention_varlen(
    query: Float[Tensor, "query_tokens heads features"],
    key: Float[Tensor, "key_tokens kv_heads features"],
    value: Float[Tensor, "key_tokens kv_heads values"],
    layout: BlockLayout,
    cu_seqlens_q: Integer[Tensor, " borders"],
    cu_seqlens_k: Integer[Tensor, " borders"] | None = None,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    return_lse: bool = False,
    implementation: str | None = None,
) -> (
    Float[Tensor, "query_tokens heads values"]
    | tuple[Float[Tensor, "query_tokens heads values"], Float[Tensor, "query_tokens heads"]]
):
    r""":func:`block_sparse_attention` of each of several sequences, packed one after another.

    With :math:`c^q` = ``cu_seqlens_q`` and :math:`c^k` = ``cu_seqlens_k``, sequence :math:`s` has

    .. math::

        \texttt{query}[c^q_s : c^q_{s+1}], \qquad
        \texttt{key}[c^k_s : c^k_{s+1}], \qquad \texttt{value}[c^k_s : c^k_{s+1}]

    and batch :math:`s` of the layout. Positions, blocks and causality count from the start of each
    sequence. No sequence reads another, in forward and backward. Blocks of the layout beyond those
    of a sequence are ignored, and so are its ``seq_lengths``. Borders on a CUDA device are trusted:
    ``"triton"`` does not wait for it, ``"tiled"`` does. Deterministic.

    Args:
        query: Shape ``(Tq, Hq, E)``.
        key: Shape ``(Tk, Hkv, E)``, of ``query``'s dtype.
        value: Shape ``(Tk, Hkv, Ev)``, of ``query``'s dtype.
        layout: The active blocks, at least as many rows and columns as the longest sequence has;
            its batch is 1, for all, or the number ``S`` of sequences, its heads are 1, ``Hkv`` or
            ``Hq``.
        cu_seqlens_q: The borders of the sequences of queries, int32 or int64 of shape ``(S + 1,)``,
            from 0 to ``Tq`` without a decrease. A sequence may be empty.
        cu_seqlens_k: Those of keys and values, from 0 to ``Tk``; None is ``cu_seqlens_q``.
        is_causal: Key ``j`` is visible to query ``i`` of its sequence if ``j <= i``, both counted
            from 0.
        scale: Factor of the scores; None is ``1 / sqrt(E)``.
        enable_gqa: Query head ``h`` reads key and value head ``h // (Hq // Hkv)``.
        return_lse: Whether to return the log-sum-exp too; it is differentiable.
        implementation: ``"triton"`` (CUDA; blocks of 16, 32, 64 or 128, at most 256 features),
            ``"tiled"`` (gathers the active blocks) or ``"reference"`` (stores the scores of all
            tokens with all others). None picks the first of these that takes the arguments.

    Returns:
        Shape ``(Tq, Hq, Ev)``, of ``query``'s dtype; with ``return_lse`` the pair of it and the
        log-sum-exp, shape ``(Tq, Hq)``, float32 (float64 for float64).

    Raises:
        ValueError: A shape, option or implementation is not one of those above, the layout does
            not fit the sequences or the heads, or borders on the CPU are not as above.
        TypeError: A tensor is not of one of the dtypes above, or ``layout`` is no ``BlockLayout``.

    Example:
        >>> import torch
        >>> from tilework.attention import BlockLayout, block_sparse_attention_varlen
        >>> query = key = value = torch.randn(300, 4, 32)
        >>> borders = torch.tensor([0, 100, 300])
        >>> layout = BlockLayout.from_window((200, 200), left=1, is_causal=True)
        >>> block_sparse_attention_varlen(query, key, value, layout, borders, is_causal=True).shape
        torch.Size([300, 4, 32])

    Deviations:
        The released kernel copies lengths to the host at each call, expands keys and values for
        grouped heads, and takes the borders of keys before those of queries.

    Reference:
        As :func:`block_sparse_attention`.
    """
    if cu_seqlens_k is None:
        cu_seqlens_k = cu_seqlens_q
    tensors = {"query": query, "key": key, "value": value}
    for name, tensor in tensors.items():
        _checks.floating(_NAME, name, tensor)
        if tensor.dim() != 3:
            raise _checks.bad_value(_NAME, name, "of shape (T, H, E)", tensor)
    # The kernels know one element of a batch that holds all tokens.
    query, key, value = (tensor.transpose(0, 1)[None] for tensor in (query, key, value))
    check_tensors(_NAME, query, key, value, enable_gqa)
    _check_borders(cu_seqlens_q, cu_seqlens_k, query)
    block_sparse.check_lists(_NAME, query, layout, cu_seqlens_q.shape[0] - 1, key.shape[1])
    for axis, (name, borders, tensor) in enumerate(
        (("cu_seqlens_q", cu_seqlens_q, query), ("cu_seqlens_k", cu_seqlens_k, key))
    ):
        if _checks.holds_values(borders):
            _check_values(name, borders, tensor.shape[2], layout, axis)
    output, lse = block_sparse.attend(
        _NAME,
        query,
        key,
        value,
        layout,
        cu_seqlens_q,
        cu_seqlens_k,
        is_causal,
        scale,
        implementation,
    )
    output, lse = output[0].transpose(0, 1), lse[0].transpose(0, 1)
    return (output, lse) if return_lse else output


def _check_borders(cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, query: Tensor) -> None:
    for name, borders in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        if not isinstance(borders, Tensor) or borders.dtype not in (torch.int32, torch.int64):
            raise _checks.bad_type(_NAME, name, "an int32 or int64 tensor", borders)
        if borders.dim() != 1 or not borders.shape[0]:
            raise _checks.bad_value(_NAME, name, "of shape (S + 1,)", borders)
        _checks.same_device(_NAME, **{"query": query, name: borders})
    _checks.shape(_NAME, "cu_seqlens_k", cu_seqlens_k, cu_seqlens_q.shape)


def _check_values(name: str, borders: Tensor, tokens: int, layout: BlockLayout, axis: int) -> None:
    lengths = borders.diff()
    if borders[0] != 0 or borders[-1] != tokens or (lengths < 0).any():
        raise ValueError(
            f"{_NAME}: {name} must go from 0 to {tokens}, the number of tokens, without a "
            f"decrease, got {borders.tolist()}"
        )
    longest = int(lengths.max()) if len(lengths) else 0
    needed = -(-longest // layout.block_size[axis])
    if layout.shape[2 + axis] < needed:
        side = ("rows", "columns")[axis]
        raise ValueError(
            f"{_NAME}: layout must have at least {needed} {side} of blocks for the longest "
            f"sequence of {name}, {longest}, got {layout.shape[2 + axis]}"
        )
