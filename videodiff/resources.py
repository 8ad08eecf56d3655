"""The files that come with the package: configurations, SLURM scripts, the bundled model."""

from pathlib import Path

__all__ = ["path"]


def path(name: str) -> Path:
    """Where `configs/...`, `slurm/...` or `assets/...` lies: the same in a checkout and in an installed wheel.

    The file need not exist: who opens it says so.
    """
    package = Path(__file__).resolve().parent
    return (package if name.split("/")[0] == "assets" else package.parent) / name
