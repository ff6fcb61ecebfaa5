"""Whole models in the layouts that they are served in, and from them."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tilework import _checks
from tilework.catalog import without_paper
from tilework.quant.layers.quant_linear import QuantLinear
from tilework.quant.layouts.awq_layout import from_awq, to_awq
from tilework.quant.layouts.compressed_tensors_layout import (
    from_compressed_tensors,
    to_compressed_tensors,
)
from tilework.quant.layouts.gptq_layout import from_gptq, to_gptq
from tilework.quant.models._candidates import linear_layers
from tilework.quant.models._fit import Layer, put, taken
from tilework.quant.storage.quantized_tensor import QuantizedTensor

__all__ = ["export_quantized", "import_quantized_"]

LAYOUTS = ("gptq", "gptq_v2", "awq", "compressed-tensors")
_FIRST = {"gptq": "qweight", "awq": "qweight", "compressed-tensors": "weight_packed"}


@without_paper("quantized models for other software")
def export_quantized(
    model: nn.Module, *, layout: str, scale_dtype: torch.dtype = torch.float16
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The state and the configuration of a quantized model, as it is served.

    For a folder that transformers and vLLM load, save the state with safetensors, and the
    configuration of the model as ``config.json`` with the second result as its
    ``quantization_config``.

    Args:
        model: A model whose quantized layers all have the same bits and groups; nothing of it
            changes.
        layout: ``"gptq"``, ``"gptq_v2"``, ``"awq"`` or ``"compressed-tensors"``, as of
            :func:`to_gptq`, :func:`to_awq` and :func:`to_compressed_tensors`.
        scale_dtype: What scales are rounded to, that of the model's activations.

    Returns:
        The tensors by name, those that are tied once, and the configuration, of values of JSON.

    Raises:
        ValueError: No layer is quantized, layers differ in bits or groups, or one has what the
            layout has no place for.
        TypeError: ``model`` is not a module, or the weights of a layer are of another form.

    Example:
        >>> from torch import nn
        >>> from tilework.quant import RTNConfig, export_quantized, quantize_
        >>> model = nn.Sequential(nn.Linear(64, 32))
        >>> _ = quantize_(model, RTNConfig(group_size=32, scheme="symmetric"), progress=False)
        >>> state, config = export_quantized(model, layout="gptq")
        >>> sorted(state)
        ['0.bias', '0.g_idx', '0.qweight', '0.qzeros', '0.scales']
        >>> config["bits"], config["group_size"], config["sym"]
        (4, 32, True)

    Reference:
        Elias Frantar, Saleh Ashkboos, Torsten Hoefler, Dan Alistarh. GPTQ: Accurate Post-Training
        Quantization for Generative Pre-trained Transformers. 2022. arXiv:2210.17323.
    """
    name = "export_quantized"
    if not isinstance(model, nn.Module):
        raise _checks.bad_type(name, "model", "a module", model)
    _checks.one_of(name, "layout", layout, LAYOUTS)
    layers = {key: one for key, one in model.named_modules() if isinstance(one, QuantLinear)}
    if not layers:
        raise ValueError(f"{name}: model must have layers that are quantized, but has none")
    weights: dict[str, QuantizedTensor] = {key: one.quantized for key, one in layers.items()}
    kinds = {
        (one.bits, one.group_size) if type(one) is QuantizedTensor else type(one).__name__
        for one in weights.values()
    }
    if len(kinds) > 1:
        raise ValueError(f"{name}: model must have layers of the same bits and groups, got {kinds}")
    first = next(iter(weights.values()))
    symmetric = all(
        type(one) is QuantizedTensor and bool((one.zero_point == 2 ** (one.bits - 1)).all())
        for one in weights.values()
    )
    writers: dict[str, Callable[..., dict[str, Tensor]]] = {
        "awq": to_awq,
        "compressed-tensors": partial(to_compressed_tensors, symmetric=symmetric),
        "gptq": partial(to_gptq, checkpoint_format="gptq"),
        "gptq_v2": partial(to_gptq, checkpoint_format="gptq_v2"),
    }
    state: dict[str, Tensor] = {}
    seen: set[int] = set()
    own = {f"{key}.{buffer}" for key, one in layers.items() for buffer in dict(one.named_buffers())}
    for key, value in model.state_dict(keep_vars=True).items():
        if key not in own and id(value) not in seen:
            seen.add(id(value))
            state[key] = value.detach()
    for key, one in weights.items():
        try:
            tensors = writers[layout](one, scale_dtype=scale_dtype)
        except (ValueError, TypeError) as error:
            raise type(error)(f"{name}: layer {key}: {error}") from error
        state.update({f"{key}.{part}": tensor for part, tensor in tensors.items()})
    float_layers = [key for key, one in linear_layers(model) if not isinstance(one, QuantLinear)]
    ordered = all(one.group_index is None for one in weights.values())
    config = _config(layout, first, symmetric, ordered, float_layers)
    return state, config


