## hedgemaze - grow, solve and print hedge mazes for the village fete
##
## The maze is drawn on paper one metre to the centimetre and cut with a mower, so it has some demands that
## a computer game has not: no passage may run along the outer hedge for more than `maxEdge` cells (people
## peep through), and the way to the middle must be long but not the longest.

import std/[algorithm, deques, options, parseopt, random, sequtils, strformat, strutils, sugar, tables]

type
  Dir = enum north, east, south, west
  Cell = tuple[row, col: int]
  Maze = object
    rows, cols: int
    open: seq[set[Dir]]        ## sides without a hedge
    goal, gate: Cell
  Score = object
    pathLen, deadEnds, edgeRun: int

  MazeError = object of CatchableError

const
  step: array[Dir, Cell] = [(-1, 0), (0, 1), (1, 0), (0, -1)]

func opposite(d: Dir): Dir = Dir((d.ord + 2) mod 4)

func `+`(a, b: Cell): Cell = (a.row + b.row, a.col + b.col)

func contains(m: Maze, c: Cell): bool =
  c.row in 0 ..< m.rows and c.col in 0 ..< m.cols

func `[]`(m: Maze, c: Cell): set[Dir] = m.open[c.row * m.cols + c.col]

proc carve(m: var Maze, c: Cell, d: Dir) =
  let n = c + step[d]
  m.open[c.row * m.cols + c.col].incl d
  m.open[n.row * m.cols + n.col].incl opposite(d)

iterator neighbours(m: Maze, c: Cell): (Dir, Cell) =
  for d in Dir:
    let n = c + step[d]
    if n in m: yield (d, n)

proc grow(rows, cols: int, rng: var Rand, twist: float): Maze =
  ## Growing tree: mostly the newest cell (long winding walks), sometimes any (short stubs).
  if rows < 5 or cols < 5:
    raise newException(MazeError, &"a maze of {rows} by {cols} is a flower bed")
  result = Maze(rows: rows, cols: cols, open: newSeq[set[Dir]](rows * cols),
                goal: (rows div 2, cols div 2), gate: (rows - 1, cols div 2))
  var live = @[result.goal]
  while live.len > 0:
    let i = if rng.rand(1.0) < twist: live.high else: rng.rand(live.high)
    let c = live[i]
    let fresh = collect(newSeq):
      for d, n in result.neighbours(c):
        if result[n] == {}: (d, n)
    if fresh.len == 0:
      live.delete i
    else:
      let (d, n) = rng.sample(fresh)
      result.carve(c, d)
      live.add n

proc solve(m: Maze): Option[seq[Cell]] =
  var cameFrom = {m.gate: m.gate}.toTable
  var queue = [m.gate].toDeque
  while queue.len > 0:
    let c = queue.popFirst
    if c == m.goal:
      var path = @[c]
      while path[^1] != m.gate: path.add cameFrom[path[^1]]
      return some path.reversed
    for d in m[c]:
      let n = c + step[d]
      if n notin cameFrom:
        cameFrom[n] = c
        queue.addLast n

func longestEdgeRun(m: Maze): int =
  ## The longest straight walk along any of the four outer hedges.
  proc run(cells: seq[Cell], along: Dir): int =
    var here = 0
    for c in cells:
      here = if along in m[c]: here + 1 else: 0
      result = max(result, here)
  max [
    run(collect(for x in 0 ..< m.cols: (0, x)), east),
    run(collect(for x in 0 ..< m.cols: (m.rows - 1, x)), east),
    run(collect(for y in 0 ..< m.rows: (y, 0)), south),
    run(collect(for y in 0 ..< m.rows: (y, m.cols - 1)), south)
  ]

proc score(m: Maze): Score =
  Score(
    pathLen: m.solve.map(p => p.len).get(0),
    deadEnds: m.open.countIt(it.card == 1),
    edgeRun: m.longestEdgeRun)

proc braid(m: var Maze, rng: var Rand, share: float) =
  ## Open some dead ends, so that "hand on the left hedge" does not always work.
  for i in 0 ..< m.open.len:
    let c: Cell = (i div m.cols, i mod m.cols)
    if m[c].card == 1 and c != m.goal and rng.rand(1.0) < share:
      let shut = toSeq(m.neighbours(c)).filterIt(it[0] notin m[c] and it[1] != m.goal)
      if shut.len > 0: m.carve(c, rng.sample(shut)[0])

proc `$`(m: Maze): string =
  let onPath = m.solve.get(@[])
  for r in 0 ..< m.rows:
    for c in 0 ..< m.cols:
      result.add(if north in m[(r, c)]: "+   " else: "+---")
    result.add "+\n"
    for c in 0 ..< m.cols:
      result.add(if west in m[(r, c)]: ' ' else: '|')
      result.add(if (r, c) == m.goal: " O " elif (r, c) in onPath: " . " else: "   ")
    result.add "|\n"
  for c in 0 ..< m.cols:
    result.add(if (m.rows - 1, c) == m.gate: "+   " else: "+---")
  result.add "+\n"

proc main() =
  var rows = 15; var cols = 21; var seed = 1931'i64; var tries = 200; var maxEdge = 5
  for kind, key, val in getopt():
    case kind
    of cmdLongOption, cmdShortOption:
      case key
      of "rows", "r": rows = parseInt(val)
      of "cols", "c": cols = parseInt(val)
      of "seed", "s": seed = parseBiggestInt(val)
      of "edge": maxEdge = parseInt(val)
      else: quit(&"unknown option {key}", 2)
    else: quit("hedgemaze takes no file", 2)

  var rng = initRand(seed)
  var good: seq[(Score, Maze)]
  for _ in 1 .. tries:
    var m = grow(rows, cols, rng, twist = 0.85)
    m.braid(rng, share = 0.2)
    let s = m.score
    if s.edgeRun <= maxEdge: good.add (s, m)
  if good.len == 0:
    quit(&"none of {tries} mazes keeps people away from the outer hedge; try --edge:{maxEdge + 2}", 1)
  # Three quarters up the list: long enough to be proud of, and grandmothers come out again.
  let chosen = good.sortedByIt(it[0].pathLen)[good.len * 3 div 4]
  echo chosen[1]
  let s = chosen[0]
  echo &"{s.pathLen} m to the middle, {s.deadEnds} dead ends, longest outer walk {s.edgeRun} m, seed {seed}"

when isMainModule:
  main()
