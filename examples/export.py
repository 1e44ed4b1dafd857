"""Write a packed model as a file of torch.export, and run it in another process that has only the operations.

python examples/export.py [--model DIRECTORY]
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn

import micromix_compile as micromix
from micromix_compile.evaluation import texts, zoo

RUN = """
import sys, torch
import micromix_compile.ops.exact  # registers the operations
inputs = torch.load(sys.argv[2])
torch.save(torch.export.load(sys.argv[1]).module()(inputs), sys.argv[3])
"""


class Logits(nn.Module):
    """A model as a function of tensors, which is what can be exported."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        """(B, T) int64 -> (B, T, V)."""
        logits: Tensor = self.model(input_ids=input_ids, use_cache=False).logits
        return logits


def main() -> None:
    """A line that says whether the file computes what the model does."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=zoo.DEFAULT_MODEL)
    parser.add_argument("--length", type=int, default=64, help="tokens of a window")
    arguments = parser.parse_args()
    model, tokenizer = zoo.load_model(arguments.model, torch.float32)
    windows = texts.token_windows(texts.load_texts().calibration, tokenizer, 4, arguments.length)
    micromix.quantize_(model, micromix.calibrate(model, windows.split(1)))
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        package, inputs, outputs = (Path(folder) / name for name in ("model.pt2", "inputs.pt", "outputs.pt"))
        torch.export.save(torch.export.export(Logits(model), (windows[:1],)), package)
        torch.save(windows[:1], inputs)
        subprocess.run([sys.executable, "-c", RUN, package, inputs, outputs], check=True)
        difference = (torch.load(outputs) - Logits(model)(windows[:1])).abs().max().item()
        print(f"{package.stat().st_size / 2**20:.1f} MiB, largest difference {difference:.2e}")


if __name__ == "__main__":
    main()
