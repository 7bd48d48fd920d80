"""`python -m geffect_fast.cli`."""

import sys

from geffect_fast.cli import main

sys.exit(main())
