"""What the scripts that `compile_cpu.py` runs in processes of their own have in common: arguments, and own caches."""

from __future__ import annotations

import argparse
import os
from pathlib import Path


def parse(description: str | None) -> argparse.Namespace:
    """The arguments. Compilers keep what they make in the given folder, if this comes before they are imported."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0] if description else None)
    for name in ("model", "dtype", "peer"):
        parser.add_argument(name)
    parser.add_argument("caches", type=Path)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--layers", type=int)
    parser.add_argument("--tokens", type=int, help="length of the prompt")
    options = parser.parse_args()
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(options.caches / "inductor")
    os.environ["LLMOPT_CACHE_DIR"] = str(options.caches / "llmopt")
    return options
