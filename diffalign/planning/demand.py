"""What a run takes of a card's memory: counted by phase, from what one row of the network and one decoded sample take.

Everything here is arithmetic on `Facts`, which do not depend on how memory is used: settings are tried out without counting again.
"""

from __future__ import annotations

from dataclasses import dataclass

from diffalign.config import Config
from diffalign.models.encodings import MEMORY_BYTES
from diffalign.planning.facts import Facts
from diffalign.rewards.catalog import find
from diffalign.runtime.precision import PRECISIONS, QUANTIZED
from diffalign.types import Term

GIB = 2**30
CONTEXT = 1.0 * GIB  # the driver's context, kernels, and what the allocator cannot use between tensors


@dataclass(frozen=True)
class Demand:
    """Bytes by what takes them, in each phase of a run; what the device must have is the largest phase's sum."""

    phases: dict[str, dict[str, float]]

    @property
    def largest(self) -> str:
        """The phase that takes the most."""
        return max(self.phases, key=lambda phase: sum(self.phases[phase].values()))

    @property
    def total(self) -> float:
        """Bytes that the device must have."""
        return sum(self.phases[self.largest].values())

    def lines(self, told: bool = False) -> list[str]:
        """A report; told: what the largest phase takes was said before."""
        others = [f"{phase} {sum(p.values()) / GIB:.1f}" for phase, p in self.phases.items() if phase != self.largest]
        most = f"{self.total / GIB:.1f} GiB, counted, not measured, the most while {self.largest}: {self.parts}"
        return (
            [f"memory      {', '.join(others)}"]
            if told
            else [f"memory      {most}", f"            {', '.join(others)}"]
        )

    @property
    def parts(self) -> str:
        """What the largest phase is made of, in GiB; what is less than 0.05 is left out."""
        most = {name: taken / GIB for name, taken in self.phases[self.largest].items() if taken >= 0.05 * GIB}
        return ", ".join(f"{name} {taken:.1f}" for name, taken in most.items())


def demand(config: Config, facts: Facts) -> Demand:
    """What a run with a config takes."""
    memory, width = config.memory, PRECISIONS[config.precision]
    packed = QUANTIZED.get(memory.quantize, width)
    encoders, context = {"text encoders": facts.encoders * width}, {"context": CONTEXT}
    texts = len(config.book.texts) + 1
    here = {
        "denoiser": facts.linear * packed + facts.other * width,
        "autoencoder": facts.decoder * width,
        "encoded prompts": min(texts * facts.encoded * width, MEMORY_BYTES),
        **({} if config.prompts.cache is not None else encoders),
    }
    trained = PRECISIONS["float32"] * facts.trained
    training, evaluating = judges(config)
    # Off the device between uses they come one at a time; through a reward's gradient all of them are asked at once.
    offloaded = memory.judges == "offloaded"
    always = 0.0 if offloaded else sum((training | evaluating).values())
    scoring, judging = (max(each.values(), default=0.0) if offloaded else always for each in (training, evaluating))
    learning = max(always, sum(training.values()) if facts.plan.pathwise else 0.0)
    # A gradient is there in training alone.
    rest = {"what is trained": trained * (facts.copies - 1)}
    plain, term = _recorded(config, facts)  # a term's own recording is what a term takes: it is not there twice
    quiet = {"recorded calls": plain + term, "network and decoder": _quiet(config, facts, bool(plain))}
    graph = {"what is trained": trained * facts.copies, "recorded calls": plain, "graph": _graph(config, facts)}

    phases = {
        "sampling": {**here, **rest, **quiet, "rewards": scoring, **context},
        "training": {**here, **graph, "rewards": learning, **context},
    }
    if config.evaluation.enabled:
        phases["evaluating"] = {**here, **rest, **quiet, "rewards": judging, **context}
    if config.prompts.cache is not None and memory.encode_on == "device":
        phases["encoding"] = {**encoders, **context}
    return Demand(phases)


def judges(config: Config) -> tuple[dict[str, float], dict[str, float]]:
    """Bytes of learned rewards' networks, by network: those asked in training, and those that judge evaluations; one that does both is
    there once."""
    narrow = config.memory.judge_precision == "bfloat16"
    training, evaluating = {}, {}
    for name in dict.fromkeys([*config.rewards, *config.eval_rewards]):
        entry = find(name)
        own, network = narrow and entry.differentiable and not entry.narrow, entry.network
        if name in config.rewards:
            training[f"{network} in bfloat16" if own else network] = entry.memory * GIB / (2 if own else 1)
        if config.evaluation.enabled:
            evaluating[network] = entry.memory * GIB
    return training, evaluating


def _recorded(config: Config, facts: Facts) -> tuple[float, float]:
    """Bytes that recorded calls hold all the time (see `models.graphs`): the network's without a graph, with the adapter and for a
    reference without it; and one with, which spans that run again whole have no use for."""
    if config.speed not in ("auto", "graphs") or config.memory.shard != "none":
        return 0.0, 0.0
    rows = facts.rows * config.micro_batch
    plain = rows * facts.row.quiet * (1 + config.make_rule().needs.reference)
    step = {"none": facts.row.plain.peak, "blocks": facts.row.blocks.peak}.get(config.checkpoint, 0.0)
    return plain, rows * step


def _quiet(config: Config, facts: Facts, recorded: bool) -> float:
    """Bytes that a micro-batch takes at once without a graph, in the network or the decoder; a recorded network takes none."""
    samples = config.micro_batch
    decoded = samples if config.memory.decode == "whole" else 1
    # A decoded batch stays whole: three numbers a pixel are nothing beside the decoder's own.
    network = 0.0 if recorded else facts.rows * facts.row.quiet * samples
    return max(network, facts.decode.quiet * decoded)


def _graph(config: Config, facts: Facts) -> float:
    """Bytes that the largest term of a micro-batch takes at once."""
    blocks, spans = config.checkpoint in ("blocks", "both"), config.checkpoint in ("spans", "both")
    step, last = (part.blocks if blocks else part.plain for part in (facts.row, facts.decode))
    kept = 0.0 if spans else step.kept  # whole calls that run again keep next to nothing
    alone = 0.0 if spans else last.kept

    def held(term: Term) -> float:
        if term.through != "reward":
            return facts.rows * step.peak
        span = term.stop - term.start
        call = facts.rows * (step.peak - kept) if span else 0.0
        # Every step's graph is there while the decoder's, or the last step's, is taken a gradient of.
        return span * kept * facts.rows + max(call, last.peak, alone)

    return max(held(term) for terms in facts.plan.updates for term in terms) * config.micro_batch
