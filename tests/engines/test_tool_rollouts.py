"""Rollouts that call tools, with scripted responses.

Frozen here: the text after the prompt is, stretch by stretch, the template's rendering of the whole
conversation; only the model's own tokens are masked in and have log-probs; every round is one call
of the engine with all unfinished rows; noise continues over the turns, so that no row depends
on the others; unknown tools, bad arguments and raising tools are answered with their error; all
tokens after the prompt count against the limit, and an answer may be cut by it.
"""

from __future__ import annotations

import itertools
import json
from dataclasses import replace

import pytest
import tool_chats
import torch
from tool_chats import call_of

from okd_lightning.engines import NoiseStream, Sampling, TransformersEngine
from okd_lightning.engines.tool_rollouts import ToolEngine
from okd_lightning.models import Vocabulary
from okd_lightning.records.collation import collate, sampled_row
from okd_lightning.records.counts import rollout_metrics
from okd_lightning.records.generations import generation_records
from okd_lightning.records.requests import Prompt, Request
from okd_lightning.rollouts.stored import pack_rollout, unpack_rollout

END = "<|im_end|>"


@pytest.fixture(scope="module")
def tokenizer():
    return tool_chats.make_tokenizer()


def parts(tokenizer, rollout, row):
    """(text, is own) of every stretch of a row."""
    pairs = zip(rollout[row].ids, rollout[row].mask, strict=True)
    grouped = itertools.groupby(pairs, key=lambda pair: pair[1])
    return [(tokenizer.decode([i for i, _ in group]), own) for own, group in grouped]


def answer(*results: str) -> str:
    """Return the template's text between a call and the next turn."""
    shown = "".join(f"<|im_start|>tool\n{result}{END}\n" for result in results)
    return f"\n{shown}<|im_start|>assistant\n"


def test_a_conversation_of_three_turns(tokenizer):
    script = [f"I count. {call_of('3*7')}{END}", f"{call_of('21-1')}{END}", f"It is 20.{END}"]
    rollout, engine = tool_chats.run(tokenizer, {5: script})
    assert parts(tokenizer, rollout, 0) == [
        (script[0], True),
        (answer("21"), False),
        (script[1], True),
        (answer("20"), False),
        (script[2], True),
    ]
    assert rollout[0].stop_reason == "eos"
    (use,) = (response.tool_use for response in rollout)
    assert (use.turns, use.calls, use.errors, use.cuts) == (3, 2, 0, 0)
    prompt = f"<|im_start|>user\nQ5{END}\n<|im_start|>assistant\n"
    contexts = [seen[5] for seen in engine.seen]
    first = prompt + script[0] + answer("21")
    assert contexts == [prompt, first, first + script[1] + answer("20")]


def test_the_ids_are_the_rendering_of_the_whole_conversation_in_stretches(tokenizer):
    script = [f"{call_of('3*7')}{END}", f"It is 21.{END}"]
    rollout, _ = tool_chats.run(tokenizer, {0: script})
    call = {"function": {"name": "calculator", "arguments": {"expression": "3*7"}}}
    chat = [
        {"role": "user", "content": "Q0"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "21"},
        {"role": "assistant", "content": "It is 21."},
    ]
    before = [tool_chats.render(tokenizer, chat[:k]) for k in (1, 3)]
    after = [tool_chats.render(tokenizer, chat[:k], prompt=False)[:-1] for k in (2, 4)]
    edges = [len(before[0]), len(after[0]), len(before[1]), len(after[1])]
    stretches = [after[1][a:b] for a, b in itertools.pairwise(edges)]
    wanted = [tokenizer(text, add_special_tokens=False).input_ids for text in stretches]
    assert rollout.response_ids[0] == tuple(i for ids in wanted for i in ids)
    assert rollout[0].mask == tuple(
        own for k, ids in enumerate(wanted) for own in [k != 1] * len(ids)
    )


def test_logprobs_and_noise_go_on_over_the_turns(tokenizer):
    script = [f"{call_of('1')}{END}", f"{call_of('2')}{END}", f"ok{END}"]
    rollout, _ = tool_chats.run(tokenizer, {9: script})
    noise = NoiseStream(3, 1).uniform([9], [0], len(rollout.response_ids[0]))[0].tolist()
    for own, logprob, u in zip(rollout[0].mask, rollout[0].logprobs, noise, strict=True):
        assert logprob == (-u if own else 0.0)


SCRIPTS = {
    0: [f"no call{END}"],
    1: [f"{call_of('1+1')}{END}", f"2{END}"],
    2: [f"{call_of('1+1')}{END}", f"{call_of('2+2')}{END}", f"4{END}"],
    3: ["cut without an end"],
    4: [f"{call_of('1+1')}{call_of('3+4')}{END}", END],
    5: [END],
}


