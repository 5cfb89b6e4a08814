/** The conversations: kept in this browser, the newest first. It draws their list and knows no server. */
import { $, element } from "./stream.js";

const KEPT = 50;
const FIELDS = ["model", "tier", "ttft", "itl", "total", "miss", "temperature", "tokens", "system"];
let all = read();
let current = null;

function read() {
  try { return JSON.parse(localStorage.getItem("conversations")) ?? []; } catch { return []; }
}

/** Writes all conversations. When the browser has no room, the oldest goes; a private window keeps nothing. */
export function save() {
  current.settings = Object.fromEntries(FIELDS.map((name) => [name, $(name).value]));
  if (current.messages.length && !all.includes(current)) all.unshift(current);
  all = all.slice(0, KEPT);
  for (let count = all.length; count >= 0; count--) {
    try { localStorage.setItem("conversations", JSON.stringify(all.slice(0, count))); break; } catch { /* less next time */ }
  }
  list();
}

// Another tab has written: take its conversations, but keep the one that is shown here as it is here.
addEventListener("storage", ({ key }) => {
  if (key !== "conversations") return;
  all = read().map((each) => (each.id === current.id ? current : each));
  list();
});

export const now = () => current;

/** Makes a new conversation, with the settings of the last one. */
export function fresh() {
  current = { id: `${Date.now()} ${Math.random()}`, messages: [], skipped: 0, settings: current?.settings ?? all[0]?.settings ?? null };
  fill();
}

export function latest() {
  current = all[0] ?? null;
  if (current) fill(); else fresh();
}

function fill() {
  for (const [name, value] of Object.entries(current.settings ?? {})) {
    const field = $(name);
    if (field.tagName === "SELECT" && ![...field.options].some((each) => each.value === value)) {
      if (name !== "model") continue;
      field.append(new Option(value));  // the list of models comes later
    }
    field.value = value;
    field.dispatchEvent(new Event("input"));
  }
  $("tier").dispatchEvent(new Event("change"));
  list();
}

const title = (each) => each.messages[0]?.content.trim().split("\n")[0].slice(0, 60) || "New conversation";

let chosen = () => {};
/** Calls `act` when the user chooses another conversation, or deletes the one that is shown. */
export function whenChosen(act) { chosen = act; }

function list() {
  $("conversations").replaceChildren(...all.map((each) => {
    const row = element("li", each === current ? "current" : "");
    const open = element("button", "plain", title(each));
    const drop = element("button", "plain drop", "×");
    open.type = drop.type = "button";
    if (each === current) open.setAttribute("aria-current", "true");
    drop.setAttribute("aria-label", `Delete ${title(each)}`);
    drop.title = "Delete";
    open.addEventListener("click", () => { current = each; fill(); chosen(); });
    drop.addEventListener("click", () => {
      all = all.filter((other) => other !== each);
      const shown = each === current;
      if (shown) latest();
      save();
      if (shown) chosen();
    });
    row.append(open, drop);
    return row;
  }));
}

/** The shown conversation as Markdown, in a file. */
export function download() {
  const parts = current.messages.map((each) => `## ${each.role === "user" ? "You" : each.model || "Model"}\n\n${each.content}\n`);
  const file = new Blob([`# ${title(current)}\n\n`, parts.join("\n")], { type: "text/markdown" });
  const link = document.createElement("a");
  link.href = URL.createObjectURL(file);
  link.download = "conversation.md";
  link.click();
  URL.revokeObjectURL(link.href);
}
