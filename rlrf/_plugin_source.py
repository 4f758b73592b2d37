"""What a plug-in's module says of it, read as source: what is found so imports nothing."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import re
import warnings
from pathlib import Path
from typing import Any

from rlrf.plugins import EXTRAS, import_failure


def describe_target(target: Any, of: str = "") -> tuple[str, str]:
    """The first line of a target's documentation, and the extra it lacks (or "").

    A ``"pkg.mod:Name"`` is read as source, not imported: listing must not need torch, nor wait
    for it. Where that fails the line says why, and of which distribution it is.
    """
    of = f", of {of}" if of else ""
    if not isinstance(target, str):
        return plain(inspect.getdoc(target) or "").partition("\n")[0], ""
    module, attr = _parts(target)
    try:
        tree = _tree(module)
    except Exception as error:  # whatever a file can hold
        return f"(not importable: {import_failure(error)}{of})", ""
    if tree is None:
        return f"(not importable: there is no module {module!r}{of})", ""
    attr = attr.partition(".")[0]
    bound = _bound(tree) if attr and tree.body else None
    if bound is not None and attr not in bound:
        return f"(not importable: the module {module!r} has no {attr!r}{of})", ""
    doc = ast.get_docstring(tree) or ""
    missing = ""
    for node in tree.body:
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and node.name == attr:
            doc = ast.get_docstring(node) or doc
        for name in _imported(node):
            package = name.partition(".")[0]
            if package in EXTRAS and importlib.util.find_spec(package) is None:
                missing = EXTRAS[package]
    return plain(doc).partition("\n")[0], missing


def read_signature(target: Any) -> inspect.Signature | None:
    """How a target may be called; None where that is not known without importing it.

    Of a ``"pkg.mod:Name"`` defaults and annotations are left out.
    """
    if not isinstance(target, str):
        try:
            return inspect.signature(target)
        except (TypeError, ValueError):
            return None
    module, attr = _parts(target)
    try:
        tree = _tree(module)
    except Exception:  # who imports it says so
        return None
    found: Any = _named(tree.body, attr) if tree is not None else None
    if isinstance(found, ast.ClassDef):
        found = None if found.decorator_list else _named(found.body, "__init__")
    if not isinstance(found, (ast.FunctionDef, ast.AsyncFunctionDef)) or found.decorator_list:
        return None
    given, nothing = found.args, ast.Constant(None)
    for node in ast.walk(given):
        if isinstance(node, ast.arg):
            node.annotation = None
    given.defaults = [nothing for _ in given.defaults]
    given.kw_defaults = [default and nothing for default in given.kw_defaults]
    alike = ast.fix_missing_locations(ast.Expression(ast.Lambda(given, nothing)))
    signature = inspect.signature(eval(compile(alike, module, "eval")))  # nothing of theirs in it
    if found.name == "__init__":
        signature = signature.replace(parameters=[*signature.parameters.values()][1:])
    return signature


def _named(body: list[ast.stmt], name: str) -> ast.stmt | None:
    """The one definition of a name in a body; None if there are several, or none."""
    found = [node for node in body if getattr(node, "name", None) == name]
    return found[0] if len(found) == 1 else None


def _parts(target: str) -> tuple[str, str]:
    """Module and attribute of ``"pkg.mod:Name [extra]"``."""
    module, _, attr = target.partition("[")[0].replace(" ", "").partition(":")
    return module, attr


def _tree(module: str) -> ast.Module | None:
    """A module's source, parsed; empty for one that is compiled, None if there is none."""
    source = _module_source(module)
    if source is None:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # for its author
        return ast.parse(source, module)


def _bound(tree: ast.Module) -> set[str] | None:
    """The names that a module's source gives it; None where reading it cannot tell."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and node.id in ("globals", "vars", "exec", "setattr"):
            return None
        if isinstance(node, ast.Global):
            names.update(node.names)
    inside: list[ast.AST] = [*tree.body]
    while inside:
        node = inside.pop()
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names.update(a.asname or a.name.partition(".")[0] for a in node.names)
            if isinstance(node, ast.ImportFrom) and node.level:  # a submodule is its package's
                names.add((node.module or "").partition(".")[0])
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            names.add(node.name)
        else:
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                names.add(node.id)
            inside.extend(ast.iter_child_nodes(node))
    return None if names & {"*", "__getattr__"} else names


def plain(doc: str) -> str:
    """A docstring without its markup: ``code`` and :role:`references` as bare words."""
    return re.sub(r"(?::[\w:]+:)?(`{1,2})~?([^`]+)\1", r"\2", doc)


def _imported(node: ast.stmt) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom) and not node.level:
        return [node.module or ""]
    return []


def _module_source(module: str) -> bytes | None:
    """The source of a module, found without importing its parent packages.

    None if there is no such module, nothing for one that is compiled.
    """
    top, *rest = module.split(".")
    try:
        spec = importlib.util.find_spec(top)
    except (ImportError, ValueError):
        return None
    if spec is None:
        return None
    if not rest:
        origin = spec.origin or ""
        return Path(origin).read_bytes() if origin.endswith(".py") else b""
    for place in spec.submodule_search_locations or ():
        found = Path(place).joinpath(*rest)
        for source in (found.with_suffix(".py"), found / "__init__.py"):
            if source.is_file():
                return source.read_bytes()
        if any(found.parent.glob(f"{found.name}.*")):
            return b""
    return None
