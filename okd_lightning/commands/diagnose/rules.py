"""Recommendations of methods to try, with the numbers that lead to them: a table of small rules.

A rule reads a diagnosis and returns one recommendation or none. ``measured`` means that the numbers
of this pair show it, ``likely`` that the studies of docs/opd.md and docs/okd.md do, ``guess`` that
it is experience without a study. Only a comparison on the task itself decides; ``contenders`` names
its methods.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from okd_lightning.commands.diagnose.findings import Advice, Check, Diagnosis, Rows, Trial
from okd_lightning.commands.diagnose.gradients import TOP_K, TOP_K_NAME

GKD_REVERSE_KL = "gkd_reverse_kl.yaml"
GKD_FORWARD_KL = "gkd_forward_kl.yaml"
KD_REVERSE_KL = "kd_reverse_kl.yaml"

_CONTENDER = """\
# For okd-lightning compare --methods: {what}
method:
  class_path: {method}
  init_args:
    {settings}
"""
CONTENDERS = {
    GKD_REVERSE_KL: _CONTENDER.format(
        what="exact reverse KL on on-policy samples",
        method="GKD",
        settings="divergence: ReverseKL\n    on_policy_fraction: 1.0",
    ),
    GKD_FORWARD_KL: _CONTENDER.format(
        what="exact forward KL on on-policy samples",
        method="GKD",
        settings="divergence: ForwardKL\n    on_policy_fraction: 1.0",
    ),
    KD_REVERSE_KL: _CONTENDER.format(
        what="reverse KL on dataset responses", method="KD", settings="divergence: ReverseKL"
    ),
}
"""Contenders that are not a class's defaults, as files that are written next to the diagnosis."""

_FORECASTS = {
    "given/forward_kl": "forward KL on dataset responses",
    "student/reverse_kl": "reverse KL after on-policy prefixes",
}
_AS_CONTENDER = {
    "SFT": "SFT",
    "KD": "KD",
    "KD, reverse KL": KD_REVERSE_KL,
    "GKD, forward KL": GKD_FORWARD_KL,
    "GKD, reverse KL": GKD_REVERSE_KL,
    "OPD": "OPD",
    "OPDPlus": "OPDPlus",
}
_CLEARLY_WORSE = 1.15  # on-policy over dataset reverse KL
_RARELY_ENDS = 0.5  # of the teacher's share
_LOW_MASS, _LOW_MASS_K = 0.9, 16
_LOW_AGREEMENT = 0.5
_NOISY = 2.0  # sampled over exact variance
_SLOW = 3.0  # an on-policy step over one of KD
_LITTLE_LEFT = 0.9  # of the exact gradient, through a top-k
_STALE = 0.05  # mean |ln ρ|, nats
_UNBIASED = ("as_published", "centred", "value_baseline")

Rule = Callable[[Diagnosis], Advice | None]


def mend_first(found: Diagnosis) -> Advice | None:
    """Report cut responses and a broken tokenizer or eos, which degrade every method."""
    broken = [check for check in found.checks if check.verdict == "bad"]
    if not broken:
        return None
    text = "; ".join(f"{check.name}: {check.text}" for check in broken)
    return Advice("Fix the data, its limits or the tokenizer first", text, "measured")


def prompts_alone(found: Diagnosis) -> Advice | None:
    """Recommend on-policy methods where there are no dataset responses."""
    if found.of("given") is not None:
        return None
    return Advice(
        "GKD on on-policy samples (--method GKD --method.on_policy_fraction 1)",
        "the data has prompts only, and KD and OKD train on dataset responses",
        "measured",
        (GKD_REVERSE_KL, "OPDPlus"),
    )


def first_steps(found: Diagnosis) -> Advice | None:
    """Recommend the methods whose first steps lower the held-out divergences most."""
    firsts: list[Trial] = []
    words = []
    for measure, label in _FORECASTS.items():
        ranked = found.forecast(measure)
        ahead = [trial for trial in ranked if _is_level(trial, ranked[0], measure)]
        if ranked and ranked[0].change[measure].mean < 0:
            firsts += ahead
            listed = ", ".join(f"{t.method} {t.change[measure].signed()}" for t in ranked[:3])
            words.append(f"{label}: {listed}")
    if not firsts:
        return None
    names = tuple(dict.fromkeys(trial.method for trial in firsts))
    return Advice(
        f"By their first {firsts[0].steps} steps: {' and '.join(names)}",
        f"change on held-out rows, nats per token; {'; '.join(words)}; other batches may order "
        "them otherwise",
        "likely",
        tuple(_AS_CONTENDER[name] for name in names),
    )


def rough_start(found: Diagnosis) -> Advice | None:
    """Report when all methods' first steps raise the divergences: no forecast is possible then."""
    least = {m: found.forecast(m)[0].change[m] for m in _FORECASTS if found.forecast(m)}
    if not least or any(change.mean < 0 for change in least.values()):
        return None
    listed = ", ".join(f"{_FORECASTS[m]} {change.signed()}" for m, change in least.items())
    return Advice(
        f"Warm up (--model.warmup_steps) or lower the learning rate, {found.learning_rate:g}",
        f"without warm-up the first {found.trials[0].steps} steps make it worse with every method, "
        f"at the least: {listed}; their order is then no forecast of a whole run's",
        "measured",
    )


