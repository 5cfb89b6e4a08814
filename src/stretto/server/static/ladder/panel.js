/** The ladder in the live view: its frontier, each variant's share of the answers, and what feedback has taught. */
import { $, element, headers } from "../stream.js";
import { catalogue, ladder } from "../settings.js";
import { frontier, milliseconds } from "./frontier.js";

const PAUSE_MS = 3000;
const COUNT = /^stretto_variant_answers_total\{(.*)\} (\S+)$/gm;
const COLUMNS = ["Variant", "Right answers", "Step", "Share of the answers", "Your feedback", "Expected", "Learnt"];
let last = -Infinity, width = 0;

const percent = (share) => `${Math.round(share * 100)} %`;

/** A change of a share, in percentage points with its sign. */
function points(change) {
  const rounded = Math.round(change * 100);
  return `${rounded > 0 ? "+" : rounded < 0 ? "−" : "±"}${Math.abs(rounded)} ${Math.abs(rounded) === 1 ? "point" : "points"}`;
}

/** What a variant is taken to be after feedback: its measured quality with the correction; null without one. */
const corrected = (variant, rated) => (rated?.correction == null ? null : Math.max(0, Math.min(1, variant.quality + rated.correction)));

/** The answers of each variant of a ladder that the server has counted. */
function counted(text, model) {
  const found = {};
  for (const [, labels, value] of text.matchAll(COUNT)) {
    const of = Object.fromEntries([...labels.matchAll(/(\w+)="([^"]*)"/g)].map(([, name, label]) => [name, label]));
    if (of.model === model) found[of.variant] = (found[of.variant] ?? 0) + parseFloat(value);
  }
  return found;
}

function row(variant, name, answers, all, rated) {
  const made = document.createElement("tr"), head = element("th", "", name);
  head.scope = "row";
  const share = element("td"), bar = document.createElement("meter");
  bar.value = all ? answers / all : 0;
  bar.setAttribute("aria-hidden", "true");
  share.append(element("span", "", all ? `${percent(answers / all)} (${answers.toLocaleString("en")})` : "–"), bar);
  const taught = element("td", "", rated?.correction != null ? points(rated.correction) : "–");
  if (rated?.correction != null) taught.title = `Its lower bound, which min_quality is compared with: ${points(rated.correction_low)}`;
  made.append(head, element("td", "", `${percent(variant.quality)} (${percent(variant.quality_low)} to ${percent(variant.quality_high)})`),
    element("td", "", milliseconds(variant.step_ms)), share,
    element("td", "", rated ? `${percent(rated.mean_reward)} good, of ${rated.rewards}` : "–"),
    element("td", "", rated?.mean_expected != null ? percent(rated.mean_expected) : "–"), taught);
  return made;
}

function learnt(rated, waiting) {
  const count = Object.values(rated).reduce((sum, each) => sum + each.rewards, 0);
  const waits = `${waiting.toLocaleString("en")} ${waiting === 1 ? "answer waits" : "answers wait"} for feedback.`;
  if (!count) return `Nothing is learnt yet: choices follow the measured quality. ${waits}`;
  return `Learnt from ${count} ${count === 1 ? "answer" : "answers"} that you rated. A variant whose feedback is worse than expected is chosen less often, among those that keep the objective. "Learnt" is what your feedback adds to its measured quality, for the mean of the prompts you rated; a ring in the graph is the result. ${waits}`;
}

/** Shows the ladder of the chosen model, and nothing for another model. At most every few seconds, unless `now`. */
export async function refresh(now = false) {
  $("ladder").hidden = !ladder();
  if (!ladder() || $("live").hidden || (!now && performance.now() - last < PAUSE_MS)) return;
  last = performance.now();
  await catalogue();
  const [metrics, feedback] = await Promise.all([fetch("metrics"), fetch("v1/feedback", { headers: headers() })]);
  const found = ladder();
  if (!found || !metrics.ok || !feedback.ok) return;
  const { id, variants } = found;
  const answers = counted(await metrics.text(), id), summary = await feedback.json();
  const rated = summary.models[id] ?? {};
  const all = Object.values(answers).reduce((sum, each) => sum + each, 0);
  const short = (variant) => variant.id.replace(`${id}:`, "");
  $("ladder-name").textContent = `Ladder ${id}`;
  $("ladder-rows").replaceChildren(...variants.map((each) => row(each, short(each), answers[each.id] ?? 0, all, rated[each.id])));
  $("ladder-learnt").textContent = learnt(rated, summary.waiting);
  width = Math.max(260, Math.min(620, $("ladder").clientWidth));
  $("frontier").replaceChildren(...[frontier(variants.map((each) => ({ ...each, learnt: corrected(each, rated[each.id]) })), width, short)].filter(Boolean));
}

export function start() {
  $("ladder-head").replaceChildren(...COLUMNS.map((name) => {
    const made = element("th", "", name);
    made.scope = "col";
    return made;
  }));
  addEventListener("resize", () => { if (width !== Math.max(260, Math.min(620, $("ladder").clientWidth))) refresh(true).catch(() => {}); });
}
