"""A live view: what is looked at is shared with other views, and what happens meanwhile is sent as it comes."""

import re
import threading
from collections.abc import Iterable

import traitlets

from workbench.errors import RequestError
from workbench.widgets.selection import Selection
from workbench.widgets.view import View, script

HALVES = re.compile("[\ud800-\udfff]")  # halves of surrogate pairs: UTF-8, and so the wire, cannot hold them

Message = tuple[dict, list[bytes]]


class LiveView(View):
    """A View of tokens that joins a Selection. A subclass says in `_everything` what a new page must be told.

    Whoever changes what that says holds `_lock` until the news are told, so no page misses or repeats a token.
    """

    _css = script("view.css", "routing.css")

    token = traitlets.Int(-1, min=-1).tag(sync=True)
    layer = traitlets.Int(-1, min=-1).tag(sync=True)
    expert = traitlets.Int(-1, min=-1).tag(sync=True)

    def __init__(self, selection: Selection | None = None) -> None:
        self._lock = threading.RLock()
        super().__init__()
        self.selection = Selection() if selection is None else selection
        self.selection.join(self)

    def follow(self, change: dict) -> None:
        """Takes over one trait of the selection."""
        setattr(self, change["name"], change["new"])

    def close(self) -> None:
        """Takes the view off the screen and out of its selection."""
        if self.comm is not None:  # not closed yet
            self.selection.leave(self)
        super().close()

    def _everything(self) -> Message:
        raise NotImplementedError

    def _snapshot(self, view: str | None = None) -> None:
        with self._lock:
            content, buffers = self._everything()
            self._tell(content | {"kind": "show", "view": view}, buffers)

    def _stay(self, count: int) -> None:
        """Looks at no token beyond `count`, after some were taken back."""
        if self.token >= count:
            self.token = -1

    def _send(self, message: dict, buffers: list | None = None) -> None:
        # traits too are set in other names than that of the cell: a click in another view sets them (see View._tell)
        self._context.copy().run(super()._send, message, buffers)

    def _still(self) -> tuple[str, bytes | None]:
        """HTML and PNG that stand for the view where no browser code runs."""
        raise NotImplementedError

    def _repr_mimebundle_(self, **kwargs) -> dict:
        """The widget, and for where it cannot run what there was to see when it was displayed."""
        return self._page(repr(self), *self._still(), **kwargs)


def following(first_token: int, held: int) -> int:
    """`first_token`, if tokens from there on leave no gap after the `held` ones. RequestError otherwise."""
    if not 0 <= first_token <= held:
        raise RequestError(f"tokens follow one another: the next is {held} (or an earlier one), not {first_token}.")
    return first_token


def whole(texts: Iterable[str]) -> list[str]:
    """Texts as they can be sent: half a surrogate pair becomes U+FFFD."""
    return [HALVES.sub("\ufffd", text) for text in texts]
