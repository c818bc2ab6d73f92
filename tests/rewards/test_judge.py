"""A judge on a server as a reward.

Frozen here: what is asked and how a reply becomes a score; a score is asked for once, also after a
resume; a row without a score gets none and is counted, and above 5 % of the latest 100 the run
stops; a server that refuses, or serves another model, stops it at the start; the key comes from the
environment alone.
"""

from __future__ import annotations

import math

import pytest
import tiny
import torch
from fake_judge import fake_judge, length_score
from lightning.pytorch.callbacks import ModelCheckpoint

from okd_lightning.callbacks import KD, LastCheckpoint, OPDPlus, Reward, Stage, TaskScore
from okd_lightning.data import RolloutDataModule
from okd_lightning.errors import ConfigError, RewardError, ServerError
from okd_lightning.records import Chat
from okd_lightning.rewards import Judge, ScoredRow


def rows_of(*responses: str) -> list[ScoredRow]:
    return [ScoredRow("2 + 2?", response, "four") for response in responses]


def test_what_is_asked_and_what_a_reply_is_worth(monkeypatch):
    monkeypatch.setenv("OKD_JUDGE_KEY", "secret")
    with fake_judge() as server:
        judge = Judge(server.url, scale=(1, 11))
        assert judge.score(rows_of("", "four", "5")) == [0.0, 0.4, 0.1]
        (first, *_) = sorted(server.bodies, key=lambda body: body["messages"][0]["content"])
    assert first["model"] == "judge"
    assert first["temperature"] == 0
    content = first["messages"][0]["content"]
    assert "[Request]\n2 + 2?\n" in content
    assert '"Score: N", where N is a number from 1 (worst) to\n11 (best).' in content
    assert set(server.keys) == {"Bearer secret"}
    assert "secret" not in repr(vars(judge))


def test_a_prompt_and_further_fields_of_ones_own():
    with fake_judge(lambda content: "rated [7]") as server:
        judge = Judge(
            server.url,
            prompt="{prompt}|{response}|{reference}|{{}}",
            pattern=r"\[(\d)\]",
            scale=(0, 10),
            request={"max_completion_tokens": 9, "max_tokens": None},
        )
        chat = Chat(({"role": "system", "content": "brief"}, {"role": "user", "content": "{x}"}))
        assert judge.score([ScoredRow("rendered", "{y}", "z", chat)]) == [0.7]
    assert server.asked == ["system: brief\nuser: {x}|{y}|z|{}"]
    assert server.bodies[0]["max_completion_tokens"] == 9
    assert "max_tokens" not in server.bodies[0]


@pytest.mark.parametrize(
    ("reply", "score"),
    [
        ("Score: 10", 1.0),
        ("I first thought Score: 2.\n**Score:** 5.5/10", 0.5),
        (" **1** ", 0.0),
        ("score = 10.", 1.0),
        ("Score: 11", math.nan),
        ("Score: -1", math.nan),
        ("It is good, 9 of 10.", math.nan),
        ("", math.nan),
        ("Score: nan", math.nan),
    ],
)
def test_scores_in_replies(reply, score):
    with fake_judge(lambda content: reply) as server:
        judge = Judge(server.url)
        if math.isnan(score):
            with pytest.warns(UserWarning, match="1 responses have no score, the first because"):
                assert math.isnan(judge.score(rows_of("x"))[0])
        else:
            assert judge.score(rows_of("x")) == [score]


def test_a_score_is_asked_for_once():
    with fake_judge() as server:
        judge = Judge(server.url)
        judge.score(rows_of("a", "bb", "a"))
        assert len(server.bodies) == 2
        judge.score(rows_of("bb", "ccc"))
        assert len(server.bodies) == 3
        other = Judge(server.url)
        other.remember(judge.remembered)
        assert other.score(rows_of("a", "ccc")) == judge.score(rows_of("a", "ccc"))
        assert len(server.bodies) == 3
        assert Judge(server.url, scale=(0, 10)).score(rows_of("a")) == [0.2]  # another request
        assert len(server.bodies) == 4


def test_failed_requests_are_counted_and_bad_servers_refused():
    with fake_judge(lambda content: 500 if "bad" in content else "Score: 10") as server:
        judge = Judge(server.url, num_retries=0)
        with pytest.warns(UserWarning, match="answers with status 500"):
            assert judge.score(rows_of("bad", "good"))[1] == 1.0
        assert math.isnan(judge.score(rows_of("bad"))[0])  # requested again: failures are not kept
        server.names = ["a", "b"]
        with pytest.raises(ServerError, match="lists a, b; set the Judge's model"):
            Judge(server.url).open(torch.device("cpu"))
        with pytest.raises(ServerError, match="lists a, b, not 'c'"):
            Judge(server.url, model="c").open(torch.device("cpu"))
        server.names = None
        assert Judge(server.url, model="c").score(rows_of("good")) == [1.0]
        server.reply = lambda content: 401
        with pytest.raises(ServerError, match=r"status 401.*environment variable OKD_JUDGE_KEY"):
            Judge(server.url, model="c").score(rows_of("good"))
    with pytest.raises(ServerError, match=r"Judge url: .*cannot be reached"):
        Judge(server.url, num_retries=0).open(torch.device("cpu"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"scale": (5, 5)}, "expected the lowest and the highest score"),
        ({"scale": (1, math.inf)}, "expected the lowest and the highest score"),
        ({"prompt": "{prompt}"}, r"no \{response\} to judge"),
        ({"prompt": "{response} {answer}"}, r"unknown field \{answer\}"),
        ({"prompt": "{response"}, "Judge prompt"),
        ({"pattern": r"\d+"}, "needs a group"),
        ({"max_tokens": 0}, "max_tokens must be at least 1"),
        ({"concurrency": 0}, "concurrency must be at least 1"),
        ({"max_failures": 2}, "max_failures must be between 0 and 1"),
        ({"url": "localhost:8000"}, "Judge url: 'localhost:8000' is not an address"),
        ({"url": "http://me:word@host"}, "user name or password"),
        ({"key_variable": "sk-word"}, "give the variable's name$"),
    ],
)
def test_settings_that_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        Judge(**{"url": "http://localhost:8000", **settings})


