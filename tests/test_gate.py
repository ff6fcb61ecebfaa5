"""The example that trains gates."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

EXAMPLES = Path(__file__).parent.parent / "examples"
ENVIRONMENT = {"COLUMNS": "300", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
CHOICES = [
    "all",
    "the true map",
    "trained gate",
    "untrained gate",
    "window",
    "window and first block",
]

# Some seconds each: a process imports torch and trains a small model and its gates.
pytestmark = pytest.mark.untyped


def run(*arguments: str | Path) -> tuple[int, str]:
    process = subprocess.run(
        [sys.executable, EXAMPLES / "gate", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | ENVIRONMENT,
        timeout=300,
    )
    return process.returncode, process.stdout


def results(out: Path) -> dict[str, dict[str, Any]]:
    return {row["blocks"]: row for row in json.loads((out / "results.json").read_text())}


def conclusion(rows: dict[str, dict[str, Any]]) -> str:
    """What the rows say of the gate, in the words of the last line."""
    gate = rows["trained gate"]
    most = max((rows[name] for name in CHOICES[3:]), key=lambda row: row["recall"])
    least = min((rows[name] for name in CHOICES[3:]), key=lambda row: row["bits"])
    more = "more" if gate["recall"] > most["recall"] else "NO MORE"
    lower = "lower" if gate["bits"] < least["bits"] else "NO LOWER"
    over = [f"{row['bits'] - rows['all']['bits']:+.4f}" for row in (gate, least)]
    return (
        f"The trained gate recalls {more} than the best of the others ({gate['recall']:.3f}, "
        f"{most['blocks']} {most['recall']:.3f}); its loss over dense is {lower} than theirs "
        f"({over[0]}, {least['blocks']} {over[1]} bits per byte)."
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder and the output of a run."""
    out = tmp_path_factory.mktemp("gate")
    code, output = run("--quick", "--out", out)
    assert code == 0, output
    return out, output


def test_shows_the_table_and_writes_its_files(finished: tuple[Path, str]) -> None:
    out, output = finished
    rows = results(out)
    assert list(rows) == CHOICES
    for name, row in rows.items():
        shown = next(line for line in output.splitlines() if line.startswith(f"│ {name} "))
        density, recall, bits, over = (float(cell) for cell in shown.split("│")[2:-1])
        assert (density, recall) == (round(row["density"], 3), round(row["recall"], 3))
        assert bits == round(row["bits"], 4)
        assert over == pytest.approx(row["bits"] - rows["all"]["bits"], abs=6e-5)
        assert bits < 6, "a model that has learned nothing needs 8 bits"
    assert output.splitlines()[-1] == conclusion(rows)
    assert re.findall(r"^gates: (\d+)/40 steps", output, re.MULTILINE) == ["10", "20", "30", "40"]
    gates = torch.load(out / "gates.pt", weights_only=True)
    assert [list(state) for state in gates] == [["q_weight", "k_weight"]] * 2


def test_choices_are_of_one_size_and_the_gate_beats_the_others(finished: tuple[Path, str]) -> None:
    rows = results(finished[0])
    sparse = [rows[name] for name in CHOICES[1:]]
    assert len({round(row["density"], 6) for row in sparse}) == 1
    assert sparse[0]["density"] == pytest.approx(0.1, abs=0.02)
    recall = {name: row["recall"] for name, row in rows.items()}
    assert recall["the true map"] >= recall["trained gate"]
    for other in CHOICES[3:]:
        assert recall["trained gate"] > 1.2 * recall[other]
    assert rows["trained gate"]["bits"] < rows["untrained gate"]["bits"]


def test_only_the_gates_are_trained(
    finished: tuple[Path, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(EXAMPLES / "demo")
    monkeypatch.syspath_prepend(EXAMPLES / "gate")
    import gated
    from model import GPT, PARTS

    torch.manual_seed(0)
    model = GPT(16, 2, 2, 32, PARTS["tilework"])
    tokens = torch.randint(256, (2, 32))
    plain = model(tokens)
    modules = gated.add_gates(model, 8)
    torch.testing.assert_close(model(tokens), plain)
    wanted = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert wanted == {
        f"blocks.{layer}.attention.gate.{name}_weight" for layer in (0, 1) for name in "qk"
    }
    for attend in (gated.distill, gated.soft):
        for module in modules:
            module.attend = attend
        hidden = model(tokens)
        if attend is gated.distill:
            torch.testing.assert_close(hidden, plain)
            loss = torch.stack([module.loss for module in modules]).sum()
        else:
            assert not torch.allclose(hidden, plain)
            loss = model.loss(hidden, model.embedding.weight, tokens)
        model.zero_grad()
        loss.backward()
        for name, weight in model.named_parameters():
            assert (weight.grad is not None and bool(weight.grad.any())) == (name in wanted)
    # A selection of everything is dense attention.
    for module in modules:
        module.attend = gated.sparse(
            lambda module, heads: gated.most_scored(module.gate(heads.query, heads.key), 8, 1.0)
        )
    torch.testing.assert_close(model(tokens), plain)


def test_the_loss_of_the_model_trains_gates_too(finished: tuple[Path, str]) -> None:
    """Through a soft bias; the model of the run before is used again."""
    out = finished[0]
    model = (out / "model.pt").read_bytes()
    before = results(out)
    code, output = run("--quick", "--out", out, "--objective", "soft")
    assert code in (0, 1), output
    assert (out / "model.pt").read_bytes() == model
    after = results(out)
    for name in CHOICES:
        assert (after[name] == before[name]) == (name != "trained gate")
    assert after["trained gate"]["bits"] < after["untrained gate"]["bits"]


def test_the_conclusion_is_what_the_rows_say(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    monkeypatch.syspath_prepend(EXAMPLES / "demo")
    monkeypatch.syspath_prepend(EXAMPLES / "gate")
    import experiment

    for recall, bits, code in ((0.6, 2.0, 0), (0.6, 2.3, 0), (0.3, 2.0, 1)):
        values = dict.fromkeys(CHOICES, (0.4, 2.2)) | {"trained gate": (recall, bits)}
        values |= {"all": (1.0, 1.9), "window": (0.5, 2.1)}
        rows = {
            name: {"blocks": name, "density": 0.1, "recall": value[0], "bits": value[1]}
            for name, value in values.items()
        }
        if code:
            with pytest.raises(experiment.typer.Exit):
                experiment.report(list(rows.values()), 0.9)
        else:
            experiment.report(list(rows.values()), 0.9)
        assert capsys.readouterr().out.splitlines()[-1] == conclusion(rows)


def test_bad_options_are_named_in_one_line() -> None:
    for arguments, message in (
        (("--objective", "rank"), "--objective must be one of distill, soft, got rank"),
        (("--sparsity", "1.0"), "--sparsity must be above 0 and below 1, got 1.0"),
    ):
        code, output = run(*arguments)
        assert code == 2
        assert output == f"gate: {message}\n"
