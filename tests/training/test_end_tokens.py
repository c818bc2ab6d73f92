"""End tokens of a pair, through ``fit``.

Frozen here: the ends are those of both generation configs and the tokenizer, the student's own
first; ``end_tokens`` replaces them, by id or by token; a student that differs from its teacher only
in the id of its end keeps its length under reverse KL and OPD+, and loses its end if only that one
id counts; the log-probability of a sampled end is that of all ends, and a rollout's noise draws the
same ids as without the merge; with an engine that gives the id's alone, the ratio is on ids on both
sides; cross-entropy still teaches the dataset's own id; a checkpoint keeps the ends, and a resume
with others is refused; one that holds none (written by an earlier version) is warned about, and the
warning's option continues it as before; data take out ids after which a response goes on.
"""

from __future__ import annotations

import copy
import re
import warnings
from dataclasses import replace

import pytest
import tiny
import torch

from okd_lightning.callbacks import GKD, OPD, SFT, LastCheckpoint, OPDPlus
from okd_lightning.data.end_tokens import handed_over, written_elsewhere
from okd_lightning.divergences import ReverseKL
from okd_lightning.engines import EngineSource, TransformersEngine
from okd_lightning.errors import CheckpointError, ConfigError
from okd_lightning.losses import DrawnLogProb, ExactDivergence
from okd_lightning.records.batches import Example
from okd_lightning.records.noise import NoiseDomain, NoiseStream
from okd_lightning.records.requests import Prompt
from okd_lightning.records.sampling import Sampling
from okd_lightning.training.module import DistillationModule

OWN, OTHER = tiny.EOS, tiny.BOS
LONGEST = 12


def swapped(model):
    """Return the distributions with the two ends exchanged."""
    model = copy.deepcopy(model)
    index = torch.arange(model.config.vocab_size)
    index[[OWN, OTHER]] = index[[OTHER, OWN]]
    with torch.no_grad():
        for table in (model.get_input_embeddings(), model.get_output_embeddings()):
            table.weight.copy_(table.weight[index])
    model.generation_config.eos_token_id = OTHER
    return model


def make_student():
    """A model that stops often, with its own end rather than with the other."""
    model = tiny.make_llama(0)
    ids = torch.arange(3, tiny.NUM_IDS).repeat(2)[None]
    with torch.no_grad():
        usual = model.model(ids).last_hidden_state[0].mean(0)
        weight = model.get_output_embeddings().weight
        weight[OTHER] *= 0.05
        weight[OWN] = 0.3 * weight[OWN] + 2.5 * usual / usual.square().sum()
    return model


def make_module(**settings) -> DistillationModule:
    student = make_student()
    settings = {"tokenizer": tiny.make_tokenizer(), "learning_rate": 1e-2, **settings}
    return DistillationModule(student, swapped(student), **settings)


PROMPTS = [{"prompt": "".join(tiny.LETTERS[(i * j) % 16] for j in range(1, 5))} for i in range(8)]


def fitted(tmp_path, module, method, steps=8, **settings):
    data = {"max_response_length": LONGEST, "batch_size": 8}
    rows = PROMPTS
    recorder = tiny.fit(
        tmp_path, module, [method], rows, data=data, max_epochs=-1, max_steps=steps, **settings
    )
    lengths = [
        float((batch.lengths - batch.prompt_lengths).double().mean())
        for step in recorder.steps
        for batch in step
    ]
    return lengths, recorder


def methods():
    return {
        "reverse KL": GKD(divergence=ReverseKL(), on_policy_fraction=1.0),
        "OPD+": OPDPlus(),
    }


@pytest.mark.parametrize("name", methods())
def test_length_stays_where_the_ends_are_one_outcome(name, tmp_path):
    module = make_module()
    assert module.vocabulary.end_ids == module.eos_ids == (OWN, OTHER)
    lengths, _ = fitted(tmp_path, module, methods()[name])
    first, last = sum(lengths[:4]) / 4, sum(lengths[-4:]) / 4
    assert abs(last - first) < 0.3 * first, lengths


@pytest.mark.parametrize("name", methods())
def test_length_grows_to_its_limit_where_one_id_is_the_end(name, tmp_path):
    module = make_module(end_tokens=OWN)
    assert module.vocabulary.end_ids == module.eos_ids == (OWN,)
    lengths, _ = fitted(tmp_path, module, methods()[name])
    assert lengths[0] < 0.7 * LONGEST, lengths
    assert sum(lengths[-4:]) / 4 > 0.85 * LONGEST, lengths


def test_models_that_differ_in_their_end_only_have_no_divergence(tmp_path):
    """The last step's gradient is that of rounding; the measures of validation are 0."""
    module = make_module(dtype="float64")
    method = methods()["reverse KL"]
    rows = [{**row, "response": "ab"} for row in PROMPTS]
    _, recorder = fitted(tmp_path, module, method, steps=1)
    assert max(float(g.abs().max()) for g in recorder.gradients[0].values()) < 1e-6
    trainer = tiny.make_trainer(tmp_path)
    options = {"batch_size": 4, "max_prompt_length": 16, "max_response_length": 8}
    data = tiny.RolloutDataModule(rows[:4], rows[:4], seed=7, val_rollouts=4, **options)
    (measured,) = trainer.validate(make_module(), data, verbose=False)[:1]
    assert measured["val/reverse_kl"] == pytest.approx(0.0, abs=1e-5)


