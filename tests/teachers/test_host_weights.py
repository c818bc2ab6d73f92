"""Teachers whose weights lie in host memory (``residence: host``).

Frozen here: within a pass all weights are copies on its device and afterwards the host's own, with
the copies freed, and the head alone stays; a run is that of teachers on the device, bit for bit, in
losses, generation, validation and resume; one body at a time is there; the weights are in no
checkpoint and no module; what it cannot be is refused by name. The copies are made on the CPU here:
``_is_host`` is what a GPU answers.
"""

from __future__ import annotations

import re
import weakref
from pathlib import Path

import pytest
import tiny
import torch
from process_state import unchanged_process
from transformers import AutoModelForCausalLM

from okd_lightning.__main__ import main
from okd_lightning.callbacks import GKD, KD, OKD, LastCheckpoint, OPDPlus
from okd_lightning.errors import ConfigError
from okd_lightning.sharding import FSDP2Strategy
from okd_lightning.teachers import CachedTeacher, LoadedTeacher, RoutedTeachers, TeacherEnsemble
from okd_lightning.teachers.host_weights import HostWeights
from okd_lightning.training.module import DistillationModule

ROWS = [{**row, "of": "ab"[i % 2]} for i, row in enumerate(tiny.make_rows(8))]
COLUMN = {"teacher_column": "of"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory, tiny_tokenizer) -> dict[str, str]:
    root = tmp_path_factory.mktemp("host")
    models = {"student": tiny.make_llama(1), "a": tiny.make_llama(2), "b": tiny.make_gpt2(3)}
    for name, model in models.items():
        model.save_pretrained(root / name)
        tiny_tokenizer.save_pretrained(root / name)
    return {name: str(root / name) for name in models}


class Copies:
    """Bodies on the device: how many at once at most, and those that are still alive."""

    def __init__(self) -> None:
        self.alive: list[weakref.ref] = []
        self.present: set[int] = set()
        self.most = self.passes = 0


@pytest.fixture
def copies(monkeypatch) -> Copies:
    """Treat the CPU as a device that is not the host."""
    found, bring = Copies(), HostWeights._bring

    def counting(self, device):
        bring(self, device)
        found.passes += 1
        found.present = {i for i in found.present if i != id(self)} | {id(self)}
        found.most = max(found.most, _num_present(self, found))
        found.alive += [weakref.ref(tensor.data.untyped_storage()) for tensor in self._body]

    monkeypatch.setattr(HostWeights, "_is_host", staticmethod(lambda device: False))
    monkeypatch.setattr(HostWeights, "_bring", counting)
    return found


MADE: weakref.WeakValueDictionary = weakref.WeakValueDictionary()


def _num_present(weights: HostWeights, found: Copies) -> int:
    MADE[id(weights)] = weights
    return 1 + sum(other._num_entered > 0 for other in MADE.values() if other is not weights)


def held(folders) -> dict[str, LoadedTeacher]:
    return {name: LoadedTeacher(folders[name], residence="host") for name in "ab"}


def make(folders, teacher) -> DistillationModule:
    torch.manual_seed(3)
    return DistillationModule(folders["student"], teacher, dtype="float64")


def train(root, module, methods, data=COLUMN, **settings) -> tiny.Recorder:
    given = {"max_steps": 2, "val": ROWS[:4], "limit_val_batches": 1, **settings}
    return tiny.fit(root, module, methods, ROWS, data={"val_rollouts": 1, **data}, **given)


def test_weights_are_copies_within_a_pass_alone(copies):
    model = tiny.make_llama(2).requires_grad_(False)
    model.lm_head = torch.nn.Linear(model.config.hidden_size, 40, bias=False)
    body, cpu = [*model.model.parameters(), *model.model.buffers()], torch.device("cpu")
    ids = torch.zeros(1, 3, dtype=torch.int64)
    expected, places = model(ids).logits, [tensor.data_ptr() for tensor in body]
    weights, head = HostWeights(model, "residence"), model.lm_head.weight.data_ptr()
    for context in (torch.no_grad(), torch.inference_mode()):
        with context, weights.on(cpu):
            with weights.on(cpu):
                assert torch.equal(model(ids).logits, expected)
            assert not {tensor.data_ptr() for tensor in body} & set(places)
            assert model.lm_head.weight.data_ptr() == head
        assert [tensor.data_ptr() for tensor in body] == places
    assert copies.passes == 2
    assert not any(reference() is not None for reference in copies.alive)
    assert weights.num_bytes == sum(t.numel() * t.element_size() for t in body)


