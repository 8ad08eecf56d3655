"""`videodiff plan` against what really happens: counted operations, kept bytes, what DeepSpeed holds; and the paper."""

import gc
import json
import os
import subprocess
import sys
import weakref
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from stages.cli import main
from stages.plan import SIZE, communication, host, plan, states
from videodiff.batch import Condition
from videodiff.errors import UserError
from videodiff.model import Model
from videodiff.networks.unet import TemporalConfig, UNet, UNetConfig, is_temporal
from videodiff.networks.work import count
from videodiff.training import distributed
from videodiff.training.ema import EMA
from videodiff.training.engine import Engine, EngineConfig
from videodiff.training.engine_config import bucket
from videodiff.training.gpus import GPUS, by_device_name

ROOT = Path(__file__).resolve().parents[1]
EMU = ("image", "video_256", "video_512", "video_512_16", "finetune", "interpolation")
TOKENS = 77


def network(temporal: bool, frozen: bool, device: str = "cpu") -> UNet:
    torch.manual_seed(0)
    with torch.device(device):
        made = UNet(
            UNetConfig(
                channels=4,
                model_channels=64,
                channel_mult=(1, 2),
                num_res_blocks=1,
                attention_levels=(True, True),
                head_channels=32,
                context_dims=(48,),
                pooled_dim=40,
                known_channels=temporal,
                temporal=TemporalConfig() if temporal else None,
            )
        )
    for name, parameter in made.named_parameters():
        parameter.requires_grad_(not frozen or is_temporal(name))
    return made


def run(made: UNet, frames: int, side: int) -> torch.Tensor:
    x = torch.randn(1, 4, frames, side, side)
    known = {"known": x, "known_mask": torch.ones(1, 1, frames, side, side)} if made.config.known_channels else {}
    condition = Condition(
        (torch.randn(1, TOKENS, 48),), (torch.ones(1, TOKENS, dtype=torch.bool),), torch.randn(1, 40),
        fps=torch.ones(1), **known,
    )  # fmt: skip
    return made(x, torch.ones(1), condition)


@pytest.mark.parametrize(("temporal", "frozen", "frames"), [(False, False, 1), (True, False, 6), (True, True, 6)])
def test_operations_are_those_of_a_real_pass(temporal: bool, frozen: bool, frames: int) -> None:
    """Within 2 % of what torch counts in a real forward and backward pass."""
    work = count(network(temporal, frozen, "meta"), frames, 16, 16, torch.float32)
    made = network(temporal, frozen)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        with FlopCounterMode(display=False) as counter:
            out = run(made, frames, 16)
        assert work.forward == pytest.approx(counter.get_total_flops(), rel=0.02)
        with FlopCounterMode(display=False) as counter:
            out.sum().backward()
        assert work.backward == pytest.approx(counter.get_total_flops(), rel=0.02)


@pytest.mark.parametrize(("temporal", "frozen", "frames"), [(False, False, 1), (True, False, 6), (True, True, 6)])
def test_activations_are_what_autograd_keeps(temporal: bool, frozen: bool, frames: int) -> None:
    work = count(network(temporal, frozen, "meta"), frames, 16, 16, torch.float32)
    made, kept = network(temporal, frozen), {}
    weights = {parameter.untyped_storage().data_ptr() for parameter in made.parameters()}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = (tensor, storage.nbytes())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        run(made, frames, 16)
    assert work.kept == pytest.approx(sum(size for _, size in kept.values()), rel=0.15)


class LiveBytes(TorchDispatchMode):
    """The most bytes that what is computed takes at any one time, the given parameters' left out."""

    def __init__(self, parameters: Iterable[torch.Tensor]) -> None:
        super().__init__()
        self.peak = self._now = 0
        self._live: dict[int, int] = {}
        self._own = {parameter.untyped_storage().data_ptr() for parameter in parameters}

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        out = function(*arguments, **(options or {}))
        for made in tree_leaves(out):
            if not isinstance(made, torch.Tensor):
                continue
            storage = made.untyped_storage()
            if storage.data_ptr() not in self._own and storage._cdata not in self._live:
                self._live[storage._cdata] = storage.nbytes()
                self._now += storage.nbytes()
                self.peak = max(self.peak, self._now)
                weakref.finalize(storage, self._gone, storage._cdata)
        return out

    def _gone(self, storage: int) -> None:
        self._now -= self._live.pop(storage, 0)


