"""Deliberate mistakes in ops, processes, rules and the trainer. Each must be killed by a test; see test_mutations.py."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutation:
    """Replace `old` (which occurs once) by `new` in `file`."""

    name: str
    file: str
    old: str
    new: str


GAUSSIAN, SURROGATE = "diffalign/ops/gaussian.py", "diffalign/ops/surrogate.py"
ADVANTAGES, MATCHING = "diffalign/ops/advantages.py", "diffalign/ops/matching.py"
FLOW, DDIM, TABLE = (f"diffalign/processes/{name}.py" for name in ("flow_sde", "ddim", "table"))
SHARED, TRUST, GRPO, DDPO, TBP = (
    f"diffalign/rules/{name}.py" for name in ("_policy_gradient", "_trust", "flow_grpo", "ddpo", "truncated_bp")
)
RLR, CHAIN = "diffalign/rules/rlr.py", "diffalign/backends/chain.py"
WALK, PARAMETERS = "diffalign/backends/walk.py", "diffalign/backends/parameters.py"
PREDICTION = "diffalign/ops/prediction.py"
GUARD, BRANCH, AWM, NFT = (f"diffalign/rules/{name}.py" for name in ("grpo_guard", "branch_grpo", "awm", "nft"))
MERGING, SLOPE = "diffalign/rules/_merging.py", "diffalign/rules/_slope.py"
IMPLICIT = "diffalign/ops/implicit.py"
FLOORS, FORWARD = "diffalign/rules/_floors.py", "diffalign/rules/_forward.py"
CPS, PATHWISE = "diffalign/processes/cps.py", "diffalign/rules/_pathwise.py"
SOLVER = "diffalign/processes/dpm_solver.py"
GENEVAL, TRAINER = "diffalign/ops/geneval.py", "diffalign/training/trainer.py"

MUTATIONS = [
    Mutation("log-prob sign", GAUSSIAN, "per_dim = -((x - mean) ** 2)", "per_dim = ((x - mean) ** 2)"),
    Mutation("log-prob factor two", GAUSSIAN, "(2 * std**2) - math.log(std)", "(std**2) - math.log(std)"),
    Mutation("mean becomes sum", GAUSSIAN, "return flat.mean(1, dtype=wide)", "return flat.sum(1, dtype=wide)"),
    Mutation("score over variance", GAUSSIAN, "(eps / std).detach()", "(eps / std**2).detach()"),
    Mutation("surrogate min for max", SURROGATE, "torch.maximum", "torch.minimum"),
    Mutation("surrogate advantage sign", SURROGATE, "-advantage * ratio, ", "advantage * ratio, "),
    Mutation("clip one side only", SURROGATE, "ratio.clamp(1 - clip, 1 + clip)", "ratio.clamp(1 - clip, None)"),
    Mutation(
        "group mean forgotten",
        ADVANTAGES,
        "centred[rows] = values[rows] - values[rows].mean()",
        "centred[rows] = values[rows]",
    ),
    Mutation("leave-one-out off by one", ADVANTAGES, "/ (len(rows) - 1)", "/ len(rows)"),
    Mutation("flat groups not masked", ADVANTAGES, "<= ROUNDINGS * rounding *", "<= 0.0 *"),
    Mutation("tree average unweighted", ADVANTAGES, "weights.insert(0, weight)", "weights.insert(0, np.ones(count))"),
    Mutation("drift factor two", FLOW, "x=1 + g**2 * dt / (2 * t)", "x=1 + g**2 * dt / t"),
    Mutation("score term sign", FLOW, "prediction=(1 + g**2", "prediction=(1 - g**2"),
    Mutation("std without root", FLOW, "std=g * np.sqrt(-dt)", "std=g * -dt"),
    Mutation("first step singular", FLOW, "np.where(t == 1, sigma[1], t)", "np.where(t == 1, sigma[2], t)"),
    Mutation("loss summed over the part", TRUST, "step.advantage, clip).mean()", "step.advantage, clip).sum()"),
    Mutation("eta squared", DDIM, "std = noise_level * (sigma_s", "std = noise_level**2 * (sigma_s"),
    Mutation("direction keeps the variance", DDIM, "np.sqrt(sigma_s**2 - std**2)", "sigma_s"),
    Mutation(
        "v prediction sign", PREDICTION, "return alpha, -sigma, sigma, alpha", "return alpha, sigma, sigma, alpha"
    ),
    Mutation("history never used", DDPO, "own if len(own) >= s.history_least else reward[valid]", "reward[valid]"),
    Mutation("history never forgets", DDPO, "values[-self.settings.history :]", "values"),
    Mutation("score sign", DDPO, "Loss(-(step.advantage", "Loss((step.advantage"),
    Mutation("reward sign", PATHWISE, "Loss(-value.mean())", "Loss(value.mean())"),
    Mutation("hinge turned over", PATHWISE, "(target - value)", "(value - target)"),
    Mutation("one step less", TBP, "first = max(0, end - depth)", "first = max(0, end - depth + 1)"),
    Mutation("variants on the stored latent", TBP, "if term != part.plan.updates[0][0]:", "if False:"),
    Mutation("variants unweighted", TBP, "weight = 1 / (1 + s.variants)", "weight = 1.0"),
    Mutation("slope a step short", SLOPE, "math.prod(a[after:]) * part", "math.prod(a[term.start :]) * part"),
    Mutation("inverse weights biased", SLOPE, "left / p + later)", "left / p)"),
    Mutation("finished latent judged early", TBP, "else span.clean", "else span.x"),
    Mutation(
        "input not detached",
        WALK,
        "return self._latent.detach() if self.detached",
        "return self._latent if self.detached",
    ),
    Mutation(
        "clean sample of the wrong latent", CHAIN, "clean_x * x + clean_prediction", "clean_x * mean + clean_prediction"
    ),
    Mutation(
        "perturbed the same way everywhere",
        PARAMETERS,
        "normal([draw], p.shape, Purpose.DIRECTION, step, index",
        "normal([draw], p.shape, Purpose.DIRECTION, index",
    ),
    Mutation("parameter noise sign", RLR, "apart = (ends[0] - ends[1])", "apart = (ends[1] - ends[0])"),
    Mutation("parameter noise scale", RLR, "/ (2 * self.settings.perturbation)", "/ self.settings.perturbation"),
    Mutation("block weight forgotten", RLR, "1 / chance[drawn] if", "1.0 if"),
    Mutation("likelihood-ratio sign", RLR, "value = -(ops.gaussian.like(credit", "value = (ops.gaussian.like(credit"),
    Mutation(
        "baseline with the sample itself",
        RLR,
        "advantages.leave_one_out(scores.total,",
        "advantages.group_relative(scores.total,",
    ),
    Mutation("rest covered by half", RLR, "for a, b in rest]\n        elif", "for a, b in rest[1:]]\n        elif"),
    Mutation(
        "old log-probs kept",
        TRAINER,
        "        if first:\n            recompute",
        "        if not first:\n            recompute",
    ),
    Mutation("exclude off by one", GENEVAL, "if len(detected) >= clause", "if len(detected) > clause"),
    Mutation("velocity sign", MATCHING, '"velocity": lambda: noise - x0', '"velocity": lambda: x0 - noise'),
    Mutation(
        "clean sample's sign",
        PREDICTION,
        "return 1 / alpha, -sigma / alpha, zero, one",
        "return 1 / alpha, sigma / alpha, zero, one",
    ),
    Mutation(
        "last step trained",
        "diffalign/rules/_window.py",
        "return first, min(stop, steps - 1)",
        "return first, min(stop, steps)",
    ),
    Mutation("KL detached", SHARED, "((now.prediction - base", "((now.prediction.detach() - base"),
    Mutation(
        "credit turned over",
        SHARED,
        "average_to_parents(advantage, tree.parent)",
        "average_to_parents(-advantage, tree.parent)",
    ),
    Mutation("trust turned over", TRUST, "step.log_ratio.detach() > 0)", "step.log_ratio.detach() < 0)"),
    Mutation("trust drops within the limit", TRUST, "(apart >= limit)", "(apart < limit)"),
    Mutation("trust drops every row beyond", TRUST, "& (step.advantage * step.log_ratio.detach() > 0)", ""),
    Mutation("implicit gate turned over", IMPLICIT, "_sigmoid(-beta", "_sigmoid(beta"),
    Mutation("residual not centred", IMPLICIT, "(r - r.mean())", "r"),
    Mutation("listwise by the group's mean", IMPLICIT, "len(a) * (_softmax", "(_softmax"),
    Mutation(
        "implicit reward turned over",
        AWM,
        '["implicit"] = own - self._log_p(at',
        '["implicit"] = -own + self._log_p(at',
    ),
    Mutation("step weight inverted", SHARED, "1 / (gain * std**power)", "gain * std**power"),
    Mutation("guard divides by the noise", GUARD, "else centred * std", "else centred / std"),
    Mutation(
        "guard's bias over the batch",
        GUARD,
        'ops.gaussian.reduce_latent(change.square(), "mean") /',
        "change.square().mean() /",
    ),
    Mutation("unlikelier paths weigh more", ADVANTAGES, "+ beta * log_prob[step]", "- beta * log_prob[step]"),
    Mutation("best kept, worst forgotten", ADVANTAGES, "[order[:count], order[-count:]]", "[order[-count:]]"),
    Mutation("the split itself pruned", BRANCH, "if step > last else", "if step >= last else"),
    Mutation("siblings' noise four times", BRANCH, "1 / (1 + s.sibling_noise**2)", "1 / (1 + s.sibling_noise)"),
    Mutation("each draw has its own ratio", AWM, '"log_ratio": mean}', '"log_ratio": looked[-1]["log_ratio"]}'),
    Mutation("elbo without its signal", MATCHING, "(implied_by * signal) ** 2", "implied_by**2"),
    Mutation("AWM drawn away", AWM, "return -ops.matching.weighted", "return ops.matching.weighted"),
    Mutation(
        "NFT's negative is its positive",
        NFT,
        "below - s.beta * predicted",
        "above + s.beta * predicted",
    ),
    Mutation("rewards' weights forgotten", MERGING, "[weight * part for part", "[part for part"),
    Mutation("floors turned over", FLOORS, "rate * (least - mean)", "rate * (mean - least)"),
    Mutation("strata weigh alike", FORWARD, "len(part) / len(levels)", "1 / times"),
    Mutation("noise not mirrored", FORWARD, "-noise if mirrored else noise", "noise"),
    Mutation("gates left out", MERGING, "scores = ops.advantages.gated(scores, group, settings.gate)", "pass"),
    Mutation("solver's memory added", SOLVER, "past=-gain * r", "past=gain * r"),
    Mutation("worst bundles weigh as the others", ADVANTAGES, "(lower - reward, 0) / low", "(lower - reward, 0)"),
    Mutation("CPS without its noise", CPS, "np.sqrt(after**2 - std**2)", "after"),
    Mutation("flat to one is flat to all", TRAINER, "not plan.perturbed and not any(", "not plan.perturbed and any("),
    Mutation("known noise left in", FORWARD, "- sigma * noise) / alpha", ") / alpha"),
    Mutation("a leap's start carries less", SLOPE, "(kept + float(of_x[0]))", "kept"),
]
