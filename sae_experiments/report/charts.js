// Small charts as SVG, in the colours of the page.
function histogram(counts, { width = 360, height = 110, low, high, format = show, label, unit }) {
  const top = Math.max(...counts, 1), step = (width - 8) / counts.length, base = height - 18;
  const bars = counts.map((n, i) => {
    const tall = n ? Math.max(1.5, (Math.log1p(n) / Math.log1p(top)) * (base - 12)) : 0;
    const from = low + ((high - low) * i) / counts.length, to = low + ((high - low) * (i + 1)) / counts.length;
    return s("rect", { class: "bar", x: 4 + i * step, y: base - tall, width: Math.max(step - 1.5, 1), height: tall },
      s("title", null, `${n} ${unit} from ${format(from)} to ${format(to)}`));
  });
  return s("svg", { class: "chart", viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": label },
    s("line", { class: "axis", x1: 4, x2: width - 4, y1: base, y2: base }), bars,
    s("text", { x: 4, y: height - 4 }, format(low)), s("text", { x: width - 4, y: height - 4, "text-anchor": "end" }, format(high)),
    s("text", { x: width - 4, y: 9, "text-anchor": "end" }, `${top} ${unit} (log scale)`));
}

// log10 density in bins of a quarter, the dead on the left; pick(bin) where a bar is chosen.
const BINS = 24, LOWEST = -6;
const UNKNOWN = NaN; // of a latent whose density was not measured
const binOf = (density) => (typeof density !== "number" ? UNKNOWN : density > 0 ? Math.min(BINS - 1, Math.max(0, Math.floor((Math.log10(density) - LOWEST) * 4))) : -1);
const binName = (bin) => (bin < 0 ? "dead" : `density ${percent(10 ** (LOWEST + bin / 4))} to ${percent(10 ** (LOWEST + (bin + 1) / 4))}`);

function densityChart(latents, chosen, pick) {
  const counts = new Map();
  for (const f of latents) if (!Number.isNaN(binOf(f.density))) counts.set(binOf(f.density), (counts.get(binOf(f.density)) || 0) + 1);
  const low = Math.min(...[...counts.keys()].filter((b) => b >= 0), BINS - 8), first = Math.max(0, Math.floor(low / 4) * 4), gap = counts.get(-1) ? 2.5 : 0;
  const width = 700, height = 150, base = height - 32, n = BINS - first + gap, step = (width - 48) / n, top = Math.max(...counts.values());
  const at = (bin) => 22 + (bin < 0 ? 0 : (bin - first + gap) * step), tick = (bin) => `${Number((100 * 10 ** (LOWEST + bin / 4)).toPrecision(1))} %`;
  const bars = [-1, ...Array.from({ length: BINS - first }, (_, i) => first + i)].map((bin) => {
    const count = counts.get(bin) || 0, tall = count ? Math.max(2, (count / top) * (base - 16)) : 0;
    if (!count) return null;
    const name = `${count} latent${count === 1 ? "" : "s"}: ${binName(bin)}`, toggle = () => pick(bin === chosen ? null : bin);
    const key = (event) => { if (event.key === "Enter" || event.key === " ") { event.preventDefault(); toggle(); } };
    return s("g", { class: `pick${bin < 0 ? " dead" : ""}${bin === chosen ? " on" : ""}`, role: "button", tabindex: 0, "aria-label": name, "aria-pressed": String(bin === chosen), "data-bin": bin, click: toggle, keydown: key },
      s("rect", { class: "hit", x: at(bin), y: 0, width: step, height: base }), s("rect", { class: "bar", x: at(bin) + 1, y: base - tall, width: step - 2, height: tall }), s("title", null, name));
  });
  const ticks = [];
  for (let bin = first; bin <= BINS; bin += 4) ticks.push(s("text", { class: bin % 8 ? "minor" : null, x: bin === BINS ? width - 2 : at(bin), y: base + 5, "text-anchor": bin === BINS ? "end" : "middle", "dominant-baseline": "hanging" }, tick(bin)));
  return s("svg", { class: "chart density", viewBox: `0 0 ${width} ${height}`, role: "group", "aria-label": "Latents by firing density; choose a bar to see its latents" },
    s("line", { class: "axis", x1: 22, x2: width - 26, y1: base, y2: base }), bars, ticks,
    counts.get(-1) ? s("text", { x: at(-1) + step / 2, y: base + 5, "text-anchor": "middle", "dominant-baseline": "hanging" }, "dead") : null,
    s("text", { class: "title", x: width / 2, y: height - 2, "text-anchor": "middle" }, "firing density: share of the held-out text a latent fires on (logarithmic)"), s("text", { class: "most", x: 22, y: 10 }, `latents (highest bar: ${top})`));
}
