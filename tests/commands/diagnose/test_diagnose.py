"""``okd-lightning diagnose`` in a shell.

* Exact divergences, agreement, entropies and top-k mass on dataset responses are those of a direct
  computation from both models' logits, and so are the bins by place.
* Nothing on disk changes, and the same seed gives the same numbers.
* One self-contained page, a JSON file, a contender for ``compare``, and a summary that fits 80
  columns.
* Broken data is found; a mistake is one line.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import shlex
from pathlib import Path

import pytest
import torch
from cli_workbench import LENGTHS, QUIET, write_jsonl
from transformers import AutoModelForCausalLM, AutoTokenizer

from okd_lightning.commands.diagnose.page import options_whole

SMALL = ["--rows", "8", "--batches", "4"]
EOS = 1


@pytest.fixture
def diagnose(okd, assets, monkeypatch):
    """``diagnose`` of the tiny pair into ``out/``."""
    monkeypatch.setenv("COLUMNS", "80")

    def type_diagnose(*argv, data=None, models=None):
        base = [*(models or assets.models), *(data or assets.data), *QUIET, *SMALL]
        return okd("diagnose", base, "--out", "out", *argv)

    return type_diagnose


def read():
    return json.loads(Path("out/diagnosis.json").read_text())


def digest(folder: Path) -> str:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()


def direct_measures(assets) -> dict[str, list[torch.Tensor]]:
    """Return measures by name, [tokens] of every validation row's response."""
    tokenizer = AutoTokenizer.from_pretrained(assets.tokenizer)
    student, teacher = (
        AutoModelForCausalLM.from_pretrained(path) for path in (assets.student, assets.teacher)
    )
    found: dict[str, list[torch.Tensor]] = {}
    for line in Path(assets.val).read_text().splitlines():
        row = json.loads(line)
        prompt, response = (tokenizer(row[name]).input_ids for name in ("prompt", "response"))
        ids = torch.tensor([[*prompt, *response, EOS]])
        with torch.no_grad():
            p, q = (
                model(ids).logits[0, len(prompt) - 1 : -1].double().log_softmax(-1)
                for model in (student, teacher)
            )
        top = p.topk(4).indices
        mixture = torch.logaddexp(p, q) - math.log(2)
        values = {
            "reverse_kl": (p.exp() * (p - q)).sum(-1),
            "forward_kl": (q.exp() * (q - p)).sum(-1),
            "jsd": 0.5 * ((p.exp() * (p - mixture)) + (q.exp() * (q - mixture))).sum(-1),
            "agreement": (p.argmax(-1) == q.argmax(-1)).double(),
            "student_entropy": -(p.exp() * p).sum(-1),
            "teacher_entropy": -(q.exp() * q).sum(-1),
            "cross_entropy": -p.gather(-1, ids[0, len(prompt) :, None]).squeeze(-1),
            "top 4": q.exp().gather(-1, top).sum(-1),
        }
        for name, value in values.items():
            found.setdefault(name, []).append(value)
    return found


