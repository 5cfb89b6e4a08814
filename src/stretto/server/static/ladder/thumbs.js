/** Thumbs up and down below an answer. They tell the server how good it was. */
import { $, element, headers, refusal } from "../stream.js";

const SVG = "http://www.w3.org/2000/svg";
const HAND = "M2 8h3v7H2zM6.5 14.5V8.2L9.2 2c1.3 0 2 .9 2 2.1l-.4 2.7h3.1c.9 0 1.4.7 1.2 1.5l-1.3 5.2c-.2.7-.7 1-1.4 1z";

function thumb(way, act) {
  const made = element("button", `plain thumb ${way}`);
  made.type = "button";
  made.setAttribute("aria-label", `Thumbs ${way}`);
  made.title = way === "up" ? "A good answer" : "A bad answer";
  const hand = document.createElementNS(SVG, "svg");
  hand.setAttribute("viewBox", "0 0 17 17");
  hand.setAttribute("aria-hidden", "true");
  const path = document.createElementNS(SVG, "path");
  path.setAttribute("d", HAND);
  hand.append(path);
  made.append(hand);
  made.addEventListener("click", () => act(way));
  return made;
}

/** The two buttons of an answer. `message.id` is the answer's, and `message.thumbs` what was sent before. `kept` is
 * called when the server has a new one. */
export function thumbs(message, kept) {
  const box = element("span", "thumbs");
  const note = element("span", "aside");
  const mark = () => ["up", "down"].forEach((way) => box.querySelector(`.${way}`).setAttribute("aria-pressed", `${message.thumbs === way}`));
  const send = async (way) => {
    note.textContent = "";
    try {
      const response = await fetch("v1/feedback", {
        method: "POST", headers: headers(), body: JSON.stringify({ request_id: message.id, thumbs: way }),
      });
      if (!response.ok) throw await refusal(response);
      const receipt = await response.json();
      message.thumbs = way;
      note.textContent = receipt.learnt ? "Thank you. The next choices depend on it." : "Thank you. It is counted, but no choice depends on it.";
    } catch (error) {
      const unknown = error.status === 404;
      const lost = error instanceof TypeError ? "The server cannot be reached." : error.message;
      note.textContent = unknown ? "The server no longer waits for feedback on this answer." : lost;
      box.querySelectorAll("button").forEach((each) => { each.disabled = unknown; });
    }
    mark();
    $("said").textContent = note.textContent;
    kept();
  };
  box.append(thumb("up", send), thumb("down", send), note);
  mark();
  return box;
}
