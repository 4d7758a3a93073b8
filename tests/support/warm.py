"""Imports what a run imports; for processes that others are forked from."""

import datasets  # noqa: F401

from support import fault_tools  # noqa: F401
from support.quick import make_quick

make_quick()
