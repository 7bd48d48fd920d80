"""`python -m geffect_fast`."""

import sys

from geffect_fast.cli import main

sys.exit(main())
