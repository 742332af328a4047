"""A view in the browser that is told everything by messages, so that a saved notebook holds none of it."""

import math
from collections.abc import Sequence
from contextvars import copy_context
from pathlib import Path

import anywidget

from workbench.errors import WorkbenchError

HERE = Path(__file__).parent


def script(*names: str) -> str:
    """These files as one, in this order: a widget has no import paths of its own."""
    return "\n".join((HERE / name).read_text(encoding="utf-8") for name in names)


class View(anywidget.AnyWidget):
    """The kernel's half of a view. A subclass says what there is to see, and obeys what the reader does."""

    def __init__(self) -> None:
        self._context = copy_context()
        super().__init__()
        self.on_msg(self._hear)

    def _snapshot(self, view: str | None = None) -> None:
        """Tells one new `view` everything there is to see; None: all of them."""
        raise NotImplementedError

    def _obey(self, message: dict) -> None:
        """Does what the reader asked for. RequestError is shown to them."""
        raise NotImplementedError

    def _tell(self, message: dict, buffers: Sequence[bytes] = ()) -> None:
        # In the name of the cell that made the view: ipykernel 7.4 routes what a page says next to the subshell in
        # whose name it was last written to, and a page that is closed takes its subshells with it.
        self._context.copy().run(self.send, message, list(buffers))

    def _refuse(self, error: WorkbenchError) -> None:
        self._tell({"kind": "notice", "text": str(error)})

    def _hear(self, _widget: anywidget.AnyWidget, message: dict, _buffers: list) -> None:
        try:
            match message:
                case {"kind": "ready", "view": str(view)}:
                    self._snapshot(view)
                case {"kind": str()}:
                    self._obey(message)
        except WorkbenchError as error:
            self._refuse(error)

    def _page(self, text: str, html: str, png: bytes | None = None, **kwargs) -> dict:
        """The widget, and beside it what a saved notebook shows where widgets cannot run."""
        page = super()._repr_mimebundle_(**kwargs)
        page = dict(page[0] if isinstance(page, tuple) else page or {})
        page |= {"text/plain": text, "text/html": html}
        return page if png is None else page | {"image/png": png}


def short(value: float | None) -> float | None:
    """Four digits are more than the eye reads; JSON has no NaN."""
    return None if value is None or not math.isfinite(value) else float(f"{value:.4g}")
