"""Attention of one or a few query tokens to selected blocks of a contiguous or paged cache."""

from collections.abc import Sequence
from typing import Literal, overload

import torch
from jaxtyping import Float, Integer
from torch import Tensor

from tilework import _checks, _implementations
from tilework._implementations import TABLES, Implementation
from tilework.attention._tensors import check_scale
from tilework.attention.block_layout.checks import check_integers
from tilework.attention.block_layout.common import ceil_div
from tilework.attention.block_sparse_decode import operators
from tilework.attention.block_sparse_decode.common import Decoding
from tilework.catalog import implements

__all__ = ["block_sparse_decode", "paged_block_sparse_decode"]

_PAPER = implements(
    "SeerAttention: Learning Intrinsic Sparse Attention in Your LLMs",
    year=2024,
    arxiv="2410.13276",
)

IMPLEMENTATIONS = (
    Implementation.triton(
        "an output in float32 for each part of the keys",
        backward="none",
        refuses=lambda _, **sizes: operators.refusal(**sizes),
        when="up to 256 features",
    ),
    Implementation(
        "tiled", "4 MiB of gathered keys and values, and 4 MiB of scores", backward="none"
    ),
    Implementation.reference(
        "keys and values in float32 for each query token, and all scores, several times",
        backward="none",
    ),
)
for _name in ("block_sparse_decode", "paged_block_sparse_decode"):
    TABLES[f"attention.{_name}"] = IMPLEMENTATIONS


@overload
def block_sparse_decode(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kv_indices: Tensor | None = None,
    kv_num_blocks: Tensor | None = None,
    *,
    seq_lengths: Tensor | None = None,
    block_size: int = 64,
    is_causal: bool = False,
    scale: float | None = None,
    return_lse: Literal[False] = False,
    implementation: str | None = None,
) -> Tensor: ...


@overload
def block_sparse_decode(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kv_indices: Tensor | None = None,
    kv_num_blocks: Tensor | None = None,
    *,
    seq_lengths: Tensor | None = None,
    block_size: int = 64,
    is_causal: bool = False,
    scale: float | None = None,
    return_lse: Literal[True],
    implementation: str | None = None,
) -> tuple[Tensor, Tensor]: ...


@overload
def block_sparse_decode(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kv_indices: Tensor | None = None,
    kv_num_blocks: Tensor | None = None,
    *,
    seq_lengths: Tensor | None = None,
    block_size: int = 64,
    is_causal: bool = False,
    scale: float | None = None,
    return_lse: bool,
    implementation: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]: ...


