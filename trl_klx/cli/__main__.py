"""`python -m trl_klx.cli` is `trl-klx`."""

import sys

from .commands import main

sys.exit(main())
