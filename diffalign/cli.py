"""The command line. Exit codes: 0 done, 2 the user's mistake, 3 a fault that stopped a run, 130 and 143 interrupted, 1 our bug."""

from __future__ import annotations

import math
import os
import sys
from pathlib import Path
from typing import Any, NoReturn

import click

import diffalign
from diffalign.errors import Fault, UserError
from diffalign.models.notes import LORA
from diffalign.runtime import keys, launcher


class Number(click.FloatRange):
    """A range of numbers; click's own lets NaN through."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        number = super().convert(value, param, ctx)
        return number if math.isfinite(number) else self.fail(f"{value!r} is not a finite number.", param, ctx)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(diffalign.__version__, prog_name="diffalign")
def app() -> None:
    """Align image and video diffusion models with a reward. The update rule is one word in the config."""


@app.command()
@click.argument("config")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--fresh", is_flag=True, help="Start over; what the run folder holds of this run is deleted.")
@click.option("--quiet", is_flag=True, help="Print nothing but the result.")
def train(config: str, overrides: tuple[str, ...], fresh: bool, quiet: bool) -> None:
    """Train CONFIG, a path or a name such as flow_grpo/shapes-sd3. The same command again resumes."""
    from diffalign import config as configs
    from diffalign.runs.folder import open_run

    settings = configs.load(config, overrides)
    folder = open_run(settings, fresh) if launcher.leads() else None  # refused before torch is imported
    from diffalign.runs import session

    try:
        summary = session.train(settings, fresh=fresh, quiet=quiet, folder=folder)
    except session.Interrupted as error:
        fail(error.code, str(error))
    if not launcher.leads():
        return  # the first process says it
    for name, judged in summary.rewards.items():
        if (gain := judged.gain) is not None:
            click.echo(f"{keys.evaluated(name)}: gain {gain.value:+.3f}, 95 % [{gain.low:+.3f}, {gain.high:+.3f}]")
    click.echo(f"{Path(settings.run_dir) / 'adapter' / LORA}")


@app.command()
@click.argument("target", metavar="RUN|ADAPTER|MODEL")
@click.option("--prompt", "prompts", multiple=True, help="A caption; may be given several times.")
@click.option("--prompts", "file", type=click.Path(), help="A file of captions, one a line, or JSON lines.")
@click.option("-n", "count", type=click.IntRange(1, 10_000), default=4, show_default=True, help="Pictures a caption.")
@click.option("--seed", type=click.IntRange(0, 2**62), default=0, show_default=True)
@click.option("--steps", type=click.IntRange(1, 1000), help="Sampling steps [default: as trained].")
@click.option("--guidance", type=Number(0, 1000), help="Guidance scale [default: as trained].")
@click.option("--negative", help="What guidance leads away from; needs a guidance above 1.")
@click.option("--strength", type=Number(-100, 100), default=1.0, show_default=True, help="Of the adapter.")
@click.option("--adapter", "more", multiple=True, metavar="FOLDER[:STRENGTH]", help="A further adapter; several times.")
@click.option("--base", is_flag=True, help="Also draw without adapters, from the same seeds.")
@click.option("--set", "options", multiple=True, metavar="KEY=VALUE", help="A further argument of the pipeline's call.")
@click.option("--fps", type=click.IntRange(1, 240), default=16, show_default=True, help="Frames per second of videos.")
@click.option(
    "--out", type=click.Path(file_okay=False), default="samples", show_default=True, help="Folder to write to."
)
def sample(
    target: str,
    prompts: tuple[str, ...],
    file: str | None,
    count: int,
    seed: int,
    steps: int | None,
    guidance: float | None,
    negative: str | None,
    strength: float,
    more: tuple[str, ...],
    base: bool,
    options: tuple[str, ...],
    fps: int,
    out: str,
) -> None:
    """Write pictures or videos, a grid and an index page from a run, an adapter or a model."""
    from diffalign.prompts import files as prompt_files
    from diffalign.sampling import pictures as sampling

    texts = list(prompts)
    if file is not None:
        texts += [entry["prompt"] for entry in prompt_files.read(file, (), "test", "--prompts")]
    if not texts:
        raise UserError("sample: no caption; give --prompt TEXT or --prompts FILE")
    source = sampling.resolve(target, strength, more)
    source = sampling.with_options(source, options)
    for path in sampling.sample(source, texts, count, seed, out, steps, guidance, negative, base, fps):
        video = path.with_suffix(".mp4")
        click.echo(f"{video}, {path.name} is its middle frame" if video.is_file() else str(path))


@app.command()
@click.argument("targets", nargs=-1, required=True, metavar="RUN|ADAPTER|MODEL...")
@click.option(
    "--suite", required=True, metavar="NAME|FILE", help="shapes, shapes-motion, geneval, pickscore, or a file."
)
@click.option("--prompts", help="Other prompts for the suite's rewards: a set's name or a file.")
@click.option("--reward", "rewards", multiple=True, help="What judges, instead of the suite's; several times.")
@click.option("--split", type=click.Choice(("train", "validation", "test")), default="test", show_default=True)
@click.option("-n", "count", type=click.IntRange(1, 1000), default=4, show_default=True, help="Samples a prompt.")
@click.option("--seed", type=click.IntRange(0, 2**62), default=0, show_default=True)
@click.option("--steps", type=click.IntRange(1, 1000), help="Sampling steps [default: as trained].")
@click.option("--guidance", type=Number(0, 1000), help="Guidance scale [default: as trained].")
@click.option("--set", "options", multiple=True, metavar="KEY=VALUE", help="A further argument of the pipeline's call.")
@click.option("--batch", type=click.IntRange(1, 1024), default=16, show_default=True, help="Samples at a time.")
@click.option(
    "--drift/--no-drift",
    default=True,
    show_default=True,
    help="Also run adapters' calls without them, to measure how far predictions are from the base model's: twice the work.",
)
@click.option("--fresh", is_flag=True, help="Make again what is there.")
@click.option("--out", required=True, type=click.Path(file_okay=False, path_type=Path), help="Folder to write to.")
def evaluate(
    targets: tuple[str, ...],
    suite: str,
    prompts: str | None,
    rewards: tuple[str, ...],
    split: str,
    count: int,
    seed: int,
    steps: int | None,
    guidance: float | None,
    options: tuple[str, ...],
    batch: int,
    drift: bool,
    fresh: bool,
    out: Path,
) -> None:
    """Judge models and adapters on a suite of prompts, all from the same noises, with intervals, grids and a page."""
    from diffalign.evaluation import suite as suites
    from diffalign.evaluation.task import task_of

    task = task_of(suite, prompts, rewards, split, count, seed, batch, drift)
    models = suites.sources(targets, options, steps, guidance)
    suites.run(task, models, out, fresh, click.echo)


@app.command()
@click.argument("folder", metavar="RUN|ADAPTER", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), required=True, help="A .safetensors file.")
def export(folder: Path, out: Path) -> None:
    """Write an adapter under the names ComfyUI reads."""
    from diffalign.models.comfyui import comfyui

    for path, count in comfyui(folder, out).items():
        click.echo(f"{path}: {count} layers")


@app.command()
@click.argument("config")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option(
    "--preview", type=click.Path(dir_okay=False), help="Picture of samples with and without noise; loads weights."
)
@click.option("--card", help="Bound on a card's peak: a100, h200, ...")
def plan(config: str, overrides: tuple[str, ...], preview: str | None, card: str | None) -> None:
    """Say what one update of CONFIG does and costs; loads no weights."""
    from diffalign import config as configs

    settings = configs.load(config, overrides)
    if preview is not None:
        from diffalign.planning import preview as previews

        for line in previews.write(settings, Path(preview)):
            click.echo(line)
        return
    from diffalign.planning import cost

    rate, source = cost.bound(card)
    for line in cost.count(settings).lines(rate, source):
        click.echo(line)


@app.command()
@click.argument("configs", nargs=-1, required=True, metavar="CONFIG[@KEY=VALUE]... [KEY=VALUE]...")
@click.option("--out", required=True, type=click.Path(file_okay=False), help="Folder for the table, JSON and figure.")
@click.option("--batches", type=click.IntRange(4, 100_000), default=32, show_default=True, help="Gradients a rule.")
@click.option("--chain", is_flag=True, help="On the Gaussian chain, with the first CONFIG's sampler.")
def gradients(configs: tuple[str, ...], out: str, batches: int, chain: bool) -> None:
    """Bias, variance and cost of rules' gradients on one batch, against full backpropagation.

    Model, sampler, rewards and prompts are the first CONFIG's, changed by KEY=VALUE; of the others only the rule counts.
    CONFIG@KEY=VALUE changes a setting of a rule: rlr/shapes-sd3@depth=1@span=2.
    """
    from diffalign.gradients import instrument

    overrides = tuple(word for word in configs if "=" in word.split("@")[0])
    names = tuple(word for word in configs if word not in overrides)
    if not names:
        raise UserError("gradients: no CONFIG given, only overrides")
    specs = instrument.specifications(names, overrides)
    found = instrument.run(specs, Path(out), batches, chain, click.echo)
    from diffalign.gradients import report

    for line in report.table(found):
        click.echo(line)
    click.echo(str(Path(out) / "gradients.png"))


@app.command()
@click.argument("config")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--endpoint", required=True, help="OpenAI-compatible address, such as http://localhost:8000/v1.")
@click.option("--model", required=True, help="The language model's name there.")
@click.option("--out", required=True, type=click.Path(dir_okay=False), help="File for prompts.stages; it may exist.")
@click.option("--count", type=click.IntRange(2, 100), default=3, show_default=True, help="Stages a prompt.")
@click.option("--key", envvar="OPENAI_API_KEY", show_envvar=True, help="Sent as a bearer token.")
def stages(
    config: str, overrides: tuple[str, ...], endpoint: str, model: str, out: str, count: int, key: str | None
) -> None:
    """Ask a language model for stage prompts of CONFIG's training and evaluation prompts."""
    from diffalign import config as configs
    from diffalign.prompts import stage_writer as stage_prompts

    settings = configs.load(config, overrides)
    entries = [*settings.book.training, *settings.book.evaluation]
    asked = stage_prompts.write(entries, Path(out), endpoint, model, key, count, click.echo)
    click.echo(f"{out}: {asked} asked for; use prompts.stages={out}")


