"""HTML pages of one file that ask nothing of the network, from templates. The only importer of jinja2."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

from videodiff.errors import UserError
from videodiff.video_io import atomic_path


def write_page(path: Path, template: Path, **facts: Any) -> None:
    """Fill a template with facts and write it, whole or not at all; UserError where jinja2 is not installed."""
    try:
        import jinja2
    except ImportError as error:
        extras = "'videodiff[data]' or 'videodiff[eval]'"
        raise UserError(f"{path}: needs jinja2 ({error}); install it with pip install {extras}") from None
    # Captions and names are anybody's: all that is filled in is escaped.
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    text = environment.from_string(template.read_text(encoding="utf-8")).render(**facts)
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def data_url(path: Path, kind: str) -> str:
    """A file as part of a page, e.g. of kind video/mp4."""
    return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"
