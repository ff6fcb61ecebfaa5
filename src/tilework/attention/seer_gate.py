"""A trainable gate that scores blocks of keys for each block of queries."""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tilework import _checks
from tilework._operators import computation_dtype, without_autocast
from tilework.catalog import implements

__all__ = ["SeerGate"]

_NAME = "SeerGate"
POOLS = ("max", "min", "avg")


@implements(
    "SeerAttention: Learning Intrinsic Sparse Attention in Your LLMs",
    year=2024,
    arxiv="2410.13276",
)
class SeerGate(nn.Module):
    r"""Scores of blocks of keys for blocks of queries, from pooled queries and keys.

    With :math:`b` = ``block_size``, :math:`P_q(i)` the concatenated pools ``q_pool`` of the queries
    of block :math:`i` of a head :math:`h`, :math:`P_k(j)` the pools ``k_pool`` of the keys of block
    :math:`j` of its group's head :math:`g(h)`, the weights :math:`W^q` = ``q_weight``,
    :math:`W^k` = ``k_weight``, the rotation :math:`R_p` of RoPE by the position :math:`p` and
    :math:`d` = ``gate_dim``:

    .. math::

        q'_i = R_{ib} \left(P_q(i)\, W^q_h\right), \qquad
        k'_j = R_{jb} \left(P_k(j)\, W^k_{g(h)}\right), \qquad
        z_{ij} = \frac{{q'_i}^\top k'_j}{\sqrt d}

    Pools are taken over the positions that exist, so that the last block may be short. With
    ``is_causal``, :math:`z_{ij}` is :math:`-\infty` for :math:`j > i`. Everything is computed in
    float32, or float64 if the tensors or the weights are, also under autocast.

    Its logits select blocks: ``BlockLayout.from_scores_topk(gate(query, key), k, is_causal=True)``
    or ``BlockLayout.from_scores_threshold(gate(query, key).softmax(-1), t, is_causal=True)``. The
    loss of the language model does not reach the gate through a selection. It is trained on a
    frozen model, with :func:`seer_gate_loss` summed over the layers; the authors take AdamW with a
    rate of 1e-3, no weight decay, and a cosine schedule with 20 steps of warm-up.

    Args:
        head_dim: Features :math:`E` of a query and of a key.
        num_heads: Heads :math:`H_q` of queries.
        num_kv_heads: Heads :math:`H_{kv}` of keys, which divide ``num_heads``; None for as many.
        block_size: Positions in a block.
        gate_dim: Features of a projected block; even if there is a rotation.
        q_pool: Pools of queries, of ``"max"``, ``"min"`` and ``"avg"``.
        k_pool: Pools of keys.
        q_projection: Whether queries are projected. False needs ``len(q_pool) * head_dim ==
            gate_dim``, and gives keys a weight for each head of queries.
        rope_theta: Base of the rotation's frequencies :math:`\theta^{-2m/d}`; None for no rotation.
        device: Device of the weights.
        dtype: Their dtype.

    Raises:
        ValueError: An option or a shape is not one of those above.
        TypeError: An option is of another type, or a tensor is not of a real floating dtype.

    Example:
        >>> import torch
        >>> from tilework.attention import BlockLayout, SeerGate
        >>> gate = SeerGate(32, num_heads=4, num_kv_heads=2, block_size=16)
        >>> query, key = torch.randn(1, 4, 100, 32), torch.randn(1, 2, 100, 32)  # before RoPE
        >>> logits = gate(query, key)
        >>> logits.shape
        torch.Size([1, 4, 7, 7])
        >>> BlockLayout.from_scores_topk(logits, 3, 16, is_causal=True)
        BlockLayout(shape=(1, 4, 7, 7), block_size=(16, 16), density=0.367)

    Deviations:
        Hidden blocks have a logit of :math:`-\infty`, in the released code -1e9. That code leaves
        out the projection of queries whenever they have one pool of ``gate_dim`` features; here
        that is an option.

    Reference:
        Yizhao Gao, Zhichen Zeng, Dayou Du, Shijie Cao, Peiyuan Zhou, Jiaxing Qi, Junjie Lai, Hayden
        Kwok-Hay So, Ting Cao, Fan Yang, Mao Yang. SeerAttention: Learning Intrinsic Sparse
        Attention in Your LLMs. 2024. arXiv:2410.13276.
    """

    head_dim: int
    num_heads: int
    num_kv_heads: int
    block_size: int
    gate_dim: int
    rope_theta: float | None
    q_weight: nn.Parameter | None

    def __init__(
        self,
        head_dim: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        *,
        block_size: int = 64,
        gate_dim: int = 128,
        q_pool: Sequence[str] = ("avg",),
        k_pool: Sequence[str] = ("max", "min", "avg"),
        q_projection: bool = True,
        rope_theta: float | None = 10000.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        sizes = {
            "head_dim": head_dim,
            "num_heads": num_heads,
            "num_kv_heads": num_kv_heads,
            "block_size": block_size,
            "gate_dim": gate_dim,
        }
        for name, size in sizes.items():
            _checks.count(_NAME, name, size)
        if num_heads % num_kv_heads:
            expected = f"a divisor of num_heads={num_heads}"
            raise _checks.bad_value(_NAME, "num_kv_heads", expected, num_kv_heads)
        self.q_pool, self.k_pool = _pools("q_pool", q_pool), _pools("k_pool", k_pool)
        if rope_theta is not None:
            _checks.positive(_NAME, "rope_theta", rope_theta)
            if gate_dim % 2:
                raise _checks.bad_value(_NAME, "gate_dim", "even with rope_theta", gate_dim)
        q_features, k_features = len(self.q_pool) * head_dim, len(self.k_pool) * head_dim
        if not q_projection and q_features != gate_dim:
            expected = f"len(q_pool) * head_dim = {q_features} with q_projection=False"
            raise _checks.bad_value(_NAME, "gate_dim", expected, gate_dim)
        self.head_dim = _checks.plain(head_dim)
        self.num_heads = _checks.plain(num_heads)
        self.num_kv_heads = _checks.plain(num_kv_heads)
        self.block_size = _checks.plain(block_size)
        self.gate_dim = _checks.plain(gate_dim)
        self.q_projection = q_projection
        self.rope_theta = _checks.plain(rope_theta)

        def weight(heads: int, features: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(heads, features, gate_dim, device=device, dtype=dtype))

        self.register_parameter("q_weight", weight(num_heads, q_features) if q_projection else None)
        self.k_weight = weight(num_kv_heads if q_projection else num_heads, k_features)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weights from a normal distribution of standard deviation 0.02."""
        for weight in self.parameters():
            nn.init.normal_(weight, std=0.02)

    def forward(
        self,
        query: Float[Tensor, "batch heads queries features"],
        key: Float[Tensor, "batch kv_heads keys features"],
        *,
        is_causal: bool = True,
    ) -> Float[Tensor, "batch heads rows columns"]:
        """Return the logits, shape ``(B, Hq, nq, nk)``.

        ``query`` ``(B, Hq, Lq, E)`` and ``key`` ``(B, Hkv, Lk, E)`` are those before RoPE.
        """
        check_pair(_NAME, self, query, key)
        queries, keys = self.compress_queries(query), self.compress_keys(key)
        logits = self.score(queries, keys)
        if is_causal:
            rows, columns = (
                torch.arange(length, device=query.device) for length in logits.shape[-2:]
            )
            logits = logits.masked_fill(columns > rows[:, None], -torch.inf)
        return logits

    def compress_queries(
        self, query: Float[Tensor, "batch heads queries features"], *, first_block: int = 0
    ) -> Float[Tensor, "batch heads rows gate_features"]:
        """Pool, project and rotate queries ``(B, Hq, Lq, E)`` to ``(B, Hq, nq, gate_dim)``.

        Their first position is that of the block ``first_block``.
        """
        check_projection(_NAME, self, "query", query)
        pooled = self._pool(query, self.q_pool)
        if self.q_weight is not None:
            pooled = _product(pooled, self.q_weight.to(pooled.dtype))
        return self._rotate(pooled, first_block)

    def compress_keys(
        self, key: Float[Tensor, "batch kv_heads keys features"], *, first_block: int = 0
    ) -> Float[Tensor, "batch weight_heads columns gate_features"]:
        """Pool, project and rotate keys ``(B, Hkv, Lk, E)`` to ``(B, Hkv, nk, gate_dim)``.

        With ``q_projection=False`` they have the ``Hq`` heads of the queries. Their first position
        is that of the block ``first_block``.
        """
        check_projection(_NAME, self, "key", key)
        pooled = self._pool(key, self.k_pool)
        pooled = pooled.repeat_interleave(self.k_weight.shape[0] // self.num_kv_heads, 1)
        return self._rotate(_product(pooled, self.k_weight.to(pooled.dtype)), first_block)

    def score(
        self,
        queries: Float[Tensor, "batch heads rows gate_features"],
        keys: Float[Tensor, "batch weight_heads columns gate_features"],
    ) -> Float[Tensor, "batch heads rows columns"]:
        """Return the logits of compressed queries and keys, nothing hidden."""
        batch, heads, columns, features = keys.shape
        # Queries of a group are rows of one product, so that no key is copied.
        rows = self.num_heads // heads * queries.shape[2]
        grouped = queries.reshape(batch, heads, rows, features)
        logits = _product(grouped, keys.mT) / math.sqrt(self.gate_dim)
        return logits.reshape(*queries.shape[:3], columns)

    def extra_repr(self) -> str:
        """Return the options."""
        return (
            f"{self.head_dim}, {self.num_heads}, {self.num_kv_heads}, "
            f"block_size={self.block_size}, gate_dim={self.gate_dim}, q_pool={self.q_pool}, "
            f"k_pool={self.k_pool}, q_projection={self.q_projection}, rope_theta={self.rope_theta}"
        )

    def _pool(self, input: Tensor, pools: tuple[str, ...]) -> Tensor:
        """The pools of each block: ``(B, H, n, len(pools) * E)``, in the computation's dtype."""
        dtype = torch.promote_types(computation_dtype(input.dtype), self.k_weight.dtype)
        batch, heads, length, features = input.shape
        blocks, rest = length // self.block_size, length % self.block_size
        whole = input[:, :, : length - rest].reshape(
            batch, heads, blocks, self.block_size, features
        )
        pieces = [whole, input[:, :, None, length - rest :]] if rest else [whole]
        return torch.cat([_pooled(piece, pools, dtype) for piece in pieces], 2)

    def _rotate(self, input: Tensor, first_block: int) -> Tensor:
        """RoPE at the first position of each block; angles in float64, as they grow with it."""
        if self.rope_theta is None:
            return input
        blocks = torch.arange(input.shape[2], dtype=torch.float64, device=input.device)
        pairs = torch.arange(0, self.gate_dim, 2, dtype=torch.float64, device=input.device)
        positions = (first_block + blocks) * self.block_size
        angle = positions[:, None] * self.rope_theta ** (-pairs / self.gate_dim)
        cos, sin = angle.cos().to(input.dtype), angle.sin().to(input.dtype)
        first, second = input.chunk(2, -1)
        return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)


