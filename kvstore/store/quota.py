"""How many bytes a tenant may have in the store: an account of each tenant, in Redis. No torch.

Used by `kvstore.store.writing`, only where a deployment sets a quota. The account of a tenant is a sorted set: for each
value a member `<name>|<bytes>` whose score is when the value expires, by the server's clock; and a member `total` whose
score is minus the bytes of all of them. One key: the sum and what it sums live, move and die together. A script adds to
it before values are written, so that two workers cannot both take the last room.

Bounds. Counted are at least the bytes that were written and live, so a tenant never has more than its quota, except:
- values written while no quota was set are not counted until they are written again;
- a server that loses an account (evicts it, restarts empty) while others keep the values forgets them: at most a second
  quota, until they expire;
- a value whose write takes longer than two of the longest round trips may be taken for gone by a correction, and is
  then not counted.
Counted too much, and so refused too early, is what the server evicted by itself or somebody deleted, until it would
have expired. That is corrected when it matters: whenever a value is refused, at most once in `CORRECT_SECONDS`, the
`CORRECT_VALUES` that expire first are looked for, and those that are gone are given back. A server evicts what was used
longest ago, which is about what expires first. Expired values are given back by the next write, up to 1000 at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kvstore.store.connections import Command
from kvstore.store.contract import TenantLabel
from kvstore.store.names import account_name

CORRECT_SECONDS = 1.0
CORRECT_VALUES = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """A value in an account."""

    name: bytes
    num_bytes: int
    is_present: bool  # it is stored already: it is counted whatever the quota says

    @property
    def member(self) -> bytes:
        return b"%b|%d" % (self.name, self.num_bytes)


_CHARGE = """
local now = redis.call('TIME')
now = now[1] * 1000 + math.floor(now[2] / 1000)
local account, quota, ttl = KEYS[1], tonumber(ARGV[1]), tonumber(ARGV[2])
for _, member in ipairs(redis.call('ZRANGEBYSCORE', account, '(0', now, 'LIMIT', 0, 1000)) do
  redis.call('ZREM', account, member)
  redis.call('ZINCRBY', account, tonumber(string.match(member, '|(%d+)$')), 'total')
end
local total = -tonumber(redis.call('ZSCORE', account, 'total') or 0)
local answer = {}
for i = 3, #ARGV, 2 do
  local member, present = ARGV[i], ARGV[i + 1] == '1'
  local size = tonumber(string.match(member, '|(%d+)$'))
  if redis.call('ZSCORE', account, member) then
    answer[#answer + 1] = 1
  elseif present or total + size <= quota then
    total = total + size
    answer[#answer + 1] = 2
  else
    answer[#answer + 1] = 0
  end
  if answer[#answer] > 0 then redis.call('ZADD', account, now + ttl, member) end
end
redis.call('ZADD', account, -total, 'total')
redis.call('PEXPIRE', account, ttl + 60000)
return answer
"""

_GIVE_BACK = """
for _, member in ipairs(ARGV) do
  if redis.call('ZREM', KEYS[1], member) == 1 then
    redis.call('ZINCRBY', KEYS[1], tonumber(string.match(member, '|(%d+)$')), 'total')
  end
end
return 0
"""

_FIRST_TO_EXPIRE = """
local now = redis.call('TIME')
now = now[1] * 1000 + math.floor(now[2] / 1000)
return redis.call('ZRANGEBYSCORE', KEYS[1], '(0', now + ARGV[1], 'LIMIT', 0, ARGV[2])
"""

REFUSED, COUNTED, ADDED = 0, 1, 2
"""What `charge` answers for each entry: no room; counted before; counted from now on."""


def charge(tenant: TenantLabel, entries: Sequence[Entry], *, bytes_max: int, ttl_seconds: float) -> Command:
    """Count entries that will live for `ttl_seconds` from now. Answers a list, one number each."""
    arguments = [part for item in entries for part in (item.member, int(item.is_present))]
    account = account_name(tenant)
    return ("EVAL", _CHARGE, 1, account, bytes_max, int(ttl_seconds * 1000), *arguments)


def give_back(tenant: TenantLabel, members: Sequence[bytes]) -> Command:
    """Count these no more."""
    return ("EVAL", _GIVE_BACK, 1, account_name(tenant), *members)


def first_to_expire(tenant: TenantLabel, *, ttl_seconds: float, settled_seconds: float) -> Command:
    """Answers members, none of which was charged less than `settled_seconds` ago: those may not be written yet."""
    age = int((ttl_seconds - settled_seconds) * 1000)
    return ("EVAL", _FIRST_TO_EXPIRE, 1, account_name(tenant), age, CORRECT_VALUES)


def member_name(member: bytes) -> bytes:
    return member.rpartition(b"|")[0]
