"""The command line: options and where they go. Exit codes: 0 done, 2 the user's mistake, 3 a fault that stopped a run, 130 and 143
interrupted, 1 our bug."""

from __future__ import annotations

import atexit
import os
import signal
import sys
import threading
from collections.abc import Iterable
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import click

import diffalign
from diffalign import config as configs
from diffalign.cli.completion import A_CONFIG, A_CONFIG_OR_NONE
from diffalign.errors import LONGEST, CardFailed, Fault, Interrupted, UserError, shortened
from diffalign.runtime import launcher
from diffalign.runtime.options import A_CALL, VRAM, Number, Place
from diffalign.runtime.streams import forgive


def show(lines: Iterable[object]) -> None:
    """Print lines."""
    for line in lines:
        click.echo(str(line))


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(diffalign.__version__, prog_name="diffalign")
def app() -> None:
    """Align image and video diffusion models with a reward. The update rule is one word in the config."""


def _settings(
    config: str, overrides: tuple[str, ...], vram: float | None, ready: bool = True
) -> tuple[configs.Config, Any]:
    """A config, fitted into memory where that is asked for, and what was counted of its model for that; ready: its packages are there."""
    if vram is None:
        return configs.load(config, overrides, ready), None
    from diffalign.planning import vram as fitting

    settings, fit = fitting.fitted(config, overrides, vram, ready)
    if launcher.leads():
        show(fitting.verdict(vram, fit))
    return settings, fit.facts


@app.command()
@A_CONFIG
@click.option("--fresh", is_flag=True, help="Start over; what the run folder holds of this run is deleted.")
@click.option("--change", is_flag=True, help="Go on with other settings or files than the run began with.")
@click.option("--quiet", is_flag=True, help="Print nothing but the result.")
@VRAM
def train(config: str, overrides: tuple[str, ...], fresh: bool, change: bool, quiet: bool, vram: float | None) -> None:
    """Train CONFIG, a path or a name such as flow_grpo/shapes-sd3. The same command again resumes."""
    from diffalign.runs.folder import open_run

    settings, _ = _settings(config, overrides, vram)
    folder = open_run(settings, fresh, change) if launcher.leads() else None  # refused before torch is imported
    if launcher.leads() and not quiet:  # torch takes seconds to import
        click.echo(
            f"{settings.rule['name']} on {settings.model}, {settings.updates} updates, {settings.run_dir}; loading",
            err=True,
        )
    from diffalign.runs import session

    summary = session.train(settings, fresh=fresh, change=change, quiet=quiet, folder=folder)
    if launcher.leads():
        show([*summary.gains(), session.adapter_file(settings)])


@app.command()
@click.argument("target", metavar="RUN|ADAPTER|MODEL")
@click.option("--prompt", "prompts", multiple=True, help="A caption; may be given several times.")
@click.option("--prompts", "file", type=Place(), help="A file of captions, one a line, or JSON lines.")
@click.option("-n", "count", type=click.IntRange(1, 10_000), default=4, show_default=True, help="Pictures a caption.")
@A_CALL
@click.option("--negative", help="What guidance leads away from; needs a guidance above 1.")
@click.option("--strength", type=Number(-100, 100), default=1.0, show_default=True, help="Of the adapter.")
@click.option(
    "--adapter",
    "more",
    multiple=True,
    metavar="PLACE[:STRENGTH]",
    help="A further adapter, or a LoRA file of another tool; several times.",
)
@click.option(
    "--mix",
    type=click.Choice(("weights", "predictions")),
    default="weights",
    show_default=True,
    help="How several adapters act: at once, or each by itself and what they predict is added, a call for each and one without.",
)
@click.option(
    "--negative-adapter", "away", metavar="PLACE[:STRENGTH]", help="An adapter on what guidance leads away from."
)
@click.option(
    "--best-of", type=click.IntRange(1, 10_000), help="Draw so many a caption and keep the best -n; needs --by."
)
@click.option("--by", metavar="REWARD", help="What --best-of chooses by.")
@click.option("--base", is_flag=True, help="Also draw without adapters, from the same seeds.")
@click.option("--fps", type=click.IntRange(1, 240), help="Frames per second of videos; else the model's, or 16.")
@click.option("--out", type=Place(file_okay=False), default="samples", show_default=True, help="Where to write.")
def sample(
    target: str, strength: float, more: tuple[str, ...], arguments: tuple[str, ...], by: str | None, **asked: Any
) -> None:
    """Write pictures or videos, a grid and an index page from a run, an adapter or a model."""
    from diffalign.runtime.display import Display
    from diffalign.sampling import pictures, sources

    pictures.check_best(asked["count"], asked["best_of"], by is not None)
    texts = pictures.captions(asked.pop("prompts"), asked.pop("file"))
    resolved = sources.resolve(target, strength, more, asked.pop("away"), asked.pop("mix"))
    source = sources.with_options(resolved, arguments, asked.pop("precision"), asked.pop("quantize"))
    if source.quantize != "none":  # before it is said what it would be drawn on
        sources.check(source)
    if source.remark:
        click.echo(source.remark, err=True)
    judge = None
    if by is not None:
        from diffalign.rewards import picking

        judge = picking.judge(by, asked["fps"] or source.fps)
    with Display() as display:
        drawn = pictures.sample(source, texts, asked.pop("count"), **asked, judge=judge, progress=display.doing)
    show(map(pictures.label, drawn))


