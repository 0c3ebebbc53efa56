"""How Sphinx builds these pages (``make docs``), and where the pages of the reference come from.

The reference has a page for each public function and one for the modules of each family. They are written when the
build begins, from ``velm_kernels.__all__`` and the docstrings, so a public name has its page without being listed here.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from torch import nn

import velm_kernels
from velm_kernels import integrations, processors

project = "velm_kernels"
author = "The velm_kernels authors"
version = release = velm_kernels.__version__

extensions = ["sphinx.ext.autodoc", "sphinx.ext.napoleon", "myst_parser"]
html_theme = "furo"
html_title = f"velm_kernels {version}"
exclude_patterns = ["generated/processors.md"]
default_role = "code"
myst_heading_anchors = 3

napoleon_numpy_docstring = False
napoleon_custom_sections = ["Shape"]
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
python_use_unqualified_type_names = True
add_module_names = False

# Every reference to a name of this package has to lead somewhere; types of torch and of Python have no pages here.
nitpicky = True
nitpick_ignore_regex = [("py:(class|func|meth|obj|attr)", r"(?!velm_kernels).*"), ("py:(exc|mod|data)", ".*")]

GENERATED = HERE / "generated"
TITLES = {
    "attention": "Attention",
    "linear": "Projections",
    "fusion": "Fusion",
    "pooling": "Pooling and fewer tokens",
    "losses": "Losses",
    "retrieval": "Retrieval",
    "sequence": "The sequence of tokens",
    "backends": "Choosing a backend",
    "integrations": "Models",
}


def family(value: Any) -> str:
    """The package of a public object below velm_kernels."""
    return value.__module__.split(".")[1]


def is_module(value: Any) -> bool:
    return inspect.isclass(value) and issubclass(value, nn.Module)


def first_sentence(value: Any) -> str:
    text = " ".join((inspect.getdoc(value) or "").split("\n\n")[0].split())
    return re.split(r"(?<=\.)\s+(?=[A-Z`:])", text)[0].removesuffix(":")


def returned_by(function: Callable[..., Any], classes: Iterable[type]) -> list[type]:
    """The result types among ``classes`` that ``function`` is annotated to return: they are told on its page."""
    annotation = str(inspect.signature(function).return_annotation)
    return [value for value in classes if re.search(rf"\b{value.__name__}\b", annotation)]


def page(title: str, *parts: str) -> str:
    return "\n\n".join([f"{title}\n{'=' * len(title)}", ".. py:currentmodule:: velm_kernels", *parts]) + "\n"


def bullet(role: str, name: str, value: Any) -> str:
    return f"* :py:{role}:`{name} <velm_kernels.{name}>`: {first_sentence(value)}"


def reference() -> dict[str, str]:
    """File name -> text of every page of the reference."""
    public = {name: getattr(velm_kernels, name) for name in velm_kernels.__all__ if not name.startswith("__")}
    functions = {name: value for name, value in public.items() if not inspect.isclass(value)}
    others = {name: value for name, value in public.items() if inspect.isclass(value) and not is_module(value)}
    results = [value for value in others.values() if hasattr(value, "_fields")]
    pages, index = {}, []
    for package in dict.fromkeys([*TITLES, *map(family, public.values())]):
        title, names = TITLES.get(package, package.capitalize()), []
        for name, function in functions.items():
            if family(function) == package:
                names.append(name)
                told = [f".. autofunction:: velm_kernels.{name}"]
                told += [f".. autoclass:: velm_kernels.{one.__name__}" for one in returned_by(function, results)]
                pages[name] = page(name, *told)
        listed = [bullet("func", name, public[name]) for name in names]
        objects = {name: one for name, one in others.items() if one not in results and family(one) == package}
        returned: list[type] = []
        for name, one in objects.items():
            names.append(name)
            methods = [method for method in vars(one).values() if inspect.isfunction(method)]
            told = dict.fromkeys(result for method in methods for result in returned_by(method, results))
            # What several return is told where it stands first.
            first = [result for result in told if result not in returned]
            returned += first
            pages[name] = page(
                name,
                f".. autoclass:: velm_kernels.{name}\n   :members:",
                *(f".. autoclass:: velm_kernels.{result.__name__}" for result in first),
            )
        listed += [bullet("class", name, one) for name, one in objects.items()]
        modules = [name for name, value in public.items() if is_module(value) and family(value) == package]
        if modules:
            names.append(f"{package}_modules")
            told = [f".. autoclass:: velm_kernels.{name}\n   :members:" for name in modules]
            pages[f"{package}_modules"] = page(f"{title}: modules", *told)
            listed += [bullet("class", name, public[name]) for name in modules]
        if names:
            tree = ".. toctree::\n   :hidden:\n\n" + "\n".join(f"   {name}" for name in names)
            index.append(f"{title}\n{'-' * len(title)}\n\n" + "\n".join(listed) + f"\n\n{tree}")
    told_elsewhere = set(public)
    rest = [name for name in integrations.__all__ if name not in told_elsewhere]
    pages["integrations"] = page(
        "What patch returns, and transformers",
        *(
            f".. auto{'class' if inspect.isclass(getattr(integrations, name)) else 'function'}:: "
            f"velm_kernels.integrations.{name}\n"
            + ("   :members:" if inspect.isclass(getattr(integrations, name)) else "")
            for name in rest
        ),
        ".. autofunction:: velm_kernels.integrations.transformers.register",
    )
    index.append(".. toctree::\n   :hidden:\n\n   integrations")
    pages["index"] = page("Reference", *index)
    return pages


def processor_table() -> str:
    """What ``velm_kernels/processors.py`` says of each kind of processor, as a list."""
    return "\n\n".join(f"**{line.name}**\n: {line.measured}" for line in processors.TABLE) + "\n"


def write_if_changed(path: Path, text: str) -> None:
    """Sphinx reads a file again when it is newer."""
    if not path.exists() or path.read_text() != text:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def generate() -> None:
    pages = reference()
    folder = GENERATED / "reference"
    for path in folder.glob("*.rst"):
        if path.stem not in pages:
            path.unlink()
    for name, text in pages.items():
        write_if_changed(folder / f"{name}.rst", text)
    write_if_changed(GENERATED / "processors.md", processor_table())


def setup(app: Any) -> None:
    generate()
    del app
