"""--vram: what is chosen fits by the count, is the cheapest that does, and changes nothing of an update's geometry."""

from functools import cache

import pytest
from click.testing import CliRunner

from diffalign import config
from diffalign.cli import app
from diffalign.errors import UserError
from diffalign.planning import demand, vram
from diffalign.planning.architectures import Held, Row
from diffalign.planning.demand import GIB
from diffalign.planning.facts import Facts, facts
from diffalign.types import Plan, Term
from tests.backends.test_hub_configs import CONFIGS

CARDS = (8, 12, 16, 24, 48, 80)
QUICK = ("flow_grpo/sd35-medium",)
KEPT = ("model", "rule", "prompts", "sampler", "lora", "rewards", "eval_rewards", "evaluation", "precision", "updates")
counted = cache(lambda name: facts(config.load(name)))


@pytest.fixture(autouse=True)
def once(monkeypatch):
    """A preset's facts do not depend on how memory is used: counted once."""
    names = {config.load(name).model_dump_json(include={"model", "rule"}): name for name in CONFIGS}
    monkeypatch.setattr(vram, "facts", lambda c: counted(names[c.model_dump_json(include={"model", "rule"})]))


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in QUICK else [pytest.mark.slow]) for n in CONFIGS])
def test_m16_what_is_chosen_fits_or_the_least_is_said(name):
    own = config.load(name)
    least = None
    for card in CARDS:
        try:
            settings, fit = vram.fitted(name, (), card)
        except UserError as error:
            least = float(error.problems[0].partition("takes ")[2].partition(" GiB")[0])
            assert least > card - 0.05
            continue
        assert least is None or card >= least - 0.05
        assert demand.demand(settings, fit.facts).total <= card * GIB
        assert settings.memory.counted == pytest.approx(fit.demand.total / GIB, abs=0.051)
        assert own.samples_per_update % settings.micro_batch == 0
        before, after = (config.settings(each) for each in (own, settings))
        assert {k: before[k] for k in KEPT} == {k: after[k] for k in KEPT}
    if least is not None:
        assert vram.fitted(name, (), least + 0.06)


def test_a_larger_card_is_used_and_never_dearer():
    """What costs time is not chosen where there is room; the micro-batch never falls as the card grows."""
    found = [vram.fitted("flow_grpo/sd35-medium", (), card)[0] for card in (12, 16, 24, 48)]
    assert [c.memory.quantize for c in found] == ["none"] * 4
    sizes = [c.micro_batch for c in found]
    assert sizes == sorted(sizes)
    assert found[-1].memory.judges == "resident" and found[0].memory.judges == "offloaded"


def test_what_the_user_names_stays():
    own = ("memory.decode=whole", "memory.judge_precision=float32", "memory.quantize=none")
    settings, _ = vram.fitted("flow_grpo/sd35-medium", own, 24)
    assert (settings.memory.decode, settings.memory.judge_precision, settings.memory.quantize) == (
        "whole",
        "float32",
        "none",
    )
    with pytest.raises(UserError, match="--vram: got 9"):
        vram.fitted("flow_grpo/sd35-medium", (*own, "memory.judges=resident"), 9)


def test_what_the_command_line_names_stays_too():
    own = config.load("flow_grpo/sd35-medium").micro_batch
    assert vram.fitted("flow_grpo/sd35-medium", (), 24)[0].micro_batch > own
    assert vram.fitted("flow_grpo/sd35-medium", ("optimizer.micro_batch=2",), 24)[0].micro_batch == 2
    kept = vram.fitted("flow_grpo/sd35-medium", ("memory.encode_on=device",), 12)[0]
    assert kept.memory.encode_on == "device"
    with pytest.raises(UserError, match="without what is named: memory.encode_on"):
        vram.fitted("flow_grpo/sd35-medium", ("memory.encode_on=device",), 9)
    with pytest.raises(UserError, match="without what is named: prompts.cache"):
        vram.fitted("flow_grpo/sd35-medium", ("prompts.cache=null",), 9)


def test_a_shared_base_is_not_quantised():
    assert vram.fitted("flow_grpo/sd35-medium", ("memory.shard=blocks",), 12)[0].memory.quantize == "none"
    with pytest.raises(UserError, match="--vram: got 9, .*at the least"):
        vram.fitted("flow_grpo/sd35-medium", ("memory.shard=blocks",), 9)


