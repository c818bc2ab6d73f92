"""Exports in lm-evaluation-harness, offline, on local files.

* The harness's log-likelihood of an answer is our own cross-entropy of the row, for models whose
  embedding tables are larger than the tokenizer, and for adapters; its own ``hf`` differs there.
* Its greedy answers are those of ``ExactMatch``; ``hf`` writes ids that no tokenizer knows.
"""

from __future__ import annotations

import pytest
import tiny
import torch
from accelerate.state import AcceleratorState
from peft import LoraConfig
from tokenizers.processors import TemplateProcessing

from okd_lightning.callbacks import KD, LastCheckpoint
from okd_lightning.callbacks.measures.answer_scores import greedy_answers
from okd_lightning.commands.export import export_student
from okd_lightning.data import RolloutDataModule
from okd_lightning.errors import DataError
from okd_lightning.records.batches import Example

pytest.importorskip("lm_eval")
pytestmark = pytest.mark.filterwarnings("ignore")  # the harness's own

ROWS = tiny.make_rows(9, seed=4)


@pytest.fixture(autouse=True)
def _first_to_ask() -> None:
    """Other tests leave half of accelerate's state of the process, on which HFLM trips."""
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(params=[None, "merged", "apart"], ids=["whole", "lora merged", "lora apart"])
def export(request, tmp_path, make_module):
    """(folder, what our validation measured there)."""
    adapter = (
        {}
        if request.param is None
        else {"student_adapter": LoraConfig(r=2, init_lora_weights=False)}
    )
    module = make_module(**adapter)
    tiny.fit(tmp_path, module, [KD()], tiny.make_rows(12), callbacks=[LastCheckpoint()])
    trainer = tiny.make_trainer(tmp_path)
    data = RolloutDataModule(val=ROWS, max_response_length=12, val_rollouts=0)
    (found,) = trainer.validate(module, data, verbose=False)
    checkpoint = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    export_student(make_module(**adapter), checkpoint, tmp_path / "out", request.param or "merged")
    return tmp_path / "out", found["val/cross_entropy"]


def test_its_likelihood_is_our_cross_entropy(export):
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    from okd_lightning.commands.lm_eval_adapter import ExportedLM

    folder, cross_entropy = export
    requests = [
        Instance("loglikelihood", {}, (row["prompt"], row["response"] + "<eos>"), 0) for row in ROWS
    ]
    num_tokens = sum(len(row["response"]) + 1 for row in ROWS)

    def measured(kind, **settings):
        model = kind(**settings, device="cpu", batch_size=4)
        return -sum(value for value, _ in model.loglikelihood(requests, disable_tqdm=True))

    own = measured(ExportedLM, pretrained=str(folder)) / num_tokens
    assert own == pytest.approx(cross_entropy, rel=1e-5)
    if not (folder / "adapter_config.json").exists():
        harness = measured(HFLM, pretrained=str(folder)) / num_tokens
        assert harness > own + 1e-3  # garbage rows beyond the tokenizer take probability


def test_its_greedy_answers_are_ours(make_module, student_folder):
    """Answers agree also where a row beyond the tokenizer's ids is the most likely."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    from okd_lightning.commands.lm_eval_adapter import ExportedLM

    settings = {"until": [], "max_gen_toks": 6, "do_sample": False}
    requests = [Instance("generate_until", {}, (row["prompt"], settings), 0) for row in ROWS]

    def answers(kind):
        model = kind(pretrained=str(student_folder), device="cpu", batch_size=4)
        return model.generate_until(requests, disable_tqdm=True)

    module = make_module()
    module.configure_model()
    data = RolloutDataModule(val=ROWS, max_response_length=6)
    examples = [
        Example(i, tuple(module.tokenizer(row["prompt"]).input_ids), (), (), "", "")
        for i, row in enumerate(ROWS)
    ]
    expected = greedy_answers(module, data, examples)
    assert any(expected)
    assert answers(ExportedLM) == expected
    assert answers(HFLM) != expected


NO_SYSTEM = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}"
    "{% endif %}{{ m.content }}{% endfor %}"
)


def test_templates_have_limits_and_systems_may_be_left_out(tmp_path):
    from okd_lightning.commands.lm_eval_adapter import ExportedLM

    tokenizer = tiny.make_tokenizer()
    tokenizer.chat_template = NO_SYSTEM
    tiny.make_llama(1).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model = ExportedLM(pretrained=str(tmp_path), device="cpu")
    chat = [{"role": "system", "content": "b"}, {"role": "user", "content": "a"}]
    assert model.apply_chat_template(chat) == "a"
    model.tokenizer.chat_template, model._templates = "{{ 'a' * 10 ** 11 }}", None
    with pytest.raises(DataError, match="the chat template needs more than 1 GiB"):
        model.apply_chat_template(chat)


def test_prompts_are_opened_and_not_closed(tmp_path):
    """The tokenizers add a bos and an eos to a text; a chat's template adds its own."""
    from okd_lightning.commands.lm_eval_adapter import ExportedLM

    tokenizer = tiny.make_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", tiny.BOS), ("<eos>", tiny.EOS)]
    )
    tokenizer.chat_template = "{% for m in messages %}<pad>{{ m.content }}{% endfor %}"
    tiny.make_llama(1).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model = ExportedLM(pretrained=str(tmp_path), device="cpu")
    a, b = tokenizer.convert_tokens_to_ids(["a", "b"])
    assert tokenizer("ab").input_ids == [tiny.BOS, a, b, tiny.EOS]
    assert model.tok_encode("ab") == [tiny.BOS, a, b]
    assert model._encode_pair("ab", "ba") == ([tiny.BOS, a, b], [b, a])
    ids, mask = model.tok_batch_encode(["ab", "b"])
    assert ids.tolist() == [[tiny.BOS, a, b], [tiny.PAD, tiny.BOS, b]]
    assert mask.tolist() == [[1, 1, 1], [0, 1, 1]]
    assert model.tok_batch_encode(["ab"], left_truncate_len=2)[0].tolist() == [[a, b]]
    text = model.apply_chat_template([{"role": "user", "content": "ab"}])
    assert model.tok_encode(text) == [tiny.PAD, a, b]
