"""Runs a Gluon kernel on the CPU, without a GPU: its own source, with other things behind its names.

Gluon has no interpreter. Here `gl`, `tma`, `mbarrier` and the products of warpgroups are replaced by what
they are defined to do, on torch tensors; the partitions of `warp_specialize` are threads, of which one at a
time runs. Who goes on is drawn by chance, and so is when an asynchronous copy ends. It raises

* Stuck, where every partition waits and no copy is on its way: a deadlock;
* AssertionError, where shared memory changes under a product, where a barrier gets more arrivals than it was
  made for, or a store leaves shared memory without a fence; what a copy will fill is NaN until then.

What it does not see is what happens between the warps of one partition: there the compiler puts barriers.
"""

from __future__ import annotations

import random
import threading
import types
from collections.abc import Callable
from typing import Any

import torch


class Stuck(Exception):
    """No partition can go on."""


class _Stopped(BaseException):
    """Ends a thread that will not be needed any more."""


class Scheduler:
    """Threads of which one runs, and actions that end when it pleases them."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.actions: list[tuple[int, Callable[[], None]]] = []  # (thread, what it does when it ends)
        self.turn = threading.Condition()
        self.blocked: dict[int, Callable[[], bool]] = {}  # thread -> what it waits for
        self.done: set[int] = set()
        self.error: BaseException | None = None
        self.running: int | None = None
        self.stopped = False
        self.local = threading.local()

    @property
    def me(self) -> int:
        return self.local.number

    def run(self, functions: list[Callable[[], None]]) -> None:
        """Runs them to their ends, and the actions, too."""
        threads = [threading.Thread(target=self._body, args=(i, f)) for i, f in enumerate(functions)]
        self.blocked, self.done = dict.fromkeys(range(len(functions)), lambda: True), set()
        for thread in threads:
            thread.start()
        try:
            while self.error is None and (len(self.done) < len(functions) or self.actions):
                ready = [i for i in self.blocked if i not in self.done and self.blocked[i]()]
                choices = len(ready) + len(self.actions)
                if not choices:
                    raise Stuck(f"partitions {sorted(set(self.blocked) - self.done)} wait for each other")
                chosen = self.random.randrange(choices)
                if chosen >= len(ready):
                    self._end(chosen - len(ready))
                    continue
                with self.turn:
                    self.running = ready[chosen]
                    self.turn.notify_all()
                    self.turn.wait_for(lambda: self.running is None)
        finally:
            with self.turn:
                self.stopped = True
                self.turn.notify_all()
            for thread in threads:
                thread.join()
        if self.error is not None:
            raise self.error

    def _end(self, index: int) -> None:
        """Ends an action; those of one thread end in any order, as copies do."""
        self.actions.pop(index)[1]()

    def _body(self, number: int, function: Callable[[], None]) -> None:
        self.local.number = number
        try:
            self._sleep()
            function()
        except _Stopped:
            return
        except BaseException as error:  # noqa: BLE001 - handed to who waits in `run`
            self.error = error
        with self.turn:
            self.done.add(number)
            self.running = None
            self.turn.notify_all()

    def wait(self, condition: Callable[[], bool] = lambda: True) -> None:
        """Lets others run, until the condition holds."""
        self.blocked[self.me] = condition
        with self.turn:
            self.running = None
            self.turn.notify_all()
        self._sleep()

    def _sleep(self) -> None:
        with self.turn:
            self.turn.wait_for(lambda: self.stopped or self.running == self.me)
            if self.stopped:
                raise _Stopped


class Barrier:
    """An mbarrier: its phase ends when as many have arrived as it was made for, and all bytes are there."""

    def __init__(self) -> None:
        self.count = self.pending = self.bytes = self.ended = 0

    def arrive(self, count: int) -> None:
        self.pending -= count
        assert self.pending >= 0, "more arrivals than the barrier was made for"
        self.step()

    def step(self) -> None:
        if self.pending == 0 and self.bytes == 0:
            self.ended += 1
            self.pending = self.count


class Shared:
    """Shared memory: a tensor, or barriers."""

    def __init__(self, data: Any, layout: Any = None, unfenced: set[int] | None = None) -> None:
        self.data, self.layout, self.unfenced = data, layout, unfenced if unfenced is not None else set()
        self.dtype = getattr(data, "dtype", None)

    def index(self, place: int) -> Any:
        found = self.data[int(place)]
        return found if isinstance(found, Barrier) else Shared(found, self.layout, self.unfenced)

    def reshape(self, shape: list[int]) -> Shared:
        return Shared(self.data.view(shape), self.layout, self.unfenced)

    def permute(self, order: tuple[int, ...]) -> Shared:
        return Shared(self.data.permute(order), self.layout, self.unfenced)

    def store(self, value: torch.Tensor) -> None:
        assert value.dtype == self.dtype
        self.data.copy_(value)
        self.unfenced.add(threading.get_ident())


class Pointer:
    """A pointer into a tensor; the places of a sum may be a tensor."""

    def __init__(self, tensor: torch.Tensor, places: Any = 0) -> None:
        self.tensor, self.places = tensor, places

    def __add__(self, more: Any) -> Pointer:
        return Pointer(self.tensor, self.places + more)


class Descriptor:
    """What TMA knows of a tensor; outside of it a copy reads zeros and writes nothing."""

    def __init__(self, of: Any) -> None:
        self.tensor = torch.as_strided(of.base, of.shape, of.strides)
        self.block, self.layout, self.dtype = of.block_shape, of.layout, of.base.dtype

    def _inside(self, place: list[int]) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
        place = [int(x) for x in place]
        sizes = [max(0, min(b, n - p)) for p, b, n in zip(place, self.block, self.tensor.shape, strict=True)]
        there = tuple(slice(p, p + size) for p, size in zip(place, sizes, strict=True))
        return there, tuple(slice(size) for size in sizes)

    def read(self, place: list[int], into: torch.Tensor) -> None:
        there, here = self._inside(place)
        into.zero_()
        into[here] = self.tensor[there]

    def write(self, place: list[int], source: torch.Tensor) -> None:
        there, here = self._inside(place)
        self.tensor[there] = source[here]


class Product:
    """A product that runs: it has a value when it has been waited for."""

    def __init__(self, a: Any, b: Shared, acc: torch.Tensor | None) -> None:
        self.a, self.b, self.acc, self.value = a, b, acc, None
        self.begun = self.compute()

    def compute(self) -> torch.Tensor:
        a = self.a.data if isinstance(self.a, Shared) else self.a
        found = a.float() @ self.b.data.float()
        return found if self.acc is None else found + self.acc

    def end(self) -> None:
        self.value = self.compute()
        assert torch.equal(self.value, self.begun), (
            "shared memory changed, or was not there yet, in a product"
        )


class Emulator:
    """Runs launches of a Gluon kernel, see `launches_to`. arrivals: False drops every arrival, so that a test
    sees a deadlock told."""

    def __init__(self, seed: int = 0, arrivals: bool = True) -> None:
        self.seed, self.arrivals = seed, arrivals

    def __call__(self, kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
        names = kernel.fn.__code__.co_varnames[: kernel.fn.__code__.co_argcount]
        values = [self._argument(argument) for argument in arguments]
        given = dict(zip(names, values, strict=False)) | {n: v for n, v in options.items() if n in names}
        for program in range(grid[0]):
            self.scheduler = Scheduler(self.seed + program)
            self.outstanding: dict[int, list[Product]] = {}
            self.stores: dict[int, int] = {}
            self.unfenced: set[int] = set()  # threads that have written since their last fence
            run = self._functions(kernel, program, grid[0])
            run(**given)

    @staticmethod
    def _argument(argument: Any) -> Any:
        if isinstance(argument, torch.Tensor):
            return Pointer(argument.reshape(-1) if argument.is_contiguous() else argument)
        return Descriptor(argument) if hasattr(argument, "block_shape") else argument

    def _functions(self, kernel: Any, program: int, programs: int) -> Callable[..., None]:
        """The kernel's own functions, with what is here behind the names that they use."""
        names = dict(kernel.fn.__globals__)
        for name, value in kernel.fn.__globals__.items():
            if type(value) is type(kernel):
                names[name] = types.FunctionType(value.fn.__code__, names, name, value.fn.__defaults__)
            elif type(value).__name__ == "constexpr":
                names[name] = value.value
        names |= {
            "gl": self._language(program, programs),
            "mbarrier": types.SimpleNamespace(
                MBarrierLayout=lambda: None,
                init=self._init,
                expect=self._expect,
                arrive=self._arrive,
                wait=lambda barrier, phase: self.scheduler.wait(lambda: barrier.ended & 1 != phase),
            ),
            "async_load": self._load,
            "async_store": self._store,
            "tma": types.SimpleNamespace(store_wait=self._store_wait),
            "fence_async_shared": self._fence,
            "warpgroup_mma": self._mma,
            "warpgroup_mma_wait": self._mma_wait,
        }
        return names[kernel.fn.__name__]

    def _language(self, program: int, programs: int) -> types.SimpleNamespace:
        def load(pointer: Pointer, mask: torch.Tensor, other: float) -> torch.Tensor:
            found = torch.full(mask.shape, other, dtype=pointer.tensor.dtype)
            found[mask] = pointer.tensor[pointer.places[mask]]
            return found

        def maximum(a: Any, b: Any) -> Any:
            return torch.maximum(a, b) if isinstance(a, torch.Tensor) and a.dim() else max(int(a), int(b))

        def allocate(dtype: torch.dtype, shape: list[int], layout: Any) -> Shared:
            if dtype == torch.int64:
                return Shared([Barrier() for _ in range(shape[0])])
            return Shared(torch.full(shape, torch.nan, dtype=dtype), layout, self.unfenced)

        def specialize(functions: list[Any], warps: list[int], registers: list[int]) -> None:
            assert len(functions) == 1 + len(warps) == 1 + len(registers)
            self.scheduler.run([lambda f=f, args=args: f(*args) for f, args in functions])

        layouts = ("NVMMADistributedLayout", "SliceLayout", "DotOperandLayout", "BlockedLayout")
        return types.SimpleNamespace(
            **{name: lambda *_: None for name in layouts},
            constexpr=None, float32=torch.float32, int64=torch.int64, static_range=range,
            program_id=lambda axis: program, num_programs=lambda axis: programs,
            zeros=lambda shape, dtype, layout: torch.zeros(shape, dtype=dtype),
            full=lambda shape, value, dtype, layout: torch.full(shape, value, dtype=dtype),
            arange=lambda start, end, layout: torch.arange(start, end),
            convert_layout=lambda value, layout: value,
            where=lambda c, a, b: torch.where(c, a, b), exp2=torch.exp2,
            max=lambda x, axis: x.amax(axis), sum=lambda x, axis: x.sum(axis),
            load=load, maximum=maximum, allocate_shared_memory=allocate, warp_specialize=specialize,
        )  # fmt: skip

    # mbarrier

    def _init(self, barrier: Barrier, count: int) -> None:
        barrier.count = barrier.pending = count

    def _expect(self, barrier: Barrier, count: int) -> None:
        barrier.bytes += count
        barrier.arrive(1)

    def _arrive(self, barrier: Barrier, count: int, pred: bool = True) -> None:
        if pred and self.arrivals:
            barrier.arrive(count)
        self.scheduler.wait()

    # TMA

    def _load(self, desc: Descriptor, place: list[int], barrier: Barrier, into: Shared) -> None:
        into.data.fill_(torch.nan)

        def end() -> None:
            desc.read(place, into.data)
            barrier.bytes -= into.data.numel() * into.data.element_size()
            assert barrier.bytes >= 0, "more bytes than the barrier expects"
            barrier.step()

        self.scheduler.actions.append((self.scheduler.me, end))
        self.scheduler.wait()

    def _store(self, desc: Descriptor, place: list[int], source: Shared) -> None:
        assert threading.get_ident() not in self.unfenced, "a store without a fence before it"
        me = self.scheduler.me
        self.stores[me] = self.stores.get(me, 0) + 1

        def end() -> None:
            desc.write(place, source.data)
            self.stores[me] -= 1

        self.scheduler.actions.append((me, end))
        self.scheduler.wait()

    def _store_wait(self, pendings: int) -> None:
        me = self.scheduler.me
        self.scheduler.wait(lambda: self.stores.get(me, 0) <= pendings)

    def _fence(self) -> None:
        self.unfenced.discard(threading.get_ident())

    # Products

    def _mma(self, a: Any, b: Shared, acc: Any, use_acc: bool = True, is_async: bool = False) -> Product:
        assert is_async and not isinstance(acc, Product)
        product = Product(a, b, acc if use_acc else None)
        self.outstanding.setdefault(self.scheduler.me, []).append(product)
        self.scheduler.wait()
        return product

    def _mma_wait(self, pending: int, deps: list[Product]) -> Any:
        self.scheduler.wait()
        running = self.outstanding[self.scheduler.me]
        while len(running) > pending:
            running.pop(0).end()
        values = tuple(product.value for product in deps)
        assert all(value is not None for value in values), "used before it was waited for"
        return values[0] if len(values) == 1 else values