def test_a_tied_embedding_stays_with_the_head(copies):
    model = tiny.make_llama(2).requires_grad_(False)
    model.lm_head.weight = model.model.embed_tokens.weight
    weights, place = HostWeights(model, "residence"), model.lm_head.weight.data_ptr()
    with weights.on(torch.device("cpu")):
        assert model.model.embed_tokens.weight.data_ptr() == place


def test_weights_return_after_an_error(copies):
    model = tiny.make_llama(2).requires_grad_(False)
    place = model.model.layers[0].mlp.up_proj.weight.data_ptr()
    weights = HostWeights(model, "residence")
    with pytest.raises(ZeroDivisionError), weights.on(torch.device("cpu")):
        raise ZeroDivisionError
    assert model.model.layers[0].mlp.up_proj.weight.data_ptr() == place


@pytest.mark.parametrize(
    "method",
    [KD, lambda: KD(seq_kd=True), lambda: GKD(on_policy_fraction=0.5), OPDPlus],
)
@pytest.mark.parametrize("kind", ["routed", "mixture"])
def test_a_run_is_that_of_teachers_on_the_device(kind, method, folders, tmp_path, copies):
    found = []
    for members in ({name: folders[name] for name in "ab"}, held(folders)):
        is_routed = kind == "routed"
        teacher = RoutedTeachers(members) if is_routed else TeacherEnsemble([*members.values()])
        module = make(folders, teacher)
        recorder = train(tmp_path, module, [method()], data=COLUMN if is_routed else {})
        found.append((recorder.losses, tiny.weights(module), module))
    (expected, one, _), (losses, other, module) = found
    assert losses == expected
    assert all(torch.equal(value, other[name]) for name, value in one.items())
    assert copies.passes >= 4
    if kind == "routed":  # a mixture samples from both at once
        assert copies.most == 1
    assert not any(reference() is not None for reference in copies.alive)
    assert module.teacher is None


def test_one_body_at_a_time_is_on_the_device(folders, tmp_path, copies):
    train(tmp_path, make(folders, RoutedTeachers(held(folders))), [KD()])
    assert copies.most == 1
    train(tmp_path, make(folders, TeacherEnsemble([*held(folders).values()])), [KD()], data={})
    assert copies.most == 1


def test_it_is_in_no_checkpoint_and_stays_where_it_was(folders, tmp_path, copies):
    teacher = RoutedTeachers({**held(folders), "c": folders["a"]})
    module = make(folders, teacher)
    rows = {**COLUMN}
    whole = train(tmp_path / "whole", module, [KD()], data=rows, max_steps=3)
    assert [name for name, _ in module.named_parameters() if name.startswith("teacher.")]
    assert all(n.startswith("teacher.2.") for n, _ in module.teacher.named_parameters("teacher"))
    own = [KD(), LastCheckpoint(1)]
    train(tmp_path / "cut", make(folders, teacher), own, data=rows, max_steps=2)
    last = str(tmp_path / "cut" / "checkpoints" / "last.ckpt")
    stored = torch.load(last, weights_only=False)["state_dict"]
    assert not any(name.startswith("teacher.") for name in stored)
    again = make(folders, teacher)
    rest = train(tmp_path / "cut", again, [KD()], data=rows, ckpt_path=last, max_steps=3)
    assert rest.losses == whole.losses[2:]
    kept = DistillationModule.load_from_checkpoint(last).pair.given_teacher
    assert [one.residence for one in kept._given.values()] == ["host", "host", "device"]


def test_names_of_one_checkpoint_share_a_model_where_it_is_kept_in_one_place(folders):
    path = folders["a"]
    both = {name: LoadedTeacher(path, residence="host") for name in ("x", "y")}
    assert len(RoutedTeachers(both).members) == 1
    assert len(RoutedTeachers({**both, "z": path}).members) == 2


