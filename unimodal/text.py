"""Text <-> ids: a byte-level BPE, and the special tokens that give a document its shape."""

import json
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


SPECIAL_TOKENS = 4
SPECIAL = "special_tokens.json"  # beside a tokenizer.json, which the `tokenizers` library reads with no key of ours


class TextTokenizer:
    """Byte-level BPE (any string is encodable) with four special tokens.

    Args:
        bpe: what text is spelt in.
        special_start: first id of the special tokens; None puts them right after the last entry. An imported model has
            more embedding rows than its BPE has entries, and its special tokens lie behind those rows.
    """

    def __init__(self, bpe: Tokenizer, special_start: int | None = None) -> None:
        self.bpe = bpe
        # Where a vocabulary does hold control tokens, text that looks like one stays text.
        self.bpe.encode_special_tokens = True
        self.bpe.no_truncation()  # a tokenizer from elsewhere may cut and fill up
        self.bpe.no_padding()
        known = set(bpe.get_vocab(with_added_tokens=True).values())
        self.entries = max(known, default=-1) + 1
        if special_start is not None and special_start < self.entries:
            raise ValueError(f"special_start: expected at least the BPE's {self.entries} entries, got {special_start}")
        self.special_start = special_start
        n = self.entries if special_start is None else special_start
        self.special = SpecialTokens(bos=n, eos=n + 1, boi=n + 2, eoi=n + 3)
        self._holes = [i for i in range(n) if i not in known]

    def __len__(self) -> int:
        """Rows of an embedding that holds every id."""
        return self.special.eoi + 1

    def placed(self, special_start: int) -> "TextTokenizer":
        """The same BPE with the special tokens elsewhere."""
        return TextTokenizer(self.bpe, special_start)

    def unused(self, rows: int) -> list[int]:
        """Ids below `rows` that are no token, which decoding must never choose."""
        return [i for i in (*self._holes, *range(len(self), rows)) if i < rows]

    def encode(self, text: str) -> list[int]:
        """Ids of any string, without special tokens."""
        return self.bpe.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids; special tokens are left out, bytes that are no UTF-8 become U+FFFD."""
        return self.bpe.decode([i for i in ids if i < self.entries], skip_special_tokens=False)

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
        bpe = self.bpe.to_str()
        return bpe if self.special_start is None else f'{{"special_start": {self.special_start}, "bpe": {bpe}}}'

    @classmethod
    def from_json(cls, text: str) -> "TextTokenizer":
        """The inverse of `to_json`."""
        record = json.loads(text)
        if "bpe" not in record:
            return cls(Tokenizer.from_str(text))
        return cls(Tokenizer.from_str(json.dumps(record["bpe"])), record["special_start"])

    def save(self, path: Path) -> None:
        """Write `tokenizer.json` and, where the special tokens are not right after its entries, special_tokens.json."""
        path.write_text(self.bpe.to_str(), encoding="utf-8")
        special = path.with_name(SPECIAL)
        if self.special_start is None:
            special.unlink(missing_ok=True)
        else:
            special.write_text(json.dumps({"special_start": self.special_start}) + "\n")

    @classmethod
    def load(cls, path: Path) -> "TextTokenizer":
        """Read a `tokenizer.json`, of this project or another, and the special_tokens.json beside it if there is one."""
        if not path.is_file():
            raise ValueError(f"text tokenizer: expected a file tokenizer.json, got {path}, which does not exist")
        special = path.with_name(SPECIAL)
        try:
            made = cls.from_json(path.read_text(encoding="utf-8"))
            return made.placed(_special_start(special)) if special.is_file() else made
        except Exception as error:
            raise ValueError(f"text tokenizer: {path} is no tokenizer.json ({error})") from error


def _special_start(path: Path) -> int:
    start = json.loads(path.read_text(encoding="utf-8")).get("special_start")
    if type(start) is not int:
        raise ValueError(f"{path.name}: special_start: expected a whole number, got {start!r}")
    return start
