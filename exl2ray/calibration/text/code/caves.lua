-- caves.lua: grows a cave with a cellular automaton and makes sure that it is one cave.
--
-- Usage: lua caves.lua [seed]
--
-- Random noise is smoothed with the "4-5 rule": a cell becomes rock when at least five of its
-- nine-cell neighbourhood are rock. That leaves isolated bubbles, so the second half finds the
-- connected regions and digs corridors from each to the largest one.

local Cave = {}
Cave.__index = Cave

local ROCK, FLOOR = "#", "."

function Cave.noise(width, height, density, random)
  local self = setmetatable({ w = width, h = height, cells = {} }, Cave)
  for i = 1, width * height do
    self.cells[i] = random() < density and ROCK or FLOOR
  end
  return self
end

-- The border and everything beyond it count as rock. A border cell then always has at least six
-- rocky neighbours, so the first smoothing pass closes the map without a special case.
function Cave:at(x, y)
  if x <= 1 or y <= 1 or x >= self.w or y >= self.h then return ROCK end
  return self.cells[(y - 1) * self.w + x]
end

function Cave:dig(x, y)
  if x > 1 and y > 1 and x < self.w and y < self.h then
    self.cells[(y - 1) * self.w + x] = FLOOR
  end
end

function Cave:smooth()
  local next_cells = {}
  for y = 1, self.h do
    for x = 1, self.w do
      local rock = 0
      for dy = -1, 1 do
        for dx = -1, 1 do
          if self:at(x + dx, y + dy) == ROCK then rock = rock + 1 end
        end
      end
      next_cells[#next_cells + 1] = rock >= 5 and ROCK or FLOOR
    end
  end
  self.cells = next_cells
end

-- Flood fill with an explicit stack: recursion would exhaust the C stack limit on large maps.
function Cave:regions()
  local seen, found = {}, {}
  for start = 1, self.w * self.h do
    if self.cells[start] == FLOOR and not seen[start] then
      local region, stack = {}, { start }
      seen[start] = true
      while #stack > 0 do
        local i = table.remove(stack)
        region[#region + 1] = i
        local x, y = (i - 1) % self.w + 1, (i - 1) // self.w + 1
        for _, step in ipairs { { 1, 0 }, { -1, 0 }, { 0, 1 }, { 0, -1 } } do
          local nx, ny = x + step[1], y + step[2]
          local j = (ny - 1) * self.w + nx
          if self:at(nx, ny) == FLOOR and not seen[j] then
            seen[j] = true
            stack[#stack + 1] = j
          end
        end
      end
      found[#found + 1] = region
    end
  end
  table.sort(found, function(a, b) return #a > #b end)
  return found
end

-- A drunkard who mostly knows the way home digs corridors that look natural.
function Cave:tunnel(from, to, random)
  local x, y = (from - 1) % self.w + 1, (from - 1) // self.w + 1
  local tx, ty = (to - 1) % self.w + 1, (to - 1) // self.w + 1
  while x ~= tx or y ~= ty do
    if random() < 0.5 and x ~= tx or y == ty then
      x = x + (x < tx and 1 or x > tx and -1 or 0)
    else
      y = y + (y < ty and 1 or -1)
    end
    self:dig(x, y)
  end
end

function Cave:connect(random)
  local regions = self:regions()
  local main = regions[1]
  -- Smallest first: a bubble must be filled before a corridor can lead through it.
  for i = #regions, 2, -1 do
    if #regions[i] < 6 then
      for _, cell in ipairs(regions[i]) do self.cells[cell] = ROCK end
    else
      self:tunnel(regions[i][1], main[random(#main)], random)
    end
  end
end

function Cave:__tostring()
  local lines = {}
  for y = 1, self.h do
    lines[y] = table.concat(self.cells, "", (y - 1) * self.w + 1, y * self.w)
  end
  return table.concat(lines, "\n")
end

math.randomseed(tonumber(arg and arg[1]) or 7)
local cave = Cave.noise(72, 22, 0.47, math.random)
for _ = 1, 4 do cave:smooth() end
cave:connect(math.random)
assert(#cave:regions() == 1, "the cave fell apart")
print(cave)
