"""An accelerator that only takes notes: streams with vector clocks, events, and the memory of a caching allocator.

`FakeDevice` is what `StreamLanes` plays on in place of `Accelerator`. Tensors are real ones on the CPU; inside
`Memory(device)` every op that touches them is taken as a kernel on the stream that is current, and what would be a race
on a real device is written down in `races`.
"""

from __future__ import annotations

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class FakeStream:
    """Its clock tells how much of every stream has surely happened before whatever comes next on this one."""

    def __init__(self, device, name):
        self.device, self.name = device, name
        self.clock = {name: 0}

    def tick(self):
        self.clock[self.name] += 1
        return dict(self.clock)

    def has_seen(self, at):
        name, number = at
        return self.clock.get(name, 0) >= number


class FakeEvent:
    def __init__(self, device):
        self.device = device
        self.clock = None

    def record(self, stream):
        self.device.note(("record", self, stream.name))
        self.clock = stream.tick()

    def wait(self, stream):
        self.device.note(("wait", self, stream.name))
        assert self.clock is not None, "waits for an event that was never recorded"
        for name, number in self.clock.items():
            stream.clock[name] = max(number, stream.clock.get(name, 0))


class FakeDevice:
    """Notes `(what, event or stream's name, ...)`; `watch` is called before each."""

    def __init__(self):
        self.notes = []
        self.launched = []
        self.watch = lambda: None
        self.num_streams = 0
        self.now = self.caller = FakeStream(self, "compute")

    def note(self, note):
        self.watch()
        self.notes.append(note)

    def current(self):
        return self.now

    def switch(self, stream):
        if stream is not self.now:
            self.note(("switch", stream.name))
        self.now = stream

    def new_stream(self):
        self.num_streams += 1
        return FakeStream(self, "comm" if self.num_streams == 1 else f"comm{self.num_streams}")

    def new_event(self):
        return FakeEvent(self)

    def launch(self, name):
        """Something runs on the current stream; what it surely comes after is kept in `launched`."""
        self.note(("run", name, self.now.name))
        before = dict(self.now.clock)
        self.launched.append((self.now.name, self.now.tick()[self.now.name], before))


class Block:
    """A piece of memory: whose it is, and who wrote and used it last on each stream."""

    def __init__(self, storage, stream):
        self.ref, self.owner = StorageWeakRef(storage), stream
        self.writes, self.uses = {}, {}


class Memory(TorchDispatchMode):
    """Follows every op. A block whose last reference is gone may be what its owner's next op is given."""

    def __init__(self, device):
        super().__init__()
        self.device, self.blocks, self.races = device, {}, []
        self.free = []
        self.num_reused = 0
        device.watch = self.collect

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.collect()
        read = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        known = {x.untyped_storage()._cdata for x in read}
        result = func(*args, **(kwargs or {}))
        self.device.now.tick()
        written = _written(func, args, kwargs or {})
        for x in read:
            self.use(func, x, is_write=any(x is w for w in written))
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor) and x.untyped_storage()._cdata not in known:
                self.reuse()
                self.use(func, x, is_write=True)
        return result

    def collect(self):
        """Find what is gone."""
        gone = [key for key, block in self.blocks.items() if block.ref.expired()]
        self.free += [self.blocks.pop(key) for key in gone]

    def reuse(self):
        """The current stream takes all its free memory again: it must have seen every use of it."""
        stream = self.device.now
        for block in [b for b in self.free if b.owner is stream]:
            late = [at[0] for at in block.uses.items() if not stream.has_seen(at)]
            self.races += [f"memory of {stream.name} is used again while {name} uses it" for name in late]
            self.free.remove(block)
            self.num_reused += 1

    def use(self, func, x, *, is_write):
        stream, storage = self.device.now, x.untyped_storage()
        if storage._cdata not in self.blocks:
            self.blocks[storage._cdata] = Block(storage, stream)
        block = self.blocks[storage._cdata]
        late = [at[0] for at in (block.uses if is_write else block.writes).items() if not stream.has_seen(at)]
        self.races += [f"{func} on {stream.name} does not wait for {name}" for name in late]
        block.uses[stream.name] = stream.clock[stream.name]
        if is_write:
            block.writes[stream.name] = stream.clock[stream.name]


def _written(func, args, kwargs):
    if func.namespace == "c10d":  # its schemas do not say
        return [x for x in tree_leaves(args) if isinstance(x, torch.Tensor)]
    schema = func._schema.arguments
    values = [*zip(schema, args, strict=False), *((a, kwargs[a.name]) for a in schema if a.name in kwargs)]
    return [x for a, v in values if a.alias_info and a.alias_info.is_write for x in tree_leaves(v)]
