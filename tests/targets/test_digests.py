"""The recorded digests: what makes them fail, what doesn't, and that they are of cases that there are."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
import test_offline_compile as mixed
import test_offline_folded as folded
from support import digests

if TYPE_CHECKING:
    from pathlib import Path

KERNEL = '''
@triton.jit
def kernel(x):
    """Of `{module}`."""
    from micromix_compile.{module} import g
    return g(x, {value})  # {comment}
'''
CODE = """
# kernel path: /tmp/{comment}/kernel.py
kernel_0 = async_compile.triton('kernel', '''{kernel}''', device_str='cuda')
meta = {{'backend_hash': '{comment}', 'rows': 3}}
"""


def code(module: str, value: int, comment: str) -> str:
    return CODE.format(kernel=KERNEL.format(module=module, value=value, comment=comment), comment=comment)


@pytest.fixture
def recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that holds one digest of each kind."""
    path = tmp_path / "digests.json"
    monkeypatch.setattr(digests, "PATH", path)
    monkeypatch.delenv("MICROMIX_RECORD_DIGESTS", raising=False)
    for kind in digests.KINDS:
        digests.record(kind, "a case", "0123")
    return path


@pytest.mark.parametrize("kind", digests.KINDS)
def test_a_digest_must_be_the_recorded_one(recorded: Path, kind: str) -> None:
    digests.assert_recorded(kind, "a case", "0123")
    with pytest.raises(AssertionError, match=rf"(?s)The {kind} of 'a case' .* recorded is 0123\. .*DIGESTS=1 pytest"):
        digests.assert_recorded(kind, "a case", "4567")
    with pytest.raises(AssertionError, match="recorded is 0123"):
        digests.assert_recorded(kind, "a case", "4567", may_lack=True)


def test_a_case_without_a_digest_fails_unless_it_may_lack_one(recorded: Path) -> None:
    with pytest.raises(AssertionError, match=r"(?s)No digest of the ptx of 'another' .*DIGESTS=1 pytest"):
        digests.assert_recorded("ptx", "another", "0123")
    digests.assert_recorded("ptx", "another", "0123", may_lack=True)


@pytest.mark.parametrize("name", ["torch", "triton"])
def test_other_versions_are_let_through_and_recorded_anew(
    recorded: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    others = digests.versions() | {name: "99"}
    monkeypatch.setattr(digests, "versions", lambda: others)
    digests.assert_recorded("ptx", "a case", "4567")
    digests.assert_recorded("ptx", "another", "4567")
    monkeypatch.setenv("MICROMIX_RECORD_DIGESTS", "1")
    digests.assert_recorded("ptx", "another", "4567")
    assert json.loads(recorded.read_text()) == {"versions": others, "code": {}, "ptx": {"another": "4567"}}


def test_a_digest_of_code_knows_values_but_not_where_the_source_stands() -> None:
    digest = digests.of_code(code("formats", 1, "a comment"))
    assert digest == digests.of_code(code("kernels.tables.formats", 1, "another"))
    assert digest != digests.of_code(code("formats", 2, "a comment"))
    assert digest != digests.of_code(code("other", 1, "a comment"))


def test_every_recorded_digest_of_ptx_is_of_a_case() -> None:
    cases = (*mixed.TABLE, *mixed.QUANTIZE, *mixed.OTHERS, *folded.PRODUCTS, *folded.ALL_FOLDS, *folded.EXPANSIONS)
    assert json.loads(digests.PATH.read_text())["ptx"].keys() <= {str(case) for case in cases}
