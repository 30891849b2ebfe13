/**
 * Text to Grade 1 (uncontracted) English braille as Unicode cells, and back again.
 * Used by the label printer in the museum shop; labels are short, so everything is a plain loop.
 */

type Dots = ReadonlyArray<1 | 2 | 3 | 4 | 5 | 6>;

const BASE = 0x2800;

const cell = (dots: Dots): string =>
  String.fromCharCode(BASE + dots.reduce((bits, dot) => bits | (1 << (dot - 1)), 0));

// The first ten letters use the upper four dots; the rest are the same shapes with dots 3 and 6 added.
const DECADE: Dots[] = [[1], [1, 2], [1, 4], [1, 4, 5], [1, 5], [1, 2, 4], [1, 2, 4, 5], [1, 2, 5], [2, 4], [2, 4, 5]];

const letters = new Map<string, string>();
"abcdefghij".split("").forEach((c, i) => letters.set(c, cell(DECADE[i]!)));
"klmnopqrst".split("").forEach((c, i) => letters.set(c, cell([...DECADE[i]!, 3])));
"uvxyz".split("").forEach((c, i) => letters.set(c, cell([...DECADE[i]!, 3, 6])));
letters.set("w", cell([2, 4, 5, 6])); // not in the scheme: Louis Braille's French had no w

const marks: Record<string, string> = {
  ",": cell([2]),
  ";": cell([2, 3]),
  ":": cell([2, 5]),
  ".": cell([2, 5, 6]),
  "!": cell([2, 3, 5]),
  "?": cell([2, 3, 6]),
  "-": cell([3, 6]),
  "'": cell([3]),
};

const CAPITAL = cell([6]);
const NUMBER = cell([3, 4, 5, 6]);
const LETTER = cell([5, 6]);
const BLANK = String.fromCharCode(BASE);

export class UnbrailleableError extends Error {
  constructor(readonly character: string, readonly position: number) {
    super(`no cell for ${JSON.stringify(character)} at position ${position}`);
    this.name = "UnbrailleableError";
  }
}

const isDigit = (c: string) => c >= "0" && c <= "9";
const digitCell = (c: string) => cell(DECADE[(Number(c) + 9) % 10]!);

export function toBraille(text: string): string {
  let out = "";
  let numeric = false;

  for (const [i, c] of [...text].entries()) {
    if (isDigit(c)) {
      if (!numeric) out += NUMBER;
      numeric = true;
      out += digitCell(c);
      continue;
    }
    if (c === " ") {
      out += BLANK;
      numeric = false;
      continue;
    }
    const mark = marks[c];
    if (mark !== undefined) {
      out += mark;
      // commas and points inside a number do not end it
      if (c !== "," && c !== ".") numeric = false;
      continue;
    }
    const lower = c.toLowerCase();
    const plain = letters.get(lower);
    if (plain === undefined) throw new UnbrailleableError(c, i);
    // "7a" would read as 71 without the letter sign
    if (numeric && c === lower && lower <= "j") out += LETTER;
    numeric = false;
    if (c !== lower) out += CAPITAL;
    out += plain;
  }
  return out;
}

const reverseLetters = new Map([...letters].map(([c, b]) => [b, c] as const));
const reverseMarks = new Map(Object.entries(marks).map(([c, b]) => [b, c] as const));
const reverseDigits = new Map(["1", "2", "3", "4", "5", "6", "7", "8", "9", "0"].map((d) => [digitCell(d), d] as const));

export function fromBraille(cells: string): string {
  let out = "";
  let numeric = false;
  let capital = false;

  for (const b of cells) {
    switch (b) {
      case NUMBER:
        numeric = true;
        continue;
      case LETTER:
        numeric = false;
        continue;
      case CAPITAL:
        capital = true;
        numeric = false;
        continue;
      case BLANK:
        numeric = capital = false;
        out += " ";
        continue;
    }
    const mark = reverseMarks.get(b);
    if (mark) {
      out += mark;
      continue;
    }
    const digit = numeric ? reverseDigits.get(b) : undefined;
    if (digit) {
      out += digit;
      continue;
    }
    const letter = reverseLetters.get(b);
    out += letter ? (capital ? letter.toUpperCase() : letter) : "\uFFFD";
    numeric = capital = false;
  }
  return out;
}

/** Breaks at blanks so that no line is wider than the embossing head. */
export function layout(cells: string, width: number): string[] {
  const lines: string[] = [];
  let line = "";
  for (let word of cells.split(BLANK)) {
    while (word.length > width) {
      const room = line ? width - line.length - 1 : width;
      const head = room > 3 ? word.slice(0, room) : "";
      if (head) {
        lines.push(line ? line + BLANK + head : head);
        word = word.slice(head.length);
      } else {
        lines.push(line);
      }
      line = "";
    }
    const joined = line ? line + BLANK + word : word;
    if (joined.length <= width) {
      line = joined;
    } else {
      lines.push(line);
      line = word;
    }
  }
  return line ? [...lines, line] : lines;
}
