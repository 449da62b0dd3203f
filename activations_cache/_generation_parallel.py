"""Generation into one folder by several processes: torchrun, accelerate launch, or a process group that is there.

Every process calls `generate` with the same arguments. Rank 0 holds the folder's lock and writes its manifest; each
rank generates whole batches of the one plan and commits them itself, for a batch file is complete in itself. So the
result is that of a single process, and what is lost with a process is the batch that it was at.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

from activations_cache import store
from activations_cache._generation_plan import Plan
from activations_cache._generation_run import bar_of, batches_of, differences, opened
from activations_cache._generations import Generations, batch_file, read_folder, write_batch
from activations_cache._parallel import Links, World, _failure, _linked
from activations_cache.errors import CacheError, CacheMismatchError

SIGHT_SECONDS = 60.0  # until another machine's file is seen: clients of network filesystems cache names


def run_shared(world: World, prepare: Callable[[], Plan], folder: Path, resume: bool, progress: bool) -> Generations:
    """Do this rank's part of a run; every rank returns all of it.

    Args:
        world: The processes.
        prepare: Makes the plan; every rank must arrive at the same one.
        folder: Of the generations, on a filesystem that all share.
        resume: As in `generate`.
        progress: Show a bar over all ranks, on rank 0.

    Raises:
        CacheMismatchError: The ranks were given different models, prompts or settings.
        ParallelError: Another rank's process is gone, or it raised an error that is none of this package's.
        ActivationsCacheError: Whatever a single process would raise; on the other ranks with the number of the rank.
    """
    with _linked(world) as links:
        plan = _lead(links, prepare, folder, resume, progress) if world.rank == 0 else _follow(links, prepare, folder)
    _in_sight([folder / batch_file(number) for number in range(len(plan.batches))])
    return read_folder(folder)


def _lead(links: Links, prepare: Callable[[], Plan], folder: Path, resume: bool, progress: bool) -> Plan:
    try:
        plan = prepare()
        _all_agree(links, plan)
        with opened(plan, folder, resume) as missing, bar_of(plan, missing, progress) as bar:
            links.tell("work", batches=missing)
            left = set(missing)

            def news(wait: bool = False) -> bool:
                message = links.receive(wait)
                if message is not None:
                    left.discard(message["batch"])
                    bar.update(len(plan.batches[message["batch"]]))
                return message is not None

            for number, rows in batches_of(plan, missing[0 :: links.world.size], bar.update):
                write_batch(folder, plan.identity, number, rows)
                left.discard(number)
                while news():
                    pass
            while left:
                news(wait=True)
    except BaseException as error:
        links.tell("stop", failure=links.failure or {"rank": 0, **_failure(error)})
        raise
    links.tell("done")
    return plan


def _all_agree(links: Links, plan: Plan) -> None:
    """Wait for every other rank's plan; refuse to begin if one is another."""
    wrong = []
    for _ in range(links.world.size - 1):
        message = links.expect()
        if message["identity"] != plan.identity:
            wrong.append(f"rank {message['rank']}: {differences(plan.manifest['facts'], message['facts'])}")
    if wrong:
        raise CacheMismatchError(
            f"the processes ask for different generations ({'; '.join(wrong)}). Give every process the same model, "
            "prompts and settings"
        )


def _follow(links: Links, prepare: Callable[[], Plan], folder: Path) -> Plan:
    try:
        plan = prepare()
        links.send(0, "ready", identity=plan.identity, facts=plan.manifest["facts"])
        numbers = links.expect()["batches"]
        if numbers:
            _in_sight([folder / store.MANIFEST])
        for number, rows in batches_of(plan, numbers[links.world.rank :: links.world.size]):
            links.receive(wait=False)  # raises if another rank has failed; "done" cannot come before this batch is told
            write_batch(folder, plan.identity, number, rows)
            links.send(0, "batch", batch=number)
        links.expect()
    except BaseException as error:
        if links.failure is None:
            links.send(0, "failed", **_failure(error))
        else:
            links.send(0, "bye")
        raise
    links.send(0, "bye")
    return plan


def _in_sight(paths: Sequence[Path]) -> None:
    """Wait until files that other processes have written are there.

    Raises:
        CacheError: One does not appear: the processes do not share a directory.
    """
    until = time.monotonic() + SIGHT_SECONDS
    for path in paths:
        while not path.is_file():
            if time.monotonic() > until:
                raise CacheError(
                    f"{path}, which another process has written, cannot be seen here: all processes must write to one "
                    "directory, on a filesystem that they share"
                )
            time.sleep(0.02)
