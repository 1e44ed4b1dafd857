"""Texts: the split keeps evaluation out of calibration, windows are cut as the protocol says, errors are clear."""

from __future__ import annotations

import importlib.util
import json
import re
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.models import default_tokenizer

from micromix_compile.evaluation import texts

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path


class LetterTokenizer:
    """One token a character; between those that it puts before and after every text unless told otherwise."""

    bos_token_id = 1

    def __init__(self, before: list[int], after: list[int]) -> None:
        self.before, self.after = before, after

    def __call__(self, text: str, *, add_special_tokens: bool = True, **_: Any) -> dict[str, list[int]]:
        letters = [ord(letter) for letter in text]
        return {"input_ids": [*self.before, *letters, *self.after] if add_special_tokens else letters}


def windows_of(
    articles: Sequence[str], count: int, length: int, before: list[int] | None = None, after: list[int] | None = None
) -> torch.Tensor:
    """`token_windows` with a tokenizer that needs no model."""
    return texts.token_windows(articles, LetterTokenizer(before or [], after or []), count, length)


@pytest.mark.parametrize("name", ["wiki", "c4", "technical"])
def test_no_evaluation_article_calibrates(name: str) -> None:
    """An independent look at the bundled texts: neither a whole article nor its opening is on both sides."""
    loaded = texts.load_texts(name)
    calibration = "\n\n".join(loaded.calibration)
    for article in loaded.evaluation:
        assert not any(article[i : i + 200] in calibration for i in range(0, len(article) - 200, 50))


def test_an_evaluation_article_that_quotes_calibration_is_dropped() -> None:
    """A shared passage of 200 characters, wherever it stands; a shorter one may be a phrase."""
    passage = "".join(chr(0x4E00 + i) for i in range(400))
    articles = [f"x{passage}", f"an answer to: {passage[150:350]}", f"hm {passage[:90]}", "other"]
    assert texts.split_articles("drawn", articles).evaluation == (articles[2], "other")


@given(st.lists(st.text("ab \n", max_size=3), max_size=40))
def test_the_split_is_disjoint_whatever_repeats(articles: list[str]) -> None:
    """With three letters to draw from, most lists hold the same article many times."""
    kept = [article.strip() for article in articles if article.strip()]
    if len(set(kept) - set(kept[0::4])) == 0:
        with pytest.raises(ValueError, match="at least two"):
            texts.split_articles("drawn", articles)
        return
    split = texts.split_articles("drawn", articles)
    assert not set(split.calibration) & set(split.evaluation)
    assert set(split.calibration) | set(split.evaluation) == set(kept)


def test_every_fourth_article_calibrates_and_the_others_follow_by_offset() -> None:
    """Offsets 1, then 2, then 3; empty articles don't count."""
    split = texts.split_articles("numbers", ["0", "1", " ", "2", "3", "4", "5", "", "6", "7", "8"])
    assert split.calibration == ("0", "4", "8")
    assert split.evaluation == ("1", "5", "2", "6", "3", "7")


def test_texts_refuse_an_article_on_both_sides() -> None:
    """The invariant holds by construction, not only in the splitter."""
    with pytest.raises(ValueError, match="1 articles are in both"):
        texts.Texts("mine", ("a", "b"), ("b", "c"))


def test_the_wiki_articles_are_those_of_the_protocol() -> None:
    """495 articles of more than 600 characters, without their tags; one quotes another and is dropped."""
    loaded = texts.load_texts("wiki")
    assert (len(loaded.calibration), len(loaded.evaluation)) == (124, 370)
    for article in (*loaded.calibration, *loaded.evaluation):
        assert len(article) > 600
        assert "<doc" not in article
    assert loaded.evaluation[0].startswith("2007 European Parliament election in Bulgaria")


def test_windows_follow_each_other_without_overlap_or_bos() -> None:
    """Articles are joined by blank lines; the rest that fills no window is left over."""
    windows = windows_of(["abc", "defg"], 2, 4)
    assert windows.dtype == torch.int64
    assert ["".join(map(chr, window)) for window in windows.tolist()] == ["abc\n", "\ndef"]


@pytest.mark.parametrize("after", [[], [2]])
def test_every_window_begins_with_the_bos_token_that_a_tokenizer_wants(after: list[int]) -> None:
    """Such as Gemma's; what it puts behind a text, as some do with EOS, is no part of running text."""
    windows = windows_of(["abc", "defg"], 3, 4, [1], after)
    assert windows[:, 0].tolist() == [1, 1, 1]
    assert ["".join(map(chr, window)) for window in windows[:, 1:].tolist()] == ["abc", "\n\nd", "efg"]
    assert windows_of(["abc"], 1, 3, [], [2]).tolist() == [[97, 98, 99]], "a tokenizer without BOS"
    assert windows_of(["abc"], 1, 3, [7]).tolist() == [[97, 98, 99]], "what comes first there is another token"
    with pytest.raises(ValueError, match="the text has 3 windows of 4 tokens, but 4 were asked for"):
        windows_of(["abc", "defg"], 4, 4, [1])


