-- Takes from all subjects, or from none. Returns a TakeResult (store.py).

local cost, refusal, longest = body.cost, nil, -1

local function refuse(index, limit, wait)
  if wait > longest then
    longest = wait
    refusal = { subject = index - 1, limit = limit, wait = wait < math.huge and wait or nil }
  end
end

local accounts, usages = {}, {}
for index, subject in ipairs(body.subjects) do
  local account = load(index, subject.limits)
  accounts[index] = account
  account.hold = redis.call('HGET', account.key, 'hold:' .. body.id)
  if account.rate and not account.hold then
    local over = account.requests + 1 - math.max(1, account.rate)
    if over > ROUNDING then refuse(index, 'requests_per_second', over / account.rate) end
  end
  if account.concurrent and not account.hold and account.running >= account.concurrent then
    refuse(index, 'concurrent', CONCURRENT_WAIT)
  end
  if account.per_minute then
    local over, limit = account.owed + account.held + cost - account.per_minute, account.per_minute
    if over > ROUNDING then
      refuse(index, 'tokens_per_minute', cost <= limit and over * MINUTE / limit or math.huge)
    end
  end
  if account.per_day and account.day_used + cost > account.per_day then
    refuse(index, 'tokens_per_day', cost <= account.per_day and (account.day + 1) * DAY - now or math.huge)
  end
end

for index, account in ipairs(accounts) do
  if not refusal then
    local left, total, day_cost = cost, cost, cost
    if account.hold then
      local shrink, held, had, day, had_that_day = unpack_hold(account.hold)
      left, total = left + held * math.exp(account.shrink - shrink), total + had
      if day == account.day then day_cost = day_cost + had_that_day end
    end
    local hold = { exactly(account.shrink), exactly(left), exactly(total), account.day, exactly(day_cost) }
    redis.call('HSET', account.key, 'hold:' .. body.id, table.concat(hold, ' '))
    redis.call('ZADD', account.places, exactly(now + lease), body.id)
    redis.call('EXPIRE', account.places, math.ceil(lease) + 1)
    if not account.hold then
      account.running = account.running + 1
      if account.rate then account.requests = account.requests + 1 end
    end
    if account.per_minute then account.held = account.held + cost end
    if account.per_day then account.day_used = account.day_used + cost end
  end
  save(account)
  usages[index] = {
    requests = account.requests, concurrent = account.running,
    tokens = account.owed + account.held, day = account.day_used,
  }
end

return cmsgpack.pack({ now = now, usages = usages, refusal = refusal })
