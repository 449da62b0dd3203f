"""Capture by several processes: torchrun, accelerate launch, or any process group that is there already.

Every process calls `capture` with the same arguments. Rank 0 alone holds the directory's lock and writes the manifest.
Each rank takes whole shards of the one plan, so that batches are those of a single process and so are the bytes. A
shard is made durable by the rank that ran it and committed by rank 0 as soon as all shards before it are.

Ranks talk over a gloo group of their own in short JSON messages, never in pickles. A process that dies closes its
connections, which the others notice at once; none waits for a rank that is gone. What a rank finished before that is
not lost: beside each shard that waits for its turn lies its manifest entry, which the next run, with any number of
processes, checks and adopts.
"""

from __future__ import annotations

import json
import os
import queue
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any, cast

import torch

from activations_cache import errors
from activations_cache._job import Job, _facts, check_bytes, held_manifest
from activations_cache._shares import Commits, in_sight, run_part, writing
from activations_cache.errors import ActivationsCacheError, CacheMismatchError, ParallelError
from activations_cache.store import MANIFEST, ShardEntry

JOIN_TIMEOUT = timedelta(
    minutes=30
)  # for all ranks to arrive at the capture: they may load the model at various speeds
FOREVER = timedelta(days=365)  # a rank may be busy for long; one that died is noticed by its closed connection
GOODBYE_SECONDS = 60.0  # for the others to end their batch and leave, once the capture is over

_starts = 0  # process groups made here; each has keys of its own in the launcher's store


@dataclass(frozen=True)
class World:
    """The processes of one capture.

    Attributes:
        rank: This process's number, from 0.
        size: How many there are.
    """

    rank: int
    size: int


def world() -> World | None:
    """The processes that share a capture; None if this one is alone.

    They are those of torch.distributed's default group, or those that a launcher started (RANK and WORLD_SIZE, as
    torchrun and accelerate launch set them).
    """
    import torch.distributed as dist

    if not dist.is_available():
        return None
    if dist.is_initialized():
        found = World(dist.get_rank(), dist.get_world_size())
    elif "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        found = World(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))
    else:
        return None
    return found if found.size > 1 else None


def run(world: World, prepare: Callable[[], Job], resume: bool, progress: bool) -> None:
    """Do this rank's part of a capture; it ends when the cache is finished, or with an error on every rank.

    Args:
        world: From `world`.
        prepare: Makes the job; every rank must arrive at the same one.
        resume: As in `capture`.
        progress: Show a bar for all ranks, on rank 0.

    Raises:
        CacheMismatchError: The ranks were given different models, data or settings.
        ParallelError: Another rank's process is gone, or it raised an error that is none of this package's.
        ActivationsCacheError: Whatever a single process would raise; on the other ranks with the number of the rank.
    """
    with _linked(world) as links:
        if world.rank == 0:
            _lead(links, prepare, resume, progress)
        else:
            _follow(links, prepare)


# --- what ranks say to each other -----------------------------------------------------------------------------------

Message = dict[str, Any]
LAST = ("failed", "bye", "stop", "done")  # nothing follows these from their sender


