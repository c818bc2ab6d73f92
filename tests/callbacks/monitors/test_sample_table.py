"""Table of prompts with the answers of the teacher, the initial and the present student.

Frozen here: answers are the models' greedy ones; the table does not change training; a resumed run
writes the same records; a teacher that cannot generate has no column; two ranks show the same as
one; the table fits 80 columns and interprets no markup in answers.
"""

from __future__ import annotations

import contextlib
import html
import io
import json
import time

import pytest
import rich
import tiny
import torch
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from parallel_runs import Killed, Killer
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from okd_lightning.callbacks import GKD, KD, OKD, SFT, LastCheckpoint, SampleTable, Throughput
from okd_lightning.callbacks.monitors.predictions import PredictionLog
from okd_lightning.callbacks.monitors.sample_views import Sample, samples_markdown, samples_table
from okd_lightning.data import RolloutDataModule
from okd_lightning.engines import NoiseStream, Sampling
from okd_lightning.engines.transformers_engine import TransformersEngine
from okd_lightning.errors import ConfigError
from okd_lightning.records.requests import PromptBatch, Request
from okd_lightning.teachers import AveragedSelf, CachedTeacher, FrozenSelf

STEPS = {"max_epochs": -1, "max_steps": 7, "num_sanity_val_steps": 0, "log_every_n_steps": 1}


