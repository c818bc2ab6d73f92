"""Frozen here: ranks that have not read the same end before the first step, and are named.

* other rows, rows in another order and other weights on one rank are refused on all of them;
* with loading: by_shard the files are compared, of which each rank reads its rows;
* paths may differ, where what lies there is the same.
"""

from __future__ import annotations

import shutil
import socket
from collections.abc import Sequence
from pathlib import Path

import pytest
import soak
import tiny

OPTIONS = [
    *(
        "fit",
        "--method",
        "KD",
        "--trainer.max_steps",
        "2",
        "--trainer.enable_progress_bar",
        "false",
    ),
    *("--model.student", "student", "--model.teacher", "teacher", "--data.train", "train.jsonl"),
    *("--data.batch_size", "2", "--data.max_prompt_length", "16", "--data.token_cache", "null"),
    *("--data.max_response_length", "8", "--trainer.accelerator", "cpu"),
    *("--trainer.devices", "2", "--trainer.strategy", "ddp"),
]


@pytest.fixture(scope="module")
def assets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("assets")
    soak.make_assets(folder)
    return folder


def fit_on_two_ranks(
    places: list[Path], run: Path, more: Sequence[str] = ()
) -> tuple[list[int], str]:
    """Run each rank in a folder of its own, as on another node."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    children = []
    for rank, place in enumerate(places):
        environment = {"LOCAL_RANK": str(rank), "NODE_RANK": "0", "WORLD_SIZE": "2"}
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
        argv = [*OPTIONS, *more, "--trainer.default_root_dir", str(run)]
        children.append(soak.fork(place, argv, environment, None)[0])
    return soak._status_of(children), "".join(soak._tail(place) for place in places)


def other_rows(place: Path) -> None:
    lines = (place / "train.jsonl").read_text().splitlines(keepends=True)
    (place / "train.jsonl").write_text("".join([*lines[1:], lines[0]]))


def other_weights(place: Path) -> None:
    tiny.make_gpt2(4).save_pretrained(place / "student")


BY_SHARD = [
    *("--trainer.strategy", "okd_lightning.sharding.FSDP2Strategy"),
    *("--trainer.strategy.loading", "by_shard", "--model.packing", "false"),
]


@pytest.mark.parametrize(
    ("change", "what", "more"),
    [
        (None, None, []),
        (other_rows, "the training rows or their order", []),
        (other_weights, "the models' weights", []),
        (None, None, BY_SHARD),
        (other_weights, "the models' weights", BY_SHARD),
    ],
)
def test_ranks_compare_what_they_read(change, what, more, assets: Path, tmp_path: Path) -> None:
    places = [tmp_path / "one", tmp_path / "two"]
    for place in places:
        shutil.copytree(assets, place)
    if change is not None:
        change(places[1])
    statuses, said = fit_on_two_ranks(places, tmp_path / "run", more)
    if what is None:
        assert statuses == [0, 0], said
        return
    assert statuses == [1, 1], said
    assert said.count(f"okd-lightning: rank 1 has read other inputs than rank 0: {what}; give") == 1
    assert not (tmp_path / "run").exists()
