// Outbox for the field app: inspections are written in places without reception and sent later.
//
// Jobs that concern the same asset must arrive in the order in which they were written; jobs of
// different assets may overtake each other. So there is one chain per asset and a global limit on
// how many chains run at the same time.

export type AssetId = string & { readonly __brand: "AssetId" };

export interface Job<P> {
  readonly id: string;
  readonly asset: AssetId;
  readonly payload: P;
  readonly created: number;
  attempts: number;
}

export interface Store<P> {
  load(): Promise<Job<P>[]>;
  put(job: Job<P>): Promise<void>;
  remove(id: string): Promise<void>;
}

/** What became of one attempt. "reject" means the server understood and said no: trying again is pointless. */
export type Outcome =
  | { kind: "sent" }
  | { kind: "later"; afterMs?: number }
  | { kind: "reject"; reason: string };

type Events<P> = {
  sent: Job<P>;
  rejected: { job: Job<P>; reason: string };
  idle: undefined;
};

type Listener<T> = (value: T) => void;

export interface Options<P> {
  store: Store<P>;
  send(payload: P, signal: AbortSignal): Promise<Outcome>;
  parallel?: number;
  baseDelayMs?: number;
  maxDelayMs?: number;
  sleep?(ms: number, signal: AbortSignal): Promise<void>;
  now?(): number;
}

const realSleep = (ms: number, signal: AbortSignal) =>
  new Promise<void>((resolve) => {
    const timer = setTimeout(done, ms);
    signal.addEventListener("abort", done, { once: true });
    function done() {
      clearTimeout(timer);
      signal.removeEventListener("abort", done);
      resolve();
    }
  });

export class Outbox<P> {
  private readonly chains = new Map<AssetId, Job<P>[]>();
  private readonly running = new Set<AssetId>();
  private readonly listeners: { [K in keyof Events<P>]: Set<Listener<Events<P>[K]>> } = {
    sent: new Set(),
    rejected: new Set(),
    idle: new Set(),
  };
  private readonly abort = new AbortController();
  private readonly opt: Required<Options<P>>;

  private constructor(options: Options<P>) {
    this.opt = { parallel: 3, baseDelayMs: 2_000, maxDelayMs: 15 * 60_000, sleep: realSleep, now: Date.now, ...options };
  }

  static async open<P>(options: Options<P>): Promise<Outbox<P>> {
    const box = new Outbox(options);
    const stored = await options.store.load();
    for (const job of stored.sort((a, b) => a.created - b.created)) box.enqueue(job);
    box.pump();
    return box;
  }

  async add(asset: AssetId, payload: P): Promise<string> {
    const job: Job<P> = { id: crypto.randomUUID(), asset, payload, created: this.opt.now(), attempts: 0 };
    await this.opt.store.put(job); // on disk first; a promise kept in memory only is no promise
    this.enqueue(job);
    this.pump();
    return job.id;
  }

  on<K extends keyof Events<P>>(event: K, fn: Listener<Events<P>[K]>): () => void {
    this.listeners[event].add(fn);
    return () => void this.listeners[event].delete(fn);
  }

  get pending(): number {
    let n = 0;
    for (const chain of this.chains.values()) n += chain.length;
    return n;
  }

  close(): void {
    this.abort.abort();
  }

  private enqueue(job: Job<P>): void {
    const chain = this.chains.get(job.asset);
    if (chain) chain.push(job);
    else this.chains.set(job.asset, [job]);
  }

  private pump(): void {
    for (const asset of this.chains.keys()) {
      if (this.running.size >= this.opt.parallel) return;
      if (this.running.has(asset)) continue;
      this.running.add(asset);
      void this.drain(asset).finally(() => {
        this.running.delete(asset);
        if (this.abort.signal.aborted) return;
        if (this.chains.size === 0) this.emit("idle", undefined);
        else this.pump();
      });
    }
  }

  private async drain(asset: AssetId): Promise<void> {
    const { signal } = this.abort;
    const chain = this.chains.get(asset)!;
    while (chain.length > 0 && !signal.aborted) {
      const job = chain[0];
      const outcome = await this.attempt(job);
      if (signal.aborted) return;
      if (outcome.kind === "later") {
        await this.opt.store.put(job);
        await this.opt.sleep(outcome.afterMs ?? this.delay(job.attempts), signal);
        continue;
      }
      await this.opt.store.remove(job.id);
      chain.shift();
      if (outcome.kind === "sent") this.emit("sent", job);
      else this.emit("rejected", { job, reason: outcome.reason });
    }
    if (chain.length === 0) this.chains.delete(asset);
  }

  private async attempt(job: Job<P>): Promise<Outcome> {
    job.attempts += 1;
    try {
      return await this.opt.send(job.payload, this.abort.signal);
    } catch {
      return { kind: "later" };
    }
  }

  private delay(attempts: number): number {
    const full = Math.min(this.opt.baseDelayMs * 2 ** (attempts - 1), this.opt.maxDelayMs);
    return full / 2 + (Math.random() * full) / 2;
  }

  private emit<K extends keyof Events<P>>(event: K, value: Events<P>[K]): void {
    for (const fn of [...this.listeners[event]]) fn(value);
  }
}
