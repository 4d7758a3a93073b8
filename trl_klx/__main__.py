"""`python -m trl_klx` is `trl-klx`."""

import sys

from .cli.commands import main

sys.exit(main())