@app.command()
@A_CONFIG
@click.option("--preview", type=Place(dir_okay=False, path_type=Path), help="A picture of samples; loads weights.")
@click.option("--card", help="By name, such as 4090: its memory for --vram, and a bound of time on its peak.")
@VRAM
def plan(config: str, overrides: tuple[str, ...], preview: Path | None, card: str | None, vram: float | None) -> None:
    """Say what one update of CONFIG does and costs, and with --vram first whether it fits; loads no weights."""
    if preview is not None:
        settings, _ = _settings(config, overrides, vram)  # a mistake is told before torch is imported
        from diffalign.planning import preview as previews

        show(previews.write(settings, preview))
        return
    from diffalign.planning import cards

    named = None if card is None else cards.find(card)
    settings = configs.load(config, overrides, ready=False)  # a mistake is told before torch is imported
    from diffalign.planning import architectures, bounds, cost

    if named is not None and vram is None and architectures.name_of(settings.model) is not None:
        vram = named.memory
    known = None
    if vram is not None:
        settings, known = _settings(config, overrides, vram, ready=False)
    show(cost.count(settings, known).lines(bounds.bound(settings, named), told=known is not None))


@app.command()
@A_CONFIG
@click.option("--endpoint", required=True, help="OpenAI-compatible address, such as http://localhost:8000/v1.")
@click.option("--model", required=True, help="The language model's name there.")
@click.option("--out", required=True, type=Place(dir_okay=False), help="File for prompts.stages; it may exist.")
@click.option("--count", type=click.IntRange(2, 100), default=3, show_default=True, help="Stages a prompt.")
@click.option("--key", envvar="OPENAI_API_KEY", show_envvar=True, help="Sent as a bearer token.")
def stages(config: str, overrides: tuple[str, ...], out: str, **asked: Any) -> None:
    """Ask a language model for stage prompts of CONFIG's training and evaluation prompts."""
    from diffalign.prompts import stage_writer

    written = stage_writer.write(configs.load(config, overrides).book.entries, Path(out), say=click.echo, **asked)
    show([f"{out}: {written} asked for; use prompts.stages={out}"])


@app.command("serve-reward")
@click.argument("name")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen at.")
@click.option("--port", type=click.IntRange(0, 65535), default=8090, show_default=True, help="0: any free one.")
@click.option("--token", envvar="DIFFALIGN_REWARD_TOKEN", show_envvar=True, help="What clients must send.")
@click.option(
    "--max-mib",
    type=click.IntRange(1, 2**14),
    default=64,
    show_default=True,
    help="Largest request, as sent and as decoded.",
)
def serve_reward(name: str, host: str, port: int, token: str | None, max_mib: int) -> None:
    """Serve the reward NAME over HTTP; a config then names it http://HOST:PORT/score."""
    from diffalign.rewards import catalog

    catalog.known(name, "serve-reward")  # refused before torch is imported
    from diffalign.rewards import server

    server.serve(name, host, port, token, max_mib * 2**20)


