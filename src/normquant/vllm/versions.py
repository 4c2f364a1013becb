"""Which versions of vLLM the plugin was made for."""

from __future__ import annotations

import re

OLDEST, NEWEST = (0, 26), (0, 33)


def why_unsupported(version: str) -> str | None:
    """Why a vLLM of this version is left alone, None where it is one that the plugin knows.

    version: as `vllm.__version__` says it: "0.32.0", "0.26.0+cu130", "0.33.1rc2.dev7+g0123456".
    """
    window = f"{_text(OLDEST)} to {_text(NEWEST)} are supported"
    found = re.match(r"(\d+)\.(\d+)", version)
    if found is None:
        return f"vLLM's version {version!r} has no number; {window}"
    if not OLDEST <= (int(found[1]), int(found[2])) <= NEWEST:
        return f"vLLM is {version}; {window}"
    return None


def _text(version: tuple[int, int]) -> str:
    return ".".join(map(str, version))
