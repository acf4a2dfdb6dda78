"""The command line: `main` runs it."""

from diffalign.cli import adapters as adapters
from diffalign.cli import comparing as comparing
from diffalign.cli import evaluating as evaluating
from diffalign.cli import lists as lists
from diffalign.cli import starting as starting
from diffalign.cli import watching as watching
from diffalign.cli.commands import app as app
from diffalign.cli.commands import main as main
