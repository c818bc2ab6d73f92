"""A sequence classifier as a reward.

Frozen here: a row's reward is the model's own output for that row alone, whatever batch it is in,
for heads that read the last token and for encoders; the row is rendered by the reward model's own
template and tokenizer; a row that is too long has no score; a model that lacks its output's
weights, has two outputs, or is no classifier is refused before the run's models are loaded.
"""

from __future__ import annotations

import math

import pytest
import tiny
import torch
from cli_workbench import make_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from okd_lightning.callbacks import KD, OPDPlus, Reward
from okd_lightning.errors import ConfigError, DataError, ModelError, RewardError
from okd_lightning.records import Chat
from okd_lightning.rewards import RewardModel, ScoredRow

CPU = torch.device("cpu")
SMALL = {
    "vocab_size": 260,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 96,
    "initializer_range": 0.4,
}
KINDS = {
    "llama": {**SMALL, "num_key_value_heads": 1, "pad_token_id": None},
    "llama with its end as padding": {**SMALL, "num_key_value_heads": 1, "pad_token_id": 1},
    "qwen2": {**SMALL, "num_key_value_heads": 1, "pad_token_id": 258},
    "gpt2": {"vocab_size": 260, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 96},
    "bert": SMALL,
}
TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</s>{% endfor %}"
    "{% if tools %}{{ tools | length }} tools{% endif %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def save(folder, kind="llama", template=TEMPLATE, num_labels=1, **changes):
    torch.manual_seed(0)
    fields = {**KINDS[kind], "num_labels": num_labels, **changes}
    config = AutoConfig.for_model(kind.split()[0], **fields)
    model = AutoModelForSequenceClassification.from_config(config)
    model.save_pretrained(folder)
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return model.eval(), tokenizer


ROWS = [
    ScoredRow("hello", "a", chat=Chat(({"role": "user", "content": "hi"},))),
    ScoredRow("hello", "a longer answer"),
    ScoredRow("hello again, and at some length", "yes"),
    ScoredRow("h", ""),
    ScoredRow("hello", "a longer answer</s>"),
]


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_gets_its_own_output_in_every_batch(kind, tmp_path):
    model, tokenizer = save(tmp_path, kind)
    with torch.no_grad():
        expected = []
        for row in ROWS:
            asked = row.prompt if row.chat is None else row.chat.messages[0]["content"]
            messages = [
                {"role": "user", "content": asked},
                {"role": "assistant", "content": row.response},
            ]
            text = tokenizer.apply_chat_template(messages, tokenize=False)
            ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
            expected.append(model(ids).logits.item())
    for batch_size in (1, 2, 8):
        found = RewardModel(str(tmp_path), batch_size=batch_size).score(ROWS)
        assert found == pytest.approx(expected, abs=1e-5)
    assert len({round(score, 3) for score in expected}) > 2


def test_a_tokenizer_without_a_template_reads_text(tmp_path):
    model, tokenizer = save(tmp_path, template=None)
    reward = RewardModel(str(tmp_path), residence="host", dtype="float64")
    ids = tokenizer("hello you", return_tensors="pt").input_ids
    with torch.no_grad():
        expected = model.double()(ids).logits.item()
    assert reward(["hello "], ["you"], [""]) == pytest.approx([expected])
    with pytest.raises(RewardError, match=r"rows are chats.*no chat_template"):
        reward.score(ROWS)
    assert math.isnan(reward([""], [""], [""])[0])  # no token


def test_a_row_beyond_the_context_has_no_score(tmp_path):
    save(tmp_path)
    first, second = RewardModel(str(tmp_path)).score(
        [ScoredRow("x" * 90, "y"), ScoredRow("x", "y")]
    )
    assert math.isnan(first)
    assert math.isfinite(second)


def test_a_template_that_refuses_is_named(tmp_path):
    save(tmp_path, template="{{ raise_exception('no such role') }}")
    with pytest.raises(DataError, match=r"template of RewardModel.*\(no such role"):
        RewardModel(str(tmp_path)).score(ROWS)


def test_models_that_are_refused(tmp_path):
    torch.manual_seed(0)
    config = AutoConfig.for_model("llama", **KINDS["llama"])
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "language_model")
    save(tmp_path / "two", num_labels=2)
    config.num_labels = 1
    language_model = AutoModelForCausalLM.from_config(config)
    language_model.save_pretrained(tmp_path / "renamed")
    broken, _ = save(tmp_path / "broken")
    broken.score.weight.data[0, 0] = math.nan
    broken.save_pretrained(tmp_path / "broken")
    for name, message in {
        "language_model": r"LlamaForCausalLM\) has 2 outputs; a reward model has one",
        "two": r"LlamaForSequenceClassification\) has 2 outputs",
        "broken": "weights hold NaN or infinity",
        "missing": "RewardModel path",
    }.items():
        with pytest.raises(ModelError, match=message):
            RewardModel(str(tmp_path / name)).open(CPU)
    make_tokenizer().save_pretrained(tmp_path / "renamed")
    with pytest.raises(ModelError, match=r"1 of \d+ weights are missing.*score"):
        RewardModel(str(tmp_path / "renamed")).open(CPU)


def test_settings_that_are_refused():
    with pytest.raises(ConfigError, match="batch_size must be at least 1"):
        RewardModel("x", batch_size=0)
    with pytest.raises(ConfigError, match="expected device or host"):
        RewardModel("x", residence="disk")
    with pytest.raises(ConfigError, match="dtype is 'int8'"):
        RewardModel("x", dtype="int8")


def test_it_trains_next_to_opd_plus_and_is_in_no_checkpoint(tmp_path, make_module):
    save(tmp_path / "reward")
    module = make_module()
    methods = [KD(), OPDPlus(), Reward(RewardModel(str(tmp_path / "reward")), weight=0.5)]
    recorder = tiny.fit(tmp_path, module, methods, tiny.make_rows(8))
    credits = recorder.steps[0][0].credits["reward"]
    assert len(set(credits.tolist())) > 1
    assert not [name for name in module.state_dict() if "score" in name]
    with pytest.raises(ModelError, match="RewardModel path"):
        tiny.fit(tmp_path, make_module(), [Reward(RewardModel("nowhere/at/all"))], [{}])
