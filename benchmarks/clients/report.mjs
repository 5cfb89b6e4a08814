// What a client's script tells the table: one JSON line for each feature.
export const base = process.env.STRETTO_URL ?? "http://127.0.0.1:8000";
export const v1 = base + "/v1";
export const model = process.env.STRETTO_MODEL ?? "desk";
export const question = "What is 22.53 + 32.62?";
export const answer = "55.15";

export async function feature(name, check) {
  let outcome = "yes";
  try {
    await check();
  } catch (error) {
    console.error(error);
    outcome = `no: ${error?.name}: ${error?.message}`.split("\n")[0].slice(0, 160);
  }
  console.log(JSON.stringify({ feature: name, outcome }));
}

export function assert(holds, what = "a check failed") {
  if (!holds) throw new Error(typeof what === "string" ? what : JSON.stringify(what));
}
