/** Reads the server's streams. */

/** The JSON of each server-sent event of a response, until [DONE]. `at`, if given, gets the time of its receipt. */
export async function* events(response, at = () => {}) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    at(performance.now());
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      const data = part.replace(/^data: /, "");
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}

/** A refusal as an Error. `seconds`: the server's `Retry-After`, if any. */
export async function refusal(response) {
  const body = await response.json().catch(() => null);
  const error = new Error(body?.error?.message ?? `The server answered ${response.status}.`);
  error.status = response.status;
  error.code = body?.error?.code;
  error.seconds = parseFloat(response.headers.get("retry-after")) || null;
  return error;
}

export const $ = (id) => document.getElementById(id);

export function element(name, className = "", text = "") {
  const made = document.createElement(name);
  if (className) made.className = className;
  made.textContent = text;
  return made;
}

export function headers() {
  const key = $("key").value.trim();
  return { "Content-Type": "application/json", ...(key && { Authorization: `Bearer ${key}` }) };
}

/** Milliseconds as text: `23 ms`, `1.5 s`. */
export function duration(ms) {
  if (ms == null) return "–";
  return ms >= 10_000 ? `${(ms / 1000).toFixed(0)} s` : ms >= 1000 ? `${(ms / 1000).toFixed(1)} s`
    : ms >= 10 ? `${ms.toFixed(0)} ms` : `${ms.toFixed(1)} ms`;
}