class Links:
    """Messages between rank 0 and each other rank. A thread per peer reads them, so that sending never waits long.

    Attributes:
        world: The processes.
        failure: What another rank reported as the end of the capture, once it is known.
    """

    def __init__(self, world: World, group: Any) -> None:
        self.world, self._group = world, group
        self.failure: Message | None = None
        self._inbox: queue.Queue[Message] = queue.Queue()
        peers = range(1, world.size) if world.rank == 0 else [0]
        self._readers = {peer: threading.Thread(target=self._read, args=(peer,), daemon=True) for peer in peers}
        for thread in self._readers.values():
            thread.start()

    def send(self, peer: int, kind: str, **content: Any) -> None:
        """Send a message. One to a rank that is gone is dropped: its reader has noticed, or is about to."""
        import torch.distributed as dist

        text = bytearray(json.dumps({"kind": kind, "rank": self.world.rank, **content}).encode())
        with suppress(RuntimeError):
            dist.send(torch.tensor([len(text)]), dst=peer, group=self._group)
            dist.send(torch.frombuffer(text, dtype=torch.uint8), dst=peer, group=self._group)

    def tell(self, kind: str, **content: Any) -> None:
        """Send a message to every peer."""
        for peer in self._readers:
            self.send(peer, kind, **content)

    def receive(self, wait: bool = True) -> Message | None:
        """The next message; None if there is none yet and `wait` is False.

        Raises:
            ActivationsCacheError: A rank failed or died: of the class that it raised itself, if that is one of ours.
        """
        try:
            message = self._inbox.get(block=wait)
        except queue.Empty:
            return None
        if message["kind"] in ("failed", "stop", "lost"):
            self.failure = cast(Message, message.get("failure", message))
            raise _as_error(self.failure, self.world)
        return message

    def expect(self) -> Message:
        """Wait for the next message."""
        return cast(Message, self.receive())

    def rest(self) -> Iterator[Message]:
        """What has arrived and was not asked for yet."""
        with suppress(queue.Empty):
            while True:
                yield self._inbox.get(block=False)

    def _read(self, peer: int) -> None:
        kind = ""
        try:
            while kind not in LAST:
                size = int.from_bytes(self._bytes(peer, 8), sys.byteorder)
                message = json.loads(self._bytes(peer, size))
                kind = message["kind"]
                self._inbox.put(message)
        except RuntimeError as error:
            reason = str(error).splitlines()[0].rpartition("] ")[2]
            self._inbox.put({"kind": "lost", "rank": peer, "error": f"its process is gone ({reason})"})

    def _bytes(self, peer: int, count: int) -> bytes:
        import torch.distributed as dist

        buffer = torch.zeros(count, dtype=torch.uint8)
        received = dist.irecv(buffer, src=peer, group=self._group)
        assert received is not None  # it is None for ranks outside the group alone
        received.wait(FOREVER)
        return buffer.numpy().tobytes()

    def close(self) -> bool:
        """Wait for the readers to end; whether all did."""
        for thread in self._readers.values():
            thread.join(timeout=GOODBYE_SECONDS)
        return not any(thread.is_alive() for thread in self._readers.values())


def _as_error(message: Message, world: World) -> ActivationsCacheError:
    """What another rank's failure is on this one."""
    kind = getattr(errors, message.get("type", ""), ParallelError)
    error: ActivationsCacheError = kind(f"rank {message['rank']} of {world.size} failed: {message['error']}")
    error.add_note(
        "what was committed is intact; the same capture with resume=True, by any number of processes, goes on"
    )
    return error


def _failure(error: BaseException) -> Message:
    """What a rank says of its own failure."""
    if isinstance(error, ActivationsCacheError):
        return {"type": type(error).__name__, "error": str(error)}
    return {"error": f"{type(error).__name__}: {error}"}


@contextmanager
def _linked(world: World) -> Iterator[Links]:
    """A gloo group for this capture, on top of the default group, which is made and ended here if there is none."""
    import torch.distributed as dist

    own = not dist.is_initialized()
    try:
        if own:
            _start(world)
        group = dist.new_group(backend="gloo", timeout=JOIN_TIMEOUT)
    except (RuntimeError, ValueError) as error:
        raise ParallelError(
            f"rank {world.rank} of {world.size} could not reach the others ({error}). Every process of the group must "
            "call capture, with the same arguments"
        ) from error
    links = Links(world, group)
    try:
        yield links
    finally:
        if links.close():
            dist.destroy_process_group(group)
            if own:
                dist.destroy_process_group()


