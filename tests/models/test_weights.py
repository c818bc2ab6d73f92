"""Missing weights of a folder, and stored numbers that are not weights.

Frozen here: a folder that lacks anything of its model, or holds numbers that are not the model's,
is refused in one line that names the option and what is wrong, as student and as teacher, read
whole or by shard; what a model computes by itself or ties may be absent; stored weights without a
place are named once; quantised weights may be frozen and not trained.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from okd_lightning.errors import ModelError
from okd_lightning.models import load_causal_lm, load_model_config
from okd_lightning.models.deferred import deferred_weights
from okd_lightning.models.sources import locate
from okd_lightning.models.weight_files import WeightFiles
from okd_lightning.sharding.loading import fill_from_files
from okd_lightning.training.module import DistillationModule

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
Q_PROJ = "model.layers.1.self_attn.q_proj.weight"


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / WEIGHTS)


def without(*parts: str):
    def damage(folder: Path) -> None:
        kept = {n: v for n, v in weights_of(folder).items() if not any(p in n for p in parts)}
        save_file(kept, folder / WEIGHTS, {"format": "pt"})

    return damage


def changed(name: str, change):
    def damage(folder: Path) -> None:
        weights = weights_of(folder)
        weights[name] = change(weights[name])
        save_file(weights, folder / WEIGHTS, {"format": "pt"})

    return damage


def with_value(value: float):
    def change(weight: torch.Tensor) -> torch.Tensor:
        weight[0, 0] = value
        return weight

    return change


def cut(num_bytes: int):
    def damage(folder: Path) -> None:
        content = (folder / WEIGHTS).read_bytes()
        (folder / WEIGHTS).write_bytes(content[:num_bytes])

    return damage


def configured(**fields):
    def damage(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **fields}))

    return damage


def in_shards(folder: Path) -> None:
    weights = weights_of(folder)
    names = sorted(weights)
    (folder / WEIGHTS).unlink()
    parts = {"model-00001-of-00002.safetensors": names[::2]}
    parts["model-00002-of-00002.safetensors"] = names[1::2]
    for file, own in parts.items():
        save_file({n: weights[n] for n in own}, folder / file, {"format": "pt"})
    index = {"metadata": {}, "weight_map": {n: f for f, own in parts.items() for n in own}}
    (folder / INDEX).write_text(json.dumps(index))


def after_shards(change):
    def damage(folder: Path) -> None:
        in_shards(folder)
        change(folder)

    return damage


def pickled(folder: Path) -> None:
    torch.save(weights_of(folder), folder / "pytorch_model.bin")
    (folder / WEIGHTS).unlink()


def lfs_pointer(folder: Path) -> None:
    (folder / WEIGHTS).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")


def of_gpt2(folder: Path) -> None:
    tiny.make_gpt2(1).config.save_pretrained(folder)


def index_of(text: str):
    return after_shards(lambda folder: (folder / INDEX).write_text(text))


def index_with_a_name_more(folder: Path) -> None:
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["model.more"] = "model-00001-of-00002.safetensors"
    (folder / INDEX).write_text(json.dumps(index))


def other_file_name(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "consolidated.safetensors")


def remote_code(folder: Path) -> None:
    configured(model_type="my_model", auto_map={"AutoConfig": "configuration_my.MyConfig"})(folder)


SECOND_SHARD = "model-00002-of-00002.safetensors"
BROKEN = {
    "a layer missing": (without("layers.1."), r"9 of 21 weights are missing.*layers\.1\."),
    "one weight missing": (without(Q_PROJ), r"1 of 21 weights.*layers\.1\.self_attn\.q_proj"),
    "the head missing, not tied": (without("lm_head"), r"lm_head\.weight"),
    "the embedding missing": (without("embed_tokens"), r"embed_tokens"),
    "no weights in the file": (without(""), "21 of 21 weights are missing"),
    "an empty file": (cut(0), r"model\.safetensors \(0 bytes\) is not a complete"),
    "a truncated header": (cut(100), r"is not a complete safetensors file"),
    "truncated data": (cut(5000), r"\(5,000 bytes\) is not a complete safetensors file"),
    "a Git LFS pointer": (lfs_pointer, "git lfs pull"),
    "pickled weights": (pickled, r"pickled \(pytorch_model\.bin\).*safetensors"),
    "no weights": (lambda folder: (folder / WEIGHTS).unlink(), "holds no safetensors"),
    "another file name": (other_file_name, r"though consolidated\.safetensors is"),
    "a shard missing": (
        after_shards(lambda folder: (folder / SECOND_SHARD).unlink()),
        rf"1 are not there \(such as {SECOND_SHARD}\)",
    ),
    "an index that is no JSON": (index_of("{"), rf"{INDEX} is broken"),
    "an index without its map": (index_of("{}"), rf"{INDEX} is broken"),
    "an index of a list": (index_of("[1]"), rf"{INDEX} is broken"),
    "an index of other names": (
        after_shards(index_with_a_name_more),
        r"no file holds.*model\.more",
    ),
    "another architecture": (of_gpt2, "config.json is of another architecture"),
    "other shapes": (configured(intermediate_size=40), r"6 weights.*\[32, 48\].*\[32, 40\]"),
    "another table": (configured(vocab_size=90), r"embed_tokens.*\[22, 32\].*\[90, 32\]|lm_head.*"),
    "more layers than weights": (configured(num_hidden_layers=3), r"layers\.2\."),
    "NaN": (changed(Q_PROJ, with_value(float("nan"))), f"hold NaN or infinity .{Q_PROJ}"),
    "infinity": (changed(Q_PROJ, with_value(float("-inf"))), f"NaN or infinity .{Q_PROJ}"),
    "integers": (changed(Q_PROJ, lambda w: w.to(torch.int8)), f"{Q_PROJ} as I8.*quantization_c"),
    "a config that is no JSON": (
        lambda folder: (folder / "config.json").write_text("{"),
        "holds no model that can be loaded",
    ),
    "a config of a list": (
        lambda folder: (folder / "config.json").write_text("[]"),
        "holds no model that can be loaded",
    ),
    "no config": (
        lambda folder: (folder / "config.json").unlink(),
        "holds no model that can be loaded",
    ),
    "an unknown model type": (configured(model_type="lama"), "lama"),
    "code of its own": (remote_code, "code of its own repository"),
}


@pytest.fixture(scope="module")
def whole_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    tiny.make_llama(1).save_pretrained(folder)
    tiny.make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def folder(whole_folder, tmp_path):
    return Path(shutil.copytree(whole_folder, tmp_path / "model"))


def load_by_shard(folder: Path, **settings):
    """Load by shard as two ranks would, on one device and with whole weights."""
    config = load_model_config(str(folder), "--model.student", 0)
    with deferred_weights():
        model = load_causal_lm(str(folder), config, "--model.student", **settings)
    fill_from_files(model, torch.device("cpu"))
    return model


@pytest.mark.filterwarnings("ignore:.*have no place:UserWarning")
@pytest.mark.parametrize("damage", BROKEN, ids=BROKEN.keys())
@pytest.mark.parametrize("side", ["student", "teacher"])
def test_a_broken_folder_is_refused_in_one_line(side, damage, folder, caplog):
    damaged, message = BROKEN[damage]
    damaged(folder)
    other = tiny.make_llama(2)
    pair = {"student": other, "teacher": other, side: str(folder)}

    def build() -> None:
        DistillationModule(**pair, tokenizer=tiny.make_tokenizer()).configure_model()

    with pytest.raises(ModelError, match=rf"^--model\.{side} .*({message})") as caught:
        build()
    assert "\n" not in str(caught.value)
    assert not [r for r in caplog.records if "LOAD REPORT" in r.getMessage()]


@pytest.mark.filterwarnings("ignore:.*have no place:UserWarning")
@pytest.mark.parametrize(
    "damage",
    [
        "a layer missing",
        "no weights in the file",
        "truncated data",
        "a shard missing",
        "other shapes",
        "another table",
        "another architecture",
        "NaN",
        "integers",
        "pickled weights",
    ],
)
def test_a_broken_folder_is_refused_when_it_is_read_by_shard(damage, folder):
    BROKEN[damage][0](folder)
    with pytest.raises(ModelError, match=r"^--model\.student") as caught:
        load_by_shard(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("is_sharded", [False, True])
def test_a_whole_folder_is_what_was_saved(is_sharded, folder):
    if is_sharded:
        in_shards(folder)
    expected = tiny.make_llama(1).state_dict()
    config = load_model_config(str(folder), "--model.student", 0)
    for model in (load_causal_lm(str(folder), config, "--model.student"), load_by_shard(folder)):
        for name, value in model.state_dict().items():
            assert torch.equal(value, expected[name]), name


def test_one_file_is_read_before_an_index(folder):
    """A stale index next to a new file has no effect, as in transformers."""
    single = (folder / WEIGHTS).read_bytes()
    changed(Q_PROJ, lambda w: w + 1)(folder)
    in_shards(folder)
    (folder / WEIGHTS).write_bytes(single)
    assert torch.equal(load_by_shard(folder).state_dict()[Q_PROJ], weights_of(folder)[Q_PROJ])


@pytest.mark.parametrize("make", [tiny.make_gpt2, tiny.make_llama], ids=["gpt2", "tied llama"])
def test_a_tied_head_may_be_absent(make, tmp_path):
    model = make(1, tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    assert not any("lm_head" in name for name in weights_of(tmp_path))
    config = load_model_config(str(tmp_path), "--model.student", 0)
    for loaded in (
        load_causal_lm(str(tmp_path), config, "--model.student"),
        load_by_shard(tmp_path),
    ):
        assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)


def test_two_tables_despite_a_config_that_ties_them(folder):
    """The tables stay separate, also in the loaded model's config; by shard they are refused."""
    configured(tie_word_embeddings=True)(folder)
    model = load_whole(folder)
    assert not torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)
    assert model.config.tie_word_embeddings is False
    with pytest.raises(
        ModelError, match=r"ties lm_head\.weight and .*tie_word_embeddings to false"
    ):
        load_by_shard(folder)
    configured(tie_word_embeddings=False)(folder)  # what the message says
    assert torch.equal(load_by_shard(folder).lm_head.weight, model.lm_head.weight)


