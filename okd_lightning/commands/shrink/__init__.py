"""``okd-lightning shrink``: a student cut from its teacher, as a Hugging Face folder.

* ``options``: the options. ``command``: the order of the cuts.
* ``rows``: the calibration rows, from a dataset or sampled from the model itself.
* ``report``: the candidates on the terminal, in ``shrink.json`` and on the model card.
"""