@app.command()
@A_CONFIG_OR_NONE
@click.option("--card", is_flag=True, help="Also try the CUDA device's kernels against float32, a process each.")
def doctor(config: str | None, overrides: tuple[str, ...], card: bool) -> None:
    """Report versions, devices and optional parts, with the command that mends each.

    Of a CONFIG also whether its model was distilled to few steps, measured on samples of its own; loads weights.
    """
    settings = None if config is None else configs.load(config, overrides)
    from diffalign.doctor import examine

    show(findings := examine(card))
    if settings is not None:
        from diffalign.runs import distilled

        show([f"{settings.model:20} {distilled.examined(settings, click.echo)}"])
    if any(finding.broken for finding in findings):
        raise Fault("something does not work; see the lines with an arrow")


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run a command and leave with its exit code."""
    forgive()
    stopped, before = _noticed()
    try:
        app(arguments, prog_name="diffalign", standalone_mode=False)
    except UserError as error:
        fail(2, *error.problems)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.ctx.get_help() if error.ctx else str(error))
    except click.NoSuchOption as error:
        hint = configs.settings_for(error.option_name)
        fail(2, f"No such option {error.option_name}{hint}" if hint else error.format_message())
    except click.ClickException as error:
        fail(2, shortened(error.format_message(), LONGEST))
    except Interrupted as error:
        fail(error.code, str(error))
    except Fault as error:
        fail(3, str(error), at_once=isinstance(error, CardFailed))
    except (click.Abort, KeyboardInterrupt):  # before RuntimeError, which click's is
        fail(130, "interrupted", at_once=True)
    except OSError as error:  # a full disk, a folder where a file should go
        fail(3, f"{error.filename or 'files'}: {error.strerror or error}")
    except Exception as error:
        _unforeseen(error, stopped)
        raise
    finally:
        if before is not None:
            signal.signal(signal.SIGINT, before)
    _leave(0)


def _unforeseen(error: Exception, stopped: list[int]) -> None:
    """Leave if an error is what Ctrl-C did to an import, or a card that failed."""
    if stopped:
        fail(130, "interrupted", at_once=True)
    if not isinstance(error, RuntimeError):
        return
    from diffalign.runtime.memory import card_failed, card_fault

    if card_fault(error):
        fail(3, str(card_failed(error)), at_once=True)


def _noticed() -> tuple[list[int], Any]:
    """What grows with every Ctrl-C that no run listens for: libraries turn some into errors of their own; and what listened before, None if
    it goes on to."""
    seen: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        seen.append(number)
        raise KeyboardInterrupt

    if (
        threading.current_thread() is threading.main_thread()
        and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    ):
        return seen, signal.signal(signal.SIGINT, note)
    return seen, None


def fail(code: int, *lines: str, at_once: bool = False) -> NoReturn:
    """Print one line a problem and leave."""
    for line in (" ".join(line.splitlines()) for line in lines):
        click.echo(f"diffalign: {line}" if not line.startswith("  ") else line, err=True)
    _leave(code, at_once)


def _leave(code: int, at_once: bool = False) -> NoReturn:
    """End with a code. One of several processes ends at once: with everything done, gloo's threads sometimes abort an interpreter that
    takes itself apart (seen in about 1 of 10 runs of torch 2.15.0), and the launcher takes that for a failure."""
    # And so does one in which a thread goes on that nobody waits for, such as a reward's.
    pools = ("ThreadPoolExecutor", "reward ")  # these end by themselves
    threads = [t for t in threading.enumerate() if t is not threading.main_thread() and not t.daemon]
    stuck = [t for t in threads if not t.name.startswith(pools)]
    if stuck and not at_once:
        atexit._run_exitfuncs()
    if launcher.several() or stuck or at_once:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