@pytest.mark.parametrize("order", [list(SCRIPTS), [4, 2, 0, 5, 3, 1]])
def test_rows_go_on_as_one_batch_and_do_not_depend_on_each_other(order, tokenizer):
    together, engine = tool_chats.run(tokenizer, SCRIPTS, order=order)
    assert [set(seen) for seen in engine.seen] == [set(SCRIPTS), {1, 2, 4}, {2}]
    for row, index in enumerate(order):
        alone, _ = tool_chats.run(tokenizer, {index: SCRIPTS[index]})
        assert together[row] == alone[0], index


def test_several_calls_in_a_turn_are_answered_in_order(tokenizer):
    script = [f"{call_of('1+1')}{call_of('3+4')}{END}", END]
    rollout, _ = tool_chats.run(tokenizer, {4: script})
    assert parts(tokenizer, rollout, 0)[1:] == [(answer("2", "7"), False), (END, True)]
    assert (rollout[0].tool_use.calls, rollout[0].stop_reason) == (2, "eos")


def test_an_empty_turn_and_an_empty_response(tokenizer):
    rollout, _ = tool_chats.run(tokenizer, {0: [END], 1: [""]})
    assert [response.stop_reason for response in rollout] == ["eos", "length"]
    assert [len(ids) for ids in rollout.response_ids] == [1, 0]
    assert rollout[1].turns == [()]
    assert [use.turns for use in (r.tool_use for r in rollout)] == [1, 1]


