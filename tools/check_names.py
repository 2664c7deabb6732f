"""Check that a public name has one meaning: no two modules of `vidgen_ray` define the same one at their top level.

A name that only its module uses starts with `_`.
"""

import ast
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

OWN_OF_EACH_MODULE = {"log", "router"}
"""Names that each module defines for itself, as `logging` and FastAPI suggest."""


def defined_names(module: ast.Module) -> Iterator[str]:
    """Yield the names that a module defines at its top level."""
    for node in module.body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield node.name
        for target in [*getattr(node, "targets", ()), getattr(node, "target", None)]:
            # Also several names that are assigned at once.
            yield from (
                found.id
                for found in ast.walk(target or ast.Pass())
                if isinstance(found, ast.Name) and isinstance(found.ctx, ast.Store)
            )


def names_with_several_meanings(package: Path) -> dict[str, set[str]]:
    """Return the public names that several modules define, with the paths of the modules."""
    found: dict[str, set[str]] = defaultdict(set)
    for path in sorted(package.rglob("*.py")):
        for name in defined_names(ast.parse(path.read_text())):
            if not name.startswith("_") and name not in OWN_OF_EACH_MODULE:
                found[name].add(str(path))
    return {name: paths for name, paths in sorted(found.items()) if len(paths) > 1}


if __name__ == "__main__":
    found = [f"{name}: {', '.join(sorted(paths))}" for name, paths in names_with_several_meanings(Path("vidgen_ray")).items()]
    sys.exit("\n".join([*found, "Rename them, or let the names that only their module uses start with _."]) if found else 0)
