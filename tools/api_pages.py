"""Builds pages of the docstrings of what users import: `make docs`, or tools/api_pages.py FOLDER."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import ModuleType

import pdoc
import pdoc.render

import normquant

MODULES = (
    *("normquant", "normquant.spec", "normquant.specs", "normquant.compile", "normquant.linear", "normquant.audit"),
    *("normquant.audit.result", "normquant.distributed", "normquant.testing", "normquant.reference"),
)


def main(folder: Path) -> None:
    """Write the pages; a public function or class that has no entry is an error."""
    pdoc.render.configure(docformat="google", footer_text=f"normquant {normquant.__version__}")
    for name in normquant.__all__:  # which the package imports when they are asked for
        vars(normquant)[name] = getattr(normquant, name)
    pdoc.pdoc(*MODULES, output_directory=folder)
    page = (folder / "normquant.html").read_text(encoding="utf-8")
    public = [name for name in normquant.__all__ if not isinstance(getattr(normquant, name), ModuleType)]
    lacking = [name for name in public if not re.search(rf'id="{name}"', page)]
    if lacking:
        raise SystemExit(f"no entry for {', '.join(lacking)} in {folder}/normquant.html")
    print(f"{folder}/index.html")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
