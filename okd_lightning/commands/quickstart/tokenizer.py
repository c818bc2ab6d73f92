"""The quickstart's tokenizer: one id per character.

Owns the alphabet and the creation of the committed folder ``tokenizer/`` (``python -m
okd_lightning.commands.quickstart.tokenizer DIR``); does not know the problems. The folder is an
ordinary Hugging Face one: ``AutoTokenizer`` loads it.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

PAD_TOKEN, EOS_TOKEN, UNK_TOKEN = "<pad>", "<eos>", "<unk>"
ALPHABET = "0123456789+-=;"

TOKENIZER_DIR = Path(__file__).parent / "tokenizer"
"""The committed folder."""


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Build the tokenizer: ``<pad>``, ``<eos>``, ``<unk>``, then the characters of ``ALPHABET``.

    No special token is added to a text; a character outside the alphabet becomes ``<unk>``.
    """
    vocabulary = {token: i for i, token in enumerate([PAD_TOKEN, EOS_TOKEN, UNK_TOKEN, *ALPHABET])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNK_TOKEN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD_TOKEN,
        eos_token=EOS_TOKEN,
        unk_token=UNK_TOKEN,
        padding_side="left",
        model_max_length=64,
        clean_up_tokenization_spaces=False,
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Write the tokenizer into a folder."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("out", type=Path, help="folder to write into")
    build_tokenizer().save_pretrained(parser.parse_args(argv).out)


if __name__ == "__main__":
    main()
