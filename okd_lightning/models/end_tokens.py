"""Ids that end a response: ids at which generation stops, and ids that count as one outcome.

Owns the ids that models, tokenizer and user name. Data may add ids at which generation stops, and
remove those that occur before further tokens of the same response (``data.end_tokens``).
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeAlias, cast

from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from okd_lightning.errors import ConfigError, ModelError
from okd_lightning.models.loading import UNREADABLE, adapter_at, load_tokenizer
from okd_lightning.models.sources import ModelSource, Source, first_line, locate
from okd_lightning.models.vocabulary import Vocabulary

EndTokensArgument: TypeAlias = list[int | str] | int | str
"""Ids or tokens, or one of them."""


@dataclass(frozen=True)
class EndTokens:
    """Ids that end a response, of a pair.

    Attributes:
        end_ids: Ids that are one outcome of both models, "the response ends here". The first is the
            student's own where it is among them.
        stop_ids: Ids at which generation stops: ``end_ids``, those that close the data's own turns,
            and others after which a response may go on (a call of a tool). The first is appended to
            dataset responses.
        is_given: Whether the user named ``end_ids``, which then stay.
    """

    end_ids: tuple[int, ...]
    stop_ids: tuple[int, ...]
    is_given: bool = False

    def with_stops(self, ids: Collection[int], are_ends: bool = False) -> EndTokens:
        """Return these with further ids at which generation stops.

        Args:
            ids: The ids.
            are_ends: Whether they also are ends, unless the user named those: where the teacher
                has another tokenizer, no generation config but the student's names ends of these.
        """
        ends = _joined(self.end_ids, ids) if are_ends and not self.is_given else self.end_ids
        return replace(self, end_ids=ends, stop_ids=_joined(self.stop_ids, ids))

    def without(self, ids: Collection[int]) -> EndTokens:
        """Return these with ids at which generation stops but a response does not end."""
        ends = tuple(i for i in self.end_ids if i not in ids)
        return self if self.is_given or not ends else replace(self, end_ids=ends)

    def described(self, tokenizer: PreTrainedTokenizerBase) -> str:
        """Return the message for the start of a run."""
        names = _names(self.end_ids, tokenizer)
        text = f"responses end at {names}"
        if len(self.end_ids) > 1:
            text += ", one outcome for both models (--model.end_tokens names others)"
        others = [i for i in self.stop_ids if i not in self.end_ids]
        if others:
            text += f"; generation also stops at {_names(others, tokenizer)}"
        return text


def eos_token_ids(source: ModelSource, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Return all ids that end a response; the first is appended to training data.

    Taken from the student's generation config, else from the one in the tokenizer's folder, else
    from the tokenizer.

    Args:
        source: The student.
        tokenizer: Its tokenizer.

    Raises:
        ModelError: None of these has an end-of-sequence id, or it is not an id of the tokenizer.
    """
    ids = generation_eos(source, "--model.student")
    if ids is None and Path(tokenizer.name_or_path or "").is_dir():
        ids = _eos_beside(Source("", tokenizer.name_or_path))
    if ids is None:
        ids = tokenizer.eos_token_id
    if ids is None:
        raise ModelError(
            "neither the student's generation config nor its tokenizer names an end-of-sequence "
            "token; set eos_token_id in generation_config.json"
        )
    found = (ids,) if isinstance(ids, int) else tuple(ids)
    foreign = [i for i in found if i not in tokenizer.get_vocab().values()]
    if foreign:
        raise ModelError(
            f"the student's end-of-sequence ids {list(found)} hold {foreign[0]}, which is not a "
            "token of the tokenizer; set eos_token_id in the student's generation config"
        )
    return found


def generation_eos(source: ModelSource, option: str) -> int | list[int] | None:
    """Return the end-of-sequence ids of a model's generation config; None if it names none.

    Args:
        source: The model.
        option: How the user named it, for messages.
    """
    if isinstance(source, PreTrainedModel):
        return source.generation_config.eos_token_id if source.generation_config else None
    if isinstance(source, Mapping):
        return source.get("eos_token_id")
    found = locate(source, option)
    if found.gguf_file is not None:  # its tokenizer has the end of a chat turn
        return None
    own = _eos_beside(found)
    adapter = adapter_at(found, option) if own is None else None
    return own if adapter is None else generation_eos(adapter.base, option)


