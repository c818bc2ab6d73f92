"""A student that shares one table between embedding and head, on a real vLLM server on a CPU.

Frozen here: it is refused at the first transfer of weights, before anything is sent; the server
named in the error is started as the error says, and training goes on there with every log-prob the
student's own.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import served_models
import tiny
from served_models import TEACHER, TIED
from vllm_servers import Server

from okd_lightning.callbacks import OPDPlus
from okd_lightning.engines import VLLMServer
from okd_lightning.errors import ServerError
from okd_lightning.teachers import ServedTeacher
from okd_lightning.training.module import DistillationModule

pytestmark = pytest.mark.real_vllm


class Gaps(DistillationModule):
    """Callback that records the gap of each rollout's first responses from the student."""

    def respond(self, request):
        rollout = super().respond(request)
        self.__dict__.setdefault("gaps", []).append(rollout.engine_gap)
        return rollout


@pytest.fixture
def train(vllm_servers, tmp_path):
    def run(server: Server) -> Gaps:
        module = Gaps(
            served_models.make_tied(),
            tokenizer=tiny.make_tokenizer(),
            teacher=ServedTeacher(vllm_servers.url(TEACHER), k=6),
            engine=VLLMServer(vllm_servers.url(server), str(tmp_path / "weights")),
            learning_rate=3e-2,
        )
        tiny.fit(tmp_path, module, [OPDPlus()], tiny.make_rows(16), max_steps=4)
        return module

    return run


def test_the_error_says_how_to_go_on(train, vllm_servers, tmp_path):
    with pytest.raises(ServerError, match="keeps the old head") as raised:
        train(TIED)
    copy, tokenizer = re.search(r"--model (\S+) --tokenizer (\S+);", str(raised.value)).groups()
    assert Path(tokenizer) == vllm_servers.model_folder(TIED)

    def save(folder: Path) -> None:
        shutil.copytree(copy, folder)

    flags = (*served_models.STUDENT_FLAGS, "--tokenizer", tokenizer)
    module = train(Server("untied", save, flags))
    assert len(module.gaps) == 4
    assert max(module.gaps) < 1e-5
