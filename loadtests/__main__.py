"""`python -m loadtests`."""

from loadtests.cli import main

main(prog_name="python -m loadtests")
