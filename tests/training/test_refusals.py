"""Combinations that would silently give wrong numbers, and their refusals or corrections.

* A resumed run whose prompts, seed or chunks differ is refused: its stored rollouts answer others.
* A method that sums over fewer tokens than it is divided by is refused at the first batch.
* An epoch that the Trainer would cut inside an optimizer step is refused; prompts_per_epoch as the
  refusal names it trains as many steps.
* A validation comes after whole optimizer steps; any other is refused.
* The first batches of validation are a fair sample of lengths, not the longest rows.
* What a chat template ends a turn with ends a response as well.
* Settings that nothing acts on are refused.
"""

import re

import pytest
import tiny
import torch
from lightning.pytorch.callbacks import LambdaCallback
from tiny import RolloutDataModule

from okd_lightning.callbacks import GKD, KD, DistillationCallback, LastCheckpoint
from okd_lightning.divergences import ForwardKL
from okd_lightning.errors import ConfigError
from okd_lightning.losses import ExactDivergence
from okd_lightning.losses.reduction import loss_output
from okd_lightning.records.batches import Example
from okd_lightning.rollouts.evaluation import DatasetResponses
from okd_lightning.training.module import DistillationModule


def module() -> DistillationModule:
    return DistillationModule(
        tiny.make_llama(1), tiny.make_llama(2), tokenizer=tiny.make_tokenizer()
    )


def data(rows=None, **settings) -> RolloutDataModule:
    defaults = {"batch_size": 4, "max_response_length": 6, "seed": 7, "val_rollouts": 0}
    return RolloutDataModule(rows or tiny.make_rows(16), **{**defaults, **settings})


@pytest.mark.parametrize(
    "other",
    [
        {"seed": 8},
        {"rows": tiny.make_rows(16, seed=5)},
        {"prompts_per_rollout": 8},
        {"prompts_per_epoch": 12},
    ],
)
def test_stored_rollouts_are_for_their_own_prompts(other, tmp_path):
    callbacks = [GKD(on_policy_fraction=1.0), LastCheckpoint(every_n_steps=1)]
    tiny.make_trainer(tmp_path, callbacks, max_steps=2).fit(module(), data())
    last = str(tmp_path / "checkpoints" / "last.ckpt")
    trainer = tiny.make_trainer(tmp_path / "b", [GKD(on_policy_fraction=1.0)], max_steps=3)
    with pytest.raises(ConfigError, match="differ from the checkpoint's"):
        trainer.fit(module(), data(**other), ckpt_path=last)


class HalfOfIt(DistillationCallback):
    """Masks further than its sources say."""

    on_policy_fraction = 0.0
    sources = ("dataset",)
    quantities = (ExactDivergence(ForwardKL()),)

    def loss(self, measured):
        mask = measured.mask(self.sources).clone()
        mask[::2] = False
        return loss_output(measured[self.quantities[0]], mask)


def test_a_term_is_divided_by_what_it_sums_over(tmp_path):
    with pytest.raises(ConfigError, match="half_of_it sums over"):
        tiny.make_trainer(tmp_path, [HalfOfIt()], max_steps=1).fit(module(), data())


def test_reloading_loaders_is_refused(tmp_path):
    """Reloading would lose the loader's position at a resume."""
    trainer = tiny.make_trainer(tmp_path, [KD()], reload_dataloaders_every_n_epochs=1)
    with pytest.raises(ConfigError, match="leave it out"):
        trainer.fit(module(), data())


@pytest.mark.parametrize(
    ("settings", "options", "steps"),
    [
        ({"limit_train_batches": 3, "accumulate_grad_batches": 2}, {}, 2),
        ({"limit_train_batches": 1, "accumulate_grad_batches": 2}, {}, 1),
        ({"limit_train_batches": 3}, {}, 3),
        ({"limit_train_batches": 0.5}, {}, 2),
        ({"limit_train_batches": 0.1}, {}, 1),
        ({"limit_train_batches": 99, "accumulate_grad_batches": 2}, {}, 50),
        ({"limit_train_batches": 3}, {"samples_per_prompt": 2}, 3),
        ({"limit_train_batches": 3, "accumulate_grad_batches": 2}, {"samples_per_prompt": 4}, 2),
        ({"limit_train_batches": 3}, {"global_batch_size": 8}, 2),
        ({"overfit_batches": 2}, {}, 2),
        ({"overfit_batches": 3, "accumulate_grad_batches": 2}, {"samples_per_prompt": 2}, 2),
    ],
)
def test_epochs_are_whole_steps(settings, options, steps, tmp_path):
    def fit(settings, options):
        method = GKD(on_policy_fraction=1.0) if "samples_per_prompt" in options else KD()
        trainer = tiny.make_trainer(tmp_path, [method], **settings)
        trainer.fit(module(), data(**options))
        return trainer.global_step

    with pytest.raises(ConfigError, match=r"--data\.prompts_per_epoch \d") as refused:
        fit(settings, options)
    prompts = re.search(r"--data\.prompts_per_epoch (\d+)", str(refused.value))
    kept = {name: v for name, v in settings.items() if name == "accumulate_grad_batches"}
    assert fit(kept, {**options, "prompts_per_epoch": int(prompts[1])}) == steps


