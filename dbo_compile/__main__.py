"""`python -m dbo_compile`."""
from __future__ import annotations

import sys

from dbo_compile.cli import main

sys.exit(main())
