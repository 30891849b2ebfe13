'use strict';

/**
 * Keyboard handling for a crossword grid drawn as a <table>. No framework, no build step.
 *
 * The grid is marked up on the server: black squares are <td class="black">, white ones contain an
 * <input maxlength="1">. Everything here is behaviour: which word is current, where the cursor goes
 * next, and remembering the solver's letters in localStorage.
 */

const ACROSS = { dr: 0, dc: 1, name: 'across' };
const DOWN = { dr: 1, dc: 0, name: 'down' };
const other = dir => (dir === ACROSS ? DOWN : ACROSS);

class Grid {
  #cells;
  #dir = ACROSS;
  #current = null;

  constructor(table, puzzleId) {
    this.table = table;
    this.key = `crossword:${puzzleId}`;
    this.#cells = [...table.rows].map((tr, r) =>
      [...tr.cells].map((td, c) => (td.classList.contains('black') ? null : { r, c, td, input: td.querySelector('input') })));

    this.#number();
    this.#restore();

    table.addEventListener('focusin', e => this.#onFocus(e));
    table.addEventListener('pointerdown', e => this.#onPointer(e));
    table.addEventListener('keydown', e => this.#onKey(e));
    // Phones report keydown as "Unidentified"; the letter only shows up in the input event.
    table.addEventListener('input', e => this.#onInput(e));
  }

  at(r, c) {
    return this.#cells[r]?.[c] ?? null;
  }

  #step({ r, c }, dir, by = 1) {
    return this.at(r + dir.dr * by, c + dir.dc * by);
  }

  /** All squares of the word through a square, or an array of one if it stands alone in that direction. */
  word(cell, dir) {
    let first = cell;
    for (let p; (p = this.#step(first, dir, -1)); ) first = p;
    const squares = [];
    for (let p = first; p; p = this.#step(p, dir)) squares.push(p);
    return squares;
  }

  #number() {
    let n = 0;
    for (const cell of this.#cells.flat().filter(Boolean)) {
      const starts = [ACROSS, DOWN].some(d => !this.#step(cell, d, -1) && this.#step(cell, d));
      if (starts) cell.td.dataset.number = String(++n);
    }
  }

  #select(cell, dir = this.#dir) {
    if (!cell) return;
    if (this.word(cell, dir).length === 1) dir = other(dir);
    this.#dir = dir;
    this.#current = cell;
    for (const td of this.table.querySelectorAll('.lit')) td.classList.remove('lit');
    const squares = this.word(cell, dir);
    squares.forEach(s => s.td.classList.add('lit'));
    if (document.activeElement !== cell.input) cell.input.focus();
    cell.input.select();
    this.table.dispatchEvent(new CustomEvent('wordchange', {
      detail: { number: Number(squares[0].td.dataset.number), direction: dir.name },
    }));
  }

  #cellOf(node) {
    const td = node.closest('td');
    return td && this.at(td.parentElement.rowIndex, td.cellIndex);
  }

  #onFocus(e) {
    const cell = this.#cellOf(e.target);
    if (cell && cell !== this.#current) this.#select(cell);
  }

  // A second tap on the current square turns the corner.
  #onPointer(e) {
    const cell = this.#cellOf(e.target);
    if (cell && cell === this.#current) {
      e.preventDefault();
      this.#select(cell, other(this.#dir));
    }
  }

  #onKey(e) {
    if (e.ctrlKey || e.metaKey || e.altKey) return;
    const cell = this.#current;
    const arrows = { ArrowRight: [ACROSS, 1], ArrowLeft: [ACROSS, -1], ArrowDown: [DOWN, 1], ArrowUp: [DOWN, -1] };
    if (e.key in arrows) {
      const [dir, by] = arrows[e.key];
      e.preventDefault();
      if (dir !== this.#dir) this.#select(cell, dir);
      else this.#select(this.#step(cell, dir, by));
    } else if (e.key === ' ') {
      e.preventDefault();
      this.#select(cell, other(this.#dir));
    } else if (e.key === 'Backspace' && cell.input.value === '') {
      e.preventDefault();
      const back = this.#step(cell, this.#dir, -1);
      if (back) this.#write(back, '');
      this.#select(back);
    }
  }

  #onInput(e) {
    const cell = this.#cellOf(e.target);
    const letter = cell.input.value.slice(-1).toLocaleUpperCase();
    this.#write(cell, /\p{L}/u.test(letter) ? letter : '');
    if (cell.input.value) this.#select(this.#step(cell, this.#dir) ?? cell);
  }

  #write(cell, letter) {
    cell.input.value = letter;
    const rows = this.#cells.map(row => row.map(s => (s ? s.input.value || '.' : '#')).join(''));
    try {
      localStorage.setItem(this.key, rows.join('/'));
    } catch {
      // Private windows may refuse. The puzzle still works, it is just forgotten on reload.
    }
  }

  #restore() {
    const rows = localStorage.getItem(this.key)?.split('/') ?? [];
    rows.forEach((row, r) => [...row].forEach((ch, c) => {
      const cell = this.at(r, c);
      if (cell && ch !== '.' && ch !== '#') cell.input.value = ch;
    }));
  }
}

for (const table of document.querySelectorAll('table.crossword')) {
  new Grid(table, table.id);
}