@_PAPER
def block_sparse_decode(
    query: Float[Tensor, "batch heads length features"],
    key: Float[Tensor, "batch kv_heads tokens features"],
    value: Float[Tensor, "batch kv_heads tokens values"],
    kv_indices: Integer[Tensor, "batch list_heads *list_tokens width"] | None = None,
    kv_num_blocks: Integer[Tensor, "batch count_heads *list_tokens"] | None = None,
    *,
    seq_lengths: Integer[Tensor, " batch"] | None = None,
    block_size: int = 64,
    is_causal: bool = False,
    scale: float | None = None,
    return_lse: bool = False,
    implementation: str | None = None,
) -> (
    Float[Tensor, "batch heads length values"]
    | tuple[Float[Tensor, "batch heads length values"], Float[Tensor, "batch heads length"]]
):
    r"""Attention of the last tokens of each sequence to selected blocks of its cache.

    The :math:`T` query tokens are the last ones of a sequence of :math:`\ell` = ``seq_lengths[b]``
    tokens. Token :math:`i` has position :math:`p_i` and sees no later ones. With its query
    :math:`q_i` of head :math:`h`, which reads the keys :math:`k_t` and values :math:`v_t` of head
    :math:`g = \lfloor h H_{kv} / H_q \rfloor`, the block size :math:`s` and :math:`\alpha` =
    ``scale``:

    .. math::

        p_i &= \ell - T + i, \qquad
        V_i = \{t \le p_i : \lfloor t / s \rfloor \in \texttt{kv\_indices}_{bg}\} \\
        \mathrm{lse}_i &= \log \sum_{t \in V_i} e^{\alpha q_i^\top k_t}, \qquad
        o_i = \sum_{t \in V_i} e^{\alpha q_i^\top k_t - \mathrm{lse}_i} v_t

    With ``is_causal`` they may be several, without it :math:`T = 1`. Where nothing is seen, the
    result is zeros and :math:`-\infty`: also for the first tokens of the query of a sequence
    shorter than :math:`T`, which is how sequences of a batch have fewer new tokens than others.
    Sums are computed in float32 (float64 for float64), the output is rounded once. Nothing that a
    token does not see influences its result, nan included; except with ``"reference"``, what is not
    selected is not read. For inference: there are no gradients, and autocast changes nothing.
    Deterministic for the same sizes on the same device.

    Values of indices and lengths are checked on the CPU and trusted elsewhere, where a look at them
    would wait for the device.

    Args:
        query: Shape ``(B, Hq, T, E)``.
        key: Shape ``(B, Hkv, S, E)`` of any strides, of ``query``'s dtype; ``Hkv`` divides ``Hq``.
        value: Shape ``(B, Hkv, S, Ev)``, of ``query``'s dtype.
        kv_indices: The numbers of the selected blocks, distinct and in any order, of any integer
            dtype and shape ``(B, Hkv or 1, K)``: each list is shared by the query heads of a
            group. With ``(B, Hkv or 1, T, K)`` each token has one, and reads its blocks for itself.
            None selects all tokens.
        kv_num_blocks: How many entries of each list count, of the shape of the lists without ``K``;
            None for all. What stands after them is not read.
        seq_lengths: The tokens of each sequence, shape ``(B,)``; None for ``S``. What stands after
            them is not read.
        block_size: Tokens of a block.
        is_causal: Whether the query may be several tokens, of which none sees a later one.
        scale: Factor of the scores; None is ``1 / sqrt(E)``.
        return_lse: Whether to return the log-sum-exp too.
        implementation: ``"triton"`` (CUDA; at most 256 features; parts of the keys side by side,
            merged in order), ``"tiled"`` (gathers the selected tokens) or ``"reference"`` (masks
            all tokens). None picks the first of these that takes the arguments.

    Returns:
        Shape ``(B, Hq, T, Ev)``, of ``query``'s dtype; with ``return_lse`` the pair of it and the
        log-sum-exp, shape ``(B, Hq, T)``, float32 (float64 for float64).

    Raises:
        ValueError: A shape, value, option or implementation is not one of those above.
        TypeError: A tensor is not of one of the dtypes above.
        RuntimeError: A gradient is asked for.

    Example:
        >>> import torch
        >>> from tilework.attention import block_sparse_decode
        >>> query = torch.randn(2, 8, 1, 32)
        >>> key = value = torch.randn(2, 2, 1000, 32)
        >>> blocks = torch.tensor([[[15, 0, 7]], [[4, 9, 0]]])
        >>> lengths = torch.tensor([1000, 600])
        >>> block_sparse_decode(query, key, value, blocks, seq_lengths=lengths).shape
        torch.Size([2, 8, 1, 32])

        The last three tokens at once, such as drafts to be verified, each with a list of its own:

        >>> query, blocks = torch.randn(2, 8, 3, 32), blocks[:, :, None].expand(2, 1, 3, 3)
        >>> options = {"seq_lengths": lengths, "is_causal": True}
        >>> block_sparse_decode(query, key, value, blocks, **options).shape
        torch.Size([2, 8, 3, 32])

    Deviations:
        The paper sparsifies the prefill only. The later decoding kernels of its authors take
        left-padded contiguous caches and one token. With ``"triton"`` and several tokens, a nan or
        an infinity in a value makes all features of the tokens that see it nan.

    Reference:
        Yizhao Gao, Zhichen Zeng, Dayou Du, Shijie Cao, Peiyuan Zhou, Jiaxing Qi, Junjie Lai, Hayden
        Kwok-Hay So, Ting Cao, Fan Yang, Mao Yang. SeerAttention: Learning Intrinsic Sparse
        Attention in Your LLMs. 2024. arXiv:2410.13276.
    """
    name = "block_sparse_decode"
    batch = _check_query(name, query, is_causal)
    for argument, cache in {"key": key, "value": value}.items():
        _check_cache(name, argument, cache, query, "(B, Hkv, S, E)")
    tokens = key.shape[2]
    _check_heads(name, "key", query, key, 1)
    _checks.shape(name, "key", key, (batch, key.shape[1], tokens, query.shape[3]))
    _checks.shape(name, "value", value, (*key.shape[:3], value.shape[3]))
    if seq_lengths is not None:
        _check_lengths(name, query, seq_lengths, tokens)
    _check_lists(name, query, kv_indices, kv_num_blocks, key.shape[1], tokens, block_size)
    # A contiguous cache is one page for each sequence.
    return _decode(
        name,
        query,
        key.transpose(1, 2),
        value.transpose(1, 2),
        None,
        seq_lengths,
        kv_indices,
        kv_num_blocks,
        block_size,
        scale,
        return_lse,
        implementation,
    )


