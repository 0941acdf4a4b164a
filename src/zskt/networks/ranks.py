"""One run over several processes, the ranks: each works on an equal share of every batch, and all end up the same.

torchrun starts them and the command line joins them. In a single process everything here returns what it was given.
Losses are averages over a batch: each rank's loss is that of its share, `average_` makes gradients those of the whole
batch, and what is no average, such as the moments of a batch, is put together by `gather`, which has a gradient.

R ranks, N batch, N / R share.
"""

import contextlib
import datetime
import hashlib
import json
import os
import socket
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from zskt.errors import UsageError, ZsktError, failing, short

PATIENCE = datetime.timedelta(minutes=30)
"""How long a rank waits for the others: evaluation is rank 0's alone."""
MEETING = datetime.timedelta(minutes=5)
"""How long it waits for them to appear."""

_joined = False
_restarts = 0


def size() -> int:
    """The number of ranks, R; 1 in a single process."""
    return dist.get_world_size() if _joined else 1


def rank() -> int:
    """This process's number, from 0."""
    return dist.get_rank() if _joined else 0


def is_main() -> bool:
    """Whether this is the rank that logs, saves and evaluates."""
    return not _joined or dist.get_rank() == 0


def started() -> bool:
    """Whether this process was started as one of several, by torchrun or with the same environment."""
    return "RANK" in os.environ and "MASTER_ADDR" in os.environ and os.environ.get("WORLD_SIZE", "1") != "1"


def restarted() -> bool:
    """Whether torchrun has started these processes anew, as one of them had died."""
    return _joined and _restarts > 0


@contextlib.contextmanager
def joined() -> Iterator[None]:
    """Inside, the processes that torchrun started work on one run; nothing in a process that is alone.

    Raises ZsktError if they cannot find one another.
    """
    global _joined, _restarts
    if not started():
        yield
        return
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if torch.cuda.is_available():
        if local >= torch.cuda.device_count():
            raise ZsktError(
                f"expected a GPU for each process of this machine, found {torch.cuda.device_count()}; start as many "
                "processes, or hide the GPUs with CUDA_VISIBLE_DEVICES="
            )
        torch.cuda.set_device(local)
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    place = f"{os.environ['MASTER_ADDR']}:{os.environ.get('MASTER_PORT')}"
    with failing(f"the processes cannot meet at {place}", "check address and port", kinds=(RuntimeError, ValueError)):
        store, number, count = next(rendezvous("env://", timeout=MEETING))
        attempt, _restarts = meet(store, number, count)
        dist.init_process_group(
            backend, store=PrefixStore(attempt, store), rank=number, world_size=count, timeout=PATIENCE
        )
    _joined = True
    try:
        yield
    finally:
        _joined = False
        dist.destroy_process_group()


def meet(store: Store, number: int, count: int) -> tuple[str, int]:
    """A name that all ranks have for this attempt, and how often one of them has been started anew.

    The store may outlive processes that died, and hold their addresses; and torchrun does not count every new start on
    every machine. So each rank leaves a word of its own, rank 0 publishes all words until every rank has found its
    newest among them, and their hash is the name. Raises RuntimeError if they do not meet in time.
    """
    mine = f"{uuid.uuid4().hex} {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    store.set(f"word {number}", mine)
    give_up = time.monotonic() + MEETING.total_seconds()
    words: list[str] = []
    while time.monotonic() < give_up:
        if number == 0:
            words = [_read(store, f"word {each}") for each in range(count)]
            store.set("words", "\n".join(words))
        else:
            words = _read(store, "words").split("\n")
        name = hashlib.sha256("\n".join(words).encode()).hexdigest()
        if len(words) == count and words[number] == mine:
            store.set(f"agreed {number}", name)
        if number == 0 and all(_read(store, f"agreed {each}") == name for each in range(count)):
            store.set("attempt", name)
        if _read(store, "attempt") == name and words[number] == mine:
            return name, max(int(word.split()[1]) for word in words)
        time.sleep(0.02)
    raise RuntimeError(f"{sum(map(bool, words))} of {count} came within {MEETING.total_seconds() / 60:g} minutes")


def _read(store: Store, key: str) -> str:
    """What a store has for a key, empty if nothing, without waiting."""
    return store.get(key).decode() if store.check([key]) else ""


def lost(error: BaseException) -> bool:
    """Whether an error is that of a connection to another process, which has ended or does not answer."""
    words = "gloo", "nccl", "connection", "timed out"
    return _joined and (isinstance(error, dist.DistError) or any(word in str(error).lower() for word in words))


def reports_failure() -> bool:
    """Whether this rank is the one to tell the user why all of them end: rank 0 if it fails, too, else the first."""
    if not _joined:
        return True
    store = dist.distributed_c10d._get_default_store()
    give_up = time.monotonic() + (0 if is_main() else 2)
    with contextlib.suppress(RuntimeError):  # the store is gone, and with it the rank that spoke
        while time.monotonic() < give_up and not store.check(["failed"]):
            time.sleep(0.05)
        return store.compare_set("failed", "", str(rank())) == str(rank()).encode()
    return False


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Inside, this rank counts as the only one: for what it does while the others wait."""
    global _joined
    before, _joined = _joined, False
    try:
        yield
    finally:
        _joined = before


def beside() -> int:
    """How many of the ranks share this machine's memory."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if size() > 1 else 1


