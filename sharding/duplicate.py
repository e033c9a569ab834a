"""An object's second name in the same store, without its bytes leaving the store where it can."""

import os
from contextlib import suppress

from sharding.store import TEMPORARY_PREFIX, LocalStore, Store

_PIECE = 16 << 20
_MOST_AT_ONCE = 5 << 30  # what S3 copies in one request


def duplicate(store: Store, source: str, target: str) -> None:
    """Let `target` be what `source` is now, whatever becomes of `source`.

    A link on a file system, a copy by the service on S3 (up to 5 GiB), else its bytes are read and
    written. `target` appears whole, replacing one of the same name, or stays as it was. Raises
    FileNotFoundError if there is no source, else the store's errors.
    """
    if isinstance(store, LocalStore) and _link(store, source, target):
        return
    if store.url.startswith("s3://") and _copy_by_service(store, source, target):
        return
    blob = store.open(source)
    with store.create(target) as stream:
        for at in range(0, blob.size, _PIECE):
            stream.write(blob.read_at(at, min(_PIECE, blob.size - at)))


def _link(store: LocalStore, source: str, target: str) -> bool:
    temporary = store.root / f"{TEMPORARY_PREFIX}{os.getpid()}-{target}"
    temporary.unlink(missing_ok=True)
    try:
        os.link(store.root / source, temporary)
    except FileNotFoundError:
        raise
    except OSError:  # a file system without links
        return False
    try:
        os.replace(temporary, store.root / target)
    finally:
        with suppress(FileNotFoundError):
            temporary.unlink()
    return True


def _copy_by_service(store: Store, source: str, target: str) -> bool:
    from sharding.s3 import S3Store  # noqa: PLC0415  (boto3 is optional, and slow to import)

    assert isinstance(store, S3Store)
    if store.open(source).size > _MOST_AT_ONCE:
        return False
    bucket, key = store.bucket, store.key(source)
    store.service.ask(
        f"copy {store.url}/{source} to {target}",
        lambda s3: s3.copy_object(
            Bucket=bucket, Key=store.key(target), CopySource={"Bucket": bucket, "Key": key}
        ),
    )
    return True