def load_whole(folder: Path):
    config = load_model_config(str(folder), "--model.student", 0)
    return load_causal_lm(str(folder), config, "--model.student")


@pytest.mark.parametrize("load", [load_whole, load_by_shard])
def test_weights_without_a_place_are_named_once(load, folder):
    weights = weights_of(folder)
    weights |= {"model.layers.7.more.weight": torch.ones(2), "model.extra": torch.ones(1)}
    save_file(weights, folder / WEIGHTS, {"format": "pt"})
    with pytest.warns(UserWarning, match=r"2 stored weights have no place.*model\.extra") as caught:
        load(folder)
    assert len(caught) == 1


@pytest.mark.parametrize("is_stored", [True, False])
def test_a_buffer_of_the_model_is_read_by_shard_as_well(is_stored, folder):
    """An example is DeepSeek's routing bias, which training has changed."""
    name, value = "model.layers.0.routing_bias", torch.arange(4.0)
    if is_stored:
        save_file({**weights_of(folder), name: value}, folder / WEIGHTS, {"format": "pt"})
    config = load_model_config(str(folder), "--model.student", 0)
    with deferred_weights():
        model = load_causal_lm(str(folder), config, "--model.student")
    model.model.layers[0].register_buffer("routing_bias", torch.zeros(4))
    if is_stored:
        fill_from_files(model, torch.device("cpu"))
        assert torch.equal(model.get_buffer(name), value)
    else:
        with pytest.raises(ModelError, match=f"no {name} is stored"):
            fill_from_files(model, torch.device("cpu"))


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_fp8_without_scales_may_be_frozen_and_not_trained(side, folder):
    changed(Q_PROJ, lambda w: w.to(torch.float8_e4m3fn))(folder)
    config = load_model_config(str(folder), f"--model.{side}", 0)
    if side == "teacher":
        model = load_causal_lm(str(folder), config, "--model.teacher", learns="nothing")
        assert model.dtype == torch.float32
        return
    with pytest.raises(ModelError, match=f"{Q_PROJ} as F8_E4M3"):
        load_causal_lm(str(folder), config, "--model.student", learns="all")


