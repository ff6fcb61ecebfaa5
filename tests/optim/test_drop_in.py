"""Optimizers in the places where people use torch's, unchanged."""

from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
import transformers
from torch import Tensor, nn

from tilework.optim import AdamW, Lion

import samples
from optim.samples import Optimized


class Regression(nn.Module):
    """What transformers' trainer can train: it returns a loss."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)

    def forward(self, input: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return {"loss": (self.linear(input) - labels).square().mean()}


def data() -> list[dict[str, Tensor]]:
    return [{"input": torch.randn(3), "labels": torch.randn(2)} for _ in range(8)]


def train(
    model: nn.Module, optimizer: Any, batches: Any, folder: Path, steps: int, resume: bool = False
) -> None:
    """With a schedule, to some step, from the checkpoint of step 5 if told so."""
    arguments = transformers.TrainingArguments(
        folder,
        max_steps=steps,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        save_steps=5,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        logging_strategy="no",
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step)
    trainer = transformers.Trainer(
        model, arguments, train_dataset=batches, optimizers=(optimizer, schedule)
    )
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-5") if resume else None)


@pytest.mark.untyped
@pytest.mark.parametrize("kind", [AdamW, Lion])
def test_trainer(tmp_path: Path, kind: Any) -> None:
    """Ten steps of transformers' trainer, from a checkpoint in the middle, are as in one go."""
    batches, ends = data(), []
    for resumed in (False, True):
        torch.manual_seed(0)
        model = Regression()
        optimizer = kind(model.parameters(), lr=0.05)
        folder = tmp_path / str(resumed)
        if resumed:
            train(model, optimizer, batches, folder, 5)
            torch.nn.init.zeros_(model.linear.weight)  # the checkpoint has the right one
            optimizer = kind(model.parameters(), lr=0.05)
        train(model, optimizer, batches, folder, 10, resumed)
        ends.append(model.linear.weight.detach().clone())
    assert torch.equal(*ends)


@pytest.mark.untyped
@samples.every(Optimized, lambda sample: not sample.takes_loss)
def test_accelerate(sample: Optimized) -> None:
    """Its wrapper accumulates gradients, and passes everything on."""
    torch.manual_seed(0)
    ends = []
    for wrapped in (False, True):
        torch.manual_seed(0)
        parameters = sample.parameters()
        optimizer = sample.function(parameters, **sample.accepts)
        if wrapped:
            accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
            optimizer = accelerator.prepare(optimizer)
        for step in range(4):
            loss = sum((p * torch.randn(p.shape)).sum() for p in parameters)
            if wrapped:
                with accelerator.accumulate():
                    accelerator.backward(loss)
                    optimizer.step()
                    optimizer.zero_grad()
            else:
                (loss / 2).backward()  # type: ignore[union-attr]
                if step % 2:
                    optimizer.step()
                    optimizer.zero_grad()
        ends.append([p.detach().clone() for p in parameters])
    for one, other in zip(*ends, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
