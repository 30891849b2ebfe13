-- A tiny event scheduler on coroutines, and a simulated soup kitchen that runs on it.
--
-- Tasks call sleep(minutes), or take/put on a store; the scheduler keeps a heap of wake-up times and
-- never looks at the real clock.

local Scheduler = {}
Scheduler.__index = Scheduler

function Scheduler.new()
  return setmetatable({ now = 0, heap = {}, order = 0 }, Scheduler)
end

local function before(a, b)
  if a.at ~= b.at then return a.at < b.at end
  return a.order < b.order -- first come, first served
end

function Scheduler:push(at, co)
  self.order = self.order + 1
  local heap, item = self.heap, { at = at, order = self.order, co = co }
  local i = #heap + 1
  heap[i] = item
  while i > 1 do
    local parent = i // 2
    if before(heap[parent], item) then break end
    heap[i], heap[parent] = heap[parent], item
    i = parent
  end
end

function Scheduler:pop()
  local heap = self.heap
  local top, last = heap[1], table.remove(heap)
  if #heap == 0 then return top end
  local i = 1
  while true do
    local child = 2 * i
    if child > #heap then break end
    if child < #heap and before(heap[child + 1], heap[child]) then child = child + 1 end
    if not before(heap[child], last) then break end
    heap[i] = heap[child]
    i = child
  end
  heap[i] = last
  return top
end

function Scheduler:spawn(name, fn, ...)
  local args = table.pack(...)
  local co = coroutine.create(function() fn(table.unpack(args, 1, args.n)) end)
  self:push(self.now, co)
  self.names = self.names or setmetatable({}, { __mode = "k" })
  self.names[co] = name
  return co
end

function Scheduler:run(until_)
  while self.heap[1] and self.heap[1].at <= until_ do
    local item = self:pop()
    self.now = item.at
    local ok, wait = coroutine.resume(item.co)
    if not ok then
      error(("%s: %s"):format(self.names[item.co], debug.traceback(item.co, wait)), 0)
    elseif type(wait) == "number" then
      self:push(self.now + wait, item.co)
    end -- anything else: the task sits in somebody's waiting list
  end
  self.now = until_
end

local sleep = coroutine.yield

-- A store of identical things with a limit --------------------------------

local Store = {}
Store.__index = Store

function Store.new(sched, capacity, amount)
  return setmetatable({ sched = sched, capacity = capacity, amount = amount or 0, takers = {}, putters = {} }, Store)
end

function Store:take()
  while self.amount == 0 do
    table.insert(self.takers, (coroutine.running()))
    coroutine.yield("waiting")
  end
  self.amount = self.amount - 1
  local co = table.remove(self.putters, 1)
  if co then self.sched:push(self.sched.now, co) end
end

function Store:put(n)
  for _ = 1, n or 1 do
    while self.amount >= self.capacity do
      table.insert(self.putters, (coroutine.running()))
      coroutine.yield("waiting")
    end
    self.amount = self.amount + 1
    local co = table.remove(self.takers, 1)
    if co then self.sched:push(self.sched.now, co) end
  end
end

-- The kitchen ---------------------------------------------------------------

math.randomseed(11)
local function exponential(mean) return -mean * math.log(1 - math.random()) end

local sched = Scheduler.new()
local bowls = Store.new(sched, 60, 60)   -- clean ones
local soup = Store.new(sched, 120)       -- ladles on the counter
local waits, served = 0, 0

local function guest()
  local came = sched.now
  bowls:take()
  soup:take()
  sleep(0.4)
  waits, served = waits + (sched.now - came), served + 1
  sleep(12 + exponential(8))
  -- the bowl goes into a crate and comes back with the next wash
  sched:spawn("dishwasher", function()
    sleep(15 - sched.now % 15)
    bowls:put()
  end)
end

local function cook(name, pot, minutes)
  while true do
    sleep(minutes)
    soup:put(pot)
  end
end

local function door()
  local opening = { [0] = 0.5, 1.2, 2.5, 4 } -- mean gap in minutes, by half-hour
  while sched.now < 120 do
    sched:spawn("guest", guest)
    sleep(exponential(opening[sched.now // 30 | 0] or 4))
  end
end

sched:spawn("Ilse", cook, "Ilse", 40, 35)
sched:spawn("Bram", cook, "Bram", 25, 20)
sched:spawn("door", door)
soup.amount = 80
for t = 15, 150, 15 do
  sched:run(t)
  print(("%3d min  served %3d  mean wait %5.1f  clean bowls %2d  ladles %3d"):format(
    t, served, served > 0 and waits / served or 0, bowls.amount, soup.amount))
end
