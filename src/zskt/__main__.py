"""`python -m zskt`, the same as `zskt`."""

import sys

from zskt.cli import main

sys.exit(main())
