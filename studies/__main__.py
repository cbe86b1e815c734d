"""`python -m studies` is the console script `studies`."""

import sys

from studies.cli import main

sys.exit(main())