def records(root) -> list[dict]:
    lines = (root / "rollouts.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == "sample"]


def greedy(model, module, prompts: list[str], limit: int) -> list[str]:
    engine = TransformersEngine(model.eval(), module.vocabulary, module.eos_ids)
    ids = tuple(tuple(module.tokenizer(prompt).input_ids) for prompt in prompts)
    batch = PromptBatch(ids, tuple(range(len(ids))), (0,) * len(ids))
    written = engine.respond(Request(batch, Sampling(temperature=0), NoiseStream(5, 9), limit))
    return [
        module.decode(answer) + ("" if reason == "eos" else "…")
        for answer, reason in ((r.ids, r.stop_reason) for r in written)
    ]


def fit(root, module, methods=None, callbacks=(), **settings):
    return tiny.fit(
        root,
        module,
        methods or [GKD(on_policy_fraction=1.0)],
        tiny.make_rows(32),
        callbacks=callbacks,
        **{"val": tiny.make_rows(9, seed=3), **STEPS, **settings},
    )


def test_answers_are_the_models_own(tmp_path, make_module):
    module = make_module()
    module.configure_model()
    rows = tiny.make_rows(9, seed=3)
    prompts = [row["prompt"] for row in rows]
    before = greedy(module.student, module, prompts, 5)
    table = SampleTable(every_n_steps=3, num_prompts=2, max_tokens=5)
    fit(tmp_path, module, callbacks=[table], accumulate_grad_batches=2)
    now = greedy(module.student, module, prompts, 5)
    teacher = greedy(module.teacher, module, prompts, 5)
    found = records(tmp_path)
    assert [record["step"] for record in found] == [2, 2, 5, 5, 6, 6]  # the last is the run's end
    assert {record["part"] for record in found} == {"val"}
    assert len({record["index"] for record in found}) == 2
    for record in found:
        assert record["prompt"] == prompts[record["index"]]
        assert record["teacher"] == teacher[record["index"]]
        assert record["student_before"] == before[record["index"]]
    assert [r["student_now"] for r in found[-2:]] == [now[r["index"]] for r in found[-2:]]
    assert found[0]["student_now"] != found[0]["student_before"]


@pytest.mark.parametrize("folder", ["dropout_folder", "student_folder"])
def test_training_is_the_same_without_it(folder, tmp_path, make_module, request):
    student = str(request.getfixturevalue(folder))
    runs = []
    for name, callbacks in (("a", []), ("b", [SampleTable(every_n_steps=1)])):
        torch.manual_seed(5)
        module = make_module(student=student)
        recorder = fit(tmp_path / name, module, [GKD(on_policy_fraction=0.5)], callbacks)
        runs.append((tiny.weights(module), recorder.losses, torch.get_rng_state()))
    assert tiny.distance(runs[0][0], runs[1][0]) == 0
    assert runs[0][1] == runs[1][1]
    assert torch.equal(runs[0][2], runs[1][2])


def test_a_resumed_run_shows_the_same(tmp_path, make_module, dropout_folder):
    def run(root, killer=None, ckpt_path=None):
        table = SampleTable(every_n_steps=2, num_prompts=3)
        callbacks = [table, LastCheckpoint(every_n_steps=1), *([killer] if killer else [])]
        with contextlib.suppress(Killed):
            torch.manual_seed(5)
            module = make_module(student=str(dropout_folder))
            fit(root, module, callbacks=callbacks, ckpt_path=ckpt_path)
        return table.state_dict()

    state = run(tmp_path / "whole")
    run(tmp_path / "cut", Killer(5))
    first = records(tmp_path / "cut")
    assert run(tmp_path / "cut", ckpt_path=str(tmp_path / "cut/checkpoints/last.ckpt")) == state
    assert records(tmp_path / "cut") == records(tmp_path / "whole")
    assert len(first) == 6
    assert state["before"]


def test_other_prompts_than_the_checkpoints_have_no_before(tmp_path, make_module):
    fit(tmp_path, make_module(), callbacks=[SampleTable(2), LastCheckpoint(1)], max_steps=3)
    last = str(tmp_path / "checkpoints/last.ckpt")
    with pytest.warns(UserWarning, match="SampleTable: this run's prompts"):
        fit(
            tmp_path,
            make_module(),
            callbacks=[SampleTable(2), LastCheckpoint(1)],
            val=tiny.make_rows(9, seed=4),
            ckpt_path=last,
        )
    assert "student_before" in records(tmp_path)[0]
    assert "student_before" not in records(tmp_path)[-1]
    assert "teacher" in records(tmp_path)[-1]


WHO = {
    "nobody validates": ({"val": None}, {}, [KD()], {"teacher"}),
    "no teacher": ({}, {"teacher": None}, [SFT()], set()),
    "a teacher's cache": ({}, {"teacher": CachedTeacher}, [KD()], set()),
    "a frozen self": ({}, {"teacher": FrozenSelf()}, None, {"teacher"}),
    "a moving average": ({}, {"teacher": AveragedSelf()}, None, {"teacher"}),
}
TOLD = {"teacher_prompt_template": "{reference}p{prompt}"}


@pytest.mark.parametrize("name", WHO)
def test_the_asked_models(name, tmp_path, make_module, teacher_folder):
    settings, model, methods, teacher = WHO[name]
    if model.get("teacher") is CachedTeacher:
        model = {"teacher": CachedTeacher(str(teacher_folder), str(tmp_path / "cache"))}
    elif model.get("teacher") is not None:
        settings = {**settings, "data": TOLD}
    fit(tmp_path, make_module(**model), methods, [SampleTable(2)], **settings)
    found = records(tmp_path)
    answers = {"student_before", "student_now"} | teacher
    assert set(found[0]) == {"step", "kind", "part", "index", "prompt"} | answers
    assert found[0]["part"] == ("train" if settings.get("val", 1) is None else "val")
    if name == "a frozen self":
        assert found[0]["teacher"] == found[-3]["teacher"]
    if name == "a moving average":
        assert any(a["teacher"] != b["teacher"] for a, b in zip(found[:3], found[-3:], strict=True))


def test_an_adapted_teacher_answers_as_its_base(tmp_path, make_module):
    from peft import LoraConfig

    module = make_module()
    lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    method = OKD(online_module=lora, learning_rate=0.5)
    plain = make_module()
    plain.configure_model()
    table = SampleTable(every_n_steps=1, max_tokens=6)
    fit(tmp_path, module, [method], [table])
    found = records(tmp_path)
    base = greedy(plain.teacher, plain, [record["prompt"] for record in found], 6)
    assert [record["teacher"] for record in found] == base


def test_tensorboard_has_the_texts(tmp_path, make_module):
    logger = TensorBoardLogger(tmp_path, name="", version="")
    fit(tmp_path, make_module(), callbacks=[SampleTable(4, num_prompts=2)], logger=logger)
    events = EventAccumulator(str(tmp_path)).Reload()
    texts = events.Tensors("samples/text_summary")
    assert [text.step for text in texts] == [3, 6]
    shown = texts[-1].tensor_proto.string_val[0].decode()
    assert shown == samples_markdown([sample_of(record) for record in records(tmp_path)[-2:]])


def test_wandb_has_a_table(tmp_path, make_module, monkeypatch):
    logger, logged = object.__new__(WandbLogger), []
    monkeypatch.setattr(
        WandbLogger, "log_text", lambda self, *args, **kw: logged.append((args, kw))
    )
    for name in ("log_metrics", "log_hyperparams", "save", "finalize", "log_graph"):
        monkeypatch.setattr(WandbLogger, name, lambda self, *args, **kw: None)
    for name in ("name", "version", "save_dir", "experiment"):
        monkeypatch.setattr(WandbLogger, name, property(lambda self: None))
    fit(tmp_path, make_module(), callbacks=[SampleTable(4, num_prompts=2)], logger=logger)
    (key, columns, rows), settings = logged[0]
    assert (key, settings["step"]) == ("samples", 3)
    assert columns == ["prompt", "teacher", "student before", "student now"]
    first = records(tmp_path)[0]
    assert rows[0] == [first[name.replace(" ", "_")] for name in columns]


def test_the_terminal_is_asked_for(tmp_path, make_module):
    shown = {}
    for terminal in (None, True):
        file = io.StringIO()
        rich.reconfigure(file=file, width=80)
        fit(tmp_path, make_module(), callbacks=[SampleTable(4, terminal=terminal)])
        shown[terminal] = file.getvalue()
    rich.reconfigure()
    assert shown[None] == ""
    assert "3 prompts of val after 4 steps" in shown[True]
    assert "student before" in shown[True]


def sample_of(record: dict) -> Sample:
    names = ("index", "prompt", "teacher", "student_before", "student_now")
    return Sample(**{name: record.get(name) for name in names})


STRANGE = Sample(
    7,
    "What [red]is[/red]\nthis? \x1b[31m",
    "word " * 100,
    "",
    "日本語の長い答え" * 40,
)


@pytest.mark.parametrize("width", [40, 80, 120])
def test_what_is_shown_fits(width):
    console = Console(file=io.StringIO(), width=width)
    console.print(samples_table([STRANGE, STRANGE], "title", console))
    text = console.file.getvalue()
    assert all(rich.cells.cell_len(line) <= width for line in text.splitlines())
    assert text.count("…") == 4
    assert "[red]is[/red] this?" in " ".join(text.split())
    assert "\x1b" not in text
    assert text.count("(nothing)") == 2
    for who in ("prompt", "teacher", "student before", "student now"):
        assert text.count(who) == 2


def test_markdown_takes_nothing_for_markup():
    text = samples_markdown([Sample(1, "a|b\nc's", "<b>*x*</b>", None, "`y` & #1")])
    header, rule, row = text.splitlines()
    assert header == "| prompt | teacher | student now |"
    assert rule == "| --- | --- | --- |"
    assert row.count("|") == 4
    assert not set("<*`_") & set(row)
    assert html.unescape(row) == "| a|b c's | <b>*x*</b> | `y` & #1 |"
    assert "c's" in row


def test_its_time_is_not_the_trainings(tmp_path, make_module, monkeypatch):
    asked, throughput = [], Throughput()

    def samples(*args):
        asked.append(time.perf_counter())
        time.sleep(0.3)
        return []

    monkeypatch.setattr(SampleTable, "_samples", samples)
    monkeypatch.setattr(SampleTable, "_show", lambda *args: None)
    fit(tmp_path, make_module(), callbacks=[throughput, SampleTable(1)], val=None)
    assert len(asked) == 7
    assert throughput.seconds < asked[-1] - asked[0]  # which holds six of the seven pauses


@pytest.mark.parametrize("name", ["every_n_steps", "num_prompts", "max_tokens"])
def test_numbers_below_their_least(name):
    with pytest.raises(ConfigError, match=name):
        SampleTable(**{name: -1})


def test_no_prompts_are_no_tables(tmp_path, make_module):
    fit(tmp_path, make_module(), callbacks=[SampleTable(1, num_prompts=0)])
    assert not (tmp_path / "rollouts.jsonl").exists()


def test_a_chats_last_question_is_shown(tmp_path, make_module):
    tokenizer = tiny.make_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    turns = [("system", "gh"), ("user", "ab"), ("assistant", "c"), ("user", "de")]
    chat = [{"role": role, "content": text} for role, text in turns]
    rows = [{"messages": [*chat, {"role": "assistant", "content": "f"}]}] * 4
    module = make_module(tokenizer=tokenizer)
    tiny.fit(tmp_path, module, [KD()], rows, callbacks=[SampleTable(1, num_prompts=1)], max_steps=1)
    assert {record["prompt"] for record in records(tmp_path)} == {"de"}
    data = RolloutDataModule(predict=rows, max_response_length=2)
    tiny.make_trainer(tmp_path, [PredictionLog()]).predict(module, data)
    lines = (tmp_path / "predictions.jsonl").read_text().splitlines()
    for record in map(json.loads, lines):
        assert record["prompt"] == "de"
        assert record["text"].startswith("ghabcde")
