/** Wires the page: its two views, its colours, and the state of the server from the live stream. */
import { start } from "./chat.js";
import { start as slide } from "./ladder/deadline.js";
import { refresh, start as panel } from "./ladder/panel.js";
import { follow, hurry, open, redraw } from "./live.js";
import { learn, models, start as settle } from "./settings.js";
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
  if (view !== "live") return;
  open();
  refresh(true).catch(() => {});
}

function paint(theme) {
  if (theme === "auto") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = theme;
  $("theme").textContent = `Theme: ${theme}`;
  try { localStorage.setItem("theme", theme); } catch { /* a private window keeps nothing */ }
  redraw();
}

function drawer(shown) {
  document.body.classList.toggle("drawer-open", shown);
  $("menu").setAttribute("aria-expanded", `${shown}`);
  $("menu").textContent = shown ? "Close" : "Settings";
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

$("menu").addEventListener("click", () => drawer(!document.body.classList.contains("drawer-open")));
document.addEventListener("keydown", (event) => { if (event.key === "Escape") drawer(false); });
$("log").addEventListener("click", () => drawer(false));

paint(painted());
settle(() => { models().catch(() => {}); hurry(); });
slide();
panel();
start();
show(location.hash === "#live" ? "live" : "play");
follow((now, problem) => {
  const ready = now?.ready ?? false, locked = problem?.status === 401;
  const text = locked ? "needs a key" : problem ? "not reachable" : ready ? "ready" : "the engine is starting";
  if (ready) refresh().catch(() => {});
  const changed = $("status-text").textContent !== text;
  $("status").className = `status ${ready ? "ready" : "down"}`;
  $("status").title = problem?.message ?? "";
  if (!changed) return;
  $("status-text").textContent = text;
  if (locked) {
    location.hash = "play";
    drawer(true);
    $("key").focus();
  }
  if (now) learn(now.objectives);
  if (ready) models().catch(() => {});
});
