"""Inductor's cache key must change with any of our sources: it does not see lowerings, templates or kernels itself."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from support.models import make_net

import micromix_compile
import micromix_compile as micromix
from micromix_compile.config import MicroMixConfig
from micromix_compile.lowering import inductor
from micromix_compile.lowering.inductor import SOURCE_SUFFIXES, PostGradPasses, fingerprint, source_files

PACKAGE = Path(micromix_compile.__file__).parent
REPOSITORY = Path(__file__).parents[2]


def test_every_source_file_counts() -> None:
    counted = {path.resolve() for path in source_files(PACKAGE)}
    folders = [REPOSITORY / name for name in ("micromix_compile", "passes", "lowering", "templates")]
    sources = {path.resolve() for folder in folders for path in folder.rglob("*") if path.suffix in SOURCE_SUFFIXES}
    assert sources == counted
    rooms = {path.relative_to(REPOSITORY).parts[0] for path in counted}
    assert rooms == {"micromix_compile", "passes", "lowering", "templates"}
    assert {path.suffix for path in counted} == {".py", ".cpp", ".h", ".jinja"}


@pytest.mark.parametrize(
    "name",
    [
        "config.py",
        "numerics/reference.py",
        "passes/post_grad/fuse_rms_norm.py",
        "lowering/inductor.py",
        "templates/triton/*.py.jinja",
        "templates/cpu/*.cpp",
    ],
)
def test_a_changed_source_changes_the_key(tmp_path: Path, name: str) -> None:
    shutil.copytree(PACKAGE, tmp_path / "package", ignore=shutil.ignore_patterns("__pycache__"))
    before = fingerprint(tmp_path / "package")
    changed = next((tmp_path / "package").glob(name))
    changed.write_text(changed.read_text() + "\n")
    fingerprint.cache_clear()
    assert fingerprint(tmp_path / "package") != before


def test_a_renamed_source_changes_the_key(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("x = 1\n")
    before = fingerprint(tmp_path)
    (tmp_path / "a.py").rename(tmp_path / "b.py")
    fingerprint.cache_clear()
    assert fingerprint(tmp_path) != before


def test_the_key_holds_sources_and_settings() -> None:
    plain, other = (PostGradPasses((), MicroMixConfig(fp6=fp6).to_dict()).uuid() for fp6 in ("e2m3", "e3m2"))
    assert fingerprint(PACKAGE) in plain
    assert plain != other


def test_code_cached_under_other_sources_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net = make_net(layers=1)
    recipe = micromix.calibrate(net, [torch.randn(2, 5, 64)])
    x = torch.randn(2, 5, 64)
    hits: list[int] = []
    with torch._inductor.config.patch(fx_graph_cache=True), torch._functorch.config.patch(enable_autograd_cache=False):
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
        for digest in ("one", "one", "two"):
            monkeypatch.setattr(inductor, "fingerprint", lambda _, digest=digest: digest)
            torch._dynamo.reset()
            torch._dynamo.utils.counters.clear()
            with torch.no_grad():
                torch.compile(net, backend="micromix", options={"recipe": recipe})(x)
            hits.append(torch._dynamo.utils.counters["inductor"]["fxgraph_cache_hit"])
    assert hits == [0, 1, 0]
