"""A run goes on with another number of ranks and another ZeRO stage: the same state, samples and curve."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from test_engine import BATCH, SETTINGS, network, train_with, trains
from test_trainer import launch, lines
from tiny_training import TinyConfig, run_tiny, tiny

from videodiff.errors import UserError
from videodiff.training.engine import Engine, EngineConfig
from videodiff.training.fragments import Fragments

STEPS = 6


def state(folder: Path) -> dict[tuple[str, str], torch.Tensor]:
    """Weights, moments and average by name."""
    fragments = Fragments(folder / "engine")
    return {key: fragments.read(*key, 0, fragments.size(*key)) for key in fragments.contents}


def assert_equal_states(one: Path, other: Path) -> None:
    a, b = state(one), state(other)
    assert a.keys() == b.keys()
    assert {kind for kind, _ in a} == {"master", "average", "exp_avg", "exp_avg_sq"}
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert Fragments(one / "engine").counters == Fragments(other / "engine").counters


@pytest.mark.parametrize("first", [0, 1, 2, 3])
def test_every_zero_stage_goes_on_from_every_other(tmp_path: Path, first: int) -> None:
    config = EngineConfig(zero_stage=first, precision="fp32", micro_batch=4, **SETTINGS)
    engine = Engine(network(), config, trains, BATCH)
    average, _ = train_with(engine, config)
    engine.save(tmp_path / "first", average.values)
    going_on, norms = [], []
    for stage in (0, 1, 2, 3):
        config = EngineConfig(zero_stage=stage, precision="fp32", micro_batch=4, **SETTINGS)
        again = Engine(network(), config, trains, BATCH, resume=tmp_path / "first")
        values = [torch.zeros_like(master) for master in again.masters()]
        again.load_average(tmp_path / "first", values)
        again.save(tmp_path / f"again-{stage}", values)
        assert_equal_states(tmp_path / "first", tmp_path / f"again-{stage}")
        norms.append(train_with(again, config)[1])
        going_on.append(again.gather(again.masters()))
        again.close()
    engine.close()
    for after, norm in zip(going_on, norms, strict=True):
        assert norm == pytest.approx(norms[0], rel=1e-5)
        for name in after:
            torch.testing.assert_close(after[name], going_on[0][name], rtol=0, atol=1e-6)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_bf16_parameters_follow_the_masters_of_another_stage(tmp_path: Path, stage: int) -> None:
    config = EngineConfig(zero_stage=2, precision="bf16", **SETTINGS)
    engine = Engine(network(), config, trains, BATCH)
    average, _ = train_with(engine, config)
    engine.save(tmp_path, average.values)
    again = Engine(network(), config.model_copy(update={"zero_stage": stage}), trains, BATCH, resume=tmp_path)
    masters = again.gather(again.masters())
    inputs = torch.ones(2, 6, dtype=torch.bfloat16)
    expected = network()
    expected.load_state_dict(masters, strict=False)
    assert torch.equal(again(inputs), expected.bfloat16()(inputs))
    assert torch.equal(again(inputs), engine(inputs))
    again.close()
    engine.close()


@pytest.mark.parametrize("settings", [{"offload_optimizer": True}, {"accumulation_dtype": "bf16"}])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_offloaded_and_in_bf16_it_goes_on_exactly(tmp_path: Path, stage: int, settings: dict[str, Any]) -> None:
    """DeepSpeed has other optimizers for these: ten steps are five, a file and five."""
    config = EngineConfig(zero_stage=stage, precision="bf16", **settings, **SETTINGS)
    straight = Engine(network(), config, trains, BATCH)
    average, _ = train_with(straight, config)
    straight.save(tmp_path, average.values)
    again = Engine(network(), config, trains, BATCH, resume=tmp_path)
    norms = [train_with(engine, config)[1] for engine in (straight, again)]
    assert norms[0] == norms[1]
    one, other = (engine.gather(engine.masters()) for engine in (straight, again))
    assert all(torch.equal(one[name], other[name]) for name in one)
    straight.close()
    again.close()


def run_with(folder: Path, steps: int, stage: int) -> TinyConfig:
    settings: dict[str, Any] = {"zero_stage": stage, "precision": "fp32", "learning_rate": 0.01, "micro_batch": 2}
    return tiny(folder, run__steps=steps, run__save_every=2, run__keep_last=9, dropout=0.0, engine=settings)


def test_another_number_of_ranks_goes_on_with_the_same_curve(tmp_path: Path) -> None:
    """2 -> 1, 1 -> 2 and 2 -> 4 ranks, ZeRO 1, 2, 3: what one process alone does in one go."""
    straight = run_with(tmp_path / "straight", STEPS, 1)
    run_tiny(straight)
    curve = [line["loss"] for line in lines(straight)]
    stages = (1, 2, 3)
    runs = {name: [tmp_path / f"{name}-{stage}" for stage in stages] for name in ("2-1", "1-2", "2-4")}

    def begin(names: tuple[str, ...], steps: int) -> list[TinyConfig]:
        return [run_with(runs[name][i], steps, stage) for name in names for i, stage in enumerate(stages)]

    for config in begin(("1-2",), 2):
        run_tiny(config)
    launch(*begin(("2-1", "2-4"), 2), *begin(("1-2",), STEPS), ranks=2)
    for config in begin(("2-1",), STEPS):
        run_tiny(config)
    output = launch(*begin(("2-4",), STEPS), ranks=4)
    assert "resumed after step 2" in output
    assert "4 processes x 1 x 2 samples" in output
    for config in begin(("2-1", "1-2", "2-4"), STEPS):
        assert [line["samples"] for line in lines(config)] == [line["samples"] for line in lines(straight)]
        assert [line["loss"] for line in lines(config)] == pytest.approx(curve, rel=1e-5)
        checkpoint = Path(config.run.dir, "checkpoints")
        files = len(list((checkpoint / f"step-{STEPS:08d}/engine").iterdir()))
        assert files == {"2-1": 1, "1-2": 2, "2-4": 4}[checkpoint.parent.name[:3]]
        assert json.loads((checkpoint / f"step-{STEPS:08d}/state.json").read_text())["step"] == STEPS
        one, other = (
            state(checkpoint / f"step-{STEPS:08d}"),
            state(Path(straight.run.dir, f"checkpoints/step-{STEPS:08d}")),
        )
        assert one.keys() == other.keys()  # weights, both moments, the average
        for key in one:
            torch.testing.assert_close(one[key], other[key], rtol=1e-4, atol=1e-6)


def test_a_checkpoint_of_another_network_is_refused(tmp_path: Path) -> None:
    config = EngineConfig(precision="fp32", zero_stage=1)
    engine = Engine(network(), config, trains, BATCH)
    engine.save(tmp_path)
    engine.close()
    wider = network()
    wider[4] = torch.nn.Linear(5, 4)
    with pytest.raises(UserError, match=r"another network's state, 4\.bias has 3 values there, 4 here"):
        Engine(wider, config, trains, BATCH, resume=tmp_path)
