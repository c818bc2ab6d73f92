"""Reading data: from a file, folder, hub id or list to tokenized examples.

* ``sources``: where rows come from; ``data_files`` reads files (``json_files``, ``csv_files``,
  ``text_files``), ``arrow`` folders and hub ids.
* ``columns``: the names that are read, and the cells; ``foreign_chats``: chats of other forms.
* ``layouts``: whether rows are prompts, chats or whole texts; ``column_hints``: the options that
  errors advise for other names.
* ``row_templates``: prompts made of several columns, and prompts as chats.
* ``chat_turns``: a chat's messages, and which of them are learned.
* ``templates``: chats as text, cut where assistant turns begin and end; ``chat_ids``: their ids.
* ``text_rows``, ``chat_rows``, ``whole_texts``: the kinds of rows to ``records.Example``s.
* ``tool_turns``: what the chat template writes between two turns of a rollout that calls tools.
* ``teacher_prompts``: what the teacher reads in place of the prompt, where that is asked for.
* ``examples``: all of them, with lengths limited and what was left out counted.
* ``token_cache``: the same read from disk where nothing has changed; ``stored_examples``: as bytes.
* ``parts``: train, val, test and predict; ``row_report``: what a run says of their rows.
* ``whole_steps``: how many micro-batches make an optimizer step, and what would cut one.
* ``module``: ``RolloutDataModule``, the loaders of a run; ``new_module``: its base;
  ``distilled_module``: what it knows of the module that it feeds; ``progress`` shows how far it is.
"""

from okd_lightning.data.columns import Columns
from okd_lightning.data.examples import ExampleSet, OnOverlong, build_examples
from okd_lightning.data.module import RolloutDataModule
from okd_lightning.data.sources import DataSource, describe_source, load_rows

__all__ = [
    "Columns",
    "DataSource",
    "ExampleSet",
    "OnOverlong",
    "RolloutDataModule",
    "build_examples",
    "describe_source",
    "load_rows",
]
