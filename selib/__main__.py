"""`python -m selib` is the console script `selib`."""

import sys

from selib.cli import main

sys.exit(main())
