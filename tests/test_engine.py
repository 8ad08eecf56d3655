"""The engine against plain mathematics: AdamW and the moving average in float64, one process and two."""

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from stages.text import Negatives, contrast
from videodiff.config import ConfigError, build
from videodiff.errors import UserError
from videodiff.training import distributed
from videodiff.training.ema import EMA, decay_at
from videodiff.training.engine import Engine, EngineConfig

SETTINGS = {"learning_rate": 0.01, "warmup_steps": 3, "weight_decay": 0.1, "gradient_clip": 0.5, "ema_decay": 0.99}
NUM_STEPS, BATCH = 5, 8


def network() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(6, 17), nn.Tanh(), nn.Linear(17, 5), nn.Tanh(), nn.Linear(5, 3))


def trains(name: str) -> bool:
    return name != "2.weight"


def data(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(BATCH, 6, generator=generator), torch.randn(BATCH, 3, generator=generator) * 3


def reference(config: EngineConfig) -> tuple[dict[str, Tensor], dict[str, Tensor], list[float]]:
    """Weights, average and gradient norms after NUM_STEPS of AdamW (Loshchilov and Hutter, 2019), written out."""
    module = network().double()
    weights = {name: p for name, p in module.named_parameters() if trains(name)}
    average = {name: p.detach().clone() for name, p in weights.items()}
    first, second = ({name: torch.zeros_like(p) for name, p in weights.items()} for _ in range(2))
    norms = []
    for step in range(NUM_STEPS):
        inputs, targets = (x.double() for x in data(step))
        gradients = torch.autograd.grad((module(inputs) - targets).square().mean(), list(weights.values()))
        norm = math.sqrt(sum(float(g.square().sum()) for g in gradients))
        norms.append(norm)
        rate, decay = config.rate(step), min(config.ema_decay, (1 + step) / (10 + step))
        with torch.no_grad():
            for (name, p), g in zip(weights.items(), gradients, strict=True):
                g = g * min(1.0, config.gradient_clip / norm)
                p.mul_(1 - rate * config.weight_decay)
                first[name] = 0.9 * first[name] + 0.1 * g
                second[name] = 0.999 * second[name] + 0.001 * g.square()
                m, v = first[name] / (1 - 0.9 ** (step + 1)), second[name] / (1 - 0.999 ** (step + 1))
                p.sub_(rate * m / (v.sqrt() + 1e-8))
                average[name] = decay * average[name] + (1 - decay) * p
    return {name: p.detach() for name, p in weights.items()}, average, norms


def train_with(engine: Engine, config: EngineConfig) -> tuple[EMA, list[float]]:
    """NUM_STEPS on this rank's share of the same data."""
    average, norms = EMA(engine.masters()), []
    for step in range(NUM_STEPS):
        inputs, targets = data(step)
        for index in range(engine.accumulation):
            first = (index * distributed.world() + distributed.rank()) * engine.micro_batch
            own = slice(first, first + engine.micro_batch)
            loss = (engine(inputs[own].to(config.dtype)).float() - targets[own]).square().sum() / (BATCH * 3)
            engine.backward(loss * distributed.world())
        result = engine.step(config.rate(step))
        assert result.applied
        norms.append(result.grad_norm)
        average.update(engine.masters(), step, config.ema_decay)
    return average, norms


def worker(folder: str) -> None:
    """One of two ranks: each ZeRO stage in turn, gathered results to disk."""
    distributed.start()
    for stage in (0, 1, 2, 3):
        config = EngineConfig(zero_stage=stage, precision="fp32", micro_batch=2, **SETTINGS)
        engine = Engine(network(), config, trains, BATCH)
        average, norms = train_with(engine, config)
        raw, mean = engine.gather(engine.masters()), engine.gather(average.values)
        if raw is not None and mean is not None:
            save_file(raw, f"{folder}/raw-{stage}.safetensors")
            save_file(mean, f"{folder}/ema-{stage}.safetensors")
            Path(folder, f"norms-{stage}.json").write_text(json.dumps(norms))
        rows = torch.full((2, 1), float(distributed.rank()), requires_grad=True)
        gathered = distributed.gather_rows(rows)
        assert gathered.flatten().tolist() == [0, 0, 1, 1]
        (gathered * torch.arange(4.0)[:, None]).sum().backward()
        assert rows.grad is not None
        assert rows.grad.flatten().tolist() == [[0, 2], [4, 6]][distributed.rank()]  # both ranks' losses
        poison(engine)
    lost = distributed.gather_rows(told_apart(slice(3 * distributed.rank(), 3 * distributed.rank() + 3)))
    if distributed.rank() == 0:
        save_file({"lost": lost}, f"{folder}/contrast.safetensors")
    for stage in (1, 2, 3):  # offloaded, the same gradients add up over micro-steps, in fp32
        both = []
        for offload in (False, True):
            settings = {"precision": "bf16", "micro_batch": 2, "offload_optimizer": offload, **SETTINGS}
            config = EngineConfig(zero_stage=stage, **settings)
            engine = Engine(network(), config, trains, BATCH)
            both.append(train_with(engine, config)[1])
            poison(engine)
        assert both[1] == pytest.approx(both[0], rel=1e-5)
    distributed.cleanup()


def told_apart(rows: slice) -> Tensor:
    """The text stage's loss of some of six samples, of which the first three alone have wrong captions."""
    torch.manual_seed(3)
    texts, others, wrong = (F.normalize(torch.randn(6, 5), dim=1) for _ in range(3))
    negatives = Negatives(wrong[rows], torch.tensor([True, False, True, False, False, False])[rows])
    usable = torch.tensor([True, True, True, True, False, True])
    return contrast(texts[rows], others[rows], torch.tensor(5.0), usable, negatives, of_texts=True)[0]


def poison(engine: Engine) -> None:
    """A gradient that is not finite on the last rank alone: no rank moves, and the next step is sound again."""
    before = [master.clone() for master in engine.masters()]
    for index in range(engine.accumulation):
        bad = distributed.rank() == distributed.world() - 1 and index == 0
        engine.backward(engine(torch.ones(2, 6).to(engine.config.dtype)).sum() * (math.nan if bad else 1.0))
    result = engine.step(0.1)
    assert not result.applied
    assert all(torch.equal(a, b) for a, b in zip(before, engine.masters(), strict=True))
    for _ in range(engine.accumulation):
        engine.backward(engine(torch.ones(2, 6).to(engine.config.dtype)).sum())
    result = engine.step(0.1)
    assert result.applied
    assert math.isfinite(result.grad_norm)
    assert all(master.isfinite().all() for master in engine.masters())


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_one_process_follows_adamw_and_the_average_in_float64(stage: int) -> None:
    config, linear = EngineConfig(zero_stage=stage, precision="fp32", micro_batch=4, **SETTINGS), nn.functional.linear
    engine = Engine(network(), config, trains, BATCH)
    assert engine.accumulation == 2
    average, norms = train_with(engine, config)
    check(engine.gather(engine.masters()), engine.gather(average.values), norms, config)
    poison(engine)
    engine.close()
    assert nn.functional.linear is linear  # DeepSpeed puts its own there for good


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_what_a_step_does_not_use_decays_as_if_its_gradient_were_zero(stage: int) -> None:
    module = nn.ModuleDict({"used": nn.Linear(6, 3), "unused": nn.Linear(6, 3)})
    module.forward = module["used"].forward  # type: ignore[method-assign]
    before = module["unused"].weight.detach().clone()
    engine = Engine(module, EngineConfig(zero_stage=stage, precision="fp32", weight_decay=0.5), lambda name: True, 2)
    engine.backward(engine(torch.ones(2, 6)).sum())
    assert engine.step(0.1).applied
    state = engine.gather(engine.masters())
    assert state is not None
    torch.testing.assert_close(state["unused.weight"], before * (1 - 0.1 * 0.5))
    engine.close()


@pytest.mark.parametrize("settings", [{}, {"accumulation_dtype": "bf16"}, {"offload_optimizer": True}])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_skipped_step_leaves_nothing_behind(stage: int, settings: dict) -> None:
    """DeepSpeed has another optimizer, or other buffers, for each of these."""
    config = EngineConfig(zero_stage=stage, precision="bf16", **settings, **SETTINGS)
    engine = Engine(network(), config, trains, 2)
    for _ in range(2):
        poison(engine)
    engine.close()


@pytest.mark.slow
def test_a_compiled_network_follows_them_too() -> None:
    config = EngineConfig(zero_stage=1, precision="fp32", compiled_network=True, **SETTINGS)
    engine = Engine(network(), config, trains, BATCH)
    average, norms = train_with(engine, config)
    check(engine.gather(engine.masters()), engine.gather(average.values), norms, config)
    engine.close()


def test_two_processes_follow_them_too(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=0"]
    command += ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", __file__, str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_EXTENSIONS_DIR": str(tmp_path / "extensions")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert not (tmp_path / "extensions").exists()  # nothing was compiled
    lost = load_file(tmp_path / "contrast.safetensors")["lost"]
    torch.testing.assert_close(lost, told_apart(slice(0, 6)))
    for stage in (0, 1, 2, 3):
        raw, average = (load_file(tmp_path / f"{name}-{stage}.safetensors") for name in ("raw", "ema"))
        norms = json.loads((tmp_path / f"norms-{stage}.json").read_text())
        check(raw, average, norms, EngineConfig(zero_stage=stage, precision="fp32", **SETTINGS))


def check(raw: dict[str, Tensor] | None, average: dict[str, Tensor] | None, norms: list[float], config) -> None:
    weights, mean, true_norms = reference(config)
    assert raw is not None
    assert average is not None
    assert raw.keys() == average.keys() == weights.keys()  # the frozen one is not among them
    for name in weights:
        torch.testing.assert_close(raw[name].double(), weights[name], rtol=0, atol=3e-6)
        torch.testing.assert_close(average[name].double(), mean[name], rtol=0, atol=3e-6)
    assert norms == pytest.approx(true_norms, rel=1e-4)


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_bf16_keeps_masters_moments_and_accumulation_in_fp32(stage: int, offload: bool) -> None:
    settings = {"micro_batch": 1, "learning_rate": 0.01, "gradient_clip": 0, "offload_optimizer": offload}
    config = EngineConfig(zero_stage=stage, precision="bf16", **settings)
    module = network()
    start = {name: p.detach().clone() for name, p in module.named_parameters()}
    engine = Engine(module, config, trains, 64)
    state = engine.gather(engine.masters())
    assert state is not None
    assert all(torch.equal(state[name], start[name]) for name in state)  # not rounded to bf16 on the way in
    assert all(p.dtype == torch.bfloat16 for p in module.parameters())
    # 1 + 63 gradients of 1/512 each: in bf16 every one of them would be lost beside the 1.
    for index in range(64):
        output = engine(torch.zeros(1, 6, dtype=torch.bfloat16))
        engine.backward(output[0, 0].float() * (1.0 if index == 0 else 1 / 512))
    norm = engine.step(0.01).grad_norm
    ratio = 1 + 63 / 512
    clean = network().bfloat16()
    clean(torch.zeros(1, 6, dtype=torch.bfloat16))[0, 0].backward()
    gradients = [p.grad.float() for name, p in clean.named_parameters() if trains(name) and p.grad is not None]
    assert norm == pytest.approx(ratio * math.sqrt(sum(float(g.square().sum()) for g in gradients)), rel=2e-3)
    engine.close()


def test_stages_1_and_2_are_for_several_ranks_unless_something_needs_them() -> None:
    given = [{"zero_stage": 1}, {"zero_stage": 2}, {"zero_stage": 3}, {"zero_stage": 1, "precision": "bf16"}]
    given += [{"zero_stage": 2, "offload_optimizer": True}]
    configs = [EngineConfig(**{"precision": "fp32", **settings}) for settings in given]
    assert [config.on(1).zero_stage for config in configs] == [0, 0, 3, 1, 2]
    assert [config.on(2) for config in configs] == configs


def test_average_is_fp32_and_moves_at_high_decay() -> None:
    value = EMA([torch.tensor([0.5])])
    for step in range(1_000_000, 1_010_000):
        value.update([torch.tensor([1.0])], step, 0.9999)
    assert value.values[0].item() == pytest.approx(1 - 0.5 * 0.9999**10_000, abs=1e-4)
    assert [decay_at(0, 0.99), decay_at(10**6, 0.99)] == [0.1, 0.99]


def test_learning_rate_is_a_function_of_the_step() -> None:
    config = EngineConfig(learning_rate=1.0, warmup_steps=4, decay="cosine", decay_steps=12)
    assert [config.rate(step) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]
    assert [config.rate(step) for step in (4, 8, 12, 99)] == pytest.approx([1.0, 0.5, 0.0, 0.0])
    assert EngineConfig(learning_rate=0.5).rate(0) == EngineConfig(learning_rate=0.5).rate(10**9) == 0.5


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"zero_stage": 0}, "needs zero_stage 1, 2 or 3"),
        ({"zero_stage": 4}, "zero_stage"),
        ({"decay": "cosine"}, "decay_steps"),
        ({"decay_steps": 3}, "decay_steps"),
        ({"betas": [0.9, 1.0]}, "betas"),
        ({"micro_batch": 0}, "micro_batch"),
        ({"compiled_network": True, "zero_stage": 3}, "compiled_network"),
    ],
)
def test_settings_that_do_not_fit_are_refused(values: dict, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        build(EngineConfig, values, "engine.yaml")


def test_the_global_batch_must_divide() -> None:
    assert EngineConfig(micro_batch=2).shares(16, 2) == (2, 4)
    assert EngineConfig().shares(16, 2) == (8, 1)
    with pytest.raises(UserError, match=r"batch_size=9 .* 2 processes"):
        EngineConfig().shares(9, 2)
    with pytest.raises(UserError, match="micro_batch=3 does not divide the 8"):
        EngineConfig(micro_batch=3).shares(16, 2)


def test_a_module_without_anything_to_train_is_refused() -> None:
    with pytest.raises(UserError, match="no parameter"):
        Engine(network(), EngineConfig(), lambda name: False, 4)


def test_fp16_is_refused_on_a_cpu() -> None:
    if distributed.device().type != "cpu":
        pytest.skip("this machine has a GPU")
    with pytest.raises(UserError, match="use bf16 or fp32"):
        Engine(network(), EngineConfig(precision="fp16"), trains, 4)


def test_the_gpu_of_a_process() -> None:
    assert [distributed.device_index(rank, 4) for rank in range(4)] == [0, 1, 2, 3]
    assert distributed.device_index(3, 1) == 0  # a launcher that shows each task its own GPU alone
    with pytest.raises(UserError, match="LOCAL_RANK=2 but this process sees 2 GPUs; start at most 2"):
        distributed.device_index(2, 2)


def test_slurm_tasks_that_know_nothing_of_one_another_are_refused() -> None:
    code = "from videodiff.training import distributed\ndistributed.start()\nprint(distributed.world())"
    known = {name: value for name, value in os.environ.items() if name not in distributed.LAUNCHER_VARIABLES}

    def start(**variables: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", code]
        return subprocess.run(command, env=known | variables, capture_output=True, text=True, check=False)

    done = start(SLURM_NTASKS="2", SLURM_PROCID="1")
    assert done.returncode
    assert "Slurm started 2 tasks" in done.stderr
    assert "slurm/train.sbatch, or export RANK, WORLD_SIZE" in done.stderr
    assert start(SLURM_NTASKS="1", SLURM_PROCID="0").stdout == "1\n"


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"RANK": "1"}, "RANK=1 but WORLD_SIZE is not set, each rank would work alone"),
        ({"WORLD_SIZE": "2", "RANK": "1"}, "WORLD_SIZE is set but LOCAL_RANK, MASTER_ADDR, MASTER_PORT is not"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE='two' is no number in 1.."),
        ({"RANK": ""}, "RANK='' is no number in 0..1"),  # as where SLURM_PROCID is not set
        ({"RANK": "2"}, "RANK='2' is no number in 0..1"),
        ({"MASTER_PORT": "70000"}, "MASTER_PORT='70000' is no number in 1..65535"),
    ],
)
def test_variables_of_a_launcher_that_can_not_be(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], words: str
) -> None:
    sound = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    few = "RANK" in variables and variables["RANK"] == "1"
    for name in sound:
        monkeypatch.delenv(name, raising=False)
    for name, value in (variables if few else sound | variables).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(distributed.dist, "is_initialized", lambda: False)
    with pytest.raises(UserError, match=re.escape(words)):
        distributed.start()


if __name__ == "__main__":
    worker(sys.argv[1])
