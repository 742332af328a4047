"""What is being looked at: one token, layer and expert, shared by all views that join the selection."""

import traitlets


class Selection(traitlets.HasTraits):
    """Set any of the three from Python or by a click in any view; all views follow. -1 is nothing in particular.

    token   number of a token; -1: views of a growing answer follow its newest token
    layer   number of a layer, as in the checkpoint
    expert  number of a routed expert of that layer
    """

    token = traitlets.Int(-1, min=-1)
    layer = traitlets.Int(-1, min=-1)
    expert = traitlets.Int(-1, min=-1)

    def join(self, view: traitlets.HasTraits) -> None:
        """`view` has the same three traits; from now on they follow this selection and it follows them."""
        for name in self.trait_names():
            setattr(view, name, getattr(self, name))
        self.observe(view.follow, self.trait_names())
        view.observe(self.follow, self.trait_names())

    def leave(self, view: traitlets.HasTraits) -> None:
        """The view keeps what it shows and follows no more."""
        self.unobserve(view.follow, self.trait_names())
        view.unobserve(self.follow, self.trait_names())

    def follow(self, change: dict) -> None:
        """Takes over one trait of a view. A value that is already here is told to nobody, so nothing goes round."""
        setattr(self, change["name"], change["new"])

    def __repr__(self) -> str:
        return f"Selection(token={self.token}, layer={self.layer}, expert={self.expert})"
