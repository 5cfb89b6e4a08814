/** Wires the page: its two views, its colours, and the state of the server from the live stream. */
import { learn, models, start } from "./chat.js";
import { follow, open, redraw } from "./live.js";
import { $ } from "./stream.js";

const VIEWS = ["play", "live"];
const THEMES = ["auto", "light", "dark"];

function show(view) {
  for (const name of VIEWS) {
    const chosen = name === view;
    $(name).hidden = !chosen;
    $(`tab-${name}`).setAttribute("aria-selected", `${chosen}`);
    $(`tab-${name}`).tabIndex = chosen ? 0 : -1;
  }
  if (view === "live") open();
}

function paint(theme) {
  if (theme === "auto") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = theme;
  $("theme").textContent = theme[0].toUpperCase() + theme.slice(1);
  $("theme").setAttribute("aria-label", `Colours: ${theme}`);
  try { localStorage.setItem("theme", theme); } catch { /* a private window keeps nothing */ }
  redraw();
}

function painted() {
  try { return THEMES.find((theme) => theme === localStorage.getItem("theme")) ?? "auto"; } catch { return "auto"; }
}

for (const name of VIEWS) {
  $(`tab-${name}`).addEventListener("click", () => { location.hash = name; });
  $(`tab-${name}`).addEventListener("keydown", (event) => {
    if (event.key !== "ArrowLeft" && event.key !== "ArrowRight") return;
    location.hash = VIEWS.find((other) => other !== name);
    $(`tab-${location.hash.slice(1)}`).focus();
  });
}
addEventListener("hashchange", () => show(location.hash === "#live" ? "live" : "play"));
$("theme").addEventListener("click", () => paint(THEMES[(THEMES.indexOf(painted()) + 1) % THEMES.length]));
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);

paint(painted());
start();
show(location.hash === "#live" ? "live" : "play");
follow((now, problem) => {
  const ready = now?.ready ?? false;
  const text = problem ? "not reachable" : ready ? "ready" : "the engine is starting";
  const changed = $("status-text").textContent !== text;
  $("status").className = `status ${ready ? "ready" : "down"}`;
  $("status").title = problem ?? "";
  if (!changed) return;
  $("status-text").textContent = text;
  if (now) learn(now.objectives);
  if (ready) models().catch(() => {});
});
