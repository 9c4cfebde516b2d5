"""Decoupled Bottleneck Attention (stub: tokenizers and the token-file reader, the part that prepare_fineweb.py imports)."""

import hashlib
import json
import sys
from pathlib import Path

import numpy as np
import torch


class UserError(Exception):
    """A mistake that the user can mend; main() prints it as one line and exits with 1."""


# -----------------------------------------------------------------------------
# Data

EOS, UNK = "<eos>", "<unk>"


def split_words(text):
    """Word-level tokens of the WikiText convention: lines that aren't blank, split on white space, <eos> between lines."""
    return f" {EOS} ".join(line for line in text.split("\n") if line.strip()).split()


class ByteTokenizer:
    """UTF-8 bytes; id 256 ends a document."""
    name, vocab_size, eot = "byte", 257, 256

    def encode(self, text):
        return np.frombuffer(text.encode(), dtype=np.uint8).astype(np.uint16)

    def decode(self, ids):
        return bytes(i for i in ids if i < 256)


class GPT2Tokenizer:
    """GPT-2's byte-pair encoding by tiktoken; id 50256 (<|endoftext|>) ends a document."""
    name, vocab_size, eot = "gpt2", 50257, 50256

    def __init__(self):
        try:
            import tiktoken
        except ImportError:
            raise UserError("the gpt2 tokenizer needs tiktoken: pip install tiktoken") from None
        try:
            self.bpe = tiktoken.get_encoding("gpt2")
        except OSError as e:                               # requests' errors are OSErrors
            raise UserError(f"tiktoken can't fetch the GPT-2 vocabulary ({type(e).__name__}); go online once, or set "
                            "TIKTOKEN_CACHE_DIR to a folder that holds it") from None

    def encode(self, text):
        return np.array(self.bpe.encode_ordinary(text), dtype=np.uint16)

    def decode(self, ids):
        return b"".join(self.bpe.decode_single_token_bytes(i) for i in ids)


class WordTokenizer:
    """White-space words; `words` lists the vocabulary in id order; <eos> ends a line and so a document."""
    name = "word"

    def __init__(self, words):
        self.words = list(words)
        self.ids = {w: i for i, w in enumerate(self.words)}
        if len(self.ids) != len(self.words) or not {EOS, UNK} <= self.ids.keys():
            raise UserError(f"a word vocabulary must list distinct words, {EOS} and {UNK} among them")
        self.vocab_size, self.eot = len(self.words), self.ids[EOS]

    @classmethod
    def build(cls, words):
        """Vocabulary of a list of words in order of first appearance; <eos> and <unk> are added if absent."""
        return cls(dict.fromkeys([*dict.fromkeys(words), EOS, UNK]))

    def encode(self, text):
        return self.encode_words(split_words(text))

    def encode_words(self, words):
        unk = self.ids[UNK]
        return np.array([self.ids.get(w, unk) for w in words], dtype=np.uint32)

    def decode(self, ids):
        return "".join("\n" if i == self.eot else self.words[i] + " " for i in ids).encode()
