"""The config: a typed schema, YAML plus `key=value`, all mistakes reported together before torch is imported."""

from __future__ import annotations

import copy
import difflib
import importlib.util
import itertools
import json
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from diffalign.errors import UserError, one_line
from diffalign.models.notes import LORA, lora_folder, lora_notes
from diffalign.processes import PROCESSES
from diffalign.prompts import files as prompt_files
from diffalign.prompts.sets import has_splits
from diffalign.rewards import catalog
from diffalign.rules import RULES
from diffalign.runtime.files import HUB_ID, is_file
from diffalign.shapes import models
from diffalign.shapes.captions import SPLITS, TASKS
from diffalign.types import UpdateRule

Task = Literal["single_object", "two_object", "counting", "colors", "position", "color_attr"]
Split = Literal["train", "validation", "test"]
assert (Task.__args__, Split.__args__) == (TASKS, SPLITS)  # type: ignore[attr-defined]


LARGEST = 100_000  # samples per update

Decay = Annotated[float, Field(ge=0, lt=1)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class PromptsConfig(_Section):
    """What is drawn in training."""

    source: str = Field(
        "shapes", description="shapes, shapes-motion, geneval-like, animals, a .txt or .jsonl file, or NAME@PLACE"
    )
    tasks: list[Task] = Field([], description="of shapes and geneval-like; empty: all six")
    split: Split = Field("train", description="of a named set; splits share no combination")
    stages: str | None = Field(
        None,
        description="what the sampler is told on stretches of the chain: 'shapes', or a .jsonl file of prompts with `stages` "
        "(see diffalign stages); rewards see the prompt itself",
    )
    stretches: list[int] | None = Field(None, description="first steps of the stretches; null: of equal length")
    cache: str | None = Field(
        None,
        min_length=1,
        description="folder for encoded prompts, for any number of runs; the text encoders then leave memory. null: neither",
    )
    cache_gib: float = Field(20.0, gt=0, description="what the cache may take on disk; the least recently used go")
    groups: int = Field(4, ge=1, le=LARGEST, description="prompts per update")
    group_size: int = Field(16, ge=1, le=LARGEST, description="samples per prompt")


class SamplerConfig(_Section):
    """How trajectories are sampled, in training and evaluation."""

    process: str = Field("flow_sde", description="how a step follows from a prediction")
    noise_level: float = Field(0.7, ge=0, le=100, description="a of flow_sde, eta of dance_sde and ddim")
    steps: int = Field(10, ge=2, le=1000)
    guidance_scale: float | None = Field(1.0, ge=0, description="null: not passed on, the pipeline's own default")
    sigmas: Literal["pipeline", "linear"] = Field("pipeline", description="noise levels: the scheduler's, or even")
    pipeline_args: dict[str, Any] = Field(
        {}, description="further arguments of the pipeline's call: height, width, ..."
    )


class LoraSection(_Section):
    """What is trained."""

    rank: int = Field(16, ge=1, le=4096)
    alpha: float = Field(32.0, gt=0)
    targets: list[str] | None = Field(None, min_length=1, description="layer names; null: attention and feed-forward")
    start: str | None = Field(
        None, description="folder of a run or adapter to go on from; null: begin at the base model"
    )


class OptimizerConfig(_Section):
    """AdamW and what surrounds its step."""

    lr: float = Field(3e-4, gt=0, le=10)
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    weight_decay: float = Field(1e-4, ge=0)
    max_grad_norm: float = Field(1.0, gt=0)
    ema: float | None = Field(None, ge=0, lt=1, description="decay per update of averaged weights: evaluated and saved")
    micro_batch: int = Field(16, ge=1, description="samples per forward pass, in sampling and training alike")
    gradient_checkpointing: bool = Field(
        False,
        description="keep only the inputs of each network call, of the decoder and of a reward's layers; they run again for the gradient",
    )


class EvaluationConfig(_Section):
    """The fixed set that is scored before and after, with the same noises."""

    source: str | None = Field(None, description="null: prompts.source")
    holdout: float = Field(
        0.1,
        ge=0,
        lt=1,
        description="share of a file's prompts that is evaluated and not trained on, where source is null; 0, or fewer than 6 "
        "prompts: trained on and evaluated alike",
    )
    tasks: list[Task] | None = Field(None, description="null: prompts.tasks")
    split: Split = "test"
    stages: bool = Field(
        False, description="sample with stage prompts too; false: as others will, with the prompt alone"
    )
    prompts: int | None = Field(None, ge=1, description="at most so many of them, evenly spread; null: all")
    images_per_prompt: int = Field(4, ge=1)
    every: int = Field(0, ge=0, description="updates between evaluations; 0: before and after only")
    seed: int = 1234
    enabled: bool = True


class OutputConfig(_Section):
    """What is kept, and how often."""

    checkpoint_every: int = Field(10, ge=1, description="updates")
    keep: int = Field(2, ge=1, description="checkpoints kept")
    sample_every: int = Field(50, ge=1, description="updates between sample grids")
    samples: int = Field(24, ge=1, description="pictures in a grid")
    trackers: list[Literal["tensorboard", "wandb"]] = []


class ScoringConfig(_Section):
    """How rewards are asked, and when too many samples go without a score."""

    max_invalid: float = Field(
        0.05, ge=0, le=1, description="share of an update's or evaluation's samples without a score that stops the run"
    )
    invalid_in_a_row: int = Field(10, ge=1, description="updates in a row with such samples that stop the run")
    deadline: float = Field(
        300.0, gt=0, le=1e5, description="seconds a reward server has for a batch, retries included"
    )
    batch: int = Field(16, ge=1, description="samples in a request to a reward server")
    frames: str = Field(
        "all", pattern=r"^(first|middle|all|uniform:[1-9]\d*)$", description="of a video, for rewards that see pictures"
    )
    reduce: Literal["mean", "min"] = Field("mean", description="over those frames")


class Config(_Section):
    """A run: `model`, `rule`, `rewards` and everything around them."""

    model: str = Field(description="hub id, local folder, or an embedded pipeline")
    revision: str | None = Field(None, min_length=1, description="of a hub id: commit, tag or branch; null: the newest")
    weights: str | None = Field(
        None,
        description="a single file, as other tools save models: its denoiser and what else it holds take the place of the model's",
    )
    rule: dict[str, Any] = Field(description="name and the rule's settings")
    rewards: dict[str, float] = Field(min_length=1, description="name: weight")
    eval_rewards: list[str] = []
    prompts: PromptsConfig = PromptsConfig()  # type: ignore[call-arg]
    sampler: SamplerConfig = SamplerConfig()  # type: ignore[call-arg]
    lora: LoraSection = LoraSection()  # type: ignore[call-arg]
    optimizer: OptimizerConfig = OptimizerConfig()  # type: ignore[call-arg]
    evaluation: EvaluationConfig = EvaluationConfig()  # type: ignore[call-arg]
    scoring: ScoringConfig = ScoringConfig()  # type: ignore[call-arg]
    output: OutputConfig = OutputConfig()  # type: ignore[call-arg]
    updates: int = Field(100, ge=1, le=10_000_000)
    seed: int = Field(0, ge=0, lt=2**63)
    run_dir: str = Field(min_length=1)
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["float32", "bfloat16", "float16"] = Field("float32", description="of the frozen base model")
    attention: Literal["native", "xformers"] = Field(
        "native", description="native: torch's own; xformers: its memory-efficient one, on CUDA"
    )

    @property
    def samples_per_update(self) -> int:
        return self.prompts.groups * self.prompts.group_size

    def make_rule(self) -> UpdateRule:
        """The rule with its settings."""
        kind: Any = RULES[self.rule["name"]]
        return kind(kind.Settings(**{k: v for k, v in self.rule.items() if k != "name"}))

    def training_prompts(self) -> list[prompt_files.Entry]:
        found = prompt_files.read(self.prompts.source, self.prompts.tasks, self.prompts.split)
        return prompt_files.held_out(found, self.evaluation.holdout)[0] if self._one_file else found

    @property
    def _one_file(self) -> bool:
        """Whether training and evaluation prompts are of one source that has no splits of its own."""
        return self.evaluation.enabled and self.evaluation.source is None and not has_splits(self.prompts.source)

    def training_stages(self) -> prompt_files.Stages:
        """Stage prompts of the training prompts; empty without."""
        stages = self.prompts.stages
        return {} if stages is None else prompt_files.read_stages(stages, self.training_prompts())

    def evaluation_stages(self) -> prompt_files.Stages:
        """Stage prompts of the evaluation prompts; empty without."""
        stages = self.prompts.stages if self.evaluation.stages else None
        return {} if stages is None else prompt_files.read_stages(stages, self.evaluation_prompts())

    def stretches(self) -> tuple[int, ...]:
        """First steps of the stretches that stage prompts tell apart."""
        if self.prompts.stretches is not None:
            return tuple(self.prompts.stretches)
        count = len(next(iter(self.training_stages().values()), ("",)))
        return tuple(k * self.sampler.steps // count for k in range(count))

    def evaluation_prompts(self) -> list[prompt_files.Entry]:
        source = self.evaluation.source or self.prompts.source
        tasks = self.prompts.tasks if self.evaluation.tasks is None else self.evaluation.tasks
        found = prompt_files.read(source, tasks, self.evaluation.split)
        if self._one_file:
            found = prompt_files.held_out(found, self.evaluation.holdout)[1]
        most = min(self.evaluation.prompts or len(found), len(found))
        return [found[k * len(found) // most] for k in range(most)]


def folders() -> list[Path]:
    """Where configs are looked for by name: the checkout's, then the installed package's."""
    package = Path(__file__).parent.parent
    return [package.parent / "configs", package / "_configs"]


def find(name: str) -> Path:
    """The file of a config given as a path or as a name such as `flow_grpo/shapes-sd3`.

    Raises:
        UserError: with the nearest name there is.
    """
    inside = name.removeprefix("configs/").removesuffix(".yaml") + ".yaml"
    for path in (Path(name), *(folder / inside for folder in folders())):
        if is_file(path):
            return path
    known = sorted(str(p.relative_to(f).with_suffix("")) for f in folders() for p in f.rglob("*.yaml"))
    near = difflib.get_close_matches(inside.removesuffix(".yaml"), known, 1)
    hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(known)}, or a path to a YAML file"
    raise UserError(f"config: no file {name!r}; {hint}")


def load(name: str, overrides: list[str] | tuple[str, ...] = ()) -> Config:
    """Read a config, apply `key=value` overrides and check everything that can be checked without torch.

    Raises:
        UserError: with every mistake found.
    """
    raw = _read(name)
    problems = [problem for override in overrides if (problem := _override(raw, override))]
    return validate(raw, problems)


def rule_of(name: str, settings: list[str]) -> dict[str, Any]:
    """The rule of a config with some settings changed by `key=value`, not yet checked.

    Raises:
        UserError: if the config has none, or a setting is not `key=value`.
    """
    raw = _read(name)
    problems = [problem for setting in settings if (problem := _override(raw, f"rule.{setting}"))]
    if not isinstance(raw.get("rule"), dict):
        problems.append(f"config: {name} has no rule")
    if problems:
        raise UserError(*problems)
    return raw["rule"]


def _read(name: str) -> dict[str, Any]:
    """A config file as plain data."""
    path = find(name)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"config: cannot read {path}: {one_line(error)}") from error
    raw = _parse(text, str(path))
    if not isinstance(raw, dict):
        raise UserError(f"config: {path} holds {type(raw).__name__}, expected keys and values")
    if strange := [key for key in raw if not isinstance(key, str)]:
        raise UserError(f"config: {path}: keys must be words, got {', '.join(map(repr, strange))}")
    raw.setdefault("run_dir", f"runs/{path.parent.name}/{path.stem}")
    return raw


def _parse(text: str, where: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}" if mark else ""
        raise UserError(f"config: {where}{line}: not YAML ({getattr(error, 'problem', error)})") from error


def _override(raw: dict[str, Any], text: str) -> str | None:
    """Apply one `section.key=value`; a mapping replaces, it does not merge."""
    name, equals, value = text.partition("=")
    if not equals or not all(name.split(".")):
        return f"override: got {text!r}, expected key=value"
    *sections, last = name.split(".")
    place = raw
    for section in sections:
        place = place.setdefault(section, {})
        if not isinstance(place, dict):
            return f"override: {name}: {section} is not a section"
    try:
        place[last] = _parse(value, f"override {name}")
    except UserError as error:
        return error.problems[0]  # beside the other mistakes
    return None


def validate(raw: dict[str, Any], problems: list[str] | None = None) -> Config:
    """A config from plain data.

    Raises:
        UserError: with every mistake found.
    """
    found = list(problems or [])
    rule = raw.get("rule")
    before = len(found)
    settings = _check_rule(rule, found)
    whole = len(found) == before
    try:
        config = Config(**raw)
    except ValidationError as error:
        own = [item for item in error.errors() if item["loc"][0] != "rule" or rule is None]
        found += [_explain(item, Config) for item in own]
        # Look at the rest with the broken keys at their defaults, so that all mistakes come at once.
        try:
            config = Config(**_without(raw, [item["loc"] for item in error.errors()]))
        except ValidationError:
            raise UserError(*found) from None
    if settings is not None:
        found += _check_together(config, settings)
        if whole and hasattr(settings, "problems"):  # with keys left out, what it says about them is not so
            found += settings.problems(config.sampler.steps)
    found += _check_names(config)
    if found:
        raise UserError(*found)
    return config


def _check_rule(rule: Any, found: list[str]) -> BaseModel | None:
    if not isinstance(rule, dict):
        if rule is not None:
            found.append(f"rule: got {rule!r}, expected a mapping with a name, such as {{name: flow_grpo}}")
        return None
    name = rule.get("name")
    if not isinstance(name, str) or name not in RULES:
        found.append(f"rule.name: got {name!r}, allowed are {', '.join(RULES)}{_near(str(name), RULES)}")
        return None
    settings = RULES[name].Settings
    given = {str(k): v for k, v in rule.items() if k != "name"}
    try:
        return settings(**given)
    except ValidationError as error:
        found += [_explain(item, settings, "rule.") for item in error.errors()]
        return settings(**_without(given, [item["loc"] for item in error.errors()]))


def _without(raw: dict[str, Any], locations: list[tuple[Any, ...]]) -> dict[str, Any]:
    """A copy of nested data that lacks the values at some places."""
    copied = copy.deepcopy(raw)
    for location in locations:
        # One wrong entry spoils its whole list.
        names = list(itertools.takewhile(lambda part: isinstance(part, str), location))
        place: Any = copied
        for part in names[:-1]:
            place = place.get(part) if isinstance(place, dict) else None
        if isinstance(place, dict):
            place.pop(names[-1], None)
    return copied


def _near(name: str, known: Any) -> str:
    near = difflib.get_close_matches(name, list(known), 1)
    return f"; did you mean {near[0]}?" if near else ""


def _fields(model: Any, location: tuple[Any, ...]) -> list[str]:
    """Field names of the section an error points into."""
    for part in location:
        annotation = model.model_fields[part].annotation if part in getattr(model, "model_fields", {}) else None
        sections = [
            kind for kind in (annotation, *get_args(annotation)) if hasattr(kind, "model_fields")
        ]  # or X | None
        if not sections:
            break
        model = sections[0]
    return list(model.model_fields)


def _explain(item: Any, model: Any, prefix: str = "") -> str:
    location = tuple(item["loc"])
    where = prefix + ".".join(str(part) for part in location)
    if item["type"] == "extra_forbidden":
        fields = _fields(model, location[:-1])
        return f"{where}: unknown key{_near(str(location[-1]), fields) or '; known are ' + ', '.join(fields)}"
    if item["type"] == "missing":
        return f"{where}: missing"
    if item["type"] == "tuple_type":
        return f"{where}: got {item['input']!r}, allowed is a list such as [0, 3]"
    if item["type"] == "too_short":
        return f"{where}: got {item['input']!r}, allowed is at least {item['ctx']['min_length']} entry"
    message = item["msg"].removeprefix("Value error, ")
    message = message[0].lower() + message[1:]
    return f"{where}: got {item['input']!r}, {message.replace('input should be', 'allowed is')}"


def _check_model(name: str) -> list[str]:
    """An embedded name, a folder that diffusers wrote, or something that can be a hub id."""
    if models.path(name) or is_file(Path(name) / "model_index.json") or HUB_ID.fullmatch(name):
        return []
    if is_file(Path(name)):
        return [
            f"model: got {name!r}, a single file; allowed is the hub id or folder of the model it was made from, and weights: {name}"
        ]
    known = ", ".join(models.names())
    allowed = f"allowed are embedded pipelines ({known}), folders with a model_index.json, hub ids (owner/name)"
    return [f"model: got {name!r}, {allowed}{_near(name, models.names())}"]


def _check_names(config: Config) -> list[str]:
    problems = _check_model(config.model)
    if config.revision is not None and (models.path(config.model) or Path(config.model).exists()):
        problems.append(
            f"revision: got {config.revision!r}, only models on the hub have one; {config.model} is a folder"
        )
    entries: list[list[prompt_files.Entry]] = []
    for read in (config.training_prompts, config.evaluation_prompts):
        try:
            entries.append(read())
        except UserError as error:
            problems += [problem for problem in error.problems if problem not in problems]
    if config.weights is not None and not is_file(Path(config.weights)):
        problems.append(f"weights: got {config.weights!r}, no file there; allowed is a .safetensors or .ckpt file")
    problems += _check_start(config)
    problems += _check_rewards(config, entries)
    if not problems:
        problems += _check_stages(config)
    if config.attention == "xformers" and importlib.util.find_spec("xformers") is None:
        problems.append("attention: xformers is not installed; pip install 'diffalign[xformers]', or allowed is native")
    for name in config.output.trackers:
        if importlib.util.find_spec(name) is None:
            problems.append(f"output.trackers: {name} is not installed; pip install 'diffalign[trackers]'")
    if config.rewards and not any(config.rewards.values()):
        problems.append(f"rewards: got only zero weights {config.rewards}, allowed is at least one other")
    return problems


def _check_start(config: Config) -> list[str]:
    """An adapter to go on from that is there, whole, and of the same model."""
    if config.lora.start is None:
        return []
    folder = lora_folder(config.lora.start)
    if folder is None:
        return [f"lora.start: got {config.lora.start!r}, no {LORA} there; allowed is a run's or adapter's folder"]
    try:
        base = lora_notes(folder).get("base_model", config.model)
    except ValueError as error:
        return [f"lora.start: {error}"]
    return (
        [] if base == config.model else [f"lora.start: {folder} belongs to {base}, the run's model is {config.model}"]
    )


def _check_rewards(config: Config, entries: list[list[prompt_files.Entry]]) -> list[str]:
    """Rewards that are there, with what they import, for prompts that have what they need."""
    problems: list[str] = []
    for section, names in (("rewards", list(config.rewards)), ("eval_rewards", config.eval_rewards)):
        for name in names:
            try:
                entry = catalog.find(name)
            except LookupError as error:
                problems.append(f"{section}: {name}: {error}")
                continue
            place = entry.place
            if place is not None and not (
                Path(place).exists() or HUB_ID.fullmatch(place) or place.startswith(("http://", "https://"))
            ):
                problems.append(f"{section}: {name}: {place} is not there; allowed is a file, a folder or a hub id")
            if entry.missing:
                problems.append(f"{section}: {name} needs {entry.missing}")
            if problem := entry.unfit(prompt for part in entries for prompt in part):
                suits = "shapes-motion" if "motion" in entry.needs else "shapes"
                problems.append(f"{section}: {name} {problem}; prompts.source: {suits} suits it")
    return problems


def _check_stages(config: Config) -> list[str]:
    """Stage prompts for every prompt, and as many stretches as stages."""
    given = config.prompts.stretches
    if config.prompts.stages is None:
        problems = [] if given is None else [f"prompts.stretches: got {given} without prompts.stages"]
        if config.evaluation.stages:
            problems.append("evaluation.stages: got true without prompts.stages")
        return problems
    try:
        counts = {len(texts) for texts in (*config.training_stages().values(), *config.evaluation_stages().values())}
    except UserError as error:
        return list(error.problems)
    if len(counts) > 1:
        return [f"prompts.stages: got {min(counts)} to {max(counts)} stages a prompt; allowed is one number for all"]
    steps, count = config.sampler.steps, counts.pop()
    if count > steps:
        return [f"prompts.stages: got {count} stages, allowed are up to sampler.steps ({steps})"]
    if given is None or (
        given[:1] == [0] and sorted(set(given)) == given and given[-1] < steps and len(given) == count
    ):
        return []
    return [
        f"prompts.stretches: got {given}, allowed are {count} rising steps from 0 to less than sampler.steps ({steps})"
    ]


def _check_together(config: Config, settings: Any) -> list[str]:
    """Combinations that cannot work, each with the way out."""
    problems: list[str] = []
    sampler, name = config.sampler, config.rule["name"]
    needs = RULES[name](settings).needs
    stochastic = ", ".join(key for key, process in PROCESSES.items() if process.stochastic)
    if sampler.process not in PROCESSES:
        near = _near(sampler.process, PROCESSES)
        problems.append(f"sampler.process: got {sampler.process!r}, allowed are {', '.join(PROCESSES)}{near}")
    elif needs.stochastic_sampler and not (PROCESSES[sampler.process].stochastic and sampler.noise_level > 0):
        given = f"{sampler.process} with noise_level {sampler.noise_level:g}"
        problems.append(
            f"sampler.process: {name} needs a stochastic sampler, {given} has no noise; "
            f"allowed are {stochastic} with noise_level > 0"
        )
    elif sampler.noise_level > (highest := PROCESSES[sampler.process].highest):
        problems.append(f"sampler.noise_level: got {sampler.noise_level:g}, {sampler.process} allows 0 to {highest:g}")
    if config.samples_per_update > LARGEST:
        problems.append(
            f"prompts.group_size: got {config.samples_per_update} samples per update, allowed are {LARGEST} at most"
        )
    elif config.samples_per_update % config.optimizer.micro_batch:
        problems.append(
            f"optimizer.micro_batch: got {config.optimizer.micro_batch}, allowed are divisors of "
            f"prompts.groups * prompts.group_size = {config.samples_per_update}, so that replay and rollout agree"
        )
    if unknown := [name for name in getattr(settings, "gate", ()) if name not in config.rewards]:
        problems.append(f"rule.gate: got {unknown[0]!r}, allowed are rewards of this run: {', '.join(config.rewards)}")
    if config.prompts.group_size < 2 and needs.groups:
        problems.append("prompts.group_size: got 1, rewards are compared within a group; allowed is 2 or more")
    if config.prompts.groups % needs.bundle:
        problems.append(
            f"prompts.groups: got {config.prompts.groups}, allowed are multiples of rule.risk.bundle ({needs.bundle})"
        )
    if needs.differentiable_reward:
        problems += _differentiable(config)
    return problems


def _differentiable(config: Config) -> list[str]:
    able = ", ".join(name for name, entry in catalog.builtin().items() if entry.differentiable) or "none that ship"
    problems = []
    for name in config.rewards:
        try:
            differentiable = catalog.find(name).differentiable
        except LookupError:
            continue  # `_check_names` reports it
        if not differentiable:
            rule = config.rule["name"]
            problems.append(
                f"rewards: {rule} needs a differentiable reward, {name} is not; differentiable here: {able}"
            )
    return problems


def explained(config: Config) -> list[str]:
    """The resolved config as lines of YAML, each key with what it means."""
    values = config.model_dump(mode="json")
    rule = RULES[config.rule["name"]]
    values["rule"] = {"name": config.rule["name"], **config.make_rule().settings.model_dump(mode="json")}  # type: ignore[attr-defined]
    return _lines(values, Config, {"rule": rule.Settings}, "")


def _lines(values: dict[str, Any], model: Any, models: dict[str, Any], indent: str) -> list[str]:
    lines = []
    for key, value in values.items():
        field = model.model_fields.get(key)
        inner = models.get(key, getattr(field, "annotation", None))
        if isinstance(value, dict) and hasattr(inner, "model_fields"):
            lines += [f"{indent}{key}:", *_lines(value, inner, {}, indent + "  ")]
            continue
        about = getattr(field, "description", None)
        lines.append(f"{indent}{key}: {json.dumps(value, ensure_ascii=False)}" + (f"  # {about}" if about else ""))
    return lines


def dump(config: Config) -> str:
    """The resolved config as YAML."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """`key: old -> new` for every key that differs."""
    lines: list[str] = []
    for key in dict.fromkeys([*old, *new]):
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            lines += differences(a, b, f"{prefix}{key}.")
        elif a != b:
            lines.append(f"{prefix}{key}: {a!r} -> {b!r}")
    return lines
