"""Files and directories that are replaced whole or not at all."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from micromix_compile import files

if TYPE_CHECKING:
    from pathlib import Path


def test_replacing_a_directory_restores_the_old_one_if_the_rename_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The moment between the two renames."""
    target = tmp_path / "target"
    target.mkdir()
    (target / "old").touch()
    rename = type(target).rename

    def fail_for_new(self: Path, to: Path) -> Path:
        if self.name == "new":
            raise OSError("no")
        return rename(self, to)

    monkeypatch.setattr(type(target), "rename", fail_for_new)
    with pytest.raises(OSError, match="no"), files.replace_directory(target) as directory:
        (directory / "new").touch()
    assert [path.name for path in target.iterdir()] == ["old"]


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
