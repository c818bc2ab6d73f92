"""Data: from a file, folder, hub id or list to tokenized examples.

* ``sources``: files, folders, hub ids and rows in memory; ``data_files`` reads files
  (``json_files``, ``csv_files``, ``text_files``), ``arrow`` folders and hub ids.
* ``columns``: the column names, and the reading of cells; ``foreign_chats``: other chat formats.
* ``layouts``: whether rows are prompts, chats or whole texts; ``column_hints``: the options that
  errors advise for other names.
* ``row_templates``: prompts made of several columns, and prompts as chats.
* ``chat_turns``: a chat's messages, and which of them carry loss.
* ``templates``: chats as text, divided at assistant turns; ``chat_ids``: their ids.
* ``text_rows``, ``chat_rows``, ``whole_texts``: the kinds of rows to ``records.Example``s.
* ``tool_turns``: the chat template's text between two turns of a rollout that calls tools.
* ``teacher_prompts``: settings of the teacher's own prompts; ``teacher_prompt_ids``: their ids.
* ``teacher_choice``: a row's teacher among several.
* ``examples``: all examples, with limited lengths and counts of skipped rows.
* ``token_cache``: the examples on disk; ``stored_examples``: the examples as bytes.
* ``parts``: train, val, test and predict; ``row_report``: the log and warnings about their rows.
* ``whole_steps``: micro-batches of an optimizer step, and checks that steps are complete.
* ``module``: ``RolloutDataModule``, the loaders of a run; ``collective_module``: its base;
  ``distilled_module``: the interface of the module that it feeds; ``progress``: progress bars.
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
