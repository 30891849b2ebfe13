#!/usr/bin/env node
// bobbin: checks lace patterns. Bobbin lace knows two moves, cross (C) and twist (T); a stitch is a word of them done with
// two pairs. A pattern says which pairs meet where. This program follows every thread from top to bottom and complains
// about threads that end in the air, pairs that never meet again, and pinholes that nothing holds.

import { createReadStream } from "node:fs";
import { stat } from "node:fs/promises";
import { createInterface } from "node:readline";
import { parseArgs, styleText } from "node:util";

const STITCHES = { cloth: "CTC", half: "CT", whole: "CTCT", linen: "CTC", torchon: "TCTC", spider: "TTCTC" };

class LaceError extends Error {
  constructor(message, line) {
    super(message);
    this.name = "LaceError";
    this.line = line;
  }
}

/** Two pairs are four threads, numbered by place. Cross: second over third. Twist: in both pairs, right over left. */
function work(threads, moves) {
  const [a, b, c, d] = threads;
  let t = [a, b, c, d];
  for (const m of moves) {
    if (m === "C") t = [t[0], t[2], t[1], t[3]];
    else if (m === "T") t = [t[1], t[0], t[3], t[2]];
    else throw new LaceError(`“${m}” is neither C nor T`);
  }
  return t;
}

class Pillow {
  #threads = [];
  #pins = new Map();
  #lastMeeting = new Map();

  get pairs() {
    return this.#threads.length / 2;
  }

  hang(count) {
    const base = this.#threads.length;
    for (let i = 0; i < 2 * count; i++) this.#threads.push(base + i);
  }

  stitch(left, moves, pin, line) {
    if (left < 1 || left >= this.pairs) throw new LaceError(`pairs ${left} and ${left + 1}: there are only ${this.pairs}`, line);
    const at = 2 * (left - 1);
    const four = this.#threads.slice(at, at + 4);
    this.#threads.splice(at, 4, ...work(four, moves));
    for (const t of four) this.#lastMeeting.set(t, line);
    if (pin) {
      const half = moves.length >> 1;
      // A pin needs a crossing below it, or the stitch slides off.
      this.#pins.set(pin, { line, held: moves.slice(half).includes("C") });
    }
  }

  tieOff(left, line) {
    if (this.pairs < left) throw new LaceError(`no pair ${left} to tie off`, line);
    this.#threads.splice(2 * (left - 1), 2);
  }

  *faults(end) {
    for (const [name, { line, held }] of this.#pins) if (!held) yield new LaceError(`pin ${name} is held by nothing`, line);
    for (const t of this.#threads) {
      const last = this.#lastMeeting.get(t);
      if (last === undefined) yield new LaceError(`thread ${t} was hung on and never used`, 1);
      else if (end - last > 40) yield new LaceError(`thread ${t} has hung loose since line ${last}`, end);
    }
  }
}

async function check(path) {
  const pillow = new Pillow();
  const found = [];
  let n = 0;
  const macros = new Map(Object.entries(STITCHES));
  for await (const raw of createInterface({ input: createReadStream(path, "utf8"), crlfDelay: Infinity })) {
    n++;
    const text = raw.replace(/#.*/, "").trim();
    if (!text) continue;
    try {
      const [word, ...rest] = text.split(/\s+/);
      switch (word) {
        case "hang":
          pillow.hang(Number(rest[0]));
          break;
        case "let":
          macros.set(rest[0], rest[2] ?? "");
          break;
        case "tie":
          pillow.tieOff(Number(rest[0]), n);
          break;
        default: {
          const m = /^(\d+)-(\d+)$/.exec(word);
          if (!m || Number(m[2]) !== Number(m[1]) + 1) throw new LaceError(`expected two neighbouring pairs such as 3-4, not “${word}”`);
          const moves = macros.get(rest[0]) ?? rest[0];
          pillow.stitch(Number(m[1]), moves, rest[1]?.replace(/^@/, ""), n);
        }
      }
    } catch (e) {
      if (!(e instanceof LaceError)) throw e;
      e.line ??= n;
      found.push(e);
      if (found.length > 20) break;
    }
  }
  found.push(...pillow.faults(n));
  return { lines: n, pairs: pillow.pairs, found };
}

const { values, positionals } = parseArgs({
  allowPositionals: true,
  options: { json: { type: "boolean" }, quiet: { type: "boolean", short: "q" }, help: { type: "boolean", short: "h" } },
});

if (values.help || positionals.length === 0) {
  console.error("usage: bobbin [--json] [-q] PATTERN...");
  process.exit(values.help ? 0 : 64);
}

let status = 0;
for (const path of positionals) {
  if (!(await stat(path).catch(() => null))?.isFile()) {
    console.error(`${path}: no such pattern`);
    status = 66;
    continue;
  }
  const { lines, pairs, found } = await check(path);
  if (values.json) {
    console.log(JSON.stringify({ path, lines, pairs, faults: found.map(({ line, message }) => ({ line, message })) }));
  } else {
    for (const f of found) console.log(`${path}:${f.line}: ${styleText("red", f.message)}`);
    if (!values.quiet && found.length === 0) console.log(`${path}: ${pairs} pairs left on the pillow, ${styleText("green", "nothing wrong")}`);
  }
  if (found.length) status ||= 1;
}
process.exitCode = status;
