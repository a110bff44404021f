"""`python -m vhostctl`."""

from vhostctl.cli.main import main

main()
