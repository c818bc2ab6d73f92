"""The exception tree: every mistake that a user can make has a class here.

Each class also inherits the standard-library class it refines, so that ``except ValueError`` in a
user's script keeps working. A message says what was wrong, what was given, what was expected,
where, and what to do; the command line prints it as one line and exits with a non-zero status.
"""

from __future__ import annotations

from okd_lightning.printable import one_line


class OKDLightningError(Exception):
    """Base of all errors that this library raises on purpose.

    Its text is one line without control characters, whatever the message quotes from data.
    """

    def __str__(self) -> str:
        """The message, as it may be written to a terminal."""
        return one_line(super().__str__())


class ConfigError(OKDLightningError, ValueError):
    """A setting, or a combination of settings, that cannot work."""


class UsageError(ConfigError):
    """A command line that cannot be parsed; exit status 2."""


class DataError(OKDLightningError, ValueError):
    """A data set that is empty, broken, or lacks the columns that are needed."""


class DataNotFoundError(DataError, FileNotFoundError):
    """A data file or folder that does not exist."""


class ModelError(OKDLightningError, ValueError):
    """A model that cannot be loaded or used."""


class ModelNotFoundError(ModelError, FileNotFoundError):
    """A model folder or hub id that does not exist."""


class VocabularyError(ModelError):
    """Student and teacher whose tokenizers do not agree."""


class CheckpointError(OKDLightningError, RuntimeError):
    """A checkpoint that is missing, broken, or of another run."""


class RewardError(OKDLightningError, ValueError):
    """A reward function that raised, or returned something that is not one number a response."""


class OutputError(OKDLightningError, OSError):
    """A folder or file that cannot be written."""


class FolderInUseError(OutputError):
    """A folder that another process writes in at the same time."""


class NonFiniteError(OKDLightningError, FloatingPointError):
    """A loss, gradient or weight that is NaN or infinite.

    Raised before the optimizer's step, or before the weights are written.
    """


class CacheError(OKDLightningError, RuntimeError):
    """A cache on disk that is broken, or cannot be read by all processes of a run."""


class RolloutTimeoutError(OKDLightningError, TimeoutError):
    """An engine that did not answer in time while it wrote responses; raised on all ranks."""


class LostRankError(OKDLightningError, ConnectionError):
    """Another process of a run on several devices has ended or does not answer."""


class DifferingRanksError(OKDLightningError, RuntimeError):
    """Processes of one run that have read other data, models, settings or libraries."""


class PreemptedError(OKDLightningError, InterruptedError):
    """A run that was asked to stop (SIGTERM), behind a checkpoint; exit status 143."""


class ServerError(OKDLightningError, ConnectionError):
    """A server that cannot be reached, refuses, or is not what this run needs."""


class ServerTimeoutError(ServerError, TimeoutError):
    """A server that did not answer in time."""