def test_the_least_that_is_said_is_enough():
    with pytest.raises(UserError) as refused:
        vram.fitted("flow_grpo/sd35-medium", (), 2)
    least = float(str(refused.value.problems[0]).partition("takes ")[2].partition(" GiB")[0])
    assert vram.fitted("flow_grpo/sd35-medium", (), least)[1].demand.total <= least * GIB


def test_a_rule_that_fits_itself_is_refused():
    auto = ("rule={name: rlr, depth: auto, span: auto, memory_gib: 40}", "rewards={pickscore: 1.0}")
    with pytest.raises(UserError, match="--vram: got a rule that fits itself"):
        vram.fitted("flow_grpo/sd35-medium", (*auto, "sampler.process=flow_sde"), 24)


def test_encoders_larger_than_the_card_encode_on_the_cpu():
    assert vram.fitted("flow_grpo/sd35-medium", (), 10.5)[0].memory.encode_on == "cpu"
    assert vram.fitted("flow_grpo/sd35-medium", (), 12)[0].memory.encode_on == "device"


def test_plan_begins_with_the_verdict():
    done = CliRunner().invoke(app, ["plan", "ddpo/sd15", "--vram", "12", "--card", "rtx4090"])
    assert done.exit_code == 0, done.output
    assert done.output.startswith("fits        12 GiB: ")
    refused = CliRunner().invoke(app, ["plan", "flow_grpo/shapes-sd3", "--vram", "12"])
    assert "is not known beforehand" in str(refused.exception)


# -- the arithmetic

ROW = Row(1.0, 3.0, 10.0 * GIB, Held(40.0 * GIB, 60.0 * GIB), Held(4.0 * GIB, 9.0 * GIB))
DECODE = Row(1.0, 3.0, 0.5 * GIB, Held(2.0 * GIB, 3.0 * GIB), Held(0.25 * GIB, 1.0 * GIB))


def made(plan, **more):
    return Facts(
        **{
            **dict(
                linear=2 * GIB,
                other=GIB,
                trained=GIB // 4,
                copies=5,
                encoders=8.0 * GIB,
                decoder=GIB // 4,
                encoded=0,
                rows=2,
            ),
            **more,
        },
        row=ROW,
        decode=DECODE,
        plan=plan,
    )


LOG_PROB = Plan(4, (True,) * 4, ((Term(0, 1, "log_prob"), Term(1, 2, "log_prob")),))
REWARD = Plan(4, (False,) * 4, ((Term(1, 4, "reward"),),))


def phases(facts, *settings):
    few = (
        "optimizer.micro_batch=2",
        "rewards={pickscore: 1}",
        "eval_rewards=[clipscore]",
        "prompts.cache=x",
        *settings,
    )
    found = demand.demand(config.load("flow_grpo/sd35-medium", few), facts).phases
    return {phase: {name: taken / GIB for name, taken in parts.items()} for phase, parts in found.items()}


def test_weights_are_counted_by_what_they_are_held_in():
    full, int8, nf4 = (
        phases(made(LOG_PROB), f"memory.quantize={kind}")["sampling"]["denoiser"] for kind in ("none", "int8", "nf4")
    )
    assert (full, int8) == (6.0, 4.0)
    assert nf4 == pytest.approx(2 + 2 * 0.516, abs=1e-3)


def test_a_term_is_counted_by_its_peak():
    """Two rows a sample, two samples; by blocks what one of them rebuilds is there beside what is kept."""
    for how, expected in (("none", 60.0), ("blocks", 9.0), ("spans", 60.0), ("both", 9.0)):
        assert phases(made(LOG_PROB), f"memory.checkpoint={how}")["training"]["graph"] == 2 * 2 * expected


def test_a_span_through_the_reward_keeps_every_step():
    def graph(how):
        return phases(made(REWARD), f"memory.checkpoint={how}")["training"]["graph"]

    assert graph("none") == 2 * (3 * 40 * 2 + 2 * 20)
    assert graph("blocks") == 2 * (3 * 4 * 2 + 2 * 5)
    assert graph("both") == 2 * (0 + 2 * 9)


