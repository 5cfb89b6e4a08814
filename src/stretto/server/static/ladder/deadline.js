/** The slider above the message: the time of a whole answer, which decides how good a variant can give it. */
import { $, duration } from "../stream.js";

const STOPS = [10, 15, 20, 30, 40, 50, 75, 100, 150, 200, 300, 500, 1000, 2000, 5000];  // ms; after them, no limit

function words() {
  const limit = parseFloat($("total").value);
  $("deadline-value").textContent = limit > 0 ? duration(limit) : "no limit";
  $("deadline").setAttribute("aria-valuetext", limit > 0 ? `${duration(limit)} for the whole answer` : "no limit");
}

/** Puts the slider where the field for the total is; another number than a stop's is at the next one. */
function follow() {
  const limit = parseFloat($("total").value);
  const place = limit > 0 ? STOPS.findIndex((stop) => stop >= limit) : -1;
  $("deadline").value = place < 0 ? (limit > 0 ? STOPS.length - 1 : STOPS.length) : place;
  words();
}

export function start() {
  $("deadline").max = STOPS.length;
  $("total").addEventListener("input", follow);
  $("deadline").addEventListener("input", () => {
    $("total").value = STOPS[$("deadline").value] ?? "";
    words();
  });
  // A change in the field is what keeps the settings.
  $("deadline").addEventListener("change", () => $("total").dispatchEvent(new Event("change", { bubbles: true })));
  follow();
}
