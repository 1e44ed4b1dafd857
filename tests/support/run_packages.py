"""Run what was exported, in a process that imports only the operations before it loads the files.

    python -m support.run_packages JOBS    JOBS: a file of {"kind", "file", "inputs", "arguments"}, of torch.save

prints as its last line which of our modules were imported before the files were loaded; outputs are saved in JOBS.out.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

import micromix_compile.ops.exact  # noqa: F401 - registers the operations

IMPORTED = sorted({name.split(".")[1] for name in sys.modules if name.startswith("micromix_compile.")})


def run(kind: str, file: str, inputs: tuple[Any, ...], model: torch.nn.Module | None = None) -> Any:
    """What a file computes of the inputs. model: holds the weights for a function that has none of its own."""
    if kind == "exported":
        return torch.export.load(file).module()(*inputs)
    if kind == "package":
        return torch._inductor.aoti_load_package(file)(*inputs)
    with Path(file).open("rb") as opened:
        return torch.compiler.load_compiled_function(opened)(model, *inputs)


def main(path: str) -> None:
    with torch.no_grad():
        outputs = [run(**job) for job in torch.load(path, weights_only=False)]
    torch.save(outputs, f"{path}.out")
    sys.stdout.write("\n" + json.dumps([IMPORTED, "transformers" in sys.modules]))


if __name__ == "__main__":
    main(sys.argv[1])
