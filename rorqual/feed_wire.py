"""The feed on the wire: its items and the command that asks for them, to protobuf messages and back.

Called by `rorqual.wire` alone, whose commands and reports these are parts of. What comes back is well formed (whole
keys, as many flags, within the bounds of `rorqual.feed`); whether it is true is for `kvstore.feed` to find out.
"""

from __future__ import annotations

from rorqual.errors import WireError
from rorqual.feed import (
    CONTENT_ENTRIES_MAX,
    KEY_BYTES,
    PART_ENTRIES_MAX,
    PARTS_MAX,
    Delta,
    Digest,
    FeedItem,
    SnapshotPart,
    Subscribe,
)
from rorqual.ids import Incarnation
from rorqual.v1 import worker_pb2 as pb


def subscribe_to_pb(command: Subscribe) -> pb.Subscribe:
    return pb.Subscribe(incarnation=command.incarnation, number=command.number)


def subscribe_from_pb(message: pb.Subscribe) -> Subscribe:
    return Subscribe(incarnation=Incarnation(message.incarnation), number=message.number)


def item_to_pb(item: FeedItem) -> pb.FeedItem:
    match item:
        case Delta():
            return pb.FeedItem(
                delta=pb.Delta(
                    incarnation=item.incarnation,
                    number=item.number,
                    digest=item.digest,
                    keys=item.keys,
                    changes=item.changes,
                )
            )
        case SnapshotPart():
            return pb.FeedItem(
                part=pb.SnapshotPart(
                    incarnation=item.incarnation,
                    number=item.number,
                    part=item.part,
                    num_parts=item.num_parts,
                    num_entries=item.num_entries,
                    digest=item.digest,
                    keys=item.keys,
                    flags=item.flags,
                )
            )
        case Digest():
            return pb.FeedItem(
                digest=pb.Digest(
                    incarnation=item.incarnation,
                    number=item.number,
                    num_entries=item.num_entries,
                    digest=item.digest,
                )
            )


def item_from_pb(message: pb.FeedItem) -> FeedItem:
    """Raises WireError."""
    match message.WhichOneof("item"):
        case "delta":
            return _delta_from_pb(message.delta)
        case "part":
            return _part_from_pb(message.part)
        case "digest":
            return _digest_from_pb(message.digest)
        case _:
            raise WireError("feed item is empty or of a kind this version does not know")


def _delta_from_pb(message: pb.Delta) -> Delta:
    _check_entries(message.keys, message.changes, "delta")
    if not message.changes or message.number == 0:
        raise WireError(f"delta {message.number} has {len(message.changes)} changes")
    return Delta(
        incarnation=Incarnation(message.incarnation),
        number=message.number,
        digest=message.digest,
        keys=message.keys,
        changes=message.changes,
    )


def _part_from_pb(message: pb.SnapshotPart) -> SnapshotPart:
    _check_entries(message.keys, message.flags, "snapshot part")
    _check_num_entries(message.num_entries)
    if not message.part < message.num_parts <= PARTS_MAX:
        raise WireError(f"snapshot has a part {message.part} of {message.num_parts}")
    if len(message.flags) > message.num_entries:
        raise WireError(f"snapshot of {message.num_entries} entries has {len(message.flags)} in one part")
    return SnapshotPart(
        incarnation=Incarnation(message.incarnation),
        number=message.number,
        part=message.part,
        num_parts=message.num_parts,
        num_entries=message.num_entries,
        digest=message.digest,
        keys=message.keys,
        flags=message.flags,
    )


def _digest_from_pb(message: pb.Digest) -> Digest:
    _check_num_entries(message.num_entries)
    return Digest(
        incarnation=Incarnation(message.incarnation),
        number=message.number,
        num_entries=message.num_entries,
        digest=message.digest,
    )


def _check_entries(keys: bytes, flags: bytes, what: str) -> None:
    if len(keys) != KEY_BYTES * len(flags):
        raise WireError(f"{what} has {len(keys)} bytes of keys and {len(flags)} of flags")
    if len(flags) > PART_ENTRIES_MAX:
        raise WireError(f"{what} has {len(flags)} entries; at most {PART_ENTRIES_MAX} are allowed")


def _check_num_entries(num_entries: int) -> None:
    if num_entries > CONTENT_ENTRIES_MAX:
        raise WireError(f"feed claims {num_entries} entries; at most {CONTENT_ENTRIES_MAX} are allowed")