def test_a_cache_is_written_from_host_memory(folders, tmp_path, copies):
    found = []
    for name, inner in (("plain", folders["a"]), ("held", LoadedTeacher(folders["a"], "host"))):
        teacher = CachedTeacher(inner, str(tmp_path / name))
        found.append(train(tmp_path, make(folders, teacher), [KD()], data={}).losses)
    assert found[0] == found[1]
    assert copies.passes >= 1
    assert not any(reference() is not None for reference in copies.alive)


@pytest.mark.parametrize(
    ("make_teacher", "words"),
    [
        (lambda at: LoadedTeacher(at["a"], residence="disk"), "expected device or host"),
        (
            lambda at: LoadedTeacher({"model_type": "llama"}, residence="host"),
            "random weights of a config are kept in checkpoints",
        ),
    ],
)
def test_residences_that_are_not_offered(make_teacher, words, folders):
    with pytest.raises(ConfigError, match=re.escape(words)):
        make_teacher(folders)


def test_quantised_weights_are_refused():
    model = tiny.make_llama(2)
    model.is_quantized = True
    with pytest.raises(ConfigError, match="are quantised: leave it out"):
        HostWeights(model, "residence")


def test_an_online_module_is_refused(folders, tmp_path):
    with pytest.raises(ConfigError, match="residence host keeps a model that does not change"):
        train(tmp_path, make(folders, RoutedTeachers(held(folders))), [OKD()])


def test_shards_are_refused(folders, tmp_path):
    module = make(folders, LoadedTeacher(folders["a"], residence="host"))
    with pytest.raises(ConfigError, match="residence host keeps a whole model for each rank"):
        train(tmp_path, module, [KD()], data={}, strategy=FSDP2Strategy())


def test_on_a_cpu_nothing_is_moved_and_the_run_says_so(folders, tmp_path, caplog):
    module = make(folders, LoadedTeacher(folders["a"], residence="host"))
    train(tmp_path, module, [KD()], data={})
    places = {p.data_ptr() for p in module.pair.teacher.model.parameters()}
    assert places == {t.data_ptr() for t in module.pair.teacher.model.state_dict().values()}
    assert "this run is on the CPU, where nothing is moved" in caplog.text


@pytest.mark.filterwarnings("ignore")
def test_commands(folders, tmp_path, monkeypatch, capsys):
    """Options of one teacher and of a member; the checkpoint is validated, diagnosed, exported."""
    monkeypatch.chdir(tmp_path)
    lines = [f"{row['prompt']},{row['response']},{row['of']}" for row in ROWS]
    (tmp_path / "rows.csv").write_text("prompt,response,of\n" + "\n".join(lines))
    words = ["--model.student", folders["student"], "--data.train", "rows.csv"]
    words += ["--data.val", "rows.csv", "--trainer.accelerator", "cpu", "--method", "KD"]
    words += ["--data.batch_size", "4", "--data.val_rollouts", "1"]
    words += ["--data.max_response_length", "8", "--data.max_prompt_length", "8"]
    one = ["--model.teacher", "LoadedTeacher", "--model.teacher.model", folders["a"]]
    one += ["--model.teacher.residence", "host"]
    member = f"{{class_path: LoadedTeacher, init_args: {{model: {folders['a']}, residence: host}}}}"
    both = ["--model.teacher", "RoutedTeachers", "--data.teacher_column", "of"]
    both += ["--model.teacher.teachers", f"{{a: {member}, b: {folders['b']}}}"]
    for name, teacher in (("one", one), ("both", both)):
        run = ["--trainer.max_steps", "2", "--trainer.default_root_dir", name]
        with unchanged_process():
            assert main(["fit", *words, *teacher, *run]) == 0, capsys.readouterr().err
        checkpoint = str(next(Path(name).rglob("*.ckpt")))
        with unchanged_process():
            assert main(["validate", "--ckpt_path", checkpoint]) == 0, capsys.readouterr().err
    with unchanged_process():
        assert main(["export", "--ckpt_path", checkpoint, "--out", "out"]) == 0
    AutoModelForCausalLM.from_pretrained("out")
    with unchanged_process():
        command = ["diagnose", *words, *one, "--rows", "4", "--batches", "3", "--skip", "trials"]
        assert main(command) == 0, capsys.readouterr().err
    assert "the student itself" not in capsys.readouterr().out
