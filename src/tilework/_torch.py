"""The private names of PyTorch that the library leans on; ``tests/test_torch.py`` checks each."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.autograd import forward_ad
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

_BATCHED_GRADIENTS: Any = torch._C._parse_dispatch_key("VmapMode")


def constant_when_traced(function: Callable[[], None]) -> Callable[[], None]:
    """Have ``torch.compile`` call a function, not trace it.

    As ``torch.compiler.assume_constant_result``, which takes seconds to import the compiler.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def transforms_are_active() -> bool:
    """Whether the call runs under a transform of ``torch.func``."""
    return torch._C._are_functorch_transforms_active()


def is_transformed(tensor: Tensor) -> bool:
    """Whether a transform of ``torch.func`` wraps the tensor."""
    return torch._C._functorch.is_functorch_wrapped_tensor(tensor)


def modes_are_active() -> bool:
    """Whether a dispatch mode, such as that of fake tensors or a FLOP counter, watches the call.

    So do batched gradients: ``is_grads_batched`` of ``torch.autograd.grad``.
    """
    return (
        torch._C._len_torch_dispatch_stack() > 0
        or torch._C._dispatch_tls_is_dispatch_key_included(_BATCHED_GRADIENTS)
    )


def is_fake_mode() -> bool:
    """Whether operations give tensors without values, as under ``FakeTensorMode``."""
    return torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None


def tell_flop_counters(operator: Any, count: Callable[..., int]) -> None:
    """Let ``torch.utils.flop_counter`` know an operator, if somebody has imported it.

    A counter copies the registry when it is made, and importing the module, which imports Triton,
    takes too long to do so beforehand: so those that count now are told as well.
    """
    module = sys.modules.get("torch.utils.flop_counter")
    if module is None:
        return
    packet = operator.overloadpacket
    module.flop_registry.setdefault(packet, count)
    for mode in _get_current_dispatch_mode_stack():
        if isinstance(mode, module._FlopCounterMode):
            mode.counter.flop_registry.setdefault(packet, count)


def autocast_is_active() -> bool:
    """Whether autocast is on for any device, which takes less time to ask than for one."""
    return torch._C._is_any_autocast_enabled()


def is_forward_mode() -> bool:
    """Whether the call runs under forward-mode differentiation."""
    return forward_ad._current_level >= 0


def multiplies_bfloat16() -> bool:
    """Whether the processor has instructions for products of bfloat16."""
    return torch.cpu._is_avx512_bf16_supported()


def standard_gamma(shape: Tensor, generator: torch.Generator | None) -> Tensor:
    """Draw from gamma distributions of these shapes; no public sampler takes a generator."""
    return torch._standard_gamma(shape, generator=generator)


def _same(tensor: Tensor) -> Tensor:
    return tensor


@contextmanager
def autograd_enabled() -> Iterator[None]:
    """Record gradients, also inside of an operator's kernel, where PyTorch has left autograd.

    They are the kernel's own: hooks on saved tensors, such as those of checkpointing, see none.
    """
    key = torch._C.DispatchKey.AutogradFunctionality
    was_excluded = torch._C._dispatch_tls_is_dispatch_key_excluded(key)
    torch._C._dispatch_tls_set_dispatch_key_excluded(key, False)
    try:
        with torch.enable_grad(), saved_tensors_hooks(_same, _same):
            yield
    finally:
        torch._C._dispatch_tls_set_dispatch_key_excluded(key, was_excluded)


def keeps_graph() -> bool:
    """Whether the backward pass that is running may be asked for again."""
    return torch._C._autograd._get_current_graph_task_keep_graph()


def never_traced(function: Callable[..., None]) -> Callable[..., None]:
    """Have ``torch.compile`` leave a function, and all that it calls, as it is.

    As ``torch.compiler.disable``, which takes seconds to import the compiler.
    """
    return _disable_dynamo(function)


def replicated(tensor: Tensor, parameter: Any) -> Tensor:
    """A tensor that is alike everywhere, on the mesh of a distributed parameter."""
    from torch.distributed.tensor import DTensor, Replicate

    mesh = parameter.device_mesh
    return DTensor.from_local(tensor, mesh, [Replicate()] * mesh.ndim, run_check=False)


def largest(value: Tensor, of: Any) -> Tensor:
    """The largest of what all shards of a distributed tensor have, alike everywhere."""
    from torch.distributed.tensor import DTensor, Partial, Replicate

    mesh = of.device_mesh
    shards = [Partial("max") if p.is_shard() else Replicate() for p in of.placements]
    result: Tensor = DTensor.from_local(value, mesh, shards, run_check=False).full_tensor()
    return result


def fused_adamw(
    parameters: list[Tensor],
    gradients: list[Tensor],
    moments: list[list[Tensor]],
    steps: list[Tensor],
    **options: Any,
) -> None:
    """A step of AdamW in one operator; ``moments`` as its states are ordered."""
    torch._fused_adamw_(  # type: ignore[call-overload]
        parameters,
        gradients,
        *(moments[:2]),
        moments[2] if options["amsgrad"] else [],
        steps,
        grad_scale=None,
        found_inf=None,
        **options,
    )


def global_offset(tensor: Any) -> tuple[int, ...]:
    """Where the local part of a distributed tensor begins in the whole one."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    _, offset = compute_local_shape_and_global_offset(
        tensor.shape, tensor.device_mesh, tensor.placements
    )
    return offset


def is_missing_compiler(error: BaseException) -> bool:
    """Whether ``torch.compile`` failed for want of a compiler for what it writes."""
    causes: list[BaseException | None] = [error]
    while (cause := causes.pop()) is not None:
        if type(cause).__name__ in ("InvalidCxxCompiler", "TritonMissing"):
            return True
        causes.append(cause.__cause__ or getattr(cause, "inner_exception", None))
    return False