@pytest.mark.parametrize("end_tokens", [[OWN, OTHER], ["<bos>", "<eos>"], [OTHER, "<eos>"]])
def test_end_tokens_are_ids_or_tokens_and_the_students_own_comes_first(end_tokens):
    module = make_module(end_tokens=end_tokens)
    assert module.vocabulary.end_ids == (OWN, OTHER)


def test_the_students_other_ends_still_stop():
    student = make_student()
    student.generation_config.eos_token_id = [OWN, 5]
    module = DistillationModule(
        student, swapped(student), tokenizer=tiny.make_tokenizer(), end_tokens=[OWN, OTHER]
    )
    assert module.vocabulary.end_ids == (OWN, OTHER)
    assert module.eos_ids == (OWN, OTHER, 5)


@pytest.mark.parametrize(
    ("end_tokens", "message"),
    [
        ("<eso>", "did you mean '<eos>'"),
        (99, "neither an id nor a token"),
        ([], "is empty"),
        (True, "neither an id nor a token"),
    ],
)
def test_end_tokens_that_are_none_are_refused(end_tokens, message):
    with pytest.raises(ConfigError, match=message):
        make_module(end_tokens=end_tokens)


# ---------------------------------------------------------------- sampling


def rollout_of(module, vocabulary, sampling=None, noise=3):
    module.configure_model()
    model = module.student.eval()
    engine = TransformersEngine(model, vocabulary, module.eos_ids)
    prompts = [Prompt((3 + i, 4 + i, 5 + i), i) for i in range(8)]
    stream = NoiseStream(noise, NoiseDomain.DIAGNOSIS)
    return engine.generate(prompts, sampling or Sampling(), stream, LONGEST), prompts


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(0.7), Sampling(1.3, 0.9, 12)], ids=str)
def test_a_sampled_end_has_the_log_probability_of_all_ends(sampling):
    module = make_module()
    rollout, prompts = rollout_of(module, module.vocabulary, sampling)
    alone, _ = rollout_of(module, replace(module.vocabulary, end_ids=(OWN,)), sampling)
    assert rollout.response_ids == alone.response_ids
    assert all(response.merges_ends for response in rollout)
    assert not any(response.merges_ends for response in alone)
    num_ends = 0
    for prompt, response, single in zip(prompts, rollout, alone, strict=True):
        ids, merged = response.ids, response.logprobs
        assert merged[:-1] == single.logprobs[:-1]
        if ids[-1] not in module.eos_ids:
            continue
        num_ends += 1
        with torch.no_grad():
            logits = module.student(torch.tensor([prompt.ids + ids[:-1]])).logits[:, -1]
        known = sampling.logprobs(module.vocabulary.cut(logits))[0]
        expected = float(known[[OWN, OTHER]].logsumexp(0))
        assert merged[-1] == pytest.approx(expected, abs=1e-5)
    assert num_ends > 3


class RawEngine(EngineSource):
    """Engine that gives the log-probability of the sampled id alone, as vLLM does."""

    def engine(self, model, vocabulary, eos_ids):
        return TransformersEngine(model, replace(vocabulary, end_ids=eos_ids[:1]), eos_ids)


@pytest.mark.parametrize("engine", [None, RawEngine()], ids=["merged", "raw"])
def test_the_ratio_is_one_on_policy(engine, tmp_path):
    module = make_module(engine=engine)
    _, recorder = fitted(tmp_path, module, OPDPlus(), steps=1)
    (batch,) = recorder.steps[0]
    assert (batch.merges_ends is None) == (engine is not None)
    assert recorder.losses[0]["train/sampler_gap"] < 1e-5


@pytest.mark.parametrize("frozen", [False, True])
def test_both_kinds_of_engine_give_the_same_advantages(frozen, tmp_path):
    found = []
    for engine in (None, RawEngine()):
        module = make_module(engine=engine)
        _, recorder = fitted(tmp_path, module, OPD(frozen_credit=frozen), steps=1)
        found.append(recorder.losses[0])
    assert found[0]["train/opd_log_ratio"] == pytest.approx(0.0, abs=1e-5)
    assert found[1]["train/opd_log_ratio"] == pytest.approx(0.0, abs=1e-5)


# ---------------------------------------------------------------- data, checkpoints


def test_cross_entropy_teaches_the_datasets_own_end(tmp_path):
    module = make_module()
    rows = [{"prompt": "abc", "response": "d"}]
    tiny.fit(tmp_path, module, [SFT()], rows, max_epochs=-1, max_steps=30)
    with torch.no_grad():
        ids = module.tokenizer("abcd", add_special_tokens=False).input_ids
        logits = module.student.eval()(torch.tensor([ids])).logits[0, -1]
        probs = module.vocabulary.cut(logits).softmax(-1)
    assert probs[OWN] > 0.5 > probs[OTHER]


