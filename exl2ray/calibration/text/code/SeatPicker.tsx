import { useCallback, useMemo, useReducer, useRef, type KeyboardEvent } from "react";

export type Seat = Readonly<{
  row: number;
  column: number;
  status: "free" | "taken" | "blocked";
  priceCents: number;
}>;

type Props = {
  seats: ReadonlyArray<ReadonlyArray<Seat>>;
  /** Most seats one booking may contain. */
  limit?: number;
  currency?: string;
  onConfirm: (chosen: Seat[]) => void;
};

type State = { chosen: ReadonlySet<string>; cursor: { row: number; column: number }; notice: string };

type Action =
  | { type: "toggle"; seat: Seat; limit: number }
  | { type: "move"; row: number; column: number }
  | { type: "clear" };

const keyOf = (seat: Pick<Seat, "row" | "column">) => `${seat.row}:${seat.column}`;
const label = (seat: Seat) => `row ${String.fromCharCode(65 + seat.row)}, seat ${seat.column + 1}`;

function reducer(state: State, action: Action): State {
  switch (action.type) {
    case "move":
      return { ...state, cursor: { row: action.row, column: action.column } };
    case "clear":
      return { ...state, chosen: new Set(), notice: "Selection cleared" };
    case "toggle": {
      const { seat, limit } = action;
      const cursor = { row: seat.row, column: seat.column };
      if (seat.status !== "free") {
        return { ...state, cursor, notice: `${label(seat)} is not available` };
      }
      const chosen = new Set(state.chosen);
      if (chosen.delete(keyOf(seat))) {
        return { chosen, cursor, notice: `${label(seat)} released` };
      }
      if (chosen.size >= limit) {
        return { ...state, cursor, notice: `You can choose at most ${limit} seats` };
      }
      chosen.add(keyOf(seat));
      return { chosen, cursor, notice: `${label(seat)} chosen` };
    }
  }
}

const STEPS: Record<string, readonly [number, number]> = {
  ArrowUp: [-1, 0],
  ArrowDown: [1, 0],
  ArrowLeft: [0, -1],
  ArrowRight: [0, 1],
};

/**
 * A seating plan that works without a mouse. The grid is a single tab stop: arrow keys move inside
 * it, so a keyboard user does not have to tab through four hundred seats to reach the button.
 */
export function SeatPicker({ seats, limit = 6, currency = "EUR", onConfirm }: Props) {
  const [state, dispatch] = useReducer(reducer, {
    chosen: new Set<string>(),
    cursor: { row: 0, column: 0 },
    notice: "",
  });
  const grid = useRef<HTMLDivElement>(null);

  const chosen = useMemo(
    () => seats.flat().filter((seat) => state.chosen.has(keyOf(seat))),
    [seats, state.chosen],
  );
  const total = chosen.reduce((sum, seat) => sum + seat.priceCents, 0);
  const money = useMemo(() => new Intl.NumberFormat(undefined, { style: "currency", currency }), [currency]);

  const onKeyDown = useCallback(
    (event: KeyboardEvent) => {
      const step = STEPS[event.key];
      if (!step) return;
      event.preventDefault(); // otherwise the page scrolls under the plan
      const row = Math.min(Math.max(state.cursor.row + step[0], 0), seats.length - 1);
      const width = seats[row]?.length ?? 1; // rows near the stage are shorter
      const column = Math.min(Math.max(state.cursor.column + step[1], 0), width - 1);
      dispatch({ type: "move", row, column });
      grid.current?.querySelector<HTMLButtonElement>(`[data-seat="${row}:${column}"]`)?.focus();
    },
    [seats, state.cursor],
  );

  return (
    <section aria-label="Seating plan" className="seat-picker">
      <p className="stage" aria-hidden="true">
        Stage
      </p>
      <div role="grid" ref={grid} onKeyDown={onKeyDown} aria-multiselectable="true">
        {seats.map((row, r) => (
          <div role="row" key={r} className="seat-row">
            {row.map((seat) => {
              const selected = state.chosen.has(keyOf(seat));
              const focusable = seat.row === state.cursor.row && seat.column === state.cursor.column;
              return (
                <button
                  type="button"
                  role="gridcell"
                  key={keyOf(seat)}
                  data-seat={keyOf(seat)}
                  className={`seat seat--${selected ? "chosen" : seat.status}`}
                  aria-selected={selected}
                  aria-disabled={seat.status !== "free"}
                  aria-label={`${label(seat)}, ${money.format(seat.priceCents / 100)}`}
                  tabIndex={focusable ? 0 : -1}
                  onClick={() => dispatch({ type: "toggle", seat, limit })}
                >
                  {seat.column + 1}
                </button>
              );
            })}
          </div>
        ))}
      </div>

      {/* Announced by screen readers, and visible too: colour alone must not carry the message. */}
      <p role="status">{state.notice}</p>

      <footer>
        {chosen.length > 0 && (
          <>
            <ul>
              {chosen.map((seat) => (
                <li key={keyOf(seat)}>{label(seat)}</li>
              ))}
            </ul>
            <button type="button" onClick={() => dispatch({ type: "clear" })}>
              Start over
            </button>
          </>
        )}
        <button type="button" disabled={chosen.length === 0} onClick={() => onConfirm(chosen)}>
          Book {chosen.length || "no"} {chosen.length === 1 ? "seat" : "seats"} for {money.format(total / 100)}
        </button>
      </footer>
    </section>
  );
}
