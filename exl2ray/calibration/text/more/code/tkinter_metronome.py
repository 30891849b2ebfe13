#!/usr/bin/env python3
"""A metronome for rehearsing dances with uneven bars: 7/8 as 3+2+2, 11/8 as 2+2+3+2+2, and so on."""
import re
import time
import tkinter as tk
from tkinter import messagebox, ttk

DANCES = {
    "Račenica (2+2+3)": "2+2+3",
    "Kopanica (2+2+3+2+2)": "2+2+3+2+2",
    "Paidushko (2+3)": "2+3",
    "Daichovo (2+2+2+3)": "2+2+2+3",
    "Waltz": "3",
}


def parse_bar(text: str) -> list[bool]:
    """Returns one flag a pulse, true where a group begins."""
    if not re.fullmatch(r"\s*[1-9](\s*\+\s*[1-9])*\s*", text):
        raise ValueError(f"“{text}” is not a sum of small numbers")
    pulses: list[bool] = []
    for group in text.split("+"):
        pulses += [True] + [False] * (int(group) - 1)
    return pulses


class Metronome(ttk.Frame):
    def __init__(self, master: tk.Tk):
        super().__init__(master, padding=12)
        self.tempo = tk.IntVar(value=360)
        self.bar = tk.StringVar(value="2+2+3")
        self.dance = tk.StringVar()
        self.job: str | None = None
        self.taps: list[float] = []
        self._build()
        master.bind("<space>", lambda e: self.toggle())
        master.bind("t", lambda e: self.tap())
        master.protocol("WM_DELETE_WINDOW", self.quit_cleanly)

    def _build(self) -> None:
        self.columnconfigure(1, weight=1)
        box = ttk.Combobox(self, textvariable=self.dance, values=list(DANCES), state="readonly")
        box.grid(row=0, column=0, columnspan=3, sticky="ew")
        box.bind("<<ComboboxSelected>>", self._choose)
        ttk.Label(self, text="Bar").grid(row=1, column=0, sticky="w", pady=6)
        entry = ttk.Entry(self, textvariable=self.bar, width=18)
        entry.grid(row=1, column=1, columnspan=2, sticky="ew")
        entry.bind("<Return>", lambda e: self.restart())
        ttk.Label(self, text="Pulses a minute").grid(row=2, column=0, sticky="w")
        ttk.Scale(self, from_=120, to=640, variable=self.tempo,
                  command=lambda v: self.tempo.set(round(float(v)))).grid(row=2, column=1, sticky="ew")
        ttk.Label(self, textvariable=self.tempo, width=4).grid(row=2, column=2)
        self.canvas = tk.Canvas(self, width=420, height=70, highlightthickness=0)
        self.canvas.grid(row=3, column=0, columnspan=3, pady=10)
        self.button = ttk.Button(self, text="Start", command=self.toggle)
        self.button.grid(row=4, column=0)
        ttk.Button(self, text="Tap (T)", command=self.tap).grid(row=4, column=2)

    def _choose(self, _event) -> None:
        self.bar.set(DANCES[self.dance.get()])
        self.restart()

    def toggle(self) -> None:
        self.stop() if self.job else self.start()

    def restart(self) -> None:
        if self.job:
            self.stop()
            self.start()

    def start(self) -> None:
        try:
            self.pulses = parse_bar(self.bar.get())
        except ValueError as e:
            messagebox.showerror("Bar", str(e), parent=self)
            return
        self._draw()
        self.position = 0
        self.due = time.perf_counter()
        self.button["text"] = "Stop"
        self._tick()

    def stop(self) -> None:
        if self.job:
            self.after_cancel(self.job)
        self.job = None
        self.button["text"] = "Start"

    def _draw(self) -> None:
        self.canvas.delete("all")
        step = 420 / len(self.pulses)
        self.dots = []
        for i, strong in enumerate(self.pulses):
            r = 14 if strong else 8
            x = step * (i + 0.5)
            self.dots.append(self.canvas.create_oval(x - r, 35 - r, x + r, 35 + r, fill="#cfc7b8", outline=""))

    def _tick(self) -> None:
        for i, dot in enumerate(self.dots):
            lit = i == self.position
            self.canvas.itemconfigure(dot, fill=("#b3261e" if self.pulses[i] else "#40515c") if lit else "#cfc7b8")
        if self.pulses[self.position]:
            self.bell()
        self.position = (self.position + 1) % len(self.pulses)
        # `after` is late by up to 15 ms, so the next beat is counted from when this one should have been.
        self.due += 60 / self.tempo.get()
        self.job = self.after(max(1, round(1000 * (self.due - time.perf_counter()))), self._tick)

    def tap(self) -> None:
        now = time.perf_counter()
        if self.taps and now - self.taps[-1] > 2:
            self.taps.clear()
        self.taps = (self.taps + [now])[-6:]
        if len(self.taps) >= 3:
            mean = (self.taps[-1] - self.taps[0]) / (len(self.taps) - 1)
            self.tempo.set(min(640, max(120, round(60 / mean))))

    def quit_cleanly(self) -> None:
        self.stop()
        self.master.destroy()


if __name__ == "__main__":
    root = tk.Tk()
    root.title("Uneven")
    root.resizable(False, False)
    Metronome(root).pack()
    root.mainloop()
