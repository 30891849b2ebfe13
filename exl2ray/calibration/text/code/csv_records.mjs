// Streaming CSV reader. Run the tests with:  node --test csv_records.mjs
//
// Splitting on newlines and then on commas breaks as soon as a quoted field contains either, and a
// chunk boundary may fall anywhere: inside a quoted field, between the two quotes of an escaped
// quote, or between CR and LF. So the parser is a state machine fed one character at a time, whose
// state survives from one chunk to the next.

import assert from 'node:assert/strict';
import { test } from 'node:test';

const START = 0;      // at the beginning of a field
const PLAIN = 1;      // inside an unquoted field
const QUOTED = 2;     // inside quotes
const QUOTE_SEEN = 3; // a quote inside quotes: either an escape or the end of the field

export class CsvError extends Error {
  constructor(message, line) {
    super(`line ${line}: ${message}`);
    this.name = 'CsvError';
    this.line = line;
  }
}

/** Yields one array of strings per record of `chunks`, an (async) iterable of strings. */
export async function* rows(chunks, { delimiter = ',' } = {}) {
  let state = START;
  let field = '';
  let record = [];
  let line = 1;
  let openedAt = 0;
  let afterCr = false;

  const endField = () => {
    record.push(field);
    field = '';
    state = START;
  };

  for await (const chunk of chunks) {
    for (const ch of chunk) {
      const lineFeedOfCrLf = afterCr && ch === '\n';
      afterCr = ch === '\r';
      if ((ch === '\n' && !lineFeedOfCrLf) || ch === '\r') line += 1;

      if (state === QUOTED) {
        if (ch === '"') state = QUOTE_SEEN;
        else field += ch;
        continue;
      }
      if (lineFeedOfCrLf) continue;

      if (ch === '"' && state === START) {
        state = QUOTED;
        openedAt = line;
      } else if (ch === '"' && state === QUOTE_SEEN) {
        field += '"';
        state = QUOTED;
      } else if (ch === delimiter) {
        endField();
      } else if (ch === '\n' || ch === '\r') {
        // A line without any character is a separator some exports put between blocks, not a
        // record with one empty field.
        const blank = record.length === 0 && state === START;
        if (!blank) {
          endField();
          yield record;
          record = [];
        }
      } else if (state === QUOTE_SEEN) {
        throw new CsvError(`unexpected ${JSON.stringify(ch)} after a closing quote`, line);
      } else {
        field += ch;
        state = PLAIN;
      }
    }
  }

  if (state === QUOTED) throw new CsvError('quote is never closed', openedAt);
  if (state !== START || record.length > 0) {
    endField();
    yield record;
  }
}

/** Like rows(), but the first record names the properties of the following ones. */
export async function* objects(chunks, options) {
  let header;
  let number = 0;
  for await (const row of rows(chunks, options)) {
    number += 1;
    if (!header) {
      const twice = row.find((name, i) => row.indexOf(name) !== i);
      if (twice !== undefined) throw new CsvError(`column ${twice} appears twice`, 1);
      header = row;
      continue;
    }
    if (row.length !== header.length) {
      throw new Error(`record ${number} has ${row.length} fields, the header has ${header.length}`);
    }
    yield Object.fromEntries(header.map((name, i) => [name, row[i]]));
  }
}

async function collect(iterable) {
  const out = [];
  for await (const item of iterable) out.push(item);
  return out;
}

const tricky = 'id,note\r\n1,"said ""no"", twice"\r\n2,"two\r\nlines"\r\n3,\r\n';
const trickyRows = [['id', 'note'], ['1', 'said "no", twice'], ['2', 'two\r\nlines'], ['3', '']];

test('chunk boundaries do not matter', async () => {
  for (let size = 1; size <= tricky.length; size += 1) {
    const chunks = [];
    for (let i = 0; i < tricky.length; i += size) chunks.push(tricky.slice(i, i + size));
    assert.deepEqual(await collect(rows(chunks)), trickyRows, `chunks of ${size}`);
  }
});

test('the last line needs no newline', async () => {
  assert.deepEqual(await collect(rows(['a;b\nc;'], { delimiter: ';' })), [['a', 'b'], ['c', '']]);
});

test('blank lines are skipped, quoted empty fields are not', async () => {
  assert.deepEqual(await collect(rows(['x\n\n""\n'])), [['x'], ['']]);
});

test('an open quote is reported where it was opened', async () => {
  await assert.rejects(collect(rows(['a\nb,"c\nd\ne'])), { name: 'CsvError', line: 2 });
});

test('junk after a closing quote is an error', async () => {
  await assert.rejects(collect(rows(['"a"b'])), /unexpected "b"/);
});

test('objects are keyed by the header', async () => {
  const found = await collect(objects(['city,lat\nTartu,', '58.38\n']));
  assert.deepEqual(found, [{ city: 'Tartu', lat: '58.38' }]);
  await assert.rejects(collect(objects(['a,a\n1,2'])), /appears twice/);
  await assert.rejects(collect(objects(['a,b\n1'])), /1 fields, the header has 2/);
});
