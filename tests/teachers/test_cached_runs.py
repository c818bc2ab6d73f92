"""Runs that train from a teacher's cache.

Frozen here: at k = vocabulary the losses, gradients and weights of the live run, at a smaller k
those of the live run with TopK; methods, stages, rewards, teacher prompts, accumulation and
resuming work; validation takes bounds under names of their own and the best checkpoint follows
them.
"""

from __future__ import annotations

import pytest
import tiny
import torch
from cache_training import ALL, ROWS, VAL, check_same, entries, train
from peft import LoraConfig

from okd_lightning.callbacks import (
    GKD,
    KD,
    SFT,
    BestCheckpoint,
    LastCheckpoint,
    Reward,
    Stage,
)
from okd_lightning.data import RolloutDataModule
from okd_lightning.divergences import JensenShannon, ReverseKL, TopK
from okd_lightning.losses import DrawnLogProb, DrawnOutcome
from okd_lightning.losses.reduction import loss_output
from okd_lightning.training.module import DistillationModule


class Scored(GKD):
    """Policy gradient on dataset responses with log q - log p of their tokens."""

    quantities = (DrawnLogProb(), DrawnOutcome("teacher", ReverseKL()))

    def loss(self, measured):
        student, teacher = (measured[quantity] for quantity in self.quantities)
        values = -(teacher - student).detach() * (student - student.detach()).exp()
        return loss_output(values, measured.mask(self.sources))


METHODS = {
    "KD": lambda: [KD()],
    "cross-entropy": lambda: [KD(cross_entropy_weight=0.3)],
    "GKD off-policy": lambda: [GKD(0.3, on_policy_fraction=0.0)],
    "stages": lambda: [Stage(SFT(), end=2), Stage(KD(divergence=ReverseKL()), start=2)],
}


@pytest.mark.parametrize("name", METHODS)
def test_with_all_ids_it_is_the_live_run(name, tmp_path, make_module, cache):
    settings = {"accumulate_grad_batches": 2, "data": {"batch_size": 2}}
    live = train(tmp_path, make_module, METHODS[name](), **settings)
    cached = train(tmp_path, make_module, METHODS[name](), k=ALL + 9, cache=cache, **settings)
    # the file holds float32: 2^-24 of up to 30 nats, which the steps enlarge
    check_same(cached, live, loss=1e-5, gradient=1e-6)


@pytest.mark.parametrize(("dtype", "rounding"), [("float32", 2e-6), ("float16", 2e-3)])
@pytest.mark.parametrize("inner", [JensenShannon(0.5), ReverseKL()], ids=repr)
def test_with_some_ids_it_is_the_live_run_with_top_k(
    inner, dtype, rounding, tmp_path, make_module, cache
):
    live = train(tmp_path, make_module, [KD(divergence=TopK(inner, 5))])
    for divergence, k in ((inner, 5), (TopK(inner, 5), 8)):
        method = [KD(divergence=divergence)]
        cached = train(tmp_path, make_module, method, k=k, cache=cache, dtype=dtype)
        check_same(cached, live, loss=rounding, gradient=5 * rounding)
    exact = train(tmp_path, make_module, [KD(divergence=inner)])
    assert exact[0].losses[0]["train/kd"] > live[0].losses[0]["train/kd"] + 0.01


@pytest.mark.parametrize("k", [5, ALL])
def test_ends_that_are_one_outcome_are_one_in_the_cache_too(k, tmp_path, make_module, cache):
    """The k ids of a position may lack the end; another set of ends has its own cache entry."""
    model = {"end_tokens": [tiny.EOS, tiny.BOS]}
    method = [KD(divergence=TopK(ReverseKL(), k) if k < ALL else ReverseKL())]
    live = train(tmp_path, make_module, method, model=model)
    cached = train(tmp_path, make_module, [KD(divergence=ReverseKL())], k, cache, model=model)
    check_same(cached, live, loss=1e-5, gradient=1e-5)
    alone = train(tmp_path, make_module, [KD(divergence=ReverseKL())], k, cache)
    assert len(entries(cache)) == 2
    assert abs(alone[0].losses[0]["train/kd"] - cached[0].losses[0]["train/kd"]) > 1e-3


@pytest.mark.parametrize("k", [1, 5])
def test_the_own_token_s_log_prob_is_exact_at_any_k(k, tmp_path, make_module, cache):
    method = Scored(on_policy_fraction=0.0)
    live = train(tmp_path, make_module, [method])
    cached = train(tmp_path, make_module, [method], k=k, cache=cache, dtype="float16")
    check_same(cached, live, loss=1e-5, gradient=1e-6)


def length_of(prompt: str, response: str, reference: str) -> float:
    return float(len(response))


def test_next_to_a_reward_on_the_student_s_own_responses(tmp_path, make_module, cache):
    settings = {"data": {"samples_per_prompt": 2}, "accumulate_grad_batches": 2}

    def methods():
        return [KD(), Reward(length_of, "leave_one_out", weight=0.05)]

    live = train(tmp_path, make_module, methods(), **settings)
    cached = train(tmp_path, make_module, methods(), k=ALL, cache=cache, **settings)
    assert cached[0].sources()[0] == {0, 1}
    check_same(cached, live, loss=1e-5, gradient=1e-4)


