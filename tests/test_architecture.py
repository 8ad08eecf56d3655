"""The doors of the house: who may import whom, who owns which package, and what an import may cost."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("videodiff", "data_pipeline", "stages")  # an import only points left

OWNERS = {
    "deepspeed": {"videodiff/training/engine.py"},
    "open_clip": {"videodiff/networks/tokenizer.py"},
    "transformers": {"videodiff/networks/t5.py"},
    "tokenizers": {"videodiff/networks/t5.py"},
    "wandb": {"videodiff/training/metrics.py"},
    "sentencepiece": {"videodiff/networks/t5.py"},
    "imageio": {"videodiff/video_io.py"},
    "imageio_ffmpeg": {"videodiff/video_io.py"},
    "omegaconf": {"videodiff/config.py"},
    "yaml": {"videodiff/config.py"},
    "decord": {"data_pipeline/decoders.py"},
    "fsspec": {"data_pipeline/locations.py"},
    "braceexpand": {"data_pipeline/locations.py"},
    "webdataset": {"data_pipeline/tars.py"},
    "av": {"data_pipeline/readers.py"},
    "scenedetect": {"data_pipeline/scenes.py"},
    "cv2": {"data_pipeline/measures.py", "videodiff/metrics/flow.py"},
    "imagehash": {"data_pipeline/measures.py"},
    "pyarrow": {"data_pipeline/tables.py"},
    "jinja2": {"videodiff/pages.py"},
}

# What a user may wait for, or may not have installed.
HEAVY = ("torch", "numpy", "deepspeed", "open_clip", "decord", "webdataset", "imageio", "diffusers", "PIL")
HEAVY += ("transformers", "tokenizers", "sentencepiece", "av", "scenedetect", "cv2", "imagehash", "pyarrow", "jinja2")


def source_files() -> list[Path]:
    return sorted(file for room in ROOMS for file in (ROOT / room).rglob("*.py"))


def imports(file: Path) -> set[str]:
    """Every module that a file imports anywhere, also inside functions, as a dotted name."""
    package = file.relative_to(ROOT).with_suffix("").parts[:-1]
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(part for part in (base, node.module) if part)
            found |= {module} | {f"{module}.{alias.name}" for alias in node.names}
    return found


def name(file: Path) -> str:
    return file.relative_to(ROOT).as_posix()


def modules_loaded_by(code: str) -> set[str]:
    """The top-level modules that a fresh process holds after running `code`."""
    report = "import sys\nprint('LOADED', *sorted({name.partition('.')[0] for name in sys.modules}))"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\n{report}"], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    return set(done.stdout.rpartition("LOADED")[2].split())


@pytest.mark.parametrize("file", source_files(), ids=name)
def test_imports_only_point_left(file: Path) -> None:
    room = ROOMS.index(file.relative_to(ROOT).parts[0])
    forbidden = {*ROOMS[room + 1 :], "tests"}
    assert not {module for module in imports(file) if module.split(".")[0] in forbidden}


@pytest.mark.parametrize("package", OWNERS)
def test_a_package_is_imported_by_its_owner_alone(package: str) -> None:
    users = {name(file) for file in source_files() if package in {module.split(".")[0] for module in imports(file)}}
    assert users <= OWNERS[package]


def test_the_reader_judges_and_never_teaches() -> None:
    """What reads the videos back serves evaluation only: training and generation that see it would grade themselves."""
    readers = {"data_pipeline.world_reader", "data_pipeline.world_two_reader"}
    users = {name(file) for file in source_files() if readers & {*imports(file)}}
    themselves = {f"{reader.replace('.', '/')}.py" for reader in readers}
    assert {user for user in users if not user.startswith("stages/evaluation/")} <= themselves


def test_importing_does_nothing() -> None:
    assert modules_loaded_by("import videodiff") & {*HEAVY, "pydantic", "omegaconf", "rich", "typer"} == set()


def test_importing_sets_no_variable_and_makes_no_file(tmp_path: Path) -> None:
    code = "import os; before = dict(os.environ); import videodiff, stages, data_pipeline; print(before == os.environ)"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    output = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, env=environment, check=True
    )
    assert output.stdout.strip() == "True"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", [[], ["generate"], ["train"], ["evaluate"], ["data"]], ids=" ".join)
def test_help_loads_nothing_heavy(command: list[str]) -> None:
    code = f"import sys\nsys.argv = ['videodiff', *{command!r}, '--help']\nfrom stages.cli import main\n"
    code += "try:\n    main()\nexcept SystemExit as stop:\n    assert not stop.code"
    assert modules_loaded_by(code) & set(HEAVY) == set()


def test_the_core_needs_no_training_package() -> None:
    """`generate` runs where the extra `train` is not installed."""
    loaded = modules_loaded_by("import stages.generate")
    assert "torch" in loaded
    assert loaded & {"deepspeed", "webdataset", "decord", "tensorboard"} == set()


def test_nothing_is_unpickled() -> None:
    for file in source_files():
        loaders = {m for m in imports(file) if m.partition(".")[0] in ("pickle", "dill", "cloudpickle")}
        # The error that torch.load(weights_only=True) raises may be named.
        assert loaders in (set(), {"pickle", "pickle.UnpicklingError"}), name(file)
