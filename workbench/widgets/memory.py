"""The memory of a conversation, below it: cache meter, timeline and what-if, made when they are first opened."""

from collections.abc import Callable
from dataclasses import replace

import ipywidgets

from workbench.errors import RequestError
from workbench.meter import Meter
from workbench.session import Conversation, Event
from workbench.timeline import Sampler
from workbench.widgets.cachemeter import CacheMeter, Errors
from workbench.widgets.timeline import MemoryTimeline
from workbench.widgets.whatif import WhatIf
from workbench.workbench import Workbench


class Memory(ipywidgets.VBox):
    """Follows one conversation. Closed it reads nothing and sends nothing.

    `converted` is called after the cache was converted.
    """

    def __init__(self, conversation: Conversation, converted: Callable[[], None]) -> None:
        self._converted = converted
        self._parts: tuple[CacheMeter, MemoryTimeline, WhatIf] | None = None
        self._unsubscribe: Callable[[], None] = lambda: None
        super().__init__(layout={"display": "none", "max_width": "980px"})
        self.follow(conversation)

    @property
    def meter(self) -> CacheMeter:
        return self._made()[0]

    @property
    def timeline(self) -> MemoryTimeline:
        return self._made()[1]

    @property
    def whatif(self) -> WhatIf:
        return self._made()[2]

    @property
    def opened(self) -> bool:
        return self.layout.display != "none"

    @opened.setter
    def opened(self, wanted: bool) -> None:
        if wanted == self.opened:
            return
        if wanted:
            self.meter.sampler.sample()
            self.meter.sampler.start()
            self.meter.refresh()
        elif self._parts:
            self.meter.sampler.stop()
        self.layout.display = "" if wanted else "none"
        self._unfolded()

    @property
    def format(self) -> str:
        """How the cache is stored. Another one converts what is cached; RequestError while a reply is generated."""
        return self._alive().engine.cache_format

    @format.setter
    def format(self, name: str) -> None:
        if self._parts:
            self.meter.switch(name)
        else:
            self._convert(name)

    def follow(self, conversation: Conversation) -> None:
        """Listens to another conversation instead, one that was imported."""
        self._unsubscribe()
        self.conversation = conversation
        self._unsubscribe = conversation.subscribe(self.hear)

    def leave(self) -> None:
        """Listens no more and lets the bench go; what was seen stays."""
        self._unsubscribe()
        self._unsubscribe = lambda: None
        if self._parts:
            meter, timeline, _ = self._parts
            meter.retire()
            timeline.retire()
            meter.sampler.retire()

    def hear(self, event: Event) -> None:
        """One event of the conversation, in the thread of its worker. Views are told in that of the sampler."""
        if self.opened:
            self.meter.sampler.hear(event)

    # Behind it

    def _alive(self) -> Workbench:
        if self.conversation.bench is None:
            raise RequestError("this conversation was closed; start another one with wb.chat(bench).")
        return self.conversation.bench

    def _made(self) -> tuple[CacheMeter, MemoryTimeline, WhatIf]:
        if self._parts is None:
            bench = self._alive()
            sampler = Sampler(Meter(bench))
            named = replace(bench.config, name=bench.name.rsplit("/", 1)[-1])
            self._parts = (
                CacheMeter(bench, sampler, self._convert),
                MemoryTimeline(sampler, live=False),
                WhatIf(config=named, context=bench.context, format=bench.engine.cache_format),
            )
            meter, timeline, whatif = self._parts
            self._sections = ipywidgets.Accordion(
                [timeline, whatif], titles=("Memory over time", "What if: other models, contexts, formats")
            )
            self._sections.add_class("wbc-controls")
            self._sections.observe(lambda _: self._unfolded(), "selected_index")
            self.children = (meter, self._sections)
        return self._parts

    def _unfolded(self) -> None:
        if self._parts:
            self.timeline.live = self.opened and self._sections.selected_index == 0

    def _convert(self, format: str) -> Errors:
        talk = self.conversation
        with talk.lock:
            engine = self._alive().engine
            if talk.answering:
                raise RequestError(
                    "still answering: the cache is converted between two replies. stop() this one, or wait for its end."
                )
            errors = engine.convert_cache(format)
        self._converted()
        return errors
