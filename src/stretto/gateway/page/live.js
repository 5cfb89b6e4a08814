"use strict";

const SHOWN = 120;
const TIERS = ["priority", "default", "flex"];
const number = (value, unit = "") => (value == null ? "–" : `${value < 10 ? value.toFixed(1) : value.toFixed(0)}${unit}`);
const pair = (values) => `${number(values[0])} / ${number(values[1])} ms`;
const share = (kept) => (kept ? kept[0] / kept[1] * 100 : null);
const TILES = [
  ...TIERS.map((tier) => [`On time, ${tier}`, (now) => share(now.on_time[tier]), (now) => number(share(now.on_time[tier]), " %")]),
  ["First token, p50 / p99", (now) => now.ttft_ms[0], (now) => pair(now.ttft_ms)],
  ["Gap, p50 / p99", (now) => now.itl_ms[0], (now) => pair(now.itl_ms)],
  ["Decoded tokens/s", (now) => now.tokens_s, (now) => number(now.tokens_s)],
  ["Prompt tokens/s", (now) => now.prefill_s, (now) => number(now.prefill_s)],
  ["Running / waiting", (now) => now.running, (now) => `${now.running} / ${now.waiting}`],
  ["KV blocks in use", (now) => now.blocks_used, (now) => `${now.blocks_used}`],
  ["Step-time error, p50", (now) => now.model_error, (now) => number(now.model_error == null ? null : now.model_error * 100, " %")],
  ["Engine restarts", (now) => now.restarts, (now) => `${now.restarts}`],
].map(([title, value, words]) => ({ title, value, words, past: [] }));

function layTiles() {
  for (const tile of TILES) {
    const box = document.createElement("div");
    box.className = "tile";
    const title = document.createElement("h3");
    title.textContent = tile.title;
    tile.text = document.createElement("p");
    tile.text.textContent = "–";
    tile.line = shape("path", {});
    const svg = shape("svg", { viewBox: `0 0 ${SHOWN} 32`, preserveAspectRatio: "none", "aria-hidden": "true" });
    svg.append(tile.line);
    box.append(title, tile.text, svg);
    document.getElementById("tiles").append(box);
  }
}

function show(now) {
  for (const tile of TILES) {
    tile.text.textContent = tile.words(now);
    tile.past.push(tile.value(now));
    if (tile.past.length > SHOWN) tile.past.shift();
    const top = Math.max(1e-9, ...tile.past.map((value) => value ?? 0));
    let pen = "M";
    tile.line.setAttribute("d", tile.past.map((value, index) => {
      if (value == null) { pen = "M"; return ""; }
      const point = `${pen}${index} ${(30 - value / top * 28).toFixed(1)}`;
      pen = "L";
      return point;
    }).join(""));
  }
}

/** Follows the one stream for as long as the page is open; `headers` gives the key, `read` the events. */
async function follow(headers, read, told) {
  layTiles();
  for (;;) {
    try {
      const response = await fetch("live", { headers: headers() });
      if (!response.ok) throw new Error((await response.json()).error.message);
      for await (const now of read(response)) {
        document.getElementById("live-note").textContent = now.ended ? "The last ten seconds; on time since the start." : "No requests yet.";
        show(now);
        told(now.ready, now.ready ? "ready" : "the engine is starting");
      }
      throw new Error("The server closed the stream.");
    } catch (error) {
      const reason = error instanceof TypeError ? "The server cannot be reached." : error.message;
      document.getElementById("live-note").textContent = `${reason} Trying again.`;
      told(false, "not reachable");
    }
    await new Promise((done) => setTimeout(done, 1500));
  }
}