def _eos_beside(found: Source) -> int | list[int] | None:
    try:
        config = GenerationConfig.from_pretrained(found.name, revision=found.revision or "main")
    except OSError:  # a folder without generation_config.json
        return None
    except UNREADABLE as error:
        raise ModelError(
            f"generation_config.json of {found.name!r} cannot be read: {first_line(error)}"
        ) from error
    return cast("int | list[int] | None", config.eos_token_id)


def find_end_tokens(
    student: ModelSource,
    teachers: Sequence[ModelSource],
    tokenizer: PreTrainedTokenizerBase,
    vocabulary: Vocabulary,
    asked: EndTokensArgument | None = None,
    option: str = "model.end_tokens",
) -> EndTokens:
    """Return the ends of a pair: of all generation configs and the tokenizer, or those asked for.

    A teacher's id without a token is left out: both models are masked there.

    Args:
        student: Source of the student.
        teachers: Sources of the teacher's models; none where it is not read from files.
        tokenizer: The run's.
        vocabulary: Ids with a row in all models' tables.
        asked: The user's ids or tokens; None for none.
        option: How the user named them, for messages.

    Raises:
        ModelError: There is no end-of-sequence id, or the student's is not an id of the tokenizer.
        ConfigError: ``asked`` names no token of the tokenizer.
    """
    own = eos_token_ids(student, tokenizer)
    vocabulary.check_ids(own, "the end-of-sequence ids", tokenizer)
    if asked is not None:
        ends = _asked_ids(asked, tokenizer, option)
        vocabulary.check_ids(ends, option, tokenizer)
        ends = _joined([i for i in own if i in ends], ends)
        return EndTokens(ends, _joined(ends, own), is_given=True)
    others = [*(i for one in teachers for i in _teachers_ids(one)), tokenizer.eos_token_id]
    known = set(tokenizer.get_vocab().values())
    ends = _joined(own, (i for i in others if i in known and i < vocabulary.size))
    return EndTokens(ends, ends)


def _teachers_ids(teacher: ModelSource) -> Sequence[int]:
    """Return the ids of a teacher's generation config, else of its own tokenizer."""
    found = generation_eos(teacher, "--model.teacher")
    if found is None and isinstance(teacher, str):
        found = load_tokenizer(teacher, "--model.teacher").eos_token_id
    if found is None:
        return ()
    return [found] if isinstance(found, int) else list(found)


def _asked_ids(
    asked: EndTokensArgument, tokenizer: PreTrainedTokenizerBase, option: str
) -> tuple[int, ...]:
    given = asked if isinstance(asked, list | tuple) else [asked]
    vocabulary = tokenizer.get_vocab()
    ids = set(vocabulary.values())
    found = []
    for one in given:
        is_id = isinstance(one, int) and not isinstance(one, bool) and one in ids
        if not is_id and one not in vocabulary:
            near = difflib.get_close_matches(str(one), vocabulary, n=1)
            hint = f"did you mean {near[0]!r}?" if near else "give its ids or tokens"
            raise ConfigError(
                f"{option} holds {one!r}, which is neither an id nor a token of the tokenizer; "
                f"{hint}"
            )
        found.append(int(one) if is_id else vocabulary[str(one)])
    if not found:
        raise ConfigError(
            f"{option} is empty: a response has to end; give ids or tokens, such as "
            f"[{tokenizer.eos_token_id}], or leave it out"
        )
    return _joined((), found)


def _joined(first: Iterable[int], more: Iterable[int]) -> tuple[int, ...]:
    return tuple(dict.fromkeys([*first, *more]))


def _names(ids: Iterable[int], tokenizer: PreTrainedTokenizerBase) -> str:
    return ", ".join(f"{tokenizer.decode([i])!r} ({i})" for i in ids)