@overload
def paged_block_sparse_decode(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_table: Tensor,
    seq_lengths: Tensor,
    kv_indices: Tensor | None = None,
    kv_num_blocks: Tensor | None = None,
    *,
    block_size: int = 64,
    is_causal: bool = False,
    scale: float | None = None,
    return_lse: Literal[False] = False,
    implementation: str | None = None,
) -> Tensor: ...


@overload
def paged_block_sparse_decode(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_table: Tensor,
    seq_lengths: Tensor,
    kv_indices: Tensor | None = None,
    kv_num_blocks: Tensor | None = None,
    *,
    block_size: int = 64,
    is_causal: bool = False,
    scale: float | None = None,
    return_lse: Literal[True],
    implementation: str | None = None,
) -> tuple[Tensor, Tensor]: ...


@overload
def paged_block_sparse_decode(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_table: Tensor,
    seq_lengths: Tensor,
    kv_indices: Tensor | None = None,
    kv_num_blocks: Tensor | None = None,
    *,
    block_size: int = 64,
    is_causal: bool = False,
    scale: float | None = None,
    return_lse: bool,
    implementation: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]: ...


@_PAPER
def paged_block_sparse_decode(
    query: Float[Tensor, "batch heads length features"],
    key_cache: Float[Tensor, "pages page_size kv_heads features"],
    value_cache: Float[Tensor, "pages page_size kv_heads values"],
    block_table: Integer[Tensor, "batch max_pages"],
    seq_lengths: Integer[Tensor, " batch"],
    kv_indices: Integer[Tensor, "batch list_heads *list_tokens width"] | None = None,
    kv_num_blocks: Integer[Tensor, "batch count_heads *list_tokens"] | None = None,
    *,
    block_size: int = 64,
    is_causal: bool = False,
    scale: float | None = None,
    return_lse: bool = False,
    implementation: str | None = None,
) -> (
    Float[Tensor, "batch heads length values"]
    | tuple[Float[Tensor, "batch heads length values"], Float[Tensor, "batch heads length"]]
):
    r"""Attention of the last tokens of each sequence to selected blocks of a paged cache.

    Everything is that of :func:`block_sparse_decode`, but for where token :math:`t` of sequence
    :math:`b` lies: with :math:`p` = ``page_size``, at slot :math:`t \bmod p` of page

    .. math::

        \texttt{block\_table}_{b, \lfloor t / p \rfloor}

    .. math::

        p_i &= \texttt{seq\_lengths}_b - T + i, \qquad
        V_i = \{t \le p_i : \lfloor t / s \rfloor \in \texttt{kv\_indices}_{bg}\} \\
        \mathrm{lse}_i &= \log \sum_{t \in V_i} e^{\alpha q_i^\top k_t}, \qquad
        o_i = \sum_{t \in V_i} e^{\alpha q_i^\top k_t - \mathrm{lse}_i} v_t

    Args:
        query: Shape ``(B, Hq, T, E)``.
        key_cache: Shape ``(num_pages, page_size, Hkv, E)`` of any strides, of ``query``'s dtype;
            ``Hkv`` divides ``Hq``.
        value_cache: Shape ``(num_pages, page_size, Hkv, Ev)``, of ``query``'s dtype.
        block_table: The pages of each sequence in order, of any integer dtype and shape
            ``(B, max_pages)``. Entries past the sequence are not read.
        seq_lengths: The tokens of each sequence, the query's among them, shape ``(B,)``.
        kv_indices: The numbers of the selected blocks, distinct and in any order, of any integer
            dtype and shape ``(B, Hkv or 1, K)`` or ``(B, Hkv or 1, T, K)``; None selects all
            tokens.
        kv_num_blocks: How many entries of each list count, of the shape of the lists without ``K``;
            None for all.
        block_size: Tokens of a block, a multiple or a divisor of ``page_size``.
        is_causal: Whether the query may be several tokens, of which none sees a later one.
        scale: Factor of the scores; None is ``1 / sqrt(E)``.
        return_lse: Whether to return the log-sum-exp too.
        implementation: ``"triton"``, ``"tiled"`` or ``"reference"``, as in
            :func:`block_sparse_decode`. None picks the first of these that takes the arguments.

    Returns:
        Shape ``(B, Hq, T, Ev)``, of ``query``'s dtype; with ``return_lse`` the pair of it and the
        log-sum-exp, shape ``(B, Hq, T)``, float32 (float64 for float64).

    Raises:
        ValueError: A shape, value, option or implementation is not one of those above.
        TypeError: A tensor is not of one of the dtypes above.
        RuntimeError: A gradient is asked for.

    Example:
        >>> import torch
        >>> from tilework.attention import paged_block_sparse_decode
        >>> key_cache = value_cache = torch.randn(100, 16, 2, 32)
        >>> table = torch.tensor([[7, 3, 99, 0], [12, 5, -1, -1]])
        >>> lengths = torch.tensor([60, 20])
        >>> query = torch.randn(2, 8, 1, 32)
        >>> paged_block_sparse_decode(query, key_cache, value_cache, table, lengths).shape
        torch.Size([2, 8, 1, 32])

    Deviations:
        Pages are not part of the paper.

    Reference:
        As :func:`block_sparse_decode`.
    """
    name = "paged_block_sparse_decode"
    batch = _check_query(name, query, is_causal)
    for argument, cache in {"key_cache": key_cache, "value_cache": value_cache}.items():
        _check_cache(name, argument, cache, query, "(num_pages, page_size, Hkv, E)")
    num_pages, page_size, kv_heads, _ = key_cache.shape
    _check_heads(name, "key_cache", query, key_cache, 2)
    _checks.shape(name, "key_cache", key_cache, (num_pages, page_size, kv_heads, query.shape[3]))
    _checks.shape(name, "value_cache", value_cache, (*key_cache.shape[:3], value_cache.shape[3]))
    check_integers(name, "block_table", block_table)
    if block_table.dim() != 2 or block_table.shape[0] != batch:
        raise _checks.bad_value(name, "block_table", f"of shape ({batch}, max_pages)", block_table)
    _checks.same_device(name, query=query, block_table=block_table)
    _checks.count(name, "block_size", block_size)
    if page_size == 0 or (block_size % page_size and page_size % block_size):
        expected = f"a multiple or a divisor of the page size {page_size}"
        raise _checks.bad_value(name, "block_size", expected, block_size)
    tokens = block_table.shape[1] * page_size
    _check_lengths(name, query, seq_lengths, tokens)
    if _checks.holds_values(block_table) and _checks.holds_values(seq_lengths):
        used = torch.arange(block_table.shape[1]) * page_size < seq_lengths[:, None]
        _check_range(name, "block_table", block_table[used], num_pages - 1, " within the sequences")
    _check_lists(name, query, kv_indices, kv_num_blocks, kv_heads, tokens, block_size)
    return _decode(
        name,
        query,
        key_cache,
        value_cache,
        block_table,
        seq_lengths,
        kv_indices,
        kv_num_blocks,
        block_size,
        scale,
        return_lse,
        implementation,
    )


