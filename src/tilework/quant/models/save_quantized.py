"""A quantized model in one file, and from it."""

from pathlib import Path

from torch import Tensor, nn

from tilework import _checks
from tilework.catalog import without_paper
from tilework.quant.layers.quant_linear import QuantLinear
from tilework.quant.models._files import described, form_of, read, write
from tilework.quant.models._fit import Layer, put, taken

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
    layers: dict[str, Layer] = {}
    for layer, description in header["forms"].items():
        own = taken(tensors, layer)
        bias = own.pop("bias", None)
        layers[layer] = form_of(description).put_together(own), bias
    put(name, str(path), model, layers, tensors)
