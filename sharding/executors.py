"""Where the shards of a plan are made: this process, processes of this machine, a Dask cluster."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, as_completed
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, TypeVar

from sharding.errors import UsageError
from sharding.process import worker_pool

T = TypeVar("T")
R = TypeVar("R")

Map = Callable[[Callable[[T], R], list[T]], Iterator[R]]
"""Like `map`, but results come in the order in which they are done."""

CONNECT_S = 30


@contextmanager
def open_map(*, workers: int, cluster: str | None = None) -> Iterator[Map[Any, Any]]:
    """The `map` to pack with; after an error the tasks begun are finished, no others are started.

    cluster: a Dask scheduler's address (tcp://host:8786), or 'local' for Dask's own cluster of
    `workers` processes on this machine; None: this machine without Dask. Dask starts the task of a
    lost worker again on another one. Raises UsageError where there is no scheduler,
    ChildProcessError when a worker was killed (with Dask: three times at the same shard).
    """
    if cluster is None and workers == 1:
        yield map
        return
    pool = worker_pool(workers) if cluster is None else _dask(cluster, workers)
    with pool as executor:
        yield partial(_map, executor)


def _map(executor: Executor, work: Callable[[T], R], tasks: Iterable[T]) -> Iterator[R]:
    futures = [executor.submit(work, task) for task in tasks]
    try:
        for future in as_completed(futures):
            yield future.result()
    finally:
        for future in futures:
            future.cancel()


@contextmanager
def _dask(cluster: str, workers: int) -> Iterator[Executor]:
    try:
        import distributed  # noqa: PLC0415 (an extra)
    except ImportError as error:
        raise UsageError("--cluster needs Dask: pip install 'shardstream[dask]'") from error
    with ExitStack() as stack:
        try:
            address = cluster
            if cluster == "local":
                local = distributed.LocalCluster(  # type: ignore[no-untyped-call]
                    n_workers=workers, threads_per_worker=1, dashboard_address=None
                )
                address = stack.enter_context(local)
            client: Any = distributed.Client(address, timeout=CONNECT_S)  # type: ignore[no-untyped-call]
            stack.enter_context(client)
        except (OSError, ValueError) as error:
            raise UsageError(f"cannot reach a Dask scheduler at {cluster}: {error}") from error
        try:
            yield client.get_executor()
        except distributed.KilledWorker as error:
            raise ChildProcessError(f"Dask gave up: {error}") from error