def test_a_slope_and_the_steps_it_is_handed_to_are_never_there_at_once():
    """The larger of one call's peak, two rows a sample, and the decoder's; two samples."""
    handed = (Term(4, 4, "reward", keep_slope=True), Term(1, 2, "slope"), Term(3, 4, "slope"))
    slope, decoder = Plan(4, (False,) * 4, (handed,)), Plan(4, (False,) * 4, (handed[:1],))
    assert phases(made(slope), "memory.checkpoint=none")["training"]["graph"] == 2 * 2 * 60
    assert phases(made(slope), "memory.checkpoint=blocks")["training"]["graph"] == 2 * 2 * 9
    assert phases(made(decoder), "memory.checkpoint=none")["training"]["graph"] == 2 * 3


def test_without_a_graph_the_larger_of_network_and_decoder_counts():
    assert phases(made(LOG_PROB), "speed=eager")["sampling"]["network and decoder"] == 2 * 2 * 10


def test_recorded_calls_are_held_all_the_time():
    """With the adapter, without it where the rule pulls to the base (this one has kl), and with gradient."""
    for how, term in (("none", 60), ("blocks", 9)):
        found = phases(made(LOG_PROB), f"memory.checkpoint={how}")
        assert found["sampling"]["recorded calls"] == 2 * 2 * (10 + 10 + term)
        assert found["sampling"]["network and decoder"] == 2 * 0.5  # the decoder alone
        assert found["training"]["recorded calls"] + found["training"]["graph"] == 2 * 2 * (10 + 10 + term)
    whole = phases(made(LOG_PROB), "memory.checkpoint=both")
    assert whole["sampling"]["recorded calls"] == 2 * 2 * (
        10 + 10
    )  # what runs again whole is not recorded with gradient
    assert phases(made(LOG_PROB), "speed=eager")["sampling"]["recorded calls"] == 0


def test_judges_are_counted_where_they_are():
    """PickScore trains, both judge: 3.9 and 1.7 GiB in float32."""
    both = 3.9 + 1.7
    resident, offloaded, narrow, narrow_off = (
        {phase: parts["rewards"] for phase, parts in phases(made(LOG_PROB), *more).items() if "rewards" in parts}
        for more in (
            (),
            ("memory.judges=offloaded",),
            ("memory.judge_precision=bfloat16",),
            ("memory.judges=offloaded", "memory.judge_precision=bfloat16"),
        )
    )
    assert resident == pytest.approx({"sampling": both, "training": both, "evaluating": both})
    assert offloaded == pytest.approx({"sampling": 3.9, "training": 0, "evaluating": 3.9})
    assert narrow == pytest.approx(dict.fromkeys(resident, both + 1.95))
    assert narrow_off == pytest.approx({"sampling": 1.95, "training": 0, "evaluating": 3.9})
    through = phases(made(REWARD), "memory.judges=offloaded")["training"]["rewards"]
    assert through == pytest.approx(3.9)


def test_encoders_have_a_phase_of_their_own_or_stay():
    assert phases(made(LOG_PROB))["encoding"]["text encoders"] == 16.0
    assert "encoding" not in phases(made(LOG_PROB), "memory.encode_on=cpu")
    stay = demand.demand(config.load("flow_grpo/sd35-medium", ["prompts.cache=null"]), made(LOG_PROB)).phases
    assert stay["training"]["text encoders"] == 16.0 * GIB and "encoding" not in stay


def test_train_runs_what_was_fitted(monkeypatch, tmp_path):
    """And the run's config says for which card, and what was counted; the same command again is the same run."""
    from diffalign.evaluation.results import Summary
    from diffalign.runs import session

    trained = []
    monkeypatch.setattr(session, "train", lambda settings, **_: trained.append(settings) or Summary())
    for _ in range(2):
        done = CliRunner().invoke(app, ["train", "ddpo/sd15", "--vram", "8", f"run_dir={tmp_path / 'run'}"])
        assert done.exit_code == 0, done.output
        assert done.output.startswith("fits        8 GiB: ")
    assert config.settings(trained[0]) == config.settings(trained[1])
    memory = trained[0].memory
    assert (memory.vram, memory.judges) == (8, "offloaded")
    assert 0 < memory.counted <= 8
