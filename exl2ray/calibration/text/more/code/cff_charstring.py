"""Interpreter for Type 2 charstrings: turns a glyph program into drawing calls."""
import struct

from fontlathe.misc.psStack import pop_all
from fontlathe.pens.basePen import NullPen


class CharStringError(Exception):
    pass


HINT_OPS = {1: "hstem", 3: "vstem", 18: "hstemhm", 23: "vstemhm"}
MASK_OPS = {19: "hintmask", 20: "cntrmask"}
SUBR_LIMIT = 10


def subr_bias(count):
    if count < 1240:
        return 107
    if count < 33900:
        return 1131
    return 32768


class T2Outliner:

    def __init__(self, pen=None, localSubrs=(), globalSubrs=(), nominalWidthX=0, defaultWidthX=0):
        self.pen = pen or NullPen()
        self.localSubrs = localSubrs
        self.globalSubrs = globalSubrs
        self.nominalWidthX = nominalWidthX
        self.width = defaultWidthX
        self.reset()

    def reset(self):
        self.stack = []
        self.x = self.y = 0
        self.hintCount = 0
        self.gotWidth = False
        self.open = False
        self.depth = 0

    # -- reading the byte code

    def execute(self, code):
        """Run *code*. Returns True when endchar was met, here or in a subroutine."""
        i = 0
        while i < len(code):
            b0 = code[i]
            i += 1
            if b0 == 28:
                self.stack.append(struct.unpack_from(">h", code, i)[0])
                i += 2
            elif 32 <= b0 <= 246:
                self.stack.append(b0 - 139)
            elif 247 <= b0 <= 250:
                self.stack.append((b0 - 247) * 256 + code[i] + 108)
                i += 1
            elif 251 <= b0 <= 254:
                self.stack.append(-(b0 - 251) * 256 - code[i] - 108)
                i += 1
            elif b0 == 255:
                self.stack.append(struct.unpack_from(">i", code, i)[0] / 65536)
                i += 4
            elif b0 in HINT_OPS:
                self.countHints()
            elif b0 in MASK_OPS:
                # stems may be given right before the mask with vstemhm left out
                self.countHints()
                i += (self.hintCount + 7) // 8
            elif b0 == 10 or b0 == 29:
                if self.call(self.localSubrs if b0 == 10 else self.globalSubrs):
                    return True
            elif b0 == 11:
                return False
            elif b0 == 14:
                self.takeWidth(len(self.stack) in (1, 5))
                self.closePath()
                return True
            elif b0 == 12:
                self.escape(code[i])
                i += 1
            else:
                self.draw(b0)
        return False

    def call(self, subrs):
        index = int(self.stack.pop()) + subr_bias(len(subrs))
        if not 0 <= index < len(subrs):
            raise CharStringError("no subroutine %d" % index)
        if self.depth == SUBR_LIMIT:
            raise CharStringError("subroutines nested too deeply")
        self.depth += 1
        try:
            return self.execute(subrs[index])
        finally:
            self.depth -= 1

    def takeWidth(self, present):
        if self.gotWidth:
            return
        self.gotWidth = True
        if present:
            self.width = self.nominalWidthX + self.stack.pop(0)

    def countHints(self):
        self.takeWidth(len(self.stack) % 2 == 1)
        self.hintCount += len(self.stack) // 2
        self.stack.clear()

    # -- drawing

    def closePath(self):
        if self.open:
            self.pen.closePath()
            self.open = False

    def moveBy(self, dx, dy):
        self.closePath()
        self.x += dx
        self.y += dy
        self.pen.moveTo((self.x, self.y))
        self.open = True

    def lineBy(self, dx, dy):
        self.x += dx
        self.y += dy
        self.pen.lineTo((self.x, self.y))

    def curveBy(self, dxa, dya, dxb, dyb, dxc, dyc):
        xa, ya = self.x + dxa, self.y + dya
        xb, yb = xa + dxb, ya + dyb
        self.x, self.y = xb + dxc, yb + dyc
        self.pen.curveTo((xa, ya), (xb, yb), (self.x, self.y))

    def draw(self, op):
        s = self.stack
        if op == 21:                        # rmoveto
            self.takeWidth(len(s) > 2)
            self.moveBy(s[0], s[1])
        elif op == 22:                      # hmoveto
            self.takeWidth(len(s) > 1)
            self.moveBy(s[0], 0)
        elif op == 4:                       # vmoveto
            self.takeWidth(len(s) > 1)
            self.moveBy(0, s[0])
        elif op == 5:                       # rlineto
            for dx, dy in zip(s[::2], s[1::2]):
                self.lineBy(dx, dy)
        elif op in (6, 7):                  # hlineto, vlineto
            horizontal = op == 6
            for d in s:
                self.lineBy(d if horizontal else 0, 0 if horizontal else d)
                horizontal = not horizontal
        elif op in (8, 24):                 # rrcurveto, rcurveline
            n = len(s) // 6 * 6
            for k in range(0, n, 6):
                self.curveBy(*s[k:k + 6])
            if op == 24:
                self.lineBy(*s[n:n + 2])
        elif op == 25:                      # rlinecurve
            for k in range(0, len(s) - 6, 2):
                self.lineBy(s[k], s[k + 1])
            self.curveBy(*s[-6:])
        elif op in (26, 27):                # vvcurveto, hhcurveto
            first = s.pop(0) if len(s) % 4 else 0
            for k in range(0, len(s), 4):
                a, b, c, d = s[k:k + 4]
                if op == 26:
                    self.curveBy(first, a, b, c, 0, d)
                else:
                    self.curveBy(a, first, b, c, d, 0)
                first = 0
        elif op in (30, 31):                # vhcurveto, hvcurveto
            horizontal = op == 31
            while len(s) >= 4:
                a, b, c, d = s[:4]
                last = s[4] if len(s) == 5 else 0
                del s[:4]
                if horizontal:
                    self.curveBy(a, 0, b, c, last, d)
                else:
                    self.curveBy(0, a, b, c, d, last)
                horizontal = not horizontal
        else:
            raise CharStringError("reserved operator %d" % op)
        s.clear()

    def escape(self, op):
        if op == 35:                        # flex; the 13th operand is the flex depth
            s = pop_all(self.stack)
            self.curveBy(*s[:6])
            self.curveBy(*s[6:12])
        elif op == 34:                      # hflex
            a, b, dy, c, d, e, f = pop_all(self.stack)
            self.curveBy(a, 0, b, dy, c, 0)
            self.curveBy(d, 0, e, -dy, f, 0)
        else:
            raise CharStringError("escape operator 12 %d is not supported" % op)
