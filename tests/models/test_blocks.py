"""Blocks of a model, and compiled ones.

Frozen here: blocks inside blocks are not blocks of their own; an architecture that names none has
those that it can recompute; a run with compiled blocks has the gradients and weights of one
without, packed rows of many lengths do not compile again each time, names of parameters stay,
rollouts are not compiled, and a model without blocks is refused.
"""

from __future__ import annotations

import shutil
from functools import partial

import pytest
import tiny
import torch
from architectures import build
from peft import LoraConfig
from torch import nn

from okd_lightning.callbacks import GKD, OKD
from okd_lightning.errors import ConfigError
from okd_lightning.models import blocks, compile_blocks

pytestmark = [  # torch's compiler, of torch
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
]


@pytest.fixture
def make_module(make_module):
    """Return a module in float64: runs agree to 1e-9 on every processor."""
    return partial(make_module, dtype="float64")


def train(root, make_module, method, **settings):
    module = make_module(
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.05), **settings
    )
    recorder = tiny.fit(
        root, module, [method], tiny.make_rows(16), data={"batch_size": 4}, max_epochs=2
    )
    return recorder, tiny.weights(module)


METHODS = {
    "GKD": lambda: GKD(0.5, on_policy_fraction=0.5),
    "OKD": lambda: OKD(learning_rate=0.5, online_module=LoraConfig(r=2)),
}


@pytest.mark.parametrize("name", METHODS)
def test_runs_are_the_same_compiled(name, tmp_path, make_module, monkeypatch):
    graphs = []

    def count(graph, inputs):
        graphs.append(torch.is_grad_enabled())
        return graph

    monkeypatch.setattr(blocks, "_BACKEND", count)
    torch._dynamo.reset()
    plain = train(tmp_path, make_module, METHODS[name]())
    assert not graphs
    compiled = train(tmp_path, make_module, METHODS[name](), compile_blocks=True)
    assert 2 <= len(graphs) <= 8, "one per model and mode, and one per kind of mask"
    assert tiny.distance(compiled[1], plain[1]) < 1e-6
    for gradients, truth in zip(compiled[0].gradients, plain[0].gradients, strict=True):
        assert tiny.distance(gradients, truth) < 1e-5


@pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() == "DEFAULT",
    reason="torch.compile's C++ does not compile without vector instructions",
)
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs g++ on a CPU")
def test_the_real_compiler():
    plain, compiled = build("llama"), build("llama")
    compile_blocks(compiled, None)
    assert plain.state_dict().keys() == compiled.state_dict().keys()
    ids = torch.arange(6)[None]
    torch.testing.assert_close(compiled(ids).logits, plain(ids).logits, rtol=1e-5, atol=1e-5)


def test_unknown_blocks_are_refused():
    with pytest.raises(ConfigError, match=r"model.compile_blocks: Linear does not name its blocks"):
        compile_blocks(nn.Linear(2, 2))


def test_an_architecture_that_names_no_blocks_has_those_that_it_can_recompute():
    model = build("llama")
    model._no_split_modules = None
    assert blocks.blocks_of(model) == list(model.model.layers)


def test_blocks_inside_blocks_are_not_blocks_of_their_own():
    class Inner(nn.Module):
        pass

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Inner()

    class Model(nn.Module):
        _no_split_modules = ("Inner", "Outer")

        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([Outer(), Outer()])
            self.last = Inner()

    model = Model()
    assert blocks.blocks_of(model) == [*model.layers, model.last]
