"""A quantized model in one file, and from it."""

from pathlib import Path
from typing import Any

from torch import Tensor, nn

from tilework import _checks
from tilework.catalog import without_paper
from tilework.quant.layers.quant_linear import QuantLinear
from tilework.quant.models._candidates import places_of, replace, shape_of
from tilework.quant.models._files import described, layer_of, read, write

__all__ = ["load_quantized_", "save_quantized"]


@without_paper("a quantized model in a file")
def save_quantized(model: nn.Module, path: str | Path) -> None:
    """Write the state of a model with quantized layers into a file of safetensors.

    The file holds what ``model.state_dict()`` does, a tensor of several names once, and in its
    header the form of each quantized layer, from which :func:`load_quantized_` makes it anew. It
    needs the package ``safetensors``.

    Args:
        model: A model, as :func:`quantize_` leaves it.
        path: Of the file; one that is there is replaced when the new one is complete.

    Returns:
        Nothing.

    Raises:
        ValueError: No layer of the model is quantized.
        TypeError: ``model`` is not a module, or has a state that is not a tensor.

    Example:
        >>> import tempfile
        >>> from torch import nn
        >>> from tilework.quant import RTNConfig, load_quantized_, quantize_, save_quantized
        >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU())
        >>> _ = quantize_(model, RTNConfig(), progress=False)
        >>> fresh = nn.Sequential(nn.Linear(64, 64), nn.ReLU())
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_quantized(model, f"{folder}/model.safetensors")
        ...     load_quantized_(fresh, f"{folder}/model.safetensors")
        >>> bool((fresh[0].weight == model[0].weight).all())
        True

    Reference:
        Benoit Jacob, Skirmantas Kligys, Bo Chen, and others. Quantization and Training of Neural
        Networks for Efficient Integer-Arithmetic-Only Inference. 2017. arXiv:1712.05877.
    """
    name = "save_quantized"
    if not isinstance(model, nn.Module):
        raise _checks.bad_type(name, "model", "a module", model)
    forms = {
        layer: described(module.form)
        for layer, module in model.named_modules()
        if isinstance(module, QuantLinear)
    }
    if not forms:
        raise ValueError(f"{name}: model must have layers that are quantized, but has none")
    state: dict[str, Tensor] = {}
    kept: set[int] = set()
    for key, value in model.state_dict(keep_vars=True).items():
        if not isinstance(value, Tensor):
            raise _checks.bad_type(name, "model", f"one with tensors alone; {key} must be", value)
        if id(value) not in kept:
            kept.add(id(value))
            state[key] = value
    write(Path(path), state, {"forms": forms})


@without_paper("a quantized model from a file")
def load_quantized_(model: nn.Module, path: str | Path) -> None:
    """Make a model the one that :func:`save_quantized` wrote.

    Layers that are quantized in the file take the places of the model's own, which may be on meta;
    all other tensors are copied into the model's. Everything is checked before anything changes.

    Args:
        model: A model of the same structure, not quantized, or quantized in the same places.
        path: Of the file.

    Returns:
        Nothing.

    Raises:
        ValueError: The file is of another kind, or does not fit the model: a layer or a tensor is
            missing or too many, or of another shape.
        TypeError: ``model`` is not a module.

    Example:
        See :func:`save_quantized`:

        >>> from tilework.quant import load_quantized_, save_quantized

    Reference:
        Benoit Jacob, Skirmantas Kligys, Bo Chen, and others. Quantization and Training of Neural
        Networks for Efficient Integer-Arithmetic-Only Inference. 2017. arXiv:1712.05877.
    """
    name = "load_quantized_"
    if not isinstance(model, nn.Module):
        raise _checks.bad_type(name, "model", "a module", model)
    tensors, header = read(name, Path(path))
    modules, places = dict(model.named_modules()), places_of(model)
    misfits: list[str] = []
    layers: list[tuple[nn.Module, QuantLinear]] = []
    for layer, description in header["forms"].items():
        parts = {key: tensors.pop(key) for key in list(tensors) if key.startswith(f"{layer}.")}
        shape = tuple(description["shape"])
        old = modules.get(layer)
        if old is None or shape_of(old) != shape:
            misfits.append(f"it has no linear layer {layer} of shape {shape}")
        elif (old._parameters["bias"] is None) != (f"{layer}.bias" not in parts):
            misfits.append(f"{layer} has a bias in one of them alone")
        else:
            own = {key.removeprefix(f"{layer}."): value for key, value in parts.items()}
            layers.append((old, _layer(old, description, own)))
    replaced = {id(value) for old, _ in layers for value in old.state_dict(keep_vars=True).values()}
    targets = model.state_dict(keep_vars=True)
    targets = {key: value for key, value in targets.items() if id(value) not in replaced}
    values: dict[int, Tensor] = {}
    for key, value in tensors.items():
        if key not in targets:
            misfits.append(f"it has no {key}")
        elif targets[key].shape != value.shape:
            shapes = f"{tuple(targets[key].shape)}, in the file {tuple(value.shape)}"
            misfits.append(f"{key} is of shape {shapes}")
        else:
            values[id(targets[key])] = _like(targets[key], value)
    misfits += [f"the file has no {key}" for key, own in targets.items() if id(own) not in values]
    if misfits:
        raise ValueError(f"{name}: {path} does not fit the model: {'; '.join(misfits)}")
    for old, new in layers:
        replace(old, new, places[id(old)])
    state = {key: values[id(own)] for key, own in targets.items()}
    on_meta = any(own.is_meta for own in targets.values())
    model.load_state_dict(state, strict=False, assign=on_meta)


def _layer(old: nn.Module, description: dict[str, Any], tensors: dict[str, Tensor]) -> QuantLinear:
    """The layer of a file that is to take the place of another, on its device."""
    device = next(tensor.device for tensor in (*old.parameters(), *old.buffers()))
    if device.type != "meta":
        tensors = {name: tensor.to(device) for name, tensor in tensors.items()}
    bias, before = tensors.pop("bias", None), old._parameters["bias"]
    if bias is not None and before is not None:
        bias = nn.Parameter(bias, requires_grad=before.requires_grad)
    return layer_of(description, tensors, bias)


def _like(target: Tensor, value: Tensor) -> Tensor:
    """A value as a parameter, if it is to be one."""
    if isinstance(target, nn.Parameter):
        return nn.Parameter(value, requires_grad=target.requires_grad)
    return value
