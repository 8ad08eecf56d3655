"""safetensors files, with the errors of a disk as OSError: safetensors' own say neither which file nor why."""

import errno
import os
import re
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file as save
from torch import Tensor


def save_file(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write a file. Raises OSError, which names it and says why it can't be written."""
    try:
        save(dict(tensors), path, None if metadata is None else dict(metadata))
    except SafetensorError as error:
        if (found := re.search(r"os error (\d+)", str(error))) is None:
            raise OSError(errno.EIO, str(error), str(path)) from None
        number = int(found[1])
        raise OSError(number, os.strerror(number), str(path)) from None
