"""What a shell offers for a config and its settings (`_DIFFALIGN_COMPLETE=bash_source diffalign` prints what makes it ask)."""

from __future__ import annotations

import click
from click.shell_completion import CompletionItem

from diffalign import config as configs
from diffalign.config.legend import every, rule_keys
from diffalign.errors import UserError
from diffalign.runtime.options import options


def presets(context: click.Context, parameter: click.Parameter, begun: str) -> list[CompletionItem]:
    """Presets by name; where none begins so, files."""
    found = [CompletionItem(name) for name in configs.presets() if name.startswith(begun)]
    return found or [CompletionItem(begun, type="file")]


def settings(context: click.Context, parameter: click.Parameter, begun: str) -> list[CompletionItem]:
    """`KEY=` of every setting, its rule's where the config before it can be read."""
    try:
        rule = configs.rule_of(str(context.params.get("config")), []).get("name", "")
        own = list(rule_keys(rule))
    except (UserError, KeyError):
        own = []
    return [CompletionItem(f"{key.name}=", help=key.what) for key in (*every(), *own) if key.name.startswith(begun)]


OVERRIDES = click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...", shell_complete=settings)
A_CONFIG = options(click.argument("config", shell_complete=presets), OVERRIDES)
A_CONFIG_OR_NONE = options(click.argument("config", required=False, shell_complete=presets), OVERRIDES)
