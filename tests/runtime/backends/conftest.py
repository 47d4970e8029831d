"""What tests of the torch backend share."""

from __future__ import annotations

import weakref

import pytest


@pytest.fixture(scope="session")
def pretend():
    """`pretend(captures)`: a `Capture` that replays by calling again; `captures` gets every call."""

    def make(captures):
        def capture(call):
            kept = tuple(output.clone() for output in call())
            captures.append(call)

            def replay():
                for output, found in zip(kept, call(), strict=True):
                    output.copy_(found)
                return kept

            return replay

        return capture

    return make


@pytest.fixture(scope="session")
def peak_memory():
    """`with peak_memory(known) as mode`: afterwards `mode.most`, without the tensors `known`."""
    torch = pytest.importorskip("torch")

    class Peak(torch.utils._python_dispatch.TorchDispatchMode):
        """The most bytes that tensors made inside it keep alive at a time."""

        def __init__(self, known):
            super().__init__()
            self.now = self.most = 0
            self.seen = {tensor.untyped_storage()._cdata for tensor in known}

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            found = func(*args, **(kwargs or {}))
            for tensor in torch.utils._pytree.tree_leaves(found):
                if isinstance(tensor, torch.Tensor):
                    self._made(tensor.untyped_storage())
            return found

        def _made(self, storage):
            if storage._cdata in self.seen:
                return
            self.seen.add(storage._cdata)
            self.now += storage.nbytes()
            self.most = max(self.most, self.now)
            weakref.finalize(storage, self._gone, storage._cdata, storage.nbytes())

        def _gone(self, place, size):
            self.seen.discard(place)
            self.now -= size

    return Peak