def test_a_resume_with_other_ends_is_refused_and_its_hint_works(tmp_path):
    def run(steps, ckpt_path=None, **settings):
        callbacks = [LastCheckpoint(every_n_steps=1)]
        tiny.fit(
            tmp_path,
            module := make_module(**settings),
            [GKD(on_policy_fraction=1.0)],
            PROMPTS,
            callbacks=callbacks,
            max_epochs=-1,
            max_steps=steps,
            ckpt_path=ckpt_path,
        )
        return module

    run(1)
    path = next(tmp_path.rglob("last.ckpt"))
    with pytest.raises(CheckpointError, match=r"resume with --model.end_tokens \[1,2\]"):
        run(2, path, end_tokens=[OWN])
    module = run(2, path, end_tokens=[OTHER, OWN])
    assert module.vocabulary.end_ids == (OWN, OTHER)
    loaded = DistillationModule.load_from_checkpoint(
        path, student=make_student(), teacher=make_student(), tokenizer=tiny.make_tokenizer()
    )
    assert loaded.vocabulary.end_ids == (OWN, OTHER)


def test_a_checkpoint_without_ends_is_warned_about_and_the_option_named_continues_it(tmp_path):
    def run(steps, folder, ckpt_path=None, **settings):
        module = make_module(**settings)
        where = tmp_path / folder
        saver = LastCheckpoint(every_n_steps=1)
        own = {"callbacks": [saver], "max_epochs": -1, "max_steps": steps, "ckpt_path": ckpt_path}
        tiny.fit(where, module, [GKD(on_policy_fraction=1.0)], PROMPTS, **own)
        return module, where / "checkpoints" / "last.ckpt"

    uninterrupted, _ = run(2, "whole", end_tokens=[OWN])
    _, path = run(1, "before", end_tokens=[OWN])
    checkpoint = torch.load(path, weights_only=True)
    del checkpoint["okd_lightning"]["end_ids"]  # as an earlier version wrote it
    torch.save(checkpoint, path)
    with pytest.warns(UserWarning, match=r"compared the end ids \[1, 2\] one by one") as caught:
        module, _ = run(2, "merged", path)
    assert module.vocabulary.end_ids == (OWN, OTHER)
    advice = next(str(w.message) for w in caught if "one by one" in str(w.message))
    asked = re.search(r"--model\.end_tokens \[(\d+)\]", advice)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*one by one")
        as_before, _ = run(2, "as before", path, end_tokens=[int(asked[1])])
    assert as_before.vocabulary.end_ids == (OWN,)
    found, expected = tiny.weights(as_before), tiny.weights(uninterrupted)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def example(response, prompt=(3, 4), mask=None) -> Example:
    return Example(0, prompt, mask or (False,) * len(prompt), response, "", "")


def test_ids_after_which_a_response_continues_are_no_ends():
    ends = (1, 2)
    assert handed_over([example((5, 2, 6, 1))], ends) == [2]
    assert handed_over([example((5, 1), (3, 2, 4), (True, True, False))], ends) == [2]
    assert handed_over([example((5, 1), (3, 2, 4))], ends) == []  # a prompt without loss
    assert handed_over([example((5, 1, 6, 1))], ends) == []  # turns end as the response does
    assert handed_over([example((5, 2, 6))], ends) == []  # cut: its end is not known
    assert handed_over([example((5, 2, 6, 1))], (1,)) == []


HANDS_OVER = (
    "{% for m in messages %}{{ m.content }}"
    "{% if m.tool_calls is defined %}<bos>{% else %}<eos>{% endif %}{% endfor %}"
)
CLOSES = (
    "{% for m in messages %}{{ m.content }}"
    "{% if loop.last %}<bos>{% else %}<eos>{% endif %}{% endfor %}"
)


@pytest.mark.parametrize(
    ("template", "found"),
    [(None, []), (HANDS_OVER, [2]), (CLOSES, []), ("{{ raise_exception('x<bos>') }}", [])],
)
def test_ids_that_a_template_writes_elsewhere_are_no_ends(template, found):
    tokenizer = tiny.make_tokenizer()
    tokenizer.chat_template = template
    assert written_elsewhere(tokenizer, (1, 2), {}) == found


def test_measures_of_a_batch_see_one_stop(tmp_path):
    module = make_module()
    _, recorder = fitted(tmp_path, module, GKD(on_policy_fraction=1.0), steps=1)
    (batch,) = recorder.steps[0]
    with torch.no_grad():
        measured = module.measure(batch, [ExactDivergence(ReverseKL()), DrawnLogProb()])
    gap = measured[DrawnLogProb()] - measured.sampler_logprobs
    assert measured[ExactDivergence(ReverseKL())].abs().max() < 1e-4
    assert gap.abs().max() < 0.2  # after one step of training