@pytest.mark.parametrize(("temporal", "frames"), [(False, 1), (True, 6)])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_activations_are_the_peak_of_a_real_step(temporal: bool, frames: int, checkpointing: bool) -> None:
    """Under activation checkpointing too, where a block at a time is whole in the backward pass."""
    planned, made = network(temporal, False, "meta"), network(temporal, False)
    planned.checkpointing = made.checkpointing = checkpointing
    for parameter in made.parameters():  # gradients are counted apart, with the states
        parameter.register_post_accumulate_grad_hook(lambda parameter: setattr(parameter, "grad", None))
    with LiveBytes(made.parameters()) as live:
        run(made, frames, 32).sum().backward()
    assert count(planned, frames, 32, 32, torch.float32).kept == pytest.approx(live.peak, rel=0.15)
    assert planned.checkpointing == checkpointing


def held_bytes() -> int:
    """Of all tensors of this process, each storage once."""
    gc.collect()
    storages = {}
    for found in gc.get_objects():
        if isinstance(found, torch.Tensor) and found.device.type != "meta":
            storage = found.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def measure(stage: int, precision: str, offload: bool) -> None:
    """One rank: the most that the engine and the average hold between two backward passes of a step, in bytes."""
    distributed.start()
    config = EngineConfig(zero_stage=stage, precision=precision, micro_batch=2, offload_optimizer=offload)
    layers = nn.Sequential(*[nn.Linear(512, 512) for _ in range(9)])
    engine = Engine(layers, config, lambda name: not name.startswith("0."), 4 * distributed.world())
    engine._original = None  # rank 0's copy for export, in the CPU's memory
    average = EMA(engine.masters())
    inputs = torch.randn(2, 512).to(config.dtype)
    for step in range(2):
        held = 0
        for _ in range(engine.accumulation):
            engine.backward(engine(inputs).float().square().mean())
            held = max(held, held_bytes())
        if step == 0:  # the moments are made by it
            engine.step(1e-4)
    layer = 512 * 513
    wanted = states(9 * layer, 8 * layer, distributed.world(), config, stage)
    wanted += host(9 * layer, 8 * layer, distributed.world(), config, stage)  # here it is all one memory
    if stage == 3:  # of its buffers one is made once and stays
        wanted += SIZE[config.communication_dtype] * bucket(8 * layer)
    if distributed.rank() == 0:
        print(json.dumps({"held": held, "wanted": wanted, "average": len(average.values)}), flush=True)
    distributed.cleanup()