@pytest.mark.parametrize("learns", ["all", "adapter", "nothing"])
def test_integers_in_memory_may_be_frozen_and_not_trained(learns):
    model = tiny.make_llama(1)
    layer = model.model.layers[0].self_attn.q_proj
    layer.weight = torch.nn.Parameter(layer.weight.to(torch.int8), requires_grad=False)
    if learns == "all":
        with pytest.raises(ModelError, match=r"q_proj\.weight, int8.*student_adapter"):
            load_causal_lm(model, model.config, "--model.student", learns=learns)
    else:
        assert load_causal_lm(model, model.config, "--model.student", learns=learns) is model


def test_a_model_in_memory_is_looked_at():
    model = tiny.make_llama(1)
    with torch.no_grad():
        model.lm_head.weight[3, 3] = float("nan")
    with pytest.raises(ModelError, match=r"--model\.student: 1 weights hold NaN.*lm_head"):
        load_causal_lm(model, model.config, "--model.student", learns="all")


def test_rows_are_those_of_the_file(tmp_path):
    weights = {"a": torch.arange(12.0).view(6, 2), "b": torch.arange(3.0)}
    save_file(weights, tmp_path / WEIGHTS)
    files = WeightFiles(locate(str(tmp_path), "--model.student"), "--model.student")
    assert torch.equal(files.rows(["x.a", "a"], 2, 5), weights["a"][2:5])
    assert files.rows(["b"], 3, 3).shape == (0,)
    assert files.dtypes == {"a": "F32", "b": "F32"}
    with pytest.raises(ModelError, match=r"no c is stored: .*every_rank"):
        files.rows(["c", "d"], 0, 1)
    with pytest.raises(ModelError, match=r"a is \[6, 2\] in the files and \[7, 2\]"):
        files.rows(["a"], 0, 1, (7, 2))


def test_the_advice_for_pickled_weights_is_true(folder):
    pickled(folder)
    with pytest.raises(ModelError, match=r"from_pretrained\(FOLDER\).save_pretrained\(FOLDER\)"):
        load_whole(folder)
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(folder)
    load_whole(folder)
