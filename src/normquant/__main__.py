"""``python -m normquant``: the same as the command ``normquant``."""

from normquant.cli import main

raise SystemExit(main())
