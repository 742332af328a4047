"""Talk to a DeepSeek-V2 model and see inside it while it talks. Importing this package loads nothing heavy.

import workbench as wb
bench = wb.load("pocket")
wb.chat(bench)
"""

import sys
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType

_HOME = {
    "Ablate": "workbench.edits:Ablate",
    "Add": "workbench.edits:Add",
    "Bias": "workbench.edits:Bias",
    "BudgetError": "workbench.errors:BudgetError",
    "CheckpointError": "workbench.errors:CheckpointError",
    "Config": "workbench.config:Config",
    "Editing": "workbench.editing:Editing",
    "Force": "workbench.edits:Force",
    "Hook": "workbench.hook:Hook",
    "LatentCache": "workbench.cache:LatentCache",
    "Probe": "workbench.probe:Probe",
    "Recorder": "workbench.recorder:Recorder",
    "ReplayRouting": "workbench.edits:ReplayRouting",
    "RequestError": "workbench.errors:RequestError",
    "Sampling": "workbench.sampling:Sampling",
    "Scale": "workbench.edits:Scale",
    "TopK": "workbench.edits:TopK",
    "Trace": "workbench.trace:Trace",
    "Workbench": "workbench.workbench:Workbench",
    "WorkbenchError": "workbench.errors:WorkbenchError",
    "chat": "workbench.widgets.chat:chat",
    "diff": "workbench.lens.difference:diff",
    "load": "workbench.workbench:load",
    "replay": "workbench.widgets.replay:replay",
}

__all__ = list(_HOME)

try:
    __version__ = version("deepseek-workbench")
except PackageNotFoundError:  # imported from a checkout that was never installed
    __version__ = "0+source"


def _resolve(name: str):
    module, _, attribute = _HOME[name].partition(":")
    return getattr(import_module(module), attribute)


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module 'workbench' has no attribute {name!r}")
    return _resolve(name)


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])


class _Package(ModuleType):
    """Keeps `workbench.chat` the panel: importing the module of that name would set the attribute to the module."""

    chat = property(lambda self: _resolve("chat"), lambda self, module: None)


sys.modules[__name__].__class__ = _Package
