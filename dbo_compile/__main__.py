"""`python -m dbo_compile`."""

import sys

from dbo_compile.cli import main

sys.exit(main())
