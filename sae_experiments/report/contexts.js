// Text of corpora on the page: every character shown as what it is, with its activation as a shade.
const NAMED = { "\n": "⏎", "\t": "⇥", "\r": "␍" };
const ODD = /[\p{Cc}\p{Cf}\p{Cs}\p{Co}\p{Cn}\p{Zl}\p{Zp}]|(?! )\p{Zs}/u;
const NOTATION = new Set("␣⏎"); // in rules, where they stand for a space and a newline
const hex = (code, n) => code.toString(16).toUpperCase().padStart(n, "0");

// What stands for a character, and the class it is drawn in ("" for an ordinary one).
function glyph(char, bytes) {
  const code = char.codePointAt(0);
  if (char === " ") return [" ", "sp"];
  if (NAMED[char]) return [NAMED[char], "ws"];
  if (bytes ? code < 32 || code > 126 : code < 32 || (code > 126 && code < 160)) return [hex(code, 2), "raw"];
  if (ODD.test(char)) return [`U+${hex(code, 4)}`, "raw"];
  return /\p{M}/u.test(char) ? [`◌${char}`, ""] : [char, ""];
}
const nameOf = (char) => Array.from(char).length > 1 ? char : ({ " ": "space", "\n": "newline", "\t": "tab" })[char] || `U+${hex(char.codePointAt(0), 4)}`;
const charNode = (char, bytes) => {
  const whole = Array.from(char).length > 1, [text, kind] = whole ? [clear(char, bytes).replaceAll(" ", "␣"), ""] : glyph(char, bytes);
  return h("span", { class: `char ${kind}`, title: nameOf(char) }, kind === "sp" ? "␣" : text);
};

// Text such as a rule, with what cannot be seen made visible; plain spaces stay.
const clear = (text, bytes) => Array.from(String(text), (c) => { if (NOTATION.has(c)) return c; const [shown, kind] = glyph(c, bytes); return kind === "raw" ? `‹${shown}›` : shown; }).join("");

const LONGEST_ALIGNED = 60; // characters before the strongest place; longer contexts are wrapped

class Contexts {
  constructor(cell, bytes) {
    this.bytes = bytes;
    this.parts = (cell.text || []).map(([row, text]) => [row, Array.from(text)]);
  }
  // A packed context as characters, values from -99 to 99 by place, and the place and length of what it is about (place -1: all of it).
  open(packed) {
    const known = typeof packed[0] === "number", flat = packed[packed.length - 1], acts = new Map(), last = known ? 2 : 1;
    const span = packed.length > last + 2 ? packed[last + 1] : 1;
    for (let i = 0; i < flat.length; i += 2) acts.set(flat[i], flat[i + 1]);
    return { chars: known ? this.read(packed[0], packed[1]) : Array.from(packed[0]), at: packed[last], span, acts, row: known ? packed[0] + packed[2] : null };
  }
  read(row, length) {
    let a = 0, b = this.parts.length - 1;
    while (a < b) { const m = (a + b + 1) >> 1; if (this.parts[m][0] <= row) a = m; else b = m - 1; }
    const [first, chars] = this.parts[a] || [0, []];
    return chars.slice(row - first, row - first + length);
  }
  plain(packed) { return this.open(packed).chars.join(""); }

  // A list item with the text of a context; `around` keeps so many characters on either side.
  node(packed, max, around) {
    const { chars, at, span, acts, row } = this.open(packed), isAt = (i) => at >= 0 && i >= at && i < at + span, before = h("span", { class: "before" }), after = h("span", { class: "after" });
    const middle = Math.max(at, 0), first = around ? Math.max(0, middle - around) : 0;
    const last = around ? middle + around : chars.length;
    let run = null, text = at > 0 ? before : after;
    chars.forEach((char, i) => {
      if (i < first || i > last) return;
      if (i === at) { text = after; run = null; }
      const act = acts.get(i) || 0, level = Math.min(9, Math.ceil(Math.abs(act) / 11)), [shown, kind] = glyph(char, this.bytes);
      const look = [level ? (act > 0 ? `a${level}` : `n${level}`) : "", kind, isAt(i) ? "at" : ""].filter(Boolean).join(" ");
      if (run && !kind && i !== at && look === run.look) run.node.append(shown);
      else {
        const node = h("span", { class: look || null, title: act ? `${show((act / 99) * max)} at ${nameOf(char)}` : kind === "raw" || kind === "ws" ? nameOf(char) : null }, shown);
        text.append(node);
        run = kind || i === at ? null : { look, node };
      }
    });
    const value = at >= 0 ? acts.get(at) || 0 : Math.max(0, ...acts.values());
    return h("li", { class: "ctx" }, h("span", { class: "val", title: row === null ? null : `row ${row} of the held-out text` }, show((value / 99) * max)), h("span", { class: "text" }, at >= 0 ? before : null, after));
  }
  // The strongest characters stand below one another where the contexts are long enough for that to help.
  list(packed, max) {
    const places = packed.map((c) => this.open(c).at), isAligned = places.some((at) => at >= 12) && places.every((at) => at <= LONGEST_ALIGNED);
    return h("ol", { class: `contexts${isAligned ? " aligned" : ""}` }, packed.map((c) => this.node(c, max)));
  }
  // The last characters up to where the latent fires, for lists.
  short(packed, n = 18) {
    const { chars, at, span } = this.open(packed), end = at >= 0 ? at + span : chars.length;
    return chars.slice(Math.max(0, end - n), end).map((c) => { const [text, kind] = glyph(c, this.bytes); return kind === "sp" ? "·" : kind === "raw" ? `‹${text}›` : text; }).join("");
  }
}
