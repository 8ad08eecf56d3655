"""The race of the networks runs every line, on small ones."""

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from benchmarks import network as bench
from benchmarks.timing import flops


def test_attention_is_counted_as_the_products_it_is_made_of() -> None:
    heads, queries, keys, width = 2, 16, 8, 4
    q, k, v = (torch.randn(1, heads, n, width, requires_grad=True) for n in (queries, keys, keys))
    products = 2 * (2 * heads * queries * keys * width)
    assert flops(lambda: F.scaled_dot_product_attention(q, k, v).detach()) == products
    assert flops(lambda: F.scaled_dot_product_attention(q, k, v).sum().backward()) == 3 * products
    assert flops(lambda: nn.Linear(5, 7)(torch.ones(3, 5))) == 2 * 3 * 5 * 7


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "WIDTHS": (64, 64, 64, 64), "CROSS": 32, "TOKENS": 5, "FRAMES": 2, "SIDE": {"image": 16, "video": 8},
        "BATCHES": (1,), "MATRIX": {"cpu": 64, "cuda": 64}, "SAMPLER_STEPS": 2,
    }.items():  # fmt: skip
        monkeypatch.setattr(bench, name, value)


@pytest.mark.usefixtures("small")
def test_both_sides_have_the_same_weights_and_give_the_same() -> None:
    setting = (1, "float32", False, "cpu", False)
    bench._agree(bench.call_of("ours image", *setting)(), bench.call_of("UNet2DConditionModel", *setting)())
    with pytest.raises(RuntimeError, match="the race is void"):
        bench._agree(torch.ones(3), torch.tensor([1.0, 1.0, 1.001]))


@pytest.mark.usefixtures("small")
def test_every_case_writes_its_rows(tmp_path: Path) -> None:
    out = tmp_path / "speed.md"
    bench.main(bench.parsed(["--pairs", "1", "--out", str(out)]))
    text = out.read_text()
    for name in ("UNet2DConditionModel", "UNet3DConditionModel", "UNetMotionModel"):
        rows = [line.split("|") for line in text.splitlines() if line.startswith(f"| {name}")]
        assert {row[4].strip() for row in rows} == {"forward", "forward + backward"}
        assert {row[2].strip() for row in rows} == {"float32", "bfloat16"}
    cells = [[cell.strip() for cell in line.split("|")] for line in text.splitlines()]
    evaluations = {row[1]: int(row[2]) for row in cells if len(row) == 7 and row[2].isdigit()}
    assert evaluations["DDIM"] == 2
    assert evaluations["Heun"] == 3  # its last step needs one only
