"""Kinds of teachers on two gloo processes against one process.

Frozen here: ensembles and routed teachers train as on one process under DDP and fsdp2, where a rank
has no rows of a teacher in some steps and in validation, with OKD's modules on them, and where
they generate; measures by teacher are those of one process; ``by_shard`` reads every teacher. So
does a teacher that ends responses with another id, on samples that end with either, and one with
another tokenizer, by each of its losses, with OKD's module and on samples.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch
from pair_tokenizers import merging
from parallel_runs import run, spawn
from peft import LoraConfig

from okd_lightning.callbacks import GKD, KD, OKD, OPDPlus
from okd_lightning.divergences import ReverseKL
from okd_lightning.sharding import FSDP2Strategy
from okd_lightning.teachers import ForeignTeacher, RoutedTeachers, TeacherEnsemble

pytestmark = pytest.mark.filterwarnings("ignore:the teacher drifts:UserWarning")

FEW = {"max_steps": 5, "val_check_interval": 5}


def rows(num: int, seed: int = 0) -> list[dict[str, str]]:
    """Rows of which every fifth has the other teacher: most ranks of a step have none of them."""
    made = tiny.make_rows(num, seed)
    return [{**row, "of": "code" if i % 5 == 3 else "math"} for i, row in enumerate(made)]


def okd() -> list[OKD]:
    module = LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
    return [OKD(online_module=module, learning_rate=0.5, clip_norm=0.5)]


def routed(root: Path) -> RoutedTeachers:
    return RoutedTeachers({"math": str(root / "teacher"), "code": str(root / "second")})


def ensemble(root: Path) -> TeacherEnsemble:
    return TeacherEnsemble([str(root / "teacher"), str(root / "second")], [0.3, 0.7])


def ends(root: Path) -> str:
    return str(root / "ends")


def foreign(loss: str):
    return lambda root: ForeignTeacher(str(root / "pairs"), loss=loss)


CASES = {
    "routed KD": (routed, lambda: [KD()]),
    "routed OKD": (routed, okd),
    "routed seq-KD": (routed, lambda: [KD(seq_kd=True)]),
    "ensemble OKD": (ensemble, okd),
    "ensemble seq-KD": (ensemble, lambda: [KD(seq_kd=True)]),
    "two ends, GKD": (ends, lambda: [GKD(divergence=ReverseKL(), on_policy_fraction=1.0)]),
    "two ends, OPD+": (ends, lambda: [OPDPlus()]),
    "foreign OPD+": (foreign("chunk"), lambda: [OPDPlus()]),
    "foreign OKD": (foreign("text"), okd),
    "foreign GKD": (foreign("next_byte"), lambda: [GKD(on_policy_fraction=0.5)]),
}
OF_DDP = ("routed KD", "routed OKD", "two ends, GKD", "two ends, OPD+", "foreign OKD")
RUNS = [
    *((name, "fsdp2") for name in CASES),
    *((name, "ddp") for name in OF_DDP),
    *((name, "layerwise") for name in ("routed seq-KD", "ensemble seq-KD")),
    ("routed KD", "by_shard"),
]


def strategy_of(name: str | None):
    if name == "layerwise":
        return FSDP2Strategy(rollouts="layerwise")
    return FSDP2Strategy(loading="by_shard") if name == "by_shard" else name


def run_case(root: Path, name: str, strategy: str | None):
    teacher, methods = CASES[name]
    is_routed = name.startswith("routed")
    return run(
        root,
        strategy_of(strategy),
        methods,
        model={"teacher": teacher(root)},
        data={"teacher_column": "of"} if is_routed else None,
        rows=rows(25),
        val=rows(5, seed=2),
        settings=FEW,
    )


def of_one_rank(rank: int, root: Path) -> None:
    found = {key: run_case(root, *key) for key in RUNS}
    torch.save(found, root / f"rank{rank}.pt")


@pytest.fixture(scope="module")
def models(tmp_path_factory, tiny_tokenizer) -> Path:
    root = tmp_path_factory.mktemp("several")
    second = tiny.make_llama(3, tiny.TEACHER_ROWS, hidden_size=16, num_attention_heads=2)
    for name, model in (
        ("student", tiny.make_llama(1)),
        ("teacher", tiny.make_llama(2, tiny.TEACHER_ROWS)),
        ("second", second),
    ):
        model.save_pretrained(root / name)
        tiny_tokenizer.save_pretrained(root / name)
    other = tiny.make_llama(2, tiny.TEACHER_ROWS)
    other.generation_config.eos_token_id = tiny.BOS
    other.save_pretrained(root / "ends")
    tiny_tokenizer.save_pretrained(root / "ends")
    pairs = merging(*(a + b for a in "abcdefgh" for b in "ijklmnop"))
    tiny.make_llama(4, len(pairs)).save_pretrained(root / "pairs")
    pairs.save_pretrained(root / "pairs")
    return root


@pytest.fixture(scope="module")
def ranks(models):
    spawn(of_one_rank, models)
    return [torch.load(models / f"rank{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.fixture(scope="module")
def alone(models):
    return {name: run_case(models, name, None) for name in CASES}


@pytest.mark.parametrize("key", RUNS, ids=" ".join)
def test_two_ranks_train_as_one(key, ranks, alone):
    one = alone[key[0]]
    for rank in ranks:
        found = rank[key]
        assert found["steps"] == one["steps"] == 5
        assert found["difference"] == 0
        # weights that are trained: sharded runs keep others in other forms
        names = [n for n in one["weights"] if n.startswith("student.") or "lora_" in n]
        for name in names:
            torch.testing.assert_close(
                found["weights"][name], one["weights"][name], rtol=1e-8, atol=1e-10
            )
        for mine, theirs in zip(found["losses"], one["losses"], strict=True):
            for metric, value in theirs.items():
                assert mine[metric] == pytest.approx(value, rel=1e-5, abs=1e-7), metric
        assert found["measures"].keys() == one["measures"].keys()
        for metric, value in one["measures"].items():
            assert found["measures"][metric] == pytest.approx(value, rel=1e-5), metric


def test_samples_end_with_either_id(alone):
    """The samples must have both ends, or the comparison would test nothing."""
    last = {ids[-1] for step in alone["two ends, GKD"]["ids"] for ids, _, _ in step}
    assert {tiny.EOS, tiny.BOS} <= last


def test_some_steps_have_one_row_or_none_of_a_teacher(ranks):
    """Some steps must lack a teacher's rows on one rank or on both, or the test would be void."""
    key = ("routed KD", "fsdp2")
    steps = [{name for name in step if "tokens/" in name} for step in ranks[0][key]["losses"]]
    assert any("train/tokens/code" in names for names in steps)
    assert any("train/tokens/code" not in names for names in steps)
    assert "val/forward_kl/code" in ranks[0][key]["measures"]
