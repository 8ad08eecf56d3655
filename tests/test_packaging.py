"""What is built can be installed, and carries all that a user needs."""

import ast
import re
import subprocess
import sys
import tarfile
import venv
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

from videodiff import resources

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist and the wheel that is made from it."""
    folder = tmp_path_factory.mktemp("dist")
    subprocess.run([sys.executable, "-m", "build", "--outdir", folder, ROOT], check=True, capture_output=True)
    return folder


def tracked(*folders: str) -> set[str]:
    output = subprocess.run(["git", "ls-files", *folders], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return {line for line in output.splitlines() if (ROOT / line).is_file()}


@pytest.mark.slow
def test_the_wheel_carries_the_code_the_model_the_configurations_and_the_scripts(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert tracked("videodiff", "stages", "data_pipeline", "configs", "slurm") <= names
    assert any(name.startswith("videodiff/assets/demo/") and name.endswith(".safetensors") for name in names)
    assert any(name.startswith("configs/demo/") for name in names)
    assert any(name.startswith("slurm/") and name.endswith(".sbatch") for name in names)
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert not {name for name in names if "__pycache__" in name or name.startswith("tests/")}


@pytest.mark.slow
def test_the_sdist_carries_the_tests_and_what_make_needs(built: Path) -> None:
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert tracked("tests") | {"Makefile", "constraints.txt", "pyproject.toml", "LICENSE", "CHANGELOG.md"} <= names


@pytest.mark.slow
def test_the_wheel_installs_and_finds_its_files(built: Path, tmp_path: Path) -> None:
    (wheel,) = built.glob("*.whl")
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "--no-deps", "--no-index", wheel], check=True, capture_output=True)
    code = (
        "from videodiff import resources\n"
        "for name in ('configs/demo', 'slurm', 'assets/demo'):\n"
        "    folder = resources.path(name)\n"
        "    assert any(folder.iterdir()) and 'site-packages' in str(folder), folder\n"
    )
    subprocess.run([python, "-c", code], cwd=tmp_path, check=True)
    assert (tmp_path / "venv" / "bin" / "videodiff").is_file()


def test_resources_lie_where_the_checkout_has_them() -> None:
    assert resources.path("configs/demo") == ROOT / "configs" / "demo"
    assert resources.path("assets/demo") == ROOT / "videodiff" / "assets" / "demo"


def _lines(path: Path) -> list[str]:
    return [line for line in path.read_text().splitlines() if line and not line.startswith("#")]


def test_constraints_are_exact_portable_versions() -> None:
    for line in _lines(ROOT / "constraints.txt"):
        assert re.fullmatch(r'[\w.-]+==[\w.]+(; python_version (<|>=) "3\.11")?', line), line
    assert "torch==2.13.0" in _lines(ROOT / "constraints.txt")


def _declared(section: str) -> set[str]:
    """The packages that pyproject.toml names in `dependencies` or in one extra. (tomllib needs Python 3.11.)"""
    text = (ROOT / "pyproject.toml").read_text()
    (body,) = re.findall(rf"^{section} = (\[.*?^\])", text, flags=re.DOTALL | re.MULTILINE)
    return {_normal(re.split(r"[<>=!~;\[ ]", requirement)[0]) for requirement in ast.literal_eval(body)}


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_all_that_the_code_imports_is_declared() -> None:
    distributions = metadata.packages_distributions()
    imported = set()
    for room in ("videodiff", "data_pipeline", "stages"):
        for file in (ROOT / room).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                if isinstance(node, ast.ImportFrom) and not node.level and node.module:
                    names = [node.module]
                imported |= {name.partition(".")[0] for name in names}
    ours = {"videodiff", "data_pipeline", "stages"}
    foreign = {name for name in imported - ours if name not in sys.stdlib_module_names}
    declared = set().union(*map(_declared, ("dependencies", "train", "t5", "data", "wandb")))
    undeclared = {name for name in foreign if not {_normal(d) for d in distributions.get(name, [name])} & declared}
    assert undeclared == set()
    constrained = {_normal(line.partition("==")[0]) for line in _lines(ROOT / "constraints.txt")}
    assert (declared | _declared("dev")) - {"videodiff"} <= constrained  # an extra may ask for another of our own
