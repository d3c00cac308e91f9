"""Collectives of CPU processes on one host, through memory that they share; the rest is gloo's.

Gloo sends through loopback TCP, where a message is copied four times by threads that take the
cores from the computing, and waking them costs up to a millisecond. Here a message is written once
and read once. Of a step of two processes with expert parallelism the difference is a tenth.

A pair of ranks is joined by a socket, which tells that data are there, and which the kernel closes
when a process ends: who waits for it hears of it at once. Memory (`memfd_create`) and sockets
(abstract names) belong to the processes; nothing is left in a file system, however they end.

Calls that wait for their result are served, and tokens on their way to experts or back, which are
exchanged by the time the call returns. Any other `async_op` goes to gloo, whose threads work on
while the caller computes. Ranks that are not all on one host use gloo alone.
"""

from __future__ import annotations

import mmap
import os
import secrets
import socket
import struct
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import _create_work_from_future  # type: ignore[attr-defined]

from pangu.backends.timeline import timeline
from pangu.backends.turns import is_of_experts
from pangu.backends.whereabouts import Told, here

NAME = "shared_memory"
SLOT = 1 << 20  # bytes from one rank to another at a time; each pair has two slots each way
WHOLE = 1 << 16  # bytes up to which every rank reduces all of a message
SPIN_SECONDS = 2e-4  # of asking again and again before a rank sleeps until it is woken
BOOT = Path("/proc/sys/kernel/random/boot_id")  # another one after each start of a host
GLOO = dist.ProcessGroup.BackendType.GLOO
_result: torch.futures.Future[list[torch.Tensor]] = torch.futures.Future()
_result.set_result([])
DONE = _create_work_from_future(_result)  # of calls that are over when they return
NOTHING = torch.empty(0, dtype=torch.uint8)
REDUCTIONS: tuple[tuple[Any, Callable[..., Any]], ...] = (
    (dist.ReduceOp.SUM, torch.add),
    (dist.ReduceOp.MAX, torch.maximum),
    (dist.ReduceOp.MIN, torch.minimum),
)


# Its type stubs disagree with the constructor for subclasses.
_ProcessGroup: Any = dist.ProcessGroup


class Link:
    """One end of the connection to another rank: two slots to write, two to read, one socket."""

    def __init__(self, wire: socket.socket, rank: int, timeout: float) -> None:
        descriptor = os.memfd_create("pangu-collectives")
        os.ftruncate(descriptor, 2 * SLOT)
        socket.send_fds(wire, [b"m"], [descriptor])
        _, (theirs,), _, _ = socket.recv_fds(wire, 1, 1)
        self._written, self._read = _slots(descriptor), _slots(theirs)
        wire.settimeout(timeout)
        self._wire, self._rank, self._timeout = wire, rank, timeout
        self._turn = 0

    def put(self, part: torch.Tensor) -> None:
        """Write bytes (none at all, too) into the next slot and say so.

        The slot is free: before it answered in the turn before this one, the other rank had read
        what was written two turns ago.
        """
        self._written[self._turn & 1][: part.numel()].copy_(part)
        try:
            self._wire.send(struct.pack("q", part.numel()))
        except OSError as error:
            raise self._gone() from error

    def get(self, part: torch.Tensor) -> None:
        """Wait for the other rank's bytes of this turn, and end the turn."""
        size = self._answer()
        if size != part.numel():
            raise RuntimeError(f"rank {self._rank} sent {size} bytes, not {part.numel()}")
        part.copy_(self._read[self._turn & 1][:size])
        self._turn += 1

    def _answer(self) -> int:
        until = time.perf_counter() + SPIN_SECONDS
        try:
            while True:
                try:
                    flags = socket.MSG_DONTWAIT if time.perf_counter() < until else 0
                    answer = self._wire.recv(8, flags)
                    break
                except BlockingIOError:
                    os.sched_yield()  # there may be more ranks than cores
        except TimeoutError:
            raise dist.DistBackendError(
                f"waited {self._timeout:.0f} s in a collective for rank {self._rank}"
            ) from None
        except OSError as error:
            raise self._gone() from error
        if not answer:
            raise self._gone()
        return struct.unpack("q", answer)[0]

    def _gone(self) -> dist.DistBackendError:
        return dist.DistBackendError(f"rank {self._rank} is gone: it has closed its connection")


