"""Writes docs/patterns.md, from the patterns themselves.  ``python docs/patterns.py``."""

import ast
import inspect
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from fusednn.layers.fusion import activations, members, norms, patterns, search
from fusednn.layers.fusion.patterns import pooling
from fusednn.layers.fusion.patterns.pattern import Pattern

PAGE = Path(__file__).resolve().with_name("patterns.md")

HEAD = """# What is computed in one

A section for each pattern of `replace_layers(model, fuse=True)`, in the order in which they are tried, made of the
patterns' own code by `docs/patterns.py`: what is computed, in PyTorch's words, which layers it is made of, and the
reasons for which its layers are called one by one, as `fusednn.explain` and the report give them. [How layers are
found](fusing.md), [how a pattern is added](adding-a-pattern.md).
"""


def page() -> str:
    sections = [HEAD]
    for pattern in patterns.PATTERNS:
        module = inspect.getmodule(pattern.match)
        assert module is not None
        sections.append(
            "\n".join([f"## {_title(pattern, module)}", "", _formula(module), "", *_lists(pattern, module)])
        )
    modules = (members, activations, norms, pooling, search)
    shared = [reason for module in modules for reason in (*_reasons(module), *_ends(module))]
    sections.append("\n".join(["## All of them", "", "Layers also stay apart because:", "", *_listed(shared)]))
    return "\n\n".join(section.strip() for section in sections) + "\n"


def _title(pattern: Pattern, module: ModuleType) -> str:
    name = module.__name__.rpartition(".")[2]
    names = {key.lower() for key, value in vars(module).items() if value is pattern} - {"pattern"}
    return ", ".join([name, *sorted(names)]).replace("_", " ")


def _formula(module: ModuleType) -> str:
    return (module.__doc__ or "").strip().replace("``", "`")


def _lists(pattern: Pattern, module: ModuleType) -> Iterator[str]:
    yield f"- Begins with: {', or '.join(filter(None, (_names(pattern.first), 'a function' * pattern.anywhere)))}."
    if following := _names(pattern.following):
        yield f"- Goes on with: {following}."
    if reasons := list(dict.fromkeys(_reasons(module))):
        yield f"- Apart where: {'; '.join(reasons)}."
    if ends := list(dict.fromkeys(_ends(module))):
        yield f"- Ends before what would need more: {'; '.join(ends)}."


def _names(classes: tuple[type[nn.Module], ...]) -> str:
    """PyTorch's classes in their order, activations of the table as such; other libraries' join on import."""
    table = set(activations.ACTIVATIONS)
    own = (cls for cls in dict.fromkeys(classes) if cls.__module__.startswith("torch."))
    names = [f"`{cls.__name__}`" for cls in own if cls not in table]
    return ", ".join([*names, *["an activation"] * bool(table & set(classes))])


def _listed(reasons: list[str]) -> list[str]:
    *others, last = dict.fromkeys(reasons)
    return [*(f"- {reason};" for reason in others), f"- {last}."]


def _reasons(module: ModuleType) -> Iterator[str]:
    """The reasons that a module's code has: of functions that refuse, and where it tells why a chain ends."""
    for node in ast.walk(ast.parse(inspect.getsource(module))):
        if isinstance(node, ast.FunctionDef) and node.name.endswith(("_refusal", "_unfit")):
            yield from _strings([part.value for part in ast.walk(node) if isinstance(part, ast.Return | ast.Assign)])
        elif isinstance(node, ast.Assign) and isinstance(target := node.targets[0], ast.Subscript):
            if isinstance(target.value, ast.Attribute) and target.value.attr == "stops":
                yield from _strings([node.value])
        elif isinstance(node, ast.Call) and getattr(node.func, "id", getattr(node.func, "attr", "")) in (
            "apart",
            "_stop",
        ):
            yield from _strings(node.args)


def _ends(module: ModuleType) -> Iterator[str]:
    """What a module's code says of layers that a chain ends before: what would have to change."""
    for node in ast.walk(ast.parse(inspect.getsource(module))):
        if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "ends_before":
            yield from _strings(node.args)


def _strings(values: list[Any]) -> Iterator[str]:
    """Those that an expression may be."""
    for value in values:
        if isinstance(value, ast.Constant) and isinstance(value.value, str):
            yield value.value
        elif isinstance(value, ast.BoolOp):
            yield from _strings(value.values)
        elif isinstance(value, ast.Lambda):
            yield from _strings([value.body])
        elif isinstance(value, ast.IfExp):
            yield from _strings([value.body, value.orelse])


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
