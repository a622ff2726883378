"""The Python standard library's own sources on the user's machine, as modules, functions and classes to ask about."""

import ast
import sysconfig
import textwrap
import tokenize
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath

from hbp_tune.demo import DemoError

# Tests, tables of data, and packages that not every installation has.
_SKIPPED_DIRS = frozenset({
    "__pycache__", "test", "tests", "idle_test", "idlelib", "lib2to3", "site-packages", "dist-packages", "lib-dynload",
    "distutils", "encodings", "ensurepip", "pydoc_data", "tkinter", "turtledemo",
})  # fmt: skip
_MIN_MODULE_CHARS = 300
# The few files above are mostly tables; they cost more time to parse than their samples are worth.
_MAX_MODULE_CHARS = 200_000


@dataclass(frozen=True, kw_only=True, slots=True)
class Function:
    """A documented function or method; ``code`` is dedented and has lost its docstring."""

    name: str
    signature: str
    docstring: str
    code: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Class:
    """A class with documented methods; ``code`` is whole."""

    name: str
    docstring: str
    code: str
    methods: tuple[Function, ...]


@dataclass(frozen=True, kw_only=True)
class Module:
    """One file of the standard library; ``code`` is whole, ``bare_code`` has lost the module docstring."""

    name: str
    code: str
    bare_code: str
    docstring: str
    functions: tuple[Function, ...]
    classes: tuple[Class, ...]

    @cached_property
    def documented(self) -> tuple[Function, ...]:
        """Functions and methods, in the order of the file."""
        return self.functions + tuple(method for cls in self.classes for method in cls.methods)


def read_modules(stdlib: Path | None = None) -> list[Module]:
    """Parse the standard library's modules, sorted by name.

    Args:
        stdlib: its folder; by default that of the running Python.

    Raises:
        DemoError: the folder holds no readable modules, as in zipped or stripped installations.
    """
    root = Path(sysconfig.get_path("stdlib")) if stdlib is None else stdlib
    modules = [module for path in _module_paths(root) if (module := _read_module(root, path)) is not None]
    if not modules:
        raise DemoError(
            f"stdlib={str(root)!r} holds 0 modules that parse, the demo needs their .py sources; "
            "run it with a Python installed with sources"
        )
    return modules


def _module_paths(root: Path) -> list[PurePosixPath]:
    relative = (PurePosixPath(path.relative_to(root).as_posix()) for path in root.rglob("*.py"))
    # Files named _sysconfigdata... hold the paths of the machine that Python was built on.
    return sorted(
        path
        for path in relative
        if _SKIPPED_DIRS.isdisjoint(path.parts) and not path.name.startswith("_sysconfigdata") and "config-" not in path.parts[0]
    )


def _read_module(root: Path, relative: PurePosixPath) -> Module | None:
    try:
        with tokenize.open(root / relative) as file:
            code = file.read().strip()
        if not _MIN_MODULE_CHARS <= len(code) <= _MAX_MODULE_CHARS:
            return None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in old modules
            tree = ast.parse(code)
    except (OSError, SyntaxError, ValueError):
        return None
    lines = code.split("\n")
    parts = relative.with_suffix("").parts
    name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
    classes = (_read_class(node, lines, name) for node in tree.body if isinstance(node, ast.ClassDef))
    return Module(
        name=name,
        code=code,
        bare_code="\n".join(_without_docstring(tree, lines, 1, len(lines))).strip(),
        docstring=_docstring(tree),
        functions=tuple(_read_functions(tree, lines, name)),
        classes=tuple(cls for cls in classes if cls is not None),
    )


def _docstring(node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    """The clean docstring; none if its escapes make what UTF-8 cannot hold (a lone surrogate)."""
    docstring = (ast.get_docstring(node) or "").strip()
    return docstring if docstring == docstring.encode(errors="ignore").decode() else ""


def _read_functions(parent: ast.Module | ast.ClassDef, lines: list[str], prefix: str) -> Iterator[Function]:
    for node in parent.body:
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        docstring = _docstring(node)
        first = node.body[0]
        # A docstring on the line of its `def` cannot be cut out by lines.
        if not docstring or first.lineno == node.lineno:
            continue
        start = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
        code = _without_docstring(node, lines, start, node.end_lineno or node.lineno)
        signature = lines[node.lineno - 1 : max(node.lineno, first.lineno - 1)]
        yield Function(
            name=f"{prefix}.{node.name}",
            signature=textwrap.dedent("\n".join(signature)).strip(),
            docstring=docstring,
            code=textwrap.dedent("\n".join(code)).strip(),
        )


def _read_class(node: ast.ClassDef, lines: list[str], prefix: str) -> Class | None:
    methods = tuple(_read_functions(node, lines, f"{prefix}.{node.name}"))
    if not methods:
        return None
    code = "\n".join(lines[node.lineno - 1 : node.end_lineno])
    return Class(name=f"{prefix}.{node.name}", docstring=_docstring(node), code=code, methods=methods)


def _without_docstring(
    node: ast.Module | ast.FunctionDef | ast.AsyncFunctionDef, lines: list[str], start: int, end: int
) -> list[str]:
    """Lines ``start`` to ``end``, counted from 1, less the node's docstring."""
    if ast.get_docstring(node, clean=False) is None:
        return lines[start - 1 : end]
    doc = node.body[0]
    last = doc.end_lineno or doc.lineno
    filler = [] if len(node.body) > 1 or isinstance(node, ast.Module) else [" " * doc.col_offset + "..."]
    return lines[start - 1 : doc.lineno - 1] + filler + lines[last:end]
