"""A causal LM as (hidden states, head).

Frozen here: head(head_inputs) equals the model's own logits, for plain, tied, biased, scaled and
soft-capped heads and for adapters, also on the head itself; padding on the right changes no real
position; an architecture that treats its logits in a way that is not known is refused and not
silently mis-measured; the hook is removed.
"""

from __future__ import annotations

import pytest
import tiny
import torch
from architectures import ARCHITECTURES, build
from peft import LoraConfig
from transformers import AutoConfig

from okd_lightning.models import LMHead, Vocabulary, add_adapter, head_inputs, max_positions

INPUT_IDS = torch.tensor([[3, 5, 7, 9, 11], [4, 6, 0, 0, 0]])
LENGTHS = torch.tensor([5, 2])
MASK = torch.arange(5) < LENGTHS[:, None]


def check_equal(model, vocabulary: Vocabulary | None = None) -> None:
    vocabulary = vocabulary or Vocabulary(23)
    with torch.no_grad():
        logits = LMHead.of(model, vocabulary)(head_inputs(model, INPUT_IDS, MASK))
        for i, length in enumerate(LENGTHS.tolist()):
            own = model(input_ids=INPUT_IDS[i : i + 1, :length]).logits[0]
            assert own.std() > 0.1
            torch.testing.assert_close(
                logits[i, :length], own[:, : vocabulary.size], rtol=1e-4, atol=1e-4
            )


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_our_logits_are_the_models_own(model_type):
    check_equal(build(model_type))


@pytest.mark.parametrize("model_type", ["llama", "gemma2"])
@pytest.mark.parametrize("is_tied", [True, False])
def test_tied_and_untied_heads(model_type, is_tied):
    model = build(model_type, tie_word_embeddings=is_tied)
    is_same = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert is_same == is_tied
    check_equal(model)


@pytest.mark.parametrize("target", [["q_proj", "v_proj"], ["q_proj", "lm_head"], "all-linear"])
def test_adapters_take_part(target):
    model = build("llama")
    adapter = LoraConfig(r=4, target_modules=target, init_lora_weights=False)
    with torch.no_grad():
        before = model(input_ids=INPUT_IDS[:1]).logits
    with torch.random.fork_rng():
        torch.manual_seed(6)
        add_adapter(model, adapter, "--model.student_adapter")
    with torch.no_grad():
        assert (model(input_ids=INPUT_IDS[:1]).logits - before).abs().max() > 0.1
    check_equal(model)


def test_what_stands_after_a_row_is_not_read():
    model = build("llama")
    garbage = torch.where(MASK, INPUT_IDS, torch.full_like(INPUT_IDS, 20))
    with torch.no_grad():
        plain, spoilt = (head_inputs(model, ids, MASK)[MASK] for ids in (INPUT_IDS, garbage))
        wide = torch.cat([garbage, torch.full((2, 9), 21)], dim=1)
        padded = head_inputs(model, wide, torch.arange(14) < LENGTHS[:, None])[:, :5][MASK]
    torch.testing.assert_close(spoilt, plain, rtol=0, atol=0)
    torch.testing.assert_close(padded, plain, rtol=1e-5, atol=1e-5)


def test_gradients_of_the_split_model_are_the_whole_ones():
    split, whole = build("gemma2").double(), build("gemma2").double()
    logits = LMHead.of(split, Vocabulary(23))(head_inputs(split, INPUT_IDS, MASK))
    logits[:, :-1][MASK[:, 1:]].log_softmax(-1)[:, 3].sum().backward()
    own = whole(input_ids=INPUT_IDS, attention_mask=MASK).logits
    own[:, :-1][MASK[:, 1:]].log_softmax(-1)[:, 3].sum().backward()
    for (name, found), (_, expected) in zip(
        split.named_parameters(), whole.named_parameters(), strict=True
    ):
        torch.testing.assert_close(found.grad, expected.grad, msg=name)


def test_the_hook_is_gone_also_after_an_error():
    model = build("llama")
    with pytest.raises(IndexError):
        head_inputs(model, torch.tensor([[99]]), torch.tensor([[True]]))
    head_inputs(model, INPUT_IDS, MASK)
    assert model(input_ids=INPUT_IDS).logits.shape == (2, 5, 23)


def test_invalid_ids_are_minus_infinity_and_rows_after_the_tokenizer_are_cut():
    model = build("llama")
    with torch.no_grad():
        logits = LMHead.of(model, Vocabulary(20, (4, 7)))(head_inputs(model, INPUT_IDS, MASK))
        own = model(input_ids=INPUT_IDS[:1]).logits[0, :, :20]
    assert logits.shape[-1] == 20
    assert (logits[..., [4, 7]] == -torch.inf).all()
    rest = [i for i in range(20) if i not in (4, 7)]
    torch.testing.assert_close(logits[0][:, rest], own[:, rest], rtol=1e-5, atol=1e-5)


def test_bf16_logits_are_handed_over_in_float32_and_float64_stays():
    vocabulary = Vocabulary(23)
    narrow, wide = build("llama").bfloat16(), build("llama").double()
    for model, dtype in ((narrow, torch.float32), (wide, torch.float64)):
        logits = LMHead.of(model, vocabulary)(head_inputs(model, INPUT_IDS, MASK))
        assert logits.dtype == dtype
    narrow_logits = LMHead.of(narrow, vocabulary)(head_inputs(narrow, INPUT_IDS, MASK))
    assert (narrow_logits[MASK] - logits[MASK]).abs().max() < 0.1 * logits[MASK].abs().max()


def test_max_positions():
    assert max_positions(tiny.make_llama(1).config) == 64
    assert max_positions(tiny.make_gpt2(1).config) == 64
    assert max_positions(AutoConfig.for_model("bloom")) is None
