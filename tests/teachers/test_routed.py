"""RoutedTeachers in runs.

Frozen here: two names of one checkpoint are one teacher, to the last bit; each row's loss is that
of its own teacher, whose model reads no other rows, in any order of rows; terms, tokens and
validation's measures by teacher add up to the whole; each row's own teacher generates; names that
are missing or unknown are refused before a model loads, with the nearest name; a run resumes with
the same models by name, in any order; served teachers are routed to like models in memory.
"""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from unittest.mock import patch

import pytest
import tiny
import torch
from fake_vllm_server import FakeVLLM, serving
from peft import LoraConfig
from transformers import AutoModelForCausalLM

from okd_lightning.callbacks import GKD, KD, OKD, LastCheckpoint, OPDPlus
from okd_lightning.divergences import ForwardKL
from okd_lightning.errors import CheckpointError, ConfigError, DataError
from okd_lightning.losses import WeightedTerm
from okd_lightning.records.noise import NoiseStream
from okd_lightning.records.requests import Prompt, Request
from okd_lightning.records.sampling import Sampling
from okd_lightning.teachers import (
    CachedTeacher,
    FrozenSelf,
    LoadedTeacher,
    RoutedTeachers,
    ServedTeacher,
)
from okd_lightning.training.generation import MixtureEngine
from okd_lightning.training.module import DistillationModule

ROWS = [{**row, "of": ("math", "code", "math")[i % 3]} for i, row in enumerate(tiny.make_rows(12))]
COLUMN = {"teacher_column": "of"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory, tiny_tokenizer) -> dict[str, str]:
    root = tmp_path_factory.mktemp("routed")
    models = {
        "student": tiny.make_llama(1),
        "llama": tiny.make_llama(2, tiny.TEACHER_ROWS),
        "gpt2": tiny.make_gpt2(3),
    }
    for name, model in models.items():
        model.save_pretrained(root / name)
        tiny_tokenizer.save_pretrained(root / name)
    return {name: str(root / name) for name in models}


def make(folders, teacher) -> DistillationModule:
    torch.manual_seed(3)
    return DistillationModule(folders["student"], teacher, dtype="float64")


def routed(folders) -> RoutedTeachers:
    return RoutedTeachers({"math": folders["llama"], "code": folders["gpt2"]})


def train(root: Path, module, methods, rows=ROWS, data=COLUMN, **settings) -> tiny.Recorder:
    return tiny.fit(root, module, methods, rows, **{"max_steps": 2, "data": data, **settings})


@pytest.mark.parametrize("method", [KD, lambda: GKD(on_policy_fraction=0.5), OPDPlus])
def test_two_names_of_one_checkpoint_are_one_teacher(method, folders, tmp_path):
    one = make(folders, folders["llama"])
    expected = train(tmp_path / "a", one, [method()], data={})
    names = {"math": folders["llama"], "code": f"{folders['gpt2']}/../llama"}
    module = make(folders, RoutedTeachers(names))
    found = train(tmp_path / "b", module, [method()])
    assert len(module.pair.teacher.models) == 1
    for mine, theirs in zip(found.losses, expected.losses, strict=True):
        assert {name: mine[name] for name in theirs} == theirs
    assert all(torch.equal(p, tiny.weights(one)[n]) for n, p in tiny.weights(module).items())


def kl_of_rows(module: DistillationModule, batch) -> list[tuple[float, int]]:
    """(KL in nats, tokens) of each row against its own teacher, from full logits."""
    models = {"math": "llama", "code": "gpt2"}
    of = {type(m).__name__.lower(): m for m in module.pair.teacher.models}
    found = []
    for row, length in enumerate(batch.lengths.tolist()):
        ids, mask = batch.input_ids[row, :length], batch.mask[row, 1:length]
        name = models[module.pair.teacher.names[batch.teacher_of_rows[row]]]
        teacher = next(model for kind, model in of.items() if kind.startswith(name))
        log_p, log_q = (
            model(ids[None]).logits[0, :-1, : tiny.NUM_IDS].log_softmax(-1)[mask]
            for model in (module.student, teacher)
        )
        found.append((float((log_q.exp() * (log_q - log_p)).sum()), len(log_p)))
    return found


def test_each_row_has_the_loss_of_its_own_teacher(folders, tmp_path):
    recorder = train(tmp_path, make(folders, routed(folders)), [KD()], max_steps=1)
    start = make(folders, routed(folders))
    start.configure_model()
    batch = recorder.steps[0][0]
    assert set(batch.teacher_of_rows) == {0, 1}
    with torch.no_grad():
        rows = kl_of_rows(start, batch)
    logged = recorder.losses[0]
    tokens = sum(count for _, count in rows)
    assert logged["train/kd"] == pytest.approx(sum(kl for kl, _ in rows) / tokens, rel=1e-9)
    for number, name in enumerate(start.pair.teacher.names):
        own = [row for row, of in zip(rows, batch.teacher_of_rows, strict=True) if of == number]
        count = sum(count for _, count in own)
        assert logged[f"train/tokens/{name}"] == count
        assert logged[f"train/kd/{name}"] == pytest.approx(sum(k for k, _ in own) / count, rel=1e-9)


