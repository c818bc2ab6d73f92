"""PaperMeasures: UNC, ExAccErr, spread of logits and ROUGE-L in validation and test.

* Every number is what a loop over rows with plain transformers calls gives.
* KL on the student's prefixes is taken after *student* samples, ε after *teacher* samples.
* With an online module, the teacher is the base one.
* Test logs under test/; no teacher, too few prompts and a foreign data module are refused.
"""

import statistics

import pytest
import tiny
import torch
from peft import LoraConfig

from okd_lightning.callbacks import OKD, SFT, PaperMeasures
from okd_lightning.engines import NoiseStream, Sampling
from okd_lightning.errors import ConfigError
from okd_lightning.records import Request
from okd_lightning.records.noise import NoiseDomain
from okd_lightning.rewards import functions as rewards
from okd_lightning.training.module import DistillationModule

VAL = tiny.make_rows(9, seed=1)


def make_module(teacher: bool = True) -> DistillationModule:
    return DistillationModule(
        tiny.make_llama(1).double(),
        tiny.make_llama(2, rows=tiny.TEACHER_ROWS).double() if teacher else None,
        tokenizer=tiny.make_tokenizer(),
        learning_rate=1e-2,
    )


def make_data(rows=VAL):
    return tiny.RolloutDataModule(
        tiny.make_rows(16),
        rows,
        batch_size=4,
        max_prompt_length=8,
        max_response_length=8,
        val_rollouts=0,
    )


def measured(tmp_path, module, callbacks, part="validate", data=None):
    trainer = tiny.make_trainer(tmp_path, callbacks)
    data = data or make_data()
    getattr(trainer, part)(module, data, verbose=False)
    return {name: float(value) for name, value in trainer.callback_metrics.items()}, data


def logits_of(model, ids, start):
    """[response, ids] float64: what predicts every token from ``start`` on, row by row."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids])).logits[0, start - 1 : -1, : tiny.NUM_IDS]
    return logits.double()


def unc(logits, targets):
    probabilities = logits.softmax(-1)
    return statistics.mean(1 - float(probabilities[i, t]) for i, t in enumerate(targets))


def lcs(a, b):
    if not a or not b:
        return 0
    if a[-1] == b[-1]:
        return 1 + lcs(a[:-1], b[:-1])
    return max(lcs(a[:-1], b), lcs(a, b[:-1]))


def rouge_l(response, reference):
    a, b = response.split(), reference.split()
    common = lcs(a, b)
    return 2 * common / (len(a) + len(b)) if common else 0.0


def test_against_a_slow_loop(tmp_path):
    module = make_module()
    num = 8
    found, data = measured(tmp_path, module, [SFT(), PaperMeasures(num_prompts=num, seed=3)])
    examples = list(data.examples("val").examples)[:num]
    student, teacher = module.student, module.teacher
    uncs, spreads = [], {"student": [], "teacher": []}
    for example in examples:
        ids, start = list(example.prompt_ids + example.response_ids), len(example.prompt_ids)
        both = {
            "student": logits_of(student, ids, start),
            "teacher": logits_of(teacher, ids, start),
        }
        uncs.append([unc(both[who], example.response_ids) for who in ("teacher", "student")])
        for who, logits in both.items():
            spreads[who] += logits.std(-1, correction=0).tolist()
    assert found["val/uncertainty"] == pytest.approx(statistics.mean(s for _, s in uncs), rel=1e-4)
    ranked = [s for _, s in sorted(uncs)]
    for name, part in zip(
        ("easy", "medium", "hard"), (ranked[:3], ranked[3:6], ranked[6:]), strict=True
    ):
        assert found[f"val/uncertainty_{name}"] == pytest.approx(statistics.mean(part), rel=1e-4)
    for who, values in spreads.items():
        expected = statistics.mean(values)
        assert found[f"val/{who}_logit_std"] == pytest.approx(expected, rel=1e-4)

    kls, rouges = {}, []
    for author in ("student", "teacher"):
        noise = NoiseStream(3, NoiseDomain.PAPER_MEASURES)
        prompts = tuple(example.prompt_for("student") for example in examples)
        rollout = module.respond(Request(prompts, Sampling(), noise, 8, author))
        kls[author] = []
        for example, response in zip(examples, rollout.response_ids, strict=True):
            ids, start = list(example.prompt_ids + response), len(example.prompt_ids)
            p = logits_of(student, ids, start).log_softmax(-1)
            q = logits_of(teacher, ids, start).log_softmax(-1)
            kls[author].append((q.exp() * (q - p)).sum(-1).tolist())
            if author == "student":
                rouges.append(rouge_l(module.decode(response), module.decode(example.response_ids)))

    def mean(author, step):
        values = [kl[step] for kl in kls[author] if len(kl) > step]
        return statistics.mean(values) if 2 * len(values) >= num else None

    steps = [s for s in range(8) if None not in (mean("student", s), mean("teacher", s))]
    regret = sum(mean("student", s) for s in steps)
    expected = sum(mean("teacher", s) for s in steps)
    assert steps
    assert kls["student"] != kls["teacher"]
    assert found["val/excess_accumulated_error"] == pytest.approx(
        (regret - expected) / expected * 100, rel=1e-3
    )
    assert found["val/rouge_l"] == pytest.approx(statistics.mean(rouges), abs=1e-6)


def test_rouge_l_of_words(tmp_path):
    """The tiny tokenizer writes one word; the text measure itself is checked on sentences."""
    for response, reference in (
        ("the cat sat on the mat", "the cat lay on a mat"),
        ("a b c d", "d c b a"),
        ("", "the cat"),
    ):
        assert rewards.rouge_l(response, reference) == pytest.approx(rouge_l(response, reference))


def test_base_teacher_next_to_an_online_module(tmp_path):
    module = make_module()
    method = OKD(online_module=LoraConfig(r=4, lora_alpha=4))
    measures = PaperMeasures(num_prompts=6)
    before, _ = measured(tmp_path, module, [method, measures])
    with torch.no_grad():
        for name, parameter in module.teacher.named_parameters():
            if "lora_" in name:
                parameter.normal_()
    after, _ = measured(tmp_path, module, [method, measures])
    assert after["val/adapted_forward_kl"] != pytest.approx(before["val/adapted_forward_kl"])
    for name in ("uncertainty_hard", "excess_accumulated_error", "teacher_logit_std", "rouge_l"):
        assert after[f"val/{name}"] == before[f"val/{name}"]


def test_in_test(tmp_path):
    found, _ = measured(tmp_path, make_module(), [SFT(), PaperMeasures(num_prompts=6)], "test")
    assert "test/uncertainty" in found
    assert "val/uncertainty" not in found


def test_refusals(tmp_path):
    with pytest.raises(ConfigError, match="num_prompts must be at least 3"):
        PaperMeasures(num_prompts=2)
    with pytest.raises(ConfigError, match="compares with a teacher"):
        measured(tmp_path, make_module(teacher=False), [SFT(), PaperMeasures()])
    with pytest.raises(ConfigError, match="needs 3 val prompts"):
        measured(tmp_path, make_module(), [SFT(), PaperMeasures()], data=make_data(VAL[:2]))
