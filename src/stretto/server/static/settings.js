/** The settings beside a conversation: the model, the objective, and the request that they make. */
import { $, headers } from "./stream.js";
import { copy } from "./markdown.js";
import { now } from "./conversations.js";

let objectives = {};
let contexts = {};
let ladders = {};

/** The default objective of each tier, from the live stream. */
export function learn(tiers) {
  objectives = tiers;
  const usual = objectives[$("tier").value] ?? {};
  for (const name of ["ttft", "itl", "total"]) {
    $(name).placeholder = usual[`${name}_ms`] == null ? "none" : `${usual[`${name}_ms`]} ms`;
  }
}

export function objective() {
  const limits = {};
  for (const name of ["ttft", "itl", "total"]) {
    const value = parseFloat($(name).value);
    if (value > 0) limits[`${name}_ms`] = value;
  }
  if ($("miss").value) limits.on_miss = $("miss").value;
  return limits;
}

/** The limits that hold: the tier's, and above them the request's own. */
export const limits = () => ({ ...objectives[$("tier").value], ...objective() });

/** The messages that are sent: without the oldest, if the user left those out, and without empty answers. */
export function history() {
  const system = $("system").value.trim();
  const sent = now().messages.slice(now().skipped).filter((each) => each.content);
  return [...(system ? [{ role: "system", content: system }] : []), ...sent.map(({ role, content }) => ({ role, content }))];
}

export function request() {
  const tokens = parseInt($("tokens").value, 10);
  return {
    model: $("model").value,
    messages: history(),
    temperature: parseFloat($("temperature").value),
    service_tier: $("tier").value,
    ...(Object.keys(objective()).length && { objective: objective() }),
    stream: true,
    stream_options: { include_usage: true },
    ...(tokens > 0 && { max_completion_tokens: tokens }),
  };
}

/** Most tokens of a conversation with the chosen model; null if the server does not say. */
export const context = () => contexts[$("model").value] ?? null;

/** The ladder of that name, or that has a variant of that name: its `id` and its `variants`, the best first. Null for
 * any other model. */
export const ladder = (name = $("model").value) => ladders[name] ?? null;

function curl(button) {
  const quote = (text) => `'${text.replaceAll("'", "'\\''")}'`;
  const body = request();
  const said = $("input").value.trim();
  if (said) body.messages.push({ role: "user", content: said });
  const key = $("key").value.trim() ? ' -H "Authorization: Bearer $STRETTO_API_KEY"' : "";
  const url = new URL("v1/chat/completions", document.baseURI);
  copy(button, `curl -N ${url} -H 'Content-Type: application/json'${key} -d ${quote(JSON.stringify(body))}`);
}

/** Reads what the server says of its models. Returns them, or null if it refuses. */
export async function catalogue() {
  const response = await fetch("v1/models", { headers: headers() });
  if (!response.ok) return null;
  const { data } = await response.json();
  contexts = Object.fromEntries(data.map((model) => [model.id, model.max_model_len]));
  ladders = {};
  for (const { id, variants } of data) for (const name of variants ? [id, ...variants.map((each) => each.id)] : []) ladders[name] = { id, variants };
  return data;
}

export async function models() {
  const data = await catalogue();
  if (!data) return;
  const chosen = $("model").value;
  $("model").replaceChildren(...data.map((model) => new Option(model.id)));
  if (data.some((model) => model.id === chosen)) $("model").value = chosen;
  $("model").dispatchEvent(new Event("change", { bubbles: true }));
}

/** `changed` is called after the key has changed. */
export function start(changed) {
  try { $("key").value = sessionStorage.getItem("key") ?? ""; } catch { /* a private window keeps nothing */ }
  $("key").addEventListener("change", () => {
    try { sessionStorage.setItem("key", $("key").value.trim()); } catch { /* likewise */ }
    changed();
  });
  $("tier").addEventListener("change", () => learn(objectives));
  $("temperature").addEventListener("input", () => { $("temperature-value").textContent = $("temperature").value; });
  $("curl").addEventListener("click", () => curl($("curl")));
}
