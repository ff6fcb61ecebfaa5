"""The models that are quantized: the demo's, and an encoder that a package carries."""

import ast
import importlib.util
import json
import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from data import draw, read_corpus, spread
from torch import Tensor, nn
from training import CPU, Settings, build, read_checkpoint, train

MASKED = 0.15
INSTALL = "pip install --no-deps antiberty==0.1.3 anarci"


@dataclass(frozen=True)
class Subject:
    """A trained model and what is measured of it."""

    name: str
    make: Callable[[], nn.Module]
    calibration: list[Any]
    measure: Callable[[nn.Module], dict[str, float]]
    """Its validation loss, the smaller the better, and what else is of interest."""
    unit: str


def language_model(checkpoint: Path, settings: Settings = CPU) -> Subject:
    """The demo's model, which is trained first if the checkpoint is not there."""
    if not checkpoint.exists():
        checkpoint.parent.mkdir(parents=True, exist_ok=True)
        train("tilework", settings, checkpoint)
    state = read_checkpoint(checkpoint)
    text, held_out = read_corpus()
    windows = spread(held_out, settings.windows, settings.context)
    generator = torch.Generator().manual_seed(settings.seed)
    calibration = [draw(text, 16, settings.context, generator) for _ in range(8)]

    def make() -> nn.Module:
        model = build("tilework", settings)
        model.load_state_dict(state["model"])
        return model.eval()

    @torch.no_grad()
    def measure(model: Any) -> dict[str, float]:
        losses = [
            model.validation_loss(model(tokens), model.embedding.weight, tokens)
            for tokens in torch.split(windows, settings.batch)
        ]
        return {"loss": torch.stack(losses).double().mean().item() / math.log(2)}

    return Subject("demo", make, calibration, measure, "bits per byte")


def encoder() -> Subject:
    """AntiBERTy, a BERT of 26 million parameters for the sequences of antibodies."""
    folder, germlines = _folder("antiberty"), _folder("anarci") / "germlines.py"
    weights = next(folder.glob("trained_models/*/pytorch_model.bin"))
    vocabulary = (folder / "trained_models/vocab.txt").read_text().split()
    config = json.loads((weights.parent / "config.json").read_text())
    state = torch.load(weights, map_location="cpu", weights_only=True)
    sequences = _sequences(germlines)
    kept = [one for one in sequences if zlib.crc32(one.encode()) % 4 == 0][::8]
    others = [one for one in sequences if zlib.crc32(one.encode()) % 4 != 0]
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(others), generator=generator).tolist()
    batches = [_batch([others[i] for i in order[k : k + 16]], vocabulary) for k in range(0, 32, 16)]
    held_out = [_batch(kept[k : k + 32], vocabulary) for k in range(0, len(kept), 32)]
    questions = [_masked(batch, vocabulary, generator) for batch in held_out]

    def make() -> nn.Module:
        from transformers import BertConfig, BertForMaskedLM

        model: nn.Module = BertForMaskedLM(BertConfig(**config, tie_word_embeddings=False))
        known = model.state_dict().keys()
        model.load_state_dict({key: value for key, value in state.items() if key in known})
        return model.train(False)

    exact: list[Tensor] = []

    @torch.no_grad()
    def measure(model: Any) -> dict[str, float]:
        if not exact:
            float_model: Any = make()
            exact.extend(float_model.bert(**batch).last_hidden_state for batch in held_out)
        losses, changes, total = [], 0.0, 0.0
        for batch, (masked, target), before in zip(held_out, questions, exact, strict=True):
            logits = model(**(batch | {"input_ids": masked})).logits
            losses.append(F.cross_entropy(logits.flatten(0, 1), target.flatten()))
            here = batch["attention_mask"].bool()
            after = model.bert(**batch).last_hidden_state
            changes += (after - before)[here].square().sum().item()
            total += before[here].square().sum().item()
        loss = torch.stack(losses).double().mean().item()
        return {"loss": loss, "embedding_error": math.sqrt(changes / total)}

    return Subject("encoder", make, batches, measure, "nats per masked residue")


def _folder(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(f"the package {package} is not installed: {INSTALL}")
    return Path(spec.submodule_search_locations[0])


def _sequences(germlines: Path) -> list[str]:
    """Variable domains of antibodies: each gene V of a species and chain with a gene J."""
    (value,) = (
        node.value
        for node in ast.parse(germlines.read_text()).body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "all_germlines"
    )
    genes = ast.literal_eval(value)
    found = []
    for chain in "HKL":
        for species in ("human", "mouse", "rhesus"):
            ends = list(genes["J"][chain][species].values())
            starts = genes["V"][chain][species].values()
            for index, start in enumerate(starts):
                found.append((start + ends[index % len(ends)]).replace("-", ""))
    return sorted(set(found))


def _batch(sequences: list[str], vocabulary: list[str]) -> dict[str, Tensor]:
    place = {token: index for index, token in enumerate(vocabulary)}
    rows = [
        torch.tensor(
            [place["[CLS]"], *(place.get(one, place["[UNK]"]) for one in sequence), place["[SEP]"]]
        )
        for sequence in sequences
    ]
    ids = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=place["[PAD]"])
    return {"input_ids": ids, "attention_mask": (ids != place["[PAD]"]).long()}


def _masked(
    batch: dict[str, Tensor], vocabulary: list[str], generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Residues hidden at random, and these as targets; -100 elsewhere."""
    ids = batch["input_ids"]
    is_residue = ids > vocabulary.index("[MASK]")
    hidden = is_residue & (torch.rand(ids.shape, generator=generator) < MASKED)
    return ids.masked_fill(hidden, vocabulary.index("[MASK]")), ids.masked_fill(~hidden, -100)


def quick(checkpoint: Path) -> Subject:
    """A tiny model of the demo, after a few steps."""
    settings = replace(
        CPU, steps=30, interval=30, width=64, depth=2, heads=2, context=64, windows=32
    )
    return language_model(checkpoint, settings)
