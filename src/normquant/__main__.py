"""``python -m normquant``: the same as the command ``normquant``."""

from normquant.cli.entry import main

raise SystemExit(main())
