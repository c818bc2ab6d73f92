"""Settings of jsonargparse: what a config may import, and how values are written as YAML.

The modules of the classes that a config builds import this one, so that the settings are in force
for every parser of the process, those of a user's script too. A value of a type that takes anything
(``dict[str, Any]``) never becomes an object, and nothing that runs programs or reads pickles can be
named, wherever a config comes from. ``config_trust`` decides what a checkpoint's config may name.
"""

from __future__ import annotations

from typing import Any

import yaml
from jsonargparse import set_dumper, set_parsing_settings

_DENIED = (
    *("IPython", "cffi", "cloudpickle", "dill", "joblib", "pexpect", "ptyprocess"),
    *("numpy.ctypeslib", "numpy.f2py", "numpy.load", "pandas.eval", "pandas.read_pickle"),
    *("torch.distributed.elastic", "torch.distributed.launch", "torch.distributed.run"),
    *("torch.hub", "torch.load", "torch.multiprocessing", "torch.package", "torch.serialization"),
    *("torch.utils.cpp_extension", "torch.utils.model_zoo"),
)
"""Besides jsonargparse's own list: os, subprocess, pickle, importlib and the like."""


class _PlainDumper(yaml.SafeDumper):
    """Dumper that writes text of a subclass of ``str``, such as an enum's member, as plain text."""


_PlainDumper.add_multi_representer(
    str, lambda dumper, text: dumper.represent_str(str.__str__(text))
)


def _dump(values: Any) -> str:
    """Return settings as YAML; defaults of Lightning's callbacks may be members of enums."""
    return str(yaml.dump(values, Dumper=_PlainDumper, sort_keys=False, allow_unicode=True))


set_dumper("yaml", _dump)
set_parsing_settings(instantiate_subclass_spec_in_any=False, import_path_denylist=[*_DENIED])
