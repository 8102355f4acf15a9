// Start: theme, pictures, browser, graphs.
const themes = byId("theme"), page = document.documentElement;
const isDark = () => (page.dataset.theme ? page.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches);
function remember(key, value) {
  try { if (value === undefined) return localStorage.getItem(key); localStorage.setItem(key, value); } catch (error) { return null; } // a file:// page may have no storage
  return null;
}
function theme(wanted) {
  if (wanted === "dark" || wanted === "light") page.dataset.theme = wanted;
  themes.textContent = isDark() ? "Light" : "Dark";
}
theme(remember("sae-theme"));
themes.addEventListener("click", () => { const wanted = isDark() ? "light" : "dark"; remember("sae-theme", wanted); theme(wanted); });
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => theme());

async function pictures() {
  for (const place of document.querySelectorAll(".picture[data-blob]")) {
    try {
      const bytes = await (await unpack(place.dataset.blob)).blob(), image = h("img", { alt: place.dataset.alt });
      image.src = URL.createObjectURL(bytes.slice(0, bytes.size, "image/svg+xml"));
      const wide = h("button", { type: "button", class: "zoom", "aria-pressed": "false", click: () => wide.setAttribute("aria-pressed", String(place.classList.toggle("wide"))) }, "Full size");
      place.replaceChildren(image);
      await image.decode().catch(() => null);
      if (image.naturalWidth) image.style.setProperty("--natural", `${Math.round(image.naturalWidth)}px`);
      place.after(wide);
      wide.hidden = image.naturalWidth <= place.clientWidth + 1;
    } catch (error) {
      place.replaceChildren(h("p", { class: "quiet" }, `This figure cannot be shown: ${error.message}`));
    }
  }
}

// While a run is at work the page reloads, except under the hands of a reader.
const RELOAD_MS = 20000;
function keepUpToDate() {
  if (!DATA.running.length) return;
  let touched = Date.now();
  for (const kind of ["pointerdown", "pointermove", "keydown", "wheel", "touchstart"]) addEventListener(kind, () => { touched = Date.now(); }, { passive: true });
  setInterval(() => { if (Date.now() - touched > RELOAD_MS) location.reload(); }, RELOAD_MS);
}

async function start() {
  keepUpToDate();
  if (DATA.graphs.length) byId("graphs").append(...DATA.graphs.map(graphFigure));
  if (DATA.cells.length) {
    const browser = new Browser(byId("browser"));
    const [cell, latent] = DATA.cards[0] || [0, undefined];
    await browser.open(cell, latent);
    await drawCards(browser);
    await browser.follow();
    addEventListener("hashchange", () => browser.follow());
    addEventListener("keydown", (event) => {
      if (event.key !== "/" || /^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName)) return;
      event.preventDefault();
      browser.search.focus();
    });
  }
  await pictures();
  page.dataset.ready = "yes";
}
addEventListener("beforeprint", () => { for (const box of document.querySelectorAll("#summary details, #overview details")) box.open = true; });
start().catch((error) => { page.dataset.failed = error.message; throw error; });
