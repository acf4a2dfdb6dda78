"""Who hears what happens in a run."""

from __future__ import annotations

from diffalign import config as configs
from diffalign.config import Config
from diffalign.runs.events import Listeners
from diffalign.runs.folder import RunFolder
from diffalign.runs.guards import Guards
from diffalign.runs.progress import Reporter
from diffalign.runs.trackers import Trackers
from diffalign.runs.watching.writer import PageWriter


def listeners(config: Config, folder: RunFolder, reporter: Reporter, guards: Guards) -> Listeners:
    """All of them, in this order."""
    settings = dict(configs.flat(configs.settings(config)))
    trackers = Trackers(config.output.trackers, folder / "trackers", folder.path.name, settings)
    return Listeners([reporter, trackers, folder, guards, PageWriter(folder, reporter.say)])
