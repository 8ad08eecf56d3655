"""What a tensor must look like, said in the words of the docstrings' legends."""

from collections.abc import Sequence

from torch import Tensor


def check_shape(name: str, tensor: Tensor, legend: str, wanted: Sequence[int]) -> None:
    """Refuse (ValueError) a tensor whose shape is not `wanted`, naming it and, by the legend, what its axes mean."""
    if tuple(tensor.shape) != tuple(wanted):
        raise ValueError(f"{name} has shape {list(tensor.shape)}, not {list(wanted)}, its {legend} here")
