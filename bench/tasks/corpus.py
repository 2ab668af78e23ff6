"""Plain text for pre-training: where it comes from, and its cut into spans of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from bench.errors import DataError, unknown
from bench.tasks.reading import read_file
from bench.tasks.sources import FORMATS, bundled, effective_root, revision_of, split_file

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DEFAULT_CORPUS = "wikitext2"
COLUMN = "text"
_TEXTS_A_BATCH = 1000


@dataclass(frozen=True)
class Corpus:
    """Where the text of a corpus was found.

    Attributes
    ----------
    name
        What it was asked for as.
    origin
        ``"bundled"`` or ``"files"``.
    files
        Split (``"train"``, and where there is one ``"validation"``) -> file.
    """

    name: str
    origin: Literal["bundled", "files"]
    files: dict[str, Path]


def resolve_corpus(name_or_path: str = DEFAULT_CORPUS, data_root: Path | None = None) -> Corpus:
    """Find a corpus: a folder of that name below the data root, a bundled one, or a path.

    Parameters
    ----------
    name_or_path
        A name, or the path of a ``.txt`` file (one text a line) or of a parquet, JSONL or CSV file with a column
        ``text``, or of a folder with ``train.*`` and perhaps ``validation.*``.
    data_root
        Local data root; ``None`` for ``BENCH_DATA_ROOT``, if that is set.

    Raises
    ------
    ConfigError
        If there is no such corpus.
    DataError
        If its folder lacks ``train.*``.
    """
    root, path = effective_root(data_root), Path(name_or_path).expanduser()
    if root and (root / name_or_path).is_dir():
        return Corpus(name_or_path, "files", _splits(root / name_or_path))
    if path.name == name_or_path and bundled(name_or_path).is_dir():
        return Corpus(name_or_path, "bundled", _splits(bundled(name_or_path)))
    if path.is_dir():
        return Corpus(name_or_path, "files", _splits(path))
    if path.is_file() and path.suffix in (".txt", *FORMATS):
        return Corpus(name_or_path, "files", {"train": path})
    folders = [folder.name for folder in root.iterdir() if folder.is_dir()] if root else []
    raise unknown("corpus", name_or_path, {DEFAULT_CORPUS, "<file>.txt", "<file>.parquet", *folders})


def _splits(folder: Path) -> dict[str, Path]:
    files = {"train": split_file(folder, ["train"])}
    if any((folder / f"validation{suffix}").is_file() for suffix in FORMATS):
        files["validation"] = split_file(folder, ["validation"])
    return files


def load_corpus(
    name_or_path: str = DEFAULT_CORPUS,
    data_root: Path | None = None,
    split: Literal["train", "validation"] = "train",
) -> list[str]:
    """Return the texts of a corpus in their order, without blank ones.

    Parameters
    ----------
    name_or_path, data_root
        As for `resolve_corpus`.
    split
        Which part.

    Raises
    ------
    ConfigError, DataError
        As `resolve_corpus`; and if the split is not there, cannot be read, or holds no text.
    """
    corpus = resolve_corpus(name_or_path, data_root)
    if split not in corpus.files:
        raise DataError(f"corpus '{name_or_path}' has no {split} split; splits: {', '.join(corpus.files)}.")
    path = corpus.files[split]
    texts = [text for text in (_lines(path) if path.suffix == ".txt" else _column(path)) if text.strip()]
    if not texts:
        raise DataError(f"{path} holds no text.")
    return texts


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text("utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {path} as UTF-8 text: {error}.") from error


def _column(path: Path) -> list[str]:
    texts = []
    for number, row in enumerate(read_file(path, [COLUMN])):
        if not isinstance(row[COLUMN], str):
            raise DataError(f"{path}, row {number + 1}, column '{COLUMN}': expected text, found {row[COLUMN]!r}.")
        texts.append(row[COLUMN])
    return texts


def corpus_revision(name_or_path: str = DEFAULT_CORPUS, data_root: Path | None = None) -> str:
    """Identify a corpus by the bytes of its files, wherever they lie.

    Returns
    -------
    str
        ``"bundled:<hex prefix>"`` or ``"sha256:<hex>"``.

    Raises
    ------
    ConfigError, DataError
        As `resolve_corpus`.
    """
    corpus = resolve_corpus(name_or_path, data_root)
    return revision_of(corpus.files, corpus.origin)


def spans(
    texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, length: int, limit: int | None = None
) -> list[list[int]]:
    """Tokenise texts, join them, and cut the stream into consecutive spans.

    Parameters
    ----------
    texts
        The texts, in order.
    tokenizer
        The backbone's; special tokens are not added.
    length
        Tokens in a span; what remains at the end is dropped.
    limit
        Stop after so many spans, without tokenising the rest.

    Raises
    ------
    DataError
        If the texts do not fill one span.
    """
    cut: list[list[int]] = []
    stream: list[int] = []
    for first in range(0, len(texts), _TEXTS_A_BATCH):
        batch = list(texts[first : first + _TEXTS_A_BATCH])
        for ids in tokenizer(batch, add_special_tokens=False, verbose=False)["input_ids"]:
            stream += ids
        whole = len(stream) // length * length
        cut += [stream[i : i + length] for i in range(0, whole, length)]
        stream = stream[whole:]
        if limit is not None and len(cut) >= limit:
            return cut[:limit]
    if not cut:
        raise DataError(f"the corpus holds {len(stream)} tokens, fewer than one span of {length}.")
    return cut
