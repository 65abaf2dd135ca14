-- Ends a reservation, once.

for index, subject in ipairs(body.subjects) do
  local account = load(index, subject.limits)
  settle(account, body.id, body.used)
  save(account)
end