@pytest.mark.filterwarnings("ignore:.*responses have no finite reward")
def test_a_run_stops_above_five_percent(tmp_path, make_module):
    """One of 8 responses without a score is counted; 6 of the latest 100, or all, stop the run."""
    first: list[str] = []

    def reply(content: str) -> str | int:
        first.append(content)
        return 400 if len(first) % 8 == 1 else "Score: 5"

    rows = tiny.make_rows(8)
    with fake_judge(reply) as server:
        judge = Judge(server.url, concurrency=1)
        with (
            pytest.warns(UserWarning, match="status 400"),
            pytest.raises(RewardError, match=r"6 of the latest \d+ responses have no score.*5%"),
        ):
            tiny.fit(tmp_path, make_module(), [Reward(judge)], rows, max_epochs=40)
        server.reply = lambda content: "no idea"
        with (
            pytest.warns(UserWarning, match="the reply has no score"),
            pytest.raises(RewardError, match="4 of the latest 4 responses have no score"),
        ):
            tiny.fit(tmp_path / "2", make_module(), [Reward(Judge(server.url))], rows)


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
def test_a_resumed_run_asks_nothing_twice(tmp_path, make_module):
    """The judge's answers differ each time: the resumed run's weights are equal all the same."""

    def run(folder, server, **settings):
        def reply(content: str) -> str:
            return f"Score: {1 + len(server.bodies) % 9}"

        server.reply = reply
        module = make_module(learning_rate=3e-2)
        reward = Stage(
            Reward(Judge(server.url, concurrency=1)), start=1
        )  # its state is the method's
        methods = [KD(), OPDPlus(), reward]
        saver = ModelCheckpoint(folder, save_last=True, every_n_train_steps=1, save_top_k=-1)
        tiny.fit(
            folder,
            module,
            methods,
            tiny.make_rows(8),
            callbacks=[saver],
            data={"prompts_per_rollout": 8, "samples_per_prompt": 2},
            **settings,
        )
        return tiny.weights(module)

    with fake_judge() as server:
        whole = run(tmp_path / "whole", server, max_steps=6)
        asked = list(server.asked)
        assert len(asked) == len(set(asked))
        server.bodies.clear()
        run(tmp_path / "cut", server, max_steps=3)
        resumed = run(
            tmp_path / "cut", server, max_steps=6, ckpt_path=tmp_path / "cut" / "last.ckpt"
        )
        assert server.asked == asked
    assert tiny.distance(resumed, whole) == 0


def test_a_judge_as_a_measure(tmp_path, make_module):
    with fake_judge(lambda content: "Score: 4") as server:
        measure = TaskScore(Judge(server.url, scale=(0, 8)), name="judged")
        rows = tiny.make_rows(4)
        trainer = tiny.make_trainer(tmp_path, [measure])
        data = RolloutDataModule(
            None, rows, batch_size=4, max_prompt_length=16, max_response_length=8, val_rollouts=0
        )
        (metrics,) = trainer.validate(make_module(), data, verbose=False)
    assert metrics["val/judged"] == 0.5


def test_a_measures_judge_is_in_the_checkpoint(tmp_path, make_module):
    """A resumed run asks for no score of answers that were scored before the kill."""

    def validate(server, **settings) -> Judge:
        judge = Judge(server.url)
        tiny.fit(
            *(tmp_path, make_module(learning_rate=0.0), [KD(), TaskScore(judge, name="judged")]),
            tiny.make_rows(8),
            val=tiny.make_rows(4),
            callbacks=[LastCheckpoint(every_n_steps=1)],
            val_check_interval=1,
            num_sanity_val_steps=0,
            **settings,
        )
        return judge

    with fake_judge(length_score) as server:
        first = validate(server, max_steps=1)
        assert len(server.bodies) == len(set(server.asked)) > 0
        server.bodies.clear()
        last = tmp_path / "checkpoints" / "last.ckpt"
        second = validate(server, max_steps=2, ckpt_path=str(last))
        assert server.bodies == []  # the student has not changed
    assert second.remembered == first.remembered != {}


def test_the_default_reply_of_these_tests_is_understood():
    with fake_judge(length_score) as server:
        assert Judge(server.url).score(rows_of("1234")) == [4 / 9]