def check_pair(function: str, gate: SeerGate, query: Tensor, key: Tensor) -> None:
    """Refuse what is no pair of queries and keys for a gate; their lengths may differ."""
    check_projection(function, gate, "query", query)
    check_projection(function, gate, "key", key)
    if key.shape[0] != query.shape[0]:
        raise _checks.bad_value(function, "key", f"of query's batch {query.shape[0]}", key)
    if key.dtype != query.dtype:
        raise _checks.bad_type(function, "key", f"of query's {query.dtype}", key)


def check_projection(function: str, gate: SeerGate, name: str, tensor: Tensor) -> None:
    """Refuse what are no queries, or no keys, for a gate."""
    _checks.floating(function, name, tensor)
    heads = gate.num_heads if name == "query" else gate.num_kv_heads
    if tensor.dim() != 4 or tensor.shape[1] != heads or tensor.shape[3] != gate.head_dim:
        expected = f"of shape (B, {heads}, L, {gate.head_dim})"
        raise _checks.bad_value(function, name, expected, tensor)
    _checks.same_device(function, k_weight=gate.k_weight, **{name: tensor})


def _pools(argument: str, pools: Sequence[str]) -> tuple[str, ...]:
    accepted = "a non-empty sequence of 'max', 'min' and 'avg'"
    if isinstance(pools, str) or not isinstance(pools, Sequence):
        raise _checks.bad_type(_NAME, argument, accepted, pools)
    if not pools or any(pool not in POOLS for pool in pools):
        raise _checks.bad_value(_NAME, argument, accepted, pools)
    return tuple(pools)


def _pooled(blocks: Tensor, pools: tuple[str, ...], dtype: torch.dtype) -> Tensor:
    """The pools of blocks ``(B, H, n, positions, E)``, side by side."""
    by_name = {
        "max": lambda: blocks.amax(3).to(dtype),
        "min": lambda: blocks.amin(3).to(dtype),
        "avg": lambda: blocks.mean(3, dtype=dtype),
    }
    return torch.cat([by_name[pool]() for pool in pools], -1)


@without_autocast
def _product(left: Tensor, right: Tensor) -> Tensor:
    return left @ right