def test_numbers_are_those_of_a_direct_computation(diagnose, assets):
    before = digest(assets.folder)
    said = diagnose()
    assert said.status == 0, said.err
    assert digest(assets.folder) == before
    given = next(rows for rows in read()["rows"] if rows["source"] == "given")
    direct = direct_measures(assets)
    lengths = [len(row) for row in direct["reverse_kl"]]
    assert given["tokens"] == sum(lengths)
    assert given["eos_share"] == 1.0
    top = direct.pop("top 4")
    assert given["top_k"]["4"]["mean"] == pytest.approx(float(torch.cat(top).mean()), rel=1e-4)
    for name, rows in direct.items():
        mean = torch.cat(rows).mean()
        assert given["measures"][name]["mean"] == pytest.approx(float(mean), rel=1e-4), name
        off = torch.stack([(row - mean).sum() for row in rows])
        num = len(rows)
        error = (off.square().sum() * num / (num - 1)).sqrt() / sum(lengths)
        assert given["measures"][name]["error"] == pytest.approx(float(error), rel=1e-2), name
    reverse = direct["reverse_kl"]
    total = float(torch.cat(reverse).sum())
    for bin_ in given["bins"]:
        within = torch.cat([row[bin_["first"] - 1 : bin_["last"]] for row in reverse])
        assert bin_["tokens"] == len(within)
        assert bin_["reverse_kl"] == pytest.approx(float(within.mean()), rel=1e-4)
        assert bin_["share"] == pytest.approx(float(within.sum()) / total, rel=1e-4)
    assert sum(bin_["share"] for bin_ in given["bins"]) == pytest.approx(1.0)
    worst = torch.cat(reverse).sort(descending=True).values[: max(1, sum(lengths) // 10)]
    assert given["top_tenth"] == pytest.approx(float(worst.sum()) / total, rel=1e-4)


def test_what_is_on_disk(diagnose, capsys):
    said = diagnose()
    assert said.status == 0, said.err
    assert max(map(len, said.out.splitlines())) <= 80
    for words in ("reverse KL", "along exact", "value_baseline", "Effect of", "What to try"):
        assert words in said.out
    page = Path("out/diagnosis.html").read_text()
    assert page.count("<svg") == 5
    assert "prefers-color-scheme: dark" in page
    assert 'name="viewport"' in page
    loaded = re.findall(r"""(?:src|href)=["'](?!#)([^"']+)|url\((?!#)([^)]+)""", page)
    assert loaded == []
    ids = re.findall(r'id="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    first = read()
    assert {rows["source"] for rows in first["rows"]} == {"given", "student", "teacher"}
    assert first["cost"]["seconds"].keys() == {"KD", "GKD", "OPD+", "writing"}
    assert "ReverseKL" in Path("out/gkd_reverse_kl.yaml").read_text()
    assert diagnose().status == 0
    again = read()
    for name in ("checks", "rows", "gradients", "drift", "trials"):
        assert again[name] == first[name], name


def test_the_next_command_is_one_that_compare_takes(diagnose, okd):
    """The command has one seed, and files of contenders that are not class names."""
    typed = ["--method", "KD", "--trainer.max_steps", "9", "--model.schedule", "cosine"]
    assert diagnose(*typed, "--seed_everything=1", "--model.learning_rate", "1e-3").status == 0
    _, _, *words = shlex.split(read()["next"])
    assert "--method" not in words
    assert words[words.index("--budget") + 1] == "steps=500"
    assert "--model.learning_rate" in words
    words[words.index("--budget") + 1] = "steps=1"
    words[words.index("--seeds") + 1] = "0"
    contenders = set(map(str, Path("out").glob("*.yaml")))
    assert len(contenders) == 3
    at = words.index("--methods") + 1
    words[at] = ",".join(sorted({*words[at].split(","), *contenders}))
    said = okd("compare", words, "--out", "compared")
    assert said.status == 0, said.err


def test_steps_have_the_runs_rows(diagnose):
    assert diagnose("--data.global_batch_size", "4", "--data.batch_size", "2").status == 0
    found = read()
    assert found["cost"]["rows"] == 4
    assert found["gradients"]["rows"] == 2
    assert {trial["steps"] for trial in found["trials"]} == {found["gradients"]["batches"]}


def test_prompts_alone(diagnose, assets, here):
    rows = [
        {"prompt": json.loads(line)["prompt"]} for line in Path(assets.val).read_text().splitlines()
    ]
    prompts = write_jsonl(here / "prompts.jsonl", rows)
    said = diagnose(data=["--data.train", str(prompts), *LENGTHS])
    assert said.status == 0, said.err
    found = read()
    assert {rows["source"] for rows in found["rows"]} == {"student", "teacher"}
    assert "KD" not in found["cost"]["seconds"]
    assert "the data has prompts only" in said.out.replace("\n  ", " ")


def ending_with(folder: Path, assets, end: int) -> None:
    """Return a student that often ends with that id and not the other one."""
    model = AutoModelForCausalLM.from_pretrained(assets.student)
    with torch.no_grad():
        embedding = model.get_input_embeddings().weight
        embedding += 20 * embedding.std() * torch.linspace(-1, 1, embedding.shape[1])  # one text
        usual = model.model(torch.arange(3, 16)[None]).last_hidden_state[0].mean(0)
        weight = model.get_output_embeddings().weight
        largest = float((weight @ usual).amax())
        weight[end] = (largest + 2.0) * usual / usual.square().sum()
        weight[EOS if end != EOS else 2] = -weight[end]
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(assets.tokenizer).save_pretrained(folder)
    config = folder / "generation_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"eos_token_id": end}))


def test_models_that_end_with_different_ids_are_found_and_the_remedy_fixes_it(
    diagnose, assets, here
):
    ending_with(here / "own", assets, EOS)
    ending_with(here / "other", assets, 2)
    pair = ["--model.student", str(here / "own"), "--model.teacher", str(here / "other")]
    said = diagnose(*pair, "--model.end_tokens", str(EOS))
    assert said.status == 0, said.err
    check = next(check for check in read()["checks"] if check["name"] == "eos")
    assert check["verdict"] == "bad", check["text"]
    assert "id 1 student" in check["text"]
    assert read()["advice"][0]["title"].startswith("Fix")
    remedy = re.search(r"--model\.end_tokens \[[0-9,]+\]", check["text"]).group()
    assert remedy == "--model.end_tokens [1,2]"
    for typed in ([], remedy.split()):  # the default is the same
        said = diagnose(*pair, *typed)
        assert said.status == 0, said.err
        check = next(check for check in read()["checks"] if check["name"] == "eos")
        assert check["verdict"] == "good", check
        assert "one outcome" in check["text"]


@pytest.mark.parametrize(
    ("typed", "words"),
    [
        (["--rows", "1"], "at least 2 rows"),
        (["--batches", "2"], "3 batches"),
        (["--batches", "many"], "--batches"),
        (["--data.bach_size", "3"], "did you mean --data.batch_size"),
        (["--trainer.devices", "2"], "one device"),
        (["--data.val", "nothing.jsonl"], "nothing.jsonl"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else "",
)
def test_mistakes(diagnose, typed, words):
    said = diagnose(*typed)
    assert said.status in (1, 2)
    (line,) = said.err.strip().splitlines()
    assert words in line


def test_without_a_teacher(diagnose, assets):
    said = diagnose(models=["--model.student", assets.student])
    assert said.status == 1
    assert "give --model.teacher" in said.err


def test_tokenizer_without_some_characters(diagnose, okd, here):
    quickstart = Path(__file__).parents[3] / "okd_lightning" / "commands" / "quickstart"
    rows = [{"prompt": "1+2-3+4-1=", "response": f"{i};0"} for i in range(6)]
    rows[0]["prompt"] = "one+2="
    data = write_jsonl(here / "rows.jsonl", rows)
    models = ["--model.student", str(quickstart / "teacher")]
    models += ["--model.teacher", str(quickstart / "teacher")]
    said = diagnose(models=models, data=["--data.val", str(data), *LENGTHS])
    assert said.status == 0, said.err
    check = next(check for check in read()["checks"] if check["name"] == "round trip")
    assert check["verdict"] == "bad", check["text"]
    assert "'one+2='" in check["text"]


@pytest.mark.parametrize(("prompt", "verdict"), [("<assistant>", "good"), ("", "look")])
def test_chats_and_their_generation_prompt(diagnose, assets, here, prompt, verdict):
    tokenizer = AutoTokenizer.from_pretrained(assets.tokenizer)
    before = "" if prompt else "{% if m.role == 'assistant' %}=>{% endif %}"
    body = "{% if m.role == 'user' %}<user>{% elif '" + prompt + "' %}<assistant>{% endif %}"
    ending = "{% if add_generation_prompt %}" + prompt + "{% endif %}"
    loop = "{% for m in messages %}" + before + body + "{{ m.content }}{% endfor %}"
    tokenizer.chat_template = loop + ending
    tokenizer.save_pretrained(here / "chatting")
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"say {i}"},
                {"role": "assistant", "content": f"{i}."},
            ]
        }
        for i in range(6)
    ]
    data = write_jsonl(here / "chats.jsonl", rows)
    said = diagnose(
        *("--model.tokenizer", str(here / "chatting"), "--data.max_prompt_length", "64"),
        data=["--data.val", str(data), *LENGTHS],
    )
    assert said.status == 0, said.err
    check = next(check for check in read()["checks"] if check["name"] == "template")
    assert check["verdict"] == verdict
    assert (repr(prompt) if prompt else "no generation prompt") in check["text"]


def test_the_page_breaks_no_line_within_an_option():
    found = options_whole("rows < 2: use --data.max_response_length 8")
    assert found == ('rows &lt; 2: use <span class="option">--data.max_response_length</span> 8')
