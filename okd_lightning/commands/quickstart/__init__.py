"""The embedded task: something to distil without a network and with answers that can be checked.

* ``task``: problems, their exact check, and the JSONL files in ``data/``.
* ``tokenizer``: one id a character; the committed folder ``tokenizer/``.
"""
