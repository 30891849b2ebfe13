'use strict';

/**
 * Virtual queue of a fairground ride. Visitors take a number at the gate, wander off and get called
 * back by their phones. Groups are not split, gondolas hold four, and whoever does not turn up
 * within two turns of the wheel goes to the end of the line (once).
 */

const GONDOLA_SEATS = 4;
const GRACE_TURNS = 2;

class Party {
  constructor(number, size) {
    this.number = number;
    this.size = size;
    this.calledAt = null;
    this.secondChance = true;
  }
}

class RideQueue {
  #waiting = [];
  #called = new Map();
  #listeners = new Map();
  #counter = 0;
  #turn = 0;

  on(event, handler) {
    const list = this.#listeners.get(event) ?? [];
    this.#listeners.set(event, [...list, handler]);
    return () => {
      this.#listeners.set(event, this.#listeners.get(event).filter((h) => h !== handler));
    };
  }

  #emit(event, ...args) {
    for (const handler of this.#listeners.get(event) ?? []) {
      try {
        handler(...args);
      } catch (error) {
        // one broken phone must not stop the wheel
        console.error(`listener for ${event}:`, error);
      }
    }
  }

  join(size) {
    if (!Number.isInteger(size) || size < 1) throw new RangeError(`a party of ${size}?`);
    if (size > GONDOLA_SEATS) {
      const parties = [];
      for (let left = size; left > 0; left -= GONDOLA_SEATS) {
        parties.push(...this.join(Math.min(left, GONDOLA_SEATS)));
      }
      return parties;
    }
    const party = new Party(++this.#counter, size);
    this.#waiting.push(party);
    return [party];
  }

  leave(number) {
    this.#called.delete(number);
    this.#waiting = this.#waiting.filter((p) => p.number !== number);
  }

  /**
   * Picks the parties for the next gondola. The head of the line always gets in; remaining seats are
   * filled from the next eight, because letting a pair from far behind overtake leads to arguments.
   */
  #fill() {
    const [first, ...rest] = this.#waiting;
    if (!first) return [];
    let free = GONDOLA_SEATS - first.size;
    const chosen = [first];
    for (const party of rest.slice(0, 8)) {
      if (party.size <= free) {
        chosen.push(party);
        free -= party.size;
      }
      if (free === 0) break;
    }
    return chosen;
  }

  /** Call once for every full turn of the wheel. */
  turn({ gondolas }) {
    this.#turn += 1;
    for (const [number, party] of this.#called) {
      if (this.#turn - party.calledAt <= GRACE_TURNS) continue;
      this.#called.delete(number);
      if (party.secondChance) {
        party.secondChance = false;
        this.#waiting.push(party);
        this.#emit('missed', party);
      } else {
        this.#emit('dropped', party);
      }
    }

    for (let i = 0; i < gondolas; i++) {
      const group = this.#fill();
      if (group.length === 0) break;
      const ids = new Set(group.map((p) => p.number));
      this.#waiting = this.#waiting.filter((p) => !ids.has(p.number));
      for (const party of group) {
        party.calledAt = this.#turn;
        this.#called.set(party.number, party);
        this.#emit('call', party, i);
      }
    }
  }

  board(number) {
    const party = this.#called.get(number);
    if (!party) return false;
    this.#called.delete(number);
    this.#emit('boarded', party);
    return true;
  }

  /** Rough wait in minutes, shown at the gate. */
  estimate({ gondolas, minutesPerTurn }) {
    const heads = this.#waiting.reduce((sum, p) => sum + p.size, 0);
    const perTurn = gondolas * GONDOLA_SEATS * 0.85; // about one seat in seven stays empty
    return Math.ceil(heads / perTurn) * minutesPerTurn;
  }

  get length() {
    return this.#waiting.length;
  }
}

module.exports = { RideQueue, GONDOLA_SEATS };

if (require.main === module) {
  const queue = new RideQueue();
  queue.on('call', (p, gondola) => console.log(`no. ${p.number} (${p.size}) → gondola ${gondola + 1}`));
  queue.on('missed', (p) => console.log(`no. ${p.number} missed it, back of the line`));
  [2, 3, 1, 7, 2, 4].forEach((n) => queue.join(n));
  console.log(`about ${queue.estimate({ gondolas: 2, minutesPerTurn: 6 })} min`);
  for (let t = 0; t < 4; t++) queue.turn({ gondolas: 2 });
}