def test_the_order_of_rows_does_not_matter(folders, tmp_path):
    module = make(folders, routed(folders))
    recorder = train(tmp_path, module, [method := KD()], max_steps=1)
    batch = recorder.steps[0][0]
    terms = [WeightedTerm(term, 1.0) for term in method.terms]
    totals = []
    for rows in ([0, 1, 2, 3], [3, 1, 0, 2]):
        module.zero_grad()
        loss = module.pair.loss_of(batch.of_rows(rows), terms).total
        loss.backward()
        grads = [p.grad.clone() for p in module.student.parameters() if p.grad is not None]
        totals.append((float(loss.detach()), grads))
    (first, grads), (second, others) = totals
    assert first == pytest.approx(second, rel=1e-12)
    for mine, theirs in zip(grads, others, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-12)


def test_a_model_reads_its_own_rows_alone(folders, tmp_path):
    module, read = make(folders, routed(folders)), []
    own = LoadedTeacher.side

    def side(teacher, batch, quantities):
        read.append((teacher.own_source, set(batch.teacher_of_rows), len(batch)))
        return own(teacher, batch, quantities)

    with patch.object(LoadedTeacher, "side", side):
        recorder = train(tmp_path, module, [KD()], max_steps=1)
    counts = recorder.steps[0][0].teacher_of_rows
    expected = [
        (folders[name], {number}, counts.count(number))
        for number, name in ((0, "gpt2"), (1, "llama"))
    ]
    assert sorted(read) == sorted(expected)


def test_measures_by_teacher_are_those_of_its_rows(folders, tmp_path):
    val = [{**row, "of": "math"} for row in tiny.make_rows(3, seed=5)]
    val += [{**row, "of": "code"} for row in tiny.make_rows(2, seed=6)]

    def measured(teacher, rows, data, name):
        module = make(folders, teacher)
        settings = {"data": {**data, "val_rollouts": 8}, "max_steps": -1}
        train(tmp_path / name, module, [KD(weight=1e-12)], val=rows, **settings)
        found = module.trainer.callback_metrics
        return {n: float(v) for n, v in found.items() if n.startswith("val/")}

    found = measured(routed(folders), val, COLUMN, "both")
    for name, model, rows in (("math", "llama", val[:3]), ("code", "gpt2", val[3:])):
        alone = measured(folders[model], rows, {}, name)
        for measure in ("forward_kl", "cross_entropy", "agreement", "teacher_cross_entropy"):
            key = f"val/{measure}"
            assert found[f"{key}/{name}"] == pytest.approx(alone[key], rel=1e-4)
        assert 0 < found[f"val/on_policy_reverse_kl/{name}"] < 20
    assert found["val/forward_kl"] != found["val/forward_kl/math"]


def test_parts_of_on_policy_terms_add_up(folders, tmp_path):
    module = make(folders, routed(folders))
    recorder = train(tmp_path, module, [OPDPlus(), KD()], accumulate_grad_batches=2)
    for step, logged in zip(recorder.steps, recorder.losses, strict=True):
        counts = step[0].teacher_counts
        for term, code in (("opd_plus", 1), ("kd", 0)):
            total = sum(counts[i][code] for i in range(2))
            parts = sum(
                counts[i][code] * logged.get(f"train/{term}/{name}", 0.0)
                for i, name in enumerate(module.pair.teacher.names)
            )
            if total:
                assert parts / total == pytest.approx(logged[f"train/{term}"], rel=1e-5, abs=1e-9)


def test_each_rows_own_teacher_generates(folders, tmp_path):
    module = make(folders, routed(folders))
    module.configure_model()
    prompts = [((5, 9, 4), 0), ((7, 3), 1), ((5, 9, 4), 1), ((8,), 0)]
    request = Request(
        tuple(Prompt(ids, row, teacher=of) for row, (ids, of) in enumerate(prompts)),
        Sampling(),
        NoiseStream(0, 0),
        6,
        generator="teacher",
    )
    found = module.respond(request)
    for number, name in ((0, "gpt2"), (1, "llama")):
        alone = make(folders, folders[name])
        alone.configure_model()
        expected = alone.respond(request)
        for row, (_, of) in enumerate(prompts):
            if of == number:
                assert found[row].ids == expected[row].ids
    recorder = train(tmp_path, make(folders, routed(folders)), [KD(seq_kd=True)], max_steps=1)
    assert recorder.sources() == [{2}]
    with pytest.raises(ConfigError, match="need one teacher for all rows"):
        MixtureEngine(module, 0.5, module).respond(
            Request(request.prompts, Sampling(), NoiseStream(0, 0), 2)
        )