def _config(
    layout: str, first: QuantizedTensor, symmetric: bool, ordered: bool, float_layers: list[str]
) -> dict[str, Any]:
    size = -1 if first.group_size is None else first.group_size
    if layout == "awq":
        return {
            "quant_method": "awq",
            "version": "gemm",
            "bits": 4,
            "group_size": size,
            "zero_point": True,
            "modules_to_not_convert": float_layers,
        }
    if layout == "compressed-tensors":
        weights = {
            "num_bits": first.bits,
            "type": "int",
            "symmetric": symmetric,
            "strategy": "channel" if first.group_size is None else "group",
            "group_size": first.group_size,
            "actorder": None if ordered else "group",
        }
        return {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "quantization_status": "compressed",
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
            "ignore": float_layers,
        }
    return {
        "quant_method": "gptq",
        "checkpoint_format": layout,
        "bits": first.bits,
        "group_size": size,
        "desc_act": not ordered,
        "sym": symmetric,
        "lm_head": False,
    }


@without_paper("quantized models of other software")
def import_quantized_(
    model: nn.Module, state: Mapping[str, Tensor], config: Mapping[str, Any]
) -> None:
    """Make a model the quantized one of a state and a configuration, as it is served.

    Layers whose tensors are quantized take the places of the model's own, which may be on meta; all
    other tensors are copied into the model's. Everything is checked before anything changes.

    Args:
        model: A model of the same structure, not quantized.
        state: The tensors by name, such as those of all files of a folder together.
        config: Its ``quantization_config``, of the ``quant_method`` ``"gptq"``, ``"awq"``, version
            GEMM, or ``"compressed-tensors"``, format "pack-quantized" with one group of layers.

    Returns:
        Nothing.

    Raises:
        ValueError: The configuration is of another kind or lacks something, or the tensors do not
            fit it or the model.
        TypeError: ``model`` is not a module, or a tensor is of another dtype.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from tilework.quant import RTNConfig, export_quantized, import_quantized_, quantize_
        >>> model = nn.Sequential(nn.Linear(64, 32))
        >>> _ = quantize_(model, RTNConfig(group_size=32), progress=False)
        >>> exported = export_quantized(model, layout="gptq_v2", scale_dtype=torch.float32)
        >>> other = nn.Sequential(nn.Linear(64, 32))
        >>> import_quantized_(other, *exported)
        >>> torch.equal(other[0].weight, model[0].weight)
        True

    Reference:
        As :func:`export_quantized`.
    """
    name = "import_quantized_"
    if not isinstance(model, nn.Module):
        raise _checks.bad_type(name, "model", "a module", model)
    method = config.get("quant_method")
    if method not in _FIRST:
        accepted = "one of " + ", ".join(map(repr, _FIRST))
        raise _checks.bad_value(name, "quant_method of config", accepted, method)
    read = _reader(name, method, config)
    tensors = dict(state)
    last = f".{_FIRST[method]}"
    names = [key.removesuffix(last) for key in tensors if key.endswith(last)]
    layers: dict[str, Layer] = {}
    for layer in names:
        own = taken(tensors, layer)
        bias = own.pop("bias", None)
        try:
            layers[layer] = read(own), bias
        except (ValueError, TypeError) as error:
            raise type(error)(f"{name}: layer {layer}: {error}") from error
    if not layers:
        raise ValueError(f"{name}: state must have layers with a {_FIRST[method]}, but has none")
    put(name, "state", model, layers, tensors)


def _reader(
    name: str, method: str, config: Mapping[str, Any]
) -> Callable[[dict[str, Tensor]], QuantizedTensor]:
    """What reads the tensors of a layer."""

    def given(options: Mapping[str, Any], key: str) -> Any:
        if key not in options:
            raise ValueError(f"{name}: config must say {key}")
        return options[key]

    if method == "compressed-tensors":
        if config.get("format") != "pack-quantized":
            accepted = "'pack-quantized'"
            raise _checks.bad_value(name, "format of config", accepted, config.get("format"))
        groups = list(given(config, "config_groups").values())
        if len(groups) != 1:
            raise _checks.bad_value(name, "config_groups", "one group of layers", len(groups))
        weights = given(groups[0], "weights")
        bits, size = given(weights, "num_bits"), weights.get("group_size")
        return lambda own: from_compressed_tensors(own, bits=bits, group_size=size)
    size = given(config, "group_size")
    size = None if size == -1 else size
    if method == "awq":
        if config.get("version", "gemm").lower() != "gemm" or given(config, "bits") != 4:
            raise ValueError(f"{name}: config must be of version 'gemm' and 4 bits for AWQ")
        return lambda own: from_awq(own, group_size=size)
    bits = given(config, "bits")
    form = config.get("checkpoint_format", "gptq")
    return lambda own: from_gptq(own, bits=bits, group_size=size, checkpoint_format=form)