def check_divides(**batches: int) -> None:
    """Raise UsageError unless every rank gets an equal share of the batches."""
    for name, count in batches.items():
        if count % size():
            raise UsageError(f"{name} = {count}: expected a multiple of the {size()} processes; change one of them")


def check_device(name: str) -> None:
    """Raise UsageError for one GPU that all ranks would share."""
    if size() > 1 and name.startswith("cuda:"):
        raise UsageError(f"device {name}: expected auto, cpu or cuda, as each of {size()} processes has its own GPU")


def own(batch: Tensor) -> Tensor:
    """This rank's share (N / R, ...) of a batch (N, ...) that all ranks have."""
    share = len(batch) // size()
    return batch[rank() * share :][:share]


def whole(share: Tensor, dim: int = 0) -> Tensor:
    """The batch whose shares the ranks have, put together along `dim`; no gradient."""
    if size() == 1:
        return share
    shares = [torch.empty_like(share, memory_format=torch.contiguous_format) for _ in range(size())]
    dist.all_gather(shares, share.contiguous())
    return torch.cat(shares, dim)


def fetch(rows: Tensor, owner: Tensor, place: Tensor) -> Tensor:
    """This rank's share (N / R, ...) of rows that lie on several ranks: the n-th is `place[n]` of rank `owner[n]`.

    `owner` and `place` (N,) are the same on all ranks; `rows` (M, ...) are this rank's own.
    """
    if size() == 1:
        return rows[place]
    here = owner == rank()  # (N,)
    found = rows[torch.where(here, place, 0)]  # (N, ...)
    found = found.masked_fill(~here.view(-1, *[1] * (rows.ndim - 1)), 0).contiguous()
    dist.all_reduce(found.view(torch.uint8))  # all others are zeros: exact for any type
    return own(found)


class _Gather(torch.autograd.Function):
    """Every rank's tensor, in order. Backward adds up what all ranks ask of this one's."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return whole(x.unsqueeze(0))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        gradient = gradient.contiguous()
        dist.all_reduce(gradient)
        return gradient[rank()]


def gather(x: Tensor) -> Tensor:
    """Every rank's tensor (...), in order: (R, ...), with a gradient.

    Each rank's loss then depends on all ranks' tensors. The gradient here is that of the *sum* of their losses, so that
    `average_`, which divides by R, leaves that of their mean.
    """
    if size() == 1:
        return x.unsqueeze(0)
    gathered: Tensor = _Gather.apply(x)  # type: ignore[no-untyped-call]
    return gathered


def moments(mean: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance (C,) of a batch, from those of this rank's share, with a gradient."""
    means, variances = gather(torch.stack([mean, variance])).unbind(1)  # (R, C) each
    middle = means.mean(dim=0)
    return middle, variances.mean(dim=0) + (means - middle).square().mean(dim=0)


def average_(tensors: Sequence[Tensor]) -> None:
    """Replace tensors of one device by their averages over the ranks, in one message for each type."""
    if size() == 1:
        return
    for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
        chosen = [tensor for tensor in tensors if tensor.dtype == dtype]
        flat = torch.cat([tensor.reshape(-1) for tensor in chosen])
        dist.all_reduce(flat)
        for tensor, new in zip(chosen, torch.split(flat.div_(size()), [each.numel() for each in chosen]), strict=True):
            tensor.copy_(new.view_as(tensor))


def most(number: int) -> int:
    """The largest of the ranks' numbers."""
    if size() == 1:
        return number
    found = torch.tensor(number)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return int(found)


def everyone(value: Any) -> list[Any]:
    """The JSON value of each rank, in order, on all ranks."""
    if size() == 1:
        return [value]
    text = json.dumps(value).encode()
    letters = torch.frombuffer(bytearray(text.ljust(most(len(text)))), dtype=torch.uint8)
    return [json.loads(bytes(row.tolist())) for row in whole(letters.unsqueeze(0))]


def from_main(make: Callable[[], Any]) -> Any:
    """What rank 0 makes, a JSON value, on all ranks; the others wait for it."""
    if size() == 1:
        return make()
    made = None
    if is_main():
        with alone():
            made = make()
    return everyone(made)[0]


def check_same(facts: Mapping[str, str]) -> None:
    """Raise ZsktError, on all ranks, unless all of them have the same facts."""
    found = everyone({**facts, "host": socket.gethostname()})
    for number, theirs in enumerate(found):
        for name in facts:
            if theirs[name] != found[0][name]:
                there, here = (f"process {k} on {found[k]['host']}" for k in (number, 0))
                raise ZsktError(
                    f"{there} has {name} {short(theirs[name])}, {here} {short(found[0][name])}; start all of them with "
                    "the same command, files and version"
                )


@torch.no_grad()
def copy_from_main(module: nn.Module) -> None:
    """Give a network the weights and buffers that it has on rank 0."""
    if size() == 1:
        return
    for tensor in (*module.parameters(), *module.buffers()):
        same = tensor.contiguous()
        dist.broadcast(same, 0)
        tensor.copy_(same)
