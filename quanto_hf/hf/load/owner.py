"""The model that a quantizer belongs to: known to it, and neither kept in memory by it nor copied with it."""

import copy
import weakref
from typing import Any


class Owned:
    """Mixin of a quantizer, which transformers asks about a model without saying which: whether it can be trained, say.
    A copy of the model, and one that was pickled, have quantizers that know the copy."""

    _owner: "weakref.ref[Any] | None" = None

    def belongs_to(self, model: Any) -> None:
        """Note the model."""
        self._owner = weakref.ref(model)

    @property
    def owner(self) -> Any:
        """The model; None before it is loaded, and when it is gone."""
        return None if self._owner is None else self._owner()

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        made = type(self).__new__(type(self))
        memo[id(self)] = made
        values = {name: value for name, value in vars(self).items() if name != "_owner"}
        vars(made).update(copy.deepcopy(values, memo))
        # the model is copied around its quantizer, or it is not copied
        owner = memo.get(id(self.owner), self.owner)
        if owner is not None:
            made.belongs_to(owner)
        return made

    def __getstate__(self) -> dict[str, Any]:
        # pickle cannot take a reference that is weak; the model is being pickled when its quantizer is
        return {**vars(self), "_owner": self.owner}

    def __setstate__(self, state: dict[str, Any]) -> None:
        owner = state.pop("_owner", None)
        vars(self).update(state)
        if owner is not None:
            self.belongs_to(owner)
