"""A run's tokenizer as the files that `transformers` loads, with the same ids."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tokenizers

from train.data.tokenizer import ByteTokenizer
from train.trained import TOKENIZER_FILE, TrainedRun

END_OF_DOCUMENT = "<|endoftext|>"


def byte_tokenizer() -> tokenizers.Tokenizer:
    """`ByteTokenizer` as a tokenizer.json: a byte-level vocabulary whose ids are the bytes."""
    # The byte-level format writes every byte as a visible character: printable ones of Latin-1 as
    # themselves, the others as characters from 256 on, in their order.
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = (byte for byte in range(256) if byte not in printable)
    symbol = {byte: chr(256 + i) for i, byte in enumerate(others)} | {b: chr(b) for b in printable}
    model = tokenizers.models.BPE(vocab={symbol[b]: b for b in range(256)}, merges=[])
    tokenizer = tokenizers.Tokenizer(model)
    level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = level
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens([END_OF_DOCUMENT])
    assert tokenizer.token_to_id(END_OF_DOCUMENT) == ByteTokenizer.eos_id
    return tokenizer


def tokenizer_files(run: TrainedRun) -> dict[str, str]:
    """tokenizer.json and tokenizer_config.json of a run, by name.

    The tokenizer adds to a text what training added: nothing, or, in an imported run, what the
    imported files add.
    """
    if run.tokenizer.file is None:
        text, tokenizer = byte_tokenizer().to_str(), byte_tokenizer()
    else:
        text = Path(run.tokenizer.file).read_text(encoding="utf-8")
        content: dict[str, Any] = json.loads(text)
        # Left as they are, such settings would cut texts short, or begin them with a token that
        # the model never met.
        content["truncation"] = content["padding"] = None
        tokenizer = tokenizers.Tokenizer.from_str(json.dumps(content))
        if tuple(tokenizer.encode("").ids) != run.prefix:
            content["post_processor"] = None
        text = json.dumps(content, ensure_ascii=False)
    end = tokenizer.id_to_token(run.tokenizer.eos_id)
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": run.config.sequence_length,
        "clean_up_tokenization_spaces": False,
        "eos_token": end,
        "bos_token": tokenizer.id_to_token(bos_id(run)),
    }
    return {TOKENIZER_FILE: text, "tokenizer_config.json": json.dumps(settings, indent=2)}


def bos_id(run: TrainedRun) -> int:
    """What stands before a document: an imported model's own token, else the end of the last."""
    return run.prefix[0] if run.prefix else run.tokenizer.eos_id
