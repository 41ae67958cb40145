"""Text <-> ids: a byte-level BPE, and the special tokens that give a document its shape."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers


@dataclass(frozen=True)
class SpecialTokens:
    """Ids that no text can spell: they lie beyond the BPE's own, so a caption cannot smuggle one in."""

    bos: int  # begins a document
    eos: int  # ends it
    boi: int  # begins an image
    eoi: int  # ends it


class TextTokenizer:
    """Byte-level BPE (any string is encodable) with the special tokens after its last entry."""

    def __init__(self, bpe: Tokenizer) -> None:
        self.bpe = bpe
        # Where a vocabulary does hold control tokens, text that looks like one stays text.
        self.bpe.encode_special_tokens = True
        n = bpe.get_vocab_size()
        self.special = SpecialTokens(bos=n, eos=n + 1, boi=n + 2, eoi=n + 3)

    def __len__(self) -> int:
        return self.bpe.get_vocab_size() + 4

    def encode(self, text: str) -> list[int]:
        """Ids of any string, without special tokens."""
        return self.bpe.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids; special tokens are left out, bytes that are no UTF-8 become U+FFFD."""
        n = self.bpe.get_vocab_size()
        return self.bpe.decode([i for i in ids if i < n], skip_special_tokens=False)

    @classmethod
    def train(cls, corpus: Iterable[str], entries: int) -> "TextTokenizer":
        """Learn merges on `corpus`. `entries` counts the four special tokens; a small corpus may need fewer."""
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        if entries < len(alphabet) + 4:
            raise ValueError(f"vocabulary: expected at least {len(alphabet) + 4} (256 bytes, 4 special), got {entries}")
        bpe = Tokenizer(models.BPE())
        bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        bpe.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(vocab_size=entries - 4, initial_alphabet=sorted(alphabet), show_progress=False)
        bpe.train_from_iterator(corpus, trainer)
        return cls(bpe)

    def to_json(self) -> str:
        """The whole tokenizer as a string (checkpoints)."""
        return self.bpe.to_str()

    @classmethod
    def from_json(cls, text: str) -> "TextTokenizer":
        """The inverse of `to_json`."""
        return cls(Tokenizer.from_str(text))

    def save(self, path: Path) -> None:
        """Write `tokenizer.json`."""
        path.write_text(self.to_json(), encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> "TextTokenizer":
        """Read a `tokenizer.json`."""
        if not path.is_file():
            raise ValueError(f"text tokenizer: expected a file tokenizer.json, got {path}, which does not exist")
        try:
            return cls.from_json(path.read_text(encoding="utf-8"))
        except Exception as error:
            raise ValueError(f"text tokenizer: {path} is no tokenizer.json ({error})") from error
