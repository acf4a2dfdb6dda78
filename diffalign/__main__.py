"""`python -m diffalign`."""

from diffalign.cli import main

main()
