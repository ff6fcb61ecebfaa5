"""Quantized layers and other tensors put into a model, once all of them fit."""

from collections.abc import Mapping

from torch import Tensor, nn

from tilework.quant.layers.quant_linear import QuantLinear
from tilework.quant.models._candidates import places_of, replace, shape_of
from tilework.quant.storage._stored import StoredWeights

Layer = tuple[StoredWeights, Tensor | None]
"""The weights of a layer, and its bias."""


def taken(tensors: dict[str, Tensor], layer: str) -> dict[str, Tensor]:
    """The tensors of a layer, by their own names; they are taken out."""
    keys = [key for key in tensors if key.startswith(f"{layer}.")]
    return {key.removeprefix(f"{layer}."): tensors.pop(key) for key in keys}


def put(
    name: str,
    source: str,
    model: nn.Module,
    layers: Mapping[str, Layer],
    tensors: Mapping[str, Tensor],
) -> None:
    """Put layers in the places of a model's own, and copy tensors into its other ones.

    Raises:
        ValueError: Something does not fit; then nothing has changed.
    """
    modules, places = dict(model.named_modules()), places_of(model)
    misfits: list[str] = []
    made: list[tuple[nn.Module, QuantLinear]] = []
    for layer, (quantized, bias) in layers.items():
        old = modules.get(layer)
        if old is None or shape_of(old) != quantized.shape:
            misfits.append(f"it has no linear layer {layer} of shape {tuple(quantized.shape)}")
        elif (old._parameters["bias"] is None) != (bias is None):
            misfits.append(f"{layer} has a bias in one of them alone")
        else:
            made.append((old, _layer(old, quantized, bias)))
    replaced = {id(value) for old, _ in made for value in old.state_dict(keep_vars=True).values()}
    targets = model.state_dict(keep_vars=True)
    targets = {key: value for key, value in targets.items() if id(value) not in replaced}
    values: dict[int, Tensor] = {}
    for key, value in tensors.items():
        if key not in targets:
            misfits.append(f"it has no {key}")
        elif targets[key].shape != value.shape:
            shapes = f"{tuple(targets[key].shape)}, there {tuple(value.shape)}"
            misfits.append(f"{key} is of shape {shapes}")
        else:
            values[id(targets[key])] = _like(targets[key], value)
    misfits += [f"there is no {key}" for key, own in targets.items() if id(own) not in values]
    if misfits:
        raise ValueError(f"{name}: {source} does not fit the model: {'; '.join(misfits)}")
    for old, new in made:
        replace(old, new, places[id(old)])
    state = {key: values[id(own)] for key, own in targets.items()}
    on_meta = any(own.is_meta for own in targets.values())
    model.load_state_dict(state, strict=False, assign=on_meta)


def _layer(old: nn.Module, quantized: StoredWeights, bias: Tensor | None) -> QuantLinear:
    """The layer that is to take the place of another, on its device."""
    device = next(tensor.device for tensor in (*old.parameters(), *old.buffers()))
    if device.type != "meta":
        quantized = quantized.to(device)
        bias = None if bias is None else bias.to(device)
    before = old._parameters["bias"]
    if bias is not None and before is not None:
        bias = nn.Parameter(bias, requires_grad=before.requires_grad)
    return QuantLinear(quantized, bias)


def _like(target: Tensor, value: Tensor) -> Tensor:
    """A value as a parameter, if it is to be one."""
    if isinstance(target, nn.Parameter):
        return nn.Parameter(value, requires_grad=target.requires_grad)
    return value
