// Small canvas toy for the visitors' centre: drag the temperature, see where the glacier ends.
// No libraries: the touch screen in the hall has an old browser and no network.

(() => {
  "use strict";

  const N = 300; // cells along the valley
  const DX = 100; // metres
  const RHO_G = 910 * 9.81;
  const N_YEARS = 2; // years a frame; the toy is honest about time, at least

  const canvas = document.getElementById("valley");
  const ctx = canvas.getContext("2d", { alpha: false });
  const slider = document.getElementById("temperature");
  const readout = document.getElementById("readout");

  // A mountain side with a step in it: glaciers wait at the step for decades and then hurry on.
  const bed = Float64Array.from({ length: N }, (_, i) => {
    const x = i / N;
    return 3100 - 1900 * x + 140 * Math.tanh((x - 0.45) * 30) + 25 * Math.sin(x * 40);
  });
  let ice = new Float64Array(N);
  let year = 1850;
  const history = [];

  /** Gain or loss of ice at a height, in metres a year; 0.0075 per metre below the line, half as much above it. */
  function balance(height, warming) {
    const line = 2450 + 110 * warming;
    const d = height - line;
    return Math.min(d < 0 ? d * 0.0075 : d * 0.0035, 2);
  }

  function step(dt, warming) {
    const flux = new Float64Array(N + 1);
    for (let i = 1; i < N; i++) {
      const slope = (bed[i] + ice[i] - bed[i - 1] - ice[i - 1]) / DX;
      const h = (ice[i] + ice[i - 1]) / 2;
      // Shallow ice: flows with the fifth power of the thickness and the cube of the slope.
      const diffusion = 2.4e-24 * 3.156e7 * 0.4 * RHO_G ** 3 * h ** 5 * slope ** 2;
      flux[i] = -Math.min(diffusion, (0.2 * DX * DX) / dt) * slope;
    }
    for (let i = 0; i < N; i++) {
      const b = balance(bed[i] + ice[i], warming);
      ice[i] = Math.max(0, ice[i] + dt * (b - (flux[i + 1] - flux[i]) / DX));
    }
  }

  const terminus = () => {
    for (let i = N - 1; i >= 0; i--) if (ice[i] > 5) return i;
    return 0;
  };

  function draw(warming) {
    const { width: w, height: h } = canvas;
    const sx = (i) => (i / (N - 1)) * w;
    const sy = (z) => h - ((z - 900) / 2600) * h;

    const sky = ctx.createLinearGradient(0, 0, 0, h);
    sky.addColorStop(0, `hsl(${210 - 12 * warming} 55% 72%)`);
    sky.addColorStop(1, "#eef3f5");
    ctx.fillStyle = sky;
    ctx.fillRect(0, 0, w, h);

    const outline = (top) => {
      ctx.beginPath();
      ctx.moveTo(0, h);
      for (let i = 0; i < N; i++) ctx.lineTo(sx(i), sy(top(i)));
      ctx.lineTo(w, h);
      ctx.closePath();
    };
    outline((i) => bed[i] + ice[i]);
    ctx.fillStyle = "#cfe6f2";
    ctx.fill();
    outline((i) => bed[i]);
    ctx.fillStyle = "#6d6256";
    ctx.fill();

    // the line where winter and summer balance
    const y = sy(2450 + 110 * warming);
    ctx.setLineDash([8, 6]);
    ctx.strokeStyle = "#b3261e";
    ctx.beginPath();
    ctx.moveTo(0, y);
    ctx.lineTo(w, y);
    ctx.stroke();
    ctx.setLineDash([]);

    // markers that earlier visitors have left
    ctx.fillStyle = "#26221c";
    ctx.font = `${Math.round(h / 32)}px sans-serif`;
    for (const { at, label } of history) {
      ctx.fillRect(sx(at), sy(bed[at]) - 14, 2, 14);
      ctx.fillText(label, sx(at) + 4, sy(bed[at]) - 4);
    }
  }

  let last = 0;
  function frame(now) {
    requestAnimationFrame(frame);
    if (now - last < 40) return;
    last = now;
    const warming = Number(slider.value);
    for (let k = 0; k < 40; k++) step(N_YEARS / 40, warming);
    year += N_YEARS;
    const end = terminus();
    if (year % 50 === 0) history.push({ at: end, label: String(year) });
    if (history.length > 8) history.shift();
    draw(warming);
    readout.textContent = `Year ${year}: the glacier is ${((end * DX) / 1000).toFixed(1)} km long at ${warming >= 0 ? "+" : "−"}${Math.abs(warming).toFixed(1)} °C`;
  }

  function fit() {
    const ratio = Math.min(2, window.devicePixelRatio || 1);
    canvas.width = Math.round(canvas.clientWidth * ratio);
    canvas.height = Math.round(canvas.clientHeight * ratio);
  }

  // Nobody has touched it for three minutes: back to the beginning for the next family.
  let idle;
  function touched() {
    clearTimeout(idle);
    idle = setTimeout(() => {
      slider.value = "0";
      ice = new Float64Array(N);
      year = 1850;
      history.length = 0;
    }, 180_000);
  }

  window.addEventListener("resize", fit);
  for (const kind of ["pointerdown", "input", "keydown"]) window.addEventListener(kind, touched, { passive: true });
  fit();
  touched();
  requestAnimationFrame(frame);
})();