def _decode(
    name: str,
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_table: Tensor | None,
    seq_lengths: Tensor | None,
    kv_indices: Tensor | None,
    kv_num_blocks: Tensor | None,
    block_size: int,
    scale: float | None,
    return_lse: bool,
    implementation: str | None,
) -> Tensor | tuple[Tensor, Tensor]:
    scale = check_scale(name, scale)
    wants = any(tensor.requires_grad for tensor in (query, key_cache, value_cache))
    if wants and torch.is_grad_enabled():
        raise RuntimeError(
            f"{name}: it is for inference and has no gradients; call it under torch.no_grad() or "
            "with tensors that require none"
        )
    chosen = _implementations.choose(
        name,
        IMPLEMENTATIONS,
        implementation,
        query,
        features=query.shape[-1],
        values=value_cache.shape[-1],
    )
    output, lse = operators.decode(
        Decoding(
            query,
            key_cache,
            value_cache,
            block_table,
            seq_lengths,
            kv_indices,
            kv_num_blocks,
            block_size,
            scale,
            chosen,
        )
    )
    return (output, lse) if return_lse else output


def _check_query(name: str, query: Tensor, is_causal: bool) -> int:
    """Refuse what is no query; return the batch."""
    _checks.floating(name, "query", query)
    if query.dim() != 4 or (query.shape[2] != 1 and not is_causal):
        expected = "of shape (B, Hq, 1, E), or with is_causal=True (B, Hq, T, E)"
        raise _checks.bad_value(name, "query", expected, query)
    return query.shape[0]


