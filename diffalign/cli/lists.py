"""What there is: presets, rules, rewards."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from diffalign import config as configs
from diffalign.cli.commands import app, show
from diffalign.errors import UserError, shortened


def table(rows: Sequence[Sequence[str]], gap: str = "  ") -> list[str]:
    """Columns side by side; the last is cut where a line would be wider than the terminal."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)] if rows else []
    left = shutil.get_terminal_size((140, 24)).columns - sum(widths[:-1]) - len(gap) * (len(widths) - 1)
    return [
        gap.join(
            [
                *(cell.ljust(width) for cell, width in zip(row, widths[:-1], strict=False)),
                shortened(row[-1], max(left, 20)),
            ]
        )
        for row in rows
    ]


@app.command("configs")
@click.argument("words", nargs=-1, metavar="[WORD]...")
def list_configs(words: tuple[str, ...]) -> None:
    """List the presets, those whose line has every WORD: flux, flow_grpo, pickscore."""
    from diffalign.runtime.yaml_text import parse

    rows = []
    for name, path in configs.presets().items():
        raw: Any = parse(path.read_text(encoding="utf-8"), str(path))
        row = (name, str(raw["model"]), ", ".join(raw.get("rewards") or ["-"]))
        if all(word.lower() in " ".join(row).lower() for word in words):
            rows.append((row[0], row[1].rpartition("/")[2], row[2]))
    if not rows:
        raise UserError(f"configs: no preset has {' and '.join(words)}; `diffalign configs` lists all")
    show(table([("preset", "model", "rewards"), *rows]))


@app.command("rules")
def list_rules() -> None:
    """List the update rules."""
    from diffalign.config.json_schema import rules

    show(table(list(rules().items())))


class Names(click.Group):
    """A group that takes the name of a reward where a command could stand."""

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if (known := super().get_command(ctx, cmd_name)) is not None:
            return known
        return click.Command(cmd_name, callback=lambda: _facts(cmd_name))


@app.group(cls=Names, invoke_without_command=True, subcommand_metavar="[NAME | check NAME | fetch NAME]")
@click.pass_context
def rewards(context: click.Context) -> None:
    """List the rewards, say all of one, check one, or fetch what one asks with."""
    if context.invoked_subcommand is None:
        from diffalign.rewards import catalog

        entries = catalog.builtin().values()
        kinds = [
            (e.name, e.modality, "gradient" if e.differentiable else "", e.about.partition(";")[0]) for e in entries
        ]
        show(
            [*table([("reward", "of", "", "what it scores"), *kinds]), "", "`diffalign rewards NAME` says all of one."]
        )


def _facts(name: str) -> None:
    from diffalign.rewards import catalog

    entry = catalog.known(name, "rewards")
    size = f", {entry.memory:g} GiB" if entry.memory else ""
    weights = (
        f"{entry.weights} ({entry.licence}{size}); another place: {entry.name}@PLACE"
        if entry.weights
        else f"none ({entry.licence or 'ours'})"
    )
    facts = {
        "reward": entry.name,
        "scores": entry.about,
        "of": {"any": "pictures and videos", "image": "pictures; of a video its frames"}.get(
            entry.modality, entry.modality
        ),
        "range": entry.range or "not said",
        "family": entry.family or "none: it shares no data or model with others",
        "gradient": "yes: truncated_bp, rlr and rule.last_step can use it"
        if entry.differentiable
        else "no: a black box",
        "weights": weights if entry.weights else f"none ({entry.licence or 'ours'})",
        "needs": ", ".join(f"{key!r} in every prompt" for key in entry.needs) or "nothing of prompts",
        "installed": f"no: {entry.missing}" if entry.missing else "yes",
        "in a config": f"rewards: {entry.name}",
        "check": f"diffalign rewards check {entry.name}",
    }
    show(f"{key:12} {value}" for key, value in facts.items())


@rewards.command()
@click.argument("name")
def check(name: str) -> None:
    """Score built-in pictures with NAME and say whether it tells them apart."""
    from diffalign.rewards import catalog

    catalog.known(name, "rewards")  # refused before torch is imported
    from diffalign.rewards.check import check as check_reward

    show(check_reward(name))


@rewards.command()
@click.argument("name")
@click.option("--from", "source", required=True, metavar="PLACE", help="Wheel, checkout or file of its authors.")
def fetch(name: str, source: str) -> None:
    """Take the question that NAME asks its model from its authors' files: it does not come with this package."""
    from diffalign.rewards import catalog, templates

    show([str(templates.fetch(catalog.known(name, "rewards"), Path(source)))])
