-- Stands before reserve.lua, settle.lua and renew.lua. An account as buckets.py has it, which explains it; a test
-- compares the two. KEYS: for each subject its account (a hash) and its places (reservations, sorted by when their
-- leases end).

local MINUTE, DAY, CONCURRENT_WAIT, ROUNDING, EMPTY = 60, 86400, 1, 1e-6, -60

local arguments = cmsgpack.unpack(ARGV[1])
local body, lease = arguments.body, arguments.lease
local now = arguments.now
if not now then
  local time = redis.call('TIME')
  now = time[1] + time[2] / 1e6
end

local function exactly(number)
  return string.format('%.17g', number)
end

-- As buckets.py's Hold.
local function unpack_hold(hold)
  local fields = {}
  for field in string.gmatch(hold, '%S+') do fields[#fields + 1] = tonumber(field) end
  return unpack(fields)
end

local function settle(account, id, used)
  redis.call('ZREM', account.places, id)
  local hold = redis.call('HGET', account.key, 'hold:' .. id)
  if not hold then return end
  redis.call('HDEL', account.key, 'hold:' .. id)
  local shrink, held, cost, day, day_cost = unpack_hold(hold)
  used = used or cost
  if account.per_minute then
    local left = held * math.exp(account.shrink - shrink)
    account.owed = account.owed + math.max(used - (cost - left), 0)
    account.held = redis.call('ZCARD', account.places) > 0 and math.max(account.held - left, 0) or 0
  end
  if account.per_day and day == account.day then
    account.day_used = math.max(account.day_used + math.max(used - (cost - day_cost), 0) - day_cost, 0)
  end
end

local function drain(account, amount)
  local paid = math.min(account.owed, amount)
  account.owed = account.owed - paid
  amount = amount - paid
  if amount == 0 or account.held == 0 then return end
  local left = math.max(account.held - amount, 0)
  account.shrink = account.shrink + (left > 0 and math.max(math.log(left / account.held), EMPTY) or EMPTY)
  account.held = left
end

local function load(index, limits)
  local key = KEYS[2 * index - 1]
  local found = redis.call('HMGET', key, 'at', 'requests', 'owed', 'held', 'shrink', 'day', 'day_used')
  local today = math.floor(now / DAY)
  local account = {
    key = key, places = KEYS[2 * index],
    rate = limits.requests_per_second, concurrent = limits.concurrent,
    per_minute = limits.tokens_per_minute, per_day = limits.tokens_per_day,
    requests = tonumber(found[2]) or 0, owed = tonumber(found[3]) or 0, held = tonumber(found[4]) or 0,
    shrink = tonumber(found[5]) or 0, day = tonumber(found[6]) or today, day_used = tonumber(found[7]) or 0,
  }
  local seconds = math.max(now - (tonumber(found[1]) or now), 0)
  account.requests = account.rate and math.max(account.requests - account.rate * seconds, 0) or 0
  if account.per_minute then
    drain(account, account.per_minute / MINUTE * seconds)
  else
    account.owed, account.held = 0, 0
  end
  if today ~= account.day or not account.per_day then
    account.day, account.day_used = today, 0
  end
  -- Nobody knows what was used under a lease that was not renewed: all.
  for _, id in ipairs(redis.call('ZRANGEBYSCORE', account.places, '-inf', exactly(now))) do
    settle(account, id)
  end
  account.running = redis.call('ZCARD', account.places)
  return account
end

-- Seconds until nothing would be lost with it.
local function needed_for(account)
  local seconds = lease
  if account.rate then seconds = math.max(seconds, account.requests / account.rate) end
  if account.per_minute then
    seconds = math.max(seconds, (account.owed + account.held) * MINUTE / account.per_minute)
  end
  if account.per_day then seconds = math.max(seconds, (account.day + 1) * DAY - now) end
  return math.min(math.ceil(seconds), 366 * DAY) + 1
end

local function save(account)
  redis.call('HSET', account.key, 'at', exactly(now), 'requests', exactly(account.requests),
    'owed', exactly(account.owed), 'held', exactly(account.held), 'shrink', exactly(account.shrink),
    'day', account.day, 'day_used', exactly(account.day_used))
  redis.call('EXPIRE', account.key, needed_for(account))
end