@app.command("config")
@click.argument("config")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
def show_config(config: str, overrides: tuple[str, ...]) -> None:
    """Print every key of CONFIG with its value and meaning."""
    from diffalign import config as configs

    for line in configs.explained(configs.load(config, overrides)):
        click.echo(line)


@app.group(invoke_without_command=True)
@click.pass_context
def rewards(context: click.Context) -> None:
    """List the rewards, or check one."""
    if context.invoked_subcommand is not None:
        return
    from diffalign.rewards import catalog

    for name, entry in catalog.builtin().items():
        kind = "differentiable" if entry.differentiable else "black box"
        facts = [f"range {entry.range}"] if entry.range else []
        if entry.weights:
            size = f", {entry.memory:g} GiB" if entry.memory else ""
            facts.append(f"weights {entry.weights} ({entry.licence}{size}), or {name}@PLACE")
        facts += [f"needs {entry.missing}"] if entry.missing else []
        click.echo("; ".join([f"{name:24} {entry.modality:6} {kind:15} {entry.about}", *facts]))


@rewards.command()
@click.argument("name")
def check(name: str) -> None:
    """Score built-in pictures with NAME and say whether it tells them apart."""
    from diffalign.rewards import catalog

    try:
        catalog.find(name)
    except LookupError as error:
        raise UserError(f"rewards: {name}: {error}") from error
    from diffalign.rewards.check import check as check_reward

    for line in check_reward(name):
        click.echo(line)


