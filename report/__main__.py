"""`python -m report out/run`: see page.py."""

from report.page import main
from runtime.flags import guarded

guarded(main)