def _check_cache(name: str, argument: str, cache: Tensor, query: Tensor, shape: str) -> None:
    _checks.floating(name, argument, cache)
    if cache.dim() != 4:
        raise _checks.bad_value(name, argument, f"of shape {shape}", cache)
    if cache.dtype != query.dtype:
        raise _checks.bad_type(name, argument, f"of query's {query.dtype}", cache)
    _checks.same_device(name, query=query, **{argument: cache})


def _check_heads(name: str, argument: str, query: Tensor, cache: Tensor, dim: int) -> None:
    heads, kv_heads = query.shape[1], cache.shape[dim]
    if kv_heads == 0 or heads % kv_heads:
        expected = f"of a number of heads that divides query's {heads}"
        raise _checks.bad_value(name, argument, expected, cache)


def _check_lengths(name: str, query: Tensor, seq_lengths: Tensor, tokens: int) -> None:
    check_integers(name, "seq_lengths", seq_lengths)
    _checks.shape(name, "seq_lengths", seq_lengths, query.shape[:1])
    _checks.same_device(name, query=query, seq_lengths=seq_lengths)
    if _checks.holds_values(seq_lengths):
        _check_range(name, "seq_lengths", seq_lengths, tokens)


def _check_lists(
    name: str,
    query: Tensor,
    kv_indices: Tensor | None,
    kv_num_blocks: Tensor | None,
    kv_heads: int,
    tokens: int,
    block_size: int,
) -> None:
    _checks.count(name, "block_size", block_size)
    if kv_indices is None:
        if kv_num_blocks is not None:
            raise _checks.bad_value(name, "kv_num_blocks", "None without kv_indices", kv_num_blocks)
        return
    check_integers(name, "kv_indices", kv_indices)
    batch, _, length, _ = query.shape
    of_tokens = (length,) if kv_indices.dim() == 4 else ()
    heads = f"({batch}, {kv_heads} or 1"
    if not _fits(kv_indices.shape[:-1], batch, kv_heads, of_tokens):
        expected = f"of shape {heads}, K) or {heads}, {length}, K)"
        raise _checks.bad_value(name, "kv_indices", expected, kv_indices)
    _checks.same_device(name, query=query, kv_indices=kv_indices)
    if kv_num_blocks is not None:
        check_integers(name, "kv_num_blocks", kv_num_blocks)
        if not _fits(kv_num_blocks.shape, batch, kv_heads, of_tokens):
            expected = f"of shape {heads}{''.join(f', {size}' for size in of_tokens)})"
            raise _checks.bad_value(name, "kv_num_blocks", expected, kv_num_blocks)
        _checks.same_device(name, query=query, kv_num_blocks=kv_num_blocks)
    if all(_checks.holds_values(t) for t in (kv_indices, kv_num_blocks) if t is not None):
        _check_numbers(name, kv_indices, kv_num_blocks, ceil_div(tokens, block_size))


def _check_numbers(
    name: str, kv_indices: Tensor, kv_num_blocks: Tensor | None, num_blocks: int
) -> None:
    """Refuse blocks that do not exist or stand twice in a list."""
    place = torch.arange(kv_indices.shape[-1])
    counted = torch.ones_like(kv_indices, dtype=torch.bool)
    if kv_num_blocks is not None:
        _check_range(name, "kv_num_blocks", kv_num_blocks, len(place))
        counted = counted & (place < kv_num_blocks[..., None])
    # Distinct negative numbers where nothing counts.
    indices = kv_indices.long().where(counted, -1 - place)
    _check_range(name, "kv_indices", indices[counted], num_blocks - 1, " within the counts")
    in_order = indices.sort(-1).values
    repeated = in_order[..., 1:] == in_order[..., :-1]
    if repeated.any():
        raise ValueError(
            f"{name}: kv_indices must be distinct within a list, got "
            f"{int(in_order[..., 1:][repeated][0])} more than once"
        )


def _fits(sizes: Sequence[int], batch: int, kv_heads: int, of_tokens: tuple[int, ...]) -> bool:
    """Whether lists, or how many of their entries count, are those of a batch and its heads."""
    if len(sizes) != 2 + len(of_tokens):
        return False
    rows, heads, *rest = sizes
    # No sets of sizes, which may be symbols.
    return rows == batch and (heads == 1 or heads == kv_heads) and tuple(rest) == of_tokens


def _check_range(name: str, argument: str, values: Tensor, most: int, where: str = "") -> None:
    """Refuse values outside of 0 to ``most``."""
    if ((values < 0) | (values > most)).any():
        raise ValueError(
            f"{name}: {argument} must be from 0 to {most}{where}, "
            f"got {int(values.min())} to {int(values.max())}"
        )
