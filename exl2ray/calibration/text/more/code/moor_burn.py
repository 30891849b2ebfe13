"""Moor Burn: a game for a terminal of 80 by 24.

You are the keeper of a heather moor. Burn strips so that the grouse have short heather to eat beside tall heather to
nest in, and do not set the peat on fire. Arrow keys move, space lights, b beats a flame out, n ends the day, q gives up.
"""
import curses
import random
from itertools import product

W, H = 60, 20
WIND = {"N": (0, -1), "NE": (1, -1), "E": (1, 0), "SE": (1, 1), "S": (0, 1), "SW": (-1, 1), "W": (-1, 0), "NW": (-1, -1)}
NEIGHBOURS = [d for d in product((-1, 0, 1), repeat=2) if d != (0, 0)]


class Moor:
    def __init__(self, seed=None):
        self.rng = random.Random(seed)
        self.age = [[self.rng.randint(3, 18) for _ in range(W)] for _ in range(H)]
        self.fire = {}                      # (x, y) -> hours left to burn
        self.peat = set()                   # smouldering below, comes back in dry weather
        self.wet = self._streams()
        self.day, self.hour, self.beats = 1, 9, 6
        self.weather()

    def _streams(self):
        wet, x = set(), self.rng.randrange(15, W - 15)
        for y in range(H):
            wet |= {(x, y), (x + 1, y)}
            x = min(W - 3, max(1, x + self.rng.choice((-1, 0, 0, 1))))
        return wet

    def weather(self):
        self.wind = self.rng.choice(list(WIND))
        self.force = self.rng.choices(range(6), weights=[2, 5, 5, 3, 2, 1])[0]
        self.damp = self.rng.choices((0.15, 0.35, 0.6), weights=[2, 4, 2])[0]

    def inside(self, x, y):
        return 0 <= x < W and 0 <= y < H

    def burnable(self, x, y):
        return self.inside(x, y) and (x, y) not in self.wet and (x, y) not in self.fire and self.age[y][x] >= 2

    def light(self, x, y):
        if not self.burnable(x, y):
            return False
        self.fire[x, y] = 1 + self.age[y][x] // 8
        return True

    def beat(self, x, y):
        """Puts out the flames under and around the beater, while there is strength left."""
        if not self.beats:
            return 0
        hit = [(x + dx, y + dy) for dx, dy in NEIGHBOURS + [(0, 0)] if (x + dx, y + dy) in self.fire]
        if hit:
            self.beats -= 1
        for c in hit:
            del self.fire[c]
        return len(hit)

    def step(self):
        """One hour."""
        wx, wy = WIND[self.wind]
        caught = set()
        for (x, y) in self.fire:
            for dx, dy in NEIGHBOURS:
                if not self.burnable(x + dx, y + dy):
                    continue
                with_wind = dx * wx + dy * wy
                chance = (1 - self.damp) * min(1.0, self.age[y + dy][x + dx] / 14) * (0.28 + 0.13 * self.force * with_wind)
                if self.rng.random() < chance:
                    caught.add((x + dx, y + dy))
        for c, hours in list(self.fire.items()):
            if hours > 1:
                self.fire[c] = hours - 1
                continue
            x, y = c
            # Old heather burns hot. On a dry day that is how peat begins to smoulder.
            if self.age[y][x] > 15 and self.rng.random() < 0.25 * (1 - self.damp):
                self.peat.add(c)
            self.age[y][x] = 0
            del self.fire[c]
        for x, y in caught:
            self.light(x, y)
        self.hour += 1
        if self.hour >= 18:
            self.night()

    def night(self):
        self.day, self.hour, self.beats = self.day + 1, 9, 6
        self.fire.clear()
        self.weather()
        for y in range(H):
            for x in range(W):
                self.age[y][x] += 1
        for c in list(self.peat):
            if self.damp > 0.5 and self.rng.random() < 0.5:
                self.peat.discard(c)
            elif self.rng.random() < 0.2:
                x, y = c
                for dx, dy in NEIGHBOURS:
                    self.light(x + dx, y + dy)

    def grouse(self):
        """A pair for each place where short meets tall, far enough from the next pair."""
        taken = set()
        for y, x in product(range(H), range(W)):
            if not 1 <= self.age[y][x] <= 5 or (x, y) in self.peat:
                continue
            tall = any(self.inside(x + dx, y + dy) and 8 <= self.age[y + dy][x + dx] <= 14 for dx, dy in NEIGHBOURS)
            if tall and not any(abs(x - a) + abs(y - b) < 5 for a, b in taken):
                taken.add((x, y))
        return len(taken)


def glyph(moor, x, y):
    if (x, y) in moor.fire:
        return "*", 1
    if (x, y) in moor.wet:
        return "~", 2
    if (x, y) in moor.peat:
        return "&", 3
    return ".,:;iIH#"[min(7, moor.age[y][x] // 2)], 4 if moor.age[y][x] > 1 else 3


def play(screen):
    curses.curs_set(0)
    for i, colour in enumerate((curses.COLOR_RED, curses.COLOR_CYAN, curses.COLOR_YELLOW, curses.COLOR_MAGENTA), 1):
        curses.init_pair(i, colour, curses.COLOR_BLACK)
    moor, x, y, note = Moor(), W // 2, H // 2, "A fine frosty morning."
    keys = {curses.KEY_UP: (0, -1), curses.KEY_DOWN: (0, 1), curses.KEY_LEFT: (-1, 0), curses.KEY_RIGHT: (1, 0)}
    while moor.day <= 30:
        screen.erase()
        for cy, cx in product(range(H), range(W)):
            c, colour = glyph(moor, cx, cy)
            screen.addstr(cy, cx, c, curses.color_pair(colour) | (curses.A_REVERSE if (cx, cy) == (x, y) else 0))
        for i, line in enumerate((f"day {moor.day:2} of 30", f"{moor.hour:2} o'clock", f"wind {moor.wind} {moor.force}",
                                  ("dry", "fresh", "sodden")[(moor.damp > 0.2) + (moor.damp > 0.5)], f"beats {moor.beats}",
                                  f"pairs {moor.grouse():3}", f"peat {len(moor.peat):3}")):
            screen.addstr(i, W + 3, line)
        screen.addstr(H + 1, 0, note)
        key = screen.getch()
        if key in keys:
            dx, dy = keys[key]
            x, y = (x + dx) % W, (y + dy) % H
            continue
        if key == ord("q"):
            break
        if key == ord(" "):
            note = "It takes." if moor.light(x, y) else "Nothing here to burn."
        elif key == ord("b"):
            note = f"{moor.beat(x, y)} flames out." if moor.beats else "Your arms are done for today."
        elif key == ord("n"):
            moor.night()
            note = "The frost puts out what you left." if moor.damp > 0.2 else "A dry night. You sleep badly."
            continue
        moor.step()
    return moor.grouse() - 3 * len(moor.peat)


if __name__ == "__main__":
    print("Grouse pairs, less what the peat has cost:", curses.wrapper(play))
