"""The model as it would be if nobody had thought of probes: its own source, with every mention of a probe taken out.

What "off" costs can only be told against code without probes. A second model kept by hand would drift from the first,
a branch for "no probe" would itself be the cost in question, and another implementation differs in more than probes.
So the baseline is made from workbench/model.py when it is needed, on its syntax tree: `probe(site, x)` becomes x,
the beginning and end of a pass go, and of `if probe.opens(...)` what happens where nothing is opened
remains. One trace of probes is left in it: the router finds the best expert that was not chosen in the same operation
as the chosen.
"""

import ast
from pathlib import Path
from types import ModuleType

from torch import nn

from workbench import model as source
from workbench.model import Model

PROBE = "probe"  # what model.py calls one, everywhere


def without_probes(tree: ast.Module) -> ast.Module:
    """The module without probes, also as arguments. AssertionError if it mentions them in a way not known here."""
    bare = ast.fix_missing_locations(_Without().visit(tree))
    left = [node for node in ast.walk(bare) if getattr(node, "id", getattr(node, "arg", None)) in (PROBE, "see")]
    assert not left, f"model.py:{left[0].lineno}: still a probe; teach workbench/benchmarks/bare.py this use"
    return bare


def copy_of(model: Model, probes: bool) -> nn.Module:
    """The same weights, in memory too, under code of its own: compiled anew, with probes or without.

    Anew, because CPython adapts code to the types it meets: variants that shared it would disturb each other, as they
    do not where only one of them is in use.
    """
    path = Path(source.__file__)
    tree = ast.parse(path.read_text(encoding="utf-8"))
    module = ModuleType(source.__name__)
    exec(compile(tree if probes else without_probes(tree), str(path), "exec"), vars(module))
    copy = _under(module, model)
    copy.fuse = False  # what is compared goes operation by operation
    return copy


def _under(module: ModuleType, part: nn.Module) -> nn.Module:
    kind = getattr(module, type(part).__name__, type(part))
    other = kind.__new__(kind)
    vars(other).update(vars(part))
    vars(other)["_modules"] = {name: _under(module, child) for name, child in part.named_children()}
    return other


class _Without(ast.NodeTransformer):
    def visit_Call(self, call: ast.Call) -> ast.expr:
        self.generic_visit(call)
        if _is_probe(call.func) or _is_see(call.func) or _method(call) == "routed":  # (site, x), or (ids, gates, ...)
            return call.args[1]
        call.args = [each for each in call.args if not _is_probe(each)]
        call.keywords = [each for each in call.keywords if each.arg != PROBE]
        return call

    def visit_If(self, choice: ast.If) -> ast.stmt | list[ast.stmt]:
        if _method(choice.test) == "opens":
            return [kept for each in choice.orelse for kept in _statements(self.visit(each))]
        return self.generic_visit(choice)

    def visit_Expr(self, line: ast.Expr) -> ast.stmt | None:
        return None if _method(line.value) else self.generic_visit(line)

    def visit_Assign(self, line: ast.Assign) -> ast.stmt | None:
        target = line.targets[0]
        if _method(line.value) or _is_see(target):  # probe = probe.at(...); see = probe.see
            return None
        self.generic_visit(line)
        value = line.value
        to_itself = isinstance(target, ast.Name) and isinstance(value, ast.Name) and target.id == value.id
        return None if to_itself else line

    def visit_arguments(self, given: ast.arguments) -> ast.arguments:
        first = len(given.args) - len(given.defaults)
        given.defaults = [d for n, d in enumerate(given.defaults) if given.args[first + n].arg != PROBE]
        given.args = [each for each in given.args if each.arg != PROBE]
        return self.generic_visit(given)


def _is_probe(node: ast.AST) -> bool:
    return isinstance(node, ast.Name) and node.id == PROBE


def _is_see(node: ast.AST) -> bool:
    """What a layer calls a probe by, see Probe.see."""
    return isinstance(node, ast.Name) and node.id == "see"


def _method(node: ast.AST) -> str | None:
    """The method of the probe that this expression calls, if it does."""
    calls = isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and _is_probe(node.func.value)
    return node.func.attr if calls else None


def _statements(visited: ast.stmt | list[ast.stmt] | None) -> list[ast.stmt]:
    return visited if isinstance(visited, list) else [visited] if visited else []
