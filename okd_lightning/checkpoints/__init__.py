"""Contents of checkpoints, their forms on disk, and atomic writing.

* ``contents``: the weights and random streams that are stored, and checks of them.
* ``io``: atomic writing of files; ``files``: reading without a module.
* ``folders``: sharded checkpoints; ``folder_index``: their index, read without running its content.
* ``integrity``: checksums; ``signature``: whether this user wrote a config.
* ``folder_lock``: one process at a time writes in a folder.
"""
