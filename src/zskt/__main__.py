"""`python -m zskt`, the same as `zskt`."""

import sys

from zskt.cli.main import main

sys.exit(main())
