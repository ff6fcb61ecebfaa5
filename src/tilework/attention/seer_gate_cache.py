"""The gate's own cache for generation: a vector for each block of keys."""

import torch
from jaxtyping import Float
from torch import Tensor

from tilework import _checks
from tilework.attention.seer_gate import SeerGate, check_pair
from tilework.catalog import implements

__all__ = ["SeerGateCache"]

_NAME = "SeerGateCache"


@implements(
    "SeerAttention: Learning Intrinsic Sparse Attention in Your LLMs",
    year=2024,
    arxiv="2410.13276",
)
class SeerGateCache:
    r"""The logits of a :class:`SeerGate` as sequences grow, each block of keys compressed once.

    After :math:`L` positions, with the block size :math:`b`, an update by :math:`n` more gives the
    rows of blocks that hold one of them, of the gate's logits :math:`z` of the whole prefix:

    .. math::

        z(q_{0 \dots L+n-1}, k_{0 \dots L+n-1})_{ij}, \qquad
        i = \left\lfloor \tfrac{L}{b} \right\rfloor, \dots,
            \left\lceil \tfrac{L+n}{b} \right\rceil - 1, \quad
        j = 0, \dots, \left\lceil \tfrac{L+n}{b} \right\rceil - 1

    This holds however the positions come, all at once, in chunks or one by one, so that training,
    prefill and decoding agree: pools of the running block are those of the positions that it has so
    far, of queries and of keys, and every block is rotated by the position of its first token. A
    single token's row is thus that of its block of queries up to the token.

    The cache holds ``gate_dim`` numbers for each head and block of keys, in the gate's precision,
    and the queries and keys of the running block. What is complete is not computed again. There are
    no gradients. All sequences of a batch grow together.

    Args:
        gate: The gate. Its weights may change only before a :meth:`reset`.

    Raises:
        ValueError: Query and key are not of the gate's shapes, of the same length, or of the batch
            of the update before.
        TypeError: ``gate`` is no :class:`SeerGate`, or a dtype is not that of before.

    Example:
        >>> import torch
        >>> from tilework.attention import SeerGate, SeerGateCache, block_sparse_decode
        >>> gate = SeerGate(32, num_heads=4, num_kv_heads=2, block_size=16)
        >>> cache = SeerGateCache(gate)
        >>> query, key = torch.randn(1, 4, 101, 32), torch.randn(1, 2, 101, 32)  # before RoPE
        >>> cache.update(query[:, :, :100], key[:, :, :100]).shape
        torch.Size([1, 4, 7, 7])
        >>> logits = cache.update(query[:, :, 100:], key[:, :, 100:])
        >>> logits.shape
        torch.Size([1, 4, 1, 7])

        The blocks of the highest logit in a group and the running block, for one token:

        >>> scores = logits[:, :, 0].unflatten(1, (2, 2)).amax(2)
        >>> scores[..., -1] = torch.inf
        >>> blocks = scores.topk(3).indices
        >>> query, key, value = query[:, :, 100:], key, torch.randn_like(key)  # after RoPE
        >>> block_sparse_decode(query, key, value, blocks, block_size=16).shape
        torch.Size([1, 4, 1, 32])

    Deviations:
        The paper's gate is for the prefill. The cache of its successor SeerAttention-R, which does
        not pool queries, rotates a block that is completed while decoding by the position of its
        last token instead of its first.

    Reference:
        Yizhao Gao, Zhichen Zeng, Dayou Du, Shijie Cao, Peiyuan Zhou, Jiaxing Qi, Junjie Lai, Hayden
        Kwok-Hay So, Ting Cao, Fan Yang, Mao Yang. SeerAttention: Learning Intrinsic Sparse
        Attention in Your LLMs. 2024. arXiv:2410.13276.
    """

    def __init__(self, gate: SeerGate) -> None:
        if not isinstance(gate, SeerGate):
            raise _checks.bad_type(_NAME, "gate", "a SeerGate", gate)
        self.gate = gate
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.num_tokens = 0
        self._running: tuple[Tensor, Tensor] | None = None  # queries and keys of the last block
        self._keys: Tensor | None = None  # compressed, with room for more

    @property
    def num_blocks(self) -> int:
        """The blocks so far, the running one included."""
        return -(-self.num_tokens // self.gate.block_size)

    @torch.no_grad()
    def update(
        self,
        query: Float[Tensor, "batch heads length features"],
        key: Float[Tensor, "batch kv_heads length features"],
    ) -> Float[Tensor, "batch heads rows columns"]:
        """Add ``query`` ``(B, Hq, n, E)`` and ``key`` ``(B, Hkv, n, E)``, both before RoPE.

        Returns the logits of the rows that hold a new position: ``(B, Hq, rows, num_blocks)``,
        -inf for blocks that are not live.
        """
        gate, batch = self.gate, query.shape[0]
        check_pair(_NAME, gate, query, key)
        _checks.shape(_NAME, "key", key, (batch, gate.num_kv_heads, *query.shape[2:]))
        if self._running is not None:
            running = self._running[0]
            if query.dtype != running.dtype:
                raise _checks.bad_type(_NAME, "query", f"{running.dtype} as before", query)
            if batch != running.shape[0]:
                expected = f"of the batch {running.shape[0]} as before"
                raise _checks.bad_value(_NAME, "query", expected, query)
            query, key = (
                torch.cat((old, new), 2)
                for old, new in zip(self._running, (query, key), strict=True)
            )
        first = self.num_tokens // gate.block_size
        rows = gate.compress_queries(query, first_block=first)
        self.num_tokens = first * gate.block_size + query.shape[2]
        keys = self._store(first, gate.compress_keys(key, first_block=first))
        rest = query.shape[2] - self.num_tokens % gate.block_size
        self._running = query[:, :, rest:].clone(), key[:, :, rest:].clone()

        logits = gate.score(rows, keys)
        row, column = (torch.arange(size, device=query.device) for size in logits.shape[2:])
        return logits.masked_fill(column > first + row[:, None], -torch.inf)

    def _store(self, first: int, keys: Tensor) -> Tensor:
        """Put compressed keys at the place of the block ``first``; return those of all blocks."""
        stop, stored = first + keys.shape[2], self._keys
        room = 0 if stored is None else stored.shape[2]
        if stored is None or stop > room:
            # Room doubles, so that tokens one by one do not copy everything each time.
            larger = keys.new_empty(*keys.shape[:2], max(stop, 2 * room), keys.shape[3])
            if stored is not None:
                larger[:, :, :first] = stored[:, :, :first]
            self._keys = stored = larger
        stored[:, :, first:stop] = keys
        return stored[:, :, :stop]