def test_a_teacher_with_prompts_of_its_own(tmp_path, make_module, cache, loaded):
    templates = [{"teacher_prompt_template": t} for t in ("{reference}p{prompt}", "{prompt}p")]
    for number, data in enumerate(templates, start=1):
        live = train(tmp_path, make_module, [KD()], data=data)
        del loaded[:]
        cached = train(tmp_path, make_module, [KD()], k=ALL, cache=cache, data=data)
        assert len(loaded) == 1
        assert len(entries(cache)) == number
        check_same(cached, live, loss=1e-6, gradient=1e-6)


def test_validation_and_the_best_checkpoint(tmp_path, make_module, cache):
    best = BestCheckpoint(tmp_path / "checkpoints")
    recorder, module = train(
        tmp_path,
        make_module,
        [KD()],
        k=5,
        cache=cache,
        val=VAL,
        callbacks=[best],
        data={"val_rollouts": 3},
    )
    measured = best.best_model_score
    trainer = tiny.make_trainer(tmp_path)
    data = RolloutDataModule(
        ROWS, VAL, batch_size=4, max_prompt_length=16, max_response_length=8, seed=7, val_rollouts=3
    )
    live = trainer.validate(module, data, verbose=False)
    exact = {name: value for part in live for name, value in part.items()}
    assert module.teacher is not None
    bounds = torch.load(best.best_model_path, weights_only=True)["okd_lightning"]["metrics"]
    assert bounds.keys() == {
        "val/agreement",
        "val/cross_entropy",
        "val/on_policy_entropy",
        "val/top_k_forward_kl",
        "val/top_k_jsd",
        "val/top_k_reverse_kl",
    }
    assert float(measured) == pytest.approx(bounds["val/top_k_reverse_kl"])
    for name in ("agreement", "cross_entropy", "on_policy_entropy"):
        assert bounds[f"val/{name}"] == pytest.approx(exact[f"val/{name}"], rel=1e-4)
    for name in ("forward_kl", "reverse_kl", "jsd"):
        assert 0 < bounds[f"val/top_k_{name}"] < exact[f"val/{name}"]
    assert "val/on_policy_reverse_kl" in exact
    assert len(recorder.losses) == 6
    again = tiny.fit(tmp_path, module, [KD()], ROWS)  # trains on: the teacher goes again
    assert module.teacher is None
    assert again.losses[0]["train/kd"] < recorder.losses[0]["train/kd"]


def test_all_ids_measure_what_the_live_validation_does(tmp_path, make_module, cache):
    best = BestCheckpoint(tmp_path / "checkpoints")
    _, module = train(tmp_path, make_module, [KD()], k=ALL, cache=cache, val=VAL, callbacks=[best])
    bounds = torch.load(best.best_model_path, weights_only=True)["okd_lightning"]["metrics"]
    data = RolloutDataModule(
        None, VAL, batch_size=4, max_prompt_length=16, max_response_length=8, val_rollouts=0
    )
    exact = tiny.make_trainer(tmp_path).validate(module, data, verbose=False)[0]
    for name in ("forward_kl", "reverse_kl", "jsd"):
        assert bounds[f"val/top_k_{name}"] == pytest.approx(exact[f"val/{name}"], rel=1e-5)


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, make_module, cache, loaded):
    whole = train(tmp_path, make_module, [KD()], k=5, cache=cache, max_epochs=2)
    callbacks = [LastCheckpoint(every_n_steps=1)]
    train(tmp_path, make_module, [KD()], k=5, cache=cache, callbacks=callbacks, max_steps=3)
    checkpoint = next(tmp_path.rglob("last.ckpt"))
    held = torch.load(checkpoint, weights_only=True)["state_dict"]
    assert not [name for name in held if name.startswith("teacher")]
    resumed = train(
        tmp_path, make_module, [KD()], k=5, cache=cache, ckpt_path=checkpoint, max_epochs=2
    )
    assert tiny.distance(tiny.weights(resumed[1]), tiny.weights(whole[1])) == 0
    assert resumed[0].losses == whole[0].losses[3:]
    assert len(loaded) == 1


def test_methods_over_whole_sequences(tmp_path, make_module, cache):
    """Terms that are not positionwise take the other path of the loss layer."""

    class Whole(KD):
        is_positionwise = False

    live = train(tmp_path, make_module, [KD(divergence=TopK(ReverseKL(), 5), name="whole")])
    method = [Whole(divergence=ReverseKL(), name="whole")]
    cached = train(tmp_path, make_module, method, k=5, cache=cache)
    check_same(cached, live, loss=2e-6, gradient=2e-6)


def test_lora_student_and_bfloat16_teacher(tmp_path, make_module, cache):
    settings = {
        "model": {
            "student_adapter": LoraConfig(r=2, target_modules=["q_proj", "v_proj"]),
            "teacher_dtype": "bfloat16",
        }
    }
    live = train(tmp_path, make_module, [KD()], **settings)
    cached = train(tmp_path, make_module, [KD()], k=ALL, cache=cache, **settings)
    check_same(cached, live, loss=5e-3, gradient=5e-2)  # batches are cut otherwise, in bfloat16
    assert isinstance(cached[1], DistillationModule)
