"""Tokenizers: the bytes of UTF-8, or a byte-level BPE that the `tokenizers` package trains and reads.

Both have four sentinels, which no text encodes to: one stands before each document, three mark the parts of a
document that is to be filled in the middle.
"""

import codecs
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

SENTINEL_NAMES = ("<|end|>", "<|fim_begin|>", "<|fim_hole|>", "<|fim_end|>")
FEWEST_BPE_TOKENS = 256 + len(SENTINEL_NAMES)


@dataclass(frozen=True)
class Sentinels:
    """Token ids. end stands before each document."""

    end: int
    fim_begin: int
    fim_hole: int
    fim_end: int


class Tokenizer(Protocol):
    def encode(self, text: str) -> list[int]: ...

    def stream(self, tokens: Iterable[int]) -> Iterator[str]:
        """The text, in pieces of whole characters."""
        ...


class DataTokenizer(Tokenizer, Protocol):
    """One that data can be prepared with."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def sentinels(self) -> Sentinels: ...

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Each text's ids; none is a sentinel's."""
        ...


class Bytes:
    """A token is a byte of UTF-8. The sentinels are bytes that UTF-8 text does not have."""

    vocab_size = 256
    sentinels = Sentinels(end=0, fim_begin=0xF8, fim_hole=0xF9, fim_end=0xFA)

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.frombuffer(text.encode(), np.uint8) for text in texts]

    def stream(self, tokens: Iterable[int]) -> Iterator[str]:
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        for token in tokens:
            yield decoder.decode(bytes([token]))
        yield decoder.decode(b"", final=True)


class FromFile:
    """tokenizer.json, of a released model or of prepared data."""

    def __init__(self, path: Path, *, special_tokens: bool = True) -> None:
        """special_tokens: whether text that spells a special token encodes to it.

        Raises ValueError for a file that is not a tokenizer's.
        """
        try:
            self.tokenizer = _library().Tokenizer.from_file(str(path))
        except ImportError as error:
            raise ValueError(f"{path} needs the tokenizers package. Mend: pip install tokenizers") from error
        except Exception as error:  # the library raises nothing narrower
            raise ValueError(f"cannot read {path}: {error}") from error
        self.tokenizer.encode_special_tokens = not special_tokens

    def save(self, path: Path) -> None:
        self.tokenizer.save(str(path))

    @property
    def vocab_size(self) -> int:
        return self.tokenizer.get_vocab_size()

    @property
    def sentinels(self) -> Sentinels:
        ids = [self.tokenizer.token_to_id(name) for name in SENTINEL_NAMES]
        missing = [name for name, token in zip(SENTINEL_NAMES, ids, strict=True) if token is None]
        if missing:
            raise ValueError(f"the tokenizer has no {missing[0]}, expected {', '.join(SENTINEL_NAMES)}")
        return Sentinels(*ids)

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text).ids

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        encoded = self.tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(one.ids, np.uint32) for one in encoded]

    def stream(self, tokens: Iterable[int]) -> Iterator[str]:
        ids: list[int] = []
        shown = ""
        for token in tokens:
            ids.append(token)
            text = self.tokenizer.decode(ids)
            if not text.endswith("\N{REPLACEMENT CHARACTER}"):  # else a character is not whole yet
                yield text[len(shown) :]
                shown = text
        yield self.tokenizer.decode(ids)[len(shown) :]


def train_bpe(texts: Iterable[str], vocab_size: int, path: Path) -> None:
    """Trains a byte-level BPE of `vocab_size` tokens, sentinels included, and writes it to path.

    Any text encodes and decodes without loss. A small text may not have enough pairs for all tokens; the
    vocabulary is then smaller. Raises ValueError for a vocab_size below FEWEST_BPE_TOKENS or without the
    tokenizers package.
    """
    if vocab_size < FEWEST_BPE_TOKENS:
        raise ValueError(
            f"vocab_size is {vocab_size}, expected at least {FEWEST_BPE_TOKENS}: "
            f"256 bytes and {len(SENTINEL_NAMES)} sentinels"
        )
    try:
        library = _library()
    except ImportError as error:
        raise ValueError("BPE needs the tokenizers package. Mend: pip install tokenizers") from error
    tokenizer = library.Tokenizer(library.models.BPE())
    tokenizer.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = library.decoders.ByteLevel()
    trainer = library.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SENTINEL_NAMES),
        initial_alphabet=library.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.save(str(path))


def _library() -> Any:
    import tokenizers
    import tokenizers.decoders
    import tokenizers.models
    import tokenizers.pre_tokenizers
    import tokenizers.trainers

    return tokenizers
