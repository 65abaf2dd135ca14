-- Renews the leases of the reservations that body lists, one for each pair of keys, unless they ended.

for index, id in ipairs(body) do
  local key, places = KEYS[2 * index - 1], KEYS[2 * index]
  redis.call('ZADD', places, 'XX', exactly(now + lease), id)
  for _, kept in ipairs({ key, places }) do
    if redis.call('TTL', kept) < lease + 1 then redis.call('EXPIRE', kept, math.ceil(lease) + 1) end
  end
end