def _slots(descriptor: int) -> tuple[torch.Tensor, ...]:
    memory = mmap.mmap(descriptor, 2 * SLOT)
    os.close(descriptor)
    return torch.frombuffer(memory, dtype=torch.uint8).split(SLOT)


class _Addends:
    """The work of a reduce-scatter whose addends are on their way; who waits for it sums them."""

    def __init__(self, reduction: Callable[..., Any]) -> None:
        self._reduction = reduction
        self._expected: list[tuple[Any, torch.Tensor, torch.Tensor]] = []

    def expect(self, work: Any, parts: torch.Tensor, output: torch.Tensor) -> None:
        """`work` fills `parts` `[ranks, n]`, whose sum goes into `output` (n values)."""
        self._expected.append((work, parts, output))

    def get_future(self) -> Any:
        """Done when the last ones have come."""
        return self._expected[-1][0].get_future()

    def wait(self) -> None:
        for work, parts, output in self._expected:
            work.wait()
            _combine(parts.unbind(), output.view(-1), self._reduction)


class SharedMemoryGroup(_ProcessGroup):
    """A process group with gloo for what is not overridden here.

    Sums are taken in the order of ranks, so that every rank has the same bits.
    """

    def __init__(self, store: dist.Store, ranks: Sequence[int], rank: int, timeout: timedelta):
        super().__init__(rank, len(ranks))
        self._store, self._ranks, self._own = store, list(ranks), rank
        self._timeout = timeout.total_seconds()
        self._calls = 0
        gloo = dist.ProcessGroupGloo(store, rank, len(ranks), timeout)
        self._gloo = dist.ProcessGroup(store, rank, len(ranks))
        for group in (self, self._gloo):
            group._register_backend(torch.device("cpu"), GLOO, gloo)
            group._set_default_backend(GLOO)

    @cached_property
    def links(self) -> dict[int, Link] | None:
        """To every other rank of the group, made when the first collective needs them; None where
        the ranks are not all on this host."""
        others = [rank for rank in range(len(self._ranks)) if rank != self._own]
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        name = secrets.token_hex(16)
        listener.bind(f"\0{name}")
        listener.listen(len(others))
        listener.settimeout(self._timeout)
        self._store.set(f"host/{self._own}", f"{_host()} {name}")
        names = {}
        for rank in others:
            host, names[rank] = self._store.get(f"host/{rank}").decode().split()
            if host != _host():
                return None
        wires = {}
        for rank in (rank for rank in others if rank < self._own):
            wires[rank] = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            wires[rank].connect(f"\0{names[rank]}")
            wires[rank].send(struct.pack("q", self._own))
        while len(wires) < len(others):
            wire, _ = listener.accept()
            _, user, _ = struct.unpack(
                "3i", wire.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
            )
            if user == os.getuid():
                wires[struct.unpack("q", wire.recv(8))[0]] = wire
        listener.close()
        return {rank: Link(wires[rank], self._ranks[rank], self._timeout) for rank in others}

    def serves(self, opts: Any) -> bool:
        """Whether a call goes through shared memory: the same answer on every rank."""
        return len(self._ranks) > 1 and self.at_once(opts) and self.links is not None

    def at_once(self, opts: Any) -> bool:
        """Whether a call may be over when it returns."""
        return not opts.asyncOp or is_of_experts(self.group_desc)

    def exchange(self, sent: Sequence[torch.Tensor], received: Sequence[torch.Tensor]) -> None:
        """`sent[r]` goes to rank r, where it arrives as `received` of this rank. Contiguous; what
        two ranks send each other may differ in size, and be nothing."""
        assert self.links is not None
        outwards = [_slices(part) for part in sent]
        inwards = [_slices(part) for part in received]
        turns = {rank: max(len(outwards[rank]), len(inwards[rank])) for rank in self.links}
        received[self._own].copy_(sent[self._own])
        for turn in range(max(turns.values())):
            active = [(rank, link) for rank, link in self.links.items() if turn < turns[rank]]
            for rank, link in active:
                link.put(outwards[rank][turn] if turn < len(outwards[rank]) else NOTHING)
            for rank, link in active:
                link.get(inwards[rank][turn] if turn < len(inwards[rank]) else NOTHING)

    def all_to_all_single(
        self,
        output: torch.Tensor,
        input: torch.Tensor,
        output_sizes: list[int],
        input_sizes: list[int],
        opts: Any,
    ) -> Any:
        if not self.serves(opts):
            return self._gloo.all_to_all_single(output, input, output_sizes, input_sizes, opts)
        ranks = len(self._ranks)
        sent = input.contiguous().split(input_sizes or input.size(0) // ranks)
        received = output.split(output_sizes or output.size(0) // ranks)
        self.exchange(sent, received)
        return DONE

    def all_gather_single(self, output: torch.Tensor, input: torch.Tensor, opts: Any) -> Any:
        return self.all_gather_single_coalesced([output], [input], opts)

    def all_gather_single_coalesced(
        self, outputs: list[torch.Tensor], inputs: list[torch.Tensor], opts: Any
    ) -> Any:
        if not self.serves(opts):
            return self._gloo.all_gather_single_coalesced(outputs, inputs, opts)
        for output, input in zip(outputs, inputs, strict=True):
            sent = [input.contiguous().view(-1)] * len(self._ranks)
            self.exchange(sent, output.view(len(self._ranks), -1).unbind())
        return DONE

    def reduce_scatter_single(self, output: torch.Tensor, input: torch.Tensor, opts: Any) -> Any:
        return self.reduce_scatter_single_coalesced([output], [input], opts)

    def reduce_scatter_single_coalesced(
        self, outputs: list[torch.Tensor], inputs: list[torch.Tensor], opts: Any
    ) -> Any:
        reduction = _reduction(opts)
        if reduction is None or not self.at_once(opts):
            return self._gloo.reduce_scatter_single_coalesced(outputs, inputs, opts)
        addends = _Addends(reduction)
        for output, input in zip(outputs, inputs, strict=True):
            shares = input.contiguous().view(len(self._ranks), -1)
            if not self.serves(opts):
                # Gloo's own is an all-reduce of everything, twice the bytes.
                parts = torch.empty_like(shares)
                work = self._gloo.all_to_all_single(parts, shares, [], [], dist.AllToAllOptions())
                addends.expect(work, parts, output)
                continue
            size = SLOT // input.element_size()
            for target, sent in zip(
                output.view(-1).split(size), shares.split(size, dim=1), strict=True
            ):
                self._reduce(sent.contiguous().unbind(), target, reduction)
        return DONE if self.serves(opts) else addends

    def allreduce(self, tensors: list[torch.Tensor], opts: Any) -> Any:
        reduction = _reduction(opts)
        if reduction is None or not self.serves(opts):
            return self._gloo.allreduce(tensors, opts)
        self._reduce_all(tensors, reduction)
        return DONE

    def allreduce_coalesced(self, tensors: list[torch.Tensor], opts: Any) -> Any:
        reduction = _reduction(opts)
        if reduction is None or not self.serves(opts):
            return self._gloo.allreduce_coalesced(tensors, opts)
        self._reduce_all(tensors, reduction)
        return DONE

    def _reduce_all(self, tensors: list[torch.Tensor], reduction: Callable[..., Any]) -> None:
        ranks = len(self._ranks)
        for tensor in tensors:
            whole = tensor.contiguous().view(-1)
            if whole.nbytes <= WHOLE:
                self._reduce([whole] * ranks, whole, reduction)
            else:
                for piece in whole.split(SLOT // whole.element_size() * ranks):
                    shares = piece.tensor_split(ranks)
                    self._reduce(shares, shares[self._own], reduction)
                    self.exchange([shares[self._own]] * ranks, shares)
            if whole.data_ptr() != tensor.data_ptr():
                tensor.copy_(whole.view_as(tensor))

    def _reduce(
        self, sent: Sequence[torch.Tensor], target: torch.Tensor, reduction: Callable[..., Any]
    ) -> None:
        """`target` becomes the reduction, in the order of ranks, of what they send this one."""
        parts = [torch.empty_like(target) for _ in self._ranks]
        self.exchange(sent, parts)
        _combine(parts, target, reduction)


def _told(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
    """`call`, with its place among the group's calls known to others while it goes on."""

    def told(self: SharedMemoryGroup, *args: Any, **kwargs: Any) -> Any:
        if here.inside:  # one of these calls another
            return call(self, *args, **kwargs)
        self._calls += 1
        group, waits = self.group_desc or "a group", _waits(args)
        place = (group, self._ranks, name, self._calls)
        span = timeline.collective(name, group, self._ranks, self._calls)
        with here.at(*place):
            work = call(self, *args, **kwargs)
            if waits:
                work.wait()
                work = DONE  # the engine waits once more
        if work is DONE:
            timeline.waited(span)
            return DONE
        if timeline.recording:
            work = timeline.watch(work, span)
        return Told(work, place) if is_of_experts(group) else work

    return told


def _waits(args: tuple[Any, ...]) -> bool:
    """Whether who calls waits for the work right away."""
    return getattr(args[-1] if args else None, "asyncOp", True) is False


def _through_gloo(name: str) -> Callable[..., Any]:
    return lambda self, *args, **kwargs: getattr(self._gloo, name)(*args, **kwargs)


# Where a Python subclass overrides nothing, torch calls the base class without letting go of the
# interpreter's lock: a deadlock with gloo's threads, which need it to free a tensor.
_OTHERS = (
    *("allgather", "allgather_coalesced", "alltoall", "barrier", "broadcast", "gather"),
    *("monitored_barrier", "recv", "recv_anysource", "reduce", "reduce_scatter", "scatter", "send"),
)
_OWN = (
    *("all_to_all_single", "all_gather_single", "reduce_scatter_single", "allreduce"),
    *("all_gather_single_coalesced", "reduce_scatter_single_coalesced", "allreduce_coalesced"),
)
for _name in _OTHERS:
    setattr(SharedMemoryGroup, _name, _told(_name, _through_gloo(_name)))
for _name in _OWN:
    setattr(SharedMemoryGroup, _name, _told(_name, getattr(SharedMemoryGroup, _name)))


def _combine(
    parts: Sequence[torch.Tensor], target: torch.Tensor, reduction: Callable[..., Any]
) -> None:
    target.copy_(parts[0])
    for part in parts[1:]:
        reduction(target, part, out=target)


def _slices(part: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The bytes of a contiguous tensor by the slot."""
    flat = part.as_strided((part.numel(),), (1,))  # one element may come with any stride
    return flat.view(torch.uint8).split(SLOT) if part.numel() else ()


def _reduction(opts: Any) -> Callable[..., Any] | None:
    return next((function for op, function in REDUCTIONS if opts.reduceOp == op), None)


def _host() -> str:
    """What two processes must share to reach each other's abstract sockets."""
    spaces = [os.stat(f"/proc/self/ns/{kind}").st_ino for kind in ("net", "user")]
    return f"{BOOT.read_text().strip()}/{spaces}/{os.getuid()}".replace(" ", "")


def register() -> bool:
    """Make `NAME` a backend for `torch.distributed.init_process_group`; False where the system
    has not what it needs."""
    if not hasattr(os, "memfd_create") or not BOOT.exists():
        return False

    def create(options: Any, _: object) -> SharedMemoryGroup:
        ranks = options.global_ranks_in_group or range(options.group_size)
        return SharedMemoryGroup(options.store, ranks, options.group_rank, options.timeout)

    if NAME not in dist.Backend.backend_list:
        dist.Backend.register_backend(NAME, create, extended_api=True, devices=["cpu"])
    return True
