"""``python -m toprovar`` is the command ``toprovar``."""

from toprovar.cli import main

main()
