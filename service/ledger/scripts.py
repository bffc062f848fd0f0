"""What Redis runs as one step each: the ledger's scripts, in Lua."""

from __future__ import annotations

# `last`: the last generated id, which outlives its entry, and the link of the last entry that is there.
_LAST = """
local function last(key)
  if redis.call('EXISTS', key) == 0 then return {'0-0', '', '0-0'} end
  local id
  local info = redis.call('XINFO', 'STREAM', key)
  for i = 1, #info, 2 do
    if info[i] == 'last-generated-id' then id = info[i + 1] end
  end
  local entry = redis.call('XREVRANGE', key, '+', '-', 'COUNT', 1)[1]
  if not entry then return {id, '', '0-0'} end
  for i = 1, #entry[2], 2 do
    if entry[2][i] == 'chain' then return {id, entry[2][i + 1], entry[1]} end
  end
  return {id, '', entry[1]}
end
"""

# KEYS: entries, snapshot. Answers what is last, and whether there is a snapshot.
READ_LAST = _LAST + "local found = last(KEYS[1]); found[4] = redis.call('EXISTS', KEYS[2]); return found"

# KEYS: entries, factors. ARGV: the id and the link before the first, the sequences whose factors must be there, then
# id, entry, link and factors of each. Answers nothing when all are stored, the sequence of factors that were dropped
# meanwhile, else what is last. Entries that are already there count as stored, of which the
# last link, which stands for all before it, is proof: a writer that lost the reply may ask again, even after others
# have appended to it. Factors come first: Redis takes nothing back where a later command is refused, and factors
# without an entry do no harm.
APPEND = (
    _LAST
    + """
local actual = last(KEYS[1])
if actual[1] == ARGV[1] and (actual[1] == '0-0' or actual[2] == ARGV[2]) then
  for sequence in string.gmatch(ARGV[3], '%d+') do
    if redis.call('HEXISTS', KEYS[2], sequence) == 0 then return tonumber(sequence) end
  end
  for i = 4, #ARGV, 4 do
    if ARGV[i + 3] ~= '' then
      redis.call('HSET', KEYS[2], string.match(ARGV[i], '^%d+'), ARGV[i + 3])
    end
    redis.call('XADD', KEYS[1], ARGV[i], 'entry', ARGV[i + 1], 'chain', ARGV[i + 2])
  end
  return false
end
local id, chain = ARGV[#ARGV - 3], ARGV[#ARGV - 1]
local stored = redis.call('XRANGE', KEYS[1], id, id)[1]
if stored then
  for i = 1, #stored[2], 2 do
    if stored[2][i] == 'chain' and stored[2][i + 1] == chain then return false end
  end
end
return actual
"""
)

# KEYS: entries, factors, snapshot. ARGV: id and link of the last entry of the snapshot, the snapshot, then the factors
# to drop. That entry stays in the stream, so that the stream still ends in a link. The factors go first, which makes
# room in a Redis that is full. Answers how many they were; -1, with nothing done, if there are any and the stream has
# gone on, since what came may need them; or nothing if the stream no longer has that entry: then somebody else has
# compacted it further.
COMPACT = (
    _LAST
    + """
local stored = redis.call('XRANGE', KEYS[1], ARGV[1], ARGV[1])[1]
if not stored then return false end
for i = 1, #stored[2], 2 do
  if stored[2][i] == 'chain' and stored[2][i + 1] ~= ARGV[2] then return false end
end
if #ARGV > 3 and last(KEYS[1])[1] ~= ARGV[1] then return -1 end
local dropped = 0
for i = 4, #ARGV do dropped = dropped + redis.call('HDEL', KEYS[2], ARGV[i]) end
redis.call('SET', KEYS[3], ARGV[3])
redis.call('XTRIM', KEYS[1], 'MINID', ARGV[1])
return dropped
"""
)

# KEYS: factors. ARGV: sequence and factors, of each that is to be there again.
PUT_BACK = "redis.call('HSET', KEYS[1], unpack(ARGV))"

# KEYS: a stream. A write that changes nothing: WAITAOF waits only for what its own connection wrote, and what is
# written last stands for all before it, whoever wrote that. Allowed where Redis is out of memory: what is there can
# still be read and be asked for again.
TOUCH = """#!lua flags=allow-oom
if redis.call('EXISTS', KEYS[1]) == 0 then return false end
local info = redis.call('XINFO', 'STREAM', KEYS[1])
for i = 1, #info, 2 do
  if info[i] == 'last-generated-id' then return redis.call('XSETID', KEYS[1], info[i + 1]) end
end
"""

# KEYS: replicas. ARGV: id, what it says of itself, and the milliseconds after which it is forgotten. The ids are times.
ANNOUNCE = """
local now = redis.call('XADD', KEYS[1], '*', 'id', ARGV[1], 'said', ARGV[2])
local oldest = string.match(now, '^%d+') - ARGV[3]
redis.call('XTRIM', KEYS[1], 'MINID', string.format('%.0f', oldest))
"""

# The same, and answers what all have said since.
LIST = ANNOUNCE + "return redis.call('XRANGE', KEYS[1], '-', '+')"