def test_every_module_gets_a_gradient_in_every_step(folders, tmp_path):
    rows = [{**row, "of": "math"} for row in tiny.make_rows(8)]
    okd = OKD(online_module=LoraConfig(r=2))
    recorder = train(tmp_path, make(folders, routed(folders)), [okd], rows)
    for step in recorder.gradients:
        own = {name: grad for name, grad in step.items() if name.startswith("teacher.")}
        idle = [grad for name, grad in own.items() if name.startswith("teacher.0.")]
        assert idle
        assert all((grad == 0).all() for grad in idle)
        assert any((grad != 0).any() for name, grad in own.items() if name.startswith("teacher.1."))


def never(*args, **kwargs):
    raise AssertionError("a model was loaded")


FAULTS = {
    "unknown": ({"of": "maths"}, DataError, r"row 2: the teacher \('of'\) is 'maths', .*'math'\?"),
    "empty": ({"of": ""}, DataError, r"row 2: no teacher \('of' is empty\), .*has code, math"),
    "none": ({"of": None}, DataError, "row 2: no teacher"),
    "missing": ({}, DataError, "row 2: no teacher"),
    "a list": ({"of": ["math"]}, DataError, r"is \['math'\]"),
    "true": ({"of": True}, DataError, "is True"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_rows_without_a_known_teacher_are_refused_before_models_load(name, folders, tmp_path):
    cell, kind, message = FAULTS[name]
    rows = [ROWS[0], {"prompt": "ab", "response": "c", **cell}]
    with (
        patch("okd_lightning.training.pair.Pair.build", never),
        pytest.raises(kind, match=message) as raised,
    ):
        train(tmp_path, make(folders, routed(folders)), [KD()], rows)
    assert "\n" not in str(raised.value)


def test_a_column_and_teachers_need_each_other(folders, tmp_path):
    with pytest.raises(ConfigError, match=r"data\.teacher_column 'of' has nothing"):
        train(tmp_path, make(folders, folders["llama"]), [KD()])
    with pytest.raises(ConfigError, match=r"for each row \(code, math\): give --data.teacher_colu"):
        train(tmp_path, make(folders, routed(folders)), [KD()], data={})
    with pytest.raises(DataError, match=r"no column 'off', which --data\.teacher_col.*'of'"):
        train(tmp_path, make(folders, routed(folders)), [KD()], data={"teacher_column": "off"})


def test_numbers_name_teachers_by_their_digits(folders, tmp_path):
    rows = [{**row, "of": i % 2} for i, row in enumerate(tiny.make_rows(8))]
    module = make(folders, RoutedTeachers({0: folders["llama"], "1": folders["gpt2"]}))
    assert "train/kd/1" in train(tmp_path, module, [KD()], rows).losses[0]


def test_validation_rows_need_a_teacher_too(folders, tmp_path):
    val = tiny.make_rows(3)
    with pytest.raises(DataError, match="no column 'of'"):
        train(tmp_path, make(folders, routed(folders)), [KD()], val=val)


def test_a_batch_of_ones_own_names_its_teachers(folders, tmp_path):
    module = make(folders, routed(folders))
    recorder = train(tmp_path, module, [method := KD()], max_steps=1)
    (batch,) = recorder.steps[0]
    object.__setattr__(batch, "teacher", None)
    with pytest.raises(ConfigError, match="the rows of a batch name no teacher"):
        module.pair.loss_of(batch, [WeightedTerm(term, 1.0) for term in method.terms])


def test_it_resumes_with_the_same_models_by_name(folders, tmp_path):
    whole = train(tmp_path / "a", make(folders, routed(folders)), [OPDPlus()], max_steps=3)
    cut = make(folders, routed(folders))
    train(tmp_path, cut, [OPDPlus()], callbacks=[LastCheckpoint(1)])
    last = str(tmp_path / "checkpoints" / "last.ckpt")
    stored = DistillationModule.load_from_checkpoint(last)
    assert stored.pair.given_teacher.arguments == cut.pair.given_teacher.arguments
    reordered = RoutedTeachers({"code": folders["gpt2"], "math": folders["llama"]})
    found = train(tmp_path, make(folders, reordered), [OPDPlus()], max_steps=3, ckpt_path=last)
    assert found.losses == whole.losses[2:]
    for names in (
        {"math": folders["gpt2"], "code": folders["llama"]},
        {"math": folders["llama"], "code": folders["gpt2"], "prose": folders["gpt2"]},
    ):
        with pytest.raises(CheckpointError, match=r"RoutedTeachers \(code: gpt2, math: llama\)"):
            train(tmp_path, make(folders, RoutedTeachers(names)), [OPDPlus()], ckpt_path=last)


def test_other_rows_of_a_teacher_do_not_resume(folders, tmp_path):
    train(tmp_path, make(folders, routed(folders)), [KD()], callbacks=[LastCheckpoint(1)])
    last = str(tmp_path / "checkpoints" / "last.ckpt")
    others = [{**row, "of": "code"} for row in ROWS]
    with pytest.raises(ConfigError, match="differ from the checkpoint's"):
        train(tmp_path, make(folders, routed(folders)), [KD()], others, ckpt_path=last)


def test_members_that_cannot_be_routed_to_are_refused(folders):
    with pytest.raises(ConfigError, match="RoutedTeachers has no teachers"):
        RoutedTeachers({})
    with pytest.raises(ConfigError, match="an empty name"):
        RoutedTeachers({" ": folders["llama"]})
    with pytest.raises(ConfigError, match="the name True, which YAML does not read as text"):
        RoutedTeachers({True: folders["llama"]})
    for kind in (FrozenSelf, lambda: CachedTeacher(folders["llama"], "cache")):
        with pytest.raises(
            ConfigError, match=r"RoutedTeachers holds a .*: give folders or hub ids, or a S"
        ):
            RoutedTeachers({"a": kind()})
    served = ServedTeacher("http://x:1")
    with pytest.raises(ConfigError, match=r"models in memory and a ServedTeacher.*serve all of"):
        RoutedTeachers({"a": served, "b": folders["llama"]})
    with pytest.raises(ConfigError, match=r"served teachers of k 5, 12.*the same k"):
        RoutedTeachers({"a": served, "b": ServedTeacher("http://x:2", k=5)})


@pytest.fixture
def urls(folders, tiny_tokenizer):
    """Addresses of both teachers on servers, without rows beyond the tokenizer's."""
    with ExitStack() as servers:
        found = {}
        for name, of in (("math", "llama"), ("code", "gpt2")):
            model = AutoModelForCausalLM.from_pretrained(folders[of]).double()
            model.resize_token_embeddings(tiny.NUM_IDS)
            engine = servers.enter_context(serving(FakeVLLM(model, tiny_tokenizer)))
            found[name] = engine
        yield found


@pytest.mark.parametrize(
    "method", [KD, lambda: GKD(on_policy_fraction=0.5), lambda: OPDPlus(ForwardKL())]
)
def test_served_teachers_are_routed_to_like_models_in_memory(method, folders, urls, tmp_path):
    served = {name: ServedTeacher(one.url, k=tiny.NUM_IDS) for name, one in urls.items()}
    found = []
    for teacher in (routed(folders), RoutedTeachers(served)):
        module = make(folders, teacher)
        recorder = train(tmp_path, module, [method()], val=ROWS[:4], limit_val_batches=1)
        found.append((recorder.losses, tiny.weights(module), dict(module.trainer.callback_metrics)))
    (live, expected, _), (losses, weights, measured) = found
    assert tiny.distance(weights, expected) < 1e-9
    for one, other in zip(live, losses, strict=True):
        names = [name for name in one if not name.startswith("train/health")]
        assert {n: other[n] for n in names} == pytest.approx({n: one[n] for n in names}, rel=1e-6)
    assert {"train/tokens/math", "train/tokens/code"} <= losses[-1].keys()
    assert "val/top_k_forward_kl/math" in measured
    asked = {name: len(one.bodies("/v1/completions")) for name, one in urls.items()}
    assert 0 < asked["code"] < asked["math"]  # of three rows two are the first one's


def test_served_teachers_refuse_what_one_refuses(folders, urls, tmp_path):
    served = {name: ServedTeacher(one.url) for name, one in urls.items()}
    for method, words in (
        (KD(seq_kd=True), "generate responses"),
        (OKD(), "online module is trained"),
    ):
        with pytest.raises(ConfigError, match=words):
            train(tmp_path, make(folders, RoutedTeachers(served)), [method])
    train(tmp_path, make(folders, RoutedTeachers(served)), [KD(), LastCheckpoint(1)], max_steps=1)
    last = tmp_path / "checkpoints" / "last.ckpt"
    kept = DistillationModule.load_from_checkpoint(last).pair.given_teacher
    assert {name: one.arguments["url"] for name, one in kept._given.items()} == {
        name: one.url for name, one in urls.items()
    }