def test_a_share_of_the_batches_to_overfit_names_files(tmp_path):
    with pytest.raises(ConfigError, match=r"overfit_batches 0\.5.*one file of the rows"):
        tiny.make_trainer(tmp_path, [KD()], overfit_batches=0.5).fit(module(), data())
    rows = tiny.make_rows(8)  # the file: the same rows to train on and to measure on
    trainer = tiny.make_trainer(tmp_path, [KD()])
    trainer.fit(module(), data(rows, val=rows))
    assert trainer.global_step == 2


def test_whole_multiples_of_the_accumulation_are_taken(tmp_path):
    trainer = tiny.make_trainer(tmp_path, [KD()], limit_train_batches=2, accumulate_grad_batches=2)
    trainer.fit(module(), data())
    assert trainer.global_step == 1


@pytest.mark.parametrize(("interval", "batches"), [(0.5, 4), (3, 6)])
def test_validation_comes_after_whole_steps(interval, batches, tmp_path):
    at = []
    spy = LambdaCallback(
        on_validation_end=lambda trainer, _: at.append(trainer.fit_loop.batch_idx + 1)
    )
    settings = {"val_check_interval": interval, "num_sanity_val_steps": 0}
    trainer = tiny.make_trainer(tmp_path, [KD(), spy], accumulate_grad_batches=2, **settings)
    trainer.fit(module(), data(tiny.make_rows(24), val=tiny.make_rows(4)))
    assert at == [batches]


def test_a_time_does_not_end_with_a_step(tmp_path):
    settings = {"val_check_interval": "00:00:00:01", "accumulate_grad_batches": 2}
    with pytest.raises(ConfigError, match="give a number of optimizer steps"):
        tiny.make_trainer(tmp_path, [KD()], **settings).fit(module(), data(val=tiny.make_rows(4)))


def test_the_first_batches_of_validation_are_of_all_lengths():
    examples = [
        Example(i, (3,), (False,), tuple([4] * (1 + i)), "a", "b" * (1 + i)) for i in range(64)
    ]
    batches = list(DatasetResponses(examples, batch_size=4))
    lengths = [float(batch.lengths.float().mean()) for batch in batches]
    overall = sum(lengths) / len(lengths)
    assert abs(sum(lengths[:6]) / 6 - overall) < 0.35 * overall
    assert lengths != sorted(lengths, reverse=True)
    assert sorted(i for batch in batches for i in batch.index.tolist()) == list(range(64))


def test_an_end_of_turn_ends_a_response(tmp_path):
    tokenizer = tiny.make_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ 'p' if m.role == 'user' else '' }}{{ m.content }}"
        "{{ '<bos>' if m.role == 'assistant' else '' }}{% endfor %}"
    )
    chats = [
        {
            "messages": [
                {"role": "user", "content": "a" * (1 + i)},
                {"role": "assistant", "content": "b" * (1 + i % 3)},
            ]
        }
        for i in range(8)
    ]
    pair = DistillationModule(tiny.make_llama(1), tiny.make_llama(2), tokenizer=tokenizer)
    assert pair.eos_ids == (tiny.EOS,)
    tiny.make_trainer(tmp_path, [KD(), LastCheckpoint()], max_steps=1).fit(pair, data(chats))
    assert pair.eos_ids == (tiny.EOS, tiny.BOS)
    saved = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    assert saved["okd_lightning"]["eos_ids"] == [tiny.EOS, tiny.BOS]


def test_settings_without_effect_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="seq_kd has no effect"):
        GKD(on_policy_fraction=1.0, seq_kd=True)
    with pytest.raises(ConfigError, match="val_rollouts"):
        data(val_rollouts=-3)
    with pytest.raises(ConfigError, match="samples_per_prompt"):
        tiny.make_trainer(tmp_path, [KD()]).fit(module(), data(samples_per_prompt=2))


class StopsInValidation(tiny.Callback):
    def on_validation_start(self, trainer, pl_module):
        raise KeyboardInterrupt


def test_no_checkpoint_stands_before_a_validation_that_is_due(tmp_path):
    """A run that is killed there and resumed would never take it."""
    callbacks = [KD(), LastCheckpoint(every_n_steps=1), StopsInValidation()]
    settings = {"max_steps": 4, "val_check_interval": 2, "num_sanity_val_steps": 0}
    trainer = tiny.make_trainer(tmp_path, callbacks, **settings)
    with pytest.raises(SystemExit):
        trainer.fit(module(), data(val=tiny.make_rows(4)))
    saved = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    assert saved["global_step"] == 1