@pytest.mark.parametrize(
    ("stage", "precision", "offload"),
    [
        (0, "fp32", ""), (1, "fp32", ""), (2, "fp32", ""), (3, "fp32", ""), (1, "bf16", ""), (2, "bf16", ""),
        (3, "bf16", ""), (2, "fp32", "offload"), (1, "bf16", "offload"), (2, "bf16", "offload"), (3, "bf16", "offload"),
    ],
)  # fmt: skip
def test_states_are_what_the_engine_holds(stage: int, precision: str, offload: str) -> None:
    """Two ranks: within 10 % of the formula, gradients and the average among it, and what is offloaded."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--rdzv-backend=c10d"]
    command += ["--rdzv-endpoint=localhost:0", __file__, str(stage), precision, offload]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))
    assert found["held"] == pytest.approx(found["wanted"], rel=0.1)


def test_formulas() -> None:
    """Rajbhandari et al., 2020, figure 1: 7.5 B parameters in half precision on 64 GPUs, without our average."""
    config = EngineConfig(precision="bf16", accumulation_dtype="bf16")
    number = 7_500_000_000
    for stage, published in ((1, 31.4e9), (2, 16.6e9), (3, 1.9e9)):
        assert states(number, number, 64, config, stage) - 4 * number / 64 == pytest.approx(published, rel=0.02)
    assert communication(8, 8, 4, EngineConfig(precision="fp32", zero_stage=0), 0) == 2 * 8 * 4 * 3 / 4
    assert communication(8, 8, 4, EngineConfig(precision="bf16", communication_dtype="bf16"), 2) == 2 * 2 * 8 * 3 / 4
    assert communication(8, 8, 4, EngineConfig(precision="bf16", communication_dtype="bf16"), 2, 3) == 4 * 2 * 8 * 3 / 4
    offloaded = EngineConfig(precision="bf16", zero_stage=3, offload_optimizer=True, offload_parameters=True)
    assert states(100, 80, 4, offloaded, 3) == 0
    assert host(100, 80, 4, offloaded, 3) == (4 + 8 + 4 + 4 + 4) * 80 / 4 + 2 * 100 / 4


def test_gpus_are_known_by_what_drivers_call_them() -> None:
    names = {"NVIDIA H100 80GB HBM3": "h100", "NVIDIA A100-SXM4-40GB": "a100-40", "NVIDIA A100-SXM4-80GB": "a100"}
    names |= {"NVIDIA GeForce RTX 4090": "rtx4090", "NVIDIA H200": "h200", "NVIDIA L40S": "l40s", "NVIDIA A10": "a10"}
    assert {name: by_device_name(name) for name in names} == {name: GPUS[key] for name, key in names.items()}
    assert by_device_name("Abacus 3000") is None


def test_bf16_keeps_half_of_what_fp32_keeps() -> None:
    whole, half = (
        count(network(True, True, "meta"), 6, 16, 16, dtype).kept for dtype in (torch.float32, torch.bfloat16)
    )
    assert half == pytest.approx(whole / 2, rel=0.1)


@pytest.mark.parametrize("name", ["image_15", "video_15", "image_21", "video_21"])
def test_stable_diffusion_can_be_planned(name: str) -> None:
    made = plan(ROOT / f"configs/sd/{name}.yaml", [], 8)
    spatial = {"15": 0.86, "21": 0.866}[name[-2:]]
    frozen = made.parameters - (made.trained if name.startswith("video") else 0)
    assert frozen / 1e9 == pytest.approx(spatial, abs=0.005)


@pytest.mark.parametrize("name", EMU)
def test_the_published_recipe_can_be_planned(name: str) -> None:
    made = plan(ROOT / f"configs/emu/{name}.yaml", [], 64)
    billions = {"image": (2.99, 2.99)}.get(name, (4.43, 1.44))
    assert (made.parameters / 1e9, made.trained / 1e9) == pytest.approx(billions, abs=0.006)
    assert made.memory[3].states < made.memory[2].states < made.memory[1].states
    side = 32 if name == "video_256" else 64
    frames = {"image": 1, "interpolation": 37, "video_512_16": 16, "finetune": 16}.get(name, 8)
    assert made.latent_positions == frames * side * side


def test_thousands_of_gpus_and_a_plan_that_does_not_fit(capsys: pytest.CaptureFixture[str]) -> None:
    def said(*arguments: str) -> str:
        with pytest.raises(SystemExit) as ended:
            main(["plan", str(ROOT / "configs/emu/interpolation.yaml"), *arguments])
        out = capsys.readouterr()
        return out.out + out.err + f" status {ended.value.code}"

    text = said("data.batch_size=4096", "--nodes", "512", "--gpus-per-node", "8", "--gpu", "h200", "--price", "3")
    assert "stage interpolation on 512 x 8 h200" in text
    assert "batch              4096 = 4096 GPUs x 1 x 1" in text
    assert "at 3 an hour" in text
    assert "warning" not in text
    assert "data.streams=512 is not a multiple of 4096 ranks" in text
    assert text.endswith("status 0")
    assert "data.streams" not in said("data.batch_size=4096", "data.streams=4096", "--nodes", "512")
    small = said("--gpus-per-node", "8", "--gpu", "rtx3090", "--zero-stage", "1")
    assert "-> ZeRO 1" in small
    assert "does not fit" in small
    assert "warning: ZeRO 1 needs" in small
    assert "; try " in small
    nothing_left = ["engine.offload_optimizer=true", "activation_checkpointing=true", "engine.micro_batch=1"]
    small = said("--gpus-per-node", "1", "--gpu", "a10", "--zero-stage", "3", *nothing_left)
    assert "; try a GPU with more memory or a smaller network\n" in small
    alone = said("--gpus-per-node", "1", "--zero-stage", "1", "engine.precision=fp32", "engine.micro_batch=1")
    assert "-> ZeRO 0" in alone  # as training takes it
    assert "known are b200" in said("--gpu", "abacus")
    assert "can't be shared by 7 processes" in said("--gpus-per-node", "7")


def test_a_stage_on_an_image_prompt_has_the_image_stages_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which two YAMLs back tells, where no run is there yet."""
    monkeypatch.chdir(tmp_path)

    video = plan(ROOT / "configs/demo/video.yaml", [], 1)
    image = plan(ROOT / "configs/demo/image.yaml", [], 1)
    assert video.parameters - video.trained == image.parameters


def test_an_interpolation_with_a_network_of_its_own_trains_all_of_it() -> None:
    made = plan(ROOT / "configs/demo/interpolation.yaml", ["model=demo"], 1)
    network = Model.load("demo").unet("interpolation")
    assert made.parameters == made.trained == sum(parameter.numel() for parameter in network.parameters())


def test_what_can_not_be_planned(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="plans are made for the stages image, video and interpolation"):
        plan(ROOT / "configs/demo/text.yaml", [], 1)
    lone = tmp_path / "video.yaml"
    lone.write_text((ROOT / "configs/demo/video.yaml").read_text())
    with pytest.raises(UserError, match="is not there, and no YAML in"):
        plan(lone, [f"model={tmp_path / 'nowhere'}"], 1)


if __name__ == "__main__":
    measure(int(sys.argv[1]), sys.argv[2], bool(sys.argv[3]))
