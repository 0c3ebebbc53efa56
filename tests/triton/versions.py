"""Whether every version of Triton that is supported compiles every instance of the kernels, without spills.

    python -m tests.triton.versions                                  all versions
    python -m tests.triton.versions --versions 3.6 3.8 --arch 90     some; the rest as tests.triton.resources has it

Versions are installed by pip beside the environment's own, each into a folder of its own under `build/triton`, where
compiled kernels are kept too: a second run compiles only what has changed.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
# What comes with torch 2.10 to 2.14, and the newest one. pyproject.toml names the same.
SUPPORTED = ("3.6", "3.7", "3.8", "3.9")


def installed(version: str) -> Path:
    """The folder with a version of Triton."""
    folder = ROOT / "build" / "triton" / version
    if not (folder / "triton").is_dir():
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
        subprocess.run([*pip, "--target", folder, f"triton=={version}.*"], check=True)
    return folder


def compiles(version: str, arguments: list[str]) -> bool:
    """Whether this version compiles all instances; says what is wrong with the others."""
    folder = installed(version)
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, (str(folder), str(ROOT), os.environ.get("PYTHONPATH")))),
        "TRITON_CACHE_DIR": str(folder / "cache"),
    }
    command = [sys.executable, "-m", "tests.triton.resources", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment).returncode == 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--versions", nargs="*", default=SUPPORTED)
    chosen, arguments = parser.parse_known_args()
    failed = [version for version in chosen.versions if not compiles(version, arguments)]
    if failed:
        print(f"Triton {', '.join(failed)}: see above")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
