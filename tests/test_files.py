"""Files and directories that are replaced whole or not at all."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import pytest

from micromix_compile import files

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
@pytest.mark.parametrize(
    ("number", "is_done", "kept", "beside"),
    [
        *((1, False, "old", []), (1, True, "old", [])),  # the old one out of the way
        *((2, False, "old", []), (2, True, "new", [])),  # the new one into its place
        *((3, False, "new", ["old"]), (3, True, "new", [])),  # the old one to what is removed
    ],
)
def test_whatever_stops_the_replacing_of_a_directory_leaves_one_of_the_two(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: type[BaseException],
    number: int,
    is_done: bool,
    kept: str,
    beside: list[str],
) -> None:
    """In each of its renames, just before and just after it is done."""
    target = tmp_path / "target"
    target.mkdir()
    (target / "old").touch()
    rename, calls = type(target).rename, itertools.count(1)

    def stop(self: Path, to: Path) -> Path:
        is_last = next(calls) == number
        if is_last and not is_done:
            raise error("no")
        moved = rename(self, to)
        if is_last:
            raise error("no")
        return moved

    monkeypatch.setattr(type(target), "rename", stop)
    with pytest.raises(error, match="no"), files.replace_directory(target) as directory:
        (directory / "new").touch()
    assert [path.name for path in target.iterdir()] == [kept]
    assert [path.name for other in tmp_path.iterdir() if other != target for path in other.iterdir()] == beside


@pytest.mark.parametrize(
    "path", ["some/../some", "./some", "../{root}/some", "link/../some", "missing/../some", "nowhere"]
)
def test_a_directory_is_replaced_however_its_path_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    """The old one is gone, and nothing else is left beside the new one."""
    root = tmp_path / "root"
    (root / "some" / "inner").mkdir(parents=True)
    (root / "some" / "old").touch()
    (root / "link").symlink_to("some/inner/..")
    (root / "nowhere").symlink_to("missing")
    monkeypatch.chdir(root)
    with files.replace_directory(type(root)(path.format(root=root.name))) as directory:
        (directory / "new").touch()
    assert {entry.name for entry in root.iterdir()} == {"some", "link", "nowhere"}
    assert [entry.name for entry in (root / path.rpartition("/")[2]).iterdir()] == ["new"]


def test_a_parent_directory_behind_a_link_is_the_one_that_the_system_finds(tmp_path: Path) -> None:
    """`link/..` is the parent of what the link names; a link in the last place stays one."""
    (tmp_path / "far" / "inner").mkdir(parents=True)
    (tmp_path / "link").symlink_to("far/inner")
    assert files.plain_path(tmp_path / "link" / ".." / "x") == tmp_path.resolve() / "far" / "x"
    assert files.plain_path(tmp_path / "link" / "..") == tmp_path.resolve() / "far"
    assert files.plain_path(tmp_path / "link") == tmp_path.resolve() / "link"
