/**
 * The life of a parcel as a state machine that the compiler can check.
 *
 * Each state carries exactly the data that exists in it: a parcel "in transit" has a vehicle, a
 * delivered one has a signature, and there is no way to ask a lost parcel who signed for it.
 */

declare const brand: unique symbol;
type Branded<T, Name extends string> = T & { readonly [brand]: Name };

export type ParcelId = Branded<string, "ParcelId">;
export type DepotId = Branded<string, "DepotId">;

export function parcelId(text: string): ParcelId {
  // Two letters, nine digits, country: S10 of the Universal Postal Union, check digit included.
  const match = /^([A-Z]{2})(\d{8})(\d)([A-Z]{2})$/.exec(text);
  if (!match) throw new RangeError(`not a parcel number: ${text}`);
  const weights = [8, 6, 4, 2, 3, 5, 9, 7];
  const sum = [...match[2]!].reduce((acc, digit, i) => acc + Number(digit) * weights[i]!, 0);
  const remainder = 11 - (sum % 11);
  const check = remainder === 10 ? 0 : remainder === 11 ? 5 : remainder;
  if (check !== Number(match[3])) throw new RangeError(`check digit of ${text} should be ${check}`);
  return text as ParcelId;
}

interface States {
  announced: { sender: string };
  stored: { depot: DepotId; since: Date };
  inTransit: { vehicle: string; from: DepotId; attempts: number };
  delivered: { signature: string; at: Date };
  returned: { reason: ReturnReason };
}

type ReturnReason = "refused" | "unreachable" | "damaged";

export type Parcel = {
  [K in keyof States]: { readonly id: ParcelId; readonly state: K } & Readonly<States[K]>;
}[keyof States];

export type ScanEvent =
  | { type: "arrived"; depot: DepotId; at: Date }
  | { type: "loaded"; vehicle: string }
  | { type: "handedOver"; signature: string; at: Date }
  | { type: "nobodyHome"; depot: DepotId; at: Date }
  | { type: "refused" };

export type Result<T> = { ok: true; value: T } | { ok: false; error: string };

const ok = <T>(value: T): Result<T> => ({ ok: true, value });
const fail = <T>(error: string): Result<T> => ({ ok: false, error });

const MAX_ATTEMPTS = 3;

/** Attempts survive a night in the depot although the `stored` state does not show them. */
export class Tracker {
  readonly #attempts = new Map<ParcelId, number>();

  apply(parcel: Parcel, event: ScanEvent): Result<Parcel> {
    const { id } = parcel;
    switch (parcel.state) {
      case "announced":
        return event.type === "arrived"
          ? ok({ id, state: "stored", depot: event.depot, since: event.at })
          : fail(`${id} has not been handed in yet, but was reported as ${event.type}`);

      case "stored":
        if (event.type === "loaded") {
          const attempts = this.#attempts.get(id) ?? 0;
          return ok({ id, state: "inTransit", vehicle: event.vehicle, from: parcel.depot, attempts });
        }
        // Scanning a parcel twice at the same depot is daily business; keep the first time stamp.
        if (event.type === "arrived") {
          return ok(
            event.depot === parcel.depot
              ? parcel
              : { id, state: "stored", depot: event.depot, since: event.at },
          );
        }
        return fail(`${id} lies in ${parcel.depot} and cannot be ${event.type}`);

      case "inTransit":
        return this.#onTheRoad(parcel, event);

      case "delivered":
      case "returned":
        return fail(`${id} was already ${parcel.state}`);

      default:
        return unreachable(parcel);
    }
  }

  #onTheRoad(parcel: Extract<Parcel, { state: "inTransit" }>, event: ScanEvent): Result<Parcel> {
    const { id } = parcel;
    switch (event.type) {
      case "arrived":
        return ok({ id, state: "stored", depot: event.depot, since: event.at });
      case "handedOver":
        this.#attempts.delete(id);
        return ok({ id, state: "delivered", signature: event.signature, at: event.at });
      case "nobodyHome": {
        const attempts = parcel.attempts + 1;
        if (attempts >= MAX_ATTEMPTS) {
          this.#attempts.delete(id);
          return ok({ id, state: "returned", reason: "unreachable" });
        }
        this.#attempts.set(id, attempts);
        return ok({ id, state: "stored", depot: event.depot, since: event.at });
      }
      case "refused":
        this.#attempts.delete(id);
        return ok({ id, state: "returned", reason: "refused" });
      case "loaded":
        // A change of vehicle at a transfer point; the depot of origin stays the same.
        return ok({ ...parcel, vehicle: event.vehicle });
      default:
        return unreachable(event);
    }
  }
}

/** Fails to compile when a case is missing, and throws when untyped code gets here anyway. */
function unreachable(value: never): never {
  throw new Error(`unexpected ${JSON.stringify(value)}`);
}

export function replay(start: Parcel, events: Iterable<ScanEvent>): Result<Parcel> {
  const tracker = new Tracker();
  let current = start;
  for (const event of events) {
    const next = tracker.apply(current, event);
    if (!next.ok) return next;
    current = next.value;
  }
  return ok(current);
}
