"""The keys of a config: types, ranges, defaults and what they mean. Data only."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, PrivateAttr

from diffalign.config.decided import Decided
from diffalign.config.hardware import Attention, Checkpoint, MemorySection, Speed
from diffalign.config.kinds import ASKED, FREE, HELD, Decay, Precision
from diffalign.config.limits import BudgetConfig, GuardConfig
from diffalign.config.sampling import SamplerConfig
from diffalign.config.scoring import ScoringConfig
from diffalign.config.selecting import AllocateConfig, ScoutsConfig
from diffalign.prompts.book import Book
from diffalign.prompts.sets import SETS
from diffalign.rules import RULES, Rule
from diffalign.runtime.settings import Settings, factors
from diffalign.shapes.captions import SPLITS, TASKS

Task = Literal["single_object", "two_object", "counting", "colors", "position", "color_attr"]
Split = Literal["train", "validation", "test"]
assert (Task.__args__, Split.__args__) == (TASKS, SPLITS)  # type: ignore[attr-defined]


LARGEST = 100_000  # samples per update
USUAL = 16  # samples per forward pass


class PromptsConfig(Settings):
    """What is drawn in training."""

    model_config = ConfigDict(json_schema_extra=ASKED)

    source: str = Field("shapes", description=f"{', '.join(SETS)}, a file of prompts, or NAME@PLACE")
    tasks: list[Task] = Field([], description="of shapes and geneval-like; empty: all six")
    split: Split = Field("train", description="of a named set; splits share no combination")
    stages: str | None = Field(
        None,
        description="other texts for the sampler on stretches of the chain: shapes, or a .jsonl; rewards see the prompt",
    )
    stretches: list[int] | None = Field(None, description="first steps of the stretches; null: of equal length")
    cache: str | None = Field(
        None,
        min_length=1,
        description="folder for encoded prompts, for any number of runs; the text encoders then leave memory. null: neither",
        json_schema_extra=FREE,
    )
    cache_gib: float = Field(
        20.0, gt=0, description="what the cache may take on disk; the least recently used go", json_schema_extra=FREE
    )
    groups: int = Field(4, ge=1, le=LARGEST, description="prompts per update")
    group_size: int = Field(16, ge=1, le=LARGEST, description="samples per prompt")
    scouts: ScoutsConfig | None = Field(
        None,
        description="more seeds are tried in few steps, the best and worst sampled anew; null: none",
    )
    allocate: AllocateConfig | None = Field(
        None, description="more samples for prompts whose outcome is uncertain, as many in all; null: equal"
    )


class LoraSection(Settings):
    """What is trained."""

    model_config = ConfigDict(json_schema_extra=HELD)

    rank: int = Field(16, ge=1, le=4096, description="of each layer's change")
    alpha: float = Field(32.0, gt=0, description="the change is multiplied by alpha / rank")
    targets: list[str] | None = Field(None, min_length=1, description="layer names; null: attention and feed-forward")
    start: str | None = Field(
        None, description="run, adapter or LoRA file of another tool to go on from; null: begin at the base model"
    )
    frozen: list[str] = Field(
        [],
        description="adapters that are part of the base, PLACE or PLACE:STRENGTH; never trained or saved, such as a speed adapter",
    )


class OptimizerConfig(Settings):
    """AdamW and what surrounds its step."""

    model_config = ConfigDict(json_schema_extra=ASKED)

    lr: float = Field(
        3e-4, gt=0, le=10, description="learning rate, the highest of its schedule", json_schema_extra=factors(0.1, 10)
    )
    schedule: Literal["constant", "linear", "cosine"] = Field(
        "constant", description="what lr does after the warm-up: stays, or falls to 0 at the last update"
    )
    warmup: int = Field(0, ge=0, le=10_000_000, description="updates over which lr grows from 0")
    betas: tuple[Decay, Decay] = Field((0.9, 0.999), description="decays of Adam's two moments")
    weight_decay: float = Field(1e-4, ge=0, description="of LoRA's parameters, times lr")
    max_grad_norm: float = Field(1.0, gt=0, description="a longer gradient is shortened to this")
    ema: float | None = Field(
        None,
        ge=0,
        lt=1,
        description="decay per update of averaged weights: evaluated and saved",
        json_schema_extra=HELD,
    )
    micro_batch: Literal["auto"] | Annotated[int, Field(ge=1)] = Field(
        "auto",
        description="samples per forward pass; auto: timed on a card, elsewhere 16 or the next divisor below",
        json_schema_extra=FREE,
    )


class EvaluationConfig(Settings):
    """The fixed set that is scored before and after, with the same noises."""

    model_config = ConfigDict(json_schema_extra=HELD)

    source: str | None = Field(None, description="as prompts.source; null: that")
    holdout: float = Field(
        0.1,
        ge=0,
        lt=1,
        description="share of prompts.source's file evaluated and not trained on; 0: all for both, and so of few unless it is named",
    )
    tasks: list[Task] | None = Field(None, description="as prompts.tasks; null: those")
    split: Split = Field("test", description="of a named set")
    stages: bool = Field(
        False, description="sample with stage prompts too; false: as others will, with the prompt alone"
    )
    least: int = Field(
        8,
        ge=0,
        description="prompts of a file that are held out at least, where twice as many are there: fewer give no interval",
    )
    prompts: int | None = Field(128, ge=1, description="at most so many of them, evenly spread; null: all")
    images_per_prompt: int = Field(4, ge=1, description="samples of each, always from the same noises")
    every: int = Field(
        0, ge=0, description="updates between evaluations; 0: before and after only", json_schema_extra=FREE
    )
    seed: int = Field(1234, description="of those noises")
    enabled: bool = Field(True, description="false: nothing is judged before or after, and no gain is known")


class OutputConfig(Settings):
    """What is kept, and how often."""

    model_config = ConfigDict(json_schema_extra=FREE)

    checkpoint_every: int = Field(10, ge=1, description="updates between checkpoints")
    keep: int = Field(2, ge=1, description="checkpoints kept")
    sample_every: int = Field(50, ge=1, description="updates between sample grids")
    samples: int = Field(24, ge=1, description="pictures in a grid")
    trackers: list[Literal["tensorboard", "wandb", "trackio"]] = Field(
        [], description="where metrics go besides metrics.jsonl"
    )


class Config(Settings):
    """A run: `model`, `rule`, `rewards` and everything around them."""

    model_config = ConfigDict(json_schema_extra=HELD)

    model: str = Field(description="hub id, local folder, or an embedded pipeline", json_schema_extra=ASKED)
    revision: str | None = Field(
        None, min_length=1, description="of a hub id: commit, tag or branch; null: the newest", json_schema_extra=ASKED
    )
    weights: str | None = Field(
        None,
        description="a single file of another tool: its denoiser and what else it holds take the model's place",
        json_schema_extra=ASKED,
    )
    rule: dict[str, Any] = Field(description="how it learns: its name, and its settings", json_schema_extra=ASKED)
    rewards: dict[str, float] = Field(
        {}, description="what goes up, each with its weight; none with rule distil", json_schema_extra=ASKED
    )
    eval_rewards: list[str] = Field([], description="judged besides and never trained on; the first picks best/")
    prompts: PromptsConfig = PromptsConfig()  # type: ignore[call-arg]
    sampler: SamplerConfig = SamplerConfig()  # type: ignore[call-arg]
    lora: LoraSection = LoraSection()  # type: ignore[call-arg]
    optimizer: OptimizerConfig = OptimizerConfig()  # type: ignore[call-arg]
    memory: MemorySection = MemorySection()  # type: ignore[call-arg]
    evaluation: EvaluationConfig = EvaluationConfig()  # type: ignore[call-arg]
    guard: GuardConfig = GuardConfig()  # type: ignore[call-arg]
    scoring: ScoringConfig = ScoringConfig()  # type: ignore[call-arg]
    output: OutputConfig = OutputConfig()  # type: ignore[call-arg]
    updates: int = Field(100, ge=1, le=10_000_000, description="how long it trains", json_schema_extra=FREE)
    budget: BudgetConfig = BudgetConfig()  # type: ignore[call-arg]
    seed: int = Field(0, ge=0, lt=2**63, description="of every draw in training")
    run_dir: str = Field(
        min_length=1, description="the run's folder; left out: runs/FOLDER/NAME of the config", json_schema_extra=FREE
    )
    device: str = Field(
        "auto",
        pattern=r"^(auto|cpu|mps|cuda(:\d{1,3})?)$",
        description="auto: the first CUDA device, else Apple's, else the CPU",
        json_schema_extra={**FREE, "allowed": "auto, cpu, mps, cuda or cuda:N"},
    )
    precision: Precision = Field("float32", description="of the frozen base model", json_schema_extra=ASKED)
    attention: Attention = Field(
        "auto",
        description="native: torch's own; auto: that, unless one of its kernels is wrong on the card",
        json_schema_extra=ASKED,
    )
    speed: Speed = Field(
        "auto",
        description="on CUDA: plain, recorded (same bits, more memory), compiled (other bits); auto: by the clock",
        json_schema_extra=ASKED,
    )
    deterministic: Literal["auto"] | bool = Field(
        "auto",
        description="true: repeated or resumed runs give the same bits, slower on a card; auto: on the CPU",
        json_schema_extra=FREE,
    )

    @property
    def samples_per_update(self) -> int:
        return self.prompts.groups * self.prompts.group_size

    @property
    def scouts_per_update(self) -> int:
        return 0 if self.prompts.scouts is None else self.prompts.groups * self.prompts.scouts.pool

    def make_rule(self) -> Rule:
        """The rule with its settings."""
        kind: Any = RULES[self.rule["name"]]
        return kind(kind.Settings(**{k: v for k, v in self.rule.items() if k != "name"}))

    @property
    def micro_batch(self) -> int:
        """Samples per forward pass, decided without a device."""
        if self.optimizer.micro_batch != "auto":
            return self.optimizer.micro_batch
        return max(size for size in range(1, USUAL + 1) if self.divided % size == 0)

    @property
    def divided(self) -> int:
        """What a micro-batch divides: an update's samples, and where groups differ in size each group's, for none has two groups then."""
        allocate, whole = self.prompts.allocate, self.samples_per_update
        return whole if allocate is None else math.gcd(self.prompts.group_size, allocate.least, allocate.most)

    @property
    def checkpoint(self) -> Checkpoint:
        """What runs again for the gradient, decided."""
        if self.memory.checkpoint == "auto":
            return "both" if self.make_rule().needs.differentiable_reward else "blocks"
        return self.memory.checkpoint

    @property
    def reference(self) -> Literal["base", "start", "moving"]:
        """What a divergence pulls to, decided."""
        asked = self.rule.get("reference", "auto")
        if asked == "auto":
            return "base" if self.lora.start is None else "start"
        return asked

    @property
    def book(self) -> Book:
        """The run's prompts, as they were when the config was checked; only a checked config has them."""
        assert self._book is not None, "a config is made by config.load or config.validate"
        return self._book

    @property
    def decided(self) -> dict[str, Any]:
        """What its model decided of it, by dotted key."""
        return dict(self._decided.values)

    def decided_besides(self, keys: Iterable[str]) -> Decided:
        """The same without some keys, for a config in which these are decided otherwise."""
        return self._decided.besides(keys)

    @property
    def told(self) -> list[str]:
        """What a user is told of that."""
        return self._decided.told(self.model)

    _book: Book | None = PrivateAttr(None)
    _decided: Decided = PrivateAttr(default_factory=Decided)
