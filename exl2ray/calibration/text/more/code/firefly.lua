-- Firefly: a swarm of pulse-coupled oscillators that fall into step, drawn with LÖVE.
--
-- Each fly charges from 0 to 1 and flashes. A flash nudges the flies within sight a little further along their own
-- curve. Because the curve is concave a nudge means more to a fly that is nearly charged, and that is enough for
-- the whole meadow to end up blinking together. Drag the mouse to frighten them out of step again.

local Fly = {}
Fly.__index = Fly

local COUNT, SIGHT, PERIOD = 220, 90, 1.9
local NUDGE, REFRACTORY = 0.045, 0.08
local flies, cells = {}, {}

local function curve(phase)      -- charge as a function of phase
  return math.log(1 + (math.exp(3) - 1) * phase) / 3
end

local function inverse(charge)
  return (math.exp(3 * charge) - 1) / (math.exp(3) - 1)
end

function Fly.new(w, h)
  return setmetatable({
    x = love.math.random() * w,
    y = love.math.random() * h,
    heading = love.math.random() * 2 * math.pi,
    phase = love.math.random(),
    rate = (1 + 0.03 * love.math.randomNormal()) / PERIOD,
    glow = 0,
  }, Fly)
end

function Fly:wander(dt, w, h)
  self.heading = self.heading + love.math.randomNormal(1.5, 0) * dt
  self.x = (self.x + math.cos(self.heading) * 14 * dt) % w
  self.y = (self.y + math.sin(self.heading) * 14 * dt) % h
  self.glow = self.glow * math.exp(-5 * dt)
end

function Fly:receive()
  if self.phase < REFRACTORY then return false end
  local charge = curve(self.phase) + NUDGE
  if charge >= 1 then return true end
  self.phase = inverse(charge)
  return false
end

local function key(x, y)
  return math.floor(x / SIGHT) * 4096 + math.floor(y / SIGHT)
end

local function neighbours(fly)
  return coroutine.wrap(function()
    for dx = -SIGHT, SIGHT, SIGHT do
      for dy = -SIGHT, SIGHT, SIGHT do
        for _, other in ipairs(cells[key(fly.x + dx, fly.y + dy)] or {}) do
          local ex, ey = other.x - fly.x, other.y - fly.y
          if other ~= fly and ex * ex + ey * ey < SIGHT * SIGHT then coroutine.yield(other) end
        end
      end
    end
  end)
end

function love.load()
  local w, h = love.graphics.getDimensions()
  for i = 1, COUNT do flies[i] = Fly.new(w, h) end
end

function love.update(dt)
  local w, h = love.graphics.getDimensions()
  local flashing = {}
  cells = {}
  for _, fly in ipairs(flies) do
    fly:wander(dt, w, h)
    local k = key(fly.x, fly.y)
    cells[k] = cells[k] or {}
    table.insert(cells[k], fly)
    fly.phase = fly.phase + fly.rate * dt
    if fly.phase >= 1 then flashing[#flashing + 1] = fly end
  end

  -- The list grows while it is read: a flash may set off others in the same instant. Each fly goes to phase 0
  -- before it is passed on, so it is refractory and cannot be queued twice.
  local i = 1
  for _, fly in ipairs(flashing) do fly.phase, fly.glow = 0, 1 end
  while flashing[i] do
    for other in neighbours(flashing[i]) do
      if other:receive() then
        other.phase, other.glow = 0, 1
        flashing[#flashing + 1] = other
      end
    end
    i = i + 1
  end
end

function love.mousemoved(x, y)
  if not love.mouse.isDown(1) then return end
  for _, fly in ipairs(flies) do
    if (fly.x - x) ^ 2 + (fly.y - y) ^ 2 < 3600 then fly.phase = love.math.random() end
  end
end

function love.draw()
  love.graphics.clear(0.02, 0.03, 0.06)
  for _, fly in ipairs(flies) do
    love.graphics.setColor(0.75, 1, 0.35, 0.08 + 0.92 * fly.glow)
    love.graphics.circle("fill", fly.x, fly.y, 1.5 + 2.5 * fly.glow)
  end
end
