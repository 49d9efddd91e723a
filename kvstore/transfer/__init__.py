"""One-sided reads between workers: whoever computed state exports its memory, whoever needs it reads it.

`contract` says what an engine of transfers is; `nixl` and `shm` are the two there are. Used by the rank, which owns the
memory. Nothing here decides what is read or whether it may be: leases do (`kvstore.leases`).
"""