@app.command("serve-reward")
@click.argument("name")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen at.")
@click.option("--port", type=click.IntRange(0, 65535), default=8090, show_default=True, help="0: any free one.")
@click.option("--token", envvar="DIFFALIGN_REWARD_TOKEN", show_envvar=True, help="What clients must send.")
@click.option("--max-mib", type=click.IntRange(1, 2**14), default=256, show_default=True, help="Largest request.")
def serve_reward(name: str, host: str, port: int, token: str | None, max_mib: int) -> None:
    """Serve the reward NAME over HTTP; a config then names it http://HOST:PORT/score."""
    from diffalign.rewards import catalog

    try:
        catalog.find(name)
    except LookupError as error:
        raise UserError(f"serve-reward: {name}: {error}") from error
    from diffalign.rewards import server

    server.serve(name, host, port, token, max_mib * 2**20)


@app.command()
def doctor() -> None:
    """Report versions, devices and optional parts, with the command that mends each."""
    from diffalign.doctor import examine

    found = examine()
    for item in found:
        click.echo(f"{item.name:20} {item.status}" + (f"  -> {item.mend}" if item.mend else ""))
    if any(item.broken for item in found):
        raise Fault("something does not work; see the lines with an arrow")


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run a command and leave with its exit code."""
    try:
        app(arguments, prog_name="diffalign", standalone_mode=False)
    except UserError as error:
        fail(2, *error.problems)
    except click.ClickException as error:
        fail(2, error.format_message())
    except Fault as error:
        fail(3, str(error))
    except OSError as error:  # a full disk, a folder where a file should go
        fail(3, f"{error.filename or 'files'}: {error.strerror or error}")
    except (click.Abort, KeyboardInterrupt):
        fail(130, "interrupted")
    _leave(0)


def fail(code: int, *lines: str) -> NoReturn:
    """Print one line a problem and leave."""
    for line in (" ".join(line.splitlines()) for line in lines):
        click.echo(f"diffalign: {line}" if not line.startswith("  ") else line, err=True)
    _leave(code)


def _leave(code: int) -> NoReturn:
    """End with a code. One of several processes ends at once: with everything done, gloo's threads sometimes abort an interpreter that
    takes itself apart (seen in about 1 of 10 runs of torch 2.15.0), and the launcher takes that for a failure."""
    if launcher.several():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
