"""Quantized layers in files of safetensors, whose header says the forms of their weights."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tilework import quant
from tilework.quant.storage._stored import Form

KEY = "tilework.quant"


def described(form: Form) -> dict[str, Any]:
    """A form in values of JSON."""
    options = {
        name: {"dtype": str(value).removeprefix("torch.")}
        if isinstance(value, torch.dtype)
        else list(value)
        if isinstance(value, tuple)
        else value
        for name, value in form.options.items()
    }
    return {
        "kind": form.kind.__name__,
        "shape": list(form.shape),
        "options": options,
        "tensors": list(form.tensors),
        "indices": list(form.indices),
        "transform": None if form.transform is None else form.transform.__name__,
        "moved": list(form.moved),
    }


def form_of(description: Mapping[str, Any]) -> Form:
    """The form that was described."""
    options = {}
    for name, value in description["options"].items():
        if isinstance(value, dict):
            value = getattr(torch, value["dtype"])
        options[name] = tuple(value) if isinstance(value, list) else value
    transform = description["transform"]
    return Form(
        kind=getattr(quant, description["kind"]),
        shape=torch.Size(description["shape"]),
        options=options,
        tensors=tuple(description["tensors"]),
        indices=tuple(description["indices"]),
        transform=None if transform is None else getattr(quant, transform),
        moved=tuple(description["moved"]),
    )


def write(path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> None:
    """Write a file, which is there as a whole or not at all."""
    from safetensors.torch import save_file

    kept = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    partial = path.with_name(path.name + ".partial")
    save_file(kept, partial, metadata={"format": "pt", KEY: json.dumps(header)})
    os.replace(partial, path)


def read(name: str, path: Path) -> tuple[dict[str, Tensor], Any]:
    """The tensors and the header of a file that :func:`write` wrote."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        if KEY not in metadata:
            raise ValueError(f"{name}: {path} was not written by tilework")
        return {key: file.get_tensor(key) for key in file.keys()}, json.loads(metadata[KEY])  # noqa: SIM118
