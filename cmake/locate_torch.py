"""Print the directory and the version of the torch in this environment without importing it.

Under pip's build isolation torch cannot be imported, but sysconfig still names the site-packages of the
environment that the build is for. Prints ``<directory>;<version>``, or exits with status 1 and one sentence on stderr.
"""

from __future__ import annotations

import importlib.util
import re
import site
import sys
import sysconfig
from pathlib import Path

MISSING = (
    "velm_kernels is built against the torch of your environment, and there is none: install torch>=2.10 first "
    "(where it is installed and the installer hides it, pass --no-build-isolation)."
)


def candidates() -> list[Path]:
    # find_spec comes first: outside of build isolation it also knows about editable installs of torch.
    places: list[Path] = []
    spec = importlib.util.find_spec("torch")
    if spec is not None and spec.origin is not None:
        places.append(Path(spec.origin).parent)
    paths = sysconfig.get_paths()
    roots = [paths["purelib"], paths["platlib"]]
    if site.ENABLE_USER_SITE is not False:
        roots.append(site.getusersitepackages())
    if sys.prefix != sys.base_prefix and _system_site_packages():
        variables = {"base": sys.base_prefix, "platbase": sys.base_exec_prefix}
        roots += [sysconfig.get_path(name, vars=variables) for name in ("purelib", "platlib")]
    return places + [Path(root) / "torch" for root in roots]


def _system_site_packages() -> bool:
    config = Path(sys.prefix) / "pyvenv.cfg"
    if not config.is_file():
        return False
    return bool(re.search(r"^include-system-site-packages\s*=\s*true", config.read_text(), re.M | re.I))


def locate() -> tuple[Path, str] | None:
    """Return (directory, version) of torch, or None when there is no torch with its C++ headers."""
    for place in candidates():
        version_file = place / "version.py"
        if (place / "include" / "torch" / "csrc" / "stable").is_dir() and version_file.is_file():
            found = re.search(r"""__version__\s*=\s*['"]([^'"]+)""", version_file.read_text())
            if found:
                return place, found.group(1)
    return None


if __name__ == "__main__":
    result = locate()
    if result is None:
        sys.exit(MISSING)
    print(f"{result[0]};{result[1]}")
