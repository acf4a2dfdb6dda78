"""The listener that keeps a run's page up to date. What goes wrong with the page is said and never ends the run."""

from __future__ import annotations

from collections.abc import Callable

from diffalign.errors import one_line
from diffalign.runs.events import Began, Drawn, Ended, Evaluated, Listener
from diffalign.runs.folder import PAGE, RunFolder
from diffalign.runtime.files import write_text


class PageWriter(Listener):
    """Writes `index.html` from the folder's files with every grid and evaluation, and at the end; it stands after the listeners that write
    those files. say: told once of each way in which that fails."""

    def __init__(self, folder: RunFolder, say: Callable[[str], None]) -> None:
        self.folder, self.say, self.told = folder, say, set[str]()

    def began(self, event: Began) -> None:
        if event.number:  # a page of later updates may be there
            self.write()

    def drawn(self, event: Drawn) -> None:
        self.write()

    def evaluated(self, event: Evaluated) -> None:
        self.write()

    def ended(self, event: Ended) -> None:
        self.write()

    def write(self) -> None:
        """Make the page anew."""
        try:
            from diffalign.runs.watching import page, reading

            write_text(self.folder / PAGE, page.render(reading.read(self.folder.path)))
        except Exception as error:  # of whatever kind: the run matters more than its page
            line = f"{self.folder / PAGE} was not written ({one_line(error)}); the run goes on"
            if line not in self.told:
                self.told.add(line)
                self.say(line)