def _start(world: World) -> None:
    """Make a default group from what the launcher set, with keys of its own, so that it can be made more than once."""
    import torch.distributed as dist
    from torch.distributed.rendezvous import rendezvous

    global _starts
    _starts += 1
    store, rank, size = next(iter(rendezvous("env://", world.rank, world.size, timeout=JOIN_TIMEOUT)))
    keys = dist.PrefixStore(  # type: ignore[attr-defined]  # documented, and not in __all__
        f"activations-cache-{_starts}", store
    )
    dist.init_process_group("gloo", store=keys, rank=rank, world_size=size, timeout=JOIN_TIMEOUT)


# --- rank 0 ---------------------------------------------------------------------------------------------------------


def _lead(links: Links, prepare: Callable[[], Job], resume: bool, progress: bool) -> None:
    try:
        job = prepare()
        _all_agree(links, job)
        held = held_manifest(job, resume)
        if held is not None and held["finished"]:
            check_bytes(job, held, progress)
            links.tell("work", shards=[])
        else:
            with writing(job):
                _share(links, job, progress)
    except BaseException as error:
        links.tell("stop", failure=links.failure or {"rank": 0, **_failure(error)})
        raise
    links.tell("done")


def _all_agree(links: Links, job: Job) -> None:
    """Wait for every other rank's job; refuse to begin if one is another."""
    mine = job.manifest
    wrong = []
    for _ in range(links.world.size - 1):
        message = links.expect()
        rank, theirs = message["rank"], message["manifest"]
        if theirs["identity"] != mine["identity"]:
            wrong.append(f"rank {rank} differs from rank 0 in {', '.join(differing(mine, theirs))}")
        elif theirs["libraries"] != mine["libraries"] or theirs["machine"]["threads"] != mine["machine"]["threads"]:
            warnings.warn(
                f"rank {rank} runs other library versions or another number of threads than rank 0: its rows may "
                "differ from a single process's in the last bits of their floats",
                stacklevel=2,
            )
    if wrong:
        raise CacheMismatchError(
            f"the processes ask for different captures: {'; '.join(wrong)}. Give every process the same model, data "
            "and settings"
        )


def differing(mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    """The facts in which two manifests are of different captures, as JSON has them."""
    ours, other = (json.loads(json.dumps(_facts(manifest))) for manifest in (mine, theirs))
    return [name for name in ours if ours[name] != other.get(name)]


def _share(links: Links, job: Job, progress: bool) -> None:
    """Hand out what is left, do this rank's part of it, and commit every shard in the order of the plan."""
    commits = Commits(job, progress)
    todo = commits.missing()
    links.tell("work", shards=todo)

    def news(wait: bool = False) -> bool:
        message = links.receive(wait)
        if message is not None:
            commits.take(ShardEntry(**message["entry"]))
        return message is not None

    def between() -> None:
        while news():
            pass

    with commits.bar:
        try:
            run_part(job, todo[0 :: links.world.size], commits.take, between)
            while commits.left:
                news(wait=True)
        except ActivationsCacheError:
            if links.failure is not None:  # another's: what had been finished before it is committed still
                for message in [m for m in links.rest() if m["kind"] == "shard"]:
                    commits.take(ShardEntry(**message["entry"]))
            raise


# --- the other ranks ------------------------------------------------------------------------------------------------


def _follow(links: Links, prepare: Callable[[], Job]) -> None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # about the data: rank 0 gives them
            job = prepare()
        links.send(0, "ready", manifest=job.manifest)
        numbers = links.expect()["shards"]
        if numbers:
            in_sight(job, MANIFEST)
        part = numbers[links.world.rank :: links.world.size]
        run_part(
            job, part, lambda entry: links.send(0, "shard", entry=asdict(entry)), lambda: links.receive(wait=False)
        )
        links.expect()
    except BaseException as error:
        if links.failure is None:
            links.send(0, "failed", **_failure(error))
        else:
            links.send(0, "bye")
        raise
    links.send(0, "bye")