def test_a_long_text_is_cut_into_the_same_windows_as_when_tokenized_whole() -> None:
    """The real tokenizer sees only as much text as the windows need; that must not show."""
    tokenizer = default_tokenizer()
    articles = texts.load_texts("wiki").evaluation
    whole = tokenizer("\n\n".join(articles), add_special_tokens=False, verbose=False)["input_ids"]
    assert texts.token_windows(articles, tokenizer, 5, 512).flatten().tolist() == whole[: 5 * 512]


def test_text_with_long_tokens_is_read_to_its_end() -> None:
    """Where a token spans more characters than expected, the short cut falls back to the whole text."""

    class LineTokenizer:
        """One token a line."""

        bos_token_id = None

        def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
            return {"input_ids": [len(line) for line in text.split("\n")]}

    lines = "\n".join("x" * 1000 for _ in range(8))
    assert texts.token_windows([lines], LineTokenizer(), 4, 2).tolist() == [[1000, 1000]] * 4


@pytest.mark.parametrize(("count", "length"), [(0, 4), (1, 1)])
def test_empty_windows_are_refused(count: int, length: int) -> None:
    """Nothing is predicted in a window of one token."""
    with pytest.raises(ValueError, match="at least 1 window of 2 tokens"):
        windows_of(["abcdefgh"], count, length)


def test_a_text_that_is_too_short_says_how_many_windows_it_has() -> None:
    """9 characters are 2 windows of 4."""
    with pytest.raises(ValueError, match="has 2 windows of 4 tokens, but 3 were asked for"):
        windows_of(["abcdefghi"], 3, 4)


def test_a_text_file_is_split_at_blank_lines(tmp_path: Path) -> None:
    """A blank line may hold spaces."""
    path = tmp_path / "mine.txt"
    path.write_text("one\nstill one\n\ntwo\n  \nthree\n\n\n\nfour\n\nfive", "utf-8")
    loaded = texts.load_texts(str(path))
    assert loaded.calibration == ("one\nstill one", "five")
    assert loaded.evaluation == ("two", "three", "four")


ROWS = [{"id": index, "body": f"article {index}"} for index in range(6)]


def write_jsonl(path: Path) -> None:
    """`ROWS` as JSON lines."""
    path.write_text("\n".join(json.dumps(row) for row in ROWS), "utf-8")


def write_parquet(path: Path) -> None:
    """`ROWS` as Parquet."""
    import datasets

    datasets.Dataset.from_list(ROWS).to_parquet(str(path))


@pytest.mark.parametrize(("suffix", "write"), [(".jsonl", write_jsonl), (".parquet", write_parquet)])
def test_a_file_of_rows_holds_an_article_a_row(tmp_path: Path, suffix: str, write: Any) -> None:
    """And a missing column is named with those that are there."""
    path = tmp_path / f"mine{suffix}"
    write(path)
    loaded = texts.load_texts(str(path), column="body")
    assert loaded.calibration == ("article 0", "article 4")
    assert loaded.evaluation == ("article 1", "article 5", "article 2", "article 3")
    with pytest.raises(ValueError, match="no text column 'text'; its columns are id, body"):
        texts.load_texts(str(path))


def test_a_path_is_no_pattern(tmp_path: Path) -> None:
    folder = tmp_path / "run[1]"
    folder.mkdir()
    for name, text in (("b*c", "mine"), ("bXc", "another's")):
        (folder / f"{name}.jsonl").write_text(json.dumps({"text": text}), "utf-8")
    assert [row["text"] for row in texts._read_rows("json", folder / "b*c.jsonl")] == ["mine"]


@pytest.mark.parametrize("data", ["wikipedia", "mine.csv", ""])
def test_an_unknown_text_lists_what_is_accepted(data: str) -> None:
    """Names and file types."""
    with pytest.raises(ValueError, match=r"wiki, c4, technical, a \.txt file, .*a \.parquet file; got"):
        texts.load_texts(data)


@pytest.mark.parametrize(
    ("name", "content", "fact"),
    [
        ("mine.txt", b"Stra\xdfe", "must be UTF-8 text: "),
        ("mine.jsonl", b'{"text": "Stra\xdfe"}', "must hold rows as json has them: 'utf-8' codec"),
        ("mine.json", b"", "must hold rows as json has them: it is empty"),
        ("mine.jsonl", b'{"text": "a"}\n{"text": null}', "must have text in 'text', got None in row 2"),
        ("mine.jsonl", b'{"words": "a"}', "has no text column 'text'; its columns are words"),
        ("mine.parquet", b"PAR", "must hold rows as parquet has them: "),
    ],
)
def test_a_damaged_file_is_named(tmp_path: Path, name: str, content: bytes, fact: str) -> None:
    if name != "mine.txt":
        pytest.importorskip("datasets")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{re.escape(str(tmp_path / name))} {fact}"):
        texts.load_texts(str(tmp_path / name))


def test_a_missing_file_is_named() -> None:
    """Not reported as an unknown name."""
    with pytest.raises(FileNotFoundError, match=r"no file nowhere\.txt"):
        texts.load_texts("nowhere.txt")


def test_missing_packages_name_the_command_that_installs_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With --no-deps for the data package, whose dependencies nobody needs."""
    path = tmp_path / "mine.jsonl"
    write_jsonl(path)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install --no-deps exllamav2==0\.3\.2"):
        texts.load_texts("wiki")
    with pytest.raises(ModuleNotFoundError, match="pip install datasets"):
        texts.load_texts(str(path))
