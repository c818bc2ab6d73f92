"""What a config may make jsonargparse import: set for the whole process when this is imported.

Every module of ours that a config can build imports this one, so that it holds in a script of one's
own as well. A value of a type that takes anything (``dict[str, Any]``) never becomes an object, and
nothing that runs programs or reads pickles can be named, wherever a config comes from. What a
checkpoint's config may name is decided in ``config_trust``.
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
    """Writes text of a class of its own, such as the member of an enum, as plain text."""


_PlainDumper.add_multi_representer(
    str, lambda dumper, text: dumper.represent_str(str.__str__(text))
)


def _dump(values: Any) -> str:
    """Settings as YAML; defaults of Lightning's callbacks may be members of enums."""
    return str(yaml.dump(values, Dumper=_PlainDumper, sort_keys=False, allow_unicode=True))


set_dumper("yaml", _dump)
set_parsing_settings(instantiate_subclass_spec_in_any=False, import_path_denylist=[*_DENIED])