ERRORS = {
    "unknown tool": (call_of("1", name="oracle"), "there is no tool 'oracle'"),
    "raises": (call_of("1/0"), "ZeroDivisionError: division by zero"),
    "raises a KeyError": (
        '<tool_call>{"name": "shout", "arguments": {"text": "hey"}}</tool_call>',
        "KeyError: 'hey'",
    ),
    "no arguments": ('<tool_call>{"name": "calculator"}</tool_call>', "'expression'"),
    "unknown argument": (
        '<tool_call>{"name": "calculator", "arguments": {"expression": "1", "x": 1}}</tool_call>',
        "no argument 'x'; it takes expression",
    ),
    "wrong type": (
        '<tool_call>{"name": "calculator", "arguments": {"expression": 1}}</tool_call>',
        "must be of type string",
    ),
    "arguments that are no object": (
        '<tool_call>{"name": "calculator", "arguments": 3}</tool_call>',
        "not a JSON object",
    ),
    "broken": ("<tool_call>{3</tool_call>", "there is no tool ''"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_what_goes_wrong_is_the_answer(name, tokenizer):
    call, problem = ERRORS[name]
    rollout, _ = tool_chats.run(tokenizer, {0: [f"{call}{END}", f"sorry{END}"]})
    (_, (text, is_own), last) = parts(tokenizer, rollout, 0)
    assert "<|im_start|>tool\nerror: " in text
    assert problem in text
    assert not is_own
    assert last == (f"sorry{END}", True)
    assert (rollout[0].tool_use.calls, rollout[0].tool_use.errors) == (1, 1)


def test_the_last_allowed_turn_is_not_answered(tokenizer):
    script = [f"{call_of(str(k))}{END}" for k in range(4)]
    rollout, engine = tool_chats.run(tokenizer, {0: script}, max_turns=2)
    assert rollout[0].stop_reason == "turns"
    assert len(engine.seen) == 2
    assert parts(tokenizer, rollout, 0)[-1] == (script[1], True)
    assert (rollout[0].tool_use.turns, rollout[0].tool_use.calls) == (2, 1)


@pytest.mark.parametrize("limit", range(1, 140))
def test_the_limit_holds_for_everything_after_the_prompt(limit, tokenizer):
    script = [f"{call_of('3*7')}{END}", f"It is 21.{END}"]
    whole, _ = tool_chats.run(tokenizer, {0: script})
    cut, _ = tool_chats.run(tokenizer, {0: script}, limit=limit)
    for name in ("ids", "mask", "logprobs"):
        assert getattr(cut[0], name) == getattr(whole[0], name)[:limit]
    num_turn = len(tokenizer(script[0]).input_ids)
    num_answer = len(tokenizer(answer("21")).input_ids)
    is_whole = limit >= len(whole.response_ids[0])
    assert cut[0].stop_reason == ("eos" if is_whole else "length")
    assert cut[0].tool_use.cuts == (num_turn <= limit < num_turn + num_answer)
    assert cut[0].tool_use.calls == (limit >= num_turn)


def test_rows_of_different_room_are_cut_each_at_its_own(tokenizer):
    long = "x" * 300 + END
    script = {0: [f"{call_of('1')}{END}", long], 1: [f"{'y' * 90}{call_of('1')}{END}", long]}
    rollout, _ = tool_chats.run(tokenizer, script, limit=250)
    assert [len(ids) for ids in rollout.response_ids] == [250, 250]
    for row in (0, 1):
        alone, _ = tool_chats.run(tokenizer, {row: script[row]}, limit=250)
        assert alone.response_ids[0] == rollout.response_ids[row]


def test_progress_counts_every_row_once(tokenizer):
    told = []
    rollout, _ = tool_chats.run(
        tokenizer, SCRIPTS, progress=lambda rows, tokens: told.append((rows, tokens))
    )
    assert [rows for rows, _ in told] == [3, 2, 1]
    assert sum(tokens for _, tokens in told) == rollout.num_tokens


def test_prompts_without_chats_are_the_engines_own(tokenizer):
    prompts = tool_chats.prompts_of(tokenizer, {0: "Q"})
    plain = (Prompt(prompts[0].ids, 0, limit=50),)
    engine = tool_chats.ScriptedEngine(tokenizer, {0: [f"{call_of('1')}{END}"]})
    tooled = ToolEngine(engine, tool_chats.rounds_of(tokenizer))
    rollout = tooled.respond(Request(plain, Sampling(), NoiseStream(0, 0), 50))
    assert all(rollout[0].mask)
    assert rollout[0].tool_use is None
    assert len(engine.seen) == 1


def test_rows_metrics_records_and_state(tokenizer):
    script = {0: [f"{call_of('1/0')}{END}", f"no{END}"], 1: [f"plain{END}"]}
    rollout, _ = tool_chats.run(tokenizer, script)
    metrics = rollout_metrics([(rollout, 1.0)])
    own = sum(sum(response.mask) for response in rollout)
    assert rollout.num_tokens == own < sum(map(len, rollout.response_ids))
    assert metrics["rollout/tokens"] == own
    assert metrics["rollout/mean_length"] == sum(map(len, rollout.response_ids)) / 2
    assert metrics["rollout/tool_calls"] == metrics["rollout/tool_errors"] == 1
    assert (metrics["rollout/tool_cuts"], metrics["rollout/mean_turns"]) == (0, 1.5)
    back = unpack_rollout(pack_rollout(rollout))
    assert list(back) == [replace(response, tool_use=None) for response in rollout]
    assert unpack_rollout(pack_rollout(back)) == back


def test_records_show_who_wrote_what(tokenizer):
    from okd_lightning.records.batches import Example

    script = [f"{call_of('3*7')}{END}", f"21{END}"]
    rollout, _ = tool_chats.run(tokenizer, {0: script}, max_turns=2)
    example = Example(0, (10, 11), (False, False), (), "p", "")
    row = sampled_row(example, "student", rollout[0])
    batch = collate([row])
    assert batch.mask[0].tolist() == [False, False, *rollout[0].mask]
    assert (batch.sampler_logprobs[0] == 0).tolist() == [not own for own in batch.mask[0]]
    (record,) = generation_records(batch, lambda ids, special_tokens=False: tokenizer.decode(ids))
    assert json.loads(json.dumps(record)) == record
    assert record["response"] == script[0] + answer("21") + script[1]
    assert record["num_tokens"] == sum(rollout[0].mask)
    assert record["stop_reason"] == "eos"
    assert [turn["by"] for turn in record["turns"]] == ["model", "tools", "model"]


def test_a_models_rows_do_not_depend_on_their_batch(tokenizer):
    model = tool_chats.make_caller(0)
    ends = (tool_chats.EOS, tool_chats.END)

    def write(questions, samples=1, budget=65536):
        inner = TransformersEngine(model, Vocabulary(len(tokenizer)), ends, budget)
        engine = ToolEngine(inner, tool_chats.rounds_of(tokenizer, max_turns=2))
        prompts = tool_chats.prompts_of(tokenizer, questions, samples)
        with torch.no_grad():
            return engine.respond(Request(prompts, Sampling(), NoiseStream(1, 0), 200))

    questions = {i: "Q" * (i % 7 + 1) for i in range(14)}
    together = write(questions, samples=2)
    assert sum(use.calls for use in (r.tool_use for r in together)) > 5
    assert {"eos", "length", "turns"} == {r.stop_reason for r in together}
    small = write(questions, samples=2, budget=300)
    assert small.response_ids == together.response_ids
    for index, question in questions.items():
        alone = write({index: question})
        row = 2 * index
        assert alone.response_ids[0] == together.response_ids[row]
        assert alone[0].mask == together[row].mask
        found, expected = torch.tensor(alone[0].logprobs), torch.tensor(together[row].logprobs)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)  # float32 logits up to 30