def _is_level(one: Trial, first: Trial, measure: str) -> bool:
    """Return whether a trial is not clearly worse than the first one."""
    own, best = one.change[measure], first.change[measure]
    return one is first or own.mean - best.mean < 2 * math.hypot(own.error, best.error)


def learn_to_end(found: Diagnosis) -> Advice | None:
    """Recommend a warm start for a student that does not stop: its rollouts would be noise."""
    own, teachers = found.of("student"), found.of("teacher")
    if own is None or teachers is None or own.eos_share >= _RARELY_ENDS * teachers.eos_share:
        return None
    return Advice(
        "SFT or KD on dataset responses first, then on-policy (a Stage, or two runs)",
        f"{own.eos_share:.0%} of the student's responses end by themselves, "
        f"{teachers.eos_share:.0%} of the teacher's: rollouts would mostly be text that neither "
        "model should write",
        "guess",
        ("SFT", "KD"),
    )


def exposure(found: Diagnosis) -> Advice | None:
    """Compare reverse KL on on-policy samples with that on dataset responses."""
    given, own = found.of("given"), found.of("student")
    if given is None or own is None:
        return None
    there, here = given.measures["reverse_kl"], own.measures["reverse_kl"]
    error = math.hypot(there.error, here.error)
    numbers = (
        f"reverse KL is {here.text()} after on-policy prefixes and {there.text()} on dataset "
        "responses"
    )
    if here.mean > _CLEARLY_WORSE * there.mean and here.mean - there.mean > 2 * error:
        return Advice(
            "GKD with reverse KL on on-policy samples (--method GKD "
            "--method.divergence ReverseKL --method.on_policy_fraction 1)",
            f"{numbers}: the student's errors are larger after its own prefixes",
            "likely",
            (GKD_REVERSE_KL,),
        )
    return Advice(
        "No sign of exposure bias: begin with KD or OKD, which need no rollouts",
        f"{numbers}: rollouts would change the objective here, and there is no exposure bias to "
        "correct",
        "guess",
        ("KD", "OKD"),
    )


def coverage(found: Diagnosis) -> Advice | None:
    """Recommend KD where the student hardly ever samples tokens that the teacher prefers."""
    rows = found.of("given") or found.of("student")
    if rows is None or _LOW_MASS_K not in rows.top_k:
        return None
    mass = rows.top_k[_LOW_MASS_K]
    if mass.mean >= _LOW_MASS:
        return None
    return Advice(
        "KD (forward KL) before, or together with, anything on-policy",
        f"the teacher puts {1 - mass.mean:.0%} of its mass outside the student's {_LOW_MASS_K} "
        "most likely tokens: the student's samples rarely contain the tokens that it misses",
        "guess",
        ("KD",),
    )


def far_teacher(found: Diagnosis) -> Advice | None:
    """Recommend OKD for a distant pair, after the claim of its paper: the teacher adapts."""
    given = found.of("given")
    if given is None or given.measures["agreement"].mean >= _LOW_AGREEMENT:
        return None
    return Advice(
        "OKD, whose teacher adapts to the student",
        f"both models' most likely tokens agree on {given.measures['agreement'].mean:.0%} of the "
        "tokens "
        "only; OKD's paper (arXiv 2409.12512) gains most on pairs that are far apart",
        "guess",
        ("OKD",),
    )


def exact_over_sampled(found: Diagnosis) -> Advice | None:
    """Report how much more variance a loss on sampled tokens alone has."""
    own = found.gradients.of("reverse KL", "value_baseline")
    if own is None or not own.noise_over_exact > _NOISY:
        return None
    return Advice(
        "Where the teacher's whole distribution is available, the exact loss (GKD), not OPD or "
        "OPD+",
        f"the best sampled gradient has {own.noise_over_exact:.1f} times the exact one's variance "
        "on the same rollouts, so it needs about as many times the rollouts",
        "measured",
        (GKD_REVERSE_KL,),
    )


def coarse_teacher(found: Diagnosis) -> Advice | None:
    """Report the loss of gradient with a teacher that gives top-k tokens alone (cache, server)."""
    lost = [
        f"{row.divergence} {row.fidelity.along_exact:.2f}±{row.fidelity.along_error:.2f}"
        for row in found.gradients.estimators
        if row.estimator == TOP_K_NAME and row.fidelity.along_exact < _LITTLE_LEFT
    ]
    if not lost:
        return None
    return Advice(
        "Where only the teacher's top k would be known (CachedTeacher): a larger k",
        f"with its {TOP_K} most likely tokens and a tail, the mean along the exact gradient, where "
        "1 "
        f"is all of it: {', '.join(lost)}",
        "measured",
    )


