import { useId, useOptimistic, useReducer, useRef, useTransition, type FormEvent, type KeyboardEvent } from "react";
import clsx from "clsx";
import styles from "./ModeratorBoard.module.scss";

type Verdict = "pass" | "hold" | "bin";

interface Poem {
  id: string;
  title: string;
  lines: string[];
  school: string;
  pupilAge: number;
  verdict?: Verdict;
  note?: string;
}

type Action =
  | { type: "move"; by: 1 | -1 }
  | { type: "jump"; to: number }
  | { type: "reveal" }
  | { type: "filter"; only: Verdict | "unread" | null };

interface State {
  at: number;
  revealed: boolean;
  only: Verdict | "unread" | null;
}

const reduce = (count: number) => (state: State, action: Action): State => {
  switch (action.type) {
    case "move":
      return { ...state, at: (state.at + action.by + count) % Math.max(count, 1), revealed: false };
    case "jump":
      return { ...state, at: action.to, revealed: false };
    case "reveal":
      return { ...state, revealed: true };
    case "filter":
      return { at: 0, revealed: false, only: action.only };
  }
};

/**
 * One judge's view of a poetry competition for schools. The name of the school stays hidden until a verdict is given,
 * since a judge who knows it reads differently. Keys: P pass, H hold, B bin, J and K for next and previous.
 */
export function ModeratorBoard({ poems, save }: { poems: Poem[]; save: (id: string, v: Verdict, note: string) => Promise<void> }) {
  const [shown, apply] = useOptimistic(poems, (list, change: Pick<Poem, "id" | "verdict" | "note">) =>
    list.map((p) => (p.id === change.id ? { ...p, ...change } : p)),
  );
  const [pending, startTransition] = useTransition();
  const [state, dispatch] = useReducer(reduce(shown.length), { at: 0, revealed: false, only: null });
  const noteRef = useRef<HTMLTextAreaElement>(null);
  const headingId = useId();

  const visible = shown.filter((p) => state.only === null || (state.only === "unread" ? !p.verdict : p.verdict === state.only));
  const poem = visible[state.at];

  function decide(verdict: Verdict) {
    if (!poem || pending) return;
    const note = noteRef.current?.value.trim() ?? "";
    if (verdict === "bin" && note.length < 10) {
      noteRef.current?.setCustomValidity("A child wrote this. Say in a sentence why it goes no further.");
      noteRef.current?.reportValidity();
      return;
    }
    startTransition(async () => {
      apply({ id: poem.id, verdict, note });
      await save(poem.id, verdict, note);
      dispatch({ type: "reveal" });
    });
  }

  function onKeyDown(e: KeyboardEvent<HTMLElement>) {
    if (e.target instanceof HTMLTextAreaElement || e.ctrlKey || e.metaKey || e.altKey) return;
    const keys: Record<string, () => void> = {
      p: () => decide("pass"),
      h: () => decide("hold"),
      b: () => decide("bin"),
      j: () => dispatch({ type: "move", by: 1 }),
      k: () => dispatch({ type: "move", by: -1 }),
    };
    const act = keys[e.key.toLowerCase()];
    if (act) {
      e.preventDefault();
      act();
    }
  }

  const onSubmit = (e: FormEvent<HTMLFormElement>) => {
    e.preventDefault();
    const button = (e.nativeEvent as SubmitEvent).submitter as HTMLButtonElement | null;
    if (button) decide(button.value as Verdict);
  };

  return (
    <main className={styles.board} onKeyDown={onKeyDown} tabIndex={-1} aria-labelledby={headingId}>
      <nav aria-label="Filter">
        {([null, "unread", "pass", "hold", "bin"] as const).map((only) => (
          <button
            key={only ?? "all"}
            type="button"
            aria-pressed={state.only === only}
            onClick={() => dispatch({ type: "filter", only })}
          >
            {only ?? "all"} ({shown.filter((p) => only === null || (only === "unread" ? !p.verdict : p.verdict === only)).length})
          </button>
        ))}
      </nav>

      {poem ? (
        <article key={poem.id} className={clsx(styles.poem, poem.verdict && styles[poem.verdict])} aria-busy={pending}>
          <h1 id={headingId}>{poem.title || <em>without a title</em>}</h1>
          <p className={styles.lines}>
            {poem.lines.map((line, i) => (
              <span key={i}>
                {line}
                <br />
              </span>
            ))}
          </p>
          <footer>
            aged {poem.pupilAge}
            {(state.revealed || poem.verdict) && <>, {poem.school}</>}
          </footer>
          <form onSubmit={onSubmit}>
            <textarea
              ref={noteRef}
              defaultValue={poem.note}
              rows={3}
              maxLength={400}
              onInput={(e) => e.currentTarget.setCustomValidity("")}
              aria-label="Note to the pupil"
            />
            <button value="pass">Pass</button>
            <button value="hold">Hold</button>
            <button value="bin">Bin</button>
          </form>
        </article>
      ) : (
        <p id={headingId}>{state.only === "unread" ? "All read. Go for a walk." : "Nothing in this heap."}</p>
      )}
      <progress max={shown.length} value={shown.filter((p) => p.verdict).length} aria-label="Poems judged" />
    </main>
  );
}