def what_counts(found: Diagnosis) -> Advice | None:
    """Report that no method is best on every measure, where several are recommended."""
    if found.of("given") is None:
        return None
    return Advice(
        "Choose the measure that matters before comparing",
        "losses on dataset responses lower the divergence there, losses on on-policy "
        "samples the one after on-policy prefixes (docs/comparing.md); answers that can be checked "
        "(ExactMatch) decide better than either",
        "likely",
        (GKD_REVERSE_KL, "KD"),
    )


def biased_reward(found: Diagnosis) -> Advice | None:
    """Report the bias of OPD with a stopped reward, as it is commonly run."""
    wrong = []
    for divergence in ("forward KL", "JSD"):
        own = found.gradients.of(divergence, "stopped_reward")
        if own is not None and own.is_biased:
            wrong.append(f"{divergence} {own.along_exact:.2f}±{own.along_error:.2f}")
    if not wrong:
        return None
    return Advice(
        "No OPD with forward KL or JSD: OPDPlus has their gradient",
        f"the stopped reward's mean along the exact gradient, where 1 is right: {', '.join(wrong)}",
        "measured",
    )


def quietest_credit(found: Diagnosis) -> Advice | None:
    """Recommend the variant with the least variance, where the loss has to be a sampled one."""
    noise = {
        name: own.noise_over_exact
        for name in _UNBIASED
        if (own := found.gradients.of("reverse KL", name)) is not None
    }
    if not noise or any(math.isnan(value) for value in noise.values()):
        return None
    best = min(noise, key=lambda name: noise[name])
    listed = ", ".join(f"{name} {value:.1f}" for name, value in noise.items())
    return Advice(
        "Where it has to be policy gradient (with a reward or a discount): OPDPlus with variant "
        f"{best}",
        f"variance over the exact gradient's, reverse KL: {listed}; with a teacher that only "
        "scores sampled tokens, value_baseline is not available",
        "measured",
        ("OPDPlus",),
    )


def pace(found: Diagnosis) -> Advice | None:
    """Report the cost of an on-policy step relative to one of KD."""
    seconds = found.cost.seconds
    if "KD" not in seconds or not seconds["GKD"] > _SLOW * seconds["KD"]:
        return None
    ratio = seconds["GKD"] / seconds["KD"]
    return Advice(
        "Compare under a budget in seconds, not in steps",
        f"an on-policy step takes {ratio:.1f} times as long as one of KD here "
        f"({seconds['GKD']:.3g} s and {seconds['KD']:.3g} s)",
        "measured",
    )


def chunks(found: Diagnosis) -> Advice | None:
    """Recommend for how many steps a rollout batch may last."""
    fresh = [drift.steps for drift in found.drift if drift.mean_log_ratio <= _STALE]
    if not found.drift:
        return None
    first = found.drift[0]
    if not fresh:
        return Advice(
            "One optimizer step per rollout batch (the default of --data.prompts_per_rollout)",
            f"a single step changes sampled tokens by {first.mean_log_ratio:.3f} nats on average",
            "measured",
        )
    prompts = max(fresh) * found.cost.prompts
    moved = next(d.mean_log_ratio for d in found.drift if d.steps == max(fresh))
    return Advice(
        f"Rollouts may last for {max(fresh)} steps (--data.prompts_per_rollout {prompts})",
        f"so many optimizer steps change sampled tokens by {moved:.3f} nats on average at learning "
        f"rate {found.learning_rate:g}",
        "likely",
    )


RULES: tuple[Rule, ...] = (
    mend_first,
    prompts_alone,
    learn_to_end,
    first_steps,
    rough_start,
    exposure,
    coverage,
    far_teacher,
    what_counts,
    exact_over_sampled,
    coarse_teacher,
    biased_reward,
    quietest_credit,
    pace,
    chunks,
)
"""Rules, in the order in which their recommendations are shown."""


_ORDER = ("measured", "likely", "guess")


def advise(found: Diagnosis) -> tuple[Advice, ...]:
    """Return the recommendations of all rules: the headline, then by falling confidence.

    The headline is the fault of the data, where there is one; else the first recommendation that
    names a method. The last recommendation warns where there are few responses.
    """
    advice = [advice for rule in RULES if (advice := rule(found)) is not None]
    first, rest = advice[:1], sorted(advice[1:], key=lambda one: _ORDER.index(one.confidence))
    return (*first, *rest, *_caution(found.rows))


def faults(found: Diagnosis) -> tuple[Check, ...]:
    """Return the checks that are not good, those that have to be fixed first."""
    wanted = [check for check in found.checks if check.verdict != "good"]
    return tuple(sorted(wanted, key=lambda check: check.verdict != "bad"))


def contenders(advice: Sequence[Advice]) -> tuple[str, ...]:
    """Return the methods that the recommendations name, each once."""
    return tuple(dict.fromkeys(method for one in advice for method in one.methods))


def _caution(rows: Sequence[Rows]) -> tuple[Advice, ...]:
    fewest = min(found.rows for found in rows)
    if fewest >= 32:
        return ()
    return (
        Advice(
            "These numbers are a rough indication only",
            f"they rest on {fewest} responses; give --rows 64 or more",
            "measured",
        ),
    )
